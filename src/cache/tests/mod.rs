//! Caches in real directories, in a real S3 server within this process, and at odd servers.

mod local;
mod odd_servers;
mod s3;

use std::io::{Read as _, Write as _};
use std::sync::{LazyLock, Mutex};

use super::*;
use crate::domain::clock::{ManualClock, SystemClock};

/// Long enough for anything but what is meant to be too slow.
const LIMIT: Duration = Duration::from_secs(60);

/// Keeps what was said.
#[derive(Default)]
struct Said(Mutex<Vec<String>>);

impl Said {
    fn all(&self) -> String {
        self.0.lock().unwrap().join("\n")
    }
}

impl Voice for Said {
    fn notice(&mut self, text: &str) {
        self.0.lock().unwrap().push(text.to_owned());
    }
    fn warning(&mut self, text: &str) {
        self.0.lock().unwrap().push(format!("WARNING: {text}"));
    }
}

struct Place {
    _dir: tempfile::TempDir,
    root: Utf8PathBuf,
}

fn place() -> Place {
    let dir = tempfile::tempdir().unwrap();
    let root = Utf8PathBuf::from_path_buf(dir.path().canonicalize().unwrap()).unwrap();
    Place { _dir: dir, root }
}

fn project() -> Project {
    Project {
        path: "hep/tracker".into(),
        id: 77,
        server: "https://gitlab.example.org".into(),
        runner: "short".into(),
    }
}

fn key(raw: &str) -> Key {
    Key::sanitized(raw).unwrap()
}

/// A time near that of the file system's clock, in whole seconds.
fn time(seconds: i64) -> Timestamp {
    static START: LazyLock<i64> = LazyLock::new(|| SystemClock.now().as_second());
    Timestamp::from_second(*START + seconds).unwrap()
}

/// TLS needs a provider even where none is spoken; a second test finds it there.
fn provide_tls() {
    drop(rustls::crypto::ring::default_provider().install_default());
}

fn local_store(root: &Utf8Path, settings: &CacheSettings) -> (CacheStore, ManualClock) {
    let clock = ManualClock::new(time(0));
    (CacheStore::open(root, settings, Arc::new(clock.clone())).unwrap(), clock)
}

/// Puts content under a key as a job does.
async fn put(store: &CacheStore, name: &str, content: &[u8]) -> Result<Kept, CacheError> {
    let (project, key) = (project(), key(name));
    let draft = store.draft(&project, &key).await?;
    draft.writer().unwrap().write_all(content).unwrap();
    let what = (store.now(), format!("digest of {}", content.len()));
    store.keep(&project, &key, draft, what, LIMIT, &mut Said::default()).await
}

/// Gets what is under a key.
async fn get(store: &CacheStore, name: &str) -> Result<Option<Vec<u8>>, CacheError> {
    let found = store.fetch(&project(), &key(name), LIMIT, &mut Said::default()).await?;
    Ok(found.map(content))
}

fn content(mut archive: Archive) -> Vec<u8> {
    let mut bytes = Vec::new();
    archive.file.read_to_end(&mut bytes).unwrap();
    assert_eq!(archive.bytes, bytes.len() as u64);
    bytes
}
