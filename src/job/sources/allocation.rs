//! Sources that the job fetches itself, where it runs (`sources = "allocation"`).
//!
//! # Who does what
//!
//! *The submit node* makes directories and file variables, and runs no git. Of a checkout that an earlier
//! job left on a shared file system it does what needs none: for `clone` it is removed, for `fetch` its
//! repository is made harmless, as before a fetch from here (`leftovers.rs`).
//!
//! *The job's script* runs `allocation.sh` before the first step: hooks, fetch, check-out, cleaning,
//! submodules, large files, repeated as often as the job wants, with the verdicts that the same trouble
//! has here. Who must act when it fails stands in the result file.
//!
//! # Caches and artifacts of earlier jobs
//!
//! They come from the submit node, and so before the sources, where GitLab's order is sources, caches,
//! artifacts: cleaning would remove them, `clone` would too, and the check-out would overwrite what is
//! to win over it. So they are unpacked beside the checkout ([`RESTORED`]) and put into it when the
//! sources are there, by renaming wherever nothing has the name. Nothing has to be left out of cleaning,
//! and every strategy and every flag of `git clean` means what it says.
//!
//! # Secrets
//!
//! Neither script nor settings hold any. The password of the repository comes in the environment, under
//! a name that only git's processes are given in its true form, and that no step sees; certificates
//! travel in files of mode 0600 in the temporary directory and are removed by the script.

use std::fmt::Write as _;
use std::time::Duration;

use bridge_backend::EnvVar;
use camino::{Utf8Path, Utf8PathBuf};
use secrecy::SecretString;

use super::git::{REMOTE, REMOTE_AND_FILE, SSH};
use super::repository::{Repository, in_config};
use super::{GET_SOURCES, Hooks, Out, Plan, Stage, StageError, Tone, leftovers, lfs};
use crate::gitlab::wire::Secret;
use crate::job::hands;
use crate::job::script::{self, quoted};
use crate::job::settings::{Settings, SubmoduleStrategy};
use crate::job::{GitStrategy, RunnerContext, Shell};

const SCRIPT: &str = include_str!("allocation.sh");

/// Begins the names under which the environment carries what only git is to see.
const CARRIER: &str = "BRIDGE_GIT_VAR_";

/// What the script needs and removes, below the temporary directory.
const OWN: &str = ".sources";
/// What is put into the checkout when the sources are there, below that.
const RESTORED: &str = "restored";
/// Where the script says what the machine could not do, in the temporary directory.
const BROKEN: &str = ".sources_broken";

/// Certificates are a few kilobytes; a bundle of all authorities has a quarter of a megabyte.
const PEM_MOST: u64 = 4 * 1024 * 1024;

/// The stage that the job's script begins with.
pub(in crate::job) struct Fetching {
    /// For a shell, without a secret.
    pub(in crate::job) body: String,
    /// The most that it may take.
    pub(in crate::job) limit: Option<Duration>,
    /// Where it says that the machine could not do it.
    pub(in crate::job) broken: Utf8PathBuf,
    carried: Vec<(String, Secret)>,
}

impl Fetching {
    /// Names the variables that no step may see.
    pub(in crate::job) fn names(&self) -> impl Iterator<Item = String> {
        self.carried.iter().map(|(name, _)| format!("{CARRIER}{name}"))
    }

    /// Gives those variables.
    pub(in crate::job) fn environment(&self) -> Vec<EnvVar> {
        let carried = self.carried.iter();
        let var = |(name, value): &(String, Secret)| EnvVar {
            name: format!("{CARRIER}{name}"),
            value: SecretString::from(value.expose().to_owned()),
        };
        carried.map(var).collect()
    }
}

/// Gives the directory into which caches and artifacts go until the sources are there.
pub(in crate::job) fn restored(temp_dir: &Utf8Path) -> Utf8PathBuf {
    temp_dir.join(OWN).join(RESTORED)
}

