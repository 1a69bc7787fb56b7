//! The master's side: operations of this and other nodes on the resources that this node masters.

use super::local::{LocalName, Place};
use super::moves::{Late, Uses};
use super::named::Named;
use super::{Output, Shard, TOSS};
use crate::LockId;
use crate::LockName;
use crate::Range;
use crate::bug::Bug;
use crate::machine::{Event, LockKey, Pending, Resource};
use crate::wire::{Generation, Message, Numbered, Operation};
use quorate_membership::{Identity, Instant};
use std::collections::BTreeSet;

/// A resource that this node masters.
#[derive(Clone, Debug)]
pub(super) struct Mastered {
    pub(super) generation: Generation,
    pub(super) resource: Resource,
    /// Since when nobody has or wants it; [`NEVER`] while somebody does.
    unused_since: Instant,
    /// It is among those that are given up when their time is over.
    pub(super) is_queued: bool,
    /// This node keeps the directory of its bucket too, and the entry there says just this: it is not kept twice.
    pub(super) is_listed: bool,
    /// Who uses it (R15).
    pub(super) uses: Uses,
}

const NEVER: Instant = Instant(u64::MAX);

impl Mastered {
    pub(super) fn new(generation: Generation, resource: Resource) -> Self {
        Self {
            generation,
            resource,
            unused_since: NEVER,
            is_queued: false,
            is_listed: false,
            uses: Uses::default(),
        }
    }

    /// Since when nobody has or wants it.
    pub(super) fn unused_since(&self) -> Option<Instant> {
        Some(self.unused_since).filter(|at| *at != NEVER)
    }

    pub(super) fn set_unused(&mut self, since: Option<Instant>) {
        self.unused_since = since.unwrap_or(NEVER);
    }
}

impl Shard {
    pub(super) fn on_operate(
        &mut self,
        from: Identity,
        name: LockName,
        generation: Generation,
        id: LockId,
        numbered: Numbered,
        out: &mut Vec<Output>,
    ) {
        if self.leaving.is_some() {
            // Frozen. The holder tells it to the next master.
            return;
        }
        if self.names.mastered(&name).is_some_and(|m| m.generation == generation) {
            let value_bytes = self.config.value_bytes;
            let fits = match &numbered.operation {
                Operation::Convert { value: Some(v), .. } | Operation::Unlock { value: Some(v), .. } => {
                    v.len() == value_bytes
                }
                _ => true,
            };
            if fits && !self.is_repeated(&name, LockKey { node: from, id }, numbered.op) {
                self.stats.r#in += 1;
                let is_use = matches!(numbered.operation, Operation::New { .. } | Operation::Convert { .. });
                if !self.operate_fast(from, &name, id, &numbered, out) {
                    self.operate(&name, LockKey { node: from, id }, numbered, out);
                }
                if is_use {
                    self.note_user(&name, from, out);
                }
            }
        } else if self.moves.is_leaving(&name) {
            self.keep_late(from, &name, id, Late::Operate(numbered));
        } else if self.is_looking(&name) {
            // The directory may have told others before us that we master it.
            self.parked.entry(name).or_default().push((from, generation, id, numbered));
        } else {
            self.send(from, Message::Moved { name, generation }, out);
        }
    }

