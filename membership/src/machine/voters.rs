//! What the next voter set is: the roster, the quorum options and who is here decide, and the present set agrees (R4, R5).
//!
//! Nothing here weakens the rule: a set follows only by a record that a majority of the set before it accepted, and only
//! after a majority of the new one has stored the newest record.

use super::bug::bug;
use super::change;
use super::member::Member;
use crate::{Cause, Evidence, Identity, Instant, NodeId, Role, StateId, Tally, View, Voter, VoterSet};
use core::time::Duration;
use std::collections::{BTreeMap, BTreeSet};

/// The voter set that `view` asks for, when the nodes of `here` are in with these state directories and those of `gone`
/// were away for the last-man-standing window.
///
/// Voters that are neither stay as they are. Votes, expected votes and the tie breaker are brought in line.
pub(crate) fn target(view: &View, here: &BTreeMap<NodeId, StateId>, gone: &BTreeSet<NodeId>) -> VoterSet {
    let mut set = view.voters.clone();
    set.voters.retain(|n, _| !gone.contains(n));
    let is_meant = |n: &NodeId| view.roster.get(n).is_some_and(|e| e.role != Role::Observer);
    for (node, state) in here.iter().filter(|(n, _)| is_meant(n)) {
        let votes = set.voters.get(node).map_or(1, |v| v.votes);
        set.voters.insert(*node, Voter { state: *state, votes });
    }
    in_line(view, &mut set);
    set
}

/// The voter set after the last-man-standing window, if the voters of `side` are left and nobody else.
#[must_use]
pub fn after_window(view: &View, side: &BTreeSet<NodeId>) -> VoterSet {
    let left = view.voters.voters.iter().filter(|(n, _)| side.contains(n));
    let here: BTreeMap<NodeId, StateId> = left.map(|(n, v)| (*n, v.state)).collect();
    let gone = view.voters.voters.keys().copied().filter(|n| !side.contains(n)).collect();
    target(view, &here, &gone)
}

/// Gives `set` the votes, the expected votes and the tie breaker that the options of `view` ask for.
pub(crate) fn in_line(view: &View, set: &mut VoterSet) {
    for (node, voter) in &mut set.voters {
        voter.votes = view.quorum.votes.get(node).copied().unwrap_or(voter.votes);
    }
    set.expected = view.quorum.expected_votes;
    if let Some(policy) = &view.quorum.tie_breaker {
        let is_node = |n: &NodeId| view.roster.get(n).is_none_or(|e| e.role != Role::Witness);
        let nodes: BTreeSet<NodeId> = set.voters.keys().copied().filter(is_node).collect();
        let members: BTreeSet<NodeId> = view.members.keys().copied().collect();
        set.tie_breaker = policy.choose(&nodes, &members);
    }
    set.tie_breaker = set.tie_breaker.filter(|t| set.voters.contains_key(t));
}

impl Member {
    /// Whether the roster has this node as a witness.
    pub(super) fn is_witness(&self) -> bool {
        let entry = self.tip.as_ref().and_then(|v| v.roster.get(&self.me.node));
        entry.is_some_and(|e| e.role == Role::Witness)
    }

    /// Witnesses that are heard, each in its newest life, with nonce and state directory. This process may be one.
    fn witnesses_here(&self, tip: &View) -> BTreeMap<Identity, (u64, StateId)> {
        let is_witness = |n: NodeId| tip.roster.get(&n).is_some_and(|e| e.role == Role::Witness);
        let meant = self.meant.iter().filter(|n| **n != self.me.node && is_witness(**n));
        let others = meant
            .filter_map(|n| self.live_life(*n))
            .filter(|(who, _)| !self.has_live_elder(*who))
            .filter_map(|(who, life)| life.beat.as_ref().map(|b| (who, (life.nonce, b.state))));
        let own = is_witness(self.me.node).then(|| (self.me.identity(), (self.me.nonce, self.disk.state)));
        others.chain(own).collect()
    }

    /// A witness's new life is recorded like a member's, so that a rolled back or copied directory is found out (R1, R4).
    pub(super) fn plan_witnesses(&mut self, tip: &View) -> Option<View> {
        let here = self.witnesses_here(tip);
        let newer = |who: &Identity| tip.lives.get(&who.node).is_none_or(|l| *l < who.incarnation);
        let (who, (nonce, _)) = here.into_iter().find(|(who, _)| newer(who))?;
        let mut next = change::following(tip, Cause::Witness(who));
        next.lives.insert(who.node, who.incarnation);
        next.nonces.insert(who.node, nonce);
        next.evidence = self.evidence();
        Some(next)
    }

