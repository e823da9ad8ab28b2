//! What a job may ask of Slurm, and how it is put into words for `sbatch`.

use std::fmt;
use std::time::Duration;

use serde::Deserialize;
use serde::de::{Error as _, Visitor};

/// Longer values are mistakes; Slurm's own limit for a name is 1024.
const LONGEST_VALUE: usize = 1024;

/// What a job asks for; a table of a job's options has the same keys.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Wishes {
    #[serde(deserialize_with = "word")]
    pub(crate) partition: Option<String>,
    #[serde(deserialize_with = "word")]
    pub(crate) account: Option<String>,
    #[serde(deserialize_with = "word")]
    pub(crate) qos: Option<String>,
    #[serde(deserialize_with = "word")]
    pub(crate) constraint: Option<String>,
    #[serde(deserialize_with = "word")]
    pub(crate) reservation: Option<String>,
    #[serde(deserialize_with = "word")]
    pub(crate) nodes: Option<String>,
    #[serde(deserialize_with = "word")]
    pub(crate) ntasks: Option<String>,
    #[serde(deserialize_with = "word")]
    pub(crate) cpus_per_task: Option<String>,
    #[serde(deserialize_with = "word")]
    pub(crate) mem: Option<String>,
    #[serde(deserialize_with = "word")]
    pub(crate) gres: Option<String>,
    #[serde(deserialize_with = "word")]
    pub(crate) time: Option<String>,
}

impl Wishes {
    /// Reads and checks a job's options; the error is for the job's author.
    pub(crate) fn of_job(options: &toml::Table) -> Result<Self, String> {
        let wishes: Self =
            toml::Value::Table(options.clone()).try_into().map_err(|error: toml::de::Error| {
                // The message alone: there is no source text that a line number could refer to.
                error.message().to_owned()
            })?;
        for (key, value) in wishes.words() {
            check_value(key, value)?;
        }
        for (key, value) in [("ntasks", &wishes.ntasks), ("cpus_per_task", &wishes.cpus_per_task)] {
            let Some(value) = value else { continue };
            if !value.parse::<u32>().is_ok_and(|n| n > 0) {
                return Err(format!("`{key}` must be a number above 0, not {value:?}"));
            }
        }
        if let Some(time) = &wishes.time {
            minutes(time)?;
        }
        Ok(wishes)
    }

    /// Gives what is asked for, by key. `time` is not among them: see [`Wishes::arguments`].
    pub(crate) fn words(&self) -> impl Iterator<Item = (&'static str, &str)> {
        [
            ("partition", &self.partition),
            ("account", &self.account),
            ("qos", &self.qos),
            ("constraint", &self.constraint),
            ("reservation", &self.reservation),
            ("nodes", &self.nodes),
            ("ntasks", &self.ntasks),
            ("cpus_per_task", &self.cpus_per_task),
            ("mem", &self.mem),
            ("gres", &self.gres),
        ]
        .into_iter()
        .filter_map(|(key, value)| Some((key, value.as_deref()?)))
    }

    /// Says whether a key is set.
    pub(crate) fn has(&self, key: &str) -> bool {
        (key == "time" && self.time.is_some()) || self.words().any(|(k, _)| k == key)
    }

    /// Puts these wishes on top of the site's.
    pub(crate) fn over(self, site: &Self) -> Self {
        let site = site.clone();
        Self {
            partition: self.partition.or(site.partition),
            account: self.account.or(site.account),
            qos: self.qos.or(site.qos),
            constraint: self.constraint.or(site.constraint),
            reservation: self.reservation.or(site.reservation),
            nodes: self.nodes.or(site.nodes),
            ntasks: self.ntasks.or(site.ntasks),
            cpus_per_task: self.cpus_per_task.or(site.cpus_per_task),
            mem: self.mem.or(site.mem),
            gres: self.gres.or(site.gres),
            time: self.time.or(site.time),
        }
    }

    /// Gives the words for `sbatch`; the shorter one of the job's own time and `limit` counts.
    ///
    /// Every value is in one word with its option, so that none can become an option.
    pub(crate) fn arguments(&self, limit: Option<Duration>) -> Vec<String> {
        let mut words: Vec<String> = self
            .words()
            .map(|(key, value)| format!("--{}={value}", key.replace('_', "-")))
            .collect();
        // Slurm counts whole minutes; rounding down would end a job before its time.
        let asked = limit.map(|limit| limit.as_secs().div_ceil(60).max(1));
        let own = self.time.as_deref().and_then(|time| minutes(time).ok());
        if let Some(least) = asked.into_iter().chain(own).min() {
            words.push(format!("--time={least}"));
        }
        words
    }
}

