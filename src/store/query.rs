//! What is read about jobs: by the sweep, and by operators.

use bridge_backend::{ExternalId, JobRef, SubmitToken};
use jiff::Timestamp;
use sqlx::Row as _;
use sqlx::sqlite::SqliteRow;

use crate::domain::id::{BackendName, CiJobId, JobId, RunnerName};
use crate::domain::job::JobState;
use crate::store::rows::{COLUMNS, Job};
use crate::store::{Store, StoreError, database};

/// How many owed jobs of a runner and backend are in a state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Count {
    /// The runner.
    pub runner: RunnerName,
    /// The backend.
    pub backend: BackendName,
    /// The state.
    pub state: JobState,
    /// How many.
    pub jobs: usize,
}

/// Which jobs an operator asks for.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Only those in one of these states; all if empty.
    pub states: Vec<JobState>,
    /// Only those that are owed work.
    pub owed: bool,
    /// Only those of this runner.
    pub runner: Option<String>,
    /// Only those of this backend.
    pub backend: Option<String>,
    /// Only those whose project's path contains this.
    pub project: Option<String>,
    /// Only those received since.
    pub since: Option<Timestamp>,
    /// At most this many, the newest.
    pub limit: Option<i64>,
}

/// A job that the backend has, as the poll needs it.
#[derive(Clone, Debug)]
pub struct Polled {
    /// Our name.
    pub id: JobId,
    /// Its names over there.
    pub job_ref: JobRef,
    /// `submitted`, `running`, or over but owed.
    pub state: JobState,
    /// What it was last known to wait for.
    pub waits_for: Option<String>,
    /// Where it runs.
    pub host: Option<String>,
    /// Since when it is missing.
    pub missing_since: Option<Timestamp>,
}

fn corrupt(row: &str, column: &'static str, reason: impl std::fmt::Display) -> StoreError {
    StoreError::Corrupt { table: "jobs", row: row.into(), column, reason: reason.to_string() }
}

/// Reads rows one by one; one that makes no sense is left out, since it must not hide the others.
fn readable<T>(rows: &[SqliteRow], read: impl Fn(&SqliteRow) -> Result<T, StoreError>) -> Vec<T> {
    let read = |row| match read(row) {
        Ok(read) => Some(read),
        Err(error) => {
            let cause = std::error::Error::source(&error).map(ToString::to_string);
            tracing::error!(%error, cause, "a job's row is damaged; it is left alone");
            None
        }
    };
    rows.iter().filter_map(read).collect()
}

fn id_of(row: &SqliteRow, name: &'static str) -> Result<JobId, StoreError> {
    let id: String = row.try_get("id").map_err(database(name))?;
    id.parse().map_err(|e| corrupt(&id, "id", e))
}

fn ref_of(row: &SqliteRow, name: &'static str, id: JobId) -> Result<JobRef, StoreError> {
    let token: String = row.try_get("submit_token").map_err(database(name))?;
    let external: String = row.try_get("external_id").map_err(database(name))?;
    let token =
        SubmitToken::parse(&token).map_err(|e| corrupt(&id.to_string(), "submit_token", e))?;
    Ok(JobRef { token, id: ExternalId(external) })
}

impl Store {
    /// Lists owed jobs whose time to be looked at has come, the longest due first.
    ///
    /// Doubtful submissions are not among them: [`Store::doubtful`] asks for all of those at once.
    ///
    /// # Errors
    ///
    /// When the database cannot be read.
    pub async fn due(&self, now: Timestamp, limit: i64) -> Result<Vec<JobId>, StoreError> {
        let rows = sqlx::query(
            "-- query::due
             SELECT id FROM jobs
             WHERE released_at IS NULL AND due_at <= ? AND state != 'submitting'
                 AND NOT (state IN ('finished', 'abandoned') AND attempted_at IS NOT NULL
                     AND external_id IS NULL)
             ORDER BY due_at LIMIT ?",
        )
        .bind(now.as_millisecond())
        .bind(limit)
        .fetch_all(&self.read)
        .await
        .map_err(database("query::due"))?;
        Ok(readable(&rows, |row| id_of(row, "query::due")))
    }

    /// Tells when the next owed job is due.
    ///
    /// # Errors
    ///
    /// When the database cannot be read.
    pub async fn next_due(&self, after: Timestamp) -> Result<Option<Timestamp>, StoreError> {
        let millis: Option<i64> = sqlx::query_scalar(
            "-- query::next_due
             SELECT due_at FROM jobs WHERE released_at IS NULL AND due_at > ?
             ORDER BY due_at LIMIT 1",
        )
        .bind(after.as_millisecond())
        .fetch_optional(&self.read)
        .await
        .map_err(database("query::next_due"))?;
        millis
            .map(|ms| Timestamp::from_millisecond(ms).map_err(|e| corrupt("?", "due_at", e)))
            .transpose()
    }

