//! Patterns for paths as `rules:exists`, `rules:changes` and `include:local` have them.
//!
//! The meaning is that of Ruby's `File.fnmatch` with `FNM_PATHNAME`, `FNM_DOTMATCH` and
//! `FNM_EXTGLOB`, which GitLab uses: `*` stays within a folder, `**/` is any number of folders,
//! braces hold alternatives, and a leading dot is nothing special.

/// Most patterns that braces are written out to.
const MAX_ALTERNATIVES: usize = 1000;

/// A pattern, taken apart.
#[derive(Clone, Debug)]
pub(super) struct Pattern {
    alternatives: Vec<Vec<Segment>>,
}

#[derive(Clone, Debug)]
enum Segment {
    /// `**`, any number of folders.
    Folders,
    Name(Vec<Piece>),
}

#[derive(Clone, Debug)]
enum Piece {
    Char(char),
    One,
    Many,
    Class { negated: bool, ranges: Vec<(char, char)> },
}

impl Pattern {
    pub(super) fn new(text: &str) -> Self {
        let alternatives = alternatives(text);
        Self { alternatives: alternatives.iter().map(|text| segments(text)).collect() }
    }

    /// Whether the pattern is the path of exactly one file.
    pub(super) fn is_plain(text: &str) -> bool {
        !text.contains(['*', '?', '[', '{'])
    }

    /// Whether a path, relative and with slashes, fits.
    pub(super) fn matches(&self, path: &str) -> bool {
        let names: Vec<&str> = path.split('/').collect();
        self.alternatives.iter().any(|segments| fits(segments, &names))
    }
}

/// Writes out the first pair of braces, and again until there are none.
fn alternatives(text: &str) -> Vec<String> {
    let mut open = vec![text.to_owned()];
    let mut done = Vec::new();
    while let Some(text) = open.pop() {
        match split_braces(&text) {
            Some((before, parts, after)) if open.len() + done.len() < MAX_ALTERNATIVES => {
                open.extend(parts.into_iter().map(|part| format!("{before}{part}{after}")));
            }
            Some(_) | None => done.push(text),
        }
    }
    done
}

fn split_braces(text: &str) -> Option<(String, Vec<String>, String)> {
    let chars: Vec<char> = text.chars().collect();
    let (mut start, mut depth, mut part) = (None, 0_usize, String::new());
    let mut parts = Vec::new();
    let mut at = 0;
    while let Some(c) = chars.get(at).copied() {
        let escaped = if c == '\\' { chars.get(at + 1).copied() } else { None };
        if let Some(next) = escaped {
            part.extend(['\\', next]);
            at += 2;
            continue;
        }
        match c {
            '{' if start.is_none() => {
                start = Some(std::mem::take(&mut part));
                depth = 1;
            }
            '{' => {
                depth += 1;
                part.push(c);
            }
            '}' if depth == 1 => {
                parts.push(part);
                let after = chars.iter().skip(at + 1).collect();
                return start.map(|before| (before, parts, after));
            }
            '}' => {
                depth = depth.saturating_sub(1);
                part.push(c);
            }
            ',' if depth == 1 => parts.push(std::mem::take(&mut part)),
            c => part.push(c),
        }
        at += 1;
    }
    None
}

fn segments(text: &str) -> Vec<Segment> {
    let names: Vec<&str> = text.split('/').collect();
    let last = names.len() - 1;
    let segment = |(place, name): (usize, &&str)| match *name {
        // At the end it is like a single star.
        "**" if place < last => Segment::Folders,
        name => Segment::Name(pieces(name)),
    };
    names.iter().enumerate().map(segment).collect()
}

fn pieces(text: &str) -> Vec<Piece> {
    let chars: Vec<char> = text.chars().collect();
    let mut pieces = Vec::new();
    let mut at = 0;
    while let Some(c) = chars.get(at).copied() {
        at += 1;
        pieces.push(match c {
            '*' => Piece::Many,
            '?' => Piece::One,
            '\\' => {
                let next = chars.get(at).copied();
                at += 1;
                Piece::Char(next.unwrap_or('\\'))
            }
            '[' => match class(&chars, at) {
                Some((class, after)) => {
                    at = after;
                    class
                }
                None => Piece::Char('['),
            },
            c => Piece::Char(c),
        });
    }
    pieces
}

