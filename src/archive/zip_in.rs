//! Reads a zip's directory, trusting nothing in it.
//!
//! The `zip` crate keeps every entry it reads in a table before anybody may object, folds entries of
//! one name into one, and reads with one position in the file. Here the number of entries is bounded
//! before the first is read, and several threads read from the same file.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::AtomicBool;

use super::{ArchiveError, go_on, shown};

/// The longest comment a zip can have, with the record before it.
const TAIL: u64 = 22 + 0xFFFF;
const FULL: u64 = 0xFFFF_FFFF;
/// The least that an entry takes in the directory.
const LEAST: u64 = 46;

/// What one entry says about itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Item {
    pub(super) name: Vec<u8>,
    /// As in `st_mode`; nothing if it was not made by a Unix.
    pub(super) mode: Option<u32>,
    pub(super) mtime: Option<i64>,
    pub(super) method: u16,
    pub(super) crc: u32,
    pub(super) packed: u64,
    pub(super) plain: u64,
    /// Where its data begins.
    pub(super) data: u64,
    head: u64,
}

/// A part of a file, read without moving anybody else's position.
pub(super) struct Part<'a> {
    file: &'a File,
    at: u64,
    end: u64,
}

impl<'a> Part<'a> {
    pub(super) fn new(file: &'a File, at: u64, end: u64) -> Self {
        Self { file, at, end }
    }
}

impl Read for Part<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.end.saturating_sub(self.at)).unwrap_or(usize::MAX);
        let most = left.min(buffer.len());
        let read = self.file.read_at(buffer.get_mut(..most).unwrap_or_default(), self.at)?;
        self.at += u64::try_from(read).unwrap_or_default();
        Ok(read)
    }
}

fn damaged(detail: impl Into<String>) -> ArchiveError {
    ArchiveError::Damaged { detail: detail.into() }
}

fn torn(error: io::Error) -> ArchiveError {
    if error.kind() == io::ErrorKind::UnexpectedEof {
        return damaged("it ends too early");
    }
    ArchiveError::io("read", "the archive")(error)
}

/// Little-endian numbers, one after the other.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (first, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*first)
    }

    fn two(&mut self) -> u16 {
        self.take().map_or(0, u16::from_le_bytes)
    }

    fn four(&mut self) -> u32 {
        self.take().map_or(0, u32::from_le_bytes)
    }

    fn eight(&mut self) -> u64 {
        self.take().map_or(0, u64::from_le_bytes)
    }
}

/// Where the directory is.
struct Directory {
    start: u64,
    end: u64,
    count: u64,
    /// What stands before the archive proper.
    before: u64,
}

fn exactly<const N: usize>(file: &File, at: u64) -> Result<[u8; N], ArchiveError> {
    let mut bytes = [0; N];
    file.read_exact_at(&mut bytes, at).map_err(torn)?;
    Ok(bytes)
}

fn directory(file: &File, length: u64) -> Result<Directory, ArchiveError> {
    let from = length.saturating_sub(TAIL);
    let mut tail = Vec::new();
    Part::new(file, from, length).read_to_end(&mut tail).map_err(torn)?;
    let end = tail
        .windows(22)
        .enumerate()
        .rposition(|(at, record)| {
            let comment = record.get(20..).map_or(0, |bytes| Fields(bytes).two());
            record.starts_with(b"PK\x05\x06") && at + 22 + usize::from(comment) <= tail.len()
        })
        .ok_or_else(|| damaged("it is no zip, or its end is missing"))?;
    let mut fields = Fields(tail.get(end + 4..).unwrap_or_default());
    let (disk, first) = (fields.two(), fields.two());
    let (here, count) = (u64::from(fields.two()), u64::from(fields.two()));
    let (size, offset) = (u64::from(fields.four()), u64::from(fields.four()));
    let at = from + u64::try_from(end).unwrap_or_default();
    let mut found = (at, count, here, size, offset);
    if count == 0xFFFF || size == FULL || offset == FULL {
        if let Some(wide) = wide_end(file, at)? {
            found = wide;
        }
    } else if disk != 0 || first != 0 {
        return Err(damaged("it is one of several parts"));
    }
    let (end, count, here, size, offset) = found;
    if here != count {
        return Err(damaged("it is one of several parts"));
    }
    let start = end.checked_sub(size).ok_or_else(|| damaged("its directory is out of place"))?;
    let before =
        start.checked_sub(offset).ok_or_else(|| damaged("its directory is out of place"))?;
    if count > size / LEAST {
        return Err(damaged("its directory is too short"));
    }
    Ok(Directory { start, end, count, before })
}

type Ends = (u64, u64, u64, u64, u64);

fn wide_end(file: &File, end: u64) -> Result<Option<Ends>, ArchiveError> {
    let Some(at) = end.checked_sub(20) else { return Ok(None) };
    let locator: [u8; 20] = exactly(file, at)?;
    if !locator.starts_with(b"PK\x06\x07") {
        return Ok(None);
    }
    let claimed = Fields(locator.get(8..).unwrap_or_default()).eight();
    // Something may stand before the archive, so that it is not where it says.
    for at in [Some(claimed), at.checked_sub(56)].into_iter().flatten() {
        if at.checked_add(56).is_none_or(|wide_end| wide_end > end) {
            continue;
        }
        let record: [u8; 56] = exactly(file, at)?;
        if record.starts_with(b"PK\x06\x06") {
            let mut fields = Fields(record.get(24..).unwrap_or_default());
            let (here, count) = (fields.eight(), fields.eight());
            let (size, offset) = (fields.eight(), fields.eight());
            return Ok(Some((at, count, here, size, offset)));
        }
    }
    Err(damaged("its end is missing"))
}