    /// Carries an operation out on a resource mastered here.
    pub(super) fn operate(
        &mut self,
        name: &LockName,
        key: LockKey,
        numbered: Numbered,
        out: &mut Vec<Output>,
    ) {
        let mut events = core::mem::take(&mut self.events);
        let twice = self.has_bug(Bug::MoveTakesTwice);
        let loses_remainder = self.has_bug(Bug::LoseRemainder);
        let loses_unlock = self.has_bug(Bug::LoseUnlock) && key.node != self.config.me;
        let cx = context!(self);
        if let Some(mastered) = self.names.mastered_mut(name) {
            if key.node == self.config.me {
                mastered.uses.reset();
            }
            let (op, resource) = (numbered.op, &mut mastered.resource);
            let result = match numbered.operation {
                // A repetition of what we have already: the holder did not know.
                Operation::New { .. } if resource.find(key).is_some() && !twice => Ok(()),
                Operation::New { mode, range, flags, owner, priority } => {
                    let (value, demoted) = (None, false);
                    let pending = Pending { mode, range, flags, value, demoted, op, priority };
                    resource.request(&cx, key, owner, pending, &mut events);
                    Ok(())
                }
                Operation::Convert { mode, range, flags, value, priority } => {
                    let range = range.or_else(|| resource.find(key).map(|l| l.range)).unwrap_or(Range::ALL);
                    let demoted = false;
                    let pending = Pending { mode, range, flags, value, demoted, op, priority };
                    resource.convert(&cx, key, pending, &mut events)
                }
                Operation::Unlock { .. } if loses_unlock => {
                    let completion = crate::Completion::Unlocked;
                    events.push(Event::Done { key, op, completion, value_sequence: 0 });
                    Ok(())
                }
                Operation::Unlock { flags, value } => {
                    resource.unlock(&cx, key, (flags, value, op), &mut events)
                }
                Operation::Cancel => resource.cancel(&cx, key, &mut events),
            };
            if loses_remainder {
                let _ = resource.take(LockKey { id: crate::machine::posix::spare(key.id), ..key });
            }
            if let Err(error) = result {
                tracing::debug!(target: "quorate_dlm", %name, node = %key.node, %error, "operation without effect");
            }
        }
        self.route(name, events, out);
    }

    /// Tells the owners of locks what has become of them, and notes a resource that nobody uses any more.
    pub(super) fn route(&mut self, name: &LockName, mut events: Vec<Event>, out: &mut Vec<Output>) {
        for event in events.drain(..) {
            let key = match &event {
                Event::Done { key, .. } | Event::Blocking { key, .. } => *key,
            };
            let is_ours = key.node == self.config.me;
            match event {
                Event::Done { op, completion, value_sequence, .. } if is_ours => {
                    self.apply_done(key.id, op, completion, value_sequence, out);
                }
                Event::Done { op, completion, value_sequence, .. } => {
                    self.send(key.node, Message::Done { id: key.id, op, completion, value_sequence }, out);
                }
                Event::Blocking { mode, .. } if is_ours => out.push(Output::Blocking { id: key.id, mode }),
                Event::Blocking { mode, .. } => {
                    self.send(key.node, Message::Blocking { id: key.id, mode }, out);
                }
            }
        }
        self.events = events;
        self.note_use(name);
        self.note_waits(name);
    }

    pub(super) fn note_use(&mut self, name: &LockName) {
        let now = self.now;
        let Some(mastered) = self.names.mastered_mut(name) else { return };
        if !mastered.resource.is_unused() {
            mastered.set_unused(None);
        } else if mastered.unused_since().is_none() {
            mastered.set_unused(Some(now));
            if !core::mem::replace(&mut mastered.is_queued, true) {
                self.unused.push_back((now, name.clone()));
            }
        }
    }

    /// Becomes the master of a name without locks.
    pub(super) fn become_master(
        &mut self,
        name: &LockName,
        generation: Generation,
        floor: u64,
        assumed: &BTreeSet<Identity>,
    ) {
        let debtors = assumed.iter().copied().filter(|d| self.view.debtors.contains_key(d));
        let mut resource = Resource::held(&self.context(), floor, debtors);
        self.apply_stages(&mut resource);
        self.put_mastered(name, Mastered::new(generation, resource));
    }

    /// What parked operations were waiting for is known.
    pub(super) fn unpark(&mut self, name: &LockName, out: &mut Vec<Output>) {
        for (from, generation, id, numbered) in self.parked.remove(name).unwrap_or_default() {
            self.on_operate(from, name.clone(), generation, id, numbered, out);
        }
    }

    /// Forgets where the masters of names are on which this node has had no locks for a while.
    fn forget_idle(&mut self) {
        while let Some((since, _)) = self.idle.front()
            && *since + TOSS <= self.now
        {
            let Some((_, name)) = self.idle.pop_front() else { return };
            let Some(local) = self.names.local_mut(&name) else { continue };
            let is_idle = local.locks.is_empty() && matches!(local.place(), Place::At { .. });
            let Some(elsewhere) = local.elsewhere() else { continue };
            if !is_idle {
                elsewhere.is_queued = false;
            } else if self.now < elsewhere.idle_since + TOSS {
                self.idle.push_back((elsewhere.idle_since, name));
            } else {
                self.names.take_local(&name);
            }
        }
    }

