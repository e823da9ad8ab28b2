//! What we tell GitLab of ourselves: the `info` object of almost every call.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use serde::Serialize;
use serde_json::value::RawValue;

/// What bridge does today, key by key; GitLab expects all of them (gitlab-runner,
/// `common/network.go`).
///
/// GitLab gives a job away first and then fails it if its runner lacks a feature that it needs; a
/// feature that is claimed and not there makes jobs run wrongly. So no key is `true` before the code
/// is there.
const FEATURES: &[(&str, bool)] = &[
    ("variables", true),
    ("image", false),
    ("services", false),
    ("artifacts", true),
    ("cache", true),
    ("fallback_cache_keys", true),
    // Several jobs share a machine and its file systems.
    ("shared", true),
    ("upload_multiple_artifacts", true),
    ("upload_raw_artifacts", true),
    ("session", false),
    ("terminal", false),
    ("refspecs", true),
    ("masking", true),
    ("proxy", false),
    ("raw_variables", true),
    ("artifacts_exclude", true),
    ("multi_build_steps", true),
    ("trace_reset", true),
    ("trace_checksum", true),
    ("trace_size", true),
    ("vault_secrets", false),
    ("cancelable", true),
    ("return_exit_code", true),
    ("service_variables", false),
    ("service_multiple_aliases", false),
    ("image_executor_opts", false),
    ("service_executor_opts", false),
    ("cancel_gracefully", true),
    ("native_steps_integration", false),
    ("two_phase_job_commit", false),
    ("job_inputs", true),
];

/// What differs from runner to runner; empty texts are left out.
#[derive(Clone, Debug, Default)]
pub struct InfoOptions {
    /// The product's name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// The commit it was built from.
    pub revision: String,
    /// How jobs are run. GitLab shows words it does not know as `unknown`.
    pub executor: String,
    /// The shell that runs scripts.
    pub shell: String,
    /// The GPUs' description, as in Docker's option.
    pub gpus: String,
    /// The runner manager's labels; see [`check_labels`].
    pub labels: BTreeMap<String, String>,
}

/// The `info` object, ready to be sent; written once, copied into every call.
#[derive(Clone)]
pub struct Info(Arc<RawValue>);

#[derive(Serialize)]
struct InfoBody {
    #[serde(skip_serializing_if = "String::is_empty")]
    name: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    version: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    revision: String,
    platform: &'static str,
    architecture: &'static str,
    #[serde(skip_serializing_if = "String::is_empty")]
    executor: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    shell: String,
    features: BTreeMap<&'static str, bool>,
    config: ConfigBody,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    labels: BTreeMap<String, String>,
}

#[derive(Serialize)]
struct ConfigBody {
    gpus: String,
}

impl Info {
    /// Writes the object; texts are cut to the lengths that GitLab takes.
    pub fn new(options: InfoOptions) -> Self {
        let body = InfoBody {
            name: cut(options.name, 255),
            version: cut(options.version, 2048),
            revision: cut(options.revision, 255),
            platform: platform(),
            architecture: architecture(),
            executor: cut(options.executor, 255),
            shell: cut(options.shell, 255),
            features: FEATURES.iter().copied().collect(),
            config: ConfigBody { gpus: options.gpus },
            labels: options.labels,
        };
        let raw = serde_json::value::to_raw_value(&body).expect("texts and booleans only");
        Self(Arc::from(raw))
    }

    pub(super) fn raw(&self) -> &RawValue {
        &self.0
    }
}

impl fmt::Debug for Info {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Info(…)")
    }
}

fn cut(mut text: String, chars: usize) -> String {
    if let Some((end, _)) = text.char_indices().nth(chars) {
        text.truncate(end);
    }
    text
}

