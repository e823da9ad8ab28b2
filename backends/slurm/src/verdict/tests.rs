use bridge_backend::result::{JobResult, Step};

use super::*;
use crate::listing::Queue;

const SETTLE: Duration = Duration::from_secs(30);

fn row(state: &str, reason: &str) -> Row {
    let line = format!("5|{state}|1795237100|1795237101|1795237105|n1|ci|tok|{reason}\n");
    Queue::read(&line).of(5, "tok").unwrap().clone()
}

fn result(exit_code: i32, signalled: bool) -> JobResult {
    JobResult { exit_code, step: Step::Script, log_len: None, signalled, detail: None }
}

fn notes(result: Option<JobResult>) -> Notes {
    Notes { exists: true, started: Some(5), result, ..Notes::default() }
}

fn evidence<'a>(listed: Listed<'a>, notes: &'a Notes) -> Evidence<'a> {
    Evidence {
        listed,
        accounted: Accounted::None,
        notes,
        exit: Some(None),
        missed_for: Some(SETTLE),
        settle: SETTLE,
    }
}

/// Gives the outcome of a listed job.
fn outcome(state: &str, reason: &str, notes: &Notes) -> Outcome {
    let row = row(state, reason);
    ended(read(&evidence(Listed::Row(&row), notes)))
}

/// Gives the outcome of a reading that has one.
fn ended(reading: Reading) -> Outcome {
    let Reading::Over { observation: Observation::Ended { outcome, .. }, .. } = reading else {
        panic!("{reading:?}")
    };
    outcome
}

#[test]
fn the_table_of_words_and_results_holds() {
    let exited = |code| Outcome::Exited { code };
    let by_nobody = Outcome::Cancelled { by: None };
    let ok = || Some(result(0, false));
    let bad = || Some(result(7, false));
    let told = || Some(result(143, true));
    for (state, own, want) in [
        ("COMPLETED", ok(), exited(0)),
        ("COMPLETED", bad(), exited(7)),
        ("FAILED", bad(), exited(7)),
        ("FAILED", ok(), exited(0)),
        ("TIMEOUT", None, Outcome::TimedOut),
        ("TIMEOUT", ok(), Outcome::TimedOut),
        ("TIMEOUT", told(), Outcome::TimedOut),
        ("DEADLINE", None, Outcome::TimedOut),
        ("OUT_OF_MEMORY", ok(), Outcome::OutOfMemory),
        ("OUT_OF_MEMORY", None, Outcome::OutOfMemory),
        ("CANCELLED", None, by_nobody.clone()),
        ("CANCELLED", told(), by_nobody.clone()),
        ("CANCELLED", bad(), by_nobody.clone()),
        ("CANCELLED", Some(result(143, false)), by_nobody.clone()),
        ("PREEMPTED", Some(result(143, false)), Outcome::Preempted),
        ("FAILED", Some(result(143, false)), exited(143)),
        ("PREEMPTED", told(), Outcome::Preempted),
        ("PREEMPTED", None, Outcome::Preempted),
        ("PREEMPTED", ok(), exited(0)),
        ("NODE_FAIL", None, Outcome::NodeFailed),
        ("NODE_FAIL", ok(), exited(0)),
        ("BOOT_FAIL", ok(), exited(0)),
    ] {
        assert_eq!(outcome(state, "None", &notes(own.clone())), want, "{state} {own:?}");
    }
}

#[test]
fn success_is_never_guessed() {
    for state in ["COMPLETED", "FAILED", "BOOT_FAIL", "LAUNCH_FAILED"] {
        let outcome = outcome(state, "JobLaunchFailure", &notes(None));
        let Outcome::SystemFailed { detail } = outcome else { panic!("{outcome:?}") };
        assert!(detail.contains(state), "{detail}");
    }
}

#[test]
fn a_wrapper_that_failed_is_not_the_users_fault() {
    let own = JobResult { step: Step::Setup, ..result(222, false) };
    let outcome = outcome("FAILED", "NonZeroExitCode", &notes(Some(own)));
    assert!(matches!(outcome, Outcome::SystemFailed { .. }), "{outcome:?}");
}

#[test]
fn a_script_that_timed_out_by_its_own_limit_says_so() {
    let own = JobResult { step: Step::ScriptTimedOut, ..result(143, false) };
    assert_eq!(outcome("FAILED", "None", &notes(Some(own))), Outcome::ScriptTimedOut);
}

