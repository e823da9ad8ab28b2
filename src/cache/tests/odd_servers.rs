//! Servers that fail, hang, cut their answers short, or send us elsewhere.

use std::net::SocketAddr;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_util::task::TaskTracker;
use url::Url;
use wiremock::matchers::{any, header, method};
use wiremock::{Mock, MockServer, ResponseTemplate};

use super::*;

fn store(place: &Place, endpoint: &str) -> CacheStore {
    let s3 = S3Settings {
        endpoint: Url::parse(endpoint).unwrap(),
        bucket: "caches".into(),
        region: "us-east-1".into(),
        path_style: true,
        access_key: "AKID".into(),
        secret_key: "secret".into(),
        session_token: None,
        prefix: String::new(),
        shared: true,
        encryption: None,
    };
    let settings = CacheSettings { s3: Some(s3), ..CacheSettings::default() };
    let dir = place.root.join("cache");
    provide_tls();
    let mut store = CacheStore::open(&dir, &settings, Arc::new(SystemClock)).unwrap();
    let tuning = &mut store.s3.as_mut().unwrap().tuning;
    (tuning.pause, tuning.stall) = (Duration::from_millis(1), Duration::from_millis(200));
    store
}

async fn count(server: &MockServer) -> usize {
    server.received_requests().await.unwrap().len()
}

#[tokio::test]
async fn a_server_that_recovers_is_asked_three_times() {
    let (place, server) = (place(), MockServer::start().await);
    Mock::given(any())
        .respond_with(
            ResponseTemplate::new(503).set_body_string("<Error><Code>SlowDown</Code></Error>"),
        )
        .up_to_n_times(2)
        .mount(&server)
        .await;
    Mock::given(any())
        .respond_with(
            ResponseTemplate::new(200).insert_header("ETag", "\"1\"").set_body_string("one"),
        )
        .mount(&server)
        .await;
    let store = store(&place, &server.uri());
    let mut said = Said::default();
    let found = store.fetch(&project(), &key("k"), LIMIT, &mut said).await.unwrap().unwrap();
    assert_eq!(content(found), b"one");
    assert_eq!(count(&server).await, 3);
    assert!(said.all().contains("(SlowDown); attempt 2 of 3"), "{}", said.all());
    let requests = server.received_requests().await.unwrap();
    assert!(requests.iter().all(|r| !r.headers.contains_key("authorization")));
}

#[tokio::test]
async fn a_server_that_stays_broken_is_given_up_and_a_refusal_at_once() {
    for (status, attempts) in [(500, 3), (502, 3), (403, 1), (400, 1), (429, 1)] {
        let (place, server) = (place(), MockServer::start().await);
        Mock::given(any()).respond_with(ResponseTemplate::new(status)).mount(&server).await;
        let store = store(&place, &server.uri());
        let error = get(&store, "k").await.unwrap_err();
        assert!(chain(&error).contains(&status.to_string()), "{}", chain(&error));
        assert_eq!(count(&server).await, attempts, "GET {status}");
        put(&store, "k", b"x").await.unwrap_err();
        assert_eq!(count(&server).await, 2 * attempts, "PUT {status}");
    }
}

#[tokio::test]
async fn a_missing_object_is_no_cache_and_a_missing_bucket_an_error() {
    let (place, server) = (place(), MockServer::start().await);
    let missing = |code: &str| {
        ResponseTemplate::new(404).set_body_string(format!("<Error><Code>{code}</Code></Error>"))
    };
    let store = store(&place, &server.uri());
    for (code, there) in [("NoSuchKey", true), ("NoSuchBucket", false)] {
        server.reset().await;
        Mock::given(any()).respond_with(missing(code)).mount(&server).await;
        let found = get(&store, "k").await;
        assert_eq!(found.is_ok(), there, "{found:?}");
        assert_eq!(count(&server).await, 1, "asked once");
    }
}

#[tokio::test]
async fn no_redirect_is_followed() {
    let (place, server, elsewhere) =
        (place(), MockServer::start().await, MockServer::start().await);
    Mock::given(any()).respond_with(ResponseTemplate::new(200)).mount(&elsewhere).await;
    let away = ResponseTemplate::new(307)
        .insert_header("Location", elsewhere.uri().as_str())
        .set_body_string("<Error><Code>PermanentRedirect</Code></Error>");
    Mock::given(any()).respond_with(away).mount(&server).await;
    let store = store(&place, &server.uri());
    for error in [get(&store, "k").await.unwrap_err(), put(&store, "k", b"x").await.unwrap_err()] {
        let text = chain(&error);
        assert!(text.contains("(PermanentRedirect); redirects are not followed"), "{text}");
    }
    assert_eq!(count(&elsewhere).await, 0);
}

