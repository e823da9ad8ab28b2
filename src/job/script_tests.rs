//! The script is run for real, by every kind of shell that may be `/bin/sh` where jobs run.

use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use bridge_backend::result::{JOB_DIR_VAR, JobResult, Step as EndStep};
use bridge_backend::{JobSpec, Limits};
use camino::Utf8PathBuf;
use rustix::process::{Pid, Signal};
use secrecy::ExposeSecret as _;

use super::super::tests::{payload, runner, step, variable};
use super::super::{Slot, plan};
use super::*;
use crate::gitlab::wire::Variable;

/// What plays `/bin/sh`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outer {
    /// Whatever this machine has.
    System,
    /// bash under the name of sh, as Red Hat has it.
    Posix,
    /// No bash anywhere.
    Bare,
}

const OUTERS: [Outer; 3] = [Outer::System, Outer::Posix, Outer::Bare];

/// A job on its way.
struct Job {
    payload: JobPayload,
    runner: RunnerContext,
    outer: Outer,
    dir: tempfile::TempDir,
    /// Changes the finished script.
    edit: fn(String) -> String,
}

/// How it went.
struct Ended {
    status: std::process::ExitStatus,
    log: String,
    result: Option<JobResult>,
}

struct Running {
    child: Child,
    root: Utf8PathBuf,
}

impl Job {
    fn new(lines: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut payload = payload(&[("GIT_STRATEGY", "none")]);
        payload.steps = vec![step("script", lines)];
        let mut runner = runner();
        runner.builds_dir = Utf8PathBuf::from_path_buf(dir.path().join("builds")).unwrap();
        Self { payload, runner, outer: Outer::System, dir, edit: |script| script }
    }

    fn on(mut self, outer: Outer) -> Self {
        self.outer = outer;
        self
    }

    fn after(mut self, lines: &[&str]) -> Self {
        self.payload.steps.push(step("after_script", lines));
        self
    }

    fn with(mut self, key: &str, value: &str) -> Self {
        self.payload.variables.push(variable(key, value));
        self
    }

    fn root(&self) -> Utf8PathBuf {
        Utf8PathBuf::from_path_buf(self.dir.path().to_owned()).unwrap()
    }

    fn spec(&self) -> JobSpec {
        let plan = plan(&self.payload, &self.runner, Slot::default()).unwrap();
        fs::create_dir_all(&plan.project_dir).unwrap();
        fs::create_dir_all(&plan.temp_dir).unwrap();
        let mut spec = plan.spec(Limits::default());
        spec.script = (self.edit)(spec.script);
        spec
    }

    fn start(&self) -> Running {
        let root = self.root();
        let spec = self.spec();
        let job_dir = root.join("job");
        fs::create_dir_all(&job_dir).unwrap();
        let script = job_dir.join("script");
        fs::write(&script, &spec.script).unwrap();
        let (shell, path) = shell(self.outer, &root);
        let log = fs::OpenOptions::new().append(true).create(true).open(root.join("log")).unwrap();
        // Whoever runs the tests may ignore signals, and a shell cannot undo that.
        let child = Command::new("/usr/bin/env")
            .args(["--default-signal", "/bin/bash", "-c", "exec -a sh \"$0\" \"$@\""])
            .arg(shell)
            .arg(&script)
            .env_clear()
            .env("PATH", path)
            .env("HOME", &root)
            .env(JOB_DIR_VAR, &job_dir)
            .envs(spec.env.iter().map(|var| (&var.name, var.value.expose_secret())))
            .current_dir(&spec.workspace)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .process_group(0)
            .spawn()
            .unwrap();
        Running { child, root }
    }

    fn run(&self) -> Ended {
        self.start().wait()
    }
}

impl Running {
    fn log(&self) -> String {
        fs::read_to_string(self.root.join("log")).unwrap_or_default()
    }

