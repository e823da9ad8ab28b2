//! Finds secrets in a stream of bytes, however the stream is cut.
//!
//! Three kinds, all at once:
//!
//! - **phrases**: the values of masked variables, wherever they stand, also across lines;
//! - **tokens**: what follows a known prefix; the prefix stays visible (`glpat-[MASKED]`);
//! - **URL parameters** whose name gives a secret away.
//!
//! What is masked is the *union* of all occurrences: where secrets overlap, no part of either is left
//! standing. Occurrences that overlap become one `[MASKED]`, those that only touch become two.
//!
//! # How a stream is cut
//!
//! Nothing is buffered in here. A [`Scan`] looks at the bytes at hand and says up to where everything is
//! decided, its horizon; the caller uses the bytes up to any point before the horizon and hands in the
//! rest again, with more. What has to be remembered at such a point is a [`MaskState`] of a few bytes,
//! which holds no secret and can be stored.
//!
//! # How it is fast
//!
//! Nearly all bytes of a log begin no secret. Samples of the text are looked up in tables of what secrets
//! begin with ([`starts`](super::starts)); only where these cannot rule it out does the automaton run,
//! until no secret can be under way any more. Neither depends on the number of secrets, and no input
//! makes it worse than linear.

use std::fmt;

use aho_corasick::automaton::{Automaton as _, StateID};
use aho_corasick::nfa::contiguous::NFA;
use aho_corasick::{Anchored, MatchKind};

use super::forms::with_forms;
use super::scan::{MaskState, RunKind, Scan, URL_KEYS, ends_parameter, incomplete_from};
use super::starts::Starts;

/// What stands in the trace instead of a secret.
pub const MASKED: &[u8] = b"[MASKED]";

/// The longest pattern that is searched for in one piece.
///
/// As many bytes may have to be held back until it is clear whether they are a secret. Longer phrases
/// (certificates in file variables) are searched for in overlapping pieces, which together mask all of
/// them.
pub const LONGEST_PATTERN: usize = 16 * 1024;

/// A token prefix longer than this is cut; no real one comes near.
const LONGEST_PREFIX: usize = 256;

/// The prefixes that gitlab-runner masks by default.
const DEFAULT_PREFIXES: [&str; 14] = [
    "glpat-",
    "gloas-",
    "gldt-",
    "glrt-",
    "glcbt-",
    "glrtr-",
    "glptt-",
    "glft-",
    "glimt-",
    "glagent-",
    "glsoat-",
    "glffct-",
    "_gitlab_session=",
    "gltok-",
];

/// Gives the token prefixes to mask: all, or with `FF_MASK_ALL_DEFAULT_TOKENS` off only `glpat-`.
pub fn default_prefixes(all: bool) -> &'static [&'static str] {
    if all { &DEFAULT_PREFIXES } else { &DEFAULT_PREFIXES[..1] }
}

/// The secrets of a job are too many or too long to be searched for.
#[derive(Debug, thiserror::Error)]
#[error("the masked values are too large to be searched for")]
pub struct MaskError(#[source] Box<aho_corasick::BuildError>);

/// Searches for a job's secrets.
///
/// Made once per job: making it costs time in proportion to the length of all secrets.
pub struct Masker {
    nfa: NFA,
    root: StateID,
    /// By pattern: whether it is a token prefix.
    is_prefix: Vec<bool>,
    /// By state: the length of the longest beginning of a pattern that ends here.
    depth: Vec<u16>,
    /// By state: the same, of patterns that are not complete here.
    live: Vec<u16>,
    starts: Starts,
    longest: usize,
}

impl fmt::Debug for Masker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Masker").field("patterns", &self.is_prefix.len()).finish_non_exhaustive()
    }
}

impl Masker {
    /// Makes a masker for these secrets and token prefixes; URL parameters are always masked.
    ///
    /// White space around phrases is no part of them; empty ones are dropped. There is no shortest
    /// phrase: GitLab sees to that for variables, and other secrets are masked as they are. Prefixes
    /// are not limited in number as in gitlab-runner, which takes fifteen.
    ///
    /// # Errors
    ///
    /// Only if the secrets are gigabytes long. A job whose secrets cannot be masked must not run.
    pub fn new<P: AsRef<str>, T: AsRef<str>>(
        phrases: impl IntoIterator<Item = P>,
        prefixes: impl IntoIterator<Item = T>,
    ) -> Result<Self, MaskError> {
        let mut patterns: Vec<(Vec<u8>, bool)> = Vec::new();
        for phrase in phrases {
            let phrase = phrase.as_ref().trim();
            let mut from = 0;
            while phrase.len() - from > LONGEST_PATTERN {
                let to = phrase.floor_char_boundary(from + LONGEST_PATTERN);
                patterns.push((phrase.as_bytes()[from..to].to_vec(), false));
                // One character of overlap makes the pieces' masks one, and the last piece is as long
                // as the others: a short one would be found in places where it is no secret.
                let last = phrase.ceil_char_boundary(phrase.len() - LONGEST_PATTERN);
                from = phrase.floor_char_boundary(to - 1).min(last);
            }
            if !phrase.is_empty() {
                patterns.push((phrase.as_bytes()[from..].to_vec(), false));
            }
        }
        for prefix in prefixes {
            let prefix = prefix.as_ref().trim();
            let prefix = &prefix.as_bytes()[..prefix.floor_char_boundary(LONGEST_PREFIX)];
            // Line ends must stay places where no token is under way.
            if !prefix.is_empty() && !prefix.iter().any(|byte| ends_parameter(*byte)) {
                patterns.push((prefix.to_vec(), true));
            }
        }
        patterns.sort_unstable_by(|a, b| (a.0.len(), a).cmp(&(b.0.len(), b)));
        patterns.dedup();
        Self::build(&patterns)
    }

