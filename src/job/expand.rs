//! Parameter expansion as a shell does it inside double quotes.
//!
//! Names and patterns of artifacts and caches are expanded so, from the environment that a job has at
//! its end (gitlab-runner, `commands/helpers/artifacts_uploader.go`): `$X`, `${X}`, defaults, lengths,
//! prefixes, suffixes, replacements, upper and lower case. Commands are not run.

/// Deeper nesting is nobody's wish.
const DEEPEST: usize = 32;

/// Why a text stays as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum ExpandError {
    #[error("a `${{` has no end")]
    Unclosed,
    #[error("commands and sums are not supported")]
    Command,
    #[error("a `${{…}}` is none a shell knows")]
    Unknown,
    #[error("a variable that must be set is not")]
    Unset,
    #[error("it is nested too deeply")]
    TooDeep,
}

/// Expands a text; `lookup` gives a variable's value, if it is set.
pub(super) fn expand<'v>(
    text: &str,
    lookup: &dyn Fn(&str) -> Option<&'v str>,
) -> Result<String, ExpandError> {
    let chars: Vec<char> = text.chars().collect();
    let mut reader = Reader { chars: &chars, at: 0, lookup, depth: 0 };
    reader.text(None)
}

struct Reader<'a, 'v> {
    chars: &'a [char],
    at: usize,
    lookup: &'a dyn Fn(&str) -> Option<&'v str>,
    depth: usize,
}

impl Reader<'_, '_> {
    fn peek(&self) -> Option<char> {
        self.chars.get(self.at).copied()
    }

    fn next(&mut self) -> Option<char> {
        let c = self.peek()?;
        self.at += 1;
        Some(c)
    }

    fn take(&mut self, wanted: char) -> bool {
        let there = self.peek() == Some(wanted);
        self.at += usize::from(there);
        there
    }

    /// Expands up to the end, or to one of the characters, which is left unread.
    fn text(&mut self, until: Option<&[char]>) -> Result<String, ExpandError> {
        let mut result = String::new();
        loop {
            let Some(c) = self.peek() else {
                return if until.is_none() { Ok(result) } else { Err(ExpandError::Unclosed) };
            };
            if until.is_some_and(|ends| ends.contains(&c)) {
                return Ok(result);
            }
            self.at += 1;
            match c {
                '\\' => match self.peek() {
                    Some(escaped @ ('$' | '`' | '\\')) => {
                        self.at += 1;
                        result.push(escaped);
                    }
                    Some(end) if until.is_some_and(|ends| ends.contains(&end)) => {
                        self.at += 1;
                        result.push(end);
                    }
                    _ => result.push('\\'),
                },
                '`' => return Err(ExpandError::Command),
                '$' => self.dollar(&mut result)?,
                c => result.push(c),
            }
        }
    }

    fn dollar(&mut self, result: &mut String) -> Result<(), ExpandError> {
        match self.peek() {
            Some('(') => Err(ExpandError::Command),
            Some('{') => {
                self.at += 1;
                self.depth += 1;
                if self.depth > DEEPEST {
                    return Err(ExpandError::TooDeep);
                }
                result.push_str(&self.braces()?);
                self.depth -= 1;
                Ok(())
            }
            Some(c) if c.is_ascii_alphabetic() || c == '_' => {
                let name = self.name();
                result.push_str((self.lookup)(&name).unwrap_or_default());
                Ok(())
            }
            // What a shell keeps of its own arguments: there are none.
            Some('0'..='9' | '@' | '*' | '#' | '?' | '-' | '$' | '!') => {
                self.at += 1;
                Ok(())
            }
            _ => {
                result.push('$');
                Ok(())
            }
        }
    }

    fn name(&mut self) -> String {
        let mut name = String::new();
        while let Some(c) = self.peek().filter(|c| c.is_ascii_alphanumeric() || *c == '_') {
            name.push(c);
            self.at += 1;
        }
        name
    }

