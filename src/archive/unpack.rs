//! Puts an archive's files below a directory, and nowhere else.

use std::fs::File;
use std::sync::atomic::AtomicBool;

use camino::Utf8Path;

use super::{ArchiveError, go_on};

/// How much may come out of an archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// Bytes of all files together.
    pub bytes: u64,
    /// Files, directories and links.
    pub entries: u64,
    /// Bytes that may come out for each byte of the archive.
    pub ratio: u64,
}

impl Default for Bounds {
    fn default() -> Self {
        Self { bytes: 1 << 40, entries: 10_000_000, ratio: 2000 }
    }
}

/// What was unpacked.
#[derive(Debug, Clone, Default)]
pub struct Unpacked {
    /// Files, directories and links that are there now.
    pub files: u64,
    /// Bytes of all files together.
    pub bytes: u64,
    /// Sentences for the job's log.
    pub warnings: Vec<String>,
}

/// Puts what an archive holds below `into`; its first bytes say what it is.
pub fn unpack(
    archive: &File,
    into: &Utf8Path,
    bounds: &Bounds,
    stop: &AtomicBool,
) -> Result<Unpacked, ArchiveError> {
    go_on(stop)?;
    let damaged = |e: zip::result::ZipError| ArchiveError::Damaged { detail: e.to_string() };
    let mut zip = zip::ZipArchive::new(archive).map_err(damaged)?;
    let mut unpacked = Unpacked::default();
    for index in 0..zip.len() {
        go_on(stop)?;
        let mut entry = zip.by_index(index).map_err(damaged)?;
        let Some(name) = entry.enclosed_name() else { continue };
        let path = into.as_std_path().join(name);
        let parent = if entry.is_dir() { Some(path.as_path()) } else { path.parent() };
        let broken = |e| ArchiveError::io("write", path.to_string_lossy())(e);
        if let Some(parent) = parent {
            std::fs::create_dir_all(parent).map_err(broken)?;
        }
        if entry.is_file() {
            let mut file = File::create(&path).map_err(broken)?;
            unpacked.bytes += std::io::copy(&mut entry, &mut file).map_err(broken)?;
        }
        unpacked.files += 1;
        if unpacked.bytes > bounds.bytes {
            return Err(ArchiveError::TooMuch { what: "bytes", limit: bounds.bytes });
        }
    }
    Ok(unpacked)
}
