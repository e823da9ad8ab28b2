//! Everything the coordinator knows, and the changes of status. One mutex guards it; nothing here
//! waits.

use std::collections::{HashMap, HashSet, VecDeque};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::artifacts::Stored;
use super::clock::Clock;
use super::fault::{Endpoint, Faults, Requests};
use super::git::Repository;
use super::job::Job;
use super::new_job::NewJob;
use super::options::{Knobs, Options, RunnerOptions, TokenKind};
use super::runner::Runner;
use super::runners_api::Users;
use super::view::{Counts, EndedBy, Status};
use super::{payload, random, rules};

/// Violations beyond this number are only counted.
const MAX_VIOLATIONS: usize = 200;
/// Calls beyond this number are not recorded.
const MAX_RECORDED: usize = 10_000;
/// Request ids that are remembered to find repeated ones.
const MAX_REQUEST_IDS: usize = 100_000;

/// A recorded call.
#[derive(Clone)]
pub struct Recorded {
    /// What it was.
    pub endpoint: Endpoint,
    /// The job in its path.
    pub job: Option<i64>,
    /// The answer's status, also if the answer was lost.
    pub status: u16,
    /// When it was answered, since the coordinator's start.
    pub at: Duration,
    /// The body.
    pub body: Bytes,
}

impl fmt::Debug for Recorded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Recorded")
            .field("endpoint", &self.endpoint)
            .field("job", &self.job)
            .field("status", &self.status)
            .field("at", &self.at)
            .field("body.len", &self.body.len())
            .finish()
    }
}

/// What the handlers share.
pub(super) struct Shared {
    pub(super) options: Options,
    /// Scheme, host, port and relative root; set once the port is known.
    pub(super) url: OnceLock<String>,
    pub(super) clock: Clock,
    state: Mutex<State>,
    /// Rings after every call and every change from outside.
    pub(super) anything: Notify,
    /// Rings when the last unfinished job ends.
    pub(super) idle: Arc<Notify>,
    pub(super) tasks: TaskTracker,
    pub(super) shutdown: CancellationToken,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("url", &self.url).finish_non_exhaustive()
    }
}

impl Shared {
    pub(super) fn new(options: Options, shutdown: CancellationToken) -> Self {
        let idle = Arc::new(Notify::new());
        let state = State::new(&options, Arc::clone(&idle));
        Self {
            options,
            url: OnceLock::new(),
            clock: Clock::new(),
            state: Mutex::new(state),
            anything: Notify::new(),
            idle,
            tasks: TaskTracker::new(),
            shutdown,
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        // A panic of one handler is reported by its own test; the state is still of use.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn url(&self) -> &str {
        self.url.get().map(String::as_str).unwrap_or_default()
    }

    /// Does something to the state from outside, then tells those who wait.
    pub(super) fn change<T>(&self, act: impl FnOnce(&mut State, Duration) -> T) -> T {
        let result = {
            let mut state = self.lock();
            act(&mut state, self.clock.now())
        };
        self.anything.notify_waiters();
        result
    }
}

/// Everything the coordinator knows.
pub(super) struct State {
    pub(super) knobs: Knobs,
    pub(super) faults: Faults,
    pub(super) requests: Requests,
    pub(super) counts: Counts,
    pub(super) jobs: Vec<Job>,
    pub(super) first_job: i64,
    pub(super) queue: VecDeque<i64>,
    pub(super) runners: Vec<Runner>,
    pub(super) runner_by_token: HashMap<String, usize>,
    pub(super) job_by_token: HashMap<String, i64>,
    pub(super) repositories: HashMap<String, Repository>,
    pub(super) recorded: Option<Vec<Recorded>>,
    /// After how many bytes the next uploads and downloads are cut.
    pub(super) upload_cuts: VecDeque<u64>,
    pub(super) download_cuts: VecDeque<u64>,
    /// The second host, if there is one, and what it was told to give out.
    pub(super) storage_url: Option<String>,
    pub(super) signed: HashMap<String, Stored>,
    pub(super) users: Users,
    /// Time that tests skipped in steps so large that no client could have called in between.
    pub(super) skipped: Duration,
    pub(super) away: bool,
    keep_traces: bool,
    idle: Arc<Notify>,
    violations: Vec<String>,
    more_violations: u64,
    request_ids: HashSet<u128>,
    request_ids_in_order: VecDeque<u128>,
}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("State").field("counts", &self.counts).finish_non_exhaustive()
    }
}

