//! Agents act only for the attached owner that holds the owner lock.

use crate::world::{Act, World};
use quorate_failover::Action;

pub(crate) fn check(world: &World) {
    for Act { who, service, action, quorate, .. } in &world.acts {
        if *action == Action::Start && *quorate {
            assert_eq!(world.attached(service), Some(*who), "{who} starts {service} without the attachment");
            let holder = world.locks.get(service).and_then(|q| q.front());
            assert_eq!(holder, Some(who), "{who} starts {service} without the owner lock");
        }
    }
}
