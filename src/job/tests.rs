//! What a plan is, as a whole; and the payloads that the tests beside the other files start from.

use super::*;
use crate::gitlab::wire::{Credential, Dependency, Step, Variable};
use secrecy::ExposeSecret as _;

pub(super) const SHA: &str = "1f0e9d8c7b6a59483726150493827160a5b4c3d2";

pub(super) fn runner() -> RunnerContext {
    let url = Url::parse("https://gitlab.example.org").unwrap();
    RunnerContext {
        short_token: "short".into(),
        system_id: "s_1".into(),
        version: "0.1.0".into(),
        ..RunnerContext::new("cluster", url, "/builds".into())
    }
}

pub(super) fn variable(key: &str, value: &str) -> Variable {
    Variable { key: key.into(), value: Secret::new(value), ..Variable::default() }
}

pub(super) fn payload(variables: &[(&str, &str)]) -> JobPayload {
    let mut payload = JobPayload {
        id: 4711,
        token: Secret::new("glcbt-token"),
        variables: variables.iter().map(|(k, v)| variable(k, v)).collect(),
        ..JobPayload::default()
    };
    payload.job_info.name = "simulate".into();
    payload.job_info.project_full_path = "hep/tracker".into();
    payload.git_info.repo_url =
        Secret::new("https://gitlab-ci-token:glcbt-token@gitlab.example.org/hep/tracker.git");
    payload.git_info.sha = SHA.into();
    payload.git_info.refspecs = vec!["+refs/pipelines/903:refs/pipelines/903".into()];
    payload
}

pub(super) fn step(name: &str, lines: &[&str]) -> Step {
    Step { name: name.into(), script: lines.iter().map(|l| (*l).to_owned()).collect() }
}

fn env(plan: &Plan) -> BTreeMap<String, String> {
    plan.spec(Limits::default())
        .env
        .iter()
        .map(|var| {
            let name = var.name.strip_prefix(CARRIER).unwrap().to_owned();
            (name, var.value.expose_secret().to_owned())
        })
        .collect()
}

#[test]
fn the_list_has_the_official_order() {
    let mut runner = runner();
    runner.environment =
        vec![("FROM_RUNNER".into(), "$CI_PROJECT_DIR/x".into()), ("BOTH".into(), "runner".into())];
    let mut payload = payload(&[
        ("BOTH", "job"),
        ("CI_SERVER", "no"),
        ("CI_RUNNER_VERSION", "mine"),
        ("FF_TIMESTAMPS", "false"),
        ("FF_UNKNOWN", "x"),
        ("OUT", "$CI_PROJECT_DIR/out"),
        ("BOTH", "job again"),
    ]);
    payload.image = Some(Image { name: "debian:$V".into(), ..Image::default() });
    payload.runner_info.timeout = 3600;
    let slot = Slot { concurrent: 4, project: 1 };
    let plan = plan(&payload, &runner, slot).unwrap();
    let env = env(&plan);
    for (name, value) in [
        ("BOTH", "job again"),
        ("FROM_RUNNER", "/builds/short/1/hep/tracker/x"),
        ("OUT", "/builds/short/1/hep/tracker/out"),
        ("CI_PROJECT_DIR", "/builds/short/1/hep/tracker"),
        ("CI_BUILDS_DIR", "/builds"),
        ("RUNNER_TEMP_PROJECT_DIR", "/builds/short/1/hep/tracker.tmp"),
        ("CI_SERVER", "no"),
        ("CI_RUNNER_VERSION", "0.1.0"),
        ("CI_RUNNER_SHORT_TOKEN", "short"),
        ("CI_CONCURRENT_ID", "4"),
        ("CI_CONCURRENT_PROJECT_ID", "1"),
        ("CI_JOB_TIMEOUT", "3600"),
        ("CI_JOB_STATUS", "running"),
        ("CI_JOB_IMAGE", "debian:"),
        ("CI_SHARED_ENVIRONMENT", "true"),
        ("FF_TIMESTAMPS", "false"),
        ("FF_UNKNOWN", "x"),
        ("FF_SCRIPT_SECTIONS", "false"),
    ] {
        assert_eq!(env.get(name).map(String::as_str), Some(value), "{name}");
    }
    assert!(!plan.timestamps);
    assert_eq!(plan.timeout, Duration::from_secs(3600));
    assert_eq!(plan.temp_dir, "/builds/short/1/hep/tracker.tmp");
}