    fn wait_for(&self, text: &str) {
        let start = Instant::now();
        while !self.log().contains(text) {
            assert!(start.elapsed() < Duration::from_secs(30), "no {text:?} in {:?}", self.log());
            std::thread::park_timeout(Duration::from_millis(5));
        }
    }

    fn term(&self) {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).unwrap()).unwrap();
        rustix::process::kill_process(pid, Signal::TERM).unwrap();
    }

    /// Signals every process of the job, as batch systems do.
    fn term_all(&self) {
        let mark = format!("HOME={}\0", self.root);
        for entry in fs::read_dir("/proc").unwrap() {
            let path = entry.unwrap().path();
            let environ = fs::read(path.join("environ")).unwrap_or_default();
            let pid = path.file_name().and_then(|name| name.to_str()?.parse().ok());
            if let Some(pid) = pid.and_then(Pid::from_raw)
                && String::from_utf8_lossy(&environ).contains(&mark)
            {
                // It may just have ended.
                match rustix::process::kill_process(pid, Signal::TERM) {
                    Ok(()) | Err(rustix::io::Errno::SRCH) => {}
                    Err(error) => panic!("{error}"),
                }
            }
        }
    }

    fn cancelled(&self) {
        fs::write(self.root.join("job").join(CANCELLED_FILE), "").unwrap();
    }

    fn wait(mut self) -> Ended {
        let start = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(start.elapsed() < Duration::from_secs(60), "hangs: {:?}", self.log());
            std::thread::park_timeout(Duration::from_millis(5));
        };
        let job_dir = self.root.join("job");
        let result = fs::read_to_string(job_dir.join(RESULT_FILE)).ok();
        assert!(!job_dir.join("result.new").exists());
        Ended {
            status,
            log: self.log(),
            result: result.map(|text| JobResult::parse(&text).unwrap()),
        }
    }
}

impl Ended {
    fn result(&self) -> &JobResult {
        self.result
            .as_ref()
            .unwrap_or_else(|| panic!("no result: {:?} {:?}", self.status, self.log))
    }

    fn code(&self) -> i32 {
        let result = self.result();
        assert_eq!(self.status.code(), Some(result.exit_code), "{}", self.log);
        assert_eq!(result.log_len, Some(u64::try_from(self.log.len()).unwrap()), "{}", self.log);
        result.exit_code
    }

    /// What the script's own commands said; bash mentions killed children, as it always does.
    fn lines(&self) -> Vec<&str> {
        let ours = |line: &&str| !line.starts_with('\u{1b}');
        let obituary = |line: &&str| line.contains("Killed") || line.contains("Terminated");
        self.log.lines().filter(ours).filter(|line| !obituary(line)).collect()
    }
}

fn which(program: &str) -> Option<Utf8PathBuf> {
    std::env::var("PATH")
        .unwrap()
        .split(':')
        .map(|dir| Utf8Path::new(dir).join(program))
        .find(|path| path.is_file())
}

fn shell(outer: Outer, root: &Utf8Path) -> (Utf8PathBuf, String) {
    let path = std::env::var("PATH").unwrap();
    match outer {
        Outer::System => ("/bin/sh".into(), path),
        Outer::Posix => (which("bash").unwrap(), path),
        Outer::Bare => {
            let bin = root.join("bin");
            fs::create_dir_all(&bin).unwrap();
            let tools =
                ["cat", "date", "env", "mkdir", "mv", "setsid", "sh", "sleep", "stat", "true"];
            for tool in tools {
                if let Err(error) = symlink(which(tool).unwrap(), bin.join(tool)) {
                    assert_eq!(error.kind(), std::io::ErrorKind::AlreadyExists);
                }
            }
            (bin.join("sh"), bin.into_string())
        }
    }
}

