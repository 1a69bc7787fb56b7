//! Two records that follow each other, as their difference: a view of a thousand members changes by a few of them.
//!
//! What is small in a record travels whole; the maps that grow with the cluster travel as what went and what came.

use crate::proof::{Accept, Decision};
use crate::{
    Attachment, ClusterId, Debt, Epoch, Identity, Incarnation, NodeId, RosterEntry, ServerEntry, ServerId,
    View,
};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// What became of a map.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct MapDelta<K: Ord, V> {
    gone: BTreeSet<K>,
    new: BTreeMap<K, V>,
}

impl<K: Ord + Clone, V: Clone + PartialEq> MapDelta<K, V> {
    fn between(before: &BTreeMap<K, V>, after: &BTreeMap<K, V>) -> Self {
        Self {
            gone: before.keys().filter(|k| !after.contains_key(k)).cloned().collect(),
            new: after
                .iter()
                .filter(|(k, v)| before.get(k) != Some(v))
                .map(|(k, v)| (k.clone(), v.clone()))
                .collect(),
        }
    }

    fn apply(&self, map: &mut BTreeMap<K, V>) {
        for key in &self.gone {
            map.remove(key);
        }
        map.extend(self.new.iter().map(|(k, v)| (k.clone(), v.clone())));
    }
}

/// The difference of a record to the one before it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Delta {
    /// The record with its large maps emptied.
    rest: Box<View>,
    members: MapDelta<NodeId, Incarnation>,
    roster: MapDelta<NodeId, RosterEntry>,
    servers: MapDelta<ServerId, ServerEntry>,
    gone: BTreeSet<Attachment>,
    new: BTreeSet<Attachment>,
    debts: MapDelta<Identity, Debt>,
    lives: MapDelta<NodeId, Incarnation>,
    nonces: MapDelta<NodeId, u64>,
}

impl Delta {
    /// The difference of `after` to `before`, the record before it.
    ///
    /// # Panics
    /// If `after` does not follow `before`: a mistake of the caller.
    #[must_use]
    pub fn between(before: &View, after: &View) -> Self {
        assert_eq!(before.epoch.next(), after.epoch, "a difference is to the record before");
        Self {
            members: MapDelta::between(&before.members, &after.members),
            roster: MapDelta::between(&before.roster, &after.roster),
            servers: MapDelta::between(&before.servers, &after.servers),
            gone: before.attachments.difference(&after.attachments).cloned().collect(),
            new: after.attachments.difference(&before.attachments).cloned().collect(),
            debts: MapDelta::between(&before.debts, &after.debts),
            lives: MapDelta::between(&before.lives, &after.lives),
            nonces: MapDelta::between(&before.nonces, &after.nonces),
            rest: Box::new(without_maps(after)),
        }
    }

    /// The epoch of the record that it leads to.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.rest.epoch
    }

    /// The cluster of the record.
    #[must_use]
    pub fn cluster(&self) -> ClusterId {
        self.rest.cluster
    }

    /// The voters of the record that it leads to.
    #[must_use]
    pub fn voters(&self) -> &crate::VoterSet {
        &self.rest.voters
    }

    /// What the record was made for.
    #[must_use]
    pub fn cause(&self) -> &crate::Cause {
        &self.rest.cause
    }

    /// Why it was proposed.
    #[must_use]
    pub fn evidence(&self) -> &crate::Evidence {
        &self.rest.evidence
    }

    /// Whether it is to a record of this cluster and epoch.
    #[must_use]
    pub fn follows(&self, before: &View) -> bool {
        self.cluster() == before.cluster && before.epoch.next() == self.epoch()
    }

    /// The record that follows `before`; `None` if the difference is to another record than that.
    #[must_use]
    pub fn apply(&self, before: &View) -> Option<View> {
        let mut view = before.clone();
        self.apply_to(&mut view).then_some(view)
    }

    /// Makes the record before the record after; false, and nothing done, if the difference is to another one.
    pub(crate) fn apply_to(&self, view: &mut View) -> bool {
        if !self.follows(view) {
            return false;
        }
        let before = core::mem::replace(view, (*self.rest).clone());
        view.members = before.members;
        view.roster = before.roster;
        view.servers = before.servers;
        view.attachments = before.attachments;
        view.debts = before.debts;
        view.lives = before.lives;
        view.nonces = before.nonces;
        self.members.apply(&mut view.members);
        self.roster.apply(&mut view.roster);
        self.servers.apply(&mut view.servers);
        for a in &self.gone {
            view.attachments.remove(a);
        }
        view.attachments.extend(self.new.iter().cloned());
        self.debts.apply(&mut view.debts);
        self.lives.apply(&mut view.lives);
        self.nonces.apply(&mut view.nonces);
        true
    }
}

