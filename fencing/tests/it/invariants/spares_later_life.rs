//! No method starts against a node of which a later life is a member in the coordinator's view.

use crate::world::{Event, World};
use quorate_fencing::Action;

pub(crate) fn check(world: &World, event: &Event) -> Result<(), String> {
    let Event::Steps { node, victim, action } = event else { return Ok(()) };
    let view = &world.views[world.nodes[node].installed];
    if *action != Action::On && view.members.contains_key(&victim.node) {
        return Err(format!("spares_later_life: {victim} is turned off while its node is a member"));
    }
    Ok(())
}
