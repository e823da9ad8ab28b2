use super::{cuts, log, phrases, prefixes};
use crate::trace::mask::{LONGEST_PATTERN, MASKED, Masker, default_prefixes};
use crate::trace::scan::MaskState;
use proptest::prelude::*;

fn masker(phrases: &[&str]) -> Masker {
    Masker::new(phrases, default_prefixes(true)).unwrap()
}

fn masked(phrases: &[&str], text: &str) -> String {
    String::from_utf8(masker(phrases).mask(text.as_bytes())).unwrap()
}

/// Says for every byte what is wanted of it, the slow and obvious way, and gives the masked text.
pub(super) fn reference(phrases: &[String], prefixes: &[String], text: &[u8]) -> Vec<u8> {
    let mut ranges: Vec<(usize, usize)> = Vec::new();
    for phrase in phrases.iter().map(|p| p.trim()).filter(|p| !p.is_empty()) {
        for at in 0..text.len() {
            if text[at..].starts_with(phrase.as_bytes()) {
                ranges.push((at, at + phrase.len()));
            }
        }
    }
    for prefix in prefixes {
        for at in 0..text.len() {
            if text[at..].starts_with(prefix.as_bytes()) {
                let start = at + prefix.len();
                let run = text[start..]
                    .iter()
                    .take_while(|b| b.is_ascii_alphanumeric() || b"_.=-".contains(b))
                    .count();
                ranges.push((start, start + run));
            }
        }
    }
    for key in [
        "private_token=",
        "authenticity_token=",
        "rss_token=",
        "x-amz-signature=",
        "x-amz-credential=",
        "x-amz-security-token=",
    ] {
        for at in 0..text.len() {
            let start = at + 1 + key.len();
            if b"?&".contains(&text[at])
                && start <= text.len()
                && text[at + 1..start].eq_ignore_ascii_case(key.as_bytes())
            {
                let run = text[start..]
                    .iter()
                    .take_while(|b| !b.is_ascii_control() && !b"?& ".contains(b))
                    .count();
                ranges.push((start, start + run));
            }
        }
    }
    ranges.retain(|(start, end)| end > start);
    ranges.sort_unstable();
    let mut out = Vec::new();
    let mut at = 0;
    for (start, end) in ranges {
        if start >= at {
            out.extend_from_slice(&text[at..start]);
            out.extend_from_slice(MASKED);
        }
        at = at.max(end);
    }
    out.extend_from_slice(&text[at..]);
    out
}

#[test]
fn every_occurrence_of_a_phrase_is_masked() {
    let phrases = ["secret", "  padded\n", "", "   ", "two\nlines"];
    for (text, expected) in [
        ("no such thing", "no such thing"),
        ("secret", "[MASKED]"),
        ("secretsecret", "[MASKED][MASKED]"),
        ("a secret, a SECRET, a secre", "a [MASKED], a SECRET, a secre"),
        ("x padded y", "x [MASKED] y"),
        ("two\nlines and two\nlin", "[MASKED] and two\nlin"),
        ("secsecret", "sec[MASKED]"),
    ] {
        assert_eq!(masked(&phrases, text), expected, "{text:?}");
    }
}

#[test]
fn the_longest_of_several_phrases_wins() {
    assert_eq!(masked(&["pass", "password", "password1"], "password12"), "[MASKED]2");
    assert_eq!(masked(&["pass", "password1"], "passwords"), "[MASKED]words");
}

#[test]
fn secrets_that_overlap_leave_no_part_standing() {
    assert_eq!(masked(&["abcd", "cdef"], "xabcdefy"), "x[MASKED]y");
    assert_eq!(masked(&["abab"], "xabababy"), "x[MASKED]y");
    assert_eq!(masked(&["bc", "abcd"], "xabcdy"), "x[MASKED]y");
    assert_eq!(masked(&["aaa"], "aaaaaaa"), "[MASKED]");
    assert_eq!(
        masked(&["glpat-abc def"], "glpat-abc def glpat-abc d"),
        "[MASKED] glpat-[MASKED] d"
    );
}

#[test]
fn phrases_of_one_byte_are_masked() {
    assert_eq!(masked(&["x"], "axbxx"), "a[MASKED]b[MASKED][MASKED]");
    assert_eq!(masked(&["x", "?"], "?x"), "[MASKED][MASKED]");
}

