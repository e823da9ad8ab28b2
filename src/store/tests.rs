//! Every statement is run against a real file, so that none exists that SQLite would not prepare.

use std::sync::atomic::AtomicU64;

use bridge_backend::ExternalId;
use jiff::Timestamp;
use sqlx::migrate::Migrator;
use sqlx::{ConnectOptions as _, Connection as _};
use tokio_util::task::TaskTracker;

use super::open::{migrator, options};
use super::*;
use crate::domain::id::{BackendName, CiJobId, JobId, RunnerName};
use crate::domain::job::{Event, JobState};
use crate::domain::policy::after;
use crate::domain::verdict::{Cause, Verdict};
use crate::gitlab::wire::Secret;

struct Bed {
    dir: tempfile::TempDir,
    tracker: TaskTracker,
    store: Store,
}

impl Bed {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let tracker = TaskTracker::new();
        let store = Store::open(path(&dir), Keyring::for_tests(), &tracker).await.unwrap();
        Self { dir, tracker, store }
    }

    fn path(&self) -> Utf8PathBuf {
        path(&self.dir).to_owned()
    }

    async fn close(self) -> tempfile::TempDir {
        self.store.close().await;
        self.tracker.close();
        tokio::time::timeout(Duration::from_secs(10), self.tracker.wait()).await.unwrap();
        self.dir
    }
}

fn path(dir: &tempfile::TempDir) -> &Utf8Path {
    Utf8Path::from_path(dir.path()).unwrap()
}

fn t(seconds: i64) -> Timestamp {
    Timestamp::from_second(1_700_000_000 + seconds).unwrap()
}

fn new_job(n: i64) -> NewJob {
    NewJob {
        id: JobId::mint(t(n), u128::try_from(n).unwrap()),
        runner: RunnerName::from("r"),
        ci_url: "https://gitlab.example.org".into(),
        ci_job: CiJobId(n),
        ci_pipeline: 1,
        project_id: 7,
        project: "hep/tracker".into(),
        name: format!("job {n}"),
        backend: BackendName::from("b"),
        received_at: t(n),
        deadline_at: t(n + 3600),
        payload: Secret::new(format!("{{\"token\":\"hunter{n}\"}}")),
    }
}

async fn received(store: &Store, n: i64) -> Job {
    let new = new_job(n);
    let id = new.id;
    assert_eq!(store.receive(new).await.unwrap(), Received::New);
    store.job(id).await.unwrap().unwrap()
}

async fn finish(store: &Store, job: &mut Job, at: i64) {
    job.submit_token = Some(job.id.submit_token());
    store.transition(job, Event::Attempted, t(at), None).await.unwrap();
    job.external_id = Some(ExternalId("17".into()));
    store.transition(job, Event::Accepted, t(at), None).await.unwrap();
    let outcome = bridge_backend::Outcome::Exited { code: 0 };
    job.verdict = Some(Verdict::of(&Cause::Ended(outcome), None));
    store.transition(job, Event::Concluded, t(at), None).await.unwrap();
    store.transition(job, Event::Reported, t(at), None).await.unwrap();
}

#[tokio::test]
async fn a_whole_life_is_written_and_read_back() {
    let bed = Bed::new().await;
    let mut job = received(&bed.store, 1).await;
    assert_eq!(job.state, JobState::Received);
    assert!(bed.store.payload(job.id).await.unwrap().unwrap().expose().contains("hunter1"));
    finish(&bed.store, &mut job, 10).await;
    let read = bed.store.job(job.id).await.unwrap().unwrap();
    assert_eq!(read.state, JobState::Finished);
    assert_eq!(read.verdict, job.verdict);
    assert_eq!(read.external_id, job.external_id);
    assert!(bed.store.payload(job.id).await.unwrap().is_none(), "payloads go with the job");
    let events: Vec<String> =
        bed.store.events(job.id).await.unwrap().into_iter().map(|e| e.event).collect();
    assert_eq!(events, ["received", "attempted", "accepted", "concluded", "reported"]);
}

#[tokio::test]
async fn no_byte_of_a_payload_is_left_in_the_files_when_a_job_is_over() {
    let bed = Bed::new().await;
    let mut job = received(&bed.store, 1).await;
    finish(&bed.store, &mut job, 10).await;
    let dir = bed.close().await;
    for entry in std::fs::read_dir(dir.path()).unwrap() {
        let entry = entry.unwrap().path();
        let bytes = std::fs::read(&entry).unwrap();
        let found = bytes.windows(7).any(|w| w == b"hunter1");
        assert!(!found, "{} still holds the secret", entry.display());
    }
}

