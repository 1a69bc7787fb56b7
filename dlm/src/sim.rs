//! What a simulation needs of the lock manager: the production machines of one node in one lockspace, without a driver.
//!
//! The simulator brings views, messages and time, and carries out the [`Effect`]s in order.

use crate::machine::deadlock::{Search, SearchInput, SearchMessage, SearchOutput};
use crate::machine::map::{SHARDS, bucket_of, shard_of};
use crate::machine::shard::{Input, Output, Shard, ShardConfig, SpaceView};
use crate::table::name_hash;
use crate::wire::{Frame, Header};
use crate::{
    Completion, ConvertRequest, ElsewhereDump, LockError, LockId, LockName, LockRequest, LockspaceDump,
    LockspaceOptions, Mode, Range, ResourceDump, UnlockRequest,
};
use quorate_membership::{Epoch, Identity, Instant, NodeId, View};

pub mod history;
#[cfg(feature = "model")]
pub mod model;

pub use crate::bug::Bug;

/// What the simulator must do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Deliver on the session to `to`.
    Send {
        /// To whom.
        to: Identity,
        /// The frame.
        bytes: Vec<u8>,
    },
    /// An operation ended.
    Done {
        /// Which lock.
        id: LockId,
        /// How.
        completion: Completion,
    },
    /// A lock blocks somebody.
    Blocking {
        /// Which lock.
        id: LockId,
        /// The mode wanted.
        mode: Mode,
    },
    /// Propose `Prove(Rebuilt)` of this epoch for every debtor whose locks are not rebuilt.
    Rebuilt {
        /// The epoch.
        epoch: Epoch,
    },
    /// Propose `Detach`.
    Quiet,
    /// The search found a deadlock in which every wait has NODLCKWT: all wait on.
    Undecided {
        /// The locks that wait, in order.
        waits: Vec<(Identity, LockId)>,
    },
}

/// A node's part of one lockspace.
#[derive(Debug)]
pub struct Node {
    me: Identity,
    options: LockspaceOptions,
    shards: Vec<Shard>,
    ready: Vec<Epoch>,
    quiet: usize,
    next_id: u64,
    search: Search,
    suspects: bool,
}

impl Node {
    /// A node that knows no view yet.
    #[must_use]
    pub fn new(me: Identity, options: &LockspaceOptions, bug: Option<Bug>) -> Self {
        let shards = (0..SHARDS)
            .map(|index| {
                let mut shard = Shard::new(ShardConfig {
                    me,
                    index,
                    value_bytes: options.value_bytes,
                    weakest_hold: options.holds,
                    moves: options.moves,
                });
                shard.set_bug(bug);
                shard
            })
            .collect();
        let ready = vec![Epoch(0); usize::from(SHARDS)];
        Self {
            me,
            options: options.clone(),
            shards,
            ready,
            quiet: 0,
            next_id: 1,
            search: Search::new(me, bug),
            suspects: false,
        }
    }

    /// The next view.
    pub fn view(&mut self, now: Instant, view: &View) -> Vec<Effect> {
        let input = SearchInput::of(view);
        let view = SpaceView::of(view, &self.options.name);
        let mut effects = self.each(now, |shard, out| shard.handle(now, Input::View(&view), out));
        self.search(now, input, &mut effects);
        effects
    }

    /// A frame of `from`. One that does not decode is dropped.
    pub fn deliver(&mut self, now: Instant, from: Identity, bytes: &[u8]) -> Vec<Effect> {
        if let Some(message) = SearchMessage::decode(bytes) {
            let mut effects = Vec::new();
            self.search(now, SearchInput::Message { from, message }, &mut effects);
            return effects;
        }
        let Ok(frame) = Frame::decode(bytes) else { return Vec::new() };
        let index = usize::from(frame.header.shard);
        let Some(shard) = self.shards.get_mut(index) else { return Vec::new() };
        let mut out = Vec::new();
        for message in frame.messages {
            shard.handle(now, Input::Message { from, map: frame.header.map, message }, &mut out);
        }
        self.effects(index, out)
    }

