//! The keywords: from a resolved document to jobs, each still by itself.

use std::sync::Arc;
use std::time::Duration;

use super::error::Findings;
use super::yaml::{Entry, Node, Value};
use super::{AllowFailure, Job, Need, When, duration};

/// Deepest nesting of lists that GitLab flattens in a script.
const MAX_SCRIPT_DEPTH: usize = 10;

/// Longest name that GitLab accepts for a job.
const MAX_NAME: usize = 255;

const GLOBAL_KEYWORDS: &[&str] =
    &["stages", "default", "variables", "before_script", "after_script"];

/// Words that can never be the name of a job, although we do not know what to do with them.
const RESERVED: &[&str] = &["cache", "image", "include", "services", "spec", "types", "workflow"];

const DEFAULT_KEYWORDS: &[&str] = &["before_script", "after_script", "timeout", "tags"];

const JOB_KEYWORDS: &[&str] = &[
    "after_script",
    "allow_failure",
    "before_script",
    "extends",
    "needs",
    "script",
    "stage",
    "tags",
    "timeout",
    "variables",
    "when",
];

/// The file's contents before they are compared with each other.
#[derive(Debug)]
pub(super) struct Drafts {
    pub(super) stages: Vec<String>,
    pub(super) jobs: Vec<Draft>,
}

/// A job with the lines that later messages point to.
#[derive(Debug)]
pub(super) struct Draft {
    pub(super) job: Job,
    pub(super) stage_line: usize,
    /// One for each of the job's needs.
    pub(super) need_lines: Vec<usize>,
}

/// What holds for all jobs.
#[derive(Debug, Default)]
struct Globals {
    variables: Vec<(String, String)>,
    before_script: Option<Vec<String>>,
    after_script: Option<Vec<String>>,
    timeout: Option<Duration>,
}

/// Reads all entries of the file.
pub(super) fn file(root: &[Entry], findings: &mut Findings) -> Drafts {
    let mut reader = Reader { findings, job: None, tags_noted: false };
    let (stages, globals) = reader.globals(root);
    let mut jobs = Vec::new();
    for entry in root {
        let name = entry.key.as_str();
        if name.starts_with('.') || GLOBAL_KEYWORDS.contains(&name) {
            continue;
        }
        let reserved = RESERVED.contains(&name);
        if let Some(entries) = entry.value.entries()
            && !reserved
        {
            reader.job = Some(name);
            jobs.push(reader.job(entry, entries, &globals));
            reader.job = None;
        } else if entry.value.is_null() && !reserved {
            reader.findings.problem(entry.line, Some(name), "is empty");
        } else {
            reader.findings.unknown(entry.line, None, name, " at the top", GLOBAL_KEYWORDS);
        }
    }
    Drafts { stages, jobs }
}

struct Reader<'a> {
    findings: &'a mut Findings,
    /// The job being read, for messages.
    job: Option<&'a str>,
    tags_noted: bool,
}

impl<'a> Reader<'a> {
    fn problem(&mut self, line: usize, message: impl Into<String>) {
        self.findings.problem(line, self.job, message);
    }

    /// Says that a keyword has a value of the wrong type.
    fn wrong(&mut self, keyword: &str, wants: &str, node: &Node) {
        self.problem(node.line, format!("`{keyword}` takes {wants}, not {}", node.kind()));
    }

