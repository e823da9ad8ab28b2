//! What the clock does to jobs.

use super::*;
use crate::coordinator::{EndedBy, Status, Version};

async fn reason_after(bed: &Bed, id: i64, minutes: u32) -> (Status, Option<String>) {
    bed.gitlab.advance(minutes * MINUTE);
    let view = bed.gitlab.job(id).unwrap();
    (view.status, view.failure_reason)
}

#[tokio::test]
async fn thirty_minutes_of_silence_end_a_job() {
    let bed = Bed::new().await;
    let job = bed.take(NewJob::new("build")).await;
    assert_eq!(reason_after(&bed, job.id, 29).await, (Status::Running, None));
    let reason = Some("no_updates_running".to_owned());
    assert_eq!(reason_after(&bed, job.id, 1).await, (Status::Failed, reason));
    assert_eq!(bed.gitlab.job(job.id).unwrap().ended_by, Some(EndedBy::Server));
    let answer = bed.put(&job, "running", json!({})).await;
    assert_eq!(header(&answer, "job-status").as_deref(), Some("failed"));
    bed.assert_well_behaved();
}

#[tokio::test]
async fn an_old_server_is_silent_for_sixty() {
    let bed = Bed::with(Options { version: Version::V17_11, ..Options::default() }).await;
    let job = bed.take(NewJob::new("build").timeout(300 * MINUTE)).await;
    assert_eq!(reason_after(&bed, job.id, 59).await, (Status::Running, None));
    let reason = Some("stuck_or_timeout_failure".to_owned());
    assert_eq!(reason_after(&bed, job.id, 1).await, (Status::Failed, reason));
}

#[tokio::test]
async fn a_call_within_fifteen_minutes_of_the_last_touch_does_not_touch() {
    let bed = Bed::new().await;
    let job = bed.take(NewJob::new("build")).await;
    bed.gitlab.advance(14 * MINUTE);
    bed.put(&job, "running", json!({})).await;
    // 31 minutes after the assignment, 17 after the call.
    let reason = Some("no_updates_running".to_owned());
    assert_eq!(reason_after(&bed, job.id, 17).await, (Status::Failed, reason));
}

#[tokio::test]
async fn a_call_every_ten_minutes_keeps_a_job() {
    let bed = Bed::new().await;
    let job = bed.take(NewJob::new("build").timeout(500 * MINUTE)).await;
    for at in 0..10 {
        bed.gitlab.advance(10 * MINUTE);
        if at % 2 == 0 {
            assert_eq!(bed.put(&job, "running", json!({})).await.status(), 200);
        } else {
            assert_eq!(bed.patch(&job, at / 2, "x").await.status(), 202);
        }
    }
    bed.succeed(&job, "xxxxx").await;
    bed.assert_well_behaved();
}

#[tokio::test]
async fn the_timeout_and_fifteen_minutes_end_a_job() {
    let bed = Bed::new().await;
    let job = bed.take(NewJob::new("build").timeout(10 * MINUTE)).await;
    bed.gitlab.advance(20 * MINUTE);
    bed.put(&job, "running", json!({})).await;
    let reason = Some("server_timeout_running".to_owned());
    assert_eq!(reason_after(&bed, job.id, 5).await, (Status::Failed, reason));
}

#[tokio::test]
async fn a_cancel_nobody_follows_ends_with_a_reason() {
    let bed = Bed::new().await;
    let job = bed.take(NewJob::new("build")).await;
    bed.gitlab.cancel(job.id);
    let reason = Some("no_updates_canceling".to_owned());
    assert_eq!(reason_after(&bed, job.id, 31).await, (Status::Canceled, reason));
}

#[tokio::test]
async fn a_job_nobody_takes_is_stuck() {
    let bed = Bed::new().await;
    let hopeful = bed.gitlab.enqueue(NewJob::new("build"));
    let hopeless = bed.gitlab.enqueue(NewJob::new("build").tag("nowhere"));
    let reason = Some("stuck_pending_no_matching_runners".to_owned());
    assert_eq!(reason_after(&bed, hopeless, 61).await, (Status::Failed, reason));
    assert_eq!(bed.gitlab.job(hopeful).unwrap().status, Status::Pending);
    let reason = Some("stuck_pending_with_matching_runners".to_owned());
    assert_eq!(reason_after(&bed, hopeful, 24 * 60).await, (Status::Failed, reason));
}

#[tokio::test]
async fn silence_in_small_steps_is_a_violation() {
    let bed = Bed::new().await;
    let job = bed.take(NewJob::new("build")).await;
    for _ in 0..4 {
        bed.gitlab.advance(4 * MINUTE);
    }
    bed.put(&job, "running", json!({})).await;
    assert!(bed.violation().contains("silent for 16 minutes"));
}

#[tokio::test]
async fn time_skipped_in_an_outage_is_nobodys_silence() {
    let bed = Bed::new().await;
    let job = bed.take(NewJob::new("build")).await;
    bed.gitlab.go_away().await;
    for _ in 0..4 {
        bed.gitlab.advance(4 * MINUTE);
    }
    bed.gitlab.come_back().await.unwrap();
    assert_eq!(bed.put(&job, "running", json!({})).await.status(), 200);
    assert!(bed.gitlab.violations().is_empty());
}
