//! Answers that point elsewhere.

use super::*;

#[tokio::test]
async fn a_redirect_to_another_server_gets_no_token() {
    let other = answering(status(204)).await;
    for code in [301, 302, 303, 307, 308] {
        let target = format!("{}/elsewhere?token=secret", other.uri());
        let server = answering(status(code).insert_header("Location", target)).await;
        let client = client(&server.uri());
        for error in [ask(&client).await.unwrap_err(), patch(&client).await.unwrap_err()] {
            assert_eq!(error.kind(), ErrorKind::Configuration);
            assert!(shown(&error).contains(&format!("redirect to {}", other.uri())), "{error}");
        }
    }
    assert!(other.received_requests().await.unwrap().is_empty());
}

#[tokio::test]
async fn a_redirect_on_the_same_server_keeps_method_body_and_token() {
    for code in [307, 308] {
        let server = MockServer::start().await;
        Mock::given(path("/api/v4/jobs/42/trace"))
            .respond_with(status(code).insert_header("Location", "/new/place"))
            .mount(&server)
            .await;
        Mock::given(method("PATCH"))
            .and(path("/new/place"))
            .respond_with(status(202))
            .mount(&server)
            .await;
        let reply = patch(&client(&server.uri())).await.unwrap();
        assert!(matches!(reply, PatchReply::Accepted { .. }), "{reply:?}");
        let requests = server.received_requests().await.unwrap();
        assert_eq!(requests.len(), 2);
        assert_eq!(requests[1].body, b"hello");
        assert_eq!(header(&requests[1], "job-token"), Some(JOB_TOKEN));
        assert_eq!(header(&requests[1], "content-range"), Some("5-9"));
    }
}

#[tokio::test]
async fn a_redirect_that_would_turn_a_call_into_a_get_is_not_followed() {
    for code in [301, 302, 303] {
        let server = answering(status(code).insert_header("Location", "/users/sign_in")).await;
        let error = ask(&client(&server.uri())).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Configuration);
        only_request(&server).await;
    }
}

#[tokio::test]
async fn a_circle_of_redirects_ends() {
    let server = answering(status(307).insert_header("Location", "/round")).await;
    let error = ask(&client(&server.uri())).await.unwrap_err();
    assert!(shown(&error).contains("more than 10 redirects"), "{error}");
    assert_eq!(server.received_requests().await.unwrap().len(), 11);
}
