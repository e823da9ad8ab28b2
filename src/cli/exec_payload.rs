//! What `bridge exec` tells the coordinator of a job: the pipeline's words turned into those of the
//! runner's payload, as GitLab's presenter of jobs turns them.

use serde_json::{Value, json};

use crate::coordinator::{Git, NewJob, Variable};
use crate::pipeline::{self, Artifacts, Cache, Report, Source};

/// Makes the job that the coordinator hands out.
pub(super) fn new_job(
    job: &pipeline::Job,
    source: &Source,
    predefined: &[pipeline::Variable],
) -> NewJob {
    let git = Git {
        repo_url: Some(source.url()),
        sha: Some(source.sha.clone()),
        reference: Some(source.ref_name.clone()),
        tag: source.ref_type.as_str() == "tag",
        refspecs: Some(vec![format!("+{}:refs/pipelines/1", source.sha)]),
        depth: 0,
    };
    let mut new = NewJob::new(job.name.clone())
        .stage(job.stage.clone())
        .script_lines(job.script.clone())
        .project(source.project_path.clone(), 1)
        .git(git);
    for line in &job.after_script {
        new = new.after_script(line.clone());
    }
    for (name, lines) in &job.hooks {
        new = new.hook(name.clone(), lines.clone());
    }
    for variable in predefined.iter().chain(&job.variables) {
        let mut told = Variable::new(variable.name.clone(), variable.value.clone());
        if variable.raw {
            told = told.raw();
        }
        new = new.variable(told);
    }
    if let Some(timeout) = job.timeout {
        new = new.timeout(timeout);
    }
    if let Some(image) = &job.image {
        new = new.image(image.name.clone());
    }
    for service in &job.services {
        new = new.service(json!({ "name": service.name, "alias": service.alias }));
    }
    for artifact in job.artifacts.iter().flat_map(artifacts) {
        new = new.artifact(artifact);
    }
    for entry in &job.caches {
        new = new.cache(cache(entry));
    }
    new
}

/// Gives the payload's entries: the archive, if there is one, and then each report.
fn artifacts(artifacts: &Artifacts) -> Vec<Value> {
    let mut entries = Vec::new();
    if artifacts.has_archive() {
        let mut archive = json!({
            "name": artifacts.name,
            "untracked": artifacts.untracked,
            "paths": artifacts.paths,
            "when": artifacts.when,
            "expire_in": artifacts.expire_in,
            "artifact_type": "archive",
            "artifact_format": "zip",
        });
        if !artifacts.exclude.is_empty() {
            archive["exclude"] = json!(artifacts.exclude);
        }
        entries.push(archive);
    }
    entries.extend(artifacts.reports.iter().map(|one| report(one, artifacts.expire_in.as_deref())));
    entries
}

fn report(report: &Report, expire_in: Option<&str>) -> Value {
    let (name, format) = file_of(&report.kind);
    let mut entry = json!({
        "name": name,
        "paths": report.paths,
        // Reports are wanted most when something went wrong.
        "when": "always",
        "artifact_type": report.kind,
        "artifact_format": format,
    });
    if let Some(expire_in) = expire_in {
        entry["expire_in"] = json!(expire_in);
    }
    entry
}

/// Gives the file name and the format that GitLab has for a kind of report.
fn file_of(kind: &str) -> (&str, &'static str) {
    match kind {
        "junit" => ("junit.xml", "gzip"),
        "metrics" => ("metrics.txt", "gzip"),
        "dotenv" => (".env", "gzip"),
        "cobertura" => ("cobertura-coverage.xml", "gzip"),
        "jacoco" => ("jacoco-coverage.xml", "gzip"),
        "cluster_applications" => ("gl-cluster-applications.json", "gzip"),
        "cyclonedx" => ("gl-sbom.cdx.json", "gzip"),
        "annotations" => ("gl-annotations.json", "gzip"),
        "repository_xray" => ("gl-repository-xray.json", "gzip"),
        "lsif" => ("lsif.json", "zip"),
        "scip" => ("index.scip", "zip"),
        "sast" => ("gl-sast-report.json", "raw"),
        "secret_detection" => ("gl-secret-detection-report.json", "raw"),
        "dependency_scanning" => ("gl-dependency-scanning-report.json", "raw"),
        "container_scanning" => ("gl-container-scanning-report.json", "raw"),
        "cluster_image_scanning" => ("gl-cluster-image-scanning-report.json", "raw"),
        "dast" => ("gl-dast-report.json", "raw"),
        "license_scanning" => ("gl-license-scanning-report.json", "raw"),
        "accessibility" => ("gl-accessibility.json", "raw"),
        "codequality" => ("gl-code-quality-report.json", "raw"),
        "performance" => ("performance.json", "raw"),
        "browser_performance" => ("browser-performance.json", "raw"),
        "load_performance" => ("load-performance.json", "raw"),
        "terraform" => ("tfplan.json", "raw"),
        "requirements" => ("requirements.json", "raw"),
        "requirements_v2" => ("requirements_v2.json", "raw"),
        "coverage_fuzzing" => ("gl-coverage-fuzzing.json", "raw"),
        "api_fuzzing" => ("gl-api-fuzzing-report.json", "raw"),
        "sarif" => ("gl-sarif-report.sarif", "raw"),
        other => (other, "raw"),
    }
}

fn cache(cache: &Cache) -> Value {
    json!({
        "key": cache.key,
        "untracked": cache.untracked,
        "paths": cache.paths,
        "policy": cache.policy,
        "when": cache.when,
        "fallback_keys": cache.fallback_keys,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn artifacts_and_caches_have_the_payload_s_shape() {
        let all = Artifacts {
            name: Some("$CI_JOB_NAME".into()),
            paths: vec!["out/".into()],
            exclude: vec!["out/*.o".into()],
            when: Some("always".into()),
            expire_in: Some("1 week".into()),
            reports: vec![
                Report { kind: "junit".into(), paths: vec!["a.xml".into(), "b.xml".into()] },
                Report { kind: "dotenv".into(), paths: vec!["x.env".into()] },
            ],
            ..Artifacts::default()
        };
        insta::assert_json_snapshot!(artifacts(&all));
        let reports = Artifacts { paths: Vec::new(), ..all };
        assert_eq!(artifacts(&reports).len(), 2, "reports alone make no archive");
        let one = Cache {
            key: "a-$X-protected".into(),
            fallback_keys: vec!["b-protected".into()],
            paths: vec!["cache".into()],
            when: "on_success".into(),
            policy: "pull".into(),
            untracked: false,
        };
        insta::assert_json_snapshot!(cache(&one));
    }
}
