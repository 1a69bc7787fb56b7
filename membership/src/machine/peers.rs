//! The failure detector: who is heard, who is suspect, and which pairs have no path (R1, R3).
//!
//! Suspicion is local and changes nothing by itself; only a decided record removes a member.

use super::io::{Event, Peer};
use super::member::Member;
use super::wire::{ControlMsg, Heartbeat};
use crate::{Epoch, Identity, Instant, NodeId, StateId};
use core::time::Duration;
use std::collections::{BTreeMap, BTreeSet};

/// What is known of one process.
#[derive(Clone, Debug)]
pub(super) struct Life {
    pub(super) nonce: u64,
    first_heard: Instant,
    last_heard: Instant,
    /// What its newest heartbeat said; none yet if nothing but other messages came.
    pub(super) beat: Option<Heartbeat>,
    /// The newest epoch it is known to have.
    pub(super) epoch: Epoch,
}

/// Everybody else.
#[derive(Debug, Default)]
pub(super) struct Peers {
    pub(super) lives: BTreeMap<Identity, Life>,
    /// Since when a member has to be heard: its join was installed here.
    expected_since: BTreeMap<Identity, Instant>,
    link_lost: BTreeMap<NodeId, Instant>,
    /// Older lives that a newer one's appearance put to the question, and since when.
    probes: BTreeMap<Identity, Instant>,
    /// When such a life answered last: only a living process can.
    answered: BTreeMap<Identity, Instant>,
    suspects: BTreeSet<Identity>,
    /// Pairs of members without a path, and since when.
    pub(super) no_path: BTreeMap<(NodeId, NodeId), Instant>,
}

impl Peers {
    /// This node paused: nobody is to blame for the silence.
    pub(super) fn shift(&mut self, gap: Duration) {
        for life in self.lives.values_mut() {
            life.last_heard = life.last_heard + gap;
        }
        for at in self.expected_since.values_mut() {
            *at = *at + gap;
        }
        // Broken pairs and probes are judged afresh.
        self.no_path.clear();
        for at in self.probes.values_mut() {
            *at = *at + gap;
        }
    }
}

impl Member {
    /// Notes that something of this process arrived.
    pub(super) fn heard(&mut self, from: Peer) {
        let now = self.now;
        let life = self.peers.lives.entry(from.identity()).or_insert(Life {
            nonce: from.nonce,
            first_heard: now,
            last_heard: now,
            beat: None,
            epoch: Epoch(0),
        });
        life.last_heard = now;
        life.nonce = from.nonce;
        self.peers.link_lost.remove(&from.node);
        self.peers.probes.remove(&from.identity());
        self.probe_older(from.identity());
    }

    /// A newer life of a node appeared: older ones that seem to live are asked (R1).
    fn probe_older(&mut self, newer: Identity) {
        let member = self.tip.as_ref().and_then(|v| v.identity(newer.node));
        let known = self.peers.lives.keys().filter(|l| l.node == newer.node).copied();
        let older: BTreeSet<Identity> = known.chain(member).filter(|l| *l < newer).collect();
        for life in older {
            if self.is_live(life) && !self.peers.probes.contains_key(&life) {
                self.peers.probes.insert(life, self.now);
                self.out.push(super::Output::Send {
                    to: life.node,
                    life: Some(life.incarnation),
                    msg: ControlMsg::Probe,
                });
            }
        }
    }

    pub(super) fn heard_beat(&mut self, from: Peer, beat: &Heartbeat) {
        if let Some(life) = self.peers.lives.get_mut(&from.identity()) {
            // Heartbeats overtake each other; the sender's clock tells which is newer.
            if life.beat.as_ref().is_none_or(|b| b.sent_ns <= beat.sent_ns) {
                life.beat = Some(beat.clone());
            }
        }
        self.heard_epoch(from, beat.epoch);
    }

    pub(super) fn heard_epoch(&mut self, from: Peer, epoch: Epoch) {
        if let Some(life) = self.peers.lives.get_mut(&from.identity()) {
            life.epoch = life.epoch.max(epoch);
        }
    }

    pub(super) fn on_link_lost(&mut self, node: NodeId) {
        self.peers.link_lost.entry(node).or_insert(self.now);
    }

