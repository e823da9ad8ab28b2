//! Outcome → verdict → what GitLab is told: one table.

use bridge_backend::{Fault, Outcome, SourcesFailure};
use serde::{Deserialize, Serialize};

/// Why a job failed, in GitLab's words (`failure_reason`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureReason {
    /// A command of the author's failed.
    ScriptFailure,
    /// The infrastructure failed; what `retry: when: runner_system_failure` matches.
    RunnerSystemFailure,
    /// A time limit ended it.
    JobExecutionTimeout,
    /// The job asked for what cannot be; since GitLab 19.1.
    RunnerConfigurationError,
    /// A service that the job needs could not be reached; since GitLab 19.1.
    RunnerExternalDependencyFailure,
    /// It was ended from outside although nobody in GitLab asked; since GitLab 19.1.
    RunnerInterrupted,
}

impl FailureReason {
    /// Gives GitLab's word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::ScriptFailure => "script_failure",
            Self::RunnerSystemFailure => "runner_system_failure",
            Self::JobExecutionTimeout => "job_execution_timeout",
            Self::RunnerConfigurationError => "runner_configuration_error",
            Self::RunnerExternalDependencyFailure => "runner_external_dependency_failure",
            Self::RunnerInterrupted => "runner_interrupted",
        }
    }

    /// Maps the reason to one that the server listed in the payload's `features.failure_reasons`.
    ///
    /// Every server knows the first three (gitlab-runner, `common/failure_reason_mapper.go`). We
    /// differ in one row: an interrupted job falls back to `runner_system_failure`, not to
    /// `unknown_failure`, so that `retry:` can match it.
    #[must_use]
    pub fn for_server(self, listed: &[String]) -> Self {
        if listed.iter().any(|word| word == self.as_str()) {
            return self;
        }
        match self {
            Self::ScriptFailure | Self::RunnerConfigurationError => Self::ScriptFailure,
            Self::JobExecutionTimeout => Self::JobExecutionTimeout,
            Self::RunnerSystemFailure
            | Self::RunnerExternalDependencyFailure
            | Self::RunnerInterrupted => Self::RunnerSystemFailure,
        }
    }
}

/// What we tell GitLab in the end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// `None` is success.
    pub failure: Option<FailureReason>,
    /// The script's exit code, sent with its failures.
    pub exit_code: Option<i32>,
    /// One sentence for the trace's last line; `None` on success.
    pub explanation: Option<String>,
    /// GitLab asked for the end (`canceling`): any final state will be shown as canceled.
    #[serde(default)]
    pub cancelled: bool,
}

/// What ended a job before or beside its outcome.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cause {
    /// It ended over there.
    Ended(Outcome),
    /// Its deadline passed while it waited in the queue or ran.
    Deadline {
        /// How long GitLab gave it, seconds.
        timeout_secs: u64,
        /// Whether it ever started.
        started: bool,
    },
    /// The batch system ended it when the time limit was over that we gave it from GitLab's timeout.
    TimeLimit {
        /// How long GitLab gave it, seconds.
        timeout_secs: u64,
    },
    /// Too little time was left to start it.
    NoTimeLeft {
        /// What was left, seconds.
        left_secs: u64,
    },
    /// Nothing was heard of it for too long.
    Lost {
        /// What was last seen.
        last_seen: String,
    },
    /// The backend has no record of it.
    Gone,
    /// The backend refused it.
    Rejected {
        /// Who can help.
        fault: Fault,
        /// The backend's words.
        detail: String,
    },
    /// The submission's answer was lost, and this backend cannot look it up.
    Ambiguous {
        /// The token, for the operator.
        token: String,
    },
    /// The payload asks for something bridge does not do, or is wrong.
    Unrunnable {
        /// What and why.
        detail: String,
    },
    /// A step on the submit node ended with an exit code: get_sources and the like.
    StageFailed {
        /// The stage's name.
        stage: String,
        /// Its exit code.
        exit_code: i32,
    },
    /// A step on the submit node exceeded its time.
    StageTimedOut {
        /// The stage's name.
        stage: String,
    },
    /// A step on the submit node could not be done.
    StageBroken {
        /// The stage's name.
        stage: String,
        /// Why.
        detail: String,
    },
    /// Cancelled before it was submitted.
    CancelledEarly,
}

