//! Ends that come from outside: a user's cancel, the operator's, and time that is up.

use std::time::{Duration, Instant};

use bridge::coordinator::{
    EndedBy, Endpoint, Fault, Gate, JobView, Knobs, NewJob, Options, Status, Version,
};

use crate::support::{Bed, PATIENCE, Where, is_alive, text_of, until};

/// A command that says something all the time, so that GitLab is called, and answers, all the time.
const CHATTER: &str = "while :; do echo tick; sleep 0.2; done";

/// GitLab wants news every second.
fn eager() -> Options {
    Options {
        knobs: Knobs { trace_interval: Some("1".to_owned()), ..Knobs::default() },
        ..Options::default()
    }
}

/// A bed whose jobs have time to end by themselves after TERM.
async fn patient_bed(options: Options) -> Bed {
    let bed = Bed::new(Where::Local, options, "", "").await;
    bed.edit_config("kill_grace = \"2s\"", "kill_grace = \"30s\"");
    bed
}

/// A job that notes its process and goes on for ever.
fn endless(bed: &Bed) -> NewJob {
    bed.counting("endless").script(bed.note_pid("pid")).script(CHATTER)
}

fn assert_cancelled(bed: &Bed, job: &JobView, by: EndedBy) {
    assert_eq!(job.status, Status::Canceled, "{job:?}\n{}", bed.log());
    assert_eq!(job.ended_by, Some(by), "{job:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_job_stops_and_its_after_script_knows() {
    let bed = patient_bed(eager()).await;
    let _daemon = bed.serve();
    let id = bed
        .gitlab
        .enqueue(endless(&bed).after_script("echo \"after: $CI_JOB_STATUS, $((6 * 7))\""));
    let pid = bed.pid_of("pid").await;
    bed.gitlab.cancel(id);
    assert_eq!(bed.gitlab.job(id).unwrap().status, Status::Canceling, "it is asked, not ended");
    let job = bed.finished(id).await;
    assert_cancelled(&bed, &job, EndedBy::Runner);
    assert_eq!(job.final_update.as_ref().unwrap().state, "failed");
    assert!(!is_alive(pid), "the script's shell is gone");
    let text = text_of(&job);
    assert!(
        text.contains("the script was stopped: the job was cancelled or its time was up"),
        "{text}"
    );
    assert!(text.contains("\nafter: canceled, 42\n"), "{text}");
    assert!(text.ends_with("ERROR: Job failed: canceled\u{1b}[0;m\n"), "{text:?}");
    bed.nothing_owed().await;
    assert_eq!(bed.runs(id), 1);
    assert_eq!(bed.row(id)["state"], "finished");
    bed.assert_no_violations();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_cancelled_while_it_waits_for_its_turn_never_runs() {
    let bed = Bed::new(Where::Local, eager(), "prepare_workers = 1", "").await;
    let gate = Gate::new();
    bed.gitlab.inject(Endpoint::Git, Fault::hold(&gate).always());
    let _daemon = bed.serve();
    let first = bed.gitlab.enqueue(
        // Without GIT_STRATEGY there are sources to get, which takes until the gate opens.
        NewJob::new("first")
            .script(format!("echo ran >> {}/ran/$CI_JOB_ID", bed.dir.path().display())),
    );
    until("the first job to be made ready", || {
        (bed.gitlab.requests().of(Endpoint::Git) > 0).then_some(())
    })
    .await;
    let by_user = bed.gitlab.enqueue(bed.counting("by a user"));
    let by_operator = bed.gitlab.enqueue(bed.counting("by the operator"));
    until("the others to be taken", || (bed.rows().len() == 3).then_some(())).await;
    bed.gitlab.cancel(by_user);
    assert!(bed.run(&["jobs", "cancel", &by_operator.to_string()]).status.success());
    let job = bed.finished(by_user).await;
    assert_cancelled(&bed, &job, EndedBy::Runner);
    let job = bed.finished(by_operator).await;
    assert_eq!(job.failure_reason.as_deref(), Some("runner_interrupted"), "{job:?}");
    assert!(!bed.gitlab.job(first).unwrap().is_finished(), "they did not wait for the first one");
    gate.open();
    let job = bed.finished(first).await;
    assert!(text_of(&job).contains("get_sources: exit status"), "{}", text_of(&job));
    bed.nothing_owed().await;
    assert_eq!([bed.runs(first), bed.runs(by_user), bed.runs(by_operator)], [0, 0, 0]);
    bed.assert_no_violations();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_ignores_term_is_killed_with_all_its_children() {
    // Two seconds of grace.
    let bed = Bed::new(Where::Local, eager(), "", "").await;
    let _daemon = bed.serve();
    let child = format!(
        "setsid sh -c 'trap \"\" TERM; echo $$ > {}; sleep 600; sleep 600' &",
        bed.path("child").display()
    );
    let id = bed.gitlab.enqueue(
        bed.counting("deaf")
            .script("trap '' TERM")
            .script(child)
            .script(bed.note_pid("pid"))
            .script(CHATTER),
    );
    let (pid, child) = (bed.pid_of("pid").await, bed.pid_of("child").await);
    assert!(is_alive(pid) && is_alive(child));
    bed.gitlab.cancel(id);
    let job = bed.finished(id).await;
    assert_cancelled(&bed, &job, EndedBy::Runner);
    bed.nothing_owed().await;
    assert!(!is_alive(pid), "the script's shell is gone");
    assert!(!is_alive(child), "a child in a session of its own is gone");
    bed.assert_no_violations();
}

/// The job has ended for GitLab at once; over there it must end, and GitLab must be left alone.
async fn is_given_up(bed: &Bed, id: i64, pid: i32) {
    let job = bed.finished(id).await;
    assert_cancelled(bed, &job, EndedBy::User);
    bed.nothing_owed().await;
    assert!(!is_alive(pid), "the job over there has ended");
    assert_eq!(bed.row(id)["state"], "abandoned");
    assert_eq!(bed.runs(id), 1);
    bed.assert_no_violations();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_forced_cancel_ends_the_job_over_there() {
    let bed = Bed::new(Where::Local, eager(), "", "").await;
    let _daemon = bed.serve();
    let id = bed.gitlab.enqueue(endless(&bed));
    let pid = bed.pid_of("pid").await;
    bed.gitlab.force_cancel(id);
    is_given_up(&bed, id, pid).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_forced_cancel_overtakes_a_graceful_one() {
    let bed = patient_bed(eager()).await;
    let _daemon = bed.serve();
    let id = bed
        .gitlab
        .enqueue(endless(&bed).after_script(format!("{}; {CHATTER}", bed.note_pid("after"))));
    let pid = bed.pid_of("pid").await;
    bed.gitlab.cancel(id);
    let after = bed.pid_of("after").await;
    bed.gitlab.force_cancel(id);
    // The after_script gets its TERM, too.
    is_given_up(&bed, id, pid).await;
    assert!(!is_alive(after));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_old_server_cancels_at_once_and_the_job_ends_over_there() {
    let options = Options { version: Version::V16_11, ..eager() };
    let bed = Bed::new(Where::Local, options, "", "").await;
    let _daemon = bed.serve();
    let id = bed.gitlab.enqueue(endless(&bed));
    let pid = bed.pid_of("pid").await;
    bed.gitlab.cancel(id);
    is_given_up(&bed, id, pid).await;
}

async fn operator_ended(bed: &Bed, id: i64, pid: i32) {
    let job = bed.finished(id).await;
    assert_eq!(job.status, Status::Failed, "{job:?}\n{}", bed.log());
    assert_eq!(job.failure_reason.as_deref(), Some("runner_interrupted"), "{job:?}");
    let text = text_of(&job);
    assert!(text.contains("cancelled by the operator of the runner"), "{text}");
    bed.nothing_owed().await;
    assert!(!is_alive(pid));
    assert_eq!(bed.runs(id), 1);
    let again = bed.run(&["jobs", "cancel", &id.to_string()]);
    assert!(again.status.success(), "{}", String::from_utf8_lossy(&again.stderr));
    bed.assert_no_violations();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_cancels_while_the_daemon_runs() {
    let bed = Bed::local().await;
    let _daemon = bed.serve();
    let id = bed.gitlab.enqueue(endless(&bed));
    let pid = bed.pid_of("pid").await;
    let row = bed.row(id)["id"].as_str().unwrap().to_owned();
    let output = bed.run(&["jobs", "cancel", &row]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    operator_ended(&bed, id, pid).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_cancels_while_the_daemon_is_stopped() {
    let bed = Bed::local().await;
    let daemon = bed.serve();
    let id = bed.gitlab.enqueue(endless(&bed));
    let pid = bed.pid_of("pid").await;
    assert!(daemon.term().await.success());
    let output = bed.run(&["jobs", "cancel", &id.to_string()]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(is_alive(pid), "nobody is there who could end it");
    let _daemon = bed.serve();
    operator_ended(&bed, id, pid).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_script_has_its_time_and_after_script_its_own() {
    let bed = patient_bed(Options::default()).await;
    let _daemon = bed.serve();
    let slow = bed.gitlab.enqueue(
        bed.counting("slow")
            .env("RUNNER_SCRIPT_TIMEOUT", "2s")
            .script("sleep 600")
            .after_script("echo \"after: $CI_JOB_STATUS, $((6 * 7))\""),
    );
    let slow_after = bed.gitlab.enqueue(
        bed.counting("slow after")
            .env("RUNNER_AFTER_SCRIPT_TIMEOUT", "1s")
            .script("echo done")
            .after_script("sleep 600"),
    );
    let strict = bed.gitlab.enqueue(
        bed.counting("strict")
            .env("RUNNER_AFTER_SCRIPT_TIMEOUT", "1s")
            .env("AFTER_SCRIPT_IGNORE_ERRORS", "false")
            .after_script("sleep 600"),
    );
    let started = Instant::now();
    let job = bed.finished(slow).await;
    let text = text_of(&job);
    assert_eq!(job.status, Status::Failed, "{text}");
    assert_eq!(job.failure_reason.as_deref(), Some("job_execution_timeout"), "{text}");
    assert!(text.contains("longer than RUNNER_SCRIPT_TIMEOUT allows (2 s)"), "{text}");
    assert!(text.contains("\nafter: timedout, 42\n"), "{text}");
    let job = bed.finished(slow_after).await;
    let text = text_of(&job);
    assert_eq!(job.status, Status::Success, "{text}");
    assert!(text.contains("after_script failed, but job will continue unaffected"), "{text}");
    assert!(text.contains("RUNNER_AFTER_SCRIPT_TIMEOUT allows (1 s)"), "{text}");
    let job = bed.finished(strict).await;
    assert_eq!(job.status, Status::Failed, "{}", text_of(&job));
    assert!(started.elapsed() < Duration::from_secs(45), "{:?}", started.elapsed());
    bed.nothing_owed().await;
    bed.assert_no_violations();
}

#[tokio::test(flavor = "multi_thread")]
async fn gitlabs_timeout_ends_the_job_and_says_so() {
    let bed = patient_bed(Options::default()).await;
    let _daemon = bed.serve();
    let id = bed.gitlab.enqueue(endless(&bed).timeout(Duration::from_secs(6)));
    let pid = bed.pid_of("pid").await;
    let job = bed.finished(id).await;
    let text = text_of(&job);
    assert_eq!(job.status, Status::Failed, "{text}");
    assert_eq!(job.ended_by, Some(EndedBy::Runner));
    assert_eq!(job.failure_reason.as_deref(), Some("job_execution_timeout"), "{text}");
    let last = text.lines().last().unwrap();
    // Ours or the backend's clock, whichever was first; both say how long it might run.
    assert!(last.contains("ERROR: Job failed: ") && last.contains("6 seconds"), "{text}");
    bed.nothing_owed().await;
    assert!(!is_alive(pid));
    bed.assert_no_violations();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_timeout_that_passes_while_the_daemon_is_away_ends_the_job_all_the_same() {
    let bed = patient_bed(Options::default()).await;
    let daemon = bed.serve();
    let id = bed.gitlab.enqueue(endless(&bed).timeout(Duration::from_secs(6)));
    let pid = bed.pid_of("pid").await;
    daemon.kill();
    until("the backend to end the job", || (!is_alive(pid)).then_some(())).await;
    let _daemon = bed.serve();
    let job = bed.finished(id).await;
    assert_eq!(job.failure_reason.as_deref(), Some("job_execution_timeout"), "{}", text_of(&job));
    bed.nothing_owed().await;
    bed.assert_no_violations();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_that_comes_after_success_changes_nothing_over_there() {
    let bed = Bed::local().await;
    let gate = Gate::new();
    bed.gitlab.inject(Endpoint::FinalUpdate, Fault::hold(&gate));
    let _daemon = bed.serve();
    let id = bed.gitlab.enqueue(bed.counting("late"));
    until("the verdict to be on its way", || {
        (bed.gitlab.requests().of(Endpoint::FinalUpdate) == 1).then_some(())
    })
    .await;
    bed.gitlab.cancel(id);
    gate.open();
    let job = bed.finished(id).await;
    // GitLab makes of a success what the user asked for; the bridge tells the truth.
    assert_cancelled(&bed, &job, EndedBy::Runner);
    assert_eq!(job.final_update.as_ref().unwrap().state, "success");
    bed.nothing_owed().await;
    assert_eq!(bed.row(id)["state"], "finished");
    assert_eq!(bed.runs(id), 1);
    bed.assert_no_violations();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_forced_cancel_that_meets_the_verdict_wins_and_nothing_is_owed() {
    let bed = Bed::local().await;
    let gate = Gate::new();
    bed.gitlab.inject(Endpoint::FinalUpdate, Fault::hold(&gate));
    let _daemon = bed.serve();
    let id = bed.gitlab.enqueue(bed.counting("late"));
    until("the verdict to be on its way", || {
        (bed.gitlab.requests().of(Endpoint::FinalUpdate) == 1).then_some(())
    })
    .await;
    bed.gitlab.force_cancel(id);
    gate.open();
    let job = bed.finished(id).await;
    assert_cancelled(&bed, &job, EndedBy::User);
    bed.nothing_owed().await;
    assert_eq!(bed.row(id)["state"], "abandoned");
    bed.assert_no_violations();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_is_learnt_of_though_the_job_says_nothing() {
    let bed = Bed::local().await;
    let _daemon = bed.serve();
    let id =
        bed.gitlab.enqueue(bed.counting("silent").script(bed.note_pid("pid")).script("sleep 600"));
    let pid = bed.pid_of("pid").await;
    bed.gitlab.cancel(id);
    let job = match bed.gitlab.wait_finished(id, PATIENCE).await {
        Ok(job) => job,
        Err(job) => panic!("{job:?}\n{}", bed.log()),
    };
    assert_cancelled(&bed, &job, EndedBy::Runner);
    bed.nothing_owed().await;
    assert!(!is_alive(pid));
    bed.assert_no_violations();
}
