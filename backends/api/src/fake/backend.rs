//! The fake's translator: every call, against the world and the contract.

use std::collections::{BTreeMap, BTreeSet};

use async_trait::async_trait;
use bytes::Bytes;
use camino::Utf8Path;

use super::world::{Doubt, Job, State};
use super::{Call, FakeOptions, FakeWorld, Plan, Trouble, Verb};
use crate::{
    Backend, BackendError, Capabilities, ErrorKind, ExternalId, Fault, JobRef, JobSpec, LogChunk,
    Lookup, Observation, Outcome, Remedy, Result, SubmitToken, Usage,
};

/// A backend of a [`FakeWorld`]; holds nothing that a restart would miss.
#[derive(Debug)]
pub struct FakeBackend {
    world: FakeWorld,
    capabilities: Capabilities,
}

impl FakeBackend {
    /// Makes a backend in a world of its own.
    pub fn new(options: FakeOptions) -> Self {
        Self::of(FakeWorld::new(options))
    }

    pub(super) fn of(world: FakeWorld) -> Self {
        let capabilities = world.lock().options.capabilities.clone();
        Self { world, capabilities }
    }

    /// Gives a handle of the other side.
    pub fn world(&self) -> FakeWorld {
        self.world.clone()
    }

    /// Makes one call: notes it, has it go wrong if it shall, and else does it.
    async fn call<T>(
        &self,
        call: Call,
        act: impl FnOnce(&mut State) -> Result<T> + Send,
    ) -> Result<T> {
        let verb = call.verb;
        // In a block: the lock is not held over the await.
        let done = {
            let mut state = self.world.lock();
            let tokens = call.tokens.clone();
            state.calls.push(call);
            state.go(verb, &tokens, act)
        };
        match done {
            Some(result) => result,
            None => std::future::pending().await,
        }
    }
}

impl State {
    /// Does a call with what goes wrong; `None` when it never returns.
    fn go<T>(
        &mut self,
        verb: Verb,
        tokens: &[SubmitToken],
        act: impl FnOnce(&mut Self) -> Result<T>,
    ) -> Option<Result<T>> {
        let trouble = match self.outages.get(&verb) {
            Some(kind) => Some(Trouble::Fail(*kind)),
            None => self.troubles.get_mut(&verb).and_then(|queue| queue.pop_front()),
        };
        let in_doubt = match verb {
            Verb::Submit => ErrorKind::Ambiguous,
            Verb::Check
            | Verb::Find
            | Verb::Poll
            | Verb::ReadLog
            | Verb::Collect
            | Verb::Cancel
            | Verb::Release => ErrorKind::Transient,
        };
        let lost = || Some(Err(BackendError::new(in_doubt, "hear the other side")));
        if self.locked_out {
            let error = BackendError::new(ErrorKind::Transient, "log in: test");
            return Some(Err(error.with_remedy(Remedy::Login)));
        }
        let answer = match trouble {
            None => return Some(act(self)),
            Some(Trouble::Fail(kind)) => {
                let failed = Some(Err(BackendError::new(kind, "do what was asked: test")));
                if kind != ErrorKind::Ambiguous {
                    return failed;
                }
                failed
            }
            Some(Trouble::LostQuestion) => lost(),
            Some(Trouble::HangBefore) => None,
            // A refusal is lost like any answer; what it refused has been noted.
            Some(Trouble::LostAnswer) => act(self).map_or_else(|_refused| lost(), |_| lost()),
            Some(Trouble::HangAfter) => act(self).map_or_else(|_refused| None, |_| None),
        };
        if verb == Verb::Submit {
            for token in tokens {
                let doubt = Doubt { since: self.now, absent: false };
                self.doubts.insert(token.clone(), doubt);
            }
        }
        answer
    }

    /// Notes a breach of the contract and refuses.
    fn violation<T>(&mut self, what: String) -> Result<T> {
        let error = BackendError::new(
            ErrorKind::Rejected(Fault::Site),
            format!("allow a breach of the contract: {what}"),
        );
        self.violations.push(what);
        Err(error)
    }

    /// Finds a job by both of its names, if the other side still has it.
    fn known(&mut self, job: &JobRef) -> Option<&mut Job> {
        self.jobs.get_mut(&job.token).filter(|known| known.job == *job && known.is_known())
    }

