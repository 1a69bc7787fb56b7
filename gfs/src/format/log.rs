//! The journal's blocks: log headers, and descriptors of what was logged.
//!
//! | header offset | field | header offset | field |
//! |---|---|---|---|
//! | 24 | sequence (8) | 64 | own block (8) |
//! | 32 | flags (4) | 72 | journal inode (8) |
//! | 36 | tail (4) | 80 | statfs_change inode (8) |
//! | 40 | own ring index (4) | 88 | quota_change inode (8) |
//! | 44 | CRC-32 of bytes 0..48, itself as 0 | 96, 104, 112 | local total, free, dinodes |
//! | 48 | CRC-32C, not inverted, of bytes 52.. | | |
//! | 52, 56 | time: nsec (4), sec (8) | | |
//!
//! | descriptor offset | field |
//! |---|---|
//! | 24 | 300 metadata, 301 revokes, 302 journalled data |
//! | 28 | ring blocks covered, this one included |
//! | 32 | number of entries |
//! | 72 | entries |

use super::bytes::{head, i64_at, put_i64, put_u32, put_u64, u32_at, u64_at};
use super::{
    BlockNo, BlockSize, FormatError, META_HEADER_BYTES, MetaHeader, MetaType, StatfsChange, Timestamp,
};

/// The length of a header without time, addresses and local numbers.
pub const LOG_HEADER_V1_BYTES: usize = 48;
/// The length of a header with them.
pub const LOG_HEADER_V2_BYTES: usize = 120;
/// The length of a descriptor without its entries.
pub const LOG_DESCRIPTOR_BYTES: usize = 72;
/// Descriptor type of metadata.
pub const METADATA_TYPE: u32 = 300;
/// Descriptor type of revokes.
pub const REVOKE_TYPE: u32 = 301;
/// Descriptor type of journalled data.
pub const JDATA_TYPE: u32 = 302;

/// The flags of a log header; only [`Self::UNMOUNT`] has an effect.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LogFlags(pub u32);

impl LogFlags {
    /// The log is clean at this header.
    pub const UNMOUNT: u32 = 0x0000_0001;
    /// An ordinary flush.
    pub const NORMAL: u32 = 0x0000_0002;
    /// Somebody waits for it.
    pub const SYNC: u32 = 0x0000_0004;
    /// The filesystem is being unmounted.
    pub const SHUTDOWN: u32 = 0x0000_0008;
    /// Written by the recovery of the journal.
    pub const RECOVERY: u32 = 0x0000_0020;
    /// Who asked for an unmount flush.
    pub const BY_SHUTDOWN: u32 = 0x0000_0100;
    /// Written by a program.
    pub const USERSPACE: u32 = 0x8000_0000;

    /// Whether the journal needs no replay when this is its head.
    #[must_use]
    pub fn is_clean(self) -> bool {
        self.0 & Self::UNMOUNT != 0
    }
}

/// A log header: the commit of a flush.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogHeader {
    /// The journal, for information.
    pub jid: u32,
    /// One more than the header before.
    pub sequence: u64,
    /// Flags.
    pub flags: LogFlags,
    /// Ring index of the oldest flush still needed.
    pub tail: u32,
    /// Its own ring index.
    pub index: u32,
    /// Absent in headers of old implementations.
    pub v2: Option<LogHeaderV2>,
}

/// What newer log headers have on top.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LogHeaderV2 {
    /// When it was written; 0 from mkfs.
    pub time: Timestamp,
    /// Its own block.
    pub addr: BlockNo,
    /// The journal's inode.
    pub jinode: BlockNo,
    /// The node's statfs_change inode.
    pub statfs_addr: BlockNo,
    /// The node's quota_change inode.
    pub quota_addr: BlockNo,
    /// The node's whole pending change of statfs as of this commit.
    pub local: StatfsChange,
}