#[test]
fn a_payload_of_nulls_is_a_success_of_nothing() {
    let mut payload: JobPayload = serde_json::from_str(r#"{"id":1,"steps":null}"#).unwrap();
    assert!(plan(&payload, &runner(), Slot::default()).is_err(), "nothing to clone from");
    payload.variables = vec![variable("GIT_STRATEGY", "none")];
    let plan = plan(&payload, &runner(), Slot::default()).unwrap();
    assert_eq!(plan.project_dir, "/builds/short/0/project-0");
    assert!(plan.warnings.is_empty(), "{:?}", plan.warnings);
}

#[test]
fn jobs_that_cannot_be_run_say_why_in_one_sentence() {
    let why =
        |payload: &JobPayload| plan(payload, &runner(), Slot::default()).unwrap_err().to_string();
    let mut run = payload(&[]);
    run.run = r#"[{"name":"a","script":"echo"}]"#.into();
    assert!(why(&run).contains("`run:`"));
    let mut secrets = payload(&[]);
    secrets.secrets.insert("S".into(), serde_json::json!({"vault": {}}));
    assert!(why(&secrets).contains("secrets"));
    run.steps = vec![step("script", &[])];
    assert!(why(&run).contains("`run:`"), "a step of no lines is none");
    run.steps = vec![step("after_script", &["true"])];
    assert!(why(&run).contains("cannot be used together"));
    for nothing in ["", " ", "[]", "null"] {
        run.run = nothing.into();
        assert!(plan(&run, &runner(), Slot::default()).is_ok(), "{nothing:?}");
    }
    for odd in ["{}", "[", "x"] {
        run.run = odd.into();
        assert!(plan(&run, &runner(), Slot::default()).is_err(), "{odd:?}");
    }
    let mut nul = payload(&[]);
    nul.steps = vec![step("script", &["echo a\0b"])];
    assert!(why(&nul).contains("NUL"));
    assert!(why(&payload(&[("GIT_CLONE_PATH", "/elsewhere")])).contains("GIT_CLONE_PATH"));
    let mut commit = payload(&[]);
    commit.git_info.sha = "--orphan".into();
    assert!(why(&commit).contains("--orphan"));
    let mut refspec = payload(&[]);
    refspec.git_info.refspecs.push("--upload-pack=touch".into());
    assert!(why(&refspec).contains("--upload-pack"));
    let many: Vec<(String, String)> =
        (0..50).map(|n| (format!("V{n}"), "x".repeat(100_000))).collect();
    let many: Vec<(&str, &str)> = many.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
    assert!(why(&payload(&many)).contains("type file"), "5 MB of variables");
}

#[test]
fn what_is_left_out_is_said() {
    let payload = payload(&[("A-B", "x"), ("GIT_SUBMODULE_STRATEGY", "normal")]);
    let warnings = plan(&payload, &runner(), Slot::default()).unwrap().warnings.join("\n");
    assert!(warnings.contains("\"A-B\""), "{warnings}");
    assert!(!warnings.contains("submodules"), "{warnings}");
}

#[test]
fn images_and_services_are_ignored_with_a_word_or_refused_with_a_reason() {
    let named = |name: &str| Image { name: name.into(), ..Image::default() };
    let mut refusing = runner();
    refusing.containers = Containers::Refuse;
    let mut payload = payload(&[("V", "12")]);
    payload.image = Some(Image::default());
    let without = plan(&payload, &refusing, Slot::default()).unwrap();
    assert!(without.warnings.is_empty(), "an image without a name is none");
    let both = "`image: debian:12` and `services: postgres, redis:12`";
    for (image, services, wanted) in [
        (Some("debian:$V"), vec![], "`image: debian:12`"),
        (None, vec!["postgres"], "`services: postgres`"),
        (Some("debian:$V"), vec!["postgres", "redis:${V}"], both),
        (Some("a\nb"), vec![], "`image: a\\nb`"),
    ] {
        payload.image = image.map(named);
        payload.services = services.into_iter().map(named).collect();
        let warnings = plan(&payload, &runner(), Slot::default()).unwrap().warnings;
        let [warning] = warnings.as_slice() else { panic!("{warnings:?}") };
        assert!(warning.ends_with(&format!("ignores {wanted}")), "{warning}");
        let refusal = plan(&payload, &refusing, Slot::default()).unwrap_err();
        assert_eq!(refusal, Unrunnable::Containers { wanted: wanted.into() });
        assert!(refusal.to_string().contains("without containers"));
    }
}

#[test]
fn everything_secret_is_masked() {
    let mut payload = payload(&[("D", "x")]);
    payload.git_info.repo_url = Secret::new("https://u:p%40ss@h/a/b.git");
    let masked =
        |key: &str, value: &str, file| Variable { masked: true, file, ..variable(key, value) };
    payload.variables.extend([
        masked("M", " hidden-$D \n", false),
        masked("F", "content\nof file\n", true),
        masked("M", "hidden again", false),
        masked("E", "  ", false),
    ]);
    payload.credentials =
        vec![Credential { password: Secret::new("registry"), ..Credential::default() }];
    payload.dependencies =
        vec![Dependency { token: Secret::new("dependency"), ..Dependency::default() }];
    payload.features.token_mask_prefixes = vec!["site-".into()];
    let plan = plan(&payload, &runner(), Slot::default()).unwrap();
    let mut phrases: Vec<&str> = plan.mask.phrases.iter().map(Secret::expose).collect();
    phrases.sort_unstable();
    let expected = [
        "content\nof file",
        "dependency",
        "glcbt-token",
        "hidden again",
        "hidden-$D",
        "hidden-x",
        "p%40ss",
        "p@ss",
        "registry",
    ];
    assert_eq!(phrases, expected);
    assert_eq!(plan.mask.prefixes, ["site-"]);
    assert!(plan.mask.all_default_prefixes);
}

#[test]
fn no_secret_is_in_the_script_or_in_debug_output() {
    let mut payload = payload(&[("PASSWORD", "hunter2")]);
    payload.variables.push(Variable { file: true, ..variable("KEYFILE", "keycontent") });
    payload.steps = vec![step("script", &["true"])];
    let plan = plan(&payload, &runner(), Slot::default()).unwrap();
    let spec = plan.spec(Limits { wall_time: Some(Duration::from_secs(60)), expiry: None });
    assert_eq!(spec.limits.wall_time, Some(Duration::from_secs(60)));
    assert_eq!(spec.label, "hep/tracker simulate #4711");
    let shown = format!("{plan:?} {spec:?} {}", spec.script);
    for secret in ["hunter2", "keycontent", "glcbt-token"] {
        assert!(!shown.contains(secret), "{secret}");
    }
    assert_eq!(env(&plan)["KEYFILE"], "/builds/short/0/hep/tracker.tmp/KEYFILE");
}

#[test]
fn the_same_input_gives_the_same_plan() {
    let mut payload = payload(&[("A", "1"), ("B", "2"), ("BRIDGE_MEM", "1G")]);
    payload.steps = vec![step("script", &["true"]), step("after_script", &["true"])];
    let spec = || {
        let spec = plan(&payload, &runner(), Slot::default()).unwrap().spec(Limits::default());
        let env: Vec<_> =
            spec.env.iter().map(|v| (v.name.clone(), v.value.expose_secret().to_owned())).collect();
        (spec.script, env, spec.options)
    };
    assert_eq!(spec(), spec());
}

#[test]
fn what_steps_say_of_time_and_failure_is_the_servers_matter() {
    let script = |extra: &str| {
        let mut payload = payload(&[]);
        payload.steps = serde_json::from_str(&format!(
            r#"[{{"name": "script", "script": ["true"] {extra}}},
                {{"name": "release", "script": ["true"] {extra}}},
                {{"name": "after_script", "script": ["true"] {extra}}}]"#
        ))
        .unwrap();
        plan(&payload, &runner(), Slot::default()).unwrap().spec(Limits::default()).script
    };
    let plain = script("");
    for extra in [
        r#", "when": "on_failure", "allow_failure": true, "timeout": 1"#,
        r#", "when": "never", "allow_failure": false, "timeout": 0"#,
        r#", "when": null, "allow_failure": null, "timeout": null"#,
    ] {
        assert_eq!(script(extra), plain, "{extra}");
    }
}
