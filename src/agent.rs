//! Asks GitLab for jobs while there is room, and writes each down before anything else happens.
//!
//! One agent serves one runner with as many workers as it may have requests under way. A request is
//! never repeated and never given up half-way: an answer that nobody reads is a job that nobody runs
//! (`POST /jobs/request` commits before it answers, and no call lists or returns jobs).

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use camino::Utf8PathBuf;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::domain::clock::Clock;
use crate::domain::id::{BackendName, CiJobId, JobId, RunnerName};
use crate::domain::job::JobState;
use crate::domain::policy::{self, Room};
use crate::domain::verdict::FailureReason;
use crate::gitlab::health::{Health, HealthPolicy, RequestConcurrency};
use crate::gitlab::wire::Secret;
use crate::gitlab::{
    self, Client, Info, JobAuth, JobUpdate, ReceivedJob, RequestReply, UpdateState,
};
use crate::store::{Count, NewJob, Received, Store, StoreError};
use crate::telemetry::Chain;

/// Free space below which no jobs are asked for: a job that cannot be written down is lost.
const DISK_FLOOR: u64 = 64 * 1024 * 1024;

/// How often a job is tried to be written down before GitLab is told that it cannot be: two minutes and
/// more, with the back-off between.
const WRITE_ATTEMPTS: u32 = 8;

/// How long a count of the rows is used, as long as it leaves room.
const COUNT_KEPT: Duration = Duration::from_secs(2);

/// How long a worker that found no room waits at most before it counts again.
const NO_ROOM_WAIT: Duration = Duration::from_millis(500);

/// A runner's part of the configuration.
#[derive(Clone, Debug)]
pub struct AgentSettings {
    /// The runner.
    pub runner: RunnerName,
    /// Its GitLab, as it is written into rows.
    pub ci_url: String,
    /// Where its jobs go.
    pub backend: BackendName,
    /// The runner's authentication token.
    pub token: Secret,
    /// Tells this runner manager from others with the same token.
    pub system_id: String,
    /// The most jobs of this runner; 0 is no limit.
    pub limit: usize,
    /// The most jobs of all runners; 0 is no limit.
    pub concurrent: usize,
    /// The most jobs that wait at the backend.
    pub max_queued: Option<usize>,
    /// The most requests under way.
    pub request_concurrency: usize,
    /// The pause after an answer without a job.
    pub check_interval: Duration,
    /// Pause after an answer with a job as well.
    pub strict_check_interval: bool,
    /// 403s in a row after which the runner rests.
    pub unhealthy_requests_limit: u32,
    /// How long it rests.
    pub unhealthy_interval: Duration,
    /// Where the database is; its disk must have room.
    pub state_dir: Utf8PathBuf,
}

/// Why jobs are not taken, by whom it concerns; empty when all is well.
#[derive(Clone, Debug, Default)]
pub struct Conditions(Arc<Mutex<BTreeMap<String, String>>>);

impl Conditions {
    fn map(&self) -> MutexGuard<'_, BTreeMap<String, String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a problem, or that there is none any more.
    pub fn set(&self, who: &str, problem: Option<String>) {
        let mut map = self.map();
        match problem {
            Some(text) => {
                if map.get(who) != Some(&text) {
                    tracing::warn!(who, problem = %text, "jobs are not taken");
                }
                map.insert(who.to_owned(), text);
            }
            None => {
                if map.remove(who).is_some() {
                    tracing::info!(who, "jobs are taken again");
                }
            }
        }
    }

    /// Lists the problems.
    pub fn list(&self) -> Vec<(String, String)> {
        self.map().iter().map(|(who, what)| (who.clone(), what.clone())).collect()
    }

    /// Forgets problems of those that are no longer there.
    pub fn retain(&self, keep: impl Fn(&str) -> bool) {
        self.map().retain(|who, _| keep(who));
    }
}

/// Requests under way, which may each become a job: they count as if they had.
#[derive(Clone, Debug, Default)]
pub struct Reservations {
    places: Arc<Mutex<Places>>,
    /// Jobs that became rows since the rows were counted.
    since: Arc<Mutex<Places>>,
    /// The last count; held while a place is looked for.
    counted: Arc<tokio::sync::Mutex<Option<Counted>>>,
}

/// What a job takes room of.
type Place = (RunnerName, BackendName);
type Places = BTreeMap<Place, usize>;

