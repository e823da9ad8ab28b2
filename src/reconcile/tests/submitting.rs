//! What becomes of submissions, and above all of those whose answer is lost.

use bridge_backend::fake::{Trouble, Verb};
use bridge_backend::{ErrorKind, Fault, Lookup, Outcome};

use super::bed::{Bed, Case};
use super::*;
use crate::coordinator::{Endpoint, Status};

fn looking(lookup: Lookup) -> FakeOptions {
    let mut options = FakeOptions::default();
    options.capabilities.lookup = lookup;
    options
}

fn settling(settle: u64) -> FakeOptions {
    looking(Lookup::ByToken { settle: secs(settle) })
}

fn failing(kind: ErrorKind) -> Trouble {
    Trouble::Fail(kind)
}

/// A runner with a script before git.
fn hooked(script: &str) -> Tuning {
    Tuning { pre_get_sources_script: Some(script.into()), ..Tuning::default() }
}

/// A job with sources, whose secret is in a file.
fn from_git(name: &str) -> NewJob {
    NewJob::new(name).variable(Variable::new("PASSWORD", SECRET).masked().file())
}

#[tokio::test]
async fn a_lost_answer_is_found_again() {
    let bed = Bed::with(settling(30), Tuning::default()).await;
    bed.world.trouble(Verb::Submit, Trouble::LostAnswer);
    let case = bed.take(job("found")).await;
    let row = bed.until("it is found", &case, |job| job.state == JobState::Submitted).await;
    assert_eq!(row.external_id, bed.world.job(&case.token).map(|job| job.job.id));
    assert_eq!(bed.world.count(Verb::Submit), 1);
    bed.world.finish(&case.token, Outcome::Exited { code: 0 });
    bed.home(&case).await;
    assert_eq!(bed.view(case.ci_job).status, Status::Success);
    bed.assert_well();
}

#[tokio::test]
async fn what_is_surely_absent_is_submitted_under_the_same_token() {
    let bed = Bed::with(settling(30), Tuning::default()).await;
    bed.world.trouble(Verb::Submit, Trouble::LostQuestion);
    let case = bed.take(job("absent")).await;
    bed.sweeps(20).await;
    assert_eq!(bed.world.count(Verb::Submit), 1, "absence does not count yet");
    assert!(bed.world.count(Verb::Find) >= 1);
    bed.until("it is submitted", &case, |job| job.state == JobState::Submitted).await;
    let jobs = bed.world.jobs();
    assert_eq!(jobs.len(), 1);
    assert_eq!(jobs[0].job.token, case.token);
    bed.world.finish(&case.token, Outcome::Exited { code: 0 });
    bed.home(&case).await;
    bed.assert_well();
}

#[tokio::test]
async fn absence_counts_from_when_it_was_asked_for_not_from_when_it_was_heard() {
    // The answer to `find` is late: it was asked before absence counts and is read after that.
    let bed = Bed::with(settling(30), Tuning::default()).await;
    bed.world.hide_new_jobs_for(secs(25));
    bed.world.trouble(Verb::Submit, Trouble::LostAnswer);
    let case = bed.take(job("late")).await;
    bed.until("it is tried", &case, |job| job.state == JobState::Submitting).await;
    let inner = &bed.life.reconciler.0;
    let asked = bed.now();
    bed.pass(secs(60));
    inner.tell(case.id, News::Absent { asked }, bed.now());
    bed.life.reconciler.quiesce().await;
    assert_eq!(bed.world.count(Verb::Submit), 1, "it would run twice");
    bed.until("it is found", &case, |job| job.state == JobState::Submitted).await;
    bed.world.finish(&case.token, Outcome::Exited { code: 0 });
    bed.home(&case).await;
    bed.assert_well();
}