    /// When this life becomes suspect if nothing more is heard of it.
    fn suspect_at(&self, who: Identity) -> Instant {
        let expected = self.peers.expected_since.get(&who).copied().unwrap_or(self.started);
        let life = self.peers.lives.get(&who);
        let heard = life.map_or(expected, |l| l.last_heard.max(expected));
        let mut at = heard + self.config.detection;
        if let Some(lost) = self.peers.link_lost.get(&who.node) {
            at = at.min((*lost).max(heard) + self.config.link_lost_grace);
        }
        if let Some(since) = self.peers.probes.get(&who) {
            at = at.min(*since + self.config.heartbeat_interval);
        }
        at
    }

    /// Whether this life is taken to live: heard recently, and not outlived by an unanswered probe.
    pub(super) fn is_live(&self, who: Identity) -> bool {
        who == self.me.identity() || self.now < self.suspect_at(who)
    }

    /// Lives heard at present, the newest of each node; this one is not among them, nor one that an older life's
    /// answer showed to be a second identity.
    pub(super) fn live_lives(&self) -> impl Iterator<Item = (Identity, &Life)> {
        let mut newest: BTreeMap<NodeId, (Identity, &Life)> = BTreeMap::new();
        for (id, life) in &self.peers.lives {
            let heard = self.now < life.last_heard + self.config.detection && self.is_live(*id);
            if id.node != self.me.node && heard && !self.elder_answered(*id) {
                newest.insert(id.node, (*id, life));
            }
        }
        newest.into_values()
    }

    pub(super) fn heard_nodes(&self) -> BTreeSet<NodeId> {
        self.live_lives().map(|(id, _)| id.node).chain([self.me.node]).collect()
    }

    /// Whether an older life of the same node still seems to live.
    pub(super) fn has_live_elder(&self, who: Identity) -> bool {
        let elders = self.peers.lives.iter().filter(|(l, _)| l.node == who.node && **l < who);
        elders
            .into_iter()
            .any(|(l, life)| self.now < life.last_heard + self.config.detection && self.is_live(*l))
    }

    pub(super) fn on_probe_answer(&mut self, from: Identity) {
        self.peers.answered.insert(from, self.now);
    }

    /// Whether an older life answered a probe after this one appeared: then both run at once (R1). Other messages of
    /// the older one prove nothing, they may have been on the way when it died.
    pub(super) fn elder_answered(&self, who: Identity) -> bool {
        let Some(life) = self.peers.lives.get(&who) else { return false };
        self.peers.answered.iter().any(|(l, at)| l.node == who.node && *l < who && life.first_heard <= *at)
    }

    /// Members that are suspect; reports the new ones.
    pub(super) fn suspect(&mut self) {
        if self.stopped.is_some() {
            return;
        }
        let members: Vec<Identity> = self.tip.iter().flat_map(|v| v.identities()).collect();
        let suspects: BTreeSet<Identity> =
            members.into_iter().filter(|who| *who != self.me.identity() && !self.is_live(*who)).collect();
        for who in suspects.difference(&self.peers.suspects.clone()) {
            self.event(Event::Suspected(*who));
        }
        self.peers.suspects = suspects;
        self.note_paths();
    }

    pub(super) fn suspects(&self) -> &BTreeSet<Identity> {
        &self.peers.suspects
    }

    /// The next instant at which somebody may become suspect.
    pub(super) fn next_suspicion(&self) -> Option<Instant> {
        let members = self.tip.iter().flat_map(|v| v.identities()).filter(|m| *m != self.me.identity());
        members.map(|m| self.suspect_at(m)).filter(|at| self.now < *at).min()
    }

    /// Which pairs of live members say that they do not hear each other.
    fn note_paths(&mut self) {
        let Some(tip) = self.tip.clone() else { return };
        let live: Vec<Identity> = tip.identities().filter(|l| self.is_live(*l)).collect();
        let own = self.heard_nodes();
        let hears = |a: Identity, b: Identity| match self.peers.lives.get(&a) {
            _ if a == self.me.identity() => own.contains(&b.node),
            // Nothing is known before its first heartbeat as a member.
            Some(life) => life.beat.as_ref().is_none_or(|h| h.epoch < tip.epoch || h.hears.contains(&b.node)),
            None => true,
        };
        let mut broken = BTreeSet::new();
        for (i, a) in live.iter().enumerate() {
            for b in live.iter().skip(i + 1) {
                if !(hears(*a, *b) && hears(*b, *a)) {
                    broken.insert((a.node, b.node));
                }
            }
        }
        self.peers.no_path.retain(|pair, _| broken.contains(pair));
        for pair in broken {
            if !self.peers.no_path.contains_key(&pair) {
                self.peers.no_path.insert(pair, self.now);
                self.event(Event::NoPath(pair.0, pair.1));
            }
        }
    }

