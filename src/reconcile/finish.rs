//! What a job leaves behind, brought home after its verdict: caches and artifacts.
//!
//! The verdict is in the row first, so that a restart goes on here instead of running anything again.
//! Each part is noted when it is done: an artifact is packed once, and uploaded from the packed file,
//! which stays until GitLab has it (crash point H). Only then the trace gets its last line, for a job
//! whose artifacts GitLab does not take has failed.

use std::sync::Arc;
use std::time::Duration;

use bridge_backend::{BackendError, ErrorKind, Fault, Outcome};
use camino::Utf8PathBuf;
use tokio::sync::SemaphorePermit;

use crate::domain::id::JobId;
use crate::domain::policy;
use crate::domain::verdict::{Cause, Verdict};
use crate::gitlab::JobAuth;
use crate::job::{AfterUpload, Ended, PackedArtifact, Plan, Ran, StageError, after_upload};
use crate::reconcile::backends::TRANSFER_LIMIT;
use crate::reconcile::desk::{Desk, Prepared};
use crate::reconcile::stage::{Sink, Stage, Stopped, Until, cause, style_of};
use crate::reconcile::{Flow, Inner, Step, StepError};
use crate::store::Upload;
use crate::telemetry::Chain;
use crate::trace::{Section, Style};

/// How long after the job's time is up uploads that GitLab does not answer are still tried.
///
/// The job token dies five minutes after it, and with it every hope.
const UPLOADS_END: Duration = Duration::from_secs(5 * 60);

/// The longest pause between two attempts to bring home what a job wrote.
const LONGEST_PAUSE: Duration = Duration::from_secs(300);

impl Inner {
    /// Gives the directory in which a job's packed artifacts wait for GitLab.
    pub(in crate::reconcile) fn packed_dir(&self, id: JobId) -> Utf8PathBuf {
        self.settings().artifacts_dir.join(id.to_string())
    }
}

/// Tells whether a job that ended so can have left anything: its script was begun, or was to be and its
/// stages before it failed, and time is left. `at_hand` says that it lies here and need not be sent for.
pub(in crate::reconcile) fn may_leave_something(
    cause: &Cause,
    started: bool,
    at_hand: bool,
) -> bool {
    match cause {
        Cause::Ended(outcome) => match outcome {
            Outcome::Exited { .. }
            | Outcome::TimedOut
            | Outcome::ScriptTimedOut
            | Outcome::SourcesFailed { .. }
            | Outcome::OutOfMemory
            | Outcome::NodeFailed => true,
            Outcome::Cancelled { .. } | Outcome::Preempted | Outcome::SystemFailed { .. } => {
                started
            }
            Outcome::Expired => false,
        },
        // The time limit keeps a reserve of the job's time for exactly this.
        Cause::TimeLimit { .. } | Cause::StageFailed { .. } | Cause::StageBroken { .. } => true,
        // The job token lives a little longer. Who was killed elsewhere sends nothing any more.
        Cause::Deadline { started, .. } => *started && at_hand,
        Cause::NoTimeLeft { .. }
        | Cause::Lost { .. }
        | Cause::Gone
        | Cause::Rejected { .. }
        | Cause::Ambiguous { .. }
        | Cause::Unrunnable { .. }
        | Cause::StageTimedOut { .. }
        | Cause::CancelledEarly => false,
    }
}

/// Tells whether a job with this verdict asks for anything to be kept.
pub(in crate::reconcile) fn leaves_something(plan: &Plan, verdict: &Verdict) -> bool {
    plan.archives_caches(ended(verdict)) || !plan.artifacts_due(verdict.is_success()).is_empty()
}

fn ended(verdict: &Verdict) -> Ended {
    if verdict.is_success() { Ended::Succeeded } else { Ended::Failed }
}

