//! The benchmark of getting sources: processes, bytes from the server, time.
//!
//! `cargo bench --bench sources [-- --megabytes N]`
//!
//! A project is served by the coordinator over HTTP; sources are got as the daemon gets them. Prints one
//! line of JSON per case. Bytes are those of the server's answers, without headers.

#![expect(
    clippy::panic,
    clippy::print_stdout,
    reason = "a benchmark prints, and ends when it cannot go on"
)]

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use bridge::coordinator::{Coordinator, Git, NewJob, Options, RunnerOptions};
use bridge::gitlab::wire::JobPayload;
use bridge::gitlab::{Client, ClientOptions, Info, InfoOptions, RequestReply, Secret};
use bridge::job::{self, Mirrors, Output, RunnerContext, Slot, Tone};
use camino::Utf8PathBuf;
use serde_json::json;

const PROJECT: &str = "hep/tracker";

struct Quiet;

impl Output for Quiet {
    fn bytes(&mut self, _bytes: &[u8]) {}
    fn remark(&mut self, tone: Tone, text: &str) {
        assert!(tone == Tone::Notice, "{text}");
    }
}

struct Bench {
    gitlab: Coordinator,
    client: Client,
    token: Secret,
    runner: RunnerContext,
    mirrors: Mirrors,
}

fn git(dir: &Path, args: &[&str]) {
    let status = Command::new("git")
        .args(["-c", "user.name=t", "-c", "user.email=t@example.org", "-C"])
        .arg(dir)
        .args(args)
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .status()
        .expect("git starts");
    assert!(status.success(), "git {args:?}");
}

/// Files that do not compress, as data in repositories seldom does.
fn fill(dir: &Path, megabytes: usize, mut seed: u64) {
    for file in 0..megabytes * 10 {
        let mut bytes = Vec::with_capacity(100 * 1024);
        while bytes.len() < 100 * 1024 {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            bytes.extend_from_slice(&seed.to_le_bytes());
        }
        std::fs::write(dir.join(format!("file-{file}")), bytes).expect("a file can be written");
    }
}

impl Bench {
    async fn payload(&self, strategy: &str, depth: u32) -> JobPayload {
        let source = Git { depth, ..Git::default() };
        let job = NewJob::new("build").project(PROJECT, 77).env("GIT_STRATEGY", strategy);
        self.gitlab.enqueue(job.git(source));
        let info = Info::new(InfoOptions { name: "bridge".into(), ..InfoOptions::default() });
        let asked = self.client.request_job(&self.token, "s_0123456789ab", &info, None).await;
        let Ok(RequestReply::Job(job)) = asked else { panic!("no job") };
        job.payload
    }

    async fn measure(&self, case: &str, mirrors: bool, strategy: &str, depth: u32) {
        let payload = self.payload(strategy, depth).await;
        let mut runner = self.runner.clone();
        runner.mirrors = mirrors.then(|| self.mirrors.clone());
        let plan = job::plan(&payload, &runner, Slot::default()).expect("the job can be run");
        let before = self.gitlab.git_traffic(PROJECT);
        let start = Instant::now();
        plan.get_sources(&mut Quiet).await.expect("sources can be got");
        let elapsed = start.elapsed();
        let after = self.gitlab.git_traffic(PROJECT);
        let line = json!({
            "case": case,
            "git_processes": plan.git_started(),
            "requests": after.requests - before.requests,
            "packs": after.packs - before.packs,
            "bytes": after.sent - before.sent,
            "milliseconds": elapsed.as_millis(),
        });
        println!("{line}");
    }
}

fn megabytes() -> usize {
    let mut words = std::env::args().skip(1);
    let mut megabytes = 50;
    while let Some(word) = words.next() {
        match word.as_str() {
            "--megabytes" => {
                megabytes = words.next().and_then(|n| n.parse().ok()).expect("--megabytes N");
            }
            // cargo's own.
            "--bench" => {}
            other => panic!("unknown option {other}"),
        }
    }
    megabytes
}

fn context(root: &Utf8PathBuf, url: &str) -> RunnerContext {
    RunnerContext {
        short_token: "short".into(),
        system_id: "s_0123456789ab".into(),
        version: env!("CARGO_PKG_VERSION").into(),
        ..RunnerContext::new("main", url.parse().expect("a URL"), root.join("builds"))
    }
}

#[tokio::main]
async fn main() {
    let installed = rustls::crypto::ring::default_provider().install_default();
    assert!(installed.is_ok(), "TLS is set up once");
    let megabytes = megabytes();
    let dir = tempfile::tempdir().expect("a temporary folder");
    let root = Utf8PathBuf::from_path_buf(dir.path().to_owned()).expect("its name is UTF-8");
    let origin = dir.path().join("origin");
    std::fs::create_dir(&origin).expect("a folder can be made");
    git(&origin, &["init", "--quiet"]);
    fill(&origin, megabytes, 88_172_645_463_325_252);
    git(&origin, &["add", "."]);
    git(&origin, &["commit", "--quiet", "-m", "one"]);

    let gitlab = Coordinator::start(Options::default()).await.expect("a coordinator");
    let token = Secret::new(gitlab.add_runner(RunnerOptions::default()));
    gitlab.serve_repository(PROJECT, &origin).await.expect("the project can be served");
    let url = gitlab.url();
    let client = Client::new(ClientOptions::new(url.parse().expect("a URL"))).expect("a client");
    let keep = Duration::from_secs(3600);
    let mirrors = Mirrors { dir: root.join("mirrors"), keep };
    let bench = Bench { gitlab, client, token, runner: context(&root, &url), mirrors };

    bench.measure("clone from the server", false, "clone", 20).await;
    bench.measure("fetch, up to date, from the server", false, "fetch", 20).await;
    bench.measure("clone through a new mirror", true, "clone", 20).await;
    bench.measure("clone through the mirror", true, "clone", 20).await;
    bench.measure("clone of the whole history through the mirror", true, "clone", 0).await;
    bench.measure("fetch, up to date, through the mirror", true, "fetch", 0).await;

    std::fs::write(origin.join("file-0"), "changed").expect("a file can be written");
    git(&origin, &["commit", "--quiet", "-a", "-m", "two"]);
    bench.gitlab.serve_repository(PROJECT, &origin).await.expect("the project can be served");
    bench.measure("fetch of a new commit through the mirror", true, "fetch", 0).await;
    bench.measure("fetch of the same commit through the mirror", true, "fetch", 0).await;
    bench.gitlab.stop().await;
}
