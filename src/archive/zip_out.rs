//! Writes a zip.
//!
//! The `zip` crate compresses one entry at a time on one thread and cannot take an entry in pieces, so
//! the container is written here; the crate reads it back in the tests. Entries come sorted and
//! complete, an entry of one block with its sizes before it, a longer one with them behind it (a data
//! descriptor), so that nothing is written twice and memory does not grow with a file.
//!
//! The bytes are a function of the tree: names, modes, owners, times and content. Times are kept
//! because users of caches and of `make` rely on them, and a tree that nobody touched has the same ones
//! when it is packed again. No clock and no order of threads gets in.

use super::ArchiveError;
use super::blocks::{Coding, Done, Sink};
use super::out::{Mark, Out};

/// Sizes from here on do not fit the classic fields.
const FULL: u64 = 0xFFFF_FFFF;
/// Counts from here on do not fit either.
const CROWDED: u64 = 0xFFFF;

/// Sizes behind the data.
const DESCRIPTOR: u16 = 1 << 3;
/// The name is UTF-8.
const UTF8: u16 = 1 << 11;

const STORE: u16 = 0;
const DEFLATE: u16 = 8;
const ZSTD: u16 = 93;

/// What is known of something before its content is read.
#[derive(Debug, Clone, Default)]
pub(super) struct Meta {
    /// Its name; a directory's has no slash at its end.
    pub(super) name: Vec<u8>,
    /// As in `st_mode`.
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// In seconds.
    pub(super) mtime: i64,
    /// How long it was when it was opened; no more than that is read.
    pub(super) size: u64,
    /// What a directory or link has for content.
    pub(super) content: Option<Vec<u8>>,
}

/// An entry whose content is being written.
struct Open {
    meta: Meta,
    at: u64,
    mark: Option<Mark>,
    crc: crc32fast::Hasher,
    method: u16,
    flags: u16,
    packed: u64,
    plain: u64,
    wide: bool,
}

/// A zip that is being written.
pub(super) struct ZipOut<'a> {
    out: Out<'a>,
    coding: Coding,
    open: Option<Open>,
    central: Vec<u8>,
    entries: u64,
    /// What was in the way of the archive before its beginning, for tests of long archives.
    base: u64,
}

fn len16(bytes: &[u8]) -> u16 {
    u16::try_from(bytes.len()).unwrap_or(u16::MAX)
}

fn len64(bytes: &[u8]) -> u64 {
    u64::try_from(bytes.len()).unwrap_or(u64::MAX)
}

/// A number for a field of four bytes; a full field says that the number is elsewhere.
fn narrow(number: u64) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

/// Date and time as DOS has them, in UTC, since a zone would make the bytes depend on the machine.
fn dos_time(mtime: i64) -> (u16, u16) {
    const EARLIEST: (u16, u16) = (0x21, 0);
    const LATEST: (u16, u16) = (0xFF9F, 0xBF7D);
    let Ok(time) = jiff::Timestamp::from_second(mtime) else { return EARLIEST };
    let time = time.to_zoned(jiff::tz::TimeZone::UTC).datetime();
    if time.year() > 2107 {
        return LATEST;
    }
    let (Ok(year), Ok(month), Ok(day), Ok(hour), Ok(minute), Ok(second)) = (
        u16::try_from(time.year() - 1980),
        u16::try_from(time.month()),
        u16::try_from(time.day()),
        u16::try_from(time.hour()),
        u16::try_from(time.minute()),
        u16::try_from(time.second()),
    ) else {
        return EARLIEST;
    };
    ((year << 9) | (month << 5) | day, (hour << 11) | (minute << 5) | (second / 2))
}

impl Meta {
    /// Time and owner as Info-ZIP writes them.
    fn extra(&self) -> Vec<u8> {
        // Read as signed by some and as unsigned by others; what fits neither is cut off.
        let seconds = u32::try_from(self.mtime.clamp(0, i64::from(u32::MAX))).unwrap_or_default();
        let mut extra = Vec::with_capacity(44);
        extra.extend(0x5455_u16.to_le_bytes());
        extra.extend(5_u16.to_le_bytes());
        extra.push(1);
        extra.extend(seconds.to_le_bytes());
        extra.extend(0x7875_u16.to_le_bytes());
        extra.extend(11_u16.to_le_bytes());
        extra.extend([1, 4]);
        extra.extend(self.uid.to_le_bytes());
        extra.push(4);
        extra.extend(self.gid.to_le_bytes());
        extra
    }

