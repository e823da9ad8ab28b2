//! The file that holds a job's trace, byte for byte as GitLab gets it.
//!
//! Append, [`Spool::sync`], then note the length in the database: what lies beyond the noted length may
//! be half of something, so opening cuts it off (crash point E). What lies before it was durable; if it
//! is missing all the same, or GitLab has more than we do, bytes were lost. The file is then stretched
//! over the hole so that offsets stay true, and a marker file beside it remembers for good that its
//! checksum means nothing any more.
//!
//! The calls block. They are short: local disk, at most the size of one piece of log.

use std::fs::{File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _, PermissionsExt as _};

use camino::{Utf8Path, Utf8PathBuf};

const MODE: u32 = 0o600;
/// How much is read at once for the checksum.
const READ: usize = 64 * 1024;

/// A spool that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{action} the spool {path}")]
pub struct SpoolError {
    action: &'static str,
    path: Utf8PathBuf,
    source: io::Error,
}

impl SpoolError {
    /// Says whether the disk is full: the operator's move, and worth not taking more jobs for.
    pub fn is_full(&self) -> bool {
        matches!(self.source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
    }
}

/// What was found on opening.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opened {
    /// As long as noted; a new spool is of length 0.
    Whole,
    /// Longer than noted: a crash came between append and note, and the rest was cut off.
    Cut {
        /// How many bytes.
        bytes: u64,
    },
    /// Shorter than noted: durable bytes were lost, and a hole took their place.
    Short {
        /// How many bytes.
        missing: u64,
    },
}

/// What a final update says about the trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Digest {
    /// CRC-32 (IEEE) of all bytes.
    pub crc32: u32,
    /// Their number.
    pub bytesize: u64,
}

impl Digest {
    /// Gives the checksum as GitLab reads it.
    pub fn checksum(&self) -> String {
        format!("crc32:{:08x}", self.crc32)
    }
}

/// An append-only file that is the trace.
#[derive(Debug)]
pub struct Spool {
    path: Utf8PathBuf,
    file: File,
    len: u64,
    holed: bool,
}

impl Spool {
    /// Opens the spool, or creates it, and makes it as long as was noted.
    ///
    /// # Errors
    ///
    /// Whatever the file system says.
    pub fn open(path: &Utf8Path, durable_len: u64) -> Result<(Self, Opened), SpoolError> {
        let fail = |action| move |source| SpoolError { action, path: path.to_owned(), source };
        let new = !path.try_exists().map_err(fail("look for"))?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(MODE)
            .open(path)
            .map_err(fail("open"))?;
        let meta = file.metadata().map_err(fail("examine"))?;
        if meta.permissions().mode() & 0o777 != MODE {
            file.set_permissions(Permissions::from_mode(MODE)).map_err(fail("protect"))?;
        }
        if new {
            // Without this, a power cut may take the name away and leave the noted length.
            sync_directory(path).map_err(fail("create"))?;
        }
        let holed = marker(path).try_exists().map_err(fail("look for the hole of"))?;
        let mut spool = Self { path: path.to_owned(), file, len: meta.len(), holed };
        let opened = if spool.len > durable_len {
            let bytes = spool.len - durable_len;
            spool.file.set_len(durable_len).map_err(fail("cut"))?;
            spool.len = durable_len;
            Opened::Cut { bytes }
        } else if spool.len < durable_len {
            let missing = durable_len - spool.len;
            spool.stretch(durable_len)?;
            Opened::Short { missing }
        } else {
            Opened::Whole
        };
        Ok((spool, opened))
    }

