//! The list of variables: its order, its expansion, and what of it can be handed to a process.
//!
//! GitLab sends a list, not a map: the same name may occur several times and the last one wins. The
//! runner puts its own entries before and after the job's (gitlab-runner, `common/build.go`) and then
//! expands references once (`common/spec/variables.go`).

use std::collections::{BTreeMap, HashMap};

use bridge_backend::EnvVar;
use camino::{Utf8Path, Utf8PathBuf};
use secrecy::SecretString;

use super::{RunnerContext, Slot, Unrunnable};
use crate::gitlab::wire::{JobPayload, Secret};

/// The name that leads to the temporary directory, and by it to file variables.
const TEMP_DIR: &str = "RUNNER_TEMP_PROJECT_DIR";

/// The name that leads to the certificates to trust.
pub(super) const CA_FILE: &str = "CI_SERVER_TLS_CA_FILE";

/// What a variable's name is preceded by on its way into the job.
///
/// The script takes the prefix off after the login shell has read its profile. So a job's `PATH`
/// outlives `/etc/profile` as it does in gitlab-runner, and neither the wrapper nor the batch system's
/// commands ever run with a job's `PATH`, `LD_PRELOAD`, `BASH_ENV` or `SBATCH_PARTITION`.
pub(super) const CARRIER: &str = "BRIDGE_VAR_";

/// The longest `NAME=value` with its NUL that Linux passes to a process (`MAX_ARG_STRLEN`).
const LONGEST_STRING: usize = 128 * 1024;

/// The most of all strings together that is certain to pass: the kernel allows a quarter of the stack
/// limit, 2 MiB as a rule, and the batch system's environment and the arguments need room too.
const LARGEST_ENVIRONMENT: usize = 1536 * 1024;

/// What the kernel needs for each string besides its bytes.
const POINTER: usize = 8;

/// Names that a shell keeps for itself: assigning to them is an error.
const READ_ONLY: [&str; 6] = ["BASHOPTS", "BASH_VERSINFO", "EUID", "PPID", "SHELLOPTS", "UID"];

/// One entry of the list.
#[derive(Clone)]
pub(super) struct Entry {
    pub(super) key: String,
    pub(super) value: String,
    pub(super) file: bool,
    pub(super) raw: bool,
    pub(super) masked: bool,
}

impl Entry {
    fn new(key: impl Into<String>, value: impl Into<String>) -> Self {
        Self { key: key.into(), value: value.into(), file: false, raw: false, masked: false }
    }

    /// Makes an ordinary entry.
    #[cfg(test)]
    pub(super) fn plain(key: &str, value: &str) -> Self {
        Self::new(key, value)
    }

    fn raw(key: impl Into<String>, value: impl Into<String>) -> Self {
        Self { raw: true, ..Self::new(key, value) }
    }
}

/// A list of variables with quick look-up of the last entry of a name.
pub(super) struct Variables {
    entries: Vec<Entry>,
    last: HashMap<String, usize>,
}

/// What a job's process and its temporary directory get.
pub(super) struct Environment {
    /// Names and values, each name once.
    pub(super) vars: Vec<EnvVar>,
    /// File variables: name and content.
    pub(super) files: Vec<(String, Secret)>,
    /// What was left out, and why.
    pub(super) warnings: Vec<String>,
}

/// Where a job's directories are.
#[derive(Clone, Copy)]
pub(super) struct Directories<'a> {
    pub(super) project: &'a Utf8Path,
    pub(super) temp: &'a Utf8Path,
}

impl Variables {
    pub(super) fn new(entries: Vec<Entry>) -> Self {
        let last = entries.iter().enumerate().map(|(at, e)| (e.key.clone(), at)).collect();
        Self { entries, last }
    }

