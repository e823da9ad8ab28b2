//! Sources, made ready on the submit node by git.
//!
//! The order of things is gitlab-runner's (`shells/abstract.go`): hooks, leftovers of an earlier job,
//! repository, fetch of the refspecs that GitLab names, check-out of the commit, cleaning, hooks. What
//! fetches is a child process, so the daemon's memory does not grow with a repository.
//!
//! The checkout is one that an earlier job could write to, and git runs here with the service account's
//! rights. So an earlier job's configuration, hooks and alternates are thrown away before git is
//! started, and hooks are switched off.
//!
//! The caller opens and closes the trace's sections.

mod allocation;
mod cleanup;
mod fetch;
mod flags;
mod git;
mod index;
mod leftovers;
mod lfs;
mod mirror;
mod repository;
mod submodules;

use std::sync::atomic::Ordering;

use camino::Utf8Path;
use secrecy::ExposeSecret as _;

use super::hands::{self, Call, HandsError};
use super::settings::GitStrategy;
use super::variables::{CA_FILE, CARRIER};
use super::{Plan, RunnerContext, Shell, script};
use crate::gitlab::wire::{JobPayload, Secret};

pub(super) use self::allocation::{Fetching, Order, on_the_worker, restored};
pub use self::cleanup::release;
pub(super) use self::repository::Repository;

use self::git::{Git, Place, ended};

/// The stage's name in the trace and in verdicts.
const GET_SOURCES: &str = "get_sources";
/// The name of the stage that removes file variables.
const CLEANUP: &str = "cleanup_file_variables";

/// Takes what a stage says.
pub trait Output {
    /// Takes bytes as a process wrote them.
    fn bytes(&mut self, bytes: &[u8]);
    /// Takes a line of our own, without styles and line end.
    fn remark(&mut self, tone: Tone, text: &str);
}

/// How a line of our own is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tone {
    /// What was found or done, beside the notices.
    Plain,
    /// What is being done.
    Notice,
    /// What did not go as it should.
    Warning,
    /// What did not go at all.
    Error,
}

/// Why a stage on the submit node did not do its work.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StageError {
    /// A command ended with an exit code.
    #[error("{stage}: exit status {exit_code}")]
    Failed {
        /// The stage's name.
        stage: &'static str,
        /// The exit code; a signal counts as 128 and its number.
        exit_code: i32,
    },
    /// It took longer than it may.
    #[error("{stage} took longer than it may")]
    TimedOut {
        /// The stage's name.
        stage: &'static str,
    },
    /// This machine could not do it.
    #[error("{stage}: {detail}")]
    Broken {
        /// The stage's name.
        stage: &'static str,
        /// Why.
        detail: String,
    },
    /// The job asks for what is not allowed.
    #[error("{detail}")]
    Misconfigured {
        /// What, and why not.
        detail: String,
    },
}

impl StageError {
    pub(super) fn broken(stage: &'static str) -> impl Fn(HandsError) -> Self {
        move |error| Self::Broken { stage, detail: error.to_string() }
    }
}

/// Scripts around get_sources.
#[derive(Default)]
pub(super) struct Hooks {
    before: Vec<String>,
    after: Vec<String>,
}

impl Hooks {
    /// Collects them: the runner's outside, the job's inside.
    pub(super) fn of(payload: &JobPayload, runner: &RunnerContext) -> Self {
        let of_job = |name: &str| {
            payload
                .hooks
                .iter()
                .filter(|hook| hook.name == name)
                .flat_map(|hook| hook.script.iter().cloned())
                .collect::<Vec<_>>()
        };
        let mut before: Vec<String> = runner.pre_get_sources_script.iter().cloned().collect();
        before.extend(of_job("pre_get_sources_script"));
        let mut after = of_job("post_get_sources_script");
        after.extend(runner.post_get_sources_script.clone());
        Self { before, after }
    }
}

/// The most that is read of a file with certificates; all there are take some hundred kilobytes.
const LARGEST_CA_FILE: u64 = 16 << 20;

type Out<'a> = &'a mut (dyn Output + Send);
type Stage = Result<(), StageError>;

