//! The client against single odd answers, byte by byte where a proper server would not do.

use std::collections::BTreeMap;
use std::error::Error as _;
use std::io::{Read, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc;
use std::thread::JoinHandle;

use bytes::Bytes;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use wiremock::matchers::{any, method, path};
use wiremock::{Mock, MockServer, Request, ResponseTemplate};

use super::*;
use crate::domain::clock::ManualClock;

const TOKEN: &str = "glrt-t1_secret-of-the-runner";
const JOB_TOKEN: &str = "glcbt-64_secret-of-the-job";
const JOB: &str = r#"{"id":42,"token":"glcbt-64_secret-of-the-job","job_info":{"name":"build"},
    "variables":[{"key":"A","value":"secret-value"}],"steps":null,"image":null}"#;

fn options(url: &str) -> ClientOptions {
    let _was_installed_before = rustls::crypto::ring::default_provider().install_default();
    ClientOptions::new(url.parse().unwrap())
}

fn client(url: &str) -> Client {
    Client::new(options(url)).unwrap()
}

fn info() -> Info {
    Info::new(InfoOptions { name: "bridge".into(), ..InfoOptions::default() })
}

fn token() -> Secret {
    Secret::new(TOKEN)
}

fn job_token() -> Secret {
    Secret::new(JOB_TOKEN)
}

async fn ask(client: &Client) -> Result<RequestReply, Error> {
    client.request_job(&token(), "s_0123456789ab", &info(), Some("before")).await
}

async fn update(client: &Client, state: UpdateState) -> Result<UpdateReply, Error> {
    let update = JobUpdate { state, output: Some((0xdead_beef, 12)), info: info() };
    client.update_job(JobAuth { id: CiJobId(42), token: &job_token() }, &update).await
}

async fn patch(client: &Client) -> Result<PatchReply, Error> {
    let job = JobAuth { id: CiJobId(42), token: &job_token() };
    client.patch_trace(job, 5, Bytes::from_static(b"hello"), false).await
}

/// A server that gives one answer to everything.
async fn answering(answer: ResponseTemplate) -> MockServer {
    let server = MockServer::start().await;
    Mock::given(any()).respond_with(answer).mount(&server).await;
    server
}

fn status(status: u16) -> ResponseTemplate {
    ResponseTemplate::new(status)
}

async fn only_request(server: &MockServer) -> Request {
    let mut requests = server.received_requests().await.unwrap();
    assert_eq!(requests.len(), 1, "one call, made once");
    requests.remove(0)
}

fn header<'a>(request: &'a Request, name: &str) -> Option<&'a str> {
    request.headers.get(name).map(|value| value.to_str().unwrap())
}

fn failed(reason: &str, exit_code: Option<i32>) -> UpdateState {
    UpdateState::Failed { reason: reason.into(), exit_code }
}

/// Everything an error shows, its causes included.
fn shown(error: &Error) -> String {
    let mut text = format!("{error} {error:?}");
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    assert!(!text.contains("secret"), "{text}");
    assert!(!text.contains("debug_trace"), "{text}");
    text
}

/// What a [`RawServer`] does with one connection.
enum Act {
    /// Reads one request and writes these bytes.
    Say(Vec<u8>),
    /// Reads one request and says nothing.
    Hang,
}

/// A server that says exactly what it is told, also nonsense.
struct RawServer {
    url: String,
    over: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl RawServer {
    fn start(acts: Vec<Act>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (over, is_over) = mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            let mut open = Vec::new();
            for act in acts {
                let (mut stream, _) = listener.accept().unwrap();
                read_request(&mut stream);
                match act {
                    // The client may have hung up on an answer that is too long.
                    Act::Say(bytes) => drop(stream.write_all(&bytes)),
                    Act::Hang => open.push(stream),
                }
            }
            assert!(is_over.recv().is_err(), "only the end of the test ends this");
        });
        Self { url, over: Some(over), thread: Some(thread) }
    }

    fn say(text: impl Into<Vec<u8>>) -> Self {
        Self::start(vec![Act::Say(text.into())])
    }
}

impl Drop for RawServer {
    fn drop(&mut self) {
        drop(self.over.take());
        if std::thread::panicking() {
            return;
        }
        self.thread.take().unwrap().join().unwrap();
    }
}

fn read_request(stream: &mut impl Read) -> String {
    let mut seen = Vec::new();
    let mut piece = [0; 4096];
    loop {
        let n = stream.read(&mut piece).unwrap();
        assert_ne!(n, 0, "the client hung up");
        seen.extend_from_slice(&piece[..n]);
        let text = String::from_utf8_lossy(&seen);
        let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
        let length = head
            .lines()
            .find_map(|line| {
                line.to_ascii_lowercase().strip_prefix("content-length:").map(|n| n.trim().parse())
            })
            .map_or(0, |n: Result<usize, _>| n.unwrap());
        if body.len() >= length {
            return text.into_owned();
        }
    }
}

// jobs/request

#[tokio::test]
async fn every_status_of_a_request_for_a_job_has_its_reply() {
    for (code, expected) in [
        (204, "NoJob { last_update: None }"),
        (400, "BadRequest"),
        (403, "Refused"),
        (409, "Conflict"),
        (413, "TooLarge"),
        (422, "Orphaned"),
        (408, "Busy { status: 408, retry_after: None }"),
        (429, "Busy { status: 429, retry_after: None }"),
        (500, "Busy { status: 500, retry_after: None }"),
        (502, "Busy { status: 502, retry_after: None }"),
        (503, "Busy { status: 503, retry_after: None }"),
        (599, "Busy { status: 599, retry_after: None }"),
        (200, "Unexpected { status: 200 }"),
        (401, "Unexpected { status: 401 }"),
        (404, "Unexpected { status: 404 }"),
        (410, "Unexpected { status: 410 }"),
    ] {
        let server = answering(status(code)).await;
        let reply = ask(&client(&server.uri())).await.unwrap();
        assert_eq!(format!("{reply:?}"), expected, "{code}");
        only_request(&server).await;
    }
}