/// Gives the runner as the machine of the job sees it: its certificates come along.
pub(in crate::job) fn on_the_worker(runner: &RunnerContext, temp_dir: &Utf8Path) -> RunnerContext {
    let own = temp_dir.join(OWN);
    let there = |path: &Option<Utf8PathBuf>, name| path.as_ref().map(|_| own.join(name));
    RunnerContext {
        tls_ca_file: there(&runner.tls_ca_file, "ca.pem"),
        tls_cert_file: there(&runner.tls_cert_file, "cert.pem"),
        tls_key_file: there(&runner.tls_key_file, "key.pem"),
        ..runner.clone()
    }
}

/// What the stage is made from.
pub(in crate::job) struct Order<'a> {
    pub(in crate::job) repository: &'a Repository,
    pub(in crate::job) settings: &'a Settings,
    pub(in crate::job) hooks: &'a Hooks,
    /// As the machine of the job sees it.
    pub(in crate::job) runner: &'a RunnerContext,
    /// The variables that hooks get.
    pub(in crate::job) names: &'a [&'a str],
    pub(in crate::job) project_dir: &'a Utf8Path,
    pub(in crate::job) temp_dir: &'a Utf8Path,
    pub(in crate::job) limit: Option<Duration>,
}

impl Order<'_> {
    /// Writes the stage.
    pub(in crate::job) fn fetching(&self) -> Fetching {
        let broken = self.temp_dir.join(BROKEN);
        let carried = self.repository.environment();
        let mut text = String::new();
        self.variables(&mut text, &broken, &carried);
        self.functions(&mut text);
        text.push_str(SCRIPT);
        // Without input, since the shell reads this text itself from there; and read as a whole.
        let body = format!("(eval {}) </dev/null\nexit $?", quoted(&text));
        Fetching { body, limit: self.limit, broken, carried }
    }

    fn variables(&self, text: &mut String, broken: &Utf8Path, carried: &[(String, Secret)]) {
        let (repository, settings) = (self.repository, self.settings);
        let own = self.temp_dir.join(OWN);
        let names: Vec<&str> = carried.iter().map(|(name, _)| name.as_str()).collect();
        let flag = |on: bool| if on { "1" } else { "" };
        let hook = |commands: &[String]| match commands {
            [] => String::new(),
            commands => script::hook(commands, self.names),
        };
        let pauses: Vec<String> = (2..=settings.get_sources_attempts)
            .map(|attempt| settings.pause_before(attempt).as_secs().to_string())
            .collect();
        let recursive = self.recursive();
        let flags = &settings.git_clean_flags;
        let thoroughly = ["-ffdx".to_owned()];
        let flags = if flags.is_empty() { &thoroughly[..] } else { flags };
        let wants_large = settings.git_checkout && !settings.git_lfs_skip_smudge;
        let depth = repository.depth.max(0);
        let fetching = match depth {
            0 => "Fetching changes...".to_owned(),
            depth => format!("Fetching changes with git depth set to {depth}..."),
        };
        let remote = |flag: &String| flag.eq_ignore_ascii_case("--remote");
        let protocols = if repository.is_local() { REMOTE_AND_FILE } else { REMOTE };
        let ca = self.runner.tls_ca_file.as_ref().map_or("", |path| path.as_str());
        let restored = restored(self.temp_dir);
        let env_file = self.temp_dir.join(script::ENV_FILE);
        let list: &[(&str, &str)] = &[
            ("project", self.project_dir.as_str()),
            ("temp", self.temp_dir.as_str()),
            ("own", own.as_str()),
            ("restored", restored.as_str()),
            ("broken_file", broken.as_str()),
            ("env", env_file.as_str()),
            ("carrier", CARRIER),
            ("names", &names.join(" ")),
            ("ssh", SSH),
            ("protocols", protocols),
            ("ca", ca),
            ("reset", "[credential]\n\thelper =\n"),
            ("settings", &settings_file(&repository.config)),
            ("config", &repository.config_file()),
            ("bash", flag(self.runner.shell == Shell::Bash)),
            ("before", &hook(&self.hooks.before)),
            ("after", &hook(&self.hooks.after)),
            ("most", &settings.get_sources_attempts.to_string()),
            ("pauses", &pauses.join(" ")),
            ("clone", flag(settings.git_strategy == GitStrategy::Clone)),
            ("depth", &depth.to_string()),
            ("fetching", &fetching),
            ("checking", &self.checking()),
            ("lfs", flag(wants_large)),
            ("lfs_each", &large_of_each()),
            ("updating", &self.updating(recursive)),
            ("recursive", if recursive { "--recursive" } else { "" }),
            ("clean_each", &format!("git clean{}", words(flags))),
            ("module_depth", &settings.git_submodule_depth.to_string()),
            ("remote", flag(settings.git_submodule_update_flags.iter().any(remote))),
        ];
        for (name, value) in list {
            push(text, format_args!("s_{name}={}", quoted(value)));
        }
    }

    fn functions(&self, text: &mut String) {
        let (repository, settings) = (self.repository, self.settings);
        let sha256 = if repository.sha256 { " --object-format=sha256" } else { "" };
        push(text, format_args!("s_run_init() {{ s_git init --quiet --template={sha256}; }}"));
        push(
            text,
            format_args!(
                "s_run_fetch() {{ s_git fetch --no-recurse-submodules \"$@\"{} -- origin{}; }}",
                words(&settings.git_fetch_flags),
                words(&repository.refspecs)
            ),
        );
        push(
            text,
            format_args!(
                "s_run_checkout() {{ s_git checkout -f -q --detach{}; }}",
                words(std::slice::from_ref(&repository.sha))
            ),
        );
        if settings.git_clean_flags.is_empty() {
            text.push_str("s_run_clean() { :; }\n");
        } else {
            let flags = words(&settings.git_clean_flags);
            push(text, format_args!("s_run_clean() {{ s_git clean{flags}; }}"));
        }
        let large = words(&large_settings());
        push(text, format_args!("s_run_lfs() {{ s_git{large} lfs pull; }}"));
        let recursive = if self.recursive() { " --recursive" } else { "" };
        let mut paths = String::new();
        if !settings.git_submodule_paths.is_empty() {
            paths = format!(" --{}", words(&settings.git_submodule_paths));
        }
        let update = settings.git_submodule_update_flags.iter();
        let update: Vec<String> = update.filter(|flag| *flag != "--recursive").cloned().collect();
        push(
            text,
            format_args!(
                "s_run_submodule_init() {{ s_git submodule --quiet init{paths}; }}\n\
                 s_run_sync() {{ s_git submodule --quiet sync{recursive}{paths}; }}\n\
                 s_run_update() {{ s_git submodule update --init{recursive} \"$@\"{}{paths}; }}",
                words(&update)
            ),
        );
    }

    fn recursive(&self) -> bool {
        self.settings.git_submodule_strategy == SubmoduleStrategy::Recursive
            || self.settings.git_submodule_update_flags.iter().any(|flag| flag == "--recursive")
    }

    fn checking(&self) -> String {
        if !self.settings.git_checkout {
            return String::new();
        }
        format!(
            "Checking out {} as detached HEAD (ref is {})...",
            self.repository.sha.get(..8).unwrap_or_default(),
            self.repository.reference
        )
    }

    fn updating(&self, recursive: bool) -> String {
        match self.settings.git_submodule_strategy {
            SubmoduleStrategy::None => String::new(),
            SubmoduleStrategy::Normal
            | SubmoduleStrategy::Recursive
            | SubmoduleStrategy::Unknown(_) => {
                super::submodules::announcement(recursive, self.settings.git_submodule_depth.into())
            }
        }
    }
}

