//! One HTTP call: one attempt, bounded in time and size, and the server's time that came with it.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use bridge_backend::Remedy;
use bytes::{Bytes, BytesMut};
use jiff::{SignedDuration, Timestamp};
use reqwest::header::{CONTENT_RANGE, CONTENT_TYPE, DATE, ETAG, RETRY_AFTER};
use reqwest::{Method, RequestBuilder};
use secrecy::{ExposeSecret as _, SecretString};
use serde::de::DeserializeOwned;
use url::Url;

use crate::config::Config;
use crate::trust::{self, Authorities};

/// Enough for an answer about ten thousand jobs with their histories.
const LARGEST_ANSWER: usize = 64 << 20;

/// What of a server's words is shown to people.
const LONGEST_WORDS: usize = 300;

/// Asks DiracX and the store of sandboxes.
#[derive(Debug)]
pub(crate) struct Client {
    http: reqwest::Client,
    /// Opens a connection for each request.
    anew: reqwest::Client,
    base: Url,
    timeout: Duration,
    authorities: Option<Authorities>,
    /// The server's time, and when it said it.
    clock: Mutex<Option<(Timestamp, Instant)>>,
}

/// An answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) body: Bytes,
    pub(crate) retry_after: Option<Duration>,
    /// How many there are in all, of a list that came in part.
    pub(crate) total: Option<u64>,
    /// The name of this version of what was asked for.
    pub(crate) etag: Option<String>,
    what: &'static str,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CallError {
    /// It was never heard.
    #[error("reach {host}")]
    Unsent {
        host: String,
        #[source]
        source: reqwest::Error,
    },
    /// It was not sent, because whoever answers does not prove who he is.
    #[error("trust {host}: {why}")]
    Untrusted {
        host: String,
        why: String,
        #[source]
        source: reqwest::Error,
    },
    /// It may have been heard.
    #[error("get an answer from {host}")]
    Unanswered {
        host: String,
        #[source]
        source: reqwest::Error,
    },
    /// More came than anybody needs.
    #[error("take an answer of more than {LARGEST_ANSWER} bytes from {host}")]
    TooLong { host: String },
}

impl CallError {
    /// Says what the operator must do; `None` when it goes by itself.
    pub(crate) fn remedy(&self) -> Option<Remedy> {
        match self {
            Self::Untrusted { .. } => Some(Remedy::Other),
            Self::Unsent { .. } | Self::Unanswered { .. } | Self::TooLong { .. } => None,
        }
    }
}

/// What the other side said, for people.
#[derive(Debug, thiserror::Error)]
#[error("{what} was answered with {status}: {words}")]
pub(crate) struct Said {
    what: &'static str,
    status: u16,
    words: String,
}

/// An answer that is not what was asked for.
#[derive(Debug, thiserror::Error)]
#[error("{what} was answered with something else: {words}")]
pub(crate) struct Nonsense {
    what: &'static str,
    words: String,
    #[source]
    source: serde_json::Error,
}

#[cfg(test)]
impl Said {
    pub(crate) fn for_tests(what: &'static str, status: u16, words: &str) -> Self {
        Self { what, status, words: words.to_owned() }
    }
}

impl Client {
    pub(crate) fn new(config: &Config) -> Result<Self, reqwest::Error> {
        let http = builder(config)
            // The server closes idle connections after a while.
            .pool_idle_timeout(Duration::from_secs(3))
            .build()?;
        let anew = builder(config).pool_max_idle_per_host(0).build()?;
        Ok(Self {
            http,
            anew,
            base: config.url.clone(),
            timeout: config.request_timeout,
            authorities: config.authorities.clone(),
            clock: Mutex::new(None),
        })
    }

    /// Gives the time over there, once it was heard. Ours may be off; tokens are valid by theirs.
    pub(crate) fn server_time(&self) -> Option<Timestamp> {
        let clock = *self.clock.lock().unwrap_or_else(PoisonError::into_inner);
        let (time, heard) = clock?;
        time.checked_add(SignedDuration::try_from(heard.elapsed()).ok()?).ok()
    }

    /// Begins a call to DiracX; `path` is relative to the configured address.
    pub(crate) fn ask(&self, method: Method, path: &str) -> RequestBuilder {
        let url = self.base.join(path).unwrap_or_else(|_never| self.base.clone());
        self.http.request(method, url)
    }

    /// Begins a call on a connection of its own: a kept one may be closed by the server in the moment in
    /// which it is used, and nobody knows then whether the call was heard.
    pub(crate) fn ask_anew(&self, method: Method, path: &str) -> RequestBuilder {
        let url = self.base.join(path).unwrap_or_else(|_never| self.base.clone());
        self.anew.request(method, url)
    }

    /// Begins a call to an address that DiracX gave, which says by itself who may.
    pub(crate) fn elsewhere(&self, method: Method, url: Url) -> RequestBuilder {
        self.http.request(method, url)
    }

