//! Programs that answer what a healthy Slurm never would, or only after days.

use bridge_backend::{ErrorKind, ExternalId, Fault, JobRef, Observation, Outcome};

use crate::bed::{Site, job, programs_in, token, until};

/// `sbatch` that accepts everything as job 42.
const ACCEPTS: (&str, &str) = ("sbatch", "cat > /dev/null; echo 42");

/// `squeue` that knows nobody.
const FORGOT: (&str, &str) = ("squeue", "exit 0");

const NO_ACCOUNTING: (&str, &str) =
    ("sacct", "echo Slurm accounting storage is disabled >&2; exit 1");

async fn accepted(site: &Site) -> JobRef {
    let token = token();
    let id = site.backend.submit(&token, &site.spec("exit 0")).await.unwrap();
    assert_eq!(id, ExternalId("42".into()));
    job(&token, &id)
}

#[tokio::test]
async fn a_missing_sbatch_is_the_operators_to_fix() {
    let site = Site::with_programs(&[], "");
    let token = token();
    let error = site.backend.submit(&token, &site.spec("exit 0")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Rejected(Fault::Site));
    assert!(!site.job_dir(&token).exists());
    let error = site.backend.check().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Rejected(Fault::Site));
    // A question, in contrast, is only not answered.
    let error = site.backend.find(&[token]).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Transient);
}

#[tokio::test]
async fn an_sbatch_that_hangs_or_talks_rubbish_is_ambiguous() {
    for body in [
        "exec sleep 600",
        "exit 0",
        "cat > /dev/null; echo Have a nice day",
        "echo '<html>'; exit 3",
        "cat > /dev/null; head -c 100000 /dev/urandom",
        "exec yes 42",
    ] {
        let site = Site::with_programs(&[("sbatch", body)], "command_timeout = '1s'");
        let token = token();
        let error = site.backend.submit(&token, &site.spec("exit 0")).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Ambiguous, "{body}: {error:?}");
        assert!(site.job_dir(&token).join("env").exists(), "the job may yet start");
    }
}

#[tokio::test]
async fn a_squeue_that_fails_hangs_or_talks_rubbish_says_nothing() {
    for body in
        ["exec sleep 600", "echo Segmentation fault", "exit 1", "echo '1|RUNNING'", "kill -9 $$"]
    {
        let site = Site::with_programs(&[ACCEPTS, ("squeue", body)], "query_timeout = '1s'");
        let job = accepted(&site).await;
        let jobs = std::slice::from_ref(&job);
        let error = site.backend.poll(jobs).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Transient, "{body}");
        let error = site.backend.find(std::slice::from_ref(&job.token)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Transient, "{body}");
        let error = site.backend.cancel(jobs).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Transient, "{body}");
    }
}

#[tokio::test]
async fn a_job_missing_from_a_damaged_answer_is_not_gone() {
    let damaged = "echo '7|RUNNING|1|1|1|n1|u|other|None'; echo '42|RUNN'";
    let site =
        Site::with_programs(&[ACCEPTS, ("squeue", damaged), NO_ACCOUNTING], "settle = '1ms'");
    let job = accepted(&site).await;
    for _ in 0..3 {
        assert_eq!(site.look(&job).await, None);
    }
    let error = site.backend.find(&[token()]).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Transient);
}

#[tokio::test]
async fn a_forgotten_job_is_what_its_result_says() {
    let site = Site::with_programs(&[ACCEPTS, FORGOT, NO_ACCOUNTING], "");
    let job = accepted(&site).await;
    let result = site.job_dir(&job.token).join("result");
    std::fs::write(result, "exit_code=9\nstep=script\n").unwrap();
    assert_eq!(site.outcome(&job).await, Outcome::Exited { code: 9 });
}

#[tokio::test]
async fn a_forgotten_job_without_result_is_gone_after_settle_and_no_sooner() {
    let site = Site::with_programs(&[ACCEPTS, FORGOT, NO_ACCOUNTING], "settle = '400ms'");
    let job = accepted(&site).await;
    let begun = std::time::Instant::now();
    assert_eq!(site.look(&job).await, None);
    let seen = site.until(&job, |_| true).await;
    assert_eq!(seen, Observation::Gone);
    assert!(begun.elapsed() >= std::time::Duration::from_millis(400));
    assert_eq!(site.log(&job).await, "");
}

