//! The lockspaces that programs have open: joined for the first of them, left some time after the last.

use crate::deliver::lock;
use crate::{LockManager, Lockspace, LockspaceOptions};
use core::time::Duration;
use quorate_membership::{Instant, Runtime};
use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};

/// How long a lockspace without programs stays joined: the next one often comes soon, and joining costs a decision.
const LINGER: Duration = Duration::from_secs(30);
/// How often lockspaces without programs are looked for.
const SWEEP_PERIOD: Duration = Duration::from_secs(5);

enum Entry {
    /// Being joined or left; whoever wants it waits.
    Changing,
    Joined {
        space: Arc<dyn Lockspace>,
        users: usize,
        /// When the last user went.
        idle_since: Instant,
    },
}

pub(super) struct Spaces {
    manager: Arc<dyn LockManager>,
    runtime: Arc<dyn Runtime>,
    entries: Mutex<BTreeMap<String, Entry>>,
    changed: Condvar,
}

impl Spaces {
    pub(super) fn new(manager: Arc<dyn LockManager>, runtime: Arc<dyn Runtime>) -> Arc<Self> {
        let entries = Mutex::default();
        let spaces = Arc::new(Self { manager, runtime, entries, changed: Condvar::new() });
        let (weak, runtime) = (Arc::downgrade(&spaces), spaces.runtime.clone());
        spaces.runtime.spawn(Box::pin(sweep(weak, runtime)));
        spaces
    }

    /// Opens a lockspace for one more user. Blocks this thread while it is joined.
    ///
    /// # Errors
    /// Why not, for people.
    pub(super) fn open(
        self: &Arc<Self>,
        name: &str,
        value_bytes: Option<u16>,
    ) -> Result<Arc<dyn Lockspace>, String> {
        let mut entries = lock(&self.entries);
        loop {
            match entries.get_mut(name) {
                Some(Entry::Changing) => {
                    entries = self.changed.wait(entries).unwrap_or_else(PoisonError::into_inner);
                }
                Some(Entry::Joined { space, users, .. }) => {
                    let have = space.value_bytes();
                    if value_bytes.is_some_and(|wanted| usize::from(wanted) != have) {
                        return Err(format!("lockspace {name}: its value blocks have {have} bytes"));
                    }
                    *users += 1;
                    return Ok(space.clone());
                }
                None => break,
            }
        }
        entries.insert(name.to_owned(), Entry::Changing);
        drop(entries);
        let joined = self.join(name, value_bytes);
        let mut entries = lock(&self.entries);
        match &joined {
            Ok(space) => {
                let entry = Entry::Joined { space: space.clone(), users: 1, idle_since: Instant(0) };
                entries.insert(name.to_owned(), entry);
            }
            Err(_) => {
                entries.remove(name);
            }
        }
        self.changed.notify_all();
        joined
    }

    fn join(&self, name: &str, value_bytes: Option<u16>) -> Result<Arc<dyn Lockspace>, String> {
        let mut options = LockspaceOptions::plain(name);
        if let Some(bytes) = value_bytes {
            options.value_bytes = usize::from(bytes);
        }
        let (send, receive) = std::sync::mpsc::sync_channel(1);
        let manager = self.manager.clone();
        self.runtime.spawn(Box::pin(async move {
            let _ = send.send(manager.join(&options).await.map_err(|e| e.to_string()));
        }));
        receive.recv().unwrap_or_else(|_| Err("the node is stopping".to_owned()))
    }

    /// One user less.
    pub(super) fn close(&self, name: &str) {
        if let Some(Entry::Joined { users, idle_since, .. }) = lock(&self.entries).get_mut(name) {
            *users = users.saturating_sub(1);
            *idle_since = self.runtime.now();
        }
    }

    /// Leaves what nobody has had open for a while. One that still has locks is left later.
    async fn leave_idle(&self) {
        self.leave_idle_since(self.runtime.now()).await;
    }

    /// Leaves everything that nobody has open; true if nothing is left.
    pub(super) async fn leave_all(&self) -> bool {
        self.leave_idle_since(self.runtime.now() + LINGER).await;
        lock(&self.entries).is_empty()
    }

    async fn leave_idle_since(&self, now: Instant) {
        let idle: Vec<String> = {
            let mut entries = lock(&self.entries);
            let is_idle = |entry: &Entry| matches!(entry, Entry::Joined { users: 0, idle_since, .. } if *idle_since + LINGER <= now);
            entries.iter_mut().filter(|(_, e)| is_idle(e)).map(|(name, _)| name.clone()).collect()
        };
        for name in idle {
            let Some(entry) = self.take_idle(&name) else { continue };
            let left = self.manager.leave(&name).await;
            let mut entries = lock(&self.entries);
            match left {
                Ok(()) => {
                    entries.remove(&name);
                }
                Err(error) => {
                    tracing::debug!(target: "quorate_dlm", lockspace = %name, %error, "not left yet");
                    entries.insert(name, entry);
                }
            }
            self.changed.notify_all();
        }
    }

    /// Takes the entry out, unless somebody has come in between.
    fn take_idle(&self, name: &str) -> Option<Entry> {
        let mut entries = lock(&self.entries);
        match entries.get_mut(name) {
            Some(entry @ Entry::Joined { users: 0, .. }) => Some(core::mem::replace(entry, Entry::Changing)),
            _ => None,
        }
    }
}

async fn sweep(spaces: Weak<Spaces>, runtime: Arc<dyn Runtime>) {
    loop {
        runtime.sleep_until(runtime.now() + SWEEP_PERIOD).await;
        let Some(spaces) = spaces.upgrade() else { return };
        spaces.leave_idle().await;
    }
}
