//! The failure detector: who is heard, and whom this node finds silent (R1).
//!
//! A report is local and changes nothing by itself: reports are counted in `cut`, and only a decided record removes a
//! member.

use super::cut::Cut;
use super::io::{Event, Peer};
use super::member::Member;
use super::readmit::Readmit;
use super::rings::Watch;
use super::wire::{ControlMsg, Heartbeat};
use crate::evidence::{LOSS_WINDOW, Report, Why};
use crate::{Epoch, Identity, Incarnation, Instant, NodeId, StateId};
use core::time::Duration;
use std::collections::{BTreeMap, BTreeSet};

/// An edge is reported when no more than so many of the last [`LOSS_WINDOW`] heartbeats arrived: with 30 % loss that
/// happens once in 200,000 windows, with 80 % loss in 96 of 100. Rapid (section 6) takes 40 % of the last 10 probes.
const LOSS_REPORTED: u32 = 10;
/// It is withdrawn when so many arrived: far enough above, so that a bad link does not flicker.
pub(super) const LOSS_WITHDRAWN: u32 = 18;

/// In which heartbeat intervals of the recent past a heartbeat arrived.
#[derive(Clone, Copy, Debug, Default)]
struct Arrivals {
    bits: u64,
    slot: u64,
}

impl Arrivals {
    /// A clean record up to `slot`.
    fn clean(slot: u64) -> Self {
        Self { bits: u64::MAX, slot }
    }

    fn at(&self, slot: u64) -> u64 {
        let age = u32::try_from(slot.saturating_sub(self.slot)).unwrap_or(u32::MAX);
        self.bits.checked_shl(age).unwrap_or(0)
    }

    fn note(&mut self, slot: u64) {
        self.bits = self.at(slot) | 1;
        self.slot = self.slot.max(slot);
    }

    /// In how many of the last [`LOSS_WINDOW`] whole intervals something arrived.
    fn received(&self, slot: u64) -> u32 {
        (self.at(slot) >> 1 & ((1 << LOSS_WINDOW) - 1)).count_ones()
    }
}

/// What is known of one process.
#[derive(Clone, Debug)]
pub(super) struct Life {
    pub(super) nonce: u64,
    pub(super) first_heard: Instant,
    pub(super) last_heard: Instant,
    /// What its newest heartbeat said; none yet if nothing but other messages came.
    pub(super) beat: Option<Heartbeat>,
    /// The newest epoch it is known to have.
    pub(super) epoch: Epoch,
    /// Whom it takes for the leader.
    pub(super) leader: Option<NodeId>,
    arrivals: Arrivals,
}

/// Everybody else.
#[derive(Clone, Debug, Default)]
pub(super) struct Peers {
    pub(super) lives: BTreeMap<Identity, Life>,
    /// Lives with a newer record than this node.
    pub(super) ahead: BTreeSet<Identity>,
    /// Lives that want to become members.
    pub(super) wanting: BTreeSet<Identity>,
    /// Lives whose newest heartbeat reports somebody.
    pub(super) reporters: BTreeSet<Identity>,
    /// Since when a member has to be heard: its join was installed here, or this node came to watch it.
    expected_since: BTreeMap<Identity, Instant>,
    link_lost: BTreeMap<NodeId, Instant>,
    /// Older lives that a newer one's appearance put to the question, and since when.
    probes: BTreeMap<Identity, Instant>,
    /// When such a life answered last: only a living process can.
    answered: BTreeMap<Identity, Instant>,
    /// Members that this node watches and finds silent.
    pub(super) silent: BTreeMap<Identity, Report>,
    /// When to look for silence again.
    scan_at: Instant,
    /// Who watches whom.
    pub(super) watch: Watch,
    pub(super) cut: Cut,
    pub(super) readmit: Readmit,
}

impl Peers {
    /// This node paused: nobody is to blame for the silence.
    pub(super) fn shift(&mut self, gap: Duration, slot: u64) {
        for life in self.lives.values_mut() {
            life.last_heard = life.last_heard + gap;
            life.arrivals = Arrivals::clean(slot);
        }
        for at in self.expected_since.values_mut() {
            *at = *at + gap;
        }
        // Broken pairs and probes are judged afresh, and what others reported is old.
        self.cut.forget();
        for at in self.probes.values_mut() {
            *at = *at + gap;
        }
        self.scan_at = Instant(0);
    }

