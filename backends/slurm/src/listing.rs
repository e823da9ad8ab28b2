//! Reads what `squeue` and `sacct` print, in text form: the one form that has stayed the same from
//! Slurm 20.11 on and costs the controller next to nothing.

use std::collections::HashMap;
use std::time::Duration;

use bridge_backend::Usage;
use jiff::Timestamp;

/// The columns of [`Queue`]: free text comes last, where a separator in it does no harm.
pub(crate) const QUEUE_FORMAT: &str = "%i|%T|%V|%S|%e|%N|%u|%j|%r";

/// The columns of [`accounting_rows`].
pub(crate) const ACCOUNTING_FORMAT: &str =
    "JobIDRaw,JobName,State,ExitCode,Submit,Start,End,NodeList";

/// What a state word of Slurm's means to us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Not started.
    Waiting,
    /// Put back, or held in a way that only a job that was started or tried can be.
    PutBack,
    /// Started, not ended.
    Going,
    /// Its processes are gone or going; the final word comes.
    Finishing,
    /// Ended for good.
    Final(Final),
    /// A word that this version does not know: never an end.
    Unknown,
}

/// Slurm's final words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Final {
    /// The batch script ended with 0.
    Completed,
    /// It ended with something else or by a signal.
    Failed,
    /// A time limit or deadline.
    TimedOut,
    /// The memory limit.
    OutOfMemory,
    /// Somebody's wish, or another cluster's copy ran.
    Cancelled,
    /// Another job's right.
    Preempted,
    /// The node's failure.
    NodeFailed,
    /// Slurm's own failure to start it.
    NotLaunched,
}

impl Phase {
    /// Reads a state word; what follows the first word ("CANCELLED by 0") is ignored.
    pub(crate) fn of(state: &str) -> Self {
        match state.split_whitespace().next().unwrap_or_default().trim_end_matches('+') {
            "PENDING" | "CONFIGURING" | "POWER_UP_NODE" | "EXPEDITING" => Self::Waiting,
            "REQUEUED" | "REQUEUE_FED" | "REQUEUE_HOLD" | "RESV_DEL_HOLD" | "SPECIAL_EXIT" => {
                Self::PutBack
            }
            "RUNNING" | "SUSPENDED" | "STOPPED" | "RESIZING" | "SIGNALING" | "STAGE_OUT"
            | "UPDATE_DB" => Self::Going,
            "COMPLETING" => Self::Finishing,
            "COMPLETED" => Self::Final(Final::Completed),
            "FAILED" => Self::Final(Final::Failed),
            "TIMEOUT" | "DEADLINE" => Self::Final(Final::TimedOut),
            "OUT_OF_MEMORY" => Self::Final(Final::OutOfMemory),
            "CANCELLED" | "REVOKED" => Self::Final(Final::Cancelled),
            "PREEMPTED" => Self::Final(Final::Preempted),
            "NODE_FAIL" => Self::Final(Final::NodeFailed),
            "BOOT_FAIL" | "LAUNCH_FAILED" | "RECONFIG_FAIL" => Self::Final(Final::NotLaunched),
            _ => Self::Unknown,
        }
    }
}

/// One job as `squeue` lists it, or as the accounting does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Row {
    pub(crate) id: u64,
    pub(crate) name: String,
    /// The word as it came.
    pub(crate) state: String,
    /// Why it waits or how it ended, in Slurm's words.
    pub(crate) reason: Option<String>,
    pub(crate) start: Option<Timestamp>,
    pub(crate) end: Option<Timestamp>,
    pub(crate) nodes: Option<String>,
}

impl Row {
    pub(crate) fn phase(&self) -> Phase {
        let phase = Phase::of(&self.state);
        // After a requeue a job waits with the first reason for two minutes; a failed prolog leaves
        // the other one. Slurm spells it with blanks or underlines, by command.
        let put_back = self.reason.as_deref().is_some_and(|reason| {
            reason == "BeginTime" || reason.replace('_', " ").contains("requeued held")
        });
        if phase == Phase::Waiting && put_back { Phase::PutBack } else { phase }
    }

    /// Gives the machine, or the first of several: `n1` of `n[1-3],m2`.
    pub(crate) fn host(&self) -> Option<String> {
        let nodes = self.nodes.as_deref()?;
        let (prefix, rest) = nodes.split_once('[').unwrap_or((nodes, ""));
        if let Some((first, _)) = prefix.split_once(',') {
            return Some(first.to_owned());
        }
        let number: String = rest.chars().take_while(char::is_ascii_digit).collect();
        Some(format!("{prefix}{number}"))
    }

