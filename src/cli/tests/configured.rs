//! `bridge runners` on those of the configuration: listed, verified, unregistered.

use super::*;

#[tokio::test]
async fn runners_are_listed_without_asking_gitlab_and_without_their_tokens() {
    let bench = Bench::new().await;
    bench.with_runners(&["one", "second one"]);
    assert_eq!(bench.run("runners list").await.unwrap(), Exit::Done);
    assert_eq!(bench.run("runners list --json").await.unwrap(), Exit::Done);
    let out = bench.out().replace(&format!("{:width$}", "URL", width = 0), "URL");
    let json: Vec<Value> = out
        .lines()
        .filter(|line| line.starts_with('{'))
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(
        json[0],
        json!({"name": "one", "url": "URL", "backend": "here", "limit": 0, "id": null,
               "token": "abcdefghi", "token_expires_at": null})
    );
    let words: Vec<Vec<&str>> = out
        .lines()
        .take(3)
        .map(|l| l.split("  ").map(str::trim).filter(|w| !w.is_empty()).collect())
        .collect();
    assert_eq!(words[0], ["NAME", "URL", "BACKEND", "LIMIT", "ID", "TOKEN"]);
    assert_eq!(words[2], ["second one", "URL", "here", "-", "-", "abcdefghi"]);
    assert!(bench.requests().await.is_empty());
    assert!(!out.contains("jklmnop"), "{out}");
}

#[tokio::test]
async fn verifying_says_of_each_runner_how_it_stands() {
    let bench = Bench::new().await;
    bench.with_runners(&["good", "gone"]);
    bench.write("gone.token", "glrt-gone");
    let gone = ResponseTemplate::new(403).set_body_json(json!({"message": "403 Forbidden"}));
    Mock::given(method("POST"))
        .and(path("/api/v4/runners/verify"))
        .and(wiremock::matchers::body_partial_json(json!({"token": "glrt-gone"})))
        .respond_with(gone)
        .mount(&bench.gitlab)
        .await;
    bench.answer("POST", "/runners/verify", 200, json!({"id": 3})).await;
    assert_eq!(bench.run("runners verify good --json").await.unwrap(), Exit::Done);
    assert_eq!(bench.run("runners verify --json").await.unwrap(), Exit::Gitlab);
    insta::assert_snapshot!(bench.out(), @r#"
    {"name":"good","url":"URL","result":"valid","id":3,"detail":""}
    {"name":"good","url":"URL","result":"valid","id":3,"detail":""}
    {"name":"gone","url":"URL","result":"refused","id":null,"detail":"deleted, or the token was reset"}
    "#);
    let (exit, text) = bench.fails("runners verify nobody").await;
    assert_eq!(exit, Exit::NotFound);
    insta::assert_snapshot!(text, @r#"
    error: cannot find the runner "nobody"
    hint: there are: good, gone
    "#);
}

#[tokio::test]
async fn of_a_runner_made_in_gitlab_only_the_manager_is_removed() {
    let bench = Bench::new().await;
    bench.with_runners(&["one", "two"]);
    bench.answer("DELETE", "/runners/managers", 204, json!(null)).await;
    assert_eq!(bench.run("runners unregister one").await.unwrap(), Exit::Done);
    let body = bench.body(0).await;
    assert_eq!(body["token"], TOKEN);
    assert_eq!(body["system_id"].as_str().unwrap(), bench.read(".runner_system_id"));
    assert!(!bench.path("one.token").exists() && bench.path("two.token").exists());
    let text = bench.read("config.toml");
    assert!(!text.contains("one") && text.contains("name = \"two\""), "{text}");
    assert!(text.starts_with("# ours\n[backends.here]\n"), "{text}");
}

#[tokio::test]
async fn a_runner_of_a_registration_token_is_removed_whole() {
    let bench = Bench::new().await;
    bench.with_runners(&["one"]);
    bench.write("one.token", "glrtr-abc");
    bench.answer("DELETE", "/runners", 204, json!(null)).await;
    bench.run("runners unregister one").await.unwrap();
    assert_eq!(bench.body(0).await, json!({"token": "glrtr-abc"}));
    assert_eq!(config::load_incomplete(&bench.context.config_path).unwrap().runners.len(), 0);
}

#[tokio::test]
async fn a_runner_gitlab_would_not_remove_stays_unless_forced() {
    let bench = Bench::new().await;
    bench.with_runners(&["one"]);
    bench.answer("DELETE", "/runners/managers", 403, json!({"message": "403"})).await;
    let (exit, text) = bench.fails("runners unregister one").await;
    assert_eq!(exit, Exit::Gitlab);
    assert!(text.starts_with("error: cannot unregister \"one\": GitLab does not know"), "{text}");
    assert!(bench.path("one.token").exists());
    assert_eq!(bench.run("runners unregister one --force").await.unwrap(), Exit::Done);
    assert!(!bench.path("one.token").exists());
}
