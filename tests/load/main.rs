//! The benchmark: how many jobs a second, how late, how much memory, how many questions.
//!
//! `cargo bench --bench load -- --jobs N --backend local|slurm|dirac [--queued] [--slots N]`
//!
//! Load comes from the coordinator; the daemon is the real program in a process of its own. Prints one
//! JSON object. With `--queued` the backend is a Slurm whose partition is down, and what is measured is
//! what it costs to keep N jobs waiting.

#![expect(
    clippy::panic,
    clippy::print_stdout,
    reason = "a benchmark prints, and ends when it cannot go on"
)]

mod dirac;

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bridge::coordinator::{Coordinator, NewJob, Options, RunnerOptions, Status};
use serde_json::{Value, json};

/// How long an idle daemon is watched.
const IDLE: Duration = Duration::from_secs(60);

struct Args {
    jobs: usize,
    backend: String,
    queued: bool,
    slots: usize,
}

fn args() -> Args {
    let mut args = Args { jobs: 1000, backend: "local".into(), queued: false, slots: 16 };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        match word.as_str() {
            "--jobs" => args.jobs = words.next().and_then(|n| n.parse().ok()).expect("--jobs N"),
            "--backend" => args.backend = words.next().expect("--backend local|slurm|dirac"),
            "--slots" => args.slots = words.next().and_then(|n| n.parse().ok()).expect("--slots N"),
            "--queued" => args.queued = true,
            // cargo's own.
            "--bench" => {}
            other => panic!("unknown option {other}"),
        }
    }
    let known = matches!(args.backend.as_str(), "local" | "slurm" | "dirac");
    assert!(known, "--backend local|slurm|dirac");
    assert!(!args.queued || args.backend == "slurm", "only a Slurm can keep jobs waiting");
    args
}

/// A Slurm bed that ends with the benchmark.
struct Cluster(tempfile::TempDir);

impl Cluster {
    fn start() -> Self {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let status = bed()
            .args(["start", "--fast", "--nodes", "2", "--cpus", "64", "--for"])
            .arg(std::process::id().to_string())
            .arg("--dir")
            .arg(dir.path().join("slurm"))
            .stdout(Stdio::null())
            .status()
            .expect("tests/beds/slurm");
        assert!(status.success(), "the Slurm bed does not start");
        Self(dir)
    }

    /// Gives the backend's table.
    fn config(&self, queued: bool, dir: &Path) -> String {
        let conf: PathBuf = self.0.path().join("slurm/etc/slurm.conf");
        let partition = if queued { "closed" } else { "ci" };
        format!(
            "kind = \"slurm\"\nslurm_conf = \"{}\"\npartition = \"{partition}\"\njobs_dir = \"{}/jobs\"",
            conf.display(),
            dir.display()
        )
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        drop(bed().args(["stop", "--dir"]).arg(self.0.path().join("slurm")).status());
    }
}

fn bed() -> Command {
    Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/beds/slurm"))
}

/// The daemon, ended with the benchmark.
struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

impl Daemon {
    /// Seconds of CPU: its own, and that of the commands it ran and waited for.
    fn cpu(&self) -> (f64, f64) {
        let stat =
            std::fs::read_to_string(format!("/proc/{}/stat", self.0.id())).unwrap_or_default();
        let fields: Vec<f64> = stat
            .rsplit_once(") ")
            .map(|(_, rest)| rest.split(' ').map(|f| f.parse().unwrap_or(0.0)).collect())
            .unwrap_or_default();
        let field = |n: usize| fields.get(n - 3).copied().unwrap_or(0.0) / 100.0;
        (field(14) + field(15), field(16) + field(17))
    }

    fn memory_mib(&self, key: &str) -> f64 {
        let status =
            std::fs::read_to_string(format!("/proc/{}/status", self.0.id())).unwrap_or_default();
        status
            .lines()
            .find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))
            .and_then(|kib| kib.trim().trim_end_matches(" kB").parse::<f64>().ok())
            .map_or(0.0, |kib| kib / 1024.0)
    }
}

/// Reads the daemon's metrics from its Unix socket: name with labels → value.
fn metrics(socket: &Path) -> BTreeMap<String, f64> {
    let mut text = String::new();
    let asked = UnixStream::connect(socket).and_then(|mut stream| {
        stream.write_all(b"GET /metrics HTTP/1.0\r\nHost: bridge\r\n\r\n")?;
        stream.read_to_string(&mut text)
    });
    asked.expect("the daemon's metrics");
    text.lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| {
            let (name, value) = line.rsplit_once(' ')?;
            Some((name.to_owned(), value.parse().ok()?))
        })
        .collect()
}