impl From<SourcesFailure> for Cause {
    fn from(failure: SourcesFailure) -> Self {
        let stage = "get_sources".to_owned();
        match failure {
            SourcesFailure::Exited { code } => Self::StageFailed { stage, exit_code: code },
            SourcesFailure::TimedOut => Self::StageTimedOut { stage },
            SourcesFailure::Broken { detail } => Self::StageBroken { stage, detail },
        }
    }
}

impl Verdict {
    fn failed(reason: FailureReason, exit_code: Option<i32>, explanation: String) -> Self {
        Self { failure: Some(reason), exit_code, explanation: Some(explanation), cancelled: false }
    }

    /// Decides what GitLab is told.
    ///
    /// `asked` says that GitLab or the operator asked for the cancellation; it outranks what the other
    /// side says of a job that we ourselves ended.
    pub fn of(cause: &Cause, asked: Option<CancelledBy>) -> Self {
        use FailureReason as R;
        if let Some(by) = asked {
            let ended_by_us = match cause {
                Cause::CancelledEarly | Cause::TimeLimit { .. } => true,
                Cause::Ended(outcome) => match outcome {
                    Outcome::Cancelled { .. }
                    | Outcome::TimedOut
                    | Outcome::Expired
                    | Outcome::Preempted
                    | Outcome::SystemFailed { .. } => true,
                    // A script that ended by itself keeps its result: the server turns it into
                    // canceled anyway, and an operator's late cancel must not paint green red.
                    Outcome::Exited { .. }
                    | Outcome::ScriptTimedOut
                    | Outcome::SourcesFailed { .. }
                    | Outcome::OutOfMemory
                    | Outcome::NodeFailed => false,
                },
                Cause::Gone | Cause::Lost { .. } => true,
                Cause::Deadline { .. }
                | Cause::NoTimeLeft { .. }
                | Cause::Rejected { .. }
                | Cause::Ambiguous { .. }
                | Cause::Unrunnable { .. }
                | Cause::StageFailed { .. }
                | Cause::StageTimedOut { .. }
                | Cause::StageBroken { .. } => false,
            };
            if ended_by_us {
                return match by {
                    CancelledBy::GitLab => Self {
                        cancelled: true,
                        ..Self::failed(R::RunnerSystemFailure, None, "canceled".into())
                    },
                    CancelledBy::Operator => Self::failed(
                        R::RunnerInterrupted,
                        None,
                        "cancelled by the operator of the runner".into(),
                    ),
                };
            }
        }
        match cause {
            Cause::Ended(outcome) => Self::of_outcome(outcome),
            Cause::Deadline { timeout_secs, started } => Self::failed(
                R::JobExecutionTimeout,
                None,
                if *started {
                    format!("execution took longer than {timeout_secs} seconds, waiting included")
                } else {
                    format!(
                        "the job's timeout of {timeout_secs} seconds passed while it waited in the \
                         batch queue"
                    )
                },
            ),
            Cause::TimeLimit { timeout_secs } => Self::failed(
                R::JobExecutionTimeout,
                None,
                format!(
                    "the batch system's time limit, which follows from the job's timeout of \
                     {timeout_secs} seconds, ended the job"
                ),
            ),
            Cause::NoTimeLeft { left_secs } => Self::failed(
                R::JobExecutionTimeout,
                None,
                format!(
                    "only {left_secs} seconds of the job's timeout were left; it was not submitted"
                ),
            ),
            Cause::Lost { last_seen } => Self::failed(
                R::RunnerSystemFailure,
                None,
                format!("the batch system gave no news of the job for too long; {last_seen}"),
            ),
            Cause::Gone => Self::failed(
                R::RunnerSystemFailure,
                None,
                "the batch system has no record of the job and it left no result".into(),
            ),
            Cause::Rejected { fault: Fault::Job, detail } => Self::failed(
                R::RunnerConfigurationError,
                None,
                format!("the batch system refused the job: {detail}"),
            ),
            Cause::Rejected { fault: Fault::Site, detail } => Self::failed(
                R::RunnerSystemFailure,
                None,
                format!("the batch system cannot take jobs: {detail}"),
            ),
            Cause::Ambiguous { token } => Self::failed(
                R::RunnerSystemFailure,
                None,
                format!("the answer to the submission {token} was lost; it is not repeated"),
            ),
            Cause::Unrunnable { detail } => {
                Self::failed(R::RunnerConfigurationError, None, detail.clone())
            }
            Cause::StageFailed { stage, exit_code } => Self::failed(
                R::ScriptFailure,
                Some(*exit_code),
                format!("{stage}: exit status {exit_code}"),
            ),
            Cause::StageTimedOut { stage } => Self::failed(
                R::JobExecutionTimeout,
                None,
                format!("{stage} took longer than it may"),
            ),
            Cause::StageBroken { stage, detail } => {
                Self::failed(R::RunnerSystemFailure, None, format!("{stage}: {detail}"))
            }
            Cause::CancelledEarly => {
                Self::failed(R::RunnerSystemFailure, None, "cancelled before it started".into())
            }
        }
    }

