//! bridge: a GitLab runner for batch systems.

pub mod cli;
pub mod coordinator;
pub mod domain;
pub mod gitlab;
pub mod job;
pub mod pipeline;
pub mod store;
pub mod trace;
