//! The header of a trace line: time, stream, and whether it continues the line before.
//!
//! 32 bytes: `YYYY-MM-DDTHH:MM:SS.uuuuuuZ 00O ` as gitlab-runner writes them and GitLab's log viewer
//! takes them off again. The last byte is `+` where the line continues the one before. The viewer
//! (`lib/gitlab/ci/ansi2json/converter.rb`) joins such a line to the physical line right above it,
//! whatever stream that belongs to; so `+` must not be written after another stream's line.

use jiff::Timestamp;
use jiff::tz::Offset;

/// The length of a header.
pub const HEADER_LEN: usize = 32;
const TIME_LEN: usize = 27;

/// Which of a trace's streams a line belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Our own lines and the output of tools on the submit node.
    Runner,
    /// The log of the job's script, output and errors in one.
    Script,
}

impl Stream {
    fn code(self) -> &'static [u8; 3] {
        match self {
            Self::Runner => b"00O",
            Self::Script => b"01O",
        }
    }
}

/// A time as trace lines show it: UTC, microseconds.
///
/// Formatted once for all lines that are written at the same time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp([u8; TIME_LEN]);

impl Stamp {
    /// Formats a time.
    pub fn new(at: Timestamp) -> Self {
        let time = Offset::UTC.to_datetime(at);
        let mut text = *b"0000-00-00T00:00:00.000000Z";
        put(&mut text[0..4], time.year().max(0).unsigned_abs().into());
        put(&mut text[5..7], time.month().unsigned_abs().into());
        put(&mut text[8..10], time.day().unsigned_abs().into());
        put(&mut text[11..13], time.hour().unsigned_abs().into());
        put(&mut text[14..16], time.minute().unsigned_abs().into());
        put(&mut text[17..19], time.second().unsigned_abs().into());
        put(&mut text[20..26], time.subsec_nanosecond().unsigned_abs() / 1000);
        Self(text)
    }

    /// Makes the header of a line that starts afresh.
    pub fn header(&self, stream: Stream) -> [u8; HEADER_LEN] {
        let mut header = [b' '; HEADER_LEN];
        header[..TIME_LEN].copy_from_slice(&self.0);
        header[TIME_LEN + 1..TIME_LEN + 4].copy_from_slice(stream.code());
        header
    }
}

/// Makes a header say that its line continues the one right before it.
pub fn continued(mut header: [u8; HEADER_LEN]) -> [u8; HEADER_LEN] {
    header[HEADER_LEN - 1] = b'+';
    header
}

/// Writes a number in decimal, right-aligned, zeros before it.
fn put(field: &mut [u8], mut value: u32) {
    for digit in field.iter_mut().rev() {
        *digit = b'0' + u8::try_from(value % 10).unwrap_or(0);
        value /= 10;
    }
}

/// Takes the headers off whole lines, and joins what they continue, as GitLab's log viewer does.
///
/// A trace without headers passes as it is.
pub fn strip_headers(trace: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(trace.len());
    for line in trace.split_inclusive(|byte| *byte == b'\n') {
        match line.split_at_checked(HEADER_LEN) {
            Some((header, rest)) if is_header(header) => {
                if header.last() == Some(&b'+') && out.last() == Some(&b'\n') {
                    out.pop();
                }
                out.extend_from_slice(rest);
            }
            Some(_) | None => out.extend_from_slice(line),
        }
    }
    out
}

fn is_header(bytes: &[u8]) -> bool {
    let at = |index: usize| bytes.get(index).copied().unwrap_or(0);
    at(4) == b'-'
        && at(10) == b'T'
        && at(26) == b'Z'
        && at(27) == b' '
        && at(28).is_ascii_hexdigit()
        && at(29).is_ascii_hexdigit()
        && matches!(at(30), b'O' | b'E')
        && matches!(at(31), b' ' | b'+')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_has_the_documented_form() {
        let stamp = Stamp::new("2026-08-22T00:44:03.001234Z".parse().unwrap());
        assert_eq!(&stamp.header(Stream::Runner), b"2026-08-22T00:44:03.001234Z 00O ");
        let script = stamp.header(Stream::Script);
        assert_eq!(&script, b"2026-08-22T00:44:03.001234Z 01O ");
        assert_eq!(&continued(script), b"2026-08-22T00:44:03.001234Z 01O+");
    }

    #[test]
    fn every_time_has_the_same_width() {
        for (at, text) in [
            (Timestamp::MIN, "0000-01-02T01:59:59.000000Z"),
            (Timestamp::UNIX_EPOCH, "1970-01-01T00:00:00.000000Z"),
            (Timestamp::MAX, "9999-12-30T22:00:00.999999Z"),
        ] {
            let header = Stamp::new(at).header(Stream::Script);
            assert_eq!(std::str::from_utf8(&header[..TIME_LEN]).unwrap(), text);
        }
    }
}
