//! When to look again, when to give up, when to ask for more: pure functions of jobs and time.
//!
//! Every number here embodies patience, and says whose.

use std::time::Duration;

use jiff::Timestamp;

/// Adds a duration to a time; the far future instead of an overflow.
pub fn after(time: Timestamp, wait: Duration) -> Timestamp {
    time.checked_add(wait).unwrap_or(Timestamp::MAX)
}

/// Gives the time since `then`, zero when the clock went backwards.
pub fn since(now: Timestamp, then: Timestamp) -> Duration {
    Duration::try_from(now.duration_since(then)).unwrap_or(Duration::ZERO)
}

/// Gives the time until `then`, zero when it has passed.
pub fn until(now: Timestamp, then: Timestamp) -> Duration {
    since(then, now)
}

/// How long to wait after so many failures in a row: 1, 2, 4, … seconds, at most a minute.
///
/// A minute, because a GitLab that is back should not have to wait longer for what it is owed, and
/// because its 15-minute rule for silence leaves room for several tries.
pub fn back_off(failures: u32) -> Duration {
    let seconds = 1_u64.checked_shl(failures.saturating_sub(1).min(6)).unwrap_or(64);
    Duration::from_secs(seconds.min(60))
}

/// How often a job whose log says nothing new is touched, by how many jobs there are.
///
/// A touch is also how we learn of a cancellation, so few jobs are touched every 30 seconds, as
/// gitlab-runner does. Many share a budget of 25 touches a second. GitLab wants a word within 15
/// minutes (it ends jobs after 30, and looks only at what is older than 15): 8 minutes is the most,
/// so that one that is lost does no harm.
pub fn touch_interval(jobs: usize) -> Duration {
    const BUDGET: u64 = 25;
    let jobs = u64::try_from(jobs).unwrap_or(u64::MAX);
    Duration::from_secs((jobs / BUDGET).clamp(30, 480))
}

/// How long until a backend is polled again, from how long the last poll took and whether jobs moved
/// within the last half minute.
///
/// After a poll the backend is left alone for `rest` times as long as it took: with 50, never more than
/// 2 % of the time is spent polling. A backend that answers at once is asked four times a second while
/// jobs move, which is where the delay between a job's end and GitLab's knowledge of
/// it comes from; an idle one less and less often.
pub fn poll_interval(took: Duration, rest: u32, active: bool, floor: Option<Duration>) -> Duration {
    let fair = took.saturating_mul(rest);
    let least = if active { Duration::from_millis(250) } else { Duration::from_secs(2) };
    let floor = floor.unwrap_or(Duration::ZERO);
    fair.clamp(least, Duration::from_secs(30)).max(floor)
}

/// How often a running job's log is read, by how often GitLab wants news of it.
///
/// GitLab says 3 seconds while somebody watches and 60 otherwise. Reading and sending together must
/// stay within what it says.
pub fn log_interval(update_interval: Duration) -> Duration {
    (update_interval / 4).clamp(Duration::from_millis(700), Duration::from_secs(10))
}

/// Whether enough time has passed to send the trace's new bytes.
///
/// Half a second of grace, since a sweep that comes just before the time would lose a whole round.
pub fn may_send(now: Timestamp, confirmed: Option<Timestamp>, update_interval: Duration) -> bool {
    let Some(confirmed) = confirmed else { return true };
    // The clock may have gone backwards: a confirmation in the future is none.
    if confirmed > now {
        return true;
    }
    let wanted = update_interval.saturating_sub(Duration::from_millis(1000));
    since(now, confirmed) >= wanted.max(Duration::from_millis(500))
}

/// How long an ended job's log may lag behind its end: attribute caches of network file systems hold
/// a length for up to a minute.
pub const LOG_GRACE: Duration = Duration::from_secs(75);

/// How long an ended job waits for a log that cannot be read: a file server is restarted in less, and
/// how the job ended is known.
pub const LOG_TROUBLE_GRACE: Duration = Duration::from_secs(15 * 60);

/// How long it is tried to remove a job's private files: a file server is back in less, and what still
/// cannot be removed then is the operator's to see to.
pub const LEFTOVERS_PATIENCE: Duration = Duration::from_secs(3600);

/// How often the backend is asked again to end a job.
///
/// A script that is told to end may take ten seconds for it, and its `after_script` follows: asking
/// sooner would cut that short where a second signal counts.
pub const CANCEL_AGAIN: Duration = Duration::from_secs(10);

/// How long a job that was asked to end for its deadline may take before GitLab is told anyway.
///
/// GitLab's job token can die 5 minutes after the timeout.
pub const DEADLINE_GRACE: Duration = Duration::from_secs(120);

