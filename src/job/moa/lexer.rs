//! The tokens of an expression: signs, names, numbers, strings.

use super::OPEN;
use super::operators::{OPERATORS, Operator};

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

/// Why a text is no expression.
pub(super) struct Syntax(pub(super) String);

/// Says whether a name is one that Moa keeps for later.
pub(super) fn is_reserved(name: &str) -> bool {
    RESERVED.contains(&name)
}

/// A text and how much of it is read.
pub(super) struct Lexer<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Lexer<'a> {
    /// Begins at the beginning.
    pub(super) fn new(text: &'a str) -> Self {
        Self { text, at: 0 }
    }

    /// Says how much is read, in bytes.
    pub(super) fn at(&self) -> usize {
        self.at
    }

    /// Gives what was read since then.
    pub(super) fn since(&self, start: usize) -> &'a str {
        self.text.get(start..self.at).unwrap_or_default()
    }

    /// Gives what is not read yet.
    pub(super) fn rest(&self) -> &'a str {
        self.text.get(self.at..).unwrap_or_default()
    }

    /// Gives the next character without taking it.
    pub(super) fn peek(&self) -> Option<char> {
        self.rest().chars().next()
    }

    /// Takes the next character.
    pub(super) fn next(&mut self) -> Option<char> {
        let c = self.peek()?;
        self.at += c.len_utf8();
        Some(c)
    }

    /// Takes the white space that comes next.
    pub(super) fn skip_space(&mut self) {
        let rest = self.rest();
        self.at += rest.len() - rest.trim_start().len();
    }

    /// Takes this token, white space before it included, if it comes next.
    pub(super) fn take(&mut self, token: &str) -> bool {
        self.skip_space();
        let there = self.rest().starts_with(token);
        if there {
            self.at += token.len();
        }
        there
    }

    /// Takes this token, which has to come next.
    pub(super) fn expect(&mut self, token: &str) -> Result<(), Syntax> {
        if self.take(token) { Ok(()) } else { Err(self.unexpected(&format!("`{token}`"))) }
    }

    /// Says that something else was wanted than what comes next.
    pub(super) fn unexpected(&self, wanted: &str) -> Syntax {
        match self.peek() {
            None => Syntax(format!("expected {wanted}, but the text ends")),
            Some(c) => Syntax(format!("expected {wanted}, found {c:?}")),
        }
    }

    /// Takes the sign that begins an expression within a text, if it comes right here.
    pub(super) fn opens(&mut self) -> bool {
        let opens = self.rest().starts_with(OPEN);
        if opens {
            self.at += OPEN.len();
        }
        opens
    }

    /// Takes an operator that binds at least so strongly, if one comes next.
    pub(super) fn operator(&mut self, least: u8) -> Option<(&'static str, Operator, u8)> {
        self.skip_space();
        let rest = self.rest();
        let (sign, operator, strength) =
            OPERATORS.into_iter().find(|(sign, _, _)| rest.starts_with(sign))?;
        if strength < least {
            return None;
        }
        self.at += sign.len();
        Some((sign, operator, strength))
    }

    /// Takes a name if one comes next.
    pub(super) fn identifier(&mut self) -> Option<&'a str> {
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

    /// Takes a number that begins with the digit that comes next.
    pub(super) fn number(&mut self) -> f64 {
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
        text.parse().unwrap_or(f64::NAN)
    }

    /// Takes the rest of a string that began with a single quote.
    pub(super) fn single_quoted(&mut self) -> Result<String, Syntax> {
        let mut text = String::new();
        loop {
            match self.next() {
                None => return Err(Syntax("a string is not closed".into())),
                Some('\'') => return Ok(text),
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

    /// Takes what follows a backslash in double quotes.
    pub(super) fn escaped(&mut self) -> Result<String, Syntax> {
        if self.opens() {
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
}
