//! Many jobs with few questions.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bridge_backend::{ErrorKind, ExternalId, Fault, JobRef, Observation, SubmitToken};
use futures_util::future::join_all;
use tokio::sync::Semaphore;

use crate::bed::{Bed, QUICK, Site, open, token, until, unwanted, wait_for};
use crate::proxy::{Mischief, Proxy};

/// A backend behind a proxy, on a bed of its own.
async fn counted(options: &[&str]) -> (Site, Proxy) {
    let bed = Bed::start(options);
    let proxy = Proxy::before(&bed.url).await;
    let more = format!("worker_url = '{}'\n{QUICK}", bed.url);
    let backend = open(&proxy.url, &bed.token_file(), &more);
    (Site::of(&bed, backend), proxy)
}

/// Holds the first submission until all the others have put their files into the store, so that they
/// gather behind it.
async fn gathered(proxy: &Proxy, gate: &Semaphore, jobs: usize) {
    let uploaded = until("all files".to_owned(), async || {
        (proxy.asked_of("POST /api/jobs/sandbox") >= jobs).then_some(())
    });
    uploaded.await.unwrap();
    gate.close();
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_that_are_due_together_share_requests() {
    if unwanted() {
        return;
    }
    let (site, proxy) = counted(&["--no-site"]).await;
    let gate = Arc::new(Semaphore::new(0));
    proxy.next("POST /api/jobs/jdl", Mischief::Hold(Arc::clone(&gate)));
    let tokens: Vec<SubmitToken> = (0..50).map(|_| token()).collect();
    let spec = site.spec("exit 0\n");
    let all = join_all(tokens.iter().map(|token| site.backend.submit(token, &spec)));
    let (answers, ()) = futures_util::future::join(all, gathered(&proxy, &gate, 50)).await;
    let posts = proxy.asked_of("POST /api/jobs/jdl");
    // One that went alone, two or three full ones, and what came a little late.
    assert!(posts <= 8, "{posts} requests for 50 jobs");
    // Each has the job of its own name.
    let found = site.backend.find(&tokens).await.unwrap();
    assert_eq!(found.len(), 50);
    for (answer, token) in answers.into_iter().zip(&tokens) {
        assert_eq!(&answer.unwrap(), &found[token], "{token}");
    }
    // And there are no others.
    assert_eq!(jobs_by_name(&site).await.len(), 50);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_description_does_not_spoil_the_others() {
    if unwanted() {
        return;
    }
    let (site, proxy) = counted(&["--no-site"]).await;
    let gate = Arc::new(Semaphore::new(0));
    proxy.next("POST /api/jobs/jdl", Mischief::Hold(Arc::clone(&gate)));
    let good = site.spec("exit 0\n");
    let mut bad = site.spec("exit 0\n");
    bad.options = "platform = 'no-such-platform'".parse().unwrap();
    let specs: Vec<_> = (0..18).map(|n| if n == 11 { &bad } else { &good }).collect();
    let tokens: Vec<SubmitToken> = specs.iter().map(|_| token()).collect();
    let all =
        join_all(tokens.iter().zip(&specs).map(|(token, spec)| site.backend.submit(token, spec)));
    let (answers, ()) = futures_util::future::join(all, gathered(&proxy, &gate, 18)).await;
    for (n, answer) in answers.into_iter().enumerate() {
        if n == 11 {
            assert_eq!(answer.unwrap_err().kind(), ErrorKind::Rejected(Fault::Job));
        } else {
            answer.unwrap_or_else(|error| panic!("job {n}: {error:?}"));
        }
    }
    let posts = proxy.asked_of("POST /api/jobs/jdl");
    assert!(posts < 18, "{posts} requests for 18 jobs");
    let mut names = jobs_by_name(&site).await;
    names.sort_unstable();
    let mut wanted: Vec<String> = tokens.iter().map(ToString::to_string).collect();
    wanted.remove(11);
    wanted.sort_unstable();
    assert_eq!(names, wanted, "each good one once");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_answer_leaves_all_of_its_request_in_doubt_and_none_twice() {
    if unwanted() {
        return;
    }
    let (site, proxy) = counted(&["--no-site"]).await;
    let gate = Arc::new(Semaphore::new(0));
    proxy.next("POST /api/jobs/jdl", Mischief::Hold(Arc::clone(&gate)));
    proxy.next("POST /api/jobs/jdl", Mischief::LoseAnswer);
    let tokens: Vec<SubmitToken> = (0..15).map(|_| token()).collect();
    let spec = site.spec("exit 0\n");
    let all = join_all(tokens.iter().map(|token| site.backend.submit(token, &spec)));
    let (answers, ()) = futures_util::future::join(all, gathered(&proxy, &gate, 15)).await;
    assert!(proxy.is_honest());
    let doubtful = answers.iter().filter(|answer| answer.is_err()).count();
    assert!(doubtful > 1, "they shared a request");
    for answer in &answers {
        assert!(!matches!(answer, Err(error) if error.kind() != ErrorKind::Ambiguous));
    }
    // All of them are there, each once, and found by their names.
    assert_eq!(site.backend.find(&tokens).await.unwrap().len(), 15);
    assert_eq!(jobs_by_name(&site).await.len(), 15);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_killed_in_the_middle_of_a_request_makes_each_job_once() {
    if unwanted() {
        return;
    }
    for wait in [0, 40, 120] {
        let (site, proxy) = counted(&["--no-site"]).await;
        let gate = Arc::new(Semaphore::new(0));
        proxy.next("POST /api/jobs/jdl", Mischief::Hold(Arc::clone(&gate)));
        let tokens: Vec<SubmitToken> = (0..20).map(|_| token()).collect();
        let spec = site.spec("exit 0\n");
        let all = join_all(tokens.iter().map(|token| site.backend.submit(token, &spec)));
        let bed = Arc::clone(&site.bed);
        let kill = async {
            gathered(&proxy, &gate, 20).await;
            // Somewhere in the middle; whatever it hits must be right.
            tokio::time::sleep(Duration::from_millis(wait)).await;
            tokio::task::spawn_blocking(move || {
                bed.tamper(&["server-stop", "KILL"]);
                bed.tamper(&["server-start"]);
            })
            .await
            .unwrap();
        };
        let (answers, ()) = futures_util::future::join(all, kill).await;
        let mut ids: Vec<Option<ExternalId>> = Vec::new();
        for answer in answers {
            match answer {
                Ok(id) => ids.push(Some(id)),
                Err(error) => {
                    let kind = error.kind();
                    assert!(
                        matches!(kind, ErrorKind::Ambiguous | ErrorKind::Transient),
                        "{error:?}"
                    );
                    ids.push(None);
                }
            }
        }
        // As the core does it: what is not there, though it was looked for, is made again.
        let all_there = until("all jobs".to_owned(), async || {
            let found = site.backend.find(&tokens).await.ok()?;
            for (token, id) in tokens.iter().zip(&mut ids) {
                match (found.get(token), &id) {
                    (Some(there), Some(id)) => assert_eq!(there, id),
                    (Some(there), None) => *id = Some(there.clone()),
                    (None, Some(id)) => panic!("{token} was accepted as {id} and is not there"),
                    (None, None) => {}
                }
            }
            for (token, id) in tokens.iter().zip(&mut ids) {
                if id.is_none() {
                    *id = site.backend.submit(token, &spec).await.ok();
                }
            }
            ids.iter().all(Option::is_some).then_some(())
        });
        all_there.await.unwrap();
        let names = jobs_by_name(&site).await;
        assert_eq!(names.len(), 20, "killed after {wait} ms: {names:?}");
        assert_eq!(names.iter().collect::<BTreeSet<_>>().len(), 20);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn silent_jobs_cost_one_question_a_cycle_however_many_they_are() {
    if unwanted() {
        return;
    }
    let (site, proxy) = counted(&["--slots", "12"]).await;
    // Each but the last is silent; the last one speaks when it is told to.
    let mut jobs: Vec<JobRef> = Vec::new();
    for n in 0..12 {
        let word = if n == 11 { "talk" } else { "never" };
        jobs.push(site.run(&format!("{}echo now\n{}", wait_for(word), wait_for("go"))).await);
    }
    for job in &jobs {
        // By its own word, which comes a little after DIRAC's.
        let host = |host: &Option<String>| host.as_deref().is_some_and(|h| h != "DIRAC.Bed.local");
        site.until(job, |seen| matches!(seen, Observation::Running { host: h } if host(h))).await;
    }
    // One more, for what is learnt once.
    cycle(&site, &jobs).await;
    for few in [1, 4, 12] {
        let before = (proxy.asked(), proxy.asked_of("POST /api/jobs/search"));
        for _ in 0..5 {
            assert_eq!(cycle(&site, &jobs[..few]).await, 0);
        }
        let after = (proxy.asked(), proxy.asked_of("POST /api/jobs/search"));
        assert_eq!((after.0 - before.0, after.1 - before.1), (5, 5), "{few} jobs, five cycles");
    }
    // Another backend, as after a restart, knows nothing and is quiet all the same.
    let more = format!("worker_url = '{}'\n{QUICK}", site.bed.url);
    let again = Site::of(&site.bed, open(&proxy.url, &site.bed.token_file(), &more));
    let before = proxy.asked();
    assert_eq!(cycle(&again, &jobs).await, 0);
    assert!(proxy.asked() - before <= 2, "{}", proxy.asked() - before);
    // News of one of them costs what this one has, and nothing for the others.
    site.touch("talk");
    let (begun, before) = (Instant::now(), proxy.asked_of("GET /"));
    let mut bytes = 0;
    while bytes == 0 && begun.elapsed() < crate::bed::PATIENCE {
        bytes += cycle(&site, &jobs).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(bytes, 4);
    let asked = proxy.asked_of("GET /") - before;
    assert!(asked <= 3, "{asked} questions for one piece");
    site.cancel(&jobs).await;
}

/// Does what the core does again and again; gives how many bytes of logs there were.
async fn cycle(site: &Site, jobs: &[JobRef]) -> usize {
    let seen = site.backend.poll(jobs).await.unwrap();
    assert_eq!(seen.len(), jobs.len());
    let mut bytes = 0;
    for job in jobs {
        bytes += site.backend.read_log(job, 0, 1000).await.unwrap().bytes.len();
    }
    bytes
}

/// Gives the names of all jobs of the bed.
async fn jobs_by_name(site: &Site) -> Vec<String> {
    #[derive(serde::Deserialize)]
    struct Row {
        #[serde(rename = "JobName")]
        name: String,
    }
    let token = std::fs::read_to_string(site.bed.token_file()).unwrap();
    let http = reqwest::Client::builder().no_proxy().tls_certs_only([]).build().unwrap();
    let answer = http
        .post(format!("{}/api/jobs/search?page=1&per_page=1000", site.bed.url))
        .bearer_auth(token.trim())
        .header("content-type", "application/json")
        .body("{\"parameters\":[\"JobName\"],\"search\":[]}")
        .send()
        .await
        .unwrap();
    let rows: Vec<Row> = serde_json::from_slice(&answer.bytes().await.unwrap()).unwrap();
    rows.into_iter().map(|row| row.name).collect()
}
