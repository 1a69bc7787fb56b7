//! A map from resource names, for the hot paths: found by hash, walked in the order of its slots.
//!
//! The order of a walk depends on nothing but the insertions and removals before it, so the same run is the same run. It
//! is not the order of the names: who needs that sorts. Entries never move and the map grows piece by piece, so no call
//! takes long because the map is large.

use crate::LockName;
use crate::table::name_hash;
use core::iter::Flatten;
use hashbrown::HashTable;

/// Entries that are allocated at once.
const CHUNK: usize = 64;

type Chunk<V> = Vec<Option<(LockName, V)>>;

/// The map. Its methods are those of `BTreeMap` as far as they go.
#[derive(Clone)]
pub(crate) struct NameMap<V> {
    /// The low half of a name's hash, and its slot.
    index: HashTable<(u32, u32)>,
    chunks: Vec<Chunk<V>>,
    /// Slots without an entry, the next one to use last.
    free: Vec<u32>,
}

impl<V> Default for NameMap<V> {
    fn default() -> Self {
        Self { index: HashTable::new(), chunks: Vec::new(), free: Vec::new() }
    }
}

impl<V: core::fmt::Debug> core::fmt::Debug for NameMap<V> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}

fn short_hash(name: &LockName) -> u32 {
    // The half that buckets and shards are not made from.
    (name_hash(name.as_bytes()) >> 32) as u32
}

/// Spreads the half hash over the 64 bits that the table looks at.
fn table_hash(short: u32) -> u64 {
    u64::from(short).wrapping_mul(0x9E37_79B9_7F4A_7C15)
}

fn place(slot: u32) -> (usize, usize) {
    (slot as usize / CHUNK, slot as usize % CHUNK)
}

impl<V> NameMap<V> {
    fn slot(&self, name: &LockName) -> Option<u32> {
        let short = short_hash(name);
        let is_it = |(s, slot): &(u32, u32)| *s == short && self.at(*slot).is_some_and(|(n, _)| n == name);
        self.index.find(table_hash(short), is_it).map(|(_, slot)| *slot)
    }

    fn at(&self, slot: u32) -> Option<&(LockName, V)> {
        let (chunk, index) = place(slot);
        self.chunks.get(chunk)?.get(index)?.as_ref()
    }

    fn at_mut(&mut self, slot: u32) -> Option<&mut Option<(LockName, V)>> {
        let (chunk, index) = place(slot);
        self.chunks.get_mut(chunk)?.get_mut(index)
    }

    pub(crate) fn get(&self, name: &LockName) -> Option<&V> {
        self.at(self.slot(name)?).map(|(_, value)| value)
    }

    pub(crate) fn get_mut(&mut self, name: &LockName) -> Option<&mut V> {
        let slot = self.slot(name)?;
        self.at_mut(slot)?.as_mut().map(|(_, value)| value)
    }

    /// Puts a value in; the one that was there comes back.
    pub(crate) fn insert(&mut self, name: LockName, value: V) -> Option<V> {
        if let Some(old) = self.get_mut(&name) {
            return Some(core::mem::replace(old, value));
        }
        let short = short_hash(&name);
        let slot = self.vacant();
        if let Some(room) = self.at_mut(slot) {
            *room = Some((name, value));
        }
        self.index.insert_unique(table_hash(short), (short, slot), |(s, _)| table_hash(*s));
        None
    }

    fn vacant(&mut self) -> u32 {
        if let Some(slot) = self.free.pop() {
            return slot;
        }
        if self.chunks.last().is_none_or(|c| c.len() == CHUNK) {
            self.chunks.push(Vec::with_capacity(CHUNK));
        }
        let before = (self.chunks.len() - 1) * CHUNK;
        let Some(last) = self.chunks.last_mut() else { unreachable!("one was pushed") };
        last.push(None);
        u32::try_from(before + last.len() - 1).expect("memory ends before four billion names")
    }

    pub(crate) fn remove(&mut self, name: &LockName) -> Option<V> {
        let slot = self.slot(name)?;
        let short = short_hash(name);
        if let Ok(entry) = self.index.find_entry(table_hash(short), |(_, s)| *s == slot) {
            entry.remove();
        }
        let (_, value) = self.at_mut(slot)?.take()?;
        self.free.push(slot);
        Some(value)
    }

    pub(crate) fn iter(&self) -> Iter<'_, V> {
        Iter(self.chunks.iter().flatten().flatten())
    }

    pub(crate) fn iter_mut(&mut self) -> IterMut<'_, V> {
        IterMut(self.chunks.iter_mut().flatten().flatten())
    }
}

/// A walk.
pub(crate) struct Iter<'a, V>(Flatten<Flatten<core::slice::Iter<'a, Chunk<V>>>>);

impl<'a, V> Iterator for Iter<'a, V> {
    type Item = (&'a LockName, &'a V);
    fn next(&mut self) -> Option<Self::Item> {
        self.0.next().map(|(name, value)| (name, value))
    }
}

impl<'a, V> IntoIterator for &'a NameMap<V> {
    type Item = (&'a LockName, &'a V);
    type IntoIter = Iter<'a, V>;
    fn into_iter(self) -> Iter<'a, V> {
        self.iter()
    }
}

/// A walk that may change the values.
pub(crate) struct IterMut<'a, V>(Flatten<Flatten<core::slice::IterMut<'a, Chunk<V>>>>);

impl<'a, V> Iterator for IterMut<'a, V> {
    type Item = (&'a LockName, &'a mut V);
    fn next(&mut self) -> Option<Self::Item> {
        self.0.next().map(|(name, value)| (&*name, value))
    }
}

impl<'a, V> IntoIterator for &'a mut NameMap<V> {
    type Item = (&'a LockName, &'a mut V);
    type IntoIter = IterMut<'a, V>;
    fn into_iter(self) -> IterMut<'a, V> {
        self.iter_mut()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    proptest! {
        #[test]
        fn it_holds_what_an_ordered_map_holds(steps in proptest::collection::vec((0u8..3, 0u16..300), 0..2000)) {
            let (mut map, mut model) = (NameMap::default(), BTreeMap::new());
            for (number, (what, key)) in steps.into_iter().enumerate() {
                let name = format!("{key:>40}");
                let name = LockName::new(&name.as_bytes()[usize::from(key % 30)..]).unwrap();
                match what {
                    0 => prop_assert_eq!(map.insert(name.clone(), number), model.insert(name, number)),
                    1 => prop_assert_eq!(map.remove(&name), model.remove(&name)),
                    _ => prop_assert_eq!(map.get(&name), model.get(&name)),
                }
                prop_assert_eq!(map.get(&name_of(key)).is_some(), model.contains_key(&name_of(key)));
            }
            let mut walked: Vec<_> = map.iter().map(|(n, v)| (n.clone(), *v)).collect();
            walked.sort();
            prop_assert_eq!(walked, model.into_iter().collect::<Vec<_>>());
        }
    }

    fn name_of(key: u16) -> LockName {
        LockName::new(&format!("{key:>40}").as_bytes()[usize::from(key % 30)..]).unwrap()
    }
}
