//! One GitLab job made ready for a batch system, and brought home.
//!
//! This is the only folder that speaks both GitLab's language and the backends'. A field of the
//! payload that is to reach a backend passes through here or not at all.
//!
//! # Which stage runs where
//!
//! *On the submit node*, before submission: directories, file variables, sources
//! ([`Plan::get_sources`]). Compute nodes often have no way out, git burns no core-hours there, and
//! GitLab is reached from one place; artifacts of earlier jobs too ([`Plan::download_artifacts`]). *In
//! the batch job*: the steps and `after_script`, in the script of [`Plan::spec`]. *On the submit node
//! again*, afterwards: artifacts ([`Plan::pack_artifact`]), [`Plan::cleanup`].
//!
//! # Pure and impure
//!
//! [`plan`] is a function of the payload, the runner and the slot: the same three give the same plan,
//! before and after a restart, so a plan is never stored. What touches a workspace goes through
//! `hands.rs` alone; when jobs run as the users who started them, only that file changes.
//!
//! # Secrets
//!
//! The script holds none. Variables travel in [`JobSpec::env`], under a prefix that the script removes
//! (see `variables.rs`). The password of the repository is in the environment of git's processes and
//! nowhere else: not in `.git/config`, not in an argument list. [`MaskInputs`] names everything that
//! must not be seen in the trace.

mod artifacts;
mod attestation;
mod dependencies;
mod expand;
mod hands;
mod paths;
mod resources;
mod script;
mod settings;
mod sources;
mod variables;

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use bridge_backend::{EnvVar, JobSpec, Limits};
use camino::{Utf8Path, Utf8PathBuf};
use url::Url;

pub use self::artifacts::{AfterUpload, PackedArtifact, Ran, after_upload};
pub use self::settings::{GitStrategy, Settings};
pub use self::sources::{Output, StageError, Tone};

use self::script::Source;
use self::sources::Repository;
use self::variables::{CARRIER, Directories, Variables};
use crate::gitlab::wire::{Hook, JobPayload, Secret};

/// The shell that runs a job's steps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Shell {
    /// bash, or sh where there is no bash.
    #[default]
    Bash,
    /// sh.
    Sh,
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
    /// The most that get_sources may take, repetitions included.
    pub get_sources_timeout: Option<Duration>,
    /// Whether `CI_DEBUG_TRACE` is forbidden.
    pub debug_trace_disabled: bool,
    /// Feature flags of the configuration; they outrank a job's.
    pub runner_feature_flags: BTreeMap<String, bool>,
}

impl fmt::Debug for RunnerContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Operators put secrets into the environment and into URLs.
        f.debug_struct("RunnerContext").field("name", &self.name).finish_non_exhaustive()
    }
}

/// The smallest numbers that no other running job has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Slot {
    /// Among the runner's jobs: `CI_CONCURRENT_ID`.
    pub concurrent: u32,
    /// Among the runner's jobs of the same project: `CI_CONCURRENT_PROJECT_ID`.
    pub project: u32,
}

/// Why a job cannot be run, however often it is tried: its author or the operator must act.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unrunnable {
    /// The job consists of CI steps.
    #[error("this runner does not run CI steps (`run:`); use `script:` instead")]
    RunSteps,
    /// The job wants secrets of an external provider.
    #[error("this runner does not fetch secrets from external providers (`secrets:`)")]
    Secrets,
    /// The job's script uses inputs.
    #[error("this runner does not fill in job inputs (`${{{{ job.inputs.… }}}}`)")]
    Inputs,
    /// One variable is too large for a process.
    #[error(
        "variable {name} is too large to be passed to a process: {bytes} bytes of at most {limit}; \
         make it a variable of type file"
    )]
    VariableTooLarge {
        /// Its name.
        name: String,
        /// The size of its value.
        bytes: usize,
        /// What the kernel takes.
        limit: usize,
    },
    /// All variables together are too large for a process.
    #[error(
        "the variables are too large to be passed to a process: {bytes} bytes of at most {limit} in \
         all; make the largest ones variables of type file"
    )]
    VariablesTooLarge {
        /// Their size.
        bytes: usize,
        /// What is certain to pass.
        limit: usize,
    },
    /// The repository's URL gives no directory within the builds directory.
    #[error("the repository's URL cannot be used: {reason}")]
    Repository {
        /// What is wrong with it; without the URL, which holds a token.
        reason: &'static str,
    },
    /// The commit to check out is none.
    #[error("the commit to check out is not one: {sha:?}")]
    Commit {
        /// What came.
        sha: String,
    },
    /// A ref to fetch is none.
    #[error("a ref to fetch is not one: {refspec:?}")]
    Refspec {
        /// What came.
        refspec: String,
    },
    /// The job wants another directory.
    #[error("GIT_CLONE_PATH is not allowed by this runner")]
    ClonePath,
    /// No shell can read the script.
    #[error("step {step} contains a NUL byte")]
    NulInScript {
        /// The step's name.
        step: String,
    },
}

