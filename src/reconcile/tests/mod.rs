//! The reconciler with a real store, a real client, a GitLab in a box and a scripted batch system.
//!
//! Tests call the sweep; nothing here waits for a timer. The clocks of ours and of the batch system
//! are moved by hand.

mod bed;
mod crash;
mod cut;
mod finishing;
mod observing;
mod reporting;
mod submitting;

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use bridge_backend::fake::{FakeOptions, FakeWorld};
use bridge_backend::{Filesystem, SubmitToken};
use camino::Utf8Path;

use super::*;
use crate::cache::CacheSettings;
use crate::coordinator::{Coordinator, JobView, NewJob, Options, RunnerOptions, Variable};
use crate::domain::clock::ManualClock;
use crate::domain::id::CiJobId;
use crate::gitlab::wire::Secret;
use crate::gitlab::{Client, ClientOptions, Info, InfoOptions, RequestReply};
use crate::job::{OnBackend, RunnerContext};
use crate::store::{EventRow, Keyring};
use crate::trace::strip_headers;

/// More turns than any test needs: each is a second of the test's time.
const MOST_TURNS: usize = 2_000;

/// A secret that jobs print and nobody may see.
const SECRET: &str = "correct-horse-battery";

/// What outlives the process: the disk, GitLab, the batch system, the time.
struct Scene {
    dir: tempfile::TempDir,
    gitlab: Coordinator,
    /// Where the client finds GitLab.
    url: String,
    token: String,
    world: FakeWorld,
    clock: ManualClock,
    tuning: Tuning,
}

/// What tests change of a runner and the reconciler.
#[derive(Clone, Debug)]
struct Tuning {
    lost_after: Duration,
    output_limit: u64,
    pre_get_sources_script: Option<String>,
    prepare_workers: usize,
    step_workers: usize,
    short_token: &'static str,
}

impl Default for Tuning {
    fn default() -> Self {
        Self {
            lost_after: Duration::from_secs(600),
            output_limit: 4 << 20,
            pre_get_sources_script: None,
            prepare_workers: 4,
            step_workers: 32,
            short_token: "short",
        }
    }
}

/// One process.
struct Life {
    store: Store,
    reconciler: Reconciler,
    client: Client,
    tracker: TaskTracker,
    store_tracker: TaskTracker,
    shutdown: CancellationToken,
    illegal: Arc<Nobody>,
}

/// Counts what must not happen.
#[derive(Debug, Default)]
struct Nobody {
    illegal: AtomicUsize,
    confirmed: AtomicUsize,
}

impl Watcher for Nobody {
    fn backend_call(
        &self,
        _: &BackendName,
        _: &'static str,
        _: Option<bridge_backend::ErrorKind>,
        _: Duration,
    ) {
    }
    fn sweep(&self, _: Duration) {}
    fn confirmed(&self, _: &Job, _: Duration) {
        self.confirmed.fetch_add(1, Ordering::SeqCst);
    }
    fn illegal(&self) {
        self.illegal.fetch_add(1, Ordering::SeqCst);
    }
}

/// Makes a directory, in memory where there is room for one: these tests end processes, not machines,
/// and would wait for the disk most of their time.
fn dir() -> tempfile::TempDir {
    let mut builder = tempfile::Builder::new();
    let builder = builder.prefix("bridge-rec-");
    builder.tempdir_in("/dev/shm").or_else(|_| builder.tempdir()).unwrap()
}

fn start_of_time() -> Timestamp {
    Timestamp::from_second(1_780_000_000).unwrap()
}

impl Scene {
    async fn new(world: FakeOptions, gitlab: Options, tuning: Tuning) -> Self {
        drop(rustls::crypto::ring::default_provider().install_default());
        let gitlab = Coordinator::start(gitlab).await.unwrap();
        let token = gitlab.add_runner(RunnerOptions::default());
        Self {
            dir: dir(),
            url: gitlab.url(),
            gitlab,
            token,
            world: FakeWorld::new(world),
            clock: ManualClock::new(start_of_time()),
            tuning,
        }
    }

    fn path(&self, name: &str) -> Utf8PathBuf {
        Utf8Path::from_path(self.dir.path()).unwrap().join(name)
    }

    fn now(&self) -> Timestamp {
        self.clock.now()
    }

    /// Lets time pass for us and for the batch system.
    fn pass(&self, time: Duration) {
        self.clock.advance(time);
        self.world.advance(time);
    }

    fn context(&self) -> RunnerContext {
        RunnerContext {
            short_token: self.tuning.short_token.into(),
            system_id: "s_0123456789ab".into(),
            version: "0.1.0".into(),
            pre_get_sources_script: self.tuning.pre_get_sources_script.clone(),
            backend: OnBackend {
                sandbox: self.world.open().capabilities().filesystem == Filesystem::Sandbox,
                ..OnBackend::default()
            },
            ..RunnerContext::new("main", self.url.parse().unwrap(), self.path("builds"))
        }
    }

