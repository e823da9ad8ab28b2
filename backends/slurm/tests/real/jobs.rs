//! What a job lives through while nothing is broken.

use bridge_backend::{EnvVar, ErrorKind, ExternalId, Fault, JobRef, Observation, Outcome};

use crate::bed::{Bed, Site, job, programs_in, token, until, unwanted};

#[tokio::test]
async fn a_script_ends_with_its_own_exit_status() {
    if unwanted() {
        return;
    }
    let site = Site::shared();
    site.backend.check().await.unwrap();
    for code in [0, 7, 137] {
        let job = site.run(&format!("echo this ends with {code}; exit {code}")).await;
        assert_eq!(site.outcome(&job).await, Outcome::Exited { code });
        assert_eq!(site.log(&job).await, format!("this ends with {code}\n"));
        site.backend.release(&job).await.unwrap();
        assert!(!site.job_dir(&job.token).exists());
        site.backend.release(&job).await.unwrap();
    }
}

#[tokio::test]
async fn a_result_that_the_script_wrote_counts() {
    if unwanted() {
        return;
    }
    let site = Site::shared();
    let job = site
        .run("printf 'exit_code=3\\nstep=script_timed_out\\n' > \"$BRIDGE_JOB_DIR/result\"")
        .await;
    assert_eq!(site.outcome(&job).await, Outcome::ScriptTimedOut);
}

#[tokio::test]
async fn the_environment_arrives_byte_for_byte_and_nothing_of_ours_with_it() {
    if unwanted() {
        return;
    }
    let site = Site::shared();
    let values = [
        ("QUOTES", "it's \"so\" `id`"),
        ("DOLLARS", "$HOME $(id) \\$x $$"),
        ("LINES", "a\n\nb\n"),
        ("HIGH", "ā Ĉ 日本 \u{81}"),
        ("TWICE", "first"),
        ("TWICE", "second"),
        ("D", "a name that a wrapper could use"),
    ];
    let mut spec = site.spec("env -0 > seen; umask > mask; pwd > where; cat > stdin");
    for (name, value) in values {
        spec.env.push(EnvVar { name: name.into(), value: value.into() });
    }
    let job = site.submit(&spec).await;
    assert_eq!(site.outcome(&job).await, Outcome::Exited { code: 0 });
    let seen = site.file("seen").await;
    let seen: Vec<&[u8]> = seen.split(|byte| *byte == 0).collect();
    for (name, value) in values.iter().filter(|(_, value)| *value != "first") {
        assert!(seen.contains(&format!("{name}={value}").as_bytes()), "{name}");
    }
    for name in ["LC_ALL=", "SLURM_TIME_FORMAT=", "CARGO"] {
        assert!(!seen.iter().any(|line| line.starts_with(name.as_bytes())), "{name}");
    }
    let dir = format!("BRIDGE_JOB_DIR={}", site.job_dir(&job.token));
    assert!(seen.contains(&dir.as_bytes()));
    assert_eq!(site.file("stdin").await, b"");
    assert_ne!(site.file("mask").await, b"0077\n");
    let whereabouts = String::from_utf8(site.file("where").await).unwrap();
    assert_eq!(whereabouts.trim_end(), site.path().join("work"));
}