    fn is_directory(&self) -> bool {
        self.mode & 0o170_000 == 0o040_000
    }
}

impl<'a> ZipOut<'a> {
    pub(super) fn new(out: Out<'a>, coding: Coding) -> Self {
        Self { out, coding, open: None, central: Vec::new(), entries: 0, base: 0 }
    }

    #[cfg(test)]
    pub(super) fn behind(mut self, base: u64) -> Self {
        self.base = base;
        self
    }

    fn at(&self) -> u64 {
        self.base + self.out.at()
    }

    /// Writes the header before an entry's data; `sizes` only where they are known.
    fn head(&mut self, open: &Open, sizes: Option<u32>) -> Result<(), ArchiveError> {
        let (date, time) = dos_time(open.meta.mtime);
        let mut extra = open.meta.extra();
        if open.wide {
            extra.extend(1_u16.to_le_bytes());
            extra.extend(16_u16.to_le_bytes());
            extra.extend([0; 16]);
        }
        let (crc, packed, plain) = match sizes {
            Some(crc) => (crc, narrow(open.packed), narrow(open.plain)),
            None if open.wide => (0, u32::MAX, u32::MAX),
            None => (0, 0, 0),
        };
        let mut head = Vec::with_capacity(30 + open.meta.name.len() + extra.len());
        head.extend(b"PK\x03\x04");
        head.extend(needed(open.method, open.wide).to_le_bytes());
        head.extend(open.flags.to_le_bytes());
        head.extend(open.method.to_le_bytes());
        head.extend(time.to_le_bytes());
        head.extend(date.to_le_bytes());
        head.extend(crc.to_le_bytes());
        head.extend(packed.to_le_bytes());
        head.extend(plain.to_le_bytes());
        head.extend(len16(&open.meta.name).to_le_bytes());
        head.extend(len16(&extra).to_le_bytes());
        head.extend_from_slice(&open.meta.name);
        head.extend(extra);
        self.out.put(&head)
    }

    /// Notes an entry that is complete in the directory at the end.
    fn note(&mut self, open: &Open, crc: u32) {
        let (date, time) = dos_time(open.meta.mtime);
        let mut extra = open.meta.extra();
        let wide: Vec<u64> = [open.plain, open.packed, open.at]
            .into_iter()
            .filter(|number| *number >= FULL)
            .collect();
        if !wide.is_empty() {
            extra.extend(1_u16.to_le_bytes());
            extra.extend(u16::try_from(wide.len() * 8).unwrap_or_default().to_le_bytes());
            extra.extend(wide.iter().flat_map(|number| number.to_le_bytes()));
        }
        let attributes = open.meta.mode << 16 | if open.meta.is_directory() { 0x10 } else { 0 };
        let version = needed(open.method, open.wide || !wide.is_empty());
        let central = &mut self.central;
        central.extend(b"PK\x01\x02");
        // Made by Unix.
        central.extend((3 << 8 | version).to_le_bytes());
        central.extend(version.to_le_bytes());
        central.extend(open.flags.to_le_bytes());
        central.extend(open.method.to_le_bytes());
        central.extend(time.to_le_bytes());
        central.extend(date.to_le_bytes());
        central.extend(crc.to_le_bytes());
        central.extend(narrow(open.packed).to_le_bytes());
        central.extend(narrow(open.plain).to_le_bytes());
        central.extend(len16(&open.meta.name).to_le_bytes());
        central.extend(len16(&extra).to_le_bytes());
        // No comment, first disk, no internal attributes.
        central.extend([0; 6]);
        central.extend(attributes.to_le_bytes());
        central.extend(narrow(open.at).to_le_bytes());
        central.extend_from_slice(&open.meta.name);
        central.extend(extra);
        self.entries += 1;
    }

    /// Writes an entry that is wholly known.
    fn whole(&mut self, mut open: Open, coded: &[u8], plain: &[u8]) -> Result<(), ArchiveError> {
        let data = if open.method == STORE || coded.len() >= plain.len() {
            open.method = STORE;
            plain
        } else {
            coded
        };
        open.packed = len64(data);
        open.plain = len64(plain);
        let crc = open.crc.clone().finalize();
        self.head(&open, Some(crc))?;
        self.out.put(data)?;
        self.note(&open, crc);
        Ok(())
    }

