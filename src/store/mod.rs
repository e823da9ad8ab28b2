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
mod query;
mod rows;
mod sealed;
#[cfg(test)]
mod tests;
mod uploads;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use camino::{Utf8Path, Utf8PathBuf};
use futures_util::future::BoxFuture;
use sqlx::migrate::{Migration, MigrationType, Migrator};
use sqlx::sqlite::{
    SqliteConnectOptions, SqliteConnection, SqliteJournalMode, SqlitePool, SqlitePoolOptions,
    SqliteSynchronous,
};
use sqlx::{ConnectOptions as _, Connection as _, SqlSafeStr as _};
use tokio::sync::{mpsc, oneshot};
use tokio_util::task::TaskTracker;

pub use crate::store::events::{Actor, EventRow};
pub use crate::store::jobs::{NewJob, Received};
pub use crate::store::keyring::{KeyFileError, KeyId, Keyring, SealError};
pub use crate::store::lock::{Lock, LockError, network_file_system_of};
pub use crate::store::query::{Count, Filter, Polled};
pub use crate::store::rows::{CancelBy, EndedOutcome, Job};
pub use crate::store::sealed::{LostRows, RekeyError, Rekeyed, Wanted, rekey};
pub use crate::store::uploads::Upload;

/// Every schema there ever was, oldest first.
const MIGRATIONS: &[(i64, &str, &str)] = &[
    (1, "initial", include_str!("../../migrations/0001_initial.sql")),
    (2, "doubts_and_homecoming", include_str!("../../migrations/0002_doubts_and_homecoming.sql")),
    (3, "sealed_payloads", include_str!("../../migrations/0003_sealed_payloads.sql")),
];

/// The most writes that are committed together.
///
/// Bounds how long the first of them waits for the last; 64 small ones take about 5 ms.
const GROUP: usize = 64;

/// How long a write waits for another process, such as `bridge jobs cancel`, to finish its own.
const BUSY_TIMEOUT: Duration = Duration::from_secs(10);

/// After so long without a write the write-ahead log is emptied.
const QUIET: Duration = Duration::from_secs(2);

/// So long it is kept at most, however much is written.
const LOG_KEPT: Duration = Duration::from_secs(60);

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

/// Why the store could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The directory is not usable.
    #[error("use the state directory {path}")]
    Directory {
        /// The directory.
        path: Utf8PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The database does not open.
    #[error("open the database {path}")]
    Database {
        /// The file.
        path: Utf8PathBuf,
        /// Why.
        #[source]
        source: sqlx::Error,
    },
    /// SQLite found it damaged.
    #[error("use the database {path}: it is damaged ({detail})")]
    Damaged {
        /// The file.
        path: Utf8PathBuf,
        /// SQLite's first finding.
        detail: String,
    },
    /// A newer bridge wrote it.
    #[error(
        "use the database {path}: a newer bridge wrote it (schema {found}, this one knows {known})"
    )]
    Newer {
        /// The file.
        path: Utf8PathBuf,
        /// The schema in the file.
        found: i64,
        /// The newest that this program knows.
        known: i64,
    },
    /// An older bridge wrote it, and no daemon has brought it up to date.
    #[error(
        "use the database {path}: an older bridge wrote it (schema {found}, this one has {known}); \
         the daemon brings it up to date when it starts"
    )]
    Older {
        /// The file.
        path: Utf8PathBuf,
        /// The schema in the file.
        found: i64,
        /// The newest that this program knows.
        known: i64,
    },
    /// A migration failed; it was rolled back.
    #[error("bring the database {path} to schema {known}")]
    Migration {
        /// The file.
        path: Utf8PathBuf,
        /// The newest that this program knows.
        known: i64,
        /// Why.
        #[source]
        source: sqlx::migrate::MigrateError,
    },
    /// The key file is gone.
    #[error(
        "use the database {path}: what it holds of {jobs} jobs that are not over is sealed, and the key \
         file {key_file} does not exist"
    )]
    KeyMissing {
        /// The database.
        path: Utf8PathBuf,
        /// The file.
        key_file: Utf8PathBuf,
        /// How many jobs.
        jobs: i64,
    },
    /// The key file is another one.
    #[error(
        "use the database {path}: what it holds of {jobs} jobs that are not over was sealed with a key \
         that is not in {key_file}"
    )]
    KeyWrong {
        /// The database.
        path: Utf8PathBuf,
        /// The file.
        key_file: Utf8PathBuf,
        /// How many jobs.
        jobs: i64,
    },
    /// No key file could be made.
    #[error("make a key")]
    KeyFile {
        /// Why.
        #[source]
        source: KeyFileError,
    },
    /// What an older bridge stored readable could not be sealed.
    #[error("seal what an older bridge left in {path}")]
    Seal {
        /// The database.
        path: Utf8PathBuf,
        /// Why.
        #[source]
        source: StoreError,
    },
    /// There is none.
    #[error("find a database at {path}")]
    Missing {
        /// The file.
        path: Utf8PathBuf,
    },
}

