//! What a test or `bridge exec` says about a job; everything else is made up realistically.

use std::fmt;
use std::time::Duration;

use serde_json::{Value, json};

/// A variable of a job.
#[derive(Clone, PartialEq, Eq)]
pub struct Variable {
    pub(super) key: String,
    pub(super) value: String,
    pub(super) masked: bool,
    pub(super) file: bool,
    pub(super) raw: bool,
    pub(super) public: bool,
}

impl Variable {
    /// Makes a variable as it comes from `.gitlab-ci.yml`: public, not masked, no file, not raw.
    pub fn new(key: impl Into<String>, value: impl Into<String>) -> Self {
        Self {
            key: key.into(),
            value: value.into(),
            masked: false,
            file: false,
            raw: false,
            public: true,
        }
    }

    /// Masks the value in the trace, and makes it private.
    #[must_use]
    pub fn masked(mut self) -> Self {
        self.masked = true;
        self.public = false;
        self
    }

    /// Makes the value the content of a file.
    #[must_use]
    pub fn file(mut self) -> Self {
        self.file = true;
        self
    }

    /// Keeps the value from being expanded.
    #[must_use]
    pub fn raw(mut self) -> Self {
        self.raw = true;
        self
    }

    /// Sets whether services may see the value.
    #[must_use]
    pub fn public(mut self, public: bool) -> Self {
        self.public = public;
        self
    }

    /// As it is in the payload: `file` and `raw` only when true.
    pub(super) fn to_json(&self) -> Value {
        let mut json = json!({
            "key": self.key, "value": self.value, "public": self.public, "masked": self.masked,
        });
        if let Value::Object(map) = &mut json {
            if self.file {
                map.insert("file".to_owned(), Value::Bool(true));
            }
            if self.raw {
                map.insert("raw".to_owned(), Value::Bool(true));
            }
        }
        json
    }
}

impl fmt::Debug for Variable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Variable").field("key", &self.key).finish_non_exhaustive()
    }
}

/// What the job checks out.
#[derive(Clone)]
pub struct Git {
    /// The repository's address; without it, the coordinator's own with the job token inside.
    pub repo_url: Option<String>,
    /// The commit; without it, the served repository's HEAD.
    pub sha: Option<String>,
    /// The branch or tag; without it, the served repository's, or `main`.
    pub reference: Option<String>,
    /// Whether `reference` is a tag.
    pub tag: bool,
    /// What to fetch; without it, the pipeline's own ref and the branch or tag.
    pub refspecs: Option<Vec<String>>,
    /// How many commits; 0 is all.
    pub depth: u32,
}

impl Default for Git {
    fn default() -> Self {
        Self { repo_url: None, sha: None, reference: None, tag: false, refspecs: None, depth: 20 }
    }
}

impl fmt::Debug for Git {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Git")
            .field("sha", &self.sha)
            .field("reference", &self.reference)
            .field("refspecs", &self.refspecs)
            .field("depth", &self.depth)
            .finish_non_exhaustive()
    }
}

/// How much of the payload is there; GitLab leaves fields out, and sends null for many.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Shape {
    /// Everything, as a current server sends it.
    #[default]
    Full,
    /// Every field that is not needed is null.
    Nulls,
    /// Every field that is not needed is absent.
    Absent,
    /// Everything, and fields nobody knows on every level.
    Unknown,
}

/// A job to be put into the queue.
#[derive(Clone)]
pub struct NewJob {
    pub(super) name: String,
    pub(super) stage: String,
    pub(super) script: Vec<String>,
    pub(super) after_script: Vec<String>,
    pub(super) more_steps: Vec<Value>,
    pub(super) variables: Vec<Variable>,
    pub(super) timeout: Duration,
    pub(super) project_path: String,
    pub(super) project_id: i64,
    pub(super) pipeline_id: i64,
    pub(super) git: Git,
    pub(super) allow_git_fetch: bool,
    pub(super) trace_sections: bool,
    pub(super) failure_reasons: Option<Vec<String>>,
    pub(super) token_mask_prefixes: Vec<String>,
    pub(super) allow_failure: bool,
    pub(super) hooks: Vec<(String, Vec<String>)>,
    pub(super) image: Value,
    pub(super) services: Vec<Value>,
    pub(super) artifacts: Vec<Value>,
    pub(super) cache: Vec<Value>,
    pub(super) dependencies: Vec<Value>,
    pub(super) needs: Vec<i64>,
    pub(super) tags: Vec<String>,
    pub(super) runner: Option<String>,
    pub(super) requires: Vec<String>,
    pub(super) shape: Shape,
    pub(super) overrides: Option<Value>,
    pub(super) without: Vec<String>,
    pub(super) verbatim: Option<String>,
}

