//! `rules`, `only` and `except`: whether a job is in the pipeline, and what the rule changes of it.

use std::sync::Arc;

use super::error::Findings;
use super::expand::Scope;
use super::expression::{self, Expression};
use super::glob::Pattern;
use super::read::{Reader, Wish, flat, set};
use super::yaml::{Entry, Node, Value};
use super::{Project, Variable, When};

/// Most comparisons for `exists` and `changes`, beyond which a rule counts as fulfilled; GitLab's.
const MAX_COMPARISONS: usize = 50_000;

const RULE_KEYWORDS: &[&str] = &[
    "if",
    "changes",
    "exists",
    "when",
    "allow_failure",
    "variables",
    "needs",
    "interruptible",
    "auto_cancel",
    "start_in",
];

/// One rule.
#[derive(Debug)]
pub(super) struct Rule {
    pub(super) line: usize,
    condition: Option<Expression>,
    changes: Option<Changes>,
    exists: Option<Vec<String>>,
    pub(super) when: Option<RuleWhen>,
    pub(super) allow_failure: Option<bool>,
    pub(super) variables: Vec<Variable>,
    pub(super) needs: Option<Vec<Wish>>,
}

/// What a rule says about when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RuleWhen {
    /// The job is in the pipeline.
    Job(When),
    Never,
}

#[derive(Debug)]
struct Changes {
    paths: Vec<String>,
    compare_to: Option<String>,
}

/// `only` or `except`.
#[derive(Debug, Default)]
pub(super) struct Policy {
    pub(super) line: usize,
    refs: Option<Vec<String>>,
    variables: Option<Vec<Expression>>,
    changes: Option<Vec<String>>,
    /// Whether it asks for a cluster that is not there.
    kubernetes: bool,
}

impl Rule {
    /// Whether all that the rule asks for is so.
    pub(super) fn matches(&self, scope: &Scope, project: &Project) -> Result<bool, String> {
        if let Some(condition) = &self.condition
            && !condition.holds(scope).map_err(|error| format!("`if` {error}"))?
        {
            return Ok(false);
        }
        if let Some(changes) = &self.changes
            && !changes.hold(scope, project)?
        {
            return Ok(false);
        }
        let Some(exists) = &self.exists else { return Ok(true) };
        let patterns: Vec<String> = exists.iter().map(|path| scope.expand(path)).collect();
        Ok(project.has_file(&patterns, MAX_COMPARISONS))
    }
}

impl Changes {
    fn hold(&self, scope: &Scope, project: &Project) -> Result<bool, String> {
        let since = match &self.compare_to {
            Some(reference) => Some(project.changed_since(&scope.expand_nested(reference))?),
            None => project.changed.clone(),
        };
        Ok(since.is_none_or(|changed| any_fits(&self.paths, &changed, scope)))
    }
}

fn any_fits(patterns: &[String], paths: &[String], scope: &Scope) -> bool {
    if patterns.len().saturating_mul(paths.len()) > MAX_COMPARISONS {
        return true;
    }
    let patterns: Vec<Pattern> =
        patterns.iter().map(|pattern| Pattern::new(&scope.expand_nested(pattern))).collect();
    paths.iter().any(|path| patterns.iter().any(|pattern| pattern.matches(path)))
}

impl Policy {
    /// Names what it has that is so, and what is not.
    fn parts(&self, scope: &Scope, project: &Project) -> Result<Vec<(&'static str, bool)>, String> {
        let mut parts = Vec::new();
        if let Some(refs) = &self.refs {
            let mut fits = false;
            for wanted in refs {
                fits |= ref_fits(wanted, scope, project)?;
            }
            parts.push(("refs", fits));
        }
        if let Some(variables) = &self.variables {
            let mut holds = false;
            for expression in variables {
                holds |= expression.holds(scope)?;
            }
            parts.push(("variables", holds));
        }
        if let Some(changes) = &self.changes {
            let changed = project.changed.as_ref();
            let fits = changed.is_none_or(|changed| any_fits(changes, changed, scope));
            parts.push(("changes", fits));
        }
        if self.kubernetes {
            parts.push(("kubernetes", false));
        }
        Ok(parts)
    }