#[tokio::test]
async fn the_same_job_twice_is_one_row() {
    let bed = Bed::new().await;
    received(&bed.store, 1).await;
    let again = NewJob { id: JobId::mint(t(5), 99), ..new_job(1) };
    assert_eq!(bed.store.receive(again).await.unwrap(), Received::Known);
    assert_eq!(bed.store.list(&Filter::default()).await.unwrap().len(), 1);
}

#[tokio::test]
async fn slots_are_the_smallest_free_numbers() {
    let bed = Bed::new().await;
    let mut first = received(&bed.store, 1).await;
    let second = received(&bed.store, 2).await;
    assert_eq!((first.slot, first.project_slot), (0, 0));
    assert_eq!((second.slot, second.project_slot), (1, 1));
    finish(&bed.store, &mut first, 5).await;
    first.released_at = Some(t(6));
    bed.store.note(&first, "released", t(6), None).await.unwrap();
    let other = NewJob { project_id: 8, ..new_job(3) };
    let id = other.id;
    bed.store.receive(other).await.unwrap();
    let third = bed.store.job(id).await.unwrap().unwrap();
    assert_eq!((third.slot, third.project_slot), (0, 0));
    let fourth = received(&bed.store, 4).await;
    assert_eq!((fourth.slot, fourth.project_slot), (2, 0));
}

#[tokio::test]
async fn a_row_that_moved_meanwhile_is_a_conflict() {
    let bed = Bed::new().await;
    let mut job = received(&bed.store, 1).await;
    let mut stale = job.clone();
    job.submit_token = Some(job.id.submit_token());
    bed.store.transition(&mut job, Event::Attempted, t(2), None).await.unwrap();
    stale.submit_token = Some(stale.id.submit_token());
    let error = bed.store.transition(&mut stale, Event::Attempted, t(3), None).await.unwrap_err();
    assert!(matches!(error, StoreError::Conflict { .. }), "{error}");
    assert_eq!(bed.store.events(job.id).await.unwrap().len(), 2, "nothing of it was written");
    let illegal = bed.store.transition(&mut job, Event::Reported, t(4), None).await.unwrap_err();
    assert!(matches!(illegal, StoreError::Illegal(_)), "{illegal}");
}

#[tokio::test]
async fn constraints_refuse_rows_that_make_no_sense() {
    let bed = Bed::new().await;
    let mut job = received(&bed.store, 1).await;
    // `submitting` without a token.
    let error = bed.store.transition(&mut job, Event::Attempted, t(2), None).await.unwrap_err();
    assert!(matches!(error, StoreError::Database { .. }), "{error}");
    assert_eq!(job.state, JobState::Received);
    job.trace_sent = 5;
    assert!(bed.store.save(&job).await.is_err(), "more sent than there is");
    job.trace_sent = 0;
    job.released_at = Some(t(3));
    assert!(bed.store.save(&job).await.is_err(), "released while it lives");
}

#[tokio::test]
async fn one_failing_write_does_not_take_its_neighbours_along() {
    let bed = Bed::new().await;
    let good = received(&bed.store, 1).await;
    let mut bad = received(&bed.store, 2).await;
    bad.trace_sent = 5;
    let mut jobs = Vec::new();
    for n in 0..40 {
        let store = bed.store.clone();
        let mut job = if n % 2 == 0 { good.clone() } else { bad.clone() };
        job.failures = n;
        jobs.push(async move { store.save(&job).await.is_ok() });
    }
    let outcomes = futures_util::future::join_all(jobs).await;
    for (n, ok) in outcomes.into_iter().enumerate() {
        assert_eq!(ok, n % 2 == 0, "write {n}");
    }
    let (transactions, writes) = bed.store.transactions();
    assert!(writes >= 42 && transactions < writes, "{transactions} for {writes}");
}

#[tokio::test]
async fn an_operators_wish_is_not_overwritten_by_a_step_that_knew_nothing_of_it() {
    let bed = Bed::new().await;
    let job = received(&bed.store, 1).await;
    assert!(bed.store.request_cancel(job.id, t(9)).await.unwrap());
    assert!(!bed.store.request_cancel(job.id, t(10)).await.unwrap(), "once is enough");
    bed.store.save(&job).await.unwrap();
    let read = bed.store.job(job.id).await.unwrap().unwrap();
    assert_eq!(read.cancel_requested_at, Some(t(9)));
    assert_eq!(read.cancel_requested_by, Some(CancelBy::Operator));
}

