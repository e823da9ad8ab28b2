//! The parts of a job that only its runner looks at.

/// A variable of a pipeline.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Variable {
    /// Its name.
    pub name: String,
    /// Its value, with references to other variables as they were written.
    pub value: String,
    /// Whether such references stay as they are (`expand: false`).
    pub raw: bool,
}

impl Variable {
    /// Makes a variable whose value may refer to others.
    pub fn new(name: impl Into<String>, value: impl Into<String>) -> Self {
        Self { name: name.into(), value: value.into(), raw: false }
    }
}

/// `artifacts`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Artifacts {
    /// What the archive is called.
    pub name: Option<String>,
    /// Patterns of what belongs to it.
    pub paths: Vec<String>,
    /// Patterns of what does not, in spite of `paths`.
    pub exclude: Vec<String>,
    /// Whether everything belongs to it that git does not know.
    pub untracked: bool,
    /// After which end of the job: GitLab's word, if it says so.
    pub when: Option<String>,
    /// How long GitLab keeps it, as it was written.
    pub expire_in: Option<String>,
    /// Files that are uploaded one by one, for GitLab to read.
    pub reports: Vec<Report>,
}

impl Artifacts {
    /// Whether there is an archive, and not reports alone.
    pub fn has_archive(&self) -> bool {
        self.untracked || !self.paths.is_empty()
    }
}

/// One entry of `artifacts: reports`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// GitLab's word for what it is: `junit`, `dotenv`, `cobertura`, …
    pub kind: String,
    /// Patterns of its files.
    pub paths: Vec<String>,
}

/// One entry of `cache`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cache {
    /// Its name, `key: files` already turned into one; it may refer to variables.
    pub key: String,
    /// Names to look under when there is nothing under the key.
    pub fallback_keys: Vec<String>,
    /// Patterns of what belongs to it.
    pub paths: Vec<String>,
    /// Whether everything belongs to it that git does not know.
    pub untracked: bool,
    /// After which end of the job it is stored.
    pub when: String,
    /// `pull`, `push` or `pull-push`; it may be a variable.
    pub policy: String,
}

/// `retry`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Retry {
    /// How often a job that failed runs again.
    pub max: u32,
    /// For which reasons, in GitLab's words; `always` for all.
    pub when: Vec<String>,
    /// For which exit codes.
    pub exit_codes: Vec<i32>,
}

impl Retry {
    /// Whether a job that failed `failures` times, the last time like this, runs again.
    pub fn again(&self, failures: u32, reason: Option<&str>, exit_code: Option<i32>) -> bool {
        let by_reason =
            self.when.iter().any(|when| when == "always" || Some(when.as_str()) == reason);
        let by_code = exit_code.is_some_and(|code| self.exit_codes.contains(&code));
        failures <= self.max && (by_reason || by_code)
    }
}

/// `image`, or one of `services`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Image {
    /// Its name.
    pub name: String,
    /// Under which name a service is found.
    pub alias: Option<String>,
}
