//! Names: looking up, making, linking and removing them.

use super::Inner;
use super::data::check_mutable;
use super::dir::check_name;
use super::glock::Glock;
use super::inode::Inode;
use super::rgrp::RgrpLocks;
use crate::FsError;
use crate::face::{Credentials, Entry, Ino};
use crate::format::{
    BlockNo, DINODE_BYTES, Dinode, DinodeFlags, FileType, Inum, MetaType, PAYLOAD_FORMAT_DIRENTS,
    init_directory,
};
use quorate_dlm::cache::{CacheMode, Held};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// What to make.
#[derive(Clone, Debug)]
pub(super) struct NewInode {
    pub(super) kind: FileType,
    /// Permission bits.
    pub(super) mode: u32,
    pub(super) device: (u32, u32),
    /// Of a symbolic link.
    pub(super) target: Vec<u8>,
}

impl Inner {
    /// The directory `ino`, whose lock in `mode` is held as long as the second is.
    pub(super) async fn lock_dir(
        &self,
        ino: Ino,
        mode: CacheMode,
    ) -> Result<(Arc<Inode>, Held, Dinode), FsError> {
        let inode = self.inode(ino)?;
        let held = self.lock_inode(&inode, mode).await?;
        let dir = self.dinode_of(None, inode.addr()).await?;
        if !dir.is_dir() {
            return Err(FsError::NotDirectory);
        }
        if dir.nlink == 0 {
            return Err(FsError::NotFound);
        }
        Ok((inode, held, dir))
    }

    /// Finds a name and refers to what it names.
    pub(super) async fn lookup_name(&self, parent: Ino, name: &[u8]) -> Result<Entry, FsError> {
        if crate::format::NAME_BYTES_MAX < name.len() {
            return Err(FsError::NameTooLong);
        }
        let inode = {
            let (_, _held, dir) = self.lock_dir(parent, CacheMode::Shared).await?;
            let found = self.dir_find(None, &dir, name).await?.ok_or(FsError::NotFound)?;
            self.refer(found.inum).await?
        };
        // The inode cannot be deleted any more, so its directory need not be kept.
        let guard = Referred { fs: self, inode: Some(inode) };
        let entry = self.get_attr(Ino(guard.addr().0)).await?;
        guard.keep();
        Ok(entry)
    }

    /// Makes an inode with a name, and refers to it.
    pub(super) async fn make(
        &self,
        cred: &Credentials,
        parent: Ino,
        name: &[u8],
        new: NewInode,
    ) -> Result<Entry, FsError> {
        self.check_writable()?;
        check_name(name)?;
        if self.size.stuffed_bytes() <= new.target.len() {
            return Err(FsError::NameTooLong);
        }
        let (_, _held, mut dir) = self.lock_dir(parent, CacheMode::Exclusive).await?;
        check_mutable(&dir, true)?;
        if self.dir_find(None, &dir, name).await?.is_some() {
            return Err(FsError::Exists);
        }
        let is_dir = new.kind == FileType::Directory;
        if is_dir && dir.nlink == u32::MAX || dir.entries == u32::MAX {
            return Err(FsError::TooManyLinks);
        }
        let need = 1 + self.dir_need(&dir, name).await?;
        let (locks, block, _own) = self.find_dinode(need, dir.goal_meta).await?;
        let mut tx = self.begin(need as usize + 12).await?;
        let generation = locks.take_dinode(&mut tx, block).await?;
        let inum = Inum { formal: generation, addr: block };
        let dinode = self.new_dinode(cred, &dir, inum, &new);
        let data = tx.fresh(block, Glock::inode(block), MetaType::Dinode);
        data[DINODE_BYTES..DINODE_BYTES + new.target.len()].copy_from_slice(&new.target);
        if is_dir {
            init_directory(data, inum, dir.inum);
            dir.nlink += 1;
        }
        dinode.encode(data);
        self.dir_insert(&mut tx, &locks, &mut dir, name, inum, new.kind).await?;
        tx.put_dinode(&dir).await?;
        tx.commit();
        drop(locks);
        self.refer(inum).await?;
        Ok(self.entry(&dinode))
    }

