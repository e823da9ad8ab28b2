//! The fake keeps the contract, and notices who does not.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use camino::Utf8PathBuf;

use super::{FakeBackend, FakeOptions, FakeWorld, Plan, Trouble, Verb};
use crate::{
    Backend, ErrorKind, ExternalId, Fault, JobRef, JobSpec, Limits, Lookup, Observation, Outcome,
    Pattern, SubmitToken,
};

fn token(text: &str) -> SubmitToken {
    SubmitToken::parse(text).unwrap()
}

fn spec() -> JobSpec {
    JobSpec {
        label: "a job".to_owned(),
        script: "exit 0".to_owned(),
        env: Vec::new(),
        workspace: Utf8PathBuf::from("/nowhere"),
        outputs: Vec::new(),
        limits: Limits::default(),
        options: toml::Table::new(),
    }
}

fn with_lookup(lookup: Lookup) -> FakeWorld {
    let mut options = FakeOptions::default();
    options.capabilities.lookup = lookup;
    FakeWorld::new(options)
}

async fn submit(backend: &dyn Backend, text: &str) -> JobRef {
    let id = backend.submit(&token(text), &spec()).await.unwrap();
    JobRef { token: token(text), id }
}

async fn poll(backend: &dyn Backend, job: &JobRef) -> Option<Observation> {
    backend.poll(std::slice::from_ref(job)).await.unwrap().remove(&job.id)
}

/// Polls a future once and drops it.
async fn touch<F: Future>(future: F) -> Option<F::Output> {
    let mut future = Box::pin(future);
    std::future::poll_fn(|context| match future.as_mut().poll(context) {
        std::task::Poll::Ready(output) => std::task::Poll::Ready(Some(output)),
        std::task::Poll::Pending => std::task::Poll::Ready(None),
    })
    .await
}

#[tokio::test]
async fn the_world_outlives_its_backends() {
    let first = FakeBackend::new(FakeOptions::default());
    let world = first.world();
    let job = submit(&first, "t-1").await;
    drop(first);
    let second = world.open();
    assert_eq!(second.find(&[token("t-1")]).await.unwrap().get(&job.token), Some(&job.id));
    world.start_on(&job.token, "node7");
    let host = Some("node7".to_owned());
    assert_eq!(poll(&*second, &job).await, Some(Observation::Running { host }));
    world.assert_no_violations();
}

#[tokio::test]
async fn a_lost_answer_leaves_a_job_and_a_lost_question_none() {
    let world = with_lookup(Lookup::ByToken { settle: Duration::from_secs(30) });
    let backend = world.open();
    for (name, trouble, exists) in
        [("t-1", Trouble::LostAnswer, true), ("t-2", Trouble::LostQuestion, false)]
    {
        world.trouble(Verb::Submit, trouble);
        let error = backend.submit(&token(name), &spec()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Ambiguous);
        assert_eq!(world.job(&token(name)).is_some(), exists);
    }
    for (name, trouble, exists) in
        [("t-3", Trouble::HangAfter, true), ("t-4", Trouble::HangBefore, false)]
    {
        world.trouble(Verb::Submit, trouble);
        assert!(touch(backend.submit(&token(name), &spec())).await.is_none());
        assert_eq!(world.job(&token(name)).is_some(), exists);
    }
    world.assert_no_violations();
}

#[tokio::test]
async fn absence_counts_after_settling_and_not_before() {
    let settle = Duration::from_secs(30);
    for (early, violations) in [(false, 0), (true, 1)] {
        let world = with_lookup(Lookup::ByToken { settle });
        let backend = world.open();
        world.trouble(Verb::Submit, Trouble::LostQuestion);
        backend.submit(&token("t-1"), &spec()).await.unwrap_err();
        world.advance(settle / if early { 2 } else { 1 });
        assert!(backend.find(&[token("t-1")]).await.unwrap().is_empty());
        let again = backend.submit(&token("t-1"), &spec()).await;
        assert_eq!(again.is_err(), early);
        assert_eq!(world.violations().len(), violations);
    }
}

