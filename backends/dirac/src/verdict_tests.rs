use super::*;

const GRACE: Duration = Duration::from_secs(60);

fn line(status: &str, minor: &str, application: &str, second: u8) -> Logged {
    Logged {
        status: Some(status.into()),
        minor_status: Some(minor.into()),
        application_status: Some(application.into()),
        status_time: Some(format!("2026-01-01T00:00:{second:02}")),
        source: Some("JobWrapper".into()),
    }
}

fn row(history: &[Logged]) -> Row {
    let last = history.last().unwrap();
    Row {
        id: 1,
        site: Some("LCG.X.y".into()),
        status: last.status.clone(),
        minor_status: last.minor_status.clone(),
        application_status: last.application_status.clone(),
        logging_info: Some(history.to_vec()),
        ..Row::default()
    }
}

fn now(second: u8) -> Option<Timestamp> {
    format!("2026-01-01T00:02:{second:02}Z").parse().ok()
}

fn outcome(history: &[Logged]) -> Outcome {
    match read(&row(history), now(0), GRACE) {
        Reading::Tell(Observation::Ended { outcome, .. }) => outcome,
        other @ (Reading::Tell(_) | Reading::NeedHistory | Reading::NoNews) => panic!("{other:?}"),
    }
}

const GOOD: &str = "bridge: ended exit_code=0 step=script log_len=6 pieces=1 outs=0 log=6";

#[test]
fn every_status_of_dirac_has_its_meaning() {
    for status in [
        "Submitting",
        "Received",
        "Checking",
        "Staging",
        "Scouting",
        "Waiting",
        "Matched",
        "Rescheduled",
    ] {
        let seen = read(&row(&[line(status, "x", "Unknown", 1)]), now(0), GRACE);
        assert!(matches!(seen, Reading::Tell(Observation::Pending { .. })), "{status}: {seen:?}");
        assert!(can_be_killed(status), "{status}");
    }
    for status in ["Running", "Completing", "Stalled", "Completed"] {
        let seen = read(&row(&[line(status, "x", "Unknown", 1)]), now(0), GRACE);
        assert!(matches!(seen, Reading::Tell(Observation::Running { .. })), "{status}: {seen:?}");
    }
    for status in ["Done", "Failed", "Killed", "Deleted"] {
        let history = [line(status, "x", "Unknown", 1)];
        assert_ne!(outcome(&history), Outcome::Exited { code: 0 }, "{status}");
        let blind = Row { logging_info: None, ..row(&history) };
        assert_eq!(read(&blind, now(0), GRACE), Reading::NeedHistory);
        assert!(!can_be_killed(status), "{status}");
    }
    let seen = read(&row(&[line("WOBBLING", "x", "Unknown", 1)]), now(0), GRACE);
    assert_eq!(seen, Reading::Tell(Observation::Unclear { status: "WOBBLING".into() }));
}

#[test]
fn the_jobs_own_word_counts_whatever_dirac_says() {
    let running = line("Running", "Application", "bridge: running on wn1", 1);
    let ended = line("Running", "Application", GOOD, 4);
    for later in [
        vec![],
        vec![line("Done", "Execution Complete", GOOD, 5)],
        vec![line("Failed", "Uploading Output Sandbox", "x", 5)],
        vec![line("Killed", "Marked for termination", "x", 5)],
        vec![
            line("Rescheduled", "Job Rescheduled", "x", 5),
            line("Failed", "x", "bridge: refused y", 6),
        ],
    ] {
        let history = [vec![running.clone(), ended.clone()], later].concat();
        assert_eq!(outcome(&history), Outcome::Exited { code: 0 }, "{history:?}");
    }
    let seen = read(&row(&[running, ended]), now(0), GRACE);
    let Reading::Tell(Observation::Ended { usage, .. }) = seen else { panic!("{seen:?}") };
    assert_eq!(usage.elapsed, Some(Duration::from_secs(3)));
}

