//! Answers that decide nothing.

use std::fmt;
use std::time::Duration;

use jiff::Timestamp;

use super::answer::Answer;

/// Neither yes nor no to what was asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unclear {
    /// 408, 429, 5xx: later. What was asked for may have been done all the same.
    Busy {
        /// The status.
        status: u16,
        /// When the server wants to be asked again.
        retry_after: Option<Duration>,
    },
    /// Any other status.
    Unexpected {
        /// The status.
        status: u16,
        /// GitLab's words.
        message: String,
    },
}

impl Unclear {
    /// Takes from an answer that means nothing to the call what can be taken.
    pub(super) fn of(answer: &Answer, now: Timestamp) -> Self {
        let status = answer.status;
        if answer.is_busy() {
            Self::Busy { status, retry_after: answer.retry_after(now) }
        } else {
            Self::Unexpected { status, message: answer.message() }
        }
    }
}

impl fmt::Display for Unclear {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Busy { status, .. } => write!(f, "GitLab is busy ({status})"),
            Self::Unexpected { status, message } => {
                write!(f, "GitLab answered {status}: {message}")
            }
        }
    }
}
