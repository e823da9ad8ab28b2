//! Unpacks what a job has left into its project directory, and nowhere else.
//!
//! Whoever wrote the job wrote the archive. So no name leads through a link or upwards, whatever the
//! archive or the directory holds; what stands in the way is replaced, not followed; devices, pipes and
//! the bits that lend rights stay behind; and what it grows to is bounded, by bytes and by names.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;

use camino::Utf8Path;
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, Timespec, Timestamps, UTIME_OMIT};
use rustix::io::Errno;

/// Linux takes no longer path.
const LONGEST_NAME: usize = 4096;

/// What an archive may say about one name beside it.
const LONGEST_EXTENSION: u64 = 1 << 20;

/// More names cost a submit node its inodes.
const MOST_ENTRIES: u64 = 1_000_000;

const DIRECTORY: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Unpacks a tar that comes in parts, each of them the only file of another tar.
pub(crate) fn unpack(parts: Vec<File>, into: &Utf8Path, most: u64) -> io::Result<()> {
    let mut whole: Box<dyn io::Read> = Box::new(io::empty());
    for mut part in parts {
        part.rewind()?;
        let mut header = tar::Header::new_ustar();
        part.read_exact(header.as_mut_bytes())?;
        let size = header.entry_size()?;
        whole = Box::new(whole.chain(io::BufReader::new(part.take(size))));
    }
    let mut magic = [0; 2];
    whole.read_exact(&mut magic)?;
    let whole = io::Cursor::new(magic).chain(whole);
    let plain: Box<dyn io::Read> = if magic == [0x1f, 0x8b] {
        Box::new(flate2::read::MultiGzDecoder::new(whole))
    } else {
        Box::new(whole)
    };
    unpack_tar(plain, into, most, MOST_ENTRIES)
}

fn unpack_tar(
    plain: Box<dyn io::Read>,
    into: &Utf8Path,
    most: u64,
    most_entries: u64,
) -> io::Result<()> {
    std::fs::create_dir_all(into)?;
    let flags = DIRECTORY.difference(OFlags::NOFOLLOW);
    let root = rustix::fs::openat(CWD, into.as_std_path(), flags, Mode::empty())?;
    let mut tree = Tree { root, parent: None, left_out: 0, first: String::new() };
    let mut archive = tar::Archive::new(Bounded { inner: plain, left: most });
    // It may be several, one after the other.
    archive.set_ignore_zeros(true);
    let mut long = Long::default();
    let mut count = 0_u64;
    // Raw, because long names are read here, where they are bounded.
    for entry in archive.entries()?.raw(true) {
        let mut entry = entry.map_err(damaged)?;
        count += 1;
        if count > most_entries {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        let kind = entry.header().entry_type();
        if kind.is_gnu_longname() {
            long.name = Some(said(&mut entry)?);
        } else if kind.is_gnu_longlink() {
            long.link = Some(said(&mut entry)?);
        } else if kind.is_pax_local_extensions() {
            long.take_over(&mut entry)?;
        } else if !kind.is_pax_global_extensions() {
            tree.place(&mut entry, std::mem::take(&mut long))?;
        }
    }
    // What follows has the checksum of all that came before.
    io::copy(&mut archive.into_inner(), &mut io::sink())?;
    if tree.left_out > 0 {
        let (left_out, first) = (tree.left_out, tree.first);
        tracing::warn!(left_out, first, "outputs that have no place in the directory are left out");
    }
    Ok(())
}

/// An archive that makes no sense is damaged, whatever its reader calls it.
fn damaged(error: io::Error) -> io::Error {
    if error.kind() == io::ErrorKind::Other {
        return io::Error::new(io::ErrorKind::InvalidData, error);
    }
    error
}

/// What an archive says about the next entry, beside its header.
#[derive(Default)]
struct Long {
    name: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
}

impl Long {
    fn take_over(&mut self, entry: &mut impl io::Read) -> io::Result<()> {
        let bytes = bounded(entry)?;
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            // By its length, since a value may hold any byte.
            let (key, value, after) = record(rest).ok_or(io::ErrorKind::InvalidData)?;
            match key {
                b"path" => self.name = Some(value.to_vec()),
                b"linkpath" => self.link = Some(value.to_vec()),
                // The header cannot say it, so it is more than anybody may bring.
                b"size" => return Err(io::ErrorKind::FileTooLarge.into()),
                _ => {}
            }
            rest = after;
        }
        Ok(())
    }
}

