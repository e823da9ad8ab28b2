//! From what the file says to what it means: validation, defaults, absolute paths.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::ops::Range;
use std::time::Duration;

use camino::{Utf8Path, Utf8PathBuf};
use toml::Spanned;
use toml::de::DeTable;
use url::Url;

use super::error::{ConfigError, Problem};
use super::file::{DurationText, Environment, FileTable, RunnerTable, nearest, unknown_key};
use super::secret::{self, ConfigText};
use super::{
    BackendEntry, Config, DEFAULT_PORT, ImagePolicy, ListenAddress, LogFormat, Runner, SourcesPlace,
};
use crate::domain::id::{BackendName, RunnerName};
use crate::gitlab::wire::Secret;

// The defaults. gitlab-runner's where it has one, unless the reason says otherwise.

/// Not gitlab-runner's 1: a job in flight costs a row and a workspace here, and waits elsewhere.
const CONCURRENT: usize = 100;
const CHECK_INTERVAL: Duration = Duration::from_secs(3);
/// The steps at hand are single calls; whoever stops the daemon should not wait longer than this.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(30);
/// git and packing are child processes; four of each keep a small submit node responsive.
const WORKERS: usize = 4;
/// Long enough to answer "what happened last month".
const RETENTION: Duration = Duration::from_secs(30 * 24 * 3600);
/// As long as GitLab itself waits before it drops a silent job.
const LOST_AFTER: Duration = Duration::from_secs(30 * 60);
const REQUEST_CONCURRENCY: usize = 1;
const OUTPUT_LIMIT_KIB: u64 = 4096;
const UNHEALTHY_REQUESTS: u32 = 3;
const UNHEALTHY_INTERVAL: Duration = Duration::from_secs(60 * 60);
const FINAL_UPDATE_RETRIES: u32 = 10;
/// Enough for the rest of the trace and a few hundred megabytes of artifacts.
const DEADLINE_RESERVE: Duration = Duration::from_secs(60);
/// Longer than people are on holiday; a mirror costs disk, and its loss one full fetch.
const MIRRORS_KEEP: Duration = Duration::from_secs(30 * 24 * 3600);
/// Less than a scheduler needs to start a job at all; only a hopeless job should be turned away.
const MINIMUM_RUN_TIME: Duration = Duration::from_secs(10);

const LOG_LEVELS: [&str; 5] = ["trace", "debug", "info", "warn", "error"];

/// Whether a bare integer is a duration in seconds.
#[derive(Clone, Copy)]
pub(super) enum Bare {
    /// As in gitlab-runner's file; zero means the default there.
    Seconds,
    /// Keys of our own: 30 could be anything.
    Refused,
}

pub(super) fn resolve(source: &ConfigText) -> Result<Config, ConfigError> {
    let place = Place::new(source);
    let root = DeTable::parse(&source.text).map_err(|error| place.syntax(&error))?;
    if let Some(unknown) = unknown_key(root.get_ref()) {
        let (key, table, advice) = (unknown.key, unknown.table, unknown.advice);
        return Err(place.at(unknown.at, Problem::UnknownKey { key, table, advice }));
    }
    let file: FileTable = toml::from_str(&source.text).map_err(|error| place.syntax(&error))?;
    place.config(file)
}

/// Knows where the file is and where in it something stands.
pub(super) struct Place<'a> {
    pub(super) source: &'a ConfigText,
    dir: &'a Utf8Path,
}

impl<'a> Place<'a> {
    fn new(source: &'a ConfigText) -> Self {
        Self { source, dir: source.path.parent().unwrap_or(Utf8Path::new("/")) }
    }

    fn line(&self, at: usize) -> usize {
        1 + self.source.text.bytes().take(at).filter(|byte| *byte == b'\n').count()
    }

    pub(super) fn at(&self, at: usize, problem: Problem) -> ConfigError {
        ConfigError::at(&self.source.path, self.line(at), problem)
    }

