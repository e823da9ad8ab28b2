//! Makes the trace: the backend's log and our own remarks in, final bytes out.
//!
//! A [`Composer`] can be dropped between any two calls and made anew from its [`Carry`], which is
//! stored in the same transaction as the offsets; the trace goes on as if nothing had happened. For this
//! it keeps no bytes: what is not decided yet (half a line, what may become a secret) is not *used*, and
//! the caller hands it in again with what follows.
//!
//! # Parts
//!
//! The unit of output is the part: a line, or a piece of one. A line ends at a visible `\n`; one that a
//! secret swallowed ends nothing. Lines longer than [`LONGEST_PART`] are cut at that many bytes of log,
//! so that the place does not depend on how the log arrives. A line that is not complete yet is written
//! up to its last carriage return (progress bars), or as far as it is safe when nothing has followed for
//! a while ([`Flush::Partial`]). The next part of the line then says `+`, unless another stream's
//! line came between: GitLab's viewer would join it to that one.
//!
//! # The limit
//!
//! A part that does not fit is left out, and everything after it, and a notice says so. When the log has
//! ended, its last part is appended ([`Composer::tail`]): why a job failed stands at its end. Our own
//! remarks are always written. A trace may so become longer than its limit by the tail, as much output of
//! tools of ours, the remarks and two notices; a log that fits is whole.

use std::sync::Arc;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::mask::{LONGEST_PATTERN, Masker};
use super::parts::{Ending, Flush, Input, fresh_start, push_repaired};
use super::scan::{MaskState, Scan};
use super::sections::{self, Section, Style};
use super::timestamps::{HEADER_LEN, Stamp, Stream, continued};

/// The longest part of a line that is written at once, in bytes of log.
pub const LONGEST_PART: usize = 16 * 1024;

/// A caller that hands in this many bytes, when there are that many, always gets some of them used.
pub const HOLD_BACK: usize = 64 * 1024;

const _: () = assert!(LONGEST_PART + 2 * LONGEST_PATTERN < HOLD_BACK);

/// How much of the end of a log that is too long is appended at most.
const LONGEST_TAIL: u64 = 64 * 1024;

/// How a job's trace is to look.
#[derive(Clone, Debug)]
pub struct ComposerOptions {
    /// Every line gets a header (`FF_TIMESTAMPS`).
    pub timestamps: bool,
    /// GitLab understands section markers (`features.trace_sections`).
    pub sections: bool,
    /// The length, in bytes, from which on log is left out.
    pub output_limit: u64,
    /// What is secret.
    pub mask: Arc<Masker>,
}

/// What a composer has to know of its past; holds no secret and nothing of the log.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Carry {
    log: MaskState,
    stage: MaskState,
    line: Line,
    written: u64,
    last_micros: i64,
    limit: Limit,
    skipped: u64,
    stage_excess: u64,
    stage_cut: bool,
}

/// Who may go on with the trace's last line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Line {
    /// Nobody: it is complete.
    #[default]
    Complete,
    /// The script's log.
    Log,
    /// A tool of ours.
    Stage,
    /// Whatever comes next from us: the line holds nothing but a section's end.
    Marker,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Limit {
    /// Everything fitted so far.
    #[default]
    Within,
    /// Log is being left out.
    Reached,
    /// The end of the log was appended.
    TailWritten,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    Log,
    Stage,
}

/// Makes one job's trace.
#[derive(Debug)]
pub struct Composer {
    options: ComposerOptions,
    carry: Carry,
    scan: Scan,
    longest_part: usize,
}

impl Composer {
    /// Makes a composer that goes on where another one left `carry`.
    pub fn new(options: ComposerOptions, carry: Carry) -> Self {
        Self { options, carry, scan: Scan::default(), longest_part: LONGEST_PART }
    }

    /// Cuts lines earlier, so that short ones will do for tests of that.
    #[cfg(test)]
    pub(super) fn with_longest_part(self, longest_part: usize) -> Self {
        Self { longest_part, ..self }
    }