#[test]
fn a_job_told_to_end_is_cancelled_only_if_somebody_says_so() {
    let mut told = notes(Some(result(143, true)));
    let by_whom = outcome("FAILED", "NonZeroExitCode", &told);
    assert!(matches!(by_whom, Outcome::SystemFailed { .. }), "{by_whom:?}");
    told.cancelled = true;
    assert_eq!(outcome("FAILED", "NonZeroExitCode", &told), Outcome::Cancelled { by: None });
}

#[test]
fn the_second_start_of_a_requeued_job_is_a_failure_of_the_system() {
    for own in [None, Some(result(143, true))] {
        let mut notes = notes(own);
        notes.refused = vec![5];
        let outcome = outcome("FAILED", "NonZeroExitCode", &notes);
        let Outcome::SystemFailed { detail } = outcome else { panic!("{outcome:?}") };
        assert!(detail.contains("requeued"), "{detail}");
    }
}

#[test]
fn who_cancelled_is_asked_of_the_accounting_unless_it_was_us() {
    let cancelled = row("CANCELLED", "None");
    let mut notes = notes(None);
    let ask =
        Evidence { accounted: Accounted::NotAsked, ..evidence(Listed::Row(&cancelled), &notes) };
    assert_eq!(read(&ask), Reading::AskAccounting);
    for (state, by) in [
        ("CANCELLED by 0", Some("root")),
        ("CANCELLED by 1000", Some("uid 1000")),
        ("CANCELLED", None),
    ] {
        let accounted = Row { state: state.into(), ..cancelled.clone() };
        let told = Evidence { accounted: Accounted::Row(&accounted), ..ask };
        assert_eq!(ended(read(&told)), Outcome::Cancelled { by: by.map(str::to_owned) });
    }
    notes.cancelled = true;
    let ours =
        Evidence { accounted: Accounted::NotAsked, ..evidence(Listed::Row(&cancelled), &notes) };
    assert!(matches!(read(&ours), Reading::Over { early: false, .. }));
}

#[test]
fn a_result_gets_time_to_become_visible() {
    for state in ["COMPLETED", "FAILED", "NODE_FAIL", "PREEMPTED"] {
        let (row, notes) = (row(state, "None"), notes(None));
        let young = Evidence {
            missed_for: Some(Duration::from_secs(2)),
            ..evidence(Listed::Row(&row), &notes)
        };
        assert_eq!(read(&young), Reading::NoNews, "{state}");
        let old = Evidence { missed_for: Some(Duration::from_secs(10)), ..young };
        assert!(matches!(read(&old), Reading::Over { .. }), "{state}");
        let never = Evidence { missed_for: None, ..young };
        assert!(matches!(read(&never), Reading::Over { .. }), "{state}");
    }
}

#[test]
fn the_exit_status_of_a_job_without_result_is_asked_of_the_queue() {
    let (row, notes) = (row("FAILED", "NonZeroExitCode"), notes(None));
    let ask = Evidence { exit: None, ..evidence(Listed::Row(&row), &notes) };
    assert_eq!(read(&ask), Reading::AskExit);
    let with =
        |code, signal| ended(read(&Evidence { exit: Some(Some(Exit { code, signal })), ..ask }));
    assert_eq!(with(137, 0), Outcome::Exited { code: 137 });
    for (exit, words) in [((0, 9), "signal 9"), ((0, 53), "log could not be opened")] {
        let outcome = with(exit.0, exit.1);
        let Outcome::SystemFailed { detail } = outcome else { panic!("{outcome:?}") };
        assert!(detail.contains(words), "{detail}");
    }
    let never_started = Notes { started: None, ..notes.clone() };
    let exit = Some(Some(Exit { code: 1, signal: 0 }));
    let reading = read(&Evidence { exit, notes: &never_started, ..ask });
    let outcome = ended(reading);
    assert!(matches!(outcome, Outcome::SystemFailed { .. }), "{outcome:?}");
}

#[test]
fn a_finishing_job_is_over_early_only_if_it_clearly_ended_by_itself() {
    let read_with = |reason, own, cancelled| {
        let notes = Notes { cancelled, ..notes(own) };
        let row = row("COMPLETING", reason);
        read(&evidence(Listed::Row(&row), &notes))
    };
    for (reason, code) in [("None", 0), ("NonZeroExitCode", 7), ("NonZeroExitCode", 143)] {
        let reading = read_with(reason, Some(result(code, false)), false);
        assert!(matches!(reading, Reading::Over { early: true, .. }), "{reading:?}");
    }
    for (reason, own, cancelled) in [
        ("None", None, false),
        ("None", Some(result(143, true)), false),
        ("None", Some(result(143, false)), false),
        ("None", Some(result(2, false)), false),
        ("None", Some(result(0, false)), true),
        ("OutOfMemory", Some(result(0, false)), false),
        ("TimeLimit", Some(result(1, false)), false),
    ] {
        let reading = read_with(reason, own, cancelled);
        assert!(matches!(reading, Reading::Tell(Observation::Running { .. })), "{reading:?}");
    }
}

