//! Making a filesystem, laid out block for block as mkfs.gfs2 lays it out (facts: order of objects, first fit).

mod build;
mod layout;

use crate::format::{
    BlockNo, BlockSize, FORMAT_MAX, FormatError, LogFlags, LogHeader, LogHeaderV2, SUPERBLOCK_OFFSET_BYTES,
    Superblock, Timestamp,
};
use build::{Image, Ring};
use layout::Layout;
use quorate_gnbd::{BlockDevice, Buf, IoError, WriteFlags, ZeroFlags};

/// The smallest journal.
pub const JOURNAL_BYTES_MIN: u64 = 8 << 20;
/// The largest journal.
pub const JOURNAL_BYTES_MAX: u64 = 1 << 30;
/// The longest cluster name in a lock table.
pub const CLUSTER_NAME_BYTES_MAX: usize = 32;
/// The longest filesystem name in a lock table.
pub const FS_NAME_BYTES_MAX: usize = 30;
/// How much is written at once.
const WRITE_BYTES: usize = 1 << 20;

/// What to make.
#[derive(Clone, Debug)]
pub struct MkfsOptions {
    /// One per node that is to write at the same time; at least 1.
    pub journals: u32,
    /// Bytes of each, 8 MiB to 1 GiB, a multiple of the block size. [`default_journal_bytes`] chooses.
    pub journal_bytes: u64,
    /// `lock_dlm` or `lock_nolock`.
    pub lock_proto: String,
    /// `cluster:name` for `lock_dlm`, empty for `lock_nolock`.
    pub lock_table: String,
    /// Random.
    pub uuid: [u8; 16],
    /// 4096 unless there is a reason; at least 1024, because smaller blocks cannot hold the system directories whole.
    pub block_size: BlockSize,
    /// The size resource groups aim at, 32 MiB to 2 GiB.
    pub rgrp_bytes: u64,
    /// Room for pending quota changes of one node.
    pub quota_change_bytes: u64,
    /// The sequence of the first log header of each journal: random, so that a ring's old contents cannot continue it.
    pub first_sequence: u64,
    /// The time of all inodes.
    pub now: Timestamp,
}

impl MkfsOptions {
    /// As mkfs.gfs2 does without options, for one user: journals of 8 MiB, no locks, blocks of 4096 bytes. UUID,
    /// sequence and time are zero and have to be set.
    #[must_use]
    pub fn new(journals: u32) -> Self {
        Self {
            journals,
            journal_bytes: JOURNAL_BYTES_MIN,
            lock_proto: "lock_nolock".into(),
            lock_table: String::new(),
            uuid: [0; 16],
            block_size: BlockSize::B4096,
            rgrp_bytes: 256 << 20,
            quota_change_bytes: 1 << 20,
            first_sequence: 0,
            now: Timestamp::default(),
        }
    }

    fn check(&self) -> Result<(), MkfsError> {
        let bad = |what, value| Err(MkfsError::Option { what, value });
        let block = u64::from(self.block_size.bytes());
        if block < 1024 {
            return bad("block size", block);
        }
        if self.journals == 0 {
            return bad("number of journals", 0);
        }
        if !(JOURNAL_BYTES_MIN..=JOURNAL_BYTES_MAX).contains(&self.journal_bytes)
            || !self.journal_bytes.is_multiple_of(block)
        {
            return bad("size of a journal", self.journal_bytes);
        }
        if !(32 << 20..=2 << 30).contains(&self.rgrp_bytes) || !self.rgrp_bytes.is_multiple_of(block) {
            return bad("size of resource groups", self.rgrp_bytes);
        }
        if !(block..=64 << 20).contains(&self.quota_change_bytes)
            || !self.quota_change_bytes.is_multiple_of(block)
        {
            return bad("size of quota change files", self.quota_change_bytes);
        }
        check_locking(&self.lock_proto, &self.lock_table)
    }
}

