//! A quorum forced by a person: the one record that no majority decided. Outside the guarantees of everything here.
//!
//! The record says who forced it, whom the person declared to be off, and what for. It is believed by processes that are not
//! quorate and whose newest record it follows; a member under a valid lease never believes it, and a storage server only
//! when it was started with the epoch.

use super::bug::bug;
use super::durable::{Accepted, Record};
use super::io::{Event, Output, RequestId};
use super::member::Member;
use super::writes::Then;
use super::{change, voters};
use crate::proof::{Accept, Ballot, Decision};
use crate::{Cause, Identity, NodeId, Refusal, RequestError, Role, View, Voter, VoterSet, verify_chain_with};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// The longest word of a person in a record, in bytes.
pub const WORD_BYTES_MAX: usize = 512;

impl Member {
    pub(super) fn on_force(&mut self, id: RequestId, off: &BTreeSet<NodeId>, word: String) {
        match self.forced_view(off, word) {
            Ok(view) => {
                let round = self.disk.promised.round.max(self.proposer.seen().round).saturating_add(1);
                let ballot = Ballot { round, node: self.me.node.0 };
                let acknowledged_ns_ago = self.acknowledged_ages(&view);
                let accept = Accept { state: self.disk.state, ballot, acknowledged_ns_ago };
                let decision = Decision {
                    view: view.clone(),
                    accepts: BTreeMap::from([(self.me.node, accept.clone())]),
                };
                let token = self.write(Record::Accepted(Box::new(Accepted { view, accept })), false);
                self.writes.vote = Some(token);
                self.forcing = Some(id);
                self.after(token, Then::Forced(Box::new(decision)));
            }
            Err(refusal) => {
                let result = Err(RequestError::Refused(refusal));
                self.out.push(Output::RequestDone { id, result });
            }
        }
    }

    /// The record is durable here: it counts from now on.
    pub(super) fn tell_forced(&mut self, decision: Decision) {
        let epoch = decision.view.epoch;
        let is_next = self.epoch().next() == epoch;
        if is_next {
            self.event(Event::Forced { epoch });
            self.decided(decision);
        }
        if let Some(id) = self.forcing.take() {
            let result = match &self.tip {
                Some(view) if is_next => Ok(Arc::clone(view)),
                _ => {
                    Err(RequestError::Refused(Refusal::Force("another record was decided meanwhile".into())))
                }
            };
            self.out.push(Output::RequestDone { id, result });
        }
    }

    fn forced_view(&self, off: &BTreeSet<NodeId>, word: String) -> Result<View, Refusal> {
        let refused = |why: String| Err(Refusal::Force(why));
        let Some(tip) = &self.tip else { return refused("this node knows no record of the cluster".into()) };
        if WORD_BYTES_MAX < word.len() {
            return Err(Refusal::Limit { what: "the reason in bytes".into(), limit: WORD_BYTES_MAX as u64 });
        }
        if self.forcing.is_some() {
            return refused("it is being forced already".into());
        }
        if tip.voters.voters.get(&self.me.node).is_none_or(|v| v.state != self.disk.state) {
            return refused("this node is no voter: its records may be old".into());
        }
        let here = self.live_acceptors();
        let tally = tip.voters.tally(here.iter().map(|(n, (_, state))| (n, state)));
        if tally.is_majority() {
            return refused(format!("a majority answers ({tally}): nothing is to be forced"));
        }
        let heard = self.heard_nodes();
        let awaited: BTreeSet<NodeId> = tip.members.keys().chain(tip.voters.voters.keys()).copied().collect();
        if let Some(node) = off.intersection(&heard).next() {
            return refused(format!("node {node} is heard, so it is not off"));
        }
        if let Some(node) = awaited.difference(&heard).find(|n| !off.contains(n)) {
            return refused(format!("node {node} is not heard and was not declared to be off"));
        }
        // What was accepted for the next record may have been decided; nothing of it is lost here.
        let base = self.disk.accepted.as_ref().map_or(tip.as_ref(), |a| &a.view);
        let lost: BTreeSet<Identity> = base.identities().filter(|who| !heard.contains(&who.node)).collect();
        let mut view =
            change::remove(base, &lost, Cause::Forced { by: self.me.identity(), word, off: off.clone() });
        view.epoch = tip.epoch.next();
        view.evidence = self.evidence();
        if bug!(self, ForcesInSilence) {
            view.cause = Cause::Voters;
        }
        for debt in view.debts.values_mut() {
            debt.removed = debt.removed.min(view.epoch);
        }
        view.lockspaces.values_mut().for_each(|since| *since = (*since).min(tip.epoch.next()));
        view.quorum.expected_votes = 0;
        let votes = tip.voters.voters.get(&self.me.node).map_or(1, |v| v.votes).max(1);
        view.quorum.votes.retain(|n, v| *n != self.me.node || 0 < *v);
        view.voters = VoterSet {
            voters: BTreeMap::from([(self.me.node, Voter { state: self.disk.state, votes })]),
            ..VoterSet::default()
        };
        voters::in_line(&view.clone(), &mut view.voters);
        match change::fault(&view) {
            Some(fault) => refused(fault.into()),
            None => Ok(view),
        }
    }

    /// Whether a record that a person forced elsewhere is taken here: only while this process is not quorate, so that it
    /// never works against a cluster that works.
    pub(super) fn believes_forced(&self, decision: &Decision) -> bool {
        let Some(tip) = &self.tip else { return false };
        let epoch = decision.view.epoch;
        let chain = core::slice::from_ref(decision);
        let whole = verify_chain_with(self.disk.cluster, tip.epoch, &tip.voters, chain, Some(epoch)).is_ok();
        let forcer = decision.accepts.keys().next().and_then(|n| tip.roster.get(n));
        whole
            && !self.is_quorate(self.now)
            && decision.accepts.len() == 1
            && forcer.is_some_and(|e| e.role == Role::Voter)
    }
}
