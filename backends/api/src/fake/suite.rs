//! The suite against the fake, with real scripts; and proof that the suite notices what is broken.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::DirBuilderExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use camino::{Utf8Path, Utf8PathBuf};
use secrecy::ExposeSecret as _;

use super::{FakeJob, FakeOptions, FakeWorld, Trouble, Verb};
use crate::conformance::{self, Harness, Loss};
use crate::result::{CANCELLED_FILE, JOB_DIR_VAR, JobResult, RESULT_FILE};
use crate::{
    Backend, BackendError, Capabilities, ErrorKind, ExternalId, JobRef, JobSpec, LogChunk, Lookup,
    Observation, Outcome, Result, SubmitToken,
};

/// How a backend is broken, so that the suite has something to find.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Broken {
    Nothing,
    /// Asks for every job by itself.
    PollsOneByOne,
    /// Takes an unknown job for an error.
    FailsForStrangers,
    /// Looks at ids alone.
    TrustsIds,
    /// Says the end of a log as soon as there is nothing more right now.
    EndsLogsEarly,
    /// Shifts a log by a byte when it is read from its middle.
    ShiftsLogs,
    /// Makes a job, and says that nothing happened.
    CallsDoubtTransient,
    /// Knows every status.
    FailsForUnknownWords,
    /// Reads success into every end.
    GuessesSuccess,
    /// Forgets jobs over a restart.
    Remembers,
}

/// Plays the other side: runs the fake's jobs when the suite waits.
struct Player {
    world: FakeWorld,
    root: tempfile::TempDir,
    running: BTreeMap<SubmitToken, Process>,
    held: bool,
    made: usize,
    broken: Broken,
}

struct Process {
    child: Child,
    dir: Utf8PathBuf,
    log: fs::File,
    since: Instant,
    told: Option<Instant>,
}

const SETTLE: Duration = Duration::from_secs(20);

impl Player {
    fn new(lookup: Lookup, broken: Broken) -> Self {
        let mut options = FakeOptions::default();
        options.capabilities.lookup = lookup;
        let world = FakeWorld::new(options);
        world.hide_new_jobs_for(SETTLE / 2);
        Self {
            world,
            root: tempfile::tempdir().unwrap(),
            running: BTreeMap::new(),
            held: false,
            made: 0,
            broken,
        }
    }

    fn make_dir(&mut self) -> Utf8PathBuf {
        self.made += 1;
        let path = Utf8Path::from_path(self.root.path()).unwrap().join(self.made.to_string());
        fs::DirBuilder::new().mode(0o700).create(&path).unwrap();
        path
    }

    fn start(&mut self, job: &FakeJob) {
        let dir = self.make_dir();
        let path = dir.join("log");
        let log = fs::OpenOptions::new().create(true).append(true).open(&path).unwrap();
        let script = dir.join("script");
        fs::write(&script, &job.spec.script).unwrap();
        let mut command = Command::new("/bin/sh");
        command
            .arg(script)
            .current_dir(&job.spec.workspace)
            .env(JOB_DIR_VAR, &dir)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        for variable in &job.spec.env {
            command.env(&variable.name, variable.value.expose_secret());
        }
        let child = command.spawn().unwrap();
        let log = fs::File::open(path).unwrap();
        let process = Process { child, dir, log, since: Instant::now(), told: None };
        self.running.insert(job.job.token.clone(), process);
        self.world.start(&job.job.token);
        self.world.ignore_cancel(&job.job.token, true);
    }
}

impl Process {
    fn signal(&self, signal: &str) {
        let mark = format!("{JOB_DIR_VAR}={}", self.dir);
        let marked = fs::read_dir("/proc").unwrap().filter_map(|entry| {
            let name = entry.ok()?.file_name().into_string().ok()?;
            name.parse::<u32>().ok()?;
            let environ = fs::read(format!("/proc/{name}/environ")).ok()?;
            environ.split(|byte| *byte == 0).any(|e| e == mark.as_bytes()).then_some(name)
        });
        for pid in marked {
            // It may have ended meanwhile.
            drop(Command::new("kill").args(["-s", signal, &pid]).stderr(Stdio::null()).status());
        }
    }

    fn news(&mut self) -> Vec<u8> {
        let mut news = Vec::new();
        let from = self.log.stream_position().unwrap();
        self.log.seek(SeekFrom::Start(from)).unwrap();
        self.log.read_to_end(&mut news).unwrap();
        news
    }

