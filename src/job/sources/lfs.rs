//! Large files: what Git LFS left as pointers is fetched after the check-out, all at once.
//!
//! Whether a repository has any is read from the attributes of the commit, so that a project without
//! large files costs no process.

use super::git::{Git, Place, Silence};
use super::{GET_SOURCES, Out, Stage, StageError, Tone, index};
use crate::job::Plan;
use crate::job::hands;

/// Attributes are lines of text; nobody writes a megabyte.
const ATTRIBUTES_MOST: u64 = 1024 * 1024;
/// An index has about a hundred bytes per file.
pub(super) const INDEX_MOST: u64 = 4 * 1024 * 1024 * 1024;

/// Git LFS without its setup on this machine.
pub(super) const SETTINGS: [&str; 4] = [
    "filter.lfs.clean=git-lfs clean -- %f",
    "filter.lfs.smudge=git-lfs smudge -- %f",
    "filter.lfs.process=git-lfs filter-process",
    "filter.lfs.required=true",
];

impl Plan {
    /// Fetches the large files of a checkout.
    pub(super) async fn pull_large_files(&self, git: &Git<'_>, at: &Place, out: Out<'_>) -> Stage {
        if self.settings.git_lfs_skip_smudge || !has_large_files(at, self.sha256()).await? {
            return Ok(());
        }
        if git.run(at, &["lfs", "version"], &mut Silence).await.is_err() {
            out.remark(
                Tone::Warning,
                "the repository has files in Git LFS, and git-lfs is not installed on the machine \
                 that fetches sources: these files stay pointers",
            );
            return Ok(());
        }
        let broken = StageError::broken(GET_SOURCES);
        let own = at.dir().join(".lfsconfig");
        let own = hands::read(&own, ATTRIBUTES_MOST).await.map_err(&broken)?.unwrap_or_default();
        if contains(&own.to_ascii_lowercase(), b"file:") {
            return Err(StageError::Misconfigured {
                detail: ".lfsconfig names a file: URL, from which no large files are fetched"
                    .into(),
            });
        }
        out.remark(Tone::Notice, "Fetching files in Git LFS...");
        git.with(&SETTINGS).run(at, &["lfs", "pull"], out).await
    }
}

async fn has_large_files(at: &Place, sha256: bool) -> Result<bool, StageError> {
    let broken = StageError::broken(GET_SOURCES);
    let index = hands::read(&at.git_dir.join("index"), INDEX_MOST).await.map_err(&broken)?;
    let Some(bytes) = index else { return Ok(false) };
    let Ok(index) = index::read(&bytes, sha256) else {
        // Git LFS itself finds out.
        return Ok(true);
    };
    for path in index.attributes {
        let path = at.dir().join(path);
        let text = hands::read(&path, ATTRIBUTES_MOST).await.map_err(&broken)?;
        if text.is_some_and(|text| contains(&text, b"filter=lfs")) {
            return Ok(true);
        }
    }
    Ok(false)
}

fn contains(text: &[u8], word: &[u8]) -> bool {
    text.windows(word.len()).any(|window| window == word)
}
