//! What GitLab is told, what it answers, and what is left when it has heard all.

use bridge_backend::Outcome;
use bridge_backend::fake::{Trouble, Verb};

use super::bed::{Bed, Case};
use super::*;
use crate::coordinator::{EndedBy, Endpoint, Fault, Status};

async fn finish(bed: &Bed, case: &Case) {
    bed.world.finish(&case.token, Outcome::Exited { code: 0 });
    bed.home(case).await;
    let view = bed.view(case.ci_job);
    assert_eq!((view.status, view.ended_by), (Status::Success, Some(EndedBy::Runner)), "{view:?}");
    assert!(bed.spool(case.id) == *view.trace);
}

#[tokio::test]
async fn a_patch_that_is_not_found_is_sent_again() {
    let bed = Bed::new().await;
    let case = bed.running(job("not found")).await;
    bed.gitlab.inject(Endpoint::Patch, Fault::status(404));
    bed.world.append_log(&case.token, "a line\n");
    bed.sweeps(90).await;
    assert_eq!(bed.gitlab.faults_left(), 0);
    assert_eq!(bed.row(&case).await.state, JobState::Running);
    assert!(bed.text(case.ci_job).contains("a line\n"));
    // Also when it is the last one: the verdict is told all the same.
    bed.gitlab.inject(Endpoint::Patch, Fault::status(404));
    bed.world.append_log(&case.token, "another line\n");
    bed.world.finish(&case.token, Outcome::Exited { code: 0 });
    let row = bed.home(&case).await;
    assert_eq!(row.state, JobState::Finished);
    assert_eq!(bed.view(case.ci_job).status, Status::Success);
    bed.world.assert_no_violations();
}

#[tokio::test]
async fn a_lost_answer_to_a_patch_is_told_by_the_next() {
    let bed = Bed::new().await;
    let case = bed.running(job("patch")).await;
    bed.gitlab.inject(Endpoint::Patch, Fault::lost_answer());
    bed.world.append_log(&case.token, "a line\n");
    bed.sweeps(90).await;
    bed.world.append_log(&case.token, "another\n");
    finish(&bed, &case).await;
    assert_eq!(bed.view(case.ci_job).refused_patches, 1);
    bed.assert_well();
}

#[tokio::test]
async fn what_was_accepted_before_the_trouble_is_not_sent_again() {
    let bed = Bed::new().await;
    let case = bed.running(job("two patches")).await;
    bed.world.append_log(&case.token, ("y".repeat(1023) + "\n").repeat(1536));
    // The first MiB is accepted, the rest meets trouble.
    bed.gitlab.inject(Endpoint::Patch, Fault::status(503).after(1));
    finish(&bed, &case).await;
    assert_eq!(bed.gitlab.faults_left(), 0);
    assert_eq!(bed.view(case.ci_job).refused_patches, 0);
    bed.assert_well();
}

#[tokio::test]
async fn a_proxy_that_takes_less_is_sent_less() {
    let bed = Bed::new().await;
    let case = bed.running(job("proxy")).await;
    bed.world.append_log(&case.token, ("z".repeat(1023) + "\n").repeat(600));
    bed.gitlab.inject(Endpoint::Patch, Fault::status(413));
    finish(&bed, &case).await;
    bed.assert_well();
}

#[tokio::test]
async fn bytes_that_gitlab_has_and_we_lost_leave_a_hole_and_no_checksum() {
    let bed = Bed::new().await;
    let case = bed.running(job("hole")).await;
    bed.world.append_log(&case.token, "before\n");
    bed.until("it is sent", &case, |job| job.log_offset == 7 && job.trace_sent == job.trace_len)
        .await;
    // A disk that took writes back: row and spool are as they were before them.
    let had = bed.row(&case).await.trace_len;
    bed.life.store.vandalise("UPDATE jobs SET trace_len = 100, trace_sent = 90").await;
    let bed = bed.restart().await;
    bed.until("GitLab says what it has", &case, |job| job.trace_len > 100).await;
    assert_eq!(bed.row(&case).await.trace_len, had);
    bed.world.append_log(&case.token, "after\n");
    bed.world.finish(&case.token, Outcome::Exited { code: 0 });
    let row = bed.home(&case).await;
    assert_eq!(row.state, JobState::Finished);
    assert!(row.trace_hole);
    let view = bed.view(case.ci_job);
    assert_eq!(view.status, Status::Success);
    let final_update = view.final_update.clone().unwrap();
    assert_eq!((final_update.checksum, final_update.bytesize), (None, None));
    assert!(view.trace_text().contains("before\n") && view.trace_text().contains("after\n"));
    assert_eq!(bed.spool(case.id).len(), view.trace.len());
}

