//! Every record carries accepts of one ballot by a majority of the votes of the record before it (R4, R9).

use super::Invariant;
use crate::simulation::History;
use quorate_membership::sim::{Cluster, Happening};
use quorate_membership::{Epoch, verify_chain};

#[derive(Default)]
pub(crate) struct Majority(Epoch);

impl Invariant for Majority {
    fn name(&self) -> &'static str {
        "majority"
    }

    fn check(&mut self, _: &Cluster, history: &History, _: &[Happening]) -> Result<(), String> {
        for (epoch, decision) in history.decisions.range(self.0.next()..) {
            self.0 = *epoch;
            let Some(before) = history.views.get(&Epoch(epoch.0 - 1)) else { continue };
            let chain = core::slice::from_ref(decision);
            verify_chain(before.cluster, before.epoch, &before.voters, chain).map_err(|e| e.to_string())?;
        }
        Ok(())
    }
}
