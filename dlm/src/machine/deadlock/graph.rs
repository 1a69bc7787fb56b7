//! Who waits for whom, and cycles in it (R16).
//!
//! A user is an owner within a node, in all lockspaces, or a lock that nobody in particular owns. It gives nothing up
//! while it waits, so a cycle of users is a deadlock. A user that stands in its own way alone is no cycle: two locks of
//! one owner are its own business, and it may still unlock the first.

use crate::machine::Resource;
use crate::{Flags, LockId};
use quorate_membership::{Identity, Instant};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// The most blockers of one wait that are looked at. Those beyond it are not seen: a deadlock may be missed, none made up.
pub(crate) const BLOCKERS_MAX: usize = 256;

/// Who waits, or is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) enum User {
    /// All locks of one owner on one node.
    Owner { node: Identity, owner: u64 },
    /// A lock without owner; the lockspace is the hash of its name.
    Lock { node: Identity, space: u64, id: LockId },
}

impl User {
    fn of(node: Identity, space: u64, id: LockId, owner: u64) -> Self {
        if owner == 0 { Self::Lock { node, space, id } } else { Self::Owner { node, owner } }
    }
}

/// A waiting operation. The number never comes again, so whoever is seen twice has waited all the time in between.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct WaitKey {
    pub(crate) node: Identity,
    pub(crate) space: u64,
    pub(crate) id: LockId,
    pub(crate) op: u32,
}

/// What a wait waits for: a lock in its mode and range, or an entry ahead of it in the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct Blocker {
    pub(crate) user: User,
    pub(crate) id: LockId,
    /// Changes whenever the blocking lock changes: the number of its grant, or of its own waiting operation.
    pub(crate) stamp: Stamp,
}

/// See [`Blocker::stamp`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) enum Stamp {
    Granted(u64),
    Queued(u32),
}

/// One wait as its master sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Wait {
    pub(crate) key: WaitKey,
    pub(crate) user: User,
    pub(crate) priority: i8,
    /// NODLCKWT: never the victim.
    pub(crate) is_exempt: bool,
    /// For how long it has waited, in nanoseconds: a length, so that no clocks are compared.
    pub(crate) age: u64,
    pub(crate) blockers: Vec<Blocker>,
}

impl Resource {
    /// Adds what waits here. What waits for a failed node waits for its recovery, which is no deadlock.
    pub(crate) fn waits(&self, now: Instant, space: u64, without_order: bool, out: &mut Vec<Wait>) {
        let [granted, converting, waiting] = self.queues();
        let queued = |queue: &'static str| if queue == "convert" { converting } else { waiting };
        for queue in ["convert", "wait"] {
            for (at, lock) in queued(queue).iter().enumerate() {
                let Some(pending) = &lock.pending else { continue };
                let (node, id) = (lock.key.node, lock.key.id);
                let mut blockers: BTreeSet<Blocker> = granted
                    .iter()
                    .chain(converting)
                    .filter(|o| o.key != lock.key && !o.dead && !o.is_of_owner_of(lock))
                    .filter(|o| o.conflicts(pending.mode, pending.range))
                    .map(|o| Blocker {
                        user: User::of(o.key.node, space, o.key.id, o.owner),
                        id: o.key.id,
                        stamp: Stamp::Granted(o.token.sequence),
                    })
                    .collect();
                // POSIX requests are held up by what is granted alone.
                let in_order =
                    !pending.flags.has(Flags::NOORDER) && !pending.flags.has(Flags::RECOVERY) && !lock.posix;
                if in_order && !without_order {
                    let (ahead, before) = if queue == "convert" {
                        (&converting[..at], &[][..])
                    } else {
                        (converting, &waiting[..at])
                    };
                    for other in ahead.iter().chain(before) {
                        let Some(theirs) = &other.pending else { continue };
                        if theirs.range.overlaps(pending.range) {
                            blockers.insert(Blocker {
                                user: User::of(other.key.node, space, other.key.id, other.owner),
                                id: other.key.id,
                                stamp: Stamp::Queued(theirs.op),
                            });
                        }
                    }
                }
                out.push(Wait {
                    key: WaitKey { node, space, id, op: pending.op },
                    user: User::of(node, space, id, lock.owner),
                    priority: pending.priority,
                    is_exempt: pending.flags.has(Flags::NODLCKWT),
                    age: u64::try_from(now.since(lock.since).as_nanos()).unwrap_or(u64::MAX),
                    blockers: blockers.into_iter().take(BLOCKERS_MAX).collect(),
                });
            }
        }
    }
}

