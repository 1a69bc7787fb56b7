//! One test binary for the crate.

#![allow(clippy::unwrap_used, reason = "a test binary: a panic is a failure")]

mod groups;
mod hostile;
mod invariants;
#[cfg(feature = "driver")]
mod node;
#[cfg(feature = "driver")]
mod pki;
mod quorum;
mod scale;
mod scenarios;
mod session;
mod simulation;
mod stability;
#[cfg(feature = "driver")]
mod temp;

#[global_allocator]
static ALLOCATOR: quorate_membership::sim::CountingAllocator = quorate_membership::sim::CountingAllocator;