#[test]
fn exit_codes_are_those_of_the_official_runner() {
    for (lines, code, said) in [
        (&["true"] as &[&str], 0, &[] as &[&str]),
        (&[], 0, &[]),
        (&["", "echo a"], 0, &["", "a"]),
        (&["exit 3", "echo no"], 3, &[]),
        (&["exit 0", "echo no"], 0, &[]),
        (&["false", "echo no"], 1, &[]),
        (&["false | true", "echo no"], 1, &[]),
        (&["true | sh -c 'exit 4' | true"], 4, &[]),
        (&["false || true", "echo yes"], 0, &["yes"]),
        (&["false && true", "echo yes"], 0, &["yes"]),
        (&["false && true"], 1, &[]),
        (&["! true"], 1, &[]),
        (&["if false; then echo no; fi"], 0, &[]),
        (&["(exit 5)", "echo no"], 5, &[]),
        (&["f() { return 6; }", "f", "echo no"], 6, &[]),
        (&["f() { false; echo inside; }", "f || true"], 0, &["inside"]),
        (&["exec sh -c 'exit 7'"], 7, &[]),
        (&["unset NOPE", "echo ${NOPE-none}"], 0, &["none"]),
        (&["sh -c 'kill -9 $$'", "echo no"], 137, &[]),
        (&["sh -c 'kill -TERM $$'", "echo no"], 143, &[]),
        (&["x=$(false)", "echo no"], 1, &[]),
        (&["echo one\necho two"], 0, &["one", "two"]),
        (&["read x || echo no input"], 0, &["no input"]),
        (&["cd /", "pwd"], 0, &["/"]),
        (&["set -C", "echo a >f", "set +C", "echo b >f", "cat f"], 0, &["b"]),
        (&["exec 2>/dev/null", "sh -c 'kill -HUP $$'", "echo no"], 129, &[]),
        (&["exec 2>/dev/null", "sh -c 'kill -SEGV $$'", "echo no"], 139, &[]),
        (&["exit 128"], 128, &[]),
        (&["sh -c 'exit 255'"], 255, &[]),
        (&["exit 300"], 44, &[]),
        (&["trap 'echo bye' EXIT", "exit 9"], 9, &["bye"]),
    ] {
        let ended = Job::new(lines).run();
        assert_eq!(ended.code(), code, "{lines:?}: {}", ended.log);
        assert_eq!(ended.result().step, EndStep::Script);
        assert_eq!(ended.lines(), said, "{lines:?}");
    }
}

#[test]
fn what_the_shell_itself_complains_of_counts_as_in_the_official_runner() {
    for (lines, code) in [
        (&["no-such-command"] as &[&str], 127),
        (&["/etc/passwd"], 126),
        (&["if"], 2),
        (&["echo 'unclosed"], 2),
        (&["echo before", "fi", "echo after"], 2),
        (&["set -u", "echo $NOPE"], 1),
        (&["cd /nonexistent"], 1),
        (&["kill -9 $$"], 137),
    ] {
        // The same statements, put together by hand.
        let body: String = lines.iter().map(|line| format!("{line}\n")).collect();
        let reference = format!(
            "trap 'exit 1' TERM\nset -o pipefail; set -o errexit\nset +o noclobber\n\
             (trap 'exit 1' TERM; eval {}) </dev/null\nexit 0\n",
            quoted(&body)
        );
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("reference");
        fs::write(&file, reference).unwrap();
        let status = Command::new("bash")
            .stdin(fs::File::open(&file).unwrap())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .unwrap();
        let official = status.code().unwrap_or_else(|| 128 + status.signal().unwrap());
        let ended = Job::new(lines).run();
        assert_eq!(ended.code(), official, "{lines:?}: {}", ended.log);
        assert_eq!(official, code, "{lines:?}");
        assert!(!ended.log.contains("\nafter\n"));
    }
}

