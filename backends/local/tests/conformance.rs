//! The suite, against real processes.

#![expect(clippy::unwrap_used, reason = "this is a test")]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bridge_backend::conformance::{self, Harness};
use bridge_backend::{Backend, SubmitToken};
use bridge_backend_local::DRIVER;
use camino::{Utf8Path, Utf8PathBuf};

struct Local {
    root: tempfile::TempDir,
    cgroup: &'static str,
    workspaces: AtomicUsize,
}

impl Local {
    fn new(cgroup: &'static str) -> Self {
        let root = tempfile::tempdir().unwrap();
        Self { root, cgroup, workspaces: AtomicUsize::new(0) }
    }

    fn root(&self) -> &Utf8Path {
        Utf8Path::from_path(self.root.path()).unwrap()
    }
}

#[async_trait]
impl Harness for Local {
    fn open(&mut self) -> Arc<dyn Backend> {
        let jobs_dir = self.root().join("jobs");
        let cgroup = self.cgroup;
        let table = toml::toml! {
            jobs_dir = (jobs_dir.as_str())
            kill_grace = "1s"
            cgroup = cgroup
        };
        (DRIVER.open)(table).unwrap()
    }

    fn workspace(&mut self) -> Utf8PathBuf {
        let number = self.workspaces.fetch_add(1, Ordering::Relaxed);
        let path = self.root().join(format!("work space {number}"));
        std::fs::create_dir(&path).unwrap();
        path
    }

    fn job_dir(&self, token: &SubmitToken) -> Option<Utf8PathBuf> {
        Some(self.root().join("jobs").join(token.as_str()))
    }

    fn wall_time(&self) -> Option<Duration> {
        Some(Duration::from_secs(1))
    }
}

/// What real processes must not be let off.
const MUST: &[&str] = &[
    "secrets_are_in_no_argument_list",
    "a_dropped_submission_is_resolved_and_runs_once",
    "a_cancelled_job_ends_with_all_its_processes",
    "the_wall_time_is_a_limit",
    "a_release_may_be_repeated",
];

#[tokio::test]
async fn the_contract_is_kept_without_control_groups() {
    conformance::run(&mut Local::new("off")).await.assert_ran(MUST);
}

#[tokio::test]
async fn the_contract_is_kept_with_control_groups_where_there_are_any() {
    conformance::run(&mut Local::new("auto")).await.assert_ran(MUST);
}