#[tokio::test]
async fn an_earlier_process_may_have_submitted_until_it_ended() {
    // It noted the attempt, waited long for its turn, submitted, and died.
    let bed = Bed::with(settling(30), Tuning::default()).await;
    bed.world.trouble(Verb::Submit, Trouble::HangBefore);
    let case = bed.take(job("waited")).await;
    bed.pass(secs(1));
    bed.life.reconciler.sweep(bed.now()).await.unwrap();
    while bed.world.count(Verb::Submit) == 0 {
        tokio::task::yield_now().await;
    }
    bed.pass(secs(120));
    // The first process is gone, without a word; its rows are read by the next.
    let next = bed.open(|store| store, bed.world.open()).await;
    for _ in 0..20 {
        bed.turn(&next).await;
    }
    assert_eq!(bed.world.count(Verb::Submit), 1, "it may have come a moment ago");
    for _ in 0..30 {
        bed.turn(&next).await;
    }
    assert_eq!(bed.world.count(Verb::Submit), 2);
    assert_eq!(bed.world.jobs().len(), 1);
    assert_eq!(next.job(case.id).await.state, JobState::Submitted);
    bed.world.assert_no_violations();
}

#[tokio::test]
async fn a_daemon_that_never_lives_as_long_as_absence_takes_submits_all_the_same() {
    let mut bed = Bed::with(settling(30), Tuning::default()).await;
    bed.world.trouble(Verb::Submit, Trouble::LostQuestion);
    let case = bed.take(job("short lives")).await;
    bed.until("it is tried", &case, |job| job.state == JobState::Submitting).await;
    let mut lives = 0;
    while bed.row(&case).await.state == JobState::Submitting {
        lives += 1;
        assert!(lives < 40, "no life came to it: {:#?}", bed.row(&case).await);
        bed = bed.restart().await;
        bed.sweeps(2).await;
        if lives < 14 {
            assert_eq!(bed.world.count(Verb::Submit), 1, "absence does not count yet");
        }
    }
    assert_eq!(bed.world.count(Verb::Submit), 2);
    assert_eq!(bed.world.jobs().len(), 1);
    bed.world.finish(&case.token, Outcome::Exited { code: 0 });
    bed.home(&case).await;
    bed.assert_well();
}

#[tokio::test]
async fn where_nobody_can_look_a_lost_answer_fails_the_job_and_names_the_token() {
    let bed = Bed::with(looking(Lookup::Never), Tuning::default()).await;
    bed.world.trouble(Verb::Submit, Trouble::LostAnswer);
    let case = bed.take(job("never")).await;
    bed.home(&case).await;
    let view = bed.view(case.ci_job);
    assert_eq!(view.failure_reason.as_deref(), Some("runner_system_failure"));
    assert!(view.trace_text().contains(case.token.as_str()), "{}", view.trace_text());
    assert_eq!(bed.world.count(Verb::Submit), 1);
    assert_eq!(bed.world.count(Verb::Find), 0);
    bed.assert_well();
}

#[tokio::test]
async fn where_nobody_can_look_a_clear_no_is_still_tried_again() {
    let bed = Bed::with(looking(Lookup::Never), Tuning::default()).await;
    bed.world.trouble(Verb::Submit, failing(ErrorKind::Transient));
    bed.world.trouble(Verb::Submit, failing(ErrorKind::Transient));
    let case = bed.submitted(job("busy")).await;
    assert_eq!(bed.world.count(Verb::Submit), 3);
    bed.world.finish(&case.token, Outcome::Exited { code: 0 });
    bed.home(&case).await;
    assert_eq!(bed.view(case.ci_job).status, Status::Success);
    bed.assert_well();
}

#[tokio::test]
async fn a_backend_that_knows_its_tokens_is_asked_again() {
    let bed = Bed::with(looking(Lookup::Resubmit), Tuning::default()).await;
    bed.world.trouble(Verb::Submit, Trouble::LostAnswer);
    let case = bed.submitted(job("again")).await;
    assert_eq!(bed.world.jobs().len(), 1);
    assert_eq!(bed.world.job(&case.token).unwrap().submissions, 2);
    bed.world.finish(&case.token, Outcome::Exited { code: 0 });
    bed.home(&case).await;
    bed.assert_well();
}

