//! The parts every simulation of the workspace is made of: a queue of events in virtual time, a network with faults,
//! both drawn from a seeded [`Rng`](crate::Rng), and a cluster of real membership machines on top of them.

mod cluster;
mod hostile;
#[cfg(feature = "model")]
pub mod model;
mod network;
mod node;
mod schedule;
mod seeds;

pub use cluster::{Cluster, ClusterConfig, Happening, Recorded, Traffic};
pub use hostile::{
    CountingAllocator, MEMORY_BASE_MAX, MEMORY_PER_BYTE_MAX, Verdicts, damage, hostile, samples,
};
pub use network::{Faults, Network};
pub use node::{Clock, SimNode};
pub use schedule::Schedule;
pub use seeds::{chosen_seeds, seeds};