#[test]
fn every_shell_that_may_be_sh_keeps_the_promises() {
    for outer in OUTERS {
        let ended = Job::new(&["echo out", "echo err >&2", "exit 3"])
            .on(outer)
            .after(&["echo status $CI_JOB_STATUS"])
            .run();
        assert_eq!(ended.code(), 3, "{outer:?}: {}", ended.log);
        assert_eq!(ended.lines(), ["out", "err", "status failed"], "{outer:?}");
        let green = Job::new(&["echo a"]).on(outer).after(&["echo $CI_JOB_STATUS; false"]).run();
        assert_eq!(green.code(), 0, "{outer:?}");
        assert_eq!(green.lines(), ["a", "success"], "{outer:?}");
        assert!(
            green.log.contains(
                "\u{1b}[0;33mWARNING: after_script failed, but job will continue unaffected: exit \
                 status 1"
            ),
            "{}",
            green.log
        );
    }
}

#[test]
fn values_arrive_byte_for_byte() {
    let values = [
        ("QUOTES", "it's \"quoted\" `tick` \\back\\"),
        ("LINES", "first\nsecond\n\n"),
        ("DOLLAR", "a $NOT ${NOT} $(date) $$ !x"),
        ("UTF8", "größe → ∞ 🦀"),
        ("CONTROL", "\u{1}\u{7f}\t\r\u{1b}[0m"),
        ("EMPTY", ""),
        ("GLOB", "* ? [a]  two  blanks "),
        ("DASH", "-n"),
    ];
    for outer in OUTERS {
        let mut job = Job::new(&["env -0 >values"]).on(outer);
        job.payload.variables.extend(
            values.iter().map(|(key, value)| Variable { raw: true, ..variable(key, value) }),
        );
        let ended = job.run();
        assert_eq!(ended.code(), 0, "{}", ended.log);
        let project = job.root().join("builds/short/0/hep/tracker");
        let seen = fs::read(project.join("values")).unwrap();
        let seen: Vec<&str> =
            seen.split(|b| *b == 0).map(|text| std::str::from_utf8(text).unwrap()).collect();
        for (key, value) in values {
            let wanted = format!("{key}={value}");
            assert!(seen.contains(&wanted.as_str()), "{outer:?}: {wanted:?} not in {seen:?}");
        }
        let leaked = seen.iter().find(|v| v.starts_with(CARRIER) || v.starts_with(JOB_DIR_VAR));
        assert_eq!(leaked, None, "{outer:?}");
    }
}

#[test]
fn a_jobs_variable_outlives_the_login_profile() {
    let mut job = Job::new(&["echo \"[$LANGUAGE] $FROM_PROFILE\"", "shopt -q login_shell"])
        .with("LANGUAGE", "of the job");
    job.runner.login_shell = true;
    fs::write(
        job.root().join(".bash_profile"),
        "export LANGUAGE=profile FROM_PROFILE=yes\nexit_code=9\nset +e\n",
    )
    .unwrap();
    let ended = job.run();
    assert_eq!(ended.code(), 0, "{}", ended.log);
    assert!(ended.lines().contains(&"[of the job] yes"), "{}", ended.log);
}

#[test]
fn a_jobs_path_does_not_reach_the_wrapper() {
    let ended = Job::new(&["echo $PATH"]).with("PATH", "/nowhere").after(&["true"]).run();
    assert_eq!(ended.code(), 0);
    assert_eq!(ended.lines(), ["/nowhere"]);
}

#[test]
fn commands_are_echoed_as_the_official_runner_does() {
    let ended = Job::new(&["  echo 'a\\nb'  ", "true\necho c", "echo $HOME >/dev/null"]).run();
    assert_eq!(
        ended.log,
        "\u{1b}[0K\u{1b}[36;1mExecuting \"step_script\" stage of the job \
         script\u{1b}[0;m\u{1b}[0;m\n\
         \u{1b}[32;1m$ echo 'a\\nb'\u{1b}[0;m\na\\nb\n\
         \u{1b}[32;1m$ true # collapsed multi-line command\u{1b}[0;m\nc\n\
         \u{1b}[32;1m$ echo $HOME >/dev/null\u{1b}[0;m\n"
    );
}