    /// A holder has ended a lock and wants no answer.
    pub(super) fn on_release(
        &mut self,
        from: Identity,
        name: LockName,
        generation: Generation,
        id: LockId,
        out: &mut Vec<Output>,
    ) {
        if self.leaving.is_some() {
            // Frozen. The holder does not tell the lock to the next master.
            return;
        }
        if self.moves.is_leaving(&name) {
            return self.keep_late(from, &name, id, Late::Release);
        }
        let key = LockKey { node: from, id };
        let Some(mastered) = self.names.mastered_mut(&name).filter(|m| m.generation == generation) else {
            return self.send(from, Message::NotReleased { name, generation, id }, out);
        };
        self.stats.r#in += 1;
        if mastered.resource.end_at_once(key) {
            return self.note_use(&name);
        }
        self.operate(&name, key, Numbered { op: 0, operation: Operation::RELEASE }, out);
    }

    /// What this node has released was mastered elsewhere by then.
    pub(super) fn on_not_released(
        &mut self,
        from: Identity,
        name: LockName,
        generation: Generation,
        id: LockId,
        out: &mut Vec<Output>,
    ) {
        self.released.entry(name.clone()).or_default().push(id);
        match self.names.local(&name).map(LocalName::place) {
            Some(Place::At { master, generation: g }) if (master, g) == (from, generation) => {
                self.on_moved(from, &name, generation, out);
            }
            Some(Place::Here | Place::At { .. }) => self.release_again(&name, out),
            Some(Place::Looking { .. } | Place::Frozen | Place::Recovering) => {}
            None => {
                self.names.put_local(name.clone(), LocalName::looking(generation));
                self.look_up(&name, Some(generation), out);
            }
        }
    }

    /// Tells the master, now known, what was released.
    pub(super) fn release_again(&mut self, name: &LockName, out: &mut Vec<Output>) {
        if self.released.is_empty() {
            return;
        }
        let Some(place) = self.names.local(name).map(LocalName::place) else { return };
        if place == Place::Frozen {
            return;
        }
        let (me, released) = (self.config.me, self.released.remove(name));
        for id in released.into_iter().flatten() {
            match place {
                Place::Here => {
                    let release = Numbered { op: 0, operation: Operation::RELEASE };
                    self.operate(name, LockKey { node: me, id }, release, out);
                }
                Place::At { master, generation } => {
                    self.send(master, Message::Release { name: name.clone(), generation, id }, out);
                }
                // With the master the lock has gone, or will not be registered.
                Place::Looking { .. } | Place::Frozen | Place::Recovering => {}
            }
        }
    }

    /// Gives up the mastery of resources that nobody has used for a while.
    pub(super) fn on_tick(&mut self, out: &mut Vec<Output>) {
        self.forget_idle();
        while let Some((since, _)) = self.unused.front()
            && *since + TOSS <= self.now
        {
            let Some((_, name)) = self.unused.pop_front() else { return };
            let now = self.now;
            let is_claiming = self.is_claiming(&name);
            let Some(Named { mastered: Some(mastered), local }) = self.names.both_mut(&name) else {
                continue;
            };
            let is_ours = local.as_ref().is_none_or(|n| n.locks.is_empty() && n.place() == Place::Here)
                && self.leaving.is_none();
            if is_claiming && is_ours {
                // Not everybody knows yet that it came here.
                mastered.set_unused(mastered.unused_since().map(|_| now));
                mastered.is_queued = true;
                self.unused.push_back((now, name));
                continue;
            }
            let is_idle = is_ours && mastered.resource.is_unused();
            let Some(since) = mastered.unused_since().filter(|_| is_idle) else {
                mastered.is_queued = false;
                mastered.set_unused(None);
                continue;
            };
            if now < since + TOSS {
                // It was used in between.
                self.unused.push_back((since, name));
                continue;
            }
            self.names.take_local(&name);
            let Some(mastered) = self.take_mastered(&name) else { continue };
            if let Some(owner) = self.owner_of(&name) {
                let (generation, sequence) = (mastered.generation, mastered.resource.sequence());
                self.send(owner, Message::Remove { name, generation, sequence }, out);
            }
        }
    }
}
