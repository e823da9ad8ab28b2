//! Unpacks a tar inside Zstandard.
//!
//! The `tar` crate reads the headers; its own reader would keep a name of any length in memory.

use std::fs::File;
use std::io::{self, BufReader, Read, Write as _};
use std::sync::atomic::AtomicBool;

use camino::Utf8Path;
use tar::{EntryType, Header, PaxExtensions};

use super::place::{self, Looks, Placed, Placer};
use super::unpack::{Bounds, Unpacked};
use super::zip_in::Part;
use super::{ArchiveError, go_on, shown};

const BLOCK: u64 = 512;
/// The longest name or set of extensions that is read.
const LONGEST: u64 = 1024 * 1024;

/// What the entries before one say about it.
#[derive(Default)]
struct Ahead {
    name: Option<Vec<u8>>,
    target: Option<Vec<u8>>,
    size: Option<u64>,
    mtime: Option<i64>,
}

struct Untar<'a, R> {
    reader: R,
    length: u64,
    bounds: &'a Bounds,
    stop: &'a AtomicBool,
    /// Everything that came out of the frames, headers included.
    total: u64,
    bytes: u64,
}

fn damaged(detail: impl Into<String>) -> ArchiveError {
    ArchiveError::Damaged { detail: detail.into() }
}

/// Unpacks all entries in order.
pub(super) fn unpack(
    archive: &File,
    length: u64,
    into: &Utf8Path,
    bounds: &Bounds,
    stop: &AtomicBool,
) -> Result<Unpacked, ArchiveError> {
    let part = BufReader::with_capacity(128 * 1024, Part::new(archive, 0, length));
    let reader = zstd::stream::read::Decoder::with_buffer(part)
        .map_err(ArchiveError::io("read", "the archive"))?;
    let mut untar = Untar { reader, length, bounds, stop, total: 0, bytes: 0 };
    let mut placer = Placer::new(into)?;
    let mut entries = 0;
    let mut ahead = Ahead::default();
    while let Some(header) = untar.header()? {
        go_on(stop)?;
        entries += 1;
        if entries > bounds.entries {
            return Err(ArchiveError::TooMuch { what: "entries", limit: bounds.entries });
        }
        let size = header.entry_size().map_err(|error| damaged(error.to_string()))?;
        let kind = header.entry_type();
        if kind.is_gnu_longname() {
            ahead.name = Some(untar.text(size)?);
        } else if kind.is_gnu_longlink() {
            ahead.target = Some(untar.text(size)?);
        } else if kind.is_pax_local_extensions() {
            untar.extensions(size, &mut ahead)?;
        } else if kind.is_pax_global_extensions() {
            untar.pass(size, |_| Ok(()))?;
        } else {
            untar.entry(&header, kind, std::mem::take(&mut ahead), size, &mut placer)?;
        }
    }
    let (files, warnings) = placer.end()?;
    Ok(Unpacked { files, bytes: untar.bytes, warnings })
}

