//! Appending to a trace.

use super::*;

#[tokio::test]
async fn every_status_of_a_patch_has_its_reply() {
    use PatchReply as R;
    let running = Some(CiStatus::Running);
    for (code, expected) in [
        (
            202,
            R::Accepted {
                end: Some(10),
                job_status: running.clone(),
                interval: Some(Duration::from_secs(3)),
            },
        ),
        (416, R::Range { end: 10, job_status: running.clone() }),
        (403, R::Ended { status: 403, job_status: running.clone() }),
        (404, R::Ended { status: 404, job_status: running.clone() }),
        (413, R::TooLarge),
        (408, R::Busy { status: 408, retry_after: Some(Duration::from_secs(9)) }),
        (429, R::Busy { status: 429, retry_after: Some(Duration::from_secs(9)) }),
        (500, R::Busy { status: 500, retry_after: Some(Duration::from_secs(9)) }),
        (400, R::Unexpected { status: 400, message: "no range".into() }),
        (200, R::Unexpected { status: 200, message: "no range".into() }),
    ] {
        let answer = status(code)
            .set_body_string("no range")
            .insert_header("Range", "0-10")
            .insert_header("Retry-After", "9")
            .insert_header("Job-Status", "running")
            .insert_header("X-GitLab-Trace-Update-Interval", "3");
        let server = answering(answer).await;
        assert_eq!(patch(&client(&server.uri())).await.unwrap(), expected, "{code}");
        only_request(&server).await;
    }
}

#[tokio::test]
async fn a_416_without_a_length_means_the_beginning() {
    for range in [None, Some("nonsense")] {
        let answer = status(416);
        let answer = match range {
            Some(range) => answer.insert_header("Range", range),
            None => answer,
        };
        let server = answering(answer).await;
        let reply = patch(&client(&server.uri())).await.unwrap();
        assert_eq!(reply, PatchReply::Range { end: 0, job_status: None });
    }
}

#[tokio::test]
async fn a_patch_of_a_cancelled_job_is_its_end() {
    for code in [202, 403, 416] {
        let server = answering(status(code).insert_header("Job-Status", "canceled")).await;
        let reply = patch(&client(&server.uri())).await.unwrap();
        let job_status = Some(CiStatus::Canceled);
        assert_eq!(reply, PatchReply::Ended { status: code, job_status });
    }
}

#[tokio::test]
async fn a_patch_carries_the_bytes_and_where_they_belong() {
    for (debug_trace, query) in [(false, "debug_trace=false"), (true, "debug_trace=true")] {
        let server = answering(status(202)).await;
        let bytes = Bytes::from_static(b"h\xff\0\nllo");
        let job = JobAuth { id: CiJobId(42), token: &job_token() };
        let client = client(&server.uri());
        client.patch_trace(job, 1000, bytes.clone(), debug_trace).await.unwrap();
        let request = only_request(&server).await;
        let place = (request.method.as_str(), request.url.path());
        assert_eq!(place, ("PATCH", "/api/v4/jobs/42/trace"));
        assert_eq!(request.url.query(), Some(query));
        assert_eq!(header(&request, "content-range"), Some("1000-1006"));
        assert_eq!(header(&request, "content-type"), Some("text/plain"));
        assert_eq!(header(&request, "job-token"), Some(JOB_TOKEN));
        assert_eq!(request.body, bytes);
    }
}

#[tokio::test]
async fn nothing_is_not_appended() {
    let server = answering(status(202)).await;
    let job = JobAuth { id: CiJobId(42), token: &job_token() };
    let reply = client(&server.uri()).patch_trace(job, 0, Bytes::new(), false).await;
    assert_eq!(reply.unwrap_err().kind(), ErrorKind::Refused);
    assert!(server.received_requests().await.unwrap().is_empty());
}
