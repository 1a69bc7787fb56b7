//! Whose filesystem it is: the superblock's lock protocol and table, and their change by `fs claim` and `fs release` (R19).
//!
//! GFS2 has no heartbeat on disk, so nothing here can prove that nobody else has it mounted: what a caller must have
//! been told by a person is an argument.

use crate::format::{LOCK_STRING_BYTES, SUPERBLOCK_OFFSET_BYTES, Superblock};
use crate::mkfs::check_locking;
use crate::reader::{ReadError, Reader};
use quorate_gnbd::{BlockDevice, Buf, IoError, WriteFlags};

/// Where in the superblock, behind its structure, a claim keeps what it replaced. Every implementation ignores the rest of
/// that block: mkfs and fsck leave it zero or as it is.
const KEPT_OFFSET_BYTES: usize = 304;
/// Marks that something is kept.
const KEPT_MAGIC: &[u8; 16] = b"quorate claimed\0";
const KEPT_BYTES: usize = 16 + 2 * LOCK_STRING_BYTES;

/// How the filesystem may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use<'a> {
    /// By one process alone.
    Alone,
    /// By the nodes of this cluster.
    Cluster {
        /// Its name.
        cluster: &'a str,
    },
}

/// Why a filesystem may not be used, claimed or released. Nothing was changed, unless it is `Read`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ClaimError {
    /// The device fails, or holds no GFS2.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// A checker works on it, or was interrupted.
    #[error(
        "a check of this filesystem is not finished (lock protocol {proto:?}): let fsck.gfs2 finish first"
    )]
    Fsck {
        /// What stands in the superblock.
        proto: String,
    },
    /// It belongs to another cluster.
    #[error(
        "this filesystem belongs to {theirs:?}, not to a filesystem of cluster {ours:?}: \
         claim it, if all nodes of its cluster are stopped"
    )]
    OtherCluster {
        /// Our cluster.
        ours: String,
        /// The lock table on disk.
        theirs: String,
    },
    /// It is for one process alone, never for a cluster.
    #[error("this filesystem is for one host alone (lock_nolock): claim it for cluster {ours:?} first")]
    SingleHost {
        /// Our cluster.
        ours: String,
    },
    /// It belongs to a cluster, and cannot be used by one process alone.
    #[error(
        "this filesystem belongs to cluster table {theirs:?}: it can be used read-only, or in that cluster"
    )]
    Clustered {
        /// The lock table on disk.
        theirs: String,
    },
    /// Nobody said that all others are stopped.
    #[error(
        "whether another host has {theirs:?} mounted cannot be seen on the disk: \
         say that all other nodes are stopped"
    )]
    NotSaid {
        /// The lock table on disk.
        theirs: String,
    },
    /// The new table is not `cluster:name`.
    #[error("lock table {table:?} is not CLUSTER:NAME")]
    Table {
        /// What was asked for.
        table: String,
    },
    /// There is nothing to release.
    #[error("this filesystem was not claimed: its lock table {theirs:?} is the one it was made with")]
    NotClaimed {
        /// The lock table on disk.
        theirs: String,
    },
}

impl From<IoError> for ClaimError {
    fn from(error: IoError) -> Self {
        Self::Read(error.into())
    }
}

/// What a claim or a release changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claimed {
    /// Protocol and table before.
    pub before: (String, String),
    /// Protocol and table now.
    pub after: (String, String),
}

/// Whether a filesystem with this superblock may be mounted read-write that way (R19). The caller has also made sure that
/// the kernel of no host has the device open.
///
/// # Errors
/// An unfinished check, another cluster's table, or the wrong kind of use.
pub fn check_use(superblock: &Superblock, wanted: Use<'_>) -> Result<(), ClaimError> {
    let theirs = superblock.lock_table.clone();
    match (superblock.lock_proto.as_str(), wanted) {
        ("lock_nolock", Use::Alone) => Ok(()),
        ("lock_nolock", Use::Cluster { cluster }) => Err(ClaimError::SingleHost { ours: cluster.into() }),
        ("lock_dlm", Use::Alone) => Err(ClaimError::Clustered { theirs }),
        ("lock_dlm", Use::Cluster { cluster }) => {
            if cluster_of(&theirs) == Some(cluster) {
                return Ok(());
            }
            Err(ClaimError::OtherCluster { ours: cluster.into(), theirs })
        }
        (proto, _) => Err(ClaimError::Fsck { proto: proto.into() }),
    }
}

