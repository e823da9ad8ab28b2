//! What GitLab is told, and what it says back.

use std::time::Duration;

use bytes::Bytes;
use serde::Deserialize;
use tokio::sync::SemaphorePermit;

use crate::domain::job::{Event, JobState};
use crate::domain::policy;
use crate::gitlab::wire::Secret;
use crate::gitlab::{CiStatus, JobAuth, JobUpdate, PatchReply, UpdateReply, UpdateState};
use crate::reconcile::desk::{Desk, Prepared};
use crate::reconcile::{Flow, Step, StepError};
use crate::store::CancelBy;

/// The most that one patch carries, bytes: what gitlab-runner sends (`network/trace.go`).
const PATCH_MOST: usize = 1 << 20;

/// The least that a patch is cut down to where something refuses larger ones.
const PATCH_LEAST: usize = 16 * 1024;

/// How long a verdict is offered to a GitLab that refuses it with words that mean nothing for a job.
///
/// A day: GitLab itself has ended the job for its silence long before, and somebody may still mend what
/// stands between.
const REFUSED_FOR_GOOD: Duration = Duration::from_secs(24 * 3600);

/// What GitLab said about a job that we told it about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::reconcile) enum Heard {
    /// It goes on.
    Fine,
    /// GitLab no longer listens; its status for the job.
    Disowned(String),
}

/// The one thing needed of a payload to touch a job.
#[derive(Deserialize)]
struct TokenOnly {
    #[serde(default)]
    token: Secret,
}