fn large_settings() -> Vec<String> {
    lfs::SETTINGS.iter().flat_map(|one| ["-c".to_owned(), (*one).to_owned()]).collect()
}

/// Fetches the large files of the submodule in which it runs.
fn large_of_each() -> String {
    format!(
        "if git grep -q filter=lfs -- .gitattributes '*/.gitattributes'; then git{} lfs pull; fi",
        words(&large_settings())
    )
}

fn words(list: &[String]) -> String {
    let mut text = String::new();
    for word in list {
        text.push(' ');
        text.push_str(&quoted(word));
    }
    text
}

fn push(text: &mut String, line: std::fmt::Arguments<'_>) {
    writeln!(text, "{line}").expect("writing to a string does not fail");
}

/// Writes settings as git's file has them: older versions keep those of a command line from submodules.
///
/// The empty helper, which older versions take for one, is the script's to write.
fn settings_file(config: &[String]) -> String {
    // The account's own rights are all there is to lose: whoever made the directory may run git in it.
    let mut text = "[safe]\n\tdirectory = *\n".to_owned();
    for setting in config {
        let (key, value) = setting.split_once('=').unwrap_or((setting, "true"));
        if (key, value) == ("credential.helper", "") {
            continue;
        }
        let Some((section, rest)) = key.split_once('.') else { continue };
        match rest.rsplit_once('.') {
            Some((of, name)) => {
                push(
                    &mut text,
                    format_args!("[{section} {}]\n\t{name} = {}", in_config(of), in_config(value)),
                );
            }
            None => push(&mut text, format_args!("[{section}]\n\t{rest} = {}", in_config(value))),
        }
    }
    text
}

