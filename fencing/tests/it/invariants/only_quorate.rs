//! Only the lowest member of the view a node has installed fences, and only while it is quorate (issue: "only when quorate").

use crate::world::{Event, World};
use quorate_fencing::Action;

pub(crate) fn check(world: &World, event: &Event) -> Result<(), String> {
    let (Event::Installs { node, .. } | Event::Steps { node, .. }) = event else { return Ok(()) };
    // Turning a node on again harms nobody: the one that turned it off finishes that, also when it is not the lowest any
    // more.
    let is_fence = !matches!(event, Event::Steps { action: Action::On, .. });
    let state = &world.nodes[node];
    if !state.quorate {
        return Err(format!("only_quorate: node {node} fences without quorum"));
    }
    let view = &world.views[state.installed];
    if view.members.first_key_value().map(|(n, _)| n) != Some(node) && is_fence {
        return Err(format!("only_quorate: node {node} fences and is not the lowest member"));
    }
    Ok(())
}
