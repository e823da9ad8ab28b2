//! What goes wrong between us and GitLab: no answer, or an answer that cannot be read.
//!
//! What GitLab *says* is never an error; the replies are enums beside their calls.

use std::fmt;
use std::time::Duration;

use camino::Utf8PathBuf;
use reqwest::Method;
use url::Url;

/// Whose move it is after an [`Error`]. No kind means that a job ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// Ours, later: nobody answered, or something between us and GitLab did.
    Transient,
    /// The same call would get the same answer: it came, but cannot be read.
    Refused,
    /// The operator's: URL, certificate files or tokens as configured cannot work.
    Configuration,
}

/// No answer from GitLab, or one that cannot be read.
///
/// Holds neither tokens, bodies nor the URL's query.
pub struct Error(Box<Details>);

#[derive(Debug)]
struct Details {
    call: Option<Call>,
    cause: Cause,
}

/// Names a call in messages.
#[derive(Clone)]
pub(super) struct Call {
    pub(super) method: Method,
    pub(super) url: Url,
    /// GitLab's id of the call if it named one, else ours.
    pub(super) request_id: String,
}

/// What happened.
#[derive(Debug, thiserror::Error)]
pub(super) enum Cause {
    #[error("the URL {0}")]
    BadUrl(&'static str),
    #[error("the file {path} cannot be read")]
    File {
        path: Utf8PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("the file {path} holds no certificate in PEM form")]
    NoCertificate { path: Utf8PathBuf },
    #[error("the file {path} cannot be used")]
    UnfitFile {
        path: Utf8PathBuf,
        #[source]
        source: reqwest::Error,
    },
    #[error("a client certificate needs both its file and its key's file")]
    HalfIdentity,
    #[error("the HTTP client cannot be set up")]
    Setup(#[source] reqwest::Error),
    #[error("the system gives no random bytes")]
    Random(#[source] getrandom::Error),
    #[error("the token holds characters that no header can carry")]
    UnfitToken,
    #[error("the request cannot be written as JSON")]
    Unwritable(#[source] serde_json::Error),
    #[error("there is nothing to append")]
    EmptyPatch,
    #[error("no connection")]
    NoConnection(#[source] reqwest::Error),
    #[error("the connection ended without a complete answer")]
    Broken(#[source] reqwest::Error),
    #[error("no answer within {} s", .0.as_secs_f32())]
    Silent(Duration),
    #[error("the answer {status} stopped for {} s", .idle.as_secs_f32())]
    Stalled { status: u16, idle: Duration },
    #[error("answered {status} with HTML, is there a proxy or login page in front?")]
    Html { status: u16 },
    #[error("the answer {status} is larger than {limit} bytes")]
    TooLarge { status: u16, limit: usize },
    #[error("the answer {status} ended after {got} of {whole} bytes")]
    Incomplete { status: u16, got: u64, whole: u64 },
    #[error("the file {path} cannot be written")]
    Unwritten {
        path: Utf8PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("the answer {status} {fault}")]
    Unreadable { status: u16, fault: String },
    #[error(
        "answered {status} with a redirect to {target}, which is not followed: a token goes to the \
         configured server only; if GitLab moved there, change the URL"
    )]
    RedirectedAway { status: u16, target: String },
    #[error("more than {0} redirects")]
    RedirectLoop(usize),
}

impl Error {
    pub(super) fn new(cause: Cause) -> Self {
        Self(Box::new(Details { call: None, cause }))
    }

    pub(super) fn of(call: Call, cause: Cause) -> Self {
        Self(Box::new(Details { call: Some(call), cause }))
    }

    /// Says whose move it is.
    pub fn kind(&self) -> ErrorKind {
        match &self.0.cause {
            Cause::NoConnection(_)
            | Cause::Broken(_)
            | Cause::Silent(_)
            | Cause::Stalled { .. }
            | Cause::Incomplete { .. }
            | Cause::Html { .. }
            | Cause::Random(_) => ErrorKind::Transient,
            Cause::TooLarge { .. }
            | Cause::Unreadable { .. }
            | Cause::Unwritable(_)
            | Cause::EmptyPatch => ErrorKind::Refused,
            Cause::BadUrl(_)
            | Cause::File { .. }
            | Cause::Unwritten { .. }
            | Cause::NoCertificate { .. }
            | Cause::UnfitFile { .. }
            | Cause::HalfIdentity
            | Cause::Setup(_)
            | Cause::UnfitToken
            | Cause::RedirectedAway { .. }
            | Cause::RedirectLoop(_) => ErrorKind::Configuration,
        }
    }

    /// Says whether the call may have reached GitLab, and so may have had its effect.
    pub fn may_have_arrived(&self) -> bool {
        self.0.call.is_some() && !matches!(self.0.cause, Cause::NoConnection(_) | Cause::Random(_))
    }

    /// Gives the id under which GitLab's own logs know the call, if there was one.
    pub fn request_id(&self) -> Option<&str> {
        self.0.call.as_ref().map(|call| call.request_id.as_str())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0.call {
            Some(call) => write!(f, "{call}: {}", self.0.cause),
            None => self.0.cause.fmt(f),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.cause.source()
    }
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} (request {})", self.method, Shown(&self.url), self.request_id)
    }
}

impl fmt::Debug for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Shows a URL without user, password, query and fragment.
pub(super) struct Shown<'a>(pub(super) &'a Url);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", self.0.scheme(), self.0.host_str().unwrap_or_default())?;
        if let Some(port) = self.0.port() {
            write!(f, ":{port}")?;
        }
        f.write_str(self.0.path())
    }
}

/// Says what is wrong with a JSON text and where, never what stands there: serde's own words quote
/// the value, which may be a secret.
pub(super) fn json_fault(error: &serde_json::Error) -> String {
    use serde_json::error::Category;
    let what = match error.classify() {
        Category::Io | Category::Eof => "ends too early",
        Category::Syntax => "is not JSON",
        Category::Data => "has a field of an unexpected type",
    };
    format!("{what} (line {}, column {})", error.line(), error.column())
}
