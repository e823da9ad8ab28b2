//! A bridge that runs: store, agents and reconciler, wired to a configuration.
//!
//! `bridge serve` and `bridge exec` are this, and differ only in where the configuration comes from.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bridge_backend::{Backend, Filesystem};
use camino::{Utf8Path, Utf8PathBuf};
use jiff::Timestamp;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::agent::{Agent, AgentSettings, Conditions, Reservations, Shared};
use crate::cache::{CacheError, CacheStore};
use crate::config::{BackendEntry, Config, ImagePolicy, Runner, SourcesPlace};
use crate::domain::clock::{Clock, SystemClock};
use crate::domain::id::{BackendName, JobId, RunnerName};
use crate::domain::policy;
use crate::gitlab::{self, Client, ClientOptions, Info, InfoOptions, identity};
use crate::job::{self, Containers, FetchedBy, Mirrors, OnBackend, RunnerContext, Shell};
use crate::reconcile::{self, Reconciler, RunnerEntry, Settings, Watcher, World};
use crate::registry::{Registry, RegistryError};
use crate::store::{Job, KeyFileError, Keyring, Lock, LockError, OpenError, Store, StoreError};
use crate::telemetry::{CallKind, Chain, Metrics, RunnerLabels, RunnerSettings};

/// How often old jobs are removed.
const PRUNE_EVERY: Duration = Duration::from_secs(3600);

/// How many jobs one transaction of the pruning removes.
const PRUNE_BATCH: i64 = 500;

/// The version that GitLab and the trace show.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The commit this was built from, where whoever built it said so.
pub const REVISION: &str = match option_env!("BRIDGE_REVISION") {
    Some(revision) => revision,
    None => "unknown",
};

