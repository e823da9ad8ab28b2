//! What a grid has too little of: time, room, trust.

use std::time::{Duration, Instant};

use bridge::coordinator::{EndedBy, NewJob, Status};
use serde_json::json;

use crate::allocation;
use crate::grid::{dirac_id, eager};
use crate::slurm::bed_on;
use crate::support::grid::{self, Grid};
use crate::support::slurm::{self, Cluster};
use crate::support::{Bed, text_of, until};

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
    let timeout = Duration::from_secs(50);
    let begun = Instant::now();
    let id = bed.gitlab.enqueue(endless(&bed).timeout(timeout));
    dirac_id(&bed, id).await;
    until("the job to have waited", || (begun.elapsed() > timeout / 3).then_some(())).await;
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
    let timeout = Duration::from_secs(15);
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
    let id = bed.gitlab.enqueue(endless(&bed).timeout(Duration::from_secs(12)));
    bed.finished(id).await;
    assert_timed_out_with_artifact(&bed, id);
    let text = text_of(&bed.gitlab.job(id).unwrap());
    assert!(text.contains("longer than 12 seconds, waiting included"), "{text}");
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
