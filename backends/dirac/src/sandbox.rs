//! The store of sandboxes: into it under the name of its content, and out of it.

use std::collections::HashMap;
use std::fmt;
use std::io::{self, Read as _};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use bridge_backend::{BackendError, ErrorKind, Fault, Result};
use bytes::{Bytes, BytesMut};
use reqwest::Method;
use reqwest::multipart::{Form, Part};
use secrecy::{ExposeSecret as _, SecretString};
use serde::Deserialize;
use serde::de::{MapAccess, Visitor};
use serde_json::json;
use tokio::io::AsyncWriteExt as _;
use tokio::sync::Mutex as AsyncMutex;
use tokio_util::io::ReaderStream;
use url::Url;

use crate::client::with_json;
use crate::dirac::Dirac;
use crate::failure::{nonsense, refused, site, transient, unasked};
use crate::fallback;
use crate::workspace::Packed;

/// How long one sandbox may take over a slow line.
const TRANSFER: Duration = Duration::from_secs(1800);

/// What DiracX takes as one sandbox.
const LARGEST_SANDBOX: u64 = 100 << 20;

/// A piece of a log has 2 MiB.
const LARGEST_PIECE: u64 = 16 << 20;

/// One block of a tar.
const BLOCK: usize = 512;

/// Where to put a sandbox; no address when it is there already.
#[derive(Deserialize)]
struct Place {
    pfn: String,
    url: Option<SecretString>,
    #[serde(default)]
    fields: Fields,
}

/// The signed fields, in the order in which they came.
#[derive(Default)]
struct Fields(Vec<(String, SecretString)>);

impl<'de> Deserialize<'de> for Fields {
    fn deserialize<D: serde::Deserializer<'de>>(
        deserializer: D,
    ) -> std::result::Result<Self, D::Error> {
        struct Pairs;
        impl<'de> Visitor<'de> for Pairs {
            type Value = Fields;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("the fields of a form")
            }
            fn visit_unit<E>(self) -> std::result::Result<Fields, E> {
                Ok(Fields::default())
            }
            fn visit_map<A: MapAccess<'de>>(
                self,
                mut map: A,
            ) -> std::result::Result<Fields, A::Error> {
                let mut fields = Vec::new();
                while let Some((name, value)) = map.next_entry::<String, String>()? {
                    fields.push((name, value.into()));
                }
                Ok(Fields(fields))
            }
        }
        deserializer.deserialize_any(Pairs)
    }
}

/// Where a sandbox can be had.
#[derive(Deserialize)]
struct Found {
    url: SecretString,
}

/// The first bytes of a sandbox, and what follows.
#[derive(Debug)]
pub(crate) struct Open {
    head: BytesMut,
    rest: reqwest::Response,
}

/// What came of the question for a sandbox.
#[derive(Debug)]
pub(crate) enum Fetched {
    /// It is there.
    Open(Open),
    /// The store does not have it yet; it is asked again later.
    Coming,
    /// The store does not have it, and had the time to get it.
    Gone,
}

/// Uploads under way.
#[derive(Debug, Default)]
pub(crate) struct Uploads {
    /// By what is in them.
    under_way: Mutex<HashMap<String, Weak<AsyncMutex<()>>>>,
    /// One was granted: the server knows whose they are.
    known: AtomicBool,
    first: AsyncMutex<()>,
}

impl Uploads {
    /// Gives what to hold while this content is sent.
    pub(crate) fn of(&self, checksum: &str) -> Arc<AsyncMutex<()>> {
        let mut under_way = self.under_way.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(same) = under_way.get(checksum).and_then(Weak::upgrade) {
            return same;
        }
        under_way.retain(|_, same| same.strong_count() > 0);
        let new = Arc::default();
        under_way.insert(checksum.to_owned(), Arc::downgrade(&new));
        new
    }
}

