//! Runs jobs in Slurm through its command line programs.
//!
//! # What it relies on
//!
//! A directory `jobs_dir` on a file system that this machine and the compute nodes share. Every job has
//! `<jobs_dir>/<token>/` there (0700): its environment and script, its log, and the files by which the
//! job itself says that it started and how it ended. See [`jobdir`].
//!
//! # Identity
//!
//! A controller that crashes forgets jobs it acknowledged up to some seconds ago and gives their ids to
//! the next ones. So an id alone names nothing: a job is ours when the id *and* the job name, which is
//! the submit token, agree. `sbatch` attaches the name in the call that creates the job.
//!
//! # Run once
//!
//! Jobs are submitted with `--no-requeue`, and the wrapper ([`wrapper`]) starts the script only if it
//! can make the directory `run`. That also holds when an administrator requeues the job, and when two
//! submissions carry one token because the first one's answer was lost while the controller was frozen.
//!
//! # Who is believed
//!
//! The job's own result file first, then the scheduler's final word; see [`verdict`]. What Slurm no
//! longer lists is asked of the accounting in one call. A job is [`bridge_backend::Observation::Gone`]
//! only when nobody knows it after a while, or when its id is somebody else's now.
//!
//! # What it does not do
//!
//! No federation, no job arrays, no REST interface. `sbatch_args` are for the site; options that would
//! undo the above are refused.

mod client;
mod config;
mod jobdir;
mod listing;
mod options;
mod poll;
mod refusal;
mod slurm;
mod submit;
mod verdict;
mod wrapper;

use std::sync::Arc;

use bridge_backend::{Backend, Driver, OpenError};

pub use crate::slurm::Slurm;

/// The driver for `kind = "slurm"`.
pub const DRIVER: Driver = Driver { kind: "slurm", open, login: None };

fn open(table: toml::Table) -> Result<Arc<dyn Backend>, OpenError> {
    Ok(Arc::new(Slurm::open(table)?))
}
