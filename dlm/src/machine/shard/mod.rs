//! A shard of a lockspace on one node: the directory of its buckets, the resources this node masters, and this node's
//! locks. Driven by views and messages; a shard speaks only with the same shard of other nodes.
//!
//! ```text
//!  local call ──▶ local ──▶ master here? ──yes──▶ queues ──▶ Output::Done        (nothing is sent)
//!                   │no: Operate to the master; unknown: Lookup at the bucket's owner
//!  Message ────▶ directory │ master │ recovery
//!  SpaceView ──▶ recovery: a new bucket map, registrations, holds
//! ```
//! A map change (somebody attached, left or failed) makes every member register with every other. What a bucket's owner
//! must know before it answers again is known when all have; names whose master lives go on meanwhile (R13).

/// The surroundings of a resource, while the shard's other fields are in use.
macro_rules! context {
    ($shard:expr) => {
        $crate::machine::Context {
            epoch: $shard.view.epoch,
            fenced: &$shard.passable,
            value_bytes: $shard.config.value_bytes,
            now: $shard.now,
        }
    };
}

mod directory;
mod dump;
mod fast;
mod leave;
mod local;
mod master;
mod moves;
mod named;
mod owners;
mod posix;
mod recovery;
mod waits;
mod withdraw;

use directory::Bucket;
use local::LocalLock;
use moves::Moves;
use named::Names;
use owners::Owners;
use recovery::Registration;
use waits::Waits;
use withdraw::Withdrawals;

use super::{Context, Event};
use crate::bug::Bug;
use crate::slots::LockTable;
use crate::stats::LockspaceStats;
use crate::wire::{Generation, Message, Numbered, Relock};
use crate::{Completion, LockId, LockName, Mode, MoveOptions};
use core::time::Duration;
use quorate_membership::{Epoch, Identity, Instant, ResourceId, ResourceKind, View};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// How long a master keeps a resource that nobody has or wants, because the same user often comes back.
pub(crate) const TOSS: Duration = Duration::from_secs(1);

/// A failed life that owes this lockspace something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Debtor {
    /// It cannot do harm any more.
    pub(crate) fenced: bool,
    /// Every member has rebuilt its part.
    pub(crate) rebuilt: bool,
}

/// A view as one lockspace sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct SpaceView {
    pub(crate) epoch: Epoch,
    /// Who is attached.
    pub(crate) members: BTreeSet<Identity>,
    /// Failed lives whose debt has an item for the lockspace.
    pub(crate) debtors: BTreeMap<Identity, Debtor>,
}

impl SpaceView {
    /// What `view` says of the lockspace `name`.
    pub(crate) fn of(view: &View, name: &str) -> Self {
        let resource = ResourceId::new(ResourceKind::Lockspace, name);
        Self {
            epoch: view.epoch,
            members: view.attached(&resource).map(|a| a.owner).collect(),
            debtors: view
                .owing(&resource)
                .map(|(who, item)| (who, Debtor { fenced: item.fenced, rebuilt: item.rebuilt }))
                .collect(),
        }
    }
}

/// What comes from outside, local calls apart.
#[derive(Debug)]
pub(crate) enum Input<'a> {
    /// From membership: the next view.
    View(&'a SpaceView),
    /// From a session: a message of `from`, sent under its bucket map `map`.
    Message { from: Identity, map: Epoch, message: Message },
    /// From the driver: freeze, this node leaves. No lock of its own is left.
    Leave,
    /// The deadline is over; at any other time it does no harm.
    Tick,
}

/// What the driver must do, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Output {
    /// Send it on the session to `to`.
    Send { to: Identity, message: Message },
    /// Tell the lock's owner.
    Done { id: LockId, completion: Completion },
    /// Tell the lock's owner.
    Blocking { id: LockId, mode: Mode },
    /// Somebody has waited long at a resource mastered here: feed it to the search.
    Suspect,
    /// The lock's owner has ended: it is told nothing any more.
    Orphaned { id: LockId },
    /// This shard has done its part of the bucket map `map`; when all shards have, propose `Prove(Rebuilt)`.
    Ready { map: Epoch },
    /// The freeze is known to all: when all shards are, propose `Detach`.
    Quiet,
}

/// How a shard is made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ShardConfig {
    pub(crate) me: Identity,
    pub(crate) index: u16,
    pub(crate) value_bytes: usize,
    /// The weakest mode that becomes a hold (R14); `None`: there are no holds.
    pub(crate) weakest_hold: Option<Mode>,
    /// When mastery moves away (R15).
    pub(crate) moves: MoveOptions,
}

