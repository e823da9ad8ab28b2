//! The audit log: what happened to a job, when, and by whom.

use jiff::Timestamp;
use serde::Serialize;
use sqlx::Row as _;
use sqlx::sqlite::SqliteConnection;

use crate::domain::id::JobId;
use crate::store::{Store, StoreError, database};

/// Who did it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Actor {
    /// The loop that requests jobs.
    Agent,
    /// The loop that moves them on.
    Reconciler,
    /// Somebody at a terminal.
    Operator,
}

impl Actor {
    /// Gives the word in the database.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Agent => "agent",
            Self::Reconciler => "reconciler",
            Self::Operator => "operator",
        }
    }
}

/// One line of a job's history.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct EventRow {
    /// When.
    pub at: Timestamp,
    /// By whom.
    pub actor: String,
    /// What.
    pub event: String,
    /// More, for people; never a secret.
    pub detail: Option<String>,
}

/// Appends one line, within the caller's transaction.
pub(in crate::store) async fn append(
    connection: &mut SqliteConnection,
    job: JobId,
    at: Timestamp,
    actor: Actor,
    event: &str,
    detail: Option<&str>,
) -> Result<(), StoreError> {
    sqlx::query(
        "-- events::append
         INSERT INTO job_events (job, seq, at, actor, event, detail)
         SELECT ?1, 1 + coalesce(max(seq), 0), ?2, ?3, ?4, ?5 FROM job_events WHERE job = ?1",
    )
    .bind(job.to_string())
    .bind(at.as_millisecond())
    .bind(actor.as_str())
    .bind(event)
    .bind(detail)
    .execute(connection)
    .await
    .map_err(database("events::append"))?;
    Ok(())
}

impl Store {
    /// Reads a job's history, oldest first.
    ///
    /// # Errors
    ///
    /// When the database cannot be read.
    pub async fn events(&self, job: JobId) -> Result<Vec<EventRow>, StoreError> {
        let rows = sqlx::query(
            "-- events::of
             SELECT at, actor, event, detail FROM job_events WHERE job = ? ORDER BY seq",
        )
        .bind(job.to_string())
        .fetch_all(&self.read)
        .await
        .map_err(database("events::of"))?;
        rows.iter()
            .map(|row| {
                let at: i64 = row.try_get("at").map_err(database("events::of"))?;
                Ok(EventRow {
                    at: Timestamp::from_millisecond(at).map_err(|e| StoreError::Corrupt {
                        table: "job_events",
                        row: job.to_string(),
                        column: "at",
                        reason: e.to_string(),
                    })?,
                    actor: row.try_get("actor").map_err(database("events::of"))?,
                    event: row.try_get("event").map_err(database("events::of"))?,
                    detail: row.try_get("detail").map_err(database("events::of"))?,
                })
            })
            .collect()
    }
}
