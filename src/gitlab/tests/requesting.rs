//! Asking for a job: every status, and bodies that are not what they should be.

use super::*;

#[tokio::test]
async fn every_status_of_a_request_for_a_job_has_its_reply() {
    for (code, expected) in [
        (204, "NoJob { last_update: None }"),
        (400, "BadRequest"),
        (403, "Refused"),
        (409, "Conflict"),
        (413, "TooLarge"),
        (422, "Orphaned"),
        (408, "Busy { status: 408, retry_after: None }"),
        (429, "Busy { status: 429, retry_after: None }"),
        (500, "Busy { status: 500, retry_after: None }"),
        (502, "Busy { status: 502, retry_after: None }"),
        (503, "Busy { status: 503, retry_after: None }"),
        (599, "Busy { status: 599, retry_after: None }"),
        (200, "Unexpected { status: 200 }"),
        (401, "Unexpected { status: 401 }"),
        (404, "Unexpected { status: 404 }"),
        (410, "Unexpected { status: 410 }"),
    ] {
        let server = answering(status(code)).await;
        let reply = ask(&client(&server.uri())).await.unwrap();
        assert_eq!(format!("{reply:?}"), expected, "{code}");
        only_request(&server).await;
    }
}

#[tokio::test]
async fn a_request_for_a_job_carries_what_gitlab_reads() {
    let server = answering(status(204)).await;
    ask(&client(&format!("{}/gitlab/ci/", server.uri()))).await.unwrap();
    let request = only_request(&server).await;
    assert_eq!(request.method.as_str(), "POST");
    assert_eq!(request.url.path(), "/gitlab/api/v4/jobs/request");
    assert_eq!(header(&request, "runner-token"), Some(TOKEN));
    assert_eq!(header(&request, "content-type"), Some("application/json"));
    assert_eq!(header(&request, "accept"), Some("application/json"));
    assert!(header(&request, "user-agent").unwrap().starts_with("bridge "));
    assert_eq!(header(&request, "x-request-id").unwrap().len(), 32);
    let body: serde_json::Value = request.body_json().unwrap();
    assert_eq!(body["token"], TOKEN);
    assert_eq!(body["system_id"], "s_0123456789ab");
    assert_eq!(body["last_update"], "before");
    assert_eq!(body["info"]["features"]["cancel_gracefully"], true);
    assert!(body.get("session").is_none());
}

#[tokio::test]
async fn an_unknown_last_update_is_not_sent_and_a_new_one_is_told() {
    let answer = status(204).insert_header("X-GitLab-Last-Update", "after");
    let server = answering(answer).await;
    let client = client(&server.uri());
    for unknown in [None, Some("")] {
        let reply = client.request_job(&token(), "s_0123456789ab", &info(), unknown).await;
        let RequestReply::NoJob { last_update } = reply.unwrap() else { panic!() };
        assert_eq!(last_update.as_deref(), Some("after"));
    }
    for request in server.received_requests().await.unwrap() {
        let body: serde_json::Value = request.body_json().unwrap();
        assert!(body.get("last_update").is_none());
    }
}

#[tokio::test]
async fn a_job_comes_with_its_text_as_received() {
    for content_type in ["application/json", "text/plain"] {
        let answer = status(201)
            .set_body_raw(JOB, content_type)
            .insert_header("X-Request-Id", "01J-gitlab's-own");
        let server = answering(answer).await;
        let reply = ask(&client(&server.uri())).await.unwrap();
        assert!(!format!("{reply:?}").contains("secret"));
        let RequestReply::Job(job) = reply else { panic!("{reply:?}") };
        assert_eq!(job.raw.expose(), JOB);
        assert_eq!(job.payload.id, 42);
        assert_eq!(job.payload.job_info.name, "build");
        assert_eq!(job.payload.token.expose(), JOB_TOKEN);
        assert_eq!(job.request_id, "01J-gitlab's-own");
    }
}

#[tokio::test]
async fn a_job_with_broken_characters_is_still_a_job() {
    let mut body = br#"{"id":42,"token":"t","job_info":{"name":"b"#.to_vec();
    body.extend_from_slice(b"\xff\"}}");
    let server = answering(status(201).set_body_raw(body, "application/json")).await;
    let reply = ask(&client(&server.uri())).await.unwrap();
    let RequestReply::Job(job) = reply else { panic!("{reply:?}") };
    assert_eq!(job.payload.job_info.name, "b\u{fffd}");
}

async fn undecodable(answer: ResponseTemplate) -> Undecodable {
    let server = answering(answer).await;
    let reply = ask(&client(&server.uri())).await.unwrap();
    assert!(!format!("{reply:?}").contains("secret"));
    let RequestReply::Undecodable(found) = reply else { panic!("{reply:?}") };
    assert!(!found.error.contains("secret"), "{}", found.error);
    *found
}

#[tokio::test]
async fn a_job_of_odd_types_keeps_its_name_and_proof() {
    let body = format!(
        r#"{{"id":"42","git_info":"secret","job_info":{{"id":1,"token":"x"}},"token":"{JOB_TOKEN}"}}"#
    );
    let found = undecodable(status(201).set_body_raw(body.clone(), "application/json")).await;
    assert_eq!(found.id, Some(42));
    assert_eq!(found.token.unwrap().expose(), JOB_TOKEN);
    assert_eq!(found.raw.expose(), body);
    assert!(found.error.contains("unexpected type"), "{}", found.error);
}

