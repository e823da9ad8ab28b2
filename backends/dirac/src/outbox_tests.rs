use std::error::Error as _;

use futures_util::FutureExt as _;
use futures_util::future::{join_all, poll_immediate};
use tokio::sync::Semaphore;

use super::*;

/// A server that takes what it likes, as soon as it may.
struct Server {
    asked: Mutex<Vec<Vec<String>>>,
    /// Answers that may be given; closed when all may.
    may_answer: Semaphore,
    /// Before anything is sent there is a token to wait for.
    has_token: Semaphore,
    says: fn(&[String]) -> Posted,
}

impl Server {
    fn new(says: fn(&[String]) -> Posted) -> Self {
        let server = Self {
            asked: Mutex::default(),
            may_answer: Semaphore::new(0),
            has_token: Semaphore::new(0),
            says,
        };
        server.has_token.close();
        server
    }

    fn quick(says: fn(&[String]) -> Posted) -> Self {
        let server = Self::new(says);
        server.may_answer.close();
        server
    }

    fn asked(&self) -> Vec<usize> {
        self.asked.lock().unwrap().iter().map(Vec::len).collect()
    }
}

impl Post for Server {
    async fn post(&self, descriptions: &[String], sent: &AtomicBool) -> Posted {
        if let Ok(permit) = self.has_token.acquire().await {
            permit.forget();
        }
        sent.store(true, Ordering::Release);
        self.asked.lock().unwrap().push(descriptions.to_vec());
        if let Ok(permit) = self.may_answer.acquire().await {
            permit.forget();
        }
        (self.says)(descriptions)
    }
}

fn letter(n: usize) -> Letter {
    Letter {
        token: SubmitToken::parse(&format!("br-{n}")).unwrap(),
        description: n.to_string(),
        own_words: n.is_multiple_of(2),
    }
}

/// Numbers jobs by their descriptions, and dislikes those from 100 on.
fn numbered(descriptions: &[String]) -> Posted {
    let numbers: Vec<u64> = descriptions.iter().map(|text| text.parse().unwrap()).collect();
    if numbers.iter().any(|number| *number >= 100) {
        return Posted::Refused(said());
    }
    Posted::Made(numbers)
}

fn said() -> Said {
    Said::for_tests("a submission", 400, "JDL syntax error")
}

fn kind(answer: &Result<ExternalId>) -> Option<ErrorKind> {
    answer.as_ref().err().map(BackendError::kind)
}

#[tokio::test]
async fn what_comes_while_a_request_is_under_way_goes_together() {
    let (outbox, server) = (Outbox::default(), Server::new(numbered));
    let mut all = Box::pin(join_all((1..=46).map(|n| outbox.submit(letter(n), &server))));
    assert!(poll_immediate(&mut all).await.is_none());
    server.may_answer.close();
    let answers = all.await;
    for (answer, n) in answers.iter().zip(1..) {
        assert_eq!(answer.as_ref().unwrap(), &ExternalId(format!("{n}")));
    }
    // The first went at once and alone, the others as many as may.
    assert_eq!(server.asked(), [1, 20, 20, 5]);
}

#[tokio::test]
async fn only_the_bad_one_is_refused() {
    let (outbox, server) = (Outbox::default(), Server::quick(numbered));
    let numbers: Vec<usize> = (1..=7).chain([101]).chain(8..=16).chain([102]).collect();
    let answers = join_all(numbers.iter().map(|n| outbox.submit(letter(*n), &server))).await;
    for (answer, n) in answers.iter().zip(&numbers) {
        match n {
            101 => assert_eq!(kind(answer), Some(ErrorKind::Rejected(Fault::Site))),
            // With its author's words in it, it is its author's to change.
            102 => assert_eq!(kind(answer), Some(ErrorKind::Rejected(Fault::Job))),
            n => assert_eq!(answer.as_ref().unwrap(), &ExternalId(format!("{n}"))),
        }
    }
    let error = answers[7].as_ref().unwrap_err();
    assert!(error.source().unwrap().to_string().contains("JDL syntax error"));
    assert!(server.asked().len() <= 20, "{:?}", server.asked());
}

#[tokio::test]
async fn an_answer_that_is_too_short_is_no_answer() {
    let short =
        |descriptions: &[String]| Posted::Made((1..descriptions.len()).map(|n| n as u64).collect());
    let twice = |descriptions: &[String]| Posted::Made(vec![7; descriptions.len()]);
    let none = |descriptions: &[String]| Posted::Made(vec![0; descriptions.len()]);
    for (says, count) in [(short as fn(&[String]) -> Posted, 3), (short, 1), (twice, 2), (none, 1)]
    {
        let (outbox, server) = (Outbox::default(), Server::new(says));
        // They share a request because the first one holds them up.
        let mut first = Box::pin(outbox.submit(letter(50), &server));
        assert!(poll_immediate(&mut first).await.is_none());
        let mut rest = Box::pin(join_all((1..=count).map(|n| outbox.submit(letter(n), &server))));
        assert!(poll_immediate(&mut rest).await.is_none());
        server.may_answer.close();
        let (_, answers) = futures_util::future::join(first, rest).await;
        assert_eq!(server.asked(), [1, count]);
        assert!(answers.iter().all(|answer| kind(answer) == Some(ErrorKind::Ambiguous)));
    }
}

