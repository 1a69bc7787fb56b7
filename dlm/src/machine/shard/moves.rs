//! Mastery moves to the node that uses a resource (R15).
//!
//! ```text
//!  master                     users, the heir among them          heir                    directory
//!    │ Moving ─────────────────────▶ │ freeze the name               │                        │
//!    │ ◀───────────────────── Known ─│                               │                        │
//!    │ Move: the whole resource ───────────────────────────────────▶ │ Claim ───────────────▶ │ highest generation wins
//!    │ ◀──────────────────────────── Taken ───────────────────────── │ ◀───────────── Claimed │
//!    │ TakenAck, users too ────────────────────────────────────────▶ │                        │
//!    │ ◀───────────────────────── MoveOver ───────────────────────── │                        │
//! ```
//! **Frozen first.** The resource leaves only when every user knows that it may, and whereto. So whoever of the two fails,
//! each user knows that its master may be gone, and registers its locks as after any failure of a master; and nothing that
//! the old master answered is under way any more. Until then the old master can take it back ([`Message::Thawed`]).
//!
//! **One master.** From `Move` on the resource is the heir's: the old one grants nothing, sends askers away with its old
//! generation, and the directory lets those wait until it has heard of a higher one. If the heir fails before `MoveOver`,
//! the old master does not know what it granted: it tells the directory (`HeirLost`), and the name is rebuilt from what
//! all users register.
//!
//! **Nothing twice.** Users tell the heir again what has no answer, before `TakenAck`. What was in a queue when the resource
//! was frozen came with it, and is known by its number. A master that takes the resource back has got what was sent to it.

use super::local::{LocalName, Place};
use super::master::Mastered;
use super::{Output, Shard};
use crate::bug::Bug;
use crate::machine::{Event, LockKey, MovedResource, Resource, map};
use crate::wire::{Generation, ITEMS_MAX, Message, Numbered, Operation};
use crate::{LockId, LockName};
use core::time::Duration;
use quorate_membership::{Epoch, Identity, Instant, NodeId};
use std::collections::{BTreeMap, BTreeSet};

/// How long a master waits for all users to know. After that it keeps the resource and lets it rest ([`MoveOptions`](crate::MoveOptions)).
const PATIENCE: Duration = Duration::from_millis(250);

/// Who used a resource last, and how often in a row. Invariant: 0 of nobody.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Uses {
    by: u32,
    streak: u16,
}

impl Uses {
    /// The master itself uses it.
    pub(super) fn reset(&mut self) {
        self.streak = 0;
    }

    fn count(&mut self, NodeId(by): NodeId) -> u16 {
        self.streak = if self.by == by { self.streak.saturating_add(1) } else { 1 };
        self.by = by;
        self.streak
    }
}

/// What came for a frozen resource.
#[derive(Clone, Debug)]
pub(super) enum Late {
    Operate(Numbered),
    Release,
}

/// A resource that is to leave and that not all users know of yet.
#[derive(Clone, Debug)]
struct Leaving {
    mastered: Mastered,
    to: Identity,
    attempt: u64,
    /// Who was told.
    told: BTreeSet<Identity>,
    /// Who has not answered.
    awaited: BTreeSet<Identity>,
    refused: bool,
    /// What came since, and whether its sender tells it again if the resource leaves.
    late: Vec<(Identity, LockId, Late, bool)>,
    until: Instant,
}

/// One that has left, while not everybody knows.
#[derive(Clone, Debug)]
struct Sent {
    to: Identity,
    generation: Generation,
    next: Generation,
    sequence: u64,
    /// The heir has said that it has it.
    taken: bool,
}

/// One that came, while not everybody knows.
#[derive(Clone, Debug)]
struct Claimed {
    generation: Generation,
    /// Users, and the master before, that have not told yet what has no answer.
    unaware: BTreeSet<Identity>,
    /// What came in the queues: told again, it is not taken again.
    came: BTreeMap<LockKey, u32>,
    /// The master before, to be told in the end.
    from: Identity,
    in_directory: bool,
}

/// Why a name is frozen here.
#[derive(Clone, Copy, Debug)]
struct Frozen {
    from: Identity,
    generation: Generation,
    to: Identity,
}