    /// Writes the directory; gives back how many entries there are, the archive's length and checksum.
    pub(super) fn finish(mut self) -> Result<(u64, u64, [u8; 32]), ArchiveError> {
        let at = self.at();
        let length = len64(&self.central);
        let central = std::mem::take(&mut self.central);
        self.out.put(&central)?;
        drop(central);
        let mut end = Vec::new();
        if self.entries >= CROWDED || length >= FULL || at >= FULL {
            let wide = self.at();
            end.extend(b"PK\x06\x06");
            end.extend(44_u64.to_le_bytes());
            end.extend((3_u16 << 8 | 45).to_le_bytes());
            end.extend(45_u16.to_le_bytes());
            end.extend([0; 8]);
            end.extend(self.entries.to_le_bytes());
            end.extend(self.entries.to_le_bytes());
            end.extend(length.to_le_bytes());
            end.extend(at.to_le_bytes());
            end.extend(b"PK\x06\x07");
            end.extend([0; 4]);
            end.extend(wide.to_le_bytes());
            end.extend(1_u32.to_le_bytes());
        }
        let count = u16::try_from(self.entries).unwrap_or(u16::MAX);
        end.extend(b"PK\x05\x06");
        end.extend([0; 4]);
        end.extend(count.to_le_bytes());
        end.extend(count.to_le_bytes());
        end.extend(narrow(length).to_le_bytes());
        end.extend(narrow(at).to_le_bytes());
        end.extend([0; 2]);
        self.out.put(&end)?;
        let (bytes, sha256) = self.out.finish()?;
        Ok((self.entries, bytes, sha256))
    }
}

/// The version of the format that a reader must know.
fn needed(method: u16, wide: bool) -> u16 {
    match method {
        ZSTD => 63,
        _ if wide => 45,
        _ => 20,
    }
}

impl Sink for ZipOut<'_> {
    type Meta = Meta;

    fn begin(&mut self, mut meta: Meta) -> Result<(), ArchiveError> {
        let content = meta.content.take();
        if meta.is_directory() {
            meta.name.push(b'/');
        }
        let method = match self.coding {
            Coding::Store => STORE,
            Coding::Deflate(_) => DEFLATE,
            Coding::Zstd(_) => ZSTD,
        };
        let open = Open {
            at: self.at(),
            mark: None,
            crc: crc32fast::Hasher::new(),
            method: if content.is_some() { STORE } else { method },
            flags: if std::str::from_utf8(&meta.name).is_ok() { UTF8 } else { 0 },
            packed: 0,
            plain: 0,
            // What does not compress grows a little.
            wide: meta.size + meta.size / 1000 + 0xFFFF >= FULL,
            meta,
        };
        match content {
            Some(content) => {
                let mut open = open;
                open.crc.update(&content);
                self.whole(open, &[], &content)
            }
            None => {
                self.open = Some(open);
                Ok(())
            }
        }
    }

    fn block(&mut self, done: Done) -> Result<(), ArchiveError> {
        // Blocks come only after a beginning, and none after the last.
        let Some(mut open) = self.open.take() else { return Ok(()) };
        open.crc.combine(&done.crc);
        if done.last && open.mark.is_none() {
            return self.whole(open, &done.coded, &done.plain);
        }
        if open.mark.is_none() {
            open.mark = Some(self.out.mark()?);
            open.flags |= DESCRIPTOR;
            self.head(&open, None)?;
        }
        let data = if open.method == STORE { done.plain.as_slice() } else { &done.coded };
        open.packed += len64(data);
        open.plain += len64(&done.plain);
        self.out.put(data)?;
        if !done.last {
            self.open = Some(open);
            return Ok(());
        }
        let crc = open.crc.clone().finalize();
        let mut tail = Vec::with_capacity(24);
        tail.extend(b"PK\x07\x08");
        tail.extend(crc.to_le_bytes());
        if open.wide {
            tail.extend(open.packed.to_le_bytes());
            tail.extend(open.plain.to_le_bytes());
        } else {
            tail.extend(narrow(open.packed).to_le_bytes());
            tail.extend(narrow(open.plain).to_le_bytes());
        }
        self.out.put(&tail)?;
        self.note(&open, crc);
        Ok(())
    }

    fn discard(&mut self) -> Result<(), ArchiveError> {
        match self.open.take().and_then(|open| open.mark) {
            Some(mark) => self.out.back(mark),
            None => Ok(()),
        }
    }
}