#[test]
fn sections_are_marked_when_the_server_wants_them() {
    for outer in OUTERS {
        let mut job = Job::new(&["true\ntrue"]).on(outer).after(&["true"]);
        job.payload.features.trace_sections = true;
        job.payload.variables.push(variable("FF_SCRIPT_SECTIONS", "true"));
        let log = job.run().log;
        let mut digits = String::new();
        let timeless: String = log
            .chars()
            .filter(|c| {
                if c.is_ascii_digit() {
                    digits.push(*c);
                }
                !c.is_ascii_digit()
            })
            .collect();
        for part in [
            "section_start::step_script\r\u{1b}[K\u{1b}[K\u{1b}[;mExecuting",
            "section_start::section_script_step_[hide_duration=true,collapsed=true]\r\u{1b}[K\
             \u{1b}[;m$ true\ntrue\u{1b}[;m\nsection_end::section_script_step_\r\u{1b}[K\n",
            "section_end::step_script\r\u{1b}[Ksection_start::after_script\r\u{1b}[K\u{1b}[K\
             \u{1b}[;mRunning after_script\u{1b}[;m\u{1b}[;m\n\
             \u{1b}[;mRunning after script...\u{1b}[;m\n",
            "section_end::after_script\r\u{1b}[K",
        ] {
            assert!(timeless.contains(part), "{outer:?}: {part:?} not in {timeless:?}");
        }
        let start = log.split("section_start:").nth(1).unwrap();
        let epoch: u64 = start.split(':').next().unwrap().parse().unwrap();
        assert!(epoch > 1_700_000_000, "{epoch}");
    }
}

#[test]
fn steps_run_in_order_until_one_fails_each_in_its_own_shell() {
    let mut job = Job::new(&["export A=1; B=2", "echo script"]).after(&["echo after ${A-no}"]);
    job.payload.steps.insert(1, step("release", &["echo release ${A-no} $CI_SERVER '$$'"]));
    job.payload.steps.insert(2, step("Odd Name", &["exit 4"]));
    job.payload.steps.insert(3, step("never", &["echo never"]));
    job.runner.pre_build_script = Some("echo pre".into());
    job.runner.post_build_script = Some("echo post".into());
    let ended = job.run();
    assert_eq!(ended.code(), 4);
    // `release` alone is expanded, before the shell sees it: ${A-no} names no variable.
    let expected = ["pre", "script", "post", "pre", "release yes $", "post", "pre", "after no"];
    assert_eq!(ended.lines(), expected, "{}", ended.log);
    assert!(ended.log.contains("Executing \"step_odd_name\" stage"));
}

#[test]
fn gitlab_env_carries_variables_to_later_steps() {
    for outer in OUTERS {
        let ended = Job::new(&[
            "echo 'NEXT=a b $HOME' >>$GITLAB_ENV",
            "echo \"LATER=1\" >>\"$GITLAB_ENV\"",
            "export GONE=1",
        ])
        .on(outer)
        .after(&["echo \"$NEXT|$LATER|${GONE-gone}\"", "sh -c 'echo child $LATER'"])
        .run();
        assert_eq!(ended.lines(), ["a b $HOME|1|gone", "child 1"], "{outer:?}");
    }
}

#[test]
fn gitlab_env_reaches_every_later_step_also_after_a_failure() {
    for outer in OUTERS {
        let mut job = Job::new(&["echo A=1 >>$GITLAB_ENV"]).on(outer);
        job.payload
            .steps
            .push(step("release", &["echo \"$$A\"", "echo A=2 >>$$GITLAB_ENV", "false"]));
        let ended = job.after(&["echo \"$A $CI_JOB_STATUS\""]).run();
        assert_eq!(ended.lines(), ["1", "2 failed"], "{outer:?}: {}", ended.log);
    }
}

