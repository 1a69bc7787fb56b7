//! What most locks and resources do not have: one word until it is written.

use core::ops::{Deref, DerefMut};

/// A type with a usual value.
pub(crate) trait Usual: Clone + PartialEq + 'static {
    /// What nobody keeps memory for.
    const USUAL: &'static Self;
}

/// A value that is nearly always the usual one. Reading is free; the first writing access takes memory.
#[derive(Clone)]
pub(crate) struct Rare<T>(Option<Box<T>>);

impl<T> Default for Rare<T> {
    fn default() -> Self {
        Self(None)
    }
}

impl<T: Usual> From<T> for Rare<T> {
    fn from(value: T) -> Self {
        Self((value != *T::USUAL).then(|| Box::new(value)))
    }
}

impl<T: Usual> Deref for Rare<T> {
    type Target = T;
    fn deref(&self) -> &T {
        self.0.as_deref().unwrap_or(T::USUAL)
    }
}

impl<T: Usual> DerefMut for Rare<T> {
    fn deref_mut(&mut self) -> &mut T {
        self.0.get_or_insert_with(|| Box::new(T::USUAL.clone()))
    }
}

impl<T: Usual + core::fmt::Debug> core::fmt::Debug for Rare<T> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        (**self).fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Usual for u64 {
        const USUAL: &'static Self = &7;
    }

    #[test]
    fn the_usual_value_takes_no_memory_and_shows_the_same() {
        let mut rare: Rare<u64> = Rare::default();
        assert_eq!((*rare, format!("{rare:?}")), (7, "7".to_owned()));
        assert!(rare.0.is_none() && Rare::from(7).0.is_none());
        *rare = 8;
        assert_eq!((*rare, *rare.clone()), (8, 8));
        assert_eq!(size_of::<Rare<[u64; 8]>>(), size_of::<usize>());
    }
}
