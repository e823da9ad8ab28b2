//! The expressions of `rules:if`, `workflow:rules:if`, `include:rules:if` and `only:variables`.
//!
//! Precedence, what is true and what a regular expression is follow GitLab's
//! `lib/gitlab/ci/pipeline/expression`: a missing variable is null, an empty one is not, and
//! `&&`, `||` give one of their operands rather than true or false.

use regex::Regex;

use super::expand::Scope;

/// Most words and signs in an expression; GitLab's own limit.
const MAX_TOKENS: usize = 100;

/// An expression that has been read.
#[derive(Clone, Debug)]
pub(super) struct Expression {
    tree: Tree,
}

#[derive(Clone, Debug)]
enum Tree {
    Value(Operand),
    Binary(Operator, Box<Self>, Box<Self>),
}

#[derive(Clone, Debug)]
enum Operand {
    Null,
    Bool(bool),
    Text(String),
    Variable(String),
    Pattern(Regex),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operator {
    Equal,
    Differ,
    Match,
    NoMatch,
    And,
    Or,
}

#[derive(Clone, Debug)]
enum Token {
    Open,
    Close,
    Operator(Operator),
    Operand(Operand),
}

/// What a part of an expression gives.
#[derive(Clone, Debug)]
enum Outcome {
    Null,
    Bool(bool),
    Text(String),
    Pattern(Regex),
}

impl Operator {
    /// How strongly it binds.
    fn strength(self) -> u8 {
        match self {
            Self::Equal | Self::Differ | Self::Match | Self::NoMatch => 3,
            Self::And => 2,
            Self::Or => 1,
        }
    }
}

impl Expression {
    /// Reads an expression; the error says what is wrong with it.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let tokens = tokens(text)?;
        if tokens.is_empty() {
            return Err("is empty".to_owned());
        }
        let mut parser = Parser { tokens, at: 0 };
        let tree = parser.binary(0)?;
        match parser.next() {
            None => Ok(Self { tree }),
            Some(Token::Close) => Err("has a `)` without a `(`".to_owned()),
            Some(Token::Open | Token::Operator(_) | Token::Operand(_)) => {
                Err("lacks an operator between two values".to_owned())
            }
        }
    }

    /// Whether it holds; blank text does not.
    pub(super) fn holds(&self, scope: &Scope) -> Result<bool, String> {
        Ok(match evaluate(&self.tree, scope)? {
            Outcome::Null => false,
            Outcome::Bool(value) => value,
            Outcome::Text(text) => !text.trim().is_empty(),
            Outcome::Pattern(_) => true,
        })
    }
}

struct Parser {
    tokens: Vec<Token>,
    at: usize,
}

impl Parser {
    fn next(&mut self) -> Option<Token> {
        let token = self.tokens.get(self.at).cloned();
        self.at += 1;
        token
    }

    /// Reads operands joined by operators that bind more strongly than `weakest`.
    ///
    /// The bound on tokens bounds the depth as well.
    fn binary(&mut self, weakest: u8) -> Result<Tree, String> {
        let mut left = match self.next() {
            Some(Token::Operand(operand)) => Tree::Value(operand),
            Some(Token::Open) => {
                let inner = self.binary(0)?;
                match self.next() {
                    Some(Token::Close) => inner,
                    Some(Token::Open | Token::Operator(_) | Token::Operand(_)) | None => {
                        return Err("has a `(` without a `)`".to_owned());
                    }
                }
            }
            Some(Token::Close | Token::Operator(_)) | None => {
                return Err("lacks a value beside an operator".to_owned());
            }
        };
        while let Some(Token::Operator(operator)) = self.tokens.get(self.at).cloned() {
            if operator.strength() <= weakest {
                break;
            }
            self.at += 1;
            let right = self.binary(operator.strength())?;
            left = Tree::Binary(operator, Box::new(left), Box::new(right));
        }
        Ok(left)
    }
}

fn tokens(text: &str) -> Result<Vec<Token>, String> {
    let mut tokens = Vec::new();
    let mut rest = text.trim_start();
    while !rest.is_empty() {
        if tokens.len() >= MAX_TOKENS {
            return Err(format!("has more than {MAX_TOKENS} words and signs"));
        }
        let (token, after) = token(rest)?;
        tokens.push(token);
        rest = after.trim_start();
    }
    Ok(tokens)
}