#[tokio::test]
async fn a_lost_answer_to_the_verdict_is_a_yes() {
    let bed = Bed::new().await;
    let case = bed.running(job("verdict")).await;
    bed.gitlab.inject(Endpoint::FinalUpdate, Fault::lost_answer());
    finish(&bed, &case).await;
    assert_eq!(bed.row(&case).await.state, JobState::Finished);
    assert_eq!(bed.view(case.ci_job).finals, 2);
    bed.assert_well();
}

#[tokio::test]
async fn a_verdict_that_is_not_taken_yet_is_told_again() {
    let bed = Bed::new().await;
    bed.gitlab.adjust(|knobs| knobs.live_trace = Some(3));
    let case = bed.running(job("later")).await;
    finish(&bed, &case).await;
    assert_eq!(bed.view(case.ci_job).finals, 4);
    bed.assert_well();
}

#[tokio::test]
async fn a_job_that_gitlab_ended_is_cancelled_over_there_and_released() {
    let bed = Bed::new().await;
    let case = bed.running(job("disowned")).await;
    bed.gitlab.force_cancel(case.ci_job);
    let row = bed.until("it is given up", &case, |job| job.state.is_over()).await;
    assert_eq!(row.state, JobState::Abandoned);
    bed.home(&case).await;
    let there = bed.world.job(&case.token).unwrap();
    assert!(there.cancels >= 1 && there.released);
    assert!(bed.life.store.payload(case.id).await.unwrap().is_none());
    assert!(!Utf8PathBuf::from(format!("{}.tmp", there.spec.workspace)).exists());
    bed.assert_well();
}

#[tokio::test]
async fn a_release_that_fails_is_tried_again() {
    let bed = Bed::new().await;
    let case = bed.running(job("release")).await;
    let transient = Trouble::Fail(bridge_backend::ErrorKind::Transient);
    for trouble in [transient, Trouble::LostAnswer, transient] {
        bed.world.trouble(Verb::Release, trouble);
    }
    finish(&bed, &case).await;
    assert_eq!(bed.world.count(Verb::Release), 4);
    bed.assert_well();
}

#[tokio::test]
async fn secrets_are_gone_when_the_job_has_ended() {
    let bed = Bed::new().await;
    let case = bed.running(job("secret").script("cat $PASSWORD")).await;
    let files = Utf8PathBuf::from(format!("{}.tmp", bed.row(&case).await.workspace.unwrap()));
    assert_eq!(std::fs::read_to_string(files.join("PASSWORD")).unwrap(), SECRET);
    bed.world.append_log(&case.token, format!("it is {SECRET}\n"));
    // GitLab is away: the files do not wait for it.
    bed.gitlab.go_away().await;
    bed.world.finish(&case.token, Outcome::Exited { code: 0 });
    bed.until("the verdict", &case, |job| job.verdict.is_some()).await;
    assert!(!files.exists());
    bed.gitlab.come_back().await.unwrap();
    bed.home(&case).await;
    assert!(bed.text(case.ci_job).contains("it is [MASKED]\n"));
    bed.assert_well();
}

#[tokio::test]
async fn a_payload_that_cannot_be_read_costs_only_its_own_job() {
    let bed = Bed::new().await;
    let poisoned = bed.take(job("poisoned")).await;
    bed.life.store.forge_payload(poisoned.id, "{\"id\": 1, ").await;
    let healthy = bed.running(job("healthy")).await;
    finish(&bed, &healthy).await;
    let row = bed.home(&poisoned).await;
    assert_eq!(row.state, JobState::Abandoned, "nobody can say anything about it");
    assert_eq!(bed.world.jobs().len(), 1);
    bed.world.assert_no_violations();
}

#[tokio::test]
async fn a_payload_that_somebody_changed_is_not_believed() {
    let bed = Bed::new().await;
    let changed = bed.take(job("changed")).await;
    bed.life.store.vandalise("UPDATE payloads SET sealed = CAST('0{}' AS BLOB)").await;
    let healthy = bed.running(job("healthy")).await;
    finish(&bed, &healthy).await;
    let row = bed.home(&changed).await;
    assert_eq!(row.state, JobState::Abandoned, "nobody can say anything about it");
    assert_eq!(bed.world.jobs().len(), 1);
    bed.world.assert_no_violations();
}

