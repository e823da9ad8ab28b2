//! A GitLab in a box: the server side of the runner API, with faults on demand.
//!
//! `bridge exec`, the integration tests and the load test run against it. It imports nothing of
//! this crate: it is the other side of the wire, so it has its own wire types, and a field that
//! both sides misread cannot pass a test. It keeps everything in memory, behaves as GitLab does
//! (who may call when, what is appended where, who ends a job), and collects in
//! [`Coordinator::violations`] what a well-behaved runner would not have done.

mod api;
mod artifact_rules;
mod artifacts;
mod clock;
mod door;
mod fault;
mod git;
mod job;
mod lfs;
mod new_job;
mod options;
mod payload;
mod random;
mod register;
mod reply;
mod request;
mod rules;
mod runner;
mod runners_api;
mod state;
#[cfg(test)]
mod tests;
mod trace;
mod update;
mod view;

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::net::TcpSocket;
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};

use self::door::Period;
use self::state::Shared;

pub use self::artifacts::ArtifactView;
pub use self::fault::{Endpoint, Fault, Gate, Requests};
pub use self::git::{GitTraffic, ServeError};
pub use self::new_job::{Git, NewJob, Shape, Variable};
pub use self::options::{
    Knobs, Options, RateLimits, Registration, RunnerOptions, TokenKind, Version,
};
pub use self::runners_api::{AccessToken, Owner};
pub use self::state::Recorded;
pub use self::view::{Counts, EndedBy, Final, JobView, ManagerView, RunnerView, Status};

/// So many jobs without an end are named; a test that fails needs no more.
const MAX_NAMED: usize = 20;

/// Why the coordinator is not reachable.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The address cannot be listened on.
    #[error("listen on {address}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
}

/// Whether the port is listened on.
#[derive(Debug)]
enum Reach {
    Open(Period),
    /// Connections are refused.
    Away,
    Stopped,
}

struct Handle {
    shared: Arc<Shared>,
    address: SocketAddr,
    // Never listens; keeps the port ours during an outage.
    _port: TcpSocket,
    reach: Mutex<Reach>,
    // The second host, and its port.
    storage: Mutex<Option<(TcpSocket, Period)>>,
    shutdown: CancellationToken,
    // Without anybody to hold the coordinator, nobody can stop it.
    _stop: DropGuard,
}

/// A running coordinator; clones are the same one. It ends when stopped, or with the last clone.
#[derive(Clone)]
pub struct Coordinator {
    handle: Arc<Handle>,
}

impl fmt::Debug for Coordinator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Coordinator").field("url", &self.url()).finish_non_exhaustive()
    }
}

impl Coordinator {
    /// Listens and serves.
    ///
    /// # Errors
    ///
    /// Fails if the address cannot be listened on.
    pub async fn start(options: Options) -> Result<Self, StartError> {
        let bind = options.bind;
        let failed = |source| StartError::Listen { address: bind, source };
        let shutdown = CancellationToken::new();
        let root = options.root.trim_end_matches('/').to_owned();
        let shared = Arc::new(Shared::new(Options { root, ..options }, shutdown.clone()));
        let port = door::reserve(bind).map_err(failed)?;
        let address = port.local_addr().map_err(failed)?;
        let app = api::router(Arc::clone(&shared));
        let period = Period::begin(address, app, &shutdown).map_err(failed)?;
        let root = &shared.options.root;
        shared.url.get_or_init(|| format!("http://{address}{root}"));
        let handle = Handle {
            shared,
            address,
            _port: port,
            reach: Mutex::new(Reach::Open(period)),
            storage: Mutex::new(None),
            shutdown: shutdown.clone(),
            _stop: shutdown.drop_guard(),
        };
        Ok(Self { handle: Arc::new(handle) })
    }

    fn shared(&self) -> &Shared {
        &self.handle.shared
    }

    fn reach(&self) -> MutexGuard<'_, Reach> {
        self.handle.reach.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the instance's URL, with the relative root.
    pub fn url(&self) -> String {
        self.shared().url().to_owned()
    }

    /// Gives the time since the start, including what it was moved by.
    pub fn now(&self) -> Duration {
        self.shared().clock.now()
    }

    /// Stops listening, breaks every connection and waits for the end of all tasks.
    pub async fn stop(self) {
        let before = std::mem::replace(&mut *self.reach(), Reach::Stopped);
        self.handle.shutdown.cancel();
        match before {
            Reach::Open(period) => period.end().await,
            Reach::Away | Reach::Stopped => {}
        }
        let storage = self.handle.storage.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some((_port, period)) = storage {
            period.end().await;
        }
        let tasks = &self.shared().tasks;
        tasks.close();
        tasks.wait().await;
    }

