//! Caches of a job: which ones, under which keys, brought before the script and taken after it.
//!
//! The order of things and the words are gitlab-runner's (`shells/abstract.go`,
//! `commands/helpers/cache_archiver.go` and `cache_extractor.go`). A cache that cannot be read or written is
//! a warning in the trace. Only a policy that nobody knows makes a stage fail.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use camino::Utf8PathBuf;
use jiff::Timestamp;

use super::hands::{self, Looked};
use super::settings::Settings;
use super::sources::{Output, StageError, Tone};
use super::variables::Variables;
use super::{Plan, RunnerContext, paths, untracked};
use crate::archive::{self, ArchiveError, Bounds, Format, Level, Selection, Wanted};
use crate::cache::{self, Archive, CacheStore, Kept, Key, Project, Voice, chain, clean, shown};
use crate::gitlab::wire::{Cache, JobPayload};

const RESTORE: &str = "restore_cache";
const ARCHIVE: &str = "archive_cache";
const ARCHIVE_ON_FAILURE: &str = "archive_cache_on_failure";

/// How a job's script ended, as `when` asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// It succeeded.
    Succeeded,
    /// It failed, took too long, or was cancelled and had time to end by itself.
    Failed,
}

/// What may be done with a cache.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Policy {
    PullPush,
    Pull,
    Push,
    Unknown(String),
}

/// One entry of the payload, ready to be used.
#[derive(Clone, Debug)]
struct Wish {
    /// `None` where nothing is left of the key.
    key: Option<Key>,
    /// What the author should read about the key.
    warnings: Vec<String>,
    /// Keys to try in turn where the first has nothing.
    fallback: Vec<Key>,
    /// What the author should read about these.
    fallback_remarks: Vec<(Tone, String)>,
    paths: Vec<String>,
    untracked: bool,
    policy: Policy,
    on_success: bool,
    on_failure: bool,
}

/// The caches of a job and how they are handled.
#[derive(Clone, Debug)]
pub(super) struct Caches {
    wishes: Vec<Wish>,
    project: Project,
    attempts: u32,
    transfer_limit: Duration,
    format: Format,
    level: Level,
}

impl Caches {
    /// Reads the payload.
    pub(super) fn of(
        payload: &JobPayload,
        runner: &RunnerContext,
        settings: &Settings,
        variables: &Variables,
    ) -> Self {
        let names = Names { payload, variables, settings };
        let path = paths::project_path(payload.git_info.repo_url.expose(), settings.git_strategy);
        let id = payload.job_info.project_id;
        Self {
            wishes: payload
                .cache
                .iter()
                .filter(|cache| !cache.paths.is_empty() || cache.untracked)
                .map(|cache| names.wish(cache))
                .collect(),
            project: Project {
                path: path
                    .ok()
                    .flatten()
                    .map_or_else(|| format!("project-{id}").into(), Utf8PathBuf::from),
                id,
                server: runner.url.as_str().trim_end_matches('/').to_owned(),
                runner: runner.short_token.clone(),
            },
            attempts: settings.restore_cache_attempts,
            transfer_limit: settings.cache_request_timeout,
            format: settings.cache_compression_format,
            level: settings.cache_compression_level,
        }
    }
}

impl Caches {
    /// Gives what is kept in any case that can happen: paths, and whether untracked files too.
    pub(super) fn kept(&self) -> impl Iterator<Item = (&[String], bool)> {
        let kept = self.wishes.iter().filter(|wish| wish.policy != Policy::Pull);
        kept.map(|wish| (wish.paths.as_slice(), wish.untracked))
    }
}

/// Makes keys.
struct Names<'a> {
    payload: &'a JobPayload,
    variables: &'a Variables,
    settings: &'a Settings,
}

