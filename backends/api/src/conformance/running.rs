//! What a script finds when it runs, and how its end is read.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::trial::WAIT_FOR_GO;
use super::trial::{Checked, Done, Trial, ensure, get, processes_naming, put, story, variable};
use super::unique;
use crate::{ErrorKind, Fault, Outcome};

/// Names that a shell, or ours, could trip over.
const TRIPPING: [&str; 9] =
    ["n", "dir", "status", "_CF", "OPTARG", "JOB", "BRIDGE_X", "name", "value"];

pub(super) async fn check_accepts_a_healthy_system(trial: &mut Trial<'_>) -> Checked {
    for _ in 0..2 {
        trial.backend.check().await.map_err(story("check"))?;
    }
    let capabilities = trial.backend.capabilities();
    ensure!(capabilities.poll_batch.get() > 1, "polls one job at a time");
    Ok(Done::Checked)
}

pub(super) async fn the_exit_status_is_the_outcome(trial: &mut Trial<'_>) -> Checked {
    let cases = [
        ("exit 0\n", 0),
        ("exit 3\n", 3),
        ("exit 255\n", 255),
        ("false\n", 1),
        ("kill -KILL $$\nsleep 60\n", 137),
        ("kill -USR1 $$\nsleep 60\n", 138),
        // No newline at the end, no command at all.
        ("exit 4", 4),
        ("", 0),
    ];
    let mut jobs = Vec::new();
    for (script, code) in cases {
        let spec = trial.spec(script);
        jobs.push((trial.submit(&spec).await?, script, code));
    }
    for (job, script, code) in jobs {
        trial.expect(&job, code).await.map_err(|story| format!("{script:?}: {story}"))?;
    }
    Ok(Done::Checked)
}

pub(super) async fn the_environment_arrives_as_it_was_sent(trial: &mut Trial<'_>) -> Checked {
    let long = "long ".repeat(4000);
    let values = [
        "",
        "plain",
        "two\nlines\n",
        "\n",
        "\t tabs and blanks ",
        "'single' \"double\" `back` $HOME ${HOME} $(id) \\ \\n \\\\",
        "!history #hash *glob? [a] {b} ~ & | ; < > ( ) %s %%",
        "-n",
        "=equals=",
        "ünïcödé 漢字 🚀",
        "\u{1b}[31mred\u{1b}[0m \u{7f}\u{1}",
        "carriage\r\nreturn",
        long.as_str(),
    ];
    let mut script = Vec::new();
    let mut spec = trial.spec("");
    for (n, value) in values.iter().enumerate() {
        spec.env.push(variable(&format!("CF_{n}"), "an earlier value"));
        spec.env.push(variable(&format!("CF_{n}"), value));
        script.push(format!("printf %s \"$CF_{n}\" >value.{n}\n"));
    }
    for name in TRIPPING {
        spec.env.push(variable(name, "kept: a b"));
        script.push(format!("printf %s \"${name}\" >named.{name}\n"));
    }
    spec.env.push(variable("IFS", "a:"));
    // Exported, not only set: programs see it too.
    script.push("env >all\n".to_owned());
    spec.script.push_str(&script.concat());
    let job = trial.submit(&spec).await?;
    trial.expect(&job, 0).await?;
    for (n, value) in values.iter().enumerate() {
        let got = get(&spec.workspace, &format!("value.{n}"))?;
        let got = String::from_utf8_lossy(&got);
        ensure!(got == *value, "sent {value:?}, the script got {got:?}");
    }
    for name in TRIPPING {
        let got = get(&spec.workspace, &format!("named.{name}"))?;
        ensure!(got == b"kept: a b", "{name} is {:?}", String::from_utf8_lossy(&got));
    }
    let all = get(&spec.workspace, "all")?;
    let all = String::from_utf8_lossy(&all);
    ensure!(all.lines().any(|line| line == "CF_1=plain"), "variables are not exported");
    Ok(Done::Checked)
}

pub(super) async fn the_script_runs_in_its_workspace_with_empty_input(
    trial: &mut Trial<'_>,
) -> Checked {
    let spec = trial.spec("pwd -P >here\ncat >input\n");
    let job = trial.submit(&spec).await?;
    trial.expect(&job, 0).await?;
    let here = get(&spec.workspace, "here")?;
    let here = String::from_utf8_lossy(&here);
    let expected = spec.workspace.canonicalize_utf8().map_err(|error| error.to_string())?;
    ensure!(here.trim_end() == expected, "the script ran in {here:?}, not in {expected}");
    ensure!(get(&spec.workspace, "input")?.is_empty(), "standard input was not empty");
    Ok(Done::Checked)
}

