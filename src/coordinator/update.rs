//! `PUT /jobs/:id` and `GET /job`.

use std::time::Duration;

use serde::Deserialize;
use serde_json::json;

use super::api::Call;
use super::job::{Job, Told};
use super::reply::Reply;
use super::rules;
use super::runner::Info;
use super::state::{Shared, State};
use super::view::{EndedBy, Final, Status};

/// GitLab applies a final state after this time, persisted trace or not.
const FINALISING: Duration = Duration::from_secs(5 * 60);

/// The body of a PUT.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Update {
    pub(super) token: Option<String>,
    pub(super) state: Option<String>,
    pub(super) failure_reason: Option<String>,
    pub(super) exit_code: Option<i64>,
    pub(super) output: Option<Output>,
    pub(super) checksum: Option<String>,
    /// Read for its form alone.
    #[serde(rename = "info")]
    _info: Option<Info>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Output {
    pub(super) checksum: Option<String>,
    pub(super) bytesize: Option<u64>,
}

impl Update {
    pub(super) fn read(body: &[u8]) -> Result<Self, String> {
        serde_json::from_slice(body).map_err(|error| error.to_string())
    }

    pub(super) fn is_final(&self) -> bool {
        matches!(self.state.as_deref(), Some("success" | "failed"))
    }

    pub(super) fn to_final(&self) -> Final {
        let output = self.output.as_ref();
        Final {
            state: self.state.clone().unwrap_or_default(),
            failure_reason: self.failure_reason.clone(),
            exit_code: self.exit_code,
            checksum: output
                .and_then(|output| output.checksum.clone())
                .or_else(|| self.checksum.clone()),
            bytesize: output.and_then(|output| output.bytesize),
        }
    }
}

/// What every job call checks first. An expired token costs the job its life.
pub(super) fn enter(
    state: &mut State,
    id: i64,
    token: Option<&str>,
    now: Duration,
) -> Result<(), Reply> {
    let Some(job) = state.job_mut(id) else { return Err(Reply::forbidden()) };
    if job.token.is_empty() || token != Some(job.token.as_str()) {
        return Err(Reply::forbidden());
    }
    if job.erased {
        return Err(Reply::message(403, "403 Forbidden - Job has been erased!"));
    }
    if !job.status.takes_calls() && job.unacknowledged.is_none() {
        let text = "403 Forbidden - Job is not processing on runner";
        return Err(Reply::message(403, text).with("Job-Status", job.status.name()));
    }
    if job.token_expired(now) {
        state.drop_job(id, "job_token_expired", now);
        let name = state.job(id).map(|job| job.status.name()).unwrap_or_default();
        let text = "403 Forbidden - Job token has expired";
        return Err(Reply::message(403, text).with("Job-Status", name));
    }
    Ok(())
}

/// `PUT /jobs/:id`.
pub(super) fn update(shared: &Shared, call: &Call) -> Reply {
    let Some(id) = call.job else { return Reply::forbidden() };
    let update = match &call.update {
        Some(Ok(update)) => update,
        Some(Err(error)) => return Reply::error(400, error),
        None => return Reply::error(400, "token is missing"),
    };
    let now = shared.clock.now();
    let mut state = shared.lock();
    if update.token.is_none() {
        state.violation(format!("job {id}: PUT without `token` in the body"));
        return Reply::error(400, "token is missing");
    }
    rules::on_update(&mut state, shared.options.version, id, update);
    if update.is_final()
        && let Some(job) = state.job_mut(id)
    {
        job.finals += 1;
    }
    if let Err(reply) = enter(&mut state, id, update.token.as_deref(), now) {
        rules::on_refused(&mut state, id, call.endpoint);
        return reply;
    }
    let limit = state.knobs.rate_limits.updates;
    let Some(job) = state.job_mut(id) else { return Reply::forbidden() };
    if let Err(seconds) = job.update_window.count(now, limit) {
        return Reply::too_many(seconds);
    }
    let waiting = job.unacknowledged.is_some();
    let reply = match update.state.as_deref() {
        Some("pending") if waiting => {
            job.unacknowledged = Some(now);
            Reply::plain(200)
        }
        Some("success" | "failed") if waiting => Reply::plain(400),
        Some("running") => {
            rules::on_sign_of_life(&mut state, id, now);
            running(&mut state, id, waiting, now);
            Reply::plain(200)
        }
        Some("success" | "failed") => finalise(&mut state, id, update, shared, now),
        _ => Reply::plain(400),
    };
    let name = state.job(id).map(|job| job.status.name()).unwrap_or_default();
    reply.with("Job-Status", name)
}

