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
//! again*, afterwards: artifacts ([`Plan::pack_artifact`]), [`Plan::cleanup`]. An operator may have
//! sources fetched in the batch job ([`FetchedBy::Job`], `sources/allocation.rs`).
//!
//! # Pure and impure
//!
//! [`plan`] is a function of the payload, the runner and the slot: the same three give the same plan,
//! before and after a restart, so a plan is never stored. What touches a workspace goes through
//! `hands` alone, but for packing and unpacking, which is `archive`'s; when jobs run as the users who
//! started them, only these two change.
//!
//! # Secrets
//!
//! The script holds none. Variables travel in [`JobSpec::env`], under a prefix that the script removes
//! (see `variables.rs`). The password of the repository is in the environment of git's processes and
//! nowhere else: not in `.git/config`, not in an argument list. [`MaskInputs`] names everything that
//! must not be seen in the trace.

mod artifacts;
mod attestation;
mod cache;
mod credentials;
mod dependencies;
mod expand;
mod flags;
mod hands;
mod inputs;
mod moa;
mod outputs;
mod paths;
mod resources;
mod runner;
mod script;
mod settings;
mod sources;
mod untracked;
mod variables;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::AtomicU32;
use std::time::Duration;

use bridge_backend::{EnvVar, JobSpec, Limits};
use camino::{Utf8Path, Utf8PathBuf};
use url::Url;

pub use self::artifacts::{AfterUpload, PackedArtifact, Ran, after_upload};
pub use self::cache::Ended;
pub use self::credentials::{Login, Registries};
pub use self::flags::unknown as unknown_flags;
pub use self::runner::{Containers, FetchedBy, Mirrors, OnBackend, RunnerContext, Shell};
pub use self::settings::{GitStrategy, Settings, SubmoduleStrategy};
pub use self::sources::{Output, StageError, Tone, release};

use self::script::Source;
use self::sources::Repository;
use self::variables::{CARRIER, Directories, Variables};
use crate::gitlab::wire::{Image, JobPayload, Secret};

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
    /// The job consists of CI steps. They need GitLab's `step-runner` beside the job, and no machine of
    /// a batch system can be relied on to have it; to find that out there would cost the job its place in
    /// the queue.
    #[error("this runner does not run CI steps (`run:`); use `script:` instead")]
    RunSteps,
    /// The job has CI steps and a script.
    #[error("the `run` and `script` keywords cannot be used together")]
    RunAndScript,
    /// The job wants secrets of an external provider.
    #[error("this runner does not fetch secrets from external providers (`secrets:`)")]
    Secrets,
    /// Inputs cannot be filled in.
    #[error("failed to interpolate job inputs: {detail}")]
    Inputs {
        /// Where and why; without any input's value.
        detail: String,
    },
    /// The job wants containers, and the operator wants no job that does.
    #[error(
        "this runner runs jobs without containers and refuses those that ask for one: {wanted}; remove \
         it or choose another runner by its tags"
    )]
    Containers {
        /// What it asked for.
        wanted: String,
    },
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
    #[error(
        "GIT_CLONE_PATH is not allowed by this runner; its operator can allow it with `enabled = \
         true` in [runners.custom_build_dir]"
    )]
    ClonePath,
    /// The directory that the job wants is somewhere else.
    #[error("GIT_CLONE_PATH={path:?} has to be below {builds_dir}")]
    ClonePathOutside {
        /// What the job wants.
        path: String,
        /// Where it has to be.
        builds_dir: Utf8PathBuf,
    },
    /// The directory that the job wants holds those of other jobs.
    #[error("GIT_CLONE_PATH={path:?} would hold the directories of other jobs")]
    ClonePathTooWide {
        /// What the job wants.
        path: String,
    },
    /// The job chooses what its operator does not let jobs choose.
    #[error(
        "{variable} is not for jobs to choose on this runner, whose operator allows {allowed}; remove \
         it or choose another runner by its tags"
    )]
    OptionForbidden {
        /// The job's variable.
        variable: String,
        /// What jobs may choose.
        allowed: String,
    },
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
    /// The logins for image registries that the job has.
    pub registries: Registries,
    label: String,
    script: String,
    options: toml::Table,
    env: Vec<EnvVar>,
    files: Vec<(String, Secret)>,
    repository: Option<Repository>,
    hooks: sources::Hooks,
    get_sources_timeout: Duration,
    fetching: Option<sources::Fetching>,
    /// Where caches and artifacts of earlier jobs are unpacked.
    restore_dir: Utf8PathBuf,
    transfers: artifacts::Transfers,
    caches: cache::Caches,
    git_started: AtomicU32,
    /// The script writes to `GITLAB_ENV`, as far as can be seen.
    says_more: bool,
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
    plan_at(payload, runner, slot, None)
}

