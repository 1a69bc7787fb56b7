//! Leases (R8): this life's own, from acknowledgements of its heartbeats, and the end of those of removed lives.

use super::bug::bug;
use super::io::{Output, Peer};
use super::member::Member;
use super::wire::{ControlMsg, Heartbeat, HeartbeatAck};
use crate::proof::{Accept, Decision};
use crate::{Epoch, Identity, Instant, NodeId, StateId};
use core::time::Duration;
use std::collections::{BTreeMap, BTreeSet};

/// How many members one heartbeat reports. More are reported once the first are removed.
const REPORTS_MAX: usize = 256;
/// How many ends of leases are remembered for lives that owe nothing any more.
const OVER_KEPT_MAX: usize = 256;

/// Acknowledgements, given and got.
#[derive(Clone, Debug, Default)]
pub(super) struct Acks {
    /// By node: its state directory, and when the newest heartbeat that it acknowledged was sent.
    got: BTreeMap<NodeId, (StateId, Instant)>,
    /// By life: when this acceptor last acknowledged a heartbeat of it.
    pub(super) given: BTreeMap<Identity, Instant>,
}

impl Member {
    /// Sends heartbeats when they are due; between two of them to the voters alone if there is something to tell.
    pub(super) fn heartbeat(&mut self) {
        let due = self.heartbeat_at <= self.now;
        let early = self.beat_soon && self.early_beat_at <= self.now;
        if self.stopped.is_some() || !(due || early) {
            return;
        }
        if due {
            self.heartbeat_at = self.now + self.config.heartbeat_interval;
        }
        self.beat_soon = false;
        self.early_beat_at = self.now + self.config.retry_interval / 2;
        let hears = self.heard_nodes();
        let hears = match &self.tip {
            // A thousand names in every heartbeat would be a million a round; the voters are what it depends on.
            Some(tip) if !self.peers.watch.small => {
                hears.into_iter().filter(|n| tip.voters.voters.contains_key(n)).collect()
            }
            _ => hears,
        };
        let beat = Heartbeat {
            sent_ns: self.now.0,
            epoch: self.epoch(),
            stored: self.writes.stored,
            state: self.disk.state,
            wants_in: self.wants_in && !self.is_member() && !self.is_witness(),
            hears,
            reports: self.peers.silent.iter().take(REPORTS_MAX).map(|(w, r)| (*w, *r)).collect(),
            leader: self.leader_said(),
            waits: self.waits,
            speaks: self.config.speaks,
            version: self.version(),
        };
        for to in self.beaten(due) {
            self.out.push(Output::Send { to, life: None, msg: ControlMsg::Heartbeat(beat.clone()) });
        }
        if due && self.may_lease(self.me, self.epoch()) {
            self.acks.given.insert(self.me.identity(), self.now);
            self.acks.got.insert(self.me.node, (self.disk.state, self.now));
        }
    }

    /// Who gets a heartbeat: everybody in a small roster. In a large one the voters, whose acknowledgements are the
    /// lease (R8), and whoever observes this member; between two heartbeats the voters only.
    fn beaten(&mut self, due: bool) -> BTreeSet<NodeId> {
        let Some(tip) = self.tip.clone() else { return self.others() };
        let voters = tip.voters.voters.keys().copied();
        let mut to: BTreeSet<NodeId> = match (self.peers.watch.small, due) {
            (true, true) => return self.others(),
            (_, false) => voters.collect(),
            (false, true) => voters.chain(self.peers.watch.observers.iter().copied()).collect(),
        };
        if !self.is_in(&tip) {
            // Whoever is outside may know old voters only: it also tries those it was told of, and one of the rest.
            to.extend(&self.contacts);
            let roster = tip.roster.len() as u64;
            let one = usize::try_from(self.rng.below(roster.max(1))).unwrap_or(0);
            to.extend(tip.roster.keys().nth(one));
        }
        to.remove(&self.me.node);
        to
    }

    pub(super) fn on_heartbeat(&mut self, from: Peer, beat: &Heartbeat) {
        self.heard_beat(from, beat);
        let leases = self.may_lease(from, beat.epoch);
        if leases {
            self.acks.given.insert(from.identity(), self.now);
        }
        let member = self.tip.as_ref().is_some_and(|v| v.contains(from.identity()));
        if member && !self.hears_everybody() && self.epoch() <= beat.epoch {
            // An observer on a ring only listens: nothing depends on its answer.
            return;
        }
        let (epoch, state, leader) = (self.epoch(), self.disk.state, self.leader_said());
        let ack = HeartbeatAck { sent_ns: beat.sent_ns, epoch, state, leader, leases };
        self.send(from.node, ControlMsg::HeartbeatAck(ack));
    }

