//! Caches as directories: `<cache_dir>/<project>/<key>/cache.zip`, and `metadata.json` beside it.
//!
//! Two files cannot take their names in one step, so the second one says which first one it is about
//! ([`Stamp`]). Where the two disagree, because two jobs wrote at once or one was killed in between,
//! the archive is as good as ever, and what is told about it does not count.
//!
//! The time of `metadata.json` is when the cache was last used.

use std::fs::{self, File, FileTimes, Metadata};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::Path;
use std::time::{Duration, SystemTime};

use camino::{Utf8Path, Utf8PathBuf};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tempfile::NamedTempFile;

use super::key::{ARCHIVE, METADATA, TEMPORARY};
use super::{Archive, CacheError, Kept, Key, Project};

/// After this long a file that is being written is one that nobody writes any more.
const ABANDONED: Duration = Duration::from_secs(24 * 3600);

/// How often an eviction may take away the directory that a writer has just made.
const ATTEMPTS: usize = 5;

/// `metadata.json`; the first field is gitlab-runner's, which reads no other.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Meta {
    /// The key as people wrote it.
    #[serde(default)]
    pub(super) cachekey: String,
    /// Whose cache it is; archives of other programs do not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) owner: Option<String>,
    /// The names and sizes in it, digested.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) entries: Option<String>,
    /// What the bucket calls this very content.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) etag: Option<String>,
    /// Which archive this is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) archive: Option<Stamp>,
}

/// Tells one archive of a key from the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Stamp {
    /// Its size.
    pub(super) bytes: u64,
    /// Its time in whole seconds, which every file system keeps.
    pub(super) modified: i64,
}

/// An archive on this machine.
#[derive(Debug)]
pub(super) struct Entry {
    file: File,
    bytes: u64,
    pub(super) modified: Timestamp,
    pub(super) meta: Meta,
}

impl Entry {
    pub(super) fn into_archive(self) -> Archive {
        Archive { file: self.file, bytes: self.bytes }
    }
}

/// An archive that is being written; gone with this value unless it was given its name.
#[derive(Debug)]
pub struct Draft {
    file: NamedTempFile,
}

impl Draft {
    /// Gives the file to write to.
    ///
    /// # Errors
    ///
    /// When this process has too many files open.
    pub fn writer(&self) -> Result<File, CacheError> {
        self.file.as_file().try_clone().map_err(at("open", self.path()))
    }

    /// Gives what was written, to be read whatever becomes of the name.
    pub(super) fn archive(&self) -> Result<Archive, CacheError> {
        // Opened anew: a clone would share its position with the writer.
        let file = self.file.reopen().map_err(at("open", self.path()))?;
        let bytes = file.metadata().map_err(at("look at", self.path()))?.len();
        Ok(Archive { file, bytes })
    }

    fn path(&self) -> &Path {
        self.file.path()
    }
}

/// What a sweep did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Caches removed, because of their age or because of the quota.
    pub removed: usize,
    /// Bytes that went with them.
    pub freed: u64,
    /// Bytes of the caches that are left.
    pub left: u64,
}

/// What a sweep makes room for.
#[derive(Debug, Default)]
pub(super) struct Room {
    /// Bytes that come.
    bytes: u64,
    /// Whose place they take.
    instead_of: Option<Utf8PathBuf>,
}

/// One cache as a sweep finds it.
struct Found {
    dir: std::path::PathBuf,
    used: SystemTime,
    bytes: u64,
    archive: (u64, SystemTime),
}

/// The local store.
#[derive(Debug)]
pub(super) struct Local {
    root: Utf8PathBuf,
    quota: Option<u64>,
    max_age: Option<Duration>,
}

impl Local {
    pub(super) fn new(root: Utf8PathBuf, quota: Option<u64>, max_age: Option<Duration>) -> Self {
        Self { root, quota, max_age }
    }

    fn dir(&self, project: &Project, key: &Key) -> Utf8PathBuf {
        // Both were made of clean parts; cleaned again, since this is the last place that can.
        let below = super::clean(&format!("{}/{}", project.path, key.path()));
        self.root.join(below)
    }

