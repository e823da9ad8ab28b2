//! What a backend sees.

use std::time::Duration;

use bytes::Bytes;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// What a poll saw of one job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Observation {
    /// Accepted, not started.
    Pending {
        /// Why it waits, in the other side's words.
        reason: Option<String>,
        /// When the other side expects to start it.
        starts_at: Option<Timestamp>,
    },
    /// Started, not ended.
    Running {
        /// The machine, or the first of several.
        host: Option<String>,
    },
    /// Ended for good.
    Ended {
        /// How.
        outcome: Outcome,
        /// What it used, as far as known.
        usage: Usage,
    },
    /// Certain: the other side has no record of it.
    Gone,
    /// A status that this backend does not know: no news, shown to people, never an error.
    Unclear {
        /// The word as it came.
        status: String,
    },
}

/// How a job ended over there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum Outcome {
    /// The script ended by itself; a signal counts as 128 + its number.
    Exited {
        /// Its exit status.
        code: i32,
    },
    /// The other side's time limit ended it.
    TimedOut,
    /// Its time was over before its script could begin ([`crate::Limits::expiry`]).
    Expired,
    /// The job's script reported that its own limit for the user's script ended that
    /// ([`crate::result::Step::ScriptTimedOut`]).
    ScriptTimedOut,
    /// The job's script was to fetch the sources itself and could not; its steps never began
    /// ([`crate::result::Step::GetSources`] and its kin).
    SourcesFailed {
        /// How it went.
        failure: SourcesFailure,
    },
    /// The memory limit ended it.
    OutOfMemory,
    /// Somebody cancelled it.
    Cancelled {
        /// Who, as far as the other side says, for people.
        by: Option<String>,
    },
    /// It made room for another job.
    Preempted,
    /// Its machine failed.
    NodeFailed,
    /// The other side failed it for reasons of its own.
    SystemFailed {
        /// Its words.
        detail: String,
    },
}

/// Why a job's script could not fetch the sources.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "failure", rename_all = "snake_case")]
pub enum SourcesFailure {
    /// A command ended with an exit code.
    Exited {
        /// Its exit status; a signal counts as 128 + its number.
        code: i32,
    },
    /// It took longer than it may.
    TimedOut,
    /// The machine could not do it, whatever the job asks for.
    Broken {
        /// Why, in one line.
        detail: String,
    },
}

/// What a job used; only what is known.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Wall time from start to end.
    pub elapsed: Option<Duration>,
    /// CPU time, all processes.
    pub cpu: Option<Duration>,
    /// Largest resident memory, bytes.
    pub peak_memory: Option<u64>,
    /// The machines, in the other side's notation.
    pub nodes: Option<String>,
    /// When it started over there.
    pub started_at: Option<Timestamp>,
    /// When it ended over there.
    pub ended_at: Option<Timestamp>,
}

/// A piece of a job's log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogChunk {
    /// The bytes from the offset asked for; may be empty.
    pub bytes: Bytes,
    /// Nothing can follow these bytes.
    pub end: bool,
}