    /// All lives known of a node, oldest first.
    pub(super) fn of_node(&self, node: NodeId) -> impl DoubleEndedIterator<Item = (Identity, &Life)> {
        let all = Identity::new(node, Incarnation(0))..=Identity::new(node, Incarnation(u64::MAX));
        self.lives.range(all).map(|(id, life)| (*id, life))
    }
}

impl Member {
    /// The number of the heartbeat interval that is now.
    pub(super) fn slot(&self) -> u64 {
        let interval = u64::try_from(self.config.heartbeat_interval.as_nanos()).unwrap_or(u64::MAX).max(1);
        self.now.0 / interval
    }

    /// Notes that something of this process arrived.
    pub(super) fn heard(&mut self, from: Peer) {
        let (now, slot) = (self.now, self.slot());
        let who = from.identity();
        let new = !self.peers.lives.contains_key(&who);
        let life = self.peers.lives.entry(who).or_insert(Life {
            nonce: from.nonce,
            first_heard: now,
            last_heard: now,
            beat: None,
            epoch: Epoch(0),
            leader: None,
            arrivals: Arrivals::clean(slot),
        });
        life.last_heard = now;
        life.nonce = from.nonce;
        self.peers.link_lost.remove(&from.node);
        self.peers.probes.remove(&who);
        if self.peers.silent.get(&who).is_some_and(|r| !matches!(r.why, Why::Loss { .. })) {
            self.peers.scan_at = now;
        }
        if new {
            // An outsider tells at once whom it hears: that is what it is let in by.
            self.beat_soon |= !self.is_member();
        }
        self.probe_older(who);
    }

    /// A newer life of a node appeared: older ones that seem to live are asked (R1).
    fn probe_older(&mut self, newer: Identity) {
        let member = self.tip.as_ref().and_then(|v| v.identity(newer.node));
        if self.peers.of_node(newer.node).count() == 1 && member.is_none_or(|m| m == newer) {
            return;
        }
        let known = self.peers.of_node(newer.node).map(|(l, _)| l);
        let older: BTreeSet<Identity> = known.chain(member).filter(|l| *l < newer).collect();
        for life in older {
            if self.is_live(life) && !self.peers.probes.contains_key(&life) {
                self.peers.probes.insert(life, self.now);
                self.peers.scan_at = self.peers.scan_at.min(self.now);
                self.out.push(super::Output::Send {
                    to: life.node,
                    life: Some(life.incarnation),
                    msg: ControlMsg::Probe,
                });
            }
        }
    }

    pub(super) fn heard_beat(&mut self, from: Peer, beat: &Heartbeat) {
        let (who, slot) = (from.identity(), self.slot());
        if let Some(life) = self.peers.lives.get_mut(&who) {
            life.arrivals.note(slot);
            // Heartbeats overtake each other; the sender's clock tells which is newer.
            if life.beat.as_ref().is_none_or(|b| b.sent_ns <= beat.sent_ns) {
                let before = life.beat.replace(beat.clone());
                life.leader = beat.leader;
                if before.is_none_or(|b| b.reports != beat.reports) {
                    self.peers.cut.touch();
                    if beat.reports.is_empty() {
                        self.peers.reporters.remove(&who);
                    } else {
                        self.peers.reporters.insert(who);
                    }
                }
                if beat.wants_in {
                    self.peers.wanting.insert(who);
                } else {
                    self.peers.wanting.remove(&who);
                }
            }
        }
        self.heard_epoch(from, beat.epoch);
    }

    pub(super) fn heard_epoch(&mut self, from: Peer, epoch: Epoch) {
        let (who, mine) = (from.identity(), self.epoch());
        if let Some(life) = self.peers.lives.get_mut(&who) {
            life.epoch = life.epoch.max(epoch);
            if mine < life.epoch {
                self.peers.ahead.insert(who);
            }
        }
    }

    pub(super) fn heard_leader(&mut self, from: Peer, leader: Option<NodeId>) {
        if let Some(life) = self.peers.lives.get_mut(&from.identity()) {
            life.leader = leader;
        }
    }

    pub(super) fn on_link_lost(&mut self, node: NodeId) {
        self.peers.link_lost.entry(node).or_insert(self.now);
        self.peers.scan_at = self.now;
    }

