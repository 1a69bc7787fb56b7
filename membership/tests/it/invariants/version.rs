//! The cluster's version rises one by one, only when all members and voters speak the next one, and never falls.

use super::Invariant;
use crate::simulation::History;
use quorate_membership::Epoch;
use quorate_membership::sim::{Cluster, Happening};

#[derive(Default)]
pub(crate) struct Version(Epoch);

impl Invariant for Version {
    fn name(&self) -> &'static str {
        "version"
    }

    fn check(&mut self, cluster: &Cluster, history: &History, _: &[Happening]) -> Result<(), String> {
        for (epoch, view) in history.views.range(self.0.next()..) {
            self.0 = *epoch;
            let Some(before) = history.views.get(&Epoch(epoch.0 - 1)) else { continue };
            if view.version == before.version {
                continue;
            }
            if view.version != before.version + 1 {
                return Err(format!("record {epoch}: version {} after {}", view.version, before.version));
            }
            let nodes = before.members.keys().chain(before.voters.voters.keys());
            if let Some(node) = nodes.into_iter().find(|n| !cluster.program(**n).speaks(view.version)) {
                return Err(format!(
                    "record {epoch} has version {}, node {node} does not speak it",
                    view.version
                ));
            }
        }
        Ok(())
    }
}
