//! Processes on the submit node as a batch system.
