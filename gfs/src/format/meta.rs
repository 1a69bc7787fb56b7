//! The header in front of every metadata block, and the pair of numbers that names an inode.
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 4 | magic |
//! | 4 | 4 | type |
//! | 8 | 8 | zero |
//! | 16 | 4 | format |
//! | 20 | 4 | journal of the node that last logged the block |

use super::bytes::{head, put_u32, put_u64, u32_at, u64_at};
use super::{BlockNo, FormatError};

/// What every metadata block begins with.
pub const MAGIC: u32 = 0x0116_1970;

/// The length of the header.
pub const META_HEADER_BYTES: usize = 24;

/// The kinds of metadata blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[expect(missing_docs, reason = "the names say it; the numbers are in `number` and `format`")]
pub enum MetaType {
    Superblock,
    Rgrp,
    RgrpBitmap,
    Dinode,
    Indirect,
    Leaf,
    /// Headered data: only the hash table of large directories.
    HeaderedData,
    LogHeader,
    LogDescriptor,
    /// Extended attributes.
    Ea,
    /// A long value of an extended attribute.
    EaData,
    /// A continuation of a revoke descriptor.
    LogBlock,
    QuotaChange,
}

const TYPES: [(MetaType, u32, u32); 13] = [
    (MetaType::Superblock, 1, 100),
    (MetaType::Rgrp, 2, 200),
    (MetaType::RgrpBitmap, 3, 300),
    (MetaType::Dinode, 4, 400),
    (MetaType::Indirect, 5, 500),
    (MetaType::Leaf, 6, 600),
    (MetaType::HeaderedData, 7, 700),
    (MetaType::LogHeader, 8, 800),
    (MetaType::LogDescriptor, 9, 900),
    (MetaType::Ea, 10, 1600),
    (MetaType::EaData, 11, 1700),
    (MetaType::LogBlock, 12, 1000),
    (MetaType::QuotaChange, 14, 1400),
];

impl MetaType {
    /// The type's number on disk.
    #[must_use]
    pub fn number(self) -> u32 {
        self.row().1
    }

    /// The format number that goes with it.
    #[must_use]
    pub fn format(self) -> u32 {
        self.row().2
    }

    /// The type with this number.
    #[must_use]
    pub fn from_number(number: u32) -> Option<Self> {
        TYPES.iter().find(|row| row.1 == number).map(|row| row.0)
    }

    fn row(self) -> (Self, u32, u32) {
        TYPES[self as usize]
    }
}

/// Whether a block begins with the magic number.
#[must_use]
pub fn has_magic(block: &[u8]) -> bool {
    block.starts_with(&MAGIC.to_be_bytes())
}

/// The header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MetaHeader {
    /// What the block is.
    pub kind: MetaType,
    /// The journal of the node that last logged it; 0 from mkfs. For information only.
    pub jid: u32,
}

impl MetaHeader {
    /// Reads the header of a block of whatever kind. The format number is not checked: no implementation does.
    ///
    /// # Errors
    /// Too short, no magic number, or a type that does not exist.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let bytes = head("metadata header", bytes, META_HEADER_BYTES)?;
        let found = u32_at(bytes, 0);
        if found != MAGIC {
            return Err(FormatError::Magic { found });
        }
        let number = u32_at(bytes, 4);
        let kind = MetaType::from_number(number)
            .ok_or(FormatError::Field { what: "metadata type", value: u64::from(number) })?;
        Ok(Self { kind, jid: u32_at(bytes, 20) })
    }

    /// Reads the header of a block that has to be of one kind.
    ///
    /// # Errors
    /// As [`Self::decode`], or `Type`.
    pub fn expect(bytes: &[u8], expected: MetaType) -> Result<Self, FormatError> {
        let header = Self::decode(bytes)?;
        if header.kind != expected {
            return Err(FormatError::Type { expected, found: header.kind.number() });
        }
        Ok(header)
    }

    /// Writes the whole header.
    ///
    /// # Panics
    /// If there is no room.
    pub fn encode(&self, bytes: &mut [u8]) {
        put_u32(bytes, 0, MAGIC);
        put_u32(bytes, 4, self.kind.number());
        put_u64(bytes, 8, 0);
        put_u32(bytes, 16, self.kind.format());
        put_u32(bytes, 20, self.jid);
    }
}

/// What names an inode. Only the pair is unique: formal numbers repeat.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Inum {
    /// The formal number ("generation").
    pub formal: u64,
    /// The dinode's block; `st_ino`.
    pub addr: BlockNo,
}

impl Inum {
    /// In a dirent: either number 0 means that the entry is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.formal == 0 || self.addr.is_none()
    }

    pub(super) fn read(bytes: &[u8], at: usize) -> Self {
        Self { formal: u64_at(bytes, at), addr: BlockNo(u64_at(bytes, at + 8)) }
    }

    pub(super) fn write(self, bytes: &mut [u8], at: usize) {
        put_u64(bytes, at, self.formal);
        put_u64(bytes, at + 8, self.addr.0);
    }
}

impl From<(u64, u64)> for Inum {
    /// Formal number and block.
    fn from((formal, addr): (u64, u64)) -> Self {
        Self { formal, addr: BlockNo(addr) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_in_the_order_of_the_enum_and_headers_round_trip() {
        for (kind, number, _) in TYPES {
            assert_eq!(kind.number(), number);
            assert_eq!(MetaType::from_number(number), Some(kind));
            let header = MetaHeader { kind, jid: 7 };
            let mut bytes = [0xff; META_HEADER_BYTES];
            header.encode(&mut bytes);
            assert_eq!(bytes[8..16], [0; 8]);
            assert_eq!(MetaHeader::decode(&bytes), Ok(header));
        }
        assert_eq!(MetaType::from_number(13), None);
        assert_eq!(MetaHeader::decode(&[0; 24]), Err(FormatError::Magic { found: 0 }));
        assert!(matches!(MetaHeader::decode(&[1; 3]), Err(FormatError::TooShort { .. })));
    }
}