/// Reads all entries, no more than `most`, sorted by where their data lies.
pub(super) fn items(
    file: &File,
    length: u64,
    most: u64,
    stop: &AtomicBool,
) -> Result<Vec<Item>, ArchiveError> {
    let directory = directory(file, length)?;
    if directory.count > most {
        return Err(ArchiveError::TooMuch { what: "entries", limit: most });
    }
    let mut reader =
        BufReader::with_capacity(64 * 1024, Part::new(file, directory.start, directory.end));
    let mut items = Vec::new();
    for _ in 0..directory.count {
        go_on(stop)?;
        items.push(item(&mut reader, file, &directory)?);
    }
    // Whether two entries share data: what is packed once must not come out many times.
    let mut ranges: Vec<(u64, u64)> =
        items.iter().map(|item| (item.head, item.data + item.packed)).collect();
    ranges.sort_unstable();
    if ranges.is_sorted_by(|before, next| before.1 <= next.0) {
        Ok(items)
    } else {
        Err(damaged("its entries overlap"))
    }
}

fn item(reader: &mut impl Read, file: &File, all: &Directory) -> Result<Item, ArchiveError> {
    let mut head = [0; 46];
    reader.read_exact(&mut head).map_err(torn)?;
    if !head.starts_with(b"PK\x01\x02") {
        return Err(damaged("its directory is broken"));
    }
    let mut fields = Fields(head.get(4..).unwrap_or_default());
    let (made, _needed, flags, method) = (fields.two(), fields.two(), fields.two(), fields.two());
    let (time, date, crc) = (fields.two(), fields.two(), fields.four());
    let (packed, plain) = (u64::from(fields.four()), u64::from(fields.four()));
    let lengths = [fields.two(), fields.two(), fields.two()];
    let (_disk, _internal, attributes) = (fields.two(), fields.two(), fields.four());
    let offset = u64::from(fields.four());
    let [name, extra, _comment] = lengths.map(|length| {
        let mut bytes = vec![0; usize::from(length)];
        reader.read_exact(&mut bytes).map(|()| bytes)
    });
    let (name, extra) = (name.map_err(torn)?, extra.map_err(torn)?);
    if flags & (1 | 1 << 13) != 0 {
        return Err(ArchiveError::Unsupported { detail: format!("{} is encrypted", shown(&name)) });
    }
    let mut found = Item {
        mode: matches!(made >> 8, 3 | 19).then_some(attributes >> 16),
        mtime: from_dos(date, time),
        method,
        crc,
        packed,
        plain,
        data: 0,
        head: offset,
        name,
    };
    read_extra(&mut found, &extra)?;
    let wrong = || damaged(format!("{} is out of place", shown(&found.name)));
    let head = found.head.checked_add(all.before).ok_or_else(wrong)?;
    if head.checked_add(30).is_none_or(|end| end > all.start) {
        return Err(wrong());
    }
    let local: [u8; 30] = exactly(file, head)?;
    if !local.starts_with(b"PK\x03\x04") {
        return Err(wrong());
    }
    let mut fields = Fields(local.get(26..).unwrap_or_default());
    let data = head + 30 + u64::from(fields.two()) + u64::from(fields.two());
    if data.checked_add(found.packed).is_none_or(|end| end > all.start) {
        return Err(wrong());
    }
    found.data = data;
    found.head = head;
    Ok(found)
}

/// Reads what did not fit, and a time that knows its zone.
fn read_extra(item: &mut Item, extra: &[u8]) -> Result<(), ArchiveError> {
    let mut rest = extra;
    while rest.len() >= 4 {
        let mut fields = Fields(rest);
        let (kind, length) = (fields.two(), usize::from(fields.two()));
        let Some((body, next)) = fields.0.split_at_checked(length) else {
            // Some writers leave rubbish at the end.
            return Ok(());
        };
        rest = next;
        let mut body = Fields(body);
        match kind {
            1 => {
                for number in [&mut item.plain, &mut item.packed, &mut item.head] {
                    if *number == FULL {
                        let bytes = body.take().ok_or_else(|| {
                            damaged(format!("{} has no length", shown(&item.name)))
                        })?;
                        *number = u64::from_le_bytes(bytes);
                    }
                }
            }
            0x5455 => {
                if let (Some([flags]), Some(seconds)) = (body.take(), body.take())
                    && flags & 1 == 1
                {
                    item.mtime = Some(i64::from(u32::from_le_bytes(seconds)));
                }
            }
            _ => {}
        }
    }
    Ok(())
}

/// The time that DOS has, taken as UTC; nothing if it is none.
fn from_dos(date: u16, time: u16) -> Option<i64> {
    let part = |number: u16, shift: u16, mask: u16| i8::try_from((number >> shift) & mask).ok();
    let year = i16::try_from((date >> 9) + 1980).ok()?;
    let date = jiff::civil::Date::new(year, part(date, 5, 0xF)?, part(date, 0, 0x1F)?).ok()?;
    let second = part(time, 0, 0x1F)?.checked_mul(2)?.min(59);
    let time =
        jiff::civil::Time::new(part(time, 11, 0x1F)?, part(time, 5, 0x3F)?, second, 0).ok()?;
    let moment = date.to_datetime(time).to_zoned(jiff::tz::TimeZone::UTC).ok()?;
    Some(moment.timestamp().as_second())
}
