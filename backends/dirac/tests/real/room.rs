//! Workers whose disk is full.

use std::process::{Command, Stdio};
use std::sync::Arc;

use bridge_backend::{JobRef, Outcome, Pattern};
use camino::Utf8PathBuf;

use crate::bed::{Bed, Site, unwanted};
use crate::workers::shadowed;

/// A small disk under the jobs of a bed.
struct Disk(Utf8PathBuf);

impl Disk {
    /// Mounts it; nothing where nobody may.
    fn under(bed: &Bed, size: &str) -> Option<Self> {
        let at = bed.path().join("jobs");
        let mut mount = Command::new("mount");
        let mount = mount.args(["-t", "tmpfs", "-o", &format!("size={size}"), "bed", at.as_str()]);
        let mounted = mount.stdout(Stdio::null()).stderr(Stdio::null()).status();
        mounted.is_ok_and(|status| status.success()).then_some(Self(at))
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        drop(Command::new("umount").args(["-l", self.0.as_str()]).status());
    }
}

async fn assert_full(site: &Site, job: &JobRef, what: &str) -> String {
    let outcome = site.outcome(job).await;
    let is_full = |detail: &str| detail.contains("disk") && detail.contains("full");
    assert!(
        matches!(&outcome, Outcome::SystemFailed { detail } if is_full(detail)),
        "{what}: {outcome:?}"
    );
    String::from_utf8(site.log(job).await).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_a_failure_that_says_so() {
    if unwanted() {
        return;
    }
    let bed: Arc<Bed> = Bed::start(&["--no-site"]);
    let Some(disk) = Disk::under(&bed, "24m") else {
        println!("left out: this machine lets us mount nothing");
        return;
    };
    bed.tamper(&["site-start"]);
    let site = Site::on(&bed);
    let spec = |script: &str| {
        let mut spec = site.spec(script);
        spec.outputs = vec![Pattern("*.txt".into())];
        spec
    };
    // The job fills it, and does not care.
    let fill = "echo early; echo kept >out.txt; sleep 3; cat /dev/zero >fill 2>/dev/null";
    let job = site.submit(&spec(&format!("{fill}; echo late; exit 0\n"))).await;
    let log = assert_full(&site, &job, "filled").await;
    assert!(log.starts_with("early\n"), "{log}");
    assert!(log.ends_with("bridge: the disk of this worker is full\n"), "{log}");
    site.backend.collect(&job, &site.work()).await.unwrap();
    assert_eq!(std::fs::read(site.work().join("out.txt")).unwrap(), b"kept\n");
    // Not even what the helper keeps for itself is left to it.
    let job = site.submit(&spec(&format!("rm -f ../ballast; {fill}; exit 0\n"))).await;
    let log = assert_full(&site, &job, "nothing left").await;
    assert!(log.starts_with("early\n"), "{log}");
    // It is full before the job comes: then another directory will do.
    std::fs::write(disk.0.join("filler"), vec![b'x'; 21 << 20]).unwrap();
    let job = site.submit(&spec("echo ran; exit 3\n")).await;
    assert_eq!(site.outcome(&job).await, Outcome::Exited { code: 3 });
    assert_eq!(site.log(&job).await, b"ran\n");
    // There is no other.
    let no_other =
        "#!/bin/sh\ncase $* in */dev/shm/*) exec /usr/bin/mktemp \"$@\" ;; esac\nexit 1\n";
    let path = shadowed(&site, "no-other", "mktemp", no_other);
    let odd = format!(r#"{{"env": {{"PATH": "{path}"}}}}"#);
    let job = site.submit_to(&odd, &spec("echo ran >>@/ran\n")).await;
    assert_eq!(assert_full(&site, &job, "no room").await, "");
    assert!(!site.dir.path().join("ran").exists());
}