#[tokio::test]
async fn an_unchanged_object_is_not_sent_again() {
    let (place, server) = (place(), MockServer::start().await);
    Mock::given(method("PUT"))
        .respond_with(ResponseTemplate::new(200).insert_header("ETag", "\"abc\""))
        .mount(&server)
        .await;
    Mock::given(method("GET"))
        .and(header("If-None-Match", "\"abc\""))
        .respond_with(ResponseTemplate::new(304))
        .expect(1)
        .mount(&server)
        .await;
    let store = store(&place, &server.uri());
    put(&store, "k", b"x").await.unwrap();
    let mut said = Said::default();
    let found = store.fetch(&project(), &key("k"), LIMIT, &mut said).await.unwrap().unwrap();
    assert_eq!(content(found), b"x");
    assert_eq!(said.all(), "cache.zip is up to date");
}

#[tokio::test]
async fn a_copy_here_serves_when_the_server_does_not() {
    let place = place();
    // Not one from wiremock's pool, which would go on answering.
    let server = MockServer::builder().start().await;
    Mock::given(method("PUT"))
        .respond_with(ResponseTemplate::new(200).insert_header("ETag", "\"abc\""))
        .mount(&server)
        .await;
    let store = store(&place, &server.uri());
    put(&store, "k", b"x").await.unwrap();
    drop(server);
    let mut said = Said::default();
    let found = store.fetch(&project(), &key("k"), LIMIT, &mut said).await.unwrap().unwrap();
    assert_eq!(content(found), b"x");
    assert!(said.all().contains("which may be older"), "{}", said.all());
    assert!(get(&store, "other").await.is_err());
}

#[tokio::test]
async fn a_slow_server_is_given_up_after_the_time_allowed() {
    let (place, server) = (place(), MockServer::start().await);
    let slow = ResponseTemplate::new(200).set_delay(Duration::from_secs(60));
    Mock::given(any()).respond_with(slow).mount(&server).await;
    let store = store(&place, &server.uri());
    let limit = Duration::from_millis(100);
    let error = store.fetch(&project(), &key("k"), limit, &mut Said::default()).await.unwrap_err();
    assert!(matches!(error, CacheError::TimedOut(_)), "{error}");
}

/// Answers every connection with these bytes; then hangs, or closes.
async fn answers(bytes: &'static [u8], hangs: bool) -> SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    TaskTracker::new().spawn(async move {
        let mut open = Vec::new();
        loop {
            let (mut socket, _) = listener.accept().await.unwrap();
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                request.push(socket.read_u8().await.unwrap());
            }
            socket.write_all(bytes).await.unwrap();
            if hangs {
                open.push(socket);
            }
        }
    });
    address
}

#[tokio::test]
async fn a_body_that_is_cut_short_is_no_cache() {
    let cut = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\nETag: \"1\"\r\n\r\nhalf";
    for hangs in [true, false] {
        let place = place();
        let address = answers(cut, hangs).await;
        let store = store(&place, &format!("http://{address}"));
        let mut said = Said::default();
        let error = store.fetch(&project(), &key("k"), LIMIT, &mut said).await.unwrap_err();
        let expected = if hangs { "nothing has come for" } else { "failed" };
        assert!(chain(&error).contains(expected), "{}", chain(&error));
        assert!(said.all().contains("attempt 3 of 3"), "{}", said.all());
        let left = store.current(&project(), &key("k")).await.unwrap();
        assert_eq!(left, None);
        let litter = std::fs::read_dir(place.root.join("cache/hep/tracker/k")).unwrap().count();
        assert_eq!(litter, 0);
    }
}

#[tokio::test]
async fn nonsense_for_an_answer_is_an_error() {
    let place = place();
    let address = answers(b"220 mail.example.org ESMTP\r\n\r\n", false).await;
    let store = store(&place, &format!("http://{address}"));
    assert!(chain(&get(&store, "k").await.unwrap_err()).contains("failed"));
}

#[tokio::test]
async fn a_put_without_etag_is_not_believed() {
    let (place, server) = (place(), MockServer::start().await);
    Mock::given(any()).respond_with(ResponseTemplate::new(200)).mount(&server).await;
    let error = put(&store(&place, &server.uri()), "k", b"x").await.unwrap_err();
    assert!(chain(&error).contains("the answer holds no ETag"), "{}", chain(&error));
}
