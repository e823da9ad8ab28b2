//! Jobs that the backend has: what is seen of them, what silence means, their logs, their ends.

use bridge_backend::fake::Verb;
use bridge_backend::{ErrorKind, Outcome};

use super::bed::{Bed, Case};
use super::*;
use crate::coordinator::{Endpoint, Fault, Status};

fn done() -> Outcome {
    Outcome::Exited { code: 0 }
}

async fn finish(bed: &Bed, case: &Case, status: Status) {
    bed.world.finish(&case.token, done());
    bed.home(case).await;
    assert_eq!(bed.view(case.ci_job).status, status);
    bed.assert_well();
}

#[tokio::test]
async fn a_job_that_is_left_out_is_lost_only_after_a_while() {
    let bed = Bed::with(FakeOptions::default(), Tuning::default()).await;
    let case = bed.running(job("silent")).await;
    bed.world.silence(&case.token, true);
    bed.sweeps(590).await;
    let row = bed.row(&case).await;
    assert_eq!(row.state, JobState::Running);
    assert!(row.missing_since.is_some());
    let row = bed.until("it counts as lost", &case, |job| job.verdict.is_some()).await;
    let missed = policy::since(bed.now(), row.missing_since.unwrap());
    assert!(missed >= secs(600) && missed < secs(605), "{missed:?}");
    let view = bed.view(case.ci_job);
    assert_eq!(view.failure_reason.as_deref(), Some("runner_system_failure"));
    assert!(view.trace_text().contains("no news of the job"), "{}", view.trace_text());
    // It may be there all the same: it is cancelled, and released when its end is seen.
    bed.world.silence(&case.token, false);
    bed.home(&case).await;
    assert!(bed.world.job(&case.token).unwrap().released);
    bed.assert_well();
}

#[tokio::test]
async fn a_job_that_is_seen_again_is_not_missing_any_more() {
    let bed = Bed::new().await;
    let case = bed.running(job("back")).await;
    bed.world.silence(&case.token, true);
    bed.sweeps(500).await;
    // GitLab cannot be reached when it is seen: it was seen all the same.
    bed.gitlab.go_away().await;
    bed.sweeps(40).await;
    bed.world.silence(&case.token, false);
    bed.sweeps(5).await;
    assert!(bed.row(&case).await.missing_since.is_none());
    bed.gitlab.come_back().await.unwrap();
    bed.world.silence(&case.token, true);
    bed.sweeps(500).await;
    assert_eq!(bed.row(&case).await.state, JobState::Running);
    bed.world.silence(&case.token, false);
    finish(&bed, &case, Status::Success).await;
}

#[tokio::test]
async fn questions_that_are_not_answered_count_for_nothing() {
    let bed = Bed::new().await;
    let case = bed.running(job("unanswered").timeout(secs(9_000))).await;
    bed.world.silence(&case.token, true);
    bed.sweeps(3).await;
    assert!(bed.row(&case).await.missing_since.is_some());
    bed.world.outage(Verb::Poll, Some(ErrorKind::Transient));
    bed.sweeps(1_000).await;
    bed.world.outage(Verb::Poll, None);
    bed.sweeps(100).await;
    assert_eq!(bed.row(&case).await.state, JobState::Running, "it was asked for two minutes");
    bed.world.silence(&case.token, false);
    finish(&bed, &case, Status::Success).await;
}

#[tokio::test]
async fn our_own_absence_counts_for_nothing() {
    let bed = Bed::new().await;
    let case = bed.running(job("absent").timeout(secs(9_000))).await;
    bed.world.silence(&case.token, true);
    bed.sweeps(3).await;
    bed.pass(secs(5_000));
    let bed = bed.restart().await;
    bed.sweeps(500).await;
    assert_eq!(bed.row(&case).await.state, JobState::Running);
    bed.world.silence(&case.token, false);
    finish(&bed, &case, Status::Success).await;
}

