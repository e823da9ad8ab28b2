//! bridge: a GitLab runner for batch systems.

pub mod cli;
pub mod config;
pub mod coordinator;
pub mod domain;
pub mod gitlab;
pub mod http;
pub mod job;
pub mod pipeline;
pub mod reconcile;
pub mod registry;
pub mod store;
pub mod telemetry;
pub mod trace;
