//! Clusters of real processes on loopback: what goes wrong, and the words in which it is told. One test runs at a time.
#![expect(clippy::unwrap_used, reason = "helpers of tests panic like tests")]

mod cluster;
mod crash;
mod demo;
mod faults;
mod fencing;
mod identity;
mod journals;
mod quorum;
mod refusals;
