//! Turns what DIRAC and the job itself say into one observation.
//!
//! Pure: everything that is known comes in.
//!
//! | DIRAC's status | the job's own word | observation |
//! | --- | --- | --- |
//! | any | ended by itself | how it ended |
//! | any | ended because its time was up, or because it was killed | that |
//! | any | not begun because its time was up | expired |
//! | any | ended on a full disk | failed: what it could not write, it may not have noticed |
//! | Submitting, Received, Checking, Staging, Scouting, Waiting, Matched, Rescheduled | none | pending |
//! | Running, Completing, Stalled | none | running |
//! | Completed | none | running, for a while: the payload is over, transfers are pending |
//! | Done | none | failed: success is never guessed |
//! | Failed | none | by its minor status, see [`failed`] |
//! | Killed, never ran | none | cancelled |
//! | Killed, ran | none | still running until it has ended, or cannot tell any more; then cancelled |
//! | Deleted | none | cancelled |
//! | another word | none | unclear |
//!
//! The job tells its end before DIRAC's wrapper does, and DIRAC may still call it Running then. A status
//! that DIRAC refuses to change keeps a wrong minor status, and its start and end times cannot be
//! trusted, so times come from the history.

use std::time::Duration;

use bridge_backend::result::JobResult;
use bridge_backend::{Observation, Outcome, Usage};
use jiff::{SignedDuration, Timestamp};

use crate::search::{Logged, Row};

/// Begins every application status of ours.
pub(crate) const OURS: &str = "bridge: ";

/// The job's own word, as it comes through DIRAC.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Report {
    /// The script was started on this machine.
    Running { host: String },
    /// The script was not started.
    Refused { why: String },
    /// The script has ended.
    Ended { result: Option<JobResult>, why: Option<Why> },
}

/// Why a script was ended from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Why {
    /// The job was killed in DIRAC.
    Cancelled,
    /// Its wall time was up.
    Timeout,
    /// There was no time left to begin.
    Late,
    /// The worker's disk was full.
    Full,
    /// The site told it to end.
    Told,
}

/// What follows from what is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Reading {
    /// Tell this.
    Tell(Observation),
    /// The history must be asked.
    NeedHistory,
    /// Nothing can be told now.
    NoNews,
}

/// DIRAC's statuses, by what they mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Waiting,
    Going,
    Completed,
    Done,
    Failed,
    Killed,
    Deleted,
    Unknown,
}

fn phase(status: &str) -> Phase {
    match status {
        "Submitting" | "Received" | "Checking" | "Staging" | "Scouting" | "Waiting" | "Matched"
        | "Rescheduled" => Phase::Waiting,
        // Stalled comes back, or fails after some hours.
        "Running" | "Completing" | "Stalled" => Phase::Going,
        "Completed" => Phase::Completed,
        "Done" => Phase::Done,
        "Failed" => Phase::Failed,
        "Killed" => Phase::Killed,
        "Deleted" => Phase::Deleted,
        _ => Phase::Unknown,
    }
}

/// Says whether DIRAC would still end a job of this status.
pub(crate) fn can_be_killed(status: &str) -> bool {
    match phase(status) {
        Phase::Waiting | Phase::Going | Phase::Unknown => true,
        Phase::Completed | Phase::Done | Phase::Failed | Phase::Killed | Phase::Deleted => false,
    }
}

/// Reads an application status of ours.
pub(crate) fn report(text: Option<&str>) -> Option<Report> {
    let text = text?.strip_prefix(OURS)?;
    if let Some(host) = text.strip_prefix("running on ") {
        // Behind it may stand how much of the log there is.
        let host = host.split_whitespace().next().unwrap_or_default();
        return Some(Report::Running { host: host.to_owned() });
    }
    if let Some(why) = text.strip_prefix("refused ") {
        return Some(Report::Refused { why: why.trim().to_owned() });
    }
    let facts = text.strip_prefix("ended ")?.split_whitespace().collect::<Vec<_>>().join("\n");
    // The helper's own words come after those of the job's script.
    let why = match facts.lines().rev().find_map(|line| line.strip_prefix("why=")) {
        Some("cancelled") => Some(Why::Cancelled),
        Some("timeout") => Some(Why::Timeout),
        Some("late") => Some(Why::Late),
        Some("full") => Some(Why::Full),
        Some(_) => Some(Why::Told),
        None => None,
    };
    Some(Report::Ended { result: JobResult::parse(&facts).ok(), why })
}

