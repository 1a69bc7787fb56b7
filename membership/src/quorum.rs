//! Quorum arithmetic, and the options by which the voter set follows the members (R4, R5).
//!
//! The rule never changes: a strict majority of the votes of a voter set. Options only say what the next set is, and the
//! next set is decided by the present one.

use crate::{NodeId, StateId, Voter, VoterSet};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// The most votes of one node.
pub const NODE_VOTES_MAX: u32 = 1_000;
/// The largest `expected_votes`.
pub const EXPECTED_VOTES_MAX: u32 = 100_000;
/// The shortest last-man-standing window, in milliseconds: shorter ones would act on a node that is just restarting.
pub const WINDOW_MS_MIN: u32 = 1_000;
/// The longest, in milliseconds: a day.
pub const WINDOW_MS_MAX: u32 = 86_400_000;

/// How the voter set follows the members. Everything in it is part of the view record and changed by decided records only.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QuorumOptions {
    /// Votes of nodes that have another number than one. At most [`NODE_VOTES_MAX`] each; zero is allowed.
    pub votes: BTreeMap<NodeId, u32>,
    /// The voter set counts as if it had at least so many votes; zero: as many as it has. Raising it makes quorum harder,
    /// never easier: votes that nobody has are never cast. votequorum's `expected_votes`.
    pub expected_votes: u32,
    /// After all members were gone, nobody comes in before every vote of the voter set is present.
    pub wait_for_all: bool,
    /// Which node has half a vote more; `None` leaves [`VoterSet::tie_breaker`] as it is.
    pub tie_breaker: Option<TieBreaker>,
    /// After a voter was away for so many milliseconds, the others, if they are quorate, go on without its vote.
    /// [`WINDOW_MS_MIN`] to [`WINDOW_MS_MAX`].
    pub last_man_standing_ms: Option<u32>,
    /// Whether a node that leaves cleanly takes its vote along, as long as others have votes.
    pub allow_downscale: bool,
}

/// Which voter has half a vote more than its votes, so that one of two equal halves goes on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TieBreaker {
    /// The member with the lowest id.
    Lowest,
    /// The member with the highest id.
    Highest,
    /// The first of these that is a member.
    List(Vec<NodeId>),
}

impl TieBreaker {
    /// The node chosen among `voters`, those that are members before the others; `None` if a list names none of them.
    #[must_use]
    pub fn choose(&self, voters: &BTreeSet<NodeId>, members: &BTreeSet<NodeId>) -> Option<NodeId> {
        let pick = |from: &BTreeSet<NodeId>| match self {
            Self::Lowest => from.first().copied(),
            Self::Highest => from.last().copied(),
            Self::List(nodes) => nodes.iter().find(|n| from.contains(n)).copied(),
        };
        let inside: BTreeSet<NodeId> = voters.intersection(members).copied().collect();
        pick(&inside).or_else(|| pick(voters))
    }
}

impl QuorumOptions {
    /// The votes that `node` is meant to have.
    #[must_use]
    pub fn votes_of(&self, node: NodeId) -> u32 {
        self.votes.get(&node).copied().unwrap_or(1)
    }

    /// What is wrong with the options in themselves, if anything.
    #[must_use]
    pub fn fault(&self) -> Option<&'static str> {
        let listed: Option<&Vec<NodeId>> = match &self.tie_breaker {
            Some(TieBreaker::List(nodes)) => Some(nodes),
            _ => None,
        };
        let doubled = listed.is_some_and(|l| l.iter().collect::<BTreeSet<_>>().len() != l.len());
        let window = self.last_man_standing_ms;
        [
            (self.votes.values().any(|v| NODE_VOTES_MAX < *v), "more than 1000 votes for one node"),
            (crate::machine::ROSTER_MAX < self.votes.len(), "votes for more nodes than a roster may name"),
            (EXPECTED_VOTES_MAX < self.expected_votes, "expected_votes is above 100000"),
            (window.is_some_and(|w| w < WINDOW_MS_MIN), "the last-man-standing window is below one second"),
            (window.is_some_and(|w| WINDOW_MS_MAX < w), "the last-man-standing window is above one day"),
            (listed.is_some_and(Vec::is_empty), "the list of tie breakers is empty"),
            (
                listed.is_some_and(|l| crate::machine::ROSTER_MAX < l.len()),
                "the list of tie breakers is longer than a roster",
            ),
            (doubled, "the list of tie breakers names a node twice"),
        ]
        .into_iter()
        .find(|(wrong, _)| *wrong)
        .map(|(_, what)| what)
    }
}

