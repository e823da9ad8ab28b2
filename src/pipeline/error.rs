//! What can be wrong with a pipeline file, and the list in which it is collected.

use std::fmt;
use std::io;

use camino::Utf8PathBuf;
use thiserror::Error;

/// Why there is no pipeline.
#[derive(Debug, Error)]
pub enum PipelineError {
    /// The file could not be read.
    #[error("read {path}")]
    Read {
        /// The file.
        path: Utf8PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The file says something that cannot be run; everything that was found is listed.
    #[error("{}", Listed(.problems))]
    Invalid {
        /// What was found, in the order of the file.
        problems: Vec<Problem>,
    },
}

/// One thing wrong at one place of a pipeline file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The file as it was named by the caller.
    pub file: String,
    /// The line, counted from 1.
    pub line: usize,
    /// The job it is about, if it is about one.
    pub job: Option<String>,
    /// What is wrong.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: ", self.file, self.line)?;
        if let Some(job) = &self.job {
            write!(f, "job `{job}`: ")?;
        }
        f.write_str(&self.message)
    }
}

struct Listed<'a>(&'a [Problem]);

impl fmt::Display for Listed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let [problem] = self.0 {
            return problem.fmt(f);
        }
        write!(f, "{} problems in the pipeline", self.0.len())?;
        for problem in self.0 {
            write!(f, "\n  {problem}")?;
        }
        Ok(())
    }
}

/// Collects what is found while a file is read, so that all of it can be told at once.
#[derive(Debug)]
pub(super) struct Findings {
    file: String,
    ignore_unknown: bool,
    problems: Vec<Problem>,
    notes: Vec<Problem>,
}

impl Findings {
    pub(super) fn new(file: &str, ignore_unknown: bool) -> Self {
        Self { file: file.to_owned(), ignore_unknown, problems: Vec::new(), notes: Vec::new() }
    }

    fn make(&self, line: usize, job: Option<&str>, message: String) -> Problem {
        Problem { file: self.file.clone(), line, job: job.map(str::to_owned), message }
    }

    /// Notes something that makes the pipeline impossible.
    pub(super) fn problem(&mut self, line: usize, job: Option<&str>, message: impl Into<String>) {
        let problem = self.make(line, job, message.into());
        // Jobs that share a faulty piece through an anchor or a default would each repeat it.
        if !self.problems.contains(&problem) {
            self.problems.push(problem);
        }
    }

    /// Notes something the user should know and that changes nothing.
    pub(super) fn note(&mut self, line: usize, job: Option<&str>, message: impl Into<String>) {
        let note = self.make(line, job, message.into());
        if !self.notes.contains(&note) {
            self.notes.push(note);
        }
    }

    /// Notes a word outside the supported subset; `place` says where it stands, if not in a job.
    pub(super) fn unknown(
        &mut self,
        line: usize,
        job: Option<&str>,
        word: &str,
        place: &str,
        known: &[&str],
    ) {
        let what = format!("keyword `{word}`{place}");
        if self.ignore_unknown {
            self.note(line, job, format!("{what} is not supported and ignored"));
            return;
        }
        let nearest = known
            .iter()
            .map(|known| (strsim::damerau_levenshtein(word, known), *known))
            .min()
            .filter(|(distance, known)| *distance <= 2 && *distance < known.len() / 2);
        let hint = match nearest {
            Some((_, known)) => format!("; did you mean `{known}`?"),
            None => String::new(),
        };
        let message = format!("{what} is not supported, unless --ignore-unknown{hint}");
        self.problem(line, job, message);
    }

    /// Whether nothing stands in the way so far.
    pub(super) fn is_clean(&self) -> bool {
        self.problems.is_empty()
    }

    /// Gives the notes, or the error when there were problems.
    pub(super) fn finish(mut self) -> Result<Vec<String>, PipelineError> {
        if !self.problems.is_empty() {
            self.problems.sort_by_key(|problem| problem.line);
            return Err(PipelineError::Invalid { problems: self.problems });
        }
        self.notes.sort_by_key(|note| note.line);
        Ok(self.notes.iter().map(Problem::to_string).collect())
    }
}
