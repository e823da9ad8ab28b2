//! `bridge runners jobs`: what GitLab believes of a runner's jobs, beside what the database knows.

use std::collections::BTreeMap;

use anyhow::Context as _;
use clap::Args;
use serde::Serialize;

use super::remote::{AccessArgs, Target, done};
use crate::cli::Context;
use crate::cli::exit::Exit;
use crate::cli::output::{Table, or_dash};
use crate::gitlab::CiStatus;
use crate::gitlab::api::{JobFilter, JobSummary};
use crate::store::{Filter, Job};
use crate::telemetry::Chain;

/// More jobs than these are not at work at once on one runner.
const MOST_AT_WORK: usize = 10_000;

/// `runners jobs`.
#[derive(Clone, Debug, Args)]
pub(super) struct RunnerJobsArgs {
    /// The runner: its name in the configuration, or GitLab's number
    #[arg(value_name = "RUNNER")]
    runner: String,
    /// Only jobs that GitLab has in this status
    #[arg(long, value_name = "STATUS", value_parser = ["running", "canceling", "success", "failed", "canceled"])]
    status: Option<String>,
    /// What they are ordered by
    #[arg(long, value_name = "KEY", value_parser = ["id"])]
    order_by: Option<String>,
    /// Newest first or oldest first
    #[arg(long, value_name = "ORDER", value_parser = ["asc", "desc"])]
    sort: Option<String>,
    /// Only jobs on which GitLab and the database disagree
    #[arg(long)]
    orphans: bool,
    /// Jobs of every machine that uses the runner, not of this one alone
    #[arg(long)]
    any_machine: bool,
    /// At most this many of GitLab's
    #[arg(long, value_name = "N", default_value_t = 100)]
    limit: usize,
    /// Write one JSON object per line
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    access: AccessArgs,
}

/// How GitLab and the database disagree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Orphan {
    /// GitLab believes that it runs here; no row knows of it.
    UnknownHere,
    /// GitLab believes that it runs; here it is over.
    OverHere,
    /// It is at work here; GitLab has ended it.
    EndedAtGitlab,
    /// It is at work here; GitLab does not list it as running.
    NotRunningAtGitlab,
}

impl Orphan {
    fn words(self) -> &'static str {
        match self {
            Self::UnknownHere => "unknown here",
            Self::OverHere => "over here",
            Self::EndedAtGitlab => "ended at GitLab",
            Self::NotRunningAtGitlab => "not running at GitLab",
        }
    }
}

/// One line of `runners jobs`.
#[derive(Debug, Serialize)]
struct Row {
    /// GitLab's number.
    ci_job: i64,
    project: Option<String>,
    name: String,
    /// GitLab's word; absent if it does not list the job.
    ci_status: Option<String>,
    /// Our id and state; absent without a row.
    id: Option<String>,
    state: Option<&'static str>,
    orphan: Option<Orphan>,
}

impl RunnerJobsArgs {
    pub(super) async fn run(&self, context: &Context) -> anyhow::Result<Exit> {
        let target = self.access.target(context, &self.runner).await?;
        let ours = match &target.runner {
            Some(runner) => self.ours(context, &runner.name.0, &target).await?,
            None => None,
        };
        let system_id = match &target.runner {
            Some(_) if !self.any_machine => Some(context.system_id()?.as_str().to_owned()),
            Some(_) | None => None,
        };
        let filter = JobFilter {
            status: self.status.clone(),
            system_id: system_id.clone(),
            order_by: self.order_by.clone(),
            sort: self.sort.clone(),
        };
        let (listed, more) = list(&target, &filter, self.limit).await?;
        let mut at_work = BTreeMap::new();
        if ours.is_some() {
            // All of them, whatever was asked for: absence proves something only in a whole list.
            for status in ["running", "canceling"] {
                let filter = JobFilter {
                    status: Some(status.to_owned()),
                    system_id: system_id.clone(),
                    ..JobFilter::default()
                };
                let (jobs, _more) = list(&target, &filter, MOST_AT_WORK).await?;
                at_work.extend(jobs.into_iter().map(|job| (job.id, job)));
            }
        }
        let rows = join(listed, at_work, ours.as_deref(), self.status.is_none() || self.orphans);
        let rows: Vec<Row> =
            rows.into_iter().filter(|row| !self.orphans || row.orphan.is_some()).collect();
        context.output.list(self.json, &rows, |rows| {
            let mut table =
                Table::new(["CI JOB", "PROJECT", "NAME", "AT GITLAB", "ID", "STATE", "ORPHAN"]);
            for row in rows {
                table.row([
                    row.ci_job.to_string(),
                    or_dash(row.project.as_ref()),
                    row.name.clone(),
                    or_dash(row.ci_status.as_ref()),
                    or_dash(row.id.as_ref()),
                    or_dash(row.state),
                    or_dash(row.orphan.map(Orphan::words)),
                ]);
            }
            table
        })?;
        if more {
            context.output.note("GitLab has more; use --limit")?;
        }
        Ok(Exit::Done)
    }

