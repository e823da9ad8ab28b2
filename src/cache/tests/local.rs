//! The local store: layout, replacement, eviction, and disks that say no.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use super::*;

const HOUR: Duration = Duration::from_secs(3600);

fn names(dir: &Utf8Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[tokio::test]
async fn a_cache_lies_where_gitlab_runner_looks_for_it() {
    let place = place();
    let (store, _clock) = local_store(&place.root.join("cache"), &CacheSettings::default());
    assert_eq!(get(&store, "main").await.unwrap(), None);
    assert_eq!(put(&store, "main/x", b"one").await.unwrap(), Kept::Yes);
    let dir = place.root.join("cache/hep/tracker/main/x");
    assert_eq!(names(&dir), ["cache.zip", "metadata.json"]);
    for dir in dir.ancestors().take(5) {
        assert_eq!(fs::metadata(dir).unwrap().permissions().mode() & 0o777, 0o700, "{dir}");
    }
    for name in names(&dir) {
        let mode = fs::metadata(dir.join(&name)).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode, 0o600, "{name}");
    }
    let meta: serde_json::Value =
        serde_json::from_slice(&fs::read(dir.join("metadata.json")).unwrap()).unwrap();
    assert_eq!(meta["cachekey"], "main/x");
    assert_eq!(get(&store, "main/x").await.unwrap().unwrap(), b"one");

    put(&store, "main/x", b"two!").await.unwrap();
    assert_eq!(get(&store, "main/x").await.unwrap().unwrap(), b"two!");
    assert_eq!(names(&dir), ["cache.zip", "metadata.json"]);
}

#[tokio::test]
async fn what_is_known_of_an_archive_counts_for_that_archive_alone() {
    let place = place();
    let (store, _clock) = local_store(&place.root, &CacheSettings::default());
    put(&store, "k", b"one").await.unwrap();
    let current = store.current(&project(), &key("k")).await.unwrap().unwrap();
    assert_eq!(current, Current { modified: time(0), entries: Some("digest of 3".into()) });

    // Another program, or a job that was killed between two renames.
    fs::write(place.root.join("hep/tracker/k/cache.zip"), "other").unwrap();
    let current = store.current(&project(), &key("k")).await.unwrap().unwrap();
    assert_eq!(current.entries, None);
    for broken in ["", "{", "[]", "{\"cachekey\": 3}"] {
        fs::write(place.root.join("hep/tracker/k/metadata.json"), broken).unwrap();
        assert_eq!(get(&store, "k").await.unwrap().unwrap(), b"other");
    }
    fs::remove_file(place.root.join("hep/tracker/k/metadata.json")).unwrap();
    assert_eq!(get(&store, "k").await.unwrap().unwrap(), b"other");
}

#[tokio::test]
async fn another_project_of_the_same_path_gets_nothing() {
    let place = place();
    let (store, _clock) = local_store(&place.root, &CacheSettings::default());
    put(&store, "k", b"secret").await.unwrap();
    let elsewhere = Project { server: "https://gitlab.example.com".into(), ..project() };
    let renamed = Project { id: 78, ..project() };
    for other in [elsewhere, renamed] {
        let found = store.fetch(&other, &key("k"), LIMIT, &mut Said::default()).await.unwrap();
        assert!(found.is_none(), "{other:?}");
    }
    assert!(get(&store, "k").await.unwrap().is_some());
}

#[tokio::test]
async fn a_reader_keeps_what_is_replaced_or_removed() {
    let place = place();
    let settings = CacheSettings { max_age: Some(HOUR), ..CacheSettings::default() };
    let (store, clock) = local_store(&place.root, &settings);
    put(&store, "k", b"one").await.unwrap();
    let first = store.fetch(&project(), &key("k"), LIMIT, &mut Said::default()).await;
    put(&store, "k", b"two").await.unwrap();
    let second = store.fetch(&project(), &key("k"), LIMIT, &mut Said::default()).await;
    clock.advance(2 * HOUR);
    let swept = store.sweep().await.unwrap();
    assert_eq!((swept.removed, swept.left), (1, 0));
    assert_eq!(get(&store, "k").await.unwrap(), None);
    assert_eq!(content(first.unwrap().unwrap()), b"one");
    assert_eq!(content(second.unwrap().unwrap()), b"two");
    assert!(names(&place.root).is_empty(), "empty directories go with the cache");
}

