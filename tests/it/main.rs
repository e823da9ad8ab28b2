//! The real binary against a coordinator that plays GitLab, and against real backends.
//!
//! One binary for all integration tests: one link, not ten.

#![expect(
    clippy::panic,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "helpers of tests fail as tests do"
)]

mod allocation;
mod ancestor;
mod cancel;
mod cli;
mod crash;
mod exec;
mod grid;
mod grid_limits;
mod grid_login;
mod grid_outage;
mod grid_size;
mod input;
mod layering;
mod lifecycle;
mod outage;
mod readme;
mod rotation;
mod secrets;
mod slurm;
mod support;
mod trace;
