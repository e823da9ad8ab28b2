//! How far our clock is from GitLab's.

use bytes::Bytes;
use jiff::SignedDuration;
use jiff::fmt::rfc2822::DateTimeParser;
use reqwest::Method;
use reqwest::header::{DATE, HeaderValue};

use super::Client;
use super::error::Error;
use super::transport::Ask;

impl Client {
    /// Asks how far our clock is ahead of GitLab's; `None` when its answer bears no date.
    ///
    /// Good to about a second, which is what an HTTP date can say. Needs no token: any answer has a
    /// date, a refusal too.
    pub async fn clock_skew(&self) -> Result<Option<SignedDuration>, Error> {
        let plain = HeaderValue::from_static("text/plain");
        let ask = Ask::bytes(Method::GET, "version", plain, Bytes::new(), self.timeouts());
        let before = self.now();
        let answer = self.0.exchange(ask.accept_json()).await?;
        let after = self.now();
        let date = answer.headers.get(DATE).and_then(|value| value.to_str().ok());
        let date = date.and_then(|text| DateTimeParser::new().parse_timestamp(text).ok());
        // The server's clock was read somewhere between; a second is cut off on the wire.
        let middle = before + after.duration_since(before) / 2;
        Ok(date.map(|date| middle.duration_since(date) - SignedDuration::from_millis(500)))
    }
}
