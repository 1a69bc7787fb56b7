//! One test binary for the crate.
#![expect(clippy::unwrap_used, reason = "helpers of tests panic like tests")]

mod cases;
#[cfg(feature = "sim")]
mod invariants;
#[cfg(feature = "sim")]
mod sim;
#[cfg(feature = "sim")]
mod world;
