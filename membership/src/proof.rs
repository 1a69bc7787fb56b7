//! Decided records with the accepts that prove them, and the check a storage server makes (R9).

use crate::{Cause, Epoch, Identity, NodeId, StateId, View, VoterSet};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The number of a proposal: higher wins. The node makes it unique.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Ballot {
    /// Grows with every attempt.
    pub round: u64,
    /// Who proposes.
    pub node: u32,
}

/// One acceptor's durable "yes" to a record in a ballot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accept {
    /// The state directory it was written to.
    pub state: StateId,
    /// The ballot it said yes in.
    pub ballot: Ballot,
    /// For every life the record removes: nanoseconds between this acceptor's last acknowledgement of its heartbeats
    /// and this accept (R8). Zero if the acceptor restarted or became a voter within the last lease.
    pub acknowledged_ns_ago: BTreeMap<Identity, u64>,
}

/// A record with its proof: accepts of one ballot by a majority of the voters of the record before it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decision {
    /// The record.
    pub view: View,
    /// Who accepted it.
    pub accepts: BTreeMap<NodeId, Accept>,
}

/// Why a chain of decisions proves nothing. Nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ChainError {
    /// The chain has a record of another cluster.
    #[error("the chain is of cluster {found}, this is cluster {expected}")]
    OtherCluster {
        /// In the chain.
        found: crate::ClusterId,
        /// Ours.
        expected: crate::ClusterId,
    },
    /// The chain does not continue where it should.
    #[error("the chain has epoch {found} where epoch {expected} must follow")]
    Gap {
        /// In the chain.
        found: Epoch,
        /// Wanted.
        expected: Epoch,
    },
    /// The accepts of this record are not of one ballot.
    #[error("the accepts of epoch {epoch} are of different ballots")]
    MixedBallots {
        /// The record.
        epoch: Epoch,
    },
    /// The record was forced by a person: no majority stands behind it.
    #[error("epoch {epoch} was forced by a person, not decided by a majority")]
    Forced {
        /// The record.
        epoch: Epoch,
    },
    /// The accepts of this record are no majority of the record before it.
    #[error("the accepts of epoch {epoch} are no majority of the voters before it")]
    NoMajority {
        /// The record.
        epoch: Epoch,
    },
}

/// Checks that `chain` leads from a record of `epoch` with these `voters`, record by record, and returns the newest view.
///
/// Records at or below `epoch` at the chain's start are skipped; `None` says that the chain holds nothing newer.
///
/// # Errors
/// The first link that does not hold.
pub fn verify_chain<'a>(
    cluster: crate::ClusterId,
    epoch: Epoch,
    voters: &VoterSet,
    chain: &'a [Decision],
) -> Result<Option<&'a View>, ChainError> {
    verify_chain_with(cluster, epoch, voters, chain, None)
}

/// As [`verify_chain`], but the record of epoch `forced` may be one that a person forced: a person says so here too.
/// It must be accepted by a majority of its own voters, so that it is whole.
///
/// # Errors
/// The first link that does not hold.
pub fn verify_chain_with<'a>(
    cluster: crate::ClusterId,
    epoch: Epoch,
    voters: &VoterSet,
    chain: &'a [Decision],
    forced: Option<Epoch>,
) -> Result<Option<&'a View>, ChainError> {
    let mut at = epoch;
    let mut voters = voters;
    let mut newest = None;
    for decision in chain.iter().skip_while(|d| d.view.epoch <= epoch) {
        let view = &decision.view;
        if view.cluster != cluster {
            return Err(ChainError::OtherCluster { found: view.cluster, expected: cluster });
        }
        if view.epoch != at.next() {
            return Err(ChainError::Gap { found: view.epoch, expected: at.next() });
        }
        let mut ballots = decision.accepts.values().map(|a| a.ballot);
        let first = ballots.next();
        if ballots.any(|b| Some(b) != first) {
            return Err(ChainError::MixedBallots { epoch: view.epoch });
        }
        let is_forced = matches!(view.cause, Cause::Forced { .. });
        if is_forced && forced != Some(view.epoch) {
            return Err(ChainError::Forced { epoch: view.epoch });
        }
        let voters_before = if is_forced { &view.voters } else { voters };
        if !voters_before.has_majority(decision.accepts.iter().map(|(n, a)| (n, &a.state))) {
            return Err(ChainError::NoMajority { epoch: view.epoch });
        }
        at = view.epoch;
        voters = &view.voters;
        newest = Some(view);
    }
    Ok(newest)
}
