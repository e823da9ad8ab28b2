//! The log, put together from the pieces that the helper has handed in.
//!
//! The list of a job's output sandboxes is in the order in which they came: the pieces of the log, what is
//! brought home and the mark of the end where there is such, then DIRAC's own. Each says by the name in it
//! what it is, and a piece also its offset, so a reader that knows nothing finds its place by
//! looking at a few. What is known of them is remembered here; all of it can be found again.
//!
//! There is no question about the lists of many jobs. So the helper says in its application status how
//! many pieces it has handed in, which the one search for all jobs brings along: a job that has said
//! nothing new costs no question. How long its log is it says at its end.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bridge_backend::{JobRef, LogChunk, Result, SubmitToken};
use bytes::{Bytes, BytesMut};
use tokio::sync::Mutex as AsyncMutex;

use crate::dirac::{Dirac, lost};
use crate::fallback;
use crate::sandbox::{Fetched, Open};
use crate::search::Row;

/// Bytes of logs that are remembered, of all jobs together.
const BUDGET: usize = 32 << 20;

/// What nobody asked for in this time is forgotten: its job was released meanwhile.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(3600);

/// DIRAC's own sandboxes are no larger, where logs may be in them.
const LARGEST_DIRACS: u64 = 16 << 20;

/// What a sandbox of a job is.
#[derive(Clone, Debug)]
pub(crate) enum Kind {
    /// A piece of the log.
    Log { offset: u64, len: u64, bytes: Option<Bytes> },
    /// A part of what is brought home.
    Out { number: u64 },
    /// The mark of the end.
    End {
        outs: u64,
        /// All of the log was handed in before.
        whole: bool,
    },
    /// Not ours.
    Other,
    /// Nobody knows: the store does not have it any more.
    Gone,
}

/// One sandbox of a job.
#[derive(Clone, Debug)]
pub(crate) struct Slot {
    pub(crate) pfn: String,
    pub(crate) kind: Option<Kind>,
}

/// What is known of one job.
#[derive(Debug, Default)]
pub(crate) struct Known {
    pub(crate) slots: Vec<Slot>,
    /// Nothing that matters can be added to the list.
    pub(crate) complete: bool,
    /// How many pieces the job had told of before the list was asked for.
    listed: Option<u64>,
    /// Of what was asked for last, something is not in the store yet.
    pub(crate) coming: bool,
    looked: Option<Instant>,
    pause: Duration,
}

/// What a poll said of a job.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Heard {
    /// It is over.
    pub(crate) over: bool,
    /// How many pieces of the log it has handed in; none where it said nothing of itself.
    pub(crate) pieces: Option<u64>,
    /// How long the log is, once no more of it can come.
    pub(crate) length: Option<u64>,
    /// How many parts of outputs it has handed in, once it is over.
    pub(crate) outs: Option<u64>,
}

impl Heard {
    /// Reads what the helper told, which DIRAC's wrapper may have written over since.
    pub(crate) fn of(row: &Row, over: bool) -> Self {
        let last = row.history().iter().rev().map(|line| line.application_status.as_deref());
        let told = std::iter::once(row.application_status.as_deref()).chain(last);
        told.flatten()
            .find_map(|text| Self::told(text, over))
            .unwrap_or(Self { over, ..Self::default() })
    }

    fn told(text: &str, over: bool) -> Option<Self> {
        let ended = text.starts_with("bridge: ended ");
        if !ended && !text.starts_with("bridge: running on ") {
            return None;
        }
        let number = |key: &str| {
            // What the helper says comes after what the job's script says.
            let mut words = text.split_whitespace().rev();
            words.find_map(|word| word.strip_prefix(key)?.parse::<u64>().ok())
        };
        // What was cut off may have been a digit.
        let whole = text.len() < LONGEST_REPORT;
        let pieces = number("pieces=").filter(|_| whole);
        // What did not get through comes by DIRAC's own means, if it is not too much.
        let length = match number("lost=") {
            None => number("log=").filter(|log| Some(*log) >= number("log_len=")),
            Some(lost) if lost <= LARGEST_REST => number("log=").map(|log| log + lost),
            Some(_) => None,
        };
        let of_end = |number: Option<u64>| number.filter(|_| whole && ended);
        Some(Self {
            over,
            pieces: if ended { pieces } else { pieces.or(Some(0)) },
            length: of_end(length),
            outs: of_end(number("outs=")),
        })
    }
}

