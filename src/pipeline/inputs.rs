//! `spec:inputs` and `$[[ inputs.name ]]`: a file with holes that whoever includes it fills.

use std::sync::Arc;

use regex::Regex;

use super::error::Findings;
use super::expand::Scope;
use super::yaml::{self, Entry, Node, Value};

/// Most functions behind one name; GitLab's own limit.
const MAX_FUNCTIONS: usize = 3;

/// What is given to a file.
#[derive(Clone, Debug)]
pub(super) enum Given {
    /// By an include: with a type of its own.
    Node(Arc<Node>),
    /// On the command line: read as the type that the file asks for.
    Text(String),
}

/// One input that a file declares.
struct Spec<'a> {
    name: &'a str,
    line: usize,
    kind: &'a str,
    default: Option<&'a Arc<Node>>,
    options: Option<&'a [Arc<Node>]>,
    pattern: Option<Regex>,
}

/// Fills a file's holes from its header and what was given; `line` is where it was given.
pub(super) fn interpolate(
    header: Option<&Arc<Node>>,
    root: &Arc<Node>,
    given: &[(String, Given)],
    line: usize,
    scope: &Scope,
    findings: &mut Findings,
) -> Arc<Node> {
    let Some(spec) = header.and_then(|header| header.get("spec")) else {
        for (name, _) in given {
            let message = format!("input `{name}` is given to a file that declares no inputs");
            findings.problem(line, None, message);
        }
        return Arc::clone(root);
    };
    for entry in spec.entries().unwrap_or_default() {
        if !matches!(entry.key.as_str(), "inputs" | "description") {
            findings.unsupported(entry.line, None, &format!("`spec: {}`", entry.key));
        }
    }
    let mut values = Vec::new();
    let declared = spec.get("inputs");
    if let Some(declared) =
        declared.filter(|inputs| inputs.entries().is_none() && !inputs.is_null())
    {
        findings.problem(declared.line, None, "`spec: inputs` takes a mapping");
    }
    let declared = declared.and_then(|inputs| inputs.entries()).unwrap_or_default();
    for entry in declared {
        let Some(spec) = read_spec(entry, findings) else { continue };
        let own = given.iter().find(|(name, _)| *name == entry.key).map(|(_, given)| given);
        match value_of(&spec, own) {
            Ok(value) => values.push((entry.key.clone(), value)),
            Err(message) => {
                let place = if own.is_some() { line } else { spec.line };
                findings.problem(place, None, format!("input `{}` {message}", spec.name));
            }
        }
    }
    for (name, _) in given {
        if !declared.iter().any(|entry| entry.key == *name) {
            let message = format!("input `{name}` is not declared by the file it is given to");
            findings.problem(line, None, message);
        }
    }
    let mut filler = Filler { values: &values, declared, scope, findings };
    filler.node(root)
}

fn read_spec<'a>(entry: &'a Entry, findings: &mut Findings) -> Option<Spec<'a>> {
    let node = &entry.value;
    if !node.is_null() && node.entries().is_none() {
        findings.problem(entry.line, None, format!("input `{}` takes a mapping", entry.key));
        return None;
    }
    let text = |key: &str| node.get(key).and_then(|node| node.text());
    let mut spec = Spec {
        name: &entry.key,
        line: entry.line,
        kind: text("type").unwrap_or("string"),
        default: node.get("default").filter(|node| !node.is_null()),
        options: node.get("options").and_then(|node| node.items()),
        pattern: None,
    };
    for part in node.entries().unwrap_or_default() {
        if !matches!(part.key.as_str(), "type" | "default" | "options" | "regex" | "description") {
            let what = format!("`{}` of input `{}`", part.key, entry.key);
            findings.unsupported(part.line, None, &what);
        }
    }
    if !matches!(spec.kind, "string" | "number" | "boolean" | "array") {
        let message = format!(
            "input `{}` is of type `{}`, which is none of string, number, boolean and array",
            entry.key, spec.kind
        );
        findings.problem(entry.line, None, message);
        return None;
    }
    if let Some(pattern) = text("regex") {
        // With or without slashes, as GitLab's own examples have both.
        let compiled = super::expression::regex(pattern)
            .unwrap_or_else(|| Regex::new(pattern).map_err(|error| error.to_string()));
        match compiled {
            Ok(pattern) => spec.pattern = Some(pattern),
            Err(error) => {
                let message = format!("the `regex` of input `{}` {error}", entry.key);
                findings.problem(entry.line, None, message);
            }
        }
    }
    Some(spec)
}

