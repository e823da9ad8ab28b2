//! What only processes can do: die at the wrong moment, leave others behind, be many.

#![expect(
    clippy::panic,
    clippy::unwrap_used,
    clippy::wildcard_enum_match_arm,
    reason = "this is a test"
)]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bridge_backend::{
    Backend, EnvVar, ErrorKind, ExternalId, Fault, JobRef, JobSpec, Limits, Observation, Outcome,
    SubmitToken,
};
use bridge_backend_local::DRIVER;
use camino::{Utf8Path, Utf8PathBuf};
use rustix::fs::{CWD, FileType, Mode, OFlags};
use rustix::process::{Pid, Signal, kill_process};

/// Waits for a job to go `go` in its workspace.
const WAIT_FOR_GO: &str =
    "n=0; until [ -e go ] || [ $n -ge 1200 ]; do n=$((n + 1)); sleep 0.05; done\n";

struct Bed {
    root: tempfile::TempDir,
    backend: Arc<dyn Backend>,
}

impl Bed {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let backend = open(Utf8Path::from_path(root.path()).unwrap());
        fs::create_dir(root.path().join("ws")).unwrap();
        fs::create_dir(root.path().join("jobs")).unwrap();
        Self { root, backend }
    }

    fn path(&self, name: &str) -> Utf8PathBuf {
        Utf8Path::from_path(self.root.path()).unwrap().join(name)
    }

    fn dir(&self, token: &str) -> Utf8PathBuf {
        self.path("jobs").join(token)
    }

    fn spec(&self, script: &str) -> JobSpec {
        spec(&self.path("ws"), script)
    }

    async fn submit(&self, token: &str, script: &str) -> JobRef {
        let job = job(token);
        let id = self.backend.submit(&job.token, &self.spec(script)).await.unwrap();
        assert_eq!(id, job.id);
        job
    }

    async fn poll(&self, job: &JobRef) -> Observation {
        let mut seen = self.backend.poll(std::slice::from_ref(job)).await.unwrap();
        seen.remove(&job.id).unwrap()
    }

    async fn end(&self, job: &JobRef) -> Outcome {
        until("the end of a job", async || match self.poll(job).await {
            Observation::Ended { outcome, .. } => Some(outcome),
            Observation::Running { .. } => None,
            other => panic!("{other:?}"),
        })
        .await
    }

    async fn log(&self, job: &JobRef) -> String {
        let chunk = self.backend.read_log(job, 0, 1 << 20).await.unwrap();
        String::from_utf8(chunk.bytes.to_vec()).unwrap()
    }

    async fn is_found(&self, job: &JobRef) -> bool {
        let found = self.backend.find(std::slice::from_ref(&job.token)).await.unwrap();
        found.contains_key(&job.token)
    }

    /// Reads the pid at the beginning of a note.
    async fn pid(&self, token: &str, note: &str) -> i32 {
        let path = self.dir(token).join(note);
        until("a note of the supervisor", async || {
            let text = fs::read_to_string(&path).ok().filter(|text| text.ends_with('\n'))?;
            text.split(' ').next()?.parse().ok()
        })
        .await
    }

    fn runs(&self) -> usize {
        fs::read_to_string(self.path("ws/runs")).unwrap_or_default().lines().count()
    }
}

fn open(root: &Utf8Path) -> Arc<dyn Backend> {
    let jobs_dir = root.join("jobs");
    let table = toml::toml! {
        jobs_dir = (jobs_dir.as_str())
        kill_grace = "1s"
    };
    (DRIVER.open)(table).unwrap()
}

fn job(token: &str) -> JobRef {
    JobRef { token: SubmitToken::parse(token).unwrap(), id: ExternalId(token.to_owned()) }
}

fn spec(workspace: &Utf8Path, script: &str) -> JobSpec {
    JobSpec {
        label: "a job".to_owned(),
        script: script.to_owned(),
        env: Vec::new(),
        workspace: workspace.to_owned(),
        outputs: Vec::new(),
        limits: Limits::default(),
        options: toml::Table::new(),
    }
}

