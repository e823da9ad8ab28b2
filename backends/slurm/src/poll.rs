//! Asks for the state of many jobs: one `squeue`, and at most one `sacct` and one more `squeue` for the
//! few whose end needs more than that.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use bridge_backend::{BackendError, ErrorKind, ExternalId, JobRef, Observation, Result};

use crate::jobdir::{JobDir, Notes, blocking};
use crate::listing::{Exit, Queue, Record, Row, record};
use crate::slurm::{Books, Slurm};
use crate::verdict::{self, Accounted, Evidence, Listed, Reading};

/// What fits into one word of an argument list; the others get their turn at the next poll.
const MOST_ACCOUNTED: usize = 10_000;

/// A job that is not just waiting or running.
struct Case {
    job: JobRef,
    dir: JobDir,
    /// The id whose word counts: of two submissions of one token the one that started.
    id: u64,
    row: Option<Row>,
    replaced: bool,
    notes: Notes,
    missed_for: Option<Duration>,
}

impl Slurm {
    pub(crate) async fn observe(
        &self,
        jobs: &[JobRef],
    ) -> Result<BTreeMap<ExternalId, Observation>> {
        let mut answer = BTreeMap::new();
        if jobs.is_empty() {
            return Ok(answer);
        }
        let queue = self.queue().await?;
        let mut open = Vec::new();
        for job in unmistakable(jobs) {
            // What is no number was never Slurm's.
            let Ok(id) = job.id.0.parse::<u64>() else {
                answer.insert(job.id.clone(), Observation::Gone);
                continue;
            };
            match queue.of(id, job.token.as_str()).map(|row| (row, verdict::at_a_glance(row))) {
                Some((_, Some(observation))) => {
                    answer.insert(job.id.clone(), observation);
                }
                Some((_, None)) => open.push((job.clone(), id)),
                // It may have been in a line that could not be read.
                None if queue.damaged > 0 => {}
                None => open.push((job.clone(), id)),
            }
        }
        if open.is_empty() {
            return Ok(answer);
        }
        let jobs_dir = self.config.jobs_dir.clone();
        let cases = blocking(move || {
            let read = |(job, id): (JobRef, u64)| {
                let dir = JobDir::of(&jobs_dir, &job.token);
                let path = dir.path().to_owned();
                case(job, id, dir, &queue)
                    .inspect_err(|error| {
                        let error: &dyn std::error::Error = error;
                        tracing::warn!(%path, error, "job directory cannot be read");
                    })
                    .ok()
            };
            open.into_iter().filter_map(read).collect::<Vec<Case>>()
        })
        .await
        .map_err(interrupted)?;
        let readings = self.decide(&cases).await?;
        let told = blocking(move || {
            let told = cases.into_iter().zip(readings);
            told.filter_map(|(case, reading)| Some((case.job.id.clone(), tell(&case, reading)?)))
                .collect::<Vec<_>>()
        });
        answer.extend(told.await.map_err(interrupted)?);
        Ok(answer)
    }

    /// Reads each case, after asking what they need.
    async fn decide(&self, cases: &[Case]) -> Result<Vec<Reading>> {
        let first: Vec<Reading> =
            cases.iter().map(|case| verdict::read(&self.evidence(case, None, None))).collect();
        let asking = |reading: &Reading| {
            let pairs = cases.iter().zip(&first);
            pairs.filter(|(_, r)| *r == reading).map(|(case, _)| case.id).collect::<BTreeSet<_>>()
        };
        let mut ids = asking(&Reading::AskAccounting);
        while ids.len() > MOST_ACCOUNTED {
            ids.pop_last();
        }
        let books = match ids.is_empty() {
            true => None,
            false => Some(self.books_of_ids(&ids).await),
        };
        if let Some(Books::Silent(error)) = &books {
            // Other jobs' news must not wait for it.
            let error: &dyn std::error::Error = error;
            tracing::warn!(error, jobs = ids.len(), "accounting did not answer");
        }
        let exits = match asking(&Reading::AskExit).is_empty() {
            true => None,
            false => Some(self.exit_statuses().await?),
        };
        let second = |(case, reading): (&Case, Reading)| match reading {
            Reading::AskAccounting if !ids.contains(&case.id) => Reading::NoNews,
            Reading::AskAccounting | Reading::AskExit => {
                verdict::read(&self.evidence(case, books.as_ref(), exits.as_ref()))
            }
            Reading::Tell(_) | Reading::Over { .. } | Reading::NoNews => reading,
        };
        let pairs: Vec<(&Case, Reading)> = cases.iter().zip(first.clone()).collect();
        Ok(pairs.into_iter().map(second).collect())
    }

