//! Caches in a bucket that speaks S3.
//!
//! Requests are signed in their URL, as gitlab-runner's are: what is sent to the server beside it is
//! what the signature names. An address is shown without its query, so a signature is never seen.
//! Redirects are not followed: they would carry the signature to wherever they point.
//!
//! An attempt is repeated twice, a second later, where the network or the server failed; a refusal is
//! not.

mod answer;
mod upload;

use std::fmt;
use std::fs::File;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use reqwest::header::{DATE, ETAG, HeaderMap, IF_NONE_MATCH, LAST_MODIFIED};
use reqwest::{RequestBuilder, Response, StatusCode};
use rusty_s3::actions::{GetObject, HeadObject, S3Action};
use rusty_s3::{Bucket, Credentials, UrlStyle};
use secrecy::{ExposeSecret as _, SecretString};
use tokio::io::AsyncWriteExt as _;
use url::{Host, Url};

use super::key::clean;
use super::{Key, Project, Voice};

/// Attempts of one request.
const ATTEMPTS: u32 = 3;
/// The pause between two.
const PAUSE: Duration = Duration::from_secs(1);
/// How long a connection may take to open.
const CONNECT: Duration = Duration::from_secs(10);
/// How long a download may stand still.
const STALL: Duration = Duration::from_secs(60);
/// The longest that a signature may hold.
const LONGEST_SIGNATURE: Duration = Duration::from_secs(7 * 24 * 3600);

/// The most that one request may carry.
const LARGEST_PUT: u64 = 5 << 30;
/// The size of a part; there may be ten thousand of them.
const PART: u64 = 512 << 20;

/// What we say about an archive beside it: its key, and what is in it.
const KEY_HEADER: &str = "x-amz-meta-cachekey";
const ENTRIES_HEADER: &str = "x-amz-meta-entries";

/// `[runners.cache.s3]` and what of `[runners.cache]` concerns it.
#[derive(Clone, Debug)]
pub struct S3Settings {
    /// `ServerAddress` and `Insecure`: the server.
    pub endpoint: Url,
    /// `BucketName`.
    pub bucket: String,
    /// `BucketLocation`: the region.
    pub region: String,
    /// `PathStyle`: whether the bucket is in the path, not in the host's name.
    pub path_style: bool,
    /// `AccessKey` or `AccessKeyFile`.
    pub access_key: SecretString,
    /// `SecretKey` or `SecretKeyFile`.
    pub secret_key: SecretString,
    /// `SessionToken`.
    pub session_token: Option<SecretString>,
    /// `Path`: what comes before every object's name.
    pub prefix: String,
    /// `Shared`: whether all runners see the same caches.
    pub shared: bool,
    /// `ServerSideEncryption` and `ServerSideEncryptionKeyID`.
    pub encryption: Option<Encryption>,
}

/// How the server encrypts what it keeps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Encryption {
    /// With its own keys.
    S3,
    /// With a key of the key service.
    Kms {
        /// Which key; the service's default without it.
        key: Option<String>,
        /// Twice.
        dual: bool,
    },
}

impl Encryption {
    /// Gives the headers that ask for it.
    fn headers(&self) -> Vec<(&'static str, String)> {
        const KIND: &str = "x-amz-server-side-encryption";
        match self {
            Self::S3 => vec![(KIND, "AES256".to_owned())],
            Self::Kms { key, dual } => {
                let kind = if *dual { "aws:kms:dsse" } else { "aws:kms" };
                let mut headers = vec![(KIND, kind.to_owned())];
                let id = "x-amz-server-side-encryption-aws-kms-key-id";
                headers.extend(key.iter().map(|key| (id, key.clone())));
                headers
            }
        }
    }
}

