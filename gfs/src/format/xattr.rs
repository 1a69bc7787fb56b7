//! Extended attributes: the records of an attribute block.
//!
//! | offset | bytes | field | offset | bytes | field |
//! |---|---|---|---|---|---|
//! | 0 | 4 | record length | 10 | 1 | 1 = last of the block |
//! | 4 | 4 | value length | 11 | 1 | pointers; 0 = the value is here |
//! | 8 | 1 | name length | 16 | | name, then the value, or padding and pointers |
//! | 9 | 1 | type | | | |
//!
//! The records cover the block from byte 24 to its end; the last carries the flag.

use super::bytes::{put_u32, put_u64, u32_at, u64_at};
use super::{BlockNo, BlockSize, FormatError, META_HEADER_BYTES, MetaHeader, MetaType};

/// The length of a record without name and value.
pub const EA_HEADER_BYTES: usize = 16;
/// The longest name, without its prefix.
pub const EA_NAME_BYTES_MAX: usize = 255;
/// The longest value.
pub const EA_VALUE_BYTES_MAX: usize = 65536;

const LAST: u8 = 1;

/// The namespace of an attribute.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum EaKind {
    /// `user.`
    User,
    /// `system.`: only the ACLs.
    System,
    /// `security.`
    Security,
    /// `trusted.`, from format 1802 on.
    Trusted,
}

impl EaKind {
    /// The number on disk.
    #[must_use]
    pub fn number(self) -> u8 {
        self as u8 + 1
    }

    /// From the number on disk.
    #[must_use]
    pub fn from_number(number: u8) -> Option<Self> {
        [Self::User, Self::System, Self::Security, Self::Trusted]
            .into_iter()
            .find(|kind| kind.number() == number)
    }

    /// What stands before the name in the interface of POSIX, dot included.
    #[must_use]
    pub fn prefix(self) -> &'static str {
        match self {
            Self::User => "user.",
            Self::System => "system.",
            Self::Security => "security.",
            Self::Trusted => "trusted.",
        }
    }

    /// Splits a full name such as `user.colour`.
    #[must_use]
    pub fn split(full: &[u8]) -> Option<(Self, &[u8])> {
        [Self::User, Self::System, Self::Security, Self::Trusted]
            .into_iter()
            .find_map(|kind| full.strip_prefix(kind.prefix().as_bytes()).map(|name| (kind, name)))
    }
}

/// Where a value is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EaValue<'a> {
    /// In the record.
    Inline(&'a [u8]),
    /// In these blocks, each with a metadata header.
    Blocks {
        /// Its length.
        bytes: usize,
        /// As many as the length needs, or more.
        blocks: Vec<BlockNo>,
    },
}

/// A record as it stands in a block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EaRecord<'a> {
    /// Where in the block it begins.
    pub offset: usize,
    /// To the next record.
    pub rec_len: usize,
    /// `None` if it is unused.
    pub kind: Option<EaKind>,
    /// The last of the block.
    pub last: bool,
    /// Without prefix.
    pub name: &'a [u8],
    /// The value or where it is; empty if unused.
    pub value: EaValue<'a>,
}

impl EaRecord<'_> {
    fn needed(&self) -> usize {
        match (&self.kind, &self.value) {
            (None, _) => 0,
            (Some(_), EaValue::Inline(value)) => ea_bytes_inline(self.name.len(), value.len()),
            (Some(_), EaValue::Blocks { blocks, .. }) => ea_bytes_external(self.name.len(), blocks.len()),
        }
    }
}

/// What is to be inserted.
#[derive(Clone, Debug)]
pub struct NewEa<'a> {
    /// The namespace.
    pub kind: EaKind,
    /// 1 to 255 bytes, without prefix.
    pub name: &'a [u8],
    /// The value, or the blocks that hold it.
    pub value: EaValue<'a>,
}

