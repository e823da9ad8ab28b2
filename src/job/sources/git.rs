//! Runs git: with which settings, in which environment, and where.
//!
//! Git never looks for a repository by itself: it is told which one, so that neither a removed `.git`
//! nor a planted one leads it elsewhere.

use std::sync::atomic::{AtomicU32, Ordering};

use camino::{Utf8Path, Utf8PathBuf};

use super::repository::Repository;
use super::{Out, Output, Stage, StageError, Tone};
use crate::gitlab::wire::Secret;
use crate::job::hands::{self, Call, HandsError};

/// A repository, and where its files are checked out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) git_dir: Utf8PathBuf,
    /// A bare repository has none.
    pub(super) work_tree: Option<Utf8PathBuf>,
}

impl Place {
    /// A checkout with its repository within.
    pub(super) fn checkout(dir: &Utf8Path) -> Self {
        Self { git_dir: dir.join(".git"), work_tree: Some(dir.to_owned()) }
    }

    /// A bare repository.
    pub(super) fn bare(dir: &Utf8Path) -> Self {
        Self { git_dir: dir.to_owned(), work_tree: None }
    }

    /// Where git is started.
    pub(super) fn dir(&self) -> &Utf8Path {
        self.work_tree.as_deref().unwrap_or(&self.git_dir)
    }
}

/// Git as one job's stage may run it.
#[derive(Clone)]
pub(super) struct Git<'a> {
    pub(super) stage: &'static str,
    /// Where git looks for its user's settings: ours, and empty.
    pub(super) home: &'a Utf8Path,
    /// `-c` each; no secret is among them.
    pub(super) config: Vec<String>,
    /// Credentials among them.
    pub(super) env: Vec<(String, Secret)>,
    /// Which transports may be used, also by submodules.
    pub(super) protocols: &'static str,
    /// Counts the processes.
    pub(super) started: &'a AtomicU32,
}

/// Transports that reach other machines. `file` would read what the service account may read, `ext`
/// would run what a repository names.
pub(super) const REMOTE: &str = "http:https:ssh:git";
/// The same for a project that itself lies on this machine.
pub(super) const REMOTE_AND_FILE: &str = "http:https:ssh:git:file";
/// For a mirror alone.
pub(super) const FILE: &str = "file";

/// Neither the service account's keys nor its settings, which ssh would look up by user id, not HOME.
pub(super) const SSH: &str = "ssh -F /dev/null -o BatchMode=yes -o IdentitiesOnly=yes -o IdentityAgent=none \
                   -o IdentityFile=/dev/null";

impl<'a> Git<'a> {
    /// Git for what has to do with a job's repository.
    pub(super) fn of(
        repository: &Repository,
        stage: &'static str,
        home: &'a Utf8Path,
        started: &'a AtomicU32,
    ) -> Self {
        let protocols = if repository.is_local() { REMOTE_AND_FILE } else { REMOTE };
        let config = repository.config.clone();
        Self { stage, home, config, env: repository.environment(), protocols, started }
    }

    /// Git without credentials, for what needs no server.
    pub(super) fn offline(stage: &'static str, home: &'a Utf8Path, started: &'a AtomicU32) -> Self {
        let config = super::repository::basic_config();
        Self { stage, home, config, env: Vec::new(), protocols: REMOTE, started }
    }

    /// The same without credentials, for one transport.
    pub(super) fn only(&self, protocols: &'static str) -> Self {
        Self { env: Vec::new(), protocols, ..self.clone() }
    }

    /// The same with more settings.
    pub(super) fn with(&self, config: &[&str]) -> Self {
        let mut more = self.clone();
        more.config.extend(config.iter().map(|one| (*one).to_owned()));
        more
    }

    /// Runs git in a repository and nowhere else.
    pub(super) async fn run(&self, at: &Place, args: &[&str], out: Out<'_>) -> Stage {
        let mut call = self.call(at.dir(), args);
        call.env.push(("GIT_DIR".to_owned(), Secret::new(at.git_dir.as_str())));
        if let Some(work_tree) = &at.work_tree {
            call.env.push(("GIT_WORK_TREE".to_owned(), Secret::new(work_tree.as_str())));
        }
        self.start(call, out).await
    }

    /// Runs git where no repository is needed or yet there.
    pub(super) async fn run_plainly(&self, dir: &Utf8Path, args: &[&str], out: Out<'_>) -> Stage {
        let mut call = self.call(dir, args);
        call.env.push(("GIT_CEILING_DIRECTORIES".to_owned(), Secret::new(dir.as_str())));
        self.start(call, out).await
    }

    async fn start(&self, call: Call, out: Out<'_>) -> Stage {
        self.started.fetch_add(1, Ordering::Relaxed);
        ended(self.stage, hands::run(call, out).await)
    }

    /// Gives the process that would be started.
    pub(super) fn call(&self, dir: &Utf8Path, args: &[&str]) -> Call {
        let config = self.config.iter().flat_map(|one| ["-c".to_owned(), one.clone()]);
        let plain = |name: &str, value: &str| (name.to_owned(), Secret::new(value));
        let mut env = vec![
            // Neither the service account's settings nor its keys; the machine's settings stay, since
            // proxies are often named there.
            plain("HOME", self.home.as_str()),
            plain("GIT_TERMINAL_PROMPT", "0"),
            plain("GCM_INTERACTIVE", "Never"),
            plain("GIT_SSH_COMMAND", SSH),
            plain("GIT_ALLOW_PROTOCOL", self.protocols),
            // An earlier job could have put other contents in a commit's place.
            plain("GIT_NO_REPLACE_OBJECTS", "1"),
            // Large files are fetched at once, afterwards.
            plain("GIT_LFS_SKIP_SMUDGE", "1"),
            plain("LC_ALL", "C.UTF-8"),
        ];
        env.extend(self.env.iter().cloned());
        Call {
            program: "git",
            args: config.chain(args.iter().map(|arg| (*arg).to_owned())).collect(),
            env,
            dir: dir.to_owned(),
            input: None,
        }
    }
}

/// Judges an exit code.
pub(super) fn ended(stage: &'static str, result: Result<i32, HandsError>) -> Stage {
    match result {
        Ok(0) => Ok(()),
        Ok(exit_code) => Err(StageError::Failed { stage, exit_code }),
        Err(error) => Err(StageError::broken(stage)(error)),
    }
}

/// Hears nothing.
pub(super) struct Silence;

impl Output for Silence {
    fn bytes(&mut self, _bytes: &[u8]) {}
    fn remark(&mut self, _tone: Tone, _text: &str) {}
}

/// Keeps what a process says, to be read by us.
#[derive(Default)]
pub(super) struct Heard(pub(super) Vec<u8>);

impl Output for Heard {
    fn bytes(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }
    fn remark(&mut self, _tone: Tone, _text: &str) {}
}
