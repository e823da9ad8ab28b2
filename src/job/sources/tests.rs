//! Sources come from real repositories, by real git.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;
use std::time::Duration;

use camino::Utf8PathBuf;
use url::Url;

use super::super::tests::{payload, runner, variable};
use super::super::{Slot, plan};
use super::repository::site;
use super::*;
use crate::gitlab::wire::{Hook, Variable};

/// Keeps what was said.
#[derive(Default)]
pub(in super::super) struct Said {
    pub(in super::super) bytes: Vec<u8>,
    pub(in super::super) remarks: Vec<String>,
}

impl Said {
    pub(in super::super) fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes).into_owned()
    }

    pub(in super::super) fn all(&self) -> String {
        format!("{}\n{}", self.remarks.join("\n"), self.text())
    }
}

impl Output for Said {
    fn bytes(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }
    fn remark(&mut self, _tone: Tone, text: &str) {
        self.remarks.push(text.to_owned());
    }
}

/// A server's repository, and a place for checkouts.
pub(super) struct World {
    _dir: tempfile::TempDir,
    pub(super) root: Utf8PathBuf,
    pub(super) payload: JobPayload,
    pub(super) runner: RunnerContext,
}

pub(super) fn git(dir: &Utf8Path, args: &[&str]) -> String {
    let output = Command::new("git")
        .args(["-c", "user.name=t", "-c", "user.email=t@example.org"])
        .args(["-c", "commit.gpgsign=false", "-c", "init.defaultBranch=main"])
        .args(args)
        .current_dir(dir)
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .output()
        .unwrap();
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

impl World {
    pub(super) fn new() -> Self {
        Self::of_format("sha1")
    }

    fn of_format(format: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let root = Utf8PathBuf::from_path_buf(dir.path().canonicalize().unwrap()).unwrap();
        let origin = root.join("origin");
        fs::create_dir(&origin).unwrap();
        git(&origin, &["init", "--quiet", &format!("--object-format={format}")]);
        let mut payload = payload(&[]);
        payload.git_info.repo_url = Secret::new(format!("file://{origin}"));
        payload.git_info.repo_object_format = format.to_owned();
        payload.git_info.reference = "main".into();
        payload.git_info.refspecs = vec!["+refs/heads/main:refs/remotes/origin/main".into()];
        let mut runner = runner();
        runner.builds_dir = root.join("builds");
        let mut world = Self { _dir: dir, root, payload, runner };
        world.commit("one");
        world
    }

    pub(super) fn commit(&mut self, content: &str) {
        let origin = self.root.join("origin");
        fs::write(origin.join("file"), content).unwrap();
        git(&origin, &["add", "file"]);
        git(&origin, &["commit", "--quiet", "-m", content]);
        self.payload.git_info.sha = git(&origin, &["rev-parse", "HEAD"]);
    }

    pub(super) fn set(&mut self, key: &str, value: &str) {
        self.payload.variables.push(variable(key, value));
    }

    pub(super) fn plan(&self) -> Plan {
        plan(&self.payload, &self.runner, Slot::default()).unwrap()
    }

    pub(super) async fn get(&self) -> (Plan, Result<(), StageError>, Said) {
        let plan = self.plan();
        let mut said = Said::default();
        let result = plan.get_sources(&mut said).await;
        (plan, result, said)
    }

    pub(super) async fn got(&self) -> (Plan, Said) {
        let (plan, result, said) = self.get().await;
        assert_eq!(result, Ok(()), "{}", said.all());
        (plan, said)
    }
}

pub(super) fn content(plan: &Plan) -> String {
    fs::read_to_string(plan.project_dir.join("file")).unwrap()
}

#[tokio::test]
async fn a_clone_is_new_and_a_fetch_keeps_what_it_may() {
    let mut world = World::new();
    let (plan, said) = world.got().await;
    assert_eq!(content(&plan), "one");
    assert!(said.all().contains("Created fresh repository."), "{}", said.all());
    assert!(said.all().contains("as detached HEAD (ref is main)..."));
    assert_eq!(git(&plan.project_dir, &["rev-parse", "HEAD"]), world.payload.git_info.sha);
    fs::write(plan.project_dir.join("untracked"), "").unwrap();
    let inode = |plan: &Plan| {
        use std::os::unix::fs::MetadataExt as _;
        fs::metadata(plan.project_dir.join(".git/objects")).unwrap().ino()
    };
    let first = inode(&plan);

    world.commit("two");
    world.set("GIT_STRATEGY", "fetch");
    fs::write(plan.project_dir.join("file"), "changed by a job").unwrap();
    fs::write(plan.project_dir.join(".git/index.lock"), "").unwrap();
    fs::write(plan.project_dir.join(".git/refs/remotes/origin/main.lock"), "").unwrap();
    let (plan, said) = world.got().await;
    assert_eq!(content(&plan), "two");
    assert!(!plan.project_dir.join("untracked").exists());
    assert_eq!(inode(&plan), first, "the repository was kept");
    assert!(!said.all().contains("Created"), "{}", said.all());

    world.set("GIT_STRATEGY", "clone");
    fs::write(plan.project_dir.join(".git/marker"), "").unwrap();
    let (plan, _) = world.got().await;
    assert!(!plan.project_dir.join(".git/marker").exists());
}

#[tokio::test]
async fn clean_flags_and_checkout_are_obeyed() {
    let mut world = World::new();
    world.set("GIT_STRATEGY", "fetch");
    world.set("GIT_CLEAN_FLAGS", "-ffdx -e kept");
    let (plan, _) = world.got().await;
    for name in ["kept", "removed"] {
        fs::write(plan.project_dir.join(name), "").unwrap();
    }
    let (plan, _) = world.got().await;
    assert!(plan.project_dir.join("kept").exists() && !plan.project_dir.join("removed").exists());

    world.commit("two");
    world.set("GIT_CHECKOUT", "false");
    let (plan, said) = world.got().await;
    assert_eq!(content(&plan), "one");
    assert!(said.all().contains("Skipping Git checkout"));
    git(&plan.project_dir, &["cat-file", "-e", &world.payload.git_info.sha]);
}

#[tokio::test]
async fn none_and_empty_need_no_git() {
    let mut world = World::new();
    world.set("GIT_STRATEGY", "none");
    let (plan, said) = world.got().await;
    assert!(said.all().contains("Skipping Git repository setup"));
    fs::write(plan.project_dir.join("kept"), "").unwrap();
    let (plan, _) = world.got().await;
    assert!(plan.project_dir.join("kept").exists());
    assert!(!plan.project_dir.join(".git").exists());

    world.set("GIT_STRATEGY", "empty");
    let (plan, _) = world.got().await;
    assert!(plan.project_dir.as_str().ends_with("-empty"));
    fs::write(plan.project_dir.join("gone"), "").unwrap();
    let (plan, _) = world.got().await;
    assert_eq!(fs::read_dir(&plan.project_dir).unwrap().count(), 0);
}

#[tokio::test]
async fn depth_is_obeyed_and_undone() {
    let mut world = World::new();
    world.commit("two");
    world.commit("three");
    world.payload.git_info.depth = 1;
    world.set("GIT_STRATEGY", "fetch");
    let (plan, said) = world.got().await;
    assert_eq!(git(&plan.project_dir, &["rev-list", "--count", "HEAD"]), "1");
    assert!(said.all().contains("git depth set to 1"));
    world.payload.git_info.depth = 0;
    let (plan, _) = world.got().await;
    assert_eq!(git(&plan.project_dir, &["rev-list", "--count", "HEAD"]), "3");
}

#[tokio::test]
async fn a_filtered_checkout_can_be_fetched_into() {
    let mut world = World::new();
    git(&world.root.join("origin"), &["config", "uploadpack.allowFilter", "true"]);
    world.set("GIT_STRATEGY", "fetch");
    world.set("GIT_FETCH_EXTRA_FLAGS", "--quiet --filter=blob:none");
    world.commit("two");
    let (plan, _) = world.got().await;
    let missing = ["rev-list", "--objects", "--missing=print", "HEAD~1"];
    let missing = git(&plan.project_dir, &missing);
    assert!(missing.lines().any(|line| line.starts_with('?')), "nothing was left out: {missing}");
    world.commit("three");
    let (plan, said) = world.got().await;
    assert_eq!(content(&plan), "three");
    assert!(!said.all().contains("Created"), "{}", said.all());
}

#[tokio::test]
async fn sha256_repositories_are_cloned_and_fetched() {
    let mut world = World::of_format("sha256");
    world.set("GIT_STRATEGY", "fetch");
    let (plan, _) = world.got().await;
    assert_eq!(content(&plan), "one");
    world.commit("two");
    let (plan, said) = world.got().await;
    assert_eq!(content(&plan), "two");
    assert!(!said.all().contains("Created"));
}

#[tokio::test]
async fn a_broken_checkout_is_replaced() {
    let mut world = World::new();
    world.set("GIT_STRATEGY", "fetch");
    let (plan, _) = world.got().await;
    world.commit("two");
    for breaking in ["objects", "HEAD", "index", "directory", "file"] {
        let git_dir = plan.project_dir.join(".git");
        match breaking {
            "objects" => {
                fs::remove_dir_all(git_dir.join("objects")).unwrap();
                fs::create_dir(git_dir.join("objects")).unwrap();
            }
            "directory" => fs::remove_dir_all(&plan.project_dir).unwrap(),
            "file" => {
                fs::remove_dir_all(&git_dir).unwrap();
                fs::write(&git_dir, "gitdir: /elsewhere\n").unwrap();
            }
            name => fs::write(git_dir.join(name), "rubbish").unwrap(),
        }
        let (plan, _) = world.got().await;
        assert_eq!(content(&plan), "two", "{breaking}");
        git(&plan.project_dir, &["fsck"]);
    }
}

#[tokio::test]
async fn a_checkout_is_kept_when_the_server_is_away() {
    let mut world = World::new();
    world.set("GIT_STRATEGY", "fetch");
    let (plan, _) = world.got().await;
    let away = world.root.join("away");
    fs::rename(world.root.join("origin"), &away).unwrap();
    let (_, result, said) = world.get().await;
    assert!(
        matches!(result, Err(StageError::Failed { stage: "get_sources", exit_code: 128 })),
        "{result:?}"
    );
    assert!(said.text().contains("origin"), "git's own words: {}", said.all());
    assert!(plan.project_dir.join(".git/objects").exists());
}

#[tokio::test]
async fn an_earlier_jobs_configuration_is_not_obeyed() {
    let mut world = World::new();
    world.set("GIT_STRATEGY", "fetch");
    let (plan, _) = world.got().await;
    let trap = world.root.join("trap");
    let git_dir = plan.project_dir.join(".git");
    let run = format!("touch {trap}");
    git(&plan.project_dir, &["config", "core.fsmonitor", &run]);
    git(&plan.project_dir, &["config", "core.sshCommand", &run]);
    git(&plan.project_dir, &["config", "remote.origin.uploadpack", &run]);
    git(&plan.project_dir, &["config", "filter.x.smudge", &run]);
    fs::write(git_dir.join("info_attributes"), "* filter=x\n").unwrap();
    fs::create_dir_all(git_dir.join("hooks")).unwrap();
    for hook in ["post-checkout", "reference-transaction", "post-index-change"] {
        let path = git_dir.join("hooks").join(hook);
        fs::write(&path, format!("#!/bin/sh\n{run}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    world.commit("two");
    let (plan, _) = world.got().await;
    assert_eq!(content(&plan), "two");
    assert!(!trap.exists());
    assert!(!git_dir.join("hooks").exists());
}

#[tokio::test]
async fn file_variables_are_written_as_they_came() {
    let mut world = World::new();
    let text = "line\nno newline at the end; 'quotes' $DOLLAR";
    world.payload.variables.push(Variable { file: true, raw: true, ..variable("KEY_FILE", text) });
    fs::create_dir_all(world.plan().temp_dir).unwrap();
    fs::write(world.plan().temp_dir.join("left"), "by an earlier job").unwrap();
    let (plan, said) = world.got().await;
    let path = plan.temp_dir.join("KEY_FILE");
    assert_eq!(fs::read_to_string(&path).unwrap(), text);
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(fs::metadata(&plan.temp_dir).unwrap().permissions().mode() & 0o777, 0o700);
    assert!(!plan.temp_dir.join("left").exists());
    assert!(!said.all().contains("quotes"));
    plan.cleanup().await.unwrap();
    assert!(!plan.temp_dir.exists() && plan.project_dir.exists());
    plan.cleanup().await.unwrap();
}

#[tokio::test]
async fn job_cleanup_is_done_when_asked_for() {
    let mut world = World::new();
    world.set("FF_ENABLE_JOB_CLEANUP", "true");
    world.set("GIT_STRATEGY", "fetch");
    let (plan, _) = world.got().await;
    fs::write(plan.project_dir.join("file"), "changed").unwrap();
    fs::write(plan.project_dir.join("new"), "").unwrap();
    plan.cleanup().await.unwrap();
    assert_eq!(content(&plan), "one");
    assert!(!plan.project_dir.join("new").exists() && !plan.temp_dir.exists());
    assert!(!beside(&plan, "cleanup").exists());
    for strategy in ["clone", "empty"] {
        world.set("GIT_STRATEGY", strategy);
        let (plan, _) = world.got().await;
        assert!(plan.project_dir.exists());
        // By then nobody may know the payload.
        release(&plan.project_dir).await.unwrap();
        assert!(!plan.project_dir.exists() && !beside(&plan, "cleanup").exists());
        release(&plan.project_dir).await.unwrap();
    }
}

fn beside(plan: &Plan, ending: &str) -> Utf8PathBuf {
    Utf8PathBuf::from(format!("{}.{ending}", plan.project_dir))
}

#[tokio::test]
async fn a_note_that_the_job_has_changed_runs_nothing() {
    let mut world = World::new();
    world.set("FF_ENABLE_JOB_CLEANUP", "true");
    world.set("GIT_STRATEGY", "fetch");
    let (plan, _) = world.got().await;
    let trap = world.root.join("trap");
    git(&plan.project_dir, &["config", "core.fsmonitor", &format!("touch {trap}")]);
    release(&plan.project_dir).await.unwrap();
    assert!(!trap.exists());
    for text in ["", "{}", "rubbish", r#"{"checkout":"run","flags":["x"]}"#] {
        fs::write(beside(&plan, "cleanup"), text).unwrap();
        release(&plan.project_dir).await.unwrap();
        assert_eq!(content(&plan), "one");
        assert!(!beside(&plan, "cleanup").exists());
    }
}

#[tokio::test]
async fn hooks_run_around_git_with_the_jobs_variables() {
    let mut world = World::new();
    world.set("WHO", "the job's");
    world.runner.pre_get_sources_script = Some("echo 1 \"$WHO\" >>$CI_BUILDS_DIR/order".into());
    world.runner.post_get_sources_script = Some("echo 4 >>$CI_BUILDS_DIR/order; cat file".into());
    let hook = |name: &str, line: &str| Hook { name: name.into(), script: vec![line.into()] };
    world.payload.hooks = vec![
        hook("pre_get_sources_script", "echo 2 >>$CI_BUILDS_DIR/order; echo A=1 >>$GITLAB_ENV"),
        hook("post_get_sources_script", "echo 3 >>$CI_BUILDS_DIR/order"),
    ];
    let (plan, said) = world.got().await;
    let order = fs::read_to_string(world.root.join("builds/order")).unwrap();
    assert_eq!(order, "1 the job's\n2\n3\n4\n");
    assert!(said.text().ends_with("one"), "{}", said.text());
    assert_eq!(fs::read_to_string(plan.temp_dir.join(script::ENV_FILE)).unwrap(), "A=1\n");

    world.payload.hooks = vec![hook("pre_get_sources_script", "false | true")];
    let (_, result, _) = world.get().await;
    assert!(matches!(result, Err(StageError::Failed { exit_code: 1, .. })), "{result:?}");
    world.set("GIT_STRATEGY", "none");
    world.got().await;
}

#[tokio::test]
async fn attempts_are_repeated_and_the_worktree_is_cleared_before_the_second() {
    let mut world = World::new();
    world.set("GIT_STRATEGY", "fetch");
    world.got().await;
    world.set("GET_SOURCES_ATTEMPTS", "3");
    world.set("FF_USE_EXPONENTIAL_BACKOFF_STAGE_RETRY", "false");
    let count = "echo x >>$CI_BUILDS_DIR/count; test $(wc -l <$CI_BUILDS_DIR/count) -ge 3";
    world.runner.pre_get_sources_script = Some(count.into());
    let (plan, said) = world.got().await;
    assert_eq!(content(&plan), "one");
    let remarks = said.remarks.join("\n");
    assert_eq!(remarks.matches("Deleting tracked").count(), 1, "{remarks}");
    assert!(remarks.contains("attempt 2 of 3") && remarks.contains("attempt 3 of 3"), "{remarks}");

    world.runner.pre_get_sources_script = Some("exit 7".into());
    let (_, result, _) = world.get().await;
    assert_eq!(result, Err(StageError::Failed { stage: "get_sources", exit_code: 7 }));
}

#[tokio::test]
async fn a_stage_that_takes_too_long_is_ended() {
    let mut world = World::new();
    world.runner.pre_get_sources_script = Some("echo $$ >$CI_BUILDS_DIR/pid; sleep 300".into());
    world.runner.get_sources_timeout = Some(Duration::from_secs(1));
    let (_, result, _) = world.get().await;
    assert_eq!(result, Err(StageError::TimedOut { stage: "get_sources" }));
    let pid = fs::read_to_string(world.root.join("builds/pid")).unwrap();
    let stat = format!("/proc/{}/stat", pid.trim());
    let gone = async {
        while fs::read_to_string(&stat).is_ok_and(|text| !text.contains(") Z ")) {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), gone).await.unwrap();
}

#[tokio::test]
async fn flags_that_run_programs_are_refused() {
    let mut world = World::new();
    world.set("GIT_FETCH_EXTRA_FLAGS", "--prune --upload-pa=touch");
    let (_, result, _) = world.get().await;
    assert!(matches!(result, Err(StageError::Misconfigured { .. })), "{result:?}");
}

#[tokio::test]
async fn a_place_that_cannot_be_written_to_is_this_machines_fault() {
    let mut world = World::new();
    let file = world.root.join("not-a-directory");
    fs::write(&file, "").unwrap();
    world.runner.builds_dir = file;
    let (_, result, _) = world.get().await;
    let Err(StageError::Broken { detail, .. }) = result else { panic!("{result:?}") };
    assert!(detail.contains("not-a-directory"), "{detail}");
}

/// The credential path, without a server: what git itself makes of the configuration.
#[tokio::test]
async fn git_gets_the_password_for_this_server_alone_and_keeps_it_nowhere() {
    let mut world = World::new();
    world.payload.git_info.repo_url =
        Secret::new("https://gitlab-ci-token:s3cr%65t@gitlab.example.org:8443/hep/tracker.git");
    let plan = world.plan();
    let repository = plan.repository.as_ref().unwrap();
    assert_eq!(repository.origin, "https://gitlab.example.org:8443/hep/tracker.git");
    assert!(!repository.config_file().contains("s3cret"));
    plan.prepare().await.unwrap();
    fs::create_dir_all(&plan.project_dir).unwrap();
    fs::write(
        plan.temp_dir.join(".gitconfig"),
        "[credential]\n\thelper = store --file=kept\n\thelper = !touch asked;\n",
    )
    .unwrap();
    for (host, found) in [("gitlab.example.org:8443", true), ("elsewhere.example.org", false)] {
        let asked = format!("protocol=https\nhost={host}\n\n");
        fs::write(plan.temp_dir.join("question"), asked).unwrap();
        for (verb, expected) in [("fill", found), ("approve", false)] {
            let git = plan.git(repository, GET_SOURCES);
            let mut call = git.call(&plan.project_dir, &["credential", verb]);
            assert!(!call.args.join(" ").contains("s3cret"));
            call.input = Some(plan.temp_dir.join("question"));
            let mut said = Said::default();
            let code = hands::run(call, &mut said).await.unwrap();
            assert_eq!(said.text().contains("password=s3cret"), expected, "{verb} {host}");
            if verb == "fill" {
                assert_eq!(said.text().contains("username=gitlab-ci-token"), found);
                assert_eq!(code == 0, found, "{}", said.text());
            }
        }
    }
    assert!(!plan.project_dir.join("kept").exists() && !plan.project_dir.join("asked").exists());
}

#[test]
fn clone_url_takes_the_place_of_the_servers_address() {
    let mut world = World::new();
    world.set("CI_PROJECT_PATH", "hep/tracker");
    let origin = |world: &World| {
        let plan = world.plan();
        let repository = plan.repository.as_ref().unwrap();
        (repository.origin.clone(), repository.username.clone(), repository.password().to_owned())
    };
    world.runner.clone_url = Some(Url::parse("http://inside:8080/gitlab/").unwrap());
    assert_eq!(
        origin(&world),
        (
            "http://inside:8080/gitlab/hep/tracker.git".into(),
            "gitlab-ci-token".into(),
            "glcbt-token".into()
        )
    );
    world.runner.clone_url = Some(Url::parse("ssh://git.example.org").unwrap());
    assert_eq!(
        origin(&world),
        ("ssh://git@git.example.org/hep/tracker.git".into(), "git".into(), String::new())
    );
    world.set("CI_PROJECT_PATH", "../../etc");
    assert!(plan(&world.payload, &world.runner, Slot::default()).is_err());
}

#[test]
fn only_https_and_http_servers_get_credentials() {
    for (url, expected) in [
        ("https://h/a", Some("https://h")),
        ("http://h:81/a", Some("http://h:81")),
        ("https://[::1]:443/a", Some("https://[::1]")),
        ("ssh://git@h/a", None),
        ("file:///a", None),
    ] {
        assert_eq!(site(&Url::parse(url).unwrap()).as_deref(), expected, "{url}");
    }
}

#[test]
fn submodules_are_reached_as_the_project_is() {
    let rewrites = |world: &World| {
        let plan = world.plan();
        let config = &plan.repository.as_ref().unwrap().config;
        let of_url = config.iter().filter(|one| one.starts_with("url."));
        of_url.cloned().collect::<Vec<_>>()
    };
    let mut world = World::new();
    world.payload.git_info.repo_url =
        Secret::new("https://gitlab-ci-token:t@gitlab.example.org/hep/tracker.git");
    world.runner.url = "https://gitlab.example.org/".parse().unwrap();
    assert_eq!(rewrites(&world), [""; 0], "the helper's credentials are for this server already");
    world.set("CI_SERVER_SHELL_SSH_HOST", "ssh.example.org");
    world.set("CI_SERVER_SHELL_SSH_PORT", "2222");
    world.set("GIT_SUBMODULE_FORCE_HTTPS", "true");
    world.runner.clone_url = Some(Url::parse("http://inside:8080/gitlab/").unwrap());
    let to = "url.http://inside:8080/gitlab/.insteadOf";
    assert_eq!(
        rewrites(&world),
        [
            format!("{to}=https://gitlab.example.org/"),
            format!("{to}=git@ssh.example.org:"),
            format!("{to}=ssh://git@ssh.example.org/"),
            format!("{to}=ssh://git@ssh.example.org:2222/"),
        ]
    );
    world.runner.clone_url = None;
    world.runner.url = "https://gitlab.example.org/root".parse().unwrap();
    world.set("CI_SERVER_SHELL_SSH_HOST", "odd host");
    assert_eq!(rewrites(&world), [""; 0], "one address within the other is left alone");
}

#[test]
fn git_clone_path_has_its_rules() {
    let mut world = World::new();
    let builds = world.runner.builds_dir.clone();
    let why = |world: &World| {
        plan(&world.payload, &world.runner, Slot::default()).map(|plan| plan.project_dir)
    };
    world.set("GIT_CLONE_PATH", "$CI_BUILDS_DIR/mine/$CI_CONCURRENT_ID");
    let error = why(&world).unwrap_err().to_string();
    assert!(
        error.contains("not allowed") && error.contains("[runners.custom_build_dir]"),
        "{error}"
    );
    world.runner.custom_build_dir = true;
    assert_eq!(why(&world), Ok(builds.join("mine/0")));
    world.set("GIT_CLONE_PATH", "$CI_BUILDS_DIR//mine/./x/");
    assert_eq!(why(&world), Ok(builds.join("mine/x")));
    for outside in
        ["/elsewhere", "$CI_BUILDS_DIR", "$CI_BUILDS_DIR/..", "$CI_BUILDS_DIR/a/../../b", "mine"]
    {
        world.set("GIT_CLONE_PATH", outside);
        let error = why(&world).unwrap_err().to_string();
        assert!(error.ends_with(&format!("has to be below {builds}")), "{error}");
    }
    for wide in ["$CI_BUILDS_DIR/short", "$CI_BUILDS_DIR/short/0"] {
        world.set("GIT_CLONE_PATH", wide);
        let error = why(&world).unwrap_err().to_string();
        assert!(error.ends_with("would hold the directories of other jobs"), "{error}");
    }
}

#[tokio::test]
async fn a_link_that_leads_out_of_the_builds_directory_is_not_followed() {
    let mut world = World::new();
    world.runner.custom_build_dir = true;
    world.set("GIT_CLONE_PATH", "$CI_BUILDS_DIR/mine/x");
    let outside = world.root.join("outside");
    fs::create_dir_all(outside.join("x")).unwrap();
    fs::write(outside.join("x/file"), "kept").unwrap();
    fs::create_dir_all(&world.runner.builds_dir).unwrap();
    std::os::unix::fs::symlink(&outside, world.runner.builds_dir.join("mine")).unwrap();
    let (_, result, _) = world.get().await;
    let Err(StageError::Misconfigured { detail }) = result else { panic!("{result:?}") };
    assert!(detail.ends_with("leads out of the builds directory"), "{detail}");
    assert_eq!(fs::read_to_string(outside.join("x/file")).unwrap(), "kept");

    fs::remove_file(world.runner.builds_dir.join("mine")).unwrap();
    let (plan, _) = world.got().await;
    assert_eq!(plan.project_dir, world.runner.builds_dir.join("mine/x"));
    assert_eq!(content(&plan), "one");
}
