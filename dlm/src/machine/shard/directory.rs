//! The directory: who masters which name, for the buckets that are this node's under the current map.

use super::{Output, Shard};
use crate::LockName;
use crate::bug::Bug;
use crate::machine::map;
use crate::names::NameMap;
use crate::wire::{Generation, Message};
use quorate_membership::{Epoch, Identity};
use std::collections::{BTreeMap, BTreeSet};

/// A name that somebody masters.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) master: Identity,
    pub(super) generation: Generation,
    /// What the master was told when it became that; told again if it asks again.
    floor: u64,
    assumed: BTreeSet<Identity>,
}

/// One bucket at its owner.
#[derive(Clone, Debug, Default)]
pub(super) struct Bucket {
    /// The map under which it came here.
    pub(super) since: Epoch,
    /// Everybody who may know of a master in it has registered.
    pub(super) is_ready: bool,
    /// The previous owner has told what it knew.
    pub(super) is_inherited: bool,
    pub(super) entries: NameMap<Entry>,
    /// Names whose master failed: nobody is told anything until all survivors have registered for the current map.
    pub(super) blocked: BTreeSet<LockName>,
    /// Failed lives that may have any name of the bucket (R13, UNKNOWN).
    pub(super) holds: BTreeSet<Identity>,
    /// Failed lives that may have this name (R13, REBUILD).
    pub(super) name_holds: BTreeMap<LockName, BTreeSet<Identity>>,
    /// No grant of a name without master had a higher number.
    pub(super) floor: u64,
    next: u64,
    waiting: Vec<(Identity, LockName, Option<Generation>)>,
}

impl Bucket {
    /// A bucket that came here with this map and may not answer yet.
    pub(super) fn new(since: Epoch) -> Self {
        Self { since, ..Self::default() }
    }

    pub(super) fn next_generation(&mut self, map: Epoch) -> Generation {
        self.next += 1;
        Generation { map, number: self.next }
    }

    /// The bucket stays with its owner, but the members have changed: askers ask again.
    pub(super) fn on_new_map(&mut self, is_gone: impl Fn(Identity) -> bool, debtors: &BTreeSet<Identity>) {
        self.waiting.clear();
        let lost: Vec<_> =
            self.entries.iter().filter(|(_, e)| is_gone(e.master)).map(|(n, _)| n.clone()).collect();
        for name in lost {
            self.entries.remove(&name);
            self.name_holds.entry(name.clone()).or_default().extend(debtors);
            self.blocked.insert(name);
        }
    }

    pub(super) fn forget_debtors(&mut self, open: impl Fn(&Identity) -> bool) {
        self.holds.retain(|d| open(d));
        self.name_holds.retain(|_, held| {
            held.retain(|d| open(d));
            !held.is_empty()
        });
    }

    pub(super) fn enter(&mut self, name: LockName, master: Identity, generation: Generation) {
        let entry = Entry { master, generation, floor: self.floor, assumed: BTreeSet::new() };
        if self.entries.get(&name).is_none_or(|e| e.generation < generation) {
            self.entries.insert(name, entry);
        }
    }
}

impl Shard {
    /// Asks the owner of the name's bucket.
    pub(super) fn look_up(&mut self, name: &LockName, stale: Option<Generation>, out: &mut Vec<Output>) {
        if let Some(owner) = self.owner_of(name) {
            self.send(owner, Message::Lookup { name: name.clone(), stale }, out);
        }
    }

    pub(super) fn on_lookup(
        &mut self,
        from: Identity,
        map: Epoch,
        name: LockName,
        stale: Option<Generation>,
        out: &mut Vec<Output>,
    ) {
        // Who asked under an older map asks again under this one.
        if map != self.map || self.leaving.is_some() {
            return;
        }
        let early = self.has_bug(Bug::AnswerEarly);
        let (this_map, open) = (self.map, self.view.debtors.clone());
        let Some(bucket) = self.buckets.get_mut(&map::bucket_of(name.as_bytes())) else { return };
        if (!bucket.is_ready || bucket.blocked.contains(&name)) && !early {
            return bucket.wait(from, name, stale);
        }
        if let Some(entry) = bucket.entries.get(&name) {
            if Some(entry.generation) == stale {
                // The asker was sent away by that master, whose `Remove` is on its way.
                return bucket.wait(from, name, stale);
            }
        } else {
            let held = bucket.name_holds.get(&name).into_iter().flatten().chain(&bucket.holds);
            let assumed = held.filter(|d| open.contains_key(d)).copied().collect();
            let generation = bucket.next_generation(this_map);
            let entry = Entry { master: from, generation, floor: bucket.floor, assumed };
            bucket.entries.insert(name.clone(), entry);
        }
        let Some(entry) = bucket.entries.get(&name) else { return };
        let is_yours = entry.master == from;
        let reply = Message::LookupReply {
            name,
            master: entry.master,
            generation: entry.generation,
            floor: if is_yours { entry.floor } else { 0 },
            assumed: if is_yours { entry.assumed.clone() } else { BTreeSet::new() },
        };
        self.send(from, reply, out);
    }

    pub(super) fn on_remove(
        &mut self,
        from: Identity,
        name: &LockName,
        generation: Generation,
        sequence: u64,
        out: &mut Vec<Output>,
    ) {
        let forgets = self.has_bug(Bug::ForgetFloor);
        // Not ours any more: its new owner learns from the registrations.
        let Some(bucket) = self.buckets.get_mut(&map::bucket_of(name.as_bytes())) else { return };
        if !bucket.entries.get(name).is_some_and(|e| e.master == from && e.generation == generation) {
            return;
        }
        bucket.entries.remove(name);
        if !forgets {
            bucket.floor = bucket.floor.max(sequence);
        }
        self.answer_waiting(map::bucket_of(name.as_bytes()), out);
    }

    /// Looks at the lookups of a bucket that wait, again.
    pub(super) fn answer_waiting(&mut self, bucket: u16, out: &mut Vec<Output>) {
        let Some(bucket) = self.buckets.get_mut(&bucket) else { return };
        for (from, name, stale) in core::mem::take(&mut bucket.waiting) {
            self.on_lookup(from, self.map, name, stale, out);
        }
    }
}

impl Bucket {
    fn wait(&mut self, from: Identity, name: LockName, stale: Option<Generation>) {
        self.waiting.retain(|(f, n, _)| (*f, n) != (from, &name));
        self.waiting.push((from, name, stale));
    }
}
