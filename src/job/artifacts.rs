//! Artifacts: which are due, how they are packed, and when an upload is tried again.
//!
//! Each entry of the payload becomes one file outside the workspace, which stays until GitLab has it:
//! packed anew it might differ, and GitLab refuses other bytes under the same type. Who uploads it,
//! and remembers how often that was tried, is the caller, since both must survive a restart.
//!
//! The words are those of gitlab-runner (`commands/helpers/artifacts_uploader.go`).

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use camino::Utf8Path;
use jiff::Timestamp;
use secrecy::ExposeSecret as _;
use serde::{Deserialize, Serialize};

use super::attestation::Statement;
use super::expand::expand;
use super::hands::{self, Draft};
use super::settings::Settings;
use super::sources::{Output, StageError, Tone};
use super::variables::Variables;
use super::{Plan, script, untracked};
use crate::archive::{self, ArchiveError, Format, Level, Selection, Wanted};
use crate::gitlab::wire::{Artifact, Dependency, JobPayload};
use crate::gitlab::{self, ArtifactUpload, UploadAnswer, UploadArtifactReply};

/// The stage's names in the trace and in verdicts.
const ON_SUCCESS: &str = "upload_artifacts_on_success";
const ON_FAILURE: &str = "upload_artifacts_on_failure";

/// How often an upload is tried that was answered, but not well.
const TRIES: u32 = 3;
/// The longest pause between tries that we choose ourselves.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// The longest pause while nobody answers.
const LONGEST_SILENCE: Duration = Duration::from_secs(60);
/// The longest pause that a server may ask for: the job's own time goes on.
const LONGEST_ASKED: Duration = Duration::from_secs(5 * 60);

/// The most of `GITLAB_ENV`'s file that is read; the rest would not fit into an environment.
const ENV_LIMIT: u64 = 2 * 1024 * 1024;

type Out<'a> = &'a mut (dyn Output + Send);

/// What a plan keeps of the payload for artifacts.
pub(super) struct Transfers {
    pub(super) job: i64,
    /// The beginning of the job token, as the official runner shows it.
    pub(super) short_token: String,
    pub(super) artifacts: Vec<Artifact>,
    pub(super) dependencies: Vec<Dependency>,
    /// `ARTIFACT_DOWNLOAD_ATTEMPTS`.
    pub(super) download_attempts: u32,
    /// What is attested of an archive, if that is wanted.
    pub(super) statement: Option<Statement>,
}

impl Transfers {
    pub(super) fn of(payload: &JobPayload, settings: &Settings, variables: &Variables) -> Self {
        Self {
            job: payload.id,
            short_token: payload.token.expose().chars().take(8).collect(),
            artifacts: payload.artifacts.clone(),
            dependencies: payload.dependencies.clone(),
            download_attempts: settings.artifact_download_attempts,
            statement: settings.artifacts_metadata.then(|| Statement::of_job(payload, variables)),
        }
    }
}

/// How a job ran, as far as its artifacts tell of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ran {
    /// Whether everything before the artifacts went well.
    pub well: bool,
    /// When it began.
    pub started: Timestamp,
    /// When it ended.
    pub finished: Timestamp,
}

/// An artifact that is packed: what must be known to upload it, now or after a restart.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PackedArtifact {
    /// What it is to be called.
    pub file_name: String,
    /// `zip`, `gzip`, `raw`, `zipzstd`, `tarzstd`.
    pub format: String,
    /// `archive`, `junit`, …; empty means `archive`.
    pub artifact_type: String,
    /// When it may be deleted; empty means the instance's default.
    pub expire_in: String,
    /// Its length.
    pub bytes: u64,
    /// Its SHA-256, hexadecimal.
    pub sha256: String,
    /// How many files, directories and links it holds.
    pub files: u64,
}

impl PackedArtifact {
    /// Gives what the client is to be told.
    pub fn upload<'a>(&'a self, file: &'a Utf8Path) -> ArtifactUpload<'a> {
        ArtifactUpload {
            file,
            file_name: &self.file_name,
            format: &self.format,
            artifact_type: &self.artifact_type,
            expire_in: &self.expire_in,
        }
    }

    fn shown_type(&self) -> &str {
        if self.artifact_type.is_empty() { "archive" } else { &self.artifact_type }
    }
}

