//! Submodules over HTTP, wanted and unwanted.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::time::Duration;

use super::served_tests::{PROJECT, Served, found_below};
use super::tests::git;
use super::*;

const NORMAL: (&str, &str) = ("GIT_SUBMODULE_STRATEGY", "normal");
const RECURSIVE: (&str, &str) = ("GIT_SUBMODULE_STRATEGY", "recursive");
const FETCH: (&str, &str) = ("GIT_STRATEGY", "fetch");

/// Writes a submodule into `.gitmodules` and the index, without asking anybody.
fn add(dir: &Utf8Path, name: &str, path: &str, url: &str, sha: &str) {
    let before = fs::read_to_string(dir.join(".gitmodules")).unwrap_or_default();
    let text = format!("{before}[submodule \"{name}\"]\n\tpath = {path}\n\turl = {url}\n");
    fs::write(dir.join(".gitmodules"), text).unwrap();
    git(dir, &["update-index", "--add", "--cacheinfo", &format!("160000,{sha},{path}")]);
    // What is committed is the index; an empty folder keeps `add --all` from removing the entry.
    fs::create_dir_all(dir.join(path)).unwrap();
}

/// `tracker` has `geometry` at `lib/geometry`, which has `field` at `field`; all of one server.
pub(super) async fn nested(served: &Served) {
    let field = served.repository("field");
    let sha = served.publish("hep/field", &field).await;
    let geometry = served.repository("geometry");
    add(&geometry, "the field", "field", "../field.git", &sha);
    let sha = served.publish("hep/geometry", &geometry).await;
    served.gitlab.open_repository("hep/field");
    served.gitlab.open_repository("hep/geometry");
    let tracker = served.repository("tracker");
    add(&tracker, "lib/geometry", "lib/geometry", "../geometry.git", &sha);
    served.publish(PROJECT, &tracker).await;
}

/// Changes `geometry` and lets `tracker` point to the change.
async fn change(served: &Served, content: &str) {
    let geometry = served.repository("geometry");
    fs::write(geometry.join("file"), content).unwrap();
    let sha = served.publish("hep/geometry", &geometry).await;
    let tracker = served.repository("tracker");
    git(&tracker, &["update-index", "--cacheinfo", &format!("160000,{sha},lib/geometry")]);
    served.publish(PROJECT, &tracker).await;
}

fn name(plan: &Plan, path: &str) -> Option<String> {
    fs::read_to_string(plan.project_dir.join(path).join("name")).ok()
}

#[tokio::test]
async fn submodules_of_the_same_server_are_read_with_the_jobs_token() {
    let served = Served::new().await;
    nested(&served).await;
    let (plan, said) = served.got(&served.job(&[]).await).await;
    assert_eq!(name(&plan, "lib/geometry"), None);
    assert!(said.all().contains("Skipping Git submodules setup"), "{}", said.all());

    let payload = served.job(&[NORMAL, FETCH]).await;
    let (plan, said) = served.got(&payload).await;
    assert_eq!(name(&plan, "lib/geometry").as_deref(), Some("geometry"), "{}", said.all());
    assert_eq!(name(&plan, "lib/geometry/field"), None);
    assert_eq!(found_below(&plan.project_dir, payload.token.expose()), [""; 0]);

    let payload = served.job(&[RECURSIVE, FETCH]).await;
    let (plan, said) = served.got(&payload).await;
    assert_eq!(name(&plan, "lib/geometry/field").as_deref(), Some("field"), "{}", said.all());
    assert!(said.all().contains("Updating submodules recursively"), "{}", said.all());
    assert_eq!(found_below(&plan.project_dir, payload.token.expose()), [""; 0]);
    assert_eq!(git(&plan.project_dir, &["status", "--porcelain"]), "");
}

#[tokio::test]
async fn what_an_earlier_job_left_in_submodules_is_brought_up_to_date() {
    let served = Served::new().await;
    nested(&served).await;
    let (plan, _) = served.got(&served.job(&[RECURSIVE, FETCH]).await).await;
    let sub = plan.project_dir.join("lib/geometry");
    fs::write(sub.join("name"), "changed by a job").unwrap();
    fs::write(sub.join("field/untracked"), "").unwrap();
    let modules = plan.project_dir.join(".git/modules/lib/geometry");
    fs::write(modules.join("index.lock"), "").unwrap();
    fs::write(modules.join("modules/the field/HEAD.lock"), "").unwrap();
    change(&served, "new").await;
    let (plan, said) = served.got(&served.job(&[RECURSIVE, FETCH]).await).await;
    assert_eq!(name(&plan, "lib/geometry").as_deref(), Some("geometry"), "{}", said.all());
    assert_eq!(fs::read_to_string(sub.join("file")).unwrap(), "new");
    assert!(!sub.join("field/untracked").exists());
    assert!(!said.all().contains("afresh"), "{}", said.all());

    // Beyond repair: started afresh, once, and the project's own repository is kept.
    fs::remove_dir_all(modules.join("objects")).unwrap();
    fs::create_dir(modules.join("objects")).unwrap();
    fs::write(plan.project_dir.join(".git/marker"), "").unwrap();
    let (plan, said) = served.got(&served.job(&[RECURSIVE, FETCH]).await).await;
    assert_eq!(name(&plan, "lib/geometry/field").as_deref(), Some("field"));
    assert!(plan.project_dir.join(".git/marker").exists(), "{}", said.all());
    git(&sub, &["fsck"]);
}