/// Reads `length key=value` and a line's end; gives what follows as well.
fn record(bytes: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let blank = bytes.iter().position(|byte| *byte == b' ')?;
    let length: usize = std::str::from_utf8(bytes.get(..blank)?).ok()?.parse().ok()?;
    let pair = bytes.get(blank + 1..length)?.strip_suffix(b"\n")?;
    let equals = pair.iter().position(|byte| *byte == b'=')?;
    Some((pair.get(..equals)?, pair.get(equals + 1..)?, bytes.get(length..)?))
}

fn bounded(entry: &mut impl io::Read) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    entry.take(LONGEST_EXTENSION + 1).read_to_end(&mut bytes)?;
    if u64::try_from(bytes.len()).unwrap_or(u64::MAX) > LONGEST_EXTENSION {
        return Err(io::ErrorKind::InvalidData.into());
    }
    Ok(bytes)
}

fn said(entry: &mut impl io::Read) -> io::Result<Vec<u8>> {
    let mut bytes = bounded(entry)?;
    if bytes.last() == Some(&0) {
        bytes.pop();
    }
    Ok(bytes)
}

/// Gives a name's parts; none when it leads elsewhere, or cannot be a name.
fn parts_of(name: &[u8]) -> Option<Vec<&[u8]>> {
    if name.len() > LONGEST_NAME || name.starts_with(b"/") || name.contains(&0) {
        return None;
    }
    let parts = name.split(|byte| *byte == b'/').filter(|part| !part.is_empty() && *part != b".");
    let parts: Vec<&[u8]> = parts.collect();
    (!parts.contains(&b"..".as_slice())).then_some(parts)
}

/// The directory that is filled, and the one below it that was used last.
struct Tree {
    root: OwnedFd,
    parent: Option<(Vec<u8>, OwnedFd)>,
    left_out: u64,
    first: String,
}

impl Tree {
    fn leave_out(&mut self, name: &[u8]) {
        if self.left_out == 0 {
            self.first = String::from_utf8_lossy(name).chars().take(200).collect();
        }
        self.left_out += 1;
    }

    fn place(&mut self, entry: &mut tar::Entry<'_, impl io::Read>, long: Long) -> io::Result<()> {
        let header = entry.header().clone();
        let name = match long.name {
            Some(name) => name,
            None => header.path_bytes().into_owned(),
        };
        let kind = header.entry_type();
        let link = long.link.or_else(|| header.link_name_bytes().map(std::borrow::Cow::into_owned));
        let known = kind.is_file()
            || kind.is_contiguous()
            || kind.is_dir()
            || kind.is_symlink()
            || kind.is_hard_link();
        let Some(parts) = parts_of(&name).filter(|_| known) else {
            self.leave_out(&name);
            return Ok(());
        };
        let Some((base, above)) = parts.split_last() else { return Ok(()) };
        // An old kind of archive says "directory" by the end of the name alone.
        let is_dir = kind.is_dir() || kind.is_file() && name.ends_with(b"/");
        let mode = header.mode().unwrap_or(0o600) & 0o777;
        let parent = self.made(above)?;
        if is_dir {
            let fd = directory(parent, base)?;
            rustix::fs::fchmod(&fd, Mode::from_raw_mode(mode | 0o700))?;
            return Ok(());
        }
        if kind.is_symlink() {
            let target = link.filter(|link| !link.is_empty() && link.len() < LONGEST_NAME);
            let Some(target) = target.filter(|target| !target.contains(&0)) else {
                self.leave_out(&name);
                return Ok(());
            };
            clear(parent, base)?;
            rustix::fs::symlinkat(target.as_slice(), parent, *base)?;
            return Ok(());
        }
        if kind.is_hard_link() {
            if !self.link(link.as_deref().unwrap_or_default(), above, base)? {
                self.leave_out(&name);
            }
            return Ok(());
        }
        clear(parent, base)?;
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut file: File =
            rustix::fs::openat(parent, *base, flags, Mode::from_raw_mode(0o600))?.into();
        let whole = io::copy(entry, &mut file).and_then(|len| {
            file.flush()?;
            if len == header.entry_size()? {
                return Ok(());
            }
            Err(io::ErrorKind::UnexpectedEof.into())
        });
        if let Err(error) = whole {
            // Half a file is worse than none.
            rustix::fs::unlinkat(parent, *base, AtFlags::empty())?;
            return Err(error);
        }
        // Its owner reads it in any case: that is what it was brought home for.
        rustix::fs::fchmod(&file, Mode::from_raw_mode(mode | 0o400))?;
        let modified = header.mtime().ok().and_then(|time| i64::try_from(time).ok());
        if let Some(tv_sec) = modified {
            let times = Timestamps {
                last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
                last_modification: Timespec { tv_sec, tv_nsec: 0 },
            };
            rustix::fs::futimens(&file, &times)?;
        }
        Ok(())
    }

