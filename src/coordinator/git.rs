//! git over HTTP, for as long as the job token is valid.
//!
//! A served repository is never written to: a bare repository of our own borrows its objects and
//! holds a copy of its refs, plus `refs/pipelines/*`, which GitLab makes for every pipeline.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use axum::body::Body;
use axum::http::{HeaderName, HeaderValue, Method, StatusCode};
use axum::response::Response;
use futures_util::StreamExt as _;
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::process::Command;
use tokio_util::io::ReaderStream;

use super::api::Call;
use super::lfs;
use super::reply::Reply;
use super::state::Shared;

/// Why a repository cannot be served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// git could not be started, or a file not be written.
    #[error("prepare {path} for serving")]
    Prepare {
        /// The repository.
        path: PathBuf,
        /// What went wrong.
        source: io::Error,
    },
    /// git refused.
    #[error("git {what} in {path} ended with {status}: {stderr}")]
    Git {
        /// git's subcommand.
        what: String,
        /// The repository.
        path: PathBuf,
        /// How git ended.
        status: ExitStatus,
        /// The first line it said about it.
        stderr: String,
    },
}

/// What went over the wire for one repository, without headers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GitTraffic {
    /// Requests, answered and refused.
    pub requests: u64,
    /// Requests for objects, as opposed to listings of refs.
    pub packs: u64,
    /// Bytes in answers.
    pub sent: u64,
}

#[derive(Debug, Default)]
struct Counters {
    requests: AtomicU64,
    packs: AtomicU64,
    sent: AtomicU64,
}

/// A repository that is served.
#[derive(Debug)]
pub(super) struct Repository {
    dir: TempDir,
    /// Where Git LFS keeps the objects of the one on disk.
    large: PathBuf,
    /// Whether job tokens of other projects may read it.
    pub(super) open: bool,
    traffic: Arc<Counters>,
    head: String,
    branch: Option<String>,
    pipelines: HashMap<i64, String>,
}

impl Repository {
    /// Makes our own bare repository beside the one on disk.
    pub(super) async fn open(path: &Path) -> Result<Self, ServeError> {
        let prepare = |source| ServeError::Prepare { path: path.to_owned(), source };
        let dir = TempDir::with_prefix("bridge-coordinator-").map_err(prepare)?;
        let bare = dir.path().join("repository.git");
        let format = git(path, &["rev-parse", "--show-object-format"]).await?;
        let common =
            git(path, &["rev-parse", "--path-format=absolute", "--git-common-dir"]).await?;
        let head = git(path, &["rev-parse", "--verify", "HEAD^{commit}"]).await?;
        let branch = git(path, &["rev-parse", "--abbrev-ref", "HEAD"]).await?;
        let branch = Some(branch).filter(|branch| branch != "HEAD");
        let refs = git(path, &["for-each-ref", "--format=%(objectname) %(refname)"]).await?;
        let format = format!("--object-format={format}");
        let target = bare.to_string_lossy();
        git(path, &["init", "--quiet", "--bare", &format, &target]).await?;

        let common = PathBuf::from(common);
        let objects = common.join("objects");
        let mut packed = String::new();
        for line in refs.lines() {
            let name = line.split_once(' ').map_or("", |(_, name)| name);
            if name.starts_with("refs/heads/") || name.starts_with("refs/tags/") {
                packed.push_str(line);
                packed.push('\n');
            }
        }
        let write = || {
            let alternates = format!("{}\n", objects.display());
            std::fs::create_dir_all(bare.join("objects/info"))?;
            std::fs::write(bare.join("objects/info/alternates"), alternates)?;
            std::fs::write(bare.join("packed-refs"), packed)?;
            let default = branch.as_deref().unwrap_or("main");
            std::fs::write(bare.join("HEAD"), format!("ref: refs/heads/{default}\n"))?;
            let shallow = common.join("shallow");
            if shallow.exists() {
                std::fs::copy(shallow, bare.join("shallow"))?;
            }
            std::fs::create_dir_all(bare.join("refs/pipelines"))
        };
        write().map_err(prepare)?;
        let large = common.join("lfs/objects");
        let traffic = Arc::default();
        Ok(Self { dir, large, open: false, traffic, head, branch, pipelines: HashMap::new() })
    }

    /// Takes over what holds for a project, however often its repository is looked at anew.
    pub(super) fn go_on_as(&mut self, before: &Self) {
        self.open = before.open;
        self.traffic = Arc::clone(&before.traffic);
    }

    /// What has been asked and answered so far.
    pub(super) fn traffic(&self) -> GitTraffic {
        GitTraffic {
            requests: self.traffic.requests.load(Ordering::Relaxed),
            packs: self.traffic.packs.load(Ordering::Relaxed),
            sent: self.traffic.sent.load(Ordering::Relaxed),
        }
    }

