//! The script that the batch system runs.
//!
//! It holds no secret: variables come through the environment ([`super::variables::CARRIER`]). An outer
//! part (`wrapper.sh`) runs each step in a shell of its own, stops it when told to or when its time is
//! up, runs `after_script`, and as its very last act leaves the result file.
//!
//! What a step's shell reads is what gitlab-runner's bash script does, statement by statement
//! (`shells/bash.go`): errexit, pipefail where the shell has it, no noclobber, TERM ends it with 1, the
//! whole body in one `eval` inside a subshell without input. So exit codes are equal by construction,
//! odd ones too. The shell reads it from standard input as there, so that `$0` and the shell's own
//! messages look the same.

use std::fmt::Write as _;
use std::time::Duration;

use bridge_backend::result::{CANCELLED_FILE, RESULT_FILE};
use camino::Utf8Path;

use super::outputs::TRAVELLING_ENV;
use super::settings::Settings;
use super::sources::Fetching;
use super::variables::{CARRIER, Variables};
use super::{RunnerContext, Shell};
use crate::gitlab::wire::JobPayload;

/// How long a step may take to end after TERM. Batch systems send KILL 30 s after TERM as a rule
/// (Slurm's `KillWait`), and `after_script` needs most of that.
const GRACE: Duration = Duration::from_secs(10);

/// The outer part; `@NAMES@` are filled in here.
const WRAPPER: &str = include_str!("wrapper.sh");

/// What a step's shell is set to; pipefail only where it is known.
const OPTIONS: &str = "trap 'exit 1' TERM\n\
    if [ -n \"${BASH_VERSION-}\" ]; then set -o pipefail; else\n\
    case \"$(set -o)\" in *pipefail*) set -o pipefail;; esac; fi\n\
    set -o errexit\n\
    set +o noclobber\n";

/// The name of `GITLAB_ENV`'s file in the temporary directory.
pub(super) const ENV_FILE: &str = "gitlab_runner_env";

/// What the script is made from.
pub(super) struct Source<'a> {
    pub(super) payload: &'a JobPayload,
    pub(super) runner: &'a RunnerContext,
    pub(super) settings: &'a Settings,
    /// Expanded, for the lines of `release`.
    pub(super) variables: &'a Variables,
    /// The names that the environment carries.
    pub(super) names: Vec<&'a str>,
    pub(super) project_dir: &'a Utf8Path,
    pub(super) temp_dir: &'a Utf8Path,
    /// The sources, where the job fetches them itself.
    pub(super) fetching: Option<&'a Fetching>,
}

