//! A store that does not have what was handed in, for a while or for good.

use std::path::PathBuf;

use bridge_backend::{ErrorKind, JobRef, Outcome, Pattern};

use crate::bed::{Bed, Site, until, unwanted, wait_for};

/// Gives the files in the store that a job has handed in, in this order.
async fn stored(site: &Site, job: &JobRef) -> Vec<PathBuf> {
    let token = std::fs::read_to_string(site.bed.token_file()).unwrap();
    let http = reqwest::Client::builder().no_proxy().tls_certs_only([]).build().unwrap();
    let url = format!("{}/api/jobs/{}/sandbox/output", site.bed.url, job.id);
    let answer = http.get(url).bearer_auth(token.trim()).send().await.unwrap();
    let list: Vec<String> = serde_json::from_str(&answer.text().await.unwrap()).unwrap();
    let files = list.iter().map(|pfn| {
        // The store's files are named by the hash of their keys.
        let (_, key) = pfn.split_once("/sandboxes/").unwrap();
        let name = std::process::Command::new("sh")
            .args(["-c", "printf %s \"$1\" | sha256sum | cut -d' ' -f1", "sh", key])
            .output()
            .unwrap();
        let name = String::from_utf8(name.stdout).unwrap();
        site.bed.path().join("state/s3/sandboxes").join(name.trim()).into_std_path_buf()
    });
    files.collect()
}

/// Runs a job whose log comes in two pieces; gives what it has handed in: the two pieces, its outputs, the
/// mark of its end.
async fn in_two_pieces(site: &Site) -> (JobRef, Vec<PathBuf>) {
    let mut spec = site.spec(&format!("echo one\n{}echo two; echo out >out.txt\n", wait_for("go")));
    spec.outputs = vec![Pattern("*.txt".into())];
    let job = site.submit(&spec).await;
    until("the first piece".to_owned(), async || {
        let chunk = site.backend.read_log(&job, 0, 100).await.ok()?;
        (!chunk.bytes.is_empty()).then_some(())
    })
    .await
    .unwrap();
    site.touch("go");
    assert_eq!(site.outcome(&job).await, Outcome::Exited { code: 0 });
    let files = stored(site, &job).await;
    assert!(files.len() >= 4, "{files:?}");
    (job, files)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_store_does_not_have_yet_is_asked_for_again() {
    if unwanted() {
        return;
    }
    let first = Site::on(&Bed::shared());
    let (job, files) = in_two_pieces(&first).await;
    let aside = |file: &PathBuf| file.with_extension("aside");
    for file in &files {
        std::fs::rename(file, aside(file)).unwrap();
    }
    // One that knows nothing, as after a restart.
    let site = Site::on(&first.bed);
    let chunk = site.backend.read_log(&job, 0, 100).await.unwrap();
    assert!(chunk.bytes.is_empty() && !chunk.end, "{chunk:?}");
    let error = site.backend.collect(&job, &site.work()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Transient, "{error:?}");
    std::fs::rename(aside(&files[0]), &files[0]).unwrap();
    let early = until("the first piece".to_owned(), async || {
        let chunk = site.backend.read_log(&job, 0, 100).await.unwrap();
        (!chunk.bytes.is_empty()).then_some(chunk)
    });
    let early = early.await.unwrap();
    assert!(early.bytes == "one\n" && !early.end, "{early:?}");
    for file in files.iter().filter(|file| **file != files[0]) {
        std::fs::rename(aside(file), file).unwrap();
    }
    assert_eq!(site.log(&job).await, b"one\ntwo\n");
    until("the outputs".to_owned(), async || site.backend.collect(&job, &site.work()).await.ok())
        .await
        .unwrap();
    assert_eq!(std::fs::read(site.work().join("out.txt")).unwrap(), b"out\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_store_has_lost_ends_the_log_with_a_reason() {
    if unwanted() {
        return;
    }
    let first = Site::on(&Bed::shared());
    let (job, files) = in_two_pieces(&first).await;
    std::fs::remove_file(&files[1]).unwrap();
    let site = Site::on(&first.bed);
    let (mut bytes, mut asked) = (Vec::new(), 0_u32);
    let error = until("the end of the log".to_owned(), async || {
        let from = u64::try_from(bytes.len()).unwrap();
        match site.backend.read_log(&job, from, 100).await {
            Ok(chunk) => {
                assert!(!chunk.end, "a piece is missing");
                bytes.extend_from_slice(&chunk.bytes);
                asked += 1;
                None
            }
            Err(error) => Some(error),
        }
    });
    let error = error.await.unwrap();
    assert_eq!(error.kind(), ErrorKind::Lost, "{error:?}");
    assert!(error.to_string().contains("lost a piece"), "{error}");
    assert_eq!(bytes, b"one\n");
    assert!(asked > 2, "it is given some time");
    // What comes after it is still there.
    site.backend.collect(&job, &site.work()).await.unwrap();
    assert_eq!(std::fs::read(site.work().join("out.txt")).unwrap(), b"out\n");
}
