//! A job's directory: the names in it, and reading what lies there.
//!
//! Everything the backend knows of a job is in its directory, and the directory's path is derived
//! from the token. Small files are written once, by one writer each:
//!
//! | name | writer | says |
//! | --- | --- | --- |
//! | `alive` | submit | a FIFO; has a reader exactly as long as the supervisor lives |
//! | `script`, `supervise` | submit | what runs |
//! | `log` | submit | both outputs of the job |
//! | `cgroup` | submit | the job's control group, where there is one |
//! | `started` | supervisor | it took the job: pid, start time, boot id; made with `O_EXCL`: run once |
//! | `session` | supervisor | the script's pid, which is its session, and start time |
//! | `timed_out` | supervisor | the time limit was reached |
//! | `exited` | supervisor | the script ended: status, log length, CPU times |
//! | `result` | the job's script | how it ended, see [`bridge_backend::result`] |
//! | `cancelled` | cancel | somebody wants it ended |
//! | `told` | cancel | TERM was sent, at this uptime |

use std::fs::File;
use std::io::{self, Read as _};
use std::time::{Duration, SystemTime};

use bridge_backend::result::{CANCELLED_FILE, JobResult, RESULT_FILE};
use bridge_backend::{BackendError, ErrorKind, Fault, SubmitToken};
use camino::{Utf8Path, Utf8PathBuf};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

/// A status file is a few lines; whoever made it larger made it unreadable.
const SMALL: u64 = 64 * 1024;

/// One job's directory, which may not exist.
#[derive(Clone, Debug)]
pub(crate) struct JobDir(Utf8PathBuf);

/// Whether a supervisor lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Life {
    /// Somebody holds the reading end of the FIFO: the supervisor, or who is about to become it.
    Alive,
    /// Nobody holds it, and nobody ever will.
    Dead,
    /// There is no FIFO, hence never was a supervisor, or no longer is anything.
    Absent,
}

/// The supervisor's word that it took the job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Started {
    /// The supervisor's pid; also the process group of its own helpers.
    pub(crate) pid: i32,
    /// Its start time, in the kernel's ticks since boot.
    pub(crate) start: u64,
    /// The boot it ran in.
    pub(crate) boot: String,
}

/// The supervisor's word on the script's end.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Exited {
    /// The script's status, 128 + n for a signal.
    pub(crate) status: Option<i32>,
    /// Why the script was never started.
    pub(crate) never_ran: Option<String>,
    /// The log's length at the end.
    pub(crate) log_len: Option<u64>,
    /// CPU time of the script and its children.
    pub(crate) cpu: Option<Duration>,
}

impl JobDir {
    /// Names the directory of a token.
    pub(crate) fn new(jobs_dir: &Utf8Path, token: &SubmitToken) -> Self {
        Self(jobs_dir.join(token.as_str()))
    }

    /// Gives the directory's path.
    pub(crate) fn path(&self) -> &Utf8Path {
        &self.0
    }

    pub(crate) fn alive(&self) -> Utf8PathBuf {
        self.0.join("alive")
    }
    pub(crate) fn script(&self) -> Utf8PathBuf {
        self.0.join("script")
    }
    pub(crate) fn supervise(&self) -> Utf8PathBuf {
        self.0.join("supervise")
    }
    pub(crate) fn log(&self) -> Utf8PathBuf {
        self.0.join("log")
    }
    pub(crate) fn cgroup(&self) -> Utf8PathBuf {
        self.0.join("cgroup")
    }
    pub(crate) fn cancelled(&self) -> Utf8PathBuf {
        self.0.join(CANCELLED_FILE)
    }
    pub(crate) fn told(&self) -> Utf8PathBuf {
        self.0.join("told")
    }
    fn started_path(&self) -> Utf8PathBuf {
        self.0.join("started")
    }
    fn exited_path(&self) -> Utf8PathBuf {
        self.0.join("exited")
    }
    fn result_path(&self) -> Utf8PathBuf {
        self.0.join(RESULT_FILE)
    }

    /// Asks whether the supervisor lives: one system call, which cannot be fooled by a pid.
    pub(crate) fn life(&self) -> Result<Life, BackendError> {
        let path = self.alive();
        let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        match rustix::fs::open(path.as_std_path(), flags, Mode::empty()) {
            Ok(_) => Ok(Life::Alive),
            Err(Errno::NXIO) => Ok(Life::Dead),
            Err(Errno::NOENT | Errno::NOTDIR) => Ok(Life::Absent),
            Err(errno) => Err(failed("ask for the life of a job in", &path, errno.into())),
        }
    }

    /// Says whether the supervisor took the job, now or ever.
    pub(crate) fn was_started(&self) -> Result<bool, BackendError> {
        exists(&self.started_path())
    }

    /// Says whether somebody wanted the job ended while it lived.
    pub(crate) fn was_cancelled(&self) -> Result<bool, BackendError> {
        exists(&self.cancelled())
    }

    /// Says whether the time limit was reached.
    pub(crate) fn timed_out(&self) -> Result<bool, BackendError> {
        exists(&self.0.join("timed_out"))
    }

    /// Reads who took the job; `None` when nobody did, or the note is torn.
    pub(crate) fn started(&self) -> Result<Option<Started>, BackendError> {
        let Some(text) = read_small(&self.started_path())? else { return Ok(None) };
        Ok(parse_started(&text))
    }

    /// Reads how the script ended, as the supervisor saw it.
    pub(crate) fn exited(&self) -> Result<Option<Exited>, BackendError> {
        let Some(text) = read_small(&self.exited_path())? else { return Ok(None) };
        Ok(parse_exited(&text))
    }

