//! `received` → `submitting` → `submitted`: making a job ready and handing it over, once.

use std::sync::Arc;
use std::time::Duration;

use bridge_backend::{
    BackendError, ErrorKind, Expiry, ExternalId, Filesystem, JobSpec, Limits, Lookup, SubmitToken,
};
use tokio::sync::{OwnedSemaphorePermit, SemaphorePermit};

use crate::domain::job::Event;
use crate::domain::policy;
use crate::domain::verdict::Cause;
use crate::job::Plan;
use crate::reconcile::backends::TRANSFER_LIMIT;
use crate::reconcile::desk::{Desk, Prepared};
use crate::reconcile::report::Heard;
use crate::reconcile::stage::{Sink, Stage, Stopped, Until, WANTED, concluded};
use crate::reconcile::{FOR_OPERATOR, Flow, News, Step, StepError, leftovers};
use crate::store::CancelBy;
use crate::telemetry::Chain;
use crate::trace::{Section, Style};

/// The least time between two looks for a submission whose absence does not count yet.
pub(in crate::reconcile) const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// How long a daemon that stops waits for the answer to a submission that carries files.
const LAST_WORD: Duration = Duration::from_secs(10);

/// The most time between two tries of a job that waits for the operator: he looks whether it helped.
const MENDED: Duration = Duration::from_secs(15);

