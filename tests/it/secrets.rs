//! Where a job's secrets are while it runs and afterwards: looked for in every file, argument list and
//! trace of the real binary.

use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use base64::Engine as _;
use base64::prelude::{BASE64_STANDARD_NO_PAD, BASE64_URL_SAFE_NO_PAD};
use bridge::coordinator::{NewJob, Status, Variable};
use serde_json::json;

use crate::support::{Bed, text_of, until};

/// One for each place of a payload that can hold a secret; all begin alike, so that one search finds
/// all.
const CANARY: &str = "kanarienvogel";

/// Gives a canary with its place's name in it.
fn canary(place: &str) -> String {
    format!("{CANARY}-{place}-4711")
}

/// A job with a canary in every place.
fn full_of_canaries(name: &str) -> NewJob {
    NewJob::new(name)
        .env("GIT_STRATEGY", "none")
        .variable(Variable::new("PLAIN", canary("plain")))
        .variable(Variable::new("MASKED", canary("masked")).masked())
        .variable(Variable::new("RAW", canary("$raw")).masked().raw())
        .variable(Variable::new("FILE", canary("file") + "\n").file())
        .variable(
            Variable::new("LINES", format!("first line\n{}\nlast line", canary("lines")))
                .masked()
                .file(),
        )
        .dependency(json!({
            "id": 1, "name": "before", "token": canary("dependency"),
            "artifacts_file": null,
        }))
        .payload(json!({
            "credentials": [{
                "type": "registry", "url": "registry.example.org",
                "username": "u", "password": canary("registry"),
            }],
        }))
}

/// The canary as it is, and within base64 wherever it stands.
fn needles() -> Vec<Vec<u8>> {
    let mut needles = vec![CANARY.as_bytes().to_vec()];
    for before in 0..3 {
        let text = format!("{}{CANARY}", "x".repeat(before));
        for encoded in [BASE64_STANDARD_NO_PAD.encode(&text), BASE64_URL_SAFE_NO_PAD.encode(&text)]
        {
            let whole = text.len() * 8 / 6;
            needles.push(encoded.as_bytes()[(before * 8).div_ceil(6)..whole].to_vec());
        }
    }
    needles
}

fn files_below(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let Ok(entries) = std::fs::read_dir(dir) else { return files };
    for entry in entries.flatten() {
        let path = entry.path();
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            files.extend(files_below(&path));
        }
        files.push(path);
    }
    files
}

/// Looks for the canary in every file below a directory.
fn canaries_below(dir: &Path) -> Vec<PathBuf> {
    let needles = needles();
    let holds = |path: &PathBuf| {
        let bytes = std::fs::read(path).unwrap_or_default();
        needles.iter().any(|needle| bytes.windows(needle.len()).any(|w| w == needle))
    };
    files_below(dir).into_iter().filter(holds).collect()
}

/// Watches the argument lists of all processes until it is told to stop; gives those with a secret.
struct ArgumentLists {
    stop: Arc<AtomicBool>,
    watcher: std::thread::JoinHandle<(usize, Vec<String>)>,
}

impl ArgumentLists {
    fn watch(secrets: Vec<String>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&stop);
        let watcher = std::thread::spawn(move || {
            let (mut looks, mut found) = (0, Vec::new());
            while !told.load(Ordering::Relaxed) {
                for entry in std::fs::read_dir("/proc").unwrap().flatten() {
                    let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
                    let line = String::from_utf8_lossy(&line).into_owned();
                    if secrets.iter().any(|secret| line.contains(secret)) {
                        found.push(line);
                    }
                }
                looks += 1;
            }
            (looks, found)
        });
        Self { stop, watcher }
    }

    fn assert_clean(self) {
        self.stop.store(true, Ordering::Relaxed);
        let (looks, found) = self.watcher.join().unwrap();
        assert!(looks > 0);
        assert!(found.is_empty(), "secrets in argument lists: {found:#?}");
    }
}

/// Says who but the owner can get at a file, going by the modes from `root` on.
fn open_to_others(root: &Path, path: &Path) -> bool {
    let mode = |path: &Path| {
        std::fs::symlink_metadata(path).map_or(0, |meta| meta.permissions().mode() & 0o777)
    };
    let closed = |dir: &Path| mode(dir) & 0o011 == 0;
    let hidden = path.ancestors().skip(1).take_while(|dir| dir.starts_with(root)).any(closed);
    !hidden && mode(path) & 0o077 != 0
}

