//! The jobs' only memory, and the only SQL in the program.
//!
//! One connection writes; everybody else reads through a pool that cannot write. Writes are closures
//! that the writer runs one after the other, each in a savepoint of its own; those that wait together
//! are committed together, so that a burst of jobs costs one `fsync`, and none is acknowledged before
//! it. Knows states and guards; does not know why anything happens.

mod events;
mod jobs;
mod keyring;
mod lock;
mod open;
mod query;
mod rows;
mod sealed;
#[cfg(test)]
mod tests;
mod uploads;
mod writer;

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use camino::{Utf8Path, Utf8PathBuf};
use futures_util::future::BoxFuture;
use sqlx::sqlite::{SqliteConnection, SqlitePool};
use tokio::sync::mpsc;

use self::open::make_private_file;
use self::writer::{Counters, OperationBox};

pub use crate::store::events::{Actor, EventRow};
pub use crate::store::jobs::{NewJob, Received};
pub use crate::store::keyring::{KeyFileError, KeyId, Keyring, SealError};
pub use crate::store::lock::{Lock, LockError, network_file_system_of};
pub use crate::store::open::{OpenError, database_path, known_schema};
pub use crate::store::query::{Count, Filter, Polled};
pub use crate::store::rows::{CancelBy, EndedOutcome, Job};
pub use crate::store::sealed::{LostRows, RekeyError, Rekeyed, Wanted, rekey};
pub use crate::store::uploads::Upload;

/// How long a write waits for another process, such as `bridge jobs cancel`, to finish its own.
const BUSY_TIMEOUT: Duration = Duration::from_secs(10);

/// Why the store could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The database is unavailable: locked, full, read-only, broken.
    #[error("use the database ({name})")]
    Database {
        /// The statement.
        name: &'static str,
        /// What SQLite says.
        #[source]
        source: sqlx::Error,
    },
    /// Somebody else was faster: the row is not in the state it was read in.
    #[error("change job {job}: it is no longer {expected}")]
    Conflict {
        /// The job.
        job: String,
        /// The state it should have been in.
        expected: &'static str,
    },
    /// The row makes no sense.
    #[error("read {table}.{column} of {row}: {reason}")]
    Corrupt {
        /// The table.
        table: &'static str,
        /// The row's key.
        row: String,
        /// The column.
        column: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// A sealed value does not open, or none can be sealed.
    #[error("use the sealed value of {row} in {table}")]
    Sealed {
        /// The table.
        table: &'static str,
        /// The row's key.
        row: String,
        /// Why.
        #[source]
        source: SealError,
    },
    /// The job cannot make this transition.
    #[error(transparent)]
    Illegal(#[from] crate::domain::job::IllegalTransition),
    /// The writer has stopped.
    #[error("write to a database that is being closed")]
    Closed,
}

/// The database, open.
#[derive(Clone, Debug)]
pub struct Store {
    path: Utf8PathBuf,
    writes: mpsc::Sender<OperationBox>,
    read: SqlitePool,
    keys: Keyring,
    counters: Arc<Counters>,
    slots: Arc<jobs::SlotHints>,
    #[cfg(test)]
    around: Option<Around>,
}

/// When a test looks at a write: before it is handed to the writer, or when its answer is there.
#[cfg(test)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Moment {
    Before,
    After,
}

/// What a test has happen around every write, such as the end of the process.
#[cfg(test)]
#[derive(Clone)]
pub(crate) struct Around(
    pub(crate) Arc<dyn Fn(Moment, &'static str) -> BoxFuture<'static, ()> + Send + Sync>,
);

#[cfg(test)]
impl std::fmt::Debug for Around {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Around")
    }
}

impl Store {
    /// Has something happen around every write of this store and its clones.
    #[cfg(test)]
    pub(crate) fn with_around(mut self, around: Around) -> Self {
        self.around = Some(around);
        self
    }

    /// Runs any SQL, to break what no code of ours would.
    #[cfg(test)]
    pub(crate) async fn vandalise(&self, sql: &'static str) {
        self.write("tests::vandalise", move |connection| {
            Box::pin(async move {
                sqlx::query(sql)
                    .execute(connection)
                    .await
                    .map(drop)
                    .map_err(database("tests::vandalise"))
            })
        })
        .await
        .unwrap();
    }

    /// Puts another payload in a job's row.
    #[cfg(test)]
    pub(crate) async fn forge_payload(&self, id: crate::domain::id::JobId, text: &str) {
        let row = id.to_string();
        let sealed = self.keys.seal(sealed::payload_of(&row), text.as_bytes()).unwrap();
        self.write("tests::forge_payload", move |connection| {
            Box::pin(async move {
                sqlx::query("UPDATE payloads SET sealed = ? WHERE job = ?")
                    .bind(sealed)
                    .bind(row)
                    .execute(connection)
                    .await
                    .map(drop)
                    .map_err(database("tests::forge_payload"))
            })
        })
        .await
        .unwrap();
    }

