//! Where caches are kept between jobs: directories on this machine, and an S3 bucket behind them.
//!
//! A cache is an archive under a project's key. Here it is bytes in a file; what is in it, and which job
//! may have it, is [`crate::job`]'s matter. Names and layout are gitlab-runner's, so that a site's
//! caches outlive the change to bridge.
//!
//! # What holds
//!
//! * A name never leads out of its project's directory: [`Key`] cannot be made otherwise.
//! * An archive is written beside its name and then takes it. Whoever reads has an open file, so neither
//!   a newer archive nor an eviction takes it away under the reader. No links are needed.
//! * What is lost is a cache, never a job: every error here is one to warn of.
//! * Of a bucket there is a copy on this machine, which serves when the bucket has nothing newer or
//!   cannot be asked.

mod key;
mod local;
mod s3;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use camino::{Utf8Path, Utf8PathBuf};
use jiff::Timestamp;

use self::local::{Entry, Local, Room, Stamp};
use self::s3::{Fetched, S3};
use crate::domain::clock::Clock;

pub use self::key::{Key, clean, shown};
pub use self::local::{Draft, Swept};
pub use self::s3::{Encryption, S3Error, S3Settings};

/// What an operator says about caches in `[runners.cache]`.
#[derive(Clone, Debug, Default)]
pub struct CacheSettings {
    /// `quota`: the bytes that all caches in the directory may take together; no limit without it.
    pub quota: Option<u64>,
    /// `max_age`: how long a cache is kept that nobody uses; for ever without it.
    pub max_age: Option<Duration>,
    /// `MaxUploadedArchiveSize`: larger archives stay on this machine; no limit without it.
    pub max_uploaded: Option<u64>,
    /// `[runners.cache.s3]`: the bucket; none for `Type = "local"`.
    pub s3: Option<S3Settings>,
}

/// Whose caches they are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Project {
    /// The project's path, which names its directory.
    pub path: Utf8PathBuf,
    /// Its number, which names it in a bucket.
    pub id: i64,
    /// The GitLab server.
    pub server: String,
    /// The beginning of the runner's token, which names the runner in a bucket.
    pub runner: String,
}

impl Project {
    fn owner(&self) -> String {
        format!("{}#{}", self.server, self.id)
    }
}

/// Takes what a person should read about a cache.
pub trait Voice: Send {
    /// Says what is being done.
    fn notice(&mut self, text: &str);
    /// Says what did not go as it should.
    fn warning(&mut self, text: &str);
}

/// Why a cache was not read or kept. It never fails a job.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// A file or directory of the local store could not be used.
    #[error("cannot {action} {path}")]
    Local {
        /// What was tried.
        action: &'static str,
        /// The file or directory.
        path: Utf8PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// The bucket did not do it.
    #[error("the cache's bucket cannot be used")]
    S3(#[from] S3Error),
    /// It took longer than `CACHE_REQUEST_TIMEOUT`.
    #[error("the transfer took longer than the {} min of CACHE_REQUEST_TIMEOUT", .0.as_secs() / 60)]
    TimedOut(Duration),
    /// A thread of ours failed.
    #[error("the work was given up")]
    Panicked(#[source] tokio::task::JoinError),
}

/// An archive, open for reading: it stays whole whatever happens to its name.
#[derive(Debug)]
pub struct Archive {
    /// The archive.
    pub file: File,
    /// How large it is.
    pub bytes: u64,
}

/// What is known of the archive that a key has on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Current {
    /// When the files in it were looked at.
    pub modified: Timestamp,
    /// The names and sizes in it, digested; not known of archives that others made.
    pub entries: Option<String>,
}

/// What became of a new archive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// The next job will find it.
    Yes,
    /// It is larger than all caches together may be.
    TooLarge {
        /// The archive's size.
        bytes: u64,
        /// `quota`.
        quota: u64,
    },
}

