//! The suite that every backend runs, against a real Slurm.
//!
//! The programs that the backend calls are the real ones behind a line of shell each, so that an
//! answer can be lost and questions can be counted.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bridge_backend::conformance::{self, CHECKS, Harness, Loss};
use bridge_backend::{Backend, ExternalId, JobRef, SubmitToken};
use camino::Utf8PathBuf;

use crate::bed::{Bed, Site, programs_in, unwanted};

/// Fails once in the way that `lose` asks for.
const SBATCH: &str = r#"
printf . >> "$0.asked"
[ -e "$0.lose" ] || exec /usr/bin/sbatch "$@"
loss=$(cat "$0.lose") && rm "$0.lose"
[ "$loss" = question ] || /usr/bin/sbatch "$@" > /dev/null
echo 'sbatch: error: Batch job submission failed: Socket timed out on send/recv operation' >&2
exit 1"#;

/// Edits its answer once by a `sed` script, if there is one.
const SQUEUE: &str = r#"
printf . >> "$0.asked"
mv "$0.sed" "$0.sed.$$" 2> /dev/null || exec /usr/bin/squeue "$@"
/usr/bin/squeue "$@" | sed -f "$0.sed.$$""#;

const SACCT: &str = r#"
printf . >> "$0.asked"
exec /usr/bin/sacct "$@""#;

struct Real {
    bed: Arc<Bed>,
    site: Site,
    bin: Utf8PathBuf,
    workspaces: AtomicUsize,
    held: bool,
    /// A job over its limit is awaited.
    hurry: AtomicBool,
}

impl Real {
    fn start() -> Self {
        // Of its own: jobs are held by closing the partition.
        let bed = Bed::start(&["--nodes", "1"]);
        let site = Site::on(&bed, "settle = '1s'");
        let bin = programs_in(
            &site.dir,
            &[
                ("sbatch", SBATCH),
                ("squeue", SQUEUE),
                ("sacct", SACCT),
                ("scancel", "exec /usr/bin/scancel \"$@\""),
                ("scontrol", "exec /usr/bin/scontrol \"$@\""),
                ("sinfo", "exec /usr/bin/sinfo \"$@\""),
            ],
        );
        let (workspaces, hurry) = (AtomicUsize::new(0), AtomicBool::new(false));
        Self { bed, site, bin, workspaces, held: false, hurry }
    }

    /// Gives the id of the job that runs with the least limit there is, once the other one with that
    /// limit was good.
    fn long_job(&self) -> Option<String> {
        let format = ["--noheader", "--states=all", "--format=%l %T %A"];
        let listing = self.bed.slurm("squeue", &format);
        let of = |state: &str| {
            let state = format!("1:00 {state} ");
            listing.lines().find_map(|line| line.trim().strip_prefix(&state).map(str::to_owned))
        };
        of("COMPLETED").and_then(|_short| of("RUNNING"))
    }
}

#[async_trait]
impl Harness for Real {
    fn open(&mut self) -> Arc<dyn Backend> {
        self.site.reopened(&format!("bin_dir = '{}'\nsettle = '1s'", self.bin))
    }

    fn workspace(&mut self) -> Utf8PathBuf {
        let number = self.workspaces.fetch_add(1, Ordering::Relaxed);
        let path = self.site.path().join(format!("work space {number}"));
        std::fs::create_dir(&path).unwrap();
        path
    }

    async fn tick(&mut self) {
        // Slurm knows no limit below a minute and looks every 30 s; moving the end spares the minute.
        if self.hurry.load(Ordering::Relaxed)
            && let Some(id) = self.long_job()
        {
            self.bed.slurm("scontrol", &["update", &format!("jobid={id}"), "endtime=now"]);
            self.hurry.store(false, Ordering::Relaxed);
        }
    }

    fn job_dir(&self, token: &SubmitToken) -> Option<Utf8PathBuf> {
        Some(self.site.job_dir(token))
    }

    fn queries(&self) -> Option<usize> {
        let asked = ["sbatch", "squeue", "sacct"]
            .map(|name| std::fs::read(self.bin.join(format!("{name}.asked"))).unwrap_or_default());
        Some(asked.iter().map(Vec::len).sum())
    }

    fn wall_time(&self) -> Option<Duration> {
        self.hurry.store(true, Ordering::Relaxed);
        Some(Duration::from_secs(60))
    }

    fn unknown_id(&self) -> ExternalId {
        ExternalId("67000000".to_owned())
    }

    fn finds_strays(&self) -> bool {
        // Whom Slurm ends is `ProctrackType`'s decision. The bed's `linuxproc` follows parents; finding
        // a process that init adopted takes `cgroup`, which not every machine with tests can give.
        false
    }

    async fn lose_next_submit(&mut self, loss: Loss) -> bool {
        let loss = match loss {
            Loss::Question => "question",
            Loss::Answer => "answer",
        };
        std::fs::write(self.bin.join("sbatch.lose"), loss).unwrap();
        true
    }

    async fn hold_jobs(&mut self, held: bool) -> bool {
        if self.held != held {
            let state = if held { "state=DOWN" } else { "state=UP" };
            self.bed.slurm("scontrol", &["update", "partitionname=ci", state]);
            self.held = held;
        }
        true
    }

    async fn say_unknown_status(&mut self, job: &JobRef, word: &str) -> bool {
        let sed = format!("s/^{}|[A-Z_]*|/{}|{word}|/\n", job.id, job.id);
        std::fs::write(self.bin.join("squeue.sed"), sed).unwrap();
        true
    }
}

/// Checked beside the others: Slurm takes up to half a minute to look.
const SLOW: &str = "the_wall_time_is_a_limit";

/// Says nothing of a backend with a shared file system.
const NOT_SHARED: &str = "a_workspace_travels_and_its_outputs_come_home";

async fn kept(names: &[&'static str]) {
    if unwanted() {
        return;
    }
    let report = conformance::examine(&mut Real::start(), names).await;
    assert!(report.failed.is_empty(), "the contract was broken:\n{report}");
    report.assert_ran(names);
}

#[tokio::test]
async fn the_contract_is_kept() {
    let left_out = [SLOW, NOT_SHARED];
    let quick: Vec<_> = CHECKS.iter().copied().filter(|name| !left_out.contains(name)).collect();
    kept(&quick).await;
}

#[tokio::test]
async fn the_contract_is_kept_when_time_is_up() {
    kept(&[SLOW]).await;
}
