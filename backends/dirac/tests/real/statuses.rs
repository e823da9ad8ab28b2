//! What others do to our jobs in DIRAC.

use bridge_backend::{JobRef, Observation, Outcome};

use crate::bed::{Bed, Site, set_status, until, unwanted, wait_for};

async fn cancelled(site: &Site, job: &JobRef) {
    site.cancel(std::slice::from_ref(job)).await;
    let outcome = site.outcome(job).await;
    assert!(matches!(outcome, Outcome::Cancelled { by: None }), "{outcome:?}");
    // Again, which is fine.
    site.cancel(std::slice::from_ref(job)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stalled_job_comes_back_and_its_exit_code_is_right() {
    if unwanted() {
        return;
    }
    let site = Site::on(&Bed::shared());
    let script = format!("echo one\n: >@/on\n{}echo two\nexit 6\n", wait_for("go"));
    let job = site.run(&script).await;
    site.file("on").await;
    let stalled = [("Stalled", "Watchdog identified this job as stalled")];
    set_status(&site.bed, "pilot", &job.id.0, &stalled).await;
    let seen = site.look(&job).await;
    assert!(matches!(seen, Some(Observation::Running { .. })), "{seen:?}");
    set_status(&site.bed, "pilot", &job.id.0, &[("Running", "Application")]).await;
    site.touch("go");
    assert_eq!(site.outcome(&job).await, Outcome::Exited { code: 6 });
    assert_eq!(site.log(&job).await, b"one\ntwo\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_is_heard_in_every_state() {
    if unwanted() {
        return;
    }
    let bed = Bed::start(&["--no-site"]);
    let site = Site::on(&bed);
    let way = [
        ("Checking", "JobScheduling"),
        ("Waiting", "Pilot Agent Submission"),
        ("Matched", "Assigned"),
        ("Running", "Application"),
        ("Stalled", "Job stalled"),
    ];
    for steps in 0..=way.len() {
        let job = site.run("exit 0\n").await;
        set_status(&bed, "pilot", &job.id.0, &way[..steps]).await;
        if steps < 4 {
            cancelled(&site, &job).await;
        } else {
            // It ran, and nothing on the worker will ever tell of its end.
            site.cancel(std::slice::from_ref(&job)).await;
            let seen = site.look(&job).await;
            assert!(matches!(seen, Some(Observation::Running { .. })), "{steps}: {seen:?}");
        }
    }
    let job = site.run("exit 0\n").await;
    set_status(&bed, "pilot", &job.id.0, &way[..4]).await;
    let completing = [("Completing", "Uploading Output Sandbox")];
    set_status(&bed, "pilot", &job.id.0, &completing).await;
    site.cancel(std::slice::from_ref(&job)).await;
    let seen = site.look(&job).await;
    assert!(matches!(seen, Some(Observation::Running { .. })), "{seen:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_dirac_gave_up_ends_on_the_worker_too() {
    if unwanted() {
        return;
    }
    let site = Site::on(&Bed::shared());
    let script = format!("trap 'echo ended >@/ended; exit 1' TERM\n: >@/on\n{}", wait_for("never"));
    let job = site.run(&script).await;
    site.file("on").await;
    let given_up = [
        ("Stalled", "Watchdog identified this job as stalled"),
        ("Failed", "Job stalled: pilot not running"),
    ];
    set_status(&site.bed, "pilot", &job.id.0, &given_up).await;
    assert_eq!(site.outcome(&job).await, Outcome::NodeFailed);
    assert_eq!(site.file("ended").await, b"ended\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_is_deleted_under_us_is_cancelled_by_somebody() {
    if unwanted() {
        return;
    }
    let bed = Bed::start(&["--no-site"]);
    let site = Site::on(&bed);
    let job = site.run("exit 0\n").await;
    let other = site.run("exit 0\n").await;
    set_status(&bed, "admin", &job.id.0, &[("Deleted", "by an operator")]).await;
    let outcome = site.outcome(&job).await;
    assert_eq!(outcome, Outcome::Cancelled { by: Some("test in DIRAC".into()) });
    // The other is not touched by it.
    let both = [job.clone(), other.clone()];
    let seen = site.backend.poll(&both).await.unwrap();
    assert!(matches!(seen.get(&other.id), Some(Observation::Pending { .. })), "{seen:?}");
    site.cancel(&both).await;
    assert!(matches!(site.outcome(&other).await, Outcome::Cancelled { by: None }));
}

#[tokio::test(flavor = "multi_thread")]
async fn one_start_ends_when_another_was_refused() {
    if unwanted() {
        return;
    }
    let bed = Bed::start(&["--slots", "4"]);
    let site = Site::on(&bed);
    let script = format!(
        "echo ran >>@/runs\ntrap 'echo ended >@/ended; exit 1' TERM\n: >@/on\n{}",
        wait_for("never")
    );
    let job = site.run(&script).await;
    site.file("on").await;
    // DIRAC starts it again somewhere, while the first start still runs.
    let failed = [("Failed", "Job stalled: pilot not running"), ("Rescheduled", "Job Rescheduled")];
    bed.tamper(&["hold"]);
    set_status(&bed, "pilot", &job.id.0, &failed[..1]).await;
    set_status(&bed, "pilot", &job.id.0, &failed[1..]).await;
    set_status(&bed, "pilot", &job.id.0, &[("Waiting", "Pilot Agent Submission")]).await;
    bed.tamper(&["go"]);
    let ended =
        until("its end".to_owned(), async || std::fs::read(site.dir.path().join("ended")).ok());
    assert_eq!(ended.await.unwrap(), b"ended\n");
    let outcome = site.outcome(&job).await;
    assert!(!matches!(outcome, Outcome::Exited { code: 0 }), "{outcome:?}");
    assert_eq!(site.file("runs").await, b"ran\n");
}
