//! Giving cached locks up: one by name, the least used ones, all of them.

use super::LockCache;
use super::entry::Entry;
use crate::LockName;
use crate::deliver::lock;
use std::sync::Arc;
use std::sync::atomic::Ordering;

impl Entry {
    fn give_up(self: &Arc<Self>) {
        lock(&self.state).drop_now = true;
        self.kick_or_spawn();
    }

    /// Whether a wish to give it up has been fulfilled, or never will be.
    fn has_given_up(&self) -> bool {
        let state = lock(&self.state);
        !state.drop_now || state.removed || state.stopped.is_some() || state.withdrawn.is_some()
    }
}

impl LockCache {
    /// How many locks are cached or being acquired.
    #[must_use]
    pub fn len(&self) -> usize {
        self.inner.shards.iter().map(|s| lock(s).entries.len()).sum()
    }

    /// Whether nothing is cached.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Gives a lock back to its master as soon as no local user has it, and waits for that. A lock that could not be
    /// given up (see [`AcquireError::Withdrawn`](super::AcquireError::Withdrawn)) stays.
    ///
    /// Dropping the future gives up waiting alone.
    pub async fn drop_lock(&self, name: &LockName) {
        let Some(entry) = self.inner.find(name) else { return };
        entry.give_up();
        self.wait_until(|| entry.has_given_up()).await;
    }

    /// Gives up the least recently used locks that nobody has, until about `keep` are cached. Returns at once with how
    /// many are being given up.
    pub fn shrink(&self, keep: usize) -> usize {
        let mut idle: Vec<_> = self
            .inner
            .entries()
            .into_iter()
            .filter_map(|e| {
                let state = lock(&e.state);
                let is_idle = state.holders == 0 && state.queue.is_empty() && !state.busy && !state.drop_now;
                let used = state.last_used;
                drop(state);
                is_idle.then_some((used, e))
            })
            .collect();
        let surplus = self.len().saturating_sub(keep).min(idle.len());
        idle.sort_by_key(|(used, _)| *used);
        for (_, entry) in idle.iter().take(surplus) {
            entry.give_up();
        }
        surplus
    }

    /// Refuses new users, waits for those who have locks, and gives all locks back. Idempotent.
    ///
    /// Dropping the future gives up waiting; the cache stays closed.
    pub async fn shutdown(&self) {
        self.inner.closing.store(true, Ordering::Release);
        for entry in self.inner.entries() {
            entry.give_up();
        }
        self.wait_until(|| self.inner.entries().iter().all(|e| e.has_given_up())).await;
    }

    /// Ends all caching at once: nobody gets a lock any more, waiting ones fail with `reason`. For the end of this
    /// life of the node.
    pub fn stop(&self, reason: &str) {
        self.inner.closing.store(true, Ordering::Release);
        for entry in self.inner.entries() {
            lock(&entry.state).stopped.get_or_insert_with(|| reason.to_owned());
            entry.kick_or_spawn();
        }
        self.inner.changed.notify(usize::MAX);
    }

    async fn wait_until(&self, done: impl Fn() -> bool) {
        loop {
            let changed = self.inner.changed.listen();
            if done() {
                return;
            }
            changed.await;
        }
    }
}