    /// Builds the whole list, unexpanded, in the official order.
    pub(super) fn of_job(
        payload: &JobPayload,
        runner: &RunnerContext,
        slot: Slot,
        dirs: Directories<'_>,
        flags: &BTreeMap<&'static str, bool>,
    ) -> Self {
        let mut list: Vec<Entry> =
            flags.iter().map(|(name, on)| Entry::new(*name, on.to_string())).collect();
        if let Some(image) = payload.image.as_ref().filter(|image| !image.name.is_empty()) {
            list.push(Entry::new("CI_JOB_IMAGE", &image.name));
        }
        // Of the places that a job knows, only those in and beside its workspace travel with it.
        let builds_dir = if runner.backend.sandbox {
            dirs.project.join("..")
        } else {
            runner.builds_dir.clone()
        };
        list.push(Entry::new("CI_RUNNER_SHORT_TOKEN", &runner.short_token));
        list.extend(runner.environment.iter().map(|(key, value)| Entry::new(key, value)));
        list.extend([
            Entry::raw("CI_BUILDS_DIR", builds_dir.as_str()),
            Entry::raw("CI_PROJECT_DIR", dirs.project.as_str()),
            Entry::new("CI_CONCURRENT_ID", slot.concurrent.to_string()),
            Entry::new("CI_CONCURRENT_PROJECT_ID", slot.project.to_string()),
            Entry::new("CI_SERVER", "yes"),
            Entry::new("CI_JOB_STATUS", "running"),
            Entry::new("CI_JOB_TIMEOUT", payload.timeout_secs().to_string()),
        ]);
        // The official runner copies these files; their paths do the same for a job that runs as the
        // account that may read them. Elsewhere the certificates to trust travel along, and our own key
        // stays here.
        if runner.backend.sandbox {
            let copy = runner.tls_ca_file.as_ref().map(|_| dirs.temp.join(CA_FILE));
            list.extend(copy.map(|path| Entry::raw(CA_FILE, path.as_str())));
        } else {
            let tls = [
                (CA_FILE, &runner.tls_ca_file),
                ("CI_SERVER_TLS_CERT_FILE", &runner.tls_cert_file),
                ("CI_SERVER_TLS_KEY_FILE", &runner.tls_key_file),
            ];
            let there = |(key, path): (_, &Option<Utf8PathBuf>)| {
                path.as_ref().map(|path| Entry::raw(key, path.as_str()))
            };
            list.extend(tls.into_iter().filter_map(there));
        }
        list.extend(payload.variables.iter().filter(|v| !flags.contains_key(v.key.as_str())).map(
            |v| Entry {
                key: v.key.clone(),
                value: v.value.expose().to_owned(),
                file: v.file,
                raw: v.raw,
                masked: v.masked,
            },
        ));
        list.extend([
            Entry::new("CI_SHARED_ENVIRONMENT", "true"),
            Entry::new("CI_RUNNER_VERSION", &runner.version),
            Entry::new("CI_RUNNER_REVISION", &runner.version),
            Entry::new("CI_RUNNER_EXECUTABLE_ARCH", platform()),
            Entry::raw(TEMP_DIR, dirs.temp.as_str()),
        ]);
        Self::new(list)
    }

    fn last(&self, key: &str) -> Option<&Entry> {
        self.last.get(key).and_then(|at| self.entries.get(*at))
    }

    /// Gives the value, or the content of a file variable; empty when there is none.
    pub(super) fn content(&self, key: &str) -> &str {
        self.last(key).map_or("", |entry| entry.value.as_str())
    }

    /// Gives what a reference to `key` is replaced with.
    fn reference(&self, key: &str) -> String {
        match key {
            "$" => "$".to_owned(),
            "*" | "#" | "@" | "!" | "?" | "0" | "1" | "2" | "3" | "4" | "5" | "6" | "7" | "8"
            | "9" => String::new(),
            _ => match self.last(key) {
                Some(entry) if entry.file => file_path(self.content(TEMP_DIR), key),
                Some(entry) => entry.value.clone(),
                None => String::new(),
            },
        }
    }