/// The journal size that mkfs.gfs2 would choose for a device shared by `journals` writers.
#[must_use]
pub fn default_journal_bytes(device_bytes: u64, journals: u32) -> u64 {
    const GIB: u64 = 1 << 30;
    let share = device_bytes / u64::from(journals.max(1));
    let mebibytes = match share {
        _ if share < GIB / 2 => 8,
        _ if share < 2 * GIB => 16,
        _ if share < 8 * GIB => 32,
        _ if share < 16 * GIB => 64,
        _ if share < 1024 * GIB => 128,
        _ if share < 10 * 1024 * GIB => 512,
        _ => 1024,
    };
    mebibytes << 20
}

/// Checks a lock protocol and the table that goes with it: `cluster:name`, letters, digits, `-` and `_` only.
///
/// # Errors
/// `LockProto` or `LockTable`.
pub fn check_locking(proto: &str, table: &str) -> Result<(), MkfsError> {
    match proto {
        "lock_nolock" if table.is_empty() => return Ok(()),
        "lock_dlm" | "lock_nolock" => {}
        _ => return Err(MkfsError::LockProto { proto: proto.into() }),
    }
    let legal = |name: &str, most| {
        (1..=most).contains(&name.len())
            && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte))
    };
    match table.split_once(':') {
        Some((cluster, name)) if legal(cluster, CLUSTER_NAME_BYTES_MAX) && legal(name, FS_NAME_BYTES_MAX) => {
            Ok(())
        }
        _ => Err(MkfsError::LockTable { table: table.into() }),
    }
}

/// What was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MkfsReport {
    /// Blocks of the device.
    pub device_blocks: u64,
    /// The first block after the last resource group.
    pub filesystem_blocks: u64,
    /// Resource groups.
    pub rgrps: usize,
    /// Free blocks.
    pub free_blocks: u64,
    /// Bytes of each journal.
    pub journal_bytes: u64,
    /// The superblock as written.
    pub superblock: Superblock,
}

/// Why no filesystem was made. Unless it is `Io`, nothing was written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MkfsError {
    /// The device cannot hold the journals and the system files.
    #[error(
        "the device has {device_bytes} bytes, but these journals and the system files need {needed_bytes}: \
         make it larger, or fewer or smaller journals"
    )]
    TooSmall {
        /// What there is.
        device_bytes: u64,
        /// What it would take.
        needed_bytes: u64,
    },
    /// An option outside its range.
    #[error("{what} cannot be {value}")]
    Option {
        /// Which.
        what: &'static str,
        /// What was asked for.
        value: u64,
    },
    /// More journals than the system directories can name in one block.
    #[error("{journals} journals are too many for this block size: at most about {most}")]
    TooManyJournals {
        /// What was asked for.
        journals: u32,
        /// What fits.
        most: u32,
    },
    /// No such lock protocol.
    #[error("there is no lock protocol {proto:?}: lock_dlm or lock_nolock")]
    LockProto {
        /// What was asked for.
        proto: String,
    },
    /// Not `cluster:name`.
    #[error(
        "lock table {table:?} is not CLUSTER:NAME with at most 32 and 30 letters, digits, hyphens or underscores"
    )]
    LockTable {
        /// What was asked for.
        table: String,
    },
    /// The device's own blocks are larger than the filesystem's.
    #[error("blocks of {block} bytes are not whole blocks of the device, which has {device}")]
    DeviceBlock {
        /// The filesystem's.
        block: u32,
        /// The device's.
        device: u32,
    },
    /// The superblock cannot hold it.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// The device failed. It holds no filesystem now.
    #[error(transparent)]
    Io(#[from] IoError),
}

