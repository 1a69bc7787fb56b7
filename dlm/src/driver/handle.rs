//! A lockspace in the hands of its user.

use super::Dlm;
use super::space::{Entered, Space};
use crate::machine::map::{SHARDS, bucket_of, shard_of};
use crate::slots::shard_of_lock;
use crate::{ConvertRequest, Flags, LockCallbacks, LockError, LockId, LockRequest, Lockspace, UnlockRequest};
use quorate_membership::{Identity, Instant, NodeId};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

/// What `join` gives.
pub(super) struct Handle {
    space: Arc<Space>,
    dlm: Arc<Dlm>,
}

impl Handle {
    pub(super) fn new(space: Arc<Space>, dlm: &Arc<Dlm>) -> Self {
        Self { space, dlm: dlm.clone() }
    }
}

/// The same while its user submits a batch: what is to be sent stays in the shards until the end.
struct Corked<'a> {
    handle: &'a Handle,
    /// The shards that were entered, one bit each.
    entered: AtomicU16,
}

const _: () = assert!(SHARDS as u32 == u16::BITS, "a bit for each shard");

/// The ways into a shard, corked or not.
trait Ways: Send + Sync {
    fn handle(&self) -> &Handle;

    /// Whether to leave what is to be sent in the shard.
    fn corks(&self, shard: usize) -> bool;

    fn operate<T>(
        &self,
        shard: usize,
        work: impl FnOnce(&mut Entered, Instant) -> Result<T, LockError>,
    ) -> Result<T, LockError> {
        let Handle { space, dlm } = self.handle();
        space.operate(dlm, shard, self.corks(shard), work)
    }
}

impl Ways for Handle {
    fn handle(&self) -> &Handle {
        self
    }
    fn corks(&self, _: usize) -> bool {
        false
    }
}

impl Ways for Corked<'_> {
    fn handle(&self) -> &Handle {
        self.handle
    }
    fn corks(&self, shard: usize) -> bool {
        self.entered.fetch_or(1 << shard, Ordering::Relaxed);
        true
    }
}

impl<W: Ways> Lockspace for W {
    fn name(&self) -> &str {
        &self.handle().space.options.name
    }

    fn me(&self) -> Option<Identity> {
        Some(self.handle().dlm.me)
    }

    fn value_bytes(&self) -> usize {
        self.handle().space.options.value_bytes
    }

    fn request(&self, request: LockRequest, callbacks: Arc<dyn LockCallbacks>) -> Result<LockId, LockError> {
        let Handle { space, dlm } = self.handle();
        let shard = usize::from(shard_of(bucket_of(request.name.as_bytes())));
        self.operate(shard, |e, now| {
            if space.is_closed() {
                return Err(LockError::Stopped);
            }
            let is_limited = request.timeout.is_some();
            let fresh = e.numbers.take(request.flags.has(Flags::POSIX)).ok_or(LockError::Full)?;
            let result = e.machine.request(now, fresh, request, &mut e.out);
            // An adopted orphan keeps its number.
            if result != Ok(fresh) {
                e.numbers.give_back(fresh);
            }
            let id = result?;
            e.callbacks.insert(id.0, Some(callbacks));
            if is_limited {
                dlm.timer.notify(usize::MAX);
            }
            Ok(id)
        })
    }

    fn corked(&self, work: &mut dyn FnMut(&dyn Lockspace)) {
        let handle = self.handle();
        let corked = Corked { handle, entered: AtomicU16::new(0) };
        work(&corked);
        let entered = corked.entered.into_inner();
        for shard in (0..usize::from(SHARDS)).filter(|s| entered & (1 << s) != 0) {
            handle.space.uncork(&handle.dlm, shard);
        }
    }

    fn convert(&self, id: LockId, request: ConvertRequest) -> Result<(), LockError> {
        if request.timeout.is_some() {
            self.handle().dlm.timer.notify(usize::MAX);
        }
        self.operate(shard_of_lock(id), |e, now| e.machine.convert(now, id, request, &mut e.out))
    }

    fn unlock(&self, id: LockId, request: UnlockRequest) -> Result<(), LockError> {
        self.operate(shard_of_lock(id), |e, now| e.machine.unlock(now, id, request, &mut e.out))
    }

    fn cancel(&self, id: LockId) -> Result<(), LockError> {
        self.operate(shard_of_lock(id), |e, now| e.machine.cancel(now, id, &mut e.out))
    }

    fn close_owner(&self, owner: u64) {
        let Handle { space, dlm } = self.handle();
        space.each(dlm, |shard, now, out| shard.close_owner(now, owner, out));
    }

    fn purge(&self, node: NodeId, pid: u32) {
        let Handle { space, dlm } = self.handle();
        space.each(dlm, |shard, now, out| shard.purge(now, (node, pid), out));
    }
}
