//! The machine's processes: which of them are a job's, and how to signal exactly those.
//!
//! A job's processes are those whose environment names the job's directory, their descendants, and
//! everybody in a session that one of them leads. What left all three (an emptied environment, a
//! parent that died, a session of its own) is beyond this module; a control group holds it.
//!
//! Numbers are never trusted: a process is signalled through a descriptor, after its start time was
//! read again.

use std::cell::OnceCell;
use std::collections::BTreeSet;
use std::fs;
use std::time::Duration;

use bridge_backend::result::JOB_DIR_VAR;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::dir::{JobDir, Started, parse_seconds};

/// Rounds of killing before we leave the rest to the next call: a child forked behind our back is
/// met in the next round, and whoever outruns this many is met in the next sweep.
const ROUNDS: usize = 8;

/// One process, as it was.
#[derive(Clone, Debug)]
struct Process {
    pid: i32,
    parent: i32,
    group: i32,
    session: i32,
    start: u64,
    /// What its environment says of a job directory; read when asked for.
    job_dir: OnceCell<Option<Vec<u8>>>,
}

impl Process {
    fn is_marked(&self, dir: &[u8]) -> bool {
        self.job_dir.get_or_init(|| read_job_dir(self.pid)).as_deref() == Some(dir)
    }
}

/// All living processes of one moment.
#[derive(Debug)]
pub(crate) struct Snapshot(Vec<Process>);

impl Snapshot {
    /// Reads `/proc`.
    pub(crate) fn take() -> Self {
        let Ok(entries) = fs::read_dir("/proc") else { return Self(Vec::new()) };
        let processes = entries
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .filter_map(read_stat)
            .collect();
        Self(processes)
    }

    /// Picks a job's processes, without the supervisor and its helpers.
    fn of_job(&self, dir: &JobDir, supervisor: Option<&Started>) -> Vec<&Process> {
        let path = dir.path().as_str().as_bytes();
        let ours = i32::try_from(std::process::id()).ok();
        let candidates: Vec<&Process> = self
            .0
            .iter()
            .filter(|p| Some(p.pid) != ours)
            // Nobody is older than who started him; most of the machine is.
            .filter(|p| supervisor.is_none_or(|s| s.start <= p.start && s.pid != p.group))
            .collect();
        let mut members: BTreeSet<i32> =
            candidates.iter().filter(|p| p.is_marked(path)).map(|p| p.pid).collect();
        loop {
            let more: Vec<i32> = candidates
                .iter()
                .filter(|p| !members.contains(&p.pid))
                .filter(|p| members.contains(&p.parent) || members.contains(&p.session))
                .map(|p| p.pid)
                .collect();
            if more.is_empty() {
                break;
            }
            members.extend(more);
        }
        candidates.into_iter().filter(|p| members.contains(&p.pid)).collect()
    }

    /// Says whether any process of the job is left.
    pub(crate) fn has_any(&self, dir: &JobDir, supervisor: Option<&Started>) -> bool {
        !self.of_job(dir, supervisor).is_empty()
    }
}

/// Asks a job's processes to end; says whether there was anybody to hear it.
pub(crate) fn terminate(dir: &JobDir, supervisor: Option<&Started>) -> bool {
    let snapshot = Snapshot::take();
    // Counted, not short-circuited: everybody is told.
    snapshot.of_job(dir, supervisor).into_iter().filter(|p| signal(p, Signal::TERM)).count() > 0
}

/// Kills a job's processes until none is left or the rounds are over; says whether none is left.
pub(crate) fn kill(dir: &JobDir, supervisor: Option<&Started>) -> bool {
    for _ in 0..ROUNDS {
        let snapshot = Snapshot::take();
        let members = snapshot.of_job(dir, supervisor);
        if members.is_empty() {
            return true;
        }
        for process in members {
            // A process that cannot be signalled has just ended, or will be counted again.
            signal(process, Signal::KILL);
        }
    }
    !Snapshot::take().has_any(dir, supervisor)
}

/// Kills one process known by pid and start time.
pub(crate) fn kill_one(pid: i32, start: u64) -> bool {
    match read_stat(pid) {
        Some(process) if process.start == start => signal(&process, Signal::KILL),
        Some(_) | None => false,
    }
}

/// Signals one process, if it is still the one that was seen.
fn signal(process: &Process, signal: Signal) -> bool {
    let Some(pid) = Pid::from_raw(process.pid) else { return false };
    let Ok(handle) = pidfd_open(pid, PidfdFlags::empty()) else { return false };
    // The descriptor now stands for one process for good; is it the one we saw?
    match read_stat(process.pid) {
        Some(now) if now.start == process.start => pidfd_send_signal(handle, signal).is_ok(),
        Some(_) | None => false,
    }
}

