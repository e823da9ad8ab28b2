//! The backend itself: which programs are asked what, and what their failures mean.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::num::NonZeroUsize;

use async_trait::async_trait;
use bridge_backend::{
    Backend, BackendError, Capabilities, ErrorKind, ExternalId, Fault, Filesystem, JobRef, JobSpec,
    LogChunk, Lookup, Observation, OpenError, Result, SubmitToken,
};
use bytes::Bytes;
use camino::Utf8Path;

use crate::client::{Answer, CallError, Client};
use crate::config::{Accounting, Config};
use crate::jobdir::{self, FileError, JobDir, blocking};
use crate::listing::{
    ACCOUNTING_FORMAT, Exit, Phase, QUEUE_FORMAT, Queue, Row, accounting_rows, exit_statuses,
};

/// A poll is one query however many jobs there are; this only bounds what one call holds in memory.
const POLL_BATCH: usize = 100_000;

/// How far back the accounting looks. Without it, it looks at today; further back costs its database.
const ACCOUNTING_SINCE: &str = "--starttime=now-60days";

/// Names in one question to the accounting: 33 bytes each, in a word that may have 128 KiB.
const NAMES_AT_ONCE: usize = 1_000;

/// Ids on one command line of `scancel`.
const CANCELS_AT_ONCE: usize = 5_000;

/// Runs jobs in Slurm.
#[derive(Debug)]
pub struct Slurm {
    pub(crate) config: Config,
    client: Client,
    capabilities: Capabilities,
}

/// What the accounting says.
#[derive(Debug)]
pub(crate) enum Books {
    /// There is none.
    None,
    /// It did not answer.
    Silent(BackendError),
    /// It answered.
    Rows(Vec<Row>),
}

impl Slurm {
    /// Opens the backend from its configuration table.
    ///
    /// # Errors
    ///
    /// When a key is unknown, missing or has a value that cannot be used.
    pub fn open(table: toml::Table) -> std::result::Result<Self, OpenError> {
        let config = Config::read(table)?;
        let capabilities = Capabilities {
            filesystem: Filesystem::Shared,
            lookup: Lookup::ByToken { settle: config.settle },
            live_log: true,
            collect: false,
            poll_batch: NonZeroUsize::new(POLL_BATCH).unwrap_or(NonZeroUsize::MIN),
            poll_rest: 50,
            max_concurrency: config.max_concurrency,
            job_variables: &[],
        };
        Ok(Self { client: Client::new(&config), config, capabilities })
    }

    async fn ask(
        &self,
        program: &'static str,
        words: &[String],
    ) -> std::result::Result<Answer, CallError> {
        self.client.call(program, words, None, self.config.query_timeout).await
    }

    /// Asks for all our jobs that the controller remembers.
    ///
    /// All of ours rather than a list of ids: a list is filtered in the client, in time that grows with
    /// its length, and an id that is not there turns the whole answer into an error.
    pub(crate) async fn queue(&self) -> Result<Queue> {
        let words = own(&["--me", "--noheader", "--states=all"], QUEUE_FORMAT);
        let answer = answered("ask squeue", self.ask("squeue", &words).await)?;
        let queue = Queue::read(&answer.stdout);
        if queue.is_rubbish() {
            return Err(transient("understand squeue's answer").with_source(answer.said()));
        }
        if queue.damaged > 0 {
            tracing::warn!(lines = queue.damaged, "lines of squeue could not be read");
        }
        Ok(queue)
    }

    /// Asks how batch scripts ended. The plain listing has no column for it.
    pub(crate) async fn exit_statuses(&self) -> Result<HashMap<u64, Exit>> {
        let words = ["--me", "--noheader", "--states=all", "--Format=JobID:20,exit_code:20"];
        let answer = self.ask("squeue", &words.map(str::to_owned)).await;
        Ok(exit_statuses(&answered("ask squeue for exit statuses", answer)?.stdout))
    }

    /// Asks the accounting for jobs by id.
    pub(crate) async fn books_of_ids(&self, ids: &BTreeSet<u64>) -> Books {
        let ids: Vec<String> = ids.iter().map(u64::to_string).collect();
        self.books(format!("--jobs={}", ids.join(","))).await
    }

    async fn books(&self, which: String) -> Books {
        if self.config.accounting == Accounting::Off {
            return Books::None;
        }
        let mut words: Vec<String> =
            ["--allocations", "--parsable2", "--noheader", "--duplicates", ACCOUNTING_SINCE]
                .map(str::to_owned)
                .to_vec();
        words.push(format!("--format={ACCOUNTING_FORMAT}"));
        words.push(which);
        let auto = self.config.accounting == Accounting::Auto;
        match self.ask("sacct", &words).await {
            Ok(answer) if answer.ok() => Books::Rows(accounting_rows(&answer.stdout)),
            Ok(answer) if auto && answer.stderr.contains("accounting storage is disabled") => {
                Books::None
            }
            Err(CallError::Missing { .. }) if auto => Books::None,
            Ok(answer) => Books::Silent(transient("ask sacct").with_source(answer.said())),
            Err(error) => Books::Silent(transient("ask sacct").with_source(error)),
        }
    }