/// Rows as they were counted. Jobs only leave without our doing: with what came since added, the count
/// is never too low, and counting ten thousand rows for each of them would cost more than running them.
#[derive(Debug)]
struct Counted {
    at: Instant,
    counts: Vec<Count>,
}

/// One request's place; given back when it is dropped.
#[derive(Debug)]
struct Reservation {
    all: Reservations,
    key: Place,
}

impl Reservations {
    fn map(&self) -> MutexGuard<'_, Places> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn since(&self) -> MutexGuard<'_, Places> {
        self.since.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if let Some(count) = self.all.map().get_mut(&self.key) {
            *count = count.saturating_sub(1);
        }
    }
}

/// Hears of what happened to a runner.
pub type Listener<T> = Arc<dyn Fn(&RunnerName, T) + Send + Sync>;

/// What the agents of a daemon share.
#[derive(Clone)]
pub struct Shared {
    /// Where jobs are written down.
    pub store: Store,
    /// Tells the time of receipt.
    pub clock: Arc<dyn Clock>,
    /// Gives 128 random bits for a job's name.
    pub random: fn() -> u128,
    /// Has the reconciler look at once.
    pub wake: Arc<dyn Fn() + Send + Sync>,
    /// Called with the status of every answer; `None` if there was none.
    pub counted: Listener<Option<u16>>,
    /// Tells whether the operator of a backend must act before it takes jobs.
    pub shut: Arc<dyn Fn(&BackendName) -> bool + Send + Sync>,
    /// Called when a job became a row, with its wait in GitLab's queue if GitLab said.
    pub received: Listener<Option<Duration>>,
    /// Why jobs are not taken.
    pub conditions: Conditions,
    /// Requests under way.
    pub reservations: Reservations,
    /// For tests: the point of the crash table at which to die.
    pub crash_at: Option<String>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("conditions", &self.conditions).finish_non_exhaustive()
    }
}

/// The loop that asks for one runner's jobs.
#[derive(Clone, Debug)]
pub struct Agent(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    settings: AgentSettings,
    client: Client,
    info: Info,
    shared: Shared,
    stop: CancellationToken,
    asked: Mutex<Asked>,
}

/// What was learnt from earlier answers.
#[derive(Debug)]
struct Asked {
    health: Health,
    concurrency: RequestConcurrency,
    last_update: Option<String>,
    under_way: usize,
}

/// What became of one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Got {
    Job,
    Nothing,
}

impl Agent {
    /// Makes an agent; nothing is asked yet.
    pub fn new(
        settings: AgentSettings,
        client: Client,
        info: Info,
        shared: Shared,
        stop: CancellationToken,
    ) -> Self {
        let asked = Mutex::new(Asked {
            health: Health::new(HealthPolicy {
                strikes: settings.unhealthy_requests_limit,
                interval: settings.unhealthy_interval,
            }),
            concurrency: RequestConcurrency::new(
                u32::try_from(settings.request_concurrency).unwrap_or(u32::MAX),
            ),
            last_update: None,
            under_way: 0,
        });
        Self(Arc::new(Inner { settings, client, info, shared, stop, asked }))
    }

    /// Starts the workers; they end after `stop` is cancelled and their requests are answered.
    pub fn start(&self, tracker: &TaskTracker) {
        for worker in 0..self.0.settings.request_concurrency.max(1) {
            let inner = Arc::clone(&self.0);
            tracker.spawn(async move { inner.work(worker).await });
        }
    }
}

