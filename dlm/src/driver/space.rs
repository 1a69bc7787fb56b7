//! A lockspace on a node: its shards behind their mutexes, and the lock handles of its users.

use super::Dlm;
use super::handle::Handle;
use crate::deliver::{Call, Delivery, HasOutbox, Outbox, deliver, lock, run};
use crate::machine::deadlock::graph::Wait;
use crate::machine::map::SHARDS;
use crate::machine::shard::{Input, Output, Shard, ShardConfig, SpaceView};
use crate::slots::{LockTable, Numbers};
use crate::table::name_hash;
use crate::wire::{Frame, FrameWriter, Header, Message};
use crate::{
    Completion, JoinError, LockCallbacks, LockError, LockId, Lockspace, LockspaceDump, LockspaceOptions,
    LockspaceStats, Mode,
};
use quorate_membership::{Epoch, Identity, Instant, View};
use smallvec::SmallVec;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

pub(super) struct Space {
    pub(super) options: LockspaceOptions,
    pub(super) hash: u64,
    shards: Vec<Mutex<Entered>>,
    progress: Mutex<Progress>,
    /// New locks are refused.
    is_closed: AtomicBool,
    is_stopped: AtomicBool,
}

/// A shard with those who are to be told.
pub(super) struct Entered {
    pub(super) machine: Shard,
    /// Of every number that was given and not given back; `None`: an orphan.
    pub(super) callbacks: LockTable<Option<Arc<dyn LockCallbacks>>>,
    pub(super) numbers: Numbers,
    outbox: Outbox,
    pub(super) out: Vec<Output>,
    /// Messages that were not sent yet, in order. Whoever sends for the shard sends these first.
    corked: Vec<(Identity, FrameWriter)>,
}

impl HasOutbox for Entered {
    fn outbox(&mut self) -> &mut Outbox {
        &mut self.outbox
    }
}

#[derive(Default)]
struct Progress {
    /// The map each shard has done its part of.
    ready: Vec<Epoch>,
    /// The newest map.
    map: Epoch,
    quiet: BTreeSet<usize>,
    mismatch: Option<String>,
}

impl Space {
    pub(super) fn new(me: Identity, options: &LockspaceOptions) -> Self {
        let shard = |index| {
            let (value_bytes, weakest_hold, moves) = (options.value_bytes, options.holds, options.moves);
            let machine = Shard::new(ShardConfig { me, index, value_bytes, weakest_hold, moves });
            Mutex::new(Entered {
                machine,
                callbacks: LockTable::default(),
                numbers: Numbers::new(index),
                outbox: Outbox::default(),
                out: Vec::new(),
                corked: Vec::new(),
            })
        };
        Self {
            options: options.clone(),
            hash: name_hash(options.name.as_bytes()),
            shards: (0..SHARDS).map(shard).collect(),
            progress: Mutex::new(Progress {
                ready: vec![Epoch(0); usize::from(SHARDS)],
                ..Progress::default()
            }),
            is_closed: AtomicBool::new(false),
            is_stopped: AtomicBool::new(false),
        }
    }

    /// Enters a shard, and carries out what follows; calls are left in its outbox.
    fn enter<T>(&self, dlm: &Arc<Dlm>, index: usize, work: impl FnOnce(&mut Entered) -> T) -> Option<T> {
        let mut guard = lock(self.shards.get(index)?);
        let entered = &mut *guard;
        let start = dlm.now();
        let result = work(entered);
        if !entered.out.is_empty() {
            self.carry_out(dlm, index, entered);
        }
        entered.uncork(dlm);
        let turn = u64::try_from(dlm.now().since(start).as_nanos()).unwrap_or(u64::MAX);
        let longest = &mut entered.machine.stats.turn_max_ns;
        *longest = turn.max(*longest);
        Some(result)
    }

    /// The same for a user of the lockspace, who is called back before this returns, if the node may answer. `cork`: what
    /// is to be sent is left for [`Self::uncork`].
    pub(super) fn operate<T>(
        &self,
        dlm: &Arc<Dlm>,
        index: usize,
        cork: bool,
        work: impl FnOnce(&mut Entered, Instant) -> Result<T, LockError>,
    ) -> Result<T, LockError> {
        self.check_open()?;
        let mutex = self.shards.get(index).ok_or(LockError::NotFound)?;
        let mut guard = lock(mutex);
        let entered = &mut *guard;
        // Nobody else changes the shard any more, so this is also the time at which the lease must hold (R8).
        let now = dlm.now();
        let result = work(entered, now);
        if !entered.out.is_empty() {
            self.carry_out(dlm, index, entered);
            if !cork {
                entered.uncork(dlm);
            }
        }
        if dlm.lease.is_valid(now) {
            let turn = entered.outbox.begin();
            drop(guard);
            if let Some(turn) = turn {
                run(mutex, turn);
            }
        } else {
            drop(guard);
            dlm.deliver(self, index);
        }
        result
    }

    /// Sends what was left.
    pub(super) fn uncork(&self, dlm: &Arc<Dlm>, index: usize) {
        if let Some(mutex) = self.shards.get(index) {
            lock(mutex).uncork(dlm);
        }
    }

