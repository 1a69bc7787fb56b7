//! A complete lock manager of one node, without a cluster: for a filesystem that is mounted alone, for rescue, for
//! tests, and as the second implementation of the traits.
//!
//! [`LocalManager::shared`] gives several handles to one lock table. Each behaves as a node of its own, so that users of
//! the lock manager can test several of themselves in one process.

mod search;
mod space;

use crate::deliver::lock;
use crate::{JoinError, LockManager, Lockspace, LockspaceDump, LockspaceOptions};
use quorate_membership::{BoxFuture, Identity, Incarnation, NodeId, Runtime};
use search::Search;
use space::{Clock, Handle, Space};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

/// The longest name of a lockspace, in bytes.
const LOCKSPACE_NAME_BYTES_MAX: usize = 64;
/// The largest value block, in bytes.
const VALUE_BYTES_MAX: usize = 256;

/// Checks name and size.
///
/// # Errors
/// [`JoinError::Invalid`].
pub(crate) fn check_options(options: &LockspaceOptions) -> Result<(), JoinError> {
    if options.name.is_empty() || LOCKSPACE_NAME_BYTES_MAX < options.name.len() {
        return Err(JoinError::Invalid("a lockspace name has 1 to 64 bytes"));
    }
    if !(1..=VALUE_BYTES_MAX).contains(&options.value_bytes) {
        return Err(JoinError::Invalid("a value block has 1 to 256 bytes"));
    }
    Ok(())
}

type Spaces = Arc<Mutex<BTreeMap<String, Arc<Space>>>>;

/// The lock manager of one node; see the module.
#[derive(Clone, Debug)]
pub struct LocalManager {
    node: Identity,
    spaces: Spaces,
    clock: Clock,
    search: Arc<Search>,
}

impl Default for LocalManager {
    fn default() -> Self {
        Self::new()
    }
}

impl LocalManager {
    /// A lock manager with its own lock table.
    #[must_use]
    pub fn new() -> Self {
        let node = Identity::new(NodeId(1), Incarnation(1));
        Self { node, spaces: Spaces::default(), clock: Clock::default(), search: Arc::default() }
    }

    /// With a clock, so that requests may have timeouts; without one they are refused. Before lockspaces are joined.
    #[must_use]
    pub fn with_runtime(self, runtime: Arc<dyn Runtime>) -> Self {
        Self { clock: Clock::of(runtime), ..self }
    }

    /// `count` handles to one lock table, as nodes 1 to `count`. Locks of different handles conflict as those of
    /// different nodes do.
    #[must_use]
    pub fn shared(count: u32) -> Vec<Self> {
        let first = Self::new();
        let node = |n| Identity::new(NodeId(n), Incarnation(1));
        (1..=count).map(|n| Self { node: node(n), ..first.clone() }).collect()
    }

    /// Ends all locks of this handle at once, as if its process had died and been fenced: waiters are granted, value
    /// blocks that it might have been writing become invalid. Its locks get no completions.
    pub fn crash(&self) {
        let spaces: Vec<_> = lock(&self.spaces).values().cloned().collect();
        for space in spaces {
            space.crash(self.node);
        }
    }

    /// All lockspaces with their resources and queues.
    #[must_use]
    pub fn dump(&self) -> Vec<LockspaceDump> {
        lock(&self.spaces).values().map(|s| s.dump()).collect()
    }
}

impl LockManager for LocalManager {
    fn join<'a>(
        &'a self,
        options: &'a LockspaceOptions,
    ) -> BoxFuture<'a, Result<Arc<dyn Lockspace>, JoinError>> {
        Box::pin(async move {
            check_options(options)?;
            let mut spaces = lock(&self.spaces);
            let space =
                spaces.entry(options.name.clone()).or_insert_with(|| Space::new(options, self.clock.clone()));
            if space.options() != options {
                return Err(JoinError::Mismatch {
                    name: options.name.clone(),
                    theirs: format!("{:?}", space.options()),
                    ours: format!("{options:?}"),
                });
            }
            space.join(self.node);
            Ok(Arc::new(Handle { space: space.clone(), node: self.node, manager: self.clone() })
                as Arc<dyn Lockspace>)
        })
    }

    fn leave<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<(), JoinError>> {
        Box::pin(async move {
            let mut spaces = lock(&self.spaces);
            let space = spaces.get(name).ok_or_else(|| JoinError::NotJoined(name.to_owned()))?;
            if space.leave(self.node)? {
                spaces.remove(name);
            }
            Ok(())
        })
    }
}
