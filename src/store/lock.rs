//! One daemon per state directory, on a disk that SQLite can trust.

use std::fs::{File, TryLockError};
use std::io::{Read as _, Seek as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;

use camino::{Utf8Path, Utf8PathBuf};

/// The lock on a state directory, held until it is dropped or the process ends.
#[derive(Debug)]
pub struct Lock {
    #[expect(dead_code, reason = "the lock lives as long as the open file")]
    file: File,
}

/// Why a state directory cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another daemon has it.
    #[error("use the state directory {path}: another bridge (process {pid}) is running on it")]
    Held {
        /// The directory.
        path: Utf8PathBuf,
        /// What the other one wrote into the lock file.
        pid: String,
    },
    /// It lies on a network file system.
    #[error("use the state directory {path}: it is on {kind}, and the database needs a local disk")]
    Network {
        /// The directory.
        path: Utf8PathBuf,
        /// The file system's name.
        kind: &'static str,
    },
    /// The directory or its lock file is unusable.
    #[error("lock the state directory {path}")]
    Io {
        /// The directory.
        path: Utf8PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// Names the network file systems on which WAL's shared memory does not work, by `statfs` type
/// (`linux/magic.h` and the file systems' own headers).
pub(in crate::store) fn network_file_system(magic: i64) -> Option<&'static str> {
    match magic & 0xffff_ffff {
        0x6969 => Some("NFS"),
        0x0bd0_0bd0 => Some("Lustre"),
        0x4750_4653 => Some("GPFS"),
        0xff53_4d42 | 0xfe53_4d42 | 0x517b => Some("SMB"),
        0x00c3_6400 => Some("CephFS"),
        0x1983_0326 => Some("BeeGFS"),
        0x5346_414f | 0x6b41_4653 => Some("AFS"),
        0x7375_7245 => Some("Coda"),
        0x2003_0528 => Some("OrangeFS"),
        0xaad7_aaea => Some("PanFS"),
        0x0116_1970 => Some("GFS2"),
        0x7461_636f => Some("OCFS2"),
        0x6573_5546 => Some("a FUSE file system"),
        _ => None,
    }
}

/// Tells on which file system a path lies, if it is a network one.
///
/// # Errors
///
/// When the path cannot be asked.
pub fn network_file_system_of(path: &Utf8Path) -> std::io::Result<Option<&'static str>> {
    let stat = rustix::fs::statfs(path.as_std_path())?;
    Ok(network_file_system(stat.f_type))
}

impl Lock {
    /// Takes the lock, after making sure that the directory exists and is on a local disk.
    ///
    /// # Errors
    ///
    /// When another daemon has it, it is on a network file system, or it cannot be written.
    pub fn acquire(state_dir: &Utf8Path) -> Result<Self, LockError> {
        let io = |source| LockError::Io { path: state_dir.to_owned(), source };
        super::open::make_private_dir(state_dir).map_err(io)?;
        if let Some(kind) = network_file_system_of(state_dir).map_err(io)? {
            return Err(LockError::Network { path: state_dir.to_owned(), kind });
        }
        let mut file = File::options()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .mode(0o600)
            .open(state_dir.join("bridge.lock"))
            .map_err(io)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut pid = String::new();
                file.read_to_string(&mut pid).map_err(io)?;
                let pid = if pid.trim().is_empty() { "unknown".into() } else { pid.trim().into() };
                return Err(LockError::Held { path: state_dir.to_owned(), pid });
            }
            Err(TryLockError::Error(source)) => return Err(io(source)),
        }
        // Only a courtesy to whoever is refused: a full disk must not keep the daemon from starting.
        let noted = file
            .set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| writeln!(file, "{}", std::process::id()));
        if let Err(error) = noted {
            tracing::warn!(path = %state_dir, error = %error, "the lock file does not name us");
        }
        Ok(Self { file })
    }

    /// Tells whether a daemon holds the lock now.
    pub fn is_held(state_dir: &Utf8Path) -> bool {
        let Ok(file) = File::open(state_dir.join("bridge.lock")) else { return false };
        matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_daemon_is_refused_and_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = Utf8Path::from_path(dir.path()).unwrap();
        let first = Lock::acquire(path).unwrap();
        let error = Lock::acquire(path).unwrap_err();
        assert!(error.to_string().contains(&std::process::id().to_string()), "{error}");
        assert!(Lock::is_held(path));
        drop(first);
        assert!(!Lock::is_held(path));
        Lock::acquire(path).unwrap();
    }

    #[test]
    fn network_file_systems_are_known_by_their_numbers() {
        assert_eq!(network_file_system(0x6969), Some("NFS"));
        assert_eq!(network_file_system(0x0bd0_0bd0), Some("Lustre"));
        assert_eq!(network_file_system(0x4750_4653), Some("GPFS"));
        // The SMB2 number is negative where the field is a 32-bit one.
        assert_eq!(network_file_system(i64::from(-0x01ac_b2be_i32)), Some("SMB"));
        for local in [0xef53, 0x5846_5342, 0x9123_683e, 0x0102_1994, 0x2fc1_2fc1, 0x794c_7630] {
            assert_eq!(network_file_system(local), None, "{local:x}");
        }
    }
}
