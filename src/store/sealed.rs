//! Sealed columns: what is in them, which keys they want, and how they get new ones.

use std::collections::BTreeMap;

use camino::{Utf8Path, Utf8PathBuf};
use sqlx::sqlite::SqliteConnection;
use sqlx::{ConnectOptions as _, Connection as _, Row as _};

use crate::domain::id::JobId;
use crate::store::keyring::{Belongs, KeyFileError, KeyId, Keyring, OPEN, SEALED, SealError};
use crate::store::open::{
    OpenError, Purpose, database_path, known_schema, open_error, options, schema_of,
};
use crate::store::{Lock, StoreError, database};

/// How many rows one transaction seals anew.
const BATCH: i64 = 64;

/// Where payloads belong.
pub(in crate::store) fn payload_of(job: &str) -> Belongs<'_> {
    Belongs { column: "payloads.sealed", row: job }
}

/// Which keys the rows want, and how many rows each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Rows by key.
    pub keys: BTreeMap<KeyId, i64>,
    /// Rows that are not sealed: of a database from before, or of a key exchange that was cut short.
    pub unsealed: i64,
}

impl Wanted {
    /// Gives the number of rows that none of these keys opens.
    pub fn lost_without(&self, ring: &Keyring) -> i64 {
        let ids = ring.ids();
        self.keys.iter().filter(|(id, _)| !ids.contains(id)).map(|(_, rows)| rows).sum()
    }
}

/// What an exchange of keys did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rekeyed {
    /// Rows that were sealed anew.
    pub rows: i64,
    /// Rows that no key opened and that were given up.
    pub lost: i64,
    /// An exchange that had been cut short was finished; no other key was made.
    pub resumed: bool,
    /// The key in use now.
    pub key: KeyId,
}

/// What is to be done about rows that no key opens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LostRows {
    /// Nothing at all: the key may be found again.
    Refuse,
    /// They are emptied; their jobs are then ended by the daemon, and by GitLab.
    GiveUp,
}

