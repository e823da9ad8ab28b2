//! `sources = "allocation"`: the job fetches its sources itself, where it runs.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use bridge::coordinator::{EndedBy, Endpoint, Fault, Gate, Git, JobView, NewJob, Options, Status};
use serde_json::json;

use crate::support::{BRIDGE, Bed, Where, is_alive, text_of, until, write_private};

const PROJECT: &str = "hep/tracker";

fn git(dir: &Path, args: &[&str]) {
    let status = Command::new("git")
        .args(["-c", "user.name=t", "-c", "user.email=t@example.org"])
        .args(args)
        .current_dir(dir)
        .status();
    assert!(status.unwrap().success(), "git {args:?}");
}

/// A bed with a served project, whose jobs fetch it.
async fn bed(runner: &str) -> Bed {
    let bed = Bed::new(Where::Local, Options::default(), "", "").await;
    bed.write_config("", runner, "sources = \"allocation\"");
    serve_project(&bed).await;
    bed
}

/// Serves a project to a bed's jobs.
pub(crate) async fn serve_project(bed: &Bed) {
    let work = bed.path("project");
    std::fs::create_dir_all(work.join("data")).unwrap();
    git(&work, &["init", "-q", "-b", "main"]);
    commit(bed, "one").await;
}

/// Changes the project.
async fn commit(bed: &Bed, text: &str) {
    let work = bed.path("project");
    std::fs::write(work.join("file"), format!("{text}\n")).unwrap();
    std::fs::write(work.join("data/tracked"), "from git\n").unwrap();
    git(&work, &["add", "."]);
    git(&work, &["commit", "-q", "--allow-empty", "-m", text]);
    bed.gitlab.serve_repository(PROJECT, &work).await.unwrap();
}

fn job(name: &str) -> NewJob {
    NewJob::new(name).git(Git::default()).script("echo \"file: $(cat file)\"")
}

fn good(bed: &Bed, job: &JobView) -> String {
    let text = text_of(job);
    assert_eq!(job.status, Status::Success, "{text}\n{}", bed.log());
    text
}

