//! Archives of files from a workspace: which files, how they are packed, and how they are put back.
//!
//! [`select`] turns the patterns of a job into a sorted list of names, [`pack`] writes these files as
//! zip, gzip or whatever GitLab asked for, [`unpack`] puts an archive's files below a directory and
//! nowhere else. All of it blocks, streams, and looks at `stop` often: it runs on a thread for blocking
//! work whose future may be dropped at any time.
//!
//! It knows nothing of jobs, of GitLab's calls or of where archives are kept.

mod beneath;
mod blocks;
mod glob;
mod members;
mod out;
mod pack;
mod place;
mod select;
mod tar_in;
mod tar_out;
mod unpack;
mod zip_in;
mod zip_out;

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

pub use pack::{Format, Level, Packed, pack};
pub use select::{Entry, Kind, Selection, UNTRACKED, Wanted, select};
pub use unpack::{Bounds, Unpacked, unpack};

/// Why files could not be chosen, packed or unpacked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ArchiveError {
    /// Whoever asked does not want it any more.
    #[error("the work on an archive was stopped")]
    Stopped,
    /// The file system did not do what it was asked.
    #[error("cannot {action} {path}")]
    Io {
        /// What was tried, as a verb with its object's kind.
        action: &'static str,
        /// With what.
        path: String,
        /// What the system said.
        source: io::Error,
    },
    /// A format that holds files alone was to hold something else.
    #[error("the {name:?} is not a regular file")]
    NotRegular {
        /// Its name, relative to the root.
        name: String,
    },
    /// The raw format is the bytes of one file.
    #[error("only one file can be sent as raw")]
    NotOne,
    /// The archive is larger, or holds more, than it may.
    #[error("the archive exceeds the limit of {limit} {what}")]
    TooMuch {
        /// What is counted.
        what: &'static str,
        /// How much of it is allowed.
        limit: u64,
    },
    /// The archive is of a kind that cannot be unpacked.
    #[error("the archive cannot be unpacked: {detail}")]
    Unsupported {
        /// What it is.
        detail: String,
    },
    /// The archive is broken.
    #[error("the archive is damaged: {detail}")]
    Damaged {
        /// What is wrong with it.
        detail: String,
    },
}

impl ArchiveError {
    fn io(action: &'static str, path: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { action, path, source }
    }
}

/// Ends the work with an error once nobody wants it any more.
fn go_on(stop: &AtomicBool) -> Result<(), ArchiveError> {
    if stop.load(Ordering::Relaxed) { Err(ArchiveError::Stopped) } else { Ok(()) }
}

/// A name as a message shows it.
fn shown(name: &[u8]) -> String {
    String::from_utf8_lossy(name).into_owned()
}

#[cfg(test)]
mod select_tests;
#[cfg(test)]
mod tests;