#[tokio::test]
async fn a_refusal_says_who_can_help() {
    for (fault, reason) in
        [(Fault::Job, "runner_configuration_error"), (Fault::Site, "runner_system_failure")]
    {
        let bed = Bed::with(settling(600), Tuning::default()).await;
        bed.world.trouble(Verb::Submit, failing(ErrorKind::Rejected(fault)));
        let case = bed.take(job("refused")).await;
        bed.sweeps(3).await;
        let row = bed.row(&case).await;
        assert!(row.released_at.is_some(), "nothing is there that could settle: {row:?}");
        let view = bed.view(case.ci_job);
        assert_eq!((view.status, view.failure_reason.as_deref()), (Status::Failed, Some(reason)));
        assert!(view.trace_text().contains("do what was asked: test"), "{}", view.trace_text());
        assert_eq!(bed.world.count(Verb::Submit), 1);
        bed.assert_well();
    }
}

#[tokio::test]
async fn a_submission_that_fails_for_now_backs_off_and_is_not_lost() {
    let bed = Bed::with(settling(5), Tuning::default()).await;
    bed.world.outage(Verb::Submit, Some(ErrorKind::Transient));
    let case = bed.take(job("patient").timeout(secs(4 * 3600))).await;
    // An hour: GitLab must hear of the job all the while, or it would end it.
    let mut calls = Vec::new();
    for _ in 0..360 {
        bed.pass(secs(9));
        bed.sweep().await;
        bed.gitlab.advance(secs(10));
        calls.push(bed.world.count(Verb::Submit));
    }
    let submissions = *calls.last().unwrap();
    assert!((50..80).contains(&submissions), "{submissions} in an hour: once a minute");
    assert!(!bed.view(case.ci_job).is_finished());
    bed.world.outage(Verb::Submit, None);
    bed.until("it is submitted", &case, |job| job.state == JobState::Submitted).await;
    bed.world.finish(&case.token, Outcome::Exited { code: 0 });
    bed.home(&case).await;
    assert_eq!(bed.view(case.ci_job).status, Status::Success);
    bed.assert_well();
}

#[tokio::test]
async fn a_find_that_is_not_answered_changes_nothing_and_backs_off() {
    let bed = Bed::with(settling(5), Tuning::default()).await;
    bed.world.trouble(Verb::Submit, Trouble::LostAnswer);
    bed.world.outage(Verb::Find, Some(ErrorKind::Transient));
    let case = bed.take(job("unasked")).await;
    bed.sweeps(300).await;
    let row = bed.row(&case).await;
    assert_eq!(row.state, JobState::Submitting);
    let asked = bed.world.count(Verb::Find);
    assert!((8..=14).contains(&asked), "asked {asked} times in five minutes");
    assert_eq!(bed.count(&case, "unanswered").await, 1, "told once");
    bed.world.outage(Verb::Find, None);
    bed.until("it is found", &case, |job| job.state == JobState::Submitted).await;
    assert_eq!(bed.world.count(Verb::Submit), 1);
    bed.world.finish(&case.token, Outcome::Exited { code: 0 });
    bed.home(&case).await;
    bed.assert_well();
}

#[tokio::test]
async fn a_deadline_in_doubt_leaves_nothing_behind() {
    let bed = Bed::with(settling(5), Tuning::default()).await;
    bed.world.trouble(Verb::Submit, Trouble::LostAnswer);
    bed.world.outage(Verb::Find, Some(ErrorKind::Transient));
    let case = bed.take(job("doubt").timeout(secs(120))).await;
    bed.until("the verdict is told", &case, |job| job.state == JobState::Finished).await;
    assert_eq!(bed.view(case.ci_job).failure_reason.as_deref(), Some("job_execution_timeout"));
    bed.sweeps(5).await;
    assert!(bed.row(&case).await.released_at.is_none(), "it may be there");
    bed.world.outage(Verb::Find, None);
    bed.home(&case).await;
    let there = bed.world.job(&case.token).unwrap();
    assert!(there.cancels >= 1 && there.released, "{there:?}");
    bed.assert_well();
}

#[tokio::test]
async fn too_little_time_is_said_instead_of_submitted() {
    let bed = Bed::new().await;
    let case = bed.take(job("late").timeout(secs(100))).await;
    bed.pass(secs(80));
    bed.home(&case).await;
    assert_eq!(bed.world.count(Verb::Submit), 0);
    assert_eq!(bed.view(case.ci_job).failure_reason.as_deref(), Some("job_execution_timeout"));
    bed.assert_well();
}

