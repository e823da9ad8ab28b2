//! What a server says when it says no.

use jiff::Timestamp;
use reqwest::Response;
use reqwest::header::DATE;

use super::{S3Error, date};

/// The most that is read of a refusal.
const LONGEST: usize = 64 * 1024;

/// The difference of two clocks that servers put up with, less a bit.
const TOLERATED: i64 = 10 * 60;

/// Reads a refusal. Only S3's one-word code is taken from it: the rest may name the account.
pub(super) async fn refusal(
    method: &'static str,
    url: String,
    mut response: Response,
    now: Timestamp,
) -> S3Error {
    let status = response.status();
    let there = date(response.headers(), DATE.as_str());
    let mut body = Vec::new();
    while body.len() < LONGEST {
        match response.chunk().await {
            Ok(Some(chunk)) => body.extend_from_slice(&chunk),
            // The status says enough.
            Ok(None) | Err(_) => break,
        }
    }
    let word = code(&body);
    let skewed = there.map(|there| now.as_second() - there.as_second());
    let by_code = word.as_deref() == Some("RequestTimeTooSkewed");
    if status.is_client_error()
        && let Some(ahead) = skewed
        && (by_code || (status.as_u16() == 403 && ahead.abs() > TOLERATED))
    {
        return S3Error::Clock { url, ahead };
    }
    let code = word.map(|word| format!(" ({word})")).unwrap_or_default();
    if status.is_redirection() {
        S3Error::Elsewhere { method, url, status, code }
    } else {
        S3Error::Refused { method, url, status, code }
    }
}

/// Finds the code in an error document.
pub(super) fn code(body: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(body);
    let (_, rest) = text.split_once("<Error>")?;
    let word = element(rest, "Code")?;
    let plain = !word.is_empty()
        && word.len() <= 64
        && word.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'.');
    plain.then(|| word.to_owned())
}

/// Gives the text of the first element of this name.
pub(super) fn element<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let (_, rest) = text.split_once(&format!("<{name}>"))?;
    let (word, _) = rest.split_once(&format!("</{name}>"))?;
    Some(word.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_code_is_taken_from_an_error() {
        let body = b"<?xml version=\"1.0\"?>\n<Error><Code>AccessDenied</Code><AWSAccessKeyId>AKIA\
                     </AWSAccessKeyId></Error>";
        assert_eq!(code(body).as_deref(), Some("AccessDenied"));
        for odd in [
            &b"<Error><Code>a b</Code></Error>"[..],
            b"<Error><Code></Code></Error>",
            b"<Error><Code>x",
            b"<Code>AccessDenied</Code>",
            b"<html>",
            b"\xff",
            b"",
        ] {
            assert_eq!(code(odd), None);
        }
    }
}
