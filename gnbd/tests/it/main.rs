//! One test binary for the crate.
#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

mod cluster;
mod cluster_support;
mod common;
mod conform;
mod interop;
mod invariants;
mod kill;
mod lives;
mod plain;
mod reconnect;
mod sim;
mod sim_world;
