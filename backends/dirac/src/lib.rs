//! Runs jobs on a grid that DIRAC looks after, through its DiracX server.
//!
//! Nothing is shared with the workers but HTTP: script, variables and workspace travel in the input
//! sandbox; log, result and outputs come back as output sandboxes that a helper on the worker hands in
//! while the job runs (`worker.sh`).
//!
//! # Configuration
//!
//! | key of `[backends.NAME]` | meaning | default |
//! | --- | --- | --- |
//! | `url` | the DiracX server | needed |
//! | `token_file` | proxy file, credentials file or plain token; readable by its owner alone | needed |
//! | `vo`, `group` | what the token must be for | what it is for |
//! | `tls_ca_file` | certificates of authorities to believe besides the system's, here and on workers | the system's alone |
//! | `site`, `banned_sites`, `platform`, `tags` | where jobs may run | anywhere |
//! | `cpu_time` | seconds of normalised CPU a job asks for | its wall time, or a day |
//! | `processors`, `priority` | as DIRAC has them | DIRAC's |
//! | `job_group`, `job_type` | `JobGroup` and `JobType` of all jobs | `bridge`, `User` |
//! | `worker_url` | the server as workers reach it | `url` |
//! | `settle` | how long a new job may stay invisible | 10 s |
//! | `request_timeout` | how long one answer may take | 60 s |
//! | `log_interval` | between two pieces of a log | 5 s |
//! | `cancel_interval` | how often a job looks whether it was killed | 15 s |
//! | `kill_grace` | from TERM to KILL, so that `after_script` can run | 60 s |
//! | `worker_patience` | how long a worker tries to reach DiracX before it leaves what it has to DIRAC | 30 min |
//! | `max_workspace` | bytes that a workspace may have | 2 GiB |
//! | `max_concurrency` | jobs at once whose files are packed and sent | 4 |
//!
//! A job's options are `site`, `banned_sites`, `platform`, `tags`, `cpu_time`, `processors`, `priority`.
//!
//! # Identity
//!
//! The submit token is the job's `JobName`, attached by the call that creates the job. A lost answer is
//! found again by one search for the name and our own user.
//!
//! # Logins
//!
//! A login's refresh token is good for one use, and its end is fixed when the person agrees: renewing
//! does not put it off. `Driver::login` makes a new one, which a running backend takes up by itself.
//! A server whose certificate is not believed is the operator's to see to as well, see [`trust`].
//!
//! Without a token that is taken, every call is `Transient` with a remedy, and jobs wait; see [`token`].
//!
//! # Run once
//!
//! DIRAC reschedules jobs by itself, and the same JDL twice is two jobs. So the helper, before it starts
//! the script, asks which jobs have its name and goes on only if its own is the oldest; and it writes its
//! start into the job's history, where a second start of the same job finds it and then refuses. A job
//! whose start cannot be written down does not start.
//!
//! # Time
//!
//! No clock of ours is read, and none of a worker's is believed: when something is over is reckoned by
//! the clock of the server, which comes with each of its answers. A job that waited so long that its
//! expiry comes before its wall time's end is told to end by the helper, early enough for its outputs to
//! come home; one that comes too late to begin does not.
//!
//! # Who is believed
//!
//! The job's own result, which comes as its application status, then DIRAC's word; see [`verdict`].
//! Every end is read from the job's history in DIRAC, never from our clock.
//!
//! # What it does not do
//!
//! The script and the variables lie in the sandbox store, readable by the robot's own group and user.
//! A job finds the proxy that DIRAC gives it, which is the robot's: who may write CI jobs acts as the
//! robot. Patterns of outputs bring home at least what they name, sometimes more.

mod cancel;
mod client;
mod config;
mod dirac;
mod failure;
mod fallback;
mod jdl;
mod known;
mod limits;
mod login;
mod options;
mod outbox;
mod pieces;
mod poll;
mod sandbox;
mod search;
mod submit;
mod token;
mod token_file;
mod trust;
mod unpack;
mod verdict;
mod worker;
mod workspace;

use std::sync::Arc;

use bridge_backend::{Backend, Driver, Invite, LoggingIn, OpenError};

pub use crate::dirac::Dirac;

/// The driver for `kind = "dirac"`.
pub const DRIVER: Driver = Driver { kind: "dirac", open, login: Some(log_in) };

fn open(table: toml::Table) -> Result<Arc<dyn Backend>, OpenError> {
    Ok(Arc::new(Dirac::open(table)?))
}

fn log_in(table: toml::Table, invite: Invite) -> LoggingIn {
    Box::pin(login::login(table, invite))
}
