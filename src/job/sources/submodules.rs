//! Submodules, level by level.
//!
//! The order of things is gitlab-runner's: init, sync, clean, reset, update, one more time after a
//! failure, clean, large files. Unlike there nothing runs in a submodule that an earlier job left
//! before its repository has been made harmless: a submodule's `.git` counts only if it names a
//! repository below the project's own `.git/modules`, and every command is told which one.

use std::collections::BTreeSet;

use camino::{Utf8Component, Utf8Path, Utf8PathBuf};

use super::git::{Git, Place};
use super::repository::Repository;
use super::{GET_SOURCES, Out, Stage, StageError, Tone, index, leftovers, lfs};
use crate::gitlab::wire::Secret;
use crate::job::Plan;
use crate::job::hands::{self, HandsError};
use crate::job::settings::SubmoduleStrategy;

const CONFIG_MOST: u64 = 64 * 1024 * 1024;
/// A submodule's `.git` is one line.
const GIT_FILE_MOST: u64 = 64 * 1024;

/// How a level is brought up to date.
struct Level<'a> {
    git: &'a Git<'a>,
    /// Repositories of submodules that are harmless.
    known: BTreeSet<Utf8PathBuf>,
    modules: Utf8PathBuf,
    recursive: bool,
}

impl Plan {
    /// Checks out the submodules, if any are wanted.
    pub(super) async fn submodules(&self, repository: &Repository, out: Out<'_>) -> Stage {
        let asked = match self.settings.git_submodule_strategy {
            SubmoduleStrategy::None => {
                out.remark(Tone::Notice, "Skipping Git submodules setup");
                return Ok(());
            }
            SubmoduleStrategy::Normal | SubmoduleStrategy::Unknown(_) => false,
            SubmoduleStrategy::Recursive => true,
        };
        // Git must not go on by itself to what has not been looked at.
        let recursive =
            asked || self.settings.git_submodule_update_flags.iter().any(|f| f == "--recursive");
        let depth = self.settings.git_submodule_depth;
        out.remark(Tone::Notice, &announcement(recursive, depth.into()));
        let broken = StageError::broken(GET_SOURCES);
        let git = self.git(repository, GET_SOURCES);
        let git_dir = self.project_dir.join(".git");
        let config = Repository::submodule_config(repository.sha256, None);
        let known = leftovers::disarm_modules(&git_dir, &config).await.map_err(&broken)?;
        let inherited = !known.is_empty();
        let modules = git_dir.join("modules");
        let mut level = Level { git: &git, known, modules, recursive };
        let Err(error) = self.levels(&mut level, out).await else { return Ok(()) };
        // As with the project itself: what an earlier job left may be beyond repair.
        if !inherited || !self.server_answers(repository).await {
            return Err(error);
        }
        out.remark(
            Tone::Warning,
            "the submodules of an earlier job cannot be brought up to date; starting them afresh",
        );
        hands::remove(&level.modules).await.map_err(&broken)?;
        level.known.clear();
        self.levels(&mut level, out).await
    }

    async fn levels(&self, level: &mut Level<'_>, out: Out<'_>) -> Stage {
        let mut todo = vec![Place::checkout(&self.project_dir)];
        let mut top = true;
        while let Some(above) = todo.pop() {
            let below = self.level(level, &above, top, out).await?;
            top = false;
            if level.recursive {
                todo.extend(below);
            }
        }
        Ok(())
    }