    pub(super) fn on_heartbeat_ack(&mut self, from: Peer, ack: &HeartbeatAck) {
        self.heard_epoch(from, ack.epoch);
        self.heard_leader(from, ack.leader);
        let sent = Instant(ack.sent_ns);
        // An answer to an earlier process on this host, or to nothing that was ever sent, counts for nothing.
        if !ack.leases || sent < self.started || self.now < sent {
            return;
        }
        let counted = if bug!(self, LeaseFromArrival) { self.now } else { sent };
        let got = self.acks.got.entry(from.node).or_insert((ack.state, counted));
        *got = if got.0 == ack.state { (ack.state, got.1.max(counted)) } else { (ack.state, counted) };
    }

    /// Whether this acceptor's acknowledgement of a heartbeat sent in `epoch` may count for a lease: not if it
    /// accepted or installed a record that removes the life, nor one that changes the voters the life counts by.
    fn may_lease(&self, who: Peer, epoch: Epoch) -> bool {
        let Some(tip) = &self.tip else { return false };
        let life = who.identity();
        let member = tip.contains(life) && tip.nonces.get(&who.node) == Some(&who.nonce);
        let voters_known = self.voters_since.0 <= epoch;
        let accepted = self.disk.accepted.as_ref().map(|a| &a.view);
        let stays = accepted.is_none_or(|next| {
            (next.contains(life) || bug!(self, AcknowledgesTheRemoved)) && next.voters == tip.voters
        });
        member && voters_known && stays
    }

    /// Computes the lease anew and reports changes.
    pub(super) fn renew_lease(&mut self) {
        if self.stopped.is_some() {
            return;
        }
        let until = self.lease_end();
        if until != self.lease_until {
            self.lease_until = until;
            self.out.push(Output::Lease { until });
        }
        let quorate = self.now < until;
        if quorate != self.quorate {
            self.quorate = quorate;
            self.out.push(Output::Quorum(quorate));
        }
    }

    /// The latest instant such that a majority acknowledged heartbeats sent then or later, plus the lease.
    fn lease_end(&self) -> Instant {
        let Some(tip) = self.tip.as_ref().filter(|v| self.is_in(v)) else { return Instant(0) };
        let mut got: Vec<_> = self.acks.got.iter().map(|(n, (state, sent))| (*sent, n, state)).collect();
        got.sort_by(|a, b| b.cmp(a));
        for count in 1..=got.len() {
            if tip.voters.has_majority(got.iter().take(count).map(|(_, n, s)| (*n, *s)))
                && let Some((sent, _, _)) = got.get(count - 1)
            {
                return *sent + self.config.lease();
            }
        }
        Instant(0)
    }

    /// Notes the ends of the leases of lives that `decision` removed, counted from hearing it now.
    pub(super) fn note_removed(&mut self, removed: impl Iterator<Item = Identity>, decision: &Decision) {
        for who in removed {
            let at = self.lease_end_of(who, Some(&decision.accepts));
            self.over.insert(who, at);
            self.acks.given.remove(&who);
        }
        if OVER_KEPT_MAX < self.over.len()
            && let Some(tip) = &self.tip
        {
            let now = self.now;
            self.over.retain(|who, at| tip.debts.contains_key(who) || now < *at);
        }
    }

    /// After a start: debts in the newest record are of lives whose removal this process did not hear.
    pub(super) fn note_old_debts(&mut self) {
        let Some(tip) = self.tip.clone() else { return };
        for (who, debt) in &tip.debts {
            if !self.over.contains_key(who) {
                let accepts = self.disk.chain.accepts(debt.removed);
                let at = self.lease_end_of(*who, accepts);
                self.over.insert(*who, at);
            }
        }
    }

    fn lease_end_of(&self, who: Identity, accepts: Option<&BTreeMap<NodeId, Accept>>) -> Instant {
        if bug!(self, LeaseNotAwaited) {
            return self.now;
        }
        let ages = accepts.into_iter().flat_map(BTreeMap::values);
        let youngest = ages.map(|a| a.acknowledged_ns_ago.get(&who).copied().unwrap_or(0)).min().unwrap_or(0);
        let wait = self.config.lease_wait().saturating_sub(Duration::from_nanos(youngest));
        self.now + wait
    }

    /// A decided change of voters: who counted before may have been acknowledged elsewhere until now.
    pub(super) fn voters_changed(&mut self, epoch: Epoch) {
        self.voters_since = (epoch, self.now);
    }
}
