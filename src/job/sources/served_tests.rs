//! A GitLab that serves repositories, for tests of what goes over the wire.

use std::fs;
use std::time::Duration;

use camino::Utf8PathBuf;

use super::tests::{Said, git};
use super::*;
use crate::coordinator::{Coordinator, Git as Source, GitTraffic, NewJob, Options, RunnerOptions};

use crate::gitlab::{Client, ClientOptions, Info, InfoOptions, RequestReply};
use crate::job::tests::runner;
use crate::job::{Mirrors, Slot, plan};

pub(super) const PROJECT: &str = "hep/tracker";

pub(super) struct Served {
    _dir: tempfile::TempDir,
    pub(super) root: Utf8PathBuf,
    pub(super) gitlab: Coordinator,
    token: String,
    pub(super) runner: RunnerContext,
}

impl Served {
    pub(super) async fn new() -> Self {
        drop(rustls::crypto::ring::default_provider().install_default());
        let dir = tempfile::tempdir().unwrap();
        let root = Utf8PathBuf::from_path_buf(dir.path().canonicalize().unwrap()).unwrap();
        let gitlab = Coordinator::start(Options::default()).await.unwrap();
        let token = gitlab.add_runner(RunnerOptions::default());
        let mut runner = runner();
        runner.url = gitlab.url().parse().unwrap();
        runner.builds_dir = root.join("builds");
        Self { _dir: dir, root, gitlab, token, runner }
    }

    pub(super) fn with_mirrors(mut self) -> Self {
        let keep = Duration::from_secs(3600);
        self.runner.mirrors = Some(Mirrors { dir: self.root.join("mirrors"), keep });
        self
    }

    pub(super) fn mirror(&self) -> Utf8PathBuf {
        let host = self.runner.url.host_str().unwrap();
        let port = self.runner.url.port().unwrap();
        self.root.join(format!("mirrors/{host}_{port}/{PROJECT}.git"))
    }

    /// Gives a folder with a repository, made if need be.
    pub(super) fn repository(&self, name: &str) -> Utf8PathBuf {
        let dir = self.root.join("origins").join(name);
        if !dir.exists() {
            fs::create_dir_all(&dir).unwrap();
            git(&dir, &["init", "--quiet"]);
            fs::write(dir.join("name"), name).unwrap();
        }
        dir
    }

    /// Commits everything and serves it under the project's path.
    pub(super) async fn publish(&self, project: &str, dir: &Utf8Path) -> String {
        git(dir, &["add", "--all", "."]);
        git(dir, &["commit", "--quiet", "--allow-empty", "-m", "more"]);
        self.gitlab.serve_repository(project, dir.as_std_path()).await.unwrap();
        git(dir, &["rev-parse", "HEAD"])
    }

    /// A project with one file, and a change of it.
    pub(super) async fn commit(&self, content: &str) -> String {
        let dir = self.repository("tracker");
        fs::write(dir.join("file"), content).unwrap();
        self.publish(PROJECT, &dir).await
    }

    pub(super) async fn take(&self, job: NewJob) -> JobPayload {
        self.gitlab.enqueue(job);
        let client = Client::new(ClientOptions::new(self.runner.url.clone())).unwrap();
        let info = Info::new(InfoOptions { name: "bridge".into(), ..InfoOptions::default() });
        let token = Secret::new(self.token.as_str());
        let reply = client.request_job(&token, "s_0123456789ab", &info, None).await.unwrap();
        let RequestReply::Job(job) = reply else { panic!("no job: {reply:?}") };
        job.payload
    }

    pub(super) async fn job(&self, variables: &[(&str, &str)]) -> JobPayload {
        let mut job = NewJob::new("build").project(PROJECT, 77);
        for (key, value) in variables {
            job = job.env(*key, *value);
        }
        self.take(job).await
    }

    pub(super) async fn job_of_depth(&self, depth: u32, variables: &[(&str, &str)]) -> JobPayload {
        let mut job = NewJob::new("build").project(PROJECT, 77);
        job = job.git(Source { depth, ..Source::default() });
        for (key, value) in variables {
            job = job.env(*key, *value);
        }
        self.take(job).await
    }

