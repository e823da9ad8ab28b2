//! Jobs that are submitted at the same time share a request.
//!
//! Nobody waits for company: whoever holds the turn sends what is there, and while that is under way the
//! next ones gather by themselves. There is no task of its own. Each submission waits for its answer and
//! for the turn at once, so the turn never stays with one that was dropped.
//!
//! A dropped future leaves nothing unclear for others that is not unclear anyway. What was not sent yet
//! stays in line; what may have been sent is answered with [`ErrorKind::Ambiguous`].
//!
//! DIRAC takes all descriptions of a request or none, and does not say which one it dislikes. So a request
//! that is refused is sent again in halves, and in the end the bad one stands alone.

use std::collections::VecDeque;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bridge_backend::{BackendError, ErrorKind, ExternalId, Fault, Result, SubmitToken};
use tokio::sync::{Mutex as AsyncMutex, oneshot};

use crate::client::Said;

/// DiracX takes no more from a normal user.
pub(crate) const AT_ONCE: usize = 20;

/// Makes a request; asked by one submission at a time.
pub(crate) trait Post: Sync {
    /// Submits all of these or none; sets `sent` before the other side can hear of it.
    fn post(
        &self,
        descriptions: &[String],
        sent: &AtomicBool,
    ) -> impl Future<Output = Posted> + Send;
}

/// What became of a request.
#[derive(Debug)]
pub(crate) enum Posted {
    /// There is a job for each description, in their order.
    Made(Vec<u64>),
    /// One of the descriptions is not liked, or none of them.
    Refused(Said),
    /// This holds for all of them.
    Failed(BackendError),
}

/// A job that is to be made.
#[derive(Debug)]
pub(crate) struct Letter {
    pub(crate) token: SubmitToken,
    pub(crate) description: String,
    /// Whose words are in the description besides the operator's.
    pub(crate) own_words: bool,
}

#[derive(Debug)]
struct Entry {
    letter: Letter,
    answer: oneshot::Sender<Result<ExternalId>>,
}

#[derive(Debug, Default)]
struct Waiting {
    line: VecDeque<Entry>,
    /// Parts of requests that were refused; the bad one is in one of them.
    apart: VecDeque<Vec<Entry>>,
}

/// Where jobs wait that are to be made.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    waiting: Mutex<Waiting>,
    /// Held by whoever sends.
    turn: AsyncMutex<()>,
}

/// Jobs of one request, taken out of the line.
struct Group<'a> {
    outbox: &'a Outbox,
    entries: Vec<Entry>,
    apart: bool,
    sent: AtomicBool,
}

impl Outbox {
    /// Makes one job, together with others that are due.
    pub(crate) async fn submit(&self, letter: Letter, post: &impl Post) -> Result<ExternalId> {
        let (answer, mut mine) = oneshot::channel();
        self.waiting().line.push_back(Entry { letter, answer });
        loop {
            // Both are polled again where they stopped: an answer is kept until it is taken, and a turn
            // that nobody takes goes to the next in line.
            let turn = tokio::select! {
                biased;
                answer = &mut mine => return heard(answer),
                turn = self.turn.lock() => turn,
            };
            // The one before may have sent it.
            match mine.try_recv() {
                Ok(answer) => return answer,
                Err(oneshot::error::TryRecvError::Closed) => return Err(unheard()),
                Err(oneshot::error::TryRecvError::Empty) => {}
            }
            let Some(group) = self.take() else { return Err(unheard()) };
            group.send(post).await;
            drop(turn);
        }
    }

    fn waiting(&self) -> std::sync::MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes what goes into the next request, without those for which nobody waits any more.
    fn take(&self) -> Option<Group<'_>> {
        let mut waiting = self.waiting();
        waiting.line.retain(Entry::is_wanted);
        let group = |entries, apart| {
            Some(Group { outbox: self, entries, apart, sent: AtomicBool::new(false) })
        };
        while let Some(mut entries) = waiting.apart.pop_front() {
            entries.retain(Entry::is_wanted);
            if !entries.is_empty() {
                return group(entries, true);
            }
        }
        let count = waiting.line.len().min(AT_ONCE);
        let entries: Vec<Entry> = waiting.line.drain(..count).collect();
        if entries.is_empty() { None } else { group(entries, false) }
    }
}

