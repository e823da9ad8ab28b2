//! A real Slurm: what it says of jobs, what it keeps to itself, and what happens when it is not there.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use bridge::coordinator::{EndedBy, Knobs, NewJob, Options, Status, Version};

use crate::support::slurm::{self, Cluster};
use crate::support::{Bed, PATIENCE, Where, is_alive, text_of, until};

/// GitLab wants news every second.
fn eager() -> Options {
    Options {
        knobs: Knobs { trace_interval: Some("1".to_owned()), ..Knobs::default() },
        ..Options::default()
    }
}

/// A bed on a cluster; `backend` goes into the backend's table.
pub(crate) async fn bed_on(cluster: &Cluster, options: Options, backend: &str) -> Bed {
    let bed = Bed::new(Where::Slurm { conf: cluster.conf() }, options, "", "").await;
    bed.write_config("", "", backend);
    bed
}

/// Waits until Slurm has the job, and gives its number there.
async fn batch_id(bed: &Bed, id: i64) -> String {
    until("the job to be submitted", || bed.row(id)["external_id"].as_str().map(str::to_owned))
        .await
}

/// Gives the batch jobs that the cluster knows, ended ones too: state and name.
fn batch_jobs(cluster: &Cluster) -> Vec<(String, String)> {
    let text = cluster.ask("squeue", &["-h", "-t", "all", "-o", "%T %j"]);
    let pair = |line: &str| line.split_once(' ').map(|(a, b)| (a.to_owned(), b.to_owned()));
    text.lines().filter_map(pair).collect()
}

fn program(path: &Path, text: &str) {
    std::fs::write(path, format!("#!/bin/sh\n{text}\n")).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
}

const PROGRAMS: [&str; 6] = ["sbatch", "squeue", "sacct", "scancel", "scontrol", "sinfo"];

/// Makes a directory of programs that note each call and pass it on.
fn counting_programs(bed: &Bed) {
    let bin = bed.path("bin");
    std::fs::create_dir_all(&bin).unwrap();
    for name in PROGRAMS {
        let calls = bed.path(&format!("{name}.calls"));
        program(
            &bin.join(name),
            &format!("echo x >> {}\nexec /usr/bin/{name} \"$@\"", calls.display()),
        );
    }
    bed.edit_config(
        "kind = \"slurm\"",
        &format!("kind = \"slurm\"\nbin_dir = \"{}\"", bin.display()),
    );
}

fn calls(bed: &Bed, name: &str) -> usize {
    std::fs::read_to_string(bed.path(&format!("{name}.calls")))
        .map_or(0, |text| text.lines().count())
}

