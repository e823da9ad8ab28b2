//! Finding and polling: lost answers, dropped futures, restarts, strangers.

use super::Loss;
use super::trial::{
    Checked, Done, Trial, WAIT_FOR_GO, cut, ensure, get, offset, outcome, put, story,
};
use crate::{ErrorKind, JobRef, Lookup, Observation};

/// Leaves one line per run, so that two runs are two lines.
const COUNT: &str = "echo run >>runs\n";

/// The most awaits that a call is expected to have; beyond, dropping it is not tried.
const AWAITS: usize = 40;

pub(super) async fn a_submitted_job_is_found_by_its_token(trial: &mut Trial<'_>) -> Checked {
    let Lookup::ByToken { settle } = trial.backend.capabilities().lookup else {
        return Ok(Done::Skipped("there is no lookup by token".to_owned()));
    };
    let spec = trial.spec(WAIT_FOR_GO);
    let job = trial.submit(&spec).await?;
    let stranger = Trial::token()?;
    trial.harness.settle(settle).await;
    for _ in 0..2 {
        let asked = [stranger.clone(), job.token.clone()];
        let found = trial.backend.find(&asked).await.map_err(story("find"))?;
        ensure!(found.get(&job.token) == Some(&job.id), "found {found:?}, not {job:?}");
        ensure!(found.len() == 1, "found what was never submitted: {found:?}");
        trial.restart();
    }
    put(&spec.workspace, "go", "")?;
    trial.expect(&job, 0).await?;
    let found = trial.find(&job.token).await?;
    ensure!(found.is_some_and(|found| found == job), "an ended job is not found");
    Ok(Done::Checked)
}

pub(super) async fn a_lost_answer_is_found_again(trial: &mut Trial<'_>) -> Checked {
    lose(trial, Loss::Answer).await
}

pub(super) async fn a_lost_question_is_absent_and_may_be_asked_again(
    trial: &mut Trial<'_>,
) -> Checked {
    lose(trial, Loss::Question).await
}

/// Loses a part of a submission and resolves it as a caller must.
async fn lose(trial: &mut Trial<'_>, loss: Loss) -> Checked {
    if !trial.harness.lose_next_submit(loss).await {
        return Ok(Done::Skipped("nothing can be lost".to_owned()));
    }
    let spec = trial.spec(COUNT);
    let token = Trial::token()?;
    match trial.backend.submit(&token, &spec).await {
        Ok(id) => {
            trial.note(token, id);
            return Err("the submission was to be lost and was answered".to_owned());
        }
        Err(error) => ensure!(
            error.kind() == ErrorKind::Ambiguous,
            "a lost {loss:?} is {}",
            story("submit")(error)
        ),
    }
    let by_token = matches!(trial.backend.capabilities().lookup, Lookup::ByToken { .. });
    if by_token && loss == Loss::Question && trial.find(&token).await?.is_some() {
        return Err("found what never arrived".to_owned());
    }
    trial.restart();
    let Some(job) = trial.resolve(&token, &spec).await? else {
        return Ok(Done::Skipped("doubts cannot be resolved".to_owned()));
    };
    trial.expect(&job, 0).await?;
    let runs = get(&spec.workspace, "runs")?;
    ensure!(runs == b"run\n", "it ran {} times", runs.len() / 4);
    Ok(Done::Checked)
}

pub(super) async fn a_dropped_submission_is_resolved_and_runs_once(
    trial: &mut Trial<'_>,
) -> Checked {
    let mut jobs = Vec::new();
    for polls in 0..AWAITS {
        let spec = trial.spec(COUNT);
        let token = Trial::token()?;
        let done = cut(trial.backend.submit(&token, &spec), polls).await;
        match done {
            Some(Ok(id)) => {
                jobs.push((trial.note(token, id), spec));
                break;
            }
            Some(Err(error)) => return Err(story("submit")(error)),
            None => {}
        }
        trial.restart();
        match trial.resolve(&token, &spec).await? {
            Some(job) => jobs.push((job, spec)),
            None => return Ok(Done::Skipped("doubts cannot be resolved".to_owned())),
        }
    }
    for (cut, (job, spec)) in jobs.into_iter().enumerate() {
        trial.expect(&job, 0).await.map_err(|story| format!("dropped after {cut}: {story}"))?;
        let runs = get(&spec.workspace, "runs")?;
        ensure!(runs == b"run\n", "dropped after {cut}, it ran {} times", runs.len() / 4);
    }
    Ok(Done::Checked)
}