/// Works out what a job needs whose checkout has its place already: a runner's new token or builds
/// directory moves no job that is under way.
///
/// # Errors
///
/// When the job cannot be run at all.
pub fn plan_at(
    payload: &JobPayload,
    runner: &RunnerContext,
    slot: Slot,
    workspace: Option<&Utf8Path>,
) -> Result<Plan, Unrunnable> {
    if has_steps(&payload.run) {
        let script = payload.steps.iter().any(|step| !step.script.is_empty());
        return Err(if script { Unrunnable::RunAndScript } else { Unrunnable::RunSteps });
    }
    if !payload.secrets.is_empty() {
        return Err(Unrunnable::Secrets);
    }
    // The strategy and the flags decide about directories and variables, which hold the directories:
    // so the list is made twice.
    let nowhere = Utf8PathBuf::new();
    let unplaced = Directories { project: &nowhere, temp: &nowhere };
    let first = Variables::of_job(payload, runner, slot, unplaced, &BTreeMap::new()).expanded();
    let payload = &*inputs::interpolated(payload, &first, runner)?;
    check_steps(payload)?;
    let (settings, complaints) = Settings::read(&first, payload, runner);
    let strategy = settings.git_strategy;
    let project_dir = match (workspace, first.content("GIT_CLONE_PATH")) {
        (Some(workspace), _) => workspace.to_owned(),
        (None, "") => paths::project_dir(payload, runner, slot, strategy)?,
        (None, wanted) => paths::clone_path(wanted, payload, runner, slot, strategy)?,
    };
    let temp_dir = Utf8PathBuf::from(format!("{project_dir}.tmp"));
    let dirs = Directories { project: &project_dir, temp: &temp_dir };
    let variables = Variables::of_job(payload, runner, slot, dirs, &settings.flags).expanded();

    let mut environment = variables.environment(&temp_dir)?;
    let mut warnings = std::mem::take(&mut environment.warnings);
    warnings.extend(complaints);
    warnings.extend(containers(payload, &variables, runner.containers)?);
    let caches = cache::Caches::of(payload, runner, &settings, &variables);
    let docker_auth_config = variables.content("DOCKER_AUTH_CONFIG");
    let (registries, complaint) = Registries::of(docker_auth_config, &payload.credentials);
    warnings.extend(complaint);
    let by_job = runner.sources == FetchedBy::Job && settings.git_strategy.uses_git();
    let worker = by_job.then(|| sources::on_the_worker(runner, &temp_dir));
    let repository = if settings.git_strategy.uses_git() {
        let runner = worker.as_ref().unwrap_or(runner);
        Some(Repository::of(payload, runner, &settings, &variables)?)
    } else {
        None
    };
    let names: Vec<&str> = environment.vars.iter().map(|var| var.name.as_str()).collect();
    let hooks = sources::Hooks::of(payload, runner);
    let fetching = repository.as_ref().zip(worker.as_ref()).map(|(repository, runner)| {
        let limit = runner.get_sources_timeout.filter(|limit| !limit.is_zero());
        sources::Order {
            repository,
            settings: &settings,
            hooks: &hooks,
            runner,
            names: &names,
            project_dir: &project_dir,
            temp_dir: &temp_dir,
            limit,
        }
        .fetching()
    });
    if by_job && settings.flag("FF_USE_GIT_NATIVE_CLONE") {
        warnings.push(
            "FF_USE_GIT_NATIVE_CLONE has no effect where jobs fetch their sources themselves"
                .into(),
        );
    }
    let script = Source {
        payload,
        runner,
        settings: &settings,
        variables: &variables,
        names,
        project_dir: &project_dir,
        temp_dir: &temp_dir,
        fetching: fetching.as_ref(),
    }
    .render();
    let timeout = Duration::from_secs(payload.timeout_secs());
    Ok(Plan {
        warnings,
        mask: mask(payload, runner, &variables, repository.as_ref(), &registries, &settings),
        debug_trace: settings.debug_trace,
        timestamps: settings.flag("FF_TIMESTAMPS"),
        sections: payload.features.trace_sections,
        timeout,
        label: label(payload),
        script,
        options: resources::options(&variables, &runner.backend)?,
        env: environment.vars,
        files: environment.files,
        repository,
        hooks,
        restore_dir: if by_job { sources::restored(&temp_dir) } else { project_dir.clone() },
        fetching,
        caches,
        get_sources_timeout: runner
            .get_sources_timeout
            .filter(|limit| !limit.is_zero())
            .map_or(timeout, |limit| limit.min(timeout)),
        transfers: artifacts::Transfers::of(payload, &settings, &variables),
        git_started: AtomicU32::new(0),
        says_more: payload
            .steps
            .iter()
            .any(|step| step.script.iter().any(|line| line.contains("GITLAB_ENV"))),
        runner: runner.clone(),
        project_dir,
        temp_dir,
        registries,
        settings,
    })
}

