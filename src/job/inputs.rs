//! Job inputs: `${{ job.inputs.NAME }}` in some of the payload's texts (gitlab-runner,
//! `common/spec/inputs.go`).
//!
//! They are filled in before anything else looks at the payload, in exactly the fields that
//! gitlab-runner fills in. A job without inputs is left alone, since `${{ … }}` in it may be anybody's.

use std::borrow::Cow;
use std::cell::Cell;
use std::collections::BTreeMap;

use super::moa::{self, Value};
use super::variables::Variables;
use super::{RunnerContext, Unrunnable, flags};
use crate::gitlab::wire::{Image, JobPayload};

/// The flag that switches all of this off.
const FLAG: &str = "FF_ENABLE_JOB_INPUTS_INTERPOLATION";

/// How many bytes all inputs together may become where they are used. They are the author's own, but
/// the memory is everybody's.
const MOST_BYTES: usize = 16 * 1024 * 1024;

/// Gives the payload with its inputs filled in.
///
/// # Errors
///
/// When an input or an expression makes no sense.
pub(super) fn interpolated<'a>(
    payload: &'a JobPayload,
    variables: &Variables,
    runner: &RunnerContext,
) -> Result<Cow<'a, JobPayload>, Unrunnable> {
    // A value that is none is complained of with the other settings, and means the default.
    if payload.inputs.is_empty() || !flags::resolve(FLAG, variables, runner).unwrap_or(true) {
        return Ok(Cow::Borrowed(payload));
    }
    let filler = Filler { job: job(&payload.inputs)?, room: Cell::new(MOST_BYTES) };
    let mut payload = payload.clone();
    for step in &mut payload.steps {
        let place = match step.name.as_str() {
            "script" => "script",
            "after_script" => "after_script",
            _ => continue,
        };
        filler.all(place, &mut step.script)?;
    }
    if let Some(image) = &mut payload.image {
        filler.image("image", image)?;
    }
    for service in &mut payload.services {
        filler.image("services", service)?;
    }
    for artifact in &mut payload.artifacts {
        filler.one("artifacts:name", &mut artifact.name)?;
        filler.all("artifacts:paths", &mut artifact.paths)?;
        filler.all("artifacts:exclude", &mut artifact.exclude)?;
        filler.one("artifacts:when", &mut artifact.when)?;
        filler.one("artifacts:expire_in", &mut artifact.expire_in)?;
    }
    for cache in &mut payload.cache {
        filler.one("cache:key", &mut cache.key)?;
        filler.one("cache:policy", &mut cache.policy)?;
        filler.all("cache:paths", &mut cache.paths)?;
        filler.one("cache:when", &mut cache.when)?;
        filler.all("cache:fallback_keys", &mut cache.fallback_keys)?;
    }
    Ok(Cow::Owned(payload))
}

/// Gives the texts among the inputs that must not be seen.
pub(super) fn sensitive(inputs: &[serde_json::Value]) -> impl Iterator<Item = &str> {
    inputs
        .iter()
        .filter_map(|input| input.get("value"))
        .filter(|value| value.get("sensitive").and_then(serde_json::Value::as_bool) == Some(true))
        .filter_map(|value| value.get("content").and_then(serde_json::Value::as_str))
}

struct Filler {
    job: Value,
    room: Cell<usize>,
}

impl Filler {
    fn image(&self, place: &str, image: &mut Image) -> Result<(), Unrunnable> {
        self.one(&format!("{place}:name"), &mut image.name)?;
        self.all(&format!("{place}:command"), &mut image.command)?;
        self.all(&format!("{place}:entrypoint"), &mut image.entrypoint)?;
        self.all(&format!("{place}:pull_policy"), &mut image.pull_policy)?;
        let options = &mut image.executor_opts;
        self.one(&format!("{place}:docker:platform"), &mut options.docker.platform)?;
        self.one(&format!("{place}:docker:user"), &mut options.docker.user)?;
        self.one(&format!("{place}:kubernetes:user"), &mut options.kubernetes.user)
    }