#[tokio::test]
async fn due_doubtful_polled_and_cancelled_jobs_are_found() {
    let bed = Bed::new().await;
    let (store, backend) = (&bed.store, BackendName::from("b"));
    let mut job = received(store, 1).await;
    assert_eq!(store.due(t(1), 10).await.unwrap(), [job.id]);
    assert!(store.due(t(0), 10).await.unwrap().is_empty());
    job.submit_token = Some(job.id.submit_token());
    store.transition(&mut job, Event::Attempted, t(2), None).await.unwrap();
    assert!(store.due(t(9), 10).await.unwrap().is_empty(), "the round asks for it");
    assert_eq!(store.doubtful(&backend, t(9)).await.unwrap().len(), 1);
    assert!(store.polled(&backend).await.unwrap().is_empty());
    job.external_id = Some(ExternalId("17".into()));
    job.due_at = t(100);
    store.transition(&mut job, Event::Accepted, t(3), None).await.unwrap();
    assert!(store.doubtful(&backend, t(200)).await.unwrap().is_empty());
    assert_eq!(store.polled(&backend).await.unwrap().len(), 1);
    assert_eq!(store.next_due(t(9)).await.unwrap(), Some(t(100)));
    store.request_cancel(job.id, t(50)).await.unwrap();
    assert_eq!(store.to_cancel(&backend, t(50)).await.unwrap().len(), 1);
    store.cancel_sent(vec![job.id], t(51)).await.unwrap();
    assert!(store.to_cancel(&backend, t(50)).await.unwrap().is_empty(), "asked just now");
    assert_eq!(store.to_cancel(&backend, t(60)).await.unwrap().len(), 1, "again");
    let counts = store.counts().await.unwrap();
    assert_eq!(counts.len(), 1);
    assert_eq!((counts[0].state, counts[0].jobs), (JobState::Submitted, 1));
    assert_eq!(store.owed_names().await.unwrap()[0].2, 1);
    assert_eq!(store.unsent_bytes().await.unwrap(), 0);
    assert_eq!(store.by_ci_job(CiJobId(1)).await.unwrap().len(), 1);
}

#[tokio::test]
async fn operators_filters_narrow_the_list() {
    let bed = Bed::new().await;
    let mut first = received(&bed.store, 1).await;
    received(&bed.store, 2).await;
    finish(&bed.store, &mut first, 5).await;
    let list = async |filter: Filter| bed.store.list(&filter).await.unwrap().len();
    assert_eq!(list(Filter::default()).await, 2);
    assert_eq!(list(Filter { states: vec![JobState::Finished], ..Filter::default() }).await, 1);
    assert_eq!(list(Filter { runner: Some("x".into()), ..Filter::default() }).await, 0);
    assert_eq!(list(Filter { backend: Some("b".into()), ..Filter::default() }).await, 2);
    assert_eq!(list(Filter { project: Some("track".into()), ..Filter::default() }).await, 2);
    assert_eq!(list(Filter { since: Some(t(2)), ..Filter::default() }).await, 1);
    assert_eq!(list(Filter { limit: Some(1), ..Filter::default() }).await, 1);
}

#[tokio::test]
async fn only_jobs_that_are_owed_nothing_are_pruned() {
    let bed = Bed::new().await;
    let mut done = received(&bed.store, 1).await;
    received(&bed.store, 2).await;
    finish(&bed.store, &mut done, 5).await;
    assert!(bed.store.prune(t(999), 10).await.unwrap().is_empty());
    done.released_at = Some(t(6));
    bed.store.note(&done, "released", t(6), None).await.unwrap();
    assert_eq!(bed.store.prune(t(999), 10).await.unwrap(), [done.id]);
    assert!(bed.store.events(done.id).await.unwrap().is_empty());
    assert!(bed.store.check().await.unwrap().is_empty());
}

#[tokio::test]
async fn a_backup_is_a_database_and_private() {
    use std::os::unix::fs::PermissionsExt as _;
    let bed = Bed::new().await;
    received(&bed.store, 1).await;
    let to = bed.path().join("copy.db");
    bed.store.backup(&to).await.unwrap();
    assert_eq!(std::fs::metadata(&to).unwrap().permissions().mode() & 0o777, 0o600);
    let other = tempfile::tempdir().unwrap();
    std::fs::copy(&to, database_path(path(&other))).unwrap();
    let tracker = TaskTracker::new();
    let copy = Store::open(path(&other), Keyring::for_tests(), &tracker).await.unwrap();
    assert_eq!(copy.list(&Filter::default()).await.unwrap().len(), 1);
    assert_eq!(copy.schema().await.unwrap(), known_schema());
}

