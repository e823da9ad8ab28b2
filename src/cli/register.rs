//! `bridge register`: a token becomes a runner in the configuration.
//!
//! Everything that can be known to be wrong without GitLab is found before GitLab is asked. Then,
//! in this order: GitLab, the token file, the `[[runners]]` table. A token that GitLab gave is on
//! disk before anything else can fail.

use std::io::{BufRead as _, IsTerminal as _, Read as _};

use anyhow::Context as _;
use camino::{Utf8Path, Utf8PathBuf};
use clap::{Args, ValueEnum};
use toml_edit::{Array, Table, value};
use url::Url;

use super::config_file::ConfigFile;
use super::exit::{Exit, Failure};
use super::{Context, client, info};
use crate::config::{self, Config};
use crate::domain::id::{BackendName, RunnerName};
use crate::gitlab::api::{NewRunner, RunnerChange};
use crate::gitlab::wire::Secret;
use crate::gitlab::{Credentials, RegisterReply, Registration, Unclear, VerifyReply};

/// The environment variable that may hold the token.
const TOKEN_VAR: &str = "BRIDGE_TOKEN";

/// More than any token; the rest of a wrong file need not be read.
const MAX_TOKEN_LEN: u64 = 16 * 1024;

/// `bridge register`.
#[derive(Clone, Debug, Default, Args)]
pub struct RegisterArgs {
    /// The GitLab instance
    #[arg(long, value_name = "URL")]
    url: Option<String>,
    /// The token of a runner created in GitLab (glrt-…), or a registration token
    ///
    /// `-` reads it from standard input. Everybody on this machine can see a command line: better
    /// use --token-file, $BRIDGE_TOKEN or a pipe.
    #[arg(long, value_name = "TOKEN", conflicts_with = "token_file", hide_env_values = true)]
    token: Option<String>,
    /// Read the token from a file
    #[arg(long, value_name = "PATH")]
    token_file: Option<Utf8PathBuf>,
    /// Take the token for a runner's authentication token, whatever it looks like
    #[arg(long, conflicts_with = "registration_token")]
    authentication_token: bool,
    /// Take the token for a registration token, whatever it looks like
    #[arg(long)]
    registration_token: bool,
    #[command(flatten)]
    local: LocalArgs,
    #[command(flatten, next_help_heading = "With a registration token")]
    server: ServerArgs,
}

/// What the configuration says of a new runner.
#[derive(Clone, Debug, Default, Args)]
pub(super) struct LocalArgs {
    /// The runner's name in the configuration; default: this machine's name
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// The backend that runs its jobs; default: the only one
    ///
    /// `local` in a configuration without backends adds one.
    #[arg(long, value_name = "NAME")]
    backend: Option<String>,

    /// Jobs in flight of this runner; 0 is no limit
    #[arg(long, value_name = "N", help_heading = "Configuration")]
    limit: Option<u32>,
    /// Requests for a job at the same time
    #[arg(long, value_name = "N", help_heading = "Configuration")]
    request_concurrency: Option<u32>,
    /// Where workspaces are made
    #[arg(long, value_name = "PATH", help_heading = "Configuration")]
    builds_dir: Option<Utf8PathBuf>,
    /// Where caches are kept
    #[arg(long, value_name = "PATH", help_heading = "Configuration")]
    cache_dir: Option<Utf8PathBuf>,
    /// A variable for every job; may be repeated
    #[arg(long = "env", value_name = "NAME=VALUE", help_heading = "Configuration")]
    environment: Vec<String>,
    /// Limit of a job's trace
    #[arg(long, value_name = "KIB", help_heading = "Configuration")]
    output_limit: Option<u32>,
    /// Certificates to trust besides the system's
    #[arg(long, value_name = "PATH", help_heading = "Configuration")]
    tls_ca_file: Option<Utf8PathBuf>,
    /// The client certificate
    #[arg(long, value_name = "PATH", help_heading = "Configuration")]
    tls_cert_file: Option<Utf8PathBuf>,
    /// The client certificate's key
    #[arg(long, value_name = "PATH", help_heading = "Configuration")]
    tls_key_file: Option<Utf8PathBuf>,
}

