//! Puts things below a directory without ever leaving it.
//!
//! A name with a way out is an attack or a bug, and nothing is unpacked from an archive that has one.
//! The repository's own directory is not touched: git runs in the checkout with the service account's
//! rights, and what lies in `.git` tells it what to do. Nothing is written through a link, whoever made
//! it: links are made last, and the way to a file consists of directories.
//!
//! A link may point anywhere, as with the official runner: it is the job's own, and whoever follows it
//! later does so with the job's eyes open. Owners are not restored, and neither are the bits that lend
//! a program somebody else's rights.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;

use camino::Utf8Path;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, Timespec, Timestamps, UTIME_OMIT};
use rustix::io::Errno;

use super::beneath::Beneath;
use super::{ArchiveError, shown};

/// What something is to look like.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Looks {
    /// Permissions.
    pub(super) mode: Option<u32>,
    /// When it was changed, in seconds.
    pub(super) mtime: Option<i64>,
}

/// A name inside the directory, clean; nothing for the directory itself.
pub(super) fn inside(name: &[u8]) -> Result<Option<Vec<u8>>, ArchiveError> {
    let leaves = |why: &str| ArchiveError::Damaged { detail: format!("{:?} {why}", shown(name)) };
    if name.starts_with(b"/") {
        return Err(leaves("is an absolute name"));
    }
    if name.is_empty() || name.contains(&0) {
        return Err(leaves("is no name"));
    }
    let mut parts: Vec<&[u8]> = Vec::new();
    for part in name.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => return Err(leaves("leads out of the directory")),
            part => parts.push(part),
        }
    }
    Ok((!parts.is_empty()).then(|| parts.join(&b'/')))
}

/// Says whether a clean name belongs to the repository itself.
pub(super) fn is_protected(name: &[u8]) -> bool {
    let first = name.split(|byte| *byte == b'/').next().unwrap_or_default();
    // Some file systems do not care about case.
    first.eq_ignore_ascii_case(b".git")
}

/// The directory that things are put below.
pub(super) struct Placer {
    beneath: Beneath,
    links: Vec<(Vec<u8>, Vec<u8>, Looks)>,
    directories: BTreeMap<Vec<u8>, Looks>,
    warnings: Vec<String>,
    protected: u64,
    placed: u64,
}

/// What became of something.
pub(super) enum Placed {
    /// It may be written.
    Open(File),
    /// A link is in the way: it is left out.
    Refused,
}

impl Placer {
    /// Below this directory, which is made if it is not there.
    pub(super) fn new(into: &Utf8Path) -> Result<Self, ArchiveError> {
        std::fs::create_dir_all(into)
            .map_err(ArchiveError::io("make the directory", into.as_str()))?;
        let beneath = Beneath::open(into).map_err(ArchiveError::io("open", into.as_str()))?;
        Ok(Self::of(beneath))
    }

    fn of(beneath: Beneath) -> Self {
        Self {
            beneath,
            links: Vec::new(),
            directories: BTreeMap::new(),
            warnings: Vec::new(),
            protected: 0,
            placed: 0,
        }
    }

    /// Another one for the same directory, for another thread.
    pub(super) fn again(&self) -> Result<Self, ArchiveError> {
        let beneath = self.beneath.again().map_err(ArchiveError::io("open", "the directory"))?;
        Ok(Self::of(beneath))
    }

    /// Takes over what another one has to say.
    pub(super) fn join(&mut self, mut other: Self) {
        self.warnings.append(&mut other.warnings);
        self.placed += other.placed;
    }

    /// Says something to the user.
    pub(super) fn warn(&mut self, text: String) {
        self.warnings.push(text);
    }

    /// Counts something that would have gone into the repository's own directory.
    pub(super) fn protect(&mut self) {
        self.protected += 1;
    }

    /// Makes a directory; a file or link of this name goes away.
    pub(super) fn directory(&mut self, name: &[u8], looks: Looks) -> Result<(), ArchiveError> {
        if self.beneath.directory(name).is_err() {
            let made =
                self.beneath.parent_made(name).and_then(
                    |(parent, base)| match rustix::fs::mkdirat(
                        parent,
                        base,
                        Mode::from_raw_mode(0o777),
                    ) {
                        Err(Errno::EXIST) if is_directory(parent, base) => Ok(()),
                        Err(Errno::EXIST) => {
                            rustix::fs::unlinkat(parent, base, AtFlags::empty())?;
                            Ok(rustix::fs::mkdirat(parent, base, Mode::from_raw_mode(0o777))?)
                        }
                        result => Ok(result?),
                    },
                );
            if let Err(error) = made {
                return self.refuse(name, error);
            }
        }
        self.unlock(name);
        self.directories.insert(name.to_vec(), looks);
        self.placed += 1;
        Ok(())
    }

