//! Reading a job's log by offset.

use std::io;
use std::os::unix::fs::FileExt as _;

use bridge_backend::{BackendError, ErrorKind, LogChunk, Result};
use bytes::Bytes;

use crate::dir::{JobDir, failed, open};
use crate::status::{Look, State};

/// Reads at most `limit` bytes from byte `from`.
pub(crate) fn read(look: &Look, dir: &JobDir, from: u64, limit: usize) -> Result<LogChunk> {
    // The state first: what an ended job has not written by now it never will.
    let (over, noted) = match look.state(dir)? {
        State::Absent => {
            let what = format!("read the log of a job that is gone: {}", dir.path());
            return Err(BackendError::new(ErrorKind::Lost, what));
        }
        State::Running => (false, None),
        State::NeverStarted => (true, None),
        State::Ended(ended) => (true, ended.log_len),
    };
    let path = dir.log();
    let file = match open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Ok(LogChunk { bytes: Bytes::new(), end: over });
        }
        Err(error) => return Err(failed("open", &path, error)),
    };
    let size = file.metadata().map_err(|error| failed("look at", &path, error))?.len();
    // A process that outlived its job may write on; the log ended where the job did.
    let len = noted.map_or(size, |noted| noted.min(size));
    let wanted = usize::try_from(len.saturating_sub(from)).unwrap_or(usize::MAX).min(limit);
    let mut bytes = vec![0; wanted];
    let mut got = 0;
    while got < wanted {
        let (Some(rest), Ok(done)) = (bytes.get_mut(got..), u64::try_from(got)) else { break };
        match file.read_at(rest, from.saturating_add(done)) {
            Ok(0) => break,
            Ok(more) => got += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(failed("read", &path, error)),
        }
    }
    bytes.truncate(got);
    let reached = u64::try_from(got).ok().and_then(|got| from.checked_add(got));
    Ok(LogChunk { bytes: bytes.into(), end: over && reached.is_none_or(|reached| reached >= len) })
}
