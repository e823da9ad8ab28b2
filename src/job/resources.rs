//! Words for the batch system among a job's variables.
//!
//! `BRIDGE_PARTITION` and its like become the backend's own per-job options. What they mean is
//! the backend's matter: it rejects what it does not know. Whether jobs may choose it, the operator says.

use super::variables::Variables;
use super::{OnBackend, Unrunnable};

/// What the names of such variables start with.
const PREFIX: &str = "BRIDGE_";

/// The words that are passed on; others with the prefix are ordinary variables.
const WORDS: [&str; 18] = [
    "ACCOUNT",
    "BANNED_SITES",
    "CONSTRAINT",
    "CPUS_PER_TASK",
    "CPU_TIME",
    "GRES",
    "MEM",
    "NODES",
    "NTASKS",
    "PARTITION",
    "PLATFORM",
    "PRIORITY",
    "PROCESSORS",
    "QOS",
    "RESERVATION",
    "SITE",
    "TAGS",
    "TIME",
];

/// Collects the options: key in lower case, value always a text, empty ones left out.
///
/// # Errors
///
/// When the job chooses what the operator does not let jobs choose.
pub(super) fn options(
    variables: &Variables,
    backend: &OnBackend,
) -> Result<toml::Table, Unrunnable> {
    // The backend's own names first, so that ours outrank them.
    let own = backend.variables.iter().map(|(name, option)| {
        ((*name).to_owned(), (*option).to_owned(), variables.content(name).trim())
    });
    let ours = variables
        .with_prefix(PREFIX)
        .filter(|(word, _)| WORDS.contains(word))
        .map(|(word, value)| (format!("{PREFIX}{word}"), word.to_ascii_lowercase(), value.trim()));
    let mut options = toml::Table::new();
    for (variable, option, value) in own.chain(ours) {
        if value.is_empty() {
            continue;
        }
        if let Some(allowed) = &backend.job_options
            && !allowed.contains(&option)
        {
            let allowed =
                if allowed.is_empty() { "nothing".to_owned() } else { allowed.join(", ") };
            return Err(Unrunnable::OptionForbidden { variable, allowed });
        }
        options.insert(option, toml::Value::String(value.to_owned()));
    }
    Ok(options)
}

#[cfg(test)]
mod tests {
    use super::super::tests::{payload, runner};
    use super::super::{RunnerContext, Slot, plan};
    use super::*;

    fn options_of(variables: &[(&str, &str)], backend: OnBackend) -> Result<String, Unrunnable> {
        let runner = RunnerContext { backend, ..runner() };
        let plan = plan(&payload(variables), &runner, Slot::default())?;
        Ok(plan.spec(bridge_backend::Limits::default()).options.to_string())
    }

    #[test]
    fn only_the_known_words_become_options() {
        let variables = [
            ("BRIDGE_PARTITION", "gpu"),
            ("BRIDGE_CPUS_PER_TASK", " 4 "),
            ("BRIDGE_MEM", ""),
            ("BRIDGE_COLOUR", "red"),
            ("PARTITION", "x"),
            ("DIRAC_SITE", "not on this backend"),
        ];
        let options = options_of(&variables, OnBackend::default()).unwrap();
        assert_eq!(options, "cpus_per_task = \"4\"\npartition = \"gpu\"\n");
    }

    #[test]
    fn a_backends_own_names_count_and_ours_outrank_them() {
        let backend = OnBackend {
            variables: &[("DIRAC_SITE", "site"), ("DIRAC_CPUTIME", "cpu_time")],
            ..OnBackend::default()
        };
        let variables =
            [("BRIDGE_SITE", "ours"), ("DIRAC_SITE", "theirs"), ("DIRAC_CPUTIME", "600")];
        let options = options_of(&variables, backend).unwrap();
        assert_eq!(options, "cpu_time = \"600\"\nsite = \"ours\"\n");
    }

    #[test]
    fn what_the_operator_keeps_for_himself_is_refused_by_name() {
        let of = |job_options: &[&str]| OnBackend {
            job_options: Some(job_options.iter().map(ToString::to_string).collect()),
            ..OnBackend::default()
        };
        let variables = [("BRIDGE_TIME", "10"), ("BRIDGE_PARTITION", "gpu")];
        assert!(options_of(&variables, of(&["time", "partition"])).is_ok());
        let error = options_of(&variables, of(&["time", "mem"])).unwrap_err();
        insta::assert_snapshot!(
            error,
            @"BRIDGE_PARTITION is not for jobs to choose on this runner, whose operator allows time, mem; remove it or choose another runner by its tags"
        );
        assert!(options_of(&[("BRIDGE_TIME", "")], of(&[])).is_ok());
    }
}