/// What lies below a directory and holds a text.
fn holding(text: &str, dirs: &[PathBuf]) -> String {
    let found = Command::new("grep").args(["-rlaF", text]).args(dirs).output().unwrap();
    String::from_utf8_lossy(&found.stdout).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_fetches_its_sources_and_finds_caches_and_artifacts_in_them() {
    let bed = bed("").await;
    sources_caches_and_artifacts(&bed, true).await;
}

/// Runs jobs of a served project that fetch their sources where they run; `kept` says that what one job
/// fetched, the next one finds.
pub(crate) async fn sources_caches_and_artifacts(bed: &Bed, kept: bool) {
    let _daemon = bed.serve();
    let cache = json!({
        "key": "k", "untracked": false, "paths": ["kept/", "data/cached"],
        "policy": "pull-push", "when": "on_success", "fallback_keys": [],
    });
    let artifact = json!({
        "name": "", "untracked": false, "paths": ["data/made", "file"], "when": "on_success",
        "expire_in": "1 week", "artifact_type": "archive", "artifact_format": "zip",
    });
    let first = bed.gitlab.enqueue(
        job("first")
            .cache(cache.clone())
            .artifact(artifact)
            .script("mkdir kept && echo cached | tee kept/one data/cached")
            .script("echo made >data/made; echo changed by a job >file; touch untracked"),
    );
    let first = bed.finished(first).await;
    let text = good(bed, &first);
    assert!(text.contains("The job fetches its sources itself"), "{text}");
    assert_eq!(text.matches("Getting source from Git repository").count(), 1, "{text}");
    let at = |what: &str| text.find(what).unwrap_or_else(|| panic!("{what}: {text}"));
    assert!(at("Submitted to b") < at("Getting source from Git"), "where the job runs");
    assert!(at("Created fresh repository.") < at("file: one"), "{text}");

    commit(bed, "two").await;
    for strategy in ["fetch", "clone"] {
        let second = bed.gitlab.enqueue(
            job("second")
                .env("GIT_STRATEGY", strategy)
                .cache(cache.clone())
                .needs(first.id)
                .script("cat kept/one data/cached data/made data/tracked")
                .script("ls untracked || true; git log --format=%s -1; git status --porcelain"),
        );
        let text = good(bed, &bed.finished(second).await);
        // An artifact wins over the checkout, as with sources from the submit node.
        assert!(text.contains("file: changed by a job"), "{text}");
        assert!(text.contains("\ncached\ncached\nmade\nfrom git\n"), "{text}");
        assert!(text.contains("cannot access 'untracked'"), "it was cleaned away: {text}");
        assert!(text.contains("\ntwo\n M file\n"), "{text}");
        let fresh = strategy == "clone" || !kept;
        assert_eq!(text.contains("Created fresh repository."), fresh, "{text}");
    }
    bed.nothing_owed().await;
    until("the jobs' tokens to be in no file", || {
        holding("glcbt-64_", &[bed.path("builds"), bed.path("jobs")]).is_empty().then_some(())
    })
    .await;
    bed.assert_no_violations();
}

#[tokio::test(flavor = "multi_thread")]
async fn submodules_and_depth_are_the_jobs_own() {
    let bed = bed("").await;
    let below = bed.path("below");
    std::fs::create_dir(&below).unwrap();
    git(&below, &["init", "-q", "-b", "main"]);
    std::fs::write(below.join("name"), "geometry\n").unwrap();
    git(&below, &["add", "."]);
    git(&below, &["commit", "-q", "-m", "below"]);
    bed.gitlab.serve_repository("hep/below", &below).await.unwrap();
    bed.gitlab.open_repository("hep/below");
    let work = bed.path("project");
    let from = below.to_str().unwrap();
    git(&work, &["-c", "protocol.file.allow=always", "submodule", "--quiet", "add", from, "lib"]);
    git(&work, &["config", "--file", ".gitmodules", "submodule.lib.url", "../below.git"]);
    commit(&bed, "two").await;
    let _daemon = bed.serve();
    let done = bed.gitlab.enqueue(
        job("deep")
            .git(Git { depth: 1, ..Git::default() })
            .env("GIT_SUBMODULE_STRATEGY", "recursive")
            .script("cat lib/name; echo \"commits: $(git rev-list --count HEAD)\""),
    );
    let text = good(&bed, &bed.finished(done).await);
    assert!(text.contains("Updating submodules recursively with git depth set to 1..."), "{text}");
    assert!(text.contains("\ngeometry\n") && text.contains("commits: 1\n"), "{text}");
    bed.nothing_owed().await;
    bed.assert_no_violations();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_token_has_the_verdict_that_it_has_on_the_submit_node() {
    let mut ends = Vec::new();
    for place in ["allocation", "submit-node"] {
        let bed = bed("").await;
        bed.edit_config("\"allocation\"", &format!("\"{place}\""));
        let _daemon = bed.serve();
        let url = bed.gitlab.url().replace("://", "://gitlab-ci-token:wrong@");
        let git = Git { repo_url: Some(format!("{url}/{PROJECT}.git")), ..Git::default() };
        let id = bed.gitlab.enqueue(
            job("refused")
                .git(Git { sha: Some("1f0e9d8c7b6a59483726150493827160a5b4c3d2".into()), ..git })
                .after_script("echo after script"),
        );
        let job = bed.finished(id).await;
        let text = text_of(&job);
        assert_eq!(job.status, Status::Failed, "{text}\n{}", bed.log());
        assert!(text.contains("Authentication failed"), "{text}");
        assert!(!text.contains("after script") && !text.contains("file:"), "{text}");
        let last = text.split_once("ERROR: Job failed").map(|(_, last)| last.to_owned());
        ends.push((job.failure_reason, job.exit_code, last));
        bed.nothing_owed().await;
        bed.assert_no_violations();
    }
    assert_eq!(ends[0], ends[1]);
    assert_eq!(ends[0].0.as_deref(), Some("script_failure"));
    assert_eq!(ends[0].1, Some(128));
    let last = ends[0].2.clone().unwrap();
    assert!(last.starts_with(": get_sources: exit status 128"), "{last}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_without_git_is_the_runners_fault() {
    let bed = bed("login_shell = true").await;
    // The machine is this one; what its login profile leaves of it has no git.
    let bin = bed.path("bin");
    std::fs::create_dir(&bin).unwrap();
    for tool in ["bash", "cat", "mkdir", "rm", "sh", "uname"] {
        let real = std::env::split_paths(&std::env::var_os("PATH").unwrap())
            .map(|dir| dir.join(tool))
            .find(|path| path.exists());
        symlink(real.unwrap(), bin.join(tool)).unwrap();
    }
    let profile = format!("PATH={}\n", bin.display());
    for name in [".profile", ".bash_profile"] {
        std::fs::write(bed.path(name), &profile).unwrap();
    }
    let _daemon = bed.serve();
    let id = bed.gitlab.enqueue(job("bare").after_script("echo after script"));
    let job = bed.finished(id).await;
    let text = text_of(&job);
    assert_eq!(job.failure_reason.as_deref(), Some("runner_system_failure"), "{text}");
    let why = "ERROR: Job failed (system failure): get_sources: git is not installed on ";
    assert!(text.contains(why), "{text}");
    assert!(!text.contains("after script"), "{text}");
    bed.nothing_owed().await;
    bed.assert_no_violations();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_job_stops_fetching() {
    let bed = bed("").await;
    let _daemon = bed.serve();
    let gate = Gate::new();
    bed.gitlab.inject(Endpoint::Git, Fault::hold(&gate).always());
    let hook = bed.note_pid("pid");
    let id = bed.gitlab.enqueue(
        job("slow").hook("pre_get_sources_script", [hook]).after_script("echo after script"),
    );
    until("git to ask", || (bed.gitlab.requests().of(Endpoint::Git) > 0).then_some(())).await;
    let pid = bed.pid_of("pid").await;
    bed.gitlab.cancel(id);
    let job = bed.finished(id).await;
    gate.open();
    let text = text_of(&job);
    assert_eq!(job.status, Status::Canceled, "{text}\n{}", bed.log());
    assert_eq!(job.ended_by, Some(EndedBy::Runner), "{job:?}");
    assert!(text.contains("fetching the sources was stopped"), "{text}");
    assert!(!text.contains("after script"), "{text}");
    assert!(!is_alive(pid));
    bed.nothing_owed().await;
    bed.assert_no_violations();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fetch_that_takes_too_long_is_a_timeout_of_its_own() {
    let bed = bed("get_sources_timeout = \"2s\"").await;
    let _daemon = bed.serve();
    let gate = Gate::new();
    bed.gitlab.inject(Endpoint::Git, Fault::hold(&gate).always());
    let id = bed.gitlab.enqueue(job("slow"));
    let job = bed.finished(id).await;
    gate.open();
    let text = text_of(&job);
    assert_eq!(job.failure_reason.as_deref(), Some("job_execution_timeout"), "{text}");
    assert!(text.contains("ERROR: Job failed: get_sources took longer than it may"), "{text}");
    bed.nothing_owed().await;
    bed.assert_no_violations();
}

#[test]
fn exec_sends_the_folder_along_all_the_same_and_says_so() {
    let dir = tempfile::Builder::new().prefix("bridge-it-").tempdir().unwrap();
    let project = dir.path().join("project");
    for name in ["project", "home", "tmp"] {
        std::fs::create_dir(dir.path().join(name)).unwrap();
    }
    std::fs::write(project.join(".gitlab-ci.yml"), "build: {script: [cat hello]}\n").unwrap();
    std::fs::write(project.join("hello"), "from the folder\n").unwrap();
    let config = dir.path().join("config.toml");
    write_private(&config, "[backends.here]\nkind = \"local\"\nsources = \"allocation\"\n");
    let output = Command::new(BRIDGE)
        .args(["exec", "--trace", "--backend", "here", "--config"])
        .arg(&config)
        .arg("--work-dir")
        .arg(dir.path().join("work"))
        .env("HOME", dir.path().join("home"))
        .env("TMPDIR", dir.path().join("tmp"))
        .current_dir(&project)
        .output()
        .unwrap();
    let (out, err) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{out}\n{err}");
    assert!(out.contains("from the folder"), "{out}");
    assert!(err.contains("`sources = \"allocation\"` has no effect here"), "{err}");
    assert!(!out.contains("fetches its sources itself"), "{out}");
}