    /// Gives what it used, as far as these columns say.
    pub(crate) fn usage(&self) -> Usage {
        let elapsed = self
            .start
            .zip(self.end)
            .and_then(|(start, end)| Duration::try_from(end.duration_since(start)).ok());
        Usage {
            elapsed,
            nodes: self.nodes.clone(),
            started_at: self.start,
            ended_at: self.end,
            ..Usage::default()
        }
    }
}

/// Everything `squeue` lists of ours.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    rows: Vec<Row>,
    by_id: HashMap<u64, usize>,
    by_name: HashMap<String, Vec<usize>>,
    /// Lines that are none: what is missing from a damaged answer may have been in them.
    pub(crate) damaged: usize,
}

impl Queue {
    /// Reads the answer to [`QUEUE_FORMAT`].
    pub(crate) fn read(text: &str) -> Self {
        let mut queue = Self::default();
        for line in text.lines().filter(|line| !line.trim().is_empty()) {
            match queue_line(line) {
                Some(Some(row)) => {
                    let at = queue.rows.len();
                    queue.by_id.insert(row.id, at);
                    queue.by_name.entry(row.name.clone()).or_default().push(at);
                    queue.rows.push(row);
                }
                // A well-formed line about something that is never ours, as a job array's.
                Some(None) => {}
                None => queue.damaged += 1,
            }
        }
        // A last line without its end was cut off.
        if !text.is_empty() && !text.ends_with('\n') {
            queue.damaged += 1;
        }
        queue
    }

    /// Says whether nothing but noise came.
    pub(crate) fn is_rubbish(&self) -> bool {
        self.damaged > 0 && self.rows.is_empty()
    }

    /// Gives the row of an id, whatever its name.
    pub(crate) fn of_id(&self, id: u64) -> Option<&Row> {
        self.by_id.get(&id).and_then(|at| self.rows.get(*at))
    }

    /// Gives the row of a job that has both names.
    pub(crate) fn of(&self, id: u64, name: &str) -> Option<&Row> {
        self.of_id(id).filter(|row| row.name == name)
    }

    /// Gives all rows of a name.
    pub(crate) fn named(&self, name: &str) -> impl Iterator<Item = &Row> {
        self.by_name.get(name).into_iter().flatten().filter_map(|at| self.rows.get(*at))
    }
}

/// Reads a line of `squeue`: `None` is no line, `Some(None)` one that is nothing to us.
fn queue_line(line: &str) -> Option<Option<Row>> {
    let columns: Vec<&str> = line.splitn(9, '|').collect();
    let [id, state, submit, start, end, nodes, _user, name, reason] = columns.as_slice() else {
        return None;
    };
    if !id.starts_with(|c: char| c.is_ascii_digit()) || state.is_empty() {
        return None;
    }
    time(submit)?;
    let Ok(id) = id.parse() else { return Some(None) };
    Some(Some(Row {
        id,
        name: (*name).to_owned(),
        state: (*state).to_owned(),
        reason: word(reason),
        start: time(start)?,
        end: time(end)?,
        nodes: word(nodes),
    }))
}

/// Reads the answer to [`ACCOUNTING_FORMAT`], in its order; lines that are none are left out, which is
/// harmless: what accounting does not list is asked again.
pub(crate) fn accounting_rows(text: &str) -> Vec<Row> {
    text.lines().filter_map(accounting_line).collect()
}

fn accounting_line(line: &str) -> Option<Row> {
    // From the right: the name is the only free text.
    let mut columns = line.rsplitn(7, '|');
    let nodes = columns.next()?;
    let (end, start, _submit) = (columns.next()?, columns.next()?, columns.next()?);
    let (exit, state) = (columns.next()?, columns.next()?);
    let (id, name) = columns.next()?.split_once('|')?;
    Some(Row {
        id: id.parse().ok()?,
        name: name.to_owned(),
        state: state.to_owned(),
        reason: word(exit),
        start: time(start)?,
        end: time(end)?,
        nodes: word(nodes).filter(|nodes| nodes != "None assigned"),
    })
}

/// What the accounting has of one job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Record<'a> {
    /// Nothing.
    None,
    /// A record of this id whose name has not arrived yet.
    Nameless,
    /// The record that counts: of several (a requeue, an id used again) the last of the name.
    ///
    /// It is final only with an end: slurmdbd can show a final word before the record is complete.
    Row(&'a Row),
}

/// What slurmdbd calls a job until, some seconds later, the controller has told it the name.
const NAMELESS: &str = "allocation";