    /// Begins an outage: open connections break, new ones are refused, everything is remembered.
    pub async fn go_away(&self) {
        let before = std::mem::replace(&mut *self.reach(), Reach::Away);
        match before {
            Reach::Open(period) => {
                self.shared().lock().away = true;
                period.end().await;
            }
            Reach::Away => {}
            Reach::Stopped => *self.reach() = Reach::Stopped,
        }
    }

    /// Ends the outage, on the same port.
    ///
    /// # Errors
    ///
    /// Fails if the port cannot be listened on.
    pub async fn come_back(&self) -> Result<(), StartError> {
        let mut reach = self.reach();
        if !matches!(*reach, Reach::Away) {
            return Ok(());
        }
        let address = self.handle.address;
        let app = api::router(Arc::clone(&self.handle.shared));
        let period = Period::begin(address, app, &self.handle.shutdown)
            .map_err(|source| StartError::Listen { address, source })?;
        *reach = Reach::Open(period);
        self.shared().lock().away = false;
        Ok(())
    }

    /// Creates a runner as GitLab's pages do; gives its token.
    pub fn add_runner(&self, options: RunnerOptions) -> String {
        self.shared().change(|state, now| {
            let at = state.add_runner(options, "glrt-", now);
            state.runners.get(at).map(|runner| runner.token.clone()).unwrap_or_default()
        })
    }

    /// Pauses a runner, or lets it go on.
    pub fn pause_runner(&self, token: &str, paused: bool) {
        self.with_runner(token, |runner, now| {
            runner.options.paused = paused;
            runner.ring(now);
        });
    }

    /// Takes the owner of a runner away: every call gets 422.
    pub fn orphan_runner(&self, token: &str) {
        self.with_runner(token, |runner, _| runner.orphaned = true);
    }

    /// Lets a runner's token expire.
    pub fn expire_runner_token(&self, token: &str) {
        self.with_runner(token, |runner, now| runner.token_expires = Some(now));
    }

    /// Deletes a runner.
    pub fn delete_runner(&self, token: &str) {
        self.shared().change(|state, now| {
            if let Some(&at) = state.runner_by_token.get(token) {
                state.delete_runner(at, now);
            }
        });
    }

    fn with_runner(&self, token: &str, act: impl FnOnce(&mut runner::Runner, Duration)) {
        self.shared().change(|state, now| {
            let at = state.runner_by_token.get(token).copied();
            if let Some(runner) = at.and_then(|at| state.runners.get_mut(at)) {
                act(runner, now);
            }
        });
    }

    /// Gives a runner as it stands.
    pub fn runner(&self, token: &str) -> Option<RunnerView> {
        let state = self.shared().lock();
        let at = *state.runner_by_token.get(token)?;
        state.runners.get(at).map(runner::Runner::view)
    }

    /// Puts a job into the queue; gives its number.
    pub fn enqueue(&self, job: NewJob) -> i64 {
        self.shared().change(|state, now| state.enqueue(job, now))
    }

    /// Gives a job as it stands.
    pub fn job(&self, id: i64) -> Option<JobView> {
        self.shared().lock().job(id).map(job::Job::view)
    }

    /// Gives all jobs, in the order of their numbers.
    pub fn jobs(&self) -> Vec<JobView> {
        self.shared().lock().jobs.iter().map(job::Job::view).collect()
    }

    /// Gives the number of jobs by status; costs the same for any number of jobs.
    pub fn counts(&self) -> Counts {
        self.shared().lock().counts
    }

    /// Gives the number of calls by kind.
    pub fn requests(&self) -> Requests {
        self.shared().lock().requests
    }

    /// Waits until a job is as wanted.
    ///
    /// # Errors
    ///
    /// Gives the job as it was at the end of the time. A job that does not exist is given as one
    /// that was never handed out.
    pub async fn wait(
        &self,
        id: i64,
        until: impl Fn(&JobView) -> bool + Send + Sync,
        within: Duration,
    ) -> Result<JobView, Box<JobView>> {
        let deadline = Instant::now() + within;
        let changed = match self.shared().lock().job_mut(id) {
            Some(job) => Arc::clone(job.changed.get_or_insert_with(Arc::default)),
            None => return Err(Box::new(JobView::unknown(id))),
        };
        loop {
            // Before the look, so that no change falls between the two.
            let change = Arc::clone(&changed).notified_owned();
            let Some(view) = self.job(id) else { return Err(Box::new(JobView::unknown(id))) };
            if until(&view) {
                return Ok(view);
            }
            if tokio::time::timeout_at(deadline, change).await.is_err() {
                return Err(Box::new(view));
            }
        }
    }

