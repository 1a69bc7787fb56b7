//! GFS2 on disk: every structure, its constants and its checks, as owned values; nothing here does I/O.
//!
//! Integers on disk are big-endian. `decode` never panics, whatever the bytes; `encode` writes the fields it knows and
//! leaves reserved ones as they are, so that a block read from disk keeps what a newer version may have put there.

mod bitmap;
mod bytes;
mod dinode;
mod dirent;
mod geometry;
mod leaf;
mod log;
mod meta;
mod quota;
mod rgrp;
mod superblock;
mod xattr;

pub use bitmap::{Bitmap, BlockState, count_states, find_state, get_state, set_state};
pub use dinode::{
    DINODE_BYTES, Dinode, DinodeFlags, FileType, PAYLOAD_FORMAT_DIRENTS, PAYLOAD_FORMAT_QUOTA,
    PAYLOAD_FORMAT_RINDEX, Timestamp, indirect_pointer, pointer, set_indirect_pointer, set_pointer,
};
pub use dirent::{
    DIRENT_BYTES, Dirent, Dirents, NAME_BYTES_MAX, NewDirent, dirent_bytes, find_dirent, init_directory,
    init_dirents, insert_dirent, insert_dirent_hashed, move_dirents_below, name_hash, remove_dirent,
    replace_dirent,
};
pub use geometry::{BlockNo, BlockSize, HASH_DEPTH_MAX, HEIGHT_MAX, TreePath};
pub use leaf::{LEAF_BYTES, Leaf};
pub use log::{
    JDATA_TYPE, LOG_DESCRIPTOR_BYTES, LOG_HEADER_V1_BYTES, LOG_HEADER_V2_BYTES, LogDescriptor, LogFlags,
    LogHeader, LogHeaderV2, LogKind, METADATA_TYPE, REVOKE_TYPE, jdata_entries, log_blocks,
};
pub use meta::{Inum, MAGIC, META_HEADER_BYTES, MetaHeader, MetaType, has_magic};
pub use quota::{
    INUM_RANGE_BYTES, InumRange, QUOTA_BYTES, QUOTA_CHANGE_BYTES, QuotaChange, QuotaId, QuotaRecord,
    STATFS_BYTES, STATFS_COUNTED_MAX, StatfsChange, StatfsCounted,
};
pub use rgrp::{RGRP_HEADER_BYTES, RINDEX_BYTES, RgrpFlags, RgrpHeader, RindexEntry};
pub use superblock::{
    FORMAT_MAX, FORMAT_MIN, LOCK_STRING_BYTES, MULTIHOST_FORMAT, SUPERBLOCK_BYTES, SUPERBLOCK_OFFSET_BYTES,
    Superblock,
};
pub use xattr::{
    EA_HEADER_BYTES, EA_NAME_BYTES_MAX, EA_VALUE_BYTES_MAX, EaKind, EaRecord, EaRecords, EaValue, NewEa,
    ea_bytes_external, ea_bytes_inline, ea_value_blocks, init_ea_block, insert_ea, remove_ea,
};

/// Why bytes are not the structure they were taken for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    /// There are too few bytes.
    #[error("{what} needs {need} bytes, {have} are there")]
    TooShort {
        /// Which structure.
        what: &'static str,
        /// How many it takes.
        need: usize,
        /// How many were given.
        have: usize,
    },
    /// The block does not begin with the magic number: it is no metadata.
    #[error("no GFS2 metadata: magic number {found:#010x}")]
    Magic {
        /// What stands there.
        found: u32,
    },
    /// The block is metadata of another kind.
    #[error("metadata of type {found} where {expected:?} is expected")]
    Type {
        /// What it should be.
        expected: MetaType,
        /// The number that stands there.
        found: u32,
    },
    /// A field has a value that the format does not allow.
    #[error("{what} cannot be {value}")]
    Field {
        /// Which field.
        what: &'static str,
        /// What stands there.
        value: u64,
    },
    /// A checksum does not fit.
    #[error("checksum of {what} is {stored:#010x}, computed {computed:#010x}")]
    Checksum {
        /// Of what.
        what: &'static str,
        /// What stands there.
        stored: u32,
        /// What it should be.
        computed: u32,
    },
}
