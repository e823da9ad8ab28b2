//! What of a job's log arrives in GitLab, how soon, and what never does.

use std::time::{Duration, Instant};

use bridge::coordinator::{
    Coordinator, Endpoint, Fault, JobView, Knobs, NewJob, Options, Status, Variable,
};
use bridge::trace::strip_headers;

use crate::support::{Bed, Where, text_of, until};

fn spool_of(bed: &Bed, id: i64) -> Vec<u8> {
    let row = bed.row(id);
    let name = format!("{}.trace", row["id"].as_str().unwrap());
    std::fs::read(bed.path("state/spool").join(name)).unwrap()
}

/// The trace is the spool's, and its length and checksum are those that were told.
fn assert_told(bed: &Bed, job: &JobView) {
    assert!(spool_of(bed, job.id) == *job.trace, "the trace differs from its spool: {job:?}");
    let told = job.final_update.clone().unwrap();
    assert_eq!(told.bytesize, Some(job.trace_len), "{job:?}");
    assert_eq!(told.checksum, Some(format!("crc32:{:08x}", job.trace_crc)), "{job:?}");
}

/// Counts lines of which only the numbers matter: `line 1`, `line 2`, …
fn numbered(text: &str) -> Vec<u32> {
    text.lines().filter_map(|line| line.strip_prefix("line ")?.parse().ok()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watched_log_arrives_within_three_seconds() {
    let bed = Bed::local().await;
    let _daemon = bed.serve();
    // Each line is the time at which it was written.
    let id = bed.gitlab.enqueue(
        bed.counting("live").script("for i in 1 2 3 4 5 6 7 8; do date +at-%s.%N; sleep 1.3; done"),
    );
    bed.gitlab.watch(id, true);
    let mut seen = Vec::new();
    until("all lines to arrive", || {
        let job = bed.gitlab.job(id)?;
        let now = jiff::Zoned::now().timestamp().as_millisecond();
        let text = text_of(&job);
        let times: Vec<f64> =
            text.lines().filter_map(|line| line.strip_prefix("at-")?.parse().ok()).collect();
        for at in times.iter().skip(seen.len()).copied().collect::<Vec<_>>() {
            #[expect(clippy::cast_precision_loss, reason = "milliseconds are fine enough")]
            seen.push(now as f64 / 1000.0 - at);
        }
        (seen.len() == 8).then_some(())
    })
    .await;
    println!("lines arrived after {seen:.2?} s");
    assert!(seen.iter().all(|late| *late < 3.0), "lines arrived after {seen:.2?} s\n{}", bed.log());
    let job = bed.finished(id).await;
    assert!(job.patches < 25, "the log is not sent line by line: {job:?}");
    bed.nothing_owed().await;
    bed.assert_no_violations();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_nobody_watches_is_sent_seldom() {
    let bed = Bed::local().await;
    let _daemon = bed.serve();
    let id = bed.gitlab.enqueue(
        bed.counting("unwatched").script("for i in $(seq 60); do echo line $i; sleep 0.2; done"),
    );
    let job = bed.finished(id).await;
    assert_eq!(numbered(&text_of(&job)).len(), 60);
    assert!(job.patches <= 4, "GitLab asked for news every 60 s: {job:?}");
    bed.nothing_owed().await;
    bed.assert_no_violations();
}

#[tokio::test(flavor = "multi_thread")]
async fn secrets_are_masked_wherever_a_log_is_cut() {
    let bed = Bed::local().await;
    bed.gitlab.adjust(|knobs| knobs.trace_interval = Some("1".to_owned()));
    let _daemon = bed.serve();
    let secret = "hunter2hunter2-and-more";
    let id = bed.gitlab.enqueue(
        bed.counting("secret")
            .variable(Variable::new("SECRET", secret).masked())
            .variable(Variable::new("LINES_OF_IT", "first-secret-line\nsecond-secret-line").masked())
            .script("echo \"at once: $SECRET.\"")
            .script("printf 'in pieces: hunter2'; sleep 2; printf 'hunter2-'; sleep 2; printf 'and-more'; sleep 2; echo .")
            .script("for c in $(echo \"$SECRET\" | fold -w 1); do printf %s \"$c\"; sleep 0.05; done; echo .")
            .script("echo 'hunter2hunter2-and-no'; printf 'hunter2hunter2-and-'; sleep 3; echo less")
            .script("echo \"$LINES_OF_IT\"")
            .script("echo \"the token is $CI_JOB_TOKEN!\"; printf %s \"$CI_JOB_TOKEN\" | cut -c1-20; sleep 1")
            .script("echo glpat-abcdefghijklmnopqrst!")
            .script("printf 'glpat-abcdef'; sleep 2; echo ghijklmnopqrst!"),
    );
    bed.gitlab.watch(id, true);
    let job = bed.finished(id).await;
    let text = text_of(&job);
    assert_eq!(job.status, Status::Success, "{text}\n{}", bed.log());
    assert!(!text.contains(secret), "{text}");
    assert!(!text.contains("secret-line"), "{text}");
    assert!(text.contains("\nat once: [MASKED].\n"), "{text}");
    assert!(text.contains("\nin pieces: [MASKED].\n"), "{text}");
    assert!(text.contains("\n[MASKED].\n"), "{text}");
    assert!(text.contains("\nhunter2hunter2-and-no\nhunter2hunter2-and-less\n"), "{text}");
    assert!(text.contains("\nthe token is [MASKED]!\n"), "{text}");
    assert!(!text.contains("glcbt-64_"), "{text}");
    assert!(!text.contains("abcdefghijklmnopqrst"), "{text}");
    assert_eq!(text.matches("ghijklmnopqrst").count(), 1, "only in the command's echo: {text}");
    assert_eq!(text.matches("\nglpat-[MASKED]!\n").count(), 2, "{text}");
    // Nor does a file of the bridge hold it after the end.
    bed.nothing_owed().await;
    until("the secret to be in no file", || {
        let found = std::process::Command::new("grep")
            .args(["-rlaF", secret])
            .arg(bed.path("state"))
            .arg(bed.path("jobs"))
            .output()
            .unwrap();
        found.stdout.is_empty().then_some(())
    })
    .await;
    assert_told(&bed, &job);
    bed.assert_no_violations();
}

#[tokio::test(flavor = "multi_thread")]
async fn lines_have_timestamps_unless_they_are_switched_off() {
    let bed = Bed::local().await;
    let _daemon = bed.serve();
    let with = bed.gitlab.enqueue(bed.counting("with").script("echo one; echo; printf 'no end'"));
    let without = bed.gitlab.enqueue(
        bed.counting("without")
            .env("FF_TIMESTAMPS", "false")
            .script("echo one; echo; printf 'no end'"),
    );
    let job = bed.finished(with).await;
    let trace = job.trace_text();
    assert!(trace.ends_with('\n'), "{trace:?}");
    for line in trace.lines() {
        let (header, _) = line.split_at_checked(32).unwrap_or_else(|| panic!("{line:?}"));
        let (time, stream) = header.split_once(' ').unwrap();
        assert!(time.len() == 27 && time.ends_with('Z'), "{line:?}");
        assert!(time.parse::<jiff::Timestamp>().is_ok(), "{line:?}");
        assert!(["00O ", "01O ", "00O+", "01O+"].contains(&stream), "{line:?}");
    }
    let text = text_of(&job);
    assert!(text.contains("\none\n\nno end"), "{text}");
    assert!(text.contains("Job succeeded"), "{text}");
    let job = bed.finished(without).await;
    let trace = job.trace_text();
    assert!(trace.starts_with("\u{1b}[32;1mRunning with bridge"), "{trace:?}");
    assert!(trace.contains("\none\n\nno end"), "{trace}");
    assert_eq!(strip_headers(&job.trace), *job.trace, "there are no headers to strip");
    bed.nothing_owed().await;
    assert_told(&bed, &job);
    bed.assert_no_violations();
}

#[tokio::test(flavor = "multi_thread")]
async fn sections_are_balanced_whatever_becomes_of_the_job() {
    let bed = Bed::local().await;
    let _daemon = bed.serve();
    let long = "echo first\necho second".to_owned();
    let jobs = [
        bed.gitlab.enqueue(bed.counting("good").script(long.clone()).after_script("echo after")),
        bed.gitlab.enqueue(bed.counting("bad").script("exit 4").after_script("exit 5")),
        // The shell around the script is killed: nobody is left over there who could end a section.
        bed.gitlab.enqueue(bed.counting("killed").script("kill -9 $PPID; sleep 600")),
        bed.gitlab.enqueue(
            bed.counting("sections").env("FF_SCRIPT_SECTIONS", "true").script(long.clone()),
        ),
        bed.gitlab.enqueue(bed.counting("plain").trace_sections(false).script(long)),
    ];
    for id in jobs {
        let job = bed.finished(id).await;
        let text = text_of(&job);
        let starts = text.matches("section_start:").count();
        assert_eq!(starts, text.matches("section_end:").count(), "{text}");
        assert_eq!(starts == 0, &*job.name == "plain", "{text}");
        assert!(text.contains("step_script"), "{text}");
    }
    bed.nothing_owed().await;
    // The coordinator looks at their nesting.
    bed.assert_no_violations();
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_that_are_no_text_become_text() {
    let bed = Bed::local().await;
    bed.gitlab.adjust(|knobs| knobs.trace_interval = Some("1".to_owned()));
    let _daemon = bed.serve();
    let id = bed.gitlab.enqueue(
        bed.counting("bytes")
            .script("printf 'bad \\377\\376 bytes\\n'")
            .script("printf 'snow\\342'; sleep 2; printf '\\230\\203man\\n'")
            .script("printf 'cut \\342\\230\\n'; printf 'zero \\000 byte\\n'")
            .script("printf 'one\\rtwo\\rthree\\n'"),
    );
    bed.gitlab.watch(id, true);
    let job = bed.finished(id).await;
    let text = std::str::from_utf8(&job.trace).expect("a trace is UTF-8");
    assert!(text.contains("bad \u{fffd}\u{fffd} bytes\n"), "{text}");
    assert!(text_of(&job).contains("snow\u{2603}man\n"), "{text}");
    assert!(text.contains("cut \u{fffd}"), "{text}");
    assert!(text_of(&job).contains("three\n"), "{text}");
    bed.nothing_owed().await;
    assert_told(&bed, &job);
    bed.assert_no_violations();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_over_the_limit_keeps_its_head_and_its_tail() {
    let bed = Bed::new(Where::Local, Options::default(), "", "output_limit = 16").await;
    let _daemon = bed.serve();
    let id = bed.gitlab.enqueue(bed.counting("talkative").script(
        "for i in $(seq 20000); do echo line $i; done; echo the cause of it all >&2; exit 9",
    ));
    let job = bed.finished(id).await;
    let text = text_of(&job);
    let lines = numbered(&text);
    assert_eq!(job.exit_code, Some(9), "{job:?}");
    assert_eq!(lines.first(), Some(&1));
    assert_eq!(lines.last(), Some(&20000), "{job:?}");
    assert!(lines.len() < 10_000, "{} lines", lines.len());
    assert!(text.contains("Job's log exceeded limit of 16384 bytes."), "{job:?}");
    assert!(text.contains("bytes of the log are left out here; this is its end:"), "{job:?}");
    assert!(text.contains("\nthe cause of it all\n"), "{job:?}");
    assert!(text.contains("ERROR: Job failed: exit status 9"), "{job:?}");
    let gaps = lines.windows(2).filter(|pair| pair[1] != pair[0] + 1).count();
    assert_eq!(gaps, 1, "one piece is missing, and only one");
    bed.nothing_owed().await;
    assert_told(&bed, &job);
    bed.assert_no_violations();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_patch_whose_answer_was_lost_is_not_sent_twice() {
    let bed = Bed::local().await;
    bed.gitlab.adjust(|knobs| knobs.trace_interval = Some("1".to_owned()));
    bed.gitlab.inject(Endpoint::Patch, Fault::lost_answer().after(1).times(2));
    bed.gitlab.inject(Endpoint::Patch, Fault::status_after_effect(502).after(1));
    let _daemon = bed.serve();
    let id = bed.gitlab.enqueue(
        bed.counting("lost answers").script("for i in $(seq 60); do echo line $i; sleep 0.1; done"),
    );
    let job = bed.finished(id).await;
    assert_eq!(job.status, Status::Success, "{job:?}\n{}", bed.log());
    assert_eq!(numbered(&text_of(&job)), (1..=60).collect::<Vec<_>>());
    assert!(job.refused_patches >= 1, "what GitLab had was learnt from a 416: {job:?}");
    assert_eq!(bed.gitlab.faults_left(), 0, "{job:?}");
    bed.nothing_owed().await;
    bed.assert_once(id);
    bed.assert_no_violations();
}

fn finals(gitlab: &Coordinator, id: i64) -> u32 {
    gitlab.job(id).unwrap().finals
}

#[tokio::test(flavor = "multi_thread")]
async fn a_verdict_that_is_not_taken_yet_is_told_again() {
    let knobs = Knobs { live_trace: Some(3), ..Knobs::default() };
    let bed = Bed::new(Where::Local, Options { knobs, ..Options::default() }, "", "").await;
    let _daemon = bed.serve();
    let id = bed.gitlab.enqueue(bed.counting("live trace"));
    let started = Instant::now();
    let job = bed.finished(id).await;
    assert_eq!(job.finals, 4, "{job:?}");
    assert!(started.elapsed() > Duration::from_secs(2), "it was not asked all the time");
    bed.nothing_owed().await;
    bed.assert_once(id);
    // Until GitLab is ready, however often it says so; and a daemon's death changes nothing.
    bed.gitlab.adjust(|knobs| knobs.live_trace = Some(u32::MAX));
    let id = bed.gitlab.enqueue(bed.counting("very live trace"));
    until("two verdicts", || (finals(&bed.gitlab, id) >= 2).then_some(())).await;
    assert_eq!(bed.row(id)["state"], "reporting");
    _daemon.kill();
    let _daemon = bed.serve();
    let before = finals(&bed.gitlab, id);
    until("another verdict", || (finals(&bed.gitlab, id) > before).then_some(())).await;
    bed.gitlab.persist_trace(id);
    bed.finished(id).await;
    bed.nothing_owed().await;
    bed.assert_once(id);
    bed.assert_no_violations();
}

#[tokio::test(flavor = "multi_thread")]
async fn debug_traces_are_declared_and_may_be_forbidden() {
    let bed = Bed::local().await;
    let daemon = bed.serve();
    let debug = |bed: &Bed, name: &str| {
        bed.counting(name).env("CI_DEBUG_TRACE", "true").script("true $((6 * 7))")
    };
    let plain = bed.gitlab.enqueue(bed.counting("plain"));
    let id = bed.gitlab.enqueue(debug(&bed, "debug"));
    assert!(!bed.finished(plain).await.debug_trace);
    let job = bed.finished(id).await;
    assert!(job.debug_trace, "{job:?}");
    assert!(text_of(&job).contains("+ true 42"), "{}", text_of(&job));
    bed.nothing_owed().await;
    daemon.term().await;
    bed.write_config("", "debug_trace_disabled = true", "");
    let _daemon = bed.serve();
    let id = bed.gitlab.enqueue(debug(&bed, "forbidden"));
    let job = bed.finished(id).await;
    assert!(!job.debug_trace, "{job:?}");
    let text = text_of(&job);
    assert!(!text.contains("+ true 42"), "{text}");
    assert!(text.contains("CI_DEBUG_TRACE: this runner does not allow it"), "{text}");
    bed.nothing_owed().await;
    bed.assert_no_violations();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_of_five_megabytes_arrives_whole() {
    let bed = Bed::new(Where::Local, Options::default(), "", "output_limit = 20480").await;
    let _daemon = bed.serve();
    let job = NewJob::new("large")
        .env("GIT_STRATEGY", "none")
        .script("for i in $(seq 80000); do echo \"line $i\"; done | sed 's/$/ and some more words to fill the line, sixty bytes/'");
    let id = bed.gitlab.enqueue(job);
    let job = bed.finished(id).await;
    assert_eq!(job.status, Status::Success, "{job:?}\n{}", bed.log());
    assert!(job.trace_len > 5 << 20, "{job:?}");
    let text = text_of(&job);
    let lines = text.lines().filter(|line| line.starts_with("line ")).count();
    assert_eq!(lines, 80_000);
    assert!(text.contains("\nline 80000 and some"), "{job:?}");
    bed.nothing_owed().await;
    assert_told(&bed, &job);
    bed.assert_no_violations();
}
