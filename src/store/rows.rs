//! Rows as the rest of the program sees them.

use bridge_backend::{ExternalId, JobRef, Outcome, SubmitToken, Usage};
use camino::Utf8PathBuf;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use sqlx::Row as _;
use sqlx::sqlite::SqliteRow;

use crate::domain::id::{BackendName, CiJobId, JobId, RunnerName};
use crate::domain::job::JobState;
use crate::domain::verdict::Verdict;
use crate::store::StoreError;

/// Who asked for a job's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CancelBy {
    /// A user, in GitLab.
    Gitlab,
    /// `bridge jobs cancel`.
    Operator,
    /// The job's own timeout.
    Deadline,
}

impl CancelBy {
    /// Gives the word in the database.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Gitlab => "gitlab",
            Self::Operator => "operator",
            Self::Deadline => "deadline",
        }
    }
}

/// How a job ended over there, as noted when it was seen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndedOutcome {
    /// How; `None` when the backend has no record of it.
    pub outcome: Option<Outcome>,
    /// What it used.
    #[serde(default)]
    pub usage: Usage,
}

/// A job's row: everything but its payload.
///
/// `state` is changed by [`crate::store::Store::transition`] alone; the other fields are facts, written
/// back by it and by [`crate::store::Store::save`].
#[derive(Clone, Debug)]
pub struct Job {
    /// Our name for it.
    pub id: JobId,
    /// The runner that took it.
    pub runner: RunnerName,
    /// The GitLab it came from.
    pub ci_url: String,
    /// GitLab's number for it.
    pub ci_job: CiJobId,
    /// Its pipeline.
    pub ci_pipeline: i64,
    /// Its project.
    pub project_id: i64,
    /// Its project's path.
    pub project: String,
    /// Its name in the pipeline.
    pub name: String,
    /// The backend it goes to.
    pub backend: BackendName,
    /// Where it is.
    pub state: JobState,
    /// Our name for its one submission.
    pub submit_token: Option<SubmitToken>,
    /// The backend's name for it.
    pub external_id: Option<ExternalId>,
    /// How it ended over there.
    pub outcome: Option<EndedOutcome>,
    /// What GitLab is told.
    pub verdict: Option<Verdict>,
    /// When we took it.
    pub received_at: Timestamp,
    /// When GitLab's timeout ends it.
    pub deadline_at: Timestamp,
    /// When it came into its state.
    pub state_at: Timestamp,
    /// When it was last tried to submit it.
    pub attempted_at: Option<Timestamp>,
    /// When the first process after the one that attempted it started; absence counts from there.
    pub doubted_at: Option<Timestamp>,
    /// When the backend was known to have it.
    pub submitted_at: Option<Timestamp>,
    /// When it was seen to have started.
    pub started_at: Option<Timestamp>,
    /// When it was seen to have ended.
    pub ended_at: Option<Timestamp>,
    /// When the backend last said something new.
    pub observed_at: Option<Timestamp>,
    /// Since when good answers of the backend have left it out.
    pub missing_since: Option<Timestamp>,
    /// When GitLab last accepted a word about it.
    pub ci_confirmed_at: Option<Timestamp>,
    /// When its end was asked for.
    pub cancel_requested_at: Option<Timestamp>,
    /// By whom.
    pub cancel_requested_by: Option<CancelBy>,
    /// When the backend was last asked to end it.
    pub cancel_sent_at: Option<Timestamp>,
    /// When its caches were kept, or it was seen that there was none to keep.
    pub cached_at: Option<Timestamp>,
    /// When nothing of it was left to bring home and its trace was complete.
    pub brought_at: Option<Timestamp>,
    /// When nothing was left to do.
    pub released_at: Option<Timestamp>,
    /// The machine it runs on.
    pub host: Option<String>,
    /// Why it waits, in the backend's words, or our last error.
    pub waits_for: Option<String>,
    /// Bytes of the backend's log that the spool accounts for.
    pub log_offset: u64,
    /// Whether the log's end was reached.
    pub log_ended: bool,
    /// How the next byte of the log goes on, JSON.
    pub trace_carry: Option<String>,
    /// Bytes durable in the spool.
    pub trace_len: u64,
    /// Bytes that GitLab has.
    pub trace_sent: u64,
    /// Bytes were lost; no checksum can be given.
    pub trace_hole: bool,
    /// How often GitLab wants news, milliseconds.
    pub trace_interval: u64,
    /// `CI_CONCURRENT_ID`.
    pub slot: u32,
    /// `CI_CONCURRENT_PROJECT_ID`.
    pub project_slot: u32,
    /// The checkout.
    pub workspace: Option<Utf8PathBuf>,
    /// When to look again.
    pub due_at: Timestamp,
    /// Failures in a row.
    pub failures: u32,
}

impl Job {
    /// Gives both of its names, once the backend has it.
    pub fn job_ref(&self) -> Option<JobRef> {
        Some(JobRef { token: self.submit_token.clone()?, id: self.external_id.clone()? })
    }
}

/// The columns of [`Job`], in the order of the table.
pub(in crate::store) const COLUMNS: &str = "id, runner, ci_url, ci_job, ci_pipeline, project_id, \
     project, name, backend, state, submit_token, external_id, outcome, verdict, received_at, \
     deadline_at, state_at, attempted_at, submitted_at, started_at, ended_at, observed_at, missing_since, \
     ci_confirmed_at, cancel_requested_at, cancel_requested_by, cancel_sent_at, released_at, host, \
     waits_for, log_offset, log_ended, trace_carry, trace_len, trace_sent, trace_hole, \
     trace_interval, slot, project_slot, workspace, due_at, failures, doubted_at, \
     cached_at, brought_at";

