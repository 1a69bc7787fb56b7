//! Journals before, system files and counters after everything else.

use super::{Check, Problem};
use crate::format::{
    BlockNo, DinodeFlags, INUM_RANGE_BYTES, MetaHeader, MetaType, STATFS_BYTES, StatfsChange,
};
use crate::reader::{Inode, ReadError};
use crate::replay::{Journal, ReplayError, find_head, pending_statfs, plan, statfs_of};
use quorate_gnbd::BlockDevice;

impl<D: BlockDevice> Check<D> {
    /// Finds the journals, and lays those that were not closed over the device.
    pub(super) async fn journals(&mut self) -> Result<(), ReadError> {
        let proto = self.reader.superblock().lock_proto.clone();
        if !proto.starts_with("lock_") {
            self.problem(Problem::Unfinished { proto });
        }
        let journals = match Journal::all(&self.reader).await {
            Ok(journals) => journals,
            Err(error) => return self.journal_fault(error),
        };
        self.report.journals = journals.len() as u32; // as many as names could be looked up
        let mut overlays = Vec::new();
        for journal in &journals {
            let head = match find_head(&self.reader, journal).await {
                Ok(head) => head,
                Err(error) => {
                    self.journal_fault(error)?;
                    continue;
                }
            };
            if head.flags.is_clean() {
                continue;
            }
            match plan(&self.reader, journal, &head).await {
                Ok(plan) => {
                    self.problem(Problem::DirtyJournal { jid: journal.jid(), blocks: plan.copies.len() });
                    self.dirty.push((journal.jid(), head));
                    overlays.push(plan.copies);
                }
                Err(error) => self.journal_fault(error)?,
            }
        }
        for copies in overlays {
            self.reader.lay_over(copies);
        }
        Ok(())
    }

    fn journal_fault(&mut self, error: ReplayError) -> Result<(), ReadError> {
        if let ReplayError::Read(ReadError::Io(error)) = error {
            return Err(ReadError::Io(error));
        }
        self.problem(Problem::Journal { what: error.to_string() });
        Ok(())
    }

    /// The files that every mount needs, and whether statfs is right.
    pub(super) async fn system_files(&mut self) -> Result<(), ReadError> {
        let master_at = self.reader.superblock().master.addr;
        let Ok(master) = self.reader.inode(master_at).await else { return Ok(()) };
        if let Some(statfs) = self.system_file(&master, "statfs", STATFS_BYTES as u64).await?
            && let Some(stored) = self.statfs(&statfs)?
        {
            let pending = self.dirty.iter().map(|(jid, head)| pending_statfs(head, *jid, &statfs));
            let stored = pending.fold(stored, |sum, change| sum.plus(&change));
            let counted = self.report.statfs;
            if stored != counted {
                self.problem(Problem::Statfs { stored, counted });
            }
        }
        self.system_file(&master, "inum", 8).await?;
        self.system_file(&master, "quota", 0).await?;
        let Some(per_node) = self.system_file(&master, "per_node", 0).await? else { return Ok(()) };
        for jid in 0..self.report.journals {
            self.system_file(&per_node, &format!("inum_range{jid}"), INUM_RANGE_BYTES as u64).await?;
            self.system_file(&per_node, &format!("statfs_change{jid}"), STATFS_BYTES as u64).await?;
            let quota = self.system_file(&per_node, &format!("quota_change{jid}"), 0).await?;
            if let Some(quota) = quota {
                self.quota_change(jid, &quota).await?;
            }
        }
        if u64::from(master.dinode.flags.0) & u64::from(DinodeFlags::SYSTEM.0) == 0 {
            self.problem(Problem::System {
                name: "master".into(),
                what: "is not marked as a system inode".into(),
            });
        }
        Ok(())
    }

    fn statfs(&mut self, inode: &Inode) -> Result<Option<StatfsChange>, ReadError> {
        let stored = statfs_of(inode);
        self.noted(inode.addr(), stored)
    }

    /// A system file that must be there, of this size unless that is 0.
    async fn system_file(&mut self, dir: &Inode, name: &str, bytes: u64) -> Result<Option<Inode>, ReadError> {
        let inode = match self.reader.system(dir, name).await {
            Ok(inode) => inode,
            Err(ReadError::Io(error)) => return Err(ReadError::Io(error)),
            Err(error) => {
                self.problem(Problem::System { name: name.into(), what: error.to_string() });
                return Ok(None);
            }
        };
        if bytes != 0 && inode.dinode.size_bytes != bytes {
            let what = format!("has {} bytes instead of {bytes}", inode.dinode.size_bytes);
            self.problem(Problem::System { name: name.into(), what });
        }
        if !inode.dinode.flags.contains(DinodeFlags::SYSTEM) {
            self.problem(Problem::System {
                name: name.into(),
                what: "is not marked as a system inode".into(),
            });
        }
        Ok(Some(inode))
    }

    async fn quota_change(&mut self, jid: u32, inode: &Inode) -> Result<(), ReadError> {
        let blocks = inode.dinode.size_bytes.div_ceil(u64::from(self.reader.size().bytes()));
        let extents = self.reader.extents(inode, 0, blocks.min(1 << 20)).await;
        for extent in self.noted(inode.addr(), extents)?.unwrap_or_default() {
            let Some(start) = extent.start else { continue };
            for at in (start.0..start.0 + extent.count).map(BlockNo) {
                let block = self.reader.raw(at, 1).await?;
                // A node that has never logged the block has left it as mkfs wrote it; a journal's copy has the same header.
                if let Err(error) = MetaHeader::expect(&block, MetaType::QuotaChange) {
                    let name = format!("quota_change{jid}");
                    self.problem(Problem::System { name, what: format!("block {at}: {error}") });
                }
            }
        }
        Ok(())
    }
}