/// Why a bridge cannot start, or cannot take a new configuration.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The state directory cannot be had.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// The database does not open.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The key file cannot be used.
    #[error(transparent)]
    Key(#[from] KeyFileError),
    /// The database does not answer.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A runner's caches cannot be used as they are configured.
    #[error("open the caches of the runner {runner}")]
    Cache {
        /// The runner.
        runner: RunnerName,
        /// Why not.
        source: CacheError,
    },
    /// A backend does not open.
    #[error("open the backend {name}")]
    Backend {
        /// Its name.
        name: BackendName,
        /// Why.
        #[source]
        source: Box<RegistryError>,
    },
    /// A runner's GitLab cannot be spoken to.
    #[error("set up the client of the runner {name}")]
    Client {
        /// The runner.
        name: RunnerName,
        /// Why.
        #[source]
        source: gitlab::Error,
    },
    /// This machine has no identity.
    #[error("find out this runner manager's system ID")]
    Identity(#[source] identity::IdentityError),
    /// A directory cannot be made.
    #[error("make the directory {path}")]
    Directory {
        /// The directory.
        path: Utf8PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Jobs that are still owed work name a runner or backend that is not there.
    #[error(
        "leave out {what}: {jobs} jobs still owe it work, {example} for one; put it back until \
         `bridge jobs list --owed` no longer shows them"
    )]
    StillOwed {
        /// What is missing.
        what: String,
        /// How many jobs.
        jobs: usize,
        /// One of them.
        example: JobId,
    },
    /// A setting that cannot change while the daemon runs.
    #[error("change {0} without a restart")]
    NeedsRestart(&'static str),
}

/// A bridge that runs.
#[derive(Debug)]
pub struct Daemon {
    store: Store,
    reconciler: Reconciler,
    metrics: Arc<Metrics>,
    labels: Labels,
    conditions: Conditions,
    reservations: Reservations,
    clock: Arc<dyn Clock>,
    tracker: TaskTracker,
    /// The writer outlives those who write.
    store_tracker: TaskTracker,
    shutdown: CancellationToken,
    running: Mutex<Running>,
    _lock: Lock,
}

/// What a new configuration replaces.
#[derive(Debug)]
struct Running {
    config: Arc<Config>,
    agents: CancellationToken,
    backends: BTreeMap<BackendName, (BackendEntry, Arc<dyn Backend>)>,
}

/// What is put together before anything is replaced.
struct Assembled {
    world: World,
    agents: Vec<(AgentSettings, Client, Info)>,
    backends: BTreeMap<BackendName, (BackendEntry, Arc<dyn Backend>)>,
}

fn random() -> u128 {
    let mut bytes = [0_u8; 16];
    if let Err(error) = getrandom::fill(&mut bytes) {
        // Never seen on Linux after boot. A ULID's time part and the database's primary key still
        // keep two jobs apart.
        tracing::error!(error = %error, "the system gives no random numbers");
    }
    u128::from_le_bytes(bytes)
}

/// Reads the point of the crash table at which a test wants the process to die.
fn crash_at() -> Option<String> {
    std::env::var("BRIDGE_CRASH_AT").ok().filter(|name| !name.is_empty())
}

/// Dies at a point, if a test asked for it.
pub(crate) fn crash_point(name: &str) {
    if crash_at().as_deref() == Some(name) {
        reconcile::crash(name);
    }
}

/// Gives this machine's name.
pub fn hostname() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// Reads or makes the system ID beside a configuration file.
///
/// # Errors
///
/// When it can be neither read nor written.
pub fn system_id(config_dir: &Utf8Path) -> Result<String, identity::IdentityError> {
    identity::system_id(config_dir, identity::machine_id().as_deref(), random())
        .map(|id| id.to_string())
}

/// Describes this program to GitLab.
pub fn info(backend_kind: &str) -> Info {
    Info::new(InfoOptions {
        name: "bridge".into(),
        version: VERSION.into(),
        revision: REVISION.into(),
        executor: format!("bridge-{backend_kind}"),
        shell: "bash".into(),
        ..InfoOptions::default()
    })
}

/// Gives the options of a runner's client.
pub fn client_options(runner: &Runner) -> ClientOptions {
    ClientOptions {
        tls_ca_file: runner.tls_ca_file.clone(),
        tls_cert_file: runner.tls_cert_file.clone(),
        tls_key_file: runner.tls_key_file.clone(),
        ..ClientOptions::new(runner.url.clone())
    }
}

/// Gives the URL under which a runner's jobs are written down.
fn ci_url(runner: &Runner) -> String {
    runner.url.as_str().trim_end_matches('/').to_owned()
}

fn assemble(
    config: &Config,
    registry: &Registry,
    known: &BTreeMap<BackendName, (BackendEntry, Arc<dyn Backend>)>,
) -> Result<Assembled, StartError> {
    let system_id = system_id(config.dir()).map_err(StartError::Identity)?;
    let mut backends = BTreeMap::new();
    for (name, entry) in &config.backends {
        let backend = match known.get(name) {
            Some((before, backend)) if before == entry => Arc::clone(backend),
            _ => registry.open(entry).map_err(|source| StartError::Backend {
                name: name.clone(),
                source: Box::new(source),
            })?,
        };
        backends.insert(name.clone(), (entry.clone(), backend));
    }
    let mut world = World::default();
    for (name, (entry, backend)) in &backends {
        world.backends.insert(
            name.clone(),
            reconcile::BackendEntry {
                backend: Arc::clone(backend),
                poll_interval: entry.poll_interval,
            },
        );
    }
    let mut agents = Vec::new();
    for runner in &config.runners {
        let failed = |source| StartError::Client { name: runner.name.clone(), source };
        let flags = job::unknown_flags(runner.feature_flags.keys());
        if !flags.is_empty() {
            tracing::warn!(
                runner = %runner.name, flags = flags.join(", "),
                "the configuration sets feature flags that nobody knows"
            );
        }
        let client = Client::new(client_options(runner)).map_err(failed)?;
        let entry = config.backends.get(&runner.backend);
        let on_backend = backends.get(&runner.backend).map(on_backend).unwrap_or_default();
        let info = info(entry.map_or("unknown", |entry| entry.kind.as_str()));
        world.runners.insert(
            runner.name.clone(),
            Arc::new(RunnerEntry {
                client: client.clone(),
                info: info.clone(),
                context: context(config, runner, &system_id, on_backend),
                caches: Arc::new(caches(config, runner)?),
                hostname: hostname(),
                output_limit: runner.output_limit,
                deadline_reserve: runner.deadline_reserve,
                minimum_run_time: runner.minimum_run_time,
            }),
        );
        let settings = AgentSettings {
            runner: runner.name.clone(),
            ci_url: ci_url(runner),
            backend: runner.backend.clone(),
            token: runner.token.clone(),
            system_id: system_id.clone(),
            limit: runner.limit,
            concurrent: config.concurrent,
            max_queued: entry.and_then(|entry| entry.max_queued),
            request_concurrency: runner.request_concurrency,
            check_interval: config.check_interval,
            strict_check_interval: runner.strict_check_interval,
            unhealthy_requests_limit: runner.unhealthy_requests_limit,
            unhealthy_interval: runner.unhealthy_interval,
            state_dir: config.state_dir.clone(),
        };
        agents.push((settings, client, info));
    }
    Ok(Assembled { world, agents, backends })
}

/// Opens the caches of a runner. Where runners of several servers share a directory, each server has
/// one of its own in it: the paths of projects are unique within a server alone.
fn caches(config: &Config, runner: &Runner) -> Result<CacheStore, StartError> {
    let mut dir = config.cache_dir(runner);
    let shared = |other: &&Runner| config.cache_dir(other) == dir && other.url != runner.url;
    if config.runners.iter().any(|other| shared(&other)) {
        let server = ci_url(runner);
        let server = server.split_once("://").map_or(server.as_str(), |(_, rest)| rest);
        dir.push(server.replace('/', "_"));
    }
    CacheStore::open(&dir, &runner.cache, Arc::new(SystemClock))
        .map_err(|source| StartError::Cache { runner: runner.name.clone(), source })
}

fn on_backend((entry, backend): &(BackendEntry, Arc<dyn Backend>)) -> OnBackend {
    let capabilities = backend.capabilities();
    OnBackend {
        sandbox: match capabilities.filesystem {
            Filesystem::Shared => false,
            Filesystem::Sandbox => true,
        },
        variables: capabilities.job_variables,
        job_options: entry.job_options.clone(),
    }
}

fn context(
    config: &Config,
    runner: &Runner,
    system_id: &str,
    on_backend: OnBackend,
) -> RunnerContext {
    let backend = config.backends.get(&runner.backend);
    RunnerContext {
        backend: on_backend,
        name: runner.name.0.clone(),
        url: runner.url.clone(),
        short_token: identity::short_token(runner.token.expose()),
        system_id: system_id.to_owned(),
        version: VERSION.to_owned(),
        builds_dir: config.builds_dir(runner),
        cache_dir: Some(config.cache_dir(runner)),
        environment: runner.environment.clone(),
        shell: match runner.shell.as_deref() {
            Some("sh") => Shell::Sh,
            Some(_) | None => Shell::Bash,
        },
        pre_get_sources_script: runner.pre_get_sources_script.clone(),
        post_get_sources_script: runner.post_get_sources_script.clone(),
        pre_build_script: runner.pre_build_script.clone(),
        post_build_script: runner.post_build_script.clone(),
        clone_url: runner.clone_url.clone(),
        tls_ca_file: runner.tls_ca_file.clone(),
        tls_cert_file: runner.tls_cert_file.clone(),
        tls_key_file: runner.tls_key_file.clone(),
        custom_build_dir: runner.custom_build_dir,
        mirrors: runner.mirrors_dir.clone().map(|dir| Mirrors { dir, keep: runner.mirrors_keep }),
        get_sources_timeout: runner.get_sources_timeout.or(runner.prepare_timeout),
        debug_trace_disabled: runner.debug_trace_disabled,
        runner_feature_flags: runner.feature_flags.clone(),
        login_shell: runner.login_shell,
        sources: match backend.map(|entry| entry.sources).unwrap_or_default() {
            SourcesPlace::SubmitNode => FetchedBy::SubmitNode,
            SourcesPlace::Allocation => FetchedBy::Job,
        },
        containers: match runner.image {
            ImagePolicy::Ignore => Containers::Ignore,
            ImagePolicy::Refuse => Containers::Refuse,
        },
    }
}

/// Refuses a configuration that leaves out what jobs still owe work to.
async fn check_owed(store: &Store, config: &Config) -> Result<(), StartError> {
    for (runner, backend, jobs, example) in store.owed_names().await? {
        if config.runner(&runner).is_none() {
            let what = format!("the runner {runner}");
            return Err(StartError::StillOwed { what, jobs, example });
        }
        if !config.backends.contains_key(&backend) {
            let what = format!("the backend {backend}");
            return Err(StartError::StillOwed { what, jobs, example });
        }
    }
    Ok(())
}

impl Daemon {
    /// Takes the state directory, opens everything, and starts.
    ///
    /// # Errors
    ///
    /// When anything of it is not to be had; nothing runs then.
    pub async fn start(
        config: Config,
        registry: &Registry,
        metrics: Arc<Metrics>,
    ) -> Result<Self, StartError> {
        let lock = Lock::acquire(&config.state_dir)?;
        let tracker = TaskTracker::new();
        let store_tracker = TaskTracker::new();
        // What the file alone can get wrong comes first: nothing is made for a daemon that cannot start.
        let assembled = assemble(&config, registry, &BTreeMap::new())?;
        let keys = Keyring::read(&config.key_file)?;
        let store = Store::open(&config.state_dir, keys, &store_tracker).await?;
        check_owed(&store, &config).await?;
        let spool_dir = config.state_dir.join("spool");
        make_dir(&spool_dir)?;
        reconcile::clear_leftovers(&store, &spool_dir).await?;
        reconcile::clear_packed(&store, &config.state_dir.join("artifacts")).await?;
        let shutdown = CancellationToken::new();
        let labels = Labels::default();
        labels.set(&config, &system_id(config.dir()).map_err(StartError::Identity)?);
        describe(&metrics, &config, &labels);
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        let reconciler = Reconciler::new(
            store.clone(),
            Arc::clone(&clock),
            Settings {
                spool_dir,
                artifacts_dir: config.state_dir.join("artifacts"),
                lost_after: config.lost_after,
                prepare_workers: config.prepare_workers,
                finish_workers: config.finish_workers,
                step_workers: 32,
                crash_at: crash_at(),
            },
            assembled.world,
            Arc::new(Counting { metrics: Arc::clone(&metrics), labels: labels.clone() }),
            tracker.clone(),
            shutdown.clone(),
        );
        let daemon = Self {
            store,
            reconciler,
            metrics,
            labels,
            conditions: Conditions::default(),
            reservations: Reservations::default(),
            clock,
            tracker,
            store_tracker,
            running: Mutex::new(Running {
                config: Arc::new(config),
                agents: shutdown.child_token(),
                backends: assembled.backends,
            }),
            shutdown,
            _lock: lock,
        };
        let looping = daemon.reconciler.clone();
        daemon.tracker.spawn(async move { looping.run().await });
        daemon.start_pruning();
        daemon.start_agents(assembled.agents);
        Ok(daemon)
    }

    fn start_agents(&self, agents: Vec<(AgentSettings, Client, Info)>) {
        let stop = self.running.lock().unwrap_or_else(PoisonError::into_inner).agents.clone();
        let (counting, receiving) = (Arc::clone(&self.metrics), Arc::clone(&self.metrics));
        let (labels, labels_too) = (self.labels.clone(), self.labels.clone());
        let (reconciler, watching) = (self.reconciler.clone(), self.reconciler.clone());
        let shared = Shared {
            store: self.store.clone(),
            clock: Arc::clone(&self.clock),
            random,
            wake: Arc::new(move || reconciler.wake()),
            shut: Arc::new(move |backend| watching.waits_for_operator(backend)),
            counted: Arc::new(move |runner, status| {
                counting.api_request(&labels.of(runner), "request_job", status);
            }),
            received: Arc::new(move |runner, queued| {
                receiving.job_received(&labels_too.of(runner), queued);
            }),
            conditions: self.conditions.clone(),
            reservations: self.reservations.clone(),
            crash_at: crash_at(),
        };
        for (settings, client, info) in agents {
            Agent::new(settings, client, info, shared.clone(), stop.clone()).start(&self.tracker);
        }
    }

    fn start_pruning(&self) {
        let (store, clock, shutdown) =
            (self.store.clone(), Arc::clone(&self.clock), self.shutdown.clone());
        let config = Arc::clone(&self.config());
        self.tracker.spawn(async move {
            while !shutdown.is_cancelled() {
                let before = clock.now().checked_sub(config.retention).unwrap_or(Timestamp::MIN);
                if let Err(error) = prune(&store, &config.state_dir, before).await {
                    tracing::warn!(error = %Chain(&error), "old jobs could not be removed");
                }
                // Both are cancel-safe.
                tokio::select! {
                    () = shutdown.cancelled() => {}
                    () = tokio::time::sleep(PRUNE_EVERY) => {}
                }
            }
        });
    }

    /// Takes a new configuration; on an error the old one stays, whole.
    ///
    /// # Errors
    ///
    /// When it cannot be had, leaves out what jobs still owe work to, or changes what only a restart
    /// can.
    pub async fn reload(&self, config: Config, registry: &Registry) -> Result<(), StartError> {
        let old = self.config();
        if old.state_dir != config.state_dir {
            return Err(StartError::NeedsRestart("state_dir"));
        }
        if old.key_file != config.key_file {
            return Err(StartError::NeedsRestart("key_file"));
        }
        if old.listen_address != config.listen_address {
            return Err(StartError::NeedsRestart("listen_address"));
        }
        check_owed(&self.store, &config).await?;
        let known =
            { self.running.lock().unwrap_or_else(PoisonError::into_inner).backends.clone() };
        let assembled = assemble(&config, registry, &known)?;
        let names: Vec<String> = config.runners.iter().map(|r| r.name.0.clone()).collect();
        {
            let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
            running.agents.cancel();
            running.agents = self.shutdown.child_token();
            running.config = Arc::new(config);
            running.backends = assembled.backends;
        }
        let config = self.config();
        self.labels.set(&config, &system_id(config.dir()).map_err(StartError::Identity)?);
        describe(&self.metrics, &config, &self.labels);
        self.reconciler.replace_world(assembled.world);
        self.conditions.retain(|who| names.iter().any(|name| name == who));
        self.start_agents(assembled.agents);
        Ok(())
    }

    /// Puts another token of a runner in force; everything else stays.
    ///
    /// Requests under way keep the old one, and are answered to their end. What GitLab said of its
    /// queue was said to the old token, and is forgotten with the agents.
    ///
    /// # Errors
    ///
    /// As [`Self::reload`].
    pub async fn replace_token(
        &self,
        runner: &RunnerName,
        token: gitlab::Secret,
        registry: &Registry,
    ) -> Result<(), StartError> {
        let mut config = Config::clone(&self.config());
        for known in config.runners.iter_mut().filter(|known| known.name == *runner) {
            known.token = token.clone();
        }
        self.reload(config, registry).await
    }

    /// Gives the configuration in force.
    pub fn config(&self) -> Arc<Config> {
        Arc::clone(&self.running.lock().unwrap_or_else(PoisonError::into_inner).config)
    }

    /// Gives the store.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Gives the metrics.
    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.metrics
    }

    /// Gives the labels of runners in the metrics.
    pub fn labels(&self) -> &Labels {
        &self.labels
    }

    /// Gives why jobs are not taken.
    pub fn conditions(&self) -> &Conditions {
        &self.conditions
    }

    /// Gives the backends in force.
    pub fn backends(&self) -> BTreeMap<BackendName, Arc<dyn Backend>> {
        self.running
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .backends
            .iter()
            .map(|(name, (_, backend))| (name.clone(), Arc::clone(backend)))
            .collect()
    }

    /// Gives the tasks that a shutdown waits for.
    pub fn tracker(&self) -> &TaskTracker {
        &self.tracker
    }

    /// Gives the token that ends them.
    pub fn shutdown(&self) -> &CancellationToken {
        &self.shutdown
    }

    /// Has the reconciler look at once.
    pub fn wake(&self) {
        self.reconciler.wake();
    }

    /// Stops: asks for no more jobs, finishes the steps at hand, leaves the jobs to their backends.
    ///
    /// Tells whether everything was finished within `limit`; what was not is found by the next start.
    pub async fn stop(self, limit: Duration) -> bool {
        self.shutdown.cancel();
        self.tracker.close();
        let clean = tokio::time::timeout(limit, self.tracker.wait()).await.is_ok();
        if !clean {
            tracing::warn!(
                "some steps were not finished in time; the next start goes on with them"
            );
        }
        let Self { store, store_tracker, reconciler, tracker, .. } = self;
        drop((reconciler, tracker));
        store.close().await;
        store_tracker.close();
        // The writer ends when nobody can write any more; steps that were left behind may still hold it.
        let closed =
            tokio::time::timeout(Duration::from_secs(2), store_tracker.wait()).await.is_ok();
        clean && closed
    }
}

