//! What settings come of which variables.

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

/// What a job with this one variable has in place of the defaults, and what it is told.
fn told(name: &str, value: &str) -> (Settings, String) {
    let (settings, warning) = read(&[(name, value)]);
    (settings, warning.unwrap_or_default())
}

#[test]
fn every_setting_is_read_and_nonsense_is_the_default_with_a_word_about_it() {
    type Change = fn(&mut Settings);
    let nothing: Change = |_| {};
    let secs = Duration::from_secs;
    let cases: Vec<(&str, &str, Change, &str)> = vec![
        ("CI_DEBUG_TRACE", "T", |s| s.debug_trace = true, ""),
        ("CI_DEBUG_TRACE", "on", nothing, "expected true or false, got \"on\"; using false"),
        ("CI_DEBUG_SERVICES", "false", nothing, ""),
        ("CI_DEBUG_SERVICES", "true", nothing, "no effect on this runner"),
        ("CI_DEBUG_SERVICES", "2", nothing, "expected true or false"),
        ("GIT_STRATEGY", "fetch", |s| s.git_strategy = GitStrategy::Fetch, ""),
        ("GIT_STRATEGY", "Fetch", nothing, "expected clone, fetch, none or empty"),
        ("GIT_CHECKOUT", "0", |s| s.git_checkout = false, ""),
        ("GIT_CHECKOUT", "no", nothing, "expected true or false"),
        ("GIT_CLEAN_FLAGS", "none", |s| s.git_clean_flags = vec![], ""),
        ("GIT_FETCH_EXTRA_FLAGS", "-4", |s| s.git_fetch_flags = vec!["-4".into()], ""),
        (
            "GIT_CLONE_EXTRA_FLAGS",
            " -4  -v ",
            |s| s.git_clone_flags = vec!["-4".into(), "-v".into()],
            "",
        ),
        ("GIT_CLONE_EXTRA_FLAGS", "none", nothing, ""),
        ("GIT_SUBMODULE_STRATEGY", "none", nothing, ""),
        (
            "GIT_SUBMODULE_STRATEGY",
            "normal",
            |s| s.git_submodule_strategy = SubmoduleStrategy::Normal,
            "",
        ),
        (
            "GIT_SUBMODULE_STRATEGY",
            "recursive",
            |s| s.git_submodule_strategy = SubmoduleStrategy::Recursive,
            "",
        ),
        (
            "GIT_SUBMODULE_STRATEGY",
            "all",
            |s| s.git_submodule_strategy = SubmoduleStrategy::Unknown("all".into()),
            "",
        ),
        (
            "GIT_SUBMODULE_PATHS",
            "a :(exclude)b",
            |s| s.git_submodule_paths = vec!["a".into(), ":(exclude)b".into()],
            "",
        ),
        (
            "GIT_SUBMODULE_UPDATE_FLAGS",
            "--jobs 4",
            |s| s.git_submodule_update_flags = vec!["--jobs".into(), "4".into()],
            "",
        ),
        ("GIT_SUBMODULE_DEPTH", "7", |s| s.git_submodule_depth = 7, ""),
        ("GIT_SUBMODULE_DEPTH", "-7", |s| s.git_submodule_depth = 0, ""),
        ("GIT_SUBMODULE_DEPTH", "7x", nothing, "expected a number, got \"7x\""),
        ("GIT_SUBMODULE_FORCE_HTTPS", "1", |s| s.git_submodule_force_https = true, ""),
        ("GIT_SUBMODULE_FORCE_HTTPS", "https", nothing, "expected true or false"),
        ("GIT_LFS_SKIP_SMUDGE", "1", |s| s.git_lfs_skip_smudge = true, ""),
        ("GIT_LFS_SKIP_SMUDGE", "yes", nothing, "expected true or false"),
        ("GET_SOURCES_ATTEMPTS", "2", |s| s.get_sources_attempts = 2, ""),
        ("GET_SOURCES_ATTEMPTS", "0", nothing, "not within 1 to 10; using 1"),
        ("GET_SOURCES_ATTEMPTS", "two", nothing, "expected a number"),
        ("RESTORE_CACHE_ATTEMPTS", "3", |s| s.restore_cache_attempts = 3, ""),
        ("RESTORE_CACHE_ATTEMPTS", "99", |s| s.restore_cache_attempts = 10, "using 10"),
        ("RESTORE_CACHE_ATTEMPTS", "1.5", nothing, "expected a number"),
        ("ARTIFACT_DOWNLOAD_ATTEMPTS", "4", |s| s.artifact_download_attempts = 4, ""),
        ("ARTIFACT_DOWNLOAD_ATTEMPTS", "-1", nothing, "using 1"),
        ("EXECUTOR_JOB_SECTION_ATTEMPTS", "1", nothing, ""),
        ("EXECUTOR_JOB_SECTION_ATTEMPTS", "3", nothing, "has no effect on this runner"),
        ("SECRETS_RETRIEVAL_ATTEMPTS", "3", nothing, "has no effect on this runner"),
        ("AFTER_SCRIPT_IGNORE_ERRORS", "false", |s| s.after_script_ignore_errors = false, ""),
        ("AFTER_SCRIPT_IGNORE_ERRORS", "never", nothing, "using true"),
        (
            "RUNNER_SCRIPT_TIMEOUT",
            "1.5h",
            |s| s.script_timeout = Some(Duration::from_secs(5400)),
            "",
        ),
        ("RUNNER_SCRIPT_TIMEOUT", "0", nothing, ""),
        ("RUNNER_SCRIPT_TIMEOUT", "90", nothing, "\"90\" is no duration such as 1h30m or 45s"),
        ("RUNNER_SCRIPT_TIMEOUT", "3h", nothing, "longer than the job's timeout"),
        (
            "RUNNER_AFTER_SCRIPT_TIMEOUT",
            "1m",
            |s| s.after_script_timeout = Duration::from_secs(60),
            "",
        ),
        ("RUNNER_AFTER_SCRIPT_TIMEOUT", "-1m", nothing, "is negative"),
        ("CACHE_FALLBACK_KEY", "main", |s| s.cache_fallback_key = Some("main".into()), ""),
        ("CACHE_REQUEST_TIMEOUT", "3", |s| s.cache_request_timeout = Duration::from_secs(180), ""),
        ("CACHE_REQUEST_TIMEOUT", "0", nothing, ""),
        ("CACHE_REQUEST_TIMEOUT", "-4", nothing, ""),
        (
            "CACHE_REQUEST_TIMEOUT",
            "5m",
            nothing,
            "expected a number of minutes, got \"5m\"; using 10",
        ),
        (
            "CACHE_REQUEST_TIMEOUT",
            "9999",
            |s| s.cache_request_timeout = Duration::from_secs(7200),
            "using 120 minutes",
        ),
        ("CACHE_COMPRESSION_LEVEL", "slowest", |s| s.cache_compression_level = Level::Slowest, ""),
        (
            "CACHE_COMPRESSION_LEVEL",
            "9",
            nothing,
            "expected fastest, fast, default, slow or slowest",
        ),
        ("CACHE_COMPRESSION_FORMAT", "zip", nothing, ""),
        (
            "CACHE_COMPRESSION_FORMAT",
            "ZipZstd",
            |s| s.cache_compression_format = Format::ZipZstd,
            "",
        ),
        (
            "CACHE_COMPRESSION_FORMAT",
            "tarzstd",
            |s| s.cache_compression_format = Format::TarZstd,
            "",
        ),
        (
            "CACHE_COMPRESSION_FORMAT",
            "rar",
            nothing,
            "expected zip, zipzstd or tarzstd, got \"rar\"",
        ),
        ("RUNNER_GENERATE_ARTIFACTS_METADATA", "true", |s| s.artifacts_metadata = true, ""),
        ("RUNNER_GENERATE_ARTIFACTS_METADATA", "all", nothing, "expected true or false"),
        ("SLSA_PROVENANCE_SCHEMA_VERSION", "v1", nothing, ""),
        ("SLSA_PROVENANCE_SCHEMA_VERSION", "v0.2", nothing, "expected v1, got \"v0.2\"; using v1"),
        ("DOCKER_AUTH_CONFIG", "{", nothing, ""),
    ];
    let (defaults, _) = read(&[]);
    assert_eq!(defaults.cache_request_timeout, secs(600));
    for (name, value, change, words) in cases {
        let mut expected = defaults.clone();
        change(&mut expected);
        let (settings, said) = told(name, value);
        assert_eq!(settings, expected, "{name}={value}");
        if words.is_empty() {
            assert_eq!(said, "", "{name}={value}");
        } else {
            assert!(said.contains(&format!("{name}: ")), "{said}");
            assert!(said.contains(words), "{name}={value}: {said}");
        }
        let (empty, said) = told(name, "");
        assert_eq!((empty, said.as_str()), (defaults.clone(), ""), "an empty {name} is none");
    }
}

#[test]
fn depth_of_submodules_is_the_projects_unless_said() {
    let mut payload = payload(&[]);
    for (depth, expected) in [(20, 20), (0, 0), (-1, 0), (i64::MAX, u32::MAX)] {
        payload.git_info.depth = depth;
        let plan = super::super::plan(&payload, &runner(), super::super::Slot::default()).unwrap();
        assert_eq!(plan.settings.git_submodule_depth, expected);
    }
}
