//! Turns what Slurm, the accounting and the job's own files say into one observation.
//!
//! Pure: everything that is known comes in, what is still needed goes out.
//!
//! | Slurm's word | the job's own word | outcome |
//! | --- | --- | --- |
//! | TIMEOUT, DEADLINE, OUT_OF_MEMORY, CANCELLED | any | Slurm's |
//! | PREEMPTED, NODE_FAIL, BOOT_FAIL | ended by itself | the job's |
//! | PREEMPTED, NODE_FAIL, BOOT_FAIL | none, or told to end | Slurm's |
//! | COMPLETED, FAILED | ended by itself | the job's |
//! | COMPLETED, FAILED | told to end | a cancellation of ours, or somebody's signal |
//! | COMPLETED | none | failed: success is never guessed |
//! | FAILED | none | the exit status, if Slurm gives one |
//! | COMPLETING, clearly not because of Slurm | ended by itself | the job's: a long epilog delays nobody |
//! | put back after it had started | ended by itself | the job's |
//! | put back after it had started | none, or told to end | failed: it would not run again |
//!
//! Slurm tells the processes of a job to end one after the other. A child may die of that, and its
//! script write down a failure of its own, before the script itself is told. So where Slurm has a reason
//! of its own, a job that died of TERM or KILL did not end by itself; and a cancelled one, which may have
//! made any status of its child's death, never did.

use std::time::Duration;

use bridge_backend::{Observation, Outcome};

use crate::jobdir::Notes;
use crate::listing::{Exit, Final, Phase, Row};

/// The exit statuses of what died of TERM and KILL.
const TOLD: [i32; 2] = [143, 137];

/// What Slurm's queue says of a job.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Listed<'a> {
    /// It is there.
    Row(&'a Row),
    /// Not, in an answer that was complete.
    Absent,
    /// Its id is another job's.
    Replaced,
}

/// What the accounting says of a job.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Accounted<'a> {
    /// It was not asked.
    NotAsked,
    /// It did not answer.
    Silent,
    /// There is none.
    None,
    /// It has no such job.
    Absent,
    /// It has.
    Row(&'a Row),
}

/// All that is known of a job.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Evidence<'a> {
    pub(crate) listed: Listed<'a>,
    pub(crate) accounted: Accounted<'a>,
    pub(crate) notes: &'a Notes,
    /// How the batch script ended, as the queue says; the outer one is whether it was asked.
    pub(crate) exit: Option<Option<Exit>>,
    /// For how long the job's own word has been missed; `None` when it cannot come any more.
    pub(crate) missed_for: Option<Duration>,
    /// For how long a job may be invisible.
    pub(crate) settle: Duration,
}

/// What follows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Reading {
    /// Tell this.
    Tell(Observation),
    /// The job is over: mark it and tell this. `early` means that Slurm has not said its last word.
    Over {
        /// What to tell.
        observation: Observation,
        /// Whether Slurm may still add to the log, or keep the job queued.
        early: bool,
    },
    /// Nothing can be told; look again at the next poll.
    NoNews,
    /// The accounting must be asked.
    AskAccounting,
    /// The exit status must be asked.
    AskExit,
}

/// How long a file may take to become visible here after Slurm says that its writer has ended. Network
/// file systems remember for 30 to 60 s that a file is not there, but [`crate::jobdir`] makes them look.
const RESULT_GRACE: Duration = Duration::from_secs(10);

/// Reads the evidence.
pub(crate) fn read(evidence: &Evidence<'_>) -> Reading {
    match evidence.listed {
        Listed::Row(row) => listed(row, evidence),
        Listed::Absent | Listed::Replaced => unlisted(evidence),
    }
}

/// Says what a listed job that needs no further evidence is doing.
pub(crate) fn at_a_glance(row: &Row) -> Option<Observation> {
    match row.phase() {
        Phase::Waiting => Some(pending(row)),
        Phase::Going => Some(Observation::Running { host: row.host() }),
        Phase::Unknown => Some(Observation::Unclear { status: row.state.clone() }),
        Phase::PutBack | Phase::Finishing | Phase::Final(_) => None,
    }
}

fn pending(row: &Row) -> Observation {
    Observation::Pending { reason: row.reason.clone(), starts_at: row.start }
}

