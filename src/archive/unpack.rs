//! Puts an archive's files below a directory, and nowhere else.
//!
//! Artifacts and caches are made by jobs, and may be made to hurt: see [`place`](super::place) for
//! where things may go. How much comes out is bounded, by what the archive says about itself before
//! anything is written, and by what it really holds while it is.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Write as _};
use std::num::NonZero;
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use camino::Utf8Path;
use flate2::bufread::DeflateDecoder;
use rustix::fs::FileType;

use super::place::{self, Looks, Placed, Placer};
use super::zip_in::{self, Item, Part};
use super::{ArchiveError, go_on, shown, tar_in};

/// Archives smaller than this may hold whatever Zstandard makes of nothing but zeros.
const SMALL: u64 = 16 * 1024 * 1024;
/// The longest target that a link can have.
const LONGEST_TARGET: u64 = 4096;
/// More threads than these bring little, and a submit node has other users.
const MOST_THREADS: usize = 4;

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
    /// A terabyte and two million entries: what users have by accident is smaller. Deflate cannot do
    /// better than 1032 to one, so the ratio stops only what is no honest zip.
    fn default() -> Self {
        Self { bytes: 1 << 40, entries: 2_000_000, ratio: 2000 }
    }
}

impl Bounds {
    /// Says whether an archive of this length may hold so much.
    pub(super) fn allow(&self, length: u64, bytes: u64) -> Result<(), ArchiveError> {
        if bytes > self.bytes {
            return Err(ArchiveError::TooMuch { what: "bytes", limit: self.bytes });
        }
        if bytes > length.saturating_mul(self.ratio).max(SMALL) {
            return Err(ArchiveError::TooMuch { what: "bytes for each byte", limit: self.ratio });
        }
        Ok(())
    }
}

/// What was unpacked.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Unpacked {
    /// Files, directories and links that are there now.
    pub files: u64,
    /// Bytes of all files together.
    pub bytes: u64,
    /// Sentences for the job's log.
    pub warnings: Vec<String>,
}

/// Puts what an archive holds below `into`; its first bytes say what it is.
///
/// After an error a part of it may be there.
pub fn unpack(
    archive: &File,
    into: &Utf8Path,
    bounds: &Bounds,
    stop: &AtomicBool,
) -> Result<Unpacked, ArchiveError> {
    go_on(stop)?;
    let reading = || ArchiveError::io("read", "the archive");
    let length = archive.metadata().map_err(reading())?.len();
    let mut magic = [0; 4];
    let known = archive.read_at(&mut magic, 0).map_err(reading())?;
    match magic.get(..known).unwrap_or_default() {
        [] => Err(ArchiveError::Damaged { detail: "it is empty".to_owned() }),
        [0x28, 0xB5, 0x2F, 0xFD] => tar_in::unpack(archive, length, into, bounds, stop),
        [0x1F, 0x8B, ..] => {
            Err(ArchiveError::Unsupported { detail: "it is a gzip file".to_owned() })
        }
        _ => unzip(archive, length, into, bounds, stop),
    }
}

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sort {
    Directory,
    File,
    Link,
}

struct Plan {
    item: Item,
    name: Vec<u8>,
    sort: Sort,
}

