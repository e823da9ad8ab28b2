//! The job's directory on the shared file system: the only place that knows its file names.
//!
//! | file | written by | says |
//! | --- | --- | --- |
//! | `script`, `env` | submit | what to run, with what; `env` holds secrets and goes when the job is over |
//! | `log` | Slurm | both outputs |
//! | `run/` | wrapper | the run-once guard |
//! | `started` | wrapper | which Slurm job started, where |
//! | `refused` | wrapper | ids of Slurm jobs that came second |
//! | `result` | the job's script, else the wrapper | how it ended |
//! | `cancelled` | cancel | we asked for the end |
//! | `sealed` | poll | the log's length, when the job was called ended before Slurm's last word |
//! | `look` | poll | since when a result is missed |
//!
//! A job is **over** when poll said that it ended; from then on nothing can follow in its log. The
//! mark of that is that `env` is gone: removing a file works where a full quota forbids making one.
//!
//! All of this blocks, and on a network file system for long: call it through [`blocking`].

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::sync::Weak;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bridge_backend::SubmitToken;
use bridge_backend::result::{CANCELLED_FILE, JobResult, RESULT_FILE};
use camino::{Utf8Path, Utf8PathBuf};
use rustix::fs::{Mode, OFlags};

/// The file in `jobs_dir` by which it is known to be the directory that submissions used.
const MARK: &str = ".bridge-jobs";

/// A marker or result file is some lines long.
const LARGEST_NOTE: u64 = 64 << 10;

/// A job's directory.
#[derive(Clone, Debug)]
pub(crate) struct JobDir(Utf8PathBuf);

/// What the directory's files say, read at one time.
#[derive(Clone, Debug, Default)]
pub(crate) struct Notes {
    /// The directory is there.
    pub(crate) exists: bool,
    /// The Slurm job that started the script.
    pub(crate) started: Option<u64>,
    /// The Slurm jobs that were kept from starting it again.
    pub(crate) refused: Vec<u64>,
    /// The job's own word on its end.
    pub(crate) result: Option<JobResult>,
    /// We asked for the end.
    pub(crate) cancelled: bool,
    /// Poll said before that it is over.
    pub(crate) over: bool,
}

/// An operation on the job directory that failed.
#[derive(Debug, thiserror::Error)]
#[error("{verb} {path}")]
pub(crate) struct FileError {
    verb: &'static str,
    path: Utf8PathBuf,
    pub(crate) source: io::Error,
}

/// What became of the attempt to make a directory for a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Prepared {
    /// It is new.
    New,
    /// An earlier attempt left it, and its files were written again.
    Again,
    /// An earlier attempt's job runs or ran already, under this id if it says so.
    Started(Option<u64>),
}

/// A piece of the log.
#[derive(Debug)]
pub(crate) struct Piece {
    pub(crate) bytes: Vec<u8>,
    pub(crate) end: bool,
}

/// Does blocking work off the async threads.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, tokio::task::JoinError> {
    tokio::task::spawn_blocking(work).await
}

fn failed<'a>(verb: &'static str, path: &'a Utf8Path) -> impl FnOnce(io::Error) -> FileError + 'a {
    move |source| FileError { verb, path: path.to_owned(), source }
}

/// Makes `missing` an answer instead of an error.
fn unless_missing<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

impl JobDir {
    /// Names the directory of a job; a token has no slashes or dots, so it lies in `jobs_dir`.
    pub(crate) fn of(jobs_dir: &Utf8Path, token: &SubmitToken) -> Self {
        Self(jobs_dir.join(token.as_str()))
    }

    pub(crate) fn path(&self) -> &Utf8Path {
        &self.0
    }

    /// Gives the path of the log, for `sbatch --output`.
    pub(crate) fn log(&self) -> Utf8PathBuf {
        self.0.join("log")
    }

    /// Makes the directory and what the job needs in it, unless nobody wants that any more.
    pub(crate) fn prepare(
        &self,
        script: &str,
        env: &str,
        wanted: &Weak<()>,
    ) -> Result<Prepared, FileError> {
        let new = match fs::DirBuilder::new().mode(0o700).create(&self.0) {
            Ok(()) => true,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => false,
            Err(error) => return Err(failed("make", &self.0)(error)),
        };
        if !new {
            self.must_be_ours()?;
            if self.has("run")? {
                return Ok(Prepared::Started(self.started()?));
            }
        }
        let written = self.write("script", script.as_bytes()).and_then(|()| {
            // Blocking work goes on when its future was dropped, and `env` is also the mark that a
            // job is not over: it must not come back after a later attempt's job has ended.
            if wanted.strong_count() == 0 {
                let dropped = io::Error::from(io::ErrorKind::Interrupted);
                return Err(failed("prepare", &self.0)(dropped));
            }
            self.write("env", env.as_bytes())
        });
        if written.is_err() && new && wanted.strong_count() > 0 {
            // Half a directory, perhaps with secrets, is nobody's. That it could not be cleared away
            // adds nothing to the error that is reported.
            if let Err(error) = self.remove() {
                tracing::warn!(path = %self.0, %error, "half a job directory stays");
            }
        }
        written?;
        Ok(if new { Prepared::New } else { Prepared::Again })
    }