impl Default for NewJob {
    fn default() -> Self {
        Self::new("simulate")
    }
}

impl fmt::Debug for NewJob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NewJob")
            .field("name", &self.name)
            .field("stage", &self.stage)
            .field("script", &self.script)
            .field("variables", &self.variables)
            .field("timeout", &self.timeout)
            .field("git", &self.git)
            .field("tags", &self.tags)
            .field("shape", &self.shape)
            .finish_non_exhaustive()
    }
}

impl NewJob {
    /// Makes a job with an empty script in `hep/tracker`.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            stage: "run".to_owned(),
            script: Vec::new(),
            after_script: Vec::new(),
            more_steps: Vec::new(),
            variables: Vec::new(),
            timeout: Duration::from_secs(3600),
            project_path: "hep/tracker".to_owned(),
            project_id: 77,
            pipeline_id: 903,
            git: Git::default(),
            allow_git_fetch: true,
            trace_sections: true,
            failure_reasons: None,
            token_mask_prefixes: Vec::new(),
            allow_failure: false,
            hooks: Vec::new(),
            image: Value::Null,
            services: Vec::new(),
            artifacts: Vec::new(),
            cache: Vec::new(),
            dependencies: Vec::new(),
            needs: Vec::new(),
            tags: Vec::new(),
            runner: None,
            requires: Vec::new(),
            shape: Shape::Full,
            overrides: None,
            without: Vec::new(),
            verbatim: None,
        }
    }

    /// Sets the stage.
    #[must_use]
    pub fn stage(mut self, stage: impl Into<String>) -> Self {
        self.stage = stage.into();
        self
    }

    /// Adds a line (or a multi-line unit) to the script.
    #[must_use]
    pub fn script(mut self, line: impl Into<String>) -> Self {
        self.script.push(line.into());
        self
    }

    /// Adds lines to the script.
    #[must_use]
    pub fn script_lines<S: Into<String>>(mut self, lines: impl IntoIterator<Item = S>) -> Self {
        self.script.extend(lines.into_iter().map(Into::into));
        self
    }

    /// Adds a line to `after_script`.
    #[must_use]
    pub fn after_script(mut self, line: impl Into<String>) -> Self {
        self.after_script.push(line.into());
        self
    }

    /// Adds a step such as `release` between `script` and `after_script`, as JSON.
    #[must_use]
    pub fn step(mut self, step: Value) -> Self {
        self.more_steps.push(step);
        self
    }

    /// Adds a variable after those of the server.
    #[must_use]
    pub fn variable(mut self, variable: Variable) -> Self {
        self.variables.push(variable);
        self
    }

    /// Adds a public variable.
    #[must_use]
    pub fn env(self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.variable(Variable::new(key, value))
    }

    /// Sets the job's timeout.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Sets the project.
    #[must_use]
    pub fn project(mut self, path: impl Into<String>, id: i64) -> Self {
        self.project_path = path.into();
        self.project_id = id;
        self
    }

    /// Sets the pipeline.
    #[must_use]
    pub fn pipeline(mut self, id: i64) -> Self {
        self.pipeline_id = id;
        self
    }

    /// Sets what is checked out.
    #[must_use]
    pub fn git(mut self, git: Git) -> Self {
        self.git = git;
        self
    }

    /// Sets whether `fetch` is the default strategy.
    #[must_use]
    pub fn allow_git_fetch(mut self, allow: bool) -> Self {
        self.allow_git_fetch = allow;
        self
    }

    /// Sets `features.trace_sections`.
    #[must_use]
    pub fn trace_sections(mut self, wanted: bool) -> Self {
        self.trace_sections = wanted;
        self
    }

    /// Replaces `features.failure_reasons`.
    #[must_use]
    pub fn failure_reasons<S: Into<String>>(mut self, names: impl IntoIterator<Item = S>) -> Self {
        self.failure_reasons = Some(names.into_iter().map(Into::into).collect());
        self
    }

    /// Adds to `features.token_mask_prefixes`.
    #[must_use]
    pub fn token_mask_prefix(mut self, prefix: impl Into<String>) -> Self {
        self.token_mask_prefixes.push(prefix.into());
        self
    }

    /// Sets whether the pipeline bears the job's failure; the runner is not told.
    #[must_use]
    pub fn allow_failure(mut self, allowed: bool) -> Self {
        self.allow_failure = allowed;
        self
    }

    /// Adds a hook, such as `pre_get_sources_script`.
    #[must_use]
    pub fn hook<S: Into<String>>(
        mut self,
        name: impl Into<String>,
        script: impl IntoIterator<Item = S>,
    ) -> Self {
        self.hooks.push((name.into(), script.into_iter().map(Into::into).collect()));
        self
    }

    /// Sets the image by name.
    #[must_use]
    pub fn image(mut self, name: impl Into<String>) -> Self {
        self.image = json!({
            "name": name.into(), "entrypoint": null, "ports": [], "executor_opts": {},
            "pull_policy": null,
        });
        self
    }

    /// Adds a service, as JSON.
    #[must_use]
    pub fn service(mut self, service: Value) -> Self {
        self.services.push(service);
        self
    }

    /// Adds an entry of `artifacts`, as JSON.
    #[must_use]
    pub fn artifact(mut self, artifact: Value) -> Self {
        self.artifacts.push(artifact);
        self
    }

    /// Adds an entry of `cache`, as JSON.
    #[must_use]
    pub fn cache(mut self, cache: Value) -> Self {
        self.cache.push(cache);
        self
    }

    /// Adds an entry of `dependencies`, as JSON.
    #[must_use]
    pub fn dependency(mut self, dependency: Value) -> Self {
        self.dependencies.push(dependency);
        self
    }

    /// Gives the job what another one left: its artifacts as a dependency, its dotenv reports as
    /// variables. What has been deleted or has expired by then fails the job.
    #[must_use]
    pub fn needs(mut self, job: i64) -> Self {
        self.needs.push(job);
        self
    }

    /// Adds a tag that a runner must have.
    #[must_use]
    pub fn tag(mut self, tag: impl Into<String>) -> Self {
        self.tags.push(tag.into());
        self
    }

    /// Gives the job to one runner only, by its token.
    #[must_use]
    pub fn only_for(mut self, runner: impl Into<String>) -> Self {
        self.runner = Some(runner.into());
        self
    }

    /// Adds a feature without which the job fails with `runner_unsupported`. What artifacts,
    /// caches and steps need is found without this.
    #[must_use]
    pub fn requires(mut self, feature: impl Into<String>) -> Self {
        self.requires.push(feature.into());
        self
    }

    /// Sets how much of the payload is there.
    #[must_use]
    pub fn shape(mut self, shape: Shape) -> Self {
        self.shape = shape;
        self
    }

    /// Merges JSON over the finished payload: objects deeply, everything else, also null, as is.
    #[must_use]
    pub fn payload(mut self, overrides: Value) -> Self {
        match &mut self.overrides {
            Some(earlier) => merge(earlier, overrides),
            none => *none = Some(overrides),
        }
        self
    }

    /// Removes a field of the payload, by its JSON pointer (`/features/failure_reasons`).
    #[must_use]
    pub fn without(mut self, pointer: impl Into<String>) -> Self {
        self.without.push(pointer.into());
        self
    }

    /// Answers with this text instead of a payload. `{id}` and `{token}` are replaced.
    #[must_use]
    pub fn verbatim(mut self, body: impl Into<String>) -> Self {
        self.verbatim = Some(body.into());
        self
    }

    /// The features a runner needs for this job.
    pub(super) fn required(&self) -> Vec<String> {
        let mut needed = self.requires.clone();
        let mut need = |feature: &str, if_so: bool| {
            if if_so && !needed.iter().any(|known| known == feature) {
                needed.push(feature.to_owned());
            }
        };
        need("upload_multiple_artifacts", self.artifacts.iter().any(is_report));
        need("artifacts_exclude", self.artifacts.iter().any(|entry| has_items(entry, "exclude")));
        need(
            "fallback_cache_keys",
            self.cache.iter().any(|entry| has_items(entry, "fallback_keys")),
        );
        need("multi_build_steps", !self.more_steps.is_empty());
        needed
    }
}

fn is_report(artifact: &Value) -> bool {
    artifact.get("artifact_type").and_then(Value::as_str).is_some_and(|kind| kind != "archive")
}

fn has_items(entry: &Value, field: &str) -> bool {
    entry.get(field).and_then(Value::as_array).is_some_and(|list| !list.is_empty())
}

/// Lays `over` onto `base`.
pub(super) fn merge(base: &mut Value, over: Value) {
    match (base, over) {
        (Value::Object(base), Value::Object(over)) => {
            for (key, value) in over {
                match base.get_mut(&key) {
                    Some(there) => merge(there, value),
                    None => {
                        base.insert(key, value);
                    }
                }
            }
        }
        (base, over) => *base = over,
    }
}

/// Removes what a JSON pointer points to.
pub(super) fn remove(from: &mut Value, pointer: &str) {
    let Some((parent, last)) = pointer.rsplit_once('/') else { return };
    let Some(parent) = from.pointer_mut(parent) else { return };
    if let Some(map) = parent.as_object_mut() {
        map.remove(&last.replace("~1", "/").replace("~0", "~"));
    } else if let (Some(list), Ok(at)) = (parent.as_array_mut(), last.parse::<usize>())
        && at < list.len()
    {
        list.remove(at);
    }
}