#[tokio::test]
async fn the_least_recently_used_goes_first() {
    let place = place();
    let settings = CacheSettings { quota: Some(2500), ..CacheSettings::default() };
    let (store, clock) = local_store(&place.root, &settings);
    for name in ["a", "b"] {
        put(&store, name, &[b'x'; 900]).await.unwrap();
        clock.advance(HOUR);
    }
    // The older one is used again.
    assert!(get(&store, "a").await.unwrap().is_some());
    clock.advance(HOUR);
    put(&store, "c", &[b'x'; 900]).await.unwrap();
    assert!(get(&store, "b").await.unwrap().is_none());
    assert!(get(&store, "a").await.unwrap().is_some());
    assert!(get(&store, "c").await.unwrap().is_some());

    // One that replaces itself needs no room but the difference.
    clock.advance(HOUR);
    put(&store, "a", &[b'y'; 1000]).await.unwrap();
    assert!(get(&store, "c").await.unwrap().is_some());
}

#[tokio::test]
async fn an_archive_larger_than_the_quota_is_not_kept_and_evicts_nothing() {
    let place = place();
    let settings = CacheSettings { quota: Some(1500), ..CacheSettings::default() };
    let (store, _clock) = local_store(&place.root, &settings);
    put(&store, "a", &[b'x'; 900]).await.unwrap();
    let kept = put(&store, "b", &[b'x'; 2000]).await.unwrap();
    assert_eq!(kept, Kept::TooLarge { bytes: 2000, quota: 1500 });
    assert!(get(&store, "a").await.unwrap().is_some());
    assert!(get(&store, "b").await.unwrap().is_none());
    assert_eq!(names(&place.root.join("hep/tracker/b")), Vec::<String>::new());
}