    /// Starts a process whose backend is `wrapped`.
    async fn open(&self, store: impl FnOnce(Store) -> Store, wrapped: Arc<dyn Backend>) -> Life {
        let (tracker, store_tracker) = (TaskTracker::new(), TaskTracker::new());
        let opened =
            Store::open(&self.path("state"), Keyring::for_tests(), &store_tracker).await.unwrap();
        let store = store(opened);
        std::fs::create_dir_all(self.path("spool")).unwrap();
        let client = Client::new(ClientOptions::new(self.url.parse().unwrap())).unwrap();
        let info = Info::new(InfoOptions { name: "bridge".into(), ..InfoOptions::default() });
        let runner = RunnerEntry {
            client: client.clone(),
            info,
            context: self.context(),
            caches: Arc::new(
                CacheStore::open(
                    &self.path("cache"),
                    &CacheSettings::default(),
                    Arc::new(self.clock.clone()),
                )
                .unwrap(),
            ),
            hostname: "submit-node".into(),
            output_limit: self.tuning.output_limit,
            deadline_reserve: Duration::from_secs(60),
            minimum_run_time: Duration::from_secs(30),
        };
        let world = World {
            runners: [("main".into(), Arc::new(runner))].into(),
            backends: [(
                "batch".into(),
                BackendEntry { backend: wrapped, poll_interval: Some(Duration::from_millis(1)) },
            )]
            .into(),
        };
        let shutdown = CancellationToken::new();
        let illegal = Arc::new(Nobody::default());
        let watcher: Arc<dyn Watcher> = Arc::<Nobody>::clone(&illegal);
        let reconciler = Reconciler::new(
            store.clone(),
            Arc::new(self.clock.clone()),
            Settings {
                spool_dir: self.path("spool"),
                lost_after: self.tuning.lost_after,
                artifacts_dir: self.path("artifacts"),
                prepare_workers: self.tuning.prepare_workers,
                finish_workers: 2,
                step_workers: self.tuning.step_workers,
                crash_at: None,
            },
            world,
            watcher,
            tracker.clone(),
            shutdown.clone(),
        );
        Life { store, reconciler, client, tracker, store_tracker, shutdown, illegal }
    }

    /// Asks GitLab for a job and writes it down, as the agent does.
    async fn receive(&self, life: &Life, job: NewJob) -> (i64, JobId) {
        static RANDOM: AtomicU64 = AtomicU64::new(1);
        let ci_job = self.gitlab.enqueue(job);
        let info = Info::new(InfoOptions { name: "bridge".into(), ..InfoOptions::default() });
        let token = Secret::new(self.token.as_str());
        let reply = life.client.request_job(&token, "s_0123456789ab", &info, None).await.unwrap();
        let RequestReply::Job(received) = reply else { panic!("no job: {reply:?}") };
        assert_eq!(received.payload.id, ci_job);
        let now = self.now();
        let id = JobId::mint(now, u128::from(RANDOM.fetch_add(1, Ordering::SeqCst)));
        let new = crate::store::NewJob {
            id,
            runner: "main".into(),
            ci_url: self.gitlab.url(),
            ci_job: CiJobId(ci_job),
            ci_pipeline: 1,
            project_id: received.payload.job_info.project_id,
            project: "hep/tracker".into(),
            name: received.payload.job_info.name.clone(),
            backend: "batch".into(),
            received_at: now,
            deadline_at: policy::after(now, Duration::from_secs(received.payload.timeout_secs())),
            payload: received.raw,
        };
        life.store.receive(new).await.unwrap();
        (ci_job, id)
    }

    /// One sweep and everything it starts, a second later than the one before.
    async fn turn(&self, life: &Life) {
        self.pass(Duration::from_secs(1));
        life.reconciler.sweep(self.now()).await.unwrap();
        life.reconciler.quiesce().await;
    }

    fn spool(&self, id: JobId) -> Vec<u8> {
        std::fs::read(self.path("spool").join(format!("{id}.trace"))).unwrap()
    }

    fn view(&self, ci_job: i64) -> JobView {
        self.gitlab.job(ci_job).unwrap()
    }

    /// The trace's text in GitLab, without times.
    fn text(&self, ci_job: i64) -> String {
        plain(&self.view(ci_job).trace)
    }

    fn assert_no_violations(&self) {
        self.world.assert_no_violations();
        let violations = self.gitlab.final_violations();
        assert!(violations.is_empty(), "{violations:#?}");
    }
}

impl Life {
    async fn job(&self, id: JobId) -> Job {
        self.store.job(id).await.unwrap().unwrap()
    }

    async fn events(&self, id: JobId) -> Vec<EventRow> {
        self.store.events(id).await.unwrap()
    }

    async fn owed(&self) -> usize {
        self.store.counts().await.unwrap().iter().map(|count| count.jobs).sum()
    }

    /// Ends the process as an operator does.
    async fn stop(self) {
        self.shutdown.cancel();
        self.tracker.close();
        let soon = Duration::from_secs(20);
        tokio::time::timeout(soon, self.tracker.wait()).await.unwrap();
        let Self { store, store_tracker, reconciler, .. } = self;
        drop(reconciler);
        store.close().await;
        store_tracker.close();
        tokio::time::timeout(soon, store_tracker.wait()).await.unwrap();
    }
}

/// Gives a trace's text without its headers, every number in it replaced.
fn plain(trace: &[u8]) -> String {
    let text = String::from_utf8(strip_headers(trace)).unwrap();
    let mut out = String::new();
    for c in text.chars() {
        if !c.is_ascii_digit() {
            out.push(c);
        } else if !out.ends_with('#') {
            out.push('#');
        }
    }
    out
}

/// A job that checks nothing out and has a secret in a file.
fn job(name: &str) -> NewJob {
    NewJob::new(name)
        .script("true")
        .env("GIT_STRATEGY", "none")
        .variable(Variable::new("PASSWORD", SECRET).masked().file())
}

fn token_of(id: JobId) -> SubmitToken {
    id.submit_token()
}

fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}
