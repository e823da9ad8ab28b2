//! A private DiracX for the tests, and a site that uses it: start, submit, wait, finish.

use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use bridge_backend::{
    Backend, ErrorKind, JobRef, JobSpec, Limits, Observation, Outcome, SubmitToken,
};
use bridge_backend_dirac::DRIVER;
use camino::{Utf8Path, Utf8PathBuf};
use tempfile::TempDir;

/// How long anything may take here; a loaded machine is slow, but not slower than this.
pub(crate) const PATIENCE: Duration = Duration::from_secs(180);

/// What every backend here is told: a bed is quick, so jobs look often.
pub(crate) const QUICK: &str =
    "settle = '1s'\nlog_interval = '1s'\ncancel_interval = '1s'\nkill_grace = '2s'\n";

/// Says whether tests against a real DiracX were switched off on purpose.
pub(crate) fn unwanted() -> bool {
    let _was_installed_before = rustls::crypto::ring::default_provider().install_default();
    let without = std::env::var("BRIDGE_TESTS_WITHOUT").unwrap_or_default();
    let unwanted = without.split([',', ' ']).any(|word| word == "dirac");
    if unwanted {
        eprintln!("skipped by request: BRIDGE_TESTS_WITHOUT has dirac");
    }
    unwanted
}

/// A running private DiracX.
pub(crate) struct Bed {
    dir: TempDir,
    pub(crate) url: String,
}

impl Bed {
    /// Starts one; a machine that cannot run DiracX fails the test.
    pub(crate) fn start(options: &[&str]) -> Arc<Self> {
        let dir = tempfile::Builder::new().prefix("bed").tempdir().unwrap();
        let bed = dir.path().join("d");
        let pid = std::process::id().to_string();
        let mut words = vec!["start", "--dir", bed.to_str().unwrap(), "--for", &pid];
        words.extend(options);
        let out = Command::new(script()).args(words).output().unwrap();
        assert!(out.status.success(), "no DiracX to test with: {}", text(&out));
        let said = text(&out);
        let url = said.lines().find_map(|line| line.strip_prefix("DIRACX_URL=")).unwrap();
        Arc::new(Self { url: url.to_owned(), dir })
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

    pub(crate) fn path(&self) -> Utf8PathBuf {
        Utf8PathBuf::from_path_buf(self.dir.path().join("d")).unwrap()
    }

    /// Does something to the bed: `server-stop KILL`. Gives what it says.
    pub(crate) fn tamper(&self, words: &[&str]) -> String {
        self.tamper_with(words, &[])
    }

    /// Does it in another environment.
    pub(crate) fn tamper_with(&self, words: &[&str], env: &[(&str, &str)]) -> String {
        let mut command = Command::new(script());
        let out = command
            .args(words)
            .envs(env.iter().copied())
            .arg("--dir")
            .arg(self.path())
            .output()
            .unwrap();
        assert!(out.status.success(), "{words:?}: {}", text(&out));
        String::from_utf8(out.stdout).unwrap()
    }

    /// Gives the robot's token, good for a day.
    pub(crate) fn token_file(&self) -> Utf8PathBuf {
        self.path().join("state/ci-robot.token")
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        let stopped = Command::new(script()).arg("stop").arg("--dir").arg(self.path()).status();
        assert!(stopped.is_ok_and(|status| status.success()) || std::thread::panicking());
    }
}

fn script() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/beds/dirac")
}

fn text(out: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr))
}

/// Sets a job's statuses, as other parts of DIRAC do: `(status, minor status)` in this order.
pub(crate) async fn set_status(bed: &Bed, who: &str, id: &str, statuses: &[(&str, &str)]) {
    let token = std::fs::read_to_string(bed.path().join(format!("state/{who}.token"))).unwrap();
    let http = reqwest::Client::builder().no_proxy().tls_certs_only([]).build().unwrap();
    for (status, minor) in statuses {
        let change = serde_json::json!({"Status": status, "MinorStatus": minor, "Source": "test"});
        let set = until(format!("{status} to be set"), async || {
            let time = Command::new("date").args(["-u", "+%FT%T.%6N+00:00"]).output().unwrap();
            let time = String::from_utf8(time.stdout).unwrap().trim().to_owned();
            let answer = http
                .patch(format!("{}/api/jobs/status", bed.url))
                .bearer_auth(token.trim())
                .header("content-type", "application/json")
                .body(serde_json::json!({ id: { time: change.clone() } }).to_string())
                .send()
                .await
                .unwrap();
            // Two changes of one job at the same moment make the server fail.
            if answer.status().is_server_error() {
                return None;
            }
            Some(answer.text().await.unwrap())
        });
        let answer = set.await.unwrap();
        assert!(answer.contains(&format!("\"Status\":\"{status}\"")), "{status}: {answer}");
    }
}