impl LogHeader {
    /// Reads a header from a whole journal block and checks both sums. A CRC-32C of 0 marks a header without v2.
    ///
    /// # Errors
    /// No header, or a wrong sum.
    pub fn decode(block: &[u8]) -> Result<Self, FormatError> {
        let bytes = head("log header", block, LOG_HEADER_V2_BYTES)?;
        let header = MetaHeader::expect(bytes, MetaType::LogHeader)?;
        let (stored, computed) = (u32_at(bytes, 44), hash(bytes));
        if stored != computed {
            return Err(FormatError::Checksum { what: "log header", stored, computed });
        }
        let stored = u32_at(bytes, 48);
        let v2 = if stored == 0 {
            None
        } else {
            let computed = crc(block);
            if stored != computed {
                return Err(FormatError::Checksum { what: "log header block", stored, computed });
            }
            Some(LogHeaderV2 {
                time: Timestamp { sec: i64_at(bytes, 56), nsec: u32_at(bytes, 52) },
                addr: BlockNo(u64_at(bytes, 64)),
                jinode: BlockNo(u64_at(bytes, 72)),
                statfs_addr: BlockNo(u64_at(bytes, 80)),
                quota_addr: BlockNo(u64_at(bytes, 88)),
                local: StatfsChange {
                    total: i64_at(bytes, 96),
                    free: i64_at(bytes, 104),
                    dinodes: i64_at(bytes, 112),
                },
            })
        };
        Ok(Self {
            jid: header.jid,
            sequence: u64_at(bytes, 24),
            flags: LogFlags(u32_at(bytes, 32)),
            tail: u32_at(bytes, 36),
            index: u32_at(bytes, 40),
            v2,
        })
    }

    /// Fills a whole journal block: the header with its sums, zeros behind it.
    ///
    /// # Panics
    /// If there is no room.
    pub fn encode(&self, block: &mut [u8]) {
        block.fill(0);
        MetaHeader { kind: MetaType::LogHeader, jid: self.jid }.encode(block);
        put_u64(block, 24, self.sequence);
        put_u32(block, 32, self.flags.0);
        put_u32(block, 36, self.tail);
        put_u32(block, 40, self.index);
        let hash = hash(block);
        put_u32(block, 44, hash);
        let Some(v2) = &self.v2 else { return };
        put_u32(block, 52, v2.time.nsec);
        put_i64(block, 56, v2.time.sec);
        put_u64(block, 64, v2.addr.0);
        put_u64(block, 72, v2.jinode.0);
        put_u64(block, 80, v2.statfs_addr.0);
        put_u64(block, 88, v2.quota_addr.0);
        put_i64(block, 96, v2.local.total);
        put_i64(block, 104, v2.local.free);
        put_i64(block, 112, v2.local.dinodes);
        let crc = crc(block);
        put_u32(block, 48, crc);
    }

    /// Tells this header from every other that was ever written with its sequence; never 0.
    #[must_use]
    pub fn fingerprint(&self) -> u32 {
        let mut bytes = [0; 512];
        self.encode(&mut bytes);
        crc32c::crc32c(&bytes).max(1)
    }
}

fn hash(header: &[u8]) -> u32 {
    let mut copy = [0; LOG_HEADER_V1_BYTES];
    copy.copy_from_slice(&header[..LOG_HEADER_V1_BYTES]);
    put_u32(&mut copy, 44, 0);
    crc32fast::hash(&copy)
}

/// CRC-32C without the final inversion.
fn crc(block: &[u8]) -> u32 {
    !crc32c::crc32c(&block[52..])
}

/// What a descriptor describes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogKind {
    /// Copies of metadata blocks follow.
    Metadata,
    /// Blocks of which no copy before this place counts.
    Revoke,
    /// Copies of data blocks follow.
    Jdata,
}

/// A descriptor without its entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogDescriptor {
    /// Of what.
    pub kind: LogKind,
    /// Ring blocks covered, this one included.
    pub length: u32,
    /// Number of entries.
    pub count: u32,
}

