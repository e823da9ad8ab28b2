//! Processes on the submit node as a batch system.
//!
//! ```toml
//! [backends.here]
//! kind = "local"
//! jobs_dir = "/var/lib/bridge/jobs"   # private, on a local disk; made if missing
//! kill_grace = "30s"                  # between TERM and KILL
//! cgroup = "auto"                     # a control group per job where we may make them; or "off"
//! ```
//!
//! A job is a directory named by its token, which is also its external id. In it runs a
//! **supervisor**, a shell script of ours that outlives us: it takes the job (once), runs the script
//! in a session of its own, ends it at the time limit, and notes how it ended. The backend keeps
//! nothing in memory; every question is answered from the directory (see `dir`) and from `/proc`.
//!
//! **Life is a FIFO.** The supervisor's standard input is the reading end of a FIFO in the job's
//! directory that we made and opened before there was a process. Opening the writing end fails
//! exactly when nobody holds the reading end. So one system call tells whether a job lives, from the
//! moment before its birth, and no reused pid can answer for it. A job without a living supervisor
//! that never noted a start has never run and never will: that is what `find` calls absent.
//!
//! **Ended** is a job when its supervisor is; a cancelled one when none of its processes is left,
//! for which `cancel` is called until the end is seen: first TERM for all of them, and KILL once
//! `kill_grace` has passed. When a supervisor is killed without its script, the job goes on, and the
//! script's result counts. What it left running is killed when the job ends (its process group, or
//! all of it with a control group) and when it is released.
//!
//! **Limits.** One directory belongs to one machine: FIFOs, pids and boots mean nothing on another.
//! Without a control group, a process that emptied its environment, lost its parent and made itself
//! a session is no longer known as the job's.
//!
//! **systemd** must not end jobs with the daemon: the unit says `KillMode=process`, and
//! `Delegate=yes` if jobs are to have control groups.

mod cgroup;
mod config;
mod dir;
mod environment;
mod log;
mod procs;
mod status;
mod stop;
mod submit;

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bridge_backend::{
    Backend, BackendError, Capabilities, Driver, ErrorKind, ExternalId, Fault, Filesystem, JobRef,
    JobSpec, LogChunk, Lookup, Observation, OpenError, Result, SubmitToken,
};
use camino::Utf8Path;

use crate::config::{CgroupUse, Config};
use crate::dir::{JobDir, Life, failed};
use crate::status::Look;
use crate::submit::{SHELL, Setup};

/// Runs jobs as processes on the submit node.
pub const DRIVER: Driver = Driver { kind: "local", open, login: None };

/// Jobs per poll. Ten thousand questions take some ten milliseconds.
const POLL_BATCH: NonZeroUsize = NonZeroUsize::new(10_000).expect("not zero");

/// Calls at once: more would only wait for the same disk and the same processors.
const MAX_CONCURRENCY: NonZeroUsize = NonZeroUsize::new(8).expect("not zero");

fn open(table: toml::Table) -> std::result::Result<Arc<dyn Backend>, OpenError> {
    Ok(Arc::new(LocalBackend::new(Config::parse(table)?)))
}

/// The backend; holds its configuration and no more.
#[derive(Debug)]
struct LocalBackend {
    capabilities: Capabilities,
    setup: Setup,
    host: Option<String>,
}

impl LocalBackend {
    fn new(config: Config) -> Self {
        let capabilities = Capabilities {
            filesystem: Filesystem::Shared,
            lookup: Lookup::ByToken { settle: Duration::ZERO },
            live_log: true,
            collect: false,
            poll_batch: POLL_BATCH,
            poll_rest: 50,
            max_concurrency: MAX_CONCURRENCY,
            job_variables: &[],
        };
        let cgroup = match config.cgroup {
            CgroupUse::Auto => cgroup::parent(),
            CgroupUse::Off => None,
        };
        let setup = Setup {
            jobs_dir: config.jobs_dir,
            kill_grace: config.kill_grace,
            cgroup,
            setsid: submit::system_program("setsid"),
            sleep: submit::system_program("sleep"),
        };
        Self { capabilities, setup, host: procs::host_name() }
    }

    /// Names the directory of a job; none for an id that is not the token's.
    fn dir(&self, job: &JobRef) -> Option<JobDir> {
        (job.id.0 == job.token.as_str()).then(|| JobDir::new(&self.setup.jobs_dir, &job.token))
    }
}

/// Runs work on files off the threads that drive everything else.
///
/// All of it may be repeated, so it does not matter that it runs on when the future is dropped.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) => Err(BackendError::new(ErrorKind::Transient, "finish looking at the jobs")
            .with_source(error)),
    }
}

#[async_trait]
impl Backend for LocalBackend {
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    async fn check(&self) -> Result<()> {
        let setup = self.setup.clone();
        blocking(move || check(&setup)).await
    }

