//! From an HTTP request to a handler and back, through the faults.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{ConnectInfo, DefaultBodyLimit, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use axum::response::Response;
use bytes::Bytes;

use super::artifacts::Received;
use super::door::{Caller, Line};
use super::fault::{Answer, Endpoint, What};
use super::job::Told;
use super::reply::Reply;
use super::state::{Recorded, Shared};
use super::update::Update;
use super::{artifacts, git, register, request, rules, runners_api, trace, update};

/// Larger than any patch or pack request a client has a reason to send.
const MAX_BODY: usize = 128 * 1024 * 1024;

pub(super) fn router(shared: Arc<Shared>) -> Router {
    // Routing by hand: the relative root and the project paths are known only at run time.
    // The bodies of artifacts go to files and have a limit of their own.
    Router::new().fallback(answer).layer(DefaultBodyLimit::disable()).with_state(shared)
}

/// A call, read completely.
#[derive(Debug)]
pub(super) struct Call {
    pub(super) endpoint: Endpoint,
    pub(super) job: Option<i64>,
    pub(super) method: Method,
    pub(super) path: String,
    pub(super) query: String,
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
    /// The body of a PUT.
    pub(super) update: Option<Result<Update, String>>,
    /// The body of an upload.
    pub(super) upload: Option<Result<Received, String>>,
}

impl Call {
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }

    /// A parameter of the query, decoded.
    pub(super) fn query_param(&self, name: &str) -> Option<String> {
        let mut pairs = url::form_urlencoded::parse(self.query.as_bytes());
        pairs.find(|(key, _)| key == name).map(|(_, value)| value.into_owned())
    }

    /// The name of an uploaded file.
    pub(super) fn upload_name(&self) -> Option<&str> {
        self.upload.as_ref()?.as_ref().ok().map(Received::file_name)
    }

    pub(super) fn is_json(&self) -> bool {
        self.content_type() == "application/json"
    }

    /// The media type without parameters.
    pub(super) fn content_type(&self) -> &str {
        let value = self.header("content-type").unwrap_or_default();
        value.split(';').next().unwrap_or_default().trim()
    }
}

/// What the path and method mean.
fn route(method: &Method, path: &str) -> (Endpoint, Option<i64>) {
    let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
    let unknown = (Endpoint::Unknown, None);
    match (method, parts.as_slice()) {
        (&Method::POST, ["runners"]) => (Endpoint::Register, None),
        (&Method::DELETE, ["runners"]) => (Endpoint::Unregister, None),
        (&Method::POST, ["runners", "verify"]) => (Endpoint::Verify, None),
        (&Method::DELETE, ["runners", "managers"]) => (Endpoint::UnregisterManager, None),
        (&Method::POST, ["runners", "reset_authentication_token"]) => (Endpoint::ResetToken, None),
        (&Method::POST, ["jobs", "request"]) => (Endpoint::Request, None),
        (&Method::GET, ["job"]) => (Endpoint::JobInfo, None),
        (&Method::PUT, ["jobs", id]) => match id.parse() {
            Ok(id) => (Endpoint::Update, Some(id)),
            Err(_) => unknown,
        },
        (&Method::PATCH, ["jobs", id, "trace"]) => match id.parse() {
            Ok(id) => (Endpoint::Patch, Some(id)),
            Err(_) => unknown,
        },
        (&Method::POST, ["jobs", id, "artifacts"]) => match id.parse() {
            Ok(id) => (Endpoint::UploadArtifact, Some(id)),
            Err(_) => unknown,
        },
        (&Method::GET, ["jobs", id, "artifacts"]) => match id.parse() {
            Ok(id) => (Endpoint::DownloadArtifact, Some(id)),
            Err(_) => unknown,
        },
        (method, parts) => (runners_api::route(method, parts).unwrap_or(Endpoint::Unknown), None),
    }
}

