//! What stands between `${{` and `}}`: GitLab's expression language Moa (GitLab,
//! `doc/ci/functions/moa.md`).
//!
//! Values are computed while the text is read. Nothing in the language has an effect, so the side of an
//! operator that does not count is computed too and thrown away. What cannot be computed is a value of
//! its own until it is needed: `job.inputs.maybe || "default"` asks for it and goes on.

use std::cell::Cell;
use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::rc::Rc;

/// How deep expressions may be nested; nobody writes the tenth part of that.
const DEEPEST: usize = 64;

/// How much of an expression is shown in a complaint, in characters.
const SHOWN: usize = 80;

const OPEN: &str = "${{";
const CLOSE: &str = "}}";

/// Words that Moa keeps for later.
const RESERVED: [&str; 34] = [
    "array",
    "as",
    "break",
    "case",
    "const",
    "continue",
    "default",
    "else",
    "fallthrough",
    "float",
    "for",
    "func",
    "function",
    "goto",
    "if",
    "import",
    "in",
    "int",
    "let",
    "loop",
    "map",
    "namespace",
    "number",
    "object",
    "package",
    "range",
    "return",
    "string",
    "struct",
    "switch",
    "type",
    "var",
    "void",
    "while",
];

/// A value, and whether it must not be shown.
#[derive(Clone)]
pub(super) struct Value {
    kind: Kind,
    sensitive: bool,
}

