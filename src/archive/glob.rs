//! Double-star patterns as the official runner understands them.
//!
//! Its patterns go through two functions of one library that do not quite agree: paths through one that
//! walks a tree (`FilepathGlob` with `WithNoFollow`), exclusions through one that compares text
//! (`Match`). Both are kept here, each with its habits, as a list of segments per alternative. Names are
//! bytes; a byte that is no UTF-8 counts as one character.

/// How many patterns the braces of one pattern may stand for.
const MOST_ALTERNATIVES: usize = 4096;

/// What stands for a byte that is not part of a character.
const BROKEN: u32 = 0xFFFD;

/// Why a pattern means nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum BadPattern {
    /// It is no pattern.
    #[error("syntax error in pattern")]
    Syntax,
    /// Its braces multiply.
    #[error("the pattern stands for more than {MOST_ALTERNATIVES} patterns")]
    TooMany,
}

/// One part of a pattern between slashes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Segment {
    /// `**`: any number of directories, none included.
    Stars,
    /// Exactly this name.
    Literal {
        /// The name.
        name: Vec<u8>,
        /// Whether it is asked for by name, which finds what is behind a link, instead of being found
        /// in a listing.
        asked: bool,
    },
    /// A name of this shape.
    Shape(Vec<Token>),
}

/// One piece of a segment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Token {
    Rune(u32),
    One,
    Many,
    Class { negated: bool, ranges: Vec<(u32, u32)> },
}

/// One of the patterns that a pattern with braces stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Alternative {
    /// Empty for the root itself.
    pub(super) segments: Vec<Segment>,
    /// Whether it ended in a slash, and so means directories alone.
    pub(super) directory: bool,
}

impl Segment {
    /// Says whether a name is meant.
    pub(super) fn matches(&self, name: &[u8]) -> bool {
        match self {
            Self::Stars => true,
            Self::Literal { name: wanted, .. } => wanted == name,
            Self::Shape(tokens) => fits(tokens, name),
        }
    }
}

/// The lexically shortest path that means the same, as Go's `path.Clean` has it.
pub(super) fn clean(path: &[u8]) -> Vec<u8> {
    let rooted = path.first() == Some(&b'/');
    let mut kept: Vec<&[u8]> = Vec::new();
    for part in path.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => match kept.last() {
                Some(last) if *last != b".." => {
                    kept.pop();
                }
                _ if rooted => {}
                _ => kept.push(part),
            },
            _ => kept.push(part),
        }
    }
    let joined = kept.join(&b'/');
    match (rooted, joined.is_empty()) {
        (true, _) => [b"/".as_slice(), &joined].concat(),
        (false, true) => b".".to_vec(),
        (false, false) => joined,
    }
}

/// The pattern relative to `root`, or nothing if it leads out of it.
pub(super) fn relative(root: &str, pattern: &str) -> Option<String> {
    let root = text(clean(root.as_bytes()));
    let inside = format!("{}/", root.trim_end_matches('/'));
    if text(clean(pattern.as_bytes())) == root {
        return Some(".".to_owned());
    }
    // The root's own name may look like a pattern.
    let pattern =
        pattern.strip_prefix(&inside).map_or(pattern, |rest| rest.trim_start_matches('/'));
    let (base, rest) = split(pattern);
    let base = if base.starts_with('/') { base.to_owned() } else { format!("{inside}{base}") };
    let base = text(clean(base.as_bytes()));
    let below = if base == root { "." } else { base.strip_prefix(&inside)? };
    // Stars may be followed by steps upwards.
    let whole = text(clean(format!("{below}/{rest}").as_bytes()));
    (whole != ".." && !whole.starts_with("../")).then_some(whole)
}

fn text(bytes: Vec<u8>) -> String {
    // Cut at slashes alone, so what was text is text.
    String::from_utf8(bytes).unwrap_or_default()
}

/// Cuts a pattern at the last slash before the first special character.
fn split(pattern: &str) -> (&str, &str) {
    let mut slash = None;
    let mut special = false;
    let mut bytes = pattern.bytes().enumerate();
    while let Some((at, byte)) = bytes.next() {
        match byte {
            b'\\' => {
                bytes.next();
            }
            b'/' => slash = Some(at),
            b'*' | b'?' | b'[' | b'{' => {
                special = true;
                break;
            }
            _ => {}
        }
    }
    if !special {
        return (pattern, "");
    }
    match slash {
        Some(0) => ("/", pattern.get(1..).unwrap_or_default()),
        Some(at) => pattern
            .split_at_checked(at)
            .map_or(("", pattern), |(base, rest)| (base, rest.strip_prefix('/').unwrap_or(rest))),
        None => ("", pattern),
    }
}