impl Source<'_> {
    /// Writes the script.
    pub(super) fn render(&self) -> String {
        let mut script = WRAPPER
            .replace("@RESULT@", RESULT_FILE)
            .replace("@GRACE@", &GRACE.as_secs().to_string())
            .replace("@BASH@", if self.runner.shell == Shell::Bash { "1" } else { "" })
            .replace("@LOGIN@", if self.runner.login_shell { "-l" } else { "" })
            .replace("@SECTIONS@", if self.sections() { "1" } else { "" })
            .replace("@PROJECT@", &quoted(self.project_dir.as_str()))
            .replace("'@PROLOGUE@'", &quoted(&self.prologue()));
        if let Some(fetching) = self.fetching {
            get_sources(&mut script, fetching);
        }
        self.main_steps(&mut script);
        self.after_script(&mut script);
        if self.runner.backend.sandbox {
            let from = quoted(self.temp_dir.join(ENV_FILE).as_str());
            let to = quoted(self.project_dir.join(TRAVELLING_ENV).as_str());
            push(&mut script, format_args!("[ ! -s {from} ] || cp -f {from} {to}"));
        }
        script.push_str("_b_finish\n");
        script
    }

    fn sections(&self) -> bool {
        self.payload.features.trace_sections
    }

    /// Writes what every step begins with: variables, options, directory.
    fn prologue(&self) -> String {
        let mut text = take_over(&self.names);
        let env_file = self.temp_dir.join(ENV_FILE);
        push(&mut text, format_args!("export GITLAB_ENV={}", quoted(env_file.as_str())));
        text.push_str(OPTIONS);
        let temp_dir = quoted(self.temp_dir.as_str());
        push(&mut text, format_args!("[ -d {temp_dir} ] || mkdir -p {temp_dir}"));
        text.push_str(": >>\"$GITLAB_ENV\"\n");
        // Line by line and unparsed, as the official runner reads it.
        text.push_str("while read -r line; do export \"$line\"; done <\"$GITLAB_ENV\"\n");
        push(&mut text, format_args!("cd {}", quoted(self.project_dir.as_str())));
        if self.settings.debug_trace {
            text.push_str("set -o xtrace\n");
        }
        text.trim_end().to_owned()
    }

    fn main_steps(&self, script: &mut String) {
        if let Some(limit) = self.settings.script_timeout {
            push(script, format_args!("_b_arm {}", whole_seconds(limit)));
        }
        for step in self.payload.steps.iter().filter(|step| step.name != "after_script") {
            let expanded: Vec<String>;
            let lines = if step.name == "release" {
                expanded = step.script.iter().map(|l| self.variables.expand(l)).collect();
                &expanded
            } else {
                &step.script
            };
            let mut body = String::new();
            let echo = self.echo();
            echo.commands(&mut body, "pre_build_script", self.runner.pre_build_script.as_slice());
            echo.commands(&mut body, "script_step", lines);
            echo.commands(&mut body, "post_build_script", self.runner.post_build_script.as_slice());
            let name = section_name(&step.name);
            let title = format!("Executing \"{name}\" stage of the job script");
            script.push_str("if [ \"$_b_status\" -eq 0 ] && [ -z \"$_b_stopped\" ]; then\n");
            push(
                script,
                format_args!("_b_step {name} {} {}", quoted(&title), quoted(&guarded(&body))),
            );
            script.push_str("_b_status=$_b_code\nfi\n");
        }
        push(
            script,
            format_args!(
                "_b_disarm\n\
                 case $_b_stopped in\n\
                 signal)\n\
                 _b_status=143 _b_state=canceled\n\
                 if [ -e \"$_b_dir/{CANCELLED_FILE}\" ]; then\n\
                 _b_warn 'the script was stopped: the job was cancelled or its time was up'\n\
                 else\n\
                 _b_warn \"the batch system told the job to end ($_b_signalled): its time limit, or it had to make room\"\n\
                 fi ;;\n\
                 time)\n\
                 _b_status=124 _b_result=script_timed_out _b_state=timedout\n\
                 _b_warn 'the script took longer than RUNNER_SCRIPT_TIMEOUT allows ({limit} s) and was stopped' ;;\n\
                 *)\n\
                 _b_state=success\n\
                 [ \"$_b_status\" -eq 0 ] || _b_state=failed ;;\n\
                 esac",
                limit = self.settings.script_timeout.map_or(0, whole_seconds),
            ),
        );
    }

    fn after_script(&self, script: &mut String) {
        let Some(step) = self.payload.steps.iter().find(|step| step.name == "after_script") else {
            return;
        };
        if step.script.is_empty() {
            return;
        }
        let mut body = String::new();
        notice(&mut body, "Running after script...");
        self.echo().commands(&mut body, "after_script_step", &step.script);
        let limit = whole_seconds(self.settings.after_script_timeout);
        // A signal from before must not be taken for one that came now.
        push(
            script,
            format_args!(
                "export {CARRIER}CI_JOB_STATUS=\"$_b_state\"\n\
                 _b_stopped=\n\
                 _b_arm {limit}\n\
                 _b_step after_script 'Running after_script' {}\n\
                 _b_disarm\n\
                 _b_why=\"exit status $_b_code\"\n\
                 if [ \"$_b_stopped\" = time ]; then\n\
                 _b_code=124 _b_why='it took longer than RUNNER_AFTER_SCRIPT_TIMEOUT allows ({limit} s)'\n\
                 fi",
                quoted(&guarded(&body))
            ),
        );
        let verdict = if self.settings.after_script_ignore_errors {
            "if [ \"$_b_code\" -ne 0 ]; then\n\
             _b_warn \"after_script failed, but job will continue unaffected: $_b_why\"\n\
             fi\n"
        } else {
            "if [ \"$_b_code\" -ne 0 ]; then\n\
             _b_warn \"after_script failed: $_b_why\"\n\
             if [ \"$_b_state\" = success ]; then _b_status=$_b_code _b_result=after_script; fi\n\
             fi\n"
        };
        script.push_str(verdict);
    }

    fn echo(&self) -> Echo {
        Echo {
            sections: self.sections() && self.settings.flag("FF_SCRIPT_SECTIONS"),
            checks: self.settings.flag("FF_ENABLE_BASH_EXIT_CODE_CHECK"),
        }
    }
}