fn value_of(spec: &Spec<'_>, given: Option<&Given>) -> Result<Arc<Node>, String> {
    let value = match (given, spec.default) {
        (Some(Given::Node(node)), _) => Arc::clone(node),
        (Some(Given::Text(text)), _) if spec.kind == "string" => {
            Node::new(spec.line, Value::Text(text.clone()))
        }
        (Some(Given::Text(text)), _) => match yaml::load(text, 0) {
            Ok(document) => document.root,
            Err(_) => return Err(format!("is no {}: `{text}`", spec.kind)),
        },
        (None, Some(default)) => Arc::clone(default),
        (None, None) => return Err("has no value and no default".to_owned()),
    };
    let fits = match (&value.value, spec.kind) {
        (Value::Text(_), "string")
        | (Value::Bool(_), "boolean")
        | (Value::Int(_) | Value::Float(_), "number")
        | (Value::List(_), "array") => true,
        (
            Value::Null
            | Value::Bool(_)
            | Value::Int(_)
            | Value::Float(_)
            | Value::Text(_)
            | Value::List(_)
            | Value::Map(_)
            | Value::Reference(_),
            _,
        ) => false,
    };
    if !fits {
        return Err(format!("takes a {}, not {}", spec.kind, value.kind()));
    }
    let text = value.scalar_text();
    if let Some(options) = spec.options
        && !options.iter().any(|option| option.scalar_text() == text)
    {
        let known: Vec<String> = options.iter().filter_map(|option| option.scalar_text()).collect();
        let text = text.unwrap_or_default();
        return Err(format!("is `{text}`, which is none of {}", known.join(", ")));
    }
    if let Some(pattern) = &spec.pattern
        && !text.as_deref().is_some_and(|text| pattern.is_match(text))
    {
        return Err(format!("does not fit the regular expression `{}`", pattern.as_str()));
    }
    Ok(value)
}

struct Filler<'a> {
    values: &'a [(String, Arc<Node>)],
    declared: &'a [Entry],
    scope: &'a Scope,
    findings: &'a mut Findings,
}