    /// Reads what follows `${`, with its end.
    fn braces(&mut self) -> Result<String, ExpandError> {
        let length = self.peek() == Some('#')
            && self.chars.get(self.at + 1).is_some_and(|c| c.is_ascii_alphabetic() || *c == '_');
        self.at += usize::from(length);
        let name = self.name();
        if name.is_empty() || name.starts_with(|c: char| c.is_ascii_digit()) {
            return Err(if self.chars.get(self.at..).is_some_and(|rest| rest.contains(&'}')) {
                ExpandError::Unknown
            } else {
                ExpandError::Unclosed
            });
        }
        let value = (self.lookup)(&name);
        if length {
            self.close()?;
            return Ok(value.unwrap_or_default().chars().count().to_string());
        }
        if self.take('}') {
            return Ok(value.unwrap_or_default().to_owned());
        }
        let value_or_empty = value.unwrap_or_default();
        let colon = self.take(':');
        // With a colon, an empty value counts as none.
        let set = value.filter(|value| !(colon && value.is_empty()));
        match self.next().ok_or(ExpandError::Unclosed)? {
            '-' | '=' => {
                let word = self.word()?;
                Ok(set.map_or(word, str::to_owned))
            }
            '+' => {
                let word = self.word()?;
                Ok(if set.is_some() { word } else { String::new() })
            }
            '?' => {
                self.word()?;
                set.map(str::to_owned).ok_or(ExpandError::Unset)
            }
            first if colon => self.part(first, value_or_empty),
            '%' => {
                let longest = self.take('%');
                let pattern = self.word()?;
                Ok(without_suffix(value_or_empty, &pattern, longest))
            }
            '#' => {
                let longest = self.take('#');
                let pattern = self.word()?;
                Ok(without_prefix(value_or_empty, &pattern, longest))
            }
            '/' => {
                let all = self.take('/');
                let pattern = self.text(Some(&['/', '}']))?;
                let by = if self.take('/') { self.text(Some(&['}']))? } else { String::new() };
                self.close()?;
                Ok(replaced(value_or_empty, &pattern, &by, all))
            }
            case @ ('^' | ',') => {
                let all = self.take(case);
                self.close()?;
                Ok(cased(value_or_empty, case == '^', all))
            }
            _ => Err(ExpandError::Unknown),
        }
    }

    fn word(&mut self) -> Result<String, ExpandError> {
        let word = self.text(Some(&['}']))?;
        self.close()?;
        Ok(word)
    }

    fn close(&mut self) -> Result<(), ExpandError> {
        match self.next() {
            Some('}') => Ok(()),
            Some(_) => Err(ExpandError::Unknown),
            None => Err(ExpandError::Unclosed),
        }
    }

    /// `${X:2}`, `${X:2:3}`; negative numbers count from the end.
    fn part(&mut self, first: char, value: &str) -> Result<String, ExpandError> {
        let rest = self.word()?;
        let text = format!("{first}{rest}");
        let (from, count) = match text.split_once(':') {
            Some((from, count)) => (from, Some(count)),
            None => (text.as_str(), None),
        };
        let number = |text: &str| text.trim().parse::<i64>().map_err(|_odd| ExpandError::Unknown);
        let chars: Vec<char> = value.chars().collect();
        let len = i64::try_from(chars.len()).unwrap_or(i64::MAX);
        let place = |n: i64| if n < 0 { len.saturating_add(n) } else { n }.clamp(0, len);
        let from = place(number(from)?);
        let end = match count.map(number).transpose()? {
            None => len,
            Some(count) if count < 0 => place(count),
            Some(count) => from.saturating_add(count).min(len),
        };
        let index = |n: i64| usize::try_from(n).unwrap_or_default();
        Ok(chars.get(index(from)..index(end)).unwrap_or_default().iter().collect())
    }
}

