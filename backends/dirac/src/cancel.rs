//! Killing jobs, and making sure that DIRAC heard it.
//!
//! A change of status that is older than the newest one is ignored, and one that is not allowed is
//! refused; both are answered with 200. So the time that is sent comes after everything in the history,
//! and what comes back is compared with what was asked for.

use std::collections::{BTreeMap, HashMap};

use bridge_backend::{ErrorKind, JobRef, Result};
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
        let mut ids: Vec<u64> = ours.keys().copied().collect();
        ids.sort_unstable();
        let mut missed = self.kill_once(&ids, &ours).await?;
        if !missed.is_empty() {
            // Something was written into their histories meanwhile; now it is known.
            missed = self.kill_once(&missed, &ours).await?;
        }
        if missed.is_empty() {
            return Ok(());
        }
        let error = transient("kill jobs for sure");
        debug_assert!(error.kind() == ErrorKind::Transient);
        let missed: Vec<String> = missed.iter().map(u64::to_string).collect();
        Err(error.with_source(format!("DIRAC did not take it for {}", missed.join(", "))))
    }

    /// Kills those that can be killed, and gives those for which it was not taken.
    async fn kill_once(&self, ids: &[u64], ours: &HashMap<u64, &str>) -> Result<Vec<u64>> {
        let rows = self.jobs_of_ids(ids, HISTORY).await?;
        let wanted: Vec<&Row> = rows
            .iter()
            .filter(|row| row.name.as_deref() == ours.get(&row.id).copied())
            .filter(|row| verdict::can_be_killed(row.status()) && !verdict::has_ended(row))
            .collect();
        let mut missed = Vec::new();
        for rows in wanted.chunks(AT_ONCE) {
            missed.extend(self.kill_these(rows).await?);
        }
        Ok(missed)
    }

    async fn kill_these(&self, rows: &[&Row]) -> Result<Vec<u64>> {
        let mut body = Map::new();
        // The server tells its time in whole seconds, and a job that has just begun is written about
        // several times in one.
        let now = self.client.server_time();
        let now = now.and_then(|now| now.checked_add(SignedDuration::from_secs(1)).ok());
        for row in rows {
            let change = json!({
                "Status": "Killed",
                "MinorStatus": "Marked for termination",
                "Source": SOURCE,
            });
            let time = after(row.history(), now);
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
            let first = Box::pin(self.kill_these(one)).await;
            let second = Box::pin(self.kill_these(other)).await;
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

/// Gives a time that comes after everything in a history, and is not before the server's.
fn after(history: &[Logged], now: Option<Timestamp>) -> String {
    let next = history
        .iter()
        .filter_map(Logged::time)
        .max()
        .and_then(|last| last.checked_add(SignedDuration::from_millis(1)).ok());
    let time = next.max(now).unwrap_or(Timestamp::UNIX_EPOCH);
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
        assert_eq!(after(&history, early), "2026-01-01T00:00:01.501000+00:00");
        assert_eq!(after(&history, None), "2026-01-01T00:00:01.501000+00:00");
        assert_eq!(after(&history, late), "2026-01-01T12:00:00.000000+00:00");
        assert_eq!(after(&[], late), "2026-01-01T12:00:00.000000+00:00");
    }
}