    fn fail(&self, action: &'static str) -> impl FnOnce(io::Error) -> SpoolError + '_ {
        move |source| SpoolError { action, path: self.path.clone(), source }
    }

    /// Gives the length, durable or not.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Says whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Says whether bytes were lost, now or in an earlier life.
    pub fn is_holed(&self) -> bool {
        self.holed
    }

    /// Appends bytes; they are durable after the next [`Spool::sync`].
    ///
    /// # Errors
    ///
    /// Whatever the file system says; the length is then the same as before, and the same bytes may be
    /// appended again.
    pub fn append(&mut self, bytes: &[u8]) -> Result<(), SpoolError> {
        // By offset, not at the file's end: what a failed call left behind is overwritten by the next.
        self.file.write_all_at(bytes, self.len).map_err(self.fail("append to"))?;
        self.len += u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        Ok(())
    }

    /// Makes everything appended durable and gives the length to note.
    ///
    /// # Errors
    ///
    /// Whatever the file system says. After an error nothing is known of the bytes since the last
    /// success: drop the spool and open it again at the noted length.
    pub fn sync(&mut self) -> Result<u64, SpoolError> {
        self.file.sync_data().map_err(self.fail("sync"))?;
        Ok(self.len)
    }

    /// Reads from an offset, at most `limit` bytes and not beyond the end.
    ///
    /// # Errors
    ///
    /// Whatever the file system says.
    pub fn read(&self, from: u64, limit: usize) -> Result<Vec<u8>, SpoolError> {
        let left = usize::try_from(self.len.saturating_sub(from)).unwrap_or(usize::MAX);
        let mut bytes = vec![0; left.min(limit)];
        self.file.read_exact_at(&mut bytes, from).map_err(self.fail("read"))?;
        Ok(bytes)
    }

    /// Computes what the final update says of the first `len` bytes; `None` if bytes were lost.
    ///
    /// # Errors
    ///
    /// Whatever the file system says; also if the spool is shorter than `len`.
    pub fn digest(&self, len: u64) -> Result<Option<Digest>, SpoolError> {
        if self.holed {
            return Ok(None);
        }
        let mut hasher = crc32fast::Hasher::new();
        let mut buffer = vec![0; READ];
        let mut at = 0;
        while at < len {
            let size = usize::try_from(len - at).unwrap_or(READ).min(READ);
            let piece = &mut buffer[..size];
            self.file.read_exact_at(piece, at).map_err(self.fail("read"))?;
            hasher.update(piece);
            at += u64::try_from(size).unwrap_or(u64::MAX);
        }
        Ok(Some(Digest { crc32: hasher.finalize(), bytesize: len }))
    }

    /// Makes the spool as long as what GitLab says it has; the bytes between are lost.
    ///
    /// Does nothing if the spool is that long already.
    ///
    /// # Errors
    ///
    /// Whatever the file system says.
    pub fn stretch(&mut self, to: u64) -> Result<(), SpoolError> {
        if to <= self.len {
            return Ok(());
        }
        if !self.holed {
            // First the marker, then the hole: a crash between the two costs a checksum, the other
            // order would lie about one.
            OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(false)
                .mode(MODE)
                .open(marker(&self.path))
                .map_err(self.fail("mark the hole of"))?;
            sync_directory(&self.path).map_err(self.fail("mark the hole of"))?;
            self.holed = true;
        }
        // Cut first: what a failed append left behind must not show up in the hole.
        self.file.set_len(self.len).map_err(self.fail("stretch"))?;
        self.file.set_len(to).map_err(self.fail("stretch"))?;
        self.len = to;
        self.sync()?;
        Ok(())
    }

    /// Removes a spool and its marker; one that is not there is fine.
    ///
    /// # Errors
    ///
    /// Whatever the file system says.
    pub fn remove(path: &Utf8Path) -> Result<(), SpoolError> {
        for file in [path.to_owned(), marker(path)] {
            match std::fs::remove_file(&file) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(source) => return Err(SpoolError { action: "remove", path: file, source }),
            }
        }
        Ok(())
    }
}

/// The file that says that this spool lost bytes.
fn marker(path: &Utf8Path) -> Utf8PathBuf {
    Utf8PathBuf::from(format!("{path}.hole"))
}

