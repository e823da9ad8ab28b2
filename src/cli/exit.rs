//! How a command ends: documented exit codes, and errors that say what to do next.

use std::error::Error;
use std::fmt;
use std::io;
use std::process::ExitCode;

use bridge_backend::BackendError;

use crate::config::ConfigError;
use crate::gitlab;
use crate::registry::RegistryError;

/// The exit codes; scripts rely on them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Exit {
    /// 0: done. A reader that went away (`| head`) counts as done.
    Done,
    /// 1: something unexpected.
    Unexpected,
    /// 2: the command line makes no sense.
    Usage,
    /// 3: there is no such job, runner or backend.
    NotFound,
    /// 4: another bridge is running.
    Running,
    /// 5: GitLab refused or did not answer.
    Gitlab,
    /// 6: a backend refused or did not answer.
    Backend,
    /// 7: the configuration cannot be used.
    Configuration,
}

impl Exit {
    /// Gives the number.
    pub fn code(self) -> u8 {
        match self {
            Self::Done => 0,
            Self::Unexpected => 1,
            Self::Usage => 2,
            Self::NotFound => 3,
            Self::Running => 4,
            Self::Gitlab => 5,
            Self::Backend => 6,
            Self::Configuration => 7,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.code())
    }
}

/// An error of a command: what went wrong, the exit code, and what to do next.
#[derive(Debug)]
pub struct Failure {
    exit: Exit,
    message: String,
    hint: Option<String>,
    source: Option<Box<dyn Error + Send + Sync>>,
}

impl Failure {
    /// Makes a failure; `message` is a fragment like every error's.
    pub fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self { exit, message: message.into(), hint: None, source: None }
    }

    /// Adds what to do next, one line.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Adds the cause.
    #[must_use]
    pub fn source(mut self, source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl Error for Failure {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.source.as_deref().map(|source| -> &(dyn Error + 'static) { source })
    }
}

/// Finds the exit code and the hint for an error, from the first in its chain that knows.
pub fn classify(error: &anyhow::Error) -> (Exit, Option<String>) {
    for cause in error.chain() {
        if let Some(failure) = cause.downcast_ref::<Failure>() {
            return (failure.exit, failure.hint.clone());
        }
        if let Some(error) = cause.downcast_ref::<ConfigError>() {
            return (Exit::Configuration, error.hint().map(str::to_owned));
        }
        if cause.is::<RegistryError>() {
            return (Exit::Configuration, None);
        }
        if let Some(error) = cause.downcast_ref::<gitlab::Error>() {
            let hint = match error.kind() {
                gitlab::ErrorKind::Transient => {
                    "try again; if it stays, look at URL, proxy and firewall"
                }
                gitlab::ErrorKind::Refused => "look whether the URL is that of a GitLab",
                gitlab::ErrorKind::Configuration => "look at the URL, the TLS files and the token",
            };
            return (gitlab_exit(error), Some(hint.to_owned()));
        }
        if cause.is::<BackendError>() {
            return (Exit::Backend, None);
        }
        if let Some(error) = cause.downcast_ref::<io::Error>()
            && error.kind() == io::ErrorKind::BrokenPipe
        {
            return (Exit::Done, None);
        }
    }
    (Exit::Unexpected, None)
}

/// Gives the exit code for an error of GitLab's client.
pub fn gitlab_exit(error: &gitlab::Error) -> Exit {
    match error.kind() {
        gitlab::ErrorKind::Transient | gitlab::ErrorKind::Refused => Exit::Gitlab,
        gitlab::ErrorKind::Configuration => Exit::Configuration,
    }
}

#[cfg(test)]
mod tests {
    use anyhow::Context as _;

    use super::*;

    #[test]
    fn the_codes_are_the_documented_ones() {
        let all = [
            Exit::Done,
            Exit::Unexpected,
            Exit::Usage,
            Exit::NotFound,
            Exit::Running,
            Exit::Gitlab,
            Exit::Backend,
            Exit::Configuration,
        ];
        assert_eq!(all.map(Exit::code), [0, 1, 2, 3, 4, 5, 6, 7]);
    }

    #[test]
    fn the_cause_that_knows_decides_whatever_stands_before_it() {
        let failure = Failure::new(Exit::NotFound, "find the job").hint("try `jobs list`");
        let error = anyhow::Error::new(failure).context("cancel");
        assert_eq!(classify(&error), (Exit::NotFound, Some("try `jobs list`".into())));
        let backend = BackendError::new(bridge_backend::ErrorKind::Transient, "ask squeue");
        assert_eq!(classify(&anyhow::Error::new(backend).context("x")).0, Exit::Backend);
        assert_eq!(classify(&anyhow::anyhow!("x")), (Exit::Unexpected, None));
    }

    #[test]
    fn a_reader_that_went_away_is_no_error() {
        let pipe: Result<(), _> = Err(io::Error::from(io::ErrorKind::BrokenPipe));
        let error = pipe.context("write the table").unwrap_err();
        assert_eq!(classify(&error), (Exit::Done, None));
    }
}
