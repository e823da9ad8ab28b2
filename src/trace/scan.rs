//! One look at some bytes: what of them is masked, and where the stream may be cut.
//!
//! Filled by [`Masker::scan`](super::mask::Masker::scan), which finds the patterns; what follows from
//! their places is decided here.

use serde::{Deserialize, Serialize};

use super::mask::MASKED;

/// The URL parameters whose values are secrets; their names are compared without regard to case.
pub(super) const URL_KEYS: [&[u8]; 6] = [
    b"private_token",
    b"authenticity_token",
    b"rss_token",
    b"x-amz-signature",
    b"x-amz-credential",
    b"x-amz-security-token",
];

/// Whether a run of secret characters (a token, a URL parameter's value) is under way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum InRun {
    /// No.
    #[default]
    Outside,
    /// The next byte is its first.
    Ahead,
    /// Yes, and its `[MASKED]` is written.
    Inside,
}

/// What has to be known of the bytes before to go on masking.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MaskState {
    /// So many of the next bytes belong to secrets whose `[MASKED]` is written.
    covered: usize,
    token: InRun,
    url: InRun,
}

/// A stretch of bytes that is masked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Range {
    start: usize,
    end: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RunKind {
    Token,
    Url,
}

/// What follows a token prefix or a URL parameter's name.
#[derive(Clone, Copy, Debug)]
struct Run {
    kind: RunKind,
    /// Where the prefix starts: between there and `start` the stream must not be cut, since the
    /// prefix would not be recognised afterwards.
    prefix: usize,
    start: usize,
    end: usize,
}

/// What a look at some bytes found; kept by the caller so that its memory is used again.
#[derive(Debug, Default)]
pub struct Scan {
    /// Sorted, disjoint. The last may end beyond the bytes.
    ranges: Vec<Range>,
    runs: Vec<Run>,
    /// Where the runs found last end.
    token_until: usize,
    url_until: usize,
    horizon: usize,
    /// The first range's `[MASKED]` was written before these bytes began.
    first_written: bool,
    before: MaskState,
}

impl Scan {
    pub(super) fn begin(&mut self, before: MaskState, bytes: &[u8]) {
        self.ranges.clear();
        self.runs.clear();
        self.token_until = 0;
        self.url_until = 0;
        self.before = before;
        self.first_written = before.covered > 0;
        if before.covered > 0 {
            self.ranges.push(Range { start: 0, end: before.covered });
        }
        for (kind, state) in [(RunKind::Token, before.token), (RunKind::Url, before.url)] {
            match state {
                InRun::Outside => {}
                InRun::Ahead => {
                    self.run(kind, 0, 0, bytes);
                }
                InRun::Inside => {
                    let end = self.run(kind, 0, 0, bytes);
                    self.first_written |= end > 0;
                }
            }
        }
    }

    /// Notes an occurrence of a phrase. Occurrences come in the order of their ends.
    pub(super) fn hit(&mut self, mut start: usize, mut end: usize) {
        while let Some(last) = self.ranges.last() {
            if last.end <= start {
                break;
            }
            start = start.min(last.start);
            end = end.max(last.end);
            self.ranges.pop();
        }
        self.ranges.push(Range { start, end });
    }

    /// Notes that a run starts at `start` and gives its end.
    pub(super) fn run(
        &mut self,
        kind: RunKind,
        prefix: usize,
        start: usize,
        bytes: &[u8],
    ) -> usize {
        let known = match kind {
            RunKind::Token => &mut self.token_until,
            RunKind::Url => &mut self.url_until,
        };
        // A run that starts inside another one ends where that ends.
        if start >= *known {
            let ends = match kind {
                RunKind::Token => |byte: &u8| !is_token_byte(*byte),
                RunKind::Url => |byte: &u8| ends_parameter(*byte),
            };
            let length = bytes[start..].iter().position(ends);
            *known = length.map_or(bytes.len(), |length| start + length);
        }
        let end = *known;
        // Also when it is empty: it may only be that nothing of it is there yet, and where a stream may
        // be cut must not depend on that.
        self.runs.push(Run { kind, prefix, start, end });
        end
    }

