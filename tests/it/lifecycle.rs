//! A job's whole life, with the daemon stopped and started at every quiet moment.

use std::time::{Duration, Instant};

use bridge::coordinator::{Git, NewJob, Options, Status, Variable};

use crate::support::{Bed, Where, text_of, until};

#[tokio::test(flavor = "multi_thread")]
async fn a_job_is_taken_run_and_reported() {
    let bed = Bed::local().await;
    let _daemon = bed.serve();
    let good = bed.gitlab.enqueue(bed.counting("good").script("echo hello; echo world >&2"));
    let bad = bed.gitlab.enqueue(bed.counting("bad").script("exit 3"));
    let good = bed.finished(good).await;
    let bad = bed.finished(bad).await;
    assert_eq!(good.status, Status::Success, "{}", bed.log());
    let text = text_of(&good);
    assert!(text.contains("\nhello\nworld\n"), "{text}");
    assert!(text.contains("$ echo hello; echo world >&2"), "{text}");
    assert!(text.contains("Job succeeded"), "{text}");
    assert_eq!(bad.status, Status::Failed);
    assert_eq!(bad.failure_reason.as_deref(), Some("script_failure"));
    assert_eq!(bad.exit_code, Some(3));
    assert!(text_of(&bad).contains("ERROR: Job failed: exit status 3"), "{}", text_of(&bad));
    bed.nothing_owed().await;
    bed.assert_once(good.id);
    bed.assert_no_violations();
}

#[tokio::test(flavor = "multi_thread")]
async fn sources_come_over_http_and_the_token_stays_nowhere() {
    let bed = Bed::local().await;
    let work = bed.path("project");
    std::fs::create_dir_all(&work).unwrap();
    std::fs::write(work.join("hello.txt"), "from the repository\n").unwrap();
    for args in [
        &["init", "-q", "-b", "main"][..],
        &["add", "."],
        &["-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-q", "-m", "one"],
    ] {
        assert!(
            std::process::Command::new("git")
                .args(args)
                .current_dir(&work)
                .status()
                .unwrap()
                .success()
        );
    }
    bed.gitlab.serve_repository("hep/tracker", &work).await.unwrap();
    let _daemon = bed.serve();
    let job = bed.gitlab.enqueue(
        NewJob::new("sources")
            .git(Git::default())
            .script("cat hello.txt")
            .script("cat .git/config; env | grep -c CI_JOB_TOKEN"),
    );
    let job = bed.finished(job).await;
    let text = text_of(&job);
    assert_eq!(job.status, Status::Success, "{text}\n{}", bed.log());
    assert!(text.contains("from the repository"), "{text}");
    assert!(!text.contains("glcbt-64_"), "{text}");
    bed.nothing_owed().await;
    until("the job's token to be in no file", || {
        let found = std::process::Command::new("grep")
            .args(["-rlaE", "glcbt-64_[A-Za-z0-9]{8}"])
            .arg(bed.path("builds"))
            .arg(bed.path("jobs"))
            .arg(bed.path("state"))
            .output()
            .unwrap();
        found.stdout.is_empty().then_some(())
    })
    .await;
    bed.assert_no_violations();
}