fn running(state: &mut State, id: i64, waiting: bool, now: Duration) {
    if waiting {
        state.acknowledge(id);
    }
    if let Some(job) = state.job_mut(id) {
        job.updates += 1;
        job.running_at.get_or_insert(now);
        job.touch(now);
    }
}

/// Takes a final state: at once, or after the trace was persisted.
fn finalise(state: &mut State, id: i64, update: &Update, shared: &Shared, now: Duration) -> Reply {
    rules::on_sign_of_life(state, id, now);
    let rounds = state.knobs.live_trace;
    let custom = state.knobs.final_interval.clone();
    let Some(job) = state.job_mut(id) else { return Reply::forbidden() };
    // The first final state counts, whatever the repetitions say.
    let wanted = job.final_update.clone().unwrap_or_else(|| update.to_final());
    if let Some(rounds) = rounds
        && wanted.checksum.is_some()
        && !job.persisted
    {
        let (since, given) = *job.finalising.get_or_insert((now, 0));
        let age = now.saturating_sub(since);
        if given < rounds && age < FINALISING {
            job.finalising = Some((since, given + 1));
            job.final_update.get_or_insert(wanted);
            let interval = custom.unwrap_or_else(|| backoff(age).to_string());
            return Reply::plain(202).with("X-GitLab-Trace-Update-Interval", interval);
        }
    }
    job.final_update = Some(wanted.clone());
    job.final_told = Told::default();
    rules::on_final(state, id, &wanted);
    apply(state, id, &wanted, shared, now);
    Reply::plain(200)
}

/// The pauses of a trace that is being persisted, by the age of the final state.
fn backoff(age: Duration) -> u64 {
    match age.as_secs() {
        0..4 => 1,
        4..8 => 2,
        8..16 => 4,
        16..32 => 8,
        32..64 => 16,
        64..128 => 32,
        _ => 64,
    }
}

fn apply(state: &mut State, id: i64, wanted: &Final, shared: &Shared, now: Duration) {
    let Some(job) = state.job_mut(id) else { return };
    job.exit_code = wanted.exit_code.map(|code| code.clamp(0, 32_767));
    let status = match (job.status, wanted.state.as_str()) {
        (Status::Canceling, _) => Status::Canceled,
        (_, "success") => Status::Success,
        _ => Status::Failed,
    };
    let reason = (status == Status::Failed).then(|| {
        let sent = wanted.failure_reason.as_deref().unwrap_or("unknown_failure");
        let known = shared.options.version.failure_reasons().any(|name| name == sent);
        if known || is_listed(job, sent) { sent } else { "unknown_failure" }
    });
    state.finish(id, status, reason, EndedBy::Runner, now);
}

fn is_listed(job: &Job, name: &str) -> bool {
    job.reasons.iter().flatten().any(|listed| listed == name)
}

/// `GET /job`: the job of the token, while it is at work.
pub(super) fn job_info(shared: &Shared, call: &Call) -> Reply {
    let now = shared.clock.now();
    let state = shared.lock();
    let token =
        call.header("job-token").map(str::to_owned).or_else(|| call.query_param("job_token"));
    let id = token.and_then(|token| state.job_by_token.get(&token).copied());
    let job = id.and_then(|id| state.job(id));
    let Some(job) = job.filter(|job| job.status.takes_calls() && !job.token_expired(now)) else {
        return Reply::message(401, "401 Unauthorized");
    };
    let body = json!({
        "id": job.id, "status": job.status.name(), "stage": &*job.stage, "name": &*job.name,
        "allow_failure": job.allow_failure,
    });
    Reply::json(200, body.to_string())
}