    fn carry_out(&self, dlm: &Arc<Dlm>, index: usize, entered: &mut Entered) {
        let shard = u8::try_from(index).unwrap_or(0);
        let map = entered.machine.map();
        let header = Header { space: self.hash, shard, map, options: self.wire_options() };
        let mut ended = SmallVec::<[LockId; 4]>::new();
        let mut out = core::mem::take(&mut entered.out);
        for output in out.drain(..) {
            match output {
                Output::Send { to, message } => {
                    entered.send(dlm, to, header, &message);
                }
                Output::Done { id, completion } => {
                    if !entered.machine.has(id) || entered.machine.is_posix(id) {
                        ended.push(id);
                    }
                    entered.call(id, Call::Done(completion));
                }
                Output::Suspect => dlm.suspects.store(true, Ordering::Release),
                Output::Orphaned { id } => {
                    entered.callbacks.insert(id.0, None);
                }
                Output::Blocking { id, mode } => entered.call(id, Call::Blocking(mode)),
                Output::Ready { map } => self.on_ready(dlm, index, map),
                Output::Quiet => {
                    lock(&self.progress).quiet.insert(index);
                    dlm.changed.notify(usize::MAX);
                }
            }
        }
        entered.out = out;
        for id in ended {
            entered.forget(id);
        }
    }

    fn on_ready(&self, dlm: &Arc<Dlm>, index: usize, map: Epoch) {
        let mut progress = lock(&self.progress);
        if let Some(ready) = progress.ready.get_mut(index) {
            *ready = map;
        }
        progress.map = progress.map.max(map);
        if progress.is_ready() {
            drop(progress);
            dlm.prove_rebuilt(&self.options.name, map);
            dlm.changed.notify(usize::MAX);
        }
    }

    fn wire_options(&self) -> (u16, Option<Mode>) {
        (u16::try_from(self.options.value_bytes).unwrap_or(0), self.options.holds)
    }

    pub(super) fn view(&self, dlm: &Arc<Dlm>, view: &View, now: Instant) {
        let view = SpaceView::of(view, &self.options.name);
        for index in 0..self.shards.len() {
            self.enter(dlm, index, |e| e.machine.handle(now, Input::View(&view), &mut e.out));
        }
    }

    pub(super) fn receive(&self, dlm: &Arc<Dlm>, from: Identity, frame: Frame, now: Instant) {
        if frame.header.options != self.wire_options() {
            let (bytes, holds) = frame.header.options;
            tracing::warn!(target: "quorate_dlm", node = %from, lockspace = %self.options.name, "other options");
            lock(&self.progress)
                .mismatch
                .get_or_insert_with(|| format!("value blocks of {bytes} bytes, holds {holds:?}"));
            dlm.changed.notify(usize::MAX);
            return;
        }
        let Frame { header, messages } = frame;
        let index = usize::from(header.shard);
        self.enter(dlm, index, |e| {
            for message in messages {
                e.machine.handle(now, Input::Message { from, map: header.map, message }, &mut e.out);
            }
        });
        dlm.deliver(self, index);
    }

    /// Enters every shard in turn, and makes the calls that follow.
    pub(super) fn each(&self, dlm: &Arc<Dlm>, work: impl Fn(&mut Shard, Instant, &mut Vec<Output>)) {
        let now = dlm.now();
        for index in 0..self.shards.len() {
            self.enter(dlm, index, |e| work(&mut e.machine, now, &mut e.out));
            dlm.deliver(self, index);
        }
    }

    /// Adds all that waits at resources mastered here.
    pub(super) fn collect_waits(&self, now: Instant, out: &mut Vec<Wait>) {
        for mutex in &self.shards {
            let mut entered = lock(mutex);
            entered.machine.set_now(now);
            entered.machine.collect_waits(self.hash, out);
        }
    }

    /// An operation of this node is the victim of a deadlock.
    pub(super) fn refuse(&self, dlm: &Arc<Dlm>, id: LockId, op: u32) {
        let index = usize::try_from(id.0 % u64::from(SHARDS)).unwrap_or(0);
        let now = dlm.now();
        self.enter(dlm, index, |e| e.machine.refuse(now, id, op, &mut e.out));
        dlm.deliver(self, index);
    }

