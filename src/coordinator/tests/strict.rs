//! What a strict server refuses, and what it leaves as it was when it does.

use super::*;
use crate::coordinator::{Registration, Status};

#[tokio::test]
async fn a_request_without_a_token_is_400() {
    let bed = Bed::new().await;
    let id = bed.gitlab.enqueue(NewJob::new("build"));
    for body in [json!({}), json!({ "token": "" }), json!({ "token": null, "info": bed.info() })] {
        let answer = bed.call(Method::POST, "/jobs/request").json(&body).send().await.unwrap();
        assert_eq!(answer.status(), 400, "{body}");
        assert_eq!(answer.text().await.unwrap(), r#"{"error":"token is missing"}"#);
    }
    assert_eq!(bed.gitlab.job(id).unwrap().status, Status::Pending);
}

#[tokio::test]
async fn a_request_with_an_info_that_is_none_costs_no_job() {
    let bed = Bed::new().await;
    let id = bed.gitlab.enqueue(NewJob::new("build"));
    for info in [json!("bridge"), json!(7), json!({ "version": 7 }), json!({ "features": "all" })] {
        let body = json!({ "token": bed.token, "info": info });
        let answer = bed.call(Method::POST, "/jobs/request").json(&body).send().await.unwrap();
        assert_eq!(answer.status(), 400, "{body}");
    }
    assert_eq!(bed.gitlab.job(id).unwrap().status, Status::Pending);
    assert_eq!(bed.ask().await.status(), 201, "it is still there");
}

#[tokio::test]
async fn a_trace_comes_in_pieces_and_each_answer_tells_the_length() {
    let bed = Bed::new().await;
    let job = bed.take(NewJob::new("build")).await;
    let mut trace = String::new();
    for piece in ["first\n", "second, längere\n", "third\n"] {
        let answer = bed.patch(&job, trace.len(), piece).await;
        trace.push_str(piece);
        assert_eq!(answer.status(), 202);
        assert_eq!(header(&answer, "range"), Some(format!("0-{}", trace.len())));
    }
    assert_eq!(bed.gitlab.job(job.id).unwrap().trace_text(), trace);
}

#[tokio::test]
async fn a_patch_is_asked_for_its_token_before_its_range() {
    let bed = Bed::new().await;
    let job = bed.take(NewJob::new("build")).await;
    let path = format!("/jobs/{}/trace", job.id);
    for token in [None, Some("glcbt-64_wrong")] {
        for range in [None, Some("5-2"), Some("a-b"), Some("0-2")] {
            let mut call = bed.call(Method::PATCH, &path).header("content-type", "text/plain");
            call = token.into_iter().fold(call, |call, token| call.header("job-token", token));
            call = range.into_iter().fold(call, |call, range| call.header("content-range", range));
            let answer = call.body("abc").send().await.unwrap();
            assert_eq!(answer.status(), 403, "{token:?} {range:?}");
            assert_eq!(header(&answer, "range"), None);
        }
    }
    assert_eq!(bed.gitlab.job(job.id).unwrap().trace_len, 0);
}

#[tokio::test]
async fn a_patch_says_where_it_belongs_and_a_wrong_place_is_told_the_right_one() {
    let bed = Bed::new().await;
    let job = bed.take(NewJob::new("build")).await;
    let path = format!("/jobs/{}/trace", job.id);
    let patch = |range: Option<&'static str>| {
        let call = bed.call(Method::PATCH, &path).header("content-type", "text/plain");
        let call = call.header("job-token", &job.token);
        let call = range.into_iter().fold(call, |call, range| call.header("content-range", range));
        call.body("abc").send()
    };
    assert_eq!(patch(None).await.unwrap().status(), 400);
    for wrong in ["1-3", "9-11", "3"] {
        let answer = patch(Some(wrong)).await.unwrap();
        assert_eq!(answer.status(), 416, "{wrong}");
        assert_eq!(header(&answer, "range").as_deref(), Some("0-0"), "{wrong}");
    }
    assert_eq!(bed.gitlab.job(job.id).unwrap().trace_len, 0);
    assert!(!bed.gitlab.violations().is_empty(), "a runner does none of this");
}

