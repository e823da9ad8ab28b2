//! Jobs that waited for so long that their time is nearly over, or over.

use std::time::{Duration, Instant};

use bridge_backend::{Expiry, Observation, Outcome, Pattern};

use crate::bed::{Bed, Site, open, unwanted};
use crate::workers::wrong_date;

fn expiry(within: u64, reserve: u64) -> Option<Expiry> {
    Some(Expiry { within: Duration::from_secs(within), reserve: Duration::from_secs(reserve) })
}

/// A worker whose clock is off.
fn off_by(site: &Site, name: &str, hours: i64) -> String {
    let path = wrong_date(site, name, hours);
    format!(r#"{{"env": {{"PATH": "{path}"}}, "token_seconds": 600}}"#)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_whose_time_ends_soon_is_ended_in_time_and_brings_its_outputs_home() {
    if unwanted() {
        return;
    }
    let site = Site::on(&Bed::shared());
    let mut jobs = Vec::new();
    for odd in ["{}".to_owned(), off_by(&site, "ahead", 7), off_by(&site, "behind", -7)] {
        // It has a wall time of five minutes, of which waiting took all but a minute.
        let mut spec = site.spec(
            "trap 'echo told; echo late >more.txt; exit 0' TERM\necho kept >out.txt\n\
             while :; do sleep 0.2; done\n",
        );
        spec.limits.expiry = expiry(70, 10);
        spec.outputs = vec![Pattern("*.txt".into())];
        jobs.push((Instant::now(), site.submit_to(&odd, &spec).await, odd));
    }
    for (begun, job, odd) in jobs {
        let seen = site.until(&job, |seen| matches!(seen, Observation::Ended { .. })).await;
        let lasted = begun.elapsed();
        let Observation::Ended { outcome, .. } = seen else { panic!("{odd}: {seen:?}") };
        assert_eq!(outcome, Outcome::TimedOut, "{odd}");
        // The server's seconds are whole ones, and the submission took some time.
        assert!(lasted > Duration::from_secs(50), "{odd}: {lasted:?}");
        let log = String::from_utf8(site.log(&job).await).unwrap();
        let lines: Vec<&str> = log.lines().collect();
        let last =
            "bridge: the time that the job had is over, its waiting included, and it was ended";
        assert_eq!(lines, ["told", last], "{odd}");
        site.backend.collect(&job, &site.work()).await.unwrap();
        for (name, text) in [("out.txt", "kept\n"), ("more.txt", "late\n")] {
            let path = site.work().join(name);
            assert_eq!(std::fs::read_to_string(&path).unwrap(), text, "{odd}");
            std::fs::remove_file(path).unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_script_that_does_not_listen_is_killed_before_the_deadline() {
    if unwanted() {
        return;
    }
    let bed = Bed::shared();
    // Its grace alone would let it live for minutes.
    let more = "settle = '1s'\nlog_interval = '1s'\ncancel_interval = '1s'\nkill_grace = '10m'\n";
    let site = Site::of(&bed, open(&bed.url, &bed.token_file(), more));
    let mut spec = site.spec("trap '' TERM\necho kept >out.txt\nwhile :; do sleep 0.2; done\n");
    spec.limits.expiry = expiry(60, 16);
    spec.outputs = vec![Pattern("*.txt".into())];
    let job = site.submit(&spec).await;
    assert_eq!(site.outcome(&job).await, Outcome::TimedOut);
    site.backend.collect(&job, &site.work()).await.unwrap();
    assert_eq!(std::fs::read(site.work().join("out.txt")).unwrap(), b"kept\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_comes_too_late_does_not_begin() {
    if unwanted() {
        return;
    }
    let site = Site::on(&Bed::shared());
    let mut jobs = Vec::new();
    for odd in ["{}".to_owned(), off_by(&site, "ahead", 7), off_by(&site, "behind", -7)] {
        let mut spec = site.spec("echo ran >>@/ran\n");
        spec.limits.expiry = expiry(1, 1);
        jobs.push((site.submit_to(&odd, &spec).await, odd));
    }
    for (job, odd) in jobs {
        assert_eq!(site.outcome(&job).await, Outcome::Expired, "{odd}");
        assert_eq!(site.log(&job).await, b"", "{odd}");
        site.backend.release(&job).await.unwrap();
    }
    assert!(!site.dir.path().join("ran").exists());
}