impl<R: Read> Untar<'_, R> {
    /// Reads to fill the buffer or to the end.
    fn fill(&mut self, buffer: &mut [u8]) -> Result<usize, ArchiveError> {
        let mut filled = 0;
        while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            match self.reader.read(rest) {
                Ok(0) => break,
                Ok(read) => filled += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                    return Err(damaged("it ends too early"));
                }
                Err(error) => return Err(damaged(error.to_string())),
            }
        }
        self.total += u64::try_from(filled).unwrap_or_default();
        // Headers count as well: a tar of nothing but empty files is large.
        self.bounds.allow(self.length, self.total)?;
        Ok(filled)
    }

    /// The next header; nothing at the end.
    fn header(&mut self) -> Result<Option<Header>, ArchiveError> {
        let mut block = [0; 512];
        match self.fill(&mut block)? {
            0 => return Ok(None),
            512 => {}
            _ => return Err(damaged("it ends too early")),
        }
        if block.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        let header = Header::from_byte_slice(&block).clone();
        // The sum of all bytes, with blanks in the place of the sum.
        let own: u32 = block.get(148..156).unwrap_or_default().iter().map(|b| u32::from(*b)).sum();
        let sum = block.iter().map(|byte| u32::from(*byte)).sum::<u32>() - own + 8 * 32;
        if header.cksum().ok() != Some(sum) {
            return Err(damaged("a header has the wrong checksum"));
        }
        Ok(Some(header))
    }

    /// Hands out an entry's content, and passes over what fills it up to whole blocks.
    fn pass(
        &mut self,
        size: u64,
        mut take: impl FnMut(&[u8]) -> Result<(), ArchiveError>,
    ) -> Result<(), ArchiveError> {
        let mut buffer = vec![0; 64 * 1024];
        let mut left = size;
        let padding = (BLOCK - size % BLOCK) % BLOCK;
        while left > 0 {
            go_on(self.stop)?;
            let most = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
            let part = buffer.get_mut(..most).unwrap_or_default();
            if self.fill(part)? < most {
                return Err(damaged("it ends too early"));
            }
            take(part)?;
            left -= u64::try_from(most).unwrap_or(left);
        }
        let padding = usize::try_from(padding).unwrap_or_default();
        let part = buffer.get_mut(..padding).unwrap_or_default();
        if self.fill(part)? < padding {
            return Err(damaged("it ends too early"));
        }
        Ok(())
    }

    fn short(&mut self, size: u64) -> Result<Vec<u8>, ArchiveError> {
        if size > LONGEST {
            return Err(damaged("a name is too long"));
        }
        let mut bytes = Vec::new();
        self.pass(size, |part| {
            bytes.extend_from_slice(part);
            Ok(())
        })?;
        Ok(bytes)
    }

    fn text(&mut self, size: u64) -> Result<Vec<u8>, ArchiveError> {
        let mut bytes = self.short(size)?;
        while bytes.last() == Some(&0) {
            bytes.pop();
        }
        Ok(bytes)
    }

    fn extensions(&mut self, size: u64, ahead: &mut Ahead) -> Result<(), ArchiveError> {
        let bytes = self.short(size)?;
        for extension in PaxExtensions::new(&bytes) {
            let extension = extension.map_err(|error| damaged(error.to_string()))?;
            let value = extension.value_bytes();
            let text = std::str::from_utf8(value).unwrap_or_default();
            match extension.key_bytes() {
                b"path" => ahead.name = Some(value.to_vec()),
                b"linkpath" => ahead.target = Some(value.to_vec()),
                b"size" => {
                    let size = text.parse().map_err(|_bad| damaged("a length is no number"))?;
                    ahead.size = Some(size);
                }
                // Fractions of a second are not restored.
                b"mtime" => ahead.mtime = text.split('.').next().and_then(|text| text.parse().ok()),
                _ => {}
            }
        }
        Ok(())
    }

    fn entry(
        &mut self,
        header: &Header,
        kind: EntryType,
        ahead: Ahead,
        size: u64,
        placer: &mut Placer,
    ) -> Result<(), ArchiveError> {
        let size = ahead.size.unwrap_or(size);
        let raw = ahead.name.unwrap_or_else(|| header.path_bytes().into_owned());
        let Some(name) = place::inside(&raw)? else { return self.pass(size, |_| Ok(())) };
        if place::is_protected(&name) {
            placer.protect();
            return self.pass(size, |_| Ok(()));
        }
        let mtime = ahead.mtime.or_else(|| header.mtime().ok().and_then(|t| i64::try_from(t).ok()));
        let looks = Looks { mode: header.mode().ok(), mtime };
        let file = kind.is_file() || kind.is_contiguous();
        if kind.is_dir() || (file && raw.ends_with(b"/")) {
            placer.directory(&name, looks)?;
        } else if file {
            return self.file(&name, looks, size, placer);
        } else if kind.is_symlink() {
            let target = ahead.target.or_else(|| header.link_name_bytes().map(Into::into));
            match target.filter(|target| !target.is_empty() && !target.contains(&0)) {
                Some(target) => placer.link(name, target, looks),
                None => return Err(damaged(format!("{:?} is a link to nothing", shown(&raw)))),
            }
        } else {
            placer.warn(format!("File ignored: {}", shown(&name)));
        }
        self.pass(size, |_| Ok(()))
    }

    fn file(
        &mut self,
        name: &[u8],
        looks: Looks,
        size: u64,
        placer: &mut Placer,
    ) -> Result<(), ArchiveError> {
        match placer.file(name)? {
            Placed::Refused => self.pass(size, |_| Ok(())),
            Placed::Open(mut file) => {
                self.pass(size, |bytes| {
                    file.write_all(bytes).map_err(ArchiveError::io("write", shown(name)))
                })?;
                self.bytes += size;
                placer.finish(name, &file, looks);
                Ok(())
            }
        }
    }
}
