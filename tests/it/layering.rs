//! The edges between modules and crates, read from the sources.
//!
//! A new edge is a decision: it is added to the table here, with the reason in the commit.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// What each module of the crate may use, besides itself.
const EDGES: &[(&str, &[&str])] = &[
    ("agent", &["domain", "gitlab", "reconcile", "store", "telemetry"]),
    ("archive", &[]),
    ("cache", &["domain"]),
    (
        "cli",
        &[
            "agent",
            "archive",
            "config",
            "coordinator",
            "daemon",
            "domain",
            "gitlab",
            "http",
            "logins",
            "pipeline",
            "registry",
            "rotation",
            "store",
            "telemetry",
            "trace",
        ],
    ),
    ("config", &["cache", "domain", "gitlab", "telemetry"]),
    ("coordinator", &[]),
    (
        "daemon",
        &[
            "agent",
            "cache",
            "config",
            "domain",
            "gitlab",
            "job",
            "reconcile",
            "registry",
            "store",
            "telemetry",
        ],
    ),
    ("domain", &[]),
    ("gitlab", &["domain"]),
    ("http", &["config", "telemetry"]),
    ("job", &["archive", "cache", "domain", "gitlab"]),
    ("logins", &["domain", "telemetry"]),
    ("pipeline", &[]),
    ("reconcile", &["cache", "domain", "gitlab", "job", "store", "telemetry", "trace"]),
    ("registry", &["config", "domain"]),
    ("rotation", &["agent", "config", "daemon", "domain", "gitlab", "reconcile", "telemetry"]),
    ("store", &["domain", "gitlab"]),
    ("telemetry", &[]),
    ("trace", &[]),
];

/// Where a crate or macro may appear.
const PLACES: &[(&str, &[&str])] = &[
    ("sqlx::", &["src/store"]),
    ("println!", &["src/cli/output.rs"]),
    ("reqwest::", &["src/cache/s3", "src/gitlab"]),
    ("axum::", &["src/http.rs", "src/coordinator"]),
    ("chacha20poly1305::", &["src/store/keyring.rs"]),
];

/// Files of a workspace are touched here alone.
const HANDS: &[&str] = &["std::fs", "tokio::fs", "process::Command"];

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn sources(below: &Path, into: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(below).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, into);
        } else if path.extension().is_some_and(|e| e == "rs") {
            into.push(path);
        }
    }
}

/// The code of a file without its tests and comments; nothing of a file that is all tests.
fn code(path: &Path) -> String {
    let name = path.to_string_lossy();
    if name.ends_with("tests.rs") || name.contains("/tests/") || name.ends_with("test_support.rs") {
        return String::new();
    }
    let text = std::fs::read_to_string(path).unwrap();
    let text = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
    text.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n")
}

fn all() -> Vec<(String, String)> {
    let root = root();
    let mut files = Vec::new();
    sources(&root.join("src"), &mut files);
    files
        .into_iter()
        .map(|path| {
            let name = path.strip_prefix(&root).unwrap().to_string_lossy().into_owned();
            (name, code(&path))
        })
        .collect()
}

fn module(file: &str) -> &str {
    let rest = file.strip_prefix("src/").unwrap();
    rest.split('/').next().unwrap().trim_end_matches(".rs")
}

#[test]
fn modules_use_only_what_the_table_allows() {
    let known: BTreeSet<&str> = EDGES.iter().map(|(name, _)| *name).collect();
    let mut wrong = Vec::new();
    for (file, code) in all() {
        let from = module(&file);
        if matches!(from, "lib" | "main") {
            continue;
        }
        let allowed = EDGES
            .iter()
            .find(|(name, _)| *name == from)
            .unwrap_or_else(|| panic!("{from} is not in the table of edges"))
            .1;
        for piece in code.split("crate::").skip(1) {
            // The list in braces of `use crate::{a, b}` does not occur; each use names one module.
            let to: String =
                piece.chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '_').collect();
            if known.contains(to.as_str()) && to != from && !allowed.contains(&to.as_str()) {
                wrong.push(format!("{file}: {from} → {to}"));
            }
        }
    }
    wrong.dedup();
    assert!(wrong.is_empty(), "edges that the table does not allow:\n{}", wrong.join("\n"));
}

#[test]
fn crates_and_macros_stay_in_their_places() {
    let mut wrong = Vec::new();
    for (file, code) in all() {
        for (what, places) in PLACES {
            let used = code.contains(what)
                && !code.contains(&format!("e{what}"))
                && !places.iter().any(|place| file.starts_with(place));
            if used {
                wrong.push(format!("{file}: {what}"));
            }
        }
        let in_job = file.starts_with("src/job/") && !file.starts_with("src/job/hands/");
        for what in HANDS.iter().filter(|_| in_job) {
            if code.contains(what) {
                wrong.push(format!("{file}: {what}, which is for job::hands"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn backends_know_nothing_of_us() {
    for backend in ["api", "dirac", "local", "slurm"] {
        let manifest =
            std::fs::read_to_string(root().join("backends").join(backend).join("Cargo.toml"));
        let manifest: toml::Table = manifest.unwrap().parse().unwrap();
        for table in ["dependencies", "dev-dependencies"] {
            let names = manifest.get(table).and_then(toml::Value::as_table);
            for name in names.into_iter().flat_map(|table| table.keys()) {
                assert!(!matches!(name.as_str(), "sqlx" | "bridge"), "{backend} depends on {name}");
            }
        }
    }
}

#[test]
fn crates_that_were_ruled_out_stay_out() {
    let lock = std::fs::read_to_string(root().join("Cargo.lock")).unwrap();
    for name in ["openssl", "openssl-sys", "native-tls", "aws-lc-rs", "aws-lc-sys", "serde_yaml"] {
        assert!(!lock.contains(&format!("name = \"{name}\"\n")), "{name} came in");
    }
}
