//! Processes on the submit node: what they see, what they may say, and that none outlives its call.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use camino::Utf8PathBuf;
use rustix::process::{Pid, Signal};
use tokio::io::AsyncReadExt as _;
use tokio::net::unix::pipe;

use super::HandsError;
use crate::gitlab::wire::Secret;
use crate::job::sources::{Output, Tone};

/// The most one process may put into a trace. Git says little; a megabyte is a runaway.
const LOUDEST: usize = 1024 * 1024;

/// How long the rest of a process's output is waited for once the process has ended: its group was
/// killed by then, so only a process that left the group can keep the pipe open.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// What of the daemon's own environment a process on the submit node sees: where programs are, and how
/// the site reaches the network.
const INHERITED: [&str; 14] = [
    "PATH",
    "TMPDIR",
    "LANG",
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "all_proxy",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "ALL_PROXY",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "GIT_SSL_CAINFO",
];

/// One process on the submit node.
#[derive(Debug)]
pub(in crate::job) struct Call {
    pub(in crate::job) program: &'static str,
    pub(in crate::job) args: Vec<String>,
    /// In addition to what is inherited; later ones win.
    pub(in crate::job) env: Vec<(String, Secret)>,
    pub(in crate::job) dir: Utf8PathBuf,
    /// A file to read from.
    pub(in crate::job) input: Option<Utf8PathBuf>,
}

/// Runs a process to its end and gives its exit code; a signal counts as 128 and its number.
///
/// Dropping the future kills the process and its group.
pub(in crate::job) async fn run(
    call: Call,
    out: &mut (dyn Output + Send),
) -> Result<i32, HandsError> {
    let program = call.program;
    let failed = |source| HandsError { action: "run", subject: program.to_owned(), source };
    let input = match &call.input {
        Some(path) => Stdio::from(fs::File::open(path).map_err(HandsError::at("open", path))?),
        None => Stdio::null(),
    };
    // One pipe for both outputs keeps their order.
    let (reader, writer) = io::pipe().map_err(failed)?;
    let mut command = tokio::process::Command::new(program);
    command
        .args(&call.args)
        .env_clear()
        .envs(INHERITED.iter().filter_map(|name| Some((name, std::env::var_os(name)?))))
        .envs(call.env.iter().map(|(name, value)| (name, value.expose())))
        .current_dir(&call.dir)
        .stdin(input)
        .stdout(writer.try_clone().map_err(failed)?)
        .stderr(writer)
        .process_group(0)
        .kill_on_drop(true);
    let mut child = command.spawn().map_err(failed)?;
    let group = Group::of(&child);
    // Our ends of the pipe go with the command; else its end would never be seen.
    drop(command);
    let mut said = Said { reader: receiver(reader).map_err(failed)?, left: LOUDEST };
    let status = loop {
        // Both are cancel-safe: a read that lost took no bytes, a wait can be repeated.
        tokio::select! {
            biased;
            more = said.pass_on(out) => {
                if !more.map_err(failed)? {
                    break child.wait().await.map_err(failed)?;
                }
            }
            status = child.wait() => break status.map_err(failed)?,
        }
    };
    drop(group);
    let rest = async {
        while said.pass_on(out).await? {}
        Ok(())
    };
    // Somebody who left the group may still hold the pipe; the process has ended all the same.
    if let Ok(result) = tokio::time::timeout(LAST_WORDS, rest).await {
        result.map_err(failed)?;
    }
    Ok(exit_code(status))
}

/// Runs a process to its end, keeps up to `most` bytes of what it writes, and passes on what it complains
/// about. Gives its exit code as [`run`] does.
///
/// Dropping the future kills the process and its group.
pub(in crate::job) async fn capture(
    call: Call,
    into: &mut Vec<u8>,
    most: usize,
    out: &mut (dyn Output + Send),
) -> Result<i32, HandsError> {
    let program = call.program;
    let failed = |source| HandsError { action: "run", subject: program.to_owned(), source };
    let mut child = tokio::process::Command::new(program)
        .args(&call.args)
        .env_clear()
        .envs(INHERITED.iter().filter_map(|name| Some((name, std::env::var_os(name)?))))
        .envs(call.env.iter().map(|(name, value)| (name, value.expose())))
        .current_dir(&call.dir)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
        .map_err(failed)?;
    let group = Group::of(&child);
    let (Some(mut output), Some(mut errors)) = (child.stdout.take(), child.stderr.take()) else {
        return Err(failed(io::Error::other("no pipes")));
    };
    let mut complaints = Vec::new();
    // Both to their ends: a process that nobody listens to would wait for ever.
    let (kept, heard) =
        tokio::join!(keep(&mut output, into, most), keep(&mut errors, &mut complaints, LOUDEST));
    kept.and(heard).map_err(failed)?;
    let status = child.wait().await.map_err(failed)?;
    drop(group);
    if !complaints.is_empty() {
        out.bytes(&complaints);
    }
    Ok(exit_code(status))
}

