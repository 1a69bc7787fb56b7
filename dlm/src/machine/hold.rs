//! Locks that a failed node is assumed to have, where nobody left knows them (R13, R14).

use super::Lock;
use crate::{Mode, Range};
use quorate_membership::Identity;

/// A set of modes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ModeSet(u8);

impl ModeSet {
    const ALL: Self = Self(0b11_1111);

    fn keep(&mut self, wanted: impl Fn(Mode) -> bool) {
        for mode in Mode::ALL {
            if !wanted(mode) {
                self.0 &= !(1 << mode as u8);
            }
        }
    }

    fn any(self, wanted: impl Fn(Mode) -> bool) -> bool {
        Mode::ALL.into_iter().any(|m| self.0 & (1 << m as u8) != 0 && wanted(m))
    }
}

/// What a failed node may have had on a resource: any mode that was compatible with what the survivors have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Assumed {
    /// The failed life.
    pub(crate) debtor: Identity,
    /// Disjoint ranges, and the modes it may have there.
    pieces: Vec<(Range, ModeSet)>,
}

impl Assumed {
    /// Bounded by the locks that survivors have granted at this moment, each within its own range.
    ///
    /// Computed once, when the last survivor has registered: a survivor that gives its lock up later proves nothing new.
    pub(crate) fn bounded_by<'a>(debtor: Identity, survivors: impl Iterator<Item = &'a Lock>) -> Self {
        let mut pieces = vec![(Range::ALL, ModeSet::ALL)];
        for lock in survivors.filter(|l| !l.dead) {
            let Some(granted) = lock.granted else { continue };
            pieces =
                pieces.into_iter().flat_map(|(range, set)| split(range, set, lock.range, granted)).collect();
        }
        Self { debtor, pieces }
    }

    /// Whether one of the modes it may have stands against `mode` on `range`.
    pub(crate) fn conflicts(&self, mode: Mode, range: Range) -> bool {
        self.pieces.iter().any(|(r, set)| r.overlaps(range) && set.any(|m| !m.is_compatible(mode)))
    }

    /// Once it is fenced: only modes from `weakest` on still matter (R14). False if nothing is left of it.
    pub(crate) fn keep_holds(&mut self, weakest: Mode) -> bool {
        for (_, set) in &mut self.pieces {
            set.keep(|m| weakest <= m);
        }
        self.pieces.retain(|(_, set)| set.0 != 0);
        !self.pieces.is_empty()
    }
}

fn split(range: Range, set: ModeSet, lock: Range, granted: Mode) -> Vec<(Range, ModeSet)> {
    if !range.overlaps(lock) {
        return vec![(range, set)];
    }
    let mut out = Vec::with_capacity(3);
    if range.start < lock.start {
        out.push((Range { start: range.start, end: lock.start - 1 }, set));
    }
    let mut bounded = set;
    bounded.keep(|m| granted.is_compatible(m));
    out.push((Range { start: range.start.max(lock.start), end: range.end.min(lock.end) }, bounded));
    if lock.end < range.end {
        out.push((Range { start: lock.end + 1, end: range.end }, set));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::LockKey;
    use crate::{FencingToken, LockId};
    use quorate_membership::{Incarnation, NodeId};

    fn lock(granted: Mode, start: u64, end: u64) -> Lock {
        Lock {
            key: LockKey { node: Identity::new(NodeId(1), Incarnation(1)), id: LockId(1) },
            owner: 0,
            range: Range { start, end },
            granted: Some(granted),
            pending: None,
            token: FencingToken::default(),
            told: None,
            uses_value: false,
            recovery: false,
            dead: false,
            since: quorate_membership::Instant(0),
            posix: false,
        }
    }

    fn dead() -> Identity {
        Identity::new(NodeId(9), Incarnation(1))
    }

    #[test]
    fn a_survivors_lock_bounds_the_dead_ones_mode_within_its_range() {
        let locks = [lock(Mode::PR, 10, 19)];
        let assumed = Assumed::bounded_by(dead(), locks.iter());
        // Beside PR the dead node had PR at most: another PR is no conflict there, a CW is.
        assert!(!assumed.conflicts(Mode::PR, Range { start: 10, end: 19 }));
        assert!(assumed.conflicts(Mode::CW, Range { start: 10, end: 19 }));
        assert!(assumed.conflicts(Mode::PR, Range { start: 10, end: 20 }));
        assert!(assumed.conflicts(Mode::CR, Range { start: 0, end: 9 }));
        assert!(!assumed.conflicts(Mode::NL, Range::ALL));
    }

    #[test]
    fn a_bounded_mode_below_the_hold_leaves_no_hold() {
        let locks = [lock(Mode::PR, 0, u64::MAX)];
        let mut assumed = Assumed::bounded_by(dead(), locks.iter());
        assert!(!assumed.keep_holds(Mode::EX));
        let mut unbounded = Assumed::bounded_by(dead(), [].into_iter());
        assert!(unbounded.keep_holds(Mode::EX));
        assert!(unbounded.conflicts(Mode::CR, Range::ALL));
    }
}
