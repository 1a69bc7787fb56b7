//! The dinode: 232 bytes about an inode, then its data, entries or pointers.
//!
//! | offset | field | offset | field | offset | field |
//! |---|---|---|---|---|---|
//! | 24 | formal number, own block | 80, 88 | mtime, ctime | 138 | height (2) |
//! | 40 | mode (4) | 96, 100 | major, minor (4) | 146 | depth (2) |
//! | 44, 48 | uid, gid (4) | 104, 112 | goals | 148 | entries (4) |
//! | 52 | nlink (4) | 120 | generation | 168 | xattr block |
//! | 56, 64 | size, blocks | 128 | flags (4) | 176.. | atime, mtime, ctime nsec (4) |
//! | 72 | atime | 132 | payload format (4) | 232 | payload |

use super::bytes::{head, i64_at, put_i64, put_u16, put_u32, put_u64, u16_at, u32_at, u64_at};
use super::{BlockNo, BlockSize, FormatError, HASH_DEPTH_MAX, Inum, META_HEADER_BYTES, MetaHeader, MetaType};
use std::fmt;
use std::ops::{BitOr, BitOrAssign};

/// The length of the part before the payload.
pub const DINODE_BYTES: usize = 232;
/// Payload format of the rindex file.
pub const PAYLOAD_FORMAT_RINDEX: u32 = 1100;
/// Payload format of a linear directory.
pub const PAYLOAD_FORMAT_DIRENTS: u32 = 1200;
/// Payload format of the quota file, as mkfs writes it.
pub const PAYLOAD_FORMAT_QUOTA: u32 = 1500;

/// Seconds since 1970 (the floor) and nanoseconds on top of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Timestamp {
    /// Rounded down, also before 1970.
    pub sec: i64,
    /// 0 to 999,999,999.
    pub nsec: u32,
}

/// What kind of file a mode says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[expect(missing_docs, reason = "the kinds of POSIX")]
pub enum FileType {
    Fifo,
    CharDevice,
    Directory,
    BlockDevice,
    Regular,
    Symlink,
    Socket,
}

impl FileType {
    const NUMBERS: [(Self, u16); 7] = [
        (Self::Fifo, 1),
        (Self::CharDevice, 2),
        (Self::Directory, 4),
        (Self::BlockDevice, 6),
        (Self::Regular, 8),
        (Self::Symlink, 10),
        (Self::Socket, 12),
    ];

    /// From `st_mode`.
    #[must_use]
    pub fn from_mode(mode: u32) -> Option<Self> {
        Self::from_dirent(u16::try_from(mode >> 12).ok()?)
    }

    /// From a dirent's type (`DT_...`).
    #[must_use]
    pub fn from_dirent(number: u16) -> Option<Self> {
        Self::NUMBERS.iter().find(|row| row.1 == number).map(|row| row.0)
    }

    /// As a dirent's type (`DT_...`).
    #[must_use]
    pub fn dirent(self) -> u16 {
        Self::NUMBERS[self as usize].1
    }

    /// As the type bits of `st_mode`.
    #[must_use]
    pub fn mode_bits(self) -> u32 {
        u32::from(self.dirent()) << 12
    }
}

/// The flags of a dinode.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct DinodeFlags(pub u32);

impl DinodeFlags {
    /// Data is journalled. Always set on directories.
    pub const JDATA: Self = Self(0x0000_0001);
    /// A directory with a hash table.
    pub const EXHASH: Self = Self(0x0000_0002);
    /// `eattr` names an indirect block.
    pub const EA_INDIRECT: Self = Self(0x0000_0008);
    /// Historic.
    pub const DIRECTIO: Self = Self(0x0000_0010);
    /// `chattr +i`.
    pub const IMMUTABLE: Self = Self(0x0000_0020);
    /// `chattr +a`.
    pub const APPENDONLY: Self = Self(0x0000_0040);
    /// `chattr +A`.
    pub const NOATIME: Self = Self(0x0000_0080);
    /// `chattr +S`.
    pub const SYNC: Self = Self(0x0000_0100);
    /// A system inode; children inherit it.
    pub const SYSTEM: Self = Self(0x0000_0200);
    /// Children are spread over resource groups.
    pub const TOPDIR: Self = Self(0x0000_0400);
    /// A truncation has begun and must be finished by whoever takes the inode's lock next.
    pub const TRUNC_IN_PROG: Self = Self(0x2000_0000);
    /// Historic.
    pub const INHERIT_DIRECTIO: Self = Self(0x4000_0000);
    /// New files in this directory get JDATA, new directories this flag.
    pub const INHERIT_JDATA: Self = Self(0x8000_0000);