/// Votes counted against a voter set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tally {
    /// Votes present.
    pub have: u32,
    /// Votes there are, [`VoterSet::expected`] included.
    pub all: u32,
    /// Whether a tie breaker is set.
    pub tie_breaker: bool,
    /// Whether it is among those present.
    pub tie_breaker_here: bool,
}

impl Tally {
    /// Whether they are a strict majority, half a vote counted for the tie breaker.
    #[must_use]
    pub fn is_majority(self) -> bool {
        let halves = |votes: u32, tie: bool| 2 * u64::from(votes) + u64::from(tie);
        halves(self.all, self.tie_breaker) < 2 * halves(self.have, self.tie_breaker_here)
    }

    /// The fewest votes that suffice without the tie breaker.
    #[must_use]
    pub fn needed(self) -> u32 {
        self.all / 2 + 1
    }

    /// Whether the tie breaker's half a vote decided it, the one way or the other.
    #[must_use]
    pub fn is_tie(self) -> bool {
        self.tie_breaker && u64::from(self.all) == 2 * u64::from(self.have)
    }
}

impl core::fmt::Display for Tally {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{} of {} votes, {} needed", self.have, self.all, self.needed())?;
        match (self.is_tie(), self.tie_breaker_here) {
            (true, true) => write!(f, "; exactly half, with the tie breaker"),
            (true, false) => write!(f, "; exactly half, without the tie breaker"),
            (false, _) => Ok(()),
        }
    }
}

impl VoterSet {
    /// The votes of the set: those of its voters, or `expected` if that is more.
    #[must_use]
    pub fn all_votes(&self) -> u32 {
        let sum = self.voters.values().fold(0_u32, |sum, v| sum.saturating_add(v.votes));
        sum.max(self.expected)
    }

