//! What a job needs to know of the runner that took it, and of the backend that runs it.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use camino::Utf8PathBuf;
use url::Url;

/// The shell that runs a job's steps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Shell {
    /// bash, or sh where there is no bash.
    #[default]
    Bash,
    /// sh.
    Sh,
}

/// What becomes of a job that asks for containers (`image:`, `services:`), which are not there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Containers {
    /// It runs without them, and its trace says so.
    #[default]
    Ignore,
    /// It fails at once.
    Refuse,
}

/// Who fetches a job's sources.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FetchedBy {
    /// The submit node, before the job is handed over.
    #[default]
    SubmitNode,
    /// The job's own script, where it runs.
    Job,
}

/// What a job needs to know of the runner that took it.
#[derive(Clone)]
pub struct RunnerContext {
    /// The runner's name.
    pub name: String,
    /// The GitLab server.
    pub url: Url,
    /// The beginning of the runner's token, as GitLab shows it.
    pub short_token: String,
    /// This machine's system ID.
    pub system_id: String,
    /// Our version.
    pub version: String,
    /// Where checkouts are made; shared with the machines that run jobs.
    pub builds_dir: Utf8PathBuf,
    /// Where caches are kept.
    pub cache_dir: Option<Utf8PathBuf>,
    /// Variables of the runner's configuration.
    pub environment: Vec<(String, String)>,
    /// The shell for steps.
    pub shell: Shell,
    /// Whether that shell reads its login profile.
    pub login_shell: bool,
    /// Run before the job's own hook and before git.
    pub pre_get_sources_script: Option<String>,
    /// Run after git and after the job's own hook.
    pub post_get_sources_script: Option<String>,
    /// Run before the lines of every step.
    pub pre_build_script: Option<String>,
    /// Run after the lines of every step.
    pub post_build_script: Option<String>,
    /// What takes the place of the repository's scheme, host and path prefix.
    pub clone_url: Option<Url>,
    /// A file with the certificates to trust.
    pub tls_ca_file: Option<Utf8PathBuf>,
    /// A file with our certificate.
    pub tls_cert_file: Option<Utf8PathBuf>,
    /// A file with its key.
    pub tls_key_file: Option<Utf8PathBuf>,
    /// Whether jobs may choose their directory with `GIT_CLONE_PATH`.
    pub custom_build_dir: bool,
    /// Where and how long mirrors of projects are kept.
    pub mirrors: Option<Mirrors>,
    /// The most that get_sources may take, repetitions included.
    pub get_sources_timeout: Option<Duration>,
    /// Whether `CI_DEBUG_TRACE` is forbidden.
    pub debug_trace_disabled: bool,
    /// What becomes of a job that asks for containers.
    pub containers: Containers,
    /// Who fetches sources.
    pub sources: FetchedBy,
    /// Feature flags of the configuration; they outrank a job's.
    pub runner_feature_flags: BTreeMap<String, bool>,
    /// What its backend makes of jobs.
    pub backend: OnBackend,
}

/// What a job needs to know of the backend that runs it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OnBackend {
    /// Jobs run in a copy of their workspace, and only what they ask for comes home.
    pub sandbox: bool,
    /// The backend's own names for variables that choose an option, besides `BRIDGE_…`: variable, option.
    pub variables: &'static [(&'static str, &'static str)],
    /// The options that jobs may choose; `None` is all.
    pub job_options: Option<Vec<String>>,
}

impl RunnerContext {
    /// A runner of whose configuration nothing is said but this; what can be off is off.
    pub fn new(name: &str, url: Url, builds_dir: Utf8PathBuf) -> Self {
        Self {
            name: name.to_owned(),
            url,
            short_token: String::new(),
            system_id: String::new(),
            version: String::new(),
            builds_dir,
            cache_dir: None,
            environment: Vec::new(),
            shell: Shell::default(),
            login_shell: false,
            pre_get_sources_script: None,
            post_get_sources_script: None,
            pre_build_script: None,
            post_build_script: None,
            clone_url: None,
            tls_ca_file: None,
            tls_cert_file: None,
            tls_key_file: None,
            custom_build_dir: false,
            mirrors: None,
            get_sources_timeout: None,
            debug_trace_disabled: false,
            containers: Containers::default(),
            sources: FetchedBy::default(),
            runner_feature_flags: BTreeMap::new(),
            backend: OnBackend::default(),
        }
    }
}

impl fmt::Debug for RunnerContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Operators put secrets into the environment and into URLs.
        f.debug_struct("RunnerContext").field("name", &self.name).finish_non_exhaustive()
    }
}

/// Where and how long mirrors of projects are kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mirrors {
    /// The directory; no job may write to it.
    pub dir: Utf8PathBuf,
    /// A mirror that no job has used for so long is removed.
    pub keep: Duration,
}
