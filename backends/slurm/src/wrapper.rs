//! Writes the two pieces of shell that go with a job: the batch script and the environment.
//!
//! The batch script is readable by administrators and stored by some sites, so it holds two paths and
//! nothing else of the job. The environment is a file of mode 0600 that the batch script reads.

use bridge_backend::EnvVar;
use bridge_backend::result::JOB_DIR_VAR;
use camino::Utf8Path;
use secrecy::ExposeSecret as _;

/// The exit status of a start that the run-once guard refused, for people who look at `squeue`.
const REFUSED: i32 = 221;

/// The exit status of a job whose wrapper could not do its work.
const BROKEN: i32 = 222;

/// Variables that a bash called `sh` keeps read-only; assigning to one must not end the shell.
const READ_ONLY: &[&str] = &["BASHOPTS", "BASH_VERSINFO", "EUID", "PPID", "SHELLOPTS", "UID"];

/// Quotes a text as one shell word.
pub(crate) fn quote(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// Writes the environment as shell; later entries win because they come later.
pub(crate) fn environment(env: &[EnvVar]) -> String {
    let mut text = String::new();
    for EnvVar { name, value } in env {
        if READ_ONLY.contains(&name.as_str()) {
            // `command` takes the deadly ending from a special built-in.
            text.push_str("command ");
        }
        text.push_str("export ");
        text.push_str(name);
        text.push('=');
        text.push_str(&quote(value.expose_secret()));
        if READ_ONLY.contains(&name.as_str()) {
            text.push_str(" 2>/dev/null || :");
        }
        text.push('\n');
    }
    text
}

/// Writes the batch script for a job directory and a workspace.
///
/// The script runs in the foreground: in the background of a shell without job control it would run
/// with SIGINT and SIGQUIT ignored, which no program started from it could undo. `scancel`, the time
/// limit and preemption send TERM to every process of the job, so there is nothing to pass on; the
/// wrapper only has to survive it, and its trap runs when the script has ended.
///
/// User variables of any name are exported inside the parentheses only, where after them nothing but
/// literals is used.
pub(crate) fn batch_script(job_dir: &Utf8Path, workspace: &Utf8Path) -> String {
    let (dir, workspace) = (quote(job_dir.as_str()), quote(workspace.as_str()));
    format!(
        r#"#!/bin/sh
# Runs one job once. What it runs is in the job directory.
D={dir}
sig=
trap 'sig=TERM' TERM
mask=$(umask)
umask 077
report() {{
  {{
    echo "exit_code=$1"
    echo "step=$2"
    [ -z "$sig" ] || echo "signalled=$sig"
  }} > "$D/.result.wrapper" && mv -f "$D/.result.wrapper" "$D/result"
}}
fail() {{
  echo "bridge: $1 (on ${{SLURMD_NODENAME:-this node}})"
  report {BROKEN} setup
  exit {BROKEN}
}}
if ! [ -r "$D/script" ]; then
  echo "bridge: the job directory is gone or not shared with ${{SLURMD_NODENAME:-this node}}"
  exit {BROKEN}
fi
if ! mkdir "$D/run" 2>/dev/null; then
  # Requeued, or the second of two submissions of one job.
  if [ -d "$D/run" ]; then echo "$SLURM_JOB_ID" >> "$D/refused"; exit {REFUSED}; fi
  fail "the job directory cannot be written"
fi
{{
  echo "job=$SLURM_JOB_ID"
  echo "restarts=${{SLURM_RESTART_COUNT:-0}}"
  echo "host=${{SLURMD_NODENAME:-}}"
  echo "at=$(date +%s)"
}} > "$D/.started" && mv -f "$D/.started" "$D/started" || fail "the job directory cannot be written"
[ -r "$D/env" ] || fail "the job's environment is gone"
cd {workspace} || fail "the workspace cannot be entered"
[ -z "$sig" ] || {{ report 143 script; exit 143; }}
(
  umask "$mask"
  unset LC_ALL D sig mask
  . {dir}/env || exit {BROKEN}
  {JOB_DIR_VAR}={dir}
  export {JOB_DIR_VAR}
  exec /bin/sh {dir}/script < /dev/null
)
rc=$?
# A script that writes its own result knows more. This is for one that was kept from it.
if ! [ -f "$D/result" ]; then
  # Its TERM may come a moment before ours.
  [ "$rc" != 143 ] || [ -n "$sig" ] || sleep 1
  report "$rc" script
fi
exit "$rc"
"#
    )
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    const NASTY: &[(&str, &str)] = &[
        ("PLAIN", "x"),
        ("EMPTY", ""),
        ("QUOTES", "it's \"so\" `id` 'q'"),
        ("DOLLARS", "$HOME ${PATH} $(id) $$ \\$x"),
        ("LINES", "a\nb\n\n"),
        ("BACKSLASHES", "\\ \\\\ \\n \\'"),
        ("TABS", "\t a\r\n"),
        ("HIGH", "ā Ĉ ü 日本 \u{81}\u{88}\u{9f}"),
        ("D", "not the directory"),
        ("IFS", ":"),
        ("rc", "77"),
        ("UID", "12"),
        ("PPID", "1"),
        ("BANG", "!! #x ~ * ? [a]"),
    ];

    fn variables() -> Vec<EnvVar> {
        NASTY
            .iter()
            .map(|(name, value)| EnvVar { name: (*name).into(), value: (*value).into() })
            .collect()
    }

    /// Runs the batch script with a given shell, without Slurm.
    fn run(shell: &[&str], script: &str) -> (tempfile::TempDir, i32, String) {
        let dir = tempfile::tempdir().unwrap();
        let job = Utf8Path::from_path(dir.path()).unwrap().join("it's $here");
        std::fs::create_dir(&job).unwrap();
        std::fs::write(job.join("env"), environment(&variables())).unwrap();
        std::fs::write(job.join("script"), script).unwrap();
        let batch = dir.path().join("batch");
        std::fs::write(&batch, batch_script(&job, &job)).unwrap();
        let out = Command::new(shell[0])
            .args(&shell[1..])
            .arg(&batch)
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .env("SLURM_JOB_ID", "7")
            .output()
            .unwrap();
        (dir, out.status.code().unwrap(), String::from_utf8_lossy(&out.stdout).into_owned())
    }

    #[test]
    fn every_byte_of_a_value_arrives_in_every_shell() {
        for shell in [["dash"].as_slice(), &["bash"], &["bash", "--posix"]] {
            let (dir, code, out) = run(shell, "env -0 > \"$BRIDGE_JOB_DIR/seen\"\n");
            assert_eq!((code, out.as_str()), (0, ""), "{shell:?}");
            let seen = std::fs::read(dir.path().join("it's $here/seen")).unwrap();
            let seen: Vec<&[u8]> = seen.split(|b| *b == 0).collect();
            for (name, value) in NASTY {
                // What a shell keeps to itself cannot be had there, and nobody dies of it.
                if ["IFS", "PPID"].contains(name)
                    || (READ_ONLY.contains(name) && shell[0] == "bash")
                {
                    continue;
                }
                let want = format!("{name}={value}");
                assert!(seen.contains(&want.as_bytes()), "{shell:?} {name}");
            }
            assert!(!seen.iter().any(|line| line.starts_with(b"LC_ALL=")));
        }
    }

    #[test]
    fn the_second_start_is_refused_and_leaves_a_note() {
        let dir = tempfile::tempdir().unwrap();
        let job = Utf8Path::from_path(dir.path()).unwrap();
        std::fs::write(job.join("env"), "").unwrap();
        std::fs::write(job.join("script"), "echo ran >> \"$BRIDGE_JOB_DIR/ran\"; exit 3\n")
            .unwrap();
        std::fs::write(job.join("batch"), batch_script(job, job)).unwrap();
        let once = |id: &str| {
            Command::new("sh").arg(job.join("batch")).env("SLURM_JOB_ID", id).status().unwrap()
        };
        assert_eq!(once("7").code(), Some(3));
        assert_eq!(once("8").code(), Some(REFUSED));
        let read = |name: &str| std::fs::read_to_string(job.join(name)).unwrap();
        assert_eq!(read("ran"), "ran\n");
        assert_eq!(read("refused"), "8\n");
        assert!(read("started").starts_with("job=7\nrestarts=0\n"));
        assert_eq!(read("result"), "exit_code=3\nstep=script\n");
    }

    #[test]
    fn a_workspace_that_is_gone_is_the_wrappers_failure() {
        let dir = tempfile::tempdir().unwrap();
        let job = Utf8Path::from_path(dir.path()).unwrap();
        std::fs::write(job.join("env"), "").unwrap();
        std::fs::write(job.join("script"), "exit 0\n").unwrap();
        std::fs::write(job.join("batch"), batch_script(job, &job.join("gone"))).unwrap();
        let status =
            Command::new("sh").arg(job.join("batch")).env("SLURM_JOB_ID", "7").status().unwrap();
        assert_eq!(status.code(), Some(BROKEN));
        let result = std::fs::read_to_string(job.join("result")).unwrap();
        assert_eq!(result, format!("exit_code={BROKEN}\nstep=setup\n"));
    }

    #[test]
    fn the_scripts_own_result_stays() {
        let (dir, code, _) = run(
            &["sh"],
            "printf 'exit_code=4\\nstep=after_script\\n' > \"$BRIDGE_JOB_DIR/result\"; exit 1\n",
        );
        assert_eq!(code, 1);
        let result = std::fs::read_to_string(dir.path().join("it's $here/result")).unwrap();
        assert_eq!(result, "exit_code=4\nstep=after_script\n");
    }
}