#[derive(Debug)]
struct Entry {
    known: Arc<AsyncMutex<Known>>,
    /// What the last poll said, if there was one, under which name, and when.
    heard: Option<(SubmitToken, Heard, Instant)>,
    touched: Instant,
    /// What a job that DIRAC calls over has left as its last word, and when DIRAC's word was new.
    words: Option<(Option<String>, Option<String>)>,
    /// What the store did not have: when it said so first, and when last.
    missed: HashMap<String, (Instant, Instant)>,
}

/// What is known of all jobs.
#[derive(Debug, Default)]
pub(crate) struct Shelf {
    entries: Mutex<HashMap<u64, Entry>>,
    kept: AtomicUsize,
    /// When it was last looked for what nobody asks for.
    tidied: Mutex<Option<Instant>>,
}

impl Shelf {
    fn with<T>(&self, id: u64, work: impl FnOnce(&mut Entry) -> T) -> T {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        let new = || Entry {
            known: Arc::default(),
            heard: None,
            touched: Instant::now(),
            words: None,
            missed: HashMap::new(),
        };
        let entry = entries.entry(id).or_insert_with(new);
        entry.touched = Instant::now();
        work(entry)
    }

    pub(crate) fn of(&self, id: u64) -> Arc<AsyncMutex<Known>> {
        self.with(id, |entry| Arc::clone(&entry.known))
    }

    /// Remembers what a poll said of a job of this name.
    pub(crate) fn polled(&self, id: u64, name: &SubmitToken, heard: Heard) {
        self.with(id, |entry| entry.heard = Some((name.clone(), heard, Instant::now())));
        self.tidy(FORGOTTEN_AFTER);
    }

    /// Gives a last word that was looked for since DIRAC's word changed.
    pub(crate) fn words(&self, id: u64, changed: Option<&str>) -> Option<Option<String>> {
        let known = self.with(id, |entry| entry.words.clone())?;
        (known.0.as_deref() == changed).then_some(known.1)
    }

    /// Says what is known of a sandbox that the store did not have; nothing if it is to be asked again.
    pub(crate) fn missed(&self, id: u64, pfn: &str, patience: Duration) -> Option<Fetched> {
        let (first, last) = self.with(id, |entry| entry.missed.get(pfn).copied())?;
        if last.duration_since(first) >= patience {
            return Some(Fetched::Gone);
        }
        (last.elapsed() < LOOK_AGAIN).then_some(Fetched::Coming)
    }

    /// Remembers that the store does not have a sandbox.
    pub(crate) fn miss(&self, id: u64, pfn: &str) {
        let now = Instant::now();
        self.with(id, |entry| {
            entry
                .missed
                .entry(pfn.to_owned())
                .and_modify(|(_, last)| *last = now)
                .or_insert((now, now));
        });
    }

    /// Remembers that the store has a sandbox after all.
    pub(crate) fn came(&self, id: u64, pfn: &str) {
        self.with(id, |entry| entry.missed.remove(pfn));
    }

    /// Remembers the last word of a job.
    pub(crate) fn said(&self, id: u64, changed: Option<&str>, words: Option<String>) {
        self.with(id, |entry| entry.words = Some((changed.map(str::to_owned), words)));
    }

    /// Remembers that a job of this name is not there any more.
    pub(crate) fn gone(&self, id: u64, name: &SubmitToken) {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        let heard = entries.get_mut(&id).and_then(|entry| entry.heard.as_mut());
        if let Some((_, heard, _)) = heard.filter(|(heard_of, ..)| heard_of == name) {
            *heard = Heard { over: true, length: None, ..*heard };
        }
    }

