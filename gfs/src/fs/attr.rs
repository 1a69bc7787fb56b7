//! Attributes of inodes, and taking their locks.

use super::Inner;
use super::data::check_mutable;
use super::glock::Glock;
use super::inode::Inode;
use super::store::{Bytes, corrupt};
use super::tx::Tx;
use crate::FsError;
use crate::face::{Attr, Credentials, Entry, Ino, SetAttr, SetTime};
use crate::format::{BlockNo, Dinode, DinodeFlags, FileType, Inum, MetaType};
use core::time::Duration;
use quorate_dlm::cache::{CacheMode, Held};
use std::sync::Arc;

/// Attributes are never trusted for longer, whatever the lease.
const VALID_MAX: Duration = Duration::from_secs(1);

impl Inner {
    pub(super) async fn dinode_block(&self, ino: BlockNo) -> Result<Bytes, FsError> {
        self.meta(ino, Glock::inode(ino), MetaType::Dinode).await
    }

    /// The dinode of an inode whose lock is held.
    pub(super) async fn dinode_of(&self, tx: Option<&Tx<'_>>, ino: BlockNo) -> Result<Dinode, FsError> {
        let block = self.look(tx, ino, Glock::inode(ino), MetaType::Dinode).await?;
        let dinode = Dinode::decode(&block).map_err(|error| corrupt(ino, &error))?;
        dinode.check(self.size, ino).map_err(|error| corrupt(ino, &error))?;
        Ok(dinode)
    }

    /// Takes the lock of an inode in use.
    pub(super) async fn lock_inode(&self, inode: &Inode, mode: CacheMode) -> Result<Held, FsError> {
        self.lock_inum(inode.inum, mode).await
    }

    pub(super) async fn lock_inum(&self, inum: Inum, mode: CacheMode) -> Result<Held, FsError> {
        let held = self.lock(Glock::inode(inum.addr), mode).await?;
        let dinode = self.dinode_of(None, inum.addr).await?;
        if dinode.inum != inum {
            return Err(FsError::Stale);
        }
        if mode == CacheMode::Exclusive
            && self.journal.is_some()
            && dinode.flags.contains(DinodeFlags::TRUNC_IN_PROG)
        {
            self.finish_truncate(inum.addr).await?;
        }
        Ok(held)
    }

    pub(super) fn attr(&self, dinode: &Dinode) -> Attr {
        Attr {
            ino: Ino(dinode.inum.addr.0),
            generation: dinode.inum.formal,
            mode: dinode.mode,
            nlink: dinode.nlink,
            uid: dinode.uid,
            gid: dinode.gid,
            size: dinode.size_bytes,
            blocks: dinode.blocks * (self.size.usize() as u64 / 512),
            block_size: self.size.bytes(),
            major: dinode.major,
            minor: dinode.minor,
            atime: dinode.atime,
            mtime: dinode.mtime,
            ctime: dinode.ctime,
        }
    }

    pub(super) fn entry(&self, dinode: &Dinode) -> Entry {
        let valid = self.lease.until().since(self.runtime.now()).min(VALID_MAX);
        Entry { attr: self.attr(dinode), valid }
    }

    pub(super) async fn get_attr(&self, ino: Ino) -> Result<Entry, FsError> {
        let inode = self.inode(ino)?;
        let _held = self.lock_inode(&inode, CacheMode::Shared).await?;
        Ok(self.entry(&self.dinode_of(None, inode.addr()).await?))
    }

    pub(super) async fn set_attr(
        &self,
        _cred: Credentials,
        ino: Ino,
        set: SetAttr,
    ) -> Result<Entry, FsError> {
        self.check_writable()?;
        let inode = self.inode(ino)?;
        let _held = self.lock_inode(&inode, CacheMode::Exclusive).await?;
        if let Some(size) = set.size {
            self.set_file_size(&inode, size).await?;
        }
        let mut dinode = self.dinode_of(None, inode.addr()).await?;
        check_mutable(&dinode, false)?;
        let now = (self.clock)();
        let chowned = set.uid.is_some() || set.gid.is_some();
        if let Some(mode) = set.mode {
            dinode.mode = dinode.mode & !0o7777 | mode & 0o7777;
        } else if chowned && dinode.file_type() == Some(FileType::Regular) {
            dinode.mode &= if dinode.mode & 0o010 != 0 { !0o6000 } else { !0o4000 };
        }
        dinode.uid = set.uid.unwrap_or(dinode.uid);
        dinode.gid = set.gid.unwrap_or(dinode.gid);
        for (time, new) in [(&mut dinode.atime, set.atime), (&mut dinode.mtime, set.mtime)] {
            match new {
                Some(SetTime::Now) => *time = now,
                Some(SetTime::At(at)) => *time = at,
                None => {}
            }
        }
        dinode.ctime = set.ctime.unwrap_or(now);
        let mut tx = self.begin(1).await?;
        tx.put_dinode(&dinode).await?;
        tx.commit();
        Ok(self.entry(&dinode))
    }

    async fn set_file_size(&self, inode: &Arc<Inode>, size_bytes: u64) -> Result<(), FsError> {
        match self.dinode_of(None, inode.addr()).await?.file_type() {
            Some(FileType::Regular) => self.set_size(inode, size_bytes).await,
            Some(FileType::Directory) => Err(FsError::IsDirectory),
            _ => Err(FsError::Invalid("only regular files have a size to set")),
        }
    }
}
