//! Who watches whom: everybody everybody up to [`MESH_MAX`] members, beyond that K observers on K rings.
//!
//! Rapid (USENIX ATC 2018, section 4.1): the members stand on K pseudo-random rings, and on each ring a member is
//! observed by the one before it. The union of the rings is an expander with high probability, so that a failed
//! or badly connected set always has many observers outside of it. Every process computes the same rings from the record.

use crate::{ClusterId, NodeId, View};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Up to so many members everybody watches everybody, and up to so many nodes in the roster everybody talks to all.
pub const MESH_MAX: usize = 16;
/// K: on so many rings a member of a larger cluster is watched. The paper's own choice.
pub const RINGS: usize = 10;

/// H of `k` observing edges: a member that so many report is failed. 9 of 10, as in the paper; all of fewer.
#[must_use]
pub fn high_watermark(k: usize) -> usize {
    k - k / 10
}

/// L of `k` observing edges: a member that so many report is unstable. 3 of 10, as in the paper; at least one.
#[must_use]
pub fn low_watermark(k: usize) -> usize {
    (3 * k).div_ceil(10).max(1)
}

/// The watching under one record.
#[derive(Clone, Debug, Default)]
pub(super) struct Watch {
    cluster: Option<ClusterId>,
    /// Whether the roster is so small that everybody talks to everybody in it.
    pub(super) small: bool,
    members: Arc<BTreeSet<NodeId>>,
    /// Whom this node observes.
    pub(super) subjects: BTreeSet<NodeId>,
    /// Who observes this node.
    pub(super) observers: BTreeSet<NodeId>,
    /// Observing edges of members that were asked about, one entry for each ring.
    edges: BTreeMap<NodeId, Arc<Vec<NodeId>>>,
}

impl Watch {
    /// The watching under `view` as node `me` has its part in it.
    pub(super) fn new(view: &View, me: NodeId) -> Self {
        let members: BTreeSet<NodeId> = view.members.keys().copied().collect();
        let mut watch = Self {
            cluster: Some(view.cluster),
            small: view.roster.len() <= MESH_MAX,
            members: Arc::new(members),
            ..Self::default()
        };
        if watch.members.contains(&me) {
            if watch.is_mesh() {
                watch.subjects = watch.members.iter().copied().filter(|n| *n != me).collect();
                watch.observers = watch.subjects.clone();
            } else {
                for ring in 0..RINGS {
                    watch.subjects.extend(watch.neighbour(ring, me, true));
                    watch.observers.extend(watch.neighbour(ring, me, false));
                }
            }
        }
        watch
    }

    fn is_mesh(&self) -> bool {
        self.members.len() <= MESH_MAX
    }

    /// A node's place on a ring. It depends on nothing but the cluster, the ring and the node, so a change of members
    /// moves the edges beside it and no others.
    fn place(&self, ring: usize, node: NodeId) -> (u64, NodeId) {
        let id = self.cluster.map_or([0; 16], |c| *c.as_bytes());
        let seed = id.chunks(8).fold(ring as u64, |sum, part| {
            let word = part.iter().fold(0_u64, |w, b| w << 8 | u64::from(*b));
            mix(sum ^ word)
        });
        (mix(seed ^ mix(u64::from(node.0))), node)
    }

    /// The member after `node` on a ring (its subject), or before it (its observer).
    fn neighbour(&self, ring: usize, node: NodeId, after: bool) -> Option<NodeId> {
        let own = self.place(ring, node);
        let others = self.members.iter().filter(|n| **n != node).map(|n| self.place(ring, *n));
        // Distance round the ring: what lies behind the own place comes last.
        let key = |p: &(u64, NodeId)| if after { (*p < own, *p) } else { (own < *p, *p) };
        let found = if after { others.min_by_key(key) } else { others.max_by_key(|p| (!key(p).0, *p)) };
        found.map(|(_, n)| n)
    }

    /// Who observes `subject`, one entry for each edge: on several rings it may be the same node.
    pub(super) fn edges(&mut self, subject: NodeId) -> Arc<Vec<NodeId>> {
        if let Some(known) = self.edges.get(&subject) {
            return Arc::clone(known);
        }
        let edges: Vec<NodeId> = if self.is_mesh() {
            self.members.iter().copied().filter(|n| *n != subject).collect()
        } else {
            (0..RINGS).filter_map(|ring| self.neighbour(ring, subject, false)).collect()
        };
        let edges = Arc::new(edges);
        self.edges.insert(subject, Arc::clone(&edges));
        edges
    }
}

/// The finalizer of SplitMix64.
fn mix(mut z: u64) -> u64 {
    z = z.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Incarnation, Role, RosterEntry};

    fn view(n: u32) -> View {
        let mut view = View::empty(ClusterId::from_bytes([7; 16]));
        for node in (1..=n).map(NodeId) {
            let entry =
                RosterEntry { name: node.to_string(), key: [0; 32], role: Role::Observer, addresses: vec![] };
            view.roster.insert(node, entry);
            view.members.insert(node, Incarnation(1));
        }
        view
    }

    #[test]
    fn sixteen_members_all_watch_each_other_and_seventeen_do_not() {
        let mut small = Watch::new(&view(16), NodeId(3));
        assert_eq!((small.subjects.len(), small.observers.len(), small.edges(NodeId(3)).len()), (15, 15, 15));
        let mut large = Watch::new(&view(17), NodeId(3));
        assert!(large.subjects.len() <= RINGS);
        assert_eq!(large.edges(NodeId(3)).len(), RINGS);
    }

    #[test]
    fn who_observes_and_who_is_observed_agree_at_all_nodes() {
        let view = view(60);
        let watches: Vec<Watch> = (1..=60).map(|n| Watch::new(&view, NodeId(n))).collect();
        let mut one = Watch::new(&view, NodeId(1));
        for (i, watch) in watches.iter().enumerate() {
            let me = NodeId(i as u32 + 1);
            assert_eq!(one.edges(me).iter().copied().collect::<BTreeSet<_>>(), watch.observers);
            for subject in &watch.subjects {
                assert!(watches[subject.0 as usize - 1].observers.contains(&me));
            }
        }
    }

    #[test]
    fn a_member_that_goes_moves_only_the_edges_beside_it() {
        let before = view(100);
        let mut after = before.clone();
        after.members.remove(&NodeId(50));
        let (mut a, mut b) = (Watch::new(&before, NodeId(1)), Watch::new(&after, NodeId(1)));
        let moved = (1..=100).filter(|n| *n != 50).filter(|n| a.edges(NodeId(*n)) != b.edges(NodeId(*n)));
        assert!(moved.count() <= RINGS);
    }

    /// The paper's condition: a small set has most of its observing edges coming from outside.
    #[test]
    fn ten_of_a_hundred_are_mostly_watched_from_outside() {
        let view = view(100);
        let mut watch = Watch::new(&view, NodeId(1));
        let inside: BTreeSet<NodeId> = (1..=10).map(NodeId).collect();
        let edges: Vec<NodeId> = inside.iter().flat_map(|n| watch.edges(*n).to_vec()).collect();
        let outside = edges.iter().filter(|o| !inside.contains(o)).count();
        assert!(75 <= outside, "{outside} of {}", edges.len());
    }

    #[test]
    fn watermarks_are_the_papers_for_ten_and_all_for_few() {
        assert_eq!((high_watermark(10), low_watermark(10)), (9, 3));
        for k in 1..10 {
            assert_eq!(high_watermark(k), k);
            assert!(1 <= low_watermark(k) && low_watermark(k) <= high_watermark(k));
        }
    }
}