#[test]
fn a_failure_is_read_from_its_minor_status() {
    for (minor, expected) in [
        ("Job has exceeded maximum wall clock time", Outcome::TimedOut),
        ("Job has reached the CPU limit of the queue", Outcome::TimedOut),
        ("Job stalled: pilot not running", Outcome::NodeFailed),
        ("Watchdog identified this job as stalled", Outcome::NodeFailed),
        ("Received Kill signal", Outcome::Cancelled { by: None }),
    ] {
        assert_eq!(outcome(&[line("Failed", minor, "Unknown", 1)]), expected, "{minor}");
    }
    for minor in [
        "Application not found",
        "Failed Downloading InputSandbox",
        "Maximum of reschedulings reached",
        "Exception During Execution",
        "Something new",
        "",
    ] {
        let Outcome::SystemFailed { detail } = outcome(&[line("Failed", minor, "why", 1)]) else {
            panic!("{minor}");
        };
        assert!(detail.contains(minor) && detail.contains("why"), "{detail}");
    }
    let one = [line("Failed", "Application Finished With Errors", "Exited with status 1", 1)];
    assert_eq!(outcome(&one), Outcome::Exited { code: 1 });
    let three = [line("Failed", "Application Finished With Errors", "Exited with status 3", 1)];
    assert!(matches!(outcome(&three), Outcome::SystemFailed { .. }));
}

#[test]
fn a_killed_job_that_ran_is_awaited_and_one_that_did_not_is_over() {
    assert_eq!(
        outcome(&[line("Killed", "x", "", 1)]),
        Outcome::Cancelled { by: Some("JobWrapper in DIRAC".into()) }
    );
    let history = [line("Running", "x", "", 1), line("Killed", "x", "", 2)];
    let early = "2026-01-01T00:00:30Z".parse().ok();
    let seen = read(&row(&history), early, GRACE);
    assert!(matches!(seen, Reading::Tell(Observation::Running { .. })), "{seen:?}");
    assert!(matches!(outcome(&history), Outcome::Cancelled { .. }));
    let refused = line("Killed", "x", "bridge: refused it was killed before it started", 3);
    let never = [history.to_vec(), vec![refused]].concat();
    let seen = read(&row(&never), early, GRACE);
    assert!(matches!(seen, Reading::Tell(Observation::Ended { .. })), "{seen:?}");
    let told = "bridge: ended exit_code=143 step=script signalled=TERM why=cancelled pieces=1";
    let history = [line("Running", "x", "", 1), line("Killed", "x", told, 2)];
    let seen = read(&row(&history), early, GRACE);
    assert!(matches!(
        seen,
        Reading::Tell(Observation::Ended { outcome: Outcome::Cancelled { .. }, .. })
    ));
}

#[test]
fn what_was_told_to_end_waits_for_diracs_reason() {
    let told = "bridge: ended exit_code=143 step=script signalled=TERM why=term";
    let seen = read(&row(&[line("Running", "x", told, 1)]), now(0), GRACE);
    assert!(matches!(seen, Reading::Tell(Observation::Running { .. })), "{seen:?}");
    let minor = "Job has exceeded maximum wall clock time";
    assert_eq!(
        outcome(&[line("Running", "x", told, 1), line("Failed", minor, "", 2)]),
        Outcome::TimedOut
    );
    let timeout = "bridge: ended exit_code=143 step=script signalled=TERM why=timeout";
    assert_eq!(outcome(&[line("Running", "x", timeout, 1)]), Outcome::TimedOut);
}

#[test]
fn nonsense_is_no_success() {
    let odd = "bridge: ended exit_code=yes pieces=1 outs=0 log=0";
    assert!(matches!(outcome(&[line("Done", "x", odd, 1)]), Outcome::SystemFailed { .. }));
    assert!(matches!(
        outcome(&[line("Done", "x", "bridge: ended", 1)]),
        Outcome::SystemFailed { .. }
    ));
}
