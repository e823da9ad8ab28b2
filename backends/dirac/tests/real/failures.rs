//! What a server says no to, and what it says wrongly.

use std::sync::Arc;

use bridge_backend::{BackendError, ErrorKind, Fault, JobRef, Observation, Outcome};
use tokio::sync::Semaphore;

use crate::bed::{Bed, QUICK, Site, open, token, until, unwanted, wait_for};
use crate::proxy::{Mischief, Proxy};

async fn through_a_proxy() -> (Site, Proxy) {
    let bed = Bed::shared();
    let proxy = Proxy::before(&bed.url).await;
    let more = format!("worker_url = '{}'\n{QUICK}", bed.url);
    let backend = open(&proxy.url, &bed.token_file(), &more);
    (Site::of(&bed, backend), proxy)
}

fn story(error: &BackendError) -> String {
    let mut story = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        story.push_str(": ");
        story.push_str(&error.to_string());
        cause = error.source();
    }
    story
}

/// Submits a job until it meets what the proxy does, and gives the error that came of it.
async fn refused(site: &Site, proxy: &Proxy) -> BackendError {
    // SQLite under parallel requests fails one now and then, before this one's turn.
    let met = until("the mischief".to_owned(), async || {
        let error = site.backend.submit(&token(), &site.spec("exit 0\n")).await.unwrap_err();
        if proxy.is_honest() {
            return Some(error);
        }
        assert_eq!(error.kind(), ErrorKind::Transient, "{}", story(&error));
        None
    });
    met.await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_answer_to_a_submission_has_its_kind() {
    if unwanted() {
        return;
    }
    let (site, proxy) = through_a_proxy().await;
    for (status, text, kind, words) in [
        (
            400,
            "{\"detail\":\"JDL syntax error\"}",
            ErrorKind::Rejected(Fault::Site),
            "JDL syntax error",
        ),
        (403, "{\"detail\":\"no\"}", ErrorKind::Rejected(Fault::Site), "no"),
        (404, "<html>", ErrorKind::Rejected(Fault::Site), "<html>"),
        (422, "{\"detail\":[{\"msg\":\"odd\"}]}", ErrorKind::Rejected(Fault::Site), "odd"),
        (429, "", ErrorKind::Transient, "429"),
        (500, "Internal Server Error", ErrorKind::Ambiguous, "Internal Server Error"),
        (502, "", ErrorKind::Ambiguous, "502"),
        (503, "{\"detail\":\"later\"}", ErrorKind::Ambiguous, "later"),
        (200, "<html>Welcome</html>", ErrorKind::Ambiguous, "Welcome"),
        (201, "[]", ErrorKind::Ambiguous, "no job id"),
    ] {
        proxy.next("POST /api/jobs/jdl", Mischief::Say(status, text));
        let error = refused(&site, &proxy).await;
        assert_eq!(error.kind(), kind, "{status}: {}", story(&error));
        assert!(story(&error).contains(words), "{status}: {}", story(&error));
    }
    for (status, text, kind) in [
        (400, "{\"detail\":\"Sandbox too large\"}", ErrorKind::Rejected(Fault::Job)),
        (403, "{}", ErrorKind::Rejected(Fault::Site)),
        (503, "{}", ErrorKind::Transient),
        (200, "<html>", ErrorKind::Transient),
    ] {
        proxy.next("POST /api/jobs/sandbox", Mischief::Say(status, text));
        let error = refused(&site, &proxy).await;
        assert_eq!(error.kind(), kind, "{status}: {}", story(&error));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_question_that_is_answered_badly_is_asked_again_later() {
    if unwanted() {
        return;
    }
    let (site, proxy) = through_a_proxy().await;
    let job = site.run("exit 0\n").await;
    let jobs = std::slice::from_ref(&job);
    for (status, text) in [
        (400, "{}"),
        (403, "{}"),
        (422, "{}"),
        (500, "x"),
        (503, "{}"),
        (200, "<html>"),
        (200, "{}"),
    ] {
        proxy.next("POST /api/jobs/search", Mischief::Say(status, text));
        let error = site.backend.poll(jobs).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Transient, "{status}");
        proxy.next("POST /api/jobs/search", Mischief::Say(status, text));
        let error = site.backend.find(std::slice::from_ref(&job.token)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Transient, "{status}");
    }
    // Past the end there is nothing, and that is an answer.
    proxy.next("POST /api/jobs/search", Mischief::Say(416, "[]"));
    assert!(site.backend.find(std::slice::from_ref(&job.token)).await.unwrap().is_empty());
    // The job has just begun, and DIRAC writes about it all the while.
    for (status, text) in [(403, "{}"), (500, "x"), (200, "[]")] {
        proxy.next("PATCH /api/jobs/status", Mischief::Say(status, text));
        let held = site.run(&wait_for("never")).await;
        let killed = site.backend.cancel(std::slice::from_ref(&held)).await;
        let Err(error) = killed else { panic!("{status}: {}", site.history(&held).await) };
        assert_eq!(error.kind(), ErrorKind::Transient, "{status}: {}", story(&error));
        assert!(proxy.is_honest(), "{status}: {}", story(&error));
        let outcome = site.killed(&held).await;
        let cancelled = matches!(outcome, Outcome::Cancelled { .. });
        assert!(cancelled, "{status}: {outcome:?}\n{}", site.history(&held).await);
    }
    assert_eq!(site.outcome(&job).await, Outcome::Exited { code: 0 });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_that_dirac_ignores_is_noticed() {
    if unwanted() {
        return;
    }
    let (site, proxy) = through_a_proxy().await;
    let job = site.run(&wait_for("never")).await;
    let ignored = "{\"success\":{\"ID\":{\"Status\":null}},\"failed\":{}}".replace("ID", &job.id.0);
    let ignored: &str = Box::leak(ignored.into_boxed_str());
    // However often it is dated anew.
    for _ in 0..4 {
        proxy.next("PATCH /api/jobs/status", Mischief::Say(200, ignored));
    }
    let error = site.backend.cancel(std::slice::from_ref(&job)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Transient);
    assert!(story(&error).contains(&job.id.0), "{}", story(&error));
    assert!(proxy.is_honest());
    assert!(matches!(site.killed(&job).await, Outcome::Cancelled { .. }));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clock_that_is_ahead_does_not_make_a_kill_vanish() {
    if unwanted() {
        return;
    }
    let bed = Bed::shared();
    let site = Site::on(&bed);
    let job = site.run(&wait_for("never")).await;
    site.running(&job).await;
    // Somebody whose clock is ahead has left a mark in the history.
    note_at(&site, &job, "2099-01-01T00:00:00+00:00").await;
    assert!(matches!(site.killed(&job).await, Outcome::Cancelled { .. }));
}

/// Writes a line of this time into a job's history, as the site does.
async fn note_at(site: &Site, job: &JobRef, time: &str) {
    let pilot = std::fs::read_to_string(site.bed.path().join("state/pilot.token")).unwrap();
    let http = reqwest::Client::builder().no_proxy().tls_certs_only([]).build().unwrap();
    let line = serde_json::json!({"MinorStatus": "Application", "Source": "x"});
    let noted = until(format!("a line of {time}"), async || {
        let answer = http
            .patch(format!("{}/api/jobs/status", site.bed.url))
            .bearer_auth(pilot.trim())
            .header("content-type", "application/json")
            .body(serde_json::json!({ job.id.0.as_str(): { time: line.clone() } }).to_string())
            .send()
            .await
            .unwrap();
        // Two changes of one job at the same moment make the server fail.
        answer.status().is_success().then_some(())
    });
    noted.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_is_heard_although_the_job_is_written_about_meanwhile() {
    if unwanted() {
        return;
    }
    let (site, proxy) = through_a_proxy().await;
    let job = site.run(&wait_for("never")).await;
    site.running(&job).await;
    let kill = "PATCH /api/jobs/status";
    let held: Vec<Arc<Semaphore>> = (0..2).map(|_| Arc::new(Semaphore::new(0))).collect();
    for gate in &held {
        proxy.next(kill, Mischief::Hold(Arc::clone(gate)));
    }
    // Between each look at the history and the kill that comes after all of it something newer is
    // written, by a clock of which the server's time says nothing.
    let newer = async {
        for (n, gate) in held.iter().enumerate() {
            let asked =
                until(format!("kill {n}"), async || (proxy.asked_of(kill) > n).then_some(()));
            asked.await.unwrap();
            note_at(&site, &job, &format!("2099-01-01T00:00:00.{n}00+00:00")).await;
            gate.close();
        }
    };
    let (killed, ()) =
        futures_util::future::join(site.backend.cancel(std::slice::from_ref(&job)), newer).await;
    if let Err(error) = killed {
        panic!("{}\n{}", story(&error), site.history(&job).await);
    }
    assert!(proxy.is_honest());
    assert!(matches!(site.killed(&job).await, Outcome::Cancelled { .. }));
}

#[tokio::test(flavor = "multi_thread")]
async fn foreign_and_vanished_jobs_do_not_spoil_the_rest() {
    if unwanted() {
        return;
    }
    let bed = Bed::shared();
    let site = Site::on(&bed);
    let other = Site::of(&bed, open(&bed.url, &bed.path().join("state/other.token"), QUICK));
    let theirs = other.run(&wait_for("go")).await;
    let ours = site.run(&wait_for("never")).await;
    site.running(&ours).await;
    let gone = JobRef { token: token(), id: bridge_backend::ExternalId("99999999".into()) };
    // Under their number, but by another name.
    let foreign = JobRef { token: token(), id: theirs.id.clone() };
    let all = [foreign.clone(), gone.clone(), ours.clone()];
    let seen = site.backend.poll(&all).await.unwrap();
    assert_eq!(seen.get(&gone.id), Some(&Observation::Gone));
    assert_eq!(seen.get(&foreign.id), Some(&Observation::Gone));
    site.cancel(&all).await;
    assert!(matches!(site.killed(&ours).await, Outcome::Cancelled { .. }));
    site.backend.release(&foreign).await.unwrap();
    assert!(site.backend.find(std::slice::from_ref(&theirs.token)).await.unwrap().is_empty());
    other.touch("go");
    assert_eq!(other.outcome(&theirs).await, Outcome::Exited { code: 0 });
    // Another user's job is never ours to read.
    assert!(site.backend.read_log(&foreign, 0, 10).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_because_somebody_between_says_so() {
    if unwanted() {
        return;
    }
    let (site, proxy) = through_a_proxy().await;
    let job = site.run("echo said\n").await;
    assert_eq!(site.outcome(&job).await, Outcome::Exited { code: 0 });
    let (list, sandbox) = ("GET /api/jobs/*/sandbox/output", "GET /api/jobs/sandbox?");
    for (what, status, text) in [
        (list, 404, "<html>"),
        (list, 403, "{\"detail\":\"not for this token\"}"),
        (sandbox, 404, "<html>"),
        (sandbox, 400, "bad"),
    ] {
        proxy.next(what, Mischief::Say(status, text));
        let error = site.backend.read_log(&job, 0, 100).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Transient, "{status} {text}: {}", story(&error));
        assert!(proxy.is_honest(), "{what}");
    }
    assert_eq!(site.log(&job).await, b"said\n");
}