/// What is left of a job's time for the batch system, when `reserve` is kept for bringing it home.
///
/// `Err` gives the seconds left when they are below the floor.
///
/// # Errors
///
/// When it makes no sense to start the job.
pub fn wall_time(
    now: Timestamp,
    deadline: Timestamp,
    timeout: Duration,
    reserve: Duration,
    floor: Duration,
) -> Result<Duration, u64> {
    let left = until(now, deadline);
    // A short timeout cannot spare the whole reserve; a job that has waited for nothing gets at
    // least half of what its author gave it.
    let reserve = reserve.min(timeout / 10);
    let floor = floor.min(timeout / 2);
    let wall = left.saturating_sub(reserve);
    if wall < floor || wall.is_zero() { Err(left.as_secs()) } else { Ok(wall) }
}

/// How much room there is for another job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Jobs in flight, all runners together, requests under way included.
    pub in_flight: usize,
    /// The most of them; 0 is no limit.
    pub concurrent: usize,
    /// The runner's own.
    pub of_runner: usize,
    /// The most of them; 0 is no limit.
    pub limit: usize,
    /// Jobs that the backend has not started.
    pub queued: usize,
    /// The most of them; `None` is no limit.
    pub max_queued: Option<usize>,
}

impl Room {
    /// Tells whether another job may be asked for.
    pub fn is_there(&self) -> bool {
        (self.concurrent == 0 || self.in_flight < self.concurrent)
            && (self.limit == 0 || self.of_runner < self.limit)
            && self.max_queued.is_none_or(|most| self.queued < most)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn back_off_doubles_up_to_a_minute() {
        let seconds: Vec<u64> = (0..9).map(|n| back_off(n).as_secs()).collect();
        assert_eq!(seconds, [1, 1, 2, 4, 8, 16, 32, 60, 60]);
        assert_eq!(back_off(u32::MAX).as_secs(), 60);
    }

    #[test]
    fn touches_never_leave_gitlab_without_a_word_for_ten_minutes() {
        assert_eq!(touch_interval(1).as_secs(), 30);
        assert_eq!(touch_interval(10_000).as_secs(), 400);
        assert_eq!(touch_interval(usize::MAX).as_secs(), 480);
    }

    #[test]
    fn polling_takes_at_most_its_share_of_the_time() {
        let interval = poll_interval(Duration::from_millis(100), 50, true, None);
        assert_eq!(interval, Duration::from_secs(5));
        let tenth = poll_interval(Duration::from_millis(100), 10, true, None);
        assert_eq!(tenth, Duration::from_secs(1));
        let quick = poll_interval(Duration::from_millis(1), 50, true, None);
        assert_eq!(quick, Duration::from_millis(250));
        let floor = poll_interval(Duration::ZERO, 50, true, Some(Duration::from_secs(9)));
        assert_eq!(floor, Duration::from_secs(9));
    }

    #[test]
    fn wall_time_is_what_is_left_without_the_reserve() {
        let now = Timestamp::UNIX_EPOCH;
        let minutes = |n: u64| Duration::from_secs(60 * n);
        let wall = |left, timeout| {
            wall_time(now, after(now, left), timeout, minutes(1), Duration::from_secs(30))
        };
        assert_eq!(wall(minutes(60), minutes(60)), Ok(minutes(59)));
        assert_eq!(wall(Duration::from_secs(20), minutes(60)), Err(20));
        // A job of ten seconds is not refused for lack of a minute's reserve.
        let ten = Duration::from_secs(10);
        assert_eq!(wall(ten, ten), Ok(Duration::from_secs(9)));
        assert_eq!(wall(Duration::ZERO, ten), Err(0));
    }

    #[test]
    fn a_clock_that_jumps_back_stops_nothing() {
        let now = Timestamp::UNIX_EPOCH;
        let later = after(now, Duration::from_secs(9999));
        assert_eq!(since(now, later), Duration::ZERO);
        assert!(may_send(now, Some(later), Duration::from_secs(60)));
        assert!(!may_send(later, Some(later), Duration::from_secs(60)));
    }

    #[test]
    fn each_limit_closes_the_door_alone() {
        let open = Room {
            in_flight: 4,
            concurrent: 5,
            of_runner: 1,
            limit: 0,
            queued: 9,
            max_queued: Some(10),
        };
        assert!(open.is_there());
        assert!(!Room { in_flight: 5, ..open }.is_there());
        assert!(!Room { limit: 1, ..open }.is_there());
        assert!(!Room { queued: 10, ..open }.is_there());
        assert!(Room { concurrent: 0, in_flight: 999, ..open }.is_there());
    }
}
