//! A real DIRAC, from GitLab's answer to GitLab's verdict: nothing is shared with the workers but HTTP.

use std::io::Read as _;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use bridge::coordinator::{EndedBy, Git, Knobs, NewJob, Options, Status, Variable};
use serde_json::json;
use sha2::{Digest as _, Sha256};

use crate::support::grid::{self, Grid};
use crate::support::{Bed, PATIENCE, is_alive, text_of, until};

/// GitLab wants news every second.
pub(crate) fn eager() -> Options {
    Options {
        knobs: Knobs { trace_interval: Some("1".to_owned()), ..Knobs::default() },
        ..Options::default()
    }
}

/// Makes a repository of what is in a directory.
pub(crate) fn commit(at: &Path) {
    for args in [
        &["init", "-q", "-b", "main"][..],
        &["config", "core.compression", "1"],
        &["add", "."],
        &["-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-q", "-m", "one"],
    ] {
        assert!(Command::new("git").args(args).current_dir(at).status().unwrap().success());
    }
}

/// Waits until DIRAC has the job, and gives its number there.
pub(crate) async fn dirac_id(bed: &Bed, id: i64) -> i64 {
    until("the job to be submitted", || {
        bed.row(id)["external_id"].as_str().and_then(|text| text.parse().ok())
    })
    .await
}

