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
//! detail=git is not installed on n12
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
    /// What went wrong, in one line, where the script can say more than a step and a number.
    pub detail: Option<String>,
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
    /// The script was to fetch the sources, and a command of that failed; no user step began.
    GetSources,
    /// Fetching the sources took longer than it may.
    GetSourcesTimedOut,
    /// The sources could not be fetched for want of something on that machine.
    GetSourcesBroken,
}

impl Step {
    const ALL: [Self; 7] = [
        Self::Script,
        Self::ScriptTimedOut,
        Self::AfterScript,
        Self::Setup,
        Self::GetSources,
        Self::GetSourcesTimedOut,
        Self::GetSourcesBroken,
    ];
}

/// The longest detail that is kept, in characters: it is one line for people.
const DETAIL_MOST: usize = 300;

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
            Self::GetSources => "get_sources",
            Self::GetSourcesTimedOut => "get_sources_timed_out",
            Self::GetSourcesBroken => "get_sources_broken",
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
        let mut detail = None;
        for line in text.lines() {
            let Some((key, value)) = line.split_once('=') else { continue };
            match key {
                "exit_code" => {
                    exit_code = value.parse::<i32>().ok().filter(|c| (0..=255).contains(c));
                }
                "step" => {
                    step = Step::ALL.into_iter().find(|s| s.as_str() == value);
                }
                "log_len" => log_len = value.trim().parse().ok(),
                "signalled" => signalled = !value.is_empty(),
                "detail" => {
                    let text = value.chars().filter(|c| !c.is_control()).take(DETAIL_MOST);
                    detail = Some(text.collect()).filter(|text: &String| !text.is_empty());
                }
                _ => {}
            }
        }
        let exit_code = exit_code.ok_or_else(|| InvalidResult("exit_code is missing".into()))?;
        let step = step.ok_or_else(|| InvalidResult("step is missing".into()))?;
        Ok(Self { exit_code, step, log_len, signalled, detail })
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
            Step::GetSources => crate::Outcome::SourcesFailed {
                failure: crate::SourcesFailure::Exited { code: self.exit_code },
            },
            Step::GetSourcesTimedOut => {
                crate::Outcome::SourcesFailed { failure: crate::SourcesFailure::TimedOut }
            }
            Step::GetSourcesBroken => crate::Outcome::SourcesFailed {
                failure: crate::SourcesFailure::Broken {
                    detail: self.detail.clone().unwrap_or_else(|| {
                        "the machine of the job could not fetch them; its log says why".into()
                    }),
                },
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
    fn sources_that_were_not_fetched_are_told_from_a_failed_script() {
        use crate::SourcesFailure as F;
        for (text, failure) in [
            ("exit_code=128\nstep=get_sources\n", F::Exited { code: 128 }),
            ("exit_code=124\nstep=get_sources_timed_out\n", F::TimedOut),
            (
                "exit_code=1\nstep=get_sources_broken\ndetail=no \u{1b}[31mgit\n",
                F::Broken { detail: "no [31mgit".into() },
            ),
        ] {
            let outcome = JobResult::parse(text).unwrap().outcome();
            assert_eq!(outcome, Some(crate::Outcome::SourcesFailed { failure }));
        }
        let cancelled = "exit_code=143\nstep=get_sources\nsignalled=TERM\n";
        assert_eq!(JobResult::parse(cancelled).unwrap().outcome(), None);
        let long = format!("exit_code=1\nstep=get_sources_broken\ndetail={}\n", "é".repeat(400));
        let detail = JobResult::parse(&long).unwrap().detail.unwrap();
        assert_eq!(detail.chars().count(), DETAIL_MOST);
    }

    #[test]
    fn half_a_result_is_none() {
        assert!(JobResult::parse("exit_code=3\n").is_err());
        assert!(JobResult::parse("step=script\n").is_err());
        assert!(JobResult::parse("exit_code=300\nstep=script\n").is_err());
        assert!(JobResult::parse("<html>").is_err());
    }
}