#[tokio::test]
async fn files_are_private_and_a_reader_cannot_write() {
    use std::os::unix::fs::PermissionsExt as _;
    let bed = Bed::new().await;
    let mode = |path: &Utf8Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&bed.path()), 0o700);
    assert_eq!(mode(bed.store.path()), 0o600);
    let refused = sqlx::query("DELETE FROM jobs").execute(&bed.store.read).await;
    assert!(refused.is_err());
    bed.store.probe().await.unwrap();
    assert!(!bed.store.is_failing());
}

#[tokio::test]
async fn a_database_from_the_future_is_refused_and_left_alone() {
    let bed = Bed::new().await;
    let dir = bed.close().await;
    let mut raw = options(&database_path(path(&dir))).connect().await.unwrap();
    sqlx::query("INSERT INTO _sqlx_migrations VALUES (99, 'future', '2030-01-01', 1, x'00', 0)")
        .execute(&mut raw)
        .await
        .unwrap();
    raw.close().await.unwrap();
    let before = std::fs::read(database_path(path(&dir))).unwrap();
    let error =
        Store::open(path(&dir), Keyring::for_tests(), &TaskTracker::new()).await.unwrap_err();
    assert!(matches!(error, OpenError::Newer { found: 99, .. }), "{error}");
    assert_eq!(std::fs::read(database_path(path(&dir))).unwrap(), before);
}

#[tokio::test]
async fn a_database_of_an_earlier_schema_is_migrated_with_all_it_holds() {
    let old = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/databases/0001.db");
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(old, database_path(path(&dir))).unwrap();
    let tracker = TaskTracker::new();
    let store = Store::open(path(&dir), Keyring::for_tests(), &tracker).await.unwrap();
    assert_eq!(store.schema().await.unwrap(), known_schema());
    assert!(store.check().await.unwrap().is_empty());
    let mut jobs = store.list(&Filter::default()).await.unwrap();
    jobs.sort_by_key(|job| job.ci_job.0);
    let seen: Vec<_> =
        jobs.iter().map(|job| (job.state.as_str(), job.brought_at.is_some())).collect();
    let expected =
        [("received", false), ("submitting", false), ("reporting", true), ("finished", true)];
    assert_eq!(seen, expected, "what was told before had nothing to bring home");
    assert!(store.payload(jobs[0].id).await.unwrap().unwrap().expose().contains("hunter1"));
    assert!(store.payload(jobs[3].id).await.unwrap().is_none());
}

#[tokio::test]
async fn a_damaged_database_is_named_so() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(database_path(path(&dir)), vec![7_u8; 8192]).unwrap();
    let error =
        Store::open(path(&dir), Keyring::for_tests(), &TaskTracker::new()).await.unwrap_err();
    assert!(matches!(error, OpenError::Damaged { .. }), "{error}");
}

#[tokio::test]
async fn an_operator_makes_no_database() {
    let dir = tempfile::tempdir().unwrap();
    let error = Store::attach(path(&dir), &TaskTracker::new()).await.unwrap_err();
    assert!(matches!(error, OpenError::Missing { .. }), "{error}");
    let bed = Bed::new().await;
    received(&bed.store, 1).await;
    let other = Store::attach(&bed.path(), &bed.tracker).await.unwrap();
    assert_eq!(other.list(&Filter::default()).await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_database_that_another_process_keeps_locked_is_waited_for() {
    let bed = Bed::new().await;
    let mut raw = options(bed.store.path()).connect().await.unwrap();
    sqlx::query("BEGIN IMMEDIATE").execute(&mut raw).await.unwrap();
    let store = bed.store.clone();
    let write = bed.tracker.spawn(async move { store.probe().await });
    tokio::task::yield_now().await;
    assert!(!write.is_finished());
    sqlx::query("COMMIT").execute(&mut raw).await.unwrap();
    tokio::time::timeout(Duration::from_secs(9), write).await.unwrap().unwrap().unwrap();
}

#[test]
fn times_far_away_do_not_overflow() {
    assert_eq!(after(Timestamp::MAX, Duration::from_secs(1)), Timestamp::MAX);
}

/// A database as the first schema left it, with what it holds readable.
async fn first_schema(dir: &Utf8Path, jobs: i64) {
    let mut raw = options(&database_path(dir)).create_if_missing(true).connect().await.unwrap();
    let all = migrator();
    let first = all.iter().take(1).cloned().collect::<Vec<_>>();
    Migrator::with_migrations(first).run(&mut raw).await.unwrap();
    for n in 0..jobs {
        let job = new_job(n);
        sqlx::query(
            "INSERT INTO jobs (id, runner, ci_url, ci_job, ci_pipeline, project_id, project, name,
                 backend, state, received_at, deadline_at, state_at, due_at, slot, project_slot)
             VALUES (?1, 'r', 'u', ?2, 1, 7, 'p', 'n', 'b', 'received', 0, 0, 0, 0, ?2, ?2)",
        )
        .bind(job.id.to_string())
        .bind(n)
        .execute(&mut raw)
        .await
        .unwrap();
        sqlx::query("INSERT INTO payloads (job, ci_payload) VALUES (?, ?)")
            .bind(job.id.to_string())
            .bind(job.payload.expose())
            .execute(&mut raw)
            .await
            .unwrap();
    }
    raw.close().await.unwrap();
}

/// Looks for a text in every file below a directory.
fn found_below(dir: &std::path::Path, text: &[u8]) -> Vec<std::path::PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(found_below(&path, text));
        } else if std::fs::read(&path).unwrap().windows(text.len()).any(|w| w == text) {
            found.push(path);
        }
    }
    found
}

