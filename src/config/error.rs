//! What can be wrong with a configuration, and where.

use std::fmt;
use std::io;

use camino::Utf8PathBuf;

/// A configuration that cannot be used: where, and (as the source) what is wrong there.
#[derive(Debug)]
pub struct ConfigError {
    path: Utf8PathBuf,
    line: Option<usize>,
    problem: Problem,
}

/// What is wrong with a configuration.
#[derive(Debug, thiserror::Error)]
pub enum Problem {
    /// The file is not there.
    #[error("no such file")]
    NoFile,
    /// The file cannot be read.
    #[error("not readable")]
    Unreadable(#[source] io::Error),
    /// It is not TOML, or a value has the wrong type. toml's own error would show the whole line,
    /// which may hold a token; so it is only its message that comes along.
    #[error("{0}")]
    Syntax(String),
    /// A key that nobody knows.
    #[error("unknown key `{key}` {table}{advice}")]
    UnknownKey {
        /// The key as written.
        key: String,
        /// The table it stands in, for people.
        table: &'static str,
        /// What to write instead.
        advice: Advice,
    },
    /// There is nothing to do without runners.
    #[error("no [[runners]]")]
    NoRunners,
    /// Two runners share a name.
    #[error("a second runner called {name:?}; the first is on line {first}")]
    DuplicateRunner {
        /// The name.
        name: String,
        /// The line of the first one.
        first: usize,
    },
    /// A runner names a backend that is not there.
    #[error(
        "runner {runner:?} names the backend {backend:?}, which is not there ({})",
        Known(known)
    )]
    UnknownBackend {
        /// The runner.
        runner: String,
        /// What it names.
        backend: String,
        /// What is there.
        known: Vec<String>,
    },
    /// A backend has no kind.
    #[error("[backends.{name}] needs a `kind` (a text, as in kind = \"slurm\")")]
    NoKind {
        /// The backend.
        name: String,
    },
    /// A key whose value makes no sense.
    #[error("`{key}` {why}")]
    Value {
        /// The key.
        key: &'static str,
        /// Why not; never quotes what may be a secret.
        why: String,
    },
    /// A duration that is none.
    #[error("`{key}` is no duration: {text:?} (write \"1m 30s\", \"2 hours\", \"30 days\")")]
    Duration {
        /// The key.
        key: &'static str,
        /// What is there.
        text: String,
        /// What the parser says.
        #[source]
        source: Option<jiff::Error>,
    },
    /// A runner has no token.
    #[error("runner {runner:?} has no token; write `token_file`")]
    NoToken {
        /// The runner.
        runner: String,
    },
    /// A runner has two tokens.
    #[error("runner {runner:?} has both `token` and `token_file`")]
    TwoTokens {
        /// The runner.
        runner: String,
    },
    /// The token is in this file, which others can read.
    #[error(
        "`token` stands in a file that others can read (mode {mode:04o}); run chmod 600 {path}"
    )]
    InlineToken {
        /// This file.
        path: Utf8PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// Others can read the token.
    #[error("token file {path} can be read by others (mode {mode:04o}); run chmod 600 {path}")]
    TokenMode {
        /// The token file.
        path: Utf8PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// The token file cannot be read.
    #[error("token file {path} is not readable")]
    TokenFile {
        /// The token file.
        path: Utf8PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The token file holds no token.
    #[error("token file {path} holds no token, which is one word on one line")]
    NoTokenInside {
        /// The token file.
        path: Utf8PathBuf,
    },
}

/// What to write instead of an unknown key.
#[derive(Debug, PartialEq, Eq)]
pub enum Advice {
    /// A key that looks alike.
    Nearest(&'static str),
    /// It is known elsewhere.
    BelongsTo(&'static str),
    /// gitlab-runner knows it and we do not, for a reason.
    Foreign(&'static str),
    /// No idea.
    None,
}

impl ConfigError {
    pub(super) fn at(path: impl Into<Utf8PathBuf>, line: usize, problem: Problem) -> Self {
        Self { path: path.into(), line: Some(line), problem }
    }

    pub(super) fn whole(path: impl Into<Utf8PathBuf>, problem: Problem) -> Self {
        Self { path: path.into(), line: None, problem }
    }

    /// Says what is wrong.
    pub fn problem(&self) -> &Problem {
        &self.problem
    }

    /// Says what to do next, where the message does not already.
    pub fn hint(&self) -> Option<&'static str> {
        match self.problem {
            Problem::NoFile => Some(
                "name the file with --config or $BRIDGE_CONFIG, or make one with `bridge register`",
            ),
            Problem::NoRunners => Some("add one with `bridge register`"),
            Problem::UnknownBackend { .. } => {
                Some("add the backend as [backends.NAME], or name one that is there")
            }
            Problem::NoTokenInside { .. } | Problem::TokenFile { .. } | Problem::NoToken { .. } => {
                Some("`bridge register` writes token files with the right mode")
            }
            Problem::Unreadable(_)
            | Problem::Syntax(_)
            | Problem::UnknownKey { .. }
            | Problem::DuplicateRunner { .. }
            | Problem::NoKind { .. }
            | Problem::Value { .. }
            | Problem::Duration { .. }
            | Problem::TwoTokens { .. }
            | Problem::InlineToken { .. }
            | Problem::TokenMode { .. } => None,
        }
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            Some(line) => write!(f, "{}:{line}", self.path),
            None => write!(f, "{}", self.path),
        }
    }
}

impl std::error::Error for ConfigError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.problem)
    }
}

impl fmt::Display for Advice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nearest(key) => write!(f, "; did you mean `{key}`?"),
            Self::BelongsTo(table) => write!(f, "; it belongs {table}"),
            Self::Foreign(advice) => write!(f, " ({advice})"),
            Self::None => Ok(()),
        }
    }
}

/// Lists what is there, for people.
struct Known<'a>(&'a [String]);

impl fmt::Display for Known<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            f.write_str("there are no backends")
        } else {
            write!(f, "there are: {}", self.0.join(", "))
        }
    }
}
