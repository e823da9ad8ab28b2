//! What is written about jobs.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use jiff::Timestamp;
use sqlx::Row as _;
use sqlx::sqlite::{SqliteArguments, SqliteConnection};

use crate::domain::id::{BackendName, CiJobId, JobId, RunnerName};
use crate::domain::job::{Event, JobState};
use crate::gitlab::wire::Secret;
use crate::store::events::{self, Actor};
use crate::store::rows::{COLUMNS, CancelBy, Job};
use crate::store::{Store, StoreError, database, sealed};

/// A job as the agent received it.
#[derive(Clone, Debug)]
pub struct NewJob {
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
    /// When we took it.
    pub received_at: Timestamp,
    /// When GitLab's timeout ends it.
    pub deadline_at: Timestamp,
    /// The answer's body, as it came.
    pub payload: Secret,
}

/// What became of a job that was handed in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// It is a row now.
    New,
    /// It was one already: GitLab handed out the same job twice.
    Known,
}

type Query<'q> = sqlx::query::Query<'q, sqlx::Sqlite, SqliteArguments>;

fn millis(time: Option<Timestamp>) -> Option<i64> {
    time.map(Timestamp::as_millisecond)
}

fn json<T: serde::Serialize>(value: Option<&T>) -> Result<Option<String>, StoreError> {
    value
        .map(|value| {
            serde_json::to_string(value).map_err(|e| StoreError::Corrupt {
                table: "jobs",
                row: "?".into(),
                column: "json",
                reason: e.to_string(),
            })
        })
        .transpose()
}

/// Sizes fit: no trace or log has 2^63 bytes.
fn size(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

/// Writes all facts and perhaps a new state, guarded by the state the row was read in.
///
/// A cancellation may have been noted by another process since the row was read; a fact that is there
/// is never taken back.
pub(in crate::store) async fn update(
    connection: &mut SqliteConnection,
    name: &'static str,
    job: &Job,
    from: JobState,
) -> Result<(), StoreError> {
    let query: Query<'_> = sqlx::query(
        "-- jobs::update
         UPDATE jobs SET state = ?3, submit_token = ?4, external_id = ?5, outcome = ?6, verdict = ?7,
             state_at = ?8, attempted_at = ?9, started_at = ?10, ended_at = ?11, observed_at = ?12,
             missing_since = ?13, ci_confirmed_at = ?14,
             cancel_requested_at = coalesce(cancel_requested_at, ?15),
             cancel_requested_by = coalesce(cancel_requested_by, ?16),
             cancel_sent_at = coalesce(cancel_sent_at, ?17),
             released_at = ?18, host = ?19, waits_for = ?20, log_offset = ?21, log_ended = ?22,
             trace_carry = ?23, trace_len = ?24, trace_sent = ?25, trace_hole = ?26,
             trace_interval = ?27, workspace = ?28, due_at = ?29, failures = ?30,
             submitted_at = ?31, doubted_at = ?32, cached_at = ?33, brought_at = ?34
         WHERE id = ?1 AND state = ?2",
    );
    let done = query
        .bind(job.id.to_string())
        .bind(from.as_str())
        .bind(job.state.as_str())
        .bind(job.submit_token.as_ref().map(|t| t.as_str().to_owned()))
        .bind(job.external_id.as_ref().map(|id| id.0.clone()))
        .bind(json(job.outcome.as_ref())?)
        .bind(json(job.verdict.as_ref())?)
        .bind(job.state_at.as_millisecond())
        .bind(millis(job.attempted_at))
        .bind(millis(job.started_at))
        .bind(millis(job.ended_at))
        .bind(millis(job.observed_at))
        .bind(millis(job.missing_since))
        .bind(millis(job.ci_confirmed_at))
        .bind(millis(job.cancel_requested_at))
        .bind(job.cancel_requested_by.map(CancelBy::as_str))
        .bind(millis(job.cancel_sent_at))
        .bind(millis(job.released_at))
        .bind(job.host.clone())
        .bind(job.waits_for.clone())
        .bind(size(job.log_offset))
        .bind(i64::from(job.log_ended))
        .bind(job.trace_carry.clone())
        .bind(size(job.trace_len))
        .bind(size(job.trace_sent))
        .bind(i64::from(job.trace_hole))
        .bind(size(job.trace_interval))
        .bind(job.workspace.as_ref().map(|p| p.as_str().to_owned()))
        .bind(job.due_at.as_millisecond())
        .bind(i64::from(job.failures))
        .bind(millis(job.submitted_at))
        .bind(millis(job.doubted_at))
        .bind(millis(job.cached_at))
        .bind(millis(job.brought_at))
        .execute(&mut *connection)
        .await
        .map_err(database(name))?;
    if done.rows_affected() == 1 {
        Ok(())
    } else {
        Err(StoreError::Conflict { job: job.id.to_string(), expected: from.as_str() })
    }
}