fn without_suffix(value: &str, pattern: &str, longest: bool) -> String {
    let (value, pattern) = (chars(value), chars(pattern));
    let fits = |at: &usize| matches(&pattern, value.get(*at..).unwrap_or_default());
    let cut =
        if longest { (0..=value.len()).find(fits) } else { (0..=value.len()).rev().find(fits) };
    value.get(..cut.unwrap_or(value.len())).unwrap_or_default().iter().collect()
}

fn without_prefix(value: &str, pattern: &str, longest: bool) -> String {
    let (value, pattern) = (chars(value), chars(pattern));
    let fits = |at: &usize| matches(&pattern, value.get(..*at).unwrap_or_default());
    let cut =
        if longest { (0..=value.len()).rev().find(fits) } else { (0..=value.len()).find(fits) };
    value.get(cut.unwrap_or(0)..).unwrap_or_default().iter().collect()
}

fn replaced(value: &str, pattern: &str, by: &str, all: bool) -> String {
    let (value, pattern) = (chars(value), chars(pattern));
    if pattern.is_empty() {
        return value.iter().collect();
    }
    let mut result = String::new();
    let mut at = 0;
    let mut done = false;
    while at < value.len() {
        let fits = |end: &usize| matches(&pattern, value.get(at..*end).unwrap_or_default());
        match (at + 1..=value.len()).rev().find(fits).filter(|_| all || !done) {
            Some(end) => {
                result.push_str(by);
                at = end;
                done = true;
            }
            None => {
                result.extend(value.get(at));
                at += 1;
            }
        }
    }
    result
}

fn cased(value: &str, upper: bool, all: bool) -> String {
    let turn = |c: char| -> String {
        if upper { c.to_uppercase().collect() } else { c.to_lowercase().collect() }
    };
    value
        .chars()
        .enumerate()
        .map(|(at, c)| if all || at == 0 { turn(c) } else { c.to_string() })
        .collect()
}

fn chars(text: &str) -> Vec<char> {
    text.chars().collect()
}

/// Matches a shell pattern against a whole text: `*`, `?`, `[…]`, `\`.
///
/// At most one star is open at a time, so the cost is the product of the lengths.
fn matches(pattern: &[char], text: &[char]) -> bool {
    let (mut p, mut t) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    loop {
        let step = match pattern.get(p) {
            Some('*') => {
                star = Some((p, t));
                p += 1;
                continue;
            }
            None if t == text.len() => return true,
            None => None,
            Some(_) => text.get(t).and_then(|c| one(pattern.get(p..).unwrap_or_default(), *c)),
        };
        match (step, star) {
            (Some(taken), _) => {
                p += taken;
                t += 1;
            }
            (None, Some((at, from))) if from < text.len() => {
                star = Some((at, from + 1));
                p = at + 1;
                t = from + 1;
            }
            (None, _) => return false,
        }
    }
}

