//! `POST /jobs/request`.

use std::time::Instant;

use super::*;
use crate::coordinator::{
    Endpoint, Knobs, RateLimits, Shape, Status, TokenKind, Variable, Version,
};

fn long_poll(limit: Option<Duration>) -> Options {
    Options { knobs: Knobs { long_poll: limit, ..Knobs::default() }, ..Options::default() }
}

#[tokio::test]
async fn rails_says_204_with_the_value_of_the_queue() {
    let bed = Bed::with(long_poll(None)).await;
    let answer = bed.ask().await;
    assert_eq!(answer.status(), 204);
    assert_eq!(header(&answer, "gitlab-ci-builds-polling").as_deref(), Some("yes"));
    let value = header(&answer, "x-gitlab-last-update").unwrap();
    // The value is current: not even a look into the queue.
    let again = bed.asking(Some(&value)).send().await.unwrap();
    assert_eq!(header(&again, "x-gitlab-last-update"), Some(value.clone()));
    // A new job makes a new value.
    bed.gitlab.enqueue(NewJob::new("build"));
    let third = bed.asking(Some(&value)).send().await.unwrap();
    assert_eq!(third.status(), 201);
    assert_eq!(header(&third, "x-gitlab-last-update"), None);
}

#[tokio::test]
async fn the_value_of_the_queue_dies_after_an_hour() {
    let bed = Bed::with(long_poll(None)).await;
    let value = header(&bed.ask().await, "x-gitlab-last-update").unwrap();
    bed.gitlab.advance(61 * MINUTE);
    let later = header(&bed.ask().await, "x-gitlab-last-update").unwrap();
    assert_ne!(value, later);
}

#[tokio::test]
async fn workhorse_holds_a_request_until_there_is_news() {
    let bed = Bed::with(long_poll(Some(MINUTE))).await;
    let value = header(&bed.ask().await, "x-gitlab-last-update").unwrap();
    let held = bed.asking(Some(&value)).send();
    let news = async {
        let two = |gitlab: &Coordinator| gitlab.requests().of(Endpoint::Request) == 2;
        bed.gitlab.wait_until(two, SOON).await.unwrap();
        bed.gitlab.enqueue(NewJob::new("build"))
    };
    let (answer, id) = tokio::join!(held, news);
    let answer = answer.unwrap();
    // Either it was held, and is told to ask again, or the news was first.
    if answer.status() == 204 {
        assert_eq!(header(&answer, "x-gitlab-last-update"), None);
        assert_eq!(bed.asking(Some(&value)).send().await.unwrap().status(), 201);
    }
    assert_eq!(bed.gitlab.job(id).unwrap().status, Status::Running);
}

#[tokio::test]
async fn workhorse_gives_up_after_the_polling_time_without_a_value() {
    let limit = Duration::from_millis(200);
    let bed = Bed::with(long_poll(Some(limit))).await;
    let value = header(&bed.ask().await, "x-gitlab-last-update").unwrap();
    let begin = Instant::now();
    let answer = bed.asking(Some(&value)).send().await.unwrap();
    assert!(begin.elapsed() >= limit);
    assert_eq!(answer.status(), 204);
    assert_eq!(header(&answer, "x-gitlab-last-update"), None);
    assert_eq!(header(&answer, "gitlab-ci-builds-polling").as_deref(), Some("yes"));
}

#[tokio::test]
async fn a_paused_runner_gets_nothing_and_no_error() {
    let bed = Bed::new().await;
    bed.gitlab.enqueue(NewJob::new("build"));
    bed.gitlab.pause_runner(&bed.token, true);
    let answer = bed.ask().await;
    assert_eq!(answer.status(), 204);
    assert!(header(&answer, "x-gitlab-last-update").is_some());
    bed.gitlab.pause_runner(&bed.token, false);
    assert_eq!(bed.ask().await.status(), 201);
}

