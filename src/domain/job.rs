//! A job's states and what moves it from one to the next.
//!
//! [`JobState::after`] is the only function that makes a state from a state.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Where a job is, in our words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JobState {
    /// GitLab gave us the job; no submission was attempted.
    Received,
    /// A token exists; the backend may or may not know it.
    Submitting,
    /// The backend has it; not started.
    Submitted,
    /// Started over there.
    Running,
    /// How it ended is known; GitLab does not know yet.
    Reporting,
    /// GitLab confirmed the verdict.
    Finished,
    /// GitLab no longer listens.
    Abandoned,
}

/// What happened to a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// We are about to submit it under its token.
    Attempted,
    /// The backend took it.
    Accepted,
    /// It started.
    Started,
    /// Its verdict is known.
    Concluded,
    /// GitLab confirmed the verdict.
    Reported,
    /// GitLab stopped listening, and not because of our own verdict.
    Disowned,
}

/// An event that cannot happen to a job in this state: a bug, or a race somebody else won.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a {state} job cannot be {event}")]
pub struct IllegalTransition {
    /// The state the job was in.
    pub state: JobState,
    /// What was to happen.
    pub event: Event,
}

impl JobState {
    /// All states, in the order of a job's life.
    pub const ALL: [Self; 7] = [
        Self::Received,
        Self::Submitting,
        Self::Submitted,
        Self::Running,
        Self::Reporting,
        Self::Finished,
        Self::Abandoned,
    ];

    /// Gives the state after an event.
    ///
    /// # Errors
    ///
    /// Every pair that the table of the design does not list.
    pub fn after(self, event: Event) -> Result<Self, IllegalTransition> {
        match (self, event) {
            (Self::Received, Event::Attempted) => Ok(Self::Submitting),
            (Self::Submitting, Event::Accepted) => Ok(Self::Submitted),
            (Self::Submitted, Event::Started) => Ok(Self::Running),
            (
                Self::Received | Self::Submitting | Self::Submitted | Self::Running,
                Event::Concluded,
            ) => Ok(Self::Reporting),
            (Self::Reporting, Event::Reported) => Ok(Self::Finished),
            (
                Self::Received
                | Self::Submitting
                | Self::Submitted
                | Self::Running
                | Self::Reporting,
                Event::Disowned,
            ) => Ok(Self::Abandoned),
            (
                state @ (Self::Received
                | Self::Submitting
                | Self::Submitted
                | Self::Running
                | Self::Reporting
                | Self::Finished
                | Self::Abandoned),
                event @ (Event::Attempted
                | Event::Accepted
                | Event::Started
                | Event::Concluded
                | Event::Reported
                | Event::Disowned),
            ) => Err(IllegalTransition { state, event }),
        }
    }

    /// Says whether GitLab has heard the last of this job.
    pub fn is_over(self) -> bool {
        matches!(self, Self::Finished | Self::Abandoned)
    }

    /// Gives the word in the database and in `--json`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Received => "received",
            Self::Submitting => "submitting",
            Self::Submitted => "submitted",
            Self::Running => "running",
            Self::Reporting => "reporting",
            Self::Finished => "finished",
            Self::Abandoned => "abandoned",
        }
    }
}

impl Event {
    /// All events.
    pub const ALL: [Self; 6] = [
        Self::Attempted,
        Self::Accepted,
        Self::Started,
        Self::Concluded,
        Self::Reported,
        Self::Disowned,
    ];

    /// Gives the word in the audit log.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Attempted => "attempted",
            Self::Accepted => "accepted",
            Self::Started => "started",
            Self::Concluded => "concluded",
            Self::Reported => "reported",
            Self::Disowned => "disowned",
        }
    }
}

/// A text that names no job state.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "no job state: {0:?} (one of received, submitting, submitted, running, reporting, finished, \
     abandoned)"
)]
pub struct UnknownState(pub String);

impl FromStr for JobState {
    type Err = UnknownState;
    fn from_str(text: &str) -> Result<Self, UnknownState> {
        Self::ALL
            .into_iter()
            .find(|state| state.as_str() == text)
            .ok_or_else(|| UnknownState(text.to_owned()))
    }
}

impl fmt::Display for JobState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn exactly_the_documented_transitions_exist() {
        let legal: Vec<(JobState, Event, JobState)> = JobState::ALL
            .into_iter()
            .flat_map(|s| Event::ALL.into_iter().map(move |e| (s, e)))
            .filter_map(|(s, e)| s.after(e).ok().map(|t| (s, e, t)))
            .collect();
        let expected = [
            ("received", "attempted", "submitting"),
            ("received", "concluded", "reporting"),
            ("received", "disowned", "abandoned"),
            ("submitting", "accepted", "submitted"),
            ("submitting", "concluded", "reporting"),
            ("submitting", "disowned", "abandoned"),
            ("submitted", "started", "running"),
            ("submitted", "concluded", "reporting"),
            ("submitted", "disowned", "abandoned"),
            ("running", "concluded", "reporting"),
            ("running", "disowned", "abandoned"),
            ("reporting", "reported", "finished"),
            ("reporting", "disowned", "abandoned"),
        ];
        let got: Vec<_> =
            legal.iter().map(|(s, e, t)| (s.as_str(), e.as_str(), t.as_str())).collect();
        assert_eq!(got, expected);
    }

    #[test]
    fn words_are_read_back() {
        for state in JobState::ALL {
            assert_eq!(state.as_str().parse::<JobState>().unwrap(), state);
        }
        assert!("done".parse::<JobState>().is_err());
    }

    proptest! {
        #[test]
        fn a_job_that_is_over_stays_over(events in proptest::collection::vec(0usize..6, 0..40)) {
            let mut state = JobState::Received;
            for event in events {
                let before = state;
                if let Ok(next) = state.after(Event::ALL[event]) {
                    prop_assert!(!before.is_over());
                    prop_assert!(next > before, "states only move forward");
                    state = next;
                }
            }
        }
    }
}