fn listed(row: &Row, evidence: &Evidence<'_>) -> Reading {
    if let Some(observation) = at_a_glance(row) {
        return Reading::Tell(observation);
    }
    let notes = evidence.notes;
    let own = own(notes);
    let ended = |outcome| Observation::Ended { outcome, usage: row.usage() };
    match row.phase() {
        Phase::Finishing => match own {
            // The state behind this word is hidden, but its reason is not: that of a cancellation
            // is none as well, so only a success is believed without one.
            Some(outcome)
                if !notes.cancelled
                    && match row.reason.as_deref() {
                        None => outcome == Outcome::Exited { code: 0 },
                        Some(reason) => reason == "NonZeroExitCode",
                    } =>
            {
                Reading::Over { observation: ended(outcome), early: true }
            }
            Some(_) | None => Reading::Tell(Observation::Running { host: row.host() }),
        },
        Phase::PutBack => {
            if notes.started != Some(row.id) || notes.cancelled {
                // Held before it ran; or ours to end, and Slurm is about to say so.
                return Reading::Tell(pending(row));
            }
            let outcome = by_itself(own).unwrap_or_else(requeued);
            Reading::Over { observation: ended(outcome), early: true }
        }
        Phase::Final(word) => final_word(word, row, evidence, own),
        Phase::Waiting | Phase::Going | Phase::Unknown => Reading::NoNews,
    }
}

/// Gives the job's own word, unless it says itself that it was told to end.
fn own(notes: &Notes) -> Option<Outcome> {
    notes.result.as_ref().and_then(bridge_backend::result::JobResult::outcome)
}

/// Leaves out an end that may have come from outside before the script knew.
fn by_itself(own: Option<Outcome>) -> Option<Outcome> {
    own.filter(|outcome| !TOLD.iter().any(|code| *outcome == Outcome::Exited { code: *code }))
}

fn requeued() -> Outcome {
    Outcome::SystemFailed {
        detail: "the job was requeued after it had started; it is not run again".into(),
    }
}

/// Reads a final word, from the queue or the accounting.
fn final_word(word: Final, row: &Row, evidence: &Evidence<'_>, own: Option<Outcome>) -> Reading {
    let notes = evidence.notes;
    let over = |outcome| Reading::Over {
        observation: Observation::Ended { outcome, usage: row.usage() },
        early: false,
    };
    let own = match word {
        Final::TimedOut | Final::OutOfMemory | Final::Cancelled => None,
        Final::Completed | Final::Failed => own,
        Final::Preempted | Final::NodeFailed | Final::NotLaunched => by_itself(own),
    };
    match (word, own) {
        (Final::TimedOut, _) => over(Outcome::TimedOut),
        (Final::OutOfMemory, _) => over(Outcome::OutOfMemory),
        (_, Some(outcome)) => over(outcome),
        (Final::Cancelled, None) if notes.cancelled => over(Outcome::Cancelled { by: None }),
        (Final::Cancelled, None) => match evidence.accounted {
            // Only the accounting says who.
            Accounted::NotAsked => Reading::AskAccounting,
            Accounted::Row(row) => over(Outcome::Cancelled { by: canceller(&row.state) }),
            Accounted::Silent | Accounted::None | Accounted::Absent => {
                over(Outcome::Cancelled { by: None })
            }
        },
        (Final::Preempted, None) => missing_result(evidence).unwrap_or(over(Outcome::Preempted)),
        (Final::NodeFailed, None) => missing_result(evidence).unwrap_or(over(Outcome::NodeFailed)),
        (Final::NotLaunched, None) => {
            over(Outcome::SystemFailed { detail: words("Slurm could not start it", row, None) })
        }
        (Final::Completed | Final::Failed, None) if notes.result.is_some() => {
            over(if notes.cancelled {
                Outcome::Cancelled { by: None }
            } else if notes.refused.contains(&row.id) {
                requeued()
            } else {
                Outcome::SystemFailed {
                    detail: "the job was told to end (TERM), and Slurm does not say by whom".into(),
                }
            })
        }
        (Final::Completed | Final::Failed, None) if notes.refused.contains(&row.id) => {
            over(requeued())
        }
        (Final::Completed, None) => missing_result(evidence).unwrap_or_else(|| {
            over(Outcome::SystemFailed { detail: words("it left no result", row, None) })
        }),
        (Final::Failed, None) => missing_result(evidence).unwrap_or_else(|| match evidence.exit {
            // The accounting of most versions takes 128 from statuses above it; only the queue is
            // believed, and asked while it still lists the job.
            None if matches!(evidence.listed, Listed::Row(_)) => Reading::AskExit,
            Some(Some(Exit { code, signal: 0 })) if code != 0 && notes.started == Some(row.id) => {
                over(Outcome::Exited { code })
            }
            None | Some(None | Some(_)) => over(Outcome::SystemFailed {
                detail: words("it left no result", row, evidence.exit.flatten()),
            }),
        }),
    }
}

