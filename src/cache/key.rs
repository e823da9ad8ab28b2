//! Keys: what a job calls its cache, and the name under which that is kept.
//!
//! The rules are gitlab-runner's (`cache/cachekey`, `shells/abstract.go`), and two of our own: a key that
//! no file system could take, or that would get in another one's way, is kept under its hash.

use std::fmt;

use sha2::{Digest as _, Sha256};

/// The archive's name in its directory, whatever its format.
pub(super) const ARCHIVE: &str = "cache.zip";
/// What is known of the archive, beside it.
pub(super) const METADATA: &str = "metadata.json";
/// What names of files that are being written begin with.
pub(super) const TEMPORARY: &str = ".cache-";

/// The longest name of a directory entry.
const LONGEST_NAME: usize = 255;
/// The longest key that is kept as it is; an object's name may have 1024 bytes in all.
const LONGEST_KEY: usize = 700;

/// What keys of protected refs end in; the server puts it there.
const PROTECTED: &str = "-protected";

/// A key whose name stays within its project's directory, however it was spelled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key {
    readable: String,
    stored: String,
    hashed: bool,
}

impl Key {
    /// Takes a key as it is and keeps it under its hash (`FF_HASH_CACHE_KEYS`); none if it is empty.
    pub fn hashed(raw: &str) -> Option<Self> {
        let stored = hash(raw);
        (!raw.is_empty()).then(|| Self { readable: raw.to_owned(), stored, hashed: true })
    }

    /// Makes a path of a key; what is left may be nothing.
    pub fn sanitized(raw: &str) -> Option<Self> {
        let path = sanitize(raw)?;
        let stored = if fits(&path) { path.clone() } else { hash(&path) };
        Some(Self { readable: path, stored, hashed: false })
    }

    /// Gives the key as people wrote it, sanitised.
    pub fn readable(&self) -> &str {
        &self.readable
    }

    /// Gives the key below a project's directory.
    pub(super) fn path(&self) -> &str {
        &self.stored
    }

    /// Gives the key below a project in an object store, where hashes are spread.
    pub(super) fn object(&self) -> String {
        match self.stored.get(..2) {
            Some(shard) if self.hashed => format!("{shard}/{}", self.stored),
            _ => self.stored.clone(),
        }
    }

    /// Says whether a variable of a job may name this key: neither one of protected refs, nor
    /// something that could be the hash of one.
    pub fn may_be_named_by_a_job(&self) -> bool {
        let last = self.stored.rsplit('/').next().unwrap_or_default();
        let like_a_hash = last.len() == 64 && last.bytes().all(|b| b.is_ascii_hexdigit());
        !is_protected(&self.readable) && (self.hashed || !like_a_hash)
    }
}

/// Shows a key in one line of a trace, whatever is in it.
impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&shown(&self.readable))
    }
}

/// Says whether a key is one of protected refs.
pub(super) fn is_protected(key: &str) -> bool {
    key.trim_end_matches(|c: char| c == '.' || c.is_whitespace()).ends_with(PROTECTED)
}

/// Makes control characters visible.
pub fn shown(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c }).collect()
}

/// Joins and cleans a path as if its beginning were the root.
pub fn clean(path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    parts.join("/")
}

/// Undoes the encoding of separators and dots, cleans the path, and takes blanks off its end.
fn sanitize(raw: &str) -> Option<String> {
    let mut decoded = raw.replace('\\', "/");
    for (encoded, plain) in [("%2f", "/"), ("%2F", "/"), ("%2e", "."), ("%2E", ".")] {
        decoded = decoded.replace(encoded, plain);
    }
    let mut path = clean(&decoded);
    loop {
        // A last segment of blanks goes with its separator; one of dots and blanks would become one
        // that climbs.
        let shorter = clean(path.trim_end());
        if shorter == path {
            return (!path.is_empty()).then_some(path);
        }
        path = shorter;
    }
}

/// Says whether a path can be made of directories without getting in another key's way.
fn fits(path: &str) -> bool {
    path.len() <= LONGEST_KEY
        && !path.contains('\0')
        && path.split('/').all(|part| {
            part.len() <= LONGEST_NAME
                && !matches!(part, "" | "." | ".." | ARCHIVE | METADATA)
                && !part.starts_with(TEMPORARY)
        })
}

