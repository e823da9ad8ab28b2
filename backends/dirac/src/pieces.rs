//! The log, put together from the pieces that the helper has handed in.
//!
//! The list of a job's output sandboxes is in the order in which they came: the mark of the start, the
//! pieces of the log, what is brought home, the mark of the end, then DIRAC's own. Each says by the name
//! in it what it is, and a piece also its offset, so a reader that knows nothing finds its place by
//! looking at a few. What is known of them is remembered here; all of it can be found again.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bridge_backend::{JobRef, LogChunk, Result};
use bytes::Bytes;
use tokio::sync::Mutex as AsyncMutex;

use crate::dirac::{Dirac, lost};
use crate::fallback;

/// Bytes of logs that are remembered, of all jobs together.
const BUDGET: usize = 64 << 20;

/// DIRAC's own sandboxes are no larger, where logs may be in them.
const LARGEST_DIRACS: u64 = 16 << 20;

/// What a sandbox of a job is.
#[derive(Clone, Debug)]
pub(crate) enum Kind {
    /// The mark of the start.
    Begin,
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
    looked: Option<Instant>,
    pause: Duration,
}

#[derive(Debug, Default)]
struct Entry {
    known: Arc<AsyncMutex<Known>>,
    /// What the last poll said, if there was one.
    over: Option<bool>,
    /// What a job that DIRAC calls over has left as its last word, and when DIRAC's word was new.
    words: Option<(Option<String>, Option<String>)>,
}

/// What is known of all jobs.
#[derive(Debug, Default)]
pub(crate) struct Shelf {
    entries: Mutex<HashMap<u64, Entry>>,
    kept: AtomicUsize,
}

impl Shelf {
    fn with<T>(&self, id: u64, work: impl FnOnce(&mut Entry) -> T) -> T {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        work(entries.entry(id).or_default())
    }

    pub(crate) fn of(&self, id: u64) -> Arc<AsyncMutex<Known>> {
        self.with(id, |entry| Arc::clone(&entry.known))
    }

    /// Remembers what a poll said.
    pub(crate) fn polled(&self, id: u64, over: bool) {
        self.with(id, |entry| entry.over = Some(over));
    }

    /// Gives a last word that was looked for since DIRAC's word changed.
    pub(crate) fn words(&self, id: u64, changed: Option<&str>) -> Option<Option<String>> {
        let known = self.with(id, |entry| entry.words.clone())?;
        (known.0.as_deref() == changed).then_some(known.1)
    }

    /// Remembers the last word of a job.
    pub(crate) fn said(&self, id: u64, changed: Option<&str>, words: Option<String>) {
        self.with(id, |entry| entry.words = Some((changed.map(str::to_owned), words)));
    }

    fn over(&self, id: u64) -> Option<bool> {
        self.with(id, |entry| entry.over)
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
        for slot in &mut self.slots {
            if let Some(Kind::Log { bytes, .. }) = &mut slot.kind {
                *bytes = None;
            }
        }
    }

    /// Takes over a new list; what is known of its sandboxes stays known. Says whether it is longer.
    fn take_over(&mut self, list: Vec<String>) -> bool {
        let grown = list.len() > self.slots.len();
        let mut old: HashMap<String, Option<Kind>> =
            self.slots.drain(..).map(|slot| (slot.pfn, slot.kind)).collect();
        self.slots =
            list.into_iter().map(|pfn| Slot { kind: old.remove(&pfn).flatten(), pfn }).collect();
        grown
    }

    /// Takes over a new list.
    pub(crate) fn renew(&mut self, list: Vec<String>) {
        self.take_over(list);
    }