/// What follows an attempt to upload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AfterUpload {
    /// GitLab has it.
    Done,
    /// Try again.
    Again {
        /// After how long.
        after: Duration,
        /// Whether this attempt counts: one that nobody answered says nothing of the artifact.
        counts: bool,
    },
    /// It will not be taken, and the job fails.
    GiveUp {
        /// Why, for the trace.
        why: String,
    },
}

/// Decides what follows an attempt, as the official runner does.
///
/// `tries` counts this attempt and those before it that counted; `silent` counts those in a row,
/// this one included, that nobody answered.
pub fn after_upload(
    tries: u32,
    silent: u32,
    outcome: &Result<UploadAnswer, gitlab::Error>,
) -> AfterUpload {
    let again = |most: u32, asked: Option<Duration>, why: &str| {
        if tries >= most {
            return AfterUpload::GiveUp { why: why.to_owned() };
        }
        let own = Duration::from_secs(1 << tries.saturating_sub(1).min(8)).min(LONGEST_PAUSE);
        let after = asked.unwrap_or(own).clamp(own, LONGEST_ASKED);
        AfterUpload::Again { after, counts: true }
    };
    let answer = match outcome {
        Ok(answer) => answer,
        Err(error) => {
            return match error.kind() {
                gitlab::ErrorKind::Transient => {
                    AfterUpload::Again { after: doubling(silent, LONGEST_SILENCE), counts: false }
                }
                gitlab::ErrorKind::Refused => again(TRIES, None, &error.to_string()),
                gitlab::ErrorKind::Configuration => AfterUpload::GiveUp { why: error.to_string() },
            };
        }
    };
    match &answer.reply {
        UploadArtifactReply::Stored => AfterUpload::Done,
        UploadArtifactReply::Refused { message } | UploadArtifactReply::Unexpected { message } => {
            again(TRIES, None, or(message, "GitLab does not take it"))
        }
        UploadArtifactReply::SwitchedOff => {
            again(TRIES, None, "artifacts are switched off on this GitLab")
        }
        UploadArtifactReply::Forbidden { message, .. } => {
            AfterUpload::GiveUp { why: format!("permission denied: {message}") }
        }
        UploadArtifactReply::TooLarge => AfterUpload::GiveUp {
            why: "too large archive: it exceeds what this GitLab takes of one artifact".to_owned(),
        },
        // Somebody in front of GitLab, or GitLab catching its breath: nothing about the artifact.
        // gitlab-runner gives up after six times 503, some twenty seconds, and so fails every job that
        // ends while its GitLab is upgraded.
        UploadArtifactReply::Unavailable { retry_after }
        | UploadArtifactReply::Busy { retry_after } => {
            let own = doubling(silent, LONGEST_SILENCE);
            let after = retry_after.unwrap_or(own).clamp(own, LONGEST_ASKED);
            AfterUpload::Again { after, counts: false }
        }
    }
}

fn doubling(times: u32, most: Duration) -> Duration {
    Duration::from_secs(1 << times.saturating_sub(1).min(8)).min(most)
}

fn or<'a>(text: &'a str, otherwise: &'a str) -> &'a str {
    if text.is_empty() { otherwise } else { text }
}

impl Plan {
    /// Gives the numbers of the entries that are to be packed and uploaded, in order.
    pub fn artifacts_due(&self, well: bool) -> Vec<usize> {
        let due = |entry: &Artifact| match entry.when.as_str() {
            "" | "on_success" => well,
            "on_failure" => !well,
            "always" => true,
            _ => false,
        };
        self.transfers
            .artifacts
            .iter()
            .enumerate()
            .filter(|(_, entry)| !entry.paths.is_empty() || entry.untracked)
            .filter(|(_, entry)| due(entry))
            .map(|(n, _)| n)
            .collect()
    }

