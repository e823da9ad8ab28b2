//! The one connection that writes.
//!
//! Writes run one after the other, each in a savepoint of its own; those that wait together are
//! committed together, and none is answered before the commit that it is in.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures_util::future::BoxFuture;
use sqlx::Connection as _;
use sqlx::sqlite::SqliteConnection;
use tokio::sync::{mpsc, oneshot};

use super::{BUSY_TIMEOUT, StoreError};

/// The most writes that are committed together.
///
/// Bounds how long the first of them waits for the last; 64 small ones take about 5 ms.
const GROUP: usize = 64;

/// After so long without a write the write-ahead log is emptied.
const QUIET: Duration = Duration::from_secs(2);

/// So long it is kept at most, however much is written.
const LOG_KEPT: Duration = Duration::from_secs(60);

type Reply = Box<dyn FnOnce(Result<(), Arc<sqlx::Error>>) + Send>;
type Fail = Box<dyn FnOnce(&Arc<sqlx::Error>) + Send>;
type Operation =
    Box<dyn for<'c> FnOnce(&'c mut SqliteConnection) -> BoxFuture<'c, Result<Reply, Reply>> + Send>;

/// A write that waits for its turn: what to run, and how to tell its caller that it never ran.
pub(super) struct OperationBox {
    run: Operation,
    fail: Fail,
}

impl std::fmt::Debug for OperationBox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Operation")
    }
}

/// What the writer has done so far.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) transactions: AtomicU64,
    pub(super) writes: AtomicU64,
    pub(super) failing: AtomicU64,
    /// What the last failed commit said.
    pub(super) trouble: Mutex<Option<String>>,
}

/// Makes a write that can wait for its turn, and the place where its answer will be.
pub(super) fn operation<T, F>(
    name: &'static str,
    f: F,
) -> (OperationBox, oneshot::Receiver<Result<T, StoreError>>)
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
    (OperationBox { run, fail }, receiver)
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

/// Copies an error that several waiting writes share: sqlx's are not `Clone`.
fn shared(error: &Arc<sqlx::Error>) -> sqlx::Error {
    sqlx::Error::Io(std::io::Error::other(error.to_string()))
}

/// Runs the writes that come, until nobody can send any more.
pub(super) async fn run_writer(
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