    /// Whether all of `flags` are set.
    #[must_use]
    pub const fn contains(self, flags: Self) -> bool {
        self.0 & flags.0 == flags.0
    }

    /// These without `flags`.
    #[must_use]
    pub const fn without(self, flags: Self) -> Self {
        Self(self.0 & !flags.0)
    }
}

impl BitOr for DinodeFlags {
    type Output = Self;
    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl BitOrAssign for DinodeFlags {
    fn bitor_assign(&mut self, other: Self) {
        self.0 |= other.0;
    }
}

impl fmt::Debug for DinodeFlags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DinodeFlags({:#x})", self.0)
    }
}

/// A dinode without its payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dinode {
    /// The journal of the node that last logged the block; for information only.
    pub jid: u32,
    /// Its numbers; `addr` is its own block.
    pub inum: Inum,
    /// The full `st_mode`.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Links; a directory has 2 and one per subdirectory.
    pub nlink: u32,
    /// A linear directory's is the payload's, a hashed one's that of its table, a link's that of the target.
    pub size_bytes: u64,
    /// All blocks it owns, this one included.
    pub blocks: u64,
    /// Last access.
    pub atime: Timestamp,
    /// Last change of the contents.
    pub mtime: Timestamp,
    /// Last change of anything.
    pub ctime: Timestamp,
    /// Of a device file.
    pub major: u32,
    /// Of a device file.
    pub minor: u32,
    /// Where to look for the next block.
    pub goal_meta: BlockNo,
    /// The same.
    pub goal_data: BlockNo,
    /// The resource group's counter at creation; 0 from mkfs.
    pub generation: u64,
    /// Flags.
    pub flags: DinodeFlags,
    /// Never to be insisted on: the kernel rewrites it.
    pub payload_format: u32,
    /// Height of the tree; 0 is stuffed.
    pub height: u16,
    /// Logarithm of the hash table's length, of hashed directories.
    pub depth: u16,
    /// Live entries of a directory, `.` and `..` included.
    pub entries: u32,
    /// Block of attributes, or the indirect block that names such.
    pub eattr: BlockNo,
}

