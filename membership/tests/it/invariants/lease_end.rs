//! No process acts under a lease that anybody takes for over, and no stage is "fenced" by it before (R8, R9).

use super::Invariant;
use crate::simulation::History;
use quorate_membership::sim::{Cluster, Happening};

pub(crate) struct LeaseEnd;

impl Invariant for LeaseEnd {
    fn name(&self) -> &'static str {
        "lease_end"
    }

    fn check(&mut self, cluster: &Cluster, history: &History, _: &[Happening]) -> Result<(), String> {
        for (node, host) in cluster.nodes() {
            let Some(member) = host.member().filter(|_| cluster.is_quorate(node)) else { continue };
            let me = member.me();
            if let Some((other, _)) = cluster.nodes().find(|(n, _)| cluster.lease_is_over(*n, me)) {
                return Err(format!("{me} has a lease that is over for node {other}"));
            }
            let newest = history.views.last_key_value().map(|(_, v)| v);
            let debt = newest.and_then(|v| v.debts.get(&me));
            if let Some((resource, _)) = debt.and_then(|d| d.items.iter().find(|(_, i)| i.fenced)) {
                return Err(format!("{resource} of {me} is fenced while {me} has a lease"));
            }
        }
        Ok(())
    }
}
