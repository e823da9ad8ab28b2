//! Making a job's directory and starting its supervisor.
//!
//! The order is what makes a crash harmless. The directory comes first, then the FIFO, whose reading
//! end we hold from then on, then the supervisor, which inherits it. So a job that might run has a
//! reader at every moment, also between our death and the supervisor's first line; and where there is
//! no reader and no `started`, nothing runs and nothing ever will.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::process::Stdio;

use bridge_backend::{BackendError, ErrorKind, Fault, JobSpec, Result};
use camino::{Utf8Path, Utf8PathBuf};
use rustix::fs::{CWD, FileType, Mode, OFlags};
use tokio::process::Command;

use crate::cgroup;
use crate::dir::{JobDir, Life, failed};
use crate::environment;

/// What runs a job.
const SUPERVISE: &str = include_str!("supervise.sh");

/// The shell for the supervisor and the script.
pub(crate) const SHELL: &str = "/bin/sh";

/// What every submission needs to know.
#[derive(Clone, Debug)]
pub(crate) struct Setup {
    pub(crate) jobs_dir: Utf8PathBuf,
    pub(crate) kill_grace: std::time::Duration,
    /// The group under which jobs' groups are made.
    pub(crate) cgroup: Option<Utf8PathBuf>,
    pub(crate) setsid: Option<Utf8PathBuf>,
    pub(crate) sleep: Option<Utf8PathBuf>,
}

/// Looks for a program where the system keeps its own, whatever `PATH` says.
pub(crate) fn system_program(name: &str) -> Option<Utf8PathBuf> {
    ["/usr/bin", "/bin", "/usr/local/bin", "/run/current-system/sw/bin"]
        .into_iter()
        .map(|dir| Utf8Path::new(dir).join(name))
        .find(|path| path.is_file())
}

/// Makes the error for a program that the machine lacks.
pub(crate) fn missing(name: &str) -> BackendError {
    BackendError::new(
        ErrorKind::Rejected(Fault::Site),
        format!("run jobs without the program {name:?}, which is not installed"),
    )
}

/// Submits a job, unless this very submission has been made before.
///
/// There is no await in here: it happens whole, or is found in any state by [`JobDir`].
pub(crate) fn submit(setup: &Setup, dir: &JobDir, spec: &JobSpec) -> Result<()> {
    if let Some(key) = spec.options.keys().next() {
        return Err(BackendError::new(
            ErrorKind::Rejected(Fault::Job),
            format!("use the option {key:?}: local jobs have no options"),
        ));
    }
    let env = environment::build(spec, dir)?;
    let setsid = setup.setsid.as_deref().ok_or_else(|| missing("setsid"))?;
    let sleep = setup.sleep.as_deref().ok_or_else(|| missing("sleep"))?;

    make_private(&setup.jobs_dir)?;
    if !claim(dir)? {
        return Ok(());
    }
    let made = fill(setup, dir, spec).and_then(|(life, log, group)| {
        let mut command = Command::new(SHELL);
        command
            .arg(dir.supervise())
            .arg(dir.path())
            .arg(&spec.workspace)
            .arg(spec.limits.wall_time.map(whole_seconds).unwrap_or_default())
            .arg(whole_seconds(setup.kill_grace))
            .arg(setsid)
            .arg(sleep)
            .arg(group.as_deref().unwrap_or(Utf8Path::new("")))
            .arg(printable(&spec.label))
            .env_clear()
            .envs(env)
            // Where we stand may be unmounted or removed while the job runs.
            .current_dir("/")
            .stdin(Stdio::from(life))
            .stdout(Stdio::from(log.try_clone().map_err(|e| failed("open", &dir.log(), e))?))
            .stderr(Stdio::from(log))
            // Signals meant for us, from a terminal or a service manager, are not the job's.
            .process_group(0)
            .kill_on_drop(false);
        spawn(command, dir)
    });
    if made.is_err() {
        // Best effort: `find` and the next `submit` read an unstarted directory as no job.
        if let Err(error) = remove(dir) {
            tracing::warn!(error = %error, path = %dir.path(), "left a directory of no job behind");
        }
    }
    made
}