    async fn submit(&self, token: &SubmitToken, spec: &JobSpec) -> Result<ExternalId> {
        // Not on another thread: dropping the future could then leave work on its way that `find`
        // does not see yet. It is a few small files and a spawn.
        submit::submit(&self.setup, &JobDir::new(&self.setup.jobs_dir, token), spec)?;
        Ok(ExternalId(token.as_str().to_owned()))
    }

    async fn find(&self, tokens: &[SubmitToken]) -> Result<BTreeMap<SubmitToken, ExternalId>> {
        let (jobs_dir, tokens) = (self.setup.jobs_dir.clone(), tokens.to_vec());
        blocking(move || {
            let mut found = BTreeMap::new();
            for token in tokens {
                let dir = JobDir::new(&jobs_dir, &token);
                // Life first: see `submit`.
                if dir.life()? == Life::Alive || dir.was_started()? {
                    let id = ExternalId(token.as_str().to_owned());
                    found.insert(token, id);
                }
            }
            Ok(found)
        })
        .await
    }

    async fn poll(&self, jobs: &[JobRef]) -> Result<BTreeMap<ExternalId, Observation>> {
        let host = self.host.clone();
        let jobs: Vec<_> = jobs.iter().map(|job| (job.id.clone(), self.dir(job))).collect();
        blocking(move || {
            let look = Look::default();
            let mut seen = BTreeMap::new();
            // A job can make its directory unreadable; the others must be seen all the same. Where
            // none can be seen, the trouble is ours.
            let (mut trouble, mut good) = (None, false);
            for (id, dir) in jobs {
                match dir {
                    Some(dir) => match look.observe(&dir, host.as_deref()) {
                        Ok(observation) => {
                            good = true;
                            seen.insert(id, observation);
                        }
                        Err(error) => {
                            let status = format!("cannot {error}");
                            seen.insert(id, Observation::Unclear { status });
                            trouble = Some(error);
                        }
                    },
                    // Not our token's id. It may be another job's in the same call.
                    None => {
                        seen.entry(id).or_insert(Observation::Gone);
                    }
                }
            }
            match trouble {
                Some(error) if !good => Err(error),
                Some(_) | None => Ok(seen),
            }
        })
        .await
    }

    async fn read_log(&self, job: &JobRef, from: u64, limit: usize) -> Result<LogChunk> {
        let Some(dir) = self.dir(job) else { return Err(unknown(job)) };
        blocking(move || log::read(&Look::default(), &dir, from, limit)).await
    }

    async fn collect(&self, _job: &JobRef, _into: &Utf8Path) -> Result<()> {
        Ok(())
    }

    async fn cancel(&self, jobs: &[JobRef]) -> Result<()> {
        let grace = self.setup.kill_grace;
        let dirs: Vec<_> = jobs.iter().filter_map(|job| self.dir(job)).collect();
        blocking(move || {
            // Everybody gets his signal before the first trouble is told.
            let look = Look::default();
            let mut trouble = Ok(());
            for dir in dirs {
                trouble = trouble.and(stop::cancel(&look, &dir, grace));
            }
            trouble
        })
        .await
    }

    async fn release(&self, job: &JobRef) -> Result<()> {
        let Some(dir) = self.dir(job) else { return Ok(()) };
        blocking(move || stop::release(&Look::default(), &dir)).await
    }
}

fn unknown(job: &JobRef) -> BackendError {
    let what = format!("read the log of {}, which is not the id of {}", job.id, job.token);
    BackendError::new(ErrorKind::Lost, what)
}

/// Says whether jobs could be run now.
fn check(setup: &Setup) -> Result<()> {
    let path = &setup.jobs_dir;
    submit::make_private(path)?;
    let metadata = path.metadata().map_err(|error| failed("look at", path, error))?;
    let mode = metadata.permissions().mode() & 0o777;
    if mode & 0o077 != 0 || metadata.uid() != rustix::process::geteuid().as_raw() {
        return Err(BackendError::new(
            ErrorKind::Rejected(Fault::Site),
            format!(
                "keep jobs in {path}: it must be the service's own and closed to others \
                 (uid {}, mode {mode:04o}; chmod 0700)",
                metadata.uid()
            ),
        ));
    }
    if !Utf8Path::new(SHELL).is_file() {
        return Err(submit::missing(SHELL));
    }
    for (name, program) in [("setsid", &setup.setsid), ("sleep", &setup.sleep)] {
        if program.is_none() {
            return Err(submit::missing(name));
        }
    }
    // The one thing that not every file system has.
    static PROBES: AtomicU64 = AtomicU64::new(0);
    let number = PROBES.fetch_add(1, Ordering::Relaxed);
    let probe = path.join(format!(".check-{}-{number}", std::process::id()));
    let made = submit::make_fifo(&probe);
    match std::fs::remove_file(&probe) {
        Err(error) if made.is_ok() => Err(failed("remove", &probe, error)),
        Ok(()) | Err(_) => made.map(drop),
    }
}
