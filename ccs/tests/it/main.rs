//! One test binary for the crate: the simulation with its invariants, and directories that are not the cluster's.

mod foreign;
mod invariants;
mod sim;
mod world;
