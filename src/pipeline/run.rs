//! Which job may start when, what becomes of those that may not, and of the whole.
//!
//! Pure: the caller says which jobs started and how they ended. The rules are those by which
//! GitLab processes a pipeline: earlier jobs are summed up into one status, and the job's `when`
//! says which of these lets it run. A job with `needs` looks at those, any other at all stages
//! before its own.

use std::fmt;

use super::{AllowFailure, Pipeline, When};

/// Place of a job in [`Pipeline::jobs`].
pub type JobIndex = usize;

/// How a job ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ended {
    /// Whether it did what it should.
    pub success: bool,
    /// The exit code of its script, if the script ended by itself.
    pub exit_code: Option<i32>,
    /// Whether somebody stopped it.
    pub cancelled: bool,
}

/// What became of a job, once and for all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It ran and succeeded.
    Passed,
    /// It ran and failed.
    Failed,
    /// It ran and failed, which its `allow_failure` permits.
    FailureAllowed,
    /// It was stopped, or the pipeline was before the job's turn.
    Cancelled,
    /// It never ran.
    Skipped(Skip),
}

/// Why a job never ran.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Skip {
    /// What became of the jobs before it is not what its `when` asks for.
    Condition,
    /// It is manual, and nobody asked for it.
    Manual,
    /// It comes after a manual job that must run first and was not asked for.
    Blocked,
}

/// What became of the pipeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PipelineResult {
    /// All that counts succeeded.
    Passed,
    /// As before, but at least one job failed that may.
    PassedWithWarnings,
    /// A job failed.
    Failed,
    /// A job was stopped, and none failed.
    Cancelled,
    /// No job ran.
    Skipped,
    /// It cannot go on without a manual job that nobody asked for.
    Blocked,
}

impl PipelineResult {
    /// Whether a caller should be told that all is well.
    pub fn is_success(self) -> bool {
        match self {
            Self::Passed | Self::PassedWithWarnings | Self::Skipped => true,
            Self::Failed | Self::Cancelled | Self::Blocked => false,
        }
    }
}

impl fmt::Display for PipelineResult {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Passed => "passed",
            Self::PassedWithWarnings => "passed with warnings",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::Skipped => "skipped",
            Self::Blocked => "blocked by a manual job",
        })
    }
}

impl fmt::Display for Fate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Passed => "passed",
            Self::Failed => "failed",
            Self::FailureAllowed => "failed (allowed)",
            Self::Cancelled => "cancelled",
            Self::Skipped(Skip::Condition) => "skipped",
            Self::Skipped(Skip::Manual) => "skipped (manual)",
            Self::Skipped(Skip::Blocked) => "skipped (blocked)",
        })
    }
}

/// Where a job is on its way to its fate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Status {
    /// Its turn has not come.
    Created,
    /// It may start.
    Ready,
    Running,
    /// It would run if somebody asked for it; whether it counts is in `allowed`.
    Manual,
    Over(Fate),
}

/// A job as far as the rules need it.
#[derive(Clone, Debug)]
struct Member {
    name: String,
    stage: usize,
    needs: Option<Vec<JobIndex>>,
    when: When,
    allow_failure: AllowFailure,
    status: Status,
}

/// One run of a pipeline.
#[derive(Clone, Debug)]
pub struct Run {
    jobs: Vec<Member>,
}

/// The status of several jobs taken together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sum {
    Success,
    Failed,
    Cancelled,
    Skipped,
    /// Nothing more happens until somebody starts a manual job.
    Manual,
    Unfinished,
}

impl Run {
    /// Begins a run in which no manual job is asked for.
    pub fn new(pipeline: &Pipeline) -> Self {
        Self::with_manual(pipeline, &[])
    }

