//! What a client must be able to write again: acknowledged bytes that no flush has made durable yet (R12).

use crate::Buf;
use std::collections::BTreeMap;
use std::sync::Arc;

/// What a range holds.
#[derive(Clone, Debug)]
pub enum Content {
    /// These bytes, from this place in the buffer on.
    Data(Arc<Buf>, usize),
    /// Zeros.
    Zeroes {
        /// Leave the range allocated.
        no_hole: bool,
    },
}

impl Content {
    /// The same from `by` bytes further on.
    fn skip(&self, by: u64) -> Self {
        match self {
            Self::Data(buf, at) => Self::Data(Arc::clone(buf), at + by as usize),
            Self::Zeroes { no_hole } => Self::Zeroes { no_hole: *no_hole },
        }
    }
}

/// A retained range.
#[derive(Clone, Debug)]
pub struct Piece {
    /// Its end, not included.
    pub end: u64,
    /// What it holds.
    pub content: Content,
    /// The number of the acknowledgement it came with.
    pub acknowledged: u64,
}

/// What a piece costs beside its bytes: keeps tiny writes from taking unbounded memory.
const PIECE_COST_BYTES: u64 = 256;

/// The ranges, which never overlap: a later write replaces the earlier one where they meet.
#[derive(Debug, Default)]
pub struct Retained {
    pieces: BTreeMap<u64, Piece>,
    cost: u64,
}

impl Retained {
    /// How much memory it takes, roughly, in bytes.
    #[must_use]
    pub fn cost(&self) -> u64 {
        self.cost
    }

    /// Whether nothing is retained.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Start, and what is there, in order of place.
    pub fn iter(&self) -> impl Iterator<Item = (u64, &Piece)> {
        self.pieces.iter().map(|(start, piece)| (*start, piece))
    }

    /// A write of `start..end` was acknowledged and is not durable.
    pub fn insert(&mut self, start: u64, end: u64, content: Content, acknowledged: u64) {
        if start < end {
            self.remove(start, end);
            self.put(start, Piece { end, content, acknowledged });
        }
    }

    /// Nothing of `start..end` is to be written again.
    pub fn remove(&mut self, start: u64, end: u64) {
        if end <= start {
            return;
        }
        if let Some((at, piece)) = self.pieces.range(..start).next_back()
            && start < piece.end
        {
            let (at, piece) = (*at, piece.clone());
            self.take(at);
            self.put(at, Piece { end: start, ..piece.clone() });
            if end < piece.end {
                self.put(end, Piece { content: piece.content.skip(end - at), ..piece });
            }
        }
        while let Some(at) = self.pieces.range(start..end).next().map(|(at, _)| *at) {
            let Some(piece) = self.take(at) else { return };
            if end < piece.end {
                self.put(end, Piece { content: piece.content.skip(end - at), ..piece });
            }
        }
    }

    /// Everything acknowledged up to this number is durable.
    pub fn remove_acknowledged(&mut self, until: u64) {
        let cost = &mut self.cost;
        self.pieces.retain(|start, piece| {
            let keep = until < piece.acknowledged;
            if !keep {
                *cost -= cost_of(*start, piece);
            }
            keep
        });
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.pieces.clear();
        self.cost = 0;
    }

    fn put(&mut self, start: u64, piece: Piece) {
        self.cost += cost_of(start, &piece);
        let before = self.pieces.insert(start, piece);
        assert!(before.is_none(), "pieces do not overlap");
    }

    fn take(&mut self, start: u64) -> Option<Piece> {
        let piece = self.pieces.remove(&start)?;
        self.cost -= cost_of(start, &piece);
        Some(piece)
    }
}

fn cost_of(start: u64, piece: &Piece) -> u64 {
    let bytes = match &piece.content {
        Content::Data(..) => piece.end - start,
        Content::Zeroes { .. } => 0,
    };
    bytes + PIECE_COST_BYTES
}

#[cfg(test)]
mod tests {
    use super::*;

    proptest::proptest! {
        #[test]
        fn it_is_what_a_byte_array_with_the_same_operations_is(
            steps in proptest::collection::vec((0_u64..64, 1_u64..32, 0_u8..4), 1..60)
        ) {
            let mut model = [None::<(u8, u64)>; 128];
            let mut retained = Retained::default();
            for (i, (start, len, kind)) in steps.into_iter().enumerate() {
                let (n, end) = (i as u64 + 1, start + len);
                let range = start as usize..end as usize;
                match kind {
                    0 => {
                        retained.remove(start, end);
                        model[range].fill(None);
                    }
                    1 => {
                        retained.remove_acknowledged(n / 2);
                        model.iter_mut().for_each(|b| *b = b.filter(|(_, a)| n / 2 < *a));
                    }
                    2 => {
                        retained.insert(start, end, Content::Zeroes { no_hole: false }, n);
                        model[range].fill(Some((0, n)));
                    }
                    _ => {
                        let bytes: Vec<u8> = (0..len).map(|b| (n * 31 + b) as u8).collect();
                        for (at, b) in range.zip(&bytes) {
                            model[at] = Some((*b, n));
                        }
                        retained.insert(start, end, Content::Data(Arc::new(Buf::copy_of(&bytes)), 0), n);
                    }
                }
                let mut seen = [None::<(u8, u64)>; 128];
                let mut cost = 0;
                for (start, piece) in retained.iter() {
                    cost += cost_of(start, piece);
                    for at in start..piece.end {
                        let byte = match &piece.content {
                            Content::Data(buf, from) => buf[from + (at - start) as usize],
                            Content::Zeroes { .. } => 0,
                        };
                        proptest::prop_assert!(seen[at as usize].is_none());
                        seen[at as usize] = Some((byte, piece.acknowledged));
                    }
                }
                proptest::prop_assert_eq!(seen, model);
                proptest::prop_assert_eq!(cost, retained.cost());
            }
        }
    }
}