#[tokio::test]
async fn what_is_gone_is_gone_at_once() {
    let bed = Bed::new().await;
    let case = bed.running(job("gone")).await;
    bed.world.vanish(&case.token);
    bed.home(&case).await;
    let view = bed.view(case.ci_job);
    assert_eq!(view.failure_reason.as_deref(), Some("runner_system_failure"));
    assert!(view.trace_text().contains("no record of the job"), "{}", view.trace_text());
    bed.assert_well();
}

#[tokio::test]
async fn a_status_that_nobody_knows_changes_nothing() {
    let bed = Bed::new().await;
    let case = bed.running(job("unclear")).await;
    bed.world.say(&case.token, "GALACTIC");
    bed.sweeps(30).await;
    let row = bed.row(&case).await;
    assert_eq!((row.state, row.waits_for.as_deref()), (JobState::Running, Some("GALACTIC")));
    assert_eq!(bed.count(&case, "unclear").await, 1);
    bed.world.start_on(&case.token, "node1");
    bed.until("it is clear again", &case, |job| job.waits_for.is_none()).await;
    finish(&bed, &case, Status::Success).await;
}

#[tokio::test]
async fn a_reason_to_wait_is_told_once_per_change() {
    let bed = Bed::new().await;
    let case = bed.submitted(job("waits")).await;
    let starts_at = policy::after(bed.now(), secs(900));
    bed.world.wait_in_queue(&case.token, "Resources", Some(starts_at));
    bed.sweeps(10).await;
    // While GitLab is away, our trouble with it must not make the old reason news again.
    bed.gitlab.go_away().await;
    bed.pass(secs(40));
    bed.sweeps(60).await;
    bed.gitlab.come_back().await.unwrap();
    bed.sweeps(70).await;
    bed.world.wait_in_queue(&case.token, "Priority", None);
    bed.sweeps(10).await;
    bed.world.start_on(&case.token, "node1");
    bed.until("it runs", &case, |job| job.state == JobState::Running).await;
    finish(&bed, &case, Status::Success).await;
    let text = bed.text(case.ci_job);
    assert_eq!(text.matches("Waiting in batch: Resources").count(), 1, "{text}");
    assert_eq!(text.matches("expects to start it at").count(), 1, "{text}");
    assert_eq!(text.matches("Waiting in batch: Priority").count(), 1, "{text}");
    assert_eq!(text.matches("Started by batch on node#").count(), 1, "{text}");
    assert_eq!(bed.count(&case, "waits").await, 2);
}

#[tokio::test]
async fn a_job_that_is_put_back_into_the_queue_goes_on_running_for_us() {
    let bed = Bed::new().await;
    let case = bed.running(job("requeued")).await;
    bed.world.append_log(&case.token, "before\n");
    bed.sweeps(3).await;
    bed.world.wait_in_queue(&case.token, "BeginTime", None);
    bed.sweeps(20).await;
    assert_eq!(bed.row(&case).await.state, JobState::Running);
    assert_eq!(bed.count(&case, "requeued").await, 1, "noted once");
    bed.world.start_on(&case.token, "node2");
    bed.until("it runs elsewhere", &case, |job| job.host.as_deref() == Some("node2")).await;
    bed.world.append_log(&case.token, "after\n");
    finish(&bed, &case, Status::Success).await;
    assert!(bed.text(case.ci_job).contains("before\nafter\n"));
}

#[tokio::test]
async fn a_deadline_in_the_queue_ends_the_job_there_and_here() {
    let bed = Bed::new().await;
    let case = bed.submitted(job("queued").timeout(secs(100))).await;
    bed.home(&case).await;
    let there = bed.world.job(&case.token).unwrap();
    assert!(there.cancels >= 1 && there.released);
    let view = bed.view(case.ci_job);
    assert_eq!(view.failure_reason.as_deref(), Some("job_execution_timeout"));
    assert!(view.trace_text().contains("waited in the batch queue"), "{}", view.trace_text());
    bed.assert_well();
}

