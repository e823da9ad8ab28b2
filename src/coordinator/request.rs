//! `POST /jobs/request`: Workhorse, which waits for news, and Rails, which hands out jobs.

use std::sync::Arc;

use super::api::{Call, within};
use super::register::RunnerCall;
use super::reply::Reply;
use super::rules;
use super::state::{Shared, State};

/// Workhorse reads no more than this.
const MAX_BODY: usize = 32 * 1024;
const LAST_UPDATE: &str = "X-GitLab-Last-Update";
const POLLING: &str = "Gitlab-Ci-Builds-Polling";

pub(super) async fn request(shared: &Arc<Shared>, call: &Call) -> Reply {
    if call.body.len() > MAX_BODY {
        return Reply::message(413, "413 Request Entity Too Large");
    }
    let (body, token) = match RunnerCall::read(call) {
        Ok(read) => read,
        Err(reply) => return reply,
    };
    if let Some(last) = &body.last_update
        && let Some(reply) = wait_for_news(shared, &token, last).await
    {
        return reply;
    }
    shared.change(|state, now| {
        let Some(at) = state.runner_at(&token, now) else { return Reply::forbidden() };
        rails(shared, state, at, &body, now)
    })
}

/// Holds the call back until the queue's value is another. The answer is then 204 without a new
/// value in any case: the client is to ask again.
async fn wait_for_news(shared: &Arc<Shared>, token: &str, last: &str) -> Option<Reply> {
    let (limit, news) = {
        let mut state = shared.lock();
        let now = shared.clock.now();
        let limit = state.knobs.long_poll?;
        let at = state.runner_at(token, now)?;
        let runner = state.runners.get_mut(at)?;
        if runner.queue_value(now) != last {
            return None;
        }
        // Made under the lock, under which the bell is rung as well: no ring is missed.
        (limit, Arc::clone(&runner.news).notified_owned())
    };
    within(limit, news).await;
    Some(Reply::empty(204).with(POLLING, "yes"))
}

fn rails(
    shared: &Shared,
    state: &mut State,
    at: usize,
    body: &RunnerCall,
    now: std::time::Duration,
) -> Reply {
    let limit = state.knobs.rate_limits.requests;
    let Some(runner) = state.runners.get_mut(at) else { return Reply::forbidden() };
    if let Err(seconds) = runner.window.count(now, limit) {
        return Reply::too_many(seconds);
    }
    if runner.orphaned {
        return Reply::message(422, "422 Unprocessable entity - runner is orphaned");
    }
    let (system_id, new) = runner.heartbeat(body.system_id.as_deref(), body.info.as_ref(), now);
    let value = runner.queue_value(now).to_owned();
    let paused = runner.options.paused;
    if new {
        rules::on_new_manager(state, &system_id, body.info.as_ref());
    }
    let can = |feature: &str| body.info.as_ref().is_some_and(|info| info.has(feature));
    let known = body.last_update.as_deref() == Some(value.as_str());
    if !paused
        && !known
        && let Some(payload) = state.assign(at, &system_id, can, shared, now)
    {
        return Reply::json(201, payload).with(POLLING, "yes");
    }
    Reply::empty(204).with(LAST_UPDATE, value).with(POLLING, "yes")
}