    /// Locks groups with `need` free blocks, and the inode lock of one of these that may become a dinode.
    ///
    /// The lock of the inode comes before those of groups, so it is only tried; where others hold on to the locks of
    /// inodes that were here before, one is waited for without the groups.
    async fn find_dinode(&self, need: u32, goal: BlockNo) -> Result<(RgrpLocks<'_>, BlockNo, Held), FsError> {
        let mut tried = BTreeSet::new();
        loop {
            let locks = self.lock_for_alloc(&BTreeSet::new(), need, goal).await?;
            let mut found = None;
            for _ in 0..4 {
                let block = locks.candidate(&tried).await?;
                match self.try_lock(Glock::inode(block), CacheMode::Exclusive, true).await {
                    Ok(held) => {
                        found = Some((block, held));
                        break;
                    }
                    Err(FsError::WouldBlock) => {
                        tried.insert(block.0);
                    }
                    Err(error) => return Err(error),
                }
            }
            if let Some((block, held)) = found {
                return Ok((locks, block, held));
            }
            drop(locks);
            for block in std::mem::take(&mut tried) {
                drop(self.lock(Glock::inode(BlockNo(block)), CacheMode::Exclusive).await?);
            }
        }
    }

    fn new_dinode(&self, cred: &Credentials, dir: &Dinode, inum: Inum, new: &NewInode) -> Dinode {
        let now = (self.clock)();
        let is_dir = new.kind == FileType::Directory;
        let mut mode = new.kind.mode_bits() | new.mode & 0o7777;
        let mut gid = cred.gid;
        if dir.mode & 0o2000 != 0 {
            gid = dir.gid;
            if is_dir {
                mode |= 0o2000;
            }
        }
        let inherited = dir.flags.contains(DinodeFlags::INHERIT_JDATA);
        let mut flags = DinodeFlags::default();
        if is_dir || inherited && new.kind == FileType::Regular {
            flags |= DinodeFlags::JDATA;
        }
        if is_dir && inherited {
            flags |= DinodeFlags::INHERIT_JDATA;
        }
        let size_bytes = if is_dir { self.size.stuffed_bytes() as u64 } else { new.target.len() as u64 };
        Dinode {
            jid: self.jid(),
            inum,
            mode,
            uid: cred.uid,
            gid,
            nlink: if is_dir { 2 } else { 1 },
            size_bytes,
            blocks: 1,
            atime: now,
            mtime: now,
            ctime: now,
            major: new.device.0,
            minor: new.device.1,
            goal_meta: inum.addr,
            goal_data: inum.addr,
            generation: inum.formal,
            flags,
            payload_format: if is_dir { PAYLOAD_FORMAT_DIRENTS } else { 0 },
            height: 0,
            depth: 0,
            entries: if is_dir { 2 } else { 0 },
            eattr: BlockNo::NONE,
        }
    }

    /// Gives an inode another name, and refers to it once more.
    pub(super) async fn link_name(&self, ino: Ino, parent: Ino, name: &[u8]) -> Result<Entry, FsError> {
        self.check_writable()?;
        check_name(name)?;
        let inode = self.inode(ino)?;
        let (_, _held, mut dir) = self.lock_dir(parent, CacheMode::Exclusive).await?;
        if inode.inum == dir.inum {
            return Err(FsError::NotPermitted);
        }
        let _child = self.lock_inode(&inode, CacheMode::Exclusive).await?;
        let mut dinode = self.dinode_of(None, inode.addr()).await?;
        check_mutable(&dir, true)?;
        check_mutable(&dinode, false)?;
        let kind = dinode.file_type().filter(|_| !dinode.is_dir()).ok_or(FsError::NotPermitted)?;
        match dinode.nlink {
            0 => return Err(FsError::NotFound),
            u32::MAX => return Err(FsError::TooManyLinks),
            _ => {}
        }
        if self.dir_find(None, &dir, name).await?.is_some() {
            return Err(FsError::Exists);
        }
        let need = self.dir_need(&dir, name).await?;
        let locks = self.lock_for_alloc(&BTreeSet::new(), need, dir.goal_meta).await?;
        let mut tx = self.begin(need as usize + 12).await?;
        self.dir_insert(&mut tx, &locks, &mut dir, name, dinode.inum, kind).await?;
        dinode.nlink += 1;
        dinode.ctime = (self.clock)();
        tx.put_dinode(&dir).await?;
        tx.put_dinode(&dinode).await?;
        tx.commit();
        drop(locks);
        self.refer(dinode.inum).await?;
        Ok(self.entry(&dinode))
    }

