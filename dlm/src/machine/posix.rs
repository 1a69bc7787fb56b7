//! POSIX file locks: whatever one owner has on a resource is cut anew in one step at the master (R16).
//!
//! An owner is a process (or an open file description) of a node: the pair (life of the node, owner number). Its locks
//! are *pieces*, ordinary granted locks with disjoint ranges. A request with the flag POSIX names a range and a mode; once
//! nothing of another owner stands against it, every piece of its own owner is trimmed, split, merged or dropped in the
//! same step, so that nobody can ever come in between. NL as the mode ends what lies in the range.
//!
//! As in Linux (`fs/locks.c`), a new request is held up by granted locks only, never by others that wait; those are
//! served in the order in which they came. Holder and master both apply [`recut`] to what they know of the owner.

use super::{Context, Event, Lock, Pending, Resource};
use crate::{Completion, FencingToken, Flags, Grant, Holder, LockId, Mode, Range};

/// What is wrong with a conversion or an unlock of a POSIX lock.
pub(crate) const POSIX_BY_RANGE: &str = "POSIX locks are changed and ended by requests for their range";

/// What an owner has on a part of a resource.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    /// Its number at its node.
    pub(crate) id: LockId,
    /// The part.
    pub(crate) range: Range,
    /// The mode in force.
    pub(crate) mode: Mode,
    /// Of the grant in force.
    pub(crate) token: FencingToken,
}

/// The number of what is left to the right when the request `id` splits a piece: a request has two numbers.
pub(crate) fn spare(id: LockId) -> LockId {
    LockId(id.0 | crate::slots::SPARE)
}

/// What an owner has after it was granted `new`; its pieces so far are disjoint, and those of equal mode do not touch.
pub(crate) fn recut(pieces: impl IntoIterator<Item = Piece>, mut new: Piece) -> Vec<Piece> {
    let wanted = new.range;
    let mut out = Vec::new();
    for piece in pieces {
        let Range { start, end } = piece.range;
        if piece.mode == new.mode && touches(piece.range, wanted) {
            new.range = Range { start: new.range.start.min(start), end: new.range.end.max(end) };
            continue;
        }
        if !piece.range.overlaps(wanted) {
            out.push(piece);
            continue;
        }
        if start < wanted.start {
            out.push(Piece { range: Range { start, end: wanted.start - 1 }, ..piece });
        }
        if wanted.end < end {
            let id = if start < wanted.start { spare(new.id) } else { piece.id };
            out.push(Piece { id, range: Range { start: wanted.end + 1, end }, ..piece });
        }
    }
    if new.mode != Mode::NL {
        out.push(new);
    }
    out
}

/// Whether the two overlap or lie side by side.
fn touches(a: Range, b: Range) -> bool {
    a.start <= b.end.saturating_add(1) && b.start <= a.end.saturating_add(1)
}

/// The common part.
fn common(a: Range, b: Range) -> Option<Range> {
    a.overlaps(b).then(|| Range { start: a.start.max(b.start), end: a.end.min(b.end) })
}

impl Lock {
    /// Whether the two belong to one POSIX owner, so that they never stand against each other.
    pub(crate) fn is_of_owner_of(&self, other: &Self) -> bool {
        self.posix && other.posix && self.key.node == other.key.node && self.owner == other.owner
    }

    fn piece(&self) -> Option<Piece> {
        let mode = self.granted?;
        Some(Piece { id: self.key.id, range: self.range, mode, token: self.token })
    }
}

impl Resource {
    /// Gives a POSIX request what it waits for: its owner's pieces are cut anew.
    pub(super) fn grant_posix(
        &mut self,
        cx: &Context<'_>,
        lock: &Lock,
        pending: &Pending,
        out: &mut Vec<Event>,
    ) {
        self.sequence += 1;
        let token = FencingToken::new(cx.epoch, self.sequence);
        let new = Piece { id: lock.key.id, range: lock.range, mode: pending.mode, token };
        let pieces: Vec<Piece> =
            self.granted.iter().filter(|l| l.is_of_owner_of(lock)).filter_map(Lock::piece).collect();
        self.granted.retain(|l| !l.is_of_owner_of(lock));
        for piece in recut(pieces, new) {
            let mut cut = lock.clone();
            cut.key.id = piece.id;
            cut.pending = None;
            cut.since = cx.now;
            (cut.range, cut.granted, cut.token) = (piece.range, Some(piece.mode), piece.token);
            self.granted.push(cut);
        }
        let grant = Grant {
            mode: pending.mode,
            token,
            value: None,
            value_invalid: false,
            alt_mode: false,
            demoted: false,
        };
        out.push(self.done(lock.key, pending.op, Completion::Granted(grant)));
    }

    /// Answers a question (POSIX with TEST): who stands against the request, if anybody.
    pub(super) fn test_posix(&self, lock: &Lock, pending: &Pending) -> Completion {
        let first = self
            .granted
            .iter()
            .filter(|l| !l.is_of_owner_of(lock) && l.conflicts(pending.mode, lock.range))
            .min_by_key(|l| (l.range, l.key));
        if let Some(holder) = first {
            return Completion::Held(Holder {
                node: holder.key.node,
                owner: holder.owner,
                mode: holder.granted.unwrap_or(Mode::NL),
                range: holder.range,
            });
        }
        match self.assumed.iter().find(|a| a.conflicts(pending.mode, lock.range)) {
            // Nobody knows what it had: everything, as far as others are concerned.
            Some(assumed) => {
                Completion::Held(Holder { node: assumed.debtor, owner: 0, mode: Mode::EX, range: Range::ALL })
            }
            None => Completion::Granted(Grant {
                mode: Mode::NL,
                token: FencingToken::default(),
                value: None,
                value_invalid: false,
                alt_mode: false,
                demoted: false,
            }),
        }
    }

