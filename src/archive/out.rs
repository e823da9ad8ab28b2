//! The file that an archive is written to.

use std::fs::File;
use std::io::{self, Seek as _, SeekFrom, Write as _};

use sha2::{Digest as _, Sha256};

use super::ArchiveError;

/// How much is gathered before it is written.
const BUFFER: usize = 256 * 1024;

/// A file that is written from its beginning, with its length and checksum.
pub(super) struct Out<'a> {
    file: &'a mut File,
    buffer: Vec<u8>,
    hasher: Sha256,
    flushed: u64,
}

/// A place to go back to.
pub(super) struct Mark {
    hasher: Sha256,
    at: u64,
}

fn length(bytes: &[u8]) -> u64 {
    u64::try_from(bytes.len()).unwrap_or(u64::MAX)
}

fn broken(error: io::Error) -> ArchiveError {
    ArchiveError::io("write", "the archive")(error)
}

impl<'a> Out<'a> {
    /// Empties the file.
    pub(super) fn new(file: &'a mut File) -> Result<Self, ArchiveError> {
        file.set_len(0).and_then(|()| file.rewind()).map_err(broken)?;
        Ok(Self { file, buffer: Vec::with_capacity(BUFFER), hasher: Sha256::new(), flushed: 0 })
    }

    /// How much was written.
    pub(super) fn at(&self) -> u64 {
        self.flushed + length(&self.buffer)
    }

    /// Writes at the end.
    pub(super) fn put(&mut self, bytes: &[u8]) -> Result<(), ArchiveError> {
        if self.buffer.len() + bytes.len() > BUFFER {
            self.empty().map_err(broken)?;
        }
        if bytes.len() >= BUFFER {
            self.hasher.update(bytes);
            self.file.write_all(bytes).map_err(broken)?;
            self.flushed += length(bytes);
        } else {
            self.buffer.extend_from_slice(bytes);
        }
        Ok(())
    }

    fn empty(&mut self) -> io::Result<()> {
        self.hasher.update(&self.buffer);
        self.file.write_all(&self.buffer)?;
        self.flushed += length(&self.buffer);
        self.buffer.clear();
        Ok(())
    }

    /// Remembers the end.
    pub(super) fn mark(&mut self) -> Result<Mark, ArchiveError> {
        self.empty().map_err(broken)?;
        Ok(Mark { hasher: self.hasher.clone(), at: self.flushed })
    }

    /// Takes back what was written since.
    pub(super) fn back(&mut self, mark: Mark) -> Result<(), ArchiveError> {
        self.buffer.clear();
        self.hasher = mark.hasher;
        self.flushed = mark.at;
        self.file
            .set_len(mark.at)
            .and_then(|()| self.file.seek(SeekFrom::Start(mark.at)))
            .map_err(broken)?;
        Ok(())
    }

    /// Ends; gives length and checksum.
    pub(super) fn finish(mut self) -> Result<(u64, [u8; 32]), ArchiveError> {
        self.empty().map_err(broken)?;
        Ok((self.flushed, self.hasher.finalize().into()))
    }
}