    fn all(&self, place: &str, texts: &mut [String]) -> Result<(), Unrunnable> {
        texts.iter_mut().try_for_each(|text| self.one(place, text))
    }

    fn one(&self, place: &str, text: &mut String) -> Result<(), Unrunnable> {
        if !text.contains("${{") {
            return Ok(());
        }
        let filled = moa::fill(text, &self.job, &self.room)
            .map_err(|error| Unrunnable::Inputs { detail: format!("{place}: {error}") })?;
        if filled.sensitive {
            let detail = format!("{place}: the value of a sensitive input cannot be filled in");
            return Err(Unrunnable::Inputs { detail });
        }
        *text = filled.text;
        Ok(())
    }
}

/// Makes what expressions know as `job`.
fn job(inputs: &[serde_json::Value]) -> Result<Value, Unrunnable> {
    let wrong = |detail: String| Unrunnable::Inputs { detail };
    let mut values = BTreeMap::new();
    for input in inputs {
        let Some(key) = input.get("key").and_then(|key| key.as_str()).filter(|key| !key.is_empty())
        else {
            return Err(wrong("an input has no name".into()));
        };
        let value = input.get("value").unwrap_or(&serde_json::Value::Null);
        let content = value.get("content").unwrap_or(&serde_json::Value::Null);
        let kind = match content {
            serde_json::Value::Null => return Err(wrong(format!("input {key:?} has no value"))),
            serde_json::Value::Bool(_) => "boolean",
            serde_json::Value::Number(_) => "number",
            serde_json::Value::String(_) => "string",
            serde_json::Value::Array(_) => "array",
            serde_json::Value::Object(_) => "struct",
        };
        let announced = value.get("type").and_then(|kind| kind.as_str()).unwrap_or_default();
        if !["boolean", "number", "string", "array", "struct"].contains(&announced) {
            return Err(wrong(format!("input {key:?} is of no known type: {announced:?}")));
        }
        if announced != kind {
            return Err(wrong(format!(
                "input {key:?} is announced as {announced} but is a {kind}"
            )));
        }
        let sensitive = match value.get("sensitive") {
            None | Some(serde_json::Value::Null | serde_json::Value::Bool(false)) => false,
            // What is not clearly harmless is not shown.
            Some(_) => true,
        };
        // Of several with one name the first counts.
        values.entry(key.to_owned()).or_insert_with(|| Value::of_json(content, sensitive));
    }
    Ok(Value::object(BTreeMap::from([("inputs".to_owned(), Value::object(values))])))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::tests::{payload, runner, step, variable};
    use super::super::{Slot, plan};
    use super::*;

    fn input(key: &str, kind: &str, content: &serde_json::Value) -> serde_json::Value {
        json!({"key": key, "value": {"type": kind, "content": content}})
    }

    /// A payload with an expression wherever there is a text, and an input `x`.
    fn everywhere() -> JobPayload {
        let x = "<${{ job.inputs.x }}>";
        let image = json!({
            "name": x, "alias": x, "command": [x], "entrypoint": [x], "pull_policy": [x],
            "executor_opts": {"docker": {"platform": x, "user": x}, "kubernetes": {"user": x}},
            "variables": [{"key": "V", "value": x}],
        });
        let mut payload: JobPayload = serde_json::from_value(json!({
            "id": 1,
            "inputs": [input("x", "string", &json!("value"))],
            "steps": [
                {"name": "script", "script": [x, "plain", x]},
                {"name": "release", "script": [x]},
                {"name": "after_script", "script": [x]},
            ],
            "hooks": [{"name": "pre_get_sources_script", "script": [x]}],
            "variables": [{"key": "V", "value": x}],
            "image": image, "services": [image, image],
            "artifacts": [{"name": x, "paths": [x], "exclude": [x], "when": x, "expire_in": x,
                "artifact_type": x, "artifact_format": x}],
            "cache": [{"key": x, "policy": x, "paths": [x], "when": x, "fallback_keys": [x]}],
            "credentials": [{"type": x, "url": x, "username": x}],
        }))
        .unwrap();
        payload.token = crate::gitlab::wire::Secret::new(x);
        payload
    }

    fn fill(payload: &JobPayload) -> Result<Cow<'_, JobPayload>, Unrunnable> {
        let variables = payload
            .variables
            .iter()
            .map(|v| super::super::variables::Entry::plain(&v.key, v.value.expose()))
            .collect();
        interpolated(payload, &Variables::new(variables), &runner())
    }

    #[test]
    fn inputs_are_filled_in_where_gitlab_runner_does_and_nowhere_else() {
        let raw = "<${{ job.inputs.x }}>";
        let before = everywhere();
        let after = fill(&before).unwrap();
        let done = "<value>";
        assert_eq!(after.steps[0].script, [done, "plain", done]);
        assert_eq!(after.steps[1].script, [raw], "release");
        assert_eq!(after.steps[2].script, [done]);
        assert_eq!(after.hooks[0].script, [raw]);
        assert_eq!(after.variables[0].value.expose(), raw);
        for image in after.image.iter().chain(&after.services) {
            assert_eq!(image.name, done);
            assert_eq!(image.alias, raw);
            assert_eq!(image.command, [done]);
            assert_eq!(image.entrypoint, [done]);
            assert_eq!(image.pull_policy, [done]);
            assert_eq!(image.executor_opts.docker.platform, done);
            assert_eq!(image.executor_opts.docker.user, done);
            assert_eq!(image.executor_opts.kubernetes.user, done);
            assert_eq!(image.variables[0].value.expose(), raw);
        }
        assert_eq!(after.services.len(), 2);
        let artifact = &after.artifacts[0];
        assert_eq!(artifact.name, done);
        assert_eq!(artifact.paths, [done]);
        assert_eq!(artifact.exclude, [done]);
        assert_eq!(artifact.when, done);
        assert_eq!(artifact.expire_in, done);
        assert_eq!(artifact.artifact_type, raw);
        assert_eq!(artifact.artifact_format, raw);
        let cache = &after.cache[0];
        assert_eq!(cache.key, done);
        assert_eq!(cache.policy, done);
        assert_eq!(cache.paths, [done]);
        assert_eq!(cache.when, done);
        assert_eq!(cache.fallback_keys, [done]);
        assert_eq!(after.credentials[0].username, raw);
        assert_eq!(after.token.expose(), raw);
    }

    #[test]
    fn without_inputs_or_with_the_flag_off_every_text_stays() {
        let mut payload = everywhere();
        payload.inputs.clear();
        assert!(matches!(fill(&payload), Ok(Cow::Borrowed(_))));
        let mut payload = everywhere();
        payload.variables.push(variable(FLAG, "false"));
        assert!(matches!(fill(&payload), Ok(Cow::Borrowed(_))));
        payload.variables.push(variable(FLAG, "nonsense"));
        assert!(matches!(fill(&payload), Ok(Cow::Owned(_))), "the default is on");
    }

    #[test]
    fn the_plan_is_made_of_the_filled_in_payload() {
        let mut payload = payload(&[("A", "${{ job.inputs.n }}")]);
        payload.inputs = vec![
            input("n", "number", &json!(3)),
            input("list", "array", &json!(["a b", 1, true])),
            input("on", "boolean", &json!(true)),
            input("n", "number", &json!(4)),
        ];
        payload.steps =
            vec![step("script", &["run --n ${{ job.inputs.n }} '${{ job.inputs.list }}'"])];
        payload.image = Some(Image { name: "img:${{ job.inputs.on }}".into(), ..Image::default() });
        let plan = plan(&payload, &runner(), Slot::default()).unwrap();
        let script = plan.spec(bridge_backend::Limits::default()).script;
        assert!(script.contains("run --n 3 "), "{script}");
        assert!(script.contains("[\"a b\",1,true]"), "{script}");
        let image = plan
            .spec(bridge_backend::Limits::default())
            .env
            .into_iter()
            .find(|v| v.name.ends_with("CI_JOB_IMAGE"));
        let image = image.unwrap().value;
        assert_eq!(secrecy::ExposeSecret::expose_secret(&image), "img:true");
    }

    #[test]
    fn what_is_wrong_with_inputs_is_said_and_no_value_is_shown() {
        let x = input("x", "string", &json!("hunter2"));
        let secret = json!({"key": "s", "value": {"type": "string", "content": "hunter2", "sensitive": true}});
        let cases: Vec<(Vec<serde_json::Value>, &str, &str)> = vec![
            (vec![json!({})], "x", "an input has no name"),
            (vec![json!("odd")], "x", "an input has no name"),
            (vec![json!({"key": ""})], "x", "an input has no name"),
            (vec![json!({"key": 7})], "x", "an input has no name"),
            (vec![json!({"key": "k"})], "x", "input \"k\" has no value"),
            (vec![input("k", "string", &json!(null))], "x", "input \"k\" has no value"),
            (vec![input("k", "map", &json!("hunter2"))], "x", "of no known type: \"map\""),
            (vec![json!({"key": "k", "value": {"content": 1}})], "x", "of no known type: \"\""),
            (
                vec![input("k", "number", &json!("hunter2"))],
                "x",
                "input \"k\" is announced as number but is a string",
            ),
            (
                vec![x.clone()],
                "echo ${{ job.inputs.x + }}",
                "script: expected an expression, found '}' in `${{ job.inputs.x + }}`",
            ),
            (vec![x.clone()], "${{ job.inputs.x", "expected `}}`, but the text ends"),
            (vec![x.clone()], "${{ job.inputs.y }}", "script: `job.inputs.y` does not exist"),
            (vec![x.clone()], "${{ vars.CI }}", "`vars` is not known here"),
            (vec![x.clone()], "${{ job.inputs.x * 2 }}", "cannot take a string and a number"),
            (vec![x, secret.clone()], "${{ job.inputs.x }}${{ job.inputs.s }}", "sensitive input"),
            (vec![secret], "${{ str([job.inputs.s]) }}", "sensitive input"),
        ];
        for (inputs, line, part) in cases {
            let mut payload = payload(&[]);
            payload.inputs = inputs;
            payload.steps = vec![step("script", &[line])];
            let error = plan(&payload, &runner(), Slot::default()).unwrap_err().to_string();
            assert!(error.starts_with("failed to interpolate job inputs: "), "{error}");
            assert!(error.contains(part), "{part}: {error}");
            assert!(!error.contains("hunter2"), "{error}");
        }
    }

    #[test]
    fn sensitive_inputs_are_masked() {
        let mut payload = payload(&[]);
        payload.inputs = vec![
            json!({"key": "s", "value": {"type": "string", "content": "hunter2", "sensitive": true}}),
            input("x", "string", &json!("shown")),
        ];
        let plan = plan(&payload, &runner(), Slot::default()).unwrap();
        let phrases: Vec<&str> = plan.mask.phrases.iter().map(|p| p.expose()).collect();
        assert!(phrases.contains(&"hunter2") && !phrases.contains(&"shown"));
        let early = super::super::MaskInputs::of(&payload);
        assert!(early.phrases.iter().any(|phrase| phrase.expose() == "hunter2"));
    }

    #[test]
    fn inputs_do_not_grow_without_end() {
        let mut payload = payload(&[]);
        payload.inputs = vec![input("x", "string", &json!("y".repeat(1024 * 1024)))];
        payload.steps = vec![step("script", &["${{ job.inputs.x }}"; 20])];
        let error = plan(&payload, &runner(), Slot::default()).unwrap_err().to_string();
        assert!(error.contains("too long"), "{error}");
    }
}
