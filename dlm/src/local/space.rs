//! One lockspace of the local lock manager: resources and locks, sharded by name, entered on the caller's thread.

use crate::deliver::{Call, Delivery, HasOutbox, Outbox, deliver, lock};
use crate::dump::ResourceDump;
use crate::machine::deadlock::graph::Wait;
use crate::machine::posix::POSIX_BY_RANGE;
use crate::machine::{self, Context, Event, LockKey, Pending, Resource};
use crate::table::{Table, name_hash};
use crate::{
    Completion, ConvertRequest, Flags, Grant, JoinError, LockCallbacks, LockError, LockId, LockName,
    LockRequest, Lockspace, LockspaceDump, LockspaceOptions, Mode, UnlockRequest,
};
use core::time::Duration;
use quorate_membership::{Epoch, Identity, Instant, NodeId, Runtime};
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
    pub(super) clock: Clock,
}

/// Time; without a runtime only an order: each look at it is later than the one before.
#[derive(Clone, Default)]
pub(super) struct Clock {
    runtime: Option<Arc<dyn Runtime>>,
    looks: Arc<AtomicU64>,
}

impl core::fmt::Debug for Clock {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Clock").field("runs", &self.runtime.is_some()).finish_non_exhaustive()
    }
}

impl Clock {
    pub(super) fn of(runtime: Arc<dyn Runtime>) -> Self {
        Self { runtime: Some(runtime), looks: Arc::default() }
    }

    pub(super) fn runtime(&self) -> Option<Arc<dyn Runtime>> {
        self.runtime.clone()
    }

    fn now(&self) -> Instant {
        match &self.runtime {
            Some(runtime) => runtime.now(),
            None => Instant(self.looks.fetch_add(1, Ordering::Relaxed)),
        }
    }
}

struct Record {
    name: LockName,
    key: LockKey,
    /// Whose it is; 0: nobody in particular.
    owner: u64,
    is_persistent: bool,
    /// Its owner has ended: it is told nothing any more.
    is_orphan: bool,
    /// How many operations there were; the newest has this number.
    op: u32,
    /// What to tell instead of `Cancelled`, should that operation be withdrawn.
    reason: Option<(u32, Completion)>,
    count: Arc<AtomicU64>,
    posix: bool,
    callbacks: Arc<dyn LockCallbacks>,
}

#[derive(Default)]
struct Shard {
    resources: BTreeMap<LockName, Resource>,
    /// Those with waiters.
    contended: BTreeSet<LockName>,
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
            let (Event::Done { key, .. } | Event::Blocking { key, .. }) = event;
            let key = *key;
            let Some(record) = self.locks.find_mut(&key.id.0) else { continue };
            let call = match event {
                Event::Done { op, completion, .. } => {
                    let reason = record.reason.take_if(|(o, _)| o == op).map(|(_, reason)| reason);
                    let is_cancelled = *completion == Completion::Cancelled;
                    let told = reason.filter(|_| is_cancelled).unwrap_or_else(|| completion.clone());
                    Call::Done(told)
                }
                Event::Blocking { mode, .. } => Call::Blocking(*mode),
            };
            if !record.is_orphan {
                self.outbox.push(Delivery { callbacks: record.callbacks.clone(), id: key.id, call });
            }
            // What a POSIX request was granted belongs to its owner.
            if record.posix || resource.is_none_or(|r| r.find(key).is_none()) {
                record.count.fetch_sub(1, Ordering::AcqRel);
                self.locks.remove(&key.id.0);
            }
        }
        if resource.is_some_and(Resource::has_waiters) {
            if !self.contended.contains(name) {
                self.contended.insert(name.clone());
            }
        } else if !self.contended.is_empty() {
            self.contended.remove(name);
        }
        if resource.is_some_and(Resource::is_unused) {
            self.resources.remove(name);
        }
        self.events = events;
        self.events.clear();
    }
}

