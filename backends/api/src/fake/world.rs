//! The other side, and the test's hands in it.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use camino::Utf8PathBuf;
use jiff::Timestamp;

use super::{Call, FakeBackend, FakeJob, FakeOptions, Trouble, Verb};
use crate::{Backend, ErrorKind, JobRef, JobSpec, Observation, Outcome, SubmitToken, Usage};

/// The other side; clones are handles of the same world.
#[derive(Clone, Debug)]
pub struct FakeWorld(Arc<Mutex<State>>);

/// Everything the other side knows.
#[derive(Debug)]
pub(super) struct State {
    pub(super) options: FakeOptions,
    pub(super) now: Duration,
    pub(super) jobs: BTreeMap<SubmitToken, Job>,
    /// Submissions whose caller cannot know whether they took effect.
    pub(super) doubts: BTreeMap<SubmitToken, Doubt>,
    pub(super) calls: Vec<Call>,
    pub(super) violations: Vec<String>,
    pub(super) troubles: BTreeMap<Verb, VecDeque<Trouble>>,
    pub(super) outages: BTreeMap<Verb, ErrorKind>,
    pub(super) locked_out: bool,
    pub(super) hide_new: Duration,
    pub(super) last_id: u64,
}

/// A submission in doubt.
#[derive(Clone, Copy, Debug)]
pub(super) struct Doubt {
    /// When it was made.
    pub(super) since: Duration,
    /// It was looked for, late enough for absence to count, and was absent.
    pub(super) absent: bool,
}

/// One job over there.
#[derive(Clone, Debug)]
pub(super) struct Job {
    pub(super) job: JobRef,
    pub(super) spec: JobSpec,
    pub(super) status: Observation,
    pub(super) log: Vec<u8>,
    /// Bytes may follow although it ended.
    pub(super) log_open: bool,
    /// What it left in its working directory, by the path in there.
    pub(super) files: BTreeMap<Utf8PathBuf, Bytes>,
    /// `find` knows it from here on.
    pub(super) visible_at: Duration,
    /// `poll` says nothing of it.
    pub(super) silent: bool,
    pub(super) ignores_cancel: bool,
    pub(super) cancels: usize,
    pub(super) submissions: usize,
    pub(super) released: bool,
    /// Polls that saw it, for jobs with a plan.
    pub(super) polls: usize,
}

impl Job {
    pub(super) fn outcome(&self) -> Option<&Outcome> {
        match &self.status {
            Observation::Ended { outcome, .. } => Some(outcome),
            Observation::Pending { .. }
            | Observation::Running { .. }
            | Observation::Gone
            | Observation::Unclear { .. } => None,
        }
    }

    /// Says whether the other side still has it.
    pub(super) fn is_known(&self) -> bool {
        self.status != Observation::Gone && !self.released
    }
}

impl FakeWorld {
    /// Makes an empty world at time zero.
    pub fn new(options: FakeOptions) -> Self {
        Self(Arc::new(Mutex::new(State {
            options,
            now: Duration::ZERO,
            jobs: BTreeMap::new(),
            doubts: BTreeMap::new(),
            calls: Vec::new(),
            violations: Vec::new(),
            troubles: BTreeMap::new(),
            outages: BTreeMap::new(),
            locked_out: false,
            hide_new: Duration::ZERO,
            last_id: 0,
        })))
    }

    /// Opens a backend of this world; every one is what a restart would give.
    pub fn open(&self) -> Arc<dyn Backend> {
        Arc::new(FakeBackend::of(self.clone()))
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        // A test that panicked while it held the lock must not hide its own message.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with_job<T>(&self, token: &SubmitToken, change: impl FnOnce(&mut Job) -> T) -> T {
        let mut state = self.lock();
        let job = state.jobs.get_mut(token);
        change(job.expect("the test speaks of a job that was submitted"))
    }

    /// Lets time pass; nothing but the visibility of jobs depends on it.
    pub fn advance(&self, by: Duration) {
        let mut state = self.lock();
        state.now = state.now.saturating_add(by);
    }

    /// Has a job wait, for a reason.
    pub fn wait_in_queue(&self, token: &SubmitToken, reason: &str, starts_at: Option<Timestamp>) {
        let reason = Some(reason.to_owned());
        self.with_job(token, |job| job.status = Observation::Pending { reason, starts_at });
    }

    /// Starts a job.
    pub fn start(&self, token: &SubmitToken) {
        self.with_job(token, |job| job.status = Observation::Running { host: None });
    }