impl Names<'_> {
    fn wish(&self, cache: &Cache) -> Wish {
        let mut warnings = Vec::new();
        let raw = if cache.key.is_empty() {
            clean(&format!("{}/{}", self.payload.job_info.name, self.payload.git_info.reference))
        } else {
            self.variables.expand(&cache.key)
        };
        let key = self.key(&raw, &mut warnings);
        let mut fallback = Vec::new();
        let mut fallback_remarks = Vec::new();
        for raw in &cache.fallback_keys {
            let raw = self.variables.expand(raw);
            fallback.extend(self.fallback(&raw, false, &mut fallback_remarks));
        }
        let raw = self.settings.cache_fallback_key.as_deref().unwrap_or_default();
        let raw = self.variables.expand(raw);
        fallback.extend(self.fallback(&raw, true, &mut fallback_remarks));
        let mut seen: Vec<Key> = key.iter().cloned().collect();
        fallback.retain(|key| {
            let new = !seen.contains(key);
            seen.push(key.clone());
            new
        });
        Wish {
            key,
            warnings,
            fallback,
            fallback_remarks,
            paths: cache.paths.iter().map(|path| self.variables.expand(path)).collect(),
            untracked: cache.untracked,
            policy: match self.variables.expand(&cache.policy).as_str() {
                "" | "pull-push" => Policy::PullPush,
                "pull" => Policy::Pull,
                "push" => Policy::Push,
                other => Policy::Unknown(other.to_owned()),
            },
            on_success: matches!(cache.when.as_str(), "" | "on_success" | "always"),
            on_failure: matches!(cache.when.as_str(), "on_failure" | "always"),
        }
    }

    /// Makes a key, and says where it is not what was written.
    fn key(&self, raw: &str, warnings: &mut Vec<String>) -> Option<Key> {
        if self.settings.flag("FF_HASH_CACHE_KEYS") {
            return Key::hashed(raw);
        }
        let key = Key::sanitized(raw);
        match &key {
            Some(key) if key.readable() != raw => {
                warnings.push(format!("cache key {raw:?} sanitized to {:?}", key.readable()));
            }
            None if !raw.is_empty() => {
                warnings.push(format!("cache key {raw:?} could not be sanitized"));
            }
            Some(_) | None => {}
        }
        key
    }

    /// Makes a key to fall back on; one from a variable of the job must not be one of protected refs.
    fn fallback(
        &self,
        raw: &str,
        by_variable: bool,
        remarks: &mut Vec<(Tone, String)>,
    ) -> Option<Key> {
        if raw.is_empty() {
            return None;
        }
        let mut warnings = Vec::new();
        let key = self.key(raw, &mut warnings);
        remarks.extend(warnings.into_iter().map(|text| (Tone::Warning, text)));
        match key {
            Some(key) if by_variable && !key.may_be_named_by_a_job() => {
                let text = format!(
                    "CACHE_FALLBACK_KEY {:?} not allowed to end in \"-protected\" or in what could \
                     stand for such a key",
                    key.readable()
                );
                remarks.push((Tone::Warning, text));
                None
            }
            None => {
                let text = "Skipping cache extraction due to empty cache key".to_owned();
                remarks.push((Tone::Notice, text));
                None
            }
            key => key,
        }
    }
}

impl Wish {
    /// Says whether the policy allows something, and fails the stage if it makes no sense.
    fn allows(&self, wanted: &Policy, stage: &'static str) -> Result<bool, StageError> {
        match &self.policy {
            Policy::PullPush => Ok(true),
            Policy::Pull | Policy::Push => Ok(self.policy == *wanted),
            Policy::Unknown(policy) => {
                let of = self.key.as_ref().map(|key| format!(" for {key}")).unwrap_or_default();
                let detail = format!("unknown cache policy {}{of}", shown(policy));
                Err(StageError::Broken { stage, detail })
            }
        }
    }

    fn is_due(&self, ended: Ended) -> bool {
        match ended {
            Ended::Succeeded => self.on_success,
            Ended::Failed => self.on_failure,
        }
    }
}

/// How the search for one cache ended.
enum Search {
    /// An archive was extracted, or there is none.
    Over,
    /// Something stood in the way that may not do so again.
    Hindered,
}

impl Plan {
    /// Says whether there is anything to restore; without it the stage has no section.
    pub fn restores_caches(&self) -> bool {
        !self.caches.wishes.is_empty()
    }

    /// Says whether there is anything to archive after a script that ended so.
    pub fn archives_caches(&self, ended: Ended) -> bool {
        self.caches.wishes.iter().any(|wish| wish.is_due(ended))
    }

