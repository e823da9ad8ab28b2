//! Where a job's trace is written: its plan, its masks, its spool.

use std::sync::{Arc, Mutex, PoisonError};

use camino::Utf8PathBuf;
use jiff::Timestamp;

use crate::domain::id::JobId;
use crate::gitlab::wire::{JobPayload, Secret};
use crate::job::{self, Plan, Slot};
use crate::reconcile::{Inner, PREPARED_MOST, PREPARED_SIZE, RunnerEntry, Step, StepError};
use crate::store::{Job, StoreError};
use crate::telemetry::Chain;
use crate::trace::mask::default_prefixes;
use crate::trace::{Carry, Composer, ComposerOptions, Masker, Opened, Spool};

/// How much of a trace's end is searched for open sections; most traces are shorter as a whole.
const SECTIONS_WITHIN: u64 = 16 << 20;

/// A job's payload, understood.
#[derive(Debug)]
pub(in crate::reconcile) struct Prepared {
    pub(in crate::reconcile) payload: JobPayload,
    /// What is to be done, or why it cannot be.
    pub(in crate::reconcile) plan: Result<Plan, job::Unrunnable>,
    mask: Arc<Masker>,
    /// The log's unfinished last line as it was last seen: where, and how long.
    waiting: Mutex<Option<(u64, usize)>>,
}

impl Prepared {
    pub(in crate::reconcile) fn debug_trace(&self) -> bool {
        self.plan.as_ref().is_ok_and(|plan| plan.debug_trace)
    }

    fn timestamps(&self) -> bool {
        self.plan.as_ref().map_or(true, |plan| plan.timestamps)
    }

    /// Tells whether an unfinished line is as long as it was, and remembers its length.
    pub(in crate::reconcile) fn stands_still(&self, offset: u64, len: usize) -> bool {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let same = *waiting == Some((offset, len));
        *waiting = Some((offset, len));
        same
    }
}

/// A job's trace, open for writing.
#[derive(Debug)]
pub(in crate::reconcile) struct Desk {
    pub(in crate::reconcile) spool: Spool,
    pub(in crate::reconcile) composer: Composer,
    /// Composed, not yet in the spool.
    pub(in crate::reconcile) out: Vec<u8>,
    /// Bytes are missing from the spool that GitLab may have.
    pub(in crate::reconcile) hole: bool,
}

impl Inner {
    pub(in crate::reconcile) fn spool_path(&self, id: JobId) -> Utf8PathBuf {
        self.settings().spool_dir.join(format!("{id}.trace"))
    }