/// Gives DIRAC's status of a job.
fn status(grid: &Grid, bed: &Bed, number: i64) -> String {
    let jobs = grid.jobs(bed);
    let job = jobs.iter().find(|job| job["JobID"] == number);
    job.map_or(String::new(), |job| job["Status"].as_str().unwrap().to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_is_there_while_the_job_runs_and_whole_when_it_ends() {
    if grid::left_out() {
        return;
    }
    let grid = Grid::shared();
    let bed = grid.bed(eager(), "").await;
    let _daemon = bed.serve();
    let id = bed.gitlab.enqueue(
        bed.counting("hello")
            .script("echo early; pwd")
            .script(bed.wait_for("gate"))
            .script("seq 3000; printf 'caf\\303\\251 \\033[1mbold\\033[0m \\342\\202\\254\\n'")
            .script("echo to stderr >&2; printf 'no end of line'"),
    );
    until("the early line", || {
        let job = bed.gitlab.job(id)?;
        (text_of(&job).contains("\nearly\n") && !job.is_finished()).then_some(())
    })
    .await;
    bed.open("gate");
    let job = bed.finished(id).await;
    let text = text_of(&job);
    assert_eq!(job.status, Status::Success, "{text}");
    let numbers: String = (1..=3000).map(|n| format!("{n}\n")).collect();
    let whole = format!("{numbers}café \u{1b}[1mbold\u{1b}[0m €\n");
    assert_eq!(text.matches(&whole).count(), 1, "{text}");
    assert!(text.contains("\nto stderr\n"), "{text}");
    assert!(text.contains("\nno end of line"), "{text}");
    assert_eq!(text.matches("\nearly\n").count(), 1, "{text}");
    // The submit node's directories are elsewhere: the job ran where the site put it.
    let place = text.lines().find(|line| line.starts_with(&*grid.jobs_dir().to_string_lossy()));
    assert!(place.is_some(), "{text}");
    bed.nothing_owed().await;
    bed.assert_once(id);
    grid.assert_no_twins(&bed);
    bed.assert_no_violations();
}

#[tokio::test(flavor = "multi_thread")]
async fn exit_codes_come_home_and_after_script_runs_on_the_grid() {
    if grid::left_out() {
        return;
    }
    let grid = Grid::shared();
    let bed = grid.bed(eager(), "").await;
    let _daemon = bed.serve();
    let endings: [(&str, i64); 6] = [
        ("true", 0),
        ("false", 1),
        // The wrapper takes this one for "run me again elsewhere".
        ("exit 222", 222),
        ("exit 255", 255),
        ("sh -c 'kill -9 $$'", 137),
        ("sh -c 'kill -TERM $$'", 143),
    ];
    let jobs: Vec<(i64, i64)> = endings
        .into_iter()
        .map(|(script, code)| {
            let job =
                bed.counting(script).script(script).after_script("echo \"after: $CI_JOB_STATUS\"");
            (bed.gitlab.enqueue(job), code)
        })
        .collect();
    for (id, code) in jobs {
        let job = bed.finished(id).await;
        let text = text_of(&job);
        assert!(text.contains("Submitted to b as job "), "{text}");
        assert_eq!(bed.runs(id), 1);
        if code == 0 {
            assert_eq!(job.status, Status::Success, "{text}");
            assert!(text.contains("\nafter: success\n"), "{text}");
        } else {
            assert_eq!(job.status, Status::Failed, "{text}");
            assert_eq!(job.failure_reason.as_deref(), Some("script_failure"), "{text}");
            assert_eq!(job.exit_code, Some(code), "{text}");
            assert!(text.contains("\nafter: failed\n"), "{text}");
        }
    }
    bed.nothing_owed().await;
    grid.assert_no_twins(&bed);
    bed.assert_no_violations();
}

#[tokio::test(flavor = "multi_thread")]
async fn sources_and_variables_travel_to_the_worker() {
    if grid::left_out() {
        return;
    }
    let grid = Grid::shared();
    let bed = grid.bed(eager(), "").await;
    let work = bed.path("project");
    std::fs::create_dir_all(work.join("bin")).unwrap();
    std::fs::write(work.join("hello.txt"), "from the repository\n").unwrap();
    std::fs::write(work.join("bin/tool"), "#!/bin/sh\necho the tool ran in \"${PWD##*/}\"\n")
        .unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(work.join("bin/tool"), mode).unwrap();
    std::os::unix::fs::symlink("../hello.txt", work.join("bin/link")).unwrap();
    commit(&work);
    bed.gitlab.serve_repository("hep/tracker", &work).await.unwrap();
    let _daemon = bed.serve();
    let odd = "it's \"quoted\" $HOME `x` \\ back\nsecond line\ttab é ⏎ \u{1f600} %s !";
    let out = bed.dir.path().display();
    let id = bed.gitlab.enqueue(
        NewJob::new("travels")
            .git(Git::default())
            .variable(Variable::new("ODD", odd).raw())
            .variable(Variable::new("KEY_FILE", "line one\nline two").file())
            .script("cat hello.txt bin/link && bin/tool")
            .script("git status --short; git log --format='commit: %s'")
            .script(format!("printf %s \"$ODD\" > {out}/odd"))
            .script(format!("cp \"$KEY_FILE\" {out}/file; stat -c 'mode %a' \"$KEY_FILE\""))
            .script("[ \"$CI_PROJECT_DIR\" = \"$PWD\" ] && echo in the project")
            .script("exit 3")
            .after_script("echo \"after: $(cat hello.txt)\""),
    );
    let job = bed.finished(id).await;
    let text = text_of(&job);
    assert_eq!((job.status, job.exit_code), (Status::Failed, Some(3)), "{text}");
    for line in [
        "from the repository\nfrom the repository\nthe tool ran in w",
        "commit: one",
        "mode 600",
        "in the project",
        "after: from the repository",
    ] {
        assert_eq!(text.matches(&format!("\n{line}\n")).count(), 1, "{line:?} in {text}");
    }
    assert_eq!(std::fs::read_to_string(bed.path("odd")).unwrap(), odd);
    assert_eq!(std::fs::read_to_string(bed.path("file")).unwrap(), "line one\nline two");
    bed.nothing_owed().await;
    // The token is nowhere in the workspace; the one in the job's environment went with the job.
    let left: Vec<_> = std::fs::read_dir(bed.path("builds")).into_iter().flatten().collect();
    assert!(left.iter().all(|entry| !entry.as_ref().unwrap().path().join("hello.txt").exists()));
    bed.assert_no_violations();
}

#[tokio::test(flavor = "multi_thread")]
async fn artifacts_and_caches_come_home_and_go_on_to_later_jobs() {
    if grid::left_out() {
        return;
    }
    let grid = Grid::shared();
    let bed = grid.bed(eager(), "").await;
    let work = bed.path("project");
    std::fs::create_dir_all(work.join("out")).unwrap();
    std::fs::write(work.join("out/old.txt"), "of the repository\n").unwrap();
    commit(&work);
    bed.gitlab.serve_repository("hep/kept", &work).await.unwrap();
    let _daemon = bed.serve();
    let job = |name: &str| {
        NewJob::new(name).project("hep/kept", 8).git(Git::default()).cache(json!({
            "key": "deps", "paths": ["deps/"], "policy": "pull-push",
        }))
    };
    let archive = json!({
        "name": "kept", "paths": ["out/", "*.log", "$LATER/x"], "when": "always",
        "artifact_type": "archive", "artifact_format": "zip",
    });
    let report = json!({
        "name": "junit.xml", "paths": ["junit.xml"], "when": "always",
        "artifact_type": "junit", "artifact_format": "gzip",
    });
    let first = bed.gitlab.enqueue(
        job("first")
            .script("rm out/old.txt && mkdir -p deps 'out/a b' && echo compiled > deps/lib.txt")
            .script("echo alpha > 'out/a b/naïve.txt' && ln -s 'a b/naïve.txt' out/link")
            .script("echo log > one.log && echo '<testsuites/>' > junit.xml && echo no > other.txt")
            .script("head -c 3000000 /dev/urandom > out/random && sha256sum < out/random")
            .artifact(archive)
            .artifact(report.clone()),
    );
    let seen = bed.finished(first).await;
    let text = text_of(&seen);
    assert_eq!(seen.status, Status::Success, "{text}");
    let kept = bed.gitlab.artifacts(first);
    let types: Vec<&str> = kept.iter().map(|kept| kept.artifact_type.as_str()).collect();
    assert_eq!(types, ["archive", "junit"], "{text}");
    let zip = std::fs::File::open(kept[0].file()).unwrap();
    let mut zip = zip::ZipArchive::new(zip).unwrap();
    let mut names: Vec<String> = zip.file_names().map(|name| name.unwrap().into_owned()).collect();
    names.retain(|name| !name.ends_with('/'));
    names.sort_unstable();
    assert_eq!(names, ["one.log", "out/a b/naïve.txt", "out/link", "out/random"], "{text}");
    let mut random = Vec::new();
    zip.by_name("out/random").unwrap().read_to_end(&mut random).unwrap();
    let sum: String = Sha256::digest(&random).iter().map(|byte| format!("{byte:02x}")).collect();
    assert!(text.contains(&format!("\n{sum}  -\n")), "{text}");
    // What one worker left, another one finds.
    let second = bed.gitlab.enqueue(
        job("second")
            .needs(first)
            .script("cat deps/lib.txt out/link && sha256sum < out/random && ls out")
            .script("echo half > junit.xml; exit 4")
            .artifact(report),
    );
    let seen = bed.finished(second).await;
    let text = text_of(&seen);
    assert_eq!((seen.status, seen.exit_code), (Status::Failed, Some(4)), "{text}");
    assert!(text.contains("\ncompiled\nalpha\n"), "{text}");
    assert!(text.contains(&format!("\n{sum}  -\n")), "{text}");
    assert_eq!(bed.gitlab.artifacts(second).len(), 1, "a failed job leaves its report: {text}");
    bed.nothing_owed().await;
    grid.assert_no_twins(&bed);
    bed.assert_no_violations();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_cancelled_in_the_queue_says_why_it_waits_and_never_starts() {
    if grid::left_out() {
        return;
    }
    let grid = Grid::shared();
    // A site that never asks for work.
    let bed = grid.bed(eager(), "site = \"DIRAC.Nowhere.org\"").await;
    let _daemon = bed.serve();
    let by_user = bed.gitlab.enqueue(bed.counting("by a user"));
    let by_operator = bed.gitlab.enqueue(bed.counting("by the operator"));
    until("the reason to be shown", || {
        let text = text_of(&bed.gitlab.job(by_user)?);
        let row = bed.row(by_user);
        (text.contains("Waiting in b: Received: Job accepted (waited ")
            && row["waits_for"].as_str() == Some("Received: Job accepted"))
        .then_some(())
    })
    .await;
    bed.gitlab.cancel(by_user);
    dirac_id(&bed, by_operator).await;
    assert!(bed.run(&["jobs", "cancel", &by_operator.to_string()]).status.success());
    let job = bed.finished(by_user).await;
    assert_eq!((job.status, job.ended_by), (Status::Canceled, Some(EndedBy::Runner)), "{job:?}");
    let job = bed.finished(by_operator).await;
    assert_eq!(job.failure_reason.as_deref(), Some("runner_interrupted"), "{job:?}");
    bed.nothing_owed().await;
    assert_eq!([bed.runs(by_user), bed.runs(by_operator)], [0, 0]);
    let jobs = grid.jobs(&bed);
    assert_eq!(jobs.len(), 2);
    assert!(jobs.iter().all(|job| job["Status"] == "Killed"), "{jobs:?}");
    bed.assert_no_violations();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_job_is_told_to_end_and_leaves_nothing_running() {
    if grid::left_out() {
        return;
    }
    let grid = Grid::shared();
    let bed = grid.bed(eager(), "kill_grace = \"20s\"").await;
    let _daemon = bed.serve();
    let child = format!(
        "setsid sh -c 'trap \"\" TERM; echo $$ > {}; sleep 600; sleep 600' &",
        bed.path("child").display()
    );
    let id = bed.gitlab.enqueue(
        bed.counting("endless")
            .script(child)
            .script(bed.note_pid("pid"))
            .script("while :; do echo tick; sleep 0.2; done")
            .after_script("echo \"after: $CI_JOB_STATUS, $((6 * 7))\""),
    );
    let (pid, child) = (bed.pid_of("pid").await, bed.pid_of("child").await);
    assert!(is_alive(pid) && is_alive(child));
    bed.gitlab.cancel(id);
    let job = bed.finished(id).await;
    let text = text_of(&job);
    assert_eq!((job.status, job.ended_by), (Status::Canceled, Some(EndedBy::Runner)), "{text}");
    assert_eq!(text.matches("\nafter: canceled, 42\n").count(), 1, "{text}");
    assert!(text.ends_with("ERROR: Job failed: canceled\u{1b}[0;m\n"), "{text:?}");
    let number = dirac_id(&bed, id).await;
    bed.nothing_owed().await;
    assert!(!is_alive(pid), "the script's shell is gone");
    until("a child in a session of its own to be gone", || (!is_alive(child)).then_some(())).await;
    assert_eq!(status(&grid, &bed, number), "Killed");
    assert_eq!(bed.runs(id), 1);
    until("the site to clear the job away", || {
        (!grid.jobs_dir().join(number.to_string()).exists()).then_some(())
    })
    .await;
    bed.assert_no_violations();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_whose_time_is_up_is_ended_over_there() {
    if grid::left_out() {
        return;
    }
    let grid = Grid::shared();
    let bed = grid.bed(eager(), "").await;
    let _daemon = bed.serve();
    // The way to the worker is a part of the time; a slow machine needs more of it.
    let mut started = None;
    for seconds in [8, 24, 72] {
        let noted = format!("pid{seconds}");
        let id = bed.gitlab.enqueue(
            bed.counting("too long")
                .timeout(Duration::from_secs(seconds))
                .script(bed.note_pid(&noted))
                .script("while :; do echo tick; sleep 0.2; done"),
        );
        let job = match bed.gitlab.wait_finished(id, PATIENCE * 2).await {
            Ok(job) => job,
            Err(job) => panic!("job {id} did not end: {job:?}\n{}", bed.log()),
        };
        let text = text_of(&job);
        assert_eq!(job.status, Status::Failed, "{text}");
        assert_eq!(job.failure_reason.as_deref(), Some("job_execution_timeout"), "{text}");
        let noted = std::fs::read_to_string(bed.path(&noted)).ok();
        started = noted.and_then(|text| Some((id, text.trim().parse().ok()?)));
        if started.is_some() {
            break;
        }
    }
    bed.nothing_owed().await;
    let (id, pid) = started.expect("a job starts within a minute");
    assert!(!is_alive(pid), "the script's shell is gone");
    assert_eq!(bed.runs(id), 1);
    bed.assert_no_violations();
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_that_find_no_slot_say_so_and_run_in_their_turn() {
    if grid::left_out() {
        return;
    }
    let grid = Grid::start("slots", &["--slots", "1"]);
    let bed = grid.bed(eager(), "").await;
    let _daemon = bed.serve();
    let first = bed.gitlab.enqueue(bed.counting("first").script(bed.wait_for("gate")));
    until("the first job to run", || (bed.runs(first) == 1).then_some(())).await;
    let others: Vec<i64> =
        (0..3).map(|n| bed.gitlab.enqueue(bed.counting(&format!("other {n}")))).collect();
    until("the others to say why they wait", || {
        let says = |id: &i64| {
            let text = text_of(&bed.gitlab.job(*id).unwrap());
            text.contains("Waiting in b: Waiting: Pilot Agent Submission (waited ")
        };
        others.iter().all(says).then_some(())
    })
    .await;
    assert!(others.iter().all(|id| bed.runs(*id) == 0));
    bed.open("gate");
    for id in others.iter().chain([&first]) {
        bed.finished(*id).await;
    }
    bed.nothing_owed().await;
    for id in others.into_iter().chain([first]) {
        bed.assert_once(id);
    }
    // A workspace that is too large is refused before anything is sent.
    let before = grid.sandboxes();
    let work = bed.path("project");
    std::fs::create_dir_all(&work).unwrap();
    std::fs::write(work.join("large"), vec![b'x'; 300_000]).unwrap();
    commit(&work);
    bed.gitlab.serve_repository("hep/large", &work).await.unwrap();
    bed.write_config("", "", "max_workspace = 200000");
    drop(_daemon);
    let _daemon = bed.serve();
    let id = bed
        .gitlab
        .enqueue(NewJob::new("large").project("hep/large", 7).git(Git::default()).script("true"));
    let job = bed.finished(id).await;
    let text = text_of(&job);
    assert_eq!(job.status, Status::Failed, "{text}");
    assert!(text.contains("more than 200000 bytes (`max_workspace`)"), "{text}");
    bed.nothing_owed().await;
    assert_eq!(grid.sandboxes(), before, "nothing was sent");
    assert_eq!(grid.jobs(&bed).len(), 4, "and no job made");
    bed.assert_no_violations();
}
