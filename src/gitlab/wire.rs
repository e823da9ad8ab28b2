//! The runner API's types as they are on the wire.
//!
//! Every field may be absent or `null`, unknown fields are ignored, numbers may grow to 64 bit
//! (GitLab, `lib/api/entities/ci/job_request`; gitlab-runner, `common/spec/spec.go`). What a field
//! means is decided by those who use it.

use std::collections::BTreeMap;
use std::fmt;

use secrecy::{ExposeSecret as _, SecretString};
use serde::{Deserialize, Deserializer};

/// Reads `null` as the type's default.
pub(crate) fn nullable<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::<T>::deserialize(deserializer)?.unwrap_or_default())
}

/// A text that may be a secret: no `Debug`, no `Serialize`.
#[derive(Clone, Default)]
pub struct Secret(SecretString);

impl Secret {
    /// Wraps a text.
    pub fn new(text: impl Into<String>) -> Self {
        Self(SecretString::from(text.into()))
    }

    /// Gives the text; name the reason where you call this.
    pub fn expose(&self) -> &str {
        self.0.expose_secret()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

impl<'de> Deserialize<'de> for Secret {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Self::new(String::deserialize(deserializer)?))
    }
}

/// A job as `jobs/request` hands it out (protocol: the 201's body).
#[derive(Clone, Default, Deserialize)]
#[serde(default)]
pub struct JobPayload {
    /// GitLab's number for the job.
    #[serde(deserialize_with = "nullable")]
    pub id: i64,
    /// The job token.
    #[serde(deserialize_with = "nullable")]
    pub token: Secret,
    /// Whether `fetch` is the project's default strategy (else `clone`).
    #[serde(deserialize_with = "nullable")]
    pub allow_git_fetch: bool,
    /// Who and what the job is.
    #[serde(deserialize_with = "nullable")]
    pub job_info: JobInfo,
    /// What to check out.
    #[serde(deserialize_with = "nullable")]
    pub git_info: GitInfo,
    /// The runner's limits for this job.
    #[serde(deserialize_with = "nullable")]
    pub runner_info: RunnerInfo,
    /// Job inputs, undecoded.
    #[serde(deserialize_with = "nullable")]
    pub inputs: Vec<serde_json::Value>,
    /// The job's variables, in order.
    #[serde(deserialize_with = "nullable")]
    pub variables: Vec<Variable>,
    /// The job's steps, in order; absent when `run` is present.
    #[serde(deserialize_with = "nullable")]
    pub steps: Vec<Step>,
    /// Scripts around get_sources.
    #[serde(deserialize_with = "nullable")]
    pub hooks: Vec<Hook>,
    /// The image the job asks for.
    pub image: Option<Image>,
    /// The services the job asks for.
    #[serde(deserialize_with = "nullable")]
    pub services: Vec<Image>,
    /// Archives to upload.
    #[serde(deserialize_with = "nullable")]
    pub artifacts: Vec<Artifact>,
    /// Caches to restore and archive.
    #[serde(deserialize_with = "nullable")]
    pub cache: Vec<Cache>,
    /// Registry logins.
    #[serde(deserialize_with = "nullable")]
    pub credentials: Vec<Credential>,
    /// Earlier jobs whose artifacts this one wants.
    #[serde(deserialize_with = "nullable")]
    pub dependencies: Vec<Dependency>,
    /// What the server can take.
    #[serde(deserialize_with = "nullable")]
    pub features: ServerFeatures,
    /// Secrets to resolve, undecoded.
    #[serde(deserialize_with = "nullable")]
    pub secrets: BTreeMap<String, serde_json::Value>,
    /// CI steps: a JSON array inside a string.
    #[serde(deserialize_with = "nullable")]
    pub run: String,
    /// Execution policy, undecoded.
    pub policy_options: Option<serde_json::Value>,
}