    /// Says whether the directory is there; an error when the whole file system is not.
    fn exists(&self) -> Result<bool, FileError> {
        let meta = fs::symlink_metadata(&self.0);
        if unless_missing(meta).map_err(failed("look at", &self.0))?.is_some() {
            return Ok(true);
        }
        // An empty mount point would make every job look as if it had left nothing.
        let mark = self.0.with_file_name(MARK);
        fs::symlink_metadata(&mark).map_err(failed("find", &mark))?;
        Ok(false)
    }

    /// Reads everything the job's files say.
    pub(crate) fn notes(&self) -> Result<Notes, FileError> {
        if !self.exists()? {
            return Ok(Notes::default());
        }
        let result = match self.note(RESULT_FILE)?.map(|text| JobResult::parse(&text)) {
            Some(Ok(result)) => Some(result),
            Some(Err(error)) => {
                // Renamed into place complete, so this is a strange script's work, not half a file.
                tracing::warn!(path = %self.0, %error, "result file makes no sense");
                None
            }
            None => None,
        };
        let refused = self.note("refused")?.unwrap_or_default();
        Ok(Notes {
            exists: true,
            started: self.started()?,
            refused: refused.lines().filter_map(|line| line.trim().parse().ok()).collect(),
            result,
            cancelled: self.has(CANCELLED_FILE)?,
            over: !self.has("env")?,
        })
    }

    /// Gives the Slurm job that started the script.
    pub(crate) fn started(&self) -> Result<Option<u64>, FileError> {
        let text = self.note("started")?;
        Ok(text.and_then(|text| {
            text.lines().find_map(|line| line.strip_prefix("job=")?.trim().parse().ok())
        }))
    }

    /// Says for how long a result has been missed; the first call says zero.
    ///
    /// Both times come from the file server, so no clock of ours is compared with another one. Making
    /// the file also has a network file system look at the directory anew, which otherwise may
    /// believe for a minute that a file which was not there still is not.
    pub(crate) fn missed_for(&self) -> Result<Duration, FileError> {
        let (look, now) = (self.0.join("look"), self.0.join(".look"));
        let time = |path: &Utf8Path| fs::metadata(path).and_then(|m| m.modified());
        let Some(first) = unless_missing(time(&look)).map_err(failed("look at", &look))? else {
            self.write("look", b"")?;
            return Ok(Duration::ZERO);
        };
        self.open_new(&now).map_err(failed("write", &now))?;
        let second = time(&now).map_err(failed("look at", &now))?;
        fs::remove_file(&now).map_err(failed("remove", &now))?;
        Ok(second.duration_since(first).unwrap_or_default())
    }

    /// Notes that the job is over. `log_so_far` fixes the log at its present length, because Slurm may
    /// still add to it.
    pub(crate) fn seal(&self, log_so_far: bool) -> Result<(), FileError> {
        let env = self.0.join("env");
        if unless_missing(fs::symlink_metadata(&env)).map_err(failed("look at", &env))?.is_none() {
            return Ok(());
        }
        if log_so_far {
            let log = self.log();
            let length = unless_missing(fs::metadata(&log)).map_err(failed("look at", &log))?;
            let length = length.map_or(0, |m| m.len());
            self.write("sealed", format!("{length}\n").as_bytes())?;
        }
        unless_missing(fs::remove_file(&env)).map_err(failed("remove", &env))?;
        Ok(())
    }

    /// Says whether the log was fixed before Slurm's last word: something may still be queued there.
    pub(crate) fn sealed_early(&self) -> Result<bool, FileError> {
        self.has("sealed")
    }

    /// Leaves the mark that we want the job to end.
    pub(crate) fn mark_cancelled(&self) -> Result<(), FileError> {
        if !self.exists()? || self.has(CANCELLED_FILE)? {
            return Ok(());
        }
        self.write(CANCELLED_FILE, b"")
    }

    /// Reads the log from `from`; `None` when the directory is gone.
    pub(crate) fn read_log(&self, from: u64, limit: usize) -> Result<Option<Piece>, FileError> {
        if !self.exists()? {
            return Ok(None);
        }
        // In this order: what is over before the log is read cannot grow after it.
        let over = !self.has("env")?;
        let sealed = self.note("sealed")?.and_then(|text| text.trim().parse::<u64>().ok());
        let path = self.log();
        let Some(file) = unless_missing(open(&path)).map_err(failed("open", &path))? else {
            // Slurm makes no log for a job that never started.
            return Ok(Some(Piece { bytes: Vec::new(), end: over }));
        };
        // Opening asks the file server for the true length; an earlier answer may be stale.
        let length = file.metadata().map_err(failed("look at", &path))?.len();
        let length = sealed.map_or(length, |sealed| length.min(sealed));
        let left = usize::try_from(length.saturating_sub(from)).unwrap_or(usize::MAX);
        let mut bytes = vec![0; left.min(limit)];
        let mut filled = 0;
        while filled < bytes.len() {
            let at = from + u64::try_from(filled).unwrap_or(u64::MAX);
            let free = bytes.get_mut(filled..).unwrap_or_default();
            match file.read_at(free, at) {
                Ok(0) => break,
                Ok(n) => filled += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(failed("read", &path)(error)),
            }
        }
        let whole = filled == left;
        bytes.truncate(filled);
        Ok(Some(Piece { bytes, end: over && whole }))
    }

