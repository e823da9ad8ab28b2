//! One job: its fields and what happens to them. Which calls are allowed is decided elsewhere.

use std::fmt;
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::sync::Notify;

use super::artifacts::Stored;
use super::door::Line;
use super::new_job::NewJob;
use super::view::{EndedBy, Final, JobView, Status};

/// A sign of life is noted only if the last one is older than this.
pub(super) const TOUCH: Duration = Duration::from_secs(15 * 60);

/// A call that took place, and whether its answer may still count as read: it may not once the
/// connection is gone, for then nobody knows what the other side has seen.
#[derive(Debug, Default)]
pub(super) struct Told(Weak<Line>);

impl Told {
    pub(super) fn over(line: &Arc<Line>) -> Self {
        Self(Arc::downgrade(line))
    }

    pub(super) fn surely(&self) -> bool {
        self.0.strong_count() > 0
    }
}

/// Calls in the current minute.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Window {
    minute: u64,
    calls: u32,
}

impl Window {
    /// Counts a call; gives the seconds to wait if it is one too many.
    pub(super) fn count(&mut self, now: Duration, limit: u32) -> Result<(), u64> {
        let minute = now.as_secs() / 60;
        if self.minute != minute {
            *self = Self { minute, calls: 0 };
        }
        self.calls = self.calls.saturating_add(1);
        if limit > 0 && self.calls > limit { Err(60 - now.as_secs() % 60) } else { Ok(()) }
    }
}

/// What was refused with 403, and what came after it.
#[derive(Debug, Default)]
pub(super) struct Refused {
    pub(super) told: Told,
    pub(super) patches: u32,
    pub(super) updates: u32,
}

/// A job.
pub(super) struct Job {
    pub(super) id: i64,
    /// What was asked for; dropped when the job is handed out.
    pub(super) wish: Option<Box<NewJob>>,
    pub(super) name: Arc<str>,
    pub(super) stage: Arc<str>,
    pub(super) project: Arc<str>,
    pub(super) allow_failure: bool,
    pub(super) reasons: Option<Vec<String>>,
    pub(super) status: Status,
    pub(super) failure_reason: Option<String>,
    pub(super) exit_code: Option<i64>,
    pub(super) ended_by: Option<EndedBy>,
    pub(super) erased: bool,
    pub(super) watched: bool,

    pub(super) token: String,
    pub(super) token_expires: Option<Duration>,
    pub(super) masked: Vec<String>,
    pub(super) timeout: Duration,
    pub(super) runner: Option<usize>,
    pub(super) system_id: Option<Arc<str>>,
    /// Handed out, and waiting for the first `running` (two-phase servers).
    pub(super) unacknowledged: Option<Duration>,

    pub(super) trace: Arc<Vec<u8>>,
    pub(super) trace_len: u64,
    pub(super) crc: crc32fast::Hasher,
    pub(super) debug_trace: bool,
    pub(super) patch_told: Told,

    pub(super) final_update: Option<Final>,
    pub(super) final_told: Told,
    /// Since when the 202 phase lasts, and how many 202 were given.
    pub(super) finalising: Option<(Duration, u32)>,
    pub(super) persisted: bool,
    pub(super) refused: Option<Refused>,

    pub(super) pending_at: Duration,
    pub(super) assigned_at: Option<Duration>,
    pub(super) running_at: Option<Duration>,
    pub(super) first_trace_at: Option<Duration>,
    pub(super) updated_at: Duration,
    pub(super) last_call_at: Option<Duration>,
    /// The time tests had skipped when the last call came: nobody could have called in it.
    pub(super) skipped_then: Duration,
    pub(super) finished_at: Option<Duration>,

    pub(super) updates: u32,
    pub(super) patches: u32,
    pub(super) refused_patches: u32,
    pub(super) finals: u32,
    pub(super) patch_window: Window,
    pub(super) update_window: Window,

