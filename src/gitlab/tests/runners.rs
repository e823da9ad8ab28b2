//! Calls about runners.

use super::*;

#[tokio::test]
async fn every_status_of_a_verification_has_its_reply() {
    use VerifyReply as R;
    let expires_at = Some("2026-09-27T21:05:03.203Z".parse().unwrap());
    let good =
        r#"{"id":12345,"token":"glrt-secret","token_expires_at":"2026-09-27T21:05:03.203Z"}"#;
    for (code, body, expected) in [
        (200, good, R::Valid { id: Some(12345), expires_at }),
        (200, "200", R::Valid { id: None, expires_at: None }),
        (200, r#"{"id":1,"token_expires_at":null}"#, R::Valid { id: Some(1), expires_at: None }),
        (200, r#"{"id":1,"token_expires_at":"soon"}"#, R::Valid { id: Some(1), expires_at: None }),
        (403, "{}", R::Refused),
        (422, "{}", R::Orphaned),
        (429, "{}", R::Unclear(Unclear::Busy { status: 429, retry_after: None })),
        (500, "{}", R::Unclear(Unclear::Busy { status: 500, retry_after: None })),
        (
            400,
            r#"{"error":"bad"}"#,
            R::Unclear(Unclear::Unexpected { status: 400, message: "bad".into() }),
        ),
    ] {
        let server = answering(status(code).set_body_string(body)).await;
        let client = client(&server.uri());
        let reply = client.verify_runner(&token(), "s_0123456789ab", &info()).await.unwrap();
        assert_eq!(reply, expected, "{code} {body}");
        let request = only_request(&server).await;
        assert_eq!(request.url.path(), "/api/v4/runners/verify");
        let body: serde_json::Value = request.body_json().unwrap();
        assert_eq!((&body["token"], &body["system_id"]), (&TOKEN.into(), &"s_0123456789ab".into()));
        assert_eq!(body["info"]["features"]["cancel_gracefully"], true);
    }
}

#[tokio::test]
async fn a_registration_says_only_what_was_chosen() {
    let body = serde_json::json!({"id": 1, "token": "glrtr-secret", "token_expires_at": null});
    let server = answering(status(201).set_body_json(body)).await;
    let clock = ManualClock::new("2026-08-01T12:00:00.75Z".parse().unwrap());
    let client =
        Client::new(ClientOptions { clock: Arc::new(clock), ..options(&server.uri()) }).unwrap();
    let registration = Registration {
        description: "cluster".into(),
        tags: vec!["slurm".into(), "gpu".into()],
        ..Registration::default()
    };
    let (token, info) = (Secret::new("GR1348941secret"), info());
    let reply = client.register_runner(&token, &info, &registration).await.unwrap();
    assert!(!format!("{reply:?}").contains("secret"));
    let RegisterReply::Registered(runner) = reply else { panic!("{reply:?}") };
    assert_eq!((runner.id, runner.token.expose()), (Some(1), "glrtr-secret"));
    assert_eq!(runner.expires_at, None);
    assert_eq!(runner.obtained_at.to_string(), "2026-08-01T12:00:00Z");
    let mut sent: BTreeMap<String, serde_json::Value> =
        only_request(&server).await.body_json().unwrap();
    sent.remove("info").unwrap();
    let expected = serde_json::json!({"token": "GR1348941secret", "description": "cluster",
        "tag_list": "slurm,gpu", "run_untagged": false, "locked": true, "paused": false});
    assert_eq!(serde_json::to_value(sent).unwrap(), expected);
}

#[tokio::test]
async fn every_refusal_of_a_registration_has_its_reply() {
    for (code, expected) in [
        (400, r#"Invalid { message: "why" }"#),
        (403, r#"Refused { message: "why" }"#),
        (410, "Disallowed"),
        (503, "Unclear(Busy { status: 503, retry_after: None })"),
        (200, r#"Unclear(Unexpected { status: 200, message: "why" })"#),
    ] {
        let answer = status(code).set_body_json(serde_json::json!({"message": "why"}));
        let server = answering(answer).await;
        let client = client(&server.uri());
        let reply = client.register_runner(&token(), &info(), &Registration::default()).await;
        assert_eq!(format!("{:?}", reply.unwrap()), expected);
    }
}

#[tokio::test]
async fn removing_names_the_manager_only_where_one_is_meant() {
    let server = answering(status(204)).await;
    let client = client(&server.uri());
    assert_eq!(client.unregister_runner(&token()).await.unwrap(), UnregisterReply::Done);
    let reply = client.unregister_manager(&token(), "s_0123456789ab").await.unwrap();
    assert_eq!(reply, UnregisterReply::Done);
    let requests = server.received_requests().await.unwrap();
    let sent = |n: usize| -> (String, serde_json::Value) {
        assert_eq!(requests[n].method.as_str(), "DELETE");
        (requests[n].url.path().to_owned(), requests[n].body_json().unwrap())
    };
    assert_eq!(sent(0), ("/api/v4/runners".into(), serde_json::json!({"token": TOKEN})));
    let body = serde_json::json!({"token": TOKEN, "system_id": "s_0123456789ab"});
    assert_eq!(sent(1), ("/api/v4/runners/managers".into(), body));
}

#[tokio::test]
async fn every_status_of_a_removal_has_its_reply() {
    use UnregisterReply as R;
    for (code, expected) in [
        (403, R::Refused),
        (404, R::Unknown),
        (502, R::Unclear(Unclear::Busy { status: 502, retry_after: None })),
        (400, R::Unclear(Unclear::Unexpected { status: 400, message: String::new() })),
    ] {
        let server = answering(status(code)).await;
        assert_eq!(client(&server.uri()).unregister_runner(&token()).await.unwrap(), expected);
    }
}

#[tokio::test]
async fn a_token_is_exchanged_and_an_answer_without_one_is_unreadable() {
    let expires = "2026-09-27T21:05:03.203Z";
    let body = serde_json::json!({"token": "glrt-secret", "token_expires_at": expires});
    let server = answering(status(201).set_body_json(body)).await;
    let reply = client(&server.uri()).reset_token(&token()).await.unwrap();
    let ResetReply::Done(new) = reply else { panic!("{reply:?}") };
    assert_eq!(new.token.expose(), "glrt-secret");
    assert_eq!(new.expires_at, Some(expires.parse().unwrap()));
    let request = only_request(&server).await;
    assert_eq!(header(&request, "runner-token"), None);
    assert_eq!(request.url.path(), "/api/v4/runners/reset_authentication_token");
    for body in ["{}", "", r#"{"token":null}"#, r#"{"token":["glrt-secret"]}"#] {
        let server = answering(status(201).set_body_raw(body, "application/json")).await;
        let error = client(&server.uri()).reset_token(&token()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Refused, "{body}");
        shown(&error);
    }
    let busy = "Unclear(Busy { status: 500, retry_after: None })";
    for (code, expected) in [(403, "Refused"), (500, busy)] {
        let server = answering(status(code)).await;
        let reply = client(&server.uri()).reset_token(&token()).await.unwrap();
        assert_eq!(format!("{reply:?}"), expected);
    }
}
