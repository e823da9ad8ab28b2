//! The stage is run for real: the job's script, real git, and a server that asks for the job's token.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::process::{Output as Ended, Stdio};

use bridge_backend::result::{JOB_DIR_VAR, JobResult, RESULT_FILE, Step};
use secrecy::ExposeSecret as _;
use tokio::process::{Child, Command};

use super::super::served_tests::{PROJECT, Served, found_below};
use super::super::submodules_tests::nested;
use super::super::tests::git;
use super::*;
use crate::coordinator::{Endpoint, Fault, Gate, NewJob};
use crate::gitlab::wire::{Hook, JobPayload};
use crate::job::FetchedBy;

const FETCH: (&str, &str) = ("GIT_STRATEGY", "fetch");
const QUICKLY: (&str, &str) = ("FF_USE_EXPONENTIAL_BACKOFF_STAGE_RETRY", "false");

/// A machine that runs jobs.
struct Worker<'a> {
    served: &'a Served,
    /// Programs that stand before the machine's own.
    bin: Utf8PathBuf,
    bash: bool,
}

/// How a job's script went.
struct Went {
    log: String,
    result: JobResult,
}

impl<'a> Worker<'a> {
    fn new(served: &'a Served) -> Self {
        let bin = served.root.join("bin");
        fs::create_dir_all(&bin).unwrap();
        Self { served, bin, bash: true }
    }

