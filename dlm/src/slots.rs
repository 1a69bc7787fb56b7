//! Where a node's locks are kept: a lock's number says its place, so finding it costs no hash.
//!
//! | bits of a lock's number | meaning |
//! |---|---|
//! | 0 to 3 | the shard |
//! | 4 to 25 | the slot within the shard |
//! | 26 to 61 | how many numbers the shard has given before |
//! | 62 | a POSIX lock: no slot, the bits from 4 on count |
//! | 63 | the second number of a POSIX request, see `machine::posix::spare` |
//!
//! The pieces of POSIX owners come and go with others' requests, so they have no slots and are found by number.

use crate::LockId;
use crate::machine::map::SHARDS;
use core::num::NonZeroU64;
use std::collections::BTreeMap;

const SHARD_BITS: u32 = 4;
const SLOT_BITS: u32 = 22;
const COUNT_BITS: u32 = 36;
const POSIX: u64 = 1 << 62;
/// Set in the second number of a POSIX request.
pub(crate) const SPARE: u64 = 1 << 63;
/// The most locks of one node in one shard; sixteen times as many in a lockspace.
pub(crate) const SHARD_LOCKS_MAX: usize = 1 << SLOT_BITS;
/// Slots that are allocated at once.
const CHUNK: usize = 64;

const _: () = assert!(SHARD_BITS + SLOT_BITS + COUNT_BITS == 62, "the flags have bits of their own");
const _: () = assert!(1 << SHARD_BITS == SHARDS, "the shard fills its bits");

/// The slot of a lock's number.
fn slot_of(id: u64) -> usize {
    (id >> SHARD_BITS) as usize & (SHARD_LOCKS_MAX - 1)
}

fn has_slot(id: u64) -> bool {
    id != 0 && id & (POSIX | SPARE) == 0
}

type Entry<V> = Option<(NonZeroU64, V)>;
type Chunk<V> = Vec<Entry<V>>;

/// Values by lock number. No two numbers in it have the same slot.
#[derive(Clone, Debug)]
pub(crate) struct LockTable<V> {
    chunks: Vec<Chunk<V>>,
    others: BTreeMap<u64, V>,
}

impl<V> Default for LockTable<V> {
    fn default() -> Self {
        Self { chunks: Vec::new(), others: BTreeMap::new() }
    }
}

impl<V> LockTable<V> {
    fn room(&self, id: u64) -> Option<&Entry<V>> {
        let slot = slot_of(id);
        self.chunks.get(slot / CHUNK)?.get(slot % CHUNK)
    }

    fn room_mut(&mut self, id: u64) -> Option<&mut Entry<V>> {
        let slot = slot_of(id);
        self.chunks.get_mut(slot / CHUNK)?.get_mut(slot % CHUNK)
    }

    pub(crate) fn find(&self, id: &u64) -> Option<&V> {
        if !has_slot(*id) {
            return self.others.get(id);
        }
        self.room(*id)?.as_ref().filter(|(i, _)| i.get() == *id).map(|(_, v)| v)
    }

    pub(crate) fn find_mut(&mut self, id: &u64) -> Option<&mut V> {
        if !has_slot(*id) {
            return self.others.get_mut(id);
        }
        self.room_mut(*id)?.as_mut().filter(|(i, _)| i.get() == *id).map(|(_, v)| v)
    }

    /// Puts a value in.
    ///
    /// # Panics
    /// Another number has the slot: they were not given by [`Numbers`].
    pub(crate) fn insert(&mut self, id: u64, value: V) {
        let Some(number) = NonZeroU64::new(id).filter(|_| has_slot(id)) else {
            self.others.insert(id, value);
            return;
        };
        let slot = slot_of(id);
        while self.chunks.len() <= slot / CHUNK {
            self.chunks.push(Vec::new());
        }
        let Some(chunk) = self.chunks.get_mut(slot / CHUNK) else { return };
        if chunk.len() <= slot % CHUNK {
            chunk.reserve_exact(CHUNK - chunk.len());
            chunk.resize_with(slot % CHUNK + 1, || None);
        }
        let Some(room) = chunk.get_mut(slot % CHUNK) else { return };
        assert!(room.as_ref().is_none_or(|(i, _)| i.get() == id), "two locks in one slot");
        *room = Some((number, value));
    }

    pub(crate) fn remove(&mut self, id: &u64) -> Option<V> {
        if !has_slot(*id) {
            return self.others.remove(id);
        }
        let room = self.room_mut(*id)?;
        if room.as_ref().is_none_or(|(i, _)| i.get() != *id) {
            return None;
        }
        room.take().map(|(_, v)| v)
    }

    /// Takes everything out, in the order of the slots.
    pub(crate) fn drain(&mut self) -> impl Iterator<Item = (u64, V)> {
        let others = core::mem::take(&mut self.others);
        let slots = core::mem::take(&mut self.chunks).into_iter().flatten().flatten();
        slots.map(|(id, value)| (id.get(), value)).chain(others)
    }
}

/// Gives the locks of one shard their numbers. A number is never given twice while the node lives; a slot is, once its
/// lock is gone.
#[derive(Debug)]
pub(crate) struct Numbers {
    shard: u16,
    given: u64,
    slots: u32,
    free: Vec<u32>,
}

impl Numbers {
    pub(crate) fn new(shard: u16) -> Self {
        Self { shard, given: 0, slots: 0, free: Vec::new() }
    }

    /// A number for a new lock; `None` if the shard is full.
    pub(crate) fn take(&mut self, posix: bool) -> Option<LockId> {
        self.given = (self.given + 1) & ((1 << COUNT_BITS) - 1);
        if posix {
            return Some(LockId(POSIX | (self.given << SHARD_BITS) | u64::from(self.shard)));
        }
        let slot = match self.free.pop() {
            Some(slot) => slot,
            None if (self.slots as usize) < SHARD_LOCKS_MAX => {
                self.slots += 1;
                self.slots - 1
            }
            None => return None,
        };
        let number = (self.given << SLOT_BITS) | u64::from(slot);
        Some(LockId((number << SHARD_BITS) | u64::from(self.shard)))
    }

    /// The lock of that number is gone.
    pub(crate) fn give_back(&mut self, id: LockId) {
        if has_slot(id.0) {
            self.free.push(u32::try_from(slot_of(id.0)).unwrap_or(u32::MAX));
        }
    }
}

/// The shard of a lock's number.
pub(crate) fn shard_of_lock(id: LockId) -> usize {
    id.0 as usize & (usize::from(SHARDS) - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_come_back_and_numbers_do_not() {
        let (mut numbers, mut table) = (Numbers::new(5), LockTable::default());
        let ids: Vec<LockId> = (0..200).map(|_| numbers.take(false).unwrap()).collect();
        for id in &ids {
            assert_eq!(shard_of_lock(*id), 5);
            table.insert(id.0, id.0);
        }
        for id in ids.iter().step_by(2) {
            assert_eq!(table.remove(&id.0), Some(id.0));
            numbers.give_back(*id);
        }
        let again: Vec<LockId> = (0..100).map(|_| numbers.take(false).unwrap()).collect();
        assert_eq!(numbers.slots, 200);
        for id in &again {
            assert!(!ids.contains(id));
            assert_eq!(table.find(&id.0), None);
            table.insert(id.0, id.0);
        }
        for id in ids.iter().skip(1).step_by(2).chain(&again) {
            assert_eq!(table.find(&id.0), Some(&id.0));
        }
        assert_eq!(table.find(&ids[0].0), None);
        assert_eq!(table.drain().count(), 200);
    }
}