#[tokio::test]
async fn a_deadline_of_a_job_that_does_not_end_is_told_after_a_grace_time() {
    let bed = Bed::new().await;
    let case = bed.running(job("endless").timeout(secs(100))).await;
    bed.world.ignore_cancel(&case.token, true);
    let deadline = bed.row(&case).await.deadline_at;
    bed.until("the deadline passes", &case, |job| job.cancel_requested_at.is_some()).await;
    let (_, before) = bed.life.store.transactions();
    bed.sweeps(100).await;
    let (_, after) = bed.life.store.transactions();
    // Log, touches and repeated cancellations; not one a second for the deadline besides.
    assert!(after - before < 100, "{} writes in 100 seconds", after - before);
    let row = bed.until("the verdict", &case, |job| job.verdict.is_some()).await;
    assert!(policy::since(row.state_at, deadline) >= policy::DEADLINE_GRACE);
    assert_eq!(bed.view(case.ci_job).failure_reason.as_deref(), Some("job_execution_timeout"));
    bed.sweeps(60).await;
    assert!(bed.row(&case).await.released_at.is_none(), "it runs there all the same");
    let cancels = bed.world.job(&case.token).unwrap().cancels;
    assert!(cancels > 12, "asked again: {cancels}");
    bed.world.finish(&case.token, Outcome::Cancelled { by: None });
    bed.home(&case).await;
    bed.assert_well();
}

#[tokio::test]
async fn a_cancellation_is_repeated_until_the_end_is_seen() {
    let bed = Bed::new().await;
    let case = bed.running(job("stubborn")).await;
    bed.world.ignore_cancel(&case.token, true);
    bed.gitlab.cancel(case.ci_job);
    bed.until("it is sent", &case, |job| job.cancel_sent_at.is_some()).await;
    bed.sweeps(60).await;
    let cancels = bed.world.job(&case.token).unwrap().cancels;
    assert!((4..=8).contains(&cancels), "{cancels} in a minute");
    assert_eq!(bed.count(&case, "cancel_sent").await, 1);
    bed.world.finish(&case.token, Outcome::Cancelled { by: None });
    bed.home(&case).await;
    assert_eq!(bed.view(case.ci_job).status, Status::Canceled);
    bed.assert_well();
}

#[tokio::test]
async fn an_operator_ends_a_job_and_its_author_reads_who_did() {
    let bed = Bed::new().await;
    let case = bed.running(job("operator")).await;
    assert!(bed.life.store.request_cancel(case.id, bed.now()).await.unwrap());
    bed.home(&case).await;
    let view = bed.view(case.ci_job);
    assert_eq!(view.failure_reason.as_deref(), Some("runner_interrupted"));
    assert!(view.trace_text().contains("by the operator"), "{}", view.trace_text());
    bed.assert_well();
}

#[tokio::test]
async fn a_log_that_never_ends_is_waited_for_a_while() {
    let bed = Bed::new().await;
    let case = bed.running(job("open")).await;
    bed.world.append_log(&case.token, "all there is\n");
    bed.world.hold_log(&case.token, true);
    bed.world.finish(&case.token, done());
    let ended = bed.until("its end is seen", &case, |job| job.ended_at.is_some()).await.ended_at;
    let row = bed.until("the verdict", &case, |job| job.verdict.is_some()).await;
    let waited = policy::since(row.state_at, ended.unwrap());
    assert!(waited >= policy::LOG_GRACE && waited < policy::LOG_GRACE + secs(5), "{waited:?}");
    bed.home(&case).await;
    assert_eq!(bed.view(case.ci_job).status, Status::Success);
    let text = bed.text(case.ci_job);
    assert!(text.contains("all there is\n") && text.contains("did not arrive in time"), "{text}");
    bed.assert_well();
}