    pub(super) fn value(
        &self,
        span: &Range<usize>,
        key: &'static str,
        why: impl Into<String>,
    ) -> ConfigError {
        self.at(span.start, Problem::Value { key, why: why.into() })
    }

    fn syntax(&self, error: &toml::de::Error) -> ConfigError {
        let problem = Problem::Syntax(error.message().to_owned());
        match error.span() {
            Some(span) => self.at(span.start, problem),
            None => ConfigError::whole(&self.source.path, problem),
        }
    }

    fn config(&self, file: FileTable) -> Result<Config, ConfigError> {
        let backends = self.backends(file.backends)?;
        let mut runners: Vec<Runner> = Vec::new();
        let mut lines: BTreeMap<RunnerName, usize> = BTreeMap::new();
        for table in file.runners {
            let line = self.line(table.span().start);
            let runner = self.runner(table, &backends)?;
            if let Some(first) = lines.insert(runner.name.clone(), line) {
                let problem = Problem::DuplicateRunner { name: runner.name.0, first };
                return Err(ConfigError::at(&self.source.path, line, problem));
            }
            runners.push(runner);
        }
        let state_dir = match file.state_dir {
            Some(text) => self.path("state_dir", &text)?,
            None => super::default_state_dir(self.dir),
        };
        let key_file = match file.key_file {
            Some(text) => self.path("key_file", &text)?,
            None => super::default_key_file(&self.source.path),
        };
        for runner in &runners {
            let builds_dir = runner.builds_dir.clone().unwrap_or_else(|| state_dir.join("builds"));
            if let Some(mirrors_dir) = &runner.mirrors_dir
                && (mirrors_dir.starts_with(&builds_dir) || builds_dir.starts_with(mirrors_dir))
            {
                let why = format!("must not share a tree with {builds_dir}, where jobs write");
                let problem = Problem::Value { key: "mirrors_dir", why };
                let line = lines.get(&runner.name).copied().unwrap_or(1);
                return Err(ConfigError::at(&self.source.path, line, problem));
            }
        }
        Ok(Config {
            path: self.source.path.clone(),
            state_dir,
            key_file,
            concurrent: self.at_least_one("concurrent", file.concurrent.as_ref(), CONCURRENT)?,
            check_interval: self
                .duration("check_interval", file.check_interval.as_ref(), Bare::Seconds)?
                .unwrap_or(CHECK_INTERVAL),
            log_level: file.log_level.map(|text| self.log_level(&text)).transpose()?,
            log_format: match file.log_format {
                Some(text) => self.log_format(&text)?,
                None => LogFormat::Auto,
            },
            listen_address: file.listen_address.map(|text| self.listen(&text)).transpose()?,
            shutdown_timeout: self
                .duration("shutdown_timeout", file.shutdown_timeout.as_ref(), Bare::Seconds)?
                .unwrap_or(SHUTDOWN_TIMEOUT),
            prepare_workers: self.at_least_one(
                "prepare_workers",
                file.prepare_workers.as_ref(),
                WORKERS,
            )?,
            finish_workers: self.at_least_one(
                "finish_workers",
                file.finish_workers.as_ref(),
                WORKERS,
            )?,
            retention: self
                .duration("retention", file.retention.as_ref(), Bare::Refused)?
                .unwrap_or(RETENTION),
            lost_after: self
                .duration("lost_after", file.lost_after.as_ref(), Bare::Refused)?
                .unwrap_or(LOST_AFTER),
            runners,
            backends,
        })
    }

