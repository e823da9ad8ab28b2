//! Reads git's index: which submodules a commit has, and where its attributes are.
//!
//! Asking git would cost a process per job for what is in most projects no submodule and no large file.
//! The format is git's `Documentation/gitformat-index.txt`, versions 2 to 4.

/// What is of interest in an index.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Index {
    /// The paths of submodules.
    pub(super) submodules: Vec<String>,
    /// The paths of `.gitattributes`.
    pub(super) attributes: Vec<String>,
}

/// Why an index cannot be understood.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum IndexError {
    /// It ends too early, or is something else.
    #[error("the index cannot be read")]
    Format,
    /// A submodule has a name that no path of ours can hold.
    #[error("a submodule's path is not UTF-8")]
    Name,
}

const SUBMODULE: u32 = 0o160_000;
const EXTENDED: u16 = 0x4000;

/// Reads an index.
pub(super) fn read(bytes: &[u8], sha256: bool) -> Result<Index, IndexError> {
    let mut reader = Reader { bytes, at: 0 };
    let mut index = Index::default();
    if reader.take(4)? != b"DIRC" {
        return Err(IndexError::Format);
    }
    let version = reader.u32()?;
    if !(2..=4).contains(&version) {
        return Err(IndexError::Format);
    }
    let count = reader.u32()?;
    let mut name: Vec<u8> = Vec::new();
    for _ in 0..count {
        let start = reader.at;
        // Times, device and inode come before the mode; owner, size and hash after it.
        reader.take(24)?;
        let mode = reader.u32()?;
        reader.take(12 + if sha256 { 32 } else { 20 })?;
        let flags = reader.u16()?;
        if flags & EXTENDED != 0 {
            reader.take(2)?;
        }
        if version == 4 {
            let dropped = reader.varint()?;
            let kept = name.len().checked_sub(dropped).ok_or(IndexError::Format)?;
            name.truncate(kept);
            name.extend_from_slice(reader.until_nul()?);
        } else {
            name.clear();
            name.extend_from_slice(reader.until_nul()?);
            // One to eight NULs, so that each entry's length is a multiple of eight.
            let length = reader.at - start;
            reader.take((8 - length % 8) % 8)?;
        }
        if mode & 0o170_000 == SUBMODULE {
            let name = std::str::from_utf8(&name).map_err(|_odd| IndexError::Name)?;
            index.submodules.push(name.to_owned());
        } else if (name == b".gitattributes" || name.ends_with(b"/.gitattributes"))
            && let Ok(name) = std::str::from_utf8(&name)
        {
            index.attributes.push(name.to_owned());
        }
    }
    // While a merge is unfinished a path is there up to three times.
    index.submodules.dedup();
    Ok(index)
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], IndexError> {
        let end = self.at.checked_add(len).ok_or(IndexError::Format)?;
        let bytes = self.bytes.get(self.at..end).ok_or(IndexError::Format)?;
        self.at = end;
        Ok(bytes)
    }

    fn number(&mut self, len: usize) -> Result<u32, IndexError> {
        Ok(self.take(len)?.iter().fold(0, |number, byte| (number << 8) | u32::from(*byte)))
    }

    fn u32(&mut self) -> Result<u32, IndexError> {
        self.number(4)
    }

    fn u16(&mut self) -> Result<u16, IndexError> {
        u16::try_from(self.number(2)?).map_err(|_large| IndexError::Format)
    }

    fn until_nul(&mut self) -> Result<&'a [u8], IndexError> {
        let rest = self.bytes.get(self.at..).ok_or(IndexError::Format)?;
        let len = rest.iter().position(|byte| *byte == 0).ok_or(IndexError::Format)?;
        let name = self.take(len)?;
        self.take(1)?;
        Ok(name)
    }

    /// The encoding of offsets in packs.
    fn varint(&mut self) -> Result<usize, IndexError> {
        let mut byte = self.number(1)?;
        let mut value = byte & 0x7f;
        while byte & 0x80 != 0 {
            byte = self.number(1)?;
            value = value
                .checked_add(1)
                .and_then(|value| value.checked_mul(128))
                .ok_or(IndexError::Format)?
                | (byte & 0x7f);
        }
        usize::try_from(value).map_err(|_large| IndexError::Format)
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::git;
    use super::*;
    use camino::Utf8PathBuf;

    #[test]
    fn what_git_wrote_is_read_in_every_version() {
        for format in ["sha1", "sha256"] {
            let dir = tempfile::tempdir().unwrap();
            let root = Utf8PathBuf::from_path_buf(dir.path().to_owned()).unwrap();
            git(&root, &["init", "--quiet", &format!("--object-format={format}")]);
            for name in ["a", "sub-not", "x/.gitattributes", ".gitattributes", "z.gitattributes"] {
                let path = root.join(name);
                std::fs::create_dir_all(path.parent().unwrap()).unwrap();
                std::fs::write(path, "").unwrap();
            }
            git(&root, &["add", "."]);
            git(&root, &["commit", "-q", "-m", "one"]);
            let sha = git(&root, &["rev-parse", "HEAD"]);
            for path in ["sub", "deep/er/sub"] {
                let entry = format!("160000,{sha},{path}");
                git(&root, &["update-index", "--add", "--cacheinfo", &entry]);
            }
            // Makes an extended flag, and with it version 3.
            git(&root, &["update-index", "--skip-worktree", "a"]);
            for version in ["2", "3", "4"] {
                git(&root, &["update-index", "--index-version", version]);
                let bytes = std::fs::read(root.join(".git/index")).unwrap();
                let index = read(&bytes, format == "sha256").unwrap();
                assert_eq!(index.submodules, ["deep/er/sub", "sub"], "{format} {version}");
                assert_eq!(index.attributes, [".gitattributes", "x/.gitattributes"]);
                for cut in 0..bytes.len() - 100 {
                    // Never a panic; only what follows the entries may be missing.
                    drop(read(&bytes[..cut], format == "sha256"));
                }
            }
        }
    }

    #[test]
    fn rubbish_is_refused() {
        for bytes in
            [&b""[..], b"DIR", b"DIRC\0\0\0\x05\0\0\0\0", b"DIRC\0\0\0\x02\xff\xff\xff\xff"]
        {
            assert_eq!(read(bytes, false), Err(IndexError::Format), "{bytes:?}");
        }
    }
}