#[tokio::test]
async fn a_slow_backend_does_not_keep_other_jobs_waiting() {
    let bed = Bed::with(settling(0), Tuning { step_workers: 1, ..Tuning::default() }).await;
    let other = bed.running(job("other")).await;
    bed.world.trouble(Verb::Submit, Trouble::LostQuestion);
    let hung = bed.take(job("hung")).await;
    bed.until("it is in doubt", &hung, |job| job.state == JobState::Submitting).await;
    bed.world.trouble(Verb::Submit, Trouble::HangBefore);
    bed.world.finish(&other.token, Outcome::Exited { code: 0 });
    for _ in 0..200 {
        bed.pass(secs(1));
        bed.life.reconciler.sweep(bed.now()).await.unwrap();
        tokio::time::sleep(Duration::from_millis(5)).await;
        if bed.row(&other).await.released_at.is_some() {
            break;
        }
    }
    assert_eq!(bed.world.count(Verb::Submit), 3, "one of them hangs");
    assert!(bed.row(&other).await.released_at.is_some());
    assert_eq!(bed.view(other.ci_job).status, Status::Success);
    bed.world.assert_no_violations();
}

#[tokio::test]
async fn a_process_that_stops_while_it_makes_a_job_ready_begins_again_and_says_so() {
    // The hook waits until somebody writes into a pipe.
    let hook = "echo made ready; read -r go < \"$THE_PIPE\"; exit 3";
    let bed = Bed::with(FakeOptions::default(), hooked(hook)).await;
    let pipe = bed.path("pipe");
    let made = std::process::Command::new("mkfifo").arg(&pipe).status().unwrap();
    assert!(made.success());
    let case = bed.take(from_git("slow").env("THE_PIPE", pipe.as_str())).await;
    bed.pass(secs(1));
    bed.life.reconciler.sweep(bed.now()).await.unwrap();
    let row = kept(&bed.life, case.id).await;
    assert_eq!(row.state, JobState::Received);
    let files = row.workspace.map(|dir| Utf8PathBuf::from(format!("{dir}.tmp"))).unwrap();
    assert!(files.join("PASSWORD").exists());
    let bed = bed.restart().await;
    bed.pass(secs(1));
    bed.life.reconciler.sweep(bed.now()).await.unwrap();
    let writer = pipe.clone();
    tokio::task::spawn_blocking(move || std::fs::write(writer, "go\n")).await.unwrap().unwrap();
    bed.home(&case).await;
    assert_eq!(bed.view(case.ci_job).exit_code, Some(3));
    let text = bed.text(case.ci_job);
    assert_eq!(text.matches("Running with bridge").count(), 1, "{text}");
    assert_eq!(text.matches("it does so again").count(), 1, "{text}");
    assert_eq!(text.matches("section_start:#:get_sources").count(), 2, "{text}");
    assert_eq!(text.matches("section_end:#:get_sources").count(), 2, "{text}");
    assert!(!files.exists());
    bed.assert_well();
}

