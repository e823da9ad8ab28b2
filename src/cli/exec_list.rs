//! `bridge exec --list`: the pipeline as it would run, without running it.

use serde_json::{Value, json};

use crate::cli::output::{Output, OutputError, Table};
use crate::pipeline::{AllowFailure, Job, Pipeline, When};

/// Writes jobs and what they wait for, then those that are left out with the reason.
pub(super) fn list(pipeline: &Pipeline, json: bool, output: &Output) -> Result<(), OutputError> {
    if json {
        for object in objects(pipeline) {
            output.json(&object)?;
        }
        return Ok(());
    }
    let mut table = Table::new(["STAGE", "JOB", "WHEN", "NEEDS", "NOTE"]);
    for job in &pipeline.jobs {
        table.row([
            job.stage.clone(),
            job.name.clone(),
            when(job.when).to_owned(),
            needs(job),
            note(job),
        ]);
    }
    for left in &pipeline.left_out {
        table.row([
            left.stage.clone(),
            left.name.clone(),
            "never".to_owned(),
            String::new(),
            left.why.clone(),
        ]);
    }
    output.table(&table)
}

fn objects(pipeline: &Pipeline) -> Vec<Value> {
    let jobs = pipeline.jobs.iter().map(|job| {
        json!({
            "job": job.name,
            "stage": job.stage,
            "when": when(job.when),
            "needs": job.needs.as_ref().map(|needs| {
                needs.iter().map(|need| need.job.clone()).collect::<Vec<_>>()
            }),
            "dependencies": job.dependencies,
            "allow_failure": match &job.allow_failure {
                AllowFailure::Never => json!(false),
                AllowFailure::Always => json!(true),
                AllowFailure::ExitCodes(codes) => json!({ "exit_codes": codes }),
            },
            "file": job.file,
            "line": job.line,
            "in_pipeline": true,
        })
    });
    let left_out = pipeline.left_out.iter().map(|left| {
        json!({
            "job": left.name,
            "stage": left.stage,
            "why": left.why,
            "in_pipeline": false,
        })
    });
    jobs.chain(left_out).collect()
}

fn when(when: When) -> &'static str {
    match when {
        When::OnSuccess => "on_success",
        When::OnFailure => "on_failure",
        When::Always => "always",
        When::Manual => "manual",
    }
}

fn needs(job: &Job) -> String {
    match &job.needs {
        None => "earlier stages".to_owned(),
        Some(needs) if needs.is_empty() => "nothing".to_owned(),
        Some(needs) => needs.iter().map(|need| need.job.as_str()).collect::<Vec<_>>().join(", "),
    }
}

fn note(job: &Job) -> String {
    match &job.allow_failure {
        AllowFailure::Never if job.when == When::Manual => "blocks until run".to_owned(),
        AllowFailure::Never => String::new(),
        AllowFailure::Always => "may fail".to_owned(),
        AllowFailure::ExitCodes(codes) => {
            let codes: Vec<String> = codes.iter().map(ToString::to_string).collect();
            format!("may fail with {}", codes.join(", "))
        }
    }
}
