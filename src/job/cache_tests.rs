//! Caches of jobs: keys, policies, and two jobs that hand one another a directory.

use std::fs;
use std::process::Command;

use super::super::sources::tests::Said;
use super::super::tests::{payload, runner, variable};
use super::super::{Slot, plan};
use super::*;
use crate::cache::CacheSettings;
use crate::domain::clock::{Clock as _, SystemClock};

struct World {
    _dir: tempfile::TempDir,
    root: Utf8PathBuf,
    store: CacheStore,
    payload: JobPayload,
}

fn cache(key: &str, paths: &[&str]) -> Cache {
    Cache {
        key: key.into(),
        paths: paths.iter().map(|path| (*path).to_owned()).collect(),
        ..Cache::default()
    }
}

fn store(root: &camino::Utf8Path, settings: &CacheSettings) -> CacheStore {
    CacheStore::open(&root.join("cache"), settings, Arc::new(SystemClock)).unwrap()
}

impl World {
    fn new(caches: Vec<Cache>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let root = Utf8PathBuf::from_path_buf(dir.path().canonicalize().unwrap()).unwrap();
        let mut payload = payload(&[("GIT_STRATEGY", "none")]);
        payload.git_info.reference = "main".into();
        payload.job_info.project_id = 77;
        payload.cache = caches;
        Self { store: store(&root, &CacheSettings::default()), _dir: dir, root, payload }
    }

    fn set(&mut self, name: &str, value: &str) {
        self.payload.variables.push(variable(name, value));
    }

    /// Makes a job ready in a slot of its own.
    fn plan(&self, slot: u32) -> Plan {
        let mut runner = runner();
        runner.builds_dir = self.root.join("builds");
        let plan = plan(&self.payload, &runner, Slot { concurrent: slot, project: slot }).unwrap();
        fs::create_dir_all(&plan.project_dir).unwrap();
        plan
    }

    async fn restore(&self, plan: &Plan) -> (Result<(), StageError>, String) {
        let mut out = Said::default();
        let result = plan.restore_cache(&self.store, &mut out).await;
        (result, out.remarks.join("\n"))
    }

    async fn archive(&self, plan: &Plan, ended: Ended) -> (Result<(), StageError>, String) {
        let mut out = Said::default();
        let result = plan.archive_cache(&self.store, ended, &mut out).await;
        (result, out.remarks.join("\n"))
    }

    fn archive_file(&self, key: &str) -> Utf8PathBuf {
        self.root.join("cache/hep/tracker").join(key).join("cache.zip")
    }
}

fn write(plan: &Plan, name: &str, content: &str) {
    let path = plan.project_dir.join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
}

fn read(plan: &Plan, name: &str) -> Option<String> {
    fs::read_to_string(plan.project_dir.join(name)).ok()
}

const LOCALLY: &str = "No URL provided, cache will not be downloaded from shared cache server. \
                       Instead a local version of cache will be extracted.";

#[tokio::test]
async fn one_job_leaves_what_the_next_one_finds() {
    let mut world = World::new(vec![cache("deps-$CI_COMMIT_REF_SLUG", &["vendor/", "build"])]);
    world.set("CI_COMMIT_REF_SLUG", "main");
    let first = world.plan(0);
    assert!(first.restores_caches() && first.archives_caches(Ended::Succeeded));
    assert!(!first.archives_caches(Ended::Failed));
    let (result, said) = world.restore(&first).await;
    result.unwrap();
    let expected = format!(
        "Checking cache for deps-main...\n{LOCALLY}\nCache file does not exist\nFailed to extract cache"
    );
    assert_eq!(said, expected);

    write(&first, "vendor/a/lib.rs", "pub fn a() {}");
    write(&first, "build/out", "binary");
    write(&first, "src/main.rs", "not cached");
    let (result, said) = world.archive(&first, Ended::Succeeded).await;
    result.unwrap();
    assert!(said.starts_with("Creating cache deps-main...\n"), "{said}");
    assert!(said.contains("build: found 2 matching artifact files and directories"), "{said}");
    assert!(said.ends_with("Cache will be stored only locally.\nCreated cache"), "{said}");

    let second = world.plan(1);
    let (result, said) = world.restore(&second).await;
    result.unwrap();
    assert!(said.ends_with("\nSuccessfully extracted cache"), "{said}");
    assert_eq!(read(&second, "vendor/a/lib.rs").as_deref(), Some("pub fn a() {}"));
    assert_eq!(read(&second, "build/out").as_deref(), Some("binary"));
    assert_eq!(read(&second, "src/main.rs"), None);

    // The same again is harmless.
    assert!(world.restore(&second).await.1.ends_with("\nSuccessfully extracted cache"));
}