#[test]
fn after_script_failures_count_only_when_wanted() {
    let job = |value: &str, script: &str, after: &str| {
        let ended =
            Job::new(&[script]).with("AFTER_SCRIPT_IGNORE_ERRORS", value).after(&[after]).run();
        (ended.code(), ended.result().step)
    };
    assert_eq!(job("true", "true", "exit 5"), (0, EndStep::Script));
    assert_eq!(job("false", "true", "exit 5"), (5, EndStep::AfterScript));
    assert_eq!(job("false", "exit 2", "exit 5"), (2, EndStep::Script));
    assert_eq!(job("false", "true", "true"), (0, EndStep::Script));
}

#[test]
fn a_script_that_takes_too_long_is_stopped_and_after_script_knows() {
    for outer in OUTERS {
        let ended = Job::new(&["echo up", "sleep 300", "echo no"])
            .on(outer)
            .with("RUNNER_SCRIPT_TIMEOUT", "1s")
            .after(&["echo $CI_JOB_STATUS"])
            .run();
        assert_eq!(ended.code(), 124, "{outer:?}");
        assert_eq!(ended.result().step, EndStep::ScriptTimedOut);
        assert!(!ended.result().signalled);
        assert_eq!(ended.lines(), ["up", "timedout"], "{outer:?}: {}", ended.log);
        assert!(ended.log.contains("RUNNER_SCRIPT_TIMEOUT allows (1 s)"));
    }
}

#[test]
fn a_script_that_ignores_term_is_killed_with_its_children() {
    for outer in OUTERS {
        let mut job =
            Job::new(&["trap '' TERM", "(trap '' TERM; sleep 300) & echo $! >pid", "wait"])
                .on(outer)
                .with("RUNNER_SCRIPT_TIMEOUT", "1s");
        job.edit = |script| script.replace("_b_arm 10\n", "_b_arm 1\n");
        let ended = job.run();
        assert_eq!(ended.result().step, EndStep::ScriptTimedOut, "{outer:?}");
        let pid = fs::read_to_string(job.root().join("builds/short/0/hep/tracker/pid")).unwrap();
        let stat = format!("/proc/{}/stat", pid.trim());
        let gone = Instant::now();
        while fs::read_to_string(&stat).is_ok_and(|text| !text.contains(") Z ")) {
            assert!(gone.elapsed() < Duration::from_secs(20), "{outer:?}: child lives");
            std::thread::park_timeout(Duration::from_millis(5));
        }
    }
}

#[test]
fn an_after_script_that_takes_too_long_changes_nothing() {
    let ended = Job::new(&["true"])
        .with("RUNNER_AFTER_SCRIPT_TIMEOUT", "1s")
        .after(&["echo up", "sleep 300"])
        .run();
    assert_eq!(ended.code(), 0);
    assert_eq!(ended.result().step, EndStep::Script);
    assert!(ended.log.contains("continue unaffected: it took longer"), "{}", ended.log);
}

#[test]
fn a_script_in_time_leaves_no_clock_behind() {
    let job = Job::new(&["true"]).with("RUNNER_SCRIPT_TIMEOUT", "31m").after(&["true"]);
    assert_eq!(job.run().code(), 0);
    let dir = job.root();
    for entry in fs::read_dir("/proc").unwrap() {
        let path = entry.unwrap().path();
        let args = fs::read(path.join("cmdline")).unwrap_or_default();
        let home = fs::read(path.join("environ")).unwrap_or_default();
        let ours = String::from_utf8_lossy(&home).contains(dir.as_str());
        assert!(!(ours && args.starts_with(b"sleep")), "{path:?}");
    }
}

#[test]
fn a_cancelled_script_ends_and_after_script_still_runs() {
    for outer in OUTERS {
        let job = Job::new(&["echo up", "sleep 300", "echo no"])
            .on(outer)
            .after(&["echo status $CI_JOB_STATUS"]);
        let running = job.start();
        running.wait_for("\nup\n");
        running.cancelled();
        running.term();
        let ended = running.wait();
        assert_eq!(ended.code(), 143, "{outer:?}");
        assert!(ended.result().signalled);
        assert_eq!(ended.result().outcome(), None);
        assert_eq!(ended.lines(), ["up", "status canceled"], "{outer:?}: {}", ended.log);
        assert!(
            ended.log.contains(
                "WARNING: the script was stopped: the job was cancelled or its time was up"
            )
        );
    }
}