    /// Reads how the job ended, as its script says: nothing, something, or nonsense.
    pub(crate) fn result(&self) -> Result<Option<Result<JobResult, String>>, BackendError> {
        let Some(text) = read_small(&self.result_path())? else { return Ok(None) };
        Ok(Some(JobResult::parse(&text).map_err(|error| error.to_string())))
    }

    /// Reads the job's control group.
    pub(crate) fn read_cgroup(&self) -> Result<Option<Utf8PathBuf>, BackendError> {
        let text = read_small(&self.cgroup())?;
        Ok(text.and_then(|text| text.strip_suffix('\n').map(Utf8PathBuf::from)))
    }

    /// Reads the uptime at which TERM was sent.
    pub(crate) fn told_at(&self) -> Result<Option<Duration>, BackendError> {
        let text = read_small(&self.told())?;
        Ok(text.as_deref().and_then(|text| text.strip_suffix('\n')).and_then(parse_seconds))
    }

    /// Says when the job started and ended, from the times of the files that say so.
    pub(crate) fn times(&self) -> (Option<SystemTime>, Option<SystemTime>) {
        // Usage is a courtesy: a time that cannot be read is not known.
        let modified = |path: Utf8PathBuf| path.metadata().and_then(|m| m.modified()).ok();
        let ended = modified(self.exited_path()).or_else(|| modified(self.result_path()));
        (modified(self.started_path()), ended)
    }
}

/// Opens a file that the job could have replaced: follows no link, waits for no pipe.
pub(crate) fn open(path: &Utf8Path) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let file = File::from(rustix::fs::open(path.as_std_path(), flags, Mode::empty())?);
    if file.metadata()?.is_file() {
        Ok(file)
    } else {
        Err(io::Error::new(io::ErrorKind::InvalidData, "not a file"))
    }
}

/// Says whether a file exists.
fn exists(path: &Utf8Path) -> Result<bool, BackendError> {
    path.try_exists().map_err(|error| failed("look for", path, error))
}

/// Reads a small file; `None` when there is none.
fn read_small(path: &Utf8Path) -> Result<Option<String>, BackendError> {
    let read = || -> io::Result<String> {
        let mut bytes = Vec::new();
        open(path)?.take(SMALL).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    match read() {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(failed("read", path, error)),
    }
}

fn parse_started(text: &str) -> Option<Started> {
    let mut words = text.strip_suffix('\n')?.split(' ');
    let pid = words.next()?.parse().ok()?;
    let start = words.next()?.parse().ok()?;
    Some(Started { pid, start, boot: words.next()?.to_owned() })
}

/// Reads the supervisor's last note; `None` unless its last line is there.
fn parse_exited(text: &str) -> Option<Exited> {
    let mut exited = Exited::default();
    let (mut times, mut whole) = (Vec::new(), false);
    for line in text.lines() {
        match line.split_once('=') {
            Some(("status", value)) => exited.status = value.parse().ok(),
            Some(("log_len", value)) => exited.log_len = value.trim().parse().ok(),
            Some(("never_ran", value)) => exited.never_ran = Some(value.to_owned()),
            Some(("end", _)) => whole = true,
            Some(_) => {}
            None => times.push(line),
        }
    }
    // The shell's `times`: itself, then its children; "0m0.010000s 0m0.000000s".
    exited.cpu = times.get(1).and_then(|line| {
        line.split(' ').try_fold(Duration::ZERO, |sum, word| {
            let (minutes, seconds) = word.strip_suffix('s')?.split_once('m')?;
            let minutes = Duration::from_secs(minutes.parse::<u64>().ok()?.checked_mul(60)?);
            sum.checked_add(minutes)?.checked_add(parse_seconds(seconds)?)
        })
    });
    whole.then_some(exited)
}

/// Reads "12.34" as a duration.
pub(crate) fn parse_seconds(text: &str) -> Option<Duration> {
    Duration::try_from_secs_f64(text.parse().ok()?).ok()
}

/// Makes the error for a call of the operating system that failed.
pub(crate) fn failed(doing: &str, path: &Utf8Path, error: io::Error) -> BackendError {
    let permanent = matches!(
        error.kind(),
        io::ErrorKind::PermissionDenied
            | io::ErrorKind::ReadOnlyFilesystem
            | io::ErrorKind::NotADirectory
            | io::ErrorKind::NotFound
    );
    // Everything else, full disks and full tables of files among it, may pass.
    let kind = if permanent { ErrorKind::Rejected(Fault::Site) } else { ErrorKind::Transient };
    BackendError::new(kind, format!("{doing} {path}")).with_source(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_supervisors_last_note_is_read() {
        let text = "status=3\nlog_len=252\n0m0.000000s 0m0.010000s\n1m2.5s 0m0.25s\nend=1\n";
        let exited = parse_exited(text).unwrap();
        assert_eq!(exited.status, Some(3));
        assert_eq!(exited.log_len, Some(252));
        assert_eq!(exited.cpu, Some(Duration::from_millis(62_750)));
    }

    #[test]
    fn a_torn_note_is_none() {
        assert_eq!(parse_exited("status=0\n"), None);
        assert_eq!(parse_exited(""), None);
        assert_eq!(parse_started("12 3456"), None);
        assert_eq!(parse_started(""), None);
    }

    #[test]
    fn who_took_the_job_is_read() {
        let started = parse_started("3105 315640 d6f99fd0-f2c5\n").unwrap();
        assert_eq!(started, Started { pid: 3105, start: 315_640, boot: "d6f99fd0-f2c5".into() });
    }
}