    /// The deadline is over.
    pub fn tick(&mut self, now: Instant) -> Vec<Effect> {
        let mut effects = self.each(now, |shard, out| shard.handle(now, Input::Tick, out));
        let input =
            if core::mem::take(&mut self.suspects) { SearchInput::Suspect } else { SearchInput::Tick };
        self.search(now, input, &mut effects);
        effects
    }

    fn search(&mut self, now: Instant, input: SearchInput, effects: &mut Vec<Effect>) {
        let space = name_hash(self.options.name.as_bytes());
        let (mut inputs, mut out) = (vec![input], Vec::new());
        while let Some(input) = inputs.pop() {
            self.search.handle(now, input, &mut out);
            for output in out.drain(..) {
                match output {
                    SearchOutput::Send { to, message } => {
                        effects.push(Effect::Send { to, bytes: message.encode() });
                    }
                    SearchOutput::Collect { to, round } => {
                        let mut waits = Vec::new();
                        for shard in &mut self.shards {
                            shard.set_now(now);
                            shard.collect_waits(space, &mut waits);
                        }
                        if to == self.me {
                            inputs.push(SearchInput::Collected { round, waits });
                            continue;
                        }
                        let pieces = SearchMessage::pieces(round, waits).into_iter();
                        effects.extend(pieces.map(|m| Effect::Send { to, bytes: m.encode() }));
                    }
                    SearchOutput::Refuse { key } => {
                        let refuse = |shard: &mut Shard, out: &mut Vec<Output>| {
                            shard.refuse(now, key.id, key.op, out);
                            Ok(())
                        };
                        effects.extend(self.with(key.id, refuse).1);
                    }
                    SearchOutput::Undecided { cycle } => effects
                        .push(Effect::Undecided { waits: cycle.iter().map(|k| (k.node, k.id)).collect() }),
                }
            }
        }
    }

