//! [`Gfs`] as a [`Filesystem`]. Every answer waits for a valid lease (R8).

use super::names::NewInode;
use super::{Gfs, Inner};
use crate::FsError;
use crate::face::{
    Credentials, DirEntry, Entry, FallocateMode, Filesystem, FsStat, Handle, Ino, Invalidation, LockKind,
    LockOwner, NodeKind, PosixHolder, PosixLock, RenameFlags, Seek, SetAttr, Wait, XattrFlags,
};
use crate::format::{DINODE_BYTES, FileType};
use core::time::Duration;
use quorate_dlm::cache::CacheMode;
use quorate_membership::BoxFuture;
use std::sync::{Arc, PoisonError};

/// How often a node without lease looks whether it is back.
const LEASE_POLL: Duration = Duration::from_millis(10);

impl Inner {
    /// Lets an answer out only under a valid lease: it waits while the node is frozen.
    async fn answer<T>(&self, operation: impl Future<Output = Result<T, FsError>>) -> Result<T, FsError> {
        let result = operation.await;
        while !self.lease.is_valid(self.runtime.now()) {
            if self.check().is_err() || self.unmounting.load(std::sync::atomic::Ordering::Acquire) {
                return Err(FsError::NoLease);
            }
            self.runtime.sleep_until(self.runtime.now() + LEASE_POLL).await;
        }
        result
    }

    async fn read_link(&self, ino: Ino) -> Result<Vec<u8>, FsError> {
        let inode = self.inode(ino)?;
        let _held = self.lock_inode(&inode, CacheMode::Shared).await?;
        let dinode = self.dinode_of(None, inode.addr()).await?;
        if dinode.file_type() != Some(FileType::Symlink) || dinode.height != 0 {
            return Err(FsError::Invalid("not a symbolic link"));
        }
        let block = self.dinode_block(inode.addr()).await?;
        Ok(block[DINODE_BYTES..DINODE_BYTES + dinode.size_bytes as usize].to_vec())
    }

    /// A handle with a number of its own, so that locks can be told to have been taken through it.
    fn new_handle(&self) -> Handle {
        Handle(1 + self.handles.fetch_add(1, std::sync::atomic::Ordering::Relaxed))
    }

    async fn open_file(&self, ino: Ino, write: bool) -> Result<Handle, FsError> {
        if write {
            self.check_writable()?;
        }
        let inode = self.inode(ino)?;
        inode.opened();
        Ok(self.new_handle())
    }

    async fn create_file(
        &self,
        cred: Credentials,
        parent: Ino,
        name: Vec<u8>,
        mode: u32,
        exclusive: bool,
    ) -> Result<(Entry, Handle), FsError> {
        loop {
            let new = NewInode { kind: FileType::Regular, mode, device: (0, 0), target: Vec::new() };
            let entry = match self.make(&cred, parent, &name, new).await {
                Err(FsError::Exists) if !exclusive => match self.lookup_name(parent, &name).await {
                    // Somebody removed it in between.
                    Err(FsError::NotFound) => continue,
                    other => other?,
                },
                other => other?,
            };
            self.inode(entry.attr.ino)?.opened();
            return Ok((entry, self.new_handle()));
        }
    }

    /// The next data or hole.
    async fn seek(&self, ino: Ino, offset: u64, what: Seek) -> Result<u64, FsError> {
        let inode = self.inode(ino)?;
        let _held = self.lock_inode(&inode, CacheMode::Shared).await?;
        let dinode = self.dinode_of(None, inode.addr()).await?;
        let size = dinode.size_bytes;
        if size <= offset {
            return Err(FsError::NoDevice);
        }
        if dinode.height == 0 {
            return Ok(if what == Seek::Data { offset } else { size });
        }
        let unit = self.size.usize() as u64;
        let mut at = offset / unit;
        while at < size.div_ceil(unit) {
            let (block, count) = self.map_run(None, &dinode, at, size.div_ceil(unit) - at).await?;
            if block.is_some() == (what == Seek::Data) {
                return Ok((at * unit).max(offset));
            }
            at += count;
        }
        if what == Seek::Data { Err(FsError::NoDevice) } else { Ok(size) }
    }

    async fn sync_all(&self) -> Result<(), FsError> {
        if self.journal.is_none() {
            return Ok(());
        }
        let all: Vec<u64> = self.inodes().keys().copied().collect();
        for ino in all {
            self.write_pages(crate::format::BlockNo(ino)).await?;
        }
        self.flush_log().await?;
        self.flush_device().await
    }
}

fn node_kind(kind: NodeKind) -> (FileType, (u32, u32)) {
    match kind {
        NodeKind::File => (FileType::Regular, (0, 0)),
        NodeKind::Fifo => (FileType::Fifo, (0, 0)),
        NodeKind::Socket => (FileType::Socket, (0, 0)),
        NodeKind::CharDevice(major, minor) => (FileType::CharDevice, (major, minor)),
        NodeKind::BlockDevice(major, minor) => (FileType::BlockDevice, (major, minor)),
    }
}