/// `job_info`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct JobInfo {
    /// The job's name in the pipeline.
    #[serde(deserialize_with = "nullable")]
    pub name: String,
    /// Its stage.
    #[serde(deserialize_with = "nullable")]
    pub stage: String,
    /// The pipeline.
    #[serde(deserialize_with = "nullable")]
    pub pipeline_id: i64,
    /// The project.
    #[serde(deserialize_with = "nullable")]
    pub project_id: i64,
    /// The project's short name.
    #[serde(deserialize_with = "nullable")]
    pub project_name: String,
    /// The project's path with its groups.
    #[serde(deserialize_with = "nullable")]
    pub project_full_path: String,
    /// Seconds the job waited for a runner.
    pub time_in_queue_seconds: Option<f64>,
}

/// `git_info`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct GitInfo {
    /// The repository, with the job token inside.
    #[serde(deserialize_with = "nullable")]
    pub repo_url: Secret,
    /// Branch, tag or merge-request ref.
    #[serde(rename = "ref", deserialize_with = "nullable")]
    pub reference: String,
    /// `branch` or `tag`.
    #[serde(deserialize_with = "nullable")]
    pub ref_type: String,
    /// The commit to check out.
    #[serde(deserialize_with = "nullable")]
    pub sha: String,
    /// The commit before the push.
    #[serde(deserialize_with = "nullable")]
    pub before_sha: String,
    /// What to fetch.
    #[serde(deserialize_with = "nullable")]
    pub refspecs: Vec<String>,
    /// How deep to fetch; 0 is everything.
    #[serde(deserialize_with = "nullable")]
    pub depth: i64,
    /// `sha1` (also when empty) or `sha256`.
    #[serde(deserialize_with = "nullable")]
    pub repo_object_format: String,
    /// Whether the ref is protected, since 18.3.
    pub protected: Option<bool>,
}

/// `runner_info`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct RunnerInfo {
    /// The job's timeout in seconds; 0 or less means 7200.
    #[serde(deserialize_with = "nullable")]
    pub timeout: i64,
}

/// One entry of `variables`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Variable {
    /// The name.
    #[serde(deserialize_with = "nullable")]
    pub key: String,
    /// The value.
    #[serde(deserialize_with = "nullable")]
    pub value: Secret,
    /// Whether service containers may see it.
    #[serde(deserialize_with = "nullable")]
    pub public: bool,
    /// Whether the value is masked in the trace.
    #[serde(deserialize_with = "nullable")]
    pub masked: bool,
    /// Whether the value goes into a file.
    #[serde(deserialize_with = "nullable")]
    pub file: bool,
    /// Whether the value is taken as it is.
    #[serde(deserialize_with = "nullable")]
    pub raw: bool,
}

/// One entry of `steps`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Step {
    /// `script`, `release`, `after_script` or another.
    #[serde(deserialize_with = "nullable")]
    pub name: String,
    /// Its commands; each may have several lines.
    #[serde(deserialize_with = "nullable")]
    pub script: Vec<String>,
}

/// One entry of `hooks`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Hook {
    /// `pre_get_sources_script` or `post_get_sources_script`.
    #[serde(deserialize_with = "nullable")]
    pub name: String,
    /// Its commands.
    #[serde(deserialize_with = "nullable")]
    pub script: Vec<String>,
}

/// `image`, or one entry of `services`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Image {
    /// The image's name, unexpanded.
    #[serde(deserialize_with = "nullable")]
    pub name: String,
    /// A service's names on the network, with spaces or commas between them.
    #[serde(deserialize_with = "nullable")]
    pub alias: String,
    /// What runs in place of the image's own entry point.
    #[serde(deserialize_with = "nullable")]
    pub entrypoint: Vec<String>,
    /// A service's command.
    #[serde(deserialize_with = "nullable")]
    pub command: Vec<String>,
    /// When the image is fetched anew; the first that is allowed counts.
    #[serde(deserialize_with = "nullable")]
    pub pull_policy: Vec<String>,
    /// A service's own variables.
    #[serde(deserialize_with = "nullable")]
    pub variables: Vec<Variable>,
    /// What concerns single kinds of containers.
    #[serde(deserialize_with = "nullable")]
    pub executor_opts: ExecutorOptions,
}