#[tokio::test]
async fn an_archive_is_rebuilt_when_something_changed_and_only_then() {
    let world = World::new(vec![cache("k", &["vendor"])]);
    let plan = world.plan(0);
    write(&plan, "vendor/a", "1");
    write(&plan, "vendor/b", "2");
    let long_ago = std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    let age = |name: &str| {
        let file = fs::File::options().write(true).open(plan.project_dir.join(name)).unwrap();
        file.set_modified(long_ago).unwrap();
    };
    age("vendor/a");
    age("vendor/b");
    let up_to_date = "Archive is up to date!\nCreated cache";
    assert!(!world.archive(&plan, Ended::Succeeded).await.1.contains(up_to_date));
    assert!(world.archive(&plan, Ended::Succeeded).await.1.ends_with(up_to_date));

    // Newer content of the same size.
    write(&plan, "vendor/a", "3");
    let future = fs::File::options().write(true).open(plan.project_dir.join("vendor/a")).unwrap();
    future
        .set_modified(
            SystemClock.now().checked_add(jiff::SignedDuration::from_secs(60)).unwrap().into(),
        )
        .unwrap();
    assert!(!world.archive(&plan, Ended::Succeeded).await.1.contains("up to date"));
    age("vendor/a");
    assert!(world.archive(&plan, Ended::Succeeded).await.1.ends_with(up_to_date));

    // Neither what is gone nor what is old and new here makes a file newer.
    fs::remove_file(plan.project_dir.join("vendor/b")).unwrap();
    assert!(!world.archive(&plan, Ended::Succeeded).await.1.contains("up to date"));
    write(&plan, "vendor/c", "4");
    age("vendor/c");
    assert!(!world.archive(&plan, Ended::Succeeded).await.1.contains("up to date"));
    assert!(world.archive(&plan, Ended::Succeeded).await.1.ends_with(up_to_date));
    let second = world.plan(1);
    world.restore(&second).await.0.unwrap();
    assert_eq!(read(&second, "vendor/b"), None);
    assert_eq!(read(&second, "vendor/c").as_deref(), Some("4"));
}

#[tokio::test]
async fn keys_are_made_as_the_official_runner_makes_them() {
    let long = "x".repeat(300);
    for (key, vars, expected, warning) in [
        ("", vec![], Some("simulate/main"), None),
        ("plain", vec![], Some("plain"), None),
        ("$A-$B", vec![("A", "a"), ("B", "b/c")], Some("a-b/c"), None),
        ("${A}", vec![("A", "../../etc")], Some("etc"), Some("sanitized to \"etc\"")),
        ("$NOTHING", vec![], None, None),
        ("/", vec![], None, Some("cache key \"/\" could not be sanitized")),
        (
            "this/../k\\ ",
            vec![],
            Some("k"),
            Some("cache key \"this/../k\\\\ \" sanitized to \"k\""),
        ),
        (long.as_str(), vec![], Some(long.as_str()), None),
        ("a/../b ", vec![("FF_HASH_CACHE_KEYS", "true")], Some("a/../b "), None),
    ] {
        let mut world = World::new(vec![cache(key, &["x"])]);
        for (name, value) in vars {
            world.set(name, value);
        }
        let plan = world.plan(0);
        let wish = &plan.caches.wishes[0];
        assert_eq!(wish.key.as_ref().map(Key::readable), expected, "{key:?}");
        let warnings = wish.warnings.join("\n");
        assert_eq!(!warnings.is_empty(), warning.is_some(), "{key:?}: {warnings}");
        assert!(warnings.contains(warning.unwrap_or_default()), "{key:?}: {warnings}");
        if expected.is_none() {
            let said = world.restore(&plan).await.1;
            assert!(said.ends_with("Skipping cache extraction due to empty cache key"), "{said}");
            let said = world.archive(&plan, Ended::Succeeded).await.1;
            assert!(said.ends_with("Skipping cache archiving due to empty cache key"), "{said}");
        }
    }
}

