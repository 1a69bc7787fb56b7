//! A coordinator that saw a victim verified to be off never turns it off again (once per incident).

use crate::world::{Event, World};
use quorate_fencing::Action;

pub(crate) fn check(world: &World, event: &Event) -> Result<(), String> {
    let Event::Steps { node, victim, action } = event else { return Ok(()) };
    if *action != Action::On && world.seen_off.contains(&(*node, world.nodes[node].life, *victim)) {
        return Err(format!("once: node {node} turns {victim} off a second time"));
    }
    Ok(())
}