fn sum(metrics: &BTreeMap<String, f64>, name: &str, having: &str) -> f64 {
    metrics
        .iter()
        .filter(|(key, _)| key.split('{').next() == Some(name) && key.contains(having))
        .map(|(_, value)| value)
        .sum()
}

fn percentile(sorted: &[f64], share: f64) -> f64 {
    if sorted.is_empty() {
        return f64::NAN;
    }
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "an index into a list that fits into memory"
    )]
    let at = ((sorted.len() - 1) as f64 * share).round() as usize;
    sorted[at]
}

fn millis(mut seconds: Vec<f64>) -> Value {
    seconds.sort_by(f64::total_cmp);
    let ms = |share| (percentile(&seconds, share) * 1000.0).round();
    json!({ "median_ms": ms(0.5), "p99_ms": ms(0.99), "max_ms": ms(1.0), "n": seconds.len() })
}

fn unix(at: SystemTime) -> f64 {
    at.duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

fn main() {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    runtime.block_on(run(args()));
}

async fn run(args: Args) {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = dir.path();
    let cluster = (args.backend == "slurm").then(Cluster::start);
    let grid = match args.backend.as_str() {
        "dirac" => Some(dirac::Grid::start(args.slots).await),
        _ => None,
    };
    let mut options = Options { keep_traces: false, ..Options::default() };
    options.knobs.long_poll = None;
    let gitlab = Coordinator::start(options).await.expect("a coordinator");
    #[expect(clippy::disallowed_methods, reason = "a benchmark reads the machine's clock")]
    let began = unix(SystemTime::now()) - gitlab.now().as_secs_f64();
    let token = gitlab.add_runner(RunnerOptions::default());
    let (config, socket, ends) =
        (path.join("config.toml"), path.join("http.sock"), path.join("ends"));
    std::fs::create_dir(&ends).expect("a folder");
    let backend = match (&cluster, &grid) {
        (Some(cluster), _) => cluster.config(args.queued, path),
        (None, Some(grid)) => grid.config(),
        (None, None) => format!("kind = \"local\"\njobs_dir = \"{}/jobs\"", path.display()),
    };
    write_config(&config, path, &args, &backend, &gitlab.url(), &token, &socket);
    let child = Command::new(env!("CARGO_BIN_EXE_bridge"))
        .arg("--config")
        .arg(&config)
        .args(["--log-level", "warn", "serve"])
        // Jobs run in login shells; what this machine's user has in his profile is not measured.
        .env("HOME", path)
        .stdin(Stdio::null())
        .spawn()
        .expect("the daemon");
    let daemon = Daemon(child);
    wait("the daemon's socket", Duration::from_secs(30), || socket.exists()).await;
    let started = Instant::now();
    let ids: Vec<i64> = (0..args.jobs)
        .map(|n| {
            gitlab.enqueue(
                NewJob::new(format!("load {n}"))
                    .script(format!("echo $EPOCHREALTIME > {}/$CI_JOB_ID", ends.display()))
                    .timeout(Duration::from_secs(24 * 3600))
                    .env("GIT_STRATEGY", "none"),
            )
        })
        .collect();
    if args.queued {
        queued(&args, &gitlab, &daemon, &socket, started).await;
        return;
    }
    let mut memory = Vec::new();
    let counts = {
        let mut finished = std::pin::pin!(gitlab.wait_all_finished(Duration::from_secs(3600)));
        loop {
            // What is waited for is polled again where it stopped.
            tokio::select! {
                counts = &mut finished => break counts,
                () = tokio::time::sleep(Duration::from_secs(1)) => {}
            }
            memory.push((gitlab.counts().success, daemon.memory_mib("VmRSS")));
        }
    };
    let counts = counts.unwrap_or_else(|counts| panic!("not all jobs ended: {counts:?}"));
    let took = started.elapsed().as_secs_f64();
    let found = metrics(&socket);
    let rows = rows(&config);
    let (mut to_submitted, mut to_reported) = (Vec::new(), Vec::new());
    let told = match &grid {
        Some(grid) => grid.told().await,
        None => BTreeMap::new(),
    };
    let mut parts = Parts::default();
    for id in &ids {
        let Some(job) = gitlab.job(*id) else { continue };
        assert_eq!(job.status, Status::Success, "{job:?}");
        let assigned = job.assigned_at.map_or(f64::NAN, |at| began + at.as_secs_f64());
        let finished = job.finished_at.map_or(f64::NAN, |at| began + at.as_secs_f64());
        if let Some(row) = rows.get(id) {
            to_submitted.push(row.submitted - assigned);
        }
        if let Some(Row { submitted, seen: Some(seen), there: Some(there) }) = rows.get(id)
            && let Some((began, ended)) = told.get(there)
        {
            parts.add(&[assigned, *submitted, *began, *ended, *seen, finished]);
        }
        if let Ok(text) = std::fs::read_to_string(ends.join(id.to_string()))
            && let Ok(ended) = text.trim().replace(',', ".").parse::<f64>()
        {
            to_reported.push(finished - ended);
        }
    }
    #[expect(clippy::cast_precision_loss, reason = "a count of jobs")]
    let jobs = args.jobs as f64;
    let (own, commands) = daemon.cpu();
    let sweeps = sum(&found, "bridge_sweep_duration_seconds_count", "");
    let mut report = json!({
        "backend": args.backend,
        "jobs": args.jobs,
        "counts": format!("{counts:?}"),
        "seconds": round(took),
        "jobs_per_s": round(jobs / took),
        "request_to_submitted": millis(to_submitted),
        "ended_to_reported": millis(to_reported),
        "daemon_peak_mib": round(daemon.memory_mib("VmHWM")),
        "daemon_rss_mib_after_jobs": memory_after(&memory, args.jobs),
        "daemon_cpu_s_per_job": round4(own / jobs),
        "commands_cpu_s_per_job": round4(commands / jobs),
        "sweeps": sweeps,
        "polls": sum(&found, "bridge_backend_calls_total", "verb=\"poll\""),
        "backend_calls_by_verb": by_verb(&found),
        "db_transactions_per_job": round(sum(&found, "bridge_store_transactions_total", "") / jobs),
    });
    if let Some(grid) = &grid {
        let asked = grid.asked();
        #[expect(clippy::cast_precision_loss, reason = "a count of requests")]
        let total = asked.values().sum::<usize>() as f64;
        let polls = sum(&found, "bridge_backend_calls_total", "verb=\"poll\"");
        report["dirac"] = json!({
            "slots": args.slots,
            "requests": asked,
            "requests_in_all": total,
            "requests_per_job": round(total / jobs),
            "cycles": polls,
            "parts_of_a_job": parts.report(),
        });
    }
    println!("{}", serde_json::to_string_pretty(&report).expect("plain values"));
    gitlab.stop().await;
}

/// Where the time of jobs goes.
#[derive(Default)]
struct Parts([Vec<f64>; 5]);

impl Parts {
    /// Notes when GitLab gave a job, when it was submitted, began and ended over there, when its end was
    /// seen, and when GitLab knew.
    fn add(&mut self, times: &[f64; 6]) {
        for (part, pair) in self.0.iter_mut().zip(times.windows(2)) {
            if let [from, to] = pair {
                part.push(to - from);
            }
        }
    }

    fn report(self) -> Value {
        let sum = |part: &Vec<f64>| part.iter().sum::<f64>();
        let whole: f64 = self.0.iter().map(sum).sum();
        let share = |part: &Vec<f64>| round(sum(part) / whole * 100.0);
        let [submitting, waiting, running, noticing, reporting] = &self.0;
        json!({
            "bridge_percent": round((sum(submitting) + sum(noticing) + sum(reporting)) / whole * 100.0),
            "given_to_submitted": [millis(submitting.clone()), share(submitting)],
            "submitted_to_begun": [millis(waiting.clone()), share(waiting)],
            "begun_to_ended": [millis(running.clone()), share(running)],
            "ended_to_seen": [millis(noticing.clone()), share(noticing)],
            "seen_to_green": [millis(reporting.clone()), share(reporting)],
        })
    }
}

/// The daemon's memory after a sixth, a half and all of the jobs.
fn memory_after(samples: &[(usize, f64)], jobs: usize) -> Value {
    let after = |count: usize| {
        let sample = samples.iter().find(|(finished, _)| *finished >= count).or(samples.last());
        sample.map_or(f64::NAN, |(_, mib)| round(*mib))
    };
    [jobs / 6, jobs / 2, jobs]
        .into_iter()
        .map(|count| (count.to_string(), json!(after(count))))
        .collect::<serde_json::Map<_, _>>()
        .into()
}

/// What it costs to keep jobs waiting.
async fn queued(
    args: &Args,
    gitlab: &Coordinator,
    daemon: &Daemon,
    socket: &Path,
    started: Instant,
) {
    let submitted = |n: usize| {
        #[expect(clippy::cast_precision_loss, reason = "a count of jobs")]
        let wanted = n as f64;
        sum(&metrics(socket), "bridge_jobs", "state=\"submitted\"") >= wanted
    };
    wait("all jobs to be submitted", Duration::from_secs(3600), || submitted(args.jobs)).await;
    let submitting = started.elapsed().as_secs_f64();
    // The burst's own work is over a little later.
    tokio::time::sleep(Duration::from_secs(20)).await;
    let (before, calls) = (daemon.cpu(), metrics(socket));
    let touched = gitlab.requests().total();
    tokio::time::sleep(IDLE).await;
    let (after, calls_after) = (daemon.cpu(), metrics(socket));
    let polls = |of: &BTreeMap<String, f64>| sum(of, "bridge_backend_calls_total", "verb=\"poll\"");
    let sweeps = |of: &BTreeMap<String, f64>| sum(of, "bridge_sweep_duration_seconds_count", "");
    let report = json!({
        "backend": args.backend,
        "queued_jobs": args.jobs,
        "seconds_to_submit_all": round(submitting),
        "watched_s": IDLE.as_secs(),
        "daemon_rss_mib": round(daemon.memory_mib("VmRSS")),
        "daemon_peak_mib": round(daemon.memory_mib("VmHWM")),
        "daemon_cpu_percent_of_a_core": round4((after.0 - before.0) / IDLE.as_secs_f64() * 100.0),
        "commands_cpu_percent_of_a_core": round4((after.1 - before.1) / IDLE.as_secs_f64() * 100.0),
        "polls": polls(&calls_after) - polls(&calls),
        "sweeps": sweeps(&calls_after) - sweeps(&calls),
        "calls_to_gitlab": gitlab.requests().total() - touched,
    });
    println!("{}", serde_json::to_string_pretty(&report).expect("plain values"));
}

fn by_verb(metrics: &BTreeMap<String, f64>) -> Value {
    let verbs = ["check", "submit", "find", "poll", "read_log", "cancel", "release"];
    let count = |verb| sum(metrics, "bridge_backend_calls_total", &format!("verb=\"{verb}\""));
    verbs
        .into_iter()
        .map(|verb| (verb.to_owned(), json!(count(verb))))
        .collect::<serde_json::Map<_, _>>()
        .into()
}

/// What bridge knows of a job.
struct Row {
    submitted: f64,
    /// When its end was seen.
    seen: Option<f64>,
    /// Its number in DIRAC.
    there: Option<u64>,
}

/// Gives what bridge knows of its jobs, by GitLab's number.
fn rows(config: &Path) -> BTreeMap<i64, Row> {
    let output = Command::new(env!("CARGO_BIN_EXE_bridge"))
        .arg("--config")
        .arg(config)
        .args(["jobs", "list", "--json", "--limit", "1000000"])
        .stdin(Stdio::null())
        .output()
        .expect("bridge jobs list");
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| {
            let row: Value = serde_json::from_str(line).ok()?;
            let time = |key: &str| {
                let at: jiff::Timestamp = row[key].as_str()?.parse().ok()?;
                Some(at.as_duration().as_secs_f64())
            };
            let there = row["external_id"].as_str().and_then(|id| id.parse().ok());
            let (submitted, seen) = (time("submitted_at")?, time("ended_at"));
            Some((row["ci_job"].as_i64()?, Row { submitted, seen, there }))
        })
        .collect()
}

