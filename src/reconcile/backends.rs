//! Rounds: what is asked of a backend for all of its jobs at once.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bridge_backend::{BackendError, ErrorKind, JobRef, Observation};
use jiff::Timestamp;

use crate::domain::id::BackendName;
use crate::domain::job::JobState;
use crate::domain::policy;
use crate::reconcile::{BackendEntry, Inner, News};
use crate::store::{Polled, StoreError};
use crate::telemetry::Chain;

/// The most patience with one call; a backend's own limits are shorter.
const CALL_LIMIT: Duration = Duration::from_secs(300);

/// The most patience with one that carries files over a network: a stalled one ends by itself, sooner.
pub(in crate::reconcile) const TRANSFER_LIMIT: Duration = Duration::from_secs(3600);

/// How long after something moved a backend counts as busy.
const ACTIVE_FOR: Duration = Duration::from_secs(30);

/// When to look again at a backend whose poll is under way.
const ROUND_PAUSE: Duration = Duration::from_millis(250);

/// When a backend was asked, and when it is to be asked again.
#[derive(Debug, Default)]
pub(in crate::reconcile) struct BackendWatch {
    pub(in crate::reconcile) round_under_way: bool,
    polled_at: Option<Timestamp>,
    /// How long the last polls took. The quickest counts: on a machine that stalled for a second, one
    /// slow answer is no reason to look away for half a minute.
    took: [Duration; 3],
    moved_at: Option<Timestamp>,
    /// Since when every poll was answered.
    answers_since: Option<Timestamp>,
    failures: u32,
    /// When a job was last found to wait for the operator.
    pub(in crate::reconcile) shut_at: Option<Timestamp>,
    /// The last poll's error, for `health`.
    pub(in crate::reconcile) trouble: Option<String>,
}

impl BackendWatch {
    fn took(&self) -> Duration {
        self.took.iter().copied().min().unwrap_or_default()
    }

    /// Tells when the next poll may be.
    fn next_poll(&self, now: Timestamp, rest: u32, floor: Option<Duration>) -> Timestamp {
        let Some(polled) = self.polled_at else { return now };
        if polled > now {
            // The clock went back.
            return now;
        }
        if self.failures > 0 {
            return policy::after(polled, policy::back_off(self.failures).max(self.took()));
        }
        let active = self.moved_at.is_some_and(|at| policy::since(now, at) < ACTIVE_FOR);
        policy::after(polled, policy::poll_interval(self.took(), rest, active, floor))
    }
}

impl Inner {
    /// Calls a backend with a time limit, and counts the call.
    pub(in crate::reconcile) async fn call<T>(
        &self,
        backend: &BackendName,
        verb: &'static str,
        future: impl Future<Output = bridge_backend::Result<T>>,
    ) -> bridge_backend::Result<T> {
        self.call_for(CALL_LIMIT, backend, verb, future).await
    }

    /// Calls a backend with this time limit, and counts the call.
    pub(in crate::reconcile) async fn call_for<T>(
        &self,
        limit: Duration,
        backend: &BackendName,
        verb: &'static str,
        future: impl Future<Output = bridge_backend::Result<T>>,
    ) -> bridge_backend::Result<T> {
        let started = Instant::now();
        let answer = match tokio::time::timeout(limit, future).await {
            Ok(answer) => answer,
            // Dropping the call's future is allowed, and for `submit` equals `Ambiguous`.
            Err(_elapsed) => Err(BackendError::new(
                ErrorKind::Ambiguous,
                format!("hear from the backend within {} seconds", limit.as_secs()),
            )),
        };
        let took = started.elapsed();
        let error = answer.as_ref().err().map(BackendError::kind);
        self.watcher.backend_call(backend, verb, error, took);
        tracing::debug!(
            backend = %backend, verb, error = ?error,
            elapsed_ms = u64::try_from(took.as_millis()).unwrap_or(u64::MAX),
            "backend called"
        );
        answer
    }

    /// Notes that jobs of this backend move, so that it is asked again soon.
    pub(in crate::reconcile) fn moved(&self, backend: &BackendName, now: Timestamp) {
        let mut desk = self.desktop();
        desk.backends.entry(backend.clone()).or_default().moved_at = Some(now);
        drop(desk);
        self.wake.notify_one();
    }

    /// Notes whether a backend takes no jobs until its operator has acted.
    pub(in crate::reconcile) fn shut(&self, backend: &BackendName, at: Option<Timestamp>) {
        self.desktop().backends.entry(backend.clone()).or_default().shut_at = at;
    }

    /// Tells since when a backend's silence about a job counts: our own absence proves nothing, and
    /// neither does a question that was not answered.
    pub(in crate::reconcile) fn silent_since(
        &self,
        backend: &BackendName,
        missing_since: Timestamp,
    ) -> Timestamp {
        let answers_since =
            self.desktop().backends.get(backend).and_then(|watch| watch.answers_since);
        missing_since.max(self.since).max(answers_since.unwrap_or(Timestamp::MAX))
    }

