//! The configuration: one TOML file, read once into types that can be trusted.
//!
//! Key names are those of gitlab-runner's `config.toml` wherever the meaning is the same, so that
//! people who know one file can read the other. The file's own types (`file`) are strict: a key
//! nobody knows is an error that names the nearest one. `resolve` turns them into [`Config`], in
//! which every path is absolute, every duration positive, every name known, and every default
//! filled in. All defaults stand in `resolve`, each with its reason.
//!
//! It must not know what a backend's own keys mean: a backend's table is handed on untouched.

mod cache;
mod error;
mod file;
mod resolve;
mod secret;
#[cfg(test)]
mod tests;
pub mod write;

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use camino::{Utf8Path, Utf8PathBuf};
use url::Url;

pub use self::error::{ConfigError, Problem};
pub use self::file::duration_in_words;
pub(crate) use self::file::nearest;
use crate::cache::CacheSettings;
use crate::domain::id::{BackendName, RunnerName};
use crate::gitlab::wire::Secret;
pub use crate::telemetry::LogFormat;

/// The port of `listen_address` when it names none; the one Prometheus lists for gitlab-runner.
pub const DEFAULT_PORT: u16 = 9252;

/// The environment variable that names the configuration file.
pub const CONFIG_VAR: &str = "BRIDGE_CONFIG";

/// Everything an operator can set, validated and with its defaults.
#[derive(Clone, Debug)]
pub struct Config {
    /// The file it was read from, absolute.
    pub path: Utf8PathBuf,
    /// `state_dir`: database and spools; must be a local disk.
    pub state_dir: Utf8PathBuf,
    /// `key_file`: the keys that seal what the database holds of jobs; outside `state_dir`.
    pub key_file: Utf8PathBuf,
    /// `concurrent`: jobs in flight, all runners together.
    pub concurrent: usize,
    /// `check_interval`: the pause between two requests for a job of one runner.
    pub check_interval: Duration,
    /// `log_level`: one of `trace`, `debug`, `info`, `warn`, `error`.
    pub log_level: Option<String>,
    /// `log_format`: how log lines look.
    pub log_format: LogFormat,
    /// `listen_address`: where `/metrics` and `/health` are served; nowhere without it.
    pub listen_address: Option<ListenAddress>,
    /// `shutdown_timeout`: how long the steps at hand may take after a TERM.
    pub shutdown_timeout: Duration,
    /// `prepare_workers`: jobs whose sources are fetched at the same time.
    pub prepare_workers: usize,
    /// `finish_workers`: jobs whose results are packed and sent at the same time.
    pub finish_workers: usize,
    /// `retention`: how long rows and spools of jobs that are over are kept.
    pub retention: Duration,
    /// `lost_after`: silence of a backend, in our own uptime, after which a job counts as lost.
    pub lost_after: Duration,
    /// `[[runners]]`, in the order of the file.
    pub runners: Vec<Runner>,
    /// `[backends.NAME]`.
    pub backends: BTreeMap<BackendName, BackendEntry>,
}

/// Where `/metrics` and `/health` are served; never beyond this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ListenAddress {
    /// A loopback address.
    Tcp(SocketAddr),
    /// A Unix socket.
    Unix(Utf8PathBuf),
}

/// What becomes of a job that asks for a container.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ImagePolicy {
    /// `ignore`: it runs without one, as with gitlab-runner's shell executor, and its trace says so.
    #[default]
    Ignore,
    /// `refuse`: it fails at once.
    Refuse,
}

/// Where a backend's jobs get their sources.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SourcesPlace {
    /// `submit-node`: here, before the job is submitted.
    #[default]
    SubmitNode,
    /// `allocation`: where the job runs, by the job itself.
    Allocation,
}

/// One `[backends.NAME]` table.
#[derive(Clone, PartialEq)]
pub struct BackendEntry {
    /// `kind`: which driver opens it.
    pub kind: String,
    /// `max_queued`: jobs that may wait over there before no more are asked for.
    pub max_queued: Option<usize>,
    /// `poll_interval`: the pause between two polls, where the default does not fit the site.
    pub poll_interval: Option<Duration>,
    /// `job_options`: the options that jobs may choose by variables; all if it is not given.
    pub job_options: Option<Vec<String>>,
    /// `sources`: where jobs get their sources.
    pub sources: SourcesPlace,
    /// Everything else, for the driver.
    pub table: toml::Table,
}

