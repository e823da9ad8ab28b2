//! What a job's directory and the machine's processes say of a job.

use std::cell::OnceCell;
use std::time::SystemTime;

use bridge_backend::result::JobResult;
use bridge_backend::{Observation, Outcome, Result, Usage};
use jiff::Timestamp;

use crate::cgroup;
use crate::dir::{Exited, JobDir, Life, Started};
use crate::procs::{self, Snapshot};

/// What is true of a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// There is no such job, or no longer.
    Absent,
    /// It was being submitted, and will never run: nobody took it, and nobody is there who could.
    NeverStarted,
    /// The supervisor lives, or processes that keep the job from being over.
    Running,
    /// It is over.
    Ended(Ended),
}

/// How a job ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Ended {
    pub(crate) outcome: Outcome,
    pub(crate) usage: Usage,
    /// The log's length at the end, where somebody noted it.
    pub(crate) log_len: Option<u64>,
}

/// One look at the machine, shared by all jobs of a call: processes are read once, or not at all.
#[derive(Debug, Default)]
pub(crate) struct Look {
    snapshot: OnceCell<Snapshot>,
    boot: OnceCell<Option<String>>,
}

impl Look {
    /// Says what is true of a job.
    pub(crate) fn state(&self, dir: &JobDir) -> Result<State> {
        // Life first: what a dead supervisor has not written by now it never will.
        match dir.life()? {
            Life::Alive => Ok(State::Running),
            Life::Absent => Ok(State::Absent),
            Life::Dead if !dir.was_started()? => Ok(State::NeverStarted),
            Life::Dead => self.after_supervisor(dir),
        }
    }

    /// Says what a poll should.
    pub(crate) fn observe(&self, dir: &JobDir, host: Option<&str>) -> Result<Observation> {
        Ok(match self.state(dir)? {
            State::Absent => Observation::Gone,
            State::Running => Observation::Running { host: host.map(str::to_owned) },
            State::Ended(ended) => {
                Observation::Ended { outcome: ended.outcome, usage: ended.usage }
            }
            State::NeverStarted => Observation::Ended {
                outcome: Outcome::SystemFailed {
                    detail: "the job's supervisor ended before it could start the script".into(),
                },
                usage: Usage::default(),
            },
        })
    }

    /// Judges a job whose supervisor took it and is dead.
    fn after_supervisor(&self, dir: &JobDir) -> Result<State> {
        let started = dir.started()?;
        let exited = dir.exited()?;
        let result = dir.result()?;
        let cancelled = dir.was_cancelled()?;
        // A cancelled job is over when the last of it is gone. And a supervisor can be killed
        // without its script, which may yet say how it ended.
        let must_be_gone = cancelled || (exited.is_none() && result.is_none());
        if must_be_gone && self.leaves_processes(dir, started.as_ref())? {
            return Ok(State::Running);
        }
        let words = Words {
            exited: exited.as_ref(),
            cancelled,
            timed_out: dir.timed_out()?,
            rebooted: started.as_ref().is_some_and(|s| Some(&s.boot) != self.boot()),
            result: result.as_ref().map(|result| result.as_ref().map_err(String::as_str)),
        };
        let log_len = match &result {
            Some(Ok(result)) => result.log_len,
            Some(Err(_)) | None => exited.as_ref().and_then(|exited| exited.log_len),
        };
        let usage = usage(dir, exited.as_ref());
        Ok(State::Ended(Ended { outcome: words.outcome(), usage, log_len }))
    }

    fn boot(&self) -> Option<&String> {
        self.boot.get_or_init(procs::boot_id).as_ref()
    }

    /// Says whether any process of the job is left.
    pub(crate) fn leaves_processes(&self, dir: &JobDir, started: Option<&Started>) -> Result<bool> {
        if let Some(group) = dir.read_cgroup()?
            && cgroup::is_populated(&group)
        {
            return Ok(true);
        }
        let snapshot = self.snapshot.get_or_init(Snapshot::take);
        Ok(snapshot.has_any(dir, started))
    }
}

