//! What a job leaves behind: caches kept, artifacts uploaded once, the verdict after them.

use std::io::Read as _;

use bridge_backend::fake::{Trouble, Verb};
use bridge_backend::{ErrorKind, Outcome};
use serde_json::json;

use super::bed::{Bed, Case};
use super::*;
use crate::coordinator::{ArtifactView, Endpoint, Fault, Status};

/// A job that keeps `out/`, whatever comes of it.
fn keeping(name: &str) -> NewJob {
    job(name).artifact(json!({
        "name": "$CI_JOB_NAME", "paths": ["out/"], "when": "always",
        "artifact_type": "archive", "artifact_format": "zip", "expire_in": "1 week",
    }))
}

fn report(when: &str) -> serde_json::Value {
    json!({
        "name": "junit.xml", "paths": ["junit.xml"], "when": when,
        "artifact_type": "junit", "artifact_format": "gzip",
    })
}

/// Does what the job's script does over there.
fn write(bed: &Bed, case: &Case, name: &str, content: &str) {
    let workspace = bed.world.job(&case.token).unwrap().spec.workspace;
    let path = workspace.join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, content).unwrap();
}

fn unzipped(view: &ArtifactView, name: &str) -> String {
    let file = std::fs::File::open(view.file()).unwrap();
    let mut archive = zip::ZipArchive::new(file).unwrap();
    let mut text = String::new();
    archive.by_name(name).unwrap().read_to_string(&mut text).unwrap();
    text
}

async fn ended(bed: &Bed, case: &Case, code: i32) -> JobView {
    bed.world.finish(&case.token, Outcome::Exited { code });
    bed.home(case).await;
    let view = bed.view(case.ci_job);
    assert!(bed.spool(case.id) == *view.trace);
    assert!(!bed.path("artifacts").join(case.id.to_string()).exists(), "packed files are gone");
    view
}

#[tokio::test]
async fn artifacts_reach_gitlab_before_the_verdict() {
    let bed = Bed::new().await;
    let case = bed.running(keeping("kept").artifact(report("on_failure"))).await;
    write(&bed, &case, "out/a.txt", "alpha");
    write(&bed, &case, "junit.xml", "<testsuites/>");
    let view = ended(&bed, &case, 0).await;
    assert_eq!(view.status, Status::Success);
    let kept = bed.gitlab.artifacts(case.ci_job);
    assert_eq!(kept.len(), 1, "nothing failed: {kept:?}");
    assert_eq!((kept[0].artifact_type.as_str(), kept[0].format.as_str()), ("archive", "zip"));
    assert_eq!(kept[0].file_name, "kept.zip");
    assert_eq!(kept[0].expire_in.as_deref(), Some("1 week"));
    assert_eq!(unzipped(&kept[0], "out/a.txt"), "alpha");
    let text = bed.text(case.ci_job);
    assert!(text.contains("out/: found # matching artifact files and directories"), "{text}");
    let (uploaded, last) = text.rsplit_once("section_end").unwrap();
    assert!(uploaded.contains("Uploading artifacts as \"archive\" to coordinator... # Created"));
    assert!(last.contains("Job succeeded"), "{text}");
    bed.assert_well();
}

#[tokio::test]
async fn a_failed_job_leaves_what_is_wanted_of_failures() {
    let bed = Bed::new().await;
    let case = bed.running(keeping("failed").artifact(report("on_failure"))).await;
    write(&bed, &case, "out/a.txt", "alpha");
    write(&bed, &case, "junit.xml", "<testsuites/>");
    let view = ended(&bed, &case, 3).await;
    assert_eq!(
        (view.status, view.failure_reason.as_deref()),
        (Status::Failed, Some("script_failure"))
    );
    let types: Vec<String> =
        bed.gitlab.artifacts(case.ci_job).into_iter().map(|a| a.artifact_type).collect();
    assert_eq!(types, ["archive", "junit"]);
    bed.assert_well();
}

#[tokio::test]
async fn an_artifact_that_gitlab_refuses_fails_the_job_in_its_words() {
    let bed = Bed::new().await;
    let case = bed.running(keeping("refused")).await;
    write(&bed, &case, "out/a.txt", "alpha");
    bed.gitlab.inject(Endpoint::UploadArtifact, Fault::status(413));
    let view = ended(&bed, &case, 0).await;
    assert_eq!(
        (view.status, view.failure_reason.as_deref()),
        (Status::Failed, Some("script_failure"))
    );
    assert_eq!(view.exit_code, Some(1));
    let text = bed.text(case.ci_job);
    assert!(text.contains("Job failed: its artifacts could not be uploaded: too large"), "{text}");
    assert!(!text.contains("Job succeeded"), "{text}");
    bed.assert_well();
}

