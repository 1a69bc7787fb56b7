//! When the first resource of a service is started on a node, nothing of the service runs there: leftovers were stopped.

use crate::world::{Act, World};
use quorate_failover::Action;

pub(crate) fn check(world: &World) {
    for Act { who, service, resource, action, .. } in &world.acts {
        if *action == Action::Start && *resource == 0 {
            let left = world.real.iter().find(|(n, s, _)| *n == who.node && s == service);
            assert!(left.is_none(), "{who} starts {service} while {left:?} runs");
        }
    }
}
