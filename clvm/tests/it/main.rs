//! One test binary for the crate.

mod cluster;
mod corrupt;
mod crash;
mod data;
mod foreign;
mod locks;
mod support;
mod tools;
