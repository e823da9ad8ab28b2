//! What a job's variables say about how it is run.
//!
//! Values that make no sense fall back to the default, and all complaints become one warning
//! (gitlab-runner, `common/build_settings.go`).

use std::collections::BTreeMap;
use std::time::Duration;

use super::RunnerContext;
use super::variables::Variables;
use crate::gitlab::wire::JobPayload;

/// How long `after_script` may take when nobody says (gitlab-runner, `common/const.go`).
const AFTER_SCRIPT_TIMEOUT: Duration = Duration::from_secs(5 * 60);

/// The feature flags that change something here, with their defaults.
///
/// Names and defaults are gitlab-runner's (`helpers/featureflags/flags.go`); a flag that would change
/// nothing is not listed, and then is an ordinary variable.
const FLAGS: [(&str, bool); 7] = [
    ("FF_ENABLE_BASH_EXIT_CODE_CHECK", false),
    ("FF_ENABLE_JOB_CLEANUP", false),
    ("FF_MASK_ALL_DEFAULT_TOKENS", true),
    ("FF_SCRIPT_SECTIONS", false),
    ("FF_TIMESTAMPS", true),
    ("FF_USE_DIRECT_DOWNLOAD", true),
    ("FF_USE_EXPONENTIAL_BACKOFF_STAGE_RETRY", true),
];

/// How the checkout comes to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GitStrategy {
    /// A new repository each time.
    Clone,
    /// What an earlier job left is brought up to date.
    Fetch,
    /// The directory as it is.
    None,
    /// An empty directory.
    Empty,
}

impl GitStrategy {
    /// Says whether git is needed at all.
    pub fn uses_git(self) -> bool {
        match self {
            Self::Clone | Self::Fetch => true,
            Self::None | Self::Empty => false,
        }
    }

    fn as_str(self) -> &'static str {
        match self {
            Self::Clone => "clone",
            Self::Fetch => "fetch",
            Self::None => "none",
            Self::Empty => "empty",
        }
    }
}

/// What a job's variables say about how it is run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// `GIT_STRATEGY`.
    pub git_strategy: GitStrategy,
    /// `GIT_CHECKOUT`; never for strategies without git.
    pub git_checkout: bool,
    /// `GIT_CLEAN_FLAGS`; empty means no cleaning.
    pub git_clean_flags: Vec<String>,
    /// `GIT_FETCH_EXTRA_FLAGS`.
    pub git_fetch_flags: Vec<String>,
    /// `GET_SOURCES_ATTEMPTS`, 1 to 10.
    pub get_sources_attempts: u32,
    /// `AFTER_SCRIPT_IGNORE_ERRORS`.
    pub after_script_ignore_errors: bool,
    /// `RUNNER_SCRIPT_TIMEOUT`: all steps but `after_script` together; `None` is no limit.
    pub script_timeout: Option<Duration>,
    /// `RUNNER_AFTER_SCRIPT_TIMEOUT`.
    pub after_script_timeout: Duration,
    /// `CI_DEBUG_TRACE`, if this runner allows it.
    pub debug_trace: bool,
    /// The feature flags of this job.
    pub flags: BTreeMap<&'static str, bool>,
}

impl Settings {
    /// Reads the settings; complaints come back as at most one text.
    pub(super) fn read(
        variables: &Variables,
        payload: &JobPayload,
        runner: &RunnerContext,
    ) -> (Self, Option<String>) {
        let mut reader = Reader { variables, complaints: Vec::new() };
        let default_strategy =
            if payload.allow_git_fetch { GitStrategy::Fetch } else { GitStrategy::Clone };
        let git_strategy = reader.strategy(default_strategy);
        let job_timeout = Duration::from_secs(payload.timeout_secs());
        let mut debug_trace = reader.boolean("CI_DEBUG_TRACE", false);
        if debug_trace && runner.debug_trace_disabled {
            reader.complain("CI_DEBUG_TRACE: this runner does not allow it");
            debug_trace = false;
        }
        let settings = Self {
            git_strategy,
            git_checkout: reader.boolean("GIT_CHECKOUT", true) && git_strategy.uses_git(),
            git_clean_flags: reader.words("GIT_CLEAN_FLAGS", &["-ffdx"]),
            git_fetch_flags: reader.words("GIT_FETCH_EXTRA_FLAGS", &["--prune", "--quiet"]),
            get_sources_attempts: reader.attempts("GET_SOURCES_ATTEMPTS"),
            after_script_ignore_errors: reader.boolean("AFTER_SCRIPT_IGNORE_ERRORS", true),
            script_timeout: reader.timeout("RUNNER_SCRIPT_TIMEOUT", job_timeout),
            after_script_timeout: reader
                .timeout("RUNNER_AFTER_SCRIPT_TIMEOUT", job_timeout)
                .unwrap_or(AFTER_SCRIPT_TIMEOUT),
            debug_trace,
            flags: reader.flags(&runner.runner_feature_flags),
        };
        let complaints = reader.complaints;
        let warning = (!complaints.is_empty()).then(|| {
            format!("some settings cannot be used as they are: {}", complaints.join("; "))
        });
        (settings, warning)
    }

