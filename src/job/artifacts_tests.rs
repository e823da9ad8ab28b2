//! Packing from real directories, and what follows an upload.

use std::io::Read as _;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::process::Command;

use camino::Utf8PathBuf;

use super::super::sources::tests::Said;
use super::super::tests::{payload, runner, variable};
use super::super::{RunnerContext, Slot, plan};
use super::*;
use crate::gitlab::wire::Secret;

/// A checkout, and a place for packed files.
struct World {
    _dir: tempfile::TempDir,
    root: Utf8PathBuf,
    payload: JobPayload,
    runner: RunnerContext,
}

fn entry(paths: &[&str]) -> Artifact {
    Artifact { paths: paths.iter().map(|p| (*p).to_owned()).collect(), ..Artifact::default() }
}

fn ran() -> Ran {
    Ran {
        well: true,
        started: "2026-08-01T12:00:00Z".parse().unwrap(),
        finished: "2026-08-01T12:00:09.5Z".parse().unwrap(),
    }
}

impl World {
    fn new(artifacts: Vec<Artifact>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let root = Utf8PathBuf::from_path_buf(dir.path().canonicalize().unwrap()).unwrap();
        let mut payload = payload(&[("GIT_STRATEGY", "none"), ("CI_JOB_NAME", "simulate")]);
        payload.token = Secret::new("glcbt-64_secret");
        payload.artifacts = artifacts;
        let mut runner = runner();
        runner.builds_dir = root.join("builds");
        let world = Self { _dir: dir, root, payload, runner };
        std::fs::create_dir_all(world.project()).unwrap();
        std::fs::create_dir_all(world.plan().temp_dir).unwrap();
        world
    }

    fn plan(&self) -> Plan {
        plan(&self.payload, &self.runner, Slot::default()).unwrap()
    }

    fn project(&self) -> Utf8PathBuf {
        self.plan().project_dir
    }

    fn file(&self, name: &str, content: &str) {
        let path = self.project().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }

    fn exports(&self, text: &str) {
        std::fs::write(self.plan().temp_dir.join(script::ENV_FILE), text).unwrap();
    }

    fn target(&self) -> Utf8PathBuf {
        self.root.join("kept/artifact-0")
    }

    async fn pack(&self) -> (Result<Option<PackedArtifact>, StageError>, Said) {
        let mut said = Said::default();
        let result = self.plan().pack_artifact(0, &self.target(), ran(), &mut said).await;
        (result, said)
    }

    async fn packed(&self) -> (PackedArtifact, Said) {
        let (result, said) = self.pack().await;
        let packed = result.unwrap().unwrap_or_else(|| panic!("{:?}", said.remarks));
        (packed, said)
    }

    fn names(&self) -> Vec<String> {
        let zip = zip::ZipArchive::new(std::fs::File::open(self.target()).unwrap()).unwrap();
        zip.file_names().map(|name| name.unwrap().into_owned()).collect()
    }
}

#[test]
fn entries_are_due_by_how_the_script_ended() {
    let when = |when: &str| Artifact { when: when.into(), ..entry(&["x"]) };
    let mut world = World::new(vec![
        when(""),
        when("on_success"),
        when("on_failure"),
        when("always"),
        when("sometimes"),
        Artifact { untracked: true, ..Artifact::default() },
        Artifact { when: "always".into(), ..Artifact::default() },
    ]);
    assert_eq!(world.plan().artifacts_due(true), [0, 1, 3, 5]);
    assert_eq!(world.plan().artifacts_due(false), [2, 3]);
    assert!(world.plan().warnings.is_empty(), "{:?}", world.plan().warnings);
    world.payload.artifacts.clear();
    assert!(world.plan().artifacts_due(true).is_empty());
}