/// Everybody's word on how a job ended.
#[derive(Debug)]
struct Words<'a> {
    result: Option<std::result::Result<&'a JobResult, &'a str>>,
    exited: Option<&'a Exited>,
    cancelled: bool,
    timed_out: bool,
    rebooted: bool,
}

impl Words<'_> {
    /// Weighs them: the job's own word first, then why it was ended, then the shell's status.
    fn outcome(&self) -> Outcome {
        if let Some(Ok(result)) = self.result
            && let Some(outcome) = result.outcome()
        {
            return outcome;
        }
        if self.cancelled {
            return Outcome::Cancelled { by: None };
        }
        if self.timed_out {
            return Outcome::TimedOut;
        }
        if self.rebooted {
            return Outcome::NodeFailed;
        }
        match self.result {
            // Told to end from outside, and not by us.
            Some(Ok(_)) => return Outcome::Cancelled { by: Some("a signal".into()) },
            Some(Err(why)) => {
                return Outcome::SystemFailed { detail: format!("the job left {why}") };
            }
            None => {}
        }
        let Some(exited) = self.exited else {
            let detail = "the job's supervisor was killed and left no word of the end";
            return Outcome::SystemFailed { detail: detail.into() };
        };
        if let Some(why) = &exited.never_ran {
            return Outcome::SystemFailed { detail: why.clone() };
        }
        match exited.status {
            Some(code) => Outcome::Exited { code },
            None => Outcome::SystemFailed { detail: "the script's status is unreadable".into() },
        }
    }
}

/// Gathers what is known of the job's use of the machine.
fn usage(dir: &JobDir, exited: Option<&Exited>) -> Usage {
    let (started, ended) = dir.times();
    let elapsed = started.zip(ended).and_then(|(started, ended)| {
        // A clock that was set back in between leaves it unknown.
        ended.duration_since(started).ok()
    });
    let time = |time: Option<SystemTime>| Timestamp::try_from(time?).ok();
    Usage {
        elapsed,
        cpu: exited.and_then(|exited| exited.cpu),
        started_at: time(started),
        ended_at: time(ended),
        ..Usage::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Everybody silent.
    const SILENCE: Words<'static> =
        Words { result: None, exited: None, cancelled: false, timed_out: false, rebooted: false };

    fn exited(status: i32) -> Exited {
        Exited { status: Some(status), ..Exited::default() }
    }

    #[test]
    fn the_jobs_own_word_outranks_all_others() {
        let result = JobResult::parse("exit_code=7\nstep=script\n").unwrap();
        let words = Words {
            result: Some(Ok(&result)),
            exited: Some(&exited(0)),
            cancelled: true,
            timed_out: true,
            rebooted: true,
        };
        assert_eq!(words.outcome(), Outcome::Exited { code: 7 });
    }

    #[test]
    fn a_job_that_was_told_to_end_ended_for_that_reason() {
        let result = JobResult::parse("exit_code=0\nstep=script\nsignalled=TERM\n").unwrap();
        let signalled = || Words { result: Some(Ok(&result)), ..SILENCE };
        assert_eq!(
            Words { cancelled: true, ..signalled() }.outcome(),
            Outcome::Cancelled { by: None }
        );
        assert_eq!(Words { timed_out: true, ..signalled() }.outcome(), Outcome::TimedOut);
        assert_eq!(Words { rebooted: true, ..signalled() }.outcome(), Outcome::NodeFailed);
        assert_eq!(
            Words { exited: Some(&exited(0)), ..signalled() }.outcome(),
            Outcome::Cancelled { by: Some("a signal".into()) }
        );
    }

    #[test]
    fn success_is_never_guessed() {
        let nonsense = Words { result: Some(Err("x")), exited: Some(&exited(0)), ..SILENCE };
        let no_status = Exited::default();
        for words in [SILENCE, nonsense, Words { exited: Some(&no_status), ..SILENCE }] {
            assert!(matches!(words.outcome(), Outcome::SystemFailed { .. }), "{words:?}");
        }
        assert_eq!(Words { rebooted: true, ..SILENCE }.outcome(), Outcome::NodeFailed);
        assert_eq!(
            Words { exited: Some(&exited(0)), ..SILENCE }.outcome(),
            Outcome::Exited { code: 0 }
        );
    }
}
