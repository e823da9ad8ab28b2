use std::sync::Arc;

use super::mask::reference;
use super::{cuts, log, phrases, prefixes};
use crate::trace::compose::{Carry, Composer, ComposerOptions, HOLD_BACK, LONGEST_PART};
use crate::trace::mask::{Masker, default_prefixes};
use crate::trace::parts::Flush;
use crate::trace::sections::{Section, Style};
use jiff::{SignedDuration, Timestamp};
use proptest::prelude::*;

const NOW: &str = "2026-08-22T00:44:03.001234Z";

fn now() -> Timestamp {
    NOW.parse().unwrap()
}

fn options(timestamps: bool, phrases: &[&str]) -> ComposerOptions {
    ComposerOptions {
        timestamps,
        sections: true,
        output_limit: 4 * 1024 * 1024,
        mask: Arc::new(Masker::new(phrases, default_prefixes(true)).unwrap()),
    }
}

fn composer(timestamps: bool, phrases: &[&str]) -> Composer {
    Composer::new(options(timestamps, phrases), Carry::default())
}

fn text(out: &[u8]) -> String {
    String::from_utf8(out.to_vec()).unwrap().replace(NOW, "T")
}

/// Replaces what is not UTF-8, byte by byte.
fn repaired(bytes: &[u8]) -> String {
    let mut out = String::new();
    for chunk in bytes.utf8_chunks() {
        out.push_str(chunk.valid());
        out.extend(chunk.invalid().iter().map(|_| '\u{fffd}'));
    }
    out
}

/// What GitLab's viewer makes of a trace with headers: headers off, `+` lines joined to the line above.
fn viewed(trace: &[u8]) -> String {
    let trace = std::str::from_utf8(trace).unwrap();
    let mut out = String::new();
    for line in trace.split_inclusive('\n') {
        assert!(line.ends_with('\n'), "unfinished physical line {line:?}");
        let (header, text) = line.split_at(32);
        let bytes = header.as_bytes();
        assert!(
            header.get(..27).unwrap().parse::<Timestamp>().is_ok()
                && bytes[27] == b' '
                && matches!(header.get(28..31).unwrap(), "00O" | "01O")
                && matches!(bytes[31], b' ' | b'+'),
            "bad header {header:?}"
        );
        if bytes[31] == b'+' {
            assert_eq!(out.pop(), Some('\n'), "nothing to continue");
        }
        out.push_str(text);
    }
    out
}

/// Feeds a log in pieces with a simulated restart after every call.
fn drive(options: &ComposerOptions, log: &[u8], steps: &[(usize, Flush)]) -> (Vec<u8>, Carry) {
    drive_in_parts(LONGEST_PART, options, log, steps)
}

fn drive_in_parts(
    longest_part: usize,
    options: &ComposerOptions,
    log: &[u8],
    steps: &[(usize, Flush)],
) -> (Vec<u8>, Carry) {
    let mut carry = Carry::default();
    let mut out = Vec::new();
    let (mut from, mut to) = (0, 0);
    let mut steps = steps.iter().cycle();
    let mut call = |from: &mut usize, to: usize, flush, out: &mut Vec<u8>| {
        let mut composer =
            Composer::new(options.clone(), carry.clone()).with_longest_part(longest_part);
        let used = composer.log(now(), &log[*from..to], flush, out);
        *from += used;
        carry = serde_json::from_str(&serde_json::to_string(composer.carry()).unwrap()).unwrap();
    };
    while to < log.len() {
        let (size, flush) = steps.next().unwrap();
        to = log.len().min(to + size);
        call(&mut from, to, *flush, &mut out);
    }
    call(&mut from, to, Flush::End, &mut out);
    assert_eq!(from, log.len(), "the end uses everything");
    (out, carry)
}

fn terminated(mut text: String) -> String {
    if !text.is_empty() && !text.ends_with('\n') {
        text.push('\n');
    }
    text
}