/// The space that a record with its value inside needs; more than [`BlockSize::headered_bytes`] does not fit.
#[must_use]
pub fn ea_bytes_inline(name_bytes: usize, value_bytes: usize) -> usize {
    (EA_HEADER_BYTES + name_bytes + value_bytes).next_multiple_of(8)
}

/// The space that a record with its value in blocks needs: the name is padded to 8 for the pointers.
#[must_use]
pub fn ea_bytes_external(name_bytes: usize, blocks: usize) -> usize {
    EA_HEADER_BYTES + name_bytes.next_multiple_of(8) + 8 * blocks
}

/// How many blocks a value takes when it is not in its record.
#[must_use]
pub fn ea_value_blocks(size: BlockSize, value_bytes: usize) -> usize {
    value_bytes.div_ceil(size.headered_bytes())
}

/// The records of an attribute block, unused ones included.
#[derive(Clone, Debug)]
pub struct EaRecords<'a> {
    block: &'a [u8],
    at: usize,
}

impl<'a> EaRecords<'a> {
    /// The records of `block`, which has the header of an attribute block.
    ///
    /// # Errors
    /// If it has not.
    pub fn new(block: &'a [u8]) -> Result<Self, FormatError> {
        MetaHeader::expect(block, MetaType::Ea)?;
        Ok(Self { block, at: META_HEADER_BYTES })
    }

    fn record(&self) -> Result<EaRecord<'a>, FormatError> {
        let bad = |what, value: usize| Err(FormatError::Field { what, value: value as u64 });
        let Some(rest) = self.block.get(self.at..).filter(|rest| EA_HEADER_BYTES <= rest.len()) else {
            return bad("offset of an attribute", self.at);
        };
        let (rec_len, data_len) = (u32_at(rest, 0) as usize, u32_at(rest, 4) as usize);
        let (name_len, number, flags, num_ptrs) = (rest[8] as usize, rest[9], rest[10], rest[11] as usize);
        if rec_len < EA_HEADER_BYTES || rest.len() < rec_len || !rec_len.is_multiple_of(8) {
            return bad("record length of an attribute", rec_len);
        }
        let last = flags & LAST != 0;
        if last != (rec_len == rest.len()) {
            return bad("end of the attributes in a block", self.at);
        }
        let mut record =
            EaRecord { offset: self.at, rec_len, kind: None, last, name: &[], value: EaValue::Inline(&[]) };
        if number == 0 {
            return Ok(record);
        }
        let Some(kind) = EaKind::from_number(number) else {
            return bad("type of an attribute", usize::from(number));
        };
        let body = &rest[EA_HEADER_BYTES..rec_len];
        let Some(name) = body.get(..name_len).filter(|name| !name.is_empty()) else {
            return bad("name length of an attribute", name_len);
        };
        record.kind = Some(kind);
        record.name = name;
        record.value = if num_ptrs == 0 {
            match body[name_len..].get(..data_len) {
                Some(value) => EaValue::Inline(value),
                None => return bad("value length of an attribute", data_len),
            }
        } else {
            let pointers = name_len.next_multiple_of(8);
            let headered = self.block.len() - META_HEADER_BYTES;
            match body.get(pointers..pointers + num_ptrs * 8) {
                Some(slots) if data_len <= num_ptrs * headered && data_len <= EA_VALUE_BYTES_MAX => {
                    let blocks = slots.chunks_exact(8).map(|slot| BlockNo(u64_at(slot, 0))).collect();
                    EaValue::Blocks { bytes: data_len, blocks }
                }
                _ => return bad("pointers of an attribute", num_ptrs),
            }
        };
        Ok(record)
    }
}

impl<'a> Iterator for EaRecords<'a> {
    type Item = Result<EaRecord<'a>, FormatError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.block.len() <= self.at {
            return None;
        }
        let record = self.record();
        self.at = record.as_ref().map_or(self.block.len(), |record| record.offset + record.rec_len);
        Some(record)
    }
}

