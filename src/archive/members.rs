//! Writes the formats that hold nothing but files: gzip members, and one file as it is.

use super::ArchiveError;
use super::blocks::{Done, Sink};
use super::out::{Mark, Out};
use super::zip_out::Meta;

/// One gzip member for each file, one after the other.
pub(super) struct GzipOut<'a> {
    out: Out<'a>,
    open: Option<Open>,
    members: u64,
}

struct Open {
    mark: Mark,
    crc: crc32fast::Hasher,
    plain: u64,
}

impl<'a> GzipOut<'a> {
    pub(super) fn new(out: Out<'a>) -> Self {
        Self { out, open: None, members: 0 }
    }

    /// How many members there are, and the archive's length and checksum.
    pub(super) fn finish(self) -> Result<(u64, u64, [u8; 32]), ArchiveError> {
        let (bytes, sha256) = self.out.finish()?;
        Ok((self.members, bytes, sha256))
    }
}

/// A name for a header, whose characters are Latin-1: anything else is escaped as in a URL's path.
fn header_text(name: &[u8]) -> Vec<u8> {
    if name.iter().all(|byte| byte.is_ascii() && *byte != b'%') {
        return name.to_vec();
    }
    let mut text = b"e:".to_vec();
    for byte in name {
        if byte.is_ascii_alphanumeric() || b"-_.~$&+=:@".contains(byte) {
            text.push(*byte);
        } else {
            text.extend(format!("%{byte:02X}").into_bytes());
        }
    }
    text
}

impl Sink for GzipOut<'_> {
    type Meta = Meta;

    fn begin(&mut self, meta: Meta) -> Result<(), ArchiveError> {
        let mark = self.out.mark()?;
        let base = meta.name.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
        // Zero means that there is no time.
        let mtime = u32::try_from(meta.mtime).unwrap_or_default();
        // Deflate, with name and comment; by an unknown system.
        let mut head = vec![0x1F, 0x8B, 8, 0x08 | 0x10];
        head.extend(mtime.to_le_bytes());
        head.extend([0, 0xFF]);
        head.extend(header_text(base));
        head.push(0);
        head.extend(header_text(&meta.name));
        head.push(0);
        self.out.put(&head)?;
        self.open = Some(Open { mark, crc: crc32fast::Hasher::new(), plain: 0 });
        Ok(())
    }

    fn block(&mut self, done: Done) -> Result<(), ArchiveError> {
        let Some(open) = &mut self.open else { return Ok(()) };
        open.crc.combine(&done.crc);
        open.plain += u64::try_from(done.plain.len()).unwrap_or(u64::MAX);
        self.out.put(&done.coded)?;
        if done.last {
            let crc = open.crc.clone().finalize();
            // The length modulo two to the 32.
            let [a, b, c, d, ..] = open.plain.to_le_bytes();
            self.out.put(&crc.to_le_bytes())?;
            self.out.put(&[a, b, c, d])?;
            self.open = None;
            self.members += 1;
        }
        Ok(())
    }

    fn discard(&mut self) -> Result<(), ArchiveError> {
        self.open.take().map_or(Ok(()), |open| self.out.back(open.mark))
    }
}

/// The bytes of one file.
pub(super) struct RawOut<'a> {
    out: Out<'a>,
    mark: Option<Mark>,
    files: u64,
}

impl<'a> RawOut<'a> {
    pub(super) fn new(out: Out<'a>) -> Self {
        Self { out, mark: None, files: 0 }
    }

    /// How many files there are, and the archive's length and checksum.
    pub(super) fn finish(self) -> Result<(u64, u64, [u8; 32]), ArchiveError> {
        let (bytes, sha256) = self.out.finish()?;
        Ok((self.files, bytes, sha256))
    }
}

impl Sink for RawOut<'_> {
    type Meta = Meta;

    fn begin(&mut self, _meta: Meta) -> Result<(), ArchiveError> {
        self.mark = Some(self.out.mark()?);
        self.files = 1;
        Ok(())
    }

    fn block(&mut self, done: Done) -> Result<(), ArchiveError> {
        self.out.put(&done.plain)
    }

    fn discard(&mut self) -> Result<(), ArchiveError> {
        self.files = 0;
        self.mark.take().map_or(Ok(()), |mark| self.out.back(mark))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_members_are_ascii() {
        let cases = [
            ("junit.xml", "junit.xml"),
            ("a b/c,d;e?.xml", "a b/c,d;e?.xml"),
            ("100%.xml", "e:100%25.xml"),
            ("prüfung/a b.xml", "e:pr%C3%BCfung%2Fa%20b.xml"),
        ];
        for (name, text) in cases {
            assert_eq!(header_text(name.as_bytes()), text.as_bytes(), "{name}");
        }
        assert_eq!(header_text(b"\xFF"), b"e:%FF");
    }
}
