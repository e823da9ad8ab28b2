//! A real S3 server within this process; it verifies every signature.

use std::net::SocketAddr;

use axum::Router;
use axum::error_handling::HandleError;
use axum::http::StatusCode;
use jiff::SignedDuration;
use s3s::auth::SimpleAuth;
use s3s::service::S3ServiceBuilder;
use s3s_fs::FileSystem;
use secrecy::SecretString;
use tokio_util::task::TaskTracker;
use url::Url;

use super::*;

const BUCKET: &str = "caches";

/// The server, and machines that use it.
struct Server {
    place: Place,
    address: SocketAddr,
}

async fn server() -> Server {
    let place = place();
    std::fs::create_dir_all(place.root.join("server").join(BUCKET)).unwrap();
    let mut builder = S3ServiceBuilder::new(FileSystem::new(place.root.join("server")).unwrap());
    builder.set_auth(SimpleAuth::from_single("AKIDEXAMPLE", "the+secret/key"));
    let service = HandleError::new(builder.build(), |error: s3s::HttpError| async move {
        (StatusCode::INTERNAL_SERVER_ERROR, format!("{error:?}"))
    });
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    TaskTracker::new().spawn(async move {
        axum::serve(listener, Router::new().fallback_service(service)).await.unwrap();
    });
    Server { place, address }
}

impl Server {
    fn settings(&self) -> S3Settings {
        S3Settings {
            endpoint: Url::parse(&format!("http://{}", self.address)).unwrap(),
            bucket: BUCKET.into(),
            region: "eu-central-1".into(),
            path_style: true,
            access_key: "AKIDEXAMPLE".into(),
            secret_key: "the+secret/key".into(),
            session_token: None,
            prefix: String::new(),
            shared: false,
            encryption: None,
        }
    }

    /// Opens the caches of a machine that has a directory of its own.
    fn machine(&self, name: &str, settings: S3Settings) -> CacheStore {
        self.machine_with(name, &CacheSettings { s3: Some(settings), ..CacheSettings::default() })
    }

    fn machine_with(&self, name: &str, settings: &CacheSettings) -> CacheStore {
        let dir = self.place.root.join(name);
        provide_tls();
        let mut store = CacheStore::open(&dir, settings, Arc::new(SystemClock)).unwrap();
        store.s3.as_mut().unwrap().tuning.pause = Duration::from_millis(1);
        store
    }

    fn object(&self, name: &str) -> std::path::PathBuf {
        self.place.root.join("server").join(BUCKET).join(name).into()
    }
}

#[tokio::test]
async fn what_one_machine_keeps_another_one_finds() {
    let server = server().await;
    let first = server.machine("first", server.settings());
    let second = server.machine("second", server.settings());
    assert_eq!(get(&second, "main").await.unwrap(), None);
    assert_eq!(put(&first, "main", b"one").await.unwrap(), Kept::Yes);
    let object = server.object("runner/short/project/77/main");
    assert_eq!(std::fs::read(object).unwrap(), b"one");
    assert_eq!(get(&second, "main").await.unwrap().unwrap(), b"one");
    let current = second.current(&project(), &key("main")).await.unwrap().unwrap();
    assert_eq!(current.entries.as_deref(), Some("digest of 3"), "it travels with the archive");

    put(&first, "main", b"two").await.unwrap();
    assert_eq!(get(&second, "main").await.unwrap().unwrap(), b"two");
    assert_eq!(get(&first, "main").await.unwrap().unwrap(), b"two");
}

#[tokio::test]
async fn objects_are_named_as_gitlab_runner_names_them() {
    let server = server().await;
    let shared = S3Settings { shared: true, prefix: "/ci//x/".into(), ..server.settings() };
    let store = server.machine("first", shared);
    put(&store, "a/b", b"1").await.unwrap();
    assert_eq!(std::fs::read(server.object("ci/x/project/77/a/b")).unwrap(), b"1");

    let prefixed = S3Settings { prefix: "ci".into(), ..server.settings() };
    let store = server.machine("first", prefixed);
    let (project, hashed) = (project(), Key::hashed("main").unwrap());
    let draft = store.draft(&project, &hashed).await.unwrap();
    let what = (store.now(), String::new());
    store.keep(&project, &hashed, draft, what, LIMIT, &mut Said::default()).await.unwrap();
    let hash = hashed.path();
    let shard = hash.get(..2).unwrap();
    assert!(server.object(&format!("ci/runner/short/project/77/{shard}/{hash}")).exists());
    assert!(server.place.root.join("first/hep/tracker").join(hash).join("cache.zip").exists());
}

