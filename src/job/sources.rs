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

use camino::Utf8Path;
use secrecy::ExposeSecret as _;
use url::Url;

use super::hands::{self, Call, HandsError};
use super::settings::{GitStrategy, Settings};
use super::variables::{CARRIER, Variables, platform};
use super::{Plan, RunnerContext, Shell, Unrunnable, paths, script};
use crate::gitlab::wire::{JobPayload, Secret};

/// The stage's name in the trace and in verdicts.
const GET_SOURCES: &str = "get_sources";
/// The name of the stage that removes file variables.
const CLEANUP: &str = "cleanup_file_variables";

/// Carry the credentials to git's helper, in the environment of git's processes.
const USERNAME_VAR: &str = "BRIDGE_GIT_USERNAME";
const PASSWORD_VAR: &str = "BRIDGE_GIT_PASSWORD";

/// Says what is in the environment when git asks, and forgets what git wants kept.
const HELPER: &str = "!f() { test \"$1\" = get && printf 'username=%s\\npassword=%s\\n' \
                      \"$BRIDGE_GIT_USERNAME\" \"$BRIDGE_GIT_PASSWORD\"; }; f";

/// Variables of the job that git itself understands and that cannot make it run anything.
const GIT_VARIABLES: [&str; 8] = [
    "GIT_SSL_NO_VERIFY",
    "GIT_HTTP_LOW_SPEED_LIMIT",
    "GIT_HTTP_LOW_SPEED_TIME",
    "GIT_HTTP_MAX_REQUESTS",
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "all_proxy",
];

/// Files of an ended git that keep the next one from working, and those by which an earlier job could
/// tell git what to do.
const LEFTOVERS: [&str; 9] = [
    "index.lock",
    "shallow.lock",
    "HEAD.lock",
    "config.lock",
    "packed-refs.lock",
    "config.worktree",
    "commondir",
    "hooks",
    "objects/info/alternates",
];

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

/// Where the sources come from.
pub(super) struct Repository {
    /// Without credentials.
    origin: String,
    /// Scheme, host and port: whom the credentials are for.
    site: Option<String>,
    username: String,
    password: Secret,
    refspecs: Vec<String>,
    depth: i64,
    sha: String,
    reference: String,
    sha256: bool,
    /// What the job's fetch leaves out, if it does.
    filter: Option<String>,
    /// Settings that git gets on its command line; none is a secret.
    config: Vec<String>,
    /// `GIT_…` variables of the job.
    variables: Vec<(String, Secret)>,
}

impl Repository {
    /// Reads the payload.
    pub(super) fn of(
        payload: &JobPayload,
        runner: &RunnerContext,
        settings: &Settings,
        variables: &Variables,
    ) -> Result<Self, Unrunnable> {
        let git = &payload.git_info;
        let mut url = remote_url(payload, runner, variables)?;
        let username = paths::percent_decoded(url.username()).unwrap_or_default();
        let password =
            url.password().and_then(paths::percent_decoded).map(Secret::new).unwrap_or_default();
        // A URL that cannot have credentials has none.
        let cleaned = url
            .set_password(None)
            .and_then(|()| if url.scheme() == "ssh" { Ok(()) } else { url.set_username("") });
        if cleaned.is_err() && (!url.username().is_empty() || url.password().is_some()) {
            return Err(Unrunnable::Repository { reason: "its credentials cannot be taken out" });
        }
        let hexadecimal =
            matches!(git.sha.len(), 40 | 64) && git.sha.bytes().all(|b| b.is_ascii_hexdigit());
        if settings.git_checkout && !hexadecimal {
            return Err(Unrunnable::Commit { sha: git.sha.clone() });
        }
        // A refspec that looks like an option would be one.
        let odd = |refspec: &&String| {
            refspec.is_empty() || refspec.starts_with('-') || refspec.contains(['\0', '\n'])
        };
        if let Some(refspec) = git.refspecs.iter().find(odd) {
            return Err(Unrunnable::Refspec { refspec: refspec.clone() });
        }
        let refspecs = if git.refspecs.is_empty() && hexadecimal {
            vec![git.sha.clone()]
        } else {
            git.refspecs.clone()
        };
        let site = site(&url);
        let given = GIT_VARIABLES
            .iter()
            .map(|name| (*name, variables.content(name)))
            .filter(|(_, value)| !value.is_empty() && !value.contains('\0'))
            .map(|(name, value)| (name.to_owned(), Secret::new(value)))
            .collect();
        Ok(Self {
            origin: url.into(),
            config: config(site.as_deref(), runner),
            site,
            username,
            password,
            refspecs,
            depth: git.depth,
            sha: git.sha.clone(),
            reference: git.reference.clone(),
            sha256: git.repo_object_format == "sha256",
            filter: settings
                .git_fetch_flags
                .iter()
                .rev()
                .find_map(|flag| flag.strip_prefix("--filter="))
                .map(str::to_owned),
            variables: given,
        })
    }

