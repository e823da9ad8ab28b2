//! `PATCH /jobs/:id/trace`: appends at the right offset, or says where that is.

use std::borrow::Cow;

use super::api::Call;
use super::fault::Endpoint;
use super::reply::Reply;
use super::rules;
use super::state::Shared;
use super::update::enter;

const MIB: u64 = 1024 * 1024;

pub(super) fn patch(shared: &Shared, call: &Call) -> Reply {
    let Some(id) = call.job else { return Reply::forbidden() };
    let token = call.query_param("token");
    let token = token.as_deref().or_else(|| call.header("job-token"));
    let now = shared.clock.now();
    let mut state = shared.lock();
    if let Err(reply) = enter(&mut state, id, token, now) {
        rules::on_refused(&mut state, id, Endpoint::Patch);
        return reply;
    }
    let limit = state.knobs.rate_limits.patches;
    let max_mib = state.knobs.trace_limit_mib;
    let custom = state.knobs.trace_interval.clone();
    let Some(range) = call.header("content-range").map(str::to_owned) else {
        state.violation(format!("job {id}: PATCH without Content-Range"));
        return Reply::error(400, "400 Missing header Content-Range");
    };
    // Only the start counts, and whatever is not a number is 0.
    let start: u64 = leading_number(&range);
    let length = u64::try_from(call.body.len()).unwrap_or(u64::MAX);
    let Some(job) = state.job_mut(id) else { return Reply::forbidden() };
    if let Err(seconds) = job.patch_window.count(now, limit) {
        return Reply::too_many(seconds);
    }
    let stored = hide(&call.body, job.token.as_bytes());
    rules::on_patch(&mut state, id, &range, start, &stored);
    rules::on_sign_of_life(&mut state, id, now);
    if start.saturating_add(length) / MIB > max_mib {
        state.drop_job(id, "trace_size_exceeded", now);
        rules::on_refused(&mut state, id, Endpoint::Patch);
        return Reply::error(403, "403 Forbidden");
    }
    let Some(job) = state.job_mut(id) else { return Reply::forbidden() };
    if job.trace_len != start {
        job.refused_patches += 1;
        return Reply::error(416, "416 Range Not Satisfiable")
            .with("Range", format!("0-{}", job.trace_len));
    }
    if start == 0 {
        job.debug_trace = call.query_param("debug_trace").as_deref() == Some("true");
    }
    job.append(&call.body, &stored);
    job.patches += 1;
    job.first_trace_at.get_or_insert(now);
    job.touch(now);
    let interval = custom.unwrap_or_else(|| if job.watched { "3" } else { "60" }.to_owned());
    Reply::plain(202)
        .with("Job-Status", job.status.name())
        .with("Range", format!("0-{}", job.trace_len))
        .with("X-GitLab-Trace-Update-Interval", interval)
}

fn leading_number(text: &str) -> u64 {
    let digits: String = text.trim_start().chars().take_while(char::is_ascii_digit).collect();
    digits.parse().unwrap_or(0)
}

/// Replaces the token by as many `x`.
fn hide<'a>(data: &'a [u8], token: &[u8]) -> Cow<'a, [u8]> {
    let mut hidden: Option<Vec<u8>> = None;
    let mut from = 0;
    while let Some(at) = rules::find(data.get(from..).unwrap_or_default(), token) {
        let copy = hidden.get_or_insert_with(|| data.to_vec());
        if let Some(place) = copy.get_mut(from + at..from + at + token.len()) {
            place.fill(b'x');
        }
        from += at + token.len();
    }
    hidden.map_or(Cow::Borrowed(data), Cow::Owned)
}