impl Dirac {
    /// Puts a sandbox into the store, unless it is there; gives its name.
    pub(crate) async fn upload(&self, packed: Packed) -> Result<String> {
        let context = "put the job's files into the sandbox store";
        if packed.size > LARGEST_SANDBOX {
            let text =
                format!("{} bytes are more than the {LARGEST_SANDBOX} it takes", packed.size);
            return Err(
                BackendError::new(ErrorKind::Rejected(Fault::Job), context).with_source(text)
            );
        }
        let about = json!({
            "checksum_algorithm": "sha256",
            "checksum": packed.checksum,
            "size": packed.size,
            "format": "tar.zst",
        });
        // An owner's very first sandbox makes a note of the owner, and of several at once all but one fail.
        let first = match self.uploads.known.load(Ordering::Relaxed) {
            false => Some(self.uploads.first.lock().await),
            true => None,
        };
        let answer = self
            .ask("a sandbox", || {
                with_json(self.client.ask(Method::POST, "api/jobs/sandbox"), &about)
            })
            .await
            .map_err(unasked(context))?;
        self.uploads.known.fetch_or(answer.ok(), Ordering::Relaxed);
        drop(first);
        match answer.status {
            200..=299 => {}
            // Too large for this server, or a form that it does not take.
            400 | 413 | 422 => {
                return Err(BackendError::new(ErrorKind::Rejected(Fault::Job), context)
                    .with_source(answer.said()));
            }
            403 => return Err(site(context).with_source(answer.said())),
            _ => return Err(refused(context, &answer)),
        }
        let place: Place = answer.json().map_err(nonsense(context))?;
        let Some(url) = place.url else { return Ok(place.pfn) };
        let url = store_url(&url)?;
        let mut form = Form::new();
        for (name, value) in place.fields.0 {
            form = form.text(name, value.expose_secret().to_owned());
        }
        let stream = ReaderStream::with_capacity(tokio::fs::File::from_std(packed.file), 256 << 10);
        let body = reqwest::Body::wrap_stream(stream);
        let file = Part::stream_with_length(body, packed.size).file_name("sandbox.tar.zst");
        let request = self.client.elsewhere(Method::POST, url).multipart(form.part("file", file));
        let answer = self.client.send("an upload", request, TRANSFER).await;
        let answer = answer.map_err(|error| unasked(context)(error.into()))?;
        match answer.status {
            200..=299 => Ok(place.pfn),
            400 | 413 => Err(site(context).with_source(answer.said())),
            _ => Err(refused(context, &answer)),
        }
    }

    /// Lists what a job has handed in; `None` when DIRAC has no such job of ours.
    pub(crate) async fn handed_in(&self, id: u64) -> Result<Option<Vec<String>>> {
        let context = "list what the job has handed in";
        let path = format!("api/jobs/{id}/sandbox/output");
        let answer = self.ask("a list", || self.client.ask(Method::GET, &path)).await;
        let answer = answer.map_err(unasked(context))?;
        match answer.status {
            // Null for a job of which the store never heard.
            200..=299 => {
                let list: Option<Vec<Option<String>>> = answer.json().map_err(nonsense(context))?;
                Ok(Some(list.unwrap_or_default().into_iter().flatten().collect()))
            }
            // DiracX says 403 of a job that is not there. While it is, it is somebody else's word, or about
            // another token, and no log is lost for it.
            403 | 404 if self.jobs_of_ids(&[id], &["JobID"]).await?.is_empty() => Ok(None),
            _ => Err(refused(context, &answer)),
        }
    }

    /// Drops the links between a job and its sandboxes; the store then removes them.
    pub(crate) async fn unlink(&self, id: u64) -> Result<()> {
        let context = "give up the job's sandboxes";
        let path = format!("api/jobs/{id}/sandbox");
        let answer = self.ask("a release", || self.client.ask(Method::DELETE, &path)).await;
        let answer = answer.map_err(unasked(context))?;
        match answer.status {
            200..=299 | 403 | 404 => Ok(()),
            _ => Err(refused(context, &answer)),
        }
    }

    /// Begins to fetch a sandbox that a job has handed in.
    ///
    /// A store of several machines may not have yet what another one of them took, so its no counts only
    /// once it was repeated for a while.
    pub(crate) async fn open_sandbox(&self, id: u64, pfn: &str) -> Result<Fetched> {
        if let Some(known) = self.shelf.missed(id, pfn, self.patience()) {
            return Ok(known);
        }
        Ok(match self.open_now(pfn).await? {
            Some(open) => {
                self.shelf.came(id, pfn);
                Fetched::Open(open)
            }
            None => {
                self.shelf.miss(id, pfn);
                self.shelf.missed(id, pfn, self.patience()).unwrap_or(Fetched::Coming)
            }
        })
    }

    /// How long the store may answer that it does not have what a job has handed in. Shorter than anybody
    /// waits for the end of a log.
    fn patience(&self) -> Duration {
        (self.config.log_interval * 8).clamp(Duration::from_secs(5), Duration::from_secs(45))
    }

    async fn open_now(&self, pfn: &str) -> Result<Option<Open>> {
        let context = "fetch what the job has handed in";
        let query =
            url::form_urlencoded::Serializer::new(String::new()).append_pair("pfn", pfn).finish();
        let path = format!("api/jobs/sandbox?{query}");
        let answer = self.ask("a sandbox", || self.client.ask(Method::GET, &path)).await;
        let answer = answer.map_err(unasked(context))?;
        match answer.status {
            200..=299 => {}
            400 | 404 if answer.is_diracs() => return Ok(None),
            _ => return Err(refused(context, &answer)),
        }
        let found: Found = answer.json().map_err(nonsense(context))?;
        let request = self.client.elsewhere(Method::GET, store_url(&found.url)?);
        let failed = |error| unasked(context)(self.client.failed(error).into());
        let mut rest = request.timeout(TRANSFER).send().await.map_err(failed)?;
        match rest.status().as_u16() {
            200..=299 => {}
            status => {
                // Named by a job that never sent it, if the store says so itself.
                let said = rest.chunk().await.map_err(failed)?.unwrap_or_default();
                if status == 404 && said.windows(NO_SUCH.len()).any(|word| word == NO_SUCH) {
                    return Ok(None);
                }
                let text = format!("the store answered with {status}");
                return Err(transient(context).with_source(text));
            }
        }
        let mut head = BytesMut::new();
        while head.len() < BLOCK {
            match rest.chunk().await.map_err(failed)? {
                Some(chunk) => head.extend_from_slice(&chunk),
                None => break,
            }
        }
        Ok(Some(Open { head, rest }))
    }
}