    fn evidence<'a>(
        &self,
        case: &'a Case,
        books: Option<&'a Books>,
        exits: Option<&HashMap<u64, Exit>>,
    ) -> Evidence<'a> {
        Evidence {
            listed: match &case.row {
                Some(row) => Listed::Row(row),
                None if case.replaced => Listed::Replaced,
                None => Listed::Absent,
            },
            accounted: match books {
                None => Accounted::NotAsked,
                Some(Books::None) => Accounted::None,
                Some(Books::Silent(_)) => Accounted::Silent,
                Some(Books::Rows(rows)) => match record(rows, case.id, case.job.token.as_str()) {
                    Record::Row(row) => Accounted::Row(row),
                    Record::Nameless => Accounted::Silent,
                    Record::None => Accounted::Absent,
                },
            },
            notes: &case.notes,
            exit: exits.map(|exits| exits.get(&case.id).copied()),
            missed_for: case.missed_for,
            settle: self.config.settle,
        }
    }
}

fn interrupted(error: tokio::task::JoinError) -> BackendError {
    BackendError::new(ErrorKind::Transient, "read the job directories").with_source(error)
}

/// Leaves out jobs that share an id: the answer could not say which one it means.
///
/// It takes a crash of the controller to give an id twice, and then the one job must not be told the
/// other one's end. Asked one by one, each gets its own answer.
fn unmistakable(jobs: &[JobRef]) -> impl Iterator<Item = &JobRef> {
    let mut tokens: HashMap<&ExternalId, BTreeSet<&str>> = HashMap::new();
    for job in jobs {
        tokens.entry(&job.id).or_default().insert(job.token.as_str());
    }
    for (external_id, tokens) in tokens.iter().filter(|(_, tokens)| tokens.len() > 1) {
        tracing::error!(%external_id, ?tokens, "several jobs have one id; poll them one by one");
    }
    jobs.iter().filter(move |job| tokens.get(&job.id).is_some_and(|tokens| tokens.len() == 1))
}

/// Reads what a job's files say, and finds the row that counts.
fn case(
    job: JobRef,
    id: u64,
    dir: JobDir,
    queue: &Queue,
) -> std::result::Result<Case, crate::jobdir::FileError> {
    let notes = dir.notes()?;
    let name = job.token.as_str();
    // Two submissions of one token can both be there when the first one's answer was lost for longer
    // than anybody waits. Only one of them started, and it says which.
    let id = notes.started.unwrap_or(id);
    let row = queue.of(id, name).cloned();
    let replaced = row.is_none() && queue.of_id(id).is_some();
    let own = notes.result.as_ref().and_then(bridge_backend::result::JobResult::outcome);
    let waits =
        row.as_ref().is_none_or(|row| matches!(row.phase(), crate::listing::Phase::Final(_)));
    let missed_for = if notes.exists && !notes.over && own.is_none() && waits {
        // Where no mark can be left there is no waiting either: a full disk takes no result.
        dir.missed_for().ok()
    } else {
        None
    };
    Ok(Case { job, dir, id, row, replaced, notes, missed_for })
}

/// Tells a reading, after leaving the mark that the job is over.
fn tell(case: &Case, reading: Reading) -> Option<Observation> {
    match reading {
        Reading::Tell(observation) => Some(observation),
        Reading::Over { observation, early } => match case.dir.seal(early) {
            Ok(()) => Some(observation),
            Err(error) => {
                let error: &dyn std::error::Error = &error;
                tracing::warn!(path = %case.dir.path(), error, "job cannot be marked as over");
                // Without the mark, what Slurm may still add would change a log that has ended; its
                // last word comes soon. After that word nothing is added any more.
                (!early).then_some(observation)
            }
        },
        Reading::NoNews | Reading::AskAccounting | Reading::AskExit => None,
    }
}