type Reply = Box<dyn FnOnce(Result<(), Arc<sqlx::Error>>) + Send>;
type Fail = Box<dyn FnOnce(&Arc<sqlx::Error>) + Send>;
type Operation =
    Box<dyn for<'c> FnOnce(&'c mut SqliteConnection) -> BoxFuture<'c, Result<Reply, Reply>> + Send>;

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

/// A write that waits for its turn: what to run, and how to tell its caller that it never ran.
struct OperationBox {
    run: Operation,
    fail: Fail,
}

impl std::fmt::Debug for OperationBox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Operation")
    }
}

#[derive(Debug, Default)]
struct Counters {
    transactions: AtomicU64,
    writes: AtomicU64,
    failing: AtomicU64,
    /// What the last failed commit said.
    trouble: Mutex<Option<String>>,
}

/// What the database is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Purpose {
    /// By the daemon, which makes it and brings it up to date.
    Serve,
    /// By an operator's command, which does neither.
    Attach,
}

/// The newest schema that this program knows.
pub fn known_schema() -> i64 {
    MIGRATIONS.iter().map(|(version, ..)| *version).max().unwrap_or(0)
}

/// Gives the database's path below a state directory.
pub fn database_path(state_dir: &Utf8Path) -> Utf8PathBuf {
    state_dir.join("bridge.db")
}

fn migrator() -> Migrator {
    Migrator::with_migrations(
        MIGRATIONS
            .iter()
            .map(|(version, name, sql)| {
                Migration::new(
                    *version,
                    (*name).into(),
                    MigrationType::Simple,
                    sql.into_sql_str(),
                    false,
                )
            })
            .collect(),
    )
}

fn options(path: &Utf8Path) -> SqliteConnectOptions {
    SqliteConnectOptions::new()
        .filename(path)
        .journal_mode(SqliteJournalMode::Wal)
        // A note of intent that a power cut can take back is no note.
        .synchronous(SqliteSynchronous::Full)
        .foreign_keys(true)
        .busy_timeout(BUSY_TIMEOUT)
        // A payload that was purged is overwritten, not only unlinked.
        .pragma("secure_delete", "ON")
        .pragma("temp_store", "MEMORY")
}

async fn schema_of(connection: &mut SqliteConnection) -> Result<i64, sqlx::Error> {
    // store::schema_of
    let exists: i64 = sqlx::query_scalar(
        "SELECT count(*) FROM sqlite_master WHERE type = 'table' AND name = '_sqlx_migrations'",
    )
    .fetch_one(&mut *connection)
    .await?;
    if exists == 0 {
        return Ok(0);
    }
    sqlx::query_scalar("SELECT coalesce(max(version), 0) FROM _sqlx_migrations")
        .fetch_one(connection)
        .await
}

impl Store {
    /// Opens the database in `state_dir` for writing, creating and migrating it as needed.
    ///
    /// The writer runs on `tracker` and ends when every clone of the store is dropped. A ring without
    /// keys gets its first one, unless rows want others.
    ///
    /// # Errors
    ///
    /// When the directory is unusable, or the database is damaged, newer than the program, sealed with
    /// keys that are not there, or cannot be migrated; it is unchanged then.
    pub async fn open(
        state_dir: &Utf8Path,
        keys: Keyring,
        tracker: &TaskTracker,
    ) -> Result<Self, OpenError> {
        Self::open_as(state_dir, keys, tracker, Purpose::Serve).await
    }