    /// Replaces the references in a text, once; what was put in is not looked at again.
    pub(super) fn expand(&self, text: &str) -> String {
        let mut result = String::with_capacity(text.len());
        let mut rest = text;
        while let Some((before, after)) = rest.split_once('$') {
            result.push_str(before);
            if after.is_empty() {
                result.push('$');
                return result;
            }
            let (name, taken) = reference_at(after);
            match name {
                Some(name) => result.push_str(&self.reference(name)),
                None if taken == 0 => result.push('$'),
                // `${}` and an unclosed `${` vanish.
                None => {}
            }
            rest = after.get(taken..).unwrap_or_default();
        }
        result.push_str(rest);
        result
    }

    /// Gives the list that the job sees: every value but the raw ones expanded against this one.
    pub(super) fn expanded(&self) -> Self {
        let entries = self
            .entries
            .iter()
            .map(|entry| {
                let value = if entry.raw { entry.value.clone() } else { self.expand(&entry.value) };
                Entry { value, ..entry.clone() }
            })
            .collect();
        Self { entries, last: self.last.clone() }
    }

    /// Gives the values of all masked variables, also of those that a later one hides.
    pub(super) fn masked(&self) -> impl Iterator<Item = &str> {
        self.entries.iter().filter(|entry| entry.masked).map(|entry| entry.value.as_str())
    }

    /// Gives the last entries of all names, in order.
    fn winners(&self) -> impl Iterator<Item = &Entry> {
        self.entries
            .iter()
            .enumerate()
            .filter(|(at, entry)| self.last.get(&entry.key) == Some(at))
            .map(|(_, entry)| entry)
    }

    /// Gives those whose name starts with `prefix`, without it.
    pub(super) fn with_prefix<'a>(
        &'a self,
        prefix: &'a str,
    ) -> impl Iterator<Item = (&'a str, &'a str)> {
        self.winners()
            .filter_map(move |e| e.key.strip_prefix(prefix).map(|key| (key, e.value.as_str())))
    }

    /// Sorts the list into what a process can be given and what goes into files.
    ///
    /// # Errors
    ///
    /// When no process could be started with it.
    pub(super) fn environment(&self, temp_dir: &Utf8Path) -> Result<Environment, Unrunnable> {
        let mut result = Environment { vars: Vec::new(), files: Vec::new(), warnings: Vec::new() };
        let mut total = 0;
        for entry in self.winners() {
            let name = &entry.key;
            if !is_identifier(name) {
                result.warnings.push(format!(
                    "variable {name:?} was left out: its name is none a shell knows"
                ));
                continue;
            }
            if READ_ONLY.contains(&name.as_str()) {
                result
                    .warnings
                    .push(format!("variable {name} was left out: the shell keeps this name"));
                continue;
            }
            let value = if entry.file {
                result.files.push((name.clone(), Secret::new(entry.value.as_str())));
                file_path(temp_dir.as_str(), name)
            } else if entry.value.contains('\0') {
                result
                    .warnings
                    .push(format!("variable {name} was left out: its value contains a NUL byte"));
                continue;
            } else {
                entry.value.clone()
            };
            // The prefix, the equals sign and the NUL count too.
            let bytes = CARRIER.len() + name.len() + 1 + value.len() + 1;
            if bytes > LONGEST_STRING {
                return Err(Unrunnable::VariableTooLarge {
                    name: name.clone(),
                    bytes: value.len(),
                    limit: LONGEST_STRING,
                });
            }
            total += bytes + POINTER;
            result.vars.push(EnvVar { name: name.clone(), value: SecretString::from(value) });
        }
        if total > LARGEST_ENVIRONMENT {
            return Err(Unrunnable::VariablesTooLarge { bytes: total, limit: LARGEST_ENVIRONMENT });
        }
        Ok(result)
    }
}

/// Gives the path of a file variable.
fn file_path(temp_dir: &str, key: &str) -> String {
    format!("{temp_dir}/{key}")
}

