//! When a runner may ask for jobs, and how many questions at once: pure functions of what
//! `jobs/request` answered.

use std::time::Duration;

use jiff::Timestamp;

use super::error::{Error, ErrorKind};
use super::jobs::RequestReply;

/// When a runner counts as unhealthy, and for how long; gitlab-runner's defaults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HealthPolicy {
    /// So many bad answers in a row (`unhealthy_requests_limit`).
    pub strikes: u32,
    /// For so long (`unhealthy_interval`).
    pub interval: Duration,
}

impl Default for HealthPolicy {
    fn default() -> Self {
        Self { strikes: 3, interval: Duration::from_secs(60 * 60) }
    }
}

/// Whether a runner may ask for jobs.
///
/// Bad is what only an operator can mend: a token that GitLab does not know, a configuration that
/// cannot work. An unreachable or busy GitLab is not the runner's illness and heals the record, as
/// with gitlab-runner (`commands/health_helper.go`); but a time that the server named is waited for.
#[derive(Clone, Debug)]
pub struct Health {
    policy: HealthPolicy,
    strikes: u32,
    pause: Option<Pause>,
    reason: Option<String>,
}

/// A time in which nothing is asked.
#[derive(Clone, Copy, Debug)]
struct Pause {
    from: Timestamp,
    length: Duration,
}

impl Pause {
    /// Says whether the pause goes on. A clock that was set back does not lengthen it.
    fn holds(self, now: Timestamp) -> bool {
        match Duration::try_from(now.duration_since(self.from)) {
            Ok(passed) => passed < self.length,
            Err(_before_it_began) => false,
        }
    }
}

impl Health {
    /// Starts healthy, as after every reading of the configuration.
    pub fn new(policy: HealthPolicy) -> Self {
        Self { policy, strikes: 0, pause: None, reason: None }
    }

    /// Notes an answer.
    pub fn record(&mut self, answer: &Result<RequestReply, Error>, now: Timestamp) {
        match judge(answer) {
            Judgement::Good => {
                self.strikes = 0;
                self.pause = None;
                self.reason = None;
            }
            Judgement::Wait(length) => {
                self.strikes = 0;
                self.pause = Some(Pause { from: now, length });
                self.reason = Some(format!("GitLab asks to wait {} s", length.as_secs()));
            }
            Judgement::Bad(reason) => {
                self.strikes = self.strikes.saturating_add(1);
                self.reason = Some(reason);
                if self.strikes >= self.policy.strikes {
                    // After the pause all chances are there again.
                    self.strikes = 0;
                    self.pause = Some(Pause { from: now, length: self.policy.interval });
                }
            }
        }
    }

    /// Says whether GitLab may be asked.
    pub fn may_ask(&self, now: Timestamp) -> bool {
        !self.pause.is_some_and(|pause| pause.holds(now))
    }

    /// Says why GitLab is not asked, or what was last wrong.
    pub fn reason(&self) -> Option<&str> {
        self.reason.as_deref()
    }
}

impl Default for Health {
    fn default() -> Self {
        Self::new(HealthPolicy::default())
    }
}

enum Judgement {
    Good,
    Wait(Duration),
    Bad(String),
}

fn judge(answer: &Result<RequestReply, Error>) -> Judgement {
    match answer {
        Ok(reply) => match reply {
            RequestReply::Refused => Judgement::Bad(
                "GitLab refuses the runner's token (403); was the runner deleted or its token \
                 changed?"
                    .to_owned(),
            ),
            RequestReply::Busy { retry_after: Some(wait), .. } => Judgement::Wait(*wait),
            RequestReply::Busy { retry_after: None, .. }
            | RequestReply::Job(_)
            | RequestReply::Undecodable(_)
            | RequestReply::NoJob { .. }
            | RequestReply::Conflict
            | RequestReply::TooLarge
            | RequestReply::Orphaned
            | RequestReply::BadRequest
            | RequestReply::Unexpected { .. } => Judgement::Good,
        },
        Err(error) => match error.kind() {
            ErrorKind::Configuration => Judgement::Bad(error.to_string()),
            ErrorKind::Transient | ErrorKind::Refused => Judgement::Good,
        },
    }
}

/// How many requests for jobs a runner may have under way.
///
/// Starts with one and follows the supply: up by a tenth with every job, down by a twentieth with
/// every empty answer, by half when the server is in trouble; between one and the configured number,
/// rounded to whole ones.
#[derive(Clone, Copy, Debug)]
pub struct RequestConcurrency {
    limit: u32,
    millionths: u64,
}

const ONE: u64 = 1_000_000;

impl RequestConcurrency {
    /// Starts with one, up to `limit` (`request_concurrency`, at least one).
    pub fn new(limit: u32) -> Self {
        Self { limit: limit.max(1), millionths: ONE }
    }

    /// Notes an answer.
    pub fn record(&mut self, answer: &Result<RequestReply, Error>) {
        let (times, by) = match answer {
            Ok(reply) => match reply {
                RequestReply::Job(_) | RequestReply::Undecodable(_) => (11, 10),
                RequestReply::NoJob { .. } => (95, 100),
                RequestReply::Busy { .. } => (1, 2),
                RequestReply::Refused
                | RequestReply::Conflict
                | RequestReply::TooLarge
                | RequestReply::Orphaned
                | RequestReply::BadRequest
                | RequestReply::Unexpected { .. } => (1, 1),
            },
            Err(_no_answer) => (1, 1),
        };
        let most = u64::from(self.limit) * ONE;
        self.millionths = (self.millionths * times / by).clamp(ONE, most);
    }

