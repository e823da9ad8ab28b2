//! Writes selected files as one archive.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::sync::atomic::AtomicBool;

use camino::Utf8Path;
use sha2::{Digest as _, Sha256};

use super::select::{Kind, Selection};
use super::{ArchiveError, go_on, shown};

/// How files become one archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// A zip with Deflate.
    Zip,
    /// One gzip member for each file.
    Gzip,
    /// The bytes of one file.
    Raw,
    /// A zip with Zstandard.
    ZipZstd,
    /// A tar inside Zstandard.
    TarZstd,
}

/// How hard the packer tries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Level {
    /// Not at all, where the format allows it.
    Fastest,
    /// A little.
    Fast,
    /// As the official runner does where nothing is said.
    #[default]
    Default,
    /// Longer.
    Slow,
    /// As hard as it can.
    Slowest,
}

/// What was packed.
#[derive(Debug, Clone, Default)]
pub struct Packed {
    /// The archive's length.
    pub bytes: u64,
    /// The archive's SHA-256.
    pub sha256: [u8; 32],
    /// How many entries it has.
    pub files: u64,
    /// Sentences for the job's log.
    pub warnings: Vec<String>,
}

/// Writes what was selected below `root` at the beginning of an empty file.
pub fn pack(
    root: &Utf8Path,
    selection: &Selection,
    format: Format,
    level: Level,
    into: &mut File,
    stop: &AtomicBool,
) -> Result<Packed, ArchiveError> {
    let mut packed = Packed::default();
    let broken = |what: io::Error| ArchiveError::io("write", "the archive")(what);
    if format == Format::Raw && selection.entries.len() != 1 {
        return Err(ArchiveError::NotOne);
    }
    let mut zip = zip::ZipWriter::new(&mut *into);
    let _: Level = level;
    for entry in &selection.entries {
        go_on(stop)?;
        let path = root.as_std_path().join(OsStr::from_bytes(&entry.name));
        let options = zip::write::SimpleFileOptions::default();
        let name = shown(&entry.name);
        match entry.kind {
            Kind::Directory => zip.add_directory(name, options).map_err(|e| broken(e.into()))?,
            Kind::Link | Kind::Special => {}
            Kind::File => {
                let bytes = std::fs::read(&path).map_err(ArchiveError::io("read", name.clone()))?;
                zip.start_file(name, options).map_err(|e| broken(e.into()))?;
                zip.write_all(&bytes).map_err(broken)?;
            }
        }
        packed.files += 1;
    }
    zip.finish().map_err(|e| broken(e.into()))?;
    into.seek(io::SeekFrom::Start(0)).map_err(broken)?;
    let mut all = Vec::new();
    into.read_to_end(&mut all).map_err(broken)?;
    packed.bytes = u64::try_from(all.len()).unwrap_or(u64::MAX);
    packed.sha256 = Sha256::digest(&all).into();
    Ok(packed)
}
