//! What a leader proposes next: failures before stages, stages before joins, joins before voters, then requests.

use super::bug::bug;
use super::change;
use super::decide::decide;
use super::io::{Event, Peer};
use super::member::Member;
use super::peers::smallest_cover;
use super::wire::{Answer, ControlMsg};
use crate::{Cause, Epoch, Identity, NodeId, Proof, Refusal, Request, ResourceId, Role, View, VoterSet};
use std::collections::{BTreeMap, BTreeSet};

impl Member {
    /// The next record, if anything is to be changed.
    pub(super) fn plan(&mut self) -> Option<View> {
        let tip = self.tip.clone()?;
        let view = self
            .plan_failures(&tip)
            .or_else(|| self.plan_mesh(&tip))
            .or_else(|| self.plan_stages(&tip))
            .or_else(|| self.plan_joins(&tip))
            .or_else(|| self.plan_witnesses(&tip))
            .or_else(|| self.plan_voters(&tip))
            .or_else(|| self.plan_version(&tip))
            .or_else(|| self.plan_request(&tip))?;
        assert_eq!(change::fault(&view), None, "a record that must not be proposed");
        Some(view)
    }

    fn removal(&self, tip: &View, lives: &BTreeSet<Identity>, cause: Cause) -> View {
        let mut view = change::remove(tip, lives, cause);
        if bug!(self, DropsDebts) {
            view.debts = tip.debts.clone();
        }
        if bug!(self, ColdStartForgets) && view.members.is_empty() {
            view.debts.clear();
        }
        view
    }

    /// All that are suspect go in one record.
    fn plan_failures(&mut self, tip: &View) -> Option<View> {
        let lives = self.suspects().clone();
        if lives.is_empty() {
            return None;
        }
        Some(self.removal(tip, &lives, Cause::Failed(lives.clone())))
    }

    /// The smallest set whose removal leaves a full mesh, after pairs had no path for long (R3).
    fn plan_mesh(&mut self, tip: &View) -> Option<View> {
        let (now, grace) = (self.now, self.config.mesh_grace);
        let old: BTreeSet<(NodeId, NodeId)> =
            self.peers.no_path.iter().filter(|(_, since)| **since + grace <= now).map(|(p, _)| *p).collect();
        if old.is_empty() {
            return None;
        }
        let votes = |n: NodeId| tip.voters.voters.get(&n).map_or(0, |v| v.votes);
        let cover = smallest_cover(&old, votes);
        let lives: BTreeSet<Identity> = cover.into_iter().filter_map(|n| tip.identity(n)).collect();
        if lives.is_empty() {
            return None;
        }
        Some(self.removal(tip, &lives, Cause::NoMesh(lives.clone())))
    }

    fn plan_stages(&mut self, tip: &View) -> Option<View> {
        let late = self.late_participants(tip);
        if late.is_empty() {
            return None;
        }
        self.event(Event::MissedStage(late.clone()));
        Some(self.removal(tip, &late, Cause::MissedStage(late.clone())))
    }

    /// Everybody who may come in: in the roster, newer than every life seen, no older life answering, hearing
    /// whoever is in (R3).
    fn plan_joins(&mut self, tip: &View) -> Option<View> {
        let inside: BTreeSet<NodeId> = tip.members.keys().copied().collect();
        if inside.is_empty() && tip.quorum.wait_for_all && self.waits_for_all && !self.all_votes_are_here(tip)
        {
            return None;
        }
        let fits = |who: Identity| {
            tip.roster.get(&who.node).is_some_and(|e| e.role != Role::Witness)
                && !inside.contains(&who.node)
                && (bug!(self, AdmitsOldLives)
                    || tip.lives.get(&who.node).is_none_or(|l| *l < who.incarnation))
        };
        let mut lives: BTreeMap<Identity, u64> = self
            .live_lives()
            .filter(|(who, life)| {
                let Some(beat) = &life.beat else { return false };
                let hears_all = inside.iter().chain([&self.me.node]).all(|n| beat.hears.contains(n));
                beat.wants_in
                    && beat.speaks.speaks(tip.version)
                    && hears_all
                    && fits(*who)
                    && !self.has_live_elder(*who)
            })
            .map(|(who, life)| (who, life.nonce))
            .collect();
        if self.wants_in && fits(self.me.identity()) {
            lives.insert(self.me.identity(), self.me.nonce);
        }
        if lives.is_empty() {
            return None;
        }
        if bug!(self, AdmitsOldLives) {
            let mut old = tip.clone();
            for who in lives.keys() {
                old.lives.remove(&who.node);
            }
            return Some(change::join(&old, &lives));
        }
        Some(change::join(tip, &lives))
    }