/// Checks a value that goes into one word of an argument list.
pub(crate) fn check_value(key: &str, value: &str) -> Result<(), String> {
    if value.trim().is_empty() {
        return Err(format!("`{key}` must not be empty"));
    }
    if value.len() > LONGEST_VALUE {
        return Err(format!("`{key}` is longer than {LONGEST_VALUE} bytes"));
    }
    if value.contains(char::is_control) {
        return Err(format!("`{key}` must not contain control characters"));
    }
    Ok(())
}

/// Reads Slurm's notation for a time limit, rounded up to minutes.
fn minutes(text: &str) -> Result<u64, String> {
    let wrong = || {
        format!(
            "`time` must be minutes, minutes:seconds, hours:minutes:seconds, days-hours, \
             days-hours:minutes or days-hours:minutes:seconds, not {text:?}"
        )
    };
    let number = |part: &str| {
        let digits =
            !part.is_empty() && part.len() <= 9 && part.bytes().all(|b| b.is_ascii_digit());
        if digits { part.parse::<u64>().map_err(|_bad| wrong()) } else { Err(wrong()) }
    };
    let (days, clock) = match text.split_once('-') {
        Some((days, clock)) => (Some(number(days)?), clock),
        None => (None, text),
    };
    let parts = clock.split(':').map(number).collect::<Result<Vec<u64>, String>>()?;
    let seconds = match (days, parts.as_slice()) {
        (None, [m]) => m * 60,
        (None, [m, s]) => m * 60 + s,
        (None, [h, m, s]) => h * 3600 + m * 60 + s,
        (Some(d), [h]) => d * 86_400 + h * 3600,
        (Some(d), [h, m]) => d * 86_400 + h * 3600 + m * 60,
        (Some(d), [h, m, s]) => d * 86_400 + h * 3600 + m * 60 + s,
        (_, _) => return Err(wrong()),
    };
    if seconds == 0 { Err(wrong()) } else { Ok(seconds.div_ceil(60)) }
}

/// Reads a text or a whole number: variables of a CI job are texts, configurations have numbers.
fn word<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    struct Word;
    impl Visitor<'_> for Word {
        type Value = Option<String>;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a text or a number")
        }
        fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Self::Value, E> {
            Ok(Some(text.to_owned()))
        }
        fn visit_i64<E: serde::de::Error>(self, number: i64) -> Result<Self::Value, E> {
            if number < 0 {
                return Err(E::custom("a number must not be negative"));
            }
            Ok(Some(number.to_string()))
        }
    }
    deserializer.deserialize_any(Word).map_err(D::Error::custom)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Result<Wishes, String> {
        Wishes::of_job(&text.parse().unwrap())
    }

    #[test]
    fn values_stay_in_one_word_with_their_option() {
        let wishes = of("partition = 'ci --wrap=id'\ncpus_per_task = 4\nntasks = '2'").unwrap();
        assert_eq!(
            wishes.arguments(None),
            ["--partition=ci --wrap=id", "--ntasks=2", "--cpus-per-task=4"]
        );
    }

    #[test]
    fn the_job_goes_over_the_site() {
        let site =
            Wishes { partition: Some("ci".into()), qos: Some("q".into()), ..Wishes::default() };
        let both = of("partition = 'gpu'").unwrap().over(&site);
        assert_eq!(both.arguments(None), ["--partition=gpu", "--qos=q"]);
    }

    #[test]
    fn the_shorter_time_counts_and_is_rounded_up() {
        let time = |text: &str, limit: Option<u64>| {
            of(text).unwrap().arguments(limit.map(Duration::from_secs)).pop()
        };
        assert_eq!(time("", None), None);
        assert_eq!(time("", Some(61)).as_deref(), Some("--time=2"));
        assert_eq!(time("", Some(0)).as_deref(), Some("--time=1"));
        assert_eq!(time("time = '1:00:00'", Some(61)).as_deref(), Some("--time=2"));
        assert_eq!(time("time = 5", Some(3600)).as_deref(), Some("--time=5"));
    }

    #[test]
    fn slurms_notations_of_time_are_read() {
        for (text, want) in [
            ("5", 5),
            ("5:01", 6),
            ("1:00:00", 60),
            ("1-0", 1440),
            ("1-1:30", 1530),
            ("1-1:30:01", 1531),
        ] {
            assert_eq!(minutes(text), Ok(want), "{text}");
        }
        for text in ["", "0", "-5", "x", "1:2:3:4", "1-", "UNLIMITED", "+5", "1 0", "9999999999"] {
            assert!(minutes(text).is_err(), "{text}");
        }
    }

    #[test]
    fn wrong_options_name_their_key() {
        for (text, named) in [
            ("wrap = 'id'", "wrap"),
            ("ntasks = 0", "ntasks"),
            ("cpus_per_task = 'many'", "cpus_per_task"),
            ("mem = \"1G\\u0000\"", "mem"),
            ("gres = ''", "gres"),
            ("time = 'soon'", "time"),
        ] {
            let error = of(text).unwrap_err();
            assert!(error.contains(named), "{error}");
        }
    }
}