/// Starts the supervisor. The command is dropped in here, and with it our end of the FIFO.
fn spawn(mut command: Command, dir: &JobDir) -> Result<()> {
    let spawned = command.spawn();
    drop(command);
    match spawned {
        // Dropping the handle neither kills nor forgets: the runtime reaps it when it ends.
        Ok(child) => {
            drop(child);
            Ok(())
        }
        Err(error) => {
            // Whether there is a process is a question of fact, not of the error.
            match (dir.life(), dir.was_started()) {
                (Ok(Life::Alive), _) | (_, Ok(true)) => Ok(()),
                (Ok(Life::Dead | Life::Absent), Ok(false)) => Err(cannot_start(error)),
                (Err(_), _) | (_, Err(_)) => {
                    Err(BackendError::new(ErrorKind::Ambiguous, "start the job's supervisor")
                        .with_source(error))
                }
            }
        }
    }
}

fn cannot_start(error: io::Error) -> BackendError {
    if error.kind() == io::ErrorKind::ArgumentListTooLong {
        return BackendError::new(
            ErrorKind::Rejected(Fault::Job),
            "start the job: its environment is larger than the kernel passes to a program",
        )
        .with_source(error);
    }
    failed("start", Utf8Path::new(SHELL), error)
}

/// Makes the job's directory; says no when this job was submitted before.
fn claim(dir: &JobDir) -> Result<bool> {
    let make = || DirBuilder::new().mode(0o700).create(dir.path());
    match make() {
        Ok(()) => return Ok(true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(failed("make", dir.path(), error)),
    }
    // Life first: what is dead now and has not started never will (crash points C and D).
    if dir.life()? == Life::Alive || dir.was_started()? {
        return Ok(false);
    }
    remove(dir)?;
    make().map_err(|error| failed("make", dir.path(), error))?;
    Ok(true)
}

/// Puts everything into the directory; gives the FIFO's reading end, the log and the group.
fn fill(
    setup: &Setup,
    dir: &JobDir,
    spec: &JobSpec,
) -> Result<(std::os::fd::OwnedFd, File, Option<Utf8PathBuf>)> {
    write_new(&dir.script(), spec.script.as_bytes())?;
    write_new(&dir.supervise(), SUPERVISE.as_bytes())?;
    let log = new_file().append(true).open(dir.log());
    let log = log.map_err(|error| failed("make", &dir.log(), error))?;
    let group = setup.cgroup.as_deref().and_then(|parent| cgroup::make(parent, dir));
    if let Some(group) = &group {
        write_new(&dir.cgroup(), format!("{group}\n").as_bytes())?;
    }
    let life = make_fifo(&dir.alive())?;
    Ok((life, log, group))
}

/// Makes a FIFO and opens its reading end.
pub(crate) fn make_fifo(path: &Utf8Path) -> Result<std::os::fd::OwnedFd> {
    let (mode, read) = (Mode::RUSR | Mode::WUSR, OFlags::RDONLY | OFlags::NONBLOCK);
    rustix::fs::mknodat(CWD, path.as_std_path(), FileType::Fifo, mode, 0)
        .and_then(|()| rustix::fs::open(path.as_std_path(), read | OFlags::CLOEXEC, Mode::empty()))
        .map_err(|errno| failed("make", path, errno.into()))
}

/// Removes the directory of a job that does not live, and its control group.
pub(crate) fn remove(dir: &JobDir) -> Result<()> {
    if let Some(group) = dir.read_cgroup()? {
        cgroup::remove(&group)?;
    }
    match fs::remove_dir_all(dir.path()) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(failed("remove", dir.path(), error)),
    }
}

/// Makes a directory that only we may enter, and its parents.
pub(crate) fn make_private(path: &Utf8Path) -> Result<()> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.map_err(|error| failed("make", path, error))
}

fn new_file() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true).mode(0o600);
    options
}

/// Writes a new file that only we may read.
fn write_new(path: &Utf8Path, bytes: &[u8]) -> Result<()> {
    new_file()
        .open(path)
        .and_then(|mut file| file.write_all(bytes))
        .map_err(|error| failed("write", path, error))
}

/// Gives whole seconds, never fewer than asked for, and at least one.
fn whole_seconds(time: std::time::Duration) -> String {
    let seconds = time.as_secs().saturating_add(u64::from(time.subsec_nanos() > 0));
    seconds.max(1).to_string()
}

/// Makes a label fit for a process listing.
fn printable(label: &str) -> String {
    label.chars().map(|c| if c.is_control() { ' ' } else { c }).take(100).collect()
}
