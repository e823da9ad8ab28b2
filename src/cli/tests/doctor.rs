//! `bridge doctor`.

use super::*;

/// The findings of `doctor --json`, by check and subject.
pub(super) async fn doctor(bench: &Bench) -> (Exit, Vec<Value>) {
    let before = bench.context.output.kept().len();
    let exit = bench.run("doctor --json").await.unwrap();
    let out = bench.context.output.kept();
    let lines = out.get(before..).unwrap().lines();
    (exit, lines.map(|line| serde_json::from_str(&bench.plain(line)).unwrap()).collect())
}

/// The first finding of a check.
pub(super) fn find<'a>(findings: &'a [Value], check: &str) -> &'a Value {
    findings.iter().find(|finding| finding["check"] == check).unwrap()
}

#[tokio::test]
async fn the_doctor_looks_at_everything_once() {
    let bench = Bench::new().await;
    bench.with_runners(&["one", "two"]);
    bench.answer("POST", "/runners/verify", 200, json!({"id": 3})).await;
    bench.answer("GET", "/version", 401, json!({"message": "401 Unauthorized"})).await;
    let (exit, findings) = doctor(&bench).await;
    // The backend of this test cannot be opened; everything above it is well.
    assert_eq!(exit, Exit::Configuration);
    let checks: Vec<&str> = findings.iter().map(|f| f["check"].as_str().unwrap()).collect();
    assert_eq!(
        checks,
        [
            "configuration",
            "file modes",
            "file modes",
            "file modes",
            "file modes",
            "file system",
            "free disk",
            "key file",
            "clock",
            "token",
            "token",
            "backend"
        ]
    );
    for finding in &findings[..11] {
        assert_ne!(finding["result"], "fail", "{finding}");
    }
    assert_eq!(find(&findings, "token")["detail"], "runner #3");
    assert_eq!(find(&findings, "key file")["detail"], "made at the first start");
    assert_eq!(find(&findings, "clock")["result"], "ok");
    let backend = find(&findings, "backend");
    assert_eq!((&backend["result"], &backend["whose_move"]), (&json!("fail"), &json!("operator")));
}

#[tokio::test]
async fn the_doctor_finds_a_token_gitlab_does_not_know() {
    let bench = Bench::new().await;
    bench.with_runners(&["one"]);
    bench.answer("POST", "/runners/verify", 403, json!({"message": "403"})).await;
    bench.answer("GET", "/version", 401, json!({})).await;
    let (exit, findings) = doctor(&bench).await;
    assert_eq!(exit, Exit::Gitlab);
    let token = find(&findings, "token");
    assert_eq!((&token["result"], &token["whose_move"]), (&json!("fail"), &json!("operator")));
}

#[tokio::test]
async fn the_doctor_finds_a_clock_that_is_wrong() {
    let bench = Bench::new().await;
    bench.with_runners(&["one"]);
    bench.answer("POST", "/runners/verify", 200, json!({"id": 3})).await;
    let late = ResponseTemplate::new(401)
        .insert_header("date", "Sun, 06 Nov 1994 08:49:37 GMT")
        .set_body_json(json!({}));
    Mock::given(method("GET")).respond_with(late).mount(&bench.gitlab).await;
    let (exit, findings) = doctor(&bench).await;
    assert_eq!(exit, Exit::Unexpected);
    let clock = find(&findings, "clock");
    assert!(clock["detail"].as_str().unwrap().ends_with("s ahead of GitLab's"), "{clock}");
}

#[tokio::test]
async fn the_doctor_finds_files_that_others_can_change() {
    let bench = Bench::new().await;
    bench.with_runners(&[]);
    fs::set_permissions(bench.path("config.toml"), fs::Permissions::from_mode(0o666)).unwrap();
    let (exit, findings) = doctor(&bench).await;
    assert_eq!(exit, Exit::Configuration);
    assert_eq!(find(&findings, "configuration")["result"], "fail", "there are no runners");
    assert_eq!(
        find(&findings, "file modes")["detail"],
        "others can write it (mode 0666); run chmod go-w DIR/config.toml"
    );
}

#[tokio::test]
async fn the_doctor_shows_what_is_wrong_with_the_file() {
    let bench = Bench::new().await;
    let (exit, findings) = doctor(&bench).await;
    assert_eq!((exit, findings.len()), (Exit::Configuration, 1));
    assert_eq!(
        findings[0]["detail"],
        "DIR/config.toml: no such file (name the file with --config or $BRIDGE_CONFIG, or make \
         one with `bridge register`)"
    );
}