/// The caches of a runner.
#[derive(Debug)]
pub struct CacheStore {
    local: Arc<Local>,
    s3: Option<S3>,
    max_uploaded: Option<u64>,
    clock: Arc<dyn Clock>,
}

impl CacheStore {
    /// Gives the caches below `dir`; nothing is read or made yet.
    ///
    /// # Errors
    ///
    /// When no connection could ever be opened with these settings.
    pub fn open(
        dir: &Utf8Path,
        settings: &CacheSettings,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, CacheError> {
        let s3 = settings.s3.as_ref().map(S3::new).transpose()?;
        Ok(Self {
            local: Arc::new(Local::new(dir.to_owned(), settings.quota, settings.max_age)),
            s3,
            max_uploaded: settings.max_uploaded.filter(|limit| *limit > 0),
            clock,
        })
    }

    /// Gives the time by which archives are dated.
    pub fn now(&self) -> Timestamp {
        self.clock.now()
    }

    /// Looks for a key's archive; `None` where there is none. Transfers take `limit` at most, all
    /// attempts together.
    ///
    /// # Errors
    ///
    /// When it could not be found out, or the archive not be brought.
    pub async fn fetch(
        &self,
        project: &Project,
        key: &Key,
        limit: Duration,
        voice: &mut (dyn Voice + Send),
    ) -> Result<Option<Archive>, CacheError> {
        let local = self.entry(project, key).await;
        let Some(s3) = &self.s3 else {
            voice.notice(
                "No URL provided, cache will not be downloaded from shared cache server. Instead a \
                 local version of cache will be extracted.",
            );
            return Ok(local?.map(Entry::into_archive));
        };
        let local = match local {
            Ok(local) => local,
            Err(error) => {
                voice.warning(&chain(&error));
                None
            }
        };
        let known = local.as_ref().and_then(|entry| entry.meta.etag.as_deref());
        let work = self.download(s3, project, key, known, limit, voice);
        match tokio::time::timeout(limit, work).await.unwrap_or(Err(CacheError::TimedOut(limit))) {
            Ok(Download::Archive(archive)) => Ok(Some(archive)),
            Ok(Download::Unchanged) => {
                voice.notice("cache.zip is up to date");
                Ok(local.map(Entry::into_archive))
            }
            // One that never got there is only here. One that did has been deleted there.
            Ok(Download::None) => Ok(local.filter(|e| e.meta.etag.is_none()).map(|entry| {
                voice.notice("The bucket has no such cache; the one of this machine is extracted.");
                entry.into_archive()
            })),
            Err(error) => match local {
                Some(entry) => {
                    voice.warning(&chain(&error));
                    voice.warning("the copy on this machine is extracted, which may be older");
                    Ok(Some(entry.into_archive()))
                }
                None => Err(error),
            },
        }
    }

    async fn download(
        &self,
        s3: &S3,
        project: &Project,
        key: &Key,
        known: Option<&str>,
        limit: Duration,
        voice: &mut (dyn Voice + Send),
    ) -> Result<Download, CacheError> {
        let object = s3.object(project, key);
        let now = || self.clock.now();
        let mut attempt = 1;
        loop {
            let draft = self.draft(project, key).await?;
            let into = draft.writer()?;
            let fetched = match s3.get(&object, known, into, now(), limit, voice).await {
                Ok(fetched) => fetched,
                Err(error) => {
                    s3.pause_or_give_up(error, &mut attempt, voice).await?;
                    continue;
                }
            };
            let (etag, modified, headers) = match fetched {
                Fetched::NotModified => return Ok(Download::Unchanged),
                Fetched::Missing => return Ok(Download::None),
                Fetched::Object { etag, modified, key, entries } => {
                    (etag, modified, (key, entries))
                }
            };
            let archive = draft.archive()?;
            let (named, entries) = headers;
            let meta = local::Meta {
                cachekey: named.unwrap_or_else(|| key.readable().to_owned()),
                owner: Some(project.owner()),
                entries,
                etag,
                archive: None,
            };
            let modified = modified.unwrap_or_else(now);
            // The archive is here and can be used; that it cannot be kept is for the next job to know.
            match self.commit(project, key, draft, meta, modified).await {
                Ok(Kept::Yes) => {}
                Ok(Kept::TooLarge { bytes, quota }) => voice.notice(&not_kept(bytes, quota)),
                Err(error) => voice.warning(&chain(&error)),
            }
            return Ok(Download::Archive(archive));
        }
    }

    /// Says what is known of the archive that a key has on this machine.
    ///
    /// # Errors
    ///
    /// When it cannot be read.
    pub async fn current(
        &self,
        project: &Project,
        key: &Key,
    ) -> Result<Option<Current>, CacheError> {
        let entry = self.entry(project, key).await?;
        Ok(entry.map(|entry| Current { modified: entry.modified, entries: entry.meta.entries }))
    }

    /// Makes room for a new archive: a file beside the name it will have, gone if it is dropped.
    ///
    /// # Errors
    ///
    /// When there is no directory to be had, or no file in it.
    pub async fn draft(&self, project: &Project, key: &Key) -> Result<Draft, CacheError> {
        let (local, project, key) = (Arc::clone(&self.local), project.clone(), key.clone());
        blocking(move || local.draft(&project, &key)).await
    }

    /// Gives a new archive its name, and uploads it. `modified` is when its files were looked at,
    /// `entries` digests their names and sizes.
    ///
    /// # Errors
    ///
    /// When it could not be kept here, or not be uploaded.
    pub async fn keep(
        &self,
        project: &Project,
        key: &Key,
        draft: Draft,
        (modified, entries): (Timestamp, String),
        limit: Duration,
        voice: &mut (dyn Voice + Send),
    ) -> Result<Kept, CacheError> {
        let archive = draft.archive()?;
        let mut meta = local::Meta {
            cachekey: key.readable().to_owned(),
            owner: Some(project.owner()),
            entries: Some(entries),
            etag: None,
            archive: None,
        };
        let kept = self.commit(project, key, draft, meta.clone(), modified).await;
        let Some(s3) = &self.s3 else {
            voice.notice(
                "No URL provided, cache will not be uploaded to shared cache server. Cache will be \
                 stored only locally.",
            );
            return kept;
        };
        // The bucket may have room where this machine has none.
        match &kept {
            Ok(Kept::Yes) => {}
            Ok(Kept::TooLarge { bytes, quota }) => voice.notice(&not_kept(*bytes, *quota)),
            Err(error) => voice.warning(&chain(error)),
        }
        if let Some(etag) = self.upload(s3, project, key, &archive, &meta, limit, voice).await?
            && matches!(kept, Ok(Kept::Yes))
        {
            meta.etag = Some(etag);
            self.remember(project, key, meta, stamp(&archive, modified), voice).await;
        }
        Ok(Kept::Yes)
    }

    /// Sees to it that the bucket has the archive of this machine, which needs no renewal itself.
    ///
    /// # Errors
    ///
    /// When the bucket cannot be asked or does not take it.
    pub async fn refresh(
        &self,
        project: &Project,
        key: &Key,
        limit: Duration,
        voice: &mut (dyn Voice + Send),
    ) -> Result<(), CacheError> {
        let Some(s3) = &self.s3 else { return Ok(()) };
        let Some(entry) = self.entry(project, key).await? else { return Ok(()) };
        // Known to have got there; whether it still is there the next restore will tell.
        if entry.meta.etag.is_some() {
            return Ok(());
        }
        let (mut meta, modified) = (entry.meta.clone(), entry.modified);
        let archive = entry.into_archive();
        let object = s3.object(project, key);
        let theirs = async { Ok(s3.age(&object, self.clock.now(), limit, voice).await?) };
        let theirs = tokio::time::timeout(limit, theirs)
            .await
            .unwrap_or(Err(CacheError::TimedOut(limit)))?;
        let ours = self.clock.now().duration_since(modified);
        // Ages rather than times: the two clocks need not agree.
        if theirs.is_some_and(|theirs| theirs <= ours) {
            voice.notice("The bucket's archive is not older; it is not uploaded again.");
            return Ok(());
        }
        if let Some(etag) = self.upload(s3, project, key, &archive, &meta, limit, voice).await? {
            meta.etag = Some(etag);
            self.remember(project, key, meta, stamp(&archive, modified), voice).await;
        }
        Ok(())
    }

    /// Removes what is too old, what is too much, and what ended writers left behind.
    ///
    /// # Errors
    ///
    /// When the directory cannot be read.
    pub async fn sweep(&self) -> Result<Swept, CacheError> {
        let (local, now) = (Arc::clone(&self.local), self.clock.now());
        blocking(move || local.sweep(now, &Room::default())).await
    }

    #[expect(clippy::too_many_arguments, reason = "one call's worth of context, used twice")]
    async fn upload(
        &self,
        s3: &S3,
        project: &Project,
        key: &Key,
        archive: &Archive,
        meta: &local::Meta,
        limit: Duration,
        voice: &mut (dyn Voice + Send),
    ) -> Result<Option<String>, CacheError> {
        if let Some(most) = self.max_uploaded.filter(|most| archive.bytes > *most) {
            voice.notice(&format!(
                "Cache archive size ({}) is too big (Limit is set to {most}). Cache will be stored \
                 only locally.",
                archive.bytes
            ));
            return Ok(None);
        }
        let object = s3.object(project, key);
        let work = s3.put(&object, archive, meta, &*self.clock, limit, voice);
        match tokio::time::timeout(limit, work).await {
            Ok(etag) => Ok(Some(etag?)),
            Err(_elapsed) => Err(CacheError::TimedOut(limit)),
        }
    }

    async fn entry(&self, project: &Project, key: &Key) -> Result<Option<Entry>, CacheError> {
        let (local, now) = (Arc::clone(&self.local), self.clock.now());
        let (project, key) = (project.clone(), key.clone());
        blocking(move || local.entry(&project, &key, now)).await
    }

    async fn commit(
        &self,
        project: &Project,
        key: &Key,
        draft: Draft,
        meta: local::Meta,
        modified: Timestamp,
    ) -> Result<Kept, CacheError> {
        let (local, now) = (Arc::clone(&self.local), self.clock.now());
        let (project, key) = (project.clone(), key.clone());
        blocking(move || local.commit(&project, &key, draft, meta, modified, now)).await
    }

    /// Notes that an archive is in the bucket; without the note it is merely asked for again.
    async fn remember(
        &self,
        project: &Project,
        key: &Key,
        meta: local::Meta,
        stamp: Stamp,
        voice: &mut (dyn Voice + Send),
    ) {
        let (local, project, key) = (Arc::clone(&self.local), project.clone(), key.clone());
        let noted = blocking(move || local.write_meta(&project, &key, meta, stamp)).await;
        if let Err(error) = noted {
            voice.warning(&chain(&error));
        }
    }
}

enum Download {
    Archive(Archive),
    Unchanged,
    None,
}

fn stamp(archive: &Archive, modified: Timestamp) -> Stamp {
    Stamp { bytes: archive.bytes, modified: modified.as_second() }
}

fn not_kept(bytes: u64, quota: u64) -> String {
    format!(
        "the archive is not kept on this machine: it takes {bytes} bytes, and all caches together \
         may take {quota}"
    )
}

/// Writes an error and its causes in one line.
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, CacheError> + Send + 'static,
) -> Result<T, CacheError> {
    tokio::task::spawn_blocking(work).await.map_err(CacheError::Panicked)?
}
