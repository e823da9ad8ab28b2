//! `PATCH /jobs/:id/trace`.

use super::*;
use crate::coordinator::{RateLimits, Status, Variable};

#[tokio::test]
async fn a_patch_elsewhere_is_416_with_the_size() {
    let bed = Bed::new().await;
    let job = bed.take(NewJob::new("build")).await;
    bed.patch(&job, 0, "hello").await;
    // The connection is still there, so the client knows that five bytes were accepted.
    let refused = bed.patch(&job, 3, "lo, world").await;
    assert_eq!(refused.status(), 416);
    assert_eq!(header(&refused, "range").as_deref(), Some("0-5"));
    assert_eq!(refused.text().await.unwrap(), r#"{"error":"416 Range Not Satisfiable"}"#);
    assert!(bed.violation().contains("patch at 3, though 5 bytes were accepted"));
    // After a 416 everything may be asked, but the bytes must be the same.
    assert_eq!(bed.patch(&job, 0, "hello").await.status(), 416);
    assert_eq!(bed.gitlab.violations().len(), 1);
    assert_eq!(bed.patch(&job, 0, "jello").await.status(), 416);
    assert!(bed.gitlab.violations()[1].contains("repeated bytes at 0 differ"));
    assert_eq!(bed.patch(&job, 5, ", world").await.status(), 202);
    let view = bed.gitlab.job(job.id).unwrap();
    assert_eq!(view.trace_text(), "hello, world");
    assert_eq!((view.patches, view.refused_patches), (2, 3));
}

#[tokio::test]
async fn a_gap_is_refused_and_a_violation() {
    let bed = Bed::new().await;
    let job = bed.take(NewJob::new("build")).await;
    let refused = bed.patch(&job, 7, "late").await;
    assert_eq!(header(&refused, "range").as_deref(), Some("0-0"));
    assert!(bed.violation().contains("gap in the trace, 7 after 0 bytes"));
}

#[tokio::test]
async fn only_the_start_of_the_range_counts() {
    let bed = Bed::new().await;
    let job = bed.take(NewJob::new("build")).await;
    let send = |range: &'static str, text: &'static str| {
        bed.call(Method::PATCH, &format!("/jobs/{}/trace", job.id))
            .header("job-token", &job.token)
            .header("content-type", "text/plain")
            .header("content-range", range)
            .body(text)
            .send()
    };
    assert_eq!(send("0-99", "abc").await.unwrap().status(), 202);
    assert!(bed.violation().contains("Content-Range `0-99` with 3 bytes"));
    // What is no number is 0.
    assert_eq!(send("bytes 3-5/6", "abc").await.unwrap().status(), 416);
    let without = bed
        .call(Method::PATCH, &format!("/jobs/{}/trace", job.id))
        .header("job-token", &job.token)
        .header("content-type", "text/plain")
        .body("abc");
    assert_eq!(without.send().await.unwrap().status(), 400);
}

#[tokio::test]
async fn empty_and_huge_patches_are_violations() {
    let bed = Bed::new().await;
    let job = bed.take(NewJob::new("build")).await;
    let text = "x".repeat(1024 * 1024 + 1);
    assert_eq!(bed.patch(&job, 0, &text).await.status(), 202);
    assert!(bed.violation().contains("patch of 1048577 bytes"));
    bed.call(Method::PATCH, &format!("/jobs/{}/trace", job.id))
        .header("job-token", &job.token)
        .header("content-type", "text/plain")
        .header("content-range", "1048577-1048576")
        .send()
        .await
        .unwrap();
    assert!(bed.gitlab.violations()[1].contains("empty patch"));
}

#[tokio::test]
async fn the_job_token_becomes_as_many_x() {
    let bed = Bed::new().await;
    let job = bed.take(NewJob::new("build")).await;
    let text = format!("a {0} b {0} c", job.token);
    bed.patch(&job, 0, &text).await;
    let hidden = "x".repeat(job.token.len());
    let view = bed.gitlab.job(job.id).unwrap();
    assert_eq!(view.trace_text(), format!("a {hidden} b {hidden} c"));
    // The checksum is that of what was sent.
    assert_eq!(bed.succeed(&job, &text).await.status(), 200);
    bed.assert_well_behaved();
}

#[tokio::test]
async fn secrets_in_the_trace_are_found_at_the_end() {
    let bed = Bed::new().await;
    let secret = Variable::new("PASSWORD", "correct horse\n").masked();
    let job = bed.take(NewJob::new("build").variable(secret)).await;
    let (head, tail) = job.token.split_at(12);
    let text = format!("{head}{tail} correct horse");
    bed.patch(&job, 0, head).await;
    bed.patch(&job, head.len(), &format!("{tail} correct horse")).await;
    bed.succeed(&job, &text).await;
    let found = bed.gitlab.violations().join("\n");
    assert!(found.contains("the job token is in the trace"), "{found}");
    assert!(found.contains("a masked variable is in the trace"), "{found}");
    assert!(!found.contains("horse"), "{found}");
}

#[tokio::test]
async fn a_trace_above_the_limit_ends_the_job() {
    let bed = Bed::new().await;
    bed.gitlab.adjust(|knobs| knobs.trace_limit_mib = 1);
    let job = bed.take(NewJob::new("build")).await;
    let mib = "x".repeat(1024 * 1024);
    assert_eq!(bed.patch(&job, 0, &mib).await.status(), 202);
    assert_eq!(bed.patch(&job, mib.len(), &mib).await.status(), 403);
    let view = bed.gitlab.job(job.id).unwrap();
    assert_eq!(view.status, Status::Failed);
    assert_eq!(view.failure_reason.as_deref(), Some("trace_size_exceeded"));
    assert_eq!(view.trace_len, 1024 * 1024);
}

#[tokio::test]
async fn debug_output_is_declared_with_the_first_byte_or_never() {
    let bed = Bed::new().await;
    let late = bed.take(NewJob::new("late")).await;
    let early = bed.take(NewJob::new("early")).await;
    let send = |job: &Job, start: usize, debug: bool| {
        bed.call(Method::PATCH, &format!("/jobs/{}/trace?debug_trace={debug}", job.id))
            .header("job-token", &job.token)
            .header("content-type", "text/plain")
            .header("content-range", format!("{start}-{start}"))
            .body("x")
            .send()
    };
    send(&late, 0, false).await.unwrap();
    send(&late, 1, true).await.unwrap();
    send(&early, 0, true).await.unwrap();
    assert!(!bed.gitlab.job(late.id).unwrap().debug_trace);
    assert!(bed.gitlab.job(early.id).unwrap().debug_trace);
}

#[tokio::test]
async fn the_interval_depends_on_who_is_watching() {
    let bed = Bed::new().await;
    let job = bed.take(NewJob::new("build")).await;
    let interval = |answer: Response| header(&answer, "x-gitlab-trace-update-interval").unwrap();
    assert_eq!(interval(bed.patch(&job, 0, "a").await), "60");
    bed.gitlab.watch(job.id, true);
    assert_eq!(interval(bed.patch(&job, 1, "b").await), "3");
    bed.gitlab.adjust(|knobs| knobs.trace_interval = Some("-1".to_owned()));
    assert_eq!(interval(bed.patch(&job, 2, "c").await), "-1");
}

#[tokio::test]
async fn too_many_patches_in_a_minute_are_429() {
    let bed = Bed::new().await;
    bed.gitlab
        .adjust(|knobs| knobs.rate_limits = RateLimits { patches: 1, ..RateLimits::default() });
    bed.gitlab.advance(MINUTE - Duration::from_secs(bed.gitlab.now().as_secs() % 60));
    let job = bed.take(NewJob::new("build")).await;
    assert_eq!(bed.patch(&job, 0, "a").await.status(), 202);
    assert_eq!(bed.patch(&job, 1, "b").await.status(), 429);
    bed.gitlab.advance(MINUTE);
    assert_eq!(bed.patch(&job, 1, "b").await.status(), 202);
}

#[tokio::test]
async fn traces_of_finished_jobs_can_be_dropped() {
    let bed = Bed::with(Options { keep_traces: false, ..Options::default() }).await;
    let job = bed.take(NewJob::new("build")).await;
    bed.patch(&job, 0, "hello").await;
    assert_eq!(bed.gitlab.job(job.id).unwrap().trace_text(), "hello");
    bed.succeed(&job, "hello").await;
    let view = bed.gitlab.job(job.id).unwrap();
    assert!(view.trace.is_empty());
    assert_eq!((view.trace_len, view.trace_crc), (5, crc32fast::hash(b"hello")));
    bed.assert_well_behaved();
}

/// Runs a job with this trace and gives what was wrong.
async fn complaints(trace: &str) -> String {
    let bed = Bed::new().await;
    let job = bed.take(NewJob::new("build")).await;
    bed.patch(&job, 0, trace).await;
    bed.succeed(&job, trace).await;
    bed.gitlab.violations().join("\n")
}

#[tokio::test]
async fn timestamps_are_read_if_there_are_any() {
    let good = "2026-08-22T00:44:03.001234Z 00O section_start:1787359443:step_script\r\x1b[0K\n\
                2026-08-22T00:44:03.001300Z 00O+\x1b[0KExecuting\n\
                2026-08-22T00:44:03.104512Z 01O $ echo hello\n\
                2026-08-22T00:44:03.004000Z 00O section_end:1787359444:step_script\r\x1b[0K\n";
    assert_eq!(complaints(good).await, "");
    let bare = format!("{good}no header\n");
    assert!(complaints(&bare).await.contains("line 5 of the trace has no timestamp"));
    let older = format!("{good}2026-08-22T00:44:03.104511Z 01O back in time\n");
    assert!(complaints(&older).await.contains("line 5 of the trace is older"));
    assert_eq!(complaints("no headers at all\n").await, "");
}

#[tokio::test]
async fn sections_are_nested_and_closed() {
    let crossed = "section_start:1:get_sources\r\x1b[0Ksection_start:1:step_script\r\x1b[0K\
                   section_end:2:get_sources\r\x1b[0Ksection_end:2:step_script\r\x1b[0K";
    assert!(complaints(crossed).await.contains("section get_sources ends"));
    let open = "section_start:1:get_sources[collapsed=true]\r\x1b[0K";
    assert!(complaints(open).await.contains("section get_sources has no end"));
    let own = "section_start:1:my_own\r\x1b[0K";
    assert_eq!(complaints(own).await, "");
}
