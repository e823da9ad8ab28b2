//! A bed: a coordinator, a configuration, and the real binary; and waiting with a limit.

pub(crate) mod grid;
pub(crate) mod slurm;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bridge::coordinator::{Coordinator, Counts, JobView, NewJob, Options, RunnerOptions, Status};
use bridge::trace::strip_headers;
use serde_json::Value;

use self::grid::Grid;

/// The program under test.
pub(crate) const BRIDGE: &str = env!("CARGO_BIN_EXE_bridge");

/// How long anything may take that takes a second on an idle machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(240);

/// Waits until something holds, and says what it waited for if it never does.
pub(crate) async fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(started.elapsed() < PATIENCE, "waited in vain for: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Where jobs of a bed run.
#[derive(Clone, Debug)]
pub(crate) enum Where {
    Local,
    Slurm { conf: PathBuf },
    Dirac { grid: Arc<Grid> },
}

/// Everything a test needs.
pub(crate) struct Bed {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) gitlab: Coordinator,
    pub(crate) token: String,
    pub(crate) config: PathBuf,
    pub(crate) place: Where,
}

impl Bed {
    pub(crate) async fn local() -> Self {
        Self::new(Where::Local, Options::default(), "", "").await
    }

    /// `top` goes to the top of the configuration, `runner` into its `[[runners]]`.
    pub(crate) async fn new(place: Where, options: Options, top: &str, runner: &str) -> Self {
        let dir = tempfile::Builder::new().prefix("bridge-it-").tempdir().unwrap();
        let gitlab = Coordinator::start(options).await.unwrap();
        let token = gitlab.add_runner(RunnerOptions::default());
        let config = dir.path().join("config.toml");
        let bed = Self { dir, gitlab, token, config, place };
        bed.write_config(top, runner, "");
        bed
    }

    /// Writes the configuration; `backend` goes into its table.
    pub(crate) fn write_config(&self, top: &str, runner: &str, backend: &str) {
        let dir = self.dir.path().display();
        let kind = match &self.place {
            Where::Local => {
                format!("kind = \"local\"\nkill_grace = \"2s\"\njobs_dir = \"{dir}/jobs\"")
            }
            Where::Slurm { conf } => format!(
                "kind = \"slurm\"\npartition = \"ci\"\nslurm_conf = \"{}\"\njobs_dir = \"{dir}/jobs\"",
                conf.display()
            ),
            Where::Dirac { grid } => grid.table(&self.group(), backend),
        };
        let text = format!(
            "state_dir = \"{dir}/state\"\ncheck_interval = \"100ms\"\nconcurrent = 64\n{top}\n\n\
             [[runners]]\nname = \"main\"\nurl = \"{url}\"\ntoken = \"{token}\"\nbackend = \"b\"\n\
             builds_dir = \"{dir}/builds\"\ncache_dir = \"{dir}/cache\"\n{runner}\n\n\
             [backends.b]\n{kind}\n{backend}\n",
            url = self.gitlab.url(),
            token = self.token,
        );
        write_private(&self.config, &text);
    }

    /// What this bed's jobs are called together on a grid that other beds use, too.
    pub(crate) fn group(&self) -> String {
        let name = self.dir.path().file_name().unwrap().to_string_lossy();
        name.chars().filter(|c| c.is_ascii_alphanumeric() || *c == '-').collect()
    }