    /// Removes the directory; fine when it is gone.
    pub(crate) fn remove(&self) -> Result<(), FileError> {
        if !self.exists()? {
            return Ok(());
        }
        self.must_be_ours()?;
        // The secrets first, should the rest take several attempts.
        let env = self.0.join("env");
        unless_missing(fs::remove_file(&env)).map_err(failed("remove", &env))?;
        unless_missing(fs::remove_dir_all(&self.0)).map_err(failed("remove", &self.0))?;
        Ok(())
    }

    /// Refuses anything but a directory of our own user; a link could lead anywhere.
    fn must_be_ours(&self) -> Result<(), FileError> {
        let meta = fs::symlink_metadata(&self.0).map_err(failed("look at", &self.0))?;
        if meta.is_dir() && meta.uid() == rustix::process::geteuid().as_raw() {
            return Ok(());
        }
        let cause = "not a directory of our own";
        Err(failed("use", &self.0)(io::Error::new(io::ErrorKind::PermissionDenied, cause)))
    }

    fn has(&self, name: &str) -> Result<bool, FileError> {
        let path = self.0.join(name);
        let meta = unless_missing(fs::symlink_metadata(&path)).map_err(failed("look at", &path))?;
        Ok(meta.is_some())
    }

    fn note(&self, name: &str) -> Result<Option<String>, FileError> {
        let path = self.0.join(name);
        let Some(file) = unless_missing(open(&path)).map_err(failed("open", &path))? else {
            return Ok(None);
        };
        let mut bytes = Vec::new();
        file.take(LARGEST_NOTE).read_to_end(&mut bytes).map_err(failed("read", &path))?;
        Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
    }

    /// Writes aside and renames, so that a job that starts meanwhile sees the old or the new file.
    fn write(&self, name: &str, bytes: &[u8]) -> Result<(), FileError> {
        // A name of its own for every call: an attempt that was dropped may still be writing.
        static CALLS: AtomicU64 = AtomicU64::new(0);
        let call = CALLS.fetch_add(1, Ordering::Relaxed);
        let aside = self.0.join(format!(".{name}.{}.{call}", std::process::id()));
        let path = self.0.join(name);
        let written = self.open_new(&aside).and_then(|mut file| {
            file.write_all(bytes)?;
            // A full disk shows itself here at the latest, not when the job reads.
            file.sync_all()
        });
        written.map_err(failed("write", &aside))?;
        fs::rename(&aside, &path).map_err(failed("write", &path))
    }

    fn open_new(&self, path: &Utf8Path) -> io::Result<fs::File> {
        unless_missing(fs::remove_file(path))?;
        fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)
    }
}

/// Opens a file that the job could have replaced: follows no link, waits for no pipe.
fn open(path: &Utf8Path) -> io::Result<fs::File> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let file = fs::File::from(rustix::fs::open(path.as_std_path(), flags, Mode::empty())?);
    if file.metadata()?.is_file() {
        Ok(file)
    } else {
        Err(io::Error::new(io::ErrorKind::InvalidData, "not a file"))
    }
}

/// Makes `jobs_dir` if only its last part is missing, marks it as ours, and says what is wrong with it.
pub(crate) fn check_jobs_dir(path: &Utf8Path) -> Result<(), FileError> {
    match fs::DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(failed("make", path)(error)),
    }
    let meta = fs::metadata(path).map_err(failed("look at", path))?;
    let refuse = |cause: &'static str| {
        failed("use", path)(io::Error::new(io::ErrorKind::PermissionDenied, cause))
    };
    if !meta.is_dir() {
        return Err(refuse("not a directory"));
    }
    if meta.uid() != rustix::process::geteuid().as_raw() {
        return Err(refuse("owned by another user"));
    }
    // Who can write here can put his own job directory where ours should be.
    if meta.mode() & 0o022 != 0 {
        return Err(refuse("writable by other users; chmod go-w it"));
    }
    let access = rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK;
    rustix::fs::access(path.as_std_path(), access)
        .map_err(|errno| failed("write into", path)(errno.into()))?;
    let mark = path.join(MARK);
    match fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&mark) {
        Ok(_new) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(failed("write", &mark)(error)),
    }
}
