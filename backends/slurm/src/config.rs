//! The backend's table in the configuration: read, checked, resolved once.

use std::num::NonZeroUsize;
use std::time::Duration;

use bridge_backend::OpenError;
use bridge_backend::settings::duration;
use camino::Utf8PathBuf;
use jiff::SignedDuration;
use serde::Deserialize;

use crate::options::{Wishes, check_value};

/// `sbatch` itself retries for up to two minutes when the controller is full.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(150);

/// A client waits `MessageTimeout` (10 s by default, up to 100 s at large sites) for a silent
/// controller; an answer that takes longer than this is not worth a sweep's time.
const QUERY_TIMEOUT: Duration = Duration::from_secs(60);

/// A frozen controller answers `squeue` and takes the delayed submission seconds apart; accounting
/// lists a queued job up to 5 s late.
const SETTLE: Duration = Duration::from_secs(30);

/// What one `sbatch` after the other reaches is 130 jobs a second; four at once 215.
const MAX_CONCURRENCY: usize = 4;

/// The configuration, resolved.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    /// Where the jobs' directories lie.
    pub(crate) jobs_dir: Utf8PathBuf,
    /// What every job asks for unless it says otherwise.
    pub(crate) wishes: Wishes,
    /// More words for `sbatch`.
    pub(crate) sbatch_args: Vec<String>,
    /// Where the programs are; `None` searches `PATH`.
    pub(crate) bin_dir: Option<Utf8PathBuf>,
    /// The value of `SLURM_CONF`.
    pub(crate) slurm_conf: Option<Utf8PathBuf>,
    /// How long a submission may take.
    pub(crate) command_timeout: Duration,
    /// How long a question may take.
    pub(crate) query_timeout: Duration,
    /// Whether `sacct` can be asked.
    pub(crate) accounting: Accounting,
    /// How long a job may be invisible.
    pub(crate) settle: Duration,
    /// Calls at once.
    pub(crate) max_concurrency: NonZeroUsize,
}

/// Whether `sacct` can be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Deserialize)]
#[serde(try_from = "toml::Value")]
pub(crate) enum Accounting {
    /// Ask; "accounting storage is disabled" is an answer.
    #[default]
    Auto,
    /// It must be there.
    On,
    /// Never ask.
    Off,
}

impl TryFrom<toml::Value> for Accounting {
    type Error = String;
    fn try_from(value: toml::Value) -> Result<Self, String> {
        if value.as_str() == Some("auto") {
            return Ok(Self::Auto);
        }
        match value.as_bool() {
            Some(true) => Ok(Self::On),
            Some(false) => Ok(Self::Off),
            None => Err(format!("accounting must be \"auto\", true or false, not {value}")),
        }
    }
}

/// The table as written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    jobs_dir: Utf8PathBuf,
    partition: Option<String>,
    account: Option<String>,
    qos: Option<String>,
    constraint: Option<String>,
    reservation: Option<String>,
    #[serde(default)]
    sbatch_args: Vec<String>,
    bin_dir: Option<Utf8PathBuf>,
    slurm_conf: Option<Utf8PathBuf>,
    command_timeout: Option<SignedDuration>,
    query_timeout: Option<SignedDuration>,
    #[serde(default)]
    accounting: Accounting,
    settle: Option<SignedDuration>,
    max_concurrency: Option<NonZeroUsize>,
}

impl Config {
    /// Reads the backend's table.
    pub(crate) fn read(table: toml::Table) -> Result<Self, OpenError> {
        let written: Written = table.try_into()?;
        path("jobs_dir", Some(&written.jobs_dir))?;
        // Slurm replaces %j and the like in --output, and a backslash changes how.
        if written.jobs_dir.as_str().contains(['%', '\\']) {
            return Err(OpenError::Config(format!(
                "jobs_dir must not contain '%' or '\\': {}",
                written.jobs_dir
            )));
        }
        path("bin_dir", written.bin_dir.as_ref())?;
        path("slurm_conf", written.slurm_conf.as_ref())?;
        let wishes = Wishes {
            partition: written.partition,
            account: written.account,
            qos: written.qos,
            constraint: written.constraint,
            reservation: written.reservation,
            ..Wishes::default()
        };
        for (key, value) in wishes.words() {
            check_value(key, value).map_err(OpenError::Config)?;
        }
        for word in &written.sbatch_args {
            check_argument(word).map_err(OpenError::Config)?;
        }
        Ok(Self {
            jobs_dir: written.jobs_dir,
            wishes,
            sbatch_args: written.sbatch_args,
            bin_dir: written.bin_dir,
            slurm_conf: written.slurm_conf,
            command_timeout: duration("command_timeout", written.command_timeout, COMMAND_TIMEOUT)?,
            query_timeout: duration("query_timeout", written.query_timeout, QUERY_TIMEOUT)?,
            accounting: written.accounting,
            settle: duration("settle", written.settle, SETTLE)?,
            max_concurrency: written
                .max_concurrency
                .or(NonZeroUsize::new(MAX_CONCURRENCY))
                .unwrap_or(NonZeroUsize::MIN),
        })
    }
}

fn path(key: &str, path: Option<&Utf8PathBuf>) -> Result<(), OpenError> {
    let Some(path) = path else { return Ok(()) };
    if !path.is_absolute() {
        return Err(OpenError::Config(format!("{key} must be an absolute path: {path}")));
    }
    if path.as_str().contains(char::is_control) {
        return Err(OpenError::Config(format!("{key} must not contain control characters")));
    }
    Ok(())
}

