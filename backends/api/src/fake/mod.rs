//! A scripted, strict backend in memory, for tests of whoever calls a [`Backend`].
//!
//! The [`FakeWorld`] is the other side: it outlives every [`FakeBackend`], as a batch system outlives
//! bridge. A test drops the backend, opens another in the same world, and has restarted. Nothing
//! happens by itself: jobs start, write and end when the test says so, or as a [`Plan`] says, one
//! step for every poll; and time passes by [`FakeWorld::advance`].
//!
//! It is strict: a call that breaks the contract is refused and noted as a violation, and every test
//! should end with [`FakeWorld::assert_no_violations`].

mod backend;
#[cfg(test)]
#[cfg(feature = "conformance")]
mod suite;
#[cfg(test)]
mod tests;
mod world;

use std::num::NonZeroUsize;
use std::time::Duration;

use bytes::Bytes;

pub use self::backend::FakeBackend;
pub use self::world::FakeWorld;
use crate::{Capabilities, ErrorKind, Filesystem, JobRef, Lookup, Outcome, SubmitToken};

#[cfg(doc)]
use crate::Backend;

/// What a world is like.
#[derive(Clone, Debug)]
pub struct FakeOptions {
    /// What its backends say of themselves.
    pub capabilities: Capabilities,
    /// The per-job options it knows; a job with another is rejected.
    pub known_options: Vec<String>,
    /// What becomes of every job that is submitted; without a plan it waits for the test.
    pub plan: Option<Plan>,
}

impl Default for FakeOptions {
    fn default() -> Self {
        let ten = NonZeroUsize::MIN.saturating_add(9);
        Self {
            capabilities: Capabilities {
                filesystem: Filesystem::Shared,
                lookup: Lookup::ByToken { settle: Duration::ZERO },
                live_log: true,
                collect: false,
                poll_batch: ten.saturating_mul(ten).saturating_mul(ten),
                poll_rest: 50,
                max_concurrency: ten,
                job_variables: &[],
            },
            known_options: Vec::new(),
            plan: None,
        }
    }
}

/// The life of a job that nobody scripts: one step for every poll.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Polls that see it waiting.
    pub pending: usize,
    /// Polls that see it running, at least; it runs until its log is written.
    pub running: usize,
    /// What it writes, a piece for every poll that sees it running.
    pub log: Vec<Bytes>,
    /// How it ends.
    pub outcome: Outcome,
}

impl Default for Plan {
    /// Seen running once, no log, success.
    fn default() -> Self {
        Self { pending: 0, running: 1, log: Vec::new(), outcome: Outcome::Exited { code: 0 } }
    }
}

/// A method of [`Backend`] that asks the other side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Verb {
    /// `check`
    Check,
    /// `submit`
    Submit,
    /// `find`
    Find,
    /// `poll`
    Poll,
    /// `read_log`
    ReadLog,
    /// `collect`
    Collect,
    /// `cancel`
    Cancel,
    /// `release`
    Release,
}

/// A call that reached the world, whatever became of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// What was asked.
    pub verb: Verb,
    /// About which jobs, in the order given; none for `check`.
    pub tokens: Vec<SubmitToken>,
    /// For `read_log`, from which byte and how many.
    pub range: Option<(u64, usize)>,
}

/// What goes wrong with one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// It has no effect and fails with this kind.
    Fail(ErrorKind),
    /// It takes effect, and the answer is lost: `Ambiguous` for `submit`, else `Transient`.
    LostAnswer,
    /// It has no effect, and nobody can tell: `Ambiguous` for `submit`, else `Transient`.
    LostQuestion,
    /// It takes effect and never returns.
    HangAfter,
    /// It has no effect and never returns.
    HangBefore,
}

/// A job as the world has it.
#[derive(Clone, Debug)]
pub struct FakeJob {
    /// Both names.
    pub job: JobRef,
    /// What was submitted.
    pub spec: crate::JobSpec,
    /// How often it was submitted; more than once is possible with [`Lookup::Resubmit`] alone.
    pub submissions: usize,
    /// How often its end was asked for.
    pub cancels: usize,
    /// How it ended.
    pub outcome: Option<Outcome>,
    /// What it wrote.
    pub log: Bytes,
    /// It was released.
    pub released: bool,
}
