//! Directories that hold a job's secrets, noted outside the database.
//!
//! A row knows its job's workspace, and release removes what is private beside it, before and after
//! `kill -9`. But a row can go before its files do: the database was moved away, an older copy was put
//! in its place, or a file server gave no access until patience ended. So each directory is noted in a
//! small file of its own until it is gone, and a start removes what is noted and owed by no job.

use std::collections::HashSet;
use std::io;

use camino::{Utf8Path, Utf8PathBuf};

use crate::domain::id::JobId;
use crate::job;
use crate::store::{Filter, Store, StoreError};
use crate::telemetry::Chain;

/// A note that is longer than this is none.
const LONGEST: u64 = 16 * 1024;

fn notes_dir(spool_dir: &Utf8Path) -> Utf8PathBuf {
    spool_dir.with_file_name("workspaces")
}

/// Notes a job's workspace, before anything is written beside it.
pub(in crate::reconcile) async fn note(
    spool_dir: &Utf8Path,
    id: JobId,
    workspace: &Utf8Path,
) -> io::Result<()> {
    use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
    let (dir, text) = (notes_dir(spool_dir), workspace.to_string());
    let written = tokio::task::spawn_blocking(move || -> io::Result<()> {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir)?;
        let mut options = std::fs::OpenOptions::new();
        let mut file = options
            .create(true)
            .truncate(true)
            .write(true)
            .mode(0o600)
            .open(dir.join(id.to_string()))?;
        io::Write::write_all(&mut file, text.as_bytes())
    });
    written.await.map_err(io::Error::other)?
}

/// Drops a job's note: nothing of it is left.
pub(in crate::reconcile) async fn drop_note(spool_dir: &Utf8Path, id: JobId) {
    let path = notes_dir(spool_dir).join(id.to_string());
    if let Err(error) = tokio::fs::remove_file(&path).await
        && error.kind() != io::ErrorKind::NotFound
    {
        // The next start looks at it again.
        tracing::warn!(path = %path, error = %error, "a note of a workspace remains");
    }
}

/// Removes private files of jobs that nobody knows any more, or whose removal was given up.
///
/// To be called before any job is made ready: a workspace may then get a new job.
///
/// # Errors
///
/// When the database cannot be read.
pub async fn clear_leftovers(store: &Store, spool_dir: &Utf8Path) -> Result<(), StoreError> {
    let dir = notes_dir(spool_dir);
    let owed = store.list(&Filter { owed: true, ..Filter::default() }).await?;
    let known: HashSet<String> = owed.iter().map(|job| job.id.to_string()).collect();
    let in_use: HashSet<&Utf8Path> =
        owed.iter().filter_map(|job| job.workspace.as_deref()).collect();
    for (note, workspace) in notes(&dir).await {
        // Release does it.
        if note.file_name().is_some_and(|name| known.contains(name)) {
            continue;
        }
        // Whoever has the place now has removed what was there.
        if !in_use.contains(workspace.as_path()) {
            if let Err(error) = job::cleanup(&workspace).await {
                tracing::error!(
                    path = %workspace, error = %Chain(&error),
                    "private files of a job that is over remain"
                );
                continue;
            }
            tracing::info!(path = %workspace, "private files of a job that is over were removed");
        }
        if let Err(error) = tokio::fs::remove_file(&note).await {
            tracing::warn!(path = %note, error = %error, "a note of a workspace remains");
        }
    }
    Ok(())
}

/// Removes packed artifacts of jobs that owe nothing any more, and whose removal failed then.
///
/// To be called before any job goes on.
///
/// # Errors
///
/// When the database cannot be read.
pub async fn clear_packed(store: &Store, artifacts_dir: &Utf8Path) -> Result<(), StoreError> {
    let owed = store.list(&Filter { owed: true, ..Filter::default() }).await?;
    let known: HashSet<String> = owed.iter().map(|job| job.id.to_string()).collect();
    let dir = artifacts_dir.to_owned();
    let cleared = tokio::task::spawn_blocking(move || -> io::Result<()> {
        for entry in std::fs::read_dir(&dir)? {
            let entry = entry?;
            let name = entry.file_name();
            // Only what is named like a job is ours to remove.
            let ours = name.to_str().filter(|name| name.parse::<JobId>().is_ok());
            if ours.is_some_and(|name| !known.contains(name)) {
                std::fs::remove_dir_all(entry.path())?;
            }
        }
        Ok(())
    });
    match cleared.await.map_err(io::Error::other).and_then(|done| done) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(path = %artifacts_dir, error = %error, "old packed artifacts remain");
        }
        Ok(()) | Err(_) => {}
    }
    Ok(())
}

/// Reads all notes that make sense: their files, and the workspaces they name.
async fn notes(dir: &Utf8Path) -> Vec<(Utf8PathBuf, Utf8PathBuf)> {
    let mut notes = Vec::new();
    let mut entries = match tokio::fs::read_dir(dir).await {
        Ok(entries) => entries,
        Err(error) => {
            // Before the first job there is none.
            if error.kind() != io::ErrorKind::NotFound {
                tracing::warn!(path = %dir, error = %error, "notes of workspaces cannot be read");
            }
            return notes;
        }
    };
    loop {
        let entry = match entries.next_entry().await {
            Ok(Some(entry)) => entry,
            Ok(None) => return notes,
            Err(error) => {
                tracing::warn!(path = %dir, error = %error, "notes of workspaces cannot be read");
                return notes;
            }
        };
        let Ok(path) = Utf8PathBuf::from_path_buf(entry.path()) else { continue };
        let small = entry.metadata().await.is_ok_and(|m| m.is_file() && m.len() <= LONGEST);
        match tokio::fs::read_to_string(&path).await {
            Ok(text) if small && Utf8Path::new(&text).is_absolute() => {
                notes.push((path, text.into()));
            }
            // Cut short by a crash; nothing was written beside the workspace then.
            Ok(_) | Err(_) => {
                tracing::debug!(path = %path, "a note that says nothing");
                if let Err(error) = tokio::fs::remove_file(&path).await {
                    tracing::warn!(path = %path, error = %error, "it cannot be removed");
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio_util::task::TaskTracker;

    use super::*;
    use crate::store::Keyring;

    #[tokio::test]
    async fn packed_artifacts_that_nobody_owes_go_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let root = Utf8Path::from_path(dir.path()).unwrap();
        let (state, tracker) = (root.join("state"), TaskTracker::new());
        let store = Store::open(&state, Keyring::for_tests(), &tracker).await.unwrap();
        let artifacts = root.join("artifacts");
        clear_packed(&store, &artifacts).await.unwrap();
        let old = artifacts.join(JobId::mint(jiff::Timestamp::UNIX_EPOCH, 7).to_string());
        for path in [&old, &artifacts.join("somebody's")] {
            std::fs::create_dir_all(path).unwrap();
            std::fs::write(path.join("0"), "packed").unwrap();
        }
        clear_packed(&store, &artifacts).await.unwrap();
        assert!(!old.exists());
        assert!(artifacts.join("somebody's/0").exists());
    }
}
