//! The other forms that a secret takes on its way into a log.
//!
//! A secret is seldom printed as it is. It is part of a header in base64, of a URL, of a JSON body, of a
//! command that a shell shows as it runs it; a secret of several lines is printed line by line, with
//! something before each. All these forms are known from the secret alone, so they can be searched for
//! like the secret itself.
//!
//! What is *not* found: a secret that is cut, hashed, compressed or encrypted; and the few bits of its
//! first and last byte that share a base64 digit with what stands beside it.

use std::collections::HashSet;

use base64::Engine as _;
use base64::prelude::{BASE64_STANDARD_NO_PAD, BASE64_URL_SAFE_NO_PAD};

/// Forms shorter than this are not searched for: they would be found where they are no secret. It is also
/// what GitLab wants a masked variable to have at least.
const SHORTEST: usize = 8;

/// Longer secrets are searched for as they are and line by line, and nothing more.
const LONGEST: usize = 16 * 1024;

/// All forms of all secrets of a job together take no more bytes than this; short secrets come first.
const BUDGET: usize = 2 * 1024 * 1024;

/// The widths at which tools break lines of base64: coreutils and MIME, PEM.
const WIDTHS: [usize; 2] = [76, 64];

/// Gives these secrets and their other forms, none twice and none empty.
pub(super) fn with_forms<P: AsRef<str>>(secrets: impl IntoIterator<Item = P>) -> Vec<String> {
    let mut plain: Vec<String> =
        secrets.into_iter().map(|secret| secret.as_ref().trim().to_owned()).collect();
    plain.sort_unstable_by(|a, b| (a.len(), a).cmp(&(b.len(), b)));
    plain.dedup();
    plain.retain(|secret| !secret.is_empty());
    let mut forms = Forms { seen: plain.iter().cloned().collect(), all: Vec::new(), left: BUDGET };
    for secret in &plain {
        forms.add_lines(secret);
    }
    for secret in plain.iter().filter(|secret| (SHORTEST..=LONGEST).contains(&secret.len())) {
        forms.add_encoded(secret);
    }
    plain.append(&mut forms.all);
    plain
}

struct Forms {
    seen: HashSet<String>,
    all: Vec<String>,
    left: usize,
}

impl Forms {
    fn add(&mut self, form: &str) {
        if form.len() < SHORTEST || form.len() > self.left || self.seen.contains(form) {
            return;
        }
        self.left -= form.len();
        self.seen.insert(form.to_owned());
        self.all.push(form.to_owned());
    }

    /// Each line is a secret too: a log shows it alone, or with something before it.
    fn add_lines(&mut self, secret: &str) {
        if !secret.contains(['\n', '\r']) {
            return;
        }
        // The frame of a key or certificate is no secret, and logs are full of it.
        let lines = secret.split(['\n', '\r']).map(str::trim);
        for line in lines.filter(|line| !line.starts_with("-----")) {
            if line.len() >= SHORTEST {
                // Never for want of room: this is the secret itself.
                self.left += line.len();
                self.add(line);
            }
        }
        self.add(&secret.replace("\r\n", "\n"));
        if !secret.contains('\r') {
            self.add(&secret.replace('\n', "\r\n"));
        }
    }

    fn add_encoded(&mut self, secret: &str) {
        for text in base64(secret.as_bytes()) {
            self.add(&text);
        }
        for form in url_encoded(secret) {
            self.add(&form);
        }
        for form in quoted(secret) {
            self.add(&form);
        }
    }
}

/// Gives the digits that a secret has within base64, whatever stands before and after it.
fn base64(secret: &[u8]) -> Vec<String> {
    let mut forms = Vec::new();
    for before in 0..3 {
        let mut bytes = vec![0; before];
        bytes.extend_from_slice(secret);
        // Digits that also hold bits of what stands beside the secret are left out.
        let (from, to) = ((before * 8).div_ceil(6), bytes.len() * 8 / 6);
        for text in [BASE64_STANDARD_NO_PAD.encode(&bytes), BASE64_URL_SAFE_NO_PAD.encode(&bytes)] {
            forms.extend(text.get(from..to).map(str::to_owned));
            if before == 0 {
                // A long secret that was encoded alone is broken into lines.
                for width in WIDTHS.into_iter().filter(|width| *width < to) {
                    let starts = (0..to).step_by(width);
                    forms.extend(
                        starts.filter_map(|at| text.get(at..to.min(at + width))).map(str::to_owned),
                    );
                }
            }
        }
    }
    forms
}