    /// Gives what a poll said not longer ago than this.
    fn heard(&self, id: u64, within: Duration) -> Option<Heard> {
        let fresh = |(_, heard, at): &(SubmitToken, Heard, Instant)| {
            (heard.over || at.elapsed() <= within).then_some(*heard)
        };
        self.with(id, |entry| entry.heard.as_ref().and_then(fresh))
    }

    /// Says whether a poll found the job under this name.
    pub(crate) fn is_ours(&self, id: u64, name: &SubmitToken) -> bool {
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        let heard = entries.get(&id).and_then(|entry| entry.heard.as_ref());
        heard.is_some_and(|(heard_of, ..)| heard_of == name)
    }

    /// Forgets jobs of which a late poll told after they were released.
    fn tidy(&self, after: Duration) {
        let mut tidied = self.tidied.lock().unwrap_or_else(PoisonError::into_inner);
        if tidied.get_or_insert_with(Instant::now).elapsed() < after {
            return;
        }
        *tidied = Some(Instant::now());
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        entries.retain(|_, entry| entry.touched.elapsed() < after);
    }

    /// Forgets a job.
    pub(crate) fn forget(&self, id: u64) {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        entries.remove(&id);
    }

    /// Makes room for bytes that are about to be remembered.
    fn make_room(&self, len: usize) {
        if self.kept.fetch_add(len, Ordering::Relaxed) + len <= BUDGET {
            return;
        }
        self.kept.store(len, Ordering::Relaxed);
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        for entry in entries.values() {
            // One that is being read keeps what it has.
            if let Ok(mut known) = entry.known.try_lock() {
                known.drop_bytes();
            }
        }
    }
}

impl Known {
    fn drop_bytes(&mut self) {
        self.drop_bytes_but(usize::MAX);
    }

    /// Forgets the bytes of all pieces but one.
    fn drop_bytes_but(&mut self, kept: usize) {
        for (at, slot) in self.slots.iter_mut().enumerate() {
            if let Some(Kind::Log { bytes, .. }) = &mut slot.kind
                && at != kept
            {
                *bytes = None;
            }
        }
    }

    /// Takes over a new list; what is known of its sandboxes stays known.
    pub(crate) fn renew(&mut self, list: Vec<String>) {
        let mut old: HashMap<String, Option<Kind>> =
            self.slots.drain(..).map(|slot| (slot.pfn, slot.kind)).collect();
        self.slots =
            list.into_iter().map(|pfn| Slot { kind: old.remove(&pfn).flatten(), pfn }).collect();
    }

    /// Says whether the list is to be asked for, of a job that goes on.
    fn is_due(&mut self, pieces: Option<u64>, slowly: Duration) -> bool {
        match pieces {
            Some(pieces) => {
                // A list that lacks what was told of is asked for again, but not at once.
                let paused = self.looked.is_none_or(|looked| looked.elapsed() >= LOOK_AGAIN);
                pieces > 0 && self.listed != Some(pieces) && paused
            }
            // It has not begun, or its words were written over: asked less and less.
            None => {
                let looked = *self.looked.get_or_insert_with(Instant::now);
                self.pause = self.pause.max(slowly);
                let due = looked.elapsed() >= self.pause;
                if due {
                    self.pause = (self.pause * 2).min(SLOWEST_LOOK.max(slowly));
                }
                due
            }
        }
    }

    /// Notes that the list was asked for after so many pieces were told of.
    fn looked(&mut self, pieces: Option<u64>) {
        self.looked = Some(Instant::now());
        let there = u64::try_from(self.slots.len()).unwrap_or(u64::MAX);
        self.listed = pieces.filter(|pieces| *pieces <= there);
    }

    /// Makes an answer of bytes that were read.
    fn chunk(&self, heard: Heard, from: u64, bytes: Bytes) -> LogChunk {
        let last = from + u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        let end = match heard.length {
            Some(length) => last >= length,
            None => self.complete && !self.coming && (bytes.is_empty() || last >= self.length()),
        };
        LogChunk { bytes, end }
    }

