//! A hash table with a fixed seed and no iteration, for the hot paths: the same run is the same run.

use core::hash::{BuildHasherDefault, Hash, Hasher};

/// Hashes eight bytes at a time by multiplication; the finish mixes high bits into low ones.
///
/// Not for keys that an enemy chooses in order to collide: those who may send lock names hold a certificate.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct FixedHasher(u64);

const K: u64 = 0x9E37_79B9_7F4A_7C15;

impl FixedHasher {
    fn add(&mut self, word: u64) {
        self.0 = (self.0.rotate_left(26) ^ word).wrapping_mul(K);
    }
}

impl Hasher for FixedHasher {
    fn write(&mut self, bytes: &[u8]) {
        let (chunks, rest) = bytes.as_chunks::<8>();
        for chunk in chunks {
            self.add(u64::from_le_bytes(*chunk));
        }
        let mut last = rest.len() as u64;
        for byte in rest {
            last = (last << 8) | u64::from(*byte);
        }
        self.add(last);
    }
    fn write_u64(&mut self, n: u64) {
        self.add(n);
    }
    fn write_usize(&mut self, n: usize) {
        self.add(n as u64);
    }
    fn finish(&self) -> u64 {
        let h = self.0 ^ (self.0 >> 32);
        let h = h.wrapping_mul(K);
        h ^ (h >> 29)
    }
}

/// The hash of a name, the same on every node and in every release of one protocol version.
pub(crate) fn name_hash(name: &[u8]) -> u64 {
    let mut hasher = FixedHasher::default();
    hasher.write(name);
    hasher.finish()
}

/// The table.
#[derive(Clone, Debug)]
#[expect(clippy::disallowed_types, reason = "fixed hasher, and iteration is not offered")]
pub(crate) struct Table<K, V>(std::collections::HashMap<K, V, BuildHasherDefault<FixedHasher>>);

impl<K, V> Default for Table<K, V> {
    fn default() -> Self {
        Self(Default::default())
    }
}

impl<K: Hash + Eq, V> Table<K, V> {
    pub(crate) fn find<Q: Hash + Eq + ?Sized>(&self, key: &Q) -> Option<&V>
    where
        K: core::borrow::Borrow<Q>,
    {
        self.0.get(key)
    }
    pub(crate) fn find_mut<Q: Hash + Eq + ?Sized>(&mut self, key: &Q) -> Option<&mut V>
    where
        K: core::borrow::Borrow<Q>,
    {
        self.0.get_mut(key)
    }
    pub(crate) fn insert(&mut self, key: K, value: V) -> Option<V> {
        self.0.insert(key, value)
    }
    pub(crate) fn remove<Q: Hash + Eq + ?Sized>(&mut self, key: &Q) -> Option<V>
    where
        K: core::borrow::Borrow<Q>,
    {
        self.0.remove(key)
    }
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_of_a_name_never_changes() {
        // Nodes of different builds must agree on it.
        assert_eq!(name_hash(b""), 0);
        assert_eq!(name_hash(b"resource 1"), 9_736_637_837_580_698_341);
        let mut buckets = [0u32; 16];
        for i in 0..16_000u32 {
            buckets[(name_hash(format!("  {i:8x}").as_bytes()) % 16) as usize] += 1;
        }
        assert!(buckets.iter().all(|n| (800..1200).contains(n)), "{buckets:?}");
    }
}
