//! How a coordinator is set up, and what can be turned while it runs.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

/// The release of GitLab that is played.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Version {
    /// 16.11: no graceful cancel, silence is borne for 60 minutes.
    V16_11,
    /// 17.11: graceful cancel, no failure reasons of 19.1, 60 minutes.
    V17_11,
    /// 19.x: all failure reasons, 30 minutes.
    #[default]
    Current,
}

impl Version {
    /// The version's text as the server tells it.
    pub fn text(self) -> &'static str {
        match self {
            Self::V16_11 => "16.11.10",
            Self::V17_11 => "17.11.7",
            Self::Current => "19.4.0",
        }
    }

    /// The names of `features.failure_reasons`.
    pub fn failure_reasons(self) -> impl Iterator<Item = &'static str> {
        let newer: &[&str] = match self {
            Self::V16_11 | Self::V17_11 => &[],
            Self::Current => NEWER_REASONS,
        };
        REASONS.iter().chain(newer).copied()
    }

    pub(super) fn has_canceling(self) -> bool {
        match self {
            Self::V16_11 => false,
            Self::V17_11 | Self::Current => true,
        }
    }

    /// How long a running job may be silent.
    pub(super) fn silence(self) -> Duration {
        match self {
            Self::V16_11 | Self::V17_11 => Duration::from_secs(60 * 60),
            Self::Current => Duration::from_secs(30 * 60),
        }
    }

    pub(super) fn silence_reason(self, canceling: bool) -> &'static str {
        match (self, canceling) {
            (Self::V16_11 | Self::V17_11, _) => "stuck_or_timeout_failure",
            (Self::Current, false) => "no_updates_running",
            (Self::Current, true) => "no_updates_canceling",
        }
    }

    pub(super) fn overrun_reason(self, canceling: bool) -> &'static str {
        match (self, canceling) {
            (Self::V16_11 | Self::V17_11, _) => "job_execution_server_timeout",
            (Self::Current, false) => "server_timeout_running",
            (Self::Current, true) => "server_timeout_canceling",
        }
    }
}

const REASONS: &[&str] = &[
    "unknown_failure",
    "script_failure",
    "api_failure",
    "stuck_or_timeout_failure",
    "runner_system_failure",
    "missing_dependency_failure",
    "runner_unsupported",
    "stale_schedule",
    "job_execution_timeout",
    "archived_failure",
    "unmet_prerequisites",
    "scheduler_failure",
    "data_integrity_failure",
    "forward_deployment_failure",
    "user_blocked",
    "project_deleted",
    "ci_quota_exceeded",
    "pipeline_loop_detected",
    "no_matching_runner",
    "trace_size_exceeded",
    "builds_disabled",
    "environment_creation_failure",
    "deployment_rejected",
    "failed_outdated_deployment_job",
    "protected_environment_failure",
    "insufficient_bridge_permissions",
    "downstream_bridge_project_not_found",
    "invalid_bridge_trigger",
    "upstream_bridge_project_not_found",
    "insufficient_upstream_permissions",
    "bridge_pipeline_is_child_pipeline",
    "downstream_pipeline_creation_failed",
    "secrets_provider_not_found",
    "reached_max_descendant_pipelines_depth",
    "ip_restriction_failure",
    "reached_max_pipeline_hierarchy_size",
    "reached_downstream_pipeline_trigger_rate_limit",
];

const NEWER_REASONS: &[&str] = &[
    "job_execution_server_timeout",
    "stuck_pending_with_matching_runners",
    "stuck_pending_no_matching_runners",
    "no_updates_running",
    "no_updates_canceling",
    "server_timeout_running",
    "server_timeout_canceling",
    "runner_configuration_error",
    "runner_external_dependency_failure",
    "runner_interrupted",
    "duo_workflow_not_allowed",
    "job_router_failure",
    "job_token_expired",
    "id_token_burned_project_path",
    "downstream_project_trigger_resolved_to_empty",
];

/// Whether runners may still be registered with a registration token.
#[derive(Clone, Debug)]
pub enum Registration {
    /// With this token.
    Allowed(String),
    /// Switched off: 410.
    Disallowed,
}

