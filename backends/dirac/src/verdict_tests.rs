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
        assert_eq!(can_be_killed(status), status != "Completed");
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
        ("Marked for termination", Outcome::Cancelled { by: None }),
        ("Job has exceeded memory limit", Outcome::OutOfMemory),
    ] {
        assert_eq!(outcome(&[line("Failed", minor, "Unknown", 1)]), expected, "{minor}");
    }
    for minor in [
        "Application not found",
        "Failed Downloading InputSandbox",
        "Maximum of reschedulings reached",
        "Exception During Execution",
        "Application thread failed",
        "Application thread did not complete",
        "Illegal Job JDL",
        "No candidate sites available",
        "Failed Downloading InputSandbox LFN(s)",
        "Failed sending requests",
        "Input Data Not Available",
        "Input Data Resolution",
        "Job has insufficient disk space to continue",
        "Job Initialization",
        "Job Wrapper Initialization",
        "JobWrapper execution",
        "Pending Requests",
        "Uploading Output Sandbox",
        "Uploading Output Data",
        "Uploading Outputs",
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
    let late = "bridge: ended exit_code=143 step=setup why=late pieces=0 outs=0 log=0";
    for status in ["Running", "Done", "Failed", "Killed"] {
        assert_eq!(outcome(&[line(status, "x", late, 1)]), Outcome::Expired, "{status}");
    }
    // Even what calls itself good is not believed.
    let full = "bridge: ended exit_code=0 step=script why=full pieces=1 outs=0 log=9";
    let outcome = outcome(&[line("Failed", "x", full, 1)]);
    assert!(
        matches!(&outcome, Outcome::SystemFailed { detail } if detail.contains("disk")),
        "{outcome:?}"
    );
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

#[test]
fn a_silent_job_is_asked_for_its_last_word_and_believed() {
    let ran = line("Running", "Application", "bridge: running on wn1", 1);
    for status in ["Done", "Failed", "Completed"] {
        let mut row = row(&[ran.clone(), line(status, "x", "Exited with status 1", 2)]);
        assert!(is_silent(&row), "{status}");
        row.add_word(Some(GOOD.replace("exit_code=0", "exit_code=7")));
        assert!(!is_silent(&row), "{status}");
        let seen = read(&row, now(0), GRACE);
        let Reading::Tell(Observation::Ended { outcome, .. }) = seen else { panic!("{seen:?}") };
        assert_eq!(outcome, Outcome::Exited { code: 7 }, "{status}");
    }
    let said = line("Running", "Application", GOOD, 2);
    assert!(!is_silent(&row(&[ran.clone(), said, line("Done", "x", "y", 3)])));
    let refused = line("Running", "Application", "bridge: refused it", 2);
    assert!(!is_silent(&row(&[ran.clone(), refused, line("Failed", "x", "y", 3)])));
    assert!(!is_silent(&row(&[line("Failed", "Application not found", "y", 3)])));
    assert!(!is_silent(&row(&[ran, line("Killed", "x", "y", 3)])));
}

#[test]
fn what_is_completed_but_silent_is_given_some_hours() {
    let history = [line("Running", "x", "", 1), line("Completed", "Pending Requests", "", 2)];
    let row = Row { last_update_time: Some("2026-01-01T00:00:02".into()), ..row(&history) };
    let seen = read(&row, now(0), GRACE);
    assert!(matches!(seen, Reading::Tell(Observation::Running { .. })), "{seen:?}");
    let late = "2026-01-01T06:00:30Z".parse().ok();
    let seen = read(&row, late, GRACE);
    let Reading::Tell(Observation::Ended { outcome, .. }) = seen else { panic!("{seen:?}") };
    let Outcome::SystemFailed { detail } = outcome else { panic!("{outcome:?}") };
    assert!(detail.contains("Pending Requests"), "{detail}");
}

#[test]
fn stalled_comes_back_and_ends_as_it_would_have() {
    let running = line("Running", "Application", "bridge: running on wn1", 1);
    let stalled = line("Stalled", "Watchdog identified this job as stalled", "x", 2);
    let seen = read(&row(&[running.clone(), stalled.clone()]), now(0), GRACE);
    assert!(matches!(seen, Reading::Tell(Observation::Running { .. })), "{seen:?}");
    let back = line("Running", "Application", "x", 3);
    let end = line("Running", "Application", &GOOD.replace("exit_code=0", "exit_code=5"), 4);
    let done = line("Failed", "Application Finished With Errors", "x", 5);
    let history = [running, stalled, back, end, done];
    assert_eq!(outcome(&history), Outcome::Exited { code: 5 });
}

#[test]
fn whoever_refused_changes_is_named_without_the_servers_mark() {
    let mut killed = line("Killed", "Marked for termination", "", 1);
    killed.source = Some("bridge(SM)".into());
    assert_eq!(outcome(&[killed]), Outcome::Cancelled { by: None });
}

#[test]
fn an_end_that_was_written_over_is_found_in_the_history() {
    let told = "bridge: ended exit_code=143 step=script signalled=TERM why=term";
    let begun = line("Running", "Application", "bridge: running on x", 2);
    let over = |minor: &str| line("Failed", minor, "bridge: running on x", 3);
    // What the job says last brings the status back that it had found.
    let back = line("Running", "x", told, 4);
    let history = [begun.clone(), over("Received Kill signal"), back.clone()];
    assert_eq!(outcome(&history), Outcome::Cancelled { by: None });
    let history = [begun.clone(), over("Job stalled: pilot not running"), back.clone()];
    assert_eq!(outcome(&history), Outcome::NodeFailed);
    let mut killed = line("Killed", "Marked for termination", "Unknown", 1);
    killed.source = Some(SOURCE.to_owned());
    assert_eq!(outcome(&[killed, begun.clone(), back.clone()]), Outcome::Cancelled { by: None });
    // As long as DIRAC has not ended it, it can be killed, which does.
    let open = row(&[begun.clone(), back]);
    assert!(matches!(read(&open, now(0), GRACE), Reading::Tell(Observation::Running { .. })));
    assert!(!has_ended(&open));
    assert!(has_ended(&row(&[begun, line("Running", "x", GOOD, 3)])));
}