    /// Gives the name of the stage in which artifacts are uploaded.
    pub fn upload_stage(well: bool) -> &'static str {
        if well { ON_SUCCESS } else { ON_FAILURE }
    }

    /// Packs an entry's files into a new file that only its owner may read; gives nothing if there
    /// are none, which is no failure.
    ///
    /// The file has its name only once it is whole and on the disk. It can be begun again at any time.
    ///
    /// # Errors
    ///
    /// When the files cannot be packed in the format that GitLab wants, or not be written.
    pub async fn pack_artifact(
        &self,
        n: usize,
        into: &Utf8Path,
        ran: Ran,
        out: &mut (dyn Output + Send),
    ) -> Result<Option<PackedArtifact>, StageError> {
        let stage = Self::upload_stage(ran.well);
        let broken = StageError::broken(stage);
        let Some(entry) = self.transfers.artifacts.get(n) else { return Ok(None) };
        if entry.paths.is_empty() && !entry.untracked {
            return Ok(None);
        }
        out.remark(Tone::Notice, "Uploading artifacts...");
        let Some(format) = format(&entry.artifact_format) else {
            let text = format!("unsupported archive format: {}", entry.artifact_format);
            out.remark(Tone::Error, &text);
            return Err(StageError::Failed { stage, exit_code: 1 });
        };
        let environment = self.environment_at_the_end().await.map_err(&broken)?;
        let name = if entry.name.is_empty() { "artifacts" } else { &entry.name };
        let name = environment.expanded("artifact name", name, out);
        let level = environment.level(out);
        let wanted = Wanted {
            paths: environment.all("artifact path", &entry.paths, out),
            exclude: environment.all("artifact path", &entry.exclude, out),
            untracked: if entry.untracked { self.untracked(out).await } else { Vec::new() },
        };
        let stop = Stop::default();
        let mut selection = self.select(stage, wanted, &stop, out).await?;
        if selection.entries.is_empty() {
            out.remark(Tone::Error, "No files to upload");
            return Ok(None);
        }
        let base = base_name(&name);
        if let Some(statement) = self.transfers.statement.as_ref().filter(|_| format == Format::Zip)
        {
            out.remark(Tone::Plain, "Generating artifacts statement");
            let version = environment.get("SLSA_PROVENANCE_SCHEMA_VERSION").unwrap_or_default();
            if !matches!(version, "" | "v1") {
                let text = "SLSA_PROVENANCE_SCHEMA_VERSION: only v1 is known; using v1";
                out.remark(Tone::Warning, text);
            }
            let text = statement.of(&self.project_dir, &selection, ran, &stop).await;
            let file = format!("{base}-metadata.json");
            let path = self.project_dir.join(&file);
            hands::write_shared(&path, text.into_bytes()).await.map_err(&broken)?;
            selection = self.with_file(stage, selection, file, &stop, out).await?;
        }
        if let Some(dir) = into.parent() {
            hands::make_dir(dir).await.map_err(&broken)?;
        }
        let part = Utf8Path::new(into)
            .with_file_name(format!(".{}.part", into.file_name().unwrap_or("artifact")));
        let (draft, mut file) = Draft::create(&part).await.map_err(&broken)?;
        let root = self.project_dir.clone();
        let flag = stop.flag();
        let (file, packed) = blocking(stage, move || {
            let packed = archive::pack(&root, &selection, format, level, &mut file, &flag);
            (file, packed)
        })
        .await?;
        let packed = packed.map_err(|error| of_archive(stage, &error, out))?;
        for warning in &packed.warnings {
            out.remark(Tone::Warning, warning);
        }
        draft.keep(file, into).await.map_err(&broken)?;
        Ok(Some(PackedArtifact {
            file_name: file_name(base, format),
            format: entry.artifact_format.clone(),
            artifact_type: entry.artifact_type.clone(),
            expire_in: entry.expire_in.clone(),
            bytes: packed.bytes,
            sha256: packed.sha256.iter().map(|byte| format!("{byte:02x}")).collect(),
            files: packed.files,
        }))
    }

    /// Gives the line that the trace gets about an attempt to upload.
    pub fn upload_line(
        &self,
        artifact: &PackedArtifact,
        outcome: &Result<UploadAnswer, gitlab::Error>,
    ) -> (Tone, String) {
        let prefix =
            format!("Uploading artifacts as {:?} to coordinator...", artifact.shown_type());
        let transfers = &self.transfers;
        match outcome {
            Ok(answer) => {
                let status = status_line(answer.status);
                let tail = format!(
                    "  correlation_id={} id={} responseStatus={status} token={}",
                    answer.request_id, transfers.job, transfers.short_token
                );
                let (tone, words) = match &answer.reply {
                    UploadArtifactReply::Stored => (Tone::Plain, status.clone()),
                    UploadArtifactReply::Refused { message } => {
                        (Tone::Error, format!("{status}: {}", or(message, "not taken")))
                    }
                    UploadArtifactReply::Forbidden { .. } => {
                        (Tone::Error, format!("{status}: permission denied"))
                    }
                    UploadArtifactReply::SwitchedOff => {
                        (Tone::Error, format!("{status}: artifacts are switched off"))
                    }
                    UploadArtifactReply::TooLarge => (
                        Tone::Error,
                        format!("{status}: too large archive ({} bytes)", artifact.bytes),
                    ),
                    UploadArtifactReply::Unavailable { .. } => {
                        (Tone::Warning, format!("{status}: service unavailable"))
                    }
                    UploadArtifactReply::Busy { .. } => (Tone::Warning, status.clone()),
                    UploadArtifactReply::Unexpected { message } => {
                        (Tone::Warning, format!("{status}: {}", or(message, "not taken")))
                    }
                };
                (tone, format!("{prefix} {words}{tail}"))
            }
            Err(error) => {
                let id = error.request_id().unwrap_or("none");
                (
                    Tone::Warning,
                    format!(
                        "{prefix} failed: {error}  correlation_id={id} id={} token={}",
                        transfers.job, transfers.short_token
                    ),
                )
            }
        }
    }

    async fn select(
        &self,
        stage: &'static str,
        wanted: Wanted,
        stop: &Stop,
        out: Out<'_>,
    ) -> Result<Selection, StageError> {
        let root = self.project_dir.clone();
        let flag = stop.flag();
        let selection = blocking(stage, move || archive::select(&root, &wanted, &flag)).await?;
        let selection = selection.map_err(|error| of_archive(stage, &error, out))?;
        for (pattern, found) in &selection.found {
            let what = if pattern == archive::UNTRACKED {
                "files"
            } else {
                "matching artifact files and directories"
            };
            out.remark(Tone::Plain, &format!("{pattern}: found {found} {what}"));
        }
        for (pattern, excluded) in &selection.excluded {
            out.remark(Tone::Plain, &format!("{pattern}: excluded {excluded} files"));
        }
        for warning in &selection.warnings {
            out.remark(Tone::Warning, warning);
        }
        Ok(selection)
    }

    /// Adds a file by its very name.
    async fn with_file(
        &self,
        stage: &'static str,
        mut selection: Selection,
        file: String,
        stop: &Stop,
        out: Out<'_>,
    ) -> Result<Selection, StageError> {
        let name = file.into_bytes();
        let wanted = Wanted { untracked: vec![name.clone()], ..Wanted::default() };
        let (root, flag) = (self.project_dir.clone(), stop.flag());
        let found = blocking(stage, move || archive::select(&root, &wanted, &flag)).await?;
        let found = found.map_err(|error| of_archive(stage, &error, out))?;
        selection.entries.retain(|entry| entry.name != name);
        selection.entries.extend(found.entries);
        selection.entries.sort_by(|one, other| one.name.cmp(&other.name));
        Ok(selection)
    }

    /// Lists what git does not track, ignored files included. Without a repository that is nothing.
    async fn untracked(&self, out: Out<'_>) -> Vec<Vec<u8>> {
        match untracked::names(&self.project_dir, out).await {
            Ok(Ok(names)) => names,
            Ok(Err(code)) => {
                out.remark(Tone::Warning, &format!("untracked: git: exit status {code}"));
                Vec::new()
            }
            Err(error) => {
                out.remark(Tone::Warning, &format!("untracked: {error}"));
                Vec::new()
            }
        }
    }

    /// Gives the variables as a stage after the script sees them, with what the script put into
    /// `GITLAB_ENV`.
    pub(super) async fn environment_at_the_end(&self) -> Result<AtTheEnd, hands::HandsError> {
        let mut values: HashMap<String, String> = self
            .env
            .iter()
            .map(|var| (var.name.clone(), var.value.expose_secret().to_owned()))
            .collect();
        let file = self.temp_dir.join(script::ENV_FILE);
        let content = hands::read_regular(&file, ENV_LIMIT).await?.unwrap_or_default();
        values.extend(exported(&content));
        Ok(AtTheEnd(values))
    }
}