/// All moves of a shard that are under way.
#[derive(Clone, Debug, Default)]
pub(super) struct Moves {
    leaving: BTreeMap<LockName, Leaving>,
    sent: BTreeMap<LockName, Sent>,
    claims: BTreeMap<LockName, Claimed>,
    /// Names with [`Place::Frozen`].
    frozen: BTreeMap<LockName, Frozen>,
    /// Resources that this node has agreed to take, and from whom.
    expected: BTreeMap<LockName, Identity>,
    /// Names whose heir failed, until its debt is closed.
    lost: BTreeMap<LockName, (Identity, Generation, u64)>,
    /// What came here, or could not leave, a short time ago: when it may leave.
    resting: BTreeMap<LockName, Instant>,
    /// Locks that got another owner while their name was frozen.
    owners: BTreeSet<(LockName, LockId)>,
    attempts: u64,
    /// Nothing is frozen meanwhile.
    is_thawing: bool,
    /// The node leaves once what it agreed to take is there.
    pub(super) leaves_after: bool,
}

impl Moves {
    /// Who freezes the name.
    pub(super) fn giver_of(&self, name: &LockName) -> Option<Identity> {
        self.frozen.get(name).map(|f| f.from)
    }

    pub(super) fn is_leaving(&self, name: &LockName) -> bool {
        !self.leaving.is_empty() && self.leaving.contains_key(name)
    }

    /// The mastership that this node had and that the directory may name still.
    pub(super) fn left(&self, name: &LockName) -> Option<Generation> {
        if self.sent.is_empty() { None } else { self.sent.get(name).map(|s| s.generation) }
    }

    /// This node's own mastership of a name whose resource is under way to another.
    pub(super) fn entries(&self) -> impl Iterator<Item = (&LockName, Generation, u64)> {
        let leaving =
            self.leaving.iter().map(|(n, l)| (n, l.mastered.generation, l.mastered.resource.sequence()));
        let sent = self.sent.iter().filter(|(_, s)| !s.taken).map(|(n, s)| (n, s.generation, s.sequence));
        leaving.chain(sent)
    }

    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.leaving.values().map(|l| l.until).chain(self.resting.values().copied()).min()
    }

    /// Resources that have not left yet.
    pub(super) fn resources(&self) -> impl Iterator<Item = (&LockName, &Resource)> {
        self.leaving.iter().map(|(name, l)| (name, &l.mastered.resource))
    }

    #[cfg(any(test, feature = "sim"))]
    pub(super) fn is_idle(&self) -> bool {
        self.leaving.is_empty()
            && self.sent.is_empty()
            && self.claims.is_empty()
            && self.frozen.is_empty()
            && self.expected.is_empty()
            && self.owners.is_empty()
    }
}

impl Shard {
    /// A node has asked for a lock or a mode on a resource mastered here: it may become the master.
    pub(super) fn note_user(&mut self, name: &LockName, by: Identity, out: &mut Vec<Output>) {
        let after = self.config.moves.after;
        if after == 0 || self.moves.is_thawing {
            return;
        }
        let Some(mastered) = self.names.mastered_mut(name) else { return };
        if mastered.uses.count(by.node) < after {
            return;
        }
        self.freeze(name, by, out);
    }

    /// Tells all users that a resource is to move.
    fn freeze(&mut self, name: &LockName, to: Identity, out: &mut Vec<Output>) {
        let me = self.config.me;
        let is_calm = self.is_ready && self.leaving.is_none() && to != me && self.view.members.contains(&to);
        let is_here = self.names.local(name).is_none_or(|n| n.place() == Place::Here);
        let rests = self.moves.claims.contains_key(name) || self.moves.resting.contains_key(name);
        let is_fit = |m: &Mastered| m.resource.is_movable() && m.generation.moved().is_some();
        if !is_calm || !is_here || rests || !self.names.mastered(name).is_some_and(is_fit) {
            return;
        }
        let Some(mut mastered) = self.take_mastered(name) else { return };
        mastered.set_unused(None);
        (mastered.is_queued, mastered.is_listed) = (false, false);
        let generation = mastered.generation;
        if let Some(local) = self.names.local_mut(name) {
            local.set_place(Place::Frozen);
        } else {
            self.names.put_local(name.clone(), LocalName::at(Place::Frozen));
        }
        self.note_waits(name);
        self.moves.frozen.insert(name.clone(), Frozen { from: me, generation, to });
        let mut told: BTreeSet<Identity> = mastered.resource.locks().map(|l| l.key.node).collect();
        told.remove(&me);
        told.insert(to);
        self.moves.attempts += 1;
        let attempt = self.moves.attempts;
        for user in &told {
            self.send(*user, Message::Moving { name: name.clone(), generation, to, attempt }, out);
        }
        let until = self.now + PATIENCE;
        let awaited = told.clone();
        let leaving =
            Leaving { mastered, to, attempt, told, awaited, refused: false, late: Vec::new(), until };
        self.moves.leaving.insert(name.clone(), leaving);
        if self.has_bug(Bug::MoveUnannounced) {
            self.give(name, out);
        }
    }

