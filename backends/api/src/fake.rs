//! see helper