/// Reads `GITLAB_ENV`'s file as the shell of a stage does: `read` trims lines and ignores a last one
/// without its end.
fn exported(content: &[u8]) -> impl Iterator<Item = (String, String)> + '_ {
    let whole = content.iter().rposition(|byte| *byte == b'\n').unwrap_or(0);
    content.get(..whole).unwrap_or_default().split(|byte| *byte == b'\n').filter_map(|line| {
        let line = std::str::from_utf8(line).ok()?.trim_matches([' ', '\t']);
        let (name, value) = line.split_once('=')?;
        super::variables::is_identifier(name).then(|| (name.to_owned(), value.to_owned()))
    })
}

/// A job's variables after its script.
pub(super) struct AtTheEnd(HashMap<String, String>);

impl AtTheEnd {
    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    /// Expands a text; what cannot be expanded stays, with a warning.
    pub(super) fn expanded(&self, what: &str, text: &str, out: Out<'_>) -> String {
        match expand(text, &|name| self.get(name)) {
            Ok(expanded) => expanded,
            Err(error) => {
                out.remark(Tone::Warning, &format!("invalid {what} {text:?}: {error}"));
                text.to_owned()
            }
        }
    }

    pub(super) fn all(&self, what: &str, texts: &[String], out: Out<'_>) -> Vec<String> {
        texts.iter().map(|text| self.expanded(what, text, out)).collect()
    }