/// Gives a secret as the usual functions put it into a URL.
fn url_encoded(secret: &str) -> Vec<String> {
    let encode = |kept: &str, upper: bool| {
        let mut text = String::with_capacity(secret.len());
        for byte in secret.bytes() {
            let c = char::from(byte);
            if byte.is_ascii_alphanumeric() || kept.contains(c) {
                text.push(c);
            } else {
                text.push('%');
                for digit in [byte >> 4, byte & 15] {
                    let digit = char::from_digit(u32::from(digit), 16).unwrap_or('0');
                    text.push(if upper { digit.to_ascii_uppercase() } else { digit });
                }
            }
        }
        text
    };
    let mut forms = Vec::new();
    for upper in [true, false] {
        // curl and RFC 3986; a path in Python; JavaScript.
        for kept in ["-._~", "-._~/", "-._~!'()*"] {
            let form = encode(kept, upper);
            // Forms to be posted.
            forms.push(form.replace("%20", "+"));
            forms.push(form);
        }
    }
    forms
}

/// Gives a secret as it stands between quotes: in JSON, and where a shell shows it.
fn quoted(secret: &str) -> Vec<String> {
    let mut forms = Vec::new();
    let mut escaped = |escape: &dyn Fn(char, &mut String)| {
        let mut text = String::with_capacity(secret.len());
        secret.chars().for_each(|c| escape(c, &mut text));
        forms.push(text);
    };
    // JSON: as little as must be; ASCII alone (Python); safe within HTML (Go); with `\/` (PHP).
    for (ascii, html, slash) in
        [(false, false, false), (true, false, false), (false, true, false), (true, false, true)]
    {
        escaped(&|c, text| match c {
            '"' | '\\' => text.extend(['\\', c]),
            '\n' => text.push_str("\\n"),
            '\r' => text.push_str("\\r"),
            '\t' => text.push_str("\\t"),
            '/' if slash => text.push_str("\\/"),
            '<' | '>' | '&' if html => push_unit(u16::try_from(u32::from(c)).unwrap_or(0), text),
            c if c.is_ascii_control() || (ascii && !c.is_ascii()) => {
                c.encode_utf16(&mut [0; 2]).iter().for_each(|unit| push_unit(*unit, text));
            }
            c => text.push(c),
        });
    }
    // Between single quotes; `$'…'`; between double quotes; with a backslash before each.
    escaped(&|c, text| match c {
        '\'' => text.push_str("'\\''"),
        c => text.push(c),
    });
    escaped(&|c, text| match c {
        '\'' | '\\' => text.extend(['\\', c]),
        '\n' => text.push_str("\\n"),
        '\r' => text.push_str("\\r"),
        '\t' => text.push_str("\\t"),
        c => text.push(c),
    });
    escaped(&|c, text| {
        if matches!(c, '"' | '$' | '`' | '\\') {
            text.push('\\');
        }
        text.push(c);
    });
    escaped(&|c, text| {
        if c.is_ascii() && !c.is_ascii_alphanumeric() && !"-_./:=@%+,".contains(c) {
            text.push('\\');
        }
        text.push(c);
    });
    forms
}

