//! What the tables of different backends have in common.

use std::time::Duration;

use jiff::SignedDuration;

use crate::OpenError;

/// Takes a duration as it is written, or the default; none is nothing or less.
///
/// # Errors
///
/// When it is zero or negative; the text names the key.
pub fn duration(
    key: &str,
    written: Option<SignedDuration>,
    default: Duration,
) -> Result<Duration, OpenError> {
    let Some(written) = written else { return Ok(default) };
    match Duration::try_from(written) {
        Ok(duration) if !duration.is_zero() => Ok(duration),
        Ok(_) | Err(_) => Err(OpenError::Config(format!("{key} must be more than nothing"))),
    }
}