fn write_config(
    config: &Path,
    dir: &Path,
    args: &Args,
    backend: &str,
    url: &str,
    token: &str,
    socket: &Path,
) {
    use std::os::unix::fs::OpenOptionsExt as _;
    let all = args.queued || args.backend == "dirac";
    let concurrent = if all { args.jobs + 100 } else { 200 };
    let dir = dir.display();
    let text = format!(
        "state_dir = \"{dir}/state\"\nconcurrent = {concurrent}\ncheck_interval = \"1s\"\n\
         listen_address = \"unix:{}\"\n\n[[runners]]\nname = \"load\"\nurl = \"{url}\"\n\
         token = \"{token}\"\nbackend = \"b\"\nbuilds_dir = \"{dir}/builds\"\n\
         cache_dir = \"{dir}/cache\"\n\n[backends.b]\n{backend}\n",
        socket.display()
    );
    let mut file = std::fs::OpenOptions::new()
        .create_new(true)
        .write(true)
        .mode(0o600)
        .open(config)
        .expect("the configuration");
    file.write_all(text.as_bytes()).expect("the configuration");
}

async fn wait(what: &str, within: Duration, mut holds: impl FnMut() -> bool) {
    let started = Instant::now();
    while !holds() {
        assert!(started.elapsed() < within, "waited in vain for {what}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

fn round(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

fn round4(value: f64) -> f64 {
    (value * 10_000.0).round() / 10_000.0
}