    /// Waits until a job has ended.
    ///
    /// # Errors
    ///
    /// Gives the job as it was at the end of the time.
    pub async fn wait_finished(&self, id: i64, within: Duration) -> Result<JobView, Box<JobView>> {
        self.wait(id, JobView::is_finished, within).await
    }

    /// Waits until every job has ended.
    ///
    /// # Errors
    ///
    /// Gives the counts as they were at the end of the time.
    pub async fn wait_all_finished(&self, within: Duration) -> Result<Counts, Counts> {
        self.wait_on(&self.shared().idle, |here| here.counts().unfinished() == 0, within).await
    }

    /// Waits until something is as wanted; it is looked at after every call and every change.
    ///
    /// # Errors
    ///
    /// Gives the counts as they were at the end of the time.
    pub async fn wait_until(
        &self,
        until: impl Fn(&Self) -> bool + Send + Sync,
        within: Duration,
    ) -> Result<Counts, Counts> {
        self.wait_on(&self.shared().anything, until, within).await
    }

    async fn wait_on(
        &self,
        bell: &Notify,
        until: impl Fn(&Self) -> bool + Send + Sync,
        within: Duration,
    ) -> Result<Counts, Counts> {
        let deadline = Instant::now() + within;
        loop {
            let ring = bell.notified();
            if until(self) {
                return Ok(self.counts());
            }
            if tokio::time::timeout_at(deadline, ring).await.is_err() {
                return Err(self.counts());
            }
        }
    }

    /// Cancels a job as a user does. A running one is cancelled gracefully if the *stored*
    /// features of its manager have `cancel_gracefully`, and at once otherwise.
    pub fn cancel(&self, id: i64) {
        let graceful_known = self.shared().options.version.has_canceling();
        self.shared().change(|state, now| state.cancel(id, graceful_known, now));
    }

    /// Ends a job at once, also one that is being cancelled.
    pub fn force_cancel(&self, id: i64) {
        self.shared().change(|state, now| {
            state.finish(id, Status::Canceled, None, EndedBy::User, now);
        });
    }

    /// Erases a job's trace while it runs: every call gets 403 without `Job-Status`.
    pub fn erase(&self, id: i64) {
        self.with_job(id, |job, _| job.erased = true);
    }

    /// Lets a job's token expire.
    pub fn expire_job_token(&self, id: i64) {
        self.with_job(id, |job, now| job.token_expires = Some(now));
    }

    /// Opens or closes the log in somebody's browser: the update interval is 3 or 60.
    pub fn watch(&self, id: i64, watched: bool) {
        self.with_job(id, |job, _| job.watched = watched);
    }

    /// Ends the 202 phase of a job's trace: the next final update is taken.
    pub fn persist_trace(&self, id: i64) {
        self.with_job(id, |job, _| job.persisted = true);
    }

    fn with_job(&self, id: i64, act: impl FnOnce(&mut job::Job, Duration)) {
        self.shared().change(|state, now| {
            if let Some(job) = state.job_mut(id) {
                act(job, now);
                job.announce();
            }
        });
    }

    /// Opens a second host, to which downloads are redirected from now on if the client allows it;
    /// gives its URL. A token that arrives there is a violation.
    ///
    /// # Errors
    ///
    /// Fails if there is no port to listen on.
    pub fn start_object_storage(&self) -> Result<String, StartError> {
        let bind = SocketAddr::from((std::net::Ipv4Addr::LOCALHOST, 0));
        let failed = |source| StartError::Listen { address: bind, source };
        let port = door::reserve(bind).map_err(failed)?;
        let address = port.local_addr().map_err(failed)?;
        let app = artifacts::storage_router(Arc::clone(&self.handle.shared));
        let period = Period::begin(address, app, &self.handle.shutdown).map_err(failed)?;
        let url = format!("http://{address}");
        *self.handle.storage.lock().unwrap_or_else(PoisonError::into_inner) = Some((port, period));
        self.shared().change(|state, _| state.storage_url = Some(url.clone()));
        Ok(url)
    }

    /// Gives what a job has uploaded, in order.
    pub fn artifacts(&self, id: i64) -> Vec<ArtifactView> {
        let state = self.shared().lock();
        let job = state.job(id);
        job.map(|job| job.artifacts.iter().map(artifacts::Stored::view).collect())
            .unwrap_or_default()
    }

    /// Keeps an artifact as if a job had uploaded it.
    ///
    /// # Errors
    ///
    /// Fails if the file cannot be written.
    pub fn put_artifact(
        &self,
        id: i64,
        artifact_type: &str,
        format: &str,
        file_name: &str,
        content: &[u8],
    ) -> io::Result<()> {
        self.shared()
            .change(|state, _| state.put_artifact(id, artifact_type, format, file_name, content))
    }

