//! The backend's table in the configuration: read, checked, resolved once.

use std::num::NonZeroUsize;
use std::time::Duration;

use bridge_backend::OpenError;
use bridge_backend::settings::duration;
use camino::Utf8PathBuf;
use jiff::SignedDuration;
use serde::Deserialize;
use url::Url;

use crate::options::{Wishes, check_value, number, words};
use crate::trust::Authorities;

/// The columns of DIRAC's database.
const LONGEST_GROUP: usize = 32;

/// A workspace travels in parts of some 100 MB, each of them named in the job's description.
const LARGEST_WORKSPACE: u64 = 8 << 30;

/// The configuration, resolved.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    /// The server, with a slash at its end.
    pub(crate) url: Url,
    /// The server as workers reach it, without a slash at its end.
    pub(crate) worker_url: String,
    pub(crate) token_file: Utf8PathBuf,
    pub(crate) authorities: Option<Authorities>,
    pub(crate) vo: Option<String>,
    pub(crate) group: Option<String>,
    pub(crate) wishes: Wishes,
    pub(crate) job_group: String,
    pub(crate) job_type: String,
    pub(crate) settle: Duration,
    pub(crate) request_timeout: Duration,
    pub(crate) log_interval: Duration,
    pub(crate) cancel_interval: Duration,
    pub(crate) kill_grace: Duration,
    /// How long a worker tries to reach DiracX before it gives up.
    pub(crate) worker_patience: Duration,
    pub(crate) max_workspace: u64,
    pub(crate) max_concurrency: NonZeroUsize,
}

/// The table as written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    url: String,
    worker_url: Option<String>,
    token_file: Utf8PathBuf,
    tls_ca_file: Option<Utf8PathBuf>,
    vo: Option<String>,
    group: Option<String>,
    #[serde(default, deserialize_with = "words")]
    site: Vec<String>,
    #[serde(default, deserialize_with = "words")]
    banned_sites: Vec<String>,
    #[serde(default, deserialize_with = "words")]
    platform: Vec<String>,
    #[serde(default, deserialize_with = "words")]
    tags: Vec<String>,
    #[serde(default, deserialize_with = "number")]
    cpu_time: Option<u64>,
    #[serde(default, deserialize_with = "number")]
    processors: Option<u64>,
    #[serde(default, deserialize_with = "number")]
    priority: Option<u64>,
    job_group: Option<String>,
    job_type: Option<String>,
    settle: Option<SignedDuration>,
    request_timeout: Option<SignedDuration>,
    log_interval: Option<SignedDuration>,
    cancel_interval: Option<SignedDuration>,
    kill_grace: Option<SignedDuration>,
    worker_patience: Option<SignedDuration>,
    max_workspace: Option<u64>,
    max_concurrency: Option<NonZeroUsize>,
}

impl Config {
    /// Reads the backend's table.
    pub(crate) fn read(table: toml::Table) -> Result<Self, OpenError> {
        let written: Written = table.try_into()?;
        let url = url("url", &written.url)?;
        let worker_url = match &written.worker_url {
            Some(text) => self::url("worker_url", text)?,
            None => url.clone(),
        };
        if !written.token_file.is_absolute() {
            let path = &written.token_file;
            return Err(OpenError::Config(format!("token_file must be an absolute path: {path}")));
        }
        let wishes = Wishes {
            site: written.site,
            banned_sites: written.banned_sites,
            platform: written.platform,
            tags: written.tags,
            cpu_time: written.cpu_time,
            processors: written.processors,
            priority: written.priority,
        };
        wishes.check().map_err(OpenError::Config)?;
        let job_group = written.job_group.unwrap_or_else(|| "bridge".to_owned());
        let job_type = written.job_type.unwrap_or_else(|| "User".to_owned());
        for (key, value) in [
            ("job_group", Some(&job_group)),
            ("job_type", Some(&job_type)),
            ("vo", written.vo.as_ref()),
            ("group", written.group.as_ref()),
        ] {
            let Some(value) = value else { continue };
            check_value(key, value).map_err(OpenError::Config)?;
            if key.starts_with("job_") && value.len() > LONGEST_GROUP {
                let text = format!("`{key}` is longer than {LONGEST_GROUP} characters");
                return Err(OpenError::Config(text));
            }
        }
        let max_workspace = written.max_workspace.unwrap_or(2 << 30);
        if max_workspace > LARGEST_WORKSPACE {
            let text = format!("`max_workspace` must not be more than {LARGEST_WORKSPACE} bytes");
            return Err(OpenError::Config(text));
        }
        let duration = |key, written, seconds| duration(key, written, Duration::from_secs(seconds));
        Ok(Self {
            worker_url: worker_url.as_str().trim_end_matches('/').to_owned(),
            url,
            token_file: written.token_file,
            authorities: written.tls_ca_file.as_deref().map(Authorities::read).transpose()?,
            vo: written.vo,
            group: written.group,
            wishes,
            job_group,
            job_type,
            settle: duration("settle", written.settle, 10)?,
            request_timeout: duration("request_timeout", written.request_timeout, 60)?,
            log_interval: duration("log_interval", written.log_interval, 5)?,
            cancel_interval: duration("cancel_interval", written.cancel_interval, 15)?,
            kill_grace: duration("kill_grace", written.kill_grace, 60)?,
            worker_patience: duration("worker_patience", written.worker_patience, 1800)?,
            max_workspace,
            max_concurrency: written
                .max_concurrency
                .or(NonZeroUsize::new(4))
                .unwrap_or(NonZeroUsize::MIN),
        })
    }
}