    /// Brings one repository's submodules up to date and gives them.
    async fn level(
        &self,
        level: &mut Level<'_>,
        above: &Place,
        top: bool,
        out: Out<'_>,
    ) -> Result<Vec<Place>, StageError> {
        let broken = StageError::broken(GET_SOURCES);
        let paths = submodules_of(above, self.sha256()).await?;
        if paths.is_empty() {
            return Ok(Vec::new());
        }
        let git = level.git;
        for path in &paths {
            secure(above.dir(), path, &level.known).await.map_err(&broken)?;
        }
        // Named by the author are paths of the project, not of what is below.
        let wanted: &[String] = if top { &self.settings.git_submodule_paths } else { &[] };
        let sync = with_paths(&["submodule", "--quiet", "sync"], wanted);
        let depth = self.settings.git_submodule_depth.to_string();
        let mut update = vec!["submodule", "update", "--init"];
        if self.settings.git_submodule_depth > 0 {
            update.extend(["--depth", &depth]);
        }
        let flags = self.settings.git_submodule_update_flags.iter().map(String::as_str);
        update.extend(flags.clone().filter(|flag| *flag != "--recursive"));
        let update = with_paths(&update, wanted);
        git.run(above, &with_paths(&["submodule", "--quiet", "init"], wanted), out).await?;
        self.name_origins(level, above).await.map_err(&broken)?;
        for place in populated(above.dir(), &paths, &level.modules).await.map_err(&broken)? {
            self.clean_submodule(git, &place, true, out).await?;
        }
        if git.run(above, &update, out).await.is_err() {
            out.remark(Tone::Warning, "updating the submodules failed; trying once more");
            let there = populated(above.dir(), &paths, &level.modules).await.map_err(&broken)?;
            // A branch named in .gitmodules is not among what a shallow or single-branch clone has.
            if flags.clone().any(|flag| flag.eq_ignore_ascii_case("--remote")) {
                let fetch = ["fetch", "origin", "+refs/heads/*:refs/remotes/origin/*"];
                for place in &there {
                    git.run(place, &fetch, out).await?;
                }
            }
            git.run(above, &sync, out).await?;
            git.run(above, &update, out).await?;
            for place in &there {
                git.run(place, &["reset", "--hard", "-q"], out).await?;
            }
        }
        let below = populated(above.dir(), &paths, &level.modules).await.map_err(&broken)?;
        for place in &below {
            level.known.insert(place.git_dir.clone());
            self.clean_submodule(git, place, false, out).await?;
            self.pull_large_files(git, place, out).await?;
        }
        Ok(below)
    }

    /// Tells the repositories of submodules where they come from, as `git submodule sync` would if they
    /// were checked out: their configuration has been written anew, and the address may be another.
    async fn name_origins(&self, level: &Level<'_>, above: &Place) -> Result<(), HandsError> {
        let path = above.git_dir.join("config");
        let text = hands::read(&path, CONFIG_MOST).await?.unwrap_or_default();
        for (name, url) in addresses(&String::from_utf8_lossy(&text)) {
            let git_dir = above.git_dir.join("modules").join(name);
            if level.known.contains(&git_dir) {
                let text = Repository::submodule_config(self.sha256(), Some(&url));
                hands::write_private(&git_dir.join("config"), Secret::new(text)).await?;
            }
        }
        Ok(())
    }

    async fn clean_submodule(&self, git: &Git<'_>, at: &Place, reset: bool, out: Out<'_>) -> Stage {
        let flags = &self.settings.git_clean_flags;
        clean(git, at, flags, reset, out).await
    }
}

/// Reads the submodules' names and addresses from a configuration that we and git have written.
fn addresses(config: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut name = None;
    for line in config.lines() {
        let line = line.trim();
        if line.starts_with('[') {
            let quoted = line.strip_prefix("[submodule \"").and_then(|l| l.strip_suffix("\"]"));
            name = quoted.map(unescaped);
        } else if let (Some(name), Some(url)) = (&name, line.strip_prefix("url = ")) {
            let url = url.strip_prefix('"').and_then(|u| u.strip_suffix('"')).unwrap_or(url);
            found.push((name.clone(), unescaped(url)));
        }
    }
    found
}

fn unescaped(text: &str) -> String {
    let mut result = String::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match (c, c == '\\') {
            (_, true) => result.extend(chars.next()),
            (c, false) => result.push(c),
        }
    }
    result
}

/// Cleans a submodule as the job cleans itself; where it does not, thoroughly, as the official runner.
async fn clean(git: &Git<'_>, at: &Place, flags: &[String], reset: bool, out: Out<'_>) -> Stage {
    let mut clean = vec!["clean"];
    clean.extend(flags.iter().map(String::as_str));
    if flags.is_empty() {
        clean.push("-ffdx");
    }
    git.run(at, &clean, out).await?;
    if reset {
        git.run(at, &["reset", "--hard", "-q"], out).await?;
    }
    Ok(())
}

/// Cleans and resets all submodules of a checkout that a job has left.
pub(super) async fn clean_all(
    git: &Git<'_>,
    project_dir: &Utf8Path,
    sha256: bool,
    recursive: bool,
    flags: &[String],
    out: Out<'_>,
) -> Stage {
    let broken = StageError::broken(git.stage);
    let git_dir = project_dir.join(".git");
    let config = Repository::submodule_config(sha256, None);
    let known = leftovers::disarm_modules(&git_dir, &config).await.map_err(&broken)?;
    let modules = git_dir.join("modules");
    let mut todo = vec![Place::checkout(project_dir)];
    let mut top = true;
    while let Some(above) = todo.pop() {
        let paths = submodules_of(&above, sha256).await?;
        for path in &paths {
            secure(above.dir(), path, &known).await.map_err(&broken)?;
        }
        let below = populated(above.dir(), &paths, &modules).await.map_err(&broken)?;
        for place in &below {
            clean(git, place, flags, true, out).await?;
        }
        if top || recursive {
            todo.extend(below.into_iter().filter(|_| recursive));
        }
        top = false;
    }
    Ok(())
}