impl Space {
    pub(super) fn new(options: &LockspaceOptions, clock: Clock) -> Arc<Self> {
        Arc::new(Self {
            options: options.clone(),
            shards: (0..SHARDS).map(|_| Mutex::new(Shard::default())).collect(),
            members: Mutex::default(),
            next_id: AtomicU64::new(1),
            clock,
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
        let requests = usize::try_from(count.load(Ordering::Acquire)).unwrap_or(usize::MAX);
        let locks = requests + self.pieces_of(node);
        if locks != 0 {
            return Err(JoinError::Busy { name: name(), locks });
        }
        members.remove(&node);
        Ok(members.is_empty())
    }

    /// Granted POSIX locks, which belong to their owners and not to a request.
    fn pieces_of(&self, node: Identity) -> usize {
        let count = |shard: &Mutex<Shard>| {
            let shard = lock(shard);
            let pieces = |r: &Resource| {
                r.locks().filter(|l| l.posix && l.key.node == node && l.pending.is_none()).count()
            };
            shard.resources.values().map(pieces).sum::<usize>()
        };
        self.shards.iter().map(count).sum()
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
                resource.purge(&context(self), node, &mut shard.events);
                for key in gone {
                    shard.locks.remove(&key.id.0);
                }
                shard.settle(&name);
            }
            drop(guard);
            deliver(mutex);
        }
    }