    fn globals(&mut self, root: &[Entry]) -> (Vec<String>, Globals) {
        let mut globals = Globals::default();
        let mut stages = None;
        let mut twice = Vec::new();
        for entry in set(root) {
            match entry.key.as_str() {
                "stages" => stages = self.stages(&entry.value),
                "variables" => globals.variables = self.variables(&entry.value),
                "before_script" => {
                    globals.before_script = self.script("before_script", &entry.value);
                    twice.push(entry);
                }
                "after_script" => {
                    globals.after_script = self.script("after_script", &entry.value);
                    twice.push(entry);
                }
                _ => {}
            }
        }
        for default in set(root).filter(|entry| entry.key == "default") {
            let Some(entries) = default.value.entries() else {
                self.wrong("default", "a mapping", &default.value);
                continue;
            };
            for entry in set(entries) {
                if twice.iter().any(|top| top.key == entry.key) {
                    let message = format!("`{}` stands at the top and in `default`", entry.key);
                    self.problem(entry.line, message);
                }
                match entry.key.as_str() {
                    "before_script" => {
                        globals.before_script = self.script("before_script", &entry.value);
                    }
                    "after_script" => {
                        globals.after_script = self.script("after_script", &entry.value);
                    }
                    "timeout" => globals.timeout = self.timeout(&entry.value),
                    "tags" => self.tags(entry),
                    word => {
                        let place = " in `default`";
                        self.findings.unknown(entry.line, None, word, place, DEFAULT_KEYWORDS);
                    }
                }
            }
        }
        let named = stages.unwrap_or_else(|| ["build", "test", "deploy"].map(String::from).into());
        let mut stages = vec![".pre".to_owned()];
        for stage in named {
            if stage != ".post" && !stages.contains(&stage) {
                stages.push(stage);
            }
        }
        stages.push(".post".to_owned());
        (stages, globals)
    }

    fn job(&mut self, entry: &Entry, entries: &[Entry], globals: &Globals) -> Draft {
        if entry.key.is_empty() {
            self.problem(entry.line, "has no name");
        }
        if entry.key.chars().count() > MAX_NAME {
            self.problem(entry.line, format!("has a name of more than {MAX_NAME} characters"));
        }
        let mut stage = ("test".to_owned(), entry.line);
        let mut own_variables = Vec::new();
        let mut before_script = None;
        let mut script = None;
        let mut after_script = None;
        let mut needs = None;
        let mut allow_failure = None;
        let mut timeout = None;
        let mut when = When::OnSuccess;
        for entry in set(entries) {
            let node = &entry.value;
            match entry.key.as_str() {
                "stage" => match node.text() {
                    Some(name) => stage = (name.to_owned(), node.line),
                    None => self.wrong("stage", "the name of a stage", node),
                },
                "variables" => own_variables = self.variables(node),
                "before_script" => before_script = Some(self.script("before_script", node)),
                "script" => script = Some((self.script("script", node), node.line)),
                "after_script" => after_script = Some(self.script("after_script", node)),
                "needs" => needs = self.needs(node),
                "allow_failure" => allow_failure = self.allow_failure(node),
                "timeout" => timeout = self.timeout(node),
                "tags" => self.tags(entry),
                "when" => when = self.when(node),
                word => self.findings.unknown(entry.line, self.job, word, "", JOB_KEYWORDS),
            }
        }
        let script = match script {
            None => {
                self.problem(entry.line, "has no `script`");
                Vec::new()
            }
            // Lines that were refused have been reported; it is not empty on top of that.
            Some((None, _)) => Vec::new(),
            Some((Some(lines), line)) => {
                if lines.iter().all(|text| text.trim().is_empty()) {
                    self.problem(line, "`script` is empty");
                }
                lines
            }
        };
        let inherited = |own: Option<Option<Vec<String>>>, global: &Option<Vec<String>>| match own {
            Some(own) => own.unwrap_or_default(),
            None => global.clone().unwrap_or_default(),
        };
        let mut all = inherited(before_script, &globals.before_script);
        all.extend(script);
        let mut variables = globals.variables.clone();
        for (name, value) in own_variables {
            set_variable(&mut variables, name, value);
        }
        let (needs, need_lines) = match needs {
            None => (None, Vec::new()),
            Some(needs) => {
                let (needs, lines) = needs.into_iter().unzip();
                (Some(needs), lines)
            }
        };
        // A manual job that says nothing else must not hold up those after it.
        let unsaid = if when == When::Manual { AllowFailure::Always } else { AllowFailure::Never };
        Draft {
            job: Job {
                name: entry.key.clone(),
                stage: stage.0,
                line: entry.line,
                script: all,
                after_script: inherited(after_script, &globals.after_script),
                variables,
                needs,
                allow_failure: allow_failure.unwrap_or(unsaid),
                timeout: timeout.or(globals.timeout),
                when,
            },
            stage_line: stage.1,
            need_lines,
        }
    }

