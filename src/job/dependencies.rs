//! Artifacts of earlier jobs, brought into the checkout before the script.
//!
//! The order is the payload's, since a later archive overwrites an earlier one's files. Each has a
//! token of its own. The archive lies in a private file beside the workspace only as long as it is
//! unpacked. What GitLab refuses fails the job as the official runner does; that nobody answered is
//! no statement about the job, and waited for longer.

use std::time::Duration;

use camino::Utf8Path;

use super::Plan;
use super::artifacts::{Stop, blocking, of_archive, status_line};
use super::hands::{self, Draft};
use super::sources::{Output, StageError, Tone};
use crate::archive::{self, Bounds};
use crate::domain::id::CiJobId;
use crate::gitlab::wire::Dependency;
use crate::gitlab::{
    Client, DownloadAnswer, DownloadArtifactReply, Error, ErrorKind, JobAuth, PartialFile,
};

/// The stage's name in the trace and in verdicts.
const STAGE: &str = "download_artifacts";

/// How often a download is tried that was answered, but not well.
const TRIES: u32 = 3;
/// How often in a row it is tried while nobody answers: about four minutes with the pauses below.
const TRIES_SILENT: u32 = 8;
/// The pause between tries.
const PAUSE: Duration = Duration::from_secs(1);
/// The longest pause, whoever asks for it.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// How much an archive may have whose size GitLab did not say.
const UNANNOUNCED: u64 = 64 << 30;
/// How far an archive's size may be from what GitLab said before it is given up on.
const TOLERANCE: u64 = 64 << 20;

type Out<'a> = &'a mut (dyn Output + Send);

impl Plan {
    /// Says whether there is anything to download.
    pub fn has_dependencies(&self) -> bool {
        self.wanted_dependencies().next().is_some()
    }

    /// Downloads and unpacks the artifacts of earlier jobs.
    ///
    /// `scratch_dir` is ours alone and holds one archive at a time; none is left there. The stage can
    /// be begun again at any time.
    ///
    /// # Errors
    ///
    /// When an archive cannot be had or not be unpacked, in all attempts.
    pub async fn download_artifacts(
        &self,
        client: &Client,
        scratch_dir: &Utf8Path,
        out: &mut (dyn Output + Send),
    ) -> Result<(), StageError> {
        if !self.has_dependencies() {
            return Ok(());
        }
        hands::make_dir(scratch_dir).await.map_err(StageError::broken(STAGE))?;
        let most = self.transfers.download_attempts;
        let mut attempt = 1;
        loop {
            let error = match self.download_all(client, scratch_dir, out).await {
                Ok(()) => return Ok(()),
                Err(error) => error,
            };
            if attempt >= most {
                return Err(error);
            }
            attempt += 1;
            let pause = self.settings.pause_before(attempt);
            let text =
                format!("{error}; attempt {attempt} of {most} follows in {} s", pause.as_secs());
            out.remark(Tone::Warning, &text);
            tokio::time::sleep(pause).await;
        }
    }

    fn wanted_dependencies(&self) -> impl Iterator<Item = &Dependency> {
        let named = |dependency: &&Dependency| {
            dependency.artifacts_file.as_ref().is_some_and(|file| !file.filename.is_empty())
        };
        self.transfers.dependencies.iter().filter(named)
    }

    async fn download_all(
        &self,
        client: &Client,
        scratch_dir: &Utf8Path,
        out: Out<'_>,
    ) -> Result<(), StageError> {
        for dependency in self.wanted_dependencies() {
            let text =
                format!("Downloading artifacts for {} ({})...", dependency.name, dependency.id);
            out.remark(Tone::Notice, &text);
            let path = scratch_dir.join(format!("dependency-{}", dependency.id));
            // Goes away with this attempt, also when nobody waits for it any more.
            let scrap = Draft::at(path.clone());
            self.download(client, dependency, &path, out).await?;
            self.unpack(&path, out).await?;
            drop(scrap);
        }
        Ok(())
    }