    /// Gives the first byte from which nothing is known any more, if the end is known.
    fn length(&self) -> u64 {
        let ends = self.slots.iter().filter_map(|slot| match &slot.kind {
            Some(Kind::Log { offset, len, .. }) => Some(offset + len),
            Some(Kind::Begin | Kind::Out { .. } | Kind::End { .. } | Kind::Other) | None => None,
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
    if rest("bridge-begin.").is_some_and(|rest| rest.is_empty()) {
        return Kind::Begin;
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
        if let Some(chunk) = self.serve(id, &mut known, from, limit).await? {
            return Ok(chunk);
        }
        let nothing = |end| Ok(LogChunk { bytes: Bytes::new(), end });
        if known.complete {
            return nothing(true);
        }
        // The state is asked first: what an ended job has not handed in by then it never will.
        let over = match self.shelf.over(id) {
            Some(over) => over,
            None => self.is_over(job).await?,
        };
        if !over && !self.due(&known) {
            return nothing(false);
        }
        let Some(list) = self.handed_in(id).await? else { return Err(lost("read the log")) };
        let grown = known.take_over(list);
        known.looked = Some(Instant::now());
        known.pause = if grown {
            FIRST_LOOK.min(self.config.log_interval)
        } else {
            // A silent job is asked less and less.
            (known.pause * 2)
                .clamp(FIRST_LOOK.min(self.config.log_interval), self.config.log_interval * 3)
        };
        if let Some(chunk) = self.serve(id, &mut known, from, limit).await? {
            return Ok(chunk);
        }
        if over {
            known.complete = true;
        }
        nothing(known.complete)
    }

    fn due(&self, known: &Known) -> bool {
        known.looked.is_none_or(|looked| looked.elapsed() >= known.pause)
    }

    /// Gives bytes from what is listed; `None` when there are none from this byte on.
    async fn serve(
        &self,
        id: u64,
        known: &mut Known,
        from: u64,
        limit: usize,
    ) -> Result<Option<LogChunk>> {
        let Some(at) = self.place(id, known, from).await? else { return Ok(None) };
        // A piece whose bytes were forgotten is fetched again.
        if let Some(Slot { kind: Some(Kind::Log { bytes: None, .. }), pfn }) = known.slots.get(at) {
            let pfn = pfn.clone();
            let kind = self.look_into(id, &pfn).await?;
            if let Some(slot) = known.slots.get_mut(at) {
                slot.kind = Some(kind);
            }
        }
        let Some(Slot { kind: Some(Kind::Log { offset, bytes: Some(bytes), .. }), .. }) =
            known.slots.get(at)
        else {
            return Ok(None);
        };
        let skip = usize::try_from(from - offset).unwrap_or(usize::MAX).min(bytes.len());
        let bytes = bytes.slice(skip..bytes.len().min(skip.saturating_add(limit)));
        let last = from + u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        let end = known.complete && last >= known.length();
        Ok(Some(LogChunk { bytes, end }))
    }

    /// Finds the piece that holds a byte, looking into as few as possible.
    async fn place(&self, id: u64, known: &mut Known, from: u64) -> Result<Option<usize>> {
        // How many begin at or before the byte; they come in order.
        let (mut low, mut high) = (0, known.slots.len());
        while low < high {
            let middle = low + (high - low) / 2;
            self.learn(id, known, middle).await?;
            let before = match known.slots.get(middle).and_then(|slot| slot.kind.as_ref()) {
                Some(Kind::Begin) => true,
                Some(Kind::Log { offset, .. }) => *offset <= from,
                Some(Kind::Out { .. } | Kind::End { .. } | Kind::Other) | None => false,
            };
            if before {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        let holds = |slot: &Slot| match &slot.kind {
            Some(Kind::Log { offset, len, .. }) => *offset <= from && from < offset + len,
            Some(Kind::Begin | Kind::Out { .. } | Kind::End { .. } | Kind::Other) | None => false,
        };
        let at = low.checked_sub(1).filter(|at| known.slots.get(*at).is_some_and(holds));
        if at.is_some() {
            return Ok(at);
        }
        let caught_up = match low.checked_sub(1).and_then(|at| known.slots.get(at)?.kind.as_ref()) {
            Some(Kind::Log { offset, len, .. }) => offset + len == from,
            Some(Kind::Begin) | None => from == 0,
            Some(Kind::Out { .. } | Kind::End { .. } | Kind::Other) => false,
        };
        // Past the last byte there may be the mark of the end. A list in another order takes more looks.
        for at in if caught_up { low } else { 0 }..known.slots.len() {
            self.learn(id, known, at).await?;
        }
        Ok(known.slots.iter().position(holds))
    }

    /// Looks into a sandbox of which nothing is known yet.
    pub(crate) async fn learn(&self, id: u64, known: &mut Known, at: usize) -> Result<()> {
        let Some(Slot { kind: None, pfn }) = known.slots.get(at) else { return Ok(()) };
        let pfn = pfn.clone();
        let kind = self.look_into(id, &pfn).await?;
        known.complete |= matches!(kind, Kind::End { whole: true, .. });
        if let Some(slot) = known.slots.get_mut(at) {
            slot.kind = Some(kind);
        }
        Ok(())
    }

    async fn look_into(&self, id: u64, pfn: &str) -> Result<Kind> {
        let Some(open) = self.open_sandbox(pfn).await? else { return Ok(Kind::Other) };
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

/// Between the first looks at a job's list.
const FIRST_LOOK: Duration = Duration::from_millis(500);

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
        assert!(matches!(kind(7, "bridge-begin.7", text("")), Kind::Begin));
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
        assert!(known.take_over(vec!["a".into()]));
        known.slots[0].kind = Some(Kind::Begin);
        assert!(known.take_over(vec!["a".into(), "b".into()]));
        assert!(matches!(known.slots[0].kind, Some(Kind::Begin)));
        assert!(known.slots[1].kind.is_none());
        assert!(!known.take_over(vec!["a".into(), "b".into()]));
    }
}
