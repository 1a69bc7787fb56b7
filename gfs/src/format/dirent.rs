//! Directory entries in a linear directory or a leaf: finding, inserting, removing, splitting.
//!
//! | offset | bytes | field | offset | bytes | field |
//! |---|---|---|---|---|---|
//! | 0 | 16 | inode | 24 | 2 | type (`DT_...`) |
//! | 16 | 4 | hash of the name | 26 | 2 | blocks worth reading ahead |
//! | 20 | 2 | record length | 40 | | name |
//! | 22 | 2 | name length | | | |
//!
//! The records cover the area, from byte 232 of a linear directory or byte 104 of a leaf to the end, without gaps. An
//! entry with an empty inode number is unused; only the first of a block may be.

use super::bytes::{put_u16, put_u32, u16_at, u32_at};
use super::{DINODE_BYTES, FileType, FormatError, Inum};

/// The length of an entry without its name.
pub const DIRENT_BYTES: usize = 40;
/// The longest name, in bytes.
pub const NAME_BYTES_MAX: usize = 255;

/// The hash by which a name is placed: CRC-32 as in zlib.
#[must_use]
pub fn name_hash(name: &[u8]) -> u32 {
    crc32fast::hash(name)
}

/// The space that a name needs.
#[must_use]
pub fn dirent_bytes(name_bytes: usize) -> usize {
    (DIRENT_BYTES + name_bytes).next_multiple_of(8)
}

/// An entry as it stands in a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dirent<'a> {
    /// Where in the block it begins.
    pub offset: usize,
    /// What it names; empty if the entry is unused.
    pub inum: Inum,
    /// As stored.
    pub hash: u32,
    /// To the next entry.
    pub rec_len: usize,
    /// Without terminator.
    pub name: &'a [u8],
    /// `DT_...`.
    pub kind: u16,
    /// Blocks behind the dinode worth reading ahead.
    pub rahead: u16,
}

impl Dirent<'_> {
    /// Whether it names nothing.
    #[must_use]
    pub fn is_unused(&self) -> bool {
        self.inum.is_empty()
    }

    /// The readdir position: 31 bits.
    #[must_use]
    pub fn cookie(&self) -> u32 {
        self.hash >> 1
    }

    fn needed(&self) -> usize {
        if self.is_unused() { 0 } else { dirent_bytes(self.name.len()) }
    }
}

/// What is to be inserted.
#[derive(Clone, Copy, Debug)]
pub struct NewDirent<'a> {
    /// 1 to 255 bytes.
    pub name: &'a [u8],
    /// What it names.
    pub inum: Inum,
    /// Of what kind that is.
    pub kind: FileType,
    /// 1 if the inode's attribute block is right behind it, else 0.
    pub rahead: u16,
}

/// The entries of a block from `start` on, unused ones included.
#[derive(Clone, Debug)]
pub struct Dirents<'a> {
    block: &'a [u8],
    at: usize,
}

impl<'a> Dirents<'a> {
    /// The entries in `block` from byte `start` on.
    #[must_use]
    pub fn new(block: &'a [u8], start: usize) -> Self {
        Self { block, at: start }
    }

    fn entry(&self) -> Result<Dirent<'a>, FormatError> {
        let bad = |what, value: usize| Err(FormatError::Field { what, value: value as u64 });
        let Some(record) = self.block.get(self.at..).filter(|record| DIRENT_BYTES <= record.len()) else {
            return bad("offset of a directory entry", self.at);
        };
        let (rec_len, name_len) = (usize::from(u16_at(record, 20)), usize::from(u16_at(record, 22)));
        // A leaf of 65536 bytes cannot have a record that long, so 0 needs no special meaning.
        if rec_len < DIRENT_BYTES || record.len() < rec_len || !rec_len.is_multiple_of(8) {
            return bad("record length of a directory entry", rec_len);
        }
        let inum = Inum::read(record, 0);
        if !inum.is_empty() && !(1..=NAME_BYTES_MAX).contains(&name_len) || rec_len < DIRENT_BYTES + name_len
        {
            // The name of an unused entry is what its last user left; only its length must not lead outside.
            return bad("name length of a directory entry", name_len);
        }
        Ok(Dirent {
            offset: self.at,
            inum,
            hash: u32_at(record, 16),
            rec_len,
            name: &record[DIRENT_BYTES..DIRENT_BYTES + name_len],
            kind: u16_at(record, 24),
            rahead: u16_at(record, 26),
        })
    }
}

impl<'a> Iterator for Dirents<'a> {
    type Item = Result<Dirent<'a>, FormatError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.block.len() <= self.at {
            return None;
        }
        let entry = self.entry();
        self.at = entry.as_ref().map_or(self.block.len(), |entry| entry.offset + entry.rec_len);
        Some(entry)
    }
}

