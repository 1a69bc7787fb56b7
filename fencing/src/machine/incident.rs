//! What is known of one removed life, and how views and persons change it.

use super::power::Power;
use super::{Attempt, BugKind, Coordinator, Output};
use crate::{ConfirmError, How};
use core::time::Duration;
use quorate_membership::{
    Cause, DebtItem, Epoch, Identity, Instant, NodeId, Proof, Request, RequestError, ResourceId, ServerId,
    View,
};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// One removed life with something that is not fenced yet.
#[derive(Debug)]
pub(super) struct Incident {
    /// When this node learned of it.
    pub(super) since: Instant,
    /// The first epoch without it.
    pub(super) removed: Epoch,
    /// Items that are not fenced. Invariant: not empty.
    pub(super) open: BTreeSet<ResourceId>,
    /// When its lease is over, once known.
    pub(super) lease: Option<Instant>,
    pub(super) lease_asked: bool,
    pub(super) ask_lease_at: Instant,
    /// Whether the end of the lease is in the history.
    pub(super) lease_recorded: bool,
    pub(super) power: Power,
    /// The proof under way.
    pub(super) proposal: Option<Attempt>,
    /// No proof is asked for before this.
    pub(super) propose_at: Instant,
    pub(super) propose_failures: u32,
    /// What the proofs since `settled_until` was last over were about.
    pub(super) proposed: BTreeSet<ResourceId>,
    /// It was decided, so it is not asked for again before this.
    pub(super) settled_until: Instant,
}

impl Incident {
    fn new(now: Instant, removed: Epoch) -> Self {
        Self {
            since: now,
            removed,
            open: BTreeSet::new(),
            lease: None,
            lease_asked: false,
            ask_lease_at: now,
            lease_recorded: false,
            power: Power::new(now),
            proposal: None,
            propose_at: now,
            propose_failures: 0,
            proposed: BTreeSet::new(),
            settled_until: now,
        }
    }

    pub(super) fn on_lease(&mut self, now: Instant, over_at: Option<Instant>, again: Duration) {
        self.lease_asked = false;
        self.lease = over_at;
        self.ask_lease_at = now + again;
    }
}

/// A person's word on its way through the cluster.
#[derive(Debug)]
pub(super) struct Confirmation {
    /// Proposals whose outcome is not known yet, with the life each is about.
    pub(super) pending: BTreeMap<Attempt, Identity>,
    pub(super) by: String,
    pub(super) failure: Option<RequestError>,
}

impl Coordinator {
    pub(super) fn on_view(&mut self, now: Instant, view: Arc<View>, out: &mut Vec<Output>) {
        if self.view.as_ref().is_some_and(|v| view.epoch <= v.epoch) {
            return;
        }
        let same_admission = self.view.as_ref().is_some_and(|old| {
            old.members == view.members && old.voters == view.voters && old.servers == view.servers
        });
        if !same_admission {
            self.admission = view.epoch;
        }
        self.sync_servers(now, &view);
        self.close_incidents(now, &view, out);
        for (who, debt) in &view.debts {
            let open: BTreeSet<ResourceId> =
                debt.items.iter().filter(|(_, i)| !i.fenced).map(|(r, _)| r.clone()).collect();
            if !open.is_empty() {
                let incident = self.incidents.entry(*who).or_insert_with(|| Incident::new(now, debt.removed));
                incident.open = open;
            }
        }
        if self.bug_is(BugKind::ForgetsPowerOff) {
            for incident in self.incidents.values_mut() {
                incident.power = Power::new(now);
            }
        }
        self.view = Some(view);
    }