fn class(chars: &[char], start: usize) -> Option<(Piece, usize)> {
    let negated = matches!(chars.get(start), Some('^' | '!'));
    let mut at = start + usize::from(negated);
    let first = at;
    let mut ranges = Vec::new();
    loop {
        let mut c = *chars.get(at)?;
        if c == ']' && at > first {
            return Some((Piece::Class { negated, ranges }, at + 1));
        }
        if c == '\\' {
            at += 1;
            c = *chars.get(at)?;
        }
        at += 1;
        let upper = chars.get(at + 1).filter(|end| chars.get(at) == Some(&'-') && **end != ']');
        match upper.copied() {
            Some(upper) => {
                ranges.push((c, upper));
                at += 2;
            }
            None => ranges.push((c, c)),
        }
    }
}

/// Whether all segments fit all names; a table, because `**` may try many ways.
fn fits(segments: &[Segment], names: &[&str]) -> bool {
    // reachable[n]: the segments so far fit the first n names.
    let mut reachable = vec![false; names.len() + 1];
    reachable[0] = true;
    for segment in segments {
        let mut next = vec![false; names.len() + 1];
        match segment {
            Segment::Folders => {
                let mut seen = false;
                for (place, now) in reachable.iter().enumerate() {
                    seen |= now;
                    next[place] = seen;
                }
            }
            Segment::Name(pieces) => {
                for (place, name) in names.iter().enumerate() {
                    next[place + 1] = reachable[place] && name_fits(pieces, name);
                }
            }
        }
        reachable = next;
    }
    reachable.last().copied().unwrap_or(false)
}

fn name_fits(pieces: &[Piece], name: &str) -> bool {
    let chars: Vec<char> = name.chars().collect();
    let (mut piece, mut at) = (0, 0);
    let mut back: Option<(usize, usize)> = None;
    loop {
        let fine = match (pieces.get(piece), chars.get(at)) {
            (None, None) => return true,
            (Some(Piece::Many), _) => {
                back = Some((piece, at));
                piece += 1;
                continue;
            }
            (Some(Piece::Char(wanted)), Some(c)) => wanted == c,
            (Some(Piece::One), Some(_)) => true,
            (Some(Piece::Class { negated, ranges }), Some(c)) => {
                ranges.iter().any(|(from, to)| from <= c && c <= to) != *negated
            }
            (None | Some(Piece::Char(_) | Piece::One | Piece::Class { .. }), _) => false,
        };
        if fine {
            piece += 1;
            at += 1;
            continue;
        }
        // The last star takes one more.
        match back {
            Some((star, from)) if from < chars.len() => {
                back = Some((star, from + 1));
                piece = star + 1;
                at = from + 1;
            }
            Some(_) | None => return false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_mean_what_they_mean_to_gitlab() {
        for (pattern, path, fits) in [
            ("README.md", "README.md", true),
            ("README.md", "docs/README.md", false),
            ("*.md", "README.md", true),
            ("*.md", ".md", true),
            ("*.md", "docs/README.md", false),
            ("**/*.md", "README.md", true),
            ("**/*.md", "docs/a/.b/README.md", true),
            ("docs/**", "docs/a", true),
            ("docs/**", "docs/a/b", false),
            ("docs/**/*", "docs/a/b", true),
            ("docs/**/*", "docs", false),
            ("docs/*", "docs/a", true),
            ("docs/*", "docs/a/b", false),
            ("d?cs/[a-c]*", "docs/bread", true),
            ("d?cs/[!a-c]*", "docs/bread", false),
            ("d?cs/[^a-c]*", "docs/dread", true),
            ("*.{c,h}", "x.h", true),
            ("*.{c,h{,pp}}", "x.hpp", true),
            ("*.{c,h}", "x.hpp", false),
            ("{src,lib}/**/*.rs", "lib/a/b.rs", true),
            ("a**b", "axxb", true),
            ("a**b", "ax/xb", false),
            ("\\*", "*", true),
            ("\\*", "a", false),
            ("[", "[", true),
            ("**/Dockerfile*", "x/y/Dockerfile.arm", true),
            ("a/**/b/**/c", "a/b/x/b/c", true),
            ("a/**/b/**/c", "a/x/c", false),
            ("", "", true),
            ("*", "", true),
        ] {
            assert_eq!(Pattern::new(pattern).matches(path), fits, "{pattern} {path}");
        }
    }

    #[test]
    fn hostile_patterns_end_in_time() {
        let stars = "*a".repeat(500);
        assert!(!Pattern::new(&stars).matches(&"a".repeat(400)));
        let folders = format!("{}x", "**/".repeat(200));
        assert!(!Pattern::new(&folders).matches(&"a/".repeat(200)));
        let braces = "{a,b}".repeat(40);
        assert!(!Pattern::new(&braces).matches("c"));
    }
}
