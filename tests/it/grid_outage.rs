//! A DiracX that is away, frozen, or not up yet: jobs go on, and none is lost, run twice or called failed.

use bridge::coordinator::Status;

use crate::grid::{dirac_id, eager};
use crate::support::grid::{self, Grid};
use crate::support::{Bed, PATIENCE, text_of, until};

/// Says how many jobs have ended on their workers, where each leaves its last word.
fn ended_over_there(grid: &Grid) -> usize {
    let jobs = std::fs::read_dir(grid.jobs_dir()).unwrap().flatten();
    let words = jobs
        .filter_map(|job| std::fs::read_to_string(job.path().join("work/bridge-result.txt")).ok());
    words.filter(|word| word.starts_with("bridge: ended ")).count()
}

/// Counts the questions to DIRAC that the daemons have given up so far.
fn unanswered(bed: &Bed) -> usize {
    let log = std::fs::read_to_string(bed.path("daemon.log")).unwrap();
    log.lines().filter(|line| line.contains("get an answer from 127.0.0.1")).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_diracx_that_goes_away_in_the_middle_costs_nothing_but_time() {
    if grid::left_out() {
        return;
    }
    let grid = Grid::start("outage", &["--slots", "2"]);
    // Not up yet when the daemon starts, and busy with its start for a while after.
    grid.tamper(&["server-stop", "KILL"]);
    let bed = grid.bed(eager(), "request_timeout = \"3s\"").await;
    let daemon = bed.serve();
    until("the daemon to be up", || bed.log().contains("bridge serves").then_some(())).await;
    let job = |name: &str, gate: &str| {
        bed.counting(name)
            .script("for i in 1 2 3; do echo \"line $i\"; done")
            .script(bed.wait_for(gate))
            .script("echo after the gate")
    };
    let running: Vec<i64> =
        (0..2).map(|n| bed.gitlab.enqueue(job(&format!("running {n}"), "first"))).collect();
    until("the bridge to miss the server", || bed.log().contains("failed").then_some(())).await;
    assert!(!running.iter().any(|id| bed.gitlab.job(*id).unwrap().is_finished()));
    grid.tamper(&["server-start"]);
    until("two jobs to run", || running.iter().all(|id| bed.runs(*id) == 1).then_some(())).await;
    // Two more are queued behind them.
    let mut queued = Vec::new();
    for n in 0..2 {
        queued.push(bed.gitlab.enqueue(job(&format!("queued {n}"), "second")));
        dirac_id(&bed, queued[n]).await;
    }
    // Killed with jobs running and queued; a job that is taken meanwhile waits for it.
    grid.tamper(&["server-stop", "KILL"]);
    let taken = bed.gitlab.enqueue(job("taken", "second"));
    until("it to be taken", || (!bed.row(taken).is_null()).then_some(())).await;
    // The jobs' ends come while nobody hears them.
    bed.open("first");
    until("the jobs to end", || (ended_over_there(&grid) == 2).then_some(())).await;
    grid.tamper(&["server-start"]);
    for id in &running {
        bed.finished(*id).await;
    }
    until("a queued job to run", || queued.iter().any(|id| bed.runs(*id) == 1).then_some(())).await;
    // Frozen: it takes connections and says nothing.
    grid.tamper(&["server-freeze"]);
    let frozen = bed.gitlab.enqueue(job("frozen", "second"));
    bed.open("second");
    let before = unanswered(&bed);
    until("a question to go unanswered", || (unanswered(&bed) > before).then_some(())).await;
    // The bridge is killed and started again in front of a frozen server, too.
    daemon.kill();
    let before = unanswered(&bed);
    let _daemon = bed.serve();
    until("another one to go unanswered", || (unanswered(&bed) > before).then_some(())).await;
    grid.tamper(&["server-thaw"]);
    bed.all_finished(PATIENCE * 2).await;
    bed.nothing_owed().await;
    for id in running.into_iter().chain(queued).chain([taken, frozen]) {
        let job = bed.gitlab.job(id).unwrap();
        let text = text_of(&job);
        assert_eq!(job.status, Status::Success, "{text}\n{}", bed.log());
        bed.assert_once(id);
        for line in ["line 1\nline 2\nline 3", "after the gate"] {
            assert_eq!(text.matches(&format!("\n{line}\n")).count(), 1, "{line:?} in {text}");
        }
    }
    grid.assert_no_twins(&bed);
    bed.assert_no_violations();
}