#[derive(Clone)]
enum Kind {
    Null,
    Bool(bool),
    /// Always finite.
    Number(f64),
    Text(Rc<str>),
    List(Rc<[Value]>),
    Object(Rc<BTreeMap<String, Value>>),
    Function(Function),
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Function {
    Bool,
    Num,
    Str,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Operator {
    Or,
    And,
    Equal,
    NotEqual,
    LessEqual,
    GreaterEqual,
    Less,
    Greater,
    Add,
    Subtract,
    Multiply,
    Divide,
    Modulo,
}

/// The operators with how strongly they bind; longer ones first.
const OPERATORS: [(&str, Operator, u8); 13] = [
    ("||", Operator::Or, 1),
    ("&&", Operator::And, 2),
    ("==", Operator::Equal, 3),
    ("!=", Operator::NotEqual, 3),
    ("<=", Operator::LessEqual, 3),
    (">=", Operator::GreaterEqual, 3),
    ("<", Operator::Less, 3),
    (">", Operator::Greater, 3),
    ("+", Operator::Add, 4),
    ("-", Operator::Subtract, 4),
    ("*", Operator::Multiply, 5),
    ("/", Operator::Divide, 5),
    ("%", Operator::Modulo, 5),
];

/// Why an expression has no value.
#[derive(Clone, Debug)]
struct Fault {
    text: String,
    /// Something does not exist, for which `||` has a remedy.
    missing: bool,
}

/// Why a text is none.
struct Syntax(String);

type Outcome = Result<Value, Fault>;

/// Why a text could not be filled in.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct MoaError(String);

/// A text filled in.
pub(super) struct Filled {
    pub(super) text: String,
    /// Something went into it that must not be shown.
    pub(super) sensitive: bool,
}

impl Value {
    fn new(kind: Kind) -> Self {
        Self { kind, sensitive: false }
    }

    fn text(text: impl Into<Rc<str>>) -> Self {
        Self::new(Kind::Text(text.into()))
    }

    /// Makes an object.
    pub(super) fn object(members: BTreeMap<String, Self>) -> Self {
        Self::new(Kind::Object(Rc::new(members)))
    }

    /// Makes a value of JSON.
    pub(super) fn of_json(json: &serde_json::Value, sensitive: bool) -> Self {
        let kind = match json {
            serde_json::Value::Null => Kind::Null,
            serde_json::Value::Bool(on) => Kind::Bool(*on),
            // A number that no double can be is as large as one can be.
            serde_json::Value::Number(number) => {
                Kind::Number(number.as_f64().filter(|n| n.is_finite()).unwrap_or(f64::MAX) + 0.0)
            }
            serde_json::Value::String(text) => Kind::Text(text.as_str().into()),
            serde_json::Value::Array(items) => {
                Kind::List(items.iter().map(|item| Self::of_json(item, sensitive)).collect())
            }
            serde_json::Value::Object(members) => Kind::Object(Rc::new(
                members
                    .iter()
                    .map(|(name, value)| (name.clone(), Self::of_json(value, sensitive)))
                    .collect(),
            )),
        };
        Self { kind, sensitive }
    }

    fn marked(mut self, sensitive: bool) -> Self {
        self.sensitive |= sensitive;
        self
    }

    /// Says whether it or anything in it must not be shown.
    fn hidden(&self) -> bool {
        self.sensitive
            || match &self.kind {
                Kind::List(items) => items.iter().any(Self::hidden),
                Kind::Object(members) => members.values().any(Self::hidden),
                Kind::Null
                | Kind::Bool(_)
                | Kind::Number(_)
                | Kind::Text(_)
                | Kind::Function(_) => false,
            }
    }

    fn truthy(&self) -> bool {
        match &self.kind {
            Kind::Null => false,
            Kind::Bool(on) => *on,
            Kind::Number(number) => number.total_cmp(&0.0).is_ne(),
            Kind::Text(text) => !text.is_empty(),
            Kind::List(items) => !items.is_empty(),
            Kind::Object(members) => !members.is_empty(),
            Kind::Function(_) => true,
        }
    }

    fn word(&self) -> &'static str {
        match &self.kind {
            Kind::Null => "null",
            Kind::Bool(_) => "a boolean",
            Kind::Number(_) => "a number",
            Kind::Text(_) => "a string",
            Kind::List(_) => "an array",
            Kind::Object(_) => "an object",
            Kind::Function(_) => "a function",
        }
    }

    fn rank(&self) -> u8 {
        match &self.kind {
            Kind::Null => 0,
            Kind::Bool(_) => 1,
            Kind::Number(_) => 2,
            Kind::Text(_) => 3,
            Kind::List(_) => 4,
            Kind::Object(_) => 5,
            Kind::Function(_) => 6,
        }
    }

    fn order(&self, other: &Self) -> Ordering {
        match (&self.kind, &other.kind) {
            (Kind::Bool(a), Kind::Bool(b)) => a.cmp(b),
            (Kind::Number(a), Kind::Number(b)) => a.total_cmp(b),
            (Kind::Text(a), Kind::Text(b)) => a.cmp(b),
            (Kind::Function(a), Kind::Function(b)) => a.cmp(b),
            (Kind::List(a), Kind::List(b)) => a
                .iter()
                .zip(b.iter())
                .map(|(a, b)| a.order(b))
                .find(|order| order.is_ne())
                .unwrap_or_else(|| a.len().cmp(&b.len())),
            (Kind::Object(a), Kind::Object(b)) => {
                a.len().cmp(&b.len()).then_with(|| a.keys().cmp(b.keys())).then_with(|| {
                    a.values()
                        .zip(b.values())
                        .map(|(a, b)| a.order(b))
                        .find(|order| order.is_ne())
                        .unwrap_or(Ordering::Equal)
                })
            }
            _ => self.rank().cmp(&other.rank()),
        }
    }
}

impl Fault {
    fn new(text: impl Into<String>) -> Self {
        Self { text: text.into(), missing: false }
    }

