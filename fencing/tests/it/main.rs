//! One test binary for the crate.

#[cfg(feature = "driver")]
mod agent;
#[cfg(feature = "driver")]
mod driver;
mod invariants;
mod sim;
#[cfg(feature = "driver")]
mod supervisor;
mod world;
