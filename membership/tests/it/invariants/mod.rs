//! What must hold after every step of a simulated cluster, one statement per file.

mod attachment_owners;
mod debts;
mod durable_votes;
mod gaps;
mod lease_end;
mod lives;
mod majority;
mod no_flapping;
mod one_cut;
mod one_view;
mod requests;
mod version;

pub(crate) use one_cut::OneCut;

use crate::simulation::History;
use quorate_membership::sim::{Cluster, Happening};

/// A statement. It may keep what it needs to compare.
pub(crate) trait Invariant {
    /// Its name, as in a failure.
    fn name(&self) -> &'static str;
    /// Looks after a step that brought `news`; `history` holds them already.
    fn check(&mut self, cluster: &Cluster, history: &History, news: &[Happening]) -> Result<(), String>;
}

/// All of them.
pub(crate) fn all() -> Vec<Box<dyn Invariant>> {
    vec![
        Box::new(one_view::OneView::default()),
        Box::new(gaps::Gaps::default()),
        Box::new(debts::Debts::default()),
        Box::new(requests::Requests::default()),
        Box::new(lease_end::LeaseEnd),
        Box::new(lives::Lives::default()),
        Box::new(attachment_owners::AttachmentOwners::default()),
        Box::new(majority::Majority::default()),
        Box::new(version::Version::default()),
        Box::new(durable_votes::DurableVotes::default()),
        Box::new(no_flapping::NoFlapping::default()),
    ]
}