#[tokio::test(flavor = "multi_thread")]
async fn values_arrive_exactly_as_gitlab_sent_them() {
    let bed = Bed::local().await;
    let _daemon = bed.serve();
    let value = "it's \"quoted\" $HOME `x` \\ back\nsecond line\ttab é ⏎ \u{1f600} %s !";
    let job = bed.gitlab.enqueue(
        bed.counting("values")
            .variable(Variable::new("ODD", value).raw())
            .variable(Variable::new("KEY_FILE", "line one\nline two").file())
            .script(format!("printf %s \"$ODD\" > {}/odd", bed.dir.path().display()))
            .script(format!(
                "cp \"$KEY_FILE\" {}/file; stat -c %a \"$KEY_FILE\"",
                bed.dir.path().display()
            )),
    );
    let job = bed.finished(job).await;
    assert_eq!(job.status, Status::Success, "{}", text_of(&job));
    assert_eq!(std::fs::read_to_string(bed.path("odd")).unwrap(), value);
    assert_eq!(std::fs::read_to_string(bed.path("file")).unwrap(), "line one\nline two");
    assert!(text_of(&job).contains("\n600\n"), "{}", text_of(&job));
    bed.nothing_owed().await;
    bed.assert_no_violations();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_daemon_leaves_the_job_running_and_the_next_one_carries_on() {
    let bed = Bed::local().await;
    let daemon = bed.serve();
    let gate = bed.path("gate");
    let job = bed.gitlab.enqueue(
        bed.counting("long")
            .script("echo before")
            .script(format!("until [ -e {} ]; do sleep 0.1; done", gate.display()))
            .script("echo after"),
    );
    until("the job to run", || (bed.runs(job) == 1).then_some(())).await;
    let started = Instant::now();
    assert!(daemon.term().await.success());
    assert!(started.elapsed() < Duration::from_secs(30), "within shutdown_timeout");
    assert!(!bed.gitlab.job(job).unwrap().is_finished());
    std::fs::write(&gate, "").unwrap();
    let _daemon = bed.serve();
    let seen = bed.finished(job).await;
    let text = text_of(&seen);
    assert!(text.contains("before") && text.contains("after"), "{text}");
    bed.nothing_owed().await;
    bed.assert_once(job);
    bed.assert_no_violations();
}

#[tokio::test(flavor = "multi_thread")]
async fn after_script_knows_how_the_job_went() {
    let bed = Bed::local().await;
    let _daemon = bed.serve();
    let job = bed.gitlab.enqueue(
        bed.counting("after").script("false").after_script("echo \"status is $CI_JOB_STATUS\""),
    );
    let job = bed.finished(job).await;
    assert_eq!(job.status, Status::Failed);
    assert_eq!(job.exit_code, Some(1));
    assert!(text_of(&job).contains("status is failed"), "{}", text_of(&job));
    bed.assert_no_violations();
}

#[tokio::test(flavor = "multi_thread")]
async fn no_more_jobs_are_taken_than_there_is_room_for() {
    let bed =
        Bed::new(Where::Local, Options::default(), "", "limit = 3\nrequest_concurrency = 4").await;
    let _daemon = bed.serve();
    let gate = bed.path("gate");
    for n in 0..9 {
        bed.gitlab.enqueue(
            bed.counting(&format!("job {n}"))
                .script(format!("until [ -e {} ]; do sleep 0.1; done", gate.display())),
        );
    }
    until("three jobs to be taken", || (bed.gitlab.counts().running == 3).then_some(())).await;
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!(bed.gitlab.counts().running, 3, "the limit holds");
    std::fs::write(&gate, "").unwrap();
    bed.all_finished(Duration::from_secs(90)).await;
    bed.nothing_owed().await;
    bed.assert_no_violations();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_changes_limits_and_a_bad_one_changes_nothing() {
    let bed = Bed::new(Where::Local, Options::default(), "", "limit = 1").await;
    let daemon = bed.serve();
    let gate = bed.path("gate");
    let wait = format!("until [ -e {} ]; do sleep 0.1; done", gate.display());
    for n in 0..3 {
        bed.gitlab.enqueue(bed.counting(&format!("job {n}")).script(wait.clone()));
    }
    until("one job to be taken", || (bed.gitlab.counts().running == 1).then_some(())).await;
    let good = std::fs::read_to_string(&bed.config).unwrap();
    crate::support::write_private(&bed.config, &good.replace("limit = 1", "limt = 3"));
    daemon.signal("HUP");
    until("the bad configuration to be refused", || {
        bed.log().contains("the old one stays").then_some(())
    })
    .await;
    assert_eq!(bed.gitlab.counts().running, 1);
    crate::support::write_private(&bed.config, &good.replace("limit = 1", "limit = 3"));
    daemon.signal("HUP");
    until("three jobs to be taken", || (bed.gitlab.counts().running == 3).then_some(())).await;
    std::fs::write(&gate, "").unwrap();
    bed.all_finished(Duration::from_secs(60)).await;
    bed.nothing_owed().await;
    bed.assert_no_violations();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_daemon_on_the_same_state_is_refused() {
    let bed = Bed::local().await;
    let _daemon = bed.serve();
    until("the daemon to be up", || bed.log().contains("bridge serves").then_some(())).await;
    let second = bed.run(&["serve"]);
    assert_eq!(second.status.code(), Some(4), "{}", String::from_utf8_lossy(&second.stderr));
    let text = String::from_utf8_lossy(&second.stderr);
    assert!(text.contains("another bridge"), "{text}");
}