    /// Looks for a secret URL parameter whose `?` or `&` is at `at`; `false` if more bytes must tell.
    pub(super) fn parameter(&mut self, bytes: &[u8], at: usize) -> bool {
        let rest = &bytes[at + 1..];
        for key in URL_KEYS {
            if let Some((name, after)) = rest.split_at_checked(key.len()) {
                if name.eq_ignore_ascii_case(key) {
                    match after.first() {
                        Some(b'=') => {
                            self.run(RunKind::Url, at, at + key.len() + 2, bytes);
                        }
                        Some(_) => {}
                        None => return false,
                    }
                }
            } else if key[..rest.len()].eq_ignore_ascii_case(rest) {
                return false;
            }
        }
        true
    }

    /// Notes the horizon, and brings ranges and runs into one order.
    pub(super) fn finish(&mut self, horizon: usize) {
        self.horizon = horizon;
        if self.runs.is_empty() {
            return;
        }
        let of_runs = self.runs.iter().filter(|run| run.end > run.start);
        self.ranges.extend(of_runs.map(|run| Range { start: run.start, end: run.end }));
        self.ranges.sort_unstable_by_key(|range| (range.start, range.end));
        self.ranges.dedup_by(|next, kept| {
            let overlap = next.start < kept.end;
            if overlap {
                kept.end = kept.end.max(next.end);
            }
            overlap
        });
    }

    /// Gives the point before which everything is decided and no UTF-8 sequence is incomplete.
    pub fn horizon(&self) -> usize {
        self.horizon
    }

    /// Says whether nothing is masked.
    pub fn is_clean(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Gives the end of the masked stretch that a byte belongs to, if any.
    pub fn masked_until(&self, at: usize) -> Option<usize> {
        let index = self.ranges.partition_point(|range| range.end <= at);
        self.ranges.get(index).filter(|range| range.start <= at).map(|range| range.end)
    }

    /// Moves a point forward in time, that is to the left, until the stream may be cut there.
    pub fn clip(&self, at: usize) -> usize {
        let mut cut = at;
        // The runs stand in the order in which their prefixes end, nearly; few matter, and each
        // round moves the cut to the left.
        while let Some(run) = self.runs.iter().rev().find(|run| {
            run.prefix < cut
                && cut < run.start
                // Afterwards this very run goes on, so that its prefix need not be seen.
                && !self.runs.iter().any(|o| o.kind == run.kind && o.start < cut && cut <= o.end)
        }) {
            cut = run.prefix;
        }
        cut
    }

    /// Gives what has to be known to go on at a point where the stream may be cut.
    pub fn state_at(&self, at: usize) -> MaskState {
        if at == 0 {
            return self.before;
        }
        let run = |kind| {
            let mut runs = self.runs.iter().filter(|run| run.kind == kind);
            let mut state = InRun::Outside;
            while let (Some(run), true) = (runs.next(), state != InRun::Inside) {
                if run.start < at && at <= run.end {
                    state = InRun::Inside;
                } else if run.start == at {
                    state = InRun::Ahead;
                }
            }
            state
        };
        let covered = self.masked_until(at - 1).filter(|end| *end > at).map_or(0, |end| end - at);
        MaskState { covered, token: run(RunKind::Token), url: run(RunKind::Url) }
    }

    /// Writes the bytes between two points, masked; `text` writes what is visible.
    pub fn render(
        &self,
        bytes: &[u8],
        from: usize,
        to: usize,
        out: &mut Vec<u8>,
        text: impl Fn(&[u8], &mut Vec<u8>),
    ) {
        let mut at = from;
        let first = self.ranges.partition_point(|range| range.end <= from);
        for (index, range) in self.ranges.iter().enumerate().skip(first) {
            if range.start >= to {
                break;
            }
            if range.start >= from {
                text(&bytes[at..range.start], out);
                if index > 0 || !self.first_written {
                    out.extend_from_slice(MASKED);
                }
            }
            at = range.end.min(to);
        }
        text(&bytes[at..to], out);
    }
}

fn is_token_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'=' | b'-')
}

/// Says whether a byte ends the value of a URL parameter. White space beyond ASCII does not, which
/// masks more than gitlab-runner does, never less.
pub(super) fn ends_parameter(byte: u8) -> bool {
    matches!(byte, b'?' | b'&' | b' ') || byte.is_ascii_control()
}

/// Gives the start of a UTF-8 sequence that is incomplete at the end of the bytes, or their end.
pub(super) fn incomplete_from(bytes: &[u8]) -> usize {
    let last = bytes.len().saturating_sub(3);
    (last..bytes.len())
        .find(|at| {
            std::str::from_utf8(&bytes[*at..])
                .is_err_and(|error| error.valid_up_to() == 0 && error.error_len().is_none())
        })
        .unwrap_or(bytes.len())
}