    async fn open_as(
        state_dir: &Utf8Path,
        keys: Keyring,
        tracker: &TaskTracker,
        purpose: Purpose,
    ) -> Result<Self, OpenError> {
        let path = database_path(state_dir);
        let directory = |source| OpenError::Directory { path: state_dir.to_owned(), source };
        make_private_dir(state_dir).map_err(directory)?;
        make_private_file(&path).map_err(directory)?;
        let failed = |source| open_error(&path, source);
        let mut writer = options(&path).connect().await.map_err(failed)?;
        let found = schema_of(&mut writer).await.map_err(failed)?;
        if found > known_schema() {
            return Err(OpenError::Newer { path, found, known: known_schema() });
        }
        if found < known_schema() && purpose == Purpose::Attach {
            return Err(OpenError::Older { path, found, known: known_schema() });
        }
        if found < known_schema() {
            migrator().run(&mut writer).await.map_err(|source| OpenError::Migration {
                path: path.clone(),
                known: known_schema(),
                source,
            })?;
        }
        let keys = sealed::settle(&mut writer, &path, keys, purpose).await?;
        let read = SqlitePoolOptions::new()
            .max_connections(4)
            .min_connections(1)
            .connect_with(options(&path).read_only(true))
            .await
            .map_err(failed)?;
        // store::quick_check; pages that payloads were on are checked with the rest.
        if purpose == Purpose::Serve {
            let verdict: String = sqlx::query_scalar("PRAGMA quick_check(1)")
                .fetch_one(&read)
                .await
                .map_err(failed)?;
            if verdict != "ok" {
                return Err(OpenError::Damaged { path, detail: verdict });
            }
        }
        let (writes, operations) = mpsc::channel(1024);
        let counters = Arc::new(Counters::default());
        tracker.spawn(run_writer(writer, operations, Arc::clone(&counters)));
        Ok(Self {
            path,
            writes,
            read,
            keys,
            counters,
            slots: Arc::default(),
            #[cfg(test)]
            around: None,
        })
    }

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