    /// Replaces a text in the configuration.
    pub(crate) fn edit_config(&self, from: &str, to: &str) {
        let text = std::fs::read_to_string(&self.config).unwrap();
        assert!(text.contains(from), "{from} is not in {text}");
        write_private(&self.config, &text.replace(from, to));
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A command that waits until a file of this name is there.
    pub(crate) fn wait_for(&self, gate: &str) -> String {
        format!("until [ -e {} ]; do sleep 0.1; done", self.path(gate).display())
    }

    /// Lets those through that wait for a file of this name.
    pub(crate) fn open(&self, gate: &str) {
        std::fs::write(self.path(gate), "").unwrap();
    }

    /// A command that notes the process that runs it; [`Self::pid_of`] reads it.
    pub(crate) fn note_pid(&self, name: &str) -> String {
        format!("sh -c 'echo $PPID' > {}", self.path(name).display())
    }

    /// Waits for a process to have noted itself.
    pub(crate) async fn pid_of(&self, name: &str) -> i32 {
        until("a process to note itself", || {
            std::fs::read_to_string(self.path(name)).ok()?.trim().parse().ok()
        })
        .await
    }

    /// Starts the daemon.
    pub(crate) fn serve(&self) -> Serve {
        self.serve_with(&[])
    }

    /// Starts the daemon with these variables in its environment.
    pub(crate) fn serve_with(&self, env: &[(&str, &str)]) -> Serve {
        Serve::start(&self.config, &self.path("daemon.log"), env)
    }

    /// Runs a command of the program to its end.
    pub(crate) fn run(&self, args: &[&str]) -> Output {
        Command::new(BRIDGE)
            .arg("--config")
            .arg(&self.config)
            .args(args)
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    /// Gives what `jobs list --json` says, by GitLab's number.
    pub(crate) fn rows(&self) -> BTreeMap<i64, Value> {
        let output = self.run(&["jobs", "list", "--json", "--limit", "100000"]);
        if !output.status.success() {
            return BTreeMap::new();
        }
        String::from_utf8(output.stdout)
            .unwrap()
            .lines()
            .map(|line| serde_json::from_str::<Value>(line).unwrap())
            .map(|row| (row["ci_job"].as_i64().unwrap(), row))
            .collect()
    }

    pub(crate) fn row(&self, id: i64) -> Value {
        self.rows().remove(&id).unwrap_or(Value::Null)
    }

    pub(crate) async fn finished(&self, id: i64) -> JobView {
        match self.gitlab.wait_finished(id, PATIENCE).await {
            Ok(job) => job,
            Err(job) => panic!("job {id} did not end: {job:?}\n{}", self.log()),
        }
    }

    pub(crate) async fn all_finished(&self, within: Duration) -> Counts {
        match self.gitlab.wait_all_finished(within).await {
            Ok(counts) => counts,
            Err(counts) => {
                let open: Vec<_> =
                    self.gitlab.jobs().into_iter().filter(|job| !job.is_finished()).collect();
                panic!("not all jobs ended: {counts:?}\n{open:#?}\n{}", self.log())
            }
        }
    }

    /// Waits until nothing is owed to any job.
    pub(crate) async fn nothing_owed(&self) {
        until("nothing to be owed", || {
            let rows = self.rows();
            let owed: Vec<_> = rows.values().filter(|row| row["released_at"].is_null()).collect();
            if owed.is_empty() && !rows.is_empty() { Some(()) } else { None }
        })
        .await;
    }

    /// The end of the daemon's log, for failures.
    pub(crate) fn log(&self) -> String {
        let log = std::fs::read_to_string(self.path("daemon.log")).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        let from = lines.len().saturating_sub(60);
        format!("--- the daemon's last lines\n{}", lines[from..].join("\n"))
    }

    /// A script that leaves one line per run in a file of the job's own.
    pub(crate) fn counting(&self, name: &str) -> NewJob {
        let ran = self.path("ran");
        std::fs::create_dir_all(&ran).unwrap();
        NewJob::new(name)
            .script(format!("echo ran >> {}/$CI_JOB_ID", ran.display()))
            .env("GIT_STRATEGY", "none")
    }

    /// How often a job's script ran.
    pub(crate) fn runs(&self, id: i64) -> usize {
        std::fs::read_to_string(self.path("ran").join(id.to_string()))
            .map_or(0, |text| text.lines().count())
    }

    /// Asserts the three facts: one run, one trace equal byte for byte, one final status.
    pub(crate) fn assert_once(&self, id: i64) {
        let job = self.gitlab.job(id).unwrap();
        assert_eq!(job.status, Status::Success, "{job:?}\n{}", self.log());
        assert_eq!(self.runs(id), 1, "job {id} ran once\n{}", self.log());
        let row = self.row(id);
        let spool = self.path("state/spool").join(format!("{}.trace", row["id"].as_str().unwrap()));
        let spool = std::fs::read(spool).unwrap();
        assert!(spool == *job.trace, "the trace of {id} differs from its spool\n{job:?}");
        let final_update = job.final_update.clone().unwrap();
        assert_eq!(final_update.bytesize, Some(job.trace_len), "{job:?}");
        assert_eq!(final_update.checksum, Some(format!("crc32:{:08x}", job.trace_crc)));
    }

    pub(crate) fn assert_no_violations(&self) {
        let violations = self.gitlab.final_violations();
        assert!(violations.is_empty(), "{violations:#?}\n{}", self.log());
    }
}

/// Says whether a process lives; one that nobody has waited for yet does not.
pub(crate) fn is_alive(pid: i32) -> bool {
    let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { return false };
    let state = stat.rsplit_once(')').and_then(|(_, rest)| rest.trim_start().chars().next());
    !matches!(state, None | Some('Z' | 'X'))
}

/// Asks the daemon's own pages on its Unix socket; gives status and body, or 0 if nobody answers.
pub(crate) fn ask_http(socket: &Path, page: &str) -> (u16, String) {
    let Ok(stream) = std::os::unix::net::UnixStream::connect(socket) else {
        return (0, String::new());
    };
    http_over(stream, page)
}

/// Asks for a page over an open connection.
pub(crate) fn http_over(mut stream: impl Read + Write, page: &str) -> (u16, String) {
    let request = format!("GET {page} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    let mut answer = String::new();
    if stream.write_all(request.as_bytes()).is_err() || stream.read_to_string(&mut answer).is_err()
    {
        return (0, String::new());
    }
    let status = answer.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or(0);
    let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    (status, body.to_owned())
}

/// Gives a trace's text without its headers.
pub(crate) fn text_of(job: &JobView) -> String {
    String::from_utf8_lossy(&strip_headers(&job.trace)).into_owned()
}

pub(crate) fn write_private(path: &Path, text: &str) {
    use std::os::unix::fs::OpenOptionsExt as _;
    let aside = path.with_extension("new");
    let mut file = std::fs::OpenOptions::new()
        .create(true)
        .truncate(true)
        .write(true)
        .mode(0o600)
        .open(&aside)
        .unwrap();
    file.write_all(text.as_bytes()).unwrap();
    std::fs::rename(aside, path).unwrap();
}

/// A running daemon; killed when it is dropped.
pub(crate) struct Serve {
    child: Child,
    log: PathBuf,
}

impl Serve {
    fn start(config: &Path, log: &Path, env: &[(&str, &str)]) -> Self {
        let file = std::fs::File::options().create(true).append(true).open(log).unwrap();
        let child = Command::new(BRIDGE)
            .arg("--config")
            .arg(config)
            .arg("serve")
            // Jobs run in login shells; what this machine's user has in his profile is no part of a test.
            .env("HOME", config.parent().unwrap())
            .envs(env.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(file)
            .spawn()
            .unwrap();
        Self { child, log: log.to_owned() }
    }

    /// `kill -9`.
    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-s", name, &pid]).status().unwrap().success());
    }

    pub(crate) fn is_over(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().unwrap()
    }

    /// Waits for the process to end by itself.
    pub(crate) async fn ended(mut self) -> ExitStatus {
        let log = self.log.clone();
        let what = "the daemon to end";
        let started = Instant::now();
        loop {
            if let Some(status) = self.is_over() {
                return status;
            }
            if started.elapsed() > PATIENCE {
                let log = std::fs::read_to_string(log).unwrap_or_default();
                panic!("waited in vain for {what}\n{log}");
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// SIGTERM, and the end.
    pub(crate) async fn term(self) -> ExitStatus {
        self.signal("TERM");
        self.ended().await
    }
}

impl Drop for Serve {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            drop(self.child.kill());
            drop(self.child.wait());
        }
    }
}
