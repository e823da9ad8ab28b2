//! bridge: a GitLab runner for batch systems.

pub mod domain;
pub mod gitlab;
pub mod trace;
