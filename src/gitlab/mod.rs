//! The runner API's client: says what the server said, decides nothing.

pub mod wire;