/// Reads an address; a secret or a query has no place in it.
fn url(key: &str, text: &str) -> Result<Url, OpenError> {
    let wrong = |why: &str| OpenError::Config(format!("`{key}` {why}"));
    let mut url = Url::parse(text).map_err(|error| wrong(&format!("is no URL: {error}")))?;
    if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none() {
        return Err(wrong("must begin with https:// or http://"));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(wrong("must not have a user or a password"));
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err(wrong("must not have a query"));
    }
    if !url.path().ends_with('/') {
        let path = format!("{}/", url.path());
        url.set_path(&path);
    }
    Ok(url)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Config, OpenError> {
        Config::read(text.parse().unwrap())
    }

    #[test]
    fn the_smallest_table_has_all_defaults() {
        let config = read("url = 'https://dirac.example/x'\ntoken_file = '/t'").unwrap();
        assert_eq!(config.url.as_str(), "https://dirac.example/x/");
        assert_eq!(config.worker_url, "https://dirac.example/x");
        assert_eq!(config.job_group, "bridge");
        assert_eq!(config.kill_grace, Duration::from_secs(60));
    }

    #[test]
    fn wrong_tables_are_refused_by_name() {
        for (text, named) in [
            ("", "url"),
            ("url = 'ftp://x/'", "url"),
            ("url = 'https://u:p@x/'", "password"),
            ("url = 'https://x/?q=1'", "query"),
            ("url = 'x'", "url"),
            ("url = 'http://x'\ntoken_file = 'relative'", "token_file"),
            ("url = 'http://x'\ntoken_file = '/t'\nsite = 'a[b'", "site"),
            ("url = 'http://x'\ntoken_file = '/t'\ntls_ca_file = '/nowhere/ca'", "/nowhere/ca"),
            ("url = 'http://x'\ntoken_file = '/t'\ncpu_time = 3", "cpu_time"),
            ("url = 'http://x'\ntoken_file = '/t'\nsettle = '0s'", "settle"),
            ("url = 'http://x'\ntoken_file = '/t'\nvo = 'a;b'", "vo"),
            ("url = 'http://x'\ntoken_file = '/t'\nmax_workspace = 99999999999", "max_workspace"),
            ("url = 'http://x'\ntoken_file = '/t'\nworker_patience = '0s'", "worker_patience"),
            ("url = 'http://x'\ntoken_file = '/t'\nsiet = 'a'", "siet"),
        ] {
            let text = if text.starts_with("url") && !text.contains("token_file") {
                format!("{text}\ntoken_file = '/t'")
            } else {
                text.to_owned()
            };
            let error = match read(&text).unwrap_err() {
                OpenError::Toml(cause) => cause.to_string(),
                OpenError::Config(text) => text,
            };
            assert!(error.contains(named), "{text}: {error}");
        }
    }
}
