//! What every check needs: submitting, waiting, reading, cleaning up.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use camino::{Utf8Path, Utf8PathBuf};
use tokio::time::Instant;

use super::{Harness, unique};
use crate::{
    Backend, BackendError, EnvVar, ErrorKind, Filesystem, JobRef, JobSpec, Limits, Lookup,
    Observation, Outcome, SubmitToken,
};

/// How a check ended that found nothing wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Done {
    /// It looked.
    Checked,
    /// It could not look.
    Skipped(String),
}

/// How a check ended.
pub(super) type Checked = Result<Done, String>;

/// Ends a check when something is not as the contract has it.
macro_rules! ensure {
    ($holds:expr, $($story:tt)+) => {
        if !$holds {
            return Err(format!($($story)+));
        }
    };
}
pub(super) use ensure;

/// Between two looks. The only time the suite sleeps, and only while it waits for something to see.
const PAUSE: Duration = Duration::from_millis(100);

/// One check's view of the harness.
pub(super) struct Trial<'a> {
    pub(super) harness: &'a mut dyn Harness,
    pub(super) backend: Arc<dyn Backend>,
    /// Everything submitted, to be cleaned up.
    jobs: Vec<JobRef>,
}

impl<'a> Trial<'a> {
    pub(super) fn new(harness: &'a mut dyn Harness) -> Self {
        let backend = harness.open();
        Self { harness, backend, jobs: Vec::new() }
    }

    pub(super) fn patience(&self) -> Duration {
        self.harness.patience()
    }

    /// Opens the backend anew, as after a restart.
    pub(super) fn restart(&mut self) {
        self.backend = self.harness.open();
    }

    /// Makes a token that was never used.
    pub(super) fn token() -> Result<SubmitToken, String> {
        SubmitToken::parse(&format!("cf-{:016x}", unique())).map_err(|error| error.to_string())
    }

    /// Makes a job of a script, in a workspace of its own.
    ///
    /// Where the workspace travels, the script goes back to where it came from, since the checks look
    /// there. Its path is written in another way, because a backend may give it the copy's.
    pub(super) fn spec(&mut self, script: impl Into<String>) -> JobSpec {
        let workspace = self.harness.workspace();
        let mut script = script.into();
        if self.backend.capabilities().filesystem == Filesystem::Sandbox {
            let (parent, name) = (workspace.parent(), workspace.file_name());
            let (parent, name) = (parent.unwrap_or(&workspace), name.unwrap_or_default());
            script = format!("cd '{parent}/./{name}' || exit 99\n{script}");
        }
        self.travelling(script, workspace)
    }

    /// Makes a job of a script that runs in whatever directory the backend gives it.
    pub(super) fn travelling(
        &mut self,
        script: impl Into<String>,
        workspace: Utf8PathBuf,
    ) -> JobSpec {
        JobSpec {
            label: "conformance: Ärger & \"quotes\" $HOME `id` \\".to_owned(),
            script: script.into(),
            env: Vec::new(),
            workspace,
            outputs: Vec::new(),
            limits: Limits::default(),
            options: toml::Table::new(),
        }
    }

    /// Submits a job under a new token.
    pub(super) async fn submit(&mut self, spec: &JobSpec) -> Result<JobRef, String> {
        let token = Self::token()?;
        let id = self.backend.submit(&token, spec).await.map_err(story("submit"))?;
        Ok(self.note(token, id))
    }

    /// Keeps a job in mind for cleaning up.
    pub(super) fn note(&mut self, token: SubmitToken, id: crate::ExternalId) -> JobRef {
        let job = JobRef { token, id };
        self.jobs.push(job.clone());
        job
    }

    /// Does what a caller must after a doubtful submission; `None` when only failing it is left.
    pub(super) async fn resolve(
        &mut self,
        token: &SubmitToken,
        spec: &JobSpec,
    ) -> Result<Option<JobRef>, String> {
        match self.backend.capabilities().lookup {
            Lookup::Never => return Ok(None),
            Lookup::Resubmit => {}
            Lookup::ByToken { settle } => {
                if let Some(job) = self.find(token).await? {
                    return Ok(Some(job));
                }
                self.harness.settle(settle).await;
                if let Some(job) = self.find(token).await? {
                    return Ok(Some(job));
                }
            }
        }
        let id = self.backend.submit(token, spec).await.map_err(story("submit again"))?;
        Ok(Some(self.note(token.clone(), id)))
    }

