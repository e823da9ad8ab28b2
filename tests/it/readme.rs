//! The README, word by word: every command in it is run, every file in it is read.
//!
//! Paths, the instance and job numbers are replaced by those of a sandbox; programs that need root or a
//! service manager are replaced by small ones that do the same to the sandbox. Nothing else differs.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::time::Instant;

use bridge::coordinator::{AccessToken, Coordinator, NewJob, Options, RunnerOptions, Status};

use crate::support::grid::{self, Grid};
use crate::support::slurm::{self, Cluster};
use crate::support::{BRIDGE, PATIENCE, until, write_private};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Gives the fenced blocks of a language, in order.
fn blocks(language: &str) -> Vec<String> {
    let text = std::fs::read_to_string(root().join("README.md")).unwrap();
    let mut blocks = Vec::new();
    let mut open: Option<(bool, String)> = None;
    for line in text.lines() {
        match (&mut open, line.strip_prefix("```")) {
            (None, Some(word)) => open = Some((word == language, String::new())),
            (Some(_), Some(_)) => {
                blocks.extend(open.take().filter(|(wanted, _)| *wanted).map(|(_, text)| text));
            }
            (Some((_, block)), None) => {
                block.push_str(line);
                block.push('\n');
            }
            (None, None) => {}
        }
    }
    assert!(open.is_none(), "a block of the README has no end");
    blocks
}