    fn backends(
        &self,
        tables: BTreeMap<String, Spanned<toml::Table>>,
    ) -> Result<BTreeMap<BackendName, BackendEntry>, ConfigError> {
        let mut entries = BTreeMap::new();
        for (name, spanned) in tables {
            let span = spanned.span();
            let mut table = spanned.into_inner();
            if !is_name(&name) {
                return Err(self.value(&span, "backends", format!("{NAME_RULE}: {name:?}")));
            }
            let Some(toml::Value::String(kind)) = table.remove("kind") else {
                return Err(self.at(span.start, Problem::NoKind { name }));
            };
            let max_queued = match table.remove("max_queued") {
                None => None,
                Some(value) => match value.as_integer().map(usize::try_from) {
                    Some(Ok(number)) if number > 0 => Some(number),
                    _ => {
                        return Err(self.value(&span, "max_queued", "must be a number above 0"));
                    }
                },
            };
            let poll_interval = match table.remove("poll_interval") {
                None => None,
                Some(toml::Value::String(words)) => {
                    let text = Spanned::new(span.clone(), DurationText::Words(words));
                    self.duration("poll_interval", Some(&text), Bare::Refused)?
                }
                Some(_) => {
                    return Err(self.value(&span, "poll_interval", "must be a text as in \"5s\""));
                }
            };
            let job_options = match table.remove("job_options") {
                None => None,
                Some(value) => match value.try_into::<Vec<String>>() {
                    Ok(words) => Some(words),
                    Err(_) => {
                        let rule = "must be a list of texts as in [\"time\", \"mem\"]";
                        return Err(self.value(&span, "job_options", rule));
                    }
                },
            };
            let sources = match table.remove("sources").as_ref().map(toml::Value::as_str) {
                None | Some(Some("submit-node")) => SourcesPlace::SubmitNode,
                Some(Some("allocation")) => SourcesPlace::Allocation,
                Some(_) => {
                    let why = "must be \"submit-node\" or \"allocation\"";
                    return Err(self.value(&span, "sources", why));
                }
            };
            let entry =
                BackendEntry { kind, max_queued, poll_interval, job_options, sources, table };
            entries.insert(BackendName(name), entry);
        }
        Ok(entries)
    }

