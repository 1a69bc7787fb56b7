//! What must hold after every step of a simulation, each in a file of its own.

mod exclusion;
mod held;
mod one_master;
mod token;
mod value;

use crate::sim::world::World;
use quorate_dlm::LockName;

/// What invariants look at.
pub(crate) struct Watched<'a> {
    pub(crate) world: &'a World,
}

/// All invariants of one run.
pub(crate) struct Checks {
    pub(crate) has_holds: bool,
    pub(crate) value: value::ValueNeverGoesBack,
    pub(crate) tokens: token::TokensRise,
    pub(crate) held: held::HeldUntilReleased,
    steps: u64,
}

impl Checks {
    pub(crate) fn new(has_holds: bool) -> Self {
        Self {
            has_holds,
            value: Default::default(),
            tokens: Default::default(),
            held: held::HeldUntilReleased::new(has_holds),
            steps: 0,
        }
    }

    pub(crate) fn check(&mut self, watched: &Watched<'_>) {
        self.steps += 1;
        let usable = exclusion::check(watched);
        self.value.check(watched, &usable);
        if self.steps.is_multiple_of(16) {
            one_master::check(watched);
        }
    }

    /// Names that a failure does not touch wait for nothing (R13).
    pub(crate) fn untouched(&self, name: &LockName, was_granted_at_once: bool) {
        assert!(was_granted_at_once, "untouched: {name} is mastered here, used by nobody else, and waits");
    }
}
