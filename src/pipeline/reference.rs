//! `!reference [job, keyword, …]`: the value that stands at another place of the file.

use std::collections::HashMap;
use std::sync::Arc;

use super::error::Findings;
use super::yaml::{Entry, MAX_NODES, Node, Value};

/// Most steps of recursion, over nesting and over references to references alike.
///
/// Files nest a handful of levels; the bound only keeps a long chain from filling the stack.
const MAX_STEPS: usize = 300;

/// Gives the document with every reference replaced; entries where that failed are left out.
pub(super) fn resolve(root: &[Entry], findings: &mut Findings) -> Vec<Entry> {
    let mut resolver =
        Resolver { root, followed: HashMap::new(), trail: Vec::new(), steps: 0, findings };
    let mut resolved = Vec::with_capacity(root.len());
    for entry in root {
        if let Some(value) = resolver.node(&entry.value, &entry.key) {
            resolved.push(Entry { key: entry.key.clone(), line: entry.line, value });
        }
    }
    resolved
}

struct Resolver<'a> {
    root: &'a [Entry],
    followed: HashMap<Vec<String>, Option<Arc<Node>>>,
    /// References being followed, outermost first.
    trail: Vec<Vec<String>>,
    steps: usize,
    findings: &'a mut Findings,
}

impl Resolver<'_> {
    /// Resolves a node and all below it; `None` once something is wrong, which has then been said.
    fn node(&mut self, node: &Arc<Node>, job: &str) -> Option<Arc<Node>> {
        if self.steps >= MAX_STEPS {
            self.findings.problem(node.line, Some(job), "references are nested too deeply");
            return None;
        }
        self.steps += 1;
        let resolved = match &node.value {
            Value::Reference(path) => self.follow(path, node.line, job),
            Value::List(items) => {
                // No short cut at the first failure: each reference is to be reported.
                let items: Vec<_> = items.iter().map(|item| self.node(item, job)).collect();
                items
                    .into_iter()
                    .collect::<Option<_>>()
                    .map(Value::List)
                    .map(|v| Node::new(node.line, v))
            }
            Value::Map(entries) => {
                let entries: Vec<_> = entries
                    .iter()
                    .map(|entry| {
                        let value = self.node(&entry.value, job)?;
                        Some(Entry { key: entry.key.clone(), line: entry.line, value })
                    })
                    .collect();
                entries
                    .into_iter()
                    .collect::<Option<_>>()
                    .map(Value::Map)
                    .map(|v| Node::new(node.line, v))
            }
            Value::Null | Value::Bool(_) | Value::Int(_) | Value::Float(_) | Value::Text(_) => {
                Some(Arc::clone(node))
            }
        };
        self.steps -= 1;
        let resolved = resolved?;
        if resolved.nodes > MAX_NODES {
            let message = "too large once its references are written out";
            self.findings.problem(node.line, Some(job), message);
            return None;
        }
        Some(resolved)
    }

    fn follow(&mut self, path: &[String], line: usize, job: &str) -> Option<Arc<Node>> {
        if self.trail.iter().any(|open| open == path) {
            let message = format!("`!reference {}` leads back to itself", shown(path));
            self.findings.problem(line, Some(job), message);
            return None;
        }
        if let Some(known) = self.followed.get(path) {
            return known.clone();
        }
        let Some(target) = self.find(path) else {
            let message = format!("`!reference {}` leads nowhere", shown(path));
            self.findings.missing(line, Some(job), &message);
            return None;
        };
        self.trail.push(path.to_vec());
        let resolved = self.node(&target, job);
        self.trail.pop();
        self.followed.insert(path.to_vec(), resolved.clone());
        resolved
    }

    fn find(&self, path: &[String]) -> Option<Arc<Node>> {
        let (first, rest) = path.split_first()?;
        let mut found = &self.root.iter().find(|entry| entry.key == *first)?.value;
        for key in rest {
            found = found.get(key)?;
        }
        // GitLab takes an empty value for a missing one.
        if found.is_null() { None } else { Some(Arc::clone(found)) }
    }
}

fn shown(path: &[String]) -> String {
    format!("[{}]", path.join(", "))
}
