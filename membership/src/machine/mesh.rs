//! The smallest set of members whose removal leaves a full mesh (R3): a minimum vertex cover of the broken pairs.

use crate::NodeId;
use std::collections::BTreeSet;

/// Up to so many nodes in broken pairs the smallest set is found exactly; beyond, the worst goes first, which removes
/// at most about ln(n) times as many.
const EXACT_MAX: usize = 16;

/// The smallest set of nodes whose removal leaves no broken pair; of equally small ones the one with fewest votes,
/// then with the highest node ids.
pub(super) fn smallest_cover(
    broken: &BTreeSet<(NodeId, NodeId)>,
    votes: impl Fn(NodeId) -> u32,
) -> BTreeSet<NodeId> {
    let nodes: Vec<NodeId> =
        broken.iter().flat_map(|(a, b)| [*a, *b]).collect::<BTreeSet<_>>().into_iter().collect();
    if EXACT_MAX < nodes.len() {
        return greedy(broken.clone(), &nodes, votes);
    }
    let edges: Vec<(u32, u32)> =
        broken.iter().filter_map(|(a, b)| Some((bit(&nodes, *a)?, bit(&nodes, *b)?))).collect();
    let lost = |set: u32| members(&nodes, set).map(&votes).fold(0, u32::saturating_add);
    let best = (0_u32..1 << nodes.len())
        .filter(|set| edges.iter().all(|(a, b)| set & (a | b) != 0))
        // The highest ids: the set that is largest as a number, its highest bit being the highest id.
        .min_by_key(|set| (set.count_ones(), lost(*set), core::cmp::Reverse(*set)));
    members(&nodes, best.unwrap_or(0)).collect()
}

fn bit(nodes: &[NodeId], node: NodeId) -> Option<u32> {
    nodes.binary_search(&node).ok().map(|i| 1 << i)
}

fn members(nodes: &[NodeId], set: u32) -> impl Iterator<Item = NodeId> + '_ {
    nodes.iter().enumerate().filter(move |(i, _)| set >> i & 1 == 1).map(|(_, n)| *n)
}

/// Whoever is in most pairs goes first; of equals the one with fewest votes, then the highest id.
fn greedy(
    mut left: BTreeSet<(NodeId, NodeId)>,
    nodes: &[NodeId],
    votes: impl Fn(NodeId) -> u32,
) -> BTreeSet<NodeId> {
    let mut cover = BTreeSet::new();
    while !left.is_empty() {
        let count = |n: &NodeId| left.iter().filter(|(a, b)| a == n || b == n).count();
        let worst = nodes.iter().max_by_key(|n| (count(n), core::cmp::Reverse(votes(**n)), **n)).copied();
        let Some(worst) = worst else { break };
        left.retain(|(a, b)| *a != worst && *b != worst);
        cover.insert(worst);
    }
    cover
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Rng;

    fn pairs(pairs: &[(u32, u32)]) -> BTreeSet<(NodeId, NodeId)> {
        pairs.iter().map(|(a, b)| (NodeId(*a), NodeId(*b))).collect()
    }

    fn cover(of: &[(u32, u32)], votes: impl Fn(NodeId) -> u32) -> Vec<u32> {
        smallest_cover(&pairs(of), votes).into_iter().map(|n| n.0).collect()
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
    fn a_chain_of_four_loses_the_two_that_cover_it_best() {
        assert_eq!(cover(&[(1, 2), (2, 3), (3, 4)], |_| 1), [2, 4]);
    }

    #[test]
    fn a_large_mesh_is_covered_too() {
        let star: Vec<_> = (2..=40).map(|n| (1, n)).collect();
        assert_eq!(cover(&star, |_| 1), [1]);
        assert_eq!(cover(&[], |_| 1), [] as [u32; 0]);
    }

    #[test]
    fn every_pair_is_covered_and_no_smaller_set_would_do() {
        let mut rng = Rng::new(1);
        for _ in 0..200 {
            let n = 2 + rng.below(6) as u32;
            let mut broken = BTreeSet::new();
            for a in 1..=n {
                for b in a + 1..=n {
                    if rng.chance_ppm(300_000) {
                        broken.insert((NodeId(a), NodeId(b)));
                    }
                }
            }
            let found = smallest_cover(&broken, |_| 1);
            assert!(broken.iter().all(|(a, b)| found.contains(a) || found.contains(b)));
            let smaller = (0_u32..1 << n).filter(|s| (s.count_ones() as usize) < found.len());
            let covers =
                |s: u32| broken.iter().all(|(a, b)| s >> (a.0 - 1) & 1 == 1 || s >> (b.0 - 1) & 1 == 1);
            assert!(!smaller.into_iter().any(covers), "{broken:?}: {found:?}");
            let nodes: Vec<NodeId> = (1..=n).map(NodeId).collect();
            let greedy = greedy(broken.clone(), &nodes, |_| 1);
            assert!(broken.iter().all(|(a, b)| greedy.contains(a) || greedy.contains(b)));
        }
    }
}
