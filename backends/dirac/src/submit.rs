//! Submitting one job: its files on its own, then its description together with others.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use bridge_backend::{BackendError, ErrorKind, ExternalId, Fault, JobSpec, Result, SubmitToken};
use jiff::{SignedDuration, Timestamp};
use reqwest::Method;
use serde::Deserialize;
use serde_json::json;

use crate::client::{CallError, with_json};
use crate::dirac::Dirac;
use crate::failure::{AskError, refused, site, transient, unasked};
use crate::jdl;
use crate::options::Wishes;
use crate::outbox::{Letter, Post, Posted};
use crate::worker::{self, Ends};
use crate::workspace::{PackError, Packed, pack_files, pack_workspace};

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
        spec.check()?;
        let own_words = own != Wishes::default();
        let wishes = own.over(&self.config.wishes);
        let cpu_time = wishes.cpu_time.unwrap_or_else(|| {
            spec.limits.wall_time.map_or(CPU_TIME, |limit| limit.as_secs()).max(LEAST_CPU_TIME)
        });
        let called = Instant::now();
        let login = self.tokens.token().await;
        let login = login.map_err(|error| unasked("submit the job")(AskError::Token(error)))?;
        let ends = match spec.limits.expiry {
            Some(expiry) => {
                self.server_time_at(called).await?.map(|called| Ends::of(expiry, called))
            }
            None => None,
        };
        let owner = &login.claims.preferred_username;
        let files = worker::files(&self.config, token, owner, spec, ends);
        // Many may wait for an answer, few at a time pack and send.
        let room = self.room.acquire().await;
        let room = room.map_err(|error| transient("pack the job's files").with_source(error))?;
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
        let sandboxes = self.upload_all(packed).await?;
        let jdl = jdl::render(&self.config, token, &wishes, cpu_time, &sandboxes)
            .map_err(|error| site("describe the job to DIRAC").with_source(error))?;
        drop(room);
        let letter = Letter { token: token.clone(), description: jdl, own_words };
        self.outbox.submit(letter, self).await
    }

    /// Gives what the server's clock showed at a moment, if it tells; ours, and the workers', may be off.
    async fn server_time_at(&self, moment: Instant) -> Result<Option<Timestamp>> {
        let context = "learn the time from the DiracX server";
        if self.client.server_time().is_none() {
            let question = || self.client.ask(Method::GET, "api/auth/userinfo");
            self.ask("its time", question).await.map_err(unasked(context))?;
        }
        let since = SignedDuration::try_from(moment.elapsed()).unwrap_or(SignedDuration::ZERO);
        Ok(self.client.server_time().and_then(|now| now.checked_sub(since).ok()))
    }

    /// Puts sandboxes into the store, the same one only once at a time.
    async fn upload_all(&self, packed: Vec<Packed>) -> Result<Vec<String>> {
        let mut names = Vec::new();
        for packed in packed {
            let same = self.uploads.of(&packed.checksum);
            let _alone = same.lock().await;
            // The store is asked after the other upload of the same content, and has it then.
            names.push(self.upload(packed).await?);
        }
        Ok(names)
    }
}

impl Post for Dirac {
    /// Makes jobs. From here on they may exist although nobody says so.
    async fn post(&self, descriptions: &[String], sent: &AtomicBool) -> Posted {
        let body = json!(descriptions);
        let make = || {
            sent.store(true, Ordering::Release);
            with_json(self.client.ask_anew(Method::POST, "api/jobs/jdl"), &body)
        };
        let answer = match self.ask("a submission", make).await {
            Ok(answer) => answer,
            Err(error) => {
                return Posted::Failed(match &error {
                    AskError::Token(_)
                    | AskError::Call(CallError::Unsent { .. } | CallError::Untrusted { .. }) => {
                        unasked("submit the job")(error)
                    }
                    AskError::Call(CallError::Unanswered { .. } | CallError::TooLong { .. }) => {
                        ambiguous("hear whether the job was submitted").with_source(error)
                    }
                });
            }
        };
        match answer.status {
            200..=299 => match answer.json::<Vec<Accepted>>() {
                Ok(accepted) => Posted::Made(accepted.into_iter().map(|job| job.id).collect()),
                Err(error) => Posted::Failed(
                    ambiguous("understand the answer to the submission").with_source(error),
                ),
            },
            400 | 422 => Posted::Refused(answer.said()),
            403 | 404 => Posted::Failed(site("submit the job").with_source(answer.said())),
            401 | 408 | 429 => Posted::Failed(refused("submit the job", &answer)),
            _ => Posted::Failed(
                ambiguous("hear whether the job was submitted").with_source(answer.said()),
            ),
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