    fn stages(&mut self, node: &Node) -> Option<Vec<String>> {
        let wants = "a list of names";
        let Some(items) = node.items() else {
            self.wrong("stages", wants, node);
            return None;
        };
        let mut stages = Vec::new();
        for item in flat(items) {
            match item.text() {
                Some(name) => stages.push(name.to_owned()),
                None => self.wrong("stages", wants, item),
            }
        }
        Some(stages)
    }

    fn variables(&mut self, node: &Node) -> Vec<(String, String)> {
        let Some(entries) = node.entries() else {
            self.wrong("variables", "a mapping", node);
            return Vec::new();
        };
        let mut variables = Vec::new();
        for entry in entries {
            let name = &entry.key;
            let what = format!("variables: {name}");
            let wants = "text, a number, true or false";
            // The long form, whose description is for people starting pipelines by hand.
            let value = match entry.value.entries() {
                None => Some(&entry.value),
                Some(parts) => {
                    for part in parts {
                        if !matches!(part.key.as_str(), "value" | "description" | "options") {
                            let place = format!(" in variable `{name}`");
                            let known = &["value", "description", "options"];
                            self.findings.unknown(part.line, self.job, &part.key, &place, known);
                        }
                    }
                    entry.value.get("value")
                }
            };
            match value.map(|value| (value, value.scalar_text())) {
                None => set_variable(&mut variables, name.clone(), String::new()),
                Some((_, Some(text))) => set_variable(&mut variables, name.clone(), text),
                Some((value, None)) => self.wrong(&what, wants, value),
            }
        }
        variables
    }

    /// Reads a script; `None` when one of its lines was refused.
    fn script(&mut self, keyword: &str, node: &Node) -> Option<Vec<String>> {
        let mut lines = Vec::new();
        self.script_into(keyword, node, 0, &mut lines).then_some(lines)
    }

    fn script_into(
        &mut self,
        keyword: &str,
        node: &Node,
        depth: usize,
        lines: &mut Vec<String>,
    ) -> bool {
        match &node.value {
            Value::Text(text) => {
                lines.push(text.clone());
                true
            }
            Value::List(_) if depth > MAX_SCRIPT_DEPTH => {
                let message =
                    format!("`{keyword}` nests lists deeper than {MAX_SCRIPT_DEPTH} levels");
                self.problem(node.line, message);
                false
            }
            Value::List(items) => {
                let mut fine = true;
                for item in items {
                    fine &= self.script_into(keyword, item, depth + 1, lines);
                }
                fine
            }
            Value::Map(_) if depth > 0 => {
                // The classic: `- echo "state: on"` without quotes around the whole.
                let message = format!(
                    "a line of `{keyword}` is a mapping, because of the colon in it; put the whole line in quotes"
                );
                self.problem(node.line, message);
                false
            }
            Value::Null
            | Value::Bool(_)
            | Value::Int(_)
            | Value::Float(_)
            | Value::Map(_)
            | Value::Reference(_) => {
                if depth > 0 {
                    let message = format!("a line of `{keyword}` is {}, not text", node.kind());
                    self.problem(node.line, message);
                } else {
                    self.wrong(keyword, "text or a list of lines", node);
                }
                false
            }
        }
    }

    fn needs(&mut self, node: &Node) -> Option<Vec<(Need, usize)>> {
        let wants = "a list of jobs";
        let items = match node.items() {
            Some(items) => flat(items),
            None if node.entries().is_some() => vec![node],
            None => {
                self.wrong("needs", wants, node);
                return None;
            }
        };
        let mut needs = Vec::new();
        for item in items {
            let need = if let Some(name) = item.text() {
                Some(Need { job: name.to_owned(), optional: false })
            } else if let Some(entries) = item.entries() {
                self.need(item, entries)
            } else {
                self.wrong("needs", wants, item);
                None
            };
            needs.extend(need.map(|need| (need, item.line)));
        }
        Some(needs)
    }

