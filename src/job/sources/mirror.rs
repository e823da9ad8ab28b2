//! Mirrors: one bare repository per project on the submit node, so that a thousand jobs of a project
//! cost GitLab one fetch per new commit.
//!
//! # Who may read
//!
//! Nothing leaves a mirror before GitLab has vouched for it to the job that asks: the mirror fetches
//! the job's refs with the *job's* credentials, into a folder of refs that is this job's alone. If
//! everything is there, that costs the listing of these refs and nothing more, which is both the
//! permission and the news. A job whose token may not read the project gets nothing, as without mirror.
//!
//! # Who may write
//!
//! We alone, from GitLab alone. A checkout fetches from the mirror by git's own protocol and so gets
//! objects of its own: no alternates, which would tie every checkout to the mirror's health, and no
//! hard links, by which a job could write into the mirror.
//!
//! # Locks
//!
//! `….lock` is held alone by who fetches a commit that the mirror does not have, so that others wait
//! for it instead of fetching it too. `….use` is held together by all who use the mirror, and alone by
//! who removes it. The kernel drops both with the process.
//!
//! # Trouble
//!
//! Whatever goes wrong, the job fetches from the server. If that works, the mirror is marked and made
//! anew by a later job.

use std::time::Duration;

use camino::{Utf8Path, Utf8PathBuf};
use url::Url;

use super::git::{FILE, Git, Heard, Place};
use super::repository::Repository;
use super::{Out, StageError, Tone};
use crate::gitlab::wire::Secret;
use crate::job::hands::{self, HandsError, Held, Hold, Kind};
use crate::job::{GitStrategy, Mirrors, Plan, paths};

/// A first fetch of a large project takes minutes; who has waited longer does better by himself.
const PATIENCE: Duration = Duration::from_secs(15 * 60);
const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// How often mirrors that nobody uses are looked for, and how old a dead job's refs get.
const DAY: Duration = Duration::from_secs(24 * 3600);
/// A mirror that could not be made is not tried again at once: each try may fill the disk.
const PAUSE: Duration = Duration::from_secs(3600);

/// Why a mirror is of no use.
#[derive(Debug, thiserror::Error)]
pub(super) enum Trouble {
    /// Git failed; it may be the mirror, or the server.
    #[error("{doing}: {error}{}", said(.words))]
    Git { doing: &'static str, error: StageError, words: String },
    /// Files could not be handled.
    #[error(transparent)]
    Hands(#[from] HandsError),
    /// Somebody else has had it for too long.
    #[error("another job has been busy with it for {} minutes", PATIENCE.as_secs() / 60)]
    Busy,
    /// It was found broken, and making it anew did not work either.
    #[error("it is broken, and is made anew later")]
    Broken,
}

impl Trouble {
    fn blames_the_mirror(&self) -> bool {
        match self {
            Self::Git { .. } | Self::Hands(_) => true,
            Self::Busy | Self::Broken => false,
        }
    }
}

fn said(words: &str) -> String {
    if words.is_empty() { String::new() } else { format!(": {words}") }
}

/// The mirror of one project.
pub(super) struct Mirror<'a> {
    mirrors: &'a Mirrors,
    dir: Utf8PathBuf,
    /// What is fetched, from the server into the mirror, and from there into the checkout.
    refs: Vec<Ref>,
    job: i64,
}

struct Ref {
    from: String,
    here: String,
    /// As the job's refspec has it, `+` and all.
    forced: bool,
    to: Option<String>,
}

impl Plan {
    /// Gives the project's mirror, where there are mirrors and this job can be served by one.
    pub(super) fn mirror<'a>(&'a self, repository: &Repository) -> Option<Mirror<'a>> {
        let mirrors = self.runner.mirrors.as_ref()?;
        let url = Url::parse(&repository.origin).ok()?;
        let host = match (url.scheme(), url.host_str(), url.port()) {
            ("http" | "https", Some(host), Some(port)) => format!("{host}_{port}"),
            ("http" | "https", Some(host), None) => host.to_owned(),
            ("file", _, _) => "local".to_owned(),
            _ => return None,
        };
        // Left-out objects would be looked for at a promisor that is not the server.
        if repository.filter.is_some() || self.runner.builds_dir.starts_with(&mirrors.dir) {
            return None;
        }
        let project = paths::project_path(&repository.origin, GitStrategy::Fetch).ok()??;
        let dir = mirrors.dir.join(paths::single_name(&host)).join(format!("{project}.git"));
        let refs = repository.refspecs.iter().map(|spec| one_ref(spec, repository.job));
        Some(Mirror { mirrors, dir, refs: refs.collect::<Option<_>>()?, job: repository.job })
    }
}

