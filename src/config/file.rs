//! The file's own types: strict, with the place of every value that may yet turn out wrong.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use jiff::{Span, SpanRelativeTo};
use serde::de::{self, Deserialize, Deserializer, SeqAccess, Visitor};
use serde::forward_to_deserialize_any;
use toml::Spanned;
use toml::de::{DeTable, DeValue};
use toml::value::Datetime;

use super::error::Advice;
use crate::gitlab::wire::Secret;

const IN_RUNNERS: &str = "in [[runners]]";
const IN_CACHE: &str = "in [runners.cache]";
const IN_S3: &str = "in [runners.cache.s3]";
const AT_TOP: &str = "at the top of the file";

/// Keys of gitlab-runner's that have no meaning here, and what to do about them.
const FOREIGN: [(&str, &str); 23] = [
    ("executor", "name one of the [backends] with `backend` instead"),
    ("connection_max_age", "connections are renewed without it; remove it"),
    ("sentry_dsn", "errors go to the log; remove it"),
    ("session_server", "interactive sessions are not supported; remove it"),
    ("custom", "the custom executor's programs are not run; use a backend"),
    ("docker", "jobs run on a backend; remove it"),
    ("kubernetes", "jobs run on a backend; remove it"),
    ("ssh", "jobs run on a backend; remove it"),
    ("machine", "jobs run on a backend; remove it"),
    ("autoscaler", "jobs run on a backend; remove it"),
    ("referees", "remove it"),
    ("labels", "remove it"),
    ("gcs", "not supported yet; supported: local, s3"),
    ("azure", "not supported yet; supported: local, s3"),
    ("S3CachePath", "its name is `Path` now"),
    ("CacheShared", "its name is `Shared` now"),
    ("RedactURL", "a signature is never shown; remove it"),
    ("Accelerate", "write the accelerated address as `ServerAddress`"),
    ("RoleARN", "roles are not supported; write `AccessKeyFile` and `SecretKeyFile`"),
    ("UploadRoleARN", "roles are not supported; write `AccessKeyFile` and `SecretKeyFile`"),
    ("AssumeRoleMaxConcurrency", "roles are not supported; remove it"),
    ("DisableAssumeRoleCredentialsCaching", "roles are not supported; remove it"),
    ("CredentialsFile", "not supported yet; supported: local, s3"),
];

/// The file.
#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FileTable {
    pub(super) state_dir: Option<Spanned<String>>,
    pub(super) key_file: Option<Spanned<String>>,
    pub(super) concurrent: Option<Spanned<usize>>,
    pub(super) check_interval: Option<Spanned<DurationText>>,
    pub(super) log_level: Option<Spanned<String>>,
    pub(super) log_format: Option<Spanned<String>>,
    pub(super) listen_address: Option<Spanned<String>>,
    pub(super) shutdown_timeout: Option<Spanned<DurationText>>,
    pub(super) prepare_workers: Option<Spanned<usize>>,
    pub(super) finish_workers: Option<Spanned<usize>>,
    pub(super) retention: Option<Spanned<DurationText>>,
    pub(super) lost_after: Option<Spanned<DurationText>>,
    #[serde(default)]
    pub(super) runners: Vec<Spanned<RunnerTable>>,
    #[serde(default)]
    pub(super) backends: BTreeMap<String, Spanned<toml::Table>>,
}

/// One `[[runners]]` table.
#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RunnerTable {
    pub(super) name: Spanned<String>,
    pub(super) url: Spanned<String>,
    pub(super) token: Option<Spanned<Secret>>,
    pub(super) token_file: Option<Spanned<String>>,
    pub(super) id: Option<u64>,
    #[serde(rename = "token_obtained_at")]
    pub(super) _token_obtained_at: Option<Datetime>,
    pub(super) token_expires_at: Option<Datetime>,
    pub(super) token_rotation: Option<bool>,
    pub(super) backend: Spanned<String>,
    pub(super) limit: Option<usize>,
    pub(super) request_concurrency: Option<usize>,
    pub(super) strict_check_interval: Option<bool>,
    pub(super) builds_dir: Option<Spanned<String>>,
    pub(super) cache_dir: Option<Spanned<String>>,
    pub(super) cache: Option<Spanned<CacheTable>>,
    pub(super) custom_build_dir: Option<CustomBuildDirTable>,
    pub(super) mirrors_dir: Option<Spanned<String>>,
    pub(super) mirrors_keep: Option<Spanned<DurationText>>,
    pub(super) environment: Option<Spanned<Environment>>,
    pub(super) output_limit: Option<u64>,
    #[serde(alias = "tls-ca-file")]
    pub(super) tls_ca_file: Option<Spanned<String>>,
    #[serde(alias = "tls-cert-file")]
    pub(super) tls_cert_file: Option<Spanned<String>>,
    #[serde(alias = "tls-key-file")]
    pub(super) tls_key_file: Option<Spanned<String>>,
    pub(super) shell: Option<Spanned<String>>,
    pub(super) login_shell: Option<bool>,
    pub(super) image: Option<Spanned<String>>,
    pub(super) clone_url: Option<Spanned<String>>,
    #[serde(alias = "pre_clone_script")]
    pub(super) pre_get_sources_script: Option<String>,
    #[serde(alias = "post_clone_script")]
    pub(super) post_get_sources_script: Option<String>,
    pub(super) pre_build_script: Option<String>,
    pub(super) post_build_script: Option<String>,
    pub(super) prepare_timeout: Option<Spanned<DurationText>>,
    pub(super) get_sources_timeout: Option<Spanned<DurationText>>,
    pub(super) unhealthy_requests_limit: Option<u32>,
    pub(super) unhealthy_interval: Option<Spanned<DurationText>>,
    pub(super) job_status_final_update_retry_limit: Option<u32>,
    pub(super) feature_flags: Option<BTreeMap<String, bool>>,
    pub(super) debug_trace_disabled: Option<bool>,
    pub(super) deadline_reserve: Option<Spanned<DurationText>>,
    pub(super) minimum_run_time: Option<Spanned<DurationText>>,
}

