//! The Runners API's client against made-up answers: refusals, pages, what is sent.

use serde_json::{Value, json};
use wiremock::matchers::{method, path, query_param, query_param_is_missing};
use wiremock::{Mock, MockServer, Request, ResponseTemplate};

use super::*;
use crate::gitlab::ClientOptions;

async fn server() -> MockServer {
    drop(rustls::crypto::ring::default_provider().install_default());
    MockServer::start().await
}

fn api(server: &MockServer) -> Api {
    let options = ClientOptions::new(server.uri().parse().unwrap());
    Api::new(Client::new(options).unwrap(), Secret::new("glpat-secret"))
}

async fn answering(status: u16, body: Value) -> MockServer {
    let server = server().await;
    let answer = ResponseTemplate::new(status).set_body_json(body);
    Mock::given(wiremock::matchers::any()).respond_with(answer).mount(&server).await;
    server
}

async fn requests(server: &MockServer) -> Vec<Request> {
    server.received_requests().await.unwrap()
}

#[tokio::test]
async fn a_runner_is_created_with_an_access_token() {
    let body = json!({"id": 9171, "token": "glrt-secret", "token_expires_at": null});
    let server = answering(201, body).await;
    let runner = NewRunner {
        runner_type: "project_type".into(),
        project_id: Some(7),
        ..NewRunner::default()
    };
    let reply = api(&server).create(&runner).await.unwrap();
    let ApiReply::Done(credentials) = reply else { panic!("{reply:?}") };
    assert_eq!(credentials.id, Some(9171));
    assert!(!format!("{credentials:?}").contains("glrt-secret"));
    let request = requests(&server).await.remove(0);
    assert_eq!(request.headers.get("private-token").unwrap(), "glpat-secret");
    assert_eq!(request.url.path(), "/api/v4/user/runners");
    let sent: Value = request.body_json().unwrap();
    assert_eq!(sent, json!({"runner_type": "project_type", "project_id": 7}));
}

#[tokio::test]
async fn every_refusal_says_whose_move_it_is() {
    let scope = json!({
        "error": "insufficient_scope", "error_description": "…", "scope": "api create_runner",
    });
    for (status, body, expected) in [
        (400, json!({"message": {"tag_list": ["bad"]}}), "GitLab refused: tag_list: bad"),
        (401, json!({"message": "401 Unauthorized"}), "GitLab does not know the access token"),
        (403, scope, "the access token lacks a scope (one of: api, create_runner)"),
        (
            403,
            json!({"message": "403 Forbidden - Runner is locked"}),
            "GitLab forbids it: 403 Forbidden - Runner is locked",
        ),
        (404, json!({"message": "404 Runner Not Found"}), "GitLab has none: 404 Runner Not Found"),
        (429, json!({}), "GitLab is busy (429)"),
        (502, json!({}), "GitLab is busy (502)"),
        (418, json!({"message": "tea"}), "GitLab answered 418: tea"),
    ] {
        let server = answering(status, body).await;
        let reply = api(&server).runner(1).await.unwrap();
        let ApiReply::Refused(refusal) = reply else { panic!("{reply:?}") };
        assert_eq!(refusal.to_string(), expected);
    }
}

#[tokio::test]
async fn pages_are_followed_by_link_and_by_number_and_no_further_than_asked() {
    let server = server().await;
    let page =
        |from: i64| json!((from..from + 100).map(|id| json!({"id": id})).collect::<Vec<_>>());
    // The host in the link is the one that GitLab believes in; the token must not follow it there.
    let link =
        "<https://elsewhere.invalid/api/v4/runners/3/jobs?cursor=abc&per_page=100>; rel=\"next\"";
    Mock::given(path("/api/v4/runners/3/jobs"))
        .and(query_param_is_missing("cursor"))
        .respond_with(ResponseTemplate::new(200).set_body_json(page(0)).insert_header("link", link))
        .mount(&server)
        .await;
    Mock::given(path("/api/v4/runners/3/jobs"))
        .and(query_param("cursor", "abc"))
        .respond_with(ResponseTemplate::new(200).set_body_json(page(100)))
        .mount(&server)
        .await;
    let reply = api(&server).jobs(3, &JobFilter::default(), 1000).await.unwrap();
    let ApiReply::Done(listed) = reply else { panic!("{reply:?}") };
    assert_eq!((listed.items.len(), listed.more), (200, false));
    assert_eq!(listed.items[150].id, 150);
    let first = requests(&server).await.remove(0);
    assert_eq!(first.url.query(), Some("order_by=id&sort=desc&pagination=keyset&per_page=100"));

    Mock::given(path("/api/v4/runners"))
        .respond_with(
            ResponseTemplate::new(200).set_body_json(page(0)).insert_header("x-next-page", "2"),
        )
        .mount(&server)
        .await;
    let reply = api(&server).runners(&Whose::Owned, &RunnerFilter::default(), 250).await.unwrap();
    let ApiReply::Done(listed) = reply else { panic!("{reply:?}") };
    // The server says "2" for ever: the circle is noticed.
    assert_eq!((listed.items.len(), listed.more), (200, false));
    let asked = requests(&server).await;
    assert_eq!(asked.last().unwrap().url.query(), Some("per_page=100&page=2"));
    let reply = api(&server).runners(&Whose::Owned, &RunnerFilter::default(), 7).await.unwrap();
    let ApiReply::Done(listed) = reply else { panic!("{reply:?}") };
    assert_eq!((listed.items.len(), listed.more), (7, true));
}

