//! The result file: the job's own word on how it ended.
//!
//! The job's script writes it aside and renames it into place as its last act, so a result file is
//! complete or absent. It lies in the job directory, whose path the backend puts into
//! [`JOB_DIR_VAR`] before it starts the script. One line per fact, `key=value`, unknown keys ignored.
//!
//! ```text
//! exit_code=3
//! step=script
//! log_len=1042
//! signalled=TERM
//! ```

use std::fmt;

/// The environment variable that names the job's private directory.
pub const JOB_DIR_VAR: &str = "BRIDGE_JOB_DIR";

/// The result file's name in the job directory.
pub const RESULT_FILE: &str = "result";

/// The file that a backend leaves in the job directory before it has the job cancelled, so that
/// `after_script` can tell a cancellation from a time limit.
pub const CANCELLED_FILE: &str = "cancelled";

/// What a job's script says of its own end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobResult {
    /// The status that counts for GitLab, 0–255; a signal counts as 128 + its number.
    pub exit_code: i32,
    /// Where it ended.
    pub step: Step,
    /// The length of the log when the script ended, bytes; `None` when it could not be told.
    pub log_len: Option<u64>,
    /// The script was told to end from outside (cancel, time limit, preemption); its exit code is
    /// then not the job's own verdict, and the other side's word decides.
    pub signalled: bool,
}

/// The step in which a job's script ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// All user steps ran; or the user's script failed.
    Script,
    /// The limit for the user's script (`RUNNER_SCRIPT_TIMEOUT`) ended it.
    ScriptTimedOut,
    /// `after_script` failed and counts (`AFTER_SCRIPT_IGNORE_ERRORS=false`).
    AfterScript,
    /// The wrapper itself could not do its work; the log says why.
    Setup,
}

/// A result file that makes no sense.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no result file: {0}")]
pub struct InvalidResult(pub String);

impl Step {
    /// Gives the word in the file.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Script => "script",
            Self::ScriptTimedOut => "script_timed_out",
            Self::AfterScript => "after_script",
            Self::Setup => "setup",
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl JobResult {
    /// Reads a result file's text.
    ///
    /// # Errors
    ///
    /// When `exit_code` or `step` is missing or not what it should be.
    pub fn parse(text: &str) -> Result<Self, InvalidResult> {
        let (mut exit_code, mut step, mut log_len, mut signalled) = (None, None, None, false);
        for line in text.lines() {
            let Some((key, value)) = line.split_once('=') else { continue };
            match key {
                "exit_code" => {
                    exit_code = value.parse::<i32>().ok().filter(|c| (0..=255).contains(c));
                }
                "step" => {
                    step = [Step::Script, Step::ScriptTimedOut, Step::AfterScript, Step::Setup]
                        .into_iter()
                        .find(|s| s.as_str() == value);
                }
                "log_len" => log_len = value.trim().parse().ok(),
                "signalled" => signalled = !value.is_empty(),
                _ => {}
            }
        }
        let exit_code = exit_code.ok_or_else(|| InvalidResult("exit_code is missing".into()))?;
        let step = step.ok_or_else(|| InvalidResult("step is missing".into()))?;
        Ok(Self { exit_code, step, log_len, signalled })
    }

    /// Turns the job's own word into an outcome, or `None` when it was ended from outside and the
    /// other side's word decides.
    pub fn outcome(&self) -> Option<crate::Outcome> {
        if self.signalled {
            return None;
        }
        Some(match self.step {
            Step::Script | Step::AfterScript => crate::Outcome::Exited { code: self.exit_code },
            Step::ScriptTimedOut => crate::Outcome::ScriptTimedOut,
            Step::Setup => crate::Outcome::SystemFailed {
                detail: format!("the job's wrapper failed with {}", self.exit_code),
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_result_is_read_and_unknown_keys_are_ignored() {
        let result = JobResult::parse("exit_code=3\nstep=script\nlog_len=12\nlater=1\n").unwrap();
        assert_eq!(result.outcome(), Some(crate::Outcome::Exited { code: 3 }));
        assert_eq!(result.log_len, Some(12));
    }

    #[test]
    fn a_signalled_result_leaves_the_verdict_to_the_other_side() {
        let result = JobResult::parse("exit_code=143\nstep=script\nsignalled=TERM\n").unwrap();
        assert_eq!(result.outcome(), None);
    }

    #[test]
    fn half_a_result_is_none() {
        assert!(JobResult::parse("exit_code=3\n").is_err());
        assert!(JobResult::parse("step=script\n").is_err());
        assert!(JobResult::parse("exit_code=300\nstep=script\n").is_err());
        assert!(JobResult::parse("<html>").is_err());
    }
}