    /// Makes a masker for secrets in whatever form they may be printed: as they are, line by line, within
    /// base64, URLs and JSON, and as a shell shows them.
    ///
    /// # Errors
    ///
    /// As [`Masker::new`].
    pub fn of_secrets<P: AsRef<str>, T: AsRef<str>>(
        secrets: impl IntoIterator<Item = P>,
        prefixes: impl IntoIterator<Item = T>,
    ) -> Result<Self, MaskError> {
        Self::new(with_forms(secrets), prefixes)
    }

    fn build(patterns: &[(Vec<u8>, bool)]) -> Result<Self, MaskError> {
        let nfa = NFA::builder()
            .match_kind(MatchKind::Standard)
            .prefilter(false)
            .build(patterns.iter().map(|(pattern, _)| pattern))
            .map_err(|source| MaskError(Box::new(source)))?;
        let root =
            nfa.start_state(Anchored::No).expect("a contiguous NFA can always start unanchored");

        let mut depth = vec![0_u16; root.as_usize() + 1];
        let mut live = depth.clone();
        let mut ends = Vec::with_capacity(patterns.len());
        for (pattern, _) in patterns {
            let mut state = root;
            for (before, byte) in pattern.iter().enumerate() {
                if before > 0 {
                    live[state.as_usize()] = depth[state.as_usize()];
                }
                state = nfa.next_state(Anchored::No, state, *byte);
                if state.as_usize() >= depth.len() {
                    depth.resize(state.as_usize() + 1, 0);
                    live.resize(state.as_usize() + 1, 0);
                }
                depth[state.as_usize()] = u16::try_from(before + 1).unwrap_or(u16::MAX);
            }
            ends.push(state);
        }
        // A state where every pattern is complete is as live as the longest other beginning that ends
        // there. That one is shorter, so in order of length it is known already.
        for ((pattern, _), end) in patterns.iter().zip(&ends) {
            if live[end.as_usize()] == 0 {
                let other = pattern[1..]
                    .iter()
                    .fold(root, |state, byte| nfa.next_state(Anchored::No, state, *byte));
                live[end.as_usize()] = live[other.as_usize()];
            }
        }
        let starts = Starts::new(patterns.iter().map(|(pattern, _)| pattern.as_slice()), &URL_KEYS);
        Ok(Self {
            root,
            is_prefix: patterns.iter().map(|(_, is_prefix)| *is_prefix).collect(),
            longest: patterns.iter().map(|(pattern, _)| pattern.len()).max().unwrap_or(0),
            nfa,
            depth,
            live,
            starts,
        })
    }

    /// Gives the length of the longest pattern.
    pub fn longest(&self) -> usize {
        self.longest
    }

    /// Masks a text that stands for itself.
    pub fn mask(&self, text: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(text.len());
        self.feed(&mut MaskState::default(), text, true, &mut out);
        out
    }

    /// Masks a piece of a stream as far as it is decided and gives the number of bytes used.
    ///
    /// The rest is to be handed in again, with more. `end` says that nothing follows; then everything
    /// is used.
    pub fn feed(&self, state: &mut MaskState, bytes: &[u8], end: bool, out: &mut Vec<u8>) -> usize {
        let mut scan = Scan::default();
        self.scan(bytes, *state, end, &mut scan);
        let cut = scan.clip(scan.horizon());
        scan.render(bytes, 0, cut, out, |text, out| out.extend_from_slice(text));
        *state = if end { MaskState::default() } else { scan.state_at(cut) };
        cut
    }

    /// Looks at the next bytes of a stream.
    pub fn scan(&self, bytes: &[u8], before: MaskState, end: bool, scan: &mut Scan) {
        scan.begin(before, bytes);
        let mut at = 0;
        let mut undecided = bytes.len();
        'skip: while at < bytes.len() {
            at = self.starts.next(bytes, at);
            let candidate = at;
            let mut state = self.root;
            while at < bytes.len() {
                let byte = bytes[at];
                if (byte == b'?' || byte == b'&') && !scan.parameter(bytes, at) {
                    undecided = undecided.min(at);
                }
                state = self.nfa.next_state(Anchored::No, state, byte);
                at += 1;
                if self.nfa.is_match(state) {
                    self.record(bytes, at, state, scan);
                }
                match self.depth[state.as_usize()] {
                    0 => continue 'skip,
                    // Only this byte may begin something: back to the table with it. It has
                    // to be another one than the one we came from.
                    1 if at - 1 > candidate => {
                        at -= 1;
                        continue 'skip;
                    }
                    _ => {}
                }
            }
            undecided = undecided.min(bytes.len() - usize::from(self.live[state.as_usize()]));
        }
        scan.finish(if end { bytes.len() } else { undecided.min(incomplete_from(bytes)) });
    }

    /// Notes the patterns that end at `end`.
    fn record(&self, bytes: &[u8], end: usize, state: StateID, scan: &mut Scan) {
        for index in 0..self.nfa.match_len(state) {
            let pattern = self.nfa.match_pattern(state, index);
            let start = end - self.nfa.pattern_len(pattern);
            if self.is_prefix[pattern.as_usize()] {
                scan.run(RunKind::Token, start, end, bytes);
            } else {
                scan.hit(start, end);
            }
        }
    }
}