    /// Gives a feature flag; one that is not known is off.
    pub fn flag(&self, name: &str) -> bool {
        self.flags.get(name).copied().unwrap_or(false)
    }

    /// Gives the pause before an attempt after the first: 5 s, 10 s, 20 s, … 5 min.
    pub(super) fn pause_before(&self, attempt: u32) -> Duration {
        if !self.flag("FF_USE_EXPONENTIAL_BACKOFF_STAGE_RETRY") {
            return Duration::ZERO;
        }
        let doublings = attempt.saturating_sub(2).min(10);
        Duration::from_secs((5_u64 << doublings).min(5 * 60))
    }
}

struct Reader<'a> {
    variables: &'a Variables,
    complaints: Vec<String>,
}

impl Reader<'_> {
    fn complain(&mut self, text: impl Into<String>) {
        self.complaints.push(text.into());
    }

    fn strategy(&mut self, default: GitStrategy) -> GitStrategy {
        let raw = self.variables.content("GIT_STRATEGY");
        match raw {
            "clone" => GitStrategy::Clone,
            "fetch" => GitStrategy::Fetch,
            "none" => GitStrategy::None,
            "empty" => GitStrategy::Empty,
            "" => default,
            _ => {
                self.complain(format!(
                    "GIT_STRATEGY: expected clone, fetch, none or empty, got {}; using {}",
                    shown(raw),
                    default.as_str()
                ));
                default
            }
        }
    }

    fn boolean(&mut self, name: &str, default: bool) -> bool {
        let raw = self.variables.content(name);
        if raw.is_empty() {
            return default;
        }
        parse_bool(raw).unwrap_or_else(|| {
            self.complain(format!(
                "{name}: expected true or false, got {}; using {default}",
                shown(raw)
            ));
            default
        })
    }

    fn words(&self, name: &str, default: &[&str]) -> Vec<String> {
        match self.variables.content(name) {
            "" => default.iter().map(|word| (*word).to_owned()).collect(),
            "none" => Vec::new(),
            raw => raw.split_whitespace().map(str::to_owned).collect(),
        }
    }

    fn attempts(&mut self, name: &str) -> u32 {
        let raw = self.variables.content(name);
        if raw.is_empty() {
            return 1;
        }
        let Ok(wanted) = raw.parse::<i64>() else {
            self.complain(format!("{name}: expected a number, got {}; using 1", shown(raw)));
            return 1;
        };
        let clamped = wanted.clamp(1, 10);
        if clamped != wanted {
            self.complain(format!("{name}: {wanted} is not within 1 to 10; using {clamped}"));
        }
        u32::try_from(clamped).unwrap_or(1)
    }

    fn timeout(&mut self, name: &str, job_timeout: Duration) -> Option<Duration> {
        let raw = self.variables.content(name);
        if raw.trim().is_empty() {
            return None;
        }
        match parse_duration(raw) {
            None => {
                self.complain(format!(
                    "{name}: {} is no duration such as 1h30m or 45s; ignored",
                    shown(raw)
                ));
                None
            }
            Some((true, _)) => {
                self.complain(format!("{name}: {} is negative; ignored", shown(raw)));
                None
            }
            Some((false, limit)) if limit > job_timeout => {
                self.complain(format!(
                    "{name}: {} is longer than the job's timeout, which then is the limit",
                    shown(raw)
                ));
                None
            }
            Some((false, limit)) => (!limit.is_zero()).then_some(limit),
        }
    }

    fn flags(&mut self, runner: &BTreeMap<String, bool>) -> BTreeMap<&'static str, bool> {
        FLAGS
            .into_iter()
            .map(|(name, default)| {
                let on = match runner.get(name) {
                    Some(on) => *on,
                    None => self.boolean(name, default),
                };
                (name, on)
            })
            .collect()
    }
}