    /// The jobs whose artifacts it gets.
    pub(super) needs: Vec<i64>,
    pub(super) artifacts: Vec<Stored>,
    /// Somebody deleted what there was.
    pub(super) artifacts_erased: bool,

    pub(super) changed: Option<Arc<Notify>>,
}

impl fmt::Debug for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Job")
            .field("id", &self.id)
            .field("status", &self.status)
            .finish_non_exhaustive()
    }
}

impl Job {
    pub(super) fn new(id: i64, wish: NewJob, now: Duration) -> Self {
        Self {
            id,
            name: wish.name.as_str().into(),
            stage: wish.stage.as_str().into(),
            project: wish.project_path.as_str().into(),
            allow_failure: wish.allow_failure,
            reasons: wish.failure_reasons.clone(),
            status: Status::Pending,
            failure_reason: None,
            exit_code: None,
            ended_by: None,
            erased: false,
            watched: false,
            token: String::new(),
            token_expires: None,
            masked: Vec::new(),
            timeout: wish.timeout,
            runner: None,
            system_id: None,
            unacknowledged: None,
            trace: Arc::default(),
            trace_len: 0,
            crc: crc32fast::Hasher::new(),
            debug_trace: false,
            patch_told: Told::default(),
            final_update: None,
            final_told: Told::default(),
            finalising: None,
            persisted: false,
            refused: None,
            pending_at: now,
            assigned_at: None,
            running_at: None,
            first_trace_at: None,
            updated_at: now,
            last_call_at: None,
            skipped_then: Duration::ZERO,
            finished_at: None,
            updates: 0,
            patches: 0,
            refused_patches: 0,
            finals: 0,
            patch_window: Window::default(),
            update_window: Window::default(),
            needs: wish.needs.clone(),
            artifacts: Vec::new(),
            artifacts_erased: false,
            changed: None,
            wish: Some(Box::new(wish)),
        }
    }

    /// Adds bytes as they were sent, and as they are to be stored.
    pub(super) fn append(&mut self, sent: &[u8], stored: &[u8]) {
        self.crc.update(sent);
        self.trace_len += u64::try_from(sent.len()).unwrap_or(u64::MAX);
        Arc::make_mut(&mut self.trace).extend_from_slice(stored);
    }

    pub(super) fn trace_crc(&self) -> u32 {
        self.crc.clone().finalize()
    }

    /// Notes a sign of life, if the last one is old enough.
    pub(super) fn touch(&mut self, now: Duration) {
        if now.saturating_sub(self.updated_at) >= TOUCH {
            self.updated_at = now;
        }
    }

    pub(super) fn token_expired(&self, now: Duration) -> bool {
        self.token_expires.is_some_and(|at| at <= now)
    }

    pub(super) fn announce(&self) {
        if let Some(changed) = &self.changed {
            changed.notify_waiters();
        }
    }

    pub(super) fn view(&self) -> JobView {
        JobView {
            id: self.id,
            name: Arc::clone(&self.name),
            status: self.status,
            failure_reason: self.failure_reason.clone(),
            exit_code: self.exit_code,
            allow_failure: self.allow_failure,
            ended_by: self.ended_by,
            trace: Arc::clone(&self.trace),
            trace_len: self.trace_len,
            trace_crc: self.trace_crc(),
            debug_trace: self.debug_trace,
            pending_at: self.pending_at,
            assigned_at: self.assigned_at,
            running_at: self.running_at,
            first_trace_at: self.first_trace_at,
            updated_at: self.updated_at,
            last_call_at: self.last_call_at,
            finished_at: self.finished_at,
            updates: self.updates,
            patches: self.patches,
            refused_patches: self.refused_patches,
            finals: self.finals,
            final_update: self.final_update.clone(),
            // Runners are numbered from one, in the order of the list.
            runner: self.runner.and_then(|at| i64::try_from(at + 1).ok()),
            system_id: self.system_id.as_ref().map(Arc::clone),
        }
    }
}
