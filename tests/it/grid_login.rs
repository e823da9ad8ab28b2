//! Logins at a real DiracX: a person lets bridge in, a login is lost while jobs wait, and is mended.

use std::io::{BufRead as _, BufReader, Read as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use bridge::coordinator::{Knobs, Options, Status};
use serde_json::Value;

use crate::support::{BRIDGE, Bed, Where, ask_http, text_of, until, write_private};

/// Says whether the run was asked to do without DIRAC; then the test says so too.
fn left_out() -> bool {
    let without = std::env::var("BRIDGE_TESTS_WITHOUT").unwrap_or_default();
    let left_out = without.split([',', ' ']).any(|bed| bed == "dirac");
    if left_out {
        println!("left out: the run was asked to do without DIRAC");
    }
    left_out
}

/// A DiracX with a site, that ends with the test that holds it.
struct Grid {
    dir: tempfile::TempDir,
    url: String,
}

impl Grid {
    fn start(args: &[&str]) -> Self {
        let dir = tempfile::Builder::new().prefix("bridge-grid-").tempdir().unwrap();
        let output = script()
            .args(["start", "--for", &std::process::id().to_string(), "--dir"])
            .arg(dir.path().join("d"))
            .args(args)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "the DIRAC bed does not start (tests/run --without dirac does without): {}",
            String::from_utf8_lossy(&output.stderr)
        );
        let said = String::from_utf8(output.stdout).unwrap();
        let url = said.lines().find_map(|line| line.strip_prefix("DIRACX_URL=")).unwrap();
        Self { url: url.to_owned(), dir }
    }

    fn ask(&self, args: &[&str]) -> String {
        let output =
            script().args(args).arg("--dir").arg(self.dir.path().join("d")).output().unwrap();
        assert!(output.status.success(), "{args:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// A configuration whose backend `b` is this grid, and a socket for its pages.
    async fn bed(&self, backend: &str) -> Bed {
        let options = Options {
            knobs: Knobs { trace_interval: Some("1".to_owned()), ..Knobs::default() },
            ..Options::default()
        };
        let bed = Bed::new(Where::Local, options, "", "").await;
        let dir = bed.dir.path().display();
        let text = format!(
            "state_dir = \"{dir}/state\"\ncheck_interval = \"100ms\"\nconcurrent = 64\n\
             listen_address = \"{dir}/http.sock\"\n\n\
             [[runners]]\nname = \"main\"\nurl = \"{url}\"\ntoken = \"{token}\"\nbackend = \"b\"\n\
             builds_dir = \"{dir}/builds\"\ncache_dir = \"{dir}/cache\"\n\n\
             [backends.b]\nkind = \"dirac\"\nurl = \"{grid}\"\ntoken_file = \"{dir}/login.json\"\n\
             settle = \"1s\"\nlog_interval = \"1s\"\ncancel_interval = \"1s\"\nkill_grace = \"2s\"\n{backend}\n",
            url = bed.gitlab.url(),
            token = bed.token,
            grid = self.url,
        );
        write_private(&bed.config, &text);
        bed
    }
}

impl Drop for Grid {
    fn drop(&mut self) {
        drop(script().args(["stop", "--dir"]).arg(self.dir.path().join("d")).status());
    }
}

fn script() -> Command {
    Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/beds/dirac"))
}

/// Starts `backends login`, and gives it back with the address that it shows; its output is a pipe.
fn begin_login(bed: &Bed) -> (std::process::Child, BufReader<std::process::ChildStdout>, String) {
    let mut child = Command::new(BRIDGE)
        .arg("--config")
        .arg(&bed.config)
        .args(["backends", "login", "b"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    out.read_line(&mut line).unwrap();
    let Some(address) = line.trim().strip_prefix("Open ") else {
        panic!("{line}{:?}", child.wait_with_output().unwrap())
    };
    (child, out, address.to_owned())
}

/// Logs in as a person would: starts the command, opens the address, waits.
fn log_in(bed: &Bed) -> String {
    let (child, mut out, address) = begin_login(bed);
    let page = Command::new("curl")
        .args(["--silent", "--fail", "--location", "--noproxy", "*", "--output", "/dev/null"])
        .arg(&address)
        .status()
        .unwrap();
    assert!(page.success());
    let mut rest = String::new();
    out.read_to_string(&mut rest).unwrap();
    let ended = child.wait_with_output().unwrap();
    let notes = String::from_utf8_lossy(&ended.stderr).into_owned();
    assert!(ended.status.success(), "{rest}{notes}");
    assert!(rest.contains("Logged in as ci-robot, VO testvo, group user until "), "{rest}");
    assert!(notes.contains("warning: the login ends in "), "an hour is little: {notes}");
    rest
}

fn told(output: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

fn login_file(bed: &Bed) -> PathBuf {
    bed.path("login.json")
}

/// Waits until the daemon's health is this, and gives what it says.
async fn health(bed: &Bed, status: u16) -> String {
    until(&format!("the health to be {status}"), || {
        let (now, body) = ask_http(&bed.path("http.sock"), "/health");
        (now == status).then_some(body)
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_login_is_lost_while_jobs_wait_and_mended_without_a_restart() {
    if left_out() {
        return;
    }
    let grid = Grid::start(&[]);
    let bed = grid.bed("vo = \"testvo\"\ngroup = \"user\"").await;
    // Nobody has logged in yet; that is no reason not to start, and said.
    let missing = bed.run(&["backends", "check", "b"]);
    assert_eq!(missing.status.code(), Some(6), "{}", told(&missing));
    assert!(told(&missing).contains("run `bridge backends login b`"), "{}", told(&missing));
    let _daemon = bed.serve();
    let body = health(&bed, 503).await;
    assert!(body.contains("run `bridge backends login b`"), "{body}");
    log_in(&bed);
    let body = health(&bed, 200).await;
    let warnings: Value = serde_json::from_str(&body).unwrap();
    let warning = warnings["warnings"][0]["what"].as_str().unwrap();
    assert!(warning.contains("the login ends in ") && warning.contains("login b`"), "{warning}");
    let checked = bed.run(&["backends", "check", "b", "--json"]);
    assert!(checked.status.success(), "{}", told(&checked));
    assert!(told(&checked).contains("\"result\":\"warn\""), "{}", told(&checked));

    // One runs while the login is lost, and one comes after that.
    let runs = bed.gitlab.enqueue(
        bed.counting("runs")
            .script("echo before")
            .script(bed.wait_for("gate"))
            .script("echo after"),
    );
    until("the first job to run", || {
        bed.gitlab.job(runs).is_some_and(|job| text_of(&job).contains("before")).then_some(())
    })
    .await;
    let good = std::fs::read_to_string(login_file(&bed)).unwrap();
    let mut lost: Value = serde_json::from_str(&good).unwrap();
    lost["access_token"] = grid.ask(&["token", "ci-robot", "0"]).trim().into();
    spend(&grid, lost["refresh_token"].as_str().unwrap());
    write_private(&login_file(&bed), &lost.to_string());
    let body = health(&bed, 503).await;
    assert!(body.contains("\"whose_move\":\"operator\""), "{body}");
    assert!(body.contains("Revoked refresh token reused"), "{body}");
    assert!(body.contains("run `bridge backends login b`"), "{body}");
    let (_, metrics) = ask_http(&bed.path("http.sock"), "/metrics");
    assert!(metrics.contains("bridge_backend_login_good{backend=\"b\"} 0"), "{metrics}");
    let waits = bed.gitlab.enqueue(bed.counting("waits"));
    let said = "The runner cannot use the backend b now, and its operator must act.";
    until("the author to be told", || {
        bed.gitlab.job(waits).filter(|job| text_of(job).contains(said))
    })
    .await;
    assert_eq!(bed.row(waits)["waits_for"].as_str(), Some("the runner's operator"));
    let doctor = bed.run(&["doctor", "--json"]);
    assert_eq!(doctor.status.code(), Some(6), "{}", told(&doctor));
    let finding = told(&doctor);
    let finding: Value = finding
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .find(|line: &Value| line["check"] == "backend")
        .unwrap();
    assert_eq!((&finding["result"], &finding["whose_move"]), (&"fail".into(), &"operator".into()));
    assert!(finding["detail"].as_str().unwrap().contains("backends login b"), "{finding}");
    for id in [runs, waits] {
        assert!(!bed.gitlab.job(id).unwrap().is_finished(), "{}", bed.log());
    }

    log_in(&bed);
    health(&bed, 200).await;
    bed.open("gate");
    let (runs, waits) = (bed.finished(runs).await, bed.finished(waits).await);
    bed.nothing_owed().await;
    assert!(text_of(&runs).contains("\nbefore\n") && text_of(&runs).contains("\nafter\n"));
    let text = text_of(&waits);
    assert_eq!(text.matches(said).count(), 1, "{text}");
    assert_eq!(text.matches("The runner can use the backend again").count(), 1, "{text}");
    for job in [&runs, &waits] {
        assert_eq!(job.status, Status::Success, "{job:?}");
        bed.assert_once(job.id);
    }
    assert!(!bed.log().contains("\"eyJ"), "no token is logged");
    bed.assert_no_violations();
}

/// Uses a refresh token, as a thief would or another program that does not know of the first.
fn spend(grid: &Grid, refresh: &str) {
    let form =
        format!("grant_type=refresh_token&client_id=myDIRACClientID&refresh_token={refresh}");
    let mut curl = Command::new("curl")
        .args(["--silent", "--fail", "--noproxy", "*", "--output", "/dev/null", "--data", "@-"])
        .arg(format!("{}/api/auth/token", grid.url))
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    std::io::Write::write_all(&mut curl.stdin.take().unwrap(), form.as_bytes()).unwrap();
    assert!(curl.wait().unwrap().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_login_that_is_given_up_or_makes_no_sense_changes_nothing() {
    if left_out() {
        return;
    }
    let grid = Grid::start(&["--no-site"]);
    let bed = grid.bed("vo = \"testvo\"\ngroup = \"user\"").await;
    log_in(&bed);
    let before = std::fs::read_to_string(login_file(&bed)).unwrap();
    let (mut child, mut out, _) = begin_login(&bed);
    assert!(
        Command::new("kill")
            .args(["-s", "INT", &child.id().to_string()])
            .status()
            .unwrap()
            .success()
    );
    let mut rest = String::new();
    out.read_to_string(&mut rest).unwrap();
    let mut notes = String::new();
    child.stderr.take().unwrap().read_to_string(&mut notes).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(1), "{rest}{notes}");
    assert!(notes.contains("it was interrupted; nothing has changed"), "{notes}");
    assert_eq!(std::fs::read_to_string(login_file(&bed)).unwrap(), before);
    let left = std::fs::read_dir(bed.dir.path()).unwrap();
    let left: Vec<_> = left
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .filter(|name| name.contains("login.json"))
        .collect();
    assert_eq!(left, ["login.json"]);
    for (from, to, code, named) in [
        ("vo = \"testvo\"", "vo = \"lhcb\"", 7, "does not know the VO \"lhcb\"; it has: testvo"),
        ("vo = \"lhcb\"", "vo = \"testvo\"\ncolour = \"red\"", 7, "colour"),
        ("colour = \"red\"", "", 0, ""),
        ("group = \"user\"", "group = \"nobody\"", 7, "it has: admin, pilot, user"),
    ] {
        bed.edit_config(from, to);
        if code == 0 {
            continue;
        }
        let output = bed.run(&["backends", "login", "b"]);
        assert_eq!(output.status.code(), Some(code), "{}", told(&output));
        assert!(told(&output).contains(named), "{}", told(&output));
        assert!(told(&output).contains("hint: "), "{}", told(&output));
    }
    // Nobody listens there.
    bed.edit_config(&grid.url, "http://127.0.0.1:1");
    bed.edit_config("group = \"nobody\"", "");
    let output = bed.run(&["backends", "login", "b"]);
    assert_eq!(output.status.code(), Some(6), "{}", told(&output));
    assert!(told(&output).contains("reach the DiracX server"), "{}", told(&output));
    assert_eq!(std::fs::read_to_string(login_file(&bed)).unwrap(), before);
}
