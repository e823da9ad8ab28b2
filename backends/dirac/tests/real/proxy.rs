//! Stands between the backend and the server: counts, loses and changes what passes.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::Response;
use tokio::sync::Semaphore;
use tokio_util::task::TaskTracker;

/// What happens to a request whose method and path begin like this.
#[derive(Clone, Debug)]
pub(crate) enum Mischief {
    /// It never arrives, and the connection ends.
    LoseQuestion,
    /// It arrives, and the connection ends instead of an answer.
    LoseAnswer,
    /// It is answered so.
    Say(u16, &'static str),
    /// Half of its answer comes, and then the connection ends.
    Cut,
    /// In its answer every job has this status.
    Status(String),
    /// It waits here until this is closed.
    Hold(Arc<Semaphore>),
}

#[derive(Default)]
struct Inner {
    asked: BTreeMap<String, usize>,
    mischief: Vec<(&'static str, Mischief)>,
    away: bool,
    store: Option<String>,
}

/// A proxy before a bed's server.
#[derive(Clone)]
pub(crate) struct Proxy {
    pub(crate) url: String,
    inner: Arc<Mutex<Inner>>,
    to: String,
    http: reqwest::Client,
    tasks: TaskTracker,
}

impl Proxy {
    pub(crate) async fn before(to: &str) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let http = reqwest::Client::builder()
            .no_proxy()
            .tls_certs_only([])
            .redirect(reqwest::redirect::Policy::none())
            .build()
            .unwrap();
        let proxy =
            Self { url, inner: Arc::default(), to: to.to_owned(), http, tasks: TaskTracker::new() };
        let app = Router::new().fallback(pass).with_state(proxy.clone());
        proxy.tasks.spawn(async move { axum::serve(listener, app).await.unwrap() });
        proxy
    }

    /// Does this to the next request that begins so; a star stands for the rest of one part of the path.
    pub(crate) fn next(&self, begin: &'static str, mischief: Mischief) {
        self.inner.lock().unwrap().mischief.push((begin, mischief));
    }

    /// Stands before the store of sandboxes as well, whose requests then begin with `/store`.
    pub(crate) fn also_before_the_store(&self) {
        let (host, port) = self.to.rsplit_once(':').unwrap();
        let port: u16 = port.parse().unwrap();
        self.inner.lock().unwrap().store = Some(format!("{host}:{}", port + 1));
    }

    /// Loses every question, or lets them pass again.
    pub(crate) fn away(&self, away: bool) {
        self.inner.lock().unwrap().away = away;
    }

    /// Says whether all mischief was done.
    pub(crate) fn is_honest(&self) -> bool {
        self.inner.lock().unwrap().mischief.is_empty()
    }

    pub(crate) fn asked(&self) -> usize {
        self.inner.lock().unwrap().asked.values().sum()
    }

    pub(crate) fn asked_of(&self, begin: &str) -> usize {
        let inner = self.inner.lock().unwrap();
        inner.asked.iter().filter(|(what, _)| what.starts_with(begin)).map(|(_, n)| n).sum()
    }
}

fn begins(what: &str, begin: &str) -> bool {
    let Some((begin, rest)) = begin.split_once('*') else { return what.starts_with(begin) };
    let Some(part) = what.strip_prefix(begin) else { return false };
    part.split_once('/').is_some_and(|(_, tail)| format!("/{tail}").starts_with(rest))
}

/// A body that breaks off, and its connection with it.
fn broken() -> Response {
    let stream =
        futures_util::stream::once(async { Err::<Bytes, _>(std::io::Error::other("cut")) });
    let mut response = Response::new(Body::from_stream(stream));
    response.headers_mut().insert("content-length", "5".parse().unwrap());
    response
}

async fn pass(State(proxy): State<Proxy>, request: Request) -> Response {
    let (head, body) = request.into_parts();
    let body = axum::body::to_bytes(body, 1 << 30).await.unwrap();
    let target = head.uri.path_and_query().map_or("/", |path| path.as_str()).to_owned();
    let what = format!("{} {target}", head.method);
    let (mischief, store) = {
        let mut inner = proxy.inner.lock().unwrap();
        *inner.asked.entry(what.clone()).or_default() += 1;
        let at = inner.mischief.iter().position(|(begin, _)| begins(&what, begin));
        let mischief = at.map(|at| inner.mischief.remove(at).1);
        (if inner.away { Some(Mischief::LoseQuestion) } else { mischief }, inner.store.clone())
    };
    match &mischief {
        Some(Mischief::LoseQuestion) => return broken(),
        Some(Mischief::Say(status, text)) => {
            let mut response = Response::new(Body::from(*text));
            *response.status_mut() = StatusCode::from_u16(*status).unwrap();
            return response;
        }
        Some(Mischief::Hold(gate)) => assert!(gate.acquire().await.is_err(), "it is only closed"),
        Some(Mischief::LoseAnswer | Mischief::Cut | Mischief::Status(_)) | None => {}
    }
    let to = match (&store, target.strip_prefix("/store")) {
        (Some(store), Some(rest)) => format!("{store}{rest}"),
        (Some(_), None) | (None, _) => format!("{}{target}", proxy.to),
    };
    let mut ask = proxy.http.request(head.method, to).body(body);
    for (name, value) in &head.headers {
        if !matches!(name.as_str(), "host" | "content-length" | "connection" | "transfer-encoding")
        {
            ask = ask.header(name, value);
        }
    }
    let Ok(answer) = ask.send().await else {
        return Response::builder().status(502).body(Body::from("no server")).unwrap();
    };
    let (status, headers) = (answer.status(), answer.headers().clone());
    let mut bytes = answer.bytes().await.unwrap_or_default();
    if let Some(store) = &store
        && target.starts_with("/api/jobs/sandbox")
    {
        let text = String::from_utf8_lossy(&bytes).replace(store, &format!("{}/store", proxy.url));
        bytes = Bytes::from(text);
    }
    match mischief {
        Some(Mischief::LoseAnswer) => return broken(),
        Some(Mischief::Cut) => {
            let half = bytes.slice(..bytes.len() / 2);
            let stream = futures_util::stream::iter([
                Ok(half),
                Err::<Bytes, _>(std::io::Error::other("cut")),
            ]);
            let mut response = Response::new(Body::from_stream(stream));
            response.headers_mut().insert("content-length", bytes.len().into());
            return response;
        }
        Some(Mischief::Status(word)) => {
            let text = String::from_utf8_lossy(&bytes).into_owned();
            let mut parts = text.split("\"Status\":\"");
            let mut changed = parts.next().unwrap_or_default().to_owned();
            for part in parts {
                let (_, rest) = part.split_once('"').unwrap();
                changed.extend(["\"Status\":\"", word.as_str(), "\"", rest]);
            }
            bytes = Bytes::from(changed);
        }
        Some(Mischief::LoseQuestion | Mischief::Say(..) | Mischief::Hold(_)) | None => {}
    }
    let mut response = Response::new(Body::from(bytes));
    *response.status_mut() = status;
    for (name, value) in &headers {
        if !matches!(name.as_str(), "content-length" | "connection" | "transfer-encoding") {
            response.headers_mut().insert(name, value.clone());
        }
    }
    response
}
