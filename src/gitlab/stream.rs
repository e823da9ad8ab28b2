//! Calls whose body is a file: it never lies in memory, and what counts is that it moves, not how
//! long it takes.
//!
//! These calls may be sent on to where GitLab keeps files. The job token goes to the configured
//! server alone: from the first hop elsewhere on it is left behind, also if a later one leads back.

use std::io::{self, SeekFrom};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use camino::{Utf8Path, Utf8PathBuf};
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use reqwest::header::{
    ACCEPT_RANGES, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG, HeaderMap, HeaderValue,
    IF_RANGE, InvalidHeaderValue, LOCATION, RANGE,
};
use reqwest::{Method, StatusCode};
use tokio::fs::{File, OpenOptions};
use tokio::io::{AsyncReadExt as _, AsyncSeekExt as _, AsyncWriteExt as _};
use tokio::time::Instant;
use tokio_util::io::ReaderStream;
use url::Url;

use super::answer::Answer;
use super::error::{Call, Cause, Error};
use super::transport::{
    Credential, MAX_REDIRECTS, REQUEST_ID, SMALL_ANSWER, Transport, header_of, named_request_id,
    same_server, transport_cause,
};

/// How much of a file is read at once.
const PIECE: usize = 256 * 1024;

/// A file to be sent as the one part of a form.
pub(super) struct SendFile<'a> {
    pub(super) path: &'a str,
    pub(super) query: Option<String>,
    pub(super) credential: Credential<'a>,
    pub(super) file: &'a Utf8Path,
    /// The part's file name.
    pub(super) name: &'a str,
}

/// A file to be fetched.
pub(super) struct FetchFile<'a> {
    pub(super) path: &'a str,
    pub(super) query: Option<&'a str>,
    pub(super) credential: Credential<'a>,
    /// How many bytes it may have.
    pub(super) limit: u64,
}

/// What came of a fetch.
pub(super) struct Fetched {
    /// Without the file's bytes.
    pub(super) answer: Answer,
    /// Whether another server than the configured one said it.
    pub(super) elsewhere: bool,
}

/// A file that may be there in part; what is there need not be fetched again.
#[derive(Debug)]
pub struct PartialFile {
    path: Utf8PathBuf,
    len: u64,
    /// What the server called this version of the file, if it lets us go on with it.
    version: Option<String>,
}

impl PartialFile {
    /// Names a file that is not there yet; what has the name is overwritten.
    pub fn new(path: impl Into<Utf8PathBuf>) -> Self {
        Self { path: path.into(), len: 0, version: None }
    }

    /// Gives the path.
    pub fn path(&self) -> &Utf8Path {
        &self.path
    }

    /// Gives the number of bytes that are there.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Says whether nothing is there.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Says whether the next attempt goes on where this one stopped.
    pub fn can_go_on(&self) -> bool {
        self.len > 0 && self.version.is_some()
    }

    fn forget(&mut self) {
        self.len = 0;
        self.version = None;
    }

    fn failed(&self, source: io::Error) -> Cause {
        Cause::Unwritten { path: self.path.clone(), source }
    }
}

/// Counts the bytes of a body as the connection takes them.
#[derive(Default)]
struct Moved(AtomicU64);

