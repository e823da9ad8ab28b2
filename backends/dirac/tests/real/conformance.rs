//! The suite that every backend runs, against a real DiracX.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bridge_backend::conformance::{self, CHECKS, Harness, Loss};
use bridge_backend::{Backend, ExternalId, JobRef};
use camino::Utf8PathBuf;

use crate::bed::{Bed, PATIENCE, QUICK, open, unwanted};
use crate::proxy::{Mischief, Proxy};

struct Real {
    bed: Arc<Bed>,
    proxy: Proxy,
    dir: tempfile::TempDir,
    workspaces: AtomicUsize,
    held: bool,
}

impl Real {
    async fn start() -> Self {
        // Of its own: jobs are held by closing the site. It is as slow to tell jobs that they were killed as
        // DIRAC is, whose signal leaves a script two seconds only.
        let bed = Bed::start(&["--beat", "60"]);
        let proxy = Proxy::before(&bed.url).await;
        let (dir, workspaces) = (tempfile::tempdir().unwrap(), AtomicUsize::new(0));
        Self { bed, proxy, dir, workspaces, held: false }
    }
}

#[async_trait]
impl Harness for Real {
    fn open(&mut self) -> Arc<dyn Backend> {
        let more = format!("worker_url = '{}'\n{QUICK}", self.bed.url);
        open(&self.proxy.url, &self.bed.token_file(), &more)
    }

    fn workspace(&mut self) -> Utf8PathBuf {
        let number = self.workspaces.fetch_add(1, Ordering::Relaxed);
        let path = self.dir.path().join(format!("work space {number}"));
        std::fs::create_dir(&path).unwrap();
        Utf8PathBuf::from_path_buf(path).unwrap()
    }

    fn patience(&self) -> Duration {
        PATIENCE
    }

    fn queries(&self) -> Option<usize> {
        Some(self.proxy.asked())
    }

    fn wall_time(&self) -> Option<Duration> {
        Some(Duration::from_secs(4))
    }

    fn unknown_id(&self) -> ExternalId {
        ExternalId("67000000".to_owned())
    }

    async fn lose_next_submit(&mut self, loss: Loss) -> bool {
        let mischief = match loss {
            Loss::Question => Mischief::LoseQuestion,
            Loss::Answer => Mischief::LoseAnswer,
        };
        self.proxy.next("POST /api/jobs/jdl", mischief);
        true
    }

    async fn hold_jobs(&mut self, held: bool) -> bool {
        if self.held != held {
            self.bed.tamper(&[if held { "hold" } else { "go" }]);
            self.held = held;
        }
        true
    }

    async fn say_unknown_status(&mut self, _job: &JobRef, word: &str) -> bool {
        self.proxy.next("POST /api/jobs/search", Mischief::Status(word.to_owned()));
        true
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_contract_is_kept() {
    if unwanted() {
        return;
    }
    let mut real = Real::start().await;
    let only = std::env::var("BRIDGE_CONFORMANCE").unwrap_or_default();
    let names: Vec<_> =
        CHECKS.iter().copied().filter(|name| only.is_empty() || name.contains(&only)).collect();
    let report = conformance::examine(&mut real, &names).await;
    assert!(report.failed.is_empty(), "the contract was broken:\n{report}");
    report.assert_ran(&names);
}