    /// Makes an answer of a chunk: where a piece is gone there is nothing more to read.
    fn told(&self, heard: Heard, from: u64, chunk: LogChunk) -> Result<LogChunk> {
        if chunk.bytes.is_empty() && !self.coming && self.has_lost(heard, from) {
            return Err(lost(
                "read the rest of it: the sandbox store has lost a piece that the job handed in",
            ));
        }
        Ok(chunk)
    }

    /// Says whether a byte was in a piece that nobody has any more.
    fn has_lost(&self, heard: Heard, from: u64) -> bool {
        let is_end = |slot: &Slot| matches!(slot.kind, Some(Kind::End { .. }));
        let is_gone = |slot: &Slot| matches!(slot.kind, Some(Kind::Gone));
        let of_job = self.slots.iter().position(is_end).unwrap_or(self.slots.len());
        let gone = self.slots.iter().take(of_job).any(is_gone);
        gone && match heard.length {
            Some(length) => from < length,
            None => self.complete || from < self.length(),
        }
    }

    /// Gives the first byte from which nothing is known any more, if the end is known.
    fn length(&self) -> u64 {
        let ends = self.slots.iter().filter_map(|slot| match &slot.kind {
            Some(Kind::Log { offset, len, .. }) => Some(offset + len),
            Some(Kind::Out { .. } | Kind::End { .. } | Kind::Other | Kind::Gone) | None => None,
        });
        ends.max().unwrap_or(0)
    }
}

/// Reads what a sandbox is from the name in it, and for the mark of the end from its text.
pub(crate) fn kind(id: u64, name: &str, content: Option<Bytes>) -> Kind {
    let rest =
        |word: &str| name.strip_prefix(word)?.strip_prefix(&id.to_string()).map(str::to_owned);
    if let Some(rest) = rest("bridge-log.").filter(|rest| rest.starts_with('.')) {
        let offset = rest.rsplit('.').next().and_then(|offset| offset.parse().ok());
        return match (offset, content) {
            (Some(offset), Some(bytes)) => {
                let len = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
                Kind::Log { offset, len, bytes: Some(bytes) }
            }
            (None, _) | (_, None) => Kind::Other,
        };
    }
    if let Some(number) = rest("bridge-out.").and_then(|r| r.strip_prefix('.')?.parse().ok()) {
        return Kind::Out { number };
    }
    if rest("bridge-end.").is_some_and(|rest| rest.is_empty()) {
        let text = content.unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        // Not a number where some are lost; then no number of parts is enough.
        let outs = text.lines().rev().find_map(|line| line.strip_prefix("outs="));
        let outs = outs.map(|outs| outs.parse().unwrap_or(u64::MAX));
        // What is missing may come by DIRAC's own means, later.
        let whole = !text.lines().any(|line| line.starts_with("lost="));
        return Kind::End { outs: outs.unwrap_or(0), whole };
    }
    Kind::Other
}

impl Dirac {
    /// Reads a job's log from a byte.
    pub(crate) async fn log(
        &self,
        id: u64,
        job: &JobRef,
        from: u64,
        limit: usize,
    ) -> Result<LogChunk> {
        let known = self.shelf.of(id);
        let mut known = known.lock().await;
        known.coming = false;
        // The state is asked first: what an ended job has not handed in by then it never will.
        // Whoever reads logs polls as well, more often than this; who does not is served all the same.
        let within = self.config.log_interval * 12;
        let heard = self.hear(id, job, within).await?;
        if heard.length.is_some_and(|length| from >= length) {
            return Ok(LogChunk { bytes: Bytes::new(), end: true });
        }
        let bytes = self.serve(id, &mut known, heard, from, limit).await?;
        let chunk = known.chunk(heard, from, bytes);
        if chunk.bytes.len() >= limit || chunk.end || known.complete {
            return known.told(heard, from, chunk);
        }
        if !heard.over && !known.is_due(heard.pieces, self.config.log_interval * 3) {
            return known.told(heard, from, chunk);
        }
        let Some(list) = self.handed_in(id).await? else { return Err(lost("read the log")) };
        known.renew(list);
        known.looked(heard.pieces);
        let bytes = self.serve(id, &mut known, heard, from, limit).await?;
        // A log that the job called longer may still be on its way from one server to another.
        known.complete |= heard.over && heard.length.is_none();
        let chunk = known.chunk(heard, from, bytes);
        known.told(heard, from, chunk)
    }

