//! Asks for the state of many jobs: one search, and one more with the histories of those that have ended.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use bridge_backend::{ExternalId, JobRef, Observation, Result};

use crate::dirac::{Dirac, number};
use crate::fallback::Words;
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
        let unheard = self.ask_for_words(&mut rows).await;
        for job in jobs {
            let Some(id) = number(&job.id).filter(|id| !unheard.contains(id)) else { continue };
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

    /// Looks for the last words of jobs that DIRAC calls over and that said nothing by themselves.
    ///
    /// A job that told its end costs nothing here; of others, some are asked for in each cycle.
    /// Gives those that must wait for it.
    async fn ask_for_words(&self, rows: &mut HashMap<u64, Row>) -> BTreeSet<u64> {
        let mut unheard = BTreeSet::new();
        let mut silent: Vec<u64> = Vec::new();
        for row in rows.values_mut().filter(|row| verdict::is_silent(row)) {
            match self.shelf.words(row.id, row.last_update_time.as_deref()) {
                Some(words) => row.add_word(words),
                None => silent.push(row.id),
            }
        }
        silent.sort_unstable();
        let mut asked = 0_usize;
        for id in silent {
            let Some(row) = rows.get_mut(&id) else { continue };
            let changed = row.last_update_time.clone();
            let words = if asked < WORDS_AT_ONCE { Some(self.last_words(id).await) } else { None };
            match words {
                Some(Ok(Words::Coming)) => asked += 1,
                Some(Ok(words @ (Words::Said(_) | Words::None))) => {
                    let words = match words {
                        Words::Said(words) => Some(words),
                        Words::None | Words::Coming => None,
                    };
                    self.shelf.said(id, changed.as_deref(), words.clone());
                    row.add_word(words);
                    asked += 1;
                    continue;
                }
                Some(Err(error)) => {
                    // The others would only wait for the same answer.
                    asked = WORDS_AT_ONCE;
                    let error: &dyn std::error::Error = &error;
                    tracing::warn!(job = id, error, "the last word of a job cannot be asked for");
                }
                None => {}
            }
            // Not for ever: a sandbox that cannot be read must not keep the job.
            let late =
                self.client.server_time().zip(row.changed()).is_some_and(|(now, changed)| {
                    now.duration_since(changed) > jiff::SignedDuration::from_secs(WORDS_WITHIN)
                });
            if !late {
                unheard.insert(id);
            }
        }
        unheard
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

/// Jobs whose last words are looked for in one cycle; each takes some requests.
const WORDS_AT_ONCE: usize = 8;

/// After so many seconds of an end without a readable last word, DIRAC's word alone counts: a store is
/// away for hours, but not for days.
const WORDS_WITHIN: i64 = 86_400;

/// How long a killed job may take to hand in its last piece and to say so.
const KILL_TOLD_WITHIN: std::time::Duration = std::time::Duration::from_secs(60);
