//! Ending jobs, and cleaning up after them.

use std::fs::{self, OpenOptions};
use std::io;
use std::time::Duration;

use bridge_backend::{BackendError, ErrorKind, Result};
use camino::Utf8Path;

use crate::cgroup;
use crate::dir::{JobDir, Life, failed};
use crate::procs;
use crate::status::{Look, State};
use crate::submit;

/// Takes the next step in ending a job: mark, TERM, and KILL once the grace is over.
///
/// Called until the end is observed. How far we are is in the directory: the mark lets a supervisor
/// that has not come so far refuse to start the script, and the note of the TERM holds its time, in
/// uptime, which no change of the clock touches.
pub(crate) fn cancel(look: &Look, dir: &JobDir, grace: Duration) -> Result<()> {
    match look.state(dir)? {
        State::Absent | State::NeverStarted | State::Ended(_) => return Ok(()),
        State::Running => {}
    }
    if !write(&dir.cancelled(), "")? {
        return Ok(());
    }
    let started = dir.started()?;
    let now = procs::uptime()
        .ok_or_else(|| BackendError::new(ErrorKind::Transient, "read the machine's uptime"))?;
    let Some(told) = dir.told_at()? else {
        // Nobody heard it: the script is about to start, and the next call finds it.
        if procs::terminate(dir, started.as_ref()) {
            write(&dir.told(), &format!("{}.{:03}\n", now.as_secs(), now.subsec_millis()))?;
        }
        return Ok(());
    };
    let waited = now.saturating_sub(told);
    if waited < grace {
        return Ok(());
    }
    if let Some(group) = dir.read_cgroup()? {
        cgroup::kill(&group);
    }
    let nobody_left = procs::kill(dir, started.as_ref());
    // With its script gone a supervisor ends by itself, unless it was stopped or hangs.
    if nobody_left
        && waited > grace.saturating_mul(2)
        && let Some(started) = started
        && procs::kill_one(started.pid, started.start)
    {
        tracing::warn!(path = %dir.path(), "killed a supervisor that did not end");
    }
    Ok(())
}

/// Removes what is left of an ended job, processes first.
pub(crate) fn release(look: &Look, dir: &JobDir) -> Result<()> {
    match look.state(dir)? {
        State::Running => {
            return Err(BackendError::new(
                ErrorKind::Transient,
                format!("remove {} while the job runs", dir.path()),
            ));
        }
        State::Absent if is_missing(dir.path())? => return Ok(()),
        State::Absent | State::NeverStarted | State::Ended(_) => {}
    }
    if dir.life()? != Life::Absent {
        let started = dir.started()?;
        let group = dir.read_cgroup()?;
        let left = match &group {
            // Nothing leaves a control group, so an empty one needs no walk through /proc, which
            // costs with every process of the machine.
            Some(group) => {
                cgroup::kill(group);
                cgroup::is_populated(group)
            }
            None => !procs::kill(dir, started.as_ref()),
        };
        if left {
            return Err(BackendError::new(
                ErrorKind::Transient,
                format!("remove {} while processes of the job are dying", dir.path()),
            ));
        }
    }
    submit::remove(dir)
}

/// Says whether there is nothing under a path; not even a link that leads nowhere.
fn is_missing(path: &Utf8Path) -> Result<bool> {
    match fs::symlink_metadata(path) {
        Ok(_) => Ok(false),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(true),
        Err(error) => Err(failed("look for", path, error)),
    }
}

/// Writes a small file; says no when its directory is gone.
fn write(path: &Utf8Path, text: &str) -> Result<bool> {
    let mut options = OpenOptions::new();
    options.create(true).truncate(true).write(true);
    let written = options.open(path).and_then(|mut file| {
        use io::Write as _;
        file.write_all(text.as_bytes())
    });
    match written {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(failed("write", path, error)),
    }
}
