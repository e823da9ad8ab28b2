//! What a job lives through when Slurm, the network or we break.

use std::time::Duration;

use bridge_backend::{ErrorKind, Observation, Outcome};

use crate::bed::{Bed, Site, job, programs_in, token, until, unwanted};

/// A script that notes each of its runs.
const COUNTED: &str = "echo ran >> ran; exit 5";

#[tokio::test]
async fn a_lost_answer_is_found_again() {
    if unwanted() {
        return;
    }
    let bed = Bed::shared();
    for lose in [
        "exec >/dev/null; /usr/bin/sbatch \"$@\"; echo 'sbatch: error: Batch job submission failed: \
         Socket timed out on send/recv operation' >&2; exit 1",
        "/usr/bin/sbatch \"$@\" > /dev/null; exec sleep 600",
        "/usr/bin/sbatch \"$@\" > /dev/null; echo Bus error",
        "/usr/bin/sbatch \"$@\" > /dev/null; kill -9 $$",
    ] {
        let site = Site::on(&bed, "settle = '1s'");
        let bin = programs_in(&site.dir, &[("sbatch", lose)]);
        let lossy = site.reopened(&format!("bin_dir = '{bin}'\ncommand_timeout = '2s'"));
        let token = token();
        let error = lossy.submit(&token, &site.spec(COUNTED)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Ambiguous, "{lose}: {error:?}");
        let found = site.backend.find(std::slice::from_ref(&token)).await.unwrap();
        let job = job(&token, &found[&token]);
        assert_eq!(site.outcome(&job).await, Outcome::Exited { code: 5 });
        assert_eq!(site.file("ran").await, b"ran\n");
    }
}

#[tokio::test]
async fn two_submissions_of_one_token_run_once_and_are_one_job() {
    if unwanted() {
        return;
    }
    let bed = Bed::shared();
    let site = Site::on(&bed, "settle = '1s'");
    // Two real submissions before either starts, of which the first one's answer was lost.
    let bin = programs_in(
        &site.dir,
        &[(
            "sbatch",
            "cat > $0.in; /usr/bin/sbatch --hold \"$@\" < $0.in > $0.first; \
             /usr/bin/sbatch --hold \"$@\" < $0.in",
        )],
    );
    let twice = site.reopened(&format!("bin_dir = '{bin}'"));
    let token = token();
    let second = twice.submit(&token, &site.spec(COUNTED)).await.unwrap();
    let first = std::fs::read_to_string(bin.join("sbatch.first")).unwrap();
    let first = bridge_backend::ExternalId(first.trim().into());
    assert_ne!(first, second);
    bed.slurm("scontrol", &["release", &first.0]);
    bed.slurm("scontrol", &["release", &second.0]);
    for id in [&first, &second] {
        assert_eq!(site.outcome(&job(&token, id)).await, Outcome::Exited { code: 5 });
    }
    assert_eq!(site.file("ran").await, b"ran\n");
    // A submission after the fact is the job that ran.
    let third = site.backend.submit(&token, &site.spec(COUNTED)).await.unwrap();
    assert!(third == first || third == second);
    assert_eq!(site.file("ran").await, b"ran\n");
}

#[tokio::test]
async fn a_submission_dropped_at_any_time_leads_to_one_run() {
    if unwanted() {
        return;
    }
    let bed = Bed::shared();
    for patience in [0, 1, 3, 6, 10, 20] {
        let site = Site::on(&bed, "settle = '1s'");
        let (token, spec) = (token(), site.spec(COUNTED));
        let patience = Duration::from_millis(patience);
        let dropped = tokio::time::timeout(patience, site.backend.submit(&token, &spec)).await;
        let id = match dropped {
            Ok(id) => id.unwrap(),
            Err(_dropped) => {
                let tokens = std::slice::from_ref(&token);
                match site.backend.find(tokens).await.unwrap().remove(&token) {
                    Some(id) => id,
                    None => site.backend.submit(&token, &spec).await.unwrap(),
                }
            }
        };
        assert_eq!(site.outcome(&job(&token, &id)).await, Outcome::Exited { code: 5 });
        assert_eq!(site.file("ran").await, b"ran\n");
    }
}