#[tokio::test]
async fn a_log_that_cannot_be_read_holds_nobody_up_for_ever() {
    let bed = Bed::new().await;
    let case = bed.running(job("unreadable").timeout(secs(9_000))).await;
    bed.world.append_log(&case.token, "never seen\n");
    bed.world.outage(Verb::ReadLog, Some(ErrorKind::Transient));
    bed.world.finish(&case.token, done());
    // GitLab hears of the job all the while.
    for _ in 0..60 {
        bed.pass(secs(9));
        bed.sweep().await;
        bed.gitlab.advance(secs(10));
    }
    assert!(bed.row(&case).await.verdict.is_none(), "a file server may be restarted");
    bed.home(&case).await;
    assert_eq!(bed.view(case.ci_job).status, Status::Success);
    bed.assert_well();
}

#[tokio::test]
async fn a_log_that_takes_long_to_carry_is_not_late() {
    let tuning = Tuning { output_limit: 64 * 1024, ..Tuning::default() };
    let bed = Bed::with(FakeOptions::default(), tuning).await;
    let case = bed.running(job("long")).await;
    // More than is carried within the patience for a log that does not come: 4 MiB a step.
    let line = "x".repeat(1023) + "\n";
    let most = line.repeat(1024);
    for _ in 0..48 {
        bed.world.append_log(&case.token, &most);
    }
    bed.world.append_log(&case.token, "the very last line\n");
    bed.world.finish(&case.token, done());
    bed.until("its end is seen", &case, |job| job.ended_at.is_some()).await;
    for _ in 0..200 {
        bed.pass(secs(80));
        bed.sweep().await;
        if bed.row(&case).await.verdict.is_some() {
            break;
        }
    }
    bed.home(&case).await;
    let text = bed.text(case.ci_job);
    assert!(!text.contains("did not arrive"), "it was there to be read");
    assert!(text.contains("bytes of the log are left out here"), "the middle is missing");
    let end = text.split_at(text.len() - 200).1;
    assert!(end.contains("the very last line\n"), "{end}");
    assert!(bed.view(case.ci_job).trace_len < 128 * 1024);
    bed.assert_well();
}

#[tokio::test]
async fn two_hundred_jobs_cost_as_many_questions_as_one() {
    let bed = Bed::with(FakeOptions::default(), Tuning::default()).await;
    let mut cases = Vec::new();
    for n in 0..200 {
        cases.push(bed.take(job(&format!("many {n}"))).await);
    }
    bed.world.trouble(Verb::Submit, bridge_backend::fake::Trouble::LostAnswer);
    bed.world.trouble(Verb::Submit, bridge_backend::fake::Trouble::LostAnswer);
    for _ in 0..60 {
        bed.sweep().await;
        if bed.world.jobs().len() == 200 {
            break;
        }
    }
    bed.sweeps(2).await;
    for case in &cases {
        assert_eq!(bed.row(case).await.state, JobState::Submitted);
        bed.world.start_on(&case.token, "node1");
    }
    assert!(bed.world.count(Verb::Find) <= 4, "{}", bed.world.count(Verb::Find));
    let before = bed.world.count(Verb::Poll);
    bed.sweeps(5).await;
    let polls = bed.world.count(Verb::Poll) - before;
    assert!(polls <= 5, "{polls} polls in 5 sweeps");
    for case in &cases {
        bed.life.store.request_cancel(case.id, bed.now()).await.unwrap();
    }
    let before = (bed.world.count(Verb::Cancel), bed.world.count(Verb::Poll));
    bed.sweeps(3).await;
    assert!(bed.world.count(Verb::Cancel) - before.0 <= 2, "all in one call");
    assert!(bed.world.count(Verb::Poll) - before.1 <= 3);
    for _ in 0..60 {
        bed.sweep().await;
        if bed.life.owed().await == 0 {
            break;
        }
    }
    assert_eq!(bed.life.owed().await, 0);
    let desk = bed.life.reconciler.0.desktop();
    assert!(desk.news.is_empty() && desk.prepared.is_empty() && desk.penalties.is_empty());
    drop(desk);
    bed.assert_well();
}

