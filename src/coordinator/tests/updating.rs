//! `PUT /jobs/:id` and `GET /job`.

use super::*;
use crate::coordinator::{EndedBy, Status};

#[tokio::test]
async fn a_failed_job_keeps_reason_and_exit_code() {
    let bed = Bed::new().await;
    let job = bed.take(NewJob::new("build")).await;
    let mut body = output("");
    body["failure_reason"] = json!("script_failure");
    body["exit_code"] = json!(99_999);
    let answer = bed.put(&job, "failed", body).await;
    assert_eq!(header(&answer, "job-status").as_deref(), Some("failed"));
    let view = bed.gitlab.job(job.id).unwrap();
    assert_eq!(view.status, Status::Failed);
    assert_eq!(view.failure_reason.as_deref(), Some("script_failure"));
    assert_eq!(view.exit_code, Some(32_767));
    assert_eq!(view.ended_by, Some(EndedBy::Runner));
    bed.assert_well_behaved();
}

#[tokio::test]
async fn an_unknown_reason_becomes_unknown_failure() {
    let bed = Bed::new().await;
    let job = bed.take(NewJob::new("build")).await;
    let mut body = output("");
    body["failure_reason"] = json!("job_canceled");
    bed.put(&job, "failed", body).await;
    let view = bed.gitlab.job(job.id).unwrap();
    assert_eq!(view.failure_reason.as_deref(), Some("unknown_failure"));
    assert!(bed.violation().contains("`job_canceled` is not listed"));
}

#[tokio::test]
async fn a_reason_must_be_in_the_jobs_own_list() {
    let bed = Bed::new().await;
    let job = bed.take(NewJob::new("build").failure_reasons(["unknown_failure"])).await;
    let mut body = output("");
    body["failure_reason"] = json!("runner_interrupted");
    bed.put(&job, "failed", body).await;
    assert!(bed.violation().contains("`runner_interrupted` is not listed"));
}

