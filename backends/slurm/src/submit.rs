//! Submitting one job.

use std::sync::Arc;

use bridge_backend::{BackendError, ErrorKind, ExternalId, Fault, JobSpec, Result, SubmitToken};

use crate::client::Client;
use crate::config::Config;
use crate::jobdir::{self, FileError, JobDir, Prepared, blocking};
use crate::options::Wishes;
use crate::{refusal, wrapper};

/// What of a label goes into Slurm's listings; Slurm takes 1024 bytes.
const LONGEST_LABEL: usize = 200;

/// Submits one job under its token.
pub(crate) async fn submit(
    config: &Config,
    client: &Client,
    token: &SubmitToken,
    spec: &JobSpec,
) -> Result<ExternalId> {
    let own =
        Wishes::of_job(&spec.options).map_err(|text| rejected("use the job's options", text))?;
    check(spec)?;
    let dir = JobDir::of(&config.jobs_dir, token);
    let words = arguments(config, &dir, token, spec, &own);
    let batch = wrapper::batch_script(dir.path(), &spec.workspace);

    // Goes with this future. Work on files that goes on without it looks here whether to.
    let wanted = Arc::new(());
    // Dropped here, this future leaves at most a directory without a job.
    let prepared = {
        let (dir, jobs_dir) = (dir.clone(), config.jobs_dir.clone());
        let wanted = Arc::downgrade(&wanted);
        let (script, env) = (spec.script.clone(), wrapper::environment(&spec.env));
        blocking(move || {
            jobdir::check_jobs_dir(&jobs_dir)?;
            dir.prepare(&script, &env, &wanted)
        })
        .await
    };
    let prepared = prepared
        .map_err(|error| {
            BackendError::new(ErrorKind::Transient, "prepare the job").with_source(error)
        })?
        .map_err(unprepared)?;
    match prepared {
        Prepared::New | Prepared::Again => {}
        // The earlier attempt took effect after all. One token, one job: it is this one.
        Prepared::Started(Some(id)) => return Ok(ExternalId(id.to_string())),
        Prepared::Started(None) => {
            return Err(BackendError::new(
                ErrorKind::Ambiguous,
                "submit the job again: an earlier submission is starting",
            ));
        }
    }

    let error = match client.call("sbatch", &words, Some(&batch), config.command_timeout).await {
        Ok(answer) if answer.ok() => match job_id(&answer.stdout) {
            Some(id) => return Ok(ExternalId(id.to_string())),
            None => BackendError::new(
                ErrorKind::Ambiguous,
                "submit the job for sure: sbatch's answer has no job id",
            )
            .with_source(answer.said()),
        },
        Ok(answer) => refusal::of_answer(&answer, &own, spec.limits.wall_time.is_some()),
        Err(error) => refusal::of_call(error),
    };
    // Surely not submitted, and never before: then nobody needs the secrets on the disk. The next
    // attempt, if any, writes them again.
    if prepared == Prepared::New && error.kind() != ErrorKind::Ambiguous {
        let wanted = Arc::downgrade(&wanted);
        let remove = move || if wanted.strong_count() > 0 { dir.remove() } else { Ok(()) };
        let cleared = blocking(remove).await;
        if !matches!(cleared, Ok(Ok(()))) {
            tracing::warn!(%token, "job directory of a refused job stays");
        }
    }
    Err(error)
}

fn rejected(context: &'static str, text: String) -> BackendError {
    BackendError::new(ErrorKind::Rejected(Fault::Job), context).with_source(text)
}

/// Refuses what no batch script could be made of.
fn check(spec: &JobSpec) -> Result<()> {
    let workspace = &spec.workspace;
    if !workspace.is_absolute() || workspace.as_str().contains(char::is_control) {
        return Err(BackendError::new(
            ErrorKind::Rejected(Fault::Site),
            "use the workspace: its path is not absolute or has control characters",
        ));
    }
    spec.check()
}

/// Says whose move it is when the directory could not be made.
fn unprepared(error: FileError) -> BackendError {
    use std::io::ErrorKind::{NotADirectory, NotFound, PermissionDenied, ReadOnlyFilesystem};
    let site = [NotADirectory, NotFound, PermissionDenied, ReadOnlyFilesystem];
    // Full disks, quotas and stale handles pass, or the operator sees `check` turn red.
    let kind = if site.contains(&error.source.kind()) {
        ErrorKind::Rejected(Fault::Site)
    } else {
        ErrorKind::Transient
    };
    BackendError::new(kind, "prepare the job's directory").with_source(error)
}

