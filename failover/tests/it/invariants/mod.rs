//! What must hold after every step of the simulation, whatever fails.

mod fresh_start;
mod frozen;
mod one_node;
mod order;
mod owner;

use crate::world::World;

/// Checks all of them.
#[derive(Default)]
pub(crate) struct Invariants;

impl Invariants {
    pub(crate) fn check(&self, world: &World) {
        one_node::check(world);
        owner::check(world);
        fresh_start::check(world);
        order::check(world);
        frozen::check(world);
    }
}
