//! Who is attached is a member, and who is in debt is not (R6).

use super::Invariant;
use crate::simulation::History;
use quorate_membership::Epoch;
use quorate_membership::sim::{Cluster, Happening};

#[derive(Default)]
pub(crate) struct AttachmentOwners(Epoch);

impl Invariant for AttachmentOwners {
    fn name(&self) -> &'static str {
        "attachment_owners"
    }

    fn check(&mut self, _: &Cluster, history: &History, _: &[Happening]) -> Result<(), String> {
        for (epoch, view) in history.views.range(self.0.next()..) {
            self.0 = *epoch;
            if let Some(a) = view.attachments.iter().find(|a| !view.contains(a.owner)) {
                return Err(format!("record {epoch}: {} of {}, no member", a.resource, a.owner));
            }
            if let Some(who) = view.debts.keys().find(|w| view.contains(**w)) {
                return Err(format!("record {epoch}: {who} is a member and in debt"));
            }
        }
        Ok(())
    }
}
