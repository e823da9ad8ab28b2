//! Faults and outages.

use super::*;
use crate::coordinator::{Endpoint, Fault, Gate, Status};

#[tokio::test]
async fn a_made_up_status_comes_instead_of_the_effect() {
    let bed = Bed::new().await;
    let id = bed.gitlab.enqueue(NewJob::new("build"));
    bed.gitlab.inject(Endpoint::Request, Fault::status(429).header("Retry-After", "7").times(2));
    for _ in 0..2 {
        let answer = bed.ask().await;
        assert_eq!(answer.status(), 429);
        assert_eq!(header(&answer, "retry-after").as_deref(), Some("7"));
    }
    bed.gitlab.inject(Endpoint::Request, Fault::status(409));
    assert_eq!(bed.ask().await.text().await.unwrap(), r#"{"message":"409 Conflict"}"#);
    assert_eq!(bed.gitlab.job(id).unwrap().status, Status::Pending);
    assert_eq!(bed.gitlab.faults_left(), 0);
    assert_eq!(bed.ask().await.status(), 201);
    assert_eq!(bed.gitlab.faults_happened(), 3);
}

#[tokio::test]
async fn a_made_up_status_can_come_after_the_effect() {
    let bed = Bed::new().await;
    let job = bed.take(NewJob::new("build")).await;
    bed.gitlab.inject(Endpoint::Patch, Fault::status_after_effect(502));
    assert_eq!(bed.patch(&job, 0, "hello").await.status(), 502);
    // The outcome was unknown, so the overlap is no violation.
    let again = bed.patch(&job, 0, "hello").await;
    assert_eq!(header(&again, "range").as_deref(), Some("0-5"));
    bed.gitlab.inject(Endpoint::FinalUpdate, Fault::status_after_effect(500));
    assert_eq!(bed.succeed(&job, "hello").await.status(), 500);
    let own = bed.succeed(&job, "hello").await;
    assert_eq!(own.status(), 403);
    assert_eq!(header(&own, "job-status").as_deref(), Some("success"));
    bed.assert_well_behaved();
}

#[tokio::test]
async fn a_reset_before_the_effect_leaves_everything_as_it_was() {
    let bed = Bed::new().await;
    let id = bed.gitlab.enqueue(NewJob::new("build"));
    bed.gitlab.inject(Endpoint::Request, Fault::reset_before());
    let error = bed.asking(None).send().await.unwrap_err();
    assert!(error.is_request(), "{error:?}");
    assert_eq!(bed.gitlab.job(id).unwrap().status, Status::Pending);
    assert_eq!(bed.ask().await.status(), 201);
}

#[tokio::test]
async fn a_lost_answer_had_its_effect() {
    let bed = Bed::new().await;
    let id = bed.gitlab.enqueue(NewJob::new("build"));
    bed.gitlab.inject(Endpoint::Request, Fault::lost_answer());
    bed.asking(None).send().await.unwrap_err();
    assert_eq!(bed.gitlab.job(id).unwrap().status, Status::Running);
    assert_eq!(bed.ask().await.status(), 204);
}

#[tokio::test]
async fn the_final_update_and_the_others_have_faults_of_their_own() {
    let bed = Bed::new().await;
    let job = bed.take(NewJob::new("build")).await;
    bed.gitlab.inject(Endpoint::FinalUpdate, Fault::lost_answer());
    assert_eq!(bed.put(&job, "running", json!({})).await.status(), 200);
    bed.putting(&job, "success", output("")).send().await.unwrap_err();
    assert_eq!(bed.gitlab.job(job.id).unwrap().status, Status::Success);
    assert_eq!(bed.succeed(&job, "").await.status(), 403);
    bed.assert_well_behaved();
}

#[tokio::test]
async fn a_body_can_break_off() {
    let bed = Bed::new().await;
    let id = bed.gitlab.enqueue(NewJob::new("build"));
    bed.gitlab.inject(Endpoint::Request, Fault::truncated());
    let answer = bed.ask().await;
    assert_eq!(answer.status(), 201);
    let whole = answer.content_length().unwrap();
    assert!(whole > 1000);
    assert!(answer.bytes().await.is_err());
    assert_eq!(bed.gitlab.job(id).unwrap().status, Status::Running);
}

#[tokio::test]
async fn a_job_can_come_as_html() {
    let bed = Bed::new().await;
    bed.gitlab.enqueue(NewJob::new("build"));
    bed.gitlab.inject(Endpoint::Request, Fault::html());
    let answer = bed.ask().await;
    assert_eq!(answer.status(), 201);
    assert_eq!(header(&answer, "content-type").as_deref(), Some("text/html"));
    bed.gitlab.inject(Endpoint::Request, Fault::status(200).body("text/html", "<h1>Login</h1>"));
    assert_eq!(bed.ask().await.text().await.unwrap(), "<h1>Login</h1>");
}

#[tokio::test]
async fn a_fault_can_wait_for_its_call() {
    let bed = Bed::new().await;
    let one = bed.take(NewJob::new("one")).await;
    let two = bed.take(NewJob::new("two")).await;
    bed.gitlab.inject(Endpoint::Update, Fault::status(500).for_job(two.id).after(1).always());
    assert_eq!(bed.put(&two, "running", json!({})).await.status(), 200);
    for _ in 0..3 {
        assert_eq!(bed.put(&two, "running", json!({})).await.status(), 500);
        assert_eq!(bed.put(&one, "running", json!({})).await.status(), 200);
    }
    bed.gitlab.clear_faults();
    assert_eq!(bed.put(&two, "running", json!({})).await.status(), 200);
}

#[tokio::test]
async fn a_fault_can_meet_every_call() {
    let bed = Bed::new().await;
    bed.gitlab.inject_anywhere(Fault::status(429).header("Retry-After", "60").always());
    assert_eq!(bed.ask().await.status(), 429);
    assert_eq!(bed.verify().await.status(), 429);
}

#[tokio::test]
async fn a_gate_holds_a_call_and_a_delay_delays_it() {
    let bed = Bed::new().await;
    let id = bed.gitlab.enqueue(NewJob::new("build"));
    let gate = Gate::new();
    bed.gitlab.inject(Endpoint::Request, Fault::hold(&gate));
    let held = bed.asking(None).send();
    let open = async {
        bed.gitlab.wait_until(|gitlab| gitlab.faults_happened() == 1, SOON).await.unwrap();
        assert_eq!(bed.gitlab.job(id).unwrap().status, Status::Pending);
        gate.open();
    };
    let (answer, ()) = tokio::join!(held, open);
    assert_eq!(answer.unwrap().status(), 201);

    let delay = Duration::from_millis(100);
    bed.gitlab.inject(Endpoint::Verify, Fault::delay(delay));
    let begin = std::time::Instant::now();
    assert_eq!(bed.verify().await.status(), 200);
    assert!(begin.elapsed() >= delay);
}

#[tokio::test]
async fn a_call_nobody_waits_for_still_has_its_effect() {
    let bed = Bed::new().await;
    let id = bed.gitlab.enqueue(NewJob::new("build"));
    let gate = Gate::new();
    bed.gitlab.inject(Endpoint::Request, Fault::hold(&gate));
    let impatient = bed.asking(None).timeout(Duration::from_millis(200)).send().await;
    assert!(impatient.unwrap_err().is_timeout());
    assert_eq!(bed.gitlab.faults_happened(), 1);
    assert_eq!(bed.gitlab.job(id).unwrap().status, Status::Pending);
    gate.open();
    bed.gitlab.wait(id, |job| job.status == Status::Running, SOON).await.unwrap();
}

#[tokio::test]
async fn a_gate_that_stays_shut_does_not_hold_the_end_up() {
    let bed = Bed::new().await;
    bed.gitlab.inject(Endpoint::Request, Fault::hold(&Gate::new()));
    let held = bed.asking(None).send();
    let stop = async {
        bed.gitlab.wait_until(|gitlab| gitlab.faults_happened() == 1, SOON).await.unwrap();
        tokio::time::timeout(SOON, bed.gitlab.clone().stop()).await.unwrap();
    };
    let (answer, ()) = tokio::join!(held, stop);
    answer.unwrap_err();
}

async fn assert_refused(url: &str) {
    let port: u16 = url.rsplit(':').next().unwrap().parse().unwrap();
    let error = tokio::net::TcpStream::connect(("127.0.0.1", port)).await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);
}

