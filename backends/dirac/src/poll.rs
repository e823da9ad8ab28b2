//! Asks for the state of many jobs: one search, and one more with the histories of those that have ended.

use std::collections::{BTreeMap, HashMap};

use bridge_backend::{ExternalId, JobRef, Observation, Result};

use crate::dirac::{Dirac, number};
use crate::pieces::Heard;
use crate::search::{HISTORY, Row, STATE};
use crate::verdict::{self, Reading};

impl Dirac {
    pub(crate) async fn observe(
        &self,
        jobs: &[JobRef],
    ) -> Result<BTreeMap<ExternalId, Observation>> {
        let mut answer = BTreeMap::new();
        let mut ids = Vec::new();
        for job in jobs {
            match number(&job.id) {
                Some(id) => ids.push(id),
                // What is no number was never DIRAC's.
                None => {
                    answer.insert(job.id.clone(), Observation::Gone);
                }
            }
        }
        ids.sort_unstable();
        ids.dedup();
        if ids.is_empty() {
            return Ok(answer);
        }
        let rows = self.jobs_of_ids(&ids, STATE).await?;
        let mut rows: HashMap<u64, Row> = rows.into_iter().map(|row| (row.id, row)).collect();
        let ended: Vec<u64> = rows
            .values()
            .filter(|row| self.reading(row) == Reading::NeedHistory)
            .map(|row| row.id)
            .collect();
        if !ended.is_empty() {
            for row in self.jobs_of_ids(&ended, HISTORY).await? {
                rows.insert(row.id, row);
            }
        }
        for job in jobs {
            let Some(id) = number(&job.id) else { continue };
            let seen = match rows.get(&id) {
                // The answer was complete, so there is none; or the id is another one's.
                None => Observation::Gone,
                Some(row) if row.name.as_deref() != Some(job.token.as_str()) => Observation::Gone,
                Some(row) => match self.reading(row) {
                    Reading::Tell(observation) => observation,
                    Reading::NeedHistory | Reading::NoNews => continue,
                },
            };
            // A job of another name is not ours, whatever it says.
            if let Some(row) =
                rows.get(&id).filter(|row| row.name.as_deref() == Some(job.token.as_str()))
            {
                let over = matches!(seen, Observation::Ended { .. });
                self.shelf.polled(id, &job.token, Heard::of(row, over));
            } else {
                self.shelf.gone(id, &job.token);
            }
            answer.insert(job.id.clone(), seen);
        }
        Ok(answer)
    }

    fn reading(&self, row: &Row) -> Reading {
        // The helper has its grace, and then some time to tell of it.
        let grace = self.config.kill_grace + self.config.cancel_interval + KILL_TOLD_WITHIN;
        verdict::read(row, self.client.server_time(), grace)
    }

    /// Asks whether one job is over.
    pub(crate) async fn is_over(&self, job: &JobRef) -> Result<bool> {
        let seen = self.observe(std::slice::from_ref(job)).await?;
        Ok(matches!(seen.get(&job.id), Some(Observation::Ended { .. } | Observation::Gone)))
    }
}

/// How long a killed job may take to hand in its last piece and to say so.
const KILL_TOLD_WITHIN: std::time::Duration = std::time::Duration::from_secs(60);