/// What a command of the README must do.
enum Expect {
    /// Exit with 0 and print this on one of its outputs.
    Says(&'static str),
    /// Exit with 0.
    Works,
}

use Expect::{Says, Works};

/// Every line of every `sh` block, in the order of the README.
const LINES: &[(&str, Expect)] = &[
    ("cargo run --release -- exec examples/hello", Says("Pipeline passed with warnings")),
    (
        "cargo run --release -- exec --backend slurm examples/hello",
        Says("Pipeline passed with warnings"),
    ),
    ("cargo run --release -- exec --list examples/hello", Says("may fail with 42")),
    ("cargo run --release -- exec --job everybody examples/hello", Says("Pipeline passed")),
    ("cargo build --release", Works),
    ("sudo install -m 755 target/release/bridge /usr/local/bin/bridge", Works),
    ("sudo install -d -o bridge -g bridge -m 700 /etc/bridge", Works),
    ("export BRIDGE_CONFIG=/etc/bridge/config.toml", Works),
    (
        "bridge register --url https://gitlab.example.org --token-file token --name cluster \
         --backend cluster --builds-dir /shared/bridge/builds",
        Says("registered \"cluster\""),
    ),
    ("rm token", Works),
    ("bridge doctor", Says("token")),
    ("bridge exec --backend grid examples/hello", Says("Pipeline passed with warnings")),
    ("sudo systemctl daemon-reload", Works),
    ("sudo systemctl enable --now bridge", Works),
    ("sudo systemctl reload bridge", Works),
    ("bridge jobs list --owed", Says("running")),
    ("bridge jobs list --since 2h --project hep/tracker --json", Says("\"ci_job\":1000")),
    ("bridge jobs show 1000", Says("reported")),
    ("bridge jobs trace -f 1000", Says("Job succeeded")),
    ("bridge jobs cancel 1001", Says("will be cancelled by the daemon")),
    ("bridge runners list", Says("cluster")),
    ("bridge runners verify", Says("valid")),
    ("bridge backends list", Says("cluster")),
    ("bridge backends check", Says("ok")),
    ("bridge db check", Says("no damage found")),
    ("curl --silent http://127.0.0.1:9252/health", Says("ok")),
    ("curl --silent http://127.0.0.1:9252/metrics", Says("gitlab_runner_jobs_total")),
    (
        "bridge runners create --group 42 --name tests --backend cluster --builds-dir \
         /shared/bridge/builds --pat-file pat",
        Says("created \"tests\" (runner #2"),
    ),
    ("bridge runners list --owned --pat-file pat", Says("cluster")),
    ("bridge runners show cluster --managers --pat-file pat", Says("online")),
    (
        "bridge runners edit cluster --description \"the cluster\" --maximum-timeout \"2 days\" \
         --pat-file pat",
        Says("172800 s"),
    ),
    ("bridge runners pause cluster --pat-file pat", Says("yes")),
    ("bridge runners resume cluster --pat-file pat", Says("no")),
    ("bridge runners jobs cluster --orphans --pat-file pat", Says("ORPHAN")),
    ("bridge runners rotate cluster", Says("has a new token")),
    ("bridge db backup /etc/bridge/before.db", Says("copied to")),
    ("sudo install -m 755 target/release/bridge /usr/local/bin/bridge", Works),
    ("sudo systemctl restart bridge", Works),
    ("sudo systemctl stop bridge", Works),
    ("rm -f /var/lib/bridge/bridge.db-wal /var/lib/bridge/bridge.db-shm", Works),
    ("install -m 600 /etc/bridge/before.db /var/lib/bridge/bridge.db", Works),
    ("sudo systemctl start bridge", Works),
    ("bridge db prune --older-than \"7 days\"", Says("0 jobs removed")),
    ("bridge runners unregister cluster", Says("removed \"cluster\"")),
];

/// The README's machine: its paths below a folder, its service, its GitLab.
struct Sandbox {
    dir: tempfile::TempDir,
    gitlab: Coordinator,
    cluster: Option<Cluster>,
    grid: Option<Arc<Grid>>,
    daemon: Option<Child>,
    environment: BTreeMap<String, String>,
}

impl Sandbox {
    async fn new(cluster: Option<Cluster>, grid: Option<Arc<Grid>>) -> Self {
        let dir = tempfile::Builder::new().prefix("bridge-readme-").tempdir().unwrap();
        let gitlab = Coordinator::start(Options::default()).await.unwrap();
        let sandbox =
            Self { dir, gitlab, cluster, grid, daemon: None, environment: BTreeMap::new() };
        for place in ["bin", "etc", "shared", "tmp", "var", "work", "home"] {
            std::fs::create_dir(sandbox.path(place)).unwrap();
        }
        for (name, script) in [
            // Not everybody may become root, and the account `bridge` is not on this machine.
            ("sudo", "exec \"$@\""),
            (
                "install",
                "args=(); while [ $# -gt 0 ]; do\n\
                 case $1 in -o|-g) shift 2;; *) args+=(\"$1\"); shift;; esac\n\
                 done; exec /usr/bin/install \"${args[@]}\"",
            ),
            (
                "cargo",
                "case $1 in\n\
                 build) exit 0;;\n\
                 run) while [ \"$1\" != -- ]; do shift; done; shift; exec \"$BUILT\" \"$@\";;\n\
                 esac; exit 99",
            ),
        ] {
            let path = sandbox.path("bin").join(name);
            std::fs::write(&path, format!("#!/bin/bash\n{script}\n")).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        }
        sandbox
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Moves the README's machine into the sandbox.
    fn moved(&self, text: &str) -> String {
        let here = |name: &str| self.path(name).display().to_string();
        let mut text = text
            .replace("/usr/local/bin", &here("bin"))
            .replace("/etc/bridge", &here("etc/bridge"))
            .replace("/var/lib/bridge", &here("var/bridge"))
            .replace("/shared/bridge", &here("shared"))
            .replace("target/release/bridge", BRIDGE)
            .replace("https://gitlab.example.org", &self.gitlab.url());
        if self.cluster.is_none() {
            text = text
                .replace("--backend slurm", "--backend local")
                .replace("kind = \"slurm\"", "kind = \"local\"")
                .replace("partition = \"ci\"", "");
        }
        match &self.grid {
            Some(grid) => {
                let token = grid.token_file().display().to_string();
                text.replace("https://diracx.example.org", grid.url())
                    .replace(&here("etc/bridge/grid.token"), &token)
            }
            None => text.replace("--backend grid", "--backend cluster"),
        }
    }

    fn command(&self, line: &str) -> Output {
        let path =
            format!("{}:{}", self.path("bin").display(), std::env::var("PATH").unwrap_or_default());
        let mut command = Command::new("bash");
        command
            .args(["-c", line])
            .envs(&self.environment)
            .env("PATH", path)
            .env("HOME", self.path("home"))
            .env("TMPDIR", self.path("tmp"))
            .env("BUILT", BRIDGE)
            // The README's reader builds in the checkout, and has left it when he configures.
            .current_dir(if line.starts_with("cargo ") || line.ends_with("examples/hello") {
                root().to_owned()
            } else {
                self.path("work")
            })
            .stdin(Stdio::null());
        if let Some(cluster) = &self.cluster {
            command.env("SLURM_CONF", cluster.conf());
        }
        command.output().unwrap()
    }

    /// Does to the sandbox's daemon what systemd would do by the unit.
    async fn systemctl(&mut self, words: &[&str]) {
        match words {
            ["daemon-reload"] => {}
            ["enable", "--now", "bridge"] | ["start", "bridge"] => self.start().await,
            ["reload", "bridge"] => {
                self.signal("HUP");
                self.logged("the configuration was read again").await;
            }
            ["restart", "bridge"] => {
                self.stop().await;
                self.start().await;
            }
            ["stop", "bridge"] => self.stop().await,
            other => panic!("no systemctl {other:?}"),
        }
    }

    async fn start(&mut self) {
        assert!(self.daemon.is_none());
        let unit = blocks("ini").concat();
        let start = unit.lines().find_map(|line| line.strip_prefix("ExecStart=")).unwrap();
        let log = std::fs::File::create(self.path("log")).unwrap();
        let mut command = Command::new("bash");
        command
            .args(["-c", &format!("exec {}", self.moved(start))])
            .stdin(Stdio::null())
            .stderr(log);
        if let Some(cluster) = &self.cluster {
            command.env("SLURM_CONF", cluster.conf());
        }
        self.daemon = Some(command.spawn().unwrap());
        self.logged("bridge serves").await;
    }

    async fn stop(&mut self) {
        self.signal("TERM");
        let mut daemon = self.daemon.take().unwrap();
        let started = Instant::now();
        while daemon.try_wait().unwrap().is_none() {
            assert!(started.elapsed() < PATIENCE, "the daemon does not stop");
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    }

    fn signal(&self, name: &str) {
        let pid = self.daemon.as_ref().unwrap().id().to_string();
        assert!(Command::new("kill").args(["-s", name, &pid]).status().unwrap().success());
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    async fn logged(&self, text: &str) {
        until(text, || self.log().contains(text).then_some(())).await;
    }

    /// Where the daemon listens, since its port in the README may be taken here.
    fn address(&self) -> String {
        let log = self.log();
        let line = log.lines().find(|line| line.contains("metrics and health are served"));
        let line: serde_json::Value = serde_json::from_str(line.unwrap()).unwrap();
        line["address"].as_str().unwrap().to_owned()
    }

    /// What must be there before a line is run, as the README's prose says.
    async fn before(&mut self, line: &str) {
        if line.starts_with("bridge register") {
            let config = self.moved(&blocks("toml")[0]).replace(":9252", ":0");
            write_private(&self.path("etc/bridge/config.toml"), &config);
            let token = self.gitlab.add_runner(RunnerOptions::default());
            write_private(&self.path("work/token"), &token);
        }
        if line.starts_with("bridge exec --backend grid") && self.grid.is_some() {
            let config = self.path("etc/bridge/config.toml");
            let text = std::fs::read_to_string(&config).unwrap();
            let grid = blocks("toml").into_iter().find(|block| block.contains("[backends.grid]"));
            write_private(&config, &format!("{text}\n{}", self.moved(&grid.unwrap())));
        }
        if line == "bridge jobs list --owed" {
            let job = |name: &str| NewJob::new(name).env("GIT_STRATEGY", "none");
            assert_eq!(self.gitlab.enqueue(job("first").script("echo first")), 1000);
            assert_eq!(self.gitlab.enqueue(job("second").script("sleep 600")), 1001);
            self.finished(1000).await;
            until("the second job to run", || {
                let rows = self.command("bridge jobs list --owed --state running");
                String::from_utf8_lossy(&rows.stdout).contains("second").then_some(())
            })
            .await;
        }
        if line.starts_with("bridge runners create") {
            self.gitlab.add_group(42, "hep");
            let access = self.gitlab.add_access_token(AccessToken::with(&["api"]).admin());
            write_private(&self.path("work/pat"), &access);
        }
        if line.starts_with("bridge db backup") {
            assert_eq!(self.finished(1001).await, Status::Failed, "it was cancelled");
        }
    }

    async fn finished(&self, id: i64) -> Status {
        match self.gitlab.wait_finished(id, PATIENCE).await {
            Ok(job) => job.status,
            Err(job) => panic!("{job:?}\n{}", self.log()),
        }
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        if let Some(daemon) = &mut self.daemon {
            drop(daemon.kill());
            drop(daemon.wait());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_command_in_the_readme_works() {
    let lines: Vec<String> = blocks("sh").concat().lines().map(str::to_owned).collect();
    let known: Vec<&str> = LINES.iter().map(|(line, _)| *line).collect();
    assert_eq!(lines, known, "the README and this test tell different stories");
    let cluster = if slurm::left_out() { None } else { Some(Cluster::start(&[])) };
    let grid = if grid::left_out() { None } else { Some(Grid::shared()) };
    let mut sandbox = Sandbox::new(cluster, grid).await;
    for (line, expect) in LINES {
        sandbox.before(line).await;
        if let Some(words) = line.strip_prefix("sudo systemctl ") {
            sandbox.systemctl(&words.split(' ').collect::<Vec<_>>()).await;
            continue;
        }
        let mut moved = sandbox.moved(line);
        if let Some((name, value)) =
            moved.strip_prefix("export ").and_then(|words| words.split_once('='))
        {
            sandbox.environment.insert(name.to_owned(), value.to_owned());
            continue;
        }
        if moved.starts_with("curl ") {
            moved = moved.replace("127.0.0.1:9252", &sandbox.address());
        }
        let output = sandbox.command(&moved);
        let said = format!(
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        assert!(output.status.success(), "{moved}\n{said}\n{}", sandbox.log());
        if let Says(text) = expect {
            assert!(said.contains(text), "{moved} does not say {text:?}:\n{said}");
        }
    }
    let violations = sandbox.gitlab.final_violations();
    let jobs = sandbox.gitlab.jobs();
    assert!(violations.is_empty(), "{violations:?}\n{jobs:#?}\n{}", sandbox.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_configuration_in_the_readme_is_accepted() {
    let sandbox = Sandbox::new(None, None).await;
    let config = sandbox.path("config.toml");
    // As it stands, nothing moved: what it names need not exist to be read. But nothing is asked
    // outside of this machine.
    let written =
        blocks("toml").concat().replace("https://diracx.example.org", "http://127.0.0.1:1");
    write_private(&config, &written);
    write_private(&sandbox.path("cluster.token"), "glrt-t3_abcdefghijklmnopqrst");
    let run = |command: &str| {
        let output = sandbox.command(&format!("{BRIDGE} --config {} {command}", config.display()));
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    insta::assert_snapshot!(run("backends list"), @r"
    NAME     KIND   MAX_QUEUED  RUNNERS
    cluster  slurm  50          cluster
    grid     dirac  200         -
    ");
    insta::assert_snapshot!(run("runners list"), @r"
    NAME     URL                         BACKEND  LIMIT  ID  TOKEN
    cluster  https://gitlab.example.org  cluster  -      -   abcdefghi
    ");
    // Keys that are commented out are right as well.
    let all: String = written
        .lines()
        .map(|line| {
            let key = line.strip_prefix("# ").filter(|rest| {
                rest.split_once(" = ").is_some_and(|(key, _)| {
                    !key.is_empty() && key.bytes().all(|b| b.is_ascii_lowercase() || b == b'_')
                })
            });
            format!("{}\n", key.unwrap_or(line))
        })
        .collect();
    assert!(all.contains("\nqos = "), "{all}");
    let authority = concat!(env!("CARGO_MANIFEST_DIR"), "/src/gitlab/testdata/ca.pem");
    let all = all.replace("/etc/bridge/grid-ca.pem", authority);
    write_private(&config, &all);
    run("backends list");
    // The backend's own keys are its driver's to judge, which `check` asks to open it.
    let output = sandbox.command(&format!("{BRIDGE} --config {} backends check", config.display()));
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_ne!(output.status.code(), Some(7), "{said}");
}

#[test]
fn the_unit_in_the_readme_is_one_that_systemd_takes() {
    let units = blocks("ini");
    let [unit] = units.as_slice() else { panic!("one unit, not {}", units.len()) };
    let mut section = "";
    let mut keys = BTreeMap::new();
    for line in unit.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            section = name;
            continue;
        }
        let (key, value) = line.split_once('=').unwrap();
        assert!(keys.insert((section, key), value).is_none(), "{key} twice");
    }
    for (key, value) in [
        ("Type", "notify"),
        ("KillMode", "process"),
        ("Restart", "always"),
        ("ExecReload", "/bin/kill -HUP $MAINPID"),
        ("StateDirectory", "bridge"),
    ] {
        assert_eq!(keys.get(&("Service", key)), Some(&value), "{key}");
    }
    assert!(keys.contains_key(&("Service", "WatchdogSec")));
    let analyze = Command::new("systemd-analyze").arg("--version").output();
    if !analyze.is_ok_and(|output| output.status.success()) {
        println!("systemd-analyze is not there; the unit was only read");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bridge.service");
    // The program is not installed here, and systemd looks for it.
    std::fs::write(&path, unit.replace("/usr/local/bin/bridge", BRIDGE)).unwrap();
    let output = Command::new("systemd-analyze").arg("verify").arg(&path).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    assert!(!said.contains("bridge.service"), "{said}");
}