#[tokio::test]
async fn a_lost_file_system_makes_nobody_gone() {
    let site = Site::with_programs(&[ACCEPTS, FORGOT, NO_ACCOUNTING], "settle = '1ms'");
    let job = accepted(&site).await;
    let jobs = site.path().join("jobs");
    std::fs::rename(&jobs, site.path().join("elsewhere")).unwrap();
    // Unmounted, and an empty mount point in its place.
    for _ in 0..2 {
        assert_eq!(site.look(&job).await, None);
        let error = site.backend.read_log(&job, 0, 1).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Transient);
        std::fs::create_dir_all(&jobs).unwrap();
    }
}

#[tokio::test]
async fn the_accounting_knows_what_the_controller_forgot() {
    for (row, outcome) in [
        ("TIMEOUT|0:0|1|2|3|n1", Some(Outcome::TimedOut)),
        ("CANCELLED by 0|0:0|1|2|3|n1", Some(Outcome::Cancelled { by: Some("root".into()) })),
        ("OUT_OF_MEMORY|0:125|1|2|3|n1", Some(Outcome::OutOfMemory)),
        ("NODE_FAIL|0:0|1|2|3|n1", Some(Outcome::NodeFailed)),
        ("PREEMPTED|0:0|1|2|3|n1", Some(Outcome::Preempted)),
        // Half a record, and a job that the accounting is behind with.
        ("FAILED|0:0|1|2|Unknown|n1", None),
        ("RUNNING|0:0|1|2|Unknown|n1", None),
        ("DREAMING|0:0|1|2|3|n1", None),
    ] {
        let site = Site::with_programs(&[ACCEPTS, FORGOT], "settle = '1ms'");
        let job = accepted(&site).await;
        let body = format!("echo '41|x|FAILED|1:0|1|2|3|n1'; echo '42|{}|{row}'", job.token);
        programs_in(&site.dir, &[("sacct", &body)]);
        match outcome {
            Some(outcome) => assert_eq!(site.outcome(&job).await, outcome, "{row}"),
            None => {
                for _ in 0..3 {
                    assert_eq!(site.look(&job).await, None, "{row}");
                }
            }
        }
    }
}

#[tokio::test]
async fn an_accounting_that_does_not_answer_holds_up_nobody_else() {
    let queue = "echo '7|RUNNING|1|1|1|n1|u|tok-7|None'";
    for body in [
        "echo sacct: error: slurm_persist_conn_open: Connection refused >&2; exit 1",
        "exec sleep 600",
    ] {
        let site = Site::with_programs(
            &[ACCEPTS, ("squeue", queue), ("sacct", body)],
            "settle = '1ms'\nquery_timeout = '500ms'",
        );
        let job = accepted(&site).await;
        let other = JobRef {
            token: bridge_backend::SubmitToken::parse("tok-7").unwrap(),
            id: ExternalId("7".into()),
        };
        for _ in 0..2 {
            let seen = site.backend.poll(&[job.clone(), other.clone()]).await.unwrap();
            assert_eq!(seen.len(), 1);
            assert!(matches!(seen[&other.id], Observation::Running { .. }));
        }
        let error = site.backend.find(std::slice::from_ref(&job.token)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Transient);
    }
}

#[tokio::test]
async fn accounting_that_must_be_there_is_checked() {
    let programs = [
        ACCEPTS,
        FORGOT,
        NO_ACCOUNTING,
        ("scancel", "exit 0"),
        ("scontrol", "echo 'Slurmctld(primary) at x is UP'"),
    ];
    let site = Site::with_programs(&programs, "");
    site.backend.check().await.unwrap();
    let site = Site::with_programs(&programs, "accounting = true");
    let error = site.backend.check().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Transient);
}