    /// Begins a run in which the manual jobs of these names run when their turn comes.
    pub fn with_manual(pipeline: &Pipeline, selected: &[String]) -> Self {
        let stage_of = |name: &str| pipeline.stages.iter().position(|stage| stage == name);
        let jobs = pipeline.jobs.iter().map(|job| Member {
            name: job.name.clone(),
            stage: stage_of(&job.stage).unwrap_or(0),
            needs: job.needs.as_ref().map(|needs| {
                needs.iter().filter_map(|need| pipeline.position(&need.job)).collect()
            }),
            when: match job.when {
                When::Manual if selected.contains(&job.name) => When::OnSuccess,
                When::OnSuccess | When::OnFailure | When::Always | When::Manual => job.when,
            },
            allow_failure: job.allow_failure.clone(),
            status: Status::Created,
        });
        let mut run = Self { jobs: jobs.collect() };
        run.settle();
        run
    }

    /// Gives the jobs that may start and have not.
    pub fn startable(&self) -> Vec<JobIndex> {
        (0..self.jobs.len()).filter(|job| self.jobs[*job].status == Status::Ready).collect()
    }

    /// Takes note that a startable job has been started.
    pub fn started(&mut self, job: JobIndex) {
        if let Some(member) = self.jobs.get_mut(job)
            && member.status == Status::Ready
        {
            member.status = Status::Running;
        }
    }

    /// Takes note of a job's end. Only the first end of a job that was its turn counts.
    pub fn ended(&mut self, job: JobIndex, ended: Ended) {
        let Some(member) = self.jobs.get_mut(job) else { return };
        if !matches!(member.status, Status::Ready | Status::Running) {
            return;
        }
        let fate = if ended.cancelled {
            Fate::Cancelled
        } else if ended.success {
            Fate::Passed
        } else if member.allows(ended.exit_code) {
            Fate::FailureAllowed
        } else {
            Fate::Failed
        };
        member.status = Status::Over(fate);
        self.settle();
    }

    /// Gives up on every job that has not been started; those that run are still to be ended.
    pub fn cancel(&mut self) {
        for member in &mut self.jobs {
            if matches!(member.status, Status::Created | Status::Ready) {
                member.status = Status::Over(Fate::Cancelled);
            }
        }
        self.settle();
    }

    /// Gives what became of a job; `None` while that is open.
    pub fn fate(&self, job: JobIndex) -> Option<Fate> {
        match self.jobs.get(job)?.status {
            Status::Over(fate) => Some(fate),
            Status::Manual => Some(Fate::Skipped(Skip::Manual)),
            Status::Created | Status::Ready | Status::Running => None,
        }
    }

    /// Gives what became of the pipeline; `None` while a job has no fate.
    pub fn result(&self) -> Option<PipelineResult> {
        if (0..self.jobs.len()).any(|job| self.fate(job).is_none()) {
            return None;
        }
        let any = |fate| self.jobs.iter().any(|member| member.status == Status::Over(fate));
        Some(match self.sum(0..self.jobs.len(), false) {
            Sum::Success if any(Fate::FailureAllowed) => PipelineResult::PassedWithWarnings,
            Sum::Success => PipelineResult::Passed,
            Sum::Cancelled => PipelineResult::Cancelled,
            Sum::Skipped => PipelineResult::Skipped,
            // Nobody will come and start the manual job, so what went wrong is said instead.
            Sum::Manual if any(Fate::Failed) => PipelineResult::Failed,
            Sum::Manual if any(Fate::Cancelled) => PipelineResult::Cancelled,
            Sum::Manual => PipelineResult::Blocked,
            Sum::Failed | Sum::Unfinished => PipelineResult::Failed,
        })
    }

    /// Tells which manual jobs were left out and what that cut off, for people.
    pub fn notes(&self) -> Vec<String> {
        let names = |status| {
            let fitting = self.jobs.iter().filter(|member| member.status == status);
            fitting.map(|member| format!("`{}`", member.name)).collect::<Vec<_>>().join(", ")
        };
        let manual = names(Status::Manual);
        let blocked = names(Status::Over(Fate::Skipped(Skip::Blocked)));
        let mut notes = Vec::new();
        if !manual.is_empty() {
            notes.push(format!("not run, because manual and not asked for: {manual}"));
        }
        if !blocked.is_empty() {
            notes.push(format!("not run, because a manual job comes first: {blocked}"));
        }
        notes
    }