/// The machine; see the module.
#[derive(Clone, Debug)]
pub(crate) struct Shard {
    config: ShardConfig,
    bug: Option<Bug>,
    now: Instant,
    view: SpaceView,
    /// The epoch at which the members changed last: the name of the bucket map.
    map: Epoch,
    /// Failed lives that RECOVERY requests pass by.
    passable: BTreeSet<Identity>,
    buckets: BTreeMap<u16, Bucket>,
    names: Names,
    locks: LockTable<LocalLock>,
    lock_count: usize,
    /// Operations for names whose master we may be about to become.
    parked: BTreeMap<LockName, Vec<(Identity, Generation, LockId, Numbered)>>,
    /// Who has registered for this map, and the locks they told.
    registered: BTreeSet<Identity>,
    relocks: Vec<(Identity, Relock)>,
    is_ready: bool,
    leaving: Option<BTreeSet<Identity>>,
    unused: VecDeque<(Instant, LockName)>,
    /// Names on which this node has no locks any more, but still knows their masters.
    idle: VecDeque<(Instant, LockName)>,
    /// Locks that were released at a node which was not their master any more.
    released: BTreeMap<LockName, Vec<LockId>>,
    owners: Owners,
    withdrawals: Withdrawals,
    waits: Waits,
    moves: Moves,
    /// Messages to ourselves; empty between calls.
    inbox: VecDeque<Message>,
    events: Vec<Event>,
    pub(crate) stats: LockspaceStats,
}

impl Shard {
    pub(crate) fn new(config: ShardConfig) -> Self {
        Self {
            config,
            bug: None,
            now: Instant::default(),
            view: SpaceView::default(),
            map: Epoch::default(),
            passable: BTreeSet::new(),
            buckets: BTreeMap::new(),
            names: Names::new(),
            locks: LockTable::default(),
            lock_count: 0,
            parked: BTreeMap::new(),
            registered: BTreeSet::new(),
            relocks: Vec::new(),
            is_ready: false,
            leaving: None,
            unused: VecDeque::new(),
            idle: VecDeque::new(),
            released: BTreeMap::new(),
            owners: Owners::default(),
            withdrawals: Withdrawals::default(),
            waits: Waits::default(),
            moves: Moves::default(),
            inbox: VecDeque::new(),
            events: Vec::new(),
            stats: LockspaceStats::default(),
        }
    }

    /// The only way in, local calls apart. All effects are in `out` when it returns.
    pub(crate) fn handle(&mut self, now: Instant, input: Input<'_>, out: &mut Vec<Output>) {
        self.now = now;
        match input {
            Input::View(view) => self.on_view(view, out),
            Input::Message { from, map, message } => {
                // Only members are heard: what a failed one said last is in what the survivors register.
                if self.is_member() && (self.view.members.contains(&from) || self.has_bug(Bug::HearTheDead)) {
                    self.on_message(from, map, message, out);
                }
            }
            Input::Leave => self.on_leave(out),
            Input::Tick => {
                self.on_tick(out);
                self.on_timeouts(out);
                self.on_old_waits(out);
                self.on_slow_moves(out);
            }
        }
        self.drain(out);
    }

