//! Artifacts: `POST` and `GET /jobs/:id/artifacts`, and the second host on which large GitLabs keep
//! files.
//!
//! Files lie in the temporary directory until the coordinator ends; bodies are written there as they
//! come, so that an artifact of gigabytes costs no memory.

use std::fmt;
use std::io::{self, SeekFrom};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{ConnectInfo, FromRequest as _, Multipart, Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::Response;
use bytes::Bytes;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use sha2::{Digest as _, Sha256};
use tempfile::{NamedTempFile, TempPath};
use tokio::io::{AsyncReadExt as _, AsyncSeekExt as _, AsyncWriteExt as _};
use tokio_util::io::ReaderStream;

use super::api::{self, Call};
use super::artifact_rules::{self, Fault};
use super::door::{Caller, Line};
use super::fault::Endpoint;
use super::new_job::{NewJob, Variable};
use super::options::Version;
use super::random;
use super::reply::Reply;
use super::rules;
use super::state::{Shared, State as Known};

/// What an instance keeps artifacts for if nobody says.
const DEFAULT_LIFE: Duration = Duration::from_secs(30 * 86_400);

/// A kept artifact.
#[derive(Clone)]
pub(super) struct Stored {
    pub(super) kind: String,
    pub(super) format: String,
    pub(super) file_name: String,
    pub(super) expire_in: Option<String>,
    pub(super) bytes: u64,
    pub(super) sha256: String,
    pub(super) path: Arc<TempPath>,
    pub(super) expires_at: Option<Duration>,
    pub(super) variables: Vec<(String, String)>,
}

/// An artifact as the server has it.
#[derive(Clone)]
pub struct ArtifactView {
    /// `archive`, `junit`, …
    pub artifact_type: String,
    /// `zip`, `gzip`, `raw`.
    pub format: String,
    /// What it was called.
    pub file_name: String,
    /// As sent.
    pub expire_in: Option<String>,
    /// Its length.
    pub size: u64,
    /// Its SHA-256, hexadecimal.
    pub sha256: String,
    path: Arc<TempPath>,
}

impl ArtifactView {
    /// Reads the whole file.
    ///
    /// # Errors
    ///
    /// Fails if somebody took the file away.
    pub fn content(&self) -> io::Result<Vec<u8>> {
        std::fs::read(self.file())
    }

    /// Where it lies as long as the coordinator or this view is there.
    pub fn file(&self) -> &Path {
        &self.path
    }
}

impl fmt::Debug for ArtifactView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ArtifactView")
            .field("artifact_type", &self.artifact_type)
            .field("format", &self.format)
            .field("file_name", &self.file_name)
            .field("expire_in", &self.expire_in)
            .field("size", &self.size)
            .finish_non_exhaustive()
    }
}

impl Stored {
    pub(super) fn view(&self) -> ArtifactView {
        ArtifactView {
            artifact_type: self.kind.clone(),
            format: self.format.clone(),
            file_name: self.file_name.clone(),
            expire_in: self.expire_in.clone(),
            size: self.bytes,
            sha256: self.sha256.clone(),
            path: Arc::clone(&self.path),
        }
    }

    fn is_there(&self, now: Duration) -> bool {
        self.expires_at.is_none_or(|at| at > now)
    }
}

/// A file that came in, not looked at yet.
#[derive(Debug)]
pub(super) struct Received {
    file_name: String,
    bytes: u64,
    sha256: String,
    path: Arc<TempPath>,
}

impl Received {
    pub(super) fn file_name(&self) -> &str {
        &self.file_name
    }
}

/// Reads a form of one file; `None` if the connection was cut on the way.
pub(super) async fn receive(
    shared: &Shared,
    line: &Line,
    request: Request,
) -> Option<Result<Received, String>> {
    let (slow, cut) = {
        let mut state = shared.lock();
        (state.knobs.slow_reader, state.upload_cuts.pop_front())
    };
    let (parts, body) = request.into_parts();
    let mut left = cut;
    let pieces = body.into_data_stream().map_err(io::Error::other).and_then(move |piece| {
        let enough = left.as_mut().is_some_and(|left| {
            let len = u64::try_from(piece.len()).unwrap_or(u64::MAX);
            let enough = *left <= len;
            *left = left.saturating_sub(len);
            enough
        });
        async move {
            if let Some(pause) = slow {
                tokio::time::sleep(pause).await;
            }
            if enough { Err(io::ErrorKind::ConnectionReset.into()) } else { Ok(piece) }
        }
    });
    let request = Request::from_parts(parts, Body::from_stream(Box::pin(pieces)));
    let result = match Multipart::from_request(request, &()).await {
        Ok(form) => read_form(form).await,
        Err(rejection) => Err(rejection.body_text()),
    };
    if cut.is_some() && result.is_err() {
        line.cut();
        return None;
    }
    Some(result)
}

