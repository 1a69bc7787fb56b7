//! A vote that counts is on the voter's disk (R4).

use super::Invariant;
use crate::simulation::History;
use quorate_membership::Epoch;
use quorate_membership::sim::{Cluster, Happening};

#[derive(Default)]
pub(crate) struct DurableVotes(Epoch);

impl Invariant for DurableVotes {
    fn name(&self) -> &'static str {
        "durable_votes"
    }

    fn check(&mut self, cluster: &Cluster, history: &History, _: &[Happening]) -> Result<(), String> {
        for (epoch, decision) in history.decisions.range(self.0.next()..) {
            self.0 = *epoch;
            for (node, accept) in &decision.accepts {
                let disk = cluster.nodes().find(|(n, _)| n == node).map(|(_, h)| &h.disk);
                if let Some(disk) = disk.filter(|d| d.state == accept.state)
                    && disk.promised < accept.ballot
                {
                    return Err(format!("node {node} voted for record {epoch} and has it not on disk"));
                }
            }
        }
        Ok(())
    }
}
