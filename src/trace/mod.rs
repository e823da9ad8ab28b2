//! Job logs as bytes: from what a job wrote to what GitLab gets, and the file between the two.
//!
//! The backend's *log* becomes GitLab's *trace* in three steps, in this order: secrets are masked
//! ([`mask`], [`scan`]), what is not UTF-8 is repaired, and lines get their headers ([`timestamps`]).
//! The order matters: a header inside a secret would hide the secret from the masker.
//! [`compose::Composer`] does all three, adds our own remarks and [`sections`], and keeps the trace
//! within its limit. What it yields is appended to a [`spool::Spool`], which holds the trace exactly as
//! GitLab gets it.
//!
//! Nothing in here knows jobs, GitLab or backends, and nothing reads the time.

pub mod compose;
mod forms;
pub mod mask;
mod parts;
pub mod scan;
pub mod sections;
pub mod spool;
mod starts;
pub mod timestamps;

#[cfg(test)]
mod tests;

pub use compose::{Carry, Composer, ComposerOptions};
pub use mask::{MaskError, Masker};
pub use parts::Flush;
pub use sections::{Section, Style, left_open};
pub use spool::{Digest, Opened, Spool, SpoolError};
pub use timestamps::strip_headers;