    fn need(&mut self, node: &Node, entries: &[Entry]) -> Option<Need> {
        let mut job = None;
        let mut optional = false;
        for entry in set(entries) {
            match (entry.key.as_str(), &entry.value.value) {
                ("job", Value::Text(name)) => job = Some(name.clone()),
                ("job", _) => {
                    self.wrong("needs: job", "the name of a job", &entry.value);
                    return None;
                }
                ("optional", Value::Bool(value)) => optional = *value,
                ("optional", _) => self.wrong("needs: optional", "true or false", &entry.value),
                (word, _) => {
                    let known = &["job", "optional"];
                    self.findings.unknown(entry.line, self.job, word, " in `needs`", known);
                }
            }
        }
        if job.is_none() {
            self.problem(node.line, "an entry of `needs` names no `job`");
        }
        Some(Need { job: job?, optional })
    }

    fn allow_failure(&mut self, node: &Node) -> Option<AllowFailure> {
        if let Value::Bool(allowed) = node.value {
            return Some(if allowed { AllowFailure::Always } else { AllowFailure::Never });
        }
        let Some(entries) = node.entries() else {
            self.wrong("allow_failure", "true, false or `exit_codes`", node);
            return None;
        };
        for entry in entries.iter().filter(|entry| entry.key != "exit_codes") {
            let place = " in `allow_failure`";
            self.findings.unknown(entry.line, self.job, &entry.key, place, &["exit_codes"]);
        }
        let codes = node.get("exit_codes")?;
        let items = codes.items().map_or_else(|| vec![&**codes], flat);
        let mut numbers = Vec::new();
        for item in items {
            let number = if let Value::Int(number) = item.value { Some(number) } else { None };
            match number.map(i32::try_from) {
                Some(Ok(number)) => numbers.push(number),
                Some(Err(_)) | None => {
                    self.wrong("allow_failure: exit_codes", "a number or a list of them", item);
                }
            }
        }
        Some(AllowFailure::ExitCodes(numbers))
    }

    fn timeout(&mut self, node: &Node) -> Option<Duration> {
        let text = if matches!(node.value, Value::Bool(_)) { None } else { node.scalar_text() };
        let Some(text) = text else {
            self.wrong("timeout", "a time span like `1h 30m`", node);
            return None;
        };
        match duration::parse(&text) {
            Ok(span) => Some(span),
            Err(message) => {
                self.problem(node.line, format!("`timeout`: {message}"));
                None
            }
        }
    }

    fn tags(&mut self, entry: &Entry) {
        let fits = entry
            .value
            .items()
            .is_some_and(|items| flat(items).iter().all(|item| item.scalar_text().is_some()));
        if !fits {
            self.wrong("tags", "a list of names", &entry.value);
        } else if !self.tags_noted {
            self.tags_noted = true;
            let message = "`tags` are ignored: the chosen backend runs every job";
            self.findings.note(entry.line, None, message);
        }
    }

    fn when(&mut self, node: &Node) -> When {
        let Some(word) = node.text() else {
            self.wrong("when", "a word", node);
            return When::OnSuccess;
        };
        match word {
            "on_success" => When::OnSuccess,
            "on_failure" => When::OnFailure,
            "always" => When::Always,
            "manual" => When::Manual,
            word => {
                let message =
                    format!("`when: {word}` is none of on_success, on_failure, always and manual");
                self.problem(node.line, message);
                When::OnSuccess
            }
        }
    }
}

/// Gives the keys that have a value; GitLab takes an empty one for an absent one.
fn set(entries: &[Entry]) -> impl Iterator<Item = &Entry> {
    entries.iter().filter(|entry| !entry.value.is_null())
}

/// Takes nested lists apart, as references and anchors to lists leave them behind.
fn flat(items: &[Arc<Node>]) -> Vec<&Node> {
    let mut flattened = Vec::new();
    for item in items {
        match item.items() {
            Some(inner) => flattened.extend(flat(inner)),
            None => flattened.push(&**item),
        }
    }
    flattened
}

/// Sets a variable; one that is there keeps its place.
fn set_variable(variables: &mut Vec<(String, String)>, name: String, value: String) {
    match variables.iter_mut().find(|(known, _)| *known == name) {
        Some((_, old)) => *old = value,
        None => variables.push((name, value)),
    }
}