#[tokio::test]
async fn a_failure_is_told_to_all_whom_it_concerns_and_to_nobody_else() {
    fn says(descriptions: &[String]) -> Posted {
        if descriptions.len() == 1 {
            return numbered(descriptions);
        }
        let error = BackendError::new(ErrorKind::Transient, "submit the job")
            .with_source("busy")
            .with_retry_after(std::time::Duration::from_secs(7));
        Posted::Failed(error)
    }
    let (outbox, server) = (Outbox::default(), Server::new(says));
    let mut all = Box::pin(join_all((1..=4).map(|n| outbox.submit(letter(n), &server))));
    assert!(poll_immediate(&mut all).await.is_none());
    server.may_answer.close();
    let answers = all.await;
    assert!(answers[0].is_ok());
    for answer in &answers[1..] {
        let error = answer.as_ref().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Transient);
        assert_eq!(error.retry_after().unwrap().as_secs(), 7);
        assert_eq!(error.source().unwrap().to_string(), "busy");
    }
}

#[tokio::test]
async fn a_dropped_leader_leaves_nobody_waiting() {
    let (outbox, server) = (Outbox::default(), Server::new(numbered));
    let mut zeroth = Box::pin(outbox.submit(letter(10), &server));
    assert!(poll_immediate(&mut zeroth).await.is_none());
    let mut leader = Box::pin(outbox.submit(letter(1), &server));
    let mut follower = Box::pin(outbox.submit(letter(2), &server));
    assert!(poll_immediate(&mut leader).await.is_none());
    assert!(poll_immediate(&mut follower).await.is_none());
    server.may_answer.add_permits(1);
    assert!(zeroth.await.is_ok());
    // Its request, with the follower's job in it, is under way now.
    assert!(poll_immediate(&mut leader).await.is_none());
    let mut late = Box::pin(outbox.submit(letter(3), &server));
    assert!(poll_immediate(&mut late).await.is_none());
    assert_eq!(server.asked(), [1, 2]);
    drop(leader);
    let answer = follower.now_or_never().expect("an answer at once");
    assert_eq!(kind(&answer), Some(ErrorKind::Ambiguous));
    // What was not under way is not in doubt.
    server.may_answer.close();
    assert_eq!(late.await.unwrap(), ExternalId("3".into()));
    assert_eq!(server.asked(), [1, 2, 1]);
}

#[tokio::test]
async fn what_a_dropped_leader_had_not_sent_is_sent_by_the_next() {
    let (outbox, mut server) = (Outbox::default(), Server::quick(numbered));
    server.has_token = Semaphore::new(0);
    let mut leader = Box::pin(outbox.submit(letter(1), &server));
    assert!(poll_immediate(&mut leader).await.is_none());
    let mut followers = Box::pin(join_all((2..=5).map(|n| outbox.submit(letter(n), &server))));
    assert!(poll_immediate(&mut followers).await.is_none());
    drop(leader);
    assert!(poll_immediate(&mut followers).await.is_none());
    assert!(server.asked().is_empty());
    server.has_token.close();
    assert!(followers.await.iter().all(Result::is_ok));
    // The one that was dropped before anything was sent is not made either.
    let asked = server.asked.lock().unwrap().clone();
    assert_eq!(asked, [["2", "3", "4", "5"]]);
}

#[tokio::test]
async fn a_dropped_follower_costs_only_itself() {
    let (outbox, server) = (Outbox::default(), Server::new(numbered));
    let mut leader = Box::pin(outbox.submit(letter(1), &server));
    let mut dropped = Box::pin(outbox.submit(letter(2), &server));
    let mut other = Box::pin(outbox.submit(letter(3), &server));
    assert!(poll_immediate(&mut leader).await.is_none());
    assert!(poll_immediate(&mut dropped).await.is_none());
    assert!(poll_immediate(&mut other).await.is_none());
    drop(dropped);
    server.may_answer.close();
    assert_eq!(leader.await.unwrap(), ExternalId("1".into()));
    assert_eq!(other.await.unwrap(), ExternalId("3".into()));
    // Dropped while it was still in line, it was never sent.
    assert_eq!(*server.asked.lock().unwrap(), [["1"], ["3"]]);
    assert!(outbox.waiting().line.is_empty());
}

#[tokio::test]
async fn halves_of_a_dropped_leader_are_sent_by_the_next() {
    let (outbox, server) = (Outbox::default(), Server::new(numbered));
    let mut zeroth = Box::pin(outbox.submit(letter(10), &server));
    assert!(poll_immediate(&mut zeroth).await.is_none());
    let mut leader = Box::pin(outbox.submit(letter(1), &server));
    assert!(poll_immediate(&mut leader).await.is_none());
    let mut rest = Box::pin(join_all([101, 2, 3].map(|n| outbox.submit(letter(n), &server))));
    assert!(poll_immediate(&mut rest).await.is_none());
    server.may_answer.add_permits(2);
    assert!(zeroth.await.is_ok());
    // Refused; its halves wait, and the leader with them.
    assert!(poll_immediate(&mut leader).await.is_none());
    drop(leader);
    server.may_answer.close();
    let answers = rest.await;
    assert_eq!(kind(&answers[0]), Some(ErrorKind::Rejected(Fault::Site)));
    assert!(answers[1].is_ok() && answers[2].is_ok());
}
