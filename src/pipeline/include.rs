//! `include:local`: a pipeline of several files, read from the folder.
//!
//! What a file includes lies below it: mappings merge, everything else of the including file
//! replaces. Other kinds of include name places that are not on this machine.

use std::sync::Arc;

use camino::{Utf8Path, Utf8PathBuf};

use super::error::Findings;
use super::expand::Scope;
use super::extends::merge_deep;
use super::glob::Pattern;
use super::inputs::{self, Given};
use super::read::Reader;
use super::rules::RuleWhen;
use super::yaml::{self, Entry, Node, Value};
use super::{MAX_BYTES, Project};

/// Most files of one pipeline; GitLab's own limit.
const MAX_FILES: usize = 150;

/// Most paths that are looked at for a pattern.
const MAX_WALK: usize = 200_000;

/// What reading needs besides the files.
pub(super) struct Includer<'a> {
    pub(super) project: &'a Project,
    /// Predefined variables and those given for the pipeline.
    pub(super) scope: &'a Scope,
    pub(super) findings: &'a mut Findings,
    /// The files being read, outermost first.
    trail: Vec<Utf8PathBuf>,
    files: usize,
}

/// What one entry of `include` asks for.
struct Wanted {
    path: String,
    line: usize,
    inputs: Vec<(String, Given)>,
}

impl<'a> Includer<'a> {
    pub(super) fn new(project: &'a Project, scope: &'a Scope, findings: &'a mut Findings) -> Self {
        Self { project, scope, findings, trail: Vec::new(), files: 0 }
    }

    /// Reads a file with all it includes; `line` is where its inputs were given.
    pub(super) fn file(
        &mut self,
        text: &str,
        name: &str,
        given: &[(String, Given)],
        line: usize,
    ) -> Option<Arc<Node>> {
        let base = self.findings.open(name, text);
        if text.len() > MAX_BYTES {
            let message = format!("larger than {} MiB", MAX_BYTES / 1024 / 1024);
            self.findings.problem(base + 1, None, message);
            return None;
        }
        let document = match yaml::load(text, base) {
            Ok(document) => document,
            Err(faults) => {
                for fault in faults {
                    self.findings.problem(fault.line, None, fault.message);
                }
                return None;
            }
        };
        for fault in document.duplicates {
            self.findings.note(fault.line, None, fault.message);
        }
        let line = if line == 0 { base + 1 } else { line };
        let root = inputs::interpolate(
            document.header.as_ref(),
            &document.root,
            given,
            line,
            self.scope,
            self.findings,
        );
        let Some(entries) = root.entries() else {
            let message = if root.is_null() {
                "is empty".to_owned()
            } else {
                format!("is {}, not a mapping of jobs", root.kind())
            };
            self.findings.problem(root.line, None, message);
            return None;
        };
        let Some(include) = entries.iter().find(|entry| entry.key == "include") else {
            return Some(root);
        };
        let mut below = Node::new(root.line, Value::Map(Vec::new()));
        for wanted in self.wanted(include) {
            for included in self.local(&wanted) {
                below = merge_deep(&below, &included);
            }
        }
        let rest = entries.iter().filter(|entry| entry.key != "include").cloned().collect();
        Some(merge_deep(&below, &Node::new(root.line, Value::Map(rest))))
    }

    fn wanted(&mut self, include: &Entry) -> Vec<Wanted> {
        let items: Vec<Arc<Node>> = match include.value.items() {
            Some(items) => items.to_vec(),
            None => vec![Arc::clone(&include.value)],
        };
        let mut wanted = Vec::new();
        for item in items {
            if let Some(text) = item.text() {
                if text.starts_with("http://") || text.starts_with("https://") {
                    self.elsewhere("remote", text, item.line);
                } else {
                    let path = text.to_owned();
                    wanted.push(Wanted { path, line: item.line, inputs: Vec::new() });
                }
            } else if let Some(entries) = item.entries() {
                wanted.extend(self.entry(&item, entries));
            } else if !item.is_null() {
                let message = format!("`include` takes paths and mappings, not {}", item.kind());
                self.findings.problem(item.line, None, message);
            }
        }
        wanted
    }

