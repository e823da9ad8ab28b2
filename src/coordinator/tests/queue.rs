//! The queue, and how it is watched.

use super::*;
use crate::coordinator::Status;

#[tokio::test]
async fn jobs_are_handed_out_in_order() {
    let bed = Bed::new().await;
    let ids: Vec<i64> = (0..5).map(|at| bed.gitlab.enqueue(NewJob::new(at.to_string()))).collect();
    bed.gitlab.cancel(ids[1]);
    let mut seen = Vec::new();
    for _ in 0..4 {
        let payload: Value = bed.ask().await.json().await.unwrap();
        seen.push(payload["id"].as_i64().unwrap());
    }
    assert_eq!(seen, [ids[0], ids[2], ids[3], ids[4]]);
    assert_eq!(bed.gitlab.counts().canceled, 1);
    assert_eq!(bed.gitlab.counts().running, 4);
}

#[tokio::test]
async fn tags_decide_who_gets_a_job() {
    let mut bed = Bed::new().await;
    let tagged = bed.gitlab.enqueue(NewJob::new("tagged").tag("gpu"));
    let plain = bed.gitlab.enqueue(NewJob::new("plain"));
    let payload: Value = bed.ask().await.json().await.unwrap();
    assert_eq!(payload["id"], json!(plain));
    assert_eq!(bed.ask().await.status(), 204);
    bed.token = bed.gitlab.add_runner(RunnerOptions {
        tags: vec!["gpu".to_owned()],
        run_untagged: false,
        ..RunnerOptions::default()
    });
    bed.gitlab.enqueue(NewJob::new("plain"));
    let payload: Value = bed.ask().await.json().await.unwrap();
    assert_eq!(payload["id"], json!(tagged));
    assert_eq!(bed.ask().await.status(), 204);
}

#[tokio::test]
async fn a_job_can_be_for_one_runner() {
    let mut bed = Bed::new().await;
    let other = bed.gitlab.add_runner(RunnerOptions::default());
    bed.gitlab.enqueue(NewJob::new("mine").only_for(&other));
    assert_eq!(bed.ask().await.status(), 204);
    bed.token = other;
    assert_eq!(bed.ask().await.status(), 201);
}

#[tokio::test]
async fn waiting_ends_with_the_time_and_gives_the_last_view() {
    let bed = Bed::new().await;
    let id = bed.gitlab.enqueue(NewJob::new("build"));
    let short = Duration::from_millis(20);
    let view = bed.gitlab.wait_finished(id, short).await.unwrap_err();
    assert_eq!(view.status, Status::Pending);
    assert_eq!(bed.gitlab.wait_all_finished(short).await.unwrap_err().pending, 1);
    assert_eq!(bed.gitlab.wait(7, |_| true, short).await.unwrap_err().id, 7);
}

#[tokio::test]
async fn waiting_sees_what_happens_meanwhile() {
    let bed = Bed::new().await;
    let id = bed.gitlab.enqueue(NewJob::new("build"));
    let end = async {
        bed.gitlab.wait(id, |job| job.status == Status::Running, SOON).await.unwrap();
        bed.gitlab.force_cancel(id);
    };
    let (all, asked, (), answer) = tokio::join!(
        bed.gitlab.wait_all_finished(SOON),
        bed.gitlab.wait_until(|gitlab| gitlab.requests().total() == 1, SOON),
        end,
        bed.ask(),
    );
    assert_eq!(all.unwrap().canceled, 1);
    asked.unwrap();
    assert_eq!(answer.status(), 201);
}

#[tokio::test]
async fn ten_thousand_jobs_are_counted_without_looking_at_them() {
    let bed = Bed::new().await;
    for _ in 0..10_000 {
        bed.gitlab.enqueue(NewJob::new("build"));
    }
    assert_eq!(bed.gitlab.counts().pending, 10_000);
    assert_eq!(bed.gitlab.jobs().len(), 10_000);
    assert_eq!(bed.ask().await.status(), 201);
    assert_eq!(bed.gitlab.counts().pending, 9_999);
}
