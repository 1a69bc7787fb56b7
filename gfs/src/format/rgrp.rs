//! Resource groups: the index entry that names one, and the header in front of its bitmap.
//!
//! | header offset | field | index offset | field |
//! |---|---|---|---|
//! | 24 | flags (4) | 0 | header block (8) |
//! | 28 | free blocks (4) | 8 | length in blocks (4) |
//! | 32 | dinodes (4) | 16 | first data block (8) |
//! | 36 | distance to the next header (4) | 24 | data blocks (4) |
//! | 40 | next generation (8) | 28 | bitmap bytes (4) |
//! | 48, 56, 60 | data0 (8), data, bitmap bytes (4) | | |
//! | 64 | CRC-32 of the header, itself as 0 | | |

use super::bytes::{head, put_u32, put_u64, u32_at, u64_at};
use super::{Bitmap, BlockNo, BlockSize, FormatError, META_HEADER_BYTES, MetaHeader, MetaType};

/// The length of the header.
pub const RGRP_HEADER_BYTES: usize = 128;
/// The length of an index entry.
pub const RINDEX_BYTES: usize = 96;

/// The flags of a resource group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RgrpFlags(pub u32);

impl RgrpFlags {
    /// Do not allocate here.
    pub const NOALLOC: u32 = 0x08;
    /// Everything free has been discarded.
    pub const TRIMMED: u32 = 0x10;
    /// What may stand on disk; the rest is of the kernel's memory.
    pub const ON_DISK: u32 = 0x0fff_ffff;
}

/// The header of a resource group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RgrpHeader {
    /// The journal of the node that last logged the block; for information only.
    pub jid: u32,
    /// Flags.
    pub flags: RgrpFlags,
    /// Free data blocks.
    pub free: u32,
    /// Dinodes, unlinked ones included.
    pub dinodes: u32,
    /// Blocks from this header to the next one; 0 in the last.
    pub skip: u32,
    /// The next generation number to give.
    pub igeneration: u64,
    /// Copy of the index.
    pub data0: BlockNo,
    /// Copy of the index.
    pub data: u32,
    /// Copy of the index.
    pub bitmap_bytes: u32,
}

impl RgrpHeader {
    /// Reads a header. A checksum of 0 means "not set"; any other has to be right.
    ///
    /// # Errors
    /// Too short, no such block, or a wrong checksum.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let bytes = head("resource group header", bytes, RGRP_HEADER_BYTES)?;
        let header = MetaHeader::expect(bytes, MetaType::Rgrp)?;
        let (stored, computed) = (u32_at(bytes, 64), crc(bytes));
        if stored != 0 && stored != computed {
            return Err(FormatError::Checksum { what: "resource group header", stored, computed });
        }
        Ok(Self {
            jid: header.jid,
            flags: RgrpFlags(u32_at(bytes, 24) & RgrpFlags::ON_DISK),
            free: u32_at(bytes, 28),
            dinodes: u32_at(bytes, 32),
            skip: u32_at(bytes, 36),
            igeneration: u64_at(bytes, 40),
            data0: BlockNo(u64_at(bytes, 48)),
            data: u32_at(bytes, 56),
            bitmap_bytes: u32_at(bytes, 60),
        })
    }

    /// Writes the header with its checksum.
    ///
    /// # Panics
    /// If there is no room.
    pub fn encode(&self, bytes: &mut [u8]) {
        MetaHeader { kind: MetaType::Rgrp, jid: self.jid }.encode(bytes);
        put_u32(bytes, 24, self.flags.0 & RgrpFlags::ON_DISK);
        put_u32(bytes, 28, self.free);
        put_u32(bytes, 32, self.dinodes);
        put_u32(bytes, 36, self.skip);
        put_u64(bytes, 40, self.igeneration);
        put_u64(bytes, 48, self.data0.0);
        put_u32(bytes, 56, self.data);
        put_u32(bytes, 60, self.bitmap_bytes);
        put_u32(bytes, 64, 0);
        let crc = crc(&bytes[..RGRP_HEADER_BYTES]);
        put_u32(bytes, 64, crc);
    }
}

