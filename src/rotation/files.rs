//! A runner's token on disk while it is being changed.
//!
//! Three files beside each other. `NAME.token` is the token in force. `NAME.token.rotating` is the
//! note that a change was asked of GitLab; it holds the time. `NAME.token.new` is what GitLab
//! answered, until it has verified. Each is written whole and is on the disk when its writing
//! returns.

use std::fs::{self, File, TryLockError};
use std::io::{self, Read as _};

use camino::{Utf8Path, Utf8PathBuf};
use jiff::Timestamp;

use crate::config::write::{Owner, replace, sync_directory};
use crate::gitlab::Secret;

/// More than any token.
const MAX_LEN: u64 = 16 * 1024;

/// A token file could not be read or written.
#[derive(Debug, thiserror::Error)]
#[error("{verb} {path}")]
pub struct FileError {
    verb: &'static str,
    path: Utf8PathBuf,
    source: io::Error,
}

/// The files of one token.
#[derive(Clone, Debug)]
pub struct TokenFiles {
    token: Utf8PathBuf,
    new: Utf8PathBuf,
    note: Utf8PathBuf,
}

/// Nobody else changes a token in this directory while this lives.
#[derive(Debug)]
pub struct OneWriter {
    _directory: File,
}

impl TokenFiles {
    /// Names the files of a token; a link is followed, so that it stays a link.
    pub fn of(token_file: &Utf8Path) -> Self {
        let token = token_file.canonicalize_utf8().unwrap_or_else(|_gone| token_file.to_owned());
        let (new, note) = (format!("{token}.new"), format!("{token}.rotating"));
        Self { new: new.into(), note: note.into(), token }
    }

    /// Gives the token's file.
    pub fn path(&self) -> &Utf8Path {
        &self.token
    }

    /// Becomes the one writer of the directory, unless somebody is.
    ///
    /// # Errors
    ///
    /// When the directory cannot be opened.
    pub fn lock(&self) -> Result<Option<OneWriter>, FileError> {
        let path = self.token.parent().unwrap_or(Utf8Path::new("/")).to_owned();
        let failed = |source| FileError { verb: "lock", path: path.clone(), source };
        let directory = File::open(&path).map_err(failed)?;
        match directory.try_lock() {
            Ok(()) => Ok(Some(OneWriter { _directory: directory })),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(source)) => Err(failed(source)),
        }
    }

    /// Reads the token in force.
    ///
    /// # Errors
    ///
    /// When there is none, or it cannot be read.
    pub fn current(&self) -> Result<Secret, FileError> {
        let failed = |source| FileError { verb: "read", path: self.token.clone(), source };
        read(&self.token).map_err(failed)?.ok_or_else(|| failed(io::ErrorKind::NotFound.into()))
    }

    /// Says since when the token in force is there: a change replaces the file, and nothing else
    /// does.
    ///
    /// # Errors
    ///
    /// When the file cannot be asked.
    pub fn obtained_at(&self) -> Result<Timestamp, FileError> {
        modified(&self.token)
    }

    /// Says since when a token waits to be verified.
    ///
    /// # Errors
    ///
    /// When its file cannot be asked.
    pub fn waiting_since(&self) -> Result<Timestamp, FileError> {
        modified(&self.new)
    }

    /// Reads the token that waits to be verified, if there is one.
    ///
    /// # Errors
    ///
    /// When it is there and cannot be read.
    pub fn waiting(&self) -> Result<Option<Secret>, FileError> {
        read(&self.new).map_err(|source| FileError { verb: "read", path: self.new.clone(), source })
    }

    /// Says whether a change was asked of GitLab and is not finished, and when; the text is ours.
    ///
    /// # Errors
    ///
    /// When the note is there and cannot be read.
    pub fn noted(&self) -> Result<Option<String>, FileError> {
        match fs::read_to_string(&self.note) {
            Ok(text) => Ok(Some(text.trim().chars().take(64).collect())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(FileError { verb: "read", path: self.note.clone(), source }),
        }
    }

    /// Notes that GitLab is about to be asked.
    ///
    /// # Errors
    ///
    /// When it cannot be written.
    pub fn note(&self, now: Timestamp) -> Result<(), FileError> {
        self.write(&self.note, &now.to_string())
    }

    /// Keeps what GitLab answered.
    ///
    /// # Errors
    ///
    /// When it cannot be written; the token is then in memory alone.
    pub fn keep(&self, token: &Secret) -> Result<(), FileError> {
        self.write(&self.new, token.expose())
    }

    /// Makes the kept token the one in force; the old one is gone then.
    ///
    /// # Errors
    ///
    /// When it cannot be renamed; both are then there as before.
    pub fn promote(&self) -> Result<(), FileError> {
        let failed = |source| FileError { verb: "replace", path: self.token.clone(), source };
        fs::rename(&self.new, &self.token).map_err(failed)?;
        sync_directory(&self.token).map_err(failed)
    }

    /// Removes what waited to be verified.
    ///
    /// # Errors
    ///
    /// When it cannot be removed.
    pub fn drop_waiting(&self) -> Result<(), FileError> {
        remove(&self.new)
    }

    /// Removes the note: nothing is open any more.
    ///
    /// # Errors
    ///
    /// When it cannot be removed.
    pub fn drop_note(&self) -> Result<(), FileError> {
        remove(&self.note)
    }

    fn write(&self, path: &Utf8Path, text: &str) -> Result<(), FileError> {
        // For the account that reads the token, whoever writes: root may rotate for it.
        let owner = Owner::of(&self.token).ok().map(Owner::private);
        replace(path, format!("{text}\n").as_bytes(), owner).map_err(|source| FileError {
            verb: "write",
            path: path.to_owned(),
            source,
        })
    }
}

fn modified(path: &Utf8Path) -> Result<Timestamp, FileError> {
    let modified = fs::metadata(path).and_then(|meta| meta.modified());
    modified
        .and_then(|time| Timestamp::try_from(time).map_err(io::Error::other))
        .map_err(|source| FileError { verb: "look at", path: path.to_owned(), source })
}

fn read(path: &Utf8Path) -> io::Result<Option<Secret>> {
    let mut text = String::new();
    match File::open(path) {
        Ok(file) => file.take(MAX_LEN).read_to_string(&mut text)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let token = text.trim();
    if token.is_empty() || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "it holds no token"));
    }
    Ok(Some(Secret::new(token)))
}

fn remove(path: &Utf8Path) -> Result<(), FileError> {
    let failed = |source| FileError { verb: "remove", path: path.to_owned(), source };
    match fs::remove_file(path) {
        Ok(()) => sync_directory(path).map_err(failed),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(failed(error)),
    }
}
