//! Cancels, decided by the stored features.

use super::*;
use crate::coordinator::{EndedBy, Status, Version};

#[tokio::test]
async fn a_graceful_runner_is_asked_to_cancel() {
    let bed = Bed::new().await;
    let job = bed.take(NewJob::new("build")).await;
    bed.gitlab.cancel(job.id);
    let answer = bed.put(&job, "running", json!({})).await;
    assert_eq!(answer.status(), 200);
    assert_eq!(header(&answer, "job-status").as_deref(), Some("canceling"));
    let answer = bed.patch(&job, 0, "bye\n").await;
    assert_eq!(answer.status(), 202);
    assert_eq!(header(&answer, "job-status").as_deref(), Some("canceling"));
    let answer = bed.succeed(&job, "bye\n").await;
    assert_eq!(answer.status(), 200);
    assert_eq!(header(&answer, "job-status").as_deref(), Some("canceled"));
    let view = bed.gitlab.job(job.id).unwrap();
    assert_eq!(view.status, Status::Canceled);
    assert_eq!(view.ended_by, Some(EndedBy::Runner));
    bed.assert_well_behaved();
}

#[tokio::test]
async fn another_runner_is_cut_off() {
    let bed = Bed::new().await.feature("cancel_gracefully", false);
    let job = bed.take(NewJob::new("build")).await;
    bed.gitlab.cancel(job.id);
    assert_eq!(bed.gitlab.job(job.id).unwrap().status, Status::Canceled);
    let first = bed.put(&job, "running", json!({})).await;
    assert_eq!(first.status(), 403);
    assert_eq!(header(&first, "job-status").as_deref(), Some("canceled"));
    // One closing attempt is what the official runner does.
    assert_eq!(bed.patch(&job, 0, "x").await.status(), 403);
    assert_eq!(bed.put(&job, "running", json!({})).await.status(), 403);
    bed.assert_well_behaved();
    assert_eq!(bed.patch(&job, 0, "x").await.status(), 403);
    assert!(bed.violation().contains("another Patch after a 403"));
}

#[tokio::test]
async fn the_features_stored_first_decide_for_55_minutes() {
    let bed = Bed::new().await.feature("cancel_gracefully", false);
    assert_eq!(bed.verify().await.status(), 200);
    let bed = bed.feature("cancel_gracefully", true);
    let job = bed.take(NewJob::new("build")).await;
    bed.gitlab.cancel(job.id);
    assert_eq!(bed.gitlab.job(job.id).unwrap().status, Status::Canceled);

    bed.gitlab.advance(56 * MINUTE);
    let job = bed.take(NewJob::new("build")).await;
    bed.gitlab.cancel(job.id);
    assert_eq!(bed.gitlab.job(job.id).unwrap().status, Status::Canceling);
}

#[tokio::test]
async fn a_cancel_can_be_forced() {
    let bed = Bed::new().await;
    let job = bed.take(NewJob::new("build")).await;
    bed.gitlab.cancel(job.id);
    bed.gitlab.force_cancel(job.id);
    let answer = bed.put(&job, "running", json!({})).await;
    assert_eq!(answer.status(), 403);
    assert_eq!(header(&answer, "job-status").as_deref(), Some("canceled"));
    assert_eq!(bed.gitlab.job(job.id).unwrap().ended_by, Some(EndedBy::User));
}

#[tokio::test]
async fn an_old_server_knows_no_graceful_cancel() {
    let bed = Bed::with(Options { version: Version::V16_11, ..Options::default() }).await;
    let job = bed.take(NewJob::new("build")).await;
    bed.gitlab.cancel(job.id);
    assert_eq!(bed.gitlab.job(job.id).unwrap().status, Status::Canceled);
}

#[tokio::test]
async fn a_cancel_after_the_end_changes_nothing() {
    let bed = Bed::new().await;
    let job = bed.take(NewJob::new("build")).await;
    bed.succeed(&job, "").await;
    bed.gitlab.cancel(job.id);
    bed.gitlab.force_cancel(job.id);
    assert_eq!(bed.gitlab.job(job.id).unwrap().status, Status::Success);
}