    fn submit(&mut self, token: &SubmitToken, spec: &JobSpec) -> Result<ExternalId> {
        let known = &self.options.known_options;
        if let Some(key) = spec.options.keys().find(|key| !known.contains(key)) {
            let what = format!("use the option {key:?}");
            return Err(BackendError::new(ErrorKind::Rejected(Fault::Job), what));
        }
        let lookup = self.options.capabilities.lookup;
        if let Some(job) = self.jobs.get_mut(token) {
            return match lookup {
                Lookup::Resubmit => {
                    job.submissions += 1;
                    Ok(job.job.id.clone())
                }
                Lookup::ByToken { .. } | Lookup::Never => {
                    self.violation(format!("{token} was submitted twice, the job would run twice"))
                }
            };
        }
        if let Some(doubt) = self.doubts.remove(token) {
            match lookup {
                Lookup::Resubmit => {}
                Lookup::ByToken { .. } if doubt.absent => {}
                Lookup::ByToken { settle } => {
                    return self.violation(format!(
                        "{token} was submitted again without having been looked for and not found \
                         {settle:?} after the attempt"
                    ));
                }
                Lookup::Never => {
                    return self.violation(format!("{token} was submitted again after a doubt"));
                }
            }
        }
        self.last_id += 1;
        let id = ExternalId(format!("fake-{}", self.last_id));
        let job = Job {
            job: JobRef { token: token.clone(), id: id.clone() },
            spec: spec.clone(),
            status: Observation::Pending { reason: None, starts_at: None },
            log: Vec::new(),
            log_open: false,
            files: BTreeMap::new(),
            visible_at: self.now.saturating_add(self.hide_new),
            silent: false,
            ignores_cancel: false,
            cancels: 0,
            submissions: 1,
            released: false,
            polls: 0,
        };
        self.jobs.insert(token.clone(), job);
        Ok(id)
    }

    fn find(&mut self, tokens: &[SubmitToken]) -> Result<BTreeMap<SubmitToken, ExternalId>> {
        self.check_batch("find", tokens.len())?;
        let settle = match self.options.capabilities.lookup {
            Lookup::ByToken { settle } => settle,
            Lookup::Resubmit | Lookup::Never => {
                return self.violation("find is not how this backend resolves doubts".into());
            }
        };
        let mut found = BTreeMap::new();
        for token in tokens {
            match self.jobs.get(token) {
                Some(job) if job.is_known() && job.visible_at <= self.now => {
                    found.insert(token.clone(), job.job.id.clone());
                }
                Some(_) | None => {
                    if let Some(doubt) = self.doubts.get_mut(token) {
                        doubt.absent = self.now >= doubt.since.saturating_add(settle);
                    }
                }
            }
        }
        Ok(found)
    }

    fn poll(&mut self, jobs: &[JobRef]) -> Result<BTreeMap<ExternalId, Observation>> {
        self.check_batch("poll", jobs.len())?;
        if jobs.iter().collect::<BTreeSet<_>>().len() < jobs.len() {
            return self.violation("poll was asked for a job twice".into());
        }
        let plan = self.options.plan.clone();
        let mut seen = BTreeMap::new();
        for asked in jobs {
            match self.known(asked) {
                None => {
                    seen.entry(asked.id.clone()).or_insert(Observation::Gone);
                }
                Some(job) if job.silent => {}
                Some(job) => {
                    if let Some(plan) = &plan {
                        job.follow(plan);
                    }
                    seen.insert(asked.id.clone(), job.status.clone());
                }
            }
        }
        Ok(seen)
    }

    fn check_batch(&mut self, verb: &str, asked: usize) -> Result<()> {
        let most = self.options.capabilities.poll_batch.get();
        if asked > most {
            return self
                .violation(format!("{verb} was asked for {asked} jobs, {most} are allowed"));
        }
        Ok(())
    }

    fn read_log(&mut self, job: &JobRef, from: u64, limit: usize) -> Result<LogChunk> {
        let live = self.options.capabilities.live_log;
        let released = self.jobs.get(&job.token).is_some_and(|job| job.released);
        if released {
            return self.violation(format!("the log of {} was read after its release", job.token));
        }
        let Some(known) = self.known(job) else {
            let what = format!("read the log of {}, which is gone", job.token);
            return Err(BackendError::new(ErrorKind::Lost, what));
        };
        let ended = known.outcome().is_some();
        let readable: &[u8] = if live || ended { &known.log } else { &[] };
        let start = usize::try_from(from).unwrap_or(usize::MAX);
        let (Some(rest), true) = (readable.get(start..), limit > 0) else {
            let len = readable.len();
            let what = format!(
                "the log of {} was read from byte {from}, at most {limit}, of {len}",
                job.token
            );
            return self.violation(what);
        };
        let (bytes, more) = rest.split_at_checked(limit).unwrap_or((rest, &[]));
        let end = ended && !known.log_open && more.is_empty();
        Ok(LogChunk { bytes: Bytes::copy_from_slice(bytes), end })
    }

    /// Writes what the job left and was asked for into a directory; what is there already is replaced.
    fn collect(&mut self, asked: &JobRef, into: &Utf8Path) -> Result<()> {
        if self.jobs.get(&asked.token).is_some_and(|job| job.released) {
            return self.violation(format!("{} was brought home after its release", asked.token));
        }
        let Some(job) = self.known(asked) else {
            let what = format!("bring home the outputs of {}, which is gone", asked.token);
            return Err(BackendError::new(ErrorKind::Lost, what));
        };
        if job.outcome().is_none() {
            return self.violation(format!("{} was brought home before its end", asked.token));
        }
        let wanted = |path: &Utf8Path| {
            job.spec
                .outputs
                .iter()
                .any(|pattern| fits(pattern.0.as_bytes(), path.as_str().as_bytes()))
        };
        for (path, bytes) in job.files.iter().filter(|(path, _)| wanted(path)) {
            let path = into.join(path);
            let write = || -> std::io::Result<()> {
                if let Some(above) = path.parent() {
                    std::fs::create_dir_all(above)?;
                }
                std::fs::write(&path, bytes)
            };
            write().map_err(|error| {
                let what = format!("write {path}");
                BackendError::new(ErrorKind::Transient, what).with_source(error)
            })?;
        }
        Ok(())
    }