    /// Lists the jobs that a backend has and that are not known to have ended, those that GitLab no
    /// longer wants included.
    ///
    /// # Errors
    ///
    /// When the database cannot be read.
    pub async fn polled(&self, backend: &BackendName) -> Result<Vec<Polled>, StoreError> {
        let name = "query::polled";
        let rows = sqlx::query(
            "-- query::polled
             SELECT id, submit_token, external_id, state, waits_for, host, missing_since FROM jobs
             WHERE released_at IS NULL AND backend = ? AND external_id IS NOT NULL
                 AND ended_at IS NULL",
        )
        .bind(backend.0.clone())
        .fetch_all(&self.read)
        .await
        .map_err(database(name))?;
        Ok(readable(&rows, |row| {
            let id = id_of(row, name)?;
            let state: String = row.try_get("state").map_err(database(name))?;
            let missing: Option<i64> = row.try_get("missing_since").map_err(database(name))?;
            Ok(Polled {
                id,
                job_ref: ref_of(row, name, id)?,
                state: state.parse().map_err(|e| corrupt(&id.to_string(), "state", e))?,
                waits_for: row.try_get("waits_for").map_err(database(name))?,
                host: row.try_get("host").map_err(database(name))?,
                missing_since: missing
                    .map(Timestamp::from_millisecond)
                    .transpose()
                    .map_err(|e| corrupt(&id.to_string(), "missing_since", e))?,
            })
        }))
    }

    /// Lists the jobs of a backend that were attempted and whose fate is unknown, due ones only; also
    /// those that are over, which must leave nothing behind.
    ///
    /// # Errors
    ///
    /// When the database cannot be read.
    pub async fn doubtful(
        &self,
        backend: &BackendName,
        now: Timestamp,
    ) -> Result<Vec<(JobId, SubmitToken)>, StoreError> {
        let name = "query::doubtful";
        let rows = sqlx::query(
            "-- query::doubtful
             SELECT id, submit_token FROM jobs
             WHERE released_at IS NULL AND backend = ? AND due_at <= ?
                 AND (state = 'submitting'
                     OR (state IN ('finished', 'abandoned') AND attempted_at IS NOT NULL
                         AND external_id IS NULL))",
        )
        .bind(backend.0.clone())
        .bind(now.as_millisecond())
        .fetch_all(&self.read)
        .await
        .map_err(database(name))?;
        Ok(readable(&rows, |row| {
            let id = id_of(row, name)?;
            let token: String = row.try_get("submit_token").map_err(database(name))?;
            let token = SubmitToken::parse(&token)
                .map_err(|e| corrupt(&id.to_string(), "submit_token", e))?;
            Ok((id, token))
        }))
    }

    /// Lists the jobs of a backend that are to be ended over there: asked for, or no longer wanted by
    /// GitLab; and not asked of the backend since `before`.
    ///
    /// # Errors
    ///
    /// When the database cannot be read.
    pub async fn to_cancel(
        &self,
        backend: &BackendName,
        before: Timestamp,
    ) -> Result<Vec<(JobId, JobRef)>, StoreError> {
        let name = "query::to_cancel";
        let rows = sqlx::query(
            "-- query::to_cancel
             SELECT id, submit_token, external_id FROM jobs
             WHERE released_at IS NULL AND backend = ?1 AND cancel_requested_at IS NOT NULL
                 AND ended_at IS NULL AND external_id IS NOT NULL
                 AND (cancel_sent_at IS NULL OR cancel_sent_at <= ?2)",
        )
        .bind(backend.0.clone())
        .bind(before.as_millisecond())
        .fetch_all(&self.read)
        .await
        .map_err(database(name))?;
        Ok(readable(&rows, |row| {
            let id = id_of(row, name)?;
            Ok((id, ref_of(row, name, id)?))
        }))
    }

    /// Counts owed jobs by runner, backend and state.
    ///
    /// # Errors
    ///
    /// When the database cannot be read.
    pub async fn counts(&self) -> Result<Vec<Count>, StoreError> {
        let name = "query::counts";
        let rows = sqlx::query(
            "-- query::counts
             SELECT runner, backend, state, count(*) AS jobs FROM jobs WHERE released_at IS NULL
             GROUP BY runner, backend, state",
        )
        .fetch_all(&self.read)
        .await
        .map_err(database(name))?;
        rows.iter()
            .map(|row| {
                let state: String = row.try_get("state").map_err(database(name))?;
                let jobs: i64 = row.try_get("jobs").map_err(database(name))?;
                Ok(Count {
                    runner: RunnerName(row.try_get("runner").map_err(database(name))?),
                    backend: BackendName(row.try_get("backend").map_err(database(name))?),
                    state: state.parse().map_err(|e| corrupt("?", "state", e))?,
                    jobs: usize::try_from(jobs).unwrap_or(0),
                })
            })
            .collect()
    }

