//! One test binary for the crate.

mod invariants;
mod sim;
mod world;
