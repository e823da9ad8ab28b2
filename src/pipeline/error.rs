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

/// Collects what is found while files are read, so that all of it can be told at once.
///
/// A pipeline's files are numbered through: a file's lines begin behind those of the files before
/// it, so that one number names both a file and a line of it.
#[derive(Debug)]
pub(super) struct Findings {
    files: Vec<Numbered>,
    ignore_unknown: bool,
    incomplete: bool,
    problems: Vec<(usize, Problem)>,
    notes: Vec<(usize, Problem)>,
    remarks: Vec<Remark>,
}

/// A file and how many lines are numbered before it.
#[derive(Debug)]
struct Numbered {
    name: String,
    base: usize,
    lines: usize,
}

/// Something that is noted once, however often it occurs.
#[derive(Debug)]
struct Remark {
    topic: &'static str,
    line: usize,
    message: String,
    places: usize,
}

impl Findings {
    pub(super) fn new(ignore_unknown: bool) -> Self {
        Self {
            files: Vec::new(),
            ignore_unknown,
            incomplete: false,
            problems: Vec::new(),
            notes: Vec::new(),
            remarks: Vec::new(),
        }
    }

    /// Begins a file; gives what is to be added to its lines.
    pub(super) fn open(&mut self, name: &str, text: &str) -> usize {
        let base = self.files.last().map_or(0, |file| file.base + file.lines);
        // One more than there are, for what is wrong behind the last line.
        let lines = text.lines().count() + 2;
        self.files.push(Numbered { name: name.to_owned(), base, lines });
        base
    }

    /// Gives file and line for a number.
    pub(super) fn place(&self, line: usize) -> (&str, usize) {
        let file = self.files.iter().rev().find(|file| file.base < line);
        file.map_or(("", line), |file| (file.name.as_str(), line - file.base))
    }

    fn make(&self, line: usize, job: Option<&str>, message: String) -> Problem {
        let (file, line) = self.place(line);
        Problem { file: file.to_owned(), line, job: job.map(str::to_owned), message }
    }

    /// Notes something that makes the pipeline impossible.
    pub(super) fn problem(&mut self, line: usize, job: Option<&str>, message: impl Into<String>) {
        let problem = (line, self.make(line, job, message.into()));
        // Jobs that share a faulty piece through an anchor or a default would each repeat it.
        if !self.problems.contains(&problem) {
            self.problems.push(problem);
        }
    }

    /// Notes something the user should know and that changes nothing.
    pub(super) fn note(&mut self, line: usize, job: Option<&str>, message: impl Into<String>) {
        let note = (line, self.make(line, job, message.into()));
        if !self.notes.contains(&note) {
            self.notes.push(note);
        }
    }

    /// Notes once for all jobs what a keyword does not do here.
    pub(super) fn remark(&mut self, topic: &'static str, line: usize, message: &str) {
        match self.remarks.iter_mut().find(|remark| remark.topic == topic) {
            Some(remark) if remark.line == line => {}
            Some(remark) => {
                remark.places += 1;
                remark.line = remark.line.min(line);
            }
            None => {
                self.remarks.push(Remark { topic, line, message: message.to_owned(), places: 1 });
            }
        }
    }

    /// Notes something GitLab does and this does not; `what` begins the sentence.
    pub(super) fn unsupported(&mut self, line: usize, job: Option<&str>, what: &str) {
        if self.ignore_unknown {
            self.note(line, job, format!("{what} is not supported and ignored"));
        } else {
            self.problem(line, job, format!("{what} is not supported, unless --ignore-unknown"));
        }
    }

    /// As [`Self::unsupported`], for what would have brought jobs and keywords of its own.
    pub(super) fn left_out(&mut self, line: usize, what: &str) {
        self.incomplete |= self.ignore_unknown;
        self.unsupported(line, None, what);
    }

    /// Notes a name that leads nowhere; whoever uses it is left out if the name may stand in a part
    /// that was ignored. Gives whether that is so.
    pub(super) fn missing(&mut self, line: usize, job: Option<&str>, message: &str) -> bool {
        if self.incomplete {
            self.note(line, job, format!("{message}: left out, for want of an ignored include"));
        } else {
            self.problem(line, job, message);
        }
        self.incomplete
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
            self.problems.sort_by_key(|(line, _)| *line);
            let problems = self.problems.into_iter().map(|(_, problem)| problem).collect();
            return Err(PipelineError::Invalid { problems });
        }
        for Remark { line, mut message, places, .. } in std::mem::take(&mut self.remarks) {
            if places > 1 {
                message = format!("{message} ({places} places)");
            }
            self.note(line, None, message);
        }
        self.notes.sort_by_key(|(line, _)| *line);
        Ok(self.notes.iter().map(|(_, note)| note.to_string()).collect())
    }
}