    /// Looks for a job by its token, asking again where nothing is known yet.
    pub(super) async fn find(&mut self, token: &SubmitToken) -> Result<Option<JobRef>, String> {
        let until = Instant::now() + self.patience();
        loop {
            match self.backend.find(std::slice::from_ref(token)).await {
                Ok(mut found) => {
                    return Ok(found.remove(token).map(|id| self.note(token.clone(), id)));
                }
                Err(error) => self.bear(error, "find", until).await?,
            }
        }
    }

    /// Polls one job until something is true of it.
    pub(super) async fn wait(
        &mut self,
        job: &JobRef,
        what: &str,
        holds: impl Fn(&Observation) -> bool + Send,
    ) -> Result<Observation, String> {
        let until = Instant::now() + self.patience();
        loop {
            let last = match self.backend.poll(std::slice::from_ref(job)).await {
                Ok(mut seen) => seen.remove(&job.id),
                Err(error) => {
                    self.bear(error, "poll", until).await?;
                    continue;
                }
            };
            if let Some(observation) = &last
                && holds(observation)
            {
                return Ok(observation.clone());
            }
            ensure!(Instant::now() < until, "waited in vain for {what}; last seen: {last:?}");
            self.pause().await;
        }
    }

    /// Waits for a job to run.
    pub(super) async fn wait_running(&mut self, job: &JobRef) -> Result<(), String> {
        self.wait(job, "a running job", |seen| matches!(seen, Observation::Running { .. })).await?;
        Ok(())
    }

    /// Waits for a job's end.
    pub(super) async fn wait_end(&mut self, job: &JobRef) -> Result<Outcome, String> {
        let seen = self.wait(job, "the end of a job", |seen| outcome(seen).is_some()).await?;
        outcome(&seen).cloned().ok_or_else(|| "the end was not an end".to_owned())
    }

    /// Waits for an end by which a script that ended itself is judged.
    pub(super) async fn expect(&mut self, job: &JobRef, code: i32) -> Result<(), String> {
        let outcome = self.wait_end(job).await?;
        if outcome != (Outcome::Exited { code }) {
            let log = self.log(job).await.unwrap_or_default();
            let log = String::from_utf8_lossy(&log).into_owned();
            return Err(format!("expected the exit status {code}, got {outcome:?}; log: {log:?}"));
        }
        Ok(())
    }

    /// Cancels until the end is seen, as the reconciler does.
    pub(super) async fn cancel(&mut self, job: &JobRef) -> Result<Outcome, String> {
        let until = Instant::now() + self.patience();
        loop {
            if let Err(error) = self.backend.cancel(std::slice::from_ref(job)).await {
                self.bear(error, "cancel", until).await?;
            }
            let seen = self.backend.poll(std::slice::from_ref(job)).await.unwrap_or_default();
            match seen.get(&job.id) {
                Some(Observation::Gone) => return Ok(Outcome::Cancelled { by: None }),
                Some(seen) => {
                    if let Some(outcome) = outcome(seen) {
                        return Ok(outcome.clone());
                    }
                }
                None => {}
            }
            ensure!(Instant::now() < until, "waited in vain for a cancelled job; seen: {seen:?}");
            self.pause().await;
        }
    }

    /// Waits for a file.
    pub(super) async fn wait_file(&mut self, path: &Utf8Path) -> Result<(), String> {
        let until = Instant::now() + self.patience();
        while !path.exists() {
            ensure!(Instant::now() < until, "waited in vain for the file {path}");
            self.pause().await;
        }
        Ok(())
    }

    /// Reads a job's whole log.
    pub(super) async fn log(&mut self, job: &JobRef) -> Result<Vec<u8>, String> {
        let until = Instant::now() + self.patience();
        let mut bytes = Vec::new();
        loop {
            let from = offset(bytes.len());
            match self.backend.read_log(job, from, 64 * 1024).await {
                Ok(chunk) => {
                    bytes.extend_from_slice(&chunk.bytes);
                    if chunk.end {
                        return Ok(bytes);
                    }
                    if !chunk.bytes.is_empty() {
                        continue;
                    }
                }
                Err(error) => self.bear(error, "read the log", until).await?,
            }
            ensure!(Instant::now() < until, "waited in vain for the end of a log of {from} bytes");
            self.pause().await;
        }
    }

