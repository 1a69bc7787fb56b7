//! A node without a lease starts nothing (R8).

use crate::world::{Act, World};
use quorate_failover::Action;

pub(crate) fn check(world: &World) {
    for Act { who, service, action, quorate, .. } in &world.acts {
        assert!(*action != Action::Start || *quorate, "{who} starts {service} without quorum");
    }
}