#[tokio::test]
async fn a_requeued_job_is_not_run_again() {
    if unwanted() {
        return;
    }
    let bed = Bed::shared();
    for seen_waiting in [true, false] {
        let site = Site::on(&bed, "settle = '1s'");
        let job = site.run("echo ran >> ran; sleep 100").await;
        site.file("ran").await;
        let id = job.id.0.as_str();
        bed.slurm("scontrol", &["update", &format!("jobid={id}"), "requeue=1"]);
        bed.slurm("scontrol", &["requeue", id]);
        if !seen_waiting {
            let waits = until("the job to wait again".into(), async || {
                (bed.slurm("squeue", &["-h", "-j", id, "-o", "%T"]).trim() == "PENDING")
                    .then_some(())
            });
            waits.await.unwrap();
            bed.slurm("scontrol", &["update", &format!("jobid={id}"), "starttime=now"]);
            let over = until("its second start".into(), async || {
                let state = bed.slurm("squeue", &["-h", "-t", "all", "-j", id, "-o", "%T"]);
                (state.trim() == "FAILED").then_some(())
            });
            over.await.unwrap();
        }
        let outcome = site.outcome(&job).await;
        let Outcome::SystemFailed { detail } = outcome else { panic!("{outcome:?}") };
        // A second start that Slurm itself breaks off leaves no note of the wrapper's.
        assert!(detail.contains("requeued") || !seen_waiting, "{detail}");
        site.log(&job).await;
        site.backend.release(&job).await.unwrap();
        assert_eq!(bed.slurm("squeue", &["-h", "-n", job.token.as_str()]), "");
        assert_eq!(site.file("ran").await, b"ran\n");
    }
}

#[tokio::test]
async fn a_cancellation_by_somebody_else_is_one() {
    if unwanted() {
        return;
    }
    let bed = Bed::shared();
    let site = Site::on(&bed, "settle = '1s'");
    let job = site.run("echo > up; sleep 100").await;
    site.file("up").await;
    bed.slurm("scancel", &[&job.id.0]);
    assert_eq!(site.outcome(&job).await, Outcome::Cancelled { by: None });
}

#[tokio::test]
async fn a_frozen_controller_makes_a_submission_ambiguous_and_the_job_is_found_later() {
    if unwanted() {
        return;
    }
    let bed = Bed::start(&["--nodes", "1"]);
    let site = Site::on(&bed, "settle = '1s'\ncommand_timeout = '2s'\nquery_timeout = '1s'");
    let before = site.run("echo > up; while ! [ -e go ]; do sleep 0.1; done").await;
    site.file("up").await;
    bed.tamper(&["ctld-freeze"]);
    let token = token();
    let error = site.backend.submit(&token, &site.spec(COUNTED)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Ambiguous, "{error:?}");
    let tokens = std::slice::from_ref(&token);
    for error in [
        site.backend.poll(std::slice::from_ref(&before)).await.unwrap_err(),
        site.backend.find(tokens).await.unwrap_err(),
        site.backend.cancel(std::slice::from_ref(&before)).await.unwrap_err(),
        site.backend.check().await.unwrap_err(),
    ] {
        assert_eq!(error.kind(), ErrorKind::Transient, "{error:?}");
    }
    // The wish was not heard, but its mark is there: take it back as the reconciler never would.
    std::fs::remove_file(site.job_dir(&before.token).join("cancelled")).unwrap();
    bed.tamper(&["ctld-thaw"]);
    let found = until("the delayed job".into(), async || {
        site.backend.find(tokens).await.ok()?.remove(&token)
    });
    let found = job(&token, &found.await.unwrap());
    assert_eq!(site.outcome(&found).await, Outcome::Exited { code: 5 });
    site.touch("go");
    assert_eq!(site.outcome(&before).await, Outcome::Exited { code: 0 });
}

#[tokio::test]
async fn a_controller_that_is_down_takes_nothing_and_loses_nothing() {
    if unwanted() {
        return;
    }
    let bed = Bed::start(&["--nodes", "1"]);
    let site = Site::on(&bed, "settle = '1s'\nquery_timeout = '20s'");
    let before = site.run("echo > up; while ! [ -e go ]; do sleep 0.1; done; exit 3").await;
    site.file("up").await;
    site.running(&before).await;
    bed.tamper(&["ctld-stop"]);
    assert_eq!(site.backend.check().await.unwrap_err().kind(), ErrorKind::Transient);
    let token = token();
    let spec = site.spec("exit 0");
    let jobs = [before.clone()];
    let (submitted, polled) =
        tokio::join!(site.backend.submit(&token, &spec), site.backend.poll(&jobs));
    assert_eq!(submitted.unwrap_err().kind(), ErrorKind::Transient);
    assert_eq!(polled.unwrap_err().kind(), ErrorKind::Transient);
    assert!(!site.job_dir(&token).exists());
    bed.tamper(&["ctld-start"]);
    site.touch("go");
    assert_eq!(site.outcome(&before).await, Outcome::Exited { code: 3 });
    let id = site.backend.submit(&token, &spec).await.unwrap();
    assert_eq!(site.outcome(&job(&token, &id)).await, Outcome::Exited { code: 0 });
}

