//! `[runners.cache]`: the keys of gitlab-runner's, and what they mean here.

use std::ops::Range;

use secrecy::SecretString;
use toml::Spanned;
use url::Url;

use super::error::ConfigError;
use super::file::{CacheTable, S3Table, SizeText};
use super::resolve::{Bare, Place};
use super::secret;
use crate::cache::{CacheSettings, Encryption, S3Settings};
use crate::gitlab::wire::Secret;

/// The region that S3 means where none is named.
const REGION: &str = "us-east-1";
/// Amazon's address that serves every region.
const AMAZON: &str = "s3.amazonaws.com";

impl Place<'_> {
    /// Reads `[runners.cache]`.
    pub(super) fn cache(&self, table: Spanned<CacheTable>) -> Result<CacheSettings, ConfigError> {
        let header = table.span();
        let table = table.into_inner();
        let kind = table.kind.as_ref().map(|kind| kind.get_ref().as_str());
        let kind_at = table.kind.as_ref().map_or_else(|| header.clone(), Spanned::span);
        let wants_s3 = match kind {
            Some("s3") => true,
            Some("local") | None => false,
            Some(other @ ("gcs" | "gcsv2" | "azure")) => {
                let why = format!("{other:?} is not supported yet; supported: \"local\", \"s3\"");
                return Err(self.value(&kind_at, "Type", why));
            }
            Some(other) => {
                let why = format!("must be \"local\" or \"s3\", not {other:?}");
                return Err(self.value(&kind_at, "Type", why));
            }
        };
        let s3 = match (wants_s3, table.s3) {
            (true, Some(s3)) => {
                let prefix = table.path.unwrap_or_default();
                Some(self.s3(s3, prefix, table.shared.unwrap_or(false))?)
            }
            (true, None) => {
                return Err(self.value(&kind_at, "Type", "\"s3\" needs [runners.cache.s3]"));
            }
            (false, Some(s3)) => {
                let why = "must be \"s3\" for [runners.cache.s3] to count";
                return Err(self.value(&s3.span(), "Type", why));
            }
            (false, None) => None,
        };
        Ok(CacheSettings {
            quota: self.size("quota", table.quota.as_ref())?,
            max_age: self.duration("max_age", table.max_age.as_ref(), Bare::Refused)?,
            max_uploaded: table.max_uploaded_archive_size.filter(|limit| *limit > 0),
            s3,
        })
    }

    fn s3(
        &self,
        table: Spanned<S3Table>,
        prefix: String,
        shared: bool,
    ) -> Result<S3Settings, ConfigError> {
        let header = table.span();
        let table = table.into_inner();
        if let Some(kind) = &table.authentication_type
            && !kind.get_ref().eq_ignore_ascii_case("access-key")
        {
            let why = format!(
                "{:?} is not supported; supported: \"access-key\", with AccessKeyFile and \
                 SecretKeyFile",
                kind.get_ref()
            );
            return Err(self.value(&kind.span(), "AuthenticationType", why));
        }
        let key = |name, inline: &Option<Spanned<Secret>>, file: &Option<Spanned<String>>| {
            self.key(&header, name, inline.as_ref(), file.as_ref())
        };
        let access_key =
            key(("AccessKey", "AccessKeyFile"), &table.access_key, &table.access_key_file)?;
        let secret_key =
            key(("SecretKey", "SecretKeyFile"), &table.secret_key, &table.secret_key_file)?;
        let session_token = key(
            ("SessionToken", "SessionTokenFile"),
            &table.session_token,
            &table.session_token_file,
        )?;
        let needed = |name, key: Option<SecretString>| {
            let why = "is missing, and no other way to prove who we are is supported \
                       (AuthenticationType = \"access-key\")";
            key.ok_or_else(|| self.value(&header, name, why))
        };
        let Some(bucket) = table.bucket_name.filter(|name| !name.get_ref().is_empty()) else {
            return Err(self.value(&header, "BucketName", "is missing"));
        };
        let region = table.bucket_location.filter(|region| !region.is_empty());
        let region = region.unwrap_or_else(|| REGION.to_owned());
        let endpoint = self.endpoint(
            &header,
            table.server_address.as_ref(),
            table.insecure.unwrap_or(false),
            table.dual_stack.unwrap_or(true),
            &region,
        )?;
        let bucket_name = bucket.get_ref().clone();
        let plain = |c: char| c.is_ascii_alphanumeric() || ".-_".contains(c);
        if !bucket_name.chars().all(plain) {
            let why = "holds something else than letters, digits, '.', '-' and '_'";
            return Err(self.value(&bucket.span(), "BucketName", why));
        }
        Ok(S3Settings {
            path_style: table.path_style.unwrap_or_else(|| needs_path(&endpoint, &bucket_name)),
            endpoint,
            bucket: bucket_name,
            region,
            access_key: needed("AccessKeyFile", access_key)?,
            secret_key: needed("SecretKeyFile", secret_key)?,
            session_token,
            prefix,
            shared,
            encryption: self.encryption(
                table.server_side_encryption.as_ref(),
                table.server_side_encryption_key_id,
            )?,
        })
    }

    fn endpoint(
        &self,
        header: &Range<usize>,
        address: Option<&Spanned<String>>,
        insecure: bool,
        dual_stack: bool,
        region: &str,
    ) -> Result<Url, ConfigError> {
        let span = address.map_or_else(|| header.clone(), Spanned::span);
        let written = address.map(|text| text.get_ref().as_str()).unwrap_or_default();
        let amazon = if dual_stack {
            format!("s3.dualstack.{region}.amazonaws.com")
        } else {
            format!("s3.{region}.amazonaws.com")
        };
        let host = if written.is_empty() || written == AMAZON { &amazon } else { written };
        if host.contains("://") {
            let why =
                "must be HOST or HOST:PORT without a scheme; `Insecure = true` stands for http";
            return Err(self.value(&span, "ServerAddress", why));
        }
        let scheme = if insecure { "http" } else { "https" };
        match Url::parse(&format!("{scheme}://{host}")) {
            Ok(url)
                if url.path() == "/"
                    && url.query().is_none()
                    && url.fragment().is_none()
                    && url.username().is_empty()
                    && url.password().is_none() =>
            {
                Ok(url)
            }
            Ok(_) | Err(_) => {
                let why = format!("must be HOST or HOST:PORT, not {written:?}");
                Err(self.value(&span, "ServerAddress", why))
            }
        }
    }

    /// Reads a key that stands in this file or in one of its own.
    fn key(
        &self,
        header: &Range<usize>,
        (name, file_name): (&'static str, &'static str),
        inline: Option<&Spanned<Secret>>,
        file: Option<&Spanned<String>>,
    ) -> Result<Option<SecretString>, ConfigError> {
        match (inline, file) {
            (None, None) => Ok(None),
            (Some(_), Some(_)) => {
                Err(self.value(header, name, format!("and `{file_name}` are both there")))
            }
            (Some(key), None) => {
                let (path, mode) = (&self.source.path, self.source.mode);
                if secret::readable_by_others(mode) {
                    let why = format!(
                        "stands in a file that others can read (mode {mode:04o}); run chmod 600 \
                         {path}, or write `{file_name}`"
                    );
                    return Err(self.value(&key.span(), name, why));
                }
                if !secret::is_token(key.get_ref().expose()) {
                    return Err(self.value(&key.span(), name, "must be one word"));
                }
                Ok(Some(SecretString::from(key.get_ref().expose())))
            }
            (None, Some(text)) => {
                let path = self.path(file_name, text)?;
                let key =
                    secret::read_token(&path).map_err(|error| self.at(text.span().start, error))?;
                Ok(Some(SecretString::from(key.expose())))
            }
        }
    }

    fn encryption(
        &self,
        kind: Option<&Spanned<String>>,
        key: Option<String>,
    ) -> Result<Option<Encryption>, ConfigError> {
        let Some(kind) = kind else { return Ok(None) };
        let key = key.filter(|key| !key.is_empty());
        match kind.get_ref().to_ascii_uppercase().as_str() {
            "" => Ok(None),
            "S3" | "AES256" => Ok(Some(Encryption::S3)),
            "KMS" | "AWS:KMS" => Ok(Some(Encryption::Kms { key, dual: false })),
            "DSSE-KMS" | "AWS:KMS:DSSE" => Ok(Some(Encryption::Kms { key, dual: true })),
            _ => {
                let why =
                    format!("must be \"S3\", \"KMS\" or \"DSSE-KMS\", not {:?}", kind.get_ref());
                Err(self.value(&kind.span(), "ServerSideEncryption", why))
            }
        }
    }

    fn size(
        &self,
        key: &'static str,
        text: Option<&Spanned<SizeText>>,
    ) -> Result<Option<u64>, ConfigError> {
        let Some(text) = text else { return Ok(None) };
        let bytes = match text.get_ref() {
            SizeText::Number(number) => u64::try_from(*number).ok(),
            SizeText::Words(words) => size_in_words(words),
        };
        match bytes {
            Some(bytes) if bytes > 0 => Ok(Some(bytes)),
            _ => {
                let why = "must be a number of bytes above 0, or a text as in \"50 GiB\"";
                Err(self.value(&text.span(), key, why))
            }
        }
    }
}