    /// Starts a backend's round unless one is under way, and tells when the next poll may be.
    pub(in crate::reconcile) fn start_round(
        self: &Arc<Self>,
        name: &BackendName,
        entry: &BackendEntry,
        now: Timestamp,
    ) -> Timestamp {
        let (poll_at, start) = {
            let mut desk = self.desktop();
            let watch = desk.backends.entry(name.clone()).or_default();
            let poll_at =
                watch.next_poll(now, entry.backend.capabilities().poll_rest, entry.poll_interval);
            let start = !watch.round_under_way && !self.shutdown.is_cancelled();
            watch.round_under_way |= start;
            (poll_at, start)
        };
        if start {
            let this = Arc::clone(self);
            let name = name.clone();
            let entry = entry.clone();
            let guard = RoundUnderWay { inner: Arc::clone(self), name: name.clone() };
            self.tracker.spawn(async move {
                let _guard = guard;
                if let Err(error) = this.round(&name, &entry, now, poll_at <= now).await {
                    tracing::error!(backend = %name, error = %Chain(&error), "a round failed");
                }
            });
        }
        // A poll that is under way is not waited for without a pause.
        if poll_at > now { poll_at } else { policy::after(now, ROUND_PAUSE) }
    }

    async fn round(
        self: &Arc<Self>,
        name: &BackendName,
        entry: &BackendEntry,
        now: Timestamp,
        poll: bool,
    ) -> Result<(), StoreError> {
        self.cancel_round(name, entry, now).await?;
        self.find_round(name, entry, now).await?;
        if poll {
            self.poll_round(name, entry, now).await?;
        }
        Ok(())
    }

    /// Asks the backend to end what is to end, all in one call; again until it has ended (crash
    /// point J).
    async fn cancel_round(
        &self,
        name: &BackendName,
        entry: &BackendEntry,
        now: Timestamp,
    ) -> Result<(), StoreError> {
        let before = now.checked_sub(policy::CANCEL_AGAIN).unwrap_or(Timestamp::MIN);
        let wanted = self.store.to_cancel(name, before).await?;
        if wanted.is_empty() {
            return Ok(());
        }
        let refs: Vec<JobRef> = wanted.iter().map(|(_, job_ref)| job_ref.clone()).collect();
        let answer = self.call(name, "cancel", entry.backend.cancel(&refs)).await;
        self.crash_point("J");
        match answer {
            Ok(()) => {
                self.moved(name, now);
                let ids = wanted.into_iter().map(|(id, _)| id).collect();
                self.store.cancel_sent(ids, self.clock.now()).await
            }
            Err(error) => {
                tracing::warn!(
                    backend = %name, error = %Chain(&error),
                    "jobs could not be cancelled, and are again"
                );
                Ok(())
            }
        }
    }

    /// Looks for submissions whose answer was lost, all in one call (crash points C and D).
    async fn find_round(
        self: &Arc<Self>,
        name: &BackendName,
        entry: &BackendEntry,
        now: Timestamp,
    ) -> Result<(), StoreError> {
        let doubtful = self.store.doubtful(name, now).await?;
        let doubtful: Vec<_> = {
            let desk = self.desktop();
            doubtful.into_iter().filter(|(id, _)| !desk.under_way.contains_key(id)).collect()
        };
        let capabilities = entry.backend.capabilities();
        for chunk in doubtful.chunks(capabilities.poll_batch.get()) {
            let tokens: Vec<_> = chunk.iter().map(|(_, token)| token.clone()).collect();
            // Before the question: what was absent then may have come while it was answered.
            let asked = self.clock.now();
            let answer = match capabilities.lookup {
                bridge_backend::Lookup::ByToken { .. } => {
                    self.call(name, "find", entry.backend.find(&tokens)).await
                }
                // Nothing to ask; the step knows what that means.
                bridge_backend::Lookup::Resubmit | bridge_backend::Lookup::Never => {
                    Ok(BTreeMap::new())
                }
            };
            for (id, token) in chunk {
                let news = match &answer {
                    Ok(found) => {
                        found.get(token).cloned().map_or(News::Absent { asked }, News::Found)
                    }
                    Err(error) => News::Unasked(Chain(error).to_string(), error.remedy().is_some()),
                };
                self.tell(*id, news, now);
            }
        }
        Ok(())
    }