    /// Counts the votes of `who`. An acceptor with another state directory than the set's does not count.
    #[must_use]
    pub fn tally<'a>(&self, who: impl IntoIterator<Item = (&'a NodeId, &'a StateId)>) -> Tally {
        let here: BTreeMap<NodeId, Voter> = who
            .into_iter()
            .filter_map(|(n, state)| self.voters.get(n).filter(|v| v.state == *state).map(|v| (*n, *v)))
            .collect();
        Tally {
            have: here.values().fold(0, |sum, v| sum.saturating_add(v.votes)),
            all: self.all_votes(),
            tie_breaker: self.tie_breaker.is_some(),
            tie_breaker_here: self.tie_breaker.is_some_and(|t| here.contains_key(&t)),
        }
    }

    /// Counts the votes of these nodes, with the state directories that the set names.
    #[must_use]
    pub fn tally_nodes(&self, nodes: &BTreeSet<NodeId>) -> Tally {
        let here = self.voters.iter().filter(|(n, _)| nodes.contains(n));
        self.tally(here.map(|(n, v)| (n, &v.state)))
    }

    /// Whether `who` holds a strict majority of all votes of the set, half a vote counted for the tie breaker.
    ///
    /// An acceptor with another state directory than the set's does not count.
    #[must_use]
    pub fn has_majority<'a>(&self, who: impl IntoIterator<Item = (&'a NodeId, &'a StateId)>) -> bool {
        self.tally(who).is_majority()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(votes: &[(u32, u32)], tie: Option<u32>) -> VoterSet {
        let voters = votes
            .iter()
            .map(|(n, v)| (NodeId(*n), Voter { state: StateId::from_bytes([*n as u8; 16]), votes: *v }))
            .collect();
        VoterSet { voters, tie_breaker: tie.map(NodeId), expected: 0 }
    }

    fn majority(set: &VoterSet, who: &[u32]) -> bool {
        let who: Vec<_> = who.iter().map(|n| (NodeId(*n), StateId::from_bytes([*n as u8; 16]))).collect();
        set.has_majority(who.iter().map(|(n, s)| (n, s)))
    }

    #[test]
    fn half_of_the_votes_is_no_majority() {
        let four = set(&[(1, 1), (2, 1), (3, 1), (4, 1)], None);
        assert!(!majority(&four, &[1, 2]));
        assert!(majority(&four, &[1, 2, 3]));
    }

    #[test]
    fn the_tie_breaker_decides_between_two_halves_and_only_there() {
        let four = set(&[(1, 1), (2, 1), (3, 1), (4, 1)], Some(1));
        assert!(majority(&four, &[1, 2]));
        assert!(!majority(&four, &[3, 4]));
        assert!(majority(&four, &[2, 3, 4]));
        assert!(!majority(&four, &[1]));
    }

    #[test]
    fn another_state_directory_is_another_acceptor() {
        let one = set(&[(1, 1)], None);
        assert!(!one.has_majority([(&NodeId(1), &StateId::from_bytes([9; 16]))]));
    }

    #[test]
    fn naming_a_voter_twice_counts_it_once() {
        let three = set(&[(1, 1), (2, 1), (3, 1)], None);
        assert!(!majority(&three, &[1, 1]));
    }

    #[test]
    fn no_voters_means_no_majority() {
        assert!(!majority(&set(&[], None), &[]));
    }

    #[test]
    fn expected_votes_make_quorum_harder_and_never_easier() {
        let mut three = set(&[(1, 1), (2, 1), (3, 1)], None);
        three.expected = 5;
        assert!(!majority(&three, &[1, 2]));
        assert!(majority(&three, &[1, 2, 3]));
        three.expected = 1;
        assert!(!majority(&three, &[1]), "three votes are three votes whatever was expected");
        assert!(majority(&three, &[1, 2]));
    }

    #[test]
    fn a_tie_breaker_is_a_member_if_one_of_the_wanted_is() {
        let nodes = |list: &[u32]| list.iter().map(|n| NodeId(*n)).collect::<BTreeSet<_>>();
        let (voters, members) = (nodes(&[1, 2, 3, 4]), nodes(&[2, 3]));
        assert_eq!(TieBreaker::Lowest.choose(&voters, &members), Some(NodeId(2)));
        assert_eq!(TieBreaker::Highest.choose(&voters, &members), Some(NodeId(3)));
        let list = TieBreaker::List(vec![NodeId(4), NodeId(3)]);
        assert_eq!(list.choose(&voters, &members), Some(NodeId(3)));
        assert_eq!(list.choose(&voters, &nodes(&[1])), Some(NodeId(4)), "none is in: the first that votes");
        assert_eq!(TieBreaker::List(vec![NodeId(9)]).choose(&voters, &members), None);
    }

    #[test]
    fn no_two_disjoint_parts_are_both_a_majority_whatever_the_votes() {
        let mut rng = crate::Rng::new(5);
        for _ in 0..2_000 {
            let votes: Vec<(u32, u32)> = (1..=6).map(|n| (n, rng.below(4) as u32)).collect();
            let tie = rng.chance_ppm(500_000).then(|| 1 + rng.below(6) as u32);
            let mut set = set(&votes, tie);
            set.expected = rng.below(15) as u32;
            let (left, right): (Vec<u32>, Vec<u32>) = (1..=6).partition(|_| rng.chance_ppm(500_000));
            assert!(!(majority(&set, &left) && majority(&set, &right)), "{set:?} {left:?} {right:?}");
        }
    }
}
