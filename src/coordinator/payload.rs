//! The 201 of `jobs/request`, with everything a server puts into it.

use serde_json::{Map, Value, json};

use super::new_job::{NewJob, Shape, merge, remove};
use super::options::Version;

/// The commit of jobs whose repository is not served.
const NO_COMMIT: &str = "1f0e9d8c7b6a59483726150493827160a5b4c3d2";
const ZERO_COMMIT: &str = "0000000000000000000000000000000000000000";

/// What the payload says beyond the job itself.
#[derive(Debug)]
pub(super) struct Facts<'a> {
    pub(super) id: i64,
    pub(super) token: &'a str,
    pub(super) version: Version,
    /// Scheme, host, port and relative root.
    pub(super) url: &'a str,
    pub(super) runner_id: i64,
    pub(super) runner_description: &'a str,
    pub(super) runner_tags: &'a [String],
    pub(super) timeout: u64,
    pub(super) queued_seconds: u64,
    pub(super) queue_size: usize,
    /// HEAD's commit and branch of the served repository.
    pub(super) head: Option<(&'a str, Option<&'a str>)>,
    pub(super) created_at: String,
}

/// Makes the body.
pub(super) fn body(job: &NewJob, facts: &Facts<'_>) -> String {
    if let Some(text) = &job.verbatim {
        return text.replace("{id}", &facts.id.to_string()).replace("{token}", facts.token);
    }
    let mut payload = full(job, facts);
    match job.shape {
        Shape::Full => {}
        Shape::Nulls => reduce(&mut payload, Some(&Value::Null)),
        Shape::Absent => reduce(&mut payload, None),
        Shape::Unknown => add_unknown(&mut payload),
    }
    if let Some(overrides) = &job.overrides {
        merge(&mut payload, overrides.clone());
    }
    for pointer in &job.without {
        remove(&mut payload, pointer);
    }
    payload.to_string()
}

/// The repository's address with the job token inside.
fn repository(job: &NewJob, facts: &Facts<'_>) -> String {
    let (scheme, rest) = facts.url.split_once("://").unwrap_or(("http", facts.url));
    let path = &job.project_path;
    format!("{scheme}://gitlab-ci-token:{}@{rest}/{path}.git", facts.token)
}

fn full(job: &NewJob, facts: &Facts<'_>) -> Value {
    let project_name = job.project_path.rsplit('/').next().unwrap_or_default();
    let repo_url = job.git.repo_url.clone().unwrap_or_else(|| repository(job, facts));
    let sha = job.git.sha.as_deref().or(facts.head.map(|head| head.0)).unwrap_or(NO_COMMIT);
    let named = job.git.reference.as_deref();
    let reference = match facts.head {
        _ if named.is_some() => named,
        Some((_, branch)) => branch,
        None => Some("main"),
    };
    let refspecs = job.git.refspecs.clone().unwrap_or_else(|| refspecs(job, reference));
    let reference = reference.unwrap_or("HEAD");
    let mut steps = vec![step(facts, "script", &job.script, "on_success", false)];
    steps.extend(job.more_steps.iter().cloned());
    if !job.after_script.is_empty() {
        steps.push(step(facts, "after_script", &job.after_script, "always", true));
    }
    let reasons: Vec<Value> = match &job.failure_reasons {
        Some(names) => names.iter().map(|name| json!(name)).collect(),
        None => facts.version.failure_reasons().map(|name| json!(name)).collect(),
    };
    let mut features = json!({ "trace_sections": job.trace_sections, "failure_reasons": reasons });
    if !job.token_mask_prefixes.is_empty() {
        features["token_mask_prefixes"] = json!(job.token_mask_prefixes);
    }
    let host = facts.url.split_once("://").map_or(facts.url, |(_, rest)| rest);
    let mut payload = json!({
        "id": facts.id,
        "token": facts.token,
        "allow_git_fetch": job.allow_git_fetch,
        "job_info": {
            "id": facts.id, "name": job.name, "stage": job.stage, "pipeline_id": job.pipeline_id,
            "project_id": job.project_id, "project_name": project_name,
            "project_full_path": job.project_path,
            "namespace_id": 12, "root_namespace_id": 12, "organization_id": 1,
            "instance_id": "6f0c", "instance_uuid": "0d3f7c1e-6b0e-4a52-a9d7-8f8d3f1b2a90",
            "user_id": 31, "scoped_user_id": null,
            "time_in_queue_seconds": facts.queued_seconds,
            "project_jobs_running_on_instance_runners_count": "+Inf",
            "queue_size": facts.queue_size, "queue_depth": 1
        },
        "git_info": {
            "repo_url": repo_url,
            "ref": reference, "ref_type": if job.git.tag { "tag" } else { "branch" },
            "sha": sha, "before_sha": ZERO_COMMIT,
            "refspecs": refspecs,
            "depth": job.git.depth, "repo_object_format": "sha1"
        },
        "runner_info": { "timeout": facts.timeout, "runner_session_url": null },
        "variables": variables(job, facts, &repo_url, sha, reference),
        "steps": steps,
        "hooks": job.hooks.iter().map(|(name, script)| json!({"name": name, "script": script}))
            .collect::<Vec<_>>(),
        "image": job.image,
        "services": job.services,
        "artifacts": if job.artifacts.is_empty() { Value::Null } else { json!(job.artifacts) },
        "cache": job.cache,
        "credentials": [{
            "type": "registry", "url": format!("registry.{host}"),
            "username": "gitlab-ci-token", "password": facts.token
        }],
        "features": features,
        "dependencies": job.dependencies
    });
    if facts.version == Version::Current {
        payload["git_info"]["protected"] = Value::Bool(true);
        payload["runner_info"]["uuid"] = json!("5d1b8c2e-0a55-4a0e-9f7a-2f6f0c7d9e11");
        payload["inputs"] = json!([]);
        payload["policy_options"] = Value::Null;
    }
    payload
}

