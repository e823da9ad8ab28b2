//! The only place that opens files or starts processes in a workspace.
//!
//! Today the hands are the service account's. Directories are made with mode 0700, files with 0600, and
//! a process gets an environment built up from nothing, closed standard input, a process group of its
//! own that does not outlive it, and a bound on what it may say.

mod process;

use std::ffi::OsStr;
use std::fs;
use std::io::{self, Read as _, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use camino::{Utf8Path, Utf8PathBuf};
use rustix::fs::OFlags;
use sha2::{Digest as _, Sha256};

pub(super) use self::process::{Call, capture, run};
use crate::gitlab::wire::Secret;

/// Why the hands could not do something.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {subject}: {source}")]
pub(super) struct HandsError {
    action: &'static str,
    subject: String,
    source: io::Error,
}

impl HandsError {
    /// Says whether something was not there.
    pub(super) fn is_missing(&self) -> bool {
        self.source.kind() == io::ErrorKind::NotFound
    }

    fn at(action: &'static str, path: &Utf8Path) -> impl FnOnce(io::Error) -> Self {
        let subject = path.to_string();
        move |source| Self { action, subject, source }
    }
}

async fn blocking<T: Send + 'static>(
    action: &'static str,
    path: &Utf8Path,
    work: impl FnOnce(&Utf8Path) -> io::Result<T> + Send + 'static,
) -> Result<T, HandsError> {
    let owned = path.to_owned();
    match tokio::task::spawn_blocking(move || work(&owned)).await {
        Ok(result) => result.map_err(HandsError::at(action, path)),
        Err(panicked) => Err(HandsError::at(action, path)(io::Error::other(panicked))),
    }
}

/// Makes a directory and its parents; one that exists stays as it is.
pub(super) async fn make_dir(path: &Utf8Path) -> Result<(), HandsError> {
    blocking("make the directory", path, |path| {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
    })
    .await
}

/// Removes whatever has this name, with everything in it; a link is removed, not followed.
pub(super) async fn remove(path: &Utf8Path) -> Result<(), HandsError> {
    blocking("remove", path, |path| match remove_now(path) {
        // Build tools like to leave directories that nobody may write to.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            unlock(path)?;
            remove_now(path)
        }
        other => other,
    })
    .await
}

/// Removes what has this clean name below a directory, unless a link leads there.
pub(super) async fn remove_within(root: &Utf8Path, name: &str) -> Result<(), HandsError> {
    let mut path = root.to_owned();
    let mut parts = name.split('/').peekable();
    while let Some(part) = parts.next() {
        path.push(part);
        if parts.peek().is_some() && !is_dir(&path).await? {
            return Ok(());
        }
    }
    remove(&path).await
}

/// Removes files and links below a directory, none of them through a link. It blocks.
pub(super) fn remove_files<'a>(
    root: &Utf8Path,
    names: impl Iterator<Item = &'a [u8]>,
    stop: &AtomicBool,
) -> io::Result<()> {
    for name in names {
        if stop.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::Interrupted.into());
        }
        let path = root.as_std_path().join(OsStr::from_bytes(name));
        let removed = match fs::remove_file(&path) {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                let parent = path.parent().unwrap_or(root.as_std_path());
                let mode = fs::symlink_metadata(parent)?.permissions().mode();
                fs::set_permissions(parent, fs::Permissions::from_mode(mode | 0o700))?;
                fs::remove_file(&path)
            }
            other => other,
        };
        match removed {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
    }
    Ok(())
}

/// Gives a file another name on the same file system.
pub(super) async fn rename(from: &Utf8Path, to: &Utf8Path) -> Result<(), HandsError> {
    let to = to.to_owned();
    blocking("rename", from, move |from| fs::rename(from, to)).await
}