    /// A user hears that a resource is to move.
    pub(super) fn on_moving(
        &mut self,
        from: Identity,
        name: LockName,
        (generation, to): (Generation, Identity),
        attempt: u64,
        out: &mut Vec<Output>,
    ) {
        let is_mine = to == self.config.me;
        let agrees = !is_mine || self.leaving.is_none() && !self.moves.leaves_after;
        if is_mine && agrees {
            self.moves.expected.insert(name.clone(), from);
        }
        if let Some(local) = self.names.local_mut(&name)
            && local.place() == (Place::At { master: from, generation })
        {
            local.set_place(Place::Frozen);
            self.moves.frozen.insert(name.clone(), Frozen { from, generation, to });
        }
        self.send(from, Message::Known { name, attempt, agrees }, out);
    }

    pub(super) fn on_known(
        &mut self,
        from: Identity,
        name: &LockName,
        attempt: u64,
        agrees: bool,
        out: &mut Vec<Output>,
    ) {
        let Some(leaving) = self.moves.leaving.get_mut(name).filter(|l| l.attempt == attempt) else { return };
        leaving.refused |= !agrees;
        if leaving.awaited.remove(&from) && leaving.awaited.is_empty() {
            if leaving.refused {
                self.thaw(name, out);
            } else {
                self.give(name, out);
            }
        }
    }

    /// A name has found another master.
    pub(super) fn forget_frozen(&mut self, name: &LockName) {
        if !self.moves.frozen.is_empty() {
            self.moves.frozen.remove(name);
        }
    }

    /// Whether an operation came with the resource, and is told again.
    pub(super) fn is_repeated(&self, name: &LockName, key: LockKey, op: u32) -> bool {
        !self.moves.claims.is_empty()
            && self.moves.claims.get(name).is_some_and(|c| c.came.get(&key) == Some(&op))
            && !self.has_bug(Bug::MoveTakesTwice)
    }

    /// Whether this node waits to hear who of two masters has the name.
    pub(super) fn is_frozen(&self, name: &LockName) -> bool {
        self.moves.frozen.contains_key(name)
    }

    /// A lock on a resource that is to leave belongs to somebody else now.
    pub(super) fn leaving_mut(&mut self, name: &LockName) -> Option<&mut Resource> {
        self.moves.leaving.get_mut(name).map(|l| &mut l.mastered.resource)
    }

    /// An operation on a resource that is to leave: it waits here.
    pub(super) fn keep_late(&mut self, from: Identity, name: &LockName, id: LockId, late: Late) {
        if let Some(leaving) = self.moves.leaving.get_mut(name) {
            // Who has answered is not frozen by us, if it sends anything: it tells it once.
            let is_told_again = leaving.awaited.contains(&from);
            leaving.late.push((from, id, late, is_told_again));
        }
    }

    /// The resource does not leave.
    fn thaw(&mut self, name: &LockName, out: &mut Vec<Output>) {
        let Some(leaving) = self.moves.leaving.remove(name) else { return };
        let Leaving { mut mastered, told, late, .. } = leaving;
        let generation = mastered.generation;
        mastered.uses.reset();
        self.put_mastered(name, mastered);
        self.moves.frozen.remove(name);
        if let Some(local) = self.names.local_mut(name) {
            local.set_place(Place::Here);
        }
        self.rest(name);
        for user in &told {
            self.send(*user, Message::Thawed { name: name.clone(), generation }, out);
        }
        self.moves.is_thawing = true;
        for (from, id, late, _) in late {
            match late {
                _ if !self.view.members.contains(&from) => {}
                Late::Operate(numbered) => {
                    self.on_operate(from, name.clone(), generation, id, numbered, out);
                }
                Late::Release => self.on_release(from, name.clone(), generation, id, out),
            }
        }
        self.tell(name, out);
        self.moves.is_thawing = false;
        self.note_use(name);
        self.note_waits(name);
    }

