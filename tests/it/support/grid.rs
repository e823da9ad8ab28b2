//! A private DIRAC for the test binary: a real DiracX server with a site that runs what it is sent,
//! started by `tests/beds/dirac`.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, LazyLock};

use bridge::coordinator::Options;
use serde_json::{Value, json};

use super::{Bed, Where};

/// Says whether the run was asked to do without DIRAC; then the test says so too.
pub(crate) fn left_out() -> bool {
    let without = std::env::var("BRIDGE_TESTS_WITHOUT").unwrap_or_default();
    let left_out = without.split_whitespace().any(|bed| bed == "dirac");
    if left_out {
        println!("left out: the run was asked to do without DIRAC");
    }
    left_out
}

/// What a backend is told on a bed, where everything happens soon; a test's own words win.
const QUICK: [(&str, &str); 5] = [
    ("settle", "1s"),
    ("log_interval", "1s"),
    ("cancel_interval", "1s"),
    ("kill_grace", "5s"),
    ("request_timeout", "20s"),
];

/// A DiracX server and its site.
#[derive(Debug)]
pub(crate) struct Grid {
    dir: PathBuf,
    url: String,
}

impl Grid {
    /// Gives the one that tests share; each has a job group of its own there.
    ///
    /// Its site is slow to tell jobs that they were killed, as DIRAC is, so that they must look themselves.
    /// It goes when this process does: a static is never dropped, but the bed looks after its owner.
    pub(crate) fn shared() -> Arc<Self> {
        static SHARED: LazyLock<Arc<Grid>> =
            LazyLock::new(|| Grid::begin("shared", &["--beat", "60"]));
        Arc::clone(&SHARED)
    }

    /// Starts one that ends with whoever holds it, for tests that treat it badly.
    pub(crate) fn start(name: &str, args: &[&str]) -> Arc<Self> {
        Self::begin(name, args)
    }

    fn begin(name: &str, args: &[&str]) -> Arc<Self> {
        let pid = std::process::id().to_string();
        let dir = std::env::temp_dir().join(format!("bridge-grid-{pid}-{name}"));
        let output = script()
            .arg("start")
            .arg("--dir")
            .arg(&dir)
            .args(["--for", &pid])
            .args(args)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "the DIRAC bed does not start (tests/run --without dirac does without): {}",
            String::from_utf8_lossy(&output.stderr)
        );
        let said = String::from_utf8_lossy(&output.stdout);
        let url = said.lines().find_map(|line| line.strip_prefix("DIRACX_URL=")).unwrap();
        Arc::new(Self { url: url.to_owned(), dir })
    }

    /// Gives a bed whose jobs run here; `backend` goes into the backend's table.
    pub(crate) async fn bed(self: &Arc<Self>, options: Options, backend: &str) -> Bed {
        let place = Where::Dirac { grid: Arc::clone(self) };
        let bed = Bed::new(place, options, "", "").await;
        bed.write_config("", "", backend);
        bed
    }

    /// Gives the backend's table in a configuration, without the lines in `own`.
    pub(super) fn table(&self, group: &str, own: &str) -> String {
        let mut table = format!(
            "kind = \"dirac\"\nurl = \"{}\"\ntoken_file = \"{}\"\njob_group = \"{group}\"",
            self.url,
            self.token_file().display(),
        );
        let set = |key: &str| {
            own.lines().any(|line| line.split_once('=').is_some_and(|(k, _)| k.trim() == key))
        };
        for (key, value) in QUICK.into_iter().filter(|(key, _)| !set(key)) {
            write!(table, "\n{key} = \"{value}\"").unwrap();
        }
        table
    }

    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// Gives the robot's token, good for a day.
    pub(crate) fn token_file(&self) -> PathBuf {
        self.dir.join("state/ci-robot.token")
    }

    /// Gives how many sandboxes the store has.
    pub(crate) fn sandboxes(&self) -> usize {
        std::fs::read_dir(self.dir.join("state/s3/sandboxes")).map_or(0, Iterator::count)
    }

    /// Where the site's jobs have their directories; one goes with its job.
    pub(crate) fn jobs_dir(&self) -> PathBuf {
        self.dir.join("jobs")
    }

    /// Does something to the bed: `server-stop KILL`, `site-start`, …
    pub(crate) fn tamper(&self, args: &[&str]) {
        let output = script().args(args).arg("--dir").arg(&self.dir).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{args:?}: {said}");
    }

    /// Does something to the bed, and gives what it says.
    pub(crate) fn said(&self, args: &[&str]) -> String {
        let output = script().args(args).arg("--dir").arg(&self.dir).output().unwrap();
        assert!(output.status.success(), "{args:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Opens a way to the server with a certificate that is `good`, `expired` or of `other`; gives its
    /// address and the file of the authority that signed it.
    pub(crate) fn tls(&self, kind: &str) -> (String, String) {
        let said = self.said(&["tls", kind]);
        let value = |key: &str| {
            let line = said.lines().find_map(|line| line.strip_prefix(key));
            line.unwrap().to_owned()
        };
        (value("TLS_URL="), value("TLS_CA="))
    }

    /// Asks the server itself for the jobs of a bed, by their numbers.
    pub(crate) fn jobs(&self, bed: &Bed) -> Vec<Value> {
        let token = std::fs::read_to_string(self.token_file()).unwrap();
        let question = json!({
            "parameters": ["JobID", "JobName", "Status", "MinorStatus", "RescheduleCounter"],
            "search": [{ "parameter": "JobGroup", "operator": "eq", "value": bed.group() }],
            "sort": [{ "parameter": "JobID", "direction": "asc" }],
        });
        let output = Command::new("curl")
            .args(["-sS", "--noproxy", "*", "-H", "Content-Type: application/json", "-H"])
            .arg(format!("Authorization: Bearer {}", token.trim()))
            .args(["-d", &question.to_string()])
            .arg(format!("{}/api/jobs/search?per_page=1000", self.url))
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        let rows: Value = serde_json::from_str(&said).unwrap_or_else(|_| panic!("{output:?}"));
        rows.as_array().unwrap_or_else(|| panic!("{rows}")).clone()
    }

    /// Asserts that each job was submitted once.
    pub(crate) fn assert_no_twins(&self, bed: &Bed) {
        let jobs = self.jobs(bed);
        let mut names: Vec<&str> =
            jobs.iter().map(|job| job["JobName"].as_str().unwrap()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), jobs.len(), "no token has two jobs: {jobs:#?}");
    }
}

fn script() -> Command {
    let mut command = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/beds/dirac"));
    command.stdin(Stdio::null());
    command
}

impl Drop for Grid {
    fn drop(&mut self) {
        drop(script().args(["stop", "--dir"]).arg(&self.dir).status());
    }
}