#[tokio::test]
async fn a_gitlab_that_is_away_gets_the_artifact_later() {
    let bed = Bed::new().await;
    let case = bed.running(keeping("later")).await;
    write(&bed, &case, "out/a.txt", "alpha");
    for _ in 0..4 {
        bed.gitlab.inject(Endpoint::UploadArtifact, Fault::status(502));
    }
    bed.gitlab.inject(Endpoint::UploadArtifact, Fault::lost_answer());
    let view = ended(&bed, &case, 0).await;
    assert_eq!(bed.gitlab.faults_left(), 0);
    assert_eq!(view.status, Status::Success);
    assert_eq!(bed.gitlab.artifacts(case.ci_job).len(), 1, "the same bytes twice are one artifact");
    bed.assert_well();
}

#[tokio::test]
async fn a_packed_artifact_is_not_packed_again_by_the_next_process() {
    let mut bed = Bed::new().await;
    let case = bed.running(keeping("restart")).await;
    write(&bed, &case, "out/a.txt", "alpha");
    for _ in 0..8 {
        bed.gitlab.inject(Endpoint::UploadArtifact, Fault::status(502));
    }
    bed.world.finish(&case.token, Outcome::Exited { code: 0 });
    let packed = |bed: &Bed| bed.path("artifacts").join(case.id.to_string()).join("0");
    bed.until("it is packed", &case, |_| packed(&bed).exists()).await;
    bed.sweeps(3).await;
    // Whoever packed it now would pack something else, and GitLab would refuse that.
    write(&bed, &case, "out/a.txt", "changed");
    bed = bed.restart().await;
    bed.home(&case).await;
    let kept = bed.gitlab.artifacts(case.ci_job);
    assert_eq!(unzipped(&kept[0], "out/a.txt"), "alpha");
    assert_eq!(bed.text(case.ci_job).matches("found # matching").count(), 1);
    bed.assert_well();
}

#[tokio::test]
async fn a_job_that_gitlab_gives_up_while_it_uploads_leaves_nothing_here() {
    let bed = Bed::new().await;
    let case = bed.running(keeping("given up")).await;
    write(&bed, &case, "out/a.txt", "alpha");
    for _ in 0..40 {
        bed.gitlab.inject(Endpoint::UploadArtifact, Fault::status(502));
    }
    bed.world.finish(&case.token, Outcome::Exited { code: 0 });
    bed.until("it waits", &case, |job| job.state == JobState::Reporting).await;
    bed.gitlab.force_cancel(case.ci_job);
    let row = bed.home(&case).await;
    assert_eq!(row.state, JobState::Abandoned);
    assert!(!bed.path("artifacts").join(case.id.to_string()).exists());
}

#[tokio::test]
async fn no_files_are_no_failure() {
    let bed = Bed::new().await;
    let case = bed.running(keeping("nothing")).await;
    let view = ended(&bed, &case, 0).await;
    assert_eq!(view.status, Status::Success);
    assert!(bed.gitlab.artifacts(case.ci_job).is_empty());
    let text = bed.text(case.ci_job);
    assert!(text.contains("WARNING: out/: no matching files."), "{text}");
    assert!(text.contains("ERROR: No files to upload"), "{text}");
    bed.assert_well();
}

#[tokio::test]
async fn a_later_job_finds_what_an_earlier_one_left() {
    let bed = Bed::new().await;
    let first = bed.running(keeping("first")).await;
    write(&bed, &first, "out/a.txt", "alpha");
    ended(&bed, &first, 0).await;
    let second = bed.running(job("second").env("GIT_STRATEGY", "empty").needs(first.ci_job)).await;
    let workspace = bed.world.job(&second.token).unwrap().spec.workspace;
    assert_eq!(std::fs::read_to_string(workspace.join("out/a.txt")).unwrap(), "alpha");
    let view = ended(&bed, &second, 0).await;
    assert_eq!(view.status, Status::Success);
    let text = bed.text(second.ci_job);
    assert!(text.contains("Downloading artifacts for first (#)"), "{text}");
    bed.assert_well();
}

#[tokio::test]
async fn a_cache_is_there_for_the_next_job_of_the_project() {
    let bed = Bed::new().await;
    let cached = |name: &str| {
        job(name)
            .env("GIT_STRATEGY", "empty")
            .cache(json!({ "key": "deps", "paths": ["deps/"], "policy": "pull-push" }))
    };
    let first = bed.running(cached("first")).await;
    write(&bed, &first, "deps/lib.txt", "compiled");
    ended(&bed, &first, 0).await;
    let second = bed.running(cached("second")).await;
    let workspace = bed.world.job(&second.token).unwrap().spec.workspace;
    assert_eq!(std::fs::read_to_string(workspace.join("deps/lib.txt")).unwrap(), "compiled");
    ended(&bed, &second, 0).await;
    let text = bed.text(second.ci_job);
    assert!(text.contains("Successfully extracted cache"), "{text}");
    bed.assert_well();
}

