//! Bad input: what is refused, in which words, and what goes on all the same.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Output};

use bridge::coordinator::{Endpoint, Fault, Git, NewJob, Options, Shape, Status, Variable};
use serde_json::json;
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{ConnectOptions as _, Connection as _, SqliteConnection};

use crate::support::{Bed, Where, ask_http, text_of, until, write_private};

/// Makes a repository with one file.
fn repository(at: &Path) {
    std::fs::create_dir_all(at).unwrap();
    std::fs::write(at.join("hello.txt"), "from the repository\n").unwrap();
    for args in [
        &["init", "-q", "-b", "main"][..],
        &["add", "."],
        &["-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-q", "-m", "one"],
    ] {
        assert!(Command::new("git").args(args).current_dir(at).status().unwrap().success());
    }
}

/// What a command that must fail says, with the bed's directory taken out.
fn refusal(bed: &Bed, output: &Output, code: i32) -> String {
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{text}");
    assert!(output.stdout.is_empty(), "data of a command that failed");
    assert!(!text.contains(&bed.token), "the token is in {text}");
    text.replace(&*bed.dir.path().to_string_lossy(), "DIR")
}

// The configuration, in the words that whoever starts the daemon reads.

#[tokio::test]
async fn an_unknown_key_is_refused_and_the_nearest_one_named() {
    let bed = Bed::local().await;
    bed.write_config("concurent = 4", "", "");
    insta::assert_snapshot!(refusal(&bed, &bed.run(&["serve"]), 7), @"error: cannot use the configuration: DIR/config.toml:4: unknown key `concurent` at the top of the file; did you mean `concurrent`?");
    bed.write_config("", "limt = 4", "");
    insta::assert_snapshot!(refusal(&bed, &bed.run(&["serve"]), 7), @"error: cannot use the configuration: DIR/config.toml:13: unknown key `limt` in [[runners]]; did you mean `limit`?");
    assert!(!bed.path("state").exists(), "nothing was begun");
}