async fn read_form(mut form: Multipart) -> Result<Received, String> {
    let mut found: Option<Received> = None;
    let broken = |error: axum::extract::multipart::MultipartError| error.body_text();
    while let Some(mut field) = form.next_field().await.map_err(broken)? {
        if field.name() != Some("file") || found.is_some() {
            return Err("more than one file, or one of another name".to_owned());
        }
        let Some(file_name) = field.file_name().map(str::to_owned) else {
            return Err("the file has no name".to_owned());
        };
        let (file, path) = new_file().map_err(|error| error.to_string())?;
        let mut file = tokio::fs::File::from_std(file);
        let mut hasher = Sha256::new();
        let mut bytes = 0;
        while let Some(piece) = field.chunk().await.map_err(broken)? {
            hasher.update(&piece);
            bytes += u64::try_from(piece.len()).unwrap_or(u64::MAX);
            file.write_all(&piece).await.map_err(|error| error.to_string())?;
        }
        file.flush().await.map_err(|error| error.to_string())?;
        found = Some(Received { file_name, bytes, sha256: hex(&hasher.finalize()), path });
    }
    found.ok_or_else(|| "no file".to_owned())
}

fn new_file() -> io::Result<(std::fs::File, Arc<TempPath>)> {
    let (file, path) = NamedTempFile::with_prefix("bridge-coordinator-")?.into_parts();
    Ok((file, Arc::new(path)))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// `POST /jobs/:id/artifacts`.
pub(super) fn upload(shared: &Shared, call: &Call) -> Reply {
    let Some(id) = call.job else { return Reply::forbidden() };
    let now = shared.clock.now();
    let mut state = shared.lock();
    if let Err(reply) = may_upload(&state, id, call.header("job-token"), now) {
        return reply;
    }
    rules::on_artifact(&mut state, id, call);
    let received = match &call.upload {
        Some(Ok(received)) => received,
        Some(Err(fault)) => {
            state.violation(format!("job {id}: the form of an artifact: {fault}"));
            return Reply::error(400, "file is invalid");
        }
        None => return Reply::error(400, "file is missing"),
    };
    if state.knobs.artifacts_off {
        return Reply::message(405, "405 Method Not Allowed");
    }
    if received.bytes > state.knobs.max_artifact_size {
        return Reply::message(413, "file size has reached maximum size limit");
    }
    let parameter = |name: &str| call.query_param(name).filter(|value| !value.is_empty());
    let kind = parameter("artifact_type").unwrap_or_else(|| "archive".to_owned());
    let format = parameter("artifact_format").unwrap_or_else(|| "zip".to_owned());
    let expire_in = parameter("expire_in");
    let pair = artifact_rules::check_pair(&kind, &format);
    if let Err(Fault::Parameter(text)) = &pair {
        return Reply::error(400, text);
    }
    let Some(job) = state.job(id) else { return Reply::forbidden() };
    let same_type = job.artifacts.iter().find(|one| one.kind == kind);
    if same_type.is_some_and(|one| one.sha256 == received.sha256) {
        return Reply::plain(201);
    }
    let another = same_type.is_some();
    let (size, count) = (state.knobs.dotenv_size, state.knobs.dotenv_variables);
    let checked = (|| {
        let content = || std::fs::read(&*received.path).unwrap_or_default();
        let life = expire_in.as_deref().map(artifact_rules::expire_in).transpose()?;
        let variables = match kind.as_str() {
            "dotenv" => artifact_rules::dotenv(&content(), size, count)?,
            "annotations" => artifact_rules::annotations(&content()).map(|()| Vec::new())?,
            _ => Vec::new(),
        };
        pair?;
        if another {
            let text = "another artifact of the same type already exists";
            return Err(Fault::Words(text.to_owned()));
        }
        Ok((life.unwrap_or(Some(DEFAULT_LIFE)), variables))
    })();
    let (life, variables) = match checked {
        Ok(checked) => checked,
        Err(Fault::Parameter(text)) => return Reply::error(400, text),
        Err(Fault::Words(text)) => return Reply::message(400, &text),
    };
    if format == "zip" {
        for text in rules::in_archive(&received.path) {
            state.violation(format!("job {id}: {text}"));
        }
    }
    if let Some(job) = state.job_mut(id) {
        job.artifacts.push(Stored {
            kind,
            format,
            file_name: received.file_name.clone(),
            expire_in,
            bytes: received.bytes,
            sha256: received.sha256.clone(),
            path: Arc::clone(&received.path),
            expires_at: life.map(|life| now + life),
            variables,
        });
        job.announce();
    }
    Reply::plain(201)
}

/// As other job calls, but a token that has expired does not cost the job its life.
fn may_upload(state: &Known, id: i64, token: Option<&str>, now: Duration) -> Result<(), Reply> {
    let Some(job) = state.job(id) else { return Err(Reply::forbidden()) };
    if job.token.is_empty() || token != Some(job.token.as_str()) {
        return Err(Reply::forbidden());
    }
    if job.erased {
        return Err(Reply::message(403, "403 Forbidden - Job has been erased!"));
    }
    if !job.status.takes_calls() {
        let text = "403 Forbidden - Job is not processing on runner";
        return Err(Reply::message(403, text).with("Job-Status", job.status.name()));
    }
    if job.token_expired(now) {
        return Err(Reply::forbidden());
    }
    Ok(())
}

/// `GET /jobs/:id/artifacts`.
pub(super) async fn download(shared: &Shared, call: &Call) -> Response {
    let found = {
        let mut state = shared.lock();
        find(&mut state, shared, call)
    };
    match found {
        Ok(Found::Here(file, cut)) => send(&file, None, &call.headers, cut).await,
        Ok(Found::There(url)) => redirect(&url),
        Err(reply) => reply.into_response(),
    }
}

enum Found {
    Here(Stored, Option<u64>),
    There(String),
}

fn find(state: &mut Known, shared: &Shared, call: &Call) -> Result<Found, Reply> {
    let now = shared.clock.now();
    let asker = call
        .header("job-token")
        .and_then(|token| state.job_by_token.get(token))
        .and_then(|id| state.job(*id));
    let Some(asker) = asker else { return Err(Reply::message(401, "401 Unauthorized")) };
    let maker = call.job.and_then(|id| state.job(id));
    let Some(maker) = maker else { return Err(Reply::message(404, "404 Not Found")) };
    let running = asker.status.takes_calls() && !asker.token_expired(now);
    let itself = shared.options.version != Version::Current && asker.id == maker.id;
    if !running && !itself {
        return Err(Reply::forbidden());
    }
    // Another project's only if the job was told of them.
    if asker.project != maker.project && !asker.needs.contains(&maker.id) {
        return Err(Reply::forbidden());
    }
    let archive = maker.artifacts.iter().find(|one| one.kind == "archive" && one.is_there(now));
    let Some(archive) = archive.cloned() else {
        return Err(Reply::message(404, "404 Not Found"));
    };
    match state.storage_url.clone() {
        Some(storage) if call.query_param("direct_download").as_deref() == Some("true") => {
            let path = format!("/artifacts/{}/{}", random::letters(16), archive.file_name);
            let url = format!("{storage}{path}?X-Signature={}", random::letters(32));
            state.signed.insert(path, archive);
            Ok(Found::There(url))
        }
        _ => Ok(Found::Here(archive, state.download_cuts.pop_front())),
    }
}

fn redirect(url: &str) -> Response {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::FOUND;
    if let Ok(url) = HeaderValue::from_str(url) {
        response.headers_mut().insert(header::LOCATION, url);
    }
    response
}

/// Sends a file, or what of it is asked for; with a version in parts, too.
async fn send(
    file: &Stored,
    version: Option<&str>,
    headers: &HeaderMap,
    cut: Option<u64>,
) -> Response {
    let from = version.and_then(|version| asked_from(headers, version)).unwrap_or(0);
    if from > 0 && from >= file.bytes {
        return Reply::plain(416)
            .with("Content-Range", format!("bytes */{}", file.bytes))
            .into_response();
    }
    let opened = async {
        let mut opened = tokio::fs::File::open(&*file.path).await?;
        opened.seek(SeekFrom::Start(from)).await?;
        Ok::<_, io::Error>(opened)
    };
    let Ok(opened) = opened.await else { return Reply::plain(500).into_response() };
    let rest = file.bytes - from;
    let body = match cut.filter(|cut| *cut < rest) {
        None => Body::from_stream(ReaderStream::new(opened.take(rest))),
        Some(cut) => {
            let broken = stream::once(async {
                // What came before is flushed only when there is nothing to give for a moment.
                tokio::task::yield_now().await;
                Err::<Bytes, _>(io::Error::from(io::ErrorKind::ConnectionReset))
            });
            Body::from_stream(ReaderStream::new(opened.take(cut)).chain(broken))
        }
    };
    let mut response = Response::new(body);
    let fields = response.headers_mut();
    fields.insert(header::CONTENT_LENGTH, HeaderValue::from(rest));
    fields.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/zip"));
    if let Some(version) = version {
        fields.insert(header::ACCEPT_RANGES, HeaderValue::from_static("bytes"));
        if let Ok(version) = HeaderValue::from_str(version) {
            fields.insert(header::ETAG, version);
        }
    }
    if from > 0 {
        let range = format!("bytes {from}-{}/{}", file.bytes - 1, file.bytes);
        if let Ok(range) = HeaderValue::from_str(&range) {
            fields.insert(header::CONTENT_RANGE, range);
        }
        *response.status_mut() = StatusCode::PARTIAL_CONTENT;
    }
    response
}

fn asked_from(headers: &HeaderMap, version: &str) -> Option<u64> {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
    let current = text(header::IF_RANGE).is_none_or(|wanted| wanted == version);
    let from = text(header::RANGE)?.strip_prefix("bytes=")?.strip_suffix('-')?;
    from.parse().ok().filter(|_| current)
}

/// The second host.
pub(super) fn storage_router(shared: Arc<Shared>) -> Router {
    Router::new().fallback(at_storage).with_state(shared)
}

async fn at_storage(
    State(shared): State<Arc<Shared>>,
    ConnectInfo(Caller(line)): ConnectInfo<Caller>,
    request: Request,
) -> Response {
    let (parts, body) = request.into_parts();
    // All of it, as proxies do; nobody needs it here.
    let mut pieces = body.into_data_stream();
    while let Some(Ok(_piece)) = pieces.next().await {}
    let call = Call {
        endpoint: Endpoint::ObjectStorage,
        job: None,
        path: parts.uri.path().to_owned(),
        method: parts.method,
        query: parts.uri.query().unwrap_or_default().to_owned(),
        headers: parts.headers,
        body: Bytes::new(),
        update: None,
        upload: None,
    };
    api::meet(&shared, line, call).await
}

/// Serves what was signed; takes what is posted, and forgets it.
pub(super) async fn storage(shared: &Shared, call: &Call) -> Response {
    let found = {
        let mut state = shared.lock();
        for name in ["job-token", "authorization", "cookie", "private-token", "runner-token"] {
            if call.headers.contains_key(name) {
                state.violation(format!("{name} was sent to another host"));
            }
        }
        let found = state.signed.get(&call.path).cloned();
        let signed = call.query_param("X-Signature").is_some();
        found.filter(|_| signed).map(|file| (file, state.download_cuts.pop_front()))
    };
    match found {
        Some((file, cut)) => {
            let version = format!("\"{}\"", file.sha256);
            send(&file, Some(&version), &call.headers, cut).await
        }
        None if call.method == axum::http::Method::POST => Reply::plain(201).into_response(),
        None => Reply::plain(403).into_response(),
    }
}

impl Known {
    /// Says whether a job that another one needs has lost its artifacts.
    pub(super) fn lacks_dependency(&self, wish: &NewJob, now: Duration) -> bool {
        wish.needs.iter().filter_map(|id| self.job(*id)).any(|maker| {
            maker.artifacts_erased
                || maker.artifacts.iter().any(|one| one.kind == "archive" && !one.is_there(now))
        })
    }

    /// Gives a job what it has of the jobs that it needs.
    pub(super) fn add_dependencies(&self, wish: &mut NewJob, token: &str, version: Version) {
        for id in wish.needs.clone() {
            let Some(maker) = self.job(id) else { continue };
            let token = match version {
                Version::V16_11 | Version::V17_11 if !maker.token.is_empty() => &maker.token,
                Version::V16_11 | Version::V17_11 | Version::Current => token,
            };
            let mut entry = serde_json::json!({ "id": id, "name": &*maker.name, "token": token });
            if let Some(archive) = maker.artifacts.iter().find(|one| one.kind == "archive") {
                entry["artifacts_file"] = serde_json::json!({
                    "filename": archive.file_name, "size": archive.bytes,
                });
            }
            wish.dependencies.push(entry);
            let variables = maker.artifacts.iter().flat_map(|one| &one.variables);
            wish.variables.extend(variables.map(|(k, v)| Variable::new(k, v).public(false)));
        }
    }

    /// Keeps an artifact as if the job had uploaded it.
    pub(super) fn put_artifact(
        &mut self,
        id: i64,
        kind: &str,
        format: &str,
        file_name: &str,
        content: &[u8],
    ) -> io::Result<()> {
        let (mut file, path) = new_file()?;
        io::Write::write_all(&mut file, content)?;
        if let Some(job) = self.job_mut(id) {
            job.artifacts.push(Stored {
                kind: kind.to_owned(),
                format: format.to_owned(),
                file_name: file_name.to_owned(),
                expire_in: None,
                bytes: u64::try_from(content.len()).unwrap_or(u64::MAX),
                sha256: hex(&Sha256::digest(content)),
                path,
                expires_at: None,
                variables: Vec::new(),
            });
        }
        Ok(())
    }
}