impl Store {
    /// Notes a job that GitLab gave us: the first thing that happens after the answer.
    ///
    /// Gives it the smallest free slots. When this returns, the job survives anything.
    ///
    /// # Errors
    ///
    /// When the database does not take it.
    pub async fn receive(&self, new: NewJob) -> Result<Received, StoreError> {
        let hints = Arc::clone(&self.slots);
        // Before it stands in line: nobody else's write waits for it.
        let row = new.id.to_string();
        let sealed = self
            .keys
            .seal(sealed::payload_of(&row), new.payload.expose().as_bytes())
            .map_err(|source| sealed::unsealable(&row, source))?;
        self.write("jobs::receive", move |c| {
            Box::pin(async move { receive(c, &new, sealed, &hints).await })
        })
        .await
    }

    /// Moves a job to the state after `event`, writing its facts and a line of its history.
    ///
    /// `job` is as it was read, with its facts changed; its state is set here. When the job is over its
    /// payload is removed in the same transaction.
    ///
    /// # Errors
    ///
    /// `Illegal` when the job cannot make this transition, `Conflict` when somebody else moved it.
    pub async fn transition(
        &self,
        job: &mut Job,
        event: Event,
        at: Timestamp,
        detail: Option<String>,
    ) -> Result<(), StoreError> {
        let from = job.state;
        let to = from.after(event)?;
        let mut next = job.clone();
        next.state = to;
        next.state_at = at;
        let written = next.clone();
        self.write("jobs::transition", move |c| {
            Box::pin(async move {
                update(c, "jobs::transition", &written, from).await?;
                if to.is_over() {
                    purge_payload(c, written.id).await?;
                }
                events::append(
                    c,
                    written.id,
                    at,
                    Actor::Reconciler,
                    event.as_str(),
                    detail.as_deref(),
                )
                .await
            })
        })
        .await?;
        tracing::info!(
            job = %job.id, ci_job = %job.ci_job, runner = %job.runner, backend = %job.backend,
            from = %from, to = %to, "job state changed"
        );
        *job = next;
        Ok(())
    }

    /// Writes a job's facts; its state stays.
    ///
    /// # Errors
    ///
    /// `Conflict` when somebody else moved it.
    pub async fn save(&self, job: &Job) -> Result<(), StoreError> {
        let job = job.clone();
        self.write("jobs::save", move |c| {
            Box::pin(async move { update(c, "jobs::save", &job, job.state).await })
        })
        .await
    }

    /// Writes a job's facts with a line of its history.
    ///
    /// # Errors
    ///
    /// `Conflict` when somebody else moved it.
    pub async fn note(
        &self,
        job: &Job,
        event: &'static str,
        at: Timestamp,
        detail: Option<String>,
    ) -> Result<(), StoreError> {
        let (noted, job) = (job.clone(), job.clone());
        self.write("jobs::note", move |c| {
            Box::pin(async move {
                update(c, "jobs::note", &job, job.state).await?;
                events::append(c, job.id, at, Actor::Reconciler, event, detail.as_deref()).await
            })
        })
        .await?;
        if noted.released_at.is_some() {
            self.slots.freed(&noted);
        }
        Ok(())
    }

    /// Notes that jobs were asked to end over there.
    ///
    /// # Errors
    ///
    /// When the database does not take it.
    pub async fn cancel_sent(&self, jobs: Vec<JobId>, at: Timestamp) -> Result<(), StoreError> {
        self.write("jobs::cancel_sent", move |c| {
            Box::pin(async move {
                for job in jobs {
                    let first = sqlx::query_scalar::<_, Option<i64>>(
                        "-- jobs::cancel_sent_before
                         SELECT cancel_sent_at FROM jobs WHERE id = ?",
                    )
                    .bind(job.to_string())
                    .fetch_optional(&mut *c)
                    .await
                    .map_err(database("jobs::cancel_sent_before"))?;
                    sqlx::query(
                        "-- jobs::cancel_sent
                         UPDATE jobs SET cancel_sent_at = ? WHERE id = ?",
                    )
                    .bind(at.as_millisecond())
                    .bind(job.to_string())
                    .execute(&mut *c)
                    .await
                    .map_err(database("jobs::cancel_sent"))?;
                    if first == Some(None) {
                        events::append(c, job, at, Actor::Reconciler, "cancel_sent", None).await?;
                    }
                }
                Ok(())
            })
        })
        .await
    }

