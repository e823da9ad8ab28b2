//! The coordinator met by a plain HTTP client.

mod artifacts;
mod cancelling;
mod faults;
mod git_http;
mod queue;
mod requesting;
mod runners;
mod runners_api;
mod silence;
mod strict;
mod tracing_jobs;
mod updating;

use std::sync::Once;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use reqwest::{Method, RequestBuilder, Response};
use serde_json::{Value, json};

use super::{Coordinator, NewJob, Options, RunnerOptions};

const SOON: Duration = Duration::from_secs(10);
const MINUTE: Duration = Duration::from_secs(60);

static REQUESTS: AtomicU64 = AtomicU64::new(1);

/// A coordinator with one runner, and a client that behaves.
struct Bed {
    gitlab: Coordinator,
    token: String,
    http: reqwest::Client,
    features: Value,
}

/// A job that was handed out.
struct Job {
    id: i64,
    token: String,
    payload: Value,
}

impl Bed {
    async fn new() -> Self {
        Self::with(Options::default()).await
    }

    async fn with(options: Options) -> Self {
        let gitlab = Coordinator::start(options).await.unwrap();
        let token = gitlab.add_runner(RunnerOptions::default());
        let features: serde_json::Map<String, Value> =
            super::rules::FEATURES.iter().map(|name| ((*name).to_owned(), json!(true))).collect();
        Self { gitlab, token, http: client(), features: Value::Object(features) }
    }

    /// Claims or denies a feature from now on.
    fn feature(mut self, name: &str, on: bool) -> Self {
        self.features[name] = json!(on);
        self
    }

    fn call(&self, method: Method, path: &str) -> RequestBuilder {
        let id = REQUESTS.fetch_add(1, Ordering::Relaxed);
        self.http
            .request(method, format!("{}/api/v4{path}", self.gitlab.url()))
            .header("user-agent", "bridge test")
            .header("x-request-id", format!("{id:032x}"))
    }

    fn info(&self) -> Value {
        json!({ "name": "bridge", "version": "0.1", "executor": "custom",
                "features": self.features, "config": { "gpus": "" } })
    }

    fn asking(&self, last_update: Option<&str>) -> RequestBuilder {
        let mut body = json!({
            "token": self.token, "system_id": "s_0123456789ab", "info": self.info(),
        });
        if let Some(value) = last_update {
            body["last_update"] = json!(value);
        }
        self.call(Method::POST, "/jobs/request").json(&body)
    }

    async fn ask(&self) -> Response {
        self.asking(None).send().await.unwrap()
    }

    async fn verify(&self) -> Response {
        let body = json!({
            "token": self.token, "system_id": "s_0123456789ab", "info": self.info(),
        });
        self.call(Method::POST, "/runners/verify").json(&body).send().await.unwrap()
    }

    /// Enqueues a job and takes it.
    async fn take(&self, job: NewJob) -> Job {
        let id = self.gitlab.enqueue(job);
        let answer = self.ask().await;
        assert_eq!(answer.status(), 201);
        let payload: Value = answer.json().await.unwrap();
        assert_eq!(payload["id"], json!(id));
        Job { id, token: payload["token"].as_str().unwrap().to_owned(), payload }
    }

    fn putting(&self, job: &Job, state: &str, more: Value) -> RequestBuilder {
        let mut body = json!({ "token": job.token, "info": self.info(), "state": state,
                               "output": {} });
        super::new_job::merge(&mut body, more);
        self.call(Method::PUT, &format!("/jobs/{}", job.id))
            .header("job-token", &job.token)
            .json(&body)
    }

    async fn put(&self, job: &Job, state: &str, more: Value) -> Response {
        self.putting(job, state, more).send().await.unwrap()
    }

    fn patching(&self, job: &Job, start: usize, text: &str) -> RequestBuilder {
        let range = format!("{start}-{}", start + text.len() - 1);
        self.call(Method::PATCH, &format!("/jobs/{}/trace?debug_trace=false", job.id))
            .header("job-token", &job.token)
            .header("content-type", "text/plain")
            .header("content-range", range)
            .body(text.to_owned())
    }

    async fn patch(&self, job: &Job, start: usize, text: &str) -> Response {
        self.patching(job, start, text).send().await.unwrap()
    }

    /// Says `success` with what belongs to the trace.
    async fn succeed(&self, job: &Job, trace: &str) -> Response {
        self.put(job, "success", output(trace)).await
    }

    fn assert_well_behaved(&self) {
        assert_eq!(self.gitlab.final_violations(), Vec::<String>::new());
    }

    /// The one violation there is.
    fn violation(&self) -> String {
        let list = self.gitlab.violations();
        assert_eq!(list.len(), 1, "{list:#?}");
        list[0].clone()
    }
}

fn client() -> reqwest::Client {
    static PROVIDER: Once = Once::new();
    PROVIDER.call_once(|| {
        // Another test's client may have been first.
        drop(rustls::crypto::ring::default_provider().install_default());
    });
    reqwest::Client::builder()
        .timeout(Duration::from_secs(30))
        .no_proxy()
        .redirect(reqwest::redirect::Policy::none())
        .build()
        .unwrap()
}