#[tokio::test]
async fn a_missing_backend_is_refused_and_those_that_are_there_named() {
    let bed = Bed::local().await;
    let good = std::fs::read_to_string(&bed.config).unwrap();
    write_private(&bed.config, &good.replace("backend = \"b\"", "backend = \"cluster\""));
    insta::assert_snapshot!(refusal(&bed, &bed.run(&["serve"]), 7), @r#"
    error: cannot use the configuration: DIR/config.toml:10: runner "main" names the backend "cluster", which is not there (there are: b)
    hint: add the backend as [backends.NAME], or name one that is there
    "#);
}

#[tokio::test]
async fn a_backend_that_cannot_be_opened_is_a_fault_of_the_configuration() {
    let bed = Bed::local().await;
    let good = std::fs::read_to_string(&bed.config).unwrap();
    write_private(&bed.config, &good.replace("kind = \"local\"", "kind = \"lcal\""));
    insta::assert_snapshot!(refusal(&bed, &bed.run(&["serve"]), 7), @r#"error: cannot start: open the backend b: find the kind of backend "lcal"; did you mean "local"? (known: dirac, local, slurm)"#);
    bed.write_config("", "", "job_dir = \"/x\"");
    insta::assert_snapshot!(refusal(&bed, &bed.run(&["serve"]), 7), @r#"error: cannot start: open the backend b: open a backend of kind "local": use the backend's settings: unknown field `job_dir`, expected one of `jobs_dir`, `kill_grace`, `cgroup`"#);
}

#[tokio::test]
async fn a_token_that_others_can_read_is_refused() {
    let bed = Bed::local().await;
    std::fs::set_permissions(&bed.config, std::fs::Permissions::from_mode(0o644)).unwrap();
    insta::assert_snapshot!(refusal(&bed, &bed.run(&["serve"]), 7), @"error: cannot use the configuration: DIR/config.toml:9: `token` stands in a file that others can read (mode 0644); run chmod 600 DIR/config.toml");
    let good = std::fs::read_to_string(&bed.config).unwrap();
    let inline = format!("token = \"{}\"", bed.token);
    write_private(&bed.config, &good.replace(&inline, "token_file = \"main.token\""));
    std::fs::write(bed.path("main.token"), &bed.token).unwrap();
    std::fs::set_permissions(bed.path("main.token"), std::fs::Permissions::from_mode(0o640))
        .unwrap();
    insta::assert_snapshot!(refusal(&bed, &bed.run(&["serve"]), 7), @"error: cannot use the configuration: DIR/config.toml:9: token file DIR/main.token can be read by others (mode 0640); run chmod 600 DIR/main.token");
}

// The payload.

#[tokio::test(flavor = "multi_thread")]
async fn a_payload_of_nulls_of_nothing_and_of_the_future_runs_all_the_same() {
    let bed = Bed::local().await;
    repository(&bed.path("project"));
    bed.gitlab.serve_repository("hep/tracker", &bed.path("project")).await.unwrap();
    let _daemon = bed.serve();
    for shape in [Shape::Nulls, Shape::Absent, Shape::Unknown] {
        let job = bed.gitlab.enqueue(
            NewJob::new("odd").shape(shape).script("cat hello.txt; echo in $CI_PROJECT_DIR"),
        );
        let job = bed.finished(job).await;
        let text = text_of(&job);
        assert_eq!(job.status, Status::Success, "{shape:?}: {text}\n{}", bed.log());
        assert!(text.contains("from the repository"), "{shape:?}: {text}");
        assert!(text.contains("\nin /"), "{shape:?}: {text}");
    }
    bed.nothing_owed().await;
    bed.assert_no_violations();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_without_steps_does_nothing_and_succeeds() {
    let bed = Bed::local().await;
    let _daemon = bed.serve();
    for job in [
        bed.counting("absent").without("/steps"),
        bed.counting("null").payload(json!({ "steps": null })),
        bed.counting("none").payload(json!({ "steps": [] })),
        bed.counting("no script").payload(json!({ "steps": [{ "name": "script" }] })),
    ] {
        let job = bed.gitlab.enqueue(job);
        let job = bed.finished(job).await;
        assert_eq!(job.status, Status::Success, "{job:?}\n{}", bed.log());
        assert_eq!(bed.runs(job.id), 0);
    }
    bed.nothing_owed().await;
    bed.assert_no_violations();
}

/// Runs a job that cannot be run; gives what its author reads.
async fn unrunnable(bed: &Bed, job: NewJob) -> String {
    let id = bed.gitlab.enqueue(job);
    let job = bed.finished(id).await;
    assert_eq!(job.status, Status::Failed, "{job:?}");
    assert_eq!(job.failure_reason.as_deref(), Some("runner_configuration_error"), "{job:?}");
    assert_eq!(bed.runs(id), 0, "it was not run");
    assert!(bed.row(id)["external_id"].is_null(), "it was not submitted");
    let text = text_of(&job);
    let error = text.lines().find_map(|line| line.split("ERROR: ").nth(1));
    error.unwrap_or_else(|| panic!("no word of an error: {text}")).replace("\u{1b}[0;m", "")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_cannot_be_run_says_why_in_its_trace() {
    let bed = Bed::local().await;
    let _daemon = bed.serve();
    let run = json!({ "run": "[{\"name\":\"hello\",\"script\":\"echo hello\"}]", "steps": [] });
    insta::assert_snapshot!(unrunnable(&bed, bed.counting("steps").payload(run)).await, @"Job failed: this runner does not run CI steps (`run:`); use `script:` instead");
    let mut large = bed.counting("large");
    for n in 0..50 {
        large = large.env(format!("LARGE_{n}"), "x".repeat(100_000));
    }
    let said = unrunnable(&bed, large).await;
    assert!(
        said.starts_with("Job failed: the variables are too large to be passed to a process: 50")
            && said.ends_with("make the largest ones variables of type file"),
        "{said}"
    );
    let climbs = |url: &str| {
        let git = Git { repo_url: Some(url.to_owned()), ..Git::default() };
        NewJob::new("climbs").script("true").git(git)
    };
    insta::assert_snapshot!(unrunnable(&bed, climbs("http://127.0.0.1:9/../../../../out.git")).await, @"Job failed: the repository's URL cannot be used: its path leads out of the builds directory");
    insta::assert_snapshot!(unrunnable(&bed, climbs("http://127.0.0.1:9/a/%2e%2e%2f%2e%2e/%2e%2e/out.git")).await, @"Job failed: the repository's URL cannot be used: its path leads out of the builds directory");
    let elsewhere = bed.counting("elsewhere").env("GIT_CLONE_PATH", "/tmp/elsewhere");
    insta::assert_snapshot!(unrunnable(&bed, elsewhere).await, @"Job failed: GIT_CLONE_PATH is not allowed by this runner; its operator can allow it with `enabled = true` in [runners.custom_build_dir]");
    bed.nothing_owed().await;
    let left: Vec<_> = std::fs::read_dir(bed.dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert!(!left.iter().any(|name| name.starts_with("out")), "{left:?}");
    bed.assert_no_violations();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_no_variable_can_have_is_left_out_and_said() {
    let bed = Bed::local().await;
    let _daemon = bed.serve();
    let job = bed.gitlab.enqueue(
        bed.counting("names")
            .env("A-B", "one")
            .env("1C", "two")
            .env("", "three")
            .env("$(touch /tmp/no)", "four")
            .env("GOOD", "five")
            .script("env | grep -cE '=(one|two|three|four)$' || echo \"GOOD is $GOOD\""),
    );
    let job = bed.finished(job).await;
    let text = text_of(&job);
    assert_eq!(job.status, Status::Success, "{text}\n{}", bed.log());
    assert!(text.contains("\nGOOD is five\n"), "{text}");
    for name in ["A-B", "1C", "$(touch /tmp/no)"] {
        assert!(text.contains(&format!("{name:?}")), "{name} is not mentioned: {text}");
    }
    bed.nothing_owed().await;
    bed.assert_no_violations();
}

#[tokio::test(flavor = "multi_thread")]
async fn five_megabytes_of_file_variables_arrive() {
    let bed = Bed::local().await;
    let _daemon = bed.serve();
    let mut job = bed.counting("files");
    for n in 0..50 {
        let value = format!("{n:02}").repeat(50_000);
        job = job.variable(Variable::new(format!("FILE_{n}"), value).file());
    }
    let job = job.script(
        "total=0; for name in ${!FILE_@}; do total=$((total + $(wc -c < \"${!name}\"))); done; \
         echo \"$total bytes\"",
    );
    let job = bed.gitlab.enqueue(job);
    let job = bed.finished(job).await;
    let text = text_of(&job);
    assert_eq!(job.status, Status::Success, "{text}\n{}", bed.log());
    assert!(text.contains("\n5000000 bytes\n"), "{text}");
    bed.nothing_owed().await;
    bed.assert_once(job.id);
    bed.assert_no_violations();
}

// Answers of the wrong shape.

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_cannot_be_read_is_failed_at_once() {
    let bed = Bed::local().await;
    let _daemon = bed.serve();
    for (what, body) in [
        ("cut short", r#"{"id":{id},"token":"{token}","variables":[{"key":"A","val"#),
        ("of the wrong type", r#"{"id":{id},"token":"{token}","steps":"make","job_info":[]}"#),
    ] {
        let id = bed.gitlab.enqueue(bed.counting(what).verbatim(body));
        let job = bed.finished(id).await;
        assert_eq!(job.failure_reason.as_deref(), Some("runner_system_failure"), "{what}: {job:?}");
        assert_eq!(bed.runs(id), 0, "{what}");
        assert!(bed.row(id).is_null(), "{what}: what cannot be read is no job of ours");
    }
    let log = std::fs::read_to_string(bed.path("daemon.log")).unwrap();
    assert_eq!(log.matches("GitLab gave a job that cannot be read").count(), 2, "{log}");
    assert!(!log.contains("glcbt-"), "no job token is logged: {log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_without_a_job_in_them_do_no_harm() {
    let bed = Bed::local().await;
    for body in ["", "null", "[]", "{}", "7", "{\"id\":null}", "<html>sign in</html>", "\u{0}\u{1}"]
    {
        bed.gitlab.inject(Endpoint::Request, Fault::status(201).body("application/json", body));
        bed.gitlab.inject(Endpoint::Request, Fault::status(200).body("text/html", body));
    }
    bed.gitlab.inject(Endpoint::Request, Fault::status(302).header("Location", "/users/sign_in"));
    let daemon = bed.serve();
    let job = bed.gitlab.enqueue(bed.counting("after all that"));
    bed.finished(job).await;
    assert_eq!(bed.gitlab.faults_left(), 0, "every answer was met");
    bed.nothing_owed().await;
    bed.assert_once(job);
    assert_eq!(bed.rows().len(), 1);
    assert!(daemon.term().await.success());
    bed.assert_no_violations();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxys_page_is_never_gitlabs_verdict_on_a_job() {
    let bed = Bed::local().await;
    let page = "<!DOCTYPE html><html><body>Access denied by your friendly proxy</body></html>";
    for endpoint in [Endpoint::Update, Endpoint::Patch, Endpoint::FinalUpdate] {
        for status in [403, 404] {
            bed.gitlab.inject(endpoint, Fault::status(status).body("text/html", page));
        }
    }
    let _daemon = bed.serve();
    let job =
        bed.gitlab.enqueue(bed.counting("behind a proxy").script("echo one; sleep 1; echo two"));
    bed.finished(job).await;
    bed.nothing_owed().await;
    bed.assert_once(job);
    bed.assert_no_violations();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_403_right_after_the_201_is_the_jobs_end() {
    let bed = Bed::local().await;
    let _daemon = bed.serve();
    let id = bed.gitlab.enqueue(NewJob::new("first"));
    bed.finished(id).await;
    bed.gitlab.inject(Endpoint::Update, Fault::status(403).for_job(id + 1));
    let gone = bed.gitlab.enqueue(bed.counting("gone"));
    assert_eq!(gone, id + 1);
    until("the job to be given up", || (bed.row(gone)["state"] == "abandoned").then_some(())).await;
    let next = bed.gitlab.enqueue(bed.counting("next"));
    bed.finished(next).await;
    bed.nothing_owed().await;
    assert_eq!(bed.runs(gone), 0, "it was not run");
    assert!(bed.row(gone)["external_id"].is_null(), "it was not submitted");
    assert_eq!(bed.gitlab.job(gone).unwrap().finals, 0, "nobody insists");
    bed.assert_once(next);
}

// The database.

/// A connection to the daemon's database from another process's point of view.
async fn connect(bed: &Bed) -> SqliteConnection {
    SqliteConnectOptions::new().filename(bed.path("state/bridge.db")).connect().await.unwrap()
}

/// A database as a daemon leaves it behind.
async fn with_a_database(bed: &Bed) {
    let daemon = bed.serve();
    until("the daemon to be up", || bed.log().contains("bridge serves").then_some(())).await;
    assert!(daemon.term().await.success());
}

/// Every file of the state directory.
fn files(bed: &Bed) -> BTreeMap<String, Vec<u8>> {
    std::fs::read_dir(bed.path("state"))
        .unwrap()
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.file_name().to_string_lossy().ends_with(".db"))
        .map(|entry| {
            let name = entry.file_name().to_string_lossy().into_owned();
            (name, std::fs::read(entry.path()).unwrap())
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_from_the_future_is_refused_and_left_alone() {
    let bed = Bed::local().await;
    with_a_database(&bed).await;
    let mut raw = connect(&bed).await;
    sqlx::query("INSERT INTO _sqlx_migrations VALUES (99, 'future', '2030-01-01', 1, x'00', 0)")
        .execute(&mut raw)
        .await
        .unwrap();
    raw.close().await.unwrap();
    let before = files(&bed);
    insta::assert_snapshot!(refusal(&bed, &bed.run(&["serve"]), 1), @r"
    error: cannot start: use the database DIR/state/bridge.db: a newer bridge wrote it (schema 99, this one knows 3)
    hint: start the newer bridge again, or restore a backup made before the upgrade
    ");
    insta::assert_snapshot!(refusal(&bed, &bed.run(&["jobs", "list"]), 1), @"error: cannot use the database DIR/state/bridge.db: a newer bridge wrote it (schema 99, this one knows 3)");
    assert!(files(&bed) == before, "the database was changed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_database_is_refused_and_left_alone() {
    let bed = Bed::local().await;
    with_a_database(&bed).await;
    let path = bed.path("state/bridge.db");
    let mut bytes = std::fs::read(&path).unwrap();
    let whole = bytes.len();
    bytes[4096..].fill(0xa5);
    std::fs::write(&path, &bytes).unwrap();
    let said = refusal(&bed, &bed.run(&["serve"]), 1);
    assert!(said.contains("use the database DIR/state/bridge.db: it is damaged ("), "{said}");
    assert!(
        said.contains("\nhint: move it away and restore a backup (`bridge db backup`"),
        "{said}"
    );
    assert_eq!(std::fs::read(&path).unwrap(), bytes, "it is evidence now");
    std::fs::write(&path, vec![b'x'; whole]).unwrap();
    insta::assert_snapshot!(refusal(&bed, &bed.run(&["serve"]), 1), @r"
    error: cannot start: use the database DIR/state/bridge.db: it is damaged (error returned from database: (code: 26) file is not a database)
    hint: move it away and restore a backup (`bridge db backup` makes one); jobs it knew go on at their backends
    ");
}

/// What GitLab took and could not be noted is sent again, and a 416 puts it right (crash point G).
fn assert_no_violations_but_repetition(bed: &Bed) {
    let mut violations = bed.gitlab.final_violations();
    violations
        .retain(|text| !(text.contains(": patch at ") && text.ends_with("bytes were accepted")));
    assert!(violations.is_empty(), "{violations:#?}\n{}", bed.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_is_locked_for_a_while_costs_no_job() {
    let bed = Bed::local().await;
    let socket = bed.path("http.sock");
    bed.write_config(&format!("listen_address = \"{}\"", socket.display()), "", "");
    let _daemon = bed.serve();
    let gate = bed.path("gate");
    let running = bed.gitlab.enqueue(
        bed.counting("running")
            .script(format!("until [ -e {} ]; do sleep 0.1; done", gate.display()))
            .script("echo through the gate"),
    );
    until("the job to run", || (bed.runs(running) == 1).then_some(())).await;
    let mut raw = connect(&bed).await;
    sqlx::query("BEGIN IMMEDIATE").execute(&mut raw).await.unwrap();
    std::fs::write(&gate, "").unwrap();
    // From here on the agent, which asks for one job at a time, asks for none.
    until("the agent to notice", || {
        let log = bed.log();
        let lines: Vec<&str> = log.lines().filter(|line| line.contains("not taken")).collect();
        lines.iter().any(|line| line.contains("the database takes no writes")).then_some(())
    })
    .await;
    let waiting = bed.gitlab.enqueue(bed.counting("waiting"));
    let asked = bed.gitlab.requests().of(Endpoint::Request);
    // Asked of a database that is locked, health waits as long as any write would.
    let (status, body) = ask_http(&socket, "/health");
    assert_eq!(status, 503, "{body}");
    assert!(body.contains("runner main: the database takes no writes"), "{body}");
    assert_eq!(bed.gitlab.requests().of(Endpoint::Request), asked, "no job is asked for");
    assert_eq!(bed.gitlab.job(waiting).unwrap().status, Status::Pending);
    raw.close().await.unwrap();
    for job in [running, waiting] {
        bed.finished(job).await;
    }
    bed.nothing_owed().await;
    for job in [running, waiting] {
        bed.assert_once(job);
    }
    until("health to be green again", || (ask_http(&socket, "/health").0 == 200).then_some(()))
        .await;
    assert_no_violations_but_repetition(&bed);
}

// The disk.

/// Runs a test of this binary again where it may mount what it likes, and says whether it did so.
///
/// A mount namespace ends with its last process: whatever happens, nothing stays mounted.
fn in_a_namespace(test: &str) -> bool {
    const MARK: &str = "BRIDGE_TESTS_IN_NAMESPACE";
    if std::env::var_os(MARK).is_some() {
        return true;
    }
    let user = if rustix::process::geteuid().is_root() { "-m" } else { "-Urm" };
    let output = Command::new("unshare")
        .arg(user)
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env(MARK, "1")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let complaints = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("1 passed"), "{said}\n{complaints}");
    false
}

/// Writes until nothing fits any more.
fn fill(path: &Path) {
    use std::io::Write as _;
    let mut file = std::fs::File::create(path).unwrap();
    for size in [1 << 20, 4096, 1] {
        let block = vec![0_u8; size];
        while let Ok(written @ 1..) = file.write(&block) {
            assert!(written <= size);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_costs_no_job_and_none_is_taken_meanwhile() {
    if !in_a_namespace("input::a_full_disk_costs_no_job_and_none_is_taken_meanwhile") {
        return;
    }
    let bed = Bed::new(Where::Local, Options::default(), "", "").await;
    let (socket, state) = (bed.path("http.sock"), bed.path("state"));
    bed.write_config(&format!("listen_address = \"{}\"", socket.display()), "", "");
    std::fs::create_dir(&state).unwrap();
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=96m", "none"])
        .arg(&state)
        .status()
        .unwrap();
    assert!(mounted.success());
    let daemon = bed.serve();
    let gate = bed.path("gate");
    let running = bed.gitlab.enqueue(
        bed.counting("running")
            .script(format!("until [ -e {} ]; do sleep 0.1; done", gate.display()))
            // More than fits into the last page of a spool.
            .script("for i in $(seq 2000); do echo \"line $i of the log\"; done"),
    );
    until("the job to run", || (bed.runs(running) == 1).then_some(())).await;
    assert_eq!(ask_http(&socket, "/health"), (200, "ok\n".to_owned()));
    fill(&state.join("filler"));
    // The runner's own condition: when it is set, no request is under way.
    until("health to be red", || {
        let (status, body) = ask_http(&socket, "/health");
        let said = "runner main: only 0 MiB are free below ";
        (status == 503 && body.contains(said)).then_some(())
    })
    .await;
    let waiting = bed.gitlab.enqueue(bed.counting("waiting"));
    let asked = bed.gitlab.requests().of(Endpoint::Request);
    std::fs::write(&gate, "").unwrap();
    until("a step to fail for want of space", || {
        let log = std::fs::read_to_string(bed.path("daemon.log")).unwrap();
        (log.contains("No space left on device") || log.contains("disk is full")).then_some(())
    })
    .await;
    assert_eq!(bed.gitlab.requests().of(Endpoint::Request), asked, "no job is asked for");
    assert_eq!(bed.gitlab.job(waiting).unwrap().status, Status::Pending);
    assert!(!bed.gitlab.job(running).unwrap().is_finished(), "no verdict without its trace");
    std::fs::remove_file(state.join("filler")).unwrap();
    for job in [running, waiting] {
        bed.finished(job).await;
    }
    bed.nothing_owed().await;
    for job in [running, waiting] {
        bed.assert_once(job);
    }
    let text = text_of(&bed.gitlab.job(running).unwrap());
    for i in 1..=2000 {
        assert_eq!(text.matches(&format!("\nline {i} of the log\n")).count(), 1, "line {i}");
    }
    until("health to be green again", || (ask_http(&socket, "/health").0 == 200).then_some(()))
        .await;
    assert_no_violations_but_repetition(&bed);
    assert!(daemon.term().await.success());
    // A mount point cannot be removed with the rest of the bed.
    assert!(Command::new("umount").arg(&state).status().unwrap().success());
}