fn unzip(
    archive: &File,
    length: u64,
    into: &Utf8Path,
    bounds: &Bounds,
    stop: &AtomicBool,
) -> Result<Unpacked, ArchiveError> {
    let items = zip_in::items(archive, length, bounds.entries, stop)?;
    let bytes = items.iter().fold(0, |sum: u64, item| sum.saturating_add(item.plain));
    bounds.allow(length, bytes)?;
    // Names first: nothing is written from an archive that tries to get out.
    let mut names = Vec::with_capacity(items.len());
    for item in &items {
        names.push(place::inside(&item.name)?);
    }
    let mut placer = Placer::new(into)?;
    let plans = plan(items, names, &mut placer)?;
    for plan in plans.iter().filter(|plan| plan.sort == Sort::Directory) {
        go_on(stop)?;
        placer.directory(&plan.name, looks(&plan.item))?;
    }
    files(archive, &plans, &mut placer, stop)?;
    for plan in plans.iter().filter(|plan| plan.sort == Sort::Link) {
        go_on(stop)?;
        if plan.item.plain > LONGEST_TARGET {
            return Err(wrong(&plan.item, "is a link that is too long"));
        }
        let mut target = Vec::new();
        content(archive, &plan.item, stop, |bytes| {
            target.extend_from_slice(bytes);
            Ok(())
        })?;
        if target.is_empty() || target.contains(&0) {
            return Err(wrong(&plan.item, "is a link to nothing"));
        }
        placer.link(plan.name.clone(), target, looks(&plan.item));
    }
    let bytes = plans.iter().filter(|plan| plan.sort == Sort::File).map(|plan| plan.item.plain);
    let bytes = bytes.sum();
    let (files, warnings) = placer.end()?;
    Ok(Unpacked { files, bytes, warnings })
}

fn wrong(item: &Item, why: &str) -> ArchiveError {
    ArchiveError::Damaged { detail: format!("{:?} {why}", shown(&item.name)) }
}

fn looks(item: &Item) -> Looks {
    // A mode of nothing at all comes from writers that know no modes.
    Looks { mode: item.mode.filter(|mode| *mode != 0), mtime: item.mtime }
}

/// Decides what becomes of each entry, so that the order in which they are written does not matter.
fn plan(
    items: Vec<Item>,
    names: Vec<Option<Vec<u8>>>,
    placer: &mut Placer,
) -> Result<Vec<Plan>, ArchiveError> {
    let mut plans: Vec<Plan> = Vec::with_capacity(items.len());
    let mut known: HashMap<Vec<u8>, usize> = HashMap::with_capacity(items.len());
    for (item, name) in items.into_iter().zip(names) {
        let Some(name) = name else { continue };
        if place::is_protected(&name) {
            placer.protect();
            continue;
        }
        let sort = match item.mode.map(FileType::from_raw_mode) {
            _ if item.name.ends_with(b"/") => Sort::Directory,
            Some(FileType::Directory) => Sort::Directory,
            Some(FileType::Symlink) => Sort::Link,
            None | Some(FileType::RegularFile | FileType::Unknown) => Sort::File,
            Some(
                FileType::Fifo
                | FileType::Socket
                | FileType::CharacterDevice
                | FileType::BlockDevice,
            ) => {
                placer.warn(format!("File ignored: {}", shown(&name)));
                continue;
            }
        };
        let plan = Plan { item, name, sort };
        match known.get(&plan.name).and_then(|at| plans.get_mut(*at)) {
            Some(earlier) => {
                if sort != Sort::Directory || earlier.sort != Sort::Directory {
                    let name = shown(&plan.name);
                    placer
                        .warn(format!("{name}: is in the archive twice, and the last one counts"));
                }
                *earlier = plan;
            }
            None => {
                known.insert(plan.name.clone(), plans.len());
                plans.push(plan);
            }
        }
    }
    let sorts: HashMap<&[u8], Sort> =
        plans.iter().map(|plan| (plan.name.as_slice(), plan.sort)).collect();
    let mut kept = vec![true; plans.len()];
    for (plan, kept) in plans.iter().zip(&mut kept) {
        let ends = plan.name.iter().enumerate().filter(|(_, byte)| **byte == b'/');
        for (end, _) in ends {
            let way = plan.name.get(..end).unwrap_or_default();
            match sorts.get(way) {
                None | Some(Sort::Directory) => {}
                Some(Sort::File) => {
                    let detail = format!("{:?} is both a file and a directory", shown(way));
                    return Err(ArchiveError::Damaged { detail });
                }
                Some(Sort::Link) => {
                    let (name, way) = (shown(&plan.name), shown(way));
                    placer.warn(format!("{name}: not unpacked, since {way} is a link"));
                    *kept = false;
                    break;
                }
            }
        }
    }
    let mut kept = kept.into_iter();
    plans.retain(|_| kept.next().unwrap_or(true));
    Ok(plans)
}

