//! Where the parts of a log end: its lines, and pieces of lines.

use std::io::BufRead as _;

use super::scan::Scan;

const CLEAR_LINE: &[u8] = b"\x1b[0K";

/// How much of what is handed in may be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flush {
    /// Complete lines; of the last line nothing but what a carriage return ended.
    Lines,
    /// The unfinished last line too, as far as it can be no part of a secret: nothing has followed for a
    /// while.
    Partial,
    /// Everything: nothing follows.
    End,
}

/// What a part of a line ends with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    /// Its `\n`.
    Newline,
    /// Nothing; the line goes on.
    Open,
    /// Nothing; it was the last.
    End,
}

/// The bytes of one call, looked at.
pub(super) struct Input<'a> {
    pub(super) bytes: &'a [u8],
    pub(super) scan: &'a Scan,
    pub(super) flush: Flush,
    /// Nothing is masked and all of it is UTF-8: parts can be copied.
    pub(super) plain: bool,
    pub(super) longest_part: usize,
}

impl Input<'_> {
    /// Gives where the part that starts at `from` ends, and how; `None` if that is not decided yet.
    pub(super) fn next_part(&self, from: usize) -> Option<(usize, Ending)> {
        let horizon = self.scan.horizon();
        let window = from + self.longest_part;
        if let Some(end) = self.after_newline(from, horizon.min(window)) {
            return Some((end, Ending::Newline));
        }
        if horizon > window {
            let cut = self.scan.clip(char_floor(self.bytes, window));
            // Prefixes that overlap themselves over a whole part would stop the log: a
            // fault in the prefixes, and not worth a job.
            let cut = if cut > from { cut } else { window };
            return Some((cut, Ending::Open));
        }
        let (cut, ending) = match self.flush {
            Flush::Lines => (self.after_return(from)?, Ending::Open),
            Flush::Partial => (self.scan.clip(horizon), Ending::Open),
            Flush::End => (horizon, Ending::End),
        };
        (cut > from).then_some((cut, ending))
    }

    /// Gives the end of the line that `from` lies in, if it ends before `to`.
    fn after_newline(&self, from: usize, to: usize) -> Option<usize> {
        let mut at = from;
        loop {
            let mut rest = self.bytes.get(at..to)?;
            // The only search for a byte in the standard library that is as fast as it can be.
            at += rest.skip_until(b'\n').ok()?;
            let last = at.checked_sub(1).filter(|last| *last >= from)?;
            if self.bytes[last] != b'\n' {
                return None;
            }
            match self.scan.masked_until(last) {
                None => return Some(at),
                Some(end) => at = end,
            }
        }
    }

    /// Gives the end of what a carriage return has finished in an unfinished line: the last one that
    /// belongs to no `\r\n`, together with the sequence that clears the line. Section markers end with
    /// the two, and the viewer knows them only on one line.
    fn after_return(&self, from: usize) -> Option<usize> {
        let horizon = self.scan.horizon();
        let mut to = horizon;
        loop {
            let at = from + self.bytes.get(from..to)?.iter().rposition(|byte| *byte == b'\r')?;
            let after = &self.bytes[at + 1..];
            let shown = &after[..after.len().min(CLEAR_LINE.len())];
            if after.first().is_some_and(|byte| *byte != b'\n') {
                if shown == CLEAR_LINE {
                    let end = at + 1 + CLEAR_LINE.len();
                    if end <= horizon {
                        return Some(end);
                    }
                } else if !CLEAR_LINE.starts_with(shown) {
                    return Some(at + 1);
                }
            }
            to = at;
        }
    }
}

/// Finds where the end of a log can be shown from although what came before is not known: after a line
/// end, where no token or parameter can be under way, and far enough in that no phrase can be that began
/// before. Without line ends any white space will do, and without that nothing.
pub(super) fn fresh_start(bytes: &[u8], least: usize, scan: &Scan) -> usize {
    // A phrase that began before the bytes ends within the first `longest - 1` of them.
    let first = least.saturating_sub(1).min(bytes.len());
    let after = |wanted: fn(&u8) -> bool| {
        let mut at = first;
        while let Some(found) = bytes.get(at..)?.iter().position(wanted) {
            at += found + 1;
            if scan.masked_until(at - 1).is_none() {
                return Some(at);
            }
        }
        None
    };
    after(|byte| *byte == b'\n').or_else(|| after(u8::is_ascii_whitespace)).unwrap_or(bytes.len())
}

/// Gives the start of the character that `at` lies within, or `at`.
fn char_floor(bytes: &[u8], at: usize) -> usize {
    for start in (at.saturating_sub(3)..at).rev() {
        if bytes[start] & 0b1100_0000 != 0b1000_0000 {
            let end = bytes.len().min(start + 4);
            let cut = match std::str::from_utf8(&bytes[start..end]) {
                Ok(text) => text.chars().next(),
                Err(error) => {
                    let valid = &bytes[start..start + error.valid_up_to()];
                    std::str::from_utf8(valid).ok().and_then(|text| text.chars().next())
                }
            };
            return match cut {
                Some(c) if start + c.len_utf8() > at => start,
                Some(_) | None => at,
            };
        }
    }
    at
}

/// Appends bytes as UTF-8: every byte that belongs to no valid sequence becomes U+FFFD, as with
/// gitlab-runner.
pub(super) fn push_repaired(mut bytes: &[u8], out: &mut Vec<u8>) {
    loop {
        match std::str::from_utf8(bytes) {
            Ok(text) => {
                out.extend_from_slice(text.as_bytes());
                return;
            }
            Err(error) => {
                let (valid, rest) = bytes.split_at(error.valid_up_to());
                out.extend_from_slice(valid);
                let bad = error.error_len().unwrap_or(rest.len());
                for _ in 0..bad {
                    out.extend_from_slice("\u{fffd}".as_bytes());
                }
                bytes = &rest[bad..];
            }
        }
    }
}
