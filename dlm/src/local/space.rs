//! One lockspace of the local lock manager: resources and locks, sharded by name, entered on the caller's thread.

use crate::deliver::{Call, Delivery, HasOutbox, Outbox, deliver, lock};
use crate::dump::ResourceDump;
use crate::machine::{self, Context, Event, LockKey, Pending, Resource};
use crate::table::{Table, name_hash};
use crate::{
    ConvertRequest, JoinError, LockCallbacks, LockError, LockId, LockName, LockRequest, Lockspace,
    LockspaceDump, LockspaceOptions, UnlockRequest,
};
use quorate_membership::{Epoch, Identity, Instant};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// A power of two: the low bits of a lock's number name its shard.
const SHARDS: u64 = 16;

#[derive(Debug)]
pub(super) struct Space {
    options: LockspaceOptions,
    shards: Vec<Mutex<Shard>>,
    /// How many locks each member has.
    members: Mutex<BTreeMap<Identity, Arc<AtomicU64>>>,
    next_id: AtomicU64,
}

struct Record {
    name: LockName,
    key: LockKey,
    count: Arc<AtomicU64>,
    callbacks: Arc<dyn LockCallbacks>,
}

#[derive(Default)]
struct Shard {
    resources: BTreeMap<LockName, Resource>,
    locks: Table<u64, Record>,
    events: Vec<Event>,
    outbox: Outbox,
}

impl core::fmt::Debug for Shard {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Shard").field("resources", &self.resources.len()).finish_non_exhaustive()
    }
}

impl HasOutbox for Shard {
    fn outbox(&mut self) -> &mut Outbox {
        &mut self.outbox
    }
}

impl Shard {
    /// Turns events into calls, and forgets locks and resources that are gone.
    fn settle(&mut self, name: &LockName) {
        let events = core::mem::take(&mut self.events);
        let resource = self.resources.get(name);
        for event in &events {
            let (key, call) = match event {
                Event::Done { key, completion, .. } => (*key, Call::Done(completion.clone())),
                Event::Blocking { key, mode } => (*key, Call::Blocking(*mode)),
            };
            let Some(record) = self.locks.find(&key.id.0) else { continue };
            self.outbox.push(Delivery { callbacks: record.callbacks.clone(), id: key.id, call });
            if resource.is_none_or(|r| r.find(key).is_none()) {
                record.count.fetch_sub(1, Ordering::AcqRel);
                self.locks.remove(&key.id.0);
            }
        }
        if resource.is_some_and(Resource::is_unused) {
            self.resources.remove(name);
        }
        self.events = events;
        self.events.clear();
    }
}

impl Space {
    pub(super) fn new(options: &LockspaceOptions) -> Arc<Self> {
        Arc::new(Self {
            options: options.clone(),
            shards: (0..SHARDS).map(|_| Mutex::new(Shard::default())).collect(),
            members: Mutex::default(),
            next_id: AtomicU64::new(1),
        })
    }

    pub(super) fn options(&self) -> &LockspaceOptions {
        &self.options
    }

    pub(super) fn join(&self, node: Identity) {
        lock(&self.members).entry(node).or_default();
    }

    /// Whether nobody is left.
    pub(super) fn leave(&self, node: Identity) -> Result<bool, JoinError> {
        let mut members = lock(&self.members);
        let name = || self.options.name.clone();
        let count = members.get(&node).ok_or_else(|| JoinError::NotJoined(name()))?;
        let locks = usize::try_from(count.load(Ordering::Acquire)).unwrap_or(usize::MAX);
        if locks != 0 {
            return Err(JoinError::Busy { name: name(), locks });
        }
        members.remove(&node);
        Ok(members.is_empty())
    }

    pub(super) fn crash(&self, node: Identity) {
        lock(&self.members).remove(&node);
        for mutex in &self.shards {
            let mut guard = lock(mutex);
            let shard = &mut *guard;
            let names: Vec<LockName> = shard.resources.keys().cloned().collect();
            for name in names {
                let Some(resource) = shard.resources.get_mut(&name) else { continue };
                let gone: Vec<LockKey> = resource.locks().map(|l| l.key).filter(|k| k.node == node).collect();
                resource.purge(&context(&self.options), node, &mut shard.events);
                for key in gone {
                    shard.locks.remove(&key.id.0);
                }
                shard.settle(&name);
            }
            drop(guard);
            deliver(mutex);
        }
    }

