//! One test binary for the crate: the simulation with its invariants.

mod invariants;
mod sim;
mod world;
