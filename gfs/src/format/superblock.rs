//! The superblock: one copy at byte 65536.
//!
//! | offset | bytes | field | offset | bytes | field |
//! |---|---|---|---|---|---|
//! | 0 | 24 | metadata header | 48 | 16 | master directory |
//! | 24 | 4 | filesystem format | 80 | 16 | root directory |
//! | 28 | 4 | multihost format | 96 | 64 | lock protocol |
//! | 36 | 4 | block size | 160 | 64 | lock table |
//! | 40 | 4 | its logarithm | 256 | 16 | uuid |

use super::bytes::{head, put_u32, u32_at};
use super::{BlockSize, FormatError, Inum, MetaHeader, MetaType};

/// Where it stands on the device.
pub const SUPERBLOCK_OFFSET_BYTES: u64 = 65536;
/// Its length.
pub const SUPERBLOCK_BYTES: usize = 272;
/// The oldest filesystem format there is.
pub const FORMAT_MIN: u32 = 1801;
/// The newest: it allows `trusted.` attributes.
pub const FORMAT_MAX: u32 = 1802;
/// The one multihost format there is.
pub const MULTIHOST_FORMAT: u32 = 1900;
/// Room for lock protocol and lock table, the final NUL included.
pub const LOCK_STRING_BYTES: usize = 64;

/// The superblock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// 1801 or 1802.
    pub format: u32,
    /// Of every block.
    pub block_size: BlockSize,
    /// The directory of system files.
    pub master: Inum,
    /// `/`.
    pub root: Inum,
    /// `lock_nolock` or `lock_dlm`; begins with `fsck_` while a checker works.
    pub lock_proto: String,
    /// `cluster:name`.
    pub lock_table: String,
    /// Raw.
    pub uuid: [u8; 16],
}

impl Superblock {
    /// Reads and checks a superblock.
    ///
    /// # Errors
    /// Whatever forbids a mount: no superblock, an unknown format or block size.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let bytes = head("superblock", bytes, SUPERBLOCK_BYTES)?;
        MetaHeader::expect(bytes, MetaType::Superblock)?;
        let format = u32_at(bytes, 24);
        if !(FORMAT_MIN..=FORMAT_MAX).contains(&format) {
            return Err(FormatError::Field { what: "filesystem format", value: u64::from(format) });
        }
        let multihost = u32_at(bytes, 28);
        if multihost != MULTIHOST_FORMAT {
            return Err(FormatError::Field { what: "multihost format", value: u64::from(multihost) });
        }
        let block_size = BlockSize::new(u32_at(bytes, 36))?;
        let shift = u32_at(bytes, 40);
        if shift != block_size.shift() {
            return Err(FormatError::Field { what: "block size shift", value: u64::from(shift) });
        }
        let mut uuid = [0; 16];
        uuid.copy_from_slice(&bytes[256..272]);
        Ok(Self {
            format,
            block_size,
            master: Inum::read(bytes, 48),
            root: Inum::read(bytes, 80),
            lock_proto: text(&bytes[96..160]),
            lock_table: text(&bytes[160..224]),
            uuid,
        })
    }

    /// Writes it.
    ///
    /// # Errors
    /// `Field` if lock protocol or lock table do not fit with their NUL, or contain one.
    ///
    /// # Panics
    /// If `bytes` has no room.
    pub fn encode(&self, bytes: &mut [u8]) -> Result<(), FormatError> {
        for (what, string) in [("lock protocol", &self.lock_proto), ("lock table", &self.lock_table)] {
            if LOCK_STRING_BYTES <= string.len() || string.contains('\0') {
                return Err(FormatError::Field { what, value: string.len() as u64 });
            }
        }
        MetaHeader { kind: MetaType::Superblock, jid: 0 }.encode(bytes);
        put_u32(bytes, 24, self.format);
        put_u32(bytes, 28, MULTIHOST_FORMAT);
        put_u32(bytes, 36, self.block_size.bytes());
        put_u32(bytes, 40, self.block_size.shift());
        self.master.write(bytes, 48);
        self.root.write(bytes, 80);
        for (at, string) in [(96, &self.lock_proto), (160, &self.lock_table)] {
            bytes[at..at + LOCK_STRING_BYTES].fill(0);
            bytes[at..at + string.len()].copy_from_slice(string.as_bytes());
        }
        bytes[256..272].copy_from_slice(&self.uuid);
        Ok(())
    }
}

/// Up to the NUL. Bytes that are no UTF-8 cannot name a cluster and are shown as replacement characters.
fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::BlockNo;

    #[test]
    fn a_superblock_round_trips_and_strings_that_do_not_fit_are_refused() {
        let mut superblock = Superblock {
            format: 1802,
            block_size: BlockSize::B4096,
            master: Inum { formal: 3, addr: BlockNo(2072) },
            root: Inum { formal: 16, addr: BlockNo(4656) },
            lock_proto: "lock_dlm".into(),
            lock_table: "x".repeat(63),
            uuid: [9; 16],
        };
        let mut bytes = [0; SUPERBLOCK_BYTES];
        superblock.encode(&mut bytes).unwrap();
        assert_eq!(Superblock::decode(&bytes).as_ref(), Ok(&superblock));
        superblock.lock_table.push('x');
        assert!(superblock.encode(&mut bytes).is_err());
        for (at, value) in [(0, 0), (4, 2), (24, 1803), (28, 1), (36, 4095), (40, 13)] {
            let mut broken = bytes;
            put_u32(&mut broken, at, value);
            assert!(Superblock::decode(&broken).is_err(), "{value} at {at}");
        }
    }
}