fn remove_now(path: &Utf8Path) -> io::Result<()> {
    let result = match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Makes every directory of a tree writable for its owner.
fn unlock(root: &Utf8Path) -> io::Result<()> {
    let mut todo = vec![root.to_path_buf().into_std_path_buf()];
    while let Some(dir) = todo.pop() {
        let mode = fs::symlink_metadata(&dir)?.permissions().mode();
        fs::set_permissions(&dir, fs::Permissions::from_mode(mode | 0o700))?;
        for entry in fs::read_dir(&dir)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                todo.push(entry.path());
            }
        }
    }
    Ok(())
}

/// Writes a new file that only its owner may read; whatever had the name is removed first.
pub(super) async fn write_private(path: &Utf8Path, content: Secret) -> Result<(), HandsError> {
    blocking("write", path, move |path| {
        remove_now(path)?;
        let mut file =
            fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        file.write_all(content.expose().as_bytes())
    })
    .await
}

/// A file of ours on its way to its name: without [`Draft::keep`] it is removed.
#[derive(Debug)]
pub(super) struct Draft {
    path: Utf8PathBuf,
}

impl Draft {
    /// Makes a new file that only its owner may read; whatever had the name is removed first.
    pub(super) async fn create(path: &Utf8Path) -> Result<(Self, fs::File), HandsError> {
        let draft = Self { path: path.to_owned() };
        let file = blocking("make the file", path, |path| {
            remove_now(path)?;
            fs::OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)
        })
        .await?;
        Ok((draft, file))
    }

    /// Names a file that somebody else writes.
    pub(super) fn at(path: Utf8PathBuf) -> Self {
        Self { path }
    }

    /// Gives the file its name, once its bytes are on the disk.
    pub(super) async fn keep(self, file: fs::File, path: &Utf8Path) -> Result<(), HandsError> {
        let (from, to) = (self.path.clone(), path.to_owned());
        blocking("keep", path, move |_| {
            file.sync_all()?;
            fs::rename(&from, &to)?;
            match to.parent() {
                Some(dir) => fs::File::open(dir)?.sync_all(),
                None => Ok(()),
            }
        })
        .await
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if let Err(error) = remove_now(&self.path) {
            tracing::warn!(path = %self.path, %error, "temporary file not removed");
        }
    }
}

/// Opens a file of ours to read it.
pub(super) async fn open(path: &Utf8Path) -> Result<fs::File, HandsError> {
    blocking("open", path, |path| fs::File::open(path)).await
}

/// Reads a regular file up to a length; nothing if it is not there. What a job put in its place, a
/// link or a pipe, counts as not there.
pub(super) async fn read_regular(
    path: &Utf8Path,
    most: u64,
) -> Result<Option<Vec<u8>>, HandsError> {
    blocking("read", path, move |path| {
        if !existing(path, fs::Metadata::is_file)? {
            return Ok(None);
        }
        let nofollow = OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let flags = i32::try_from(nofollow.bits()).map_err(io::Error::other)?;
        let file = fs::OpenOptions::new().read(true).custom_flags(flags).open(path)?;
        let mut content = Vec::new();
        file.take(most).read_to_end(&mut content)?;
        Ok(Some(content))
    })
    .await
}

/// Writes a new file into the checkout, which others may read as they may read its neighbours.
pub(super) async fn write_shared(path: &Utf8Path, content: Vec<u8>) -> Result<(), HandsError> {
    blocking("write", path, move |path| {
        remove_now(path)?;
        let mut file =
            fs::OpenOptions::new().write(true).create_new(true).mode(0o644).open(path)?;
        file.write_all(&content)
    })
    .await
}

