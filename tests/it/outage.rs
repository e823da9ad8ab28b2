//! A GitLab that is away, busy, broken or replaced by somebody's proxy; and one that says no.

use std::io::{Read as _, Write as _};
use std::time::{Duration, Instant};

use bridge::coordinator::{EndedBy, Endpoint, Fault, Knobs, Options, Status, Version};
use serde_json::json;

use crate::support::{Bed, PATIENCE, Where, is_alive, text_of, until};

fn with(knobs: Knobs) -> Options {
    Options { knobs, ..Options::default() }
}

/// GitLab wants news every second.
fn eager() -> Options {
    with(Knobs { trace_interval: Some("1".to_owned()), ..Knobs::default() })
}

const HTML: &str =
    "<html><head><title>Sign in</title></head><body>The proxy wants a word</body></html>";

#[tokio::test(flavor = "multi_thread")]
async fn jobs_that_run_and_end_while_gitlab_is_away_are_reported_afterwards() {
    let bed = Bed::new(Where::Local, eager(), "", "").await;
    let _daemon = bed.serve();
    let lines = "for i in $(seq 30); do echo line $i; sleep 0.1; done";
    let jobs: Vec<i64> = (0..6)
        .map(|n| {
            let job = bed.counting(&format!("job {n}")).script(bed.wait_for("gate")).script(lines);
            // Half of them fail, with a code of their own.
            let job = if n % 2 == 0 { job } else { job.script(format!("exit {n}")) };
            bed.gitlab.enqueue(job)
        })
        .collect();
    until("all jobs to run", || jobs.iter().all(|id| bed.runs(*id) == 1).then_some(())).await;
    bed.gitlab.go_away().await;
    bed.open("gate");
    until("all jobs to end over there", || {
        bed.rows().values().all(|row| row["state"] == "reporting").then_some(())
    })
    .await;
    // A long night passes for GitLab, but not its patience with runners.
    bed.gitlab.advance(Duration::from_secs(20 * 60));
    bed.gitlab.come_back().await.unwrap();
    bed.all_finished(PATIENCE * 2).await;
    bed.nothing_owed().await;
    for (n, id) in jobs.into_iter().enumerate() {
        let job = bed.gitlab.job(id).unwrap();
        let code = i64::try_from(n).unwrap();
        let text = text_of(&job);
        for i in 1..=30 {
            assert_eq!(text.matches(&format!("\nline {i}\n")).count(), 1, "{text}");
        }
        if n % 2 == 0 {
            bed.assert_once(id);
        } else {
            assert_eq!((job.status, job.exit_code), (Status::Failed, Some(code)), "{job:?}");
            assert_eq!(bed.runs(id), 1);
        }
    }
    bed.assert_no_violations();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_that_starts_while_gitlab_is_away_waits_for_it() {
    let bed = Bed::new(Where::Local, eager(), "", "").await;
    let daemon = bed.serve();
    let id = bed.gitlab.enqueue(bed.counting("job").script(bed.wait_for("gate")));
    until("the job to run", || (bed.runs(id) == 1).then_some(())).await;
    bed.gitlab.go_away().await;
    daemon.kill();
    bed.open("gate");
    let _daemon = bed.serve();
    until("the job's end to be known", || (bed.row(id)["state"] == "reporting").then_some(()))
        .await;
    bed.gitlab.come_back().await.unwrap();
    bed.finished(id).await;
    bed.nothing_owed().await;
    bed.assert_once(id);
    bed.assert_no_violations();
}

/// Runs one job with faults in place; it must succeed all the same, once, with its whole trace.
async fn succeeds_in_spite_of(faults: &[(Endpoint, Fault)]) {
    let bed = Bed::new(Where::Local, eager(), "", "").await;
    for (endpoint, fault) in faults {
        bed.gitlab.inject(*endpoint, fault.clone());
    }
    let _daemon = bed.serve();
    let id = bed.gitlab.enqueue(
        bed.counting("in spite of").script("for i in $(seq 30); do echo line $i; sleep 0.1; done"),
    );
    let job = bed.finished(id).await;
    let text = text_of(&job);
    for i in 1..=30 {
        assert_eq!(text.matches(&format!("\nline {i}\n")).count(), 1, "{faults:?}: {text}");
    }
    assert_eq!(bed.gitlab.faults_left(), 0, "{faults:?} all happened: {job:?}");
    bed.nothing_owed().await;
    bed.assert_once(id);
    bed.assert_no_violations();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_burst_of_server_errors_costs_nothing_but_time() {
    for status in [500, 502, 503, 504] {
        succeeds_in_spite_of(&[
            (Endpoint::Update, Fault::status(status)),
            (Endpoint::Patch, Fault::status(status)),
            (Endpoint::FinalUpdate, Fault::status(status)),
        ])
        .await;
    }
    succeeds_in_spite_of(&[
        (Endpoint::Patch, Fault::status(500).times(3)),
        (Endpoint::FinalUpdate, Fault::status(503).times(3)),
    ])
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_that_are_lost_after_they_took_effect_are_no_second_effect() {
    succeeds_in_spite_of(&[(Endpoint::Update, Fault::lost_answer())]).await;
    succeeds_in_spite_of(&[(Endpoint::Patch, Fault::lost_answer().times(2))]).await;
    // The verdict's: the next attempt is refused with 403 and our own verdict.
    succeeds_in_spite_of(&[(Endpoint::FinalUpdate, Fault::lost_answer())]).await;
    succeeds_in_spite_of(&[(Endpoint::FinalUpdate, Fault::status_after_effect(502))]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn broken_connections_and_broken_answers_are_met_with_another_try() {
    for fault in [Fault::reset_before, Fault::truncated, Fault::html] {
        succeeds_in_spite_of(&[
            (Endpoint::Update, fault()),
            (Endpoint::Patch, fault()),
            (Endpoint::FinalUpdate, fault()),
        ])
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_that_answers_for_gitlab_is_not_believed() {
    // 200 is a yes to nothing: a PATCH is answered 202. And 403 is a no that GitLab has not said.
    for status in [200, 403, 502] {
        let html = || Fault::status(status).body("text/html", HTML);
        succeeds_in_spite_of(&[(Endpoint::Patch, html())]).await;
        succeeds_in_spite_of(&[(Endpoint::Update, html())]).await;
        succeeds_in_spite_of(&[(Endpoint::FinalUpdate, html())]).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_for_a_job_that_meets_a_proxy_is_asked_again() {
    let bed = Bed::local().await;
    for status in [200, 403, 502] {
        bed.gitlab.inject(Endpoint::Request, Fault::status(status).body("text/html", HTML));
    }
    bed.gitlab.inject(Endpoint::Request, Fault::reset_before());
    bed.gitlab.inject(Endpoint::Request, Fault::status(409));
    let _daemon = bed.serve();
    let id = bed.gitlab.enqueue(bed.counting("job"));
    bed.finished(id).await;
    bed.nothing_owed().await;
    bed.assert_once(id);
    bed.assert_no_violations();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_whose_payload_breaks_off_is_ended_where_its_name_is_known() {
    let bed = Bed::local().await;
    let _daemon = bed.serve();
    // GitLab holds the job to be taken; without its payload nobody can run it.
    let id = bed.gitlab.enqueue(
        bed.counting("broken").verbatim("{\"id\": {id}, \"token\": \"{token}\", \"steps\": 7}"),
    );
    let job = bed.finished(id).await;
    assert_eq!(job.status, Status::Failed, "{job:?}\n{}", bed.log());
    assert_eq!(job.ended_by, Some(EndedBy::Runner));
    let next = bed.gitlab.enqueue(bed.counting("next"));
    bed.finished(next).await;
    bed.assert_once(next);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_wants_time_gets_it() {
    let bed = Bed::new(Where::Local, eager(), "", "").await;
    let wait = |endpoint| {
        let fault = Fault::status(429).header("Retry-After", "4");
        bed.gitlab.inject(endpoint, fault);
    };
    wait(Endpoint::Request);
    let _daemon = bed.serve();
    let id = bed
        .gitlab
        .enqueue(bed.counting("job").script("for i in 1 2 3 4; do echo $i; sleep 1; done"));
    let started = Instant::now();
    until("the first request", || (bed.gitlab.requests().of(Endpoint::Request) >= 1).then_some(()))
        .await;
    let first = Instant::now();
    until("the second request", || {
        (bed.gitlab.requests().of(Endpoint::Request) >= 2).then_some(())
    })
    .await;
    assert!(first.elapsed() >= Duration::from_millis(3500), "{:?}", first.elapsed());
    wait(Endpoint::Patch);
    wait(Endpoint::FinalUpdate);
    bed.finished(id).await;
    assert!(started.elapsed() >= Duration::from_secs(8), "{:?}", started.elapsed());
    assert_eq!(bed.gitlab.faults_left(), 0);
    bed.nothing_owed().await;
    bed.assert_once(id);
    bed.assert_no_violations();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_gitlab_takes_back_at_once_is_left_alone() {
    let bed = Bed::local().await;
    let _daemon = bed.serve();
    // Its first call is refused, as if it had been cancelled on the way.
    bed.gitlab.inject(
        Endpoint::Update,
        Fault::status(403)
            .header("Job-Status", "canceled")
            .body("application/json", "{\"message\":\"403 Forbidden\"}"),
    );
    let id = bed.gitlab.enqueue(bed.counting("taken back"));
    until("the job to be given up", || (bed.row(id)["state"] == "abandoned").then_some(())).await;
    bed.gitlab.force_cancel(id);
    bed.nothing_owed().await;
    assert_eq!(bed.runs(id), 0, "it was never submitted");
    let calls = bed.gitlab.requests();
    assert_eq!(calls.of(Endpoint::Patch) + calls.of(Endpoint::FinalUpdate), 0, "{calls:?}");
    bed.assert_no_violations();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_is_erased_while_it_runs_is_ended_over_there() {
    let bed = Bed::new(Where::Local, eager(), "", "").await;
    let _daemon = bed.serve();
    let id = bed.gitlab.enqueue(
        bed.counting("erased")
            .script(bed.note_pid("pid"))
            .script("while :; do echo tick; sleep 0.2; done"),
    );
    let pid = bed.pid_of("pid").await;
    bed.gitlab.erase(id);
    bed.nothing_owed().await;
    assert_eq!(bed.row(id)["state"], "abandoned");
    assert!(!is_alive(pid));
    let violations = bed.gitlab.violations();
    assert!(violations.is_empty(), "{violations:#?}");
}

/// Asks a daemon's `/health` over its socket.
fn health(bed: &Bed) -> Option<String> {
    let mut socket = std::os::unix::net::UnixStream::connect(bed.path("health.sock")).ok()?;
    socket.set_read_timeout(Some(Duration::from_secs(10))).ok()?;
    socket
        .write_all(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        .ok()?;
    let mut answer = String::new();
    socket.read_to_string(&mut answer).ok()?;
    Some(answer)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_runner_that_gitlab_does_not_know_turns_health_red_and_does_not_hammer() {
    let bed = Bed::local().await;
    let socket = format!("listen_address = \"unix:{}\"", bed.path("health.sock").display());
    bed.write_config(&socket, "", "");
    let _daemon = bed.serve();
    let job = bed.gitlab.enqueue(bed.counting("job").script(bed.wait_for("gate")));
    until("the job to run", || (bed.runs(job) == 1).then_some(())).await;
    until("health to be green", || {
        health(&bed).filter(|answer| answer.starts_with("HTTP/1.1 200"))
    })
    .await;
    bed.gitlab.expire_runner_token(&bed.token);
    let answer = until("health to be red", || {
        health(&bed).filter(|answer| answer.starts_with("HTTP/1.1 503"))
    })
    .await;
    assert!(answer.contains("runner main: GitLab refuses the runner"), "{answer}");
    let before = bed.gitlab.requests().of(Endpoint::Request);
    // What it has goes on meanwhile.
    bed.open("gate");
    bed.finished(job).await;
    bed.nothing_owed().await;
    bed.assert_once(job);
    let after = bed.gitlab.requests().of(Endpoint::Request);
    assert!(after - before <= 1, "it goes on asking: {before}, then {after}");
    bed.assert_no_violations();
}

#[tokio::test(flavor = "multi_thread")]
async fn gitlab_may_live_below_a_path() {
    let options = Options { root: "/gitlab".to_owned(), ..eager() };
    let bed = Bed::new(Where::Local, options, "", "").await;
    let work = bed.path("project");
    std::fs::create_dir_all(&work).unwrap();
    std::fs::write(work.join("hello.txt"), "from below a path\n").unwrap();
    for args in [
        &["init", "-q", "-b", "main"][..],
        &["add", "."],
        &["-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-q", "-m", "one"],
    ] {
        let git = std::process::Command::new("git").args(args).current_dir(&work).status();
        assert!(git.unwrap().success());
    }
    bed.gitlab.serve_repository("hep/tracker", &work).await.unwrap();
    let _daemon = bed.serve();
    let job = bridge::coordinator::NewJob::new("below").script("cat hello.txt");
    let id = bed.gitlab.enqueue(job);
    let job = bed.finished(id).await;
    assert!(text_of(&job).contains("from below a path"), "{}", text_of(&job));
    assert_eq!(job.status, Status::Success);
    bed.nothing_owed().await;
    bed.assert_no_violations();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_old_server_hears_only_reasons_it_knows() {
    for version in [Version::V16_11, Version::V17_11] {
        let bed = Bed::new(Where::Local, Options { version, ..eager() }, "", "").await;
        let _daemon = bed.serve();
        let operator = bed.gitlab.enqueue(bed.counting("operator").script("sleep 600"));
        let unrunnable =
            bed.gitlab.enqueue(bed.counting("unrunnable").payload(json!({ "steps": [] })));
        let script = bed.gitlab.enqueue(bed.counting("script").script("exit 7"));
        // A server that lists nothing at all knows the three oldest.
        let bare = bed
            .gitlab
            .enqueue(bed.counting("bare").script("exit 8").without("/features/failure_reasons"));
        until("the job to run", || (bed.runs(operator) == 1).then_some(())).await;
        assert!(bed.run(&["jobs", "cancel", &operator.to_string()]).status.success());
        for (id, reason, code) in [
            (operator, "runner_system_failure", None),
            (script, "script_failure", Some(7)),
            (bare, "script_failure", Some(8)),
        ] {
            let job = bed.finished(id).await;
            assert_eq!(job.failure_reason.as_deref(), Some(reason), "{version:?}: {job:?}");
            assert_eq!(job.exit_code, code, "{version:?}: {job:?}");
        }
        let job = bed.finished(unrunnable).await;
        assert!(job.is_finished(), "{job:?}");
        bed.nothing_owed().await;
        bed.assert_no_violations();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_says_nothing_is_kept_alive() {
    let bed = Bed::local().await;
    let _daemon = bed.serve();
    let id = bed.gitlab.enqueue(bed.counting("silent").script(bed.wait_for("gate")));
    until("the job to run", || (bed.runs(id) == 1).then_some(())).await;
    let updates = |bed: &Bed| bed.gitlab.job(id).unwrap().updates;
    let before = updates(&bed);
    until("GitLab to be told that it lives", || (updates(&bed) > before).then_some(())).await;
    // The coordinator looks at what is older than 15 minutes of its own clock: a word in between
    // makes 14 and 14 minutes two silences, not one.
    bed.gitlab.advance(Duration::from_secs(14 * 60));
    let before = updates(&bed);
    until("GitLab to be told again", || (updates(&bed) > before).then_some(())).await;
    bed.open("gate");
    bed.finished(id).await;
    bed.nothing_owed().await;
    bed.assert_once(id);
    bed.assert_no_violations();
}