    /// HEAD's commit and branch.
    pub(super) fn head(&self) -> (&str, Option<&str>) {
        (&self.head, self.branch.as_deref())
    }

    /// Makes the ref that keeps a pipeline's commit reachable.
    pub(super) fn note_pipeline(&mut self, id: i64, sha: Option<&str>) -> io::Result<()> {
        let sha = sha.unwrap_or(&self.head);
        if self.pipelines.get(&id).is_some_and(|known| known == sha) {
            return Ok(());
        }
        let path = self.dir.path().join("repository.git/refs/pipelines").join(id.to_string());
        std::fs::write(path, format!("{sha}\n"))?;
        self.pipelines.insert(id, sha.to_owned());
        Ok(())
    }
}

/// Runs git for its answer.
async fn git(path: &Path, args: &[&str]) -> Result<String, ServeError> {
    let prepare = |source| ServeError::Prepare { path: path.to_owned(), source };
    let output = Command::new("git")
        .arg("-C")
        .arg(path)
        .args(args)
        .env("GIT_TERMINAL_PROMPT", "0")
        // Set where we are called from a hook; they would point to another repository.
        .env_remove("GIT_DIR")
        .env_remove("GIT_WORK_TREE")
        .env_remove("GIT_INDEX_FILE")
        .env_remove("GIT_OBJECT_DIRECTORY")
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await
        .map_err(prepare)?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        return Err(ServeError::Git {
            what: args.first().copied().unwrap_or_default().to_owned(),
            path: path.to_owned(),
            status: output.status,
            stderr: stderr.lines().next().unwrap_or_default().to_owned(),
        });
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Takes `/group/project.git/info/refs` apart.
fn split(path: &str) -> Option<(&str, &str)> {
    let (project, rest) = path.split_once(".git/")?;
    let known = matches!(
        rest,
        "info/refs" | "git-upload-pack" | "git-receive-pack" | "info/lfs/objects/batch"
    ) || rest.starts_with(LARGE_OBJECT);
    known.then(|| (project.trim_start_matches('/'), rest))
}

/// Where large objects are; as GitLab has it.
const LARGE_OBJECT: &str = "gitlab-lfs/objects/";

pub(super) fn is_git(path: &str) -> bool {
    split(path).is_some()
}

fn unauthorized() -> Response {
    let mut reply = Reply::plain(401).with("WWW-Authenticate", "Basic realm=\"GitLab\"");
    reply.body = "HTTP Basic: Access denied\n".into();
    reply.into_response()
}

fn refused(status: u16, text: &'static str) -> Response {
    let mut reply = Reply::plain(status);
    reply.body = text.into();
    reply.into_response()
}

/// Serves one request of git's smart protocol.
pub(super) async fn serve(shared: &Arc<Shared>, call: &Call) -> Response {
    let Some((project, rest)) = split(&call.path) else { return refused(404, "not found") };
    let (root, large, traffic) = {
        let state = shared.lock();
        let token = call.header("authorization").and_then(job_token);
        let id = token.and_then(|token| state.job_by_token.get(&token).copied());
        let Some(job) = id.and_then(|id| state.job(id)) else { return unauthorized() };
        if !job.status.takes_calls() || job.token_expired(shared.clock.now()) {
            return refused(403, "the job is not running\n");
        }
        let repository = state.repositories.get(project);
        if *job.project != *project && repository.is_none_or(|repository| !repository.open) {
            return refused(403, "the job belongs to another project\n");
        }
        let Some(repository) = repository else {
            return refused(404, "The project you were looking for could not be found\n");
        };
        (
            repository.dir.path().to_owned(),
            repository.large.clone(),
            Arc::clone(&repository.traffic),
        )
    };
    traffic.requests.fetch_add(1, Ordering::Relaxed);
    if rest == "info/lfs/objects/batch" {
        let base = format!("{}/{project}.git", shared.url.get().map_or("", String::as_str));
        let authorization = call.header("authorization").unwrap_or_default();
        let reply = lfs::batch(&large, &base, authorization, &call.body);
        traffic.sent.fetch_add(length(reply.body.len()), Ordering::Relaxed);
        return reply.into_response();
    }
    if let Some(oid) = rest.strip_prefix(LARGE_OBJECT) {
        let reply = lfs::object(&large, oid).await;
        traffic.sent.fetch_add(length(reply.body.len()), Ordering::Relaxed);
        return reply.into_response();
    }
    // Long requests come compressed, and only those for objects are long.
    let compressed = call.header("content-encoding").is_some();
    if rest == "git-upload-pack" && (compressed || contains(&call.body, b"command=fetch")) {
        traffic.packs.fetch_add(1, Ordering::Relaxed);
    }
    let pushes = rest == "git-receive-pack"
        || call.query_param("service").as_deref() == Some("git-receive-pack");
    if pushes {
        return refused(403, "You are not allowed to push code to this project.\n");
    }
    match backend(shared, call, &root, rest).await {
        Ok(response) => response.map(|body| {
            Body::from_stream(body.into_data_stream().inspect(move |piece| {
                if let Ok(piece) = piece {
                    traffic.sent.fetch_add(length(piece.len()), Ordering::Relaxed);
                }
            }))
        }),
        Err(error) => {
            tracing::warn!(%error, "git http-backend failed");
            refused(500, "git failed\n")
        }
    }
}

/// Runs `git http-backend` as the CGI program that it is.
async fn backend(
    shared: &Arc<Shared>,
    call: &Call,
    root: &Path,
    rest: &str,
) -> io::Result<Response> {
    let mut command = Command::new("git");
    command
        .arg("http-backend")
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .env("HOME", root)
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env("GIT_PROJECT_ROOT", root)
        .env("GIT_HTTP_EXPORT_ALL", "1")
        .env("PATH_INFO", format!("/repository.git/{rest}"))
        .env("REQUEST_METHOD", if call.method == Method::POST { "POST" } else { "GET" })
        .env("QUERY_STRING", &call.query)
        .env("CONTENT_TYPE", call.header("content-type").unwrap_or_default())
        .env("CONTENT_LENGTH", call.body.len().to_string())
        .env("REMOTE_USER", "gitlab-ci-token")
        .env("REMOTE_ADDR", "127.0.0.1");
    if let Some(encoding) = call.header("content-encoding") {
        command.env("HTTP_CONTENT_ENCODING", encoding);
    }
    if let Some(protocol) = call.header("git-protocol") {
        command.env("GIT_PROTOCOL", protocol);
    }
    // As GitLab does: any commit may be fetched by its hash, and partial clones work.
    let config = [
        ("uploadpack.allowAnySHA1InWant", "true"),
        ("uploadpack.allowFilter", "true"),
        ("safe.directory", "*"),
    ];
    command.env("GIT_CONFIG_COUNT", config.len().to_string());
    for (at, (key, value)) in config.iter().enumerate() {
        command.env(format!("GIT_CONFIG_KEY_{at}"), key);
        command.env(format!("GIT_CONFIG_VALUE_{at}"), value);
    }
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()?;
    let missing = || io::Error::other("pipe is missing");
    let mut stdin = child.stdin.take().ok_or_else(missing)?;
    let stdout = child.stdout.take().ok_or_else(missing)?;
    let body = call.body.clone();
    // Beside the reading: git may answer before it has read everything.
    shared.tasks.spawn(async move {
        if let Err(error) = stdin.write_all(&body).await {
            tracing::debug!(%error, "git did not read the whole request");
        }
    });
    let mut reader = BufReader::new(stdout);
    let mut response = Response::new(Body::empty());
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).await? == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof));
        }
        let line = line.trim_end();
        let Some((name, value)) = line.split_once(':') else { break };
        let value = value.trim();
        if name.eq_ignore_ascii_case("status") {
            let code = value.split(' ').next().and_then(|code| code.parse().ok());
            *response.status_mut() = code
                .and_then(|code: u16| StatusCode::from_u16(code).ok())
                .unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        } else if let (Ok(name), Ok(value)) =
            (HeaderName::from_bytes(name.as_bytes()), HeaderValue::from_str(value))
        {
            response.headers_mut().insert(name, value);
        }
    }
    *response.body_mut() = Body::from_stream(ReaderStream::new(reader));
    // git ends with its output; the runtime collects it then.
    shared.tasks.spawn(async move {
        if let Err(error) = child.wait().await {
            tracing::debug!(%error, "cannot wait for git");
        }
    });
    Ok(response)
}

fn length(len: usize) -> u64 {
    u64::try_from(len).unwrap_or(u64::MAX)
}

fn contains(text: &[u8], word: &[u8]) -> bool {
    text.windows(word.len()).any(|window| window == word)
}

/// Takes the job token out of `Basic …`.
fn job_token(header: &str) -> Option<String> {
    let (scheme, encoded) = header.split_once(' ')?;
    if !scheme.eq_ignore_ascii_case("basic") {
        return None;
    }
    let text = String::from_utf8(base64(encoded.trim())?).ok()?;
    let (user, password) = text.split_once(':')?;
    (user == "gitlab-ci-token").then(|| password.to_owned())
}

/// Decodes base64; `None` for anything else.
fn base64(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    let (mut buffer, mut bits) = (0_u32, 0);
    for byte in text.trim_end_matches('=').bytes() {
        let value = match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        buffer = (buffer << 6) | u32::from(value);
        bits += 6;
        if bits >= 8 {
            bits -= 8;
            bytes.push(u8::try_from((buffer >> bits) & 0xff).ok()?);
        }
    }
    Some(bytes)
}