    /// All of them: what comes next is for a master that can act.
    pub(super) fn thaw_all(&mut self, out: &mut Vec<Output>) {
        let names: Vec<LockName> = self.moves.leaving.keys().cloned().collect();
        for name in names {
            self.thaw(&name, out);
        }
    }

    fn rest(&mut self, name: &LockName) {
        let rest = Duration::from_millis(u64::from(self.config.moves.rest_ms));
        if !rest.is_zero() {
            self.moves.resting.insert(name.clone(), self.now + rest);
        }
    }

    /// All users know: the resource leaves.
    fn give(&mut self, name: &LockName, out: &mut Vec<Output>) {
        let Some(leaving) = self.moves.leaving.remove(name) else { return };
        let Leaving { mastered, to, late, .. } = leaving;
        let generation = mastered.generation;
        let Some(next) = generation.moved() else { return };
        let mut resource = mastered.resource.to_moved(self.now);
        if self.has_bug(Bug::MoveLosesValue) {
            resource = resource.without_value();
        }
        if self.has_bug(Bug::MoveLosesToken) {
            resource = resource.without_sequence();
        }
        let sequence = mastered.resource.sequence();
        let mut released = Vec::new();
        let mut away = Vec::new();
        for (from, id, late, is_told_again) in late {
            match late {
                Late::Release if released.len() < ITEMS_MAX => released.push((from, id)),
                Late::Release => {
                    away.push((from, Message::NotReleased { name: name.clone(), generation, id }))
                }
                // They tell it to the heir.
                Late::Operate(_) if is_told_again || self.has_bug(Bug::MoveLosesForward) => {}
                Late::Operate(_) => away.push((from, Message::Moved { name: name.clone(), generation })),
            }
        }
        if self.has_bug(Bug::MoveKeepsMaster) {
            self.put_mastered(name, mastered);
            self.moves.frozen.remove(name);
            if let Some(local) = self.names.local_mut(name) {
                local.set_place(Place::Here);
            }
        }
        self.stats.moved_out += 1;
        self.moves.sent.insert(name.clone(), Sent { to, generation, next, sequence, taken: false });
        let resource = Box::new(resource);
        self.send(to, Message::Move { name: name.clone(), generation: next, resource, released }, out);
        for (user, message) in away {
            self.send(user, message, out);
        }
    }

    /// The resource is ours.
    pub(super) fn on_move(
        &mut self,
        from: Identity,
        name: LockName,
        generation: Generation,
        moved: MovedResource,
        released: Vec<(Identity, LockId)>,
        out: &mut Vec<Output>,
    ) {
        if self.names.mastered(&name).is_some_and(|m| generation <= m.generation) {
            tracing::warn!(target: "quorate_dlm", %name, %from, "a resource that is mastered here already came again");
            return;
        }
        self.moves.expected.remove(&name);
        let (users, sequence, came) = (moved.users(), moved.sequence(), moved.pending());
        let resource = Resource::from_moved(moved, self.now);
        self.put_mastered(&name, Mastered::new(generation, resource));
        self.stats.moved_in += 1;
        self.moves.frozen.remove(&name);
        let mut is_here = false;
        if let Some(local) = self.names.local_mut(&name) {
            // Who asks the directory waits for its answer: that may be more than a place.
            is_here = !matches!(local.place(), Place::Looking { .. });
            if is_here {
                local.set_place(Place::Here);
            }
        }
        let mut unaware: BTreeSet<Identity> = users.into_iter().chain([from]).collect();
        unaware.remove(&self.config.me);
        let told = unaware.clone();
        let claimed = Claimed { generation, unaware, came, from, in_directory: false };
        self.moves.claims.insert(name.clone(), claimed);
        self.rest(&name);
        // Before any answer: only the master is heard.
        for user in told {
            self.send(user, Message::Taken { name: name.clone(), generation }, out);
        }
        self.claim(&name, generation, sequence, out);
        self.catch_up(&name, out);
        for (node, id) in released {
            let release = Numbered { op: 0, operation: Operation::RELEASE };
            self.operate(&name, LockKey { node, id }, release, out);
        }
        if is_here {
            self.forget_sent(&name);
            self.tell(&name, out);
        }
        self.route(&name, Vec::new(), out);
        self.leave_if_due(out);
    }

