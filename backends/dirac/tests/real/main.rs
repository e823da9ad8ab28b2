//! The backend against a real DiracX with a site that runs its jobs.
//!
//! `BRIDGE_TESTS_WITHOUT=dirac` leaves these out. Without it, a machine on which no DiracX can be started
//! fails.

// A whole test binary is test code; clippy knows it by this.
#[cfg(test)]
mod bed;
#[cfg(test)]
mod bulk;
#[cfg(test)]
mod conformance;
#[cfg(test)]
mod expiry;
#[cfg(test)]
mod failures;
#[cfg(test)]
mod jobs;
#[cfg(test)]
mod network;
#[cfg(test)]
mod payloads;
#[cfg(test)]
mod proxy;
#[cfg(test)]
mod room;
#[cfg(test)]
mod statuses;
#[cfg(test)]
mod store;
#[cfg(test)]
mod tokens;
#[cfg(test)]
mod workers;
