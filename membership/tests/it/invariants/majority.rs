//! Every record carries accepts of one ballot by a majority of the votes of the record before it (R4, R9), but for those
//! that say that a person forced them, and a person did.

use super::Invariant;
use crate::simulation::History;
use quorate_membership::sim::{Cluster, Happening};
use quorate_membership::{Cause, Epoch, verify_chain_with};

#[derive(Default)]
pub(crate) struct Majority(Epoch, usize);

impl Invariant for Majority {
    fn name(&self) -> &'static str {
        "majority"
    }

    fn check(&mut self, _: &Cluster, history: &History, _: &[Happening]) -> Result<(), String> {
        for (epoch, decision) in history.decisions.range(self.0.next()..) {
            self.0 = *epoch;
            let Some(before) = history.views.get(&Epoch(epoch.0 - 1)) else { continue };
            let chain = core::slice::from_ref(decision);
            let is_forced = matches!(decision.view.cause, Cause::Forced { .. });
            self.1 += usize::from(is_forced);
            if history.forces < self.1 {
                return Err(format!("record {epoch} says that a person forced it, and nobody did"));
            }
            let forced = is_forced.then_some(*epoch);
            verify_chain_with(before.cluster, before.epoch, &before.voters, chain, forced)
                .map_err(|e| e.to_string())?;
        }
        Ok(())
    }
}
