//! What a job's variables say about how it is run.
//!
//! Values that make no sense fall back to the default, and all complaints become one warning
//! (gitlab-runner, `common/build_settings.go`).

use std::collections::BTreeMap;
use std::time::Duration;

use super::RunnerContext;
use super::flags;
use super::variables::Variables;
use crate::archive::{Format, Level};
use crate::gitlab::wire::JobPayload;

/// How long `after_script` may take when nobody says (gitlab-runner, `common/const.go`).
const AFTER_SCRIPT_TIMEOUT: Duration = Duration::from_secs(5 * 60);

/// How long one request to a cache's store may take when nobody says (gitlab-runner,
/// `common/consts.go`).
const CACHE_REQUEST_MINUTES: u64 = 10;

/// The longest that one such request may be given, in minutes.
const MOST_CACHE_REQUEST_MINUTES: u64 = 120;

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

/// Which submodules are checked out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum SubmoduleStrategy {
    /// None.
    #[default]
    None,
    /// Those of the project.
    Normal,
    /// Also those of the submodules.
    Recursive,
    /// A word that is none of these; the stage fails with it.
    Unknown(String),
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
    /// `GIT_CLONE_EXTRA_FLAGS`.
    pub git_clone_flags: Vec<String>,
    /// `GIT_CLONE_PATH`, with its references replaced as far as they are known before the directories.
    pub git_clone_path: Option<String>,
    /// `GIT_SUBMODULE_STRATEGY`.
    pub git_submodule_strategy: SubmoduleStrategy,
    /// `GIT_SUBMODULE_PATHS`: pathspecs; empty means all.
    pub git_submodule_paths: Vec<String>,
    /// `GIT_SUBMODULE_UPDATE_FLAGS`.
    pub git_submodule_update_flags: Vec<String>,
    /// `GIT_SUBMODULE_DEPTH`, by default the project's; 0 is everything.
    pub git_submodule_depth: u32,
    /// `GIT_SUBMODULE_FORCE_HTTPS`.
    pub git_submodule_force_https: bool,
    /// `GIT_LFS_SKIP_SMUDGE`.
    pub git_lfs_skip_smudge: bool,
    /// `GET_SOURCES_ATTEMPTS`, 1 to 10.
    pub get_sources_attempts: u32,
    /// `RESTORE_CACHE_ATTEMPTS`, 1 to 10.
    pub restore_cache_attempts: u32,
    /// `ARTIFACT_DOWNLOAD_ATTEMPTS`, 1 to 10.
    pub artifact_download_attempts: u32,
    /// `CACHE_FALLBACK_KEY`.
    pub cache_fallback_key: Option<String>,
    /// `CACHE_COMPRESSION_LEVEL`.
    pub cache_compression_level: Level,
    /// `CACHE_COMPRESSION_FORMAT`.
    pub cache_compression_format: Format,
    /// `CACHE_REQUEST_TIMEOUT`: the most that one request to a cache's store may take.
    pub cache_request_timeout: Duration,
    /// `RUNNER_GENERATE_ARTIFACTS_METADATA`: a statement of provenance goes with each zip of artifacts.
    pub artifacts_metadata: bool,
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
    /// Reads the settings; all complaints about values come back as one text, the first.
    pub(super) fn read(
        variables: &Variables,
        payload: &JobPayload,
        runner: &RunnerContext,
    ) -> (Self, Vec<String>) {
        let mut reader = Reader { variables, complaints: Vec::new() };
        let default_strategy =
            if payload.allow_git_fetch { GitStrategy::Fetch } else { GitStrategy::Clone };
        let git_strategy = reader.strategy(default_strategy);
        let job_timeout = Duration::from_secs(payload.timeout_secs());
        let flags = flags::read(variables, runner);
        let mut debug_trace = reader.boolean("CI_DEBUG_TRACE", false);
        if debug_trace && runner.debug_trace_disabled {
            reader.complain("CI_DEBUG_TRACE: this runner does not allow it; ignored");
            debug_trace = false;
        }
        let settings = Self {
            git_strategy,
            git_checkout: reader.boolean("GIT_CHECKOUT", true) && git_strategy.uses_git(),
            git_clean_flags: reader.words("GIT_CLEAN_FLAGS", &["-ffdx"]),
            git_fetch_flags: reader.words("GIT_FETCH_EXTRA_FLAGS", &["--prune", "--quiet"]),
            git_clone_flags: reader.words("GIT_CLONE_EXTRA_FLAGS", &[]),
            git_clone_path: reader.text("GIT_CLONE_PATH"),
            git_submodule_strategy: if git_strategy.uses_git() {
                reader.submodules()
            } else {
                SubmoduleStrategy::None
            },
            git_submodule_paths: reader.list("GIT_SUBMODULE_PATHS"),
            git_submodule_update_flags: reader.list("GIT_SUBMODULE_UPDATE_FLAGS"),
            git_submodule_depth: reader.depth("GIT_SUBMODULE_DEPTH", payload.git_info.depth),
            git_submodule_force_https: reader.boolean("GIT_SUBMODULE_FORCE_HTTPS", false),
            git_lfs_skip_smudge: reader.boolean("GIT_LFS_SKIP_SMUDGE", false),
            get_sources_attempts: reader.attempts("GET_SOURCES_ATTEMPTS"),
            restore_cache_attempts: reader.attempts("RESTORE_CACHE_ATTEMPTS"),
            artifact_download_attempts: reader.attempts("ARTIFACT_DOWNLOAD_ATTEMPTS"),
            cache_fallback_key: reader.text("CACHE_FALLBACK_KEY"),
            cache_compression_level: reader.level("CACHE_COMPRESSION_LEVEL"),
            cache_compression_format: reader.cache_format(),
            cache_request_timeout: reader.minutes(
                "CACHE_REQUEST_TIMEOUT",
                CACHE_REQUEST_MINUTES,
                MOST_CACHE_REQUEST_MINUTES,
            ),
            artifacts_metadata: reader.boolean("RUNNER_GENERATE_ARTIFACTS_METADATA", false),
            after_script_ignore_errors: reader.boolean("AFTER_SCRIPT_IGNORE_ERRORS", true),
            script_timeout: reader.timeout("RUNNER_SCRIPT_TIMEOUT", job_timeout),
            after_script_timeout: reader
                .timeout("RUNNER_AFTER_SCRIPT_TIMEOUT", job_timeout)
                .unwrap_or(AFTER_SCRIPT_TIMEOUT),
            debug_trace,
            flags: flags.values,
        };
        reader.provenance();
        reader.without_effect(runner);
        let mut complaints = reader.complaints;
        complaints.extend(flags.complaints);
        let mut warnings = Vec::new();
        if !complaints.is_empty() {
            warnings.push(format!(
                "some settings cannot be used as they are: {}",
                complaints.join("; ")
            ));
        }
        warnings.extend(flags.warnings);
        (settings, warnings)
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

    fn list(&self, name: &str) -> Vec<String> {
        self.variables.content(name).split_whitespace().map(str::to_owned).collect()
    }

    fn text(&self, name: &str) -> Option<String> {
        Some(self.variables.content(name)).filter(|text| !text.is_empty()).map(str::to_owned)
    }

    fn submodules(&self) -> SubmoduleStrategy {
        match self.variables.content("GIT_SUBMODULE_STRATEGY") {
            "" | "none" => SubmoduleStrategy::None,
            "normal" => SubmoduleStrategy::Normal,
            "recursive" => SubmoduleStrategy::Recursive,
            raw => SubmoduleStrategy::Unknown(raw.to_owned()),
        }
    }

    fn depth(&mut self, name: &str, default: i64) -> u32 {
        let raw = self.variables.content(name);
        let wanted = if raw.is_empty() {
            default
        } else {
            raw.parse().unwrap_or_else(|_| {
                self.complain(format!("{name}: expected a number, got {}; ignored", shown(raw)));
                default
            })
        };
        // Less than nothing is no limit, as for git_info.depth.
        u32::try_from(wanted.max(0)).unwrap_or(u32::MAX)
    }

    fn level(&mut self, name: &str) -> Level {
        // The official runner writes these in capitals in places.
        match self.variables.content(name).to_ascii_lowercase().as_str() {
            "" | "default" => Level::Default,
            "fastest" => Level::Fastest,
            "fast" => Level::Fast,
            "slow" => Level::Slow,
            "slowest" => Level::Slowest,
            _ => {
                let raw = self.variables.content(name);
                self.complain(format!(
                    "{name}: expected fastest, fast, default, slow or slowest, got {}; using \
                     default",
                    shown(raw)
                ));
                Level::Default
            }
        }
    }

    fn cache_format(&mut self) -> Format {
        const NAME: &str = "CACHE_COMPRESSION_FORMAT";
        let raw = self.variables.content(NAME);
        match raw.to_ascii_lowercase().as_str() {
            "" | "zip" => Format::Zip,
            "zipzstd" => Format::ZipZstd,
            "tarzstd" => Format::TarZstd,
            _ => {
                self.complain(format!(
                    "{NAME}: expected zip, zipzstd or tarzstd, got {}; using zip",
                    shown(raw)
                ));
                Format::Zip
            }
        }
    }

    fn minutes(&mut self, name: &str, default: u64, most: u64) -> Duration {
        let raw = self.variables.content(name);
        let minutes = match raw.parse::<i64>() {
            _ if raw.is_empty() => default,
            Err(_) => {
                self.complain(format!(
                    "{name}: expected a number of minutes, got {}; using {default}",
                    shown(raw)
                ));
                default
            }
            Ok(wanted) => match u64::try_from(wanted) {
                Ok(wanted) if wanted > most => {
                    self.complain(format!("{name}: {wanted} is too long; using {most} minutes"));
                    most
                }
                Ok(wanted) if wanted > 0 => wanted,
                Ok(_) | Err(_) => default,
            },
        };
        Duration::from_secs(minutes * 60)
    }

    /// There is one schema that anybody writes.
    fn provenance(&mut self) {
        const NAME: &str = "SLSA_PROVENANCE_SCHEMA_VERSION";
        let raw = self.variables.content(NAME);
        if !matches!(raw, "" | "v1") {
            self.complain(format!("{NAME}: expected v1, got {}; using v1", shown(raw)));
        }
    }

    /// Names what is asked for and changes nothing here.
    fn without_effect(&mut self, runner: &RunnerContext) {
        for name in ["EXECUTOR_JOB_SECTION_ATTEMPTS", "SECRETS_RETRIEVAL_ATTEMPTS"] {
            if self.attempts(name) > 1 {
                self.complain(format!("{name}: has no effect on this runner"));
            }
        }
        if self.boolean("CI_DEBUG_SERVICES", false) {
            self.complain(if runner.debug_trace_disabled {
                "CI_DEBUG_SERVICES: this runner does not allow it; ignored"
            } else {
                "CI_DEBUG_SERVICES: has no effect on this runner, which starts no services"
            });
        }
    }
}

/// Shows a value in a complaint, shortened; quotes make control characters harmless.
pub(super) fn shown(value: &str) -> String {
    let short: String = value.chars().take(40).collect();
    format!("{short:?}")
}

/// Reads a truth value as Go's `strconv.ParseBool`.
pub(super) fn parse_bool(text: &str) -> Option<bool> {
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
#[path = "settings_tests.rs"]
mod tests;
