//! The runner API's client: says what the server said, decides nothing.
//!
//! One [`Client`] per GitLab and set of certificates; clones share its connections. Every method is
//! one call, made once: whether, when and how often it is repeated is decided where it is known
//! what a repetition costs. What GitLab may answer is an enum beside the call; an [`Error`] is no
//! answer, or one that cannot be read, and never means that a job ended.
//!
//! `jobs/request` differs from all others: GitLab has given the job away before its answer is
//! written. So the call waits longer than any long poll, and from a 201 whatever arrived is handed
//! on, readable or not.
//!
//! [`health`] and [`identity`] are beside the client because nobody else needs them.

mod answer;
pub mod api;
mod artifacts;
mod error;
pub mod health;
pub mod identity;
mod info;
mod jobs;
mod runners;
mod skew;
mod stream;
mod tls;
mod trace;
mod transport;
mod unclear;
pub mod wire;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use camino::Utf8PathBuf;
use url::Url;

use crate::domain::clock::{Clock, SystemClock};
use crate::domain::id::CiJobId;

pub use artifacts::{
    ArtifactUpload, DownloadAnswer, DownloadArtifactReply, UploadAnswer, UploadArtifactReply,
};
pub use error::{Error, ErrorKind};
pub use info::{Info, InfoOptions, InvalidLabel, check_labels};
pub use jobs::{JobUpdate, ReceivedJob, RequestReply, Undecodable, UpdateReply, UpdateState};
pub use runners::{
    Credentials, RegisterReply, Registration, ResetReply, UnregisterReply, VerifyReply,
};
pub use stream::PartialFile;
pub use trace::PatchReply;
use transport::Transport;
pub use unclear::Unclear;
pub use wire::Secret;

/// Where a GitLab is and how to talk to it.
#[derive(Clone)]
pub struct ClientOptions {
    /// The instance's URL, with its relative root if it has one.
    pub url: Url,
    /// CA certificates to trust besides the system's, PEM.
    pub tls_ca_file: Option<Utf8PathBuf>,
    /// Our certificate, PEM.
    pub tls_cert_file: Option<Utf8PathBuf>,
    /// Our certificate's key, PEM.
    pub tls_key_file: Option<Utf8PathBuf>,
    /// Where `<host>.crt`, `<host>.auth.crt` and `<host>.auth.key` may lie; they count if the files
    /// above are not named.
    pub certs_dir: Option<Utf8PathBuf>,
    /// The `User-Agent` header.
    pub user_agent: String,
    /// How long anything may take.
    pub timeouts: Timeouts,
    /// Tells the time to which the server's dates are compared.
    pub clock: Arc<dyn Clock>,
}

impl ClientOptions {
    /// Gives the defaults for a URL.
    pub fn new(url: Url) -> Self {
        Self {
            url,
            tls_ca_file: None,
            tls_cert_file: None,
            tls_key_file: None,
            certs_dir: None,
            user_agent: format!(
                "bridge {} ({}/{})",
                env!("CARGO_PKG_VERSION"),
                info::platform(),
                info::architecture()
            ),
            timeouts: Timeouts::default(),
            clock: Arc::new(SystemClock),
        }
    }
}

impl fmt::Debug for ClientOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The URL may hold a password until `Client::new` refuses it.
        f.debug_struct("ClientOptions")
            .field("url", &format_args!("{}", error::Shown(&self.url)))
            .field("tls_ca_file", &self.tls_ca_file)
            .field("tls_cert_file", &self.tls_cert_file)
            .field("timeouts", &self.timeouts)
            .finish_non_exhaustive()
    }
}

/// How long anything may take.
#[derive(Clone, Copy, Debug)]
pub struct Timeouts {
    /// Until a connection stands, encryption included.
    pub connect: Duration,
    /// A whole call, unless it asks for a job. A patch is 1 MiB at most, and what is not answered
    /// within half a minute is better asked again than waited for.
    pub call: Duration,
    /// `jobs/request`: until the answer begins. Longer than any long poll, since to hang up on it
    /// may be to lose a job.
    pub request_head: Duration,
    /// `jobs/request` as a whole.
    pub request_total: Duration,
    /// Between two pieces of an answer.
    pub idle: Duration,
    /// After which connections are replaced by new ones.
    pub connection_age: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(30),
            call: Duration::from_secs(30),
            request_head: Duration::from_secs(10 * 60),
            request_total: Duration::from_secs(60 * 60),
            idle: Duration::from_secs(60),
            connection_age: Duration::from_secs(15 * 60),
        }
    }
}

/// Talks to one GitLab.
#[derive(Clone, Debug)]
pub struct Client(Arc<Transport>);

impl Client {
    /// Prepares to talk; reads the certificate files, calls nobody.
    ///
    /// A TLS provider must have been installed as the process's default before.
    pub fn new(options: ClientOptions) -> Result<Self, Error> {
        Ok(Self(Arc::new(Transport::new(options)?)))
    }

    /// Gives the CA certificates of the configured file as last read; jobs need them too.
    pub fn ca_pem(&self) -> Option<Arc<str>> {
        self.0.ca_pem()
    }

    fn timeouts(&self) -> &Timeouts {
        &self.0.options().timeouts
    }

    fn now(&self) -> jiff::Timestamp {
        self.0.options().clock.now()
    }
}

/// Names a job and proves that it is ours.
#[derive(Clone, Copy, Debug)]
pub struct JobAuth<'a> {
    /// GitLab's number for the job.
    pub id: CiJobId,
    /// The job token.
    pub token: &'a Secret,
}

/// What GitLab says of a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CiStatus {
    /// It has not been given to a runner.
    Pending,
    /// A runner has it.
    Running,
    /// A user asked for its end and the runner may still tidy up.
    Canceling,
    /// Ended by a user.
    Canceled,
    /// Ended badly.
    Failed,
    /// Ended well.
    Success,
    /// A word we do not know.
    Other(String),
}

impl CiStatus {
    /// Gives GitLab's word.
    pub fn as_str(&self) -> &str {
        match self {
            Self::Pending => "pending",
            Self::Running => "running",
            Self::Canceling => "canceling",
            Self::Canceled => "canceled",
            Self::Failed => "failed",
            Self::Success => "success",
            Self::Other(word) => word,
        }
    }

    /// Says whether the status ends a job that its runner believes to be running; gitlab-runner
    /// heeds these two and no others.
    fn ends_a_running_job(&self) -> bool {
        match self {
            Self::Canceled | Self::Failed => true,
            Self::Pending | Self::Running | Self::Canceling | Self::Success | Self::Other(_) => {
                false
            }
        }
    }
}

impl From<&str> for CiStatus {
    fn from(word: &str) -> Self {
        match word {
            "pending" => Self::Pending,
            "running" => Self::Running,
            "canceling" => Self::Canceling,
            "canceled" => Self::Canceled,
            "failed" => Self::Failed,
            "success" => Self::Success,
            other => Self::Other(other.chars().take(64).collect()),
        }
    }
}

impl fmt::Display for CiStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod artifacts_tests;
#[cfg(test)]
mod tests;