    /// Reads a job's payload.
    ///
    /// One that was changed in the database is as good as empty: it makes no sense, and all callers
    /// know what to do then.
    pub(in crate::reconcile) async fn payload(&self, id: JobId) -> Result<Secret, StepError> {
        match self.store.payload(id).await {
            Ok(text) => text.ok_or(StepError::NoPayload),
            Err(error @ StoreError::Sealed { .. }) => {
                tracing::error!(job = %id, error = %Chain(&error), "the payload cannot be read");
                Ok(Secret::new(""))
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Gives a job's payload and plan, from memory or made again.
    pub(in crate::reconcile) async fn prepared(
        &self,
        job: &Job,
        runner: &RunnerEntry,
    ) -> Result<Arc<Prepared>, StepError> {
        if let Some(known) = self.desktop().prepared.get(&job.id) {
            return Ok(Arc::clone(known));
        }
        let text = self.payload(job.id).await?;
        let payload: JobPayload =
            serde_json::from_str(text.expose()).map_err(StepError::Payload)?;
        let large = text.expose().len() > PREPARED_SIZE;
        drop(text);
        let slot = Slot { concurrent: job.slot, project: job.project_slot };
        let plan = job::plan_at(&payload, &runner.context, slot, job.workspace.as_deref());
        let inputs = match &plan {
            Ok(plan) => plan.mask.clone(),
            // What cannot be run is refused in the trace, which may show none of its secrets either.
            Err(_unrunnable) => job::MaskInputs::of(&payload),
        };
        let prefixes = default_prefixes(inputs.all_default_prefixes)
            .iter()
            .copied()
            .chain(inputs.prefixes.iter().map(String::as_str));
        let mask =
            Arc::new(Masker::of_secrets(inputs.phrases.iter().map(Secret::expose), prefixes)?);
        let prepared = Arc::new(Prepared { payload, plan, mask, waiting: Mutex::new(None) });
        if large {
            return Ok(prepared);
        }
        let mut desk = self.desktop();
        if desk.prepared.len() >= PREPARED_MOST
            && let Some(any) = desk.prepared.keys().next().copied()
        {
            desk.prepared.remove(&any);
        }
        desk.prepared.insert(job.id, Arc::clone(&prepared));
        Ok(prepared)
    }

    pub(in crate::reconcile) fn forget_prepared(&self, id: JobId) {
        self.desktop().prepared.remove(&id);
    }
}

impl Step<'_> {
    pub(in crate::reconcile) async fn prepared(&self) -> Result<Arc<Prepared>, StepError> {
        self.r.prepared(&self.job, &self.runner).await
    }

    /// Goes on with the trace that this step has open, or opens it.
    pub(in crate::reconcile) fn take_desk(
        &mut self,
        prepared: &Prepared,
    ) -> Result<Desk, StepError> {
        match self.desk.take() {
            Some(desk) => Ok(desk),
            None => self.open_desk(prepared),
        }
    }

    /// Opens the job's trace where its row says it ends (crash point E).
    pub(in crate::reconcile) fn open_desk(&self, prepared: &Prepared) -> Result<Desk, StepError> {
        let (spool, opened) = Spool::open(&self.r.spool_path(self.job.id), self.job.trace_len)?;
        let hole = match opened {
            Opened::Whole | Opened::Cut { .. } => false,
            Opened::Short { missing } => {
                tracing::error!(
                    job = %self.job.id, missing,
                    "the spool is shorter than it was; the trace goes on without a checksum"
                );
                true
            }
        };
        let carry: Carry = self
            .job
            .trace_carry
            .as_deref()
            .map(serde_json::from_str)
            .transpose()
            .map_err(StepError::Payload)?
            .unwrap_or_default();
        let composer = Composer::new(
            ComposerOptions {
                timestamps: prepared.timestamps(),
                sections: prepared.payload.features.trace_sections,
                output_limit: self.runner.output_limit,
                mask: Arc::clone(&prepared.mask),
            },
            carry,
        );
        Ok(Desk { spool, composer, out: Vec::new(), hole })
    }

    /// Makes what was composed durable and notes its length in the row, which is not written yet.
    pub(in crate::reconcile) async fn keep(&mut self, desk: Desk) -> Result<Desk, StepError> {
        self.job.trace_hole |= desk.hole;
        if desk.out.is_empty() {
            // Log that was used up without a word in the trace (left out, masked) is remembered too.
            self.note_carry(&desk)?;
            return Ok(desk);
        }
        let job = self.job.id;
        let desk = tokio::task::spawn_blocking(move || -> Result<Desk, StepError> {
            let mut desk = desk;
            desk.spool.append(&desk.out)?;
            desk.out.clear();
            desk.spool.sync()?;
            Ok(desk)
        })
        .await
        .map_err(|error| {
            tracing::error!(job = %job, error = %error, "writing the spool panicked");
            StepError::NoPayload
        })??;
        self.job.trace_len = desk.spool.len();
        self.note_carry(&desk)?;
        self.r.crash_point("E");
        Ok(desk)
    }

    fn note_carry(&mut self, desk: &Desk) -> Result<(), StepError> {
        let carry = serde_json::to_string(desk.composer.carry()).map_err(StepError::Payload)?;
        self.job.trace_carry = Some(carry);
        Ok(())
    }

    /// Ends the sections that a killed script, or a daemon that died in a stage, left open.
    pub(in crate::reconcile) fn close_sections(&self, desk: &mut Desk) -> Result<(), StepError> {
        for name in self.open_sections(desk)? {
            desk.composer.section_end(self.line_time(), &name, &mut desk.out);
        }
        Ok(())
    }

    /// Names the sections of stages and steps that were begun and not ended, the last one first.
    pub(in crate::reconcile) fn open_sections(
        &self,
        desk: &Desk,
    ) -> Result<Vec<String>, StepError> {
        let from = self.job.trace_len.saturating_sub(SECTIONS_WITHIN);
        let limit = usize::try_from(self.job.trace_len - from).unwrap_or(usize::MAX);
        let mut trace = desk.spool.read(from, limit)?;
        trace.extend_from_slice(&desk.out);
        let ours = |name: &str| {
            name.starts_with("step_")
                || matches!(
                    name,
                    "after_script"
                        | "get_sources"
                        | "restore_cache"
                        | "download_artifacts"
                        | "archive_cache"
                        | "archive_cache_on_failure"
                        | "upload_artifacts_on_success"
                        | "upload_artifacts_on_failure"
                )
        };
        Ok(crate::trace::left_open(&trace, ours).into_iter().collect())
    }

    /// Gives the time for lines that are written now.
    pub(in crate::reconcile) fn line_time(&self) -> Timestamp {
        self.now()
    }
}