#[tokio::test]
async fn a_submodule_that_was_gone_for_a_while_comes_back_without_ado() {
    let served = Served::new().await;
    nested(&served).await;
    served.got(&served.job(&[RECURSIVE, FETCH]).await).await;
    let tracker = served.repository("tracker");
    let entry = git(&tracker, &["rev-parse", ":lib/geometry"]);
    git(&tracker, &["rm", "--cached", "--quiet", "lib/geometry"]);
    fs::remove_dir(tracker.join("lib/geometry")).unwrap();
    served.publish(PROJECT, &tracker).await;
    let (plan, _) = served.got(&served.job(&[RECURSIVE, FETCH]).await).await;
    assert!(!plan.project_dir.join("lib/geometry").exists());
    fs::create_dir(tracker.join("lib/geometry")).unwrap();
    git(
        &tracker,
        &["update-index", "--add", "--cacheinfo", &format!("160000,{entry},lib/geometry")],
    );
    served.publish(PROJECT, &tracker).await;
    change(&served, "newer").await;
    let (plan, said) = served.got(&served.job(&[RECURSIVE, FETCH]).await).await;
    assert_eq!(name(&plan, "lib/geometry/field").as_deref(), Some("field"));
    assert!(!said.all().contains("once more"), "{}", said.all());
}

#[tokio::test]
async fn a_checkout_is_cleaned_after_the_job_with_its_submodules() {
    let served = Served::new().await;
    nested(&served).await;
    let cleanup = [RECURSIVE, FETCH, ("FF_ENABLE_JOB_CLEANUP", "true")];
    let (plan, _) = served.got(&served.job(&cleanup).await).await;
    let sub = plan.project_dir.join("lib/geometry");
    fs::write(sub.join("name"), "changed").unwrap();
    fs::write(sub.join("field/new"), "").unwrap();
    let trap = served.root.join("trap");
    git(&sub.join("field"), &["config", "core.fsmonitor", &format!("touch {trap}")]);
    release(&plan.project_dir).await.unwrap();
    assert_eq!(name(&plan, "lib/geometry").as_deref(), Some("geometry"));
    assert!(!sub.join("field/new").exists() && !trap.exists());
}

#[tokio::test]
async fn an_earlier_jobs_traps_in_submodules_are_not_sprung() {
    let served = Served::new().await;
    nested(&served).await;
    let trap = served.root.join("trap");
    let run = format!("touch {trap}");
    for kind in ["config", "folder", "elsewhere", "link", "linked repository"] {
        let (plan, _) = served.got(&served.job(&[RECURSIVE, FETCH]).await).await;
        let sub = plan.project_dir.join("lib/geometry");
        let modules = plan.project_dir.join(".git/modules/lib/geometry");
        let arm = |git_dir: &Utf8Path| {
            fs::create_dir_all(git_dir.join("hooks")).unwrap();
            fs::create_dir_all(git_dir.join("info")).unwrap();
            let config = format!(
                "[core]\n\tfsmonitor = {run}\n\tsshCommand = {run}\n[filter \"x\"]\n\tsmudge = {run}\n\
                 \tclean = {run}\n[remote \"origin\"]\n\turl = ../geometry.git\n\tuploadpack = {run}\n"
            );
            fs::write(git_dir.join("config"), config).unwrap();
            fs::write(git_dir.join("info/attributes"), "* filter=x\n").unwrap();
            let hook = git_dir.join("hooks/post-checkout");
            fs::write(&hook, format!("#!/bin/sh\n{run}\n")).unwrap();
            fs::set_permissions(&hook, fs::Permissions::from_mode(0o755)).unwrap();
        };
        let planted = served.root.join(format!("planted-{kind}"));
        match kind {
            "config" => {
                arm(&modules);
                arm(&modules.join("modules/the field"));
            }
            "folder" => {
                fs::remove_file(sub.join(".git")).unwrap();
                git(&sub, &["init", "--quiet"]);
                arm(&sub.join(".git"));
            }
            "elsewhere" => {
                fs::create_dir(&planted).unwrap();
                git(&planted, &["init", "--quiet"]);
                arm(&planted.join(".git"));
                fs::write(sub.join(".git"), format!("gitdir: {planted}/.git\n")).unwrap();
            }
            "link" => {
                fs::create_dir(&planted).unwrap();
                git(&planted, &["init", "--quiet"]);
                arm(&planted.join(".git"));
                fs::remove_dir_all(&sub).unwrap();
                symlink(&planted, &sub).unwrap();
            }
            _ => {
                fs::create_dir(&planted).unwrap();
                git(&planted, &["init", "--quiet"]);
                arm(&planted.join(".git"));
                fs::remove_dir_all(&modules).unwrap();
                symlink(planted.join(".git"), &modules).unwrap();
            }
        }
        change(&served, kind).await;
        let (plan, said) = served.got(&served.job(&[RECURSIVE, FETCH]).await).await;
        assert!(!trap.exists(), "{kind}: {}", said.all());
        assert_eq!(fs::read_to_string(sub.join("file")).unwrap(), kind, "{}", said.all());
        assert_eq!(name(&plan, "lib/geometry/field").as_deref(), Some("field"), "{kind}");
        assert!(!modules.join("hooks/post-checkout").exists());
        if planted.exists() {
            assert!(!planted.join("name").exists() && !planted.join(".git/index").exists());
        }
    }
}