#[tokio::test]
async fn odd_keys_are_signed_as_they_are_sent() {
    let server = server().await;
    let store = server.machine("first", server.settings());
    let other = server.machine("second", server.settings());
    for name in ["ü & ö=ä?#+ %41 *~'()!$,;:@[]", " a b/c  d", "deps-a1b2-non_protected", "..."] {
        put(&store, name, name.as_bytes()).await.unwrap();
        assert_eq!(get(&other, name).await.unwrap().unwrap(), name.as_bytes(), "{name}");
    }
}

#[tokio::test]
async fn a_large_archive_goes_up_in_parts() {
    let server = server().await;
    let mut store = server.machine("first", server.settings());
    let tuning = &mut store.s3.as_mut().unwrap().tuning;
    (tuning.largest_put, tuning.part) = (6 << 20, 5 << 20);
    let content: Vec<u8> =
        (0..12_000_000_u32).map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes()[0]).collect();
    put(&store, "big", &content).await.unwrap();
    let other = server.machine("second", server.settings());
    assert!(get(&other, "big").await.unwrap().unwrap() == content);
}

#[tokio::test]
async fn encryption_is_asked_for_with_signed_headers() {
    let server = server().await;
    let kms = Encryption::Kms { key: Some("alias/ci".into()), dual: false };
    for encryption in [Encryption::S3, kms] {
        let settings = S3Settings { encryption: Some(encryption), ..server.settings() };
        let store = server.machine("first", settings);
        assert_eq!(put(&store, "k", b"x").await.unwrap(), Kept::Yes);
    }
}

#[tokio::test]
async fn refusals_are_named_and_nothing_secret_is() {
    let server = server().await;
    let wrong = SecretString::from("wrong-secret-key");
    let settings = S3Settings { secret_key: wrong, ..server.settings() };
    let forger = server.machine("first", settings);
    let unknown = S3Settings { access_key: "AKIDOTHER".into(), ..server.settings() };
    let stranger = server.machine("second", unknown);
    for (store, word) in
        [(forger, "SignatureDoesNotMatch"), (stranger, "403 Forbidden (NotSignedUp)")]
    {
        let errors =
            get(&store, "k").await.err().into_iter().chain(put(&store, "k", b"x").await.err());
        let errors: Vec<CacheError> = errors.collect();
        assert!(!errors.is_empty(), "{word}");
        for error in errors {
            let text = chain(&error);
            assert!(text.contains(word), "{text}");
            let debug = format!("{error:?} {store:?}");
            for secret in ["X-Amz-Signature", "X-Amz-Credential", "secret-key", "the+secret"] {
                assert!(
                    !text.contains(secret) && !debug.contains(secret),
                    "{secret}: {text} {debug}"
                );
            }
        }
    }
}

#[tokio::test]
async fn a_wrong_clock_is_what_is_wrong() {
    let server = server().await;
    for (off, words) in [(7200, "ahead of the server's"), (-7200, "behind the server's")] {
        let clock = ManualClock::new(SystemClock.now() + SignedDuration::from_secs(off));
        let settings = CacheSettings { s3: Some(server.settings()), ..CacheSettings::default() };
        let dir = server.place.root.join("first");
        provide_tls();
        let store = CacheStore::open(&dir, &settings, Arc::new(clock)).unwrap();
        let limit = Duration::from_secs(600);
        let error =
            store.fetch(&project(), &key("k"), limit, &mut Said::default()).await.unwrap_err();
        let text = chain(&error);
        assert!(text.contains("the clocks differ") && text.contains(words), "{text}");
    }
}

#[tokio::test]
async fn what_is_too_large_to_be_uploaded_stays_here_and_is_found_here() {
    let server = server().await;
    let settings = CacheSettings {
        s3: Some(server.settings()),
        max_uploaded: Some(10),
        ..CacheSettings::default()
    };
    let store = server.machine_with("first", &settings);
    let mut said = Said::default();
    let (project, key) = (project(), key("k"));
    let draft = store.draft(&project, &key).await.unwrap();
    draft.writer().unwrap().write_all(b"eleven byte").unwrap();
    let what = (store.now(), String::new());
    store.keep(&project, &key, draft, what, LIMIT, &mut said).await.unwrap();
    assert!(said.all().contains("Cache archive size (11) is too big (Limit is set to 10)"));
    assert!(!server.object("runner/short/project/77/k").exists());
    assert_eq!(get(&store, "k").await.unwrap().unwrap(), b"eleven byte");
    let other = server.machine("second", server.settings());
    assert_eq!(get(&other, "k").await.unwrap(), None);
}