impl State {
    fn new(options: &Options, idle: Arc<Notify>) -> Self {
        Self {
            knobs: options.knobs.clone(),
            faults: Faults::default(),
            requests: Requests::default(),
            counts: Counts::default(),
            jobs: Vec::new(),
            first_job: options.first_job,
            queue: VecDeque::new(),
            runners: Vec::new(),
            runner_by_token: HashMap::new(),
            job_by_token: HashMap::new(),
            repositories: HashMap::new(),
            recorded: options.record.then(Vec::new),
            upload_cuts: VecDeque::new(),
            download_cuts: VecDeque::new(),
            storage_url: None,
            signed: HashMap::new(),
            users: Users::default(),
            skipped: Duration::ZERO,
            away: false,
            keep_traces: options.keep_traces,
            idle,
            violations: Vec::new(),
            more_violations: 0,
            request_ids: HashSet::new(),
            request_ids_in_order: VecDeque::new(),
        }
    }

    fn index(&self, id: i64) -> Option<usize> {
        usize::try_from(id.checked_sub(self.first_job)?).ok()
    }

    pub(super) fn job(&self, id: i64) -> Option<&Job> {
        self.jobs.get(self.index(id)?)
    }

    pub(super) fn job_mut(&mut self, id: i64) -> Option<&mut Job> {
        let at = self.index(id)?;
        self.jobs.get_mut(at)
    }

    pub(super) fn violation(&mut self, text: String) {
        tracing::debug!(violation = %text, "the client broke a rule");
        if self.violations.len() < MAX_VIOLATIONS {
            self.violations.push(text);
        } else {
            self.more_violations += 1;
        }
    }

    pub(super) fn violations(&self) -> Vec<String> {
        let mut list = self.violations.clone();
        if self.more_violations > 0 {
            list.push(format!("and {} more", self.more_violations));
        }
        list
    }

    /// Whether a request id was used by an earlier call that was answered properly.
    pub(super) fn knows_request_id(&self, id: u128) -> bool {
        self.request_ids.contains(&id)
    }

    pub(super) fn remember_request_id(&mut self, id: u128) {
        if self.request_ids.insert(id) {
            self.request_ids_in_order.push_back(id);
        }
        if self.request_ids_in_order.len() > MAX_REQUEST_IDS
            && let Some(oldest) = self.request_ids_in_order.pop_front()
        {
            self.request_ids.remove(&oldest);
        }
    }

    pub(super) fn record(&mut self, call: Recorded) {
        if let Some(list) = &mut self.recorded
            && list.len() < MAX_RECORDED
        {
            list.push(call);
        }
    }

    pub(super) fn add_runner(
        &mut self,
        options: RunnerOptions,
        prefix: &str,
        now: Duration,
    ) -> usize {
        let token =
            options.token.clone().unwrap_or_else(|| format!("{prefix}{}", random::letters(20)));
        let at = self.runners.len();
        let id = i64::try_from(at + 1).unwrap_or(i64::MAX);
        let mut runner = Runner::new(id, token.clone(), options, now);
        runner.token_expires = self.knobs.runner_token_life.map(|life| now + life);
        self.runners.push(runner);
        self.runner_by_token.insert(token, at);
        at
    }

    /// Finds a runner whose token is valid.
    pub(super) fn runner_at(&self, token: &str, now: Duration) -> Option<usize> {
        let at = *self.runner_by_token.get(token)?;
        let runner = self.runners.get(at)?;
        let expired = runner.token_expires.is_some_and(|end| end <= now);
        (!runner.deleted && !expired).then_some(at)
    }

    /// Gives a runner another token; the old one is dead from now on.
    pub(super) fn new_runner_token(&mut self, at: usize, now: Duration) -> Option<String> {
        let life = self.knobs.runner_token_life;
        let runner = self.runners.get_mut(at)?;
        let prefix = if runner.token.starts_with("glrtr-") { "glrtr-" } else { "glrt-" };
        let token = format!("{prefix}{}", random::letters(20));
        self.runner_by_token.remove(&runner.token);
        runner.token.clone_from(&token);
        runner.token_expires = life.map(|life| now + life);
        runner.ring(now);
        self.runner_by_token.insert(token.clone(), at);
        Some(token)
    }

    pub(super) fn delete_runner(&mut self, at: usize, now: Duration) {
        if let Some(runner) = self.runners.get_mut(at) {
            runner.deleted = true;
            runner.managers.clear();
            // Those who wait for news learn of it.
            runner.ring(now);
        }
    }

