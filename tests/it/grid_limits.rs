//! What a grid has too little of: time, room, trust.

use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bridge::coordinator::{EndedBy, NewJob, Status};
use serde_json::json;

use crate::allocation;
use crate::grid::{dirac_id, eager};
use crate::slurm::bed_on;
use crate::support::grid::{self, Grid};
use crate::support::slurm::{self, Cluster};
use crate::support::{Bed, ask_http, text_of, until, write_private};

/// An artifact that is kept however the job ends.
fn kept_always() -> serde_json::Value {
    json!({
        "name": "kept", "paths": ["out.txt"], "when": "always",
        "artifact_type": "archive", "artifact_format": "zip",
    })
}

/// A job that would go on for ever, and leaves something.
fn endless(bed: &Bed) -> NewJob {
    bed.counting("endless")
        .script("echo kept > out.txt")
        .script("while :; do sleep 0.2; done")
        .artifact(kept_always())
}

/// Asserts that a job ended for its timeout and kept its artifact.
fn assert_timed_out_with_artifact(bed: &Bed, id: i64) {
    let job = bed.gitlab.job(id).unwrap();
    let text = text_of(&job);
    assert_eq!(job.status, Status::Failed, "{text}");
    assert_eq!(job.ended_by, Some(EndedBy::Runner), "{text}");
    assert_eq!(job.failure_reason.as_deref(), Some("job_execution_timeout"), "{text}");
    let kept = bed.gitlab.artifacts(id);
    assert_eq!(kept.len(), 1, "{text}\n{}", bed.log());
    let zip = std::fs::File::open(kept[0].file()).unwrap();
    let zip = zip::ZipArchive::new(zip).unwrap();
    let names: Vec<_> = zip.file_names().map(|name| name.unwrap().into_owned()).collect();
    assert_eq!(names, ["out.txt"], "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_waited_long_ends_in_time_and_keeps_its_artifacts() {
    if grid::left_out() {
        return;
    }
    let grid = Grid::start("late", &[]);
    let bed = grid.bed(eager(), "").await;
    let _daemon = bed.serve();
    grid.tamper(&["hold"]);
    let timeout = Duration::from_secs(90);
    let begun = Instant::now();
    let id = bed.gitlab.enqueue(endless(&bed).timeout(timeout));
    dirac_id(&bed, id).await;
    until("the job to have waited", || (begun.elapsed() > timeout / 4).then_some(())).await;
    grid.tamper(&["go"]);
    bed.finished(id).await;
    assert_timed_out_with_artifact(&bed, id);
    assert_eq!(bed.runs(id), 1);
    let text = text_of(&bed.gitlab.job(id).unwrap());
    assert!(text.contains("time that the job had is over, its waiting included"), "{text}");
    bed.nothing_owed().await;
    bed.assert_no_violations();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_comes_out_of_the_queue_too_late_does_not_begin() {
    if grid::left_out() {
        return;
    }
    let grid = Grid::start("too-late", &[]);
    // The bridge is away when the job comes out of the queue, and cannot have cancelled it.
    let bed = grid.bed(eager(), "").await;
    let daemon = bed.serve();
    grid.tamper(&["hold"]);
    let begun = Instant::now();
    let timeout = Duration::from_secs(25);
    let id = bed.gitlab.enqueue(endless(&bed).timeout(timeout));
    let number = dirac_id(&bed, id).await;
    daemon.kill();
    until("its time to be over", || (begun.elapsed() > timeout).then_some(())).await;
    grid.tamper(&["go"]);
    until("DIRAC to be done with it", || {
        let jobs = grid.jobs(&bed);
        let job = jobs.iter().find(|job| job["JobID"] == number).unwrap();
        (job["Status"] == "Failed").then_some(())
    })
    .await;
    let _daemon = bed.serve();
    let job = bed.finished(id).await;
    let text = text_of(&job);
    assert_eq!(job.failure_reason.as_deref(), Some("job_execution_timeout"), "{text}");
    assert!(text.contains("seconds passed while it waited in the batch queue"), "{text}");
    assert_eq!(bed.runs(id), 0);
    bed.nothing_owed().await;
    bed.assert_no_violations();
}

#[tokio::test(flavor = "multi_thread")]
async fn where_files_are_shared_a_job_that_the_deadline_ends_keeps_its_artifacts() {
    if slurm::left_out() {
        return;
    }
    // Slurm's limits are whole minutes, so that it is bridge that ends this one.
    let cluster = Cluster::start(&[]);
    let bed = bed_on(&cluster, eager(), "").await;
    let _daemon = bed.serve();
    let id = bed.gitlab.enqueue(endless(&bed).timeout(Duration::from_secs(20)));
    bed.finished(id).await;
    assert_timed_out_with_artifact(&bed, id);
    let text = text_of(&bed.gitlab.job(id).unwrap());
    assert!(text.contains("longer than 20 seconds, waiting included"), "{text}");
    bed.nothing_owed().await;
    bed.assert_no_violations();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_on_a_grid_fetches_its_own_sources() {
    if grid::left_out() {
        return;
    }
    let grid = Grid::shared();
    let bed = grid.bed(eager(), "sources = \"allocation\"").await;
    allocation::serve_project(&bed).await;
    // Each job has a worker of its own, and nothing is left on it.
    allocation::sources_caches_and_artifacts(&bed, false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_on_a_compute_node_fetches_its_own_sources() {
    if slurm::left_out() {
        return;
    }
    let cluster = Cluster::start(&[]);
    let bed = bed_on(&cluster, eager(), "sources = \"allocation\"").await;
    allocation::serve_project(&bed).await;
    allocation::sources_caches_and_artifacts(&bed, true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_not_trusted_is_the_operators_and_jobs_wait() {
    if grid::left_out() {
        return;
    }
    let grid = Grid::start("tls", &[]);
    let ways = [
        ("good", false, "name a file with the certificate of that authority as `tls_ca_file`"),
        ("expired", true, "its certificate has expired"),
        ("other", true, "its certificate is for another name"),
    ];
    let bed = grid.bed(eager(), "").await;
    let socket = bed.path("status.sock");
    bed.edit_config(
        "check_interval",
        &format!("listen_address = \"{}\"\ncheck_interval", socket.display()),
    );
    let (good, good_ca) = grid.tls("good");
    let mut url = format!("url = \"{}\"", grid.url());
    // One that runs already, and is done before anybody can hear of it again.
    let daemon = bed.serve();
    let running = bed.gitlab.enqueue(bed.counting("runs").script(bed.wait_for("gate")));
    until("the job to run", || (bed.runs(running) == 1).then_some(())).await;
    daemon.term().await;
    bed.open("gate");
    let waiting = bed.gitlab.enqueue(bed.counting("waits"));
    for (kind, known, words) in ways {
        let (to, ca) = grid.tls(kind);
        let ca = if known { format!("\ntls_ca_file = \"{ca}\"") } else { String::new() };
        let new = format!("url = \"{to}\"{ca}");
        bed.edit_config(&url, &new);
        url = new;
        let checked = bed.run(&["backends", "check"]);
        let said = String::from_utf8_lossy(&checked.stdout).into_owned()
            + &String::from_utf8_lossy(&checked.stderr);
        assert!(!checked.status.success() && said.contains(words), "{kind}: {said}");
        assert!(said.contains("trust 127.0.0.1"), "{kind}: {said}");
        let daemon = bed.serve();
        until("the page to say so", || {
            let (status, page) = ask_http(&socket, "/health");
            (status == 503 && page.contains(words)).then_some(())
        })
        .await;
        for id in [running, waiting] {
            assert!(!bed.gitlab.job(id).unwrap().is_finished(), "{kind}");
        }
        // A kill could lose a job that was handed out just now.
        daemon.term().await;
    }
    // Mended: bridge, and the worker as well, which has the same way to the server.
    bed.edit_config(&url, &format!("url = \"{good}\"\ntls_ca_file = \"{good_ca}\""));
    let checked = bed.run(&["backends", "check"]);
    assert!(checked.status.success(), "{checked:?}");
    let _daemon = bed.serve();
    for id in [running, waiting] {
        bed.finished(id).await;
    }
    bed.nothing_owed().await;
    for id in [running, waiting] {
        bed.assert_once(id);
    }
    grid.assert_no_twins(&bed);
    bed.assert_no_violations();
}

/// Makes a library that moves the clock of the program into which it is loaded.
fn clock_mover(bed: &Bed) -> String {
    let (source, library) = (bed.path("shift.c"), bed.path("shift.so"));
    let text = r#"
        #define _GNU_SOURCE
        #include <dlfcn.h>
        #include <stdlib.h>
        #include <sys/time.h>
        #include <time.h>
        static long shift(void) { const char *s = getenv("CLOCK_SHIFT"); return s ? atol(s) : 0; }
        int clock_gettime(clockid_t clock, struct timespec *at) {
            static int (*real)(clockid_t, struct timespec *);
            if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
            int result = real(clock, at);
            if (!result && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
                at->tv_sec += shift();
            return result;
        }
        int gettimeofday(struct timeval *restrict at, void *restrict zone) {
            struct timespec now;
            clock_gettime(CLOCK_REALTIME, &now);
            at->tv_sec = now.tv_sec;
            at->tv_usec = now.tv_nsec / 1000;
            return 0;
        }
        time_t time(time_t *at) {
            struct timespec now;
            clock_gettime(CLOCK_REALTIME, &now);
            if (at) *at = now.tv_sec;
            return now.tv_sec;
        }
    "#;
    std::fs::write(&source, text).unwrap();
    // What links this program links that.
    let made = Command::new("cc")
        .args(["-shared", "-fPIC", "-o"])
        .args([&library, &source])
        .arg("-ldl")
        .output()
        .unwrap();
    assert!(made.status.success(), "{made:?}");
    library.to_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clock_of_ours_that_is_hours_off_changes_nothing() {
    if grid::left_out() {
        return;
    }
    let grid = Grid::shared();
    // One after the other would take twice as long.
    tokio::join!(live_in_another_time(&grid, 7), live_in_another_time(&grid, -7));
}

/// Runs a daemon whose clock is off by so many hours.
async fn live_in_another_time(grid: &Arc<Grid>, hours: i64) {
    let bed = grid.bed(eager(), "").await;
    // Much sooner over than the clock is off.
    let token = bed.path("short.token");
    write_private(&token, &grid.said(&["token", "ci-robot", "30"]));
    let day = format!("token_file = \"{}\"", grid.token_file().display());
    bed.edit_config(&day, &format!("token_file = \"{}\"", token.display()));
    let (library, shift) = (clock_mover(&bed), (hours * 3600).to_string());
    let env = [("LD_PRELOAD", library.as_str()), ("CLOCK_SHIFT", shift.as_str())];
    let _daemon = bed.serve_with(&env);
    let good = bed
        .gitlab
        .enqueue(bed.counting("good").script("echo kept > out.txt").artifact(kept_always()));
    let late = bed.gitlab.enqueue(endless(&bed).timeout(Duration::from_secs(80)));
    let job = bed.finished(good).await;
    assert_eq!(bed.gitlab.artifacts(good).len(), 1, "{}", text_of(&job));
    // The daemon really lived in another time.
    let row = bed.row(good);
    let received: jiff::Timestamp = row["received_at"].as_str().unwrap().parse().unwrap();
    let now = Command::new("date").args(["-u", "+%FT%TZ"]).output().unwrap();
    let now: jiff::Timestamp = String::from_utf8(now.stdout).unwrap().trim().parse().unwrap();
    let off = received.duration_since(now).as_hours();
    assert!(off == hours || off == hours - hours.signum(), "{off} {row}");
    bed.finished(late).await;
    assert_timed_out_with_artifact(&bed, late);
    bed.nothing_owed().await;
    bed.assert_once(good);
    bed.assert_no_violations();
}
