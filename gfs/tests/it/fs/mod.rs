//! Tests of the live filesystem on devices in memory.

mod cluster;
mod harness;
mod single;