#[tokio::test]
async fn files_are_packed_into_a_private_file_outside_the_workspace() {
    let mut artifact = entry(&["out/", "none*"]);
    artifact.exclude = vec!["**/*.tmp".into()];
    artifact.name = "$CI_JOB_NAME-${STAMP:-now}/${KIND:-all}".into();
    artifact.expire_in = "1 week".into();
    let world = World::new(vec![artifact]);
    world.file("out/b", "bb");
    world.file("out/deep/a", "a");
    world.file("out/x.tmp", "no");
    world.file("other", "no");
    let (packed, said) = world.packed().await;
    assert_eq!(packed.file_name, "all.zip");
    assert_eq!((packed.expire_in.as_str(), packed.format.as_str()), ("1 week", ""));
    let mode = std::fs::metadata(world.target()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let bytes = std::fs::read(world.target()).unwrap();
    assert_eq!(packed.bytes, u64::try_from(bytes.len()).unwrap());
    use sha2::Digest as _;
    let digest: String = sha2::Sha256::digest(&bytes).iter().map(|b| format!("{b:02x}")).collect();
    assert_eq!(packed.sha256, digest);
    let names = world.names();
    assert!(names.contains(&"out/deep/a".to_owned()) && !names.contains(&"out/x.tmp".to_owned()));
    let text = said.remarks.join("\n");
    assert!(text.starts_with("Uploading artifacts..."), "{text}");
    assert!(text.contains("out/: found 4 matching artifact files and directories"), "{text}");
    assert!(text.contains("none*: no matching files. Ensure that the artifact path"), "{text}");
    assert!(text.contains("**/*.tmp: excluded 1 files"), "{text}");
    // Packed again it is the same, and nothing else is left beside it.
    let (again, _) = world.packed().await;
    assert_eq!(again, packed);
    assert_eq!(std::fs::read_dir(world.root.join("kept")).unwrap().count(), 1);
}

#[tokio::test]
async fn nothing_to_pack_is_said_and_no_failure() {
    let world = World::new(vec![entry(&["none"])]);
    let (result, said) = world.pack().await;
    assert_eq!(result, Ok(None));
    assert_eq!(said.remarks.last().map(String::as_str), Some("No files to upload"));
    assert!(!world.target().exists());
    let world = World::new(vec![Artifact::default()]);
    let (result, said) = world.pack().await;
    assert_eq!((result, said.remarks.len()), (Ok(None), 0), "skipped silently");
}

#[tokio::test]
async fn what_the_script_exported_counts_and_secrets_of_the_shell_do_not() {
    let mut artifact = entry(&["${DIR}/*", "$CI_JOB_NAME"]);
    artifact.name = "${NAME:-unnamed}".into();
    let world = World::new(vec![artifact]);
    world.file("made/a", "a");
    world.file("simulate", "s");
    world.exports("DIR=made\n  NAME=v1.2 \n9=x\nnonsense\nHALF=line");
    let (packed, _) = world.packed().await;
    assert_eq!(packed.file_name, "v1.2.zip");
    assert_eq!(world.names(), ["made/a", "simulate"]);
    let environment = world.plan().environment_at_the_end().await.unwrap();
    assert_eq!(environment.get("HALF"), None, "a line without its end is not read");
    assert_eq!(environment.get("9"), None);
}

#[tokio::test]
async fn a_link_in_the_place_of_the_exports_is_not_followed() {
    let mut artifact = entry(&["a"]);
    artifact.name = "${STOLEN:-none}".into();
    let world = World::new(vec![artifact]);
    world.file("a", "a");
    let secret = world.root.join("secret");
    std::fs::write(&secret, "STOLEN=yes\n").unwrap();
    symlink(&secret, world.plan().temp_dir.join(script::ENV_FILE)).unwrap();
    assert_eq!(world.packed().await.0.file_name, "none.zip");
}

#[tokio::test]
async fn texts_that_cannot_be_expanded_stay_with_a_warning() {
    let mut artifact = entry(&["a", "$(touch pwned)"]);
    artifact.name = "${X".into();
    let world = World::new(vec![artifact]);
    world.file("a", "a");
    let (packed, said) = world.packed().await;
    assert_eq!(packed.file_name, "${X.zip");
    let text = said.remarks.join("\n");
    assert!(text.contains("invalid artifact name \"${X\": a `${` has no end"), "{text}");
    assert!(text.contains("invalid artifact path"), "{text}");
    assert!(!world.project().join("pwned").exists());
}

#[tokio::test]
async fn reports_are_gzip_or_raw_and_wrong_matches_fail_as_the_author_sees() {
    let report = |format: &str, kind: &str, paths: &[&str]| Artifact {
        artifact_format: format.into(),
        artifact_type: kind.into(),
        name: "junit.xml".into(),
        ..entry(paths)
    };
    let world = World::new(vec![report("gzip", "junit", &["*.xml"])]);
    world.file("one.xml", "<1/>");
    world.file("two.xml", "<2/>");
    let (packed, _) = world.packed().await;
    assert_eq!((packed.file_name.as_str(), packed.files), ("junit.xml.gz", 2));
    let mut text = String::new();
    flate2::read::MultiGzDecoder::new(std::fs::File::open(world.target()).unwrap())
        .read_to_string(&mut text)
        .unwrap();
    assert_eq!(text, "<1/><2/>");

    let failed = |result: Result<Option<PackedArtifact>, StageError>| match result {
        Err(StageError::Failed { stage, exit_code: 1 }) => assert_eq!(stage, ON_SUCCESS),
        other => panic!("{other:?}"),
    };
    let world = World::new(vec![report("gzip", "junit", &["dir"])]);
    world.file("dir/one.xml", "<1/>");
    let (result, said) = world.pack().await;
    failed(result);
    assert!(said.remarks.join("\n").contains("dir"), "{:?}", said.remarks);

    let world = World::new(vec![report("raw", "sast", &["*.xml"])]);
    world.file("one.xml", "<1/>");
    assert_eq!(world.packed().await.0.file_name, "junit.xml");
    assert_eq!(std::fs::read(world.target()).unwrap(), b"<1/>");
    std::fs::remove_file(world.target()).unwrap();
    world.file("two.xml", "<2/>");
    let (result, said) = world.pack().await;
    failed(result);
    assert!(said.remarks.join("\n").contains("one file"), "{:?}", said.remarks);
    assert_eq!(std::fs::read_dir(world.root.join("kept")).unwrap().count(), 0, "nothing is left");

    let world = World::new(vec![report("7z", "junit", &["a"])]);
    let (result, said) = world.pack().await;
    failed(result);
    assert!(said.remarks.join("\n").contains("unsupported archive format: 7z"));
}

#[test]
fn names_become_file_names() {
    for (name, base) in [
        ("artifacts", "artifacts"),
        ("a/b", "b"),
        ("a/b/", "b"),
        ("", "default"),
        (".", "default"),
        ("..", "default"),
        ("/", "default"),
        ("a/..", "default"),
        (".env", ".env"),
    ] {
        assert_eq!(base_name(name), base, "{name:?}");
    }
    assert_eq!(file_name("a", Format::TarZstd), "a.tar.zst");
    assert_eq!(file_name("a", Format::ZipZstd), "a.zip");
}

#[tokio::test]
async fn what_git_does_not_track_is_packed_and_nothing_the_job_configured_runs() {
    let mut artifact = Artifact { untracked: true, ..Artifact::default() };
    artifact.exclude = vec!["**/*.o".into()];
    let world = World::new(vec![artifact]);
    let git = |args: &[&str]| {
        let done = Command::new("git")
            .args(["-c", "user.name=t", "-c", "user.email=t@example.org"])
            .args(args)
            .current_dir(world.project())
            .env("GIT_CONFIG_GLOBAL", "/dev/null")
            .output()
            .unwrap();
        assert!(done.status.success(), "{args:?}");
    };
    world.file("tracked", "t");
    world.file(".gitignore", "ignored\n");
    git(&["init", "--quiet"]);
    git(&["add", "."]);
    git(&["commit", "--quiet", "-m", "one"]);
    world.file("ignored", "i");
    world.file("new/file", "n");
    world.file("new/file.o", "o");
    git(&["config", "core.fsmonitor", &format!("touch {}/pwned; false", world.root)]);
    let (_, said) = world.packed().await;
    assert_eq!(world.names(), ["ignored", "new/file"], "{:?}", said.remarks);
    assert!(!world.root.join("pwned").exists());
}

#[tokio::test]
async fn without_a_repository_nothing_is_untracked() {
    let world = World::new(vec![Artifact { untracked: true, ..entry(&["a"]) }]);
    world.file("a", "a");
    let (packed, said) = world.packed().await;
    assert_eq!(packed.files, 1);
    assert!(said.remarks.join("\n").contains("untracked: git: exit status 128"));
    assert!(said.text().contains("fatal: not a git repository"), "{}", said.text());
}

#[tokio::test]
async fn an_archive_is_attested_if_the_job_asks_for_it() {
    let mut world = World::new(vec![entry(&["out"])]);
    world.payload.variables.extend([
        variable("RUNNER_GENERATE_ARTIFACTS_METADATA", "true"),
        variable("SLSA_PROVENANCE_SCHEMA_VERSION", "v0.2"),
        variable("CI_RUNNER_ID", "9"),
    ]);
    world.file("out/a", "hello\n");
    let (_, said) = world.packed().await;
    assert!(said.remarks.iter().any(|line| line.contains("only v1 is known")));
    assert_eq!(world.names(), ["artifacts-metadata.json", "out/", "out/a"]);
    let text = std::fs::read_to_string(world.project().join("artifacts-metadata.json")).unwrap();
    assert!(!text.contains("glcbt"), "{text}");
    let statement: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(
        statement["subject"],
        serde_json::json!([{ "name": "out/a", "digest": {
            "sha256": "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"
        }}])
    );
    let definition = &statement["predicate"]["buildDefinition"];
    let source = "https://gitlab.example.org/hep/tracker";
    assert_eq!(definition["externalParameters"]["source"], source);
    assert_eq!(definition["externalParameters"]["CI_JOB_NAME"], "");
    assert_eq!(definition["internalParameters"]["job"], "4711");
    let details = &statement["predicate"]["runDetails"];
    assert_eq!(details["builder"]["id"], format!("{source}/-/runners/9"));
    assert_eq!(details["metadata"]["startedOn"], "2026-08-01T12:00:00Z");
    // The file of an earlier packing is no subject of the next.
    world.packed().await;
    assert_eq!(
        std::fs::read_to_string(world.project().join("artifacts-metadata.json")).unwrap(),
        text
    );
}

#[tokio::test]
async fn levels_are_read_and_a_wrong_one_is_named() {
    let mut world = World::new(vec![entry(&["a"])]);
    world.file("a", &"text ".repeat(10_000));
    let mut sizes = Vec::new();
    for level in ["fastest", "slowest", "zealous"] {
        world.payload.variables.push(variable("ARTIFACT_COMPRESSION_LEVEL", level));
        let (packed, said) = world.packed().await;
        sizes.push(packed.bytes);
        let named = said.remarks.iter().any(|line| line.contains("\"zealous\" is none of"));
        assert_eq!(named, level == "zealous");
    }
    assert!(sizes[0] > 40_000 && sizes[1] < 5_000 && sizes[2] < 5_000, "{sizes:?}");
}

fn answer(status: u16, reply: UploadArtifactReply) -> Result<UploadAnswer, gitlab::Error> {
    Ok(UploadAnswer { reply, status, request_id: "0a".into() })
}

fn again(secs: u64) -> AfterUpload {
    AfterUpload::Again { after: Duration::from_secs(secs), counts: true }
}

#[test]
fn refused_uploads_are_repeated_as_by_the_official_runner_and_unanswered_ones_with_patience() {
    let refused = || answer(400, UploadArtifactReply::Refused { message: "Invalid Format".into() });
    assert_eq!(after_upload(1, 0, &refused()), again(1));
    assert_eq!(after_upload(2, 0, &refused()), again(2));
    assert_eq!(
        after_upload(3, 0, &refused()),
        AfterUpload::GiveUp { why: "Invalid Format".into() }
    );
    let unavailable = || answer(503, UploadArtifactReply::Unavailable { retry_after: None });
    let patient = |secs| AfterUpload::Again { after: Duration::from_secs(secs), counts: false };
    for (silent, secs) in [(1, 1), (2, 2), (3, 4), (6, 32), (60, 60)] {
        assert_eq!(after_upload(1, silent, &unavailable()), patient(secs), "it is waited for");
    }
    let asked = |secs| Some(Duration::from_secs(secs));
    let wait = |secs| answer(503, UploadArtifactReply::Unavailable { retry_after: asked(secs) });
    assert_eq!(after_upload(1, 0, &wait(40)), patient(40));
    assert_eq!(after_upload(1, 0, &wait(40_000)), patient(300));
    assert_eq!(after_upload(1, 0, &answer(201, UploadArtifactReply::Stored)), AfterUpload::Done);
    for final_word in [
        answer(413, UploadArtifactReply::TooLarge),
        answer(
            403,
            UploadArtifactReply::Forbidden { job_status: None, message: "403 Forbidden".into() },
        ),
    ] {
        assert!(matches!(after_upload(1, 0, &final_word), AfterUpload::GiveUp { .. }));
    }
    // A proxy that finds nobody says nothing of the artifact.
    let nobody = answer(502, UploadArtifactReply::Busy { retry_after: None });
    for (silent, secs) in [(1, 1), (4, 8), (20, 60)] {
        let after = Duration::from_secs(secs);
        let expected = AfterUpload::Again { after, counts: false };
        assert_eq!(after_upload(100, silent, &nobody), expected);
    }
}

#[test]
fn the_trace_says_what_became_of_an_upload() {
    let world = World::new(vec![entry(&["a"])]);
    let packed = PackedArtifact {
        file_name: "artifacts.zip".into(),
        format: "zip".into(),
        artifact_type: String::new(),
        expire_in: String::new(),
        bytes: 5,
        sha256: String::new(),
        files: 1,
    };
    let line = |outcome| world.plan().upload_line(&packed, &outcome);
    assert_eq!(
        line(answer(201, UploadArtifactReply::Stored)),
        (
            Tone::Plain,
            "Uploading artifacts as \"archive\" to coordinator... 201 Created  correlation_id=0a \
             id=4711 responseStatus=201 Created token=glcbt-64"
                .to_owned()
        )
    );
    let (tone, text) = line(answer(413, UploadArtifactReply::TooLarge));
    assert_eq!(tone, Tone::Error);
    assert!(text.contains("... 413 Request Entity Too Large: too large archive (5 bytes)"));
    let refused = UploadArtifactReply::Refused { message: "Invalid Format".into() };
    assert!(line(answer(400, refused)).1.contains("400 Bad Request: Invalid Format"));
    let json = serde_json::to_string(&packed).unwrap();
    assert_eq!(serde_json::from_str::<PackedArtifact>(&json).unwrap(), packed);
}

#[tokio::test]
async fn a_dropped_packing_leaves_nothing() {
    let world = World::new(vec![entry(&["big"])]);
    let file = std::fs::File::create(world.project().join("big")).unwrap();
    file.set_len(3 << 30).unwrap();
    let (plan, into) = (world.plan(), world.target());
    let mut said = Said::default();
    let begun = async {
        let part = world.root.join("kept/.artifact-0.part");
        while std::fs::metadata(&part).map_or(0, |meta| meta.len()) == 0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::select! {
        result = plan.pack_artifact(0, &into, ran(), &mut said) => panic!("{result:?}"),
        () = begun => {}
    }
    assert_eq!(std::fs::read_dir(world.root.join("kept")).unwrap().count(), 0);
}
