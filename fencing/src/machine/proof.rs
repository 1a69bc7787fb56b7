//! Decides what is proven of a victim, and asks the cluster to record it.

use super::{Attempt, BugKind, Coordinator, Output};
use crate::How;
use quorate_membership::{
    DebtItem, Epoch, Identity, Instant, Proof, Refusal, Request, RequestError, ResourceId, ResourceKind,
    Safety,
};
use std::collections::BTreeSet;

impl Coordinator {
    pub(super) fn advance_proof(&mut self, now: Instant, who: Identity, out: &mut Vec<Output>) {
        let Some(incident) = self.incidents.get(&who) else { return };
        if incident.proposal.is_some() {
            return;
        }
        let (lease, propose_at, settled_until) =
            (incident.lease, incident.propose_at, incident.settled_until);
        if now < propose_at {
            self.wake_at(propose_at);
            return;
        }
        if now < settled_until {
            self.wake_at(settled_until);
        }
        if let Some(lease) = lease {
            self.note_lease(now, who, lease, out);
        }
        let Some((resources, proof)) = self.proven(now, who) else { return };
        let attempt = self.attempt();
        if let Some(incident) = self.incidents.get_mut(&who) {
            incident.proposal = Some(attempt);
            if settled_until <= now {
                incident.proposed.clear();
            }
            incident.proposed.extend(resources.iter().cloned());
        }
        out.push(Output::Propose { attempt, request: Request::Prove { debtor: who, resources, proof } });
    }

    fn note_lease(&mut self, now: Instant, who: Identity, lease: Instant, out: &mut Vec<Output>) {
        for at in [lease, lease + self.config.timing.kill_time] {
            if now < at {
                self.wake_at(at);
            }
        }
        let Some(incident) = self.incidents.get_mut(&who) else { return };
        if lease <= now && !incident.lease_recorded {
            incident.lease_recorded = true;
            self.record(now, who, How::Lease, Ok(()), out);
        }
    }

    /// The strongest proof there is now, and what it covers.
    fn proven(&self, now: Instant, who: Identity) -> Option<(BTreeSet<ResourceId>, Proof)> {
        let incident = self.incidents.get(&who)?;
        let is_settled = |r: &ResourceId| now < incident.settled_until && incident.proposed.contains(r);
        if let Some(device) = &incident.power.off {
            let open: BTreeSet<_> = incident.open.iter().filter(|r| !is_settled(r)).cloned().collect();
            let proof = Proof::PoweredOff { device: device.clone() };
            return if open.is_empty() { None } else { Some((open, proof)) };
        }
        let is_over = |at: Instant| at <= now || self.bug_is(BugKind::IgnoresLease);
        let lease = incident.lease.or(self.bug_is(BugKind::IgnoresLease).then_some(now))?;
        if !is_over(lease) {
            return None;
        }
        let open = |pick: &dyn Fn(&ResourceId, &DebtItem) -> bool| -> BTreeSet<ResourceId> {
            self.open_items(who)
                .filter(|(r, i)| !is_settled(r) && pick(r, i))
                .map(|(r, _)| r.clone())
                .collect()
        };
        // A service that no storage server can cut off must have been ended by its supervisor (R20).
        let kill_time = self.config.timing.kill_time;
        let is_ended = |r: &ResourceId, i: &DebtItem| {
            let is_cut_off = i.attachment.safety == Safety::Storage && self.has_server(i);
            let waits =
                r.kind == ResourceKind::Service && !is_cut_off && !self.bug_is(BugKind::IgnoresKillTime);
            is_over(if waits { lease + kill_time } else { lease })
        };
        let stored = open(&|r, i| {
            i.attachment.safety == Safety::Storage && self.is_confirmed(i, incident.removed) && is_ended(r, i)
        });
        if !stored.is_empty() {
            let confirmed = self.servers_of(who).into_iter().map(|s| (s, self.confirmed_at(s))).collect();
            return Some((stored, Proof::StorageFence { confirmed }));
        }
        let leased = open(&|r, i| i.attachment.safety == Safety::Lease && is_ended(r, i));
        if leased.is_empty() { None } else { Some((leased, Proof::LeaseOver)) }
    }

    /// Whether an enrolled server is among those of the item.
    fn has_server(&self, item: &DebtItem) -> bool {
        item.attachment.servers.iter().any(|s| self.servers.contains_key(s))
    }

    /// Whether every enrolled server of the item confirmed an epoch without the victim. With no server left, the end of
    /// the lease is what counts (R9), and that is waited for in any case.
    fn is_confirmed(&self, item: &DebtItem, removed: Epoch) -> bool {
        let mut servers = item.attachment.servers.iter().filter_map(|s| self.servers.get(s)).peekable();
        if self.bug_is(BugKind::OneServerIsEnough) && servers.peek().is_some() {
            return servers.any(|s| removed <= s.confirmed);
        }
        servers.all(|s| removed <= s.confirmed)
    }

    pub(super) fn on_proposed(
        &mut self,
        now: Instant,
        attempt: Attempt,
        result: Result<(), RequestError>,
        out: &mut Vec<Output>,
    ) {
        if self.on_confirmation_proposed(now, attempt, &result, out) {
            return;
        }
        let found = self.incidents.iter_mut().find(|(_, i)| i.proposal == Some(attempt));
        let Some((who, incident)) = found else { return };
        let who = *who;
        incident.proposal = None;
        match &result {
            // The view that says so may still be on its way here: the same is not asked again at once, the rest is.
            Ok(()) | Err(RequestError::Refused(Refusal::NoDebt(_))) => {
                incident.propose_failures = 0;
                incident.settled_until = now + self.config.timing.retry_max;
            }
            Err(_) => {
                incident.propose_failures += 1;
                let failures = incident.propose_failures;
                let pause = self.pause(failures);
                if let Some(incident) = self.incidents.get_mut(&who) {
                    incident.propose_at = now + pause;
                }
            }
        }
    }
}