/// How a coordinator is set up.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where to listen; port 0 takes a free one.
    pub bind: SocketAddr,
    /// The relative root (`/gitlab`), or empty.
    pub root: String,
    /// The release that is played.
    pub version: Version,
    /// Legacy registration.
    pub registration: Registration,
    /// Whether the traces of finished jobs are kept. Without, memory stays small in long runs;
    /// length and checksum are kept in any case.
    pub keep_traces: bool,
    /// Whether every call is recorded with its body, up to ten thousand calls.
    pub record: bool,
    /// The number of the first job.
    pub first_job: i64,
    /// What can be turned later, too.
    pub knobs: Knobs,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            bind: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            root: String::new(),
            version: Version::default(),
            registration: Registration::Disallowed,
            keep_traces: true,
            record: false,
            first_job: 1000,
            knobs: Knobs::default(),
        }
    }
}

/// What the job tokens look like.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TokenKind {
    /// `glcbt-64_` and 20 random characters; no time limit of its own.
    #[default]
    Stored,
    /// `glcbt-` and a JWT of more than 1 KB, which expires 5 minutes after the job's timeout.
    Jwt,
}

/// Calls per minute and token; 0 is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RateLimits {
    /// `jobs/request`, by runner token.
    pub requests: u32,
    /// PATCH of the trace, by job token.
    pub patches: u32,
    /// The other job calls, by job token.
    pub updates: u32,
}

impl RateLimits {
    /// What GitLab has without settings of its own.
    pub const GITLAB: Self = Self { requests: 2000, patches: 200, updates: 200 };
}

/// What can be turned while the coordinator runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Knobs {
    /// How long a `jobs/request` without news is held. GitLab's own 50 s would hold up the end of
    /// every client that waits for its request to return.
    pub long_poll: Option<Duration>,
    /// Live traces: the first so many final updates with a checksum are answered 202. `u32::MAX`
    /// lasts until the state is five minutes old.
    pub live_trace: Option<u32>,
    /// Replaces `X-GitLab-Trace-Update-Interval` on PATCH, whatever it says.
    pub trace_interval: Option<String>,
    /// Replaces the interval of the 202 to a final update.
    pub final_interval: Option<String>,
    /// The trace limit in MiB; at 0 the first whole MiB is too much.
    pub trace_limit_mib: u64,
    /// Calls per minute.
    pub rate_limits: RateLimits,
    /// The kind of job tokens handed out from now on.
    pub token_kind: TokenKind,
    /// How long new runner tokens live.
    pub runner_token_life: Option<Duration>,
    /// Whether `verify` answers in plain text, as old servers did.
    pub plain_verify: bool,
    /// Whether handed-out jobs stay pending until the runner says `running` (18.5 to 18.7).
    pub two_phase: bool,
    /// Whether artifacts are switched off: 405.
    pub artifacts_off: bool,
    /// The largest artifact in bytes; a larger one is answered 413.
    pub max_artifact_size: u64,
    /// The size a packed dotenv report must stay below.
    pub dotenv_size: u64,
    /// How many variables a dotenv report may have.
    pub dotenv_variables: usize,
    /// How long uploads are paused after each piece.
    pub slow_reader: Option<Duration>,
}

impl Default for Knobs {
    fn default() -> Self {
        Self {
            long_poll: Some(Duration::from_secs(1)),
            live_trace: None,
            trace_interval: None,
            final_interval: None,
            trace_limit_mib: 100,
            rate_limits: RateLimits::default(),
            token_kind: TokenKind::default(),
            runner_token_life: None,
            plain_verify: false,
            two_phase: false,
            artifacts_off: false,
            max_artifact_size: 100 * 1024 * 1024,
            dotenv_size: 5120,
            dotenv_variables: 20,
            slow_reader: None,
        }
    }
}

/// A runner as it is created in GitLab's pages.
#[derive(Clone, Debug)]
pub struct RunnerOptions {
    /// The description.
    pub description: String,
    /// The tags.
    pub tags: Vec<String>,
    /// Whether it takes jobs without tags.
    pub run_untagged: bool,
    /// The runner's own limit of a job's time.
    pub maximum_timeout: Option<Duration>,
    /// Whether it begins paused.
    pub paused: bool,
    /// The token instead of a random one.
    pub token: Option<String>,
}

impl Default for RunnerOptions {
    fn default() -> Self {
        Self {
            description: "bridge under test".to_owned(),
            tags: Vec::new(),
            run_untagged: true,
            maximum_timeout: None,
            paused: false,
            token: None,
        }
    }
}
