//! Receiving jobs and reporting their state.

use std::time::Duration;

use reqwest::Method;
use serde::Serialize;
use serde::de::{DeserializeSeed, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::answer::Answer;
use super::error::{Error, json_fault};
use super::info::Info;
use super::transport::{Ask, Credential};
use super::wire::{JobPayload, Secret};
use super::{CiStatus, Client, JobAuth};

/// Far above any real job, far below what would hurt the submit node.
const JOB_LIMIT: usize = 64 << 20;

/// How much of an undecodable answer is worth keeping.
const UNDECODABLE_LIMIT: usize = 1 << 20;

/// What `jobs/request` may answer.
#[derive(Debug)]
pub enum RequestReply {
    /// A job is ours.
    Job(Box<ReceivedJob>),
    /// A job is ours, but its description cannot be read.
    Undecodable(Box<Undecodable>),
    /// There is no job.
    NoJob {
        /// What to send with the next request; absent means that the old value stays.
        last_update: Option<String>,
    },
    /// 403: the runner's token is not known.
    Refused,
    /// 409: GitLab got into its own way; there may be jobs.
    Conflict,
    /// 413: what we sent is too long.
    TooLarge,
    /// 422: the runner's owner is gone.
    Orphaned,
    /// 400: GitLab did not understand us.
    BadRequest,
    /// 408, 429, 5xx: later. A job may have been given away all the same.
    Busy {
        /// The status.
        status: u16,
        /// When the server wants to be asked again.
        retry_after: Option<Duration>,
    },
    /// Any other status.
    Unexpected {
        /// The status.
        status: u16,
    },
}

/// A job as it arrived.
#[derive(Debug)]
pub struct ReceivedJob {
    /// What it says.
    pub payload: JobPayload,
    /// The text it was read from, to be stored before anything else is done.
    pub raw: Secret,
    /// GitLab's id of the call.
    pub request_id: String,
}

/// A 201 that could not be read as a job: what of it there is.
#[derive(Debug)]
pub struct Undecodable {
    /// What arrived, at most 1 MiB.
    pub raw: Secret,
    /// The job's number, if that much could be read.
    pub id: Option<i64>,
    /// The job token, if that much could be read; with both the job can be failed.
    pub token: Option<Secret>,
    /// Why it cannot be read; quotes nothing.
    pub error: String,
    /// GitLab's id of the call.
    pub request_id: String,
}

/// What a job is reported to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UpdateState {
    /// It goes on.
    Running,
    /// It ended well.
    Success,
    /// It ended badly.
    Failed {
        /// GitLab's word for why; must be one that the server listed.
        reason: String,
        /// The script's exit code; 0 is not sent.
        exit_code: Option<i32>,
    },
}

/// A report on a job.
#[derive(Clone, Debug)]
pub struct JobUpdate {
    /// What it is.
    pub state: UpdateState,
    /// CRC-32 and length of the whole trace so far.
    pub output: Option<(u32, u64)>,
    /// Who we are.
    pub info: Info,
}

/// What a report may be answered with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UpdateReply {
    /// 200: noted; if it was a final report, the job is done.
    Accepted {
        /// The job's status; after a final `failed` it says `failed`, which is no contradiction.
        job_status: Option<CiStatus>,
    },
    /// 202: the trace is not in order yet; the same report must be repeated.
    NotYet {
        /// The job's status.
        job_status: Option<CiStatus>,
        /// After how long.
        interval: Option<Duration>,
    },
    /// 412: the trace must be sent again from its beginning; only old servers say so.
    Rewind,
    /// 403, 404, or `Job-Status` says `canceled` or `failed` of a job reported as running: it is no
    /// longer ours.
    Ended {
        /// The status.
        status: u16,
        /// The job's status; after a lost answer to a final report it shows that report's effect.
        job_status: Option<CiStatus>,
    },
    /// 409: later; only servers 18.5 to 18.7 say so.
    Conflict,
    /// 408, 429, 5xx: later; it may have been noted all the same.
    Busy {
        /// The status.
        status: u16,
        /// When the server wants to be asked again.
        retry_after: Option<Duration>,
    },
    /// Any other status.
    Unexpected {
        /// The status.
        status: u16,
        /// GitLab's words.
        message: String,
    },
}

#[derive(Serialize)]
struct RequestBody<'a> {
    token: &'a str,
    system_id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    last_update: Option<&'a str>,
    info: &'a RawValue,
}

#[derive(Serialize)]
struct UpdateBody<'a> {
    token: &'a str,
    info: &'a RawValue,
    state: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    failure_reason: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    exit_code: Option<i32>,
    output: OutputBody<'a>,
    // Servers before `output` read it here.
    #[serde(skip_serializing_if = "Option::is_none")]
    checksum: Option<&'a str>,
}

#[derive(Serialize)]
struct OutputBody<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    checksum: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bytesize: Option<u64>,
}

