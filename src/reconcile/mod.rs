//! Makes the world agree with the rows.
//!
//! There is one loop, [`Reconciler::run`], and all it does is [`Reconciler::sweep`]: look at the rows
//! that owe something, do the next thing for each, write down what was done. A restart runs the same
//! sweep over the same rows; there is no other recovery.
//!
//! A sweep has two halves. **Rounds** ask each backend for all of its jobs at once: what to cancel, what
//! became of doubtful submissions, how the jobs stand. **Steps** move one job each. What a round saw is
//! handed to the job's step, which alone writes the job's row; a job has at most one step at a time, so
//! a row has one writer. Rounds of one backend never overlap, and no backend waits for another.
//!
//! Memory holds only what may be forgotten: which steps are under way, what a round just saw, when a
//! backend was last asked, and the plans of jobs whose log is being carried.

mod backends;
mod desk;
mod dispatch;
mod finish;
mod leftovers;
mod observe;
mod release;
mod report;
mod stage;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use bridge_backend::{Backend, ExternalId, Observation};
use camino::Utf8PathBuf;
use jiff::Timestamp;
use tokio::sync::{Notify, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use crate::reconcile::leftovers::{clear_leftovers, clear_packed};

use crate::cache::CacheStore;
use crate::domain::clock::Clock;
use crate::domain::id::{BackendName, JobId, RunnerName};
use crate::domain::job::JobState;
use crate::domain::policy;
use crate::gitlab;
use crate::job;
use crate::reconcile::backends::BackendWatch;
use crate::reconcile::desk::{Desk, Prepared};
use crate::reconcile::report::Heard;
use crate::store::{Job, Store, StoreError};
use crate::telemetry::Chain;

/// What the reconciler needs to know of a runner.
#[derive(Clone, Debug)]
pub struct RunnerEntry {
    /// Speaks to the runner's GitLab.
    pub client: gitlab::Client,
    /// Sent with every update.
    pub info: gitlab::Info,
    /// What jobs are made ready with.
    pub context: job::RunnerContext,
    /// Where their caches are.
    pub caches: Arc<CacheStore>,
    /// The submit node's name, for the trace.
    pub hostname: String,
    /// The most bytes of trace a job may have.
    pub output_limit: u64,
    /// Time kept back from a job's timeout for bringing it home.
    pub deadline_reserve: Duration,
    /// The least time worth starting a job for.
    pub minimum_run_time: Duration,
}

/// What the reconciler needs to know of a backend.
#[derive(Clone, Debug)]
pub struct BackendEntry {
    /// Speaks to it.
    pub backend: Arc<dyn Backend>,
    /// The least time between two polls, if the operator wants one.
    pub poll_interval: Option<Duration>,
}

/// Runners and backends, replaced as a whole when the configuration is read again.
#[derive(Debug, Default)]
pub struct World {
    /// By name.
    pub runners: BTreeMap<RunnerName, Arc<RunnerEntry>>,
    /// By name.
    pub backends: BTreeMap<BackendName, BackendEntry>,
}

/// The reconciler's own settings.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where the spools are.
    pub spool_dir: Utf8PathBuf,
    /// Where artifacts wait, packed, for GitLab.
    pub artifacts_dir: Utf8PathBuf,
    /// How long a backend may leave a job out of good answers before it counts as lost.
    pub lost_after: Duration,
    /// How many jobs may be made ready at once.
    pub prepare_workers: usize,
    /// How many jobs may be brought home at once.
    pub finish_workers: usize,
    /// How many jobs may speak to GitLab or a backend at once.
    pub step_workers: usize,
    /// Where the fault-injection points are, for tests: named crash points at which the process aborts.
    pub crash_at: Option<String>,
}

/// Counts what the reconciler does; for metrics and the benchmark.
pub trait Watcher: fmt::Debug + Send + Sync + 'static {
    /// A call to a backend came back.
    fn backend_call(
        &self,
        backend: &BackendName,
        verb: &'static str,
        error: Option<bridge_backend::ErrorKind>,
        took: Duration,
    );
    /// A sweep came to its end.
    fn sweep(&self, took: Duration);
    /// A job's verdict was confirmed, this long after its end was seen.
    fn confirmed(&self, job: &Job, lag: Duration);
    /// A job could not make a transition that was asked of it.
    fn illegal(&self);
}