#[test]
fn tokens_are_masked_behind_their_prefix() {
    for (text, expected) in [
        ("commodo glpat-imperdiet in", "commodo glpat-[MASKED] in"),
        ("esseglpat-imperdiet=_-. end", "esseglpat-[MASKED] end"),
        ("glpat-impglpat-erdiet Lorem", "glpat-[MASKED] Lorem"),
        ("glpat- ipsu", "glpat- ipsu"),
        ("glpat-", "glpat-"),
        ("glcbt-66_q9/glrt-x", "glcbt-[MASKED]/glrt-[MASKED]"),
        ("_gitlab_session=abc;", "_gitlab_session=[MASKED];"),
        ("GLPAT-abc", "GLPAT-abc"),
    ] {
        assert_eq!(masked(&[], text), expected, "{text:?}");
    }
    let few = Masker::new(Vec::<String>::new(), default_prefixes(false)).unwrap();
    assert_eq!(few.mask(b"glpat-abc glrt-abc"), b"glpat-[MASKED] glrt-abc");
}

#[test]
fn a_phrase_inside_a_token_does_not_end_its_mask() {
    assert_eq!(masked(&["SECRET"], "glpat-xxSECRETyy z"), "glpat-[MASKED] z");
    assert_eq!(masked(&["SECRET"], "glpat-SECRETyy z"), "glpat-[MASKED] z");
}

#[test]
fn parameters_of_urls_are_masked() {
    for (text, expected) in [
        ("https://x/?private_token=abc&b=c", "https://x/?private_token=[MASKED]&b=c"),
        ("https://x/?a=b&X-Amz-Signature=abc d", "https://x/?a=b&X-Amz-Signature=[MASKED] d"),
        ("?rss_token=a/b+c%20é\n", "?rss_token=[MASKED]\n"),
        ("?private_token=&x", "?private_token=&x"),
        ("?private_tokens=abc", "?private_tokens=abc"),
        ("private_token=abc", "private_token=abc"),
        ("??private_token=abc?x", "??private_token=[MASKED]?x"),
        ("?private_token", "?private_token"),
    ] {
        assert_eq!(masked(&[], text), expected, "{text:?}");
    }
}

#[test]
fn a_long_phrase_is_masked_as_one() {
    let mut random = 1_u32;
    let long: String = (0..70_000)
        .map(|_| {
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            char::from(b'a' + u8::try_from(random >> 28).unwrap())
        })
        .collect();
    let text = format!("before {long} after");
    assert_eq!(masked(&[&long], &text), "before [MASKED] after");
    let accents: String = (0..30_000).map(|i| if i % 7 < 3 { 'é' } else { '€' }).collect();
    assert_eq!(masked(&[&accents], &format!("é{accents}x")), "é[MASKED]x");
}

#[test]
fn no_more_than_a_pattern_is_held_back() {
    let long = "k".repeat(100_000);
    let masker = masker(&[&long]);
    assert_eq!(masker.longest(), LONGEST_PATTERN);
    let text = "k".repeat(2 * LONGEST_PATTERN);
    let mut out = Vec::new();
    let used = masker.feed(&mut MaskState::default(), text.as_bytes(), false, &mut out);
    assert!(used > LONGEST_PATTERN, "{used}");
    assert_eq!(out, MASKED);
}

#[test]
fn what_is_complete_is_not_held_back() {
    let mut out = Vec::new();
    let masker = masker(&["secret"]);
    let mut state = MaskState::default();
    assert_eq!(masker.feed(&mut state, b"a secret", false, &mut out), 8);
    assert_eq!(out, b"a [MASKED]");
    assert_eq!(masker.feed(&mut state, b" b glpat-abc", false, &mut out), 12);
    assert_eq!(masker.feed(&mut state, b"def sec", false, &mut out), 4);
    assert_eq!(masker.feed(&mut state, b"sec", true, &mut out), 3);
    assert_eq!(out, b"a [MASKED] b glpat-[MASKED] sec");
}

#[test]
fn prefixes_that_overlap_themselves_do_not_stop_the_stream() {
    let masker = Masker::new(["aX"], ["aa"]).unwrap();
    let mut out = Vec::new();
    let mut state = MaskState::default();
    assert_eq!(masker.feed(&mut state, b"aaaa", false, &mut out), 3);
    assert_eq!(masker.feed(&mut state, b"a b", true, &mut out), 3);
    assert_eq!(out, b"aa[MASKED] b");
}

#[test]
fn debug_shows_no_secret() {
    assert_eq!(format!("{:?}", masker(&["hunter2"])), "Masker { patterns: 15, .. }");
}