/// Waits until something of the job's preparation was kept.
async fn kept(life: &Life, id: JobId) -> Job {
    for _ in 0..4_000 {
        let job = life.job(id).await;
        if job.trace_len > 0 {
            return job;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("nothing was kept: {:?}", life.job(id).await);
}

#[tokio::test]
async fn a_job_that_cannot_be_made_ready_leaves_no_secrets_behind() {
    let bed = Bed::with(FakeOptions::default(), hooked("exit 3")).await;
    let case = bed.take(from_git("unready")).await;
    let row = bed.home(&case).await;
    let files = row.workspace.map(|dir| Utf8PathBuf::from(format!("{dir}.tmp"))).unwrap();
    assert!(!files.exists(), "file variables are gone");
    let view = bed.view(case.ci_job);
    assert_eq!(view.failure_reason.as_deref(), Some("script_failure"));
    assert_eq!(view.exit_code, Some(3));
    assert_eq!(bed.world.count(Verb::Submit), 0);
    bed.assert_well();
}

#[tokio::test]
async fn a_job_that_gitlab_ends_while_it_is_made_ready_is_not_submitted() {
    let bed =
        Bed::with(FakeOptions::default(), hooked("echo made ready; read -r go < \"$P\"")).await;
    let pipe = bed.path("pipe");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let case = bed.take(from_git("ended").env("P", pipe.as_str())).await;
    bed.pass(secs(1));
    bed.life.reconciler.sweep(bed.now()).await.unwrap();
    kept(&bed.life, case.id).await;
    bed.gitlab.force_cancel(case.ci_job);
    bed.pass(secs(70));
    bed.life.reconciler.quiesce().await;
    let row = bed.home(&case).await;
    assert_eq!(row.state, JobState::Abandoned);
    assert!(!Utf8PathBuf::from(format!("{}.tmp", row.workspace.unwrap())).exists());
    assert_eq!(bed.world.count(Verb::Submit), 0);
    bed.assert_well();
}

#[tokio::test]
async fn a_job_cancelled_before_its_first_touch_is_not_submitted() {
    let bed = Bed::new().await;
    let case = bed.take(job("early")).await;
    bed.gitlab.cancel(case.ci_job);
    bed.home(&case).await;
    assert_eq!(bed.world.count(Verb::Submit), 0);
    assert_eq!(bed.view(case.ci_job).status, Status::Canceled);
    assert_eq!(bed.gitlab.requests().of(Endpoint::FinalUpdate), 1);
    bed.assert_well();
}

/// How often a text stands in a job's trace.
fn times(bed: &Bed, case: &Case, text: &str) -> usize {
    bed.view(case.ci_job).trace_text().matches(text).count()
}

#[tokio::test]
async fn a_job_waits_for_the_operator_and_its_author_is_told_once() {
    let bed = Bed::with(settling(5), Tuning::default()).await;
    bed.world.lock_out(true);
    let case = bed.take(job("locked out").timeout(secs(4 * 3600))).await;
    for _ in 0..360 {
        bed.pass(secs(9));
        bed.sweep().await;
        bed.gitlab.advance(secs(10));
    }
    let row = bed.row(&case).await;
    assert_eq!(row.waits_for.as_deref(), Some("the runner's operator"));
    assert!(!bed.view(case.ci_job).is_finished());
    assert_eq!(times(&bed, &case, "its operator must act"), 1);
    bed.world.lock_out(false);
    bed.until("it is submitted", &case, |job| job.state == JobState::Submitted).await;
    bed.world.finish(&case.token, Outcome::Exited { code: 0 });
    bed.home(&case).await;
    assert_eq!(bed.view(case.ci_job).status, Status::Success);
    assert_eq!(times(&bed, &case, "its operator must act"), 1);
    assert_eq!(times(&bed, &case, "can use the backend again"), 1);
    assert_eq!(bed.world.job(&case.token).unwrap().submissions, 1);
    bed.assert_well();
}

#[tokio::test]
async fn a_job_that_waits_for_the_operator_can_be_cancelled() {
    let bed = Bed::with(settling(5), Tuning::default()).await;
    bed.world.lock_out(true);
    let case = bed.take(job("given up").timeout(secs(4 * 3600))).await;
    bed.until("it waits", &case, |job| job.waits_for.is_some()).await;
    bed.gitlab.cancel(case.ci_job);
    bed.until("it is over", &case, |job| job.state.is_over()).await;
    assert_eq!(bed.world.jobs().len(), 0);
}

#[tokio::test]
async fn a_job_that_ended_waits_with_its_log_for_the_operator() {
    let bed = Bed::with(settling(5), Tuning::default()).await;
    let case = bed.running(job("has more to say").timeout(secs(4 * 3600))).await;
    bed.world.outage(Verb::ReadLog, Some(ErrorKind::Transient));
    bed.world.append_log(&case.token, "the last word\n");
    bed.world.finish(&case.token, Outcome::Exited { code: 0 });
    bed.until("its end is seen", &case, |job| job.ended_at.is_some()).await;
    bed.world.outage(Verb::ReadLog, None);
    bed.world.lock_out(true);
    for _ in 0..200 {
        bed.pass(secs(9));
        bed.sweep().await;
        bed.gitlab.advance(secs(10));
    }
    assert!(!bed.view(case.ci_job).is_finished());
    bed.world.lock_out(false);
    bed.home(&case).await;
    assert_eq!(bed.view(case.ci_job).status, Status::Success);
    assert_eq!(times(&bed, &case, "the last word"), 1);
    bed.assert_well();
}