/// How the codes begin by which S3 says that something is not there.
const NO_SUCH: &[u8] = b"<Code>NoSuch";

/// Reads an address that the server gave; it is as good as a password and never shown.
fn store_url(url: &SecretString) -> Result<Url> {
    Url::parse(url.expose_secret())
        .map_err(|error| site("use the address of the sandbox store").with_source(error))
}

impl Open {
    /// Gives the name in the first header of a tar that is not compressed.
    pub(crate) fn plain_name(&self) -> Option<String> {
        let block = self.head.get(..BLOCK)?;
        let header = tar::Header::from_byte_slice(block);
        let path = header.path().ok()?;
        (block.get(257..262) == Some(b"ustar")).then(|| path.to_string_lossy().into_owned())
    }

    /// Says whether it is compressed in the way of the helper's small ones.
    pub(crate) fn is_gzip(&self) -> bool {
        self.head.starts_with(&[0x1f, 0x8b])
    }

    /// Says whether it is compressed in one of the ways of DIRAC's own programs.
    pub(crate) fn is_diracs(&self) -> bool {
        fallback::unpacker(&self.head).is_some()
    }

    /// Reads a small sandbox to its end; nothing when it is large.
    pub(crate) async fn whole(mut self, most: u64) -> Result<Option<BytesMut>> {
        let context = "fetch what the job has handed in";
        let mut all = self.head;
        while let Some(chunk) = self
            .rest
            .chunk()
            .await
            .map_err(|error| transient(context).with_source(error.without_url()))?
        {
            all.extend_from_slice(&chunk);
            if u64::try_from(all.len()).unwrap_or(u64::MAX) > most {
                return Ok(None);
            }
        }
        Ok(Some(all))
    }

    /// Reads a small sandbox to its end; gives the name and the content of its only file.
    pub(crate) async fn small(self) -> Result<Option<(String, Bytes)>> {
        let context = "fetch what the job has handed in";
        let Some(all) = self.whole(LARGEST_PIECE).await? else { return Ok(None) };
        let unpacked = tokio::task::spawn_blocking(move || only_file(&all)).await;
        let unpacked = unpacked.map_err(|error| transient(context).with_source(error))?;
        Ok(unpacked.ok().flatten())
    }

    /// Writes it into a file as it is; gives its length.
    pub(crate) async fn save(mut self, file: std::fs::File, most: u64) -> Result<u64> {
        let context = "fetch what the job has handed in";
        let mut file = tokio::fs::File::from_std(file);
        let mut length = 0_u64;
        let mut chunk = Some(self.head.freeze());
        while let Some(bytes) = chunk {
            length += u64::try_from(bytes.len()).unwrap_or(u64::MAX);
            if length > most {
                return Err(BackendError::new(
                    ErrorKind::Rejected(Fault::Job),
                    format!("{context}: more than {most} bytes"),
                ));
            }
            let written = file.write_all(&bytes).await;
            written.map_err(|error| transient(context).with_source(error))?;
            chunk = self
                .rest
                .chunk()
                .await
                .map_err(|error| transient(context).with_source(error.without_url()))?;
        }
        file.flush().await.map_err(|error| transient(context).with_source(error))?;
        Ok(length)
    }
}

/// Unpacks a tar of one file, which may be compressed.
fn only_file(bytes: &[u8]) -> io::Result<Option<(String, Bytes)>> {
    let plain: Box<dyn io::Read + '_> = if bytes.starts_with(&[0x1f, 0x8b]) {
        Box::new(flate2::read::MultiGzDecoder::new(bytes))
    } else {
        Box::new(bytes)
    };
    let mut archive = tar::Archive::new(plain.take(LARGEST_PIECE));
    let Some(entry) = archive.entries()?.next() else { return Ok(None) };
    let mut entry = entry?;
    let name = entry.path()?.to_string_lossy().into_owned();
    let mut content = Vec::new();
    entry.read_to_end(&mut content)?;
    // Cut off at the limit, it would be a wrong piece.
    let whole = u64::try_from(content.len()).ok() == Some(entry.size());
    Ok(whole.then(|| (name, Bytes::from(content))))
}