    /// Says what came of a call that was not answered.
    pub(crate) fn failed(&self, source: reqwest::Error) -> CallError {
        let host = source.url().and_then(Url::host_str).or_else(|| self.base.host_str());
        let host = host.unwrap_or_default().to_owned();
        // Without its address: a signed one is as good as a password.
        let source = source.without_url();
        if let Some(why) = trust::distrust(&source, self.authorities.as_ref()) {
            CallError::Untrusted { host, why, source }
        } else if source.is_connect() || source.is_builder() {
            CallError::Unsent { host, source }
        } else {
            CallError::Unanswered { host, source }
        }
    }

    /// Makes a call with a token.
    pub(crate) async fn send_as(
        &self,
        what: &'static str,
        request: RequestBuilder,
        token: &SecretString,
    ) -> Result<Answer, CallError> {
        self.send(what, request.bearer_auth(token.expose_secret()), self.timeout).await
    }

    /// Makes a call.
    pub(crate) async fn send(
        &self,
        what: &'static str,
        request: RequestBuilder,
        timeout: Duration,
    ) -> Result<Answer, CallError> {
        let failed = |source| self.failed(source);
        let mut response = request.timeout(timeout).send().await.map_err(failed)?;
        let header = |name| response.headers().get(name).and_then(|value| value.to_str().ok());
        let etag = header(ETAG).map(str::to_owned);
        let retry_after = header(RETRY_AFTER).and_then(|text| text.trim().parse().ok());
        let total = header(CONTENT_RANGE)
            .and_then(|text| text.rsplit_once('/'))
            .and_then(|(_, total)| total.trim().parse().ok());
        // The store's clock is another one.
        if response.url().origin() == self.base.origin()
            && let Some(date) = header(DATE)
            && let Ok(time) = jiff::fmt::rfc2822::parse(date)
        {
            let mut clock = self.clock.lock().unwrap_or_else(PoisonError::into_inner);
            *clock = Some((time.timestamp(), Instant::now()));
        }
        let status = response.status().as_u16();
        let mut body = BytesMut::new();
        while let Some(piece) = response.chunk().await.map_err(failed)? {
            if body.len() + piece.len() > LARGEST_ANSWER {
                let host = self.base.host_str().unwrap_or_default().to_owned();
                return Err(CallError::TooLong { host });
            }
            body.extend_from_slice(&piece);
        }
        let retry_after = retry_after.map(Duration::from_secs);
        Ok(Answer { status, body: body.freeze(), retry_after, total, etag, what })
    }
}

/// The form of all of DiracX's refusals.
#[derive(serde::Deserialize)]
struct Refusal {
    detail: serde_json::Value,
}

impl Answer {
    /// Says whether it was granted.
    pub(crate) fn ok(&self) -> bool {
        (200..300).contains(&self.status)
    }

    /// Reads it as JSON.
    pub(crate) fn json<T: DeserializeOwned>(&self) -> Result<T, Nonsense> {
        serde_json::from_slice(&self.body).map_err(|source| Nonsense {
            what: self.what,
            words: words(&self.body),
            source,
        })
    }

    /// Says whether these are DiracX's own words, and not those of who stands between.
    pub(crate) fn is_diracs(&self) -> bool {
        serde_json::from_slice::<Refusal>(&self.body).is_ok()
    }

    /// Gives the other side's words, for people.
    pub(crate) fn said(&self) -> Said {
        let words = match serde_json::from_slice::<Refusal>(&self.body) {
            Ok(Refusal { detail: serde_json::Value::String(text) }) => shortened(&text),
            Ok(Refusal { detail }) => shortened(&detail.to_string()),
            Err(_other) => words(&self.body),
        };
        Said { what: self.what, status: self.status, words }
    }
}

/// Begins a client; one request is one attempt.
fn builder(config: &Config) -> reqwest::ClientBuilder {
    let mut builder = reqwest::Client::builder()
        .user_agent(concat!("bridge/", env!("CARGO_PKG_VERSION")))
        .redirect(reqwest::redirect::Policy::none())
        .retry(reqwest::retry::never())
        .http1_only()
        .connect_timeout(Duration::from_secs(10))
        .tcp_nodelay(true);
    if let Some(ours) = &config.authorities {
        builder = builder.tls_certs_merge(ours.certificates());
    } else if config.url.scheme() == "http" {
        // Nothing to verify there; a machine without any certificates must do.
        builder = builder.tls_certs_only([]);
    }
    if matches!(config.url.host_str(), Some("localhost" | "127.0.0.1" | "[::1]")) {
        builder = builder.no_proxy();
    }
    builder
}

/// Adds a body of JSON.
pub(crate) fn with_json(request: RequestBuilder, body: &serde_json::Value) -> RequestBuilder {
    request.header(CONTENT_TYPE, "application/json").body(body.to_string())
}

fn words(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(body);
    if text.trim().is_empty() { "nothing".to_owned() } else { shortened(&text) }
}

/// Makes one short line of a text.
fn shortened(text: &str) -> String {
    let clean = |c: char| if c.is_control() { ' ' } else { c };
    let mut line: String = text.trim().chars().take(LONGEST_WORDS).map(clean).collect();
    if text.trim().chars().nth(LONGEST_WORDS).is_some() {
        line.push('…');
    }
    line
}
