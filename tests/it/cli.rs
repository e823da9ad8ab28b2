//! What an operator can do: look, follow, cancel, check, back up, prune, watch.

use std::io::Read as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use bridge::coordinator::{NewJob, Options, Status, Variable};
use serde_json::Value;

use crate::support::{BRIDGE, Bed, Serve, Where, ask_http, http_over, text_of, until};

const SECRET: &str = "correct-horse-battery-staple";

fn out(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn err(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn json(output: &Output) -> Vec<Value> {
    out(output).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Takes out what differs from run to run.
fn filters(dir: &str) -> Vec<(&str, &'static str)> {
    vec![
        (dir, "DIR"),
        (r"br-[0-9a-z]{26}", "br-[token]"),
        (r"[0-9A-HJKMNP-TV-Z]{26}", "[id]"),
        (r"\d{4}-\d\d-\d\dT[0-9:.]+Z", "[time]"),
        (r"  \d{1,2}s\b *\n", "  [age]\n"),
        (r"  \d{1,2}s\b *", "  [age]  "),
        (r" {2,}", "  "),
        (r"http://127\.0\.0\.1:\d+", "http://gitlab"),
    ]
}

/// A daemon's job that waits behind a gate, and two that are over.
struct Scene {
    bed: Bed,
    daemon: Serve,
    good: i64,
    bad: i64,
    long: i64,
}

impl Scene {
    async fn new() -> Self {
        let bed = Bed::local().await;
        let daemon = bed.serve();
        let good = bed.gitlab.enqueue(
            NewJob::new("good")
                .env("GIT_STRATEGY", "none")
                .variable(Variable::new("PASSWORD", SECRET).masked())
                .script("echo \"the password is $PASSWORD\"; echo good"),
        );
        bed.finished(good).await;
        let bad = bed.gitlab.enqueue(
            NewJob::new("bad")
                .project("hep/other", 78)
                .env("GIT_STRATEGY", "none")
                .script(format!("until [ -e {} ]; do sleep 0.1; done", bed.path("seen").display()))
                .script("exit 3"),
        );
        until("the bad job to be seen running", || {
            (bed.row(bad)["state"] == "running").then_some(())
        })
        .await;
        std::fs::write(bed.path("seen"), "").unwrap();
        bed.finished(bad).await;
        bed.nothing_owed().await;
        let gate = bed.path("gate");
        let long = bed.gitlab.enqueue(
            bed.counting("long")
                .variable(Variable::new("PASSWORD", SECRET).masked())
                .script("echo \"before with $PASSWORD\"")
                .script(format!("until [ -e {} ]; do sleep 0.1; done", gate.display()))
                .script("echo after"),
        );
        until("the job to run", || {
            (bed.runs(long) == 1 && bed.row(long)["state"] == "running").then_some(())
        })
        .await;
        Self { bed, daemon, good, bad, long }
    }

    fn open_the_gate(&self) {
        std::fs::write(self.bed.path("gate"), "").unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_are_listed_shown_and_found_while_the_daemon_runs_and_when_it_does_not() {
    let Scene { bed, daemon, good, bad, long } = Scene::new().await;
    insta::with_settings!({ filters => filters(bed.dir.path().to_str().unwrap()) }, {
        insta::assert_snapshot!(out(&bed.run(&["jobs", "list"])), @r"
        ID  CI JOB  PROJECT  NAME  STATE  BACKEND  EXTERNAL ID  AGE  NOTE
        [id]  1002  hep/tracker  long  running  b  br-[token]  [age]
        [id]  1001  hep/other  bad  finished  b  br-[token]  [age]  script_failure: exit status 3
        [id]  1000  hep/tracker  good  finished  b  br-[token]  [age]  success
        ");
    });
    assert!(daemon.term().await.success());
    insta::with_settings!({ filters => filters(bed.dir.path().to_str().unwrap()) }, {
        insta::assert_snapshot!(out(&bed.run(&["jobs", "list", "--state", "finished"])), @r"
        ID  CI JOB  PROJECT  NAME  STATE  BACKEND  EXTERNAL ID  AGE  NOTE
        [id]  1001  hep/other  bad  finished  b  br-[token]  [age]  script_failure: exit status 3
        [id]  1000  hep/tracker  good  finished  b  br-[token]  [age]  success
        ");
        let shown = out(&bed.run(&["jobs", "show", &bad.to_string()]));
        let (fields, history) = shown.split_once("\n\n").unwrap();
        for field in ["state", "project", "name", "verdict", "submit_token", "workspace", "host"] {
            assert!(fields.lines().any(|line| line.starts_with(&format!("{field} "))), "{shown}");
        }
        let host = String::from_utf8(Command::new("uname").arg("-n").output().unwrap().stdout);
        let host = host.unwrap();
        // A token may happen to hold the host's name.
        let hide = |line: &str| match line.contains(" started ") {
            true => line.replace(host.trim(), "HOST"),
            false => line.to_owned(),
        };
        let history = history.lines().map(hide).collect::<Vec<_>>().join("\n");
        insta::assert_snapshot!(history, @r#"
        AT  ACTOR  EVENT  DETAIL
        [time]  agent  received  -
        [time]  reconciler  attempted  -
        [time]  reconciler  accepted  br-[token]
        [time]  reconciler  started  HOST
        [time]  reconciler  ended  {"outcome":"exited","code":3}
        [time]  reconciler  concluded  {"failure":"script_failure","exit_code":3,"explanation":"exit status 3","cancelled":false}
        [time]  reconciler  reported  -
        [time]  reconciler  released  -
        "#);
    });

    let ids = |args: &[&str]| -> Vec<i64> {
        let args = [&["jobs", "list", "--json"], args].concat();
        json(&bed.run(&args)).iter().map(|row| row["ci_job"].as_i64().unwrap()).collect()
    };
    assert_eq!(ids(&[]), [long, bad, good], "newest first");
    assert_eq!(ids(&["--limit", "1"]), [long]);
    assert_eq!(ids(&["--state", "finished"]), [bad, good]);
    assert_eq!(ids(&["--state", "running", "--state", "finished"]), [long, bad, good]);
    assert_eq!(ids(&["--owed"]), [long]);
    assert_eq!(ids(&["--project", "other"]), [bad]);
    assert_eq!(ids(&["--runner", "main", "--backend", "b"]), [long, bad, good]);
    assert_eq!(ids(&["--runner", "nobody"]), [0_i64; 0]);
    assert_eq!(ids(&["--backend", "nothing"]), [0_i64; 0]);
    assert_eq!(ids(&["--since", "1h"]), [long, bad, good]);
    assert_eq!(ids(&["--since", "2999-01-01T00:00:00Z"]), [0_i64; 0]);

    // GitLab's number, with or without its sign, and our own id in any case are the same job.
    let row = bed.row(good);
    let ours = row["id"].as_str().unwrap();
    let shown = json(&bed.run(&["jobs", "show", "--json", &good.to_string()])).remove(0);
    assert_eq!(shown["id"], ours);
    assert_eq!(shown["verdict"]["failure"], Value::Null);
    let events: Vec<&str> = shown["events"]
        .as_array()
        .unwrap()
        .iter()
        .map(|event| event["event"].as_str().unwrap())
        .collect();
    assert_eq!(events.first(), Some(&"received"), "{events:?}");
    assert!(events.contains(&"reported"), "{events:?}");
    for name in [format!("#{good}"), ours.to_owned(), ours.to_lowercase()] {
        assert_eq!(json(&bed.run(&["jobs", "show", "--json", &name])).remove(0), shown, "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_is_not_there_is_exit_code_3() {
    let bed = Bed::local().await;
    let daemon = bed.serve();
    until("the daemon to be up", || bed.log().contains("bridge serves").then_some(())).await;
    for command in ["show", "trace", "cancel"] {
        let output = bed.run(&["jobs", command, "4711"]);
        assert_eq!(output.status.code(), Some(3), "{output:?}");
        assert_eq!(
            err(&output),
            "error: cannot find a job 4711\nhint: `bridge jobs list` shows the jobs there are\n"
        );
        let output = bed.run(&["jobs", command, "01J00000000000000000000000"]);
        assert_eq!(output.status.code(), Some(3), "{output:?}");
        let output = bed.run(&["jobs", command, "no-job"]);
        assert_eq!(output.status.code(), Some(2), "{output:?}");
    }
    assert!(daemon.term().await.success());
    assert_eq!(bed.run(&["jobs", "show", "4711"]).status.code(), Some(3));
    assert_eq!(bed.run(&["jobs", "list", "--state", "runing"]).status.code(), Some(2));
    assert_eq!(bed.run(&["jobs", "list", "--since", "yesterdayish"]).status.code(), Some(2));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trace_is_followed_to_its_end() {
    let scene = Scene::new().await;
    let Scene { bed, long, .. } = &scene;
    let mut follower = Command::new(BRIDGE)
        .arg("--config")
        .arg(&bed.config)
        .args(["jobs", "trace", "-f", &long.to_string()])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdout = follower.stdout.take().unwrap();
    let (sender, receiver) = std::sync::mpsc::channel();
    let reader = std::thread::spawn(move || {
        let mut bytes = [0; 4096];
        while let Ok(count @ 1..) = stdout.read(&mut bytes) {
            sender.send(bytes[..count].to_vec()).unwrap();
        }
    });
    let mut seen = Vec::new();
    until("the first lines", || {
        seen.extend(receiver.try_iter().flatten());
        String::from_utf8_lossy(&seen).contains("before with [MASKED]").then_some(())
    })
    .await;
    assert!(follower.try_wait().unwrap().is_none(), "it follows");
    scene.open_the_gate();
    let status = until("the follower to end", || follower.try_wait().unwrap()).await;
    assert!(status.success());
    reader.join().unwrap();
    seen.extend(receiver.try_iter().flatten());
    let seen = String::from_utf8(seen).unwrap();
    let job = bed.finished(*long).await;
    bed.nothing_owed().await;
    let whole = out(&bed.run(&["jobs", "trace", &long.to_string()]));
    assert_eq!(seen, whole, "what was followed is the trace");
    assert_eq!(whole, text_of(&job), "and the trace is what GitLab has");
    assert!(whole.contains("\nafter\n"), "{whole}");
    let raw = bed.run(&["jobs", "trace", "--raw", &long.to_string()]);
    assert!(raw.stdout == *job.trace, "byte for byte");
    bed.assert_no_violations();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_job_ends_and_a_cancellation_waits_for_a_daemon() {
    let Scene { bed, daemon, good, long, .. } = Scene::new().await;
    let over = bed.run(&["jobs", "cancel", &good.to_string()]);
    assert!(over.status.success());
    assert!(err(&over).contains("is finished and needs no cancelling"), "{}", err(&over));
    assert!(daemon.term().await.success());
    let output = bed.run(&["jobs", "cancel", &long.to_string()]);
    assert!(output.status.success(), "{}", err(&output));
    assert!(err(&output).contains("will be cancelled by the daemon"), "{}", err(&output));
    let row = bed.row(long);
    assert_eq!(row["cancel_requested_by"], "operator");
    assert_eq!(row["state"], "running", "only the daemon changes states");
    let _daemon = bed.serve();
    let job = bed.finished(long).await;
    assert_eq!(job.status, Status::Failed);
    assert_eq!(job.failure_reason.as_deref(), Some("runner_interrupted"), "{job:?}");
    assert!(text_of(&job).contains("cancelled by the operator of the runner"), "{}", text_of(&job));
    bed.nothing_owed().await;
    let shown = json(&bed.run(&["jobs", "show", "--json", &long.to_string()])).remove(0);
    let events = shown["events"].as_array().unwrap();
    assert!(events.iter().any(|event| event["actor"] == "operator"), "{events:?}");
    bed.assert_no_violations();
}

#[tokio::test(flavor = "multi_thread")]
async fn no_secret_is_in_anything_that_is_printed() {
    let scene = Scene::new().await;
    let Scene { bed, good, long, .. } = &scene;
    let (good, long) = (good.to_string(), long.to_string());
    until("the trace to hold the first line", || {
        out(&bed.run(&["jobs", "trace", &long])).contains("before with ").then_some(())
    })
    .await;
    let mut printed = String::new();
    for args in [
        &["jobs", "list"][..],
        &["jobs", "list", "--json"],
        &["jobs", "show", &long],
        &["jobs", "show", "--json", &long],
        &["jobs", "show", "--json", &good],
        &["jobs", "trace", &long],
        &["jobs", "trace", "--raw", &good],
        &["backends", "list", "--json"],
        &["backends", "check"],
        &["runners", "list"],
        &["runners", "list", "--json"],
        &["runners", "verify"],
        &["doctor"],
        &["doctor", "--json"],
        &["db", "check"],
        &["--log-level", "trace", "jobs", "show", &long],
        &["--log-level", "trace", "runners", "verify"],
    ] {
        let output = bed.run(args);
        assert!(output.status.success(), "{args:?}: {}", err(&output));
        printed.push_str(&String::from_utf8_lossy(&output.stdout));
        printed.push_str(&err(&output));
    }
    printed.push_str(&std::fs::read_to_string(bed.path("daemon.log")).unwrap());
    assert!(printed.contains("before with [MASKED]"), "the trace was printed");
    for secret in [SECRET, &bed.token, "glcbt-"] {
        let line = printed.lines().find(|line| line.contains(secret));
        assert!(line.is_none(), "{secret} in {line:?}");
    }
    scene.open_the_gate();
    bed.finished(long.parse().unwrap()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_database_is_checked_backed_up_and_pruned() {
    let scene = Scene::new().await;
    let Scene { bed, daemon: _, good, bad, long } = &scene;
    insta::with_settings!({ filters => filters(bed.dir.path().to_str().unwrap()) }, {
        insta::assert_snapshot!(err(&bed.run(&["db", "check"])), @"DIR/state/bridge.db: schema 3, no damage found");
    });
    let to = bed.path("backup/bridge.db");
    std::fs::create_dir(bed.path("backup")).unwrap();
    let to_text = to.to_str().unwrap();
    assert!(bed.run(&["db", "backup", to_text]).status.success());
    assert_eq!(mode(&to), 0o600, "it holds secrets of jobs that are not over");
    let again = bed.run(&["db", "backup", to_text]);
    assert_eq!(again.status.code(), Some(1));
    assert!(err(&again).contains("it exists already"), "{}", err(&again));

    // A backup is a whole database: the commands work on it.
    let config = std::fs::read_to_string(&bed.config).unwrap();
    let state = format!("state_dir = \"{}\"", bed.path("state").display());
    let moved = format!("state_dir = \"{}\"", bed.path("backup").display());
    let other = bed.path("other.toml");
    crate::support::write_private(&other, &config.replace(&state, &moved));
    let listed = |config: &Path| {
        let output = Command::new(BRIDGE)
            .arg("--config")
            .arg(config)
            .args(["jobs", "list", "--json"])
            .output()
            .unwrap();
        json(&output).iter().map(|row| row["ci_job"].as_i64().unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(listed(&other), [*long, *bad, *good]);

    // What is owed stays, however old; what is over goes with its spool.
    assert_eq!(err(&bed.run(&["db", "prune"])), "0 jobs removed\n", "the retention is 30 days");
    let spools = || std::fs::read_dir(bed.path("state/spool")).unwrap().count();
    assert_eq!(spools(), 3);
    assert_eq!(err(&bed.run(&["db", "prune", "--older-than", "0s"])), "2 jobs removed\n");
    assert_eq!(listed(&bed.config), [*long]);
    assert_eq!(spools(), 1);
    scene.open_the_gate();
    bed.finished(*long).await;
    bed.nothing_owed().await;
    bed.assert_once(*long);
}

fn mode(path: &Path) -> u32 {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[tokio::test]
async fn without_a_database_there_is_a_hint_and_none_is_made() {
    let bed = Bed::local().await;
    for args in [&["jobs", "list"][..], &["db", "check"], &["db", "backup", "x.db"]] {
        let output = bed.run(args);
        assert_eq!(output.status.code(), Some(1), "{}", err(&output));
        let said = err(&output);
        assert!(said.contains("find a database at"), "{said}");
    }
    assert!(!bed.path("state").exists());
}

#[tokio::test]
async fn backends_are_listed_and_checked() {
    let bed = Bed::local().await;
    let mut text = std::fs::read_to_string(&bed.config).unwrap();
    text.push_str("\n[backends.away]\nkind = \"slurm\"\njobs_dir = \"/nonexistent/jobs\"\nbin_dir = \"/nonexistent\"\nmax_queued = 7\n");
    crate::support::write_private(&bed.config, &text);
    insta::assert_snapshot!(out(&bed.run(&["backends", "list"])), @r"
    NAME  KIND   MAX_QUEUED  RUNNERS
    away  slurm  7           -
    b     local  -           main
    ");
    let rows = json(&bed.run(&["backends", "list", "--json"]));
    assert_eq!(rows[0]["name"], "away");
    assert_eq!(rows[0]["max_queued"], 7);
    assert_eq!(rows[1]["runners"][0], "main");
    assert!(bed.run(&["backends", "check", "b"]).status.success());
    let output = bed.run(&["backends", "check"]);
    assert_eq!(output.status.code(), Some(6), "{output:?}");
    let table = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(table.lines().any(|line| line.starts_with("away") && line.contains("fail")), "{table}");
    assert!(table.lines().any(|line| line.starts_with("b ") && line.contains("ok")), "{table}");
    let output = bed.run(&["backends", "check", "elsewhere"]);
    assert_eq!(output.status.code(), Some(3));
    insta::assert_snapshot!(err(&output), @r#"
    error: cannot find the backend "elsewhere"
    hint: there are: away, b
    "#);
}

/// Finds the address that the daemon says it listens on.
async fn address(bed: &Bed) -> String {
    until("the daemon to listen", || {
        let log = std::fs::read_to_string(bed.path("daemon.log")).unwrap_or_default();
        log.lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok())
            .find(|line| line["message"] == "metrics and health are served")
            .map(|line| line["address"].as_str().unwrap().to_owned())
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_and_health_are_served_on_a_loopback_port() {
    let bed =
        Bed::new(Where::Local, Options::default(), "listen_address = \"127.0.0.1:0\"", "limit = 5")
            .await;
    let daemon = bed.serve();
    let address = address(&bed).await;
    let ask = |page: &str| http_over(std::net::TcpStream::connect(&address).unwrap(), page);
    assert_eq!(ask("/health"), (200, "ok\n".to_owned()));
    assert_eq!(ask("/nothing").0, 404);
    for (n, script) in ["true", "exit 3"].iter().enumerate() {
        let job = bed.gitlab.enqueue(bed.counting(&format!("job {n}")).script(*script));
        bed.finished(job).await;
    }
    bed.nothing_owed().await;
    let (status, metrics) = ask("/metrics");
    assert_eq!(status, 200);
    let value = |start: &str| -> f64 {
        let line = metrics.lines().find(|line| line.starts_with(start));
        let line = line.unwrap_or_else(|| panic!("no {start} in {metrics}"));
        line.rsplit(' ').next().unwrap().parse().unwrap()
    };
    assert_eq!(value("gitlab_runner_version_info{name=\"bridge\""), 1.0);
    assert_eq!(value("gitlab_runner_jobs_total{"), 2.0);
    assert_eq!(value("gitlab_runner_failed_jobs_total{"), 1.0);
    assert_eq!(value("gitlab_runner_job_duration_seconds_count{"), 2.0);
    assert_eq!(value("gitlab_runner_job_queue_duration_seconds_count{"), 2.0);
    assert_eq!(value("gitlab_runner_concurrent"), 64.0);
    assert_eq!(value("gitlab_runner_limit{"), 5.0);
    assert_eq!(value("gitlab_runner_errors_total{level=\"error\"}"), 0.0);
    assert!(value("gitlab_runner_api_request_statuses_total{") >= 1.0);
    assert!(value("bridge_sweep_duration_seconds_count") >= 1.0);
    assert!(value("bridge_backend_calls_total{backend=\"b\",verb=\"submit\",kind=\"ok\"}") >= 2.0);
    assert!(value("bridge_confirm_lag_seconds_count{") >= 2.0);
    assert!(value("bridge_store_transactions_total") >= 1.0);
    assert_eq!(value("bridge_illegal_transitions_total"), 0.0);
    for line in metrics.lines().filter(|line| line.starts_with("# TYPE ")) {
        let name = line.split(' ').nth(2).unwrap();
        // The process's own are what every exporter calls them.
        let known = ["gitlab_runner_", "bridge_", "process_"];
        assert!(known.iter().any(|start| name.starts_with(start)), "{line}");
    }
    assert!(!metrics.contains(&bed.token), "the token is no label");

    // A token that GitLab no longer knows: it cannot take jobs, and says so.
    bed.gitlab.delete_runner(&bed.token);
    let body = until("health to be red", || {
        let (status, body) = ask("/health");
        (status == 503).then_some(body)
    })
    .await;
    let body: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(body["status"], "unhealthy");
    assert_eq!(body["problems"][0]["whose_move"], "operator");
    let what = body["problems"][0]["what"].as_str().unwrap();
    assert!(what.starts_with("runner main: GitLab refuses the runner: "), "{what}");
    assert!(daemon.term().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_unix_socket_is_private_and_survives_a_kill() {
    let bed = Bed::local().await;
    let socket = bed.path("http.sock");
    bed.write_config(&format!("listen_address = \"{}\"", socket.display()), "", "");
    let daemon = bed.serve();
    until("the daemon to listen", || (ask_http(&socket, "/health").0 == 200).then_some(())).await;
    assert_eq!(mode(&socket), 0o600);
    assert!(ask_http(&socket, "/metrics").1.contains("bridge_sweep_duration_seconds"));
    daemon.kill();
    assert!(socket.exists(), "nobody cleared it away");
    let daemon = bed.serve();
    until("the next daemon to listen", || (ask_http(&socket, "/health").0 == 200).then_some(()))
        .await;
    assert!(daemon.term().await.success());
    assert!(!socket.exists());
}

#[tokio::test]
async fn a_reader_that_goes_away_is_no_error() {
    let bed = Bed::local().await;
    let mut child = Command::new(BRIDGE)
        .args(["register", "--help"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", err(&output));
    assert_eq!(err(&output), "");
    let usage = bed.run(&["jobs", "lst"]);
    assert_eq!(usage.status.code(), Some(2));
    assert!(err(&usage).contains("list"), "{}", err(&usage));
}
