//! The keywords: from a resolved document to jobs, each still by itself.

use std::sync::Arc;
use std::time::Duration;

use super::error::Findings;
use super::model::{Artifacts, Image, Retry};
use super::parts::{CacheDraft, Environment, Matrix, Parallel};
use super::rules::{Policy, Rule};
use super::yaml::{Entry, Node, Value};
use super::{AllowFailure, Variable, When, duration};

/// Deepest nesting of lists that GitLab flattens in a script.
const MAX_SCRIPT_DEPTH: usize = 10;

/// Longest name that GitLab accepts for a job.
const MAX_NAME: usize = 255;

const GLOBAL_KEYWORDS: &[&str] = &[
    "stages",
    "default",
    "variables",
    "before_script",
    "after_script",
    "workflow",
    "image",
    "services",
    "cache",
    "include",
];

/// Words that can never be the name of a job, although we do not know what to do with them.
const RESERVED: &[&str] = &["spec", "types"];

const DEFAULT_KEYWORDS: &[&str] = &[
    "before_script",
    "after_script",
    "timeout",
    "tags",
    "artifacts",
    "cache",
    "hooks",
    "image",
    "interruptible",
    "retry",
    "services",
];

const JOB_KEYWORDS: &[&str] = &[
    "after_script",
    "allow_failure",
    "artifacts",
    "before_script",
    "cache",
    "coverage",
    "dependencies",
    "environment",
    "except",
    "extends",
    "hooks",
    "image",
    "inherit",
    "interruptible",
    "manual_confirmation",
    "needs",
    "only",
    "pages",
    "parallel",
    "publish",
    "release",
    "resource_group",
    "retry",
    "rules",
    "script",
    "services",
    "stage",
    "start_in",
    "tags",
    "timeout",
    "trigger",
    "variables",
    "when",
];

/// The file's contents before they are compared with each other.
#[derive(Debug)]
pub(super) struct Drafts {
    pub(super) stages: Vec<String>,
    pub(super) variables: Vec<Global>,
    pub(super) workflow: Workflow,
    pub(super) jobs: Vec<Draft>,
}

/// A variable of the pipeline, with the values it may have.
#[derive(Debug)]
pub(super) struct Global {
    pub(super) variable: Variable,
    pub(super) options: Option<Vec<String>>,
}

/// `workflow`.
#[derive(Debug, Default)]
pub(super) struct Workflow {
    pub(super) line: usize,
    pub(super) name: Option<String>,
    pub(super) rules: Option<Vec<Rule>>,
}

/// A job as the file has it, with the lines that later messages point to.
#[derive(Debug)]
pub(super) struct Draft {
    pub(super) name: String,
    pub(super) line: usize,
    pub(super) stage: String,
    pub(super) stage_line: usize,
    pub(super) script: Vec<String>,
    pub(super) after_script: Vec<String>,
    pub(super) variables: Vec<Variable>,
    pub(super) inherit_variables: Inherit,
    pub(super) needs: Option<Vec<Wish>>,
    pub(super) dependencies: Option<(Vec<String>, usize)>,
    pub(super) allow_failure: Option<AllowFailure>,
    pub(super) timeout: Option<Duration>,
    pub(super) when: When,
    pub(super) rules: Option<Vec<Rule>>,
    pub(super) only: Option<Policy>,
    pub(super) except: Option<Policy>,
    pub(super) parallel: Option<Parallel>,
    pub(super) artifacts: Option<Artifacts>,
    pub(super) caches: Vec<CacheDraft>,
    pub(super) retry: Retry,
    pub(super) image: Option<Image>,
    pub(super) services: Vec<Image>,
    pub(super) hooks: Vec<(String, Vec<String>)>,
    pub(super) environment: Option<Environment>,
    /// Starts another pipeline instead of running anything.
    pub(super) trigger: bool,
    /// The rest of it stands in an include that was ignored.
    pub(super) incomplete: bool,
}

/// An entry of `needs`.
#[derive(Clone, Debug)]
pub(super) struct Wish {
    pub(super) job: String,
    pub(super) line: usize,
    pub(super) optional: bool,
    pub(super) artifacts: bool,
    pub(super) matrix: Option<Matrix>,
}

/// Which defaults or variables a job takes over.
#[derive(Clone, Debug)]
pub(super) enum Inherit {
    All,
    None,
    Only(Vec<String>),
}

impl Inherit {
    pub(super) fn takes(&self, name: &str) -> bool {
        match self {
            Self::All => true,
            Self::None => false,
            Self::Only(names) => names.iter().any(|known| known == name),
        }
    }
}