/// Puts the submission into words. None of them is a secret: other users can read them.
fn arguments(
    config: &Config,
    dir: &JobDir,
    token: &SubmitToken,
    spec: &JobSpec,
    own: &Wishes,
) -> Vec<String> {
    let mut words = vec![
        "--parsable".to_owned(),
        // The job's only identity that survives a controller's crash.
        format!("--job-name={token}"),
        "--no-requeue".to_owned(),
        "--open-mode=append".to_owned(),
        // Not the workspace: without its working directory Slurm runs a job in /tmp. The wrapper
        // changes into the workspace and checks that it could.
        format!("--chdir={}", dir.path()),
        format!("--output={}", dir.log()),
        "--input=/dev/null".to_owned(),
        // All of an environment that was built from nothing.
        "--export=ALL".to_owned(),
    ];
    let label = label(&spec.label);
    if !label.is_empty() {
        words.push(format!("--comment={label}"));
    }
    words.extend(own.clone().over(&config.wishes).arguments(spec.limits.wall_time));
    words.extend(config.sbatch_args.iter().cloned());
    words
}

/// Makes a label one line that a listing can show.
fn label(label: &str) -> String {
    let clean = |c: char| if c.is_control() || c == '|' { ' ' } else { c };
    label.trim().chars().take(LONGEST_LABEL).map(clean).collect()
}

/// Reads `ID` or `ID;CLUSTER`; a plugin of the site may have said something before it.
fn job_id(stdout: &str) -> Option<u64> {
    let line = stdout.lines().rev().find(|line| !line.trim().is_empty())?;
    let id = line.split(';').next()?.trim();
    id.parse().ok().filter(|id| *id > 0)
}

#[cfg(test)]
mod tests {
    use bridge_backend::{EnvVar, Limits};

    use super::*;

    fn spec() -> JobSpec {
        JobSpec {
            label: "a job\n--wrap=id|".into(),
            script: "exit 0".into(),
            env: Vec::new(),
            workspace: "/w".into(),
            outputs: Vec::new(),
            limits: Limits::default(),
            options: toml::Table::new(),
        }
    }

    #[test]
    fn an_answer_is_a_number_or_none() {
        assert_eq!(job_id("12\n"), Some(12));
        assert_eq!(job_id("12;cluster\n"), Some(12));
        assert_eq!(job_id("Welcome!\n12\n\n"), Some(12));
        for text in ["", "0", "-1", "twelve", "Submitted batch job 12", "12 13", "{\"id\":12}"] {
            assert_eq!(job_id(text), None, "{text}");
        }
    }

    #[test]
    fn the_words_hold_the_token_and_no_secret() {
        let table = "jobs_dir = '/j'\npartition = 'ci'\nsbatch_args = ['--exclusive']";
        let config = Config::read(table.parse().unwrap()).unwrap();
        let token = SubmitToken::parse("b1-2").unwrap();
        let dir = JobDir::of(&config.jobs_dir, &token);
        let mut spec = spec();
        spec.env.push(EnvVar { name: "SECRET".into(), value: "hunter2".into() });
        spec.limits.wall_time = Some(std::time::Duration::from_secs(90));
        let words = arguments(&config, &dir, &token, &spec, &Wishes::default());
        for word in [
            "--job-name=b1-2",
            "--no-requeue",
            "--open-mode=append",
            "--output=/j/b1-2/log",
            "--comment=a job --wrap=id ",
            "--partition=ci",
            "--time=2",
        ] {
            assert!(words.iter().any(|w| w == word), "{word} in {words:?}");
        }
        assert_eq!(words.last().map(String::as_str), Some("--exclusive"));
        let batch = wrapper::batch_script(dir.path(), &spec.workspace);
        assert!(!format!("{words:?}{batch}").contains("hunter2"));
    }

    #[test]
    fn what_no_shell_could_be_given_is_the_authors_fault() {
        let bad = EnvVar { name: "A;id".into(), value: "x".into() };
        let error = check(&JobSpec { env: vec![bad], ..spec() }).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Rejected(Fault::Job));
        assert!(check(&spec()).is_ok());
    }
}
