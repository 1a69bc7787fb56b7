//! A power-off is proven only if all power of the machine was off at one moment since the victim was removed.

use crate::world::{Event, World};
use quorate_membership::Proof;

pub(crate) fn check(world: &World, event: &Event) -> Result<(), String> {
    let Event::Proves { debtor, proof: Proof::PoweredOff { .. }, .. } = event else { return Ok(()) };
    if world.was_off.contains(debtor) {
        Ok(())
    } else {
        Err(format!("really_off: {debtor} is said to be off and never was"))
    }
}