#[tokio::test]
async fn secrets_are_nowhere_but_in_a_private_file() {
    if unwanted() {
        return;
    }
    let bed = Bed::shared();
    let site = Site::on(&bed, "settle = '1s'");
    let secret = "s3cr3t-that-nobody-may-see";
    let mut spec = site.spec("echo \"$SECRET\" > secret; while ! [ -e go ]; do sleep 0.1; done");
    spec.env.push(EnvVar { name: "SECRET".into(), value: secret.into() });
    let job = site.submit(&spec).await;
    assert_eq!(site.file("secret").await, format!("{secret}\n").as_bytes());

    let id = job.id.0.as_str();
    let mut told = bed.slurm("squeue", &["--me", "-o", "%all"]);
    told += &bed.slurm("scontrol", &["--details", "show", "job", id]);
    told += &bed.slurm("scontrol", &["write", "batch_script", id, "-"]);
    for process in std::fs::read_dir("/proc").unwrap() {
        let words = std::fs::read(process.unwrap().path().join("cmdline")).unwrap_or_default();
        told += &String::from_utf8_lossy(&words);
    }
    assert!(told.contains(job.token.as_str()));
    assert!(!told.contains(secret));

    use std::os::unix::fs::PermissionsExt as _;
    let mode =
        |path: &camino::Utf8Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    let dir = site.job_dir(&job.token);
    assert_eq!(mode(&dir), 0o700);
    for file in ["env", "script"] {
        assert_eq!(mode(&dir.join(file)), 0o600, "{file}");
    }
    site.touch("go");
    assert_eq!(site.outcome(&job).await, Outcome::Exited { code: 0 });
    assert!(!dir.join("env").exists(), "secrets go when the job is over");
}

#[tokio::test]
async fn a_log_is_read_live_by_offset_and_never_changes() {
    if unwanted() {
        return;
    }
    let site = Site::shared();
    let job = site.run("printf 'one\\ntwo'; while ! [ -e go ]; do sleep 0.05; done; echo !").await;
    let live = until("the first bytes".into(), async || {
        let chunk = site.backend.read_log(&job, 0, 100).await.unwrap();
        assert!(!chunk.end);
        (chunk.bytes.len() == 7).then_some(chunk.bytes)
    });
    assert_eq!(live.await.unwrap(), "one\ntwo");
    let empty = site.backend.read_log(&job, 7, 100).await.unwrap();
    assert!(empty.bytes.is_empty() && !empty.end);
    site.touch("go");
    assert_eq!(site.outcome(&job).await, Outcome::Exited { code: 0 });
    let whole = b"one\ntwo!\n".as_slice();
    for from in 0..=whole.len() {
        for limit in [1, 3, 100] {
            let at = u64::try_from(from).unwrap();
            let chunk = site.backend.read_log(&job, at, limit).await.unwrap();
            let to = whole.len().min(from + limit);
            assert_eq!(chunk.bytes, whole[from..to]);
            assert_eq!(chunk.end, to == whole.len(), "{from} {limit}");
        }
    }
}

#[tokio::test]
async fn a_waiting_job_says_why_and_can_be_cancelled() {
    if unwanted() {
        return;
    }
    let site = Site::shared();
    let job = site.submit(&site.closed("echo never")).await;
    let waits = |seen: &Observation| matches!(seen, Observation::Pending { reason: Some(why), .. } if why == "PartitionDown");
    site.until(&job, waits).await;
    let none = site.backend.read_log(&job, 0, 10).await.unwrap();
    assert!(none.bytes.is_empty() && !none.end);
    site.backend.cancel(std::slice::from_ref(&job)).await.unwrap();
    assert_eq!(site.outcome(&job).await, Outcome::Cancelled { by: None });
    assert_eq!(site.log(&job).await, "");
    site.backend.cancel(std::slice::from_ref(&job)).await.unwrap();
}

#[tokio::test]
async fn a_running_job_is_told_to_end_and_may_clean_up() {
    if unwanted() {
        return;
    }
    let site = Site::shared();
    let script = "trap 'test -e \"$BRIDGE_JOB_DIR/cancelled\" && echo bye; exit 0' TERM\n\
                  echo up; while :; do sleep 0.1; done";
    let jobs = [site.run(script).await, site.run("echo up; sleep 100").await];
    for job in &jobs {
        site.running(job).await;
        let up = until("the script".into(), async || {
            let chunk = site.backend.read_log(job, 0, 10).await.unwrap();
            (!chunk.bytes.is_empty()).then_some(())
        });
        up.await.unwrap();
    }
    site.backend.cancel(&jobs).await.unwrap();
    for job in &jobs {
        assert_eq!(site.outcome(job).await, Outcome::Cancelled { by: None });
    }
    assert!(site.log(&jobs[0]).await.contains("bye"));
    site.backend.cancel(&jobs).await.unwrap();
}

