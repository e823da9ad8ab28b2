//! The keywords whose values have a shape of their own: `artifacts`, `cache`, `retry`, `variables`, …

use super::Variable;
use super::model::{Artifacts, Image, Report, Retry};
use super::read::{Reader, flat, set};
use super::yaml::{Entry, Node, Value};

/// Every `reports` word of GitLab's, besides `coverage_report`, which names one of the others.
const REPORTS: &[&str] = &[
    "accessibility",
    "annotations",
    "api_fuzzing",
    "browser_performance",
    "cluster_applications",
    "cluster_image_scanning",
    "cobertura",
    "codequality",
    "container_scanning",
    "coverage_fuzzing",
    "cyclonedx",
    "dast",
    "dependency_scanning",
    "dotenv",
    "jacoco",
    "junit",
    "license_scanning",
    "load_performance",
    "lsif",
    "metrics",
    "performance",
    "repository_xray",
    "requirements",
    "requirements_v2",
    "sarif",
    "sast",
    "scip",
    "secret_detection",
    "terraform",
];

const ARTIFACT_KEYWORDS: &[&str] = &[
    "name",
    "paths",
    "exclude",
    "untracked",
    "when",
    "expire_in",
    "reports",
    "expose_as",
    "public",
    "access",
];

const CACHE_KEYWORDS: &[&str] =
    &["key", "paths", "untracked", "when", "policy", "unprotect", "fallback_keys"];

/// Most caches of a job; GitLab's own limit.
const MAX_CACHES: usize = 4;

/// Most instances of a job; GitLab's own limit.
const MAX_PARALLEL: usize = 200;

/// A cache whose key may have to be worked out from the project's files.
#[derive(Clone, Debug)]
pub(super) struct CacheDraft {
    pub(super) key: CacheKey,
    pub(super) cache: super::Cache,
    /// Whether branches that are not protected share it.
    pub(super) unprotect: bool,
}

/// `cache: key`.
#[derive(Clone, Debug)]
pub(super) enum CacheKey {
    Text(String),
    Files { files: Vec<String>, prefix: String },
}

/// `parallel`.
#[derive(Clone, Debug)]
pub(super) enum Parallel {
    Count(u32),
    Matrix(Matrix),
}

/// Rows of names with the values each may take.
pub(super) type Matrix = Vec<Vec<(String, Vec<String>)>>;

/// `environment`, as far as it becomes variables.
#[derive(Clone, Debug, Default)]
pub(super) struct Environment {
    pub(super) name: String,
    pub(super) url: Option<String>,
    pub(super) action: Option<String>,
    pub(super) tier: Option<String>,
}

/// Writes out a matrix: one list of variables for each combination, in GitLab's order.
pub(super) fn combinations(matrix: &Matrix) -> Vec<Vec<Variable>> {
    let mut all = Vec::new();
    for row in matrix {
        let mut rows: Vec<Vec<Variable>> = vec![Vec::new()];
        for (name, values) in row {
            let mut longer = Vec::with_capacity(rows.len() * values.len());
            for row in &rows {
                for value in values {
                    let mut row = row.clone();
                    row.push(Variable::new(name.clone(), value.clone()));
                    longer.push(row);
                }
                // A few more than allowed tell as much as all of a million.
                if longer.len() > 2 * MAX_PARALLEL {
                    break;
                }
            }
            rows = longer;
        }
        all.append(&mut rows);
    }
    all
}

/// Gives the name of one combination: `job: [a, b]`.
pub(super) fn instance_name(base: &str, variables: &[Variable]) -> String {
    let values: Vec<&str> = variables.iter().map(|variable| variable.value.as_str()).collect();
    format!("{base}: [{}]", values.join(", "))
}