/// Looks until there is something to see.
async fn until<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let limit = Instant::now() + Duration::from_secs(60);
    loop {
        if let Some(seen) = look().await {
            return seen;
        }
        assert!(Instant::now() < limit, "waited in vain for {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn kill(pid: i32) {
    kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
}

fn make_fifo(path: &Utf8Path) {
    let mode = Mode::RUSR | Mode::WUSR;
    rustix::fs::mknodat(CWD, path.as_std_path(), FileType::Fifo, mode, 0).unwrap();
}

/// Opens the reading end of a FIFO.
fn hold(path: &Utf8Path) -> std::os::fd::OwnedFd {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    rustix::fs::open(path.as_std_path(), flags, Mode::empty()).unwrap()
}

#[tokio::test]
async fn a_directory_without_a_start_is_no_job_and_may_be_submitted() {
    // Crash point C, and every place inside of a submission.
    let bed = Bed::new();
    let job = job("t-1");
    let dir = bed.dir("t-1");
    for files in 0..4 {
        fs::create_dir(&dir).unwrap();
        for name in ["script", "log", "alive"].into_iter().take(files) {
            match name {
                "alive" => make_fifo(&dir.join(name)),
                _ => fs::write(dir.join(name), "echo from an earlier life >>runs").unwrap(),
            }
        }
        assert!(!bed.is_found(&job).await, "after {files} files");
        bed.submit("t-1", "echo run >>runs").await;
        assert_eq!(bed.end(&job).await, Outcome::Exited { code: 0 });
        assert_eq!(bed.runs(), files + 1);
        bed.backend.release(&job).await.unwrap();
    }
}

#[tokio::test]
async fn a_supervisor_counts_before_its_first_line() {
    // Crash point D at its narrowest: spawned, and nothing written yet.
    let bed = Bed::new();
    let job = job("t-1");
    let dir = bed.dir("t-1");
    fs::create_dir(&dir).unwrap();
    make_fifo(&dir.join("alive"));
    let life = hold(&dir.join("alive"));
    let mut newborn = Command::new("/bin/sleep").arg("600").stdin(life).spawn().unwrap();
    assert!(bed.is_found(&job).await);
    assert!(matches!(bed.poll(&job).await, Observation::Running { .. }));
    bed.submit("t-1", "echo run >>runs").await;
    assert!(!dir.join("script").exists(), "a second supervisor was prepared");

    newborn.kill().unwrap();
    newborn.wait().unwrap();
    assert!(!bed.is_found(&job).await);
    assert!(matches!(
        bed.poll(&job).await,
        Observation::Ended { outcome: Outcome::SystemFailed { .. }, .. }
    ));
    bed.submit("t-1", "echo run >>runs").await;
    assert_eq!(bed.end(&job).await, Outcome::Exited { code: 0 });
    assert_eq!(bed.runs(), 1);
}

#[tokio::test]
async fn of_many_supervisors_one_runs_the_script() {
    let bed = Bed::new();
    let dir = bed.dir("t-1");
    fs::create_dir(&dir).unwrap();
    make_fifo(&dir.join("alive"));
    fs::write(dir.join("script"), "echo run >>runs").unwrap();
    fs::write(dir.join("supervise"), include_str!("../src/supervise.sh")).unwrap();
    fs::write(dir.join("log"), "").unwrap();
    let life = hold(&dir.join("alive"));
    let many: Vec<_> = (0..16)
        .map(|_| {
            Command::new("/bin/sh")
                .arg(dir.join("supervise"))
                .args([dir.as_str(), bed.path("ws").as_str(), "", "1"])
                .args(["/usr/bin/setsid", "/bin/sleep", "", "label"])
                .stdin(Stdio::from(life.try_clone().unwrap()))
                .stdout(Stdio::null())
                .process_group(0)
                .spawn()
                .unwrap()
        })
        .collect();
    drop(life);
    for mut one in many {
        one.wait().unwrap();
    }
    assert_eq!(bed.runs(), 1);
    assert_eq!(bed.end(&job("t-1")).await, Outcome::Exited { code: 0 });
}

/// Names the place where a daemon of `a_daemon_killed_at_any_moment_…` works.
const DAEMON: &str = "BRIDGE_TEST_DAEMON";

/// Not a test by itself: the daemon that is killed. It submits until then.
#[tokio::test]
async fn daemon() {
    let Ok(root) = std::env::var(DAEMON) else { return };
    let root = Utf8PathBuf::from(root);
    let backend = open(&root);
    let first = fs::read_dir(root.join("attempts")).unwrap().count();
    for number in first.. {
        let token = format!("t-{number}");
        fs::write(root.join("attempts").join(&token), "").unwrap();
        let spec = spec(&root.join("ws"), &format!("echo {token} >>runs"));
        backend.submit(&SubmitToken::parse(&token).unwrap(), &spec).await.unwrap();
    }
}

#[tokio::test]
async fn a_daemon_killed_at_any_moment_loses_no_job_and_runs_none_twice() {
    let bed = Bed::new();
    fs::create_dir(bed.path("attempts")).unwrap();
    let attempts = || fs::read_dir(bed.path("attempts")).unwrap().count();
    for round in 0..12 {
        let mut daemon = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "daemon", "--quiet"])
            .env(DAEMON, bed.path(""))
            .stdout(Stdio::null())
            // A signal to its group, as from a terminal, must not reach the jobs either.
            .process_group(0)
            .spawn()
            .unwrap();
        let enough = attempts() + 1 + round % 4;
        until("attempts", async || (attempts() >= enough).then_some(())).await;
        let group = Pid::from_raw(i32::try_from(daemon.id()).unwrap()).unwrap();
        rustix::process::kill_process_group(group, Signal::KILL).unwrap();
        daemon.wait().unwrap();
    }
    // What the sweep does with rows in `submitting`.
    let mut resubmitted = 0;
    let tokens: Vec<String> = (0..attempts()).map(|number| format!("t-{number}")).collect();
    for token in &tokens {
        let job = job(token);
        if !bed.is_found(&job).await {
            bed.submit(token, &format!("echo {token} >>runs")).await;
            resubmitted += 1;
        }
        assert_eq!(bed.end(&job).await, Outcome::Exited { code: 0 });
    }
    let mut runs = BTreeMap::<String, usize>::new();
    for line in fs::read_to_string(bed.path("ws/runs")).unwrap().lines() {
        *runs.entry(line.to_owned()).or_default() += 1;
    }
    assert_eq!(runs.len(), tokens.len(), "lost a job");
    assert!(runs.values().all(|runs| *runs == 1), "ran twice: {runs:?}");
    assert!(resubmitted <= 12, "one at most is in doubt at each death, not {resubmitted}");
}

