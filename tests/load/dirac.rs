//! The grid of the benchmark: a bed with a DiracX and its site, and a proxy that counts what it is asked.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::response::Response;
use serde_json::{Value, json};
use tokio_util::task::TaskTracker;

/// A DiracX that ends with the benchmark.
pub(crate) struct Grid {
    dir: tempfile::TempDir,
    url: String,
    proxy: Proxy,
}

/// Passes on what bridge asks; workers ask the server itself.
#[derive(Clone)]
struct Proxy {
    url: String,
    to: String,
    http: reqwest::Client,
    asked: Arc<Mutex<BTreeMap<String, usize>>>,
    tasks: TaskTracker,
}

impl Grid {
    pub(crate) async fn start(slots: usize) -> Self {
        let dir = tempfile::Builder::new().prefix("bed").tempdir().expect("a temporary folder");
        let output = bed()
            .args([
                "start",
                "--slots",
                &slots.to_string(),
                "--for",
                &std::process::id().to_string(),
            ])
            .arg("--dir")
            .arg(dir.path().join("d"))
            .stderr(Stdio::inherit())
            .output()
            .expect("tests/beds/dirac");
        assert!(output.status.success(), "the DIRAC bed does not start");
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let url = said.lines().find_map(|line| line.strip_prefix("DIRACX_URL="));
        let url = url.expect("the bed's address").to_owned();
        let proxy = Proxy::before(&url).await;
        Self { dir, url, proxy }
    }

    fn token_file(&self) -> PathBuf {
        self.dir.path().join("d/state/ci-robot.token")
    }

    /// Gives the backend's table.
    pub(crate) fn config(&self) -> String {
        format!(
            "kind = \"dirac\"\nurl = \"{}\"\nworker_url = \"{}\"\ntoken_file = \"{}\"",
            self.proxy.url,
            self.url,
            self.token_file().display()
        )
    }

    /// Gives what bridge asked so far, by kind.
    pub(crate) fn asked(&self) -> BTreeMap<String, usize> {
        self.proxy.asked.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Gives when each job began and ended by its own word in DIRAC's history, by DIRAC's number.
    pub(crate) async fn told(&self) -> BTreeMap<u64, (f64, f64)> {
        let token = std::fs::read_to_string(self.token_file()).expect("the token");
        let body = json!({
            "parameters": ["JobID", "LoggingInfo"],
            "search": [{"parameter": "Owner", "operator": "eq", "value": "ci-robot"}],
        });
        let answer = self
            .proxy
            .http
            .post(format!("{}/api/jobs/search?page=1&per_page=10000", self.url))
            .bearer_auth(token.trim())
            .header("content-type", "application/json")
            .body(body.to_string())
            .send()
            .await
            .expect("an answer of the bed");
        let rows: Vec<Value> =
            serde_json::from_slice(&answer.bytes().await.expect("an answer")).expect("rows");
        let told = |row: &Value, word: &str| {
            let line = row["LoggingInfo"].as_array()?.iter().find(|line| {
                line["ApplicationStatus"].as_str().is_some_and(|text| text.starts_with(word))
            })?;
            let text = line["StatusTime"].as_str()?;
            let time: Option<jiff::Timestamp> =
                text.parse().or_else(|_no_zone| format!("{text}Z").parse()).ok();
            Some(time?.as_duration().as_secs_f64())
        };
        rows.iter()
            .filter_map(|row| {
                let times = (told(row, "bridge: running")?, told(row, "bridge: ended")?);
                Some((row["JobID"].as_u64()?, times))
            })
            .collect()
    }
}

impl Drop for Grid {
    fn drop(&mut self) {
        drop(bed().args(["stop", "--dir"]).arg(self.dir.path().join("d")).status());
    }
}

fn bed() -> Command {
    Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/beds/dirac"))
}

impl Proxy {
    async fn before(to: &str) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let _was_installed_before = rustls::crypto::ring::default_provider().install_default();
        let http = reqwest::Client::builder()
            .no_proxy()
            .tls_certs_only([])
            .redirect(reqwest::redirect::Policy::none())
            // A kept connection fails now and then, which would be laid at bridge's door.
            .pool_max_idle_per_host(0)
            .build()
            .expect("a client");
        let asked = Arc::default();
        let proxy = Self { url, to: to.to_owned(), http, asked, tasks: TaskTracker::new() };
        let app = Router::new().fallback(pass).with_state(proxy.clone());
        proxy.tasks.spawn(async move {
            if let Err(error) = axum::serve(listener, app).await {
                panic!("the counting proxy ended: {error}");
            }
        });
        proxy
    }
}

/// Names the kind of a request: its method and path, with `N` for numbers.
fn kind(method: &str, path: &str) -> String {
    let words = path.split('/').map(|word| {
        let number = !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_digit());
        if number { "N" } else { word }
    });
    format!("{method} {}", words.collect::<Vec<_>>().join("/"))
}

async fn pass(State(proxy): State<Proxy>, request: Request) -> Response {
    let (head, body) = request.into_parts();
    let body = axum::body::to_bytes(body, 1 << 30).await.expect("a request");
    let kind = kind(head.method.as_str(), head.uri.path());
    *proxy.asked.lock().unwrap_or_else(PoisonError::into_inner).entry(kind).or_default() += 1;
    let target = head.uri.path_and_query().map_or("/", |path| path.as_str());
    let mut ask = proxy.http.request(head.method, format!("{}{target}", proxy.to)).body(body);
    for (name, value) in &head.headers {
        if !matches!(name.as_str(), "host" | "content-length" | "connection" | "transfer-encoding")
        {
            ask = ask.header(name, value);
        }
    }
    let Ok(answer) = ask.send().await else {
        let response = Response::builder().status(502).body(Body::from("no server"));
        return response.expect("a plain answer");
    };
    let (status, headers) = (answer.status(), answer.headers().clone());
    let mut response = Response::new(Body::from(answer.bytes().await.unwrap_or_default()));
    *response.status_mut() = status;
    for (name, value) in &headers {
        if !matches!(name.as_str(), "content-length" | "connection" | "transfer-encoding") {
            response.headers_mut().insert(name, value.clone());
        }
    }
    response
}