    /// Opens the database for an operator's command, with the daemon running or stopped.
    ///
    /// Neither creates nor migrates; writes wait for the daemon's. What is sealed stays so.
    ///
    /// # Errors
    ///
    /// When there is none, or it is not of this program's schema.
    pub async fn attach(state_dir: &Utf8Path, tracker: &TaskTracker) -> Result<Self, OpenError> {
        let path = database_path(state_dir);
        if !path.exists() {
            return Err(OpenError::Missing { path });
        }
        Self::open_as(state_dir, Keyring::none(), tracker, Purpose::Attach).await
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
        let (sender, receiver) = oneshot::channel::<Result<T, StoreError>>();
        let sender = Arc::new(Mutex::new(Some(sender)));
        let failing = Arc::clone(&sender);
        let run: Operation = Box::new(move |connection| {
            Box::pin(async move {
                match f(connection).await {
                    Ok(value) => {
                        let reply: Reply = Box::new(move |committed| {
                            answer(
                                &sender,
                                committed.map(|()| value).map_err(|source| StoreError::Database {
                                    name,
                                    source: shared(&source),
                                }),
                            );
                        });
                        Ok(reply)
                    }
                    Err(error) => {
                        let reply: Reply = Box::new(move |_committed| answer(&sender, Err(error)));
                        Err(reply)
                    }
                }
            })
        });
        let fail = Box::new(move |source: &Arc<sqlx::Error>| {
            answer(&failing, Err(StoreError::Database { name, source: shared(source) }));
        });
        #[cfg(test)]
        if let Some(Around(around)) = &self.around {
            around(Moment::Before, name).await;
        }
        self.writes.send(OperationBox { run, fail }).await.map_err(|_closed| StoreError::Closed)?;
        let answer = receiver.await;
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

/// Answers a waiting write once; the caller may have gone, and the write stands all the same.
fn answer<T>(
    sender: &Mutex<Option<oneshot::Sender<Result<T, StoreError>>>>,
    value: Result<T, StoreError>,
) {
    let sender = sender.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(sender) = sender {
        drop(sender.send(value));
    }
}

/// Makes a mapper of SQLite's errors that names the statement.
fn database(name: &'static str) -> impl Fn(sqlx::Error) -> StoreError {
    move |source| StoreError::Database { name, source }
}

/// Copies an error that several waiting writes share: sqlx's are not `Clone`.
fn shared(error: &Arc<sqlx::Error>) -> sqlx::Error {
    sqlx::Error::Io(std::io::Error::other(error.to_string()))
}

fn open_error(path: &Utf8Path, source: sqlx::Error) -> OpenError {
    // SQLITE_CORRUPT is 11, SQLITE_NOTADB 26.
    let code = source.as_database_error().and_then(|e| e.code().map(|c| c.into_owned()));
    if matches!(code.as_deref(), Some("11" | "26")) {
        return OpenError::Damaged { path: path.to_owned(), detail: source.to_string() };
    }
    OpenError::Database { path: path.to_owned(), source }
}

async fn run_writer(
    mut connection: SqliteConnection,
    mut operations: mpsc::Receiver<OperationBox>,
    counters: Arc<Counters>,
) {
    let mut emptied = Instant::now();
    let mut written = false;
    loop {
        let late = written && emptied.elapsed() >= LOG_KEPT;
        let first = if late {
            None
        } else if written {
            // Cancel-safe: an operation that is not received stays in the queue.
            tokio::time::timeout(QUIET, operations.recv()).await.ok()
        } else {
            Some(operations.recv().await)
        };
        let Some(first) = first else {
            written = !empty_log(&mut connection).await;
            emptied = Instant::now();
            continue;
        };
        let Some(first) = first else { break };
        written = true;
        let mut group = Group::default();
        let committed = run_group(&mut connection, first, &mut operations, &mut group).await;
        counters.transactions.fetch_add(1, Ordering::Relaxed);
        counters.writes.fetch_add(group.fails.len() as u64, Ordering::Relaxed);
        match committed {
            Ok(()) => {
                if counters.failing.swap(0, Ordering::Relaxed) > 0 {
                    *counters.trouble.lock().unwrap_or_else(PoisonError::into_inner) = None;
                }
                for reply in group.replies {
                    reply(Ok(()));
                }
            }
            Err(error) => {
                tracing::error!(error = %error, "the database refuses writes");
                counters.failing.fetch_add(1, Ordering::Relaxed);
                *counters.trouble.lock().unwrap_or_else(PoisonError::into_inner) =
                    Some(error.to_string());
                if let Err(error) = sqlx::query("ROLLBACK").execute(&mut connection).await {
                    // SQLite has rolled back by itself, as it does when the disk is full.
                    tracing::debug!(error = %error, "nothing to roll back");
                }
                let error = Arc::new(error);
                for reply in group.replies {
                    reply(Err(Arc::clone(&error)));
                }
                // Those that never ran.
                for fail in group.fails {
                    fail(&error);
                }
            }
        }
    }
    if let Err(error) = connection.close().await {
        tracing::warn!(error = %error, "the database did not close cleanly");
    }
}

/// Moves the write-ahead log into the database and empties it; tells whether that worked.
///
/// A purged payload is overwritten in the database, but the log would hold its secrets until something
/// else happens to be written over them.
async fn empty_log(connection: &mut SqliteConnection) -> bool {
    // store::empty_log. Not waiting for readers: a backup may take minutes, and writes would wait too.
    let answer = async {
        sqlx::query("PRAGMA busy_timeout = 0").execute(&mut *connection).await?;
        let busy: Result<i64, sqlx::Error> =
            sqlx::query_scalar("PRAGMA wal_checkpoint(TRUNCATE)").fetch_one(&mut *connection).await;
        let restore = format!("PRAGMA busy_timeout = {}", BUSY_TIMEOUT.as_millis());
        sqlx::query(sqlx::AssertSqlSafe(restore)).execute(&mut *connection).await?;
        busy
    };
    match answer.await {
        Ok(busy) => busy == 0,
        Err(error) => {
            tracing::debug!(error = %error, "the write-ahead log was not emptied");
            false
        }
    }
}

/// Writes that are committed together, and how to answer each.
#[derive(Default)]
struct Group {
    replies: Vec<Reply>,
    fails: Vec<Fail>,
}

/// Runs the first operation and those that wait already, and commits them together.
async fn run_group(
    connection: &mut SqliteConnection,
    first: OperationBox,
    operations: &mut mpsc::Receiver<OperationBox>,
    group: &mut Group,
) -> Result<(), sqlx::Error> {
    let OperationBox { run, fail } = first;
    group.fails.push(fail);
    sqlx::query("BEGIN IMMEDIATE").execute(&mut *connection).await?;
    let mut next = Some(run);
    while let Some(run) = next.take() {
        sqlx::query("SAVEPOINT one").execute(&mut *connection).await?;
        match run(connection).await {
            Ok(reply) => group.replies.push(reply),
            Err(reply) => {
                group.replies.push(reply);
                sqlx::query("ROLLBACK TO one").execute(&mut *connection).await?;
            }
        }
        sqlx::query("RELEASE one").execute(&mut *connection).await?;
        if group.fails.len() < GROUP
            && let Ok(OperationBox { run, fail }) = operations.try_recv()
        {
            group.fails.push(fail);
            next = Some(run);
        }
    }
    sqlx::query("COMMIT").execute(&mut *connection).await.map(drop)
}

/// Makes a directory with mode 0700, or checks that an existing one is not open to others.
fn make_private_dir(path: &Utf8Path) -> std::io::Result<()> {
    use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
    if !path.is_dir() {
        return std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
    }
    let mode = std::fs::metadata(path)?.permissions().mode();
    if mode & 0o077 != 0 {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o700))?;
    }
    Ok(())
}

/// Makes an empty file with mode 0600 unless it exists, so that SQLite never makes one with another.
fn make_private_file(path: &Utf8Path) -> std::io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt as _;
    std::fs::OpenOptions::new().create(true).append(true).mode(0o600).open(path).map(drop)
}