fn token(text: &str) -> Result<(Token, &str), String> {
    let signs = [
        ("(", Token::Open),
        (")", Token::Close),
        ("==", Token::Operator(Operator::Equal)),
        ("!=", Token::Operator(Operator::Differ)),
        ("=~", Token::Operator(Operator::Match)),
        ("!~", Token::Operator(Operator::NoMatch)),
        ("&&", Token::Operator(Operator::And)),
        ("||", Token::Operator(Operator::Or)),
    ];
    for (sign, token) in signs {
        if let Some(after) = text.strip_prefix(sign) {
            return Ok((token, after));
        }
    }
    let operand = |operand, after| Ok((Token::Operand(operand), after));
    if let Some(after) = text.strip_prefix('$') {
        let (name, after) = word(after);
        return if name.is_empty() {
            Err("has a `$` without a name".to_owned())
        } else {
            operand(Operand::Variable(name.to_owned()), after)
        };
    }
    for quote in ['"', '\''] {
        if let Some(inner) = text.strip_prefix(quote) {
            let (inner, after) =
                inner.split_once(quote).ok_or_else(|| format!("has no closing {quote}"))?;
            return operand(Operand::Text(inner.to_owned()), after);
        }
    }
    if text.starts_with('/') {
        let length = pattern_length(text).ok_or("has a regular expression without an end")?;
        let (pattern, after) = text.split_at(length);
        let pattern = regex(pattern).ok_or("has a regular expression that is no `/…/`")?;
        return operand(Operand::Pattern(pattern?), after);
    }
    let (name, after) = word(text);
    match name {
        "null" => operand(Operand::Null, after),
        "true" => operand(Operand::Bool(true), after),
        "false" => operand(Operand::Bool(false), after),
        "" => Err(format!("has a sign that means nothing here: `{}`", head(text))),
        name => Err(format!("has a word that means nothing here: `{name}`")),
    }
}

fn head(text: &str) -> char {
    text.chars().next().unwrap_or(' ')
}

fn word(text: &str) -> (&str, &str) {
    let end = text.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(text.len());
    text.split_at(end)
}

/// Finds the end of `/…/flags`: a slash inside is escaped.
fn pattern_length(text: &str) -> Option<usize> {
    let mut escaped = true;
    for (at, c) in text.char_indices() {
        if c == '/' && !escaped {
            let flags = text.get(at + 1..)?;
            let end = flags.find(|c: char| !"ismU".contains(c)).unwrap_or(flags.len());
            return Some(at + 1 + end);
        }
        escaped = (c == '\\' && !escaped) || at == 0 && c != '/';
    }
    None
}

/// Reads `/pattern/flags`; `None` when it is nothing of the kind.
///
/// RE2 and this crate share their syntax, the flags included.
pub(super) fn regex(text: &str) -> Option<Result<Regex, String>> {
    let (pattern, flags) = text.strip_prefix('/')?.rsplit_once('/')?;
    if !flags.chars().all(|c| "ismU".contains(c)) {
        return None;
    }
    let pattern = pattern.replace("\\/", "/");
    let pattern = if flags.is_empty() { pattern } else { format!("(?{flags}){pattern}") };
    let short = |error: regex::Error| {
        let reason = error.to_string();
        let reason = reason.lines().last().unwrap_or_default().trim_start_matches("error: ");
        format!("has a regular expression that cannot be used: {reason}")
    };
    Some(Regex::new(&pattern).map_err(short))
}

fn evaluate(tree: &Tree, scope: &Scope) -> Result<Outcome, String> {
    let (operator, left, right) = match tree {
        Tree::Value(operand) => return Ok(value(operand, scope)),
        Tree::Binary(operator, left, right) => (*operator, left, right),
    };
    let left = evaluate(left, scope)?;
    Ok(match operator {
        Operator::And if is_true(&left) => evaluate(right, scope)?,
        Operator::Or if !is_true(&left) => evaluate(right, scope)?,
        Operator::And | Operator::Or => left,
        Operator::Equal => Outcome::Bool(same(&left, &evaluate(right, scope)?)),
        Operator::Differ => Outcome::Bool(!same(&left, &evaluate(right, scope)?)),
        Operator::Match => Outcome::Bool(finds(&left, &evaluate(right, scope)?)?.unwrap_or(false)),
        Operator::NoMatch => {
            Outcome::Bool(!finds(&left, &evaluate(right, scope)?)?.unwrap_or(false))
        }
    })
}

fn value(operand: &Operand, scope: &Scope) -> Outcome {
    match operand {
        Operand::Null => Outcome::Null,
        Operand::Bool(value) => Outcome::Bool(*value),
        Operand::Text(text) => Outcome::Text(text.clone()),
        Operand::Pattern(pattern) => Outcome::Pattern(pattern.clone()),
        Operand::Variable(name) => {
            scope.get(name).map_or(Outcome::Null, |text| Outcome::Text(text.to_owned()))
        }
    }
}

/// As Ruby has it: only nothing and false are not true.
fn is_true(outcome: &Outcome) -> bool {
    match outcome {
        Outcome::Null | Outcome::Bool(false) => false,
        Outcome::Bool(true) | Outcome::Text(_) | Outcome::Pattern(_) => true,
    }
}

fn same(left: &Outcome, right: &Outcome) -> bool {
    match (left, right) {
        (Outcome::Null, Outcome::Null) => true,
        (Outcome::Bool(left), Outcome::Bool(right)) => left == right,
        (Outcome::Text(left), Outcome::Text(right)) => left == right,
        (Outcome::Pattern(left), Outcome::Pattern(right)) => left.as_str() == right.as_str(),
        (Outcome::Null | Outcome::Bool(_) | Outcome::Text(_) | Outcome::Pattern(_), _) => false,
    }
}