    async fn download(
        &self,
        client: &Client,
        dependency: &Dependency,
        path: &Utf8Path,
        out: Out<'_>,
    ) -> Result<(), StageError> {
        let announced = dependency
            .artifacts_file
            .as_ref()
            .and_then(|file| u64::try_from(file.size).ok())
            .filter(|size| *size > 0);
        let limit = announced.map_or(UNANNOUNCED, |size| size.saturating_mul(2).max(TOLERANCE));
        let auth = JobAuth { id: CiJobId(dependency.id), token: &dependency.token };
        let direct_allowed = self.settings.flag("FF_USE_DIRECT_DOWNLOAD");
        let mut direct = direct_allowed;
        let mut partial = PartialFile::new(path);
        let (mut tries, mut silent) = (0, 0);
        loop {
            let before = partial.len();
            let outcome = client.download_artifact(auth, direct, limit, &mut partial).await;
            // The store of files may be out of our reach; GitLab itself is not. But what it gave in
            // part it also gives the rest of.
            direct = direct && partial.can_go_on();
            if partial.len() > before {
                silent = 0;
            }
            let next = match &outcome {
                Ok(answer) => {
                    self.say_download(dependency, answer, out);
                    tries += 1;
                    match &answer.reply {
                        DownloadArtifactReply::Whole { bytes } => {
                            if let Some(size) = announced.filter(|size| size != bytes) {
                                let text = format!(
                                    "the archive has {bytes} bytes, GitLab announced {size}"
                                );
                                out.remark(Tone::Warning, &text);
                            }
                            return Ok(());
                        }
                        DownloadArtifactReply::Forbidden { .. }
                        | DownloadArtifactReply::Missing => {
                            return Err(StageError::Failed { stage: STAGE, exit_code: 1 });
                        }
                        DownloadArtifactReply::Busy { retry_after } => {
                            silent += 1;
                            let pause =
                                retry_after.unwrap_or(pause_after(silent)).min(LONGEST_PAUSE);
                            (silent < TRIES_SILENT).then_some(pause).ok_or_else(|| {
                                let detail = format!("answered {}", status_line(answer.status));
                                StageError::Broken { stage: STAGE, detail }
                            })
                        }
                        DownloadArtifactReply::Unexpected { .. } => (tries < TRIES)
                            .then_some(PAUSE)
                            .ok_or(StageError::Failed { stage: STAGE, exit_code: 1 }),
                    }
                }
                Err(error) => {
                    let text = format!("Downloading artifacts from coordinator... failed: {error}");
                    out.remark(Tone::Warning, &text);
                    silent += 1;
                    let most = match error.kind() {
                        ErrorKind::Transient => TRIES_SILENT,
                        // A detour that cannot be taken; GitLab itself may still have the file.
                        ErrorKind::Refused | ErrorKind::Configuration => TRIES,
                    };
                    let broken = || StageError::Broken { stage: STAGE, detail: words(error) };
                    (silent < most).then_some(pause_after(silent)).ok_or_else(broken)
                }
            };
            tokio::time::sleep(next?).await;
        }
    }

    fn say_download(&self, dependency: &Dependency, answer: &DownloadAnswer, out: Out<'_>) {
        let status = status_line(answer.status);
        let token: String = dependency.token.expose().chars().take(8).collect();
        let (tone, words) = match &answer.reply {
            DownloadArtifactReply::Whole { .. } => (Tone::Plain, "ok".to_owned()),
            DownloadArtifactReply::Forbidden { message } => (
                Tone::Error,
                format!("forbidden: this job may not read that job's artifacts: {message}"),
            ),
            DownloadArtifactReply::Missing => (
                Tone::Error,
                "not found: there are no artifacts, or they have expired or were deleted"
                    .to_owned(),
            ),
            DownloadArtifactReply::Busy { .. } => (Tone::Warning, status.clone()),
            DownloadArtifactReply::Unexpected { message } => {
                (Tone::Warning, format!("failed: {message}"))
            }
        };
        out.remark(
            tone,
            &format!(
                "Downloading artifacts from coordinator... {words}  correlation_id={} id={} \
                 responseStatus={status} token={token}",
                answer.request_id, dependency.id
            ),
        );
    }

    async fn unpack(&self, path: &Utf8Path, out: Out<'_>) -> Result<(), StageError> {
        let broken = StageError::broken(STAGE);
        let file = hands::open(path).await.map_err(&broken)?;
        hands::make_dir(&self.restore_dir).await.map_err(&broken)?;
        let stop = Stop::default();
        let (root, flag) = (self.restore_dir.clone(), stop.flag());
        let unpacked =
            blocking(STAGE, move || archive::unpack(&file, &root, &Bounds::default(), &flag))
                .await?
                .map_err(|error| of_archive(STAGE, &error, out))?;
        for warning in &unpacked.warnings {
            out.remark(Tone::Warning, warning);
        }
        Ok(())
    }
}

/// Doubles from one second on.
fn pause_after(times: u32) -> Duration {
    (PAUSE * (1 << times.saturating_sub(1).min(8))).min(LONGEST_PAUSE)
}

/// Names an error with its causes.
fn words(error: &Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

#[cfg(test)]
#[path = "dependencies_tests.rs"]
mod tests;
