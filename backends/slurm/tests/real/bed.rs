//! A private Slurm for the tests, and a site that uses it: start, submit, wait, finish.

use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use bridge_backend::{
    Backend, ExternalId, JobRef, JobSpec, Limits, Observation, Outcome, SubmitToken,
};
use bridge_backend_slurm::DRIVER;
use camino::{Utf8Path, Utf8PathBuf};
use tempfile::TempDir;

/// How long anything may take here; a loaded machine is slow, but not slower than this.
const PATIENCE: Duration = Duration::from_secs(60);

/// Says whether tests against a real Slurm were switched off on purpose.
pub(crate) fn unwanted() -> bool {
    let without = std::env::var("BRIDGE_TESTS_WITHOUT").unwrap_or_default();
    let unwanted = without.split([',', ' ']).any(|word| word == "slurm");
    if unwanted {
        eprintln!("skipped by request: BRIDGE_TESTS_WITHOUT has slurm");
    }
    unwanted
}

/// A running private Slurm.
pub(crate) struct Bed {
    dir: TempDir,
    pub(crate) conf: Utf8PathBuf,
}

impl Bed {
    /// Starts one; a machine that cannot run Slurm fails the test.
    pub(crate) fn start(options: &[&str]) -> Arc<Self> {
        let dir = tempfile::Builder::new().prefix("bed").tempdir().unwrap();
        let bed = dir.path().join("s");
        let pid = std::process::id().to_string();
        let mut words = vec!["start", "--dir", bed.to_str().unwrap(), "--fast", "--for", &pid];
        words.extend(options);
        let out = Command::new(script()).args(words).output().unwrap();
        assert!(out.status.success(), "no Slurm to test with: {}", text(&out));
        let conf = Utf8PathBuf::from_path_buf(bed.join("etc/slurm.conf")).unwrap();
        Arc::new(Self { dir, conf })
    }

    /// Gives the one that the tests share, which goes with the last of them.
    pub(crate) fn shared() -> Arc<Self> {
        static SHARED: Mutex<Weak<Bed>> = Mutex::new(Weak::new());
        let mut shared = SHARED.lock().unwrap();
        if let Some(bed) = shared.upgrade() {
            return bed;
        }
        let bed = Self::start(&[]);
        *shared = Arc::downgrade(&bed);
        bed
    }

    /// Does something to the bed: `ctld-stop KILL`.
    pub(crate) fn tamper(&self, words: &[&str]) {
        let bed = self.dir.path().join("s");
        let mut command = Command::new(script());
        let out = command.args(words).arg("--dir").arg(bed).output().unwrap();
        assert!(out.status.success(), "{words:?}: {}", text(&out));
    }

    /// Asks a program of Slurm's directly.
    pub(crate) fn slurm(&self, program: &str, words: &[&str]) -> String {
        let out = Command::new(program).args(words).env("SLURM_CONF", &self.conf).output().unwrap();
        assert!(out.status.success(), "{program} {words:?}: {}", text(&out));
        String::from_utf8(out.stdout).unwrap()
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        let bed = self.dir.path().join("s");
        let stopped = Command::new(script()).arg("stop").arg("--dir").arg(bed).status();
        assert!(stopped.is_ok_and(|status| status.success()) || std::thread::panicking());
    }
}

fn script() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/beds/slurm")
}

fn text(out: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr))
}

/// A backend with directories of its own.
pub(crate) struct Site {
    pub(crate) dir: TempDir,
    pub(crate) backend: Arc<dyn Backend>,
    bed: Option<Arc<Bed>>,
}

impl Site {
    /// Opens a backend on a bed; `more` is added to its configuration.
    pub(crate) fn on(bed: &Arc<Bed>, more: &str) -> Self {
        let more = format!("slurm_conf = '{}'\n{more}", bed.conf);
        Self { bed: Some(Arc::clone(bed)), ..Self::alone(tempfile::tempdir().unwrap(), &more) }
    }

    /// Opens a backend on the shared bed.
    pub(crate) fn shared() -> Self {
        Self::on(&Bed::shared(), "settle = '1s'")
    }

    /// Opens a backend on programs of the test's own.
    pub(crate) fn with_programs(programs: &[(&str, &str)], more: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let bin = programs_in(&dir, programs);
        Self::alone(dir, &format!("bin_dir = '{bin}'\n{more}"))
    }

    fn alone(dir: TempDir, more: &str) -> Self {
        let root = Utf8Path::from_path(dir.path()).unwrap();
        std::fs::create_dir(root.join("work")).unwrap();
        let table = format!("jobs_dir = '{}'\n{more}", root.join("jobs"));
        let backend = (DRIVER.open)(table.parse().unwrap()).unwrap();
        Self { dir, backend, bed: None }
    }

    /// Opens the same directories anew, as after a restart, with another configuration.
    pub(crate) fn reopened(&self, more: &str) -> Arc<dyn Backend> {
        let conf = self.bed.as_ref().map(|bed| format!("slurm_conf = '{}'\n", bed.conf));
        let conf = conf.unwrap_or_default();
        let table = format!("jobs_dir = '{}'\n{conf}{more}", self.path().join("jobs"));
        (DRIVER.open)(table.parse().unwrap()).unwrap()
    }

