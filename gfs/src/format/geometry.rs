//! What follows from the block size: how many pointers, records and bytes fit, and where a logical block hangs.

use super::{
    DINODE_BYTES, FormatError, LEAF_BYTES, LOG_DESCRIPTOR_BYTES, META_HEADER_BYTES, RGRP_HEADER_BYTES,
};
use std::fmt;

/// No height of a metadata tree is above this, whatever the block size.
pub const HEIGHT_MAX: usize = 10;

/// A directory's hash table has at most 2^17 pointers.
pub const HASH_DEPTH_MAX: u16 = 17;

/// A block's place on the device, in blocks. 0 in a pointer means that there is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockNo(pub u64);

impl BlockNo {
    /// No block: a hole in a file, the end of a chain.
    pub const NONE: Self = Self(0);

    /// Whether it is [`Self::NONE`].
    #[must_use]
    pub const fn is_none(self) -> bool {
        self.0 == 0
    }

    /// Where it starts on the device, or `None` where no device can be that large.
    #[must_use]
    pub fn offset_bytes(self, size: BlockSize) -> Option<u64> {
        self.0.checked_mul(u64::from(size.bytes()))
    }

    /// The block `count` further on, or `None` past the end of numbers.
    #[must_use]
    pub fn checked_add(self, count: u64) -> Option<Self> {
        self.0.checked_add(count).map(Self)
    }
}

impl fmt::Display for BlockNo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A legal block size: a power of two from 512 to 65536 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSize(u8);

impl BlockSize {
    /// The default, and what every kernel on every machine can mount.
    pub const B4096: Self = Self(12);

    /// Checks a size in bytes.
    ///
    /// # Errors
    /// `Field` if it is not a power of two from 512 to 65536.
    pub fn new(bytes: u32) -> Result<Self, FormatError> {
        if bytes.is_power_of_two() && (512..=65536).contains(&bytes) {
            Ok(Self(bytes.trailing_zeros() as u8))
        } else {
            Err(FormatError::Field { what: "block size", value: u64::from(bytes) })
        }
    }

    /// In bytes.
    #[must_use]
    pub const fn bytes(self) -> u32 {
        1 << self.0
    }

    /// In bytes, for indexing.
    #[must_use]
    pub const fn usize(self) -> usize {
        1 << self.0
    }

    /// Its logarithm.
    #[must_use]
    pub const fn shift(self) -> u32 {
        self.0 as u32
    }

    /// Pointers in a dinode.
    #[must_use]
    pub const fn dinode_pointers(self) -> usize {
        (self.usize() - DINODE_BYTES) / 8
    }

    /// Pointers in an indirect block.
    #[must_use]
    pub const fn indirect_pointers(self) -> usize {
        (self.usize() - META_HEADER_BYTES) / 8
    }

    /// Entries of metadata or revoke descriptors in the journal.
    #[must_use]
    pub const fn descriptor_pointers(self) -> usize {
        (self.usize() - LOG_DESCRIPTOR_BYTES) / 8
    }

    /// Pairs in a descriptor of journalled data.
    #[must_use]
    pub const fn descriptor_pairs(self) -> usize {
        self.descriptor_pointers() / 2
    }

    /// Bytes that a dinode itself can hold.
    #[must_use]
    pub const fn stuffed_bytes(self) -> usize {
        self.usize() - DINODE_BYTES
    }

    /// Payload of a block with a metadata header ("jbsize").
    #[must_use]
    pub const fn headered_bytes(self) -> usize {
        self.usize() - META_HEADER_BYTES
    }

    /// Bytes for dirents in a leaf.
    #[must_use]
    pub const fn leaf_bytes(self) -> usize {
        self.usize() - LEAF_BYTES
    }

    /// The depth of a directory's first hash table.
    #[must_use]
    pub const fn depth_min(self) -> u16 {
        (self.shift() - 4) as u16 // half a block of 8-byte pointers
    }

    /// Blocks mapped by the bitmap behind a resource group's header.
    #[must_use]
    pub const fn bitmap_blocks_first(self) -> u64 {
        ((self.usize() - RGRP_HEADER_BYTES) * 4) as u64
    }

    /// Blocks mapped by each further bitmap block.
    #[must_use]
    pub const fn bitmap_blocks_next(self) -> u64 {
        (self.headered_bytes() * 4) as u64
    }

    /// Quota changes in a block.
    #[must_use]
    pub const fn quota_changes(self) -> usize {
        self.headered_bytes() / 16
    }

    /// The superblock's block.
    #[must_use]
    pub const fn superblock(self) -> BlockNo {
        BlockNo(super::SUPERBLOCK_OFFSET_BYTES >> self.0)
    }

    /// How many bytes a file of this height can have, or `None` where 64 bits do not suffice. `unit_bytes` is the
    /// payload of its lowest blocks: [`Self::bytes`] for files, [`Self::headered_bytes`] for hash tables.
    #[must_use]
    pub fn capacity_bytes(self, height: usize, unit_bytes: usize) -> Option<u64> {
        if height == 0 {
            return Some(self.stuffed_bytes() as u64);
        }
        let mut capacity = (unit_bytes as u64).checked_mul(self.dinode_pointers() as u64)?;
        for _ in 1..height {
            capacity = capacity.checked_mul(self.indirect_pointers() as u64)?;
        }
        Some(capacity)
    }

