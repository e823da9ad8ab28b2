//! Reads what every answer may carry: status, back-pressure, GitLab's headers, its messages.

use std::time::Duration;

use jiff::Timestamp;
use jiff::fmt::rfc2822::DateTimeParser;
use reqwest::header::{CONTENT_TYPE, HeaderMap};
use serde::de::DeserializeOwned;

use super::CiStatus;
use super::error::{Call, Cause, Error, json_fault};

/// Longer is not believed: our jobs must be heard of every 15 minutes.
const MAX_INTERVAL: Duration = Duration::from_secs(15 * 60);

/// Longer is not believed: nobody means to keep a runner away for a day.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(60 * 60);

/// An answer, read as far as it came.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) call: Call,
    pub(super) status: u16,
    pub(super) headers: HeaderMap,
    pub(super) body: Vec<u8>,
    /// Why the body is not whole.
    pub(super) fault: Option<Cause>,
}

impl Answer {
    /// Refuses an answer that a proxy, a firewall or a login page gave in GitLab's place: its 403
    /// says nothing about a job. The API itself never answers with HTML. What means "later" from
    /// anybody passes, and so does what carries GitLab's own header.
    pub(super) fn unless_html(self) -> Result<Self, Error> {
        if self.is_busy() || self.status == 413 || self.header("job-status").is_some() {
            return Ok(self);
        }
        if self.is_html() {
            let cause = Cause::Html { status: self.status };
            return Err(Error::of(self.call, cause));
        }
        Ok(self)
    }

    /// Says whether the answer means "later", whoever gave it.
    pub(super) fn is_busy(&self) -> bool {
        matches!(self.status, 408 | 429 | 500..)
    }

    pub(super) fn is_html(&self) -> bool {
        let declared = self.headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
        if let Some(declared) = declared {
            let kind = declared.split(';').next().unwrap_or_default().trim();
            if ["text/html", "application/xhtml+xml"].iter().any(|h| kind.eq_ignore_ascii_case(h)) {
                return true;
            }
        }
        let start = self.body.trim_ascii_start();
        ["<!doctype html", "<html"].iter().any(|tag| {
            start.get(..tag.len()).is_some_and(|start| start.eq_ignore_ascii_case(tag.as_bytes()))
        })
    }

    /// Decodes the body.
    pub(super) fn json<T: DeserializeOwned>(self) -> Result<T, Error> {
        if let Some(fault) = self.fault {
            return Err(Error::of(self.call, fault));
        }
        serde_json::from_slice(&self.body).map_err(|error| {
            let cause = Cause::Unreadable { status: self.status, fault: json_fault(&error) };
            Error::of(self.call, cause)
        })
    }

    fn header(&self, name: &str) -> Option<&str> {
        let value = self.headers.get(name)?.to_str().ok()?.trim();
        (!value.is_empty()).then_some(value)
    }

    /// `Job-Status`.
    pub(super) fn job_status(&self) -> Option<CiStatus> {
        self.header("job-status").map(CiStatus::from)
    }

    /// `X-GitLab-Last-Update`.
    pub(super) fn last_update(&self) -> Option<String> {
        self.header("x-gitlab-last-update").map(str::to_owned)
    }

    /// `X-GitLab-Trace-Update-Interval`: whole seconds; what is no number or not positive is not
    /// there.
    pub(super) fn interval(&self) -> Option<Duration> {
        let secs = positive(self.header("x-gitlab-trace-update-interval")?)?;
        Some(Duration::from_secs(secs).min(MAX_INTERVAL))
    }

    /// `Range: 0-<size>`; the number is a length, not a last index.
    pub(super) fn range_end(&self) -> Option<u64> {
        let (_, end) = self.header("range")?.rsplit_once('-')?;
        end.trim().parse().ok()
    }

    /// How long the server wants to be left alone: `RateLimit-ResetTime` if that is to come, else
    /// `Retry-After`.
    pub(super) fn retry_after(&self, now: Timestamp) -> Option<Duration> {
        let until = |text: &str| {
            let then = DateTimeParser::new().parse_timestamp(text).ok()?;
            Duration::try_from(then.duration_since(now)).ok().filter(|wait| !wait.is_zero())
        };
        self.header("ratelimit-resettime")
            .and_then(until)
            .or_else(|| {
                let text = self.header("retry-after")?;
                positive(text).map(Duration::from_secs).or_else(|| until(text))
            })
            .map(|wait| wait.min(MAX_RETRY_AFTER))
    }

    /// Names the next page of a list by the query that asks for it; `asked` is that of this page.
    ///
    /// Of a `Link` only the query counts: its host is what GitLab believes to be called, which need
    /// not be where we reach it, and the token goes nowhere else.
    pub(super) fn next_page(&self, asked: &str) -> Option<String> {
        if let Some(links) = self.header("link") {
            let next = links.split(',').find(|link| {
                link.split(';')
                    .skip(1)
                    .any(|word| word.trim().replace('"', "").eq_ignore_ascii_case("rel=next"))
            });
            let url = next.and_then(|link| link.split_once('<')?.1.split_once('>'));
            return url.and_then(|(url, _)| url.split_once('?')).map(|(_, query)| query.to_owned());
        }
        let page = self.header("x-next-page")?;
        let mut query = url::form_urlencoded::Serializer::new(String::new());
        query.extend_pairs(
            url::form_urlencoded::parse(asked.as_bytes()).filter(|(key, _)| key != "page"),
        );
        Some(query.append_pair("page", page).finish())
    }