#[tokio::test]
async fn submodules_that_lead_to_this_machine_are_refused_in_gits_own_words() {
    let secret = "1".repeat(40);
    let here = Served::new().await;
    let there = here.repository("field");
    here.publish("hep/field", &there).await;
    for (name, path, url, words) in [
        ("a", "sub", "file:///etc", "fatal: transport 'file' not allowed"),
        ("a", "sub", there.as_str(), "fatal: transport 'file' not allowed"),
        ("a", "sub", "ext::sh -c touch% trap", "fatal: transport 'ext' not allowed"),
        ("a", "sub", "--upload-pack=touch", "may be interpreted as a command-line option"),
        ("a", "-u./touch", "https://h/x.git", "may be interpreted as a command-line option"),
        ("../../trap", "sub", "https://h/x.git", "ignoring suspicious submodule name: ../../trap"),
    ] {
        let served = Served::new().await;
        let tracker = served.repository("tracker");
        add(&tracker, name, path, url, &secret);
        served.publish(PROJECT, &tracker).await;
        let (plan, result, said) = served.get(&served.job(&[NORMAL]).await).await;
        let Err(StageError::Failed { stage: "get_sources", .. }) = result else {
            panic!("{url}: {result:?}: {}", said.all());
        };
        assert!(said.text().contains(words), "{url}: {}", said.all());
        assert!(!plan.project_dir.join("trap").exists());
    }
}

#[tokio::test]
async fn a_submodule_whose_host_hangs_is_ended_in_time() {
    let mut served = Served::new().await;
    served.runner.get_sources_timeout = Some(Duration::from_secs(3));
    // Takes connections, as the kernel does for it, and says nothing.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/x.git", silent.local_addr().unwrap());
    let tracker = served.repository("tracker");
    add(&tracker, "a", "sub", &url, &"1".repeat(40));
    served.publish(PROJECT, &tracker).await;
    let (_, result, said) = served.get(&served.job(&[NORMAL]).await).await;
    let error = result.unwrap_err();
    assert_eq!(error, StageError::TimedOut { stage: "get_sources" }, "{}", said.all());
    assert_eq!(error.to_string(), "get_sources took longer than it may");
}

#[tokio::test]
async fn a_submodule_behind_another_token_fails_after_a_second_try() {
    let served = Served::new().await;
    nested(&served).await;
    served.commit("one").await;
    let private = served.repository("private");
    let sha = served.publish("hep/private", &private).await;
    let tracker = served.repository("tracker");
    add(&tracker, "private", "private", "../private.git", &sha);
    served.publish(PROJECT, &tracker).await;
    let (_, result, said) = served.get(&served.job(&[NORMAL]).await).await;
    assert!(matches!(result, Err(StageError::Failed { .. })), "{result:?}");
    let again = "updating the submodules failed; trying once more".to_owned();
    assert!(said.remarks.contains(&again), "{}", said.all());
    assert!(said.text().contains("403"), "{}", said.all());
}

