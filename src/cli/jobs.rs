//! `bridge jobs`: what the database knows of jobs, with the daemon running or stopped.

use std::time::Duration;

use anyhow::Context as _;
use clap::{Args, Subcommand};
use jiff::Timestamp;
use serde_json::{Map, Value, json};

use crate::cli::Context;
use crate::cli::exit::{Exit, Failure};
use crate::cli::output::{Output, Table, or_dash};
use crate::domain::clock::{Clock as _, SystemClock};
use crate::domain::id::{CiJobId, JobId};
use crate::domain::job::JobState;
use crate::domain::policy;
use crate::store::{Filter, Job, Store};
use crate::trace::strip_headers;

/// How often `-f` looks for more.
const FOLLOW: Duration = Duration::from_millis(300);

/// List, show, follow and cancel jobs
#[derive(Debug, Args)]
pub struct JobsArgs {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// List jobs, newest first
    List(ListArgs),
    /// Show everything about one job but its secrets, with its history
    Show(OneArgs),
    /// Print a job's trace as GitLab has it
    Trace(TraceArgs),
    /// Ask for a job's end; the daemon sees to it
    Cancel(CancelArgs),
}

#[derive(Debug, Args)]
struct ListArgs {
    /// Only jobs in this state (repeatable)
    #[arg(long, value_name = "STATE")]
    state: Vec<JobState>,
    /// Only jobs that are still owed work
    #[arg(long)]
    owed: bool,
    /// Only jobs of this runner
    #[arg(long, value_name = "NAME")]
    runner: Option<String>,
    /// Only jobs on this backend
    #[arg(long, value_name = "NAME")]
    backend: Option<String>,
    /// Only jobs whose project's path contains this
    #[arg(long, value_name = "TEXT")]
    project: Option<String>,
    /// Only jobs received within this time ("2h", "3 days") or since this timestamp
    #[arg(long, value_name = "TIME")]
    since: Option<String>,
    /// At most this many
    #[arg(long, value_name = "N", default_value_t = 200)]
    limit: u32,
    /// One JSON object per line
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct OneArgs {
    /// The job: our id, or GitLab's number
    id: String,
    /// One JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct CancelArgs {
    /// The job: our id, or GitLab's number
    id: String,
}

#[derive(Debug, Args)]
struct TraceArgs {
    /// The job: our id, or GitLab's number
    id: String,
    /// Go on until the job is over
    #[arg(short, long)]
    follow: bool,
    /// Print the bytes as GitLab has them, timestamps included
    #[arg(long)]
    raw: bool,
}

impl JobsArgs {
    /// Runs the command.
    ///
    /// # Errors
    ///
    /// When the configuration or the database cannot be read.
    pub async fn run(self, context: &Context) -> anyhow::Result<Exit> {
        let (store, config) = context.attach().await?;
        let output = &context.output;
        match self.command {
            Command::List(args) => list(&store, output, args).await,
            Command::Show(args) => show(&store, output, &args).await,
            Command::Trace(args) => trace(&store, output, &config.state_dir, &args).await,
            Command::Cancel(args) => cancel(&store, output, &args.id).await,
        }
    }
}

/// Reads "2h", "3 days" or a timestamp.
fn parse_since(text: &str, now: Timestamp) -> anyhow::Result<Timestamp> {
    if let Ok(at) = text.parse::<Timestamp>() {
        return Ok(at);
    }
    let span: jiff::Span = text.parse().map_err(|error: jiff::Error| {
        let what = format!("read {text:?} as a time span such as 2h or as a timestamp");
        Failure::new(Exit::Usage, what).source(error)
    })?;
    let hours = span.total((jiff::Unit::Second, jiff::SpanRelativeTo::days_are_24_hours()))?;
    let duration = Duration::try_from_secs_f64(hours.abs())?;
    Ok(now.checked_sub(duration)?)
}

/// Finds the one job that an operator means.
async fn find(store: &Store, text: &str) -> anyhow::Result<Job> {
    look_up(store, text).await?.ok_or_else(|| {
        let hint = "`bridge jobs list` shows the jobs there are";
        Failure::new(Exit::NotFound, format!("find a job {text}")).hint(hint).into()
    })
}

async fn look_up(store: &Store, text: &str) -> anyhow::Result<Option<Job>> {
    if let Ok(id) = text.to_ascii_uppercase().parse::<JobId>() {
        return Ok(store.job(id).await?);
    }
    let Ok(number) = text.trim_start_matches('#').parse::<i64>() else {
        let what = format!(
            "find a job by {text:?}, which is neither an id of ours nor a number of GitLab's"
        );
        return Err(Failure::new(Exit::Usage, what).into());
    };
    let mut found = store.by_ci_job(CiJobId(number)).await?;
    if found.len() > 1 {
        let ids: Vec<String> = found.iter().map(|j| format!("{} ({})", j.id, j.ci_url)).collect();
        let what = format!("tell which job {number} is meant, since several GitLabs have one");
        let hint = format!("name one of {}", ids.join(", "));
        return Err(Failure::new(Exit::Usage, what).hint(hint).into());
    }
    Ok(found.pop())
}

/// Tells how a job stands in a few words.
fn in_words(job: &Job) -> String {
    if let Some(verdict) = &job.verdict {
        return match (&verdict.failure, &verdict.explanation) {
            (None, _) => "success".into(),
            (Some(reason), Some(why)) => format!("{}: {why}", reason.as_str()),
            (Some(reason), None) => reason.as_str().into(),
        };
    }
    if job.cancel_requested_at.is_some() {
        return "being cancelled".into();
    }
    job.waits_for.clone().unwrap_or_default()
}

fn age(now: Timestamp, then: Timestamp) -> String {
    let secs = policy::since(now, then).as_secs();
    match secs {
        0..=119 => format!("{secs}s"),
        120..=7199 => format!("{}m", secs / 60),
        7200..=172_799 => format!("{}h", secs / 3600),
        _ => format!("{}d", secs / 86_400),
    }
}

async fn list(store: &Store, output: &Output, args: ListArgs) -> anyhow::Result<Exit> {
    let now = SystemClock.now();
    let since = args.since.as_deref().map(|text| parse_since(text, now)).transpose()?;
    let filter = Filter {
        states: args.state,
        owed: args.owed,
        runner: args.runner,
        backend: args.backend,
        project: args.project,
        since,
        limit: Some(i64::from(args.limit)),
    };
    let jobs = store.list(&filter).await?;
    if args.json {
        for job in &jobs {
            output.json(&as_json(job))?;
        }
        return Ok(Exit::Done);
    }
    let mut table = Table::new([
        "ID",
        "CI JOB",
        "PROJECT",
        "NAME",
        "STATE",
        "BACKEND",
        "EXTERNAL ID",
        "AGE",
        "NOTE",
    ]);
    for job in &jobs {
        table.row([
            job.id.to_string(),
            job.ci_job.to_string(),
            job.project.clone(),
            job.name.clone(),
            job.state.to_string(),
            job.backend.to_string(),
            or_dash(job.external_id.as_ref()),
            age(now, job.received_at),
            in_words(job),
        ]);
    }
    output.table(&table)?;
    Ok(Exit::Done)
}

/// Gives a row's columns; keys are the columns' names.
fn as_json(job: &Job) -> Map<String, Value> {
    let time = |at: Option<Timestamp>| at.map_or(Value::Null, |at| json!(at.to_string()));
    let value = json!({
        "id": job.id.to_string(),
        "runner": job.runner,
        "ci_url": job.ci_url,
        "ci_job": job.ci_job,
        "ci_pipeline": job.ci_pipeline,
        "project_id": job.project_id,
        "project": job.project,
        "name": job.name,
        "backend": job.backend,
        "state": job.state,
        "submit_token": job.submit_token,
        "external_id": job.external_id,
        "outcome": job.outcome,
        "verdict": job.verdict,
        "received_at": time(Some(job.received_at)),
        "deadline_at": time(Some(job.deadline_at)),
        "state_at": time(Some(job.state_at)),
        "attempted_at": time(job.attempted_at),
        "submitted_at": time(job.submitted_at),
        "started_at": time(job.started_at),
        "ended_at": time(job.ended_at),
        "observed_at": time(job.observed_at),
        "missing_since": time(job.missing_since),
        "ci_confirmed_at": time(job.ci_confirmed_at),
        "cancel_requested_at": time(job.cancel_requested_at),
        "cancel_requested_by": job.cancel_requested_by,
        "cancel_sent_at": time(job.cancel_sent_at),
        "released_at": time(job.released_at),
        "host": job.host,
        "waits_for": job.waits_for,
        "log_offset": job.log_offset,
        "log_ended": job.log_ended,
        "trace_len": job.trace_len,
        "trace_sent": job.trace_sent,
        "trace_hole": job.trace_hole,
        "slot": job.slot,
        "project_slot": job.project_slot,
        "workspace": job.workspace,
        "due_at": time(Some(job.due_at)),
        "failures": job.failures,
    });
    match value {
        Value::Object(mut map) => {
            map.insert("doubted_at".into(), time(job.doubted_at));
            map.insert("cached_at".into(), time(job.cached_at));
            map.insert("brought_at".into(), time(job.brought_at));
            map
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_) => {
            Map::new()
        }
    }
}

async fn show(store: &Store, output: &Output, args: &OneArgs) -> anyhow::Result<Exit> {
    let job = find(store, &args.id).await?;
    let events = store.events(job.id).await?;
    let mut map = as_json(&job);
    if args.json {
        map.insert("events".into(), serde_json::to_value(&events)?);
        output.json(&map)?;
        return Ok(Exit::Done);
    }
    let mut table = Table::new(["FIELD", "VALUE"]);
    for (key, value) in map.into_iter().filter(|(_, value)| !value.is_null()) {
        let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        table.row([key, text]);
    }
    output.table(&table)?;
    output.line("")?;
    let mut table = Table::new(["AT", "ACTOR", "EVENT", "DETAIL"]);
    for event in events {
        table.row([event.at.to_string(), event.actor, event.event, or_dash(event.detail)]);
    }
    output.table(&table)?;
    Ok(Exit::Done)
}

async fn trace(
    store: &Store,
    output: &Output,
    state_dir: &camino::Utf8Path,
    args: &TraceArgs,
) -> anyhow::Result<Exit> {
    let mut job = find(store, &args.id).await?;
    let path = state_dir.join("spool").join(format!("{}.trace", job.id));
    let mut shown = 0_u64;
    let mut pending: Vec<u8> = Vec::new();
    loop {
        if job.trace_len > shown {
            // Only what the row vouches for: bytes beyond it may be taken back.
            let bytes = read_range(&path, shown, job.trace_len)
                .with_context(|| format!("read the spool {path}"))?;
            shown = job.trace_len;
            if args.raw {
                output.bytes(&bytes)?;
            } else {
                pending.extend_from_slice(&bytes);
                let whole = pending.iter().rposition(|b| *b == b'\n').map_or(0, |at| at + 1);
                let lines: Vec<u8> = pending.drain(..whole).collect();
                output.bytes(&strip_headers(&lines))?;
            }
        }
        let done = job.verdict.is_some() || job.state.is_over();
        if !args.follow || done {
            output.bytes(&strip_headers(&pending))?;
            return Ok(Exit::Done);
        }
        tokio::time::sleep(FOLLOW).await;
        job = store.job(job.id).await?.context("go on with a job that was removed meanwhile")?;
    }
}

fn read_range(path: &camino::Utf8Path, from: u64, to: u64) -> std::io::Result<Vec<u8>> {
    use std::io::{Read as _, Seek as _};
    let mut file = std::fs::File::open(path)?;
    file.seek(std::io::SeekFrom::Start(from))?;
    let mut bytes = Vec::new();
    file.take(to - from).read_to_end(&mut bytes)?;
    Ok(bytes)
}

async fn cancel(store: &Store, output: &Output, id: &str) -> anyhow::Result<Exit> {
    let job = find(store, id).await?;
    if store.request_cancel(job.id, SystemClock.now()).await? {
        output.note(&format!("job {} will be cancelled by the daemon", job.id))?;
    } else {
        output.note(&format!("job {} is {} and needs no cancelling", job.id, job.state))?;
    }
    Ok(Exit::Done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn since_takes_spans_and_timestamps() {
        let now: Timestamp = "2026-01-02T03:04:05Z".parse().unwrap();
        let since = |text: &str| parse_since(text, now).map(|at| at.to_string());
        assert_eq!(since("2h").unwrap(), "2026-01-02T01:04:05Z");
        assert_eq!(since("1 day").unwrap(), "2026-01-01T03:04:05Z");
        assert_eq!(since("2026-01-01T00:00:00Z").unwrap(), "2026-01-01T00:00:00Z");
        assert!(since("yesterday-ish").is_err());
    }
}