/// `executor_opts` of an image or a service.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct ExecutorOptions {
    /// For Docker and its like.
    #[serde(deserialize_with = "nullable")]
    pub docker: ContainerOptions,
    /// For Kubernetes.
    #[serde(deserialize_with = "nullable")]
    pub kubernetes: ContainerOptions,
}

/// One entry of `executor_opts`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct ContainerOptions {
    /// The platform, as in `linux/arm64`; Docker only.
    #[serde(deserialize_with = "nullable")]
    pub platform: String,
    /// The user within, a name or a number.
    #[serde(deserialize_with = "text_or_number")]
    pub user: String,
}

/// Reads a text that may come as a number.
fn text_or_number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    Ok(match serde_json::Value::deserialize(deserializer)? {
        serde_json::Value::String(text) => text,
        serde_json::Value::Number(number) => number.to_string(),
        serde_json::Value::Null
        | serde_json::Value::Bool(_)
        | serde_json::Value::Array(_)
        | serde_json::Value::Object(_) => String::new(),
    })
}

/// One entry of `artifacts`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Artifact {
    /// The archive's base name, unexpanded.
    #[serde(deserialize_with = "nullable")]
    pub name: String,
    /// Globs.
    #[serde(deserialize_with = "nullable")]
    pub paths: Vec<String>,
    /// Globs of what to leave out.
    #[serde(deserialize_with = "nullable")]
    pub exclude: Vec<String>,
    /// Everything git does not track as well.
    #[serde(deserialize_with = "nullable")]
    pub untracked: bool,
    /// `on_success` (also when empty), `on_failure`, `always`.
    #[serde(deserialize_with = "nullable")]
    pub when: String,
    /// Passed through unparsed.
    #[serde(deserialize_with = "nullable")]
    pub expire_in: String,
    /// `archive`, `junit`, …
    #[serde(deserialize_with = "nullable")]
    pub artifact_type: String,
    /// `zip` (also when empty), `gzip`, `raw`.
    #[serde(deserialize_with = "nullable")]
    pub artifact_format: String,
}

/// One entry of `cache`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Cache {
    /// The key, unexpanded.
    #[serde(deserialize_with = "nullable")]
    pub key: String,
    /// Globs.
    #[serde(deserialize_with = "nullable")]
    pub paths: Vec<String>,
    /// Everything git does not track as well.
    #[serde(deserialize_with = "nullable")]
    pub untracked: bool,
    /// `pull-push` (also when empty), `pull`, `push`.
    #[serde(deserialize_with = "nullable")]
    pub policy: String,
    /// `on_success` (also when empty), `on_failure`, `always`.
    #[serde(deserialize_with = "nullable")]
    pub when: String,
    /// Keys to try in turn.
    #[serde(deserialize_with = "nullable")]
    pub fallback_keys: Vec<String>,
}

/// One entry of `credentials`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Credential {
    /// `registry`; others are ignored.
    #[serde(rename = "type", deserialize_with = "nullable")]
    pub kind: String,
    /// The registry.
    #[serde(deserialize_with = "nullable")]
    pub url: String,
    /// The user.
    #[serde(deserialize_with = "nullable")]
    pub username: String,
    /// The password.
    #[serde(deserialize_with = "nullable")]
    pub password: Secret,
}

/// One entry of `dependencies`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Dependency {
    /// The job that made the artifacts.
    #[serde(deserialize_with = "nullable")]
    pub id: i64,
    /// Its name.
    #[serde(deserialize_with = "nullable")]
    pub name: String,
    /// The token to download with.
    #[serde(deserialize_with = "nullable")]
    pub token: Secret,
    /// Absent when there is nothing to download.
    pub artifacts_file: Option<ArtifactsFile>,
}

