//! All failures of one incident are one record, and nobody else is in it (Rapid, USENIX ATC 2018, section 4.2).

use super::Invariant;
use crate::simulation::History;
use quorate_membership::sim::{Cluster, Happening};
use quorate_membership::{Cause, Epoch, Identity};
use std::collections::BTreeSet;

/// The lives that the incident took, and the newest record before it.
pub(crate) struct OneCut {
    /// All of them.
    pub(crate) incident: BTreeSet<Identity>,
    /// Records up to here are not about it.
    pub(crate) before: Epoch,
}

impl Invariant for OneCut {
    fn name(&self) -> &'static str {
        "one_cut"
    }

    fn check(&mut self, _: &Cluster, history: &History, _: &[Happening]) -> Result<(), String> {
        for (epoch, view) in history.views.range(self.before.next()..) {
            self.before = *epoch;
            if let Cause::Failed(lives) | Cause::NoMesh(lives) | Cause::MissedStage(lives) = &view.cause
                && *lives != self.incident
            {
                return Err(format!(
                    "record {epoch} removes {lives:?}, the incident took {:?}",
                    self.incident
                ));
            }
        }
        Ok(())
    }
}