    /// Gives what has to be stored together with the offsets.
    pub fn carry(&self) -> &Carry {
        &self.carry
    }

    /// Takes the next bytes of the backend's log, appends to `out` what becomes of them, and gives how
    /// many were used; the rest is to be handed in again, with what follows.
    ///
    /// Of [`HOLD_BACK`] bytes or more at least some are used; with [`Flush::End`] all are.
    pub fn log(&mut self, now: Timestamp, bytes: &[u8], flush: Flush, out: &mut Vec<u8>) -> usize {
        if self.carry.limit != Limit::Within {
            self.skip(bytes.len());
            return bytes.len();
        }
        let (used, fitted) = self.pour(Source::Log, now, bytes, flush, out);
        if fitted {
            return used;
        }
        self.carry.limit = Limit::Reached;
        self.skip(bytes.len() - used);
        let limit = self.options.output_limit;
        let notice = format!(
            "Job's log exceeded limit of {limit} bytes.\n\
             Job execution will continue; the end of the log will follow when it has ended."
        );
        self.remark(now, Style::Notice, &notice, out);
        bytes.len()
    }

    /// Takes output of a tool that runs for the job on the submit node, as [`Composer::log`] does.
    ///
    /// Over the limit some more is written, up to the length of a tail; then nothing.
    pub fn stage_output(
        &mut self,
        now: Timestamp,
        bytes: &[u8],
        flush: Flush,
        out: &mut Vec<u8>,
    ) -> usize {
        if !self.carry.stage_cut {
            let (used, fitted) = self.pour(Source::Stage, now, bytes, flush, out);
            if fitted {
                return used;
            }
            self.carry.stage_cut = true;
            let notice = "The log is at its limit: further output like this is left out.";
            self.remark(now, Style::Notice, notice, out);
        }
        self.carry.stage = MaskState::default();
        bytes.len()
    }

    /// Writes lines of our own; secrets in them are masked.
    pub fn remark(&mut self, now: Timestamp, style: Style, text: &str, out: &mut Vec<u8>) {
        let stamp = self.stamp(now);
        let masked = self.options.mask.mask(text.as_bytes());
        let masked = masked.strip_suffix(b"\n").unwrap_or(&masked);
        for line in masked.split(|byte| *byte == b'\n') {
            self.own_line(&stamp, out, |out| style.write(line, out));
            out.push(b'\n');
            self.carry.written += 1;
            self.carry.line = Line::Complete;
        }
    }

    /// Starts a section; its title is a line of its own where GitLab knows no sections.
    pub fn section_start(
        &mut self,
        now: Timestamp,
        section: Section<'_>,
        title: &str,
        out: &mut Vec<u8>,
    ) {
        if !self.options.sections {
            self.remark(now, Style::Title, title, out);
            return;
        }
        let stamp = self.stamp(now);
        let seconds = self.carry.last_micros.div_euclid(1_000_000);
        let masked = self.options.mask.mask(title.as_bytes());
        self.own_line(&stamp, out, |out| {
            section.write_start(seconds, out);
            Style::Title.write(&masked, out);
            out.push(b'\n');
        });
        self.carry.line = Line::Complete;
    }

    /// Ends a section.
    pub fn section_end(&mut self, now: Timestamp, name: &str, out: &mut Vec<u8>) {
        if !self.options.sections {
            return;
        }
        let stamp = self.stamp(now);
        let seconds = self.carry.last_micros.div_euclid(1_000_000);
        let newline = self.options.timestamps;
        self.own_line(&stamp, out, |out| {
            sections::write_end(seconds, name, out);
            if newline {
                out.push(b'\n');
            }
        });
        self.carry.line = Line::Marker;
    }

    /// Gives how many bytes of log were left out so far.
    pub fn skipped(&self) -> u64 {
        self.carry.skipped
    }

