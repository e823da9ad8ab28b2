//! Registration and identity: everything below `/runners`.

use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};

use super::api::Call;
use super::options::{Registration, RunnerOptions};
use super::reply::Reply;
use super::rules;
use super::runner::Info;
use super::state::{Shared, State};

/// The bodies of all calls made as a runner.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct RunnerCall {
    pub(super) token: Option<String>,
    pub(super) system_id: Option<String>,
    pub(super) last_update: Option<String>,
    pub(super) info: Option<Info>,
    description: Option<String>,
    tag_list: Option<Value>,
    run_untagged: Option<bool>,
    maximum_timeout: Option<u64>,
    paused: Option<bool>,
    /// Read for its kind alone, as the next two are.
    #[serde(rename = "active")]
    _active: Option<bool>,
    #[serde(rename = "locked")]
    _locked: Option<bool>,
    #[serde(rename = "access_level")]
    _access_level: Option<String>,
}

impl RunnerCall {
    /// Reads the body; what is not an object has no token.
    pub(super) fn read(call: &Call) -> Result<(Self, String), Reply> {
        let bad = |error: &str| Reply::error(400, error);
        let body: Self = if call.is_json() {
            serde_json::from_slice(&call.body).map_err(|error| bad(&error.to_string()))?
        } else {
            Self::default()
        };
        match body.token.clone().filter(|token| !token.is_empty()) {
            Some(token) => Ok((body, token)),
            None => Err(bad("token is missing")),
        }
    }
}

fn answer(shared: &Shared, state: &State, at: usize, status: u16) -> Reply {
    let Some(runner) = state.runners.get(at) else { return Reply::forbidden() };
    let expires = runner.token_expires.map(|end| format!("{:.3}", shared.clock.calendar(end)));
    let body = json!({ "id": runner.id, "token": runner.token, "token_expires_at": expires });
    Reply::json(status, body.to_string())
}

/// `POST /runners`.
pub(super) fn register(shared: &Shared, call: &Call) -> Reply {
    let (body, token) = match RunnerCall::read(call) {
        Ok(read) => read,
        Err(reply) => return reply,
    };
    let expected = match &shared.options.registration {
        Registration::Allowed(expected) => expected,
        Registration::Disallowed => {
            let text = json!({
                "message": "410 Gone - Runner registration disallowed",
                "reason": "runner_registration_disallowed"
            });
            return Reply::json(410, text.to_string());
        }
    };
    if token != *expected {
        return Reply::message(403, "403 Forbidden - invalid token supplied");
    }
    if !matches!(body.tag_list, None | Some(Value::Null | Value::String(_) | Value::Array(_))) {
        return Reply::error(400, "tag_list is invalid");
    }
    let tags = tags(body.tag_list.as_ref());
    let run_untagged = body.run_untagged.unwrap_or(true);
    if tags.is_empty() && !run_untagged {
        let text = "can not be empty when runner is not allowed to pick untagged jobs";
        return Reply::json(400, json!({ "message": { "tags_list": [text] } }).to_string());
    }
    if body.maximum_timeout.is_some_and(|seconds| seconds < 600) {
        let text = "needs to be at least 10 minutes";
        return Reply::json(400, json!({ "message": { "maximum_timeout": [text] } }).to_string());
    }
    let options = RunnerOptions {
        description: body.description.unwrap_or_default(),
        tags,
        run_untagged,
        maximum_timeout: body.maximum_timeout.map(Duration::from_secs),
        paused: body.paused.unwrap_or(false),
        token: None,
    };
    shared.change(|state, now| {
        let at = state.add_runner(options, "glrtr-", now);
        answer(shared, state, at, 201)
    })
}

/// A comma-separated text, or a list.
fn tags(value: Option<&Value>) -> Vec<String> {
    let texts: Vec<&str> = match value {
        Some(Value::String(text)) => text.split(',').collect(),
        Some(list) => list.as_array().into_iter().flatten().filter_map(Value::as_str).collect(),
        None => Vec::new(),
    };
    texts.iter().map(|tag| tag.trim().to_owned()).filter(|tag| !tag.is_empty()).collect()
}

/// `POST /runners/verify`.
pub(super) fn verify(shared: &Shared, call: &Call) -> Reply {
    let (body, token) = match RunnerCall::read(call) {
        Ok(read) => read,
        Err(reply) => return reply,
    };
    shared.change(|state, now| {
        let Some(at) = state.runner_at(&token, now) else { return Reply::forbidden() };
        let Some(runner) = state.runners.get_mut(at) else { return Reply::forbidden() };
        if runner.orphaned {
            return Reply::message(422, "422 Unprocessable entity - runner is orphaned");
        }
        let (name, new) = runner.heartbeat(body.system_id.as_deref(), body.info.as_ref(), now);
        if new {
            rules::on_new_manager(state, &name, body.info.as_ref());
        }
        if state.knobs.plain_verify {
            return Reply::plain(200);
        }
        answer(shared, state, at, 200)
    })
}

/// `DELETE /runners`: the whole runner, with all its managers.
pub(super) fn unregister(shared: &Shared, call: &Call) -> Reply {
    let (_, token) = match RunnerCall::read(call) {
        Ok(read) => read,
        Err(reply) => return reply,
    };
    shared.change(|state, now| match state.runner_at(&token, now) {
        Some(at) => {
            state.delete_runner(at, now);
            Reply::empty(204)
        }
        None => Reply::forbidden(),
    })
}

/// `DELETE /runners/managers`: one process of a runner.
pub(super) fn unregister_manager(shared: &Shared, call: &Call) -> Reply {
    let (body, token) = match RunnerCall::read(call) {
        Ok(read) => read,
        Err(reply) => return reply,
    };
    let Some(system_id) = body.system_id else {
        return Reply::error(400, "system_id is missing");
    };
    shared.change(|state, now| {
        let at = state.runner_at(&token, now);
        let Some(runner) = at.and_then(|at| state.runners.get_mut(at)) else {
            return Reply::forbidden();
        };
        match runner.managers.remove(system_id.as_str()) {
            Some(_) => Reply::empty(204),
            None => Reply::message(404, "404 Runner Manager Not Found"),
        }
    })
}

/// `POST /runners/reset_authentication_token`.
pub(super) fn reset_token(shared: &Shared, call: &Call) -> Reply {
    let (_, token) = match RunnerCall::read(call) {
        Ok(read) => read,
        Err(reply) => return reply,
    };
    shared.change(|state, now| {
        let Some(at) = state.runner_at(&token, now) else { return Reply::forbidden() };
        if state.new_runner_token(at, now).is_none() {
            return Reply::forbidden();
        }
        let Some(runner) = state.runners.get(at) else { return Reply::forbidden() };
        let expires = runner.token_expires.map(|end| format!("{:.3}", shared.clock.calendar(end)));
        let body = json!({ "token": runner.token, "token_expires_at": expires });
        Reply::json(201, body.to_string())
    })
}
