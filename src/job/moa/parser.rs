//! Reads an expression and computes it.

use std::cell::Cell;
use std::collections::BTreeMap;

use super::lexer::{Lexer, Syntax, is_reserved};
use super::value::{Fault, Function, Kind, Outcome, Value, finite};
use super::{CLOSE, brief};

/// How deep expressions may be nested; nobody writes the tenth part of that.
const DEEPEST: usize = 64;

/// Reads one expression after the other.
pub(super) struct Parser<'a> {
    lexer: Lexer<'a>,
    depth: usize,
    job: &'a Value,
    room: &'a Cell<usize>,
}

impl<'a> Parser<'a> {
    /// Begins behind the sign that opens an expression.
    pub(super) fn new(text: &'a str, job: &'a Value, room: &'a Cell<usize>) -> Self {
        Self { lexer: Lexer::new(text), depth: 0, job, room }
    }

    /// Gives what is not read yet.
    pub(super) fn rest(&self) -> &'a str {
        self.lexer.rest()
    }

    /// Reads an expression and the braces after it.
    pub(super) fn closed(&mut self) -> Result<Outcome, Syntax> {
        let value = self.expression(1)?;
        self.lexer.expect(CLOSE)?;
        Ok(value)
    }

    fn expression(&mut self, least: u8) -> Result<Outcome, Syntax> {
        let mut value = self.unary()?;
        while let Some((sign, operator, strength)) = self.lexer.operator(least) {
            let right = self.expression(strength + 1)?;
            value = operator.apply(sign, value, right, self.room);
        }
        Ok(value)
    }

    fn unary(&mut self) -> Result<Outcome, Syntax> {
        self.depth += 1;
        if self.depth > DEEPEST {
            return Err(Syntax("the expression is nested too deeply".into()));
        }
        self.lexer.skip_space();
        let value = match self.lexer.peek() {
            Some('!') => {
                self.lexer.next();
                self.unary()?.map(|v| Value::new(Kind::Bool(!v.truthy())).marked(v.hidden()))
            }
            Some(sign @ ('+' | '-')) => {
                self.lexer.next();
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
                let start = self.lexer.at();
                let value = self.primary()?;
                self.postfix(start, value)?
            }
        };
        self.depth -= 1;
        Ok(value)
    }

    fn primary(&mut self) -> Result<Outcome, Syntax> {
        match self.lexer.peek() {
            Some('(') => {
                self.lexer.next();
                let value = self.expression(1)?;
                self.lexer.expect(")")?;
                Ok(value)
            }
            Some('[') => {
                self.lexer.next();
                let items = self.items("]")?;
                Ok(items.map(|items| Value::new(Kind::List(items.into()))))
            }
            Some('{') => {
                self.lexer.next();
                self.object()
            }
            Some('\'') => {
                self.lexer.next();
                Ok(Ok(Value::text(self.lexer.single_quoted()?)))
            }
            Some('"') => {
                self.lexer.next();
                self.double_quoted()
            }
            Some(c) if c.is_ascii_digit() => Ok(finite(self.lexer.number())),
            Some(_) => {
                let Some(name) = self.lexer.identifier() else {
                    return Err(self.lexer.unexpected("an expression"));
                };
                match name {
                    "null" => Ok(Ok(Value::new(Kind::Null))),
                    "true" => Ok(Ok(Value::new(Kind::Bool(true)))),
                    "false" => Ok(Ok(Value::new(Kind::Bool(false)))),
                    "job" => Ok(Ok(self.job.clone())),
                    "bool" => Ok(Ok(Value::new(Kind::Function(Function::Bool)))),
                    "num" => Ok(Ok(Value::new(Kind::Function(Function::Num)))),
                    "str" => Ok(Ok(Value::new(Kind::Function(Function::Str)))),
                    name if is_reserved(name) => {
                        Err(Syntax(format!("`{name}` is a reserved word")))
                    }
                    name => Ok(Err(Fault::new(format!(
                        "`{name}` is not known here, only `job.inputs` is,"
                    )))),
                }
            }
            None => Err(self.lexer.unexpected("an expression")),
        }
    }

    /// Reads what follows a value: members, elements, arguments.
    fn postfix(&mut self, start: usize, mut value: Outcome) -> Result<Outcome, Syntax> {
        loop {
            if self.lexer.take(".") {
                self.lexer.skip_space();
                let Some(name) = self.lexer.identifier() else {
                    return Err(self.lexer.unexpected("a name"));
                };
                let path = brief(self.lexer.since(start));
                value = value.and_then(|value| value.member(name, &path));
            } else if self.lexer.take("[") {
                let index = self.expression(1)?;
                self.lexer.expect("]")?;
                let path = brief(self.lexer.since(start));
                value = match (value, index) {
                    (Ok(value), Ok(index)) => value.element(&index, &path),
                    (Err(fault), _) | (Ok(_), Err(fault)) => Err(fault),
                };
            } else if self.lexer.take("(") {
                let arguments = self.items(")")?;
                let path = brief(self.lexer.since(start));
                value = match (value, arguments) {
                    (Ok(value), Ok(arguments)) => value.call(&arguments, &path, self.room),
                    (Err(fault), _) | (Ok(_), Err(fault)) => Err(fault),
                };
            } else {
                return Ok(value);
            }
        }
    }

    /// Reads expressions with commas between them up to `end`; one more comma does not matter.
    fn items(&mut self, end: &str) -> Result<Result<Vec<Value>, Fault>, Syntax> {
        let mut items = Ok(Vec::new());
        loop {
            if self.lexer.take(end) {
                return Ok(items);
            }
            let item = self.expression(1)?;
            items = items.and_then(|mut items: Vec<Value>| {
                items.push(item?);
                Ok(items)
            });
            if !self.lexer.take(",") {
                self.lexer.expect(end)?;
                return Ok(items);
            }
        }
    }

    fn object(&mut self) -> Result<Outcome, Syntax> {
        let mut members = Ok(BTreeMap::new());
        loop {
            if self.lexer.take("}") {
                break;
            }
            self.lexer.skip_space();
            // A bare name is that name, not what it stands for.
            let key = match self.lexer.identifier() {
                Some(name) => Ok(Value::text(name)),
                None => self.expression(1)?,
            };
            self.lexer.expect(":")?;
            let value = self.expression(1)?;
            members = members.and_then(|mut members: BTreeMap<String, Value>| {
                let (key, value) = (key?, value?);
                let Kind::Text(name) = &key.kind else {
                    return Err(Fault::new(format!("{} cannot be a key", key.word())));
                };
                members.insert(name.to_string(), value.marked(key.sensitive));
                Ok(members)
            });
            if !self.lexer.take(",") {
                self.lexer.expect("}")?;
                break;
            }
        }
        Ok(members.map(Value::object))
    }

    fn double_quoted(&mut self) -> Result<Outcome, Syntax> {
        let mut text = String::new();
        let mut fault = None;
        let mut sensitive = false;
        loop {
            if self.lexer.opens() {
                let put = self.closed()?.and_then(|value| {
                    sensitive |= value.hidden();
                    value.write(false, self.room, &mut text)
                });
                fault = fault.or(put.err());
                continue;
            }
            match self.lexer.next() {
                None => return Err(Syntax("a string is not closed".into())),
                Some('"') => break,
                Some('\\') => text.push_str(&self.lexer.escaped()?),
                Some(c) => text.push(c),
            }
        }
        Ok(match fault {
            Some(fault) => Err(fault),
            None => Ok(Value::text(text).marked(sensitive)),
        })
    }
}