#[tokio::test]
async fn a_201_without_a_job_in_it_is_told_as_such() {
    for body in ["", "null", "[]", "{}", r#"{"id":42}"#, r#"{"id":null,"token":"t"}"#, "nonsense"] {
        let found = undecodable(status(201).set_body_raw(body, "application/json")).await;
        assert!(found.id.is_none() || found.token.is_none(), "{body}");
        assert_eq!(found.raw.expose(), body);
    }
    let page = "<!DOCTYPE html><title>Sign in</title>";
    let found = undecodable(status(201).set_body_raw(page, "text/html")).await;
    assert!(found.error.contains("HTML"), "{}", found.error);
    assert!(found.id.is_none());
}

#[tokio::test]
async fn a_job_whose_text_breaks_off_keeps_its_name_and_proof() {
    let cut = JOB.split_once("variables").unwrap().0;
    let head = "HTTP/1.1 201 Created\r\nContent-Type: application/json\r\n";
    let server = RawServer::say(format!("{head}Content-Length: 9999\r\n\r\n{cut}"));
    let reply = ask(&client(&server.url)).await.unwrap();
    let RequestReply::Undecodable(found) = reply else { panic!("{reply:?}") };
    assert_eq!(found.id, Some(42));
    assert_eq!(found.token.unwrap().expose(), JOB_TOKEN);
    assert_eq!(found.raw.expose(), cut);
    assert!(found.error.contains("without a complete answer"), "{}", found.error);
}

#[tokio::test]
async fn a_whole_job_counts_even_if_its_answer_breaks_off() {
    let head = "HTTP/1.1 201 Created\r\nTransfer-Encoding: chunked\r\n";
    let server = RawServer::say(format!("{head}\r\n{:x}\r\n{JOB}\r\n", JOB.len()));
    let reply = ask(&client(&server.url)).await.unwrap();
    let RequestReply::Job(job) = reply else { panic!("{reply:?}") };
    assert_eq!(job.raw.expose(), JOB);
}

#[tokio::test]
async fn half_a_number_is_no_name() {
    let head = "HTTP/1.1 201 Created\r\nContent-Length: 9999\r\n\r\n";
    let server = RawServer::say(format!(r#"{head}{{"token":"t","id":4"#));
    let reply = ask(&client(&server.url)).await.unwrap();
    let RequestReply::Undecodable(found) = reply else { panic!("{reply:?}") };
    assert_eq!(found.id, None);
}

#[tokio::test]
async fn a_job_whose_text_stalls_keeps_its_name_and_proof() {
    let head = "HTTP/1.1 201 Created\r\nContent-Length: 9999\r\n\r\n";
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut options = options(&format!("http://{}", listener.local_addr().unwrap()));
    options.timeouts.idle = Duration::from_millis(50);
    let (over, is_over) = mpsc::channel::<()>();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        read_request(&mut stream);
        write!(stream, r#"{head}{{"id":42,"token":"t","#).unwrap();
        is_over.recv().unwrap_err();
    });
    let reply = ask(&Client::new(options).unwrap()).await.unwrap();
    drop(over);
    server.join().unwrap();
    let RequestReply::Undecodable(found) = reply else { panic!("{reply:?}") };
    assert_eq!(found.id, Some(42));
    assert!(found.token.is_some());
}

#[tokio::test]
async fn a_job_without_end_is_not_read_to_the_end() {
    let mut bytes = b"HTTP/1.1 201 Created\r\n\r\n{\"id\":42,\"token\":\"t\",\"x\":\"".to_vec();
    bytes.resize(66 << 20, b'a');
    let server = RawServer::say(bytes);
    let reply = ask(&client(&server.url)).await.unwrap();
    let RequestReply::Undecodable(found) = reply else { panic!("{reply:?}") };
    assert_eq!(found.id, Some(42));
    assert_eq!(found.raw.expose().len(), 1 << 20);
    assert!(found.error.contains("larger than"), "{}", found.error);
}

#[tokio::test]
async fn a_busy_server_says_until_when() {
    let clock = ManualClock::new("2026-08-01T12:00:00Z".parse().unwrap());
    let answer = status(429).insert_header("RateLimit-ResetTime", "Sat, 01 Aug 2026 12:00:30 GMT");
    let server = answering(answer).await;
    let client =
        Client::new(ClientOptions { clock: Arc::new(clock), ..options(&server.uri()) }).unwrap();
    let wait = Some(Duration::from_secs(30));
    let reply = ask(&client).await.unwrap();
    assert!(
        matches!(reply, RequestReply::Busy { status: 429, retry_after } if retry_after == wait)
    );
    let busy = UpdateReply::Busy { status: 429, retry_after: wait };
    assert_eq!(update(&client, UpdateState::Success).await.unwrap(), busy);
    assert_eq!(patch(&client).await.unwrap(), PatchReply::Busy { status: 429, retry_after: wait });
}