/// The record with the maps emptied that [`Delta`] carries as differences. A new field of the record needs no line
/// here unless it is large.
fn without_maps(view: &View) -> View {
    let mut rest = view.clone();
    rest.members.clear();
    rest.roster.clear();
    rest.servers.clear();
    rest.attachments.clear();
    rest.debts.clear();
    rest.lives.clear();
    rest.nonces.clear();
    rest
}

/// A decision as the difference to the record before it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// The record.
    pub delta: Delta,
    /// Who accepted it.
    pub accepts: BTreeMap<NodeId, Accept>,
}

impl Step {
    /// The step from `before` to a decision.
    ///
    /// # Panics
    /// If the decision does not follow `before`: a mistake of the caller.
    #[must_use]
    pub fn between(before: &View, decision: &Decision) -> Self {
        Self { delta: Delta::between(before, &decision.view), accepts: decision.accepts.clone() }
    }

    /// The epoch that it leads to.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.delta.epoch()
    }

    /// The decision that follows `before`; `None` if the step is from another record than that.
    #[must_use]
    pub fn apply(&self, before: &View) -> Option<Decision> {
        let view = self.delta.apply(before)?;
        Some(Decision { view, accepts: self.accepts.clone() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::{join, remove};
    use crate::{Cause, ResourceId, ResourceKind, Role, Safety};

    fn thousand() -> View {
        let mut view = View::empty(ClusterId::from_bytes([1; 16]));
        view.epoch = Epoch(7);
        for n in 1..=1_000_u32 {
            let entry = RosterEntry {
                name: format!("node{n}"),
                key: [n as u8; 32],
                role: Role::Observer,
                addresses: vec![],
            };
            view.roster.insert(NodeId(n), entry);
        }
        let lives =
            (1..=1_000).map(|n| (Identity::new(NodeId(n), Incarnation(1)), u64::from(n) << 40)).collect();
        join(&view, &lives)
    }

    fn lockspace_of(who: Identity) -> Attachment {
        Attachment {
            owner: who,
            resource: ResourceId::new(ResourceKind::Lockspace, "a"),
            safety: Safety::Lease,
            servers: BTreeSet::new(),
            journal: None,
            lockspace: None,
            exclusive: false,
        }
    }

    #[test]
    fn the_removal_of_ten_of_a_thousand_is_below_two_kilobytes_and_leads_to_the_same_record() {
        let mut before = thousand();
        let out: BTreeSet<Identity> = before.identities().take(10).collect();
        before.attachments.extend(before.identities().take(20).map(lockspace_of).collect::<Vec<_>>());
        let after = remove(&before, &out, Cause::Failed(out.clone()));
        let delta = Delta::between(&before, &after);
        assert_eq!(delta.apply(&before), Some(after.clone()));
        let size = postcard::to_allocvec(&delta).unwrap().len();
        let whole = postcard::to_allocvec(&after).unwrap().len();
        assert!(size < 2_000 && 50_000 < whole, "{size} of {whole} bytes");
    }

    #[test]
    fn a_difference_to_another_record_gives_nothing() {
        let before = thousand();
        let after = remove(&before, &BTreeSet::new(), Cause::Voters);
        let delta = Delta::between(&before, &after);
        assert_eq!(delta.apply(&after), None);
        let mut other = before.clone();
        other.cluster = ClusterId::from_bytes([2; 16]);
        assert_eq!(delta.apply(&other), None);
    }

    #[test]
    fn what_comes_and_what_changes_is_in_the_difference() {
        let before = thousand();
        let who = Identity::new(NodeId(3), Incarnation(1));
        let out = BTreeSet::from([who]);
        let mut with = before.clone();
        with.attachments.insert(lockspace_of(who));
        let removed = remove(&with, &out, Cause::Failed(out.clone()));
        assert_eq!(Delta::between(&with, &removed).apply(&with), Some(removed.clone()));
        let back = join(&removed, &BTreeMap::from([(Identity::new(NodeId(3), Incarnation(2)), 9)]));
        assert_eq!(Delta::between(&removed, &back).apply(&removed), Some(back));
    }
}
