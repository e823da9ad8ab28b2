//! `submitted` and `running`: what was seen of a job, its log, its end.

use std::time::Duration;

use bridge_backend::{ErrorKind, Observation, Outcome};
use jiff::Timestamp;

use crate::domain::job::{Event, JobState};
use crate::domain::policy;
use crate::domain::verdict::{CancelledBy, Cause, Verdict};
use crate::reconcile::backends::requeued;
use crate::reconcile::desk::{Desk, Prepared};
use crate::reconcile::finish::{leaves_something, may_leave_something};
use crate::reconcile::report::Heard;
use crate::reconcile::{Flow, News, Step, StepError};
use crate::store::{CancelBy, EndedOutcome};
use crate::telemetry::Chain;
use crate::trace::{Flush, Style};

/// The most that is read of a log in one call, bytes.
const CHUNK: usize = 256 * 1024;

/// The most calls in one step, so that one talkative job leaves room for others.
const CHUNKS: usize = 16;

impl Step<'_> {
    /// Tells how often GitLab wants news of the job.
    pub(in crate::reconcile) fn update_interval(&self) -> Duration {
        Duration::from_millis(self.job.trace_interval)
    }

    /// Tells when the job is to be looked at again if nothing happens.
    pub(in crate::reconcile) fn next_look(&self, now: Timestamp) -> Timestamp {
        let touched = self.job.ci_confirmed_at.unwrap_or(now).min(now);
        let touch = policy::after(touched, policy::touch_interval(self.r.desktop().owed));
        let mut next = touch;
        if self.job.ended_at.is_none() {
            let deadline = self.job.deadline_at;
            let grace_ends = policy::after(deadline, policy::DEADLINE_GRACE);
            next = next.min(if now < deadline { deadline } else { grace_ends });
        }
        let carries = self.job.state == JobState::Running || self.job.ended_at.is_some();
        if carries && !self.job.log_ended {
            let interval = if self.job.ended_at.is_some() {
                Duration::from_secs(1)
            } else {
                policy::log_interval(self.update_interval())
            };
            next = next.min(policy::after(now, interval));
        }
        if self.job.trace_sent < self.job.trace_len {
            let sent = policy::after(touched, self.update_interval());
            next = next.min(sent);
        }
        if self.more_log {
            next = now;
        }
        // What is due at once all the same leaves the others their turn.
        next.max(policy::after(now, Duration::from_millis(300)))
    }

    /// Looks at a job that the backend has.
    pub(in crate::reconcile) async fn in_flight(&mut self) -> Result<Flow, StepError> {
        let now = self.now();
        match self.news.take() {
            Some(News::Seen(observation)) => {
                if let Some(flow) = self.seen(observation, now).await? {
                    return Ok(flow);
                }
            }
            Some(News::Missing) => match self.job.missing_since {
                None => {
                    self.job.missing_since = Some(now);
                    self.r.store.note(&self.job, "missing", now, None).await?;
                }
                Some(since)
                    if policy::since(now, self.r.silent_since(&self.job.backend, since))
                        >= self.r.settings().lost_after =>
                {
                    let last_seen = match self.job.observed_at {
                        Some(at) => format!("it was last seen {} at {at:.0}", self.job.state),
                        None => "it was never seen there".to_owned(),
                    };
                    return self.conclude(Cause::Lost { last_seen }).await;
                }
                Some(_since) => {}
            },
            Some(News::Found(_) | News::Absent { .. } | News::Unasked(..)) | None => {}
        }
        if self.job.ended_at.is_none() && now >= self.job.deadline_at {
            if self.job.cancel_requested_at.is_none() {
                self.request_end(CancelBy::Deadline);
                self.r.store.note(&self.job, "deadline", now, None).await?;
                self.r.moved(&self.job.backend, now);
            }
            let overdue = policy::since(now, self.job.deadline_at);
            if overdue >= policy::DEADLINE_GRACE {
                return self.deadline(self.job.started_at.is_some()).await;
            }
        }
        self.carry(now).await
    }

    /// Notes what a poll saw; gives the flow when the job's state changed.
    async fn seen(
        &mut self,
        observation: Observation,
        now: Timestamp,
    ) -> Result<Option<Flow>, StepError> {
        let was_missing = self.job.missing_since.take().is_some();
        self.job.observed_at = Some(now);
        self.job.failures = 0;
        if was_missing {
            // At once: should the rest of this step fail, it has been seen all the same.
            self.r.store.note(&self.job, "seen_again", now, None).await?;
        }
        match observation {
            Observation::Pending { reason, starts_at } => {
                if self.job.state == JobState::Running {
                    // The other side put it back into its queue, which changes nothing for us.
                    let word = requeued(reason.as_deref());
                    if self.job.waits_for.as_deref() != Some(word) {
                        self.job.waits_for = Some(word.to_owned());
                        self.r.store.note(&self.job, "requeued", now, reason).await?;
                    }
                    return Ok(None);
                }
                if reason != self.job.waits_for {
                    self.job.waits_for.clone_from(&reason);
                    if let Some(reason) = &reason {
                        self.say_waiting(reason, starts_at, now).await?;
                    }
                    self.r.store.note(&self.job, "waits", now, reason).await?;
                }
                Ok(None)
            }
            Observation::Running { host } => {
                let moved = self.job.host != host || self.job.waits_for.is_some();
                self.job.host.clone_from(&host);
                self.job.waits_for = None;
                if self.job.state == JobState::Submitted {
                    self.job.started_at = Some(now);
                    self.say_started(now).await?;
                    self.job.due_at = now;
                    self.r.store.transition(&mut self.job, Event::Started, now, host).await?;
                    return Ok(None);
                }
                if moved {
                    self.r.store.note(&self.job, "runs_on", now, host).await?;
                }
                Ok(None)
            }
            Observation::Unclear { status } => {
                self.job.waits_for = Some(status.clone());
                self.r.store.note(&self.job, "unclear", now, Some(status)).await?;
                Ok(None)
            }
            Observation::Ended { outcome, usage } => {
                if self.job.ended_at.is_none() {
                    if self.job.started_at.is_none() && !never_ran(&outcome) {
                        self.job.started_at = usage.started_at.or(Some(now));
                    }
                    self.r.crash_point("F");
                    let detail = serde_json::to_string(&outcome).ok();
                    self.job.outcome = Some(EndedOutcome { outcome: Some(outcome), usage });
                    self.job.ended_at = Some(now);
                    self.job.waits_for = None;
                    self.r.store.note(&self.job, "ended", now, detail).await?;
                }
                Ok(None)
            }
            Observation::Gone => {
                if self.job.ended_at.is_none() {
                    self.job.outcome =
                        Some(EndedOutcome { outcome: None, usage: Default::default() });
                    self.job.ended_at = Some(now);
                    self.r.store.note(&self.job, "gone", now, None).await?;
                }
                Ok(None)
            }
        }
    }

    async fn say_waiting(
        &mut self,
        reason: &str,
        starts_at: Option<Timestamp>,
        now: Timestamp,
    ) -> Result<(), StepError> {
        let waited = policy::since(now, self.job.received_at).as_secs();
        let left = policy::until(now, self.job.deadline_at).as_secs();
        let expected = starts_at
            .filter(|at| *at > now)
            .map(|at| format!("; {} expects to start it at {at:.0}", self.job.backend))
            .unwrap_or_default();
        let text = format!(
            "Waiting in {}: {reason} (waited {waited} s, {left} s of the job's timeout are \
             left{expected})",
            self.job.backend
        );
        self.remark(Style::Plain, &text).await
    }

    async fn say_started(&mut self, now: Timestamp) -> Result<(), StepError> {
        let waited = policy::since(now, self.job.received_at).as_secs();
        let host = self.job.host.as_deref().unwrap_or("a machine it did not name");
        let text = format!("Started by {} on {host} after {waited} s.", self.job.backend);
        self.remark(Style::Plain, &text).await
    }

    /// Writes one of our own lines; the row is written by whoever called.
    pub(in crate::reconcile) async fn remark(
        &mut self,
        style: Style,
        text: &str,
    ) -> Result<(), StepError> {
        let prepared = match self.prepared().await {
            Ok(prepared) => prepared,
            // A payload that cannot be read has no masks, so its trace stays as it is.
            Err(StepError::Payload(_) | StepError::NoPayload) => return Ok(()),
            Err(error) => return Err(error),
        };
        let mut desk = self.take_desk(&prepared)?;
        desk.composer.remark(self.line_time(), style, text, &mut desk.out);
        self.keep(desk).await?;
        Ok(())
    }

    /// Carries the log into the trace and the trace to GitLab; concludes a job that has ended.
    async fn carry(&mut self, now: Timestamp) -> Result<Flow, StepError> {
        let ended = self.job.ended_at;
        let (mut trouble, mut grew) = (None, false);
        let carries = ended.is_some()
            || (self.job.state == JobState::Running && self.backend.capabilities().live_log);
        let before = (self.job.log_offset, self.job.trace_len);
        if carries && !self.job.log_ended {
            let prepared = match self.prepared().await {
                Ok(prepared) => prepared,
                // Without its payload nothing of it can be shown, and GitLab cannot be told of it.
                Err(StepError::Payload(_) | StepError::NoPayload) if ended.is_some() => {
                    return self.conclude_ended(false).await;
                }
                Err(error @ (StepError::Payload(_) | StepError::NoPayload)) => {
                    tracing::error!(
                        job = %self.job.id, error = %Chain(&error),
                        "a job whose payload is lost is ended"
                    );
                    self.request_end(CancelBy::Operator);
                    self.job.due_at = self.next_look(now);
                    self.r.store.save(&self.job).await?;
                    self.r.moved(&self.job.backend, now);
                    return Ok(Flow::Rest);
                }
                Err(error) => return Err(error),
            };
            let desk = self.open_desk(&prepared)?;
            match self.pump(&prepared, desk).await {
                Ok(desk) => self.desk = Some(desk),
                Err(error @ StepError::Backend { .. }) => trouble = Some(error),
                Err(error) => return Err(error),
            }
            grew = before != (self.job.log_offset, self.job.trace_len);
        }
        if let Some(ended) = ended {
            let patience =
                if trouble.is_some() { policy::LOG_TROUBLE_GRACE } else { policy::LOG_GRACE };
            // What the operator can mend is not lost yet, as long as GitLab's time is not up.
            let mendable = matches!(&trouble, Some(StepError::Backend { source, .. })
                if source.remedy().is_some() && now < self.job.deadline_at);
            // A log that still grows is not late, however long it is.
            let late = !grew && !mendable && policy::since(now, ended) >= patience;
            if self.job.log_ended || late {
                // The verdict's lines become durable together with the log's last ones.
                return self.conclude_ended(!self.job.log_ended).await;
            }
        }
        if let Some(desk) = self.desk.take() {
            self.keep(desk).await?;
        }
        if before != (self.job.log_offset, self.job.trace_len) {
            // Before anything of it is sent: what GitLab has must never be taken back.
            self.r.store.save(&self.job).await?;
        }
        let Some(error) = trouble else { return self.keep_in_touch().await };
        if let Heard::Disowned(status) = self.speak().await? {
            return self.disown(&status).await;
        }
        self.r.store.save(&self.job).await?;
        Err(error)
    }

    /// Sends what is new, or touches GitLab if it has not heard of the job for long; rests then.
    pub(in crate::reconcile) async fn keep_in_touch(&mut self) -> Result<Flow, StepError> {
        let now = self.now();
        if let Heard::Disowned(status) = self.speak().await? {
            return self.disown(&status).await;
        }
        // A submission keeps its own account of what failed and when to try again.
        if self.job.state != JobState::Submitting {
            self.job.failures = 0;
        }
        if self.job.state != JobState::Submitting || self.job.due_at <= now {
            self.job.due_at = self.next_look(self.now());
        }
        if self.job.cancel_requested_at.is_some() && self.job.cancel_sent_at.is_none() {
            self.r.moved(&self.job.backend, now);
        }
        self.r.store.save(&self.job).await?;
        Ok(Flow::Rest)
    }

    /// Says to GitLab what there is to say.
    async fn speak(&mut self) -> Result<Heard, StepError> {
        let now = self.now();
        let owed = self.r.desktop().owed;
        let confirmed = self.job.ci_confirmed_at;
        let unsent = self.job.trace_sent < self.job.trace_len;
        let silent = confirmed.map_or(Duration::MAX, |at| policy::since(now, at));
        let long = silent >= policy::touch_interval(owed);
        // A patch is as good as a touch. Were it not sent where a touch is due, touches closer together
        // than GitLab wants news would put it off for ever.
        if unsent && (long || policy::may_send(now, confirmed, self.update_interval())) {
            let prepared = self.prepared().await?;
            let desk = self.open_desk(&prepared)?;
            self.send_trace(&prepared, &desk).await
        } else if long {
            self.touch_by_token().await
        } else {
            Ok(Heard::Fine)
        }
    }

    /// Reads the backend's log from where the spool ends and writes it into the spool.
    ///
    /// Gives the desk back with what is not durable yet.
    async fn pump(&mut self, prepared: &Prepared, mut desk: Desk) -> Result<Desk, StepError> {
        let Some(job_ref) = self.job.job_ref() else { return Ok(desk) };
        let backend = std::sync::Arc::clone(&self.backend);
        for turn in 1..=CHUNKS {
            let offset = self.job.log_offset;
            let answer = self.call("read_log", backend.read_log(&job_ref, offset, CHUNK)).await;
            let chunk = match answer {
                Ok(chunk) => chunk,
                Err(error) if error.kind() == ErrorKind::Lost => {
                    tracing::warn!(job = %self.job.id, error = %Chain(&error), "the log is lost");
                    let text = format!("The job's log is lost: {}", Chain(&error));
                    desk.composer.remark(self.line_time(), Style::Warning, &text, &mut desk.out);
                    self.job.log_ended = true;
                    break;
                }
                Err(source) => {
                    self.keep(desk).await?;
                    self.r.store.save(&self.job).await?;
                    return Err(StepError::Backend { verb: "read the log", source });
                }
            };
            let full = chunk.bytes.len() >= CHUNK;
            let still = prepared.stands_still(offset, chunk.bytes.len());
            let flush = if chunk.end && !full {
                Flush::End
            } else if still || full {
                Flush::Partial
            } else {
                Flush::Lines
            };
            let used = desk.composer.log(self.line_time(), &chunk.bytes, flush, &mut desk.out);
            self.job.log_offset += u64::try_from(used).unwrap_or(0);
            if chunk.end && used == chunk.bytes.len() {
                if let Err(error) = self.write_tail(&job_ref, &mut desk).await {
                    // What was read before is used, and is not read again.
                    self.keep(desk).await?;
                    self.r.store.save(&self.job).await?;
                    return Err(error);
                }
                self.job.log_ended = true;
                break;
            }
            if !full {
                break;
            }
            self.more_log = turn == CHUNKS;
            desk = self.keep(desk).await?;
        }
        Ok(desk)
    }

    /// Appends the end of a log whose middle was left out.
    async fn write_tail(
        &self,
        job_ref: &bridge_backend::JobRef,
        desk: &mut Desk,
    ) -> Result<(), StepError> {
        let Some(wanted) = desk.composer.tail_wanted() else { return Ok(()) };
        let from = self.job.log_offset.saturating_sub(wanted);
        let mut tail = Vec::new();
        while let Ok(at) = u64::try_from(tail.len()) {
            let chunk = self
                .call("read_log", self.backend.read_log(job_ref, from + at, CHUNK))
                .await
                .map_err(|source| StepError::Backend { verb: "read the log", source })?;
            if chunk.bytes.is_empty() {
                break;
            }
            tail.extend_from_slice(&chunk.bytes);
        }
        desk.composer.tail(self.line_time(), &tail, &mut desk.out);
        Ok(())
    }

    /// Decides the verdict of a job that has ended over there.
    async fn conclude_ended(&mut self, log_cut: bool) -> Result<Flow, StepError> {
        if log_cut {
            let text = "The end of the job's log did not arrive in time.";
            self.remark(Style::Warning, text).await?;
        }
        let by_deadline = self.job.cancel_requested_by == Some(CancelBy::Deadline);
        let cause = match self.job.outcome.clone().and_then(|ended| ended.outcome) {
            Some(outcome) => match outcome {
                Outcome::Cancelled { .. } | Outcome::SystemFailed { .. } if by_deadline => {
                    return self.deadline(self.job.started_at.is_some()).await;
                }
                Outcome::Expired => return self.deadline(false).await,
                // Our own clock may have come first; it left what it wrote all the same.
                Outcome::TimedOut => {
                    let timeout = policy::since(self.job.deadline_at, self.job.received_at);
                    Cause::TimeLimit { timeout_secs: timeout.as_secs() }
                }
                // From here on it is as if the submit node had not got them.
                Outcome::SourcesFailed { failure } => failure.into(),
                other @ (Outcome::Exited { .. }
                | Outcome::ScriptTimedOut
                | Outcome::OutOfMemory
                | Outcome::Cancelled { .. }
                | Outcome::Preempted
                | Outcome::NodeFailed
                | Outcome::SystemFailed { .. }) => Cause::Ended(other),
            },
            None if by_deadline => {
                return self.deadline(self.job.started_at.is_some()).await;
            }
            None => Cause::Gone,
        };
        self.conclude(cause).await
    }

    /// Writes the verdict: into the trace, and into the row.
    pub(in crate::reconcile) async fn conclude(&mut self, cause: Cause) -> Result<Flow, StepError> {
        let now = self.now();
        let asked = match self.job.cancel_requested_by {
            Some(CancelBy::Gitlab) => Some(CancelledBy::GitLab),
            Some(CancelBy::Operator) => Some(CancelledBy::Operator),
            Some(CancelBy::Deadline) | None => None,
        };
        let mut verdict = Verdict::of(&cause, asked);
        match self.prepared().await {
            Ok(prepared) => {
                verdict.failure = verdict
                    .failure
                    .map(|r| r.for_server(&prepared.payload.features.failure_reasons));
                let mut desk = self.take_desk(&prepared)?;
                if !verdict.is_success() {
                    self.close_sections(&mut desk)?;
                }
                let at_hand = !self.backend.capabilities().collect;
                let left = !self.may_be_there()
                    && may_leave_something(&cause, self.job.started_at.is_some(), at_hand)
                    && prepared.plan.as_ref().is_ok_and(|plan| leaves_something(plan, &verdict));
                if left {
                    // The last line comes last.
                    self.keep(desk).await?;
                } else {
                    self.write_last_line(&verdict, &mut desk);
                    self.keep(desk).await?;
                    self.job.brought_at = Some(now);
                }
            }
            // A payload that cannot be read has no masks, so its trace stays empty.
            Err(StepError::Payload(_) | StepError::NoPayload) => {
                verdict.failure = verdict.failure.map(|r| r.for_server(&[]));
                self.job.brought_at = Some(now);
            }
            Err(error) => return Err(error),
        }
        if self.may_be_there() {
            // It may still be there; release waits until it is not.
            self.request_end(CancelBy::Deadline);
        } else if self.job.brought_at.is_some() {
            self.forget_secrets().await;
        }
        let detail = serde_json::to_string(&verdict).ok();
        self.job.verdict = Some(verdict);
        self.job.failures = 0;
        self.job.due_at = now;
        self.job.waits_for = None;
        self.r.store.transition(&mut self.job, Event::Concluded, now, detail).await?;
        self.r.crash_point("concluded");
        Ok(Flow::Again)
    }
}

/// Tells whether an outcome says that the script never started.
fn never_ran(outcome: &Outcome) -> bool {
    match outcome {
        Outcome::Cancelled { .. } | Outcome::Expired | Outcome::SystemFailed { .. } => true,
        Outcome::Exited { .. }
        | Outcome::TimedOut
        | Outcome::ScriptTimedOut
        | Outcome::SourcesFailed { .. }
        | Outcome::OutOfMemory
        | Outcome::Preempted
        | Outcome::NodeFailed => false,
    }
}