fn refspecs(job: &NewJob, reference: Option<&str>) -> Vec<String> {
    let pipeline = job.pipeline_id;
    let mut list = vec![format!("+refs/pipelines/{pipeline}:refs/pipelines/{pipeline}")];
    match reference {
        _ if job.git.depth == 0 => {
            list.push("+refs/heads/*:refs/remotes/origin/*".to_owned());
            list.push("+refs/tags/*:refs/tags/*".to_owned());
        }
        Some(tag) if job.git.tag => list.push(format!("+refs/tags/{tag}:refs/tags/{tag}")),
        Some(branch) => {
            list.push(format!("+refs/heads/{branch}:refs/remotes/origin/{branch}"));
        }
        None => {}
    }
    list
}

fn step(
    facts: &Facts<'_>,
    name: &str,
    script: &[String],
    when: &str,
    allow_failure: bool,
) -> Value {
    json!({
        "name": name, "script": script, "timeout": facts.timeout, "when": when,
        "allow_failure": allow_failure
    })
}

/// Lower case, everything but letters and digits a dash, at most 63: what `CI_*_SLUG` holds.
fn slug(text: &str) -> String {
    let slug: String = text
        .chars()
        .take(63)
        .map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' })
        .collect();
    slug.trim_matches('-').to_owned()
}