impl Inner {
    fn asked(&self) -> MutexGuard<'_, Asked> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn work(&self, worker: usize) {
        while !self.stop.is_cancelled() {
            let wait = match self.once(worker).await {
                Ok(Got::Job) if !self.settings.strict_check_interval => continue,
                Ok(Got::Job | Got::Nothing) => self.settings.check_interval,
                Err(wait) => wait,
            };
            // Both are cancel-safe. A request is never one of them.
            tokio::select! {
                () = self.stop.cancelled() => {}
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    /// Asks once if there is room and reason; `Err` gives how long to wait otherwise.
    async fn once(&self, worker: usize) -> Result<Got, Duration> {
        let settings = &self.settings;
        let who = settings.runner.0.as_str();
        if let Some(problem) = self.problem().await {
            self.shared.conditions.set(who, Some(problem));
            return Err(settings.check_interval.max(Duration::from_secs(1)));
        }
        self.shared.conditions.set(who, None);
        let allowed = usize::try_from(self.asked().concurrency.allowed()).unwrap_or(usize::MAX);
        if worker >= allowed {
            return Err(settings.check_interval);
        }
        let reservation = match self.reserve().await {
            Ok(Some(reservation)) => reservation,
            Ok(None) => return Err(settings.check_interval.min(NO_ROOM_WAIT)),
            Err(error) => {
                tracing::error!(error = %Chain(&error), "the jobs could not be counted");
                return Err(settings.check_interval.max(Duration::from_secs(1)));
            }
        };
        let last_update = self.asked().last_update.clone();
        self.asked().under_way += 1;
        let reply = self
            .client
            .request_job(&settings.token, &settings.system_id, &self.info, last_update.as_deref())
            .await;
        let now = self.shared.clock.now();
        {
            let mut asked = self.asked();
            asked.under_way = asked.under_way.saturating_sub(1);
            asked.health.record(&reply, now);
            asked.concurrency.record(&reply);
        }
        (self.shared.counted)(&settings.runner, status(&reply));
        let got = match reply {
            Ok(reply) => self.answered(reply).await,
            Err(error) if error.may_have_arrived() => {
                tracing::warn!(
                    runner = who, error = %Chain(&error),
                    "GitLab did not answer a request for a job; if it had one for us, it is lost"
                );
                Err(settings.check_interval)
            }
            Err(error) => {
                tracing::warn!(
                    runner = who, error = %Chain(&error), "GitLab could not be asked for a job"
                );
                Err(settings.check_interval)
            }
        };
        drop(reservation);
        got
    }

    /// Takes in an answer; a job is a row when this returns.
    async fn answered(&self, reply: RequestReply) -> Result<Got, Duration> {
        let runner = self.settings.runner.0.as_str();
        let pause = self.settings.check_interval;
        match reply {
            RequestReply::Job(job) => {
                self.crash_point("A");
                self.receive(*job).await;
                Ok(Got::Job)
            }
            RequestReply::Undecodable(answer) => {
                tracing::error!(
                    runner, error = %answer.error, request_id = %answer.request_id,
                    "GitLab gave a job that cannot be read"
                );
                if let (Some(id), Some(token)) = (answer.id, &answer.token) {
                    self.refuse(CiJobId(id), token).await;
                }
                Ok(Got::Nothing)
            }
            RequestReply::NoJob { last_update } => {
                let mut asked = self.asked();
                // A 204 without the header keeps what was known (Workhorse's answer to a long poll).
                if last_update.is_some() {
                    asked.last_update = last_update;
                }
                Ok(Got::Nothing)
            }
            RequestReply::Refused => {
                tracing::error!(runner, "GitLab does not know the runner's token");
                Ok(Got::Nothing)
            }
            RequestReply::Busy { status, retry_after } => {
                tracing::warn!(runner, status, "GitLab is busy");
                Err(retry_after.map_or(pause, |wait| wait.clamp(pause, Duration::from_secs(300))))
            }
            RequestReply::Conflict => {
                tracing::debug!(runner, "GitLab's queue was contended");
                Ok(Got::Nothing)
            }
            RequestReply::Orphaned => {
                tracing::warn!(runner, "the runner's group or project is gone");
                Ok(Got::Nothing)
            }
            RequestReply::BadRequest | RequestReply::TooLarge => {
                tracing::warn!(runner, "GitLab refuses the form of our request");
                Ok(Got::Nothing)
            }
            RequestReply::Unexpected { status } => {
                tracing::warn!(runner, status, "GitLab answered with a status it should not");
                Ok(Got::Nothing)
            }
        }
    }

    /// Writes a job down. Nothing stands between the answer and this (crash point A).
    async fn receive(&self, job: ReceivedJob) {
        let now = self.shared.clock.now();
        let payload = &job.payload;
        let timeout = Duration::from_secs(payload.timeout_secs());
        let new = NewJob {
            id: JobId::mint(now, (self.shared.random)()),
            runner: self.settings.runner.clone(),
            ci_url: self.settings.ci_url.clone(),
            ci_job: CiJobId(payload.id),
            ci_pipeline: payload.job_info.pipeline_id,
            project_id: payload.job_info.project_id,
            project: project_of(&job),
            name: payload.job_info.name.clone(),
            backend: self.settings.backend.clone(),
            received_at: now,
            deadline_at: policy::after(now, timeout),
            payload: job.raw.clone(),
        };
        let (id, ci_job) = (new.id, new.ci_job);
        let span = tracing::info_span!("agent.receive", job = %id, ci_job = %ci_job,
            runner = %self.settings.runner, request_id = %job.request_id);
        match self.write_down(new).await {
            Ok(Received::New) => {
                let key = (self.settings.runner.clone(), self.settings.backend.clone());
                *self.shared.reservations.since().entry(key).or_insert(0) += 1;
                span.in_scope(|| tracing::info!("job received"));
                (self.shared.wake)();
                let queued = payload.job_info.time_in_queue_seconds;
                let queued = queued.and_then(|secs| Duration::try_from_secs_f64(secs).ok());
                (self.shared.received)(&self.settings.runner, queued);
            }
            Ok(Received::Known) => {
                span.in_scope(|| {
                    tracing::warn!("GitLab gave us a job that we have; it is run once");
                });
                if self.is_over(ci_job).await {
                    // A GitLab restored from a backup uses its numbers again: this is another job, and
                    // its author must not wait for it.
                    self.refuse(ci_job, &job.payload.token).await;
                }
            }
            Err(error) => {
                span.in_scope(|| {
                    tracing::error!(error = %Chain(&error), "a job could not be written down");
                });
                // It must not hang in GitLab until it is found silent.
                self.refuse(ci_job, &job.payload.token).await;
            }
        }
    }

    /// Writes a job down, patiently: somebody else's lock on the database may last for a while, and
    /// GitLab waits for half an hour.
    async fn write_down(&self, new: NewJob) -> Result<Received, StoreError> {
        let mut attempt = 0;
        loop {
            attempt += 1;
            match self.shared.store.receive(new.clone()).await {
                Err(error) if attempt < WRITE_ATTEMPTS && !self.stop.is_cancelled() => {
                    tracing::error!(
                        job = %new.id, ci_job = %new.ci_job, attempt, error = %Chain(&error),
                        "a job could not be written down, and is tried again"
                    );
                    tokio::time::sleep(policy::back_off(attempt)).await;
                }
                done => return done,
            }
        }
    }

    /// Says whether the job of this number is one that GitLab has heard the last of.
    async fn is_over(&self, id: CiJobId) -> bool {
        match self.shared.store.by_ci_job(id).await {
            Ok(rows) => {
                rows.iter().any(|row| row.ci_url == self.settings.ci_url && row.state.is_over())
            }
            Err(error) => {
                tracing::warn!(ci_job = %id, error = %Chain(&error), "the job was not looked up");
                false
            }
        }
    }

    /// Ends a job that we cannot take, so that its author learns of it now.
    async fn refuse(&self, id: CiJobId, token: &Secret) {
        let state = UpdateState::Failed {
            reason: FailureReason::RunnerSystemFailure.as_str().to_owned(),
            exit_code: None,
        };
        let update = JobUpdate { state, output: None, info: self.info.clone() };
        for attempt in 0..3_u32 {
            match self.client.update_job(JobAuth { id, token }, &update).await {
                Ok(_answered) => return,
                Err(error) => {
                    tracing::warn!(ci_job = %id, error = %Chain(&error), "GitLab did not hear it");
                }
            }
            tokio::time::sleep(policy::back_off(attempt + 1)).await;
        }
    }

    /// Says why no job may be asked for, if so.
    async fn problem(&self) -> Option<String> {
        let now = self.shared.clock.now();
        {
            let asked = self.asked();
            if !asked.health.may_ask(now) {
                let reason = asked.health.reason().unwrap_or("it refuses");
                return Some(format!("GitLab refuses the runner: {reason}"));
            }
        }
        if (self.shared.shut)(&self.settings.backend) {
            return Some(format!("the backend {} waits for its operator", self.settings.backend));
        }
        if self.shared.store.is_failing()
            && let Err(error) = self.shared.store.probe().await
        {
            return Some(format!("the database takes no writes: {}", Chain(&error)));
        }
        match rustix::fs::statvfs(self.settings.state_dir.as_std_path()) {
            Ok(disk) => {
                let free = disk.f_bavail.saturating_mul(disk.f_frsize);
                (free < DISK_FLOOR).then(|| {
                    format!(
                        "only {} MiB are free below {}",
                        free / (1024 * 1024),
                        self.settings.state_dir
                    )
                })
            }
            Err(error) => Some(format!("the state directory {} cannot be asked: {error}", {
                &self.settings.state_dir
            })),
        }
    }

    /// Takes a place for one more job, if there is one.
    async fn reserve(&self) -> Result<Option<Reservation>, StoreError> {
        let settings = &self.settings;
        let key = (settings.runner.clone(), settings.backend.clone());
        let mut counted = self.shared.reservations.counted.lock().await;
        // Places before rows: one that becomes a row in between counts twice, which errs on the safe
        // side; the other way round it might not count at all.
        let reserved = self.shared.reservations.map().clone();
        if counted.as_ref().is_some_and(|known| known.at.elapsed() < COUNT_KEPT)
            && let Some(known) = counted.as_ref()
            && self.room(known, &reserved, &self.shared.reservations.since()).is_there()
        {
            return Ok(Some(self.take(key)));
        }
        // What came since the count is in the new one, or will be counted twice.
        self.shared.reservations.since().clear();
        let known = Counted { at: Instant::now(), counts: self.shared.store.counts().await? };
        let is_there = self.room(&known, &reserved, &self.shared.reservations.since()).is_there();
        *counted = Some(known);
        Ok(is_there.then(|| self.take(key)))
    }

    fn take(&self, key: Place) -> Reservation {
        *self.shared.reservations.map().entry(key.clone()).or_insert(0) += 1;
        Reservation { all: self.shared.reservations.clone(), key }
    }

    /// Works out the room that is left, never more than there is.
    fn room(&self, known: &Counted, reserved: &Places, since: &Places) -> Room {
        let settings = &self.settings;
        let rows = |of: &dyn Fn(&Count) -> bool| -> usize {
            known.counts.iter().filter(|c| !c.state.is_over() && of(c)).map(|c| c.jobs).sum()
        };
        let places = |of: &dyn Fn(&Place) -> bool| -> usize {
            let sum =
                |map: &Places| map.iter().filter(|(k, _)| of(k)).map(|(_, n)| *n).sum::<usize>();
            sum(reserved) + sum(since)
        };
        let waits = |state| {
            matches!(state, JobState::Received | JobState::Submitting | JobState::Submitted)
        };
        Room {
            in_flight: rows(&|_| true) + places(&|_| true),
            concurrent: settings.concurrent,
            of_runner: rows(&|c| c.runner == settings.runner)
                + places(&|(runner, _)| *runner == settings.runner),
            limit: settings.limit,
            queued: rows(&|c| waits(c.state) && c.backend == settings.backend)
                + places(&|(_, backend)| *backend == settings.backend),
            max_queued: settings.max_queued,
        }
    }

    fn crash_point(&self, name: &str) {
        if self.shared.crash_at.as_deref() == Some(name) {
            crate::reconcile::crash(name);
        }
    }
}

/// Names a job's project; old servers leave the path out of `job_info`.
fn project_of(job: &ReceivedJob) -> String {
    let info = &job.payload.job_info;
    if !info.project_full_path.is_empty() {
        return info.project_full_path.clone();
    }
    job.payload
        .variables
        .iter()
        .find(|variable| variable.key == "CI_PROJECT_PATH")
        .map_or_else(|| info.project_name.clone(), |path| path.value.expose().to_owned())
}

/// Gives an answer's status for the metrics.
fn status(reply: &Result<RequestReply, gitlab::Error>) -> Option<u16> {
    match reply {
        Ok(RequestReply::Job(_) | RequestReply::Undecodable(_)) => Some(201),
        Ok(RequestReply::NoJob { .. }) => Some(204),
        Ok(RequestReply::Refused) => Some(403),
        Ok(RequestReply::Conflict) => Some(409),
        Ok(RequestReply::TooLarge) => Some(413),
        Ok(RequestReply::Orphaned) => Some(422),
        Ok(RequestReply::BadRequest) => Some(400),
        Ok(RequestReply::Busy { status, .. } | RequestReply::Unexpected { status }) => {
            Some(*status)
        }
        Err(_) => None,
    }
}
