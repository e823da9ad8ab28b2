//! `.gitlab-ci.yml` → jobs in the order in which GitLab would run them, for `bridge exec`.
//!
//! Owns the subset of GitLab's pipeline language that a single machine can honour, and the rules
//! by which one job's end lets another begin. It knows nothing of runners, payloads or backends:
//! text goes in, [`Job`]s come out, and [`Run`] is told what became of them.
//!
//! A file is read in the order GitLab reads it, because the steps see each other's results:
//! YAML with its aliases and merge keys (`yaml`), a file's inputs (`inputs`) and what it includes
//! (`include`), then `extends`, then `!reference`, then the keywords (`read`, `parts`, `rules`), then
//! which jobs this pipeline has (`plan`), then what only the whole can tell (`graph`). A word outside
//! the subset is an error, not a guess; one that means nothing on a single machine is noted.

mod duration;
mod error;
mod expand;
mod expression;
mod extends;
mod glob;
mod graph;
mod include;
mod inputs;
mod model;
mod parts;
mod plan;
mod project;
mod read;
mod reference;
mod rules;
mod run;
mod select;
mod source;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod whole_tests;
mod yaml;

use std::time::Duration;

use camino::Utf8Path;

pub use self::error::{PipelineError, Problem};
pub use self::model::{Artifacts, Cache, Image, Report, Retry, Variable};
pub use self::project::{Project, TreeFile};
pub use self::run::{Ended, Fate, JobIndex, PipelineResult, Run, Skip};
pub use self::source::{RefType, Source, SourceError, source};

/// Largest file that is read; GitLab's own limit.
const MAX_BYTES: usize = 2 * 1024 * 1024;

/// How to read a pipeline file.
#[derive(Clone, Debug, Default)]
pub struct LoadOptions {
    /// Leave out keywords outside the supported subset and note each, instead of refusing them.
    pub ignore_unknown: bool,
    /// What rules and includes may ask of the project.
    pub project: Project,
    /// Variables given for this pipeline; they win over the file's.
    pub variables: Vec<Variable>,
    /// Values for the file's `spec: inputs`.
    pub inputs: Vec<(String, String)>,
}

/// What a pipeline file asks for.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Pipeline {
    /// What `workflow: name` calls it.
    pub name: Option<String>,
    /// All stages in order, from `.pre` to `.post`, also those without jobs.
    pub stages: Vec<String>,
    /// The jobs, by stage and then in the order of the file.
    pub jobs: Vec<Job>,
    /// Jobs of the file that this pipeline does not have.
    pub left_out: Vec<LeftOut>,
    /// What the user should know, with file and line: words that were left out, keys given twice.
    pub notes: Vec<String>,
}

impl Pipeline {
    /// Finds a job by its name.
    pub fn position(&self, name: &str) -> Option<JobIndex> {
        self.jobs.iter().position(|job| job.name == name)
    }
}

/// A job of the file that is not in the pipeline.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeftOut {
    /// Its name.
    pub name: String,
    /// The stage it would belong to.
    pub stage: String,
    /// Why it is not there, as a fragment.
    pub why: String,
}

/// One job with its defaults, bases and references filled in.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Job {
    /// Its name: the key in the file, and for one of several its place among them.
    pub name: String,
    /// Its key in the file.
    pub family: String,
    /// The stage it belongs to; one of [`Pipeline::stages`].
    pub stage: String,
    /// The file its key stands in.
    pub file: String,
    /// The line its key stands on, counted from 1.
    pub line: usize,
    /// The lines of `before_script` and `script`.
    pub script: Vec<String>,
    /// The lines of `after_script`; none if it has none.
    pub after_script: Vec<String>,
    /// The file's variables for it, and then those given for the pipeline; each name once.
    pub variables: Vec<Variable>,
    /// The jobs it waits for instead of the stages before its own; `None` when it goes by stages.
    pub needs: Option<Vec<Need>>,
    /// The only jobs whose artifacts it gets; `None` for all that it could.
    pub dependencies: Option<Vec<String>>,
    /// Which failures do not count.
    pub allow_failure: AllowFailure,
    /// How long it may take, if it says so.
    pub timeout: Option<Duration>,
    /// What must have become of the jobs before it.
    pub when: When,
    /// What it leaves for others.
    pub artifacts: Option<Artifacts>,
    /// What it keeps for its next run.
    pub caches: Vec<Cache>,
    /// When it runs again after a failure.
    pub retry: Retry,
    /// What it would run in on a runner with containers.
    pub image: Option<Image>,
    /// What it would have beside it there.
    pub services: Vec<Image>,
    /// Scripts for other moments, by their keyword.
    pub hooks: Vec<(String, Vec<String>)>,
}

/// A job that must be over before another starts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Need {
    /// Name of a job of the same pipeline.
    pub job: String,
    /// Whether the pipeline would be right without that job; it exists, or the need were not here.
    pub optional: bool,
    /// Whether its artifacts are wanted, too.
    pub artifacts: bool,
}

/// Which failures of a job leave the pipeline successful.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum AllowFailure {
    /// None.
    #[default]
    Never,
    /// All.
    Always,
    /// Those of the script with one of these exit codes.
    ExitCodes(Vec<i32>),
}

/// What must have become of earlier jobs for a job to run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum When {
    /// They succeeded, or their failure was allowed.
    #[default]
    OnSuccess,
    /// At least one failed.
    OnFailure,
    /// They are over.
    Always,
    /// As for success, and somebody asks for it.
    Manual,
}

/// Reads a pipeline file and what it includes, as [`parse`] does.
pub fn load(path: &Utf8Path, options: &LoadOptions) -> Result<Pipeline, PipelineError> {
    parse(&read(path)?, path.as_str(), options)
}

/// Reads a file as text.
pub fn read(path: &Utf8Path) -> Result<String, PipelineError> {
    std::fs::read_to_string(path)
        .map_err(|source| PipelineError::Read { path: path.to_owned(), source })
}

/// Reads a pipeline from text; `name` is what messages call the file.
///
/// May block, because a rule's `compare_to` asks git: not to be called where async code runs.
pub fn parse(text: &str, name: &str, options: &LoadOptions) -> Result<Pipeline, PipelineError> {
    let mut findings = error::Findings::new(options.ignore_unknown);
    let (plan, jobs) = interpret(text, name, options, &mut findings);
    let notes = findings.finish()?;
    Ok(Pipeline { name: plan.name, stages: plan.stages, jobs, left_out: plan.left_out, notes })
}

fn interpret(
    text: &str,
    name: &str,
    options: &LoadOptions,
    findings: &mut error::Findings,
) -> (plan::Plan, Vec<Job>) {
    let mut scope = expand::Scope::default();
    scope.add(&options.project.variables);
    scope.add(&options.variables);
    let given: Vec<(String, inputs::Given)> = options
        .inputs
        .iter()
        .map(|(name, value)| (name.clone(), inputs::Given::Text(value.clone())))
        .collect();
    let mut includer = include::Includer::new(&options.project, &scope, findings);
    let Some(root) = includer.file(text, name, &given, 0) else { return Default::default() };
    let Some(written) = root.entries() else { return Default::default() };
    let extended = extends::expand(written, findings);
    let resolved = reference::resolve(&extended, findings);
    let drafts = read::file(&resolved, findings);
    let mut plan = plan::plan(drafts, options, findings);
    let jobs = graph::check(&mut plan, written, findings);
    (plan, jobs)
}
