//! What is handed to a backend, and the names it goes by.

use std::fmt;
use std::time::Duration;

use camino::Utf8PathBuf;
use secrecy::SecretString;
use serde::{Deserialize, Serialize};

/// Our name for one submission: 1–32 of `a-z`, `0-9`, `-`.
///
/// 32 because that is what the narrowest system known (DIRAC's `JobGroup`) keeps whole.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SubmitToken(String);

/// A text that is no submit token.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a submit token (1 to 32 of a-z, 0-9 and '-'): {0:?}")]
pub struct InvalidToken(pub String);

impl SubmitToken {
    /// The longest a token can be, in bytes.
    pub const MAX_LEN: usize = 32;

    /// Parses a token.
    ///
    /// # Errors
    ///
    /// When it is empty, too long, or has other characters than `a-z`, `0-9`, `-`.
    pub fn parse(text: &str) -> Result<Self, InvalidToken> {
        let fits = !text.is_empty() && text.len() <= Self::MAX_LEN;
        let clean = text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
        if fits && clean && !text.starts_with('-') {
            Ok(Self(text.to_owned()))
        } else {
            Err(InvalidToken(text.to_owned()))
        }
    }

    /// Gives the token as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for SubmitToken {
    type Error = InvalidToken;
    fn try_from(text: String) -> Result<Self, InvalidToken> {
        Self::parse(&text)
    }
}

impl From<SubmitToken> for String {
    fn from(token: SubmitToken) -> Self {
        token.0
    }
}

impl fmt::Display for SubmitToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for SubmitToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SubmitToken({})", self.0)
    }
}

/// The other side's name for a job; opaque to everybody but the backend.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ExternalId(pub String);

impl fmt::Display for ExternalId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A job that was accepted: our name and theirs.
///
/// Both are always checked, since sites reuse ids.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct JobRef {
    /// Our name.
    pub token: SubmitToken,
    /// Their name.
    pub id: ExternalId,
}

/// One environment variable of a job.
#[derive(Clone, Debug)]
pub struct EnvVar {
    /// The name; a valid shell identifier.
    pub name: String,
    /// The value; any bytes of UTF-8 but NUL.
    pub value: SecretString,
}

/// A glob relative to the workspace, `/`-separated, `**` for any depth; a directory that it names comes
/// with all it holds. The workspace's `.git` comes only if the pattern begins with that name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern(pub String);

/// What the other side is asked to enforce.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Wall time of the whole job from its start; `None` leaves it to the site.
    pub wall_time: Option<Duration>,
}

/// Everything a backend needs to run one job.
#[derive(Clone, Debug)]
pub struct JobSpec {
    /// A text for people in the other side's listings; not unique, any characters.
    pub label: String,
    /// A POSIX shell script; its exit status is the job's. Holds no secrets.
    ///
    /// It is run with the directory of [`crate::result::JOB_DIR_VAR`] existing, private (0700) and
    /// empty but for the backend's own files, standard input empty, and both outputs in the log.
    pub script: String,
    /// The environment the script starts with, in order; later ones win. Never on a command line.
    pub env: Vec<EnvVar>,
    /// The script's working directory, prepared on the submit node. Its sibling of the same name with
    /// `.tmp` belongs to it, and travels where it travels; wherever one of the two paths stands in script
    /// or environment, the copy is meant.
    pub workspace: Utf8PathBuf,
    /// What a backend with [`crate::Filesystem::Sandbox`] must bring home.
    pub outputs: Vec<Pattern>,
    /// Limits to ask for.
    pub limits: Limits,
    /// The backend's own per-job words; unknown keys are rejected with [`crate::Fault::Job`].
    pub options: toml::Table,
}
