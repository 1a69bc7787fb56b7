//! A storage fence is proven only when every enrolled server of the item serves by an epoch without the victim (R9).

use crate::world::{Event, World};
use quorate_membership::Proof;

pub(crate) fn check(world: &World, event: &Event) -> Result<(), String> {
    let Event::Proves { debtor, resources, proof: Proof::StorageFence { .. } } = event else { return Ok(()) };
    let Some(debt) = world.newest().debts.get(debtor) else { return Ok(()) };
    for resource in resources {
        let Some(item) = debt.items.get(resource) else { continue };
        for server in &item.attachment.servers {
            if world.servers[server].epoch < debt.removed {
                return Err(format!(
                    "every_server: {resource} of {debtor} is proven, {server} has not confirmed"
                ));
            }
        }
    }
    Ok(())
}