    /// Decides about every job whose turn it is, until no decision brings about another.
    fn settle(&mut self) {
        loop {
            let mut changed = false;
            for job in 0..self.jobs.len() {
                if self.jobs[job].status == Status::Created
                    && let Some(status) = self.decide(job)
                {
                    self.jobs[job].status = status;
                    changed = true;
                }
            }
            if !changed {
                break;
            }
        }
        let busy = |member: &Member| matches!(member.status, Status::Ready | Status::Running);
        if !self.jobs.iter().any(busy) {
            // Nothing runs and nothing can: only a manual job can have brought this about.
            for member in &mut self.jobs {
                if member.status == Status::Created {
                    member.status = Status::Over(Fate::Skipped(Skip::Blocked));
                }
            }
        }
    }

    fn decide(&self, job: JobIndex) -> Option<Status> {
        let member = &self.jobs[job];
        let before = match &member.needs {
            Some(needs) => self.sum(needs.iter().copied(), true),
            None => {
                let earlier = (0..self.jobs.len()).filter(|j| self.jobs[*j].stage < member.stage);
                self.sum(earlier, false)
            }
        };
        let stages = member.needs.is_none();
        let runs = match (member.when, before) {
            (_, Sum::Unfinished | Sum::Manual) => return None,
            (When::OnSuccess | When::Manual, Sum::Success) => true,
            (When::OnSuccess | When::Manual, Sum::Skipped) => stages,
            (When::OnSuccess | When::Manual, Sum::Failed | Sum::Cancelled) => false,
            (When::OnFailure, Sum::Failed) => true,
            (When::OnFailure, Sum::Success | Sum::Skipped | Sum::Cancelled) => false,
            (When::Always, Sum::Success | Sum::Failed | Sum::Skipped) => true,
            // Who stops a pipeline wants it to stop.
            (When::Always, Sum::Cancelled) => false,
        };
        Some(match (runs, member.when) {
            (false, _) => Status::Over(Fate::Skipped(Skip::Condition)),
            (true, When::Manual) => Status::Manual,
            (true, When::OnSuccess | When::OnFailure | When::Always) => Status::Ready,
        })
    }

    /// Sums up some jobs as GitLab does; `needed` when they are the needs of one job.
    fn sum(&self, jobs: impl Iterator<Item = JobIndex>, needed: bool) -> Sum {
        let mut seen = Seen::default();
        for job in jobs {
            seen.add(&self.jobs[job]);
        }
        if needed && (seen.skipped || seen.ignored) {
            // A need that never ran has nothing to give.
            Sum::Skipped
        } else if seen.unfinished || needed && seen.manual {
            Sum::Unfinished
        } else if seen.manual {
            Sum::Manual
        } else if seen.failed {
            Sum::Failed
        } else if seen.cancelled {
            Sum::Cancelled
        } else if (seen.skipped || seen.ignored) && !seen.success {
            Sum::Skipped
        } else {
            Sum::Success
        }
    }
}

impl Member {
    fn allows(&self, exit_code: Option<i32>) -> bool {
        match &self.allow_failure {
            AllowFailure::Never => false,
            AllowFailure::Always => true,
            AllowFailure::ExitCodes(codes) => exit_code.is_some_and(|code| codes.contains(&code)),
        }
    }
}

/// Which statuses occur among some jobs.
#[derive(Default)]
struct Seen {
    success: bool,
    failed: bool,
    cancelled: bool,
    skipped: bool,
    /// Manual jobs nobody has to wait for.
    ignored: bool,
    manual: bool,
    unfinished: bool,
}

impl Seen {
    fn add(&mut self, member: &Member) {
        let allowed = member.allow_failure == AllowFailure::Always;
        match member.status {
            Status::Created | Status::Ready | Status::Running => self.unfinished = true,
            Status::Manual if allowed => self.ignored = true,
            Status::Manual => self.manual = true,
            Status::Over(Fate::Passed | Fate::FailureAllowed) => self.success = true,
            Status::Over(Fate::Failed) => self.failed = true,
            Status::Over(Fate::Cancelled) if allowed => self.success = true,
            Status::Over(Fate::Cancelled) => self.cancelled = true,
            Status::Over(Fate::Skipped(_)) => self.skipped = true,
        }
    }
}
