//! The kept decisions: the oldest whole, the others as differences, the newest whole again.

use super::durable::{CHAIN_KEPT_MAX, CHAIN_KEPT_MIN};
use crate::delta::Step;
use crate::proof::{Accept, Decision};
use crate::{ClusterId, Epoch, NodeId, View};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

/// The newest decisions without gaps. Empty in a directory that never learnt anything.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Encoded", into = "Encoded")]
pub struct Chain {
    /// The oldest.
    first: Option<Whole>,
    /// What followed it, oldest first. Invariant: each follows the one before it.
    steps: VecDeque<Step>,
    /// The newest: `first` with all steps made.
    tip: Option<Whole>,
}

/// A decision that is shared instead of copied.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Whole {
    view: Arc<View>,
    accepts: Arc<BTreeMap<NodeId, Accept>>,
}

/// How a chain is written down.
#[derive(Clone, Serialize, Deserialize)]
struct Encoded {
    first: Option<Decision>,
    steps: VecDeque<Step>,
}

impl From<Decision> for Whole {
    fn from(d: Decision) -> Self {
        Self { view: Arc::new(d.view), accepts: Arc::new(d.accepts) }
    }
}

impl Whole {
    fn decision(&self) -> Decision {
        Decision { view: View::clone(&self.view), accepts: BTreeMap::clone(&self.accepts) }
    }
}

impl From<Chain> for Encoded {
    fn from(chain: Chain) -> Self {
        Self { first: chain.first.as_ref().map(Whole::decision), steps: chain.steps }
    }
}

impl TryFrom<Encoded> for Chain {
    type Error = &'static str;

    fn try_from(encoded: Encoded) -> Result<Self, Self::Error> {
        let first = encoded.first.map(Whole::from);
        let mut chain = Self { first: first.clone(), steps: VecDeque::new(), tip: first };
        let Some(tip) = &chain.tip else {
            return if encoded.steps.is_empty() { Ok(chain) } else { Err("steps without a beginning") };
        };
        let mut view = View::clone(&tip.view);
        for step in &encoded.steps {
            if !step.delta.apply_to(&mut view) {
                return Err("the chain has a gap");
            }
        }
        if let Some(last) = encoded.steps.back() {
            let accepts = last.accepts.clone();
            chain.tip = Some(Whole::from(Decision { view, accepts }));
        }
        chain.steps = encoded.steps;
        Ok(chain)
    }
}

impl Chain {
    /// The newest record.
    #[must_use]
    pub fn tip(&self) -> Option<&Arc<View>> {
        self.tip.as_ref().map(|w| &w.view)
    }

