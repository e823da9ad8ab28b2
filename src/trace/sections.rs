//! Section markers and the looks of our own lines.
//!
//! The escape sequences are those of gitlab-runner, so that a trace looks the same in GitLab and tools
//! that read traces recognise its lines.

const CLEAR: &[u8] = b"\x1b[0K";
const RESET: &[u8] = b"\x1b[0;m";

/// How a line of ours looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// As it is.
    Plain,
    /// Green and bold.
    Info,
    /// Yellow, and starts with `WARNING: `.
    Warning,
    /// Red and bold, and starts with `ERROR: `.
    Error,
    /// Cyan and bold: the title of a stage.
    Title,
    /// Yellow and bold: what is said about the log itself.
    Notice,
}

impl Style {
    fn around(self) -> (&'static [u8], &'static [u8]) {
        match self {
            Self::Plain => (CLEAR, RESET),
            Self::Info => (b"\x1b[32;1m", RESET),
            Self::Warning => (b"\x1b[0;33mWARNING: ", RESET),
            Self::Error => (b"\x1b[31;1mERROR: ", RESET),
            Self::Title => (b"\x1b[0K\x1b[36;1m", b"\x1b[0;m\x1b[0;m"),
            Self::Notice => (b"\x1b[33;1m", RESET),
        }
    }

    /// Writes one line's text in this style, without the line's end.
    pub fn write(self, text: &[u8], out: &mut Vec<u8>) {
        let (before, after) = self.around();
        out.extend_from_slice(before);
        out.extend_from_slice(text);
        out.extend_from_slice(after);
    }
}

/// A part of the trace that the log viewer can fold and shows the duration of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Section<'a> {
    /// Its name, the same in both markers; of `a-z A-Z 0-9 _ . -`, anything else becomes `_`.
    pub name: &'a str,
    /// The viewer shows it folded.
    pub collapsed: bool,
    /// The viewer shows no duration.
    pub hide_duration: bool,
}

impl<'a> Section<'a> {
    /// Makes a section without options.
    pub fn new(name: &'a str) -> Self {
        Self { name, collapsed: false, hide_duration: false }
    }

    /// Writes the marker that starts the section; the title has to follow on the same line.
    pub fn write_start(&self, unix_seconds: i64, out: &mut Vec<u8>) {
        write_marker("start", unix_seconds, self.name, out);
        match (self.collapsed, self.hide_duration) {
            (false, false) => {}
            (true, false) => out.extend_from_slice(b"[collapsed=true]"),
            (false, true) => out.extend_from_slice(b"[hide_duration=true]"),
            (true, true) => out.extend_from_slice(b"[collapsed=true,hide_duration=true]"),
        }
        out.push(b'\r');
        out.extend_from_slice(CLEAR);
    }
}

/// Writes the marker that ends a section; what follows may share its line.
pub fn write_end(unix_seconds: i64, name: &str, out: &mut Vec<u8>) {
    write_marker("end", unix_seconds, name, out);
    out.push(b'\r');
    out.extend_from_slice(CLEAR);
}

/// Gives the sections of these names that a trace starts and does not end, the innermost first.
///
/// A script that was killed could not end its own.
pub fn left_open(trace: &[u8], ours: impl Fn(&str) -> bool) -> Vec<String> {
    const MARKER: &[u8] = b"section_";
    let mut open: Vec<String> = Vec::new();
    let mut rest = trace;
    while let Some(at) = rest.windows(MARKER.len()).position(|window| window == MARKER) {
        rest = &rest[at + MARKER.len()..];
        let Some((starts, name)) = read_marker(rest) else { continue };
        if !ours(name) {
            continue;
        }
        if starts {
            open.push(name.to_owned());
        } else if let Some(at) = open.iter().rposition(|known| known == name) {
            open.truncate(at);
        }
    }
    open.reverse();
    open
}

/// Reads what follows `section_` up to the name's end: `start:1787359443:step_script`.
fn read_marker(text: &[u8]) -> Option<(bool, &str)> {
    let (starts, rest) = match text.strip_prefix(b"start:") {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix(b"end:")?),
    };
    let digits = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
    let rest = rest.get(digits..)?.strip_prefix(b":")?;
    let named = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-');
    let end = rest.iter().take_while(|byte| named(byte)).count();
    let (name, after) = rest.split_at_checked(end)?;
    let name = std::str::from_utf8(name).ok()?;
    (digits > 0 && matches!(after.first(), Some(b'\r' | b'['))).then_some((starts, name))
}

fn write_marker(action: &str, unix_seconds: i64, name: &str, out: &mut Vec<u8>) {
    out.extend_from_slice(b"section_");
    out.extend_from_slice(action.as_bytes());
    out.push(b':');
    out.extend_from_slice(unix_seconds.max(0).to_string().as_bytes());
    out.push(b':');
    out.extend(name.chars().map(|c| match u8::try_from(c) {
        Ok(byte) if byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-') => byte,
        Ok(_) | Err(_) => b'_',
    }));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markers_have_the_documented_form() {
        let mut out = Vec::new();
        Section::new("step_script").write_start(1_787_359_443, &mut out);
        assert_eq!(out, b"section_start:1787359443:step_script\r\x1b[0K");

        out.clear();
        write_end(1_787_359_443, "step_script", &mut out);
        assert_eq!(out, b"section_end:1787359443:step_script\r\x1b[0K");

        out.clear();
        Section { name: "a b:é", collapsed: true, hide_duration: true }.write_start(1, &mut out);
        assert_eq!(out, b"section_start:1:a_b__[collapsed=true,hide_duration=true]\r\x1b[0K");
    }

    #[test]
    fn sections_that_nobody_ended_are_found() {
        let ours = |name: &str| name.starts_with("step_") || name == "get_sources";
        let mut trace = Vec::new();
        Section::new("get_sources").write_start(1, &mut trace);
        write_end(2, "get_sources", &mut trace);
        assert!(left_open(&trace, ours).is_empty());
        trace.extend_from_slice(b"section_start:x:step_a\r section_start:1:step_\n");
        Section { collapsed: true, ..Section::new("step_script") }.write_start(3, &mut trace);
        Section::new("the_users_own").write_start(4, &mut trace);
        assert_eq!(left_open(&trace, ours), ["step_script"]);
        Section::new("step_inner").write_start(5, &mut trace);
        assert_eq!(left_open(&trace, ours), ["step_inner", "step_script"]);
        write_end(6, "step_script", &mut trace);
        assert!(left_open(&trace, ours).is_empty());
    }

    #[test]
    fn styles_have_the_documented_form() {
        for (style, line) in [
            (Style::Plain, "\x1b[0Ktext\x1b[0;m"),
            (Style::Info, "\x1b[32;1mtext\x1b[0;m"),
            (Style::Warning, "\x1b[0;33mWARNING: text\x1b[0;m"),
            (Style::Error, "\x1b[31;1mERROR: text\x1b[0;m"),
            (Style::Title, "\x1b[0K\x1b[36;1mtext\x1b[0;m\x1b[0;m"),
            (Style::Notice, "\x1b[33;1mtext\x1b[0;m"),
        ] {
            let mut out = Vec::new();
            style.write(b"text", &mut out);
            assert_eq!(String::from_utf8(out).unwrap(), line);
        }
    }
}
