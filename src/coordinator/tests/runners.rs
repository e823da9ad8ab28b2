//! Registration and identity.

use super::*;
use crate::coordinator::{Knobs, Registration};

impl Bed {
    async fn runner_call(&self, method: Method, path: &str, body: Value) -> Response {
        self.call(method, path).json(&body).send().await.unwrap()
    }
}

#[tokio::test]
async fn verify_makes_a_manager_with_its_features() {
    let bed = Bed::new().await;
    let answer = bed.verify().await;
    assert_eq!(answer.status(), 200);
    let body: Value = answer.json().await.unwrap();
    assert_eq!(body, json!({ "id": 1, "token": bed.token, "token_expires_at": null }));
    let runner = bed.gitlab.runner(&bed.token).unwrap();
    assert_eq!(runner.managers.len(), 1);
    let manager = &runner.managers[0];
    assert_eq!(&*manager.system_id, "s_0123456789ab");
    assert_eq!(manager.executor.as_deref(), Some("custom"));
    assert!(manager.features.contains(&"cancel_gracefully".to_owned()));
    bed.assert_well_behaved();
}

#[tokio::test]
async fn verify_knows_bad_tokens_orphans_and_plain_text() {
    let bed = Bed::new().await;
    let wrong = json!({ "token": "glrt-wrong" });
    assert_eq!(bed.runner_call(Method::POST, "/runners/verify", wrong).await.status(), 403);
    let answer = bed.runner_call(Method::POST, "/runners/verify", json!({})).await;
    assert_eq!(answer.status(), 400);
    bed.gitlab.adjust(|knobs| knobs.plain_verify = true);
    let plain = bed.verify().await;
    assert_eq!(header(&plain, "content-type").as_deref(), Some("text/plain"));
    assert_eq!(plain.text().await.unwrap(), "200");
    bed.gitlab.orphan_runner(&bed.token);
    assert_eq!(bed.verify().await.status(), 422);
    assert_eq!(bed.ask().await.status(), 422);
    bed.gitlab.expire_runner_token(&bed.token);
    assert_eq!(bed.verify().await.status(), 403);
}

#[tokio::test]
async fn a_runner_without_system_id_is_legacy() {
    let bed = Bed::new().await;
    let body = json!({ "token": bed.token, "info": bed.info() });
    bed.runner_call(Method::POST, "/runners/verify", body).await;
    let runner = bed.gitlab.runner(&bed.token).unwrap();
    assert_eq!(&*runner.managers[0].system_id, "<legacy>");
}

#[tokio::test]
async fn registration_tokens_work_where_they_are_allowed() {
    let registration = Registration::Allowed("GR1348941secret".to_owned());
    let knobs = Knobs { runner_token_life: Some(Duration::from_secs(86_400)), ..Knobs::default() };
    let mut bed = Bed::with(Options { registration, knobs, ..Options::default() }).await;
    let body = json!({ "token": "GR1348941secret", "description": "old", "tag_list": "a, b",
                       "run_untagged": true, "locked": true, "paused": false,
                       "info": { "name": "bridge" } });
    let answer = bed.runner_call(Method::POST, "/runners", body.clone()).await;
    assert_eq!(answer.status(), 201);
    let answer: Value = answer.json().await.unwrap();
    assert!(answer["token"].as_str().unwrap().starts_with("glrtr-"));
    let expires: jiff::Timestamp = answer["token_expires_at"].as_str().unwrap().parse().unwrap();
    assert!(expires.as_second() > 86_400);
    bed.token = answer["token"].as_str().unwrap().to_owned();
    bed.take(NewJob::new("tagged").tag("b")).await;
    bed.gitlab.advance(Duration::from_secs(86_400));
    assert_eq!(bed.verify().await.status(), 403);

    let mut wrong = body.clone();
    wrong["token"] = json!("GR1348941wrong");
    assert_eq!(bed.runner_call(Method::POST, "/runners", wrong).await.status(), 403);
    let mut nothing = body;
    nothing["tag_list"] = json!([]);
    nothing["run_untagged"] = json!(false);
    let refused = bed.runner_call(Method::POST, "/runners", nothing).await;
    assert_eq!(refused.status(), 400);
    assert!(refused.text().await.unwrap().contains("tags_list"));
}

#[tokio::test]
async fn registration_is_gone_by_default() {
    let bed = Bed::new().await;
    let answer = bed.runner_call(Method::POST, "/runners", json!({ "token": "GR1" })).await;
    assert_eq!(answer.status(), 410);
    let body: Value = answer.json().await.unwrap();
    assert_eq!(body["reason"], "runner_registration_disallowed");
}

#[tokio::test]
async fn a_manager_leaves_and_the_runner_stays() {
    let bed = Bed::new().await;
    bed.verify().await;
    let body = json!({ "token": bed.token, "system_id": "s_0123456789ab" });
    let path = "/runners/managers";
    assert_eq!(bed.runner_call(Method::DELETE, path, body.clone()).await.status(), 204);
    assert_eq!(bed.runner_call(Method::DELETE, path, body).await.status(), 404);
    let short = json!({ "token": bed.token });
    assert_eq!(bed.runner_call(Method::DELETE, path, short).await.status(), 400);
    assert_eq!(bed.verify().await.status(), 200);
}

#[tokio::test]
async fn a_deleted_runner_is_forbidden_and_its_jobs_go_on() {
    let bed = Bed::new().await;
    let job = bed.take(NewJob::new("build")).await;
    let body = json!({ "token": bed.token });
    assert_eq!(bed.runner_call(Method::DELETE, "/runners", body.clone()).await.status(), 204);
    assert_eq!(bed.runner_call(Method::DELETE, "/runners", body).await.status(), 403);
    assert_eq!(bed.ask().await.status(), 403);
    assert_eq!(bed.put(&job, "running", json!({})).await.status(), 200);
}

#[tokio::test]
async fn a_new_token_kills_the_old_one_and_no_job() {
    let mut bed = Bed::new().await;
    let job = bed.take(NewJob::new("build")).await;
    let path = "/runners/reset_authentication_token";
    let answer = bed.runner_call(Method::POST, path, json!({ "token": bed.token })).await;
    assert_eq!(answer.status(), 201);
    let body: Value = answer.json().await.unwrap();
    assert_eq!(bed.ask().await.status(), 403);
    bed.token = body["token"].as_str().unwrap().to_owned();
    assert!(bed.token.starts_with("glrt-"));
    assert_eq!(bed.ask().await.status(), 204);
    assert_eq!(bed.put(&job, "running", json!({})).await.status(), 200);
}