fn sync_directory(path: &Utf8Path) -> io::Result<()> {
    let parent = match path.parent() {
        Some(parent) if parent != "" => parent,
        Some(_) | None => Utf8Path::new("."),
    };
    File::open(parent)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn place() -> (tempfile::TempDir, Utf8PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = Utf8PathBuf::try_from(dir.path().join("job.trace")).unwrap();
        (dir, path)
    }

    #[test]
    fn what_was_appended_is_read_back() {
        let (_dir, path) = place();
        let (mut spool, opened) = Spool::open(&path, 0).unwrap();
        assert_eq!(opened, Opened::Whole);
        assert!(spool.is_empty());
        spool.append(b"hello ").unwrap();
        spool.append(b"world").unwrap();
        assert_eq!(spool.sync().unwrap(), 11);
        assert_eq!(spool.read(0, 5).unwrap(), b"hello");
        assert_eq!(spool.read(6, 100).unwrap(), b"world");
        assert_eq!(spool.read(11, 100).unwrap(), b"");
        assert_eq!(spool.read(12, 100).unwrap(), b"");
    }

    #[test]
    fn only_the_owner_may_read_it() {
        let (_dir, path) = place();
        drop(Spool::open(&path, 0).unwrap());
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        std::fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
        drop(Spool::open(&path, 0).unwrap());
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn the_digest_is_that_of_the_bytes() {
        let (_dir, path) = place();
        let (mut spool, _) = Spool::open(&path, 0).unwrap();
        // The check value of CRC-32/ISO-HDLC.
        spool.append(b"123456789 and more").unwrap();
        let digest = spool.digest(9).unwrap().unwrap();
        assert_eq!(digest, Digest { crc32: 0xcbf4_3926, bytesize: 9 });
        assert_eq!(digest.checksum(), "crc32:cbf43926");
        assert_eq!(spool.digest(0).unwrap().unwrap().checksum(), "crc32:00000000");
        assert!(spool.digest(19).is_err(), "nobody may vouch for bytes that are not there");
    }

    #[test]
    fn the_digest_of_a_long_trace_covers_every_piece() {
        let (_dir, path) = place();
        let (mut spool, _) = Spool::open(&path, 0).unwrap();
        let bytes: Vec<u8> = (0..READ * 2 + 17).map(|i| u8::try_from(i % 251).unwrap()).collect();
        spool.append(&bytes).unwrap();
        let digest = spool.digest(spool.len()).unwrap().unwrap();
        assert_eq!(digest.crc32, crc32fast::hash(&bytes));
    }

    #[test]
    fn lost_bytes_leave_a_hole_and_no_digest_for_good() {
        let (_dir, path) = place();
        let (mut spool, _) = Spool::open(&path, 0).unwrap();
        spool.append(b"abc").unwrap();
        spool.sync().unwrap();
        drop(spool);

        let (mut spool, opened) = Spool::open(&path, 5).unwrap();
        assert_eq!(opened, Opened::Short { missing: 2 });
        assert_eq!(spool.len(), 5);
        assert_eq!(spool.digest(5).unwrap(), None);
        spool.append(b"xyz").unwrap();
        spool.sync().unwrap();
        drop(spool);

        let (spool, opened) = Spool::open(&path, 8).unwrap();
        assert_eq!(opened, Opened::Whole);
        assert!(spool.is_holed());
        assert_eq!(spool.digest(8).unwrap(), None);
        assert_eq!(spool.read(5, 3).unwrap(), b"xyz");

        Spool::remove(&path).unwrap();
        Spool::remove(&path).unwrap();
        let (spool, _) = Spool::open(&path, 0).unwrap();
        assert!(!spool.is_holed());
    }

    #[test]
    fn a_spool_is_stretched_to_what_gitlab_has() {
        let (_dir, path) = place();
        let (mut spool, _) = Spool::open(&path, 0).unwrap();
        spool.append(b"abc").unwrap();
        spool.stretch(2).unwrap();
        assert!(!spool.is_holed());
        assert_eq!(spool.len(), 3);
        spool.stretch(10).unwrap();
        assert_eq!(spool.len(), 10);
        assert_eq!(spool.digest(10).unwrap(), None);
        spool.append(b"z").unwrap();
        assert_eq!(spool.read(10, 10).unwrap(), b"z");
    }

    #[test]
    fn nothing_of_a_failed_append_shows_up_in_a_hole() {
        let (_dir, path) = place();
        let (mut spool, _) = Spool::open(&path, 0).unwrap();
        spool.append(b"abc").unwrap();
        // As if the disk had become full in the middle.
        spool.file.write_all_at(b"garbage", 3).unwrap();
        spool.stretch(6).unwrap();
        assert_eq!(spool.read(0, 9).unwrap(), b"abc\0\0\0");
    }

    #[test]
    fn errors_name_the_file() {
        let (_dir, path) = place();
        let missing = path.join("nowhere");
        let error = Spool::open(&missing, 0).unwrap_err();
        assert!(error.to_string().contains(missing.as_str()), "{error}");
        assert!(std::error::Error::source(&error).is_some());
        assert!(!error.is_full());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn whatever_the_crash_the_durable_prefix_survives(
            pieces in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..40), 0..8),
            noted in 0usize..8,
        ) {
            let (_dir, path) = place();
            let (mut spool, _) = Spool::open(&path, 0).unwrap();
            let mut durable = 0;
            let mut all = Vec::new();
            for (i, piece) in pieces.iter().enumerate() {
                spool.append(piece).unwrap();
                all.extend_from_slice(piece);
                if i == noted {
                    durable = spool.sync().unwrap();
                }
            }
            drop(spool);
            let (spool, opened) = Spool::open(&path, durable).unwrap();
            let rest = u64::try_from(all.len()).unwrap() - durable;
            let expected = if rest == 0 { Opened::Whole } else { Opened::Cut { bytes: rest } };
            prop_assert_eq!(opened, expected);
            prop_assert_eq!(std::fs::metadata(&path).unwrap().len(), durable);
            let kept = spool.read(0, usize::MAX).unwrap();
            prop_assert_eq!(&kept[..], &all[..usize::try_from(durable).unwrap()]);
        }
    }
}