#[test]
fn lines_get_headers_and_the_unfinished_one_waits() {
    let mut composer = composer(true, &["secret"]);
    let mut out = Vec::new();
    assert_eq!(composer.log(now(), b"one\n\na secret\nthr", Flush::Lines, &mut out), 14);
    assert_eq!(text(&out), "T 01O one\nT 01O \nT 01O a [MASKED]\n");
    out.clear();
    assert_eq!(composer.log(now(), b"three", Flush::Partial, &mut out), 5);
    assert_eq!(composer.log(now(), b" and\nfour", Flush::Lines, &mut out), 5);
    assert_eq!(composer.log(now(), b"four", Flush::End, &mut out), 4);
    assert_eq!(text(&out), "T 01O three\nT 01O+ and\nT 01O four\n");
}

#[test]
fn without_timestamps_the_bytes_are_plain() {
    let mut composer = composer(false, &["secret"]);
    let mut out = Vec::new();
    assert_eq!(composer.log(now(), b"a\nb", Flush::Lines, &mut out), 2);
    assert_eq!(composer.log(now(), b"b", Flush::Partial, &mut out), 1);
    composer.remark(now(), Style::Info, "in between", &mut out);
    assert_eq!(composer.log(now(), b"c\nd secret", Flush::End, &mut out), 10);
    composer.remark(now(), Style::Error, "Job failed: secret", &mut out);
    assert_eq!(
        text(&out),
        "a\nb\n\x1b[32;1min between\x1b[0;m\nc\nd [MASKED]\n\
         \x1b[31;1mERROR: Job failed: [MASKED]\x1b[0;m\n"
    );
}

#[test]
fn a_partial_line_stops_short_of_what_may_become_a_secret() {
    let mut composer = composer(true, &["secret", "two\nlines"]);
    let mut out = Vec::new();
    assert_eq!(composer.log(now(), b"my secr", Flush::Partial, &mut out), 3);
    assert_eq!(composer.log(now(), b"secret\nx two\n", Flush::Partial, &mut out), 9);
    assert_eq!(composer.log(now(), b"two\nlines\n", Flush::Lines, &mut out), 10);
    assert_eq!(text(&out), "T 01O my \nT 01O+[MASKED]\nT 01O x \nT 01O+[MASKED]\n");
}

#[test]
fn the_end_of_a_line_inside_a_secret_ends_no_line() {
    let mut composer = composer(true, &["two\nlines"]);
    let mut out = Vec::new();
    composer.log(now(), b"a two\nlines b\nc", Flush::End, &mut out);
    assert_eq!(text(&out), "T 01O a [MASKED] b\nT 01O c\n");
}

#[test]
fn remarks_are_never_glued_to_other_lines() {
    let mut composer = composer(true, &[]);
    let mut out = Vec::new();
    composer.log(now(), b"half", Flush::Partial, &mut out);
    composer.remark(now(), Style::Plain, "a\nb\n", &mut out);
    composer.log(now(), b" line\n", Flush::Lines, &mut out);
    composer.stage_output(now(), b"Fetching it", Flush::Partial, &mut out);
    composer.remark(now(), Style::Warning, "slow", &mut out);
    composer.stage_output(now(), b" done\n", Flush::End, &mut out);
    assert_eq!(
        text(&out),
        "T 01O half\nT 00O \x1b[0Ka\x1b[0;m\nT 00O \x1b[0Kb\x1b[0;m\nT 01O  line\n\
         T 00O Fetching it\nT 00O \x1b[0;33mWARNING: slow\x1b[0;m\nT 00O  done\n"
    );
}

#[test]
fn a_secret_over_two_lines_of_a_remark_is_masked() {
    let mut composer = composer(true, &["two\nlines"]);
    let mut out = Vec::new();
    composer.remark(now(), Style::Plain, "a two\nlines b", &mut out);
    assert_eq!(text(&out), "T 00O \x1b[0Ka [MASKED] b\x1b[0;m\n");
}

