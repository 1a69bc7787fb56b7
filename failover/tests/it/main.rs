//! One test binary for the crate.
#![expect(clippy::unwrap_used, reason = "helpers of tests panic like tests")]

#[cfg(feature = "driver")]
mod agents;
mod cases;
#[cfg(feature = "driver")]
mod driver;
#[cfg(feature = "sim")]
mod invariants;
mod scenes;
#[cfg(feature = "sim")]
mod sim;
#[cfg(feature = "sim")]
mod stack;
#[cfg(feature = "sim")]
mod world;