    /// Gives how many of the log's last bytes [`Composer::tail`] wants, if any; to be asked when the log
    /// has ended.
    pub fn tail_wanted(&self) -> Option<u64> {
        let wanted = match self.carry.limit {
            Limit::Within | Limit::TailWritten => 0,
            Limit::Reached => {
                let margin = u64::try_from(self.options.mask.longest()).unwrap_or(u64::MAX);
                self.carry.skipped.min(self.budget().saturating_add(margin))
            }
        };
        (wanted > 0).then_some(wanted)
    }

    /// Appends the end of a log that was too long; `last` are its last bytes.
    ///
    /// Does nothing if nothing is missing, or if it was done before. If fewer bytes are to be had than
    /// [`Composer::tail_wanted`] says, those will do.
    pub fn tail(&mut self, now: Timestamp, last: &[u8], out: &mut Vec<u8>) {
        if self.tail_wanted().is_none() {
            return;
        }
        self.carry.limit = Limit::TailWritten;
        let mut scan = std::mem::take(&mut self.scan);
        let mask = Arc::clone(&self.options.mask);
        let skipped = usize::try_from(self.carry.skipped).unwrap_or(usize::MAX);
        let (bytes, start) = match last.len().checked_sub(skipped) {
            // It begins where the log was cut, and what came before is known.
            Some(before) => {
                let bytes = &last[before..];
                mask.scan(bytes, self.carry.log, true, &mut scan);
                (bytes, 0)
            }
            None => {
                mask.scan(last, MaskState::default(), true, &mut scan);
                let budget = usize::try_from(self.budget()).unwrap_or(usize::MAX);
                let least = last.len().saturating_sub(budget).max(mask.longest());
                (last, fresh_start(last, least, &scan))
            }
        };
        let shown = u64::try_from(bytes.len() - start).unwrap_or(u64::MAX);
        let left_out = self.carry.skipped.saturating_sub(shown);
        if left_out > 0 {
            let text = format!("{left_out} bytes of the log are left out here; this is its end:");
            self.remark(now, Style::Notice, &text, out);
        }
        let stamp = self.stamp(now);
        let plain = scan.is_clean() && std::str::from_utf8(&bytes[start..]).is_ok();
        let input =
            Input { bytes, scan: &scan, flush: Flush::End, plain, longest_part: self.longest_part };
        let mut from = start;
        while let Some((to, ending)) = input.next_part(from) {
            self.write_part(Source::Log, &stamp, &input, from, to, ending, out);
            from = to;
        }
        self.carry.log = MaskState::default();
        self.scan = scan;
    }

    fn budget(&self) -> u64 {
        LONGEST_TAIL.min(self.options.output_limit / 4)
    }

    fn skip(&mut self, bytes: usize) {
        self.carry.skipped += u64::try_from(bytes).unwrap_or(u64::MAX);
    }

    /// Formats the time; never earlier than before, also if the machine's clock was set back.
    fn stamp(&mut self, now: Timestamp) -> Stamp {
        let micros = now.as_microsecond().max(self.carry.last_micros);
        self.carry.last_micros = micros;
        Stamp::new(Timestamp::from_microsecond(micros).unwrap_or(now))
    }

    /// Writes the start of a line of ours and what `text` writes.
    fn own_line(&mut self, stamp: &Stamp, out: &mut Vec<u8>, text: impl FnOnce(&mut Vec<u8>)) {
        let mark = out.len();
        if self.options.timestamps {
            let header = stamp.header(Stream::Runner);
            let follows = self.carry.line == Line::Marker;
            out.extend_from_slice(&if follows { continued(header) } else { header });
        } else if matches!(self.carry.line, Line::Log | Line::Stage) {
            out.push(b'\n');
        }
        text(out);
        self.count(mark, out);
    }

    fn count(&mut self, mark: usize, out: &[u8]) {
        self.carry.written += u64::try_from(out.len() - mark).unwrap_or(u64::MAX);
    }