#[tokio::test]
async fn a_payload_that_makes_no_sense_but_has_its_token_is_told_to_its_author() {
    let bed = Bed::new().await;
    let case = bed.take(job("odd")).await;
    let payload = bed.life.store.payload(case.id).await.unwrap().unwrap();
    let mut payload: serde_json::Value = serde_json::from_str(payload.expose()).unwrap();
    payload["steps"] = "none".into();
    bed.life.store.forge_payload(case.id, &payload.to_string()).await;
    bed.home(&case).await;
    let view = bed.view(case.ci_job);
    assert_eq!((view.status, view.ended_by), (Status::Failed, Some(EndedBy::Runner)), "{view:?}");
    assert_eq!(bed.world.count(Verb::Submit), 0);
}

#[tokio::test]
async fn a_damaged_row_costs_only_its_own_job() {
    let bed = Bed::new().await;
    let damaged = bed.running(job("damaged")).await;
    let cancelled = bed.running(job("cancelled")).await;
    bed.life
        .store
        .vandalise(
            "UPDATE jobs SET submit_token = '?!', cancel_requested_at = 1 WHERE name = 'damaged'",
        )
        .await;
    let healthy = bed.running(job("healthy")).await;
    finish(&bed, &healthy).await;
    bed.life.store.request_cancel(cancelled.id, bed.now()).await.unwrap();
    bed.home(&cancelled).await;
    assert!(bed.world.job(&damaged.token).unwrap().outcome.is_none());
    bed.world.assert_no_violations();
}

#[tokio::test]
async fn private_files_that_cannot_be_removed_are_tried_again() {
    let bed = Bed::new().await;
    let case = bed.running(job("leftovers")).await;
    let (builds, aside) = (bed.path("builds/short"), bed.path("aside"));
    let files = Utf8PathBuf::from(format!("{}.tmp", bed.row(&case).await.workspace.unwrap()));
    assert!(files.exists());
    std::fs::rename(&builds, &aside).unwrap();
    std::fs::write(&builds, "no directory").unwrap();
    bed.world.finish(&case.token, Outcome::Exited { code: 0 });
    bed.until("the verdict is told", &case, |job| job.state == JobState::Finished).await;
    bed.sweeps(60).await;
    assert!(bed.row(&case).await.released_at.is_none());
    std::fs::remove_file(&builds).unwrap();
    std::fs::rename(&aside, &builds).unwrap();
    bed.home(&case).await;
    assert!(!files.exists());
    bed.assert_well();
}

#[tokio::test]
async fn a_spool_that_cannot_be_opened_costs_only_its_own_job_and_not_its_life() {
    let bed = Bed::new().await;
    let poisoned = bed.running(job("poisoned").timeout(secs(9_000))).await;
    let path = bed.path("spool").join(format!("{}.trace", poisoned.id));
    let aside = bed.path("aside");
    std::fs::rename(&path, &aside).unwrap();
    std::fs::create_dir(&path).unwrap();
    bed.world.append_log(&poisoned.token, "a line\n");
    let healthy = bed.running(job("healthy")).await;
    finish(&bed, &healthy).await;
    let calls = bed.world.count_all();
    // GitLab hears of it for as long as it lasts.
    for _ in 0..180 {
        bed.pass(secs(9));
        bed.sweep().await;
        bed.gitlab.advance(secs(10));
    }
    assert!(bed.row(&poisoned).await.failures > 5);
    let logs = bed.world.calls().split_off(calls);
    assert!(!logs.iter().any(|call| call.verb == Verb::ReadLog), "it does not come to that");
    std::fs::remove_dir(&path).unwrap();
    std::fs::rename(&aside, &path).unwrap();
    bed.until("it is carried", &poisoned, |job| job.log_offset == 7).await;
    finish(&bed, &poisoned).await;
    bed.assert_well();
}

#[tokio::test]
async fn a_job_whose_runner_left_the_configuration_waits_for_it() {
    let bed = Bed::new().await;
    let case = bed.running(job("left")).await;
    let world = {
        let world = bed.life.reconciler.0.world();
        let (runners, backends) = (world.runners.clone(), world.backends.clone());
        bed.life.reconciler.replace_world(World { runners: [].into(), backends: [].into() });
        World { runners, backends }
    };
    bed.sweeps(30).await;
    assert_eq!(bed.row(&case).await.state, JobState::Running);
    bed.life.reconciler.replace_world(world);
    finish(&bed, &case).await;
    bed.assert_well();
}

#[tokio::test]
async fn a_clock_that_is_set_back_stops_nothing() {
    let bed = Bed::new().await;
    let case = bed.running(job("clock")).await;
    bed.clock.set(policy::after(bed.now(), secs(3_000)));
    bed.sweeps(2).await;
    bed.clock.set(start_of_time());
    bed.world.append_log(&case.token, "a line\n");
    bed.world.finish(&case.token, Outcome::Exited { code: 0 });
    bed.home(&case).await;
    assert_eq!(bed.view(case.ci_job).status, Status::Success);
    bed.assert_well();
}