    fn missing(text: impl Into<String>) -> Self {
        Self { text: text.into(), missing: true }
    }
}

/// Fills in a text's expressions; `job` is the only name they can begin with.
///
/// `room` is how many bytes may still be made; it shrinks.
pub(super) fn fill(text: &str, job: &Value, room: &Cell<usize>) -> Result<Filled, MoaError> {
    let mut filled = Filled { text: String::new(), sensitive: false };
    let mut rest = text;
    while let Some((before, after)) = rest.split_once(OPEN) {
        if let Some(before) = before.strip_suffix('\\') {
            filled.text.push_str(before);
            filled.text.push_str(OPEN);
            rest = after;
            continue;
        }
        filled.text.push_str(before);
        let mut parser = Parser { text: after, at: 0, depth: 0, job, room };
        let value = match parser.closed() {
            Ok(Ok(value)) => value,
            Ok(Err(Fault { text, .. })) | Err(Syntax(text)) => {
                return Err(MoaError(format!("{text} in {}", shown(after))));
            }
        };
        filled.sensitive |= value.hidden();
        let put = parser.write(&value, false, &mut filled.text);
        put.map_err(|fault| MoaError(format!("{} in {}", fault.text, shown(after))))?;
        rest = parser.rest();
    }
    filled.text.push_str(rest);
    Ok(filled)
}

/// Shows the expression that begins with this text, shortened and on one line.
fn shown(text: &str) -> String {
    let end = text.find(CLOSE).map_or(text.len(), |at| at + CLOSE.len());
    let whole = text.get(..end).unwrap_or_default();
    format!("`{OPEN} {}`", brief(whole))
}

/// Makes a piece of an author's text short and one line.
fn brief(text: &str) -> String {
    let words: Vec<&str> = text.split_whitespace().collect();
    let line = words.join(" ");
    let short: String =
        line.chars().take(SHOWN).map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect();
    let more = if line.chars().nth(SHOWN).is_some() { "…" } else { "" };
    format!("{short}{more}")
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
    depth: usize,
    job: &'a Value,
    room: &'a Cell<usize>,
}

impl<'a> Parser<'a> {
    fn rest(&self) -> &'a str {
        self.text.get(self.at..).unwrap_or_default()
    }

    fn peek(&self) -> Option<char> {
        self.rest().chars().next()
    }

    fn next(&mut self) -> Option<char> {
        let c = self.peek()?;
        self.at += c.len_utf8();
        Some(c)
    }

    fn skip_space(&mut self) {
        let rest = self.rest();
        self.at += rest.len() - rest.trim_start().len();
    }

    fn take(&mut self, token: &str) -> bool {
        self.skip_space();
        let there = self.rest().starts_with(token);
        if there {
            self.at += token.len();
        }
        there
    }

    fn expect(&mut self, token: &str) -> Result<(), Syntax> {
        if self.take(token) { Ok(()) } else { Err(self.unexpected(&format!("`{token}`"))) }
    }

    fn unexpected(&self, wanted: &str) -> Syntax {
        match self.peek() {
            None => Syntax(format!("expected {wanted}, but the text ends")),
            Some(c) => Syntax(format!("expected {wanted}, found {c:?}")),
        }
    }

    /// Reads an expression and the braces after it.
    fn closed(&mut self) -> Result<Outcome, Syntax> {
        let value = self.expression(1)?;
        self.expect(CLOSE)?;
        Ok(value)
    }

    fn operator(&mut self) -> Option<(&'static str, Operator, u8)> {
        self.skip_space();
        let rest = self.rest();
        OPERATORS.into_iter().find(|(sign, _, _)| rest.starts_with(sign))
    }

    fn expression(&mut self, least: u8) -> Result<Outcome, Syntax> {
        let mut value = self.unary()?;
        while let Some((sign, operator, strength)) = self.operator() {
            if strength < least {
                break;
            }
            self.at += sign.len();
            let right = self.expression(strength + 1)?;
            value = self.apply(sign, operator, value, right);
        }
        Ok(value)
    }

