//! What happens when somebody attaches, leaves or fails (R13, R14): new bucket map, registration of all with all,
//! rebuilt resources, and the release of what failed nodes had.

use super::local::{LocalName, Place};
use super::master::Mastered;
use super::{Bucket, Output, Shard, SpaceView};
use crate::bug::Bug;
use crate::machine::map;
use crate::machine::{Event, Resource};
use crate::wire::{BucketState, Generation, ITEMS_MAX, Message, Numbered, Relock};
use crate::{LockId, LockName};
use quorate_membership::{Epoch, Identity};
use std::collections::{BTreeMap, BTreeSet};

/// What one member registers with another.
#[derive(Debug, Default)]
pub(super) struct Registration {
    pub(super) mastered: Vec<(LockName, Generation, u64)>,
    pub(super) locks: Vec<Relock>,
    pub(super) buckets: Vec<BucketState>,
}

impl Registration {
    /// In pieces of bounded size; at least one.
    fn into_messages(mut self) -> Vec<Message> {
        let mut out = Vec::new();
        loop {
            let mastered = take_some(&mut self.mastered);
            let locks = take_some(&mut self.locks);
            let buckets = self.take_buckets();
            let last = self.mastered.is_empty() && self.locks.is_empty() && self.buckets.is_empty();
            out.push(Message::Register { mastered, locks, buckets, last });
            if last {
                return out;
            }
        }
    }

    /// Whole buckets, or parts of one with many names.
    fn take_buckets(&mut self) -> Vec<BucketState> {
        let mut out = Vec::new();
        let mut names = 0;
        while let Some(first) = self.buckets.first_mut() {
            if names + first.names.len() <= ITEMS_MAX {
                names += first.names.len();
                out.push(self.buckets.remove(0));
                continue;
            }
            if out.is_empty() {
                out.push(BucketState { names: take_some(&mut first.names), ..first.clone() });
            }
            break;
        }
        out
    }
}

fn take_some<T>(list: &mut Vec<T>) -> Vec<T> {
    let rest = list.split_off(list.len().min(ITEMS_MAX));
    core::mem::replace(list, rest)
}

impl Shard {
    pub(super) fn on_view(&mut self, view: &SpaceView, out: &mut Vec<Output>) {
        let old = core::mem::replace(&mut self.view, view.clone());
        let is_passable = |d: &super::Debtor| d.fenced && d.rebuilt;
        self.passable = view.debtors.iter().filter(|(_, d)| is_passable(d)).map(|(w, _)| *w).collect();
        if !self.is_member() {
            return;
        }
        if old.members != view.members {
            self.is_ready = false;
            self.thaw_all(out);
            self.on_new_map(&old.members, out);
        }
        self.suspect_anew();
        let changed: Vec<Identity> = old
            .debtors
            .iter()
            .filter(|(who, was)| view.debtors.get(who).is_none_or(|is| is_passable(is) && !is_passable(was)))
            .map(|(who, _)| *who)
            .collect();
        for who in changed {
            self.release(who, out);
        }
        for bucket in self.buckets.values_mut() {
            bucket.forget_debtors(|d| view.debtors.contains_key(d));
        }
        self.leave_if_due(out);
    }

    /// What is left of a failed life that has reached its next stage.
    fn release(&mut self, who: Identity, out: &mut Vec<Output>) {
        let is_open = self.view.debtors.contains_key(&who) && !self.has_bug(Bug::ForgetHolds);
        let weakest = self.config.weakest_hold.filter(|_| is_open);
        if self.leaving.is_some() {
            return;
        }
        let cx = context!(self);
        let mut changed = Vec::new();
        for (name, mastered) in self.names.all_mastered_mut() {
            if !mastered.resource.is_touched_by(who) {
                continue;
            }
            let mut events = Vec::new();
            mastered.resource.release(&cx, who, weakest, &mut events);
            changed.push((name.clone(), events));
        }
        for (name, events) in changed {
            self.route(&name, events, out);
        }
    }

    /// For a resource that was made just now: debtors that have reached their stages already.
    pub(super) fn apply_stages(&self, resource: &mut Resource) {
        let cx = self.context();
        for who in &self.passable {
            resource.release(&cx, *who, self.config.weakest_hold, &mut Vec::new());
        }
    }