/// What must not be seen in a job's trace.
#[derive(Clone, Debug, Default)]
pub struct MaskInputs {
    /// Whole texts: trimmed, none empty, none twice.
    pub phrases: Vec<Secret>,
    /// Beginnings of tokens that the server named, besides the usual ones.
    pub prefixes: Vec<String>,
    /// Whether the beginnings of all of GitLab's usual tokens are masked, not only `glpat-`.
    pub all_default_prefixes: bool,
}

/// A job made ready.
pub struct Plan {
    /// The checkout, and the script's working directory.
    pub project_dir: Utf8PathBuf,
    /// Its sibling for file variables and the like.
    pub temp_dir: Utf8PathBuf,
    /// What the job's variables say about how it is run.
    pub settings: Settings,
    /// What the author should read in the trace.
    pub warnings: Vec<String>,
    /// What must not be seen in the trace.
    pub mask: MaskInputs,
    /// Whether the trace is to be marked as a debug trace.
    pub debug_trace: bool,
    /// Whether the trace's lines get timestamps.
    pub timestamps: bool,
    /// Whether the server wants section markers.
    pub sections: bool,
    /// GitLab's timeout, which counts from receipt.
    pub timeout: Duration,
    label: String,
    script: String,
    options: toml::Table,
    env: Vec<EnvVar>,
    files: Vec<(String, Secret)>,
    repository: Option<Repository>,
    hooks: sources::Hooks,
    get_sources_timeout: Duration,
    transfers: artifacts::Transfers,
    runner: RunnerContext,
}

impl fmt::Debug for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Scripts and variables are never shown.
        f.debug_struct("Plan")
            .field("project_dir", &self.project_dir)
            .field("settings", &self.settings)
            .finish_non_exhaustive()
    }
}

/// Works out what a job needs.
///
/// # Errors
///
/// When the job cannot be run at all.
pub fn plan(payload: &JobPayload, runner: &RunnerContext, slot: Slot) -> Result<Plan, Unrunnable> {
    if !payload.run.trim().is_empty() {
        return Err(Unrunnable::RunSteps);
    }
    if !payload.secrets.is_empty() {
        return Err(Unrunnable::Secrets);
    }
    check_steps(payload)?;

    // The strategy and the flags decide about directories and variables, which hold the directories:
    // so the list is made twice.
    let nowhere = Utf8PathBuf::new();
    let unplaced = Directories { project: &nowhere, temp: &nowhere };
    let first = Variables::of_job(payload, runner, slot, unplaced, &BTreeMap::new()).expanded();
    let (settings, complaints) = Settings::read(&first, payload, runner);
    if !first.content("GIT_CLONE_PATH").is_empty() {
        return Err(Unrunnable::ClonePath);
    }
    let project_dir = paths::project_dir(payload, runner, slot, settings.git_strategy)?;
    let temp_dir = Utf8PathBuf::from(format!("{project_dir}.tmp"));
    let dirs = Directories { project: &project_dir, temp: &temp_dir };
    let variables = Variables::of_job(payload, runner, slot, dirs, &settings.flags).expanded();

    let mut environment = variables.environment(&temp_dir)?;
    let mut warnings = std::mem::take(&mut environment.warnings);
    warnings.extend(complaints);
    warnings.extend(left_out(payload, &variables));
    let repository = if settings.git_strategy.uses_git() {
        Some(Repository::of(payload, runner, &settings, &variables)?)
    } else {
        None
    };
    let script = Source {
        payload,
        runner,
        settings: &settings,
        variables: &variables,
        names: environment.vars.iter().map(|var| var.name.as_str()).collect(),
        project_dir: &project_dir,
        temp_dir: &temp_dir,
    }
    .render();
    let timeout = Duration::from_secs(payload.timeout_secs());
    Ok(Plan {
        warnings,
        mask: mask(payload, &variables, repository.as_ref(), &settings),
        debug_trace: settings.debug_trace,
        timestamps: settings.flag("FF_TIMESTAMPS"),
        sections: payload.features.trace_sections,
        timeout,
        label: label(payload),
        script,
        options: resources::options(&variables),
        env: environment.vars,
        files: environment.files,
        repository,
        hooks: sources::Hooks::of(payload, runner),
        get_sources_timeout: runner
            .get_sources_timeout
            .filter(|limit| !limit.is_zero())
            .map_or(timeout, |limit| limit.min(timeout)),
        transfers: artifacts::Transfers::of(payload, &variables),
        runner: runner.clone(),
        project_dir,
        temp_dir,
        settings,
    })
}

