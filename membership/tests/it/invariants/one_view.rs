//! One view per epoch: no two processes ever install different records of one number (R4).

use super::Invariant;
use crate::simulation::History;
use quorate_membership::sim::{Cluster, Happening};
use quorate_membership::{Epoch, View};
use std::collections::BTreeMap;
use std::sync::Arc;

#[derive(Default)]
pub(crate) struct OneView(BTreeMap<Epoch, Arc<View>>);

impl Invariant for OneView {
    fn name(&self) -> &'static str {
        "one_view"
    }

    fn check(&mut self, _: &Cluster, _: &History, news: &[Happening]) -> Result<(), String> {
        for happening in news {
            if let Happening::Installed { life, view, .. } = happening {
                let first = self.0.entry(view.epoch).or_insert_with(|| Arc::clone(view));
                if first != view {
                    return Err(format!(
                        "{life} installed another record {} than others: {:?} and {:?}",
                        view.epoch, view.cause, first.cause
                    ));
                }
            }
        }
        Ok(())
    }
}
