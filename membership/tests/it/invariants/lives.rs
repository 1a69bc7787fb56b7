//! No life is used twice: a join is always newer than every life of the node before it (R1).

use super::Invariant;
use crate::simulation::History;
use quorate_membership::sim::{Cluster, Happening};
use quorate_membership::{Epoch, Incarnation, NodeId};
use std::collections::BTreeMap;

#[derive(Default)]
pub(crate) struct Lives {
    seen: Epoch,
    newest: BTreeMap<NodeId, (Incarnation, u64)>,
}

impl Invariant for Lives {
    fn name(&self) -> &'static str {
        "lives"
    }

    fn check(&mut self, _: &Cluster, history: &History, _: &[Happening]) -> Result<(), String> {
        for (epoch, view) in history.views.range(self.seen.next()..) {
            let before = history.views.get(&self.seen).filter(|v| v.epoch.next() == *epoch);
            self.seen = *epoch;
            for (node, life) in &view.members {
                let nonce = view.nonces[node];
                let stayed = before.is_some_and(|b| b.members.get(node) == Some(life));
                match self.newest.insert(*node, (*life, nonce)) {
                    Some((old, _)) if !stayed && *life <= old => {
                        return Err(format!("node {node} came in as life {life}, life {old} was before"));
                    }
                    Some((old, was)) if old == *life && was != nonce => {
                        return Err(format!("two processes are life {life} of node {node}"));
                    }
                    _ => (),
                }
            }
        }
        Ok(())
    }
}
