//! Artifacts of earlier jobs come down from the coordinator.

use std::io::Write as _;

use camino::Utf8PathBuf;

use super::super::sources::tests::Said;
use super::super::tests::runner;
use super::super::{RunnerContext, Slot, plan};
use super::*;
use crate::coordinator::{Coordinator, Endpoint, Fault, NewJob, Options, RunnerOptions};
use crate::gitlab::wire::Secret;
use crate::gitlab::{ClientOptions, Info, InfoOptions, RequestReply, Timeouts};

fn zip(files: &[(&str, &str)]) -> Vec<u8> {
    let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    for (name, content) in files {
        let options = zip::write::SimpleFileOptions::default()
            .compression_method(zip::CompressionMethod::Stored);
        zip.start_file(*name, options).unwrap();
        zip.write_all(content.as_bytes()).unwrap();
    }
    zip.finish().unwrap().into_inner()
}

/// A coordinator with two jobs that left archives, and a third that needs them.
struct World {
    _dir: tempfile::TempDir,
    root: Utf8PathBuf,
    gitlab: Coordinator,
    client: Client,
    makers: [i64; 2],
    user: NewJob,
    runner: RunnerContext,
}

impl World {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let root = Utf8PathBuf::from_path_buf(dir.path().canonicalize().unwrap()).unwrap();
        let gitlab = Coordinator::start(Options::default()).await.unwrap();
        let _was_installed_before = rustls::crypto::ring::default_provider().install_default();
        let mut options = ClientOptions::new(gitlab.url().parse().unwrap());
        options.timeouts = Timeouts { connect: Duration::from_secs(5), ..Timeouts::default() };
        let client = Client::new(options).unwrap();
        let nobody = || NewJob::new("maker").only_for("nobody");
        let makers = [gitlab.enqueue(nobody()), gitlab.enqueue(nobody())];
        let big = "x".repeat(500_000);
        let files = [[("a", "first"), ("both", "first")], [("both", "second"), ("big", &big)]];
        for (id, files) in makers.into_iter().zip(files) {
            gitlab.put_artifact(id, "archive", "zip", "artifacts.zip", &zip(&files)).unwrap();
        }
        let user = NewJob::new("user")
            .env("GIT_STRATEGY", "none")
            .env("FF_USE_EXPONENTIAL_BACKOFF_STAGE_RETRY", "false")
            .needs(makers[0])
            .needs(makers[1]);
        let mut runner = runner();
        runner.builds_dir = root.join("builds");
        Self { _dir: dir, root, gitlab, client, makers, user, runner }
    }

    /// Takes the job that needs the others.
    async fn plan(&self) -> Plan {
        let token = Secret::new(self.gitlab.add_runner(RunnerOptions::default()));
        self.gitlab.enqueue(self.user.clone());
        let info = Info::new(InfoOptions { name: "bridge".into(), ..InfoOptions::default() });
        let asked = self.client.request_job(&token, "s_0123456789ab", &info, None).await;
        let RequestReply::Job(job) = asked.unwrap() else { panic!("no job") };
        plan(&job.payload, &self.runner, Slot::default()).unwrap()
    }

    fn scratch(&self) -> Utf8PathBuf {
        self.root.join("scratch")
    }

    async fn get(&self, plan: &Plan) -> (Result<(), StageError>, String) {
        let mut said = Said::default();
        let result = plan.download_artifacts(&self.client, &self.scratch(), &mut said).await;
        let left = std::fs::read_dir(self.scratch()).map_or(0, Iterator::count);
        assert_eq!(left, 0, "temporary files are removed on every path");
        (result, said.remarks.join("\n"))
    }

    fn downloads(&self) -> u64 {
        self.gitlab.requests().of(Endpoint::DownloadArtifact)
    }
}

fn content(plan: &Plan, name: &str) -> String {
    std::fs::read_to_string(plan.project_dir.join(name)).unwrap()
}

fn failed() -> Result<(), StageError> {
    Err(StageError::Failed { stage: STAGE, exit_code: 1 })
}

#[tokio::test]
async fn later_archives_overwrite_earlier_ones() {
    let world = World::new().await;
    let plan = world.plan().await;
    assert!(plan.has_dependencies());
    let (result, text) = world.get(&plan).await;
    assert_eq!(result, Ok(()), "{text}");
    assert_eq!((content(&plan, "a"), content(&plan, "both")), ("first".into(), "second".into()));
    let id = world.makers[0];
    assert!(text.starts_with(&format!("Downloading artifacts for maker ({id})...\n")), "{text}");
    let ok = "Downloading artifacts from coordinator... ok  correlation_id=";
    assert_eq!(text.matches(ok).count(), 2, "{text}");
    // Again over what is there.
    assert_eq!(world.get(&plan).await.0, Ok(()));
    assert_eq!(world.gitlab.violations(), Vec::<String>::new());
}

#[tokio::test]
async fn without_archives_there_is_no_stage() {
    let mut world = World::new().await;
    let empty = world.gitlab.enqueue(NewJob::new("empty").only_for("nobody"));
    world.user = NewJob::new("user").env("GIT_STRATEGY", "none").needs(empty);
    let plan = world.plan().await;
    assert!(!plan.has_dependencies());
    assert_eq!(world.get(&plan).await, (Ok(()), String::new()));
    assert_eq!(world.downloads(), 0);
}