    /// Notes an operator's wish that a job end; the daemon's next sweep acts on it.
    ///
    /// Gives `false` when the job is over or its end was asked for already.
    ///
    /// # Errors
    ///
    /// When the database does not take it.
    pub async fn request_cancel(&self, job: JobId, at: Timestamp) -> Result<bool, StoreError> {
        self.write("jobs::request_cancel", move |c| {
            Box::pin(async move {
                let done = sqlx::query(
                    "-- jobs::request_cancel
                     UPDATE jobs SET cancel_requested_at = ?1, cancel_requested_by = 'operator',
                         due_at = ?1
                     WHERE id = ?2 AND cancel_requested_at IS NULL
                         AND state NOT IN ('reporting', 'finished', 'abandoned')",
                )
                .bind(at.as_millisecond())
                .bind(job.to_string())
                .execute(&mut *c)
                .await
                .map_err(database("jobs::request_cancel"))?;
                let asked = done.rows_affected() == 1;
                if asked {
                    events::append(c, job, at, Actor::Operator, "cancel_requested", None).await?;
                }
                Ok(asked)
            })
        })
        .await
    }

    /// Removes jobs that nothing is owed to and that were received before `before`, at most `limit`.
    ///
    /// Gives their ids, whose spools can go.
    ///
    /// # Errors
    ///
    /// When the database does not take it.
    pub async fn prune(&self, before: Timestamp, limit: i64) -> Result<Vec<JobId>, StoreError> {
        self.write("jobs::prune", move |c| {
            Box::pin(async move {
                let rows = sqlx::query(
                    "-- jobs::prune
                     DELETE FROM jobs WHERE id IN (SELECT id FROM jobs
                         WHERE released_at IS NOT NULL AND received_at < ? LIMIT ?)
                     RETURNING id",
                )
                .bind(before.as_millisecond())
                .bind(limit)
                .fetch_all(&mut *c)
                .await
                .map_err(database("jobs::prune"))?;
                rows.iter()
                    .map(|row| {
                        let id: String = row.try_get("id").map_err(database("jobs::prune"))?;
                        id.parse().map_err(|e: crate::domain::id::InvalidJobId| {
                            StoreError::Corrupt {
                                table: "jobs",
                                row: id.clone(),
                                column: "id",
                                reason: e.to_string(),
                            }
                        })
                    })
                    .collect()
            })
        })
        .await
    }

    /// Reads a job.
    ///
    /// # Errors
    ///
    /// When the database cannot be read.
    pub async fn job(&self, id: JobId) -> Result<Option<Job>, StoreError> {
        let sql = format!("-- jobs::get\nSELECT {COLUMNS} FROM jobs WHERE id = ?");
        sqlx::query(sqlx::AssertSqlSafe(sql))
            .bind(id.to_string())
            .fetch_optional(&self.read)
            .await
            .map_err(database("jobs::get"))?
            .as_ref()
            .map(Job::try_from)
            .transpose()
    }

    /// Reads a job's payload, as GitLab sent it; `None` once the job is over.
    ///
    /// # Errors
    ///
    /// When the database cannot be read, or the payload was sealed with a key that this store lacks.
    pub async fn payload(&self, id: JobId) -> Result<Option<Secret>, StoreError> {
        let sealed: Option<Vec<u8>> = sqlx::query_scalar(
            "-- jobs::payload
             SELECT sealed FROM payloads WHERE job = ?",
        )
        .bind(id.to_string())
        .fetch_optional(&self.read)
        .await
        .map_err(database("jobs::payload"))?;
        sealed.map(|sealed| sealed::open_payload(&self.keys, id, sealed)).transpose()
    }
}

