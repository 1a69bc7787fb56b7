//! Tests of the live filesystem on devices in memory.

mod cluster;
mod crash;
mod fallocate;
pub(crate) mod harness;
mod model;
mod single;
