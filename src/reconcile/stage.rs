//! Stages on the submit node: their output carried into the trace, GitLab kept informed meanwhile.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::domain::policy;
use crate::domain::verdict::Cause;
use crate::job::{Output, StageError, Tone};
use crate::reconcile::desk::{Desk, Prepared};
use crate::reconcile::report::Heard;
use crate::reconcile::{Step, StepError};
use crate::telemetry::Chain;
use crate::trace::{Flush, Section, Style};

/// How long a stage's output is held back, so that a stage which a crash interrupts early leaves no
/// half of itself in the trace.
const HOLD_OUTPUT: Duration = Duration::from_secs(3);

/// What a stage on the submit node says, until it is written into the trace.
#[derive(Clone, Debug, Default)]
pub(in crate::reconcile) struct Sink(Arc<Mutex<Vec<Said>>>);

#[derive(Debug)]
enum Said {
    Bytes(Vec<u8>),
    Line(Style, String),
}

impl Output for Sink {
    fn bytes(&mut self, bytes: &[u8]) {
        let mut said = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(Said::Bytes(last)) = said.last_mut() {
            last.extend_from_slice(bytes);
        } else {
            said.push(Said::Bytes(bytes.to_vec()));
        }
    }

    fn remark(&mut self, tone: Tone, text: &str) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(Said::Line(style_of(tone), text.to_owned()));
    }
}

/// Gives the look of a line that a stage says.
pub(in crate::reconcile) fn style_of(tone: Tone) -> Style {
    match tone {
        Tone::Plain => Style::Plain,
        Tone::Notice => Style::Info,
        Tone::Warning => Style::Warning,
        Tone::Error => Style::Error,
    }
}

impl Sink {
    /// Moves what was said into the trace; an unfinished line waits unless this is the end.
    fn pour(&self, desk: &mut Desk, now: jiff::Timestamp, rest: &mut Vec<u8>, end: bool) {
        let said = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        for piece in said {
            match piece {
                Said::Bytes(bytes) => {
                    rest.extend_from_slice(&bytes);
                    let used = desk.composer.stage_output(now, rest, Flush::Lines, &mut desk.out);
                    rest.drain(..used.min(rest.len()));
                }
                Said::Line(style, text) => {
                    let used = desk.composer.stage_output(now, rest, Flush::End, &mut desk.out);
                    rest.drain(..used.min(rest.len()));
                    desk.composer.remark(now, style, &text, &mut desk.out);
                }
            }
        }
        if end && !rest.is_empty() {
            desk.composer.stage_output(now, rest, Flush::End, &mut desk.out);
            rest.clear();
        }
    }
}

/// How often a stage looks whether it is still wanted. Few stages run at a time, and a person waits.
pub(in crate::reconcile) const WANTED: Duration = Duration::from_secs(1);

/// The least time between two attempts to tell a GitLab that does not answer.
const TOUCH_AGAIN: Duration = Duration::from_secs(15);

/// How often a job in a line looks, too: thousands of them may not ask the database every second.
fn wanted_every(owed: usize) -> Duration {
    WANTED.saturating_mul(u32::try_from(owed / 100).unwrap_or(u32::MAX).max(1))
}

/// Why a job is not handed over.
pub(in crate::reconcile) enum Stopped {
    /// Its verdict is known.
    Concluded(Cause),
    /// GitLab no longer wants it; its status for the job.
    Disowned(String),
    /// The daemon is about to stop; the next one makes it ready again.
    Shutdown,
}

/// Up to when a stage goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::reconcile) enum Until {
    /// Until it is done, the job is cancelled or its time is up.
    Cancelled,
    /// Until it is done: what it does is owed to a job that has ended.
    Done,
}

/// A stage, as the trace shows it.
#[derive(Clone, Copy, Debug)]
pub(in crate::reconcile) struct Stage<'a> {
    /// Its section and that section's title; none where a section of several stages is open.
    pub(in crate::reconcile) section: Option<(Section<'a>, &'a str)>,
    pub(in crate::reconcile) until: Until,
}

