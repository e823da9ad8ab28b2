//! Why a backend could not do what it was asked, and whose move it is.

use std::borrow::Cow;
use std::fmt;
use std::time::Duration;

/// The result of a call to a backend.
pub type Result<T> = std::result::Result<T, BackendError>;

/// Why a call to a backend failed.
///
/// `Display` is this layer only, a fragment that fits after "cannot"; the cause is `source()`.
#[derive(Debug)]
pub struct BackendError {
    kind: ErrorKind,
    context: Cow<'static, str>,
    retry_after: Option<Duration>,
    remedy: Option<Remedy>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// What an error means for the job.
///
/// Exhaustive on purpose: a new kind is a new decision for the reconciler.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// Nothing changed over there; come again.
    Transient,
    /// It may have taken effect.
    Ambiguous,
    /// It will be refused again.
    Rejected(Fault),
    /// There is no record of this job.
    Lost,
}

/// Who can help.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The job's author.
    Job,
    /// The operator.
    Site,
}

/// What the operator must do before anything can go on; until then all jobs wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Remedy {
    /// Log in again: [`Driver::login`](crate::Driver::login) mends it.
    Login,
    /// What the error says.
    Other,
}

impl BackendError {
    /// Makes an error of this kind; `context` fits after "cannot".
    pub fn new(kind: ErrorKind, context: impl Into<Cow<'static, str>>) -> Self {
        Self { kind, context: context.into(), retry_after: None, remedy: None, source: None }
    }

    /// Adds the cause.
    #[must_use]
    pub fn with_source(
        mut self,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        self.source = Some(source.into());
        self
    }

    /// Adds the wait that the other side asked for.
    #[must_use]
    pub fn with_retry_after(mut self, wait: Duration) -> Self {
        self.retry_after = Some(wait);
        self
    }

    /// Adds that the operator must act before this goes by itself.
    #[must_use]
    pub fn with_remedy(mut self, remedy: Remedy) -> Self {
        self.remedy = Some(remedy);
        self
    }

    /// Says what the operator must do; `None` when it goes by itself, or is about one job.
    pub fn remedy(&self) -> Option<Remedy> {
        self.remedy
    }

    /// Says what it means for the job.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// Says how long the other side asked us to wait.
    pub fn retry_after(&self) -> Option<Duration> {
        self.retry_after
    }
}

impl fmt::Display for BackendError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.context)
    }
}

impl std::error::Error for BackendError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|source| {
            let source: &(dyn std::error::Error + 'static) = source.as_ref();
            source
        })
    }
}

/// Why a backend's configuration table could not be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// A key or value is wrong; the text names it.
    #[error("{0}")]
    Config(String),
    /// The table did not deserialise; toml's message names key and expectation.
    #[error("use the backend's settings")]
    Toml(#[from] toml::de::Error),
}