/// What is set of a runner at GitLab.
#[derive(Clone, Debug, Default, Args)]
pub(super) struct ServerArgs {
    /// The runner's description; default: its name
    #[arg(long, value_name = "TEXT")]
    pub(super) description: Option<String>,
    /// Tags, separated by commas
    #[arg(long, value_name = "TAGS", value_delimiter = ',')]
    tag_list: Vec<String>,
    /// Take jobs without tags; default: only if the runner has none either
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    run_untagged: Option<bool>,
    /// Keep the runner to its project; default: true
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    locked: Option<bool>,
    /// Which refs it takes jobs of
    #[arg(long, value_name = "LEVEL")]
    access_level: Option<AccessLevel>,
    /// The longest timeout of its jobs: seconds, or "2 hours"
    #[arg(long, value_name = "DURATION", value_parser = maximum_timeout)]
    maximum_timeout: Option<u64>,
    /// Take no jobs for now
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    paused: Option<bool>,
    /// A note for administrators, at most 1024 characters
    #[arg(long, value_name = "TEXT")]
    pub(super) maintenance_note: Option<String>,
}

/// GitLab's words for which refs a runner takes jobs of.
#[derive(Clone, Copy, Debug, ValueEnum)]
#[value(rename_all = "snake_case")]
pub(super) enum AccessLevel {
    /// All.
    NotProtected,
    /// Protected ones.
    RefProtected,
}

/// Reads seconds, or a duration in words.
fn maximum_timeout(text: &str) -> Result<u64, String> {
    let seconds = match text.parse() {
        Ok(seconds) => seconds,
        Err(_words) => {
            config::duration_in_words(text).map_err(|error| error.to_string())?.as_secs()
        }
    };
    if seconds != 0 && seconds < 600 {
        return Err("GitLab takes no less than 600 seconds".to_owned());
    }
    Ok(seconds)
}

impl ServerArgs {
    /// Lists the flags that were given.
    pub(super) fn given(&self) -> Vec<&'static str> {
        let all = [
            ("--description", self.description.is_some()),
            ("--tag-list", !self.tag_list.is_empty()),
            ("--run-untagged", self.run_untagged.is_some()),
            ("--locked", self.locked.is_some()),
            ("--access-level", self.access_level.is_some()),
            ("--maximum-timeout", self.maximum_timeout.is_some()),
            ("--paused", self.paused.is_some()),
            ("--maintenance-note", self.maintenance_note.is_some()),
        ];
        all.into_iter().filter(|(_flag, given)| *given).map(|(flag, _given)| flag).collect()
    }

    /// Gives the tags as they are meant.
    fn tags(&self) -> Vec<String> {
        let tags = self.tag_list.iter().map(|tag| tag.trim().to_owned());
        tags.filter(|tag| !tag.is_empty()).collect()
    }

    fn access_level(&self) -> Option<String> {
        self.access_level.map(|level| {
            let word = match level {
                AccessLevel::NotProtected => "not_protected",
                AccessLevel::RefProtected => "ref_protected",
            };
            word.to_owned()
        })
    }

    /// Gives the runner to be made with a personal access token; what is not said is left to GitLab.
    pub(super) fn new_runner(&self, name: &str) -> NewRunner {
        let tags = self.tags();
        NewRunner {
            description: self.description.clone().unwrap_or_else(|| name.to_owned()),
            maintenance_note: self.maintenance_note.clone().unwrap_or_default(),
            // GitLab refuses a runner that could take no job at all.
            run_untagged: Some(self.run_untagged.unwrap_or(tags.is_empty())),
            tag_list: tags.join(","),
            locked: self.locked,
            access_level: self.access_level().unwrap_or_default(),
            maximum_timeout: self.maximum_timeout.filter(|seconds| *seconds > 0),
            paused: self.paused,
            ..NewRunner::default()
        }
    }

    /// Gives what is to be changed of a runner.
    pub(super) fn change(&self) -> RunnerChange {
        RunnerChange {
            description: self.description.clone(),
            paused: self.paused,
            // `--tag-list=` takes all of them away.
            tag_list: (!self.tag_list.is_empty()).then(|| self.tags()),
            run_untagged: self.run_untagged,
            locked: self.locked,
            access_level: self.access_level(),
            maximum_timeout: self.maximum_timeout,
            maintenance_note: self.maintenance_note.clone(),
        }
    }

    fn registration(&self, name: &str) -> Registration {
        let tags = self.tags();
        Registration {
            description: self.description.clone().unwrap_or_else(|| name.to_owned()),
            maintenance_note: self.maintenance_note.clone().unwrap_or_default(),
            // GitLab refuses a runner that could take no job at all.
            run_untagged: self.run_untagged.unwrap_or(tags.is_empty()),
            tags,
            locked: self.locked.unwrap_or(true),
            access_level: self.access_level().unwrap_or_default(),
            maximum_timeout: self.maximum_timeout.unwrap_or(0),
            paused: self.paused.unwrap_or(false),
        }
    }
}

