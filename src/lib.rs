//! bridge: a GitLab runner for batch systems.

pub mod coordinator;
pub mod domain;
pub mod gitlab;
pub mod trace;