    fn runner(
        &self,
        table: Spanned<RunnerTable>,
        backends: &BTreeMap<BackendName, BackendEntry>,
    ) -> Result<Runner, ConfigError> {
        let header = table.span();
        let table = table.into_inner();
        let name = table.name.get_ref().clone();
        if !is_name(&name) {
            return Err(self.value(&table.name.span(), "name", format!("{NAME_RULE}: {name:?}")));
        }
        let backend = BackendName(table.backend.get_ref().clone());
        let Some(backend_kind) = backends.get(&backend).map(|entry| entry.kind.clone()) else {
            let known = backends.keys().map(|name| name.0.clone()).collect();
            let problem = Problem::UnknownBackend { runner: name, backend: backend.0, known };
            return Err(self.at(table.backend.span().start, problem));
        };
        let url = self.url("url", &table.url)?;
        let clone_url = table.clone_url.map(|text| self.url("clone_url", &text)).transpose()?;
        let (token, token_file) =
            self.token(&name, &header, table.token.as_ref(), table.token_file.as_ref())?;
        let path =
            |key, text: Option<Spanned<String>>| text.map(|text| self.path(key, &text)).transpose();
        let seconds = |key, text: Option<Spanned<DurationText>>| {
            self.duration(key, text.as_ref(), Bare::Seconds)
        };
        let words = |key, text: Option<Spanned<DurationText>>| {
            self.duration(key, text.as_ref(), Bare::Refused)
        };
        let shell = match table.shell {
            Some(shell) if !["bash", "sh"].contains(&shell.get_ref().as_str()) => {
                return Err(self.value(&shell.span(), "shell", "must be \"bash\" or \"sh\""));
            }
            shell => shell.map(Spanned::into_inner),
        };
        let image = match table.image.as_ref().map(|word| word.get_ref().as_str()) {
            None | Some("ignore") => ImagePolicy::Ignore,
            Some("refuse") => ImagePolicy::Refuse,
            Some(_) => {
                let span = table.image.map_or(header, |word| word.span());
                return Err(self.value(&span, "image", "must be \"ignore\" or \"refuse\""));
            }
        };
        Ok(Runner {
            name: RunnerName(name),
            url,
            token,
            token_file,
            id: table.id,
            token_expires_at: table.token_expires_at.map(|time| time.to_string()),
            // As gitlab-runner.
            token_rotation: table.token_rotation.unwrap_or(true),
            backend,
            backend_kind,
            limit: table.limit.unwrap_or(0),
            request_concurrency: above_zero(table.request_concurrency, REQUEST_CONCURRENCY),
            strict_check_interval: table.strict_check_interval.unwrap_or(false),
            builds_dir: path("builds_dir", table.builds_dir)?,
            cache_dir: path("cache_dir", table.cache_dir)?,
            cache: table.cache.map(|table| self.cache(table)).transpose()?.unwrap_or_default(),
            custom_build_dir: table
                .custom_build_dir
                .and_then(|table| table.enabled)
                .unwrap_or(false),
            mirrors_dir: path("mirrors_dir", table.mirrors_dir)?,
            mirrors_keep: words("mirrors_keep", table.mirrors_keep)?.unwrap_or(MIRRORS_KEEP),
            environment: self.environment(table.environment)?,
            output_limit: above_zero(table.output_limit, OUTPUT_LIMIT_KIB).saturating_mul(1024),
            tls_ca_file: path("tls_ca_file", table.tls_ca_file)?,
            tls_cert_file: path("tls_cert_file", table.tls_cert_file)?,
            tls_key_file: path("tls_key_file", table.tls_key_file)?,
            shell,
            // gitlab-runner's shell executor reads it too, and sites set up their modules there.
            login_shell: table.login_shell.unwrap_or(true),
            image,
            clone_url,
            pre_get_sources_script: table.pre_get_sources_script,
            post_get_sources_script: table.post_get_sources_script,
            pre_build_script: table.pre_build_script,
            post_build_script: table.post_build_script,
            prepare_timeout: seconds("prepare_timeout", table.prepare_timeout)?,
            get_sources_timeout: seconds("get_sources_timeout", table.get_sources_timeout)?,
            unhealthy_requests_limit: above_zero(
                table.unhealthy_requests_limit,
                UNHEALTHY_REQUESTS,
            ),
            unhealthy_interval: seconds("unhealthy_interval", table.unhealthy_interval)?
                .unwrap_or(UNHEALTHY_INTERVAL),
            job_status_final_update_retry_limit: above_zero(
                table.job_status_final_update_retry_limit,
                FINAL_UPDATE_RETRIES,
            ),
            feature_flags: table.feature_flags.unwrap_or_default(),
            debug_trace_disabled: table.debug_trace_disabled.unwrap_or(false),
            deadline_reserve: words("deadline_reserve", table.deadline_reserve)?
                .unwrap_or(DEADLINE_RESERVE),
            minimum_run_time: words("minimum_run_time", table.minimum_run_time)?
                .unwrap_or(MINIMUM_RUN_TIME),
        })
    }

    fn token(
        &self,
        runner: &str,
        header: &Range<usize>,
        inline: Option<&Spanned<Secret>>,
        file: Option<&Spanned<String>>,
    ) -> Result<(Secret, Option<Utf8PathBuf>), ConfigError> {
        match (inline, file) {
            (None, None) => {
                Err(self.at(header.start, Problem::NoToken { runner: runner.to_owned() }))
            }
            (Some(_), Some(file)) => {
                let problem = Problem::TwoTokens { runner: runner.to_owned() };
                Err(self.at(file.span().start, problem))
            }
            (Some(token), None) => {
                let (path, mode) = (&self.source.path, self.source.mode);
                if secret::readable_by_others(mode) {
                    let problem = Problem::InlineToken { path: path.clone(), mode };
                    return Err(self.at(token.span().start, problem));
                }
                // Inspected to be refused early: what is no word cannot be a header's value.
                if !secret::is_token(token.get_ref().expose()) {
                    return Err(self.value(&token.span(), "token", "must be one word"));
                }
                Ok((token.get_ref().clone(), None))
            }
            (None, Some(text)) => {
                let path = self.path("token_file", text)?;
                let token =
                    secret::read_token(&path).map_err(|error| self.at(text.span().start, error))?;
                Ok((token, Some(path)))
            }
        }
    }