    /// Cancels everything of these names that has not ended.
    ///
    /// By name, not by id: an id may have become another job's, and a name may have two jobs when the
    /// answer to a submission was lost.
    async fn cancel_named(&self, tokens: &BTreeSet<&str>) -> Result<()> {
        let queue = self.queue().await?;
        let ids: Vec<String> = tokens
            .iter()
            .flat_map(|token| queue.named(token))
            .filter(|row| match row.phase() {
                Phase::Waiting | Phase::PutBack | Phase::Going | Phase::Unknown => true,
                Phase::Finishing | Phase::Final(_) => false,
            })
            .map(|row| row.id.to_string())
            .collect();
        for ids in ids.chunks(CANCELS_AT_ONCE) {
            let answer = self.ask("scancel", ids).await;
            let answer = answer.map_err(|error| transient("cancel for sure").with_source(error))?;
            // One that ended since the question makes it complain, and is what we want.
            let ended = ["Invalid job id", "already completing", "already completed"];
            let harmless = |line: &str| ended.iter().any(|words| line.contains(words));
            if !answer.ok() && !answer.stderr.lines().all(harmless) {
                return Err(transient("cancel for sure").with_source(answer.said()));
            }
        }
        if queue.damaged > 0 {
            return Err(transient("cancel for sure: squeue's answer is damaged"));
        }
        Ok(())
    }

    async fn check_programs(&self) -> Result<()> {
        for program in ["sbatch", "squeue", "scancel"] {
            let answer = self.ask(program, &["--version".to_owned()]).await;
            let answer = answer.map_err(|error| site_if_missing("run a program", error))?;
            if !answer.ok() {
                let error = site("run a program: it does not know its version");
                return Err(error.with_source(answer.said()));
            }
        }
        Ok(())
    }

    async fn check_controller(&self) -> Result<()> {
        // Answers in milliseconds also when the controller is away, where others take 10 s and more.
        let answer = self.ask("scontrol", &["ping".to_owned()]).await;
        let answer = answer.map_err(|error| site_if_missing("ask the controller", error))?;
        if answer.stdout.contains(" is UP") || answer.stdout.contains("/UP") {
            return Ok(());
        }
        if answer.stderr.contains("Could not establish a configuration source")
            || answer.stderr.contains("cannot stat file")
        {
            return Err(site("find Slurm's configuration").with_source(answer.said()));
        }
        Err(transient("reach the controller: no slurmctld is up").with_source(answer.said()))
    }

    async fn check_partition(&self) -> Result<()> {
        let Some(wanted) = &self.config.wishes.partition else { return Ok(()) };
        let words = ["--noheader".to_owned(), "--format=%R|%a".to_owned()];
        let answer = answered("ask for partitions", self.ask("sinfo", &words).await)?;
        let partitions: HashMap<&str, &str> =
            answer.stdout.lines().filter_map(|line| line.trim().split_once('|')).collect();
        let mut up = false;
        for name in wanted.split(',') {
            match partitions.get(name) {
                None => return Err(site(format!("submit to partition {name}: there is none"))),
                Some(state) => up |= *state == "up",
            }
        }
        if up {
            Ok(())
        } else {
            Err(transient(format!("start jobs in partition {wanted}: it is not up")))
        }
    }
}

#[async_trait]
impl Backend for Slurm {
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    async fn check(&self) -> Result<()> {
        let jobs_dir = self.config.jobs_dir.clone();
        blocking(move || jobdir::check_jobs_dir(&jobs_dir))
            .await
            .map_err(|error| transient("look at jobs_dir").with_source(error))?
            .map_err(|error| site("use jobs_dir").with_source(error))?;
        self.check_programs().await?;
        self.check_controller().await?;
        self.check_partition().await?;
        if self.config.accounting == Accounting::On {
            // No job has this id; what counts is that there is an answer.
            match self.books("--jobs=1".to_owned()).await {
                Books::None | Books::Rows(_) => {}
                Books::Silent(error) => return Err(error),
            }
        }
        Ok(())
    }

    async fn submit(&self, token: &SubmitToken, spec: &JobSpec) -> Result<ExternalId> {
        // Boxed: a submission's state is large, and few run at a time.
        Box::pin(crate::submit::submit(&self.config, &self.client, token, spec)).await
    }