impl LogDescriptor {
    /// Reads a descriptor and checks that its counts agree with each other and with the block size.
    ///
    /// # Errors
    /// No descriptor, an unknown type, or impossible counts.
    pub fn decode(block: &[u8], size: BlockSize) -> Result<Self, FormatError> {
        let block = head("log descriptor", block, size.usize())?;
        MetaHeader::expect(block, MetaType::LogDescriptor)?;
        let (number, length, count) = (u32_at(block, 24), u32_at(block, 28), u32_at(block, 32));
        let bad = |what, value| Err(FormatError::Field { what, value: u64::from(value) });
        let kind = match number {
            METADATA_TYPE => LogKind::Metadata,
            REVOKE_TYPE => LogKind::Revoke,
            JDATA_TYPE => LogKind::Jdata,
            _ => return bad("type of a log descriptor", number),
        };
        let most = match kind {
            LogKind::Metadata => size.descriptor_pointers() as u64,
            LogKind::Jdata => size.descriptor_pairs() as u64,
            LogKind::Revoke => {
                size.descriptor_pointers() as u64
                    + u64::from(length.saturating_sub(1)) * size.indirect_pointers() as u64
            }
        };
        if most < u64::from(count) {
            return bad("entries of a log descriptor", count);
        }
        // For a revoke the length may be more than its entries need, never less.
        let fits = match kind {
            LogKind::Revoke => 1 <= length,
            LogKind::Metadata | LogKind::Jdata => count.checked_add(1) == Some(length),
        };
        if !fits {
            return bad("length of a log descriptor", length);
        }
        Ok(Self { kind, length, count })
    }

    /// Fills a block with a descriptor of metadata or revokes; further revokes go to continuation blocks.
    ///
    /// # Panics
    /// If `entries` are more than fit, or `kind` is journalled data.
    pub fn encode(&self, block: &mut [u8], entries: &[BlockNo]) {
        assert!(self.kind != LogKind::Jdata, "journalled data has pairs");
        self.encode_head(block);
        for (slot, entry) in block[LOG_DESCRIPTOR_BYTES..].chunks_exact_mut(8).zip(entries) {
            put_u64(slot, 0, entry.0);
        }
        assert!(
            entries.len() <= (block.len() - LOG_DESCRIPTOR_BYTES) / 8,
            "a descriptor has room for its entries"
        );
    }

    /// Fills a block with a descriptor of journalled data: blocks, and whether their magic number was blanked.
    ///
    /// # Panics
    /// If `entries` are more than fit.
    pub fn encode_jdata(block: &mut [u8], entries: &[(BlockNo, bool)]) {
        assert!(
            entries.len() <= (block.len() - LOG_DESCRIPTOR_BYTES) / 16,
            "a descriptor has room for its entries"
        );
        let count = entries.len() as u32;
        Self { kind: LogKind::Jdata, length: count + 1, count }.encode_head(block);
        for (slot, (entry, escaped)) in block[LOG_DESCRIPTOR_BYTES..].chunks_exact_mut(16).zip(entries) {
            put_u64(slot, 0, entry.0);
            put_u64(slot, 8, u64::from(*escaped));
        }
    }

    /// Fills a continuation block with further revokes.
    ///
    /// # Panics
    /// If `entries` are more than fit.
    pub fn encode_continuation(block: &mut [u8], entries: &[BlockNo]) {
        assert!(entries.len() <= (block.len() - META_HEADER_BYTES) / 8, "a block has room for its entries");
        block.fill(0);
        MetaHeader { kind: MetaType::LogBlock, jid: 0 }.encode(block);
        for (slot, entry) in block[META_HEADER_BYTES..].chunks_exact_mut(8).zip(entries) {
            put_u64(slot, 0, entry.0);
        }
    }

    fn encode_head(&self, block: &mut [u8]) {
        block.fill(0);
        MetaHeader { kind: MetaType::LogDescriptor, jid: 0 }.encode(block);
        let number = match self.kind {
            LogKind::Metadata => METADATA_TYPE,
            LogKind::Revoke => REVOKE_TYPE,
            LogKind::Jdata => JDATA_TYPE,
        };
        put_u32(block, 24, number);
        put_u32(block, 28, self.length);
        put_u32(block, 32, self.count);
    }
}

/// The block numbers in a descriptor (`from` is [`LOG_DESCRIPTOR_BYTES`]) or a continuation block ([`META_HEADER_BYTES`]).
pub fn log_blocks(block: &[u8], from: usize) -> impl Iterator<Item = BlockNo> + '_ {
    block.get(from..).unwrap_or_default().chunks_exact(8).map(|slot| BlockNo(u64_at(slot, 0)))
}