#[tokio::test(flavor = "multi_thread")]
async fn no_secret_is_in_the_state_directory_while_a_job_runs_or_afterwards() {
    let bed = Bed::local().await;
    let daemon = bed.serve();
    let job = bed.gitlab.enqueue(
        full_of_canaries("canaries")
            .script("echo \"masked: $MASKED raw: $RAW\"; cat \"$LINES\"")
            .script("sed 's/^/+ /' \"$LINES\"; printf %s \"user:$MASKED\" | base64 -w0; echo")
            .script("echo up > started")
            .script(bed.wait_for("gate")),
    );
    until("the job to run", || {
        files_below(&bed.path("builds")).into_iter().find(|path| path.ends_with("started"))
    })
    .await;
    until("its log to be carried", || {
        let trace = String::from_utf8_lossy(&bed.gitlab.job(job)?.trace).into_owned();
        trace.contains("masked: ").then_some(())
    })
    .await;
    let state = bed.path("state");
    assert_eq!(canaries_below(&state), Vec::<PathBuf>::new(), "while it runs");
    // The search itself works: a file variable is where only the job reads it.
    let private = canaries_below(&bed.path("builds"));
    assert!(private.iter().any(|path| path.ends_with("FILE")), "{private:?}");
    bed.open("gate");
    bed.finished(job).await;
    bed.nothing_owed().await;
    assert_eq!(canaries_below(&state), Vec::<PathBuf>::new(), "afterwards");
    assert_eq!(canaries_below(&bed.path("builds")), Vec::<PathBuf>::new(), "file variables went");
    assert_eq!(canaries_below(&bed.path("jobs")), Vec::<PathBuf>::new(), "the environment went");
    assert!(!bed.log().contains(CANARY), "{}", bed.log());

    let view = bed.gitlab.job(job).unwrap();
    assert_eq!(view.status, Status::Success);
    let text = text_of(&view);
    let clean =
        needles().into_iter().all(|needle| !text.contains(&*String::from_utf8_lossy(&needle)));
    assert!(clean, "{text}");
    assert!(text.contains("masked: [MASKED] raw: [MASKED]\n"), "{text}");
    assert!(text.contains("+ [MASKED]\n"), "line by line: {text}");
    assert!(daemon.term().await.success());
    assert_eq!(canaries_below(&state), Vec::<PathBuf>::new(), "after the end");
    bed.assert_no_violations();
}

#[tokio::test(flavor = "multi_thread")]
async fn no_secret_is_in_an_argument_list_or_in_a_file_that_others_can_read() {
    let bed = Bed::local().await;
    let watch = ArgumentLists::watch(vec![CANARY.to_owned(), bed.token.clone()]);
    let _daemon = bed.serve();
    let job = bed.gitlab.enqueue(
        full_of_canaries("private")
            .hook("pre_get_sources_script", ["true \"$MASKED\""])
            .script("umask 022; echo public > theirs; echo up > started")
            .script(bed.wait_for("gate")),
    );
    until("the job to run", || {
        files_below(&bed.path("builds")).into_iter().find(|path| path.ends_with("started"))
    })
    .await;
    let root = bed.dir.path();
    let mut looked_at = 0;
    for below in ["state", "builds", "jobs"] {
        for path in files_below(&bed.path(below)) {
            looked_at += 1;
            // The bed's own folder would hide everything: only what is below it counts.
            let open = open_to_others(&root.join(below), &path);
            assert!(!open, "others can get at {}", path.display());
        }
    }
    assert!(looked_at > 8, "{looked_at}");
    let key = std::fs::metadata(bed.path("bridge.key")).unwrap().permissions().mode();
    assert_eq!(key & 0o777, 0o600);
    bed.open("gate");
    bed.finished(job).await;
    bed.nothing_owed().await;
    watch.assert_clean();
}

/// The directories beside checkouts, where file variables are.
fn private_dirs(bed: &Bed) -> Vec<PathBuf> {
    let mut dirs = files_below(&bed.path("builds"));
    dirs.retain(|path| path.is_dir() && path.extension().is_some_and(|end| end == "tmp"));
    dirs
}

async fn job_with_files(bed: &Bed, name: &str) -> i64 {
    let job = bed
        .gitlab
        .enqueue(full_of_canaries(name).script("test -s \"$FILE\"").script(bed.wait_for("gate")));
    until("the job to run", || {
        let running = bed.row(job)["state"] == "running";
        (running && !private_dirs(bed).is_empty()).then_some(())
    })
    .await;
    for dir in private_dirs(bed) {
        assert_eq!(std::fs::metadata(&dir).unwrap().permissions().mode() & 0o777, 0o700);
    }
    job
}

