//! What is attested of an archive: which files it holds, and how they came to be.
//!
//! The form is gitlab-runner's (SLSA provenance 1 in an in-toto statement); the build type is ours,
//! since a job is run differently here.

use std::collections::BTreeMap;

use camino::Utf8Path;
use serde_json::{Value, json};
use url::Url;

use super::artifacts::{Ran, Stop};
use super::hands;
use super::variables::Variables;
use crate::archive::{Kind, Selection};
use crate::gitlab::wire::JobPayload;

/// Where the way in which jobs are run is described.
const BUILD_TYPE: &str =
    concat!(env!("CARGO_PKG_REPOSITORY"), "/blob/v", env!("CARGO_PKG_VERSION"), "/PROVENANCE.md");

/// What is the same for all archives of a job.
#[derive(Clone)]
pub(super) struct Statement {
    job: i64,
    job_name: String,
    repository: String,
    commit: String,
    runner_id: String,
    runner_name: String,
    names: Vec<String>,
}

impl Statement {
    /// Collects what it says of the job.
    pub(super) fn of_job(payload: &JobPayload, variables: &Variables) -> Self {
        Self {
            job: payload.id,
            job_name: payload.job_info.name.clone(),
            repository: public_url(payload.git_info.repo_url.expose()),
            commit: payload.git_info.sha.clone(),
            runner_id: variables.content("CI_RUNNER_ID").to_owned(),
            runner_name: variables.content("CI_RUNNER_DESCRIPTION").to_owned(),
            names: payload.variables.iter().map(|variable| variable.key.clone()).collect(),
        }
    }

    /// Writes the statement for one archive. Files that vanished meanwhile are left out.
    pub(super) async fn of(
        &self,
        root: &Utf8Path,
        selection: &Selection,
        ran: Ran,
        stop: &Stop,
    ) -> String {
        let names: Vec<Vec<u8>> = selection
            .entries
            .iter()
            .filter(|entry| entry.kind == Kind::File)
            .map(|entry| entry.name.clone())
            .collect();
        let (root, flag) = (root.to_owned(), stop.flag());
        let digests = tokio::task::spawn_blocking(move || {
            names
                .into_iter()
                .filter_map(|name| {
                    let digest = hands::digest(&root, &name, &flag)?;
                    let name = String::from_utf8_lossy(&name).into_owned();
                    Some(json!({ "name": name, "digest": { "sha256": digest } }))
                })
                .collect::<Vec<Value>>()
        });
        let subject = match digests.await {
            Ok(subject) => subject,
            Err(error) => {
                tracing::warn!(%error, "digests of artifacts not computed");
                Vec::new()
            }
        };
        let mut parameters: BTreeMap<&str, &str> =
            self.names.iter().map(|name| (name.as_str(), "")).collect();
        parameters.insert("entryPoint", &self.job_name);
        parameters.insert("source", &self.repository);
        let (os_arch, version) = (std::env::consts::ARCH, env!("CARGO_PKG_VERSION"));
        let statement = json!({
            "_type": "https://in-toto.io/Statement/v0.1",
            "predicateType": "https://slsa.dev/provenance/v1",
            "subject": subject,
            "predicate": {
                "buildDefinition": {
                    "buildType": BUILD_TYPE,
                    "externalParameters": parameters,
                    "internalParameters": {
                        "name": self.runner_name, "executor": "bridge",
                        "architecture": os_arch, "job": self.job.to_string(),
                    },
                    "resolvedDependencies": [
                        { "uri": self.repository, "digest": { "sha256": self.commit } }
                    ],
                },
                "runDetails": {
                    "builder": {
                        "id": format!("{}/-/runners/{}", self.repository, self.runner_id),
                        "version": { "bridge": version },
                    },
                    "metadata": {
                        "invocationId": self.job.to_string(),
                        "startedOn": format!("{:.0}", ran.started),
                        "finishedOn": format!("{:.0}", ran.finished),
                    },
                },
            },
        });
        format!("{statement:#}")
    }
}

/// Gives a repository's URL without credentials and without `.git`.
fn public_url(text: &str) -> String {
    let Ok(mut url) = Url::parse(text) else { return String::new() };
    let cleaned = url.set_password(None).and_then(|()| url.set_username(""));
    if cleaned.is_err() && (!url.username().is_empty() || url.password().is_some()) {
        return String::new();
    }
    url.as_str().trim_end_matches(".git").to_owned()
}