/// Whether the pattern is found in the text; `None` without a pattern.
fn finds(text: &Outcome, pattern: &Outcome) -> Result<Option<bool>, String> {
    let text = match text {
        Outcome::Null => String::new(),
        Outcome::Bool(value) => value.to_string(),
        Outcome::Text(text) => text.clone(),
        Outcome::Pattern(pattern) => pattern.as_str().to_owned(),
    };
    Ok(match pattern {
        Outcome::Null | Outcome::Bool(_) => None,
        Outcome::Pattern(pattern) => Some(pattern.is_match(&text)),
        Outcome::Text(pattern) => match regex(pattern) {
            Some(pattern) => Some(pattern?.is_match(&text)),
            // Text that is no `/…/` is searched in, not for: odd, and what GitLab does.
            None => Some(pattern.contains(&text)),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::super::Variable;
    use super::*;

    fn scope() -> Scope {
        let mut scope = Scope::default();
        scope.add(&[
            Variable::new("A", "alpha"),
            Variable::new("B", "beta"),
            Variable::new("EMPTY", ""),
            Variable::new("BLANK", "  "),
            Variable::new("RE", "/^al/"),
            Variable::new("PART", "xalphay"),
            Variable::new("BRANCH", "feature/x-1"),
            Variable::new("ZERO", "0"),
        ]);
        scope
    }

    #[test]
    fn expressions_hold_when_gitlab_says_so() {
        for (text, holds) in [
            ("$A", true),
            ("$MISSING", false),
            ("$EMPTY", false),
            ("$BLANK", false),
            ("$ZERO", true),
            ("$A == \"alpha\"", true),
            ("$A == 'alpha'", true),
            ("'alpha' == $A", true),
            ("$A != 'alpha'", false),
            ("$A == $B", false),
            ("$MISSING == null", true),
            ("$EMPTY == null", false),
            ("$EMPTY == ''", true),
            ("$MISSING == ''", false),
            ("$MISSING != null", false),
            ("null == $A", false),
            ("$A =~ /^al/", true),
            ("$A =~ /^AL/", false),
            ("$A =~ /^AL/i", true),
            ("$A !~ /^al/", false),
            ("$MISSING =~ /./", false),
            ("$MISSING =~ /^$/", true),
            ("$MISSING !~ /./", true),
            ("$A =~ $RE", true),
            ("$B =~ $RE", false),
            ("$A =~ $PART", true),
            ("$A =~ $MISSING", false),
            ("$A !~ $MISSING", true),
            ("$BRANCH =~ /^feature\\/.*$/", true),
            ("$BRANCH =~ /^feature\\/\\d+$/", false),
            ("$A && $B", true),
            ("$A && $MISSING", false),
            ("$EMPTY && $A", true),
            ("$EMPTY || $A", false),
            ("$MISSING || $A", true),
            ("$A == 'alpha' && $B == 'beta'", true),
            ("$A == 'x' || $B == 'beta' && $A", true),
            ("($A == 'x' || $B == 'beta') && $MISSING", false),
            ("$A == 'alpha' || $B && $MISSING", true),
            ("($A == 'alpha' || $B) && $MISSING", false),
            ("$A=='alpha'&&$B=='beta'", true),
            ("((($A)))", true),
            ("\"true\" == 'true'", true),
            ("$A == \"it's\" || $B =~ /a|b/", true),
            ("$A\n  && $B", true),
            ("true", true),
            ("false", false),
        ] {
            let expression =
                Expression::parse(text).unwrap_or_else(|error| panic!("{text}: {error}"));
            assert_eq!(expression.holds(&scope()), Ok(holds), "{text}");
        }
    }

    #[test]
    fn what_is_wrong_with_an_expression_is_said() {
        for (text, says) in [
            ("", "is empty"),
            ("$", "without a name"),
            ("$A ==", "lacks a value"),
            ("== $A", "lacks a value"),
            ("$A $B", "lacks an operator"),
            ("$A = 'x'", "`=`"),
            ("A == 'x'", "`A`"),
            ("($A", "`(` without"),
            ("$A)", "`)` without"),
            ("'x", "no closing '"),
            ("$A =~ /x", "without an end"),
            ("$A =~ /(/", "cannot be used"),
            ("$A =~ /(?<!x)y/", "cannot be used"),
            ("$A & $B", "`&`"),
        ] {
            let error = Expression::parse(text).unwrap_err();
            assert!(error.contains(says), "{text}: {error}");
        }
        assert!(Expression::parse(&"(".repeat(200)).unwrap_err().contains("more than 100"));
    }

    #[test]
    fn a_variable_with_a_broken_pattern_is_an_error() {
        let mut scope = Scope::default();
        scope.add(&[Variable::new("RE", "/(/")]);
        let expression = Expression::parse("'a' =~ $RE").unwrap();
        assert!(expression.holds(&scope).unwrap_err().contains("cannot be used"));
    }
}