#[test]
fn a_masker_without_secrets_still_masks_parameters() {
    let none = Masker::new(Vec::<String>::new(), Vec::<String>::new()).unwrap();
    assert_eq!(none.mask(b"text ?rss_token=abc"), b"text ?rss_token=[MASKED]");
    assert_eq!(none.mask(b""), b"");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    #[test]
    fn the_masked_text_is_the_union_however_it_is_cut(
        text in log(), phrases in phrases(), prefixes in prefixes(), cuts in cuts(),
    ) {
        let masker = Masker::new(&phrases, &prefixes).unwrap();
        let expected = reference(&phrases, &prefixes, &text);
        let whole = masker.mask(&text);
        prop_assert_eq!(String::from_utf8_lossy(&whole), String::from_utf8_lossy(&expected));

        let mut out = Vec::new();
        let mut state = MaskState::default();
        let (mut from, mut to) = (0, 0);
        let mut cuts = cuts.iter().cycle();
        while to < text.len() {
            to = text.len().min(to + cuts.next().unwrap());
            from += masker.feed(&mut state, &text[from..to], false, &mut out);
            let stored = serde_json::to_string(&state).unwrap();
            state = serde_json::from_str(&stored).unwrap();
        }
        masker.feed(&mut state, &text[from..], true, &mut out);
        prop_assert_eq!(String::from_utf8_lossy(&out), String::from_utf8_lossy(&expected));
    }

    #[test]
    fn no_phrase_is_left_in_the_output(
        text in "[abc ]{0,60}", phrases in proptest::collection::vec("[abc]{1,5}", 1..6),
    ) {
        let masker = Masker::new(&phrases, default_prefixes(true)).unwrap();
        let out = String::from_utf8(masker.mask(text.as_bytes())).unwrap();
        for phrase in &phrases {
            prop_assert!(!out.contains(phrase.as_str()), "{phrase:?} in {out:?}");
        }
    }
}

/// The digits of a secret within base64, with so many bytes before it.
fn digits(secret: &str, before: usize) -> String {
    use base64::Engine as _;
    let bytes = [&b"xyz"[..before], secret.as_bytes()].concat();
    let text = base64::prelude::BASE64_STANDARD_NO_PAD.encode(&bytes);
    let to = bytes.len() * 8 / 6;
    text.get((before * 8).div_ceil(6)..to).unwrap().to_owned()
}

/// A text of secrets, pieces of secrets and secrets in base64, and little else.
fn secretive() -> impl Strategy<Value = (Vec<String>, String)> {
    let secrets = proptest::collection::vec("[ab][ab'/+]{6,12}[ab]", 1..4);
    let pieces = proptest::collection::vec((0..6_usize, any::<u8>(), "[ab\n ]{0,3}"), 1..9);
    (secrets, pieces).prop_map(|(secrets, pieces)| {
        let mut text = String::new();
        for (kind, which, between) in pieces {
            let secret = &secrets[usize::from(which) % secrets.len()];
            match kind {
                0 | 1 => text.push_str(secret),
                2..=4 => text.push_str(&digits(secret, kind - 2)),
                _ => text.push_str(secret.split_at(secret.len() / 2).0),
            }
            text.push_str(&between);
        }
        (secrets, text)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(120))]

    #[test]
    fn no_secret_is_left_in_any_form_wherever_the_stream_is_cut((secrets, text) in secretive()) {
        let masker = Masker::of_secrets(&secrets, default_prefixes(true)).unwrap();
        let whole = String::from_utf8(masker.mask(text.as_bytes())).unwrap();
        for secret in &secrets {
            let forms = (0..3).map(|before| digits(secret, before));
            for form in forms.chain([secret.clone()]).filter(|form| form.len() >= 8) {
                prop_assert!(!whole.contains(&form), "{form:?} in {whole:?}");
            }
        }
        for cut in 0..=text.len() {
            let (mut out, mut state) = (Vec::new(), MaskState::default());
            let used = masker.feed(&mut state, &text.as_bytes()[..cut], false, &mut out);
            masker.feed(&mut state, &text.as_bytes()[used..], true, &mut out);
            prop_assert_eq!(String::from_utf8_lossy(&out), whole.as_str(), "cut at {}", cut);
        }
    }
}

#[test]
fn a_secret_of_several_lines_is_masked_with_something_before_each_line() {
    let secret = "-----BEGIN KEY-----\nMIIEvQIBADANBg\nkqhkiG9w0BAQEF\n-----END KEY-----";
    let masker = Masker::of_secrets([secret], default_prefixes(true)).unwrap();
    let text = secret.replace('\n', "\n+ ");
    assert_eq!(
        String::from_utf8(masker.mask(text.as_bytes())).unwrap(),
        "-----BEGIN KEY-----\n+ [MASKED]\n+ [MASKED]\n+ -----END KEY-----"
    );
    assert_eq!(masker.mask(secret.as_bytes()), MASKED);
}

#[test]
fn a_user_and_his_password_in_a_header_are_masked() {
    let masker = Masker::of_secrets(["glcbt-64_abcdefghijklmnop"], Vec::<String>::new()).unwrap();
    // gitlab-ci-token:glcbt-64_abcdefghijklmnop
    let header = b"Authorization: Basic Z2l0bGFiLWNpLXRva2VuOmdsY2J0LTY0X2FiY2RlZmdoaWprbG1ub3A=";
    let masked = String::from_utf8(masker.mask(header)).unwrap();
    assert_eq!(masked, "Authorization: Basic Z2l0bGFiLWNpLXRva2VuOm[MASKED]A=");
}