    /// Accepts that something is not known now.
    async fn bear(
        &mut self,
        error: BackendError,
        doing: &str,
        until: Instant,
    ) -> Result<(), String> {
        if error.kind() != ErrorKind::Transient || Instant::now() >= until {
            return Err(story(doing)(error));
        }
        self.pause().await;
        Ok(())
    }

    /// Gives the other side a moment.
    pub(super) async fn pause(&mut self) {
        self.harness.tick().await;
        tokio::time::sleep(PAUSE).await;
    }

    /// Ends and releases everything that this check submitted.
    pub(super) async fn clean_up(&mut self) -> Result<(), String> {
        self.harness.hold_jobs(false).await;
        self.restart();
        let mut trouble = Ok(());
        for job in std::mem::take(&mut self.jobs) {
            let ended = self.cancel(&job).await.map(drop);
            let released = self.release(&job).await;
            trouble = trouble.and(ended).and(released);
        }
        trouble.map_err(|story| format!("cleaning up: {story}"))
    }

    /// Releases a job, asking again while the other side is not ready.
    pub(super) async fn release(&mut self, job: &JobRef) -> Result<(), String> {
        let until = Instant::now() + self.patience();
        loop {
            match self.backend.release(job).await {
                Ok(()) => return Ok(()),
                Err(error) => self.bear(error, "release", until).await?,
            }
        }
    }
}

/// Gives the outcome of an ended job.
pub(super) fn outcome(seen: &Observation) -> Option<&Outcome> {
    match seen {
        Observation::Ended { outcome, .. } => Some(outcome),
        Observation::Pending { .. }
        | Observation::Running { .. }
        | Observation::Gone
        | Observation::Unclear { .. } => None,
    }
}

/// Tells an error with its causes.
pub(super) fn story(doing: &str) -> impl Fn(BackendError) -> String {
    move |error| {
        let mut story = format!("cannot {doing}: {:?}: {error}", error.kind());
        let mut cause = std::error::Error::source(&error);
        while let Some(error) = cause {
            story.push_str(": ");
            story.push_str(&error.to_string());
            cause = error.source();
        }
        story
    }
}

/// Makes a variable.
pub(super) fn variable(name: &str, value: &str) -> EnvVar {
    EnvVar { name: name.to_owned(), value: value.to_owned().into() }
}

/// Gives a length as an offset.
pub(super) fn offset(len: usize) -> u64 {
    u64::try_from(len).unwrap_or(u64::MAX)
}

/// Gives a line of shell that waits for the file `go` in the workspace, for a minute or two.
pub(super) const WAIT_FOR_GO: &str =
    "n=0; until [ -e go ] || [ $n -ge 1200 ]; do n=$((n + 1)); sleep 0.05; done\n";

/// Writes a file into a workspace.
pub(super) fn put(workspace: &Utf8Path, name: &str, text: &str) -> Result<(), String> {
    let path = workspace.join(name);
    std::fs::write(&path, text).map_err(|error| format!("cannot write {path}: {error}"))
}

/// Reads a file from a workspace.
pub(super) fn get(workspace: &Utf8Path, name: &str) -> Result<Vec<u8>, String> {
    let path: Utf8PathBuf = workspace.join(name);
    std::fs::read(&path).map_err(|error| format!("cannot read {path}: {error}"))
}

/// Polls a future up to `polls` times and drops it; `None` when it was not done by then.
pub(super) async fn cut<F: Future + Send>(future: F, polls: usize) -> Option<F::Output> {
    let (mut future, mut left) = (Box::pin(future), polls);
    poll_fn(move |context| {
        if left == 0 {
            return Poll::Ready(None);
        }
        left -= 1;
        match future.as_mut().poll(context) {
            Poll::Ready(output) => Poll::Ready(Some(output)),
            Poll::Pending if left == 0 => Poll::Ready(None),
            Poll::Pending => Poll::Pending,
        }
    })
    .await
}

/// Finds processes with a text in their argument list.
pub(super) fn processes_naming(text: &str) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    entries
        .filter_map(|entry| std::fs::read(entry.ok()?.path().join("cmdline")).ok())
        .map(|arguments| String::from_utf8_lossy(&arguments).replace('\0', " "))
        .filter(|arguments| arguments.contains(text))
        .collect()
}