    /// Asks how all jobs of the backend stand.
    async fn poll_round(
        self: &Arc<Self>,
        name: &BackendName,
        entry: &BackendEntry,
        now: Timestamp,
    ) -> Result<(), StoreError> {
        let jobs = self.store.polled(name).await?;
        let started = Instant::now();
        let mut failed = None;
        let most = entry.backend.capabilities().poll_batch.get();
        let layers = without_namesakes(&jobs);
        for chunk in layers.iter().flat_map(|layer| layer.chunks(most)) {
            let refs: Vec<JobRef> = chunk.iter().map(|job| job.job_ref.clone()).collect();
            match self.call(name, "poll", entry.backend.poll(&refs)).await {
                Ok(mut seen) => {
                    let now = self.clock.now();
                    self.desktop()
                        .backends
                        .entry(name.clone())
                        .or_default()
                        .answers_since
                        .get_or_insert(now);
                    self.compare(name, chunk, &mut seen);
                }
                Err(error) => {
                    failed = Some(Chain(&error).to_string());
                    break;
                }
            }
        }
        let mut desk = self.desktop();
        let watch = desk.backends.entry(name.clone()).or_default();
        watch.polled_at = Some(now);
        watch.took.rotate_right(1);
        watch.took[0] = if jobs.is_empty() { Duration::ZERO } else { started.elapsed() };
        watch.failures = if failed.is_some() { watch.failures.saturating_add(1) } else { 0 };
        if failed.is_some() {
            watch.answers_since = None;
        }
        if failed.is_some() && failed != watch.trouble {
            tracing::warn!(
                backend = %name, error = failed.as_deref().unwrap_or_default(),
                "the backend does not say how its jobs stand; they go on"
            );
        } else if failed.is_none() && watch.trouble.is_some() {
            tracing::info!(backend = %name, "the backend answers again");
        }
        watch.trouble = failed;
        Ok(())
    }

    /// Tells the steps of those jobs for which a poll changed something.
    fn compare(
        self: &Arc<Self>,
        name: &BackendName,
        jobs: &[&Polled],
        seen: &mut BTreeMap<bridge_backend::ExternalId, Observation>,
    ) {
        let now = self.clock.now();
        let mut moved = false;
        for job in jobs {
            let news = match seen.remove(&job.job_ref.id) {
                None => {
                    // The first absence is written down; after that only its age matters.
                    let lost_after = self.settings().lost_after;
                    let absent_since = job.missing_since.map(|at| self.silent_since(name, at));
                    match absent_since {
                        Some(at) if policy::since(now, at) < lost_after => None,
                        Some(_) | None => Some(News::Missing),
                    }
                }
                Some(observation) => {
                    let changed = match &observation {
                        Observation::Pending { reason, .. } => match job.state {
                            JobState::Submitted => *reason != job.waits_for,
                            JobState::Running => {
                                job.waits_for.as_deref() != Some(requeued(reason.as_deref()))
                            }
                            JobState::Received
                            | JobState::Submitting
                            | JobState::Reporting
                            | JobState::Finished
                            | JobState::Abandoned => false,
                        },
                        Observation::Running { host } => {
                            job.state == JobState::Submitted
                                || (job.state == JobState::Running
                                    && (*host != job.host || job.waits_for.is_some()))
                        }
                        Observation::Unclear { status } => {
                            job.waits_for.as_deref() != Some(status.as_str())
                        }
                        Observation::Ended { .. } | Observation::Gone => true,
                    };
                    (changed || job.missing_since.is_some()).then_some(News::Seen(observation))
                }
            };
            if let Some(news) = news {
                moved = true;
                self.tell(job.id, news, now);
            }
        }
        if moved {
            self.desktop().backends.entry(name.clone()).or_default().moved_at = Some(now);
        }
    }
}

/// Parts jobs so that no two of a part have the same external id: a poll's answer goes by it, and a
/// site may give a lost job's id to another (a Slurm controller does after a crash).
fn without_namesakes(jobs: &[Polled]) -> Vec<Vec<&Polled>> {
    let mut seen: HashMap<&bridge_backend::ExternalId, usize> = HashMap::new();
    let mut layers: Vec<Vec<&Polled>> = Vec::new();
    for job in jobs {
        let earlier = seen.entry(&job.job_ref.id).or_insert(0);
        if layers.len() <= *earlier {
            layers.push(Vec::new());
        }
        if let Some(layer) = layers.get_mut(*earlier) {
            layer.push(job);
        }
        *earlier += 1;
    }
    layers
}

/// Gives the word for what a job waits for that was started before.
pub(in crate::reconcile) fn requeued(reason: Option<&str>) -> &str {
    reason.unwrap_or("requeued")
}

struct RoundUnderWay {
    inner: Arc<Inner>,
    name: BackendName,
}

impl Drop for RoundUnderWay {
    fn drop(&mut self) {
        let mut desk = self.inner.desktop();
        desk.backends.entry(self.name.clone()).or_default().round_under_way = false;
    }
}