#[tokio::test]
async fn a_request_for_a_job_carries_what_gitlab_reads() {
    let server = answering(status(204)).await;
    ask(&client(&format!("{}/gitlab/ci/", server.uri()))).await.unwrap();
    let request = only_request(&server).await;
    assert_eq!(request.method.as_str(), "POST");
    assert_eq!(request.url.path(), "/gitlab/api/v4/jobs/request");
    assert_eq!(header(&request, "runner-token"), Some(TOKEN));
    assert_eq!(header(&request, "content-type"), Some("application/json"));
    assert_eq!(header(&request, "accept"), Some("application/json"));
    assert!(header(&request, "user-agent").unwrap().starts_with("bridge "));
    assert_eq!(header(&request, "x-request-id").unwrap().len(), 32);
    let body: serde_json::Value = request.body_json().unwrap();
    assert_eq!(body["token"], TOKEN);
    assert_eq!(body["system_id"], "s_0123456789ab");
    assert_eq!(body["last_update"], "before");
    assert_eq!(body["info"]["features"]["cancel_gracefully"], true);
    assert!(body.get("session").is_none());
}

#[tokio::test]
async fn an_unknown_last_update_is_not_sent_and_a_new_one_is_told() {
    let answer = status(204).insert_header("X-GitLab-Last-Update", "after");
    let server = answering(answer).await;
    let client = client(&server.uri());
    for unknown in [None, Some("")] {
        let reply = client.request_job(&token(), "s_0123456789ab", &info(), unknown).await;
        let RequestReply::NoJob { last_update } = reply.unwrap() else { panic!() };
        assert_eq!(last_update.as_deref(), Some("after"));
    }
    for request in server.received_requests().await.unwrap() {
        let body: serde_json::Value = request.body_json().unwrap();
        assert!(body.get("last_update").is_none());
    }
}

#[tokio::test]
async fn a_job_comes_with_its_text_as_received() {
    for content_type in ["application/json", "text/plain"] {
        let answer = status(201)
            .set_body_raw(JOB, content_type)
            .insert_header("X-Request-Id", "01J-gitlab's-own");
        let server = answering(answer).await;
        let reply = ask(&client(&server.uri())).await.unwrap();
        assert!(!format!("{reply:?}").contains("secret"));
        let RequestReply::Job(job) = reply else { panic!("{reply:?}") };
        assert_eq!(job.raw.expose(), JOB);
        assert_eq!(job.payload.id, 42);
        assert_eq!(job.payload.job_info.name, "build");
        assert_eq!(job.payload.token.expose(), JOB_TOKEN);
        assert_eq!(job.request_id, "01J-gitlab's-own");
    }
}

#[tokio::test]
async fn a_job_with_broken_characters_is_still_a_job() {
    let mut body = br#"{"id":42,"token":"t","job_info":{"name":"b"#.to_vec();
    body.extend_from_slice(b"\xff\"}}");
    let server = answering(status(201).set_body_raw(body, "application/json")).await;
    let reply = ask(&client(&server.uri())).await.unwrap();
    let RequestReply::Job(job) = reply else { panic!("{reply:?}") };
    assert_eq!(job.payload.job_info.name, "b\u{fffd}");
}

async fn undecodable(answer: ResponseTemplate) -> Undecodable {
    let server = answering(answer).await;
    let reply = ask(&client(&server.uri())).await.unwrap();
    assert!(!format!("{reply:?}").contains("secret"));
    let RequestReply::Undecodable(found) = reply else { panic!("{reply:?}") };
    assert!(!found.error.contains("secret"), "{}", found.error);
    *found
}

#[tokio::test]
async fn a_job_of_odd_types_keeps_its_name_and_proof() {
    let body = format!(
        r#"{{"id":"42","git_info":"secret","job_info":{{"id":1,"token":"x"}},"token":"{JOB_TOKEN}"}}"#
    );
    let found = undecodable(status(201).set_body_raw(body.clone(), "application/json")).await;
    assert_eq!(found.id, Some(42));
    assert_eq!(found.token.unwrap().expose(), JOB_TOKEN);
    assert_eq!(found.raw.expose(), body);
    assert!(found.error.contains("unexpected type"), "{}", found.error);
}

#[tokio::test]
async fn a_201_without_a_job_in_it_is_told_as_such() {
    for body in ["", "null", "[]", "{}", r#"{"id":42}"#, r#"{"id":null,"token":"t"}"#, "nonsense"] {
        let found = undecodable(status(201).set_body_raw(body, "application/json")).await;
        assert!(found.id.is_none() || found.token.is_none(), "{body}");
        assert_eq!(found.raw.expose(), body);
    }
    let page = "<!DOCTYPE html><title>Sign in</title>";
    let found = undecodable(status(201).set_body_raw(page, "text/html")).await;
    assert!(found.error.contains("HTML"), "{}", found.error);
    assert!(found.id.is_none());
}

