//! `bridge serve`: the daemon.

use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use futures_util::future::BoxFuture;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, watch};

use crate::cli::Context;
use crate::cli::exit::{Exit, Failure};
use crate::config;
use crate::config::Config;
use crate::daemon::{Daemon, Labels, StartError};
use crate::domain::id::RunnerName;
use crate::gitlab::Secret;
use crate::http::{self, HealthSource, Pages, Problem, WhoseMove};
use crate::logins::Logins;
use crate::registry::Backends;
use crate::rotation::Rotation;
use crate::store::{KeyFileError, LockError, OpenError, Store};
use crate::telemetry::{self, BuildInfo, Chain, JobCount, Metrics, Snapshot};

/// Take jobs from GitLab and see them through, until told to stop
#[derive(Debug, Args)]
pub struct ServeArgs {}

struct Health {
    store: Store,
    conditions: crate::agent::Conditions,
    labels: Labels,
    metrics: Arc<Metrics>,
    logins: Logins,
}

impl HealthSource for Health {
    fn health(&self) -> BoxFuture<'_, Vec<Problem>> {
        Box::pin(async {
            let mut problems: Vec<Problem> = self
                .conditions
                .list()
                .into_iter()
                .map(|(who, what)| Problem {
                    what: format!("runner {who}: {what}"),
                    whose_move: WhoseMove::Operator,
                })
                .collect();
            // As the last write found it: asking anew would wait in line behind whatever is stuck.
            if let Some(error) = self.store.trouble() {
                problems.push(Problem {
                    what: format!("the database takes no writes: {error}"),
                    whose_move: WhoseMove::Operator,
                });
            }
            problems.extend(self.logins.troubles().into_iter().map(by_operator));
            problems
        })
    }

    fn warnings(&self) -> BoxFuture<'_, Vec<Problem>> {
        Box::pin(async { self.logins.warnings().into_iter().map(by_operator).collect() })
    }

    fn snapshot(&self) -> BoxFuture<'_, Snapshot> {
        Box::pin(async {
            let counts = self.store.counts().await.unwrap_or_else(|error| {
                tracing::warn!(error = %Chain(&error), "jobs could not be counted for a scrape");
                Vec::new()
            });
            let unsent_bytes = self.store.unsent_bytes().await.unwrap_or(0);
            let jobs = counts
                .into_iter()
                .map(|count| JobCount {
                    runner: self.labels.of(&count.runner),
                    backend: count.backend.0,
                    state: count.state.as_str(),
                    count: u64::try_from(count.jobs).unwrap_or(u64::MAX),
                })
                .collect();
            self.metrics.set_store_transactions(self.store.transactions().0);
            Snapshot { jobs, unsent_bytes }
        })
    }
}

fn by_operator(what: String) -> Problem {
    Problem { what, whose_move: WhoseMove::Operator }
}

/// The signals that the daemon listens to.
struct Signals {
    term: Signal,
    int: Signal,
    hup: Signal,
    /// Tokens that are in force from now on.
    tokens: mpsc::Receiver<(RunnerName, Secret)>,
}

enum Told {
    Stop(&'static str),
    Reload,
    Token(RunnerName, Secret),
    Tick,
}

impl Signals {
    fn new(tokens: mpsc::Receiver<(RunnerName, Secret)>) -> std::io::Result<Self> {
        Ok(Self {
            tokens,
            term: signal(SignalKind::terminate())?,
            int: signal(SignalKind::interrupt())?,
            hup: signal(SignalKind::hangup())?,
        })
    }

