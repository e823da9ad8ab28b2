//! The names of things: jobs, runners, backends, submissions.

use std::fmt;
use std::str::FromStr;

use bridge_backend::SubmitToken;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use ulid::Ulid;

/// Our name for a job: a ULID, so that names sort by the time the job was received.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(into = "String")]
pub struct JobId(Ulid);

/// A text that is no job id of ours.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a job id: {0:?}")]
pub struct InvalidJobId(pub String);

impl JobId {
    /// Mints an id from the time and 80 random bits.
    pub fn mint(now: Timestamp, random: u128) -> Self {
        let millis = u64::try_from(now.as_millisecond()).unwrap_or(0);
        Self(Ulid::from_parts(millis, random))
    }

    /// Derives the submit token: `br-` and the id in lower case, 29 characters.
    ///
    /// One job is submitted at most once, so the token needs no counter.
    pub fn submit_token(self) -> SubmitToken {
        let text = format!("br-{}", self.0.to_string().to_ascii_lowercase());
        SubmitToken::parse(&text).expect("29 characters of a-z, 0-9 and '-'")
    }
}

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl FromStr for JobId {
    type Err = InvalidJobId;
    fn from_str(text: &str) -> Result<Self, InvalidJobId> {
        Ulid::from_string(text).map(Self).map_err(|_invalid| InvalidJobId(text.to_owned()))
    }
}

impl From<JobId> for String {
    fn from(id: JobId) -> Self {
        id.to_string()
    }
}

macro_rules! text_name {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub String);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl From<&str> for $name {
            fn from(text: &str) -> Self {
                Self(text.to_owned())
            }
        }
    };
}

text_name! {
    /// A runner's name in the configuration.
    RunnerName
}
text_name! {
    /// A backend's name in the configuration.
    BackendName
}

/// GitLab's number for a job; unique per GitLab instance.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, Default,
)]
#[serde(transparent)]
pub struct CiJobId(pub i64);

impl fmt::Display for CiJobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
