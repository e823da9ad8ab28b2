//! Saying how a job fares.

use super::*;

#[tokio::test]
async fn every_status_of_an_update_has_its_reply() {
    use UpdateReply as R;
    let sixty = Some(Duration::from_secs(60));
    for (code, expected) in [
        (200, R::Accepted { job_status: None }),
        (202, R::NotYet { job_status: None, interval: sixty }),
        (403, R::Ended { status: 403, job_status: None }),
        (404, R::Ended { status: 404, job_status: None }),
        (409, R::Conflict),
        (412, R::Rewind),
        (408, R::Busy { status: 408, retry_after: None }),
        (429, R::Busy { status: 429, retry_after: None }),
        (500, R::Busy { status: 500, retry_after: None }),
        (504, R::Busy { status: 504, retry_after: None }),
        (400, R::Unexpected { status: 400, message: "state is wrong".into() }),
        (401, R::Unexpected { status: 401, message: "state is wrong".into() }),
        (418, R::Unexpected { status: 418, message: "state is wrong".into() }),
    ] {
        let answer = status(code)
            .set_body_json(serde_json::json!({"error": "state is wrong"}))
            .insert_header("X-GitLab-Trace-Update-Interval", "60");
        let server = answering(answer).await;
        let client = client(&server.uri());
        assert_eq!(update(&client, UpdateState::Running).await.unwrap(), expected, "{code}");
        only_request(&server).await;
    }
}

#[tokio::test]
async fn the_jobs_status_outranks_the_code_while_it_runs() {
    for (code, word, ends) in [
        (200, "canceled", true),
        (200, "failed", true),
        (503, "canceled", true),
        (200, "canceling", false),
        (200, "running", false),
        (200, "success", false),
        (200, "from_the_future", false),
    ] {
        let server = answering(status(code).insert_header("Job-Status", word)).await;
        let client = client(&server.uri());
        let job_status = Some(CiStatus::from(word));
        let running = update(&client, UpdateState::Running).await.unwrap();
        let expected = if ends {
            UpdateReply::Ended { status: code, job_status: job_status.clone() }
        } else {
            UpdateReply::Accepted { job_status: job_status.clone() }
        };
        assert_eq!(running, expected, "{word}");
        if code == 200 {
            let last = update(&client, failed("script_failure", None)).await.unwrap();
            assert_eq!(last, UpdateReply::Accepted { job_status }, "our own report: {word}");
        }
    }
}

#[tokio::test]
async fn a_lost_final_answer_shows_as_the_end_with_our_own_status() {
    let answer = status(403)
        .insert_header("Job-Status", "success")
        .set_body_json(serde_json::json!({"message": "403 Forbidden"}));
    let server = answering(answer).await;
    let reply = update(&client(&server.uri()), UpdateState::Success).await.unwrap();
    let job_status = Some(CiStatus::Success);
    assert_eq!(reply, UpdateReply::Ended { status: 403, job_status });
}

#[tokio::test]
async fn an_update_carries_what_gitlab_reads() {
    let output = serde_json::json!({"checksum": "crc32:0000beef", "bytesize": 12});
    for (state, size, expected) in [
        (UpdateState::Running, None, serde_json::json!({"state": "running", "output": {}})),
        (
            UpdateState::Success,
            Some(12),
            serde_json::json!(
                {"state": "success", "output": output, "checksum": "crc32:0000beef"}
            ),
        ),
        (
            failed("script_failure", Some(3)),
            None,
            serde_json::json!(
                {"state": "failed", "failure_reason": "script_failure", "exit_code": 3, "output": {}}
            ),
        ),
        (
            failed("runner_system_failure", Some(0)),
            None,
            serde_json::json!(
                {"state": "failed", "failure_reason": "runner_system_failure", "output": {}}
            ),
        ),
    ] {
        let server = answering(status(200)).await;
        let update = JobUpdate { state, output: size.map(|size| (0xbeef, size)), info: info() };
        let job = JobAuth { id: CiJobId(42), token: &job_token() };
        client(&server.uri()).update_job(job, &update).await.unwrap();
        let request = only_request(&server).await;
        assert_eq!((request.method.as_str(), request.url.path()), ("PUT", "/api/v4/jobs/42"));
        assert_eq!(header(&request, "job-token"), Some(JOB_TOKEN));
        assert_eq!(header(&request, "runner-token"), None);
        assert_eq!(header(&request, "accept"), Some("*/*"), "no JSON is expected");
        let mut body: BTreeMap<String, serde_json::Value> = request.body_json().unwrap();
        assert_eq!(body.remove("token"), Some(JOB_TOKEN.into()));
        assert_eq!(body.remove("info").unwrap()["name"], "bridge");
        assert_eq!(serde_json::to_value(body).unwrap(), expected);
    }
}

#[tokio::test]
async fn status_and_headers_count_even_if_the_body_is_endless_or_cut() {
    let head = "HTTP/1.1 200 OK\r\nJob-Status: running\r\n";
    let accepted = UpdateReply::Accepted { job_status: Some(CiStatus::Running) };
    let endless = format!("{head}\r\n{}", "x".repeat(1 << 20));
    let cut = format!("{head}Content-Length: 99\r\n\r\n200");
    for text in [endless, cut] {
        let server = RawServer::say(text);
        let reply = update(&client(&server.url), UpdateState::Success).await.unwrap();
        assert_eq!(reply, accepted);
    }
}