#[test]
fn a_signal_to_every_process_is_one_cancellation() {
    for outer in OUTERS {
        // Python-like: a program that ends in its own good time, and a clock for it.
        let mut job = Job::new(&["trap 'echo saved; exit 9' TERM", "echo up", "sleep 300", "true"])
            .on(outer)
            .with("RUNNER_SCRIPT_TIMEOUT", "10m")
            .after(&["echo status $CI_JOB_STATUS", "true"]);
        job.payload.features.trace_sections = true;
        let running = job.start();
        running.wait_for("\nup\n");
        running.term_all();
        let ended = running.wait();
        assert_eq!(ended.code(), 143, "{outer:?}");
        assert!(ended.result().signalled);
        assert!(ended.log.contains("\nsaved\n"), "{outer:?}: {}", ended.log);
        assert!(ended.log.contains("\nstatus canceled\n"), "{outer:?}: {}", ended.log);
    }
}

#[test]
fn a_stubborn_script_is_killed_although_everybody_was_told_twice() {
    for outer in OUTERS {
        let mut job = Job::new(&["trap '' TERM", "echo up", "while :; do sleep 1; done"]).on(outer);
        job.edit = |script| script.replace("_b_arm 10\n", "_b_arm 1\n");
        let running = job.start();
        running.wait_for("\nup\n");
        running.term_all();
        running.term_all();
        let ended = running.wait();
        assert_eq!(ended.code(), 143, "{outer:?}");
        assert!(ended.result().signalled);
    }
}

#[test]
fn a_suspended_script_is_waited_for() {
    for outer in OUTERS {
        let job = Job::new(&["echo $$ >pid", "echo up", "sleep 1", "exit 8"]).on(outer);
        let alike = Job::new(&["exit 147"]).on(outer).run();
        assert_eq!(alike.code(), 147, "{outer:?}: looks like a suspension, is none");
        let running = job.start();
        running.wait_for("\nup\n");
        let file = job.root().join("builds/short/0/hep/tracker/pid");
        let pid = fs::read_to_string(file).unwrap().trim().parse().unwrap();
        let pid = Pid::from_raw(pid).unwrap();
        rustix::process::kill_process(pid, Signal::STOP).unwrap();
        rustix::process::kill_process(pid, Signal::CONT).unwrap();
        rustix::process::kill_process(pid, Signal::STOP).unwrap();
        let state = || fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).unwrap();
        let start = Instant::now();
        while !state().contains(") T ") {
            assert!(start.elapsed() < Duration::from_secs(20), "{}", state());
            std::thread::park_timeout(Duration::from_millis(5));
        }
        assert!(!job.root().join("job").join(RESULT_FILE).exists());
        rustix::process::kill_process(pid, Signal::CONT).unwrap();
        assert_eq!(running.wait().code(), 8, "{outer:?}");
    }
}

#[test]
fn a_signal_during_after_script_ends_it_and_says_so() {
    let job = Job::new(&["true"]).after(&["echo late", "sleep 300"]);
    let running = job.start();
    running.wait_for("\nlate\n");
    running.term();
    let ended = running.wait();
    assert_eq!(ended.code(), 0, "the script itself had ended well");
    assert!(ended.result().signalled, "but the other side's word decides");
}

#[test]
fn a_time_limit_of_the_batch_system_is_no_cancellation() {
    let job = Job::new(&["echo up", "sleep 300"]);
    let running = job.start();
    running.wait_for("\nup\n");
    running.term();
    let ended = running.wait();
    assert!(ended.result().signalled);
    assert!(ended.log.contains("told the job to end (TERM)"), "{}", ended.log);
    assert!(!ended.log.contains("canceled"));
}