#[tokio::test]
async fn what_an_older_bridge_left_readable_is_sealed_at_the_next_start() {
    let dir = tempfile::tempdir().unwrap();
    first_schema(path(&dir), 150).await;
    assert!(!found_below(dir.path(), b"hunter77").is_empty(), "it was readable");
    let tracker = TaskTracker::new();
    let store = Store::open(path(&dir), Keyring::for_tests(), &tracker).await.unwrap();
    for n in 0..150 {
        let payload = store.payload(new_job(n).id).await.unwrap().unwrap();
        assert_eq!(payload.expose(), new_job(n).payload.expose());
    }
    let wanted = store.wanted_keys().await.unwrap();
    assert_eq!((wanted.unsealed, wanted.keys.values().sum::<i64>()), (0, 150));
    for n in [0, 77, 149] {
        let found = found_below(dir.path(), format!("hunter{n}\"").as_bytes());
        assert!(found.is_empty(), "{n} still stands in {found:?}");
    }
    assert!(store.check().await.unwrap().is_empty());
}

#[tokio::test]
async fn no_secret_is_readable_in_the_files_while_a_job_lives() {
    let bed = Bed::new().await;
    received(&bed.store, 1).await;
    assert!(found_below(&bed.path().into_std_path_buf(), b"hunter1").is_empty());
}

#[tokio::test]
async fn the_first_start_makes_a_key_and_a_missing_or_other_key_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let (state, key) = (path(&dir).join("state"), path(&dir).join("bridge.key"));
    let tracker = TaskTracker::new();
    let open = async || {
        let ring = Keyring::read(&key).unwrap();
        Store::open(&state, ring, &tracker).await
    };
    let store = open().await.unwrap();
    assert!(key.exists());
    let job = received(&store, 1).await;
    drop(store);

    let kept = path(&dir).join("kept");
    std::fs::rename(&key, &kept).unwrap();
    let error = open().await.unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, OpenError::KeyMissing { jobs: 1, .. }), "{text}");
    assert!(text.contains("bridge.key") && text.contains("1 jobs"), "{text}");
    assert!(!key.exists(), "no other key was made in its place");

    let other = Keyring::read(&key).unwrap().create().unwrap();
    let error = open().await.unwrap_err();
    assert!(matches!(error, OpenError::KeyWrong { jobs: 1, .. }), "{error}");
    assert_eq!(Keyring::read(&key).unwrap().ids(), other.ids());

    let reader = Store::attach(&state, &tracker).await.unwrap();
    assert_eq!(reader.list(&Filter::default()).await.unwrap().len(), 1, "operators need no key");
    assert!(matches!(reader.payload(job.id).await, Err(StoreError::Sealed { .. })));

    std::fs::rename(&kept, &key).unwrap();
    let store = open().await.unwrap();
    assert!(store.payload(job.id).await.unwrap().unwrap().expose().contains("hunter1"));
}

/// A state directory with sealed jobs, and its key file.
struct Keyed {
    _dir: tempfile::TempDir,
    state: Utf8PathBuf,
    key: Utf8PathBuf,
    tracker: TaskTracker,
}