impl Filler<'_> {
    /// Gives the node with its holes filled; the parser bounds the depth.
    fn node(&mut self, node: &Arc<Node>) -> Arc<Node> {
        let line = node.line;
        match &node.value {
            Value::Text(text) => self.text(node, text),
            Value::List(items) => {
                let items = items.iter().map(|item| self.node(item)).collect();
                Node::new(line, Value::List(items))
            }
            Value::Map(entries) => {
                let mut filled = Vec::with_capacity(entries.len());
                for entry in entries {
                    let key = self.string(&entry.key, entry.line);
                    let value = self.node(&entry.value);
                    yaml::put(&mut filled, Entry { key, line: entry.line, value });
                }
                Node::new(line, Value::Map(filled))
            }
            Value::Reference(path) => {
                let path = path.iter().map(|part| self.string(part, line)).collect();
                Node::new(line, Value::Reference(path))
            }
            Value::Null | Value::Bool(_) | Value::Int(_) | Value::Float(_) => Arc::clone(node),
        }
    }

    fn text(&mut self, node: &Arc<Node>, text: &str) -> Arc<Node> {
        if !text.contains("$[[") {
            return Arc::clone(node);
        }
        // A hole that is the whole of a value keeps the type of what fills it.
        let whole = text.trim().strip_prefix("$[[").and_then(|rest| rest.strip_suffix("]]"));
        if let Some(hole) = whole.filter(|hole| !hole.contains("]]")) {
            return match self.fill(hole, node.line) {
                Some(Ok(value)) => value,
                Some(Err(text)) => Node::new(node.line, Value::Text(text)),
                None => Arc::clone(node),
            };
        }
        Node::new(node.line, Value::Text(self.string(text, node.line)))
    }

    fn string(&mut self, text: &str, line: usize) -> String {
        let mut out = String::with_capacity(text.len());
        let mut rest = text;
        while let Some((before, from)) = rest.split_once("$[[") {
            let Some((hole, after)) = from.split_once("]]") else { break };
            out.push_str(before);
            match self.fill(hole, line) {
                Some(Ok(value)) => out.push_str(&shown(&value)),
                Some(Err(text)) => out.push_str(&text),
                None => {
                    out.push_str("$[[");
                    out.push_str(hole);
                    out.push_str("]]");
                }
            }
            rest = after;
        }
        out.push_str(rest);
        out
    }

    /// Gives the value of a hole, or the text that functions made of it; `None` for a hole that is
    /// not ours to fill, or that was complained about.
    fn fill(&mut self, hole: &str, line: usize) -> Option<Result<Arc<Node>, String>> {
        let mut words = hole.split('|').map(str::trim);
        let name = words.next()?.strip_prefix("inputs.")?.trim();
        let Some((_, value)) = self.values.iter().find(|(known, _)| known == name) else {
            // A declared one that has no value has been complained about.
            if !self.declared.iter().any(|entry| entry.key == name) {
                let message = format!("`$[[ inputs.{name} ]]` is no input of this file");
                self.findings.problem(line, None, message);
            }
            return None;
        };
        let functions: Vec<&str> = words.collect();
        if functions.is_empty() {
            return Some(Ok(Arc::clone(value)));
        }
        if functions.len() > MAX_FUNCTIONS {
            let message =
                format!("`$[[ {} ]]` has more than {MAX_FUNCTIONS} functions", hole.trim());
            self.findings.problem(line, None, message);
            return None;
        }
        let mut text = shown(value);
        for function in functions {
            match apply(function, &text, self.scope) {
                Some(done) => text = done,
                None => {
                    let message = format!(
                        "`{function}` is none of expand_vars, truncate(from, length) and posix_escape"
                    );
                    self.findings.problem(line, None, message);
                    return None;
                }
            }
        }
        Some(Err(text))
    }
}

fn apply(function: &str, text: &str, scope: &Scope) -> Option<String> {
    match function {
        "expand_vars" => return Some(scope.expand(text)),
        "posix_escape" => return Some(shlex::try_quote(text).ok()?.into_owned()),
        _ => {}
    }
    let arguments = function.strip_prefix("truncate(")?.strip_suffix(')')?;
    let (from, length) = arguments.split_once(',')?;
    let (from, length): (usize, usize) = (from.trim().parse().ok()?, length.trim().parse().ok()?);
    Some(text.chars().skip(from).take(length).collect())
}

/// Writes a value inside of a text: lists as JSON, as GitLab does.
fn shown(node: &Node) -> String {
    match &node.value {
        Value::List(items) => {
            let items: Vec<String> = items.iter().map(|item| quoted(item)).collect();
            format!("[{}]", items.join(", "))
        }
        Value::Null
        | Value::Bool(_)
        | Value::Int(_)
        | Value::Float(_)
        | Value::Text(_)
        | Value::Map(_)
        | Value::Reference(_) => node.scalar_text().unwrap_or_default(),
    }
}

fn quoted(node: &Node) -> String {
    match node.text() {
        Some(text) => serde_json::Value::from(text).to_string(),
        None => shown(node),
    }
}