    /// Gives the first part that keeps an `only` from letting the job in.
    pub(super) fn lacks(
        &self,
        scope: &Scope,
        project: &Project,
    ) -> Result<Option<&'static str>, String> {
        let parts = self.parts(scope, project)?;
        Ok(parts.into_iter().find(|(_, fits)| !fits).map(|(name, _)| name))
    }

    /// Gives the first part by which an `except` leaves the job out.
    pub(super) fn has(
        &self,
        scope: &Scope,
        project: &Project,
    ) -> Result<Option<&'static str>, String> {
        let parts = self.parts(scope, project)?;
        Ok(parts.into_iter().find(|(_, fits)| *fits).map(|(name, _)| name))
    }
}

/// Whether a word of `refs` means this pipeline.
fn ref_fits(wanted: &str, scope: &Scope, project: &Project) -> Result<bool, String> {
    let (pattern, path) = match wanted.rsplit_once('@') {
        // An @ inside of a regular expression is not the one before a project.
        Some((pattern, path))
            if !path.contains(['/', '$'])
                || pattern.ends_with(['/', 'i', 'm', 's', 'U'])
                || !pattern.starts_with('/') =>
        {
            (pattern, Some(path))
        }
        Some(_) | None => (wanted, None),
    };
    if path.is_some_and(|path| scope.get("CI_PROJECT_PATH") != Some(path)) {
        return Ok(false);
    }
    let source = scope.get("CI_PIPELINE_SOURCE").unwrap_or("push");
    let plural = match source {
        "push" => "pushes",
        "web" => "web",
        "api" => "api",
        "trigger" => "triggers",
        "schedule" => "schedules",
        "pipeline" => "pipelines",
        "merge_request_event" => "merge_requests",
        "external_pull_request_event" => "external_pull_requests",
        source => source,
    };
    if pattern == source || pattern == plural {
        return Ok(true);
    }
    if pattern == "tags" || pattern == "branches" {
        return Ok((pattern == "tags") == project.tag);
    }
    match expression::regex(pattern) {
        Some(regex) => Ok(regex?.is_match(&project.ref_name)),
        None => Ok(pattern == project.ref_name),
    }
}