/// The live entry of this name.
///
/// # Errors
/// If the chain of records is broken before it.
pub fn find_dirent<'a>(
    block: &'a [u8],
    start: usize,
    name: &[u8],
) -> Result<Option<Dirent<'a>>, FormatError> {
    let hash = name_hash(name);
    for entry in Dirents::new(block, start) {
        let entry = entry?;
        if entry.hash == hash && !entry.is_unused() && entry.name == name {
            return Ok(Some(entry));
        }
    }
    Ok(None)
}

/// Makes the area one unused entry.
///
/// # Panics
/// If the block is too small.
pub fn init_dirents(block: &mut [u8], start: usize) {
    block[start..].fill(0);
    let rec_len = block.len() - start;
    put_u16(block, start + 20, rec_len as u16); // fits: a block has at most 65536 bytes
}

/// Fills a new linear directory with `.` and `..`.
///
/// # Panics
/// If the block is too small.
pub fn init_directory(block: &mut [u8], own: Inum, parent: Inum) {
    init_dirents(block, DINODE_BYTES);
    for (name, inum) in [(&b"."[..], own), (b"..", parent)] {
        let new = NewDirent { name, inum, kind: FileType::Directory, rahead: 0 };
        let inserted = insert_dirent(block, DINODE_BYTES, &new);
        assert!(matches!(inserted, Ok(Some(_))), "every block has room for two short entries");
    }
}

/// Inserts an entry into the first gap that suffices, and says where; `None` if there is no room.
///
/// The caller has made sure that the name is not there yet, and keeps the counts of dinode and leaf.
///
/// # Errors
/// If the chain of records is broken before the gap. Nothing was changed.
///
/// # Panics
/// If the name's length is not allowed.
pub fn insert_dirent(
    block: &mut [u8],
    start: usize,
    new: &NewDirent<'_>,
) -> Result<Option<usize>, FormatError> {
    insert_dirent_hashed(block, start, new, name_hash(new.name))
}

/// [`insert_dirent`] with a hash that is known already.
///
/// # Errors
/// As [`insert_dirent`].
///
/// # Panics
/// As [`insert_dirent`].
pub fn insert_dirent_hashed(
    block: &mut [u8],
    start: usize,
    new: &NewDirent<'_>,
    hash: u32,
) -> Result<Option<usize>, FormatError> {
    assert!((1..=NAME_BYTES_MAX).contains(&new.name.len()), "names are checked before they are inserted");
    let need = dirent_bytes(new.name.len());
    let mut place = None;
    for entry in Dirents::new(block, start) {
        let entry = entry?;
        if need + entry.needed() <= entry.rec_len {
            place = Some((entry.offset, entry.needed(), entry.rec_len));
            break;
        }
    }
    let Some((donor, keep, rec_len)) = place else { return Ok(None) };
    if keep != 0 {
        put_u16(block, donor + 20, keep as u16); // at most 296
    }
    let at = donor + keep;
    block[at..at + need].fill(0);
    new.inum.write(block, at);
    put_u32(block, at + 16, hash);
    put_u16(block, at + 20, (rec_len - keep) as u16);
    put_u16(block, at + 22, new.name.len() as u16);
    put_u16(block, at + 24, new.kind.dirent());
    put_u16(block, at + 26, new.rahead);
    block[at + DIRENT_BYTES..at + DIRENT_BYTES + new.name.len()].copy_from_slice(new.name);
    Ok(Some(at))
}

/// Removes the entry at `offset`.
///
/// # Errors
/// If no live entry begins there. Nothing was changed.
pub fn remove_dirent(block: &mut [u8], start: usize, offset: usize) -> Result<(), FormatError> {
    let mut previous: Option<(usize, usize)> = None;
    for entry in Dirents::new(block, start) {
        let entry = entry?;
        if entry.offset < offset {
            previous = Some((entry.offset, entry.rec_len));
            continue;
        }
        if entry.offset != offset || entry.is_unused() {
            break;
        }
        let rec_len = entry.rec_len;
        match previous {
            Some((at, before)) => put_u16(block, at + 20, (before + rec_len) as u16),
            None => Inum::default().write(block, offset),
        }
        return Ok(());
    }
    Err(FormatError::Field { what: "offset of a directory entry", value: offset as u64 })
}

/// Makes the entry at `offset`, found before, name another inode.
///
/// # Panics
/// If the offset is not inside the block.
pub fn replace_dirent(block: &mut [u8], offset: usize, inum: Inum, kind: FileType, rahead: u16) {
    inum.write(block, offset);
    put_u16(block, offset + 24, kind.dirent());
    put_u16(block, offset + 26, rahead);
}