async fn answer(
    State(shared): State<Arc<Shared>>,
    ConnectInfo(Caller(line)): ConnectInfo<Caller>,
    request: Request,
) -> Response {
    let (parts, body) = request.into_parts();
    let path = parts.uri.path();
    let Some(path) = path.strip_prefix(shared.options.root.as_str()) else {
        return Reply::error(404, "404 Not Found").into_response();
    };
    if let Some((Endpoint::UploadArtifact, job)) =
        path.strip_prefix("/api/v4").map(|rest| route(&parts.method, rest))
    {
        let path = path.strip_prefix("/api/v4").unwrap_or(path).to_owned();
        return take_file(&shared, line, job, path, Request::from_parts(parts, body)).await;
    }
    let Ok(body) = axum::body::to_bytes(body, MAX_BODY).await else {
        return Reply::error(413, "413 Request Entity Too Large").into_response();
    };
    let api = path.strip_prefix("/api/v4");
    let (mut endpoint, job) = match api {
        Some(rest) => route(&parts.method, rest),
        None if git::is_git(path) => (Endpoint::Git, None),
        None => (Endpoint::Unknown, None),
    };
    let update = (endpoint == Endpoint::Update).then(|| Update::read(&body));
    if let Some(Ok(update)) = &update
        && update.is_final()
    {
        endpoint = Endpoint::FinalUpdate;
    }
    let call = Call {
        endpoint,
        job,
        path: api.unwrap_or(path).to_owned(),
        method: parts.method,
        query: parts.uri.query().unwrap_or_default().to_owned(),
        headers: parts.headers,
        body,
        update,
        upload: None,
    };
    meet(&shared, line, call).await
}

/// Takes a call whose body is written to a file as it comes.
async fn take_file(
    shared: &Arc<Shared>,
    line: Arc<Line>,
    job: Option<i64>,
    path: String,
    request: Request,
) -> Response {
    let method = request.method().clone();
    let query = request.uri().query().unwrap_or_default().to_owned();
    let headers = request.headers().clone();
    let Some(upload) = artifacts::receive(shared, &line, request).await else {
        shared.anything.notify_waiters();
        return Response::new(Body::empty());
    };
    let call = Call {
        endpoint: Endpoint::UploadArtifact,
        job,
        path,
        method,
        query,
        headers,
        body: Bytes::new(),
        update: None,
        upload: Some(upload),
    };
    meet(shared, line, call).await
}

/// Counts the call, lets a fault happen to it, and does what it asks.
pub(super) async fn meet(shared: &Arc<Shared>, line: Arc<Line>, call: Call) -> Response {
    let fault = {
        let mut state = shared.lock();
        state.requests.count(call.endpoint);
        rules::on_call(&mut state, &call);
        state.faults.take(call.endpoint, call.job)
    };
    // A call that is held is seen by those who wait for it.
    shared.anything.notify_waiters();
    let Some(fault) = fault else {
        return answer_call(shared, &line, &call, None).await;
    };
    if fault.delay.is_none() && fault.gate.is_none() {
        return answer_call(shared, &line, &call, Some(fault.what)).await;
    }
    // A task of its own: GitLab goes on with a call also when nobody waits for the answer.
    let shared = Arc::clone(shared);
    let tasks = shared.tasks.clone();
    let task = tasks.spawn(async move {
        let pause = async {
            if let Some(delay) = fault.delay {
                tokio::time::sleep(delay).await;
            }
            if let Some(gate) = fault.gate {
                gate.pass().await;
            }
        };
        match shared.shutdown.run_until_cancelled(pause).await {
            Some(()) => answer_call(&shared, &line, &call, Some(fault.what)).await,
            None => cut(&line),
        }
    });
    task.await.unwrap_or_else(|_| Reply::message(500, "500 Internal Server Error").into_response())
}

async fn answer_call(
    shared: &Arc<Shared>,
    line: &Arc<Line>,
    call: &Call,
    what: Option<What>,
) -> Response {
    match &what {
        Some(What::ResetBefore) => {
            after(shared, line, call, 0, false);
            return cut(line);
        }
        Some(What::Instead(answer)) => {
            after(shared, line, call, answer.status, false);
            return made_up(answer);
        }
        None
        | Some(What::Nothing | What::After(_) | What::LostAnswer | What::Truncated | What::Html) => {
        }
    }
    // Whoever met a fault, be it only a delay, may not have read the answer.
    let surely = what.is_none();
    let what = what.unwrap_or(What::Nothing);
    if call.endpoint == Endpoint::Git {
        // Boxed: much larger than the futures of the common calls.
        let response = Box::pin(git::serve(shared, call)).await;
        after(shared, line, call, response.status().as_u16(), surely);
        return bend_git(line, &what, response);
    }
    if matches!(call.endpoint, Endpoint::DownloadArtifact | Endpoint::ObjectStorage) {
        let response = if call.endpoint == Endpoint::DownloadArtifact {
            Box::pin(artifacts::download(shared, call)).await
        } else {
            Box::pin(artifacts::storage(shared, call)).await
        };
        after(shared, line, call, response.status().as_u16(), surely);
        return bend_git(line, &what, response);
    }
    let mut reply = effect(shared, call).await;
    after(shared, line, call, reply.status, surely);
    match what {
        What::Nothing | What::ResetBefore | What::Instead(_) => reply.into_response(),
        What::After(answer) => made_up(&answer),
        What::LostAnswer => cut(line),
        What::Truncated => reply.into_truncated(),
        What::Html => {
            reply.content_type = "text/html";
            reply.into_response()
        }
    }
}