    /// Gives what a job has said of itself, asked for unless it was not longer ago than this.
    pub(crate) async fn hear(&self, id: u64, job: &JobRef, within: Duration) -> Result<Heard> {
        if let Some(heard) = self.shelf.heard(id, within) {
            return Ok(heard);
        }
        let over = self.is_over(job).await?;
        Ok(self.shelf.heard(id, within).unwrap_or(Heard { over, ..Heard::default() }))
    }

    /// Gives bytes from what is listed, across pieces: who reads may have no use for the last bytes of one
    /// without the first ones of the next.
    async fn serve(
        &self,
        id: u64,
        known: &mut Known,
        heard: Heard,
        from: u64,
        limit: usize,
    ) -> Result<Bytes> {
        let mut all = BytesMut::new();
        while all.len() < limit {
            let from = from + u64::try_from(all.len()).unwrap_or(u64::MAX);
            let Some(at) = self.place(id, known, heard, from).await? else { break };
            // A log is read from its beginning to its end.
            known.drop_bytes_but(at);
            // A piece whose bytes were forgotten is fetched again.
            if let Some(Slot { kind: Some(Kind::Log { bytes: None, .. }), pfn }) =
                known.slots.get(at)
            {
                let pfn = pfn.clone();
                let Some(kind) = self.look_into(id, &pfn).await? else {
                    known.coming = true;
                    break;
                };
                if let Some(slot) = known.slots.get_mut(at) {
                    slot.kind = Some(kind);
                }
            }
            let Some(Slot { kind: Some(Kind::Log { offset, bytes: Some(bytes), .. }), .. }) =
                known.slots.get(at)
            else {
                break;
            };
            let skip = usize::try_from(from - offset).unwrap_or(usize::MAX).min(bytes.len());
            let room = limit - all.len();
            let rest = bytes.slice(skip..bytes.len().min(skip.saturating_add(room)));
            if rest.len() == limit {
                return Ok(rest);
            }
            all.extend_from_slice(&rest);
        }
        Ok(all.freeze())
    }

    /// Finds the piece that holds a byte, looking into as few as possible.
    async fn place(
        &self,
        id: u64,
        known: &mut Known,
        heard: Heard,
        from: u64,
    ) -> Result<Option<usize>> {
        let holds = |slot: &Slot| match &slot.kind {
            Some(Kind::Log { offset, len, .. }) => *offset <= from && from < offset + len,
            Some(Kind::Out { .. } | Kind::End { .. } | Kind::Other | Kind::Gone) | None => false,
        };
        // The pieces of which the job told come first. It may be wrong.
        let told = heard.pieces.and_then(|pieces| usize::try_from(pieces).ok());
        if let Some(told) = told.filter(|told| *told < known.slots.len()) {
            let low = self.narrow(id, known, told, from).await?;
            let at = low.checked_sub(1).filter(|at| known.slots.get(*at).is_some_and(holds));
            if at.is_some() {
                return Ok(at);
            }
        }
        let low = self.narrow(id, known, known.slots.len(), from).await?;
        let at = low.checked_sub(1).filter(|at| known.slots.get(*at).is_some_and(holds));
        if at.is_some() {
            return Ok(at);
        }
        let caught_up = match low.checked_sub(1).and_then(|at| known.slots.get(at)?.kind.as_ref()) {
            Some(Kind::Log { offset, len, .. }) => offset + len == from,
            None => from == 0,
            Some(Kind::Out { .. } | Kind::End { .. } | Kind::Other | Kind::Gone) => false,
        };
        // Past the last byte there may be the mark of the end. A list in another order takes more looks.
        for at in if caught_up { low } else { 0 }..known.slots.len() {
            self.learn(id, known, at).await?;
        }
        Ok(known.slots.iter().position(holds))
    }

