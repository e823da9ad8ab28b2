//! What a well-behaved runner does and does not do. Breaches are collected; nothing is refused
//! because of them.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;
use std::time::Duration;

use axum::http::Method;

use super::api::Call;
use super::fault::Endpoint;
use super::job::{Job, Refused};
use super::options::Version;
use super::runner::Info;
use super::state::State;
use super::update::Update;
use super::view::{EndedBy, Final};

/// Every key the official runner sends in `info.features`.
pub(super) const FEATURES: [&str; 31] = [
    "artifacts",
    "artifacts_exclude",
    "cache",
    "cancel_gracefully",
    "cancelable",
    "fallback_cache_keys",
    "image",
    "image_executor_opts",
    "job_inputs",
    "masking",
    "multi_build_steps",
    "native_steps_integration",
    "proxy",
    "raw_variables",
    "refspecs",
    "return_exit_code",
    "service_executor_opts",
    "service_multiple_aliases",
    "service_variables",
    "services",
    "session",
    "shared",
    "terminal",
    "trace_checksum",
    "trace_reset",
    "trace_size",
    "two_phase_job_commit",
    "upload_multiple_artifacts",
    "upload_raw_artifacts",
    "variables",
    "vault_secrets",
];

/// Understood by every server, listed or not.
const ALWAYS_LISTED: [&str; 3] =
    ["script_failure", "runner_system_failure", "job_execution_timeout"];

/// The sections a runner makes itself; scripts may make others as they please.
const SECTIONS: [&str; 15] = [
    "resolve_secrets",
    "prepare_executor",
    "prepare_script",
    "get_sources",
    "clear_worktree",
    "restore_cache",
    "download_artifacts",
    "step_script",
    "step_release",
    "after_script",
    "archive_cache",
    "archive_cache_on_failure",
    "upload_artifacts_on_success",
    "upload_artifacts_on_failure",
    "cleanup_file_variables",
];

/// Calls must be closer together than this.
pub(super) const MAX_GAP: Duration = Duration::from_secs(15 * 60);
const MAX_PATCH: usize = 1024 * 1024;
/// Shorter values cannot be masked in GitLab, and would be found by chance.
const MIN_SECRET: usize = 8;

/// Headers that every call must have.
pub(super) fn on_call(state: &mut State, call: &Call) {
    let what = call.endpoint;
    let kind = match what {
        Endpoint::Git | Endpoint::ObjectStorage | Endpoint::Unknown => return,
        Endpoint::JobInfo
        | Endpoint::DownloadArtifact
        | Endpoint::CreateRunner
        | Endpoint::RunnersApi => None,
        Endpoint::UploadArtifact => Some("multipart/form-data"),
        Endpoint::Patch => Some("text/plain"),
        Endpoint::Register
        | Endpoint::Verify
        | Endpoint::Unregister
        | Endpoint::UnregisterManager
        | Endpoint::ResetToken
        | Endpoint::Request
        | Endpoint::Update
        | Endpoint::FinalUpdate => Some("application/json"),
    };
    if call.header("user-agent").is_none_or(str::is_empty) {
        state.violation(format!("{what:?} without User-Agent"));
    }
    match call.header("x-request-id").map(|id| (id, request_id(id))) {
        None => state.violation(format!("{what:?} without X-Request-Id")),
        Some((id, None)) => {
            state.violation(format!("{what:?} with X-Request-Id `{id}`, not 32 hex digits"));
        }
        Some((id, Some(number))) if state.knows_request_id(number) => {
            state.violation(format!("{what:?} with X-Request-Id {id} of an earlier call"));
        }
        Some(_) => {}
    }
    if let Some(kind) = kind
        && call.content_type() != kind
        && !(call.method == Method::DELETE && call.body.is_empty())
    {
        let found = call.content_type();
        state.violation(format!("{what:?} with Content-Type `{found}` instead of {kind}"));
    }
}

