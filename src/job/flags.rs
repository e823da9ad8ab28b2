//! Feature flags: which ones act, which ones cannot, and which ones nobody knows.
//!
//! Names and defaults are gitlab-runner's (`helpers/featureflags/flags.go`). Those that change something
//! here are settings, and reach the job with their resolved value as there. The others of its list stay
//! ordinary variables. Of those, a flag that only concerns containers, other operating systems, other
//! shells or the inner workings of that program is accepted in silence: it would not change a shell job
//! there either. A flag that a user may set in good faith and that is not followed here is named, and so
//! is a name that neither program knows, since it is most likely misspelt.

use std::collections::BTreeMap;

use super::RunnerContext;
use super::settings::{parse_bool, shown};
use super::variables::Variables;

/// The flags that change something here, with their defaults.
const ACTING: [(&str, bool); 11] = [
    ("FF_CLEAN_UP_FAILED_CACHE_EXTRACT", false),
    ("FF_ENABLE_BASH_EXIT_CODE_CHECK", false),
    ("FF_ENABLE_JOB_CLEANUP", false),
    ("FF_ENABLE_JOB_INPUTS_INTERPOLATION", true),
    ("FF_HASH_CACHE_KEYS", false),
    ("FF_MASK_ALL_DEFAULT_TOKENS", true),
    ("FF_SCRIPT_SECTIONS", false),
    ("FF_TIMESTAMPS", true),
    ("FF_USE_DIRECT_DOWNLOAD", true),
    ("FF_USE_EXPONENTIAL_BACKOFF_STAGE_RETRY", true),
    ("FF_USE_GIT_NATIVE_CLONE", false),
];

/// The flags that would change a shell job in gitlab-runner, with what is done here whatever they say.
const FIXED: [(&str, bool); 11] = [
    ("FF_CONCRETE", false),
    // No token is ever in a URL that git is given.
    ("FF_GIT_URLS_WITHOUT_TOKENS", true),
    ("FF_LOG_IMAGES_CONFIGURED_FOR_JOB", false),
    ("FF_NETWORK_PER_BUILD", false),
    // Scripts are quoted for a POSIX shell in any case.
    ("FF_POSIXLY_CORRECT_ESCAPES", true),
    ("FF_SCRIPT_TO_STEP_MIGRATION", false),
    ("FF_SUSPENDABLE_ENVIRONMENTS", false),
    ("FF_USE_DYNAMIC_TRACE_FORCE_SEND_INTERVAL", false),
    ("FF_USE_GIT_BUNDLE_URIS", true),
    // git is asked for its credentials, and answers from its environment.
    ("FF_USE_GIT_PROACTIVE_AUTH", false),
    ("FF_USE_LEGACY_BASH_EVAL", false),
];

/// The flags that concern what is not here: containers, Windows, PowerShell, autoscaling, gitlab-runner's
/// own network and archive code; and those of earlier versions that are still found in old pipelines.
const ELSEWHERE: [&str; 44] = [
    "FF_CMD_DISABLE_DELAYED_ERROR_LEVEL_EXPANSION",
    "FF_DISABLE_AUTOMATIC_TOKEN_ROTATION",
    "FF_DISABLE_POWERSHELL_STDIN",
    "FF_DISABLE_UMASK_FOR_DOCKER_EXECUTOR",
    "FF_DISABLE_UMASK_FOR_KUBERNETES_EXECUTOR",
    "FF_EXPORT_HIGH_CARDINALITY_METRICS",
    "FF_GITLAB_REGISTRY_HELPER_IMAGE",
    "FF_KUBERNETES_HONOR_ENTRYPOINT",
    "FF_PRINT_POD_EVENTS",
    "FF_RESET_HELPER_IMAGE_ENTRYPOINT",
    "FF_RESOLVE_FULL_TLS_CHAIN",
    "FF_RETRIEVE_POD_WARNING_EVENTS",
    "FF_SECRET_RESOLVING_FAILS_IF_MISSING",
    "FF_SET_PERMISSIONS_BEFORE_CLEANUP",
    "FF_SHELL_EXECUTOR_USE_LEGACY_PROCESS_KILL",
    "FF_SKIP_DOCKER_MACHINE_PROVISION_ON_CREATION_FAILURE",
    "FF_SKIP_NOOP_BUILD_STAGES",
    "FF_TEST_FEATURE",
    "FF_USE_ADAPTIVE_REQUEST_CONCURRENCY",
    "FF_USE_ADVANCED_POD_SPEC_CONFIGURATION",
    "FF_USE_DOCKER_AUTOSCALER_DIAL_STDIO",
    "FF_USE_DUMB_INIT_WITH_KUBERNETES_EXECUTOR",
    "FF_USE_FASTZIP",
    "FF_USE_FLEETING_ACQUIRE_HEARTBEATS",
    "FF_USE_GITALY_CORRELATION_ID",
    "FF_USE_GO_CLOUD_WITH_CACHE_ARCHIVER",
    "FF_USE_IMPROVED_URL_MASKING",
    "FF_USE_INIT_WITH_DOCKER_EXECUTOR",
    "FF_USE_JOB_ROUTER",
    "FF_USE_LEGACY_BUILDS_DIR_FOR_DOCKER",
    "FF_USE_LEGACY_GCS_CACHE_ADAPTER",
    "FF_USE_LEGACY_KUBERNETES_EXECUTION_STRATEGY",
    "FF_USE_LEGACY_S3_CACHE_ADAPTER",
    "FF_USE_LEGACY_VOLUMES_MOUNTING_ORDER",
    "FF_USE_NATIVE_CONTAINER_STOP",
    "FF_USE_NEW_BASH_EVAL_STRATEGY",
    "FF_USE_NEW_SHELL_ESCAPE",
    "FF_USE_PARALLEL_ARTIFACT_TRANSFER",
    "FF_USE_PARALLEL_CACHE_TRANSFER",
    "FF_USE_POD_ACTIVE_DEADLINE_SECONDS",
    "FF_USE_POWERSHELL_PATH_RESOLVER",
    "FF_USE_WINDOWS_JOB_OBJECT",
    "FF_USE_WINDOWS_LEGACY_PROCESS_STRATEGY",
    "FF_WAIT_FOR_POD_TO_BE_REACHABLE",
];

