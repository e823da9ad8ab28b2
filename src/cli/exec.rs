//! `bridge exec`: a pipeline without GitLab, through everything that `serve` uses.
//!
//! The coordinator plays GitLab on loopback; agent, store, reconciler and backend are the daemon's own.

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use camino::{Utf8Path, Utf8PathBuf};
use clap::Args;
use sha2::{Digest as _, Sha256};
use tokio::signal::unix::{SignalKind, signal};

use crate::cli::Context;
use crate::cli::exec_payload::new_job;
use crate::cli::exec_view::{JobLine, Mood, View, is_live, summary, write_trace};
use crate::cli::exit::{Exit, Failure};
use crate::cli::{exec_artifacts, exec_given, exec_list};
use crate::config::{self, SourcesPlace};
use crate::coordinator::{Coordinator, JobView, Options, RunnerOptions, Status};
use crate::daemon::{Daemon, StartError};
use crate::domain::id::CiJobId;
use crate::domain::job::JobState;
use crate::pipeline::{self, Ended, Fate, LoadOptions, Pipeline, Project, Run, Skip, Source};
use crate::store::Store;
use crate::telemetry::{BuildInfo, Metrics};

/// How often the picture is drawn anew.
const REDRAW: Duration = Duration::from_millis(100);

/// How long cancelled jobs may take to end before the program does. A backend that must give up a job
/// which never said that it ended takes minutes.
const CANCEL_PATIENCE: Duration = Duration::from_secs(240);

/// Run a folder's pipeline here, without GitLab
#[derive(Debug, Args)]
pub struct ExecArgs {
    /// The folder with the .gitlab-ci.yml
    #[arg(default_value = ".")]
    folder: Utf8PathBuf,
    /// The pipeline's file, relative to the folder
    #[arg(long, value_name = "FILE", default_value = ".gitlab-ci.yml")]
    file: Utf8PathBuf,
    /// Where jobs run: `local`, `slurm`, or with --config the name of a backend there
    #[arg(long, value_name = "NAME", default_value = "local")]
    backend: String,
    /// Print the traces of all jobs, not only of those that failed
    #[arg(long)]
    trace: bool,
    /// Warn about keywords that are not supported instead of refusing them
    #[arg(long)]
    ignore_unknown: bool,
    /// Run this manual job, too (repeatable)
    #[arg(long, value_name = "JOB")]
    manual: Vec<String>,
    /// Run this job with those it needs and no others (repeatable)
    ///
    /// The name of a `parallel` job means all its instances. A manual job named here runs.
    #[arg(long, value_name = "JOB", conflicts_with = "manual")]
    job: Vec<String>,
    /// Show the jobs and what they wait for, and run nothing
    #[arg(long)]
    list: bool,
    /// With --list: one JSON object per job
    #[arg(long, requires = "list")]
    json: bool,
    /// A variable for the pipeline; it wins over those of the file (repeatable)
    #[arg(long = "var", value_name = "KEY=VALUE")]
    variables: Vec<String>,
    /// A file with one KEY=VALUE a line; --var wins over it
    #[arg(long, value_name = "FILE")]
    variables_file: Option<Utf8PathBuf>,
    /// A value for one of the file's `spec: inputs` (repeatable)
    #[arg(long = "input", value_name = "KEY=VALUE")]
    inputs: Vec<String>,
    /// Write each job's artifacts into a folder of its name below this one
    ///
    /// Without it they travel between jobs and are gone afterwards.
    #[arg(long, value_name = "DIR")]
    artifacts: Option<Utf8PathBuf>,
    /// Where caches are kept from run to run
    ///
    /// [default: a folder of the project's own below ~/.cache/bridge/exec]
    #[arg(long, value_name = "DIR")]
    cache_dir: Option<Utf8PathBuf>,
    /// Where workspaces and logs go; on a cluster it must be on the shared file system
    ///
    /// [default: a temporary folder; with a batch system a folder below the home directory]
    #[arg(long, value_name = "DIR")]
    work_dir: Option<Utf8PathBuf>,
    /// The most jobs at the same time
    #[arg(long, value_name = "N", default_value_t = 8)]
    jobs: usize,
}