#[tokio::test]
async fn ssh_addresses_become_http_where_the_job_wants_it() {
    for url in [
        "git@git.example.org:hep/geometry.git",
        "ssh://git@git.example.org/hep/geometry.git",
        "ssh://git@git.example.org:2222/hep/geometry.git",
    ] {
        let served = Served::new().await;
        nested(&served).await;
        let sha = git(&served.repository("geometry"), &["rev-parse", "HEAD"]);
        let tracker = served.repository("tracker");
        fs::remove_file(tracker.join(".gitmodules")).unwrap();
        add(&tracker, "lib/geometry", "lib/geometry", url, &sha);
        served.publish(PROJECT, &tracker).await;
        let ssh = [
            NORMAL,
            ("CI_SERVER_SHELL_SSH_HOST", "git.example.org"),
            ("CI_SERVER_SHELL_SSH_PORT", "2222"),
        ];
        let mut forced = ssh.to_vec();
        forced.push(("GIT_SUBMODULE_FORCE_HTTPS", "true"));
        let (plan, said) = served.got(&served.job(&forced).await).await;
        assert_eq!(name(&plan, "lib/geometry").as_deref(), Some("geometry"), "{}", said.all());
    }
}

#[tokio::test]
async fn paths_depth_and_flags_are_obeyed() {
    let served = Served::new().await;
    nested(&served).await;
    change(&served, "two").await;
    change(&served, "three").await;
    let field = git(&served.repository("field"), &["rev-parse", "HEAD"]);
    let tracker = served.repository("tracker");
    add(&tracker, "other", "other", "../field.git", &field);
    served.publish(PROJECT, &tracker).await;

    let clone = ("GIT_STRATEGY", "clone");
    let only = [NORMAL, ("GIT_SUBMODULE_PATHS", "other")];
    let (plan, said) = served.got(&served.job(&only).await).await;
    assert_eq!(name(&plan, "other").as_deref(), Some("field"), "{}", said.all());
    assert_eq!(name(&plan, "lib/geometry"), None);
    let without = [NORMAL, clone, ("GIT_SUBMODULE_PATHS", ":(exclude)other")];
    let (plan, _) = served.got(&served.job(&without).await).await;
    assert_eq!(name(&plan, "other"), None);
    assert_eq!(name(&plan, "lib/geometry").as_deref(), Some("geometry"));

    for (depth, commits) in [("1", "1"), ("2", "2")] {
        let deep = [NORMAL, clone, ("GIT_SUBMODULE_DEPTH", depth)];
        let (plan, said) = served.got(&served.job(&deep).await).await;
        let sub = plan.project_dir.join("lib/geometry");
        assert_eq!(git(&sub, &["rev-list", "--count", "HEAD"]), commits, "{}", said.all());
    }

    // The project still points to an older commit than the branch has.
    let geometry = served.repository("geometry");
    fs::write(geometry.join("file"), "four").unwrap();
    let newest = served.publish("hep/geometry", &geometry).await;
    let remote = [NORMAL, ("GIT_SUBMODULE_UPDATE_FLAGS", "--remote --jobs 2")];
    let (plan, said) = served.got(&served.job(&remote).await).await;
    let sub = plan.project_dir.join("lib/geometry");
    assert_eq!(git(&sub, &["rev-parse", "HEAD"]), newest, "{}", said.all());
}

#[tokio::test]
async fn what_cannot_be_meant_is_said_before_anything_is_done() {
    let served = Served::new().await;
    served.commit("one").await;
    for (variables, words) in [
        (
            vec![("GIT_SUBMODULE_STRATEGY", "all")],
            "unknown GIT_SUBMODULE_STRATEGY: expected none, normal or recursive, got \"all\"",
        ),
        (
            vec![NORMAL, ("GIT_SUBMODULE_UPDATE_FLAGS", "--reference=/etc")],
            "GIT_SUBMODULE_UPDATE_FLAGS: \"--reference=/etc\" is not allowed",
        ),
        (
            vec![NORMAL, ("GIT_SUBMODULE_PATHS", ":(exclude) a")],
            "GIT_SUBMODULE_PATHS: \":(exclude)\" needs a path right behind it: \":(exclude) a\"",
        ),
        (
            vec![("GIT_FETCH_EXTRA_FLAGS", "--recurse-submodules")],
            "GIT_FETCH_EXTRA_FLAGS: \"--recurse-submodules\" is not allowed",
        ),
    ] {
        let (plan, result, said) = served.get(&served.job(&variables).await).await;
        assert_eq!(result, Err(StageError::Misconfigured { detail: words.into() }));
        assert!(!plan.project_dir.exists() && said.all().trim().is_empty());
    }
    let none = [("GIT_STRATEGY", "none"), ("GIT_SUBMODULE_STRATEGY", "all")];
    served.got(&served.job(&none).await).await;
}