    fn unary(&mut self) -> Result<Outcome, Syntax> {
        self.depth += 1;
        if self.depth > DEEPEST {
            return Err(Syntax("the expression is nested too deeply".into()));
        }
        self.skip_space();
        let value = match self.peek() {
            Some('!') => {
                self.at += 1;
                self.unary()?.map(|v| Value::new(Kind::Bool(!v.truthy())).marked(v.hidden()))
            }
            Some(sign @ ('+' | '-')) => {
                self.at += 1;
                self.unary()?.and_then(|value| {
                    let Kind::Number(n) = value.kind else {
                        let word = value.word();
                        return Err(Fault::new(format!("`{sign}` cannot take {word}")));
                    };
                    let n = if sign == '-' { 0.0 - n } else { n };
                    Ok(Value::new(Kind::Number(n)).marked(value.sensitive))
                })
            }
            _ => {
                let start = self.at;
                let value = self.primary()?;
                self.postfix(start, value)?
            }
        };
        self.depth -= 1;
        Ok(value)
    }

    fn primary(&mut self) -> Result<Outcome, Syntax> {
        match self.peek() {
            Some('(') => {
                self.at += 1;
                let value = self.expression(1)?;
                self.expect(")")?;
                Ok(value)
            }
            Some('[') => {
                self.at += 1;
                let items = self.items("]")?;
                Ok(items.map(|items| Value::new(Kind::List(items.into()))))
            }
            Some('{') => {
                self.at += 1;
                self.object()
            }
            Some('\'') => {
                self.at += 1;
                self.single_quoted()
            }
            Some('"') => {
                self.at += 1;
                self.double_quoted()
            }
            Some(c) if c.is_ascii_digit() => self.number(),
            Some(_) => {
                let Some(name) = self.identifier() else {
                    return Err(self.unexpected("an expression"));
                };
                match name {
                    "null" => Ok(Ok(Value::new(Kind::Null))),
                    "true" => Ok(Ok(Value::new(Kind::Bool(true)))),
                    "false" => Ok(Ok(Value::new(Kind::Bool(false)))),
                    "job" => Ok(Ok(self.job.clone())),
                    "bool" => Ok(Ok(Value::new(Kind::Function(Function::Bool)))),
                    "num" => Ok(Ok(Value::new(Kind::Function(Function::Num)))),
                    "str" => Ok(Ok(Value::new(Kind::Function(Function::Str)))),
                    name if RESERVED.contains(&name) => {
                        Err(Syntax(format!("`{name}` is a reserved word")))
                    }
                    name => Ok(Err(Fault::new(format!(
                        "`{name}` is not known here, only `job.inputs` is,"
                    )))),
                }
            }
            None => Err(self.unexpected("an expression")),
        }
    }