async fn submodules_of(at: &Place, sha256: bool) -> Result<Vec<String>, StageError> {
    let broken = StageError::broken(GET_SOURCES);
    let bytes = hands::read(&at.git_dir.join("index"), lfs::INDEX_MOST).await.map_err(&broken)?;
    let Some(bytes) = bytes else { return Ok(Vec::new()) };
    let index = index::read(&bytes, sha256)
        .map_err(|error| StageError::Broken { stage: GET_SOURCES, detail: error.to_string() })?;
    Ok(index.submodules)
}

fn with_paths<'a>(args: &[&'a str], paths: &'a [String]) -> Vec<&'a str> {
    let mut args = args.to_vec();
    if !paths.is_empty() {
        args.push("--");
        args.extend(paths.iter().map(String::as_str));
    }
    args
}

pub(super) fn announcement(recursive: bool, depth: i64) -> String {
    let how = if recursive { " recursively" } else { "" };
    match depth {
        1.. => format!("Updating submodules{how} with git depth set to {depth}..."),
        _ => format!("Updating submodules{how}..."),
    }
}

/// Takes away what at a submodule's path would lead git to a repository that is not known: a link on
/// the way, a folder `.git`, a file `.git` that points elsewhere. The files go with it, since git checks
/// out into empty folders only.
async fn secure(
    above: &Utf8Path,
    path: &str,
    known: &BTreeSet<Utf8PathBuf>,
) -> Result<(), HandsError> {
    let mut dir = above.to_owned();
    for part in Utf8Path::new(path).components() {
        dir.push(part);
        // A link, or a file; a folder that is not there is no hindrance either.
        if !hands::is_dir(&dir).await? {
            return hands::remove(&dir).await;
        }
    }
    match git_dir_of(&dir).await? {
        Some(git_dir) if known.contains(&git_dir) => Ok(()),
        Some(_) | None => hands::remove(&dir).await,
    }
}

/// Finds the submodules that are checked out, with their repositories.
async fn populated(
    above: &Utf8Path,
    paths: &[String],
    modules: &Utf8Path,
) -> Result<Vec<Place>, HandsError> {
    let mut places = Vec::new();
    for path in paths {
        let dir = above.join(path);
        if let Some(git_dir) = git_dir_of(&dir).await?
            && git_dir.starts_with(modules)
            && hands::is_dir(&git_dir).await?
        {
            places.push(Place { git_dir, work_tree: Some(dir) });
        }
    }
    Ok(places)
}

/// Reads where a submodule's file `.git` points to.
async fn git_dir_of(dir: &Utf8Path) -> Result<Option<Utf8PathBuf>, HandsError> {
    let Some(bytes) = hands::read(&dir.join(".git"), GIT_FILE_MOST).await? else { return Ok(None) };
    let text = std::str::from_utf8(&bytes).unwrap_or_default();
    Ok(text.strip_prefix("gitdir: ").map(|to| without_dots(&dir.join(to.trim_end_matches('\n')))))
}

/// Works out `..` by the letters alone; on the way there are no links.
fn without_dots(path: &Utf8Path) -> Utf8PathBuf {
    let mut result = Utf8PathBuf::new();
    for part in path.components() {
        match part {
            Utf8Component::ParentDir => {
                result.pop();
            }
            Utf8Component::CurDir => {}
            Utf8Component::Prefix(_) | Utf8Component::RootDir | Utf8Component::Normal(_) => {
                result.push(part);
            }
        }
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_git_writes_them() {
        let text = "[core]\n\tbare = false\n[remote \"origin\"]\n\turl = https://h/a.git\n\
                    [submodule \"a \\\"b\\\\c\"]\n\tactive = true\n\turl = https://h/b.git\n\
                    [submodule \"d\"]\n\turl = \"https://h/c;d.git\"\n[gc]\n\turl = x\n";
        let expected = [("a \"b\\c", "https://h/b.git"), ("d", "https://h/c;d.git")];
        let expected = expected.map(|(name, url)| (name.to_owned(), url.to_owned()));
        assert_eq!(addresses(text), expected);
    }
}
