//! One HTTP call: headers, timeouts, redirects, sizes. Knows nothing of jobs and runners.

use std::borrow::Cow;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use bytes::Bytes;
use reqwest::header::{
    ACCEPT, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, InvalidHeaderValue, LOCATION,
};
use reqwest::{Method, StatusCode};
use serde::Serialize;
use tokio::time::Instant;
use url::Url;

use super::answer::Answer;
use super::error::{Call, Cause, Error, Shown};
use super::tls;
use super::wire::Secret;
use super::{ClientOptions, Timeouts};

pub(super) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// As many as Go's client follows, so as many as the official runner does.
pub(super) const MAX_REDIRECTS: usize = 10;

/// Enough for any answer but a job.
pub(super) const SMALL_ANSWER: usize = 64 * 1024;

/// The header that carries a token, and the token.
#[derive(Clone, Copy)]
pub(super) enum Credential<'a> {
    /// `JOB-TOKEN`.
    Job(&'a Secret),
    /// `RUNNER-TOKEN`.
    Runner(&'a Secret),
    /// `PRIVATE-TOKEN`.
    Private(&'a Secret),
    /// None.
    Nobody,
}

/// A call to be made.
pub(super) struct Ask<'a> {
    method: Method,
    path: &'a str,
    query: Option<Cow<'static, str>>,
    credential: Credential<'a>,
    headers: HeaderMap,
    body: Bytes,
    /// How long to wait for the answer's head.
    head: Duration,
    /// How long the call may take as a whole.
    total: Duration,
    /// How many bytes of the answer are read.
    limit: usize,
}

impl<'a> Ask<'a> {
    /// A call whose body is JSON.
    pub(super) fn json(
        method: Method,
        path: &'a str,
        body: &impl Serialize,
        timeouts: &Timeouts,
    ) -> Result<Self, Error> {
        let body =
            serde_json::to_vec(body).map_err(|error| Error::new(Cause::Unwritable(error)))?;
        let json = HeaderValue::from_static("application/json");
        Ok(Self::bytes(method, path, json, body.into(), timeouts))
    }

    /// A call whose body is anything.
    pub(super) fn bytes(
        method: Method,
        path: &'a str,
        content_type: HeaderValue,
        body: Bytes,
        timeouts: &Timeouts,
    ) -> Self {
        let ask = Self { body, ..Self::bare(method, path, timeouts) };
        ask.header(CONTENT_TYPE, content_type)
    }

    /// A call without a body.
    pub(super) fn bare(method: Method, path: &'a str, timeouts: &Timeouts) -> Self {
        Self {
            method,
            path,
            query: None,
            credential: Credential::Nobody,
            headers: HeaderMap::with_capacity(8),
            body: Bytes::new(),
            head: timeouts.call,
            total: timeouts.call,
            limit: SMALL_ANSWER,
        }
    }

    pub(super) fn credential(mut self, credential: Credential<'a>) -> Self {
        self.credential = credential;
        self
    }

    pub(super) fn query(mut self, query: impl Into<Cow<'static, str>>) -> Self {
        self.query = Some(query.into());
        self
    }

    pub(super) fn header(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.headers.insert(name, value);
        self
    }

    /// Says that the answer will be decoded.
    pub(super) fn accept_json(self) -> Self {
        self.header(ACCEPT, HeaderValue::from_static("application/json"))
    }

    pub(super) fn patience(mut self, head: Duration, total: Duration) -> Self {
        self.head = head;
        self.total = total;
        self
    }

    pub(super) fn limit(mut self, limit: usize) -> Self {
        self.limit = limit;
        self
    }
}

/// The connections to one GitLab.
pub(super) struct Transport {
    /// `<url>/api/v4/`.
    base: Url,
    options: ClientOptions,
    fresh: RwLock<Fresh>,
    rebuilding: AtomicBool,
    request_ids: RequestIds,
}

/// A set of connections, and when it was opened.
struct Fresh {
    http: reqwest::Client,
    ca_pem: Option<Arc<str>>,
    since: Instant,
}

impl Fresh {
    fn build(base: &Url, options: &ClientOptions) -> Result<Self, Error> {
        let (http, ca_pem) = tls::build(base, options)?;
        Ok(Self { http, ca_pem, since: Instant::now() })
    }
}

impl fmt::Debug for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Transport({})", Shown(&self.base))
    }
}