/// What the flags of a job come to.
#[derive(Debug, Default)]
pub(super) struct Flags {
    /// The acting ones.
    pub(super) values: BTreeMap<&'static str, bool>,
    /// Values that are none.
    pub(super) complaints: Vec<String>,
    /// What is not followed, and what nobody knows: a sentence each.
    pub(super) warnings: Vec<String>,
}

/// Resolves one acting flag: the runner's word, else the job's, else the default.
pub(super) fn resolve(
    name: &str,
    variables: &Variables,
    runner: &RunnerContext,
) -> Result<bool, String> {
    let default = ACTING.iter().find(|(known, _)| *known == name).is_some_and(|(_, on)| *on);
    if let Some(on) = runner.runner_feature_flags.get(name) {
        return Ok(*on);
    }
    let raw = variables.content(name);
    if raw.is_empty() {
        return Ok(default);
    }
    parse_bool(raw).ok_or_else(|| {
        format!("{name}: expected true or false, got {}; using {default}", shown(raw))
    })
}

/// Resolves all flags of a job.
pub(super) fn read(variables: &Variables, runner: &RunnerContext) -> Flags {
    let mut flags = Flags::default();
    for (name, default) in ACTING {
        let on = resolve(name, variables, runner).unwrap_or_else(|complaint| {
            flags.complaints.push(complaint);
            default
        });
        flags.values.insert(name, on);
    }
    let mut idle = Vec::new();
    let mut unknown = Vec::new();
    for (rest, raw) in variables.with_prefix("FF_") {
        let name = format!("FF_{rest}");
        if flags.values.contains_key(name.as_str()) || ELSEWHERE.contains(&name.as_str()) {
            continue;
        }
        match FIXED.iter().find(|(fixed, _)| *fixed == name) {
            None => unknown.push(name),
            // To ask for what is done anyway is no mistake.
            Some((_, done)) => {
                if !raw.is_empty() && parse_bool(raw) != Some(*done) {
                    idle.push(name);
                }
            }
        }
    }
    if !idle.is_empty() {
        flags
            .warnings
            .push(format!("these feature flags have no effect on this runner: {}", list(idle)));
    }
    if !unknown.is_empty() {
        flags.warnings.push(format!("these feature flags are not known: {}", list(unknown)));
    }
    flags
}

/// Gives the names of a runner's configured flags that nobody knows, for whoever reads the
/// configuration.
pub fn unknown(names: impl IntoIterator<Item = impl AsRef<str>>) -> Vec<String> {
    let known = |name: &str| {
        ACTING.iter().chain(&FIXED).any(|(known, _)| *known == name) || ELSEWHERE.contains(&name)
    };
    names
        .into_iter()
        .map(|name| name.as_ref().to_owned())
        .filter(|name| !known(name.as_str()))
        .collect()
}

