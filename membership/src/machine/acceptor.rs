//! The acceptor: durable promises and accepts for the record after the newest one (R4).
//!
//! One promise holds for all epochs: an acceptor that promised ballot B while its chain ended at epoch E had accepted
//! nothing for a later epoch than E+1, and accepts nothing below B afterwards. So a leader's promises carry over from
//! record to record (R5). It answers whether or not its process is a member.

use super::change;
use super::durable::{Accepted, Record};
use super::member::Member;
use super::wire::ControlMsg;
use super::writes::Then;
use crate::delta::Delta;
use crate::proof::{Accept, Ballot};
use crate::{Epoch, Identity, NodeId, View};
use std::collections::BTreeMap;

impl Member {
    pub(super) fn on_prepare(&mut self, from: NodeId, epoch: Epoch, ballot: Ballot) {
        if !self.is_for_next(from, epoch) {
            return;
        }
        if ballot < self.disk.promised {
            let promised = self.disk.promised;
            self.send(from, ControlMsg::Preempted { promised });
            return;
        }
        if self.disk.promised < ballot {
            let token = self.write(Record::Promised(ballot), false);
            self.writes.vote = Some(token);
        }
        self.after_vote(Then::Promise { to: from, epoch, ballot });
    }

    /// The promise became durable. If the chain or the promise went on meanwhile, the proposer has to ask again.
    pub(super) fn tell_promise(&mut self, to: NodeId, epoch: Epoch, ballot: Ballot) {
        if self.epoch().next() != epoch || self.disk.promised != ballot {
            return;
        }
        let accepted = self.disk.accepted.as_ref().map(|a| (a.accept.ballot, Box::new(a.view.clone())));
        let state = self.disk.state;
        self.send(to, ControlMsg::Promise { epoch, ballot, state, accepted });
    }

    pub(super) fn on_accept(&mut self, from: NodeId, ballot: Ballot, delta: Delta) {
        let epoch = delta.epoch();
        if delta.cluster() != self.disk.cluster {
            return;
        }
        if !self.is_for_next(from, epoch) {
            if self.epoch() < epoch {
                // It overtook the decision it builds on, which is on its way most likely.
                self.early = Some((from, ballot, Box::new(delta)));
            }
            return;
        }
        let view = self.tip.as_ref().and_then(|tip| delta.apply(tip));
        let Some(view) = view.filter(|v| change::fault(v).is_none()) else { return };
        if ballot < self.disk.promised {
            let promised = self.disk.promised;
            self.send(from, ControlMsg::Preempted { promised });
            return;
        }
        let known = self
            .disk
            .accepted
            .as_ref()
            .filter(|a| a.accept.ballot == ballot && a.view == view)
            .map(|a| a.accept.clone());
        let accept = match known {
            Some(accept) => accept,
            None => {
                let acknowledged_ns_ago = self.acknowledged_ages(&view);
                let accept = Accept { state: self.disk.state, ballot, acknowledged_ns_ago };
                // From here on no life that the record removes is acknowledged, durable or not.
                let accepted = Accepted { view, accept: accept.clone() };
                let token = self.write(Record::Accepted(Box::new(accepted)), false);
                self.writes.vote = Some(token);
                accept
            }
        };
        self.after_vote(Then::Accepted { to: from, epoch, accept });
    }

    /// A record was installed: perhaps one that arrived too early is the next one now.
    pub(super) fn take_early(&mut self) {
        if self.stopped.is_none()
            && self.early.as_ref().is_some_and(|(_, _, delta)| delta.epoch() <= self.epoch().next())
            && let Some((from, ballot, delta)) = self.early.take()
            && delta.epoch() == self.epoch().next()
        {
            self.on_accept(from, ballot, *delta);
        }
    }

    /// Whether `epoch` is the next one here. Who is behind is helped, and who is ahead is asked.
    fn is_for_next(&mut self, from: NodeId, epoch: Epoch) -> bool {
        let next = self.epoch().next();
        if epoch < next {
            self.on_fetch(from, epoch);
        } else if next < epoch {
            self.fetch_from(from);
        }
        // A directory without a chain is nobody's acceptor (R4).
        epoch == next && self.tip.is_some()
    }

    /// How long ago each life that `view` removes was last acknowledged here (R8). An acceptor that restarted, or
    /// installed another voter set, does not know what was acknowledged before by those that counted then.
    pub(super) fn acknowledged_ages(&self, view: &View) -> BTreeMap<Identity, u64> {
        let floor = self.started.max(self.voters_since.1);
        let tip = self.tip.iter().flat_map(|v| v.identities());
        tip.filter(|who| !view.contains(*who))
            .map(|who| {
                let last = self.acks.given.get(&who).copied().unwrap_or(floor).max(floor);
                (who, u64::try_from(self.now.since(last).as_nanos()).unwrap_or(u64::MAX))
            })
            .collect()
    }
}