/// Opens a backend.
pub(crate) fn open(url: &str, token_file: &Utf8Path, more: &str) -> Arc<dyn Backend> {
    let table = format!("url = '{url}'\ntoken_file = '{token_file}'\n{more}");
    (DRIVER.open)(table.parse().unwrap()).unwrap_or_else(|error| panic!("{error:?}"))
}

/// A backend with a workspace of its own.
pub(crate) struct Site {
    pub(crate) dir: TempDir,
    pub(crate) backend: Arc<dyn Backend>,
    pub(crate) bed: Arc<Bed>,
}

impl Site {
    /// Opens a backend on a bed.
    pub(crate) fn on(bed: &Arc<Bed>) -> Self {
        Self::of(bed, open(&bed.url, &bed.token_file(), QUICK))
    }

    /// Uses a backend that a test opened by itself.
    pub(crate) fn of(bed: &Arc<Bed>, backend: Arc<dyn Backend>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("work")).unwrap();
        Self { dir, backend, bed: Arc::clone(bed) }
    }

    pub(crate) fn work(&self) -> Utf8PathBuf {
        Utf8PathBuf::from_path_buf(self.dir.path().join("work")).unwrap()
    }

    /// Gives a specification; `@` in the script is the directory of this test, which jobs see too.
    pub(crate) fn spec(&self, script: &str) -> JobSpec {
        let here = self.dir.path().to_str().unwrap();
        JobSpec {
            label: "a test's job".into(),
            script: script.replace('@', here),
            env: Vec::new(),
            workspace: self.work(),
            outputs: Vec::new(),
            limits: Limits { wall_time: Some(Duration::from_secs(600)), expiry: None },
            options: toml::Table::new(),
        }
    }

    pub(crate) async fn submit(&self, spec: &JobSpec) -> JobRef {
        self.submit_as(token(), spec).await
    }

    /// Submits a job whose worker is odd, in the words of the bed's site.
    pub(crate) async fn submit_to(&self, odd: &str, spec: &JobSpec) -> JobRef {
        let token = token();
        let workers = self.bed.path().join("workers");
        std::fs::create_dir_all(&workers).unwrap();
        std::fs::write(workers.join(token.as_str()), odd).unwrap();
        self.submit_as(token, spec).await
    }

    async fn submit_as(&self, token: SubmitToken, spec: &JobSpec) -> JobRef {
        // SQLite under parallel requests fails one now and then.
        let submitted =
            until(format!("{token:?}"), async || match self.backend.submit(&token, spec).await {
                Err(error) if error.kind() == ErrorKind::Transient => None,
                submitted => Some(submitted),
            });
        let id = submitted.await.unwrap().unwrap_or_else(|e| panic!("{e:?}"));
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

    /// Polls until the observation fits; what cannot be asked is asked again.
    pub(crate) async fn until(
        &self,
        job: &JobRef,
        fits: impl Fn(&Observation) -> bool + Sync + Send,
    ) -> Observation {
        let mut last = None;
        let mut unasked = None;
        let fitting = until(format!("{job:?}"), async || {
            let seen = match self.backend.poll(std::slice::from_ref(job)).await {
                Ok(mut seen) => seen.remove(&job.id),
                Err(error) => {
                    unasked = Some(error);
                    return None;
                }
            };
            last.clone_from(&seen);
            seen.filter(|seen| fits(seen))
        });
        match fitting.await {
            Ok(seen) => seen,
            Err(what) => panic!(
                "{what} was last seen as {last:?}, and could not be seen for {unasked:?}\n{}",
                self.history(job).await
            ),
        }
    }

    /// Kills jobs as the core does: again until it was heard.
    pub(crate) async fn cancel(&self, jobs: &[JobRef]) {
        let mut last = None;
        let heard =
            until(format!("a kill of {jobs:?}"), async || match self.backend.cancel(jobs).await {
                Ok(()) => Some(()),
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::Transient, "{error:?}");
                    last = Some(error);
                    None
                }
            });
        if let Err(what) = heard.await {
            let mut stories = String::new();
            for job in jobs {
                stories.push_str(&self.history(job).await);
            }
            panic!("{what} was not heard: {last:?}\n{stories}");
        }
    }

    /// Kills a job as the core does, again until it has ended, and says how it ended.
    ///
    /// Once is not always enough: what others write into a job in the same moment may undo it.
    pub(crate) async fn killed(&self, job: &JobRef) -> Outcome {
        let jobs = std::slice::from_ref(job);
        self.cancel(jobs).await;
        let mut last = None;
        let ended = until(format!("the end of {job:?}"), async || {
            last = self.backend.poll(jobs).await.ok()?.remove(&job.id);
            if let Some(Observation::Ended { outcome, .. }) = &last {
                return Some(outcome.clone());
            }
            self.cancel(jobs).await;
            None
        });
        match ended.await {
            Ok(outcome) => outcome,
            Err(what) => panic!("not {what}: {last:?}\n{}", self.history(job).await),
        }
    }

    /// Gives all that DIRAC has of a job, for failures.
    pub(crate) async fn history(&self, job: &JobRef) -> String {
        let token = std::fs::read_to_string(self.bed.token_file()).unwrap();
        let http = reqwest::Client::builder().no_proxy().tls_certs_only([]).build().unwrap();
        let question = serde_json::json!({
            "parameters": ["JobID", "JobName", "Status", "MinorStatus", "ApplicationStatus",
                "LastUpdateTime", "LoggingInfo"],
            "search": [{"parameter": "JobID", "operator": "eq", "value": job.id.0}],
        });
        let answer = http
            .post(format!("{}/api/jobs/search", self.bed.url))
            .bearer_auth(token.trim())
            .header("content-type", "application/json")
            .body(question.to_string())
            .send()
            .await;
        match answer {
            Ok(answer) => answer.text().await.unwrap_or_default().replace("},{", "},\n  {"),
            Err(error) => format!("DIRAC does not say what it has of {job:?}: {error:?}"),
        }
    }

    pub(crate) async fn running(&self, job: &JobRef) {
        self.until(job, |seen| matches!(seen, Observation::Running { .. })).await;
    }

    /// Polls until the job has ended and says how.
    pub(crate) async fn outcome(&self, job: &JobRef) -> Outcome {
        let seen = self
            .until(job, |seen| matches!(seen, Observation::Ended { .. } | Observation::Gone))
            .await;
        let Observation::Ended { outcome, .. } = seen else {
            panic!("{job:?}: {seen:?}\n{}", self.history(job).await)
        };
        outcome
    }

    /// Reads a log to its end.
    pub(crate) async fn log(&self, job: &JobRef) -> Vec<u8> {
        let (mut bytes, mut ended, mut last) = (Vec::new(), false, None);
        while !ended {
            // A long log takes long; each piece of it has its own time.
            let more = until(format!("more of the log of {job:?}"), async || {
                let from = u64::try_from(bytes.len()).unwrap();
                match self.backend.read_log(job, from, 1 << 20).await {
                    Ok(chunk) => Some(chunk).filter(|chunk| chunk.end || !chunk.bytes.is_empty()),
                    Err(error) => {
                        last = Some(error);
                        None
                    }
                }
            });
            let chunk = match more.await {
                Ok(chunk) => chunk,
                Err(what) => panic!(
                    "no {what} after {} bytes: {last:?}\n{}",
                    bytes.len(),
                    self.history(job).await
                ),
            };
            bytes.extend_from_slice(&chunk.bytes);
            ended = chunk.end;
        }
        bytes
    }

    /// Waits for a file that a job makes in this test's directory.
    pub(crate) async fn file(&self, name: &str) -> Vec<u8> {
        let path = self.dir.path().join(name);
        until(name.to_owned(), async || std::fs::read(&path).ok()).await.unwrap()
    }

    /// Makes a file in this test's directory, for which a job waits.
    pub(crate) fn touch(&self, name: &str) {
        std::fs::write(self.dir.path().join(name), "").unwrap();
    }
}

/// A line of shell that waits for a file of this test's, for longer than any test has patience.
pub(crate) fn wait_for(name: &str) -> String {
    format!("n=0; until [ -e @/{name} ] || [ $n -ge 9000 ]; do n=$((n + 1)); sleep 0.05; done\n")
}

/// Gives a token that no other test has.
pub(crate) fn token() -> SubmitToken {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let next = NEXT.fetch_add(1, Ordering::Relaxed);
    SubmitToken::parse(&format!("t{}-{next}", std::process::id())).unwrap()
}

/// Writes a file that only its owner can read.
pub(crate) fn private(path: &Utf8Path, text: &str) {
    std::fs::write(path, text).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).unwrap();
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
        // Each look is a search, and the server has the machine's processors to share with its workers.
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    Err(what)
}