    pub(super) fn plan_in(&self, payload: &JobPayload, slot: u32) -> Plan {
        plan(payload, &self.runner, Slot { concurrent: slot, project: slot }).unwrap()
    }

    pub(super) async fn get(&self, payload: &JobPayload) -> (Plan, Stage, Said) {
        self.get_in(payload, 0).await
    }

    pub(super) async fn get_in(&self, payload: &JobPayload, slot: u32) -> (Plan, Stage, Said) {
        let plan = self.plan_in(payload, slot);
        let mut said = Said::default();
        let result = plan.get_sources(&mut said).await;
        (plan, result, said)
    }

    pub(super) async fn got(&self, payload: &JobPayload) -> (Plan, Said) {
        self.got_in(payload, 0).await
    }

    pub(super) async fn got_in(&self, payload: &JobPayload, slot: u32) -> (Plan, Said) {
        let (plan, result, said) = self.get_in(payload, slot).await;
        assert_eq!(result, Ok(()), "{}", said.all());
        (plan, said)
    }

    pub(super) fn traffic(&self) -> GitTraffic {
        self.gitlab.git_traffic(PROJECT)
    }
}

/// Looks for a text in every file below.
pub(super) fn found_below(dir: &Utf8Path, text: &str) -> Vec<Utf8PathBuf> {
    let mut found = Vec::new();
    let mut todo = vec![dir.to_owned()];
    while let Some(dir) = todo.pop() {
        for entry in dir.read_dir_utf8().unwrap() {
            let path = entry.unwrap().into_path();
            if path.symlink_metadata().unwrap().is_dir() {
                todo.push(path);
            } else if fs::read(&path)
                .unwrap_or_default()
                .windows(text.len())
                .any(|w| w == text.as_bytes())
            {
                found.push(path);
            }
        }
    }
    found
}

#[tokio::test]
async fn an_up_to_date_checkout_costs_three_processes() {
    let served = Served::new().await;
    served.commit("one").await;
    let (plan, _) = served.got(&served.job(&[]).await).await;
    assert!(plan.git_started() > 3, "a new one costs more: {}", plan.git_started());
    let (plan, said) = served.got(&served.job(&[("GIT_STRATEGY", "fetch")]).await).await;
    assert_eq!(plan.git_started(), 3, "{}", said.all());
    // Also where there are submodules to look for, and attributes.
    let dir = served.repository("tracker");
    fs::write(dir.join(".gitattributes"), "*.txt text\n").unwrap();
    served.commit("two").await;
    let fetch = [("GIT_STRATEGY", "fetch"), ("GIT_SUBMODULE_STRATEGY", "recursive")];
    served.got(&served.job(&fetch).await).await;
    let (plan, said) = served.got(&served.job(&fetch).await).await;
    assert_eq!(plan.git_started(), 3, "{}", said.all());
}

#[tokio::test]
async fn merge_requests_are_fetched_by_the_refs_that_gitlab_names() {
    for mirrors in [false, true] {
        let mut served = Served::new().await;
        if mirrors {
            served = served.with_mirrors();
        }
        served.commit("one").await;
        let dir = served.repository("tracker");
        git(&dir, &["checkout", "--quiet", "-b", "feature"]);
        let sha = served.commit("two").await;
        git(&dir, &["update-ref", "refs/merge-requests/5/head", &sha]);
        let source = Source {
            sha: Some(sha.clone()),
            reference: Some("refs/merge-requests/5/head".into()),
            refspecs: Some(vec![
                "+refs/pipelines/903:refs/pipelines/903".into(),
                "+refs/heads/feature:refs/remotes/origin/feature".into(),
            ]),
            ..Source::default()
        };
        let job = NewJob::new("build").project(PROJECT, 77).git(source);
        let (plan, said) = served.got(&served.take(job).await).await;
        assert_eq!(git(&plan.project_dir, &["rev-parse", "HEAD"]), sha);
        let kept = git(&plan.project_dir, &["for-each-ref", "--format=%(refname)"]);
        assert_eq!(kept, "refs/pipelines/903\nrefs/remotes/origin/feature");
        assert!(said.all().contains("ref is refs/merge-requests/5/head"), "{}", said.all());
    }
}

