//! The numbers of statfs: the master's, and this node's change of them (gfs2.md 8.1).

use super::Inner;
use super::glock::Glock;
use crate::FsError;
use crate::face::FsStat;
use crate::format::{DINODE_BYTES, MetaType, NAME_BYTES_MAX, StatfsChange};
use quorate_dlm::cache::CacheMode;

impl Inner {
    pub(super) async fn stat_fs(&self) -> Result<FsStat, FsError> {
        let addr = self.system.statfs;
        let glock = Glock::inode(addr);
        let _held = self.lock(glock, CacheMode::Shared).await?;
        let block = self.meta(addr, glock, MetaType::Dinode).await?;
        let master = decode(&block[DINODE_BYTES..])?;
        let local = self.store().statfs_local;
        let sum = master.plus(&StatfsChange { total: local[0], free: local[1], dinodes: local[2] });
        let number = |value: i64| u64::try_from(value).unwrap_or(0);
        let (blocks, dinodes) = (number(sum.total), number(sum.dinodes));
        let free = number(sum.free).min(blocks);
        Ok(FsStat {
            block_size: self.size.bytes(),
            blocks,
            free,
            files: dinodes + free,
            files_free: free,
            name_bytes_max: NAME_BYTES_MAX as u32,
        })
    }

    /// Adds this node's change to the master's numbers.
    pub(super) async fn sync_statfs(&self) -> Result<(), FsError> {
        if self.store().statfs_local == [0; 3] {
            return Ok(());
        }
        let addr = self.system.statfs;
        let glock = Glock::inode(addr);
        let _held = self.lock(glock, CacheMode::Exclusive).await?;
        let mut tx = self.begin(2).await?;
        let local = self.store().statfs_local;
        let block = tx.edit(addr, glock, MetaType::Dinode).await?;
        let master = decode(&block[DINODE_BYTES..])?;
        master
            .plus(&StatfsChange { total: local[0], free: local[1], dinodes: local[2] })
            .encode(&mut block[DINODE_BYTES..]);
        // Taken from the local change in the same flush, so that no crash counts it twice or not at all.
        tx.statfs_moved = local;
        tx.commit();
        Ok(())
    }
}

fn decode(bytes: &[u8]) -> Result<StatfsChange, FsError> {
    StatfsChange::decode(bytes).map_err(|error| FsError::Corrupt(error.to_string()))
}