impl Step<'_> {
    /// Makes a received job ready and hands it over.
    pub(in crate::reconcile) async fn received(
        &mut self,
        permit: &mut Option<SemaphorePermit<'_>>,
    ) -> Result<Flow, StepError> {
        let prepared = match self.prepared().await {
            Ok(prepared) => prepared,
            Err(StepError::Payload(error)) => {
                // Nobody can run what nobody can read, and it will not read better tomorrow.
                let detail = format!("the job cannot be read: {error}");
                return self.conclude(Cause::Unrunnable { detail }).await;
            }
            Err(error) => return Err(error),
        };
        // Noted before anything is written there: its secrets are to be found again.
        self.job.workspace = prepared.plan.as_ref().ok().map(|plan| plan.project_dir.clone());
        if self.silence() >= policy::touch_interval(self.r.desktop().owed) {
            // The second act after the 201. Whatever goes wrong with it, the job goes on.
            match self.touch(&prepared).await {
                // Noted with the next write; should we die before that, it is said once more.
                Ok(Heard::Fine) => {}
                Ok(Heard::Disowned(status)) => return self.disown(&status).await,
                Err(error) => tracing::warn!(
                    job = %self.job.id, error = %Chain(&error),
                    "GitLab did not hear that the job was taken"
                ),
            }
        }
        self.r.store.save(&self.job).await?;
        if self.job.cancel_requested_at.is_some() {
            return self.conclude(Cause::CancelledEarly).await;
        }
        let plan = match &prepared.plan {
            Ok(plan) => plan,
            Err(unrunnable) => {
                let detail = unrunnable.to_string();
                return self.conclude(Cause::Unrunnable { detail }).await;
            }
        };
        if let Err(left_secs) = self.limits(plan) {
            return self.conclude(Cause::NoTimeLeft { left_secs }).await;
        }
        // A slow clone must not keep the other jobs' news waiting.
        *permit = None;
        let worker = match self.wait_for_worker(&prepared).await? {
            Ok(worker) => worker,
            Err(stopped) => return self.stopped(stopped).await,
        };
        leftovers::note(&self.r.settings().spool_dir, self.job.id, &plan.project_dir)
            .await
            .map_err(StepError::Note)?;
        let mut desk = self.open_desk(&prepared)?;
        if self.job.trace_len == 0 {
            self.write_head(&mut desk, plan);
        } else {
            self.close_sections(&mut desk)?;
            let now = self.line_time();
            let text = "The runner was restarted while it made the job ready; it does so again.";
            desk.composer.remark(now, Style::Info, text, &mut desk.out);
        }
        let (desk, ready) = self.make_ready(&prepared, plan, desk).await?;
        if let Err(stopped) = ready {
            self.keep(desk).await?;
            return self.stopped(stopped).await;
        }
        let spec = match self.limits(plan) {
            Ok(limits) => plan.spec(limits),
            Err(left_secs) => {
                self.keep(desk).await?;
                return self.conclude(Cause::NoTimeLeft { left_secs }).await;
            }
        };
        let now = self.now();
        self.keep(desk).await?;
        self.job.submit_token = Some(self.job.id.submit_token());
        self.job.attempted_at = Some(now);
        self.job.doubted_at = None;
        self.job.failures = 0;
        self.job.waits_for = None;
        // Should we die now, the next sweep looks for it at once.
        self.job.due_at = now;
        self.r.crash_point("B");
        self.r.store.transition(&mut self.job, Event::Attempted, now, None).await?;
        self.r.crash_point("C");
        // Ready, it only waits: how many may be submitted at once the backend says.
        drop(worker);
        self.submit(&spec, &prepared).await
    }

    /// Gives what is left of the job's time; `Err` when it is too little, in seconds.
    fn limits(&self, plan: &Plan) -> Result<Limits, u64> {
        let now = self.now();
        let wall_time = policy::wall_time(
            now,
            self.job.deadline_at,
            plan.timeout,
            self.runner.deadline_reserve,
            self.runner.minimum_run_time,
        )?;
        let within = policy::until(now, self.job.deadline_at);
        let expiry = Expiry { within, reserve: within.saturating_sub(wall_time) };
        Ok(Limits { wall_time: Some(wall_time), expiry: Some(expiry) })
    }

    async fn stopped(&mut self, stopped: Stopped) -> Result<Flow, StepError> {
        match stopped {
            Stopped::Concluded(cause) => self.conclude(cause).await,
            Stopped::Disowned(status) => self.disown(&status).await,
            Stopped::Shutdown => Ok(Flow::Rest),
        }
    }

    /// Waits for a worker that makes jobs ready, with GitLab kept informed meanwhile.
    async fn wait_for_worker(
        &mut self,
        prepared: &Prepared,
    ) -> Result<Result<OwnedSemaphorePermit, Stopped>, StepError> {
        let workers = Arc::clone(&self.r.preparing);
        self.wait_in_line(workers, prepared, Until::Cancelled).await
    }

    fn write_head(&self, desk: &mut Desk, plan: &Plan) {
        let now = self.line_time();
        let context = &self.runner.context;
        let head = format!(
            "Running with bridge {}\n  on {} {}, system ID: {}",
            context.version, context.name, context.short_token, context.system_id
        );
        desk.composer.remark(now, Style::Info, &head, &mut desk.out);
        desk.composer.section_start(
            now,
            Section::new("prepare_script"),
            "Preparing environment",
            &mut desk.out,
        );
        let host = &self.runner.hostname;
        let text = format!("Preparing on {host} for the backend {}...", self.job.backend);
        desk.composer.remark(now, Style::Plain, &text, &mut desk.out);
        for warning in &plan.warnings {
            desk.composer.remark(now, Style::Warning, warning, &mut desk.out);
        }
        desk.composer.section_end(now, "prepare_script", &mut desk.out);
    }

    /// Makes the workspace ready: sources first, then what goes into them.
    async fn make_ready(
        &mut self,
        prepared: &Arc<Prepared>,
        plan: &Plan,
        desk: Desk,
    ) -> Result<(Desk, Result<(), Stopped>), StepError> {
        // Where the job fetches them itself, its own log has the section.
        let section = (Section::new("get_sources"), "Getting source from Git repository");
        let sources =
            Stage { section: (!plan.fetches_itself()).then_some(section), until: Until::Cancelled };
        let sink = Sink::default();
        let mut out = sink.clone();
        let work = Box::pin(async move { plan.get_sources(&mut out).await });
        let (mut desk, done) = self.stage(prepared, desk, sources, &sink, work).await?;
        let mut ready = concluded(done);
        if ready.is_ok() && plan.restores_caches() {
            let restore = Stage {
                section: Some((Section::new("restore_cache"), "Restoring cache")),
                until: Until::Cancelled,
            };
            let caches = Arc::clone(&self.runner.caches);
            let sink = Sink::default();
            let mut out = sink.clone();
            let work = Box::pin(async move { plan.restore_cache(&caches, &mut out).await });
            let done;
            (desk, done) = self.stage(prepared, desk, restore, &sink, work).await?;
            ready = concluded(done);
        }
        if ready.is_ok() && plan.has_dependencies() {
            let download = Stage {
                section: Some((Section::new("download_artifacts"), "Downloading artifacts")),
                until: Until::Cancelled,
            };
            let client = self.runner.client.clone();
            let incoming = self.r.packed_dir(self.job.id).join("incoming");
            let sink = Sink::default();
            let mut out = sink.clone();
            let work =
                Box::pin(
                    async move { plan.download_artifacts(&client, &incoming, &mut out).await },
                );
            let done;
            (desk, done) = self.stage(prepared, desk, download, &sink, work).await?;
            ready = concluded(done);
        }
        Ok((desk, ready))
    }

    /// Calls the backend's `submit`; what follows depends on what its answer means.
    async fn submit(&mut self, spec: &JobSpec, prepared: &Prepared) -> Result<Flow, StepError> {
        let Some(token) = self.job.submit_token.clone() else { return Ok(Flow::Again) };
        let backend = Arc::clone(&self.backend);
        let lane = self.r.lane(&self.job.backend, backend.capabilities().max_concurrency.get());
        let answer = {
            let _turn = match self.wait_in_line(lane, prepared, Until::Cancelled).await? {
                Ok(turn) => turn,
                // The next process cannot know that it was not called, and looks for it.
                Err(Stopped::Shutdown) => return Ok(Flow::Rest),
                Err(stopped) => {
                    self.job.attempted_at = None;
                    return self.stopped(stopped).await;
                }
            };
            self.hand_over(prepared, &token, spec).await?
        };
        self.r.crash_point("D");
        let error = match answer {
            Ok(id) => return self.accepted(id).await,
            Err(error) => error,
        };
        let now = self.now();
        let why = Chain(&error).to_string();
        tracing::warn!(job = %self.job.id, error = %why, "a submission failed");
        let wait = match error.kind() {
            ErrorKind::Rejected(fault) => {
                if fault == bridge_backend::Fault::Site {
                    tracing::error!(
                        job = %self.job.id, backend = %self.job.backend, error = %why,
                        "the backend refuses jobs; its operator must act"
                    );
                }
                self.job.attempted_at = None;
                return self.conclude(Cause::Rejected { fault, detail: why }).await;
            }
            ErrorKind::Transient => {
                // Nothing changed over there: there is no attempt whose fate is unknown.
                self.job.attempted_at = None;
                error.retry_after()
            }
            ErrorKind::Ambiguous | ErrorKind::Lost => match backend.capabilities().lookup {
                Lookup::Never => {
                    return self.conclude(Cause::Ambiguous { token: token.to_string() }).await;
                }
                Lookup::ByToken { .. } | Lookup::Resubmit => {
                    // It may have taken effect as late as now.
                    self.job.attempted_at = Some(now);
                    self.job.doubted_at = None;
                    None
                }
            },
        };
        self.job.failures = self.job.failures.saturating_add(1);
        if error.remedy().is_some() {
            return self.wait_for_operator(why).await;
        }
        self.job.waits_for = Some(why.clone());
        // Longer than five minutes would silence the job for longer than GitLab bears.
        let wait = wait.map(|wait| wait.min(Duration::from_secs(300)));
        self.job.due_at =
            policy::after(now, wait.unwrap_or_else(|| policy::back_off(self.job.failures)));
        self.r.store.note(&self.job, "submission_failed", now, Some(why)).await?;
        self.keep_in_touch().await
    }

    /// Calls `submit`. What travels with a job can be on its way for long, so meanwhile GitLab is kept
    /// informed, and nobody waits for it who need not.
    async fn hand_over(
        &mut self,
        prepared: &Prepared,
        token: &SubmitToken,
        spec: &JobSpec,
    ) -> Result<bridge_backend::Result<ExternalId>, StepError> {
        let (reconciler, backend) = (Arc::clone(self.r), Arc::clone(&self.backend));
        let name = self.job.backend.clone();
        let limit = match backend.capabilities().filesystem {
            Filesystem::Shared => {
                return Ok(self.call("submit", backend.submit(token, spec)).await);
            }
            Filesystem::Sandbox => TRANSFER_LIMIT,
        };
        let call = reconciler.call_for(limit, &name, "submit", backend.submit(token, spec));
        let mut call = std::pin::pin!(call);
        loop {
            // `call` is polled again where it stopped; dropping it says `Ambiguous`.
            tokio::select! {
                answer = &mut call => return Ok(answer),
                () = reconciler.shutdown.cancelled() => {
                    let answer = tokio::time::timeout(LAST_WORD, &mut call).await;
                    return Ok(answer.unwrap_or_else(|_elapsed| {
                        Err(BackendError::new(ErrorKind::Ambiguous, "wait for the submission"))
                    }));
                }
                () = tokio::time::sleep(WANTED) => {}
            }
            if let Some(stopped) = self.still_wanted(prepared, Until::Cancelled).await? {
                let why = match stopped {
                    Stopped::Concluded(_) => "hand the job over: it is no longer wanted",
                    Stopped::Disowned(_) => "hand the job over: GitLab has forgotten it",
                    Stopped::Shutdown => "hand the job over: the runner stops",
                };
                // Whether it is over there already the next round finds out, and ends it.
                return Ok(Err(BackendError::new(ErrorKind::Ambiguous, why)));
            }
        }
    }

    /// Has the job wait until the operator has acted; its author is told, once.
    async fn wait_for_operator(&mut self, why: String) -> Result<Flow, StepError> {
        let now = self.now();
        self.job.due_at = policy::after(now, policy::back_off(self.job.failures).min(MENDED));
        self.r.shut(&self.job.backend, Some(now));
        if self.job.waits_for.as_deref() != Some(FOR_OPERATOR) {
            let text = format!(
                "The runner cannot use the backend {} now, and its operator must act. \
                 The job waits for that; nothing of it is lost.",
                self.job.backend
            );
            self.remark(Style::Warning, &text).await?;
            self.job.waits_for = Some(FOR_OPERATOR.to_owned());
            self.r.store.note(&self.job, "waits_for_operator", now, Some(why)).await?;
        }
        self.keep_in_touch().await
    }

    /// Notes that the backend has the job, by the answer to `submit` or by `find`.
    async fn accepted(&mut self, id: ExternalId) -> Result<Flow, StepError> {
        let now = self.now();
        let again = match self.job.waits_for.as_deref() {
            Some(FOR_OPERATOR) => "The runner can use the backend again; the job goes on.\n",
            Some(_) | None => "",
        };
        self.r.shut(&self.job.backend, None);
        let text = format!("{again}Submitted to {} as job {id}.", self.job.backend);
        if let Err(error) = self.remark(Style::Plain, &text).await {
            // The id is worth more than a line about it.
            tracing::warn!(job = %self.job.id, error = %Chain(&error), "the trace misses a line");
        }
        self.job.external_id = Some(id.clone());
        self.job.submitted_at = Some(now);
        self.job.failures = 0;
        self.job.waits_for = None;
        self.job.due_at = self.next_look(now);
        let detail = Some(id.to_string());
        self.r.store.transition(&mut self.job, Event::Accepted, now, detail).await?;
        self.r.crash_point("D2");
        self.r.moved(&self.job.backend, now);
        Ok(Flow::Rest)
    }

    /// Finds out what became of a submission whose answer was lost.
    pub(in crate::reconcile) async fn submitting(
        &mut self,
        permit: &mut Option<SemaphorePermit<'_>>,
    ) -> Result<Flow, StepError> {
        let now = self.now();
        let timed_out = now >= self.job.deadline_at;
        let asked = match self.news.take() {
            Some(News::Found(id)) => return self.accepted(id).await,
            Some(News::Absent { asked }) => asked,
            Some(News::Unasked(why, for_operator)) => {
                if self.job.cancel_requested_at.is_some() && self.job.attempted_at.is_none() {
                    // No submission is in doubt, so nobody needs to be asked.
                    return self.conclude(Cause::CancelledEarly).await;
                }
                if timed_out {
                    return self.deadline(false).await;
                }
                self.job.failures = self.job.failures.saturating_add(1);
                if for_operator {
                    return self.wait_for_operator(why).await;
                }
                self.job.due_at = policy::after(now, policy::back_off(self.job.failures));
                let first = self.job.waits_for.as_deref() != Some(why.as_str());
                self.job.waits_for = Some(why.clone());
                if first {
                    self.r.store.note(&self.job, "unanswered", now, Some(why)).await?;
                }
                return self.keep_in_touch().await;
            }
            Some(News::Seen(_) | News::Missing) | None => return Ok(Flow::Rest),
        };
        if let Some(settles) = self.settles_at()
            && asked < settles
        {
            // Not a moment later: a daemon that is killed every second must come to it, too.
            self.job.due_at = settles.max(policy::after(now, LOOK_AGAIN));
            return self.keep_in_touch().await;
        }
        if self.job.attempted_at.is_some() {
            match self.backend.capabilities().lookup {
                // It is not there, and never was.
                Lookup::ByToken { .. } => self.job.attempted_at = None,
                Lookup::Resubmit => {}
                Lookup::Never => {
                    let token =
                        self.job.submit_token.as_ref().map(ToString::to_string).unwrap_or_default();
                    return self.conclude(Cause::Ambiguous { token }).await;
                }
            }
        }
        if self.job.cancel_requested_at.is_some() {
            return self.conclude(Cause::CancelledEarly).await;
        }
        if timed_out {
            return self.deadline(false).await;
        }
        let prepared = self.prepared().await?;
        let plan = match &prepared.plan {
            Ok(plan) => plan,
            Err(unrunnable) => {
                let detail = unrunnable.to_string();
                return self.conclude(Cause::Unrunnable { detail }).await;
            }
        };
        let limits = match self.limits(plan) {
            Ok(limits) => limits,
            Err(left_secs) => return self.conclude(Cause::NoTimeLeft { left_secs }).await,
        };
        // The same token again: should the first submission appear after all, it is the same job.
        self.job.attempted_at = Some(now);
        self.job.doubted_at = None;
        self.job.due_at = now;
        self.r.store.note(&self.job, "attempted_again", now, None).await?;
        // A backend that is slow to take jobs must not keep the other jobs' news waiting.
        *permit = None;
        self.submit(&plan.spec(limits), &prepared).await
    }

    /// Tells from when on a doubtful submission's absence counts; `None` if it always does.
    ///
    /// An earlier process may have submitted it up to its end, whenever it noted that it would. It had
    /// ended when the first process after it started, which that one notes: for the later ones the time
    /// goes on, or a daemon that is killed again and again would never submit it. The row is written by
    /// whoever called.
    pub(in crate::reconcile) fn settles_at(&mut self) -> Option<jiff::Timestamp> {
        let Lookup::ByToken { settle } = self.backend.capabilities().lookup else { return None };
        let attempted = self.job.attempted_at?;
        if attempted < self.r.since && self.job.doubted_at.is_none() {
            self.job.doubted_at = Some(self.r.since);
        }
        Some(policy::after(self.job.doubted_at.map_or(attempted, |at| at.max(attempted)), settle))
    }

    /// Tells whether the other side may have the job, and at work.
    pub(in crate::reconcile) fn may_be_there(&self) -> bool {
        let given = self.job.external_id.is_some() || self.job.attempted_at.is_some();
        given && self.job.ended_at.is_none()
    }

    pub(in crate::reconcile) async fn deadline(
        &mut self,
        started: bool,
    ) -> Result<Flow, StepError> {
        let timeout = policy::since(self.job.deadline_at, self.job.received_at);
        self.conclude(Cause::Deadline { timeout_secs: timeout.as_secs(), started }).await
    }

    /// Asks for the job's end over there; the next round sends it.
    pub(in crate::reconcile) fn request_end(&mut self, by: CancelBy) {
        if self.job.cancel_requested_at.is_none() {
            self.job.cancel_requested_at = Some(self.now());
            self.job.cancel_requested_by = Some(by);
        }
    }
}