    pub(crate) fn path(&self) -> &Utf8Path {
        Utf8Path::from_path(self.dir.path()).unwrap()
    }

    pub(crate) fn job_dir(&self, token: &SubmitToken) -> Utf8PathBuf {
        self.path().join("jobs").join(token.as_str())
    }

    pub(crate) fn spec(&self, script: &str) -> JobSpec {
        JobSpec {
            label: "a test's job".into(),
            script: script.into(),
            env: Vec::new(),
            workspace: self.path().join("work"),
            outputs: Vec::new(),
            limits: Limits { wall_time: Some(Duration::from_secs(300)), expiry: None },
            options: toml::Table::new(),
        }
    }

    /// Gives a specification for the partition that starts nothing.
    pub(crate) fn closed(&self, script: &str) -> JobSpec {
        let mut spec = self.spec(script);
        spec.options.insert("partition".into(), "closed".into());
        spec
    }

    pub(crate) async fn submit(&self, spec: &JobSpec) -> JobRef {
        let token = token();
        let id = self.backend.submit(&token, spec).await.unwrap_or_else(|e| panic!("{e:?}"));
        JobRef { token, id }
    }

    pub(crate) async fn run(&self, script: &str) -> JobRef {
        self.submit(&self.spec(script)).await
    }

    /// Polls one job once.
    pub(crate) async fn look(&self, job: &JobRef) -> Option<Observation> {
        let jobs = std::slice::from_ref(job);
        self.backend.poll(jobs).await.unwrap_or_else(|e| panic!("{e:?}")).remove(&job.id)
    }

    /// Polls until the observation fits.
    pub(crate) async fn until(
        &self,
        job: &JobRef,
        fits: impl Fn(&Observation) -> bool + Sync + Send,
    ) -> Observation {
        let mut last = None;
        until(format!("{job:?}"), async || {
            let seen = self.look(job).await;
            last.clone_from(&seen);
            seen.filter(|seen| fits(seen))
        })
        .await
        .unwrap_or_else(|what| panic!("{what} was last seen as {last:?}\n{}", self.state()))
    }

    pub(crate) async fn running(&self, job: &JobRef) {
        self.until(job, |seen| matches!(seen, Observation::Running { .. })).await;
    }

    /// Polls until the job has ended and says how.
    pub(crate) async fn outcome(&self, job: &JobRef) -> Outcome {
        let seen = self
            .until(job, |seen| matches!(seen, Observation::Ended { .. } | Observation::Gone))
            .await;
        let Observation::Ended { outcome, .. } = seen else { panic!("{job:?}: {seen:?}") };
        outcome
    }

    /// Reads a log to its end.
    pub(crate) async fn log(&self, job: &JobRef) -> String {
        let mut bytes = Vec::new();
        let read = until(format!("the log of {job:?}"), async || {
            let from = u64::try_from(bytes.len()).unwrap();
            let chunk = self.backend.read_log(job, from, 1000).await.unwrap();
            bytes.extend_from_slice(&chunk.bytes);
            chunk.end.then_some(())
        });
        read.await.unwrap_or_else(|what| panic!("{what} has no end: {}", self.state()));
        String::from_utf8(bytes).unwrap()
    }

    /// Gives a file of the workspace, once it is there.
    pub(crate) async fn file(&self, name: &str) -> Vec<u8> {
        let path = self.path().join("work").join(name);
        until(path.to_string(), async || std::fs::read(&path).ok()).await.unwrap()
    }

    /// Makes a file in the workspace, for which a script waits.
    pub(crate) fn touch(&self, name: &str) {
        std::fs::write(self.path().join("work").join(name), "").unwrap();
    }

    fn state(&self) -> String {
        self.bed.as_ref().map(|bed| bed.slurm("scontrol", &["show", "job"])).unwrap_or_default()
    }
}

/// Writes small shell scripts into a directory for programs.
pub(crate) fn programs_in(dir: &TempDir, programs: &[(&str, &str)]) -> Utf8PathBuf {
    let bin = Utf8Path::from_path(dir.path()).unwrap().join("bin");
    std::fs::create_dir_all(&bin).unwrap();
    for (name, body) in programs {
        let path = bin.join(name);
        std::fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    bin
}

/// Gives a token that no other test has.
pub(crate) fn token() -> SubmitToken {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let next = NEXT.fetch_add(1, Ordering::Relaxed);
    SubmitToken::parse(&format!("t{}-{next}", std::process::id())).unwrap()
}

pub(crate) fn job(token: &SubmitToken, id: &ExternalId) -> JobRef {
    JobRef { token: token.clone(), id: id.clone() }
}

/// Looks again and again, but not for ever.
pub(crate) async fn until<T>(
    what: String,
    mut look: impl AsyncFnMut() -> Option<T>,
) -> Result<T, String> {
    let begun = Instant::now();
    while begun.elapsed() < PATIENCE {
        if let Some(found) = look().await {
            return Ok(found);
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Err(what)
}
