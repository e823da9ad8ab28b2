//! The backend's configuration table and its per-job words.

use std::time::Duration;

use bridge_backend::OpenError;
use camino::Utf8PathBuf;
use jiff::SignedDuration;
use serde::Deserialize;

/// The configuration table, as written.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    jobs_dir: Utf8PathBuf,
    #[serde(default)]
    kill_grace: Option<SignedDuration>,
    #[serde(default)]
    cgroup: CgroupUse,
}

/// Whether jobs get a control group each.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub(crate) enum CgroupUse {
    /// Where the service may make them.
    #[default]
    Auto,
    /// Never.
    Off,
}

/// The configuration, checked.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    /// Holds one directory per job; private, on this machine.
    pub(crate) jobs_dir: Utf8PathBuf,
    /// The time between TERM and KILL.
    pub(crate) kill_grace: Duration,
    /// Whether jobs get a control group each.
    pub(crate) cgroup: CgroupUse,
}

impl Config {
    /// As long as Slurm's default `KillWait`, so that a script sees the same on either.
    const KILL_GRACE: Duration = Duration::from_secs(30);

    /// Reads and checks the table.
    pub(crate) fn parse(table: toml::Table) -> Result<Self, OpenError> {
        let table: Table = table.try_into()?;
        if !table.jobs_dir.is_absolute() {
            return Err(OpenError::Config(format!(
                "jobs_dir must be an absolute path, not {:?}",
                table.jobs_dir.as_str()
            )));
        }
        let kill_grace = match table.kill_grace {
            None => Self::KILL_GRACE,
            Some(grace) => Duration::try_from(grace).map_err(|error| {
                OpenError::Config(format!("kill_grace must not be negative: {error}"))
            })?,
        };
        Ok(Self { jobs_dir: table.jobs_dir, kill_grace, cgroup: table.cgroup })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, String> {
        Config::parse(text.parse().unwrap()).map_err(|error| match error {
            OpenError::Config(text) => text,
            OpenError::Toml(error) => error.message().to_owned(),
        })
    }

    #[test]
    fn the_table_has_defaults() {
        let config = parse("jobs_dir = '/var/lib/jobs'").unwrap();
        assert_eq!(config.kill_grace, Duration::from_secs(30));
        assert_eq!(config.cgroup, CgroupUse::Auto);
    }

    #[test]
    fn durations_are_words() {
        let config = parse("jobs_dir = '/j'\nkill_grace = '1m 30s'\ncgroup = 'off'").unwrap();
        assert_eq!(config.kill_grace, Duration::from_secs(90));
        assert_eq!(config.cgroup, CgroupUse::Off);
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        for (table, named) in [
            ("", "jobs_dir"),
            ("jobs_dir = 'jobs'", "absolute"),
            ("jobs_dir = '/j'\njob_dir = '/k'", "job_dir"),
            ("jobs_dir = '/j'\nkill_grace = '-3s'", "negative"),
            ("jobs_dir = '/j'\nkill_grace = 'soon'", "duration"),
            ("jobs_dir = '/j'\ncgroup = 'on'", "on"),
        ] {
            let message = parse(table).unwrap_err();
            assert!(message.contains(named), "{table:?} gives {message:?}");
        }
    }
}