impl Plan {
    /// Makes the job's directories, its file variables and its sources; where the job fetches its
    /// sources itself, a place for them.
    ///
    /// It starts from whatever it finds, so it can be repeated after a crash.
    ///
    /// # Errors
    ///
    /// When a command failed in all attempts, took too long, or could not be started.
    pub async fn get_sources(&self, out: &mut (dyn Output + Send)) -> Result<(), StageError> {
        let work = async {
            let broken = StageError::broken(GET_SOURCES);
            self.check_flags()?;
            self.check_place().await?;
            self.prepare().await.map_err(&broken)?;
            self.note_cleanup().await.map_err(&broken)?;
            if let (Some(repository), true) = (&self.repository, self.fetches_itself()) {
                return self.prepare_allocation(repository, out).await;
            }
            self.attempts(out).await
        };
        match tokio::time::timeout(self.get_sources_timeout, work).await {
            Ok(result) => result,
            // The process went with the future.
            Err(_elapsed) => Err(StageError::TimedOut { stage: GET_SOURCES }),
        }
    }

    /// Removes what the job must not leave behind, as [`release`].
    ///
    /// # Errors
    ///
    /// When something could not be removed.
    pub async fn cleanup(&self) -> Result<(), StageError> {
        release(&self.project_dir).await
    }

    /// Says how many times git has been started for this job.
    pub fn git_started(&self) -> u32 {
        self.git_started.load(Ordering::Relaxed)
    }

    /// Refuses a checkout that is elsewhere than its name says, by a link that an earlier job made.
    async fn check_place(&self) -> Stage {
        let broken = StageError::broken(GET_SOURCES);
        let builds_dir = hands::really(&self.runner.builds_dir).await.map_err(&broken)?;
        let above = self.project_dir.parent().unwrap_or(&self.project_dir);
        let above = hands::really(above).await.map_err(&broken)?;
        if above.starts_with(&builds_dir) {
            return Ok(());
        }
        let detail = format!("{} leads out of the builds directory", self.project_dir);
        Err(StageError::Misconfigured { detail })
    }

    /// Makes the directory beside the checkout anew, with the file variables in it.
    async fn prepare(&self) -> Result<(), HandsError> {
        hands::remove(&self.temp_dir).await?;
        hands::make_dir(&self.temp_dir).await?;
        for (name, content) in &self.files {
            hands::write_private(&self.temp_dir.join(name), content.clone()).await?;
        }
        if let Some(from) = &self.runner.tls_ca_file
            && self.runner.backend.sandbox
        {
            let certificates = hands::read(from, LARGEST_CA_FILE).await?.unwrap_or_default();
            hands::write_shared(&self.temp_dir.join(CA_FILE), certificates).await?;
        }
        Ok(())
    }

    async fn attempts(&self, out: Out<'_>) -> Stage {
        let most = self.settings.get_sources_attempts;
        let mut attempt = 1;
        loop {
            let error = match self.attempt(out).await {
                Ok(()) => return Ok(()),
                Err(error) => error,
            };
            if attempt >= most || matches!(error, StageError::Misconfigured { .. }) {
                return Err(error);
            }
            attempt += 1;
            let pause = self.settings.pause_before(attempt);
            let text =
                format!("{error}; attempt {attempt} of {most} follows in {} s", pause.as_secs());
            out.remark(Tone::Warning, &text);
            tokio::time::sleep(pause).await;
            if attempt == 2 {
                self.clear_worktree(out).await;
            }
        }
    }

    /// Empties the checkout as far as git can: what a plain clean does not reach.
    async fn clear_worktree(&self, out: Out<'_>) {
        let Some(repository) = &self.repository else { return };
        if !leftovers::is_repository(&self.project_dir).await.unwrap_or(false) {
            return;
        }
        let git = self.git(repository, "clear_worktree");
        let at = Place::checkout(&self.project_dir);
        out.remark(Tone::Notice, "Deleting tracked and untracked files...");
        let remove: &[&str] = &["rm", "-rf", "--ignore-unmatch", "--quiet", "."];
        for args in [remove, &["clean", "-ffdx", "-q"]] {
            if let Err(error) = git.run(&at, args, out).await {
                // The attempt that follows says what is wrong, if anything still is.
                out.remark(Tone::Warning, &error.to_string());
            }
        }
    }