/// Options of `sbatch` that bridge sets itself, or that would break what it promises.
const OURS: &[&str] = &[
    "array",
    "batch",
    "begin",
    "chdir",
    "clusters",
    "comment",
    "dependency",
    "error",
    "export",
    "export-file",
    "get-user-env",
    "gid",
    "help",
    "hold",
    "input",
    "job-name",
    "no-requeue",
    "open-mode",
    "output",
    "parsable",
    "quiet",
    "requeue",
    "signal",
    "test-only",
    "time",
    "uid",
    "usage",
    "verbose",
    "version",
    "wait",
    "wrap",
];

/// Options that have a key of their own.
const KEYS: &[&str] = &["account", "constraint", "partition", "qos", "reservation"];

/// Checks one word of `sbatch_args`.
///
/// Only `--name` and `--name=value`: a value in a word of its own could not be told from a script's
/// name, after which `sbatch` reads no options at all. `sbatch` accepts every unambiguous beginning of
/// a long option, so beginnings of ours are refused too.
fn check_argument(word: &str) -> Result<(), String> {
    if word.contains(char::is_control) {
        return Err(format!("sbatch_args: {word:?} contains control characters"));
    }
    let Some(option) = word.strip_prefix("--") else {
        return Err(format!("sbatch_args: write {word:?} as one word, --option or --option=value"));
    };
    let name = option.split_once('=').map_or(option, |(name, _)| name);
    if name.is_empty() || !name.bytes().all(|b| b.is_ascii_lowercase() || b"-_".contains(&b)) {
        return Err(format!("sbatch_args: {word:?} is not an option"));
    }
    if let Some(key) = KEYS.iter().find(|key| key.starts_with(name)) {
        return Err(format!("sbatch_args: use the key `{key}` instead of {word:?}"));
    }
    if let Some(ours) = OURS.iter().find(|ours| ours.starts_with(name)) {
        return Err(format!("sbatch_args: {word:?} is not allowed, bridge decides about --{ours}"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Config, OpenError> {
        Config::read(text.parse().unwrap())
    }

    #[test]
    fn the_smallest_table_has_all_defaults() {
        let config = read("jobs_dir = '/scratch/ci'").unwrap();
        assert_eq!(config.settle, Duration::from_secs(30));
        assert_eq!(config.command_timeout, Duration::from_secs(150));
        assert_eq!(config.accounting, Accounting::Auto);
        assert_eq!(config.max_concurrency.get(), 4);
    }

    #[test]
    fn everything_can_be_said() {
        let config = read(
            "jobs_dir = '/s'\npartition = 'ci,long'\naccount = 'a'\nqos = 'q'\nconstraint = 'a&b'\n\
             reservation = 'r'\nsbatch_args = ['--exclusive', '--mem=4G']\nbin_dir = '/opt/bin'\n\
             slurm_conf = '/etc/slurm.conf'\ncommand_timeout = '2m'\nquery_timeout = '5 s'\n\
             accounting = false\nsettle = '1m 30s'\nmax_concurrency = 8",
        )
        .unwrap();
        assert_eq!(config.settle, Duration::from_secs(90));
        assert_eq!(config.query_timeout, Duration::from_secs(5));
        assert_eq!(config.accounting, Accounting::Off);
        assert_eq!(config.wishes.partition.as_deref(), Some("ci,long"));
    }

    #[test]
    fn wrong_tables_are_refused_by_name() {
        for (text, named) in [
            ("", "jobs_dir"),
            ("jobs_dir = 'relative'", "jobs_dir"),
            ("jobs_dir = '/a%j'", "jobs_dir"),
            ("jobs_dir = '/a'\npartion = 'x'", "partion"),
            ("jobs_dir = '/a'\npartition = ''", "partition"),
            ("jobs_dir = '/a'\nqos = \"a\\nb\"", "qos"),
            ("jobs_dir = '/a'\naccounting = 'perhaps'", "accounting"),
            ("jobs_dir = '/a'\nsettle = '-1s'", "settle"),
            ("jobs_dir = '/a'\nsettle = '0s'", "settle"),
            ("jobs_dir = '/a'\nmax_concurrency = 0", "max_concurrency"),
        ] {
            let error = read(text).unwrap_err();
            let text = match &error {
                OpenError::Toml(cause) => cause.to_string(),
                OpenError::Config(text) => text.clone(),
            };
            assert!(text.contains(named), "{text}");
        }
    }

    #[test]
    fn dangerous_words_for_sbatch_are_refused() {
        for word in [
            "--wrap=id",
            "--wra=id",
            "--export=NONE",
            "--exp=NONE",
            "--job-name=x",
            "--output=/x",
            "--array=1-2",
            "--requeue",
            "--req",
            "--parsable",
            "--partition=x",
            "--part=x",
            "-p",
            "-Jx",
            "script.sh",
            "",
            "--",
            "--=x",
            "--mem=4G\n--wrap=id",
        ] {
            assert!(check_argument(word).is_err(), "{word}");
        }
        for word in ["--exclusive", "--mem=4G", "--gres=gpu:1", "--wait-all-nodes=1", "--nice"] {
            assert_eq!(check_argument(word), Ok(()), "{word}");
        }
    }
}
