//! POSIX locks as their holder knows them: the pieces of an owner, cut anew with each answer as the master did.

use super::Shard;
use super::local::LocalLock;
use crate::machine::posix::{Piece, recut};
use crate::{FencingToken, Flags, LockId, Mode};

impl LocalLock {
    fn piece(&self, id: LockId) -> Option<Piece> {
        Some(Piece { id, range: self.range, mode: self.granted?, token: self.token })
    }
}

impl Shard {
    /// Whether it belongs to a POSIX owner: nobody is told of it any more once it is granted.
    pub(crate) fn is_posix(&self, id: LockId) -> bool {
        self.locks.find(&id.0).is_some_and(|l| l.posix && l.granted.is_some())
    }

    /// The parts of a piece with the modes that may be used: what requests under way may give up does not count.
    #[cfg(any(test, feature = "sim"))]
    pub(super) fn usable_piece(
        &self,
        id: LockId,
        lock: &LocalLock,
    ) -> Vec<(LockId, crate::LockName, Mode, crate::Range)> {
        use crate::wire::Operation;
        let mut pieces: Vec<Piece> = lock.piece(id).filter(|_| !lock.is_ending()).into_iter().collect();
        let others = self.names.local(&lock.name).into_iter().flat_map(|n| &n.locks);
        for other in others.filter_map(|id| self.locks.find(&id.0)) {
            let is_cut = other.posix && other.owner == lock.owner && other.granted.is_none();
            for operation in other.operations.iter().map(|u| &u.numbered.operation).filter(|_| is_cut) {
                if let Operation::New { mode: Mode::NL | Mode::PR, range, .. } = operation
                    && !operation.is_test()
                {
                    let shared = matches!(operation, Operation::New { mode: Mode::PR, .. });
                    let inside = |p: &Piece| Piece {
                        range: crate::Range {
                            start: p.range.start.max(range.start),
                            end: p.range.end.min(range.end),
                        },
                        mode: Mode::PR,
                        ..*p
                    };
                    let kept: Vec<Piece> =
                        pieces.iter().filter(|p| shared && p.range.overlaps(*range)).map(inside).collect();
                    let cut = Piece {
                        id: LockId(0),
                        range: *range,
                        mode: Mode::NL,
                        token: FencingToken::default(),
                    };
                    pieces = recut(pieces, cut).into_iter().chain(kept).collect();
                }
            }
        }
        pieces.into_iter().map(|p| (id, lock.name.clone(), p.mode, p.range)).collect()
    }

    /// The master has granted the POSIX request `id`.
    pub(super) fn apply_posix(&mut self, id: LockId, (mode, token): (Mode, FencingToken)) {
        let Some(request) = self.locks.find(&id.0).cloned() else { return };
        let Some(name) = self.names.local(&request.name) else { return };
        let pieces: Vec<Piece> = name
            .locks
            .iter()
            .filter_map(|id| self.locks.find(&id.0).map(|l| (*id, l)))
            .filter(|(_, l)| l.posix && l.owner == request.owner)
            .filter_map(|(id, l)| l.piece(id))
            .collect();
        let old: Vec<LockId> = pieces.iter().map(|p| p.id).collect();
        let now = recut(pieces, Piece { id, range: request.range, mode, token });
        for piece in &now {
            if let Some(lock) = self.locks.find_mut(&piece.id.0) {
                (lock.range, lock.granted, lock.token) = (piece.range, Some(piece.mode), piece.token);
                continue;
            }
            let mut lock = request.clone();
            lock.operations.clear();
            (lock.range, lock.granted, lock.token) = (piece.range, Some(piece.mode), piece.token);
            self.locks.insert(piece.id.0, lock);
            self.lock_count += 1;
            self.owners.add(request.owner, piece.id, Flags::NONE);
            if let Some(name) = self.names.local_mut(&request.name) {
                name.locks.insert(piece.id);
            }
        }
        for gone in old.into_iter().filter(|id| now.iter().all(|p| p.id != *id)) {
            self.end(gone);
        }
    }
}