/// Names a few; names are a user's text and may be odd or many.
fn list(mut names: Vec<String>) -> String {
    const MOST: usize = 10;
    names.sort_unstable();
    let more = names.len().saturating_sub(MOST);
    names.truncate(MOST);
    let names: Vec<String> =
        names.iter().map(|name| name.escape_debug().take(80).collect()).collect();
    let names = names.join(", ");
    if more == 0 { names } else { format!("{names} and {more} more") }
}

#[cfg(test)]
mod tests {
    use super::super::tests::runner;
    use super::super::variables::Entry;
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Flags {
        let entries = variables.iter().map(|(key, value)| Entry::plain(key, value)).collect();
        super::read(&Variables::new(entries), &runner())
    }

    #[test]
    fn every_flag_has_one_place() {
        let mut names: Vec<&str> =
            ACTING.iter().chain(&FIXED).map(|(name, _)| *name).chain(ELSEWHERE).collect();
        let all = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), all);
        assert!(names.iter().all(|name| name.starts_with("FF_")));
    }

    #[test]
    fn flags_act_are_idle_or_are_named() {
        let acts = "";
        let idle = "no effect on this runner: ";
        let unknown = "not known: ";
        for (name, value, said) in [
            ("FF_TIMESTAMPS", "false", acts),
            ("FF_HASH_CACHE_KEYS", "1", acts),
            ("FF_ENABLE_JOB_INPUTS_INTERPOLATION", "f", acts),
            ("FF_USE_FASTZIP", "true", acts),
            ("FF_NETWORK_PER_BUILD", "false", acts),
            ("FF_NETWORK_PER_BUILD", "", acts),
            ("FF_NETWORK_PER_BUILD", "true", idle),
            ("FF_NETWORK_PER_BUILD", "perhaps", idle),
            ("FF_GIT_URLS_WITHOUT_TOKENS", "true", acts),
            ("FF_GIT_URLS_WITHOUT_TOKENS", "false", idle),
            ("FF_TIMESTAMP", "false", unknown),
            ("FF_", "x", unknown),
            ("ff_timestamps", "x", acts),
        ] {
            let flags = read(&[(name, value)]);
            assert_eq!(flags.complaints, Vec::<String>::new(), "{name}");
            match said {
                "" => assert_eq!(flags.warnings, Vec::<String>::new(), "{name}={value}"),
                said => {
                    let [warning] = flags.warnings.as_slice() else { panic!("{flags:?}") };
                    assert!(warning.ends_with(&format!("{said}{name}")), "{warning}");
                }
            }
        }
    }

    #[test]
    fn names_are_said_once_each_sorted_and_not_without_end() {
        let flags = read(&[("FF_B", "1"), ("FF_A", "1"), ("FF_B", "2")]);
        assert_eq!(flags.warnings, ["these feature flags are not known: FF_A, FF_B"]);
        let many: Vec<String> =
            (0..30).map(|n| format!("FF_X{n:02}\n{}", "y".repeat(200))).collect();
        let many: Vec<(&str, &str)> = many.iter().map(|name| (name.as_str(), "1")).collect();
        let warning = read(&many).warnings.remove(0);
        assert!(warning.ends_with(" and 20 more") && !warning.contains('\n'), "{warning}");
        assert!(warning.len() < 1000);
    }

    #[test]
    fn the_runners_word_outranks_the_jobs_which_outranks_the_default() {
        let mut runner = runner();
        runner.runner_feature_flags.insert("FF_TIMESTAMPS".into(), false);
        let entries = vec![
            Entry::plain("FF_TIMESTAMPS", "nonsense"),
            Entry::plain("FF_SCRIPT_SECTIONS", "true"),
            Entry::plain("FF_HASH_CACHE_KEYS", "maybe"),
        ];
        let flags = super::read(&Variables::new(entries), &runner);
        assert!(!flags.values["FF_TIMESTAMPS"] && flags.values["FF_SCRIPT_SECTIONS"]);
        assert!(!flags.values["FF_HASH_CACHE_KEYS"] && flags.values["FF_USE_DIRECT_DOWNLOAD"]);
        let [complaint] = flags.complaints.as_slice() else { panic!("{flags:?}") };
        assert!(complaint.contains("FF_HASH_CACHE_KEYS") && complaint.contains("\"maybe\""));
    }

    #[test]
    fn a_runners_unknown_flags_are_found() {
        assert_eq!(unknown(["FF_TIMESTAMPS", "FF_TYPO", "FF_USE_FASTZIP"]), ["FF_TYPO"]);
    }
}