    fn cancel(&mut self, jobs: &[JobRef]) {
        for asked in jobs {
            let Some(job) = self.known(asked) else { continue };
            job.cancels += 1;
            if job.outcome().is_none() && !job.ignores_cancel {
                let outcome = Outcome::Cancelled { by: None };
                job.status = Observation::Ended { outcome, usage: Usage::default() };
            }
        }
    }

    fn release(&mut self, asked: &JobRef) -> Result<()> {
        let Some(job) = self.known(asked) else { return Ok(()) };
        if job.outcome().is_none() {
            return self.violation(format!("{} was released before its end", asked.token));
        }
        job.released = true;
        Ok(())
    }
}

impl Job {
    /// Takes the next step of the plan, unless the test took the job into its own hands.
    fn follow(&mut self, plan: &Plan) {
        let ours = match &self.status {
            Observation::Pending { .. } | Observation::Running { .. } => true,
            Observation::Ended { .. } | Observation::Gone | Observation::Unclear { .. } => false,
        };
        if !ours {
            return;
        }
        let step = self.polls;
        self.polls += 1;
        let Some(run) = step.checked_sub(plan.pending) else { return };
        if run >= plan.running.max(plan.log.len()) {
            let outcome = plan.outcome.clone();
            self.status = Observation::Ended { outcome, usage: Usage::default() };
            return;
        }
        self.status = Observation::Running { host: None };
        if let Some(piece) = plan.log.get(run) {
            self.log.extend_from_slice(piece);
        }
    }
}

/// Says whether a path, or a directory above it, is what a glob of `*`, `**` and plain text means.
fn fits(glob: &[u8], path: &[u8]) -> bool {
    match (glob, path) {
        ([] | [b'/'], rest) => rest.is_empty() || rest.starts_with(b"/"),
        ([b'*', b'*', b'/', rest @ ..], _) if fits(rest, path) => true,
        ([b'*', b'*', rest @ ..], _) => {
            fits(rest, path) || path.split_first().is_some_and(|(_, path)| fits(glob, path))
        }
        ([b'*', rest @ ..], _) => {
            fits(rest, path)
                || path
                    .split_first()
                    .is_some_and(|(first, path)| *first != b'/' && fits(glob, path))
        }
        ([a, glob @ ..], [b, path @ ..]) => a == b && fits(glob, path),
        (_, []) => false,
    }
}

#[async_trait]
impl Backend for FakeBackend {
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn has_login(&self) -> bool {
        true
    }

    async fn check(&self) -> Result<()> {
        let call = Call { verb: Verb::Check, tokens: Vec::new(), range: None };
        self.call(call, |_| Ok(())).await
    }

    async fn submit(&self, token: &SubmitToken, spec: &JobSpec) -> Result<ExternalId> {
        let call = Call { verb: Verb::Submit, tokens: vec![token.clone()], range: None };
        self.call(call, |state| state.submit(token, spec)).await
    }

    async fn find(&self, tokens: &[SubmitToken]) -> Result<BTreeMap<SubmitToken, ExternalId>> {
        let call = Call { verb: Verb::Find, tokens: tokens.to_vec(), range: None };
        self.call(call, |state| state.find(tokens)).await
    }

    async fn poll(&self, jobs: &[JobRef]) -> Result<BTreeMap<ExternalId, Observation>> {
        self.call(about(Verb::Poll, jobs), |state| state.poll(jobs)).await
    }

    async fn read_log(&self, job: &JobRef, from: u64, limit: usize) -> Result<LogChunk> {
        let tokens = vec![job.token.clone()];
        let call = Call { verb: Verb::ReadLog, tokens, range: Some((from, limit)) };
        self.call(call, |state| state.read_log(job, from, limit)).await
    }

    async fn collect(&self, job: &JobRef, into: &Utf8Path) -> Result<()> {
        let call = about(Verb::Collect, std::slice::from_ref(job));
        self.call(call, |state| state.collect(job, into)).await
    }

    async fn cancel(&self, jobs: &[JobRef]) -> Result<()> {
        self.call(about(Verb::Cancel, jobs), |state| {
            state.cancel(jobs);
            Ok(())
        })
        .await
    }

    async fn release(&self, job: &JobRef) -> Result<()> {
        let call = about(Verb::Release, std::slice::from_ref(job));
        self.call(call, |state| state.release(job)).await
    }
}

fn about(verb: Verb, jobs: &[JobRef]) -> Call {
    Call { verb, tokens: jobs.iter().map(|job| job.token.clone()).collect(), range: None }
}