    /// The greatest height that the kernel accepts: the first whose capacity overflows 64 bits.
    #[must_use]
    pub fn height_max(self) -> usize {
        (1..HEIGHT_MAX)
            .find(|&height| self.capacity_bytes(height, self.usize()).is_none())
            .unwrap_or(HEIGHT_MAX)
    }

    /// The lowest height at which `size_bytes` fit, or `None` if none suffices.
    #[must_use]
    pub fn height_for(self, size_bytes: u64, unit_bytes: usize) -> Option<usize> {
        (0..=self.height_max()).find(|&height| {
            self.capacity_bytes(height, unit_bytes).is_none_or(|capacity| size_bytes <= capacity)
        })
    }

    /// The pointers to follow for logical block `logical` in a tree of `height`, topmost first, or `None` if the tree
    /// does not reach so far.
    #[must_use]
    pub fn path(self, height: usize, logical: u64) -> Option<TreePath> {
        if height == 0 || HEIGHT_MAX < height {
            return None;
        }
        let inptrs = self.indirect_pointers() as u64;
        let mut indices = [0; HEIGHT_MAX];
        let mut rest = logical;
        for level in (1..height).rev() {
            indices[level] = (rest % inptrs) as usize;
            rest /= inptrs;
        }
        if self.dinode_pointers() as u64 <= rest {
            return None;
        }
        indices[0] = rest as usize;
        Some(TreePath { indices, height })
    }

    /// How many logical blocks one pointer at `level` covers (0 is the dinode) in a tree of `height`, saturating.
    #[must_use]
    pub fn span_blocks(self, height: usize, level: usize) -> u64 {
        let mut span = 1_u64;
        for _ in level + 1..height {
            span = span.saturating_mul(self.indirect_pointers() as u64);
        }
        span
    }
}

/// Indices of pointers, from the dinode down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TreePath {
    indices: [usize; HEIGHT_MAX],
    height: usize,
}

impl TreePath {
    /// The index in the dinode, then in each indirect block.
    #[must_use]
    pub fn indices(&self) -> &[usize] {
        &self.indices[..self.height]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_by_block_size_are_those_of_the_format() {
        let rows: [[usize; 12]; 4] = [
            [512, 35, 61, 55, 27, 280, 488, 5, 1536, 1952, 30, 10],
            [1024, 99, 125, 119, 59, 792, 1000, 6, 3584, 4000, 62, 8],
            [2048, 227, 253, 247, 123, 1816, 2024, 7, 7680, 8096, 126, 7],
            [4096, 483, 509, 503, 251, 3864, 4072, 8, 15872, 16288, 254, 6],
        ];
        for row in rows {
            let size = BlockSize::new(row[0] as u32).unwrap();
            let found = [
                size.usize(),
                size.dinode_pointers(),
                size.indirect_pointers(),
                size.descriptor_pointers(),
                size.descriptor_pairs(),
                size.stuffed_bytes(),
                size.headered_bytes(),
                usize::from(size.depth_min()),
                size.bitmap_blocks_first() as usize,
                size.bitmap_blocks_next() as usize,
                size.quota_changes(),
                size.height_max(),
            ];
            assert_eq!(found, row);
        }
        assert_eq!(BlockSize::B4096.superblock(), BlockNo(16));
        for bad in [0, 256, 1000, 131_072] {
            assert!(BlockSize::new(bad).is_err());
        }
    }

    #[test]
    fn capacities_of_4096_byte_blocks() {
        let size = BlockSize::B4096;
        let expected =
            [3864, 1_978_368, 1_006_989_312, 512_557_559_808, 260_891_797_942_272, 132_793_925_152_616_448];
        for (height, bytes) in expected.into_iter().enumerate() {
            assert_eq!(size.capacity_bytes(height, 4096), Some(bytes));
            assert_eq!(size.height_for(bytes, 4096), Some(height));
            assert_eq!(size.height_for(bytes + 1, 4096), Some(height + 1));
        }
        assert_eq!(size.height_for(8192, 4072), Some(1));
    }

    #[test]
    fn a_path_divides_by_the_pointers_of_an_indirect_block_at_every_level() {
        let size = BlockSize::B4096;
        assert_eq!(size.path(1, 482).unwrap().indices(), [482]);
        assert_eq!(size.path(1, 483), None);
        assert_eq!(size.path(2, 483).unwrap().indices(), [0, 483]);
        assert_eq!(size.path(3, 509 * 509 + 510).unwrap().indices(), [1, 1, 1]);
        assert_eq!(size.path(0, 0), None);
        assert_eq!(size.path(3, u64::MAX), None);
        assert_eq!(size.span_blocks(3, 0), 509 * 509);
        assert_eq!(size.span_blocks(3, 2), 1);
    }
}