    /// The owner of these locks has ended: persistent ones become orphans, all others (and orphans) end. What they might
    /// have been writing is not valid.
    fn end(&self, node: Identity, wanted: impl Fn(&Record) -> bool) {
        for mutex in &self.shards {
            let mut guard = lock(mutex);
            let shard = &mut *guard;
            let names: Vec<LockName> = shard.resources.keys().cloned().collect();
            for name in names {
                let Some(resource) = shard.resources.get_mut(&name) else { continue };
                let keys: Vec<LockKey> = resource.locks().map(|l| l.key).filter(|k| k.node == node).collect();
                for key in keys {
                    let Some(record) = shard.locks.find_mut(&key.id.0).filter(|r| wanted(r)) else {
                        continue;
                    };
                    let Some(lock) = resource.find(key) else { continue };
                    let cx = context(self);
                    // A lock that was found on the resource is known there: neither call fails.
                    if record.is_persistent && !record.is_orphan && lock.granted.is_some() {
                        record.is_orphan = true;
                        let _ = resource.cancel(&cx, key, &mut shard.events);
                    } else {
                        let was_writing = lock.uses_value && lock.granted.is_some_and(|g| Mode::PW <= g);
                        let flags = if was_writing { Flags::IVVALBLK } else { Flags::NONE };
                        let _ = resource.unlock(&cx, key, (flags, None, 0), &mut shard.events);
                    }
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

    pub(super) fn hash(&self) -> u64 {
        name_hash(self.options.name.as_bytes())
    }

    /// Withdraws an operation, for this reason, if it waits still. The calls are left for [`Self::deliver`].
    pub(super) fn withdraw(&self, node: Identity, id: LockId, op: u32, reason: Completion) {
        let mut guard = lock(self.shard_of(id.0));
        let shard = &mut *guard;
        let Some(record) = shard.locks.find_mut(&id.0).filter(|r| r.key.node == node) else { return };
        let name = record.name.clone();
        let Some(resource) = shard.resources.get_mut(&name) else { return };
        let pending = resource.find(record.key).and_then(|l| l.pending.as_ref());
        if pending.is_some_and(|p| p.op == op) {
            record.reason = Some((op, reason));
            // It was found just now.
            let _ = resource.cancel(&context(self), record.key, &mut shard.events);
            shard.settle(&name);
        }
    }

    pub(super) fn deliver(&self, id: LockId) {
        deliver(self.shard_of(id.0));
    }

    pub(super) fn collect_waits(&self, out: &mut Vec<Wait>) {
        let hash = self.hash();
        for mutex in &self.shards {
            let shard = lock(mutex);
            for resource in shard.contended.iter().filter_map(|name| shard.resources.get(name)) {
                resource.waits(self.clock.now(), hash, false, out);
            }
        }
    }

    /// Whether a lock waits, and somebody may be waiting for its user: a lock that stands for itself has to be granted
    /// already, or be ahead of others.
    pub(super) fn may_close_a_cycle(&self, id: LockId) -> bool {
        let shard = lock(self.shard_of(id.0));
        let record = shard.locks.find(&id.0);
        let lock = record.and_then(|r| shard.resources.get(&r.name)?.find(r.key));
        lock.is_some_and(|l| {
            l.pending
                .as_ref()
                .is_some_and(|p| l.owner != 0 || l.granted.is_some() || p.flags.has(Flags::HEADQUE))
        })
    }

    fn shard_of(&self, index: u64) -> &Mutex<Shard> {
        &self.shards[usize::try_from(index % SHARDS).unwrap_or(0)]
    }
}

fn context(space: &Space) -> Context<'_> {
    static NONE: BTreeSet<Identity> = BTreeSet::new();
    let value_bytes = space.options.value_bytes;
    Context { epoch: Epoch(1), fenced: &NONE, value_bytes, now: space.clock.now() }
}

/// A lockspace as one handle has joined it.
#[derive(Clone, Debug)]
pub(super) struct Handle {
    pub(super) space: Arc<Space>,
    pub(super) node: Identity,
    /// What it was joined through; the deadlock search sees all of its lockspaces.
    pub(super) manager: super::LocalManager,
}

impl Handle {
    /// Enters the shard of a lock of this handle, and makes the calls that follow.
    fn with_lock<T>(
        &self,
        id: LockId,
        work: impl FnOnce(&Context<'_>, &mut Resource, &mut Record, &mut Vec<Event>) -> Result<T, LockError>,
    ) -> Result<T, LockError> {
        let mutex = self.space.shard_of(id.0);
        let result = {
            let mut guard = lock(mutex);
            let shard = &mut *guard;
            let record = shard.locks.find_mut(&id.0).filter(|r| r.key.node == self.node);
            let record = record.ok_or(LockError::NotFound)?;
            let name = record.name.clone();
            let resource = shard.resources.get_mut(&name).ok_or(LockError::NotFound)?;
            let result = work(&context(&self.space), resource, record, &mut shard.events);
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

    fn me(&self) -> Option<Identity> {
        Some(self.node)
    }

    fn value_bytes(&self) -> usize {
        self.space.options.value_bytes
    }

    fn request(&self, request: LockRequest, callbacks: Arc<dyn LockCallbacks>) -> Result<LockId, LockError> {
        machine::check_request(&request)?;
        self.check_clock(request.timeout)?;
        let count = lock(&self.space.members).get(&self.node).cloned().ok_or(LockError::Stopped)?;
        if request.flags.has(Flags::ORPHAN) {
            return self.adopt(&request, callbacks);
        }
        let index = name_hash(request.name.as_bytes()) % SHARDS;
        let mutex = self.space.shard_of(index);
        let posix = request.flags.has(Flags::POSIX);
        // A POSIX request may need a second number, see `machine::posix::spare`.
        let numbers = if posix { 2 } else { 1 };
        let id = LockId(self.space.next_id.fetch_add(numbers, Ordering::Relaxed) * SHARDS + index);
        {
            let mut guard = lock(mutex);
            let shard = &mut *guard;
            let key = LockKey { node: self.node, id };
            count.fetch_add(1, Ordering::AcqRel);
            let record = Record {
                name: request.name.clone(),
                key,
                owner: request.owner,
                is_persistent: request.flags.has(Flags::PERSISTENT),
                is_orphan: false,
                op: 1,
                reason: None,
                count,
                posix,
                callbacks,
            };
            shard.locks.insert(id.0, record);
            let cx = context(&self.space);
            let pending = Pending {
                mode: request.mode,
                range: request.range,
                flags: request.flags,
                value: None,
                demoted: false,
                op: 1,
                priority: request.priority,
            };
            let resource = shard.resources.entry(request.name.clone()).or_default();
            resource.request(&cx, key, request.owner, pending, &mut shard.events);
            shard.settle(&request.name);
        }
        deliver(mutex);
        self.limit(id, 1, request.timeout);
        self.look_for_deadlocks(id);
        Ok(id)
    }

    fn corked(&self, work: &mut dyn FnMut(&dyn Lockspace)) {
        work(self);
    }

    fn convert(&self, id: LockId, request: ConvertRequest) -> Result<(), LockError> {
        self.check_clock(request.timeout)?;
        let timeout = request.timeout;
        let op = self.with_lock(id, |cx, resource, record, events| {
            let lock = resource.find(record.key).ok_or(LockError::NotFound)?;
            let granted = lock.granted.filter(|_| lock.pending.is_none()).ok_or(LockError::Busy)?;
            if lock.posix {
                return Err(LockError::Invalid(POSIX_BY_RANGE));
            }
            machine::check_convert(granted, lock.range, &request, cx.value_bytes)?;
            record.op = record.op.wrapping_add(1);
            record.is_persistent |= request.flags.has(Flags::PERSISTENT) && record.owner != 0;
            let pending = Pending {
                mode: request.mode,
                range: request.range.unwrap_or(lock.range),
                flags: request.flags,
                value: request.value,
                demoted: false,
                op: record.op,
                priority: request.priority,
            };
            resource.convert(cx, record.key, pending, events)?;
            Ok(record.op)
        })?;
        self.limit(id, op, timeout);
        self.look_for_deadlocks(id);
        Ok(())
    }

    fn unlock(&self, id: LockId, request: UnlockRequest) -> Result<(), LockError> {
        self.with_lock(id, |cx, resource, record, events| {
            let granted = resource.find(record.key).ok_or(LockError::NotFound)?.granted;
            machine::check_unlock(granted, &request, cx.value_bytes)?;
            resource.unlock(cx, record.key, (request.flags, request.value, 0), events)
        })
    }

    fn cancel(&self, id: LockId) -> Result<(), LockError> {
        self.with_lock(id, |cx, resource, record, events| resource.cancel(cx, record.key, events))
    }

    fn close_owner(&self, owner: u64) {
        if owner != 0 {
            self.space.end(self.node, |record| record.owner == owner && !record.is_orphan);
        }
    }

    fn purge(&self, node: NodeId, pid: u32) {
        let nodes: Vec<Identity> = lock(&self.space.members).keys().copied().collect();
        for node in nodes.into_iter().filter(|n| n.node == node) {
            let is_of = |owner: u64| pid == 0 || owner & u64::from(u32::MAX) == u64::from(pid);
            self.space.end(node, |record| record.is_orphan && is_of(record.owner));
        }
    }
}

impl Handle {
    fn check_clock(&self, timeout: Option<Duration>) -> Result<(), LockError> {
        match (&self.space.clock.runtime, timeout) {
            (None, Some(_)) => Err(LockError::Invalid("a timeout, and this lock manager has no clock")),
            _ => Ok(()),
        }
    }

    /// Withdraws the operation after a while, if it waits still.
    fn limit(&self, id: LockId, op: u32, timeout: Option<Duration>) {
        let (Some(runtime), Some(timeout)) = (self.space.clock.runtime.clone(), timeout) else { return };
        let (space, node) = (self.space.clone(), self.node);
        runtime.clone().spawn(Box::pin(async move {
            runtime.sleep_until(runtime.now() + timeout).await;
            space.withdraw(node, id, op, Completion::TimedOut);
            space.deliver(id);
        }));
    }

    /// Takes over an orphan of this node.
    fn adopt(&self, request: &LockRequest, callbacks: Arc<dyn LockCallbacks>) -> Result<LockId, LockError> {
        let mutex = self.space.shard_of(name_hash(request.name.as_bytes()));
        let id = {
            let mut guard = lock(mutex);
            let shard = &mut *guard;
            let resource = shard.resources.get_mut(&request.name).ok_or(LockError::NotFound)?;
            let orphans: Vec<LockKey> = resource
                .locks()
                .filter(|l| l.key.node == self.node)
                .filter(|l| shard.locks.find(&l.key.id.0).is_some_and(|r| r.is_orphan))
                .map(|l| l.key)
                .collect();
            if orphans.is_empty() {
                return Err(LockError::NotFound);
            }
            let fits = |key: &&LockKey| {
                resource.find(**key).is_some_and(|l| l.granted == Some(request.mode) && l.pending.is_none())
            };
            let key = *orphans.iter().find(fits).ok_or(LockError::OtherMode)?;
            let token = resource.find(key).map(|l| l.token).unwrap_or_default();
            resource.set_owner(key, request.owner);
            let record = shard.locks.find_mut(&key.id.0).ok_or(LockError::NotFound)?;
            record.owner = request.owner;
            record.is_persistent = request.flags.has(Flags::PERSISTENT);
            record.is_orphan = false;
            record.callbacks = callbacks.clone();
            let grant = Grant {
                mode: request.mode,
                token,
                value: None,
                value_invalid: false,
                alt_mode: false,
                demoted: false,
            };
            let call = Call::Done(Completion::Granted(grant));
            shard.outbox.push(Delivery { callbacks, id: key.id, call });
            key.id
        };
        deliver(mutex);
        Ok(id)
    }
}