/// A label that GitLab would not take.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidLabel {
    /// More than 32.
    #[error("{0} labels, at most 32 are taken")]
    TooMany(usize),
    /// The key is malformed.
    #[error(
        "label key {0:?} is not 3 to 65 letters, digits, '.', '_' or '-', beginning with neither \
         '.' nor '-'"
    )]
    Key(String),
    /// The value is malformed.
    #[error("label {key:?} has a value that is not 1 to 256 letters, digits, '.', '_' or '-'")]
    Value {
        /// The label's key.
        key: String,
    },
}

/// Checks labels as gitlab-runner does (`common/labels.go`).
pub fn check_labels(labels: &BTreeMap<String, String>) -> Result<(), InvalidLabel> {
    let word = |text: &str| text.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c));
    if labels.len() > 32 {
        return Err(InvalidLabel::TooMany(labels.len()));
    }
    for (key, value) in labels {
        if !word(key) || !(3..=65).contains(&key.len()) || key.starts_with(['.', '-']) {
            return Err(InvalidLabel::Key(key.clone()));
        }
        if !word(value) || !(1..=256).contains(&value.len()) {
            return Err(InvalidLabel::Value { key: key.clone() });
        }
    }
    Ok(())
}

/// Gives the operating system's name as Go spells it, which is how GitLab shows it.
pub(super) fn platform() -> &'static str {
    match std::env::consts::OS {
        "macos" => "darwin",
        other => other,
    }
}

/// Gives the processor's name as Go spells it.
pub(super) fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "x86" => "386",
        "powerpc64" if cfg!(target_endian = "little") => "ppc64le",
        "powerpc64" => "ppc64",
        "loongarch64" => "loong64",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_feature_key_is_sent_and_claims_what_is_there() {
        let info = Info::new(InfoOptions {
            name: "bridge".into(),
            labels: [("site".into(), "cc1".into())].into(),
            ..InfoOptions::default()
        });
        let info: serde_json::Value = serde_json::from_str(info.raw().get()).unwrap();
        let features = info["features"].as_object().unwrap();
        assert_eq!(features.len(), 31, "every key of the official runner, once");
        let mut claimed: Vec<&str> = features
            .iter()
            .filter(|(_, claimed)| claimed.as_bool().unwrap())
            .map(|(key, _)| key.as_str())
            .collect();
        claimed.sort_unstable();
        assert_eq!(
            claimed,
            [
                "artifacts",
                "artifacts_exclude",
                "cache",
                "cancel_gracefully",
                "cancelable",
                "fallback_cache_keys",
                "job_inputs",
                "masking",
                "multi_build_steps",
                "raw_variables",
                "refspecs",
                "return_exit_code",
                "shared",
                "trace_checksum",
                "trace_reset",
                "trace_size",
                "upload_multiple_artifacts",
                "upload_raw_artifacts",
                "variables",
            ]
        );
        assert_eq!(info["config"], serde_json::json!({"gpus": ""}));
        assert_eq!(info["labels"], serde_json::json!({"site": "cc1"}));
        assert!(info.get("version").is_none(), "empty texts are left out");
    }

    #[test]
    fn long_texts_are_cut_between_characters() {
        assert_eq!(cut("äöü".into(), 2), "äö");
        assert_eq!(cut("äöü".into(), 3), "äöü");
    }

    #[test]
    fn malformed_labels_are_named() {
        let labels =
            |key: &str, value: &str| check_labels(&[(key.to_owned(), value.to_owned())].into());
        assert_eq!(labels("site", "cc-1.x"), Ok(()));
        assert_eq!(labels("si", "x"), Err(InvalidLabel::Key("si".into())));
        assert_eq!(labels("-site", "x"), Err(InvalidLabel::Key("-site".into())));
        assert_eq!(labels("site", ""), Err(InvalidLabel::Value { key: "site".into() }));
        assert_eq!(labels("site", "a b"), Err(InvalidLabel::Value { key: "site".into() }));
        let many = (0..33).map(|n| (format!("key{n}"), "v".to_owned())).collect();
        assert_eq!(check_labels(&many), Err(InvalidLabel::TooMany(33)));
    }
}