/// Remembers the call's id. Calls without a proper answer may be repeated under the same one.
pub(super) fn on_answer(state: &mut State, call: &Call) {
    if let Some(id) = call.header("x-request-id").and_then(request_id) {
        state.remember_request_id(id);
    }
}

fn request_id(text: &str) -> Option<u128> {
    let hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    if text.len() != 32 || !text.bytes().all(hex) {
        return None;
    }
    u128::from_str_radix(text, 16).ok()
}

/// The first call of a process decides for up to 55 minutes what GitLab believes it can do.
pub(super) fn on_new_manager(state: &mut State, system_id: &str, info: Option<&Info>) {
    let features = info.and_then(|info| info.features.as_ref());
    let Some(features) = features else {
        state.violation(format!("first call of {system_id} without info.features"));
        return;
    };
    let lacking: Vec<&str> =
        FEATURES.into_iter().filter(|name| !features.contains_key(*name)).collect();
    if !lacking.is_empty() {
        let lacking = lacking.join(", ");
        state.violation(format!("first call of {system_id} lacks the features {lacking}"));
    }
}

/// Checks a PUT before anything is decided about it.
pub(super) fn on_update(state: &mut State, version: Version, id: i64, update: &Update) {
    let Some(job) = state.job(id) else { return };
    let mut broken = Vec::new();
    let named = update.state.as_deref().unwrap_or("(none)");
    if !matches!(named, "running" | "success" | "failed") {
        broken.push(format!("job {id}: PUT with state `{named}`"));
    }
    match (update.failure_reason.as_deref(), named) {
        (Some(reason), "failed") => {
            let listed = match &job.reasons {
                Some(names) => names.iter().any(|name| name == reason),
                None => version.failure_reasons().any(|name| name == reason),
            };
            if !listed && !ALWAYS_LISTED.contains(&reason) {
                broken.push(format!("job {id}: failure reason `{reason}` is not listed"));
            }
        }
        (Some(reason), _) => {
            broken.push(format!("job {id}: failure reason `{reason}` with state `{named}`"));
        }
        (None, "failed") => broken.push(format!("job {id}: `failed` without failure reason")),
        (None, _) => {}
    }
    if update.is_final()
        && let Some(first) = &job.final_update
        && *first != update.to_final()
    {
        let now = update.to_final();
        broken.push(format!("job {id}: final update changed from {first:?} to {now:?}"));
    }
    for text in broken {
        state.violation(text);
    }
}

/// Notes a 403, and what comes after one: a single closing attempt is allowed.
pub(super) fn on_refused(state: &mut State, id: i64, endpoint: Endpoint) {
    let Some(job) = state.job_mut(id) else { return };
    let patch = endpoint == Endpoint::Patch;
    let mut broken = Vec::new();
    if patch && job.ended_by == Some(EndedBy::Runner) && job.final_told.surely() {
        broken.push(format!("job {id}: PATCH after the accepted final update"));
    }
    match &mut job.refused {
        Some(refused) if refused.told.surely() => {
            let count = if patch { &mut refused.patches } else { &mut refused.updates };
            *count += 1;
            if *count > 1 {
                broken.push(format!("job {id}: another {endpoint:?} after a 403"));
            }
        }
        other => *other = Some(Refused::default()),
    }
    for text in broken {
        state.violation(text);
    }
}

