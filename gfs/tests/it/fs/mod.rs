//! Tests of the live filesystem on devices in memory.

mod cluster;
mod crash;
mod model;
pub(crate) mod harness;
mod single;