/// `[runners.cache]`; the capitals are gitlab-runner's.
#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct CacheTable {
    #[serde(rename = "Type")]
    pub(super) kind: Option<Spanned<String>>,
    #[serde(rename = "Path")]
    pub(super) path: Option<String>,
    #[serde(rename = "Shared")]
    pub(super) shared: Option<bool>,
    #[serde(rename = "MaxUploadedArchiveSize")]
    pub(super) max_uploaded_archive_size: Option<u64>,
    pub(super) quota: Option<Spanned<SizeText>>,
    pub(super) max_age: Option<Spanned<DurationText>>,
    pub(super) s3: Option<Spanned<S3Table>>,
}

/// `[runners.cache.s3]`.
#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields, rename_all = "PascalCase")]
pub(super) struct S3Table {
    pub(super) server_address: Option<Spanned<String>>,
    pub(super) access_key: Option<Spanned<Secret>>,
    pub(super) access_key_file: Option<Spanned<String>>,
    pub(super) secret_key: Option<Spanned<Secret>>,
    pub(super) secret_key_file: Option<Spanned<String>>,
    pub(super) session_token: Option<Spanned<Secret>>,
    pub(super) session_token_file: Option<Spanned<String>>,
    pub(super) bucket_name: Option<Spanned<String>>,
    pub(super) bucket_location: Option<String>,
    pub(super) insecure: Option<bool>,
    pub(super) authentication_type: Option<Spanned<String>>,
    pub(super) server_side_encryption: Option<Spanned<String>>,
    #[serde(rename = "ServerSideEncryptionKeyID")]
    pub(super) server_side_encryption_key_id: Option<String>,
    pub(super) dual_stack: Option<bool>,
    pub(super) path_style: Option<bool>,
}

/// A size as written.
#[derive(serde::Deserialize)]
#[serde(untagged, expecting = "a number of bytes, or a text as in \"50 GiB\"")]
pub(super) enum SizeText {
    /// Bytes.
    Number(i64),
    /// Words.
    Words(String),
}

/// `[runners.custom_build_dir]`.
#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct CustomBuildDirTable {
    pub(super) enabled: Option<bool>,
}

/// A duration as written.
pub(super) enum DurationText {
    /// A bare integer.
    Number(i64),
    /// Words.
    Words(String),
}

impl<'de> Deserialize<'de> for DurationText {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visit;
        impl Visitor<'_> for Visit {
            type Value = DurationText;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a duration as in \"1m 30s\"")
            }
            fn visit_i64<E: de::Error>(self, number: i64) -> Result<DurationText, E> {
                Ok(DurationText::Number(number))
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<DurationText, E> {
                Ok(DurationText::Words(text.to_owned()))
            }
        }
        deserializer.deserialize_any(Visit)
    }
}

/// `environment`: a list of `NAME=value`. Its own type because serde's usual complaint would quote
/// what was found, and that may be a secret.
pub(super) struct Environment(pub(super) Vec<String>);

impl<'de> Deserialize<'de> for Environment {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visit;
        impl<'de> Visitor<'de> for Visit {
            type Value = Environment;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of \"NAME=value\"")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Environment, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = seq.next_element()? {
                    entries.push(entry);
                }
                Ok(Environment(entries))
            }
            fn visit_str<E: de::Error>(self, _text: &str) -> Result<Environment, E> {
                Err(E::custom("`environment` must be a list of \"NAME=value\""))
            }
        }
        deserializer.deserialize_any(Visit)
    }
}

/// Reads a duration in words: `1m 30s`, `2 hours`, `30 days`; a day is 24 hours.
///
/// # Errors
///
/// When it is none, negative, or holds months or years, which have no fixed length.
pub fn duration_in_words(text: &str) -> Result<Duration, jiff::Error> {
    let span: Span = text.trim().parse()?;
    Duration::try_from(span.to_duration(SpanRelativeTo::days_are_24_hours())?)
}