/// Writes all files, on several threads.
fn files(
    archive: &File,
    plans: &[Plan],
    placer: &mut Placer,
    stop: &AtomicBool,
) -> Result<(), ArchiveError> {
    let next = AtomicUsize::new(0);
    let failed = AtomicBool::new(false);
    let work = |placer: &mut Placer| -> Result<(), ArchiveError> {
        while let Some(plan) = plans.get(next.fetch_add(1, Ordering::Relaxed)) {
            go_on(stop)?;
            if failed.load(Ordering::Relaxed) {
                return Ok(());
            }
            if plan.sort == Sort::File {
                file(archive, plan, placer, stop)
                    .inspect_err(|_| failed.store(true, Ordering::Relaxed))?;
            }
        }
        Ok(())
    };
    let threads = thread::available_parallelism().map_or(1, NonZero::get).min(MOST_THREADS);
    thread::scope(|scope| {
        let mut others = Vec::new();
        for _ in 1..threads {
            let mut other = placer.again()?;
            let work = &work;
            let spawned = thread::Builder::new()
                .name("unpack".to_owned())
                .spawn_scoped(scope, move || work(&mut other).map(|()| other));
            others.push(spawned.map_err(ArchiveError::io("start", "a thread"))?);
        }
        let mut result = work(placer);
        for other in others {
            match other.join() {
                Ok(Ok(other)) => placer.join(other),
                Ok(Err(error)) => result = result.and(Err(error)),
                Err(panicked) => std::panic::resume_unwind(panicked),
            }
        }
        result
    })
}

fn file(
    archive: &File,
    plan: &Plan,
    placer: &mut Placer,
    stop: &AtomicBool,
) -> Result<(), ArchiveError> {
    match placer.file(&plan.name)? {
        Placed::Refused => Ok(()),
        Placed::Open(mut file) => {
            content(archive, &plan.item, stop, |bytes| {
                file.write_all(bytes).map_err(ArchiveError::io("write", shown(&plan.name)))
            })?;
            placer.finish(&plan.name, &file, looks(&plan.item));
            Ok(())
        }
    }
}

/// Hands out an entry's content: as long as it says, and with the checksum that it says.
fn content(
    archive: &File,
    item: &Item,
    stop: &AtomicBool,
    mut take: impl FnMut(&[u8]) -> Result<(), ArchiveError>,
) -> Result<(), ArchiveError> {
    let part = Part::new(archive, item.data, item.data + item.packed);
    let buffered = |part| io::BufReader::with_capacity(64 * 1024, part);
    let mut reader: Box<dyn Read + '_> = match item.method {
        0 => Box::new(part),
        8 => Box::new(DeflateDecoder::new(buffered(part))),
        93 => Box::new(
            zstd::stream::read::Decoder::with_buffer(buffered(part))
                .map_err(ArchiveError::io("unpack", shown(&item.name)))?,
        ),
        method => {
            let detail = format!("{} is compressed with method {method}", shown(&item.name));
            return Err(ArchiveError::Unsupported { detail });
        }
    };
    let mut buffer = vec![0; 64 * 1024];
    let mut crc = crc32fast::Hasher::new();
    let mut length = 0_u64;
    loop {
        go_on(stop)?;
        let read = match reader.read(&mut buffer) {
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_broken) => return Err(wrong(item, "is corrupt")),
        };
        if read == 0 {
            break;
        }
        let bytes = buffer.get(..read).unwrap_or_default();
        length += u64::try_from(read).unwrap_or_default();
        if length > item.plain {
            return Err(wrong(item, "is longer than it says"));
        }
        crc.update(bytes);
        take(bytes)?;
    }
    if length < item.plain {
        return Err(wrong(item, "is shorter than it says"));
    }
    if crc.finalize() != item.crc {
        return Err(wrong(item, "has the wrong checksum"));
    }
    Ok(())
}