/// Says to wait while a result may still become visible.
fn missing_result(evidence: &Evidence<'_>) -> Option<Reading> {
    let grace = RESULT_GRACE.min(evidence.settle);
    let waiting = evidence.notes.result.is_none()
        && evidence.missed_for.is_some_and(|missed_for| missed_for < grace);
    waiting.then_some(Reading::NoNews)
}

/// Reads a job that the queue does not list.
///
/// The controller forgets an ended job after `MinJobAge`, and one that it had just acknowledged when it
/// crashed. The accounting keeps ended jobs, but may be behind. So the order is: the accounting's final
/// record, the job's own result, our own wish to end it; and `Gone` only after `settle`, or at once when
/// the id has been given away.
fn unlisted(evidence: &Evidence<'_>) -> Reading {
    let notes = evidence.notes;
    let own = own(notes);
    let known_usage = match evidence.accounted {
        Accounted::NotAsked => return Reading::AskAccounting,
        Accounted::Row(row) => match (row.phase(), row.end) {
            (Phase::Final(word), Some(_)) => return final_word(word, row, evidence, own),
            // Not final yet over there, or half a record: the queue is right that it is not running,
            // and this will be corrected. The job's own word needs no correction.
            (_, _) if own.is_none() => return Reading::NoNews,
            (_, _) => row.usage(),
        },
        // Only the job's own word counts now: that the accounting is silent says nothing.
        Accounted::Silent if own.is_none() => return Reading::NoNews,
        Accounted::Silent | Accounted::None | Accounted::Absent => bridge_backend::Usage::default(),
    };
    if let Some(outcome) = own {
        let observation = Observation::Ended { outcome, usage: known_usage };
        return Reading::Over { observation, early: false };
    }
    let replaced = matches!(evidence.listed, Listed::Replaced);
    let patient = evidence.missed_for.is_some_and(|missed_for| missed_for < evidence.settle);
    if patient && !replaced {
        return Reading::NoNews;
    }
    // Told to end, did so, and forgotten since.
    let observation = if notes.result.is_some() && notes.cancelled {
        Observation::Ended { outcome: Outcome::Cancelled { by: None }, usage: known_usage }
    } else {
        Observation::Gone
    };
    Reading::Over { observation, early: false }
}

/// Gives who cancelled: `CANCELLED by 1000`.
fn canceller(state: &str) -> Option<String> {
    let uid = state.split_once(" by ")?.1.trim();
    match uid {
        "" => None,
        "0" => Some("root".to_owned()),
        uid => Some(format!("uid {uid}")),
    }
}

/// Puts Slurm's words into a sentence.
fn words(what: &str, row: &Row, exit: Option<Exit>) -> String {
    let exit = match exit {
        None => String::new(),
        // Slurm's own number for an output file that could not be opened.
        Some(Exit { code: 0, signal: 53 }) => {
            ", its log could not be opened on the node".to_owned()
        }
        Some(Exit { code, signal: 0 }) => format!(", exit status {code}"),
        Some(Exit { signal, .. }) => format!(", its shell was killed by signal {signal}"),
    };
    let reason = row.reason.as_deref().map(|reason| format!(" ({reason})")).unwrap_or_default();
    let nodes = row.nodes.as_deref().map(|nodes| format!(" on {nodes}")).unwrap_or_default();
    format!("{what}: Slurm says {}{reason}{nodes}{exit}", row.state)
}

#[cfg(test)]
mod tests;