fn hash(text: &str) -> String {
    let digest = Sha256::digest(text.as_bytes());
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn path(raw: &str) -> Option<String> {
        Key::sanitized(raw).map(|key| key.path().to_owned())
    }

    #[test]
    fn keys_are_sanitised_as_the_official_runner_does() {
        for (raw, expected) in [
            ("fallback_key", "fallback_key"),
            ("some-job/some-ref", "some-job/some-ref"),
            (".../....", ".../...."),
            ("...", "..."),
            // Blanks and separators at the end.
            ("fallback_key/", "fallback_key"),
            ("fallback_key ", "fallback_key"),
            ("fallback_key\\", "fallback_key"),
            ("fallback_key/ \\", "fallback_key"),
            ("fallback_key/ / \\  \\", "fallback_key"),
            ("fallback_key/o", "fallback_key/o"),
            ("fallback_key / \\o", "fallback_key / /o"),
            ("\t foo bar \t\r", "\t foo bar"),
            (" foo / bar ", " foo / bar"),
            ("foo\r", "foo"),
            ("foo \t \r ", "foo"),
            ("foo/ /bar", "foo/ /bar"),
            ("foo/ / /", "foo"),
            ("foo\u{a0}", "foo"),
            // Encoded separators and dots.
            ("something %2F something", "something / something"),
            ("something %2f something", "something / something"),
            ("some%2f../job/some/ref/.", "job/some/ref"),
            ("%2E%2E%2E", "..."),
            ("%2E%2e%2E", "..."),
            ("%5C", "%5C"),
            ("%252e", "%252e"),
            // Climbing.
            ("foo/./bar", "foo/bar"),
            ("foo/blipp/../bar", "foo/bar"),
            ("/foo/bar", "foo/bar"),
            ("//foo/bar", "foo/bar"),
            ("./foo/bar", "foo/bar"),
            ("../foo/bar", "foo/bar"),
            (".../foo/bar", ".../foo/bar"),
            ("foo/bar/..", "foo"),
            ("foo/bar/../../../.././blerp", "blerp"),
            ("a/b/c/../../d", "a/d"),
            ("job\\name/git\\ref", "job/name/git/ref"),
            ("foo\\.\\bar", "foo/bar"),
            ("..\\foo\\bar", "foo/bar"),
            ("foo\\bar\\..\\..\\..\\..\\.\\blerp", "blerp"),
            ("this/../key/will/be\\sanitized\\  ", "key/will/be/sanitized"),
        ] {
            assert_eq!(path(raw).as_deref(), Some(expected), "{raw:?}");
        }
    }

    #[test]
    fn keys_of_which_nothing_is_left_are_none() {
        for raw in [
            "..\t",
            "a/../.. ",
            ". ",
            "",
            "\\",
            "\\.",
            "/",
            " ",
            ".",
            "..",
            " / ",
            "//",
            "//\\",
            "../.",
            "foo/bar/../..",
            "foo\\bar\\..\\..",
            " \t\r\n",
            "%2E",
            "%2E%2E",
            "%2e%2E",
            ".%2E",
            "%2e.",
        ] {
            assert_eq!(path(raw), None, "{raw:?}");
        }
        assert_eq!(Key::hashed(""), None);
    }

    #[test]
    fn hashed_keys_are_not_sanitised() {
        let key = Key::hashed("/").unwrap();
        let sha = "8a5edab282632443219e051e4ade2d1d5bbc671c781051bf1437897cbdfea0f1";
        assert_eq!((key.readable(), key.path()), ("/", sha));
        assert_eq!(key.object(), format!("8a/{sha}"));
        assert_eq!(Key::sanitized("main").unwrap().object(), "main");
    }

    #[test]
    fn keys_that_no_directory_can_have_are_kept_under_their_hash() {
        let long = "x".repeat(256);
        let deep = "ab/".repeat(300);
        for raw in ["a\0b", "a/cache.zip", "metadata.json/x", ".cache-1/x", &long, &deep] {
            let key = Key::sanitized(raw).unwrap();
            assert_eq!(key.path().len(), 64, "{raw:?}");
            assert_eq!(key.readable(), sanitize(raw).unwrap());
        }
        assert_eq!(path(&"x".repeat(255)).unwrap().len(), 255);
    }

    #[test]
    fn a_job_cannot_name_a_key_of_protected_refs() {
        let hash_of_protected = Key::hashed("main-protected").unwrap().path().to_owned();
        let sharded = format!("ab/{hash_of_protected}");
        for raw in [
            "main-protected",
            "main-protected/",
            "main-protected \t",
            "main-protected.",
            "main-protected . .",
            "main-protected/./ /",
            "x/..\\main-protected",
            "main%2f..%2fmain-protected",
            "-protected",
            &hash_of_protected,
            &sharded,
        ] {
            assert!(!Key::sanitized(raw).unwrap().may_be_named_by_a_job(), "{raw:?}");
        }
        for raw in ["main", "main-non_protected", "main-protected/x", "protected", &"0".repeat(63)]
        {
            assert!(Key::sanitized(raw).unwrap().may_be_named_by_a_job(), "{raw:?}");
        }
        assert!(!Key::hashed("main-protected").unwrap().may_be_named_by_a_job());
        assert!(!Key::hashed("main-protected. ").unwrap().may_be_named_by_a_job());
        assert!(Key::hashed("main").unwrap().may_be_named_by_a_job());
    }

    #[test]
    fn control_characters_do_not_reach_the_trace() {
        let key = Key::sanitized("a\nsection_start:1:x\r\u{1b}[0Kb").unwrap();
        assert!(!key.to_string().contains(['\n', '\r', '\u{1b}']), "{key}");
    }

    proptest! {
        #[test]
        fn no_key_leaves_its_directory(raw in "[a-c./\\\\% 2eEfF\t]{0,24}") {
            if let Some(key) = Key::sanitized(&raw) {
                for part in key.path().split('/') {
                    prop_assert!(!matches!(part, "" | "." | ".."), "{raw:?} → {key:?}");
                }
                // What is clean stays as it is.
                prop_assert_eq!(Key::sanitized(key.readable()), Some(key.clone()));
            }
        }
    }
}
