//! `bridge exec`: a pipeline without GitLab, by the real binary.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use crate::support::slurm::{self, Cluster};
use crate::support::{BRIDGE, PATIENCE, until, write_private};

/// A folder with a pipeline, a home and a place for temporary files, all of which are looked at later.
struct Folder {
    dir: tempfile::TempDir,
}

impl Folder {
    fn new(pipeline: &str) -> Self {
        let folder = Self { dir: tempfile::Builder::new().prefix("bridge-it-").tempdir().unwrap() };
        for name in ["project", "home", "tmp"] {
            std::fs::create_dir(folder.path(name)).unwrap();
        }
        std::fs::write(folder.path("project/.gitlab-ci.yml"), pipeline).unwrap();
        folder
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(BRIDGE);
        command
            .args(args)
            .env("HOME", self.path("home"))
            .env("TMPDIR", self.path("tmp"))
            .env_remove("BRIDGE_CONFIG")
            .current_dir(self.path("project"))
            .stdin(Stdio::null());
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// What is left of a run outside of the project.
    fn left(&self) -> Vec<PathBuf> {
        let mut left = Vec::new();
        for place in ["tmp", "home/.cache/bridge"] {
            let entries = std::fs::read_dir(self.path(place)).into_iter().flatten();
            left.extend(entries.map(|entry| entry.unwrap().path()));
        }
        left
    }

    /// Everything in the project, git's own files included.
    fn project(&self) -> Vec<PathBuf> {
        let mut found = Vec::new();
        let mut open = vec![self.path("project")];
        while let Some(dir) = open.pop() {
            for entry in std::fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    open.push(path.clone());
                }
                found.push(path);
            }
        }
        found.sort();
        found
    }
}