#[test]
fn sections_are_marked_as_gitlab_reads_them() {
    let seconds = now().as_second();
    let mut out = Vec::new();
    let mut with = composer(true, &[]);
    with.section_start(now(), Section::new("get_sources"), "Getting source", &mut out);
    with.stage_output(now(), b"Fetching\n", Flush::End, &mut out);
    with.section_end(now(), "get_sources", &mut out);
    with.section_start(now(), Section::new("step_script"), "Executing", &mut out);
    assert_eq!(
        text(&out),
        format!(
            "T 00O section_start:{seconds}:get_sources\r\x1b[0K\x1b[0K\x1b[36;1mGetting source\
             \x1b[0;m\x1b[0;m\nT 00O Fetching\nT 00O section_end:{seconds}:get_sources\r\x1b[0K\n\
             T 00O+section_start:{seconds}:step_script\r\x1b[0K\x1b[0K\x1b[36;1mExecuting\
             \x1b[0;m\x1b[0;m\n"
        )
    );

    out.clear();
    let mut plain = composer(false, &[]);
    plain.log(now(), b"x", Flush::Partial, &mut out);
    plain.section_end(now(), "a", &mut out);
    plain.remark(now(), Style::Info, "y", &mut out);
    assert_eq!(text(&out), format!("x\nsection_end:{seconds}:a\r\x1b[0K\x1b[32;1my\x1b[0;m\n"));

    out.clear();
    let mut without =
        Composer::new(ComposerOptions { sections: false, ..options(true, &[]) }, Carry::default());
    without.section_start(now(), Section::new("a"), "Title", &mut out);
    without.section_end(now(), "a", &mut out);
    assert_eq!(text(&out), "T 00O \x1b[0K\x1b[36;1mTitle\x1b[0;m\x1b[0;m\n");
}

#[test]
fn progress_bars_are_shown_up_to_their_last_return() {
    let mut composer = composer(true, &[]);
    let mut out = Vec::new();
    assert_eq!(composer.log(now(), b"10%\r20%\r30%", Flush::Lines, &mut out), 8);
    assert_eq!(composer.log(now(), b"30%\r", Flush::Lines, &mut out), 0);
    assert_eq!(composer.log(now(), b"30%\r\x1b[", Flush::Lines, &mut out), 0);
    assert_eq!(composer.log(now(), b"30%\r\x1b[0Kdone", Flush::Lines, &mut out), 8);
    assert_eq!(composer.log(now(), b"done\r", Flush::Lines, &mut out), 0);
    assert_eq!(composer.log(now(), b"done\r\n", Flush::Lines, &mut out), 6);
    assert_eq!(text(&out), "T 01O 10%\r20%\r\nT 01O+30%\r\x1b[0K\nT 01O+done\r\n");
}

#[test]
fn a_section_marker_of_the_script_passes_whole() {
    let marker = b"section_start:1787359443:mine[collapsed=true]\r\x1b[0KMy section\n";
    for cut in 0..marker.len() {
        let (out, _) = drive(&options(true, &[]), marker, &[(cut.max(1), Flush::Lines)]);
        let first = text(&out);
        let first = first.lines().next().unwrap();
        assert!(
            first.starts_with("T 01O section_start:1787359443:mine[collapsed=true]\r\x1b[0K"),
            "cut at {cut}: {first:?}"
        );
    }
}

#[test]
fn what_is_not_utf8_is_replaced_byte_by_byte() {
    let mut composer = composer(false, &["secret"]);
    let mut out = Vec::new();
    let log = b"a\xe2\x82b\xff\x00\xe2\x82secret\xc3";
    composer.log(now(), log, Flush::End, &mut out);
    assert_eq!(
        String::from_utf8(out).unwrap(),
        "a\u{fffd}\u{fffd}b\u{fffd}\0\u{fffd}\u{fffd}[MASKED]\u{fffd}\n"
    );
}