fn make_dir(path: &Utf8Path) -> Result<(), StartError> {
    use std::os::unix::fs::DirBuilderExt as _;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|source| StartError::Directory { path: path.to_owned(), source })
}

/// Removes jobs that are over and were received before `before`, spools included.
///
/// # Errors
///
/// When the database does not take it.
pub async fn prune(
    store: &Store,
    state_dir: &Utf8Path,
    before: Timestamp,
) -> Result<usize, StoreError> {
    let mut removed = 0;
    loop {
        let jobs = store.prune(before, PRUNE_BATCH).await?;
        for job in &jobs {
            let path = state_dir.join("spool").join(format!("{job}.trace"));
            if let Err(error) = std::fs::remove_file(&path)
                && error.kind() != std::io::ErrorKind::NotFound
            {
                tracing::warn!(path = %path, error = %error, "a spool could not be removed");
            }
        }
        removed += jobs.len();
        if jobs.len() < usize::try_from(PRUNE_BATCH).unwrap_or(usize::MAX) {
            return Ok(removed);
        }
    }
}

/// How runners are labelled in the metrics, as gitlab-runner labels them.
#[derive(Clone, Debug, Default)]
pub struct Labels(Arc<Mutex<BTreeMap<RunnerName, RunnerLabels>>>);

