//! What must hold at every step of a simulation, one file each.

pub(crate) mod every_server;
pub(crate) mod lease_first;
pub(crate) mod once;
pub(crate) mod only_quorate;
pub(crate) mod really_off;
pub(crate) mod spares_later_life;

use crate::world::{Event, World};

/// Checks all of them. The message names the one that does not hold.
pub(crate) fn check(world: &World, event: &Event) -> Result<(), String> {
    only_quorate::check(world, event)?;
    once::check(world, event)?;
    lease_first::check(world, event)?;
    every_server::check(world, event)?;
    really_off::check(world, event)?;
    spares_later_life::check(world, event)
}