#[test]
fn a_second_signal_does_not_prevent_the_result() {
    for outer in OUTERS {
        let job = Job::new(&["echo up", "sleep 300"]).on(outer).after(&["echo late", "sleep 300"]);
        let running = job.start();
        running.wait_for("\nup\n");
        running.term();
        running.wait_for("\nlate\n");
        running.term();
        running.term();
        let ended = running.wait();
        assert_eq!(ended.code(), 143, "{outer:?}");
        assert!(ended.result().signalled);
    }
}

#[test]
fn a_signal_meant_for_the_program_reaches_it_and_harms_nobody() {
    for outer in OUTERS {
        let job =
            Job::new(&["trap 'echo checkpoint' USR1", "echo up", "sleep 1 || true", "exit 6"])
                .on(outer);
        let running = job.start();
        running.wait_for("\nup\n");
        let pid = Pid::from_raw(i32::try_from(running.child.id()).unwrap()).unwrap();
        rustix::process::kill_process(pid, Signal::USR1).unwrap();
        let ended = running.wait();
        assert_eq!(ended.code(), 6, "{outer:?}: {}", ended.log);
        assert!(!ended.result().signalled);
    }
}

#[test]
fn interrupts_work_inside_the_script() {
    let ended = Job::new(&["sh -c 'kill -INT $$; echo survived' || echo interrupted $?"]).run();
    assert_eq!(ended.lines(), ["interrupted 130"]);
}

#[test]
fn debug_trace_shows_commands_but_not_the_carried_values() {
    let ended = Job::new(&["echo \"$A\""]).with("A", "value").with("CI_DEBUG_TRACE", "true").run();
    assert_eq!(ended.code(), 0);
    assert!(ended.log.contains("+ echo value"), "{}", ended.log);
    assert!(!ended.log.contains("export"), "{}", ended.log);
}

#[test]
fn a_missing_project_directory_is_the_machines_fault() {
    let job = Job::new(&["true"]);
    assert_eq!(job.run().code(), 0);
    let workspace = job.spec().workspace;
    fs::remove_dir(&workspace).unwrap();
    let job_dir = job.root().join("job");
    let output = Command::new("/bin/sh")
        .arg(job_dir.join("script"))
        .env_clear()
        .env("PATH", std::env::var("PATH").unwrap())
        .env(JOB_DIR_VAR, &job_dir)
        .current_dir("/")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let text = fs::read_to_string(job_dir.join(RESULT_FILE)).unwrap();
    let result = JobResult::parse(&text).unwrap();
    assert_eq!(result.step, EndStep::Setup);
    assert_eq!(result.log_len, None, "a pipe has no length");
    assert!(String::from_utf8_lossy(&output.stdout).contains("project directory"));
}

#[test]
fn sh_is_used_where_the_operator_says_so() {
    let mut job = Job::new(&["echo \"${BASH_VERSION:-none}\" $0"]);
    job.runner.shell = Shell::Sh;
    // Where sh is bash, this says so.
    let expected = Command::new("sh").args(["-c", "echo ${BASH_VERSION:-none}"]).output().unwrap();
    let expected = format!("{} sh", String::from_utf8_lossy(&expected.stdout).trim());
    assert_eq!(job.run().lines(), [expected.as_str()]);
    assert!(Job::new(&["echo $0"]).run().lines().contains(&"bash"));
}

#[test]
fn a_megabyte_of_script_runs() {
    let line = format!("echo \"it's {}\" | wc -c", "'x'".repeat(40_000));
    let lines: Vec<&str> = vec![&line; 8];
    let ended = Job::new(&lines).run();
    assert_eq!(ended.code(), 0);
    assert_eq!(ended.lines().len(), 8);
}

#[test]
fn durations_are_rounded_up_to_whole_seconds() {
    assert_eq!(whole_seconds(Duration::from_millis(1)), 1);
    assert_eq!(whole_seconds(Duration::from_millis(1001)), 2);
    assert_eq!(whole_seconds(Duration::from_secs(90)), 90);
}
