//! A resource is started only while everything before it in the start order runs or has just died by itself, and stopped
//! only when everything after it is down.

use crate::world::{Act, World};
use quorate_failover::Action;

pub(crate) fn check(world: &World) {
    for Act { who, service, resource, action, .. } in &world.acts {
        if *action == Action::Start {
            let missing =
                (0..*resource).find(|below| !world.started.contains(&(*who, service.clone(), *below)));
            assert_eq!(missing, None, "{who} starts resource {resource} of {service} before an earlier one");
        }
        if *action == Action::Stop {
            let above = world.real.iter().find(|(n, s, r)| *n == who.node && s == service && resource < r);
            assert!(above.is_none(), "{who} stops resource {resource} of {service} while {above:?} runs");
        }
    }
}
