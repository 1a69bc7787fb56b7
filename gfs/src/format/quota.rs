//! Counters: the filesystem's, a node's pending changes of them, quotas and their pending changes, inode ranges.
//!
//! | statfs | field | quota | field | quota change | field |
//! |---|---|---|---|---|---|
//! | 0 | total blocks | 0 | limit | 0 | change (8) |
//! | 8 | free blocks | 8 | warning | 8 | 1 user, 0 group (4) |
//! | 16 | dinodes | 16 | value | 12 | id (4) |
//! | 24 + 16n | jid (4), fingerprint (4), sequence (8) of the n-th counted head; the filesystem's statfs only, ours | | | | |

use super::FormatError;
use super::bytes::{head, i64_at, put_i64, put_u32, put_u64, u32_at, u64_at};

/// The length of statfs and statfs_change.
pub const STATFS_BYTES: usize = 24;
/// The length of a record in the quota file.
pub const QUOTA_BYTES: usize = 88;
/// The length of a slot in a quota change block.
pub const QUOTA_CHANGE_BYTES: usize = 16;

/// The length of an inum_range file.
pub const INUM_RANGE_BYTES: usize = 16;

/// Blocks and dinodes: the filesystem's, or a node's change of them that is not yet added.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StatfsChange {
    /// Data blocks of all resource groups.
    pub total: i64,
    /// Free ones.
    pub free: i64,
    /// Dinodes.
    pub dinodes: i64,
}

impl StatfsChange {
    /// Reads it.
    ///
    /// # Errors
    /// Too short.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let bytes = head("statfs", bytes, STATFS_BYTES)?;
        Ok(Self { total: i64_at(bytes, 0), free: i64_at(bytes, 8), dinodes: i64_at(bytes, 16) })
    }

    /// Writes it.
    ///
    /// # Panics
    /// If there is no room.
    pub fn encode(&self, bytes: &mut [u8]) {
        put_i64(bytes, 0, self.total);
        put_i64(bytes, 8, self.free);
        put_i64(bytes, 16, self.dinodes);
    }

    /// Whether nothing is pending.
    #[must_use]
    pub fn is_zero(&self) -> bool {
        *self == Self::default()
    }

    /// The sum; wraps, as the kernel's does, so that hostile numbers do no harm.
    #[must_use]
    pub fn plus(&self, other: &Self) -> Self {
        Self {
            total: self.total.wrapping_add(other.total),
            free: self.free.wrapping_add(other.free),
            dinodes: self.dinodes.wrapping_add(other.dinodes),
        }
    }
}

/// How many counted heads there is room for behind the filesystem's numbers.
pub const STATFS_COUNTED_MAX: usize = 16;
const STATFS_COUNTED_BYTES: usize = 16;
// Numbers and marks stand in one sector, also with the smallest blocks: a crash keeps both or neither.
const _: () = assert!(
    super::DINODE_BYTES + STATFS_BYTES + STATFS_COUNTED_MAX * STATFS_COUNTED_BYTES <= 512,
    "the counted heads are in the sector of the numbers they were counted into"
);

/// Says that the pending change in this head of a journal is in the filesystem's numbers.
///
/// It stands behind the end of the statfs file, in the unused rest of its block, where GFS2 itself looks for nothing: who
/// replays a journal again after a crash in the middle of it must not add the change again (docs/deviations.md).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatfsCounted {
    /// Whose journal.
    pub jid: u32,
    /// Of the head: [`LogHeader::fingerprint`](super::LogHeader::fingerprint), never 0.
    pub fingerprint: u32,
    /// Of the head.
    pub sequence: u64,
}

impl StatfsCounted {
    fn at(&self) -> usize {
        STATFS_BYTES + self.jid as usize % STATFS_COUNTED_MAX * STATFS_COUNTED_BYTES
    }

    /// Whether it stands in the contents of the statfs file's block.
    #[must_use]
    pub fn is_in(&self, bytes: &[u8]) -> bool {
        let at = self.at();
        let Some(bytes) = bytes.get(at..at + STATFS_COUNTED_BYTES) else { return false };
        *self == Self { jid: u32_at(bytes, 0), fingerprint: u32_at(bytes, 4), sequence: u64_at(bytes, 8) }
    }

    /// Writes it there, over that of an older head.
    ///
    /// # Panics
    /// If there is no room.
    pub fn encode(&self, bytes: &mut [u8]) {
        let at = self.at();
        put_u32(bytes, at, self.jid);
        put_u32(bytes, at + 4, self.fingerprint);
        put_u64(bytes, at + 8, self.sequence);
    }
}

/// Whose quota.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum QuotaId {
    /// A user's.
    User(u32),
    /// A group's.
    Group(u32),
}