    /// Opens a key's archive and notes that it was used.
    pub(super) fn entry(
        &self,
        project: &Project,
        key: &Key,
        now: Timestamp,
    ) -> Result<Option<Entry>, CacheError> {
        let dir = self.dir(project, key);
        let path = dir.join(ARCHIVE);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if is_absence(&error) => return Ok(None),
            Err(error) => return Err(at("open", path.as_std_path())(error)),
        };
        let status = file.metadata().map_err(at("look at", path.as_std_path()))?;
        if !status.is_file() {
            return Err(at("use", path.as_std_path())(io::Error::other("it is no file")));
        }
        let mut meta = read_meta(&dir.join(METADATA));
        if meta.owner.as_ref().is_some_and(|owner| *owner != project.owner()) {
            // Another project had this path before, or has it on another server.
            return Ok(None);
        }
        let bytes = status.len();
        let modified = timestamp(&status, now);
        if meta.archive != Some(Stamp { bytes, modified: modified.as_second() }) {
            meta = Meta { cachekey: meta.cachekey, owner: meta.owner, ..Meta::default() };
        }
        touch(&dir.join(METADATA), now);
        Ok(Some(Entry { file, bytes, modified, meta }))
    }

    /// Makes a file in the directory of a key.
    pub(super) fn draft(&self, project: &Project, key: &Key) -> Result<Draft, CacheError> {
        let dir = self.dir(project, key);
        with_dir(&dir, || temporary(&dir))
            .map(|file| Draft { file })
            .map_err(at_utf8("write in", &dir))
    }

    /// Gives an archive its name; the one that had it before is gone then.
    pub(super) fn commit(
        &self,
        project: &Project,
        key: &Key,
        draft: Draft,
        meta: Meta,
        modified: Timestamp,
        now: Timestamp,
    ) -> Result<Kept, CacheError> {
        let dir = self.dir(project, key);
        let path = dir.join(ARCHIVE);
        let file = draft.file.as_file();
        let bytes = file.metadata().map_err(at("look at", draft.path()))?.len();
        if let Some(quota) = self.quota.filter(|quota| bytes > *quota) {
            return Ok(Kept::TooLarge { bytes, quota });
        }
        if self.quota.is_some() || self.max_age.is_some() {
            let room = Room { bytes, instead_of: Some(dir.clone()) };
            if let Err(error) = self.sweep(now, &room) {
                tracing::warn!(error = %super::chain(&error), "caches not swept");
            }
        }
        let stamp = Stamp { bytes, modified: modified.as_second() };
        file.set_modified(SystemTime::from(modified)).map_err(at("date", draft.path()))?;
        file.sync_all().map_err(at("write", draft.path()))?;
        draft.file.persist(&path).map_err(|e| at("write", path.as_std_path())(e.error))?;
        self.write_meta(project, key, meta, stamp)?;
        touch(&dir.join(METADATA), now);
        sync_dir(&dir).map_err(at_utf8("write", &dir))?;
        Ok(Kept::Yes)
    }

    /// Says something about the archive with this stamp.
    pub(super) fn write_meta(
        &self,
        project: &Project,
        key: &Key,
        meta: Meta,
        stamp: Stamp,
    ) -> Result<(), CacheError> {
        let dir = self.dir(project, key);
        let path = dir.join(METADATA);
        let write = || -> io::Result<()> {
            let mut file = temporary(&dir)?;
            serde_json::to_writer(&mut file, &Meta { archive: Some(stamp), ..meta })?;
            file.as_file().sync_all()?;
            file.persist(&path).map_err(|error| error.error)?;
            Ok(())
        };
        write().map_err(at_utf8("write", &path))
    }

    /// Removes caches that are too old, then the least recently used ones until the rest fits.
    pub(super) fn sweep(&self, now: Timestamp, room: &Room) -> Result<Swept, CacheError> {
        let mut found = Vec::new();
        let now = SystemTime::from(now);
        let instead_of = room.instead_of.as_deref().map(Utf8Path::as_std_path);
        let mut todo = vec![self.root.clone().into_std_path_buf()];
        while let Some(dir) = todo.pop() {
            match look(&dir, now, &mut todo) {
                Ok(cache) => found.extend(cache.filter(|c| Some(c.dir.as_path()) != instead_of)),
                // Another sweep was faster.
                Err(error) if is_absence(&error) => {}
                Err(error) if todo.is_empty() && found.is_empty() => {
                    return Err(at("read", &dir)(error));
                }
                Err(error) => tracing::warn!(dir = %dir.display(), %error, "cache not swept"),
            }
        }
        found.sort_by(|a, b| a.used.cmp(&b.used).then_with(|| a.dir.cmp(&b.dir)));
        let mut swept =
            Swept { left: found.iter().map(|cache| cache.bytes).sum(), ..Swept::default() };
        for cache in found {
            let age = now.duration_since(cache.used).unwrap_or_default();
            let too_old = self.max_age.is_some_and(|most| age > most);
            let too_much =
                self.quota.is_some_and(|quota| swept.left.saturating_add(room.bytes) > quota);
            if (too_old || too_much) && remove(&cache, &self.root) {
                swept.removed += 1;
                swept.freed += cache.bytes;
                swept.left -= cache.bytes;
            }
        }
        Ok(swept)
    }
}