    /// Gives another name to a file that is here already.
    fn link(&mut self, to: &[u8], above: &[&[u8]], base: &[u8]) -> io::Result<bool> {
        let Some(parts) = parts_of(to) else { return Ok(false) };
        let Some((file, dirs)) = parts.split_last() else { return Ok(false) };
        if dirs == above && *file == base {
            return Ok(true);
        }
        let mut at = self.root.try_clone()?;
        for part in dirs {
            at = match rustix::fs::openat(&at, *part, DIRECTORY, Mode::empty()) {
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(false),
                result => result?,
            };
        }
        let stat = match rustix::fs::statat(&at, *file, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => return Ok(false),
            result => result?,
        };
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Ok(false);
        }
        let parent = self.made(above)?;
        clear(parent, base)?;
        rustix::fs::linkat(&at, *file, parent, base, AtFlags::empty())?;
        Ok(true)
    }

    /// Gives a directory below, made where it is not there.
    fn made(&mut self, parts: &[&[u8]]) -> io::Result<BorrowedFd<'_>> {
        if parts.is_empty() {
            return Ok(self.root.as_fd());
        }
        let name = parts.join(&b'/');
        let fresh = match self.parent.take() {
            // It may have been replaced meanwhile; then it is no part of the tree any more.
            Some((known, fd)) if known == name && rustix::fs::fstat(&fd)?.st_nlink > 0 => {
                (known, fd)
            }
            Some(_) | None => {
                let mut at = self.root.try_clone()?;
                for part in parts {
                    at = directory(at.as_fd(), part)?;
                }
                (name, at)
            }
        };
        Ok(OwnedFd::as_fd(&self.parent.insert(fresh).1))
    }
}

/// Opens a directory in which something is to be put; makes it where something else stands.
fn directory(parent: BorrowedFd<'_>, name: &[u8]) -> io::Result<OwnedFd> {
    let fd = match rustix::fs::openat(parent, name, DIRECTORY, Mode::empty()) {
        Ok(fd) => fd,
        Err(error) => {
            match error {
                Errno::NOENT => {}
                Errno::NOTDIR | Errno::LOOP => clear(parent, name)?,
                error => return Err(error.into()),
            }
            rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(0o755))?;
            rustix::fs::openat(parent, name, DIRECTORY, Mode::empty())?
        }
    };
    let mode = rustix::fs::fstat(&fd)?.st_mode;
    if mode & 0o700 != 0o700 {
        rustix::fs::fchmod(&fd, Mode::from_raw_mode(mode & 0o777 | 0o700))?;
    }
    Ok(fd)
}

/// Takes away what has a name, links not followed.
fn clear(parent: BorrowedFd<'_>, name: &[u8]) -> io::Result<()> {
    match rustix::fs::unlinkat(parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(Errno::ISDIR | Errno::PERM) => {
            // By the open directory, so that nobody can move the way to it.
            let path = std::path::PathBuf::from(format!("/proc/self/fd/{}", parent.as_raw_fd()));
            std::fs::remove_dir_all(path.join(std::ffi::OsStr::from_bytes(name)))
        }
        Err(error) => Err(error.into()),
    }
}

/// Fails instead of giving more than was agreed.
struct Bounded {
    inner: Box<dyn io::Read>,
    left: u64,
}

impl io::Read for Bounded {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(into)?;
        self.left = self
            .left
            .checked_sub(u64::try_from(n).unwrap_or(u64::MAX))
            .ok_or(io::ErrorKind::FileTooLarge)?;
        Ok(n)
    }
}

#[cfg(test)]
#[path = "unpack_tests.rs"]
mod tests;