    /// The last master may not have heard yet who has failed since.
    fn catch_up(&mut self, name: &LockName, out: &mut Vec<Output>) {
        let (members, debtors) = (&self.view.members, &self.view.debtors);
        let cx = context!(self);
        let mut events: Vec<Event> = Vec::new();
        let weakest = self.config.weakest_hold;
        if let Some(mastered) = self.names.mastered_mut(name) {
            let nodes = mastered.resource.locks().map(|l| l.key.node);
            let gone: BTreeSet<Identity> = nodes.filter(|n| !members.contains(n)).collect();
            for who in gone {
                mastered.resource.fail(&cx, who, &mut events);
                if !debtors.contains_key(&who) {
                    mastered.resource.release(&cx, who, None, &mut events);
                } else if self.passable.contains(&who) {
                    mastered.resource.release(&cx, who, weakest, &mut events);
                }
            }
            mastered.resource.check();
        }
        self.route(name, events, out);
    }

    fn claim(&mut self, name: &LockName, generation: Generation, sequence: u64, out: &mut Vec<Output>) {
        if let Some(owner) = self.owner_of(name) {
            self.send(owner, Message::Claim { name: name.clone(), generation, sequence }, out);
        }
    }

    /// A new master says so.
    pub(super) fn on_taken(
        &mut self,
        from: Identity,
        name: LockName,
        generation: Generation,
        out: &mut Vec<Output>,
    ) {
        if let Some(sent) = self.moves.sent.get_mut(&name).filter(|s| (s.to, s.next) == (from, generation)) {
            sent.taken = true;
        }
        let is_told = match self.names.local(&name).map(LocalName::place) {
            Some(Place::Frozen) => self.moves.frozen.get(&name).is_some_and(|f| f.to == from),
            // The one before has failed: what we registered is not needed.
            Some(Place::Recovering) => true,
            _ => false,
        };
        if is_told {
            self.forget_sent(&name);
            self.settle_at(&name, (from, generation), out);
        }
        self.send(from, Message::TakenAck { name, generation }, out);
    }

    /// The resource does not move.
    pub(super) fn on_thawed(
        &mut self,
        from: Identity,
        name: LockName,
        generation: Generation,
        out: &mut Vec<Output>,
    ) {
        if self.moves.expected.get(&name) == Some(&from) {
            self.moves.expected.remove(&name);
        }
        let is_told = match self.names.local(&name).map(LocalName::place) {
            Some(Place::Frozen) => {
                self.moves.frozen.get(&name).is_some_and(|f| (f.from, f.generation) == (from, generation))
            }
            // The heir has failed, but the master had it still.
            Some(Place::Recovering) => true,
            _ => false,
        };
        if is_told {
            self.settle_at(&name, (from, generation), out);
        }
        self.leave_if_due(out);
    }

    /// A name has a master again, which is told what has no answer.
    fn settle_at(
        &mut self,
        name: &LockName,
        (master, generation): (Identity, Generation),
        out: &mut Vec<Output>,
    ) {
        self.moves.frozen.remove(name);
        let Some(local) = self.names.local_mut(name) else { return };
        local.set_place(Place::At { master, generation });
        if local.locks.is_empty()
            && let Some(elsewhere) = local.elsewhere()
        {
            elsewhere.idle_since = self.now;
            if !core::mem::replace(&mut elsewhere.is_queued, true) {
                self.idle.push_back((self.now, name.clone()));
            }
        }
        self.tell(name, out);
    }

    /// The new master has got nothing from us, but what was in the queues.
    fn forget_sent(&mut self, name: &LockName) {
        let Some(local) = self.names.local(name) else { return };
        for id in &local.locks {
            if let Some(lock) = self.locks.find_mut(&id.0) {
                lock.operations.iter_mut().for_each(|u| u.is_sent = false);
            }
        }
    }