#[test]
fn an_incomplete_sequence_waits_for_its_rest() {
    let mut composer = composer(false, &[]);
    let mut out = Vec::new();
    let euro = "€".as_bytes();
    assert_eq!(composer.log(now(), &[b"x", &euro[..2]].concat(), Flush::Partial, &mut out), 1);
    assert_eq!(composer.log(now(), euro, Flush::Partial, &mut out), 3);
    assert_eq!(text(&out), "x€");
}

#[test]
fn endless_lines_and_tokens_make_progress() {
    let long = "s".repeat(40_000);
    for (piece, flush) in
        [("x", Flush::Lines), ("€", Flush::Lines), ("s", Flush::Lines), ("s", Flush::Partial)]
    {
        let log = piece.repeat(200_000);
        for start in ["", "glpat-", "?private_token="] {
            let log = format!("{start}{log}");
            let options = options(true, &[&long, "xy"]);
            let mut composer = Composer::new(options, Carry::default());
            let mut out = Vec::new();
            let mut rest = log.as_bytes();
            while rest.len() >= HOLD_BACK {
                let used = composer.log(now(), &rest[..HOLD_BACK], flush, &mut out);
                assert!(used > 0, "stuck with {start}{piece}…");
                rest = &rest[used..];
            }
            composer.log(now(), rest, Flush::End, &mut out);
            let viewed = viewed(&out);
            if piece == "s" {
                assert_eq!(out.split_inclusive(|b| *b == b'\n').count(), 1, "no empty parts");
                assert_eq!(viewed, format!("{start}[MASKED]\n"));
            }
        }
    }
}

#[test]
fn long_lines_are_cut_where_the_log_says_not_where_it_was_read() {
    let log = format!("{}\n{}", "a€".repeat(30_000), "glpat-abc ".repeat(9_000));
    for phrases in [["abc g"], ["k"]] {
        long_lines_are_cut_alike(&options(true, &phrases), &log);
    }
}

fn long_lines_are_cut_alike(options: &ComposerOptions, log: &str) {
    let (whole, _) = drive(options, log.as_bytes(), &[(log.len(), Flush::Lines)]);
    // A mask may be longer than what it hides.
    assert!(whole.split(|b| *b == b'\n').all(|line| line.len() <= 2 * LONGEST_PART));
    for size in [1_000, 16_384, 16_385, 50_001] {
        let (out, _) = drive(options, log.as_bytes(), &[(size, Flush::Lines)]);
        assert!(out == whole, "differs when read in pieces of {size}");
    }
}

#[test]
fn time_never_goes_backwards() {
    let mut composer = composer(true, &[]);
    let mut out = Vec::new();
    composer.log(now(), b"a\n", Flush::Lines, &mut out);
    let mut composer = Composer::new(options(true, &[]), composer.carry().clone());
    let earlier = now() - SignedDuration::from_secs(3600);
    composer.remark(earlier, Style::Plain, "b", &mut out);
    assert_eq!(text(&out), "T 01O a\nT 00O \x1b[0Kb\x1b[0;m\n");
}

// ----------------------------------------------------------------------------- the limit

fn limited(limit: u64, timestamps: bool, phrases: &[&str]) -> ComposerOptions {
    ComposerOptions { output_limit: limit, ..options(timestamps, phrases) }
}

/// Runs a whole log through a composer, with the tail, in pieces.
fn with_tail(options: &ComposerOptions, log: &[u8], steps: &[(usize, Flush)]) -> Vec<u8> {
    with_tail_in_parts(LONGEST_PART, options, log, steps)
}

fn with_tail_in_parts(
    longest_part: usize,
    options: &ComposerOptions,
    log: &[u8],
    steps: &[(usize, Flush)],
) -> Vec<u8> {
    let (mut out, carry) = drive_in_parts(longest_part, options, log, steps);
    let mut composer = Composer::new(options.clone(), carry).with_longest_part(longest_part);
    if let Some(wanted) = composer.tail_wanted() {
        let wanted = usize::try_from(wanted).unwrap();
        composer.tail(now(), &log[log.len() - wanted..], &mut out);
        assert_eq!(composer.tail_wanted(), None);
        let length = out.len();
        composer.tail(now(), log, &mut out);
        assert_eq!(out.len(), length, "the tail comes once");
    }
    out
}