pub(super) async fn dropped_questions_leave_nothing_behind(trial: &mut Trial<'_>) -> Checked {
    let spec = trial.spec(format!("echo text\n{WAIT_FOR_GO}"));
    let job = trial.submit(&spec).await?;
    trial.wait_running(&job).await?;
    let by_token = matches!(trial.backend.capabilities().lookup, Lookup::ByToken { .. });
    let jobs = [job.clone()];
    for polls in 0..AWAITS {
        let mut done = vec![
            cut(trial.backend.poll(&jobs), polls).await.map(|r| r.map(drop)),
            cut(trial.backend.read_log(&job, 0, 100), polls).await.map(|r| r.map(drop)),
            cut(trial.backend.check(), polls).await,
        ];
        if by_token {
            let tokens = [job.token.clone()];
            done.push(cut(trial.backend.find(&tokens), polls).await.map(|r| r.map(drop)));
        }
        let mut all = true;
        for done in done {
            match done {
                Some(Ok(())) => {}
                Some(Err(error)) => return Err(story("ask beside a dropped question")(error)),
                None => all = false,
            }
        }
        if all {
            break;
        }
    }
    trial.wait_running(&job).await?;
    put(&spec.workspace, "go", "")?;
    trial.expect(&job, 0).await?;
    for polls in 0..AWAITS {
        match cut(trial.backend.release(&job), polls).await {
            Some(Ok(())) => break,
            Some(Err(error)) if error.kind() == ErrorKind::Transient => trial.pause().await,
            Some(Err(error)) => return Err(story("release")(error)),
            None => {}
        }
    }
    trial.release(&job).await?;
    Ok(Done::Checked)
}

pub(super) async fn a_restart_in_any_phase_changes_nothing(trial: &mut Trial<'_>) -> Checked {
    let spec = trial.spec(format!("{COUNT}echo before\n{WAIT_FOR_GO}echo after\nexit 6\n"));
    let job = trial.submit(&spec).await?;
    trial.restart();
    trial.wait_running(&job).await?;
    trial.restart();
    trial.wait_file(&spec.workspace.join("runs")).await?;
    trial.restart();
    put(&spec.workspace, "go", "")?;
    trial.expect(&job, 6).await?;
    let log = trial.log(&job).await?;
    trial.restart();
    trial.expect(&job, 6).await?;
    let again = trial.log(&job).await?;
    ensure!(log == again, "the log changed from {log:?} to {again:?}");
    ensure!(log == b"before\nafter\n", "the log is {:?}", String::from_utf8_lossy(&log));
    let end = trial.backend.read_log(&job, offset(log.len()), 10).await.map_err(story("read"))?;
    ensure!(end.bytes.is_empty() && end.end, "after the end comes {end:?}");
    ensure!(get(&spec.workspace, "runs")? == b"run\n", "it did not run once");
    trial.restart();
    trial.release(&job).await?;
    Ok(Done::Checked)
}

pub(super) async fn one_poll_asks_for_many(trial: &mut Trial<'_>) -> Checked {
    if trial.harness.queries().is_none() {
        return Ok(Done::Skipped("questions cannot be counted".to_owned()));
    }
    let spec = trial.spec(WAIT_FOR_GO);
    let mut jobs = Vec::new();
    for _ in 0..12 {
        jobs.push(trial.submit(&spec).await?);
    }
    let first: Vec<JobRef> = jobs.first().cloned().into_iter().collect();
    for phase in ["running", "ended"] {
        if phase == "ended" {
            put(&spec.workspace, "go", "")?;
            for job in &jobs {
                trial.expect(job, 0).await?;
            }
        }
        let one = count(trial, &first).await?;
        let many = count(trial, &jobs).await?;
        ensure!(many <= one, "{one} questions for one job, {many} for {} {phase}", jobs.len());
    }
    Ok(Done::Checked)
}