/// One job of the pipeline as it goes.
#[derive(Debug, Default)]
struct Going {
    ci_job: Option<i64>,
    /// The jobs whose artifacts it gets.
    needs: Vec<i64>,
    /// How often it has failed and begun anew.
    retries: u32,
    line: Option<JobLine>,
    started: Option<Instant>,
    took: Duration,
}

impl ExecArgs {
    /// Runs the pipeline; success is its result.
    ///
    /// # Errors
    ///
    /// When it cannot be read or run.
    pub async fn run(self, context: &Context) -> anyhow::Result<Exit> {
        let given = exec_given::variables(self.variables_file.as_deref(), &self.variables)?;
        let inputs = exec_given::inputs(&self.inputs)?;
        let scratch = tempfile::Builder::new().prefix("bridge-exec-").tempdir()?;
        let state = Utf8Path::from_path(scratch.path())
            .context("use a temporary folder whose name is no UTF-8")?;
        let path = self.folder.join(&self.file);
        let refused = |error| Failure::new(Exit::Configuration, "run the pipeline").source(error);
        // Before anything is made of the folder: it may not even be one.
        let text = pipeline::read(&path).map_err(refused)?;
        let work = self.work_dir(state)?;
        let source = pipeline::source(&self.folder, &work.path).await?;
        let project = Project::of(&source, self.folder.clone()).await?;
        let predefined = project.variables.clone();
        let options =
            LoadOptions { ignore_unknown: self.ignore_unknown, project, variables: given, inputs };
        let pipeline =
            tokio::task::spawn_blocking(move || pipeline::parse(&text, path.as_str(), &options))
                .await?
                .map_err(refused)?;
        let (pipeline, manual) = self.choose(pipeline)?;
        if self.list {
            for note in pipeline.notes.iter().chain(&source.notes) {
                context.output.note(note)?;
            }
            exec_list::list(&pipeline, self.json, &context.output)?;
            return Ok(Exit::Done);
        }
        if pipeline.jobs.is_empty() {
            let what = "run the pipeline: its rules leave all jobs out";
            return Err(Failure::new(Exit::Configuration, what).hint("--list says why").into());
        }
        let coordinator = Coordinator::start(Options::default()).await?;
        let token = coordinator.add_runner(RunnerOptions::default());
        let config = self.configure(
            context,
            state,
            &Places {
                work: work.path.clone(),
                cache: self.link_caches(&pipeline, &source, &work.path)?,
            },
            &coordinator.url(),
            &token,
        )?;
        let daemon = match Daemon::start(
            config,
            &context.registry,
            Arc::new(Metrics::new(&BuildInfo::default())),
        )
        .await
        {
            Ok(daemon) => daemon,
            Err(error @ StartError::Backend { .. }) => {
                let failure = Failure::new(Exit::Configuration, "start");
                let failure = if context.config_named {
                    failure
                } else {
                    // A kind alone says nothing of servers and tokens.
                    failure.hint(format!(
                        "name a configuration with --config, and a backend of it instead of {}",
                        self.backend
                    ))
                };
                return Err(failure.source(error).into());
            }
            Err(error) => return Err(error.into()),
        };
        let checked = self.check_backend(&daemon).await;
        let code = match checked {
            Ok(()) => {
                let note = self.sources_note(context);
                let told = Told { pipeline: &pipeline, source: &source, predefined, manual, note };
                self.drive(&told, &coordinator, &daemon).await
            }
            Err(error) => {
                let failure = Failure::new(Exit::Backend, "use the backend");
                Err(failure.hint("nothing was submitted").source(error).into())
            }
        };
        daemon.stop(Duration::from_secs(10)).await;
        coordinator.stop().await;
        code
    }