    fn entry(&mut self, item: &Node, entries: &[Entry]) -> Option<Wanted> {
        if let Some(rules) = item.get("rules")
            && !self.rules_let(rules)
        {
            return None;
        }
        for kind in ["remote", "template", "project", "component", "artifact"] {
            if let Some(what) = item.get(kind) {
                let what = what.text().unwrap_or_default().to_owned();
                self.elsewhere(kind, &what, item.line);
                return None;
            }
        }
        for entry in entries {
            if !matches!(entry.key.as_str(), "local" | "rules" | "inputs") {
                let what = format!("`include: {}`", entry.key);
                self.findings.unsupported(entry.line, None, &what);
            }
        }
        let Some(path) = item.get("local").and_then(|node| node.text()) else {
            self.findings.problem(item.line, None, "an entry of `include` names no file");
            return None;
        };
        let inputs = item.get("inputs").and_then(|inputs| inputs.entries()).unwrap_or_default();
        let given = |entry: &Entry| (entry.key.clone(), Given::Node(Arc::clone(&entry.value)));
        let inputs = inputs.iter().map(given).collect();
        Some(Wanted { path: path.to_owned(), line: item.line, inputs })
    }

    fn elsewhere(&mut self, kind: &str, what: &str, line: usize) {
        let sentence = match kind {
            "remote" => "is on another server",
            "template" => "is part of GitLab",
            "project" => "is in another project",
            "component" => "is in GitLab's catalogue",
            _ => "is made by another job",
        };
        self.findings.left_out(line, &format!("`include: {kind}` (`{what}`), which {sentence},"));
    }

    fn rules_let(&mut self, rules: &Node) -> bool {
        let mut reader = Reader { findings: self.findings, job: None };
        let rules = reader.rules(rules);
        for rule in &rules {
            match rule.matches(self.scope, self.project) {
                Ok(false) => {}
                Ok(true) => return rule.when != Some(RuleWhen::Never),
                Err(message) => {
                    self.findings.problem(rule.line, None, message);
                    return false;
                }
            }
        }
        false
    }

    fn local(&mut self, wanted: &Wanted) -> Vec<Arc<Node>> {
        let expanded = self.scope.expand_nested(&wanted.path);
        let path = expanded.trim_start_matches('/');
        let problem = |includer: &mut Self, message: String| {
            includer.findings.problem(wanted.line, None, message);
            Vec::new()
        };
        if !path.ends_with(".yml") && !path.ends_with(".yaml") {
            return problem(
                self,
                format!("`include: local` (`{path}`) ends in neither .yml nor .yaml"),
            );
        }
        if path.split('/').any(|part| part == "..") {
            return problem(self, format!("`include: local` (`{path}`) leads out of the project"));
        }
        let paths = if path.contains('*') {
            let found = self.find(path);
            if found.is_empty() {
                self.findings.note(wanted.line, None, format!("no file fits `include: {path}`"));
            }
            found
        } else {
            vec![Utf8PathBuf::from(path)]
        };
        let mut read = Vec::new();
        for path in paths {
            self.files += 1;
            if self.files > MAX_FILES {
                return problem(self, format!("the pipeline has more than {MAX_FILES} files"));
            }
            if self.trail.contains(&path) {
                let names: Vec<&str> = self.trail.iter().map(|path| path.as_str()).collect();
                let circle = format!("{} → {path}", names.join(" → "));
                return problem(self, format!("`include` goes round in a circle: {circle}"));
            }
            let full = self.project.root.join(&path);
            let text = match self.read(&full) {
                Ok(text) => text,
                Err(why) => return problem(self, format!("cannot include `{path}`: {why}")),
            };
            self.trail.push(path);
            read.extend(self.file(&text, full.as_str(), &wanted.inputs, wanted.line));
            self.trail.pop();
        }
        read
    }

    /// Reads a file of the project; a link may not lead out of it.
    fn read(&self, full: &Utf8Path) -> Result<String, String> {
        let inside = |path: &Utf8Path| path.canonicalize_utf8().map_err(|error| error.to_string());
        let root = if self.project.root.as_str().is_empty() {
            Utf8Path::new(".")
        } else {
            &self.project.root
        };
        if !inside(full)?.starts_with(inside(root)?) {
            return Err("it leads out of the project".to_owned());
        }
        std::fs::read_to_string(full).map_err(|error| error.to_string())
    }

    /// Finds the files that fit a pattern, in the order of their names.
    fn find(&self, pattern: &str) -> Vec<Utf8PathBuf> {
        let pattern = Pattern::new(pattern);
        let mut found = Vec::new();
        let mut open = vec![Utf8PathBuf::new()];
        let mut seen = 0;
        while let Some(folder) = open.pop() {
            let Ok(entries) = self.project.root.join(&folder).read_dir_utf8() else { continue };
            for entry in entries.flatten() {
                seen += 1;
                if seen > MAX_WALK {
                    return found;
                }
                let path = folder.join(entry.file_name());
                match entry.file_type() {
                    Ok(kind) if kind.is_dir() && entry.file_name() != ".git" => open.push(path),
                    Ok(kind) if !kind.is_dir() && pattern.matches(path.as_str()) => {
                        found.push(path);
                    }
                    Ok(_) | Err(_) => {}
                }
            }
        }
        found.sort();
        found
    }
}