    fn of_outcome(outcome: &Outcome) -> Self {
        use FailureReason as R;
        match outcome {
            Outcome::Exited { code: 0 } => {
                Self { failure: None, exit_code: None, explanation: None, cancelled: false }
            }
            Outcome::Exited { code } => {
                Self::failed(R::ScriptFailure, Some(*code), format!("exit status {code}"))
            }
            Outcome::TimedOut => Self::failed(
                R::JobExecutionTimeout,
                None,
                "the batch system's time limit ended the job".into(),
            ),
            Outcome::Expired => Self::failed(
                R::JobExecutionTimeout,
                None,
                "the job's timeout passed while it waited in the batch queue".into(),
            ),
            Outcome::ScriptTimedOut => Self::failed(
                R::JobExecutionTimeout,
                None,
                "the script took longer than RUNNER_SCRIPT_TIMEOUT".into(),
            ),
            // The same verdict as for sources that the submit node fetches.
            Outcome::SourcesFailed { failure } => Self::of(&failure.clone().into(), None),
            Outcome::OutOfMemory => Self::failed(
                R::ScriptFailure,
                Some(137),
                "the job needed more memory than it asked for and was killed".into(),
            ),
            Outcome::Cancelled { by } => Self::failed(
                R::RunnerInterrupted,
                None,
                match by {
                    Some(by) => format!("cancelled in the batch system by {by}, not from GitLab"),
                    None => "cancelled in the batch system, not from GitLab".into(),
                },
            ),
            Outcome::Preempted => {
                Self::failed(R::RunnerInterrupted, None, "preempted by another job".into())
            }
            Outcome::NodeFailed => {
                Self::failed(R::RunnerSystemFailure, None, "its machine failed".into())
            }
            Outcome::SystemFailed { detail } => {
                Self::failed(R::RunnerSystemFailure, None, detail.clone())
            }
        }
    }

    /// Says whether GitLab is told `success`.
    pub fn is_success(&self) -> bool {
        self.failure.is_none()
    }

    /// Decides about a job that did its work and whose artifacts GitLab does not have.
    pub fn artifacts_refused(why: &str) -> Self {
        Self::failed(
            FailureReason::ScriptFailure,
            Some(1),
            format!("its artifacts could not be uploaded: {why}"),
        )
    }

    /// Decides about a job that did its work and whose artifacts never came home.
    pub fn outputs_lost(why: &str) -> Self {
        Self::failed(FailureReason::RunnerSystemFailure, None, why.to_owned())
    }

    /// Gives the trace's last line, without styles: as gitlab-runner words it.
    pub fn last_line(&self) -> String {
        match (self.failure, &self.explanation) {
            (None, _) => "Job succeeded".into(),
            (Some(FailureReason::RunnerSystemFailure), Some(why)) if !self.cancelled => {
                format!("ERROR: Job failed (system failure): {why}")
            }
            (Some(_), Some(why)) => format!("ERROR: Job failed: {why}"),
            (Some(reason), None) => format!("ERROR: Job failed: {}", reason.as_str()),
        }
    }
}