    /// Finds the jobs that were named: the pipeline that is left, and the manual jobs that run.
    fn choose(&self, pipeline: Pipeline) -> Result<(Pipeline, Vec<String>), Failure> {
        for manual in &self.manual {
            if pipeline.named(manual).is_empty() {
                let what =
                    format!("run the manual job {manual}: the pipeline has none of that name");
                return Err(Failure::new(Exit::NotFound, what));
            }
        }
        let names = |pipeline: &Pipeline, named: &[String]| {
            let places = named.iter().flat_map(|name| pipeline.named(name));
            let names = places.filter_map(|place| pipeline.jobs.get(place));
            names.map(|job| job.name.clone()).collect::<Vec<String>>()
        };
        if self.job.is_empty() {
            let manual = names(&pipeline, &self.manual);
            return Ok((pipeline, manual));
        }
        let mut wanted = Vec::new();
        for name in &self.job {
            let found = pipeline.named(name);
            if found.is_empty() {
                let left = pipeline.left_out.iter().find(|left| left.name == *name);
                let why = match left {
                    Some(left) => format!("it is not in the pipeline: {}", left.why),
                    None => "the pipeline has none of that name".to_owned(),
                };
                let failure = Failure::new(Exit::NotFound, format!("run the job {name}: {why}"));
                return Err(failure.hint("--list shows the jobs"));
            }
            wanted.extend(found);
        }
        let chosen = pipeline.only(&wanted);
        // Whoever is needed is asked for as well.
        let manual = chosen.jobs.iter().map(|job| job.name.clone()).collect();
        Ok((chosen, manual))
    }

    async fn check_backend(&self, daemon: &Daemon) -> Result<(), bridge_backend::BackendError> {
        for backend in daemon.backends().into_values() {
            backend.check().await?;
        }
        Ok(())
    }

    fn work_dir(&self, scratch: &Utf8Path) -> anyhow::Result<Work> {
        if let Some(dir) = self.work_dir.as_ref().filter(|_| !self.list) {
            std::fs::create_dir_all(dir)?;
            return Work::below(dir);
        }
        if self.backend == "local" || self.list {
            let path = scratch.join("work");
            std::fs::create_dir_all(&path)?;
            return Ok(Work { path, _kept: None });
        }
        // A temporary folder is the submit node's own; a home directory is on every node of a cluster.
        let home =
            std::env::var("HOME").context("find a shared folder without HOME; use --work-dir")?;
        let dir = Utf8PathBuf::from(home).join(".cache/bridge");
        std::fs::create_dir_all(&dir).with_context(|| format!("make the folder {dir}"))?;
        Work::below(&dir)
    }

    /// Makes the runner's folder for caches; that of the project in it is kept beyond the run.
    ///
    /// Runners keep caches by the path of the project's repository, and ours is another in every
    /// run: a link leads from that path to the folder that stays.
    fn link_caches(
        &self,
        pipeline: &Pipeline,
        source: &Source,
        work: &Utf8Path,
    ) -> anyhow::Result<Utf8PathBuf> {
        let runner = work.join("cache");
        if pipeline.jobs.iter().all(|job| job.caches.is_empty()) {
            return Ok(runner);
        }
        let kept = self.cache_dir()?;
        let path = source.repository.as_str().trim_start_matches('/');
        let link = runner.join(path.strip_suffix(".git").unwrap_or(path));
        let make = || -> std::io::Result<()> {
            std::fs::create_dir_all(&kept)?;
            if let Some(above) = link.parent() {
                std::fs::create_dir_all(above)?;
            }
            std::os::unix::fs::symlink(&kept, &link)
        };
        make().with_context(|| format!("keep caches in {kept}"))?;
        disown(&kept).with_context(|| format!("take over the caches in {kept}"))?;
        Ok(runner)
    }

