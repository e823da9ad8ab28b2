//! Writes a tar inside Zstandard: the tar is cut into blocks, each of which is a frame.

use std::io::{self, Read as _, Write};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::blocks::{Coding, Done, LARGE_BLOCK, Pipeline, Sink, pipeline};
use super::out::Out;
use super::pack::{Found, Source};
use super::select::Selection;
use super::{ArchiveError, go_on, shown};

struct Frames<'a>(Out<'a>);

impl Sink for Frames<'_> {
    type Meta = ();

    fn begin(&mut self, _meta: ()) -> Result<(), ArchiveError> {
        Ok(())
    }

    fn block(&mut self, done: Done) -> Result<(), ArchiveError> {
        self.0.put(&done.coded)
    }

    fn discard(&mut self) -> Result<(), ArchiveError> {
        Ok(())
    }
}

/// Cuts what is written into blocks.
struct Cutter<'a, 'b, 'c> {
    pipe: &'a mut Pipeline<'b, Frames<'c>>,
    block: Vec<u8>,
    /// Why nothing more can be written: the tar's writer knows errors of input and output alone.
    error: Option<ArchiveError>,
}

impl Cutter<'_, '_, '_> {
    fn send(&mut self) -> io::Result<()> {
        let block = std::mem::replace(&mut self.block, Vec::with_capacity(LARGE_BLOCK));
        self.pipe.block(Arc::new(block), None, true).map_err(|error| {
            self.error = Some(error);
            io::Error::other("the archive cannot be continued")
        })
    }
}

impl Write for Cutter<'_, '_, '_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let room = LARGE_BLOCK - self.block.len();
        let taken = bytes.get(..room).unwrap_or(bytes);
        self.block.extend_from_slice(taken);
        if self.block.len() == LARGE_BLOCK {
            self.send()?;
        }
        Ok(taken.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Reads as much as was promised: what a file has lost meanwhile is filled up with zeros.
struct Promised<R> {
    file: R,
    left: u64,
    short: bool,
    broken: Option<io::Error>,
}

impl<R: io::Read> io::Read for Promised<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        let buffer = buffer.get_mut(..most).unwrap_or_default();
        let mut count = 0;
        if !self.short && most > 0 {
            match self.file.read(buffer) {
                Ok(0) => self.short = true,
                Ok(read) => count = read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => return Err(error),
                Err(error) => {
                    self.short = true;
                    self.broken = Some(error);
                }
            }
        }
        if self.short {
            buffer.fill(0);
            count = most;
        }
        self.left -= u64::try_from(count).unwrap_or_default();
        Ok(count)
    }
}

/// Packs what was selected; gives back how many entries there are, and the archive's length and
/// checksum.
pub(super) fn pack(
    out: Out<'_>,
    selection: &Selection,
    level: i32,
    source: &mut Source<'_>,
    stop: &AtomicBool,
) -> Result<(u64, u64, [u8; 32]), ArchiveError> {
    let mut entries = 0;
    let frames = pipeline(Coding::Zstd(level), Frames(out), stop, |pipe| {
        let cutter = Cutter { pipe, block: Vec::with_capacity(LARGE_BLOCK), error: None };
        let mut builder = tar::Builder::new(cutter);
        for entry in &selection.entries {
            go_on(stop)?;
            let Some(found) = source.find(entry) else { continue };
            match append(&mut builder, found) {
                Ok(None) => {}
                Ok(Some(why)) => source.spoiled(entry, &why),
                Err(error) => {
                    let known = builder.get_mut().error.take();
                    let name = shown(&entry.name);
                    return Err(known.unwrap_or_else(|| ArchiveError::io("pack", name)(error)));
                }
            }
            entries += 1;
        }
        let ended = builder.into_inner().and_then(|mut cutter| match cutter.send() {
            Ok(()) => Ok(None),
            Err(_) if cutter.error.is_some() => Ok(cutter.error.take()),
            Err(error) => Err(error),
        });
        ended.map_err(ArchiveError::io("write", "the archive"))?.map_or(Ok(()), Err)
    })?;
    let (bytes, sha256) = frames.0.finish()?;
    Ok((entries, bytes, sha256))
}

/// Adds one entry; says why its content is not what it was, if it is not.
fn append<W: Write>(builder: &mut tar::Builder<W>, found: Found) -> io::Result<Option<io::Error>> {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt as _;

    let Found { meta, file } = found;
    let mut header = tar::Header::new_gnu();
    header.set_mode(meta.mode & 0o7777);
    header.set_uid(meta.uid.into());
    header.set_gid(meta.gid.into());
    header.set_mtime(u64::try_from(meta.mtime).unwrap_or_default());
    header.set_size(meta.size);
    let mut name = meta.name;
    match (file, meta.content) {
        (Some(file), _) => {
            header.set_entry_type(tar::EntryType::Regular);
            let mut promised = Promised {
                file: file.take(meta.size),
                left: meta.size,
                short: false,
                broken: None,
            };
            builder.append_data(&mut header, OsStr::from_bytes(&name), &mut promised)?;
            // A header cannot be taken back, and a file of zeros in the place of one that cannot be read
            // would be believed.
            promised.broken.map_or(Ok(()), Err)?;
            let short = || io::Error::other("file became shorter while it was read");
            Ok(promised.short.then(short))
        }
        (None, Some(target)) if !target.is_empty() => {
            header.set_entry_type(tar::EntryType::Symlink);
            let target = OsStr::from_bytes(&target);
            builder.append_link(&mut header, OsStr::from_bytes(&name), target)?;
            Ok(None)
        }
        (None, _) => {
            header.set_entry_type(tar::EntryType::Directory);
            name.push(b'/');
            builder.append_data(&mut header, OsStr::from_bytes(&name), io::empty())?;
            Ok(None)
        }
    }
}