#[tokio::test(flavor = "multi_thread")]
async fn exit_codes_come_home_and_after_script_runs_on_slurm() {
    if slurm::left_out() {
        return;
    }
    let cluster = Cluster::start(&[]);
    let bed = bed_on(&cluster, eager(), "").await;
    let _daemon = bed.serve();
    let endings: [(&str, i64); 6] = [
        ("true", 0),
        ("false", 1),
        ("exit 3", 3),
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
    let left: Vec<_> = std::fs::read_dir(bed.path("jobs"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_dir())
        .collect();
    assert!(left.is_empty(), "nothing is left behind: {left:?}");
    bed.assert_no_violations();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_waiting_job_says_why_and_can_be_cancelled() {
    if slurm::left_out() {
        return;
    }
    let cluster = Cluster::start(&[]);
    let bed = bed_on(&cluster, eager(), "").await;
    bed.edit_config("partition = \"ci\"", "partition = \"closed\"");
    let _daemon = bed.serve();
    let by_user = bed.gitlab.enqueue(bed.counting("by a user"));
    let by_operator = bed.gitlab.enqueue(bed.counting("by the operator"));
    until("the reason to be shown", || {
        let text = text_of(&bed.gitlab.job(by_user)?);
        let row = bed.row(by_user);
        (text.contains("Waiting in b: PartitionDown (waited ")
            && row["waits_for"].as_str() == Some("PartitionDown"))
        .then_some(())
    })
    .await;
    bed.gitlab.cancel(by_user);
    batch_id(&bed, by_operator).await;
    assert!(bed.run(&["jobs", "cancel", &by_operator.to_string()]).status.success());
    let job = bed.finished(by_user).await;
    assert_eq!((job.status, job.ended_by), (Status::Canceled, Some(EndedBy::Runner)), "{job:?}");
    let job = bed.finished(by_operator).await;
    assert_eq!(job.failure_reason.as_deref(), Some("runner_interrupted"), "{job:?}");
    bed.nothing_owed().await;
    assert_eq!([bed.runs(by_user), bed.runs(by_operator)], [0, 0]);
    assert!(batch_jobs(&cluster).iter().all(|(state, _)| state == "CANCELLED"));
    bed.assert_no_violations();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_longer_than_its_partition_allows_says_what_it_waits_for() {
    if slurm::left_out() {
        return;
    }
    let cluster = Cluster::start(&[]);
    let bed = bed_on(&cluster, eager(), "").await;
    bed.edit_config("partition = \"ci\"", "partition = \"short\"");
    let _daemon = bed.serve();
    // Five minutes are the most there.
    let long = bed.gitlab.enqueue(bed.counting("long"));
    let short = bed.gitlab.enqueue(bed.counting("short").timeout(Duration::from_secs(240)));
    bed.finished(short).await;
    until("the reason to be shown, or the job to be refused", || {
        let job = bed.gitlab.job(long)?;
        let text = text_of(&job);
        (text.contains("Waiting in b: PartitionTimeLimit")
            || text.contains("the batch system refused the job"))
        .then_some(())
    })
    .await;
    bed.gitlab.cancel(long);
    bed.finished(long).await;
    bed.nothing_owed().await;
    assert_eq!([bed.runs(long), bed.runs(short)], [0, 1]);
    bed.assert_once(short);
    bed.assert_no_violations();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_job_is_cancelled_on_slurm_and_a_forced_cancel_too() {
    if slurm::left_out() {
        return;
    }
    // As on most sites; three seconds between TERM and KILL are too few for a busy machine.
    let more = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(more.path(), "KillWait=30\n").unwrap();
    let cluster = Cluster::start(&["--conf-add", more.path().to_str().unwrap()]);
    let bed = bed_on(&cluster, eager(), "").await;
    let _daemon = bed.serve();
    let endless = |name: &str| {
        bed.counting(name)
            .script(bed.note_pid(&format!("{name}.pid")))
            .script("while :; do echo tick; sleep 0.2; done")
            .after_script("echo \"after: $CI_JOB_STATUS\"")
    };
    let graceful = bed.gitlab.enqueue(endless("graceful"));
    let forced = bed.gitlab.enqueue(endless("forced"));
    let pids = [bed.pid_of("graceful.pid").await, bed.pid_of("forced.pid").await];
    bed.gitlab.cancel(graceful);
    bed.gitlab.force_cancel(forced);
    let job = bed.finished(graceful).await;
    let text = text_of(&job);
    assert_eq!((job.status, job.ended_by), (Status::Canceled, Some(EndedBy::Runner)), "{text}");
    assert!(text.contains("\nafter: canceled\n"), "{text}");
    bed.nothing_owed().await;
    assert_eq!(bed.row(forced)["state"], "abandoned");
    assert!(pids.iter().all(|pid| !is_alive(*pid)));
    bed.assert_no_violations();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_ends_while_the_controller_is_down_is_not_lost() {
    if slurm::left_out() {
        return;
    }
    let cluster = Cluster::start(&[]);
    let bed = bed_on(&cluster, eager(), "query_timeout = \"5s\"").await;
    let _daemon = bed.serve();
    let id = bed.gitlab.enqueue(
        bed.counting("through the night").script(bed.wait_for("gate")).script("echo the morning"),
    );
    until("the job to run", || (bed.runs(id) == 1).then_some(())).await;
    until("the bridge to know", || (bed.row(id)["state"] == "running").then_some(())).await;
    cluster.bed(&["ctld-stop"]);
    bed.open("gate");
    until("the script to have ended", || {
        let dirs = std::fs::read_dir(bed.path("jobs")).unwrap();
        dirs.filter_map(Result::ok).any(|dir| dir.path().join("result").exists()).then_some(())
    })
    .await;
    until("a question to be left unanswered", || {
        bed.log().contains("does not say how its jobs stand").then_some(())
    })
    .await;
    assert!(!bed.gitlab.job(id).unwrap().is_finished(), "silence proves nothing");
    cluster.bed(&["ctld-start"]);
    let job = bed.finished(id).await;
    assert!(text_of(&job).contains("\nthe morning\n"), "{}", text_of(&job));
    bed.nothing_owed().await;
    bed.assert_once(id);
    bed.assert_no_violations();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_controller_that_freezes_during_a_submission_runs_one_job() {
    if slurm::left_out() {
        return;
    }
    let cluster = Cluster::start(&[]);
    let times = "command_timeout = \"3s\"\nquery_timeout = \"3s\"\nsettle = \"10s\"";
    let bed = bed_on(&cluster, eager(), times).await;
    let _daemon = bed.serve();
    until("the daemon to be up", || bed.log().contains("bridge serves").then_some(())).await;
    cluster.bed(&["ctld-freeze"]);
    let id = bed.gitlab.enqueue(bed.counting("frozen"));
    until("the answer to be missed", || {
        (bed.row(id)["state"] == "submitting" && bed.log().contains("a submission failed"))
            .then_some(())
    })
    .await;
    cluster.bed(&["ctld-thaw"]);
    bed.finished(id).await;
    bed.nothing_owed().await;
    bed.assert_once(id);
    let ran = batch_jobs(&cluster);
    assert_eq!(ran.len(), 1, "{ran:?}");
    bed.assert_no_violations();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_jobs_timeout_ends_it_on_slurm() {
    if slurm::left_out() {
        return;
    }
    let cluster = Cluster::start(&[]);
    let bed = bed_on(&cluster, eager(), "").await;
    let _daemon = bed.serve();
    let id = bed
        .gitlab
        .enqueue(bed.counting("slow").script("sleep 600").timeout(Duration::from_secs(8)));
    let job = bed.finished(id).await;
    let text = text_of(&job);
    assert_eq!(job.failure_reason.as_deref(), Some("job_execution_timeout"), "{text}");
    assert!(text.contains("longer than 8 seconds, waiting included"), "{text}");
    bed.nothing_owed().await;
    let _daemon = {
        drop(_daemon);
        bed.edit_config("partition = \"ci\"", "partition = \"closed\"");
        bed.serve()
    };
    let id = bed.gitlab.enqueue(bed.counting("late").timeout(Duration::from_secs(8)));
    let job = bed.finished(id).await;
    let text = text_of(&job);
    assert_eq!(job.failure_reason.as_deref(), Some("job_execution_timeout"), "{text}");
    assert!(
        text.contains("timeout of 8 seconds passed while it waited in the batch queue"),
        "{text}"
    );
    bed.nothing_owed().await;
    assert_eq!(bed.runs(id), 0);
    bed.assert_no_violations();
}

#[tokio::test(flavor = "multi_thread")]
async fn somebody_elses_scancel_is_an_interruption() {
    if slurm::left_out() {
        return;
    }
    let cluster = Cluster::start(&[]);
    for (version, reason) in
        [(Version::Current, "runner_interrupted"), (Version::V17_11, "runner_system_failure")]
    {
        let bed = bed_on(&cluster, Options { version, ..eager() }, "").await;
        let _daemon = bed.serve();
        let id = bed.gitlab.enqueue(bed.counting("theirs").script("sleep 600"));
        until("the job to run", || (bed.runs(id) == 1).then_some(())).await;
        cluster.ask("scancel", &[&batch_id(&bed, id).await]);
        let job = bed.finished(id).await;
        let text = text_of(&job);
        assert_eq!(job.status, Status::Failed, "{text}");
        assert_eq!(job.failure_reason.as_deref(), Some(reason), "{text}");
        assert!(text.contains("cancelled in the batch system"), "{text}");
        bed.nothing_owed().await;
        assert_eq!(bed.runs(id), 1, "it is not run again");
        bed.assert_no_violations();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_whose_node_is_lost_fails_and_says_so() {
    if slurm::left_out() {
        return;
    }
    let cluster = Cluster::start(&[]);
    let bed = bed_on(&cluster, eager(), "settle = \"3s\"").await;
    let _daemon = bed.serve();
    let id = bed.gitlab.enqueue(bed.counting("lost").script(bed.wait_for("gate")));
    let batch = batch_id(&bed, id).await;
    until("the job to run", || (bed.runs(id) == 1).then_some(())).await;
    let node = cluster.ask("squeue", &["-h", "-j", &batch, "-o", "%N"]);
    cluster.bed(&["node-kill", node.trim()]);
    // Slurm itself waits for half a minute; an administrator who sees it burn does not.
    let name = format!("NodeName={}", node.trim());
    cluster.ask("scontrol", &["update", &name, "State=DOWN", "Reason=burnt"]);
    let job = match bed.gitlab.wait_finished(id, Duration::from_secs(100)).await {
        Ok(job) => job,
        Err(job) => panic!("{job:?}\n{:?}\n{}", batch_jobs(&cluster), bed.log()),
    };
    let text = text_of(&job);
    assert_eq!(job.status, Status::Failed, "{text}");
    assert_eq!(job.failure_reason.as_deref(), Some("runner_system_failure"), "{text}");
    assert!(text.contains("its machine failed"), "{text}");
    bed.open("gate");
    bed.nothing_owed().await;
    assert_eq!(bed.runs(id), 1, "it is not run again");
    bed.assert_no_violations();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slurm_whose_sbatch_is_missing_fails_the_job_with_clear_words() {
    if slurm::left_out() {
        return;
    }
    let cluster = Cluster::start(&[]);
    let bed = bed_on(&cluster, eager(), "").await;
    counting_programs(&bed);
    std::fs::remove_file(bed.path("bin/sbatch")).unwrap();
    let _daemon = bed.serve();
    let id = bed.gitlab.enqueue(bed.counting("refused"));
    let job = bed.finished(id).await;
    let text = text_of(&job);
    assert_eq!(job.failure_reason.as_deref(), Some("runner_system_failure"), "{text}");
    assert!(text.contains("the batch system cannot take jobs"), "{text}");
    assert!(text.contains("sbatch"), "{text}");
    bed.nothing_owed().await;
    assert_eq!(bed.runs(id), 0);
    assert!(batch_jobs(&cluster).is_empty());
    // Repaired, it takes the next one without a restart.
    let calls = bed.path("sbatch.calls");
    program(
        &bed.path("bin/sbatch"),
        &format!("echo x >> {}\nexec /usr/bin/sbatch \"$@\"", calls.display()),
    );
    let next = bed.gitlab.enqueue(bed.counting("taken"));
    bed.finished(next).await;
    bed.nothing_owed().await;
    bed.assert_once(next);
    bed.assert_no_violations();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_sbatch_that_prints_rubbish_costs_time_and_nothing_else() {
    if slurm::left_out() {
        return;
    }
    let cluster = Cluster::start(&[]);
    // With the job submitted, and without.
    for submits in [true, false] {
        let bed = bed_on(&cluster, eager(), "settle = \"3s\"").await;
        counting_programs(&bed);
        let (calls, first) = (bed.path("sbatch.calls"), bed.path("first"));
        let effect = if submits { "/usr/bin/sbatch \"$@\" > /dev/null" } else { "cat > /dev/null" };
        program(
            &bed.path("bin/sbatch"),
            &format!(
                "[ \"$1\" = --version ] && exec /usr/bin/sbatch --version\n\
                 echo x >> {}\n\
                 if mkdir {} 2>/dev/null; then {effect}; echo 'Welcome to the cluster!'; exit 0; fi\n\
                 exec /usr/bin/sbatch \"$@\"",
                calls.display(),
                first.display()
            ),
        );
        let _daemon = bed.serve();
        let id = bed.gitlab.enqueue(bed.counting("rubbish"));
        bed.finished(id).await;
        bed.nothing_owed().await;
        bed.assert_once(id);
        assert_eq!(self::calls(&bed, "sbatch"), if submits { 1 } else { 2 }, "{}", bed.log());
        assert!(bed.log().contains("sbatch's answer has no job id"), "{}", bed.log());
        bed.assert_no_violations();
    }
    let names: Vec<String> = batch_jobs(&cluster).into_iter().map(|(_, name)| name).collect();
    assert_eq!(names.len(), 2, "{names:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn questions_do_not_become_more_with_more_jobs() {
    if slurm::left_out() {
        return;
    }
    let cluster = Cluster::start(&[]);
    let bed = bed_on(&cluster, Options::default(), "").await;
    bed.edit_config("partition = \"ci\"", "partition = \"closed\"");
    counting_programs(&bed);
    let daemon = bed.serve();
    let job = |n: usize| NewJob::new(format!("job {n}")).env("GIT_STRATEGY", "none").script("true");
    // How many questions there are in ten seconds in which nothing happens but waiting.
    let questions = async || {
        let before = (calls(&bed, "squeue"), calls(&bed, "sacct") + calls(&bed, "scontrol"));
        let started = Instant::now();
        tokio::time::sleep(Duration::from_secs(10)).await;
        let took = started.elapsed().as_secs_f64();
        assert!(took < 20.0, "the machine stalled");
        let after = (calls(&bed, "squeue"), calls(&bed, "sacct") + calls(&bed, "scontrol"));
        (after.0 - before.0, after.1 - before.1)
    };
    let waiting = |wanted: usize| {
        let bed = &bed;
        move || {
            let rows = bed.rows();
            let waits = rows.values().filter(|row| row["waits_for"] == "PartitionDown").count();
            (waits == wanted).then_some(())
        }
    };
    bed.gitlab.enqueue(job(0));
    until("one job to wait", waiting(1)).await;
    let few = questions().await;
    let ids: Vec<i64> = (1..40).map(|n| bed.gitlab.enqueue(job(n))).collect();
    until("forty jobs to wait", waiting(40)).await;
    let many = questions().await;
    println!("calls of squeue, and of others, in 10 s: one job {few:?}, forty jobs {many:?}");
    assert!(few.0 >= 2, "it is asked at all: {few:?}");
    assert!(many.0 <= few.0 * 2 + 10, "one job {few:?}, forty jobs {many:?}");
    assert!(many.1 <= 2, "one job {few:?}, forty jobs {many:?}");
    // Found together, they are cancelled together.
    assert!(daemon.term().await.success());
    for id in ids.into_iter().chain([1000]) {
        assert!(bed.run(&["jobs", "cancel", &id.to_string()]).status.success());
    }
    let before = calls(&bed, "scancel");
    let _daemon = bed.serve();
    bed.all_finished(PATIENCE).await;
    bed.nothing_owed().await;
    assert!(batch_jobs(&cluster).iter().all(|(state, _)| state == "CANCELLED"));
    let scancels = calls(&bed, "scancel") - before;
    assert!(scancels <= 5, "{scancels} calls of scancel for forty jobs");
    bed.assert_no_violations();
}