    /// When [`Input::Tick`] is due.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        let unused = self.unused.front().map(|(at, _)| *at + TOSS);
        let idle = self.idle.front().map(|(at, _)| *at + TOSS);
        let others = self.withdrawals.next_deadline().into_iter().chain(self.waits.next_deadline());
        let others = others.chain(self.moves.next_deadline());
        unused.into_iter().chain(idle).chain(others).min()
    }

    /// The time, for looking at waits.
    pub(crate) fn set_now(&mut self, now: Instant) {
        self.now = now;
    }

    /// The time of the last input.
    #[cfg(any(test, feature = "sim"))]
    pub(crate) fn now(&self) -> Instant {
        self.now
    }

    /// Writes everything that decides what it does next, in an order that depends on nothing else.
    #[cfg(feature = "model")]
    pub(crate) fn fingerprint(&self, out: &mut impl core::fmt::Write) {
        // Writing into a hasher cannot fail.
        let _ = write!(out, "{:?}{:?}{:?}{:?}", self.view, self.map, self.passable, self.buckets);
        let masters: BTreeMap<_, _> = self.names.all_mastered().collect();
        let names: BTreeMap<_, _> = self.names.all_local().collect();
        let ids = names.values().flat_map(|n| n.locks.iter().copied());
        let locks: BTreeMap<LockId, _> = ids.filter_map(|id| Some((id, self.locks.find(&id.0)?))).collect();
        let _ = write!(out, "{masters:?}{names:?}{locks:?}{:?}{:?}", self.parked, self.registered);
        let _ = write!(out, "{:?}{:?}{:?}{:?}", self.relocks, self.is_ready, self.leaving, self.unused);
        let _ = write!(out, "{:?}{:?}{:?}", self.owners, self.withdrawals, self.moves);
    }

    /// The names it masters and that somebody has or wants.
    #[cfg(feature = "model")]
    pub(crate) fn mastered(&self) -> impl Iterator<Item = &LockName> {
        self.names.all_mastered().filter(|(_, m)| !m.resource.is_unused()).map(|(name, _)| name)
    }

    /// The bucket map this shard works under.
    pub(crate) fn map(&self) -> Epoch {
        self.map
    }

    /// Whether this node has or wants that lock.
    pub(crate) fn has(&self, id: LockId) -> bool {
        self.locks.find(&id.0).is_some()
    }

    /// Who is attached to the lockspace.
    pub(crate) fn members(&self) -> Vec<Identity> {
        self.view.members.iter().copied().collect()
    }

    /// How many locks this node has or wants here.
    pub(crate) fn lock_count(&self) -> usize {
        self.lock_count
    }

    /// Makes a deliberate mistake, to show that the checks see it.
    #[cfg(any(test, feature = "sim"))]
    pub(crate) fn set_bug(&mut self, bug: Option<Bug>) {
        self.bug = bug;
    }

    fn has_bug(&self, bug: Bug) -> bool {
        cfg!(any(test, feature = "sim")) && self.bug == Some(bug)
    }

    fn is_member(&self) -> bool {
        self.view.members.contains(&self.config.me)
    }

    fn on_message(&mut self, from: Identity, map: Epoch, message: Message, out: &mut Vec<Output>) {
        match message {
            Message::Lookup { name, stale } => self.on_lookup(from, map, name, stale, out),
            Message::LookupReply { name, master, generation, floor, assumed } => {
                self.on_lookup_reply(map, name, (master, generation), floor, assumed, out);
            }
            Message::Remove { name, generation, sequence } => {
                self.on_remove(from, &name, generation, sequence, out);
            }
            Message::Operate { name, generation, id, numbered } => {
                self.on_operate(from, name, generation, id, numbered, out);
            }
            Message::Release { name, generation, id } => self.on_release(from, name, generation, id, out),
            Message::NotReleased { name, generation, id } => {
                self.on_not_released(from, name, generation, id, out);
            }
            Message::Moved { name, generation } => self.on_moved(from, &name, generation, out),
            Message::Done { id, op, completion, value_sequence } => {
                if self.is_from_master(from, id) || self.has_bug(Bug::HearTheDead) {
                    self.apply_done(id, op, completion, value_sequence, out);
                }
            }
            Message::Blocking { id, mode } => {
                if self.is_from_master(from, id) {
                    out.push(Output::Blocking { id, mode });
                }
            }
            Message::Register { mastered, locks, buckets, last } => {
                let registration = Registration { mastered, locks, buckets };
                self.on_register(from, map, registration, last, out);
            }
            Message::Remastered { name, generation, map } => {
                self.on_remastered(from, &name, generation, map, out);
            }
            Message::Moving { name, generation, to, attempt } => {
                self.on_moving(from, name, (generation, to), attempt, out);
            }
            Message::Known { name, attempt, agrees } => self.on_known(from, &name, attempt, agrees, out),
            Message::Thawed { name, generation } => self.on_thawed(from, name, generation, out),
            Message::Move { name, generation, resource, released } => {
                self.on_move(from, name, generation, *resource, released, out);
            }
            Message::Taken { name, generation } => self.on_taken(from, name, generation, out),
            Message::TakenAck { name, generation } => self.on_taken_ack(from, &name, generation, out),
            Message::Claim { name, generation, sequence } => {
                self.on_claim(from, map, name, (generation, sequence), out);
            }
            Message::Claimed { name, generation } => self.on_claimed(&name, generation, out),
            Message::MoveOver { name, generation } => self.on_move_over(from, &name, generation),
            Message::HeirLost { name, generation, sequence } => {
                self.on_heir_lost(from, map, name, (generation, sequence));
            }
            Message::Elsewhere { name } => self.on_elsewhere(&name, out),
            Message::Leaving { values, last } => self.on_leaving(from, values, last, out),
            Message::LeavingAck => self.on_leaving_ack(from, out),
            Message::Owner { name, id, owner } => self.on_owner(from, &name, id, owner),
            Message::Purge { pid } => self.purge_mine(pid, out),
        }
    }

    /// Sends, or puts into our own inbox.
    fn send(&mut self, to: Identity, message: Message, out: &mut Vec<Output>) {
        if to == self.config.me {
            self.inbox.push_back(message);
        } else if self.view.members.contains(&to) {
            out.push(Output::Send { to, message });
        }
    }

    fn drain(&mut self, out: &mut Vec<Output>) {
        while let Some(message) = self.inbox.pop_front() {
            self.on_message(self.config.me, self.map, message, out);
        }
    }

    fn context(&self) -> Context<'_> {
        context!(self)
    }

    fn owner_of(&self, name: &LockName) -> Option<Identity> {
        super::map::owner_of(super::map::bucket_of(name.as_bytes()), &self.view.members)
    }
}