    /// When this life is found silent if nothing more is heard of it, and why.
    fn silent_at(&self, who: Identity) -> (Instant, Why) {
        let expected = self.peers.expected_since.get(&who).copied().unwrap_or(self.started);
        let life = self.peers.lives.get(&who);
        let heard = life.map_or(expected, |l| l.last_heard.max(expected));
        let mut first = (heard + self.config.detection, Why::Silence);
        if let Some(lost) = self.peers.link_lost.get(&who.node) {
            first = first.min(((*lost).max(heard) + self.config.link_lost_grace, Why::LinkLost));
        }
        if let Some(since) = self.peers.probes.get(&who) {
            first = first.min((*since + self.config.heartbeat_interval, Why::ProbeUnanswered));
        }
        first
    }

    /// When this life is found silent if nothing more is heard of it.
    pub(super) fn suspect_at(&self, who: Identity) -> Instant {
        self.silent_at(who).0
    }

    /// Whether this life is taken to live: heard recently, and not outlived by an unanswered probe.
    pub(super) fn is_live(&self, who: Identity) -> bool {
        who == self.me.identity() || self.now < self.suspect_at(who)
    }

    /// Whether it was heard within the detection time and seems to live.
    fn is_heard(&self, who: Identity, life: &Life) -> bool {
        self.now < life.last_heard + self.config.detection && self.is_live(who)
    }

    /// The newest life of a node that is heard at present, unless an older one's answer showed it to be a second
    /// identity.
    pub(super) fn live_life(&self, node: NodeId) -> Option<(Identity, &Life)> {
        let fits = |id: &Identity, life: &&Life| self.is_heard(*id, life) && !self.elder_answered(*id);
        self.peers.of_node(node).rev().find(|(id, life)| fits(id, life))
    }

    /// Lives heard at present, the newest of each node; this one is not among them.
    pub(super) fn live_lives(&self) -> impl Iterator<Item = (Identity, &Life)> {
        let mut last = None;
        let nodes = self.peers.lives.keys().map(|l| l.node).filter(move |n| last.replace(*n) != Some(*n));
        nodes.filter(|n| *n != self.me.node).filter_map(|n| self.live_life(n))
    }

    pub(super) fn heard_nodes(&self) -> BTreeSet<NodeId> {
        self.live_lives().map(|(id, _)| id.node).chain([self.me.node]).collect()
    }

    /// Whether an older life of the same node still seems to live.
    pub(super) fn has_live_elder(&self, who: Identity) -> bool {
        self.peers.of_node(who.node).any(|(l, life)| l < who && self.is_heard(l, life))
    }

    pub(super) fn on_probe_answer(&mut self, from: Identity) {
        self.peers.answered.insert(from, self.now);
    }

    /// Whether an older life answered a probe after this one appeared: then both run at once (R1). Other messages of
    /// the older one prove nothing, they may have been on the way when it died.
    pub(super) fn elder_answered(&self, who: Identity) -> bool {
        if self.peers.answered.is_empty() {
            return false;
        }
        let Some(life) = self.peers.lives.get(&who) else { return false };
        self.peers.answered.iter().any(|(l, at)| l.node == who.node && *l < who && life.first_heard <= *at)
    }

    /// Whether this node hears, by its part in the protocol, every member: all do in a small cluster, voters always.
    pub(super) fn hears_everybody(&self) -> bool {
        self.peers.watch.small
            || self.tip.as_ref().is_some_and(|v| v.voters.voters.contains_key(&self.me.node))
    }

    /// Looks for members that this node watches and finds silent; reports the new ones.
    pub(super) fn scan(&mut self) {
        if self.stopped.is_some() || self.now < self.peers.scan_at {
            return;
        }
        let Some(tip) = self.tip.clone() else { return };
        let (now, slot, me) = (self.now, self.slot(), self.me.identity());
        let all = self.hears_everybody();
        let watched =
            tip.identities().filter(|w| *w != me && (all || self.peers.watch.subjects.contains(&w.node)));
        let mut next = now + self.config.heartbeat_interval;
        let mut silent = BTreeMap::new();
        for who in watched {
            let before = self.peers.silent.get(&who);
            let (at, why) = self.silent_at(who);
            let found = if at <= now {
                Some(why)
            } else {
                next = next.min(at);
                self.loss_of(who, slot, before.is_some())
            };
            if let Some(why) = found {
                let heard = self.peers.lives.get(&who).map_or(self.started, |l| l.last_heard);
                let silent_ns = u64::try_from(now.since(heard).as_nanos()).unwrap_or(u64::MAX);
                let same =
                    before.filter(|r| core::mem::discriminant(&r.why) == core::mem::discriminant(&why));
                let new = Report { why, at_ns: now.0, silent_ns };
                silent.insert(who, same.copied().unwrap_or(new));
            }
        }
        self.peers.scan_at = next;
        if silent != self.peers.silent {
            for who in silent.keys().filter(|w| !self.peers.silent.contains_key(w)) {
                self.out.push(super::Output::Event(Event::Suspected(*who)));
            }
            self.peers.silent = silent;
            self.peers.cut.touch();
            // Reports are not left to the next heartbeat: they are what a failure waits for.
            self.beat_soon = true;
        }
    }