/// Checks a patch against what is stored; `stored` is the body with the token replaced.
pub(super) fn on_patch(state: &mut State, id: i64, range: &str, start: u64, stored: &[u8]) {
    let Some(job) = state.job(id) else { return };
    let mut broken = Vec::new();
    let length = u64::try_from(stored.len()).unwrap_or(u64::MAX);
    if stored.is_empty() {
        broken.push(format!("job {id}: empty patch"));
    } else if range != format!("{start}-{}", start.saturating_add(length - 1)) {
        broken.push(format!("job {id}: Content-Range `{range}` with {length} bytes"));
    }
    if stored.len() > MAX_PATCH {
        broken.push(format!("job {id}: patch of {length} bytes"));
    }
    if start > job.trace_len {
        let end = job.trace_len;
        broken.push(format!("job {id}: gap in the trace, {start} after {end} bytes"));
    }
    if start < job.trace_len {
        if job.patch_told.surely() {
            let end = job.trace_len;
            broken.push(format!("job {id}: patch at {start}, though {end} bytes were accepted"));
        }
        let from = usize::try_from(start).unwrap_or(usize::MAX);
        let known = job.trace.get(from..).unwrap_or_default();
        if known.iter().zip(stored).any(|(known, sent)| known != sent) {
            broken.push(format!("job {id}: repeated bytes at {start} differ"));
        }
    }
    if job.finalising.is_some() {
        broken.push(format!("job {id}: PATCH between repetitions of the final update"));
    }
    for text in broken {
        state.violation(text);
    }
}

/// Checks an upload before anything is decided about it.
pub(super) fn on_artifact(state: &mut State, id: i64, call: &Call) {
    let Some(job) = state.job(id) else { return };
    let mut broken = Vec::new();
    if job.final_update.is_some() {
        broken.push(format!("job {id}: artifact after the final update"));
    }
    let secrets = job.masked.iter().map(|secret| secret.trim()).chain([job.token.as_str()]);
    let name = call.upload_name().unwrap_or_default();
    if secrets.filter(|secret| secret.len() >= MIN_SECRET).any(|secret| name.contains(secret)) {
        broken.push(format!("job {id}: a secret in an artifact's name"));
    }
    for text in broken {
        state.violation(text);
    }
}

/// Gives what is wrong with a zip that is to be an archive.
pub(super) fn in_archive(path: &Path) -> Vec<String> {
    let opened = File::open(path).map_err(zip::result::ZipError::from);
    let archive = match opened.and_then(zip::ZipArchive::new) {
        Ok(archive) => archive,
        Err(error) => return vec![format!("the archive cannot be read: {error}")],
    };
    let outside = |name: &str| {
        name.starts_with('/') || name.split('/').any(|part| part == "..") || name.contains('\\')
    };
    // A name that is no text is a name all the same.
    let names = archive.file_names().flatten().filter(|name| outside(name)).take(3);
    names.map(|name| format!("the archive holds {name:?}")).collect()
}

/// Checks how long the runner was silent. Time that a test skipped in one go does not count.
pub(super) fn on_sign_of_life(state: &mut State, id: i64, now: Duration) {
    let skipped = state.skipped;
    let Some(job) = state.job_mut(id) else { return };
    let gap = job.last_call_at.map(|last| now.saturating_sub(last)).unwrap_or_default();
    let gap = gap.saturating_sub(skipped.saturating_sub(job.skipped_then));
    job.last_call_at = Some(now);
    job.skipped_then = skipped;
    if gap >= MAX_GAP {
        let minutes = gap.as_secs() / 60;
        state.violation(format!("job {id}: silent for {minutes} minutes"));
    }
}

/// Compares the final update with what was received.
pub(super) fn on_final(state: &mut State, id: i64, sent: &Final) {
    let Some(job) = state.job(id) else { return };
    let (length, checksum) = (job.trace_len, format!("crc32:{:08x}", job.trace_crc()));
    if sent.bytesize != Some(length) || sent.checksum.as_deref() != Some(checksum.as_str()) {
        let text = format!(
            "job {id}: final update speaks of {:?} bytes with {:?}, received were {length} with \
             {checksum}",
            sent.bytesize, sent.checksum
        );
        state.violation(text);
    }
}