    /// Puts a script in a program's place; `REAL` stands for the real one.
    fn program(&self, name: &str, text: &str) {
        let real = which(name).unwrap_or_default();
        let path = self.bin.join(name);
        fs::write(&path, format!("#!/bin/sh\n{}\n", text.replace("REAL", real.as_str()))).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn path(&self) -> String {
        if self.bash {
            return format!("{}:{}", self.bin, std::env::var("PATH").unwrap());
        }
        // All that the script and git may need.
        for tool in [
            "basename", "cat", "chmod", "date", "dirname", "expr", "find", "git", "grep", "mkdir",
            "mv", "rm", "sed", "setsid", "sh", "sleep", "stat", "tar", "true", "uname", "wc",
        ] {
            let to = self.bin.join(tool);
            if !to.exists() {
                symlink(which(tool).unwrap(), to).unwrap();
            }
        }
        self.bin.to_string()
    }

    fn start(&self, plan: &Plan) -> Child {
        let spec = plan.spec(bridge_backend::Limits::default());
        assert!(!spec.script.contains(plan.repository.as_ref().unwrap().password()));
        let job = self.served.root.join("job");
        drop(fs::remove_dir_all(&job));
        fs::create_dir(&job).unwrap();
        let script = job.join("script");
        fs::write(&script, &spec.script).unwrap();
        let log = fs::File::create(job.join("log")).unwrap();
        Command::new("/bin/sh")
            .arg(script)
            .env_clear()
            .env("PATH", self.path())
            .env("HOME", &self.served.root)
            .env(JOB_DIR_VAR, &job)
            .envs(spec.env.iter().map(|var| (&var.name, var.value.expose_secret())))
            .current_dir(&spec.workspace)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .process_group(0)
            .spawn()
            .unwrap()
    }

    async fn end(&self, child: Child) -> Went {
        let limit = std::time::Duration::from_secs(60);
        let ended: Ended = tokio::time::timeout(limit, child.wait_with_output())
            .await
            .unwrap_or_else(|_| panic!("hangs: {}", self.log()))
            .unwrap();
        let result = fs::read_to_string(self.served.root.join("job").join(RESULT_FILE));
        let result =
            JobResult::parse(&result.unwrap_or_else(|_| panic!("{}", self.log()))).unwrap();
        assert_eq!(ended.status.code(), Some(result.exit_code), "{}", self.log());
        Went { log: self.log(), result }
    }

    fn log(&self) -> String {
        fs::read_to_string(self.served.root.join("job/log")).unwrap_or_default()
    }

    async fn run(&self, plan: &Plan) -> Went {
        self.end(self.start(plan)).await
    }

    /// Prepares here and runs there.
    async fn job(&self, payload: &JobPayload) -> (Plan, Went) {
        let (plan, said) = self.served.got(payload).await;
        assert_eq!(plan.git_started(), 0, "no git on the submit node: {}", said.all());
        let went = self.run(&plan).await;
        (plan, went)
    }

    async fn good(&self, payload: &JobPayload) -> (Plan, Went) {
        let (plan, went) = self.job(payload).await;
        assert_eq!((went.result.exit_code, went.result.step), (0, Step::Script), "{}", went.log);
        assert!(!plan.temp_dir.join(OWN).exists(), "{}", went.log);
        (plan, went)
    }
}

fn which(name: &str) -> Option<Utf8PathBuf> {
    let path = std::env::var("PATH").unwrap();
    path.split(':').map(|dir| Utf8PathBuf::from(dir).join(name)).find(|path| path.exists())
}

async fn served() -> Served {
    let mut served = Served::new().await;
    served.runner.sources = FetchedBy::Job;
    served
}

/// A job whose script says what it finds.
fn new_job(variables: &[(&str, &str)]) -> NewJob {
    let mut job = NewJob::new("build")
        .project(PROJECT, 77)
        .script("echo \"step has $(cat file)\"")
        .after_script("echo after");
    for (key, value) in variables {
        job = job.env(*key, *value);
    }
    job
}

#[tokio::test]
async fn a_job_fetches_what_it_runs_and_its_token_stays_nowhere() {
    for bash in [true, false] {
        let served = served().await;
        let sha = served.commit("one").await;
        let mut worker = Worker::new(&served);
        worker.bash = bash;
        let calls = served.root.join("calls");
        worker.program("git", &format!("printf '%s\\n' \"$*\" >>{calls}\nexec REAL \"$@\""));
        let job = new_job(&[]).script("env | grep -c BRIDGE_ || true").script("git status --short");
        let payload = served.take(job).await;
        let (plan, went) = worker.good(&payload).await;
        let log = &went.log;
        assert!(log.contains("section_start:"), "{log}");
        assert!(
            log.contains(":get_sources\r\u{1b}[0K\u{1b}[0K\u{1b}[36;1mGetting source from Git")
        );
        for line in [
            "Fetching changes with git depth set to 20...",
            "Created fresh repository.",
            "as detached HEAD (ref is main)...",
            "Skipping Git submodules setup",
            "step has one",
            "\n0\n",
            "after",
        ] {
            assert!(log.contains(line), "{line}: {log}");
        }
        let at = |text: &str| log.find(text).unwrap();
        assert!(at("Skipping Git submodules") < at("section_end:"), "{log}");
        assert!(at(":get_sources\r") < at("step_script"), "{log}");
        assert_eq!(git(&plan.project_dir, &["rev-parse", "HEAD"]), sha);
        let token = payload.token.expose();
        assert_eq!(found_below(&served.root.join("builds"), token), [""; 0]);
        assert_eq!(found_below(&served.root.join("job"), token), [""; 0]);
        let calls = fs::read_to_string(calls).unwrap();
        assert!(calls.contains("fetch") && !calls.contains(token), "{calls}");
    }
}

#[tokio::test]
async fn a_second_job_fetches_into_what_the_first_one_left() {
    let served = served().await;
    served.commit("one").await;
    let worker = Worker::new(&served);
    let (plan, _) = worker.good(&served.take(new_job(&[FETCH])).await).await;
    let inode = || fs::metadata(plan.project_dir.join(".git/objects")).unwrap().ino();
    let first = inode();
    fs::write(plan.project_dir.join("untracked"), "").unwrap();
    fs::write(plan.project_dir.join("file"), "changed by a job").unwrap();
    fs::write(plan.project_dir.join(".git/index.lock"), "").unwrap();
    fs::create_dir_all(plan.project_dir.join(".git/hooks")).unwrap();
    let hook = plan.project_dir.join(".git/hooks/post-checkout");
    fs::write(&hook, "#!/bin/sh\necho the hook of an earlier job\n").unwrap();
    fs::set_permissions(&hook, fs::Permissions::from_mode(0o755)).unwrap();
    let sha = served.commit("two").await;
    let (_, went) = worker.good(&served.take(new_job(&[FETCH])).await).await;
    assert_eq!(inode(), first, "the repository is kept: {}", went.log);
    assert!(went.log.contains("step has two"), "{}", went.log);
    assert!(!went.log.contains("the hook of an earlier job"), "{}", went.log);
    assert!(!plan.project_dir.join("untracked").exists());
    assert_eq!(git(&plan.project_dir, &["rev-parse", "HEAD"]), sha);

    // Without cleaning, and with some.
    fs::write(plan.project_dir.join("kept"), "").unwrap();
    fs::write(plan.project_dir.join("other"), "").unwrap();
    let keep = [FETCH, ("GIT_CLEAN_FLAGS", "-ffdx -e kept")];
    worker.good(&served.take(new_job(&keep)).await).await;
    assert!(plan.project_dir.join("kept").exists() && !plan.project_dir.join("other").exists());
    let none = [FETCH, ("GIT_CLEAN_FLAGS", "none"), ("GIT_CHECKOUT", "false")];
    served.commit("three").await;
    let (_, went) = worker.good(&served.take(new_job(&none)).await).await;
    assert!(plan.project_dir.join("kept").exists());
    assert!(went.log.contains("Skipping Git checkout"), "{}", went.log);
    assert!(went.log.contains("step has two"), "{}", went.log);

    // A clone starts afresh.
    let (_, went) = worker.good(&served.take(new_job(&[("GIT_STRATEGY", "clone")])).await).await;
    assert!(!plan.project_dir.join("kept").exists() && went.log.contains("step has three"));
}

#[tokio::test]
async fn what_an_earlier_job_broke_is_started_afresh() {
    let served = served().await;
    served.commit("one").await;
    let worker = Worker::new(&served);
    let (plan, _) = worker.good(&served.take(new_job(&[FETCH])).await).await;
    fs::write(plan.project_dir.join(".git/packed-refs"), "rubbish\n").unwrap();
    fs::create_dir(plan.project_dir.join("locked")).unwrap();
    fs::write(plan.project_dir.join(".hidden"), "").unwrap();
    let (plan, went) = worker.good(&served.take(new_job(&[FETCH])).await).await;
    assert!(went.log.contains("starting afresh"), "{}", went.log);
    assert!(went.log.contains("step has one"), "{}", went.log);
    assert!(!plan.project_dir.join(".hidden").exists());
    git(&plan.project_dir, &["fsck"]);
}

#[tokio::test]
async fn caches_and_artifacts_outlive_cleaning_and_win_over_the_checkout() {
    for strategy in ["clone", "fetch"] {
        let served = served().await;
        let dir = served.repository("tracker");
        fs::create_dir_all(dir.join("shared")).unwrap();
        fs::write(dir.join("shared/tracked"), "tracked").unwrap();
        fs::write(dir.join("-odd"), "tracked").unwrap();
        served.commit("from git").await;
        let worker = Worker::new(&served);
        for _ in 0..2 {
            let payload = served.take(new_job(&[("GIT_STRATEGY", strategy)])).await;
            let (plan, _) = served.got(&payload).await;
            let there = &plan.restore_dir;
            assert!(!there.starts_with(&plan.project_dir));
            fs::create_dir_all(there.join("shared/deep")).unwrap();
            fs::create_dir_all(there.join(".cache/empty")).unwrap();
            fs::write(there.join("shared/deep/new"), "new").unwrap();
            fs::write(there.join("file"), "from an artifact").unwrap();
            fs::write(there.join("-odd"), "from an artifact").unwrap();
            symlink("nowhere", there.join("dangling")).unwrap();
            let went = worker.run(&plan).await;
            assert_eq!(went.result.exit_code, 0, "{}", went.log);
            assert!(went.log.contains("step has from an artifact"), "{}", went.log);
            let text = |name: &str| fs::read_to_string(plan.project_dir.join(name)).unwrap();
            assert_eq!(text("shared/deep/new"), "new");
            assert_eq!(text("shared/tracked"), "tracked");
            assert_eq!(text("-odd"), "from an artifact");
            assert!(plan.project_dir.join(".cache/empty").is_dir());
            assert_eq!(plan.project_dir.join("dangling").read_link_utf8().unwrap(), "nowhere");
            assert!(!plan.restore_dir.exists());
        }
    }
}

#[tokio::test]
async fn hooks_run_around_git_where_the_job_runs() {
    let mut served = served().await;
    served.commit("one").await;
    served.runner.pre_get_sources_script = Some("echo operator first".into());
    let worker = Worker::new(&served);
    let mut payload = served.take(new_job(&[("WHO", "author's")])).await;
    let hook = |name: &str, line: &str| Hook { name: name.into(), script: vec![line.into()] };
    payload.hooks = vec![
        hook(
            "pre_get_sources_script",
            "echo \"the $WHO\" $(env | grep -c BRIDGE_GIT || true); git config --global alias.mine '!echo set'",
        ),
        hook("post_get_sources_script", "git mine; cat file; echo X=hooked >>\"$GITLAB_ENV\""),
    ];
    payload.steps[0]
        .script
        .push("echo \"X is $X\"; git config --global alias.mine || echo own home".into());
    let (_, went) = worker.good(&payload).await;
    let at = |text: &str| went.log.find(text).unwrap_or_else(|| panic!("{text}: {}", went.log));
    assert!(at("operator first") < at("the author's 0"));
    assert!(at("the author's 0") < at("Created fresh repository"));
    assert!(at("Created fresh repository") < at("\nset\none"));
    assert!(at("\nset\none") < at("X is hooked"));
    assert!(went.log.contains("own home"), "{}", went.log);

    payload.hooks = vec![hook("post_get_sources_script", "exit 7")];
    let (_, went) = worker.job(&payload).await;
    assert_eq!((went.result.exit_code, went.result.step), (7, Step::GetSources), "{}", went.log);
}

#[tokio::test]
async fn submodules_come_with_the_jobs_token_at_every_level() {
    let served = served().await;
    nested(&served).await;
    let worker = Worker::new(&served);
    let job = |words: &[(&str, &str)]| {
        let mut job = new_job(words);
        job = job.script("cat lib/geometry/name; cat lib/geometry/field/name || echo \"no\" field");
        job
    };
    served.commit("one").await;
    let normal = [FETCH, ("GIT_SUBMODULE_STRATEGY", "normal")];
    let payload = served.take(job(&normal)).await;
    let (plan, went) = worker.good(&payload).await;
    assert!(went.log.contains("\ngeometry"), "{}", went.log);
    assert!(went.log.contains("no field"), "{}", went.log);
    let sub = plan.project_dir.join("lib/geometry");
    fs::write(sub.join("untracked"), "").unwrap();
    fs::write(sub.join("name"), "changed by a job").unwrap();
    let recursive = [FETCH, ("GIT_SUBMODULE_STRATEGY", "recursive"), ("GIT_SUBMODULE_DEPTH", "1")];
    let (_, went) = worker.good(&served.take(job(&recursive)).await).await;
    assert!(went.log.contains("recursively with git depth set to 1"), "{}", went.log);
    assert!(!went.log.contains("no field") && !went.log.contains("afresh"), "{}", went.log);
    assert!(!sub.join("untracked").exists());
    assert_eq!(fs::read_to_string(sub.join("name")).unwrap(), "geometry");
    assert_eq!(git(&plan.project_dir, &["status", "--porcelain"]), "");
    assert_eq!(found_below(&plan.project_dir, payload.token.expose()), [""; 0]);

    // Beyond repair.
    let modules = plan.project_dir.join(".git/modules/lib/geometry");
    fs::write(modules.join("packed-refs"), "rubbish\n").unwrap();
    fs::write(plan.project_dir.join(".git/marker"), "").unwrap();
    let (_, went) = worker.good(&served.take(job(&recursive)).await).await;
    assert!(went.log.contains("starting them afresh"), "{}", went.log);
    assert!(!went.log.contains("no field"), "{}", went.log);
    assert!(plan.project_dir.join(".git/marker").exists(), "{}", went.log);
    git(&sub, &["fsck"]);

    let paths = [("GIT_SUBMODULE_STRATEGY", "normal"), ("GIT_SUBMODULE_PATHS", "nothing/here")];
    let (plan, result, _) = served.get(&served.take(job(&paths)).await).await;
    assert_eq!(result, Ok(()));
    let went = worker.run(&plan).await;
    assert_eq!(went.result.step, Step::GetSources, "as git says of it: {}", went.log);
}

#[tokio::test]
async fn large_files_are_fetched_by_the_job() {
    let served = served().await;
    let dir = served.repository("tracker");
    git(&dir, &["lfs", "install", "--local"]);
    git(&dir, &["lfs", "track", "*.root"]);
    fs::create_dir_all(dir.join("data")).unwrap();
    fs::write(dir.join("data/run.root"), "events\n".repeat(1000)).unwrap();
    served.commit("one").await;
    let worker = Worker::new(&served);
    let large = |plan: &Plan| fs::read_to_string(plan.project_dir.join("data/run.root")).unwrap();
    let skip = [FETCH, ("GIT_LFS_SKIP_SMUDGE", "true")];
    let (plan, _) = worker.good(&served.take(new_job(&skip)).await).await;
    assert!(large(&plan).starts_with("version https://git-lfs"), "{}", large(&plan));
    let (plan, went) = worker.good(&served.take(new_job(&[FETCH])).await).await;
    assert_eq!(large(&plan).len(), 7000, "{}", went.log);
    // A machine that has none of it.
    worker.program("git", "[ \"$1\" != lfs ] || exit 1\nexec REAL \"$@\"");
    let (_, went) = worker.good(&served.take(new_job(&[])).await).await;
    assert!(went.log.contains("git-lfs is not installed on"), "{}", went.log);
}

#[tokio::test]
async fn a_refused_token_is_a_failure_of_this_stage_and_no_step_begins() {
    let served = served().await;
    served.commit("one").await;
    let worker = Worker::new(&served);
    let payload = served.take(new_job(&[("GET_SOURCES_ATTEMPTS", "2"), QUICKLY])).await;
    served.gitlab.expire_job_token(payload.id);
    let (_, went) = worker.job(&payload).await;
    assert_eq!((went.result.exit_code, went.result.step), (128, Step::GetSources), "{}", went.log);
    assert!(went.log.contains("attempt 2 of 2 follows in 0 s"), "{}", went.log);
    assert!(went.log.contains("section_end:"), "{}", went.log);
    for never in ["step has", "step_script", "after", "attempt 3"] {
        assert!(!went.log.contains(never), "{never}: {}", went.log);
    }
    assert!(!went.log.contains(payload.token.expose()), "{}", went.log);
}

#[tokio::test]
async fn a_server_that_stumbles_is_asked_again() {
    let served = served().await;
    served.commit("one").await;
    let worker = Worker::new(&served);
    served.gitlab.inject(Endpoint::Git, Fault::status(500));
    let job = new_job(&[("GET_SOURCES_ATTEMPTS", "3"), QUICKLY]);
    let (_, went) = worker.good(&served.take(job).await).await;
    assert!(went.log.contains("attempt 2 of 3"), "{}", went.log);
    assert!(went.log.contains("Deleting tracked and untracked files..."), "{}", went.log);
    assert!(!went.log.contains("attempt 3 of 3"), "{}", went.log);
}

#[tokio::test]
async fn a_machine_without_git_is_named_and_the_author_is_not_blamed() {
    let served = served().await;
    served.commit("one").await;
    let mut worker = Worker::new(&served);
    worker.bash = false;
    worker.path();
    fs::remove_file(worker.bin.join("git")).unwrap();
    let (plan, said) = served.got(&served.take(new_job(&[])).await).await;
    assert!(said.all().contains("(`sources = \"allocation\"`)"), "{}", said.all());
    // What is looked for must not be put back.
    let spec = plan.spec(bridge_backend::Limits::default());
    let job = served.root.join("job");
    fs::create_dir(&job).unwrap();
    fs::write(job.join("script"), &spec.script).unwrap();
    let output = Command::new("/bin/sh")
        .arg(job.join("script"))
        .env_clear()
        .env("PATH", &worker.bin)
        .env("HOME", &served.root)
        .env(JOB_DIR_VAR, &job)
        .envs(spec.env.iter().map(|var| (&var.name, var.value.expose_secret())))
        .current_dir(&spec.workspace)
        .stdin(Stdio::null())
        .output()
        .await
        .unwrap();
    let log = String::from_utf8_lossy(&output.stdout);
    let result = JobResult::parse(&fs::read_to_string(job.join(RESULT_FILE)).unwrap()).unwrap();
    assert_eq!(result.step, Step::GetSourcesBroken, "{log}");
    let detail = result.detail.unwrap();
    assert!(detail.starts_with("git is not installed on "), "{detail}");
    assert!(log.contains("ERROR: git is not installed on ") && !log.contains("after"), "{log}");
}

#[tokio::test]
async fn a_server_that_does_not_answer_costs_the_stages_time_and_no_more() {
    let mut served = served().await;
    served.commit("one").await;
    served.runner.get_sources_timeout = Some(Duration::from_secs(1));
    let worker = Worker::new(&served);
    let gate = Gate::new();
    served.gitlab.inject(Endpoint::Git, Fault::hold(&gate).always());
    let (_, went) = worker.job(&served.take(new_job(&[])).await).await;
    gate.open();
    assert_eq!(went.result.step, Step::GetSourcesTimedOut, "{}", went.log);
    assert!(!went.log.contains("after") && !went.log.contains("step has"), "{}", went.log);
}

#[tokio::test]
async fn a_signal_ends_the_fetch_and_the_other_side_has_the_word() {
    for bash in [true, false] {
        let served = served().await;
        served.commit("one").await;
        let mut worker = Worker::new(&served);
        worker.bash = bash;
        let gate = Gate::new();
        served.gitlab.inject(Endpoint::Git, Fault::hold(&gate).always());
        let (plan, _) = served.got(&served.take(new_job(&[])).await).await;
        let child = worker.start(&plan);
        let limit = Duration::from_secs(60);
        let asked = async {
            while served.gitlab.requests().of(Endpoint::Git) == 0 {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(limit, asked).await.unwrap();
        let pid = i32::try_from(child.id().unwrap()).unwrap();
        let pid = rustix::process::Pid::from_raw(pid).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        let went = worker.end(child).await;
        gate.open();
        assert_eq!(went.result.outcome(), None, "{}", went.log);
        assert_eq!(went.result.exit_code, 143);
        assert!(!went.log.contains("after") && !went.log.contains("step has"), "{}", went.log);
    }
}

#[tokio::test]
async fn an_old_git_is_spared_what_it_does_not_know() {
    let mut served = served().await;
    nested(&served).await;
    served.commit("one").await;
    let ca = served.root.join("ca.pem");
    fs::write(&ca, "certificates").unwrap();
    served.runner.tls_ca_file = Some(ca);
    let worker = Worker::new(&served);
    let seen = served.root.join("seen");
    worker.program(
        "git",
        &format!(
            "[ \"$1\" != version ] || {{ echo git version 1.8.3.1; exit; }}\n\
             {{ echo \"$* ${{GIT_SSL_CAINFO-}}\"; cat \"$HOME/.gitconfig\"; }} >>{seen} 2>/dev/null\n\
             exec REAL \"$@\""
        ),
    );
    let words = [("GIT_SUBMODULE_STRATEGY", "recursive"), ("GIT_SUBMODULE_DEPTH", "1")];
    let payload = served.take(new_job(&words)).await;
    let (plan, said) = served.got(&payload).await;
    let there = plan.temp_dir.join(".sources/ca.pem");
    assert_eq!(fs::read_to_string(&there).unwrap(), "certificates", "{}", said.all());
    assert_eq!(fs::metadata(&there).unwrap().mode() & 0o777, 0o600);
    let went = worker.run(&plan).await;
    assert_eq!(went.result.exit_code, 0, "{}", went.log);
    let seen = fs::read_to_string(seen).unwrap();
    assert!(seen.contains("-- origin "), "{seen}");
    assert!(seen.contains(there.as_str()), "{seen}");
    assert!(!seen.contains("submodule update --init --recursive --depth"), "{seen}");
    assert!(!seen.contains("helper =\n"), "{seen}");
    assert!(!there.exists());
}

#[tokio::test]
async fn without_git_nothing_changes() {
    let served = served().await;
    served.commit("one").await;
    for strategy in ["none", "empty"] {
        let payload = served.take(new_job(&[("GIT_STRATEGY", strategy)])).await;
        let (plan, said) = served.got(&payload).await;
        assert!(!plan.fetches_itself(), "{}", said.all());
        assert_eq!(plan.restore_dir, plan.project_dir);
        assert!(!plan.spec(bridge_backend::Limits::default()).script.contains("get_sources"));
    }
    let warned = served.take(new_job(&[("FF_USE_GIT_NATIVE_CLONE", "true")])).await;
    let plan = served.plan_in(&warned, 0);
    assert!(plan.warnings.iter().any(|w| w.starts_with("FF_USE_GIT_NATIVE_CLONE")));
}

#[tokio::test]
async fn only_a_checkout_worth_keeping_stays_for_the_job() {
    let served = served().await;
    served.commit("one").await;
    let payload = served.take(new_job(&[FETCH])).await;
    let (plan, _) = served.got(&payload).await;
    // What a job brought home, and no repository: cleaning would remove it.
    fs::write(plan.project_dir.join("outputs"), "").unwrap();
    served.got(&payload).await;
    assert!(!plan.project_dir.join("outputs").exists());
    let keeping = [FETCH, ("GIT_CLEAN_FLAGS", "none")];
    let payload = served.take(new_job(&keeping)).await;
    fs::write(plan.project_dir.join("outputs"), "").unwrap();
    fs::create_dir(plan.project_dir.join(".git")).unwrap();
    served.got(&payload).await;
    assert!(plan.project_dir.join("outputs").exists());
    assert!(!plan.project_dir.join(".git").exists());
}

#[test]
fn settings_are_written_as_git_reads_them() {
    let dir = tempfile::tempdir().unwrap();
    let path = Utf8PathBuf::from_path_buf(dir.path().join("config")).unwrap();
    let config = [
        "core.hooksPath=/dev/null",
        "credential.helper=",
        "credential.http://127.0.0.1:8080.helper=!f() { printf 'a=%s\\n' \"$B\"; }; f",
        "http.https://git.example.org/.sslCAInfo=/a b;c#d.pem",
        "url.https://h/x/.insteadOf=git@h:",
    ];
    let config: Vec<String> = config.map(str::to_owned).into();
    fs::write(&path, settings_file(&config)).unwrap();
    let read = |key: &str| git(path.parent().unwrap(), &["config", "--file", path.as_str(), key]);
    for setting in config.iter().filter(|setting| !setting.ends_with("helper=")) {
        let (key, value) = setting.split_once('=').unwrap();
        assert_eq!(read(key), value, "{setting}");
    }
    assert_eq!(read("safe.directory"), "*");
    let text = fs::read_to_string(&path).unwrap();
    assert!(!text.contains("helper = \"\""), "{text}");
}
