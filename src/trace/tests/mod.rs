//! Tests of the modules that belong together: masking and composing.

mod compose;
mod mask;

use proptest::prelude::*;

/// Pieces of text that make secrets, halves of secrets and their surroundings likely.
pub(super) fn log() -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        4 => "[ab\n]{1,6}".prop_map(String::into_bytes),
        2 => "[a-z =.&?-]{1,10}".prop_map(String::into_bytes),
        2 => proptest::sample::select(vec![
            "glpat-", "glpat", "ab-", "ab:", "xyz", "?private_token=", "&X-AMZ-Signature=", "?priv",
            "private_token", "&", "?", "=", "\r", "\r\n", "\r\u{1b}[0K", "\u{1b}[0;m", "é", "€", "𝄞",
            "line one\nline two", "line one\n", "aaaaaaaa", "[MASKED]", "\0", " ",
        ])
        .prop_map(|s| s.as_bytes().to_vec()),
        1 => proptest::collection::vec(any::<u8>(), 0..6),
        1 => proptest::sample::select(vec![
            &b"\xe2\x82"[..], b"\xf0\x9d\x84", b"\xc3", b"\x80", b"\xff",
        ])
        .prop_map(<[u8]>::to_vec),
    ];
    proptest::collection::vec(piece, 0..40).prop_map(|pieces| pieces.concat())
}

/// Secrets of all kinds, also such that overlap themselves and each other.
pub(super) fn phrases() -> impl Strategy<Value = Vec<String>> {
    let phrase = prop_oneof![
        3 => "[ab]{1,6}",
        2 => "[ab\n]{2,6}",
        1 => "[a-z=.&?-]{1,4}",
        1 => proptest::sample::select(vec![
            "line one\nline two", "aaaa", "xyz", "at-xyz", "glpat-abc def", "é", "€a", "𝄞", "z?private",
            "a-b", "token=a b", "",
        ])
        .prop_map(str::to_owned),
    ];
    proptest::collection::vec(phrase, 0..5)
}

pub(super) fn prefixes() -> impl Strategy<Value = Vec<String>> {
    proptest::sample::subsequence(vec!["glpat-", "ab-", "ab:", "a", "b-b-"], 0..=3)
        .prop_map(|all| all.into_iter().map(str::to_owned).collect())
}

/// Where to cut a stream: lengths of pieces.
pub(super) fn cuts() -> impl Strategy<Value = Vec<usize>> {
    proptest::collection::vec(prop_oneof![1usize..4, 1usize..40], 1..60)
}
