//! What a node keeps on disk: the counter of its lives, its promise, what it accepted, and the chain (R1, R4).

use super::kept::Chain;
use crate::delta::Step;
use crate::proof::{Accept, Ballot, Decision};
use crate::{
    Cause, ClusterId, Epoch, Incarnation, NodeId, QuorumOptions, RosterEntry, StateId, View, Voter, VoterSet,
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// How many decisions a node keeps at least, once it has them: a storage server that missed no more than these can
/// be brought up to date from any member (R9).
pub const CHAIN_KEPT_MIN: usize = 1_024;
/// How many it has when it drops old ones.
pub const CHAIN_KEPT_MAX: usize = 2_048;
/// The version of the encoding of [`Durable`] and [`Record`].
pub const STATE_VERSION: u8 = 2;

/// The contents of a state directory. Untrusted when read back; see [`Durable::decode`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Durable {
    /// The cluster it belongs to.
    pub cluster: ClusterId,
    /// The node it belongs to.
    pub node: NodeId,
    /// The directory's own name: this acceptor (R4).
    pub state: StateId,
    /// The newest life that was started on it. Zero: none yet.
    pub life: Incarnation,
    /// No proposal below this ballot is accepted any more, in any epoch that is not decided here.
    pub promised: Ballot,
    /// What was accepted for the epoch after the chain's end.
    pub accepted: Option<Accepted>,
    /// The newest decisions without gaps, oldest first. Empty in a directory that never learnt anything.
    pub chain: Chain,
}

/// A record this acceptor said yes to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accepted {
    /// The record.
    pub view: View,
    /// The yes, with its ballot.
    pub accept: Accept,
}

/// One change of [`Durable`]. Records are appended in the order in which they are put out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Record {
    /// A promise.
    Promised(Ballot),
    /// An accept; it implies the promise of its ballot.
    Accepted(Box<Accepted>),
    /// A decision. One that does not follow the chain's end replaces the chain.
    Decided(Box<Decision>),
    /// A decision that follows the chain's end.
    Step(Box<Step>),
}

/// Bytes that are no state of this version.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// Another version wrote it.
    #[error("the state has version {found}, this program reads version {STATE_VERSION}")]
    Version {
        /// In the bytes.
        found: u8,
    },
    /// Too short, too long or inconsistent.
    #[error("the state is damaged: {0}")]
    Damaged(&'static str),
}

impl Durable {
    /// A directory that knows its cluster and nothing else. It forms nothing and votes on nothing (R4).
    #[must_use]
    pub fn empty(cluster: ClusterId, node: NodeId, state: StateId) -> Self {
        Self {
            cluster,
            node,
            state,
            life: Incarnation(0),
            promised: Ballot::default(),
            accepted: None,
            chain: Chain::default(),
        }
    }

    /// The directory of a new cluster's first node: view 1 with this node as the one voter (R4). Done once, by
    /// `quorate cluster create`; `cluster` and `state` are random. `roster` should hold `node`, or it can never join.
    #[must_use]
    pub fn create(
        cluster: ClusterId,
        node: NodeId,
        state: StateId,
        roster: BTreeMap<NodeId, RosterEntry>,
    ) -> Self {
        Self::create_with(cluster, node, state, roster, QuorumOptions::default())
    }

    /// As [`Durable::create`], with quorum options that hold from view 1 on. Votes and expected votes have no place in
    /// them: there is one voter yet.
    #[must_use]
    pub fn create_with(
        cluster: ClusterId,
        node: NodeId,
        state: StateId,
        roster: BTreeMap<NodeId, RosterEntry>,
        quorum: QuorumOptions,
    ) -> Self {
        let voters = VoterSet {
            voters: BTreeMap::from([(node, Voter { state, votes: 1 })]),
            tie_breaker: None,
            expected: 0,
        };
        let view =
            View { epoch: Epoch(1), roster, voters, quorum, cause: Cause::Created, ..View::empty(cluster) };
        let accept = Accept { state, ballot: Ballot::default(), acknowledged_ns_ago: BTreeMap::new() };
        let mut durable = Self::empty(cluster, node, state);
        durable.chain.push(Decision { view, accepts: BTreeMap::from([(node, accept)]) });
        durable
    }

    /// Starts the next life and returns it. The driver makes the state durable before the first packet (R1).
    pub fn next_life(&mut self) -> Incarnation {
        self.life = Incarnation(self.life.0.saturating_add(1));
        self.life
    }

    /// After [`StopReason::RolledBack`](super::StopReason::RolledBack): what was promised here is not known any more,
    /// so the directory becomes another acceptor, which votes only after a voter-set change admitted it (R4).
    /// `state` is fresh and random; `known` is the newest life the cluster knows of.
    pub fn renounce(&mut self, state: StateId, known: Incarnation) {
        self.state = state;
        self.life = self.life.max(known);
        self.accepted = None;
    }