/// Gives the first end that a job told: a later attempt of DIRAC's does not run the script again.
fn own_end(row: &Row) -> Option<(Report, Option<Timestamp>)> {
    let is_end = |report: &Report| matches!(report, Report::Ended { .. });
    let of_line = |line: &Logged| {
        Some((report(line.application_status.as_deref()).filter(is_end)?, line.time()))
    };
    row.history()
        .iter()
        .find_map(of_line)
        .or_else(|| Some((report(row.application_status.as_deref()).filter(is_end)?, None)))
}

/// Says whether DIRAC calls a job over that ran and never said how it ended.
pub(crate) fn is_silent(row: &Row) -> bool {
    let over = match phase(row.status()) {
        Phase::Completed | Phase::Done | Phase::Failed => true,
        // What was killed is cancelled, whatever it would have said.
        Phase::Waiting | Phase::Going | Phase::Killed | Phase::Deleted | Phase::Unknown => false,
    };
    let ran = |line: &Logged| line.status.as_deref() == Some("Running");
    over && row.history().iter().any(ran) && own_end(row).is_none() && !refused(row)
}

/// Says whether a job was not started, and said so.
fn refused(row: &Row) -> bool {
    let mut words = row.history().iter().map(|line| report(line.application_status.as_deref()));
    words.any(|word| matches!(word, Some(Report::Refused { .. })))
}

/// How long the transfers of a job may be pending that itself said nothing. DIRAC repeats them for
/// hours; what bridge needs of a job does not depend on them.
const PENDING_FOR: SignedDuration = SignedDuration::from_hours(6);

/// Says whether a job told its own end already, and needs no word of DIRAC's any more.
pub(crate) fn has_ended(row: &Row) -> bool {
    matches!(own_end(row), Some((Report::Ended { why, .. }, _)) if why != Some(Why::Told))
}

/// Gives how DIRAC ended a job that was told to end, from its history: the status itself may have been
/// written over. Of two changes at the same moment the server keeps the status of the later writer, even
/// if that one only had something to say.
fn ended_by_dirac(row: &Row) -> Option<Outcome> {
    let phases = || row.history().iter().filter_map(|line| line.status.as_deref()).map(phase);
    if phases().any(|phase| matches!(phase, Phase::Killed | Phase::Deleted)) {
        return Some(Outcome::Cancelled { by: killer(row) });
    }
    phases().any(|phase| phase == Phase::Failed).then(|| failed(row))
}

