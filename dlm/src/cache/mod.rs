//! The lock cache: locks stay with the node between uses and are given up when another node asks.
//!
//! ```text
//!  acquire ──▶ cached and compatible? ──yes──▶ Held            (caller's thread, no await, no allocation)
//!                   │no
//!                   ▼
//!              one task per busy lock: demote, convert, request, grant waiters in order
//!                   ▲                        │
//!   blocking call ──┘                        └──▶ CacheClient::{demote, granted}
//! ```
//! Start at [`LockCache::new`]. Local users of a lock are served first in, first out. When another node wants the lock,
//! local users may go on for the rest of the minimum hold time; then the cache waits until none has it, lets the client
//! write back ([`CacheClient::demote`]) and gives it up.

mod api;
mod config;
mod entry;
mod held;
mod shrink;
mod state;
mod worker;

pub use api::{AcquireError, AcquireFlags, CacheClient, CacheMode};
pub use config::CacheConfig;
pub use held::Held;

use crate::deliver::lock;
use crate::table::{Table, name_hash};
use crate::{LockName, Lockspace};
use entry::Entry;
use event_listener::Event;
use held::Acquire;
use quorate_membership::{Lease, Runtime};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

const SHARDS: u64 = 16;

/// A cache of the locks of one lockspace. Clones share it.
#[derive(Clone, Debug)]
pub struct LockCache {
    inner: Arc<Inner>,
}

pub(crate) struct Inner {
    lockspace: Arc<dyn Lockspace>,
    runtime: Arc<dyn Runtime>,
    lease: Lease,
    client: Arc<dyn CacheClient>,
    config: CacheConfig,
    shards: Vec<Mutex<Shard>>,
    closing: AtomicBool,
    /// Told when an entry goes or a lock is given up.
    changed: Event,
}

#[derive(Default)]
struct Shard {
    entries: Table<LockName, Arc<Entry>>,
    /// The same entries, for walks.
    ordered: BTreeMap<LockName, Arc<Entry>>,
}

impl core::fmt::Debug for Inner {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("LockCache").field("lockspace", &self.lockspace.name()).finish_non_exhaustive()
    }
}

impl Inner {
    fn shard(&self, name: &LockName) -> &Mutex<Shard> {
        &self.shards[usize::try_from(name_hash(name.as_bytes()) % SHARDS).unwrap_or(0)]
    }

    fn find(&self, name: &LockName) -> Option<Arc<Entry>> {
        lock(self.shard(name)).entries.find(name).cloned()
    }

    fn find_or_create(self: &Arc<Self>, name: &LockName) -> Arc<Entry> {
        let mut shard = lock(self.shard(name));
        if let Some(entry) = shard.entries.find(name) {
            return entry.clone();
        }
        let entry = Arc::new(Entry::new(self, name));
        shard.entries.insert(name.clone(), entry.clone());
        shard.ordered.insert(name.clone(), entry.clone());
        entry
    }

    fn forget(&self, entry: &Arc<Entry>) {
        let mut shard = lock(self.shard(&entry.name));
        if shard.entries.find(&entry.name).is_some_and(|e| Arc::ptr_eq(e, entry)) {
            shard.entries.remove(&entry.name);
            shard.ordered.remove(&entry.name);
        }
        drop(shard);
        self.changed.notify(usize::MAX);
    }

    fn entries(&self) -> Vec<Arc<Entry>> {
        self.shards.iter().flat_map(|s| lock(s).ordered.values().cloned().collect::<Vec<_>>()).collect()
    }
}

impl LockCache {
    /// A cache over `lockspace`. Everything it hands out is checked against `lease`.
    #[must_use]
    pub fn new(
        lockspace: Arc<dyn Lockspace>,
        runtime: Arc<dyn Runtime>,
        lease: Lease,
        client: Arc<dyn CacheClient>,
        config: CacheConfig,
    ) -> Self {
        let shards = (0..SHARDS).map(|_| Mutex::new(Shard::default())).collect();
        let (closing, changed) = (AtomicBool::new(false), Event::new());
        Self {
            inner: Arc::new(Inner { lockspace, runtime, lease, client, config, shards, closing, changed }),
        }
    }

    /// Takes a lock, from the cache if it is there. While the node is frozen (its lease has lapsed and may come back)
    /// this waits.
    ///
    /// Dropping the future withdraws the wait, or releases the lock if it was granted meanwhile.
    ///
    /// # Errors
    /// See [`AcquireError`]; nothing is held.
    pub async fn acquire(
        &self,
        name: &LockName,
        mode: CacheMode,
        flags: AcquireFlags,
    ) -> Result<Held, AcquireError> {
        if let Some(held) = self.inner.find(name).and_then(|e| e.acquire_cached(mode, flags)) {
            return Ok(held);
        }
        loop {
            if self.inner.closing.load(Ordering::Acquire) {
                return Err(AcquireError::Stopped("the cache is closed".to_owned()));
            }
            // `None`: the entry went away while we looked at it.
            let Some(held) = Acquire::start(&self.inner, name, mode, flags).await? else { continue };
            if self.inner.lease.is_valid(self.inner.runtime.now()) {
                return Ok(held);
            }
            drop(held);
            if flags.try_now {
                return Err(AcquireError::Stopped("the lease has lapsed".to_owned()));
            }
            self.inner.runtime.sleep_until(self.inner.runtime.now() + self.inner.config.frozen_poll).await;
        }
    }

    /// Takes a lock from the cache alone: on the caller's thread, without waiting for anything.
    #[must_use]
    pub fn acquire_cached(&self, name: &LockName, mode: CacheMode) -> Option<Held> {
        self.inner.find(name)?.acquire_cached(mode, AcquireFlags::default())
    }
}
