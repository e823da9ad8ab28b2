//! Writes selected files as one archive.
//!
//! The calling thread reads and writes, others compress. A file is read no further than it was long
//! when it was opened, so one that grows all the time ends; one that shrinks is shorter in the archive.
//! What has vanished, may not be read or cannot be read to its end is left out, with a warning.

use std::fs::File;
use std::io::{self, Read as _};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use camino::Utf8Path;
use rustix::fs::FileType;

use super::beneath::Beneath;
use super::blocks::{BLOCK, Coding, Pipeline, Sink, pipeline};
use super::members::{GzipOut, RawOut};
use super::out::Out;
use super::select::{Entry, Kind, Selection};
use super::zip_out::{Meta, ZipOut};
use super::{ArchiveError, go_on, shown, tar_out};

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

impl Level {
    /// Reads the value of `ARTIFACT_COMPRESSION_LEVEL` and its kin; an unknown one is the default.
    pub fn from_setting(word: &str) -> Self {
        match word.to_ascii_lowercase().as_str() {
            "fastest" => Self::Fastest,
            "fast" => Self::Fast,
            "slow" => Self::Slow,
            "slowest" => Self::Slowest,
            _ => Self::Default,
        }
    }

    fn deflate(self) -> Coding {
        match self {
            Self::Fastest => Coding::Store,
            Self::Fast => Coding::Deflate(1),
            Self::Default => Coding::Deflate(5),
            Self::Slow => Coding::Deflate(7),
            Self::Slowest => Coding::Deflate(9),
        }
    }

    /// The levels that the official runner's library takes for its four words.
    fn zstd(self) -> i32 {
        match self {
            Self::Fastest | Self::Fast => 1,
            Self::Default => 3,
            Self::Slow => 7,
            Self::Slowest => 11,
        }
    }
}

/// What was packed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Packed {
    /// The archive's length.
    pub bytes: u64,
    /// The archive's SHA-256.
    pub sha256: [u8; 32],
    /// How many entries it has: files, directories and links.
    pub files: u64,
    /// Sentences for the job's log.
    pub warnings: Vec<String>,
}

/// Writes what was selected below `root` into a file, which is emptied first.
///
/// The same tree gives the same bytes, however often it is packed and on however many cores.
pub fn pack(
    root: &Utf8Path,
    selection: &Selection,
    format: Format,
    level: Level,
    into: &mut File,
    stop: &AtomicBool,
) -> Result<Packed, ArchiveError> {
    let out = Out::new(into)?;
    let mut source = Source::new(root, stop)?;
    let (files, bytes, sha256) = match format {
        Format::Zip | Format::ZipZstd => {
            let coding = match (format, level) {
                (Format::ZipZstd, Level::Slowest | Level::Slow | Level::Default | Level::Fast) => {
                    Coding::Zstd(level.zstd())
                }
                _ => level.deflate(),
            };
            let sink = ZipOut::new(out, coding);
            let work = |pipe: &mut Pipeline<'_, ZipOut<'_>>| {
                selection.entries.iter().try_for_each(|entry| source.feed(entry, coding, pipe))
            };
            pipeline(coding, sink, stop, work)?.finish()?
        }
        Format::Gzip => {
            let coding = Coding::Deflate(6);
            let work = |pipe: &mut Pipeline<'_, GzipOut<'_>>| {
                selection.entries.iter().try_for_each(|entry| {
                    source.only_file(entry)?;
                    source.feed(entry, coding, pipe)
                })
            };
            pipeline(coding, GzipOut::new(out), stop, work)?.finish()?
        }
        Format::Raw => {
            let [entry] = selection.entries.as_slice() else { return Err(ArchiveError::NotOne) };
            source.only_file(entry)?;
            let work =
                |pipe: &mut Pipeline<'_, RawOut<'_>>| source.feed(entry, Coding::Store, pipe);
            pipeline(Coding::Store, RawOut::new(out), stop, work)?.finish()?
        }
        Format::TarZstd => tar_out::pack(out, selection, level.zstd(), &mut source, stop)?,
    };
    Ok(Packed { bytes, sha256, files, warnings: source.warnings })
}

/// The tree that is packed.
pub(super) struct Source<'a> {
    beneath: Beneath,
    stop: &'a AtomicBool,
    warnings: Vec<String>,
}

/// Something to be packed, and how to read it if it is a file.
pub(super) struct Found {
    pub(super) meta: Meta,
    pub(super) file: Option<File>,
}

impl<'a> Source<'a> {
    fn new(root: &Utf8Path, stop: &'a AtomicBool) -> Result<Self, ArchiveError> {
        let beneath = Beneath::open(root).map_err(ArchiveError::io("open", root.as_str()))?;
        Ok(Self { beneath, stop, warnings: Vec::new() })
    }

