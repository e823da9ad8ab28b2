//! Submitting one job.

use std::sync::Arc;

use bridge_backend::{BackendError, ErrorKind, ExternalId, Fault, JobSpec, Result, SubmitToken};
use reqwest::Method;
use secrecy::ExposeSecret as _;
use serde::Deserialize;
use serde_json::json;

use crate::client::{CallError, with_json};
use crate::dirac::Dirac;
use crate::failure::{AskError, site, transient, unasked};
use crate::options::Wishes;
use crate::workspace::{PackError, Packed, pack_files, pack_workspace};
use crate::{jdl, worker};

/// Linux passes no longer text to a program, be it a word or a variable (32 pages of 4 KiB).
const LONGEST_VARIABLE: usize = 128 << 10;

/// What a job asks for that has no limit: a day of normalised CPU, as DIRAC has it.
const CPU_TIME: u64 = 86_400;

/// The least that DIRAC's queues know.
const LEAST_CPU_TIME: u64 = 100;

/// The answer to a submission.
#[derive(Deserialize)]
struct Accepted {
    #[serde(rename = "JobID")]
    id: u64,
}

impl Dirac {
    pub(crate) async fn submit_one(
        &self,
        token: &SubmitToken,
        spec: &JobSpec,
    ) -> Result<ExternalId> {
        let own = Wishes::of_job(&spec.options)
            .map_err(|text| rejected("use the job's options", text))?;
        check(spec)?;
        let own_words = own != Wishes::default();
        let wishes = own.over(&self.config.wishes);
        let cpu_time = wishes.cpu_time.unwrap_or_else(|| {
            spec.limits.wall_time.map_or(CPU_TIME, |limit| limit.as_secs()).max(LEAST_CPU_TIME)
        });
        let login = self.tokens.token().await;
        let login = login.map_err(|error| unasked("submit the job")(AskError::Token(error)))?;
        let files = worker::files(&self.config, token, &login.claims.preferred_username, spec);
        // Goes with this future, and packing looks here whether anybody still wants it.
        let wanted = Arc::new(());
        let packed = {
            let (workspace, limit) = (spec.workspace.clone(), self.config.max_workspace);
            let wanted = Arc::downgrade(&wanted);
            tokio::task::spawn_blocking(move || -> std::result::Result<_, PackError> {
                let mut packed = vec![pack_files(&files)?];
                packed.extend(pack_workspace(&workspace, limit, &wanted)?);
                Ok(packed)
            })
        };
        let packed: Vec<Packed> = packed
            .await
            .map_err(|error| transient("pack the job's files").with_source(error))?
            .map_err(unpacked)?;
        let mut sandboxes = Vec::new();
        for packed in packed {
            sandboxes.push(self.upload(packed).await?);
        }
        let jdl = jdl::render(&self.config, token, &wishes, cpu_time, &sandboxes)
            .map_err(|error| site("describe the job to DIRAC").with_source(error))?;
        self.hand_over(token, &jdl, own_words).await
    }

    /// Makes the job. From here on it may exist although nobody says so.
    async fn hand_over(
        &self,
        token: &SubmitToken,
        jdl: &str,
        own_words: bool,
    ) -> Result<ExternalId> {
        let body = json!([jdl]);
        let answer = self
            .ask("a submission", || with_json(self.client.ask(Method::POST, "api/jobs/jdl"), &body))
            .await
            .map_err(|error| match &error {
                AskError::Token(_) | AskError::Call(CallError::Unsent { .. }) => {
                    unasked("submit the job")(error)
                }
                AskError::Call(CallError::Unanswered { .. } | CallError::TooLong { .. }) => {
                    ambiguous("hear whether the job was submitted").with_source(error)
                }
            })?;
        match answer.status {
            200..=299 => {
                let accepted: Vec<Accepted> = answer.json().map_err(|error| {
                    ambiguous("understand the answer to the submission").with_source(error)
                })?;
                match accepted.as_slice() {
                    [one] if one.id > 0 => Ok(ExternalId(one.id.to_string())),
                    _ => Err(ambiguous("submit the job for sure: the answer has no job id")),
                }
            }
            // DIRAC's refusals say little, so the whole description goes into the log.
            400 | 422 => {
                tracing::error!(%token, jdl, "DIRAC refused a job's description");
                let fault = if own_words { Fault::Job } else { Fault::Site };
                let kind = ErrorKind::Rejected(fault);
                let context = "submit the job: DIRAC refuses its description (site, platform, \
                               job type, CPU time or VO)";
                Err(BackendError::new(kind, context).with_source(answer.said()))
            }
            403 | 404 => Err(site("submit the job").with_source(answer.said())),
            401 | 408 | 429 => Err(crate::failure::refused("submit the job", &answer)),
            _ => Err(ambiguous("hear whether the job was submitted").with_source(answer.said())),
        }
    }
}

fn ambiguous(context: &'static str) -> BackendError {
    BackendError::new(ErrorKind::Ambiguous, context)
}

fn rejected(context: &'static str, text: String) -> BackendError {
    BackendError::new(ErrorKind::Rejected(Fault::Job), context).with_source(text)
}

/// Says whose move it is when something could not be packed.
fn unpacked(error: PackError) -> BackendError {
    let kind = match &error {
        PackError::TooLarge { .. } => ErrorKind::Rejected(Fault::Job),
        PackError::Io { .. } | PackError::Write(_) | PackError::Unwanted => ErrorKind::Transient,
    };
    BackendError::new(kind, "pack the job's files").with_source(error)
}

/// Refuses what no shell could be given.
fn check(spec: &JobSpec) -> Result<()> {
    for variable in &spec.env {
        let name = &variable.name;
        let head = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
        if !head || !name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
            let text = format!("{name:?} is no name for a variable");
            return Err(rejected("pass the job's variables", text));
        }
        let value = variable.value.expose_secret();
        if value.contains('\0') {
            let text = format!("the value of {name} contains a zero byte");
            return Err(rejected("pass the job's variables", text));
        }
        if name.len() + value.len() + 2 > LONGEST_VARIABLE {
            let text =
                format!("{name} is longer than the {LONGEST_VARIABLE} bytes a program can get");
            return Err(rejected("pass the job's variables", text));
        }
    }
    if spec.script.contains('\0') {
        return Err(rejected("run the job's script", "it contains a zero byte".into()));
    }
    Ok(())
}