/// Why what a job wrote is not at home.
#[derive(Debug, thiserror::Error)]
enum Uncollected {
    #[error("make room for it")]
    Here(#[source] StageError),
    #[error("bring it home")]
    There(#[source] BackendError),
}

impl Uncollected {
    /// Tells whether it will never come.
    fn is_final(&self) -> bool {
        match self {
            Self::Here(_) => false,
            Self::There(error) => match error.kind() {
                ErrorKind::Lost | ErrorKind::Rejected(Fault::Job) => true,
                ErrorKind::Rejected(Fault::Site) | ErrorKind::Transient | ErrorKind::Ambiguous => {
                    false
                }
            },
        }
    }

    fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Here(_) => None,
            Self::There(error) => error.retry_after(),
        }
    }
}

/// What became of bringing outputs home.
enum Collected {
    /// They are here, or there are none.
    Home,
    /// They will never be.
    Lost,
    /// That is to be tried again, or the job does not go on.
    Later(Flow),
}

/// How the problem of artifacts begins whose files never came home.
const OUTPUTS_LOST: &str = "what the job wrote is lost";

/// Packing and uploading share one section, however many artifacts and attempts there are.
const UPLOADING: Stage<'static> = Stage { section: None, until: Until::Done };

/// How an attempt at an artifact went on.
enum Turn {
    /// The next one.
    Next,
    /// The same one, later.
    Later(Duration),
}