    /// Removes a name: of a directory if `rmdir`, of anything else if not.
    pub(super) async fn remove_name(&self, parent: Ino, name: &[u8], rmdir: bool) -> Result<(), FsError> {
        self.check_writable()?;
        match name {
            b"." => return Err(FsError::Invalid("name")),
            b".." => return Err(FsError::NotEmpty),
            _ => {}
        }
        let (_, _held, mut dir) = self.lock_dir(parent, CacheMode::Exclusive).await?;
        check_mutable(&dir, false)?;
        let found = self.dir_find(None, &dir, name).await?.ok_or(FsError::NotFound)?;
        match (rmdir, found.kind == FileType::Directory) {
            (true, false) => return Err(FsError::NotDirectory),
            (false, true) => return Err(FsError::IsDirectory),
            _ => {}
        }
        let _child = self.lock_inum(found.inum, CacheMode::Exclusive).await?;
        let mut dinode = self.dinode_of(None, found.inum.addr).await?;
        check_mutable(&dinode, false)?;
        if rmdir && 2 < dinode.entries {
            return Err(FsError::NotEmpty);
        }
        let locks = self.lock_rgrps(&self.rgrps_to_unlink(&dinode)?).await?;
        let mut tx = self.begin(16).await?;
        self.dir_remove(&mut tx, &mut dir, name).await?;
        if rmdir {
            dir.nlink = dir.nlink.saturating_sub(1);
        }
        self.drop_link(&mut tx, &locks, &mut dinode).await?;
        tx.put_dinode(&dir).await?;
        tx.commit();
        drop(locks);
        self.unlinked(&dinode);
        Ok(())
    }

    /// The groups to lock for [`Self::drop_link`].
    pub(super) fn rgrps_to_unlink(&self, dinode: &Dinode) -> Result<BTreeSet<usize>, FsError> {
        let last = dinode.is_dir() || dinode.nlink <= 1;
        Ok(if last { BTreeSet::from([self.rgrp_of(dinode.inum.addr)?]) } else { BTreeSet::new() })
    }

    /// Takes a link from an inode, the only one from a directory.
    pub(super) async fn drop_link(
        &self,
        tx: &mut super::tx::Tx<'_>,
        locks: &RgrpLocks<'_>,
        dinode: &mut Dinode,
    ) -> Result<(), FsError> {
        dinode.nlink = if dinode.is_dir() { 0 } else { dinode.nlink.saturating_sub(1) };
        if dinode.is_dir() {
            dinode.entries = 0;
        }
        dinode.ctime = (self.clock)();
        if dinode.nlink == 0 {
            locks.unlink(tx, dinode.inum.addr).await?;
        }
        tx.put_dinode(dinode).await
    }

    /// A transaction took the last link away: the inode goes with its last user.
    pub(super) fn unlinked(&self, dinode: &Dinode) {
        if dinode.nlink != 0 {
            return;
        }
        let addr = dinode.inum.addr;
        let inode = self.inodes().get(&addr.0).cloned();
        match inode {
            Some(inode) => {
                inode.unlinked.store(true, Ordering::Release);
                // It may be on its way out already.
                self.unrefer(Ino(addr.0), 0, 0);
            }
            None => self.spawn_deleting(move |fs| async move {
                if let Err(error) = fs.delete_inode(addr).await {
                    tracing::debug!(inode = addr.0, %error, "an unlinked inode stays for later");
                }
            }),
        }
    }
}

/// Gives a reference back unless it is kept.
struct Referred<'a> {
    fs: &'a Inner,
    inode: Option<Arc<Inode>>,
}

impl Referred<'_> {
    fn addr(&self) -> BlockNo {
        self.inode.as_ref().map_or(BlockNo::NONE, |inode| inode.addr())
    }
    fn keep(mut self) {
        self.inode = None;
    }
}

impl Drop for Referred<'_> {
    fn drop(&mut self) {
        if let Some(inode) = self.inode.take() {
            self.fs.unrefer(Ino(inode.addr().0), 1, 0);
        }
    }
}