#[test]
fn a_log_that_fits_is_whole() {
    let log = "line\n".repeat(200);
    let options = limited(1000, false, &[]);
    assert_eq!(with_tail(&options, log.as_bytes(), &[(77, Flush::Lines)]), log.as_bytes());
}

#[test]
fn a_log_that_is_too_long_keeps_its_head_and_its_tail() {
    let log: String = (0..1000).map(|i| format!("line {i}\n")).collect();
    let options = limited(1000, false, &[]);
    let out = text(&with_tail(&options, log.as_bytes(), &[(300, Flush::Lines)]));
    let (head, rest) =
        out.split_once("\x1b[33;1mJob's log exceeded limit of 1000 bytes.\x1b[0;m\n").unwrap();
    assert!(log.starts_with(head) && head.len() <= 1000 && head.len() > 980, "{head}");
    let (notice, tail) =
        rest.split_once(" bytes of the log are left out here; this is its end:").unwrap();
    let tail = tail.strip_prefix("\x1b[0;m\n").unwrap();
    assert!(log.ends_with(tail) && tail.starts_with("line ") && tail.len() > 200, "{tail}");
    let left_out: usize = notice.rsplit("\x1b[33;1m").next().unwrap().parse().unwrap();
    assert_eq!(head.len() + left_out + tail.len(), log.len(), "every byte is accounted for");
}

#[test]
fn a_log_that_is_a_little_too_long_loses_nothing() {
    let log: String = (0..120).map(|i| format!("line {i:03}\n")).collect();
    let options = limited(1000, true, &[]);
    let out = with_tail(&options, log.as_bytes(), &[(300, Flush::Lines)]);
    let viewed = viewed(&out);
    let kept: String = viewed.split_inclusive('\n').filter(|l| l.starts_with("line")).collect();
    // 25 lines of 41 bytes fill the head; 95 of 9 bytes are more than a tail of 250.
    assert!(kept.starts_with("line 000\n") && kept.ends_with("line 119\n"));

    let log: String = (0..30).map(|i| format!("line {i:03}\n")).collect();
    let out = with_tail(&options, log.as_bytes(), &[(300, Flush::Lines)]);
    let viewed = self::viewed(&out);
    let kept: String = viewed.split_inclusive('\n').filter(|l| l.starts_with("line")).collect();
    assert_eq!(kept, log);
    assert!(viewed.contains("exceeded limit") && !viewed.contains("left out here"), "{viewed}");
}

#[test]
fn remarks_are_written_over_the_limit_too() {
    let mut composer = Composer::new(limited(100, true, &[]), Carry::default());
    let mut out = Vec::new();
    let log = "x\n".repeat(100);
    assert_eq!(composer.log(now(), log.as_bytes(), Flush::Lines, &mut out), 200);
    assert_eq!(composer.skipped(), 200 - 2 * 2);
    out.clear();
    composer.remark(now(), Style::Info, "Job succeeded", &mut out);
    composer.section_end(now(), "step_script", &mut out);
    assert!(text(&out).starts_with("T 00O \x1b[32;1mJob succeeded\x1b[0;m\nT 00O section_end:"));
}

#[test]
fn tools_may_say_a_little_over_the_limit() {
    let mut composer = Composer::new(limited(400, false, &[]), Carry::default());
    let mut out = Vec::new();
    composer.log(now(), "x\n".repeat(400).as_bytes(), Flush::End, &mut out);
    out.clear();
    composer.stage_output(now(), "y\n".repeat(40).as_bytes(), Flush::End, &mut out);
    assert_eq!(text(&out), "y\n".repeat(40));
    out.clear();
    composer.stage_output(now(), "y\n".repeat(40).as_bytes(), Flush::End, &mut out);
    let (said, notice) = (text(&out), "further output like this is left out");
    assert!(said.starts_with("y\ny\n") && said.contains(notice), "{said}");
    assert_eq!(said.matches("y\n").count(), 10);
    out.clear();
    composer.stage_output(now(), b"z\n", Flush::End, &mut out);
    assert_eq!(text(&out), "");
}