/// What GitLab said of the runner.
pub(super) struct Known {
    pub(super) id: Option<i64>,
    pub(super) token: Secret,
    pub(super) expires_at: Option<jiff::Timestamp>,
    pub(super) obtained_at: Option<jiff::Timestamp>,
}

impl RegisterArgs {
    /// Registers.
    ///
    /// # Errors
    ///
    /// With exit code 2 for what contradicts itself, 5 when GitLab refuses, 7 for the configuration.
    pub async fn run(self, context: &Context) -> anyhow::Result<Exit> {
        let stdin = std::io::stdin();
        let piped = !stdin.is_terminal();
        let environment = std::env::var(TOKEN_VAR).ok();
        let token = self.token(environment, piped, || {
            if !piped {
                context.output.prompt("Token (it will be visible): ")?;
            }
            let mut line = String::new();
            stdin.lock().take(MAX_TOKEN_LEN).read_line(&mut line)?;
            Ok(line)
        })?;
        self.run_with(context, token).await
    }

    async fn run_with(self, context: &Context, token: Secret) -> anyhow::Result<Exit> {
        let name = self.local.name()?;
        let authentication = self.is_authentication(&token);
        let given = self.server.given();
        if authentication && !given.is_empty() {
            let what = format!("set {} with a runner's authentication token", given.join(", "));
            let hint = "these are settings of the runner in GitLab; change them there, or use \
                        --registration-token if this is one";
            return Err(Failure::new(Exit::Usage, what).hint(hint).into());
        }
        let url = self.url.as_deref().ok_or_else(|| {
            Failure::new(Exit::Usage, "register without --url")
                .hint("use --url https://gitlab.example.org")
        })?;
        let Place { mut file, backend, token_file, probe } =
            self.local.place(context, url, &name)?;
        file.make_dir()?;
        let known = self.ask_gitlab(context, &probe, authentication, &token, &name).await?;
        file.write_secret(&token_file, known.token.expose()).with_context(|| {
            format!("keep the token of the runner {} at GitLab", shown_id(known.id))
        })?;
        file.add_runner(self.local.table(&probe.url, &name, &backend, &known))?;
        let kept = format!(
            "its token is in {token_file}; put the [[runners]] table into the configuration by hand"
        );
        let written = file.check().and_then(|_config| file.write());
        written.with_context(|| format!("add {name:?} ({kept})"))?;

        let output = &context.output;
        output.note(&format!(
            "registered {name:?} (runner {} at {}) on the backend {:?}",
            shown_id(known.id),
            probe.url,
            backend.0
        ))?;
        output.note(&format!("configuration: {}", context.config_path))?;
        output.note(&format!("token: {token_file}"))?;
        Ok(Exit::Done)
    }

