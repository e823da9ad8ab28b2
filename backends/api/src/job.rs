//! What is handed to a backend, and the names it goes by.

use std::fmt;
use std::time::Duration;

use camino::Utf8PathBuf;
use secrecy::{ExposeSecret as _, SecretString};
use serde::{Deserialize, Serialize};

use crate::error::{BackendError, ErrorKind, Fault};

/// Linux passes no longer text to a program, be it a word or a variable (32 pages of 4 KiB).
const LONGEST_VARIABLE: usize = 128 << 10;

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
    /// When nobody wants the job any more, however long it waited; `None` is never.
    ///
    /// Where nothing is shared with the machines that run jobs, nobody but the job itself can bring home
    /// what it wrote. So a backend with [`crate::Filesystem::Sandbox`] has it ended over there in time,
    /// which is [`crate::Outcome::TimedOut`], and does not let it begin when its time is over, which is
    /// [`crate::Outcome::Expired`]. On a shared file system whoever cancels the job finds its files, and
    /// the backend need not look at this.
    pub expiry: Option<Expiry>,
}

/// A time limit that counts waiting.
///
/// Both are lengths of time, so that nobody's clock needs to be right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expiry {
    /// From the call of [`crate::Backend::submit`] on.
    pub within: Duration,
    /// The end of it, in which the script does not run any more: its last words and what it wrote are
    /// brought home then.
    pub reserve: Duration,
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

impl JobSpec {
    /// Refuses what no shell could be given.
    ///
    /// # Errors
    ///
    /// `Rejected(Fault::Job)`; the source names the variable, and no value.
    pub fn check(&self) -> Result<(), BackendError> {
        let rejected = |context: &'static str, text: String| {
            Err(BackendError::new(ErrorKind::Rejected(Fault::Job), context).with_source(text))
        };
        let variables = "pass the job's variables";
        for variable in &self.env {
            let name = &variable.name;
            let head = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
            if !head || !name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
                return rejected(variables, format!("{name:?} is no name for a variable"));
            }
            let value = variable.value.expose_secret();
            if value.contains('\0') {
                return rejected(variables, format!("the value of {name} contains a zero byte"));
            }
            // NAME=value and the zero byte at its end.
            if name.len() + value.len() + 2 > LONGEST_VARIABLE {
                let text =
                    format!("{name} is longer than the {LONGEST_VARIABLE} bytes a program can get");
                return rejected(variables, text);
            }
        }
        if self.script.contains('\0') {
            return rejected("run the job's script", "it contains a zero byte".into());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> JobSpec {
        JobSpec {
            label: "a job".into(),
            script: "exit 0".into(),
            env: Vec::new(),
            workspace: "/w".into(),
            outputs: Vec::new(),
            limits: Limits::default(),
            options: toml::Table::new(),
        }
    }

    #[test]
    fn what_no_shell_could_be_given_is_the_authors_fault() {
        let var = |name: &str, value: String| EnvVar { name: name.into(), value: value.into() };
        for bad in [
            var("1A", "x".into()),
            var("A B", "x".into()),
            var("", "x".into()),
            var("A;id", "x".into()),
            var("A", "a\0b".into()),
            var("A", "x".repeat(LONGEST_VARIABLE - 2)),
        ] {
            let spec = JobSpec { env: vec![bad], ..spec() };
            let error = spec.check().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Rejected(Fault::Job));
        }
        let longest = var("A", "x".repeat(LONGEST_VARIABLE - 3));
        assert!(JobSpec { env: vec![longest], ..spec() }.check().is_ok());
        assert!(JobSpec { script: "exit\0".into(), ..spec() }.check().is_err());
    }
}