#[tokio::test]
async fn a_job_whose_text_breaks_off_keeps_its_name_and_proof() {
    let cut = JOB.split_once("variables").unwrap().0;
    let head = "HTTP/1.1 201 Created\r\nContent-Type: application/json\r\n";
    let server = RawServer::say(format!("{head}Content-Length: 9999\r\n\r\n{cut}"));
    let reply = ask(&client(&server.url)).await.unwrap();
    let RequestReply::Undecodable(found) = reply else { panic!("{reply:?}") };
    assert_eq!(found.id, Some(42));
    assert_eq!(found.token.unwrap().expose(), JOB_TOKEN);
    assert_eq!(found.raw.expose(), cut);
    assert!(found.error.contains("without a complete answer"), "{}", found.error);
}

#[tokio::test]
async fn a_whole_job_counts_even_if_its_answer_breaks_off() {
    let head = "HTTP/1.1 201 Created\r\nTransfer-Encoding: chunked\r\n";
    let server = RawServer::say(format!("{head}\r\n{:x}\r\n{JOB}\r\n", JOB.len()));
    let reply = ask(&client(&server.url)).await.unwrap();
    let RequestReply::Job(job) = reply else { panic!("{reply:?}") };
    assert_eq!(job.raw.expose(), JOB);
}