    /// Says how many requests may be under way at once.
    pub fn allowed(self) -> u32 {
        u32::try_from((self.millionths + ONE / 2) / ONE).map_or(self.limit, |n| n.min(self.limit))
    }
}

#[cfg(test)]
mod tests {
    use super::super::error::Cause;
    use super::super::jobs::ReceivedJob;
    use super::super::wire::{JobPayload, Secret};
    use super::*;

    type Answer = Result<RequestReply, Error>;

    const HOUR: u64 = 60 * 60;

    fn at(secs: u64) -> Timestamp {
        Timestamp::from_second(1_780_000_000 + i64::try_from(secs).unwrap()).unwrap()
    }

    fn misconfigured() -> Answer {
        Err(Error::new(Cause::BadUrl("is wrong")))
    }

    fn silent() -> Answer {
        Err(Error::new(Cause::Silent(Duration::from_secs(1))))
    }

    fn no_job() -> Answer {
        Ok(RequestReply::NoJob { last_update: None })
    }

    fn busy(secs: Option<u64>) -> Answer {
        Ok(RequestReply::Busy { status: 503, retry_after: secs.map(Duration::from_secs) })
    }

    fn job() -> Answer {
        Ok(RequestReply::Job(Box::new(ReceivedJob {
            payload: JobPayload::default(),
            raw: Secret::default(),
            request_id: String::new(),
        })))
    }

    #[test]
    fn three_refusals_in_a_row_pause_the_runner_for_an_hour() {
        let mut health = Health::default();
        for second in 0..2 {
            health.record(&Ok(RequestReply::Refused), at(second));
            assert!(health.may_ask(at(second)));
        }
        health.record(&misconfigured(), at(2));
        assert!(!health.may_ask(at(2)));
        assert!(!health.may_ask(at(2 + HOUR - 1)));
        assert_eq!(health.reason(), Some("the URL is wrong"));
        assert!(health.may_ask(at(2 + HOUR)));
    }

    #[test]
    fn after_the_pause_three_more_refusals_are_needed() {
        let mut health = Health::default();
        for second in 0..3 {
            health.record(&Ok(RequestReply::Refused), at(second));
        }
        let later = 2 * HOUR;
        for more in 0..3 {
            assert!(health.may_ask(at(later + more)));
            health.record(&Ok(RequestReply::Refused), at(later + more));
        }
        assert!(!health.may_ask(at(later + 3)));
    }

    #[test]
    fn anything_but_a_refusal_heals() {
        let healing: [fn() -> Answer; 9] = [
            no_job,
            silent,
            job,
            || busy(None),
            || Ok(RequestReply::Conflict),
            || Ok(RequestReply::TooLarge),
            || Ok(RequestReply::Orphaned),
            || Ok(RequestReply::BadRequest),
            || Ok(RequestReply::Unexpected { status: 418 }),
        ];
        for heal in healing {
            let mut health = Health::default();
            for _ in 0..10 {
                health.record(&Ok(RequestReply::Refused), at(0));
                health.record(&Ok(RequestReply::Refused), at(0));
                health.record(&heal(), at(0));
                assert!(health.may_ask(at(0)), "{:?}", heal());
                assert_eq!(health.reason(), None);
            }
        }
    }

    #[test]
    fn the_time_that_the_server_names_is_waited_for() {
        let mut health = Health::default();
        health.record(&busy(Some(60)), at(0));
        assert!(!health.may_ask(at(59)));
        assert!(health.may_ask(at(60)));
        health.record(&no_job(), at(60));
        assert_eq!(health.reason(), None);
    }

    #[test]
    fn a_clock_set_back_does_not_lengthen_a_pause() {
        let mut health = Health::default();
        for _ in 0..3 {
            health.record(&Ok(RequestReply::Refused), at(1000 * HOUR));
        }
        assert!(!health.may_ask(at(1000 * HOUR)));
        assert!(health.may_ask(at(0)));
    }

    #[test]
    fn jobs_raise_the_concurrency_up_to_the_limit_and_no_further() {
        let mut concurrency = RequestConcurrency::new(3);
        assert_eq!(concurrency.allowed(), 1);
        let seen: Vec<u32> = (0..20)
            .map(|_| {
                concurrency.record(&job());
                concurrency.allowed()
            })
            .collect();
        assert_eq!(seen[3..5], [1, 2], "1.1⁴ < 1.5 < 1.1⁵");
        assert!(seen.is_sorted());
        assert_eq!(seen.last(), Some(&3));
        concurrency.record(&busy(None));
        assert_eq!(concurrency.allowed(), 2, "half of three, rounded");
    }

    #[test]
    fn trouble_halves_and_emptiness_lowers_to_one_and_no_lower() {
        let mut concurrency = RequestConcurrency::new(100);
        for _ in 0..60 {
            concurrency.record(&job());
        }
        assert_eq!(concurrency.allowed(), 100);
        concurrency.record(&busy(None));
        assert_eq!(concurrency.allowed(), 50);
        concurrency.record(&no_job());
        assert_eq!(concurrency.allowed(), 48, "47.5, rounded");
        concurrency.record(&silent());
        concurrency.record(&Ok(RequestReply::Conflict));
        assert_eq!(concurrency.allowed(), 48);
        for _ in 0..200 {
            concurrency.record(&no_job());
        }
        assert_eq!(concurrency.allowed(), 1);
        concurrency.record(&busy(None));
        assert_eq!(concurrency.allowed(), 1);
    }

    #[test]
    fn a_limit_of_nothing_is_one() {
        let mut concurrency = RequestConcurrency::new(0);
        concurrency.record(&job());
        assert_eq!(concurrency.allowed(), 1);
    }
}