    /// The epoch of the newest decision; zero if there is none.
    #[must_use]
    pub fn tip(&self) -> Epoch {
        self.chain.epoch()
    }

    /// Carries out a record. Stale ones are without effect, so a log may be replayed over a newer snapshot.
    pub fn apply(&mut self, record: Record) {
        match record {
            Record::Promised(ballot) => self.promised = self.promised.max(ballot),
            Record::Accepted(accepted) => {
                self.promised = self.promised.max(accepted.accept.ballot);
                let newer = self.accepted.as_ref().is_none_or(|a| {
                    (a.view.epoch, a.accept.ballot) <= (accepted.view.epoch, accepted.accept.ballot)
                });
                if newer && self.tip() < accepted.view.epoch {
                    self.accepted = Some(*accepted);
                }
            }
            Record::Decided(decision) => self.chain.push(*decision),
            Record::Step(step) => self.chain.push_step(*step),
        }
        let tip = self.tip();
        if self.accepted.as_ref().is_some_and(|a| a.view.epoch <= tip) {
            self.accepted = None;
        }
    }

    /// The bytes of a snapshot, with a leading version.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        postcard::to_extend(self, vec![STATE_VERSION]).expect("plain data into memory always encodes")
    }

    /// Reads a snapshot back and checks it.
    ///
    /// # Errors
    /// See [`StateError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, StateError> {
        let durable: Self = decode(bytes)?;
        durable.check()?;
        Ok(durable)
    }

    /// Whether a node can go on from this: what was read is one state, not pieces of several.
    ///
    /// # Errors
    /// [`StateError::Damaged`].
    pub fn check(&self) -> Result<(), StateError> {
        if !self.chain.is_of(self.cluster) {
            return Err(StateError::Damaged("the chain is of another cluster"));
        }
        // Dropping it would break the promise that it is.
        if self.accepted.as_ref().is_some_and(|a| a.view.epoch != self.tip().next()) {
            return Err(StateError::Damaged("what was accepted does not follow the chain"));
        }
        if self.life.0 == u64::MAX {
            return Err(StateError::Damaged("no life can follow the last one"));
        }
        Ok(())
    }
}

impl Record {
    /// The bytes of one log entry, with a leading version.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        postcard::to_extend(self, vec![STATE_VERSION]).expect("plain data into memory always encodes")
    }

    /// Reads a log entry back.
    ///
    /// # Errors
    /// See [`StateError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, StateError> {
        decode(bytes)
    }
}

fn decode<T: serde::de::DeserializeOwned>(bytes: &[u8]) -> Result<T, StateError> {
    match bytes.split_first() {
        None => Err(StateError::Damaged("it is empty")),
        Some((&STATE_VERSION, rest)) => match postcard::take_from_bytes(rest) {
            Ok((value, [])) => Ok(value),
            Ok(_) => Err(StateError::Damaged("there are bytes after its end")),
            Err(_) => Err(StateError::Damaged("it does not decode")),
        },
        Some((&found, _)) => Err(StateError::Version { found }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Role;

    fn durable() -> Durable {
        Durable::create(
            ClusterId::from_bytes([1; 16]),
            NodeId(1),
            StateId::from_bytes([2; 16]),
            BTreeMap::from([(
                NodeId(1),
                RosterEntry { name: "a".into(), key: [3; 32], role: Role::Voter, addresses: vec![] },
            )]),
        )
    }

    #[test]
    fn a_snapshot_is_read_back_and_a_damaged_one_is_refused() {
        let d = durable();
        let bytes = d.encode();
        assert_eq!(Durable::decode(&bytes), Ok(d));
        for cut in 0..bytes.len() {
            assert!(Durable::decode(&bytes[..cut]).is_err());
        }
        assert_eq!(Durable::decode(&[9]), Err(StateError::Version { found: 9 }));
    }

    #[test]
    fn a_decision_ends_what_was_accepted_for_its_epoch_and_stale_records_change_nothing() {
        let mut d = durable();
        let first = d.chain.since(Epoch(0))[0].clone();
        let view = View { epoch: Epoch(2), ..first.view.clone() };
        let accept = Accept { ballot: Ballot { round: 3, node: 1 }, ..first.accepts[&NodeId(1)].clone() };
        let accepted = Record::Accepted(Box::new(Accepted { view: view.clone(), accept: accept.clone() }));
        d.apply(accepted.clone());
        assert_eq!(d.promised, accept.ballot);
        d.apply(Record::Decided(Box::new(Decision { view, accepts: BTreeMap::from([(NodeId(1), accept)]) })));
        assert_eq!((d.tip(), &d.accepted), (Epoch(2), &None));
        let before = d.clone();
        d.apply(accepted);
        d.apply(Record::Promised(Ballot::default()));
        d.apply(Record::Decided(Box::new(first)));
        assert_eq!(d, before);
    }
}
