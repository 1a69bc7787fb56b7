//! The header of a directory leaf.
//!
//! | offset | bytes | field | offset | bytes | field |
//! |---|---|---|---|---|---|
//! | 24 | 2 | depth | 40 | 8 | directory |
//! | 26 | 2 | entries | 48 | 4 | place in the chain |
//! | 28 | 4 | dirent format | 52, 56 | 4, 8 | time of the last change |
//! | 32 | 8 | next in the chain | 104 | | dirents |

use super::bytes::{head, i64_at, put_i64, put_u16, put_u32, put_u64, u16_at, u32_at, u64_at};
use super::{BlockNo, FormatError, MetaHeader, MetaType, PAYLOAD_FORMAT_DIRENTS, Timestamp};

/// The length of the header.
pub const LEAF_BYTES: usize = 104;

/// A leaf without its dirents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// The journal of the node that last logged the block; for information only.
    pub jid: u32,
    /// How many bits of the hash it distinguishes.
    pub depth: u16,
    /// Live dirents in this block.
    pub entries: u16,
    /// The overflow leaf, if there is one.
    pub next: BlockNo,
    /// The directory.
    pub inode: BlockNo,
    /// 1 for a leaf that the table names, 2.. along a chain; 0 in old filesystems.
    pub dist: u32,
    /// Of the last insertion or removal.
    pub changed: Timestamp,
}

impl Leaf {
    /// Reads a leaf's header.
    ///
    /// # Errors
    /// Too short, or no leaf.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let bytes = head("leaf", bytes, LEAF_BYTES)?;
        let header = MetaHeader::expect(bytes, MetaType::Leaf)?;
        Ok(Self {
            jid: header.jid,
            depth: u16_at(bytes, 24),
            entries: u16_at(bytes, 26),
            next: BlockNo(u64_at(bytes, 32)),
            inode: BlockNo(u64_at(bytes, 40)),
            dist: u32_at(bytes, 48),
            changed: Timestamp { sec: i64_at(bytes, 56), nsec: u32_at(bytes, 52) },
        })
    }

    /// Writes the header, and leaves the dirents.
    ///
    /// # Panics
    /// If there is no room.
    pub fn encode(&self, bytes: &mut [u8]) {
        MetaHeader { kind: MetaType::Leaf, jid: self.jid }.encode(bytes);
        put_u16(bytes, 24, self.depth);
        put_u16(bytes, 26, self.entries);
        put_u32(bytes, 28, PAYLOAD_FORMAT_DIRENTS);
        put_u64(bytes, 32, self.next.0);
        put_u64(bytes, 40, self.inode.0);
        put_u32(bytes, 48, self.dist);
        put_u32(bytes, 52, self.changed.nsec);
        put_i64(bytes, 56, self.changed.sec);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_leaf_round_trips_with_its_offsets() {
        let leaf = Leaf {
            jid: 2,
            depth: 3,
            entries: 4,
            next: BlockNo(5),
            inode: BlockNo(6),
            dist: 7,
            changed: Timestamp { sec: 8, nsec: 9 },
        };
        let mut bytes = [0; LEAF_BYTES];
        leaf.encode(&mut bytes);
        assert_eq!(Leaf::decode(&bytes), Ok(leaf));
        assert_eq!((u16_at(&bytes, 24), u16_at(&bytes, 26), u32_at(&bytes, 28)), (3, 4, 1200));
        assert_eq!((u64_at(&bytes, 32), u64_at(&bytes, 40), u32_at(&bytes, 48)), (5, 6, 7));
        assert_eq!((u32_at(&bytes, 52), u64_at(&bytes, 56)), (9, 8));
    }
}