#[tokio::test]
async fn keys_to_fall_back_on_are_tried_in_turn() {
    let mut entry = cache("new", &["x"]);
    entry.fallback_keys = vec!["$OTHER".into(), String::new(), "default-protected".into()];
    let mut world = World::new(vec![entry]);
    world.set("OTHER", "other");
    world.set("CACHE_FALLBACK_KEY", "last");

    // Somebody left the last two.
    for key in ["last", "default-protected"] {
        let mut left = World::new(vec![cache(key, &["x"])]);
        left.store = store(&world.root, &CacheSettings::default());
        let plan = left.plan(0);
        write(&plan, "x", key);
        left.archive(&plan, Ended::Succeeded).await.0.unwrap();
    }
    let plan = world.plan(0);
    let said = world.restore(&plan).await.1;
    let tried: Vec<&str> = said.lines().filter(|line| line.starts_with("Checking")).collect();
    assert_eq!(
        tried,
        [
            "Checking cache for new...",
            "Checking cache for other...",
            "Checking cache for default-protected..."
        ]
    );
    assert_eq!(read(&plan, "x").as_deref(), Some("default-protected"));
}

#[tokio::test]
async fn no_variable_of_a_job_reaches_a_protected_cache() {
    let protected = World::new(vec![cache("main-protected", &["x"])]);
    let mut hashed = World::new(vec![cache("main-protected", &["x"])]);
    hashed.store = store(&protected.root, &CacheSettings::default());
    hashed.set("FF_HASH_CACHE_KEYS", "true");
    for world in [&protected, &hashed] {
        let plan = world.plan(0);
        write(&plan, "x", "secret");
        assert!(world.archive(&plan, Ended::Succeeded).await.1.ends_with("Created cache"));
    }
    let hash = Key::hashed("main-protected").unwrap();
    let hash = {
        let mut names = fs::read_dir(protected.root.join("cache/hep/tracker")).unwrap();
        names
            .find_map(|name| {
                let name = name.unwrap().file_name().into_string().unwrap();
                (name.len() == 64 && name != hash.readable()).then_some(name)
            })
            .unwrap()
    };
    for name in [
        "main-protected",
        "main-protected.",
        "main-protected \t",
        "main-protected/ /",
        "x\\..\\main-protected",
        "$A-protected",
        "${B}",
        &hash,
        &hash.to_uppercase(),
    ] {
        for flag in ["false", "true"] {
            let mut world = World::new(vec![cache("mine", &["x"])]);
            world.store = store(&protected.root, &CacheSettings::default());
            world.set("A", "main");
            world.set("B", "main-protected");
            world.set("FF_HASH_CACHE_KEYS", flag);
            world.set("CACHE_FALLBACK_KEY", name);
            let plan = world.plan(0);
            let said = world.restore(&plan).await.1;
            assert_eq!(read(&plan, "x"), None, "{name:?} {flag}: {said}");
            if flag == "false" {
                assert!(said.contains("not allowed to end in \"-protected\""), "{name:?}: {said}");
            }
        }
    }
}

#[tokio::test]
async fn policies_are_kept_and_unknown_ones_fail_the_stage() {
    for (policy, pulls, pushes) in [
        ("", true, true),
        ("pull-push", true, true),
        ("pull", true, false),
        ("push", false, true),
        ("$P", true, false),
    ] {
        let mut world = World::new(vec![Cache { policy: policy.into(), ..cache("k", &["x"]) }]);
        world.set("P", "pull");
        let plan = world.plan(0);
        write(&plan, "x", "1");
        let (result, said) = world.restore(&plan).await;
        result.unwrap();
        assert_eq!(said == "Not downloading cache k due to policy", !pulls, "{policy}: {said}");
        let (result, said) = world.archive(&plan, Ended::Succeeded).await;
        result.unwrap();
        assert_eq!(said == "Not uploading cache k due to policy", !pushes, "{policy}: {said}");
        assert_eq!(world.archive_file("k").exists(), pushes);
    }
    let world = World::new(vec![Cache { policy: "both".into(), ..cache("k", &["x"]) }]);
    let plan = world.plan(0);
    let error = world.restore(&plan).await.0.unwrap_err();
    assert_eq!(error.to_string(), "restore_cache: unknown cache policy both for k");
    let error = world.archive(&plan, Ended::Succeeded).await.0.unwrap_err();
    assert_eq!(error.to_string(), "archive_cache: unknown cache policy both for k");
}

#[tokio::test]
async fn when_decides_what_is_archived() {
    for (when, success, failure) in [
        ("", true, false),
        ("on_success", true, false),
        ("on_failure", false, true),
        ("always", true, true),
        ("never", false, false),
    ] {
        let world = World::new(vec![Cache { when: when.into(), ..cache("k", &["x"]) }]);
        let plan = world.plan(0);
        write(&plan, "x", "1");
        for (ended, due) in [(Ended::Succeeded, success), (Ended::Failed, failure)] {
            assert_eq!(plan.archives_caches(ended), due, "{when}");
            let said = world.archive(&plan, ended).await.1;
            assert_eq!(!said.is_empty(), due, "{when}: {said}");
        }
    }
    assert_eq!(Plan::archive_stage(Ended::Failed), "archive_cache_on_failure");
}