/// Reads which job directory a process's environment names.
fn read_job_dir(pid: i32) -> Option<Vec<u8>> {
    // Another user's process keeps its environment to itself, and is none of ours.
    let environ = fs::read(format!("/proc/{pid}/environ")).ok()?;
    environ.split(|byte| *byte == 0).find_map(|entry| {
        entry.strip_prefix(JOB_DIR_VAR.as_bytes())?.strip_prefix(b"=").map(<[u8]>::to_vec)
    })
}

/// Reads one process; `None` when it has ended, a zombie included.
fn read_stat(pid: i32) -> Option<Process> {
    let bytes = fs::read(format!("/proc/{pid}/stat")).ok()?;
    parse_stat(pid, &String::from_utf8_lossy(&bytes))
}

/// Takes the fields after the name, which may itself hold blanks and parentheses.
fn parse_stat(pid: i32, line: &str) -> Option<Process> {
    let (_, fields) = line.rsplit_once(") ")?;
    let fields: Vec<&str> = fields.split_ascii_whitespace().collect();
    if matches!(*fields.first()?, "Z" | "X" | "x") {
        return None;
    }
    let number = |at: usize| fields.get(at)?.parse::<i32>().ok();
    Some(Process {
        pid,
        parent: number(1)?,
        group: number(2)?,
        session: number(3)?,
        start: fields.get(19)?.parse().ok()?,
        job_dir: OnceCell::new(),
    })
}

/// Gives the time since boot, which no change of the clock touches.
pub(crate) fn uptime() -> Option<Duration> {
    parse_seconds(fs::read_to_string("/proc/uptime").ok()?.split_ascii_whitespace().next()?)
}

/// Gives the name of this boot.
pub(crate) fn boot_id() -> Option<String> {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    Some(text.trim_end().to_owned())
}

/// Gives the machine's name.
pub(crate) fn host_name() -> Option<String> {
    let text = fs::read_to_string("/proc/sys/kernel/hostname").ok()?;
    Some(text.trim_end().to_owned()).filter(|name| !name.is_empty())
}

#[cfg(test)]
mod tests {
    use bridge_backend::SubmitToken;
    use camino::Utf8Path;

    use super::*;

    fn process(pid: i32, parent: i32, group: i32, session: i32, job_dir: Option<&str>) -> Process {
        let job_dir = OnceCell::from(job_dir.map(|dir| dir.as_bytes().to_vec()));
        Process { pid, parent, group, session, start: 7, job_dir }
    }

    #[test]
    fn a_name_with_parentheses_does_not_shift_the_fields() {
        let line = "7 (a) b (c) S 1 2 3 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 315641 0 0";
        let process = parse_stat(7, line).unwrap();
        assert_eq!((process.parent, process.group, process.session), (1, 2, 3));
        assert_eq!(process.start, 315_641);
        assert!(parse_stat(7, &line.replace(") S ", ") Z ")).is_none());
    }

    #[test]
    fn a_jobs_processes_are_marked_or_descend_or_share_its_session() {
        let dir = JobDir::new(Utf8Path::new("/jobs"), &SubmitToken::parse("t").unwrap());
        let snapshot = Snapshot(vec![
            process(10, 1, 10, 5, Some("/jobs/t")),   // the supervisor
            process(11, 10, 10, 5, Some("/jobs/t")),  // its watchdog
            process(20, 10, 20, 20, Some("/jobs/t")), // the script
            process(21, 1, 20, 20, None),             // in its session, environment emptied
            process(22, 21, 22, 22, None),            // a child of that one, own session
            process(23, 1, 23, 23, Some("/jobs/t")),  // daemonised
            process(30, 1, 30, 30, Some("/jobs/t2")), // another job's
            process(31, 1, 31, 5, None),              // a neighbour in the daemon's session
        ]);
        let pids = |start| -> Vec<i32> {
            let supervisor = Started { pid: 10, start, boot: String::new() };
            snapshot.of_job(&dir, Some(&supervisor)).iter().map(|p| p.pid).collect()
        };
        assert_eq!(pids(7), [20, 21, 22, 23]);
        assert_eq!(pids(8), []);
    }

    #[test]
    fn a_reused_pid_is_not_signalled() {
        let mut child = std::process::Command::new("/bin/sleep").arg("60").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let mut seen = read_stat(pid).unwrap();
        seen.start += 1;
        assert!(!signal(&seen, Signal::KILL));
        seen.start -= 1;
        assert!(signal(&seen, Signal::KILL));
        child.wait().unwrap();
        assert!(!signal(&seen, Signal::KILL));
    }
}