/// The loop that moves jobs on.
#[derive(Clone)]
pub struct Reconciler(Arc<Inner>);

pub(in crate::reconcile) struct Inner {
    store: Store,
    clock: Arc<dyn Clock>,
    settings: RwLock<Settings>,
    world: RwLock<Arc<World>>,
    watcher: Arc<dyn Watcher>,
    tracker: TaskTracker,
    shutdown: CancellationToken,
    wake: Notify,
    /// Silence counts from here at the earliest: our own absence proves nothing.
    since: Timestamp,
    steps: Semaphore,
    preparing: Arc<Semaphore>,
    finishing: Arc<Semaphore>,
    desk: Mutex<Desktop>,
}

/// What may be forgotten.
#[derive(Debug, Default)]
struct Desktop {
    /// Jobs whose step is under way, and whether they want another.
    under_way: HashMap<JobId, bool>,
    /// What rounds saw of jobs since their last step.
    news: HashMap<JobId, News>,
    /// Jobs whose last step could not even be written down.
    penalties: HashMap<JobId, Timestamp>,
    /// Plans of jobs whose log is being carried.
    prepared: HashMap<JobId, Arc<Prepared>>,
    backends: HashMap<BackendName, BackendWatch>,
    /// Submissions under way at each backend are limited by what it bears.
    lanes: HashMap<BackendName, Arc<Semaphore>>,
    /// Jobs that are owed work, as last counted, and when.
    owed: usize,
    owed_at: Option<Timestamp>,
}

/// What a round saw of a job.
#[derive(Clone, Debug)]
pub(in crate::reconcile) enum News {
    /// A poll's answer.
    Seen(Observation),
    /// A good answer left it out.
    Missing,
    /// `find` has it.
    Found(ExternalId),
    /// `find` did not have it when it was asked.
    Absent { asked: Timestamp },
    /// `find` could not be asked, and why; whether the operator must act first.
    Unasked(String, bool),
}

/// The most time between two sweeps.
const SWEEP_MOST: Duration = Duration::from_secs(1);

/// How long a backend that wants its operator to act counts as such after a job found it so.
const SHUT_FOR: Duration = Duration::from_secs(60);

/// What a job waits for whose backend wants the operator to act first.
pub(in crate::reconcile) const FOR_OPERATOR: &str = "the runner's operator";

/// Plans kept in memory; a job that finds its plan gone makes it again.
const PREPARED_MOST: usize = 256;

/// The largest payload whose plan is kept, bytes: 256 of five megabytes would be more than the daemon may
/// have.
const PREPARED_SIZE: usize = 128 * 1024;

impl fmt::Debug for Reconciler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reconciler").field("since", &self.0.since).finish_non_exhaustive()
    }
}