    fn level(&self, out: Out<'_>) -> Level {
        let text = self.get("ARTIFACT_COMPRESSION_LEVEL").unwrap_or_default();
        match text {
            "fastest" => Level::Fastest,
            "fast" => Level::Fast,
            "" | "default" => Level::Default,
            "slow" => Level::Slow,
            "slowest" => Level::Slowest,
            odd => {
                let odd: String = odd.chars().take(40).collect();
                out.remark(
                    Tone::Warning,
                    &format!(
                        "ARTIFACT_COMPRESSION_LEVEL: {odd:?} is none of fastest, fast, default, \
                         slow, slowest; using default"
                    ),
                );
                Level::Default
            }
        }
    }
}

fn format(name: &str) -> Option<Format> {
    Some(match name {
        "" | "zip" => Format::Zip,
        "gzip" => Format::Gzip,
        "raw" => Format::Raw,
        "zipzstd" => Format::ZipZstd,
        "tarzstd" => Format::TarZstd,
        _ => return None,
    })
}

/// Gives the last part of a name; `default` where there is none.
fn base_name(name: &str) -> &str {
    match name.trim_end_matches('/').rsplit('/').next().unwrap_or_default() {
        "" | "." | ".." => "default",
        base => base,
    }
}

fn file_name(base: &str, format: Format) -> String {
    let ending = match format {
        Format::Zip | Format::ZipZstd => ".zip",
        Format::Gzip => ".gz",
        Format::TarZstd => ".tar.zst",
        Format::Raw => "",
    };
    format!("{base}{ending}")
}

pub(super) fn status_line(status: u16) -> String {
    let reason = match status {
        200 => "OK",
        201 => "Created",
        206 => "Partial Content",
        400 => "Bad Request",
        401 => "Unauthorized",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        408 => "Request Timeout",
        413 => "Request Entity Too Large",
        429 => "Too Many Requests",
        500 => "Internal Server Error",
        502 => "Bad Gateway",
        503 => "Service Unavailable",
        504 => "Gateway Timeout",
        _ => return status.to_string(),
    };
    format!("{status} {reason}")
}

/// Says who is to blame: what the author asked for is the job's failure, a disk that is full ours.
pub(super) fn of_archive(stage: &'static str, error: &ArchiveError, out: Out<'_>) -> StageError {
    match error {
        ArchiveError::Io { source, .. } => {
            StageError::Broken { stage, detail: format!("{error}: {source}") }
        }
        ArchiveError::Stopped => StageError::Broken { stage, detail: error.to_string() },
        ArchiveError::NotRegular { .. }
        | ArchiveError::NotOne
        | ArchiveError::TooMuch { .. }
        | ArchiveError::Unsupported { .. }
        | ArchiveError::Damaged { .. } => {
            out.remark(Tone::Error, &error.to_string());
            StageError::Failed { stage, exit_code: 1 }
        }
    }
}

/// Stops blocking work when it goes away, and so when the future does that waits for it.
#[derive(Default)]
pub(super) struct Stop(Arc<AtomicBool>);

impl Stop {
    pub(super) fn flag(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.0)
    }
}

impl Drop for Stop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Does blocking work on a thread of its own.
pub(super) async fn blocking<T: Send + 'static>(
    stage: &'static str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, StageError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| StageError::Broken { stage, detail: error.to_string() })
}

#[cfg(test)]
#[path = "artifacts_tests.rs"]
mod tests;