impl Keyed {
    async fn with_jobs(jobs: i64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (state, key) = (path(&dir).join("state"), path(&dir).join("bridge.key"));
        let keyed = Self { _dir: dir, state, key, tracker: TaskTracker::new() };
        let store = keyed.open().await;
        for n in 0..jobs {
            received(&store, n).await;
        }
        keyed
    }

    async fn open(&self) -> Store {
        let ring = Keyring::read(&self.key).unwrap();
        Store::open(&self.state, ring, &self.tracker).await.unwrap()
    }

    async fn assert_all_open(&self, jobs: i64) {
        let store = self.open().await;
        for n in 0..jobs {
            let payload = store.payload(new_job(n).id).await.unwrap().unwrap();
            assert_eq!(payload.expose(), new_job(n).payload.expose());
        }
    }

    /// Exchanges keys, and dies at a point when it is reached for the `nth` time.
    async fn rekey(&self, die_at: &'static str, nth: usize) -> Option<Rekeyed> {
        let (state, key) = (self.state.clone(), self.key.clone());
        let seen = AtomicU64::new(0);
        let task = TaskTracker::new().spawn(async move {
            let lock = Lock::acquire(&state).unwrap();
            rekey(&state, &key, &lock, LostRows::Refuse, &|name| {
                let times = seen.fetch_add(u64::from(name == die_at), Ordering::Relaxed) + 1;
                assert!(name != die_at || times != nth as u64, "dies here");
            })
            .await
            .unwrap()
        });
        task.await.ok()
    }
}

#[tokio::test]
async fn keys_are_exchanged_and_the_old_one_is_of_no_use_any_more() {
    let keyed = Keyed::with_jobs(150).await;
    let before = Keyring::read(&keyed.key).unwrap();
    let done = keyed.rekey("", 0).await.unwrap();
    assert_eq!((done.rows, done.lost, done.resumed), (150, 0, false));
    let after = Keyring::read(&keyed.key).unwrap();
    assert_eq!(after.ids(), [done.key]);
    assert_ne!(after.ids(), before.ids());
    keyed.assert_all_open(150).await;
    let store = keyed.open().await;
    let wanted = store.wanted_keys().await.unwrap();
    assert_eq!(wanted.lost_without(&before), 150);
    drop(store);
    assert_eq!(keyed.rekey("", 0).await.unwrap().rows, 150, "and once more");
}

#[tokio::test]
async fn an_exchange_of_keys_that_dies_anywhere_loses_nothing_and_is_finished_by_the_next() {
    for (point, nth) in
        [("rekey_added", 1), ("rekey_batch", 1), ("rekey_batch", 2), ("rekey_sealed", 1)]
    {
        let keyed = Keyed::with_jobs(150).await;
        assert!(keyed.rekey(point, nth).await.is_none(), "it died at {point}");
        assert_eq!(Keyring::read(&keyed.key).unwrap().ids().len(), 2, "{point}: both are there");
        // A daemon may run in between, and take jobs.
        let store = keyed.open().await;
        received(&store, 150).await;
        drop(store);
        keyed.assert_all_open(151).await;
        let done = keyed.rekey("", 0).await.unwrap();
        assert!(done.resumed, "{point}");
        assert_eq!(Keyring::read(&keyed.key).unwrap().ids(), [done.key]);
        keyed.assert_all_open(151).await;
    }
    let keyed = Keyed::with_jobs(3).await;
    assert!(keyed.rekey("rekey_done", 1).await.is_none());
    assert_eq!(Keyring::read(&keyed.key).unwrap().ids().len(), 1);
    keyed.assert_all_open(3).await;
}

#[tokio::test]
async fn what_was_sealed_with_a_lost_key_is_given_up_only_on_request() {
    let keyed = Keyed::with_jobs(3).await;
    std::fs::remove_file(&keyed.key).unwrap();
    let lock = Lock::acquire(&keyed.state).unwrap();
    let call = async |lost| rekey(&keyed.state, &keyed.key, &lock, lost, &|_name| {}).await;
    let error = call(LostRows::Refuse).await.unwrap_err();
    assert!(matches!(error, RekeyError::Open(OpenError::KeyMissing { jobs: 3, .. })), "{error}");
    let done = call(LostRows::GiveUp).await.unwrap();
    assert_eq!(done.lost, 3);
    let store = keyed.open().await;
    let payload = store.payload(new_job(1).id).await.unwrap().unwrap();
    assert_eq!(payload.expose(), "", "the row is there, and says nothing");
}