#[tokio::test]
async fn a_job_that_ignores_the_wish_is_killed() {
    if unwanted() {
        return;
    }
    let site = Site::shared();
    let job = site.run("trap '' TERM; echo > up; while :; do sleep 0.1; done").await;
    site.file("up").await;
    site.backend.cancel(std::slice::from_ref(&job)).await.unwrap();
    assert_eq!(site.outcome(&job).await, Outcome::Cancelled { by: None });
}

#[tokio::test]
async fn a_script_that_ended_by_itself_keeps_its_result_after_a_late_cancel() {
    if unwanted() {
        return;
    }
    let site = Site::shared();
    let job = site.run("exit 4").await;
    assert_eq!(site.outcome(&job).await, Outcome::Exited { code: 4 });
    site.backend.cancel(std::slice::from_ref(&job)).await.unwrap();
    assert_eq!(site.outcome(&job).await, Outcome::Exited { code: 4 });
}

#[tokio::test]
async fn a_shell_killed_from_inside_is_no_success() {
    if unwanted() {
        return;
    }
    let site = Site::shared();
    let job = site.run("kill -9 $PPID; exit 0").await;
    let outcome = site.outcome(&job).await;
    let Outcome::SystemFailed { detail } = outcome else { panic!("{outcome:?}") };
    assert!(detail.contains("signal 9"), "{detail}");
}

#[tokio::test]
async fn a_missing_workspace_is_said_and_nothing_runs_elsewhere() {
    if unwanted() {
        return;
    }
    let site = Site::shared();
    let mut spec = site.spec("pwd");
    spec.workspace = site.path().join("gone");
    let job = site.submit(&spec).await;
    let outcome = site.outcome(&job).await;
    assert!(matches!(outcome, Outcome::SystemFailed { .. }), "{outcome:?}");
    let log = site.log(&job).await;
    assert!(log.contains("bridge: the workspace cannot be entered"), "{log}");
    assert!(!log.contains("/tmp\n"), "{log}");
}

#[tokio::test]
async fn refusals_say_whose_move_it_is_and_leave_no_secrets() {
    if unwanted() {
        return;
    }
    let bed = Bed::shared();
    let job = ErrorKind::Rejected(Fault::Job);
    let site_s = ErrorKind::Rejected(Fault::Site);
    for (config, options, kind) in [
        ("", "partition = 'nope'", job),
        ("partition = 'nope'", "", site_s),
        ("", "mem = '900T'", job),
        ("", "mem = 'much'", job),
        ("", "constraint = 'nope'", job),
        ("", "reservation = 'nope'", job),
        ("", "unheard_of = 1", job),
        ("sbatch_args = ['--unheard-of']", "", site_s),
    ] {
        let site = Site::on(&bed, config);
        let mut spec = site.spec("exit 0");
        spec.options = options.parse().unwrap();
        let token = token();
        let error = site.backend.submit(&token, &spec).await.unwrap_err();
        assert_eq!(error.kind(), kind, "{config} {options}: {error:?}");
        assert!(!site.job_dir(&token).exists(), "{config} {options}");
        // Slurm keeps a record of some jobs that it refused; found, they have failed.
        if let Some(id) = site.backend.find(std::slice::from_ref(&token)).await.unwrap().get(&token)
        {
            let outcome = site.outcome(&crate::bed::job(&token, id)).await;
            assert!(matches!(outcome, Outcome::SystemFailed { .. }), "{outcome:?}");
        }
    }
    let site = Site::on(&bed, "partition = 'nope'");
    assert_eq!(site.backend.check().await.unwrap_err().kind(), site_s);
    let site = Site::on(&bed, "partition = 'closed'");
    assert_eq!(site.backend.check().await.unwrap_err().kind(), ErrorKind::Transient);
}