impl Filesystem for Gfs {
    fn root(&self) -> Ino {
        Ino(self.0.superblock.root.addr.0)
    }

    fn set_invalidation(&self, sink: Arc<dyn Invalidation>) {
        *self.0.sink.lock().unwrap_or_else(PoisonError::into_inner) = Some(sink);
    }

    fn lookup(
        &self,
        _cred: Credentials,
        parent: Ino,
        name: Vec<u8>,
    ) -> BoxFuture<'_, Result<Entry, FsError>> {
        Box::pin(self.0.answer(async move { self.0.lookup_name(parent, &name).await }))
    }

    fn forget(&self, ino: Ino, count: u64) {
        self.0.unrefer(ino, count, 0);
    }

    fn getattr(&self, ino: Ino) -> BoxFuture<'_, Result<Entry, FsError>> {
        Box::pin(self.0.answer(self.0.get_attr(ino)))
    }

    fn setattr(&self, cred: Credentials, ino: Ino, set: SetAttr) -> BoxFuture<'_, Result<Entry, FsError>> {
        Box::pin(self.0.answer(self.0.set_attr(cred, ino, set)))
    }

    fn readlink(&self, ino: Ino) -> BoxFuture<'_, Result<Vec<u8>, FsError>> {
        Box::pin(self.0.answer(self.0.read_link(ino)))
    }

    fn mknod(
        &self,
        cred: Credentials,
        parent: Ino,
        name: Vec<u8>,
        mode: u32,
        kind: NodeKind,
    ) -> BoxFuture<'_, Result<Entry, FsError>> {
        let (kind, device) = node_kind(kind);
        let new = NewInode { kind, mode, device, target: Vec::new() };
        Box::pin(self.0.answer(async move { self.0.make(&cred, parent, &name, new).await }))
    }

    fn create(
        &self,
        cred: Credentials,
        parent: Ino,
        name: Vec<u8>,
        mode: u32,
        exclusive: bool,
    ) -> BoxFuture<'_, Result<(Entry, Handle), FsError>> {
        Box::pin(self.0.answer(self.0.create_file(cred, parent, name, mode, exclusive)))
    }

    fn mkdir(
        &self,
        cred: Credentials,
        parent: Ino,
        name: Vec<u8>,
        mode: u32,
    ) -> BoxFuture<'_, Result<Entry, FsError>> {
        let new = NewInode { kind: FileType::Directory, mode, device: (0, 0), target: Vec::new() };
        Box::pin(self.0.answer(async move { self.0.make(&cred, parent, &name, new).await }))
    }

    fn symlink(
        &self,
        cred: Credentials,
        parent: Ino,
        name: Vec<u8>,
        target: Vec<u8>,
    ) -> BoxFuture<'_, Result<Entry, FsError>> {
        let new = NewInode { kind: FileType::Symlink, mode: 0o777, device: (0, 0), target };
        Box::pin(self.0.answer(async move { self.0.make(&cred, parent, &name, new).await }))
    }

    fn link(&self, ino: Ino, parent: Ino, name: Vec<u8>) -> BoxFuture<'_, Result<Entry, FsError>> {
        Box::pin(self.0.answer(async move { self.0.link_name(ino, parent, &name).await }))
    }

    fn unlink(&self, parent: Ino, name: Vec<u8>) -> BoxFuture<'_, Result<(), FsError>> {
        Box::pin(self.0.answer(async move { self.0.remove_name(parent, &name, false).await }))
    }

    fn rmdir(&self, parent: Ino, name: Vec<u8>) -> BoxFuture<'_, Result<(), FsError>> {
        Box::pin(self.0.answer(async move { self.0.remove_name(parent, &name, true).await }))
    }

    fn rename(
        &self,
        parent: Ino,
        name: Vec<u8>,
        new_parent: Ino,
        new_name: Vec<u8>,
        flags: RenameFlags,
    ) -> BoxFuture<'_, Result<(), FsError>> {
        Box::pin(
            self.0
                .answer(async move { self.0.rename_name(parent, &name, new_parent, &new_name, flags).await }),
        )
    }

    fn open(&self, ino: Ino, write: bool) -> BoxFuture<'_, Result<Handle, FsError>> {
        Box::pin(self.0.answer(self.0.open_file(ino, write)))
    }

    fn read(&self, ino: Ino, offset: u64, len: u32) -> BoxFuture<'_, Result<Vec<u8>, FsError>> {
        Box::pin(self.0.answer(self.0.read_file(ino, offset, len)))
    }

    fn write(
        &self,
        ino: Ino,
        offset: u64,
        data: Vec<u8>,
        append: bool,
        kill_priv: bool,
    ) -> BoxFuture<'_, Result<u32, FsError>> {
        Box::pin(self.0.answer(self.0.write_file(ino, offset, data, append, kill_priv)))
    }

    fn flush(&self, ino: Ino, owner: LockOwner) -> BoxFuture<'_, Result<(), FsError>> {
        Box::pin(self.0.answer(async move {
            self.0.close_posix(ino, owner).await?;
            self.0.check()
        }))
    }

    fn fsync(&self, ino: Ino, data_only: bool) -> BoxFuture<'_, Result<(), FsError>> {
        Box::pin(self.0.answer(self.0.sync_inode(ino, data_only)))
    }

    fn release(
        &self,
        ino: Ino,
        handle: Handle,
        owner: Option<LockOwner>,
    ) -> BoxFuture<'_, Result<(), FsError>> {
        // Not only when the future is polled: a close cannot fail, and its reference must not stay.
        if let Some(owner) = owner {
            self.0.end_flock(ino, owner);
        }
        let owners = self.0.owners_through(ino, handle);
        self.0.unrefer(ino, 0, 1);
        Box::pin(async move {
            for owner in owners {
                self.0.close_posix(ino, owner).await?;
            }
            Ok(())
        })
    }

    fn fallocate(
        &self,
        ino: Ino,
        offset: u64,
        len: u64,
        mode: FallocateMode,
    ) -> BoxFuture<'_, Result<(), FsError>> {
        Box::pin(self.0.answer(self.0.fallocate_file(ino, offset, len, mode)))
    }

    fn lseek(&self, ino: Ino, offset: u64, what: Seek) -> BoxFuture<'_, Result<u64, FsError>> {
        Box::pin(self.0.answer(self.0.seek(ino, offset, what)))
    }

    fn opendir(&self, ino: Ino) -> BoxFuture<'_, Result<Handle, FsError>> {
        Box::pin(self.0.answer(self.0.open_file(ino, false)))
    }

    fn readdir(&self, ino: Ino, cookie: u64, max: usize) -> BoxFuture<'_, Result<Vec<DirEntry>, FsError>> {
        Box::pin(self.0.answer(self.0.read_dir(ino, cookie, max)))
    }

    fn fsyncdir(&self, ino: Ino) -> BoxFuture<'_, Result<(), FsError>> {
        Box::pin(self.0.answer(self.0.sync_inode(ino, false)))
    }

    fn releasedir(&self, ino: Ino, _handle: Handle) -> BoxFuture<'_, Result<(), FsError>> {
        self.0.unrefer(ino, 0, 1);
        Box::pin(async { Ok(()) })
    }

    fn statfs(&self) -> BoxFuture<'_, Result<FsStat, FsError>> {
        Box::pin(self.0.answer(self.0.stat_fs()))
    }

    fn sync(&self) -> BoxFuture<'_, Result<(), FsError>> {
        Box::pin(self.0.answer(self.0.sync_all()))
    }

    fn getxattr(&self, ino: Ino, name: Vec<u8>) -> BoxFuture<'_, Result<Vec<u8>, FsError>> {
        Box::pin(self.0.answer(async move { self.0.get_xattr(ino, &name).await }))
    }

    fn listxattr(&self, ino: Ino) -> BoxFuture<'_, Result<Vec<u8>, FsError>> {
        Box::pin(self.0.answer(self.0.list_xattr(ino)))
    }

    fn setxattr(
        &self,
        ino: Ino,
        name: Vec<u8>,
        value: Vec<u8>,
        flags: XattrFlags,
    ) -> BoxFuture<'_, Result<(), FsError>> {
        Box::pin(self.0.answer(async move { self.0.change_xattr(ino, &name, Some(&value), flags).await }))
    }

    fn removexattr(&self, ino: Ino, name: Vec<u8>) -> BoxFuture<'_, Result<(), FsError>> {
        Box::pin(
            self.0.answer(async move { self.0.change_xattr(ino, &name, None, XattrFlags::default()).await }),
        )
    }

    fn getlk(
        &self,
        ino: Ino,
        owner: LockOwner,
        lock: PosixLock,
    ) -> BoxFuture<'_, Result<Option<PosixHolder>, FsError>> {
        Box::pin(self.0.answer(self.0.test_posix(ino, owner, lock)))
    }

    fn setlk(
        &self,
        ino: Ino,
        handle: Handle,
        owner: LockOwner,
        lock: PosixLock,
        wait: Wait,
    ) -> BoxFuture<'_, Result<(), FsError>> {
        Box::pin(self.0.answer(self.0.set_posix(ino, handle, owner, lock, wait)))
    }

    fn flock(
        &self,
        ino: Ino,
        owner: LockOwner,
        kind: LockKind,
        wait: bool,
    ) -> BoxFuture<'_, Result<(), FsError>> {
        Box::pin(self.0.answer(self.0.set_flock(ino, owner, kind, wait)))
    }
}