#[tokio::test]
async fn the_token_must_be_in_the_body() {
    let bed = Bed::new().await;
    let job = bed.take(NewJob::new("build")).await;
    let answer = bed
        .call(Method::PUT, &format!("/jobs/{}", job.id))
        .header("job-token", &job.token)
        .json(&json!({ "state": "running" }))
        .send()
        .await
        .unwrap();
    assert_eq!(answer.status(), 400);
    assert_eq!(answer.text().await.unwrap(), r#"{"error":"token is missing"}"#);
    assert!(bed.violation().contains("PUT without `token` in the body"));
}

#[tokio::test]
async fn a_wrong_token_is_forbidden_without_a_status() {
    let bed = Bed::new().await;
    let job = bed.take(NewJob::new("build")).await;
    let wrong = Job { token: "glcbt-64_wrong".to_owned(), ..job };
    let answer = bed.put(&wrong, "running", json!({})).await;
    assert_eq!(answer.status(), 403);
    assert_eq!(header(&answer, "job-status"), None);
    assert_eq!(answer.text().await.unwrap(), r#"{"message":"403 Forbidden"}"#);
    assert_eq!(bed.patch(&wrong, 0, "x").await.status(), 403);
}

#[tokio::test]
async fn a_state_that_is_none_is_400() {
    let bed = Bed::new().await;
    let job = bed.take(NewJob::new("build")).await;
    let answer = bed.put(&job, "pending", json!({})).await;
    assert_eq!(answer.status(), 400);
    assert_eq!(answer.text().await.unwrap(), "400");
    assert!(bed.violation().contains("PUT with state `pending`"));
}

#[tokio::test]
async fn nothing_is_taken_after_the_end() {
    let bed = Bed::new().await;
    let job = bed.take(NewJob::new("build")).await;
    bed.succeed(&job, "").await;
    let answer = bed.succeed(&job, "").await;
    assert_eq!(answer.status(), 403);
    assert_eq!(header(&answer, "job-status").as_deref(), Some("success"));
    let expected = r#"{"message":"403 Forbidden - Job is not processing on runner"}"#;
    assert_eq!(answer.text().await.unwrap(), expected);
    bed.assert_well_behaved();
    // The same again, and again, is no longer a closing attempt.
    bed.succeed(&job, "").await;
    bed.assert_well_behaved();
    bed.succeed(&job, "").await;
    assert!(bed.violation().contains("another FinalUpdate after a 403"));
}

#[tokio::test]
async fn a_patch_after_the_final_update_is_a_violation() {
    let bed = Bed::new().await;
    let job = bed.take(NewJob::new("build")).await;
    bed.succeed(&job, "").await;
    assert_eq!(bed.patch(&job, 0, "forgotten").await.status(), 403);
    assert!(bed.violation().contains("PATCH after the accepted final update"));
}

#[tokio::test]
async fn the_final_update_must_fit_the_trace() {
    let bed = Bed::new().await;
    let job = bed.take(NewJob::new("build")).await;
    bed.patch(&job, 0, "hello").await;
    bed.succeed(&job, "hello\n").await;
    assert!(bed.violation().contains("received were 5 with crc32:3610a686"));
}

#[tokio::test]
async fn a_live_trace_is_persisted_before_the_job_ends() {
    let bed = Bed::new().await;
    bed.gitlab.adjust(|knobs| knobs.live_trace = Some(2));
    let job = bed.take(NewJob::new("build")).await;
    for _ in 0..2 {
        let answer = bed.succeed(&job, "").await;
        assert_eq!(answer.status(), 202);
        let interval = header(&answer, "x-gitlab-trace-update-interval");
        assert_eq!(interval.as_deref(), Some("1"));
        assert_eq!(header(&answer, "job-status").as_deref(), Some("running"));
        assert_eq!(answer.text().await.unwrap(), "202");
    }
    assert_eq!(bed.succeed(&job, "").await.status(), 200);
    assert_eq!(bed.gitlab.job(job.id).unwrap().finals, 3);
    bed.assert_well_behaved();
}

#[tokio::test]
async fn the_pauses_of_a_live_trace_grow_up_to_five_minutes() {
    let bed = Bed::new().await;
    bed.gitlab.adjust(|knobs| knobs.live_trace = Some(u32::MAX));
    let job = bed.take(NewJob::new("build")).await;
    let mut seen = Vec::new();
    for step in [0, 4, 4, 8, 16, 32, 64] {
        bed.gitlab.advance(Duration::from_secs(step));
        let answer = bed.succeed(&job, "").await;
        seen.push(header(&answer, "x-gitlab-trace-update-interval").unwrap());
    }
    assert_eq!(seen, ["1", "2", "4", "8", "16", "32", "64"]);
    bed.gitlab.advance(3 * MINUTE);
    assert_eq!(bed.succeed(&job, "").await.status(), 200);
}

#[tokio::test]
async fn a_persisted_trace_ends_the_phase() {
    let bed = Bed::new().await;
    bed.gitlab.adjust(|knobs| knobs.live_trace = Some(u32::MAX));
    let job = bed.take(NewJob::new("build")).await;
    assert_eq!(bed.succeed(&job, "").await.status(), 202);
    bed.gitlab.persist_trace(job.id);
    assert_eq!(bed.succeed(&job, "").await.status(), 200);
}

#[tokio::test]
async fn repetitions_must_be_identical_and_the_first_one_counts() {
    let bed = Bed::new().await;
    bed.gitlab.adjust(|knobs| knobs.live_trace = Some(1));
    let job = bed.take(NewJob::new("build")).await;
    assert_eq!(bed.succeed(&job, "").await.status(), 202);
    let mut body = output("");
    body["failure_reason"] = json!("script_failure");
    assert_eq!(bed.put(&job, "failed", body).await.status(), 200);
    assert_eq!(bed.gitlab.job(job.id).unwrap().status, Status::Success);
    assert!(bed.violation().contains("final update changed"));
}

#[tokio::test]
async fn an_erased_job_is_forbidden() {
    let bed = Bed::new().await;
    let job = bed.take(NewJob::new("build")).await;
    bed.gitlab.erase(job.id);
    let answer = bed.put(&job, "running", json!({})).await;
    assert_eq!(answer.status(), 403);
    assert!(answer.text().await.unwrap().contains("Job has been erased!"));
}

#[tokio::test]
async fn the_token_tells_its_job_while_it_runs() {
    let bed = Bed::new().await;
    let job = bed.take(NewJob::new("build")).await;
    let ask = || bed.call(Method::GET, "/job").header("job-token", &job.token).send();
    let answer = ask().await.unwrap();
    assert_eq!(answer.status(), 200);
    assert_eq!(answer.json::<Value>().await.unwrap()["id"], json!(job.id));
    bed.succeed(&job, "").await;
    assert_eq!(ask().await.unwrap().status(), 401);
}

#[tokio::test]
async fn a_job_without_end_is_named_at_the_end() {
    let bed = Bed::new().await;
    bed.take(NewJob::new("build")).await;
    assert!(bed.gitlab.violations().is_empty());
    assert!(bed.gitlab.final_violations()[0].contains("has no final state"));
}