async fn receive(
    c: &mut SqliteConnection,
    new: &NewJob,
    sealed: Vec<u8>,
    hints: &SlotHints,
) -> Result<Received, StoreError> {
    let slot = free_slot(c, new, hints, None).await?;
    let project_slot = free_slot(c, new, hints, Some(new.project_id)).await?;
    let done = sqlx::query(
        "-- jobs::receive
         INSERT INTO jobs (id, runner, ci_url, ci_job, ci_pipeline, project_id, project, name,
             backend, state, received_at, deadline_at, state_at, due_at, slot, project_slot)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, 'received', ?10, ?11, ?10, ?10, ?12, ?13)
         ON CONFLICT (ci_url, ci_job) DO NOTHING",
    )
    .bind(new.id.to_string())
    .bind(new.runner.0.clone())
    .bind(new.ci_url.clone())
    .bind(new.ci_job.0)
    .bind(new.ci_pipeline)
    .bind(new.project_id)
    .bind(new.project.clone())
    .bind(new.name.clone())
    .bind(new.backend.0.clone())
    .bind(new.received_at.as_millisecond())
    .bind(new.deadline_at.as_millisecond())
    .bind(slot)
    .bind(project_slot)
    .execute(&mut *c)
    .await
    .map_err(database("jobs::receive"))?;
    if done.rows_affected() == 0 {
        hints.give_back(&(new.runner.0.clone(), None), slot);
        hints.give_back(&(new.runner.0.clone(), Some(new.project_id)), project_slot);
        return Ok(Received::Known);
    }
    sqlx::query(
        "-- jobs::receive_payload
         INSERT INTO payloads (job, sealed) VALUES (?, ?)",
    )
    .bind(new.id.to_string())
    .bind(sealed)
    .execute(&mut *c)
    .await
    .map_err(database("jobs::receive_payload"))?;
    events::append(c, new.id, new.received_at, Actor::Agent, "received", None).await?;
    Ok(Received::New)
}

/// How many slots are looked at in one query.
const SLOTS_AT_ONCE: usize = 64;

/// Below which numbers there is no free slot; so that the thousandth job does not look at all before it.
///
/// A hint and no more: too low costs a longer look, too high a larger number, and a number that is in
/// use is never given.
#[derive(Debug, Default)]
pub(in crate::store) struct SlotHints(Mutex<HashMap<(String, Option<i64>), i64>>);

impl SlotHints {
    fn map(&self) -> MutexGuard<'_, HashMap<(String, Option<i64>), i64>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn freed(&self, job: &Job) {
        self.give_back(&(job.runner.0.clone(), None), i64::from(job.slot));
        let of_project = (job.runner.0.clone(), Some(job.project_id));
        self.give_back(&of_project, i64::from(job.project_slot));
    }

    fn give_back(&self, key: &(String, Option<i64>), slot: i64) {
        if let Some(hint) = self.map().get_mut(key) {
            *hint = (*hint).min(slot);
        }
    }
}

/// Finds the smallest slot number that no owed job of the runner (and project) has.
async fn free_slot(
    c: &mut SqliteConnection,
    new: &NewJob,
    hints: &SlotHints,
    project: Option<i64>,
) -> Result<i64, StoreError> {
    let key = (new.runner.0.clone(), project);
    let mut free = hints.map().get(&key).copied().unwrap_or(0);
    loop {
        let query = match project {
            Some(project) => sqlx::query_scalar(
                "-- jobs::project_slots
                 SELECT project_slot FROM jobs
                 WHERE released_at IS NULL AND runner = ? AND project_id = ? AND project_slot >= ?
                 ORDER BY project_slot LIMIT ?",
            )
            .bind(new.runner.0.clone())
            .bind(project),
            None => sqlx::query_scalar(
                "-- jobs::slots
                 SELECT slot FROM jobs
                 WHERE released_at IS NULL AND runner = ? AND slot >= ? ORDER BY slot LIMIT ?",
            )
            .bind(new.runner.0.clone()),
        };
        let used: Vec<i64> = query
            .bind(free)
            .bind(i64::try_from(SLOTS_AT_ONCE).unwrap_or(i64::MAX))
            .fetch_all(&mut *c)
            .await
            .map_err(database("jobs::free_slot"))?;
        let gap = used.iter().zip(free..).position(|(slot, wanted)| *slot > wanted);
        let taken = gap.unwrap_or(used.len());
        free += i64::try_from(taken).unwrap_or(0);
        if gap.is_some() || used.len() < SLOTS_AT_ONCE {
            hints.map().insert(key, free + 1);
            return Ok(free);
        }
    }
}

async fn purge_payload(c: &mut SqliteConnection, job: JobId) -> Result<(), StoreError> {
    sqlx::query(
        "-- jobs::purge_payload
         DELETE FROM payloads WHERE job = ?",
    )
    .bind(job.to_string())
    .execute(&mut *c)
    .await
    .map_err(database("jobs::purge_payload"))?;
    // Names of artifacts may have been made of variables.
    sqlx::query(
        "-- jobs::purge_uploads
         DELETE FROM uploads WHERE job = ?",
    )
    .bind(job.to_string())
    .execute(c)
    .await
    .map_err(database("jobs::purge_uploads"))?;
    Ok(())
}