    /// Records what `view` says is fenced, and forgets incidents with nothing left.
    fn close_incidents(&mut self, now: Instant, view: &View, out: &mut Vec<Output>) {
        let victims: Vec<Identity> = self.incidents.keys().copied().collect();
        for who in victims {
            let Some(incident) = self.incidents.get(&who) else { continue };
            let still_open =
                |r: &ResourceId| view.debts.get(&who).and_then(|d| d.items.get(r)).is_some_and(|i| !i.fenced);
            let (left, done): (BTreeSet<_>, Vec<_>) = {
                let (left, done): (Vec<_>, Vec<_>) = incident.open.iter().cloned().partition(still_open);
                (left.into_iter().collect(), done)
            };
            if !done.is_empty() {
                let by = match view.cause {
                    Cause::Request { by, .. } => Some(by),
                    _ => None,
                };
                let how = How::Decided { epoch: view.epoch, resources: done };
                self.record_of(now, who, by, how, Ok(()), out);
            }
            if left.is_empty() {
                self.incidents.remove(&who);
            } else if let Some(incident) = self.incidents.get_mut(&who) {
                incident.open = left;
            }
        }
    }

    pub(super) fn on_confirm(
        &mut self,
        now: Instant,
        question: u64,
        node: NodeId,
        by: String,
        out: &mut Vec<Output>,
    ) {
        let quorate = self.quorate && self.view.as_ref().is_some_and(|v| v.contains(self.me));
        if !quorate {
            out.push(Output::Confirmed { question, result: Err(ConfirmError::NotQuorate) });
            return;
        }
        let victims: Vec<Identity> = self.incidents.keys().copied().filter(|w| w.node == node).collect();
        if victims.is_empty() {
            out.push(Output::Confirmed { question, result: Err(ConfirmError::NothingOpen(node)) });
            return;
        }
        let mut pending = BTreeMap::new();
        for debtor in victims {
            let attempt = self.attempt();
            pending.insert(attempt, debtor);
            let resources = self.incidents.get(&debtor).map(|i| i.open.clone()).unwrap_or_default();
            let request = Request::Prove { debtor, resources, proof: Proof::Confirmed { by: by.clone() } };
            self.record(now, debtor, How::Person { by: by.clone() }, Ok(()), out);
            out.push(Output::Propose { attempt, request });
        }
        self.confirmations.insert(question, Confirmation { pending, by, failure: None });
    }

    /// Whether `attempt` belonged to a person's word.
    pub(super) fn on_confirmation_proposed(
        &mut self,
        now: Instant,
        attempt: Attempt,
        result: &Result<(), RequestError>,
        out: &mut Vec<Output>,
    ) -> bool {
        let found = self.confirmations.iter_mut().find_map(|(question, c)| {
            let who = c.pending.remove(&attempt)?;
            if let Err(error) = result {
                c.failure = Some(error.clone());
            }
            Some((*question, who, c.by.clone(), c.pending.is_empty()))
        });
        let Some((question, who, by, is_last)) = found else { return false };
        if let Err(error) = result {
            self.record(now, who, How::Person { by }, Err(error.to_string()), out);
        }
        if is_last && let Some(confirmation) = self.confirmations.remove(&question) {
            let result = confirmation.failure.map_or(Ok(()), |e| Err(e.into()));
            out.push(Output::Confirmed { question, result });
        }
        true
    }

    /// The items of `who` that are not fenced, as the view has them.
    pub(super) fn open_items(&self, who: Identity) -> impl Iterator<Item = (&ResourceId, &DebtItem)> {
        let debt = self.view.as_ref().and_then(|v| v.debts.get(&who));
        debt.into_iter().flat_map(|d| d.items.iter()).filter(|(_, i)| !i.fenced)
    }

    /// The enrolled storage servers that must confirm before `who` is fenced at storage level. A retired server is not
    /// among them: its exports are unusable until it is enrolled afresh (R9).
    pub(super) fn servers_of(&self, who: Identity) -> BTreeSet<ServerId> {
        self.open_items(who)
            .filter(|(_, i)| i.attachment.safety == quorate_membership::Safety::Storage)
            .flat_map(|(_, i)| i.attachment.servers.iter().copied())
            .filter(|s| self.servers.contains_key(s))
            .collect()
    }
}
