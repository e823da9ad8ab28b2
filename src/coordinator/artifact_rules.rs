//! What GitLab takes as an artifact: types and their formats, reports it reads itself, times.

use std::io::Read as _;
use std::time::Duration;

use flate2::read::MultiGzDecoder;

/// Which formats the server knows, and which types go with each (`enums/ci/job_artifact.rb`).
const FORMATS: [(&str, &[&str]); 3] = [
    ("zip", &["archive", "lsif"]),
    (
        "gzip",
        &[
            "junit",
            "metrics",
            "metrics_referee",
            "network_referee",
            "dotenv",
            "cobertura",
            "jacoco",
            "cluster_applications",
            "cyclonedx",
            "annotations",
            "repository_xray",
        ],
    ),
    (
        "raw",
        &[
            "sast",
            "secret_detection",
            "dependency_scanning",
            "container_scanning",
            "cluster_image_scanning",
            "dast",
            "license_scanning",
            "accessibility",
            "codequality",
            "performance",
            "browser_performance",
            "load_performance",
            "terraform",
            "requirements",
            "requirements_v2",
            "coverage_fuzzing",
            "api_fuzzing",
        ],
    ),
];

const MAX_ANNOTATIONS_SIZE: u64 = 80 * 1024;
const MAX_ANNOTATIONS: usize = 20;
/// More than any report may have.
const MAX_UNPACKED: u64 = 16 * 1024 * 1024;

/// Checks words and pair; gives what the server would say against them.
pub(super) fn check_pair(kind: &str, format: &str) -> Result<(), Fault> {
    let expected = FORMATS.iter().find(|(_, kinds)| kinds.contains(&kind)).map(|(name, _)| *name);
    let Some(expected) = expected else {
        return Err(Fault::Parameter("artifact_type does not have a valid value"));
    };
    if !FORMATS.iter().any(|(name, _)| *name == format) {
        return Err(Fault::Parameter("artifact_format does not have a valid value"));
    }
    if expected != format {
        let text = "Validation failed: File format Invalid file format with specified file type";
        return Err(Fault::Words(text.to_owned()));
    }
    Ok(())
}

/// Why an artifact is refused.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// A parameter of the call is none.
    Parameter(&'static str),
    /// What it says makes no sense.
    Words(String),
}

fn words(text: impl Into<String>) -> Fault {
    Fault::Words(text.into())
}

fn unpacked(packed: &[u8]) -> Result<String, Fault> {
    let mut bytes = Vec::new();
    MultiGzDecoder::new(packed)
        .take(MAX_UNPACKED)
        .read_to_end(&mut bytes)
        .map_err(|_broken| words("not in gzip format"))?;
    let text = String::from_utf8_lossy(&bytes).into_owned();
    Ok(text.strip_prefix('\u{feff}').map_or(text.clone(), str::to_owned))
}

/// Reads a dotenv report as `Ci::ParseDotenvArtifactService` does: every line is `KEY=value`; there
/// are no comments, no quotes, and no empty lines.
pub(super) fn dotenv(
    packed: &[u8],
    max_size: u64,
    max_variables: usize,
) -> Result<Vec<(String, String)>, Fault> {
    if u64::try_from(packed.len()).unwrap_or(u64::MAX) >= max_size {
        return Err(words(format!("Dotenv Artifact Too Big. Maximum Allowable Size: {max_size}")));
    }
    let mut variables: Vec<(String, String)> = Vec::new();
    for line in unpacked(packed)?.split_inclusive('\n') {
        let line = line.trim_end_matches('\n');
        let (key, value) = line.split_once('=').ok_or_else(|| words("Invalid Format"))?;
        let (key, value) = (key.trim(), value.trim());
        let fits = |c: char| c.is_ascii_alphanumeric() || c == '_';
        if key.is_empty() || !key.chars().all(fits) {
            let text = "Validation failed: Key can contain only letters, digits and '_'.";
            return Err(words(text));
        }
        match variables.iter_mut().find(|(known, _)| known == key) {
            Some((_, known)) => value.clone_into(known),
            None => variables.push((key.to_owned(), value.to_owned())),
        }
    }
    if variables.len() > max_variables {
        return Err(words(format!("Dotenv files cannot have more than {max_variables} variables")));
    }
    Ok(variables)
}

/// Checks annotations as `Ci::ParseAnnotationsArtifactService` does.
pub(super) fn annotations(packed: &[u8]) -> Result<(), Fault> {
    if u64::try_from(packed.len()).unwrap_or(u64::MAX) > MAX_ANNOTATIONS_SIZE {
        return Err(words(format!(
            "Annotations Artifact Too Big. Maximum Allowable Size: {MAX_ANNOTATIONS_SIZE}"
        )));
    }
    let text = unpacked(packed)?;
    let value: serde_json::Value =
        serde_json::from_str(&text).map_err(|error| words(format!("unexpected token: {error}")))?;
    let Some(map) = value.as_object() else {
        return Err(words("Annotations files must be a JSON object"));
    };
    if map.len() > MAX_ANNOTATIONS {
        return Err(words(format!(
            "Annotations files cannot have more than {MAX_ANNOTATIONS} annotation lists"
        )));
    }
    Ok(())
}

