//! Workers whose way to the server comes and goes.

use bridge_backend::{ErrorKind, JobRef, Outcome, Pattern};

use crate::bed::{Bed, QUICK, Site, open, until, unwanted, wait_for};
use crate::proxy::{Mischief, Proxy};

/// The proxy stands between worker and server; bridge and the site have another way.
async fn worker_behind_a_proxy(more: &str) -> (Site, Proxy) {
    let bed = Bed::shared();
    let proxy = Proxy::before(&bed.url).await;
    let more = format!("worker_url = '{}'\n{QUICK}{more}", proxy.url);
    (Site::of(&bed, open(&bed.url, &bed.token_file(), &more)), proxy)
}

/// Waits until the worker has knocked in vain several times.
async fn knocks(proxy: &Proxy) {
    let before = proxy.asked();
    let knocked = until("knocks".to_owned(), async || (proxy.asked() >= before + 4).then_some(()));
    knocked.await.unwrap();
}

async fn ends_well(site: &Site, job: &JobRef, log: &[u8]) {
    assert_eq!(site.outcome(job).await, Outcome::Exited { code: 3 });
    assert_eq!(String::from_utf8_lossy(&site.log(job).await), String::from_utf8_lossy(log));
    site.backend.collect(job, &site.work()).await.unwrap();
    assert_eq!(std::fs::read(site.work().join("out.txt")).unwrap(), b"out\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_away_at_any_time_costs_nothing() {
    if unwanted() {
        return;
    }
    let (site, proxy) = worker_behind_a_proxy("").await;
    let script = format!(
        "echo one\n: >@/begun\n{}echo two\n{}echo three; echo out >out.txt\nexit 3\n",
        wait_for("on"),
        wait_for("over")
    );
    let mut spec = site.spec(&script);
    spec.outputs = vec![Pattern("*.txt".into())];
    // Before it begins.
    proxy.away(true);
    let job = site.submit(&spec).await;
    knocks(&proxy).await;
    assert!(!site.dir.path().join("begun").exists(), "what cannot be written down does not begin");
    proxy.away(false);
    site.file("begun").await;
    // While it runs.
    proxy.away(true);
    site.touch("on");
    knocks(&proxy).await;
    proxy.away(false);
    site.running(&job).await;
    // At its end.
    proxy.away(true);
    site.touch("over");
    knocks(&proxy).await;
    proxy.away(false);
    ends_well(&site, &job, b"one\ntwo\nthree\n").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_never_gets_through_comes_home_with_diracs_own_sandbox() {
    if unwanted() {
        return;
    }
    let (site, proxy) = worker_behind_a_proxy("worker_patience = '2s'").await;
    for (code, expected) in [(0, Outcome::Exited { code: 0 }), (5, Outcome::Exited { code: 5 })] {
        let begun = format!("begun{code}");
        let script = format!(
            "echo one\n: >@/{begun}\n{}printf 'tw\\000o\\nno end'; echo out >out.txt\nexit {code}\n",
            wait_for(&format!("go{code}"))
        );
        let mut spec = site.spec(&script);
        spec.outputs = vec![Pattern("*.txt".into())];
        let job = site.submit(&spec).await;
        site.file(&begun).await;
        proxy.away(true);
        site.touch(&format!("go{code}"));
        assert_eq!(site.outcome(&job).await, expected);
        assert_eq!(site.log(&job).await, b"one\ntw\0o\nno end");
        // Its outputs had no way, and that is not hidden.
        let lost = site.backend.collect(&job, &site.work()).await;
        assert_eq!(lost.map_err(|error| error.kind()), Err(ErrorKind::Lost));
        assert!(!site.work().join("out.txt").exists());
        proxy.away(false);
        // A backend that knows nothing finds the same.
        let again = Site::of(&site.bed, open(&site.bed.url, &site.bed.token_file(), QUICK));
        assert_eq!(again.outcome(&job).await, expected);
        assert_eq!(again.log(&job).await, b"one\ntw\0o\nno end");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_never_reaches_the_server_says_so() {
    if unwanted() {
        return;
    }
    let (site, proxy) = worker_behind_a_proxy("worker_patience = '2s'").await;
    proxy.away(true);
    let job = site.run(": >@/ran\n").await;
    let outcome = site.outcome(&job).await;
    let Outcome::SystemFailed { detail } = &outcome else { panic!("{outcome:?}") };
    assert!(detail.contains("does not answer this worker"), "{detail}");
    assert!(!site.dir.path().join("ran").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_answers_to_a_worker_change_nothing() {
    if unwanted() {
        return;
    }
    let (site, proxy) = worker_behind_a_proxy("").await;
    proxy.also_before_the_store();
    let (search, place) = ("POST /api/jobs/search", "POST /api/jobs/sandbox");
    let (store, link) = ("POST /store", "PATCH /api/jobs/*/sandbox/output");
    let status = "PATCH /api/jobs/status";
    let denied = "<Error><Code>AccessDenied</Code></Error>";
    // Few of a kind for each, since the worker waits longer each time.
    for (n, evil) in [
        vec![
            (search, Mischief::Say(200, "<html>Log in here</html>")),
            (place, Mischief::Say(200, "{}")),
            (store, Mischief::Say(403, denied)),
            (link, Mischief::LoseAnswer),
            (status, Mischief::Say(200, "<html>")),
        ],
        vec![
            (search, Mischief::Cut),
            (place, Mischief::Say(503, "{\"detail\":\"later\"}")),
            (store, Mischief::LoseAnswer),
            (link, Mischief::Say(200, "<html>")),
            (status, Mischief::LoseAnswer),
        ],
        vec![
            (search, Mischief::Say(403, "<html>blocked</html>")),
            (place, Mischief::Cut),
            (store, Mischief::Say(404, "<Error><Code>NoSuchBucket</Code></Error>")),
            (link, Mischief::Say(502, "<html>")),
            (status, Mischief::Say(500, "Internal Server Error")),
            (status, Mischief::Cut),
        ],
        vec![
            (search, Mischief::Say(429, "{\"detail\":\"slow down\"}")),
            (search, Mischief::Say(200, "[]")),
            (place, Mischief::LoseAnswer),
            (store, Mischief::Say(503, "<Error><Code>SlowDown</Code></Error>")),
            (store, Mischief::LoseQuestion),
            (link, Mischief::LoseQuestion),
        ],
    ]
    .into_iter()
    .enumerate()
    {
        for (begin, evil) in evil {
            proxy.next(begin, evil);
        }
        let mut spec =
            site.spec(&format!("echo one {n}; sleep 2; echo two; echo out >out.txt\nexit 3\n"));
        spec.outputs = vec![Pattern("*.txt".into())];
        let job = site.submit(&spec).await;
        ends_well(&site, &job, format!("one {n}\ntwo\n").as_bytes()).await;
    }
    assert!(proxy.is_honest(), "not all of it was met");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_helper_that_dies_before_the_outputs_are_home_does_not_say_that_there_are_none() {
    if unwanted() {
        return;
    }
    let (site, proxy) = worker_behind_a_proxy("").await;
    let mut spec = site.spec(&format!(": >@/begun\n{}echo out >out.txt\n", wait_for("over")));
    spec.outputs = vec![Pattern("*.txt".into())];
    let job = site.submit(&spec).await;
    site.file("begun").await;
    proxy.away(true);
    site.touch("over");
    let mine = format!("{}/jobs/{}-", site.bed.path(), job.id);
    let folder = std::fs::read_dir(site.bed.path().join("jobs")).unwrap().flatten();
    let folder = folder
        .map(|entry| entry.path().join("work"))
        .find(|path| path.to_str().unwrap().starts_with(&mine))
        .unwrap();
    let word = until("its last word".to_owned(), async || {
        std::fs::read_to_string(folder.join("bridge-result.txt"))
            .ok()
            .filter(|text| text.contains("ended"))
    });
    assert!(word.await.unwrap().contains(" exit_code=0 "));
    // The helper itself, and whoever runs it.
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if String::from_utf8_lossy(&line).contains(&mine) {
            let pid = entry.file_name();
            std::process::Command::new("kill").arg("-KILL").arg(pid).status().unwrap();
        }
    }
    proxy.away(false);
    assert_eq!(site.outcome(&job).await, Outcome::Exited { code: 0 });
    let error = site.backend.collect(&job, &site.work()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Lost, "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_was_killed_while_its_start_was_written_down_does_not_begin() {
    if unwanted() {
        return;
    }
    let (site, proxy) = worker_behind_a_proxy("").await;
    let killed = "{\"failed\":{},\"success\":{\"1\":{\"Status\":\"Killed\"}}}";
    proxy.next("PATCH /api/jobs/status", Mischief::Say(200, killed));
    let job = site.run(": >@/ran\n").await;
    let outcome = site.outcome(&job).await;
    let Outcome::SystemFailed { detail } = &outcome else { panic!("{outcome:?}") };
    assert!(detail.contains("killed before it started"), "{detail}");
    assert!(proxy.is_honest() && !site.dir.path().join("ran").exists());
}