#[tokio::test]
async fn half_a_number_is_no_name() {
    let head = "HTTP/1.1 201 Created\r\nContent-Length: 9999\r\n\r\n";
    let server = RawServer::say(format!(r#"{head}{{"token":"t","id":4"#));
    let reply = ask(&client(&server.url)).await.unwrap();
    let RequestReply::Undecodable(found) = reply else { panic!("{reply:?}") };
    assert_eq!(found.id, None);
}

#[tokio::test]
async fn a_job_whose_text_stalls_keeps_its_name_and_proof() {
    let head = "HTTP/1.1 201 Created\r\nContent-Length: 9999\r\n\r\n";
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut options = options(&format!("http://{}", listener.local_addr().unwrap()));
    options.timeouts.idle = Duration::from_millis(50);
    let (over, is_over) = mpsc::channel::<()>();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        read_request(&mut stream);
        write!(stream, r#"{head}{{"id":42,"token":"t","#).unwrap();
        is_over.recv().unwrap_err();
    });
    let reply = ask(&Client::new(options).unwrap()).await.unwrap();
    drop(over);
    server.join().unwrap();
    let RequestReply::Undecodable(found) = reply else { panic!("{reply:?}") };
    assert_eq!(found.id, Some(42));
    assert!(found.token.is_some());
}

#[tokio::test]
async fn a_job_without_end_is_not_read_to_the_end() {
    let mut bytes = b"HTTP/1.1 201 Created\r\n\r\n{\"id\":42,\"token\":\"t\",\"x\":\"".to_vec();
    bytes.resize(66 << 20, b'a');
    let server = RawServer::say(bytes);
    let reply = ask(&client(&server.url)).await.unwrap();
    let RequestReply::Undecodable(found) = reply else { panic!("{reply:?}") };
    assert_eq!(found.id, Some(42));
    assert_eq!(found.raw.expose().len(), 1 << 20);
    assert!(found.error.contains("larger than"), "{}", found.error);
}

#[tokio::test]
async fn a_busy_server_says_until_when() {
    let clock = ManualClock::new("2026-08-01T12:00:00Z".parse().unwrap());
    let answer = status(429).insert_header("RateLimit-ResetTime", "Sat, 01 Aug 2026 12:00:30 GMT");
    let server = answering(answer).await;
    let client =
        Client::new(ClientOptions { clock: Arc::new(clock), ..options(&server.uri()) }).unwrap();
    let wait = Some(Duration::from_secs(30));
    let reply = ask(&client).await.unwrap();
    assert!(
        matches!(reply, RequestReply::Busy { status: 429, retry_after } if retry_after == wait)
    );
    let busy = UpdateReply::Busy { status: 429, retry_after: wait };
    assert_eq!(update(&client, UpdateState::Success).await.unwrap(), busy);
    assert_eq!(patch(&client).await.unwrap(), PatchReply::Busy { status: 429, retry_after: wait });
}

// PUT jobs/:id

#[tokio::test]
async fn every_status_of_an_update_has_its_reply() {
    use UpdateReply as R;
    let sixty = Some(Duration::from_secs(60));
    for (code, expected) in [
        (200, R::Accepted { job_status: None }),
        (202, R::NotYet { job_status: None, interval: sixty }),
        (403, R::Ended { status: 403, job_status: None }),
        (404, R::Ended { status: 404, job_status: None }),
        (409, R::Conflict),
        (412, R::Rewind),
        (408, R::Busy { status: 408, retry_after: None }),
        (429, R::Busy { status: 429, retry_after: None }),
        (500, R::Busy { status: 500, retry_after: None }),
        (504, R::Busy { status: 504, retry_after: None }),
        (400, R::Unexpected { status: 400, message: "state is wrong".into() }),
        (401, R::Unexpected { status: 401, message: "state is wrong".into() }),
        (418, R::Unexpected { status: 418, message: "state is wrong".into() }),
    ] {
        let answer = status(code)
            .set_body_json(serde_json::json!({"error": "state is wrong"}))
            .insert_header("X-GitLab-Trace-Update-Interval", "60");
        let server = answering(answer).await;
        let client = client(&server.uri());
        assert_eq!(update(&client, UpdateState::Running).await.unwrap(), expected, "{code}");
        only_request(&server).await;
    }
}

#[tokio::test]
async fn the_jobs_status_outranks_the_code_while_it_runs() {
    for (code, word, ends) in [
        (200, "canceled", true),
        (200, "failed", true),
        (503, "canceled", true),
        (200, "canceling", false),
        (200, "running", false),
        (200, "success", false),
        (200, "from_the_future", false),
    ] {
        let server = answering(status(code).insert_header("Job-Status", word)).await;
        let client = client(&server.uri());
        let job_status = Some(CiStatus::from(word));
        let running = update(&client, UpdateState::Running).await.unwrap();
        let expected = if ends {
            UpdateReply::Ended { status: code, job_status: job_status.clone() }
        } else {
            UpdateReply::Accepted { job_status: job_status.clone() }
        };
        assert_eq!(running, expected, "{word}");
        if code == 200 {
            let last = update(&client, failed("script_failure", None)).await.unwrap();
            assert_eq!(last, UpdateReply::Accepted { job_status }, "our own report: {word}");
        }
    }
}

#[tokio::test]
async fn a_lost_final_answer_shows_as_the_end_with_our_own_status() {
    let answer = status(403)
        .insert_header("Job-Status", "success")
        .set_body_json(serde_json::json!({"message": "403 Forbidden"}));
    let server = answering(answer).await;
    let reply = update(&client(&server.uri()), UpdateState::Success).await.unwrap();
    let job_status = Some(CiStatus::Success);
    assert_eq!(reply, UpdateReply::Ended { status: 403, job_status });
}

#[tokio::test]
async fn an_update_carries_what_gitlab_reads() {
    let output = serde_json::json!({"checksum": "crc32:0000beef", "bytesize": 12});
    for (state, size, expected) in [
        (UpdateState::Running, None, serde_json::json!({"state": "running", "output": {}})),
        (
            UpdateState::Success,
            Some(12),
            serde_json::json!(
                {"state": "success", "output": output, "checksum": "crc32:0000beef"}
            ),
        ),
        (
            failed("script_failure", Some(3)),
            None,
            serde_json::json!(
                {"state": "failed", "failure_reason": "script_failure", "exit_code": 3, "output": {}}
            ),
        ),
        (
            failed("runner_system_failure", Some(0)),
            None,
            serde_json::json!(
                {"state": "failed", "failure_reason": "runner_system_failure", "output": {}}
            ),
        ),
    ] {
        let server = answering(status(200)).await;
        let update = JobUpdate { state, output: size.map(|size| (0xbeef, size)), info: info() };
        let job = JobAuth { id: CiJobId(42), token: &job_token() };
        client(&server.uri()).update_job(job, &update).await.unwrap();
        let request = only_request(&server).await;
        assert_eq!((request.method.as_str(), request.url.path()), ("PUT", "/api/v4/jobs/42"));
        assert_eq!(header(&request, "job-token"), Some(JOB_TOKEN));
        assert_eq!(header(&request, "runner-token"), None);
        assert_eq!(header(&request, "accept"), Some("*/*"), "no JSON is expected");
        let mut body: BTreeMap<String, serde_json::Value> = request.body_json().unwrap();
        assert_eq!(body.remove("token"), Some(JOB_TOKEN.into()));
        assert_eq!(body.remove("info").unwrap()["name"], "bridge");
        assert_eq!(serde_json::to_value(body).unwrap(), expected);
    }
}

#[tokio::test]
async fn status_and_headers_count_even_if_the_body_is_endless_or_cut() {
    let head = "HTTP/1.1 200 OK\r\nJob-Status: running\r\n";
    let accepted = UpdateReply::Accepted { job_status: Some(CiStatus::Running) };
    let endless = format!("{head}\r\n{}", "x".repeat(1 << 20));
    let cut = format!("{head}Content-Length: 99\r\n\r\n200");
    for text in [endless, cut] {
        let server = RawServer::say(text);
        let reply = update(&client(&server.url), UpdateState::Success).await.unwrap();
        assert_eq!(reply, accepted);
    }
}

// PATCH jobs/:id/trace

#[tokio::test]
async fn every_status_of_a_patch_has_its_reply() {
    use PatchReply as R;
    let running = Some(CiStatus::Running);
    for (code, expected) in [
        (
            202,
            R::Accepted {
                end: Some(10),
                job_status: running.clone(),
                interval: Some(Duration::from_secs(3)),
            },
        ),
        (416, R::Range { end: 10, job_status: running.clone() }),
        (403, R::Ended { status: 403, job_status: running.clone() }),
        (404, R::Ended { status: 404, job_status: running.clone() }),
        (413, R::TooLarge),
        (408, R::Busy { status: 408, retry_after: Some(Duration::from_secs(9)) }),
        (429, R::Busy { status: 429, retry_after: Some(Duration::from_secs(9)) }),
        (500, R::Busy { status: 500, retry_after: Some(Duration::from_secs(9)) }),
        (400, R::Unexpected { status: 400, message: "no range".into() }),
        (200, R::Unexpected { status: 200, message: "no range".into() }),
    ] {
        let answer = status(code)
            .set_body_string("no range")
            .insert_header("Range", "0-10")
            .insert_header("Retry-After", "9")
            .insert_header("Job-Status", "running")
            .insert_header("X-GitLab-Trace-Update-Interval", "3");
        let server = answering(answer).await;
        assert_eq!(patch(&client(&server.uri())).await.unwrap(), expected, "{code}");
        only_request(&server).await;
    }
}

#[tokio::test]
async fn a_416_without_a_length_means_the_beginning() {
    for range in [None, Some("nonsense")] {
        let answer = status(416);
        let answer = match range {
            Some(range) => answer.insert_header("Range", range),
            None => answer,
        };
        let server = answering(answer).await;
        let reply = patch(&client(&server.uri())).await.unwrap();
        assert_eq!(reply, PatchReply::Range { end: 0, job_status: None });
    }
}

#[tokio::test]
async fn a_patch_of_a_cancelled_job_is_its_end() {
    for code in [202, 403, 416] {
        let server = answering(status(code).insert_header("Job-Status", "canceled")).await;
        let reply = patch(&client(&server.uri())).await.unwrap();
        let job_status = Some(CiStatus::Canceled);
        assert_eq!(reply, PatchReply::Ended { status: code, job_status });
    }
}

#[tokio::test]
async fn a_patch_carries_the_bytes_and_where_they_belong() {
    for (debug_trace, query) in [(false, "debug_trace=false"), (true, "debug_trace=true")] {
        let server = answering(status(202)).await;
        let bytes = Bytes::from_static(b"h\xff\0\nllo");
        let job = JobAuth { id: CiJobId(42), token: &job_token() };
        let client = client(&server.uri());
        client.patch_trace(job, 1000, bytes.clone(), debug_trace).await.unwrap();
        let request = only_request(&server).await;
        let place = (request.method.as_str(), request.url.path());
        assert_eq!(place, ("PATCH", "/api/v4/jobs/42/trace"));
        assert_eq!(request.url.query(), Some(query));
        assert_eq!(header(&request, "content-range"), Some("1000-1006"));
        assert_eq!(header(&request, "content-type"), Some("text/plain"));
        assert_eq!(header(&request, "job-token"), Some(JOB_TOKEN));
        assert_eq!(request.body, bytes);
    }
}

#[tokio::test]
async fn nothing_is_not_appended() {
    let server = answering(status(202)).await;
    let job = JobAuth { id: CiJobId(42), token: &job_token() };
    let reply = client(&server.uri()).patch_trace(job, 0, Bytes::new(), false).await;
    assert_eq!(reply.unwrap_err().kind(), ErrorKind::Refused);
    assert!(server.received_requests().await.unwrap().is_empty());
}

// No answer, or nobody's

#[tokio::test]
async fn html_from_a_proxy_is_not_gitlabs_verdict() {
    for code in [200, 202, 403, 404] {
        let page = "<!DOCTYPE html><title>Access denied</title>";
        let server = answering(status(code).set_body_raw(page, "text/html")).await;
        let client = client(&server.uri());
        for error in [
            ask(&client).await.unwrap_err(),
            update(&client, UpdateState::Running).await.unwrap_err(),
            patch(&client).await.unwrap_err(),
        ] {
            assert_eq!(error.kind(), ErrorKind::Transient);
            assert!(shown(&error).contains("answered"), "{error}");
            assert!(error.to_string().contains("is there a proxy or login page in front?"));
        }
    }
}

#[tokio::test]
async fn a_refused_connection_is_no_answer() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let client = client(&url);
    let error = patch(&client).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Transient);
    let text = shown(&error);
    assert!(text.starts_with(&format!("PATCH {url}/api/v4/jobs/42/trace (request ")), "{text}");
    assert!(text.contains("no connection") && text.contains("refused"), "{text}");
    assert_eq!(error.request_id().unwrap().len(), 32);
}