/// Finds a place in the mirror for what a refspec fetches; `None` for refspecs that GitLab never sends.
fn one_ref(spec: &str, job: i64) -> Option<Ref> {
    let (forced, spec) = match spec.strip_prefix('+') {
        Some(rest) => (true, rest),
        None => (false, spec),
    };
    let (from, to) = match spec.split_once(':') {
        Some((from, to)) => (from, Some(to.to_owned())),
        None => (spec, None),
    };
    let hexadecimal =
        matches!(from.len(), 40 | 64) && from.bytes().all(|byte| byte.is_ascii_hexdigit());
    let name = match from.strip_prefix("refs/") {
        Some(name) => name.to_owned(),
        None if hexadecimal => format!("commit/{from}"),
        None => return None,
    };
    Some(Ref { from: from.to_owned(), here: format!("refs/jobs/{job}/{name}"), forced, to })
}

impl Mirror<'_> {
    /// Gives its directory, for the log.
    pub(super) fn dir(&self) -> &Utf8Path {
        &self.dir
    }

    fn beside(&self, ending: &str) -> Utf8PathBuf {
        Utf8PathBuf::from(format!("{}.{ending}", self.dir))
    }

    fn kept(&self, sha: &str) -> Utf8PathBuf {
        self.dir.join("refs/kept").join(sha)
    }

    fn refs_of_job(&self) -> Utf8PathBuf {
        self.dir.join("refs/jobs").join(self.job.to_string())
    }

    /// Brings the mirror up to date, if it is not, and the checkout by it.
    pub(super) async fn fetch(
        &self,
        plan: &Plan,
        repository: &Repository,
        git: &Git<'_>,
        fetch: &[&str],
        out: Out<'_>,
    ) -> Result<(), Trouble> {
        if let Some(parent) = self.dir.parent() {
            hands::make_dir(parent).await?;
        }
        let mut updating = None;
        if !self.has(&repository.sha).await? {
            updating = Some(self.hold("lock", Hold::Alone, out).await?);
            if self.has(&repository.sha).await? {
                // Whom we waited for has fetched it.
                updating = None;
            } else if !self.is_sound().await? {
                self.make(repository, out).await?;
            }
        }
        let using = self.hold("use", Hold::Together, out).await?;
        hands::touch(&self.beside("use")).await?;
        let result = self.fetch_twice(plan, repository, git, fetch, updating, out).await;
        hands::remove(&self.refs_of_job()).await?;
        drop(using);
        result?;
        if let Err(error) = prune(self.mirrors).await {
            tracing::warn!(%error, "mirrors not pruned");
        }
        Ok(())
    }

    async fn fetch_twice(
        &self,
        plan: &Plan,
        repository: &Repository,
        git: &Git<'_>,
        fetch: &[&str],
        updating: Option<Held>,
        out: Out<'_>,
    ) -> Result<(), Trouble> {
        hands::remove(&self.refs_of_job()).await?;
        let into = self.refs.iter().map(|one| format!("+{}:{}", one.from, one.here));
        let into: Vec<String> = into.collect();
        let mut args = vec!["fetch", "--quiet", "--no-write-fetch-head", "--no-recurse-submodules"];
        args.push("--no-tags");
        if updating.is_some() {
            self.unlock_refs().await?;
            args.push("--prune");
        } else {
            args.push("--no-auto-maintenance");
        }
        args.extend(["--", "origin"]);
        args.extend(into.iter().map(String::as_str));
        if updating.is_some() {
            // So that tags come along with their commits, as they do from the server.
            args.push("+refs/tags/*:refs/tags/*");
        }
        self.git(git, &args, "bringing it up to date").await?;
        self.keep(&repository.sha).await?;
        drop(updating);

        let mut args = fetch.to_vec();
        args.extend(["--no-write-fetch-head", "--", self.dir.as_str()]);
        let from = self.refs.iter().map(|one| {
            let to = one.to.as_ref().map(|to| format!(":{to}")).unwrap_or_default();
            format!("{}{}{to}", if one.forced { "+" } else { "" }, one.here)
        });
        let from: Vec<String> = from.collect();
        args.extend(from.iter().map(String::as_str));
        let mut heard = Heard::default();
        let at = Place::checkout(&plan.project_dir);
        let result = git.only(FILE).run(&at, &args, &mut heard).await;
        if result.is_ok() {
            out.bytes(&heard.0);
        }
        result.map_err(|error| trouble("fetching from it", error, &heard))
    }

    async fn git(&self, git: &Git<'_>, args: &[&str], doing: &'static str) -> Result<(), Trouble> {
        let mut heard = Heard::default();
        let result = git.run(&Place::bare(&self.dir), args, &mut heard).await;
        result.map_err(|error| trouble(doing, error, &heard))
    }

    /// Says whether a commit is there with all that belongs to it.
    ///
    /// The object alone would not tell: a fetch that was killed leaves some.
    async fn has(&self, sha: &str) -> Result<bool, HandsError> {
        Ok(hands::is_file(&self.kept(sha)).await? && self.is_sound().await?)
    }

    async fn is_sound(&self) -> Result<bool, HandsError> {
        Ok(hands::is_dir(&self.dir.join("objects")).await?
            && hands::is_file(&self.dir.join("HEAD")).await?
            && hands::is_file(&self.dir.join("config")).await?
            && !hands::is_file(&self.beside("suspect")).await?)
    }

    /// Notes that this job's commit is there, once one of its refs says so.
    async fn keep(&self, sha: &str) -> Result<(), HandsError> {
        for one in self.refs.iter().filter(|one| !one.here.contains('*')) {
            let text = hands::read(&self.dir.join(&one.here), 1024).await?.unwrap_or_default();
            if text.trim_ascii() == sha.as_bytes() {
                hands::make_dir(&self.dir.join("refs/kept")).await?;
                return hands::write_private(&self.kept(sha), Secret::new(format!("{sha}\n")))
                    .await;
            }
        }
        Ok(())
    }

    /// Removes locks on refs that a killed fetch has left; whoever else fetches now has other refs.
    async fn unlock_refs(&self) -> Result<(), HandsError> {
        hands::remove_below(&self.dir.join("refs/tags"), ".lock").await?;
        for name in ["packed-refs.lock", "HEAD.lock", "shallow.lock"] {
            hands::remove(&self.dir.join(name)).await?;
        }
        Ok(())
    }

    /// Makes the mirror, empty; whatever was there goes when nobody uses it any more.
    async fn make(&self, repository: &Repository, out: Out<'_>) -> Result<(), Trouble> {
        let suspect = self.beside("suspect");
        if let Some(since) = hands::modified(&suspect).await? {
            let now = hands::touch(&self.beside("lock")).await?;
            let tried = hands::modified(&self.beside("tried")).await?;
            let lately = |time| now.duration_since(time).is_ok_and(|age| age < PAUSE);
            if tried.is_some_and(|tried| tried >= since && lately(tried)) {
                return Err(Trouble::Broken);
            }
            hands::touch(&self.beside("tried")).await?;
            out.remark(Tone::Notice, "The mirror of this project was broken; making it anew...");
        }
        let alone = self.hold("use", Hold::Alone, out).await?;
        hands::remove(&self.dir).await?;
        for name in ["objects/pack", "objects/info", "refs/tags"] {
            hands::make_dir(&self.dir.join(name)).await?;
        }
        let config = Secret::new(repository.mirror_config());
        hands::write_private(&self.dir.join("config"), config).await?;
        let head = Secret::new("ref: refs/heads/none\n");
        hands::write_private(&self.dir.join("HEAD"), head).await?;
        hands::remove(&suspect).await?;
        drop(alone);
        Ok(())
    }

    /// Marks a mirror that failed where the server did not.
    pub(super) async fn suspect(&self, trouble: &Trouble) {
        if trouble.blames_the_mirror()
            && let Err(error) = hands::touch(&self.beside("suspect")).await
        {
            tracing::warn!(%error, "broken mirror not marked");
        }
    }

    /// Waits for a lock.
    async fn hold(&self, ending: &str, hold: Hold, out: Out<'_>) -> Result<Held, Trouble> {
        let path = self.beside(ending);
        if let Some(held) = hands::try_hold(&path, hold).await? {
            return Ok(held);
        }
        out.remark(
            Tone::Notice,
            "Waiting for another job that brings this project's mirror up to date...",
        );
        let wait = async {
            loop {
                tokio::time::sleep(LOOK_AGAIN).await;
                if let Some(held) = hands::try_hold(&path, hold).await? {
                    return Ok::<Held, HandsError>(held);
                }
            }
        };
        match tokio::time::timeout(PATIENCE, wait).await {
            Ok(held) => Ok(held?),
            Err(_elapsed) => Err(Trouble::Busy),
        }
    }
}