/// Counts the questions of one poll.
async fn count(trial: &mut Trial<'_>, jobs: &[JobRef]) -> Result<usize, String> {
    let before = trial.harness.queries().unwrap_or_default();
    let seen = trial.backend.poll(jobs).await.map_err(story("poll"))?;
    let after = trial.harness.queries().unwrap_or_default();
    for id in seen.keys() {
        ensure!(jobs.iter().any(|job| job.id == *id), "an answer about {id}, unasked");
    }
    Ok(after - before)
}

pub(super) async fn an_unknown_job_is_gone_or_absent_and_no_error(
    trial: &mut Trial<'_>,
) -> Checked {
    let stranger = JobRef { token: Trial::token()?, id: trial.harness.unknown_id() };
    let spec = trial.spec(WAIT_FOR_GO);
    let job = trial.submit(&spec).await?;
    trial.wait_running(&job).await?;
    let both = [stranger.clone(), job.clone()];
    let seen = trial.backend.poll(&both).await.map_err(story("poll"))?;
    ensure!(
        seen.get(&stranger.id).is_none_or(|seen| *seen == Observation::Gone),
        "an unknown job is {seen:?}"
    );
    ensure!(
        matches!(seen.get(&job.id), Some(Observation::Running { .. })),
        "beside an unknown job, a running one is {seen:?}"
    );
    ensure!(
        trial.backend.poll(&[]).await.map_err(story("poll for nothing"))?.is_empty(),
        "no question, and an answer"
    );
    trial
        .backend
        .cancel(std::slice::from_ref(&stranger))
        .await
        .map_err(story("cancel a stranger"))?;
    trial.backend.cancel(&[]).await.map_err(story("cancel nothing"))?;
    trial.backend.release(&stranger).await.map_err(story("release a stranger"))?;
    match trial.backend.read_log(&stranger, 0, 10).await {
        Ok(chunk) => ensure!(chunk.bytes.is_empty() && !chunk.end, "a stranger wrote {chunk:?}"),
        Err(error) => {
            ensure!(error.kind() == ErrorKind::Lost, "{}", story("read a stranger's log")(error));
        }
    }
    Ok(Done::Checked)
}

pub(super) async fn both_names_must_match(trial: &mut Trial<'_>) -> Checked {
    // Sites reuse ids: the id alone proves nothing.
    let spec = trial.spec("exit 0\n");
    let job = trial.submit(&spec).await?;
    trial.expect(&job, 0).await?;
    let chimera = JobRef { token: Trial::token()?, id: job.id.clone() };
    let seen = trial.backend.poll(std::slice::from_ref(&chimera)).await.map_err(story("poll"))?;
    ensure!(
        seen.get(&chimera.id).is_none_or(|seen| outcome(seen).is_none()),
        "a job of another token was taken for ours: {seen:?}"
    );
    Ok(Done::Checked)
}

pub(super) async fn an_unknown_status_is_unclear_and_no_error(trial: &mut Trial<'_>) -> Checked {
    let spec = trial.spec(WAIT_FOR_GO);
    let job = trial.submit(&spec).await?;
    if !trial.harness.say_unknown_status(&job, "WOBBLING").await {
        return Ok(Done::Skipped("the other side says known words only".to_owned()));
    }
    let seen = trial.backend.poll(std::slice::from_ref(&job)).await.map_err(story("poll"))?;
    ensure!(
        matches!(seen.get(&job.id), Some(Observation::Unclear { status }) if status == "WOBBLING"),
        "an unknown status is {seen:?}"
    );
    Ok(Done::Checked)
}