    /// After a rebuild: requests of owners whose answers may be lost.
    ///
    /// What gives something up is carried out, whether the old master had done so or not: its owner does not rely on it
    /// any more. Of the others, those had been granted beside whose owner's old pieces another survivor's cannot stand.
    pub(super) fn settle_posix(&mut self, cx: &Context<'_>, out: &mut Vec<Event>) {
        let mut at = 0;
        while let Some(lock) = self.waiting.get(at) {
            let Some(pending) = lock.pending.clone().filter(|_| lock.posix) else {
                at += 1;
                continue;
            };
            if pending.flags.has(Flags::TEST) {
                let lock = self.waiting.remove(at);
                let answer = self.test_posix(&lock, &pending);
                out.push(self.done(lock.key, pending.op, answer));
            } else if pending.mode == Mode::NL {
                let lock = self.waiting.remove(at);
                self.grant_posix(cx, &lock, &pending, out);
            } else {
                at += 1;
            }
        }
        let mut at = 0;
        while let Some(lock) = self.waiting.get(at) {
            let contradicted = lock.posix
                && self.granted.iter().filter(|mine| mine.is_of_owner_of(lock)).any(|mine| {
                    let part = common(mine.range, lock.range).zip(mine.granted);
                    let others = || self.granted.iter().filter(|o| !o.is_of_owner_of(lock));
                    part.is_some_and(|(range, mode)| others().any(|o| o.conflicts(mode, range)))
                });
            if !contradicted {
                at += 1;
                continue;
            }
            let mut lock = self.waiting.remove(at);
            if let Some(pending) = lock.pending.take() {
                self.grant_posix(cx, &lock, &pending, out);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn piece(id: u64, start: u64, end: u64, mode: Mode) -> Piece {
        Piece { id: LockId(id), range: Range { start, end }, mode, token: FencingToken::default() }
    }

    fn shown(mut pieces: Vec<Piece>) -> Vec<(u64, u64, u64, Mode)> {
        pieces.sort_by_key(|p| p.range);
        pieces.iter().map(|p| (p.id.0, p.range.start, p.range.end, p.mode)).collect()
    }

    #[test]
    fn an_unlock_in_the_middle_leaves_two_pieces_with_numbers_of_their_own() {
        let left = recut([piece(1, 0, 99, Mode::EX)], piece(32, 40, 59, Mode::NL));
        assert_eq!(shown(left), [(1, 0, 39, Mode::EX), (spare(LockId(32)).0, 60, 99, Mode::EX)]);
    }

    #[test]
    fn neighbours_of_one_mode_become_one_piece_and_those_of_another_stay() {
        let now = recut(
            [piece(1, 0, 9, Mode::PR), piece(2, 20, 29, Mode::PR), piece(3, 30, 39, Mode::EX)],
            piece(32, 10, 19, Mode::PR),
        );
        assert_eq!(shown(now), [(32, 0, 29, Mode::PR), (3, 30, 39, Mode::EX)]);
    }

    #[test]
    fn to_the_end_of_all_bytes_does_not_wrap() {
        let now = recut([piece(1, 0, u64::MAX, Mode::EX)], piece(32, u64::MAX, u64::MAX, Mode::PR));
        assert_eq!(shown(now), [(1, 0, u64::MAX - 1, Mode::EX), (32, u64::MAX, u64::MAX, Mode::PR)]);
        let none = recut([piece(1, 0, u64::MAX, Mode::EX)], piece(32, 0, u64::MAX, Mode::NL));
        assert!(none.is_empty());
    }

    proptest! {
        /// Against one mode per byte.
        #[test]
        fn cutting_says_what_a_byte_map_says(
            ops in proptest::collection::vec((0u64..32, 0u64..12, 0usize..3), 1..40),
        ) {
            const MODES: [Mode; 3] = [Mode::NL, Mode::PR, Mode::EX];
            let mut bytes = [Mode::NL; 64];
            let mut pieces: Vec<Piece> = Vec::new();
            for (n, (start, len, mode)) in ops.into_iter().enumerate() {
                let (end, mode) = (start + len, MODES[mode]);
                bytes[start as usize..=end as usize].fill(mode);
                let id = 32 * (n as u64 + 1);
                pieces = recut(pieces, piece(id, start, end, mode));
                let mut seen = [Mode::NL; 64];
                let mut ids = std::collections::BTreeSet::new();
                for p in &pieces {
                    prop_assert!(ids.insert(p.id), "a number twice");
                    for byte in &mut seen[p.range.start as usize..=p.range.end as usize] {
                        prop_assert_eq!(*byte, Mode::NL, "pieces overlap");
                        *byte = p.mode;
                    }
                }
                prop_assert_eq!(seen, bytes);
                for (i, a) in pieces.iter().enumerate() {
                    for b in &pieces[i + 1..] {
                        prop_assert!(a.mode != b.mode || !touches(a.range, b.range), "not merged");
                    }
                }
            }
        }
    }
}
