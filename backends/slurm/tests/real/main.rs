//! The backend against a real Slurm, and against programs that misbehave as a real one cannot be made to.
//!
//! `BRIDGE_TESTS_WITHOUT=slurm` leaves the former out. Without it, a machine on which no Slurm can be
//! started fails.

// A whole test binary is test code; clippy knows it by this.
#[cfg(test)]
mod bed;
#[cfg(test)]
mod conformance;
#[cfg(test)]
mod failures;
#[cfg(test)]
mod fakes;
#[cfg(test)]
mod jobs;
