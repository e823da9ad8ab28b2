//! Packs what travels with a job into the tars that the sandbox store takes.
//!
//! A workspace can be larger than one sandbox may be, and hold links that a careful unpacker refuses. So
//! it is one tar, cut into parts; each part is a file in a sandbox of its own, and the helper puts them
//! together. Files come in the order of their names, so that the same workspace makes the same sandboxes.

use std::fs;
use std::io::{self, Read as _, Seek as _, Write};
use std::sync::Weak;

use camino::{Utf8Path, Utf8PathBuf};
use sha2::{Digest as _, Sha256};

/// Bytes in one part, before they are compressed. The store takes 100 MiB, and what cannot be compressed
/// grows a little.
const PART: u64 = 96 << 20;

/// A tar that is to go into the store.
#[derive(Debug)]
pub(crate) struct Packed {
    pub(crate) file: fs::File,
    pub(crate) size: u64,
    /// SHA-256, in hex.
    pub(crate) checksum: String,
}

/// Why something could not be packed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PackError {
    #[error("{verb} {path}")]
    Io {
        verb: &'static str,
        path: Utf8PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("pack for the sandbox")]
    Write(#[source] io::Error),
    #[error("send a workspace of more than {limit} bytes (`max_workspace`)")]
    TooLarge { limit: u64 },
    #[error("pack for the sandbox: nobody waits for it any more")]
    Unwanted,
}

/// Writes and hashes.
struct Hashing {
    file: fs::File,
    hash: Sha256,
    size: u64,
}

