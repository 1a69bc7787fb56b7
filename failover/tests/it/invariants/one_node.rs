//! Nothing of a service runs on two machines at once, and nothing runs of a life that was fenced (R20).

use crate::world::World;
use quorate_membership::Incarnation;
use std::collections::BTreeMap;

pub(crate) fn check(world: &World) {
    let mut where_it_runs = BTreeMap::new();
    for real in &world.real {
        let (node, service, _) = real;
        let who = world.runner[real];
        // Leftovers of a life before all lives are there to be found by the probe, not started by a manager.
        if who.incarnation == Incarnation(0) {
            continue;
        }
        let other = where_it_runs.insert(service.clone(), *node);
        assert!(other.is_none_or(|o| o == *node), "{service} runs on nodes {other:?} and {node}");
        let debt = world.view().debts.get(&who);
        let fenced = debt
            .is_some_and(|d| d.items.values().any(|i| i.attachment.resource.name == *service && i.fenced));
        assert!(!fenced, "{service} still runs for {who}, which is fenced");
    }
}