    async fn attempt(&self, out: Out<'_>) -> Stage {
        let broken = StageError::broken(GET_SOURCES);
        let strategy = self.settings.git_strategy;
        let Some(repository) = &self.repository else {
            if strategy == GitStrategy::Empty {
                out.remark(
                    Tone::Notice,
                    "Skipping Git repository setup and creating an empty build directory",
                );
                hands::remove(&self.project_dir).await.map_err(&broken)?;
            } else {
                out.remark(Tone::Notice, "Skipping Git repository setup");
            }
            hands::make_dir(&self.project_dir).await.map_err(&broken)?;
            out.remark(Tone::Notice, "Skipping Git checkout");
            return Ok(());
        };
        self.hook(&self.hooks.before, &self.temp_dir, out).await?;
        if strategy == GitStrategy::Clone {
            hands::remove(&self.project_dir).await.map_err(&broken)?;
        }
        let inherited = leftovers::is_repository(&self.project_dir).await.map_err(&broken)?;
        if let Err(error) = self.bring_up_to_date(repository, out).await {
            // What an earlier job left may be beyond repair. Where the server answers, it is to blame;
            // where not, it is kept, since a full clone would fail as well.
            if !inherited || !self.server_answers(repository).await {
                return Err(error);
            }
            out.remark(
                Tone::Warning,
                "the checkout of an earlier job cannot be brought up to date; starting afresh",
            );
            hands::remove(&self.project_dir).await.map_err(&broken)?;
            self.bring_up_to_date(repository, out).await?;
        }
        if self.settings.git_checkout {
            let git = self.git(repository, GET_SOURCES);
            self.pull_large_files(&git, &Place::checkout(&self.project_dir), out).await?;
        }
        self.submodules(repository, out).await?;
        self.hook(&self.hooks.after, &self.project_dir, out).await
    }

    fn sha256(&self) -> bool {
        self.repository.as_ref().is_some_and(|repository| repository.sha256)
    }

    fn git(&self, repository: &Repository, stage: &'static str) -> Git<'_> {
        Git::of(repository, stage, &self.temp_dir, &self.git_started)
    }

    /// Runs a hook's commands in a shell, with the job's variables.
    async fn hook(&self, commands: &[String], dir: &Utf8Path, out: Out<'_>) -> Stage {
        if commands.is_empty() {
            return Ok(());
        }
        let broken = StageError::broken(GET_SOURCES);
        let file = self.temp_dir.join(".hook");
        let names: Vec<&str> = self.env.iter().map(|var| var.name.as_str()).collect();
        let text = Secret::new(script::hook(commands, &names));
        hands::write_private(&file, text).await.map_err(&broken)?;
        let mut env = vec![
            ("HOME".to_owned(), Secret::new(self.temp_dir.as_str())),
            ("GIT_TERMINAL_PROMPT".to_owned(), Secret::new("0")),
        ];
        env.extend(
            self.env.iter().map(|var| {
                (format!("{CARRIER}{}", var.name), Secret::new(var.value.expose_secret()))
            }),
        );
        let env_file = self.temp_dir.join(script::ENV_FILE);
        env.push(("GITLAB_ENV".to_owned(), Secret::new(env_file.as_str())));
        let call = |program| Call {
            program,
            args: Vec::new(),
            env: env.clone(),
            dir: dir.to_owned(),
            input: Some(file.clone()),
        };
        let preferred = match self.runner.shell {
            Shell::Bash => "bash",
            Shell::Sh => "sh",
        };
        let result = match hands::run(call(preferred), out).await {
            Err(error) if error.is_missing() => hands::run(call("sh"), out).await,
            result => result,
        };
        ended(GET_SOURCES, result)
    }
}

#[cfg(test)]
mod served_tests;
#[cfg(test)]
mod submodules_tests;
#[cfg(test)]
pub(super) mod tests;