    async fn next(&mut self, tick: Duration) -> Told {
        // `recv` is cancel-safe, of signals and of channels, as is a sleep.
        tokio::select! {
            _ = self.term.recv() => Told::Stop("SIGTERM"),
            _ = self.int.recv() => Told::Stop("SIGINT"),
            _ = self.hup.recv() => Told::Reload,
            Some((runner, token)) = self.tokens.recv() => Told::Token(runner, token),
            () = tokio::time::sleep(tick) => Told::Tick,
        }
    }
}

impl ServeArgs {
    /// Runs the daemon until it is told to stop.
    ///
    /// # Errors
    ///
    /// When it cannot start.
    pub async fn run(self, context: &Context) -> anyhow::Result<Exit> {
        let config = context.config()?;
        let metrics = Arc::new(Metrics::new(&BuildInfo {
            name: "bridge".into(),
            version: crate::daemon::VERSION.into(),
            revision: crate::daemon::REVISION.into(),
            os: std::env::consts::OS.into(),
            architecture: std::env::consts::ARCH.into(),
        }));
        telemetry::init(&context.log_options(Some(&config), "info"), Some(Arc::clone(&metrics)))?;
        // Before anything is started, so that a signal during the start is not lost.
        let (changed, tokens) = mpsc::channel(1);
        let mut signals = Signals::new(tokens)?;
        let daemon = match Daemon::start(config, &context.registry, metrics).await {
            Ok(daemon) => daemon,
            Err(error) => return Err(refuse(error).into()),
        };
        check_backends(&daemon).await;
        let configs = rotate(&daemon, context, changed)?;
        let (logins, worlds) = look_after_logins(&daemon);
        if let Some(address) = &daemon.config().listen_address {
            let bound = http::bind(address).await?;
            tracing::info!(address = %bound.address(), "metrics and health are served");
            let pages =
                Pages { metrics: Arc::clone(daemon.metrics()), source: health(&daemon, logins) };
            let stop = daemon.shutdown().clone();
            daemon.tracker().spawn(async move {
                if let Err(error) = bound.serve(pages, stop).await {
                    tracing::error!(error = %Chain(&error), "metrics and health are not served");
                }
            });
        }
        tracing::info!(
            version = crate::daemon::VERSION,
            runners = daemon.config().runners.len(),
            config = %daemon.config().path,
            "bridge serves"
        );
        notify(&[sd_notify::NotifyState::Ready]);
        let tick = sd_notify::watchdog_enabled().map_or(Duration::from_secs(3600), |t| t / 2);
        loop {
            match signals.next(tick).await {
                Told::Tick => {
                    // A database that does not answer is a daemon that does nothing.
                    if daemon.store().counts().await.is_ok() {
                        notify(&[sd_notify::NotifyState::Watchdog]);
                    }
                }
                Told::Reload => {
                    notify(&[sd_notify::NotifyState::Reloading]);
                    reload(&daemon, context).await;
                    configs.send_replace(daemon.config());
                    worlds.send_replace(daemon.backends());
                    notify(&[sd_notify::NotifyState::Ready]);
                }
                Told::Token(runner, token) => {
                    match daemon.replace_token(&runner, token, &context.registry).await {
                        Ok(()) => tracing::info!(%runner, "the runner's new token is in force"),
                        // The next sweep finds the file different again.
                        Err(error) => tracing::error!(
                            %runner, error = %Chain(&error), "the runner's new token is not in force"
                        ),
                    }
                    configs.send_replace(daemon.config());
                }
                Told::Stop(name) => {
                    tracing::info!(signal = name, "stopping; jobs stay with their backends");
                    break;
                }
            }
        }
        notify(&[sd_notify::NotifyState::Stopping]);
        let limit = daemon.config().shutdown_timeout;
        if daemon.stop(limit).await {
            tracing::info!("stopped");
        }
        Ok(Exit::Done)
    }
}

/// Has the runners' tokens looked after; what is returned tells of new configurations.
fn rotate(
    daemon: &Daemon,
    context: &Context,
    changed: mpsc::Sender<(RunnerName, Secret)>,
) -> anyhow::Result<watch::Sender<Arc<Config>>> {
    let (configs, watched) = watch::channel(daemon.config());
    let system_id = crate::daemon::system_id(daemon.config().dir())?;
    let rotation =
        Rotation::new(Arc::clone(&context.clock), daemon.conditions().clone(), system_id);
    let stop = daemon.shutdown().clone();
    daemon.tracker().spawn(async move { rotation.run(watched, changed, stop).await });
    Ok(configs)
}

/// Has the logins at backends looked after; what is returned tells of new backends.
fn look_after_logins(daemon: &Daemon) -> (Logins, watch::Sender<Backends>) {
    let (worlds, watched) = watch::channel(daemon.backends());
    let logins = Logins::default();
    let (mine, metrics) = (logins.clone(), Arc::clone(daemon.metrics()));
    let stop = daemon.shutdown().clone();
    daemon.tracker().spawn(async move { mine.run(watched, metrics, stop).await });
    (logins, worlds)
}

fn notify(states: &[sd_notify::NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!(error = %error, "systemd was not told");
    }
}

/// Gives each reason not to start its exit code and hint.
fn refuse(error: StartError) -> Failure {
    let exit = match &error {
        StartError::Lock(LockError::Held { .. }) => Exit::Running,
        // Opening asks nobody: what can be wrong is what the file says.
        StartError::Backend { .. }
        | StartError::StillOwed { .. }
        | StartError::NeedsRestart(_)
        | StartError::Client { .. }
        | StartError::Cache { .. }
        | StartError::Key(_)
        | StartError::Open(
            OpenError::KeyMissing { .. } | OpenError::KeyWrong { .. } | OpenError::KeyFile { .. },
        )
        | StartError::Lock(LockError::Network { .. }) => Exit::Configuration,
        StartError::Lock(LockError::Io { .. })
        | StartError::Open(_)
        | StartError::Store(_)
        | StartError::Identity(_)
        | StartError::Directory { .. } => Exit::Unexpected,
    };
    let failure = Failure::new(exit, "start");
    let failure = match hint(&error) {
        Some(hint) => failure.hint(hint),
        None => failure,
    };
    failure.source(error)
}

fn hint(error: &StartError) -> Option<&'static str> {
    match error {
        StartError::Lock(LockError::Held { .. }) => {
            Some("stop the other one, or give this one a state_dir of its own")
        }
        StartError::Lock(LockError::Network { .. }) => {
            Some("set state_dir to a directory on this machine's own disk, such as /var/lib/bridge")
        }
        StartError::Open(OpenError::KeyMissing { .. } | OpenError::KeyWrong { .. }) => {
            Some(KEY_LOST)
        }
        StartError::Key(error) => key_file_hint(error),
        StartError::Open(OpenError::KeyFile { source }) => key_file_hint(source),
        StartError::Open(crate::store::OpenError::Newer { .. }) => {
            Some("start the newer bridge again, or restore a backup made before the upgrade")
        }
        StartError::Open(crate::store::OpenError::Damaged { .. }) => Some(
            "move it away and restore a backup (`bridge db backup` makes one); jobs it knew go on \
             at their backends",
        ),
        StartError::Lock(LockError::Io { .. })
        | StartError::Open(_)
        | StartError::Store(_)
        | StartError::Backend { .. }
        | StartError::Client { .. }
        | StartError::Cache { .. }
        | StartError::Identity(_)
        | StartError::Directory { .. }
        | StartError::StillOwed { .. }
        | StartError::NeedsRestart(_) => None,
    }
}

