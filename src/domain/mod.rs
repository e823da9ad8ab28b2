//! What a job is and how it may change. Pure: no I/O; time and randomness come in as arguments.

pub mod clock;
pub mod id;
pub mod job;
pub mod policy;
pub mod verdict;