/// Reads what is known of a job; `now` is the server's time, `grace` the time that a killed job has.
pub(crate) fn read(row: &Row, now: Option<Timestamp>, grace: Duration) -> Reading {
    let phase = phase(row.status());
    let end = own_end(row);
    let over = match phase {
        Phase::Waiting | Phase::Going | Phase::Unknown => end.is_some(),
        Phase::Completed | Phase::Done | Phase::Failed | Phase::Killed | Phase::Deleted => true,
    };
    if over && row.logging_info.is_none() {
        return Reading::NeedHistory;
    }
    let ended = |outcome| Reading::Tell(Observation::Ended { outcome, usage: usage(row) });
    if let Some((Report::Ended { result, why }, _)) = end {
        match (why, result.as_ref().map(JobResult::outcome)) {
            (Some(Why::Cancelled), _) => {
                return ended(Outcome::Cancelled { by: killer(row) });
            }
            (Some(Why::Timeout), _) => return ended(Outcome::TimedOut),
            (Some(Why::Late), _) => return ended(Outcome::Expired),
            (Some(Why::Full), _) => {
                let site = place(row).map(|site| format!(" at {site}")).unwrap_or_default();
                let detail = format!("the disk of the worker{site} was full when the job ended");
                return ended(Outcome::SystemFailed { detail });
            }
            (None, Some(Some(outcome))) => return ended(outcome),
            (None, None) => {
                let detail = "the job left a result that makes no sense".to_owned();
                return ended(Outcome::SystemFailed { detail });
            }
            // Told to end: DIRAC says why, as soon as it knows.
            (Some(Why::Told), _) | (None, Some(None)) => match phase {
                Phase::Waiting | Phase::Going | Phase::Unknown => {
                    return match ended_by_dirac(row) {
                        Some(outcome) => ended(outcome),
                        None => Reading::Tell(Observation::Running { host: host(row) }),
                    };
                }
                Phase::Completed | Phase::Done => {
                    let detail = "the job was told to end (TERM), and DIRAC does not say why";
                    return ended(Outcome::SystemFailed { detail: detail.to_owned() });
                }
                Phase::Failed | Phase::Killed | Phase::Deleted => {}
            },
        }
        return match phase {
            Phase::Failed => ended(failed(row)),
            Phase::Waiting
            | Phase::Going
            | Phase::Completed
            | Phase::Done
            | Phase::Killed
            | Phase::Deleted
            | Phase::Unknown => ended(Outcome::Cancelled { by: killer(row) }),
        };
    }
    match phase {
        Phase::Waiting => {
            Reading::Tell(Observation::Pending { reason: Some(reason(row)), starts_at: None })
        }
        Phase::Going => Reading::Tell(Observation::Running { host: host(row) }),
        Phase::Completed => {
            let pending = row.changed().zip(now).map(|(last, now)| now.duration_since(last));
            if pending.is_some_and(|pending| pending > PENDING_FOR) {
                let detail = format!("it left no result in time: {}", words(row));
                return ended(Outcome::SystemFailed { detail });
            }
            Reading::Tell(Observation::Running { host: host(row) })
        }
        Phase::Done => {
            let detail = format!("it left no result: {}", words(row));
            ended(Outcome::SystemFailed { detail })
        }
        Phase::Failed => ended(failed(row)),
        Phase::Deleted => ended(Outcome::Cancelled { by: killer(row) }),
        Phase::Killed => {
            // Killed reads so at once, long before anything ends on the worker.
            let ran = !refused(row)
                && row.history().iter().any(|line| line.status.as_deref() == Some("Running"));
            let last = row.changed().or_else(|| row.history().iter().rev().find_map(Logged::time));
            match (ran, last, now) {
                (false, _, _) | (true, None, _) => ended(Outcome::Cancelled { by: killer(row) }),
                (true, Some(last), Some(now)) => {
                    // A time that lies ahead says nothing about how long it was.
                    let waited = Duration::try_from(now.duration_since(last));
                    if waited.is_ok_and(|waited| waited > grace) {
                        ended(Outcome::Cancelled { by: killer(row) })
                    } else {
                        Reading::Tell(Observation::Running { host: host(row) })
                    }
                }
                (true, Some(_), None) => Reading::NoNews,
            }
        }
        Phase::Unknown => Reading::Tell(Observation::Unclear { status: row.status().to_owned() }),
    }
}

/// Reads a failure of which the job itself told nothing.
fn failed(row: &Row) -> Outcome {
    let lines = || row.history().iter().rev();
    if let Some(Report::Refused { why }) =
        lines().find_map(|line| report(line.application_status.as_deref()))
    {
        return Outcome::SystemFailed { detail: format!("the job was not started: {why}") };
    }
    // A refused change leaves its minor status behind, so that of the failure itself counts.
    let minor = lines()
        .find(|line| line.status.as_deref() == Some("Failed"))
        .and_then(|line| line.minor_status.as_deref())
        .or(row.minor_status.as_deref())
        .unwrap_or_default();
    // DIRAC's minor statuses, as its services and its wrapper know them; the rest is the site's failure
    // and shown in DIRAC's words, among them "Application not found", "Illegal Job JDL", "Failed
    // Downloading InputSandbox", "Application thread failed", "Job has insufficient disk space to
    // continue", "Maximum of reschedulings reached".
    match minor {
        "Job has exceeded maximum wall clock time"
        | "Job has reached the CPU limit of the queue" => Outcome::TimedOut,
        "Marked for termination" | "Received Kill signal" => Outcome::Cancelled { by: killer(row) },
        "Job stalled: pilot not running" | "Watchdog identified this job as stalled" => {
            Outcome::NodeFailed
        }
        minor if minor.to_lowercase().contains("memory") => Outcome::OutOfMemory,
        // The helper's own failures have other exit codes than the job's.
        "Application Finished With Errors" if exited_with_one(row) => Outcome::Exited { code: 1 },
        _ => Outcome::SystemFailed { detail: words(row) },
    }
}