/// Reads to the end and keeps the beginning.
async fn keep(
    from: &mut (impl tokio::io::AsyncRead + Unpin),
    into: &mut Vec<u8>,
    most: usize,
) -> io::Result<()> {
    let mut buffer = vec![0_u8; 64 * 1024];
    loop {
        let len = from.read(&mut buffer).await?;
        if len == 0 {
            return Ok(());
        }
        let room = most.saturating_sub(into.len());
        into.extend_from_slice(buffer.get(..len.min(room)).unwrap_or_default());
    }
}

fn receiver(reader: io::PipeReader) -> io::Result<pipe::Receiver> {
    pipe::Receiver::from_owned_fd(OwnedFd::from(reader))
}

fn exit_code(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

/// What a process says, up to a bound.
struct Said {
    reader: pipe::Receiver,
    left: usize,
}

impl Said {
    /// Passes on what there is; says whether more can come.
    async fn pass_on(&mut self, out: &mut (dyn Output + Send)) -> io::Result<bool> {
        let mut buffer = [0_u8; 8192];
        let len = self.reader.read(&mut buffer).await?;
        let bytes = buffer.get(..len.min(self.left)).unwrap_or_default();
        if !bytes.is_empty() {
            out.bytes(bytes);
            self.left -= bytes.len();
            if self.left == 0 {
                out.remark(Tone::Warning, "too much output; the rest is left out");
            }
        }
        Ok(len > 0)
    }
}

/// A process group that is killed when this goes away.
struct Group(Option<Pid>);

impl Group {
    fn of(child: &tokio::process::Child) -> Self {
        Self(child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(pid) = self.0 {
            // No such group: all have ended, which is what was wanted.
            if let Err(error) = rustix::process::kill_process_group(pid, Signal::KILL)
                && error != rustix::io::Errno::SRCH
            {
                tracing::warn!(%error, "process group not killed");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use camino::Utf8Path;

    use super::super::tests::dir;
    use super::*;
    use crate::job::sources::tests::Said as Trace;

    fn sh(text: &str, dir: &Utf8Path) -> Call {
        Call {
            program: "/bin/sh",
            args: vec!["-c".into(), text.into()],
            env: vec![("SECRET".into(), Secret::new("s"))],
            dir: dir.to_owned(),
            input: None,
        }
    }

    #[tokio::test]
    async fn a_process_is_heard_in_order_and_sees_only_what_it_was_given() {
        let (_dir, path) = dir();
        let mut out = Trace::default();
        let text = "echo 1; echo 2 >&2; echo 3; echo $SECRET ${HOME-none} ${CARGO_MANIFEST_DIR-none}; \
                    cat; exit 3";
        assert_eq!(run(sh(text, &path), &mut out).await.unwrap(), 3);
        assert_eq!(out.text(), "1\n2\n3\ns none none\n");
        assert_eq!(run(sh("kill -9 $$", &path), &mut out).await.unwrap(), 137);
        let mut missing = sh("", &path);
        missing.program = "/nonexistent/program";
        let error = run(missing, &mut out).await.unwrap_err().to_string();
        assert!(error.contains("/nonexistent/program"), "{error}");
    }

    #[tokio::test]
    async fn output_is_bounded() {
        let (_dir, path) = dir();
        let mut out = Trace::default();
        let code = run(sh("head -c 3000000 /dev/zero; exit 1", &path), &mut out).await.unwrap();
        assert_eq!(code, 1);
        assert_eq!(out.bytes.len(), LOUDEST);
        assert_eq!(out.remarks.len(), 1);
    }

    #[tokio::test]
    async fn a_dropped_call_leaves_no_process() {
        let (_dir, path) = dir();
        let mut out = Trace::default();
        let text = "sleep 300 & echo $! >pids; echo $$ >>pids; echo up; wait";
        let call = run(sh(text, &path), &mut out);
        let up = async {
            while fs::read_to_string(path.join("pids")).unwrap_or_default().lines().count() < 2 {
                tokio::task::yield_now().await;
            }
        };
        tokio::select! {
            _ = call => panic!("ended by itself"),
            () = up => {}
        }
        for pid in fs::read_to_string(path.join("pids")).unwrap().lines() {
            let stat = format!("/proc/{pid}/stat");
            let gone = async {
                // A zombie waits for its parent, which may be anybody by now.
                while fs::read_to_string(&stat).is_ok_and(|text| !text.contains(") Z ")) {
                    tokio::task::yield_now().await;
                }
            };
            tokio::time::timeout(Duration::from_secs(20), gone).await.unwrap();
        }
    }
}
