//! Invariant (R17): when a version is first seen committed, a majority of the voters has it on disk.

use quorate_ccs::{Entry, Stored};
use quorate_membership::{NodeId, StateId, VoterSet};
use std::collections::BTreeMap;

/// A version is committed for the first time, by a coordinator with these voters.
pub(crate) fn check(entry: &Entry, voters: &VoterSet, disks: &BTreeMap<NodeId, Stored>) {
    let holds = |stored: &Stored| stored.newest().is_some_and(|e| entry.version <= e.version);
    let with: Vec<(NodeId, StateId)> = voters
        .voters
        .iter()
        .filter(|(n, _)| disks.get(n).is_some_and(holds))
        .map(|(n, v)| (*n, v.state))
        .collect();
    let enough = voters.has_majority(with.iter().map(|(n, s)| (n, s)));
    assert!(enough, "durable majority: version {} is committed with {} disks", entry.version, with.len());
}