impl Moved {
    fn add(&self, bytes: usize) {
        self.0.fetch_add(u64::try_from(bytes).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    fn so_far(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Transport {
    /// Sends a file, once; a redirect that keeps the method is followed with the file sent anew.
    pub(super) async fn send_file(&self, ask: SendFile<'_>) -> Result<Answer, Error> {
        let started = Instant::now();
        let url = self.url(ask.path, ask.query.as_deref());
        let mut call = Call { method: Method::POST, url, request_id: self.next_request_id() };
        let form = Form::new(&call.request_id, ask.name);
        let mut headers = match headers(ask.credential, &call) {
            Ok(headers) => headers,
            Err(InvalidHeaderValue { .. }) => return Err(Error::of(call, Cause::UnfitToken)),
        };
        headers.insert(CONTENT_TYPE, form.content_type.clone());
        let http = self.http();
        for _ in 0..=MAX_REDIRECTS {
            let unread = |source| Cause::File { path: ask.file.to_owned(), source };
            let (body, length) = match form.body(ask.file).await {
                Ok(body) => body,
                Err(source) => return Err(Error::of(call, unread(source))),
            };
            let moved = Arc::new(Moved::default());
            let count = Arc::clone(&moved);
            let body = body.inspect_ok(move |piece: &Bytes| count.add(piece.len()));
            headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
            let mut request = reqwest::Request::new(call.method.clone(), call.url.clone());
            *request.headers_mut() = headers.clone();
            *request.body_mut() = Some(reqwest::Body::wrap_stream(body));
            let response = match self.patiently(http.execute(request), &moved, length).await {
                Ok(response) => response,
                Err(cause) => return Err(Error::of(call, cause)),
            };
            if response.status().is_redirection() && response.headers().contains_key(LOCATION) {
                match self.onward(&call, &response, &mut headers) {
                    Ok(next) => call.url = next,
                    Err(cause) => return Err(Error::of(call, cause)),
                }
                continue;
            }
            if let Some(id) = named_request_id(response.headers()) {
                call.request_id = id;
            }
            let deadline = Instant::now() + self.options().timeouts.call;
            let answer = self.read(call, response, SMALL_ANSWER, deadline).await;
            note(&answer, length, started);
            return Ok(answer);
        }
        Err(Error::of(call, Cause::RedirectLoop(MAX_REDIRECTS)))
    }

    /// Fetches a file, once, or what of it is missing. If the answer is neither 200 nor 206, the
    /// file is as it was.
    pub(super) async fn fetch_file(
        &self,
        ask: FetchFile<'_>,
        into: &mut PartialFile,
    ) -> Result<Fetched, Error> {
        let started = Instant::now();
        let url = self.url(ask.path, ask.query);
        let mut call = Call { method: Method::GET, url, request_id: self.next_request_id() };
        let mut headers = match headers(ask.credential, &call) {
            Ok(headers) => headers,
            Err(InvalidHeaderValue { .. }) => return Err(Error::of(call, Cause::UnfitToken)),
        };
        let resumed = into
            .version
            .as_deref()
            .filter(|_| into.len > 0)
            .and_then(|version| HeaderValue::from_str(version).ok())
            .zip(HeaderValue::from_str(&format!("bytes={}-", into.len)).ok());
        if let Some((version, range)) = resumed {
            headers.insert(IF_RANGE, version);
            headers.insert(RANGE, range);
        }
        let http = self.http();
        let mut elsewhere = false;
        for _ in 0..=MAX_REDIRECTS {
            let mut request = reqwest::Request::new(call.method.clone(), call.url.clone());
            *request.headers_mut() = headers.clone();
            let patience = self.options().timeouts.request_head;
            let response = match tokio::time::timeout(patience, http.execute(request)).await {
                Ok(Ok(response)) => response,
                Ok(Err(error)) => return Err(Error::of(call, transport_cause(error))),
                Err(_elapsed) => {
                    return Err(Error::of(call, Cause::Silent(started.elapsed())));
                }
            };
            if response.status().is_redirection() && response.headers().contains_key(LOCATION) {
                match self.onward(&call, &response, &mut headers) {
                    Ok(next) => call.url = next,
                    Err(cause) => return Err(Error::of(call, cause)),
                }
                elsewhere |= !headers.contains_key(REQUEST_ID);
                continue;
            }
            if let Some(id) = named_request_id(response.headers()).filter(|_| !elsewhere) {
                call.request_id = id;
            }
            if !matches!(response.status(), StatusCode::OK | StatusCode::PARTIAL_CONTENT) {
                let deadline = Instant::now() + self.options().timeouts.call;
                if response.status() == StatusCode::RANGE_NOT_SATISFIABLE {
                    into.forget();
                }
                let answer = self.read(call, response, SMALL_ANSWER, deadline).await;
                note(&answer, 0, started);
                return Ok(Fetched { answer, elsewhere });
            }
            let status = response.status().as_u16();
            let headers = response.headers().clone();
            if let Err(cause) = self.store(response, into, ask.limit).await {
                return Err(Error::of(call, cause));
            }
            let answer = Answer { call, status, headers, body: Vec::new(), fault: None };
            note(&answer, into.len, started);
            return Ok(Fetched { answer, elsewhere });
        }
        Err(Error::of(call, Cause::RedirectLoop(MAX_REDIRECTS)))
    }

    /// Waits for an answer as long as the body moves, and then as long as storing it may take.
    async fn patiently(
        &self,
        answer: impl Future<Output = reqwest::Result<reqwest::Response>>,
        moved: &Moved,
        whole: u64,
    ) -> Result<reqwest::Response, Cause> {
        let timeouts = &self.options().timeouts;
        let mut answer = pin!(answer);
        let started = Instant::now();
        let mut seen = 0;
        loop {
            let patience = if seen >= whole { timeouts.request_head } else { timeouts.idle };
            // The wait is cancel-safe: the call itself goes on.
            match tokio::time::timeout(patience, answer.as_mut()).await {
                Ok(Ok(response)) => return Ok(response),
                Ok(Err(error)) => return Err(transport_cause(error)),
                Err(_elapsed) if moved.so_far() == seen => {
                    return Err(Cause::Silent(started.elapsed()));
                }
                Err(_elapsed) => seen = moved.so_far(),
            }
        }
    }

    /// Says where a redirect leads, and takes out of the headers what must not go there.
    ///
    /// What has begun encrypted stays so. 301, 302 and 303 would turn a POST into a GET.
    fn onward(
        &self,
        call: &Call,
        response: &reqwest::Response,
        headers: &mut HeaderMap,
    ) -> Result<Url, Cause> {
        let status = response.status();
        let away = |target: String| Cause::RedirectedAway { status: status.as_u16(), target };
        let location = response.headers().get(LOCATION).and_then(|value| value.to_str().ok());
        let Some(mut target) = location.and_then(|location| call.url.join(location).ok()) else {
            return Err(away("nowhere".to_owned()));
        };
        target.set_fragment(None);
        let keeps_method = call.method == Method::GET
            || matches!(status, StatusCode::TEMPORARY_REDIRECT | StatusCode::PERMANENT_REDIRECT);
        let safe = match target.scheme() {
            "https" => true,
            "http" => call.url.scheme() == "http",
            _ => false,
        };
        let named = !target.username().is_empty() || target.password().is_some();
        if !keeps_method || !safe || named {
            return Err(away(target.origin().ascii_serialization()));
        }
        if !same_server(self.base(), &target) {
            headers.remove("job-token");
            headers.remove(REQUEST_ID);
        }
        Ok(target)
    }

    /// Writes a body to the file; what came before a failure stays if the rest can be had later.
    async fn store(
        &self,
        mut response: reqwest::Response,
        into: &mut PartialFile,
        limit: u64,
    ) -> Result<(), Cause> {
        let status = response.status();
        let text = |name| response.headers().get(name).and_then(|value| value.to_str().ok());
        let whole = if status == StatusCode::PARTIAL_CONTENT {
            let Some((from, whole)) = text(CONTENT_RANGE).and_then(content_range) else {
                into.forget();
                return Err(unreadable(status, "names no range"));
            };
            if from != into.len || into.version.is_none() {
                into.forget();
                return Err(unreadable(status, "has a range that was not asked for"));
            }
            whole
        } else {
            into.forget();
            let whole = response.content_length();
            let goes_on = text(ACCEPT_RANGES).is_some_and(|unit| unit.trim() == "bytes");
            // A weak one names a meaning, not bytes.
            let version = text(ETAG).filter(|etag| etag.starts_with('"'));
            into.version = version.filter(|_| goes_on && whole.is_some()).map(str::to_owned);
            whole
        };
        let too_large = || Cause::TooLarge {
            status: status.as_u16(),
            limit: usize::try_from(limit).unwrap_or(usize::MAX),
        };
        if whole.is_some_and(|whole| whole > limit) {
            into.forget();
            return Err(too_large());
        }
        let mut file = open_private(&into.path, into.len).await.map_err(|e| into.failed(e))?;
        let idle = self.options().timeouts.idle;
        let fault = loop {
            match tokio::time::timeout(idle, response.chunk()).await {
                Ok(Ok(None)) => break None,
                Ok(Ok(Some(piece))) => {
                    let len =
                        into.len.saturating_add(u64::try_from(piece.len()).unwrap_or(u64::MAX));
                    if len > limit {
                        into.version = None;
                        break Some(too_large());
                    }
                    if let Err(error) = file.write_all(&piece).await {
                        let cause = into.failed(error);
                        into.forget();
                        return Err(cause);
                    }
                    into.len = len;
                }
                Ok(Err(error)) => break Some(Cause::Broken(error.without_url())),
                Err(_elapsed) => break Some(Cause::Stalled { status: status.as_u16(), idle }),
            }
        };
        if let Err(error) = file.flush().await {
            let cause = into.failed(error);
            into.forget();
            return Err(cause);
        }
        match (fault, whole) {
            (Some(fault), _) => Err(fault),
            (None, Some(whole)) if whole != into.len => {
                let got = into.len;
                into.forget();
                Err(Cause::Incomplete { status: status.as_u16(), got, whole })
            }
            (None, _) => Ok(()),
        }
    }
}

fn note(answer: &Answer, bytes: u64, started: Instant) {
    tracing::debug!(
        method = %answer.call.method,
        path = answer.call.url.path(),
        status = answer.status,
        request_id = answer.call.request_id,
        bytes,
        elapsed_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
        "file transferred"
    );
}

fn unreadable(status: StatusCode, fault: &str) -> Cause {
    Cause::Unreadable { status: status.as_u16(), fault: fault.to_owned() }
}

fn headers(credential: Credential<'_>, call: &Call) -> Result<HeaderMap, InvalidHeaderValue> {
    let mut headers = HeaderMap::with_capacity(8);
    headers.insert(REQUEST_ID, HeaderValue::from_str(&call.request_id)?);
    headers.extend(header_of(credential)?);
    Ok(headers)
}

/// Reads `bytes 5-9/10`: where it begins and how long the whole is, if that is said.
fn content_range(text: &str) -> Option<(u64, Option<u64>)> {
    let (range, whole) = text.trim().strip_prefix("bytes ")?.split_once('/')?;
    let (from, _) = range.split_once('-')?;
    let whole = if whole == "*" { None } else { Some(whole.parse().ok()?) };
    Some((from.parse().ok()?, whole))
}

/// Opens a file that only its owner may read, cut to what is to be kept of it.
async fn open_private(path: &Utf8Path, keep: u64) -> io::Result<File> {
    let mut options = OpenOptions::new();
    let mut file = options.create(true).truncate(false).write(true).mode(0o600).open(path).await?;
    file.set_len(keep).await?;
    file.seek(SeekFrom::Start(keep)).await?;
    Ok(file)
}

/// A form with one part, which is a file.
struct Form {
    content_type: HeaderValue,
    head: Bytes,
    tail: Bytes,
}

impl Form {
    fn new(unique: &str, name: &str) -> Self {
        let boundary = format!("bridge-{unique}");
        // As browsers and GitLab write it; a name is never a second header.
        let name: String = name
            .chars()
            .map(|c| if c.is_control() { '_' } else { c })
            .flat_map(|c| match c {
                '"' => "%22".chars().collect::<Vec<_>>(),
                other => vec![other],
            })
            .collect();
        let head = format!(
            "--{boundary}\r\nContent-Disposition: form-data; name=\"file\"; filename=\"{name}\"\r\n\
             Content-Type: application/octet-stream\r\n\r\n"
        );
        let content_type =
            HeaderValue::from_str(&format!("multipart/form-data; boundary={boundary}"))
                .expect("hexadecimal digits and letters are fit for a header");
        Self { content_type, head: head.into(), tail: format!("\r\n--{boundary}--\r\n").into() }
    }

    /// Opens the file anew; gives the whole body and its length.
    async fn body(
        &self,
        file: &Utf8Path,
    ) -> io::Result<(impl stream::Stream<Item = io::Result<Bytes>> + Send + 'static + use<>, u64)>
    {
        let file = File::open(file).await?;
        let size = file.metadata().await?.len();
        let around = self.head.len() + self.tail.len();
        let length = size.saturating_add(u64::try_from(around).unwrap_or(u64::MAX));
        let (head, tail) = (self.head.clone(), self.tail.clone());
        // A file that grows is cut, one that shrinks breaks the call.
        let pieces = ReaderStream::with_capacity(file.take(size), PIECE);
        let body =
            stream::once(async { Ok(head) }).chain(pieces).chain(stream::once(async { Ok(tail) }));
        Ok((body, length))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_ranges_are_read() {
        assert_eq!(content_range("bytes 5-9/10"), Some((5, Some(10))));
        assert_eq!(content_range("bytes 0-0/*"), Some((0, None)));
        for odd in ["", "bytes */10", "5-9/10", "bytes 5-9", "bytes x-9/10", "bytes 5-9/x"] {
            assert_eq!(content_range(odd), None, "{odd}");
        }
    }

    #[test]
    fn a_file_name_is_never_a_header() {
        let form = Form::new("0a", "a\"b\r\nX: y\u{e9}.zip");
        let head = String::from_utf8(form.head.to_vec()).unwrap();
        assert!(head.contains("filename=\"a%22b__X: yé.zip\"\r\n"), "{head}");
        assert_eq!(head.matches("\r\n").count(), 4);
    }
}