/// Why the bucket did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum S3Error {
    /// There is no such bucket by these settings.
    #[error("`ServerAddress` and `BucketName` give no address: {0}")]
    Address(String),
    /// No client could be made.
    #[error("no connection can be prepared")]
    Setup(#[source] reqwest::Error),
    /// No answer, or not the whole of it.
    #[error("{method} {url} failed")]
    Network {
        /// What was asked.
        method: &'static str,
        /// For what; without query.
        url: String,
        /// Why.
        #[source]
        source: reqwest::Error,
    },
    /// Nothing came for a minute.
    #[error("{method} {url}: nothing has come for {} s", .after.as_secs())]
    Stalled {
        /// What was asked.
        method: &'static str,
        /// For what; without query.
        url: String,
        /// How long.
        after: Duration,
    },
    /// The server said no.
    #[error("{method} {url}: {status}{code}")]
    Refused {
        /// What was asked.
        method: &'static str,
        /// For what; without query.
        url: String,
        /// The status.
        status: StatusCode,
        /// S3's own word for it, in brackets.
        code: String,
    },
    /// The server is, or the bucket is, elsewhere.
    #[error(
        "{method} {url}: {status}{code}; redirects are not followed, since they would carry the \
         signature along (check ServerAddress, BucketLocation and PathStyle)"
    )]
    Elsewhere {
        /// What was asked.
        method: &'static str,
        /// For what; without query.
        url: String,
        /// The status.
        status: StatusCode,
        /// S3's own word for it, in brackets.
        code: String,
    },
    /// The two clocks differ, so no signature is accepted.
    #[error(
        "{url}: refused, because the clocks differ: this machine's is {} s {} the server's; set the \
         clock right",
        .ahead.unsigned_abs(),
        if *.ahead < 0 { "behind" } else { "ahead of" }
    )]
    Clock {
        /// For what; without query.
        url: String,
        /// By how many seconds ours is ahead.
        ahead: i64,
    },
    /// The answer makes no sense.
    #[error("{url}: the answer holds no {what}")]
    Incomplete {
        /// For what; without query.
        url: String,
        /// What is missing.
        what: &'static str,
    },
    /// The archive could not be read, or what came not be written.
    #[error("cannot {action} the archive")]
    File {
        /// What was tried.
        action: &'static str,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
}

impl S3Error {
    /// Says whether the same may work a second later.
    fn may_pass(&self) -> bool {
        match self {
            Self::Network { source, .. } => !source.is_builder(),
            Self::Stalled { .. } => true,
            Self::Refused { status, .. } => status.is_server_error(),
            Self::Address(_)
            | Self::Setup(_)
            | Self::Elsewhere { .. }
            | Self::Clock { .. }
            | Self::Incomplete { .. }
            | Self::File { .. } => false,
        }
    }
}

/// What a GET brought.
pub(super) enum Fetched {
    /// The object, all of it.
    Object {
        etag: Option<String>,
        modified: Option<Timestamp>,
        key: Option<String>,
        entries: Option<String>,
    },
    /// We have this very content.
    NotModified,
    /// There is none.
    Missing,
}

/// A bucket.
pub(super) struct S3 {
    bucket: Bucket,
    credentials: Credentials,
    http: reqwest::Client,
    prefix: String,
    shared: bool,
    encryption: Option<Encryption>,
    pub(super) tuning: Tuning,
}

/// What tests make smaller.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tuning {
    pub(super) pause: Duration,
    pub(super) stall: Duration,
    pub(super) largest_put: u64,
    pub(super) part: u64,
}

impl Default for Tuning {
    fn default() -> Self {
        Self { pause: PAUSE, stall: STALL, largest_put: LARGEST_PUT, part: PART }
    }
}

impl fmt::Debug for S3 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("S3").field("bucket", &self.bucket).finish_non_exhaustive()
    }
}

/// One request and what to call it.
struct Call {
    method: &'static str,
    url: String,
    request: RequestBuilder,
}