    /// Takes the next step; gives the end.
    fn step(&mut self, job: &FakeJob) -> Option<Outcome> {
        if job.cancels > 0 {
            match self.told {
                None => {
                    fs::write(self.dir.join(CANCELLED_FILE), "").unwrap();
                    self.signal("TERM");
                    self.told = Some(Instant::now());
                }
                Some(told) if told.elapsed() > Duration::from_millis(300) => self.signal("KILL"),
                Some(_) => {}
            }
        }
        let over = job.spec.limits.wall_time.is_some_and(|limit| self.since.elapsed() > limit);
        if over {
            self.signal("KILL");
        }
        let status = self.child.try_wait().unwrap()?;
        if job.cancels > 0 {
            self.signal("KILL");
        }
        let result = fs::read_to_string(self.dir.join(RESULT_FILE)).ok();
        let result = result.map(|text| JobResult::parse(&text));
        if let Some(outcome) = result.iter().flatten().find_map(JobResult::outcome) {
            return Some(outcome);
        }
        Some(if job.cancels > 0 {
            Outcome::Cancelled { by: None }
        } else if over {
            Outcome::TimedOut
        } else if result.is_some() {
            Outcome::SystemFailed { detail: "no sense in the result".to_owned() }
        } else {
            let signal = status.signal().map(|signal| 128 + signal);
            Outcome::Exited { code: status.code().or(signal).unwrap() }
        })
    }
}

#[async_trait]
impl Harness for Player {
    fn open(&mut self) -> Arc<dyn Backend> {
        let jobs = self.world.jobs().into_iter().map(|job| job.job.token).collect();
        Arc::new(Wrapped { inner: self.world.open(), broken: self.broken, before: jobs })
    }

    fn workspace(&mut self) -> Utf8PathBuf {
        self.make_dir()
    }

    fn patience(&self) -> Duration {
        // What is broken is to be found soon.
        Duration::from_secs(if self.broken == Broken::Nothing { 60 } else { 2 })
    }

    async fn tick(&mut self) {
        for job in self.world.jobs() {
            let token = &job.job.token;
            let known = self.running.contains_key(token);
            if !known && !self.held && job.outcome.is_none() && !job.released {
                self.start(&job);
            }
            let Some(process) = self.running.get_mut(token) else { continue };
            if job.outcome.is_some() {
                continue;
            }
            let ended = process.step(&job);
            // After the status: what an ended process wrote is all there.
            self.world.append_log(token, process.news());
            if let Some(outcome) = ended {
                self.world.finish(token, outcome);
            }
        }
    }

    async fn settle(&mut self, time: Duration) {
        self.world.advance(time);
    }

    fn queries(&self) -> Option<usize> {
        Some(self.world.count_all())
    }

    fn wall_time(&self) -> Option<Duration> {
        Some(Duration::from_secs(1))
    }

    async fn lose_next_submit(&mut self, loss: Loss) -> bool {
        let trouble = match loss {
            Loss::Question => Trouble::LostQuestion,
            Loss::Answer => Trouble::LostAnswer,
        };
        self.world.trouble(Verb::Submit, trouble);
        true
    }

    async fn hold_jobs(&mut self, held: bool) -> bool {
        self.held = held;
        true
    }

    async fn say_unknown_status(&mut self, job: &JobRef, word: &str) -> bool {
        self.world.say(&job.token, word);
        true
    }
}

/// A backend of the world, broken or not.
#[derive(Debug)]
struct Wrapped {
    inner: Arc<dyn Backend>,
    broken: Broken,
    before: Vec<SubmitToken>,
}

#[async_trait]
impl Backend for Wrapped {
    fn capabilities(&self) -> &Capabilities {
        self.inner.capabilities()
    }

    async fn check(&self) -> Result<()> {
        self.inner.check().await
    }

    async fn submit(&self, token: &SubmitToken, spec: &JobSpec) -> Result<ExternalId> {
        let submitted = self.inner.submit(token, spec).await;
        submitted.map_err(|error| {
            let broken = self.broken == Broken::CallsDoubtTransient;
            if broken { BackendError::new(ErrorKind::Transient, "submit") } else { error }
        })
    }

    async fn find(&self, tokens: &[SubmitToken]) -> Result<BTreeMap<SubmitToken, ExternalId>> {
        self.inner.find(tokens).await
    }