#[test]
fn the_end_of_a_secret_does_not_leak_at_the_start_of_the_tail() {
    let secret = "S".repeat(60) + "\nEND-OF-SECRET";
    let token = format!("glpat-{}\nplain\n", "T".repeat(400));
    for fill in 0..150 {
        let mut log = "head\n".repeat(300);
        log += &secret;
        log += &token;
        log += &"t\n".repeat(fill);
        let out = text(&with_tail(
            &limited(1000, false, &[&secret]),
            log.as_bytes(),
            &[(99, Flush::Lines)],
        ));
        for leak in ["SSSS", "END-OF", "SECRET", "TTTT"] {
            assert!(!out.contains(leak), "{leak} with {fill}: {out}");
        }
        assert!(out.ends_with("t\n") || fill == 0);
    }
}

#[test]
fn a_secret_that_the_limit_cuts_does_not_leak_in_the_tail() {
    // The limit is reached inside an endless token: its rest is all that is left out.
    let log = format!("glpat-{}\nend\n", "T".repeat(3 * LONGEST_PART));
    for limit in 40..60 {
        let out = text(&with_tail(
            &limited(limit, true, &[]),
            log.as_bytes(),
            &[(HOLD_BACK, Flush::Lines)],
        ));
        assert!(!out.contains("TT"), "{out}");
    }
}

#[test]
fn a_tail_without_line_ends_starts_at_white_space_or_not_at_all() {
    let options = limited(1000, false, &["abcdef"]);
    let log = format!("{} {}", "k".repeat(5000), "m".repeat(100));
    let out = text(&with_tail(&options, log.as_bytes(), &[(HOLD_BACK, Flush::Lines)]));
    assert!(out.contains(&"m".repeat(100)) && !out.contains('k'), "{out}");
    let log = "k".repeat(5000);
    let out = text(&with_tail(&options, log.as_bytes(), &[(HOLD_BACK, Flush::Lines)]));
    assert!(out.contains("5000 bytes of the log are left out"), "{out}");
}

#[test]
fn a_tail_may_be_shorter_than_wanted() {
    let secret = "QQQQ\n".repeat(16) + "Q";
    let log = "head\n".repeat(300) + &secret + "\n" + &"t\n".repeat(100);
    let options = limited(1000, false, &[&secret]);
    let (head, carry) = drive(&options, log.as_bytes(), &[(99, Flush::Lines)]);
    for length in 0..log.len() {
        let mut composer = Composer::new(options.clone(), carry.clone());
        let mut out = head.clone();
        composer.tail(now(), &log.as_bytes()[log.len() - length..], &mut out);
        assert!(!text(&out).contains('Q'), "{length}: {}", text(&out));
    }
}

#[test]
fn a_tail_does_not_start_inside_a_secret() {
    for fill in 100..140 {
        let log = "head\n".repeat(300) + "KEY\nLINES after\n" + &"t\n".repeat(fill);
        let options = limited(1000, false, &["KEY\nLINES"]);
        let out = text(&with_tail(&options, log.as_bytes(), &[(99, Flush::Lines)]));
        assert!(!out.contains("\n after"), "{fill}: {out}");
    }
}

#[test]
fn the_notice_stands_on_a_line_of_its_own() {
    let mut composer = Composer::new(limited(1000, false, &[]), Carry::default());
    let mut out = Vec::new();
    composer.log(now(), b"half", Flush::Partial, &mut out);
    let rest = "x".repeat(2000) + "\n";
    composer.log(now(), rest.as_bytes(), Flush::Lines, &mut out);
    assert!(text(&out).starts_with("half\n\x1b[33;1mJob's log exceeded"), "{}", text(&out));
    assert_eq!(composer.skipped(), 2001);
    // What did not fit did not use up the room either.
    out.clear();
    composer.stage_output(now(), "y\n".repeat(300).as_bytes(), Flush::End, &mut out);
    assert_eq!(text(&out), "y\n".repeat(300));
}

