//! Which member keeps the directory of which names: buckets spread by highest random weight, so that a change of the
//! members moves the buckets of those who came or went and no others (Thaler and Ravishankar, 1998).

use crate::table::name_hash;
use quorate_membership::Identity;
use std::collections::BTreeSet;

/// How many buckets the names of a lockspace fall into. Part of the protocol.
pub(crate) const BUCKETS: u16 = 256;
/// How many machines share them. A name, its bucket and everything about it belong to one shard. Part of the protocol.
pub(crate) const SHARDS: u16 = 16;

const _: () = assert!(BUCKETS.is_multiple_of(SHARDS), "each shard has equally many buckets");

/// The bucket of a name.
pub(crate) fn bucket_of(name: &[u8]) -> u16 {
    u16::try_from((name_hash(name) >> 20) % u64::from(BUCKETS)).unwrap_or(0)
}

/// The shard of a bucket.
pub(crate) fn shard_of(bucket: u16) -> u16 {
    bucket % SHARDS
}

/// The buckets of a shard.
pub(crate) fn buckets_of(shard: u16) -> impl Iterator<Item = u16> {
    (0..BUCKETS).filter(move |b| shard_of(*b) == shard)
}

/// The member that keeps a bucket; `None` without members.
pub(crate) fn owner_of(bucket: u16, members: &BTreeSet<Identity>) -> Option<Identity> {
    members.iter().copied().max_by_key(|m| {
        let mut key = [0; 6];
        key[..2].copy_from_slice(&bucket.to_le_bytes());
        key[2..].copy_from_slice(&m.node.0.to_le_bytes());
        (name_hash(&key), m.node)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use quorate_membership::{Incarnation, NodeId};

    fn members(nodes: &[u32]) -> BTreeSet<Identity> {
        nodes.iter().map(|n| Identity::new(NodeId(*n), Incarnation(1))).collect()
    }

    #[test]
    fn buckets_are_spread_and_only_those_of_the_lost_move() {
        let (three, two) = (members(&[1, 2, 3]), members(&[1, 3]));
        let mut counts = [0; 4];
        for bucket in 0..BUCKETS {
            let owner = owner_of(bucket, &three).unwrap();
            counts[owner.node.0 as usize] += 1;
            if owner.node != NodeId(2) {
                assert_eq!(owner_of(bucket, &two), Some(owner));
            }
        }
        assert!(counts[1..].iter().all(|c| (60..110).contains(c)), "{counts:?}");
    }
}