    fn on_new_map(&mut self, old: &BTreeSet<Identity>, out: &mut Vec<Output>) {
        self.map = self.view.epoch;
        self.is_ready = false;
        self.registered.clear();
        self.relocks.clear();
        let members = self.view.members.clone();
        let gone: Vec<Identity> = old.difference(&members).copied().collect();
        for parked in self.parked.values_mut() {
            parked.retain(|(from, ..)| members.contains(from));
        }
        if self.leaving.is_none() {
            for who in &gone {
                self.lose(*who, out);
            }
        }
        let mut registrations = self.move_buckets(old);
        self.on_members_changed(out);
        self.register_masters(old, &mut registrations);
        self.register_locks(&mut registrations);
        for member in members {
            for message in registrations.remove(&member).unwrap_or_default().into_messages() {
                self.send(member, message, out);
            }
        }
        let looking: Vec<(LockName, Option<Generation>)> = self
            .names
            .all_local()
            .filter_map(|(name, local)| match local.place() {
                Place::Looking { stale } => Some((name.clone(), stale)),
                _ => None,
            })
            .collect();
        for (name, stale) in looking {
            self.look_up(&name, stale, out);
        }
        self.on_leaver_gone(out);
    }

    /// A member is gone: failed, if it left a debt.
    fn lose(&mut self, who: Identity, out: &mut Vec<Output>) {
        let failed = self.view.debtors.contains_key(&who) && !self.has_bug(Bug::GrantBeforeFence);
        let cx = context!(self);
        let mut changed = Vec::new();
        for (name, mastered) in self.names.all_mastered_mut() {
            if mastered.resource.locks().any(|l| l.key.node == who) {
                let mut events = Vec::new();
                if failed {
                    mastered.resource.fail(&cx, who, &mut events);
                } else {
                    mastered.resource.purge(&cx, who, &mut events);
                }
                changed.push((name.clone(), events));
            }
        }
        for (name, events) in changed {
            self.route(&name, events, out);
        }
    }

    /// Takes in buckets that came here and passes on what we know of those that went.
    fn move_buckets(&mut self, old: &BTreeSet<Identity>) -> BTreeMap<Identity, Registration> {
        let debtors: BTreeSet<Identity> = self.view.debtors.keys().copied().collect();
        let members = self.view.members.clone();
        let (me, this_map) = (self.config.me, self.map);
        let was_member = old.contains(&me);
        let failed: BTreeSet<Identity> = old.intersection(&debtors).copied().collect();
        let mut out: BTreeMap<Identity, Registration> = BTreeMap::new();
        for number in map::buckets_of(self.config.index) {
            let Some(owner) = map::owner_of(number, &members) else { continue };
            if owner == me {
                if let Some(bucket) = self.buckets.get_mut(&number) {
                    bucket.on_new_map(|master| !members.contains(&master), (&failed, &debtors));
                } else {
                    self.buckets.insert(number, Bucket::new(this_map));
                }
            } else if let Some(mut bucket) = self.buckets.remove(&number).filter(|_| was_member) {
                bucket.doubt(&failed, &debtors);
                let is_whole = bucket.is_ready || bucket.is_inherited;
                let mut names = bucket.name_holds;
                for (name, _) in bucket.entries.iter().filter(|(_, e)| !members.contains(&e.master)) {
                    names.entry(name.clone()).or_default().extend(&debtors);
                }
                out.entry(owner).or_default().buckets.push(BucketState {
                    bucket: number,
                    is_whole,
                    floor: bucket.floor,
                    holds: bucket.holds,
                    names: names.into_iter().collect(),
                });
            }
        }
        out
    }

    /// Names that we master, to the new owners of their buckets.
    fn register_masters(&mut self, old: &BTreeSet<Identity>, out: &mut BTreeMap<Identity, Registration>) {
        let moved: BTreeMap<u16, Identity> = map::buckets_of(self.config.index)
            .filter_map(|b| Some((b, map::owner_of(b, &self.view.members)?)))
            .filter(|(b, owner)| map::owner_of(*b, old) != Some(*owner))
            .collect();
        for (name, mastered) in self.names.all_mastered_mut() {
            if let Some(owner) = moved.get(&map::bucket_of(name.as_bytes())) {
                mastered.is_listed &= *owner == self.config.me;
                let entry = (name.clone(), mastered.generation, mastered.resource.sequence());
                out.entry(*owner).or_default().mastered.push(entry);
            }
        }
        // What is under way has this master until it is claimed.
        for (name, generation, sequence) in self.moves.entries() {
            if let Some(owner) = moved.get(&map::bucket_of(name.as_bytes())) {
                out.entry(*owner).or_default().mastered.push((name.clone(), generation, sequence));
            }
        }
    }