#[tokio::test]
async fn options_of_a_job_reach_slurm() {
    if unwanted() {
        return;
    }
    let bed = Bed::shared();
    let site = Site::on(&bed, "partition = 'ci'\nsbatch_args = ['--nice=7']");
    let mut spec = site.closed("exit 0");
    spec.label = "group/project: job | 1\n2".into();
    spec.limits.wall_time = Some(std::time::Duration::from_secs(119));
    spec.options
        .extend("ntasks = 2\ncpus_per_task = '3'\nmem = '100M'".parse::<toml::Table>().unwrap());
    let job = site.submit(&spec).await;
    let shown = bed.slurm("scontrol", &["-o", "show", "job", &job.id.0]);
    for word in [
        &format!("JobName={}", job.token),
        "Partition=closed",
        "NumTasks=2",
        "CPUs/Task=3",
        "MinMemoryNode=100M",
        "TimeLimit=00:02:00",
        "Nice=7",
        "Requeue=0",
        "Comment=group/project: job   1 2",
    ] {
        assert!(shown.contains(word), "{word} in {shown}");
    }
    site.backend.cancel(&[job]).await.unwrap();
}

#[tokio::test]
async fn one_poll_asks_once_for_any_number_of_jobs() {
    if unwanted() {
        return;
    }
    let bed = Bed::shared();
    let site = Site::on(&bed, "settle = '1s'");
    let ended = site.run("exit 0").await;
    let mut jobs = vec![ended.clone()];
    for _ in 0..20 {
        jobs.push(site.submit(&site.closed("exit 0")).await);
    }
    site.until(&ended, |seen| matches!(seen, Observation::Ended { .. })).await;
    // One that nobody knows: the accounting is asked for it.
    jobs.push(job(&token(), &ExternalId("4000000".into())));

    let programs = ["squeue", "sacct", "scontrol", "scancel", "sbatch"];
    let bodies = programs.map(|name| {
        (name, format!("echo {name} >> {}/calls; exec /usr/bin/{name} \"$@\"", site.path()))
    });
    let bodies: Vec<(&str, &str)> = bodies.iter().map(|(n, b)| (*n, b.as_str())).collect();
    let bin = programs_in(&site.dir, &bodies);
    let counted = site.reopened(&format!("bin_dir = '{bin}'"));
    let calls = || {
        let path = site.path().join("calls");
        let calls = std::fs::read_to_string(&path).unwrap_or_default();
        std::fs::write(&path, "").unwrap();
        calls.lines().map(str::to_owned).collect::<Vec<_>>()
    };
    let seen = counted.poll(&jobs).await.unwrap();
    assert_eq!(seen.len(), jobs.len());
    assert_eq!(calls(), ["squeue", "sacct"]);
    let tokens: Vec<_> = jobs.iter().map(|job| job.token.clone()).collect();
    assert_eq!(counted.find(&tokens).await.unwrap().len(), jobs.len() - 1);
    assert_eq!(calls(), ["squeue", "sacct"]);
    counted.cancel(&jobs).await.unwrap();
    assert_eq!(calls(), ["squeue", "scancel"]);
    counted.poll(&[]).await.unwrap();
    assert!(calls().is_empty());
}

#[tokio::test]
async fn what_was_never_ours_is_gone_and_may_be_cancelled_and_released() {
    if unwanted() {
        return;
    }
    let site = Site::shared();
    site.backend.check().await.unwrap();
    for id in ["4000000", "not-a-number"] {
        let nobody = JobRef { token: token(), id: ExternalId(id.into()) };
        assert_eq!(site.look(&nobody).await, Some(Observation::Gone));
        site.backend.cancel(std::slice::from_ref(&nobody)).await.unwrap();
        site.backend.release(&nobody).await.unwrap();
        let error = site.backend.read_log(&nobody, 0, 1).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Lost);
    }
}