/// Computes SHA-256 of a regular file below a directory; `None` if it is none any more.
pub(super) fn digest(root: &Utf8Path, name: &[u8], stop: &AtomicBool) -> Option<String> {
    let path = root.as_std_path().join(OsStr::from_bytes(name));
    let flags = i32::try_from((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits()).ok()?;
    let mut file = fs::OpenOptions::new().read(true).custom_flags(flags).open(path).ok()?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 128 * 1024];
    loop {
        let len = file.read(&mut buffer).ok()?;
        if len == 0 {
            break;
        }
        hasher.update(buffer.get(..len)?);
        if stop.load(Ordering::Relaxed) {
            return None;
        }
    }
    Some(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Says whether this is a directory, and no link to one.
pub(super) async fn is_dir(path: &Utf8Path) -> Result<bool, HandsError> {
    blocking("look at", path, |path| existing(path, fs::Metadata::is_dir)).await
}

/// Says whether this is a regular file, and no link to one.
pub(super) async fn is_file(path: &Utf8Path) -> Result<bool, HandsError> {
    blocking("look at", path, |path| existing(path, fs::Metadata::is_file)).await
}

fn existing(path: &Utf8Path, is: impl FnOnce(&fs::Metadata) -> bool) -> io::Result<bool> {
    match fs::symlink_metadata(path) {
        Ok(meta) => Ok(is(&meta)),
        Err(error)
            if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) =>
        {
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

/// Removes the files below a directory whose names end so.
pub(super) async fn remove_below(dir: &Utf8Path, suffix: &'static str) -> Result<(), HandsError> {
    blocking("clean up", dir, move |dir| {
        let mut todo = vec![dir.to_path_buf().into_std_path_buf()];
        while let Some(dir) = todo.pop() {
            let entries = match fs::read_dir(&dir) {
                Ok(entries) => entries,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            for entry in entries {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    todo.push(entry.path());
                } else if entry.file_name().as_encoded_bytes().ends_with(suffix.as_bytes()) {
                    fs::remove_file(entry.path())?;
                }
            }
        }
        Ok(())
    })
    .await
}

/// What an entry of a directory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Dir,
    File,
    /// A link or something stranger.
    Other,
}

/// Lists a directory; one that is not there is empty. Names that are not UTF-8 are left out.
pub(super) async fn entries(dir: &Utf8Path) -> Result<Vec<(String, Kind)>, HandsError> {
    blocking("list", dir, |dir| {
        let entries = match fs::read_dir(dir) {
            Ok(entries) => entries,
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
                ) =>
            {
                return Ok(Vec::new());
            }
            Err(error) => return Err(error),
        };
        let mut found = Vec::new();
        for entry in entries {
            let entry = entry?;
            let kind = entry.file_type()?;
            let kind = if kind.is_dir() {
                Kind::Dir
            } else if kind.is_file() {
                Kind::File
            } else {
                Kind::Other
            };
            if let Ok(name) = entry.file_name().into_string() {
                found.push((name, kind));
            }
        }
        Ok(found)
    })
    .await
}

/// Removes the links that lie directly in a directory.
pub(super) async fn remove_links(dir: &Utf8Path) -> Result<(), HandsError> {
    for (name, kind) in entries(dir).await? {
        if kind == Kind::Other {
            remove(&dir.join(name)).await?;
        }
    }
    Ok(())
}

/// Reads a regular file, and no link to one; `None` if there is none, or if it is larger than `most`.
pub(super) async fn read(path: &Utf8Path, most: u64) -> Result<Option<Vec<u8>>, HandsError> {
    blocking("read", path, move |path| {
        if !existing(path, |meta| meta.is_file() && meta.len() <= most)? {
            return Ok(None);
        }
        match fs::read(path) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    })
    .await
}

/// Says where a path really is: the links of the part that exists are followed.
pub(super) async fn really(path: &Utf8Path) -> Result<Utf8PathBuf, HandsError> {
    blocking("follow", path, |path| {
        for existing in path.ancestors() {
            match existing.canonicalize_utf8() {
                Ok(real) => {
                    let rest = path.strip_prefix(existing).map_err(io::Error::other)?;
                    return Ok(if rest.as_str().is_empty() { real } else { real.join(rest) });
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(path.to_owned())
    })
    .await
}

/// Makes a file, or makes it younger, and gives the time that the file system then says.
pub(super) async fn touch(path: &Utf8Path) -> Result<SystemTime, HandsError> {
    blocking("touch", path, |path| {
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(path)?;
        file.write_all(b"\n")?;
        file.metadata()?.modified()
    })
    .await
}

/// Says when a file or directory was last written to; `None` if it is not there.
pub(super) async fn modified(path: &Utf8Path) -> Result<Option<SystemTime>, HandsError> {
    blocking("look at", path, |path| match fs::symlink_metadata(path) {
        Ok(meta) => meta.modified().map(Some),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    })
    .await
}

/// How a lock is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hold {
    /// With others.
    Together,
    /// By nobody else.
    Alone,
}

/// A lock among processes; the kernel lets go of it with the file, even when we are killed.
#[derive(Debug)]
pub(super) struct Held {
    _file: fs::File,
}

/// Takes a lock if that can be done at once.
pub(super) async fn try_hold(path: &Utf8Path, hold: Hold) -> Result<Option<Held>, HandsError> {
    blocking("lock", path, move |path| {
        let file = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)?;
        let taken = match hold {
            Hold::Together => file.try_lock_shared(),
            Hold::Alone => file.try_lock(),
        };
        match taken {
            Ok(()) => Ok(Some(Held { _file: file })),
            Err(fs::TryLockError::WouldBlock) => Ok(None),
            Err(fs::TryLockError::Error(error)) => Err(error),
        }
    })
    .await
}

/// What files were like when they were looked at.
#[derive(Debug, Default)]
pub(super) struct Looked {
    /// The time of the newest file; directories and links have none that counts.
    pub(super) newest: Option<SystemTime>,
    /// Names, sizes, modes and targets, digested.
    pub(super) digest: String,
}

/// Looks at files below a directory; what is gone by then is not there. It blocks.
pub(super) fn look_at<'a>(
    root: &Utf8Path,
    names: impl Iterator<Item = &'a [u8]>,
    stop: &AtomicBool,
) -> io::Result<Looked> {
    let mut newest = None;
    let mut digest = Sha256::new();
    for name in names {
        if stop.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::Interrupted.into());
        }
        let path = root.as_std_path().join(OsStr::from_bytes(name));
        let status = match fs::symlink_metadata(&path) {
            Ok(status) => status,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        let mode = status.permissions().mode();
        let size = if status.is_file() { status.len() } else { 0 };
        digest.update(name);
        digest.update(format!("\0{mode:o} {size}\0"));
        if status.is_symlink() {
            digest.update(fs::read_link(&path)?.as_os_str().as_bytes());
        }
        if status.is_file() {
            newest = newest.max(Some(status.modified()?));
        }
    }
    let digest = digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(Looked { newest, digest })
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn dir() -> (tempfile::TempDir, Utf8PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = Utf8PathBuf::from_path_buf(dir.path().to_owned()).unwrap();
        (dir, path)
    }

    #[tokio::test]
    async fn modes_are_private_and_links_are_not_followed() {
        let (_dir, path) = dir();
        let sub = path.join("a/b");
        make_dir(&sub).await.unwrap();
        assert_eq!(fs::metadata(&sub).unwrap().permissions().mode() & 0o777, 0o700);

        let victim = path.join("victim");
        fs::write(&victim, "untouched").unwrap();
        let file = sub.join("KEY");
        std::os::unix::fs::symlink(&victim, &file).unwrap();
        write_private(&file, Secret::new("a\0b")).await.unwrap();
        assert_eq!(fs::read(&file).unwrap(), b"a\0b");
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read(&victim).unwrap(), b"untouched");

        let link = path.join("link");
        std::os::unix::fs::symlink(&sub, &link).unwrap();
        remove(&link).await.unwrap();
        assert!(sub.exists() && !link.exists());
        remove(&link).await.unwrap();

        fs::set_permissions(&sub, fs::Permissions::from_mode(0o500)).unwrap();
        remove(&path.join("a")).await.unwrap();
        assert!(!sub.exists());
    }
}
