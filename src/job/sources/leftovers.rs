//! Takes away what an earlier job or a killed git left in a repository.
//!
//! An earlier job could write anything there, and git runs here with the service account's rights. So
//! its configuration, hooks, alternates, attributes and grafts go before git is started, in the
//! repositories of submodules too.

use std::collections::BTreeSet;

use camino::{Utf8Path, Utf8PathBuf};

use crate::gitlab::wire::Secret;
use crate::job::hands::{self, HandsError, Kind};

/// Files of an ended git that keep the next one from working, and those by which an earlier job could
/// tell git what to do.
const LEFTOVERS: [&str; 13] = [
    "index.lock",
    "shallow.lock",
    "HEAD.lock",
    "config.lock",
    "packed-refs.lock",
    "config.worktree",
    "commondir",
    "hooks",
    "objects/info/alternates",
    "objects/info/http-alternates",
    "info/attributes",
    "info/grafts",
    "refs/replace",
];

/// Folders in which a link would lead git out of the repository.
const NO_LINKS: [&str; 5] = ["", "info", "objects", "objects/info", "objects/pack"];

/// Any of these makes git take a folder for a repository, or nearly.
const SIGNS: [&str; 6] = ["HEAD", "config", "commondir", "index", "objects", "refs"];

/// Says whether this looks like a checkout with its repository within.
pub(super) async fn is_repository(project_dir: &Utf8Path) -> Result<bool, HandsError> {
    let git_dir = project_dir.join(".git");
    for dir in [project_dir, &git_dir, &git_dir.join("objects"), &git_dir.join("refs")] {
        if !hands::is_dir(dir).await? {
            return Ok(false);
        }
    }
    hands::is_file(&git_dir.join("HEAD")).await
}

/// Makes a repository harmless and writes its configuration anew.
pub(super) async fn disarm(git_dir: &Utf8Path, config: String) -> Result<(), HandsError> {
    for name in NO_LINKS {
        hands::remove_links(&git_dir.join(name)).await?;
    }
    for name in LEFTOVERS {
        hands::remove(&git_dir.join(name)).await?;
    }
    let refs = git_dir.join("refs");
    if hands::is_dir(&refs).await? {
        hands::remove_below(&refs, ".lock").await?;
    }
    hands::write_private(&git_dir.join("config"), Secret::new(config)).await
}

/// Makes the repositories of submodules harmless and names them.
///
/// A folder that is no repository holds some whose names have slashes.
pub(super) async fn disarm_modules(
    git_dir: &Utf8Path,
    config: &str,
) -> Result<BTreeSet<Utf8PathBuf>, HandsError> {
    let mut known = BTreeSet::new();
    let mut todo = vec![git_dir.join("modules")];
    while let Some(dir) = todo.pop() {
        if !hands::is_dir(&dir).await? {
            hands::remove(&dir).await?;
            continue;
        }
        let entries = hands::entries(&dir).await?;
        if entries.iter().any(|(name, _)| SIGNS.contains(&name.as_str())) {
            disarm(&dir, config.to_owned()).await?;
            todo.push(dir.join("modules"));
            known.insert(dir);
            continue;
        }
        for (name, kind) in entries {
            if kind == Kind::Dir {
                todo.push(dir.join(name));
            } else {
                hands::remove(&dir.join(name)).await?;
            }
        }
    }
    Ok(known)
}