    /// Runs a write of its own in an immediate transaction, durable when this returns.
    ///
    /// Dropping the future does not undo it.
    ///
    /// # Errors
    ///
    /// What `f` says, and `Database` when the commit failed; then nothing was written.
    pub(in crate::store) async fn write<T, F>(
        &self,
        name: &'static str,
        f: F,
    ) -> Result<T, StoreError>
    where
        T: Send + 'static,
        F: for<'c> FnOnce(&'c mut SqliteConnection) -> BoxFuture<'c, Result<T, StoreError>>
            + Send
            + 'static,
    {
        let (operation, answer) = writer::operation(name, f);
        #[cfg(test)]
        if let Some(Around(around)) = &self.around {
            around(Moment::Before, name).await;
        }
        self.writes.send(operation).await.map_err(|_closed| StoreError::Closed)?;
        let answer = answer.await;
        #[cfg(test)]
        if let Some(Around(around)) = &self.around {
            around(Moment::After, name).await;
        }
        answer.map_err(|_closed| StoreError::Closed)?
    }

    /// Says why the last commit failed, if it did.
    pub fn trouble(&self) -> Option<String> {
        self.counters.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Tells whether the last commit failed: the disk is full, the file read-only, the database locked.
    pub fn is_failing(&self) -> bool {
        self.counters.failing.load(Ordering::Relaxed) > 0
    }

    /// Tries a write that changes nothing, to see whether the database takes writes.
    ///
    /// # Errors
    ///
    /// What a write would say.
    pub async fn probe(&self) -> Result<(), StoreError> {
        self.write("store::probe", |connection| {
            Box::pin(async move {
                sqlx::query("UPDATE jobs SET due_at = due_at WHERE rowid = -1")
                    .execute(connection)
                    .await
                    .map_err(database("store::probe"))?;
                Ok(())
            })
        })
        .await
    }

    /// Counts transactions committed and writes made since the start.
    pub fn transactions(&self) -> (u64, u64) {
        (
            self.counters.transactions.load(Ordering::Relaxed),
            self.counters.writes.load(Ordering::Relaxed),
        )
    }

    /// Gives the path of the database.
    pub fn path(&self) -> &Utf8Path {
        &self.path
    }

    /// Asks which keys the sealed rows want.
    ///
    /// # Errors
    ///
    /// When the database cannot be read.
    pub async fn wanted_keys(&self) -> Result<Wanted, StoreError> {
        let failed = |source| database("sealed::wanted")(source);
        let mut connection = self.read.acquire().await.map_err(failed)?;
        sealed::wanted(&mut connection).await.map_err(failed)
    }

    /// Copies the database into a new file, consistent while the daemon writes.
    ///
    /// # Errors
    ///
    /// When the target exists or cannot be written.
    pub async fn backup(&self, to: &Utf8Path) -> Result<(), StoreError> {
        // store::backup; made private before SQLite fills it.
        make_private_file(to).map_err(|error| StoreError::Database {
            name: "store::backup",
            source: sqlx::Error::Io(error),
        })?;
        sqlx::query("VACUUM INTO ?")
            .bind(to.as_str())
            .execute(&self.read)
            .await
            .map_err(database("store::backup"))?;
        Ok(())
    }

    /// Has SQLite check the whole file; an empty list is good news.
    ///
    /// # Errors
    ///
    /// When it cannot be read.
    pub async fn check(&self) -> Result<Vec<String>, StoreError> {
        // store::check
        let mut findings: Vec<String> = sqlx::query_scalar("PRAGMA integrity_check(20)")
            .fetch_all(&self.read)
            .await
            .map_err(database("store::check"))?;
        findings.retain(|finding| finding != "ok");
        let broken: Vec<(String, Option<i64>, String, i64)> =
            sqlx::query_as("PRAGMA foreign_key_check")
                .fetch_all(&self.read)
                .await
                .map_err(database("store::check"))?;
        findings.extend(
            broken.into_iter().map(|(table, ..)| format!("{table} has a row without its job")),
        );
        Ok(findings)
    }

    /// Closes the read pool; the writer ends with the last clone.
    pub async fn close(self) {
        self.read.close().await;
    }
}

/// Makes a mapper of SQLite's errors that names the statement.
fn database(name: &'static str) -> impl Fn(sqlx::Error) -> StoreError {
    move |source| StoreError::Database { name, source }
}