#[tokio::test]
async fn an_id_that_became_another_jobs_is_not_ours_any_more() {
    if unwanted() {
        return;
    }
    let bed = Bed::start(&["--nodes", "1"]);
    let site = Site::on(&bed, "settle = '1s'");
    // Whether a crash forgets the job depends on when the controller last wrote its state.
    for _ in 0..5 {
        let lost = site.submit(&site.closed("exit 0")).await;
        bed.tamper(&["ctld-stop", "KILL"]);
        bed.tamper(&["ctld-start"]);
        let next = site.submit(&site.closed("exit 0")).await;
        if lost.id != next.id {
            continue;
        }
        assert_eq!(site.look(&lost).await, Some(Observation::Gone));
        assert!(matches!(site.look(&next).await, Some(Observation::Pending { .. })));
        // One answer for one id could be taken for the wrong job's.
        let both = site.backend.poll(&[lost.clone(), next.clone()]).await.unwrap();
        assert!(both.is_empty());
        // And a cancellation of the lost one must not hit the other.
        site.backend.cancel(std::slice::from_ref(&lost)).await.unwrap();
        assert!(matches!(site.look(&next).await, Some(Observation::Pending { .. })));
        return;
    }
    panic!("no id was given twice");
}

#[tokio::test]
async fn what_the_controller_forgot_is_asked_of_a_real_accounting() {
    if unwanted() {
        return;
    }
    let bed = Bed::start(&["--nodes", "1", "--accounting"]);
    let site = Site::on(&bed, "settle = '1s'\naccounting = true");
    site.backend.check().await.unwrap();
    let cancelled = site.run("echo > up; sleep 100").await;
    site.file("up").await;
    bed.slurm("scancel", &[&cancelled.id.0]);
    let by_root = Outcome::Cancelled { by: Some("root".into()) };
    // Who it was comes from the accounting, which may be a moment behind.
    let seen = until("who cancelled".into(), async || {
        (site.outcome(&cancelled).await == by_root).then_some(())
    });
    seen.await.unwrap();
    let killed = site.run("kill -9 $PPID; exit 0").await;
    assert!(matches!(site.outcome(&killed).await, Outcome::SystemFailed { .. }));
    let good = site.run("exit 3").await;
    assert_eq!(site.outcome(&good).await, Outcome::Exited { code: 3 });

    let bin =
        programs_in(&site.dir, &[("squeue", "exit 0"), ("sacct", "exec /usr/bin/sacct \"$@\"")]);
    let forgot = site.reopened(&format!("bin_dir = '{bin}'\nsettle = '1s'\naccounting = true"));
    let jobs = [cancelled.clone(), killed, good.clone()];
    let seen = until("all in the accounting".into(), async || {
        let seen = forgot.poll(&jobs).await.unwrap();
        (seen.len() == 3).then_some(seen)
    });
    let seen = seen.await.unwrap();
    let outcome = |job: &bridge_backend::JobRef| match &seen[&job.id] {
        Observation::Ended { outcome, .. } => Some(outcome.clone()),
        Observation::Pending { .. }
        | Observation::Running { .. }
        | Observation::Gone
        | Observation::Unclear { .. } => None,
    };
    assert_eq!(outcome(&jobs[0]), Some(by_root));
    assert!(matches!(outcome(&jobs[1]), Some(Outcome::SystemFailed { .. })));
    assert_eq!(outcome(&jobs[2]), Some(Outcome::Exited { code: 3 }));

    // By name, when the job's own note is lost too.
    std::fs::remove_file(site.job_dir(&good.token).join("started")).unwrap();
    let unknown = token();
    let found = forgot.find(&[good.token.clone(), unknown]).await.unwrap();
    assert_eq!(found.into_iter().collect::<Vec<_>>(), [(good.token, good.id)]);

    bed.tamper(&["dbd-stop", "KILL"]);
    let error = forgot.find(&[token()]).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Transient);
    assert_eq!(site.backend.check().await.unwrap_err().kind(), ErrorKind::Transient);
    let waiting = site.submit(&site.closed("exit 0")).await;
    assert!(matches!(site.look(&waiting).await, Some(Observation::Pending { .. })));
}

#[tokio::test]
async fn a_job_whose_node_died_is_called_that_once_slurm_gives_the_node_up() {
    if unwanted() {
        return;
    }
    let own = tempfile::NamedTempFile::new().unwrap();
    // Slurm says that the setting is there twice, and takes the later one.
    std::fs::write(&own, "SlurmdTimeout=3\n").unwrap();
    let bed = Bed::start(&["--nodes", "1", "--conf-add", own.path().to_str().unwrap()]);
    let site = Site::on(&bed, "settle = '1s'");
    let job = site.run("echo text; ps -o ppid= $PPID > up.new; mv up.new up; while [ -d \"$BRIDGE_JOB_DIR\" ]; do sleep 0.1; done").await;
    let step = String::from_utf8(site.file("up").await).unwrap();
    site.running(&job).await;
    // The node first, so that nobody is left to report the end of the job's processes.
    bed.tamper(&["node-kill", "n1"]);
    let killed = std::process::Command::new("kill").args(["-KILL", step.trim()]).status();
    assert!(killed.unwrap().success());
    // Until the controller notices, the job runs as far as anybody knows.
    assert!(matches!(site.look(&job).await, Some(Observation::Running { .. })));
    assert_eq!(site.outcome(&job).await, Outcome::NodeFailed);
    assert_eq!(site.log(&job).await, "text\n");
    site.backend.release(&job).await.unwrap();
}
