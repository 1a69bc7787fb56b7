//! What is done when locks come and go (gfs2.md 10.6).

use super::Inner;
use super::glock::{Glock, Kind};
use crate::face::Ino;
use crate::format::MAGIC;
use quorate_dlm::cache::{CacheClient, CacheMode};
use quorate_dlm::{LockName, ValueBlock};
use quorate_membership::BoxFuture;
use std::sync::atomic::Ordering;
use std::sync::{OnceLock, Weak};

/// Stands between the lock cache and the filesystem, which needs the cache to come into being.
#[derive(Debug, Default)]
pub(super) struct Client(pub(super) OnceLock<Weak<Inner>>);

impl Client {
    fn fs(&self) -> Option<std::sync::Arc<Inner>> {
        self.0.get().and_then(Weak::upgrade)
    }
}

impl CacheClient for Client {
    fn granted(&self, name: &LockName, mode: CacheMode, value: Option<&ValueBlock>) {
        let (Some(fs), Some(glock)) = (self.fs(), Glock::parse(name)) else { return };
        if glock.kind != Kind::Rgrp {
            return;
        }
        let Ok(index) = fs.rgrps.binary_search_by_key(&glock.number, |rgrp| rgrp.entry.addr.0) else {
            return;
        };
        let mut memory = fs.rgrps[index].memory();
        memory.held = mode == CacheMode::Exclusive;
        let value = value.filter(|value| 12 <= value.len() && value.starts_with(&MAGIC.to_be_bytes()));
        memory.free = value.map(|value| u32::from_be_bytes([value[8], value[9], value[10], value[11]]));
    }

    fn demote<'a>(
        &'a self,
        name: &'a LockName,
        from: CacheMode,
        to: Option<CacheMode>,
        value: &'a mut ValueBlock,
    ) -> BoxFuture<'a, Result<(), String>> {
        Box::pin(async move {
            let (Some(fs), Some(glock)) = (self.fs(), Glock::parse(name)) else { return Ok(()) };
            fs.give_up(glock, from, to, value).await
        })
    }

    fn wanted(&self, name: &LockName, _by: CacheMode) {
        if let (Some(fs), Some(glock)) = (self.fs(), Glock::parse(name)) {
            fs.on_wanted(glock);
        }
    }
}

impl Inner {
    async fn give_up(
        &self,
        glock: Glock,
        from: CacheMode,
        to: Option<CacheMode>,
        value: &mut ValueBlock,
    ) -> Result<(), String> {
        if !matches!(glock.kind, Kind::Inode | Kind::Rgrp) {
            return Ok(());
        }
        let keeps_shared = to == Some(CacheMode::Shared);
        if glock.kind == Kind::Inode {
            self.drop_kernel_caches(glock, keeps_shared).await;
        }
        if from == CacheMode::Exclusive {
            // Withdrawn with changes in hand: they stay covered until this node's journal is replayed.
            if let Some(reason) = self.withdrawn.get() {
                return Err(reason.clone());
            }
            if let Err(error) = self.write_out(glock).await {
                let reason = format!("{:?} {} cannot be given up: {error}", glock.kind, glock.number);
                self.withdraw(&reason);
                return Err(reason);
            }
            if glock.kind == Kind::Rgrp {
                match self.rgrp_value(glock.number) {
                    Some(new) => *value = new,
                    // Not all of it is in memory; without the magic number the next holder reads the blocks.
                    None => value.fill(0),
                }
            }
        }
        if !keeps_shared {
            self.forget_cached(glock);
        }
        if glock.kind == Kind::Rgrp
            && let Ok(index) = self.rgrps.binary_search_by_key(&glock.number, |rgrp| rgrp.entry.addr.0)
        {
            let mut memory = self.rgrps[index].memory();
            memory.held = false;
            memory.free = None;
        }
        Ok(())
    }

    /// Commits, writes and revokes what a lock covers, data first.
    async fn write_out(&self, glock: Glock) -> Result<(), crate::FsError> {
        if glock.kind == Kind::Inode {
            self.write_pages(crate::format::BlockNo(glock.number)).await?;
        }
        self.clean_glock(glock).await?;
        // Nothing that was written under a lock may be resent after it is given up (R12).
        if glock.kind == Kind::Inode && self.is_unflushed(crate::format::BlockNo(glock.number)) {
            self.flush_device().await?;
        }
        Ok(())
    }

    fn forget_cached(&self, glock: Glock) {
        self.store().drop_glock(glock);
        if glock.kind == Kind::Inode
            && let Some(inode) = self.inodes().get(&glock.number)
        {
            let gone = inode.drop_pages(0);
            self.pages_cached.fetch_sub(gone, Ordering::Relaxed);
        }
    }

    async fn drop_kernel_caches(&self, glock: Glock, keeps_shared: bool) {
        let known = self.inodes().contains_key(&glock.number);
        let Some(sink) = self.sink().filter(|_| known && !keeps_shared) else { return };
        sink.inode(Ino(glock.number), true).await;
        sink.entries(Ino(glock.number)).await;
    }
}