    /// Lets a job's artifacts expire.
    pub fn expire_artifacts(&self, id: i64) {
        self.with_job(id, |job, now| {
            for artifact in &mut job.artifacts {
                artifact.expires_at = Some(now);
            }
        });
    }

    /// Deletes a job's artifacts, as a user may.
    pub fn delete_artifacts(&self, id: i64) {
        self.with_job(id, |job, _| {
            job.artifacts.clear();
            job.artifacts_erased = true;
        });
    }

    /// Cuts one upload after so many bytes of its body; the next one of several that are cut.
    pub fn cut_upload(&self, after: u64) {
        self.shared().change(|state, _| state.upload_cuts.push_back(after));
    }

    /// Cuts one download after so many bytes, wherever it comes from.
    pub fn cut_download(&self, after: u64) {
        self.shared().change(|state, _| state.download_cuts.push_back(after));
    }

    /// Gives what can be turned, as it stands.
    pub fn knobs(&self) -> Knobs {
        self.shared().lock().knobs.clone()
    }

    /// Turns everything at once.
    pub fn set_knobs(&self, knobs: Knobs) {
        self.adjust(|here| *here = knobs);
    }

    /// Turns something.
    pub fn adjust(&self, turn: impl FnOnce(&mut Knobs)) {
        self.shared().change(|state, _| turn(&mut state.knobs));
    }

    /// Lets a fault happen to calls of one kind.
    pub fn inject(&self, endpoint: Endpoint, fault: Fault) {
        self.shared().change(|state, _| state.faults.add(Some(endpoint), fault));
    }

    /// Lets a fault happen to calls of every kind.
    pub fn inject_anywhere(&self, fault: Fault) {
        self.shared().change(|state, _| state.faults.add(None, fault));
    }

    /// Takes all faults back.
    pub fn clear_faults(&self) {
        self.shared().change(|state, _| state.faults.clear());
    }

    /// Gives how many faults have happened.
    pub fn faults_happened(&self) -> u64 {
        self.shared().lock().faults.hits
    }

    /// Gives how many faults may still happen; one that happens n times counts once.
    pub fn faults_left(&self) -> usize {
        self.shared().lock().faults.len()
    }

    /// Gives what a well-behaved runner would not have done.
    pub fn violations(&self) -> Vec<String> {
        self.shared().lock().violations()
    }

    /// Gives the violations, and in addition every job that was handed out and never ended: for
    /// the end of a test.
    pub fn final_violations(&self) -> Vec<String> {
        let state = self.shared().lock();
        let mut list = state.violations();
        let open = state.jobs.iter().filter(|job| job.status.takes_calls());
        list.extend(open.take(MAX_NAMED).map(|job| {
            format!("job {}: was handed out, is {}, and has no final state", job.id, job.status)
        }));
        list
    }

    /// Gives the recorded calls, if [`Options::record`] is set.
    pub fn recorded(&self) -> Vec<Recorded> {
        self.shared().lock().recorded.clone().unwrap_or_default()
    }

    /// Moves the clock forward and ends what is too late then. A step of 15 minutes or more, or
    /// one during an outage, is not counted as the runner's silence; smaller ones are, so give it
    /// the time to call in between.
    pub fn advance(&self, by: Duration) {
        self.shared().clock.advance(by);
        self.shared().change(|state, now| {
            if by >= rules::MAX_GAP || state.away {
                state.skipped += by;
            }
            state.sweep(self.shared(), now);
        });
    }

    /// Serves a repository on disk under a project's path. Its refs are copied now; call this
    /// again to take later ones.
    ///
    /// # Errors
    ///
    /// Fails if it is no repository with a commit, or without git.
    pub async fn serve_repository(
        &self,
        project_path: &str,
        path: &Path,
    ) -> Result<(), ServeError> {
        let mut repository = git::Repository::open(path).await?;
        self.shared().change(|state, _| {
            if let Some(before) = state.repositories.get(project_path) {
                repository.go_on_as(before);
            }
            state.repositories.insert(project_path.to_owned(), repository);
        });
        Ok(())
    }

    /// Lets job tokens of every project read a served one, as its allowlist would.
    pub fn open_repository(&self, project_path: &str) {
        self.shared().change(|state, _| {
            if let Some(repository) = state.repositories.get_mut(project_path) {
                repository.open = true;
            }
        });
    }

    /// Says what git and Git LFS have been sent of a served project; nothing of one that is not.
    pub fn git_traffic(&self, project_path: &str) -> GitTraffic {
        let state = self.shared().lock();
        state.repositories.get(project_path).map(git::Repository::traffic).unwrap_or_default()
    }
}