    /// Brings the detector up to date with a new record.
    pub(super) fn peers_installed(&mut self) {
        let Some(tip) = self.tip.clone() else { return };
        let now = self.now;
        self.peers.expected_since.retain(|who, _| tip.contains(*who));
        for who in tip.identities() {
            self.peers.expected_since.entry(who).or_insert(now);
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
    }

    /// The acceptors of the newest record's voter set that are heard, with their state directories; this one too.
    pub(super) fn live_acceptors(&self) -> BTreeMap<NodeId, (Identity, StateId)> {
        let mut acceptors: BTreeMap<NodeId, (Identity, StateId)> = self
            .live_lives()
            .filter_map(|(id, life)| life.beat.as_ref().map(|b| (id.node, (id, b.state))))
            .collect();
        acceptors.insert(self.me.node, (self.me.identity(), self.disk.state));
        let voters = self.tip.iter().flat_map(|v| &v.voters.voters);
        let set: BTreeMap<NodeId, StateId> = voters.map(|(n, v)| (*n, v.state)).collect();
        acceptors.retain(|n, (_, state)| set.get(n) == Some(state));
        acceptors
    }
}

/// The smallest set of nodes whose removal leaves no broken pair; of equally small ones the one with fewest votes,
/// then with the highest node ids (R3). Above `EXACT_MAX` nodes in broken pairs: greedily, the worst first.
pub(super) fn smallest_cover(
    broken: &BTreeSet<(NodeId, NodeId)>,
    votes: impl Fn(NodeId) -> u32,
) -> BTreeSet<NodeId> {
    const EXACT_MAX: usize = 12;
    let nodes: Vec<NodeId> =
        broken.iter().flat_map(|(a, b)| [*a, *b]).collect::<BTreeSet<_>>().into_iter().collect();
    if EXACT_MAX < nodes.len() {
        let mut left = broken.clone();
        let mut cover = BTreeSet::new();
        while !left.is_empty() {
            let count = |n: &NodeId| left.iter().filter(|(a, b)| a == n || b == n).count();
            let Some(worst) = nodes.iter().max_by_key(|n| (count(n), *n)).copied() else { break };
            left.retain(|(a, b)| *a != worst && *b != worst);
            cover.insert(worst);
        }
        return cover;
    }
    let sets = (0_u32..1 << nodes.len()).map(|bits| {
        nodes.iter().enumerate().filter(|(i, _)| bits >> i & 1 == 1).map(|(_, n)| *n).collect::<BTreeSet<_>>()
    });
    sets.filter(|set| broken.iter().all(|(a, b)| set.contains(a) || set.contains(b)))
        .min_by_key(|set| {
            let lost: u32 = set.iter().map(|n| votes(*n)).sum();
            (set.len(), lost, set.iter().rev().map(|n| core::cmp::Reverse(*n)).collect::<Vec<_>>())
        })
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cover(pairs: &[(u32, u32)], votes: impl Fn(NodeId) -> u32) -> Vec<u32> {
        let pairs = pairs.iter().map(|(a, b)| (NodeId(*a), NodeId(*b))).collect();
        smallest_cover(&pairs, votes).into_iter().map(|n| n.0).collect()
    }

    #[test]
    fn one_node_in_every_broken_pair_goes_alone() {
        assert_eq!(cover(&[(1, 2), (1, 3)], |_| 1), [1]);
    }

    #[test]
    fn of_one_pair_the_one_without_a_vote_goes_and_else_the_higher() {
        assert_eq!(cover(&[(1, 2)], |n| u32::from(n.0 == 2)), [1]);
        assert_eq!(cover(&[(1, 2)], |_| 1), [2]);
    }

    #[test]
    fn a_large_mesh_is_covered_too() {
        let pairs: Vec<_> = (2..=20).map(|n| (1, n)).collect();
        assert_eq!(cover(&pairs, |_| 1), [1]);
        assert_eq!(cover(&[], |_| 1), [] as [u32; 0]);
    }
}
