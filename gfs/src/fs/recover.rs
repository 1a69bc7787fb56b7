//! Journals of a mounted filesystem: finding their heads, and replaying one that was not closed (gfs2.md 10.7).
//!
//! How a journal is read and replayed is the business of [`crate::replay`]; here are the locks around it, and the numbers
//! of statfs, which others use meanwhile.

use super::glock::Glock;
use super::{Gfs, Inner};
use crate::FsError;
use crate::format::{BlockNo, LogHeader};
use crate::reader::Reader;
use crate::replay;
use quorate_dlm::cache::{AcquireFlags, CacheMode};
use quorate_gnbd::Device;
use std::collections::BTreeSet;

/// What a replay did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Replayed {
    /// Whether the journal was closed cleanly; then nothing was done.
    pub was_clean: bool,
    /// Blocks written in place.
    pub blocks: u64,
    /// Blocks that a revoke names: older copies of them were not written.
    pub revoked: u64,
}

/// A journal on the device, and a reader that knows nothing but what it has read since it was made.
#[derive(Debug)]
pub(super) struct JournalFile {
    reader: Reader<Device>,
    journal: replay::Journal,
}

impl JournalFile {
    pub(super) async fn head(&self) -> Result<LogHeader, FsError> {
        Ok(replay::find_head(&self.reader, &self.journal).await?)
    }

    /// The device block of every ring index.
    pub(super) fn ring(&self) -> Vec<u64> {
        (0..self.journal.blocks()).map(|index| self.journal.block(index).0).collect()
    }
}

impl Gfs {
    /// Replays the journal of a node that failed, for a survivor: passes through the holds of the failed node (R14).
    ///
    /// The caller makes sure that the failed node is fenced, and proposes `Replayed` afterwards.
    ///
    /// # Errors
    /// `Busy` if somebody else is at it or the journal is in use; else what went wrong: the journal is still dirty.
    pub async fn recover_journal(&self, jid: u32) -> Result<Replayed, FsError> {
        self.0.recover(jid, true).await
    }

    /// The journals that were not closed cleanly, those in use included.
    ///
    /// # Errors
    /// What kept it from looking.
    pub async fn dirty_journals(&self) -> Result<BTreeSet<u32>, FsError> {
        let fs = &self.0;
        let mut dirty = BTreeSet::new();
        for (jid, &jinode) in (0_u32..).zip(&fs.jinodes) {
            let _held = fs.lock(Glock::inode(jinode), CacheMode::Shared).await?;
            if !fs.journal_file(jid, jinode).await?.head().await?.flags.is_clean() {
                dirty.insert(jid);
            }
        }
        Ok(dirty)
    }
}

impl Inner {
    pub(super) async fn recover(&self, jid: u32, recovery: bool) -> Result<Replayed, FsError> {
        self.check()?;
        if self.journal.as_ref().is_some_and(|own| own.jid == jid) {
            return Err(FsError::Invalid("a node does not recover its own journal while it is mounted"));
        }
        let flags = AcquireFlags { try_now: true, recovery, no_cache: true, ..Default::default() };
        let _journal = match self.lock_with(Glock::journal(jid), CacheMode::Exclusive, flags).await {
            Err(FsError::WouldBlock) => return Err(FsError::Busy),
            other => other?,
        };
        let flags = AcquireFlags { recovery, ..Default::default() };
        let jinode = *self.jinodes.get(jid as usize).ok_or(FsError::NotFound)?;
        let file = {
            let _held = self.lock_with(Glock::inode(jinode), CacheMode::Shared, flags).await?;
            self.journal_file(jid, jinode).await?
        };
        let head = file.head().await?;
        if head.flags.is_clean() {
            return Ok(Replayed { was_clean: true, ..Default::default() });
        }
        let JournalFile { reader, journal } = &file;
        let plan = replay::plan(reader, journal, &head).await?;
        replay::apply(reader, &plan).await?;
        self.replay_statfs(&file, &head, recovery).await?;
        replay::write_clean_header(reader, journal, &head, (self.clock)()).await?;
        let (blocks, revoked) = (plan.copies.len() as u64, plan.revoked as u64);
        tracing::info!(jid, blocks, revoked, "journal replayed");
        Ok(Replayed { was_clean: false, blocks, revoked })
    }

    /// Where the blocks of a journal are. The caller holds its inode's lock.
    pub(super) async fn journal_file(&self, jid: u32, jinode: BlockNo) -> Result<JournalFile, FsError> {
        let reader = Reader::open(self.device.clone()).await?;
        let inode = reader.inode(jinode).await?;
        let journal = replay::Journal::new(&reader, jid, &inode).await?;
        Ok(JournalFile { reader, journal })
    }

    /// Adds the failed node's change of statfs to the master's numbers, and makes it zero, in place.
    async fn replay_statfs(
        &self,
        file: &JournalFile,
        head: &LogHeader,
        recovery: bool,
    ) -> Result<(), FsError> {
        let flags = AcquireFlags { recovery, ..Default::default() };
        let glock = Glock::inode(self.system.statfs);
        let _held = self.lock_with(glock, CacheMode::Exclusive, flags).await?;
        // No older copy of it may be in this node's log when it is written in place.
        self.clean_glock(glock).await?;
        self.store().drop_glock(glock);
        replay::add_statfs(&file.reader, &file.journal, head).await?;
        Ok(())
    }
}