    /// Counts how many of the first slots begin at or before a byte; they come in order.
    async fn narrow(&self, id: u64, known: &mut Known, count: usize, from: u64) -> Result<usize> {
        let (mut low, mut high) = (0, count);
        while low < high {
            let middle = low + (high - low) / 2;
            self.learn(id, known, middle).await?;
            let before = match known.slots.get(middle).and_then(|slot| slot.kind.as_ref()) {
                Some(Kind::Log { offset, .. }) => *offset <= from,
                Some(Kind::Out { .. } | Kind::End { .. } | Kind::Other | Kind::Gone) | None => {
                    false
                }
            };
            if before {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        Ok(low)
    }

    /// Looks into a sandbox of which nothing is known yet.
    pub(crate) async fn learn(&self, id: u64, known: &mut Known, at: usize) -> Result<()> {
        let Some(Slot { kind: None, pfn }) = known.slots.get(at) else { return Ok(()) };
        let pfn = pfn.clone();
        let Some(kind) = self.look_into(id, &pfn).await? else {
            known.coming = true;
            return Ok(());
        };
        known.complete |= matches!(kind, Kind::End { whole: true, .. });
        if let Some(slot) = known.slots.get_mut(at) {
            slot.kind = Some(kind);
        }
        Ok(())
    }

    /// Reads what a sandbox is; nothing while the store does not have it yet.
    async fn look_into(&self, id: u64, pfn: &str) -> Result<Option<Kind>> {
        match self.open_sandbox(id, pfn).await? {
            Fetched::Open(open) => self.read_kind(id, open).await.map(Some),
            Fetched::Coming => Ok(None),
            Fetched::Gone => Ok(Some(Kind::Gone)),
        }
    }

    async fn read_kind(&self, id: u64, open: Open) -> Result<Kind> {
        if open.is_diracs() {
            let Some(bytes) = open.whole(LARGEST_DIRACS).await? else { return Ok(Kind::Other) };
            let piece = tokio::task::spawn_blocking(move || fallback::piece(&bytes)).await;
            let piece = piece.unwrap_or(Kind::Other);
            if let Kind::Log { bytes: Some(bytes), .. } = &piece {
                self.shelf.make_room(bytes.len());
            }
            return Ok(piece);
        }
        if !open.is_gzip() {
            match open.plain_name() {
                // Large, and its name is all that matters now.
                Some(name) if name.starts_with("bridge-out.") => return Ok(kind(id, &name, None)),
                Some(name) if name.starts_with("bridge-") => {}
                // DIRAC's own.
                Some(_) | None => return Ok(Kind::Other),
            }
        }
        let Some((name, content)) = open.small().await? else { return Ok(Kind::Other) };
        self.shelf.make_room(content.len());
        Ok(kind(id, &name, Some(content)))
    }
}

/// Between two looks at a list that lacks what was told of, and at a sandbox that is not there yet.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// Between two looks at the list of a job that says nothing of itself.
const SLOWEST_LOOK: Duration = Duration::from_secs(300);

/// So much of a log the helper leaves to DIRAC as it is; of more, the end and a word.
const LARGEST_REST: u64 = 4_000_000;

/// The helper cuts its reports off here.
const LONGEST_REPORT: usize = 250;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_says_what_a_sandbox_is() {
        let text = |text: &'static str| Some(Bytes::from_static(text.as_bytes()));
        assert!(matches!(
            kind(7, "bridge-log.7.3.120", text("abc")),
            Kind::Log { offset: 120, len: 3, .. }
        ));
        assert!(matches!(kind(7, "bridge-out.7.2", None), Kind::Out { number: 2 }));
        assert!(matches!(
            kind(7, "bridge-end.7", text("x=1\nouts=3\n")),
            Kind::End { outs: 3, whole: true }
        ));
        let lost = kind(7, "bridge-end.7", text("outs=0\nlost=5\nouts=lost\n"));
        assert!(matches!(lost, Kind::End { outs: u64::MAX, whole: false }), "{lost:?}");
        for name in
            ["bridge-log.8.1.0", "bridge-log.77", "bridge-end.71", "std.out", "bridge-out.7"]
        {
            let kind = kind(7, name, text(""));
            assert!(matches!(kind, Kind::Other), "{name}: {kind:?}");
        }
    }

    #[test]
    fn a_longer_list_keeps_what_is_known() {
        let mut known = Known::default();
        known.renew(vec!["a".into()]);
        known.slots[0].kind = Some(Kind::Out { number: 0 });
        known.renew(vec!["a".into(), "b".into()]);
        assert!(matches!(known.slots[0].kind, Some(Kind::Out { number: 0 })));
        assert!(known.slots[1].kind.is_none());
    }

    #[test]
    fn a_job_says_how_much_of_its_log_there_is() {
        let heard = |text: &str| {
            let row = Row { application_status: Some(text.into()), ..Row::default() };
            let Heard { pieces, length, .. } = Heard::of(&row, false);
            (pieces, length)
        };
        assert_eq!(heard("Unknown"), (None, None));
        assert_eq!(heard("bridge: refused it was killed before it started"), (None, None));
        assert_eq!(heard("bridge: running on wn1"), (Some(0), None));
        assert_eq!(heard("bridge: running on wn1 pieces=12"), (Some(12), None));
        let ended = "bridge: ended exit_code=0 step=script log_len=6 pieces=1 outs=0 log=6";
        assert_eq!(heard(ended), (Some(1), Some(6)));
        // The rest is left to DIRAC, and comes when it likes.
        assert_eq!(heard(&format!("{ended} lost=9")), (Some(1), Some(15)));
        for lossy in [ended.replace("log=6", "log=5"), format!("{ended} lost=4000001")] {
            assert_eq!(heard(&lossy), (Some(1), None), "{lossy}");
        }
        // Of a report that was cut off, no number is believed.
        let long = format!("bridge: ended exit_code=0 {:>202} log=123", "pieces=1");
        assert!(long.len() < LONGEST_REPORT, "{}", long.len());
        let cut = format!("bridge: ended exit_code=0 {:>216} log=123", "pieces=1");
        assert_eq!(cut.len(), LONGEST_REPORT);
        assert_eq!(heard(&long), (Some(1), Some(123)));
        assert_eq!(heard(&cut), (None, None));
    }

    #[test]
    fn what_the_wrapper_wrote_over_is_found_in_the_history() {
        let line = |text: &str| crate::search::Logged {
            application_status: Some(text.into()),
            ..crate::search::Logged::default()
        };
        let row = Row {
            application_status: Some("Exited with status 1".into()),
            logging_info: Some(vec![
                line("bridge: running on wn1 pieces=1"),
                line("bridge: ended exit_code=3 step=script pieces=2 outs=0 log=70"),
                line("Exited with status 1"),
            ]),
            ..Row::default()
        };
        let heard = Heard { over: true, pieces: Some(2), length: Some(70), outs: Some(0) };
        assert_eq!(Heard::of(&row, true), heard);
    }

    #[test]
    fn a_list_is_asked_for_once_for_each_piece_that_was_told_of() {
        let mut known = Known::default();
        let slowly = Duration::from_secs(15);
        assert!(!known.is_due(Some(0), slowly), "there is nothing yet");
        assert!(known.is_due(Some(1), slowly));
        known.renew(vec!["piece".into()]);
        known.looked(Some(1));
        assert!(!known.is_due(Some(1), slowly), "a silent job costs nothing");
        known.looked = None;
        assert!(known.is_due(Some(2), slowly));
        // Told of, and not there.
        known.looked(Some(5));
        known.looked = None;
        assert!(known.is_due(Some(5), slowly));
        // One that says nothing of itself is given time first.
        assert!(!Known::default().is_due(None, slowly));
    }

    #[test]
    fn what_nobody_asks_for_is_forgotten() {
        let shelf = Shelf::default();
        let name = SubmitToken::parse("br-1").unwrap();
        shelf.polled(1, &name, Heard::default());
        assert!(shelf.is_ours(1, &name));
        shelf.tidy(Duration::ZERO);
        assert!(!shelf.is_ours(1, &name));
        shelf.polled(2, &name, Heard::default());
        shelf.forget(2);
        assert!(!shelf.is_ours(2, &name));
        assert!(shelf.entries.lock().unwrap().is_empty());
    }
}