#[tokio::test]
async fn an_update_that_only_says_running_changes_nothing_else() {
    let bed = Bed::new().await;
    let job = bed.take(NewJob::new("build")).await;
    bed.patch(&job, 0, "kept\n").await;
    // Old runners sent the trace along; the server has no such parameter any more.
    let answer = bed.put(&job, "running", json!({ "trace": "another" })).await;
    assert_eq!((answer.status().as_u16(), answer.text().await.unwrap()), (200, "200".to_owned()));
    let view = bed.gitlab.job(job.id).unwrap();
    assert_eq!((view.status, view.trace_text()), (Status::Running, "kept\n".to_owned()));
    bed.gitlab.force_cancel(job.id);
}

#[tokio::test]
async fn a_reason_beside_success_is_not_kept() {
    let bed = Bed::new().await;
    let job = bed.take(NewJob::new("build")).await;
    let mut body = output("");
    body["failure_reason"] = json!("script_failure");
    bed.put(&job, "success", body).await;
    let view = bed.gitlab.job(job.id).unwrap();
    assert_eq!((view.status, view.failure_reason), (Status::Success, None));
    assert!(bed.violation().contains("with state `success`"));
}

#[tokio::test]
async fn every_reason_the_ancestor_knew_is_kept_word_for_word() {
    let bed = Bed::new().await;
    for reason in [
        "unknown_failure",
        "script_failure",
        "api_failure",
        "stuck_or_timeout_failure",
        "runner_system_failure",
        "missing_dependency_failure",
    ] {
        let job = bed.take(NewJob::new(reason)).await;
        let mut body = output("");
        body["failure_reason"] = json!(reason);
        bed.put(&job, "failed", body).await;
        let view = bed.gitlab.job(job.id).unwrap();
        assert_eq!((view.status, view.failure_reason.as_deref()), (Status::Failed, Some(reason)));
    }
    bed.assert_well_behaved();
}

#[tokio::test]
async fn an_update_with_an_info_that_is_none_changes_nothing() {
    let bed = Bed::new().await;
    let job = bed.take(NewJob::new("build")).await;
    for info in [json!("bridge"), json!([1]), json!({ "name": 7 })] {
        let mut body = output("");
        body["info"] = info.clone();
        let body = json!({ "token": job.token, "state": "success", "info": info,
                           "output": body["output"] });
        let call = bed.call(Method::PUT, &format!("/jobs/{}", job.id));
        let answer = call.header("job-token", &job.token).json(&body).send().await.unwrap();
        assert_eq!(answer.status(), 400, "{body}");
    }
    assert_eq!(bed.gitlab.job(job.id).unwrap().status, Status::Running);
    bed.gitlab.force_cancel(job.id);
}

#[tokio::test]
async fn a_registration_with_a_value_of_the_wrong_kind_makes_no_runner() {
    let registration = Registration::Allowed("GR1348941secret".to_owned());
    let bed = Bed::with(Options { registration, ..Options::default() }).await;
    let register = |body: Value| bed.call(Method::POST, "/runners").json(&body).send();
    let missing = register(json!({ "info": {} })).await.unwrap();
    assert_eq!(missing.status(), 400);
    assert_eq!(missing.text().await.unwrap(), r#"{"error":"token is missing"}"#);
    for (field, value) in [
        ("description", json!(7)),
        ("active", json!("yes")),
        ("paused", json!("yes")),
        ("locked", json!(7)),
        ("run_untagged", json!("no")),
        ("tag_list", json!(7)),
        ("maximum_timeout", json!("long")),
        ("access_level", json!(7)),
        ("info", json!("bridge")),
    ] {
        let mut body = json!({ "token": "GR1348941secret" });
        body[field] = value;
        assert_eq!(register(body).await.unwrap().status(), 400, "{field}");
    }
    for field in ["name", "version", "revision", "platform", "architecture", "executor"] {
        let mut body = json!({ "token": "GR1348941secret", "info": {} });
        body["info"][field] = json!(7);
        assert_eq!(register(body).await.unwrap().status(), 400, "info.{field}");
    }
    assert_eq!(bed.gitlab.runner_tokens().len(), 1, "the bed's own");
}

#[tokio::test]
async fn a_job_shows_its_number_and_status_and_no_token() {
    let bed = Bed::new().await;
    let job = bed.take(NewJob::new("build")).await;
    let shown = format!("{:?}", bed.gitlab.job(job.id).unwrap());
    assert!(shown.contains("id: 1000") && shown.contains("status: Running"), "{shown}");
    assert!(!shown.contains(&job.token), "{shown}");
    bed.gitlab.force_cancel(job.id);
}