/// Matches one character; gives how much of the pattern that took.
fn one(pattern: &[char], c: char) -> Option<usize> {
    match pattern.first()? {
        '?' => Some(1),
        '\\' if pattern.len() > 1 => (pattern.get(1) == Some(&c)).then_some(2),
        '[' => {
            let negated = matches!(pattern.get(1), Some('!' | '^'));
            let start = 1 + usize::from(negated);
            // A bracket that comes first is a member.
            let end = pattern.iter().skip(start + 1).position(|c| *c == ']')? + start + 1;
            let set = pattern.get(start..end)?;
            let mut inside = false;
            let mut at = 0;
            while let Some(low) = set.get(at) {
                match (set.get(at + 1), set.get(at + 2)) {
                    (Some('-'), Some(high)) => {
                        inside |= (*low..=*high).contains(&c);
                        at += 3;
                    }
                    _ => {
                        inside |= *low == c;
                        at += 1;
                    }
                }
            }
            (inside != negated).then_some(end + 1)
        }
        literal => (*literal == c).then_some(1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lookup(name: &str) -> Option<&'static str> {
        match name {
            "A" => Some("one"),
            "EMPTY" => Some(""),
            "REF" => Some("feature/Big-Thing_é"),
            "FILE" => Some("a/b/c.tar.gz"),
            "D" => Some("$A"),
            _ => None,
        }
    }

    #[test]
    fn texts_are_expanded_as_a_shell_does() {
        for (text, expected) in [
            ("", ""),
            ("plain", "plain"),
            ("$A-${A}_x", "one-one_x"),
            ("$NONE|${NONE}|", "||"),
            ("$D", "$A"),
            ("${NONE:-x}", "x"),
            ("${EMPTY:-x}|${EMPTY-x}|", "x||"),
            ("${NONE-x}", "x"),
            ("${A:-x}", "one"),
            ("${NONE:-$A/${A}}", "one/one"),
            ("${NONE:-${EMPTY:-${A}}}", "one"),
            ("${NONE:-}", ""),
            ("${NONE:=x}", "x"),
            ("${A:+yes}|${EMPTY:+yes}|${EMPTY+yes}|${NONE+yes}|", "yes||yes||"),
            ("${#A}|${#REF}|${#NONE}", "3|19|0"),
            ("${FILE##*/}", "c.tar.gz"),
            ("${FILE#*/}", "b/c.tar.gz"),
            ("${FILE%.*}", "a/b/c.tar"),
            ("${FILE%%.*}", "a/b/c"),
            ("${FILE%[a-z]?}", "a/b/c.tar."),
            ("${FILE%x}", "a/b/c.tar.gz"),
            ("${REF//\\//-}", "feature-Big-Thing_é"),
            ("${REF/e/E}", "fEature/Big-Thing_é"),
            ("${REF//[^a-zA-Z]/_}", "feature_Big_Thing__"),
            ("${FILE//./}", "a/b/ctargz"),
            ("${A^}|${A^^}|${REF,,}", "One|ONE|feature/big-thing_é"),
            ("${FILE:2}|${FILE:2:3}|${FILE: -2}|${A:0:-1}", "b/c.tar.gz|b/c|gz|on"),
            ("\\$A|\\\\|\\x|\\", "$A|\\|\\x|\\"),
            ("a$", "a$"),
            ("$.$ ", "$.$ "),
            ("$1$@$#", ""),
            ("'$A' \"$A\"", "'one' \"one\""),
            ("**/*.{xml,json}", "**/*.{xml,json}"),
            ("%A%", "%A%"),
        ] {
            assert_eq!(expand(text, &lookup).as_deref(), Ok(expected), "{text:?}");
        }
    }

    #[test]
    fn what_is_no_expansion_is_an_error() {
        for (text, error) in [
            ("${A", ExpandError::Unclosed),
            ("${", ExpandError::Unclosed),
            ("${A:-x", ExpandError::Unclosed),
            ("${}", ExpandError::Unknown),
            ("${A B}", ExpandError::Unknown),
            ("${A!}", ExpandError::Unknown),
            ("${A:x}", ExpandError::Unknown),
            ("$(id)", ExpandError::Command),
            ("`id`", ExpandError::Command),
            ("$((1+1))", ExpandError::Command),
            ("${NONE:?it must be}", ExpandError::Unset),
        ] {
            assert_eq!(expand(text, &lookup), Err(error), "{text:?}");
        }
        let deep = "${X:-".repeat(1000) + &"}".repeat(1000);
        assert_eq!(expand(&deep, &lookup), Err(ExpandError::TooDeep));
    }

    #[test]
    fn patterns_of_many_stars_end() {
        let text = "a".repeat(3000);
        let pattern = chars(&"*a".repeat(200));
        assert!(matches(&pattern, &chars(&text)));
        assert!(!matches(&chars(&("*a".repeat(200) + "b")), &chars(&text)));
    }
}