#[tokio::test]
async fn filters_and_paths_are_written_as_gitlab_reads_them() {
    let server = server().await;
    let empty = ResponseTemplate::new(200).set_body_json(json!([]));
    Mock::given(method("GET")).respond_with(empty).mount(&server).await;
    let filter = RunnerFilter {
        scope: None,
        runner_type: Some("group_type".into()),
        status: Some("online".into()),
        paused: Some(false),
        tags: vec!["a b".into(), "c".into()],
        version_prefix: Some("17.".into()),
    };
    let api = api(&server);
    for whose in [
        Whose::All,
        Whose::Project("hep/sub.group/tracker".into()),
        Whose::Group("9".into()),
        Whose::Project("..".into()),
    ] {
        api.runners(&whose, &filter, 10).await.unwrap();
    }
    let asked = requests(&server).await;
    let paths: Vec<&str> = asked.iter().map(|request| request.url.path()).collect();
    assert_eq!(
        paths,
        [
            "/api/v4/runners/all",
            "/api/v4/projects/hep%2Fsub.group%2Ftracker/runners",
            "/api/v4/groups/9/runners",
            "/api/v4/projects/%252E%252E/runners",
        ]
    );
    assert_eq!(
        asked[0].url.query(),
        Some(
            "type=group_type&status=online&paused=false&tag_list=a+b%2Cc&version_prefix=17.\
             &per_page=100"
        )
    );
}

#[tokio::test]
async fn a_change_sends_what_is_changed_and_nothing_else() {
    let body = json!({"id": 6, "description": "d", "tag_list": null, "paused": true});
    let server = answering(200, body).await;
    let change = RunnerChange {
        tag_list: Some(Vec::new()),
        paused: Some(true),
        maximum_timeout: Some(3600),
        ..RunnerChange::default()
    };
    let reply = api(&server).change(6, &change).await.unwrap();
    let ApiReply::Done(details) = reply else { panic!("{reply:?}") };
    assert_eq!((details.summary.id, details.summary.paused), (6, true));
    let request = requests(&server).await.remove(0);
    assert_eq!((request.method.as_str(), request.url.path()), ("PUT", "/api/v4/runners/6"));
    let sent: Value = request.body_json().unwrap();
    assert_eq!(sent, json!({"tag_list": [], "paused": true, "maximum_timeout": 3600}));
}

#[tokio::test]
async fn deleting_and_disabling_need_no_body_and_enabling_names_the_runner() {
    let server = answering(204, json!(null)).await;
    let api = api(&server);
    assert_eq!(api.delete(6).await.unwrap(), ApiReply::Done(()));
    assert_eq!(api.disable("hep/x", 6).await.unwrap(), ApiReply::Done(()));
    let asked = requests(&server).await;
    for request in &asked {
        assert_eq!((request.method.as_str(), request.body.len()), ("DELETE", 0));
    }
    assert_eq!(asked[1].url.path(), "/api/v4/projects/hep%2Fx/runners/6");
    let server = answering(201, json!({"id": 6})).await;
    let reply = self::api(&server).enable("7", 6).await.unwrap();
    assert!(matches!(reply, ApiReply::Done(RunnerSummary { id: 6, .. })), "{reply:?}");
    let sent: Value = requests(&server).await.remove(0).body_json().unwrap();
    assert_eq!(sent, json!({"runner_id": 6}));
}

#[tokio::test]
async fn a_new_token_without_a_token_in_it_cannot_be_read() {
    let server = answering(201, json!({"token_expires_at": null})).await;
    let error = api(&server).reset_token(4).await.unwrap_err();
    assert!(error.may_have_arrived(), "{error}");
    let request = requests(&server).await.remove(0);
    assert_eq!(request.url.path(), "/api/v4/runners/4/reset_authentication_token");
}