    /// Finds the token: the flags, the environment, standard input.
    fn token(
        &self,
        environment: Option<String>,
        piped: bool,
        stdin: impl FnOnce() -> anyhow::Result<String>,
    ) -> anyhow::Result<Secret> {
        let text = match (&self.token, &self.token_file, environment) {
            (Some(dash), _, _) if dash == "-" => stdin()?,
            (Some(token), _, _) => token.clone(),
            (None, Some(path), _) => {
                let mut text = String::new();
                std::fs::File::open(path)
                    .and_then(|file| file.take(MAX_TOKEN_LEN).read_to_string(&mut text))
                    .with_context(|| format!("read the token file {path}"))?;
                text
            }
            (None, None, Some(token)) if !token.is_empty() => token,
            (None, None, _) => stdin()?,
        };
        let token = text.trim();
        let is_word = !token.is_empty() && token.bytes().all(|byte| byte.is_ascii_graphic());
        if is_word {
            return Ok(Secret::new(token));
        }
        let what = if token.is_empty() { "find a token" } else { "use a token of several words" };
        let hint = if piped {
            "give it with --token-file, $BRIDGE_TOKEN or on standard input"
        } else {
            "give it with --token-file or $BRIDGE_TOKEN"
        };
        Err(Failure::new(Exit::Usage, what).hint(hint).into())
    }

    /// Tells the two kinds of token apart; an instance may put a prefix of its own before `glrt-`.
    fn is_authentication(&self, token: &Secret) -> bool {
        // Looked at because GitLab has a call for each kind and no call to ask which it is.
        let text = token.expose();
        let looks_like_it = text.contains("glrt-") || text.starts_with("glrtr-");
        (self.authentication_token || looks_like_it) && !self.registration_token
    }

    async fn ask_gitlab(
        &self,
        context: &Context,
        probe: &config::Runner,
        authentication: bool,
        token: &Secret,
        name: &str,
    ) -> anyhow::Result<Known> {
        let client = client(probe)?;
        let info = info(None);
        if authentication {
            let system_id = context.system_id()?;
            let reply = client
                .verify_runner(token, system_id.as_str(), &info)
                .await
                .with_context(|| format!("verify {name:?}"))?;
            let (id, expires_at) = verified(name, reply)?;
            return Ok(Known { id, token: token.clone(), expires_at, obtained_at: None });
        }
        let registration = self.server.registration(name);
        let reply = client
            .register_runner(token, &info, &registration)
            .await
            .with_context(|| format!("register {name:?}"))?;
        let (what, hint) = match reply {
            RegisterReply::Registered(Credentials { id, token, expires_at, obtained_at }) => {
                return Ok(Known { id, token, expires_at, obtained_at: Some(obtained_at) });
            }
            RegisterReply::Invalid { message } => (format!("GitLab refused: {message}"), None),
            RegisterReply::Refused { message } => (
                format!("GitLab refused the registration token: {message}"),
                Some("if it is a runner's own token, add --authentication-token"),
            ),
            RegisterReply::Disallowed => (
                "GitLab has registration tokens switched off".to_owned(),
                Some("create the runner in GitLab and use the glrt- token it shows"),
            ),
            RegisterReply::Unclear(unclear) => {
                let hint = match unclear {
                    Unclear::Busy { .. } => Some(
                        "try again later; look in GitLab first whether there is a runner already",
                    ),
                    Unclear::Unexpected { .. } => None,
                };
                (unclear.to_string(), hint)
            }
        };
        let failure = Failure::new(Exit::Gitlab, format!("register {name:?}: {what}"));
        Err(match hint {
            Some(hint) => failure.hint(hint),
            None => failure,
        }
        .into())
    }
}

/// Where a new runner goes, with everything found out that can be wrong without GitLab.
pub(super) struct Place {
    pub(super) file: ConfigFile,
    pub(super) backend: BackendName,
    pub(super) token_file: Utf8PathBuf,
    /// The runner as it will be, but for the token.
    pub(super) probe: config::Runner,
}

impl LocalArgs {
    /// Gives the runner's name.
    pub(super) fn name(&self) -> anyhow::Result<String> {
        match &self.name {
            Some(name) => Ok(name.clone()),
            None => machine_name().context("name the runner; use --name"),
        }
    }