#[tokio::test]
async fn links_and_strangers_survive_a_sweep() {
    let place = place();
    let settings = CacheSettings { max_age: Some(HOUR), ..CacheSettings::default() };
    let (store, clock) = local_store(&place.root.join("cache"), &settings);
    put(&store, "k", b"one").await.unwrap();
    let outside = place.root.join("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("cache.zip"), "not ours").unwrap();
    std::os::unix::fs::symlink(&outside, place.root.join("cache/link")).unwrap();
    fs::write(place.root.join("cache/hep/README"), "a person's").unwrap();
    clock.set(Timestamp::MAX);
    assert_eq!(store.sweep().await.unwrap().removed, 1);
    assert_eq!(fs::read(outside.join("cache.zip")).unwrap(), b"not ours");
    assert_eq!(names(&place.root.join("cache")), ["hep", "link"]);
    assert_eq!(names(&place.root.join("cache/hep")), ["README"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn whoever_reads_sees_one_archive_whole() {
    let place = place();
    let settings = CacheSettings { quota: Some(400_000), ..CacheSettings::default() };
    let clock = Arc::new(SystemClock);
    let open = || {
        let clock: Arc<dyn Clock> = Arc::<SystemClock>::clone(&clock);
        Arc::new(CacheStore::open(&place.root, &settings, clock).unwrap())
    };
    let done = Arc::new(AtomicBool::new(false));
    let tracker = tokio_util::task::TaskTracker::new();
    // Stores of their own, as in processes of their own.
    let mut writers = Vec::new();
    for letter in [b'a', b'b'] {
        let store = open();
        writers.push(tracker.spawn(async move {
            for round in 0..60_usize {
                let content = vec![letter; 50_000 + 1000 * round];
                assert_eq!(put(&store, "k", &content).await.unwrap(), Kept::Yes);
                put(&store, &format!("filler {round}"), &content).await.unwrap();
            }
        }));
    }
    let mut readers = Vec::new();
    for _ in 0..2 {
        let (store, done) = (open(), Arc::clone(&done));
        readers.push(tracker.spawn(async move {
            let mut seen = 0_u32;
            while !done.load(Ordering::Relaxed) {
                if let Some(content) = get(&store, "k").await.unwrap() {
                    let first = content[0];
                    assert!(content.iter().all(|byte| *byte == first), "a mixture");
                    assert_eq!((content.len() - 50_000) % 1000, 0, "a piece");
                    seen += 1;
                }
            }
            seen
        }));
    }
    let (store, stop) = (open(), Arc::clone(&done));
    let sweeper = tracker.spawn(async move {
        while !stop.load(Ordering::Relaxed) {
            store.sweep().await.unwrap();
        }
    });
    for writer in writers {
        writer.await.unwrap();
    }
    done.store(true, Ordering::Relaxed);
    let mut seen = 0;
    for reader in readers {
        seen += reader.await.unwrap();
    }
    sweeper.await.unwrap();
    assert!(seen > 0, "nothing was ever read");
    let left = open().sweep().await.unwrap().left;
    assert!(left <= 400_000, "{left} bytes are left");
}

/// Runs one test of this file in a process of its own.
fn child(test: &str, root: &Utf8Path, through: &[&str]) -> Command {
    let exe = std::env::current_exe().unwrap();
    let mut args: Vec<&str> = through.to_vec();
    let exe = exe.to_str().unwrap();
    args.extend([exe, "--exact", "--nocapture", "--include-ignored", test]);
    let mut command = Command::new(args[0]);
    command.args(&args[1..]).env("BRIDGE_TEST_CACHE", root).stdin(Stdio::null());
    command
}

/// Gives the directory if this process is the one that was started by another test.
fn as_child() -> Option<Utf8PathBuf> {
    std::env::var("BRIDGE_TEST_CACHE").ok().map(Utf8PathBuf::from)
}

#[test]
fn a_writer_that_is_killed_leaves_the_old_archive_and_litter_that_is_swept() {
    const NAME: &str = "cache::tests::local::a_writer_that_is_killed_leaves_the_old_archive_and_litter_that_is_swept";
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    if let Some(root) = as_child() {
        runtime.block_on(async {
            let (store, _clock) = local_store(&root, &CacheSettings::default());
            let draft = store.draft(&project(), &key("k")).await.unwrap();
            draft.writer().unwrap().write_all(b"half an arch").unwrap();
            // Died before the name was given.
            rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL)
                .unwrap();
            std::future::pending::<()>().await;
        });
    }
    let place = place();
    runtime.block_on(async {
        let (store, _clock) = local_store(&place.root, &CacheSettings::default());
        put(&store, "k", b"old").await.unwrap();
    });
    let status = child(NAME, &place.root, &[]).stdout(Stdio::null()).status().unwrap();
    assert!(!status.success());
    let dir = place.root.join("hep/tracker/k");
    assert_eq!(names(&dir).len(), 3, "{:?}", names(&dir));
    runtime.block_on(async {
        let clock = ManualClock::new(SystemClock.now());
        let settings = CacheSettings::default();
        let store = CacheStore::open(&place.root, &settings, Arc::new(clock.clone())).unwrap();
        assert_eq!(get(&store, "k").await.unwrap().unwrap(), b"old");
        store.sweep().await.unwrap();
        assert_eq!(names(&dir).len(), 3, "somebody may be writing it");
        clock.advance(25 * HOUR);
        store.sweep().await.unwrap();
        assert_eq!(names(&dir), ["cache.zip", "metadata.json"]);
        assert_eq!(get(&store, "k").await.unwrap().unwrap(), b"old");
    });
}

#[test]
fn a_full_disk_is_an_error_and_the_old_archive_stays() {
    const NAME: &str = "cache::tests::local::a_full_disk_is_an_error_and_the_old_archive_stays";
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    if let Some(root) = as_child() {
        runtime.block_on(async {
            let (store, _clock) = local_store(&root, &CacheSettings::default());
            let (project, key) = (project(), key("k"));
            let draft = store.draft(&project, &key).await.unwrap();
            let written = draft.writer().unwrap().write_all(&[b'x'; 64 * 1024]);
            assert_eq!(written.unwrap_err().kind(), std::io::ErrorKind::FileTooLarge);
            drop(draft);
        });
        return;
    }
    let place = place();
    runtime.block_on(async {
        let (store, _clock) = local_store(&place.root, &CacheSettings::default());
        put(&store, "k", b"old").await.unwrap();
    });
    let limited = ["sh", "-c", "trap '' XFSZ; ulimit -f 8; exec \"$0\" \"$@\""];
    let output = child(NAME, &place.root, &limited).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    assert_eq!(names(&place.root.join("hep/tracker/k")), ["cache.zip", "metadata.json"]);
    assert_eq!(fs::read(place.root.join("hep/tracker/k/cache.zip")).unwrap(), b"old");
}

#[tokio::test]
async fn a_directory_that_cannot_be_written_is_named() {
    let place = place();
    fs::write(place.root.join("file"), "").unwrap();
    // Not even root can make a directory in the second one.
    for root in [place.root.join("file/cache"), "/sys/bridge-cache".into()] {
        let (store, _clock) = local_store(&root, &CacheSettings::default());
        let error = put(&store, "k", b"x").await.unwrap_err();
        let text = chain(&error);
        let expected = format!("cannot write in {root}/hep/tracker/k: ");
        assert!(text.starts_with(&expected), "{text}");
        assert_eq!(get(&store, "k").await.unwrap(), None);
    }
    // A directory has the archive's name.
    let (store, _clock) = local_store(&place.root, &CacheSettings::default());
    fs::create_dir_all(place.root.join("hep/tracker/d/cache.zip")).unwrap();
    assert!(chain(&get(&store, "d").await.unwrap_err()).contains("it is no file"));
    assert!(chain(&put(&store, "d", b"x").await.unwrap_err()).contains("cannot write"));
}

#[test]
fn nothing_needs_a_file_system_with_links() {
    for source in [include_str!("../local.rs"), include_str!("../mod.rs")] {
        for call in ["hard_link", "symlink(", "persist_noclobber"] {
            assert!(!source.contains(call), "{call}");
        }
    }
}
