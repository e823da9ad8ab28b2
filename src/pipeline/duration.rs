//! Time spans in the words that GitLab accepts for `timeout`.

use std::time::Duration;

/// Longest timeout that GitLab accepts: a month.
const LONGEST: Duration = Duration::from_secs(30 * 24 * 3600);

/// Reads `1h 30m`, `90 minutes`, `2 hours and 5 mins`, `1:30:00`, `3600`.
///
/// A number without a unit is seconds. The message says what is wrong with anything else.
pub(super) fn parse(text: &str) -> Result<Duration, String> {
    let seconds = seconds(&text.trim().to_ascii_lowercase()).ok_or_else(|| {
        format!("`{text}` is no time span; write it like `1h 30m` or `90 minutes`")
    })?;
    let span = Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX);
    if span < Duration::from_secs(1) {
        return Err(format!("`{text}` is shorter than a second"));
    }
    if span > LONGEST {
        return Err(format!("`{text}` is longer than the month that GitLab allows"));
    }
    Ok(span)
}

fn seconds(text: &str) -> Option<f64> {
    if text.contains(':') {
        return clock(text);
    }
    let mut total = 0.0;
    let mut any = false;
    let mut rest = text;
    loop {
        rest = rest.trim_start_matches(|c: char| c.is_whitespace() || c == ',');
        if rest.is_empty() {
            return any.then_some(total);
        }
        if !rest.starts_with(|c: char| c.is_ascii_digit() || c == '.') {
            // The words that join two parts say nothing by themselves.
            let (word, after) = cut(rest, |c| c.is_ascii_alphabetic());
            if !any || !matches!(word, "and" | "with" | "plus") {
                return None;
            }
            rest = after;
            continue;
        }
        let (number, after) = cut(rest, |c| c.is_ascii_digit() || c == '.');
        let (unit, after) = cut(after.trim_start(), |c| c.is_ascii_alphabetic());
        total += number.parse::<f64>().ok()? * unit_seconds(unit)?;
        any = true;
        rest = after;
    }
}

/// Splits after the leading characters that fit.
fn cut(text: &str, fits: impl Fn(char) -> bool) -> (&str, &str) {
    text.split_at(text.find(|c| !fits(c)).unwrap_or(text.len()))
}

fn unit_seconds(unit: &str) -> Option<f64> {
    Some(match unit {
        "" | "s" | "sec" | "secs" | "second" | "seconds" => 1.0,
        "m" | "min" | "mins" | "minute" | "minutes" => 60.0,
        "h" | "hr" | "hrs" | "hour" | "hours" => 3600.0,
        "d" | "dy" | "day" | "days" => 86_400.0,
        "w" | "wk" | "wks" | "week" | "weeks" => 604_800.0,
        "mo" | "mos" | "month" | "months" => 2_592_000.0,
        _ => return None,
    })
}

/// Reads `minutes:seconds` and `hours:minutes:seconds`.
fn clock(text: &str) -> Option<f64> {
    let parts: Vec<&str> = text.split(':').collect();
    if parts.len() > 3 {
        return None;
    }
    let mut total: u32 = 0;
    for part in parts {
        if part.is_empty() || !part.bytes().all(|byte| byte.is_ascii_digit()) {
            return None;
        }
        total = total.checked_mul(60)?.checked_add(part.parse().ok()?)?;
    }
    Some(f64::from(total))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gitlab_s_words_for_time_are_understood() {
        for (text, seconds) in [
            ("1h 30m", 5400),
            ("1h30m", 5400),
            ("90 minutes", 5400),
            ("3600", 3600),
            ("3 hours and 30 minutes", 12_600),
            ("1 day, 2 hrs", 93_600),
            ("1.5 hours", 5400),
            ("2 weeks", 1_209_600),
            ("1 MONTH", 2_592_000),
            ("1:30:00", 5400),
            ("2:05", 125),
            ("10 secs", 10),
        ] {
            assert_eq!(parse(text), Ok(Duration::from_secs(seconds)), "{text}");
        }
    }

    #[test]
    fn other_words_are_refused() {
        for text in [
            "",
            "soon",
            "1 parsec",
            "and 3 hours",
            "3 hours or so",
            "1.2.3 h",
            "1:2:3:4",
            "1::3",
            "-5m",
        ] {
            assert!(parse(text).unwrap_err().contains("no time span"), "{text}");
        }
        assert!(parse("0").unwrap_err().contains("shorter"));
        assert!(parse("2 months").unwrap_err().contains("month"));
        assert!(parse("999999999999999999999999999999 weeks").unwrap_err().contains("month"));
    }
}