/// One `[[runners]]` table.
#[derive(Clone)]
pub struct Runner {
    /// `name`: ours for it; unique in the file.
    pub name: RunnerName,
    /// `url`: the GitLab instance, relative root included.
    pub url: Url,
    /// `token_file` or `token`: the authentication token.
    pub token: Secret,
    /// `token_file`, absolute, when the token is in one.
    pub token_file: Option<Utf8PathBuf>,
    /// `id`: GitLab's number for the runner, where `bridge register` noted it.
    pub id: Option<u64>,
    /// `token_expires_at`: when the token dies, where `bridge register` noted it; as in the file.
    pub token_expires_at: Option<String>,
    /// `token_rotation`: exchange the token in `token_file` for a new one when three quarters of its
    /// life are over.
    pub token_rotation: bool,
    /// `backend`: which backend runs its jobs.
    pub backend: BackendName,
    /// That backend's `kind`.
    pub backend_kind: String,
    /// `limit`: jobs in flight of this runner; 0 is no limit of its own.
    pub limit: usize,
    /// `request_concurrency`: requests for a job at the same time.
    pub request_concurrency: usize,
    /// `strict_check_interval`: wait `check_interval` also after a request that brought a job.
    pub strict_check_interval: bool,
    /// `builds_dir`: below which workspaces are made; must be seen by the machines jobs run on.
    pub builds_dir: Option<Utf8PathBuf>,
    /// `cache_dir`: below which caches are kept.
    pub cache_dir: Option<Utf8PathBuf>,
    /// `[runners.cache]`: a bucket behind that directory, and how much may be in it for how long.
    pub cache: CacheSettings,
    /// `[runners.custom_build_dir] enabled`: whether jobs may use `GIT_CLONE_PATH`.
    pub custom_build_dir: bool,
    /// `mirrors_dir`: below which one mirror per project is kept; none where absent.
    pub mirrors_dir: Option<Utf8PathBuf>,
    /// `mirrors_keep`: how long a mirror that no job uses is kept.
    pub mirrors_keep: Duration,
    /// `environment`: variables for every job, in order; a job's own variables win.
    pub environment: Vec<(String, String)>,
    /// `output_limit`, in bytes (KiB in the file): a longer trace is cut in its middle.
    pub output_limit: u64,
    /// `tls_ca_file`: certificates to trust besides the system's.
    pub tls_ca_file: Option<Utf8PathBuf>,
    /// `tls_cert_file`: the client certificate.
    pub tls_cert_file: Option<Utf8PathBuf>,
    /// `tls_key_file`: its key.
    pub tls_key_file: Option<Utf8PathBuf>,
    /// `shell`: `bash` or `sh`; the backend's best where absent.
    pub shell: Option<String>,
    /// `login_shell`: whether that shell reads its login profile first, as gitlab-runner's does.
    pub login_shell: bool,
    /// `image`: what becomes of a job that asks for a container.
    pub image: ImagePolicy,
    /// `clone_url`: the instance as git should reach it, where that differs from `url`.
    pub clone_url: Option<Url>,
    /// `pre_get_sources_script`.
    pub pre_get_sources_script: Option<String>,
    /// `post_get_sources_script`.
    pub post_get_sources_script: Option<String>,
    /// `pre_build_script`.
    pub pre_build_script: Option<String>,
    /// `post_build_script`.
    pub post_build_script: Option<String>,
    /// `prepare_timeout`: limit for everything before the submission.
    pub prepare_timeout: Option<Duration>,
    /// `get_sources_timeout`: limit for git.
    pub get_sources_timeout: Option<Duration>,
    /// `unhealthy_requests_limit`: refusals in a row after which GitLab is left alone for a while.
    pub unhealthy_requests_limit: u32,
    /// `unhealthy_interval`: that while.
    pub unhealthy_interval: Duration,
    /// `job_status_final_update_retry_limit`: attempts for the last word on a job.
    pub job_status_final_update_retry_limit: u32,
    /// `[runners.feature_flags]`.
    pub feature_flags: BTreeMap<String, bool>,
    /// `debug_trace_disabled`: ignore `CI_DEBUG_TRACE`.
    pub debug_trace_disabled: bool,
    /// `deadline_reserve`: the time before GitLab's timeout that is kept back for uploads.
    pub deadline_reserve: Duration,
    /// `minimum_run_time`: a job with less than this left is not submitted any more.
    pub minimum_run_time: Duration,
}

