//! `extends`: a job takes over what others say, and says the rest itself.
//!
//! Mappings merge, everything else replaces; later bases win over earlier ones and the job over
//! all. Runs before `!reference` is followed, so that a reference sees jobs as they have become.

use std::collections::HashMap;
use std::sync::Arc;

use super::error::Findings;
use super::yaml::{Entry, Node, Value, put};

/// Longest chain of bases that GitLab follows.
const MAX_LEVELS: usize = 10;

/// Gives the document with every `extends` carried out; entries where that failed are left out.
pub(super) fn expand(root: &[Entry], findings: &mut Findings) -> Vec<Entry> {
    let places =
        root.iter().enumerate().map(|(place, entry)| (entry.key.as_str(), place)).collect();
    let mut extender = Extender { root, places, done: HashMap::new(), findings };
    let mut expanded = Vec::with_capacity(root.len());
    for (place, entry) in root.iter().enumerate() {
        if let Some((node, _)) = extender.expand(place, &mut Vec::new()) {
            expanded.push(Entry { key: entry.key.clone(), line: entry.line, value: node });
        }
    }
    expanded
}

struct Extender<'a> {
    root: &'a [Entry],
    places: HashMap<&'a str, usize>,
    /// What an entry has become and how long its longest chain of bases is.
    done: HashMap<usize, Option<(Arc<Node>, usize)>>,
    findings: &'a mut Findings,
}

impl Extender<'_> {
    fn expand(&mut self, place: usize, trail: &mut Vec<usize>) -> Option<(Arc<Node>, usize)> {
        if let Some(done) = self.done.get(&place) {
            return done.clone();
        }
        let entry = &self.root[place];
        let bases = entry.value.entries().and_then(|own| own.iter().find(|e| e.key == "extends"));
        let expanded = match bases {
            None => Some((Arc::clone(&entry.value), 0)),
            Some(bases) => {
                trail.push(place);
                let expanded = self.merge(entry, bases, trail);
                trail.pop();
                expanded
            }
        };
        self.done.insert(place, expanded.clone());
        expanded
    }

    fn merge(
        &mut self,
        entry: &Entry,
        bases: &Entry,
        trail: &mut Vec<usize>,
    ) -> Option<(Arc<Node>, usize)> {
        let job = Some(entry.key.as_str());
        let Some(names) = names_of(&bases.value) else {
            let message =
                format!("`extends` takes a name or a list of names, not {}", bases.value.kind());
            self.findings.problem(bases.line, job, message);
            return None;
        };
        let mut merged = Node::new(entry.line, Value::Map(Vec::new()));
        let mut longest = 0;
        let mut fine = true;
        for name in names {
            let Some(&base) = self.places.get(name) else {
                let message = format!("extends `{name}`, which does not exist");
                self.findings.missing(bases.line, job, &message);
                fine = false;
                continue;
            };
            if let Some(start) = trail.iter().position(|place| *place == base) {
                let mut circle: Vec<&str> =
                    trail[start..].iter().map(|place| self.root[*place].key.as_str()).collect();
                circle.push(name);
                let message = format!("`extends` goes round in a circle: {}", circle.join(" → "));
                self.findings.problem(bases.line, job, message);
                fine = false;
                continue;
            }
            // The bound on the trail keeps a chain of thousands from filling the stack.
            let expanded =
                if trail.len() > MAX_LEVELS { None } else { Some(self.expand(base, trail)) };
            match expanded {
                // What is wrong with the base is said at the base.
                Some(None) => fine = false,
                Some(Some((_, levels))) if levels >= MAX_LEVELS => {
                    self.too_deep(bases.line, job);
                    fine = false;
                }
                None => {
                    self.too_deep(bases.line, job);
                    fine = false;
                }
                Some(Some((node, _))) if node.entries().is_none() => {
                    let message =
                        format!("extends `{name}`, which is {}, not a mapping", node.kind());
                    self.findings.problem(bases.line, job, message);
                    fine = false;
                }
                Some(Some((node, levels))) => {
                    longest = longest.max(levels + 1);
                    merged = merge_deep(&merged, &node);
                }
            }
        }
        if !fine {
            return None;
        }
        let merged = merge_deep(&merged, &entry.value);
        let entries = merged.entries().unwrap_or_default();
        let rest = entries.iter().filter(|entry| entry.key != "extends").cloned().collect();
        Some((Node::new(entry.line, Value::Map(rest)), longest))
    }

    fn too_deep(&mut self, line: usize, job: Option<&str>) {
        let message = format!("`extends` goes deeper than {MAX_LEVELS} levels");
        self.findings.problem(line, job, message);
    }
}

fn names_of(node: &Node) -> Option<Vec<&str>> {
    match node.text() {
        Some(name) => Some(vec![name]),
        None => node.items()?.iter().map(|item| item.text()).collect(),
    }
}

/// Lays one value over another: mappings merge, anything else replaces.
pub(super) fn merge_deep(base: &Arc<Node>, over: &Arc<Node>) -> Arc<Node> {
    let (Some(below), Some(above)) = (base.entries(), over.entries()) else {
        return Arc::clone(over);
    };
    let mut merged = below.to_vec();
    for entry in above {
        let value = match base.get(&entry.key) {
            Some(old) => merge_deep(old, &entry.value),
            None => Arc::clone(&entry.value),
        };
        put(&mut merged, Entry { key: entry.key.clone(), line: entry.line, value });
    }
    Node::new(over.line, Value::Map(merged))
}
