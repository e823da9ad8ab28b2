//! What stands between `${{` and `}}`: GitLab's expression language Moa (GitLab,
//! `doc/ci/functions/moa.md`).
//!
//! Values are computed while the text is read. Nothing in the language has an effect, so the side of an
//! operator that does not count is computed too and thrown away. What cannot be computed is a value of
//! its own until it is needed: `job.inputs.maybe || "default"` asks for it and goes on.

mod lexer;
mod operators;
mod parser;
#[cfg(test)]
mod tests;
mod value;

use std::cell::Cell;

use self::lexer::Syntax;
use self::parser::Parser;
use self::value::Fault;
pub(super) use self::value::Value;

/// How much of an expression is shown in a complaint, in characters.
const SHOWN: usize = 80;

const OPEN: &str = "${{";
const CLOSE: &str = "}}";

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
        let mut parser = Parser::new(after, job, room);
        let value = match parser.closed() {
            Ok(Ok(value)) => value,
            Ok(Err(Fault { text, .. })) | Err(Syntax(text)) => {
                return Err(MoaError(format!("{text} in {}", shown(after))));
            }
        };
        filled.sensitive |= value.hidden();
        let put = value.write(false, room, &mut filled.text);
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