/// Reads all entries of the file.
pub(super) fn file(root: &[Entry], findings: &mut Findings) -> Drafts {
    let mut reader = Reader { findings, job: None };
    let stages = reader.all_stages(root);
    let variables = reader.global_variables(root);
    let workflow = reader.workflow(root);
    let defaults = reader.defaults(root);
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
            jobs.push(reader.job(entry, entries, &defaults));
            reader.job = None;
        } else if entry.value.is_null() && !reserved {
            reader.findings.problem(entry.line, Some(name), "is empty");
        } else {
            reader.findings.unknown(entry.line, None, name, " at the top", GLOBAL_KEYWORDS);
        }
    }
    Drafts { stages, variables, workflow, jobs }
}

/// Reads the values of keywords; those with a shape of their own are in `parts` and `rules`.
pub(super) struct Reader<'a> {
    pub(super) findings: &'a mut Findings,
    /// The job being read, for messages.
    pub(super) job: Option<&'a str>,
}

impl Reader<'_> {
    pub(super) fn problem(&mut self, line: usize, message: impl Into<String>) {
        self.findings.problem(line, self.job, message);
    }

    /// Says that a keyword has a value of the wrong type.
    pub(super) fn wrong(&mut self, keyword: &str, wants: &str, node: &Node) {
        self.problem(node.line, format!("`{keyword}` takes {wants}, not {}", node.kind()));
    }

    fn all_stages(&mut self, root: &[Entry]) -> Vec<String> {
        let written = set(root).filter(|entry| entry.key == "stages").last();
        let named = written.and_then(|entry| self.stages(&entry.value));
        let named = named.unwrap_or_else(|| ["build", "test", "deploy"].map(String::from).into());
        let mut stages = vec![".pre".to_owned()];
        for stage in named {
            if stage != ".post" && !stages.contains(&stage) {
                stages.push(stage);
            }
        }
        stages.push(".post".to_owned());
        stages
    }

    fn global_variables(&mut self, root: &[Entry]) -> Vec<Global> {
        let Some(entry) = set(root).find(|entry| entry.key == "variables") else {
            return Vec::new();
        };
        let variables = self.variables(&entry.value, true);
        let options = |name: &str| {
            let options = entry.value.get(name)?.get("options")?.items()?;
            Some(options.iter().filter_map(|option| option.scalar_text()).collect())
        };
        let global = |variable: Variable| Global { options: options(&variable.name), variable };
        variables.into_iter().map(global).collect()
    }

    fn workflow(&mut self, root: &[Entry]) -> Workflow {
        let Some(entry) = set(root).find(|entry| entry.key == "workflow") else {
            return Workflow::default();
        };
        let mut workflow = Workflow { line: entry.line, ..Workflow::default() };
        let Some(entries) = entry.value.entries() else {
            self.wrong("workflow", "a mapping", &entry.value);
            return workflow;
        };
        for part in set(entries) {
            match part.key.as_str() {
                "name" => workflow.name = part.value.scalar_text(),
                "rules" => workflow.rules = Some(self.rules(&part.value)),
                "auto_cancel" => self.without_effect(part),
                word => {
                    let known = &["name", "rules", "auto_cancel"];
                    self.findings.unknown(part.line, None, word, " in `workflow`", known);
                }
            }
        }
        workflow
    }

    /// Gives the keywords that jobs take over, those at the top among them.
    fn defaults(&mut self, root: &[Entry]) -> Vec<Entry> {
        let old = ["before_script", "after_script", "image", "services", "cache"];
        let mut defaults: Vec<Entry> =
            set(root).filter(|entry| old.contains(&entry.key.as_str())).cloned().collect();
        for default in set(root).filter(|entry| entry.key == "default") {
            let Some(entries) = default.value.entries() else {
                self.wrong("default", "a mapping", &default.value);
                continue;
            };
            for entry in set(entries) {
                if defaults.iter().any(|known| known.key == entry.key) {
                    let message = format!("`{}` stands at the top and in `default`", entry.key);
                    self.problem(entry.line, message);
                }
                match entry.key.as_str() {
                    "id_tokens" | "identity" => {
                        let what = format!("`{}` in `default`", entry.key);
                        self.findings.unsupported(entry.line, None, &what);
                    }
                    word if DEFAULT_KEYWORDS.contains(&word) => defaults.push(entry.clone()),
                    word => {
                        let place = " in `default`";
                        self.findings.unknown(entry.line, None, word, place, DEFAULT_KEYWORDS);
                    }
                }
            }
        }
        defaults
    }

    fn inherit(&mut self, entries: &[Entry]) -> (Inherit, Inherit) {
        let (mut defaults, mut variables) = (Inherit::All, Inherit::All);
        let Some(entry) = set(entries).find(|entry| entry.key == "inherit") else {
            return (defaults, variables);
        };
        for part in set(entry.value.entries().unwrap_or_default()) {
            let which = match &part.value.value {
                Value::Bool(true) => Inherit::All,
                Value::Bool(false) => Inherit::None,
                Value::Null
                | Value::Int(_)
                | Value::Float(_)
                | Value::Text(_)
                | Value::List(_)
                | Value::Map(_)
                | Value::Reference(_) => {
                    let what = format!("inherit: {}", part.key);
                    Inherit::Only(self.words(&what, &part.value).unwrap_or_default())
                }
            };
            match part.key.as_str() {
                "default" => defaults = which,
                "variables" => variables = which,
                word => {
                    let known = &["default", "variables"];
                    self.findings.unknown(part.line, self.job, word, " in `inherit`", known);
                }
            }
        }
        (defaults, variables)
    }

    fn job(&mut self, entry: &Entry, own: &[Entry], defaults: &[Entry]) -> Draft {
        if entry.key.is_empty() {
            self.problem(entry.line, "has no name");
        }
        if entry.key.chars().count() > MAX_NAME {
            self.problem(entry.line, format!("has a name of more than {MAX_NAME} characters"));
        }
        let (inherit, inherit_variables) = self.inherit(own);
        let mut draft = Draft::new(entry, inherit_variables);
        let (mut before_script, mut script) = (Vec::new(), None);
        let mut runs_steps = false;
        let taken = defaults.iter().filter(|default| {
            inherit.takes(&default.key) && !set(own).any(|entry| entry.key == default.key)
        });
        for entry in taken.chain(set(own)) {
            let node = &entry.value;
            match entry.key.as_str() {
                "stage" => match node.text() {
                    Some(name) => (draft.stage, draft.stage_line) = (name.to_owned(), node.line),
                    None => self.wrong("stage", "the name of a stage", node),
                },
                "variables" => draft.variables = self.variables(node, false),
                "before_script" => {
                    before_script = self.script("before_script", node).unwrap_or_default();
                }
                "script" => script = Some((self.script("script", node), node.line)),
                "after_script" => {
                    draft.after_script = self.script("after_script", node).unwrap_or_default();
                }
                "needs" => draft.needs = self.needs(node),
                "dependencies" => {
                    draft.dependencies =
                        self.words("dependencies", node).map(|names| (names, node.line));
                }
                "allow_failure" => draft.allow_failure = self.allow_failure(node),
                "timeout" => draft.timeout = self.timeout(node),
                "tags" => {
                    let fits = node.items().is_some();
                    if fits && self.words("tags", node).is_some() {
                        self.without_effect(entry);
                    } else {
                        self.wrong("tags", "a list of names", node);
                    }
                }
                "when" => draft.when = self.when(node),
                "rules" => draft.rules = Some(self.rules(node)),
                "only" => draft.only = Some(self.policy(entry)),
                "except" => draft.except = Some(self.policy(entry)),
                "parallel" => draft.parallel = self.parallel(node),
                "artifacts" => draft.artifacts = self.artifacts(node),
                "cache" => draft.caches = self.caches(node),
                "retry" => draft.retry = self.retry(node),
                "image" => {
                    self.without_effect(entry);
                    draft.image = self.image("image", node);
                }
                "services" => {
                    self.without_effect(entry);
                    draft.services = self.services(node);
                }
                "hooks" => draft.hooks = self.hooks(node),
                "environment" => draft.environment = self.environment(entry),
                "trigger" => draft.trigger = true,
                "start_in" => self.delayed(entry.line),
                // Read before anything else, or gone before it.
                "inherit" | "extends" => {}
                "coverage"
                | "release"
                | "resource_group"
                | "interruptible"
                | "pages"
                | "publish"
                | "manual_confirmation" => self.without_effect(entry),
                "secrets" | "id_tokens" | "identity" | "inputs" | "run" => {
                    runs_steps |= entry.key == "run";
                    let what = format!("`{}`", entry.key);
                    self.findings.unsupported(entry.line, self.job, &what);
                }
                word => self.findings.unknown(entry.line, self.job, word, "", JOB_KEYWORDS),
            }
        }
        if draft.rules.is_some()
            && let Some(policy) = draft.only.as_ref().or(draft.except.as_ref())
        {
            self.problem(
                policy.line,
                "has `rules` and `only` or `except`, which exclude each other",
            );
        }
        draft.script = before_script;
        match script {
            None if draft.trigger || runs_steps => {}
            None => {
                draft.incomplete = self.findings.missing(entry.line, self.job, "has no `script`");
            }
            // Lines that were refused have been reported; it is not empty on top of that.
            Some((None, _)) => {}
            Some((Some(lines), line)) => {
                if lines.iter().all(|text| text.trim().is_empty()) {
                    self.problem(line, "`script` is empty");
                }
                draft.script.extend(lines);
            }
        }
        draft
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

    /// Reads a script; `None` when one of its lines was refused.
    pub(super) fn script(&mut self, keyword: &str, node: &Node) -> Option<Vec<String>> {
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

    /// Reads `needs` of a job or a rule.
    pub(super) fn needs(&mut self, node: &Node) -> Option<Vec<Wish>> {
        let wants = "a list of jobs";
        let items = match node.items() {
            Some(items) => flat(items),
            None if node.entries().is_some() || node.text().is_some() => vec![node],
            None => {
                self.wrong("needs", wants, node);
                return None;
            }
        };
        let mut needs = Vec::new();
        for item in items {
            if let Some(name) = item.text() {
                needs.push(Wish::new(name, item.line));
            } else if let Some(entries) = item.entries() {
                needs.extend(self.need(item, entries));
            } else {
                self.wrong("needs", wants, item);
            }
        }
        Some(needs)
    }

    fn need(&mut self, node: &Node, entries: &[Entry]) -> Option<Wish> {
        for kind in ["project", "pipeline"] {
            if let Some(what) = node.get(kind) {
                let what = what.scalar_text().unwrap_or_default();
                let what = format!("`needs: {kind}` (`{what}`), which is another pipeline's,");
                self.findings.unsupported(node.line, self.job, &what);
                return None;
            }
        }
        let mut wish = Wish::new("", node.line);
        for entry in set(entries) {
            match (entry.key.as_str(), &entry.value.value) {
                ("job", Value::Text(name)) => wish.job.clone_from(name),
                ("job", _) => {
                    self.wrong("needs: job", "the name of a job", &entry.value);
                    return None;
                }
                ("optional", Value::Bool(value)) => wish.optional = *value,
                ("artifacts", Value::Bool(value)) => wish.artifacts = *value,
                ("optional" | "artifacts", _) => {
                    let what = format!("needs: {}", entry.key);
                    self.wrong(&what, "true or false", &entry.value);
                }
                ("parallel", Value::Map(_)) => {
                    wish.matrix = entry.value.get("matrix").and_then(|rows| self.matrix(rows));
                }
                (word, _) => {
                    let known = &["job", "optional", "artifacts", "parallel"];
                    self.findings.unknown(entry.line, self.job, word, " in `needs`", known);
                }
            }
        }
        if wish.job.is_empty() {
            self.problem(node.line, "an entry of `needs` names no `job`");
            return None;
        }
        Some(wish)
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
        Some(AllowFailure::ExitCodes(self.numbers("allow_failure: exit_codes", codes)))
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

    /// Reads `when` of a job or a rule.
    pub(super) fn when(&mut self, node: &Node) -> When {
        let Some(word) = node.text() else {
            self.wrong("when", "a word", node);
            return When::OnSuccess;
        };
        match word {
            "on_success" => When::OnSuccess,
            "on_failure" => When::OnFailure,
            "always" => When::Always,
            "manual" => When::Manual,
            "delayed" => {
                self.delayed(node.line);
                When::OnSuccess
            }
            word => {
                let message = format!(
                    "`when: {word}` is none of on_success, on_failure, always, manual and delayed"
                );
                self.problem(node.line, message);
                When::OnSuccess
            }
        }
    }
}

impl Draft {
    fn new(entry: &Entry, inherit_variables: Inherit) -> Self {
        Self {
            name: entry.key.clone(),
            line: entry.line,
            stage: "test".to_owned(),
            stage_line: entry.line,
            script: Vec::new(),
            after_script: Vec::new(),
            variables: Vec::new(),
            inherit_variables,
            needs: None,
            dependencies: None,
            allow_failure: None,
            timeout: None,
            when: When::OnSuccess,
            rules: None,
            only: None,
            except: None,
            parallel: None,
            artifacts: None,
            caches: Vec::new(),
            retry: Retry::default(),
            image: None,
            services: Vec::new(),
            hooks: Vec::new(),
            environment: None,
            trigger: false,
            incomplete: false,
        }
    }
}

impl Wish {
    fn new(job: &str, line: usize) -> Self {
        Self { job: job.to_owned(), line, optional: false, artifacts: true, matrix: None }
    }
}

/// Gives the keys that have a value; GitLab takes an empty one for an absent one.
pub(super) fn set(entries: &[Entry]) -> impl Iterator<Item = &Entry> {
    entries.iter().filter(|entry| !entry.value.is_null())
}

/// Takes nested lists apart, as references and anchors to lists leave them behind.
pub(super) fn flat(items: &[Arc<Node>]) -> Vec<&Node> {
    let mut flattened = Vec::new();
    for item in items {
        match item.items() {
            Some(inner) => flattened.extend(flat(inner)),
            None => flattened.push(&**item),
        }
    }
    flattened
}