    /// Looks at the configuration: whether it can take this runner, and how.
    pub(super) fn place(&self, context: &Context, url: &str, name: &str) -> anyhow::Result<Place> {
        let config = match config::load_incomplete(&context.config_path) {
            Ok(config) => Some(config),
            Err(error) if matches!(error.problem(), config::Problem::NoFile) => None,
            Err(error) => return Err(error).context("use the configuration"),
        };
        let mut file = ConfigFile::open(&context.config_path)?;
        check_name(config.as_ref(), name)?;
        let backend = self.backend(&mut file, config.as_ref(), context)?;
        let dir = context.config_path.parent().unwrap_or(Utf8Path::new("."));
        let token_file = dir.join(format!("{name}.token"));
        check_token_file(config.as_ref(), &token_file)?;
        let probe = self.probe(context, url, name, &backend)?;
        Ok(Place { file, backend, token_file, probe })
    }

    /// Finds the backend; in a file without any, `local` is added.
    fn backend(
        &self,
        file: &mut ConfigFile,
        config: Option<&Config>,
        context: &Context,
    ) -> anyhow::Result<BackendName> {
        let there: Vec<&BackendName> =
            config.map(|config| config.backends.keys().collect()).unwrap_or_default();
        let list = || there.iter().map(|name| name.0.as_str()).collect::<Vec<_>>().join(", ");
        let failure = |what: String, hint: String| {
            Err(Failure::new(Exit::Configuration, what).hint(hint).into())
        };
        match (&self.backend, there.as_slice()) {
            (None, [only]) => Ok((*only).clone()),
            (Some(name), there) if there.iter().any(|backend| backend.0 == *name) => {
                Ok(BackendName(name.clone()))
            }
            (Some(name), []) if name == "local" => {
                let dir = context.config_path.parent().unwrap_or(Utf8Path::new("/"));
                let state_dir = config.map_or_else(
                    || config::default_state_dir(dir),
                    |config| config.state_dir.clone(),
                );
                file.add_local_backend(&state_dir.join("local-jobs"))?;
                Ok(BackendName(name.clone()))
            }
            (None, []) => failure(
                "choose a backend: the configuration has none".to_owned(),
                format!(
                    "add [backends.NAME] with one of these kinds: {}; or use --backend local",
                    context.registry.kinds().collect::<Vec<_>>().join(", ")
                ),
            ),
            (None, [_, _, ..]) => failure(
                "choose a backend: there are several".to_owned(),
                format!("use --backend with one of: {}", list()),
            ),
            (Some(name), []) => failure(
                format!("find the backend {name:?}: the configuration has none"),
                format!("add [backends.{name}] with its kind to {}", context.config_path),
            ),
            (Some(name), [_, ..]) => {
                failure(format!("find the backend {name:?}"), format!("there are: {}", list()))
            }
        }
    }

    /// Makes the runner as it will be, to validate what the flags say and to talk to GitLab.
    ///
    /// It goes through the text that will be written, but for the token.
    fn probe(
        &self,
        context: &Context,
        url: &str,
        name: &str,
        backend: &BackendName,
    ) -> anyhow::Result<config::Runner> {
        let mut document = toml_edit::DocumentMut::new();
        let mut kind = Table::new();
        kind.insert("kind", value("probe"));
        let mut backends = Table::new();
        backends.insert(&backend.0, toml_edit::Item::Table(kind));
        document.insert("backends", toml_edit::Item::Table(backends));
        let mut table = self.local_table(url, name, backend);
        table.insert("token", value("probe"));
        let mut runners = toml_edit::ArrayOfTables::new();
        runners.push(table);
        document.insert("runners", toml_edit::Item::ArrayOfTables(runners));
        let config = config::check_text(&context.config_path, document.to_string(), 0o600);
        let config = config.map_err(|error| {
            let problem = crate::telemetry::Chain(error.problem()).to_string();
            Failure::new(Exit::Usage, format!("register {name:?}: {problem}"))
        })?;
        let name = RunnerName(name.to_owned());
        config.runner(&name).cloned().context("find the runner just made")
    }

