//! The proposer: the lowest live voter leads with a promised ballot; a record then costs one round trip and one fsync
//! (R5). A new leader runs phase 1 and finishes what was begun before it proposes anything of its own (R4).

use super::bug::bug;
use super::change;
use super::io::Event;
use super::member::Member;
use super::wire::ControlMsg;
use crate::delta::{Delta, Step};
use crate::proof::{Accept, Ballot, Decision};
use crate::{Epoch, Identity, Instant, NodeId, StateId, View};
use core::time::Duration;
use std::collections::{BTreeMap, BTreeSet};

/// What this node proposes.
#[derive(Clone, Debug, Default)]
pub(super) struct Proposer {
    /// The ballot it uses; none while it does not lead.
    ballot: Option<Ballot>,
    /// Acceptors that promised it. They carry over from record to record, see `acceptor`.
    promises: BTreeMap<NodeId, StateId>,
    /// The highest accepted record that promises showed for the next epoch.
    adopted: Option<(Ballot, View)>,
    proposal: Option<Proposal>,
    /// The highest ballot seen anywhere.
    seen: Ballot,
    /// Not before then: a new ballot after a lost one, or a repetition.
    wait_until: Option<Instant>,
    send_again_at: Option<Instant>,
    /// Whose request was served last, so that all have their turn.
    pub(super) served: Option<NodeId>,
    leads: bool,
}

/// A record on its way.
#[derive(Clone, Debug)]
struct Proposal {
    view: View,
    accepts: BTreeMap<NodeId, Accept>,
}

impl Proposer {
    /// A newer record is installed: what was proposed for its epoch is over.
    pub(super) fn installed(&mut self, epoch: Epoch) {
        if self.proposal.as_ref().is_some_and(|p| p.view.epoch <= epoch) {
            self.proposal = None;
        }
        if self.adopted.as_ref().is_some_and(|(_, v)| v.epoch <= epoch) {
            self.adopted = None;
        }
    }

    pub(super) fn retry_at(&self) -> Option<Instant> {
        self.wait_until.into_iter().chain(self.send_again_at).min()
    }

    /// The highest ballot seen anywhere.
    pub(super) fn seen(&self) -> Ballot {
        self.seen
    }

    fn give_up(&mut self) {
        self.ballot = None;
        self.promises.clear();
        self.adopted = None;
        self.proposal = None;
        self.send_again_at = None;
    }
}

impl Member {
    /// Who leads: the lowest acceptor of the voter set that is a member, lives and itself hears a majority; if none
    /// is a member, the lowest of all. One that hears no majority could decide nothing, however well it is heard.
    pub(super) fn leader_now(&self) -> Option<NodeId> {
        let tip = self.tip.as_ref()?;
        if !self.hears_everybody() {
            return self.leader_told();
        }
        let acceptors = self.live_acceptors();
        let member =
            |id: &Identity| if *id == self.me.identity() { self.is_in(tip) } else { tip.contains(*id) };
        let able: Vec<(NodeId, bool)> = acceptors
            .iter()
            .filter(|(n, _)| self.hears_majority(tip, **n, &acceptors))
            .map(|(n, (id, _))| (*n, member(id)))
            .collect();
        let inside = able.iter().find(|(_, member)| *member);
        let lowest = inside.or_else(|| able.first()).map(|(n, _)| *n)?;
        // A lower one that this node does not hear leads if somebody hears it who takes it for the leader.
        // (What is heard of the node may be a newer life, which is another process: then nobody vouches for the old.)
        let below = tip.voters.voters.keys().filter(|n| **n < lowest && **n != self.me.node);
        let mut unheard = below.filter(|n| self.live_life(**n).is_none());
        let vouched = |n: NodeId| {
            let mut heard =
                acceptors.keys().filter_map(|v| self.live_life(*v)).filter_map(|(_, l)| l.beat.as_ref());
            let Some(who) = tip.identity(n) else { return false };
            heard.any(|b| b.leader == Some(n) && b.hears.contains(&n) && !b.reports.contains_key(&who))
        };
        Some(unheard.find(|n| vouched(**n)).copied().unwrap_or(lowest))
    }

    /// Whether an acceptor says that it hears a majority of the voters, itself included.
    fn hears_majority(
        &self,
        tip: &View,
        node: NodeId,
        acceptors: &BTreeMap<NodeId, (Identity, StateId)>,
    ) -> bool {
        if node == self.me.node {
            return tip.voters.has_majority(acceptors.iter().map(|(n, (_, s))| (n, s)));
        }
        let beat = self.live_life(node).and_then(|(_, l)| l.beat.as_ref());
        let Some(hears) = beat.map(|b| &b.hears) else { return false };
        let heard = tip.voters.voters.iter().filter(|(n, _)| **n == node || hears.contains(n));
        tip.voters.has_majority(heard.map(|(n, v)| (n, &v.state)))
    }