/// Finds a job in the accounting's rows.
pub(crate) fn record<'a>(rows: &'a [Row], id: u64, name: &str) -> Record<'a> {
    let mut of_id = rows.iter().rev().filter(|row| row.id == id);
    match of_id.clone().find(|row| row.name == name) {
        Some(row) => Record::Row(row),
        None if of_id.any(|row| row.name == NAMELESS || row.name.is_empty()) => Record::Nameless,
        None => Record::None,
    }
}

/// Reads `JobID exit_code` lines of `squeue -O`: a raw wait status up to 22.05, `code:signal` later.
pub(crate) fn exit_statuses(text: &str) -> HashMap<u64, Exit> {
    text.lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let id = words.next()?.parse().ok()?;
            Some((id, Exit::of(words.next()?)?))
        })
        .collect()
}

/// How the batch script ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Exit {
    pub(crate) code: i32,
    pub(crate) signal: i32,
}

impl Exit {
    fn of(text: &str) -> Option<Self> {
        if let Some((code, signal)) = text.split_once(':') {
            return Some(Self { code: code.parse().ok()?, signal: signal.parse().ok()? });
        }
        let raw: i32 = text.parse().ok()?;
        Some(Self { code: (raw >> 8) & 0xff, signal: raw & 0x7f })
    }
}

/// Reads an epoch time; `None` is no time at all, `Some(None)` says that there is none.
fn time(text: &str) -> Option<Option<Timestamp>> {
    match text {
        "N/A" | "Unknown" | "None" | "NONE" | "" => Some(None),
        // A start in year zero is what Slurm has for jobs that never started.
        "0" => Some(None),
        seconds => Timestamp::from_second(seconds.parse().ok()?).ok().map(Some),
    }
}