    fn identifier(&mut self) -> Option<&'a str> {
        let rest = self.rest();
        let end = rest
            .char_indices()
            .find(|(at, c)| {
                let digit = *at > 0 && c.is_numeric();
                !(c.is_alphabetic() || *c == '_' || digit)
            })
            .map_or(rest.len(), |(at, _)| at);
        let name = rest.get(..end).filter(|name| !name.is_empty())?;
        self.at += end;
        Some(name)
    }

    /// Reads what follows a value: members, elements, arguments.
    fn postfix(&mut self, start: usize, mut value: Outcome) -> Result<Outcome, Syntax> {
        loop {
            if self.take(".") {
                self.skip_space();
                let Some(name) = self.identifier() else {
                    return Err(self.unexpected("a name"));
                };
                let path = self.path(start);
                value = value.and_then(|value| member(&value, name, &path));
            } else if self.take("[") {
                let index = self.expression(1)?;
                self.expect("]")?;
                let path = self.path(start);
                value = match (value, index) {
                    (Ok(value), Ok(index)) => element(&value, &index, &path),
                    (Err(fault), _) | (Ok(_), Err(fault)) => Err(fault),
                };
            } else if self.take("(") {
                let arguments = self.items(")")?;
                let path = self.path(start);
                value = match (value, arguments) {
                    (Ok(value), Ok(arguments)) => self.call(&value, &arguments, &path),
                    (Err(fault), _) | (Ok(_), Err(fault)) => Err(fault),
                };
            } else {
                return Ok(value);
            }
        }
    }

    fn path(&self, start: usize) -> String {
        brief(self.text.get(start..self.at).unwrap_or_default())
    }

    /// Reads expressions with commas between them up to `end`; one more comma does not matter.
    fn items(&mut self, end: &str) -> Result<Result<Vec<Value>, Fault>, Syntax> {
        let mut items = Ok(Vec::new());
        loop {
            if self.take(end) {
                return Ok(items);
            }
            let item = self.expression(1)?;
            items = items.and_then(|mut items: Vec<Value>| {
                items.push(item?);
                Ok(items)
            });
            if !self.take(",") {
                self.expect(end)?;
                return Ok(items);
            }
        }
    }

    fn object(&mut self) -> Result<Outcome, Syntax> {
        let mut members = Ok(BTreeMap::new());
        loop {
            if self.take("}") {
                break;
            }
            self.skip_space();
            // A bare name is that name, not what it stands for.
            let key = match self.identifier() {
                Some(name) => Ok(Value::text(name)),
                None => self.expression(1)?,
            };
            self.expect(":")?;
            let value = self.expression(1)?;
            members = members.and_then(|mut members: BTreeMap<String, Value>| {
                let (key, value) = (key?, value?);
                let Kind::Text(name) = &key.kind else {
                    return Err(Fault::new(format!("{} cannot be a key", key.word())));
                };
                members.insert(name.to_string(), value.marked(key.sensitive));
                Ok(members)
            });
            if !self.take(",") {
                self.expect("}")?;
                break;
            }
        }
        Ok(members.map(Value::object))
    }

    fn number(&mut self) -> Result<Outcome, Syntax> {
        let bytes = self.rest().as_bytes();
        let digits =
            |from: usize| bytes.iter().skip(from).take_while(|byte| byte.is_ascii_digit()).count();
        let mut end = digits(0);
        if bytes.get(end) == Some(&b'.') && digits(end + 1) > 0 {
            end += 1 + digits(end + 1);
        }
        if matches!(bytes.get(end), Some(b'e' | b'E')) {
            let sign = usize::from(matches!(bytes.get(end + 1), Some(b'+' | b'-')));
            let exponent = digits(end + 1 + sign);
            if exponent > 0 {
                end += 1 + sign + exponent;
            }
        }
        let text = self.rest().get(..end).unwrap_or_default();
        self.at += end;
        Ok(finite(text.parse().unwrap_or(f64::NAN)))
    }

    fn single_quoted(&mut self) -> Result<Outcome, Syntax> {
        let mut text = String::new();
        loop {
            match self.next() {
                None => return Err(Syntax("a string is not closed".into())),
                Some('\'') => return Ok(Ok(Value::text(text))),
                Some('\\') => {
                    let escaped = self.peek().filter(|c| matches!(c, '\\' | '\''));
                    if escaped.is_some() {
                        self.at += 1;
                    }
                    text.push(escaped.unwrap_or('\\'));
                }
                Some(c) => text.push(c),
            }
        }
    }

    fn double_quoted(&mut self) -> Result<Outcome, Syntax> {
        let mut text = String::new();
        let mut fault = None;
        let mut sensitive = false;
        loop {
            if self.rest().starts_with(OPEN) {
                self.at += OPEN.len();
                let put = self.closed()?.and_then(|value| {
                    sensitive |= value.hidden();
                    self.write(&value, false, &mut text)
                });
                fault = fault.or(put.err());
                continue;
            }
            match self.next() {
                None => return Err(Syntax("a string is not closed".into())),
                Some('"') => break,
                Some('\\') => text.push_str(&self.escaped()?),
                Some(c) => text.push(c),
            }
        }
        Ok(match fault {
            Some(fault) => Err(fault),
            None => Ok(Value::text(text).marked(sensitive)),
        })
    }

    /// Reads what follows a backslash in double quotes.
    fn escaped(&mut self) -> Result<String, Syntax> {
        if self.rest().starts_with(OPEN) {
            self.at += OPEN.len();
            return Ok(OPEN.to_owned());
        }
        let c = match self.next() {
            Some(c @ ('\\' | '"' | '/')) => c,
            Some('n') => '\n',
            Some('r') => '\r',
            Some('t') => '\t',
            Some('a') => '\u{7}',
            Some('b') => '\u{8}',
            Some('f') => '\u{c}',
            Some('v') => '\u{b}',
            Some('u') => {
                let code = self.rest().get(..4).and_then(|hex| u32::from_str_radix(hex, 16).ok());
                let Some(c) = code.and_then(char::from_u32) else {
                    return Err(Syntax("`\\u` needs four digits of a character".into()));
                };
                self.at += 4;
                c
            }
            Some(c) => return Err(Syntax(format!("`\\{c}` means nothing in a string"))),
            None => return Err(Syntax("a string is not closed".into())),
        };
        Ok(c.to_string())
    }

    fn call(&self, function: &Value, arguments: &[Value], path: &str) -> Outcome {
        let Kind::Function(name) = &function.kind else {
            return Err(Fault::new(format!("`{path}` calls {}", function.word())));
        };
        let [argument] = arguments else {
            return Err(Fault::new(format!("`{path}` needs one argument")));
        };
        let value = match name {
            Function::Bool => Value::new(Kind::Bool(argument.truthy())),
            Function::Str => {
                let mut text = String::new();
                self.write(argument, false, &mut text)?;
                Value::text(text)
            }
            Function::Num => match number_of(argument) {
                Some(number) => finite(number)?,
                None => return Err(Fault::new(format!("`{path}` is given no number"))),
            },
        };
        Ok(value.marked(argument.hidden()))
    }

    fn apply(&self, sign: &str, operator: Operator, left: Outcome, right: Outcome) -> Outcome {
        let left = match (operator, left) {
            (Operator::Or, Err(fault)) if fault.missing => return right,
            (_, left) => left?,
        };
        match operator {
            Operator::Or if left.truthy() => return Ok(left),
            Operator::And if !left.truthy() => return Ok(left),
            Operator::Or | Operator::And => {
                return right.map(|right| right.marked(left.hidden()));
            }
            Operator::Equal
            | Operator::NotEqual
            | Operator::LessEqual
            | Operator::GreaterEqual
            | Operator::Less
            | Operator::Greater
            | Operator::Add
            | Operator::Subtract
            | Operator::Multiply
            | Operator::Divide
            | Operator::Modulo => {}
        }
        let right = right?;
        let hidden = left.hidden() || right.hidden();
        let compared =
            |holds: fn(Ordering) -> bool| Ok(Value::new(Kind::Bool(holds(left.order(&right)))));
        let value = match operator {
            Operator::Equal => compared(Ordering::is_eq),
            Operator::NotEqual => compared(Ordering::is_ne),
            Operator::LessEqual => compared(Ordering::is_le),
            Operator::GreaterEqual => compared(Ordering::is_ge),
            Operator::Less => compared(Ordering::is_lt),
            Operator::Greater => compared(Ordering::is_gt),
            Operator::Or
            | Operator::And
            | Operator::Add
            | Operator::Subtract
            | Operator::Multiply
            | Operator::Divide
            | Operator::Modulo => match (operator, &left.kind, &right.kind) {
                (_, Kind::Number(a), Kind::Number(b)) => arithmetic(operator, *a, *b),
                (Operator::Add, Kind::Text(_), Kind::Text(_)) => {
                    let mut text = String::new();
                    self.write(&left, false, &mut text)
                        .and_then(|()| self.write(&right, false, &mut text))
                        .map(|()| Value::text(text))
                }
                _ => Err(Fault::new(format!(
                    "`{sign}` cannot take {} and {}",
                    left.word(),
                    right.word()
                ))),
            },
        }?;
        Ok(value.marked(hidden))
    }

    /// Writes a value's text form: strings as they are, lists and objects as JSON.
    fn write(&self, value: &Value, within: bool, out: &mut String) -> Result<(), Fault> {
        let text: &str = match &value.kind {
            Kind::Text(text) if within => &serde_json::Value::from(&**text).to_string(),
            Kind::Text(text) => text,
            Kind::Null if within => "null",
            Kind::Null => "<null>",
            Kind::Bool(true) => "true",
            Kind::Bool(false) => "false",
            Kind::Number(number) => &number.to_string(),
            Kind::Function(_) => return Err(Fault::new("a function has no text form")),
            Kind::List(items) => {
                out.push('[');
                for (at, item) in items.iter().enumerate() {
                    if at > 0 {
                        out.push(',');
                    }
                    self.write(item, true, out)?;
                }
                "]"
            }
            Kind::Object(members) => {
                out.push('{');
                for (at, (name, item)) in members.iter().enumerate() {
                    if at > 0 {
                        out.push(',');
                    }
                    out.push_str(&serde_json::Value::from(name.as_str()).to_string());
                    out.push(':');
                    self.write(item, true, out)?;
                }
                "}"
            }
        };
        let Some(room) = self.room.get().checked_sub(text.len() + 1) else {
            return Err(Fault::new("the result is too long"));
        };
        self.room.set(room);
        out.push_str(text);
        Ok(())
    }
}