impl Plan {
    /// Gives what a backend is handed.
    pub fn spec(&self, wall_time: Option<Duration>) -> JobSpec {
        let env = self
            .env
            .iter()
            .map(|var| EnvVar { name: format!("{CARRIER}{}", var.name), value: var.value.clone() })
            .collect();
        JobSpec {
            label: self.label.clone(),
            script: self.script.clone(),
            env,
            workspace: self.project_dir.clone(),
            outputs: Vec::new(),
            limits: Limits { wall_time },
            options: self.options.clone(),
        }
    }
}

/// Refuses what no shell can read, and inputs, which would reach the shell unfilled.
fn check_steps(payload: &JobPayload) -> Result<(), Unrunnable> {
    for step in &payload.steps {
        if step.script.iter().any(|line| line.contains('\0')) {
            return Err(Unrunnable::NulInScript { step: step.name.clone() });
        }
        let interpolated = matches!(step.name.as_str(), "script" | "after_script");
        if interpolated
            && !payload.inputs.is_empty()
            && step.script.iter().any(|line| line.contains("${{"))
        {
            return Err(Unrunnable::Inputs);
        }
    }
    let nul = |hook: &Hook| hook.script.iter().any(|line| line.contains('\0'));
    match payload.hooks.iter().find(|hook| nul(hook)) {
        Some(hook) => Err(Unrunnable::NulInScript { step: hook.name.clone() }),
        None => Ok(()),
    }
}

/// Names what the job asks for and does not get.
fn left_out(payload: &JobPayload, variables: &Variables) -> Option<String> {
    let submodules = !matches!(variables.content("GIT_SUBMODULE_STRATEGY"), "" | "none");
    let wanted = [
        ("image", payload.image.as_ref().is_some_and(|image| !image.name.is_empty())),
        ("services", !payload.services.is_empty()),
        ("submodules", submodules),
        ("cache", !payload.cache.is_empty()),
    ];
    let names: Vec<&str> =
        wanted.into_iter().filter(|(_, wanted)| *wanted).map(|(name, _)| name).collect();
    (!names.is_empty()).then(|| {
        format!("this runner does not provide these and leaves them out: {}", names.join(", "))
    })
}

/// Collects what must not be seen: also what the official runner leaves to others.
fn mask(
    payload: &JobPayload,
    variables: &Variables,
    repository: Option<&Repository>,
    settings: &Settings,
) -> MaskInputs {
    let url = Url::parse(payload.git_info.repo_url.expose()).ok();
    let encoded = url.as_ref().and_then(Url::password).unwrap_or_default();
    let mut texts: Vec<&str> = variables.masked().collect();
    texts.push(payload.token.expose());
    texts.push(encoded);
    texts.extend(repository.map(Repository::password));
    texts.extend(payload.credentials.iter().map(|credential| credential.password.expose()));
    texts.extend(payload.dependencies.iter().map(|dependency| dependency.token.expose()));
    let mut seen = std::collections::HashSet::new();
    let phrases = texts
        .into_iter()
        .map(str::trim)
        .filter(|text| !text.is_empty() && seen.insert(*text))
        .map(Secret::new)
        .collect();
    MaskInputs {
        phrases,
        prefixes: payload.features.token_mask_prefixes.clone(),
        all_default_prefixes: settings.flag("FF_MASK_ALL_DEFAULT_TOKENS"),
    }
}

fn label(payload: &JobPayload) -> String {
    let info = &payload.job_info;
    format!("{} {} #{}", info.project_full_path, info.name, payload.id)
}

impl MaskInputs {
    /// Names what must not be seen of a job that cannot be planned.
    pub fn of(payload: &JobPayload) -> Self {
        let texts = payload
            .variables
            .iter()
            .filter(|variable| variable.masked)
            .map(|variable| variable.value.expose())
            .chain([payload.token.expose()])
            .chain(payload.credentials.iter().map(|credential| credential.password.expose()))
            .chain(payload.dependencies.iter().map(|dependency| dependency.token.expose()));
        Self {
            phrases: texts
                .map(str::trim)
                .filter(|text| !text.is_empty())
                .map(Secret::new)
                .collect(),
            prefixes: payload.features.token_mask_prefixes.clone(),
            all_default_prefixes: true,
        }
    }
}

/// Removes the files that held a job's secrets, known by its checkout alone: the payload may be gone.
///
/// # Errors
///
/// When something could not be removed.
pub async fn cleanup(project_dir: &Utf8Path) -> Result<(), StageError> {
    let temp_dir = Utf8PathBuf::from(format!("{project_dir}.tmp"));
    hands::remove(&temp_dir).await.map_err(StageError::broken("cleanup_file_variables"))
}

#[cfg(test)]
mod tests;
