//! An archive's way into a bucket: in one request, or in parts where it is too large for one.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream;
use reqwest::Body;
use reqwest::header::{CONTENT_LENGTH, CONTENT_TYPE, ETAG};
use rusty_s3::actions::{
    AbortMultipartUpload, CompleteMultipartUpload, CreateMultipartUpload, PutObject, S3Action as _,
    UploadPart,
};

use super::super::local::Meta;
use super::super::{Archive, Voice};
use super::{Call, ENTRIES_HEADER, KEY_HEADER, S3, S3Error, answer, send, text, without_query};
use crate::domain::clock::Clock;

/// How much of the archive is in memory at a time.
const PIECE: u64 = 1 << 20;

/// The most parts that an upload may have.
const MOST_PARTS: u64 = 10_000;

/// A stretch of a file.
#[derive(Clone)]
struct Stretch {
    file: Arc<File>,
    from: u64,
    to: u64,
}

/// What stays the same for all requests of an upload.
struct Upload<'a> {
    s3: &'a S3,
    object: &'a str,
    clock: &'a dyn Clock,
    limit: Duration,
}

impl S3 {
    /// Uploads an archive and gives what the server calls it.
    pub(in crate::cache) async fn put(
        &self,
        object: &str,
        archive: &Archive,
        meta: &Meta,
        clock: &dyn Clock,
        limit: Duration,
        voice: &mut (dyn Voice + Send),
    ) -> Result<String, S3Error> {
        let file =
            archive.file.try_clone().map_err(|source| S3Error::File { action: "open", source })?;
        let all = Stretch { file: Arc::new(file), from: 0, to: archive.bytes };
        let upload = Upload { s3: self, object, clock, limit };
        let headers = self.headers(meta);
        match self.bucket.object_url(object) {
            Ok(url) => voice.notice(&format!("Uploading cache.zip to {url}")),
            Err(error) => return Err(S3Error::Address(error.to_string())),
        }
        if archive.bytes <= self.tuning.largest_put {
            let mut attempt = 1;
            loop {
                match upload.whole(&all, &headers).await {
                    Ok(etag) => return Ok(etag),
                    Err(error) => self.pause_or_give_up(error, &mut attempt, voice).await?,
                }
            }
        }
        let id = upload.begin(&headers, voice).await?;
        match upload.parts(&id, &all, voice).await {
            Ok(etag) => Ok(etag),
            Err(error) => {
                // Parts of an upload that is neither completed nor aborted are paid for.
                if let Err(error) = upload.abort(&id).await {
                    let error = super::super::chain(&error);
                    tracing::warn!(object, %error, "an upload in parts was not aborted");
                }
                Err(error)
            }
        }
    }

    /// Gives what is said beside the archive; a text that no header can carry is left out.
    fn headers(&self, meta: &Meta) -> Vec<(&'static str, String)> {
        let fits = |text: &String| {
            text.bytes().all(|b| b.is_ascii_graphic() || b == b' ')
                && text.trim() == text
                && !text.contains("  ")
                && text.len() <= 1024
        };
        let mut headers = vec![(KEY_HEADER, meta.cachekey.clone())];
        headers.extend(meta.entries.iter().map(|entries| (ENTRIES_HEADER, entries.clone())));
        headers.retain(|(_, text)| fits(text));
        headers.extend(self.encryption.iter().flat_map(super::Encryption::headers));
        headers
    }
}

