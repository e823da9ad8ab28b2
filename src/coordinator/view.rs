//! What tests may see of jobs and runners.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use super::new_job::NewJob;

/// The status of a job, in GitLab's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Status {
    /// Waits for a runner.
    Pending,
    /// Was handed out.
    Running,
    /// Was handed out and is to be cancelled by its runner.
    Canceling,
    /// Ended well.
    Success,
    /// Ended badly.
    Failed,
    /// Was cancelled.
    Canceled,
}

impl Status {
    /// The name on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Running => "running",
            Self::Canceling => "canceling",
            Self::Success => "success",
            Self::Failed => "failed",
            Self::Canceled => "canceled",
        }
    }

    /// Whether nothing can change any more.
    pub fn is_final(self) -> bool {
        match self {
            Self::Pending | Self::Running | Self::Canceling => false,
            Self::Success | Self::Failed | Self::Canceled => true,
        }
    }

    /// Whether the runner may make calls for the job.
    pub fn takes_calls(self) -> bool {
        match self {
            Self::Running | Self::Canceling => true,
            Self::Pending | Self::Success | Self::Failed | Self::Canceled => false,
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How many jobs are in each status.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Waiting for a runner.
    pub pending: usize,
    /// Handed out.
    pub running: usize,
    /// To be cancelled by their runner.
    pub canceling: usize,
    /// Ended well.
    pub success: usize,
    /// Ended badly.
    pub failed: usize,
    /// Cancelled.
    pub canceled: usize,
}

impl Counts {
    /// Gives the number of one status.
    pub fn of(&self, status: Status) -> usize {
        match status {
            Status::Pending => self.pending,
            Status::Running => self.running,
            Status::Canceling => self.canceling,
            Status::Success => self.success,
            Status::Failed => self.failed,
            Status::Canceled => self.canceled,
        }
    }

    pub(super) fn slot(&mut self, status: Status) -> &mut usize {
        match status {
            Status::Pending => &mut self.pending,
            Status::Running => &mut self.running,
            Status::Canceling => &mut self.canceling,
            Status::Success => &mut self.success,
            Status::Failed => &mut self.failed,
            Status::Canceled => &mut self.canceled,
        }
    }

    /// Gives the number of jobs that ended.
    pub fn finished(&self) -> usize {
        self.success + self.failed + self.canceled
    }

    /// Gives the number of jobs that wait or are at work.
    pub fn unfinished(&self) -> usize {
        self.pending + self.running + self.canceling
    }
}

/// Who ended a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndedBy {
    /// The runner, by a final update.
    Runner,
    /// A user, by a cancel that took effect at once.
    User,
    /// The coordinator: silence, timeout, trace limit, expired token, unsupported runner.
    Server,
}

/// A final update as the runner sent it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Final {
    /// `success` or `failed`.
    pub state: String,
    /// As sent.
    pub failure_reason: Option<String>,
    /// As sent.
    pub exit_code: Option<i64>,
    /// `output.checksum`.
    pub checksum: Option<String>,
    /// `output.bytesize`.
    pub bytesize: Option<u64>,
}

/// A job as it stands. Times count from the coordinator's start, on its own clock.
#[derive(Clone)]
pub struct JobView {
    /// The number.
    pub id: i64,
    /// The name.
    pub name: Arc<str>,
    /// Where it stands.
    pub status: Status,
    /// Why it failed, as GitLab would show it.
    pub failure_reason: Option<String>,
    /// The exit code as GitLab would keep it.
    pub exit_code: Option<i64>,
    /// Whether the pipeline bears the failure.
    pub allow_failure: bool,
    /// Who ended it.
    pub ended_by: Option<EndedBy>,
    /// The stored trace; empty after the end if traces are not kept.
    pub trace: Arc<Vec<u8>>,
    /// The trace's length, kept in any case.
    pub trace_len: u64,
    /// CRC-32 of the bytes as they were sent, kept in any case.
    pub trace_crc: u32,
    /// Whether the trace was declared as debug output from its beginning.
    pub debug_trace: bool,
    /// When it was put into the queue.
    pub pending_at: Duration,
    /// When it was handed out.
    pub assigned_at: Option<Duration>,
    /// When the first `running` update came.
    pub running_at: Option<Duration>,
    /// When the first trace bytes came.
    pub first_trace_at: Option<Duration>,
    /// When GitLab last noted a sign of life; at most every 15 minutes.
    pub updated_at: Duration,
    /// When the runner last made an accepted call.
    pub last_call_at: Option<Duration>,
    /// When it ended.
    pub finished_at: Option<Duration>,
    /// `running` updates.
    pub updates: u32,
    /// Accepted patches.
    pub patches: u32,
    /// Patches answered 416.
    pub refused_patches: u32,
    /// Final updates that came in, also those that were refused or answered 202.
    pub finals: u32,
    /// The first final update.
    pub final_update: Option<Final>,
    /// The number of the runner it was handed to.
    pub runner: Option<i64>,
    /// The system it was handed to.
    pub system_id: Option<Arc<str>>,
}

impl JobView {
    /// Gives the stored trace as text.
    pub fn trace_text(&self) -> String {
        String::from_utf8_lossy(&self.trace).into_owned()
    }

    /// Whether nothing can change any more.
    pub fn is_finished(&self) -> bool {
        self.status.is_final()
    }

    /// What stands for a job that does not exist.
    pub(super) fn unknown(id: i64) -> Self {
        let job = super::job::Job::new(id, NewJob::new("(no such job)"), Duration::ZERO);
        job.view()
    }
}

impl fmt::Debug for JobView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let from = self.trace.len().saturating_sub(2000);
        let tail = String::from_utf8_lossy(self.trace.get(from..).unwrap_or_default());
        f.debug_struct("JobView")
            .field("id", &self.id)
            .field("name", &self.name)
            .field("status", &self.status)
            .field("failure_reason", &self.failure_reason)
            .field("exit_code", &self.exit_code)
            .field("ended_by", &self.ended_by)
            .field("assigned_at", &self.assigned_at)
            .field("running_at", &self.running_at)
            .field("last_call_at", &self.last_call_at)
            .field("finished_at", &self.finished_at)
            .field("updates", &self.updates)
            .field("patches", &self.patches)
            .field("refused_patches", &self.refused_patches)
            .field("finals", &self.finals)
            .field("final_update", &self.final_update)
            .field("trace_len", &self.trace_len)
            .field("trace_tail", &tail)
            .finish_non_exhaustive()
    }
}

/// A runner as it stands.
#[derive(Clone, Debug)]
pub struct RunnerView {
    /// The number.
    pub id: i64,
    /// The description.
    pub description: String,
    /// Whether it is paused.
    pub paused: bool,
    /// The processes that have announced themselves.
    pub managers: Vec<ManagerView>,
}

/// A process that uses a runner's token.
#[derive(Clone, Debug)]
pub struct ManagerView {
    /// The system ID.
    pub system_id: Arc<str>,
    /// The stored version.
    pub version: Option<String>,
    /// The stored platform.
    pub platform: Option<String>,
    /// The stored executor.
    pub executor: Option<String>,
    /// The stored features that are true.
    pub features: Vec<String>,
    /// When the stored data were last written.
    pub stored_at: Duration,
    /// When it last made a call.
    pub contacted_at: Duration,
}