#[tokio::test]
async fn an_unknown_token_is_forbidden() {
    let mut bed = Bed::new().await;
    bed.token = "glrt-wrong".to_owned();
    let answer = bed.ask().await;
    assert_eq!(answer.status(), 403);
    assert_eq!(answer.text().await.unwrap(), r#"{"message":"403 Forbidden"}"#);
}

#[tokio::test]
async fn a_body_above_32_kib_is_too_large() {
    let bed = Bed::new().await;
    let body = json!({ "token": bed.token, "info": bed.info(), "filler": "x".repeat(33_000) });
    let call = bed.call(Method::POST, "/jobs/request").json(&body);
    assert_eq!(call.send().await.unwrap().status(), 413);
}

#[tokio::test]
async fn a_job_that_asks_too_much_fails_and_the_next_one_is_handed_out() {
    let bed = Bed::new().await.feature("upload_multiple_artifacts", false);
    let report = json!({ "name": "junit.xml", "paths": ["r.xml"], "artifact_type": "junit",
                         "artifact_format": "gzip" });
    let first = bed.gitlab.enqueue(NewJob::new("reports").artifact(report));
    let second = bed.gitlab.enqueue(NewJob::new("plain"));
    let payload: Value = bed.ask().await.json().await.unwrap();
    assert_eq!(payload["id"], json!(second));
    let view = bed.gitlab.job(first).unwrap();
    assert_eq!(view.status, Status::Failed);
    assert_eq!(view.failure_reason.as_deref(), Some("runner_unsupported"));
    assert_eq!(bed.ask().await.status(), 204);
}

#[tokio::test]
async fn the_first_call_must_carry_every_feature() {
    let mut bed = Bed::new().await;
    bed.features = json!({ "refspecs": true });
    bed.ask().await;
    assert!(bed.violation().contains("cancel_gracefully"));
    // The row exists now; what later calls carry is another matter.
    bed.ask().await;
    assert_eq!(bed.gitlab.violations().len(), 1);
}

#[tokio::test]
async fn too_many_requests_in_a_minute_are_429() {
    let bed = Bed::new().await;
    bed.gitlab.adjust(|knobs| {
        knobs.long_poll = None;
        knobs.rate_limits = RateLimits { requests: 2, ..RateLimits::default() };
    });
    // A whole minute lies ahead, wherever the clock stood.
    bed.gitlab.advance(MINUTE - Duration::from_secs(bed.gitlab.now().as_secs() % 60));
    assert_eq!(bed.ask().await.status(), 204);
    assert_eq!(bed.ask().await.status(), 204);
    let refused = bed.ask().await;
    assert_eq!(refused.status(), 429);
    assert!(header(&refused, "retry-after").unwrap().parse::<u64>().unwrap() <= 60);
    assert!(refused.text().await.unwrap().contains("requested too many times. Try again later."));
    bed.gitlab.advance(MINUTE);
    assert_eq!(bed.ask().await.status(), 204);
}

#[tokio::test]
async fn the_payload_is_complete() {
    let bed = Bed::new().await;
    let job = bed
        .take(
            NewJob::new("build & test")
                .stage("test")
                .script_lines(["echo one", "echo two"])
                .after_script("echo bye")
                .hook("pre_get_sources_script", ["true"])
                .timeout(Duration::from_secs(600))
                .variable(Variable::new("SECRET", "hunter2hunter2").masked())
                .variable(Variable::new("FILE", "content").file())
                .variable(Variable::new("RAW", "$NOT").raw()),
        )
        .await;
    let payload = &job.payload;
    assert!(job.token.starts_with("glcbt-64_"));
    assert_eq!(job.token.len(), "glcbt-64_".len() + 20);
    assert_eq!(payload["job_info"]["name"], "build & test");
    assert_eq!(payload["job_info"]["stage"], "test");
    assert_eq!(payload["runner_info"]["timeout"], 600);
    assert_eq!(payload["steps"][0]["script"], json!(["echo one", "echo two"]));
    assert_eq!(payload["steps"][1]["name"], "after_script");
    assert_eq!(payload["steps"][1]["when"], "always");
    assert_eq!(payload["hooks"][0]["script"], json!(["true"]));
    assert_eq!(payload["image"], Value::Null);
    assert_eq!(payload["features"]["trace_sections"], true);
    let reasons = payload["features"]["failure_reasons"].as_array().unwrap();
    assert!(reasons.contains(&json!("runner_interrupted")));
    let variable = |key: &str| {
        let list = payload["variables"].as_array().unwrap();
        list.iter().find(|variable| variable["key"] == key).unwrap().clone()
    };
    assert_eq!(variable("CI_JOB_ID")["value"], job.id.to_string());
    assert_eq!(variable("CI_JOB_TOKEN")["value"], job.token);
    assert_eq!(variable("CI_JOB_TOKEN")["masked"], true);
    assert_eq!(variable("CI_JOB_NAME_SLUG")["value"], "build---test");
    assert_eq!(variable("CI_PROJECT_PATH")["value"], "hep/tracker");
    assert_eq!(variable("CI_SERVER_URL")["value"], bed.gitlab.url());
    assert_eq!(variable("CI_RUNNER_ID")["value"], "1");
    assert_eq!(variable("SECRET")["masked"], true);
    assert_eq!(variable("FILE")["file"], true);
    assert_eq!(variable("RAW")["raw"], true);
    assert!(variable("SECRET").get("file").is_none());
}

#[tokio::test]
async fn an_old_server_lists_fewer_failure_reasons() {
    let bed = Bed::with(Options { version: Version::V17_11, ..Options::default() }).await;
    let job = bed.take(NewJob::new("build")).await;
    let reasons = job.payload["features"]["failure_reasons"].as_array().unwrap();
    assert!(reasons.contains(&json!("script_failure")));
    assert!(!reasons.contains(&json!("runner_interrupted")));
    assert!(job.payload["git_info"].get("protected").is_none());
}

#[tokio::test]
async fn payloads_come_in_odd_shapes() {
    let bed = Bed::new().await;
    let nulls = bed.take(NewJob::new("a").shape(Shape::Nulls)).await.payload;
    assert_eq!(nulls["variables"], Value::Null);
    assert_eq!(nulls["git_info"]["depth"], Value::Null);
    assert!(nulls["git_info"]["sha"].is_string());
    let absent = bed.take(NewJob::new("b").shape(Shape::Absent)).await.payload;
    assert!(absent.get("variables").is_none());
    assert!(absent["steps"][0].get("when").is_none());
    let unknown = bed.take(NewJob::new("c").shape(Shape::Unknown)).await.payload;
    assert!(unknown["job_info"].get("field_of_the_future").is_some());
    let edited = NewJob::new("d")
        .payload(json!({ "image": { "name": "alpine" }, "runner_info": { "timeout": null } }))
        .without("/features/failure_reasons")
        .without("/steps/0");
    let edited = bed.take(edited).await.payload;
    assert_eq!(edited["image"], json!({ "name": "alpine" }));
    assert_eq!(edited["runner_info"]["timeout"], Value::Null);
    assert!(edited["features"].get("failure_reasons").is_none());
    assert_eq!(edited["steps"], json!([]));
    let verbatim = NewJob::new("e").verbatim(r#"{"id":{id},"token":"{token}","steps":7}"#);
    assert_eq!(bed.take(verbatim).await.payload["steps"], 7);
}

#[tokio::test]
async fn a_runners_limit_shortens_the_timeout() {
    let mut bed = Bed::new().await;
    bed.token = bed.gitlab.add_runner(RunnerOptions {
        maximum_timeout: Some(Duration::from_secs(700)),
        ..RunnerOptions::default()
    });
    let job = bed.take(NewJob::new("build")).await;
    assert_eq!(job.payload["runner_info"]["timeout"], 700);
}

#[tokio::test]
async fn job_tokens_can_be_long() {
    let bed = Bed::new().await;
    bed.gitlab.adjust(|knobs| knobs.token_kind = TokenKind::Jwt);
    let job = bed.take(NewJob::new("build").timeout(10 * MINUTE)).await;
    assert!(job.token.len() > 1000);
    assert_eq!(bed.put(&job, "running", json!({})).await.status(), 200);
    // Timeout and five minutes more.
    bed.gitlab.advance(15 * MINUTE);
    let refused = bed.put(&job, "running", json!({})).await;
    assert_eq!(refused.status(), 403);
    assert_eq!(header(&refused, "job-status").as_deref(), Some("failed"));
    assert!(refused.text().await.unwrap().contains("Job token has expired"));
    let view = bed.gitlab.job(job.id).unwrap();
    assert_eq!(view.failure_reason.as_deref(), Some("job_token_expired"));
}

#[tokio::test]
async fn a_two_phase_server_waits_for_running() {
    let bed = Bed::new().await;
    bed.gitlab.adjust(|knobs| knobs.two_phase = true);
    let job = bed.take(NewJob::new("build")).await;
    assert_eq!(bed.gitlab.job(job.id).unwrap().status, Status::Pending);
    assert_eq!(bed.put(&job, "success", output("")).await.status(), 400);
    assert_eq!(bed.put(&job, "running", json!({})).await.status(), 200);
    assert_eq!(bed.gitlab.job(job.id).unwrap().status, Status::Running);

    let silent = bed.take(NewJob::new("build")).await;
    bed.gitlab.advance(2 * MINUTE);
    let view = bed.gitlab.job(silent.id).unwrap();
    assert_eq!(view.failure_reason.as_deref(), Some("runner_provisioning_timeout"));
}