/// Makes a block an attribute block with nothing in it.
///
/// # Panics
/// If the block is too small.
pub fn init_ea_block(block: &mut [u8], jid: u32) {
    block.fill(0);
    MetaHeader { kind: MetaType::Ea, jid }.encode(block);
    let rec_len = (block.len() - META_HEADER_BYTES) as u32;
    put_u32(block, META_HEADER_BYTES, rec_len);
    block[META_HEADER_BYTES + 10] = LAST;
}

/// Inserts a record into the first gap that suffices, and says where; `None` if there is no room.
///
/// # Errors
/// If the chain of records is broken before the gap. Nothing was changed.
///
/// # Panics
/// If the name's length is not allowed.
pub fn insert_ea(block: &mut [u8], new: &NewEa<'_>) -> Result<Option<usize>, FormatError> {
    assert!((1..=EA_NAME_BYTES_MAX).contains(&new.name.len()), "names are checked before they are inserted");
    let (need, data_len, pointers): (usize, usize, &[BlockNo]) = match &new.value {
        EaValue::Inline(value) => (ea_bytes_inline(new.name.len(), value.len()), value.len(), &[]),
        EaValue::Blocks { bytes, blocks } => {
            (ea_bytes_external(new.name.len(), blocks.len()), *bytes, blocks)
        }
    };
    let mut place = None;
    for record in EaRecords::new(block)? {
        let record = record?;
        if need + record.needed() <= record.rec_len {
            place = Some((record.offset, record.needed(), record.rec_len, record.last));
            break;
        }
    }
    let Some((donor, keep, rec_len, last)) = place else { return Ok(None) };
    if keep != 0 {
        put_u32(block, donor, keep as u32); // within a block
        block[donor + 10] &= !LAST;
    }
    let at = donor + keep;
    block[at..at + need].fill(0);
    put_u32(block, at, (rec_len - keep) as u32);
    put_u32(block, at + 4, data_len as u32); // at most a block, or what the caller put into blocks
    block[at + 8] = new.name.len() as u8;
    block[at + 9] = new.kind.number();
    block[at + 10] = if last { LAST } else { 0 };
    block[at + 11] = pointers.len() as u8; // 65536 bytes are at most 135 blocks of 488
    let body = at + EA_HEADER_BYTES;
    block[body..body + new.name.len()].copy_from_slice(new.name);
    if let EaValue::Inline(value) = &new.value {
        block[body + new.name.len()..][..value.len()].copy_from_slice(value);
    }
    let mut slot = body + new.name.len().next_multiple_of(8);
    for pointer in pointers {
        put_u64(block, slot, pointer.0);
        slot += 8;
    }
    Ok(Some(at))
}