/// Shows a value in a complaint, shortened; quotes make control characters harmless.
fn shown(value: &str) -> String {
    let short: String = value.chars().take(40).collect();
    format!("{short:?}")
}

/// Reads a truth value as Go's `strconv.ParseBool`.
fn parse_bool(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "TRUE" | "true" | "True" => Some(true),
        "0" | "f" | "F" | "FALSE" | "false" | "False" => Some(false),
        _ => None,
    }
}

/// Reads a duration as Go's `time.ParseDuration`: whether it is negative, and how long.
fn parse_duration(text: &str) -> Option<(bool, Duration)> {
    let (negative, rest) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    if rest == "0" {
        return Some((false, Duration::ZERO));
    }
    if rest.is_empty() {
        return None;
    }
    let mut rest = rest;
    let mut nanos: u128 = 0;
    while !rest.is_empty() {
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
        let (number, tail) = rest.split_at_checked(end)?;
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if whole.is_empty() && fraction.is_empty() {
            return None;
        }
        let end = tail.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(tail.len());
        let (unit, tail) = tail.split_at_checked(end)?;
        let unit: u128 = match unit {
            "ns" => 1,
            "us" | "µs" | "μs" => 1_000,
            "ms" => 1_000_000,
            "s" => 1_000_000_000,
            "m" => 60_000_000_000,
            "h" => 3_600_000_000_000,
            _ => return None,
        };
        let whole: u128 = if whole.is_empty() { 0 } else { whole.parse().ok()? };
        nanos = nanos.checked_add(whole.checked_mul(unit)?)?;
        // Digits beyond a nanosecond of an hour change nothing.
        let fraction = fraction.get(..fraction.len().min(15))?;
        if !fraction.is_empty() {
            let scale = 10_u128.pow(u32::try_from(fraction.len()).ok()?);
            nanos = nanos.checked_add(fraction.parse::<u128>().ok()?.checked_mul(unit)? / scale)?;
        }
        rest = tail;
    }
    // Go's durations are 64-bit nanoseconds; more is malformed there.
    let nanos = i64::try_from(nanos).ok().and_then(|n| u64::try_from(n).ok())?;
    Some((negative && nanos > 0, Duration::from_nanos(nanos)))
}

#[cfg(test)]
mod tests {
    use super::super::tests::{payload, runner};
    use super::*;
    use crate::gitlab::wire::Variable;

    fn read(variables: &[(&str, &str)]) -> (Settings, Option<String>) {
        read_for(variables, &runner())
    }

    fn read_for(variables: &[(&str, &str)], runner: &RunnerContext) -> (Settings, Option<String>) {
        let mut payload = payload(&[]);
        payload.variables = variables
            .iter()
            .map(|(key, value)| Variable {
                key: (*key).into(),
                value: crate::gitlab::wire::Secret::new(*value),
                ..Variable::default()
            })
            .collect();
        let plan = super::super::plan(&payload, runner, super::super::Slot::default()).unwrap();
        let warning = plan.warnings.iter().find(|w| w.starts_with("some settings")).cloned();
        (plan.settings, warning)
    }

    #[test]
    fn durations_are_gos() {
        let secs = |n: u64| Some((false, Duration::from_secs(n)));
        for (text, expected) in [
            ("0", secs(0)),
            ("-0", secs(0)),
            ("45s", secs(45)),
            ("1h30m", secs(5400)),
            ("1.5h", secs(5400)),
            (".5m", secs(30)),
            ("1.s", secs(1)),
            ("+2m", secs(120)),
            ("1h1h", secs(7200)),
            ("1500ms", Some((false, Duration::from_millis(1500)))),
            ("3µs", Some((false, Duration::from_micros(3)))),
            ("3us", Some((false, Duration::from_micros(3)))),
            ("-5s", Some((true, Duration::from_secs(5)))),
            ("900", None),
            ("", None),
            ("-", None),
            (".s", None),
            ("1d", None),
            ("1 h", None),
            (" 1h", None),
            ("h", None),
            ("1.2.3s", None),
            ("1é", None),
            ("9999999999h", None),
        ] {
            assert_eq!(parse_duration(text), expected, "{text:?}");
        }
    }