fn crc(header: &[u8]) -> u32 {
    let mut copy = [0; RGRP_HEADER_BYTES];
    copy.copy_from_slice(&header[..RGRP_HEADER_BYTES]);
    put_u32(&mut copy, 64, 0);
    crc32fast::hash(&copy)
}

/// An entry of the rindex file. Its reserved bytes may hold garbage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RindexEntry {
    /// The header block.
    pub addr: BlockNo,
    /// Header and bitmap blocks.
    pub length: u32,
    /// The first data block.
    pub data0: BlockNo,
    /// Data blocks, a multiple of 4.
    pub data: u32,
    /// Bytes of bitmap: a quarter of the data blocks.
    pub bitmap_bytes: u32,
}

impl RindexEntry {
    /// Reads an entry.
    ///
    /// # Errors
    /// Too short.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let bytes = head("rindex entry", bytes, RINDEX_BYTES)?;
        Ok(Self {
            addr: BlockNo(u64_at(bytes, 0)),
            length: u32_at(bytes, 8),
            data0: BlockNo(u64_at(bytes, 16)),
            data: u32_at(bytes, 24),
            bitmap_bytes: u32_at(bytes, 28),
        })
    }

    /// Writes it.
    ///
    /// # Panics
    /// If there is no room.
    pub fn encode(&self, bytes: &mut [u8]) {
        put_u64(bytes, 0, self.addr.0);
        put_u32(bytes, 8, self.length);
        put_u32(bytes, 12, 0);
        put_u64(bytes, 16, self.data0.0);
        put_u32(bytes, 24, self.data);
        put_u32(bytes, 28, self.bitmap_bytes);
    }

    /// An entry for a group at `addr` with `data` data blocks.
    #[must_use]
    pub fn new(size: BlockSize, addr: BlockNo, data: u32) -> Self {
        let length = 1 + u64::from(data)
            .saturating_sub(size.bitmap_blocks_first())
            .div_ceil(size.bitmap_blocks_next());
        Self {
            addr,
            length: length as u32, // at most a quarter of `data`
            data0: BlockNo(addr.0 + length),
            data,
            bitmap_bytes: data / 4,
        }
    }

    /// Whether a mount would accept it: the bitmap blocks hold exactly the bitmap.
    ///
    /// # Errors
    /// `Field` with the first rule it breaks.
    pub fn check(&self, size: BlockSize) -> Result<(), FormatError> {
        let bad = |what, value| Err(FormatError::Field { what, value });
        if self.data == 0 || !self.data.is_multiple_of(4) || self.data / 4 != self.bitmap_bytes {
            return bad("data blocks of a resource group", u64::from(self.data));
        }
        let fits = Self::new(size, BlockNo(0), self.data);
        if self.length != fits.length {
            return bad("length of a resource group", u64::from(self.length));
        }
        if self.addr.0 <= size.superblock().0
            || self.addr.checked_add(u64::from(self.length)) != Some(self.data0)
        {
            return bad("place of a resource group", self.addr.0);
        }
        if self.data0.checked_add(u64::from(self.data)).is_none() {
            return bad("place of a resource group", self.data0.0);
        }
        Ok(())
    }

    /// The block after its last.
    #[must_use]
    pub fn end(&self) -> BlockNo {
        BlockNo(self.data0.0.saturating_add(u64::from(self.data)))
    }

    /// The bitmap's parts, one per block of the group, for an entry that passed [`Self::check`].
    pub fn bitmaps(&self, size: BlockSize) -> impl Iterator<Item = Bitmap> + use<> {
        let (length, total) = (self.length, self.bitmap_bytes as usize);
        (0..length).map(move |block| {
            let first_bytes = size.usize() - RGRP_HEADER_BYTES;
            let (start, before, room) = match block {
                0 => (RGRP_HEADER_BYTES, 0, first_bytes),
                _ => {
                    let room = size.headered_bytes();
                    (META_HEADER_BYTES, first_bytes + (block as usize - 1) * room, room)
                }
            };
            Bitmap { block, start, bytes: total.saturating_sub(before).min(room), first: before as u64 * 4 }
        })
    }

    /// In which bitmap the pair of a data block is, and at which index there, if the block is one of the group's.
    #[must_use]
    pub fn locate(&self, size: BlockSize, block: BlockNo) -> Option<(Bitmap, usize)> {
        let index = block.0.checked_sub(self.data0.0).filter(|&index| index < u64::from(self.data))?;
        let which = match index.checked_sub(size.bitmap_blocks_first()) {
            None => 0,
            Some(rest) => 1 + rest / size.bitmap_blocks_next(),
        };
        let bitmap = self.bitmaps(size).nth(which as usize)?;
        Some((bitmap, (index - bitmap.first) as usize))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_of_a_fresh_journal_group_is_as_mkfs_writes_it() {
        let header = RgrpHeader {
            jid: 0,
            flags: RgrpFlags(0),
            free: 0,
            dinodes: 3,
            skip: 2057,
            igeneration: 0,
            data0: BlockNo(18),
            data: 2056,
            bitmap_bytes: 514,
        };
        let mut bytes = [0; RGRP_HEADER_BYTES];
        header.encode(&mut bytes);
        let words: Vec<u32> = (0..17).map(|i| u32_at(&bytes, i * 4)).collect();
        let expected =
            [0x0116_1970, 2, 0, 0, 200, 0, 0, 0, 3, 0x809, 0, 0, 0, 0x12, 0x808, 0x202, 0x2491_348d];
        assert_eq!(words, expected);
        assert_eq!(RgrpHeader::decode(&bytes), Ok(header));
        bytes[31] ^= 1;
        assert!(matches!(RgrpHeader::decode(&bytes), Err(FormatError::Checksum { .. })));
        put_u32(&mut bytes, 64, 0);
        assert_eq!(RgrpHeader::decode(&bytes).unwrap().free, 1);
    }

    #[test]
    fn the_checksums_of_13_5() {
        let mut header = RgrpHeader {
            jid: 0,
            flags: RgrpFlags(0),
            free: 0,
            dinodes: 3,
            skip: 2057,
            igeneration: 0,
            data0: BlockNo(2075),
            data: 2056,
            bitmap_bytes: 514,
        };
        let mut bytes = [0; RGRP_HEADER_BYTES];
        header.encode(&mut bytes);
        assert_eq!(u32_at(&bytes, 64), 0x5740_822b);
        header = RgrpHeader {
            free: 60878,
            dinodes: 10,
            skip: 0,
            data0: BlockNo(4135),
            data: 61400,
            bitmap_bytes: 15350,
            ..header
        };
        header.encode(&mut bytes);
        assert_eq!(u32_at(&bytes, 64), 0x08d1_3c04);
    }

    #[test]
    fn entries_of_13_5_are_located() {
        let size = BlockSize::B4096;
        let entry = RindexEntry::new(size, BlockNo(4131), 61400);
        assert_eq!((entry.length, entry.data0, entry.bitmap_bytes), (4, BlockNo(4135), 15350));
        entry.check(size).unwrap();
        let mut bytes = [0xff; RINDEX_BYTES];
        entry.encode(&mut bytes);
        assert_eq!(RindexEntry::decode(&bytes), Ok(entry));
        assert_eq!(entry.bitmaps(size).map(|b| b.bytes).sum::<usize>(), 15350);
        assert_eq!(entry.locate(size, BlockNo(4134)), None);
        assert_eq!(entry.locate(size, BlockNo(4135)).unwrap().1, 0);
        let (bitmap, index) = entry.locate(size, BlockNo(4135 + 15872)).unwrap();
        assert_eq!((bitmap.block, bitmap.start, index), (1, 24, 0));
        let (bitmap, index) = entry.locate(size, BlockNo(4135 + 61399)).unwrap();
        assert_eq!((bitmap.block, index / 4), (3, bitmap.bytes - 1));
        assert_eq!(entry.locate(size, entry.end()), None);
        for bad in [
            RindexEntry { data: 61402, ..entry },
            RindexEntry { length: 5, ..entry },
            RindexEntry { length: 0, ..entry },
            RindexEntry { addr: BlockNo(u64::MAX), ..entry },
            RindexEntry { data0: BlockNo(4136), ..entry },
        ] {
            assert!(bad.check(size).is_err(), "{bad:?}");
        }
    }
}