/// What a stage does.
pub(in crate::reconcile) type Work<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Waits for something else while a stage goes on: a GitLab that is slow to answer must not stop it.
async fn alongside<T, U>(
    work: &mut Work<'_, T>,
    finished: &mut Option<T>,
    other: impl Future<Output = U>,
) -> U {
    let mut other = std::pin::pin!(other);
    if finished.is_none() {
        // Both are polled again where they stopped.
        tokio::select! {
            done = work.as_mut() => *finished = Some(done),
            answer = &mut other => return answer,
        }
    }
    other.await
}

/// Says what a failed stage means for its job.
pub(in crate::reconcile) fn cause(error: StageError) -> Cause {
    match error {
        StageError::Failed { stage, exit_code } => {
            Cause::StageFailed { stage: stage.into(), exit_code }
        }
        StageError::TimedOut { stage } => Cause::StageTimedOut { stage: stage.into() },
        StageError::Broken { stage, detail } => Cause::StageBroken { stage: stage.into(), detail },
        StageError::Misconfigured { detail } => Cause::Unrunnable { detail },
    }
}

/// Says whether a job goes on after a stage that it cannot do without.
pub(in crate::reconcile) fn concluded(
    done: Result<Result<(), StageError>, Stopped>,
) -> Result<(), Stopped> {
    done?.map_err(|error| Stopped::Concluded(cause(error)))
}

