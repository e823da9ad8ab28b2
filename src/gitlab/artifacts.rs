//! Artifacts of jobs: uploading and downloading them.
//!
//! One call is one attempt. What is uploaded is a file that stays until GitLab has it, since GitLab
//! takes the same bytes twice and refuses others under the same type.

use std::time::Duration;

use camino::Utf8Path;

use super::answer::Answer;
use super::error::{Cause, Error};
use super::stream::{FetchFile, PartialFile, SendFile};
use super::transport::Credential;
use super::{CiStatus, Client, JobAuth};

/// A file to be uploaded as an artifact.
#[derive(Clone, Copy, Debug)]
pub struct ArtifactUpload<'a> {
    /// The packed file.
    pub file: &'a Utf8Path,
    /// What it is to be called.
    pub file_name: &'a str,
    /// `zip`, `gzip`, `raw`; not sent when empty.
    pub format: &'a str,
    /// `archive`, `junit`, …; not sent when empty.
    pub artifact_type: &'a str,
    /// When it may be deleted, in the author's words; not sent when empty.
    pub expire_in: &'a str,
}

/// The answer to an upload, and what the job's trace tells of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UploadAnswer {
    /// What it means.
    pub reply: UploadArtifactReply,
    /// The status.
    pub status: u16,
    /// GitLab's id of the call.
    pub request_id: String,
}

/// What an upload may be answered with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UploadArtifactReply {
    /// 201: stored, now or by an earlier attempt.
    Stored,
    /// 400: there is another one of the type already, or its content makes no sense.
    Refused {
        /// GitLab's words.
        message: String,
    },
    /// 401, 403: the job has ended, or the token is no longer good.
    Forbidden {
        /// The job's status.
        job_status: Option<CiStatus>,
        /// GitLab's words.
        message: String,
    },
    /// 405: the instance keeps no artifacts.
    SwitchedOff,
    /// 413: larger than it may be.
    TooLarge,
    /// 503: where artifacts are kept is out of order.
    Unavailable {
        /// When the server wants to be asked again.
        retry_after: Option<Duration>,
    },
    /// 408, 429, other 5xx: later.
    Busy {
        /// When the server wants to be asked again.
        retry_after: Option<Duration>,
    },
    /// Any other status.
    Unexpected {
        /// GitLab's words.
        message: String,
    },
}

/// The answer to a download, and what the job's trace tells of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DownloadAnswer {
    /// What it means.
    pub reply: DownloadArtifactReply,
    /// The status.
    pub status: u16,
    /// GitLab's id of the call.
    pub request_id: String,
}

/// What a download may be answered with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DownloadArtifactReply {
    /// 200, 206: the file is there as a whole.
    Whole {
        /// Its length.
        bytes: u64,
    },
    /// 401, 403: this job may not read that one's artifacts.
    Forbidden {
        /// GitLab's words.
        message: String,
    },
    /// 404: never there, expired or deleted.
    Missing,
    /// 408, 429, 5xx: later.
    Busy {
        /// When the server wants to be asked again.
        retry_after: Option<Duration>,
    },
    /// Any other status, or anything but the file from where GitLab sent us.
    Unexpected {
        /// The words of whoever answered.
        message: String,
    },
}

impl Client {
    /// Uploads an artifact, once. A redirect is followed with the whole file; away from the
    /// configured server without the token.
    pub async fn upload_artifact(
        &self,
        job: JobAuth<'_>,
        artifact: &ArtifactUpload<'_>,
    ) -> Result<UploadAnswer, Error> {
        let path = format!("jobs/{}/artifacts", job.id);
        let ask = SendFile {
            path: &path,
            query: query(artifact),
            credential: Credential::Job(job.token),
            file: artifact.file,
            name: artifact.file_name,
        };
        let answer = self.0.send_file(ask).await?.unless_html()?;
        let reply = match answer.status {
            201 => UploadArtifactReply::Stored,
            400 => UploadArtifactReply::Refused { message: answer.message() },
            401 | 403 => UploadArtifactReply::Forbidden {
                job_status: answer.job_status(),
                message: answer.message(),
            },
            405 => UploadArtifactReply::SwitchedOff,
            413 => UploadArtifactReply::TooLarge,
            503 => UploadArtifactReply::Unavailable { retry_after: answer.retry_after(self.now()) },
            _ if answer.is_busy() => {
                UploadArtifactReply::Busy { retry_after: answer.retry_after(self.now()) }
            }
            _ => UploadArtifactReply::Unexpected { message: answer.message() },
        };
        let Answer { status, call, .. } = answer;
        Ok(UploadAnswer { reply, status, request_id: call.request_id })
    }

    /// Downloads the archive of a job, once. `direct` lets GitLab send us to where it keeps files;
    /// no token goes there. After an error the file may hold a part; the next attempt asks for the
    /// rest if the server can give that.
    pub async fn download_artifact(
        &self,
        job: JobAuth<'_>,
        direct: bool,
        limit: u64,
        into: &mut PartialFile,
    ) -> Result<DownloadAnswer, Error> {
        let path = format!("jobs/{}/artifacts", job.id);
        let ask = FetchFile {
            path: &path,
            query: direct.then_some("direct_download=true"),
            credential: Credential::Job(job.token),
            limit,
        };
        let fetched = self.0.fetch_file(ask, into).await?;
        let elsewhere = fetched.elsewhere;
        let answer = if matches!(fetched.answer.status, 200 | 206) {
            // A login page would have arrived as a file.
            if !elsewhere && fetched.answer.is_html() {
                let Answer { call, status, .. } = fetched.answer;
                return Err(Error::of(call, Cause::Html { status }));
            }
            fetched.answer
        } else if elsewhere {
            fetched.answer
        } else {
            fetched.answer.unless_html()?
        };
        let reply = match answer.status {
            200 | 206 => DownloadArtifactReply::Whole { bytes: into.len() },
            _ if answer.is_busy() => {
                DownloadArtifactReply::Busy { retry_after: answer.retry_after(self.now()) }
            }
            // What a store of files forbids or misses says nothing of the artifact.
            401 | 403 if !elsewhere => {
                DownloadArtifactReply::Forbidden { message: answer.message() }
            }
            404 if !elsewhere => DownloadArtifactReply::Missing,
            _ => DownloadArtifactReply::Unexpected { message: answer.message() },
        };
        let Answer { status, call, .. } = answer;
        Ok(DownloadAnswer { reply, status, request_id: call.request_id })
    }
}

/// Writes the query; what is empty is left to the server.
fn query(artifact: &ArtifactUpload<'_>) -> Option<String> {
    let fields = [
        ("artifact_format", artifact.format),
        ("artifact_type", artifact.artifact_type),
        ("expire_in", artifact.expire_in),
    ];
    let mut query = url::form_urlencoded::Serializer::new(String::new());
    for (name, value) in fields.into_iter().filter(|(_, value)| !value.is_empty()) {
        query.append_pair(name, value);
    }
    Some(query.finish()).filter(|query| !query.is_empty())
}