    /// Finds where the project's caches stay.
    fn cache_dir(&self) -> anyhow::Result<Utf8PathBuf> {
        if let Some(dir) = &self.cache_dir {
            return Ok(camino::absolute_utf8(dir)?);
        }
        let var = |name| std::env::var(name).ok().filter(|path| !path.is_empty());
        let base = var("XDG_CACHE_HOME")
            .map(Utf8PathBuf::from)
            .or_else(|| var("HOME").map(|home| Utf8PathBuf::from(home).join(".cache")))
            .context("find a place for caches without HOME; use --cache-dir")?;
        // Folders of the same name have nothing to do with each other.
        let folder = self.folder.canonicalize_utf8()?;
        let digest = Sha256::digest(folder.as_str().as_bytes());
        let mut name = folder.file_name().unwrap_or("project").to_owned();
        name.push('-');
        for byte in digest.iter().take(6) {
            write!(name, "{byte:02x}")?;
        }
        Ok(base.join("bridge/exec").join(name))
    }

    /// Writes the configuration that `serve` would have, and reads it as `serve` does.
    fn configure(
        &self,
        context: &Context,
        state: &Utf8Path,
        places: &Places,
        url: &str,
        token: &str,
    ) -> anyhow::Result<config::Config> {
        let work = &places.work;
        let mut backend = self.backend_table(context)?;
        if !backend.contains_key("jobs_dir") && self.shares_nothing_else(&backend) {
            backend.insert("jobs_dir".into(), work.join("jobs").into_string().into());
        }
        let text = |value: &Utf8Path| toml::Value::from(value.as_str());
        let mut runner = toml::Table::new();
        runner.insert("name".into(), "exec".into());
        runner.insert("url".into(), url.into());
        runner.insert("token_file".into(), "exec.token".into());
        runner.insert("backend".into(), self.backend.clone().into());
        runner.insert("builds_dir".into(), text(&work.join("builds")));
        runner.insert("cache_dir".into(), text(&places.cache));
        let mut backends = toml::Table::new();
        backends.insert(self.backend.clone(), backend.into());
        let mut file = toml::Table::new();
        file.insert("state_dir".into(), text(&state.join("state")));
        file.insert("concurrent".into(), i64::try_from(self.jobs.max(1))?.into());
        file.insert("check_interval".into(), "100ms".into());
        file.insert("runners".into(), vec![runner].into());
        file.insert("backends".into(), backends.into());
        write_private(&state.join("exec.token"), token)?;
        let path = state.join("config.toml");
        write_private(&path, &toml::to_string(&file)?)?;
        Ok(config::load(&path)?)
    }

    /// A backend whose driver has no jobs_dir says so itself; those we know have one.
    fn shares_nothing_else(&self, table: &toml::Table) -> bool {
        matches!(table.get("kind").and_then(toml::Value::as_str), Some("local" | "slurm"))
    }

