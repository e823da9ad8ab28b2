//! The one way in which the configuration's files are replaced: whole, or not at all.

use std::fs::{self, File, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};

use camino::Utf8Path;

/// Mode, user and group of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// The permission bits.
    pub mode: u32,
    /// The user.
    pub user: u32,
    /// The group.
    pub group: u32,
}

impl Owner {
    /// Gives those of a file.
    ///
    /// # Errors
    ///
    /// When it is not there, or cannot be asked.
    pub fn of(path: &Utf8Path) -> io::Result<Self> {
        let meta = fs::metadata(path)?;
        let mode = meta.permissions().mode() & 0o7777;
        Ok(Self { mode, user: meta.uid(), group: meta.gid() })
    }

    /// For the same owner, and for nobody else.
    #[must_use]
    pub fn private(self) -> Self {
        Self { mode: 0o600, ..self }
    }
}

/// Replaces a file by way of a temporary one beside it; mode 0600 unless `owner` says otherwise.
///
/// # Errors
///
/// When it cannot be written; the file is then as it was.
pub fn replace(path: &Utf8Path, bytes: &[u8], owner: Option<Owner>) -> io::Result<()> {
    let dir = directory(path);
    let mut file = tempfile::Builder::new().prefix(".bridge-").tempfile_in(dir)?;
    file.write_all(bytes)?;
    if let Some(owner) = owner {
        let meta = file.as_file().metadata()?;
        if (meta.uid(), meta.gid()) != (owner.user, owner.group) {
            std::os::unix::fs::fchown(file.as_file(), Some(owner.user), Some(owner.group))?;
        }
        file.as_file().set_permissions(Permissions::from_mode(owner.mode))?;
    }
    file.as_file().sync_all()?;
    file.persist(path)?;
    sync_directory(path)
}

/// Makes what was made, renamed or removed in a file's directory outlive a power cut: GitLab gives a
/// token once.
///
/// # Errors
///
/// When the directory cannot be opened or synced.
pub fn sync_directory(path: &Utf8Path) -> io::Result<()> {
    File::open(directory(path))?.sync_all()
}

fn directory(path: &Utf8Path) -> &Utf8Path {
    path.parent().unwrap_or(Utf8Path::new("/"))
}