/// Checks the whole trace of a job that has just ended.
pub(super) fn at_end(job: &Job) -> Vec<String> {
    let id = job.id;
    let trace = job.trace.as_slice();
    let mut broken = Vec::new();
    // The job token was replaced by as many `x` if it came within one patch.
    if find(trace, job.token.as_bytes()).is_some() {
        broken.push(format!("job {id}: the job token is in the trace"));
    }
    for secret in &job.masked {
        let secret = secret.trim();
        if secret.len() >= MIN_SECRET && find(trace, secret.as_bytes()).is_some() {
            broken.push(format!("job {id}: a masked variable is in the trace"));
        }
    }
    let cut = find(trace, b"Job's log exceeded limit").is_some();
    if job.ended_by == Some(EndedBy::Runner) && !cut {
        broken.extend(timestamps(trace).map(|text| format!("job {id}: {text}")));
        broken.extend(sections(trace).map(|text| format!("job {id}: {text}")));
    }
    broken
}

/// Finds a text; an empty one is nowhere.
pub(super) fn find(within: &[u8], wanted: &[u8]) -> Option<usize> {
    let first = *wanted.first()?;
    let mut from = 0;
    loop {
        let rest = within.get(from..)?;
        let at = from + rest.iter().position(|byte| *byte == first)?;
        if within.get(at..)?.starts_with(wanted) {
            return Some(at);
        }
        from = at + 1;
    }
}

/// Gives what is wrong with the line headers, if the trace has any.
fn timestamps(trace: &[u8]) -> Option<String> {
    let mut lines = trace.split(|byte| *byte == b'\n').peekable();
    header(lines.peek()?)?;
    let mut latest: BTreeMap<&[u8], &[u8]> = BTreeMap::new();
    let mut number = 0;
    while let Some(line) = lines.next() {
        number += 1;
        if line.is_empty() && lines.peek().is_none() {
            break;
        }
        let Some((time, stream)) = header(line) else {
            return Some(format!("line {number} of the trace has no timestamp"));
        };
        if latest.insert(stream, time).is_some_and(|earlier| earlier > time) {
            return Some(format!("line {number} of the trace is older than the one before"));
        }
    }
    None
}

/// Takes `2026-08-22T00:44:03.001234Z 00O ` apart: time and stream.
fn header(line: &[u8]) -> Option<(&[u8], &[u8])> {
    const SHAPE: &[u8; 32] = b"0000-00-00T00:00:00.000000Z hhs+";
    let header = line.get(..32)?;
    let fits = header.iter().zip(SHAPE).all(|(byte, shape)| match shape {
        b'0' => byte.is_ascii_digit(),
        b'h' => byte.is_ascii_digit() || (b'a'..=b'f').contains(byte),
        b's' => matches!(byte, b'O' | b'E'),
        b'+' => matches!(byte, b' ' | b'+'),
        literal => byte == literal,
    });
    if fits { Some((header.get(..27)?, header.get(28..31)?)) } else { None }
}

/// Gives what is wrong with the runner's own sections.
fn sections(trace: &[u8]) -> Option<String> {
    let mut open: Vec<&str> = Vec::new();
    let mut from = 0;
    while let Some(at) = find(trace.get(from..)?, b"section_") {
        let place = from + at + b"section_".len();
        from = place;
        let Some((starts, name)) = marker(trace.get(place..)?) else { continue };
        if starts {
            open.push(name);
        } else if open.pop() != Some(name) {
            return Some(format!("section {name} ends, but was not the innermost one"));
        }
    }
    let left = open.pop()?;
    Some(format!("section {left} has no end"))
}

/// Reads `start:1787359443:step_script` up to the carriage return; only names of the runner.
fn marker(text: &[u8]) -> Option<(bool, &'static str)> {
    let (starts, rest) = match text.strip_prefix(b"start:") {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix(b"end:")?),
    };
    let digits = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
    let rest = rest.get(digits..)?.strip_prefix(b":")?;
    let end = rest.iter().position(|byte| matches!(byte, b'\r' | b'['))?;
    let name = std::str::from_utf8(rest.get(..end)?).ok()?;
    let name = SECTIONS.into_iter().find(|known| *known == name)?;
    (digits > 0).then_some((starts, name))
}
