//! An image behind the face of a filesystem, so that it can be mounted read-only.

use super::RescueFs;
use crate::FsError;
use crate::face::{Credentials, DirEntry, Entry, Filesystem, FsStat, Handle, Ino, LockOwner};
use crate::format::NAME_BYTES_MAX;
use crate::reader::{DirPosition, Inode};
use core::time::Duration;
use quorate_membership::BoxFuture;

/// Nothing changes, so whatever was told may be kept.
const VALID: Duration = Duration::from_secs(3600);

impl RescueFs {
    fn entry(&self, inode: &Inode) -> Entry {
        Entry { attr: self.attr(inode), valid: VALID }
    }

    async fn exists(&self, ino: Ino) -> Result<(), FsError> {
        self.inode(ino).await.map(|_| ())
    }
}

fn position(cookie: u64) -> DirPosition {
    DirPosition { table: (cookie >> 32) as u32, skip: cookie as u32 }
}

fn cookie(position: DirPosition) -> u64 {
    u64::from(position.table) << 32 | u64::from(position.skip)
}

impl Filesystem for RescueFs {
    fn root(&self) -> Ino {
        Ino(self.reader().superblock().root.addr.0)
    }

    fn lookup(&self, _: Credentials, parent: Ino, name: Vec<u8>) -> BoxFuture<'_, Result<Entry, FsError>> {
        Box::pin(async move {
            if NAME_BYTES_MAX < name.len() {
                return Err(FsError::NameTooLong);
            }
            let dir = self.inode(parent).await?;
            if !dir.dinode.is_dir() {
                return Err(FsError::NotDirectory);
            }
            let (inum, _) = self.reader().lookup(&dir, &name).await?.ok_or(FsError::NotFound)?;
            Ok(self.entry(&self.reader().inode(inum.addr).await?))
        })
    }

    fn forget(&self, _: Ino, _: u64) {}

    fn getattr(&self, ino: Ino) -> BoxFuture<'_, Result<Entry, FsError>> {
        Box::pin(async move { Ok(self.entry(&self.inode(ino).await?)) })
    }

    fn readlink(&self, ino: Ino) -> BoxFuture<'_, Result<Vec<u8>, FsError>> {
        Box::pin(async move { self.link_target(&self.inode(ino).await?).await })
    }

    fn open(&self, ino: Ino, write: bool) -> BoxFuture<'_, Result<Handle, FsError>> {
        Box::pin(async move {
            if write {
                return Err(FsError::ReadOnly);
            }
            self.exists(ino).await.map(|()| Handle(0))
        })
    }

    fn read(&self, ino: Ino, offset: u64, len: u32) -> BoxFuture<'_, Result<Vec<u8>, FsError>> {
        Box::pin(async move { Ok(self.reader().read(&self.inode(ino).await?, offset, len as usize).await?) })
    }

    fn flush(&self, _: Ino, _: LockOwner) -> BoxFuture<'_, Result<(), FsError>> {
        Box::pin(async { Ok(()) })
    }

    fn fsync(&self, _: Ino, _: bool) -> BoxFuture<'_, Result<(), FsError>> {
        Box::pin(async { Ok(()) })
    }

    fn release(&self, _: Ino, _: Handle, _: Option<LockOwner>) -> BoxFuture<'_, Result<(), FsError>> {
        Box::pin(async { Ok(()) })
    }

    fn opendir(&self, ino: Ino) -> BoxFuture<'_, Result<Handle, FsError>> {
        Box::pin(async move {
            if !self.inode(ino).await?.dinode.is_dir() {
                return Err(FsError::NotDirectory);
            }
            Ok(Handle(0))
        })
    }

    fn readdir(&self, ino: Ino, from: u64, max: usize) -> BoxFuture<'_, Result<Vec<DirEntry>, FsError>> {
        Box::pin(async move {
            let dir = self.inode(ino).await?;
            let entries = self.reader().entries(&dir, position(from), max).await?;
            let entries = entries.into_iter().take(max).map(|entry| DirEntry {
                ino: Ino(entry.inum.addr.0),
                kind: entry.kind.map_or(0, crate::format::FileType::mode_bits),
                cookie: cookie(entry.next),
                name: entry.name,
            });
            Ok(entries.collect())
        })
    }

    fn fsyncdir(&self, _: Ino) -> BoxFuture<'_, Result<(), FsError>> {
        Box::pin(async { Ok(()) })
    }

    fn releasedir(&self, _: Ino, _: Handle) -> BoxFuture<'_, Result<(), FsError>> {
        Box::pin(async { Ok(()) })
    }

    fn statfs(&self) -> BoxFuture<'_, Result<FsStat, FsError>> {
        Box::pin(async move {
            // The numbers may be anything in a damaged image, but not below zero.
            let number = |value: i64| u64::try_from(value).unwrap_or(0);
            let counters = self.counters();
            let (free, dinodes) = (number(counters.free), number(counters.dinodes));
            Ok(FsStat {
                block_size: self.reader().size().bytes(),
                blocks: number(counters.total),
                free,
                files: free.saturating_add(dinodes),
                files_free: free,
                name_bytes_max: NAME_BYTES_MAX as u32,
            })
        })
    }

    fn sync(&self) -> BoxFuture<'_, Result<(), FsError>> {
        Box::pin(async { Ok(()) })
    }

    fn getxattr(&self, ino: Ino, name: Vec<u8>) -> BoxFuture<'_, Result<Vec<u8>, FsError>> {
        Box::pin(async move {
            let xattrs = self.reader().xattrs(&self.inode(ino).await?).await?;
            let found = xattrs.into_iter().find(|xattr| xattr.full_name() == name);
            found.map(|xattr| xattr.value).ok_or(FsError::NoAttribute)
        })
    }

    fn listxattr(&self, ino: Ino) -> BoxFuture<'_, Result<Vec<u8>, FsError>> {
        Box::pin(async move {
            let mut names = Vec::new();
            for xattr in self.reader().xattrs(&self.inode(ino).await?).await? {
                names.extend(xattr.full_name());
                names.push(0);
            }
            Ok(names)
        })
    }
}