#[tokio::test]
async fn doubts_about_jobs_that_are_over_are_asked_about_together() {
    let bed = Bed::new().await;
    bed.world.outage(Verb::Find, Some(ErrorKind::Transient));
    let mut cases = Vec::new();
    for n in 0..20 {
        bed.world.trouble(Verb::Submit, bridge_backend::fake::Trouble::LostAnswer);
        cases.push(bed.take(job(&format!("doubt {n}"))).await);
    }
    bed.sweeps(5).await;
    for case in &cases {
        bed.gitlab.force_cancel(case.ci_job);
    }
    bed.sweeps(120).await;
    for case in &cases {
        assert_eq!(bed.row(case).await.state, JobState::Abandoned);
    }
    bed.world.outage(Verb::Find, None);
    let before = bed.world.count(Verb::Find);
    for case in &cases {
        bed.home(case).await;
        assert!(bed.world.job(&case.token).unwrap().released);
    }
    let asked = bed.world.count(Verb::Find) - before;
    assert!(asked < 10, "{asked} questions about 20 jobs");
    bed.world.assert_no_violations();
}

#[tokio::test]
async fn a_quiet_job_is_touched_now_and_then() {
    let bed = Bed::new().await;
    let case = bed.running(job("quiet").timeout(secs(9_000))).await;
    let before = bed.gitlab.requests().of(Endpoint::Update);
    for _ in 0..360 {
        bed.pass(secs(9));
        bed.sweep().await;
        bed.gitlab.advance(secs(10));
    }
    let touches = bed.gitlab.requests().of(Endpoint::Update) - before;
    let every = policy::touch_interval(1).as_secs();
    let expected = 3_600 / every;
    assert!((expected - 20..=expected).contains(&touches), "{touches} touches in an hour");
    finish(&bed, &case, Status::Success).await;
}

#[tokio::test]
async fn a_log_is_carried_live_whether_or_not_somebody_watches() {
    let bed = Bed::new().await;
    let case = bed.running(job("live")).await;
    for n in 0..5 {
        bed.world.append_log(&case.token, format!("line {n}.\n"));
        bed.sweeps(70).await;
        let text = bed.view(case.ci_job).trace_text();
        assert!(text.contains(&format!("line {n}.\n")), "a minute later: {text}");
    }
    bed.gitlab.watch(case.ci_job, true);
    bed.world.append_log(&case.token, "first watched line\n");
    bed.sweeps(70).await;
    bed.world.append_log(&case.token, "second watched line\n");
    bed.sweeps(6).await;
    assert!(bed.text(case.ci_job).contains("second watched line\n"), "seconds later");
    finish(&bed, &case, Status::Success).await;
}

#[tokio::test]
async fn a_gitlab_that_is_away_holds_up_nothing_but_what_it_is_told() {
    let bed = Bed::new().await;
    let case = bed.running(job("outage")).await;
    bed.gitlab.go_away().await;
    bed.world.append_log(&case.token, "written meanwhile\n");
    bed.world.finish(&case.token, done());
    let row = bed.until("the verdict", &case, |job| job.verdict.is_some()).await;
    assert_eq!(row.state, JobState::Reporting);
    bed.sweeps(100).await;
    bed.gitlab.come_back().await.unwrap();
    bed.home(&case).await;
    assert!(bed.text(case.ci_job).contains("written meanwhile\n"));
    bed.assert_well();
}

#[tokio::test]
async fn the_second_touch_that_fails_is_followed_by_a_third() {
    let bed = Bed::new().await;
    let case = bed.submitted(job("flaky")).await;
    bed.gitlab.inject(Endpoint::Update, Fault::status(503).times(3));
    bed.sweeps(120).await;
    assert_eq!(bed.gitlab.faults_left(), 0);
    assert_eq!(bed.row(&case).await.failures, 0);
    finish(&bed, &case, Status::Success).await;
}