    /// What the master, now known, has not got.
    fn tell(&mut self, name: &LockName, out: &mut Vec<Output>) {
        let Some(local) = self.names.local(name) else { return };
        for id in &local.locks {
            if let Some(lock) = self.locks.find_mut(&id.0) {
                lock.operations.iter_mut().for_each(|u| u.since = None);
            }
        }
        self.tell_owners(name, out);
        self.release_again(name, out);
        self.pass_on_all(name, out);
    }

    /// A lock got another owner while its name was frozen.
    pub(super) fn note_owner(&mut self, name: &LockName, id: LockId) {
        self.moves.owners.insert((name.clone(), id));
    }

    fn tell_owners(&mut self, name: &LockName, out: &mut Vec<Output>) {
        if self.moves.owners.is_empty() {
            return;
        }
        let changed: Vec<_> = self.moves.owners.iter().filter(|(n, _)| n == name).cloned().collect();
        for (name, id) in changed {
            let Some(owner) = self.locks.find(&id.0).map(|l| l.owner) else {
                self.moves.owners.remove(&(name, id));
                continue;
            };
            match self.names.local(&name).map(LocalName::place) {
                Some(Place::Here) => self.on_owner(self.config.me, &name, id, owner),
                Some(Place::At { master, .. }) => {
                    self.send(master, Message::Owner { name: name.clone(), id, owner }, out);
                }
                _ => {}
            }
            self.moves.owners.remove(&(name, id));
        }
    }

    /// The directory hears of a new master.
    pub(super) fn on_claim(
        &mut self,
        from: Identity,
        map: Epoch,
        name: LockName,
        (generation, sequence): (Generation, u64),
        out: &mut Vec<Output>,
    ) {
        let number = map::bucket_of(name.as_bytes());
        if self.has_bug(Bug::ClaimLost) {
            return self.send(from, Message::Claimed { name, generation }, out);
        }
        // Not ours any more, or again: it is claimed anew under that map.
        let Some(bucket) = self.buckets.get_mut(&number).filter(|b| b.since <= map) else { return };
        bucket.floor = bucket.floor.max(sequence);
        bucket.name_holds.remove(&name);
        self.enter(name.clone(), from, generation);
        self.send(from, Message::Claimed { name, generation }, out);
        self.answer_waiting(number, out);
    }

    pub(super) fn on_claimed(&mut self, name: &LockName, generation: Generation, out: &mut Vec<Output>) {
        if let Some(claim) = self.moves.claims.get_mut(name).filter(|c| c.generation == generation) {
            claim.in_directory = true;
            self.end_claim(name, out);
        }
    }

    pub(super) fn on_taken_ack(
        &mut self,
        from: Identity,
        name: &LockName,
        generation: Generation,
        out: &mut Vec<Output>,
    ) {
        if let Some(claim) = self.moves.claims.get_mut(name).filter(|c| c.generation == generation) {
            claim.unaware.remove(&from);
            self.end_claim(name, out);
        }
    }

    fn end_claim(&mut self, name: &LockName, out: &mut Vec<Output>) {
        let is_over = |c: &Claimed| c.in_directory && c.unaware.is_empty();
        if self.moves.claims.get(name).is_some_and(is_over)
            && let Some(Claimed { from, generation, .. }) = self.moves.claims.remove(name)
        {
            self.send(from, Message::MoveOver { name: name.clone(), generation }, out);
        }
    }

    /// Whether a resource that came here may not go yet: not everybody knows that it came.
    pub(super) fn is_claiming(&self, name: &LockName) -> bool {
        !self.moves.claims.is_empty() && self.moves.claims.contains_key(name)
    }

    pub(super) fn on_move_over(&mut self, from: Identity, name: &LockName, generation: Generation) {
        if self.moves.sent.get(name).is_some_and(|s| (s.to, s.next) == (from, generation)) {
            self.moves.sent.remove(name);
        }
    }