#[tokio::test]
async fn a_silent_server_is_given_up_after_each_calls_own_time() {
    let server = RawServer::start(vec![Act::Hang, Act::Hang, Act::Hang]);
    let mut options = options(&server.url);
    options.timeouts.call = Duration::from_millis(40);
    options.timeouts.request_head = Duration::from_millis(400);
    let client = Client::new(options).unwrap();
    let started = std::time::Instant::now();
    let error = update(&client, UpdateState::Running).await.unwrap_err();
    assert!(shown(&error).contains("no answer within"), "{error}");
    assert_eq!(error.kind(), ErrorKind::Transient);
    assert!(patch(&client).await.is_err());
    let before = started.elapsed();
    assert_eq!(ask(&client).await.unwrap_err().kind(), ErrorKind::Transient);
    assert!(started.elapsed() - before >= Duration::from_millis(400), "a long poll is waited for");
}

#[tokio::test]
async fn a_connection_that_ends_without_an_answer_is_not_asked_twice() {
    let server = RawServer::say("");
    let error = ask(&client(&server.url)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Transient);
    assert!(shown(&error).contains("without a complete answer"), "{error}");
}

#[tokio::test]
async fn what_is_not_http_is_no_answer() {
    let server = RawServer::say("SSH-2.0-OpenSSH_9.7\r\n");
    let error = update(&client(&server.url), UpdateState::Running).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Transient);
    shown(&error);
}

#[tokio::test]
async fn a_token_no_header_can_carry_is_the_operators_to_mend() {
    let client = client("http://127.0.0.1:1");
    let token = Secret::new("secret\n");
    let error = client.request_job(&token, "s", &info(), None).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Configuration);
    shown(&error);
}

// Redirects

#[tokio::test]
async fn a_redirect_to_another_server_gets_no_token() {
    let other = answering(status(204)).await;
    for code in [301, 302, 303, 307, 308] {
        let target = format!("{}/elsewhere?token=secret", other.uri());
        let server = answering(status(code).insert_header("Location", target)).await;
        let client = client(&server.uri());
        for error in [ask(&client).await.unwrap_err(), patch(&client).await.unwrap_err()] {
            assert_eq!(error.kind(), ErrorKind::Configuration);
            assert!(shown(&error).contains(&format!("redirect to {}", other.uri())), "{error}");
        }
    }
    assert!(other.received_requests().await.unwrap().is_empty());
}