impl Client {
    /// Asks for a job, once. Must not be dropped before it ends: a job may be on its way.
    pub async fn request_job(
        &self,
        token: &Secret,
        system_id: &str,
        info: &Info,
        last_update: Option<&str>,
    ) -> Result<RequestReply, Error> {
        let timeouts = self.timeouts();
        let last_update = last_update.filter(|value| !value.is_empty());
        let body = RequestBody { token: token.expose(), system_id, last_update, info: info.raw() };
        let ask = Ask::json(Method::POST, "jobs/request", &body, timeouts)?
            .credential(Credential::Runner(token))
            .accept_json()
            .patience(timeouts.request_head, timeouts.request_total)
            .limit(JOB_LIMIT);
        let answer = self.0.exchange(ask).await?;
        // Before anything else: whatever a 201 looks like, it may be a job.
        if answer.status == 201 {
            return Ok(received(answer));
        }
        let answer = answer.unless_html()?;
        Ok(match answer.status {
            204 => RequestReply::NoJob { last_update: answer.last_update() },
            400 => RequestReply::BadRequest,
            403 => RequestReply::Refused,
            409 => RequestReply::Conflict,
            413 => RequestReply::TooLarge,
            422 => RequestReply::Orphaned,
            status if answer.is_busy() => {
                RequestReply::Busy { status, retry_after: answer.retry_after(self.now()) }
            }
            status => RequestReply::Unexpected { status },
        })
    }

    /// Reports on a job, once.
    pub async fn update_job(
        &self,
        job: JobAuth<'_>,
        update: &JobUpdate,
    ) -> Result<UpdateReply, Error> {
        let checksum = update.output.map(|(crc, _)| format!("crc32:{crc:08x}"));
        let checksum = checksum.as_deref();
        let (state, failure_reason, exit_code) = match &update.state {
            UpdateState::Running => ("running", None, None),
            UpdateState::Success => ("success", None, None),
            UpdateState::Failed { reason, exit_code } => {
                ("failed", Some(reason.as_str()), exit_code.filter(|code| *code != 0))
            }
        };
        let body = UpdateBody {
            token: job.token.expose(),
            info: update.info.raw(),
            state,
            failure_reason,
            exit_code,
            output: OutputBody { checksum, bytesize: update.output.map(|(_, size)| size) },
            checksum,
        };
        let path = format!("jobs/{}", job.id);
        let ask = Ask::json(Method::PUT, &path, &body, self.timeouts())?
            .credential(Credential::Job(job.token));
        let answer = self.0.exchange(ask).await?.unless_html()?;
        let job_status = answer.job_status();
        // The header outranks the code, except in the answer to a final report, where it tells
        // that very report.
        if update.state == UpdateState::Running
            && job_status.as_ref().is_some_and(CiStatus::ends_a_running_job)
        {
            return Ok(UpdateReply::Ended { status: answer.status, job_status });
        }
        Ok(match answer.status {
            200 => UpdateReply::Accepted { job_status },
            202 => UpdateReply::NotYet { job_status, interval: answer.interval() },
            status @ (403 | 404) => UpdateReply::Ended { status, job_status },
            409 => UpdateReply::Conflict,
            412 => UpdateReply::Rewind,
            status if answer.is_busy() => {
                UpdateReply::Busy { status, retry_after: answer.retry_after(self.now()) }
            }
            status => UpdateReply::Unexpected { status, message: answer.message() },
        })
    }
}

/// Makes the most of a 201.
fn received(answer: Answer) -> RequestReply {
    let html = answer.is_html();
    let Answer { call, body, fault, .. } = answer;
    let request_id = call.request_id;
    // As Go does, so that one broken variable does not cost the job.
    let mut text = match String::from_utf8(body) {
        Ok(text) => text,
        Err(error) => String::from_utf8_lossy(error.as_bytes()).into_owned(),
    };
    let error = match serde_json::from_str::<JobPayload>(&text) {
        // Even if the connection broke afterwards: the text is whole.
        Ok(payload) if payload.id > 0 && !payload.token.expose().is_empty() => {
            let raw = Secret::new(text);
            return RequestReply::Job(Box::new(ReceivedJob { payload, raw, request_id }));
        }
        Ok(_nameless) => "the job has no number or no token".to_owned(),
        Err(unreadable) => match fault {
            Some(fault) => fault.to_string(),
            None if html => {
                "answered 201 with HTML, is there a proxy or login page in front?".to_owned()
            }
            None => format!("the job {}", json_fault(&unreadable)),
        },
    };
    let found = Found::fish(&text);
    text.truncate(text.floor_char_boundary(UNDECODABLE_LIMIT));
    RequestReply::Undecodable(Box::new(Undecodable {
        raw: Secret::new(text),
        id: found.id,
        token: found.token,
        error,
        request_id,
    }))
}

/// What can be read of a job whose text is broken off or oddly typed: GitLab writes number and
/// token first.
#[derive(Default)]
struct Found {
    id: Option<i64>,
    token: Option<Secret>,
}

impl Found {
    fn fish(text: &str) -> Self {
        let mut found = Self::default();
        let mut reader = serde_json::Deserializer::from_str(text);
        if let Err(error) = DeserializeSeed::deserialize(&mut found, &mut reader) {
            tracing::debug!(fault = json_fault(&error), "a broken job was read this far");
        }
        found
    }
}

impl<'de> DeserializeSeed<'de> for &mut Found {
    type Value = ();
    fn deserialize<D: serde::Deserializer<'de>>(self, reader: D) -> Result<(), D::Error> {
        reader.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for &mut Found {
    type Value = ();
    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object")
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        // A number at the very end may be half a number: it counts when something follows.
        let mut id = None;
        loop {
            let key = map.next_key::<String>()?;
            self.id = self.id.or(id);
            let Some(key) = key else { break };
            match key.as_str() {
                "id" => {
                    let value: serde_json::Value = map.next_value()?;
                    let number = value.as_i64().or_else(|| value.as_str()?.parse().ok());
                    id = number.filter(|id| *id > 0);
                }
                "token" => {
                    let token: serde_json::Value = map.next_value()?;
                    let token = token.as_str().filter(|token| !token.is_empty());
                    self.token = token.map(Secret::new);
                }
                _ => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok(())
    }
}
