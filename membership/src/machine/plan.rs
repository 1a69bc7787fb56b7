//! What a leader proposes next: failures before stages, stages before joins, joins before voters, then requests.

use super::bug::bug;
use super::change;
use super::decide::decide;
use super::io::{Event, Peer};
use super::member::Member;
use super::mesh::smallest_cover;
use super::wire::{Answer, ControlMsg};
use crate::{
    Cause, Epoch, Evidence, Identity, Instant, NodeId, Proof, Refusal, Request, ResourceId, Role, View,
    VoterSet,
};
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

    /// All that failed in one incident go in one record.
    fn plan_failures(&mut self, tip: &View) -> Option<View> {
        let mut lives = self.failed();
        if bug!(self, CutsAtOnce) {
            lives = lives.into_iter().take(1).collect();
        }
        if lives.is_empty() {
            return None;
        }
        let evidence = self.evidence_of_cut(tip, &lives);
        Some(View { evidence, ..self.removal(tip, &lives, Cause::Failed(lives.clone())) })
    }

    /// The smallest set whose removal leaves a full mesh, after pairs had no path for long (R3).
    fn plan_mesh(&mut self, tip: &View) -> Option<View> {
        let old = self.hopeless_pairs();
        if old.is_empty() {
            return None;
        }
        let votes = |n: NodeId| tip.voters.voters.get(&n).map_or(0, |v| v.votes);
        let mut cover = smallest_cover(&old, votes);
        if bug!(self, RemovesBothEnds) {
            cover = old.iter().flat_map(|(a, b)| [*a, *b]).collect();
        }
        let lives: BTreeSet<Identity> = cover.into_iter().filter_map(|n| tip.identity(n)).collect();
        if lives.is_empty() {
            return None;
        }
        let evidence = self.evidence_of_pairs(tip, &old);
        Some(View { evidence, ..self.removal(tip, &lives, Cause::NoMesh(lives.clone())) })
    }

    fn plan_stages(&mut self, tip: &View) -> Option<View> {
        let late = self.late_participants(tip);
        if late.is_empty() {
            return None;
        }
        self.event(Event::MissedStage(late.clone()));
        let deadline = self.config.stage_deadline;
        let note = format!("no word for {deadline:?} about a recovery stage that waits for it");
        let evidence = Evidence { note, ..self.evidence() };
        Some(View { evidence, ..self.removal(tip, &late, Cause::MissedStage(late.clone())) })
    }

    /// Everybody who may come in: in the roster, newer than every life seen, no older life answering, hearing
    /// whoever is in and heard by them (R3). In a large cluster the voters stand for the members: the edges on the
    /// rings exist only once it is in, and are watched from then on.
    fn plan_joins(&mut self, tip: &View) -> Option<View> {
        if tip.members.is_empty()
            && tip.quorum.wait_for_all
            && self.waits_for_all
            && !self.all_votes_are_here(tip)
        {
            return None;
        }
        let small = self.peers.watch.small;
        let voters = self.live_acceptors();
        let inside: BTreeSet<NodeId> =
            if small { tip.members.keys().copied().collect() } else { voters.keys().copied().collect() };
        let fits = |who: Identity| {
            tip.roster.get(&who.node).is_some_and(|e| e.role != Role::Witness)
                && !tip.members.contains_key(&who.node)
                && (bug!(self, AdmitsOldLives)
                    || tip.lives.get(&who.node).is_none_or(|l| *l < who.incarnation))
        };
        let heard_by = |who: Identity| {
            let members = inside.iter().filter(|n| **n != self.me.node).filter_map(|n| self.live_life(*n));
            members.filter_map(|(_, l)| l.beat.as_ref()).all(|b| !small || b.hears.contains(&who.node))
        };
        let wanting =
            self.peers.wanting.iter().filter_map(|w| self.live_life(w.node)).filter(|(who, life)| {
                let Some(beat) = &life.beat else { return false };
                let hears =
                    inside.iter().chain([&self.me.node]).all(|n| *n == who.node || beat.hears.contains(n));
                beat.wants_in
                    && beat.speaks.speaks(tip.version)
                    && hears
                    && heard_by(*who)
                    && fits(*who)
                    && !self.has_live_elder(*who)
            });
        let mut whole: BTreeMap<Identity, (u64, Instant)> =
            wanting.map(|(who, life)| (who, (life.nonce, life.first_heard))).collect();
        let mine = self.wants_in && {
            let me = self.me.identity();
            tip.roster.get(&me.node).is_some_and(|e| e.role != Role::Witness)
                && !tip.members.contains_key(&me.node)
                && (bug!(self, AdmitsOldLives) || tip.lives.get(&me.node).is_none_or(|l| *l < me.incarnation))
        };
        if mine {
            // It leads, so a majority of the voters and it hear each other.
            whole.insert(self.me.identity(), (self.me.nonce, self.started));
        }
        self.note_whole(&whole.keys().copied().collect::<Vec<_>>());
        // Also the one that leads a cold start stays out for as long as R3 has it, and lets the others in.
        let lives: BTreeMap<Identity, (u64, Instant)> =
            whole.into_iter().filter(|(who, _)| self.may_return(*who)).collect();
        if lives.is_empty() || (!mine && !small && self.more_are_coming(lives.values().map(|(_, at)| *at))) {
            return None;
        }
        let note = format!("{} heard and hearing {} of the members", lives.len(), inside.len());
        let evidence = Evidence { note, ..self.evidence() };
        let lives: BTreeMap<Identity, u64> =
            lives.into_iter().map(|(who, (nonce, _))| (who, nonce)).collect();
        if bug!(self, AdmitsOldLives) {
            let mut old = tip.clone();
            for who in lives.keys() {
                old.lives.remove(&who.node);
            }
            return Some(View { evidence, ..change::join(&old, &lives) });
        }
        Some(View { evidence, ..change::join(tip, &lives) })
    }

    /// Whether newcomers are still turning up, so that one record may take them all: until none has come for a
    /// heartbeat interval, but no longer than four.
    fn more_are_coming(&self, heard: impl Iterator<Item = Instant> + Clone) -> bool {
        let interval = self.config.heartbeat_interval;
        let fresh = heard.clone().max().is_some_and(|at| self.now < at + interval);
        fresh && heard.min().is_some_and(|at| self.now < at + interval * 4)
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
        let voters = set.voters.keys().filter_map(|n| self.live_life(*n));
        let mut have: BTreeMap<NodeId, crate::StateId> = voters
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
        next.evidence = Evidence { note: format!("{} asked: {request}", by.identity()), ..self.evidence() };
        next.evidence.trim();
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