/// Removes the record at `offset`.
///
/// # Errors
/// If no live record begins there. Nothing was changed.
pub fn remove_ea(block: &mut [u8], offset: usize) -> Result<(), FormatError> {
    let mut previous: Option<(usize, usize)> = None;
    for record in EaRecords::new(block)? {
        let record = record?;
        if record.offset < offset {
            previous = Some((record.offset, record.rec_len));
            continue;
        }
        if record.offset != offset || record.kind.is_none() {
            break;
        }
        let (rec_len, last) = (record.rec_len, record.last);
        match previous {
            Some((at, before)) => {
                put_u32(block, at, (before + rec_len) as u32);
                block[at + 10] |= if last { LAST } else { 0 };
            }
            None => {
                block[offset + 9] = 0;
                block[offset + 11] = 0;
            }
        }
        return Ok(());
    }
    Err(FormatError::Field { what: "offset of an attribute", value: offset as u64 })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn inline<'a>(kind: EaKind, name: &'a [u8], value: &'a [u8]) -> NewEa<'a> {
        NewEa { kind, name, value: EaValue::Inline(value) }
    }

    fn records(block: &[u8]) -> Vec<EaRecord<'_>> {
        EaRecords::new(block).unwrap().map(|record| record.unwrap()).collect()
    }

    #[test]
    fn three_small_attributes_stand_where_the_kernel_puts_them() {
        // 13.8
        let mut block = vec![0; 4096];
        init_ea_block(&mut block, 0);
        insert_ea(&mut block, &inline(EaKind::User, b"small", b"value1")).unwrap();
        insert_ea(&mut block, &inline(EaKind::Trusted, b"t", b"tv")).unwrap();
        insert_ea(&mut block, &inline(EaKind::Security, b"foo", b"sec")).unwrap();
        let found: Vec<_> =
            records(&block).iter().map(|r| (r.offset, r.rec_len, r.kind.unwrap().number(), r.last)).collect();
        assert_eq!(found, [(24, 32, 1, false), (56, 24, 4, false), (80, 4016, 3, true)]);
        remove_ea(&mut block, 80).unwrap();
        assert_eq!(records(&block)[1].rec_len, 4040);
        assert!(records(&block)[1].last);
        remove_ea(&mut block, 24).unwrap();
        assert_eq!(records(&block)[0].kind, None);
        assert!(remove_ea(&mut block, 24).is_err());
        assert_eq!(insert_ea(&mut block, &inline(EaKind::User, b"small", b"value2")), Ok(Some(24)));
    }

    #[test]
    fn a_long_value_is_named_by_pointers() {
        let size = BlockSize::B4096;
        assert_eq!(ea_value_blocks(size, 7680), 2);
        let mut block = vec![0; 4096];
        init_ea_block(&mut block, 0);
        let value = EaValue::Blocks { bytes: 7680, blocks: vec![BlockNo(5), BlockNo(6)] };
        insert_ea(&mut block, &NewEa { kind: EaKind::User, name: b"big", value: value.clone() }).unwrap();
        assert_eq!(records(&block)[0].value, value);
        assert_eq!(records(&block)[0].needed(), 40);
        block[24 + 11] = 1; // too few pointers for the length
        assert!(EaRecords::new(&block).unwrap().next().unwrap().is_err());
    }

    #[test]
    fn names_are_split_at_their_prefix() {
        assert_eq!(EaKind::split(b"user.a.b"), Some((EaKind::User, &b"a.b"[..])));
        assert_eq!(EaKind::split(b"other.a"), None);
    }

    proptest! {
        #[test]
        fn inserting_and_removing_is_a_map(ops in prop::collection::vec((any::<bool>(), "[a-f]{1,9}", 0_usize..60), 1..100)) {
            let mut block = vec![0; 1024];
            init_ea_block(&mut block, 0);
            let mut map = std::collections::BTreeMap::new();
            for (add, name, len) in ops {
                let found = records(&block).iter().find(|r| r.kind.is_some() && r.name == name.as_bytes()).map(|r| r.offset);
                prop_assert_eq!(found.is_some(), map.contains_key(&name));
                match (add, found) {
                    (true, None) => {
                        let value = vec![7; len];
                        if insert_ea(&mut block, &inline(EaKind::User, name.as_bytes(), &value)).unwrap().is_some() {
                            map.insert(name, value);
                        }
                    }
                    (false, Some(at)) => {
                        remove_ea(&mut block, at).unwrap();
                        map.remove(&name);
                    }
                    _ => {}
                }
                for record in records(&block).iter().filter(|r| r.kind.is_some()) {
                    let name = String::from_utf8(record.name.to_vec()).unwrap();
                    prop_assert_eq!(&record.value, &EaValue::Inline(&map[&name]));
                }
            }
        }

        #[test]
        fn hostile_bytes_end(bytes in prop::collection::vec(any::<u8>(), 488)) {
            let mut block = vec![0; 512];
            init_ea_block(&mut block, 0);
            block[24..].copy_from_slice(&bytes);
            prop_assert!(EaRecords::new(&block).unwrap().count() < 64);
            let _ = insert_ea(&mut block, &inline(EaKind::User, b"x", b"y"));
            let _ = remove_ea(&mut block, 24);
        }
    }
}
