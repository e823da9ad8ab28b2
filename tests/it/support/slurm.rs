//! A private Slurm for the test binary, started once by `tests/beds/slurm`.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};

/// Says whether the run was asked to do without Slurm; then the test says so too.
pub(crate) fn left_out() -> bool {
    let without = std::env::var("BRIDGE_TESTS_WITHOUT").unwrap_or_default();
    let left_out = without.split_whitespace().any(|bed| bed == "slurm");
    if left_out {
        println!("left out: the run was asked to do without Slurm");
    }
    left_out
}

/// A cluster that ends with the test that holds it.
///
/// Tests that share a cluster would see each other's jobs; one starts in 0.2 s.
pub(crate) struct Cluster {
    dir: tempfile::TempDir,
}

static STARTING: Mutex<()> = Mutex::new(());

impl Cluster {
    pub(crate) fn start(args: &[&str]) -> Self {
        // One at a time, since each looks for free ports first.
        let _one = STARTING.lock().unwrap_or_else(PoisonError::into_inner);
        let dir = tempfile::Builder::new().prefix("bridge-slurm-").tempdir().unwrap();
        let output = bed()
            .arg("start")
            .arg("--dir")
            .arg(dir.path())
            .args(["--fast", "--nodes", "2", "--for", &std::process::id().to_string()])
            .args(args)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "the Slurm bed does not start (tests/run --without slurm does without): {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Self { dir }
    }

    pub(crate) fn conf(&self) -> PathBuf {
        self.dir.path().join("etc/slurm.conf")
    }

    /// Runs a helper of the bed: `ctld-stop`, `node-kill n1`, …
    pub(crate) fn bed(&self, args: &[&str]) {
        let status = bed().args(args).arg("--dir").arg(self.dir.path()).status().unwrap();
        assert!(status.success(), "{args:?}");
    }

    /// Asks the cluster directly.
    pub(crate) fn ask(&self, program: &str, args: &[&str]) -> String {
        let output = Command::new(program)
            .args(args)
            .env("SLURM_CONF", self.conf())
            .stdin(Stdio::null())
            .output()
            .unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    }
}

fn bed() -> Command {
    Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/beds/slurm"))
}

impl Drop for Cluster {
    fn drop(&mut self) {
        drop(bed().args(["stop", "--dir"]).arg(self.dir.path()).status());
    }
}