fn word(text: &str) -> Option<String> {
    let text = text.trim();
    (!text.is_empty() && text != "None" && text != "(null)").then(|| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    // As printed by 22.05 with SLURM_TIME_FORMAT=%s.
    const QUEUE: &str = "\
1|FAILED|1795237108|1795237109|1795237110|n1|root|a1|NonZeroExitCode
2|FAILED|1795237108|1795237109|1795237109|n1|root|a2|x|JobLaunchFailure
4|PENDING|1795237109|N/A|N/A||root|a4|PartitionDown
5|PENDING|1795237109|1795240000|N/A||root|a5|ReqNodeNotAvail, UnavailableNodes:n1
6_[1-10]|PENDING|1795237109|N/A|N/A||root|array|Resources
7|RUNNING|1795237109|1795237111|1795240711|n[2-3,5]|ci|a7|None
";

    #[test]
    fn a_queue_is_read_by_id_and_by_name() {
        let queue = Queue::read(QUEUE);
        assert_eq!(queue.damaged, 0);
        let row = queue.of(1, "a1").unwrap();
        assert_eq!(row.phase(), Phase::Final(Final::Failed));
        assert_eq!(row.usage().elapsed, Some(Duration::from_secs(1)));
        assert!(queue.of(1, "a2").is_none());
        assert!(queue.of_id(3).is_none());
        let waits = queue.of(5, "a5").unwrap();
        assert_eq!(waits.reason.as_deref(), Some("ReqNodeNotAvail, UnavailableNodes:n1"));
        assert_eq!(waits.start.unwrap().as_second(), 1_795_240_000);
        assert_eq!(queue.named("a7").next().unwrap().host().as_deref(), Some("n2"));
    }

    #[test]
    fn a_damaged_answer_says_so() {
        for text in [
            "Segmentation fault\n",
            "<html>\n",
            "12|RUNNING|1795237109\n",
            "12|RUNNING|yesterday|N/A|N/A||u|n|None\n",
        ] {
            assert!(Queue::read(text).is_rubbish(), "{text}");
        }
        let cut = QUEUE.trim_end();
        let queue = Queue::read(cut);
        assert!(queue.damaged > 0 && !queue.is_rubbish());
        assert!(!Queue::read("").is_rubbish());
    }

    #[test]
    fn every_state_word_has_its_phase() {
        for (word, phase) in [
            ("PENDING", Phase::Waiting),
            ("CONFIGURING", Phase::Waiting),
            ("REQUEUED", Phase::PutBack),
            ("REQUEUE_HOLD", Phase::PutBack),
            ("REQUEUE_FED", Phase::PutBack),
            ("RESV_DEL_HOLD", Phase::PutBack),
            ("SPECIAL_EXIT", Phase::PutBack),
            ("RUNNING", Phase::Going),
            ("SUSPENDED", Phase::Going),
            ("STOPPED", Phase::Going),
            ("RESIZING", Phase::Going),
            ("SIGNALING", Phase::Going),
            ("STAGE_OUT", Phase::Going),
            ("COMPLETING", Phase::Finishing),
            ("COMPLETED", Phase::Final(Final::Completed)),
            ("FAILED", Phase::Final(Final::Failed)),
            ("TIMEOUT", Phase::Final(Final::TimedOut)),
            ("DEADLINE", Phase::Final(Final::TimedOut)),
            ("OUT_OF_MEMORY", Phase::Final(Final::OutOfMemory)),
            ("CANCELLED", Phase::Final(Final::Cancelled)),
            ("CANCELLED by 0", Phase::Final(Final::Cancelled)),
            ("CANCELLED+", Phase::Final(Final::Cancelled)),
            ("REVOKED", Phase::Final(Final::Cancelled)),
            ("PREEMPTED", Phase::Final(Final::Preempted)),
            ("NODE_FAIL", Phase::Final(Final::NodeFailed)),
            ("BOOT_FAIL", Phase::Final(Final::NotLaunched)),
            ("LAUNCH_FAILED", Phase::Final(Final::NotLaunched)),
            ("RECONFIG_FAIL", Phase::Final(Final::NotLaunched)),
            ("DREAMING", Phase::Unknown),
            ("completed", Phase::Unknown),
            ("", Phase::Unknown),
        ] {
            assert_eq!(Phase::of(word), phase, "{word}");
        }
    }

    #[test]
    fn a_requeue_shows_in_the_reason() {
        for reason in ["BeginTime", "launch failed requeued held", "launch_failed_requeued_held"] {
            let text = format!("4|PENDING|1795237109|N/A|N/A||root|a4|{reason}\n");
            let queue = Queue::read(&text);
            assert_eq!(queue.of_id(4).unwrap().phase(), Phase::PutBack, "{reason}");
        }
    }

    #[test]
    fn accounting_is_read_and_the_last_record_of_the_name_counts() {
        let rows = accounting_rows(
            "20|tok-1|CANCELLED by 1000|0:0|1795237100|1795237101|1795237105|n1\n\
             21|tok-2|FAILED|0:0|1795237100|1795237101|Unknown|n1\n\
             22|a|b|TIMEOUT|0:0|1795237100|1795237101|1795237105|n1\n\
             23|tok-3|NODE_FAIL|0:0|1795237100|1795237101|1795237105|n1\n\
             23|tok-3|PENDING|0:0|1795237100|Unknown|Unknown|None assigned\n\
             23|other|COMPLETED|0:0|1795237900|1795237901|1795237905|n1\n\
             24|allocation|FAILED|0:9|1795237900|1795237901|1795237905|n1\n\
             rubbish\n",
        );
        assert_eq!(rows.len(), 7);
        let row = |id, name| match record(&rows, id, name) {
            Record::Row(row) => row,
            Record::None | Record::Nameless => panic!("{id} {name}"),
        };
        assert_eq!(row(20, "tok-1").state, "CANCELLED by 1000");
        assert_eq!(row(21, "tok-2").end, None);
        assert_eq!(rows[2].name, "a|b");
        let requeued = row(23, "tok-3");
        assert_eq!((requeued.state.as_str(), requeued.nodes.as_deref()), ("PENDING", None));
        assert_eq!(record(&rows, 20, "tok-2"), Record::None);
        assert_eq!(record(&rows, 24, "tok-4"), Record::Nameless);
    }

    #[test]
    fn exit_statuses_of_all_versions_are_read() {
        let read = exit_statuses(
            "1                   35072               \n2  9  \n3  137:0\n4  0:15\n5  1792\nx y\n",
        );
        let exit = |code, signal| Exit { code, signal };
        assert_eq!(read.get(&1), Some(&exit(137, 0)));
        assert_eq!(read.get(&2), Some(&exit(0, 9)));
        assert_eq!(read.get(&3), Some(&exit(137, 0)));
        assert_eq!(read.get(&4), Some(&exit(0, 15)));
        assert_eq!(read.get(&5), Some(&exit(7, 0)));
        assert_eq!(read.len(), 5);
    }

    #[test]
    fn the_first_of_several_machines_is_the_host() {
        for (nodes, host) in
            [("n1", "n1"), ("n[1-3]", "n1"), ("n[07,9]", "n07"), ("a1,b[1-2]", "a1"), ("x,y", "x")]
        {
            let text = format!("1|RUNNING|1|1|1|{nodes}|u|n|None\n");
            let queue = Queue::read(&text);
            assert_eq!(queue.of_id(1).unwrap().host().as_deref(), Some(host));
        }
    }
}