impl S3 {
    pub(super) fn new(settings: &S3Settings) -> Result<Self, S3Error> {
        let style = if settings.path_style { UrlStyle::Path } else { UrlStyle::VirtualHost };
        let (name, region) = (settings.bucket.clone(), settings.region.clone());
        let bucket = Bucket::new(settings.endpoint.clone(), style, name, region)
            .map_err(|error| S3Error::Address(error.to_string()))?;
        let (key, secret) =
            (settings.access_key.expose_secret(), settings.secret_key.expose_secret());
        let credentials = match &settings.session_token {
            Some(token) => Credentials::new_with_token(key, secret, token.expose_secret()),
            None => Credentials::new(key, secret),
        };
        Ok(Self {
            http: client(&settings.endpoint)?,
            bucket,
            credentials,
            prefix: clean(&settings.prefix),
            shared: settings.shared,
            encryption: settings.encryption.clone(),
            tuning: Tuning::default(),
        })
    }

    /// Names a key's object.
    pub(super) fn object(&self, project: &Project, key: &Key) -> String {
        let namespace = if self.shared {
            String::new()
        } else {
            format!("runner/{}", project.runner.replace('/', "_"))
        };
        let (prefix, id) = (&self.prefix, project.id);
        // The key is clean, so nothing before it can be undone.
        format!("{}/{}", clean(&format!("{prefix}/{namespace}/project/{id}")), key.object())
    }

    /// Asks for an object, unless it is still the one called `known`, and writes it to a file.
    pub(super) async fn get(
        &self,
        object: &str,
        known: Option<&str>,
        into: File,
        now: Timestamp,
        limit: Duration,
        voice: &mut (dyn Voice + Send),
    ) -> Result<Fetched, S3Error> {
        let url = self.get_url(object, now, limit);
        let shown = without_query(&url);
        let mut request = self.http.get(url);
        if let Some(etag) = known {
            request = request.header(IF_NONE_MATCH, etag);
        }
        let call = Call { method: "GET", url: shown, request };
        let (method, url) = (call.method, call.url.clone());
        let mut response = match send(call).await? {
            response if response.status() == StatusCode::NOT_MODIFIED => {
                return Ok(Fetched::NotModified);
            }
            response if response.status() == StatusCode::NOT_FOUND => {
                let error = answer::refusal(method, url, response, now).await;
                // A bucket that is not there is more than an object that is not.
                let no_object = matches!(
                    &error,
                    S3Error::Refused { code, .. } if !code.contains("NoSuchBucket")
                );
                return if no_object { Ok(Fetched::Missing) } else { Err(error) };
            }
            response if response.status() == StatusCode::OK => response,
            response => return Err(answer::refusal(method, url, response, now).await),
        };
        let headers = response.headers();
        let fetched = Fetched::Object {
            etag: text(headers, ETAG.as_str()),
            modified: date(headers, LAST_MODIFIED.as_str()),
            key: text(headers, KEY_HEADER),
            entries: text(headers, ENTRIES_HEADER),
        };
        voice.notice(&match text(headers, ETAG.as_str()) {
            Some(etag) => format!("Downloading cache from {url} ETag={etag}"),
            None => format!("Downloading cache from {url}"),
        });
        let written = |source| S3Error::File { action: "write", source };
        let mut file = tokio::fs::File::from_std(into);
        loop {
            let next = tokio::time::timeout(self.tuning.stall, response.chunk()).await;
            let Ok(next) = next else {
                return Err(S3Error::Stalled { method, url, after: self.tuning.stall });
            };
            match next {
                Ok(Some(chunk)) => file.write_all(&chunk).await.map_err(written)?,
                Ok(None) => break,
                Err(source) => {
                    return Err(S3Error::Network { method, url, source: source.without_url() });
                }
            }
        }
        file.flush().await.map_err(written)?;
        Ok(fetched)
    }

    /// Says how old an object is, by the server's own clock; `None` where there is none.
    pub(super) async fn age(
        &self,
        object: &str,
        now: Timestamp,
        limit: Duration,
        voice: &mut (dyn Voice + Send),
    ) -> Result<Option<SignedDuration>, S3Error> {
        let mut attempt = 1;
        loop {
            match self.head(object, now, limit).await {
                Ok(headers) => {
                    let Some(headers) = headers else { return Ok(None) };
                    let modified = date(&headers, LAST_MODIFIED.as_str());
                    let there = date(&headers, DATE.as_str()).unwrap_or(now);
                    return Ok(modified.map(|modified| there.duration_since(modified)));
                }
                Err(error) => self.pause_or_give_up(error, &mut attempt, voice).await?,
            }
        }
    }