    /// Whether too few heartbeats of a member arrive, with hysteresis.
    fn loss_of(&self, who: Identity, slot: u64, reported: bool) -> Option<Why> {
        let life = self.peers.lives.get(&who)?;
        let window = self.config.heartbeat_interval * (LOSS_WINDOW + 1);
        let expected = self.peers.expected_since.get(&who).copied().unwrap_or(self.started);
        if self.now < expected.max(self.started) + window {
            return None;
        }
        let received = life.arrivals.received(slot);
        let bad = received <= LOSS_REPORTED || (reported && received < LOSS_WITHDRAWN);
        bad.then_some(Why::Loss { received: u8::try_from(received).unwrap_or(u8::MAX) })
    }

    /// Whether a process has been heard for a whole window, and well.
    pub(super) fn is_heard_well(&self, who: Identity) -> bool {
        let Some(life) = self.peers.lives.get(&who) else { return false };
        let window = self.config.heartbeat_interval * (LOSS_WINDOW + 1);
        life.first_heard + window <= self.now && LOSS_WITHDRAWN <= life.arrivals.received(self.slot())
    }

    /// When to look for silence next.
    pub(super) fn next_scan(&self) -> Option<Instant> {
        self.tip.as_ref().map(|_| self.peers.scan_at)
    }

    /// Brings the detector up to date with a new record.
    pub(super) fn peers_installed(&mut self) {
        let Some(tip) = self.tip.clone() else { return };
        let now = self.now;
        let before = core::mem::replace(&mut self.peers.watch, Watch::new(&tip, self.me.node));
        self.peers.expected_since.retain(|who, _| tip.contains(*who));
        for who in tip.identities() {
            let anew = !before.subjects.contains(&who.node) && self.peers.watch.subjects.contains(&who.node);
            let since = self.peers.expected_since.entry(who).or_insert(now);
            if anew {
                *since = now;
            }
        }
        // Lives that can never be members again, and silent processes, are forgotten.
        let detection = self.config.detection;
        self.peers.lives.retain(|who, life| {
            let over = tip.lives.get(&who.node).is_some_and(|l| who.incarnation <= *l);
            tip.contains(*who) || (!over && now < life.last_heard + detection * 4)
        });
        let lives = &self.peers.lives;
        self.peers.probes.retain(|who, _| tip.contains(*who) || lives.contains_key(who));
        self.peers.answered.retain(|who, _| tip.contains(*who) || lives.contains_key(who));
        self.peers.ahead.retain(|who| lives.get(who).is_some_and(|l| tip.epoch < l.epoch));
        self.peers.wanting.retain(|who| lives.contains_key(who) && !tip.contains(*who));
        self.peers.reporters.retain(|who| lives.contains_key(who));
        self.peers.silent.retain(|who, _| tip.contains(*who));
        self.peers.scan_at = now;
        self.peers.cut.touch();
        self.readmit_installed(&tip);
    }

    /// The acceptors of the newest record's voter set that are heard, with their state directories; this one too.
    pub(super) fn live_acceptors(&self) -> BTreeMap<NodeId, (Identity, StateId)> {
        let mut acceptors = BTreeMap::new();
        for (node, voter) in self.tip.iter().flat_map(|v| &v.voters.voters) {
            let found = if *node == self.me.node {
                Some((self.me.identity(), self.disk.state))
            } else {
                self.live_life(*node).and_then(|(id, l)| l.beat.as_ref().map(|b| (id, b.state)))
            };
            if let Some((id, state)) = found.filter(|(_, state)| *state == voter.state) {
                acceptors.insert(*node, (id, state));
            }
        }
        acceptors
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrivals_are_counted_over_the_last_thirty_two_whole_intervals() {
        let mut arrivals = Arrivals::clean(100);
        assert_eq!(arrivals.received(100), 32);
        assert_eq!(arrivals.received(116), 17, "the one under way is not counted yet");
        for slot in (101..=140).step_by(4) {
            arrivals.note(slot);
        }
        assert_eq!(arrivals.received(140), 8);
        assert_eq!(arrivals.received(500), 0);
    }
}
