//! Calls Slurm's programs: explicit words, an environment built from nothing, bounded in time and size.

use std::ffi::OsString;
use std::fmt;
use std::process::Stdio;
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::Command;

use crate::config::Config;

/// 20,000 jobs make 2 MB of `squeue`; more than this is not an answer.
const LARGEST_ANSWER: u64 = 64 << 20;

/// What of a program's words goes into an error.
const LONGEST_QUOTE: usize = 400;

/// The last line names the error, the one or two before it often what it is about.
const LAST_LINES: usize = 3;

/// Calls the programs of one Slurm installation.
#[derive(Clone)]
pub(crate) struct Client {
    bin_dir: Option<camino::Utf8PathBuf>,
    env: Vec<(&'static str, OsString)>,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("bin_dir", &self.bin_dir).finish_non_exhaustive()
    }
}

/// What a program answered.
#[derive(Clone, Debug)]
pub(crate) struct Answer {
    pub(crate) program: &'static str,
    /// The exit status; `None` after a signal.
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CallError {
    /// The program could not be started because it is not there or must not be run.
    #[error("{program} is not there or cannot be run")]
    Missing { program: &'static str, source: std::io::Error },
    /// The machine could not start it now.
    #[error("{program} was not started")]
    Start { program: &'static str, source: std::io::Error },
    /// It was stopped by us.
    #[error("{program} did not answer within {} s", limit.as_secs_f32())]
    TimedOut { program: &'static str, limit: Duration },
    /// Its answer could not be read.
    #[error("{program}'s answer could not be read")]
    Read { program: &'static str, source: std::io::Error },
    /// It does not stop talking.
    #[error("{program} answered more than {LARGEST_ANSWER} bytes")]
    Endless { program: &'static str },
}

/// The words of a program that failed.
#[derive(Debug, thiserror::Error)]
#[error("{program} ended with {} and said: {words}", code.map_or("a signal".to_owned(), |c| c.to_string()))]
pub(crate) struct Said {
    program: &'static str,
    code: Option<i32>,
    words: String,
}

impl Answer {
    /// Gives the last lines on stderr, where Slurm puts the cause, as one that fits into an error.
    pub(crate) fn said(&self) -> Said {
        let worthy = |line: &&str| !line.is_empty() && !line.starts_with("Try ");
        let lines: Vec<&str> = self.stderr.lines().map(str::trim).filter(worthy).collect();
        let last = lines.get(lines.len().saturating_sub(LAST_LINES)..).unwrap_or_default();
        let clean = |c: char| if c.is_control() { ' ' } else { c };
        let words: String = last.join("; ").chars().take(LONGEST_QUOTE).map(clean).collect();
        let words = if words.is_empty() { "nothing".to_owned() } else { words };
        Said { program: self.program, code: self.code, words }
    }

    /// Says whether the program was content.
    pub(crate) fn ok(&self) -> bool {
        self.code == Some(0)
    }
}

impl Client {
    /// Takes what the programs need from the configuration and from our own environment.
    pub(crate) fn new(config: &Config) -> Self {
        // SQUEUE_FORMAT, SLURM_CLUSTERS, SBATCH_* and the like silently change answers, and sbatch
        // copies its environment into the job: so nothing is passed on but these.
        let mut env = vec![("LC_ALL", OsString::from("C"))];
        for name in ["PATH", "HOME", "USER", "LOGNAME"] {
            if let Some(value) = std::env::var_os(name) {
                env.push((name, value));
            }
        }
        let conf = config.slurm_conf.as_ref().map(|path| OsString::from(path.as_str()));
        if let Some(conf) = conf.or_else(|| std::env::var_os("SLURM_CONF")) {
            env.push(("SLURM_CONF", conf));
        }
        Self { bin_dir: config.bin_dir.clone(), env }
    }

    /// Runs one program to its end.
    pub(crate) async fn call(
        &self,
        program: &'static str,
        words: &[String],
        input: Option<&str>,
        limit: Duration,
    ) -> Result<Answer, CallError> {
        let begun = Instant::now();
        // Dropping the future at the time limit drops the child, which kills it.
        let answer = tokio::time::timeout(limit, self.run(program, words, input)).await;
        let answer = answer.unwrap_or(Err(CallError::TimedOut { program, limit }));
        tracing::debug!(
            program,
            code = answer.as_ref().ok().and_then(|answer| answer.code),
            elapsed_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX),
            "slurm program called"
        );
        answer
    }

    async fn run(
        &self,
        program: &'static str,
        words: &[String],
        input: Option<&str>,
    ) -> Result<Answer, CallError> {
        let path = match &self.bin_dir {
            Some(dir) => dir.join(program).into_std_path_buf(),
            None => program.into(),
        };
        let mut command = Command::new(path);
        command
            .args(words)
            .env_clear()
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() })
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        if program != "sbatch" {
            // Not for sbatch: what it has, the job gets.
            command.env("SLURM_TIME_FORMAT", "%s");
        }
        let mut child = command.spawn().map_err(|source| {
            use std::io::ErrorKind::{NotFound, PermissionDenied};
            if matches!(source.kind(), NotFound | PermissionDenied) {
                CallError::Missing { program, source }
            } else {
                CallError::Start { program, source }
            }
        })?;
        let stdin = child.stdin.take();
        let feed = async {
            if let (Some(mut stdin), Some(input)) = (stdin, input) {
                // A program that does not want to hear us to the end says why on stderr.
                if let Err(error) = stdin.write_all(input.as_bytes()).await {
                    tracing::debug!(program, %error, "program did not read its input");
                }
            }
        };
        let read = |source| CallError::Read { program, source };
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let ((), stdout, stderr) = tokio::join!(feed, all(stdout), all(stderr));
        let (stdout, stderr) = (stdout.map_err(read)?, stderr.map_err(read)?);
        let (Some(stdout), Some(stderr)) = (stdout, stderr) else {
            return Err(CallError::Endless { program });
        };
        let status = child.wait().await.map_err(read)?;
        Ok(Answer { program, code: status.code(), stdout, stderr })
    }
}

/// Reads everything as text; `None` when it is too much.
async fn all(stream: Option<impl AsyncRead + Unpin>) -> std::io::Result<Option<String>> {
    let Some(stream) = stream else { return Ok(Some(String::new())) };
    let mut bytes = Vec::new();
    let mut stream = stream.take(LARGEST_ANSWER + 1);
    let read = stream.read_to_end(&mut bytes).await?;
    if u64::try_from(read).unwrap_or(u64::MAX) > LARGEST_ANSWER {
        return Ok(None);
    }
    Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
}