impl Config {
    /// Finds a runner by its name.
    pub fn runner(&self, name: &RunnerName) -> Option<&Runner> {
        self.runners.iter().find(|runner| &runner.name == name)
    }

    /// Gives the directory below which a runner's workspaces are made.
    pub fn builds_dir(&self, runner: &Runner) -> Utf8PathBuf {
        runner.builds_dir.clone().unwrap_or_else(|| self.state_dir.join("builds"))
    }

    /// Gives the directory below which a runner's caches are kept.
    pub fn cache_dir(&self, runner: &Runner) -> Utf8PathBuf {
        runner.cache_dir.clone().unwrap_or_else(|| self.state_dir.join("cache"))
    }

    /// Gives the directory of the file, in which `.runner_system_id` and token files lie.
    pub fn dir(&self) -> &Utf8Path {
        self.path.parent().unwrap_or(Utf8Path::new("/"))
    }
}

impl fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "{address}"),
            Self::Unix(path) => write!(f, "unix:{path}"),
        }
    }
}

// Written by hand: `environment` may hold secrets, and so may a backend's table.
impl fmt::Debug for Runner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Runner")
            .field("name", &self.name)
            .field("url", &self.url.as_str())
            .field("backend", &self.backend)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for BackendEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BackendEntry").field("kind", &self.kind).finish_non_exhaustive()
    }
}

/// Reads, validates and resolves the configuration for the daemon.
///
/// # Errors
///
/// The first thing that is wrong, with its place; having no runners is wrong here.
pub fn load(path: &Utf8Path) -> Result<Config, ConfigError> {
    let config = load_incomplete(path)?;
    if config.runners.is_empty() {
        return Err(ConfigError::whole(config.path, Problem::NoRunners));
    }
    Ok(config)
}

/// Like [`load`], but content without runners; for commands that look at or complete the file.
///
/// # Errors
///
/// The first thing that is wrong, with its place.
pub fn load_incomplete(path: &Utf8Path) -> Result<Config, ConfigError> {
    let source = secret::read_config(path)?;
    resolve::resolve(&source)
}

/// Validates a text that is about to become the file at `path`, with mode `mode`.
///
/// # Errors
///
/// As [`load_incomplete`] would after the text was written.
pub fn check_text(path: &Utf8Path, text: String, mode: u32) -> Result<Config, ConfigError> {
    resolve::resolve(&secret::ConfigText { path: path.to_owned(), text, mode })
}

/// Reads a token from a file that nobody else can read.
///
/// # Errors
///
/// When it cannot be read, others can read it, or it holds none.
pub fn read_token_file(path: &Utf8Path) -> Result<Secret, ConfigError> {
    secret::read_token(path).map_err(|problem| ConfigError::whole(path.to_owned(), problem))
}

/// Says where the configuration is when nobody names it: `from_env` (the value of
/// [`CONFIG_VAR`]), else `/etc/bridge/config.toml` for root and
/// `HOME/.config/bridge/config.toml` for everybody else.
pub fn default_path(from_env: Option<String>, root: bool, home: Option<String>) -> Utf8PathBuf {
    let from_env = from_env.filter(|path| !path.is_empty());
    let home = home.filter(|home| !root && !home.is_empty());
    match (from_env, home) {
        (Some(path), _) => path.into(),
        (None, Some(home)) => Utf8PathBuf::from(home).join(".config/bridge/config.toml"),
        (None, None) => "/etc/bridge/config.toml".into(),
    }
}

/// Says where the keys are when the configuration does not say: beside it, where a copy of the state
/// directory does not take them along. Configurations that share a directory share no keys: each may
/// exchange its own.
pub fn default_key_file(config: &Utf8Path) -> Utf8PathBuf {
    match config.file_stem() {
        None | Some("config") => config.with_file_name("bridge.key"),
        Some(stem) => config.with_file_name(format!("{stem}.key")),
    }
}

/// Says where state is kept when the configuration in `dir` does not say: beside it, or where the
/// system keeps such things for a system's configuration.
pub fn default_state_dir(dir: &Utf8Path) -> Utf8PathBuf {
    if dir.starts_with("/etc") { "/var/lib/bridge".into() } else { dir.join("state") }
}