    /// Says that the folder's files come from this machine, whatever the configuration says: there is no
    /// server from which the machine of a job could fetch them.
    fn sources_note(&self, context: &Context) -> Option<&'static str> {
        let config = context.config_named.then(|| context.incomplete_config().ok()).flatten()?;
        let entry = config.backends.iter().find(|(name, _)| name.0 == self.backend)?.1;
        match entry.sources {
            SourcesPlace::SubmitNode => None,
            SourcesPlace::Allocation => Some(
                "`sources = \"allocation\"` has no effect here: the folder's files are not to be had \
                 from elsewhere, and travel with each job",
            ),
        }
    }

    fn backend_table(&self, context: &Context) -> anyhow::Result<toml::Table> {
        if context.config_named {
            let config = context.incomplete_config()?;
            let entry = config
                .backends
                .iter()
                .find(|(name, _)| name.0 == self.backend)
                .map(|(_, entry)| entry)
                .ok_or_else(|| {
                    let names: Vec<&str> = config.backends.keys().map(|n| n.0.as_str()).collect();
                    let what = format!("find the backend {:?} in {}", self.backend, config.path);
                    Failure::new(Exit::NotFound, what)
                        .hint(format!("there are: {}", names.join(", ")))
                })?;
            let mut table = entry.table.clone();
            table.insert("kind".into(), entry.kind.clone().into());
            return Ok(table);
        }
        if !context.registry.kinds().any(|kind| kind == self.backend) {
            let kinds = context.registry.kinds().collect::<Vec<_>>().join(", ");
            let what = format!("find a kind of backend called {:?}", self.backend);
            let hint =
                format!("there are: {kinds}; with --config a name in the configuration will do");
            return Err(Failure::new(Exit::NotFound, what).hint(hint).into());
        }
        let mut table = toml::Table::new();
        table.insert("kind".into(), self.backend.clone().into());
        Ok(table)
    }

    /// Plays GitLab's part: hands out what may start, takes in what ended.
    async fn drive(
        &self,
        told: &Told<'_>,
        coordinator: &Coordinator,
        daemon: &Daemon,
    ) -> anyhow::Result<Exit> {
        let Told { pipeline, source, .. } = *told;
        let names: Vec<String> = pipeline.jobs.iter().map(|job| job.name.clone()).collect();
        let stderr = std::io::stderr();
        let mut view =
            if is_live() { View::live(&names, stderr) } else { View::plain(&names, stderr) };
        for note in pipeline.notes.iter().chain(&source.notes) {
            view.note(note)?;
        }
        if let Some(note) = told.note {
            view.note(note)?;
        }
        let mut run = Run::with_manual(pipeline, &told.manual);
        let mut going: Vec<Going> = names.iter().map(|_| Going::default()).collect();
        let mut interrupted: Option<Instant> = None;
        let mut interrupt = signal(SignalKind::interrupt())?;
        // What `timeout` and CI wrappers send; jobs must not outlive us for it.
        let mut terminate = signal(SignalKind::terminate())?;
        let folders = match &self.artifacts {
            Some(dir) => exec_artifacts::folders(pipeline, dir),
            None => Vec::new(),
        };
        let result = loop {
            for index in run.startable() {
                let Some(job) = pipeline.jobs.get(index) else { continue };
                let earlier = pipeline.artifacts_for(index).into_iter();
                let needs: Vec<i64> =
                    earlier.filter_map(|other| going.get(other)?.ci_job).collect();
                let id = told.enqueue(job, &needs, coordinator);
                run.started(index);
                if let Some(going) = going.get_mut(index) {
                    going.ci_job = Some(id);
                    going.needs = needs;
                    going.started = Some(Instant::now());
                }
            }
            for (index, state) in going.iter_mut().enumerate() {
                let Some(job) = pipeline.jobs.get(index) else { continue };
                if let Some(id) = state.ci_job
                    && run.fate(index).is_none()
                    && let Some(seen) = coordinator.job(id)
                    && seen.is_finished()
                {
                    let end = ended(&seen);
                    let failed = !end.success && !end.cancelled && interrupted.is_none();
                    let reason = seen.failure_reason.as_deref();
                    if failed && job.retry.again(state.retries + 1, reason, end.exit_code) {
                        state.retries += 1;
                        let most = job.retry.max;
                        view.note(&format!("{}: retry {} of {most}", job.name, state.retries))?;
                        state.ci_job = Some(told.enqueue(job, &state.needs, coordinator));
                    } else {
                        state.took = state.started.map(|at| at.elapsed()).unwrap_or_default();
                        run.ended(index, end);
                        if let Some(folder) = folders.get(index) {
                            for warning in exec_artifacts::keep(coordinator, id, folder).await? {
                                view.note(&format!("{}: {warning}", job.name))?;
                            }
                        }
                    }
                }
                let line =
                    line_of(job, state, run.fate(index), coordinator, daemon.store()).await?;
                view.update(&line)?;
                state.line = Some(line);
            }
            if let Some(result) = run.result() {
                break result;
            }
            if let Some(at) = interrupted
                && at.elapsed() > CANCEL_PATIENCE
            {
                anyhow::bail!("end all jobs; some are still running after they were cancelled");
            }
            // `recv` is cancel-safe, as is a sleep.
            tokio::select! {
                () = tokio::time::sleep(REDRAW) => continue,
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
            if interrupted.is_some() {
                anyhow::bail!(
                    "wait for the cancelled jobs when interrupted twice; some may still be running"
                );
            }
            interrupted = Some(Instant::now());
            view.note("Interrupted; cancelling what runs. Again to leave at once.")?;
            run.cancel();
            for id in going.iter().filter_map(|going| going.ci_job) {
                coordinator.cancel(id);
                cancel_here(daemon, id).await?;
            }
        };
        for note in run.notes() {
            view.note(&note)?;
        }
        let mut out = view.finish();
        let lines: Vec<JobLine> = going.iter().filter_map(|going| going.line.clone()).collect();
        for (line, going) in lines.iter().zip(&going) {
            let wanted = self.trace || line.mood.is_failure();
            if let Some(job) = going.ci_job.filter(|_| wanted).and_then(|id| coordinator.job(id)) {
                let text = crate::trace::strip_headers(&job.trace);
                write_trace(&mut std::io::stdout().lock(), line, text.as_slice())?;
            }
        }
        let mut text = summary(&lines);
        writeln!(text, "\nPipeline {result}")?;
        std::io::Write::write_all(&mut out, text.as_bytes())?;
        self.settle(daemon).await;
        if interrupted.is_some() {
            return Ok(Exit::Unexpected);
        }
        Ok(if result.is_success() { Exit::Done } else { Exit::Unexpected })
    }

    /// Lets the last jobs be released, so that nothing of them stays behind.
    async fn settle(&self, daemon: &Daemon) {
        let until = Instant::now() + Duration::from_secs(10);
        while Instant::now() < until {
            match daemon.store().counts().await {
                Ok(counts) if counts.is_empty() => return,
                Ok(_) | Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    }
}

/// What is run.
struct Told<'a> {
    pipeline: &'a Pipeline,
    source: &'a Source,
    /// Variables that are the same for every job.
    predefined: Vec<pipeline::Variable>,
    /// The manual jobs that were asked for.
    manual: Vec<String>,
    /// What of the configuration does not hold here.
    note: Option<&'static str>,
}

impl Told<'_> {
    /// Puts a job into the queue.
    fn enqueue(&self, job: &pipeline::Job, needs: &[i64], coordinator: &Coordinator) -> i64 {
        let mut new = new_job(job, self.source, &self.predefined);
        for id in needs {
            new = new.needs(*id);
        }
        coordinator.enqueue(new)
    }
}

