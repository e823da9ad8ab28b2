//! YAML as GitLab reads it: a tree that remembers lines, with aliases, merge keys and scalars resolved.
//!
//! GitLab loads `.gitlab-ci.yml` with Ruby's Psych, which follows YAML 1.1: `yes` is a boolean,
//! `0755` is octal, `<<` may stand several times in one mapping. A tree built by the rules of
//! YAML 1.2 would give jobs other values than GitLab gives them, so it is built here from events.

use std::collections::HashMap;
use std::sync::Arc;

use saphyr_parser::{Event, Parser, ScalarStyle, Tag};

/// Deepest nesting that is accepted; GitLab refuses more than 100 levels as well.
const MAX_DEPTH: usize = 100;

/// Most nodes that a document may have with all its aliases written out.
///
/// A few lines of aliases to aliases are enough for billions of nodes, and every later pass would
/// visit each of them.
pub(super) const MAX_NODES: usize = 500_000;

/// A value and the line it starts on.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) line: usize,
    pub(super) value: Value,
    /// Number of nodes with all aliases written out.
    pub(super) nodes: usize,
    /// Levels below and including this one.
    depth: usize,
}

/// What a node holds.
#[derive(Debug)]
pub(super) enum Value {
    Null,
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(String),
    List(Vec<Arc<Node>>),
    Map(Vec<Entry>),
    /// `!reference [job, keyword, …]`, not yet followed.
    Reference(Vec<String>),
}

/// One key of a mapping with its value.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) key: String,
    pub(super) line: usize,
    pub(super) value: Arc<Node>,
}

/// Something wrong at a line of the file.
#[derive(Debug)]
pub(super) struct Fault {
    pub(super) line: usize,
    pub(super) message: String,
}

/// A document with what was odd about it.
#[derive(Debug)]
pub(super) struct Document {
    /// The document before the pipeline, which holds `spec`.
    pub(super) header: Option<Arc<Node>>,
    pub(super) root: Arc<Node>,
    /// Mapping keys that are given twice, of which only the last counts.
    pub(super) duplicates: Vec<Fault>,
}

impl Node {
    /// Makes a node and adds up what is below it.
    pub(super) fn new(line: usize, value: Value) -> Arc<Self> {
        let (nodes, depth) = match &value {
            Value::List(items) => totals(items.iter()),
            Value::Map(entries) => totals(entries.iter().map(|entry| &entry.value)),
            Value::Null
            | Value::Bool(_)
            | Value::Int(_)
            | Value::Float(_)
            | Value::Text(_)
            | Value::Reference(_) => (0, 0),
        };
        Arc::new(Self { line, value, nodes: nodes.saturating_add(1), depth: depth + 1 })
    }

    /// Gives the entries when this is a mapping.
    pub(super) fn entries(&self) -> Option<&[Entry]> {
        if let Value::Map(entries) = &self.value { Some(entries) } else { None }
    }

    /// Gives the items when this is a list.
    pub(super) fn items(&self) -> Option<&[Arc<Self>]> {
        if let Value::List(items) = &self.value { Some(items) } else { None }
    }

    /// Gives the text when this is text and nothing that merely looks like it.
    pub(super) fn text(&self) -> Option<&str> {
        if let Value::Text(text) = &self.value { Some(text) } else { None }
    }

    /// Whether there is nothing here.
    pub(super) fn is_null(&self) -> bool {
        matches!(self.value, Value::Null)
    }

    /// Gives the value of a key when this is a mapping that has it.
    pub(super) fn get(&self, key: &str) -> Option<&Arc<Self>> {
        self.entries()?.iter().find(|entry| entry.key == key).map(|entry| &entry.value)
    }

    /// Names the type for messages.
    pub(super) fn kind(&self) -> &'static str {
        match &self.value {
            Value::Null => "nothing",
            Value::Bool(_) => "true or false",
            Value::Int(_) | Value::Float(_) => "a number",
            Value::Text(_) => "text",
            Value::List(_) => "a list",
            Value::Map(_) => "a mapping",
            Value::Reference(_) => "a reference",
        }
    }

    /// Gives a scalar as the text a job would see; `None` for anything else.
    pub(super) fn scalar_text(&self) -> Option<String> {
        match &self.value {
            Value::Bool(value) => Some(value.to_string()),
            Value::Int(value) => Some(value.to_string()),
            Value::Float(value) => Some(float_text(*value)),
            Value::Text(value) => Some(value.clone()),
            Value::Null | Value::List(_) | Value::Map(_) | Value::Reference(_) => None,
        }
    }
}