impl Step<'_> {
    /// Waits for a permit, with GitLab kept informed meanwhile.
    pub(in crate::reconcile) async fn wait_in_line(
        &mut self,
        line: Arc<Semaphore>,
        prepared: &Prepared,
        until: Until,
    ) -> Result<Result<OwnedSemaphorePermit, Stopped>, StepError> {
        // One future for the whole wait: who asks anew goes to the end of the line.
        let mut turn = std::pin::pin!(line.acquire_owned());
        loop {
            let owed = self.r.desktop().owed;
            let wait = policy::touch_interval(owed).min(wanted_every(owed));
            // `turn` is polled again where it stopped; the others hold nothing.
            tokio::select! {
                turn = &mut turn => {
                    return Ok(turn.map_err(|_closed| Stopped::Shutdown));
                }
                () = self.r.shutdown.cancelled() => return Ok(Err(Stopped::Shutdown)),
                () = tokio::time::sleep(wait) => {}
            }
            if let Some(stopped) = self.still_wanted(prepared, until).await? {
                return Ok(Err(stopped));
            }
        }
    }

    /// Tells how long GitLab has not heard of the job.
    pub(in crate::reconcile) fn silence(&self) -> Duration {
        let confirmed = self.job.ci_confirmed_at;
        confirmed.map_or(Duration::MAX, |at| policy::since(self.now(), at))
    }

    /// Touches GitLab if it is time, and looks for a reason not to go on.
    pub(in crate::reconcile) async fn still_wanted(
        &mut self,
        prepared: &Prepared,
        until: Until,
    ) -> Result<Option<Stopped>, StepError> {
        // A GitLab that is away is not asked every second, by every job that waits.
        let tried = self.touch_tried.map_or(Duration::MAX, |at| policy::since(self.now(), at));
        if self.silence() >= policy::touch_interval(self.r.desktop().owed) && tried >= TOUCH_AGAIN {
            self.touch_tried = Some(self.now());
            match self.touch(prepared).await {
                Ok(Heard::Fine) => self.r.store.save(&self.job).await?,
                Ok(Heard::Disowned(status)) => return Ok(Some(Stopped::Disowned(status))),
                Err(error) => tracing::warn!(
                    job = %self.job.id, error = %Chain(&error),
                    "GitLab could not be told of the job"
                ),
            }
        }
        match until {
            Until::Done => return Ok(None),
            Until::Cancelled => {}
        }
        if let Some(row) = self.r.store.job(self.job.id).await?
            && row.cancel_requested_at.is_some()
        {
            self.job.cancel_requested_at = row.cancel_requested_at;
            self.job.cancel_requested_by = row.cancel_requested_by;
        }
        if self.job.cancel_requested_at.is_some() {
            return Ok(Some(Stopped::Concluded(Cause::CancelledEarly)));
        }
        if self.now() >= self.job.deadline_at {
            let timeout_secs = prepared.payload.timeout_secs();
            return Ok(Some(Stopped::Concluded(Cause::Deadline { timeout_secs, started: false })));
        }
        Ok(None)
    }

    /// Runs a stage, within its section of the trace.
    ///
    /// What it says becomes durable in `desk` and the row with it, except for the last part, which the
    /// caller keeps together with what follows.
    pub(in crate::reconcile) async fn stage<T>(
        &mut self,
        prepared: &Arc<Prepared>,
        mut desk: Desk,
        stage: Stage<'_>,
        sink: &Sink,
        mut work: Work<'_, T>,
    ) -> Result<(Desk, Result<T, Stopped>), StepError> {
        let now = self.line_time();
        if let Some((section, title)) = stage.section {
            desk.composer.section_start(now, section, title, &mut desk.out);
        }
        let mut rest = Vec::new();
        let mut held = Duration::ZERO;
        let mut finished = None;
        let done = loop {
            if let Some(done) = finished.take() {
                break Ok(done);
            }
            // `work` is polled again where it stopped; the sleep and the shutdown hold nothing.
            tokio::select! {
                done = &mut work => break Ok(done),
                () = self.r.shutdown.cancelled() => break Err(Stopped::Shutdown),
                () = tokio::time::sleep(WANTED) => held += WANTED,
            }
            if held >= HOLD_OUTPUT {
                held = Duration::ZERO;
                // From here on it is worth watching live; if we die it is begun again, and says so.
                sink.pour(&mut desk, self.line_time(), &mut rest, false);
                desk = self.keep(desk).await?;
                self.r.store.save(&self.job).await?;
                let shown = self.show(prepared, &mut desk);
                match alongside(&mut work, &mut finished, shown).await? {
                    Heard::Fine => {}
                    // Whether the job is still ours the next touch tells for certain.
                    Heard::Disowned(status) if matches!(status.as_str(), "403" | "404") => {}
                    Heard::Disowned(status) => break Err(Stopped::Disowned(status)),
                }
            }
            let wanted = self.still_wanted(prepared, stage.until);
            if let Some(stopped) = alongside(&mut work, &mut finished, wanted).await? {
                break Err(stopped);
            }
        };
        drop(work);
        sink.pour(&mut desk, self.line_time(), &mut rest, true);
        if let Some((section, _title)) = stage.section
            && !matches!(done, Err(Stopped::Shutdown))
        {
            desk.composer.section_end(self.line_time(), section.name, &mut desk.out);
        }
        Ok((desk, done))
    }

    /// Sends what a stage has said so far, if GitLab wants news by now.
    async fn show(
        &mut self,
        prepared: &Arc<Prepared>,
        desk: &mut Desk,
    ) -> Result<Heard, StepError> {
        let long = self.silence() >= policy::touch_interval(self.r.desktop().owed);
        let confirmed = self.job.ci_confirmed_at;
        if !long && !policy::may_send(self.now(), confirmed, self.update_interval()) {
            return Ok(Heard::Fine);
        }
        let heard = match self.send_trace(prepared, desk).await {
            Ok(heard) => heard,
            Err(error) => {
                tracing::warn!(job = %self.job.id, error = %Chain(&error), "the trace waits");
                Heard::Fine
            }
        };
        if desk.spool.len() != self.job.trace_len {
            // GitLab had more than we do.
            desk.spool = self.open_desk(prepared)?.spool;
        }
        Ok(heard)
    }
}