impl Transport {
    pub(super) fn new(options: ClientOptions) -> Result<Self, Error> {
        let base = api_base(&options.url)?;
        let fresh = RwLock::new(Fresh::build(&base, &options)?);
        let request_ids = RequestIds::new()?;
        Ok(Self { base, options, fresh, rebuilding: AtomicBool::new(false), request_ids })
    }

    pub(super) fn options(&self) -> &ClientOptions {
        &self.options
    }

    pub(super) fn base(&self) -> &Url {
        &self.base
    }

    pub(super) fn next_request_id(&self) -> String {
        self.request_ids.next()
    }

    pub(super) fn ca_pem(&self) -> Option<Arc<str>> {
        self.fresh.read().unwrap_or_else(PoisonError::into_inner).ca_pem.clone()
    }

    /// Gives the connections, new ones if the old ones served long enough: certificates, their
    /// files and load balancers change under a daemon that runs for months. Calls in flight end
    /// on the old ones.
    pub(super) fn http(&self) -> reqwest::Client {
        let (http, age) = {
            let fresh = self.fresh.read().unwrap_or_else(PoisonError::into_inner);
            (fresh.http.clone(), fresh.since.elapsed())
        };
        if age < self.options.timeouts.connection_age
            || self.rebuilding.swap(true, Ordering::AcqRel)
        {
            return http;
        }
        let renewed = match Fresh::build(&self.base, &self.options) {
            Ok(fresh) => {
                let http = fresh.http.clone();
                *self.fresh.write().unwrap_or_else(PoisonError::into_inner) = fresh;
                http
            }
            Err(error) => {
                // A certificate file half written must not end the talk about running jobs.
                tracing::warn!(
                    url = %Shown(&self.base), %error,
                    "connections to GitLab cannot be renewed, the old ones are kept"
                );
                self.fresh.write().unwrap_or_else(PoisonError::into_inner).since = Instant::now();
                http
            }
        };
        self.rebuilding.store(false, Ordering::Release);
        renewed
    }

    pub(super) fn url(&self, path: &str, query: Option<&str>) -> Url {
        let mut url = self.base.clone();
        let mut full = String::with_capacity(self.base.path().len() + path.len());
        full.push_str(self.base.path());
        full.push_str(path);
        url.set_path(&full);
        url.set_query(query);
        url
    }

    /// Makes the call, once.
    pub(super) async fn exchange(&self, ask: Ask<'_>) -> Result<Answer, Error> {
        let started = Instant::now();
        let deadline = started + ask.total;
        let request_id = self.request_ids.next();
        let mut call =
            Call { method: ask.method, url: self.url(ask.path, ask.query.as_deref()), request_id };
        let mut headers = ask.headers;
        match (header_of(ask.credential), HeaderValue::from_str(&call.request_id)) {
            (Ok(credential), Ok(id)) => {
                headers.insert(REQUEST_ID, id);
                headers.extend(credential);
            }
            (Err(InvalidHeaderValue { .. }), _) | (_, Err(InvalidHeaderValue { .. })) => {
                return Err(Error::of(call, Cause::UnfitToken));
            }
        }
        let http = self.http();
        for _ in 0..=MAX_REDIRECTS {
            let mut request = reqwest::Request::new(call.method.clone(), call.url.clone());
            *request.headers_mut() = headers.clone();
            *request.body_mut() = Some(ask.body.clone().into());
            let until = deadline.min(Instant::now() + ask.head);
            let response = match tokio::time::timeout_at(until, http.execute(request)).await {
                Ok(Ok(response)) => response,
                Ok(Err(error)) => return Err(Error::of(call, transport_cause(error))),
                Err(_elapsed) => {
                    return Err(Error::of(call, Cause::Silent(started.elapsed())));
                }
            };
            if response.status().is_redirection() && response.headers().contains_key(LOCATION) {
                match self.redirect(&call, &response) {
                    Ok(next) => call.url = next,
                    Err(cause) => return Err(Error::of(call, cause)),
                }
                continue;
            }
            if let Some(id) = named_request_id(response.headers()) {
                call.request_id = id;
            }
            let answer = self.read(call, response, ask.limit, deadline).await;
            tracing::debug!(
                method = %answer.call.method,
                path = answer.call.url.path(),
                status = answer.status,
                request_id = answer.call.request_id,
                elapsed_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
                "GitLab answered"
            );
            return Ok(answer);
        }
        Err(Error::of(call, Cause::RedirectLoop(MAX_REDIRECTS)))
    }

