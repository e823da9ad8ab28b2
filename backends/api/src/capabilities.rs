//! What a backend can do.

use std::num::NonZeroUsize;
use std::time::Duration;

/// What a backend can do with the configuration it was opened with.
#[derive(Clone, Debug)]
pub struct Capabilities {
    /// Where the script runs.
    pub filesystem: Filesystem,
    /// How a lost answer to `submit` is resolved.
    pub lookup: Lookup,
    /// Whether `read_log` has bytes while the job runs.
    pub live_log: bool,
    /// Whether `collect` brings anything home.
    pub collect: bool,
    /// The most jobs one `poll` or `find` takes.
    pub poll_batch: NonZeroUsize,
    /// How many times as long as a poll took the other side is left alone after it: polling takes this
    /// part of one of its servers at most.
    pub poll_rest: u32,
    /// The most calls the other side should see at once from us.
    pub max_concurrency: NonZeroUsize,
    /// Variables by which jobs choose an option, under names that this system's users know already:
    /// variable and option.
    pub job_variables: &'static [(&'static str, &'static str)],
}

/// How a lost answer to `submit` is resolved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lookup {
    /// `find` answers; absence counts once this long has passed since the attempt.
    ByToken {
        /// How long a new job may be invisible to `find`.
        settle: Duration,
    },
    /// The same token twice is the same job.
    Resubmit,
    /// An ambiguous submission fails the job.
    Never,
}

/// Where a job's script runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filesystem {
    /// In `workspace` itself; `collect` does nothing.
    Shared,
    /// In a copy that travels with the job; `collect` brings `outputs` back.
    Sandbox,
}