#[tokio::test]
async fn a_job_is_hidden_from_find_for_as_long_as_the_test_says() {
    let world = FakeWorld::new(FakeOptions::default());
    let backend = world.open();
    world.hide_new_jobs_for(Duration::from_secs(5));
    let job = submit(&*backend, "t-1").await;
    assert!(backend.find(&[token("t-1")]).await.unwrap().is_empty());
    assert!(matches!(poll(&*backend, &job).await, Some(Observation::Pending { .. })));
    world.advance(Duration::from_secs(5));
    assert_eq!(backend.find(&[token("t-1")]).await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_second_submission_is_a_breach_unless_it_is_the_same_job() {
    let settle = Duration::ZERO;
    for lookup in [Lookup::ByToken { settle }, Lookup::Never, Lookup::Resubmit] {
        let world = with_lookup(lookup);
        let backend = world.open();
        let job = submit(&*backend, "t-1").await;
        let again = backend.submit(&token("t-1"), &spec()).await;
        if lookup == Lookup::Resubmit {
            assert_eq!(again.unwrap(), job.id);
            world.assert_no_violations();
        } else {
            assert_eq!(again.unwrap_err().kind(), ErrorKind::Rejected(Fault::Site));
            assert_eq!(world.violations().len(), 1);
        }
        assert_eq!(world.jobs().len(), 1);
    }
}

#[tokio::test]
async fn every_other_breach_is_noted_too() {
    let mut options = FakeOptions::default();
    options.capabilities.poll_batch = NonZeroUsize::new(2).unwrap();
    let world = FakeWorld::new(options);
    let backend = world.open();
    let mut jobs = Vec::new();
    for name in ["t-1", "t-2", "t-3"] {
        jobs.push(submit(&*backend, name).await);
    }
    let [job, ..] = jobs.as_slice() else { panic!() };
    world.append_log(&job.token, "four");
    let mut expected = 0;
    let mut breach = |what: &str, refused: bool| {
        expected += 1;
        assert!(refused, "{what} was allowed");
        assert_eq!(world.violations().len(), expected, "{what} was not noted");
    };
    let tokens: Vec<_> = jobs.iter().map(|job| job.token.clone()).collect();
    breach("a large poll", backend.poll(&jobs).await.is_err());
    breach("a large find", backend.find(&tokens).await.is_err());
    breach("a double poll", backend.poll(&[job.clone(), job.clone()]).await.is_err());
    breach("reading beyond the end", backend.read_log(job, 5, 1).await.is_err());
    breach("reading nothing", backend.read_log(job, 0, 0).await.is_err());
    breach("an early release", backend.release(job).await.is_err());
    world.finish(&job.token, Outcome::Exited { code: 0 });
    backend.release(job).await.unwrap();
    backend.release(job).await.unwrap();
    breach("reading after the release", backend.read_log(job, 0, 9).await.is_err());
    assert_eq!(poll(&*backend, job).await, Some(Observation::Gone));
}

#[tokio::test]
async fn every_kind_of_error_can_be_had_of_every_verb() {
    let kinds = [
        ErrorKind::Transient,
        ErrorKind::Ambiguous,
        ErrorKind::Rejected(Fault::Job),
        ErrorKind::Rejected(Fault::Site),
        ErrorKind::Lost,
    ];
    let world = FakeWorld::new(FakeOptions::default());
    let backend = world.open();
    let job = submit(&*backend, "t-1").await;
    let jobs = [job.clone()];
    let verbs = [
        Verb::Check,
        Verb::Submit,
        Verb::Find,
        Verb::Poll,
        Verb::ReadLog,
        Verb::Collect,
        Verb::Cancel,
        Verb::Release,
    ];
    for kind in kinds {
        for verb in verbs {
            world.trouble(verb, Trouble::Fail(kind));
        }
        let here = camino::Utf8Path::new(".");
        for result in [
            backend.check().await,
            backend.submit(&token("t-2"), &spec()).await.map(drop),
            backend.find(&[token("t-1")]).await.map(drop),
            backend.poll(&jobs).await.map(drop),
            backend.read_log(&job, 0, 1).await.map(drop),
            backend.collect(&job, here).await,
            backend.cancel(&jobs).await,
            backend.release(&job).await,
        ] {
            assert_eq!(result.unwrap_err().kind(), kind);
        }
    }
    assert_eq!(world.jobs().len(), 1);
    assert_eq!(world.count(Verb::Poll), kinds.len());
    backend.check().await.unwrap();
    world.outage(Verb::Check, Some(ErrorKind::Transient));
    for _ in 0..3 {
        backend.check().await.unwrap_err();
    }
    world.outage(Verb::Check, None);
    backend.check().await.unwrap();
    world.assert_no_violations();
}

#[tokio::test]
async fn a_job_vanishes_falls_silent_and_speaks_in_tongues() {
    let world = FakeWorld::new(FakeOptions::default());
    let backend = world.open();
    let job = submit(&*backend, "t-1").await;
    world.say(&job.token, "WOBBLING");
    let status = "WOBBLING".to_owned();
    assert_eq!(poll(&*backend, &job).await, Some(Observation::Unclear { status }));
    world.silence(&job.token, true);
    assert_eq!(poll(&*backend, &job).await, None);
    world.silence(&job.token, false);
    world.wait_in_queue(&job.token, "Priority", None);
    let reason = Some("Priority".to_owned());
    assert_eq!(poll(&*backend, &job).await, Some(Observation::Pending { reason, starts_at: None }));
    world.vanish(&job.token);
    assert_eq!(poll(&*backend, &job).await, Some(Observation::Gone));
    assert!(backend.find(&[token("t-1")]).await.unwrap().is_empty());
    assert_eq!(backend.read_log(&job, 0, 1).await.unwrap_err().kind(), ErrorKind::Lost);
    let reused = JobRef { token: token("t-2"), id: job.id };
    assert_eq!(poll(&*backend, &reused).await, Some(Observation::Gone));
}

#[tokio::test]
async fn a_log_can_lag_behind_the_end_and_be_dead_before_it() {
    for live in [true, false] {
        let mut options = FakeOptions::default();
        options.capabilities.live_log = live;
        let world = FakeWorld::new(options);
        let backend = world.open();
        let job = submit(&*backend, "t-1").await;
        world.start(&job.token);
        world.append_log(&job.token, "abc");
        let chunk = backend.read_log(&job, 0, 2).await.unwrap();
        assert_eq!((&chunk.bytes[..], chunk.end), (if live { b"ab" } else { &b""[..] }, false));
        world.hold_log(&job.token, true);
        world.finish(&job.token, Outcome::Exited { code: 0 });
        let chunk = backend.read_log(&job, 0, 9).await.unwrap();
        assert_eq!((&chunk.bytes[..], chunk.end), (&b"abc"[..], false));
        world.append_log(&job.token, "d");
        world.hold_log(&job.token, false);
        let chunk = backend.read_log(&job, 3, 9).await.unwrap();
        assert_eq!((&chunk.bytes[..], chunk.end), (&b"d"[..], true));
        world.assert_no_violations();
    }
}

#[tokio::test]
async fn a_plan_is_one_step_for_every_poll() {
    let plan = Plan {
        pending: 1,
        running: 1,
        log: vec![Bytes::from("a"), Bytes::from("b")],
        outcome: Outcome::Exited { code: 3 },
    };
    let world = FakeWorld::new(FakeOptions { plan: Some(plan), ..FakeOptions::default() });
    let backend: Arc<dyn Backend> = world.open();
    let job = submit(&*backend, "t-1").await;
    assert!(matches!(poll(&*backend, &job).await, Some(Observation::Pending { .. })));
    for log in ["a", "ab"] {
        assert!(matches!(poll(&*backend, &job).await, Some(Observation::Running { .. })));
        assert_eq!(backend.read_log(&job, 0, 9).await.unwrap().bytes, log);
    }
    let seen = poll(&*backend, &job).await;
    assert!(
        matches!(seen, Some(Observation::Ended { outcome: Outcome::Exited { code: 3 }, .. })),
        "{seen:?}"
    );
}

#[tokio::test]
async fn a_cancelled_job_ends_unless_it_is_deaf() {
    let world = FakeWorld::new(FakeOptions::default());
    let backend = world.open();
    let (one, deaf) = (submit(&*backend, "t-1").await, submit(&*backend, "t-2").await);
    world.ignore_cancel(&deaf.token, true);
    let stranger = JobRef { token: token("t-3"), id: ExternalId("x".into()) };
    backend.cancel(&[one.clone(), deaf.clone(), stranger]).await.unwrap();
    assert_eq!(world.job(&one.token).unwrap().outcome, Some(Outcome::Cancelled { by: None }));
    assert_eq!(world.job(&deaf.token).unwrap().outcome, None);
    assert_eq!(world.job(&deaf.token).unwrap().cancels, 1);
    world.assert_no_violations();
}

#[tokio::test]
async fn what_a_job_left_and_was_asked_for_comes_home() {
    let dir = tempfile::tempdir().unwrap();
    let into = camino::Utf8Path::from_path(dir.path()).unwrap();
    let world = FakeWorld::new(FakeOptions::default());
    let backend = world.open();
    let mut spec = spec();
    spec.outputs = ["out/", "**/*.xml", "a*c"].map(|glob| Pattern(glob.into())).into();
    let id = backend.submit(&token("t-1"), &spec).await.unwrap();
    let job = JobRef { token: token("t-1"), id };
    let left = [
        "out/x/y",
        "outer",
        "r.xml",
        "d/e/r.xml",
        "d/r.xmls",
        "abc",
        "a/c",
        "axc/deep",
        "abd/deep",
    ];
    for path in left {
        world.leave(&job.token, path, path);
    }
    // Not while it runs: what is there then may still change.
    backend.collect(&job, into).await.unwrap_err();
    assert_eq!(world.violations().len(), 1);
    world.finish(&job.token, Outcome::Exited { code: 0 });
    backend.collect(&job, into).await.unwrap();
    backend.collect(&job, into).await.unwrap();
    let home: Vec<&str> = left.into_iter().filter(|path| into.join(path).is_file()).collect();
    assert_eq!(home, ["out/x/y", "r.xml", "d/e/r.xml", "abc", "axc/deep"]);
    backend.release(&job).await.unwrap();
    backend.collect(&job, into).await.unwrap_err();
    assert_eq!(world.violations().len(), 2);
}
