//! Tests of the live filesystem on devices in memory.

mod cluster;
mod crash;
pub(crate) mod harness;
mod model;
mod single;