impl Dinode {
    /// Reads a dinode; only what its structure needs is checked, see [`Self::check`].
    ///
    /// # Errors
    /// Too short, or no dinode.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let bytes = head("dinode", bytes, DINODE_BYTES)?;
        let header = MetaHeader::expect(bytes, MetaType::Dinode)?;
        let time = |sec, nsec| Timestamp { sec: i64_at(bytes, sec), nsec: u32_at(bytes, nsec) };
        Ok(Self {
            jid: header.jid,
            inum: Inum::read(bytes, 24),
            mode: u32_at(bytes, 40),
            uid: u32_at(bytes, 44),
            gid: u32_at(bytes, 48),
            nlink: u32_at(bytes, 52),
            size_bytes: u64_at(bytes, 56),
            blocks: u64_at(bytes, 64),
            atime: time(72, 176),
            mtime: time(80, 180),
            ctime: time(88, 184),
            major: u32_at(bytes, 96),
            minor: u32_at(bytes, 100),
            goal_meta: BlockNo(u64_at(bytes, 104)),
            goal_data: BlockNo(u64_at(bytes, 112)),
            generation: u64_at(bytes, 120),
            flags: DinodeFlags(u32_at(bytes, 128)),
            payload_format: u32_at(bytes, 132),
            height: u16_at(bytes, 138),
            depth: u16_at(bytes, 146),
            entries: u32_at(bytes, 148),
            eattr: BlockNo(u64_at(bytes, 168)),
        })
    }

    /// Writes the header part, and leaves the payload.
    ///
    /// # Panics
    /// If there is no room.
    pub fn encode(&self, bytes: &mut [u8]) {
        MetaHeader { kind: MetaType::Dinode, jid: self.jid }.encode(bytes);
        self.inum.write(bytes, 24);
        put_u32(bytes, 40, self.mode);
        put_u32(bytes, 44, self.uid);
        put_u32(bytes, 48, self.gid);
        put_u32(bytes, 52, self.nlink);
        put_u64(bytes, 56, self.size_bytes);
        put_u64(bytes, 64, self.blocks);
        for (time, sec, nsec) in [(self.atime, 72, 176), (self.mtime, 80, 180), (self.ctime, 88, 184)] {
            put_i64(bytes, sec, time.sec);
            put_u32(bytes, nsec, time.nsec);
        }
        put_u32(bytes, 96, self.major);
        put_u32(bytes, 100, self.minor);
        put_u64(bytes, 104, self.goal_meta.0);
        put_u64(bytes, 112, self.goal_data.0);
        put_u64(bytes, 120, self.generation);
        put_u32(bytes, 128, self.flags.0);
        put_u32(bytes, 132, self.payload_format);
        put_u16(bytes, 138, self.height);
        put_u16(bytes, 146, self.depth);
        put_u32(bytes, 148, self.entries);
        put_u64(bytes, 168, self.eattr.0);
    }

    /// The rules that let the kernel use the inode: right place, height and depth possible, stuffed data fits.
    ///
    /// # Errors
    /// `Field` with the first rule it breaks.
    pub fn check(&self, size: BlockSize, at: BlockNo) -> Result<(), FormatError> {
        let bad = |what, value| Err(FormatError::Field { what, value });
        if self.inum.addr != at {
            return bad("own block number in a dinode", self.inum.addr.0);
        }
        if FileType::from_mode(self.mode).is_none() {
            return bad("mode", u64::from(self.mode));
        }
        if size.height_max() < usize::from(self.height) {
            return bad("height", u64::from(self.height));
        }
        if HASH_DEPTH_MAX < self.depth {
            return bad("depth of a hash table", u64::from(self.depth));
        }
        if self.is_hashed() {
            if self.depth < size.depth_min() {
                return bad("depth of a hash table", u64::from(self.depth));
            }
            if self.size_bytes != 8 << self.depth {
                return bad("size of a hash table", self.size_bytes);
            }
        }
        if self.height == 0 && (size.stuffed_bytes() as u64) < self.size_bytes && !self.is_device() {
            return bad("size of a stuffed inode", self.size_bytes);
        }
        Ok(())
    }

    /// What kind of file it is, if the mode says a kind that exists.
    #[must_use]
    pub fn file_type(&self) -> Option<FileType> {
        FileType::from_mode(self.mode)
    }

    /// Whether it is a directory.
    #[must_use]
    pub fn is_dir(&self) -> bool {
        self.file_type() == Some(FileType::Directory)
    }

    /// Whether it is a directory with a hash table.
    #[must_use]
    pub fn is_hashed(&self) -> bool {
        self.is_dir() && self.flags.contains(DinodeFlags::EXHASH)
    }

    fn is_device(&self) -> bool {
        matches!(self.file_type(), Some(FileType::CharDevice | FileType::BlockDevice))
    }
}

/// Pointer `index` in a dinode's payload, or `None` if the block has no such.
#[must_use]
pub fn pointer(block: &[u8], index: usize) -> Option<BlockNo> {
    pointer_from(block, DINODE_BYTES, index)
}

/// Pointer `index` in an indirect block (or a block of a hash table), or `None` if the block has no such.
#[must_use]
pub fn indirect_pointer(block: &[u8], index: usize) -> Option<BlockNo> {
    pointer_from(block, META_HEADER_BYTES, index)
}

/// Sets pointer `index` in a dinode's payload.
///
/// # Panics
/// If the block has no such.
pub fn set_pointer(block: &mut [u8], index: usize, to: BlockNo) {
    put_u64(block, DINODE_BYTES + index * 8, to.0);
}