    /// Locks whose master is gone, to the owners of their buckets, who become their masters.
    fn register_locks(&mut self, out: &mut BTreeMap<Identity, Registration>) {
        let map = self.map;
        let members = &self.view.members;
        let is_gone =
            |n: &LocalName| matches!(n.place(), Place::At { master, .. } if !members.contains(&master));
        let idle: Vec<LockName> = self
            .names
            .all_local()
            .filter(|(_, n)| n.locks.is_empty() && is_gone(n))
            .map(|(n, _)| n.clone())
            .collect();
        for name in idle {
            self.names.take_local(&name);
            self.released.remove(&name);
        }
        for (name, local) in self.names.all_local_mut() {
            if let Place::At { master, .. } = local.place()
                && !self.view.members.contains(&master)
            {
                local.set_place(Place::Recovering);
                for id in &local.locks {
                    if let Some(lock) = self.locks.find_mut(&id.0) {
                        lock.operations.iter_mut().for_each(|u| u.is_sent = false);
                    }
                }
            }
            if local.place() != Place::Recovering {
                continue;
            }
            let Some(owner) = map::owner_of(map::bucket_of(name.as_bytes()), &self.view.members) else {
                continue;
            };
            for id in &local.locks {
                let Some(lock) = self.locks.find_mut(&id.0) else { continue };
                for underway in &mut lock.operations {
                    underway.since.get_or_insert(map);
                }
                out.entry(owner).or_default().locks.push(lock.tell(*id));
            }
        }
    }

    pub(super) fn on_register(
        &mut self,
        from: Identity,
        map: Epoch,
        Registration { mastered, locks, buckets }: Registration,
        last: bool,
        out: &mut Vec<Output>,
    ) {
        for (name, generation, sequence) in mastered {
            let bucket = self.buckets.get_mut(&map::bucket_of(name.as_bytes()));
            let Some(bucket) = bucket.filter(|b| !b.is_ready && b.since <= map) else { continue };
            bucket.floor = bucket.floor.max(sequence);
            self.enter(name, from, generation);
        }
        for state in buckets {
            let bucket = self.buckets.get_mut(&state.bucket);
            let Some(bucket) = bucket.filter(|b| !b.is_ready && b.since <= map) else { continue };
            bucket.is_inherited |= state.is_whole;
            bucket.floor = bucket.floor.max(state.floor);
            bucket.holds.extend(state.holds);
            for (name, holds) in state.names {
                bucket.name_holds.entry(name).or_default().extend(holds);
            }
        }
        // What was registered for an older map is registered again for this one, if it still matters.
        if map != self.map {
            return;
        }
        self.relocks.extend(locks.into_iter().map(|l| (from, l)));
        if last {
            self.registered.insert(from);
        }
        let everybody = self.view.members.iter().all(|m| self.registered.contains(m));
        if !self.is_ready && everybody {
            self.complete(out);
        }
    }

    /// Everybody has registered: buckets answer, resources without master are rebuilt.
    fn complete(&mut self, out: &mut Vec<Output>) {
        self.is_ready = true;
        let debtors: BTreeSet<Identity> = self.view.debtors.keys().copied().collect();
        let no_holds = self.has_bug(Bug::NoUnknownHolds);
        for bucket in self.buckets.values_mut() {
            if !bucket.is_ready && !bucket.is_inherited && !no_holds {
                bucket.holds.extend(&debtors);
            }
            bucket.complete();
        }
        let mut by_name: BTreeMap<LockName, Vec<(Identity, Relock)>> = BTreeMap::new();
        for (from, relock) in core::mem::take(&mut self.relocks) {
            by_name.entry(relock.name.clone()).or_default().push((from, relock));
        }
        // A node that leaves takes nothing over: its last answers would be lost.
        if self.leaving.is_none() {
            for (name, locks) in by_name {
                self.rebuild(name, locks, &debtors, out);
            }
        }
        let numbers: Vec<u16> = self.buckets.keys().copied().collect();
        for number in numbers {
            self.answer_waiting(number, out);
        }
        if self.has_bug(Bug::StopEverything) {
            let names: Vec<LockName> = self.names.all_local().map(|(n, _)| n.clone()).collect();
            for name in names {
                self.pass_on_all(&name, out);
            }
        }
        out.push(Output::Ready { map: self.map });
    }