#[tokio::test]
async fn a_new_token_of_the_runner_moves_no_job_that_is_under_way() {
    let bed = Bed::new().await;
    let case = bed.running(keeping("rotated")).await;
    write(&bed, &case, "out/a.txt", "alpha");
    let bed = bed.restart_with_token("another").await;
    let view = ended(&bed, &case, 0).await;
    assert_eq!(view.status, Status::Success);
    assert_eq!(unzipped(&bed.gitlab.artifacts(case.ci_job)[0], "out/a.txt"), "alpha");
    bed.assert_well();
}

#[tokio::test]
async fn a_packed_file_that_somebody_took_away_is_packed_again() {
    let bed = Bed::new().await;
    let case = bed.running(keeping("taken")).await;
    write(&bed, &case, "out/a.txt", "alpha");
    for _ in 0..4 {
        bed.gitlab.inject(Endpoint::UploadArtifact, Fault::status(503));
    }
    bed.world.finish(&case.token, Outcome::Exited { code: 0 });
    let packed = bed.path("artifacts").join(case.id.to_string()).join("0");
    bed.until("it is packed", &case, |_| packed.exists()).await;
    std::fs::remove_file(&packed).unwrap();
    bed.home(&case).await;
    assert_eq!(bed.gitlab.faults_left(), 0);
    assert_eq!(bed.view(case.ci_job).status, Status::Success);
    assert_eq!(bed.gitlab.artifacts(case.ci_job).len(), 1);
    bed.assert_well();
}

/// A process whose jobs run on another machine.
async fn away() -> Bed {
    let mut world = FakeOptions::default();
    world.capabilities.filesystem = Filesystem::Sandbox;
    world.capabilities.collect = true;
    Bed::with(world, Tuning::default()).await
}

#[tokio::test]
async fn what_a_job_wrote_elsewhere_is_brought_home_in_the_end() {
    for trouble in [Trouble::LostAnswer, Trouble::LostQuestion, Trouble::Fail(ErrorKind::Transient)]
    {
        let bed = away().await;
        let cached = json!({ "key": "deps", "paths": ["deps/"], "policy": "push" });
        let case = bed.running(keeping("elsewhere").cache(cached)).await;
        for name in ["out/a.txt", "deps/lib.txt", "src/other.txt"] {
            bed.world.leave(&case.token, name, name);
        }
        // What was here before is not what the job left.
        write(&bed, &case, "out/old.txt", "before");
        for _ in 0..3 {
            bed.world.trouble(Verb::Collect, trouble);
        }
        let view = ended(&bed, &case, 0).await;
        assert_eq!(view.status, Status::Success);
        assert!(bed.world.count(Verb::Collect) > 3);
        let kept = bed.gitlab.artifacts(case.ci_job);
        assert_eq!(unzipped(&kept[0], "out/a.txt"), "out/a.txt");
        let zip = std::fs::File::open(kept[0].file()).unwrap();
        let zip = zip::ZipArchive::new(zip).unwrap();
        assert!(
            zip.file_names().all(|name| !name.unwrap().contains("old")),
            "it was not there any more"
        );
        let text = bed.text(case.ci_job);
        assert_eq!(text.matches("is not at home yet").count(), 1, "{text}");
        let workspace = bed.world.job(&case.token).unwrap().spec.workspace;
        assert!(!workspace.join("src/other.txt").exists(), "nobody asked for it");
        bed.assert_well();
    }
}

#[tokio::test]
async fn what_cannot_be_brought_home_makes_a_green_job_red() {
    let bed = away().await;
    let case = bed.running(keeping("lost")).await;
    // Half of it may be here already.
    write(&bed, &case, "out/a.txt", "al");
    bed.world.trouble(Verb::Collect, Trouble::Fail(ErrorKind::Lost));
    let view = ended(&bed, &case, 0).await;
    assert!(bed.gitlab.artifacts(case.ci_job).is_empty());
    let text = bed.text(case.ci_job);
    assert!(text.contains("What the job wrote is lost: "), "{view:?} {text}");
    assert!(text.contains("Job failed (system failure): what the job wrote is lost"), "{text}");
    assert_eq!(view.status, Status::Failed);
    assert_eq!(view.failure_reason.as_deref(), Some("runner_system_failure"));
    let workspace = bed.world.job(&case.token).unwrap().spec.workspace;
    assert!(!workspace.join("out/a.txt").exists(), "a part would be taken for the whole");
    bed.assert_well();
}