struct Reader<'r> {
    row: &'r SqliteRow,
    id: String,
}

impl Reader<'_> {
    fn corrupt(&self, column: &'static str, reason: impl std::fmt::Display) -> StoreError {
        StoreError::Corrupt {
            table: "jobs",
            row: self.id.clone(),
            column,
            reason: reason.to_string(),
        }
    }

    fn text(&self, column: &'static str) -> Result<String, StoreError> {
        self.row.try_get(column).map_err(|e| self.corrupt(column, e))
    }

    fn maybe_text(&self, column: &'static str) -> Result<Option<String>, StoreError> {
        self.row.try_get(column).map_err(|e| self.corrupt(column, e))
    }

    fn number(&self, column: &'static str) -> Result<i64, StoreError> {
        self.row.try_get(column).map_err(|e| self.corrupt(column, e))
    }

    fn count<T: TryFrom<i64>>(&self, column: &'static str) -> Result<T, StoreError> {
        T::try_from(self.number(column)?).map_err(|_range| self.corrupt(column, "out of range"))
    }

    fn time(&self, column: &'static str) -> Result<Timestamp, StoreError> {
        Timestamp::from_millisecond(self.number(column)?).map_err(|e| self.corrupt(column, e))
    }

    fn maybe_time(&self, column: &'static str) -> Result<Option<Timestamp>, StoreError> {
        let millis: Option<i64> = self.row.try_get(column).map_err(|e| self.corrupt(column, e))?;
        millis
            .map(|ms| Timestamp::from_millisecond(ms).map_err(|e| self.corrupt(column, e)))
            .transpose()
    }

    fn maybe_json<T: for<'de> Deserialize<'de>>(
        &self,
        column: &'static str,
    ) -> Result<Option<T>, StoreError> {
        self.maybe_text(column)?
            .map(|text| serde_json::from_str(&text).map_err(|e| self.corrupt(column, e)))
            .transpose()
    }
}

impl TryFrom<&SqliteRow> for Job {
    type Error = StoreError;

    fn try_from(row: &SqliteRow) -> Result<Self, StoreError> {
        let id: String = row.try_get("id").map_err(|e| StoreError::Corrupt {
            table: "jobs",
            row: "?".into(),
            column: "id",
            reason: e.to_string(),
        })?;
        let r = Reader { row, id: id.clone() };
        let token = r.maybe_text("submit_token")?;
        Ok(Self {
            id: id.parse().map_err(|e| r.corrupt("id", e))?,
            runner: RunnerName(r.text("runner")?),
            ci_url: r.text("ci_url")?,
            ci_job: CiJobId(r.number("ci_job")?),
            ci_pipeline: r.number("ci_pipeline")?,
            project_id: r.number("project_id")?,
            project: r.text("project")?,
            name: r.text("name")?,
            backend: BackendName(r.text("backend")?),
            state: r.text("state")?.parse().map_err(|e| r.corrupt("state", e))?,
            submit_token: token
                .map(|t| SubmitToken::parse(&t).map_err(|e| r.corrupt("submit_token", e)))
                .transpose()?,
            external_id: r.maybe_text("external_id")?.map(ExternalId),
            outcome: r.maybe_json("outcome")?,
            verdict: r.maybe_json("verdict")?,
            received_at: r.time("received_at")?,
            deadline_at: r.time("deadline_at")?,
            state_at: r.time("state_at")?,
            attempted_at: r.maybe_time("attempted_at")?,
            doubted_at: r.maybe_time("doubted_at")?,
            submitted_at: r.maybe_time("submitted_at")?,
            started_at: r.maybe_time("started_at")?,
            ended_at: r.maybe_time("ended_at")?,
            observed_at: r.maybe_time("observed_at")?,
            missing_since: r.maybe_time("missing_since")?,
            ci_confirmed_at: r.maybe_time("ci_confirmed_at")?,
            cancel_requested_at: r.maybe_time("cancel_requested_at")?,
            cancel_requested_by: r
                .maybe_text("cancel_requested_by")?
                .map(|word| match word.as_str() {
                    "gitlab" => Ok(CancelBy::Gitlab),
                    "operator" => Ok(CancelBy::Operator),
                    "deadline" => Ok(CancelBy::Deadline),
                    other => Err(r.corrupt("cancel_requested_by", other)),
                })
                .transpose()?,
            cancel_sent_at: r.maybe_time("cancel_sent_at")?,
            cached_at: r.maybe_time("cached_at")?,
            brought_at: r.maybe_time("brought_at")?,
            released_at: r.maybe_time("released_at")?,
            host: r.maybe_text("host")?,
            waits_for: r.maybe_text("waits_for")?,
            log_offset: r.count("log_offset")?,
            log_ended: r.number("log_ended")? != 0,
            trace_carry: r.maybe_text("trace_carry")?,
            trace_len: r.count("trace_len")?,
            trace_sent: r.count("trace_sent")?,
            trace_hole: r.number("trace_hole")? != 0,
            trace_interval: r.count("trace_interval")?,
            slot: r.count("slot")?,
            project_slot: r.count("project_slot")?,
            workspace: r.maybe_text("workspace")?.map(Utf8PathBuf::from),
            due_at: r.time("due_at")?,
            failures: r.count("failures")?,
        })
    }
}