impl Reader<'_> {
    /// Reads `rules` of a job, of `workflow` or of an include.
    pub(super) fn rules(&mut self, node: &Node) -> Vec<Rule> {
        let Some(items) = node.items() else {
            self.wrong("rules", "a list of rules", node);
            return Vec::new();
        };
        let items = flat(items);
        items.into_iter().filter_map(|item| self.rule(item)).collect()
    }

    fn rule(&mut self, node: &Node) -> Option<Rule> {
        let Some(entries) = node.entries() else {
            self.wrong("rules", "mappings", node);
            return None;
        };
        let mut rule = Rule {
            line: node.line,
            condition: None,
            changes: None,
            exists: None,
            when: None,
            allow_failure: None,
            variables: Vec::new(),
            needs: None,
        };
        for entry in set(entries) {
            let value = &entry.value;
            match entry.key.as_str() {
                "if" => rule.condition = Some(self.expression("if", value)?),
                "changes" => rule.changes = self.changes(value),
                "exists" => rule.exists = self.exists(value),
                "when" => rule.when = self.rule_when(value),
                "allow_failure" => match value.value {
                    Value::Bool(allowed) => rule.allow_failure = Some(allowed),
                    Value::Null
                    | Value::Int(_)
                    | Value::Float(_)
                    | Value::Text(_)
                    | Value::List(_)
                    | Value::Map(_)
                    | Value::Reference(_) => {
                        self.wrong("rules: allow_failure", "true or false", value);
                    }
                },
                "variables" => rule.variables = self.variables(value, false),
                "needs" => rule.needs = self.needs(value),
                "interruptible" | "auto_cancel" => self.without_effect(entry),
                "start_in" => self.delayed(entry.line),
                word => {
                    let place = " in `rules`";
                    self.findings.unknown(entry.line, self.job, word, place, RULE_KEYWORDS);
                }
            }
        }
        Some(rule)
    }

    fn rule_when(&mut self, node: &Node) -> Option<RuleWhen> {
        if node.text() == Some("never") {
            return Some(RuleWhen::Never);
        }
        Some(RuleWhen::Job(self.when(node)))
    }

    fn expression(&mut self, keyword: &str, node: &Node) -> Option<Expression> {
        let Some(text) = node.scalar_text() else {
            self.wrong(keyword, "an expression", node);
            return None;
        };
        match Expression::parse(&text) {
            Ok(expression) => Some(expression),
            Err(error) => {
                self.problem(node.line, format!("`{keyword}` {error}"));
                None
            }
        }
    }

    fn changes(&mut self, node: &Node) -> Option<Changes> {
        if node.entries().is_none() {
            return Some(Changes { paths: self.words("changes", node)?, compare_to: None });
        }
        let mut changes = Changes { paths: Vec::new(), compare_to: None };
        for entry in set(node.entries().unwrap_or_default()) {
            match entry.key.as_str() {
                "paths" => changes.paths = self.words("changes: paths", &entry.value)?,
                "compare_to" => match entry.value.text() {
                    Some(text) => changes.compare_to = Some(text.to_owned()),
                    None => self.wrong("changes: compare_to", "a branch", &entry.value),
                },
                word => {
                    let known = &["paths", "compare_to"];
                    self.findings.unknown(entry.line, self.job, word, " in `changes`", known);
                }
            }
        }
        Some(changes)
    }

    fn exists(&mut self, node: &Node) -> Option<Vec<String>> {
        if node.entries().is_none() {
            return self.words("exists", node);
        }
        let mut paths = None;
        for entry in set(node.entries().unwrap_or_default()) {
            match entry.key.as_str() {
                "paths" => paths = self.words("exists: paths", &entry.value),
                "project" | "ref" => {
                    let what = format!("`exists: {}`", entry.key);
                    self.findings.unsupported(entry.line, self.job, &what);
                }
                word => {
                    self.findings.unknown(entry.line, self.job, word, " in `exists`", &["paths"]);
                }
            }
        }
        paths
    }

    /// Reads `only` or `except`.
    pub(super) fn policy(&mut self, entry: &Entry) -> Policy {
        let mut policy = Policy { line: entry.line, ..Policy::default() };
        let node = &entry.value;
        let Some(entries) = node.entries() else {
            policy.refs = self.words(&entry.key, node);
            return policy;
        };
        for part in set(entries) {
            let what = format!("{}: {}", entry.key, part.key);
            match part.key.as_str() {
                "refs" => policy.refs = self.words(&what, &part.value),
                "changes" => policy.changes = self.words(&what, &part.value),
                "kubernetes" => policy.kubernetes = true,
                "variables" => {
                    let items: Vec<Arc<Node>> = part.value.items().unwrap_or_default().to_vec();
                    let expressions = items.iter().filter_map(|item| self.expression(&what, item));
                    policy.variables = Some(expressions.collect());
                }
                word => {
                    let place = format!(" in `{}`", entry.key);
                    let known = &["refs", "variables", "changes", "kubernetes"];
                    self.findings.unknown(part.line, self.job, word, &place, known);
                }
            }
        }
        policy
    }

    /// Notes a keyword that a single run has no use for.
    pub(super) fn without_effect(&mut self, entry: &Entry) {
        without_effect(self.findings, entry);
    }

    /// Notes that nothing is put off.
    pub(super) fn delayed(&mut self, line: usize) {
        let message = "`when: delayed` starts jobs at once, without `start_in`";
        self.findings.remark("delayed", line, message);
    }
}

fn without_effect(findings: &mut Findings, entry: &Entry) {
    let (topic, message) = match entry.key.as_str() {
        "image" => ("image", "`image` is not used: jobs run on the machine itself"),
        "services" => ("services", "`services` are not started"),
        "tags" => ("tags", "`tags` are ignored: the chosen backend runs every job"),
        "coverage" => ("coverage", "`coverage` is not looked for in the trace"),
        "release" => ("release", "`release` makes no release here"),
        "environment" => {
            ("environment", "`environment` is not deployed to; jobs get its variables")
        }
        "resource_group" => ("resource_group", "`resource_group` holds no job back"),
        "pages" | "publish" => ("pages", "`pages` are not published"),
        "manual_confirmation" => ("manual_confirmation", "`manual_confirmation` asks nobody here"),
        "auto_cancel" | "interruptible" => {
            ("interruptible", "`interruptible` and `auto_cancel` have no effect on a single run")
        }
        _ => ("other", "a keyword has no effect here"),
    };
    findings.remark(topic, entry.line, message);
}