/// What an operator can do about a key that is not there.
pub(in crate::cli) const KEY_LOST: &str = "put the key file back from its copy, or name it with `key_file`; \
     if it is lost for good, `bridge db rekey --give-up` lets bridge start without what was sealed: \
     nobody can report those jobs then, and GitLab fails them after a while";

/// What an operator can do about a key file that cannot be trusted.
pub(in crate::cli) fn key_file_hint(error: &KeyFileError) -> Option<&'static str> {
    match error {
        KeyFileError::Mode { .. } => {
            Some("run chmod 600 on it, and `bridge db rekey` if it was read")
        }
        KeyFileError::Owner { .. } => Some("run chown on it, or start bridge as its owner"),
        KeyFileError::Line { .. } | KeyFileError::Empty { .. } | KeyFileError::Missing { .. } => {
            Some("put the key file back from its copy, or name it with `key_file`")
        }
        KeyFileError::Io { .. } => None,
    }
}

/// Asks each backend whether it would take a job; one that would not is no reason not to start.
async fn check_backends(daemon: &Daemon) {
    for (name, backend) in daemon.backends() {
        match tokio::time::timeout(Duration::from_secs(30), backend.check()).await {
            Ok(Ok(())) => tracing::info!(backend = %name, "the backend takes jobs"),
            Ok(Err(error)) => {
                tracing::error!(backend = %name, error = %Chain(&error), "the backend takes no jobs");
            }
            Err(_elapsed) => {
                tracing::error!(backend = %name, "the backend did not answer within 30 s");
            }
        }
    }
}

async fn reload(daemon: &Daemon, context: &Context) {
    let path = daemon.config().path.clone();
    let loaded = match config::load(&path) {
        Ok(loaded) => loaded,
        Err(error) => {
            tracing::error!(error = %Chain(&error), "the new configuration is refused, the old one stays");
            return;
        }
    };
    match daemon.reload(loaded, &context.registry).await {
        Ok(()) => tracing::info!(config = %path, "the configuration was read again"),
        Err(error) => {
            tracing::error!(error = %Chain(&error), "the new configuration is refused, the old one stays");
        }
    }
}

fn health(daemon: &Daemon, logins: Logins) -> Arc<dyn HealthSource> {
    Arc::new(Health {
        store: daemon.store().clone(),
        conditions: daemon.conditions().clone(),
        labels: daemon.labels().clone(),
        metrics: Arc::clone(daemon.metrics()),
        logins,
    })
}