/// Says whether a bucket of this server cannot be part of the host's name: only Amazon's and Google's
/// servers are known to have such names, and a certificate covers no dots.
fn needs_path(endpoint: &Url, bucket: &str) -> bool {
    let host = endpoint.host_str().unwrap_or_default();
    let known = host.ends_with(".amazonaws.com") || host == "storage.googleapis.com";
    !known || (endpoint.scheme() == "https" && bucket.contains('.'))
}

/// Reads a size in words: a whole number and a unit of powers of 1000 or 1024.
fn size_in_words(text: &str) -> Option<u64> {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at_checked(end)?;
    let unit: u64 = match unit.trim().to_ascii_lowercase().as_str() {
        "b" | "" => 1,
        "kb" => 1000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        "kib" | "k" => 1 << 10,
        "mib" | "m" => 1 << 20,
        "gib" | "g" => 1 << 30,
        "tib" | "t" => 1 << 40,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(unit)
}

#[cfg(test)]
mod tests {
    use super::super::check_text;
    use super::*;
    use secrecy::ExposeSecret as _;

    const S3: &str = "Type = \"s3\"\n[runners.cache.s3]\nBucketName = \"b\"\n\
                      AccessKey = \"AKID\"\nSecretKey = \"hush\"\n";

    fn read_with(cache: &str, mode: u32) -> Result<CacheSettings, String> {
        let text = format!(
            "[backends.b]\nkind = \"local\"\n[[runners]]\nname = \"r\"\nurl = \"https://g.example.org\"\n\
             token_file = \"token\"\nbackend = \"b\"\n[runners.cache]\n{cache}"
        );
        let dir = tempfile::tempdir().unwrap();
        let path = camino::Utf8Path::from_path(dir.path()).unwrap().join("config.toml");
        for name in ["token", "key"] {
            let path = path.with_file_name(name);
            std::fs::write(&path, format!("the-{name}\n")).unwrap();
            let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
            std::fs::set_permissions(&path, mode).unwrap();
        }
        let config = check_text(&path, text, mode)
            .map_err(|error| error.problem().to_string().replace(path.as_str(), "FILE"))?;
        Ok(config.runners.into_iter().next().unwrap().cache)
    }

    fn read(cache: &str) -> Result<CacheSettings, String> {
        read_with(cache, 0o600)
    }

    #[test]
    fn a_local_cache_has_limits() {
        let settings = read("quota = \"50 GiB\"\nmax_age = \"30 days\"\nType = \"local\"").unwrap();
        assert_eq!(settings.quota, Some(50 << 30));
        assert_eq!(settings.max_age, Some(std::time::Duration::from_secs(30 * 86_400)));
        assert!(settings.s3.is_none());
        assert_eq!(read("quota = 1000").unwrap().quota, Some(1000));
        assert_eq!(read("").unwrap().quota, None);
    }

    #[test]
    fn a_bucket_is_described_by_the_official_keys() {
        let text = "Type = \"s3\"\nPath = \"ci\"\nShared = true\nMaxUploadedArchiveSize = 5\n\
                    [runners.cache.s3]\nServerAddress = \"s3.example.org:9000\"\nAccessKey = \"AKID\"\n\
                    SecretKeyFile = \"key\"\nSessionToken = \"st\"\nBucketName = \"b.c\"\n\
                    BucketLocation = \"eu\"\nInsecure = true\nAuthenticationType = \"access-key\"\n\
                    ServerSideEncryption = \"kms\"\nServerSideEncryptionKeyID = \"k\"\n";
        let settings = read(text).unwrap();
        assert_eq!(settings.max_uploaded, Some(5));
        let s3 = settings.s3.unwrap();
        assert_eq!(s3.endpoint.as_str(), "http://s3.example.org:9000/");
        assert_eq!(
            (s3.bucket.as_str(), s3.region.as_str(), s3.prefix.as_str()),
            ("b.c", "eu", "ci")
        );
        assert!(s3.shared && s3.path_style);
        assert_eq!(s3.secret_key.expose_secret(), "the-key");
        assert_eq!(s3.session_token.unwrap().expose_secret(), "st");
        assert_eq!(s3.encryption, Some(Encryption::Kms { key: Some("k".into()), dual: false }));

        let s3 = read(S3).unwrap().s3.unwrap();
        assert_eq!(s3.endpoint.as_str(), "https://s3.dualstack.us-east-1.amazonaws.com/");
        assert!(!s3.path_style && !s3.shared);
        let plain =
            format!("{S3}DualStack = false\nBucketLocation = \"eu-west-1\"\nPathStyle = true\n");
        let s3 = read(&plain).unwrap().s3.unwrap();
        assert_eq!(s3.endpoint.as_str(), "https://s3.eu-west-1.amazonaws.com/");
        assert!(s3.path_style);
    }

    #[test]
    fn what_cannot_be_used_is_named() {
        let in_s3 = |line: &str| format!("{S3}{line}\n");
        for (text, expected) in [
            (
                "Type = \"gcs\"".to_owned(),
                "`Type` \"gcs\" is not supported yet; supported: \"local\", \"s3\"",
            ),
            ("Type = \"azure\"".into(), "not supported yet"),
            ("Type = \"ftp\"".into(), "must be \"local\" or \"s3\", not \"ftp\""),
            ("Type = \"s3\"".into(), "needs [runners.cache.s3]"),
            (
                "[runners.cache.gcs]".into(),
                "unknown key `gcs` in [runners.cache] (not supported yet; supported: local, s3)",
            ),
            (
                "ServerAddress = \"x\"".into(),
                "unknown key `ServerAddress` in [runners.cache]; it belongs in [runners.cache.s3]",
            ),
            ("S3CachePath = \"x\"".into(), "(its name is `Path` now)"),
            ("CacheShared = true".into(), "(its name is `Shared` now)"),
            ("type = \"s3\"".into(), "did you mean `Type`?"),
            ("quotas = 1".into(), "did you mean `quota`?"),
            ("quota = \"lots\"".into(), "`quota` must be a number of bytes above 0"),
            ("quota = 0".into(), "`quota` must be"),
            (
                in_s3("BucketNam = \"x\""),
                "unknown key `BucketNam` in [runners.cache.s3]; did you mean `BucketName`?",
            ),
            (
                in_s3("Shared = true"),
                "unknown key `Shared` in [runners.cache.s3]; it belongs in [runners.cache]",
            ),
            (in_s3("RoleARN = \"x\""), "roles are not supported"),
            (
                in_s3("AuthenticationType = \"iam\""),
                "`AuthenticationType` \"iam\" is not supported; supported: \"access-key\"",
            ),
            (in_s3("SecretKeyFile = \"key\""), "`SecretKey` and `SecretKeyFile` are both there"),
            (in_s3("ServerAddress = \"https://x\""), "without a scheme"),
            (in_s3("ServerAddress = \"x/y\""), "must be HOST or HOST:PORT"),
            (in_s3("ServerSideEncryption = \"rot13\""), "must be \"S3\", \"KMS\" or \"DSSE-KMS\""),
            (S3.replace("SecretKey = \"hush\"\n", ""), "`SecretKeyFile` is missing"),
            (S3.replace("BucketName = \"b\"\n", ""), "`BucketName` is missing"),
            (S3.replace("Type = \"s3\"\n", ""), "must be \"s3\" for [runners.cache.s3] to count"),
        ] {
            let error = read(&text).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
            assert!(!error.contains("hush"), "{error}");
        }
        let error = read_with(S3, 0o644).unwrap_err();
        assert!(
            error.contains("(mode 0644); run chmod 600 FILE, or write `AccessKeyFile`"),
            "{error}"
        );
    }

    #[test]
    fn sizes_are_read_in_words() {
        for (text, bytes) in [
            ("50 GiB", Some(50 << 30)),
            ("50GiB", Some(50 << 30)),
            ("2 TB", Some(2_000_000_000_000)),
            ("10k", Some(10 << 10)),
            ("7", Some(7)),
            ("1.5 GiB", None),
            ("GiB", None),
            ("-1", None),
            ("99999999999 TiB", None),
            ("5 parsec", None),
        ] {
            assert_eq!(size_in_words(text), bytes, "{text}");
        }
    }
}