    /// The state directory that a member announced.
    pub(super) fn state_of_member(&self, tip: &View, node: NodeId) -> Option<crate::StateId> {
        let who = tip.identity(node)?;
        if who == self.me.identity() {
            return Some(self.disk.state);
        }
        self.peers.lives.get(&who).and_then(|l| l.beat.as_ref()).map(|b| b.state)
    }

    /// Whether a majority of `set` has stored the newest record (R4).
    pub(super) fn is_stored_by(&self, tip: &View, set: &VoterSet) -> bool {
        let mut have: BTreeMap<NodeId, crate::StateId> = self
            .live_lives()
            .filter_map(|(who, l)| l.beat.as_ref().map(|b| (who.node, b)))
            .filter(|(_, b)| tip.epoch <= b.stored)
            .map(|(n, b)| (n, b.state))
            .collect();
        if tip.epoch <= self.writes.stored {
            have.insert(self.me.node, self.disk.state);
        }
        set.has_majority(&have)
    }

    /// The next member's request in turn; refusals are answered on the way.
    fn plan_request(&mut self, tip: &View) -> Option<View> {
        let late = bug!(self, TakesLateRequests);
        self.requests.inbox.retain(|_, f| tip.epoch <= f.at || late);
        while let Some((by, forward)) = self.requests.take_next(self.proposer.served, tip.epoch, late) {
            self.proposer.served = Some(by.node);
            let answer = match self.try_request(tip, by, forward.number, &forward.request) {
                Ok(view) => return Some(view),
                Err(answer) => answer,
            };
            let (number, at) = (forward.number, forward.at);
            self.send(by.node, ControlMsg::Answer { number, at, answer });
        }
        None
    }

    fn try_request(&self, tip: &View, by: Peer, number: u64, request: &Request) -> Result<View, Answer> {
        let next = decide(tip, by.identity(), number, request).map_err(Answer::Refused)?;
        let Some(mut next) = next else { return Err(Answer::Unchanged) };
        if let Some(refusal) = self.not_now(tip, &next, request) {
            return Err(Answer::NotNow(refusal));
        }
        if bug!(self, DropsDebts) {
            next.debts.retain(|who, _| tip.debts.contains_key(who));
        }
        Ok(next)
    }

    /// What the record does not tell: clocks, and what others have stored.
    fn not_now(&self, tip: &View, next: &View, request: &Request) -> Option<Refusal> {
        if let Request::Prove { debtor, proof: Proof::LeaseOver | Proof::StorageFence { .. }, .. } = request
            && !bug!(self, FencesEarly)
            && self.lease_over_at(*debtor).is_none_or(|at| self.now < at)
        {
            let resource = tip.debts.get(debtor).and_then(|d| d.items.keys().next().cloned());
            let resource = resource.unwrap_or(ResourceId::new(crate::ResourceKind::Lockspace, ""));
            return Some(Refusal::Unproven { resource, reason: "its lease is not over yet".into() });
        }
        if let Request::SetVoters(set) = request {
            for (node, voter) in &set.voters {
                let announced = self.state_of_member(tip, *node);
                let stays = tip.voters.voters.get(node).is_some_and(|v| v.state == voter.state);
                if let Some(announced) = announced.filter(|a| *a != voter.state && !stays) {
                    return Some(Refusal::OtherState { node: *node, announced, asked: voter.state });
                }
            }
        }
        if next.voters != tip.voters && !self.is_stored_by(tip, &next.voters) {
            return Some(Refusal::Voters("a majority of it has not stored the newest record yet".into()));
        }
        None
    }

    pub(super) fn on_forward(&mut self, from: Peer, number: u64, at: Epoch, request: Request) {
        self.requests.take_in(from, number, at, request);
    }
}