#[tokio::test]
async fn nothing_to_cache_is_said_and_keeps_nothing() {
    let world = World::new(vec![cache("k", &["nothing/"]), cache("other", &[])]);
    let plan = world.plan(0);
    let (result, said) = world.archive(&plan, Ended::Succeeded).await;
    result.unwrap();
    assert!(said.ends_with("\nNo files to cache."), "{said}");
    assert!(said.contains("nothing/: no matching files."), "{said}");
    assert!(!world.archive_file("k").exists());
    let none = World::new(vec![cache("other", &[])]).plan(0);
    assert!(!none.restores_caches() && !none.archives_caches(Ended::Succeeded));
}

#[tokio::test]
async fn untracked_files_are_cached_ignored_ones_too() {
    let world = World::new(vec![Cache { untracked: true, ..cache("k", &[]) }]);
    let plan = world.plan(0);
    write(&plan, "tracked", "1");
    write(&plan, ".gitignore", "*.o\n");
    let git = |args: &[&str]| {
        let status =
            Command::new("git").args(args).current_dir(&plan.project_dir).status().unwrap();
        assert!(status.success());
    };
    git(&["init", "-q", "."]);
    git(&["add", "tracked", ".gitignore"]);
    write(&plan, "dir/new file\n2", "2");
    write(&plan, "a.o", "3");
    // What the job may have written for git to run.
    let ran = world.root.join("ran");
    git(&["config", "core.fsmonitor", &format!("touch {ran}; false")]);
    let (result, said) = world.archive(&plan, Ended::Succeeded).await;
    result.unwrap();
    assert!(said.contains("untracked: found 2 files"), "{said}");
    assert!(!ran.exists());
    let second = world.plan(1);
    world.restore(&second).await.0.unwrap();
    assert_eq!(read(&second, "dir/new file\n2").as_deref(), Some("2"));
    assert_eq!(read(&second, "a.o").as_deref(), Some("3"));
    assert_eq!(read(&second, "tracked"), None);

    // Without a repository there is nothing that is untracked, and a word about it.
    let bare = world.plan(2);
    let (result, said) = world.archive(&bare, Ended::Succeeded).await;
    result.unwrap();
    assert!(said.contains("untracked: git ls-files ended with exit code 128"), "{said}");
}

#[tokio::test]
async fn a_broken_archive_is_a_warning_and_the_next_key_is_tried() {
    let mut entry = cache("broken", &["vendor", "../outside", "/etc/x", ".git", "link/x", "."]);
    entry.fallback_keys = vec!["good".into()];
    let mut world = World::new(vec![entry]);
    world.set("FF_CLEAN_UP_FAILED_CACHE_EXTRACT", "true");
    let plan = world.plan(0);
    let mut good = World::new(vec![cache("good", &["vendor"])]);
    good.store = store(&world.root, &CacheSettings::default());
    let left = good.plan(0);
    write(&left, "vendor/a", "good");
    good.archive(&left, Ended::Succeeded).await.0.unwrap();

    for rubbish in [&b""[..], b"PK\x03\x04 and then nothing", b"\x28\xb5\x2f\xfdxx", b"\x1f\x8b"] {
        let file = world.archive_file("broken");
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(&file, rubbish).unwrap();
        write(&plan, "vendor/half", "extracted");
        write(&plan, ".git/config", "");
        fs::create_dir_all(world.root.join("elsewhere/x")).unwrap();
        let link = plan.project_dir.join("link");
        if !link.exists() {
            std::os::unix::fs::symlink(world.root.join("elsewhere"), &link).unwrap();
        }
        let outside = plan.project_dir.parent().unwrap().join("outside");
        fs::write(&outside, "").unwrap();
        let (result, said) = world.restore(&plan).await;
        result.unwrap();
        assert!(said.contains("\nFailed to extract cache\nRemoving vendor\n"), "{said}");
        assert!(said.ends_with("\nSuccessfully extracted cache"), "{said}");
        assert_eq!(read(&plan, "vendor/half"), None);
        assert_eq!(read(&plan, "vendor/a").as_deref(), Some("good"));
        assert!(outside.exists() && world.root.join("elsewhere/x").exists());
        assert!(plan.project_dir.join(".git/config").exists());
    }
}