    pub(super) fn enqueue(&mut self, wish: NewJob, now: Duration) -> i64 {
        let id = self.first_job + i64::try_from(self.jobs.len()).unwrap_or(i64::MAX);
        if let Some(repository) = self.repositories.get_mut(&wish.project_path)
            && let Err(error) = repository.note_pipeline(wish.pipeline_id, wish.git.sha.as_deref())
        {
            tracing::warn!(%error, "cannot write the pipeline's ref");
        }
        self.users.note_project(wish.project_id, &wish.project_path);
        for runner in &mut self.runners {
            if runner.suits(&wish) {
                runner.ring(now);
            }
        }
        self.jobs.push(Job::new(id, wish, now));
        self.queue.push_back(id);
        self.counts.pending += 1;
        id
    }

    /// Changes a status that is not final.
    fn set_status(&mut self, id: i64, status: Status) {
        let Some(at) = self.index(id) else { return };
        let Some(job) = self.jobs.get_mut(at) else { return };
        *self.counts.slot(job.status) -= 1;
        *self.counts.slot(status) += 1;
        job.status = status;
        job.announce();
        if self.counts.unfinished() == 0 {
            self.idle.notify_waiters();
        }
    }

    /// Ends a job.
    pub(super) fn finish(
        &mut self,
        id: i64,
        status: Status,
        reason: Option<&str>,
        by: EndedBy,
        now: Duration,
    ) {
        let keep = self.keep_traces;
        let Some(job) = self.job_mut(id) else { return };
        if job.status.is_final() {
            return;
        }
        job.failure_reason = reason.map(str::to_owned);
        job.ended_by = Some(by);
        job.finished_at = Some(now);
        job.finalising = None;
        job.unacknowledged = None;
        job.wish = None;
        let broken = rules::at_end(job);
        if !keep {
            job.trace = Arc::default();
        }
        job.masked = Vec::new();
        for text in broken {
            self.violation(text);
        }
        self.set_status(id, status);
    }

    /// Ends a job because the server has had enough of it. A job that was to be cancelled is
    /// cancelled, with the reason.
    pub(super) fn drop_job(&mut self, id: i64, reason: &str, now: Duration) {
        let canceling = self.job(id).is_some_and(|job| job.status == Status::Canceling);
        let status = if canceling { Status::Canceled } else { Status::Failed };
        self.finish(id, status, Some(reason), EndedBy::Server, now);
    }

    /// Hands out the next job that suits; jobs that ask too much of the runner fail on the way.
    pub(super) fn assign(
        &mut self,
        at: usize,
        system_id: &Arc<str>,
        can: impl Fn(&str) -> bool,
        shared: &Shared,
        now: Duration,
    ) -> Option<String> {
        let mut place = 0;
        while let Some(&id) = self.queue.get(place) {
            let pending = self.job(id).filter(|job| job.status == Status::Pending);
            let Some(wish) = pending.and_then(|job| job.wish.as_deref()) else {
                self.queue.remove(place);
                continue;
            };
            if !self.runners.get(at).is_some_and(|runner| runner.suits(wish)) {
                place += 1;
                continue;
            }
            let orphaned = self.lacks_dependency(wish, now);
            let lacking = wish.required().into_iter().find(|feature| !can(feature));
            self.queue.remove(place);
            if lacking.is_some() {
                self.finish(id, Status::Failed, Some("runner_unsupported"), EndedBy::Server, now);
                continue;
            }
            if orphaned {
                let reason = Some("missing_dependency_failure");
                self.finish(id, Status::Failed, reason, EndedBy::Server, now);
                continue;
            }
            return self.hand_out(id, at, system_id, shared, now);
        }
        None
    }

