//! The coordinator's time: the machine's clock plus what tests have moved it by.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};

/// Time since the coordinator's start, movable forward.
#[derive(Debug)]
pub(super) struct Clock {
    start: Instant,
    wall: Timestamp,
    moved_ms: AtomicU64,
}

impl Clock {
    pub(super) fn new() -> Self {
        #[expect(
            clippy::disallowed_methods,
            reason = "the other side of the wire has a clock of its own"
        )]
        let wall = Timestamp::now();
        Self { start: Instant::now(), wall, moved_ms: AtomicU64::new(0) }
    }

    /// Gives the time since the start.
    pub(super) fn now(&self) -> Duration {
        self.start.elapsed() + Duration::from_millis(self.moved_ms.load(Ordering::SeqCst))
    }

    /// Gives the calendar time that belongs to a time since the start.
    pub(super) fn calendar(&self, at: Duration) -> Timestamp {
        SignedDuration::try_from(at)
            .ok()
            .and_then(|at| self.wall.checked_add(at).ok())
            .unwrap_or(Timestamp::MAX)
    }

    pub(super) fn advance(&self, by: Duration) {
        let by = u64::try_from(by.as_millis()).unwrap_or(u64::MAX);
        self.moved_ms.fetch_add(by, Ordering::SeqCst);
    }
}