/// Keeps the last thing git said; it may name the mirror, which is no secret, but no credentials.
fn trouble(doing: &'static str, error: StageError, heard: &Heard) -> Trouble {
    let text = String::from_utf8_lossy(&heard.0);
    let words = text.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default();
    Trouble::Git { doing, error, words: words.chars().take(300).collect() }
}

/// Removes mirrors that no job has used for long, and refs that nobody needs, once a day.
async fn prune(mirrors: &Mirrors) -> Result<(), HandsError> {
    let stamp = mirrors.dir.join(".pruned");
    let last = hands::modified(&stamp).await?;
    // The file system's own clock: it wrote the other times too.
    let now = hands::touch(&mirrors.dir.join(".now")).await?;
    let age = |time| now.duration_since(time).unwrap_or_default();
    if last.is_some_and(|last| age(last) < DAY) {
        return Ok(());
    }
    hands::touch(&stamp).await?;
    let mut todo = vec![mirrors.dir.clone()];
    while let Some(dir) = todo.pop() {
        for (name, kind) in hands::entries(&dir).await? {
            let path = dir.join(&name);
            if kind != Kind::Dir {
                continue;
            }
            let used = Utf8PathBuf::from(format!("{path}.use"));
            let Some(last) = hands::modified(&used).await?.filter(|_| name.ends_with(".git"))
            else {
                todo.push(path);
                continue;
            };
            if age(last) <= mirrors.keep {
                remove_older(&path.join("refs/jobs"), DAY, &age).await?;
                remove_older(&path.join("refs/kept"), mirrors.keep, &age).await?;
            } else if let Some(_alone) = hands::try_hold(&used, Hold::Alone).await? {
                tracing::info!(mirror = %path, "unused mirror removed");
                hands::remove(&path).await?;
            }
        }
    }
    Ok(())
}

async fn remove_older(
    dir: &Utf8Path,
    most: Duration,
    age: &(impl Fn(std::time::SystemTime) -> Duration + Sync),
) -> Result<(), HandsError> {
    for (name, _kind) in hands::entries(dir).await? {
        let path = dir.join(name);
        if hands::modified(&path).await?.is_some_and(|time| age(time) > most) {
            hands::remove(&path).await?;
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "mirror_tests.rs"]
mod tests;