fn variables(
    job: &NewJob,
    facts: &Facts<'_>,
    repo_url: &str,
    sha: &str,
    reference: &str,
) -> Vec<Value> {
    let mut list = Vec::with_capacity(72 + job.variables.len());
    let mut add = |key: &str, value: &str, public: bool, masked: bool| {
        list.push(json!({ "key": key, "value": value, "public": public, "masked": masked }));
    };
    let id = facts.id.to_string();
    let pipeline = job.pipeline_id.to_string();
    let project_url = format!("{}/{}", facts.url, job.project_path);
    let (namespace, project) =
        job.project_path.rsplit_once('/').unwrap_or(("", job.project_path.as_str()));
    let url = url::Url::parse(facts.url).ok();
    let host = url.as_ref().and_then(url::Url::host_str).unwrap_or("127.0.0.1");
    let port = url.as_ref().and_then(url::Url::port_or_known_default).unwrap_or(80).to_string();
    let short: String = sha.chars().take(8).collect();
    let mut version = facts.version.text().split('.');

    add("CI_PIPELINE_ID", &pipeline, true, false);
    add("CI_PIPELINE_URL", &format!("{project_url}/-/pipelines/{pipeline}"), true, false);
    add("CI_JOB_ID", &id, true, false);
    add("CI_JOB_URL", &format!("{project_url}/-/jobs/{id}"), true, false);
    add("CI_JOB_TOKEN", facts.token, false, true);
    add("CI_JOB_STARTED_AT", &facts.created_at, true, false);
    add("CI_REGISTRY_USER", "gitlab-ci-token", true, false);
    add("CI_REGISTRY_PASSWORD", facts.token, false, true);
    add("CI_REPOSITORY_URL", repo_url, false, false);
    add("CI_JOB_NAME", &job.name, true, false);
    add("CI_JOB_NAME_SLUG", &slug(&job.name), true, false);
    add("CI_JOB_STAGE", &job.stage, true, false);
    add("CI_NODE_TOTAL", "1", true, false);
    add("CI_JOB_TIMEOUT", &facts.timeout.to_string(), true, false);
    add("CI", "true", true, false);
    add("GITLAB_CI", "true", true, false);
    add("CI_SERVER_FQDN", &format!("{host}:{port}"), true, false);
    add("CI_SERVER_URL", facts.url, true, false);
    add("CI_SERVER_HOST", host, true, false);
    add("CI_SERVER_PORT", &port, true, false);
    add("CI_SERVER_PROTOCOL", "http", true, false);
    add("CI_SERVER_SHELL_SSH_HOST", host, true, false);
    add("CI_SERVER_SHELL_SSH_PORT", "22", true, false);
    add("CI_SERVER_NAME", "GitLab", true, false);
    add("CI_SERVER_VERSION", facts.version.text(), true, false);
    for part in ["MAJOR", "MINOR", "PATCH"] {
        let key = format!("CI_SERVER_VERSION_{part}");
        add(&key, version.next().unwrap_or("0"), true, false);
    }
    add("CI_SERVER_REVISION", "0f1e2d3c4b5", true, false);
    add("GITLAB_FEATURES", "", true, false);
    add("CI_API_V4_URL", &format!("{}/api/v4", facts.url), true, false);
    add("CI_API_GRAPHQL_URL", &format!("{}/api/graphql", facts.url), true, false);
    add("CI_TEMPLATE_REGISTRY_HOST", "registry.gitlab.com", true, false);
    add("CI_PROJECT_ID", &job.project_id.to_string(), true, false);
    add("CI_PROJECT_NAME", project, true, false);
    add("CI_PROJECT_TITLE", project, true, false);
    add("CI_PROJECT_DESCRIPTION", "", true, false);
    add("CI_PROJECT_PATH", &job.project_path, true, false);
    add("CI_PROJECT_PATH_SLUG", &slug(&job.project_path), true, false);
    add("CI_PROJECT_NAMESPACE", namespace, true, false);
    add("CI_PROJECT_NAMESPACE_ID", "12", true, false);
    add("CI_PROJECT_ROOT_NAMESPACE", namespace.split('/').next().unwrap_or(""), true, false);
    add("CI_PROJECT_URL", &project_url, true, false);
    add("CI_PROJECT_VISIBILITY", "private", true, false);
    add("CI_PROJECT_REPOSITORY_LANGUAGES", "", true, false);
    add("CI_PROJECT_CLASSIFICATION_LABEL", "", true, false);
    add("CI_DEFAULT_BRANCH", "main", true, false);
    add("CI_CONFIG_PATH", ".gitlab-ci.yml", true, false);
    add("CI_PIPELINE_IID", "7", true, false);
    add("CI_PIPELINE_SOURCE", "push", true, false);
    add("CI_PIPELINE_CREATED_AT", &facts.created_at, true, false);
    add("CI_COMMIT_SHA", sha, true, false);
    add("CI_COMMIT_SHORT_SHA", &short, true, false);
    add("CI_COMMIT_BEFORE_SHA", ZERO_COMMIT, true, false);
    add("CI_COMMIT_REF_NAME", reference, true, false);
    add("CI_COMMIT_REF_SLUG", &slug(reference), true, false);
    let kind = if job.git.tag { "CI_COMMIT_TAG" } else { "CI_COMMIT_BRANCH" };
    add(kind, reference, true, false);
    add("CI_COMMIT_REF_PROTECTED", "true", true, false);
    add("CI_COMMIT_MESSAGE", "Simulate faster", true, false);
    add("CI_COMMIT_TITLE", "Simulate faster", true, false);
    add("CI_COMMIT_DESCRIPTION", "", true, false);
    add("CI_COMMIT_TIMESTAMP", &facts.created_at, true, false);
    add("CI_COMMIT_AUTHOR", "Ada Example <ada@example.org>", true, false);
    add("CI_RUNNER_ID", &facts.runner_id.to_string(), true, false);
    add("CI_RUNNER_DESCRIPTION", facts.runner_description, true, false);
    let tags = json!(facts.runner_tags).to_string();
    add("CI_RUNNER_TAGS", &tags, true, false);
    add("GITLAB_USER_ID", "31", true, false);
    add("GITLAB_USER_LOGIN", "ada", true, false);
    add("GITLAB_USER_NAME", "Ada Example", true, false);
    add("GITLAB_USER_EMAIL", "ada@example.org", true, false);
    list.extend(job.variables.iter().map(super::new_job::Variable::to_json));
    list
}

/// The fields without which nothing can be run at all.
const NEEDED: &[&str] = &["id", "token", "job_info", "git_info", "runner_info", "steps"];
const NEEDED_WITHIN: &[&str] =
    &["id", "project_id", "repo_url", "sha", "timeout", "name", "script"];

/// Replaces every field that is not needed by `by`, or removes it.
fn reduce(payload: &mut Value, by: Option<&Value>) {
    let Some(map) = payload.as_object_mut() else { return };
    reduce_map(map, NEEDED, by);
    for inner in map.values_mut() {
        if let Some(map) = inner.as_object_mut() {
            reduce_map(map, NEEDED_WITHIN, by);
        }
        for map in inner.as_array_mut().into_iter().flatten().filter_map(Value::as_object_mut) {
            reduce_map(map, NEEDED_WITHIN, by);
        }
    }
}

fn reduce_map(map: &mut Map<String, Value>, needed: &[&str], by: Option<&Value>) {
    match by {
        Some(by) => {
            for (_, value) in map.iter_mut().filter(|(key, _)| !needed.contains(&key.as_str())) {
                *value = by.clone();
            }
        }
        None => map.retain(|key, _| needed.contains(&key.as_str())),
    }
}

fn add_unknown(value: &mut Value) {
    for inner in value.as_array_mut().into_iter().flatten() {
        add_unknown(inner);
    }
    if let Some(map) = value.as_object_mut() {
        map.values_mut().for_each(add_unknown);
        map.insert("field_of_the_future".to_owned(), json!({ "deep": [1, "two", null] }));
    }
}
