//! Values: what they are, what can be asked of them, how they are ordered and written.

use std::cell::Cell;
use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::rc::Rc;

/// A value, and whether it must not be shown.
#[derive(Clone)]
pub(in crate::job) struct Value {
    pub(super) kind: Kind,
    pub(super) sensitive: bool,
}

/// What a value is.
#[derive(Clone)]
pub(super) enum Kind {
    Null,
    Bool(bool),
    /// Always finite.
    Number(f64),
    Text(Rc<str>),
    List(Rc<[Value]>),
    Object(Rc<BTreeMap<String, Value>>),
    Function(Function),
}

/// What can be called.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Function {
    Bool,
    Num,
    Str,
}

/// Why an expression has no value.
#[derive(Clone, Debug)]
pub(super) struct Fault {
    pub(super) text: String,
    /// Something does not exist, for which `||` has a remedy.
    pub(super) missing: bool,
}

/// A value, or why there is none.
pub(super) type Outcome = Result<Value, Fault>;

impl Value {
    pub(super) fn new(kind: Kind) -> Self {
        Self { kind, sensitive: false }
    }

    pub(super) fn text(text: impl Into<Rc<str>>) -> Self {
        Self::new(Kind::Text(text.into()))
    }

    /// Makes an object.
    pub(in crate::job) fn object(members: BTreeMap<String, Self>) -> Self {
        Self::new(Kind::Object(Rc::new(members)))
    }

    /// Makes a value of JSON.
    pub(in crate::job) fn of_json(json: &serde_json::Value, sensitive: bool) -> Self {
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

    pub(super) fn marked(mut self, sensitive: bool) -> Self {
        self.sensitive |= sensitive;
        self
    }

    /// Says whether it or anything in it must not be shown.
    pub(super) fn hidden(&self) -> bool {
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

    pub(super) fn truthy(&self) -> bool {
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

    pub(super) fn word(&self) -> &'static str {
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

    pub(super) fn order(&self, other: &Self) -> Ordering {
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

    /// Gives a member, as the text `path` asks for it.
    pub(super) fn member(&self, name: &str, path: &str) -> Outcome {
        match &self.kind {
            Kind::Object(members) => match members.get(name) {
                Some(member) => Ok(member.clone().marked(self.sensitive)),
                None => Err(Fault::missing(format!("`{path}` does not exist"))),
            },
            Kind::Null
            | Kind::Bool(_)
            | Kind::Number(_)
            | Kind::Text(_)
            | Kind::List(_)
            | Kind::Function(_) => {
                Err(Fault::new(format!("`{path}`: {} has no members", self.word())))
            }
        }
    }

    /// Gives an element, as the text `path` asks for it.
    pub(super) fn element(&self, index: &Self, path: &str) -> Outcome {
        let hidden = self.sensitive || index.sensitive;
        let found = match (&self.kind, &index.kind) {
            // The text of a number is a count exactly if the number is one.
            (Kind::List(items), Kind::Number(at)) => {
                at.to_string().parse::<usize>().ok().and_then(|at| items.get(at))
            }
            (Kind::Object(members), Kind::Text(name)) => members.get(&**name),
            _ => {
                return Err(Fault::new(format!(
                    "`{path}`: {} cannot be asked for by {}",
                    self.word(),
                    index.word()
                )));
            }
        };
        match found {
            Some(found) => Ok(found.clone().marked(hidden)),
            None => Err(Fault::missing(format!("`{path}` does not exist"))),
        }
    }

    /// Calls it, as the text `path` says.
    pub(super) fn call(&self, arguments: &[Self], path: &str, room: &Cell<usize>) -> Outcome {
        let Kind::Function(name) = &self.kind else {
            return Err(Fault::new(format!("`{path}` calls {}", self.word())));
        };
        let [argument] = arguments else {
            return Err(Fault::new(format!("`{path}` needs one argument")));
        };
        let value = match name {
            Function::Bool => Self::new(Kind::Bool(argument.truthy())),
            Function::Str => {
                let mut text = String::new();
                argument.write(false, room, &mut text)?;
                Self::text(text)
            }
            Function::Num => match argument.number() {
                Some(number) => finite(number)?,
                None => return Err(Fault::new(format!("`{path}` is given no number"))),
            },
        };
        Ok(value.marked(argument.hidden()))
    }

    /// Gives the number that it is or that its text says.
    fn number(&self) -> Option<f64> {
        if let Kind::Number(number) = self.kind {
            return Some(number);
        }
        let Kind::Text(text) = &self.kind else { return None };
        let text = text.trim();
        // What f64 reads beyond digits, such as `inf`, is no number here.
        let digits = text.chars().all(|c| c.is_ascii_digit() || "+-.eE".contains(c));
        text.parse().ok().filter(|_| digits)
    }

    /// Writes a value's text form: strings as they are, lists and objects as JSON.
    ///
    /// `room` is how many bytes may still be made; it shrinks.
    pub(super) fn write(
        &self,
        within: bool,
        room: &Cell<usize>,
        out: &mut String,
    ) -> Result<(), Fault> {
        let text: &str = match &self.kind {
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
                    item.write(true, room, out)?;
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
                    item.write(true, room, out)?;
                }
                "}"
            }
        };
        let Some(left) = room.get().checked_sub(text.len() + 1) else {
            return Err(Fault::new("the result is too long"));
        };
        room.set(left);
        out.push_str(text);
        Ok(())
    }
}

impl Fault {
    pub(super) fn new(text: impl Into<String>) -> Self {
        Self { text: text.into(), missing: false }
    }

    pub(super) fn missing(text: impl Into<String>) -> Self {
        Self { text: text.into(), missing: true }
    }
}

/// Takes a number that is one; there is one zero.
pub(super) fn finite(number: f64) -> Outcome {
    if number.is_finite() {
        Ok(Value::new(Kind::Number(number + 0.0)))
    } else {
        Err(Fault::new("a number that is too large"))
    }
}
