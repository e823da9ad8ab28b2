//! `.gitlab-ci.yml` → jobs in the order in which GitLab would run them, for `bridge exec`.
//!
//! Owns the subset of GitLab's pipeline language that a single machine can honour, and the rules
//! by which one job's end lets another begin. It knows nothing of runners, payloads or backends:
//! text goes in, [`Job`]s come out, and [`Run`] is told what became of them.
//!
//! A file is read in the order GitLab reads it, because the steps see each other's results:
//! YAML with its aliases and merge keys (`yaml`), then `extends`, then `!reference`, then the
//! keywords (`read`), then what only the whole can tell (`graph`). A word outside the subset is an
//! error, not a guess: a pipeline that passes here without its `rules` has shown nothing.

mod duration;
mod error;
mod extends;
mod graph;
mod read;
mod reference;
mod run;
mod source;
#[cfg(test)]
mod tests;
mod yaml;

use std::time::Duration;

use camino::Utf8Path;

pub use self::error::{PipelineError, Problem};
pub use self::run::{Ended, Fate, JobIndex, PipelineResult, Run, Skip};
pub use self::source::{RefType, Source, SourceError, source};

/// Largest file that is read; GitLab's own limit.
const MAX_BYTES: usize = 2 * 1024 * 1024;

/// How to read a pipeline file.
#[derive(Clone, Debug, Default)]
pub struct LoadOptions {
    /// Leave out keywords outside the supported subset and note each, instead of refusing them.
    pub ignore_unknown: bool,
}

/// What a pipeline file asks for.
#[derive(Clone, Debug, PartialEq)]
pub struct Pipeline {
    /// All stages in order, from `.pre` to `.post`, also those without jobs.
    pub stages: Vec<String>,
    /// The jobs, by stage and then in the order of the file.
    pub jobs: Vec<Job>,
    /// What the user should know, with file and line: words that were left out, keys given twice.
    pub notes: Vec<String>,
}

impl Pipeline {
    /// Finds a job by its name.
    pub fn position(&self, name: &str) -> Option<JobIndex> {
        self.jobs.iter().position(|job| job.name == name)
    }
}

/// One job with its defaults, bases and references filled in.
#[derive(Clone, Debug, PartialEq)]
pub struct Job {
    /// Its key in the file.
    pub name: String,
    /// The stage it belongs to; one of [`Pipeline::stages`].
    pub stage: String,
    /// The line its key stands on, counted from 1.
    pub line: usize,
    /// The lines of `before_script` and `script`.
    pub script: Vec<String>,
    /// The lines of `after_script`; none if it has none.
    pub after_script: Vec<String>,
    /// Global variables and then the job's own; each name once, with the job's value.
    pub variables: Vec<(String, String)>,
    /// The jobs it waits for instead of the stages before its own; `None` when it goes by stages.
    pub needs: Option<Vec<Need>>,
    /// Which failures do not count.
    pub allow_failure: AllowFailure,
    /// How long it may take, if it says so.
    pub timeout: Option<Duration>,
    /// What must have become of the jobs before it.
    pub when: When,
}

/// A job that must be over before another starts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Need {
    /// Name of a job of the same pipeline.
    pub job: String,
    /// Whether the pipeline would be right without that job; it exists, or the need were not here.
    pub optional: bool,
}

/// Which failures of a job leave the pipeline successful.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AllowFailure {
    /// None.
    Never,
    /// All.
    Always,
    /// Those of the script with one of these exit codes.
    ExitCodes(Vec<i32>),
}

/// What must have become of earlier jobs for a job to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// They succeeded, or their failure was allowed.
    OnSuccess,
    /// At least one failed.
    OnFailure,
    /// They are over.
    Always,
    /// As for success, and somebody asks for it.
    Manual,
}

/// Reads a pipeline file.
pub fn load(path: &Utf8Path, options: &LoadOptions) -> Result<Pipeline, PipelineError> {
    let text = std::fs::read_to_string(path)
        .map_err(|source| PipelineError::Read { path: path.to_owned(), source })?;
    parse(&text, path.as_str(), options)
}

/// Reads a pipeline from text; `name` is what messages call the file.
pub fn parse(text: &str, name: &str, options: &LoadOptions) -> Result<Pipeline, PipelineError> {
    let mut findings = error::Findings::new(name, options.ignore_unknown);
    let (stages, jobs) = interpret(text, &mut findings);
    let notes = findings.finish()?;
    Ok(Pipeline { stages, jobs, notes })
}

fn interpret(text: &str, findings: &mut error::Findings) -> (Vec<String>, Vec<Job>) {
    if text.len() > MAX_BYTES {
        findings.problem(1, None, format!("larger than {} MiB", MAX_BYTES / 1024 / 1024));
        return Default::default();
    }
    let document = match yaml::load(text) {
        Ok(document) => document,
        Err(faults) => {
            for fault in faults {
                findings.problem(fault.line, None, fault.message);
            }
            return Default::default();
        }
    };
    for fault in document.duplicates {
        findings.note(fault.line, None, fault.message);
    }
    let Some(written) = document.root.entries() else {
        let message = if document.root.is_null() {
            "is empty".to_owned()
        } else {
            format!("is {}, not a mapping of jobs", document.root.kind())
        };
        findings.problem(document.root.line, None, message);
        return Default::default();
    };
    let extended = extends::expand(written, findings);
    let resolved = reference::resolve(&extended, findings);
    let drafts = read::file(&resolved, findings);
    graph::check(drafts, written, findings)
}