    /// When [`Self::tick`] is due.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Instant> {
        self.shards.iter().filter_map(Shard::next_deadline).chain(self.search.next_deadline()).min()
    }

    /// Freezes the node; it has no locks.
    pub fn leave(&mut self, now: Instant) -> Vec<Effect> {
        self.each(now, |shard, out| shard.handle(now, Input::Leave, out))
    }

    /// A new lock.
    ///
    /// # Errors
    /// See [`LockError`].
    pub fn request(
        &mut self,
        now: Instant,
        request: LockRequest,
    ) -> (Result<LockId, LockError>, Vec<Effect>) {
        let index = shard_of(bucket_of(request.name.as_bytes()));
        let id = LockId(self.next_id * u64::from(SHARDS) + u64::from(index));
        self.next_id += if request.flags.has(crate::Flags::POSIX) { 2 } else { 1 };
        let (result, effects) = self.with(id, |shard, out| shard.request(now, id, request, out));
        (result, effects)
    }

    /// Another mode.
    ///
    /// # Errors
    /// See [`LockError`].
    pub fn convert(
        &mut self,
        now: Instant,
        id: LockId,
        request: ConvertRequest,
    ) -> (Result<(), LockError>, Vec<Effect>) {
        self.with(id, |shard, out| shard.convert(now, id, request, out))
    }

    /// The end of a lock.
    ///
    /// # Errors
    /// See [`LockError`].
    pub fn unlock(
        &mut self,
        now: Instant,
        id: LockId,
        request: UnlockRequest,
    ) -> (Result<(), LockError>, Vec<Effect>) {
        self.with(id, |shard, out| shard.unlock(now, id, request, out))
    }

    /// Withdraws what a lock waits for.
    ///
    /// # Errors
    /// See [`LockError`].
    pub fn cancel(&mut self, now: Instant, id: LockId) -> (Result<(), LockError>, Vec<Effect>) {
        self.with(id, |shard, out| shard.cancel(now, id, out))
    }

    /// An owner of this node has ended.
    pub fn close_owner(&mut self, now: Instant, owner: u64) -> Vec<Effect> {
        self.each(now, |shard, out| shard.close_owner(now, owner, out))
    }

    /// Ends orphans of a node: of one process, or all with 0.
    pub fn purge(&mut self, now: Instant, node: NodeId, pid: u32) -> Vec<Effect> {
        self.each(now, |shard, out| shard.purge(now, (node, pid), out))
    }

    /// Ends every lock of this node, as if all its owners had ended.
    pub fn end_all(&mut self, now: Instant) -> Vec<Effect> {
        self.each(now, |shard, out| shard.end_all(now, out))
    }

    /// Modes in which locks of this node may be used now: what they are giving up does not count.
    #[must_use]
    pub fn usable(&self) -> Vec<(LockId, LockName, Mode, Range)> {
        self.shards.iter().flat_map(Shard::usable).collect()
    }

    /// Whether no lock of this node, wanted or had, is left.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.shards.iter().all(Shard::is_idle)
    }

    /// Whether every shard has done its part of the newest bucket map.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.shards.iter().zip(&self.ready).all(|(s, ready)| s.map() == *ready)
    }

    /// How many resources have moved here (R15).
    #[must_use]
    pub fn moved_in(&self) -> u64 {
        self.shards.iter().map(|s| s.stats.moved_in).sum()
    }

    /// What there is.
    #[must_use]
    pub fn dump(&self) -> LockspaceDump {
        let (mut resources, mut elsewhere, mut recovery): (Vec<ResourceDump>, Vec<ElsewhereDump>, Vec<_>) =
            Default::default();
        for shard in &self.shards {
            shard.dump(shard.now(), &mut resources, &mut elsewhere, &mut recovery);
        }
        let name = self.options.name.clone();
        LockspaceDump { name, resources, elsewhere, recovery, members: Vec::new() }
    }

    fn with<T>(
        &mut self,
        id: LockId,
        work: impl FnOnce(&mut Shard, &mut Vec<Output>) -> Result<T, LockError>,
    ) -> (Result<T, LockError>, Vec<Effect>) {
        let index = usize::try_from(id.0 % u64::from(SHARDS)).unwrap_or(0);
        let mut out = Vec::new();
        let result = match self.shards.get_mut(index) {
            Some(shard) => work(shard, &mut out),
            None => Err(LockError::NotFound),
        };
        (result, self.effects(index, out))
    }

    fn each(&mut self, _now: Instant, mut work: impl FnMut(&mut Shard, &mut Vec<Output>)) -> Vec<Effect> {
        let mut effects = Vec::new();
        for index in 0..self.shards.len() {
            let mut out = Vec::new();
            if let Some(shard) = self.shards.get_mut(index) {
                work(shard, &mut out);
            }
            effects.extend(self.effects(index, out));
        }
        effects
    }

    fn effects(&mut self, index: usize, out: Vec<Output>) -> Vec<Effect> {
        let mut effects = Vec::with_capacity(out.len());
        let map = self.shards.get(index).map_or(Epoch(0), Shard::map);
        for output in out {
            effects.push(match output {
                Output::Send { to, message } => {
                    let options = (u16::try_from(self.options.value_bytes).unwrap_or(0), self.options.holds);
                    let space = name_hash(self.options.name.as_bytes());
                    let shard = u8::try_from(index).unwrap_or(0);
                    Effect::Send {
                        to,
                        bytes: Frame {
                            header: Header { space, shard, map, options },
                            messages: vec![message],
                        }
                        .encode(),
                    }
                }
                Output::Suspect => {
                    self.suspects = true;
                    continue;
                }
                // Its user is gone.
                Output::Orphaned { .. } => continue,
                Output::Done { id, completion } => Effect::Done { id, completion },
                Output::Blocking { id, mode } => Effect::Blocking { id, mode },
                Output::Ready { map } => {
                    if let Some(ready) = self.ready.get_mut(index) {
                        *ready = map;
                    }
                    if !self.is_ready() {
                        continue;
                    }
                    Effect::Rebuilt { epoch: map }
                }
                Output::Quiet => {
                    self.quiet += 1;
                    if self.quiet != self.shards.len() {
                        continue;
                    }
                    Effect::Quiet
                }
            });
        }
        effects
    }

    /// Who this is.
    #[must_use]
    pub fn me(&self) -> Identity {
        self.me
    }
}