/// Writes the stage that fetches the sources. It is no step: it does not see the job's variables, and
/// when it fails neither steps nor `after_script` begin.
fn get_sources(script: &mut String, fetching: &Fetching) {
    let names: Vec<String> = fetching.names().collect();
    script.push_str("_b_kept=$_b_prologue _b_prologue=:\n");
    if let Some(limit) = fetching.limit {
        push(script, format_args!("_b_arm {}", whole_seconds(limit)));
    }
    push(
        script,
        format_args!(
            "_b_step get_sources 'Getting source from Git repository' {}\n\
             _b_disarm\n\
             _b_prologue=$_b_kept",
            quoted(&fetching.body)
        ),
    );
    if !names.is_empty() {
        push(script, format_args!("unset {}", names.join(" ")));
    }
    push(
        script,
        format_args!(
            "if [ -n \"$_b_stopped\" ] || [ \"$_b_code\" -ne 0 ]; then\n\
             _b_status=$_b_code _b_result=get_sources\n\
             case $_b_stopped in\n\
             signal)\n\
             _b_status=143\n\
             if [ -e \"$_b_dir/{CANCELLED_FILE}\" ]; then\n\
             _b_warn 'fetching the sources was stopped: the job was cancelled or its time was up'\n\
             else\n\
             _b_warn \"the batch system told the job to end ($_b_signalled): its time limit, or it had to make room\"\n\
             fi ;;\n\
             time) _b_status=124 _b_result=get_sources_timed_out ;;\n\
             *)\n\
             if [ -s {broken} ]; then\n\
             _b_result=get_sources_broken\n\
             read -r _b_detail <{broken}\n\
             fi ;;\n\
             esac\n\
             _b_finish\n\
             fi",
            broken = quoted(fetching.broken.as_str()),
        ),
    );
}

/// How commands are written into a body.
#[derive(Clone, Copy, Default)]
struct Echo {
    /// Commands of several lines are shown whole, in a section.
    sections: bool,
    /// The exit code is looked at after each command, besides errexit.
    checks: bool,
}

impl Echo {
    /// Writes commands, each with its echo before it.
    fn commands(self, body: &mut String, section: &str, commands: &[String]) {
        for (at, command) in commands.iter().enumerate() {
            let command = command.trim();
            match command.split_once('\n') {
                _ if command.is_empty() => body.push_str("echo\n"),
                None => notice(body, &format!("$ {command}")),
                Some(_) if self.sections => {
                    let name = format!("section_{section}_{at}");
                    push(
                        body,
                        format_args!(
                            "printf 'section_start:%s:{name}[hide_duration=true,collapsed=true]\\r\\033[0K\
                             \\033[32;1m%s\\033[0;m\\n' \"$(date +%s)\" {}\n\
                             printf 'section_end:%s:{name}\\r\\033[0K\\n' \"$(date +%s)\"",
                            quoted(&format!("$ {command}"))
                        ),
                    );
                }
                Some((first, _)) => {
                    notice(body, &format!("$ {first} # collapsed multi-line command"));
                }
            }
            body.push_str(command);
            body.push('\n');
            if self.checks {
                body.push_str(
                    "_runner_exit_code=$?; if [ $_runner_exit_code -ne 0 ]; then exit \
                     $_runner_exit_code; fi\n",
                );
            }
        }
    }
}

/// Writes the script of a hook, which runs on the submit node.
pub(super) fn hook(commands: &[String], names: &[&str]) -> String {
    let mut body = String::new();
    Echo::default().commands(&mut body, "hook", commands);
    format!("{}{OPTIONS}{}\n", take_over(names), guarded(&body))
}

/// Gives the carried variables their names.
fn take_over(names: &[&str]) -> String {
    if names.is_empty() {
        return String::new();
    }
    format!(
        "for _b_n in {}; do eval \"export $_b_n=\\\"\\${CARRIER}$_b_n\\\"\"; unset \
         \"{CARRIER}$_b_n\"; done\nunset _b_n\n",
        names.join(" ")
    )
}

/// Wraps a body so that it runs in a subshell, without input, and is read as a whole.
fn guarded(body: &str) -> String {
    format!("(trap 'exit 1' TERM; eval {}) </dev/null\nexit 0", quoted(body))
}

/// Writes a line in the style of the official runner's notices.
fn notice(body: &mut String, text: &str) {
    push(body, format_args!("printf '\\033[32;1m%s\\033[0;m\\n' {}", quoted(text)));
}

fn push(text: &mut String, line: std::fmt::Arguments<'_>) {
    writeln!(text, "{line}").expect("writing to a string does not fail");
}

/// Quotes a text for a POSIX shell: every byte stays as it is.
pub(super) fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', "'\\''"))
}

/// Makes a section's name of a step's name; section names have few characters.
fn section_name(step: &str) -> String {
    let clean: String = step
        .to_lowercase()
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-') { c } else { '_' })
        .collect();
    format!("step_{clean}")
}

fn whole_seconds(limit: Duration) -> u64 {
    limit.as_secs().saturating_add(u64::from(limit.subsec_nanos() > 0)).max(1)
}

#[cfg(test)]
#[path = "script_tests.rs"]
mod tests;
