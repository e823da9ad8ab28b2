//! `finished` and `abandoned`: leaving nothing behind.

use std::time::Duration;

use bridge_backend::Observation;
use jiff::Timestamp;

use crate::domain::policy;
use crate::job;
use crate::reconcile::dispatch::LOOK_AGAIN;
use crate::reconcile::{Flow, News, Step, StepError, leftovers};
use crate::store::CancelBy;
use crate::telemetry::Chain;

impl Step<'_> {
    /// Releases a job that GitLab has heard the last of, once it has surely ended over there.
    pub(in crate::reconcile) async fn over(&mut self) -> Result<Flow, StepError> {
        let now = self.now();
        let mut doubt = None;
        match self.news.take() {
            Some(News::Seen(Observation::Ended { .. } | Observation::Gone)) => {
                self.job.ended_at = Some(now);
                self.r.store.note(&self.job, "ended", now, None).await?;
            }
            Some(News::Missing) => match self.job.missing_since {
                None => {
                    self.job.missing_since = Some(now);
                    self.r.store.save(&self.job).await?;
                }
                Some(since)
                    if policy::since(now, self.r.silent_since(&self.job.backend, since))
                        >= self.r.settings().lost_after =>
                {
                    self.job.ended_at = Some(now);
                    self.r.store.note(&self.job, "lost", now, None).await?;
                }
                Some(_since) => {}
            },
            Some(News::Seen(
                Observation::Pending { .. }
                | Observation::Running { .. }
                | Observation::Unclear { .. },
            ))
            | None => {}
            Some(news @ (News::Found(_) | News::Absent { .. } | News::Unasked(..))) => {
                doubt = Some(news);
            }
        }
        if self.may_be_there() {
            // The rounds look for it, cancel it and see its end.
            self.request_end(CancelBy::Deadline);
            if self.job.external_id.is_some() {
                self.job.due_at = policy::after(now, Duration::from_secs(30));
                self.r.store.save(&self.job).await?;
                return Ok(Flow::Rest);
            }
            if let Some(flow) = self.look_for_stray(now, doubt).await? {
                return Ok(flow);
            }
        }
        if let Some(workspace) = &self.job.workspace {
            match job::release(workspace).await {
                Ok(()) => leftovers::drop_note(&self.r.settings().spool_dir, self.job.id).await,
                Err(error) => {
                    if policy::since(now, self.job.state_at) < policy::LEFTOVERS_PATIENCE {
                        return Err(StepError::Leftovers(error));
                    }
                    // Its note stays: each start tries again.
                    tracing::error!(
                        job = %self.job.id, error = %Chain(&error), "private files of the job remain"
                    );
                }
            }
        }
        self.forget_packed().await;
        if let Some(job_ref) = self.job.job_ref() {
            self.call("release", self.backend.release(&job_ref))
                .await
                .map_err(|source| StepError::Backend { verb: "release the job", source })?;
        }
        self.r.crash_point("K2");
        self.job.released_at = Some(now);
        self.job.failures = 0;
        self.job.waits_for = None;
        self.r.store.note(&self.job, "released", now, None).await?;
        Ok(Flow::Rest)
    }

    /// Makes sure that a submission whose fate was never learnt has left nothing over there.
    async fn look_for_stray(
        &mut self,
        now: Timestamp,
        doubt: Option<News>,
    ) -> Result<Option<Flow>, StepError> {
        let Some(settles) = self.settles_at() else { return Ok(None) };
        match doubt {
            Some(News::Found(id)) => {
                self.job.external_id = Some(id.clone());
                self.job.due_at = policy::after(now, Duration::from_secs(30));
                self.r.store.note(&self.job, "found", now, Some(id.to_string())).await?;
                self.r.moved(&self.job.backend, now);
                return Ok(Some(Flow::Rest));
            }
            Some(News::Absent { asked }) if asked >= settles => return Ok(None),
            Some(News::Absent { .. }) => {
                self.job.due_at = settles.max(policy::after(now, LOOK_AGAIN));
            }
            Some(News::Unasked(..)) => {
                self.job.failures = self.job.failures.saturating_add(1);
                self.job.due_at = policy::after(now, policy::back_off(self.job.failures));
            }
            Some(News::Seen(_) | News::Missing) | None => return Ok(Some(Flow::Rest)),
        }
        self.r.store.save(&self.job).await?;
        Ok(Some(Flow::Rest))
    }

    /// Removes the files that held the job's secrets; a failure is tried again at release.
    pub(in crate::reconcile) async fn forget_secrets(&self) {
        let Some(workspace) = &self.job.workspace else { return };
        if let Err(error) = job::cleanup(workspace).await {
            tracing::warn!(job = %self.job.id, error = %Chain(&error), "files of the job remain");
        }
    }
}
