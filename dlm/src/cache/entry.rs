//! One cached lock: its state behind a mutex, and the calls of the lock manager.

use super::state::State;
use super::{AcquireFlags, CacheMode, Held, Inner};
use crate::deliver::lock;
use crate::{Completion, LockCallbacks, LockId, LockName, Mode};
use event_listener::Event;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

pub(crate) struct Entry {
    pub(super) name: LockName,
    pub(super) cache: Arc<Inner>,
    pub(super) state: Mutex<State>,
    /// Wakes the worker.
    pub(super) kick: Event,
}

impl core::fmt::Debug for Entry {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Entry").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Entry {
    pub(super) fn new(cache: &Arc<Inner>, name: &LockName) -> Self {
        let state = State { has_value: (cache.config.value_block)(name), ..State::default() };
        Self { name: name.clone(), cache: cache.clone(), state: Mutex::new(state), kick: Event::new() }
    }

    pub(super) fn acquire_cached(self: Arc<Self>, mode: CacheMode, flags: AcquireFlags) -> Option<Held> {
        let mut state = lock(&self.state);
        // After the state is pinned and before it is answered (R8).
        let now = self.cache.runtime.now();
        if !self.cache.lease.is_valid(now) || !state.take_cached(mode, flags, now) {
            return None;
        }
        let token = state.token;
        drop(state);
        Some(Held::new(self, mode, token, flags.no_cache))
    }

    pub(super) fn release(self: &Arc<Self>, no_cache: bool) {
        let mut state = lock(&self.state);
        assert!(0 < state.holders, "a release without a holder");
        state.holders -= 1;
        state.drop_now |= no_cache || self.cache.closing.load(Ordering::Acquire);
        if state.holders == 0 {
            state.held_as = None;
            let work =
                state.drop_now || state.recovery_only || state.wanted.is_some() || !state.queue.is_empty();
            drop(state);
            if work {
                self.kick_or_spawn();
            }
        }
    }
}

impl LockCallbacks for EntryCallbacks {
    fn completion(&self, _id: LockId, completion: Completion) {
        let entry = &self.0;
        let stopped = completion == Completion::Stopped;
        let mut state = lock(&entry.state);
        if matches!(completion, Completion::Granted(_)) {
            // What comes after this is about the new mode.
            state.wanted = None;
        }
        if stopped {
            state.stopped = Some("the lockspace has stopped".to_owned());
            state.mode = None;
            state.id = None;
        }
        if state.asking.is_some() {
            state.completion = Some(completion);
        }
        drop(state);
        if stopped {
            entry.kick_or_spawn();
        } else {
            entry.kick.notify(usize::MAX);
        }
    }

    fn blocking(&self, _id: LockId, mode: Mode) {
        let entry = &self.0;
        let mut state = lock(&entry.state);
        state.want(mode, &entry.cache.config);
        let held = 0 < state.holders;
        drop(state);
        if held {
            let by = match mode {
                Mode::CR | Mode::PR | Mode::NL => CacheMode::Shared,
                Mode::CW => CacheMode::Deferred,
                Mode::PW | Mode::EX => CacheMode::Exclusive,
            };
            entry.cache.client.wanted(&entry.name, by);
        } else {
            entry.kick_or_spawn();
        }
    }
}

/// The entry as the lock manager calls it.
#[derive(Debug)]
pub(super) struct EntryCallbacks(pub(super) Arc<Entry>);