/// Why a step could not be done; the job is looked at again later.
#[derive(Debug, thiserror::Error)]
pub(in crate::reconcile) enum StepError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("keep the trace")]
    Spool(#[from] crate::trace::SpoolError),
    #[error("mask the job's secrets")]
    Mask(#[from] crate::trace::MaskError),
    #[error("read the payload of the job")]
    Payload(#[source] serde_json::Error),
    #[error("find the payload of the job in the database")]
    NoPayload,
    #[error("{verb} at the backend")]
    Backend {
        verb: &'static str,
        #[source]
        source: bridge_backend::BackendError,
    },
    #[error("reach GitLab")]
    GitLab(#[source] gitlab::Error),
    #[error("tell GitLab: it answered {0}")]
    Busy(u16, Option<Duration>),
    #[error("note the job's workspace")]
    Note(#[source] std::io::Error),
    #[error("remove what the job left behind")]
    Leftovers(#[source] job::StageError),
    #[error("find {0} in the configuration")]
    Unconfigured(String),
}

/// What GitLab took of a job's trace before its step failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Taken {
    trace_sent: u64,
    trace_interval: u64,
    ci_confirmed_at: Option<Timestamp>,
}

impl Taken {
    fn of(job: &Job) -> Self {
        let Job { trace_sent, trace_interval, ci_confirmed_at, .. } = *job;
        Self { trace_sent, trace_interval, ci_confirmed_at }
    }

    fn note(self, job: &mut Job) {
        // The row may know of less trace than was composed; it is composed and sent again then.
        if self.trace_sent <= job.trace_len {
            job.trace_sent = self.trace_sent;
        }
        job.trace_interval = self.trace_interval;
        job.ci_confirmed_at = self.ci_confirmed_at;
    }
}

/// What a step leaves behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::reconcile) enum Flow {
    /// There is more to do at once.
    Again,
    /// Its row says when to look again.
    Rest,
}

impl Reconciler {
    /// Makes a reconciler; nothing runs yet.
    pub fn new(
        store: Store,
        clock: Arc<dyn Clock>,
        settings: Settings,
        world: World,
        watcher: Arc<dyn Watcher>,
        tracker: TaskTracker,
        shutdown: CancellationToken,
    ) -> Self {
        let since = clock.now();
        Self(Arc::new(Inner {
            store,
            clock,
            steps: Semaphore::new(settings.step_workers.max(1)),
            preparing: Arc::new(Semaphore::new(settings.prepare_workers.max(1))),
            finishing: Arc::new(Semaphore::new(settings.finish_workers.max(1))),
            settings: RwLock::new(settings),
            world: RwLock::new(Arc::new(world)),
            watcher,
            tracker,
            shutdown,
            wake: Notify::new(),
            since,
            desk: Mutex::new(Desktop::default()),
        }))
    }

    /// Replaces runners and backends; steps under way finish with the old ones.
    pub fn replace_world(&self, world: World) {
        *self.0.world.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(world);
        {
            let mut desk = self.0.desktop();
            desk.prepared.clear();
            // A backend may bear more or less than before.
            desk.lanes.clear();
        }
        self.wake();
    }

    /// Has the loop look at once.
    pub fn wake(&self) {
        self.0.wake.notify_one();
    }

    /// Tells whether jobs wait for the operator of this backend: more of them would wait as well, while
    /// another runner might take them.
    pub fn waits_for_operator(&self, backend: &BackendName) -> bool {
        let shut_at = self.0.desktop().backends.get(backend).and_then(|watch| watch.shut_at);
        // Those that wait try again in less; of jobs that are gone nothing is heard any more.
        shut_at.is_some_and(|at| policy::since(self.0.clock.now(), at) < SHUT_FOR)
    }

    /// Sweeps until shutdown is asked for.
    pub async fn run(&self) {
        loop {
            let started = std::time::Instant::now();
            let now = self.0.clock.now();
            let next = match self.sweep(now).await {
                Ok(next) => next,
                Err(error) => {
                    tracing::error!(error = %Chain(&error), "a sweep failed");
                    policy::after(now, Duration::from_secs(2))
                }
            };
            let took = started.elapsed();
            self.0.watcher.sweep(took);
            // A second at most: another process may have noted a wish. 20 ms at least: a sweep that
            // leaves work due because it is under way would spin. And with ten thousand jobs under way
            // a sweep takes long: a fifth of the time is enough for it.
            let least = took.saturating_mul(4).clamp(Duration::from_millis(20), SWEEP_MOST);
            let wait = policy::until(self.0.clock.now(), next).clamp(least, SWEEP_MOST);
            // Both futures are cancel-safe: `Notify` keeps a permit that was not consumed.
            tokio::select! {
                () = self.0.shutdown.cancelled() => return,
                () = tokio::time::sleep(wait) => {}
                () = self.0.wake.notified() => {
                    // Let a burst of wishes become one sweep.
                    tokio::time::sleep(least.max(Duration::from_millis(15))).await;
                }
            }
        }
    }

    /// Looks once at everything that is due and starts what there is to do.
    ///
    /// Gives the time at which there will be more. Takes no hint about what changed.
    ///
    /// # Errors
    ///
    /// When the database cannot be read; nothing was started then.
    pub async fn sweep(&self, now: Timestamp) -> Result<Timestamp, StoreError> {
        let inner = &self.0;
        let mut next = policy::after(now, Duration::from_secs(1));
        let world = inner.world();
        for (name, entry) in &world.backends {
            let poll_at = inner.start_round(name, entry, now);
            next = next.min(poll_at);
        }
        inner.count_owed(now).await?;
        // Jobs that wait for a worker are the longest due: they must not hide those that could go on.
        let most = 2_000 + inner.desktop().under_way.len();
        let due = inner.store.due(now, i64::try_from(most).unwrap_or(i64::MAX)).await?;
        let full = due.len() >= most;
        for job in due {
            inner.start_step(job, now);
        }
        if let Some(at) = inner.store.next_due(now).await? {
            next = next.min(at);
        }
        if full {
            next = now;
        }
        Ok(next)
    }

    /// Waits until no step and no round is under way; for tests that call [`Self::sweep`] themselves.
    pub async fn quiesce(&self) {
        loop {
            let busy = {
                let desk = self.0.desktop();
                !desk.under_way.is_empty() || desk.backends.values().any(|b| b.round_under_way)
            };
            if !busy {
                return;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

impl Inner {
    fn desktop(&self) -> MutexGuard<'_, Desktop> {
        self.desk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn world(&self) -> Arc<World> {
        Arc::clone(&self.world.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Counts owed jobs now and then: how many there are decides how often each is touched.
    async fn count_owed(&self, now: Timestamp) -> Result<(), StoreError> {
        let fresh = self
            .desktop()
            .owed_at
            .is_some_and(|at| at <= now && policy::since(now, at) < Duration::from_secs(5));
        if !fresh {
            let owed = self.store.counts().await?.iter().map(|count| count.jobs).sum();
            let mut desk = self.desktop();
            desk.owed = owed;
            desk.owed_at = Some(now);
        }
        Ok(())
    }

    /// Gives the queue for submissions to a backend.
    fn lane(&self, backend: &BackendName, width: usize) -> Arc<Semaphore> {
        let mut desk = self.desktop();
        let lane = desk
            .lanes
            .entry(backend.clone())
            .or_insert_with(|| Arc::new(Semaphore::new(width.max(1))));
        Arc::clone(lane)
    }

    fn settings(&self) -> Settings {
        self.settings.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Leaves news for a job and starts its step, or has the one under way followed by another.
    fn tell(self: &Arc<Self>, job: JobId, news: News, now: Timestamp) {
        self.desktop().news.insert(job, news);
        self.start_step(job, now);
    }

    /// Starts a job's step unless it is under way already; then another follows if there is news.
    fn start_step(self: &Arc<Self>, job: JobId, now: Timestamp) {
        {
            let mut desk = self.desktop();
            if self.shutdown.is_cancelled() {
                return;
            }
            if let Some(at) = desk.penalties.get(&job) {
                if *at > now {
                    return;
                }
                desk.penalties.remove(&job);
            }
            let has_news = desk.news.contains_key(&job);
            if let Some(again) = desk.under_way.get_mut(&job) {
                *again |= has_news;
                return;
            }
            desk.under_way.insert(job, false);
        }
        let this = Arc::clone(self);
        // The guard is made before the task first runs, so that the mark goes even if it never does.
        let guard = UnderWay { inner: Arc::clone(self), job };
        self.tracker.spawn(async move {
            let _guard = guard;
            this.step(job).await;
        });
    }

    /// Moves one job as far as it goes.
    async fn step(self: &Arc<Self>, id: JobId) {
        let Ok(permit) = self.steps.acquire().await else { return };
        let mut permit = Some(permit);
        // More rounds than a life has states would be a bug; it costs its own back-off.
        for _ in 0..24 {
            let news = self.desktop().news.remove(&id);
            match self.advance(id, news, &mut permit).await {
                Ok(Flow::Again) => {}
                Ok(Flow::Rest) => {
                    if !self.desktop().news.contains_key(&id) {
                        return;
                    }
                }
                Err((error, taken)) => {
                    self.stumble(id, error, taken).await;
                    return;
                }
            }
        }
        tracing::error!(job = %id, "a job made no end of its step");
        self.punish(id, Duration::from_secs(60));
    }

    async fn advance(
        self: &Arc<Self>,
        id: JobId,
        news: Option<News>,
        permit: &mut Option<tokio::sync::SemaphorePermit<'_>>,
    ) -> Result<Flow, (StepError, Option<Taken>)> {
        let mut step = match self.begin(id, news).await {
            Ok(Some(step)) => step,
            Ok(None) => return Ok(Flow::Rest),
            Err(error) => return Err((error, None)),
        };
        let done = match step.job.state {
            JobState::Received => step.received(permit).await,
            JobState::Submitting => step.submitting(permit).await,
            JobState::Submitted | JobState::Running => step.in_flight().await,
            JobState::Reporting => step.reporting(permit).await,
            JobState::Finished | JobState::Abandoned => step.over().await,
        };
        done.map_err(|error| (error, Some(Taken::of(&step.job))))
    }

    /// Gathers what a job's step needs; none if nothing is owed to the job.
    async fn begin(
        self: &Arc<Self>,
        id: JobId,
        news: Option<News>,
    ) -> Result<Option<Step<'_>>, StepError> {
        let Some(job) = self.store.job(id).await? else { return Ok(None) };
        if job.released_at.is_some() {
            return Ok(None);
        }
        let world = self.world();
        let runner = world
            .runners
            .get(&job.runner)
            .cloned()
            .ok_or_else(|| StepError::Unconfigured(format!("the runner {}", job.runner)))?;
        let backend = world
            .backends
            .get(&job.backend)
            .cloned()
            .ok_or_else(|| StepError::Unconfigured(format!("the backend {}", job.backend)))?;
        Ok(Some(Step {
            r: self,
            job,
            runner,
            backend: backend.backend,
            news,
            desk: None,
            more_log: false,
            touch_tried: None,
        }))
    }

    /// Writes down that a step failed and when it is tried again.
    async fn stumble(self: &Arc<Self>, id: JobId, error: StepError, taken: Option<Taken>) {
        let now = self.clock.now();
        if let StepError::Store(StoreError::Conflict { .. }) = error {
            // Somebody else moved the job; the next sweep reads it again.
            return;
        }
        if let StepError::Store(StoreError::Illegal(_)) = error {
            self.watcher.illegal();
            tracing::error!(job = %id, error = %Chain(&error), "an impossible transition was tried");
        } else {
            tracing::warn!(job = %id, error = %Chain(&error), "a step failed, and is tried again");
        }
        let asked = match &error {
            StepError::Busy(_, wait) => *wait,
            StepError::Backend { source, .. } => source.retry_after(),
            StepError::Store(_)
            | StepError::Spool(_)
            | StepError::Mask(_)
            | StepError::Payload(_)
            | StepError::NoPayload
            | StepError::GitLab(_)
            | StepError::Note(_)
            | StepError::Leftovers(_)
            | StepError::Unconfigured(_) => None,
        };
        let written = async {
            let Some(mut job) = self.store.job(id).await? else { return Ok(()) };
            if let Some(taken) = taken {
                taken.note(&mut job);
            }
            job.failures = job.failures.saturating_add(1);
            // An unbounded Retry-After would silence the job for longer than GitLab bears.
            let wait =
                asked.map_or(policy::back_off(job.failures), |w| w.min(Duration::from_secs(300)));
            job.due_at = policy::after(now, wait);
            let why = Chain(&error).to_string();
            // What the backend says of a job it has is compared with every poll: our own trouble in
            // its place would make old news of it new.
            let news = if matches!(job.state, JobState::Submitted | JobState::Running) {
                job.failures == 1
            } else if job.waits_for.as_deref() == Some(FOR_OPERATOR) {
                // That is still so, and was said.
                false
            } else {
                job.waits_for.replace(why.clone()).is_none_or(|before| before != why)
            };
            if news {
                self.store.note(&job, "stumbled", now, Some(why)).await
            } else {
                self.store.save(&job).await
            }
        };
        if let Err(error) = written.await {
            tracing::error!(job = %id, error = %Chain(&error), "a failed step could not be noted");
            self.punish(id, Duration::from_secs(5));
        }
        if !matches!(error, StepError::GitLab(_) | StepError::Busy(..) | StepError::Store(_))
            && let Err(error) = self.speak_up(id).await
        {
            tracing::warn!(job = %id, error = %Chain(&error), "GitLab was not told of the job");
        }
    }

    /// Tells GitLab of a job whose steps fail for reasons that are not GitLab's: it would end the job
    /// for its silence.
    async fn speak_up(self: &Arc<Self>, id: JobId) -> Result<(), StepError> {
        let now = self.clock.now();
        let Some(job) = self.store.job(id).await? else { return Ok(()) };
        let silent = job.ci_confirmed_at.map_or(Duration::MAX, |at| policy::since(now, at));
        if job.state.is_over() || silent < policy::touch_interval(self.desktop().owed) {
            return Ok(());
        }
        let world = self.world();
        let (Some(runner), Some(backend)) =
            (world.runners.get(&job.runner), world.backends.get(&job.backend))
        else {
            return Ok(());
        };
        let (runner, backend) = (Arc::clone(runner), Arc::clone(&backend.backend));
        let mut step = Step {
            r: self,
            job,
            runner,
            backend,
            news: None,
            desk: None,
            more_log: false,
            touch_tried: None,
        };
        match step.touch_by_token().await? {
            Heard::Fine => self.store.save(&step.job).await?,
            Heard::Disowned(status) => {
                step.disown(&status).await?;
            }
        }
        Ok(())
    }

    fn punish(&self, id: JobId, wait: Duration) {
        let until = policy::after(self.clock.now(), wait);
        self.desktop().penalties.insert(id, until);
    }

    /// Dies here if a test asked for it: the named points are those of the design's crash table.
    fn crash_point(&self, name: &str) {
        let wanted = self.settings.read().unwrap_or_else(PoisonError::into_inner).crash_at.clone();
        if wanted.as_deref() == Some(name) {
            crash(name);
        }
    }
}

/// Ends the process as `kill -9` does: no destructor runs, nothing is flushed.
pub(crate) fn crash(name: &str) {
    tracing::error!(name, "crash point reached, as asked for by BRIDGE_CRASH_AT");
    let me = rustix::process::getpid();
    if let Err(error) = rustix::process::kill_process(me, rustix::process::Signal::KILL) {
        tracing::error!(error = %error, "the process could not end itself");
    }
    // The signal is delivered before this returns; an abort makes sure of it.
    std::process::abort();
}

/// Takes the mark away when a step ends, also by a panic.
struct UnderWay {
    inner: Arc<Inner>,
    job: JobId,
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        if std::thread::panicking() {
            tracing::error!(job = %self.job, "a step panicked; this is a bug");
            self.inner.punish(self.job, Duration::from_secs(60));
        }
        let again = self.inner.desktop().under_way.remove(&self.job).unwrap_or(false);
        if again && !self.inner.shutdown.is_cancelled() {
            self.inner.wake.notify_one();
            let now = self.inner.clock.now();
            let inner = Arc::clone(&self.inner);
            if inner.desktop().news.contains_key(&self.job) && !std::thread::panicking() {
                inner.start_step(self.job, now);
            }
        }
    }
}

/// One job's step: its row, and whom it concerns.
struct Step<'a> {
    r: &'a Arc<Inner>,
    job: Job,
    runner: Arc<RunnerEntry>,
    backend: Arc<dyn Backend>,
    news: Option<News>,
    /// The trace, open, with lines that are not durable yet.
    desk: Option<Desk>,
    /// The backend has more of the log than one step carries.
    more_log: bool,
    /// When GitLab was last told, or not reached, in the middle of a stage.
    touch_tried: Option<Timestamp>,
}

impl Step<'_> {
    fn now(&self) -> Timestamp {
        self.r.clock.now()
    }

    /// Calls the backend with a time limit and counts the call.
    async fn call<T>(
        &self,
        verb: &'static str,
        future: impl Future<Output = bridge_backend::Result<T>>,
    ) -> bridge_backend::Result<T> {
        self.r.call(&self.job.backend, verb, future).await
    }
}