#[tokio::test]
async fn a_redirect_on_the_same_server_keeps_method_body_and_token() {
    for code in [307, 308] {
        let server = MockServer::start().await;
        Mock::given(path("/api/v4/jobs/42/trace"))
            .respond_with(status(code).insert_header("Location", "/new/place"))
            .mount(&server)
            .await;
        Mock::given(method("PATCH"))
            .and(path("/new/place"))
            .respond_with(status(202))
            .mount(&server)
            .await;
        let reply = patch(&client(&server.uri())).await.unwrap();
        assert!(matches!(reply, PatchReply::Accepted { .. }), "{reply:?}");
        let requests = server.received_requests().await.unwrap();
        assert_eq!(requests.len(), 2);
        assert_eq!(requests[1].body, b"hello");
        assert_eq!(header(&requests[1], "job-token"), Some(JOB_TOKEN));
        assert_eq!(header(&requests[1], "content-range"), Some("5-9"));
    }
}

#[tokio::test]
async fn a_redirect_that_would_turn_a_call_into_a_get_is_not_followed() {
    for code in [301, 302, 303] {
        let server = answering(status(code).insert_header("Location", "/users/sign_in")).await;
        let error = ask(&client(&server.uri())).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Configuration);
        only_request(&server).await;
    }
}

#[tokio::test]
async fn a_circle_of_redirects_ends() {
    let server = answering(status(307).insert_header("Location", "/round")).await;
    let error = ask(&client(&server.uri())).await.unwrap_err();
    assert!(shown(&error).contains("more than 10 redirects"), "{error}");
    assert_eq!(server.received_requests().await.unwrap().len(), 11);
}

// Runners