    /// Gives the password, to be masked.
    pub(super) fn password(&self) -> &str {
        self.password.expose()
    }

    /// Gives what git is told in the environment: who we are, and what the job may say.
    fn environment(&self) -> Vec<(String, Secret)> {
        let mut env = self.variables.clone();
        if self.site.is_some() && !self.password.expose().is_empty() {
            env.push((USERNAME_VAR.to_owned(), Secret::new(self.username.as_str())));
            env.push((PASSWORD_VAR.to_owned(), self.password.clone()));
        }
        env
    }

    /// Writes `.git/config` anew: nothing of an earlier job's survives, and no secret is in it.
    fn config_file(&self) -> String {
        let mut extensions = String::new();
        let mut remote = format!("\turl = {}\n", in_config(&self.origin));
        if self.sha256 {
            extensions.push_str("\tobjectFormat = sha256\n");
        }
        // Without this, what an earlier job left out would count as lost.
        if let Some(filter) = &self.filter {
            extensions.push_str("\tpartialClone = origin\n");
            remote.push_str("\tpromisor = true\n\tpartialclonefilter = ");
            remote.push_str(&in_config(filter));
            remote.push('\n');
        }
        let version = u8::from(!extensions.is_empty());
        format!(
            "[core]\n\trepositoryformatversion = {version}\n\tfilemode = true\n\tbare = false\n\
             \tlogallrefupdates = true\n[extensions]\n{extensions}[remote \"origin\"]\n{remote}\
             [fetch]\n\trecurseSubmodules = false\n[credential]\n\tinteractive = never\n\
             [gc]\n\tautoDetach = false\n[maintenance]\n\tautoDetach = false\n"
        )
    }
}

/// Quotes a value for a configuration file.
fn in_config(value: &str) -> String {
    let escaped = value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
    format!("\"{escaped}\"")
}

/// Gives the URL to fetch from, with the operator's `clone_url` in the place of the server's.
fn remote_url(
    payload: &JobPayload,
    runner: &RunnerContext,
    variables: &Variables,
) -> Result<Url, Unrunnable> {
    let bad = |reason| Unrunnable::Repository { reason };
    let Some(base) = &runner.clone_url else {
        let text = payload.git_info.repo_url.expose();
        return Url::parse(text).map_err(|_unshown| bad("it cannot be parsed"));
    };
    let mut url = base.clone();
    let project = variables.content("CI_PROJECT_PATH");
    let project = if project.is_empty() { &payload.job_info.project_full_path } else { project };
    if project.is_empty() || project.split('/').any(|part| part == "..") {
        return Err(bad("clone_url needs the project's path, which is missing or odd"));
    }
    let path = format!("{}/{project}.git", url.path().trim_end_matches('/'));
    url.set_path(&path);
    let (user, password) = if url.scheme() == "ssh" {
        ("git", None)
    } else {
        ("gitlab-ci-token", Some(payload.token.expose()))
    };
    let set = url.set_username(user).and_then(|()| url.set_password(password));
    // `file:` has no place for credentials and needs none.
    if set.is_err() && url.scheme() != "file" {
        return Err(bad("clone_url cannot carry credentials"));
    }
    Ok(url)
}

