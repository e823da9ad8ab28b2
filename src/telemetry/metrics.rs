//! The numbers under `/metrics`: few, typed, no globals.
//!
//! Where gitlab-runner counts the same thing, its name and labels are used, so that dashboards
//! carry over; everything else starts with `bridge_`. Labels never hold ids of jobs.
//!
//! Gauges that the store knows better are not kept here: they come as a [`Snapshot`] at each scrape.

use std::fmt::Write as _;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use prometheus_client::encoding::text::encode_registry;
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::{Family, MetricConstructor};
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;

/// gitlab-runner's buckets for a job's duration.
const JOB_SECONDS: [f64; 10] =
    [30.0, 60.0, 300.0, 600.0, 1800.0, 3600.0, 7200.0, 10800.0, 18000.0, 36000.0];
/// gitlab-runner's buckets for the wait in GitLab's queue.
const QUEUE_SECONDS: [f64; 10] = [1.0, 3.0, 10.0, 30.0, 60.0, 120.0, 300.0, 900.0, 1800.0, 3600.0];
/// From a call answered by a file to one that times out.
const CALL_SECONDS: [f64; 10] = [0.005, 0.02, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 30.0, 60.0];
/// A user waits for this one.
const LAG_SECONDS: [f64; 10] = [0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 15.0, 60.0, 600.0];

/// What this program is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct BuildInfo {
    /// The program.
    pub name: String,
    /// Its version.
    pub version: String,
    /// The commit, where known.
    pub revision: String,
    /// The operating system.
    pub os: String,
    /// The processor.
    pub architecture: String,
}

/// Which runner a number is about, in gitlab-runner's labels.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct RunnerLabels {
    /// The short token.
    pub runner: String,
    /// The name in the configuration.
    pub runner_name: String,
    /// This machine's name at GitLab.
    pub system_id: String,
}

/// A runner's limits, shown as gauges.
#[derive(Clone, Debug)]
pub struct RunnerSettings {
    /// Which runner.
    pub labels: RunnerLabels,
    /// `limit`.
    pub limit: usize,
}

/// Which call to a backend a number is about.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct CallLabels {
    /// The backend's name in the configuration.
    pub backend: String,
    /// The method of the trait: `submit`, `poll`, …
    pub verb: &'static str,
    /// How it went.
    pub kind: CallKind,
}

/// How a call to a backend went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CallKind {
    /// It answered.
    Ok,
    /// Nothing changed over there.
    Transient,
    /// It may have taken effect.
    Ambiguous,
    /// It was refused.
    Rejected,
    /// There was no such job.
    Lost,
    /// It did not answer within our own limit.
    TimedOut,
}

impl EncodeLabelValue for CallKind {
    fn encode(
        &self,
        encoder: &mut prometheus_client::encoding::LabelValueEncoder<'_>,
    ) -> Result<(), std::fmt::Error> {
        encoder.write_str(match self {
            Self::Ok => "ok",
            Self::Transient => "transient",
            Self::Ambiguous => "ambiguous",
            Self::Rejected => "rejected",
            Self::Lost => "lost",
            Self::TimedOut => "timed_out",
        })
    }
}

/// What the store knows at the moment of a scrape.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// Jobs that are owed, by runner, backend and state.
    pub jobs: Vec<JobCount>,
    /// Bytes of traces that GitLab does not have yet.
    pub unsent_bytes: u64,
}