#[tokio::test]
async fn a_killed_supervisor_is_no_success() {
    let bed = Bed::new();
    let job = bed.submit("t-1", WAIT_FOR_GO).await;
    let script = bed.pid("t-1", "session").await;
    kill(bed.pid("t-1", "started").await);
    // The script lives on, and so does the job.
    assert!(matches!(bed.poll(&job).await, Observation::Running { .. }));
    assert!(bed.is_found(&job).await);
    kill(script);
    match bed.end(&job).await {
        Outcome::SystemFailed { detail } => assert!(detail.contains("supervisor"), "{detail}"),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_script_that_outlives_its_supervisor_has_the_last_word() {
    let bed = Bed::new();
    let script = format!(
        "{WAIT_FOR_GO}printf 'exit_code=7\\nstep=script\\n' >\"$BRIDGE_JOB_DIR/new\"\n\
         mv \"$BRIDGE_JOB_DIR/new\" \"$BRIDGE_JOB_DIR/result\""
    );
    let job = bed.submit("t-1", &script).await;
    bed.pid("t-1", "session").await;
    kill(bed.pid("t-1", "started").await);
    assert!(matches!(bed.poll(&job).await, Observation::Running { .. }));
    fs::write(bed.path("ws/go"), "").unwrap();
    assert_eq!(bed.end(&job).await, Outcome::Exited { code: 7 });
}

#[tokio::test]
async fn a_job_of_an_earlier_boot_lost_its_machine() {
    let bed = Bed::new();
    let job = bed.submit("t-1", WAIT_FOR_GO).await;
    let script = bed.pid("t-1", "session").await;
    let supervisor = bed.pid("t-1", "started").await;
    kill(supervisor);
    kill(script);
    let boot = "00000000-0000-0000-0000-000000000000";
    fs::write(bed.dir("t-1").join("started"), format!("{supervisor} 1 {boot}\n")).unwrap();
    assert_eq!(bed.end(&job).await, Outcome::NodeFailed);
    bed.backend.cancel(std::slice::from_ref(&job)).await.unwrap();
    bed.backend.release(&job).await.unwrap();
    assert_eq!(bed.poll(&job).await, Observation::Gone);
}

#[tokio::test]
async fn a_missing_workspace_is_told_in_the_log() {
    let bed = Bed::new();
    let mut spec = bed.spec("echo run");
    spec.workspace = bed.path("nowhere");
    let job = job("t-1");
    bed.backend.submit(&job.token, &spec).await.unwrap();
    match bed.end(&job).await {
        Outcome::SystemFailed { detail } => assert!(detail.contains("nowhere"), "{detail}"),
        other => panic!("{other:?}"),
    }
    let log = bed.log(&job).await;
    assert!(log.starts_with("bridge: the workspace ") && log.contains("nowhere"), "{log}");
    assert_eq!(log.lines().count(), 1, "{log}");
}

#[tokio::test]
async fn five_megabytes_of_variables_are_refused_with_their_size() {
    let bed = Bed::new();
    let mut spec = bed.spec("echo run");
    spec.env = (0..50)
        .map(|n| EnvVar { name: format!("V{n}"), value: "x".repeat(100_000).into() })
        .collect();
    let job = job("t-1");
    let error = bed.backend.submit(&job.token, &spec).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Rejected(Fault::Job));
    assert!(error.to_string().contains("variables of 50"), "{error}");
    assert!(!bed.dir("t-1").exists());

    // Just inside of both limits the job and its programs get all of it.
    let total = 1_000_000;
    spec.env = (0..10)
        .map(|n| EnvVar { name: format!("V{n}"), value: "x".repeat(total / 10).into() })
        .collect();
    spec.script = "env | wc -c >size".to_owned();
    bed.backend.submit(&job.token, &spec).await.unwrap();
    assert_eq!(bed.end(&job).await, Outcome::Exited { code: 0 });
    let size: usize = fs::read_to_string(bed.path("ws/size")).unwrap().trim().parse().unwrap();
    assert!(size > total, "{size}");
}

#[tokio::test]
async fn a_running_job_is_not_released() {
    let bed = Bed::new();
    let job = bed.submit("t-1", WAIT_FOR_GO).await;
    let error = bed.backend.release(&job).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Transient);
    fs::write(bed.path("ws/go"), "").unwrap();
    assert_eq!(bed.end(&job).await, Outcome::Exited { code: 0 });
    bed.backend.release(&job).await.unwrap();
    assert!(!bed.dir("t-1").exists());
}

