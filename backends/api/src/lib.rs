//! The seam between bridge and the systems that run jobs.
//!
//! A backend is a translator: it turns [`JobSpec`]s into submissions, asks its system for many jobs at
//! once, and turns the answers into [`Observation`]s. It decides nothing, keeps nothing, retries
//! nothing and never waits. It has not heard of GitLab.
//!
//! # The contract
//!
//! 1. **Stateless.** After a restart a backend gets its configuration and [`JobRef`]s, nothing more.
//!    Paths and the like are derived from the [`SubmitToken`].
//! 2. **One token, one job.** The token is attached by the very call that creates the job.
//! 3. **Silence is not an answer.** A job missing from [`Backend::poll`] means no news.
//!    [`Observation::Gone`] is a positive statement.
//! 4. **No retries, no sleeping.** Return the [`ErrorKind`]; the next sweep is the retry.
//! 5. **Poll is bulk.** The number of external queries does not grow with the number of jobs.
//! 6. **Logs are addressed by byte.** The byte at an offset never changes; [`LogChunk::end`] is said
//!    only when nothing can follow.
//! 7. **Cancel, release, check, find, poll and read_log are idempotent.** Only `submit` is not, and
//!    only there does [`ErrorKind::Ambiguous`] matter.
//! 8. **Cancel-safe.** Dropping a future is allowed at any await; for `submit` that equals
//!    `Ambiguous`.
//! 9. **The result file is the truth.** See [`result`]. Where a backend can read it, it outranks the
//!    other side's word; where it is missing after a job ended, success is never guessed.
//! 10. **Run once.** Submit so that the other side does not start the job a second time by itself.
//!
//! The suite in `conformance` asserts this contract against a real system.

mod capabilities;
#[cfg(feature = "conformance")]
pub mod conformance;
mod error;
#[cfg(feature = "fake")]
pub mod fake;
mod job;
mod login;
mod observe;
pub mod result;
pub mod settings;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;
use camino::Utf8Path;

pub use crate::capabilities::{Capabilities, Filesystem, Lookup};
pub use crate::error::{BackendError, ErrorKind, Fault, OpenError, Remedy, Result};
pub use crate::job::{
    EnvVar, Expiry, ExternalId, InvalidToken, JobRef, JobSpec, Limits, Pattern, SubmitToken,
};
pub use crate::login::{Invitation, Invite, LoggingIn, Login, LoginError};
pub use crate::observe::{LogChunk, Observation, Outcome, SourcesFailure, Usage};

/// A system that runs jobs.
#[async_trait]
pub trait Backend: fmt::Debug + Send + Sync + 'static {
    /// Says what this backend can do with the configuration it was opened with.
    fn capabilities(&self) -> &Capabilities;

    /// Asks whether the other side would take a job now, without changing anything there.
    ///
    /// # Errors
    ///
    /// `Transient` when it cannot be reached, `Rejected(Fault::Site)` when the operator must act.
    async fn check(&self) -> Result<()>;

    /// Creates one job over there, named by `token`.
    ///
    /// # Errors
    ///
    /// `Ambiguous` whenever the job may have been created although no id came back.
    async fn submit(&self, token: &SubmitToken, spec: &JobSpec) -> Result<ExternalId>;

    /// Looks for jobs by their tokens; what is not there is absent from the answer.
    ///
    /// # Errors
    ///
    /// `Transient` when the other side did not answer completely.
    async fn find(&self, tokens: &[SubmitToken]) -> Result<BTreeMap<SubmitToken, ExternalId>>;

    /// Asks for the state of many jobs with a constant number of external queries.
    ///
    /// # Errors
    ///
    /// `Transient` when the other side did not answer completely; then nothing is known of any job.
    async fn poll(&self, jobs: &[JobRef]) -> Result<BTreeMap<ExternalId, Observation>>;

    /// Reads the job's log from byte `from`, at most `limit` bytes.
    ///
    /// A log that does not exist yet is empty and not at its end.
    ///
    /// # Errors
    ///
    /// `Transient` when it could not be read now, `Lost` when it never will be.
    async fn read_log(&self, job: &JobRef, from: u64, limit: usize) -> Result<LogChunk>;

    /// Brings the job's outputs home into the directory `into`; does nothing on a shared file system.
    ///
    /// # Errors
    ///
    /// `Transient` to be called again, `Lost` when there is nothing to bring.
    async fn collect(&self, job: &JobRef, into: &Utf8Path) -> Result<()>;

    /// Asks the other side to end these jobs; ended and unknown ones are fine.
    ///
    /// # Errors
    ///
    /// `Transient` when the wish may not have been heard.
    async fn cancel(&self, jobs: &[JobRef]) -> Result<()>;

    /// Removes what the backend kept for an ended job: its directory, log, sandbox.
    ///
    /// # Errors
    ///
    /// `Transient` to be called again.
    async fn release(&self, job: &JobRef) -> Result<()>;

    /// Says whether this backend wants a login at all.
    fn has_login(&self) -> bool {
        false
    }

    /// Says how the login stands that was last used; nobody is asked for it.
    ///
    /// `None` when this backend has none, or none was needed yet.
    fn login(&self) -> Option<Login> {
        None
    }
}

/// The code for one kind of backend; every backend crate exports one as `DRIVER`.
#[derive(Clone, Copy)]
pub struct Driver {
    /// The word after `kind =` in the configuration.
    pub kind: &'static str,
    /// Opens a backend from its configuration table, `kind` already taken out.
    pub open: fn(toml::Table) -> std::result::Result<Arc<dyn Backend>, OpenError>,
    /// Has a person log in, for a backend of this table; `None` for a kind without logins.
    ///
    /// The future may be dropped; then nobody is logged in.
    pub login: Option<fn(toml::Table, Invite) -> LoggingIn>,
}

impl fmt::Debug for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Driver").field("kind", &self.kind).finish_non_exhaustive()
    }
}