impl Entry {
    fn is_wanted(&self) -> bool {
        !self.answer.is_closed()
    }

    fn answer(self, answer: Result<ExternalId>) {
        // Dropped by whoever waited: for him it is as unclear as any other.
        if self.answer.send(answer).is_err() {
            tracing::debug!(token = %self.letter.token, "nobody waits for a submission any more");
        }
    }
}

impl Group<'_> {
    async fn send(mut self, post: &impl Post) {
        let descriptions: Vec<String> =
            self.entries.iter().map(|entry| entry.letter.description.clone()).collect();
        let posted = post.post(&descriptions, &self.sent).await;
        let mut entries = std::mem::take(&mut self.entries);
        match posted {
            Posted::Made(ids) if fits(&ids, entries.len()) => {
                for (entry, id) in entries.into_iter().zip(ids) {
                    entry.answer(Ok(ExternalId(id.to_string())));
                }
            }
            Posted::Made(_) => {
                for entry in entries {
                    let context = "submit the job for sure: the answer has no job id for it";
                    entry.answer(Err(BackendError::new(ErrorKind::Ambiguous, context)));
                }
            }
            Posted::Refused(_) if entries.len() > 1 => {
                let second = entries.split_off(entries.len() / 2);
                let mut waiting = self.outbox.waiting();
                waiting.apart.push_front(second);
                waiting.apart.push_front(entries);
            }
            Posted::Refused(said) => {
                if let Some(entry) = entries.pop() {
                    let error = refusal(&entry.letter).with_source(said);
                    entry.answer(Err(error));
                }
            }
            Posted::Failed(error) => {
                let error = Arc::new(error);
                for entry in entries {
                    entry.answer(Err(copy(&error)));
                }
            }
        }
    }
}

impl Drop for Group<'_> {
    fn drop(&mut self) {
        // What may have been sent is answered by the end of its channel.
        if self.entries.is_empty() || self.sent.load(Ordering::Acquire) {
            return;
        }
        let mut waiting = self.outbox.waiting();
        if self.apart {
            waiting.apart.push_front(std::mem::take(&mut self.entries));
        } else {
            for entry in self.entries.drain(..).rev() {
                waiting.line.push_front(entry);
            }
        }
    }
}

/// Says whether an answer has a job for each description.
fn fits(ids: &[u64], wanted: usize) -> bool {
    let mut different = ids.to_vec();
    different.sort_unstable();
    different.dedup();
    ids.len() == wanted && different.len() == wanted && !ids.contains(&0)
}

fn heard(
    answer: std::result::Result<Result<ExternalId>, oneshot::error::RecvError>,
) -> Result<ExternalId> {
    answer.unwrap_or_else(|_dropped| Err(unheard()))
}

/// The one who sent it was dropped while it was under way.
fn unheard() -> BackendError {
    BackendError::new(ErrorKind::Ambiguous, "hear whether the job was submitted")
}

/// DIRAC's refusals say little, so the whole description goes into the log.
fn refusal(letter: &Letter) -> BackendError {
    let Letter { token, description, own_words } = letter;
    tracing::error!(%token, jdl = description, "DIRAC refused a job's description");
    let fault = if *own_words { Fault::Job } else { Fault::Site };
    BackendError::new(
        ErrorKind::Rejected(fault),
        "submit the job: DIRAC refuses its description (site, platform, job type, CPU time or VO)",
    )
}

/// Gives an error to one of several that it concerns.
fn copy(error: &Arc<BackendError>) -> BackendError {
    let mut copy = BackendError::new(error.kind(), error.to_string());
    if let Some(wait) = error.retry_after() {
        copy = copy.with_retry_after(wait);
    }
    if std::error::Error::source(error.as_ref()).is_some() {
        copy = copy.with_source(Cause(Arc::clone(error)));
    }
    copy
}

/// The cause of an error that concerns several.
#[derive(Debug)]
struct Cause(Arc<BackendError>);

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match std::error::Error::source(self.0.as_ref()) {
            Some(cause) => fmt::Display::fmt(cause, f),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Cause {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        std::error::Error::source(self.0.as_ref())?.source()
    }
}

#[cfg(test)]
#[path = "outbox_tests.rs"]
mod tests;