/// Makes a filesystem on a device, whatever is on it. The superblock is written last, after everything else is durable.
///
/// # Errors
/// See [`MkfsError`].
pub async fn mkfs(device: &impl BlockDevice, options: &MkfsOptions) -> Result<MkfsReport, MkfsError> {
    options.check()?;
    let geometry = device.geometry();
    if geometry.read_only {
        return Err(IoError::ReadOnly.into());
    }
    let size = options.block_size;
    if !size.bytes().is_multiple_of(geometry.block_bytes) {
        return Err(MkfsError::DeviceBlock { block: size.bytes(), device: geometry.block_bytes });
    }
    let image = Image::build(Layout::plan(options, geometry.size_bytes)?, options)?;
    let superblock = Superblock {
        format: FORMAT_MAX,
        block_size: size,
        master: image.master,
        root: image.root,
        lock_proto: options.lock_proto.clone(),
        lock_table: options.lock_table.clone(),
        uuid: options.uuid,
    };
    let mut block = Buf::zeroed(size.usize());
    superblock.encode(&mut block)?;

    // First of all the old superblock goes: whoever looks in between must not find half of each.
    let zeros = SUPERBLOCK_OFFSET_BYTES + u64::from(size.bytes());
    device.write_zeroes(0, zeros, ZeroFlags { fua: true, no_hole: true }).await?;
    let mut writer = Writer::new(device, size);
    for ring in &image.rings {
        write_ring(&mut writer, ring, options.first_sequence).await?;
    }
    for (index, entry) in image.layout.rgrps.iter().enumerate() {
        for (addr, block) in (entry.addr.0..).zip(image.group_blocks(index)) {
            writer.put(BlockNo(addr), &block).await?;
        }
    }
    for (addr, block) in &image.blocks {
        writer.put(*addr, block).await?;
    }
    writer.finish().await?;
    device.flush().await?;
    device.write(SUPERBLOCK_OFFSET_BYTES, block, WriteFlags { fua: true }).await?;
    device.flush().await?;

    Ok(MkfsReport {
        device_blocks: geometry.size_bytes >> size.shift(),
        filesystem_blocks: image.layout.rgrps.last().map_or(0, |entry| entry.end().0),
        rgrps: image.layout.rgrps.len(),
        free_blocks: image.free,
        journal_bytes: options.journal_bytes,
        superblock,
    })
}

/// Every block of a new ring is a clean log header, so that its head can be found by sequence alone.
async fn write_ring<D: BlockDevice>(
    writer: &mut Writer<'_, D>,
    ring: &Ring,
    first_sequence: u64,
) -> Result<(), IoError> {
    let mut block = vec![0; writer.size.usize()];
    for index in 0..ring.blocks {
        let addr = BlockNo(ring.first.0 + index);
        let v2 = LogHeaderV2 { addr, jinode: ring.dinode, ..LogHeaderV2::default() };
        let header = LogHeader {
            jid: 0, // as mkfs.gfs2 has it; nobody reads it
            sequence: (first_sequence % ring.blocks + index) % ring.blocks,
            flags: LogFlags(LogFlags::UNMOUNT | LogFlags::USERSPACE),
            tail: 0,
            index: index as u32, // a ring has at most 2^21 blocks
            v2: Some(v2),
        };
        header.encode(&mut block);
        writer.put(addr, &block).await?;
    }
    tracing::debug!(jid = ring.jid, first = ring.first.0, blocks = ring.blocks, "journal written");
    Ok(())
}

/// Joins blocks that follow each other into long writes.
struct Writer<'a, D> {
    device: &'a D,
    size: BlockSize,
    start: BlockNo,
    bytes: Vec<u8>,
    most: usize,
}

impl<'a, D: BlockDevice> Writer<'a, D> {
    fn new(device: &'a D, size: BlockSize) -> Self {
        let most = WRITE_BYTES.min(device.geometry().transfer_bytes_max as usize).max(size.usize());
        Self { device, size, start: BlockNo::NONE, bytes: Vec::new(), most }
    }

    async fn put(&mut self, at: BlockNo, block: &[u8]) -> Result<(), IoError> {
        let follows = self.start.0 + (self.bytes.len() >> self.size.shift()) as u64 == at.0;
        if !follows || self.most < self.bytes.len() + block.len() {
            self.finish().await?;
            self.start = at;
        }
        self.bytes.extend_from_slice(block);
        Ok(())
    }

    async fn finish(&mut self) -> Result<(), IoError> {
        if !self.bytes.is_empty() {
            let offset = self.start.0 << self.size.shift();
            self.device.write(offset, Buf::copy_of(&self.bytes), WriteFlags::default()).await?;
            self.bytes.clear();
        }
        Ok(())
    }
}
