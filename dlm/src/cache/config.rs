//! The knobs of a lock cache.

use crate::LockName;
use core::time::Duration;

/// How a lock cache behaves.
#[derive(Clone, Copy, Debug)]
pub struct CacheConfig {
    /// The longest minimum hold time: how long a lock stays after its grant although another node wants it, so that
    /// some work is done with it. The time adapts between [`Self::hold_min`] and this: it grows while the lock is used
    /// much between its grant and the wish for it, and shrinks while it is not. 200 ms by default; zero gives locks up
    /// as soon as no local user has them.
    pub hold_max: Duration,
    /// The shortest; 10 ms by default, not above [`Self::hold_max`].
    pub hold_min: Duration,
    /// How often a frozen node looks whether its lease is back; 10 ms by default.
    pub frozen_poll: Duration,
    /// Which locks have a value block. Such a lock stays at NL when it is given up, so that the block survives.
    pub value_block: fn(&LockName) -> bool,
}

impl CacheConfig {
    /// Hold times of GFS2's glocks, no value blocks.
    #[must_use]
    pub fn glocks() -> Self {
        Self {
            hold_max: Duration::from_millis(200),
            hold_min: Duration::from_millis(10),
            frozen_poll: Duration::from_millis(10),
            value_block: |_| false,
        }
    }

    /// No minimum hold time: a lock goes as soon as it is wanted and not used.
    #[must_use]
    pub fn eager() -> Self {
        Self { hold_max: Duration::ZERO, hold_min: Duration::ZERO, ..Self::glocks() }
    }
}