    /// The newest record's epoch; zero if there is none.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.tip().map_or(Epoch(0), |v| v.epoch)
    }

    /// The oldest kept record's epoch; zero if there is none.
    #[must_use]
    pub fn oldest(&self) -> Epoch {
        self.first.as_ref().map_or(Epoch(0), |w| w.view.epoch)
    }

    /// How many decisions are kept.
    #[must_use]
    pub fn len(&self) -> usize {
        usize::from(self.first.is_some()) + self.steps.len()
    }

    /// Whether nothing is kept.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.first.is_none()
    }

    /// Whether every record is of this cluster.
    pub(crate) fn is_of(&self, cluster: ClusterId) -> bool {
        // Steps follow only records of their own cluster.
        self.tip().is_none_or(|v| v.cluster == cluster)
    }

    /// Adds a decision. One that does not follow the newest replaces everything; an older one is without effect.
    pub(crate) fn push(&mut self, decision: Decision) {
        match self.tip() {
            Some(tip) if decision.view.epoch <= tip.epoch => (),
            Some(tip) if decision.view.epoch == tip.epoch.next() && decision.view.cluster == tip.cluster => {
                let step = Step::between(tip, &decision);
                self.steps.push_back(step);
                self.tip = Some(Whole::from(decision));
                self.trim();
            }
            _ => {
                self.steps.clear();
                self.first = Some(Whole::from(decision));
                self.tip = self.first.clone();
            }
        }
    }

    /// Adds a step; without effect unless it follows the newest record.
    pub(crate) fn push_step(&mut self, step: Step) {
        if let Some(tip) = self.tip()
            && let Some(decision) = step.apply(tip)
        {
            self.steps.push_back(step);
            self.tip = Some(Whole::from(decision));
            self.trim();
        }
    }

    fn trim(&mut self) {
        if self.len() <= CHAIN_KEPT_MAX {
            return;
        }
        let Some(first) = &self.first else { return };
        let mut view = View::clone(&first.view);
        let mut accepts = BTreeMap::new();
        while CHAIN_KEPT_MIN < 1 + self.steps.len()
            && let Some(step) = self.steps.pop_front()
        {
            assert!(step.delta.apply_to(&mut view), "each step follows the one before it");
            accepts = step.accepts;
        }
        self.first = Some(Whole::from(Decision { view, accepts }));
    }

    /// Decisions above `epoch` that are kept, oldest first.
    #[must_use]
    pub fn since(&self, epoch: Epoch) -> Vec<Decision> {
        let Some(first) = &self.first else { return Vec::new() };
        if self.epoch() <= epoch {
            return Vec::new();
        }
        let mut all = Vec::new();
        let mut view = View::clone(&first.view);
        if epoch < view.epoch {
            all.push(first.decision());
        }
        for step in &self.steps {
            assert!(step.delta.apply_to(&mut view), "each step follows the one before it");
            if epoch < view.epoch {
                all.push(Decision { view: view.clone(), accepts: step.accepts.clone() });
            }
        }
        all
    }

    /// The decision of one epoch, if it is kept.
    #[must_use]
    pub fn get(&self, epoch: Epoch) -> Option<Decision> {
        let tip = self.tip.as_ref()?;
        if epoch == tip.view.epoch {
            return Some(tip.decision());
        }
        let first = self.first.as_ref()?;
        if epoch < first.view.epoch || tip.view.epoch < epoch {
            return None;
        }
        let mut view = View::clone(&first.view);
        let mut accepts: &BTreeMap<NodeId, Accept> = &first.accepts;
        for step in self.steps.iter().take_while(|s| s.epoch() <= epoch) {
            assert!(step.delta.apply_to(&mut view), "each step follows the one before it");
            accepts = &step.accepts;
        }
        Some(Decision { view, accepts: accepts.clone() })
    }

    /// Who accepted the record of one epoch, if it is kept.
    pub(crate) fn accepts(&self, epoch: Epoch) -> Option<&BTreeMap<NodeId, Accept>> {
        let first = self.first.as_ref()?;
        if epoch == first.view.epoch {
            return Some(&first.accepts);
        }
        self.steps.iter().find(|s| s.epoch() == epoch).map(|s| &s.accepts)
    }

    /// The oldest decision, whole.
    pub(crate) fn beginning(&self) -> Option<Decision> {
        self.first.as_ref().map(Whole::decision)
    }

    /// Steps to records from `epoch` on, oldest first.
    pub(crate) fn steps_from(&self, epoch: Epoch) -> impl Iterator<Item = &Step> {
        self.steps.iter().filter(move |s| epoch <= s.epoch())
    }

    /// The epoch that brought the present voter set, as far as the kept records tell; their first one otherwise.
    pub(crate) fn voters_since(&self) -> Epoch {
        let Some(tip) = self.tip() else { return Epoch(0) };
        let same = self.steps.iter().rev().take_while(|s| *s.delta.voters() == tip.voters);
        let oldest_same = same.last().map_or(tip.epoch, Step::epoch);
        let first = self.first.as_ref().filter(|f| f.view.voters == tip.voters);
        match first {
            Some(first) if oldest_same <= first.view.epoch.next() => first.view.epoch,
            _ => oldest_same,
        }
    }

    /// Takes equal records from a pool, so that a thousand simulated nodes keep one copy of each.
    #[cfg(any(test, feature = "sim"))]
    pub(crate) fn share(&mut self, pool: &mut BTreeMap<Epoch, Arc<View>>) {
        for whole in [&mut self.first, &mut self.tip].into_iter().flatten() {
            let known = pool.entry(whole.view.epoch).or_insert_with(|| Arc::clone(&whole.view));
            if !Arc::ptr_eq(known, &whole.view) && *known == whole.view {
                whole.view = Arc::clone(known);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::change::following;
    use crate::{Cause, VoterSet};

    fn decision(view: View) -> Decision {
        Decision { view, accepts: BTreeMap::new() }
    }

    fn chain(count: u64) -> (Chain, Vec<Decision>) {
        let mut view = View::empty(ClusterId::from_bytes([1; 16]));
        let (mut chain, mut all) = (Chain::default(), Vec::new());
        for n in 1..=count {
            view = following(&view, Cause::Voters);
            view.lives.insert(NodeId(n as u32 % 50), crate::Incarnation(n));
            chain.push(decision(view.clone()));
            all.push(decision(view.clone()));
        }
        (chain, all)
    }

    #[test]
    fn what_was_pushed_comes_out_again_whole() {
        let (chain, all) = chain(100);
        assert_eq!(chain.since(Epoch(0)), all);
        assert_eq!(chain.since(Epoch(97)), all[97..]);
        assert_eq!(chain.since(Epoch(100)), []);
        for d in &all {
            assert_eq!(chain.get(d.view.epoch).as_ref(), Some(d));
        }
        assert_eq!(chain.get(Epoch(101)), None);
        assert_eq!(postcard::from_bytes::<Chain>(&postcard::to_allocvec(&chain).unwrap()).unwrap(), chain);
    }

    #[test]
    fn old_decisions_go_and_the_rest_stays_right() {
        let (chain, all) = chain(CHAIN_KEPT_MAX as u64 + 1);
        assert_eq!(chain.len(), CHAIN_KEPT_MIN);
        assert_eq!(chain.since(Epoch(0)), all[all.len() - CHAIN_KEPT_MIN..]);
        assert_eq!(chain.get(Epoch(1)), None);
    }

    #[test]
    fn a_decision_that_does_not_follow_replaces_the_chain() {
        let (mut chain, all) = chain(10);
        let mut far = all[9].clone();
        far.view.epoch = Epoch(20);
        chain.push(far.clone());
        assert_eq!(chain.since(Epoch(0)), [far]);
        chain.push(all[3].clone());
        assert_eq!(chain.epoch(), Epoch(20));
    }

    #[test]
    fn a_chain_tells_since_when_its_voters_vote() {
        let (mut chain, all) = chain(5);
        assert_eq!(chain.voters_since(), Epoch(1));
        let mut next = following(&all[4].view, Cause::Voters);
        next.voters = VoterSet { tie_breaker: Some(NodeId(1)), ..next.voters };
        chain.push(decision(next.clone()));
        chain.push(decision(following(&next, Cause::Voters)));
        assert_eq!(chain.voters_since(), Epoch(6));
    }
}
