//! Opening the database: its schemas, how it is configured, and when it is refused.

use std::sync::Arc;

use camino::{Utf8Path, Utf8PathBuf};
use sqlx::migrate::{Migration, MigrationType, Migrator};
use sqlx::sqlite::{
    SqliteConnectOptions, SqliteConnection, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous,
};
use sqlx::{ConnectOptions as _, SqlSafeStr as _};
use tokio::sync::mpsc;
use tokio_util::task::TaskTracker;

use super::keyring::{KeyFileError, Keyring};
use super::writer::{Counters, run_writer};
use super::{BUSY_TIMEOUT, Store, StoreError, sealed};

/// Every schema there ever was, oldest first.
const MIGRATIONS: &[(i64, &str, &str)] = &[
    (1, "initial", include_str!("../../migrations/0001_initial.sql")),
    (2, "doubts_and_homecoming", include_str!("../../migrations/0002_doubts_and_homecoming.sql")),
    (3, "sealed_payloads", include_str!("../../migrations/0003_sealed_payloads.sql")),
];

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

/// What the database is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
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

pub(super) fn migrator() -> Migrator {
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

pub(super) fn options(path: &Utf8Path) -> SqliteConnectOptions {
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

pub(super) async fn schema_of(connection: &mut SqliteConnection) -> Result<i64, sqlx::Error> {
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
}

pub(super) fn open_error(path: &Utf8Path, source: sqlx::Error) -> OpenError {
    // SQLITE_CORRUPT is 11, SQLITE_NOTADB 26.
    let code = source.as_database_error().and_then(|e| e.code().map(|c| c.into_owned()));
    if matches!(code.as_deref(), Some("11" | "26")) {
        return OpenError::Damaged { path: path.to_owned(), detail: source.to_string() };
    }
    OpenError::Database { path: path.to_owned(), source }
}

/// Makes a directory with mode 0700, or checks that an existing one is not open to others.
pub(super) fn make_private_dir(path: &Utf8Path) -> std::io::Result<()> {
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
pub(super) fn make_private_file(path: &Utf8Path) -> std::io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt as _;
    std::fs::OpenOptions::new().create(true).append(true).mode(0o600).open(path).map(drop)
}