    async fn find(&self, tokens: &[SubmitToken]) -> Result<BTreeMap<SubmitToken, ExternalId>> {
        let mut found = BTreeMap::new();
        if tokens.is_empty() {
            return Ok(found);
        }
        let queue = self.queue().await?;
        // The job itself says which one started. That is the only trace of one that ran and was
        // forgotten while nobody asked, and it settles which of two submissions is meant.
        let (jobs_dir, names) = (self.config.jobs_dir.clone(), tokens.to_vec());
        let started = blocking(move || {
            // A job that was to be the first ever may have been cut off before its directory was made.
            jobdir::check_jobs_dir(&jobs_dir)?;
            let started = |token: SubmitToken| {
                let started = JobDir::of(&jobs_dir, &token).notes()?.started;
                Ok(started.map(|id| (token, id)))
            };
            names
                .into_iter()
                .filter_map(|t| started(t).transpose())
                .collect::<std::result::Result<_, FileError>>()
        });
        let started: HashMap<SubmitToken, u64> = started
            .await
            .map_err(|error| transient("read the job directories").with_source(error))?
            .map_err(|error| transient("read the job directories").with_source(error))?;
        let mut missing = Vec::new();
        for token in tokens {
            let listed = queue.named(token.as_str()).map(|row| row.id).min();
            match started.get(token).copied().or(listed) {
                Some(id) => {
                    found.insert(token.clone(), ExternalId(id.to_string()));
                }
                None => missing.push(token.as_str()),
            }
        }
        if !missing.is_empty() && queue.damaged > 0 {
            return Err(transient("understand all of squeue's answer"));
        }
        for names in missing.chunks(NAMES_AT_ONCE) {
            match self.books(format!("--name={}", names.join(","))).await {
                Books::None => break,
                // An absence counts, so it must have been said.
                Books::Silent(error) => return Err(error),
                Books::Rows(rows) => {
                    for row in rows.iter().filter(|row| names.contains(&row.name.as_str())) {
                        if let Ok(token) = SubmitToken::parse(&row.name) {
                            found.entry(token).or_insert_with(|| ExternalId(row.id.to_string()));
                        }
                    }
                }
            }
        }
        Ok(found)
    }

    async fn poll(&self, jobs: &[JobRef]) -> Result<BTreeMap<ExternalId, Observation>> {
        Box::pin(self.observe(jobs)).await
    }

    async fn read_log(&self, job: &JobRef, from: u64, limit: usize) -> Result<LogChunk> {
        let dir = JobDir::of(&self.config.jobs_dir, &job.token);
        let piece = blocking(move || dir.read_log(from, limit)).await;
        let piece = piece
            .map_err(|error| transient("read the log").with_source(error))?
            .map_err(|error| transient("read the log").with_source(error))?;
        match piece {
            Some(piece) => Ok(LogChunk { bytes: Bytes::from(piece.bytes), end: piece.end }),
            None => {
                Err(BackendError::new(ErrorKind::Lost, "read the log: the job's directory is gone"))
            }
        }
    }

    async fn collect(&self, _job: &JobRef, _into: &Utf8Path) -> Result<()> {
        Ok(())
    }

    async fn cancel(&self, jobs: &[JobRef]) -> Result<()> {
        if jobs.is_empty() {
            return Ok(());
        }
        let dirs: Vec<JobDir> =
            jobs.iter().map(|job| JobDir::of(&self.config.jobs_dir, &job.token)).collect();
        let marked = blocking(move || {
            for dir in dirs {
                // The mark tells the job's own script and later polls why it ended. A job whose
                // directory is broken is cancelled all the same.
                if let Err(error) = dir.mark_cancelled() {
                    let error: &dyn std::error::Error = &error;
                    tracing::warn!(path = %dir.path(), error, "job not marked as cancelled");
                }
            }
        });
        marked.await.map_err(|error| transient("mark the jobs").with_source(error))?;
        self.cancel_named(&jobs.iter().map(|job| job.token.as_str()).collect()).await
    }

    async fn release(&self, job: &JobRef) -> Result<()> {
        let dir = JobDir::of(&self.config.jobs_dir, &job.token);
        let broken = |error: FileError| transient("remove the job's directory").with_source(error);
        let stopped = |error: tokio::task::JoinError| {
            transient("remove the job's directory").with_source(error)
        };
        let early = {
            let dir = dir.clone();
            blocking(move || dir.sealed_early()).await.map_err(stopped)?.map_err(broken)?
        };
        if early {
            // It was called ended while Slurm had not: a requeued job would wait there for nothing.
            self.cancel_named(&BTreeSet::from([job.token.as_str()])).await?;
        }
        blocking(move || dir.remove()).await.map_err(stopped)?.map_err(broken)
    }
}

fn own(words: &[&str], format: &str) -> Vec<String> {
    let mut words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
    words.push(format!("--format={format}"));
    words
}

fn transient(context: impl Into<std::borrow::Cow<'static, str>>) -> BackendError {
    BackendError::new(ErrorKind::Transient, context)
}

fn site(context: impl Into<std::borrow::Cow<'static, str>>) -> BackendError {
    BackendError::new(ErrorKind::Rejected(Fault::Site), context)
}

/// Takes a question's answer; anything but a full one changes nothing and may be asked again.
fn answered(what: &'static str, answer: std::result::Result<Answer, CallError>) -> Result<Answer> {
    match answer {
        Ok(answer) if answer.ok() => Ok(answer),
        Ok(answer) => Err(transient(what).with_source(answer.said())),
        Err(error) => Err(transient(what).with_source(error)),
    }
}

fn site_if_missing(what: &'static str, error: CallError) -> BackendError {
    let missing = matches!(error, CallError::Missing { .. });
    if missing { site(what).with_source(error) } else { transient(what).with_source(error) }
}
