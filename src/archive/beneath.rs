//! A directory whose inside is reached without leaving it.
//!
//! Whoever wrote the tree may have put links into it, and may still be changing it. Names are therefore
//! resolved by the kernel with links forbidden (`openat2`), or, where a kernel does not have that, one
//! directory at a time, never following.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use camino::Utf8Path;
use rustix::fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;

const DIRECTORY: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::NONBLOCK)
    .union(OFlags::CLOEXEC);

/// Whether the kernel has turned out to lack `openat2`, or a filter to forbid it.
static BY_HAND: AtomicBool = AtomicBool::new(false);

/// An open directory, and the directory below it that was used last.
#[derive(Debug)]
pub(super) struct Beneath {
    root: OwnedFd,
    parent: Option<(Vec<u8>, OwnedFd)>,
}

/// Cuts a name into its directory and what it is called there.
fn parted(name: &[u8]) -> (&[u8], &[u8]) {
    match name.iter().rposition(|byte| *byte == b'/') {
        Some(at) => (name.get(..at).unwrap_or_default(), name.get(at + 1..).unwrap_or_default()),
        None => (b"", name),
    }
}

impl Beneath {
    /// Opens the root; a link to it is followed.
    pub(super) fn open(root: &Utf8Path) -> io::Result<Self> {
        let flags = DIRECTORY.difference(OFlags::NOFOLLOW);
        let root = rustix::fs::openat(CWD, root.as_std_path(), flags, Mode::empty())?;
        Ok(Self { root, parent: None })
    }

    /// Another handle to the same root.
    pub(super) fn again(&self) -> io::Result<Self> {
        Ok(Self { root: self.root.try_clone()?, parent: None })
    }

    /// Opens a directory below; the empty name is the root.
    pub(super) fn directory(&self, name: &[u8]) -> io::Result<OwnedFd> {
        let name = if name.is_empty() { b".".as_slice() } else { name };
        if !BY_HAND.load(Ordering::Relaxed) {
            let resolve =
                ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
            match rustix::fs::openat2(&self.root, name, DIRECTORY, Mode::empty(), resolve) {
                Err(Errno::NOSYS | Errno::PERM) => BY_HAND.store(true, Ordering::Relaxed),
                result => return Ok(result?),
            }
        }
        self.directory_by_hand(name)
    }

    fn directory_by_hand(&self, name: &[u8]) -> io::Result<OwnedFd> {
        let mut at = self.root.try_clone()?;
        for part in name.split(|byte| *byte == b'/') {
            if part == b".." {
                return Err(Errno::XDEV.into());
            }
            at = rustix::fs::openat(&at, part, DIRECTORY, Mode::empty())?;
        }
        Ok(at)
    }

    /// The directory that something is in, and what it is called there.
    pub(super) fn parent<'a, 'b>(
        &'a mut self,
        name: &'b [u8],
    ) -> io::Result<(BorrowedFd<'a>, &'b [u8])> {
        let (directory, base) = parted(name);
        let base = if base.is_empty() { b".".as_slice() } else { base };
        if directory.is_empty() {
            return Ok((self.root.as_fd(), base));
        }
        let fresh = match self.parent.take() {
            Some((known, fd)) if known == directory => (known, fd),
            _ => (directory.to_vec(), self.directory(directory)?),
        };
        let fd: &OwnedFd = &self.parent.insert(fresh).1;
        Ok((OwnedFd::as_fd(fd), base))
    }

    /// The directory that something is in, made with its parents where it is not there.
    pub(super) fn parent_made<'a, 'b>(
        &'a mut self,
        name: &'b [u8],
    ) -> io::Result<(BorrowedFd<'a>, &'b [u8])> {
        let (directory, _) = parted(name);
        let known = self.parent.as_ref().is_some_and(|(known, _)| known == directory);
        if !known && !directory.is_empty() {
            let fd = match self.directory(directory) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => self.make(directory)?,
                result => result?,
            };
            self.parent = Some((directory.to_vec(), fd));
        }
        self.parent(name)
    }

    /// Makes a directory and its parents; one that is there stays as it is.
    pub(super) fn make(&self, name: &[u8]) -> io::Result<OwnedFd> {
        let mut at = self.root.try_clone()?;
        for part in name.split(|byte| *byte == b'/') {
            if part == b".." {
                return Err(Errno::XDEV.into());
            }
            match rustix::fs::mkdirat(&at, part, Mode::from_raw_mode(0o777)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => return Err(error.into()),
            }
            at = rustix::fs::openat(&at, part, DIRECTORY, Mode::empty())?;
        }
        Ok(at)
    }

    /// What something is, links not followed.
    pub(super) fn stat(&mut self, name: &[u8]) -> io::Result<Stat> {
        let (parent, base) = self.parent(name)?;
        Ok(rustix::fs::statat(parent, base, AtFlags::SYMLINK_NOFOLLOW)?)
    }

    /// Opens a file for reading; never waits for the other end of a pipe.
    pub(super) fn file(&mut self, name: &[u8]) -> io::Result<std::fs::File> {
        let (parent, base) = self.parent(name)?;
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        Ok(rustix::fs::openat(parent, base, flags, Mode::empty())?.into())
    }

    /// Where a link points.
    pub(super) fn target(&mut self, name: &[u8]) -> io::Result<Vec<u8>> {
        let (parent, base) = self.parent(name)?;
        Ok(rustix::fs::readlinkat(parent, base, Vec::new())?.into_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree() -> (tempfile::TempDir, Beneath) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("a/b")).unwrap();
        std::fs::write(dir.path().join("a/b/file"), "x").unwrap();
        std::os::unix::fs::symlink("b", dir.path().join("a/link")).unwrap();
        let beneath = Beneath::open(Utf8Path::from_path(dir.path()).unwrap()).unwrap();
        (dir, beneath)
    }

    #[test]
    fn nothing_is_reached_through_a_link_or_upwards() {
        let (_dir, mut beneath) = tree();
        assert!(beneath.file(b"a/b/file").is_ok());
        for name in ["a/link/file", "../x", "a/../../x"] {
            assert!(beneath.file(name.as_bytes()).is_err(), "{name}");
        }
        assert!(beneath.directory(b"a/link").is_err());
        assert!(beneath.directory_by_hand(b"a/b").is_ok());
        assert!(beneath.directory_by_hand(b"a/link").is_err());
        assert!(beneath.directory_by_hand(b"a/..").is_err());
        assert!(beneath.make(b"a/link/new").is_err());
        assert!(beneath.make(b"a/../new").is_err());
        assert!(beneath.make(b"a/c/d").is_ok());
    }
}