    /// Acceptors that a voter set may hold: members and recorded witnesses, with the directories they announced.
    pub(super) fn electable(&self, tip: &View) -> BTreeMap<NodeId, StateId> {
        // Nobody else is ever asked about, and a large cluster has many others.
        let asked: BTreeSet<NodeId> = self.meant.iter().chain(tip.voters.voters.keys()).copied().collect();
        let members = asked.into_iter().filter(|n| tip.members.contains_key(n));
        let members = members.filter_map(|n| self.state_of_member(tip, n).map(|s| (n, s)));
        let recorded = |who: &Identity, nonce: u64| {
            tip.lives.get(&who.node) == Some(&who.incarnation) && tip.nonces.get(&who.node) == Some(&nonce)
        };
        let witnesses = self.witnesses_here(tip).into_iter();
        let witnesses = witnesses.filter(|(who, (nonce, _))| recorded(who, *nonce));
        members.chain(witnesses.map(|(who, (_, state))| (who.node, state))).collect()
    }

    /// Voters that are neither members nor heard as witnesses, and since when.
    pub(super) fn note_absent_voters(&mut self) {
        let Some(tip) = self.tip.clone().filter(|v| v.quorum.last_man_standing_ms.is_some()) else {
            return self.absent_voters.clear();
        };
        let (now, here) = (self.now, self.electable(&tip));
        let absent: BTreeSet<NodeId> =
            tip.voters.voters.keys().copied().filter(|n| !here.contains_key(n)).collect();
        self.absent_voters.retain(|n, _| absent.contains(n));
        for node in absent {
            self.absent_voters.entry(node).or_insert(now);
        }
    }

    /// Voters that were away for the window.
    pub(super) fn long_absent(&self, tip: &View) -> BTreeSet<NodeId> {
        let Some(ms) = tip.quorum.last_man_standing_ms else { return BTreeSet::new() };
        let over = |since: &Instant| *since + Duration::from_millis(u64::from(ms)) <= self.now;
        self.absent_voters.iter().filter(|(_, since)| over(since)).map(|(n, _)| *n).collect()
    }

    /// Voters by role and options, once enough of them have stored the newest record. A change to an even number of
    /// voters waits for the rest of the roster: it would tolerate no more failures and need more votes.
    pub(super) fn plan_voters(&mut self, tip: &View) -> Option<View> {
        if !self.config.admits_voters {
            return None;
        }
        let here = self.electable(tip);
        let gone = self.long_absent(tip);
        let set = target(tip, &here, &gone);
        let is_new = |n: &&NodeId| !tip.voters.voters.contains_key(n);
        let count = set.voters.len();
        let meant = self.meant.len();
        let settled =
            set.voters.keys().filter(is_new).count() == 0 || count % 2 == 1 || count == meant - gone.len();
        let mut set = set;
        if !settled {
            // What the options say of those that vote already does not wait.
            set.voters.retain(|n, _| tip.voters.voters.contains_key(n));
            in_line(tip, &mut set);
        }
        let has_votes = set.voters.values().any(|v| 0 < v.votes);
        if set == tip.voters || !has_votes || super::config::VOTERS_MAX < set.voters.len() {
            return None;
        }
        if !self.is_stored_by(tip, &set) {
            return None;
        }
        let gone: BTreeSet<NodeId> =
            tip.voters.voters.keys().copied().filter(|n| !set.voters.contains_key(n)).collect();
        let cause = if gone.is_empty() { Cause::Voters } else { Cause::LastManStanding(gone) };
        let note = format!("{} of {meant} nodes that are meant to vote", set.voters.len());
        let evidence = Evidence { note, ..self.evidence() };
        Some(View { evidence, ..change::voters(tip, set, cause) })
    }

    /// Votes of the voter set that are heard here, counted; `None` before a record is known.
    #[must_use]
    pub fn tally(&self) -> Option<Tally> {
        let here = self.live_acceptors();
        self.tip.as_ref().map(|v| v.voters.tally(here.iter().map(|(n, (_, state))| (n, state))))
    }

    /// Whether every vote of the set is present, as `wait_for_all` wants it after everybody was gone.
    pub(super) fn all_votes_are_here(&self, tip: &View) -> bool {
        let here = self.live_acceptors();
        let tally = tip.voters.tally(here.iter().map(|(n, (_, state))| (n, state)));
        tally.have == tally.all
    }

    /// The next version of the messages, once every member and every voter said that it speaks it.
    pub(super) fn plan_version(&mut self, tip: &View) -> Option<View> {
        let to = tip.version.checked_add(1)?;
        if !self.config.speaks.speaks(to) {
            return None;
        }
        let speaks = |n: &NodeId| {
            *n == self.me.node
                || self.live_life(*n).and_then(|(_, l)| l.beat.as_ref()).is_some_and(|b| b.speaks.speaks(to))
        };
        let members = tip.members.keys().all(&speaks);
        let voters = tip.voters.voters.keys().all(&speaks);
        if tip.members.is_empty() || !(members && voters || bug!(self, RaisesVersionEarly)) {
            return None;
        }
        let mut next = change::following(tip, Cause::Version { from: tip.version, to });
        next.version = to;
        let note = format!("all members and voters speak version {to}");
        next.evidence = Evidence { note, ..self.evidence() };
        Some(next)
    }
}
