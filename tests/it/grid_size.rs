//! What is large: a log of 20 MB, a workspace of 200 MB.

use std::io::Write as _;

use bridge::coordinator::{Git, NewJob, Status};
use sha2::{Digest as _, Sha256};

use crate::grid::{commit, eager};
use crate::support::grid::{self, Grid};
use crate::support::{PATIENCE, text_of};

/// Gives the most memory that a process ever had, in MiB.
fn peak(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() >> 10
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_of_20_mb_comes_home_whole_and_in_order() {
    if grid::left_out() {
        return;
    }
    let grid = Grid::shared();
    let bed = grid.bed(eager(), "").await;
    bed.write_config("", "output_limit = 40960", "");
    let daemon = bed.serve();
    let id = bed.gitlab.enqueue(
        bed.counting("long log")
            .script("seq -f 'line %.0f of a log that is long enough' 1 500000; echo the end"),
    );
    let job = match bed.gitlab.wait_finished(id, PATIENCE * 4).await {
        Ok(job) => job,
        Err(job) => panic!("{} bytes came\n{}", job.trace_len, bed.log()),
    };
    let text = text_of(&job);
    assert_eq!(job.status, Status::Success, "{}", bed.log());
    assert!(!text.contains("did not arrive in time"), "{}", bed.log());
    let (before, log) = text.split_at(text.find("line 1 of a log").unwrap());
    let mut lines = log.lines();
    for n in 1..=500_000 {
        assert_eq!(lines.next(), Some(&*format!("line {n} of a log that is long enough")));
    }
    assert_eq!(lines.next(), Some("the end"));
    assert!(!before.contains("of a log that is long enough\n"));
    bed.nothing_owed().await;
    bed.assert_once(id);
    let peak = peak(daemon.pid());
    println!("a log of {} bytes: the daemon's memory peaked at {peak} MiB", job.trace_len);
    // What is remembered of logs is bounded by itself; the rest does not grow with them.
    assert!(peak < 160, "{peak} MiB");
    bed.assert_no_violations();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_workspace_of_200_mb_travels_to_the_worker() {
    if grid::left_out() {
        return;
    }
    let grid = Grid::shared();
    let bed = grid.bed(eager(), "").await;
    // Text, so that git is done with it soon; bytes that no compression makes fewer are the backend's
    // own test.
    let work = bed.path("project");
    std::fs::create_dir_all(&work).unwrap();
    let mut file = std::io::BufWriter::new(std::fs::File::create(work.join("large")).unwrap());
    let mut sum = Sha256::new();
    for n in 0..200 {
        let block = format!("block {n:6} of the file\n").repeat((1 << 20) / 25);
        sum.update(block.as_bytes());
        file.write_all(block.as_bytes()).unwrap();
    }
    file.flush().unwrap();
    drop(file);
    commit(&work);
    let sum: String = sum.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    bed.gitlab.serve_repository("hep/large", &work).await.unwrap();
    let daemon = bed.serve();
    let id = bed.gitlab.enqueue(
        NewJob::new("large")
            .project("hep/large", 7)
            .git(Git::default())
            .script("sha256sum < large; du -sm . | cut -f1 | sed 's/^/MiB here: /'"),
    );
    let job = match bed.gitlab.wait_finished(id, PATIENCE * 4).await {
        Ok(job) => job,
        Err(job) => panic!("{job:?}\n{}", bed.log()),
    };
    let text = text_of(&job);
    assert_eq!(job.status, Status::Success, "{text}");
    assert!(text.contains(&format!("\n{sum}  -\n")), "{text}");
    bed.nothing_owed().await;
    let peak = peak(daemon.pid());
    println!("a workspace of 200 MB: the daemon's memory peaked at {peak} MiB");
    assert!(peak < 160, "{peak} MiB");
    bed.assert_no_violations();
}
