//! The client against single odd answers, byte by byte where a proper server would not do.

mod certificates;
mod load;
mod proxies;
mod redirects;
mod requesting;
mod runners;
mod silence;
mod tracing_jobs;
mod updating;

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