    /// When [`Self::tick`] is due.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.shards.iter().filter_map(|s| lock(s).machine.next_deadline()).min()
    }

    pub(super) fn tick(&self, dlm: &Arc<Dlm>, now: Instant) {
        for index in 0..self.shards.len() {
            self.enter(dlm, index, |e| {
                if e.machine.next_deadline().is_some_and(|at| at <= now) {
                    e.machine.handle(now, Input::Tick, &mut e.out);
                }
            });
            dlm.deliver(self, index);
        }
    }

    pub(super) fn deliver(&self, index: usize) {
        if let Some(mutex) = self.shards.get(index) {
            deliver(mutex);
        }
    }

    pub(super) fn deliver_all(&self) {
        self.shards.iter().for_each(deliver);
    }

    /// The same, if the node may answer.
    pub(super) fn deliver_changed(&self, dlm: &Arc<Dlm>) {
        for index in 0..self.shards.len() {
            dlm.deliver(self, index);
        }
    }

    pub(super) fn mismatch(&self) -> Option<String> {
        lock(&self.progress).mismatch.clone()
    }

    /// Whether every shard has done its part of one and the same map.
    pub(super) fn is_ready(&self) -> bool {
        lock(&self.progress).is_ready()
    }

    pub(super) fn is_quiet(&self) -> bool {
        lock(&self.progress).quiet.len() == self.shards.len()
    }

    pub(super) fn join_again(
        self: &Arc<Self>,
        options: &LockspaceOptions,
        dlm: &Arc<Dlm>,
    ) -> Result<Arc<dyn Lockspace>, JoinError> {
        if *options != self.options {
            return Err(JoinError::Mismatch {
                name: options.name.clone(),
                theirs: format!("{:?}", self.options),
                ours: format!("{options:?}"),
            });
        }
        if !self.is_ready() {
            return Err(JoinError::Invalid("the lockspace is being joined already"));
        }
        Ok(Arc::new(Handle::new(self.clone(), dlm)))
    }

    /// Refuses new locks and freezes the shards.
    ///
    /// # Errors
    /// So many locks are left; nothing changed.
    pub(super) fn close(&self, dlm: &Arc<Dlm>) -> Result<(), usize> {
        self.is_closed.store(true, Ordering::Release);
        let locks: usize = self.shards.iter().map(|s| lock(s).machine.lock_count()).sum();
        if locks != 0 {
            self.is_closed.store(false, Ordering::Release);
            return Err(locks);
        }
        let now = dlm.now();
        for index in 0..self.shards.len() {
            self.enter(dlm, index, |e| e.machine.handle(now, Input::Leave, &mut e.out));
        }
        Ok(())
    }

    /// This life of the node is over: every lock is told.
    pub(super) fn stop(&self) {
        self.is_stopped.store(true, Ordering::Release);
        for mutex in &self.shards {
            let mut guard = lock(mutex);
            let entered = &mut *guard;
            // Their numbers are not given back: the machine keeps its locks.
            for (id, callbacks) in entered.callbacks.drain() {
                let Some(callbacks) = callbacks else { continue };
                let call = Call::Done(Completion::Stopped);
                entered.outbox.push(Delivery { callbacks, id: LockId(id), call });
            }
            drop(guard);
            deliver(mutex);
        }
    }

    pub(super) fn dump(&self, now: Instant) -> LockspaceDump {
        let mut dump = LockspaceDump { name: self.options.name.clone(), ..LockspaceDump::default() };
        for mutex in &self.shards {
            let entered = lock(mutex);
            entered.machine.dump(now, &mut dump.resources, &mut dump.elsewhere, &mut dump.recovery);
            dump.members = entered.machine.members();
        }
        dump.resources.sort_by(|a, b| a.name.cmp(&b.name));
        dump.elsewhere.sort_by(|a, b| (&a.name, a.id).cmp(&(&b.name, b.id)));
        dump
    }

    pub(super) fn lock_count(&self) -> usize {
        self.shards.iter().map(|s| lock(s).machine.lock_count()).sum()
    }

    pub(super) fn stats(&self) -> LockspaceStats {
        let mut sum = LockspaceStats::default();
        for mutex in &self.shards {
            sum.add(&lock(mutex).machine.stats);
        }
        sum
    }

    pub(super) fn is_closed(&self) -> bool {
        self.is_closed.load(Ordering::Acquire)
    }

    fn check_open(&self) -> Result<(), LockError> {
        if self.is_stopped.load(Ordering::Acquire) { Err(LockError::Stopped) } else { Ok(()) }
    }
}

impl Progress {
    fn is_ready(&self) -> bool {
        self.map != Epoch(0) && self.ready.iter().all(|r| *r == self.map)
    }
}

impl Entered {
    fn send(&mut self, dlm: &Arc<Dlm>, to: Identity, header: Header, message: &Message) {
        let at = self.corked.iter().position(|(t, _)| *t == to);
        if let Some(at) = at {
            if let Some((_, frame)) = self.corked.get_mut(at)
                && frame.takes(&header)
            {
                return frame.push(message);
            }
            let (_, full) = self.corked.remove(at);
            dlm.outgoing.send(to, full.finish());
        }
        let mut frame = FrameWriter::new(header);
        frame.push(message);
        self.corked.push((to, frame));
    }

    fn uncork(&mut self, dlm: &Arc<Dlm>) {
        for (to, frame) in self.corked.drain(..) {
            dlm.outgoing.send(to, frame.finish());
        }
    }

    /// The lock is gone, and its last call is in the outbox.
    fn forget(&mut self, id: LockId) {
        if self.callbacks.remove(&id.0).is_some() {
            self.numbers.give_back(id);
        }
    }

    fn call(&mut self, id: LockId, call: Call) {
        if let Some(Some(callbacks)) = self.callbacks.find(&id.0) {
            self.outbox.push(Delivery { callbacks: callbacks.clone(), id, call });
        }
    }
}