fn push_unit(unit: u16, text: &mut String) {
    text.push_str("\\u");
    for shift in [12, 8, 4, 0] {
        text.push(char::from_digit(u32::from(unit >> shift & 15), 16).unwrap_or('0'));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn forms(secrets: &[&str]) -> Vec<String> {
        with_forms(secrets)
    }

    #[test]
    fn a_secret_without_special_characters_has_its_three_places_in_base64_and_nothing_else() {
        // Encoded after zero, one and two other bytes.
        assert_eq!(
            forms(&["hunter2hunter2"]),
            ["hunter2hunter2", "aHVudGVyMmh1bnRlcj", "h1bnRlcjJodW50ZXIy", "odW50ZXIyaHVudGVyM"]
        );
    }

    #[test]
    fn base64_is_found_whatever_stands_around() {
        let secret = "s3cr3t/with+more?";
        let all = forms(&[secret]);
        for before in ["", "a", "ab", "gitlab-ci-token:", "user:", "{\"auth\":\""] {
            for after in ["", "\n", "x", "\"}", ":pw"] {
                let whole = format!("{before}{secret}{after}");
                for text in [
                    BASE64_STANDARD_NO_PAD.encode(&whole),
                    BASE64_URL_SAFE_NO_PAD.encode(&whole),
                    base64::prelude::BASE64_STANDARD.encode(&whole),
                ] {
                    assert!(all.iter().any(|form| text.contains(form.as_str())), "{text}");
                }
            }
        }
    }

    #[test]
    fn base64_that_is_broken_into_lines_is_found_line_by_line() {
        let secret: String = (0..40).map(|n| format!("{n:05}")).collect();
        let all = forms(&[&secret]);
        let text = BASE64_STANDARD_NO_PAD.encode(&secret);
        for width in WIDTHS {
            for line in text.as_bytes().chunks(width) {
                let line = str::from_utf8(line).unwrap();
                // The last digit may be half of something else.
                let (line, _) = line.split_at(line.len() - 1);
                assert!(all.iter().any(|form| form.contains(line)), "{line}");
            }
        }
    }

    #[test]
    fn urls_json_and_shells_have_forms_of_their_own() {
        let all = forms(&["p@ss w'rd\"$é/"]);
        for form in [
            "p%40ss%20w%27rd%22%24%C3%A9%2F",
            "p%40ss%20w%27rd%22%24%c3%a9%2f",
            "p%40ss+w%27rd%22%24%C3%A9%2F",
            "p%40ss%20w%27rd%22%24%C3%A9/",
            "p%40ss%20w'rd%22%24%C3%A9%2F",
            "p@ss w'rd\\\"$é/",
            "p@ss w'rd\\\"$\\u00e9/",
            "p@ss w'rd\\\"$\\u00e9\\/",
            "p@ss w'\\''rd\"$é/",
            "p@ss w\\'rd\"$é/",
            "p@ss w'rd\\\"\\$é/",
            "p@ss\\ w\\'rd\\\"\\$é/",
        ] {
            assert!(all.iter().any(|one| one == form), "{form} in {all:#?}");
        }
    }

    #[test]
    fn each_line_of_a_secret_is_one_but_its_frame_is_not() {
        let key = "-----BEGIN KEY-----\nMIIEvQIBADANBg\r\n  kqhkiG9w0BAQ\nshort\n-----END KEY-----";
        let all = forms(&[key]);
        for line in ["MIIEvQIBADANBg", "kqhkiG9w0BAQ"] {
            assert!(all.iter().any(|form| form == line), "{line}");
        }
        assert!(all.iter().all(|form| form.len() >= SHORTEST), "{all:#?}");
        assert!(!all.iter().any(|form| form.ends_with("KEY-----") && form.len() < 30), "{all:#?}");
    }

    #[test]
    fn short_secrets_have_no_other_forms() {
        assert_eq!(forms(&["pass'rd", " ", "pass'rd ", "x"]), ["x", "pass'rd"]);
    }

    #[test]
    fn many_large_secrets_do_not_take_all_memory() {
        let secrets: Vec<String> = (0..400).map(|n| format!("{n:08}").repeat(1500)).collect();
        let all = with_forms(&secrets);
        let bytes: usize = all.iter().map(String::len).sum();
        assert!(bytes < 400 * 12_000 + BUDGET + 1, "{bytes}");
        assert!(secrets.iter().all(|secret| all.contains(secret)));
    }
}