    #[test]
    fn defaults_hold_when_nothing_is_said() {
        let (settings, warning) = read(&[]);
        assert_eq!(warning, None);
        assert_eq!(settings.git_strategy, GitStrategy::Clone);
        assert!(settings.git_checkout && settings.after_script_ignore_errors);
        assert_eq!(settings.git_clean_flags, ["-ffdx"]);
        assert_eq!(settings.git_fetch_flags, ["--prune", "--quiet"]);
        assert_eq!(settings.get_sources_attempts, 1);
        assert_eq!(settings.script_timeout, None);
        assert_eq!(settings.after_script_timeout, Duration::from_secs(300));
        assert!(!settings.debug_trace && settings.flag("FF_TIMESTAMPS"));
    }

    #[test]
    fn settings_are_read() {
        let (settings, warning) = read(&[
            ("GIT_STRATEGY", "none"),
            ("GIT_CHECKOUT", "true"),
            ("GIT_CLEAN_FLAGS", "-ffd  -e cache"),
            ("GIT_FETCH_EXTRA_FLAGS", "none"),
            ("GET_SOURCES_ATTEMPTS", "3"),
            ("AFTER_SCRIPT_IGNORE_ERRORS", "F"),
            ("RUNNER_SCRIPT_TIMEOUT", "10m"),
            ("RUNNER_AFTER_SCRIPT_TIMEOUT", "30s"),
            ("CI_DEBUG_TRACE", "1"),
            ("FF_TIMESTAMPS", "false"),
        ]);
        assert_eq!(warning, None);
        assert_eq!(settings.git_strategy, GitStrategy::None);
        assert!(!settings.git_checkout, "nothing to check out without git");
        assert_eq!(settings.git_clean_flags, ["-ffd", "-e", "cache"]);
        assert!(settings.git_fetch_flags.is_empty());
        assert_eq!(settings.get_sources_attempts, 3);
        assert!(!settings.after_script_ignore_errors);
        assert_eq!(settings.script_timeout, Some(Duration::from_secs(600)));
        assert_eq!(settings.after_script_timeout, Duration::from_secs(30));
        assert!(settings.debug_trace && !settings.flag("FF_TIMESTAMPS"));
    }

    #[test]
    fn nonsense_is_the_default_and_one_warning() {
        let (settings, warning) = read(&[
            ("GIT_STRATEGY", "pull"),
            ("GIT_CHECKOUT", "yes"),
            ("GET_SOURCES_ATTEMPTS", "11"),
            ("RUNNER_SCRIPT_TIMEOUT", "900"),
            ("RUNNER_AFTER_SCRIPT_TIMEOUT", "-5s"),
            ("FF_TIMESTAMPS", "maybe"),
        ]);
        let warning = warning.unwrap();
        for part in ["GIT_STRATEGY", "GIT_CHECKOUT", "using 10", "\"900\"", "negative", "FF_TIME"] {
            assert!(warning.contains(part), "{part} in {warning}");
        }
        assert_eq!(settings.git_strategy, GitStrategy::Clone);
        assert!(settings.git_checkout);
        assert_eq!(settings.get_sources_attempts, 10);
        assert_eq!(settings.script_timeout, None);
        assert_eq!(settings.after_script_timeout, Duration::from_secs(300));
    }

    #[test]
    fn the_runner_outranks_the_job() {
        let mut runner = runner();
        runner.debug_trace_disabled = true;
        runner.runner_feature_flags.insert("FF_TIMESTAMPS".into(), false);
        let (settings, warning) =
            read_for(&[("CI_DEBUG_TRACE", "true"), ("FF_TIMESTAMPS", "true")], &runner);
        assert!(!settings.debug_trace && !settings.flag("FF_TIMESTAMPS"));
        assert!(warning.unwrap().contains("CI_DEBUG_TRACE"));
    }

    #[test]
    fn pauses_double_up_to_five_minutes() {
        let (mut settings, _) = read(&[]);
        let pauses: Vec<u64> =
            [2, 3, 4, 5, 8, 9, 10].map(|n| settings.pause_before(n).as_secs()).into();
        assert_eq!(pauses, [5, 10, 20, 40, 300, 300, 300]);
        settings.flags.insert("FF_USE_EXPONENTIAL_BACKOFF_STAGE_RETRY", false);
        assert_eq!(settings.pause_before(2), Duration::ZERO);
    }
}
