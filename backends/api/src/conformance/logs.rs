//! Logs, by byte.

use super::trial::{Checked, Done, Trial, WAIT_FOR_GO, ensure, offset, put, story};

pub(super) async fn a_log_holds_both_outputs(trial: &mut Trial<'_>) -> Checked {
    let spec = trial.spec("echo one\necho two >&2\necho three\nexit 2\n");
    let job = trial.submit(&spec).await?;
    trial.expect(&job, 2).await?;
    let log = trial.log(&job).await?;
    let log = String::from_utf8_lossy(&log);
    ensure!(log == "one\ntwo\nthree\n", "the log is {log:?}");
    Ok(Done::Checked)
}

pub(super) async fn a_log_is_readable_while_the_job_runs(trial: &mut Trial<'_>) -> Checked {
    let live = trial.backend.capabilities().live_log;
    let spec = trial.spec(format!("echo early\n{WAIT_FOR_GO}echo late\n"));
    let job = trial.submit(&spec).await?;
    trial.wait_running(&job).await?;
    if live {
        let until = tokio::time::Instant::now() + trial.patience();
        loop {
            let chunk = trial.backend.read_log(&job, 0, 1000).await.map_err(story("read"))?;
            ensure!(!chunk.end, "the end was said while the job runs");
            if chunk.bytes == b"early\n".as_slice() {
                break;
            }
            ensure!(chunk.bytes.len() < 6, "the log is {:?}", chunk.bytes);
            ensure!(tokio::time::Instant::now() < until, "the log stays empty");
            trial.pause().await;
        }
        let chunk = trial.backend.read_log(&job, 6, 1000).await.map_err(story("read"))?;
        ensure!(chunk.bytes.is_empty() && !chunk.end, "after what is there comes {chunk:?}");
    } else {
        let chunk = trial.backend.read_log(&job, 0, 1000).await.map_err(story("read"))?;
        ensure!(chunk.bytes.is_empty() && !chunk.end, "a log that is not live holds {chunk:?}");
    }
    put(&spec.workspace, "go", "")?;
    trial.expect(&job, 0).await?;
    let log = trial.log(&job).await?;
    ensure!(log == b"early\nlate\n", "the log is {:?}", String::from_utf8_lossy(&log));
    Ok(Done::Checked)
}

pub(super) async fn a_log_reads_the_same_from_every_offset(trial: &mut Trial<'_>) -> Checked {
    // Bytes that are no text, and no newline at the end.
    let spec = trial.spec(
        "i=0; while [ $i -lt 20 ]; do printf 'line %s \\303\\244\\377\\000\\r\\n' $i; \
         i=$((i + 1)); done\nprintf end\n",
    );
    let mut expected = Vec::new();
    for i in 0..20 {
        expected.extend_from_slice(format!("line {i} ä").as_bytes());
        expected.extend_from_slice(b"\xff\x00\r\n");
    }
    expected.extend_from_slice(b"end");

    let job = trial.submit(&spec).await?;
    trial.expect(&job, 0).await?;
    let log = trial.log(&job).await?;
    ensure!(log == expected, "the log is {:?}", String::from_utf8_lossy(&log));
    for from in 0..=log.len() {
        for limit in [1, 7, log.len() + 1] {
            let chunk = trial.backend.read_log(&job, offset(from), limit).await;
            let chunk = chunk.map_err(story("read the log"))?;
            let rest = log.get(from..).unwrap_or_default();
            let len = chunk.bytes.len();
            ensure!(
                rest.starts_with(&chunk.bytes) && len <= limit && (len > 0 || rest.is_empty()),
                "from {from}, at most {limit}: {:?}",
                chunk.bytes
            );
            // The end may be said late, never early.
            ensure!(!chunk.end || len == rest.len(), "the end was said {len} bytes after {from}");
            ensure!(chunk.end || from < log.len(), "the end was said once and is taken back");
        }
    }
    Ok(Done::Checked)
}