/// The pairs in a descriptor of journalled data: block, and whether its magic number was blanked.
pub fn jdata_entries(block: &[u8]) -> impl Iterator<Item = (BlockNo, bool)> + '_ {
    block
        .get(LOG_DESCRIPTOR_BYTES..)
        .unwrap_or_default()
        .chunks_exact(16)
        .map(|slot| (BlockNo(u64_at(slot, 0)), u64_at(slot, 8) != 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(hex: &str) -> Vec<u8> {
        let digits: Vec<u8> = hex.bytes().filter(u8::is_ascii_hexdigit).collect();
        digits
            .chunks(2)
            .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
            .collect()
    }

    fn block_of(hex: &str) -> Vec<u8> {
        let mut block = words(hex);
        block.resize(4096, 0);
        block
    }

    #[test]
    fn the_header_of_mkfs() {
        let block = block_of(
            "01161970 00000008 0000000000000000 00000320 00000000 0000000000000677 80000001 00000000 00000000 3d2ed787
             ac0fb9d0 00000000 0000000000000000 0000000000000018 0000000000000012",
        );
        let header = LogHeader {
            jid: 0,
            sequence: 1655,
            flags: LogFlags(LogFlags::UNMOUNT | LogFlags::USERSPACE),
            tail: 0,
            index: 0,
            v2: Some(LogHeaderV2 { addr: BlockNo(24), jinode: BlockNo(18), ..LogHeaderV2::default() }),
        };
        assert_eq!(LogHeader::decode(&block), Ok(header));
        let mut written = vec![0xff; 4096];
        header.encode(&mut written);
        assert_eq!(written, block);
    }

    #[test]
    fn the_header_of_the_kernel() {
        let block = block_of(
            "01161970 00000008 0000000000000000 00000320 00000000 0000000000000810 00000202 00000751 00000777 a62fe9f7
             9618911b 12837bda 000000006b02e0d1 000000000000078f 0000000000000012 0000000000001027 0000000000001028
             0000000000000000 00000000000001ac 0000000000000019",
        );
        let header = LogHeader::decode(&block).unwrap();
        assert_eq!((header.sequence, header.tail, header.index), (2064, 1873, 1911));
        assert!(!header.flags.is_clean());
        let v2 = header.v2.unwrap();
        assert_eq!(v2.local, StatfsChange { total: 0, free: 428, dinodes: 25 });
        let mut written = vec![0; 4096];
        header.encode(&mut written);
        assert_eq!(written, block);
        for at in [25, 45, 49, 100, 4000] {
            let mut broken = block.clone();
            broken[at] ^= 1;
            assert!(LogHeader::decode(&broken).is_err(), "{at}");
        }
    }

    #[test]
    fn the_check_value_of_the_castagnoli_sum() {
        assert_eq!(!crc32c::crc32c(b"123456789"), 0x1CF9_6D7C);
    }

    #[test]
    fn descriptors_round_trip_and_impossible_counts_are_refused() {
        let size = BlockSize::B4096;
        let mut block = vec![0xff; 4096];
        let entries: Vec<BlockNo> = (1..=503).map(BlockNo).collect();
        let metadata = LogDescriptor { kind: LogKind::Metadata, length: 504, count: 503 };
        metadata.encode(&mut block, &entries);
        assert_eq!(LogDescriptor::decode(&block, size), Ok(metadata));
        assert!(log_blocks(&block, LOG_DESCRIPTOR_BYTES).eq(entries.iter().copied()));

        LogDescriptor::encode_jdata(&mut block, &[(BlockNo(5), true), (BlockNo(6), false)]);
        let jdata = LogDescriptor { kind: LogKind::Jdata, length: 3, count: 2 };
        assert_eq!(LogDescriptor::decode(&block, size), Ok(jdata));
        assert!(jdata_entries(&block).take(2).eq([(BlockNo(5), true), (BlockNo(6), false)]));

        for (length, count) in [(0, 0), (1, 504), (2, 503 + 510), (u32::MAX, u32::MAX)] {
            LogDescriptor { kind: LogKind::Revoke, length, count }.encode(&mut block, &[]);
            let expected = length == u32::MAX; // a ring may be long; the walk checks it against the ring
            assert_eq!(LogDescriptor::decode(&block, size).is_ok(), expected, "{length} {count}");
        }
        for (length, count) in [(1, 1), (3, 1), (505, 504), (0, u32::MAX)] {
            LogDescriptor { kind: LogKind::Metadata, length, count }.encode(&mut block, &[]);
            assert!(LogDescriptor::decode(&block, size).is_err(), "{length} {count}");
        }
        put_u32(&mut block, 24, 303);
        assert!(LogDescriptor::decode(&block, size).is_err());
    }
}