impl Upload<'_> {
    async fn whole(
        &self,
        all: &Stretch,
        headers: &[(&'static str, String)],
    ) -> Result<String, S3Error> {
        let s3 = self.s3;
        let now = self.clock.now();
        let mut action = PutObject::new(&s3.bucket, Some(&s3.credentials), self.object);
        for (name, value) in headers {
            action.headers_mut().insert(*name, value.as_str());
        }
        let url = s3.signed(&action, now, self.limit);
        let shown = without_query(&url);
        let mut request = s3.http.put(url).header(CONTENT_TYPE, "application/octet-stream");
        for (name, value) in headers {
            request = request.header(*name, value);
        }
        let request = request.header(CONTENT_LENGTH, all.to - all.from).body(body(all.clone()));
        let call = Call { method: "PUT", url: shown.clone(), request };
        let response = send(call).await?;
        if !response.status().is_success() {
            return Err(answer::refusal("PUT", shown, response, now).await);
        }
        text(response.headers(), ETAG.as_str())
            .ok_or(S3Error::Incomplete { url: shown, what: "ETag" })
    }

    async fn begin(
        &self,
        headers: &[(&'static str, String)],
        voice: &mut (dyn Voice + Send),
    ) -> Result<String, S3Error> {
        let s3 = self.s3;
        let mut attempt = 1;
        loop {
            let now = self.clock.now();
            let mut action =
                CreateMultipartUpload::new(&s3.bucket, Some(&s3.credentials), self.object);
            for (name, value) in headers {
                action.headers_mut().insert(*name, value.as_str());
            }
            let url = s3.signed(&action, now, self.limit);
            let shown = without_query(&url);
            let mut request = s3.http.post(url).header(CONTENT_LENGTH, 0);
            for (name, value) in headers {
                request = request.header(*name, value);
            }
            match self.document("POST", shown, request, now).await {
                Ok((url, document)) => {
                    let id = answer::element(&document, "UploadId").map(str::to_owned);
                    return id.ok_or(S3Error::Incomplete { url, what: "UploadId" });
                }
                Err(error) => s3.pause_or_give_up(error, &mut attempt, voice).await?,
            }
        }
    }

    async fn parts(
        &self,
        id: &str,
        all: &Stretch,
        voice: &mut (dyn Voice + Send),
    ) -> Result<String, S3Error> {
        let s3 = self.s3;
        let size = s3.tuning.part.max(all.to.div_ceil(MOST_PARTS));
        let mut etags: Vec<String> = Vec::new();
        let mut from = 0;
        let mut number: u16 = 1;
        while from < all.to {
            let stretch =
                Stretch { file: Arc::clone(&all.file), from, to: all.to.min(from + size) };
            let mut attempt = 1;
            let etag = loop {
                match self.part(id, number, &stretch).await {
                    Ok(etag) => break etag,
                    Err(error) => s3.pause_or_give_up(error, &mut attempt, voice).await?,
                }
            };
            etags.push(etag);
            from = stretch.to;
            number = number.saturating_add(1);
        }
        let mut attempt = 1;
        loop {
            match self.complete(id, &etags).await {
                Ok(etag) => return Ok(etag),
                Err(error) => s3.pause_or_give_up(error, &mut attempt, voice).await?,
            }
        }
    }

    async fn part(&self, id: &str, number: u16, stretch: &Stretch) -> Result<String, S3Error> {
        let s3 = self.s3;
        let now = self.clock.now();
        let action = UploadPart::new(&s3.bucket, Some(&s3.credentials), self.object, number, id);
        let url = s3.signed(&action, now, self.limit);
        let shown = without_query(&url);
        let request = s3
            .http
            .put(url)
            .header(CONTENT_LENGTH, stretch.to - stretch.from)
            .body(body(stretch.clone()));
        let response = send(Call { method: "PUT", url: shown.clone(), request }).await?;
        if !response.status().is_success() {
            return Err(answer::refusal("PUT", shown, response, now).await);
        }
        text(response.headers(), ETAG.as_str())
            .ok_or(S3Error::Incomplete { url: shown, what: "ETag" })
    }

    async fn complete(&self, id: &str, etags: &[String]) -> Result<String, S3Error> {
        let s3 = self.s3;
        let now = self.clock.now();
        let names = || etags.iter().map(String::as_str);
        let make = || {
            let credentials = Some(&s3.credentials);
            CompleteMultipartUpload::new(&s3.bucket, credentials, self.object, id, names())
        };
        let url = s3.signed(&make(), now, self.limit);
        let shown = without_query(&url);
        let request = s3.http.post(url).body(make().body());
        let (url, document) = self.document("POST", shown, request, now).await?;
        let etag = answer::element(&document, "ETag").map(|etag| etag.replace("&quot;", "\""));
        // The server answers before it is done, and may then say otherwise.
        if let Some(code) = answer::code(document.as_bytes()) {
            let (status, code) = (reqwest::StatusCode::INTERNAL_SERVER_ERROR, format!(" ({code})"));
            return Err(S3Error::Refused { method: "POST", url, status, code });
        }
        etag.ok_or(S3Error::Incomplete { url, what: "ETag" })
    }

    async fn abort(&self, id: &str) -> Result<(), S3Error> {
        let s3 = self.s3;
        let now = self.clock.now();
        let action = AbortMultipartUpload::new(&s3.bucket, Some(&s3.credentials), self.object, id);
        let url = s3.signed(&action, now, self.limit);
        let shown = without_query(&url);
        let call = Call { method: "DELETE", url: shown.clone(), request: s3.http.delete(url) };
        let response = send(call).await?;
        if response.status().is_success() || response.status() == reqwest::StatusCode::NOT_FOUND {
            return Ok(());
        }
        Err(answer::refusal("DELETE", shown, response, now).await)
    }

    /// Sends a request whose answer is a short document.
    async fn document(
        &self,
        method: &'static str,
        url: String,
        request: reqwest::RequestBuilder,
        now: jiff::Timestamp,
    ) -> Result<(String, String), S3Error> {
        let response = send(Call { method, url: url.clone(), request }).await?;
        if !response.status().is_success() {
            return Err(answer::refusal(method, url, response, now).await);
        }
        match response.text().await {
            Ok(text) => Ok((url, text)),
            Err(source) => Err(S3Error::Network { method, url, source: source.without_url() }),
        }
    }
}

/// Reads a stretch piece by piece. A position of its own each time: an attempt that was given up may
/// still be reading.
fn body(stretch: Stretch) -> Body {
    Body::wrap_stream(stream::try_unfold(stretch, |at| async move {
        if at.from >= at.to {
            return Ok::<_, io::Error>(None);
        }
        let work = tokio::task::spawn_blocking(move || {
            let len = usize::try_from(PIECE.min(at.to - at.from)).map_err(io::Error::other)?;
            let mut piece = vec![0; len];
            at.file.read_exact_at(&mut piece, at.from)?;
            let from = at.from + u64::try_from(len).map_err(io::Error::other)?;
            Ok::<_, io::Error>((Bytes::from(piece), Stretch { from, ..at }))
        });
        work.await.map_err(io::Error::other)?.map(Some)
    }))
}