impl QuotaId {
    /// The record's index in the quota file, which is also the number of its lock.
    #[must_use]
    pub fn index(self) -> u64 {
        match self {
            Self::User(id) => u64::from(id) * 2,
            Self::Group(id) => u64::from(id) * 2 + 1,
        }
    }

    /// Where the record stands in the quota file.
    #[must_use]
    pub fn offset_bytes(self) -> u64 {
        self.index() * QUOTA_BYTES as u64
    }
}

/// A record of the quota file, in blocks of the filesystem.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QuotaRecord {
    /// Hard limit; 0 is none.
    pub limit: u64,
    /// Soft limit; 0 is none.
    pub warn: u64,
    /// In use.
    pub value: i64,
}

impl QuotaRecord {
    /// Reads it.
    ///
    /// # Errors
    /// Too short for the three fields; the reserved rest need not be there.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let bytes = head("quota record", bytes, 24)?;
        Ok(Self { limit: u64_at(bytes, 0), warn: u64_at(bytes, 8), value: i64_at(bytes, 16) })
    }

    /// Writes the three fields.
    ///
    /// # Panics
    /// If there is no room.
    pub fn encode(&self, bytes: &mut [u8]) {
        put_u64(bytes, 0, self.limit);
        put_u64(bytes, 8, self.warn);
        put_i64(bytes, 16, self.value);
    }
}

/// A slot of a quota change block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QuotaChange {
    /// Blocks; 0 marks a free slot.
    pub change: i64,
    /// Whose.
    pub id: QuotaId,
}

impl QuotaChange {
    /// Reads a slot.
    ///
    /// # Errors
    /// Too short.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let bytes = head("quota change", bytes, QUOTA_CHANGE_BYTES)?;
        let id = u32_at(bytes, 12);
        let id = if u32_at(bytes, 8) & 1 == 1 { QuotaId::User(id) } else { QuotaId::Group(id) };
        Ok(Self { change: i64_at(bytes, 0), id })
    }

    /// Writes a slot; a change of 0 frees it, all zeros.
    ///
    /// # Panics
    /// If there is no room.
    pub fn encode(&self, bytes: &mut [u8]) {
        let (flags, id) = match (self.change, self.id) {
            (0, _) => (0, 0),
            (_, QuotaId::User(id)) => (1, id),
            (_, QuotaId::Group(id)) => (0, id),
        };
        put_i64(bytes, 0, self.change);
        put_u32(bytes, 8, flags);
        put_u32(bytes, 12, id);
    }
}

/// Formal numbers set aside for a node. Written by mkfs, used by nobody today.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InumRange {
    /// The first.
    pub start: u64,
    /// How many.
    pub length: u64,
}

impl InumRange {
    /// Writes it.
    ///
    /// # Panics
    /// If there is no room.
    pub fn encode(&self, bytes: &mut [u8]) {
        put_u64(bytes, 0, self.start);
        put_u64(bytes, 8, self.length);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_round_trip() {
        let statfs = StatfsChange { total: 1, free: -2, dinodes: 3 };
        let mut bytes = [0; STATFS_BYTES];
        statfs.encode(&mut bytes);
        assert_eq!(StatfsChange::decode(&bytes), Ok(statfs));
        assert_eq!(statfs.plus(&statfs).free, -4);

        let mark = StatfsCounted { jid: 21, fingerprint: 7, sequence: 9 };
        let mut bytes = [0; 512 - 232];
        assert!(!mark.is_in(&bytes));
        mark.encode(&mut bytes);
        assert!(mark.is_in(&bytes) && !mark.is_in(&bytes[..100]));
        assert_eq!(bytes[24 + 5 * 16..][..16], [0, 0, 0, 21, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 9]);
        for other in [
            StatfsCounted { jid: 5, ..mark },
            StatfsCounted { fingerprint: 8, ..mark },
            StatfsCounted { sequence: 8, ..mark },
        ] {
            assert!(!other.is_in(&bytes));
        }

        let record = QuotaRecord { limit: 4, warn: 5, value: -6 };
        let mut bytes = [0; QUOTA_BYTES];
        record.encode(&mut bytes);
        assert_eq!(QuotaRecord::decode(&bytes), Ok(record));

        for change in [
            QuotaChange { change: -7, id: QuotaId::User(8) },
            QuotaChange { change: 7, id: QuotaId::Group(8) },
        ] {
            let mut bytes = [0; QUOTA_CHANGE_BYTES];
            change.encode(&mut bytes);
            assert_eq!(QuotaChange::decode(&bytes), Ok(change));
            QuotaChange { change: 0, ..change }.encode(&mut bytes);
            assert_eq!(bytes, [0; QUOTA_CHANGE_BYTES]);
        }
        assert_eq!((QuotaId::User(1001).index(), QuotaId::Group(0).offset_bytes()), (0x7d2, 88));
        assert_eq!(QuotaId::User(u32::MAX).offset_bytes(), u64::from(u32::MAX) * 176);
    }
}