/// Reads `expire_in`: `1 week`, `3 mins 4 sec`, `2h20min`, `42` (seconds), `never`.
pub(super) fn expire_in(text: &str) -> Result<Option<Duration>, Fault> {
    if text.trim() == "never" {
        return Ok(None);
    }
    let mut seconds = 0_f64;
    let mut rest = text.trim();
    while !rest.is_empty() {
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
        let (number, tail) = rest.split_at_checked(end).unwrap_or((rest, ""));
        let tail = tail.trim_start();
        let end = tail.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(tail.len());
        let (unit, tail) = tail.split_at_checked(end).unwrap_or((tail, ""));
        let odd =
            || words(format!("An invalid word {unit:?} was used in the string to be parsed."));
        let number: f64 = number.parse().map_err(|_odd| odd())?;
        seconds += number * unit_seconds(unit).ok_or_else(odd)?;
        let tail = tail.trim_start_matches([' ', ',']);
        rest = tail.strip_prefix("and ").unwrap_or(tail).trim_start();
    }
    Duration::try_from_secs_f64(seconds).map(Some).map_err(|_huge| words("out of range"))
}

fn unit_seconds(unit: &str) -> Option<f64> {
    Some(match unit {
        "" | "s" | "sec" | "secs" | "second" | "seconds" => 1.0,
        "m" | "min" | "mins" | "minute" | "minutes" => 60.0,
        "h" | "hr" | "hrs" | "hour" | "hours" => 3600.0,
        "d" | "day" | "days" => 86_400.0,
        "w" | "wk" | "wks" | "week" | "weeks" => 604_800.0,
        "mo" | "mos" | "month" | "months" => 2_592_000.0,
        "y" | "yr" | "yrs" | "year" | "years" => 31_557_600.0,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn gzip(members: &[&str]) -> Vec<u8> {
        let mut all = Vec::new();
        for text in members {
            let mut one = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            one.write_all(text.as_bytes()).unwrap();
            all.extend(one.finish().unwrap());
        }
        all
    }

    #[test]
    fn every_type_has_one_format() {
        for (format, kinds) in FORMATS {
            for kind in kinds {
                assert_eq!(check_pair(kind, format), Ok(()), "{kind}");
            }
        }
        assert!(matches!(check_pair("junit", "zip"), Err(Fault::Words(_))));
        assert!(matches!(check_pair("junit", "zipzstd"), Err(Fault::Parameter(_))));
        assert!(matches!(check_pair("trace", "raw"), Err(Fault::Parameter(_))));
    }

    #[test]
    fn dotenv_files_are_read_as_the_server_does() {
        let read = |text: &str| dotenv(&gzip(&[text]), 5120, 3);
        let pair = |k: &str, v: &str| (k.to_owned(), v.to_owned());
        assert_eq!(read("A=1\nB = x=y \n"), Ok(vec![pair("A", "1"), pair("B", "x=y")]));
        assert_eq!(read("A=1\nA=\"2\""), Ok(vec![pair("A", "\"2\"")]));
        assert_eq!(read(""), Ok(vec![]));
        assert_eq!(read("\u{feff}A=1"), Ok(vec![pair("A", "1")]));
        for bad in ["A=1\n\nB=2\n", "# comment\n", "export A\n"] {
            assert_eq!(read(bad), Err(words("Invalid Format")), "{bad:?}");
        }
        for bad in ["A B=1\n", "A-B=1\n", "=1\n", "export A=1\n"] {
            assert!(matches!(read(bad), Err(Fault::Words(text)) if text.contains("letters")));
        }
        assert!(read("A=1\nB=1\nC=1\nD=1\n").is_err());
        assert!(dotenv(&gzip(&["A=1"]), 10, 3).is_err());
        assert!(dotenv(b"A=1", 5120, 3).is_err());
        let two = dotenv(&gzip(&["A=1\n", "B=2\n"]), 5120, 3);
        assert_eq!(two.unwrap().len(), 2);
    }

    #[test]
    fn annotations_are_an_object() {
        assert_eq!(annotations(&gzip(&[r#"{"a":[]}"#])), Ok(()));
        assert!(annotations(&gzip(&["[]"])).is_err());
        assert!(annotations(&gzip(&["{"])).is_err());
    }

    #[test]
    fn times_of_expiry_are_read() {
        let secs = |n: u64| Ok(Some(Duration::from_secs(n)));
        for (text, expected) in [
            ("42", secs(42)),
            ("1 week", secs(604_800)),
            ("3 mins 4 sec", secs(184)),
            ("2h20min", secs(8400)),
            ("6 mos 1 day", secs(15_638_400)),
            ("47 yrs 6 mos and 4d", secs(1_499_104_800)),
            ("never", Ok(None)),
        ] {
            assert_eq!(expire_in(text), expected, "{text}");
        }
        assert!(expire_in("next tuesday").is_err());
        assert!(expire_in("3 fortnights").is_err());
    }
}