    /// Lists jobs for an operator, newest first.
    ///
    /// # Errors
    ///
    /// When the database cannot be read.
    pub async fn list(&self, filter: &Filter) -> Result<Vec<Job>, StoreError> {
        let name = "query::list";
        let states: Vec<&str> = filter.states.iter().map(|s| s.as_str()).collect();
        let states = serde_json::to_string(&states).map_err(|e| corrupt("?", "state", e))?;
        let sql = format!(
            "-- query::list
             SELECT {COLUMNS} FROM jobs
             WHERE (?1 = '[]' OR state IN (SELECT value FROM json_each(?1)))
                 AND (?2 = 0 OR released_at IS NULL)
                 AND (?3 IS NULL OR runner = ?3)
                 AND (?4 IS NULL OR backend = ?4)
                 AND (?5 IS NULL OR instr(project, ?5) > 0)
                 AND (?6 IS NULL OR received_at >= ?6)
             ORDER BY received_at DESC, id DESC LIMIT ?7"
        );
        let rows = sqlx::query(sqlx::AssertSqlSafe(sql))
            .bind(states)
            .bind(i64::from(filter.owed))
            .bind(filter.runner.clone())
            .bind(filter.backend.clone())
            .bind(filter.project.clone())
            .bind(filter.since.map(Timestamp::as_millisecond))
            .bind(filter.limit.unwrap_or(-1))
            .fetch_all(&self.read)
            .await
            .map_err(database(name))?;
        rows.iter().map(Job::try_from).collect()
    }

    /// Finds jobs by GitLab's number; several if several GitLabs use it.
    ///
    /// # Errors
    ///
    /// When the database cannot be read.
    pub async fn by_ci_job(&self, ci_job: CiJobId) -> Result<Vec<Job>, StoreError> {
        let sql = format!("-- query::by_ci_job\nSELECT {COLUMNS} FROM jobs WHERE ci_job = ?");
        let rows = sqlx::query(sqlx::AssertSqlSafe(sql))
            .bind(ci_job.0)
            .fetch_all(&self.read)
            .await
            .map_err(database("query::by_ci_job"))?;
        rows.iter().map(Job::try_from).collect()
    }

    /// Lists the runners and backends that owed jobs name, with one of the jobs each.
    ///
    /// # Errors
    ///
    /// When the database cannot be read.
    pub async fn owed_names(
        &self,
    ) -> Result<Vec<(RunnerName, BackendName, usize, JobId)>, StoreError> {
        let name = "query::owed_names";
        let rows = sqlx::query(
            "-- query::owed_names
             SELECT runner, backend, count(*) AS jobs, min(id) AS id FROM jobs
             WHERE released_at IS NULL GROUP BY runner, backend",
        )
        .fetch_all(&self.read)
        .await
        .map_err(database(name))?;
        rows.iter()
            .map(|row| {
                let jobs: i64 = row.try_get("jobs").map_err(database(name))?;
                Ok((
                    RunnerName(row.try_get("runner").map_err(database(name))?),
                    BackendName(row.try_get("backend").map_err(database(name))?),
                    usize::try_from(jobs).unwrap_or(0),
                    id_of(row, name)?,
                ))
            })
            .collect()
    }

    /// Sums the bytes that GitLab does not have yet.
    ///
    /// # Errors
    ///
    /// When the database cannot be read.
    pub async fn unsent_bytes(&self) -> Result<u64, StoreError> {
        let bytes: i64 = sqlx::query_scalar(
            "-- query::unsent_bytes
             SELECT coalesce(sum(trace_len - trace_sent), 0) FROM jobs WHERE released_at IS NULL",
        )
        .fetch_one(&self.read)
        .await
        .map_err(database("query::unsent_bytes"))?;
        Ok(u64::try_from(bytes).unwrap_or(0))
    }

    /// Gives the schema's version in the file.
    ///
    /// # Errors
    ///
    /// When the database cannot be read.
    pub async fn schema(&self) -> Result<i64, StoreError> {
        sqlx::query_scalar("-- query::schema\nSELECT max(version) FROM _sqlx_migrations")
            .fetch_one(&self.read)
            .await
            .map_err(database("query::schema"))
    }
}