impl Step<'_> {
    /// Brings home what the job left behind and completes its trace.
    ///
    /// Gives a flow if it has to go on later.
    pub(in crate::reconcile) async fn bring_home(
        &mut self,
        permit: &mut Option<SemaphorePermit<'_>>,
    ) -> Result<Option<Flow>, StepError> {
        let Some(verdict) = self.job.verdict.clone() else { return Ok(Some(Flow::Rest)) };
        let prepared = match self.prepared().await {
            Ok(prepared) => prepared,
            // What nobody can read has left nothing, and its trace stays as it is.
            Err(StepError::Payload(_) | StepError::NoPayload) => {
                return self.brought(Vec::new()).await.map(|()| None);
            }
            Err(error) => return Err(error),
        };
        let uploads;
        let well = self.went_well();
        match &prepared.plan {
            // It was planned when it ran: the configuration was changed meanwhile.
            Err(unrunnable) => {
                return self.brought(vec![unrunnable.to_string()]).await.map(|()| None);
            }
            Ok(plan) => {
                // A large upload must not keep the other jobs' news waiting.
                *permit = None;
                let line = Arc::clone(&self.r.finishing);
                let _worker = match self.wait_in_line(line, &prepared, Until::Done).await? {
                    Ok(worker) => worker,
                    Err(stopped) => return self.kept_from(stopped).await.map(Some),
                };
                // Between attempts that fail at once nobody else would say that the job is still ours.
                if let Some(stopped) = self.still_wanted(&prepared, Until::Done).await? {
                    return self.kept_from(stopped).await.map(Some);
                }
                let name = Plan::upload_stage(well);
                let mut desk = self.take_desk(&prepared)?;
                // An earlier life may have ended in the middle of one of these stages.
                let mut uploading = false;
                for open in self.open_sections(&desk)? {
                    if open == name {
                        uploading = true;
                    } else {
                        desk.composer.section_end(self.line_time(), &open, &mut desk.out);
                    }
                }
                self.desk = Some(desk);
                if self.job.cached_at.is_none()
                    && let Some(flow) = self.keep_cache(&prepared, plan, &verdict).await?
                {
                    return Ok(Some(flow));
                }
                let due = plan.artifacts_due(well);
                if !due.is_empty() {
                    if !uploading {
                        let title = if well {
                            "Uploading artifacts for successful job"
                        } else {
                            "Uploading artifacts for failed job"
                        };
                        let mut desk = self.take_desk(&prepared)?;
                        let section = Section::new(name);
                        desk.composer.section_start(
                            self.line_time(),
                            section,
                            title,
                            &mut desk.out,
                        );
                        self.desk = Some(desk);
                    }
                    if let Some(flow) = self.upload_all(&prepared, plan, due, well).await? {
                        return Ok(Some(flow));
                    }
                    let mut desk = self.take_desk(&prepared)?;
                    desk.composer.section_end(self.line_time(), name, &mut desk.out);
                    self.desk = Some(desk);
                }
                uploads = self.r.store.uploads(self.job.id).await?;
            }
        }
        let problems = uploads.into_iter().filter_map(|upload| upload.problem).collect();
        self.brought(problems).await?;
        Ok(None)
    }

    /// Tells whether the script succeeded, whatever became of the job since: what is kept goes by that.
    fn went_well(&self) -> bool {
        let ended = self.job.outcome.as_ref().and_then(|ended| ended.outcome.as_ref());
        ended == Some(&Outcome::Exited { code: 0 })
    }

    async fn kept_from(&mut self, stopped: Stopped) -> Result<Flow, StepError> {
        match stopped {
            Stopped::Disowned(status) => self.disown(&status).await,
            Stopped::Shutdown | Stopped::Concluded(_) => Ok(Flow::Rest),
        }
    }

    /// Fetches what a sandbox backend has of the job, and keeps its caches.
    async fn keep_cache(
        &mut self,
        prepared: &Arc<Prepared>,
        plan: &Plan,
        verdict: &Verdict,
    ) -> Result<Option<Flow>, StepError> {
        let lost = match self.collect(prepared, plan).await? {
            Collected::Home => false,
            Collected::Lost => true,
            Collected::Later(flow) => return Ok(Some(flow)),
        };
        let ended = if self.went_well() { Ended::Succeeded } else { Ended::Failed };
        if plan.archives_caches(ended) && !lost {
            let title = match ended {
                Ended::Succeeded => "Saving cache for successful job",
                Ended::Failed => "Saving cache for failed job",
            };
            let section = Section::new(Plan::archive_stage(ended));
            let stage = Stage { section: Some((section, title)), until: Until::Done };
            let desk = self.take_desk(prepared)?;
            let caches = Arc::clone(&self.runner.caches);
            let sink = Sink::default();
            let mut out = sink.clone();
            let work = Box::pin(async move { plan.archive_cache(&caches, ended, &mut out).await });
            let (desk, done) = self.stage(prepared, desk, stage, &sink, work).await?;
            match self.after_stage(desk, done).await? {
                Ok(Ok(())) => {}
                // Nobody knows what was meant; what the script itself came to outranks it.
                Ok(Err(error)) if verdict.is_success() => {
                    self.job.verdict = Some(Verdict::of(&cause(error), None));
                }
                Ok(Err(_error)) => {}
                Err(flow) => return Ok(Some(flow)),
            }
        }
        self.job.cached_at = Some(self.now());
        self.r.store.save(&self.job).await?;
        Ok(None)
    }

    /// Has a backend without a common file system bring home what the job wrote, as far as it was asked.
    ///
    async fn collect(
        &mut self,
        prepared: &Arc<Prepared>,
        plan: &Plan,
    ) -> Result<Collected, StepError> {
        if !self.backend.capabilities().collect || plan.outputs().is_empty() {
            return Ok(Collected::Home);
        }
        let Some(job_ref) = self.job.job_ref() else { return Ok(Collected::Home) };
        let (backend, name) = (Arc::clone(&self.backend), self.job.backend.clone());
        let reconciler = Arc::clone(self.r);
        let mut desk = self.take_desk(prepared)?;
        if self.job.failures == 0 {
            let text = "Bringing home what the job wrote...";
            desk.composer.remark(self.line_time(), Style::Plain, text, &mut desk.out);
        }
        let work = Box::pin(async move {
            plan.clear_outputs().await.map_err(Uncollected::Here)?;
            let call = backend.collect(&job_ref, &plan.project_dir);
            let call = reconciler.call_for(TRANSFER_LIMIT, &name, "collect", call);
            call.await.map_err(Uncollected::There)?;
            plan.take_in_outputs().await.map_err(Uncollected::Here)
        });
        let stage = Stage { section: None, until: Until::Done };
        let (desk, done) = self.stage(prepared, desk, stage, &Sink::default(), work).await?;
        let error = match self.after_stage(desk, done).await? {
            Ok(Ok(())) => {
                self.job.failures = 0;
                return Ok(Collected::Home);
            }
            Ok(Err(error)) => error,
            Err(flow) => return Ok(Collected::Later(flow)),
        };
        let now = self.now();
        let why = Chain(&error).to_string();
        let over = now >= policy::after(self.job.deadline_at, UPLOADS_END);
        if error.is_final() || over {
            self.job.failures = 0;
            self.lose_outputs(plan, why).await?;
            return Ok(Collected::Lost);
        }
        tracing::warn!(job = %self.job.id, error = %why, "what the job wrote is not at home yet");
        if self.job.failures == 0 {
            let text = format!("What the job wrote is not at home yet, and is tried again: {why}");
            self.remark(Style::Warning, &text).await?;
        }
        self.job.failures = self.job.failures.saturating_add(1);
        let wait = error.retry_after().unwrap_or_else(|| policy::back_off(self.job.failures));
        self.job.due_at = policy::after(now, wait.min(LONGEST_PAUSE));
        self.r.store.save(&self.job).await?;
        Ok(Collected::Later(Flow::Rest))
    }

    /// Settles what can never come home: a part of it must not be taken for the whole.
    async fn lose_outputs(&mut self, plan: &Plan, why: String) -> Result<(), StepError> {
        if let Err(error) = plan.clear_outputs().await {
            tracing::warn!(job = %self.job.id, error = %Chain(&error), "parts of outputs remain");
        }
        self.remark(Style::Warning, &format!("What the job wrote is lost: {why}")).await?;
        let settled_at = Some(self.now());
        for entry in plan.artifacts_due(self.went_well()) {
            let problem = Some(format!("{OUTPUTS_LOST}: {why}"));
            let upload = Upload { entry, settled_at, problem, ..Upload::default() };
            self.r.store.note_upload(&self.job, upload).await?;
        }
        Ok(())
    }

    /// Makes durable what a stage said; gives the flow if the job does not go on.
    async fn after_stage<T>(
        &mut self,
        desk: Desk,
        done: Result<T, Stopped>,
    ) -> Result<Result<T, Flow>, StepError> {
        let desk = self.keep(desk).await?;
        match done {
            Ok(value) => {
                self.desk = Some(desk);
                Ok(Ok(value))
            }
            Err(stopped) => {
                self.r.store.save(&self.job).await?;
                self.kept_from(stopped).await.map(Err)
            }
        }
    }

    async fn upload_all(
        &mut self,
        prepared: &Arc<Prepared>,
        plan: &Plan,
        due: Vec<usize>,
        well: bool,
    ) -> Result<Option<Flow>, StepError> {
        let mut known = self.r.store.uploads(self.job.id).await?;
        for entry in due {
            let mut upload = match known.iter().position(|upload| upload.entry == entry) {
                Some(at) => known.swap_remove(at),
                None => Upload { entry, ..Upload::default() },
            };
            while upload.settled_at.is_none() {
                let turn = if upload.packed.is_none() {
                    self.pack(prepared, plan, &mut upload, well).await?
                } else {
                    self.upload(prepared, plan, &mut upload).await?
                };
                match turn {
                    Ok(Turn::Next) => {}
                    Ok(Turn::Later(wait)) => {
                        self.job.due_at = policy::after(self.now(), wait);
                        self.r.store.save(&self.job).await?;
                        return Ok(Some(Flow::Rest));
                    }
                    Err(flow) => return Ok(Some(flow)),
                }
            }
        }
        Ok(None)
    }

    fn ran(&self, well: bool) -> Ran {
        let finished = self.job.ended_at.unwrap_or(self.job.state_at);
        Ran { well, started: self.job.started_at.unwrap_or(self.job.received_at), finished }
    }

    /// Packs an artifact into the file that is uploaded, or finds that there is nothing to pack.
    async fn pack(
        &mut self,
        prepared: &Arc<Prepared>,
        plan: &Plan,
        upload: &mut Upload,
        well: bool,
    ) -> Result<Result<Turn, Flow>, StepError> {
        let desk = self.take_desk(prepared)?;
        let into = self.r.packed_dir(self.job.id).join(upload.entry.to_string());
        let (ran, entry) = (self.ran(well), upload.entry);
        let sink = Sink::default();
        let mut out = sink.clone();
        let work = Box::pin(async move { plan.pack_artifact(entry, &into, ran, &mut out).await });
        let (desk, done) = self.stage(prepared, desk, UPLOADING, &sink, work).await?;
        let packed = match self.after_stage(desk, done).await? {
            Ok(packed) => packed,
            Err(flow) => return Ok(Err(flow)),
        };
        let now = self.now();
        match packed {
            Ok(Some(packed)) => {
                upload.packed = Some(serde_json::to_string(&packed).map_err(StepError::Payload)?);
                upload.packed_at = Some(now);
            }
            // Nothing there is no failure.
            Ok(None) => upload.settled_at = Some(now),
            // A full disk, a file server that is away: nothing about the artifact, and not for ever.
            Err(StageError::Broken { .. })
                if now < policy::after(self.job.deadline_at, UPLOADS_END) =>
            {
                upload.silent = upload.silent.saturating_add(1);
                let wait = policy::back_off(upload.silent);
                self.r.store.note_upload(&self.job, upload.clone()).await?;
                return Ok(Ok(Turn::Later(wait)));
            }
            Err(error) => {
                upload.settled_at = Some(now);
                upload.problem = Some(match error {
                    StageError::Failed { .. } => "they could not be packed".to_owned(),
                    other @ (StageError::TimedOut { .. }
                    | StageError::Broken { .. }
                    | StageError::Misconfigured { .. }) => other.to_string(),
                });
            }
        }
        self.r.store.note_upload(&self.job, upload.clone()).await?;
        Ok(Ok(Turn::Next))
    }

    /// Offers a packed artifact to GitLab, once.
    async fn upload(
        &mut self,
        prepared: &Arc<Prepared>,
        plan: &Plan,
        upload: &mut Upload,
    ) -> Result<Result<Turn, Flow>, StepError> {
        let text = upload.packed.clone().unwrap_or_default();
        let packed: PackedArtifact = serde_json::from_str(&text).map_err(StepError::Payload)?;
        let file = self.r.packed_dir(self.job.id).join(upload.entry.to_string());
        if !tokio::fs::metadata(&file).await.is_ok_and(|meta| meta.len() == packed.bytes) {
            tracing::warn!(job = %self.job.id, %file, "a packed artifact is gone; it is packed again");
            upload.packed = None;
            upload.packed_at = None;
            self.r.store.note_upload(&self.job, upload.clone()).await?;
            return Ok(Ok(Turn::Next));
        }
        let client = self.runner.client.clone();
        let auth = JobAuth { id: self.job.ci_job, token: &prepared.payload.token };
        let desk = self.take_desk(prepared)?;
        let sink = Sink::default();
        let offered = packed.upload(&file);
        let work = Box::pin(async move { client.upload_artifact(auth, &offered).await });
        let (mut desk, done) = self.stage(prepared, desk, UPLOADING, &sink, work).await?;
        let outcome = match done {
            Ok(outcome) => outcome,
            Err(stopped) => {
                return self.after_stage::<Turn>(desk, Err(stopped)).await;
            }
        };
        self.r.crash_point("H");
        let (tone, line) = plan.upload_line(&packed, &outcome);
        let now = self.now();
        let mut after = after_upload(upload.tries + 1, upload.silent + 1, &outcome);
        if matches!(after, AfterUpload::Again { counts: false, .. })
            && now >= policy::after(self.job.deadline_at, UPLOADS_END)
        {
            after = AfterUpload::GiveUp { why: "GitLab did not answer in the job's time".into() };
        }
        // One line for a GitLab that is away, not one for every attempt.
        let quiet = matches!(after, AfterUpload::Again { counts: false, .. }) && upload.silent > 0;
        if !quiet {
            desk.composer.remark(self.line_time(), style_of(tone), &line, &mut desk.out);
        }
        let turn = match after {
            AfterUpload::Done => {
                upload.settled_at = Some(now);
                upload.silent = 0;
                Turn::Next
            }
            AfterUpload::Again { after, counts } => {
                if counts {
                    upload.tries += 1;
                    upload.silent = 0;
                } else {
                    upload.silent += 1;
                }
                Turn::Later(after)
            }
            AfterUpload::GiveUp { why } => {
                upload.tries += 1;
                upload.settled_at = Some(now);
                upload.problem = Some(why);
                Turn::Next
            }
        };
        self.desk = Some(self.keep(desk).await?);
        self.r.store.note_upload(&self.job, upload.clone()).await?;
        Ok(Ok(turn))
    }

    /// Writes the trace's last line: nothing of the job is left to bring home.
    async fn brought(&mut self, problems: Vec<String>) -> Result<(), StepError> {
        if let Some(verdict) = &mut self.job.verdict
            && let Some(problem) = problems.first()
            && verdict.is_success()
        {
            *verdict = if problem.starts_with(OUTPUTS_LOST) {
                Verdict::outputs_lost(problem)
            } else {
                Verdict::artifacts_refused(problem)
            };
        }
        match self.prepared().await {
            Ok(prepared) => {
                if let Some(verdict) = &mut self.job.verdict {
                    let known = &prepared.payload.features.failure_reasons;
                    verdict.failure = verdict.failure.map(|reason| reason.for_server(known));
                }
                let mut desk = self.take_desk(&prepared)?;
                if let Some(verdict) = &self.job.verdict {
                    self.write_last_line(verdict, &mut desk);
                }
                self.keep(desk).await?;
            }
            // A payload that cannot be read has no masks, so its trace stays empty.
            Err(StepError::Payload(_) | StepError::NoPayload) => {}
            Err(error) => return Err(error),
        }
        self.job.brought_at = Some(self.now());
        self.forget_secrets().await;
        let detail = serde_json::to_string(&self.job.verdict).ok();
        self.r.store.note(&self.job, "brought_home", self.now(), detail).await?;
        self.forget_packed().await;
        Ok(())
    }

    /// Writes the verdict's words into the trace.
    pub(in crate::reconcile) fn write_last_line(&self, verdict: &Verdict, desk: &mut Desk) {
        let style = if verdict.is_success() { Style::Info } else { Style::Error };
        let line = verdict.last_line();
        let line = line.strip_prefix("ERROR: ").unwrap_or(&line);
        desk.composer.remark(self.line_time(), style, line, &mut desk.out);
    }

    /// Removes the packed artifacts; a failure is tried again at release.
    pub(in crate::reconcile) async fn forget_packed(&self) {
        let dir = self.r.packed_dir(self.job.id);
        let gone = tokio::task::spawn_blocking(move || match std::fs::remove_dir_all(&dir) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
            Ok(()) | Err(_) => Ok(()),
        });
        match gone.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(
                job = %self.job.id, error = %Chain(&error), "packed artifacts remain"
            ),
            Err(error) => tracing::warn!(
                job = %self.job.id, error = %Chain(&error), "packed artifacts remain"
            ),
        }
    }
}