/// Sets pointer `index` in an indirect block.
///
/// # Panics
/// If the block has no such.
pub fn set_indirect_pointer(block: &mut [u8], index: usize, to: BlockNo) {
    put_u64(block, META_HEADER_BYTES + index * 8, to.0);
}

fn pointer_from(block: &[u8], start: usize, index: usize) -> Option<BlockNo> {
    let at = index.checked_mul(8)?.checked_add(start)?;
    (at.checked_add(8)? <= block.len()).then(|| BlockNo(u64_at(block, at)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Dinode {
        Dinode {
            jid: 1,
            inum: Inum { formal: 2, addr: BlockNo(3) },
            mode: 0o040_755,
            uid: 5,
            gid: 6,
            nlink: 7,
            size_bytes: 8 << 8,
            blocks: 9,
            atime: Timestamp { sec: -5, nsec: 123 },
            mtime: Timestamp { sec: 11, nsec: 12 },
            ctime: Timestamp { sec: 13, nsec: 14 },
            major: 15,
            minor: 70000,
            goal_meta: BlockNo(17),
            goal_data: BlockNo(18),
            generation: 19,
            flags: DinodeFlags::JDATA | DinodeFlags::EXHASH,
            payload_format: 20,
            height: 0,
            depth: 8,
            entries: 23,
            eattr: BlockNo(24),
        }
    }

    #[test]
    fn every_field_has_its_offset() {
        let mut bytes = [0; DINODE_BYTES];
        sample().encode(&mut bytes);
        assert_eq!(Dinode::decode(&bytes), Ok(sample()));
        let eight = [
            (24, 2),
            (32, 3),
            (56, 2048),
            (64, 9),
            (80, 11),
            (88, 13),
            (104, 17),
            (112, 18),
            (120, 19),
            (168, 24),
        ];
        for (at, value) in eight {
            assert_eq!(u64_at(&bytes, at), value, "at {at}");
        }
        let four = [
            (20, 1),
            (40, 0o040_755),
            (44, 5),
            (48, 6),
            (52, 7),
            (96, 15),
            (100, 70000),
            (128, 3),
            (132, 20),
            (148, 23),
            (176, 123),
            (180, 12),
            (184, 14),
        ];
        for (at, value) in four {
            assert_eq!(u32_at(&bytes, at), value, "at {at}");
        }
        assert_eq!((u16_at(&bytes, 138), u16_at(&bytes, 146)), (0, 8));
        assert_eq!(i64_at(&bytes, 72), -5);
    }

    #[test]
    fn what_the_kernel_refuses_is_refused() {
        let size = BlockSize::B4096;
        assert_eq!(sample().check(size, BlockNo(3)), Ok(()));
        assert!(sample().check(size, BlockNo(4)).is_err());
        let cases: [fn(&mut Dinode); 6] = [
            |d| d.mode = 0,
            |d| d.height = 7,
            |d| d.depth = 18,
            |d| d.depth = 7,
            |d| d.size_bytes = 4096,
            |d| (d.flags, d.size_bytes) = (DinodeFlags::JDATA, 3865),
        ];
        for (i, change) in cases.into_iter().enumerate() {
            let mut dinode = sample();
            change(&mut dinode);
            assert!(dinode.check(size, BlockNo(3)).is_err(), "case {i}");
        }
    }

    #[test]
    fn pointers_outside_the_block_do_not_exist() {
        let mut block = vec![0; 512];
        set_pointer(&mut block, 34, BlockNo(5));
        assert_eq!(pointer(&block, 34), Some(BlockNo(5)));
        assert_eq!(pointer(&block, 35), None);
        set_indirect_pointer(&mut block, 60, BlockNo(6));
        assert_eq!(indirect_pointer(&block, 60), Some(BlockNo(6)));
        assert_eq!(indirect_pointer(&block, 61), None);
        assert_eq!(indirect_pointer(&block, usize::MAX), None);
    }

    #[test]
    fn file_types_go_both_ways() {
        for number in 0..16 {
            if let Some(kind) = FileType::from_dirent(number) {
                assert_eq!(kind.dirent(), number);
                assert_eq!(FileType::from_mode(kind.mode_bits() | 0o7777), Some(kind));
            }
        }
    }
}
