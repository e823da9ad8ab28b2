//! Words for the batch system among a job's variables.
//!
//! `BRIDGE_PARTITION` and its like become the backend's own per-job options. What they mean, and
//! whether they are allowed, is the backend's matter: it rejects what it does not know.

use super::variables::Variables;

/// What the names of such variables start with.
const PREFIX: &str = "BRIDGE_";

/// The words that are passed on; others with the prefix are ordinary variables.
const WORDS: [&str; 11] = [
    "ACCOUNT",
    "CONSTRAINT",
    "CPUS_PER_TASK",
    "GRES",
    "MEM",
    "NODES",
    "NTASKS",
    "PARTITION",
    "QOS",
    "RESERVATION",
    "TIME",
];

/// Collects the options: key in lower case, value always a text, empty ones left out.
pub(super) fn options(variables: &Variables) -> toml::Table {
    variables
        .with_prefix(PREFIX)
        .filter(|(word, value)| WORDS.contains(word) && !value.trim().is_empty())
        .map(|(word, value)| {
            (word.to_ascii_lowercase(), toml::Value::String(value.trim().to_owned()))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::tests::{payload, runner};

    #[test]
    fn only_the_known_words_become_options() {
        let payload = payload(&[
            ("BRIDGE_PARTITION", "gpu"),
            ("BRIDGE_CPUS_PER_TASK", " 4 "),
            ("BRIDGE_MEM", ""),
            ("BRIDGE_COLOUR", "red"),
            ("PARTITION", "x"),
        ]);
        let plan = super::super::plan(&payload, &runner(), super::super::Slot::default()).unwrap();
        let options = plan.spec(None).options;
        assert_eq!(options.to_string(), "cpus_per_task = \"4\"\npartition = \"gpu\"\n");
    }
}
