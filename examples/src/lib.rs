//! What the programs of this package share: the admin socket, events, and the composition of the crates into a node.

pub mod admin;
pub mod cluster;
pub mod config;
pub mod events;
pub mod node;
pub mod rescue;
pub mod settings;
pub mod storage;
pub mod volume;
pub mod witness;

#[cfg(test)]
#[global_allocator]
static ALLOCATOR: quorate_membership::sim::CountingAllocator = quorate_membership::sim::CountingAllocator;