    /// Asks for what is said about an object.
    async fn head(
        &self,
        object: &str,
        now: Timestamp,
        limit: Duration,
    ) -> Result<Option<HeaderMap>, S3Error> {
        let action = HeadObject::new(&self.bucket, Some(&self.credentials), object);
        let url = self.signed(&action, now, limit);
        let (method, shown) = ("HEAD", without_query(&url));
        let call = Call { method, url: shown.clone(), request: self.http.head(url) };
        let response = send(call).await?;
        match response.status() {
            StatusCode::OK => Ok(Some(response.headers().clone())),
            StatusCode::NOT_FOUND => Ok(None),
            _ => Err(answer::refusal(method, shown, response, now).await),
        }
    }

    /// Waits before the next attempt, or gives the error back where there is to be none.
    pub(super) async fn pause_or_give_up(
        &self,
        error: S3Error,
        attempt: &mut u32,
        voice: &mut (dyn Voice + Send),
    ) -> Result<(), S3Error> {
        if *attempt >= ATTEMPTS || !error.may_pass() {
            return Err(error);
        }
        *attempt += 1;
        voice.warning(&format!("{}; attempt {attempt} of {ATTEMPTS}", super::chain(&error)));
        tokio::time::sleep(self.tuning.pause).await;
        Ok(())
    }

    /// Gives the address that an object can be had from.
    pub(super) fn get_url(&self, object: &str, now: Timestamp, limit: Duration) -> Url {
        let action = GetObject::new(&self.bucket, Some(&self.credentials), object);
        self.signed(&action, now, limit)
    }

    fn signed<'a>(&self, action: &impl S3Action<'a>, now: Timestamp, limit: Duration) -> Url {
        let holds = limit.clamp(Duration::from_secs(60), LONGEST_SIGNATURE);
        action.sign_with_time(holds, &now)
    }
}

/// Sends a request; an answer is an answer, whatever its status.
async fn send(call: Call) -> Result<Response, S3Error> {
    call.request.send().await.map_err(|source| S3Error::Network {
        method: call.method,
        url: call.url,
        source: source.without_url(),
    })
}

fn client(endpoint: &Url) -> Result<reqwest::Client, S3Error> {
    let mut builder = reqwest::Client::builder()
        .user_agent(concat!("bridge/", env!("CARGO_PKG_VERSION")))
        .http1_only()
        .redirect(reqwest::redirect::Policy::none())
        .retry(reqwest::retry::never())
        .connect_timeout(CONNECT)
        .tcp_keepalive(Duration::from_secs(30));
    if is_loopback(endpoint) {
        builder = builder.no_proxy();
    }
    if endpoint.scheme() == "http" {
        // Nothing to verify, so no certificates are needed.
        builder = builder.tls_certs_only([]);
    }
    builder.build().map_err(S3Error::Setup)
}

/// Says whether the host is this machine, which no proxy can reach for us.
fn is_loopback(url: &Url) -> bool {
    match url.host() {
        Some(Host::Domain(name)) => name == "localhost",
        Some(Host::Ipv4(address)) => address.is_loopback(),
        Some(Host::Ipv6(address)) => address.is_loopback(),
        None => false,
    }
}

/// Shows an address without its query, which holds the signature.
fn without_query(url: &Url) -> String {
    let mut url = url.clone();
    url.set_query(None);
    url.into()
}

fn text(headers: &HeaderMap, name: &str) -> Option<String> {
    let value = headers.get(name)?.to_str().ok()?;
    (!value.is_empty()).then(|| value.to_owned())
}

fn date(headers: &HeaderMap, name: &str) -> Option<Timestamp> {
    let text = text(headers, name)?;
    jiff::fmt::rfc2822::parse(&text).ok().map(|time| time.timestamp())
}
