//! Cancelling, limits, releasing.

use tokio::time::Instant;

use super::trial::{
    Checked, Done, Trial, WAIT_FOR_GO, ensure, get, outcome, processes_naming, put, story,
};
use super::unique;
use crate::{Observation, Outcome};

pub(super) async fn a_cancelled_job_ends_with_all_its_processes(trial: &mut Trial<'_>) -> Checked {
    // A number of seconds that nobody else sleeps for.
    let sleep = format!("1{:08}.25", unique() % 100_000_000);
    let strays = trial.harness.finds_strays();
    let stray = if strays {
        format!("(setsid sh -c 'sleep {sleep} & sleep {sleep}' &)")
    } else {
        String::new()
    };
    let mut spec = trial.spec(format!(
        "trap '' TERM\n\
         setsid sleep {sleep} &\n\
         {stray}\n\
         sleep {sleep} &\n\
         : >ready\n\
         while :; do sleep {sleep}; done\n"
    ));
    spec.env.push(super::trial::variable("CF", "1"));
    let job = trial.submit(&spec).await?;
    trial.wait_file(&spec.workspace.join("ready")).await?;
    let visible = trial.harness.sees_processes();
    if visible {
        let until = Instant::now() + trial.patience();
        let all = if strays { 5 } else { 3 };
        while processes_naming(&sleep).len() < all {
            ensure!(Instant::now() < until, "the job did not start its processes");
            trial.pause().await;
        }
    }
    // Twice at once, as two sweeps around a crash would.
    for _ in 0..2 {
        trial.backend.cancel(std::slice::from_ref(&job)).await.map_err(story("cancel"))?;
        trial.restart();
    }
    let outcome = trial.cancel(&job).await?;
    ensure!(matches!(outcome, Outcome::Cancelled { .. }), "a cancelled job ended as {outcome:?}");
    if visible {
        let left = processes_naming(&sleep);
        ensure!(left.is_empty(), "left behind: {left:?}");
    }
    Ok(Done::Checked)
}

pub(super) async fn a_cancelled_script_hears_term_and_finds_the_mark(
    trial: &mut Trial<'_>,
) -> Checked {
    let spec = trial.spec(
        "trap 'kill $!; [ -e \"$BRIDGE_JOB_DIR/cancelled\" ] && : >marked\n\
         printf \"exit_code=143\\nstep=script\\nsignalled=TERM\\n\" >\"$BRIDGE_JOB_DIR/r\"\n\
         mv \"$BRIDGE_JOB_DIR/r\" \"$BRIDGE_JOB_DIR/result\"; echo stopped; exit 143' TERM\n\
         sleep 600 &\n: >ready\nwait $!\nexit 9\n",
    );
    let job = trial.submit(&spec).await?;
    trial.wait_file(&spec.workspace.join("ready")).await?;
    let outcome = trial.cancel(&job).await?;
    ensure!(matches!(outcome, Outcome::Cancelled { .. }), "a cancelled job ended as {outcome:?}");
    ensure!(spec.workspace.join("marked").exists(), "the script did not hear TERM with the mark");
    Ok(Done::Checked)
}

pub(super) async fn a_job_that_waits_can_be_cancelled(trial: &mut Trial<'_>) -> Checked {
    if !trial.harness.hold_jobs(true).await {
        return Ok(Done::Skipped("jobs cannot be kept waiting".to_owned()));
    }
    let spec = trial.spec("echo run >runs\n");
    let job = trial.submit(&spec).await?;
    trial.wait(&job, "a waiting job", |seen| matches!(seen, Observation::Pending { .. })).await?;
    let outcome = trial.cancel(&job).await?;
    ensure!(matches!(outcome, Outcome::Cancelled { .. }), "it ended as {outcome:?}");
    trial.harness.hold_jobs(false).await;
    trial.pause().await;
    ensure!(get(&spec.workspace, "runs").is_err(), "it ran after it was cancelled");
    Ok(Done::Checked)
}

pub(super) async fn a_cancel_after_the_end_changes_nothing(trial: &mut Trial<'_>) -> Checked {
    let spec = trial.spec("echo text\nexit 5\n");
    let job = trial.submit(&spec).await?;
    trial.expect(&job, 5).await?;
    for _ in 0..2 {
        trial.backend.cancel(std::slice::from_ref(&job)).await.map_err(story("cancel"))?;
        trial.expect(&job, 5).await?;
    }
    let log = trial.log(&job).await?;
    ensure!(log == b"text\n", "the log is {:?}", String::from_utf8_lossy(&log));
    Ok(Done::Checked)
}

pub(super) async fn the_wall_time_is_a_limit(trial: &mut Trial<'_>) -> Checked {
    let Some(limit) = trial.harness.wall_time() else {
        return Ok(Done::Skipped("no limit is short enough".to_owned()));
    };
    let mut long = trial.spec("trap '' TERM\nwhile :; do sleep 1; done\n");
    long.limits.wall_time = Some(limit);
    let mut short = trial.spec(WAIT_FOR_GO);
    short.limits.wall_time = Some(limit);
    put(&short.workspace, "go", "")?;
    let long = trial.submit(&long).await?;
    let short = trial.submit(&short).await?;
    trial.expect(&short, 0).await?;
    let outcome = trial.wait_end(&long).await?;
    ensure!(outcome == Outcome::TimedOut, "over its limit, it ended as {outcome:?}");
    Ok(Done::Checked)
}

pub(super) async fn a_release_may_be_repeated(trial: &mut Trial<'_>) -> Checked {
    let spec = trial.spec("echo text\n");
    let job = trial.submit(&spec).await?;
    trial.expect(&job, 0).await?;
    trial.log(&job).await?;
    trial.release(&job).await?;
    trial.restart();
    trial.release(&job).await?;
    if let Some(dir) = trial.harness.job_dir(&job.token) {
        ensure!(!dir.exists(), "{dir} is still there");
    }
    let seen = trial.backend.poll(std::slice::from_ref(&job)).await.map_err(story("poll"))?;
    ensure!(
        seen.get(&job.id)
            .is_none_or(|seen| { *seen == Observation::Gone || outcome(seen).is_some() }),
        "a released job is {seen:?}"
    );
    trial.backend.cancel(std::slice::from_ref(&job)).await.map_err(story("cancel"))?;
    Ok(Done::Checked)
}