async fn effect(shared: &Arc<Shared>, call: &Call) -> Reply {
    match call.endpoint {
        Endpoint::Register => register::register(shared, call),
        Endpoint::Verify => register::verify(shared, call),
        Endpoint::Unregister => register::unregister(shared, call),
        Endpoint::UnregisterManager => register::unregister_manager(shared, call),
        Endpoint::ResetToken => register::reset_token(shared, call),
        Endpoint::Request => request::request(shared, call).await,
        Endpoint::Update | Endpoint::FinalUpdate => update::update(shared, call),
        Endpoint::Patch => trace::patch(shared, call),
        Endpoint::JobInfo => update::job_info(shared, call),
        Endpoint::UploadArtifact => artifacts::upload(shared, call),
        Endpoint::CreateRunner | Endpoint::RunnersApi => runners_api::answer(shared, call),
        // Answers everybody, with a date; to those without a token of a user it says no more.
        Endpoint::Unknown if call.method == Method::GET && call.path == "/version" => {
            Reply::message(401, "401 Unauthorized")
        }
        Endpoint::Git
        | Endpoint::DownloadArtifact
        | Endpoint::ObjectStorage
        | Endpoint::Unknown => {
            let text = format!("call to an unknown address: {} {}", call.method, call.path);
            shared.lock().violation(text);
            Reply::error(404, "404 Not Found")
        }
    }
}

/// Notes what was answered, and over which connection, then tells those who wait.
fn after(shared: &Shared, line: &Arc<Line>, call: &Call, status: u16, surely: bool) {
    let now = shared.clock.now();
    {
        let mut state = shared.lock();
        if surely && (status < 400 || status == 403 || status == 416) {
            rules::on_answer(&mut state, call);
        }
        if let Some(job) = call.job.and_then(|id| state.job_mut(id)) {
            let told = || if surely { Told::over(line) } else { Told::default() };
            match (call.endpoint, status) {
                (Endpoint::Patch, 202) => job.patch_told = told(),
                (Endpoint::Patch, _) => job.patch_told = Told::default(),
                (Endpoint::FinalUpdate, 200) => job.final_told = told(),
                _ => {}
            }
            if status == 403
                && let Some(refused) = &mut job.refused
                && !refused.told.surely()
            {
                refused.told = told();
            }
            job.announce();
        }
        if state.recorded.is_some() {
            let Call { endpoint, job, .. } = *call;
            state.record(Recorded { endpoint, job, status, at: now, body: call.body.clone() });
        }
    }
    shared.anything.notify_waiters();
}

/// Breaks the connection; the response is never written to it.
fn cut(line: &Line) -> Response {
    line.cut();
    Response::new(Body::empty())
}

fn made_up(answer: &Answer) -> Response {
    let mut response = Response::new(Body::from(answer.body.clone()));
    *response.status_mut() =
        StatusCode::from_u16(answer.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    if answer.status != 204
        && let Ok(value) = HeaderValue::from_str(&answer.content_type)
    {
        response.headers_mut().insert(header::CONTENT_TYPE, value);
    }
    for (name, value) in &answer.headers {
        let name = HeaderName::from_bytes(name.as_bytes());
        let value = HeaderValue::from_str(value);
        if let (Ok(name), Ok(value)) = (name, value) {
            response.headers_mut().insert(name, value);
        }
    }
    response
}

/// Faults that come after the effect, for answers that are streams.
fn bend_git(line: &Line, what: &What, response: Response) -> Response {
    match what {
        What::Nothing | What::ResetBefore | What::Instead(_) | What::Html => response,
        What::LostAnswer | What::Truncated => cut(line),
        What::After(answer) => made_up(answer),
    }
}

/// Sleeps are real time, also when the clock was moved.
pub(super) async fn within<F: Future>(limit: Duration, future: F) -> Option<F::Output> {
    tokio::time::timeout(limit, future).await.ok()
}
