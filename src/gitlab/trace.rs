//! Appending to a job's trace.

use std::time::Duration;

use bytes::Bytes;
use reqwest::Method;
use reqwest::header::{CONTENT_RANGE, HeaderValue};

use super::error::{Cause, Error};
use super::transport::{Ask, Credential};
use super::{CiStatus, Client, JobAuth};

/// What a patch may be answered with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PatchReply {
    /// 202: appended.
    Accepted {
        /// How long the trace is now, if the server says so.
        end: Option<u64>,
        /// The job's status.
        job_status: Option<CiStatus>,
        /// How often the server wants to hear of it.
        interval: Option<Duration>,
    },
    /// 416: nothing was appended, the trace is of another length.
    Range {
        /// How long it is; 0 if the server does not say.
        end: u64,
        /// The job's status.
        job_status: Option<CiStatus>,
    },
    /// 403, 404, or `Job-Status` says `canceled` or `failed`: the job is no longer ours.
    Ended {
        /// The status.
        status: u16,
        /// The job's status.
        job_status: Option<CiStatus>,
    },
    /// 413: the patch is too long for a proxy in front of GitLab.
    TooLarge,
    /// 408, 429, 5xx: later; it may have been appended all the same, which the next 416 tells.
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

impl Client {
    /// Appends bytes to the trace at an offset, once. There must be some, 1 MiB at most.
    ///
    /// GitLab heeds `debug_trace` in the patch that starts at 0, and only there.
    pub async fn patch_trace(
        &self,
        job: JobAuth<'_>,
        from: u64,
        bytes: Bytes,
        debug_trace: bool,
    ) -> Result<PatchReply, Error> {
        let length = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        let Some(more) = length.checked_sub(1) else {
            return Err(Error::new(Cause::EmptyPatch));
        };
        // The end is the last byte's offset, and there is neither unit nor total.
        let range = format!("{from}-{}", from.saturating_add(more));
        let range = HeaderValue::try_from(range).expect("digits and a dash");
        let path = format!("jobs/{}/trace", job.id);
        let text = HeaderValue::from_static("text/plain");
        let ask = Ask::bytes(Method::PATCH, &path, text, bytes, self.timeouts())
            .query(if debug_trace { "debug_trace=true" } else { "debug_trace=false" })
            .header(CONTENT_RANGE, range)
            .credential(Credential::Job(job.token));
        let answer = self.0.exchange(ask).await?.unless_html()?;
        let job_status = answer.job_status();
        // The header outranks the code.
        if job_status.as_ref().is_some_and(CiStatus::ends_a_running_job) {
            return Ok(PatchReply::Ended { status: answer.status, job_status });
        }
        Ok(match answer.status {
            202 => PatchReply::Accepted {
                end: answer.range_end(),
                job_status,
                interval: answer.interval(),
            },
            416 => PatchReply::Range { end: answer.range_end().unwrap_or(0), job_status },
            status @ (403 | 404) => PatchReply::Ended { status, job_status },
            413 => PatchReply::TooLarge,
            status if answer.is_busy() => {
                PatchReply::Busy { status, retry_after: answer.retry_after(self.now()) }
            }
            status => PatchReply::Unexpected { status, message: answer.message() },
        })
    }
}