fn member(value: &Value, name: &str, path: &str) -> Outcome {
    match &value.kind {
        Kind::Object(members) => match members.get(name) {
            Some(member) => Ok(member.clone().marked(value.sensitive)),
            None => Err(Fault::missing(format!("`{path}` does not exist"))),
        },
        Kind::Null
        | Kind::Bool(_)
        | Kind::Number(_)
        | Kind::Text(_)
        | Kind::List(_)
        | Kind::Function(_) => {
            Err(Fault::new(format!("`{path}`: {} has no members", value.word())))
        }
    }
}

fn element(value: &Value, index: &Value, path: &str) -> Outcome {
    let hidden = value.sensitive || index.sensitive;
    let found = match (&value.kind, &index.kind) {
        // The text of a number is a count exactly if the number is one.
        (Kind::List(items), Kind::Number(at)) => {
            at.to_string().parse::<usize>().ok().and_then(|at| items.get(at))
        }
        (Kind::Object(members), Kind::Text(name)) => members.get(&**name),
        _ => {
            return Err(Fault::new(format!(
                "`{path}`: {} cannot be asked for by {}",
                value.word(),
                index.word()
            )));
        }
    };
    match found {
        Some(found) => Ok(found.clone().marked(hidden)),
        None => Err(Fault::missing(format!("`{path}` does not exist"))),
    }
}