    /// GitLab's words, one line; empty if it gave none.
    pub(super) fn message(&self) -> String {
        let text = match serde_json::from_slice::<serde_json::Value>(&self.body) {
            Ok(body) => ["message", "error"]
                .iter()
                .find_map(|key| body.get(key).map(words))
                .unwrap_or_default(),
            Err(_not_json) if self.is_html() => "answered with HTML".to_owned(),
            Err(_not_json) => {
                let text = String::from_utf8_lossy(&self.body);
                text.lines().next().unwrap_or_default().to_owned()
            }
        };
        text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(300).collect()
    }
}

fn positive(text: &str) -> Option<u64> {
    text.parse().ok().filter(|number| *number > 0)
}

/// Flattens a message: a string, a list, or an object of either.
fn words(value: &serde_json::Value) -> String {
    use serde_json::Value;
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        Value::Array(list) => list.iter().map(words).collect::<Vec<_>>().join(", "),
        Value::Object(map) => {
            let one = |(key, value): (&String, &Value)| format!("{key}: {}", words(value));
            map.iter().map(one).collect::<Vec<_>>().join("; ")
        }
        Value::Bool(_) | Value::Number(_) => value.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use reqwest::Method;
    use reqwest::header::{HeaderName, HeaderValue};

    use super::*;

    fn answer(status: u16, headers: &[(&'static str, &'static str)], body: &str) -> Answer {
        Answer {
            call: Call {
                method: Method::PUT,
                url: "https://h/api/v4/jobs/1".parse().unwrap(),
                request_id: "r".into(),
            },
            status,
            headers: headers
                .iter()
                .map(|(k, v)| (HeaderName::from_static(k), HeaderValue::from_static(v)))
                .collect(),
            body: body.into(),
            fault: None,
        }
    }

    #[test]
    fn absurd_intervals_are_ignored_or_capped() {
        let interval =
            |value| answer(202, &[("x-gitlab-trace-update-interval", value)], "").interval();
        assert_eq!(interval("3"), Some(Duration::from_secs(3)));
        assert_eq!(interval("60"), Some(Duration::from_secs(60)));
        assert_eq!(interval("900000"), Some(MAX_INTERVAL));
        for absurd in ["0", "-1", "", "soon", "1.5", "99999999999999999999999"] {
            assert_eq!(interval(absurd), None, "{absurd}");
        }
        assert_eq!(answer(202, &[], "").interval(), None);
    }

    #[test]
    fn the_range_names_a_length() {
        let end = |value| answer(416, &[("range", value)], "").range_end();
        assert_eq!(end("0-0"), Some(0));
        assert_eq!(end("0-1234"), Some(1234));
        assert_eq!(end("bytes=0-7"), Some(7));
        for malformed in ["", "12", "0-", "0-x", "-"] {
            assert_eq!(end(malformed), None, "{malformed}");
        }
    }

    #[test]
    fn a_reset_time_to_come_outranks_retry_after() {
        let now: Timestamp = "2026-08-01T12:00:00Z".parse().unwrap();
        let wait = |headers: &[(&'static str, &'static str)]| {
            answer(429, headers, "").retry_after(now).map(|wait| wait.as_secs())
        };
        let (soon, past) = ("Sat, 01 Aug 2026 12:00:30 GMT", "Sat, 01 Aug 2026 11:59:00 GMT");
        assert_eq!(wait(&[("retry-after", "7")]), Some(7));
        assert_eq!(wait(&[("retry-after", "7"), ("ratelimit-resettime", soon)]), Some(30));
        assert_eq!(wait(&[("retry-after", "7"), ("ratelimit-resettime", past)]), Some(7));
        assert_eq!(wait(&[("retry-after", soon)]), Some(30));
        assert_eq!(wait(&[("retry-after", "18446744073709551615")]), Some(3600));
        for absurd in ["0", "-5", "later", "", past] {
            assert_eq!(wait(&[("retry-after", absurd)]), None, "{absurd}");
        }
    }

    #[test]
    fn messages_of_every_shape_become_one_line() {
        for (body, expected) in [
            (r#"{"message":"403 Forbidden"}"#, "403 Forbidden"),
            (r#"{"message":{"tag_list":["a","b"]}}"#, "tag_list: a, b"),
            (r#"{"message":{"error":"too\nmany"}}"#, "error: too many"),
            (r#"{"error":"token is missing"}"#, "token is missing"),
            (r#"{"message":null}"#, ""),
            (r#"[1]"#, ""),
            ("200", ""),
            ("plain\ntext", "plain"),
            ("<html><body>x", "answered with HTML"),
        ] {
            assert_eq!(answer(400, &[], body).message(), expected, "{body}");
        }
    }

    #[test]
    fn html_is_not_gitlabs_word_unless_its_header_is_there() {
        let html = ("content-type", "text/html; charset=utf-8");
        assert!(answer(403, &[html], "").unless_html().is_err());
        assert!(answer(200, &[], " <!DOCTYPE html>").unless_html().is_err());
        assert!(answer(403, &[html, ("job-status", "canceled")], "").unless_html().is_ok());
        assert!(answer(502, &[html], "<html>").unless_html().is_ok());
        assert!(answer(403, &[("content-type", "application/json")], "{}").unless_html().is_ok());
    }
}