    /// Names the stage of [`Plan::archive_cache`].
    pub fn archive_stage(ended: Ended) -> &'static str {
        match ended {
            Ended::Succeeded => ARCHIVE,
            Ended::Failed => ARCHIVE_ON_FAILURE,
        }
    }

    /// Brings the job's caches into its checkout. It may be begun again at any time.
    ///
    /// # Errors
    ///
    /// When a policy is not known. Whatever else goes wrong is said in the trace.
    pub async fn restore_cache(
        &self,
        store: &CacheStore,
        out: &mut (dyn Output + Send),
    ) -> Result<(), StageError> {
        for wish in &self.caches.wishes {
            for text in &wish.warnings {
                out.remark(Tone::Warning, text);
            }
            let Some(key) = &wish.key else {
                out.remark(Tone::Notice, "Skipping cache extraction due to empty cache key");
                continue;
            };
            if !wish.allows(&Policy::Pull, RESTORE)? {
                let text = format!("Not downloading cache {key} due to policy");
                out.remark(Tone::Notice, &text);
                continue;
            }
            for (tone, text) in &wish.fallback_remarks {
                out.remark(*tone, text);
            }
            let mut attempt = 1;
            while let Search::Hindered = self.search(store, wish, key, out).await {
                if attempt >= self.caches.attempts {
                    break;
                }
                attempt += 1;
                let pause = self.settings.pause_before(attempt);
                let text = format!(
                    "attempt {attempt} of {} to restore the cache follows in {} s",
                    self.caches.attempts,
                    pause.as_secs()
                );
                out.remark(Tone::Warning, &text);
                tokio::time::sleep(pause).await;
            }
        }
        Ok(())
    }

    /// Packs the job's caches and keeps them. It may be begun again at any time.
    ///
    /// # Errors
    ///
    /// When a policy is not known. Whatever else goes wrong is said in the trace.
    pub async fn archive_cache(
        &self,
        store: &CacheStore,
        ended: Ended,
        out: &mut (dyn Output + Send),
    ) -> Result<(), StageError> {
        for wish in self.caches.wishes.iter().filter(|wish| wish.is_due(ended)) {
            for text in &wish.warnings {
                out.remark(Tone::Warning, text);
            }
            let Some(key) = &wish.key else {
                out.remark(Tone::Notice, "Skipping cache archiving due to empty cache key");
                continue;
            };
            if !wish.allows(&Policy::Push, Self::archive_stage(ended))? {
                out.remark(Tone::Notice, &format!("Not uploading cache {key} due to policy"));
                continue;
            }
            out.remark(Tone::Notice, &format!("Creating cache {key}..."));
            match self.archive_one(store, wish, key, out).await {
                Ok(true) => out.remark(Tone::Notice, "Created cache"),
                // Why not has been said.
                Ok(false) => {}
                Err(why) => {
                    out.remark(Tone::Warning, &shown(&why));
                    out.remark(Tone::Warning, "Failed to create cache");
                }
            }
        }
        Ok(())
    }

    /// Tries a cache's keys in turn until one can be extracted.
    async fn search(
        &self,
        store: &CacheStore,
        wish: &Wish,
        key: &Key,
        out: &mut (dyn Output + Send),
    ) -> Search {
        let mut hindered = false;
        for key in std::iter::once(key).chain(&wish.fallback) {
            out.remark(Tone::Notice, &format!("Checking cache for {key}..."));
            let limit = self.caches.transfer_limit;
            let fetched = store.fetch(&self.caches.project, key, limit, &mut Trace(out)).await;
            let failure = match fetched {
                Ok(Some(archive)) => match self.extract(archive, out).await {
                    Ok(()) => {
                        out.remark(Tone::Notice, "Successfully extracted cache");
                        return Search::Over;
                    }
                    Err(why) => why,
                },
                Ok(None) => "Cache file does not exist".to_owned(),
                Err(error) => {
                    hindered = true;
                    chain(&error)
                }
            };
            out.remark(Tone::Warning, &shown(&failure));
            out.remark(Tone::Warning, "Failed to extract cache");
            if self.settings.flag("FF_CLEAN_UP_FAILED_CACHE_EXTRACT") {
                self.clean_up(wish, out).await;
            }
        }
        if hindered { Search::Hindered } else { Search::Over }
    }

    async fn extract(&self, archive: Archive, out: &mut (dyn Output + Send)) -> Result<(), String> {
        hands::make_dir(&self.restore_dir).await.map_err(|error| error.to_string())?;
        let into = self.restore_dir.clone();
        let unpacked =
            blocking(move |stop| archive::unpack(&archive.file, &into, &Bounds::default(), stop))
                .await?;
        for text in &unpacked.warnings {
            out.remark(Tone::Warning, &shown(text));
        }
        Ok(())
    }

    /// Removes what an archive may have been extracted to in part.
    async fn clean_up(&self, wish: &Wish, out: &mut (dyn Output + Send)) {
        for path in &wish.paths {
            // A path that leads out of the checkout, or is all of it, is not the cache's to remove.
            let below = clean(path);
            let outside = path.starts_with('/')
                || path.split('/').any(|part| part == "..")
                || below.is_empty()
                || below == ".git"
                || below.starts_with(".git/");
            if outside {
                continue;
            }
            out.remark(Tone::Notice, &format!("Removing {}", shown(path)));
            let removed = hands::remove_within(&self.restore_dir, &below).await;
            if let Err(error) = removed {
                out.remark(Tone::Warning, &shown(&error.to_string()));
            }
        }
    }

    /// Packs one cache; says whether there is one now.
    async fn archive_one(
        &self,
        store: &CacheStore,
        wish: &Wish,
        key: &Key,
        out: &mut (dyn Output + Send),
    ) -> Result<bool, String> {
        let (project, limit) = (&self.caches.project, self.caches.transfer_limit);
        let begun = store.now();
        let (selection, looked) = self.selected(wish, out).await?;
        if selection.entries.is_empty() {
            out.remark(Tone::Warning, "No files to cache.");
            return Ok(false);
        }
        let current = match store.current(project, key).await {
            Ok(current) => current,
            Err(error) => {
                out.remark(Tone::Warning, &shown(&chain(&error)));
                None
            }
        };
        if current.is_some_and(|current| is_up_to_date(&current, &looked)) {
            out.remark(Tone::Notice, "Archive is up to date!");
            let refreshed = store.refresh(project, key, limit, &mut Trace(out)).await;
            return refreshed.map(|()| true).map_err(|error| chain(&error));
        }
        let draft = store.draft(project, key).await.map_err(|error| chain(&error))?;
        let mut into = draft.writer().map_err(|error| chain(&error))?;
        let root = self.project_dir.clone();
        let (format, level) = (self.caches.format, self.caches.level);
        let packed =
            blocking(move |stop| archive::pack(&root, &selection, format, level, &mut into, stop))
                .await?;
        for text in &packed.warnings {
            out.remark(Tone::Warning, &shown(text));
        }
        let what = (begun, looked.digest);
        let kept = store.keep(project, key, draft, what, limit, &mut Trace(out)).await;
        match kept.map_err(|error| chain(&error))? {
            Kept::Yes => Ok(true),
            Kept::TooLarge { bytes, quota } => Err(format!(
                "the archive takes {bytes} bytes, and all caches together may take {quota}"
            )),
        }
    }

    /// Finds the files of a cache and what they are like.
    async fn selected(
        &self,
        wish: &Wish,
        out: &mut (dyn Output + Send),
    ) -> Result<(Selection, Looked), String> {
        let mut wanted = Wanted { paths: wish.paths.clone(), ..Wanted::default() };
        if wish.untracked {
            let names = untracked::names(&self.project_dir, out).await;
            match names.map_err(|error| error.to_string())? {
                Ok(names) => {
                    out.remark(Tone::Notice, &format!("untracked: found {} files", names.len()));
                    wanted.untracked = names;
                }
                Err(code) => {
                    let text = format!("untracked: git ls-files ended with exit code {code}");
                    out.remark(Tone::Warning, &text);
                }
            }
        }
        let root = self.project_dir.clone();
        let (selection, looked) =
            blocking(move |stop| {
                let selection = archive::select(&root, &wanted, stop)?;
                let names = selection.entries.iter().map(|entry| entry.name.as_slice());
                let looked = hands::look_at(&root, names, stop).map_err(|source| {
                    ArchiveError::Io { action: "look at", path: root.to_string(), source }
                })?;
                Ok((selection, looked))
            })
            .await?;
        for (pattern, count) in &selection.found {
            let text = format!(
                "{}: found {count} matching artifact files and directories",
                shown(pattern)
            );
            out.remark(Tone::Notice, &text);
        }
        for text in &selection.warnings {
            out.remark(Tone::Warning, &shown(text));
        }
        Ok((selection, looked))
    }
}

