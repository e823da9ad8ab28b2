//! What is known of a job's artifacts on their way to GitLab.

use jiff::Timestamp;
use sqlx::Row as _;
use sqlx::sqlite::SqliteRow;

use crate::domain::id::JobId;
use crate::store::jobs::update;
use crate::store::rows::Job;
use crate::store::{Store, StoreError, database};

/// One artifact on its way.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Upload {
    /// Its place among the payload's artifacts.
    pub entry: usize,
    /// What must be known to upload the packed file, JSON; there once that file is whole on disk.
    pub packed: Option<String>,
    /// When it was packed.
    pub packed_at: Option<Timestamp>,
    /// How often GitLab was asked to take it and did not.
    pub tries: u32,
    /// Attempts in a row that nobody answered.
    pub silent: u32,
    /// When GitLab had it, or it was given up.
    pub settled_at: Option<Timestamp>,
    /// Why it was given up.
    pub problem: Option<String>,
}

fn corrupt(job: JobId, column: &'static str, reason: impl std::fmt::Display) -> StoreError {
    StoreError::Corrupt {
        table: "uploads",
        row: job.to_string(),
        column,
        reason: reason.to_string(),
    }
}

fn upload_of(row: &SqliteRow, job: JobId) -> Result<Upload, StoreError> {
    let name = "uploads::of";
    let number = |column: &'static str| -> Result<i64, StoreError> {
        row.try_get(column).map_err(database(name))
    };
    let count = |column: &'static str| -> Result<u32, StoreError> {
        u32::try_from(number(column)?).map_err(|e| corrupt(job, column, e))
    };
    let time = |column: &'static str| -> Result<Option<Timestamp>, StoreError> {
        let at: Option<i64> = row.try_get(column).map_err(database(name))?;
        at.map(Timestamp::from_millisecond).transpose().map_err(|e| corrupt(job, column, e))
    };
    Ok(Upload {
        entry: usize::try_from(number("entry")?).map_err(|e| corrupt(job, "entry", e))?,
        packed: row.try_get("packed").map_err(database(name))?,
        packed_at: time("packed_at")?,
        tries: count("tries")?,
        silent: count("silent")?,
        settled_at: time("settled_at")?,
        problem: row.try_get("problem").map_err(database(name))?,
    })
}

impl Store {
    /// Lists what is known of a job's artifacts, in the order of the payload.
    ///
    /// # Errors
    ///
    /// When the database cannot be read.
    pub async fn uploads(&self, job: JobId) -> Result<Vec<Upload>, StoreError> {
        let rows = sqlx::query(
            "-- uploads::of
             SELECT entry, packed, packed_at, tries, silent, settled_at, problem FROM uploads
             WHERE job = ? ORDER BY entry",
        )
        .bind(job.to_string())
        .fetch_all(&self.read)
        .await
        .map_err(database("uploads::of"))?;
        rows.iter().map(|row| upload_of(row, job)).collect()
    }

    /// Notes what has become of one artifact, together with the job's facts: what the trace says of it
    /// and what is known of it are the same after a crash.
    ///
    /// # Errors
    ///
    /// `Conflict` when somebody else moved the job.
    pub async fn note_upload(&self, job: &Job, upload: Upload) -> Result<(), StoreError> {
        let entry = i64::try_from(upload.entry).map_err(|e| corrupt(job.id, "entry", e))?;
        let job = job.clone();
        self.write("uploads::note", move |c| {
            Box::pin(async move {
                update(c, "uploads::note", &job, job.state).await?;
                sqlx::query(
                    "-- uploads::note
                     INSERT INTO uploads
                         (job, entry, packed, packed_at, tries, silent, settled_at, problem)
                     VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)
                     ON CONFLICT (job, entry) DO UPDATE SET packed = ?3, packed_at = ?4, tries = ?5,
                         silent = ?6, settled_at = ?7, problem = ?8",
                )
                .bind(job.id.to_string())
                .bind(entry)
                .bind(upload.packed)
                .bind(upload.packed_at.map(Timestamp::as_millisecond))
                .bind(i64::from(upload.tries))
                .bind(i64::from(upload.silent))
                .bind(upload.settled_at.map(Timestamp::as_millisecond))
                .bind(upload.problem)
                .execute(c)
                .await
                .map_err(database("uploads::note"))?;
                Ok(())
            })
        })
        .await
    }
}
