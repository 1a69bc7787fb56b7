//! What a shard shows of itself.

use super::Shard;
use super::local::Place;
use crate::dump::{ElsewhereDump, ResourceDump};
use crate::wire::Operation;
use quorate_membership::Instant;

impl Shard {
    /// Adds this shard's resources, locks and what its recovery waits for.
    pub(crate) fn dump(
        &self,
        now: Instant,
        resources: &mut Vec<ResourceDump>,
        elsewhere: &mut Vec<ElsewhereDump>,
        recovery: &mut Vec<String>,
    ) {
        let mastered = self.names.all_mastered().map(|(name, m)| (name, &m.resource));
        for (name, resource) in mastered.chain(self.moves.resources()) {
            if resource.locks().next().is_some() || !resource.assumed().is_empty() {
                resources.push(ResourceDump::of(name, self.config.me, resource, Some(now)));
            }
        }
        for (name, local) in self.names.all_local().filter(|(_, n)| n.place() != Place::Here) {
            let master = match local.place() {
                Place::At { master, .. } => Some(master),
                Place::Frozen => self.moves.giver_of(name),
                _ => None,
            };
            for id in &local.locks {
                let Some(lock) = self.locks.find(&id.0) else { continue };
                let requested = lock.operations.iter().find_map(|u| match u.numbered.operation {
                    Operation::New { mode, .. } | Operation::Convert { mode, .. } => Some(mode),
                    _ => None,
                });
                let (name, granted, owner) = (name.clone(), lock.granted, lock.owner);
                let waits = lock.operations.first().map(|u| now.since(u.at));
                elsewhere.push(ElsewhereDump { name, master, id: id.0, owner, granted, requested, waits });
            }
        }
        if self.is_member() && !self.is_ready {
            let missing: Vec<String> = self
                .view
                .members
                .iter()
                .filter(|m| !self.registered.contains(m))
                .map(ToString::to_string)
                .collect();
            let (map, shard) = (self.map, self.config.index);
            recovery.push(format!("shard {shard}: map {map} waits for the registration of {missing:?}"));
        }
    }
}