    async fn poll(&self, jobs: &[JobRef]) -> Result<BTreeMap<ExternalId, Observation>> {
        if self.broken == Broken::Remembers {
            let known = |job: &&JobRef| !self.before.contains(&job.token);
            let known: Vec<JobRef> = jobs.iter().filter(known).cloned().collect();
            return self.inner.poll(&known).await;
        }
        let mut seen = BTreeMap::new();
        if self.broken == Broken::PollsOneByOne {
            for job in jobs {
                seen.extend(self.inner.poll(std::slice::from_ref(job)).await?);
            }
        } else {
            seen = self.inner.poll(jobs).await?;
        }
        for (id, observation) in &mut seen {
            match observation {
                Observation::Gone if self.broken == Broken::FailsForStrangers => {
                    return Err(BackendError::new(ErrorKind::Lost, format!("poll {id}")));
                }
                Observation::Gone if self.broken == Broken::TrustsIds => {
                    let outcome = Outcome::Exited { code: 0 };
                    *observation = Observation::Ended { outcome, usage: Default::default() };
                }
                Observation::Unclear { .. } if self.broken == Broken::FailsForUnknownWords => {
                    return Err(BackendError::new(ErrorKind::Transient, format!("poll {id}")));
                }
                Observation::Ended { outcome, .. } if self.broken == Broken::GuessesSuccess => {
                    *outcome = Outcome::Exited { code: 0 };
                }
                Observation::Pending { .. }
                | Observation::Running { .. }
                | Observation::Ended { .. }
                | Observation::Gone
                | Observation::Unclear { .. } => {}
            }
        }
        Ok(seen)
    }

    async fn read_log(&self, job: &JobRef, from: u64, limit: usize) -> Result<LogChunk> {
        let from = if self.broken == Broken::ShiftsLogs && from > 1 { from - 1 } else { from };
        let mut chunk = self.inner.read_log(job, from, limit).await?;
        chunk.end |= self.broken == Broken::EndsLogsEarly && chunk.bytes.len() < limit;
        Ok(chunk)
    }

    async fn collect(&self, job: &JobRef, into: &Utf8Path) -> Result<()> {
        self.inner.collect(job, into).await
    }

    async fn cancel(&self, jobs: &[JobRef]) -> Result<()> {
        self.inner.cancel(jobs).await
    }

    async fn release(&self, job: &JobRef) -> Result<()> {
        self.inner.release(job).await
    }
}

#[tokio::test]
async fn the_fake_keeps_the_contract_whole() {
    let mut player = Player::new(Lookup::ByToken { settle: SETTLE }, Broken::Nothing);
    let report = conformance::run(&mut player).await;
    let skipped = [("a_workspace_travels_and_its_outputs_come_home", "the workspace is shared")];
    let skipped = skipped.map(|(name, why)| (name, why.to_owned()));
    assert_eq!(report.skipped, skipped, "{report}");
    player.world.assert_no_violations();
}

#[tokio::test]
async fn the_fake_keeps_the_contract_by_resubmitting() {
    let mut player = Player::new(Lookup::Resubmit, Broken::Nothing);
    conformance::run(&mut player).await.assert_ran(&["a_lost_answer_is_found_again"]);
    player.world.assert_no_violations();
}

#[tokio::test]
async fn the_suite_finds_what_is_broken() {
    for (broken, found_by) in [
        (Broken::PollsOneByOne, "one_poll_asks_for_many"),
        (Broken::FailsForStrangers, "an_unknown_job_is_gone_or_absent_and_no_error"),
        (Broken::TrustsIds, "both_names_must_match"),
        (Broken::EndsLogsEarly, "a_log_is_readable_while_the_job_runs"),
        (Broken::ShiftsLogs, "a_log_reads_the_same_from_every_offset"),
        (Broken::CallsDoubtTransient, "a_lost_answer_is_found_again"),
        (Broken::FailsForUnknownWords, "an_unknown_status_is_unclear_and_no_error"),
        (Broken::GuessesSuccess, "the_exit_status_is_the_outcome"),
        (Broken::GuessesSuccess, "the_result_file_outranks_the_other_sides_word"),
        (Broken::GuessesSuccess, "the_wall_time_is_a_limit"),
        (Broken::GuessesSuccess, "a_cancelled_job_ends_with_all_its_processes"),
        (Broken::Remembers, "a_restart_in_any_phase_changes_nothing"),
    ] {
        let mut player = Player::new(Lookup::ByToken { settle: SETTLE }, broken);
        let report = conformance::examine(&mut player, &[found_by]).await;
        assert!(!report.failed.is_empty(), "{broken:?} escapes {found_by}");
        for process in player.running.values_mut() {
            process.signal("KILL");
            process.child.wait().unwrap();
        }
    }
}