    /// Resolves a path against the directory of the file.
    pub(super) fn path(
        &self,
        key: &'static str,
        text: &Spanned<String>,
    ) -> Result<Utf8PathBuf, ConfigError> {
        let written = text.get_ref();
        let why = if written.is_empty() {
            "is empty"
        } else if written.starts_with('~') {
            "starts with ~, which is not expanded; write the whole path"
        } else if written.contains('$') {
            "holds a $, which is not expanded; write the whole path"
        } else if written.contains('\0') || written.contains('\n') {
            "holds a control character"
        } else {
            // `join` keeps an absolute path as it is; components() drops "." and doubled slashes.
            return Ok(self.dir.join(written).components().collect());
        };
        Err(self.value(&text.span(), key, why))
    }

    fn url(&self, key: &'static str, text: &Spanned<String>) -> Result<Url, ConfigError> {
        let fail = |why: String| Err(self.value(&text.span(), key, why));
        let url = match Url::parse(text.get_ref()) {
            Ok(url) => url,
            Err(error) => return fail(format!("is no URL: {error}")),
        };
        if !["http", "https"].contains(&url.scheme()) {
            return fail(format!("must start with http:// or https://, not {}:", url.scheme()));
        }
        if !url.username().is_empty() || url.password().is_some() {
            return fail("must not hold a user name or password".to_owned());
        }
        if url.query().is_some() || url.fragment().is_some() {
            return fail("must not hold a query or fragment".to_owned());
        }
        Ok(url)
    }

    /// Reads a duration; `None` where it is absent, or zero in the manner of gitlab-runner.
    pub(super) fn duration(
        &self,
        key: &'static str,
        text: Option<&Spanned<DurationText>>,
        bare: Bare,
    ) -> Result<Option<Duration>, ConfigError> {
        let Some(text) = text else { return Ok(None) };
        let at = text.span();
        match (text.get_ref(), bare) {
            (DurationText::Number(number), Bare::Seconds) => match u64::try_from(*number) {
                Ok(0) => Ok(None),
                Ok(seconds) => Ok(Some(Duration::from_secs(seconds))),
                Err(_negative) => Err(self.value(&at, key, "must not be negative")),
            },
            (DurationText::Number(number), Bare::Refused) => {
                let why = format!("needs a unit, as in \"{number} days\" or \"{number}m\"");
                Err(self.value(&at, key, why))
            }
            (DurationText::Words(words), Bare::Seconds | Bare::Refused) => {
                match super::duration_in_words(words) {
                    Ok(Duration::ZERO) => Err(self.value(&at, key, "must be longer than nothing")),
                    Ok(duration) => Ok(Some(duration)),
                    Err(source) => {
                        let (text, source) = (words.clone(), Some(source));
                        Err(self.at(at.start, Problem::Duration { key, text, source }))
                    }
                }
            }
        }
    }

    fn at_least_one(
        &self,
        key: &'static str,
        number: Option<&Spanned<usize>>,
        default: usize,
    ) -> Result<usize, ConfigError> {
        match number {
            None => Ok(default),
            Some(number) if *number.get_ref() == 0 => {
                Err(self.value(&number.span(), key, "must be at least 1"))
            }
            Some(number) => Ok(*number.get_ref()),
        }
    }

    fn log_level(&self, text: &Spanned<String>) -> Result<String, ConfigError> {
        let word = match text.get_ref().as_str() {
            "warning" => "warn",
            "fatal" | "panic" => "error",
            word => word,
        };
        if LOG_LEVELS.contains(&word) {
            return Ok(word.to_owned());
        }
        let guess = match nearest(word, LOG_LEVELS.into_iter()) {
            Some(guess) => format!("; did you mean {guess:?}?"),
            None => String::new(),
        };
        let why = format!("must be one of {}, not {word:?}{guess}", LOG_LEVELS.join(", "));
        Err(self.value(&text.span(), "log_level", why))
    }

