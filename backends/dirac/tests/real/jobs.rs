//! Jobs that live as jobs do.

use std::time::{Duration, Instant};

use bridge_backend::{JobRef, Observation, Outcome, Pattern};

use crate::bed::{Bed, QUICK, Site, open, unwanted, wait_for};

#[tokio::test(flavor = "multi_thread")]
async fn hello_is_green_soon_and_its_time_is_known() {
    if unwanted() {
        return;
    }
    let site = Site::on(&Bed::shared());
    let begun = Instant::now();
    let job = site.run("echo hello; sleep 1; echo world\n").await;
    let seen = site.until(&job, |seen| matches!(seen, Observation::Ended { .. })).await;
    assert_eq!(site.log(&job).await, b"hello\nworld\n");
    assert!(begun.elapsed() < Duration::from_secs(60), "{:?}", begun.elapsed());
    let Observation::Ended { outcome, usage } = seen else { panic!("{seen:?}") };
    assert_eq!(outcome, Outcome::Exited { code: 0 });
    let elapsed = usage.elapsed.unwrap();
    assert!(
        elapsed >= Duration::from_millis(900) && elapsed < Duration::from_secs(60),
        "{elapsed:?}"
    );
    assert_eq!(usage.nodes.as_deref(), Some("DIRAC.Bed.local"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_of_20_mb_arrives_in_order_each_byte_once() {
    if unwanted() {
        return;
    }
    let site = Site::on(&Bed::shared());
    let job =
        site.run("seq -f 'line %.0f of a log that is long enough' 1 500000\necho end\n").await;
    assert_eq!(site.outcome(&job).await, Outcome::Exited { code: 0 });
    let log = String::from_utf8(site.log(&job).await).unwrap();
    assert!(log.len() > 20_000_000, "{}", log.len());
    let mut lines = log.lines();
    for n in 1..=500_000 {
        assert_eq!(lines.next().unwrap(), format!("line {n} of a log that is long enough"));
    }
    assert_eq!(lines.next(), Some("end"));
    // Another backend, as after a restart, finds its place in the middle.
    let again = Site::of(&site.bed, open(&site.bed.url, &site.bed.token_file(), QUICK));
    let chunk = again.backend.read_log(&job, 12_345_678, 100).await.unwrap();
    assert_eq!(chunk.bytes, &log.as_bytes()[12_345_678..12_345_778]);
    // Pieces are smaller than this, and no border shows.
    let chunk = again.backend.read_log(&job, 7, 5 << 20).await.unwrap();
    assert!(chunk.bytes == log.as_bytes()[7..7 + (5 << 20)]);
    let tail = u64::try_from(log.len()).unwrap();
    let chunk = again.backend.read_log(&job, tail, 100).await.unwrap();
    assert!(chunk.bytes.is_empty() && chunk.end);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_workspace_larger_than_a_sandbox_travels_in_parts() {
    if unwanted() {
        return;
    }
    let site = Site::on(&Bed::shared());
    // Bytes that no compression makes fewer.
    let (mut state, mut bytes) = (0x9e37_79b9_7f4a_7c15_u64, Vec::with_capacity(200 << 20));
    while bytes.len() < 200 << 20 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    std::fs::write(site.work().join("large"), &bytes).unwrap();
    let mut spec =
        site.spec("sha256sum <large; head -c 120000000 large >part; echo kept >small.txt\n");
    spec.outputs = vec![Pattern("part".into()), Pattern("*.txt".into())];
    let job = site.submit(&spec).await;
    assert_eq!(site.outcome(&job).await, Outcome::Exited { code: 0 });
    site.backend.collect(&job, &site.work()).await.unwrap();
    assert!(std::fs::read(site.work().join("part")).unwrap() == bytes[..120_000_000]);
    assert_eq!(std::fs::read(site.work().join("small.txt")).unwrap(), b"kept\n");
    site.backend.release(&job).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_workspace_is_not_sent_twice() {
    if unwanted() {
        return;
    }
    let bed = Bed::start(&["--no-site"]);
    let site = Site::on(&bed);
    std::fs::write(site.work().join("file"), "content").unwrap();
    let stored = || std::fs::read_dir(bed.path().join("state/s3/sandboxes")).unwrap().count();
    site.submit(&site.spec("exit 0\n")).await;
    assert_eq!(stored(), 2, "the workspace, and the job's own files");
    site.submit(&site.spec("exit 0\n")).await;
    assert_eq!(stored(), 3, "the second job's own files alone");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_dirac_starts_again_does_not_run_again() {
    if unwanted() {
        return;
    }
    let bed = Bed::start(&["--slots", "2"]);
    let site = Site::on(&bed);
    let job = site.run(&format!("echo ran >>@/runs\n{}", wait_for("go"))).await;
    site.running(&job).await;
    site.file("runs").await;
    // The pilot dies, and somebody has DIRAC run the job anew.
    bed.tamper(&["site-stop", "KILL"]);
    let admin = std::fs::read_to_string(bed.path().join("state/admin.token")).unwrap();
    let http = reqwest::Client::builder().no_proxy().tls_certs_only([]).build().unwrap();
    let id: u64 = job.id.0.parse().unwrap();
    let answer = http
        .post(format!("{}/api/jobs/reschedule", bed.url))
        .bearer_auth(admin)
        .header("content-type", "application/json")
        .body(format!("{{\"job_ids\":[{id}]}}"))
        .send()
        .await
        .unwrap();
    assert!(answer.status().is_success(), "{}", answer.text().await.unwrap());
    let seen = site.look(&job).await;
    assert!(
        matches!(&seen, Some(Observation::Pending { reason: Some(why), .. }) if why.contains("rescheduled")),
        "{seen:?}"
    );
    bed.tamper(&["site-start"]);
    let outcome = site.outcome(&job).await;
    assert!(
        matches!(&outcome, Outcome::SystemFailed { detail } if detail.contains("run only once")),
        "{outcome:?}"
    );
    assert_eq!(site.file("runs").await, b"ran\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_restarts_in_the_middle_costs_nothing() {
    if unwanted() {
        return;
    }
    let bed = Bed::start(&[]);
    let site = Site::on(&bed);
    let job =
        site.run(&format!("echo before\n: >@/on\n{}echo after\nexit 4\n", wait_for("go"))).await;
    site.file("on").await;
    bed.tamper(&["server-stop", "KILL"]);
    assert!(site.backend.poll(std::slice::from_ref(&job)).await.is_err());
    let refused = site.backend.submit(&crate::bed::token(), &site.spec("exit 0\n")).await;
    assert_eq!(refused.unwrap_err().kind(), bridge_backend::ErrorKind::Transient);
    // The job ends while nobody hears it.
    site.touch("go");
    bed.tamper(&["server-start"]);
    assert_eq!(site.outcome(&job).await, Outcome::Exited { code: 4 });
    assert_eq!(site.log(&job).await, b"before\nafter\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn many_jobs_are_polled_with_two_questions() {
    if unwanted() {
        return;
    }
    let bed = Bed::start(&["--slots", "8"]);
    let proxy = crate::proxy::Proxy::before(&bed.url).await;
    let more = format!("worker_url = '{}'\n{QUICK}", bed.url);
    let site = Site::of(&bed, open(&proxy.url, &bed.token_file(), &more));
    let mut jobs = Vec::new();
    for n in 0..30 {
        jobs.push((site.run(&format!("echo {n}; exit {n}\n")).await, n));
    }
    for (job, n) in &jobs {
        assert_eq!(site.outcome(job).await, Outcome::Exited { code: *n });
    }
    let before = proxy.asked();
    let refs: Vec<_> = jobs.iter().map(|(job, _)| job.clone()).collect();
    assert_eq!(site.backend.poll(&refs).await.unwrap().len(), 30);
    assert!(proxy.asked() - before <= 2);
    for (job, n) in &jobs {
        assert_eq!(site.log(job).await, format!("{n}\n").as_bytes());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_without_curl_does_with_python() {
    if unwanted() {
        return;
    }
    let bed = Bed::start(&["--no-site"]);
    let bin = bed.path().join("bin");
    std::fs::create_dir(&bin).unwrap();
    for dir in ["/usr/bin", "/bin", "/usr/local/bin"] {
        for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
            let (name, target) = (entry.file_name(), bin.as_std_path().join(entry.file_name()));
            if name != "curl" && name != "python3" && !target.exists() {
                std::os::unix::fs::symlink(entry.path(), target).unwrap_or_default();
            }
        }
    }
    let settings = bed.tamper(&["env"]);
    let python = settings.lines().find_map(|line| line.strip_prefix("export BED_PYTHON="));
    std::os::unix::fs::symlink(python.unwrap(), bin.join("python3")).unwrap();
    bed.tamper_with(&["site-start"], &[("PATH", bin.as_str())]);
    let site = Site::on(&bed);
    let mut spec = site.spec("command -v curl && exit 9\necho hello; echo out >out.txt\n");
    spec.outputs = vec![Pattern("*.txt".into())];
    let job = site.submit(&spec).await;
    assert_eq!(site.outcome(&job).await, Outcome::Exited { code: 0 });
    assert_eq!(site.log(&job).await, b"hello\n");
    site.backend.collect(&job, &site.work()).await.unwrap();
    assert_eq!(std::fs::read(site.work().join("out.txt")).unwrap(), b"out\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_first_submission_that_comes_late_is_the_one_to_follow() {
    if unwanted() {
        return;
    }
    let site = Site::on(&Bed::shared());
    let spec = site.spec("echo ran >>@/runs\n");
    let token = crate::bed::token();
    let found = site.backend.find(std::slice::from_ref(&token)).await.unwrap();
    assert!(found.is_empty(), "the server has not taken it up yet");
    let late = open(&site.bed.url, &site.bed.token_file(), QUICK);
    let first = late.submit(&token, &spec).await.unwrap();
    let second = site.backend.submit(&token, &spec).await.unwrap();
    assert_eq!(second, first, "the older one runs");
    let job = JobRef { token, id: second };
    assert_eq!(site.outcome(&job).await, Outcome::Exited { code: 0 });
    assert_eq!(site.file("runs").await, b"ran\n");
}