    /// Reads the body as far as it comes. That it did not come whole is the answer's `fault`, not
    /// an error: status and headers already say most, and half a job still names its id.
    pub(super) async fn read(
        &self,
        call: Call,
        mut response: reqwest::Response,
        limit: usize,
        deadline: Instant,
    ) -> Answer {
        let status = response.status().as_u16();
        let headers = std::mem::take(response.headers_mut());
        let expected = response.content_length().and_then(|n| usize::try_from(n).ok());
        let mut body = Vec::with_capacity(expected.unwrap_or(0).min(limit).min(1 << 20));
        let idle = self.options.timeouts.idle;
        let fault = loop {
            let until = deadline.min(Instant::now() + idle);
            match tokio::time::timeout_at(until, response.chunk()).await {
                Ok(Ok(None)) => break None,
                Ok(Ok(Some(chunk))) => {
                    let room = limit - body.len();
                    body.extend_from_slice(chunk.get(..room).unwrap_or(&chunk));
                    if chunk.len() > room {
                        break Some(Cause::TooLarge { status, limit });
                    }
                }
                Ok(Err(error)) => break Some(Cause::Broken(error.without_url())),
                Err(_elapsed) => break Some(Cause::Stalled { status, idle }),
            }
        };
        Answer { call, status, headers, body, fault }
    }

    /// Says where a redirect leads, if a call with a token in it may go there.
    ///
    /// 301, 302 and 303 turn a call into a GET, which none of ours survives; only 307 and 308 are
    /// followed, and only to the same server.
    fn redirect(&self, call: &Call, response: &reqwest::Response) -> Result<Url, Cause> {
        let status = response.status();
        let location = response.headers().get(LOCATION).and_then(|value| value.to_str().ok());
        let target = location.and_then(|location| call.url.join(location).ok());
        let keeps_method =
            matches!(status, StatusCode::TEMPORARY_REDIRECT | StatusCode::PERMANENT_REDIRECT);
        match target {
            Some(url) if keeps_method && same_server(&self.base, &url) => Ok(url),
            Some(url) => Err(Cause::RedirectedAway {
                status: status.as_u16(),
                target: url.origin().ascii_serialization(),
            }),
            None => {
                Err(Cause::RedirectedAway { status: status.as_u16(), target: "nowhere".to_owned() })
            }
        }
    }
}

/// Says whether `to` is the server that was configured. Its encrypted front is another one: the
/// token has then travelled in the clear already, and the operator must know.
pub(super) fn same_server(from: &Url, to: &Url) -> bool {
    from.origin() == to.origin() && to.username().is_empty() && to.password().is_none()
}

/// Derives `<url>/api/v4/`: a relative root is kept, slashes and the old `/ci` at the end are not.
fn api_base(url: &Url) -> Result<Url, Error> {
    let fault = if !matches!(url.scheme(), "http" | "https") {
        Some("is neither http nor https")
    } else if url.host_str().is_none_or(str::is_empty) {
        Some("names no host")
    } else if !url.username().is_empty() || url.password().is_some() {
        Some("must hold neither a user nor a password")
    } else if url.query().is_some() || url.fragment().is_some() {
        Some("must hold neither a query nor a fragment")
    } else {
        None
    };
    if let Some(fault) = fault {
        return Err(Error::new(Cause::BadUrl(fault)));
    }
    let root = url.path().trim_end_matches('/');
    let root = root.strip_suffix("/ci").unwrap_or(root).trim_end_matches('/');
    let mut base = url.clone();
    base.set_path(&format!("{root}/api/v4/"));
    Ok(base)
}

