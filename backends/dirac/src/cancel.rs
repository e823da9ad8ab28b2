//! Killing jobs, and making sure that DIRAC heard it.
//!
//! A change of status that is older than the newest one is ignored, and one that is not allowed is
//! refused; both are answered with 200. So the time that is sent comes after everything in the history,
//! and what comes back is compared with what was asked for.
//!
//! A job that has just begun is written about several times in a second, by others and by their clocks,
//! and what the server says of its own time is up to two seconds old, more when it is busy. So a kill that
//! came too late is dated further ahead each time.

use std::collections::{BTreeMap, HashMap};

use bridge_backend::{JobRef, Result};
use jiff::{SignedDuration, Timestamp};
use reqwest::Method;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::client::with_json;
use crate::dirac::{Dirac, number};
use crate::failure::{nonsense, refused, transient, unasked};
use crate::search::{HISTORY, Logged, Row};
use crate::verdict::{self, SOURCE};

/// Jobs in one change.
const AT_ONCE: usize = 200;

/// By how much a kill comes after the last line of the history, and after the server's time; one pair for
/// each try. Far ahead is no good: what DIRAC writes until then is ignored.
const AHEAD: [(SignedDuration, SignedDuration); 4] = [
    // The server tells its time in whole seconds.
    (SignedDuration::from_millis(1), SignedDuration::from_secs(1)),
    (SignedDuration::from_secs(2), SignedDuration::from_secs(2)),
    (SignedDuration::from_secs(4), SignedDuration::from_secs(4)),
    (SignedDuration::from_secs(8), SignedDuration::from_secs(8)),
];

/// The answer to a change.
#[derive(Deserialize)]
struct Changed {
    success: BTreeMap<String, After>,
}

/// What a job's status is now; none when the change came too late.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct After {
    status: Option<String>,
}

impl Dirac {
    pub(crate) async fn kill(&self, jobs: &[JobRef]) -> Result<()> {
        let ours: HashMap<u64, &str> =
            jobs.iter().filter_map(|job| Some((number(&job.id)?, job.token.as_str()))).collect();
        if ours.is_empty() {
            return Ok(());
        }
        let mut missed: Vec<u64> = ours.keys().copied().collect();
        missed.sort_unstable();
        for ahead in AHEAD {
            // What was written into their histories meanwhile is known now.
            missed = self.kill_once(&missed, &ours, ahead).await?;
            if missed.is_empty() {
                return Ok(());
            }
        }
        let missed: Vec<String> = missed.iter().map(u64::to_string).collect();
        let text = format!("DIRAC did not take it for {}", missed.join(", "));
        Err(transient("kill jobs for sure").with_source(text))
    }

    /// Kills those that can be killed, and gives those for which it was not taken.
    async fn kill_once(
        &self,
        ids: &[u64],
        ours: &HashMap<u64, &str>,
        ahead: (SignedDuration, SignedDuration),
    ) -> Result<Vec<u64>> {
        let rows = self.jobs_of_ids(ids, HISTORY).await?;
        let wanted: Vec<&Row> = rows
            .iter()
            .filter(|row| row.name.as_deref() == ours.get(&row.id).copied())
            .filter(|row| verdict::can_be_killed(row.status()) && !verdict::has_ended(row))
            .collect();
        let mut missed = Vec::new();
        for rows in wanted.chunks(AT_ONCE) {
            missed.extend(self.kill_these(rows, ahead).await?);
        }
        Ok(missed)
    }

    async fn kill_these(
        &self,
        rows: &[&Row],
        ahead: (SignedDuration, SignedDuration),
    ) -> Result<Vec<u64>> {
        let mut body = Map::new();
        let now = self.client.server_time();
        for row in rows {
            let change = json!({
                "Status": "Killed",
                "MinorStatus": "Marked for termination",
                "Source": SOURCE,
            });
            let time = after(row.history(), now, ahead);
            body.insert(row.id.to_string(), json!({ time: change }));
        }
        let body = Value::Object(body);
        let context = "kill jobs";
        let answer = self
            .ask("a kill", || with_json(self.client.ask(Method::PATCH, "api/jobs/status"), &body))
            .await
            .map_err(unasked(context))?;
        if matches!(answer.status, 403 | 404) && rows.len() > 1 {
            // One that vanished or became another's spoils it for all; halves find out which.
            let (one, other) = rows.split_at(rows.len() / 2);
            let first = Box::pin(self.kill_these(one, ahead)).await;
            let second = Box::pin(self.kill_these(other, ahead)).await;
            return Ok([first?, second?].concat());
        }
        if !answer.ok() {
            return Err(refused(context, &answer));
        }
        let changed: Changed = answer.json().map_err(nonsense(context))?;
        let missed = rows.iter().filter(|row| {
            let after = changed.success.get(&row.id.to_string());
            let status = after.and_then(|after| after.status.as_deref());
            // Ended meanwhile is fine; ignored or refused while it can be killed is not.
            status.is_none_or(|status| status != "Killed" && verdict::can_be_killed(status))
        });
        Ok(missed.map(|row| row.id).collect())
    }
}

/// Gives a time that is so much ahead of everything in a history, and of the server's.
fn after(
    history: &[Logged],
    now: Option<Timestamp>,
    (of_last, of_now): (SignedDuration, SignedDuration),
) -> String {
    let last = history.iter().filter_map(Logged::time).max();
    let last = last.and_then(|last| last.checked_add(of_last).ok());
    let now = now.and_then(|now| now.checked_add(of_now).ok());
    let time = last.max(now).unwrap_or(Timestamp::UNIX_EPOCH);
    // With a zone, or it is not taken.
    time.strftime("%Y-%m-%dT%H:%M:%S.%6f+00:00").to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_of_a_change_comes_after_the_last_one_whatever_the_clocks_say() {
        let line = |time: &str| Logged { status_time: Some(time.into()), ..Logged::default() };
        let history = [line("2026-01-01T00:00:01.5Z"), line("2026-01-01T00:00:01")];
        let early = "2025-12-31T00:00:00Z".parse().ok();
        let late = "2026-01-01T12:00:00Z".parse().ok();
        let [once, twice, ..] = AHEAD;
        assert_eq!(after(&history, early, once), "2026-01-01T00:00:01.501000+00:00");
        assert_eq!(after(&history, None, once), "2026-01-01T00:00:01.501000+00:00");
        assert_eq!(after(&history, late, once), "2026-01-01T12:00:01.000000+00:00");
        assert_eq!(after(&[], late, once), "2026-01-01T12:00:01.000000+00:00");
        assert_eq!(after(&history, early, twice), "2026-01-01T00:00:03.500000+00:00");
        assert_eq!(after(&history, late, twice), "2026-01-01T12:00:02.000000+00:00");
    }
}