/// A step of a path through the graph: a user, the wait that led to it, and its edges that were not followed yet.
type Step<'a> = (User, Option<&'a Wait>, Vec<(&'a Wait, User)>);

/// All waits that were seen in one walk.
#[derive(Clone, Debug, Default)]
pub(crate) struct Graph(BTreeMap<WaitKey, Wait>);

impl Graph {
    /// Takes one in. A resource on the move may be seen twice; either view of it is true of some moment of the walk.
    pub(crate) fn add(&mut self, wait: Wait) {
        self.0.entry(wait.key).or_insert(wait);
    }

    pub(crate) fn add_all(&mut self, other: &Self) {
        other.0.values().for_each(|w| self.add(w.clone()));
    }

    pub(crate) fn forget(&mut self, key: WaitKey) {
        self.0.remove(&key);
    }

    pub(crate) fn has(&self, key: &WaitKey) -> bool {
        self.0.contains_key(key)
    }

    /// What is in both walks without a change in between: all of it held at one moment, the end of the first.
    pub(crate) fn unchanged_in(&self, later: &Self) -> Self {
        let both = self.0.iter().filter_map(|(key, wait)| {
            let again = later.0.get(key)?;
            let blockers = wait.blockers.iter().filter(|b| again.blockers.contains(b)).copied().collect();
            Some((*key, Wait { blockers, ..again.clone() }))
        });
        Self(both.collect())
    }

    /// A cycle: its waits in order.
    pub(crate) fn cycle(&self) -> Option<Vec<&Wait>> {
        let mut by_user: BTreeMap<User, Vec<&Wait>> = BTreeMap::new();
        for wait in self.0.values() {
            by_user.entry(wait.user).or_default().push(wait);
        }
        let mut seen: BTreeSet<User> = BTreeSet::new();
        for start in by_user.keys() {
            if seen.contains(start) {
                continue;
            }
            // Depth first without recursion.
            let mut path: Vec<Step<'_>> = vec![(*start, None, Self::edges(&by_user, *start))];
            seen.insert(*start);
            while let Some((_, _, edges)) = path.last_mut() {
                let Some((wait, to)) = edges.pop() else {
                    path.pop();
                    continue;
                };
                if let Some(from) = path.iter().position(|(user, ..)| *user == to) {
                    let inner = path.iter().skip(from + 1).filter_map(|(_, by, _)| *by);
                    return Some(inner.chain([wait]).collect());
                }
                if seen.insert(to) {
                    path.push((to, Some(wait), Self::edges(&by_user, to)));
                }
            }
        }
        None
    }

    fn edges<'a>(by_user: &BTreeMap<User, Vec<&'a Wait>>, user: User) -> Vec<(&'a Wait, User)> {
        let waits = by_user.get(&user).into_iter().flatten();
        waits.flat_map(|w| w.blockers.iter().map(|b| (*w, b.user))).filter(|(_, to)| *to != user).collect()
    }

    /// Ends all cycles: whom to refuse, and cycles in which everybody is exempt.
    pub(crate) fn resolve(mut self) -> (Vec<WaitKey>, Vec<Vec<WaitKey>>) {
        let (mut victims, mut undecided) = (Vec::new(), Vec::new());
        while let Some(cycle) = self.cycle() {
            let keys: Vec<WaitKey> = cycle.iter().map(|w| w.key).collect();
            let candidates = cycle.iter().filter(|w| !w.is_exempt);
            // The lowest priority; among equals the youngest; among twins any, but always the same.
            let victim = candidates.min_by_key(|w| (w.priority, w.age, core::cmp::Reverse(w.key)));
            match victim.map(|w| w.key) {
                Some(victim) => {
                    victims.push(victim);
                    self.forget(victim);
                }
                None => {
                    if let Some(first) = keys.first() {
                        self.forget(*first);
                    }
                    undecided.push(keys);
                }
            }
        }
        (victims, undecided)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use quorate_membership::{Incarnation, NodeId};

    fn who(n: u32) -> Identity {
        Identity::new(NodeId(n), Incarnation(1))
    }

    fn user(n: u32) -> User {
        User::Owner { node: who(n), owner: 1 }
    }

    fn wait(n: u32, op: u32, age: u64, on: &[u32]) -> Wait {
        let blocker = |b: &u32| Blocker { user: user(*b), id: LockId(1), stamp: Stamp::Granted(1) };
        Wait {
            key: WaitKey { node: who(n), space: 0, id: LockId(9), op },
            user: user(n),
            priority: 0,
            is_exempt: false,
            age,
            blockers: on.iter().map(blocker).collect(),
        }
    }

    fn graph(waits: impl IntoIterator<Item = Wait>) -> Graph {
        let mut graph = Graph::default();
        waits.into_iter().for_each(|w| graph.add(w));
        graph
    }

    #[test]
    fn the_youngest_of_a_cycle_is_the_victim_and_priority_goes_first() {
        let three = || [wait(1, 1, 30, &[2]), wait(2, 1, 10, &[3]), wait(3, 1, 20, &[1, 4])];
        assert_eq!(graph(three()).resolve().0, [three()[1].key]);
        let mut weighed = three();
        weighed[0].priority = -1;
        assert_eq!(graph(weighed.clone()).resolve().0, [weighed[0].key]);
        weighed[0].is_exempt = true;
        assert_eq!(graph(weighed).resolve().0, [three()[1].key]);
        let exempt = three().map(|w| Wait { is_exempt: true, ..w });
        let (victims, undecided) = graph(exempt).resolve();
        assert_eq!((victims.len(), undecided.len()), (0, 1));
        assert_eq!(undecided[0].len(), 3);
    }

    #[test]
    fn chains_and_waits_for_oneself_are_no_cycles() {
        assert!(
            graph([wait(1, 1, 1, &[2, 3]), wait(2, 1, 1, &[3]), wait(3, 1, 1, &[3, 4])]).cycle().is_none()
        );
    }

    #[test]
    fn two_cycles_through_one_user_end_with_one_victim_if_that_is_enough() {
        // 1 waits for 2 and 3, both wait for 1: 1 is the youngest.
        let both = graph([wait(1, 1, 1, &[2, 3]), wait(2, 1, 5, &[1]), wait(3, 1, 6, &[1])]);
        assert_eq!(both.resolve().0.len(), 1);
    }

    #[test]
    fn a_cycle_that_changed_between_the_walks_is_none() {
        let first = graph([wait(1, 1, 1, &[2]), wait(2, 1, 1, &[1])]);
        assert!(first.unchanged_in(&first).cycle().is_some());
        // Another operation of the same lock, or another grant of the lock that blocks.
        assert!(first.unchanged_in(&graph([wait(1, 2, 1, &[2]), wait(2, 1, 1, &[1])])).cycle().is_none());
        let mut regranted = wait(1, 1, 1, &[2]);
        regranted.blockers[0].stamp = Stamp::Granted(2);
        assert!(first.unchanged_in(&graph([regranted, wait(2, 1, 1, &[1])])).cycle().is_none());
    }
}
