//! The parts every simulation of the workspace is made of: a queue of events in virtual time and a network with
//! faults, both drawn from a seeded [`Rng`](crate::Rng). Nothing here knows a protocol.

mod network;
mod schedule;

pub use network::{Faults, Network};
pub use schedule::Schedule;