    /// Lets us write into a directory that an earlier attempt has finished, and so may have locked. What
    /// goes wrong here is found when something is written there.
    fn unlock(&mut self, name: &[u8]) {
        let Ok((parent, base)) = self.beneath.parent(name) else { return };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let Ok(directory) = rustix::fs::openat(parent, base, flags, Mode::empty()) else { return };
        let Ok(stat) = rustix::fs::fstat(&directory) else { return };
        if stat.st_mode & 0o700 != 0o700 {
            // A directory that may not be read can be named through its handle alone.
            let path = format!("/proc/self/fd/{}", directory.as_raw_fd());
            let mode = permissions(stat.st_mode | 0o700);
            if let Err(error) = rustix::fs::chmod(path, mode) {
                self.warnings.push(format!("{}: {error}", shown(name)));
            }
        }
    }

    /// Opens a new file; a file or link of this name goes away.
    pub(super) fn file(&mut self, name: &[u8]) -> Result<Placed, ArchiveError> {
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let open = self.beneath.parent_made(name).and_then(|(parent, base)| {
            let create = || rustix::fs::openat(parent, base, flags, Mode::from_raw_mode(0o600));
            match create() {
                Err(Errno::EXIST) => {
                    clear(parent, base)?;
                    Ok(create()?)
                }
                result => Ok(result?),
            }
        });
        match open {
            Ok(fd) => {
                self.placed += 1;
                Ok(Placed::Open(fd.into()))
            }
            Err(error) => self.refuse(name, error).map(|()| Placed::Refused),
        }
    }

    /// Gives a file that was written its permissions, then its time.
    pub(super) fn finish(&mut self, name: &[u8], file: &File, looks: Looks) {
        // The owner can always read what a job is given: a file of mode 0 is what it is.
        let mode = looks.mode.map_or(Ok(()), |mode| rustix::fs::fchmod(file, permissions(mode)));
        let time = looks.mtime.map_or(Ok(()), |mtime| rustix::fs::futimens(file, &times(mtime)));
        if let Err(error) = mode.and(time) {
            self.warnings.push(format!("{}: {error}", shown(name)));
        }
    }

    /// Makes a link, once everything else is there.
    pub(super) fn link(&mut self, name: Vec<u8>, target: Vec<u8>, looks: Looks) {
        self.links.push((name, target, looks));
    }

    /// A link on the way to something is a reason to leave it out; anything else is an error.
    fn refuse(&mut self, name: &[u8], error: io::Error) -> Result<(), ArchiveError> {
        let ends = name.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(at, _)| at);
        for end in ends {
            let way = name.get(..end).unwrap_or_default();
            let Ok(stat) = self.beneath.stat(way) else { break };
            if FileType::from_raw_mode(stat.st_mode) == FileType::Symlink {
                let (name, way) = (shown(name), shown(way));
                self.warnings.push(format!("{name}: not unpacked, since {way} is a link"));
                return Ok(());
            }
        }
        Err(ArchiveError::io("write", shown(name))(error))
    }

    /// Makes the links and gives the directories their looks, the innermost first; says how many things
    /// are there now, and what the user should know.
    pub(super) fn end(mut self) -> Result<(u64, Vec<String>), ArchiveError> {
        for (name, target, looks) in std::mem::take(&mut self.links) {
            let made = self.beneath.parent_made(&name).and_then(|(parent, base)| {
                match clear(parent, base) {
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    result => result?,
                }
                rustix::fs::symlinkat(target.as_slice(), parent, base)?;
                if let Some(mtime) = looks.mtime {
                    let flags = AtFlags::SYMLINK_NOFOLLOW;
                    rustix::fs::utimensat(parent, base, &times(mtime), flags)?;
                }
                Ok(())
            });
            match made {
                Ok(()) => self.placed += 1,
                Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {
                    let name = shown(&name);
                    self.warnings.push(format!("{name}: not unpacked, since a directory is there"));
                }
                Err(error) => self.refuse(&name, error)?,
            }
        }
        for (name, looks) in std::mem::take(&mut self.directories).into_iter().rev() {
            match self.beneath.directory(&name) {
                Ok(directory) => self.finish(&name, &directory.into(), looks),
                Err(error) => self.warnings.push(format!("{}: {error}", shown(&name))),
            }
        }
        if self.protected > 0 {
            let count = self.protected;
            self.warnings.push(format!(
                "Part of .git directory is on the list of files to extract: {count} files ignored"
            ));
        }
        Ok((self.placed, self.warnings))
    }
}

fn is_directory(parent: impl std::os::fd::AsFd, base: &[u8]) -> bool {
    let stat = rustix::fs::statat(parent, base, AtFlags::SYMLINK_NOFOLLOW);
    stat.is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Directory)
}

/// Removes a file, a link or an empty directory.
fn clear(parent: std::os::fd::BorrowedFd<'_>, base: &[u8]) -> io::Result<()> {
    match rustix::fs::unlinkat(parent, base, AtFlags::empty()) {
        Err(Errno::ISDIR | Errno::PERM) if is_directory(parent, base) => {
            Ok(rustix::fs::unlinkat(parent, base, AtFlags::REMOVEDIR)?)
        }
        result => Ok(result?),
    }
}

fn permissions(mode: u32) -> Mode {
    Mode::from_raw_mode(mode & 0o777)
}

fn times(mtime: i64) -> Timestamps {
    Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        last_modification: Timespec { tv_sec: mtime, tv_nsec: 0 },
    }
}