    /// The members have changed: moves of which one side is gone. Before this node registers anything.
    pub(super) fn on_members_changed(&mut self, out: &mut Vec<Output>) {
        let members = &self.view.members;
        self.moves.expected.retain(|_, from| members.contains(from));
        let over: Vec<LockName> = self.moves.sent.keys().cloned().collect();
        for name in over {
            let Some(sent) = self.moves.sent.get(&name).filter(|s| !self.view.members.contains(&s.to)) else {
                continue;
            };
            let lost = (sent.to, sent.generation, sent.sequence);
            self.moves.sent.remove(&name);
            if !self.has_bug(Bug::HeirForgotten) {
                self.moves.lost.insert(name, lost);
            }
        }
        let lost: Vec<_> = self.moves.lost.iter().map(|(n, l)| (n.clone(), *l)).collect();
        for (name, (heir, generation, sequence)) in lost {
            if let Some(owner) = self.owner_of(&name) {
                self.send(owner, Message::HeirLost { name: name.clone(), generation, sequence }, out);
            }
            // Told again under the next map, in case the bucket is on its way.
            if !self.view.debtors.contains_key(&heir) {
                self.moves.lost.remove(&name);
            }
        }
        let claims: Vec<LockName> = self.moves.claims.keys().cloned().collect();
        for name in claims {
            let Some(claim) = self.moves.claims.get_mut(&name) else { continue };
            claim.unaware.retain(|b| self.view.members.contains(b));
            let (generation, is_due) = (claim.generation, !claim.in_directory);
            let sequence = self.names.mastered(&name).map_or(0, |m| m.resource.sequence());
            if is_due {
                self.claim(&name, generation, sequence, out);
            }
            self.end_claim(&name, out);
        }
        // Whoever of the two is gone, the name may have no master any more.
        let members = &self.view.members;
        let gone = |f: &Frozen| !members.contains(&f.from) || !members.contains(&f.to);
        let names: Vec<LockName> =
            self.moves.frozen.iter().filter(|(_, f)| gone(f)).map(|(n, _)| n.clone()).collect();
        for name in names {
            let Some(local) = self.names.local_mut(&name) else { continue };
            if local.locks.is_empty() {
                self.names.take_local(&name);
                self.released.remove(&name);
                self.moves.frozen.remove(&name);
                continue;
            }
            local.set_place(Place::Recovering);
            // Who of them lives may have it, and says so.
            let lives = |f: &Frozen| [f.from, f.to].iter().any(|w| self.view.members.contains(w));
            if !self.moves.frozen.get(&name).is_some_and(lives) {
                self.moves.frozen.remove(&name);
            }
        }
    }

    /// A master has lost the node it had given the name to.
    pub(super) fn on_heir_lost(
        &mut self,
        from: Identity,
        map: Epoch,
        name: LockName,
        (generation, sequence): (Generation, u64),
    ) {
        let debtors: BTreeSet<Identity> = self.view.debtors.keys().copied().collect();
        let is_ready = self.is_ready;
        match self.entry_of(&name) {
            // Rebuilt already, or the heir had given it on.
            Some((master, known)) if master != from || generation < known => return,
            _ => {}
        }
        let Some(bucket) = self.buckets.get_mut(&map::bucket_of(name.as_bytes())).filter(|b| b.since <= map)
        else {
            return;
        };
        bucket.floor = bucket.floor.max(sequence);
        bucket.name_holds.entry(name.clone()).or_default().extend(debtors);
        if !is_ready {
            bucket.blocked.insert(name.clone());
        }
        self.remove_entry(&name);
    }

    /// A node that wanted to leave has got what it had agreed to take.
    pub(super) fn leave_if_due(&mut self, out: &mut Vec<Output>) {
        if self.moves.leaves_after && self.moves.expected.is_empty() {
            self.moves.leaves_after = false;
            self.on_leave(out);
        }
    }

    /// Whether a leave must wait for a resource that is on its way here.
    pub(super) fn must_stay(&mut self) -> bool {
        self.moves.leaves_after = !self.moves.expected.is_empty();
        self.moves.leaves_after
    }

    /// Gives up waiting for slow users, and forgets what has rested.
    pub(super) fn on_slow_moves(&mut self, out: &mut Vec<Output>) {
        let now = self.now;
        let slow: Vec<LockName> =
            self.moves.leaving.iter().filter(|(_, l)| l.until <= now).map(|(n, _)| n.clone()).collect();
        for name in slow {
            self.thaw(&name, out);
        }
        self.moves.resting.retain(|_, until| now < *until);
    }
}