/// Says whether an archive holds what files are now. gitlab-runner asks whether any file is newer; that
/// alone would keep what has been removed, and leave out what is old and new here.
fn is_up_to_date(current: &cache::Current, looked: &Looked) -> bool {
    let newer = looked.newest.and_then(|time| Timestamp::try_from(time).ok());
    newer.is_none_or(|newest| newest <= current.modified)
        && current.entries.as_ref().is_none_or(|entries| *entries == looked.digest)
}

/// Passes on what a store says.
struct Trace<'a>(&'a mut (dyn Output + Send));

impl Voice for Trace<'_> {
    fn notice(&mut self, text: &str) {
        self.0.remark(Tone::Notice, &shown(text));
    }

    fn warning(&mut self, text: &str) {
        self.0.remark(Tone::Warning, &shown(text));
    }
}

/// Tells blocking work to stop when nobody waits for it any more.
struct StopOnDrop(Arc<AtomicBool>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce(&AtomicBool) -> Result<T, ArchiveError> + Send + 'static,
) -> Result<T, String> {
    let stop = Arc::new(AtomicBool::new(false));
    let guard = StopOnDrop(Arc::clone(&stop));
    let result = tokio::task::spawn_blocking(move || work(&stop)).await;
    drop(guard);
    match result {
        Ok(result) => result.map_err(|error| chain(&error)),
        Err(panicked) => Err(panicked.to_string()),
    }
}

#[cfg(test)]
#[path = "cache_tests.rs"]
mod tests;
