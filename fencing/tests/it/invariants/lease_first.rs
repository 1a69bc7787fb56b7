//! Nothing is proven at storage or lease level before the real end of the victim's lease, and for services of lease safety
//! not before the kill time after it (R8, R9, R20).

use crate::world::{Event, KILL_TIME, World};
use quorate_membership::{Proof, ResourceKind};

pub(crate) fn check(world: &World, event: &Event) -> Result<(), String> {
    let Event::Proves { debtor, resources, proof } = event else { return Ok(()) };
    let lease = world.lease_end[debtor];
    let early = match proof {
        Proof::StorageFence { .. } => world.now < lease,
        Proof::LeaseOver => {
            let has_service = resources.iter().any(|r| r.kind == ResourceKind::Service);
            world.now < if has_service { lease + KILL_TIME } else { lease }
        }
        _ => false,
    };
    if early {
        Err(format!("lease_first: {proof:?} of {debtor} before its lease and kill time are over"))
    } else {
        Ok(())
    }
}
