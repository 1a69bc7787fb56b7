//! A process installs records in order and without gaps; only one that is no member yet may begin later (R4).

use super::Invariant;
use crate::simulation::History;
use quorate_membership::sim::{Cluster, Happening};
use quorate_membership::{Epoch, Identity};
use std::collections::BTreeMap;

#[derive(Default)]
pub(crate) struct Gaps(BTreeMap<(Identity, u64), (Epoch, bool)>);

impl Invariant for Gaps {
    fn name(&self) -> &'static str {
        "gaps"
    }

    fn check(&mut self, _: &Cluster, _: &History, news: &[Happening]) -> Result<(), String> {
        for happening in news {
            let Happening::Installed { life, process, view, jumped, .. } = happening else { continue };
            let before = self.0.insert((*life, *process), (view.epoch, view.contains(*life)));
            match before {
                Some((epoch, _)) if view.epoch <= epoch => {
                    return Err(format!("{life} went from record {epoch} back to {}", view.epoch));
                }
                Some((epoch, member)) if view.epoch != epoch.next() && (member || !jumped) => {
                    return Err(format!("{life} went from record {epoch} to {}", view.epoch));
                }
                _ => (),
            }
        }
        Ok(())
    }
}