impl Step<'_> {
    /// Says that the job is still running.
    pub(in crate::reconcile) async fn touch(
        &mut self,
        prepared: &Prepared,
    ) -> Result<Heard, StepError> {
        self.touch_with(&prepared.payload.token).await
    }

    /// The same without understanding the whole payload: ten thousand waiting jobs are touched.
    pub(in crate::reconcile) async fn touch_by_token(&mut self) -> Result<Heard, StepError> {
        let text = self.r.payload(self.job.id).await?;
        let only: TokenOnly = serde_json::from_str(text.expose()).map_err(StepError::Payload)?;
        drop(text);
        self.touch_with(&only.token).await
    }

    async fn touch_with(&mut self, token: &Secret) -> Result<Heard, StepError> {
        let auth = JobAuth { id: self.job.ci_job, token };
        let update =
            JobUpdate { state: UpdateState::Running, output: None, info: self.runner.info.clone() };
        let reply =
            self.runner.client.update_job(auth, &update).await.map_err(StepError::GitLab)?;
        match reply {
            UpdateReply::Accepted { job_status } | UpdateReply::NotYet { job_status, .. } => {
                self.job.ci_confirmed_at = Some(self.now());
                Ok(self.hear(job_status))
            }
            // Not GitLab's word about a job, but of something in between; it is asked again.
            UpdateReply::Ended { status: 404, job_status: None } => Err(StepError::Busy(404, None)),
            UpdateReply::Ended { status, job_status } => {
                Ok(Heard::Disowned(status_word(job_status, status)))
            }
            UpdateReply::Rewind => Ok(Heard::Fine),
            UpdateReply::Conflict => Err(StepError::Busy(409, None)),
            UpdateReply::Busy { status, retry_after } => Err(StepError::Busy(status, retry_after)),
            UpdateReply::Unexpected { status, .. } => Err(StepError::Busy(status, None)),
        }
    }

    /// Takes in the status that comes with every answer: how we learn of a cancellation.
    fn hear(&mut self, status: Option<CiStatus>) -> Heard {
        match status {
            Some(CiStatus::Canceling) => {
                if self.job.cancel_requested_at.is_none() {
                    tracing::info!(job = %self.job.id, "GitLab asks to cancel the job");
                }
                self.request_end(CancelBy::Gitlab);
                Heard::Fine
            }
            Some(status @ (CiStatus::Canceled | CiStatus::Failed)) => {
                Heard::Disowned(status.as_str().to_owned())
            }
            Some(
                CiStatus::Running | CiStatus::Pending | CiStatus::Success | CiStatus::Other(_),
            )
            | None => Heard::Fine,
        }
    }

    /// Sends the part of the trace that GitLab does not have.
    pub(in crate::reconcile) async fn send_trace(
        &mut self,
        prepared: &Prepared,
        desk: &Desk,
    ) -> Result<Heard, StepError> {
        let before = self.job.trace_sent;
        let heard = self.send_pieces(prepared, desk).await;
        if heard.is_err() && self.job.trace_sent != before {
            // What was accepted before the trouble is not sent again.
            self.r.store.save(&self.job).await?;
        }
        heard
    }

    async fn send_pieces(&mut self, prepared: &Prepared, desk: &Desk) -> Result<Heard, StepError> {
        let auth_token = &prepared.payload.token;
        let mut corrections = 0;
        let mut most = PATCH_MOST;
        let mut heard = Heard::Fine;
        while self.job.trace_sent < self.job.trace_len && heard == Heard::Fine {
            let from = self.job.trace_sent;
            let left = self.job.trace_len - from;
            let limit = usize::try_from(left).unwrap_or(most).min(most);
            let bytes = Bytes::from(desk.spool.read(from, limit)?);
            let sent = from + u64::try_from(bytes.len()).unwrap_or(0);
            let auth = JobAuth { id: self.job.ci_job, token: auth_token };
            let reply = self
                .runner
                .client
                .patch_trace(auth, from, bytes, prepared.debug_trace())
                .await
                .map_err(StepError::GitLab)?;
            self.r.crash_point("G");
            match reply {
                PatchReply::Accepted { job_status, interval, .. } => {
                    self.job.trace_sent = sent;
                    self.job.ci_confirmed_at = Some(self.now());
                    if let Some(interval) = interval {
                        self.job.trace_interval =
                            u64::try_from(interval.as_millis()).unwrap_or(60_000);
                    }
                    heard = self.hear(job_status);
                }
                PatchReply::Range { end, job_status } => {
                    // GitLab's answer is the truth about what it has (crash point G).
                    corrections += 1;
                    if corrections > 5 {
                        return Err(StepError::Busy(416, None));
                    }
                    if end > self.job.trace_len {
                        tracing::error!(
                            job = %self.job.id, end, trace_len = self.job.trace_len,
                            "GitLab has more of the trace than we do; it goes on without a checksum"
                        );
                        self.stretch(end)?;
                    }
                    self.job.trace_sent = end;
                    heard = self.hear(job_status);
                }
                PatchReply::Ended { status: 404, .. } if self.job.state != JobState::Reporting => {
                    // Not GitLab's word about a job; something in between. It is asked again.
                    return Err(StepError::Busy(404, None));
                }
                PatchReply::Ended { status, job_status } => {
                    heard = Heard::Disowned(status_word(job_status, status));
                }
                PatchReply::TooLarge if most > PATCH_LEAST => {
                    // A proxy in front of GitLab takes less than GitLab does.
                    most = (most / 4).max(PATCH_LEAST);
                }
                PatchReply::TooLarge => return Err(StepError::Busy(413, None)),
                PatchReply::Busy { status, retry_after } => {
                    return Err(StepError::Busy(status, retry_after));
                }
                PatchReply::Unexpected { status, .. } => {
                    return Err(StepError::Busy(status, None));
                }
            }
        }
        Ok(heard)
    }

    /// Goes on after bytes that GitLab has and we lost.
    fn stretch(&mut self, end: u64) -> Result<(), StepError> {
        let (mut spool, _opened) =
            crate::trace::Spool::open(&self.r.spool_path(self.job.id), self.job.trace_len)?;
        spool.stretch(end)?;
        spool.sync()?;
        self.job.trace_len = end;
        self.job.trace_hole = true;
        Ok(())
    }

    /// Brings home what the job left behind; tells GitLab the verdict, after the whole trace.
    pub(in crate::reconcile) async fn reporting(
        &mut self,
        permit: &mut Option<SemaphorePermit<'_>>,
    ) -> Result<Flow, StepError> {
        if self.job.brought_at.is_none()
            && let Some(flow) = self.bring_home(permit).await?
        {
            return Ok(flow);
        }
        let before = self.job.trace_sent;
        let told = self.tell_verdict().await;
        if told.is_err() && self.job.trace_sent != before {
            self.r.store.save(&self.job).await?;
        }
        told
    }

    async fn tell_verdict(&mut self) -> Result<Flow, StepError> {
        let prepared = match self.prepared().await {
            Ok(prepared) => Some(prepared),
            Err(StepError::Payload(_) | StepError::NoPayload) => None,
            Err(error) => return Err(error),
        };
        let token = match &prepared {
            Some(prepared) => {
                let desk = self.open_desk(prepared)?;
                if let Heard::Disowned(status) = self.send_trace(prepared, &desk).await?
                    && !matches!(status.as_str(), "403" | "404")
                {
                    return self.closed(&status).await;
                }
                prepared.payload.token.clone()
            }
            None => {
                let only = match self.r.payload(self.job.id).await {
                    Ok(text) => serde_json::from_str::<TokenOnly>(text.expose()).ok(),
                    Err(StepError::NoPayload) => None,
                    Err(error) => return Err(error),
                };
                let Some(only) = only else {
                    // Without its token nobody can say anything about it; GitLab ends it.
                    return self.abandon("its payload cannot be read".to_owned()).await;
                };
                only.token
            }
        };
        let output = match &prepared {
            Some(prepared) if !self.job.trace_hole => {
                let desk = self.open_desk(prepared)?;
                let len = self.job.trace_len;
                let digest = tokio::task::spawn_blocking(move || desk.spool.digest(len))
                    .await
                    .map_err(|_panicked| StepError::NoPayload)??;
                digest.map(|digest| (digest.crc32, digest.bytesize))
            }
            Some(_) | None => None,
        };
        let state = match &self.job.verdict {
            Some(verdict) => match verdict.failure {
                None => UpdateState::Success,
                Some(reason) => UpdateState::Failed {
                    reason: reason.as_str().to_owned(),
                    exit_code: verdict.exit_code.filter(|code| *code != 0),
                },
            },
            None => return Ok(Flow::Rest),
        };
        let update = JobUpdate { state, output, info: self.runner.info.clone() };
        let auth = JobAuth { id: self.job.ci_job, token: &token };
        let reply =
            self.runner.client.update_job(auth, &update).await.map_err(StepError::GitLab)?;
        self.r.crash_point("I");
        match reply {
            UpdateReply::Accepted { .. } => self.reported().await,
            UpdateReply::NotYet { interval, .. } => {
                let now = self.now();
                self.job.ci_confirmed_at = Some(now);
                let wait = interval.unwrap_or(Duration::from_secs(1));
                self.job.due_at = policy::after(now, wait.min(Duration::from_secs(60)));
                self.r.store.save(&self.job).await?;
                Ok(Flow::Rest)
            }
            UpdateReply::Rewind => {
                // An old server wants the trace again. If it keeps wanting it, it does without.
                self.job.trace_sent = 0;
                self.job.failures = self.job.failures.saturating_add(1);
                self.job.trace_hole |= self.job.failures > 3;
                self.job.due_at = policy::after(self.now(), policy::back_off(self.job.failures));
                self.r.store.save(&self.job).await?;
                Ok(Flow::Rest)
            }
            UpdateReply::Ended { status, job_status } => {
                let status = status_word(job_status, status);
                self.closed(&status).await
            }
            UpdateReply::Conflict => Err(StepError::Busy(409, None)),
            UpdateReply::Busy { status, retry_after } => Err(StepError::Busy(status, retry_after)),
            UpdateReply::Unexpected { status, .. }
                if (400..500).contains(&status)
                    && policy::since(self.now(), self.job.state_at) > REFUSED_FOR_GOOD =>
            {
                // It has been said all day, and every time GitLab understood and refused.
                self.disown(&status.to_string()).await
            }
            UpdateReply::Unexpected { status, .. } => Err(StepError::Busy(status, None)),
        }
    }

    /// GitLab has closed the job: with our verdict, whose answer was lost (crash point I), or with
    /// its own.
    async fn closed(&mut self, status: &str) -> Result<Flow, StepError> {
        let ours = self.job.verdict.as_ref().is_some_and(|verdict| match status {
            "success" => verdict.is_success(),
            "failed" => !verdict.is_success(),
            "canceled" => self.job.cancel_requested_by == Some(CancelBy::Gitlab),
            _ => false,
        });
        if ours { self.reported().await } else { self.disown(status).await }
    }

    async fn reported(&mut self) -> Result<Flow, StepError> {
        let now = self.now();
        let lag = self.job.ended_at.map(|ended| policy::since(now, ended));
        self.job.ci_confirmed_at = Some(now);
        self.job.failures = 0;
        self.job.due_at = now;
        self.r.store.transition(&mut self.job, Event::Reported, now, None).await?;
        self.r.crash_point("K");
        if let Some(lag) = lag {
            self.r.watcher.confirmed(&self.job, lag);
        }
        self.r.forget_prepared(self.job.id);
        Ok(Flow::Again)
    }

    /// Notes that GitLab no longer listens, and has the job ended over there.
    pub(in crate::reconcile) async fn disown(&mut self, status: &str) -> Result<Flow, StepError> {
        tracing::warn!(
            job = %self.job.id, ci_job = %self.job.ci_job, status, "GitLab has given the job up"
        );
        self.abandon(format!("GitLab says {status}")).await
    }

    async fn abandon(&mut self, why: String) -> Result<Flow, StepError> {
        let now = self.now();
        if self.may_be_there() {
            self.request_end(CancelBy::Gitlab);
        }
        self.job.failures = 0;
        self.job.due_at = now;
        self.r.store.transition(&mut self.job, Event::Disowned, now, Some(why)).await?;
        self.r.forget_prepared(self.job.id);
        self.r.moved(&self.job.backend, now);
        Ok(Flow::Again)
    }
}

/// Gives GitLab's word for the job, or the HTTP status if it said none.
fn status_word(status: Option<CiStatus>, code: u16) -> String {
    status.map_or_else(|| code.to_string(), |status| status.as_str().to_owned())
}