    /// Starts a job on a machine.
    pub fn start_on(&self, token: &SubmitToken, host: &str) {
        let host = Some(host.to_owned());
        self.with_job(token, |job| job.status = Observation::Running { host });
    }

    /// Ends a job.
    pub fn finish(&self, token: &SubmitToken, outcome: Outcome) {
        self.finish_using(token, outcome, Usage::default());
    }

    /// Ends a job and says what it used.
    pub fn finish_using(&self, token: &SubmitToken, outcome: Outcome, usage: Usage) {
        self.with_job(token, |job| job.status = Observation::Ended { outcome, usage });
    }

    /// Forgets a job: `Gone` for `poll`, absent for `find`, `Lost` for its log.
    pub fn vanish(&self, token: &SubmitToken) {
        self.with_job(token, |job| job.status = Observation::Gone);
    }

    /// Gives a job a status that no backend knows.
    pub fn say(&self, token: &SubmitToken, status: &str) {
        let status = status.to_owned();
        self.with_job(token, |job| job.status = Observation::Unclear { status });
    }

    /// Has `poll` say nothing of a job, or speak again.
    pub fn silence(&self, token: &SubmitToken, silent: bool) {
        self.with_job(token, |job| job.silent = silent);
    }

    /// Has a job write.
    pub fn append_log(&self, token: &SubmitToken, bytes: impl AsRef<[u8]>) {
        self.with_job(token, |job| job.log.extend_from_slice(bytes.as_ref()));
    }

    /// Has a job leave a file in its working directory, from where [`Backend::collect`] brings it home.
    pub fn leave(&self, token: &SubmitToken, path: &str, bytes: impl AsRef<[u8]>) {
        let bytes = Bytes::copy_from_slice(bytes.as_ref());
        self.with_job(token, |job| job.files.insert(path.into(), bytes));
    }

    /// Keeps the end of a job's log open although the job ended, or closes it.
    pub fn hold_log(&self, token: &SubmitToken, open: bool) {
        self.with_job(token, |job| job.log_open = open);
    }

    /// Has a job go on when it is cancelled, until the test finishes it.
    pub fn ignore_cancel(&self, token: &SubmitToken, ignores: bool) {
        self.with_job(token, |job| job.ignores_cancel = ignores);
    }

    /// Hides jobs submitted from now on from `find`, for this long each.
    pub fn hide_new_jobs_for(&self, time: Duration) {
        self.lock().hide_new = time;
    }

    /// Has the next call of this verb go wrong; several are queued, one a call.
    pub fn trouble(&self, verb: Verb, trouble: Trouble) {
        self.lock().troubles.entry(verb).or_default().push_back(trouble);
    }

    /// Has all calls of this verb fail without effect, until `None`.
    pub fn outage(&self, verb: Verb, kind: Option<ErrorKind>) {
        let mut state = self.lock();
        match kind {
            Some(kind) => state.outages.insert(verb, kind),
            None => state.outages.remove(&verb),
        };
    }

    /// Has no call have any effect until somebody logs in, or again take effect.
    pub fn lock_out(&self, locked_out: bool) {
        self.lock().locked_out = locked_out;
    }

    /// Gives every call so far.
    pub fn calls(&self) -> Vec<Call> {
        self.lock().calls.clone()
    }

    /// Counts the calls of one verb.
    pub fn count(&self, verb: Verb) -> usize {
        self.lock().calls.iter().filter(|call| call.verb == verb).count()
    }

    /// Counts all calls.
    pub fn count_all(&self) -> usize {
        self.lock().calls.len()
    }

    /// Gives one job.
    pub fn job(&self, token: &SubmitToken) -> Option<FakeJob> {
        self.lock().jobs.get(token).map(view)
    }

    /// Gives all jobs there ever were, by token.
    pub fn jobs(&self) -> Vec<FakeJob> {
        self.lock().jobs.values().map(view).collect()
    }

    /// Gives every breach of the contract so far.
    pub fn violations(&self) -> Vec<String> {
        self.lock().violations.clone()
    }

    /// Checks that the contract was kept.
    ///
    /// # Panics
    ///
    /// When it was not, with all breaches.
    pub fn assert_no_violations(&self) {
        let violations = self.violations();
        assert!(violations.is_empty(), "the contract was broken: {violations:#?}");
    }
}

fn view(job: &Job) -> FakeJob {
    FakeJob {
        job: job.job.clone(),
        spec: job.spec.clone(),
        submissions: job.submissions,
        cancels: job.cancels,
        outcome: job.outcome().cloned(),
        log: Bytes::copy_from_slice(&job.log),
        released: job.released,
    }
}
