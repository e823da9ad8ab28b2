//! The command line.

pub mod exec_view;
