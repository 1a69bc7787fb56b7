//! Reading an image without node, cluster or kernel: its journals replayed into memory, the device not changed (R19).

mod filesystem;
mod path;
mod tar;

pub use path::{Walk, WalkEntry};
pub use tar::{TarError, TarReport};

use crate::FsError;
use crate::face::{Attr, Ino, Timestamp};
use crate::format::{BlockNo, LogHeader, StatfsChange};
use crate::reader::{Inode, Reader};
use crate::replay::{Journal, ReplayError, find_head, pending_statfs, plan, statfs_of};
use quorate_gnbd::Device;

/// How to open an image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RescueOptions {
    /// Go on without a journal that cannot be replayed: what its node wrote last is missing or torn then.
    pub skip_broken_journals: bool,
}

/// What was done about one journal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JournalState {
    /// Its number.
    pub jid: u32,
    /// Its head, unless it is broken.
    pub head: Option<LogHeader>,
    /// Blocks that are read from it.
    pub blocks: usize,
    /// Why it was skipped.
    pub error: Option<ReplayError>,
}

/// A filesystem that is only read.
///
/// It implements [`Filesystem`](crate::face::Filesystem), so it can be mounted. Nobody else may write to the device
/// meanwhile. The device is never written to, whatever it would allow.
#[derive(Debug)]
pub struct RescueFs {
    reader: Reader<Device>,
    journals: Vec<JournalState>,
    statfs: StatfsChange,
}

impl RescueFs {
    /// Opens the filesystem on a device, replaying its journals into memory.
    ///
    /// # Errors
    /// The device fails or holds no GFS2, its system files are broken, or a journal is and must not be skipped.
    pub async fn open(device: Device, options: RescueOptions) -> Result<Self, ReplayError> {
        let mut reader = Reader::open(device).await?;
        let mut journals = Vec::new();
        let mut overlays = Vec::new();
        for journal in Journal::all(&reader).await? {
            let jid = journal.jid();
            match Self::journal(&reader, &journal).await {
                Ok((head, plan)) => {
                    journals.push(JournalState {
                        jid,
                        head: Some(head),
                        blocks: plan.copies.len(),
                        error: None,
                    });
                    overlays.push(plan.copies);
                }
                Err(error) if options.skip_broken_journals => {
                    tracing::warn!(jid, %error, "journal skipped");
                    journals.push(JournalState { jid, head: None, blocks: 0, error: Some(error) });
                }
                Err(error) => return Err(error),
            }
        }
        for copies in overlays {
            reader.lay_over(copies);
        }
        let master = reader.inode(reader.superblock().master.addr).await?;
        let file = reader.system(&master, "statfs").await?;
        let mut statfs = statfs_of(&file)?;
        for journal in &journals {
            if let Some(head) = &journal.head {
                statfs = statfs.plus(&pending_statfs(head, journal.jid, &file));
            }
        }
        Ok(Self { reader, journals, statfs })
    }

    async fn journal(
        reader: &Reader<Device>,
        journal: &Journal,
    ) -> Result<(LogHeader, crate::replay::ReplayPlan), ReplayError> {
        let head = find_head(reader, journal).await?;
        let plan = plan(reader, journal, &head).await?;
        Ok((head, plan))
    }

    /// What it reads with.
    #[must_use]
    pub fn reader(&self) -> &Reader<Device> {
        &self.reader
    }

    /// What was done about each journal.
    #[must_use]
    pub fn journals(&self) -> &[JournalState] {
        &self.journals
    }

    /// Total, free and inodes, with what the journals' nodes had not yet added.
    #[must_use]
    pub fn counters(&self) -> StatfsChange {
        self.statfs
    }

    /// Reads an inode.
    ///
    /// # Errors
    /// `Corrupt` if there is none, or the device fails.
    pub async fn inode(&self, ino: Ino) -> Result<Inode, FsError> {
        Ok(self.reader.inode(BlockNo(ino.0)).await?)
    }

    /// What `stat` tells of an inode.
    #[must_use]
    pub fn attr(&self, inode: &Inode) -> Attr {
        let dinode = &inode.dinode;
        let time = |time: crate::format::Timestamp| Timestamp { sec: time.sec, nsec: time.nsec };
        Attr {
            ino: Ino(dinode.inum.addr.0),
            generation: dinode.inum.formal,
            mode: dinode.mode,
            nlink: dinode.nlink,
            uid: dinode.uid,
            gid: dinode.gid,
            size: dinode.size_bytes,
            blocks: dinode.blocks.saturating_mul(u64::from(self.reader.size().bytes() / 512)),
            block_size: self.reader.size().bytes(),
            major: dinode.major,
            minor: dinode.minor,
            atime: time(dinode.atime),
            mtime: time(dinode.mtime),
            ctime: time(dinode.ctime),
        }
    }
}