/// Moves every entry whose hash is below `boundary` from `old` to `new`, whose area is one unused entry, and says how
/// many. The split of a leaf: the new one takes the lower half.
///
/// # Errors
/// If the chain of records in `old` is broken. `old` is unchanged then, `new` is not.
///
/// # Panics
/// If the blocks differ in size.
pub fn move_dirents_below(
    old: &mut [u8],
    new: &mut [u8],
    start: usize,
    boundary: u32,
) -> Result<u16, FormatError> {
    assert_eq!(old.len(), new.len(), "leaves of one directory have one size");
    let mut moved = Vec::new();
    for entry in Dirents::new(old, start) {
        let entry = entry?;
        if !entry.is_unused() && entry.hash < boundary {
            let kind = FileType::from_dirent(entry.kind).ok_or(FormatError::Field {
                what: "type of a directory entry",
                value: u64::from(entry.kind),
            })?;
            let copy = NewDirent { name: entry.name, inum: entry.inum, kind, rahead: entry.rahead };
            if insert_dirent_hashed(new, start, &copy, entry.hash)?.is_none() {
                return Err(FormatError::Field { what: "entries of a leaf", value: moved.len() as u64 });
            }
            moved.push(entry.offset);
        }
    }
    for &offset in &moved {
        remove_dirent(old, start, offset)?;
    }
    Ok(moved.len() as u16) // at most 65432 / 48
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::LEAF_BYTES;
    use proptest::prelude::*;

    fn file(name: &[u8]) -> NewDirent<'_> {
        NewDirent { name, inum: Inum::from((1, 2)), kind: FileType::Regular, rahead: 0 }
    }

    fn layout(block: &[u8], start: usize) -> Vec<(String, usize, usize)> {
        Dirents::new(block, start)
            .map(|entry| entry.unwrap())
            .map(|e| {
                let name =
                    if e.is_unused() { "-".into() } else { String::from_utf8_lossy(e.name).into_owned() };
                (name, e.rec_len, e.offset)
            })
            .collect()
    }

    #[test]
    fn hashes_and_cookies() {
        let long = [b'x'; 255];
        let vectors: [(&[u8], u32, u32); 20] = [
            (b"", 0, 0),
            (b".", 0x0ED4_E242, 124_416_289),
            (b"..", 0x9608_161C, 1_258_556_174),
            (b"a", 0xE8B7_BE43, 1_952_177_953),
            (b"jindex", 0x5EFC_1D83, 0x5EFC_1D83 >> 1),
            (b"per_node", 0x486E_EE32, 0x486E_EE32 >> 1),
            (b"inum", 0x4468_11E9, 0x4468_11E9 >> 1),
            (b"statfs", 0x1AEF_248E, 0x1AEF_248E >> 1),
            (b"rindex", 0xB179_9D75, 0xB179_9D75 >> 1),
            (b"quota", 0x6C1C_0FED, 0x6C1C_0FED >> 1),
            (b"journal0", 0xFC77_45EB, 2_117_837_557),
            (b"journal1", 0x8B70_757D, 0x8B70_757D >> 1),
            (b"inum_range0", 0xE1FD_87D0, 0xE1FD_87D0 >> 1),
            (b"statfs_change0", 0x0BBC_E579, 0x0BBC_E579 >> 1),
            (b"quota_change0", 0x7DF6_519F, 0x7DF6_519F >> 1),
            (b"lost+found", 0x6AB4_7928, 895_106_196),
            (b"hello world", 0x0D4A_1185, 111_478_978),
            (b"foo.txt", 0x3451_A5E8, 438_883_060),
            (b"\xc3\xa9\xc3\xa8", 0xABCF_574C, 1_441_246_118),
            (&long, 0x3D66_E3D9, 515_076_588),
        ];
        for (name, hash, cookie) in vectors {
            assert_eq!(name_hash(name), hash);
            assert_eq!(hash >> 1, cookie);
        }
    }

    #[test]
    fn a_freed_record_is_taken_over_by_the_next_that_fits() {
        // 13.7: the second name is deleted and another added.
        let mut block = vec![0; 4096];
        init_directory(&mut block, Inum::from((1, 10)), Inum::from((1, 9)));
        assert_eq!(layout(&block, 232), [(".".into(), 48, 232), ("..".into(), 3816, 280)]);
        for name in [&b"a"[..], b"hl2", b"c"] {
            insert_dirent(&mut block, 232, &file(name)).unwrap().unwrap();
        }
        let at = find_dirent(&block, 232, b"hl2").unwrap().unwrap().offset;
        assert_eq!(at, 376);
        remove_dirent(&mut block, 232, at).unwrap();
        assert_eq!(layout(&block, 232)[2], ("a".into(), 96, 328));
        assert_eq!(insert_dirent(&mut block, 232, &file(b"hl3")), Ok(Some(376)));
        let last = layout(&block, 232).pop().unwrap();
        assert_eq!(last.1 + last.2, 4096);
    }

    #[test]
    fn the_first_entry_stays_as_an_unused_one() {
        let mut block = vec![0; 512];
        init_directory(&mut block, Inum::from((1, 10)), Inum::from((1, 9)));
        remove_dirent(&mut block, 232, 232).unwrap();
        assert_eq!(layout(&block, 232)[0], ("-".into(), 48, 232));
        assert_eq!(find_dirent(&block, 232, b".").unwrap(), None);
        assert!(remove_dirent(&mut block, 232, 232).is_err());
        assert_eq!(insert_dirent(&mut block, 232, &file(b"12345678")), Ok(Some(232)));
        replace_dirent(&mut block, 232, Inum::from((5, 6)), FileType::Fifo, 1);
        let entry = find_dirent(&block, 232, b"12345678").unwrap().unwrap();
        assert_eq!((entry.inum, entry.kind, entry.rahead), (Inum::from((5, 6)), 1, 1));
    }

    #[test]
    fn as_many_smallest_entries_fit_as_the_format_says() {
        for (bytes, leaf, linear) in [(512, 8, 5), (1024, 19, 16), (2048, 40, 37), (4096, 83, 80)] {
            for (start, count) in [(LEAF_BYTES, leaf), (DINODE_BYTES, linear)] {
                let mut block = vec![0; bytes];
                init_dirents(&mut block, start);
                let fit = (0..200).take_while(|i| {
                    insert_dirent(&mut block, start, &file(format!("{i:03}").as_bytes())).unwrap().is_some()
                });
                assert_eq!(fit.count(), count);
            }
        }
    }

    #[test]
    fn a_split_moves_the_lower_half() {
        let (mut old, mut new) = (vec![0; 4096], vec![0; 4096]);
        init_dirents(&mut old, LEAF_BYTES);
        init_dirents(&mut new, LEAF_BYTES);
        let names: Vec<String> = (0..80).map(|i| format!("n{i}")).collect();
        for name in &names {
            insert_dirent(&mut old, LEAF_BYTES, &file(name.as_bytes())).unwrap().unwrap();
        }
        let moved = move_dirents_below(&mut old, &mut new, LEAF_BYTES, 1 << 31).unwrap();
        assert!(20 < moved && moved < 60);
        for name in &names {
            let low = name_hash(name.as_bytes()) < 1 << 31;
            assert_eq!(find_dirent(&new, LEAF_BYTES, name.as_bytes()).unwrap().is_some(), low);
            assert_eq!(find_dirent(&old, LEAF_BYTES, name.as_bytes()).unwrap().is_some(), !low);
        }
    }

    proptest! {
        #[test]
        fn inserting_and_removing_is_a_set(ops in prop::collection::vec((any::<bool>(), "[a-f]{1,12}"), 1..200)) {
            let mut block = vec![0; 1024];
            init_dirents(&mut block, LEAF_BYTES);
            let mut set = std::collections::BTreeSet::new();
            for (add, name) in ops {
                let found = find_dirent(&block, LEAF_BYTES, name.as_bytes()).unwrap().map(|e| e.offset);
                prop_assert_eq!(found.is_some(), set.contains(&name));
                match (add, found) {
                    (true, None) => {
                        let at = insert_dirent(&mut block, LEAF_BYTES, &file(name.as_bytes())).unwrap();
                        set.extend(at.map(|_| name));
                    }
                    (false, Some(at)) => {
                        remove_dirent(&mut block, LEAF_BYTES, at).unwrap();
                        set.remove(&name);
                    }
                    _ => {}
                }
                let live = Dirents::new(&block, LEAF_BYTES).filter(|e| !e.as_ref().unwrap().is_unused()).count();
                prop_assert_eq!(live, set.len());
            }
        }

        #[test]
        fn hostile_bytes_end(bytes in prop::collection::vec(any::<u8>(), 0..600), start in 0_usize..700) {
            let mut bytes = bytes;
            prop_assert!(Dirents::new(&bytes, start).count() < 64);
            let _ = find_dirent(&bytes, start, b"x");
            let _ = insert_dirent(&mut bytes, start, &file(b"x"));
            let _ = remove_dirent(&mut bytes, start, start);
        }
    }
}