/// Looks at one directory: what cache it is, and which directories are below it.
fn look(
    dir: &Path,
    now: SystemTime,
    todo: &mut Vec<std::path::PathBuf>,
) -> io::Result<Option<Found>> {
    let mut archive = None;
    let mut meta: Option<Metadata> = None;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        // Links are neither followed nor ours.
        let status = match entry.metadata() {
            Ok(status) => status,
            Err(error) if is_absence(&error) => continue,
            Err(error) => return Err(error),
        };
        if status.is_dir() {
            todo.push(entry.path());
        } else if !status.is_file() {
        } else if name == ARCHIVE {
            archive = Some(status);
        } else if name == METADATA {
            meta = Some(status);
        } else if name.as_encoded_bytes().starts_with(TEMPORARY.as_bytes()) {
            let idle = now.duration_since(status.modified()?).unwrap_or_default();
            if idle > ABANDONED {
                fs::remove_file(entry.path())?;
            }
        }
    }
    let Some(archive) = archive else { return Ok(None) };
    let modified = archive.modified()?;
    let used = match &meta {
        Some(meta) => meta.modified()?.max(modified),
        None => modified,
    };
    let bytes = archive.len() + meta.map_or(0, |meta| meta.len());
    Ok(Some(Found { dir: dir.to_owned(), used, bytes, archive: (archive.ino(), modified) }))
}

/// Removes a cache unless it is another one by now; says whether it is gone.
fn remove(cache: &Found, root: &Utf8Path) -> bool {
    let path = cache.dir.join(ARCHIVE);
    let work = || -> io::Result<bool> {
        let status = fs::symlink_metadata(&path)?;
        if (status.ino(), status.modified()?) != cache.archive {
            return Ok(false);
        }
        fs::remove_file(&path)?;
        match fs::remove_file(cache.dir.join(METADATA)) {
            Err(error) if !is_absence(&error) => return Err(error),
            Ok(()) | Err(_) => {}
        }
        Ok(true)
    };
    match work() {
        Ok(true) => {}
        Ok(false) => return false,
        Err(error) if is_absence(&error) => return true,
        Err(error) => {
            tracing::warn!(cache = %path.display(), %error, "cache not removed");
            return false;
        }
    }
    // Up to the first directory that something else is in.
    let mut dir = cache.dir.as_path();
    while dir != root.as_std_path() && fs::remove_dir(dir).is_ok() {
        match dir.parent() {
            Some(parent) => dir = parent,
            None => break,
        }
    }
    true
}

/// Does something in a directory that is made if need be, also if a sweep removes it meanwhile.
fn with_dir<T>(dir: &Utf8Path, work: impl Fn() -> io::Result<T>) -> io::Result<T> {
    let mut attempt = 1;
    loop {
        let result =
            fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).and_then(|()| work());
        match result {
            Err(error) if error.kind() == io::ErrorKind::NotFound && attempt < ATTEMPTS => {
                attempt += 1;
            }
            result => return result,
        }
    }
}

/// Makes a file that only its owner may read; the crate removes it if it keeps its name.
fn temporary(dir: &Utf8Path) -> io::Result<NamedTempFile> {
    tempfile::Builder::new().prefix(TEMPORARY).suffix(".tmp").tempfile_in(dir)
}

/// Reads what is told about an archive; nothing where there is nothing that can be read.
fn read_meta(path: &Utf8Path) -> Meta {
    let text = match fs::read(path) {
        Ok(text) => text,
        Err(error) => {
            if !is_absence(&error) {
                tracing::debug!(%path, %error, "a cache's metadata not read");
            }
            return Meta::default();
        }
    };
    serde_json::from_slice(&text).unwrap_or_else(|error| {
        tracing::debug!(%path, %error, "a cache's metadata not understood");
        Meta::default()
    })
}

/// Notes that a cache was used; one that cannot be noted is merely removed earlier.
fn touch(path: &Utf8Path, now: Timestamp) {
    let now = SystemTime::from(now);
    let times = FileTimes::new().set_modified(now).set_accessed(now);
    let touched = File::open(path).and_then(|file| file.set_times(times));
    if let Err(error) = touched {
        tracing::debug!(%path, %error, "a cache's last use not noted");
    }
}

/// Makes a new name durable, where the file system knows how.
fn sync_dir(dir: &Utf8Path) -> io::Result<()> {
    match File::open(dir).and_then(|dir| dir.sync_all()) {
        Err(error)
            if matches!(error.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported) =>
        {
            Ok(())
        }
        result => result,
    }
}

fn is_absence(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

fn timestamp(status: &Metadata, otherwise: Timestamp) -> Timestamp {
    status.modified().ok().and_then(|time| Timestamp::try_from(time).ok()).unwrap_or(otherwise)
}

fn at(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CacheError + use<> {
    let path = Utf8PathBuf::from(path.to_string_lossy().into_owned());
    move |source| CacheError::Local { action, path, source }
}

fn at_utf8(action: &'static str, path: &Utf8Path) -> impl FnOnce(io::Error) -> CacheError + use<> {
    at(action, path.as_std_path())
}