#[test]
fn one_tool_does_not_go_on_where_another_ended() {
    let mut composer = composer(true, &[]);
    let mut out = Vec::new();
    composer.stage_output(now(), b"glpat-abc", Flush::End, &mut out);
    composer.stage_output(now(), b"def", Flush::Partial, &mut out);
    composer.stage_output(now(), b"", Flush::End, &mut out);
    composer.stage_output(now(), b"xyz", Flush::End, &mut out);
    assert_eq!(text(&out), "T 00O glpat-[MASKED]\nT 00O def\nT 00O xyz\n");
}

// ----------------------------------------------------------------------------- properties

fn steps(partial: bool) -> impl Strategy<Value = Vec<(usize, Flush)>> {
    cuts().prop_flat_map(move |cuts| {
        let length = cuts.len();
        let flush = if partial {
            proptest::sample::select(vec![Flush::Lines, Flush::Partial])
        } else {
            proptest::sample::select(vec![Flush::Lines])
        };
        proptest::collection::vec(flush, length)
            .prop_map(move |flush| cuts.iter().copied().zip(flush).collect())
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn the_trace_says_what_the_log_said_however_it_came_and_whatever_crashed(
        log in log(), phrases in phrases(), prefixes in prefixes(), steps in steps(true),
        part in 32usize..100,
    ) {
        let mask = Arc::new(Masker::new(&phrases, &prefixes).unwrap());
        let expected = terminated(repaired(&reference(&phrases, &prefixes, &log)));
        for timestamps in [false, true] {
            let options = ComposerOptions { timestamps, mask: Arc::clone(&mask), ..options(true, &[]) };
            let (out, _) = drive_in_parts(part, &options, &log, &steps);
            let seen = if timestamps { viewed(&out) } else { text(&out) };
            prop_assert_eq!(&seen, &expected);
        }
    }

    #[test]
    fn with_whole_lines_the_trace_is_the_same_to_the_byte(
        log in log(), phrases in phrases(), prefixes in prefixes(), steps in steps(false),
        limit in prop_oneof![Just(1u64 << 22), 0u64..1200], timestamps: bool, part in 32usize..100,
    ) {
        // A carriage return shows what is there when it is read.
        let log: Vec<u8> = log.into_iter().filter(|byte| *byte != b'\r').collect();
        let mask = Arc::new(Masker::new(&phrases, &prefixes).unwrap());
        let options = ComposerOptions { timestamps, sections: true, output_limit: limit, mask };
        let whole = with_tail_in_parts(part, &options, &log, &[(1 << 30, Flush::Lines)]);
        let pieces = with_tail_in_parts(part, &options, &log, &steps);
        prop_assert_eq!(String::from_utf8_lossy(&pieces), String::from_utf8_lossy(&whole));
        if timestamps {
            viewed(&pieces);
        }
    }

    #[test]
    fn no_part_of_a_secret_shows_up_in_a_limited_trace(
        pieces in proptest::collection::vec("(QWERTYUIOP|KEY\nLINES|x{1,9}|\n|glpat-JJJJJ| )", 0..80),
        steps in steps(true), limit in 0u64..900, timestamps: bool, part in 32usize..100,
    ) {
        let log = pieces.concat();
        let options = limited(limit, timestamps, &["QWERTYUIOP", "KEY\nLINES"]);
        let out = with_tail_in_parts(part, &options, log.as_bytes(), &steps);
        let out = String::from_utf8(out).unwrap();
        for leak in ["QW", "WE", "ER", "RT", "TY", "YU", "UI", "IO", "OP", "EY", "LIN", "NES", "JJ"] {
            prop_assert!(!out.contains(leak), "{leak} in {out}");
        }
    }
}