    fn log_format(&self, text: &Spanned<String>) -> Result<LogFormat, ConfigError> {
        match text.get_ref().as_str() {
            "text" | "runner" => Ok(LogFormat::Text),
            "json" => Ok(LogFormat::Json),
            word => {
                let why = format!("must be \"text\" or \"json\", not {word:?}");
                Err(self.value(&text.span(), "log_format", why))
            }
        }
    }

    /// Reads `listen_address`: `HOST[:PORT]` on loopback, or the path of a Unix socket.
    fn listen(&self, text: &Spanned<String>) -> Result<ListenAddress, ConfigError> {
        let written = text.get_ref().as_str();
        let unix = written.strip_prefix("unix://").or_else(|| written.strip_prefix("unix:"));
        let unix = unix.or_else(|| written.contains('/').then_some(written));
        if let Some(path) = unix {
            let path = Spanned::new(text.span(), path.to_owned());
            return Ok(ListenAddress::Unix(self.path("listen_address", &path)?));
        }
        let Some(address) = parse_address(written) else {
            let why = format!("is neither HOST:PORT nor the path of a socket: {written:?}");
            return Err(self.value(&text.span(), "listen_address", why));
        };
        if !address.ip().is_loopback() {
            let why = format!(
                "must be a loopback address or the path of a Unix socket, since anybody could \
                 read {address} (write \"127.0.0.1:{}\")",
                address.port()
            );
            return Err(self.value(&text.span(), "listen_address", why));
        }
        Ok(ListenAddress::Tcp(address))
    }

    fn environment(
        &self,
        list: Option<Spanned<Environment>>,
    ) -> Result<Vec<(String, String)>, ConfigError> {
        let Some(list) = list else { return Ok(Vec::new()) };
        let span = list.span();
        let mut variables = Vec::new();
        for (index, entry) in list.into_inner().0.into_iter().enumerate() {
            // The entry is not quoted: its value may be a secret.
            let nth = index + 1;
            let Some((name, value)) = entry.split_once('=') else {
                let why = format!("entry {nth} is not \"NAME=value\"");
                return Err(self.value(&span, "environment", why));
            };
            if !is_variable(name) || value.contains('\0') {
                let why = format!("entry {nth} has no valid name (letters, digits, _)");
                return Err(self.value(&span, "environment", why));
            }
            variables.push((name.to_owned(), value.to_owned()));
        }
        Ok(variables)
    }
}

const NAME_RULE: &str = "must be 1 to 64 characters, none of them '/' or a control character, \
                         and not start with '.' or '-'";

/// Says whether a text can name a runner or a backend: it becomes a file name and a column.
pub(super) fn is_name(text: &str) -> bool {
    (1..=64).contains(&text.chars().count())
        && !text.starts_with(['.', '-'])
        && text.trim() == text
        && !text.chars().any(|c| c == '/' || c.is_control())
}

fn is_variable(name: &str) -> bool {
    !name.is_empty()
        && !name.starts_with(|c: char| c.is_ascii_digit())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
}

/// Reads zero as "the default", as gitlab-runner does.
fn above_zero<N: Default + PartialEq>(number: Option<N>, default: N) -> N {
    number.filter(|number| *number != N::default()).unwrap_or(default)
}

fn parse_address(text: &str) -> Option<SocketAddr> {
    if let Ok(address) = text.parse() {
        return Some(address);
    }
    let bare = text.trim_start_matches('[').trim_end_matches(']');
    if let Ok(ip) = bare.parse::<IpAddr>() {
        return Some(SocketAddr::new(ip, DEFAULT_PORT));
    }
    let (host, port) = text.rsplit_once(':').unwrap_or((text, ""));
    let port = if port.is_empty() { DEFAULT_PORT } else { port.parse().ok()? };
    match host {
        "localhost" => Some(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port)),
        // gitlab-runner's ":9252": every address of this machine.
        "" => Some(SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), port)),
        _ => None,
    }
}