fn checksum(trace: &str) -> String {
    format!("crc32:{:08x}", crc32fast::hash(trace.as_bytes()))
}

fn output(trace: &str) -> Value {
    json!({ "output": { "checksum": checksum(trace), "bytesize": trace.len() } })
}

fn header(answer: &Response, name: &str) -> Option<String> {
    answer.headers().get(name).map(|value| value.to_str().unwrap().to_owned())
}

#[tokio::test]
async fn a_job_goes_from_the_queue_to_success() {
    let bed = Bed::new().await;
    assert_eq!(bed.verify().await.status(), 200);
    let job = bed.take(NewJob::new("build").script("make")).await;
    assert_eq!(bed.put(&job, "running", json!({})).await.status(), 200);
    let answer = bed.patch(&job, 0, "hello\n").await;
    assert_eq!(answer.status(), 202);
    assert_eq!(header(&answer, "range").as_deref(), Some("0-6"));
    assert_eq!(header(&answer, "job-status").as_deref(), Some("running"));
    assert_eq!(header(&answer, "x-gitlab-trace-update-interval").as_deref(), Some("60"));
    let answer = bed.succeed(&job, "hello\n").await;
    assert_eq!(answer.status(), 200);
    assert_eq!(header(&answer, "job-status").as_deref(), Some("success"));
    assert_eq!(answer.text().await.unwrap(), "200");

    let view = bed.gitlab.wait_finished(job.id, SOON).await.unwrap();
    assert_eq!(view.status, super::Status::Success);
    assert_eq!(view.trace_text(), "hello\n");
    assert_eq!((view.updates, view.patches, view.finals), (1, 1, 1));
    assert!(view.pending_at <= view.assigned_at.unwrap());
    assert!(view.assigned_at <= view.running_at);
    assert!(view.running_at <= view.finished_at);
    assert_eq!(bed.gitlab.counts().finished(), 1);
    bed.gitlab.wait_all_finished(SOON).await.unwrap();
    bed.assert_well_behaved();
    bed.gitlab.stop().await;
}

#[tokio::test]
async fn everything_is_below_the_relative_root() {
    let bed = Bed::with(Options { root: "/gitlab/".to_owned(), ..Options::default() }).await;
    assert!(bed.gitlab.url().ends_with("/gitlab"));
    let job = bed.take(NewJob::new("build")).await;
    let url = job.payload["git_info"]["repo_url"].as_str().unwrap();
    assert!(url.ends_with("/gitlab/hep/tracker.git"), "{url}");
    let outside = bed.gitlab.url().replace("/gitlab", "/api/v4/job");
    assert_eq!(bed.http.get(outside).send().await.unwrap().status(), 404);
}

#[tokio::test]
async fn an_unknown_address_is_a_violation() {
    let bed = Bed::new().await;
    let answer = bed.call(Method::GET, "/nowhere").send().await.unwrap();
    assert_eq!(answer.status(), 404);
    assert_eq!(answer.json::<Value>().await.unwrap(), json!({ "error": "404 Not Found" }));
    assert_eq!(bed.violation(), "call to an unknown address: GET /nowhere");
}

#[tokio::test]
async fn missing_headers_are_violations() {
    let bed = Bed::new().await;
    let url = format!("{}/api/v4/jobs/request", bed.gitlab.url());
    let body = json!({ "token": bed.token, "system_id": "s_1", "info": bed.info() });
    bed.http.post(&url).body(body.to_string()).send().await.unwrap();
    let found = bed.gitlab.violations().join("\n");
    assert!(found.contains("Request without User-Agent"), "{found}");
    assert!(found.contains("Request without X-Request-Id"), "{found}");
    assert!(found.contains("Request with Content-Type ``"), "{found}");
}

#[tokio::test]
async fn a_request_id_is_for_one_call() {
    let bed = Bed::new().await;
    let id = "0123456789abcdef0123456789abcdef";
    for _ in 0..2 {
        let call = bed.asking(None).header("x-request-id", id).build().unwrap();
        let mut call = call;
        call.headers_mut().insert("x-request-id", id.parse().unwrap());
        bed.http.execute(call).await.unwrap();
    }
    assert!(bed.violation().contains("of an earlier call"));
}

#[tokio::test]
async fn calls_are_counted_and_recorded() {
    let bed = Bed::with(Options { record: true, ..Options::default() }).await;
    bed.verify().await;
    bed.ask().await;
    bed.ask().await;
    let requests = bed.gitlab.requests();
    assert_eq!(requests.of(super::Endpoint::Request), 2);
    assert_eq!(requests.of(super::Endpoint::Verify), 1);
    assert_eq!(requests.total(), 3);
    let recorded = bed.gitlab.recorded();
    assert_eq!(recorded.len(), 3);
    assert_eq!(recorded[1].status, 204);
    assert!(recorded[1].body.starts_with(b"{"));
}