/// A number of jobs.
#[derive(Clone, Debug)]
pub struct JobCount {
    /// Of this runner.
    pub runner: RunnerLabels,
    /// On this backend.
    pub backend: String,
    /// In this state, in our words.
    pub state: &'static str,
    /// How many.
    pub count: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RunnerStateLabels {
    runner: String,
    runner_name: String,
    system_id: String,
    state: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct BackendStateLabels {
    backend: String,
    state: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FailureLabels {
    runner: String,
    runner_name: String,
    system_id: String,
    failure_reason: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ApiLabels {
    runner: String,
    system_id: String,
    endpoint: &'static str,
    status: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct LevelLabels {
    level: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct BackendLabels {
    backend: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct VerbLabels {
    backend: String,
    verb: &'static str,
}

/// Makes histograms with these buckets.
#[derive(Clone, Copy, Debug)]
struct Buckets(&'static [f64]);

impl MetricConstructor<Histogram> for Buckets {
    fn new_metric(&self) -> Histogram {
        Histogram::new(self.0.iter().copied())
    }
}

type Histograms<L> = Family<L, Histogram, Buckets>;

/// All metrics of the process; share it in an `Arc`.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    jobs: Family<RunnerLabels, Counter>,
    failed_jobs: Family<FailureLabels, Counter>,
    job_duration: Histograms<RunnerLabels>,
    job_queue_duration: Histograms<RunnerLabels>,
    concurrent: Gauge,
    limit: Family<RunnerLabels, Gauge>,
    request_concurrency: Family<RunnerLabels, Gauge>,
    errors: Family<LevelLabels, Counter>,
    api_requests: Family<ApiLabels, Counter>,
    sweep: Histogram,
    calls: Family<CallLabels, Counter>,
    call_duration: Histograms<VerbLabels>,
    confirm_lag: Histograms<BackendLabels>,
    transactions: Counter,
    illegal_transitions: Counter,
    login_good: Family<BackendLabels, Gauge>,
    login_left: Family<BackendLabels, Gauge>,
}

impl Metrics {
    /// Makes all metrics, at zero.
    pub fn new(build: &BuildInfo) -> Self {
        let mut registry = Registry::default();
        registry.register(
            "gitlab_runner_version",
            "A constant 1 labelled with what this program is",
            Info::new(build.clone()),
        );
        let metrics = Self {
            jobs: Family::default(),
            failed_jobs: Family::default(),
            job_duration: Family::new_with_constructor(Buckets(&JOB_SECONDS)),
            job_queue_duration: Family::new_with_constructor(Buckets(&QUEUE_SECONDS)),
            concurrent: Gauge::default(),
            limit: Family::default(),
            request_concurrency: Family::default(),
            errors: Family::default(),
            api_requests: Family::default(),
            sweep: Histogram::new(CALL_SECONDS),
            calls: Family::default(),
            call_duration: Family::new_with_constructor(Buckets(&CALL_SECONDS)),
            confirm_lag: Family::new_with_constructor(Buckets(&LAG_SECONDS)),
            transactions: Counter::default(),
            illegal_transitions: Counter::default(),
            login_good: Family::default(),
            login_left: Family::default(),
            registry,
        };
        for level in ["error", "warning"] {
            drop(metrics.errors.get_or_create(&LevelLabels { level }));
        }
        metrics.registered()
    }

    // The writer of the text adds `_total` to counters and `_info` to the one above.
    fn registered(mut self) -> Self {
        let r = &mut self.registry;
        r.register("gitlab_runner_jobs", "Jobs received", self.jobs.clone());
        r.register("gitlab_runner_failed_jobs", "Jobs that failed", self.failed_jobs.clone());
        r.register(
            "gitlab_runner_job_duration_seconds",
            "Time from receipt of a job to its verdict",
            self.job_duration.clone(),
        );
        r.register(
            "gitlab_runner_job_queue_duration_seconds",
            "Time a job waited at GitLab before it was received",
            self.job_queue_duration.clone(),
        );
        r.register("gitlab_runner_concurrent", "The setting concurrent", self.concurrent.clone());
        r.register("gitlab_runner_limit", "The setting limit", self.limit.clone());
        r.register(
            "gitlab_runner_request_concurrency",
            "Requests for a job that are under way",
            self.request_concurrency.clone(),
        );
        r.register("gitlab_runner_errors", "Warnings and errors logged", self.errors.clone());
        r.register(
            "gitlab_runner_api_request_statuses",
            "Calls to GitLab by endpoint and status",
            self.api_requests.clone(),
        );
        r.register("bridge_sweep_duration_seconds", "Duration of a sweep", self.sweep.clone());
        r.register("bridge_backend_calls", "Calls to backends", self.calls.clone());
        r.register(
            "bridge_backend_call_duration_seconds",
            "Duration of calls to backends",
            self.call_duration.clone(),
        );
        r.register(
            "bridge_confirm_lag_seconds",
            "Time from the end of a job to GitLab's confirmation of its verdict",
            self.confirm_lag.clone(),
        );
        r.register(
            "bridge_store_transactions",
            "Write transactions of the store",
            self.transactions.clone(),
        );
        r.register(
            "bridge_illegal_transitions",
            "Events that could not happen to a job in its state",
            self.illegal_transitions.clone(),
        );
        r.register(
            "bridge_backend_login_good",
            "1 when a backend with a login takes jobs with it, 0 when its operator must act",
            self.login_good.clone(),
        );
        r.register(
            "bridge_backend_login_left_seconds",
            "Time until the login at a backend ends unless somebody renews it",
            self.login_left.clone(),
        );
        self
    }

    /// Notes the settings; called at start and after each reload.
    pub fn set_settings(&self, concurrent: usize, runners: &[RunnerSettings]) {
        self.concurrent.set(to_i64(concurrent));
        self.limit.clear();
        for runner in runners {
            self.limit.get_or_create(&runner.labels).set(to_i64(runner.limit));
            // Present from the start, so that rates and alerts have a zero to begin with.
            drop(self.jobs.get_or_create(&runner.labels));
            drop(self.request_concurrency.get_or_create(&runner.labels));
        }
    }

    /// Notes how the logins at backends stand: name, whether good, time left where known.
    pub fn set_logins<'a>(&self, logins: impl Iterator<Item = (&'a str, bool, Option<Duration>)>) {
        self.login_good.clear();
        self.login_left.clear();
        for (backend, good, left) in logins {
            let labels = BackendLabels { backend: backend.to_owned() };
            self.login_good.get_or_create(&labels).set(i64::from(good));
            if let Some(left) = left {
                let left = i64::try_from(left.as_secs()).unwrap_or(i64::MAX);
                self.login_left.get_or_create(&labels).set(left);
            }
        }
    }

    /// Counts a job received; `queued` is its wait at GitLab, where GitLab said.
    pub fn job_received(&self, runner: &RunnerLabels, queued: Option<Duration>) {
        self.jobs.get_or_create(runner).inc();
        if let Some(queued) = queued {
            self.job_queue_duration.get_or_create(runner).observe(queued.as_secs_f64());
        }
    }

    /// Counts a job whose verdict is known; `failure` is the reason of a failed one.
    pub fn job_concluded(&self, runner: &RunnerLabels, took: Duration, failure: Option<&str>) {
        self.job_duration.get_or_create(runner).observe(took.as_secs_f64());
        if let Some(reason) = failure {
            let labels = FailureLabels {
                runner: runner.runner.clone(),
                runner_name: runner.runner_name.clone(),
                system_id: runner.system_id.clone(),
                failure_reason: reason.to_owned(),
            };
            self.failed_jobs.get_or_create(&labels).inc();
        }
    }

    /// Counts a request for a job as under way until the guard is dropped.
    pub fn requesting(&self, runner: &RunnerLabels) -> RequestGuard {
        let gauge = self.request_concurrency.get_or_create_owned(runner);
        gauge.inc();
        RequestGuard(gauge)
    }

    /// Counts a call to GitLab; `status` is `None` when no answer came.
    pub fn api_request(&self, runner: &RunnerLabels, endpoint: &'static str, status: Option<u16>) {
        let labels = ApiLabels {
            runner: runner.runner.clone(),
            system_id: runner.system_id.clone(),
            endpoint,
            // gitlab-runner's number for "no answer".
            status: status.map_or_else(|| "-1".to_owned(), |status| status.to_string()),
        };
        self.api_requests.get_or_create(&labels).inc();
    }

    /// Counts a line at this level.
    pub fn error_logged(&self, level: &'static str) {
        self.errors.get_or_create(&LevelLabels { level }).inc();
    }

    /// Notes how long a sweep took.
    pub fn swept(&self, took: Duration) {
        self.sweep.observe(took.as_secs_f64());
    }

    /// Counts a call to a backend and notes how long it took.
    pub fn backend_call(&self, backend: &str, verb: &'static str, kind: CallKind, took: Duration) {
        let backend = backend.to_owned();
        let verb_labels = VerbLabels { backend: backend.clone(), verb };
        self.call_duration.get_or_create(&verb_labels).observe(took.as_secs_f64());
        self.calls.get_or_create(&CallLabels { backend, verb, kind }).inc();
    }

    /// Notes how long after the end of a job GitLab confirmed its verdict.
    pub fn confirmed(&self, backend: &str, lag: Duration) {
        let labels = BackendLabels { backend: backend.to_owned() };
        self.confirm_lag.get_or_create(&labels).observe(lag.as_secs_f64());
    }

    /// Counts a write transaction.
    pub fn store_transaction(&self) {
        self.transactions.inc();
    }

    /// Takes in how many write transactions there were since the start.
    pub fn set_store_transactions(&self, total: u64) {
        self.transactions.inc_by(total.saturating_sub(self.transactions.get()));
    }

    /// Counts an event that could not happen.
    pub fn illegal_transition(&self) {
        self.illegal_transitions.inc();
    }

    /// Gives how many write transactions there were.
    pub fn store_transactions(&self) -> u64 {
        self.transactions.get()
    }

    /// Writes everything as Prometheus text, with what the store knows now.
    pub fn render(&self, snapshot: &Snapshot) -> String {
        let mut text = String::new();
        let scrape = scrape_registry(snapshot);
        let written = encode_registry(&mut text, &self.registry)
            .and_then(|()| encode_registry(&mut text, &scrape));
        match written {
            Ok(()) => prometheus_text(&text),
            // A String takes every write; an empty page is better than a panic.
            Err(std::fmt::Error) => String::new(),
        }
    }
}

/// A request for a job that is under way.
#[derive(Debug)]
#[must_use = "the request counts as under way until this is dropped"]
pub struct RequestGuard(Gauge);

impl Drop for RequestGuard {
    fn drop(&mut self) {
        self.0.dec();
    }
}

fn scrape_registry(snapshot: &Snapshot) -> Registry {
    let mut registry = Registry::default();
    let by_runner: Family<RunnerStateLabels, Gauge> = Family::default();
    let by_backend: Family<BackendStateLabels, Gauge> = Family::default();
    for job in &snapshot.jobs {
        let count = i64::try_from(job.count).unwrap_or(i64::MAX);
        let labels = RunnerStateLabels {
            runner: job.runner.runner.clone(),
            runner_name: job.runner.runner_name.clone(),
            system_id: job.runner.system_id.clone(),
            state: job.state,
        };
        by_runner.get_or_create(&labels).inc_by(count);
        let labels = BackendStateLabels { backend: job.backend.clone(), state: job.state };
        by_backend.get_or_create(&labels).inc_by(count);
    }
    let unsent: Gauge = Gauge::default();
    unsent.set(i64::try_from(snapshot.unsent_bytes).unwrap_or(i64::MAX));
    registry.register("gitlab_runner_jobs", "Jobs that are owed, by state", by_runner);
    registry.register("bridge_jobs", "Jobs that are owed, by backend and state", by_backend);
    registry.register("bridge_unsent_bytes", "Bytes of traces not yet at GitLab", unsent);
    process(&mut registry);
    registry
}

/// Adds what the kernel says of this process, under the names every Prometheus client uses.
fn process(registry: &mut Registry) {
    /// Ticks in a second as `/proc` counts them; the kernel's interface fixes it.
    const USER_HZ: f64 = 100.0;
    let gauge = |registry: &mut Registry, name: &str, help: &str, value: f64| {
        let gauge = Gauge::<f64, AtomicU64>::default();
        gauge.set(value);
        registry.register(name, help, gauge);
    };
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let stat = read("/proc/self/stat");
    // The second field is the program's name in parentheses and may hold anything.
    let fields: Vec<f64> = stat
        .rsplit_once(") ")
        .map(|(_before, rest)| rest.split(' ').map(|f| f.parse().unwrap_or(0.0)).collect())
        .unwrap_or_default();
    if let (Some(user), Some(system)) = (fields.get(11), fields.get(12)) {
        let cpu = Counter::<f64, AtomicU64>::default();
        cpu.inc_by((user + system) / USER_HZ);
        registry.register("process_cpu_seconds", "CPU time used", cpu);
    }
    let boot = read("/proc/stat")
        .lines()
        .find_map(|line| line.strip_prefix("btime ")?.parse::<f64>().ok());
    if let (Some(boot), Some(start)) = (boot, fields.get(19)) {
        let help = "When the process started, Unix time";
        gauge(registry, "process_start_time_seconds", help, boot + start / USER_HZ);
    }
    if let Some(size) = fields.get(20) {
        gauge(registry, "process_virtual_memory_bytes", "Virtual memory", *size);
    }
    let resident = read("/proc/self/status").lines().find_map(|line| {
        let kib = line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?;
        kib.trim().parse::<f64>().ok()
    });
    if let Some(resident) = resident {
        gauge(registry, "process_resident_memory_bytes", "Resident memory", resident * 1024.0);
    }
    if let Ok(open) = std::fs::read_dir("/proc/self/fd") {
        // One of them is the directory being read.
        let open = u32::try_from(open.count().saturating_sub(1)).unwrap_or(u32::MAX);
        gauge(registry, "process_open_fds", "Open file descriptors", open.into());
    }
    let limits = read("/proc/self/limits");
    let max = limits.lines().find_map(|line| {
        let soft = line.strip_prefix("Max open files")?.split_whitespace().next()?;
        soft.parse::<f64>().ok()
    });
    if let Some(max) = max {
        gauge(registry, "process_max_fds", "Limit of open file descriptors", max);
    }
}

/// Turns OpenMetrics text into the older Prometheus text, in which a counter's type is told of its
/// full name. gitlab-runner has a gauge `gitlab_runner_jobs` and a counter `gitlab_runner_jobs_total`,
/// which OpenMetrics would take for one metric with two types.
fn prometheus_text(open_metrics: &str) -> String {
    let mut text = String::with_capacity(open_metrics.len());
    let mut help: Option<&str> = None;
    for line in open_metrics.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            help = rest.split_once(' ').map(|(_name, help)| help);
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap_or((rest, "untyped"));
            let (suffix, kind) = match kind {
                "counter" => ("_total", kind),
                "info" => ("_info", "gauge"),
                _ => ("", kind),
            };
            let written = match help.take() {
                Some(help) => writeln!(text, "# HELP {name}{suffix} {help}"),
                None => Ok(()),
            };
            // A String takes every write.
            if written.and_then(|()| writeln!(text, "# TYPE {name}{suffix} {kind}")).is_err() {
                return text;
            }
        } else if !line.starts_with('#') {
            text.push_str(line);
            text.push('\n');
        }
    }
    text
}

fn to_i64(number: usize) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runner() -> RunnerLabels {
        RunnerLabels {
            runner: "abcdefghi".into(),
            runner_name: "cluster-ci".into(),
            system_id: "s_0123456789ab".into(),
        }
    }

    /// The lines of ours, without what the kernel says of this process.
    fn ours(text: &str) -> String {
        let ours = text.lines().filter(|line| !line.contains("process_"));
        ours.map(|line| format!("{line}\n")).collect()
    }

    #[test]
    fn the_page_reads_as_prometheus_text_with_gitlab_runners_names() {
        let metrics = Metrics::new(&BuildInfo {
            name: "bridge".into(),
            version: "1.2.3".into(),
            revision: "abc".into(),
            os: "linux".into(),
            architecture: "amd64".into(),
        });
        metrics.set_settings(500, &[RunnerSettings { labels: runner(), limit: 20 }]);
        metrics.job_received(&runner(), Some(Duration::from_millis(2500)));
        metrics.job_concluded(&runner(), Duration::from_secs(45), Some("script_failure"));
        metrics.api_request(&runner(), "request_job", Some(201));
        metrics.api_request(&runner(), "patch_trace", None);
        let guard = metrics.requesting(&runner());
        metrics.backend_call("c", "poll", CallKind::Transient, Duration::from_millis(30));
        metrics.store_transaction();
        let snapshot = Snapshot {
            jobs: vec![
                JobCount { runner: runner(), backend: "c".into(), state: "running", count: 3 },
                JobCount { runner: runner(), backend: "d".into(), state: "running", count: 4 },
            ],
            unsent_bytes: 77,
        };
        let text = ours(&metrics.render(&snapshot));
        // Series of one metric come in the order of a hash map.
        let mut without_buckets: Vec<&str> =
            text.lines().filter(|line| !line.contains("_bucket{")).collect();
        without_buckets.sort_unstable();
        insta::assert_snapshot!(without_buckets.join("\n"));
        drop(guard);
        let text = metrics.render(&snapshot);
        assert!(
            text.contains("gitlab_runner_request_concurrency{runner=\"abcdefghi\",runner_name=\"cluster-ci\",system_id=\"s_0123456789ab\"} 0\n"),
            "{text}"
        );
        assert!(
            text.contains(
                "gitlab_runner_job_duration_seconds_bucket{le=\"60.0\",runner=\"abcdefghi\""
            ),
            "{text}"
        );
    }

    #[test]
    fn the_process_itself_is_measured() {
        let text = Metrics::new(&BuildInfo::default()).render(&Snapshot::default());
        for name in [
            "process_cpu_seconds_total",
            "process_resident_memory_bytes",
            "process_virtual_memory_bytes",
            "process_start_time_seconds",
            "process_open_fds",
            "process_max_fds",
        ] {
            let line = text.lines().find(|line| line.starts_with(&format!("{name} ")));
            let value = line.and_then(|line| line.split(' ').nth(1)?.parse::<f64>().ok());
            assert!(value.is_some_and(|value| value >= 0.0), "{name} in {text}");
        }
    }

    #[test]
    fn runners_that_left_the_configuration_lose_their_limit() {
        let metrics = Metrics::new(&BuildInfo::default());
        metrics.set_settings(1, &[RunnerSettings { labels: runner(), limit: 20 }]);
        metrics.set_settings(1, &[]);
        let text = metrics.render(&Snapshot::default());
        assert!(!text.contains("gitlab_runner_limit{"), "{text}");
    }
}
