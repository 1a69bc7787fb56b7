//! The directory: who masters which name, for the buckets that are this node's under the current map.

use super::master::Mastered;
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
    /// Names given up while not everybody has registered: what comes later is older.
    given_up: BTreeMap<LockName, Generation>,
    waiting: Vec<(Identity, LockName, Option<Generation>)>,
}

impl Bucket {
    /// A bucket that came here with this map and may not answer yet.
    pub(super) fn new(since: Epoch) -> Self {
        Self { since, ..Self::default() }
    }

    /// Everybody has registered.
    pub(super) fn complete(&mut self) {
        self.is_ready = true;
        self.blocked.clear();
        self.given_up.clear();
    }

    pub(super) fn next_generation(&mut self, map: Epoch) -> Generation {
        self.next += Generation::STEP;
        Generation { map, number: self.next }
    }

    /// The bucket stays with its owner, but the members have changed: askers ask again.
    pub(super) fn on_new_map(
        &mut self,
        is_gone: impl Fn(Identity) -> bool,
        (failed, debtors): (&BTreeSet<Identity>, &BTreeSet<Identity>),
    ) {
        self.waiting.clear();
        self.doubt(failed, debtors);
        let lost: Vec<_> =
            self.entries.iter().filter(|(_, e)| is_gone(e.master)).map(|(n, _)| n.clone()).collect();
        for name in lost {
            self.entries.remove(&name);
            self.name_holds.entry(name.clone()).or_default().extend(debtors);
            self.blocked.insert(name);
        }
    }

    /// Members have failed since the last map. If not everybody had registered for it, they may have had what nobody else
    /// knows: a name of a bucket that had just come here, or a lock on a name whose master had failed before them.
    pub(super) fn doubt(&mut self, failed: &BTreeSet<Identity>, debtors: &BTreeSet<Identity>) {
        if !self.is_ready {
            self.holds.extend(failed);
        }
        for name in &self.blocked {
            self.name_holds.entry(name.clone()).or_default().extend(debtors);
        }
    }

    pub(super) fn forget_debtors(&mut self, open: impl Fn(&Identity) -> bool) {
        self.holds.retain(|d| open(d));
        self.name_holds.retain(|_, held| {
            held.retain(|d| open(d));
            !held.is_empty()
        });
    }
}

impl Shard {
    /// What the directory says of a name, if its bucket is ours.
    pub(super) fn entry_of(&self, name: &LockName) -> Option<(Identity, Generation)> {
        if let Some(mastered) = self.names.mastered(name).filter(|m| m.is_listed) {
            return Some((self.config.me, mastered.generation));
        }
        let bucket = self.buckets.get(&map::bucket_of(name.as_bytes()))?;
        bucket.entries.get(name).map(|e| (e.master, e.generation))
    }

    /// A mastership that somebody told, unless the directory knows a later one.
    pub(super) fn enter(&mut self, name: LockName, master: Identity, generation: Generation) {
        let bucket = self.buckets.get(&map::bucket_of(name.as_bytes()));
        if bucket.and_then(|b| b.given_up.get(&name)).is_some_and(|g| generation <= *g) {
            return;
        }
        if self.entry_of(&name).is_none_or(|(_, known)| known < generation) {
            self.set_entry(name, Entry { master, generation, assumed: BTreeSet::new() });
        }
    }

    fn set_entry(&mut self, name: LockName, entry: Entry) {
        let Some(bucket) = self.buckets.get_mut(&map::bucket_of(name.as_bytes())) else { return };
        if let Some(mastered) = self.names.mastered_mut(&name) {
            mastered.is_listed = (entry.master, entry.generation) == (self.config.me, mastered.generation);
            if mastered.is_listed {
                bucket.entries.remove(&name);
                return;
            }
        }
        bucket.entries.insert(name, entry);
    }

    pub(super) fn remove_entry(&mut self, name: &LockName) {
        if let Some(mastered) = self.names.mastered_mut(name) {
            mastered.is_listed = false;
        }
        if let Some(bucket) = self.buckets.get_mut(&map::bucket_of(name.as_bytes())) {
            bucket.entries.remove(name);
        }
    }

    /// This node masters the name from now on.
    pub(super) fn put_mastered(&mut self, name: &LockName, mut mastered: Mastered) {
        if let Some(bucket) = self.buckets.get_mut(&map::bucket_of(name.as_bytes()))
            && let Some(entry) = bucket.entries.get(name)
            && (entry.master, entry.generation) == (self.config.me, mastered.generation)
        {
            bucket.entries.remove(name);
            mastered.is_listed = true;
        }
        self.names.put_mastered(name.clone(), mastered);
    }

    /// It does not any more; the directory says so until it is told.
    pub(super) fn take_mastered(&mut self, name: &LockName) -> Option<Mastered> {
        let mastered = self.names.take_mastered(name)?;
        if mastered.is_listed {
            let (master, generation) = (self.config.me, mastered.generation);
            self.set_entry(name.clone(), Entry { master, generation, assumed: BTreeSet::new() });
        }
        Some(mastered)
    }

    /// Asks the owner of the name's bucket.
    pub(super) fn look_up(&mut self, name: &LockName, stale: Option<Generation>, out: &mut Vec<Output>) {
        // What has moved away from here is not ours again before the directory knows.
        let stale = stale.max(self.moves.left(name));
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
        let entry = self.entry_of(&name);
        let Some(bucket) = self.buckets.get_mut(&map::bucket_of(name.as_bytes())) else { return };
        if let Some((_, generation)) = entry
            && Some(generation) <= stale
        {
            // The asker was sent away by that master, whose `Remove` is on its way.
            return bucket.wait(from, name, stale);
        }
        let (master, generation) = entry.unwrap_or_else(|| {
            let held = bucket.name_holds.get(&name).into_iter().flatten().chain(&bucket.holds);
            let assumed = held.filter(|d| open.contains_key(d)).copied().collect();
            let generation = bucket.next_generation(this_map);
            bucket.entries.insert(name.clone(), Entry { master: from, generation, assumed });
            (from, generation)
        });
        // Later grants than when it was told first may be below the floor now: numbers may leap, never come again.
        let (mut floor, mut assumed) = (0, BTreeSet::new());
        if master == from {
            floor = bucket.floor;
            assumed.extend(bucket.entries.get(&name).into_iter().flat_map(|e| &e.assumed));
        }
        let reply = Message::LookupReply { name, master, generation, floor, assumed };
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
        if self.entry_of(name) != Some((from, generation)) {
            return;
        }
        self.remove_entry(name);
        let Some(bucket) = self.buckets.get_mut(&map::bucket_of(name.as_bytes())) else { return };
        if !bucket.is_ready {
            bucket.given_up.insert(name.clone(), generation);
        }
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