/// The cluster in a lock table.
#[must_use]
pub fn cluster_of(table: &str) -> Option<&str> {
    table.split_once(':').map(|(cluster, _)| cluster)
}

/// Makes the filesystem one of the cluster in `table` (`cluster:name`), and keeps what was there for [`release`].
/// `others_stopped` is the explicit word of a person that no other host has it mounted.
///
/// # Errors
/// An unfinished check, a missing word, an impossible table; or the device fails.
pub async fn claim<D: BlockDevice>(
    device: &D,
    table: &str,
    others_stopped: bool,
) -> Result<Claimed, ClaimError> {
    if check_locking("lock_dlm", table).is_err() {
        return Err(ClaimError::Table { table: table.into() });
    }
    let (mut superblock, mut block) = read(device).await?;
    let before = (superblock.lock_proto.clone(), superblock.lock_table.clone());
    let after = ("lock_dlm".to_string(), table.to_string());
    if before == after {
        return Ok(Claimed { before, after });
    }
    if !others_stopped {
        return Err(ClaimError::NotSaid { theirs: before.1 });
    }
    // A second claim keeps what the first one found: that is what a release is to restore.
    if kept(&block).is_none() {
        keep(&mut block, &before);
    }
    (superblock.lock_proto, superblock.lock_table) = after.clone();
    write(device, &superblock, block).await?;
    Ok(Claimed { before, after })
}

/// Undoes all claims: restores protocol and table. The filesystem is unmounted everywhere, which the caller has made sure
/// of; `others_stopped` says so.
///
/// # Errors
/// It was never claimed, an unfinished check, or the device fails.
pub async fn release<D: BlockDevice>(device: &D, others_stopped: bool) -> Result<Claimed, ClaimError> {
    let (mut superblock, mut block) = read(device).await?;
    let before = (superblock.lock_proto.clone(), superblock.lock_table.clone());
    let Some(after) = kept(&block) else { return Err(ClaimError::NotClaimed { theirs: before.1 }) };
    if !others_stopped {
        return Err(ClaimError::NotSaid { theirs: before.1 });
    }
    block[KEPT_OFFSET_BYTES..KEPT_OFFSET_BYTES + KEPT_BYTES].fill(0);
    (superblock.lock_proto, superblock.lock_table) = after.clone();
    write(device, &superblock, block).await?;
    Ok(Claimed { before, after })
}

async fn read<D: BlockDevice>(device: &D) -> Result<(Superblock, Buf), ClaimError> {
    let reader = Reader::open(device).await?;
    let superblock = reader.superblock().clone();
    if !superblock.lock_proto.starts_with("lock_") {
        return Err(ClaimError::Fsck { proto: superblock.lock_proto });
    }
    let block = device.read(SUPERBLOCK_OFFSET_BYTES, Buf::zeroed(reader.size().usize())).await?;
    Ok((superblock, block))
}

async fn write<D: BlockDevice>(
    device: &D,
    superblock: &Superblock,
    mut block: Buf,
) -> Result<(), ClaimError> {
    superblock
        .encode(&mut block)
        .map_err(|source| ReadError::Format { block: superblock.block_size.superblock(), source })?;
    device.write(SUPERBLOCK_OFFSET_BYTES, block, WriteFlags { fua: true }).await?;
    device.flush().await?;
    Ok(())
}

fn keep(block: &mut [u8], (proto, table): &(String, String)) {
    let area = &mut block[KEPT_OFFSET_BYTES..KEPT_OFFSET_BYTES + KEPT_BYTES];
    area.fill(0);
    area[..16].copy_from_slice(KEPT_MAGIC);
    area[16..16 + proto.len()].copy_from_slice(proto.as_bytes());
    let at = 16 + LOCK_STRING_BYTES;
    area[at..at + table.len()].copy_from_slice(table.as_bytes());
}

fn kept(block: &[u8]) -> Option<(String, String)> {
    let area = block.get(KEPT_OFFSET_BYTES..KEPT_OFFSET_BYTES + KEPT_BYTES)?.strip_prefix(KEPT_MAGIC)?;
    let (proto, table) = area.split_at(LOCK_STRING_BYTES);
    let text = |bytes: &[u8]| {
        let end = bytes.iter().position(|&byte| byte == 0)?;
        String::from_utf8(bytes[..end].to_vec()).ok()
    };
    Some((text(proto)?, text(table)?))
}