/// The folders of a run's runner.
struct Places {
    work: Utf8PathBuf,
    cache: Utf8PathBuf,
}

/// Where workspaces and logs go while the pipeline runs.
struct Work {
    path: Utf8PathBuf,
    _kept: Option<tempfile::TempDir>,
}

impl Work {
    fn below(dir: &Utf8Path) -> anyhow::Result<Self> {
        let temp = tempfile::Builder::new().prefix("exec-").tempdir_in(dir)?;
        let path =
            Utf8Path::from_path(temp.path()).context("use a folder whose name is no UTF-8")?;
        Ok(Self { path: path.canonicalize_utf8()?, _kept: Some(temp) })
    }
}

/// Removes the notes that say whose the caches are: the server of an earlier run, whose address was
/// another one. A cache without such a note belongs to whoever has its path.
fn disown(kept: &Utf8Path) -> std::io::Result<()> {
    for entry in kept.read_dir_utf8()? {
        match std::fs::remove_file(entry?.path().join("metadata.json")) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotADirectory => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn write_private(path: &Utf8Path, text: &str) -> anyhow::Result<()> {
    use std::os::unix::fs::OpenOptionsExt as _;
    let mut file =
        std::fs::OpenOptions::new().create_new(true).write(true).mode(0o600).open(path)?;
    std::io::Write::write_all(&mut file, text.as_bytes())?;
    Ok(())
}

async fn cancel_here(daemon: &Daemon, ci_job: i64) -> anyhow::Result<()> {
    // GitLab's way takes until the next touch, up to half a minute; somebody waits at a terminal.
    let now = jiff::Timestamp::from_second(i64::try_from(
        std::time::UNIX_EPOCH.elapsed().unwrap_or_default().as_secs(),
    )?)?;
    for job in daemon.store().by_ci_job(CiJobId(ci_job)).await? {
        daemon.store().request_cancel(job.id, now).await?;
    }
    daemon.wake();
    Ok(())
}

fn ended(job: &JobView) -> Ended {
    Ended {
        success: job.status == Status::Success,
        exit_code: job.exit_code.and_then(|code| i32::try_from(code).ok()),
        cancelled: job.status == Status::Canceled,
    }
}

async fn line_of(
    job: &pipeline::Job,
    going: &Going,
    fate: Option<Fate>,
    coordinator: &Coordinator,
    store: &Store,
) -> anyhow::Result<JobLine> {
    let mut line = JobLine {
        name: job.name.clone(),
        stage: job.stage.clone(),
        state: "waiting".into(),
        mood: Mood::Waiting,
        external_id: going.line.as_ref().and_then(|line| line.external_id.clone()),
        elapsed: going.started.map(|at| at.elapsed()).unwrap_or_default(),
    };
    if let Some(fate) = fate {
        line.elapsed = going.took;
        let why = going
            .ci_job
            .and_then(|id| coordinator.job(id))
            .map(|job| reason(&job))
            .unwrap_or_default();
        let (mood, state) = match fate {
            Fate::Passed => (Mood::Good, "passed".to_owned()),
            Fate::Failed => (Mood::Bad, format!("failed{why}")),
            Fate::FailureAllowed => (Mood::Warning, format!("failed, allowed{why}")),
            Fate::Cancelled => (Mood::Bad, "cancelled".to_owned()),
            Fate::Skipped(Skip::Manual) => (Mood::Skipped, "manual".to_owned()),
            Fate::Skipped(Skip::Condition | Skip::Blocked) => (Mood::Skipped, "skipped".to_owned()),
        };
        line.mood = mood;
        line.state = state;
    }
    let Some(id) = going.ci_job else { return Ok(line) };
    if fate.is_some() && line.external_id.is_some() {
        return Ok(line);
    }
    let rows = store.by_ci_job(CiJobId(id)).await?;
    let Some(row) = rows.first() else {
        line.state = if fate.is_some() { line.state } else { "queued".into() };
        return Ok(line);
    };
    line.external_id = row.external_id.as_ref().map(ToString::to_string);
    if fate.is_none() {
        line.mood = match row.state {
            JobState::Received | JobState::Submitting | JobState::Submitted => Mood::Waiting,
            JobState::Running | JobState::Reporting | JobState::Finished | JobState::Abandoned => {
                Mood::Active
            }
        };
        line.state = row.state.to_string();
        if let Some(reason) = row.waits_for.as_ref().filter(|_| line.mood == Mood::Waiting) {
            line.state = format!("{} ({reason})", row.state);
        }
    }
    Ok(line)
}

fn reason(job: &JobView) -> String {
    match (&job.exit_code, &job.failure_reason) {
        (Some(code), _) => format!(" (exit code {code})"),
        (None, Some(reason)) => format!(" ({reason})"),
        (None, None) => String::new(),
    }
}