pub(super) async fn the_job_directory_is_private(trial: &mut Trial<'_>) -> Checked {
    let spec = trial.spec(
        "cd \"$BRIDGE_JOB_DIR\" || exit 9\n\
         stat -c %a . >\"$OLDPWD/mode\"\n\
         : >mine && [ -e mine ]\n",
    );
    let job = trial.submit(&spec).await?;
    trial.expect(&job, 0).await?;
    let mode = get(&spec.workspace, "mode")?;
    ensure!(mode == b"700\n", "its mode is {:?}", String::from_utf8_lossy(&mode));
    Ok(Done::Checked)
}

pub(super) async fn the_result_file_outranks_the_other_sides_word(
    trial: &mut Trial<'_>,
) -> Checked {
    let cases = [
        ("exit_code=7\\nstep=script\\n", 0, Some(Outcome::Exited { code: 7 })),
        ("exit_code=0\\nstep=script\\n", 1, Some(Outcome::Exited { code: 0 })),
        ("exit_code=5\\nstep=after_script\\nlater=1\\n", 0, Some(Outcome::Exited { code: 5 })),
        ("exit_code=143\\nstep=script_timed_out\\n", 1, Some(Outcome::ScriptTimedOut)),
        // Nonsense, and a status of success: anything but success.
        ("exit_code=yes\\n", 0, None),
    ];
    let mut jobs = Vec::new();
    for (result, status, outcome) in cases {
        let spec = trial.spec(format!(
            "printf '{result}' >\"$BRIDGE_JOB_DIR/result.new\"\n\
             mv \"$BRIDGE_JOB_DIR/result.new\" \"$BRIDGE_JOB_DIR/result\"\n\
             exit {status}\n"
        ));
        jobs.push((trial.submit(&spec).await?, result, outcome));
    }
    for (job, result, expected) in jobs {
        let outcome = trial.wait_end(&job).await?;
        let good = match &expected {
            Some(expected) => outcome == *expected,
            None => outcome != (Outcome::Exited { code: 0 }),
        };
        ensure!(good, "with the result {result:?} the outcome is {outcome:?}");
    }
    Ok(Done::Checked)
}

pub(super) async fn secrets_are_in_no_argument_list(trial: &mut Trial<'_>) -> Checked {
    if !trial.harness.sees_processes() {
        return Ok(Done::Skipped("processes cannot be seen".to_owned()));
    }
    let secret = format!("secret-{:016x}", unique());
    let mut spec = trial.spec(format!("[ -n \"$CF_SECRET\" ] || exit 9\n{WAIT_FOR_GO}"));
    spec.env.push(variable("CF_SECRET", &secret));

    // Beside the submission, not after it: helpers may live for a moment only.
    let stop = Arc::new(AtomicBool::new(false));
    let watch = std::thread::spawn({
        let (stop, secret) = (Arc::clone(&stop), secret.clone());
        move || {
            let mut seen = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                seen.extend(processes_naming(&secret));
            }
            seen
        }
    });
    let ran = async {
        let job = trial.submit(&spec).await?;
        trial.wait_running(&job).await?;
        put(&spec.workspace, "go", "")?;
        trial.expect(&job, 0).await
    }
    .await;
    stop.store(true, Ordering::Relaxed);
    let seen = watch.join().map_err(|_panic| "the watch broke".to_owned())?;
    ran?;
    ensure!(seen.is_empty(), "seen in {seen:?}");
    Ok(Done::Checked)
}

pub(super) async fn an_unknown_option_is_the_authors_fault(trial: &mut Trial<'_>) -> Checked {
    let mut spec = trial.spec("exit 0\n");
    spec.options.insert("no_such_option".to_owned(), toml::Value::Integer(1));
    let token = Trial::token()?;
    match trial.backend.submit(&token, &spec).await {
        Ok(id) => {
            trial.note(token, id);
            Err("a job with an unknown option was accepted".to_owned())
        }
        Err(error) => {
            ensure!(error.kind() == ErrorKind::Rejected(Fault::Job), "{}", story("submit")(error));
            Ok(Done::Checked)
        }
    }
}
