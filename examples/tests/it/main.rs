//! Clusters of real processes on loopback: what goes wrong, and the words in which it is told. One test runs at a time.

mod cluster;
mod crash;
mod demo;
mod faults;
mod identity;
mod refusals;