fn out(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn err(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The processes whose command line holds a text.
fn processes(text: &str) -> Vec<String> {
    let entries = std::fs::read_dir("/proc").unwrap().filter_map(Result::ok);
    entries
        .filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok())
        .map(|line| String::from_utf8_lossy(&line).replace('\0', " "))
        .filter(|line| line.contains(text))
        .collect()
}

/// Waits for a process to end by itself.
async fn ended(mut child: Child) -> Output {
    let started = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if started.elapsed() > PATIENCE {
            drop(child.kill());
            panic!("exec does not end: {}", err(&child.wait_with_output().unwrap()));
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    child.wait_with_output().unwrap()
}

fn example() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/hello")
}

#[test]
fn the_example_passes_in_plain_lines_and_shows_what_failed() {
    let folder = Folder::new("");
    let output = folder.run(&["exec", example().to_str().unwrap()]);
    let (out, err) = (out(&output), err(&output));
    assert_eq!(output.status.code(), Some(0), "{err}");
    assert!(!err.contains('\u{1b}'), "no colours and cursors for a pipe: {err}");
    for (job, end) in [
        ("count-words", "passed"),
        ("list-files", "passed"),
        ("sorted", "passed"),
        ("spelling", "failed, allowed (exit code 42)"),
        ("early-bird", "passed"),
        ("world", "passed"),
        ("everybody", "passed"),
        ("apologise", "skipped"),
    ] {
        let line = err.lines().find(|line| line.starts_with(job) && line.contains(end));
        assert!(line.is_some(), "{job} {end}: {err}");
    }
    assert!(err.ends_with("\nPipeline passed with warnings\n"), "{err}");
    assert!(out.starts_with("── trace of spelling (failed, allowed (exit code 42)) ──\n"), "{out}");
    assert!(out.contains("this job has failed, and nobody minds"), "after_script: {out}");
    assert!(out.contains("section_start:"), "sections: {out}");
    assert_eq!(out.matches("── trace of ").count(), 1, "only what failed: {out}");
    assert_eq!(folder.left(), Vec::<PathBuf>::new());
}

#[test]
fn the_traces_of_all_jobs_are_shown_when_asked_for() {
    let folder = Folder::new(
        "one: {script: echo this is $CI_JOB_NAME}\ntwo: {script: [echo and, echo this is $CI_JOB_NAME]}\n",
    );
    let output = folder.run(&["exec", "--trace"]);
    assert!(output.status.success(), "{}", err(&output));
    let out = out(&output);
    for job in ["one", "two"] {
        assert!(out.contains(&format!("── trace of {job} (passed) ──\n")), "{out}");
        assert!(out.contains(&format!("\nthis is {job}\n")), "{out}");
    }
    let quiet = folder.run(&["exec"]);
    assert!(quiet.status.success() && quiet.stdout.is_empty(), "{quiet:?}");
}

#[test]
fn a_pipeline_that_fails_exits_1_and_later_stages_are_skipped() {
    let folder = Folder::new(
        "stages: [build, test]\n\
         make:\n  stage: build\n  script: [echo about to fail, exit 3]\n\
         check:\n  stage: test\n  script: touch checked\n\
         sorry:\n  stage: test\n  when: on_failure\n  script: echo sorry\n",
    );
    let output = folder.run(&["exec"]);
    let (out, err) = (out(&output), err(&output));
    assert_eq!(output.status.code(), Some(1), "{err}");
    assert!(err.contains("failed (exit code 3)"), "{err}");
    assert!(
        err.lines().any(|line| line.starts_with("check") && line.ends_with("skipped")),
        "{err}"
    );
    assert!(err.lines().any(|line| line.starts_with("sorry") && line.contains("passed")), "{err}");
    assert!(err.ends_with("\nPipeline failed\n"), "{err}");
    assert!(out.contains("about to fail") && out.contains("Job failed: exit status 3"), "{out}");
    assert_eq!(folder.left(), Vec::<PathBuf>::new());
}

#[test]
fn an_unknown_keyword_is_named_with_its_job_and_line() {
    let folder = Folder::new("build:\n  script: echo built\n  retries: 2\n  script_: echo\n");
    let output = folder.run(&["exec"]);
    assert_eq!(output.status.code(), Some(7), "{}", err(&output));
    insta::assert_snapshot!(err(&output), @r"
    error: cannot run the pipeline: 2 problems in the pipeline
      ./.gitlab-ci.yml:3: job `build`: keyword `retries` is not supported, unless --ignore-unknown
      ./.gitlab-ci.yml:4: job `build`: keyword `script_` is not supported, unless --ignore-unknown; did you mean `script`?
    ");
    let output = folder.run(&["exec", "--ignore-unknown"]);
    let said = err(&output);
    assert_eq!(output.status.code(), Some(0), "{said}");
    assert!(
        said.contains(
            ".gitlab-ci.yml:3: job `build`: keyword `retries` is not supported and ignored"
        ),
        "{said}"
    );
    assert!(said.ends_with("\nPipeline passed\n"), "{said}");
}

#[test]
fn what_cannot_be_run_is_said_before_anything_is_begun() {
    let folder = Folder::new("build: {script: echo built}\n");
    let refused = |args: &[&str], code: i32| {
        let output = folder.run(args);
        assert_eq!(output.status.code(), Some(code), "{}", err(&output));
        assert!(output.stdout.is_empty());
        assert_eq!(folder.left(), Vec::<PathBuf>::new(), "{args:?}");
        err(&output).replace(&*folder.dir.path().to_string_lossy(), "DIR")
    };
    insta::assert_snapshot!(refused(&["exec", "--backend", "slrm"], 3), @r#"
    error: cannot find a kind of backend called "slrm"
    hint: there are: dirac, local, slurm; with --config a name in the configuration will do
    "#);
    insta::assert_snapshot!(refused(&["exec", "nowhere"], 7), @"error: cannot run the pipeline: read nowhere/.gitlab-ci.yml: No such file or directory (os error 2)");
    insta::assert_snapshot!(refused(&["exec", "--manual", "deploy"], 3), @"error: cannot run the manual job deploy: the pipeline has none of that name");
    write_private(&folder.path("config.toml"), "[backends.here]\nkind = \"local\"\n");
    insta::assert_snapshot!(refused(&["exec", "--config", "../config.toml", "--backend", "there"], 3), @r#"
    error: cannot find the backend "there" in DIR/project/../config.toml
    hint: there are: here
    "#);
}

#[test]
fn a_folder_that_is_no_repository_stays_as_it_is() {
    let folder = Folder::new(
        "build:\n  script:\n    - git log -1 --format=%an\n    - touch made-by-the-job\n    - cat data\n",
    );
    std::fs::write(folder.path("project/data"), "the data\n").unwrap();
    let before = folder.project();
    let output = folder.run(&["exec", "--trace"]);
    assert!(output.status.success(), "{}", err(&output));
    assert!(out(&output).contains("\nbridge exec\n"), "{}", out(&output));
    assert!(out(&output).contains("\nthe data\n"), "{}", out(&output));
    assert_eq!(folder.project(), before, "nothing was added, not even .git");
    assert_eq!(folder.left(), Vec::<PathBuf>::new());
}

#[test]
fn a_named_backend_of_a_configuration_runs_it() {
    let folder = Folder::new("build:\n  script: echo \"built in $PWD\"\n");
    let config = format!(
        "# Runners are of no concern to exec.\n[backends.here]\nkind = \"local\"\njobs_dir = \"{}\"\n",
        folder.path("jobs").display()
    );
    write_private(&folder.path("config.toml"), &config);
    let work = folder.path("work");
    let output = folder.run(&[
        "exec",
        "--trace",
        "--config",
        "../config.toml",
        "--backend",
        "here",
        "--work-dir",
        work.to_str().unwrap(),
    ]);
    assert!(output.status.success(), "{}", err(&output));
    assert!(out(&output).contains("for the backend here..."), "{}", out(&output));
    assert!(out(&output).contains(&format!("built in {}/", work.display())), "{}", out(&output));
    assert!(folder.path("jobs").is_dir(), "its own jobs_dir was used");
    assert_eq!(std::fs::read_dir(&work).unwrap().count(), 0, "the work folder is empty again");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupt_cancels_what_runs_and_leaves_nothing_behind() {
    // A number that no other process here has in its command line.
    let mark = format!("{}", 70_000_000 + u64::from(std::process::id()));
    let folder = Folder::new(&format!(
        "long: {{script: [sleep {mark}]}}\nother: {{script: [bash -c 'sleep {mark} & wait']}}\n\
         stages: [test, deploy]\nlater: {{stage: deploy, script: echo deployed}}\n"
    ));
    let child =
        folder.command(&["exec"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let pid = child.id().to_string();
    until("both jobs to run", || {
        let sleeping = processes(&format!("sleep {mark} "));
        (sleeping.iter().filter(|line| line.starts_with("sleep ")).count() == 2).then_some(())
    })
    .await;
    assert!(Command::new("kill").args(["-s", "INT", &pid]).status().unwrap().success());
    let output = ended(child).await;
    let said = err(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("Interrupted; cancelling what runs. Again to leave at once."), "{said}");
    for job in ["long", "other"] {
        let line = said.lines().find(|line| line.starts_with(job) && line.contains("cancelled"));
        assert!(line.is_some(), "{job}: {said}");
    }
    assert!(
        !said.lines().any(|line| line.starts_with("later") && line.contains("queued")),
        "{said}"
    );
    assert_eq!(processes(&mark), Vec::<String>::new(), "no process is left");
    assert_eq!(folder.left(), Vec::<PathBuf>::new());
}

#[test]
fn the_example_passes_on_slurm() {
    if slurm::left_out() {
        return;
    }
    let cluster = Cluster::start(&[]);
    let folder = Folder::new("");
    let output = folder
        .command(&["exec", "--backend", "slurm", example().to_str().unwrap()])
        .env("SLURM_CONF", cluster.conf())
        .output()
        .unwrap();
    let (out, err) = (out(&output), err(&output));
    assert_eq!(output.status.code(), Some(0), "{err}\n{out}");
    assert!(err.ends_with("\nPipeline passed with warnings\n"), "{err}");
    assert!(out.contains("this job has failed, and nobody minds"), "{out}");
    let names = cluster.ask("squeue", &["-h", "-t", "all", "-o", "%j"]);
    assert_eq!(names.lines().count(), 7, "seven of eight jobs ran, all over there: {names}");
    assert_eq!(folder.left(), Vec::<PathBuf>::new());
}

#[test]
fn the_list_shows_jobs_and_why_others_are_left_out_and_runs_nothing() {
    let folder = Folder::new(
        "include: ci/more.yml\nstages: [build, test]\n\
         make: {stage: build, script: touch made, parallel: {matrix: [{CC: [gcc, clang]}]}}\n\
         check: {stage: test, needs: [make], script: x, allow_failure: {exit_codes: [3]}}\n\
         tagged: {stage: test, script: x, rules: [{if: $CI_COMMIT_TAG}]}\n\
         child: {stage: test, trigger: {include: x.yml}}\n",
    );
    std::fs::create_dir(folder.path("project/ci")).unwrap();
    std::fs::write(
        folder.path("project/ci/more.yml"),
        "ship: {stage: test, script: x, rules: [{if: $WHERE == 'here', when: manual}]}\n",
    )
    .unwrap();
    let output = folder.run(&["exec", "--list", "--var", "WHERE=here"]);
    assert_eq!(output.status.code(), Some(0), "{}", err(&output));
    insta::assert_snapshot!(out(&output), @r"
    STAGE  JOB            WHEN        NEEDS                       NOTE
    build  make: [gcc]    on_success  earlier stages
    build  make: [clang]  on_success  earlier stages
    test   ship           manual      earlier stages              blocks until run
    test   check          on_success  make: [gcc], make: [clang]  may fail with 3
    test   tagged         never                                   no rule fits
    test   child          never                                   a `trigger` job
    ");
    insta::assert_snapshot!(err(&output), @r"
    ./.gitlab-ci.yml:6: job `child`: `trigger`, which starts another pipeline, is not supported; the job is left out
    ");
    let output = folder.run(&["exec", "--list", "--json"]);
    insta::assert_snapshot!(out(&output), @r#"
    {"allow_failure":false,"dependencies":null,"file":"./.gitlab-ci.yml","in_pipeline":true,"job":"make: [gcc]","line":3,"needs":null,"stage":"build","when":"on_success"}
    {"allow_failure":false,"dependencies":null,"file":"./.gitlab-ci.yml","in_pipeline":true,"job":"make: [clang]","line":3,"needs":null,"stage":"build","when":"on_success"}
    {"allow_failure":{"exit_codes":[3]},"dependencies":null,"file":"./.gitlab-ci.yml","in_pipeline":true,"job":"check","line":4,"needs":["make: [gcc]","make: [clang]"],"stage":"test","when":"on_success"}
    {"in_pipeline":false,"job":"ship","stage":"test","why":"no rule fits"}
    {"in_pipeline":false,"job":"tagged","stage":"test","why":"no rule fits"}
    {"in_pipeline":false,"job":"child","stage":"test","why":"a `trigger` job"}
    "#);
    assert_eq!(folder.left(), Vec::<PathBuf>::new());
}

#[test]
fn one_job_runs_with_those_it_needs_and_no_others() {
    let folder = Folder::new(
        "stages: [one, two]\n\
         a: {stage: one, script: echo a}\n\
         b: {stage: one, script: exit 1}\n\
         hand: {stage: two, needs: [a], when: manual, script: echo by hand}\n\
         never: {stage: two, script: x, rules: [{when: never}]}\n",
    );
    let output = folder.run(&["exec", "--job", "hand"]);
    let said = err(&output);
    assert_eq!(output.status.code(), Some(0), "{said}");
    assert!(said.lines().any(|line| line.starts_with("hand") && line.contains("passed")), "{said}");
    assert!(!said.lines().any(|line| line.starts_with("b ")), "{said}");
    let output = folder.run(&["exec", "--job", "never"]);
    assert_eq!(output.status.code(), Some(3));
    insta::assert_snapshot!(err(&output), @r"
    error: cannot run the job never: it is not in the pipeline: the rule at ./.gitlab-ci.yml:5 says never
    hint: --list shows the jobs
    ");
}

#[test]
fn variables_inputs_and_the_local_commit_reach_the_jobs() {
    let folder = Folder::new(
        "spec: {inputs: {whom: {default: nobody}}}\n---\n\
         variables: {GREETING: hello, RAW: {value: $GREETING, expand: false}}\n\
         greet:\n  parallel: {matrix: [{N: [one, two]}]}\n  script:\n\
         \x20   - echo \"$GREETING $[[ inputs.whom ]] $N $CI_NODE_INDEX/$CI_NODE_TOTAL\"\n\
         \x20   - echo \"on $CI_COMMIT_BRANCH of $CI_PROJECT_PATH with $RAW\"\n",
    );
    std::fs::write(folder.path("vars"), "GREETING=hi\n").unwrap();
    let output = folder.run(&[
        "exec",
        "--trace",
        "--input",
        "whom=you",
        "--variables-file",
        "../vars",
        "--var",
        "GREETING=good day",
    ]);
    let (out, err) = (out(&output), err(&output));
    assert!(output.status.success(), "{err}");
    assert!(out.contains("\ngood day you one 1/2\n"), "{out}");
    assert!(out.contains("\ngood day you two 2/2\n"), "{out}");
    assert!(out.contains("\non main of exec/project with $GREETING\n"), "{out}");
    let output = folder.run(&["exec", "--var", "nonsense"]);
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn a_job_with_retry_runs_again_before_it_counts_as_failed() {
    let folder = Folder::new(
        "flaky:\n  retry: {max: 2, exit_codes: [3]}\n  script: 'test -e $MARK || { touch $MARK; exit 3; }'\n\
         hopeless: {retry: {max: 2, exit_codes: [3]}, script: exit 4, allow_failure: true}\n",
    );
    let mark = folder.path("mark");
    let output = folder.run(&["exec", "--var", &format!("MARK={}", mark.display())]);
    let said = err(&output);
    assert_eq!(output.status.code(), Some(0), "{said}");
    assert!(said.contains("flaky: retry 1 of 2\n"), "{said}");
    assert!(!said.contains("hopeless: retry"), "{said}");
}

#[test]
fn artifacts_go_to_those_who_need_them_and_into_the_folder_and_caches_stay() {
    let folder = Folder::new(
        "stages: [build, test]\n\
         make:\n  stage: build\n  cache: {key: k, paths: [kept]}\n  script:\n\
         \x20   - mkdir -p kept out\n    - date +%s%N >> kept/runs\n    - wc -l < kept/runs > out/count\n\
         \x20   - echo VERSION=7 > v.env\n\
         \x20 artifacts: {paths: [out/], reports: {dotenv: v.env}}\n\
         other: {stage: build, script: 'echo no > no', artifacts: {paths: ['no']}}\n\
         use:\n  stage: test\n  dependencies: [make]\n\
         \x20 script: ['cat out/count', 'test ! -e no', 'echo version $VERSION']\n\
         all: {stage: test, script: ['cat out/count no']}\n\
         none: {stage: test, needs: [{job: make, artifacts: false}], script: ['test ! -e out']}\n",
    );
    for run in ["1", "2"] {
        let output = folder.run(&["exec", "--trace", "--artifacts", "../kept"]);
        let (out, err) = (out(&output), err(&output));
        assert_eq!(output.status.code(), Some(0), "{err}\n{out}");
        let count = std::fs::read_to_string(folder.path("kept/make/out/count")).unwrap();
        assert_eq!(count.trim(), run, "the cache came back: {out}");
        assert!(out.contains("\nversion 7\n"), "{out}");
        assert_eq!(std::fs::read_to_string(folder.path("kept/other/no")).unwrap(), "no\n");
        assert!(folder.path("kept/make/.reports/dotenv").is_dir());
    }
    assert_eq!(std::fs::read_dir(folder.path("home/.cache/bridge/exec")).unwrap().count(), 1);
}