#[tokio::test]
async fn an_outage_refuses_connections_and_remembers_everything() {
    let bed = Bed::new().await;
    let job = bed.take(NewJob::new("build")).await;
    bed.patch(&job, 0, "hello").await;
    let url = bed.gitlab.url();
    bed.gitlab.go_away().await;
    // The client may still believe in its old connection, so this can fail in two ways.
    bed.patching(&job, 5, "!").send().await.unwrap_err();
    assert_refused(&url).await;
    bed.gitlab.go_away().await;
    bed.gitlab.come_back().await.unwrap();
    assert_eq!(bed.gitlab.url(), url);
    assert_eq!(bed.patch(&job, 5, "!").await.status(), 202);
    assert_eq!(bed.succeed(&job, "hello!").await.status(), 200);
    bed.assert_well_behaved();
}

#[tokio::test]
async fn an_outage_breaks_a_request_that_is_held() {
    let bed = Bed::new().await;
    bed.gitlab.adjust(|knobs| knobs.long_poll = Some(MINUTE));
    let value = header(&bed.ask().await, "x-gitlab-last-update").unwrap();
    let held = bed.asking(Some(&value)).send();
    let away = async {
        let two = |gitlab: &Coordinator| gitlab.requests().of(Endpoint::Request) == 2;
        bed.gitlab.wait_until(two, SOON).await.unwrap();
        bed.gitlab.go_away().await;
    };
    let (answer, ()) = tokio::join!(held, away);
    answer.unwrap_err();
}

#[tokio::test]
async fn a_stopped_coordinator_is_gone() {
    let bed = Bed::new().await;
    bed.ask().await;
    let url = bed.gitlab.url();
    bed.gitlab.stop().await;
    assert_refused(&url).await;
}