/// Reads the reference that follows a `$`: its name, and how many bytes it takes.
///
/// No name and no bytes: the dollar stands for itself. No name but bytes: they are dropped.
fn reference_at(text: &str) -> (Option<&str>, usize) {
    let bytes = text.as_bytes();
    match bytes.first() {
        Some(b'{') => match text.find('}') {
            Some(1) => (None, 2),
            Some(end) => (text.get(1..end), end + 1),
            None => (None, 1),
        },
        Some(b'*' | b'#' | b'$' | b'@' | b'!' | b'?' | b'-' | b'0'..=b'9') => (text.get(..1), 1),
        _ => {
            let len = bytes.iter().take_while(|b| b.is_ascii_alphanumeric() || **b == b'_').count();
            if len == 0 { (None, 0) } else { (text.get(..len), len) }
        }
    }
}

/// Says whether a shell can have a variable of this name.
pub(super) fn is_identifier(name: &str) -> bool {
    let mut bytes = name.bytes();
    bytes.next().is_some_and(|b| b.is_ascii_alphabetic() || b == b'_')
        && bytes.all(|b| b.is_ascii_alphanumeric() || b == b'_')
}

/// Names this platform as Go does.
pub(super) fn platform() -> String {
    let arch = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "powerpc64" => "ppc64le",
        other => other,
    };
    format!("{}/{arch}", std::env::consts::OS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use secrecy::ExposeSecret as _;

    fn list(entries: &[(&str, &str)]) -> Variables {
        Variables::new(entries.iter().map(|(k, v)| Entry::new(*k, *v)).collect())
    }

    #[test]
    fn references_are_replaced_as_the_official_runner_does() {
        let mut variables = vec![
            Entry::new(TEMP_DIR, "/b/p.tmp"),
            Entry::new("A", "one"),
            Entry::new("A", "two"),
            Entry::new("REF", "$A"),
            Entry::new("EMPTY", ""),
            Entry::new("a_1", "low"),
        ];
        variables.push(Entry { file: true, ..Entry::new("F", "content") });
        let variables = Variables::new(variables);
        for (text, expected) in [
            ("", ""),
            ("plain", "plain"),
            ("$A", "two"),
            ("${A}", "two"),
            ("x$A-y${A}z", "xtwo-ytwoz"),
            ("$A_", ""),
            ("$a_1", "low"),
            ("$REF", "$A"),
            ("$NONE|", "|"),
            ("${NONE}|", "|"),
            ("$F", "/b/p.tmp/F"),
            ("$$", "$"),
            ("$$A", "$A"),
            ("$$$A", "$two"),
            ("${$}", "$"),
            ("$1abc", "abc"),
            ("$0$9$*$#$@$!$?$-|", "|"),
            ("${1}|", "|"),
            ("${12}|", "|"),
            ("a$", "a$"),
            ("$", "$"),
            ("$ x", "$ x"),
            ("$.A", "$.A"),
            ("$é", "$é"),
            ("${}x", "x"),
            ("${A", "A"),
            ("${", ""),
            ("${A:-b}|", "|"),
            ("%A%", "%A%"),
            ("a\nb$A\n", "a\nbtwo\n"),
        ] {
            assert_eq!(variables.expand(text), expected, "{text:?}");
        }
    }

    #[test]
    fn raw_values_stay_and_others_are_expanded_once() {
        let mut entries = vec![
            Entry::new("A", "$B"),
            Entry::new("B", "$C"),
            Entry::new("C", "end"),
            Entry::raw("R", "$C"),
        ];
        entries.push(Entry::new("D", "$R"));
        let expanded = Variables::new(entries).expanded();
        assert_eq!(expanded.content("A"), "$C");
        assert_eq!(expanded.content("B"), "end");
        assert_eq!(expanded.content("R"), "$C");
        assert_eq!(expanded.content("D"), "$C");
    }

    #[test]
    fn the_last_of_a_name_wins_and_odd_ones_are_left_out() {
        let mut entries = vec![
            Entry::new("A", "1"),
            Entry::new("B-C", "x"),
            Entry::new("9", "x"),
            Entry::new("", "x"),
            Entry::new("UID", "0"),
            Entry::new("N", "a\0b"),
            Entry::new("A", "2"),
        ];
        entries.push(Entry { file: true, ..Entry::new("F", "a\0b\n") });
        let environment = Variables::new(entries).environment(Utf8Path::new("/t")).unwrap();
        let got: Vec<_> =
            environment.vars.iter().map(|v| (v.name.as_str(), v.value.expose_secret())).collect();
        assert_eq!(got, [("A", "2"), ("F", "/t/F")]);
        assert_eq!(environment.files.len(), 1);
        assert_eq!(environment.files[0].1.expose(), "a\0b\n");
        assert_eq!(environment.warnings.len(), 5, "{:?}", environment.warnings);
        assert!(environment.warnings[0].contains("B-C"));
    }

    #[test]
    fn what_no_process_could_be_started_with_is_refused_by_name() {
        let long = "x".repeat(LONGEST_STRING);
        let error = list(&[("SMALL", "x"), ("BIG", &long)])
            .environment(Utf8Path::new("/t"))
            .err()
            .unwrap()
            .to_string();
        assert!(error.contains("BIG") && error.contains("file"), "{error}");
        assert!(!error.contains("xxx"), "no value in an error: {error}");

        let part = "x".repeat(100_000);
        let names: Vec<String> = (0..50).map(|n| format!("V{n}")).collect();
        let many: Vec<_> = names.iter().map(|n| (n.as_str(), part.as_str())).collect();
        let error = list(&many).environment(Utf8Path::new("/t")).err().unwrap().to_string();
        assert!(error.contains("5001"), "{error}");

        let mut file = Entry::new("BIG", long);
        file.file = true;
        assert!(Variables::new(vec![file]).environment(Utf8Path::new("/t")).is_ok());
    }

    #[test]
    fn what_is_said_to_fit_does_fit() {
        let largest = "x".repeat(LONGEST_STRING - CARRIER.len() - 1 - 2);
        let variables = list(&[("A", &largest)]);
        let environment = variables.environment(Utf8Path::new("/t")).unwrap();
        let mut command = std::process::Command::new("/bin/sh");
        command.args(["-c", "exit 7"]);
        for var in &environment.vars {
            command.env(format!("{CARRIER}{}", var.name), var.value.expose_secret());
        }
        assert_eq!(command.status().unwrap().code(), Some(7));
    }

    #[test]
    fn where_nothing_is_shared_only_what_travels_is_named() {
        use super::super::tests::{payload, runner};
        use super::super::{OnBackend, plan};
        use bridge_backend::Limits;
        let mut runner = RunnerContext {
            tls_ca_file: Some("/etc/ca.pem".into()),
            tls_key_file: Some("/etc/key.pem".into()),
            ..runner()
        };
        let value = |runner: &RunnerContext, name: &str| {
            let plan = plan(&payload(&[]), runner, Slot::default()).unwrap();
            let name = format!("{CARRIER}{name}");
            let spec = plan.spec(Limits::default());
            let found = spec.env.iter().find(|var| var.name == name);
            let value = found.map(|var| var.value.expose_secret().to_owned());
            value.map(|value| value.replace(plan.project_dir.as_str(), "P"))
        };
        let of = |runner: &RunnerContext| {
            ["CI_BUILDS_DIR", CA_FILE, "CI_SERVER_TLS_KEY_FILE"].map(|name| value(runner, name))
        };
        let some = |text: &str| Some(text.to_owned());
        let shared = [some("/builds"), some("/etc/ca.pem"), some("/etc/key.pem")];
        assert_eq!(of(&runner), shared);
        runner.backend = OnBackend { sandbox: true, ..OnBackend::default() };
        let travels = [some("P/.."), some("P.tmp/CI_SERVER_TLS_CA_FILE"), None];
        assert_eq!(of(&runner), travels);
    }
}