impl Plan {
    /// Gives what a backend is handed.
    pub fn spec(&self, limits: Limits) -> JobSpec {
        let env = self
            .env
            .iter()
            .map(|var| EnvVar { name: format!("{CARRIER}{}", var.name), value: var.value.clone() })
            .chain(self.fetching.iter().flat_map(sources::Fetching::environment))
            .collect();
        JobSpec {
            label: self.label.clone(),
            script: self.script.clone(),
            env,
            workspace: self.project_dir.clone(),
            outputs: self.outputs(),
            limits,
            options: self.options.clone(),
        }
    }
}

/// Says whether `run` holds any CI step; what cannot be read is taken for some.
fn has_steps(run: &str) -> bool {
    let run = run.trim();
    !run.is_empty()
        && serde_json::from_str::<Option<Vec<serde::de::IgnoredAny>>>(run)
            .map_or(true, |steps| steps.is_some_and(|steps| !steps.is_empty()))
}

/// Refuses what no shell can read.
fn check_steps(payload: &JobPayload) -> Result<(), Unrunnable> {
    let nul = |script: &[String]| script.iter().any(|line| line.contains('\0'));
    let steps = payload.steps.iter().map(|step| (&step.name, &step.script));
    let hooks = payload.hooks.iter().map(|hook| (&hook.name, &hook.script));
    match steps.chain(hooks).find(|(_, script)| nul(script)) {
        Some((name, _)) => Err(Unrunnable::NulInScript { step: name.clone() }),
        None => Ok(()),
    }
}

/// Names the containers that the job asks for; none is made.
fn containers(
    payload: &JobPayload,
    variables: &Variables,
    policy: Containers,
) -> Result<Option<String>, Unrunnable> {
    let names = |images: &[Image]| {
        let names: Vec<String> = images
            .iter()
            .filter(|image| !image.name.is_empty())
            .map(|image| variables.expand(&image.name).escape_debug().take(200).collect())
            .collect();
        names.join(", ")
    };
    let image = names(payload.image.as_slice());
    let services = names(&payload.services);
    let wanted = match (image.is_empty(), services.is_empty()) {
        (true, true) => return Ok(None),
        (false, true) => format!("`image: {image}`"),
        (true, false) => format!("`services: {services}`"),
        (false, false) => format!("`image: {image}` and `services: {services}`"),
    };
    match policy {
        Containers::Refuse => Err(Unrunnable::Containers { wanted }),
        Containers::Ignore => Ok(Some(format!(
            "this runner runs jobs on its machines directly, without containers, and ignores {wanted}"
        ))),
    }
}

/// Collects what must not be seen: also what the official runner leaves to others.
fn mask(
    payload: &JobPayload,
    runner: &RunnerContext,
    variables: &Variables,
    repository: Option<&Repository>,
    registries: &Registries,
    settings: &Settings,
) -> MaskInputs {
    let url = Url::parse(payload.git_info.repo_url.expose()).ok();
    let encoded = url.as_ref().and_then(Url::password).unwrap_or_default();
    let mut texts: Vec<&str> = variables.masked().collect();
    // As they came, too: not everything that prints them expands them first.
    let masked = payload.variables.iter().filter(|variable| variable.masked);
    texts.extend(masked.map(|variable| variable.value.expose()));
    let of_runner = runner.clone_url.as_ref().and_then(Url::password).unwrap_or_default();
    let of_runner_decoded = paths::percent_decoded(of_runner).unwrap_or_default();
    texts.extend([of_runner, &of_runner_decoded]);
    texts.push(payload.token.expose());
    texts.push(encoded);
    texts.extend(repository.map(Repository::password));
    texts.extend(payload.credentials.iter().map(|credential| credential.password.expose()));
    texts.extend(payload.dependencies.iter().map(|dependency| dependency.token.expose()));
    texts.extend(registries.secrets());
    texts.extend(inputs::sensitive(&payload.inputs));
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
            .chain(payload.dependencies.iter().map(|dependency| dependency.token.expose()))
            .chain(inputs::sensitive(&payload.inputs));
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