    fn hand_out(
        &mut self,
        id: i64,
        at: usize,
        system_id: &Arc<str>,
        shared: &Shared,
        now: Duration,
    ) -> Option<String> {
        let two_phase = self.knobs.two_phase;
        let token = match self.knobs.token_kind {
            TokenKind::Stored => format!("glcbt-64_{}", random::letters(20)),
            TokenKind::Jwt => random::jwt(),
        };
        let queue_size = self.queue.len();
        let skipped = self.skipped;
        let kind = self.knobs.token_kind;
        let place = self.index(id)?;
        let job = self.jobs.get_mut(place)?;
        let mut wish = if two_phase { job.wish.clone()? } else { job.wish.take()? };
        self.add_dependencies(&mut wish, &token, shared.options.version);
        let runner = self.runners.get(at)?;
        let job = self.jobs.get_mut(place)?;
        if let Some(limit) = runner.options.maximum_timeout {
            job.timeout = job.timeout.min(limit);
        }
        let repository = self.repositories.get(&wish.project_path);
        let created_at = shared.clock.calendar(job.pending_at);
        let body = payload::body(
            &wish,
            &payload::Facts {
                id,
                token: &token,
                version: shared.options.version,
                url: shared.url(),
                runner_id: runner.id,
                runner_description: &runner.options.description,
                runner_tags: &runner.options.tags,
                timeout: job.timeout.as_secs(),
                queued_seconds: now.saturating_sub(job.pending_at).as_secs(),
                queue_size,
                head: repository.map(|repository| repository.head()),
                created_at: format!("{created_at:.0}"),
            },
        );
        job.masked = wish
            .variables
            .iter()
            .filter(|variable| variable.masked)
            .map(|variable| variable.value.clone())
            .collect();
        job.runner = Some(at);
        job.system_id = Some(Arc::clone(system_id));
        job.assigned_at = Some(now);
        job.updated_at = now;
        job.last_call_at = Some(now);
        job.skipped_then = skipped;
        if kind == TokenKind::Jwt {
            let life = job.timeout.max(Duration::from_secs(60)) + Duration::from_secs(300);
            job.token_expires = Some(now + life);
        }
        self.job_by_token.insert(token.clone(), id);
        job.token = token;
        if two_phase {
            job.unacknowledged = Some(now);
            job.announce();
        } else {
            self.set_status(id, Status::Running);
        }
        Some(body)
    }

    /// The runner of a two-phase server has said `running`.
    pub(super) fn acknowledge(&mut self, id: i64) {
        let Some(job) = self.job_mut(id) else { return };
        job.unacknowledged = None;
        job.wish = None;
        self.set_status(id, Status::Running);
    }

    /// A user cancels: gracefully, if the manager's *stored* features say that it can.
    pub(super) fn cancel(&mut self, id: i64, graceful_known: bool, now: Duration) {
        let Some(job) = self.job(id) else { return };
        let graceful = graceful_known && self.manager_can(job, "cancel_gracefully");
        match job.status {
            Status::Running if graceful => self.set_status(id, Status::Canceling),
            Status::Pending | Status::Running => {
                self.finish(id, Status::Canceled, None, EndedBy::User, now);
            }
            Status::Canceling | Status::Success | Status::Failed | Status::Canceled => {}
        }
    }

    fn manager_can(&self, job: &Job, feature: &str) -> bool {
        let runner = job.runner.and_then(|at| self.runners.get(at));
        let system_id = job.system_id.as_ref();
        runner
            .zip(system_id)
            .and_then(|(runner, system_id)| runner.managers.get(system_id))
            .is_some_and(|manager| manager.info.has(feature))
    }

    /// Ends what has waited, been silent or run for too long.
    pub(super) fn sweep(&mut self, shared: &Shared, now: Duration) {
        let version = shared.options.version;
        let mut late = Vec::new();
        for job in self.jobs.iter().filter(|job| !job.status.is_final()) {
            let canceling = job.status == Status::Canceling;
            let silent = now.saturating_sub(job.updated_at);
            let since_assigned = job.assigned_at.map(|at| now.saturating_sub(at));
            let limit = job.timeout + Duration::from_secs(15 * 60);
            if let Some(since) = job.unacknowledged {
                if now.saturating_sub(since) >= Duration::from_secs(120) {
                    late.push((job.id, "runner_provisioning_timeout"));
                }
            } else if job.status == Status::Pending {
                let waited = now.saturating_sub(job.pending_at);
                let hopeful = job.wish.as_deref().is_some_and(|wish| self.has_runner(wish));
                if hopeful && waited > Duration::from_secs(24 * 3600) {
                    late.push((job.id, "stuck_pending_with_matching_runners"));
                } else if !hopeful && waited > Duration::from_secs(3600) {
                    late.push((job.id, "stuck_pending_no_matching_runners"));
                }
            } else if silent > version.silence() {
                late.push((job.id, version.silence_reason(canceling)));
            } else if since_assigned.is_some_and(|time| time > limit) {
                late.push((job.id, version.overrun_reason(canceling)));
            }
        }
        for (id, reason) in late {
            self.drop_job(id, reason, now);
        }
    }

    fn has_runner(&self, wish: &NewJob) -> bool {
        self.runners.iter().any(|runner| !runner.deleted && runner.suits(wish))
    }
}