/// Who asked for a cancellation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CancelledBy {
    /// A user, in GitLab.
    GitLab,
    /// `bridge jobs cancel`.
    Operator,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cause_has_its_row() {
        let exited = |code| Cause::Ended(Outcome::Exited { code });
        let ended = Cause::Ended;
        let sources = |failure| Cause::Ended(Outcome::SourcesFailed { failure });
        let rows: Vec<(Cause, Option<&str>, Option<i32>)> = vec![
            (exited(0), None, None),
            (exited(3), Some("script_failure"), Some(3)),
            (ended(Outcome::TimedOut), Some("job_execution_timeout"), None),
            (ended(Outcome::Expired), Some("job_execution_timeout"), None),
            (ended(Outcome::ScriptTimedOut), Some("job_execution_timeout"), None),
            (sources(SourcesFailure::Exited { code: 128 }), Some("script_failure"), Some(128)),
            (sources(SourcesFailure::TimedOut), Some("job_execution_timeout"), None),
            (
                sources(SourcesFailure::Broken { detail: "x".into() }),
                Some("runner_system_failure"),
                None,
            ),
            (ended(Outcome::OutOfMemory), Some("script_failure"), Some(137)),
            (ended(Outcome::Cancelled { by: None }), Some("runner_interrupted"), None),
            (ended(Outcome::Preempted), Some("runner_interrupted"), None),
            (ended(Outcome::NodeFailed), Some("runner_system_failure"), None),
            (
                ended(Outcome::SystemFailed { detail: "x".into() }),
                Some("runner_system_failure"),
                None,
            ),
            (
                Cause::Deadline { timeout_secs: 1, started: false },
                Some("job_execution_timeout"),
                None,
            ),
            (Cause::TimeLimit { timeout_secs: 1 }, Some("job_execution_timeout"), None),
            (Cause::NoTimeLeft { left_secs: 1 }, Some("job_execution_timeout"), None),
            (Cause::Lost { last_seen: "x".into() }, Some("runner_system_failure"), None),
            (Cause::Gone, Some("runner_system_failure"), None),
            (
                Cause::Rejected { fault: Fault::Job, detail: "x".into() },
                Some("runner_configuration_error"),
                None,
            ),
            (
                Cause::Rejected { fault: Fault::Site, detail: "x".into() },
                Some("runner_system_failure"),
                None,
            ),
            (Cause::Ambiguous { token: "t".into() }, Some("runner_system_failure"), None),
            (Cause::Unrunnable { detail: "x".into() }, Some("runner_configuration_error"), None),
            (
                Cause::StageFailed { stage: "get_sources".into(), exit_code: 128 },
                Some("script_failure"),
                Some(128),
            ),
            (
                Cause::StageTimedOut { stage: "get_sources".into() },
                Some("job_execution_timeout"),
                None,
            ),
            (
                Cause::StageBroken { stage: "get_sources".into(), detail: "x".into() },
                Some("runner_system_failure"),
                None,
            ),
        ];
        for (cause, reason, code) in rows {
            let verdict = Verdict::of(&cause, None);
            assert_eq!(verdict.failure.map(FailureReason::as_str), reason, "{cause:?}");
            assert_eq!(verdict.exit_code, code, "{cause:?}");
        }
    }

    #[test]
    fn a_cancellation_we_asked_for_is_one() {
        let cause = Cause::Ended(Outcome::Cancelled { by: None });
        assert!(Verdict::of(&cause, Some(CancelledBy::GitLab)).cancelled);
        let by_operator = Verdict::of(&cause, Some(CancelledBy::Operator));
        assert_eq!(by_operator.failure, Some(FailureReason::RunnerInterrupted));
        let green =
            Verdict::of(&Cause::Ended(Outcome::Exited { code: 0 }), Some(CancelledBy::Operator));
        assert!(green.is_success());
    }

    #[test]
    fn reasons_are_mapped_to_what_the_server_lists() {
        let old = ["script_failure".to_owned()];
        let new = ["runner_configuration_error".to_owned(), "runner_interrupted".to_owned()];
        let map = |r: FailureReason, l: &[String]| r.for_server(l).as_str();
        use FailureReason as R;
        assert_eq!(map(R::RunnerConfigurationError, &old), "script_failure");
        assert_eq!(map(R::RunnerConfigurationError, &new), "runner_configuration_error");
        assert_eq!(map(R::RunnerInterrupted, &old), "runner_system_failure");
        assert_eq!(map(R::RunnerInterrupted, &new), "runner_interrupted");
        assert_eq!(map(R::RunnerExternalDependencyFailure, &old), "runner_system_failure");
        assert_eq!(map(R::JobExecutionTimeout, &[]), "job_execution_timeout");
    }
}
