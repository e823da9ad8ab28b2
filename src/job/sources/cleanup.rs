//! What is done to a checkout when its job is over (`FF_ENABLE_JOB_CLEANUP`).
//!
//! By then the payload may be gone: so what is to be done is noted beside the checkout when the sources
//! are made. The job can change the note, and gets by that what it could have done itself.

use std::sync::atomic::AtomicU32;

use camino::{Utf8Path, Utf8PathBuf};

use super::git::{Git, Place};
use super::repository::Repository;
use super::{CLEANUP, Stage, StageError, leftovers, submodules};
use crate::gitlab::wire::Secret;
use crate::job::hands::{self, HandsError};
use crate::job::settings::SubmoduleStrategy;
use crate::job::{GitStrategy, Plan};

/// A note is a few hundred bytes; flags can be many.
const NOTE_MOST: u64 = 64 * 1024;

/// What is to be done to a checkout.
#[derive(serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "snake_case", tag = "checkout")]
enum Note {
    Remove,
    Clean { flags: Vec<String>, sha256: bool, submodules: bool, recursive: bool },
}

fn temp_dir(project_dir: &Utf8Path) -> Utf8PathBuf {
    Utf8PathBuf::from(format!("{project_dir}.tmp"))
}

/// Not in the temporary directory, which goes as soon as the script has ended.
fn note_path(project_dir: &Utf8Path) -> Utf8PathBuf {
    Utf8PathBuf::from(format!("{project_dir}.cleanup"))
}

impl Plan {
    /// Notes what is to be done when the job is over.
    pub(super) async fn note_cleanup(&self) -> Result<(), HandsError> {
        let path = note_path(&self.project_dir);
        let note = match (self.settings.git_strategy, &self.repository) {
            _ if !self.settings.flag("FF_ENABLE_JOB_CLEANUP") => None,
            (GitStrategy::Clone | GitStrategy::Empty, _) => Some(Note::Remove),
            (GitStrategy::Fetch, Some(repository)) => Some(Note::Clean {
                flags: self.settings.git_clean_flags.clone(),
                sha256: repository.sha256,
                submodules: self.settings.git_submodule_strategy != SubmoduleStrategy::None,
                recursive: self.settings.git_submodule_strategy == SubmoduleStrategy::Recursive,
            }),
            (GitStrategy::Fetch | GitStrategy::None, _) => None,
        };
        match note.map(|note| serde_json::to_string(&note)) {
            Some(Ok(text)) => hands::write_private(&path, Secret::new(text)).await,
            Some(Err(_)) | None => hands::remove(&path).await,
        }
    }
}

/// Leaves of a job, known by its checkout alone, what it may leave behind: no file variables, and with
/// `FF_ENABLE_JOB_CLEANUP` no checkout, or none of its changes.
///
/// Done once nothing of the checkout is needed any more; doing it again is harmless.
///
/// # Errors
///
/// When something could not be removed. That git could not clean is no error: the next job begins with
/// the same, and says why.
pub async fn release(project_dir: &Utf8Path) -> Result<(), StageError> {
    let broken = StageError::broken(CLEANUP);
    let temp_dir = temp_dir(project_dir);
    hands::remove(&temp_dir).await.map_err(&broken)?;
    let path = note_path(project_dir);
    let Some(text) = hands::read(&path, NOTE_MOST).await.map_err(&broken)? else {
        return hands::remove(&path).await.map_err(&broken);
    };
    match serde_json::from_slice(&text) {
        Ok(Note::Remove) => hands::remove(project_dir).await.map_err(&broken)?,
        Ok(Note::Clean { flags, sha256, submodules, recursive }) => {
            hands::make_dir(&temp_dir).await.map_err(&broken)?;
            let done = clean(project_dir, &temp_dir, &flags, sha256, (submodules, recursive)).await;
            hands::remove(&temp_dir).await.map_err(&broken)?;
            if let Err(error) = done {
                tracing::warn!(checkout = %project_dir, %error, "checkout not cleaned");
            }
        }
        Err(error) => tracing::warn!(checkout = %project_dir, %error, "checkout not cleaned"),
    }
    hands::remove(&path).await.map_err(&broken)
}

async fn clean(
    project_dir: &Utf8Path,
    home: &Utf8Path,
    flags: &[String],
    sha256: bool,
    (submodules, recursive): (bool, bool),
) -> Stage {
    let broken = StageError::broken(CLEANUP);
    if !leftovers::is_repository(project_dir).await.map_err(&broken)? {
        return Ok(());
    }
    let at = Place::checkout(project_dir);
    let config = Repository::submodule_config(sha256, None);
    leftovers::disarm(&at.git_dir, config).await.map_err(&broken)?;
    let started = AtomicU32::new(0);
    let git = Git::offline(CLEANUP, home, &started);
    let out = &mut super::git::Silence;
    if !flags.is_empty() {
        let mut args = vec!["clean"];
        args.extend(flags.iter().map(String::as_str));
        git.run(&at, &args, out).await?;
    }
    git.run(&at, &["reset", "--hard", "-q"], out).await?;
    if submodules {
        submodules::clean_all(&git, project_dir, sha256, recursive, flags, out).await?;
    }
    Ok(())
}