    /// The keys that come from flags.
    fn local_table(&self, url: &str, name: &str, backend: &BackendName) -> Table {
        let mut table = Table::new();
        table.insert("name", value(name));
        table.insert("url", value(url));
        table.insert("backend", value(&backend.0));
        for (key, number) in [
            ("limit", self.limit),
            ("request_concurrency", self.request_concurrency),
            ("output_limit", self.output_limit),
        ] {
            if let Some(number) = number {
                table.insert(key, value(i64::from(number)));
            }
        }
        for (key, path) in [
            ("builds_dir", &self.builds_dir),
            ("cache_dir", &self.cache_dir),
            ("tls_ca_file", &self.tls_ca_file),
            ("tls_cert_file", &self.tls_cert_file),
            ("tls_key_file", &self.tls_key_file),
        ] {
            if let Some(path) = path {
                // On the command line, relative is to where one stands; in the file, to the file.
                let path = camino::absolute_utf8(path).unwrap_or_else(|_no_dir| path.clone());
                table.insert(key, value(path.as_str()));
            }
        }
        if !self.environment.is_empty() {
            table.insert("environment", value(self.environment.iter().collect::<Array>()));
        }
        table
    }

    /// The table as it goes into the file.
    pub(super) fn table(
        &self,
        url: &Url,
        name: &str,
        backend: &BackendName,
        known: &Known,
    ) -> Table {
        let mut table = self.local_table(url.as_str().trim_end_matches('/'), name, backend);
        table.insert("token_file", value(format!("{name}.token")));
        if let Some(id) = known.id {
            table.insert("id", value(id));
        }
        for (key, time) in
            [("token_obtained_at", known.obtained_at), ("token_expires_at", known.expires_at)]
        {
            let time = time.and_then(|time| time.to_string().parse::<toml_edit::Datetime>().ok());
            if let Some(time) = time {
                table.insert(key, value(time));
            }
        }
        table
    }
}

pub(super) fn shown_id(id: Option<i64>) -> String {
    id.map_or_else(|| "without a number".to_owned(), |id| format!("#{id}"))
}

/// Takes GitLab's yes, or says why it was none and what to do.
pub(super) fn verified(
    name: &str,
    reply: VerifyReply,
) -> Result<(Option<i64>, Option<jiff::Timestamp>), Failure> {
    let (what, hint) = match reply {
        VerifyReply::Valid { id, expires_at } => return Ok((id, expires_at)),
        VerifyReply::Refused => (
            "GitLab does not know the token".to_owned(),
            "look whether the runner was deleted or its token reset, and whether --url is right",
        ),
        VerifyReply::Orphaned => (
            "the runner's owner in GitLab is gone".to_owned(),
            "create a new runner in an existing project or group",
        ),
        VerifyReply::Unclear(unclear) => {
            let hint = match unclear {
                Unclear::Busy { .. } => "try again later",
                Unclear::Unexpected { .. } => "look whether --url is that of a GitLab",
            };
            (unclear.to_string(), hint)
        }
    };
    Err(Failure::new(Exit::Gitlab, format!("verify {name:?}: {what}")).hint(hint))
}

fn check_name(config: Option<&Config>, name: &str) -> anyhow::Result<()> {
    let there = config.and_then(|config| config.runner(&RunnerName(name.to_owned())));
    match there {
        None => Ok(()),
        Some(_runner) => {
            let what = format!("register {name:?}: a runner of this name is in the configuration");
            let hint = format!(
                "choose another --name, or remove it first with `bridge runners unregister {name}`"
            );
            Err(Failure::new(Exit::Usage, what).hint(hint).into())
        }
    }
}

fn check_token_file(config: Option<&Config>, path: &Utf8PathBuf) -> anyhow::Result<()> {
    let user = config.and_then(|config| {
        config.runners.iter().find(|runner| runner.token_file.as_ref() == Some(path))
    });
    match user {
        None => Ok(()),
        Some(runner) => {
            let what = format!("write {path}: it is the token file of {:?}", runner.name.0);
            Err(Failure::new(Exit::Usage, what).hint("choose another --name").into())
        }
    }
}

fn machine_name() -> anyhow::Result<String> {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").context("read the hostname")?;
    Ok(name.trim().to_owned())
}
