//! `bridge register`, and the way of a runner from there to its end.

use super::doctor::{doctor, find};
use super::*;
use crate::coordinator::{Coordinator, Options, Registration, RunnerOptions};

#[tokio::test]
async fn an_authentication_token_is_verified_with_all_we_are_and_kept_private() {
    let bench = Bench::new().await;
    let reply = json!({"id": 12, "token": TOKEN, "token_expires_at": null});
    bench.answer("POST", "/runners/verify", 200, reply).await;
    let line = format!("register --url URL/ --token {TOKEN} --name one --backend local --limit 3");
    assert_eq!(bench.run(&line).await.unwrap(), Exit::Done);

    let body = bench.body(0).await;
    assert_eq!(body["token"], TOKEN);
    let system_id = body["system_id"].as_str().unwrap();
    assert_eq!(system_id, bench.read(".runner_system_id"));
    assert_eq!(body["info"]["name"], "bridge");
    assert!(body["info"]["features"].as_object().unwrap().len() > 20, "{body}");

    assert_eq!(bench.read("one.token"), format!("{TOKEN}\n"));
    assert_eq!((bench.mode("one.token"), bench.mode("config.toml")), (0o600, 0o600));
    insta::assert_snapshot!(bench.read("config.toml"));
    let notes = bench.plain(&bench.context.output.kept_notes());
    insta::assert_snapshot!(notes, @r#"
    registered "one" (runner #12 at URL/) on the backend "local"
    configuration: DIR/config.toml
    token: DIR/one.token
    "#);
    assert!(!notes.contains("abcdefghij"), "{notes}");
    let config = config::load(&bench.context.config_path).unwrap();
    assert_eq!((config.runners[0].id, config.runners[0].limit), (Some(12), 3));
}

#[tokio::test]
async fn a_registration_token_registers_with_everything_at_the_top_level() {
    let bench = Bench::new().await;
    let reply =
        json!({"id": 13, "token": "glrtr-new", "token_expires_at": "2026-09-27T21:05:03.203Z"});
    bench.answer("POST", "/runners", 201, reply).await;
    let line = "register --url URL --token GR1348941abc --name two --backend local \
        --description d --tag-list=a,b --run-untagged=false --locked=false --access-level \
        ref_protected --maximum-timeout 1h --paused --maintenance-note m --env A=1 --env B=2 \
        --request-concurrency 2";
    assert_eq!(bench.run(line).await.unwrap(), Exit::Done);
    let mut body = bench.body(0).await;
    body["info"] = json!("…");
    assert_eq!(
        body,
        json!({
            "token": "GR1348941abc", "info": "…", "description": "d", "maintenance_note": "m",
            "tag_list": "a,b", "run_untagged": false, "locked": false,
            "access_level": "ref_protected", "maximum_timeout": 3600, "paused": true
        })
    );
    assert_eq!(bench.read("two.token"), "glrtr-new\n");
    let text = bench.read("config.toml");
    assert!(text.contains("token_expires_at = 2026-09-27T21:05:03.203Z\n"), "{text}");
    assert!(text.contains("environment = [\"A=1\", \"B=2\"]\n"), "{text}");
    config::load(&bench.context.config_path).unwrap();
}

#[tokio::test]
async fn a_plain_registration_has_gitlab_runners_defaults() {
    let bench = Bench::new().await;
    bench.answer("POST", "/runners", 201, json!({"id": 13, "token": "glrtr-new"})).await;
    bench.run("register --url URL --token GR1 --name two --backend local").await.unwrap();
    let mut body = bench.body(0).await;
    body["info"] = json!("…");
    assert_eq!(
        body,
        json!({"token": "GR1", "info": "…", "description": "two", "run_untagged": true,
               "locked": true, "paused": false})
    );
}

#[tokio::test]
async fn settings_of_gitlab_are_refused_with_an_authentication_token() {
    let bench = Bench::new().await;
    let line = format!(
        "register --url URL --token {TOKEN} --name one --backend local --tag-list a --locked"
    );
    let (exit, text) = bench.fails(&line).await;
    assert_eq!(exit, Exit::Usage);
    insta::assert_snapshot!(text, @"
    error: cannot set --tag-list, --locked with a runner's authentication token
    hint: these are settings of the runner in GitLab; change them there, or use --registration-token if this is one
    ");
    assert!(bench.requests().await.is_empty());
}

#[tokio::test]
async fn the_kind_of_token_can_be_said() {
    let bench = Bench::new().await;
    bench.answer("POST", "/runners/verify", 200, json!({"id": 1})).await;
    bench.answer("POST", "/runners", 201, json!({"id": 2, "token": "t"})).await;
    let line = |rest: &str| format!("register --url URL --backend local {rest}");
    bench.run(&line("--token acme-glrt-x --name a")).await.unwrap();
    bench.run(&line("--token whatever --authentication-token --name b")).await.unwrap();
    bench.run(&line("--token glrt-x --registration-token --name c")).await.unwrap();
    let paths: Vec<_> =
        bench.requests().await.iter().map(|request| request.url.path().to_owned()).collect();
    assert_eq!(paths, ["/api/v4/runners/verify", "/api/v4/runners/verify", "/api/v4/runners"]);
}

#[tokio::test]
async fn a_token_from_a_file_never_stands_on_the_command_line() {
    let bench = Bench::new().await;
    bench.answer("POST", "/runners/verify", 200, json!({"id": 1})).await;
    bench.write("from-gitlab", &format!("  {TOKEN}\n"));
    let line = format!(
        "register --url URL --backend local --name a --token-file {}",
        bench.path("from-gitlab")
    );
    bench.run(&line).await.unwrap();
    assert_eq!(bench.body(0).await["token"], TOKEN);
}

#[tokio::test]
async fn a_second_runner_is_appended_and_nothing_else_changes() {
    let bench = Bench::new().await;
    bench.answer("POST", "/runners/verify", 200, json!({"id": 5})).await;
    bench.with_runners(&["old"]);
    let before = bench.read("config.toml");
    bench.run(&format!("register --url URL --token {TOKEN} --name new")).await.unwrap();
    let after = bench.read("config.toml");
    let added = after.strip_prefix(&before).unwrap();
    insta::assert_snapshot!(added, @r#"

    [[runners]]
    name = "new"
    url = "URL"
    backend = "here"
    token_file = "new.token"
    id = 5
    "#);
}

#[tokio::test]
async fn the_same_name_twice_is_refused_before_gitlab_is_asked() {
    let bench = Bench::new().await;
    bench.with_runners(&["old"]);
    let (exit, text) = bench.fails(&format!("register --url URL --token {TOKEN} --name old")).await;
    assert_eq!(exit, Exit::Usage);
    insta::assert_snapshot!(text, @r#"
    error: cannot register "old": a runner of this name is in the configuration
    hint: choose another --name, or remove it first with `bridge runners unregister old`
    "#);
    assert!(bench.requests().await.is_empty());
}

#[tokio::test]
async fn a_refused_token_leaves_no_trace() {
    let bench = Bench::new().await;
    bench.answer("POST", "/runners/verify", 403, json!({"message": "403 Forbidden"})).await;
    let line = format!("register --url URL --token {TOKEN} --name one --backend local");
    let (exit, text) = bench.fails(&line).await;
    assert_eq!(exit, Exit::Gitlab);
    insta::assert_snapshot!(text, @r#"
    error: cannot verify "one": GitLab does not know the token
    hint: look whether the runner was deleted or its token reset, and whether --url is right
    "#);
    assert!(!bench.path("config.toml").exists() && !bench.path("one.token").exists());
}

#[tokio::test]
async fn registration_tokens_switched_off_point_to_the_new_way() {
    let bench = Bench::new().await;
    let reply = json!({"message": "410 Gone", "reason": "runner_registration_disallowed"});
    bench.answer("POST", "/runners", 410, reply).await;
    let (exit, text) =
        bench.fails("register --url URL --token GR1 --name one --backend local").await;
    assert_eq!(exit, Exit::Gitlab);
    insta::assert_snapshot!(text, @r#"
    error: cannot register "one": GitLab has registration tokens switched off
    hint: create the runner in GitLab and use the glrt- token it shows
    "#);
}

#[tokio::test]
async fn what_contradicts_the_configuration_is_found_first() {
    let bench = Bench::new().await;
    let line = |rest: &str| format!("register --token {TOKEN} --name one {rest}");
    let (exit, text) = bench.fails(&line("--url URL")).await;
    assert_eq!(exit, Exit::Configuration);
    insta::assert_snapshot!(text, @"
    error: cannot choose a backend: the configuration has none
    hint: add [backends.NAME] with one of these kinds: local, slurm; or use --backend local
    ");
    bench.with_runners(&["old"]);
    let (exit, text) = bench.fails(&line("--url URL --backend there")).await;
    assert_eq!(exit, Exit::Configuration);
    insta::assert_snapshot!(text, @r#"
    error: cannot find the backend "there"
    hint: there are: here
    "#);
    let (exit, text) = bench.fails(&line("--url gitlab.example.org")).await;
    assert_eq!(exit, Exit::Usage);
    insta::assert_snapshot!(text, @r#"error: cannot register "one": `url` is no URL: relative URL without a base"#);
    let (exit, text) = bench.fails(&line("--url URL --env oops")).await;
    assert_eq!(exit, Exit::Usage);
    insta::assert_snapshot!(text, @r#"error: cannot register "one": `environment` entry 1 is not "NAME=value""#);
    bench.write("config.toml", "concurent = 5\n");
    let (exit, text) = bench.fails(&line("--url URL")).await;
    assert_eq!(exit, Exit::Configuration);
    insta::assert_snapshot!(text, @"error: cannot use the configuration: DIR/config.toml:1: unknown key `concurent` at the top of the file; did you mean `concurrent`?");
    assert!(bench.requests().await.is_empty());
}

#[tokio::test]
async fn a_gitlab_that_is_away_is_no_verdict() {
    let bench = Bench::new().await;
    // Bound and closed again: nobody listens there.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let line = format!(
        "register --url http://127.0.0.1:{port} --token {TOKEN} --name one --backend local"
    );
    let (exit, text) = bench.fails(&line).await;
    assert_eq!(exit, Exit::Gitlab);
    assert!(text.starts_with("error: cannot verify \"one\": POST http://127.0.0.1:"), "{text}");
    assert!(!text.contains(TOKEN) && !bench.path("config.toml").exists());
}

#[tokio::test]
async fn a_runner_made_in_gitlab_comes_and_goes_and_stays_in_gitlab() {
    let bench = Bench::new().await;
    let options = Options { root: "/gitlab".into(), ..Options::default() };
    let gitlab = Coordinator::start(options).await.unwrap();
    let token = gitlab.add_runner(RunnerOptions::default());
    let line =
        format!("register --url {} --token {token} --name one --backend local", gitlab.url());
    assert_eq!(bench.run(&line).await.unwrap(), Exit::Done);
    let managers = gitlab.runner(&token).unwrap().managers;
    assert_eq!(managers.len(), 1);
    assert_eq!(&*managers[0].system_id, bench.read(".runner_system_id"));
    let features = &managers[0].features;
    assert!(features.contains(&"cancel_gracefully".to_owned()), "told at once: {features:?}");

    assert_eq!(bench.run("runners verify").await.unwrap(), Exit::Done);
    let (_exit, findings) = doctor(&bench).await;
    assert_eq!(find(&findings, "token")["result"], "ok");
    assert_eq!(find(&findings, "clock")["result"], "ok");
    assert_eq!(gitlab.runner(&token).unwrap().managers.len(), 1, "one machine, one manager");

    assert_eq!(bench.run("runners unregister one").await.unwrap(), Exit::Done);
    assert_eq!(gitlab.runner(&token).unwrap().managers.len(), 0);
    let (exit, text) = bench.fails("runners verify one").await;
    assert_eq!(exit, Exit::NotFound);
    assert!(text.contains("there are no runners"), "{text}");
    // The doctor's question for the date is none of the runner API, which is all that is played.
    let mut violations = gitlab.violations();
    violations.retain(|violation| !violation.ends_with("GET /version"));
    assert_eq!(violations, Vec::<String>::new());
}

#[tokio::test]
async fn the_local_backend_that_register_adds_would_take_a_job() {
    let mut bench = Bench::new().await;
    bench.context.registry = Registry::builtin();
    bench.answer("POST", "/runners/verify", 200, json!({"id": 5})).await;
    bench
        .run(&format!("register --url URL --token {TOKEN} --name a --backend local"))
        .await
        .unwrap();
    assert_eq!(bench.run("backends check --json").await.unwrap(), Exit::Done, "{}", bench.out());
    let row: Value = serde_json::from_str(bench.out().trim()).unwrap();
    assert_eq!((&row["result"], &row["whose_move"]), (&json!("ok"), &json!("nobody")));
}

#[tokio::test]
async fn a_runner_of_a_registration_token_comes_and_goes_whole() {
    let bench = Bench::new().await;
    let registration = Registration::Allowed("GR1348941secret".into());
    let gitlab = Coordinator::start(Options { registration, ..Options::default() }).await.unwrap();
    let line = |token: &str| {
        format!(
            "register --url {} --token {token} --name one --backend local --paused",
            gitlab.url()
        )
    };
    let (exit, text) = bench.fails(&line("GR1348941wrong")).await;
    assert_eq!(exit, Exit::Gitlab);
    assert!(text.contains("GitLab refused the registration token"), "{text}");
    assert_eq!(bench.run(&line("GR1348941secret")).await.unwrap(), Exit::Done);
    let token = bench.read("one.token").trim().to_owned();
    let runner = gitlab.runner(&token).unwrap();
    assert_eq!((runner.description.as_str(), runner.paused), ("one", true));
    assert_eq!(bench.run("runners unregister one").await.unwrap(), Exit::Done);
    assert_eq!(gitlab.violations(), Vec::<String>::new());
    let again = format!(
        "register --url {} --token {token} --authentication-token --name one --backend local",
        gitlab.url()
    );
    let (exit, text) = bench.fails(&again).await;
    assert_eq!(exit, Exit::Gitlab);
    assert!(text.contains("GitLab does not know the token"), "{text}");
}

#[tokio::test]
async fn a_token_that_was_deleted_meanwhile_is_found_out() {
    let bench = Bench::new().await;
    let gitlab = Coordinator::start(Options::default()).await.unwrap();
    let token = gitlab.add_runner(RunnerOptions::default());
    let line =
        format!("register --url {} --token {token} --name one --backend local", gitlab.url());
    bench.run(&line).await.unwrap();
    gitlab.delete_runner(&token);
    assert_eq!(bench.run("runners verify --json").await.unwrap(), Exit::Gitlab);
    let row: Value = serde_json::from_str(bench.out().trim()).unwrap();
    assert_eq!(row["result"], "refused");
}