#[tokio::test]
async fn an_unknown_word_is_shown_and_ends_nothing() {
    let site = Site::with_programs(&[ACCEPTS], "");
    let job = accepted(&site).await;
    let line = format!("echo '42|LEVITATING|1|1|1|n1|u|{}|None'", job.token);
    programs_in(&site.dir, &[("squeue", &line)]);
    let seen = site.look(&job).await;
    assert_eq!(seen, Some(Observation::Unclear { status: "LEVITATING".into() }));
}

#[tokio::test]
async fn a_finishing_job_with_a_result_is_over_and_its_log_is_fixed() {
    let site = Site::with_programs(&[ACCEPTS], "");
    let job = accepted(&site).await;
    let dir = site.job_dir(&job.token);
    let line = format!("echo '42|COMPLETING|1|1|1|n1|u|{}|None'", job.token);
    programs_in(&site.dir, &[("squeue", &line), ("scancel", "exit 9")]);
    std::fs::write(dir.join("log"), "said\n").unwrap();
    std::fs::write(dir.join("started"), "job=42\n").unwrap();
    assert!(matches!(site.look(&job).await, Some(Observation::Running { .. })));
    std::fs::write(dir.join("result"), "exit_code=0\nstep=script\n").unwrap();
    assert_eq!(site.outcome(&job).await, Outcome::Exited { code: 0 });
    std::fs::write(dir.join("log"), "said\nand more\n").unwrap();
    assert_eq!(site.log(&job).await, "said\n");
    site.backend.release(&job).await.unwrap();
}

#[tokio::test]
async fn a_job_that_ran_while_nobody_looked_is_found_by_its_own_note() {
    let site = Site::with_programs(
        &[("sbatch", "exec sleep 600"), FORGOT, NO_ACCOUNTING],
        "command_timeout = '100ms'",
    );
    let token = token();
    site.backend.submit(&token, &site.spec("exit 0")).await.unwrap_err();
    let tokens = std::slice::from_ref(&token);
    assert!(site.backend.find(tokens).await.unwrap().is_empty());
    std::fs::write(site.job_dir(&token).join("started"), "job=42\n").unwrap();
    assert_eq!(site.backend.find(tokens).await.unwrap()[&token], ExternalId("42".into()));
}

#[tokio::test]
async fn a_file_system_that_others_can_write_to_is_refused() {
    use std::os::unix::fs::PermissionsExt as _;
    let site = Site::with_programs(&[ACCEPTS], "");
    let jobs = site.path().join("jobs");
    std::fs::create_dir(&jobs).unwrap();
    std::fs::set_permissions(&jobs, std::fs::Permissions::from_mode(0o777)).unwrap();
    let error = site.backend.check().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Rejected(Fault::Site));
    let error = site.backend.submit(&token(), &site.spec("exit 0")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Rejected(Fault::Site));
}

#[tokio::test]
async fn a_link_in_place_of_a_job_directory_is_not_followed() {
    let site = Site::with_programs(&[ACCEPTS], "");
    site.backend.submit(&token(), &site.spec("exit 0")).await.unwrap();
    let precious = site.path().join("precious");
    std::fs::create_dir(&precious).unwrap();
    std::fs::write(precious.join("env"), "keep me").unwrap();
    let token = token();
    std::os::unix::fs::symlink(&precious, site.job_dir(&token)).unwrap();
    let nobody = job(&token, &ExternalId("42".into()));
    site.backend.release(&nobody).await.unwrap_err();
    site.backend.submit(&token, &site.spec("exit 0")).await.unwrap_err();
    assert_eq!(std::fs::read_to_string(precious.join("env")).unwrap(), "keep me");
}

#[tokio::test]
async fn a_pipe_in_place_of_a_log_hangs_nobody() {
    let site = Site::with_programs(&[ACCEPTS], "");
    let job = accepted(&site).await;
    let log = site.job_dir(&job.token).join("log");
    let made = std::process::Command::new("mkfifo").arg(&log).status().unwrap();
    assert!(made.success());
    let read = until("an answer".into(), async || Some(site.backend.read_log(&job, 0, 10).await));
    assert_eq!(read.await.unwrap().unwrap_err().kind(), ErrorKind::Transient);
}