#[tokio::test(flavor = "multi_thread")]
async fn file_variables_are_gone_after_kill_9() {
    for point in ["B", "C", "D", "E", "F", "concluded", "K", "K2", "anywhere"] {
        let bed = Bed::local().await;
        let daemon = bed.serve_with(&[("BRIDGE_CRASH_AT", point)]);
        let job = if point == "anywhere" {
            let job = job_with_files(&bed, point).await;
            daemon.kill();
            bed.open("gate");
            job
        } else {
            let job = bed.gitlab.enqueue(full_of_canaries(point).script("test -s \"$FILE\""));
            assert_eq!(daemon.ended().await.signal(), Some(9), "{point}\n{}", bed.log());
            job
        };
        let _daemon = bed.serve();
        assert_eq!(bed.finished(job).await.status, Status::Success, "{point}");
        bed.nothing_owed().await;
        assert_eq!(private_dirs(&bed), Vec::<PathBuf>::new(), "{point}");
        assert_eq!(canaries_below(&bed.path("builds")), Vec::<PathBuf>::new(), "{point}");
        assert_eq!(files_below(&bed.path("state/workspaces")), Vec::<PathBuf>::new(), "{point}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn file_variables_of_a_job_that_the_database_does_not_know_are_removed_at_the_start() {
    let bed = Bed::local().await;
    let daemon = bed.serve();
    job_with_files(&bed, "orphan").await;
    daemon.kill();
    bed.open("gate");
    for file in ["bridge.db", "bridge.db-wal", "bridge.db-shm"] {
        let path = bed.path("state").join(file);
        if path.exists() {
            std::fs::remove_file(path).unwrap();
        }
    }
    // Somebody else's, which no note names.
    let theirs = bed.path("builds/other/0/group/project.tmp");
    std::fs::create_dir_all(&theirs).unwrap();
    let _daemon = bed.serve();
    until("the orphan's files to be gone", || {
        (private_dirs(&bed) == [theirs.clone()]).then_some(())
    })
    .await;
    assert_eq!(files_below(&bed.path("state/workspaces")), Vec::<PathBuf>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_are_exchanged_under_a_job_that_runs_on_and_whatever_kill_9_does() {
    let bed = Bed::local().await;
    let daemon = bed.serve();
    let job = job_with_files(&bed, "rekeyed").await;
    let refused = bed.run(&["db", "rekey"]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(4), "{said}");
    assert!(said.contains("stop the daemon"), "{said}");
    assert!(daemon.term().await.success());

    let keys = || {
        let text = std::fs::read_to_string(bed.path("bridge.key")).unwrap();
        text.lines().filter(|line| !line.starts_with('#')).map(str::to_owned).collect::<Vec<_>>()
    };
    let first = keys();
    for point in ["rekey_added", "rekey_batch", "rekey_sealed"] {
        let cut = std::process::Command::new(crate::support::BRIDGE)
            .arg("--config")
            .arg(&bed.config)
            .args(["db", "rekey"])
            .env("BRIDGE_CRASH_AT", point)
            .output()
            .unwrap();
        // The first is cut when it has put a second key beside the first; the others go on with that.
        assert_eq!(cut.status.signal(), Some(9), "{point}: {cut:?}");
        assert_eq!(keys().len(), 2, "{point}");
        assert_eq!(keys()[1], first[0], "{point}");
        let doctor = bed.run(&["doctor", "--json"]);
        let said = String::from_utf8_lossy(&doctor.stdout).into_owned();
        assert!(said.contains("finish it with `bridge db rekey`"), "{said}");
    }
    let done = bed.run(&["db", "rekey"]);
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(done.status.success(), "{said}");
    assert!(said.contains("cut short"), "{said}");
    assert_eq!(keys().len(), 1);
    assert_ne!(keys(), first);

    let backup = bed.path("copy.db");
    let said = bed.run(&["db", "backup", backup.to_str().unwrap()]);
    let said = String::from_utf8_lossy(&said.stderr).into_owned();
    assert!(said.contains("bridge.key"), "the copy is of no use alone: {said}");

    let _daemon = bed.serve();
    bed.open("gate");
    assert_eq!(bed.finished(job).await.status, Status::Success);
    bed.nothing_owed().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_key_is_named_with_what_is_lost_and_what_to_do() {
    let bed = Bed::local().await;
    let daemon = bed.serve();
    let job = job_with_files(&bed, "keyless").await;
    daemon.kill();
    std::fs::rename(bed.path("bridge.key"), bed.path("kept")).unwrap();
    let refused = bed.run(&["serve"]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(7), "{said}");
    for word in ["1 jobs", "bridge.key does not exist", "from its copy", "db rekey --give-up"] {
        assert!(said.contains(word), "{word:?} in {said}");
    }
    assert!(!bed.path("bridge.key").exists());
    let doctor = bed.run(&["doctor", "--json"]);
    let found = String::from_utf8_lossy(&doctor.stdout).into_owned();
    let line = found.lines().find(|line| line.contains("key file")).unwrap();
    assert!(line.contains("\"fail\"") && line.contains("1 jobs"), "{line}");

    std::fs::set_permissions(bed.path("kept"), std::fs::Permissions::from_mode(0o644)).unwrap();
    std::fs::rename(bed.path("kept"), bed.path("bridge.key")).unwrap();
    let refused = bed.run(&["serve"]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(7), "{said}");
    assert!(said.contains("others can read it") && said.contains("chmod 600"), "{said}");
    let private = std::fs::Permissions::from_mode(0o600);
    std::fs::set_permissions(bed.path("bridge.key"), private).unwrap();
    let _daemon = bed.serve();
    bed.open("gate");
    assert_eq!(bed.finished(job).await.status, Status::Success);
    bed.nothing_owed().await;
}