#[tokio::test]
async fn what_a_job_left_running_neither_writes_nor_survives_the_release() {
    let bed = Bed::new();
    let script = "setsid sh -c 'echo $$ >left; while :; do echo more; done' &\n\
                  until [ -s left ]; do sleep 0.01; done; exit 3";
    let job = bed.submit("t-1", script).await;
    assert_eq!(bed.end(&job).await, Outcome::Exited { code: 3 });
    let left = fs::read_to_string(bed.path("ws/left")).unwrap();
    let len = |chunk: bridge_backend::LogChunk| u64::try_from(chunk.bytes.len()).unwrap();
    let first = len(bed.backend.read_log(&job, 0, usize::MAX).await.unwrap());
    let second = bed.backend.read_log(&job, 0, usize::MAX).await.unwrap();
    assert!(second.end);
    assert_eq!(first, len(second));
    until("a release", async || bed.backend.release(&job).await.ok()).await;
    let left = Utf8PathBuf::from(format!("/proc/{}/cwd", left.trim()));
    until("the last of the job's processes", async || left.read_link().err()).await;
    assert!(!bed.dir("t-1").exists());
}

#[tokio::test]
async fn a_job_cancelled_before_its_first_line_never_runs() {
    let bed = Bed::new();
    // The supervisor looks for the mark after it took the job; it cannot miss one from before.
    let dir = bed.dir("t-1");
    fs::create_dir(&dir).unwrap();
    make_fifo(&dir.join("alive"));
    fs::write(dir.join("script"), "echo run >>runs").unwrap();
    fs::write(dir.join("supervise"), include_str!("../src/supervise.sh")).unwrap();
    let life = hold(&dir.join("alive"));
    let job = job("t-1");
    bed.backend.cancel(std::slice::from_ref(&job)).await.unwrap();
    let status = Command::new("/bin/sh")
        .arg(dir.join("supervise"))
        .args([dir.as_str(), bed.path("ws").as_str(), "", "1"])
        .args(["/usr/bin/setsid", "/bin/sleep", "", "label"])
        .stdin(Stdio::from(life))
        .status()
        .unwrap();
    assert!(status.success());
    assert!(matches!(bed.end(&job).await, Outcome::Cancelled { .. }));
    assert_eq!(bed.runs(), 0);
}