    /// Whom most voters that this node hears take for the leader: an observer does not see enough to tell by itself.
    fn leader_told(&self) -> Option<NodeId> {
        let voters = self.tip.iter().flat_map(|v| v.voters.voters.keys());
        let mut says: BTreeMap<NodeId, usize> = BTreeMap::new();
        for leader in voters.filter_map(|n| self.live_life(*n)).filter_map(|(_, l)| l.leader) {
            *says.entry(leader).or_default() += 1;
        }
        says.into_iter().max_by_key(|(n, count)| (*count, core::cmp::Reverse(*n))).map(|(n, _)| n)
    }

    /// What this node tells others about who leads.
    pub(super) fn leader_said(&self) -> Option<NodeId> {
        if self.hears_everybody() { self.leader_now() } else { None }
    }

    /// Whether this node should propose now.
    fn should_lead(&self) -> bool {
        let Some(tip) = &self.tip else { return false };
        if self.leader_now() != Some(self.me.node) || self.is_behind() {
            return false;
        }
        // A process outside must have listened long enough to know that no member leads.
        self.is_in(tip)
            || (tip.members.is_empty() && !self.needs_word(tip))
            || self.started + self.config.detection <= self.now
    }

    /// Whether nobody would tell this node that its newest record is old, as one from a directory that was put back is: its
    /// own vote decides by it, and there are nodes of the roster that it has not heard since it started (R4).
    fn needs_word(&self, tip: &View) -> bool {
        let alone = tip.voters.voters.get(&self.me.node).is_some_and(|v| {
            v.state == self.disk.state && tip.voters.has_majority([(&self.me.node, &v.state)])
        });
        alone
            && tip.roster.keys().any(|n| *n != self.me.node && !self.peers.lives.keys().any(|w| w.node == *n))
    }

    /// Does the next step of leading, if there is one.
    pub(super) fn lead(&mut self) {
        if self.stopped.is_some() {
            return;
        }
        if !self.should_lead() {
            self.absent_voters.clear();
            self.proposer.leads = false;
            self.proposer.wait_until = None;
            self.proposer.send_again_at = None;
            return;
        }
        self.note_absent_voters();
        if self.proposer.ballot.is_some_and(|b| b < self.disk.promised) {
            self.lost_ballot();
        }
        if self.proposer.wait_until.is_some_and(|at| self.now < at) {
            return;
        }
        self.proposer.wait_until = None;
        let Some(ballot) = self.proposer.ballot else { return self.begin_ballot() };
        if !self.has_promises() {
            return self.repeat(|m| m.send_prepare(ballot));
        }
        if !core::mem::replace(&mut self.proposer.leads, true) {
            let epoch = self.epoch();
            self.event(Event::Leads { epoch });
        }
        if self.proposer.proposal.is_some() {
            return self.repeat(Self::send_accept);
        }
        let adopted = self.proposer.adopted.clone().filter(|_| !bug!(self, ForgetsAccepted));
        let view = match adopted {
            Some((_, view)) => Some(view),
            None => self.plan(),
        };
        if let Some(view) = view {
            assert_eq!(view.epoch, self.epoch().next(), "a proposal is for the next record");
            self.proposer.proposal = Some(Proposal { view, accepts: BTreeMap::new() });
            self.proposer.send_again_at = None;
            self.repeat(Self::send_accept);
        }
    }

    /// Does `step` now, unless it was done less than a retry interval ago.
    fn repeat(&mut self, step: impl FnOnce(&mut Self)) {
        if self.proposer.send_again_at.is_none_or(|at| at <= self.now) {
            self.proposer.send_again_at = Some(self.now + self.config.retry_interval);
            step(self);
        }
    }

    fn majority(&self, who: &BTreeMap<NodeId, StateId>) -> bool {
        let Some(tip) = &self.tip else { return false };
        if bug!(self, MajorityOfTheLiving) {
            let live = self.live_acceptors();
            return live.len() < 2 * who.keys().filter(|n| live.contains_key(n)).count();
        }
        let mut tally = tip.voters.tally(who);
        if bug!(self, TieBreaksBothSides) {
            tally.tie_breaker_here = tally.tie_breaker;
        }
        if bug!(self, LowersWithoutQuorum) {
            let mut left = tip.voters.clone();
            let gone = self.long_absent(tip);
            left.voters.retain(|n, _| !gone.contains(n));
            tally = left.tally(who);
        }
        tally.is_majority()
    }

    fn has_promises(&self) -> bool {
        self.majority(&self.proposer.promises)
    }

    fn begin_ballot(&mut self) {
        let round = self.disk.promised.round.max(self.proposer.seen.round).saturating_add(1);
        let ballot = Ballot { round, node: self.me.node.0 };
        self.proposer.give_up();
        self.proposer.ballot = Some(ballot);
        // First this node's own promise: only when it is durable is the ballot used, so it is never used twice.
        let epoch = self.epoch().next();
        self.proposer.send_again_at = Some(self.now + self.config.retry_interval);
        let me = self.me.node;
        self.send(me, ControlMsg::Prepare { epoch, ballot });
    }