/// Gives scheme, host and port of an HTTP URL.
fn site(url: &Url) -> Option<String> {
    if !matches!(url.scheme(), "http" | "https") {
        return None;
    }
    let host = url.host_str()?;
    let port = url.port().map(|port| format!(":{port}")).unwrap_or_default();
    Some(format!("{}://{host}{port}", url.scheme()))
}

/// Gives git's settings for one run.
fn config(site: Option<&str>, runner: &RunnerContext) -> Vec<String> {
    let mut config = vec![
        "core.hooksPath=/dev/null".to_owned(),
        "core.fsmonitor=false".to_owned(),
        "submodule.recurse=false".to_owned(),
        "advice.detachedHead=false".to_owned(),
        format!("http.userAgent=bridge {} {}", runner.version, platform()),
        // Whatever helpers the machine has, they must neither answer nor remember.
        "credential.helper=".to_owned(),
    ];
    if let Some(site) = site {
        // For this server only: a redirection elsewhere gets nothing.
        config.push(format!("credential.{site}.helper={HELPER}"));
        let files = [
            ("sslCAInfo", &runner.tls_ca_file),
            ("sslCert", &runner.tls_cert_file),
            ("sslKey", &runner.tls_key_file),
        ];
        config.extend(files.into_iter().filter_map(|(key, path)| {
            path.as_ref().map(|path| format!("http.{site}/.{key}={path}"))
        }));
    }
    config
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

type Out<'a> = &'a mut (dyn Output + Send);
type Stage = Result<(), StageError>;

impl Plan {
    /// Makes the job's directories, its file variables and its sources.
    ///
    /// It starts from whatever it finds, so it can be repeated after a crash.
    ///
    /// # Errors
    ///
    /// When a command failed in all attempts, took too long, or could not be started.
    pub async fn get_sources(&self, out: &mut (dyn Output + Send)) -> Result<(), StageError> {
        let work = async {
            self.prepare().await.map_err(StageError::broken(GET_SOURCES))?;
            self.check_flags()?;
            self.attempts(out).await
        };
        match tokio::time::timeout(self.get_sources_timeout, work).await {
            Ok(result) => result,
            // The process went with the future.
            Err(_elapsed) => Err(StageError::TimedOut { stage: GET_SOURCES }),
        }
    }

    /// Removes what the job must not leave behind: file variables and everything beside the checkout;
    /// with `FF_ENABLE_JOB_CLEANUP` the checkout or its changes too.
    ///
    /// # Errors
    ///
    /// When something could not be removed.
    pub async fn cleanup(&self, out: &mut (dyn Output + Send)) -> Result<(), StageError> {
        let broken = StageError::broken(CLEANUP);
        hands::remove(&self.temp_dir).await.map_err(&broken)?;
        if !self.settings.flag("FF_ENABLE_JOB_CLEANUP") {
            return Ok(());
        }
        match (self.settings.git_strategy, &self.repository) {
            (GitStrategy::Clone | GitStrategy::Empty, _) => {
                hands::remove(&self.project_dir).await.map_err(&broken)
            }
            (GitStrategy::Fetch, Some(repository)) => {
                self.disarm(repository).await.map_err(&broken)?;
                hands::make_dir(&self.temp_dir).await.map_err(&broken)?;
                let cleaned = self.clean(repository, CLEANUP, out).await;
                let reset = self.git(repository, CLEANUP, &["reset", "--hard", "-q"], out).await;
                hands::remove(&self.temp_dir).await.map_err(&broken)?;
                cleaned.and(reset)
            }
            (GitStrategy::Fetch | GitStrategy::None, _) => Ok(()),
        }
    }

    /// Makes the directory beside the checkout anew, with the file variables in it.
    async fn prepare(&self) -> Result<(), HandsError> {
        hands::remove(&self.temp_dir).await?;
        hands::make_dir(&self.temp_dir).await?;
        for (name, content) in &self.files {
            hands::write_private(&self.temp_dir.join(name), content.clone()).await?;
        }
        Ok(())
    }

    /// Refuses flags that make git run a program of the author's choice on this machine.
    fn check_flags(&self) -> Stage {
        let flags = self.settings.git_fetch_flags.iter();
        let runs = |flag: &&String| {
            // Git takes any unambiguous beginning of a long option.
            let name = flag.split_once('=').map_or(flag.as_str(), |(name, _)| name);
            name.len() > 3 && "--upload-pack".starts_with(name)
        };
        match flags.clone().find(runs) {
            None => Ok(()),
            Some(flag) => Err(StageError::Misconfigured {
                detail: format!("GIT_FETCH_EXTRA_FLAGS: {flag:?} is not allowed"),
            }),
        }
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
        if !self.is_repository().await.unwrap_or(false) {
            return;
        }
        out.remark(Tone::Notice, "Deleting tracked and untracked files...");
        let remove: &[&str] = &["rm", "-rf", "--ignore-unmatch", "--quiet", "."];
        for args in [remove, &["clean", "-ffdx", "-q"]] {
            if let Err(error) = self.git(repository, "clear_worktree", args, out).await {
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
        let inherited = self.is_repository().await.map_err(&broken)?;
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
        self.hook(&self.hooks.after, &self.project_dir, out).await
    }

    async fn is_repository(&self) -> Result<bool, HandsError> {
        let git_dir = self.project_dir.join(".git");
        Ok(hands::is_dir(&self.project_dir).await?
            && hands::is_dir(&git_dir).await?
            && hands::is_dir(&git_dir.join("objects")).await?
            && hands::is_file(&git_dir.join("HEAD")).await?)
    }

    /// Takes away what an earlier job or a killed git left, and writes the configuration anew.
    async fn disarm(&self, repository: &Repository) -> Result<(), HandsError> {
        let git_dir = self.project_dir.join(".git");
        for name in LEFTOVERS {
            hands::remove(&git_dir.join(name)).await?;
        }
        hands::remove_below(&git_dir.join("refs"), ".lock").await?;
        hands::write_private(&git_dir.join("config"), Secret::new(repository.config_file())).await
    }

    async fn bring_up_to_date(&self, repository: &Repository, out: Out<'_>) -> Stage {
        let broken = StageError::broken(GET_SOURCES);
        out.remark(
            Tone::Notice,
            &if repository.depth > 0 {
                format!("Fetching changes with git depth set to {}...", repository.depth)
            } else {
                "Fetching changes...".to_owned()
            },
        );
        if !self.is_repository().await.map_err(&broken)? {
            if !hands::is_dir(&self.project_dir).await.map_err(&broken)? {
                hands::remove(&self.project_dir).await.map_err(&broken)?;
            }
            hands::remove(&self.project_dir.join(".git")).await.map_err(&broken)?;
            hands::make_dir(&self.project_dir).await.map_err(&broken)?;
            let mut init = vec!["init", "--quiet", "--template="];
            if repository.sha256 {
                init.push("--object-format=sha256");
            }
            self.git_plainly(repository, GET_SOURCES, &init, out).await?;
            out.remark(Tone::Notice, "Created fresh repository.");
        }
        self.disarm(repository).await.map_err(&broken)?;

        let depth = repository.depth.to_string();
        let mut fetch = vec!["fetch", "--no-recurse-submodules"];
        let shallow = self.project_dir.join(".git/shallow");
        if repository.depth > 0 {
            fetch.extend(["--depth", &depth]);
        } else if hands::is_file(&shallow).await.map_err(&broken)? {
            fetch.push("--unshallow");
        }
        fetch.extend(self.settings.git_fetch_flags.iter().map(String::as_str));
        fetch.extend(["--", "origin"]);
        fetch.extend(repository.refspecs.iter().map(String::as_str));
        self.git(repository, GET_SOURCES, &fetch, out).await?;

        if !self.settings.git_checkout {
            out.remark(Tone::Notice, "Skipping Git checkout");
            return Ok(());
        }
        let text = format!(
            "Checking out {} as detached HEAD (ref is {})...",
            repository.sha.get(..8).unwrap_or_default(),
            repository.reference
        );
        out.remark(Tone::Notice, &text);
        let checkout = ["checkout", "-f", "-q", "--detach", &repository.sha];
        self.git(repository, GET_SOURCES, &checkout, out).await?;
        self.clean(repository, GET_SOURCES, out).await
    }

    async fn clean(&self, repository: &Repository, stage: &'static str, out: Out<'_>) -> Stage {
        if self.settings.git_clean_flags.is_empty() {
            return Ok(());
        }
        let mut clean = vec!["clean"];
        clean.extend(self.settings.git_clean_flags.iter().map(String::as_str));
        self.git(repository, stage, &clean, out).await
    }

    async fn server_answers(&self, repository: &Repository) -> bool {
        let probe = ["ls-remote", "--quiet", "origin", "HEAD"];
        self.git(repository, GET_SOURCES, &probe, &mut Silence).await.is_ok()
    }

    /// Runs git in the checkout and nowhere else: it does not look for a repository further up.
    async fn git(
        &self,
        repository: &Repository,
        stage: &'static str,
        args: &[&str],
        out: Out<'_>,
    ) -> Stage {
        let mut call = self.git_call(repository, args);
        let git_dir = self.project_dir.join(".git");
        call.env.push(("GIT_DIR".to_owned(), Secret::new(git_dir.as_str())));
        call.env.push(("GIT_WORK_TREE".to_owned(), Secret::new(self.project_dir.as_str())));
        ended(stage, hands::run(call, out).await)
    }

    async fn git_plainly(
        &self,
        repository: &Repository,
        stage: &'static str,
        args: &[&str],
        out: Out<'_>,
    ) -> Stage {
        ended(stage, hands::run(self.git_call(repository, args), out).await)
    }

    fn git_call(&self, repository: &Repository, args: &[&str]) -> Call {
        let config = repository.config.iter().flat_map(|one| ["-c".to_owned(), one.clone()]);
        let plain = |name: &str, value: &str| (name.to_owned(), Secret::new(value));
        let mut env = vec![
            // Neither the service account's settings nor its keys; the machine's settings stay, since
            // proxies are often named there.
            plain("HOME", self.temp_dir.as_str()),
            plain("GIT_TERMINAL_PROMPT", "0"),
            plain("GCM_INTERACTIVE", "Never"),
            plain("GIT_LFS_SKIP_SMUDGE", "1"),
            plain("LC_ALL", "C.UTF-8"),
        ];
        env.extend(repository.environment());
        Call {
            program: "git",
            args: config.chain(args.iter().map(|arg| (*arg).to_owned())).collect(),
            env,
            dir: self.project_dir.clone(),
            input: None,
        }
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

fn ended(stage: &'static str, result: Result<i32, HandsError>) -> Stage {
    match result {
        Ok(0) => Ok(()),
        Ok(exit_code) => Err(StageError::Failed { stage, exit_code }),
        Err(error) => Err(StageError::broken(stage)(error)),
    }
}

/// Hears nothing.
struct Silence;

impl Output for Silence {
    fn bytes(&mut self, _bytes: &[u8]) {}
    fn remark(&mut self, _tone: Tone, _text: &str) {}
}

#[cfg(test)]
#[path = "sources_tests.rs"]
pub(super) mod tests;