    /// Writes what is decided; gives how much was used and whether all of that fitted.
    fn pour(
        &mut self,
        source: Source,
        now: Timestamp,
        bytes: &[u8],
        flush: Flush,
        out: &mut Vec<u8>,
    ) -> (usize, bool) {
        let stamp = self.stamp(now);
        let mut scan = std::mem::take(&mut self.scan);
        let before = match source {
            Source::Log => self.carry.log,
            Source::Stage => self.carry.stage,
        };
        self.options.mask.scan(bytes, before, flush == Flush::End, &mut scan);
        let plain = scan.is_clean() && std::str::from_utf8(&bytes[..scan.horizon()]).is_ok();
        let input = Input { bytes, scan: &scan, flush, plain, longest_part: self.longest_part };

        let mut from = 0;
        let mut fitted = true;
        while let Some((to, ending)) = input.next_part(from) {
            let (mark, line, written) = (out.len(), self.carry.line, self.carry.written);
            self.write_part(source, &stamp, &input, from, to, ending, out);
            if !self.fits(source, written) {
                out.truncate(mark);
                self.carry.line = line;
                self.carry.written = written;
                fitted = false;
                break;
            }
            from = to;
        }
        let mut after = scan.state_at(from);
        if fitted && flush == Flush::End {
            self.end_line(source, out);
            after = MaskState::default();
        }
        match source {
            Source::Log => self.carry.log = after,
            Source::Stage => self.carry.stage = after,
        }
        self.scan = scan;
        (from, fitted)
    }

    /// Says whether what has just been written may stay.
    fn fits(&mut self, source: Source, before: u64) -> bool {
        if self.carry.written <= self.options.output_limit {
            return true;
        }
        match source {
            Source::Log => false,
            Source::Stage => {
                let excess = self.carry.stage_excess + (self.carry.written - before);
                let fits = excess <= self.budget();
                if fits {
                    self.carry.stage_excess = excess;
                }
                fits
            }
        }
    }

    #[expect(
        clippy::too_many_arguments,
        reason = "one place that writes; its callers are two loops"
    )]
    fn write_part(
        &mut self,
        source: Source,
        stamp: &Stamp,
        input: &Input<'_>,
        from: usize,
        to: usize,
        ending: Ending,
        out: &mut Vec<u8>,
    ) {
        let mark = out.len();
        let (stream, own, follows) = match source {
            Source::Log => (Stream::Script, Line::Log, self.carry.line == Line::Log),
            Source::Stage => {
                let follows = matches!(self.carry.line, Line::Stage | Line::Marker);
                (Stream::Runner, Line::Stage, follows)
            }
        };
        if self.options.timestamps {
            let header = stamp.header(stream);
            out.extend_from_slice(&if follows { continued(header) } else { header });
            debug_assert_eq!(out.len() - mark, HEADER_LEN);
        } else if !follows && matches!(self.carry.line, Line::Log | Line::Stage) {
            out.push(b'\n');
        }
        let text = out.len();
        if input.plain {
            out.extend_from_slice(&input.bytes[from..to]);
        } else {
            input.scan.render(input.bytes, from, to, out, push_repaired);
        }
        if out.len() == text {
            // All of it lies inside a secret whose mask is written.
            out.truncate(mark);
            return;
        }
        self.carry.line = match ending {
            Ending::Newline => Line::Complete,
            Ending::Open => own,
            Ending::End => Line::Complete,
        };
        let add_newline = match ending {
            Ending::Newline => false,
            Ending::Open => self.options.timestamps,
            Ending::End => true,
        };
        if add_newline {
            out.push(b'\n');
        }
        self.count(mark, out);
    }

    /// Ends a line that was left open; with headers it has its newline already.
    fn end_line(&mut self, source: Source, out: &mut Vec<u8>) {
        let open = match source {
            Source::Log => Line::Log,
            Source::Stage => Line::Stage,
        };
        if self.carry.line == open {
            if !self.options.timestamps {
                out.push(b'\n');
                self.carry.written += 1;
            }
            self.carry.line = Line::Complete;
        }
    }
}