    fn send_prepare(&mut self, ballot: Ballot) {
        let epoch = self.epoch().next();
        let own = self.proposer.promises.get(&self.me.node) == Some(&self.disk.state);
        let Some(tip) = self.tip.clone() else { return };
        for (to, voter) in &tip.voters.voters {
            let asked = if own { *to != self.me.node } else { *to == self.me.node };
            // A node with a new state directory is another acceptor: what the old one promised does not count.
            if asked && self.proposer.promises.get(to) != Some(&voter.state) {
                self.send(*to, ControlMsg::Prepare { epoch, ballot });
            }
        }
    }

    fn send_accept(&mut self) {
        let (Some(ballot), Some(proposal)) = (self.proposer.ballot, &self.proposer.proposal) else { return };
        let Some(tip) = &self.tip else { return };
        let delta = Delta::between(tip, &proposal.view);
        let done: BTreeSet<NodeId> = proposal.accepts.keys().copied().collect();
        let voters: Vec<NodeId> = self.tip.iter().flat_map(|v| v.voters.voters.keys().copied()).collect();
        for to in voters.into_iter().filter(|n| !done.contains(n)) {
            self.send(to, ControlMsg::Accept { ballot, delta: Box::new(delta.clone()) });
        }
    }

    pub(super) fn on_promise(
        &mut self,
        from: NodeId,
        epoch: Epoch,
        ballot: Ballot,
        state: StateId,
        accepted: Option<(Ballot, View)>,
    ) {
        // A promise that arrives late counts too, as long as nothing it showed is about a record not decided here.
        if self.proposer.ballot != Some(ballot) || self.epoch().next() < epoch {
            return;
        }
        if !self.is_voter_state(from, state) {
            return;
        }
        self.proposer.promises.insert(from, state);
        if let Some((b, view)) = accepted
            && view.epoch == self.epoch().next()
            && view.cluster == self.disk.cluster
            && change::fault(&view).is_none()
            && self.proposer.adopted.as_ref().is_none_or(|(best, _)| *best < b)
        {
            self.proposer.adopted = Some((b, view));
        }
        if from == self.me.node && self.proposer.ballot == Some(ballot) {
            self.send_prepare(ballot);
        }
    }

    fn is_voter_state(&self, node: NodeId, state: StateId) -> bool {
        let voter = self.tip.as_ref().and_then(|v| v.voters.voters.get(&node));
        voter.is_some_and(|v| v.state == state)
    }

    pub(super) fn on_accepted(&mut self, from: NodeId, epoch: Epoch, accept: Accept) {
        let known = self.is_voter_state(from, accept.state);
        let ballot = self.proposer.ballot;
        let Some(proposal) = self.proposer.proposal.as_mut() else { return };
        if !known || proposal.view.epoch != epoch || ballot != Some(accept.ballot) {
            return;
        }
        proposal.accepts.insert(from, accept);
        let who = proposal.accepts.iter().map(|(n, a)| (*n, a.state)).collect();
        if self.majority(&who)
            && let Some(Proposal { view, accepts }) = self.proposer.proposal.take()
        {
            self.proposer.send_again_at = None;
            self.decided(Decision { view, accepts });
        }
    }

    pub(super) fn decided(&mut self, decision: Decision) {
        let Some(tip) = self.tip.clone() else { return };
        let step = Step::between(&tip, &decision);
        for node in self.learners(&decision.view) {
            self.send(node, ControlMsg::Learn(Box::new(step.clone())));
        }
        self.install(decision, false);
        self.judge_newcomer();
    }

    /// Who is told of a decision: everybody in a small roster; in a large one whoever was or is in, or wants to be.
    fn learners(&self, view: &View) -> BTreeSet<NodeId> {
        if self.peers.watch.small {
            return self.others();
        }
        let before = self.tip.iter().flat_map(|v| v.members.keys().chain(v.voters.voters.keys()));
        let wanting = self.peers.wanting.iter().map(|w| &w.node);
        let all = before.chain(view.members.keys()).chain(view.voters.voters.keys()).chain(wanting);
        all.copied().filter(|n| *n != self.me.node).collect()
    }

    pub(super) fn on_preempted(&mut self, promised: Ballot) {
        self.proposer.seen = self.proposer.seen.max(promised);
        if self.proposer.ballot.is_some_and(|b| b < promised) {
            self.lost_ballot();
        }
    }

    /// Somebody has a higher ballot: leave it some time before trying a higher one still.
    fn lost_ballot(&mut self) {
        self.proposer.give_up();
        let beat = self.config.heartbeat_interval;
        let wait = self.rng.duration(Duration::ZERO, beat * 2) + self.config.retry_interval;
        self.proposer.wait_until = Some(self.now + wait);
        self.event(Event::Preempted);
    }
}