    /// Reads this runner's rows; none if nothing is known here.
    async fn ours(
        &self,
        context: &Context,
        name: &str,
        target: &Target,
    ) -> anyhow::Result<Option<Vec<Job>>> {
        let (store, _config) = match context.attach().await {
            Ok(attached) => attached,
            Err(error) => {
                let why = Chain(error.as_ref()).to_string();
                context.output.note(&format!("GitLab's view only: {why}"))?;
                return Ok(None);
            }
        };
        let filter = Filter { runner: Some(name.to_owned()), ..Filter::default() };
        let url = target.url.as_str().trim_end_matches('/');
        let jobs = store.list(&filter).await?;
        Ok(Some(jobs.into_iter().filter(|job| job.ci_url == url).collect()))
    }
}

async fn list(
    target: &Target,
    filter: &JobFilter,
    most: usize,
) -> anyhow::Result<(Vec<JobSummary>, bool)> {
    let what = format!("list the jobs of the runner #{}", target.id);
    let reply = target.api.jobs(target.id, filter, most).await.with_context(|| what.clone())?;
    let listed = done(&what, reply)?;
    Ok((listed.items, listed.more))
}

/// Puts both views beside each other: GitLab's list in its order, then what only one side has.
fn join(
    listed: Vec<JobSummary>,
    mut at_work: BTreeMap<i64, JobSummary>,
    ours: Option<&[Job]>,
    whole: bool,
) -> Vec<Row> {
    let mut rows_of: BTreeMap<i64, &Job> = BTreeMap::new();
    // Newest first; a GitLab that counts anew after a restore may repeat a number.
    for job in ours.into_iter().flatten() {
        rows_of.entry(job.ci_job.0).or_insert(job);
    }
    let known = ours.is_some();
    let mut rows = Vec::new();
    for job in listed {
        at_work.remove(&job.id);
        rows.push(row(Some(&job), rows_of.remove(&job.id), known));
    }
    if whole {
        for job in at_work.into_values() {
            rows.push(row(Some(&job), rows_of.remove(&job.id), known));
        }
        let left: Vec<&Job> = rows_of.into_values().filter(|job| !job.state.is_over()).collect();
        rows.extend(left.into_iter().map(|job| row(None, Some(job), known)));
    }
    rows
}

fn row(theirs: Option<&JobSummary>, ours: Option<&Job>, known: bool) -> Row {
    let status = theirs.map(JobSummary::ci_status);
    let ended = match &status {
        None | Some(CiStatus::Pending | CiStatus::Running | CiStatus::Canceling) => false,
        Some(CiStatus::Canceled | CiStatus::Failed | CiStatus::Success) => true,
        Some(CiStatus::Other(_)) => false,
    };
    let runs = matches!(status, Some(CiStatus::Running | CiStatus::Canceling));
    let orphan = match (theirs, ours) {
        (Some(_), None) if runs && known => Some(Orphan::UnknownHere),
        (Some(_), Some(job)) if runs && job.state.is_over() => Some(Orphan::OverHere),
        (Some(_), Some(job)) if ended && !job.state.is_over() => Some(Orphan::EndedAtGitlab),
        (None, Some(_)) => Some(Orphan::NotRunningAtGitlab),
        (Some(_), _) | (None, None) => None,
    };
    let project = theirs.and_then(|job| job.project.as_ref()).map(|p| &p.path_with_namespace);
    let name = theirs.map(|job| &job.name).or(ours.map(|job| &job.name));
    Row {
        ci_job: theirs.map(|job| job.id).or(ours.map(|job| job.ci_job.0)).unwrap_or_default(),
        project: project.or(ours.map(|job| &job.project)).cloned(),
        name: name.cloned().unwrap_or_default(),
        ci_status: theirs.map(|job| job.status.clone()),
        id: ours.map(|job| job.id.to_string()),
        state: ours.map(|job| job.state.as_str()),
        orphan,
    }
}