impl Write for Hashing {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.file.write(bytes)?;
        self.hash.update(bytes.get(..n).unwrap_or_default());
        self.size += u64::try_from(n).unwrap_or_default();
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

type Outer = tar::Builder<zstd::Encoder<'static, Hashing>>;

fn outer() -> Result<Outer, PackError> {
    let file = tempfile::tempfile().map_err(PackError::Write)?;
    let hashing = Hashing { file, hash: Sha256::new(), size: 0 };
    let encoder = zstd::Encoder::new(hashing, 3).map_err(PackError::Write)?;
    Ok(tar::Builder::new(encoder))
}

fn add(tar: &mut Outer, name: &str, size: u64, mode: u32, from: impl io::Read) -> io::Result<()> {
    let mut header = tar::Header::new_ustar();
    header.set_size(size);
    header.set_mode(mode);
    header.set_mtime(0);
    header.set_entry_type(tar::EntryType::Regular);
    tar.append_data(&mut header, name, from)
}

fn finish(tar: Outer) -> io::Result<Packed> {
    let mut hashing = tar.into_inner()?.finish()?;
    hashing.file.rewind()?;
    let checksum = hashing.hash.finalize();
    let checksum = checksum.iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(Packed { file: hashing.file, size: hashing.size, checksum })
}

/// Packs small files under their names.
pub(crate) fn pack_files(files: &[(&'static str, Vec<u8>)]) -> Result<Packed, PackError> {
    let mut tar = outer()?;
    for (name, bytes) in files {
        let size = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        let mode = if name.ends_with(".sh") { 0o755 } else { 0o600 };
        add(&mut tar, name, size, mode, bytes.as_slice()).map_err(PackError::Write)?;
    }
    finish(tar).map_err(PackError::Write)
}

/// Packs a workspace and what lies beside it under its name with `.tmp`; nothing when both are empty.
pub(crate) fn pack_workspace(
    workspace: &Utf8Path,
    limit: u64,
    wanted: &Weak<()>,
) -> Result<Vec<Packed>, PackError> {
    let parts = Parts { done: Vec::new(), part: None, filled: 0, total: 0, limit };
    let mut tar = tar::Builder::new(parts);
    tar.follow_symlinks(false);
    let beside = Utf8PathBuf::from(format!("{workspace}.tmp"));
    let mut any = false;
    for (path, name) in [(workspace, "w"), (beside.as_path(), "w.tmp")] {
        if is_dir(path)? {
            any |= walk(&mut tar, path, name, wanted)?;
        }
    }
    if !any {
        return Ok(Vec::new());
    }
    let mut parts = tar.into_inner().map_err(too_large(limit))?;
    parts.close().map_err(PackError::Write)?;
    Ok(parts.done)
}

fn is_dir(path: &Utf8Path) -> Result<bool, PackError> {
    match fs::symlink_metadata(path) {
        Ok(meta) => Ok(meta.is_dir()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(source) => Err(PackError::Io { verb: "look at", path: path.to_owned(), source }),
    }
}

fn too_large(limit: u64) -> impl Fn(io::Error) -> PackError {
    move |error| {
        if error.kind() == io::ErrorKind::FileTooLarge {
            PackError::TooLarge { limit }
        } else {
            PackError::Write(error)
        }
    }
}

/// Adds a directory with all it holds; says whether it holds anything.
fn walk(
    tar: &mut tar::Builder<Parts>,
    path: &Utf8Path,
    name: &str,
    wanted: &Weak<()>,
) -> Result<bool, PackError> {
    let failed = |verb, path: &Utf8Path| {
        let path = path.to_owned();
        move |source| PackError::Io { verb, path, source }
    };
    let limit = tar.get_ref().limit;
    if wanted.strong_count() == 0 {
        return Err(PackError::Unwanted);
    }
    let meta = fs::symlink_metadata(path).map_err(failed("look at", path))?;
    let mut header = tar::Header::new_gnu();
    header.set_metadata(&meta);
    tar.append_data(&mut header, name, io::empty()).map_err(too_large(limit))?;
    let entries = fs::read_dir(path).map_err(failed("list", path))?;
    let mut entries: Vec<fs::DirEntry> =
        entries.collect::<io::Result<_>>().map_err(failed("list", path))?;
    entries.sort_by_key(fs::DirEntry::file_name);
    let any = !entries.is_empty();
    for entry in entries {
        let inner = entry.path();
        // A name that is no text still has bytes, and those are kept.
        let inner_name = std::path::Path::new(name).join(entry.file_name());
        let shown = Utf8PathBuf::from(inner.to_string_lossy().into_owned());
        let kind = entry.file_type().map_err(failed("look at", &shown))?;
        if kind.is_dir() {
            if let (Some(inner), Some(inner_name)) =
                (Utf8Path::from_path(&inner), inner_name.to_str())
            {
                walk(tar, inner, inner_name, wanted)?;
            } else {
                tar.append_dir_all(&inner_name, &inner).map_err(too_large(limit))?;
            }
        } else if kind.is_file() || kind.is_symlink() {
            if wanted.strong_count() == 0 {
                return Err(PackError::Unwanted);
            }
            tar.append_path_with_name(&inner, &inner_name).map_err(too_large(limit))?;
        }
        // Sockets and pipes are nobody's on another machine.
    }
    Ok(any)
}

/// A stream that is cut into sandboxes.
struct Parts {
    done: Vec<Packed>,
    part: Option<fs::File>,
    filled: u64,
    total: u64,
    limit: u64,
}

impl Parts {
    /// Makes a sandbox of the part at hand.
    fn close(&mut self) -> io::Result<()> {
        let Some(mut part) = self.part.take() else { return Ok(()) };
        part.rewind()?;
        let mut tar = outer().map_err(io::Error::other)?;
        let name = format!("bridge-ws.{:03}", self.done.len());
        add(&mut tar, &name, self.filled, 0o600, (&mut part).take(self.filled))?;
        self.done.push(finish(tar)?);
        self.filled = 0;
        Ok(())
    }
}

impl Write for Parts {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.filled == PART {
            self.close()?;
        }
        let room = usize::try_from(PART - self.filled).unwrap_or(usize::MAX);
        let bytes = bytes.get(..room.min(bytes.len())).unwrap_or_default();
        let len = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        if self.total.saturating_add(len) > self.limit {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        let part = match &mut self.part {
            Some(part) => part,
            None => self.part.insert(tempfile::tempfile()?),
        };
        part.write_all(bytes)?;
        self.filled += len;
        self.total += len;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn names(packed: &[Packed]) -> Vec<String> {
        let mut inner = Vec::new();
        for packed in packed {
            let mut file = packed.file.try_clone().unwrap();
            file.rewind().unwrap();
            let mut outer = tar::Archive::new(zstd::Decoder::new(file).unwrap());
            for entry in outer.entries().unwrap() {
                entry.unwrap().read_to_end(&mut inner).unwrap();
            }
        }
        let mut archive = tar::Archive::new(inner.as_slice());
        let entries = archive.entries().unwrap();
        entries.map(|e| e.unwrap().path().unwrap().to_string_lossy().into_owned()).collect()
    }

    #[test]
    fn a_workspace_is_packed_the_same_way_twice() {
        let dir = tempfile::tempdir().unwrap();
        let root = Utf8Path::from_path(dir.path()).unwrap();
        let ws = root.join("p q");
        fs::create_dir_all(ws.join("b")).unwrap();
        fs::create_dir(root.join("p q.tmp")).unwrap();
        fs::write(root.join("p q.tmp/VAR"), "x").unwrap();
        fs::write(ws.join("z"), "1").unwrap();
        fs::write(ws.join("b/a"), "2").unwrap();
        std::os::unix::fs::symlink("/outside", ws.join("link")).unwrap();
        let wanted = Arc::new(());
        let first = pack_workspace(&ws, 1 << 30, &Arc::downgrade(&wanted)).unwrap();
        let second = pack_workspace(&ws, 1 << 30, &Arc::downgrade(&wanted)).unwrap();
        assert_eq!(first[0].checksum, second[0].checksum);
        assert_eq!(names(&first), ["w", "w/b", "w/b/a", "w/link", "w/z", "w.tmp", "w.tmp/VAR"]);
    }

    #[test]
    fn too_much_is_refused_and_nothing_is_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let ws = Utf8Path::from_path(dir.path()).unwrap().join("p");
        let wanted = Arc::new(());
        let pack = |limit| pack_workspace(&ws, limit, &Arc::downgrade(&wanted));
        assert!(pack(0).unwrap().is_empty());
        fs::create_dir(&ws).unwrap();
        assert!(pack(1 << 20).unwrap().is_empty());
        fs::write(ws.join("f"), vec![7; 100_000]).unwrap();
        assert!(matches!(pack(50_000), Err(PackError::TooLarge { limit: 50_000 })));
        let unwanted = pack_workspace(&ws, 1 << 20, &Weak::new());
        assert!(matches!(unwanted, Err(PackError::Unwanted)));
    }
}