impl Plan {
    /// Says whether the job itself fetches its sources, where it runs.
    pub fn fetches_itself(&self) -> bool {
        self.fetching.is_some()
    }

    /// Makes the place ready in which the job's script fetches the sources; without git.
    pub(super) async fn prepare_allocation(&self, repository: &Repository, out: Out<'_>) -> Stage {
        let broken = StageError::broken(GET_SOURCES);
        hands::make_dir(&self.temp_dir.join(OWN)).await.map_err(&broken)?;
        self.take_certificates_along().await?;
        let strategy = self.settings.git_strategy;
        let cleans = self.settings.git_checkout && self.settings.git_clean_flags == ["-ffdx"];
        // What travels need not be brought up to date over there.
        let anew = strategy == GitStrategy::Clone || self.runner.backend.sandbox;
        if !anew && leftovers::is_repository(&self.project_dir).await.map_err(&broken)? {
            let git_dir = self.project_dir.join(".git");
            leftovers::disarm(&git_dir, repository.config_file()).await.map_err(&broken)?;
            let config = Repository::submodule_config(repository.sha256, None);
            leftovers::disarm_modules(&git_dir, &config).await.map_err(&broken)?;
        } else if anew || cleans {
            // Without a repository cleaning would remove all of it; so it need not travel.
            hands::remove(&self.project_dir).await.map_err(&broken)?;
            hands::make_dir(&self.project_dir).await.map_err(&broken)?;
        } else {
            self.make_room().await?;
        }
        let text =
            "The job fetches its sources itself, where it runs (`sources = \"allocation\"`).";
        out.remark(Tone::Notice, text);
        Ok(())
    }

    /// Copies the files that git needs for TLS: the job's machine may not see the submit node's.
    async fn take_certificates_along(&self) -> Stage {
        let broken = StageError::broken(GET_SOURCES);
        let there = on_the_worker(&self.runner, &self.temp_dir);
        for (key, from, to) in [
            ("tls_ca_file", &self.runner.tls_ca_file, there.tls_ca_file),
            ("tls_cert_file", &self.runner.tls_cert_file, there.tls_cert_file),
            ("tls_key_file", &self.runner.tls_key_file, there.tls_key_file),
        ] {
            let (Some(from), Some(to)) = (from, to) else { continue };
            let from = hands::really(from).await.map_err(&broken)?;
            let bytes = hands::read(&from, PEM_MOST).await.map_err(&broken)?;
            let Some(text) = bytes.and_then(|bytes| String::from_utf8(bytes).ok()) else {
                let detail = format!("{key} {from} is no file of certificates");
                return Err(StageError::Broken { stage: GET_SOURCES, detail });
            };
            hands::write_private(&to, Secret::new(text)).await.map_err(&broken)?;
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "allocation_tests.rs"]
mod tests;