#[tokio::test]
async fn a_hostile_archive_writes_nothing_outside() {
    let world = World::new(vec![cache("k", &["x"])]);
    let plan = world.plan(0);
    let file = world.archive_file("k");
    fs::create_dir_all(file.parent().unwrap()).unwrap();
    let mut zip = zip::ZipWriter::new(fs::File::create(&file).unwrap());
    let options = zip::write::SimpleFileOptions::default();
    let absolute = world.root.join("absolute");
    for name in ["../climbed", absolute.as_str()] {
        zip.start_file(name, options).unwrap();
        std::io::Write::write_all(&mut zip, b"x").unwrap();
    }
    zip.add_symlink("out", world.root.as_str(), options).unwrap();
    zip.start_file("out/through", options).unwrap();
    std::io::Write::write_all(&mut zip, b"x").unwrap();
    zip.finish().unwrap();
    let (result, said) = world.restore(&plan).await;
    result.unwrap();
    assert!(!plan.project_dir.parent().unwrap().join("climbed").exists(), "{said}");
    assert!(!absolute.exists() && !world.root.join("through").exists(), "{said}");
}

#[tokio::test]
async fn a_store_that_cannot_be_used_is_warnings_and_no_failure() {
    let mut world = World::new(vec![cache("k", &["x"])]);
    world.store = CacheStore::open(
        "/sys/bridge-cache".into(),
        &CacheSettings::default(),
        Arc::new(SystemClock),
    )
    .unwrap();
    let plan = world.plan(0);
    write(&plan, "x", "1");
    let (result, said) = world.archive(&plan, Ended::Succeeded).await;
    result.unwrap();
    assert!(said.contains("\ncannot write in /sys/bridge-cache/hep/tracker/k: "), "{said}");
    assert!(said.ends_with("\nFailed to create cache"), "{said}");
    world.restore(&plan).await.0.unwrap();

    let tiny = CacheSettings { quota: Some(10), ..CacheSettings::default() };
    world.store = store(&world.root, &tiny);
    let (result, said) = world.archive(&plan, Ended::Succeeded).await;
    result.unwrap();
    assert!(
        said.contains("bytes, and all caches together may take 10\nFailed to create"),
        "{said}"
    );
}

#[tokio::test]
async fn a_cache_that_cannot_be_fetched_is_tried_as_often_as_the_job_asks() {
    let mut world = World::new(vec![cache("k", &["x"])]);
    world.set("RESTORE_CACHE_ATTEMPTS", "3");
    world.set("FF_USE_EXPONENTIAL_BACKOFF_STAGE_RETRY", "false");
    fs::create_dir_all(world.archive_file("k")).unwrap();
    let plan = world.plan(0);
    let (result, said) = world.restore(&plan).await;
    result.unwrap();
    assert_eq!(said.matches("Checking cache for k...").count(), 3, "{said}");
    assert!(said.contains("attempt 3 of 3 to restore the cache follows in 0 s"), "{said}");
}

#[tokio::test]
async fn formats_and_levels_are_taken_from_variables() {
    for (format, magic) in [("", &b"PK"[..]), ("ZIP", b"PK"), ("rar", b"PK")] {
        let mut world = World::new(vec![cache("k", &["x"])]);
        world.set("CACHE_COMPRESSION_FORMAT", format);
        let plan = world.plan(0);
        write(&plan, "x", "1");
        world.archive(&plan, Ended::Succeeded).await.0.unwrap();
        assert!(fs::read(world.archive_file("k")).unwrap().starts_with(magic), "{format}");
    }
    let mut world = World::new(vec![cache("k", &["x"])]);
    for (name, value) in [
        ("CACHE_COMPRESSION_FORMAT", "tarzstd"),
        ("CACHE_COMPRESSION_LEVEL", "Slowest"),
        ("CACHE_REQUEST_TIMEOUT", "3"),
        ("RESTORE_CACHE_ATTEMPTS", "4"),
    ] {
        world.set(name, value);
    }
    let caches = world.plan(0).caches;
    assert_eq!((caches.format, caches.level), (Format::TarZstd, Level::Slowest));
    assert_eq!((caches.transfer_limit, caches.attempts), (Duration::from_secs(180), 4));
    for (name, value, part) in [
        ("CACHE_COMPRESSION_FORMAT", "rar", "using zip"),
        ("CACHE_COMPRESSION_LEVEL", "9", "using default"),
        ("CACHE_REQUEST_TIMEOUT", "ten", "using 10"),
        ("RESTORE_CACHE_ATTEMPTS", "-2", "using 1"),
        ("RESTORE_CACHE_ATTEMPTS", "11", "using 10"),
    ] {
        let mut world = World::new(vec![cache("k", &["x"])]);
        world.set(name, value);
        let warnings = world.plan(0).warnings.join("\n");
        assert!(warnings.contains(name) && warnings.contains(part), "{warnings}");
    }
}