/// A key that nobody knows.
pub(super) struct Unknown {
    /// Where it starts, in bytes.
    pub(super) at: usize,
    pub(super) key: String,
    pub(super) table: &'static str,
    pub(super) advice: Advice,
}

/// Finds the first key that the types above do not have.
///
/// serde would find it too, but could say only what it expected, not what was meant.
pub(super) fn unknown_key(root: &DeTable<'_>) -> Option<Unknown> {
    let (top, runner) = (keys_of::<FileTable>(), keys_of::<RunnerTable>());
    let mut found = unknown_in(root, top, AT_TOP, (runner, IN_RUNNERS));
    if let Some((_key, runners)) = root.iter().find(|(key, _value)| key.get_ref() == "runners")
        && let DeValue::Array(runners) = runners.get_ref()
    {
        for table in runners {
            if let DeValue::Table(table) = table.get_ref() {
                found.extend(unknown_in(table, runner, IN_RUNNERS, (top, AT_TOP)));
                found.extend(unknown_in_cache(table));
            }
        }
    }
    found.into_iter().min_by_key(|unknown| unknown.at)
}

/// Looks into `[runners.cache]` and `[runners.cache.s3]`.
fn unknown_in_cache(runner: &DeTable<'_>) -> Vec<Unknown> {
    let (cache, s3) = (keys_of::<CacheTable>(), keys_of::<S3Table>());
    let Some(table) = table_in(runner, "cache") else { return Vec::new() };
    let mut found = unknown_in(table, cache, IN_CACHE, (s3, IN_S3));
    if let Some(table) = table_in(table, "s3") {
        found.extend(unknown_in(table, s3, IN_S3, (cache, IN_CACHE)));
    }
    found
}

fn table_in<'a, 'i>(table: &'a DeTable<'i>, name: &str) -> Option<&'a DeTable<'i>> {
    let (_key, value) = table.iter().find(|(key, _value)| key.get_ref() == name)?;
    let DeValue::Table(table) = value.get_ref() else { return None };
    Some(table)
}

fn unknown_in(
    table: &DeTable<'_>,
    known: &'static [&'static str],
    name: &'static str,
    (elsewhere, where_else): (&'static [&'static str], &'static str),
) -> Vec<Unknown> {
    let unknown = table.iter().filter(|(key, _value)| !known.contains(&key.get_ref().as_ref()));
    unknown
        .map(|(key, _value)| {
            let text = key.get_ref().to_string();
            let advice = advice(&text, known, elsewhere, where_else);
            Unknown { at: key.span().start, key: text, table: name, advice }
        })
        .collect()
}

fn advice(
    key: &str,
    known: &'static [&'static str],
    elsewhere: &'static [&'static str],
    where_else: &'static str,
) -> Advice {
    if let Some((_key, advice)) = FOREIGN.iter().find(|(foreign, _advice)| *foreign == key) {
        return Advice::Foreign(advice);
    }
    if elsewhere.contains(&key) {
        return Advice::BelongsTo(where_else);
    }
    match nearest(key, known.iter().copied()) {
        Some(nearest) => Advice::Nearest(nearest),
        None => Advice::None,
    }
}

/// Finds the word most like `text`, if any is like it at all: at most a third of it differs.
pub(crate) fn nearest<'a>(text: &str, words: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let plain = text.to_lowercase().replace('-', "_");
    words
        .map(|word| (strsim::damerau_levenshtein(&plain, word), word))
        .filter(|(distance, word)| distance * 3 <= word.len().max(3))
        .min_by_key(|(distance, _word)| *distance)
        .map(|(_distance, word)| word)
}

/// Asks a type that derives `Deserialize` for the names of its fields, aliases included.
fn keys_of<'de, T: Deserialize<'de>>() -> &'static [&'static str] {
    match T::deserialize(FieldNames) {
        Err(Captured(fields)) => fields,
        // Only a type that takes nothing at all could succeed here.
        Ok(_nothing) => &[],
    }
}

/// Answers every question with "no", and notes the fields of a struct on the way.
struct FieldNames;

#[derive(Debug)]
struct Captured(&'static [&'static str]);

impl<'de> Deserializer<'de> for FieldNames {
    type Error = Captured;

    fn deserialize_any<V: Visitor<'de>>(self, _visitor: V) -> Result<V::Value, Captured> {
        Err(Captured(&[]))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        fields: &'static [&'static str],
        _visitor: V,
    ) -> Result<V::Value, Captured> {
        Err(Captured(fields))
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option
        unit unit_struct newtype_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}

impl fmt::Display for Captured {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("fields captured")
    }
}

impl std::error::Error for Captured {}

impl de::Error for Captured {
    fn custom<T: fmt::Display>(_message: T) -> Self {
        Self(&[])
    }
}