#[tokio::test]
async fn every_status_of_a_verification_has_its_reply() {
    use VerifyReply as R;
    let expires_at = Some("2026-09-27T21:05:03.203Z".parse().unwrap());
    let good =
        r#"{"id":12345,"token":"glrt-secret","token_expires_at":"2026-09-27T21:05:03.203Z"}"#;
    for (code, body, expected) in [
        (200, good, R::Valid { id: Some(12345), expires_at }),
        (200, "200", R::Valid { id: None, expires_at: None }),
        (200, r#"{"id":1,"token_expires_at":null}"#, R::Valid { id: Some(1), expires_at: None }),
        (200, r#"{"id":1,"token_expires_at":"soon"}"#, R::Valid { id: Some(1), expires_at: None }),
        (403, "{}", R::Refused),
        (422, "{}", R::Orphaned),
        (429, "{}", R::Busy { status: 429, retry_after: None }),
        (500, "{}", R::Busy { status: 500, retry_after: None }),
        (400, r#"{"error":"bad"}"#, R::Unexpected { status: 400, message: "bad".into() }),
    ] {
        let server = answering(status(code).set_body_string(body)).await;
        let client = client(&server.uri());
        let reply = client.verify_runner(&token(), "s_0123456789ab", &info()).await.unwrap();
        assert_eq!(reply, expected, "{code} {body}");
        let request = only_request(&server).await;
        assert_eq!(request.url.path(), "/api/v4/runners/verify");
        let body: serde_json::Value = request.body_json().unwrap();
        assert_eq!((&body["token"], &body["system_id"]), (&TOKEN.into(), &"s_0123456789ab".into()));
        assert_eq!(body["info"]["features"]["cancel_gracefully"], true);
    }
}

#[tokio::test]
async fn a_registration_says_only_what_was_chosen() {
    let body = serde_json::json!({"id": 1, "token": "glrtr-secret", "token_expires_at": null});
    let server = answering(status(201).set_body_json(body)).await;
    let clock = ManualClock::new("2026-08-01T12:00:00.75Z".parse().unwrap());
    let client =
        Client::new(ClientOptions { clock: Arc::new(clock), ..options(&server.uri()) }).unwrap();
    let registration = Registration {
        description: "cluster".into(),
        tags: vec!["slurm".into(), "gpu".into()],
        ..Registration::default()
    };
    let (token, info) = (Secret::new("GR1348941secret"), info());
    let reply = client.register_runner(&token, &info, &registration).await.unwrap();
    assert!(!format!("{reply:?}").contains("secret"));
    let RegisterReply::Registered(runner) = reply else { panic!("{reply:?}") };
    assert_eq!((runner.id, runner.token.expose()), (Some(1), "glrtr-secret"));
    assert_eq!(runner.expires_at, None);
    assert_eq!(runner.obtained_at.to_string(), "2026-08-01T12:00:00Z");
    let mut sent: BTreeMap<String, serde_json::Value> =
        only_request(&server).await.body_json().unwrap();
    sent.remove("info").unwrap();
    let expected = serde_json::json!({"token": "GR1348941secret", "description": "cluster",
        "tag_list": "slurm,gpu", "run_untagged": false, "locked": true, "paused": false});
    assert_eq!(serde_json::to_value(sent).unwrap(), expected);
}

#[tokio::test]
async fn every_refusal_of_a_registration_has_its_reply() {
    for (code, expected) in [
        (400, r#"Invalid { message: "why" }"#),
        (403, r#"Refused { message: "why" }"#),
        (410, "Disallowed"),
        (503, "Busy { status: 503, retry_after: None }"),
        (200, r#"Unexpected { status: 200, message: "why" }"#),
    ] {
        let answer = status(code).set_body_json(serde_json::json!({"message": "why"}));
        let server = answering(answer).await;
        let client = client(&server.uri());
        let reply = client.register_runner(&token(), &info(), &Registration::default()).await;
        assert_eq!(format!("{:?}", reply.unwrap()), expected);
    }
}

#[tokio::test]
async fn removing_names_the_manager_only_where_one_is_meant() {
    let server = answering(status(204)).await;
    let client = client(&server.uri());
    assert_eq!(client.unregister_runner(&token()).await.unwrap(), UnregisterReply::Done);
    let reply = client.unregister_manager(&token(), "s_0123456789ab").await.unwrap();
    assert_eq!(reply, UnregisterReply::Done);
    let requests = server.received_requests().await.unwrap();
    let sent = |n: usize| -> (String, serde_json::Value) {
        assert_eq!(requests[n].method.as_str(), "DELETE");
        (requests[n].url.path().to_owned(), requests[n].body_json().unwrap())
    };
    assert_eq!(sent(0), ("/api/v4/runners".into(), serde_json::json!({"token": TOKEN})));
    let body = serde_json::json!({"token": TOKEN, "system_id": "s_0123456789ab"});
    assert_eq!(sent(1), ("/api/v4/runners/managers".into(), body));
}

#[tokio::test]
async fn every_status_of_a_removal_has_its_reply() {
    use UnregisterReply as R;
    for (code, expected) in [
        (403, R::Refused),
        (404, R::Unknown),
        (502, R::Busy { status: 502, retry_after: None }),
        (400, R::Unexpected { status: 400, message: String::new() }),
    ] {
        let server = answering(status(code)).await;
        assert_eq!(client(&server.uri()).unregister_runner(&token()).await.unwrap(), expected);
    }
}

#[tokio::test]
async fn a_token_is_exchanged_and_an_answer_without_one_is_unreadable() {
    let expires = "2026-09-27T21:05:03.203Z";
    let body = serde_json::json!({"token": "glrt-secret", "token_expires_at": expires});
    let server = answering(status(201).set_body_json(body)).await;
    let reply = client(&server.uri()).reset_token(&token()).await.unwrap();
    let ResetReply::Done(new) = reply else { panic!("{reply:?}") };
    assert_eq!(new.token.expose(), "glrt-secret");
    assert_eq!(new.expires_at, Some(expires.parse().unwrap()));
    let request = only_request(&server).await;
    assert_eq!(header(&request, "runner-token"), None);
    assert_eq!(request.url.path(), "/api/v4/runners/reset_authentication_token");
    for body in ["{}", "", r#"{"token":null}"#, r#"{"token":["glrt-secret"]}"#] {
        let server = answering(status(201).set_body_raw(body, "application/json")).await;
        let error = client(&server.uri()).reset_token(&token()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Refused, "{body}");
        shown(&error);
    }
    for (code, expected) in [(403, "Refused"), (500, "Busy { status: 500, retry_after: None }")] {
        let server = answering(status(code)).await;
        let reply = client(&server.uri()).reset_token(&token()).await.unwrap();
        assert_eq!(format!("{reply:?}"), expected);
    }
}

// Certificates

fn testdata(name: &str) -> Utf8PathBuf {
    Utf8PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/src/gitlab/testdata")).join(name)
}

/// A server with a certificate of the test CA that answers 204 to so many connections, if the
/// client shows the certificate that is asked for.
struct TlsServer {
    port: u16,
    thread: JoinHandle<()>,
}

impl TlsServer {
    fn start(connections: usize, asks_for_certificate: bool) -> Self {
        let _was_installed_before = rustls::crypto::ring::default_provider().install_default();
        let builder = rustls::ServerConfig::builder();
        let builder = if asks_for_certificate {
            let mut roots = rustls::RootCertStore::empty();
            roots.add(CertificateDer::from_pem_file(testdata("ca.pem")).unwrap()).unwrap();
            let verifier = rustls::server::WebPkiClientVerifier::builder(Arc::new(roots));
            builder.with_client_cert_verifier(verifier.build().unwrap())
        } else {
            builder.with_no_client_auth()
        };
        let chain = vec![CertificateDer::from_pem_file(testdata("server.pem")).unwrap()];
        let key = PrivateKeyDer::from_pem_file(testdata("server.key")).unwrap();
        let config = Arc::new(builder.with_single_cert(chain, key).unwrap());
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let thread = std::thread::spawn(move || {
            for _ in 0..connections {
                let (stream, _) = listener.accept().unwrap();
                serve_tls(&config, stream);
            }
        });
        Self { port, thread }
    }

    fn options(&self) -> ClientOptions {
        options(&format!("https://localhost:{}", self.port))
    }

    fn end(self) {
        self.thread.join().unwrap();
    }
}

fn serve_tls(config: &Arc<rustls::ServerConfig>, mut stream: TcpStream) {
    let mut tls = rustls::ServerConnection::new(Arc::clone(config)).unwrap();
    while tls.is_handshaking() {
        if tls.complete_io(&mut stream).is_err() {
            // The client does not trust us, or we do not trust it; its side of the test says which.
            return;
        }
    }
    let mut stream = rustls::StreamOwned::new(tls, stream);
    read_request(&mut stream);
    stream.write_all(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n").unwrap();
    stream.conn.send_close_notify();
    stream.flush().unwrap();
}

fn is_no_job(reply: &Result<RequestReply, Error>) -> bool {
    matches!(reply, Ok(RequestReply::NoJob { .. }))
}

#[tokio::test]
async fn a_server_is_trusted_only_with_its_ca_file() {
    let server = TlsServer::start(2, false);
    let with = ClientOptions { tls_ca_file: Some(testdata("ca.pem")), ..server.options() };
    let with = Client::new(with).unwrap();
    let reply = ask(&with).await;
    assert!(is_no_job(&reply), "{reply:?}");
    assert!(with.ca_pem().unwrap().starts_with("-----BEGIN CERTIFICATE-----"));
    let without = ClientOptions { tls_ca_file: Some(testdata("other-ca.pem")), ..server.options() };
    let error = ask(&Client::new(without).unwrap()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Transient);
    assert!(shown(&error).contains("UnknownIssuer"), "{}", shown(&error));
    server.end();
}

#[tokio::test]
async fn a_client_certificate_is_shown_and_files_are_found_by_the_hosts_name() {
    let dir = tempfile::tempdir().unwrap();
    let certs = Utf8PathBuf::from_path_buf(dir.path().to_owned()).unwrap();
    for (from, to) in [
        ("ca.pem", "localhost.crt"),
        ("client.pem", "localhost.auth.crt"),
        ("client.key", "localhost.auth.key"),
    ] {
        std::fs::copy(testdata(from), certs.join(to)).unwrap();
    }
    let server = TlsServer::start(3, true);
    let found = ClientOptions { certs_dir: Some(certs), ..server.options() };
    let reply = ask(&Client::new(found).unwrap()).await;
    assert!(is_no_job(&reply), "{reply:?}");
    let named = ClientOptions {
        tls_ca_file: Some(testdata("ca.pem")),
        tls_cert_file: Some(testdata("client.pem")),
        tls_key_file: Some(testdata("client.key")),
        ..server.options()
    };
    let reply = ask(&Client::new(named.clone()).unwrap()).await;
    assert!(is_no_job(&reply), "{reply:?}");
    let without = ClientOptions { tls_cert_file: None, tls_key_file: None, ..named };
    let error = ask(&Client::new(without).unwrap()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Transient);
    server.end();
}

#[tokio::test]
async fn changed_certificate_files_count_once_connections_are_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let ca = Utf8PathBuf::from_path_buf(dir.path().join("ca.pem")).unwrap();
    let server = TlsServer::start(3, false);
    std::fs::copy(testdata("other-ca.pem"), &ca).unwrap();
    let mut options = ClientOptions { tls_ca_file: Some(ca.clone()), ..server.options() };
    options.timeouts.connection_age = Duration::ZERO;
    let client = Client::new(options).unwrap();
    assert!(ask(&client).await.is_err());
    std::fs::copy(testdata("ca.pem"), &ca).unwrap();
    let reply = ask(&client).await;
    assert!(is_no_job(&reply), "{reply:?}");
    // A file that is being replaced must not end the talk about running jobs.
    std::fs::write(&ca, "-----BEGIN").unwrap();
    let reply = ask(&client).await;
    assert!(is_no_job(&reply), "{reply:?}");
    server.end();
}

#[test]
fn files_that_cannot_work_are_named_at_once() {
    let server = options("https://localhost");
    let named = |ca: &str, cert: Option<&str>, key: Option<&str>| {
        let error = Client::new(ClientOptions {
            tls_ca_file: Some(testdata(ca)),
            tls_cert_file: cert.map(testdata),
            tls_key_file: key.map(testdata),
            ..server.clone()
        })
        .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Configuration);
        shown(&error)
    };
    assert!(named("missing.pem", None, None).contains("missing.pem cannot be read"));
    assert!(named("README.md", None, None).contains("README.md holds no certificate"));
    assert!(named("ca.pem", Some("client.pem"), None).contains("both"));
    assert!(named("ca.pem", Some("ca.pem"), Some("README.md")).contains("ca.pem cannot be used"));
}

#[test]
fn a_password_in_the_url_is_refused_and_not_shown() {
    let options = options("https://user:secret@localhost/");
    assert!(!format!("{options:?}").contains("secret"));
    let error = Client::new(options).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Configuration);
    shown(&error);
}

// Proxies

/// Runs only as the child of the test below, which sets the environment that only a process can
/// have for itself.
const CHILD: &str = "BRIDGE_TEST_PROXIED_CHILD";

#[tokio::test]
async fn a_proxy_from_the_environment_is_used_for_others_than_this_machine() {
    if let Ok(here) = std::env::var(CHILD) {
        let reply = ask(&client("http://gitlab.invalid")).await.unwrap();
        assert!(matches!(reply, RequestReply::Conflict), "from the proxy: {reply:?}");
        let reply = ask(&client(&here)).await.unwrap();
        assert!(matches!(reply, RequestReply::NoJob { .. }), "not from the proxy: {reply:?}");
        return;
    }
    let here = answering(status(204)).await;
    let proxy = answering(status(409)).await;
    let (here_url, proxy_url) = (here.uri(), proxy.uri());
    let run = tokio::task::spawn_blocking(move || {
        std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "--nocapture"])
            .arg("gitlab::tests::a_proxy_from_the_environment_is_used_for_others_than_this_machine")
            .env(CHILD, here_url)
            .env("http_proxy", proxy_url)
            .env_remove("NO_PROXY")
            .env_remove("no_proxy")
            .output()
            .unwrap()
    });
    let output = run.await.unwrap();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(proxy.received_requests().await.unwrap().len(), 1);
    assert_eq!(here.received_requests().await.unwrap().len(), 1);
}

// Load

#[tokio::test]
async fn one_connection_serves_call_after_call() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        for _ in 0..20 {
            read_request(&mut stream);
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n200").unwrap();
        }
    });
    let client = client(&url);
    for _ in 0..20 {
        let reply = update(&client, UpdateState::Running).await.unwrap();
        assert_eq!(reply, UpdateReply::Accepted { job_status: None });
    }
    server.join().unwrap();
}