pub(super) fn header_of(
    credential: Credential<'_>,
) -> Result<Option<(HeaderName, HeaderValue)>, InvalidHeaderValue> {
    let (name, token) = match credential {
        Credential::Job(token) => (HeaderName::from_static("job-token"), token),
        Credential::Runner(token) => (HeaderName::from_static("runner-token"), token),
        Credential::Private(token) => (HeaderName::from_static("private-token"), token),
        Credential::Nobody => return Ok(None),
    };
    // The one place where a token becomes a header.
    let mut value = HeaderValue::from_str(token.expose())?;
    value.set_sensitive(true);
    Ok(Some((name, value)))
}

pub(super) fn transport_cause(error: reqwest::Error) -> Cause {
    let error = error.without_url();
    if error.is_connect() {
        Cause::NoConnection(error)
    } else if error.is_builder() {
        Cause::Setup(error)
    } else {
        Cause::Broken(error)
    }
}

pub(super) fn named_request_id(headers: &HeaderMap) -> Option<String> {
    let id = headers.get(REQUEST_ID)?.to_str().ok()?.trim();
    (!id.is_empty() && id.len() <= 128).then(|| id.to_owned())
}

/// Makes request ids: 32 hexadecimal digits, half of them this process's, half counted up, so that
/// a call costs no system call.
struct RequestIds {
    ours: u64,
    next: AtomicU64,
}

impl RequestIds {
    fn new() -> Result<Self, Error> {
        let random = |error| Error::new(Cause::Random(error));
        let ours = getrandom::u64().map_err(random)?;
        let next = AtomicU64::new(getrandom::u64().map_err(random)?);
        Ok(Self { ours, next })
    }

    fn next(&self) -> String {
        format!("{:016x}{:016x}", self.ours, self.next.fetch_add(1, Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn base(url: &str) -> Option<String> {
        api_base(&Url::parse(url).unwrap()).ok().map(String::from)
    }

    #[test]
    fn the_api_lies_below_the_urls_own_root() {
        for (url, expected) in [
            ("https://h", "https://h/api/v4/"),
            ("https://h/", "https://h/api/v4/"),
            ("https://h:8443/gitlab//", "https://h:8443/gitlab/api/v4/"),
            ("https://h/ci", "https://h/api/v4/"),
            ("https://h/gitlab/ci/", "https://h/gitlab/api/v4/"),
            ("https://h/cici", "https://h/cici/api/v4/"),
        ] {
            assert_eq!(base(url).as_deref(), Some(expected), "{url}");
        }
    }

    #[test]
    fn urls_that_cannot_work_are_refused() {
        for url in ["ftp://h", "https://u:p@h", "https://h/?a=b", "https://h/#x", "file:///x"] {
            assert_eq!(base(url), None, "{url}");
        }
    }

    #[test]
    fn only_the_same_server_is_the_same_server() {
        let same = |a: &str, b: &str| same_server(&Url::parse(a).unwrap(), &Url::parse(b).unwrap());
        assert!(same("https://h/a", "https://h:443/b"));
        assert!(!same("http://h", "https://h"));
        assert!(!same("https://h", "http://h"));
        assert!(!same("http://h:8080", "https://h"));
        assert!(!same("https://h", "https://h:8443"));
        assert!(!same("https://h", "https://h.evil"));
        assert!(!same("https://h", "https://u@h"));
    }

    #[test]
    fn request_ids_are_32_digits_and_differ() {
        let ids = RequestIds::new().unwrap();
        let (one, two) = (ids.next(), ids.next());
        assert_ne!(one, two);
        for id in [one, two] {
            assert_eq!(id.len(), 32);
            assert!(id.chars().all(|c| matches!(c, '0'..='9' | 'a'..='f')), "{id}");
        }
    }
}