/// Says whether brackets and braces are closed, and something follows each backslash.
fn is_valid(pattern: &[u8]) -> bool {
    let mut depth = 0_usize;
    let mut at = 0;
    while let Some(byte) = pattern.get(at) {
        match byte {
            b'\\' => {
                at += 1;
                if at >= pattern.len() {
                    return false;
                }
            }
            b'[' => match class_end(pattern, at) {
                Some(end) => at = end,
                None => return false,
            },
            b'{' => depth += 1,
            b'}' => match depth.checked_sub(1) {
                Some(less) => depth = less,
                None => return false,
            },
            _ => {}
        }
        at += 1;
    }
    depth == 0
}

/// Where the class that begins at `at` has its closing bracket; an empty class has none.
fn class_end(pattern: &[u8], at: usize) -> Option<usize> {
    let mut at = at + 1;
    if matches!(pattern.get(at), Some(b'^' | b'!')) {
        at += 1;
    }
    if pattern.get(at) == Some(&b']') {
        return None;
    }
    while let Some(byte) = pattern.get(at) {
        match byte {
            b'\\' => at += 1,
            b']' => return Some(at),
            _ => {}
        }
        at += 1;
    }
    None
}

/// Cuts at `separator` where it stands outside of braces and classes and is not escaped.
fn cut(pattern: &[u8], separator: u8) -> Vec<&[u8]> {
    let mut parts = Vec::new();
    let (mut depth, mut from, mut at) = (0_usize, 0, 0);
    while let Some(byte) = pattern.get(at) {
        match byte {
            b'\\' => at += 1,
            b'[' => at = class_end(pattern, at).unwrap_or(at),
            b'{' => depth += 1,
            b'}' => depth = depth.saturating_sub(1),
            byte if *byte == separator && depth == 0 => {
                parts.push(pattern.get(from..at).unwrap_or_default());
                from = at + 1;
            }
            _ => {}
        }
        at += 1;
    }
    parts.push(pattern.get(from..).unwrap_or_default());
    parts
}