#[tokio::test]
async fn what_was_deleted_in_the_bucket_is_gone() {
    let server = server().await;
    let store = server.machine("first", server.settings());
    put(&store, "k", b"x").await.unwrap();
    std::fs::remove_file(server.object("runner/short/project/77/k")).unwrap();
    assert_eq!(get(&store, "k").await.unwrap(), None);
}

#[tokio::test]
async fn an_upload_that_failed_is_made_good_by_the_next_job() {
    let server = server().await;
    let wrong = S3Settings { secret_key: "wrong".into(), ..server.settings() };
    put(&server.machine("first", wrong), "k", b"x").await.unwrap_err();
    let store = server.machine("first", server.settings());
    let mut said = Said::default();
    store.refresh(&project(), &key("k"), LIMIT, &mut said).await.unwrap();
    assert_eq!(std::fs::read(server.object("runner/short/project/77/k")).unwrap(), b"x");
    assert!(said.all().contains("Uploading cache.zip to http://127.0.0.1"), "{}", said.all());

    // What is there already is not sent again.
    let mut said = Said::default();
    store.refresh(&project(), &key("k"), LIMIT, &mut said).await.unwrap();
    assert_eq!(said.all(), "");

    // Nor is it where another machine was faster.
    put(&server.machine("second", server.settings()), "k", b"newer").await.unwrap();
    let ours = server.place.root.join("first/hep/tracker/k");
    std::fs::remove_file(ours.join("metadata.json")).unwrap();
    // A store tells times in whole seconds, and all of this may have been in one.
    let zip = std::fs::File::options().write(true).open(ours.join("cache.zip")).unwrap();
    let long_ago = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000);
    zip.set_modified(long_ago).unwrap();
    let mut said = Said::default();
    store.refresh(&project(), &key("k"), LIMIT, &mut said).await.unwrap();
    assert!(said.all().contains("is not older"), "{}", said.all());
    assert_eq!(std::fs::read(server.object("runner/short/project/77/k")).unwrap(), b"newer");
}

#[tokio::test]
async fn a_copy_too_large_for_this_machine_is_used_all_the_same() {
    let server = server().await;
    put(&server.machine("first", server.settings()), "k", &[b'x'; 3000]).await.unwrap();
    let settings = CacheSettings {
        s3: Some(server.settings()),
        quota: Some(1000),
        ..CacheSettings::default()
    };
    let store = server.machine_with("second", &settings);
    assert_eq!(get(&store, "k").await.unwrap().unwrap(), [b'x'; 3000]);
    assert!(!server.place.root.join("second/hep/tracker/k/cache.zip").exists());
    // And what is packed here reaches the bucket.
    put(&store, "other", &[b'y'; 3000]).await.unwrap();
    assert!(server.object("runner/short/project/77/other").exists());
}

#[test]
fn a_bucket_is_part_of_the_hosts_name_or_of_the_path() {
    let settings = |path_style| S3Settings {
        endpoint: Url::parse("https://s3.dualstack.eu-west-1.amazonaws.com").unwrap(),
        bucket: BUCKET.into(),
        region: "eu-west-1".into(),
        path_style,
        access_key: "AKID".into(),
        secret_key: "secret".into(),
        session_token: Some("session".into()),
        prefix: String::new(),
        shared: false,
        encryption: None,
    };
    provide_tls();
    for (path_style, expected) in [
        (true, "https://s3.dualstack.eu-west-1.amazonaws.com/caches/k?"),
        (false, "https://caches.s3.dualstack.eu-west-1.amazonaws.com/k?"),
    ] {
        let url = S3::new(&settings(path_style)).unwrap().get_url("k", time(0), LIMIT);
        assert!(url.as_str().starts_with(expected), "{url}");
        assert!(url.as_str().contains("X-Amz-Security-Token=session"), "{url}");
        assert!(url.as_str().contains("%2Feu-west-1%2Fs3%2Faws4_request"), "{url}");
    }
    assert!(!format!("{:?}", settings(true)).contains("secret\""));
}