#[tokio::test]
async fn a_readable_jobs_directory_is_the_operators_to_close() {
    use std::os::unix::fs::PermissionsExt as _;
    let bed = Bed::new();
    let open = fs::Permissions::from_mode(0o755);
    fs::set_permissions(bed.path("jobs"), open).unwrap();
    let error = bed.backend.check().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Rejected(Fault::Site));
    assert!(error.to_string().contains("0755"), "{error}");
    fs::set_permissions(bed.path("jobs"), fs::Permissions::from_mode(0o700)).unwrap();
    bed.backend.check().await.unwrap();
    assert_eq!(fs::read_dir(bed.path("jobs")).unwrap().count(), 0, "the check left something");
}

#[tokio::test]
async fn usage_tells_times_and_cpu() {
    let bed = Bed::new();
    let job = bed.submit("t-1", "i=0; while [ $i -lt 100000 ]; do i=$((i + 1)); done").await;
    bed.end(&job).await;
    let Observation::Ended { usage, .. } = bed.poll(&job).await else { panic!() };
    assert!(usage.cpu.unwrap() > Duration::ZERO, "{usage:?}");
    assert!(usage.elapsed.unwrap() > Duration::ZERO, "{usage:?}");
    assert!(usage.started_at.unwrap() < usage.ended_at.unwrap(), "{usage:?}");
}

#[tokio::test]
async fn ten_thousand_jobs_are_one_quick_poll() {
    let bed = Bed::new();
    let fifo = bed.path("life");
    make_fifo(&fifo);
    let life = hold(&fifo);
    let jobs: Vec<JobRef> = (0..10_000).map(|n| job(&format!("br-{n:026}"))).collect();
    for job in &jobs {
        // One FIFO under many names: the question is the same, ten thousand processes are not needed.
        fs::create_dir(bed.dir(&job.id.0)).unwrap();
        fs::hard_link(&fifo, bed.dir(&job.id.0).join("alive")).unwrap();
    }
    let before = Instant::now();
    let seen = bed.backend.poll(&jobs).await.unwrap();
    let took = before.elapsed();
    assert_eq!(seen.len(), jobs.len());
    assert!(seen.values().all(|seen| matches!(seen, Observation::Running { .. })));
    // Measured: 60 ms when idle. The limit is for a machine that does other things as well.
    assert!(took < Duration::from_secs(2), "took {took:?}");
    drop(life);
}