fn number_of(value: &Value) -> Option<f64> {
    if let Kind::Number(number) = value.kind {
        return Some(number);
    }
    let Kind::Text(text) = &value.kind else { return None };
    let text = text.trim();
    // What f64 reads beyond digits, such as `inf`, is no number here.
    let digits = text.chars().all(|c| c.is_ascii_digit() || "+-.eE".contains(c));
    text.parse().ok().filter(|_| digits)
}

fn arithmetic(operator: Operator, a: f64, b: f64) -> Outcome {
    let divides = matches!(operator, Operator::Divide | Operator::Modulo);
    if divides && b.total_cmp(&0.0).is_eq() {
        return Err(Fault::new("a division by zero"));
    }
    finite(match operator {
        Operator::Add => a + b,
        Operator::Subtract => a - b,
        Operator::Multiply => a * b,
        Operator::Divide => a / b,
        Operator::Modulo => a % b,
        Operator::Or
        | Operator::And
        | Operator::Equal
        | Operator::NotEqual
        | Operator::LessEqual
        | Operator::GreaterEqual
        | Operator::Less
        | Operator::Greater => f64::NAN,
    })
}

/// Takes a number that is one; there is one zero.
fn finite(number: f64) -> Outcome {
    if number.is_finite() {
        Ok(Value::new(Kind::Number(number + 0.0)))
    } else {
        Err(Fault::new("a number that is too large"))
    }
}

#[cfg(test)]
#[path = "moa_tests.rs"]
mod tests;