    /// Notes something that is left out.
    pub(super) fn ignore(&mut self, entry: &Entry, why: &io::Error) {
        self.warnings.push(format!("File ignored: {}: {why}", shown(&entry.name)));
    }

    /// Notes something whose content is not what it was.
    pub(super) fn spoiled(&mut self, entry: &Entry, why: &io::Error) {
        self.warnings.push(format!("{}: {why}", shown(&entry.name)));
    }

    /// Formats without directories refuse everything but files.
    fn only_file(&mut self, entry: &Entry) -> Result<(), ArchiveError> {
        if entry.kind == Kind::File {
            return Ok(());
        }
        Err(ArchiveError::NotRegular { name: shown(&entry.name) })
    }

    /// Opens what is there now; nothing if it is left out.
    pub(super) fn find(&mut self, entry: &Entry) -> Option<Found> {
        if entry.kind == Kind::Special {
            self.warnings.push(format!("File ignored: {}", shown(&entry.name)));
            return None;
        }
        if entry.name.len() > usize::from(u16::MAX) - 1 {
            self.ignore(entry, &io::ErrorKind::InvalidFilename.into());
            return None;
        }
        match self.open(entry) {
            Ok(Some(found)) => Some(found),
            Ok(None) => {
                self.warnings.push(format!("File ignored: {}", shown(&entry.name)));
                None
            }
            Err(error) => {
                self.ignore(entry, &error);
                None
            }
        }
    }

    fn open(&mut self, entry: &Entry) -> io::Result<Option<Found>> {
        let place = entry.place();
        let file = match entry.kind {
            Kind::File => Some(self.beneath.file(place)?),
            Kind::Directory | Kind::Link | Kind::Special => None,
        };
        let stat = match &file {
            Some(file) => rustix::fs::fstat(file)?,
            None => self.beneath.stat(place)?,
        };
        let kind = Kind::of(FileType::from_raw_mode(stat.st_mode));
        if kind != entry.kind {
            // It was replaced by something else meanwhile.
            return Ok(None);
        }
        let content = match kind {
            Kind::Directory => Some(Vec::new()),
            Kind::Link => Some(self.beneath.target(place)?),
            Kind::File | Kind::Special => None,
        };
        let meta = Meta {
            name: entry.name.clone(),
            mode: stat.st_mode,
            uid: stat.st_uid,
            gid: stat.st_gid,
            mtime: stat.st_mtime,
            size: if file.is_some() { u64::try_from(stat.st_size).unwrap_or_default() } else { 0 },
            content,
        };
        Ok(Some(Found { meta, file }))
    }

    /// Sends one entry through the pipeline.
    fn feed<S: Sink<Meta = Meta>>(
        &mut self,
        entry: &Entry,
        coding: Coding,
        pipe: &mut Pipeline<'_, S>,
    ) -> Result<(), ArchiveError> {
        go_on(self.stop)?;
        let Some(Found { meta, file }) = self.find(entry) else { return Ok(()) };
        let mut left = meta.size;
        // What is read first may already fail; then nothing was begun.
        let block = coding.block();
        let Some(mut file) = file else {
            pipe.begin(meta);
            return Ok(());
        };
        let mut next = match read(&mut file, block, &mut left) {
            Ok(data) => data,
            Err(error) => {
                self.ignore(entry, &error);
                return Ok(());
            }
        };
        pipe.begin(meta);
        let mut before = None;
        loop {
            let data = Arc::new(next);
            let last = left == 0 || data.len() < block;
            pipe.block(Arc::clone(&data), before.replace(Arc::clone(&data)), last)?;
            if last {
                if left > 0 {
                    let text = "file became shorter while it was read";
                    self.warnings.push(format!("{}: {text}", shown(&entry.name)));
                }
                return Ok(());
            }
            next = match read(&mut file, block, &mut left) {
                Ok(data) => data,
                Err(error) => {
                    self.ignore(entry, &error);
                    pipe.discard();
                    return Ok(());
                }
            };
        }
    }
}

/// Reads one block; a shorter one is the end.
fn read(file: &mut File, block: usize, left: &mut u64) -> io::Result<Vec<u8>> {
    let most = u64::try_from(block).unwrap_or(u64::MAX).min(*left);
    let mut data = Vec::with_capacity(usize::try_from(most).unwrap_or(BLOCK));
    file.take(most).read_to_end(&mut data)?;
    *left -= u64::try_from(data.len()).unwrap_or(u64::MAX).min(*left);
    Ok(data)
}