#[tokio::test]
async fn files_come_from_elsewhere_without_our_token_and_in_pieces() {
    let world = World::new().await;
    world.gitlab.start_object_storage().unwrap();
    let plan = world.plan().await;
    world.gitlab.cut_download(1 << 20);
    world.gitlab.cut_download(300_000);
    let (result, text) = world.get(&plan).await;
    assert_eq!(result, Ok(()), "{text}");
    assert_eq!(content(&plan, "big").len(), 500_000);
    assert_eq!(world.gitlab.requests().of(Endpoint::ObjectStorage), 3, "{text}");
    assert_eq!(world.gitlab.violations(), Vec::<String>::new());
}

#[tokio::test]
async fn a_store_that_cannot_be_reached_is_gone_round() {
    let world = World::new().await;
    let plan = world.plan().await;
    let away = Fault::status(302).header("Location", "http://127.0.0.1:1/x?X-Signature=y");
    world.gitlab.inject(Endpoint::DownloadArtifact, away);
    let (result, text) = world.get(&plan).await;
    assert_eq!(result, Ok(()), "{text}");
    assert!(!text.contains("X-Signature"), "{text}");
    assert_eq!(world.downloads(), 3);
}

#[tokio::test]
async fn what_is_missing_fails_the_job_at_once_and_says_so() {
    let world = World::new().await;
    let plan = world.plan().await;
    world.gitlab.expire_artifacts(world.makers[1]);
    let (result, text) = world.get(&plan).await;
    assert_eq!(result, failed());
    assert!(text.contains("not found: there are no artifacts, or they have expired"), "{text}");
    assert_eq!(world.downloads(), 2, "no repetition");
    world.gitlab.inject(Endpoint::DownloadArtifact, Fault::status(403));
    let (result, text) = world.get(&plan).await;
    assert_eq!(result, failed());
    assert!(text.contains("forbidden: this job may not read"), "{text}");
}

#[tokio::test]
async fn the_whole_stage_is_repeated_as_often_as_the_job_says() {
    let mut world = World::new().await;
    world.user = world.user.env("ARTIFACT_DOWNLOAD_ATTEMPTS", "3");
    let plan = world.plan().await;
    world.gitlab.inject(Endpoint::DownloadArtifact, Fault::status(404).after(1).times(2));
    let (result, text) = world.get(&plan).await;
    // First: good, 404. Second: 404. Third: both good.
    assert_eq!(result, Ok(()), "{text}");
    assert_eq!(world.downloads(), 5);
    assert!(text.contains("attempt 3 of 3 follows in 0 s"), "{text}");
}

#[tokio::test]
async fn an_odd_answer_is_asked_about_three_times() {
    let world = World::new().await;
    let plan = world.plan().await;
    world.gitlab.inject(Endpoint::DownloadArtifact, Fault::status(418).always());
    let (result, text) = world.get(&plan).await;
    assert_eq!(result, failed(), "{text}");
    assert_eq!(world.downloads(), 3);
}

#[tokio::test]
async fn an_archive_that_is_none_fails_the_job() {
    let world = World::new().await;
    let plan = world.plan().await;
    world.gitlab.delete_artifacts(world.makers[0]);
    let id = world.makers[0];
    world.gitlab.put_artifact(id, "archive", "zip", "artifacts.zip", b"PK no zip").unwrap();
    let (result, text) = world.get(&plan).await;
    assert_eq!(result, failed());
    assert!(text.contains("GitLab announced"), "wrong sizes are named: {text}");
}

#[tokio::test]
async fn a_token_that_is_none_fails_the_job_and_is_not_shown() {
    let mut world = World::new().await;
    world.user = world.user.payload(serde_json::json!({ "dependencies": [{
        "id": world.makers[0], "name": "maker", "token": "glcbt-64_none",
        "artifacts_file": { "filename": "artifacts.zip", "size": -5 },
    }]}));
    let plan = world.plan().await;
    let (result, text) = world.get(&plan).await;
    assert_eq!(result, failed(), "{text}");
    assert!(text.contains("responseStatus=401 Unauthorized token=glcbt-64"), "{text}");
    assert!(!text.contains("glcbt-64_none"), "{text}");
}

#[tokio::test]
async fn a_dropped_download_leaves_nothing() {
    let world = World::new().await;
    let plan = world.plan().await;
    let gate = crate::coordinator::Gate::new();
    world.gitlab.inject(Endpoint::DownloadArtifact, Fault::hold(&gate).after(1));
    let mut said = Said::default();
    let scratch = world.scratch();
    let held = world.gitlab.wait_until(
        |gitlab| gitlab.requests().of(Endpoint::DownloadArtifact) == 2,
        Duration::from_secs(20),
    );
    tokio::select! {
        result = plan.download_artifacts(&world.client, &scratch, &mut said) => panic!("{result:?}"),
        held = held => { held.unwrap(); }
    }
    assert_eq!(std::fs::read_dir(&scratch).unwrap().count(), 0);
    assert_eq!(content(&plan, "a"), "first");
    gate.open();
}

#[test]
fn pauses_double_up_to_a_minute() {
    let secs: Vec<u64> = (1..=8).map(|n| pause_after(n).as_secs()).collect();
    assert_eq!(secs, [1, 2, 4, 8, 16, 32, 60, 60]);
}
