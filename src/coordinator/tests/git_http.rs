//! git over HTTP.

use std::path::Path;
use std::process::Stdio;

use super::*;
use crate::coordinator::Git;

async fn git(dir: &Path, args: &[&str]) -> Result<String, String> {
    let output = tokio::process::Command::new("git")
        .arg("-C")
        .arg(dir)
        .args(args)
        .env("GIT_TERMINAL_PROMPT", "0")
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env("GIT_AUTHOR_NAME", "Ada")
        .env("GIT_AUTHOR_EMAIL", "ada@example.org")
        .env("GIT_COMMITTER_NAME", "Ada")
        .env("GIT_COMMITTER_EMAIL", "ada@example.org")
        .stdin(Stdio::null())
        .output()
        .await
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
}

/// A repository with two commits on `main` and one tag.
async fn repository() -> (tempfile::TempDir, String) {
    let dir = tempfile::tempdir().unwrap();
    git(dir.path(), &["init", "-q", "-b", "main"]).await.unwrap();
    for (at, content) in ["one", "two"].iter().enumerate() {
        std::fs::write(dir.path().join("file"), content).unwrap();
        git(dir.path(), &["add", "."]).await.unwrap();
        git(dir.path(), &["commit", "-q", "-m", content]).await.unwrap();
        git(dir.path(), &["tag", &format!("v{at}")]).await.unwrap();
    }
    let sha = git(dir.path(), &["rev-parse", "HEAD"]).await.unwrap();
    (dir, sha)
}

async fn fetch(job: &Job, into: &Path) -> Result<String, String> {
    let url = job.payload["git_info"]["repo_url"].as_str().unwrap();
    let depth = format!("--depth={}", job.payload["git_info"]["depth"]);
    let mut args = vec!["fetch", "-q", url];
    if depth != "--depth=0" {
        args.insert(2, &depth);
    }
    let refspecs = job.payload["git_info"]["refspecs"].as_array().unwrap();
    args.extend(refspecs.iter().map(|refspec| refspec.as_str().unwrap()));
    git(into, &args).await
}

#[tokio::test]
async fn a_job_fetches_its_commit_and_nothing_after_its_end() {
    let (source, sha) = repository().await;
    let bed = Bed::new().await;
    bed.gitlab.serve_repository("hep/tracker", source.path()).await.unwrap();
    let job = bed.take(NewJob::new("build")).await;
    assert_eq!(job.payload["git_info"]["sha"], json!(sha));
    assert_eq!(job.payload["git_info"]["ref"], "main");
    let into = tempfile::tempdir().unwrap();
    git(into.path(), &["init", "-q"]).await.unwrap();
    fetch(&job, into.path()).await.unwrap();
    git(into.path(), &["checkout", "-q", &sha]).await.unwrap();
    assert_eq!(std::fs::read_to_string(into.path().join("file")).unwrap(), "two");
    let refs = git(into.path(), &["for-each-ref", "--format=%(refname)"]).await.unwrap();
    assert!(refs.contains("refs/pipelines/903"), "{refs}");
    assert!(refs.contains("refs/remotes/origin/main"), "{refs}");
    // Nothing was written into the served one.
    let refs = git(source.path(), &["for-each-ref", "--format=%(refname)"]).await.unwrap();
    assert!(!refs.contains("pipelines"), "{refs}");

    bed.succeed(&job, "").await;
    let error = fetch(&job, into.path()).await.unwrap_err();
    assert!(error.contains("403"), "{error}");
}

#[tokio::test]
async fn a_job_may_be_at_an_older_commit_without_history_limit() {
    let (source, _) = repository().await;
    let sha = git(source.path(), &["rev-parse", "v0"]).await.unwrap();
    let bed = Bed::new().await;
    bed.gitlab.serve_repository("hep/tracker", source.path()).await.unwrap();
    let wish = Git { sha: Some(sha.clone()), depth: 0, ..Git::default() };
    let job = bed.take(NewJob::new("build").git(wish)).await;
    let into = tempfile::tempdir().unwrap();
    git(into.path(), &["init", "-q"]).await.unwrap();
    fetch(&job, into.path()).await.unwrap();
    assert_eq!(git(into.path(), &["rev-parse", "refs/pipelines/903"]).await.unwrap(), sha);
    assert_eq!(git(into.path(), &["tag"]).await.unwrap(), "v0\nv1");
}

#[tokio::test]
async fn only_the_token_of_a_running_job_of_the_project_opens_a_repository() {
    let (source, _) = repository().await;
    let bed = Bed::new().await;
    bed.gitlab.serve_repository("hep/tracker", source.path()).await.unwrap();
    let job = bed.take(NewJob::new("build")).await;
    let other = bed.take(NewJob::new("build").project("hep/other", 78)).await;
    let url = format!("{}/hep/tracker.git/info/refs?service=git-upload-pack", bed.gitlab.url());
    let get = |password: &str| bed.http.get(&url).basic_auth("gitlab-ci-token", Some(password));
    let open = bed.http.get(&url).send().await.unwrap();
    assert_eq!(open.status(), 401);
    assert!(header(&open, "www-authenticate").unwrap().starts_with("Basic"));
    assert_eq!(get("wrong").send().await.unwrap().status(), 401);
    assert_eq!(get(&other.token).send().await.unwrap().status(), 403);
    assert_eq!(get(&job.token).send().await.unwrap().status(), 200);
    let push = url.replace("upload", "receive");
    let push = bed.http.get(push).basic_auth("gitlab-ci-token", Some(&job.token));
    assert_eq!(push.send().await.unwrap().status(), 403);
    bed.gitlab.force_cancel(job.id);
    assert_eq!(get(&job.token).send().await.unwrap().status(), 403);
}

#[tokio::test]
async fn what_is_no_repository_is_not_served() {
    let bed = Bed::new().await;
    let empty = tempfile::tempdir().unwrap();
    let error = bed.gitlab.serve_repository("hep/tracker", empty.path()).await.unwrap_err();
    assert!(error.to_string().contains("not a git repository"), "{error}");
}