/// The first pair of braces: what is before, between and after.
fn braces(pattern: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let (mut depth, mut open, mut at) = (0_usize, 0, 0);
    while let Some(byte) = pattern.get(at) {
        match byte {
            b'\\' => at += 1,
            b'[' => at = class_end(pattern, at).unwrap_or(at),
            b'{' => {
                if depth == 0 {
                    open = at;
                }
                depth += 1;
            }
            b'}' if depth == 1 => {
                return Some((
                    pattern.get(..open)?,
                    pattern.get(open + 1..at)?,
                    pattern.get(at + 1..)?,
                ));
            }
            b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        at += 1;
    }
    None
}

/// What the braces of a pattern stand for. Walking a tree forgets an alternative that is empty and
/// comes last; comparing text does not.
fn expand(pattern: &[u8], forgets: bool, into: &mut Vec<Vec<u8>>) -> Result<(), BadPattern> {
    let Some((before, between, after)) = braces(pattern) else {
        if into.len() >= MOST_ALTERNATIVES {
            return Err(BadPattern::TooMany);
        }
        into.push(pattern.to_vec());
        return Ok(());
    };
    let mut parts = cut(between, b',');
    if forgets && parts.last().is_some_and(|last| last.is_empty()) {
        parts.pop();
    }
    for part in parts {
        expand(&[before, part, after].concat(), forgets, into)?;
    }
    Ok(())
}

/// Reads a pattern of files, relative to the root and clean, as the walk of a tree has it.
pub(super) fn of_files(pattern: &str) -> Result<Vec<Alternative>, BadPattern> {
    let pattern = pattern.as_bytes();
    if !is_valid(pattern) {
        return Err(BadPattern::Syntax);
    }
    // What braces stand for is asked for by name; the rest of a pattern is looked for in listings once
    // anything special came before.
    let mut found: Vec<(Vec<Segment>, bool, bool)> = vec![(Vec::new(), false, true)];
    for (index, part) in cut(pattern, b'/').into_iter().enumerate() {
        let mut variants = Vec::new();
        expand(part, true, &mut variants)?;
        let braced = braces(part).is_some();
        let mut grown = Vec::new();
        for (before, directory, plain) in &found {
            if *directory {
                continue;
            }
            for variant in &variants {
                if grown.len() >= MOST_ALTERNATIVES {
                    return Err(BadPattern::TooMany);
                }
                let mut segments = before.clone();
                if let Some(rest) =
                    variant_of_files(variant, index == 0, *plain || braced, &mut segments)?
                {
                    grown.push((segments, rest.directory, rest.plain && *plain));
                }
            }
        }
        found = grown;
    }
    let alternatives = found.into_iter();
    Ok(alternatives.map(|(segments, directory, _)| Alternative { segments, directory }).collect())
}

struct Rest {
    directory: bool,
    plain: bool,
}

/// Adds the segments of one variant; nothing if no file can have such a name.
fn variant_of_files(
    variant: &[u8],
    first: bool,
    asked: bool,
    segments: &mut Vec<Segment>,
) -> Result<Option<Rest>, BadPattern> {
    let mut plain = asked;
    if first && variant == b"." {
        return Ok(Some(Rest { directory: false, plain: true }));
    }
    let parts: Vec<&[u8]> = variant.split(|byte| *byte == b'/').collect();
    let last = parts.len() - 1;
    for (index, part) in parts.into_iter().enumerate() {
        match part {
            b"" if index == last && index > 0 => {
                return Ok(Some(Rest { directory: !plain, plain }));
            }
            b"" | b"." | b".." => return Ok(None),
            b"**" => {
                plain = false;
                segments.push(Segment::Stars);
            }
            _ if has_special(part) => {
                plain = false;
                segments.push(Segment::Shape(tokens(part)?));
            }
            _ => {
                let name = if plain { unescape_special(part) } else { unescape(part) };
                segments.push(Segment::Literal { name, asked: plain });
            }
        }
    }
    Ok(Some(Rest { directory: false, plain }))
}

/// Reads a pattern of names to leave out, as the comparison of text has it.
pub(super) fn of_names(pattern: &str) -> Result<Vec<Vec<Segment>>, BadPattern> {
    if !is_valid(pattern.as_bytes()) {
        return Err(BadPattern::Syntax);
    }
    let mut variants = Vec::new();
    expand(pattern.as_bytes(), false, &mut variants)?;
    variants
        .iter()
        .map(|variant| {
            let parts = variant.split(|byte| *byte == b'/');
            parts
                .map(|part| match part {
                    b"**" => Ok(Segment::Stars),
                    _ if has_special(part) => Ok(Segment::Shape(tokens(part)?)),
                    _ => Ok(Segment::Literal { name: unescape(part), asked: false }),
                })
                .collect()
        })
        .collect()
}

/// Says whether a whole name is meant.
pub(super) fn matches(segments: &[Segment], name: &[u8]) -> bool {
    let parts: Vec<&[u8]> = name.split(|byte| *byte == b'/').collect();
    let (mut segment, mut part) = (0, 0);
    let mut again: Option<(usize, usize)> = None;
    loop {
        match (segments.get(segment), parts.get(part)) {
            (Some(Segment::Stars), _) => {
                if segment + 1 == segments.len() {
                    return true;
                }
                again = Some((segment + 1, part));
                segment += 1;
                continue;
            }
            (Some(one), Some(name)) if one.matches(name) => {
                segment += 1;
                part += 1;
                continue;
            }
            (None, None) => return true,
            _ => {}
        }
        // The last double star takes one more directory.
        match again {
            Some((from, taken)) if taken < parts.len() => {
                again = Some((from, taken + 1));
                segment = from;
                part = taken + 1;
            }
            _ => return false,
        }
    }
}

fn has_special(part: &[u8]) -> bool {
    let mut bytes = part.iter();
    while let Some(byte) = bytes.next() {
        match byte {
            b'\\' => {
                bytes.next();
            }
            b'*' | b'?' | b'[' => return true,
            _ => {}
        }
    }
    false
}

/// Takes away every backslash that protects something.
fn unescape(part: &[u8]) -> Vec<u8> {
    let mut bytes = part.iter();
    let mut plain = Vec::with_capacity(part.len());
    while let Some(byte) = bytes.next() {
        plain.extend(if *byte == b'\\' { bytes.next() } else { Some(byte) });
    }
    plain
}

/// Takes away the backslashes before special characters alone, as names that are asked for have it.
fn unescape_special(part: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(part.len());
    for (at, byte) in part.iter().enumerate() {
        let next = part.get(at + 1);
        if *byte != b'\\' || !matches!(next, Some(b'*' | b'?' | b'[' | b']' | b'{' | b'}')) {
            plain.push(*byte);
        }
    }
    plain
}

/// The character at the beginning, and how long it is.
fn rune(bytes: &[u8]) -> (u32, usize) {
    match bytes.first() {
        Some(byte) if byte.is_ascii() => (u32::from(*byte), 1),
        _ => (2..=4)
            .find_map(|length| {
                let text = std::str::from_utf8(bytes.get(..length)?).ok()?;
                Some((u32::from(text.chars().next()?), length))
            })
            .unwrap_or((BROKEN, 1)),
    }
}

fn tokens(part: &[u8]) -> Result<Vec<Token>, BadPattern> {
    let mut tokens = Vec::new();
    let mut at = 0;
    while let Some(byte) = part.get(at) {
        let token = match byte {
            b'*' => Token::Many,
            b'?' => Token::One,
            b'[' => {
                let end = class_end(part, at).ok_or(BadPattern::Syntax)?;
                let token = class(part.get(at + 1..end).unwrap_or_default());
                at = end;
                token
            }
            _ => {
                if *byte == b'\\' {
                    at += 1;
                }
                let (rune, length) = rune(part.get(at..).unwrap_or_default());
                at += length - 1;
                Token::Rune(rune)
            }
        };
        at += 1;
        // `**` within a segment is one star.
        if token != Token::Many || tokens.last() != Some(&Token::Many) {
            tokens.push(token);
        }
    }
    Ok(tokens)
}

fn class(inside: &[u8]) -> Token {
    let negated = matches!(inside.first(), Some(b'^' | b'!'));
    let mut rest = inside.get(usize::from(negated)..).unwrap_or_default();
    let mut ranges = Vec::new();
    // The character before a hyphen, if a range may begin with it.
    let mut last: Option<u32> = None;
    let take = |rest: &mut &[u8]| {
        let (rune, length) = rune(rest);
        *rest = rest.get(length..).unwrap_or_default();
        rune
    };
    while !rest.is_empty() {
        let mut one = take(&mut rest);
        if let (Some(low), true, false) = (last, one == u32::from(b'-'), rest.is_empty()) {
            if rest.first() == Some(&b'\\') {
                rest = rest.get(1..).unwrap_or_default();
            }
            ranges.push((low, take(&mut rest)));
            last = None;
            continue;
        }
        if one == u32::from(b'\\') {
            one = take(&mut rest);
        }
        ranges.push((one, one));
        last = Some(one);
    }
    Token::Class { negated, ranges }
}

fn fits(tokens: &[Token], name: &[u8]) -> bool {
    let (mut token, mut at) = (0, 0);
    let mut again: Option<(usize, usize)> = None;
    loop {
        let rest = name.get(at..).unwrap_or_default();
        let one = (!rest.is_empty()).then(|| rune(rest));
        let step = match (tokens.get(token), one) {
            (Some(Token::Many), _) => {
                again = Some((token + 1, at));
                Some(0)
            }
            (Some(Token::One), Some((_, length))) => Some(length),
            (Some(Token::Rune(wanted)), Some((rune, length))) if *wanted == rune => Some(length),
            (Some(Token::Class { negated, ranges }), Some((rune, length))) => {
                let within = ranges.iter().any(|(low, high)| (*low..=*high).contains(&rune));
                (within != *negated).then_some(length)
            }
            (None, None) => return true,
            _ => None,
        };
        if let Some(length) = step {
            token += 1;
            at += length;
            continue;
        }
        // The last star takes one more character.
        match again {
            Some((from, taken)) if taken < name.len() => {
                let (_, length) = rune(name.get(taken..).unwrap_or_default());
                again = Some((from, taken + length));
                token = from;
                at = taken + length;
            }
            _ => return false,
        }
    }
}