    pub(super) fn dump(&self) -> LockspaceDump {
        let members: Vec<Identity> = lock(&self.members).keys().copied().collect();
        let mut resources = Vec::new();
        for mutex in &self.shards {
            let shard = lock(mutex);
            // The table belongs to all handles; the first stands for it.
            let master = members.first().copied();
            resources.extend(
                master
                    .into_iter()
                    .flat_map(|m| shard.resources.iter().map(move |(n, r)| ResourceDump::of(n, m, r, None))),
            );
        }
        resources.sort_by(|a, b| a.name.cmp(&b.name));
        LockspaceDump { name: self.options.name.clone(), resources, members, ..LockspaceDump::default() }
    }

    fn shard_of(&self, index: u64) -> &Mutex<Shard> {
        &self.shards[usize::try_from(index % SHARDS).unwrap_or(0)]
    }
}

fn context(options: &LockspaceOptions) -> Context<'_> {
    static NONE: BTreeSet<Identity> = BTreeSet::new();
    Context { epoch: Epoch(1), fenced: &NONE, value_bytes: options.value_bytes, now: Instant(0) }
}

/// A lockspace as one handle has joined it.
#[derive(Debug)]
pub(super) struct Handle {
    pub(super) space: Arc<Space>,
    pub(super) node: Identity,
}

impl Handle {
    /// Enters the shard of a lock of this handle, and makes the calls that follow.
    fn with_lock<T>(
        &self,
        id: LockId,
        work: impl FnOnce(&Context<'_>, &mut Resource, LockKey, &mut Vec<Event>) -> Result<T, LockError>,
    ) -> Result<T, LockError> {
        let mutex = self.space.shard_of(id.0);
        let result = {
            let mut guard = lock(mutex);
            let shard = &mut *guard;
            let record = shard.locks.find(&id.0).filter(|r| r.key.node == self.node);
            let record = record.ok_or(LockError::NotFound)?;
            let (name, key) = (record.name.clone(), record.key);
            let resource = shard.resources.get_mut(&name).ok_or(LockError::NotFound)?;
            let result = work(&context(&self.space.options), resource, key, &mut shard.events);
            shard.settle(&name);
            result
        };
        deliver(mutex);
        result
    }
}

impl Lockspace for Handle {
    fn name(&self) -> &str {
        &self.space.options.name
    }

    fn value_bytes(&self) -> usize {
        self.space.options.value_bytes
    }

    fn request(&self, request: LockRequest, callbacks: Arc<dyn LockCallbacks>) -> Result<LockId, LockError> {
        machine::check_request(&request)?;
        let count = lock(&self.space.members).get(&self.node).cloned().ok_or(LockError::Stopped)?;
        let index = name_hash(request.name.as_bytes()) % SHARDS;
        let mutex = self.space.shard_of(index);
        let id = LockId(self.space.next_id.fetch_add(1, Ordering::Relaxed) * SHARDS + index);
        {
            let mut guard = lock(mutex);
            let shard = &mut *guard;
            let key = LockKey { node: self.node, id };
            count.fetch_add(1, Ordering::AcqRel);
            shard.locks.insert(id.0, Record { name: request.name.clone(), key, count, callbacks });
            let pending =
                Pending { mode: request.mode, flags: request.flags, value: None, demoted: false, op: 0 };
            let resource = shard.resources.entry(request.name.clone()).or_default();
            let cx = context(&self.space.options);
            resource.request(&cx, key, (request.owner, request.range), pending, &mut shard.events);
            shard.settle(&request.name);
        }
        deliver(mutex);
        Ok(id)
    }

    fn convert(&self, id: LockId, request: ConvertRequest) -> Result<(), LockError> {
        self.with_lock(id, |cx, resource, key, events| {
            let lock = resource.find(key).ok_or(LockError::NotFound)?;
            let granted = lock.granted.filter(|_| lock.pending.is_none()).ok_or(LockError::Busy)?;
            machine::check_convert(granted, &request, cx.value_bytes)?;
            let pending = Pending {
                mode: request.mode,
                flags: request.flags,
                value: request.value,
                demoted: false,
                op: 0,
            };
            resource.convert(cx, key, pending, events)
        })
    }

    fn unlock(&self, id: LockId, request: UnlockRequest) -> Result<(), LockError> {
        self.with_lock(id, |cx, resource, key, events| {
            let granted = resource.find(key).ok_or(LockError::NotFound)?.granted;
            machine::check_unlock(granted, &request, cx.value_bytes)?;
            resource.unlock(cx, key, (request.flags, request.value, 0), events)
        })
    }

    fn cancel(&self, id: LockId) -> Result<(), LockError> {
        self.with_lock(id, |cx, resource, key, events| resource.cancel(cx, key, events))
    }
}