    fn rebuild(
        &mut self,
        name: LockName,
        mut locks: Vec<(Identity, Relock)>,
        debtors: &BTreeSet<Identity>,
        out: &mut Vec<Output>,
    ) {
        let holders: BTreeSet<Identity> = locks.iter().map(|(from, _)| *from).collect();
        if self.entry_of(&name).is_some() {
            // Rebuilt already, or mastered anew: the holder has not heard yet.
            for holder in holders {
                self.send(holder, Message::Elsewhere { name: name.clone() }, out);
            }
            return;
        }
        let Some(bucket) = self.buckets.get_mut(&map::bucket_of(name.as_bytes())) else { return };
        let (generation, floor) = (bucket.next_generation(self.map), bucket.floor);
        self.enter(name.clone(), self.config.me, generation);
        if self.has_bug(Bug::LoseRelock) && 1 < locks.len() {
            locks.pop();
        }
        if self.has_bug(Bug::ForgetPosixCuts) {
            let asking = locks.iter_mut().filter(|(_, l)| !l.operations.is_empty());
            asking.for_each(|(_, l)| l.posix = false);
        }
        if self.has_bug(Bug::LoseUnlockInRecovery) {
            let is_unlock = |n: &Numbered| matches!(n.operation, crate::wire::Operation::Unlock { .. });
            locks.iter_mut().for_each(|(_, l)| l.operations.retain(|n| !is_unlock(n)));
        }
        if self.has_bug(Bug::TrustEveryCopy) {
            locks.iter_mut().for_each(|(_, l)| (l.value_clean, l.value_invalid) = (true, false));
        }
        let cx = context!(self);
        let mut events: Vec<Event> = Vec::new();
        let mut resource = Resource::rebuild(&cx, floor, locks, debtors, &mut events);
        for who in &self.passable {
            resource.release(&cx, *who, self.config.weakest_hold, &mut events);
        }
        resource.settle(&cx, &mut events);
        self.put_mastered(&name, Mastered::new(generation, resource));
        for holder in holders {
            // Before any answer: only the master is heard.
            let message = Message::Remastered { name: name.clone(), generation, map: self.map };
            self.send(holder, message, out);
        }
        self.route(&name, events, out);
    }

    pub(super) fn on_remastered(
        &mut self,
        from: Identity,
        name: &LockName,
        generation: Generation,
        map: Epoch,
        out: &mut Vec<Output>,
    ) {
        let is_here = from == self.config.me;
        let never = self.has_bug(Bug::NeverResend);
        let Some(local) = self.names.local_mut(name).filter(|n| n.place() == Place::Recovering) else {
            return;
        };
        local.set_place(if is_here { Place::Here } else { Place::At { master: from, generation } });
        for id in &local.locks {
            let Some(lock) = self.locks.find_mut(&id.0) else { continue };
            if lock.copy.clean {
                lock.copy.clean = false;
            }
            for underway in &mut lock.operations {
                // Registered for that map or an earlier one: the new master has it. Later ones it has not.
                underway.is_sent = never || underway.since.is_some_and(|s| s <= map);
                underway.since = None;
            }
        }
        self.forget_frozen(name);
        self.pass_on_all(name, out);
    }

    pub(super) fn on_elsewhere(&mut self, name: &LockName, out: &mut Vec<Output>) {
        let is_frozen = self.is_frozen(name);
        let Some(local) = self.names.local_mut(name).filter(|n| n.place() == Place::Recovering) else {
            return;
        };
        let has_granted =
            local.locks.iter().any(|id| self.locks.find(&id.0).is_some_and(|l| l.granted.is_some()));
        if has_granted || is_frozen {
            // Who has a lock is told by the new master itself, or by the old one; that is on its way.
            return;
        }
        local.set_place(Place::Looking { stale: None });
        for id in &local.locks {
            if let Some(lock) = self.locks.find_mut(&id.0) {
                for underway in &mut lock.operations {
                    (underway.is_sent, underway.since) = (false, None);
                }
            }
        }
        self.look_up(name, None, out);
    }
}

impl super::LocalLock {
    fn tell(&self, id: LockId) -> Relock {
        Relock {
            name: self.name.clone(),
            id,
            owner: self.owner,
            posix: self.posix,
            range: self.range,
            granted: self.granted,
            token: self.token,
            recovery: self.recovery,
            value: self.copy.value.clone(),
            value_sequence: self.copy.sequence,
            value_invalid: self.copy.invalid,
            value_fresh: self.copy.fresh,
            value_clean: self.copy.clean,
            operations: self
                .operations
                .iter()
                .map(|u| Numbered { op: u.numbered.op, operation: u.numbered.operation.clone() })
                .collect(),
        }
    }
}
