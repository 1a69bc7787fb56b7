//! A node that was removed for its bad paths stays out until it has shown good ones for as long as that took (R3).

use super::Invariant;
use crate::simulation::History;
use quorate_membership::machine::Config;
use quorate_membership::sim::{Cluster, Happening};
use quorate_membership::{Cause, Epoch, Instant, NodeId};
use std::collections::BTreeMap;

/// When a node was removed for its paths, unless it was removed for something else since.
#[derive(Default)]
pub(crate) struct NoFlapping(Epoch, BTreeMap<NodeId, Instant>);

impl Invariant for NoFlapping {
    fn name(&self) -> &'static str {
        "no_flapping"
    }

    fn check(&mut self, _: &Cluster, history: &History, _: &[Happening]) -> Result<(), String> {
        // Clocks of hosts are up to one percent off.
        let grace = Config::lan().mesh_grace * 98 / 100;
        for (epoch, view) in history.views.range(self.0.next()..) {
            self.0 = *epoch;
            let seen = history.seen[epoch];
            match &view.cause {
                Cause::NoMesh(lives) => self.1.extend(lives.iter().map(|w| (w.node, seen))),
                Cause::Joined(lives) => {
                    for who in lives {
                        if let Some(removed) = self.1.remove(&who.node)
                            && seen.since(removed) < grace
                        {
                            let after = seen.since(removed);
                            return Err(format!(
                                "record {epoch}: {who} is back {after:?} after its removal for R3"
                            ));
                        }
                    }
                }
                _ => (),
            }
        }
        Ok(())
    }
}