/// Says whether the wrapper noted the exit code by which the helper says "the job failed".
fn exited_with_one(row: &Row) -> bool {
    let noted = row.history().iter().map(|line| line.application_status.as_deref());
    noted
        .chain([row.application_status.as_deref()])
        .flatten()
        .any(|text| text.to_lowercase().trim() == "exited with status 1")
}

/// Gives who killed a job, unless it was us.
fn killer(row: &Row) -> Option<String> {
    let gone = |line: &&Logged| matches!(line.status.as_deref(), Some("Killed" | "Deleted"));
    let line = row.history().iter().find(gone)?;
    // Refused changes stand there with a mark of the state machine.
    let source = line.source.as_deref()?.trim_end_matches("(SM)").trim();
    (!source.is_empty() && source != SOURCE).then(|| format!("{source} in DIRAC"))
}

/// By this name our changes stand in a job's history.
pub(crate) const SOURCE: &str = "bridge";

fn host(row: &Row) -> Option<String> {
    match report(row.application_status.as_deref()) {
        Some(Report::Running { host }) => Some(host),
        Some(Report::Refused { .. } | Report::Ended { .. }) | None => place(row),
    }
}

/// Gives the site, where DIRAC names one.
fn place(row: &Row) -> Option<String> {
    row.site.clone().filter(|site| !matches!(site.as_str(), "" | "ANY" | "Multiple"))
}

/// Puts why a job waits into words.
fn reason(row: &Row) -> String {
    let again = match row.reschedule_counter {
        None | Some(0) => String::new(),
        Some(1) => ", rescheduled once".to_owned(),
        Some(times) => format!(", rescheduled {times} times"),
    };
    match row.minor_status.as_deref() {
        None | Some("" | "Unknown") => format!("{}{again}", row.status()),
        Some(minor) => format!("{}: {minor}{again}", row.status()),
    }
}

/// Puts DIRAC's words into a sentence.
fn words(row: &Row) -> String {
    let known =
        |text: &Option<String>| text.clone().filter(|text| !text.is_empty() && text != "Unknown");
    let minor = known(&row.minor_status).map(|m| format!(", {m}")).unwrap_or_default();
    let application = known(&row.application_status)
        .filter(|text| !text.starts_with(OURS))
        .map(|text| format!(" ({text})"))
        .unwrap_or_default();
    let place = place(row).map(|site| format!(" at {site}")).unwrap_or_default();
    format!("DIRAC says {}{minor}{application}{place}", row.status())
}

/// Says what is known of the time that a job took.
fn usage(row: &Row) -> Usage {
    let runs = |line: &&Logged| {
        matches!(report(line.application_status.as_deref()), Some(Report::Running { .. }))
    };
    let going = |line: &&Logged| line.status.as_deref() == Some("Running");
    let started_at = row
        .history()
        .iter()
        .find(runs)
        .or_else(|| row.history().iter().find(going))
        .and_then(Logged::time);
    let ended_at = match own_end(row) {
        Some((_, Some(time))) => Some(time),
        Some((_, None)) | None => row.history().iter().rev().find_map(Logged::time),
    };
    let elapsed = started_at
        .zip(ended_at)
        .map(|(start, end)| end.duration_since(start))
        .filter(|elapsed| *elapsed >= SignedDuration::ZERO)
        .and_then(|elapsed| Duration::try_from(elapsed).ok());
    Usage { elapsed, started_at, ended_at, nodes: place(row), ..Usage::default() }
}

#[cfg(test)]
#[path = "verdict_tests.rs"]
mod tests;