/// `artifacts_file` of a dependency.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct ArtifactsFile {
    /// The archive's name.
    #[serde(deserialize_with = "nullable")]
    pub filename: String,
    /// Its size in bytes.
    #[serde(deserialize_with = "nullable")]
    pub size: i64,
}

/// `features`: what the server can take.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct ServerFeatures {
    /// Whether section markers are wanted.
    #[serde(deserialize_with = "nullable")]
    pub trace_sections: bool,
    /// The failure reasons the server knows.
    #[serde(deserialize_with = "nullable")]
    pub failure_reasons: Vec<String>,
    /// Token prefixes to mask besides the usual ones.
    #[serde(deserialize_with = "nullable")]
    pub token_mask_prefixes: Vec<String>,
}

impl fmt::Debug for JobPayload {
    /// Names the job only: scripts, inputs and secrets have no place in a log.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JobPayload")
            .field("id", &self.id)
            .field("job_info", &self.job_info)
            .finish_non_exhaustive()
    }
}

/// What the calls about runners answer.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct RunnerAnswer {
    /// GitLab's number for the runner.
    pub id: Option<i64>,
    /// Its authentication token.
    #[serde(deserialize_with = "nullable")]
    pub token: Secret,
    /// When that expires.
    pub token_expires_at: Option<String>,
}

impl JobPayload {
    /// The timeout in seconds that counts from receipt: GitLab's, or 7200 when it named none
    /// (gitlab-runner, `common/build.go`).
    pub fn timeout_secs(&self) -> u64 {
        u64::try_from(self.runner_info.timeout).ok().filter(|secs| *secs > 0).unwrap_or(7200)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nulls_everywhere_are_defaults() {
        let payload: JobPayload = serde_json::from_str(
            r#"{"id":1,"token":null,"job_info":null,"git_info":{"depth":null,"refspecs":null,
                "protected":null},"variables":[{"key":"A","value":null,"file":null}],"steps":null,
                "image":null,"artifacts":null,"features":{"failure_reasons":null},
                "runner_info":{"timeout":null},"new_field":[1]}"#,
        )
        .unwrap();
        assert_eq!(payload.id, 1);
        assert_eq!(payload.timeout_secs(), 7200);
        assert_eq!(payload.variables[0].value.expose(), "");
        assert!(payload.steps.is_empty());
    }

    #[test]
    fn an_image_comes_with_all_its_options() {
        let payload: JobPayload = serde_json::from_str(
            r#"{"image":{"name":"a","entrypoint":null,"ports":[],"pull_policy":["always"],
                "executor_opts":{"docker":{"platform":"linux/arm64","user":1000},
                "kubernetes":{"user":"me"},"new":{}}},
                "services":[{"name":"b","alias":"x,y","command":["z"],"executor_opts":{}},
                {"name":"c","executor_opts":{"docker":{"user":null}}}]}"#,
        )
        .unwrap();
        let image = payload.image.unwrap();
        assert_eq!(
            (image.name.as_str(), image.pull_policy.as_slice()),
            ("a", &["always".into()][..])
        );
        assert_eq!(image.executor_opts.docker.platform, "linux/arm64");
        assert_eq!(image.executor_opts.docker.user, "1000");
        assert_eq!(image.executor_opts.kubernetes.user, "me");
        assert_eq!((payload.services.len(), payload.services[0].alias.as_str()), (2, "x,y"));
    }

    #[test]
    fn debug_shows_no_secret() {
        let payload: JobPayload = serde_json::from_str(
            r#"{"token":"glcbt-1","git_info":{"repo_url":"https://u:glcbt-1@h/p.git"},
                "variables":[{"key":"A","value":"hunter2"}],"steps":[{"script":["my-script"]}]}"#,
        )
        .unwrap();
        let text = format!("{payload:?} {:?} {:?}", payload.git_info, payload.variables);
        for secret in ["glcbt-1", "hunter2", "my-script"] {
            assert!(!text.contains(secret), "{text}");
        }
    }
}
