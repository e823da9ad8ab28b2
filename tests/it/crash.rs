//! The test this project lives by: `kill -9` of the real binary at every crash point, and everywhere.
//!
//! The points are those of the table in `src/lib.rs`; the process kills itself with SIGKILL when it comes
//! to the one that `BRIDGE_CRASH_AT` names. Afterwards an ordinary start must bring the job home: one
//! run, one trace equal byte for byte, one final status, nothing owed.

use std::os::unix::process::ExitStatusExt as _;
use std::time::{Duration, Instant};

use bridge::coordinator::{Options, Status};
use serde_json::json;

use crate::support::grid::{self, Grid};
use crate::support::slurm::{self, Cluster};
use crate::support::{Bed, Where, text_of, until};

const POINTS: [&str; 12] = ["B", "C", "D", "D2", "E", "F", "G", "concluded", "H", "I", "K", "K2"];

async fn survives(bed: &Bed, point: &str) {
    let daemon = bed.serve_with(&[("BRIDGE_CRASH_AT", point)]);
    let job = bed.gitlab.enqueue(
        bed.counting(point)
            .script("for i in 1 2 3 4 5; do echo \"line $i of the log\"; done")
            .script("echo made > made.txt")
            .after_script("echo \"and after: $CI_JOB_STATUS\"")
            .artifact(json!({
                "name": "made", "paths": ["made.txt"], "artifact_type": "archive",
                "artifact_format": "zip",
            })),
    );
    let status = daemon.ended().await;
    assert_eq!(status.signal(), Some(9), "{point}: it died there\n{}", bed.log());
    let _daemon = bed.serve();
    bed.finished(job).await;
    bed.nothing_owed().await;
    bed.assert_once(job);
    let text = text_of(&bed.gitlab.job(job).unwrap());
    for i in 1..=5 {
        let line = format!("\nline {i} of the log\n");
        assert_eq!(text.matches(&line).count(), 1, "{point}: {text}");
    }
    assert_eq!(text.matches("and after: success").count(), 1, "{point}: {text}");
    assert_eq!(text.matches("Running with bridge").count(), 1, "{point}: {text}");
    assert_eq!(bed.gitlab.artifacts(job).len(), 1, "{point}: {text}");
    assert_eq!(text.matches("Job succeeded").count(), 1, "{point}: {text}");
    bed.assert_no_violations();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_survives_kill_9_at_every_point_on_local() {
    for point in POINTS {
        let bed = Bed::local().await;
        survives(&bed, point).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_survives_kill_9_at_every_point_on_slurm() {
    if slurm::left_out() {
        return;
    }
    let cluster = Cluster::start(&[]);
    for point in POINTS {
        let bed = Bed::new(Where::Slurm { conf: cluster.conf() }, Options::default(), "", "").await;
        // A controller that answers needs no half minute to know a job.
        bed.write_config("", "", "settle = \"3s\"");
        survives(&bed, point).await;
        let names = cluster.ask("squeue", &["-h", "-t", "all", "-o", "%j"]);
        let mut names: Vec<&str> = names.lines().collect();
        let all = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), all, "{point}: no token has two batch jobs");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_survives_kill_9_at_every_point_on_the_grid() {
    if grid::left_out() {
        return;
    }
    let grid = Grid::shared();
    // Together: each waits for the site most of its time.
    let all = POINTS.map(|point| {
        let grid = &grid;
        async move {
            let bed = grid.bed(Options::default(), "").await;
            survives(&bed, point).await;
            grid.assert_no_twins(&bed);
        }
    });
    futures_util::future::join_all(all).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn between_the_answer_and_the_row_only_gitlab_can_help() {
    // Crash point A: the one hole there is, and no current server closes it. What must hold is that
    // nothing else suffers.
    let bed = Bed::local().await;
    let daemon = bed.serve_with(&[("BRIDGE_CRASH_AT", "A")]);
    let lost = bed.gitlab.enqueue(bed.counting("lost"));
    assert_eq!(daemon.ended().await.signal(), Some(9));
    let _daemon = bed.serve();
    let next = bed.gitlab.enqueue(bed.counting("next"));
    bed.finished(next).await;
    assert_eq!(bed.runs(lost), 0);
    assert!(!bed.gitlab.job(lost).unwrap().is_finished());
    bed.gitlab.advance(Duration::from_secs(2 * 3600));
    let lost = bed.finished(lost).await;
    assert_eq!(lost.failure_reason.as_deref(), Some("no_updates_running"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancellation_survives_kill_9() {
    cancellation_survives(&Bed::local().await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancellation_survives_kill_9_on_the_grid() {
    if grid::left_out() {
        return;
    }
    cancellation_survives(&Grid::shared().bed(Options::default(), "").await).await;
}

async fn cancellation_survives(bed: &Bed) {
    let daemon = bed.serve_with(&[("BRIDGE_CRASH_AT", "J")]);
    let job = bed.gitlab.enqueue(bed.counting("cancelled").script("sleep 600"));
    until("the job to run", || (bed.runs(job) == 1).then_some(())).await;
    assert!(bed.run(&["jobs", "cancel", &job.to_string()]).status.success());
    assert_eq!(daemon.ended().await.signal(), Some(9), "{}", bed.log());
    let _daemon = bed.serve();
    let job = bed.finished(job).await;
    assert_eq!(job.status, Status::Failed);
    assert_eq!(job.failure_reason.as_deref(), Some("runner_interrupted"), "{job:?}");
    bed.nothing_owed().await;
    assert_eq!(bed.runs(job.id), 1);
    bed.assert_no_violations();
}

/// Lets the daemon live until something was achieved: a job began or ended well. It lives for `least` at
/// least, so that kills come at any time, and not for ever.
async fn live(bed: &Bed, jobs: usize, least: Duration) {
    const MOST: Duration = Duration::from_secs(30);
    let begun = || std::fs::read_dir(bed.path("ran")).map_or(0, Iterator::count);
    let achieved = || (begun(), bed.gitlab.counts().success);
    let (before, started) = (achieved(), Instant::now());
    loop {
        let over = bed.gitlab.counts().success >= jobs || achieved() != before;
        if started.elapsed() >= MOST || (over && started.elapsed() >= least) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Kills the daemon again and again until so many jobs are done; see [`live`].
///
/// A kill between GitLab's answer and the row takes the job of that answer along: crash point A, which
/// nothing can close. Such a job is told apart by having no row, must never have run, and at most one
/// can be lost to a kill; another takes its place, so that the number asked for lives through it all.
async fn soak(bed: &Bed, jobs: usize, least: Duration, within: Duration) {
    let enqueue = |n: usize| {
        bed.gitlab.enqueue(
            bed.counting(&format!("soak {n}"))
                .script("for i in 1 2 3; do echo \"line $i\"; sleep 0.2; done"),
        )
    };
    let mut ids: Vec<i64> = (0..jobs).map(enqueue).collect();
    let mut fallen = Vec::new();
    let started = Instant::now();
    let mut kills = 0;
    while bed.gitlab.counts().success < jobs {
        assert!(started.elapsed() < within, "{:?}\n{}", bed.gitlab.counts(), bed.log());
        let daemon = bed.serve();
        live(bed, jobs, least).await;
        daemon.kill();
        kills += 1;
        // GitLab has seen all that the dead process sent once it has seen its connections end.
        tokio::time::sleep(Duration::from_millis(20)).await;
        let rows = bed.rows();
        let handed_out =
            |id: &i64| bed.gitlab.job(*id).is_some_and(|job| job.assigned_at.is_some());
        for id in &mut ids {
            if handed_out(id) && !rows.contains_key(id) {
                fallen.push(*id);
                *id = enqueue(jobs + fallen.len());
            }
        }
    }
    let _daemon = bed.serve();
    bed.nothing_owed().await;
    println!(
        "{jobs} jobs in {:.1} s with {kills} kills, {} more fell into crash point A",
        started.elapsed().as_secs_f64(),
        fallen.len()
    );
    assert!(kills >= 3, "the soak was over before it hurt");
    assert!(fallen.len() <= kills, "a kill takes one job at most: {fallen:?}");
    for id in ids {
        bed.assert_once(id);
        let text = text_of(&bed.gitlab.job(id).unwrap());
        for i in 1..=3 {
            assert_eq!(text.matches(&format!("\nline {i}\n")).count(), 1, "{text}");
        }
    }
    bed.gitlab.advance(Duration::from_secs(2 * 3600));
    for id in fallen {
        let job = bed.gitlab.job(id).unwrap();
        assert_eq!(bed.runs(id), 0, "{job:?}");
        assert_eq!(job.failure_reason.as_deref(), Some("no_updates_running"), "{job:?}");
    }
    let violations = bed.gitlab.violations();
    assert!(violations.is_empty(), "{violations:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_jobs_survive_a_kill_9_every_second_on_local() {
    if std::env::var_os("BRIDGE_TESTS_QUICK").is_some() {
        println!("left out: a quick run was asked for");
        return;
    }
    let bed = Bed::local().await;
    soak(&bed, 100, Duration::from_secs(1), Duration::from_secs(180)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fifty_jobs_survive_a_kill_9_every_second_on_slurm() {
    if slurm::left_out() {
        return;
    }
    if std::env::var_os("BRIDGE_TESTS_QUICK").is_some() {
        println!("left out: a quick run was asked for");
        return;
    }
    let cluster = Cluster::start(&[]);
    let bed = Bed::new(Where::Slurm { conf: cluster.conf() }, Options::default(), "", "").await;
    // Longer than the daemon ever lives: the time must go on across its lives.
    bed.write_config("", "", "settle = \"3s\"");
    soak(&bed, 50, Duration::from_secs(1), Duration::from_secs(240)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn thirty_jobs_survive_a_kill_9_every_few_seconds_on_the_grid() {
    if grid::left_out() {
        return;
    }
    if std::env::var_os("BRIDGE_TESTS_QUICK").is_some() {
        println!("left out: a quick run was asked for");
        return;
    }
    // Of its own, or the jobs of other tests wait behind these.
    let grid = Grid::start("soak", &["--beat", "60"]);
    let bed = grid.bed(Options::default(), "").await;
    soak(&bed, 30, Duration::from_secs(2), Duration::from_secs(600)).await;
}
