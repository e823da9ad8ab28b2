//! No answer, or nobody's.

use super::*;

#[tokio::test]
async fn html_from_a_proxy_is_not_gitlabs_verdict() {
    for code in [200, 202, 403, 404] {
        let page = "<!DOCTYPE html><title>Access denied</title>";
        let server = answering(status(code).set_body_raw(page, "text/html")).await;
        let client = client(&server.uri());
        for error in [
            ask(&client).await.unwrap_err(),
            update(&client, UpdateState::Running).await.unwrap_err(),
            patch(&client).await.unwrap_err(),
        ] {
            assert_eq!(error.kind(), ErrorKind::Transient);
            assert!(shown(&error).contains("answered"), "{error}");
            assert!(error.to_string().contains("is there a proxy or login page in front?"));
        }
    }
}

#[tokio::test]
async fn a_refused_connection_is_no_answer() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let client = client(&url);
    let error = patch(&client).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Transient);
    let text = shown(&error);
    assert!(text.starts_with(&format!("PATCH {url}/api/v4/jobs/42/trace (request ")), "{text}");
    assert!(text.contains("no connection") && text.contains("refused"), "{text}");
    assert_eq!(error.request_id().unwrap().len(), 32);
}

#[tokio::test]
async fn a_silent_server_is_given_up_after_each_calls_own_time() {
    let server = RawServer::start(vec![Act::Hang, Act::Hang, Act::Hang]);
    let mut options = options(&server.url);
    options.timeouts.call = Duration::from_millis(40);
    options.timeouts.request_head = Duration::from_millis(400);
    let client = Client::new(options).unwrap();
    let started = std::time::Instant::now();
    let error = update(&client, UpdateState::Running).await.unwrap_err();
    assert!(shown(&error).contains("no answer within"), "{error}");
    assert_eq!(error.kind(), ErrorKind::Transient);
    assert!(patch(&client).await.is_err());
    let before = started.elapsed();
    assert_eq!(ask(&client).await.unwrap_err().kind(), ErrorKind::Transient);
    assert!(started.elapsed() - before >= Duration::from_millis(400), "a long poll is waited for");
}

#[tokio::test]
async fn a_connection_that_ends_without_an_answer_is_not_asked_twice() {
    let server = RawServer::say("");
    let error = ask(&client(&server.url)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Transient);
    assert!(shown(&error).contains("without a complete answer"), "{error}");
}

#[tokio::test]
async fn what_is_not_http_is_no_answer() {
    let server = RawServer::say("SSH-2.0-OpenSSH_9.7\r\n");
    let error = update(&client(&server.url), UpdateState::Running).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Transient);
    shown(&error);
}

#[tokio::test]
async fn a_token_no_header_can_carry_is_the_operators_to_mend() {
    let client = client("http://127.0.0.1:1");
    let token = Secret::new("secret\n");
    let error = client.request_job(&token, "s", &info(), None).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Configuration);
    shown(&error);
}