/// Why keys could not be exchanged; the old ones are still there.
#[derive(Debug, thiserror::Error)]
pub enum RekeyError {
    /// There is nothing to exchange, or the file cannot be used.
    #[error(transparent)]
    File(#[from] KeyFileError),
    /// The database does not open.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A row could not be sealed anew.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Asks which keys the rows want.
pub(in crate::store) async fn wanted(
    connection: &mut SqliteConnection,
) -> Result<Wanted, sqlx::Error> {
    let rows = sqlx::query(
        "-- sealed::wanted
         SELECT substr(sealed, 1, 1) AS form, substr(sealed, 2, 8) AS key, count(*) AS jobs
         FROM payloads WHERE substr(sealed, 1, 1) <> x'30' GROUP BY 1, 2
         UNION ALL
         SELECT x'30', x'', count(*) FROM payloads WHERE substr(sealed, 1, 1) = x'30'",
    )
    .fetch_all(connection)
    .await?;
    let mut wanted = Wanted::default();
    for row in rows {
        let (form, key, jobs): (Vec<u8>, Vec<u8>, i64) =
            (row.try_get("form")?, row.try_get("key")?, row.try_get("jobs")?);
        if form == [OPEN] {
            wanted.unsealed += jobs;
        } else if form == [SEALED]
            && let Some(id) = KeyId::from_slice(&key)
        {
            *wanted.keys.entry(id).or_default() += jobs;
        }
    }
    Ok(wanted)
}

/// Makes sure that the rows and the keys fit each other: makes the first key, seals what an older bridge
/// left readable, and refuses to go on without a key that is wanted.
pub(in crate::store) async fn settle(
    connection: &mut SqliteConnection,
    path: &Utf8Path,
    ring: Keyring,
    purpose: Purpose,
) -> Result<Keyring, OpenError> {
    if purpose == Purpose::Attach {
        return Ok(ring);
    }
    let failed = |source| open_error(path, source);
    let wanted = wanted(connection).await.map_err(failed)?;
    let jobs = wanted.lost_without(&ring);
    let key_file = ring.path().map(Utf8Path::to_owned).unwrap_or_default();
    if jobs > 0 && ring.is_empty() {
        return Err(OpenError::KeyMissing { path: path.to_owned(), key_file, jobs });
    }
    if jobs > 0 {
        return Err(OpenError::KeyWrong { path: path.to_owned(), key_file, jobs });
    }
    let ring = if ring.is_empty() {
        let ring = ring.create().map_err(|source| OpenError::KeyFile { source })?;
        tracing::info!(path = %key_file, "key made; keep a copy of the file apart from the database's");
        ring
    } else {
        ring
    };
    if wanted.unsealed > 0 {
        let done = seal_again(connection, &ring, Which::Unsealed, &|_name| {});
        let rows =
            done.await.map_err(|source| OpenError::Seal { path: path.to_owned(), source })?;
        empty(connection).await.map_err(failed)?;
        tracing::info!(rows, "payloads that an older bridge stored readable are sealed now");
    }
    Ok(ring)
}

/// Which rows are sealed anew.
#[derive(Clone, Copy)]
enum Which {
    Unsealed,
    OtherKeys(KeyId),
}

/// Seals rows with the first key, a batch in each transaction; gives their number.
async fn seal_again(
    connection: &mut SqliteConnection,
    ring: &Keyring,
    which: Which,
    point: &(dyn Fn(&'static str) + Sync),
) -> Result<i64, StoreError> {
    let failed = |source| database("sealed::seal_again")(source);
    let mut done = 0;
    // The last row looked at: one that stays as it is must not be looked at for ever.
    let mut after = String::new();
    loop {
        sqlx::query("BEGIN IMMEDIATE").execute(&mut *connection).await.map_err(failed)?;
        let batch = seal_batch(connection, ring, which, &mut after).await;
        let end = if batch.is_ok() { "COMMIT" } else { "ROLLBACK" };
        let ended = sqlx::query(end).execute(&mut *connection).await.map_err(failed);
        let rows = batch?;
        ended?;
        if rows == 0 {
            return Ok(done);
        }
        done += rows;
        point("rekey_batch");
    }
}

async fn seal_batch(
    connection: &mut SqliteConnection,
    ring: &Keyring,
    which: Which,
    after: &mut String,
) -> Result<i64, StoreError> {
    let failed = |source| database("sealed::seal_batch")(source);
    let query = match which {
        Which::Unsealed => sqlx::query(
            "-- sealed::unsealed
             SELECT job, sealed FROM payloads
             WHERE substr(sealed, 1, 1) = x'30' AND job > ? ORDER BY job LIMIT ?",
        )
        .bind(after.clone()),
        Which::OtherKeys(id) => sqlx::query(
            "-- sealed::other_keys
             SELECT job, sealed FROM payloads
             WHERE substr(sealed, 2, 8) <> ? AND job > ? ORDER BY job LIMIT ?",
        )
        .bind(id.as_bytes().to_vec())
        .bind(after.clone()),
    };
    let rows = query.bind(BATCH).fetch_all(&mut *connection).await.map_err(failed)?;
    let mut done = 0;
    for row in rows {
        let job: String = row.try_get("job").map_err(failed)?;
        let before: Vec<u8> = row.try_get("sealed").map_err(failed)?;
        let sealed = match which {
            Which::Unsealed => {
                let text = secrecy::zeroize::Zeroizing::new(before);
                ring.seal(payload_of(&job), text.get(1..).unwrap_or_default())
            }
            Which::OtherKeys(_) => ring
                .open(payload_of(&job), before)
                .and_then(|text| ring.seal(payload_of(&job), &text)),
        };
        let sealed = sealed.map_err(|source| unsealable(&job, source))?;
        sqlx::query(
            "-- sealed::replace
             UPDATE payloads SET sealed = ? WHERE job = ?",
        )
        .bind(sealed)
        .bind(job.clone())
        .execute(&mut *connection)
        .await
        .map_err(failed)?;
        *after = job;
        done += 1;
    }
    Ok(done)
}

/// Empties the rows that no key opens.
async fn give_up(connection: &mut SqliteConnection, ring: &Keyring) -> Result<(), StoreError> {
    let failed = |source| database("sealed::give_up")(source);
    let rows = sqlx::query(
        "-- sealed::keys
         SELECT job, substr(sealed, 2, 8) AS key FROM payloads WHERE substr(sealed, 1, 1) <> x'30'",
    )
    .fetch_all(&mut *connection)
    .await
    .map_err(failed)?;
    let ids = ring.ids();
    sqlx::query("BEGIN IMMEDIATE").execute(&mut *connection).await.map_err(failed)?;
    for row in rows {
        let job: String = row.try_get("job").map_err(failed)?;
        let key: Vec<u8> = row.try_get("key").map_err(failed)?;
        if KeyId::from_slice(&key).is_some_and(|id| ids.contains(&id)) {
            continue;
        }
        let empty = ring.seal(payload_of(&job), b"").map_err(|source| unsealable(&job, source))?;
        sqlx::query(
            "-- sealed::empty_row
             UPDATE payloads SET sealed = ? WHERE job = ?",
        )
        .bind(empty)
        .bind(job)
        .execute(&mut *connection)
        .await
        .map_err(failed)?;
    }
    // Without the commit nothing of it is there at the next look.
    sqlx::query("COMMIT").execute(&mut *connection).await.map_err(failed)?;
    Ok(())
}

/// Moves everything into the database and empties the write-ahead log, which may hold older versions of
/// rows.
async fn empty(connection: &mut SqliteConnection) -> Result<(), sqlx::Error> {
    // sealed::empty
    let busy: i64 =
        sqlx::query_scalar("PRAGMA wal_checkpoint(TRUNCATE)").fetch_one(connection).await?;
    if busy != 0 {
        // A reader, such as a backup: the daemon empties it when it has gone.
        tracing::warn!("the write-ahead log could not be emptied yet");
    }
    Ok(())
}

/// Names the row that does not open.
pub(in crate::store) fn unsealable(job: &str, source: SealError) -> StoreError {
    StoreError::Sealed { table: "payloads", row: job.to_owned(), source }
}

/// Opens a payload's envelope.
pub(in crate::store) fn open_payload(
    ring: &Keyring,
    job: JobId,
    envelope: Vec<u8>,
) -> Result<crate::gitlab::wire::Secret, StoreError> {
    let job = job.to_string();
    let text = ring.open(payload_of(&job), envelope).map_err(|source| unsealable(&job, source))?;
    match str::from_utf8(&text) {
        Ok(text) => Ok(crate::gitlab::wire::Secret::new(text)),
        Err(_no_text) => Err(unsealable(&job, SealError::NoText)),
    }
}

/// Exchanges the key: a new one is made and put beside the old one, all rows are sealed anew, and the
/// old key is dropped.
///
/// The lock is the caller's proof that no daemon runs, which would go on using the old key. Whenever
/// this is cut short, both keys are in the file and the daemon can start; the next call finishes it.
/// Rows that no key opens are left alone, and nothing is done, unless the operator gives them up.
/// `point` is told of places where a test may want the process to die.
///
/// # Errors
///
/// When the key file or the database cannot be used; no key was dropped then.
pub async fn rekey(
    state_dir: &Utf8Path,
    key_file: &Utf8Path,
    _lock: &Lock,
    lost_rows: LostRows,
    point: &(dyn Fn(&'static str) + Sync),
) -> Result<Rekeyed, RekeyError> {
    let path = database_path(state_dir);
    if !path.exists() {
        return Err(OpenError::Missing { path }.into());
    }
    let ring = Keyring::read(key_file)?;
    let failed = |source| RekeyError::Open(open_error(&path, source));
    let mut connection = options(&path).connect().await.map_err(failed)?;
    let found = schema_of(&mut connection).await.map_err(failed)?;
    let known = known_schema();
    if found > known {
        return Err(OpenError::Newer { path, found, known }.into());
    }
    if found < known {
        return Err(OpenError::Older { path, found, known }.into());
    }
    let rows = wanted(&mut connection).await.map_err(failed)?;
    let lost = rows.lost_without(&ring);
    if lost > 0 && lost_rows == LostRows::Refuse {
        let (path, key_file): (Utf8PathBuf, _) = (path, key_file.to_owned());
        return Err(RekeyError::Open(if ring.is_empty() {
            OpenError::KeyMissing { path, key_file, jobs: lost }
        } else {
            OpenError::KeyWrong { path, key_file, jobs: lost }
        }));
    }
    if ring.is_empty() && lost == 0 {
        return Err(KeyFileError::Missing { path: key_file.to_owned() }.into());
    }
    let resumed = ring.ids().len() > 1;
    let ring = if ring.is_empty() {
        ring.create()?
    } else if resumed {
        ring
    } else {
        ring.with_new_key()?
    };
    point("rekey_added");
    let ids = ring.ids();
    let Some(key) = ids.first().copied() else {
        return Err(KeyFileError::Empty { path: key_file.to_owned() }.into());
    };
    if lost > 0 {
        give_up(&mut connection, &ring).await?;
    }
    let mut done = seal_again(&mut connection, &ring, Which::Unsealed, point).await?;
    done += seal_again(&mut connection, &ring, Which::OtherKeys(key), point).await?;
    empty(&mut connection).await.map_err(failed)?;
    point("rekey_sealed");
    connection.close().await.map_err(failed)?;
    ring.with_first_alone()?;
    point("rekey_done");
    Ok(Rekeyed { rows: done, lost, resumed, key })
}
