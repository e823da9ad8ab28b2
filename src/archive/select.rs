//! Which files a job's patterns mean.

use std::collections::BTreeMap;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use camino::Utf8Path;
use globset::{GlobBuilder, GlobMatcher};

use super::{ArchiveError, go_on};

/// What a job wants packed.
#[derive(Debug, Clone, Default)]
pub struct Wanted {
    /// Patterns of files and directories.
    pub paths: Vec<String>,
    /// Patterns of names that are left out.
    pub exclude: Vec<String>,
    /// Names that git listed as untracked, relative to the root.
    pub untracked: Vec<Vec<u8>>,
}

/// What something in a selection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link, which is never followed.
    Link,
    /// A pipe, a socket or a device.
    Special,
}

/// One thing that was selected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its name relative to the root, without a slash at its end.
    pub name: Vec<u8>,
    /// What it was when it was found.
    pub kind: Kind,
}

/// What patterns select.
#[derive(Debug, Clone, Default)]
pub struct Selection {
    /// Sorted by name, each name once; a directory stands before what is in it.
    pub entries: Vec<Entry>,
    /// How many things each pattern found, in the order of the patterns; only those that found any.
    pub found: Vec<(String, usize)>,
    /// How many things each pattern left out; only those that left out any.
    pub excluded: Vec<(String, usize)>,
    /// Sentences for the job's log.
    pub warnings: Vec<String>,
}

fn matcher(pattern: &str) -> Option<GlobMatcher> {
    let pattern = pattern.trim_end_matches('/');
    Some(GlobBuilder::new(pattern).literal_separator(true).build().ok()?.compile_matcher())
}

fn walk(
    root: &Path,
    below: &Path,
    stop: &AtomicBool,
    see: &mut dyn FnMut(&Path, Kind),
) -> Result<(), ArchiveError> {
    go_on(stop)?;
    let Ok(listing) = std::fs::read_dir(root.join(below)) else { return Ok(()) };
    for entry in listing.flatten() {
        let Ok(kind) = entry.file_type() else { continue };
        let name = below.join(entry.file_name());
        let kind = if kind.is_dir() {
            Kind::Directory
        } else if kind.is_symlink() {
            Kind::Link
        } else if kind.is_file() {
            Kind::File
        } else {
            Kind::Special
        };
        see(&name, kind);
        if kind == Kind::Directory {
            walk(root, &name, stop, see)?;
        }
    }
    Ok(())
}

/// Finds the files below `root` that the patterns mean.
pub fn select(
    root: &Utf8Path,
    wanted: &Wanted,
    stop: &AtomicBool,
) -> Result<Selection, ArchiveError> {
    let exclude: Vec<_> =
        wanted.exclude.iter().filter_map(|one| Some((one, matcher(one)?))).collect();
    let mut selection = Selection::default();
    let mut excluded: BTreeMap<String, usize> = BTreeMap::new();
    let mut names: BTreeMap<Vec<u8>, Kind> = BTreeMap::new();
    for pattern in &wanted.paths {
        let mut found = 0;
        if let Some(glob) = matcher(pattern) {
            walk(root.as_std_path(), Path::new(""), stop, &mut |name, kind| {
                if !name.ancestors().any(|one| glob.is_match(one)) {
                    return;
                }
                match exclude.iter().find(|(_, glob)| glob.is_match(name)) {
                    Some((rule, _)) => *excluded.entry((*rule).clone()).or_default() += 1,
                    None => {
                        found += 1;
                        names.insert(name.as_os_str().as_bytes().to_vec(), kind);
                    }
                }
            })?;
        }
        if found == 0 {
            selection.warnings.push(format!(
                "{pattern}: no matching files. Ensure that the artifact path is relative to the \
                 working directory ({root})"
            ));
        } else {
            selection.found.push((pattern.clone(), found));
        }
    }
    for name in &wanted.untracked {
        names.insert(name.clone(), Kind::File);
    }
    selection.entries = names.into_iter().map(|(name, kind)| Entry { name, kind }).collect();
    selection.excluded = excluded.into_iter().collect();
    Ok(selection)
}
