//! A small seeded generator (SplitMix64, Steele, Lea and Flood, OOPSLA 2014): the same seed gives the same run.

use core::time::Duration;

/// Draws everything that is random in a simulation.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// The generator of this seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// A generator for a part of the simulation, so that drawing more there changes nothing here.
    #[must_use]
    pub fn child(&mut self) -> Self {
        Self(self.next_u64())
    }

    /// 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number below `n`.
    ///
    /// # Panics
    /// If `n` is zero.
    pub fn below(&mut self, n: u64) -> u64 {
        assert!(0 < n, "there is no number below zero");
        self.next_u64() % n
    }

    /// True in `parts_per_million` of a million cases.
    pub fn chance_ppm(&mut self, parts_per_million: u32) -> bool {
        self.below(1_000_000) < u64::from(parts_per_million)
    }

    /// A duration from `low` up to, not including, `high`; `low` if they are equal.
    pub fn duration(&mut self, low: Duration, high: Duration) -> Duration {
        let span = high.saturating_sub(low).as_nanos();
        let span = u64::try_from(span).unwrap_or(u64::MAX);
        low + Duration::from_nanos(if span == 0 { 0 } else { self.below(span) })
    }

    /// One of `items`, or nothing if there are none.
    pub fn pick<'a, T>(&mut self, items: &'a [T]) -> Option<&'a T> {
        if items.is_empty() { None } else { items.get(self.below(items.len() as u64) as usize) }
    }
}
