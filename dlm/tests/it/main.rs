//! The lock manager from outside: scenarios as text, the lock cache, and the simulation.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod cache;
mod driver;
mod invariants;
#[cfg(all(feature = "driver", feature = "service"))]
mod service;
mod sim;
mod support;