impl Reader<'_> {
    /// Reads a word or a list of words.
    pub(super) fn words(&mut self, keyword: &str, node: &Node) -> Option<Vec<String>> {
        if let Some(text) = node.scalar_text() {
            return Some(vec![text]);
        }
        let Some(items) = node.items() else {
            self.wrong(keyword, "a list of texts", node);
            return None;
        };
        let mut words = Vec::new();
        for item in flat(items) {
            match item.scalar_text() {
                Some(text) => words.push(text),
                None => self.wrong(keyword, "a list of texts", item),
            }
        }
        Some(words)
    }

    fn word(&mut self, keyword: &str, node: &Node) -> Option<String> {
        let text = node.scalar_text();
        if text.is_none() {
            self.wrong(keyword, "text", node);
        }
        text
    }

    fn flag(&mut self, keyword: &str, node: &Node) -> bool {
        if let Value::Bool(value) = node.value {
            return value;
        }
        self.wrong(keyword, "true or false", node);
        false
    }

    fn one_of(&mut self, keyword: &str, node: &Node, known: &[&str]) -> Option<String> {
        let text = self.word(keyword, node)?;
        // A variable's value is the runner's to judge.
        if !known.contains(&text.as_str()) && !text.contains('$') {
            let message = format!("`{keyword}: {text}` is none of {}", known.join(", "));
            self.problem(node.line, message);
            return None;
        }
        Some(text)
    }

    /// Reads `variables`; `global` when they are the pipeline's.
    pub(super) fn variables(&mut self, node: &Node, global: bool) -> Vec<Variable> {
        let Some(entries) = node.entries() else {
            self.wrong("variables", "a mapping", node);
            return Vec::new();
        };
        let mut variables: Vec<Variable> = Vec::new();
        for entry in entries {
            let Some(variable) = self.variable(entry, global) else { continue };
            set_variable(&mut variables, variable);
        }
        variables
    }

    fn variable(&mut self, entry: &Entry, global: bool) -> Option<Variable> {
        let name = &entry.key;
        let what = format!("variables: {name}");
        let mut raw = false;
        let value = match entry.value.entries() {
            None => Some(&entry.value),
            Some(parts) => {
                for part in parts {
                    match part.key.as_str() {
                        "value" => {}
                        // For people who start pipelines by hand.
                        "description" | "options" if global => {}
                        "expand" => raw = !self.flag(&format!("{what}: expand"), &part.value),
                        word => {
                            let place = format!(" in variable `{name}`");
                            let known: &[&str] = if global {
                                &["value", "description", "options", "expand"]
                            } else {
                                &["value", "expand"]
                            };
                            self.findings.unknown(part.line, self.job, word, &place, known);
                        }
                    }
                }
                entry.value.get("value")
            }
        };
        let value = match value.map(|value| (value, value.scalar_text())) {
            None => String::new(),
            Some((_, Some(text))) => text,
            Some((value, None)) if value.is_null() => String::new(),
            Some((value, None)) => {
                self.wrong(&what, "text, a number, true or false", value);
                return None;
            }
        };
        if let Some(options) = entry.value.get("options") {
            let options = self.words(&format!("{what}: options"), options).unwrap_or_default();
            if !options.contains(&value) {
                let message = format!("`{what}` is `{value}`, which is none of its options");
                self.problem(entry.line, message);
            }
        }
        Some(Variable { name: name.clone(), value, raw })
    }

    /// Reads `artifacts`.
    pub(super) fn artifacts(&mut self, node: &Node) -> Option<Artifacts> {
        let Some(entries) = node.entries() else {
            self.wrong("artifacts", "a mapping", node);
            return None;
        };
        let mut artifacts = Artifacts::default();
        for entry in set(entries) {
            let value = &entry.value;
            match entry.key.as_str() {
                "name" => artifacts.name = self.word("artifacts: name", value),
                "paths" => {
                    artifacts.paths = self.words("artifacts: paths", value).unwrap_or_default();
                }
                "exclude" => {
                    artifacts.exclude = self.words("artifacts: exclude", value).unwrap_or_default();
                }
                "untracked" => artifacts.untracked = self.flag("artifacts: untracked", value),
                "when" => {
                    let known = &["on_success", "on_failure", "always"];
                    artifacts.when = self.one_of("artifacts: when", value, known);
                }
                "expire_in" => artifacts.expire_in = self.word("artifacts: expire_in", value),
                // Who may see them and where they are shown is a matter of GitLab's pages.
                "expose_as" | "public" | "access" => {
                    let message =
                        "`expose_as`, `public` and `access` of artifacts have no effect here";
                    self.findings.remark("artifact pages", entry.line, message);
                }
                "reports" => artifacts.reports = self.reports(value),
                word => {
                    let place = " in `artifacts`";
                    self.findings.unknown(entry.line, self.job, word, place, ARTIFACT_KEYWORDS);
                }
            }
        }
        Some(artifacts)
    }

    fn reports(&mut self, node: &Node) -> Vec<Report> {
        let Some(entries) = node.entries() else {
            self.wrong("artifacts: reports", "a mapping", node);
            return Vec::new();
        };
        let mut reports = Vec::new();
        for entry in set(entries) {
            let what = format!("reports: {}", entry.key);
            if entry.key == "coverage_report" {
                let known = &["cobertura", "jacoco"];
                let format = entry.value.get("coverage_format");
                let kind = format.and_then(|node| self.one_of("coverage_format", node, known));
                let path = entry.value.get("path").and_then(|node| self.words(&what, node));
                match (kind, path) {
                    (Some(kind), Some(paths)) => reports.push(Report { kind, paths }),
                    (_, _) => {
                        let message = format!("`{what}` takes `coverage_format` and `path`");
                        self.problem(entry.line, message);
                    }
                }
            } else if REPORTS.contains(&entry.key.as_str()) {
                let paths = self.words(&what, &entry.value).unwrap_or_default();
                reports.push(Report { kind: entry.key.clone(), paths });
            } else {
                let place = " in `reports`";
                self.findings.unknown(entry.line, self.job, &entry.key, place, REPORTS);
            }
        }
        reports
    }

    /// Reads `cache`: one or a list of them.
    pub(super) fn caches(&mut self, node: &Node) -> Vec<CacheDraft> {
        let items: Vec<&Node> = match node.items() {
            Some(items) => flat(items),
            None => vec![node],
        };
        if items.len() > MAX_CACHES {
            self.problem(node.line, format!("has more than {MAX_CACHES} caches"));
        }
        items.into_iter().filter_map(|item| self.cache(item)).collect()
    }

    fn cache(&mut self, node: &Node) -> Option<CacheDraft> {
        let Some(entries) = node.entries() else {
            self.wrong("cache", "a mapping or a list of them", node);
            return None;
        };
        let mut draft = CacheDraft {
            key: CacheKey::Text("default".to_owned()),
            cache: super::Cache {
                when: "on_success".to_owned(),
                policy: "pull-push".to_owned(),
                ..super::Cache::default()
            },
            unprotect: false,
        };
        for entry in set(entries) {
            let value = &entry.value;
            match entry.key.as_str() {
                "key" => draft.key = self.cache_key(value)?,
                "paths" => draft.cache.paths = self.words("cache: paths", value)?,
                "untracked" => draft.cache.untracked = self.flag("cache: untracked", value),
                "when" => {
                    let known = &["on_success", "on_failure", "always"];
                    draft.cache.when = self.one_of("cache: when", value, known)?;
                }
                "policy" => {
                    let known = &["pull-push", "pull", "push"];
                    draft.cache.policy = self.one_of("cache: policy", value, known)?;
                }
                "unprotect" => draft.unprotect = self.flag("cache: unprotect", value),
                "fallback_keys" => {
                    draft.cache.fallback_keys = self.words("cache: fallback_keys", value)?;
                }
                word => {
                    let place = " in `cache`";
                    self.findings.unknown(entry.line, self.job, word, place, CACHE_KEYWORDS);
                }
            }
        }
        // `cache: {}` is how a job says that it has none.
        let empty = draft.cache.paths.is_empty() && !draft.cache.untracked;
        (!empty).then_some(draft)
    }

    fn cache_key(&mut self, node: &Node) -> Option<CacheKey> {
        let Some(entries) = node.entries() else {
            let text = self.word("cache: key", node)?;
            if matches!(text.as_str(), "." | "..") || text.contains('/') || text.contains("%2F") {
                self.problem(
                    node.line,
                    format!("`cache: key` may not be `{text}`: it becomes a file's name"),
                );
                return None;
            }
            return Some(CacheKey::Text(text));
        };
        let (mut files, mut prefix) = (Vec::new(), String::new());
        for entry in set(entries) {
            match entry.key.as_str() {
                // The commits that changed the files tell as much as their contents.
                "files" | "files_commits" => {
                    files = self.words("cache: key: files", &entry.value)?;
                }
                "prefix" => prefix = self.word("cache: key: prefix", &entry.value)?,
                word => {
                    let known = &["files", "files_commits", "prefix"];
                    self.findings.unknown(entry.line, self.job, word, " in `cache: key`", known);
                }
            }
        }
        Some(CacheKey::Files { files, prefix })
    }

    /// Reads `retry`.
    pub(super) fn retry(&mut self, node: &Node) -> Retry {
        let Some(entries) = node.entries() else {
            return Retry {
                max: self.retries(node),
                when: vec!["always".to_owned()],
                ..Retry::default()
            };
        };
        let mut retry = Retry::default();
        let mut when = None;
        for entry in set(entries) {
            match entry.key.as_str() {
                "max" => retry.max = self.retries(&entry.value),
                "when" => when = self.words("retry: when", &entry.value),
                "exit_codes" => retry.exit_codes = self.numbers("retry: exit_codes", &entry.value),
                word => {
                    let known = &["max", "when", "exit_codes"];
                    self.findings.unknown(entry.line, self.job, word, " in `retry`", known);
                }
            }
        }
        let always =
            || if retry.exit_codes.is_empty() { vec!["always".to_owned()] } else { Vec::new() };
        retry.when = when.unwrap_or_else(always);
        retry
    }

    fn retries(&mut self, node: &Node) -> u32 {
        match node.value {
            Value::Int(0) => 0,
            Value::Int(1) => 1,
            Value::Int(2) => 2,
            Value::Null
            | Value::Bool(_)
            | Value::Int(_)
            | Value::Float(_)
            | Value::Text(_)
            | Value::List(_)
            | Value::Map(_)
            | Value::Reference(_) => {
                self.problem(node.line, "`retry` takes 0, 1 or 2");
                0
            }
        }
    }

    /// Reads a number or a list of them.
    pub(super) fn numbers(&mut self, keyword: &str, node: &Node) -> Vec<i32> {
        let items = node.items().map_or_else(|| vec![node], flat);
        let mut numbers = Vec::new();
        for item in items {
            let number = if let Value::Int(number) = item.value { Some(number) } else { None };
            match number.map(i32::try_from) {
                Some(Ok(number)) => numbers.push(number),
                Some(Err(_)) | None => self.wrong(keyword, "a number or a list of them", item),
            }
        }
        numbers
    }

    /// Reads `image`, or one of `services`.
    pub(super) fn image(&mut self, keyword: &str, node: &Node) -> Option<Image> {
        if let Some(name) = node.text() {
            return Some(Image { name: name.to_owned(), alias: None });
        }
        let name = node.get("name").and_then(|name| name.scalar_text());
        if name.is_none() {
            self.wrong(keyword, "a name, or a mapping with one", node);
        }
        let alias = node.get("alias").and_then(|alias| alias.scalar_text());
        Some(Image { name: name?, alias })
    }

    /// Reads `services`.
    pub(super) fn services(&mut self, node: &Node) -> Vec<Image> {
        let Some(items) = node.items() else {
            self.wrong("services", "a list", node);
            return Vec::new();
        };
        flat(items).into_iter().filter_map(|item| self.image("services", item)).collect()
    }

    /// Reads `environment`.
    pub(super) fn environment(&mut self, entry: &Entry) -> Option<Environment> {
        self.without_effect(entry);
        let node = &entry.value;
        if let Some(name) = node.scalar_text() {
            return Some(Environment { name, ..Environment::default() });
        }
        let Some(entries) = node.entries() else {
            self.wrong("environment", "a name or a mapping", node);
            return None;
        };
        let known =
            &["name", "url", "on_stop", "action", "auto_stop_in", "deployment_tier", "kubernetes"];
        for part in entries.iter().filter(|part| !known.contains(&part.key.as_str())) {
            self.findings.unknown(part.line, self.job, &part.key, " in `environment`", known);
        }
        let text = |key: &str| node.get(key).and_then(|node| node.scalar_text());
        Some(Environment {
            name: text("name")?,
            url: text("url"),
            action: text("action"),
            tier: text("deployment_tier"),
        })
    }

    /// Reads `hooks`.
    pub(super) fn hooks(&mut self, node: &Node) -> Vec<(String, Vec<String>)> {
        let mut hooks = Vec::new();
        for entry in set(node.entries().unwrap_or_default()) {
            let known = "pre_get_sources_script";
            if entry.key == known {
                let lines = self.script("hooks: pre_get_sources_script", &entry.value);
                hooks.push((known.to_owned(), lines.unwrap_or_default()));
            } else {
                self.findings.unknown(entry.line, self.job, &entry.key, " in `hooks`", &[known]);
            }
        }
        hooks
    }

    /// Reads `parallel`.
    pub(super) fn parallel(&mut self, node: &Node) -> Option<Parallel> {
        if let Value::Int(count) = node.value {
            let count = u32::try_from(count).ok().filter(|count| (1..=200).contains(count));
            if count.is_none() {
                self.problem(
                    node.line,
                    format!("`parallel` takes a number from 1 to {MAX_PARALLEL}"),
                );
            }
            return count.map(Parallel::Count);
        }
        let Some(matrix) = node.get("matrix") else {
            self.wrong("parallel", "a number or `matrix`", node);
            return None;
        };
        let matrix = self.matrix(matrix)?;
        let count = combinations(&matrix).len();
        if count == 0 || count > MAX_PARALLEL {
            let message = format!("`parallel: matrix` makes none or more than {MAX_PARALLEL} jobs");
            self.problem(node.line, message);
            return None;
        }
        Some(Parallel::Matrix(matrix))
    }

    /// Reads the rows of a matrix.
    pub(super) fn matrix(&mut self, node: &Node) -> Option<Matrix> {
        let Some(items) = node.items() else {
            self.wrong("matrix", "a list of mappings", node);
            return None;
        };
        let mut rows = Vec::new();
        for item in flat(items) {
            let Some(entries) = item.entries() else {
                self.wrong("matrix", "a list of mappings", item);
                return None;
            };
            let mut row = Vec::new();
            for entry in entries {
                let values = self.words(&format!("matrix: {}", entry.key), &entry.value)?;
                row.push((entry.key.clone(), values));
            }
            rows.push(row);
        }
        Some(rows)
    }
}

/// Sets a variable; one that is there keeps its place.
pub(super) fn set_variable(variables: &mut Vec<Variable>, variable: Variable) {
    match variables.iter_mut().find(|known| known.name == variable.name) {
        Some(old) => *old = variable,
        None => variables.push(variable),
    }
}