impl Labels {
    fn set(&self, config: &Config, system_id: &str) {
        let labels = config.runners.iter().map(|runner| {
            let labels = RunnerLabels {
                runner: identity::short_token(runner.token.expose()),
                runner_name: runner.name.0.clone(),
                system_id: system_id.to_owned(),
            };
            (runner.name.clone(), labels)
        });
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = labels.collect();
    }

    /// Gives a runner's labels; of one that is no longer configured only the name is known.
    pub fn of(&self, runner: &RunnerName) -> RunnerLabels {
        let labels = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        labels.get(runner).cloned().unwrap_or_else(|| RunnerLabels {
            runner_name: runner.0.clone(),
            ..RunnerLabels::default()
        })
    }
}

fn describe(metrics: &Metrics, config: &Config, labels: &Labels) {
    let runners: Vec<RunnerSettings> = config
        .runners
        .iter()
        .map(|runner| RunnerSettings { labels: labels.of(&runner.name), limit: runner.limit })
        .collect();
    metrics.set_settings(config.concurrent, &runners);
}

/// Hands what the reconciler does to the metrics.
#[derive(Debug)]
struct Counting {
    metrics: Arc<Metrics>,
    labels: Labels,
}

impl Watcher for Counting {
    fn backend_call(
        &self,
        backend: &BackendName,
        verb: &'static str,
        error: Option<bridge_backend::ErrorKind>,
        took: Duration,
    ) {
        use bridge_backend::ErrorKind;
        let kind = match error {
            None => CallKind::Ok,
            Some(ErrorKind::Transient) => CallKind::Transient,
            Some(ErrorKind::Ambiguous) => CallKind::Ambiguous,
            Some(ErrorKind::Rejected(_)) => CallKind::Rejected,
            Some(ErrorKind::Lost) => CallKind::Lost,
        };
        self.metrics.backend_call(&backend.0, verb, kind, took);
    }

    fn sweep(&self, took: Duration) {
        self.metrics.swept(took);
    }

    fn confirmed(&self, job: &Job, lag: Duration) {
        self.metrics.confirmed(&job.backend.0, lag);
        let took = job.started_at.map_or(Duration::ZERO, |started| {
            policy::since(job.ended_at.unwrap_or(started), started)
        });
        let failure = job.verdict.as_ref().and_then(|verdict| verdict.failure);
        self.metrics.job_concluded(
            &self.labels.of(&job.runner),
            took,
            failure.map(crate::domain::verdict::FailureReason::as_str),
        );
    }

    fn illegal(&self) {
        self.metrics.illegal_transition();
    }
}