fn totals<'a>(children: impl Iterator<Item = &'a Arc<Node>>) -> (usize, usize) {
    children.fold((0, 0), |(nodes, depth), child| {
        (child.nodes.saturating_add(nodes), child.depth.max(depth))
    })
}

/// Writes a number as Ruby does, because that is the text GitLab hands to jobs.
fn float_text(value: f64) -> String {
    if value.is_infinite() {
        return if value > 0.0 { "Infinity" } else { "-Infinity" }.to_owned();
    }
    let size = value.abs();
    if size != 0.0 && !(1e-4..1e16).contains(&size) {
        // Rust writes 1e20 and 1.5e-7 where Ruby writes 1.0e+20 and 1.5e-07.
        let text = format!("{value:e}");
        let (mantissa, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        let point = if mantissa.contains('.') { "" } else { ".0" };
        let (sign, digits) = match exponent.strip_prefix('-') {
            Some(digits) => ('-', digits),
            None => ('+', exponent),
        };
        return format!("{mantissa}{point}e{sign}{digits:0>2}");
    }
    format!("{value:?}")
}

/// Reads the one document of a file, and the header that may stand before it.
///
/// `base` is added to every line, because a pipeline's files are numbered through.
pub(super) fn load(text: &str, base: usize) -> Result<Document, Vec<Fault>> {
    let mut builder = Builder { base, ..Builder::default() };
    for event in Parser::new_from_str(text.trim_start_matches('\u{feff}')) {
        match event {
            Ok((event, span)) => builder.take(event, base + span.start.line())?,
            Err(error) => {
                return Err(vec![Fault {
                    line: base + error.marker().line(),
                    message: format!("not valid YAML: {}", error.info()),
                }]);
            }
        }
        if !builder.faults.is_empty() {
            return Err(builder.faults);
        }
    }
    let mut roots = builder.roots;
    let is_header = |root: &Arc<Node>| root.get("spec").is_some();
    if roots.len() > 1 && (roots.len() > 2 || !roots.first().is_some_and(is_header)) {
        let line = roots.get(1).map_or(base + 1, |root| root.line);
        let message =
            "a second YAML document; only a header with `spec` may stand before the pipeline";
        return Err(vec![Fault { line, message: message.to_owned() }]);
    }
    let root = roots.pop().unwrap_or_else(|| Node::new(base + 1, Value::Null));
    Ok(Document { header: roots.pop(), root, duplicates: builder.duplicates })
}

#[derive(Default)]
struct Builder {
    open: Vec<Open>,
    anchors: HashMap<usize, Arc<Node>>,
    roots: Vec<Arc<Node>>,
    base: usize,
    faults: Vec<Fault>,
    duplicates: Vec<Fault>,
}

/// A collection whose end has not been seen.
struct Open {
    line: usize,
    anchor: usize,
    reference: bool,
    kind: Kind,
}

enum Kind {
    List(Vec<Arc<Node>>),
    Map { entries: Vec<Entry>, key: Option<(String, usize)> },
}

impl Builder {
    fn take(&mut self, event: Event<'_>, line: usize) -> Result<(), Vec<Fault>> {
        match event {
            Event::Nothing
            | Event::StreamStart
            | Event::StreamEnd
            | Event::DocumentEnd
            | Event::DocumentStart(_) => {}
            Event::Alias(anchor) => match self.anchors.get(&anchor).cloned() {
                Some(node) => self.insert(node, line),
                None => self.fault(line, "an alias inside of what it stands for"),
            },
            Event::Scalar(text, style, anchor, tag) => {
                let value = self.scalar(&text, style, tag.as_deref(), line);
                let node = Node::new(line, value);
                self.anchor(anchor, &node);
                self.insert(node, line);
            }
            Event::SequenceStart(anchor, tag) => {
                let reference = tag.as_deref().is_some_and(is_reference);
                if !reference {
                    self.check_tag(tag.as_deref(), line);
                }
                self.begin(Open { line, anchor, reference, kind: Kind::List(Vec::new()) });
            }
            Event::MappingStart(anchor, tag) => {
                self.check_tag(tag.as_deref(), line);
                let kind = Kind::Map { entries: Vec::new(), key: None };
                self.begin(Open { line, anchor, reference: false, kind });
            }
            Event::SequenceEnd | Event::MappingEnd => {
                if let Some(open) = self.open.pop() {
                    let (anchor, line) = (open.anchor, open.line);
                    let node = self.close(open);
                    self.anchor(anchor, &node);
                    self.insert(node, line);
                }
            }
        }
        if self.faults.is_empty() { Ok(()) } else { Err(std::mem::take(&mut self.faults)) }
    }

    fn fault(&mut self, line: usize, message: impl Into<String>) {
        self.faults.push(Fault { line, message: message.into() });
    }

    fn anchor(&mut self, anchor: usize, node: &Arc<Node>) {
        // The parser counts anchors from 1; 0 says there is none.
        if anchor > 0 {
            self.anchors.insert(anchor, Arc::clone(node));
        }
    }

    fn begin(&mut self, open: Open) {
        if self.open.len() >= MAX_DEPTH {
            self.fault(open.line, format!("nested deeper than {MAX_DEPTH} levels"));
        }
        self.open.push(open);
    }

    fn close(&mut self, open: Open) -> Arc<Node> {
        let Open { line, reference, kind, .. } = open;
        match kind {
            Kind::Map { entries, .. } => Node::new(line, Value::Map(entries)),
            Kind::List(items) if reference => {
                let path: Option<Vec<String>> =
                    items.iter().map(|item| item.text().map(str::to_owned)).collect();
                let path = path.unwrap_or_default();
                if path.is_empty() {
                    self.fault(line, "`!reference` takes a list of names, like [job, script]");
                }
                Node::new(line, Value::Reference(path))
            }
            Kind::List(items) => Node::new(line, Value::List(items)),
        }
    }

    fn insert(&mut self, node: Arc<Node>, line: usize) {
        if node.nodes > MAX_NODES {
            self.fault(line, "too large once its aliases are written out");
            return;
        }
        if self.open.len() + node.depth > MAX_DEPTH {
            self.fault(line, format!("nested deeper than {MAX_DEPTH} levels"));
            return;
        }
        let Some(open) = self.open.last_mut() else {
            self.roots.push(node);
            return;
        };
        match &mut open.kind {
            Kind::List(items) => items.push(node),
            Kind::Map { entries, key } => match key.take() {
                None => match node.scalar_text() {
                    Some(text) => *key = Some((text, line)),
                    None if node.is_null() => {
                        *key = Some((String::new(), line));
                    }
                    None => {
                        let message = format!("a key of a mapping is {}, not text", node.kind());
                        self.fault(line, message);
                    }
                },
                Some((key, line)) if key == "<<" => {
                    if !merge_into(entries, &node) {
                        let message = format!(
                            "`<<` takes a mapping or a list of mappings, not {}",
                            node.kind()
                        );
                        self.fault(line, message);
                    }
                }
                Some((key, line)) => {
                    let entry = Entry { key, line, value: node };
                    // A merged entry may be replaced in silence: that is what merging is for.
                    let before = entries
                        .iter()
                        .find(|old| {
                            old.key == entry.key && old.line >= open.line && old.line < line
                        })
                        .map(|old| old.line);
                    if let Some(before) = before {
                        let message = format!(
                            "`{}` is given again; what line {} says for it does not count",
                            entry.key,
                            before - self.base
                        );
                        self.duplicates.push(Fault { line, message });
                    }
                    put(entries, entry);
                }
            },
        }
    }

    fn check_tag(&mut self, tag: Option<&Tag>, line: usize) {
        if let Some(tag) = tag
            && !tag.is_yaml_core_schema()
            && !tag.suffix.is_empty()
        {
            self.fault(line, format!("unknown tag `{tag}`"));
        }
    }

    fn scalar(&mut self, text: &str, style: ScalarStyle, tag: Option<&Tag>, line: usize) -> Value {
        if tag.is_some_and(is_reference) {
            self.fault(line, "`!reference` takes a list of names, like [job, script]");
        } else {
            self.check_tag(tag, line);
        }
        // A lone `!` says "no guessing", as `!!str` does.
        let as_text = tag.is_some_and(|tag| {
            tag.suffix.is_empty() || tag.is_yaml_core_schema() && tag.suffix == "str"
        });
        if as_text || style != ScalarStyle::Plain {
            Value::Text(text.to_owned())
        } else {
            plain(text)
        }
    }
}

fn is_reference(tag: &Tag) -> bool {
    tag.handle == "!" && tag.suffix == "reference"
}

/// Sets a key; one that is there keeps its place and gets the new value.
pub(super) fn put(entries: &mut Vec<Entry>, entry: Entry) {
    match entries.iter_mut().find(|old| old.key == entry.key) {
        Some(old) => *old = entry,
        None => entries.push(entry),
    }
}

/// Does what Psych does for `<<`: in the order of the file, so that a merge after a key wins over it.
///
/// In a list of mappings the first one that has a key wins.
fn merge_into(entries: &mut Vec<Entry>, node: &Node) -> bool {
    if let Some(merged) = node.entries() {
        for entry in merged {
            put(entries, entry.clone());
        }
        return true;
    }
    let maps = node.items().map(|items| items.iter().map(|item| item.entries()).collect());
    let Some(Some(maps)) = maps else { return false };
    let maps: Vec<&[Entry]> = maps;
    for entry in maps.into_iter().rev().flatten() {
        put(entries, entry.clone());
    }
    true
}

/// Guesses the type of an unquoted scalar by the rules of YAML 1.1.
fn plain(text: &str) -> Value {
    if text.is_empty() || text == "~" || text.eq_ignore_ascii_case("null") {
        return Value::Null;
    }
    match text.to_ascii_lowercase().as_str() {
        "yes" | "true" | "on" => return Value::Bool(true),
        "no" | "false" | "off" => return Value::Bool(false),
        ".inf" | "+.inf" => return Value::Float(f64::INFINITY),
        "-.inf" => return Value::Float(f64::NEG_INFINITY),
        _ => {}
    }
    if let Some(number) = integer(text) {
        return Value::Int(number);
    }
    match float(text) {
        Some(number) => Value::Float(number),
        None => Value::Text(text.to_owned()),
    }
}

fn integer(text: &str) -> Option<i64> {
    let (sign, digits) = match text.strip_prefix('-') {
        Some(rest) => (-1, rest),
        None => (1, text.strip_prefix('+').unwrap_or(text)),
    };
    if !digits.starts_with(|c: char| c.is_ascii_digit()) {
        return None;
    }
    let plain: String = digits.chars().filter(|c| *c != '_').collect();
    let radix = |digits: &str, radix| i64::from_str_radix(digits, radix).ok();
    let number = if let Some(hex) = plain.strip_prefix("0x") {
        radix(hex, 16)
    } else if let Some(binary) = plain.strip_prefix("0b") {
        radix(binary, 2)
    } else if plain.contains(':') {
        sexagesimal(&plain)
    } else if plain.len() > 1 && plain.starts_with('0') {
        radix(&plain, 8)
    } else {
        radix(&plain.replace(',', ""), 10)
    };
    // `from_str_radix` takes a sign of its own, which would let `0x-1` pass.
    number.filter(|number| *number >= 0)?.checked_mul(sign)
}

/// Reads `1:30` as 90, which is what YAML 1.1 makes of it.
fn sexagesimal(text: &str) -> Option<i64> {
    let parts: Vec<&str> = text.split(':').collect();
    if parts.len() > 3 {
        return None;
    }
    let mut total: i64 = 0;
    for (place, part) in parts.iter().enumerate() {
        let number: i64 = part.parse().ok()?;
        let odd = place > 0 && (number >= 60 || part.len() > 2);
        if odd || !part.bytes().all(|byte| byte.is_ascii_digit()) {
            return None;
        }
        total = total.checked_mul(60)?.checked_add(number)?;
    }
    Some(total)
}

/// Reads a number with a point; `1e3` without one is text in YAML 1.1.
fn float(text: &str) -> Option<f64> {
    let unsigned = text.strip_prefix(['-', '+']).unwrap_or(text);
    let (mantissa, exponent) = match unsigned.split_once(['e', 'E']) {
        Some((mantissa, exponent)) => (mantissa, Some(exponent)),
        None => (unsigned, None),
    };
    let (whole, fraction) = mantissa.split_once('.')?;
    let digits = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
    let grouped = |part: &str| {
        part.is_empty()
            || part.starts_with(|c: char| c.is_ascii_digit())
                && part.bytes().all(|byte| byte.is_ascii_digit() || byte == b'_' || byte == b',')
    };
    let exponent_fits = exponent.is_none_or(|exponent| {
        exponent.strip_prefix(['-', '+']).is_some_and(|rest| !rest.is_empty() && digits(rest))
    });
    if !grouped(whole)
        || !digits(fraction)
        || !exponent_fits
        || whole.is_empty() && fraction.is_empty()
    {
        return None;
    }
    text.replace(['_', ','], "").parse().ok()
}

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;

    use super::*;

    fn value_of(text: &str) -> String {
        let document = load(&format!("key: {text}\n"), 0).unwrap();
        format!("{:?}", document.root.get("key").unwrap().value)
    }

    #[test]
    fn scalars_have_the_types_of_yaml_1_1() {
        for (text, value) in [
            ("yes", "Bool(true)"),
            ("Off", "Bool(false)"),
            ("'yes'", "Text(\"yes\")"),
            ("!!str yes", "Text(\"yes\")"),
            ("0755", "Int(493)"),
            ("0999", "Text(\"0999\")"),
            ("0x1F", "Int(31)"),
            ("0x-1", "Text(\"0x-1\")"),
            ("-12", "Int(-12)"),
            ("1_000", "Int(1000)"),
            ("1:30", "Int(90)"),
            ("1:30:00:00", "Text(\"1:30:00:00\")"),
            ("1.10", "Float(1.1)"),
            ("1.2.3", "Text(\"1.2.3\")"),
            ("1e3", "Text(\"1e3\")"),
            ("1.5e+3", "Float(1500.0)"),
            (".", "Text(\".\")"),
            ("~", "Null"),
            ("", "Null"),
            ("99999999999999999999", "Text(\"99999999999999999999\")"),
            ("v1", "Text(\"v1\")"),
        ] {
            assert_eq!(value_of(text), value, "{text}");
        }
    }

    #[test]
    fn numbers_are_written_as_ruby_writes_them() {
        for (number, text) in [
            (1.0, "1.0"),
            (1.1, "1.1"),
            (0.0001, "0.0001"),
            (0.000_015, "1.5e-05"),
            (1e20, "1.0e+20"),
            (-2.5e17, "-2.5e+17"),
            (0.0, "0.0"),
        ] {
            assert_eq!(float_text(number), text);
        }
    }

    #[test]
    fn several_merge_keys_in_one_mapping_all_count() {
        let text = "a: &a {x: 1, y: 1}\nb: &b {y: 2}\nc:\n  <<: *a\n  <<: *b\n  z: 3\n";
        let document = load(text, 0).unwrap();
        let c = document.root.get("c").unwrap();
        let value = |key| c.get(key).unwrap().scalar_text().unwrap();
        assert_eq!((value("x"), value("y"), value("z")), ("1".into(), "2".into(), "3".into()));
        assert!(document.duplicates.is_empty());
    }

    #[test]
    fn in_a_list_of_merges_the_first_wins_and_a_later_merge_beats_an_earlier_key() {
        let text = "a: &a {x: 1}\nb: &b {x: 2, y: 2}\nc:\n  y: 0\n  <<: [*a, *b]\n";
        let document = load(text, 0).unwrap();
        let c = document.root.get("c").unwrap();
        let value = |key| c.get(key).unwrap().scalar_text().unwrap();
        assert_eq!((value("x"), value("y")), ("1".into(), "2".into()));
    }

    #[test]
    fn a_key_given_twice_is_told_and_the_last_one_counts() {
        let document = load("job:\n  a: 1\nother: {}\njob:\n  a: 2\n", 0).unwrap();
        assert_eq!(document.root.get("job").unwrap().get("a").unwrap().scalar_text().unwrap(), "2");
        assert_eq!(document.duplicates.len(), 1);
        assert_eq!(document.duplicates[0].line, 4);
        assert!(document.duplicates[0].message.contains("line 1"));
    }

    #[test]
    fn an_override_of_a_merged_key_is_no_duplicate() {
        let document = load(".a: &a\n  x: 1\nb:\n  <<: *a\n  x: 2\n", 0).unwrap();
        assert!(document.duplicates.is_empty());
        assert_eq!(document.root.get("b").unwrap().get("x").unwrap().scalar_text().unwrap(), "2");
    }

    #[test]
    fn a_bomb_of_aliases_is_refused() {
        let mut text = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
        for level in 1..12 {
            let alias = format!("*a{}", level - 1);
            let row = vec![alias; 10].join(", ");
            writeln!(text, "a{level}: &a{level} [{row}]").unwrap();
        }
        let faults = load(&text, 0).unwrap_err();
        assert!(faults[0].message.contains("too large"), "{faults:?}");
    }

    #[test]
    fn deep_nesting_self_aliases_and_broken_syntax_are_refused_with_their_line() {
        let deep = format!("a: {}1{}\n", "[".repeat(150), "]".repeat(150));
        assert!(load(&deep, 0).unwrap_err()[0].message.contains("deeper"));
        let selfish = load("x: 1\na: &a [*a]\n", 0).unwrap_err();
        assert_eq!(selfish[0].line, 2);
        let broken = load("a: 1\nb: [\n", 0).unwrap_err();
        assert!(broken[0].message.starts_with("not valid YAML"), "{broken:?}");
        assert!(load("a: *nowhere\n", 0).is_err());
        assert!(load("a: 1\n---\nb: 2\n", 0).unwrap_err()[0].message.contains("second"));
        assert!(load("a: !vault x\n", 0).unwrap_err()[0].message.contains("`!vault`"));
        assert!(load("a: !reference x\n", 0).is_err());
        assert!(load("a: !reference [x, [y]]\n", 0).is_err());
    }
}