#[tokio::test]
async fn large_files_are_fetched_unless_the_job_wants_pointers() {
    let served = Served::new().await;
    let dir = served.repository("tracker");
    git(&dir, &["lfs", "install", "--local"]);
    git(&dir, &["lfs", "track", "*.root"]);
    fs::create_dir_all(dir.join("data")).unwrap();
    fs::write(dir.join("data/run.root"), "events\n".repeat(1000)).unwrap();
    served.commit("one").await;
    let large = |plan: &Plan| fs::read_to_string(plan.project_dir.join("data/run.root")).unwrap();

    let (plan, said) = served.got(&served.job(&[("GIT_LFS_SKIP_SMUDGE", "true")]).await).await;
    assert!(large(&plan).starts_with("version https://git-lfs"), "{}", large(&plan));
    assert!(!said.all().contains("LFS"), "{}", said.all());

    let payload = served.job(&[("GIT_STRATEGY", "fetch")]).await;
    let (plan, said) = served.got(&payload).await;
    assert_eq!(large(&plan).len(), 7000, "{}", said.all());
    assert!(said.remarks.contains(&"Fetching files in Git LFS...".to_owned()), "{}", said.all());
    assert_eq!(git(&plan.project_dir, &["status", "--porcelain"]), "");
    assert_eq!(found_below(&plan.project_dir, payload.token.expose()), [""; 0]);

    // Another job's checkout is brought up to date.
    fs::write(dir.join("data/run.root"), "more\n").unwrap();
    served.commit("two").await;
    let (plan, _) = served.got(&served.job(&[("GIT_STRATEGY", "fetch")]).await).await;
    assert_eq!(large(&plan), "more\n");

    fs::write(dir.join(".lfsconfig"), "[lfs]\n\turl = file:///etc\n").unwrap();
    served.commit("three").await;
    let (_, result, _) = served.get(&served.job(&[]).await).await;
    let detail = ".lfsconfig names a file: URL, from which no large files are fetched".to_owned();
    assert_eq!(result, Err(StageError::Misconfigured { detail }));
}

#[tokio::test]
async fn git_clones_by_itself_where_it_can_and_the_commit_is_there() {
    let served = Served::new().await;
    let older = served.commit("one").await;
    served.commit("two").await;
    let source = Source { sha: Some(older.clone()), depth: 1, ..Source::default() };
    let job = NewJob::new("build").project(PROJECT, 77).git(source);
    let payload = served.take(job.env("GIT_CLONE_EXTRA_FLAGS", "--no-tags")).await;
    let plan = served.plan_in(&payload, 0);
    fs::create_dir_all(&plan.temp_dir).unwrap();
    let mut said = Said::default();
    let repository = plan.repository.as_ref().unwrap();
    let git_now = plan.git(repository, GET_SOURCES);
    plan.clone_natively(repository, &git_now, &mut said).await.unwrap_or_else(|error| {
        panic!("{error}: {}", said.all());
    });
    assert_eq!(git(&plan.project_dir, &["rev-parse", "HEAD"]), older);
    assert!(said.remarks[0].starts_with("Cloning repository for "), "{}", said.all());
    assert!(said.remarks[0].ends_with(" with git depth set to 1..."), "{}", said.all());
    assert_eq!(found_below(&plan.project_dir, payload.token.expose()), [""; 0]);

    let flags = [("FF_USE_GIT_NATIVE_CLONE", "1"), ("GIT_CLONE_EXTRA_FLAGS", "-c core.pager=x")];
    let (_, result, _) = served.get(&served.job(&flags).await).await;
    let detail = "GIT_CLONE_EXTRA_FLAGS: \"-c\" is not allowed".to_owned();
    assert_eq!(result, Err(StageError::Misconfigured { detail }));
    // An older git fetches, as without the flag.
    served.got(&served.job(&flags[..1]).await).await;
}