#[test]
fn a_held_job_waits_unless_it_had_started() {
    let (put_back, running) = (row("PENDING", "BeginTime"), notes(None));
    let fresh = Notes { started: None, ..running.clone() };
    let reading = read(&evidence(Listed::Row(&put_back), &fresh));
    let Reading::Tell(Observation::Pending { reason, .. }) = reading else { panic!("{reading:?}") };
    assert_eq!(reason.as_deref(), Some("BeginTime"));
    let reading = read(&evidence(Listed::Row(&put_back), &running));
    assert!(matches!(reading, Reading::Over { early: true, .. }), "{reading:?}");
    let ours = Notes { cancelled: true, ..running };
    let reading = read(&evidence(Listed::Row(&put_back), &ours));
    assert!(matches!(reading, Reading::Tell(Observation::Pending { .. })), "{reading:?}");
}

#[test]
fn an_unknown_word_is_unclear() {
    let (row, notes) = (row("DREAMING", "None"), notes(Some(result(0, false))));
    let reading = read(&evidence(Listed::Row(&row), &notes));
    assert_eq!(reading, Reading::Tell(Observation::Unclear { status: "DREAMING".into() }));
}

#[test]
fn an_unlisted_job_is_gone_only_when_that_is_certain() {
    let none = notes(None);
    let absent = evidence(Listed::Absent, &none);
    let gone = Reading::Over { observation: Observation::Gone, early: false };
    let young = Some(Duration::from_secs(29));
    // The accounting has a word first, and its silence is no answer.
    let read_with = |accounted, missed_for| read(&Evidence { accounted, missed_for, ..absent });
    assert_eq!(read_with(Accounted::NotAsked, Some(SETTLE)), Reading::AskAccounting);
    assert_eq!(read_with(Accounted::Silent, Some(SETTLE)), Reading::NoNews);
    for accounted in [Accounted::None, Accounted::Absent] {
        assert_eq!(read_with(accounted, young), Reading::NoNews);
        assert_eq!(read_with(accounted, Some(SETTLE)), gone);
        assert_eq!(read_with(accounted, None), gone);
    }
    let replaced = Evidence { missed_for: young, ..evidence(Listed::Replaced, &none) };
    assert_eq!(read(&replaced), gone);
}

#[test]
fn an_unlisted_job_is_what_it_says_itself_or_what_the_accounting_says() {
    let own = notes(Some(result(3, false)));
    for accounted in [Accounted::None, Accounted::Absent, Accounted::Silent] {
        let evidence = Evidence { accounted, ..evidence(Listed::Absent, &own) };
        assert_eq!(ended(read(&evidence)), Outcome::Exited { code: 3 });
    }
    let none = notes(None);
    let timeout = row("TIMEOUT", "0:0");
    let half = Row { end: None, ..row("FAILED", "0:0") };
    let with = |row, notes| {
        read(&Evidence { accounted: Accounted::Row(row), ..evidence(Listed::Absent, notes) })
    };
    assert_eq!(ended(with(&timeout, &none)), Outcome::TimedOut);
    assert_eq!(with(&half, &none), Reading::NoNews);
    assert_eq!(ended(with(&half, &own)), Outcome::Exited { code: 3 });
    let running = row("RUNNING", "0:0");
    assert_eq!(with(&running, &none), Reading::NoNews);
    // Cancelled by us while nobody looked, and forgotten by Slurm.
    let told = Notes { cancelled: true, ..notes(Some(result(143, true))) };
    assert_eq!(ended(read(&evidence(Listed::Absent, &told))), Outcome::Cancelled { by: None });
}

#[test]
fn the_accountings_exit_status_is_not_believed() {
    let (none, failed) = (notes(None), row("FAILED", "9:0"));
    let reading = read(&Evidence {
        accounted: Accounted::Row(&failed),
        exit: None,
        ..evidence(Listed::Absent, &none)
    });
    let outcome = ended(reading);
    assert!(matches!(outcome, Outcome::SystemFailed { .. }), "{outcome:?}");
}
