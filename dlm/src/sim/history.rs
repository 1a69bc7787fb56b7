//! A record of everything that the users of a lockspace asked and were told in one run, and what it must fulfil: mutual
//! exclusion, and value blocks that behave like one register each.
//!
//! Nothing here knows how the lock manager works: it sees what its users see, in the order of real time that only a
//! simulation has.
//!
//! **Exclusion.** A lock may be used from the moment its user is told of the grant until its user asks for less. No two
//! locks of one name may be usable in incompatible modes at one moment.
//!
//! **Value blocks.** Every write has a number of its own. The reads that were told as valid, and the writes, must have
//! an order in which each reads what was written last, and which puts nothing that ended before something else began
//! behind it (Herlihy and Wing, "Linearizability", 1990). A write whose user died, or whose end was never told, may be
//! in the order or not. While nobody living has a lock that uses the value block, it may go back to zero, once.
//! NL and CR shut no writer out. A life that was removed and is not fenced yet may still grant these to itself, on a name
//! that it was the master of, beside writers that it cannot hear any more: what it reads so may be as old as its removal.
//! The order is searched for as Wing and Gong do ("Testing and verifying concurrent objects", 1993), with a memory of
//! what was tried (Lowe, 2017).

use crate::machine::value::{Transfer, transfer};
use crate::{LockId, LockName, Mode};
use quorate_membership::Identity;
use std::collections::{BTreeMap, BTreeSet};

/// How many steps the search for an order may take for one name. Far above what runs need.
const STEPS_MAX: usize = 2_000_000;

/// A lock of a life.
pub type Key = (Identity, LockId);

#[derive(Clone, Debug)]
struct User {
    name: LockName,
    granted: Option<Mode>,
    usable: Option<Mode>,
    uses_value: bool,
    /// Asked for and not ended: when, the mode wanted, and the write it makes.
    pending: Option<(u64, Mode, Option<usize>)>,
    is_ending: bool,
}

/// An operation on the value block of one name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Operation {
    /// When it was asked for.
    from: u64,
    /// When its end was told; `u64::MAX`: never.
    to: u64,
    /// Reads this number, or writes it.
    action: Action,
    /// It may be left out.
    may_be_lost: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Read(u64),
    Write(u64),
}

#[derive(Debug, Default)]
struct Name {
    operations: Vec<Operation>,
    /// Locks of the living that use the value block.
    users: usize,
    /// The going back to zero that is possible now.
    reset: Option<usize>,
}

/// See the module.
#[derive(Debug, Default)]
pub struct History {
    now: u64,
    users: BTreeMap<Key, User>,
    names: BTreeMap<LockName, Name>,
    /// Lives that were removed, and when.
    removed: BTreeMap<Identity, u64>,
    /// The first two locks that excluded each other and were usable at once.
    broken: Option<String>,
}

/// What a history was found to be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// Reads of valid value blocks that were put in order.
    pub reads: u64,
    /// Writes.
    pub writes: u64,
}

impl History {
    fn tick(&mut self) -> u64 {
        self.now += 1;
        self.now
    }

    /// A new lock is asked for.
    pub fn request(&mut self, key: Key, name: &LockName, mode: Mode, uses_value: bool) {
        let now = self.tick();
        let pending = Some((now, mode, None));
        let user =
            User { name: name.clone(), granted: None, usable: None, uses_value, pending, is_ending: false };
        self.users.insert(key, user);
    }

    /// Another mode is asked for; `writes`: the number that leaving the old one writes.
    pub fn convert(&mut self, key: Key, mode: Mode, uses_value: bool, writes: Option<u64>) {
        let now = self.tick();
        let Some(user) = self.users.get_mut(&key) else { return };
        let Some(granted) = user.granted else { return };
        if granted.is_covering(mode) {
            user.usable = Some(mode);
        } else if !mode.is_covering(granted) {
            // Not told which of the two it has until the end: NL is below both.
            user.usable = Some(Mode::NL);
        }
        user.uses_value |= uses_value;
        let writes = writes.filter(|_| transfer(Some(granted), mode) == Transfer::Write);
        let name = user.name.clone();
        let write = writes.map(|number| self.write(&name, now, number));
        if let Some(user) = self.users.get_mut(&key) {
            user.pending = Some((now, mode, write));
        }
    }

    /// The end is asked for.
    pub fn unlock(&mut self, key: Key, writes: Option<u64>) {
        let now = self.tick();
        let Some(user) = self.users.get_mut(&key) else { return };
        let leaves = user.granted;
        (user.usable, user.is_ending) = (None, true);
        let name = user.name.clone();
        let counts = core::mem::take(&mut user.uses_value) && leaves.is_some();
        if let Some(number) = writes.filter(|_| leaves.is_some_and(|g| Mode::PW <= g)) {
            let write = self.write(&name, now, number);
            if let Some(user) = self.users.get_mut(&key) {
                // A conversion that the unlock overtakes may have been carried out; its write stays doubtful.
                user.pending = Some((now, Mode::NL, Some(write)));
            }
        }
        if counts {
            self.user_less(&name, now);
        }
    }

    /// A grant is told, with the number read if there is a valid one.
    pub fn granted(&mut self, key: Key, mode: Mode, read: Option<u64>) {
        let now = self.tick();
        let Some(user) = self.users.get_mut(&key) else { return };
        let pending = user.pending.take();
        let is_new = user.granted.is_none();
        user.granted = Some(mode);
        if !user.is_ending {
            user.usable = Some(mode);
        }
        let (name, counts) = (user.name.clone(), is_new && user.uses_value && !user.is_ending);
        if let Some((from, _, write)) = pending {
            let operations = &mut self.names.entry(name.clone()).or_default().operations;
            if let Some(operation) = write.and_then(|w| operations.get_mut(w)) {
                (operation.to, operation.may_be_lost) = (now, false);
            }
            if let Some(number) = read {
                let removed = self.removed.get(&key.0).filter(|_| Mode::PW.is_compatible(mode));
                let from = removed.map_or(from, |at| from.min(*at));
                let operation = Operation { from, to: now, action: Action::Read(number), may_be_lost: false };
                operations.push(operation);
            }
        }
        if counts {
            self.user_more(&name, now);
        }
        self.check(key);
    }

    /// A request or a conversion ended without a grant.
    pub fn refused(&mut self, key: Key) {
        self.tick();
        let Some(user) = self.users.get_mut(&key) else { return };
        let write = user.pending.take().and_then(|(_, _, write)| write);
        if user.granted.is_none() {
            self.users.remove(&key);
            return;
        }
        if !user.is_ending {
            user.usable = user.granted;
        }
        let name = user.name.clone();
        if let Some(operation) = write.and_then(|w| self.names.entry(name).or_default().operations.get_mut(w))
        {
            // It was never carried out.
            operation.to = operation.from;
        }
        self.check(key);
    }

    /// The end is told.
    pub fn unlocked(&mut self, key: Key) {
        let now = self.tick();
        let Some(user) = self.users.remove(&key) else { return };
        if let Some((_, Mode::NL, Some(write))) = user.pending.filter(|_| user.is_ending)
            && let Some(operation) = self.names.entry(user.name).or_default().operations.get_mut(write)
        {
            (operation.to, operation.may_be_lost) = (now, false);
        }
    }

    /// The members have removed a life. It may not know yet.
    pub fn removed(&mut self, who: Identity) {
        let now = self.tick();
        self.removed.entry(who).or_insert(now);
    }

    /// A life does not act any more: it crashed, or its lease is over.
    pub fn died(&mut self, who: Identity) {
        let now = self.tick();
        let gone: Vec<Key> = self.users.keys().filter(|(w, _)| *w == who).copied().collect();
        for key in gone {
            if let Some(user) = self.users.remove(&key)
                && user.uses_value
                && user.granted.is_some()
            {
                self.user_less(&user.name, now);
            }
        }
    }

    fn write(&mut self, name: &LockName, from: u64, number: u64) -> usize {
        let operations = &mut self.names.entry(name.clone()).or_default().operations;
        operations.push(Operation { from, to: u64::MAX, action: Action::Write(number), may_be_lost: true });
        operations.len() - 1
    }

    fn user_more(&mut self, name: &LockName, now: u64) {
        let entry = self.names.entry(name.clone()).or_default();
        entry.users += 1;
        if let Some(operation) = entry.reset.take().and_then(|at| entry.operations.get_mut(at)) {
            operation.to = now;
        }
    }

    fn user_less(&mut self, name: &LockName, now: u64) {
        let entry = self.names.entry(name.clone()).or_default();
        entry.users = entry.users.saturating_sub(1);
        if entry.users == 0 {
            entry.reset = Some(entry.operations.len());
            let action = Action::Write(0);
            entry.operations.push(Operation { from: now, to: u64::MAX, action, may_be_lost: true });
        }
    }

    fn check(&mut self, key: Key) {
        let Some(user) = self.users.get(&key) else { return };
        let Some(mode) = user.usable else { return };
        let others = self.users.iter().filter(|(k, u)| **k != key && u.name == user.name);
        for (other, theirs) in others {
            if self.broken.is_none() && theirs.usable.is_some_and(|m| !m.is_compatible(mode)) {
                let (a, b) = ((key.0, mode), (other.0, theirs.usable));
                self.broken =
                    Some(format!("history: exclusion: {} is usable by {a:?} and by {b:?}", user.name));
                break;
            }
        }
    }

    /// Looks at the whole of it.
    ///
    /// # Errors
    /// What is wrong, beginning with `history: exclusion: ` or `history: value: `.
    pub fn judge(&self) -> Result<Found, String> {
        if let Some(broken) = &self.broken {
            return Err(broken.clone());
        }
        let mut found = Found::default();
        for (name, entry) in &self.names {
            let reads = |o: &&Operation| matches!(o.action, Action::Read(_));
            let count = entry.operations.iter().filter(reads).count() as u64;
            found.reads += count;
            found.writes += entry.operations.len() as u64 - count;
            order(&entry.operations).map_err(|stuck| format!("history: value: {name}: {stuck}"))?;
        }
        Ok(found)
    }
}

/// One way to go on.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
struct State {
    /// All operations below are in the order, or left out.
    base: usize,
    /// Those above that are.
    done: BTreeSet<usize>,
    value: u64,
    /// The latest beginning of all that are in the order: what ended before it cannot come any more.
    latest: u64,
}

/// Searches an order; an error names where every attempt got stuck.
fn order(operations: &[Operation]) -> Result<(), String> {
    let mut all: Vec<Operation> =
        operations.iter().copied().filter(|o| o.from < o.to || !o.may_be_lost).collect();
    all.sort_by_key(|o| o.from);
    let mut tried: BTreeSet<State> = BTreeSet::new();
    let mut open = vec![State { base: 0, done: BTreeSet::new(), value: 0, latest: 0 }];
    let (mut furthest, mut steps) = (0, 0);
    while let Some(mut state) = open.pop() {
        state.settle(&all);
        if state.base == all.len() {
            return Ok(());
        }
        furthest = furthest.max(state.base);
        if !tried.insert(state.clone()) {
            continue;
        }
        steps += 1;
        if STEPS_MAX < steps {
            return Err(format!("no order found in {STEPS_MAX} steps of {} operations", all.len()));
        }
        for at in state.candidates(&all) {
            open.push(state.with(at, &all));
        }
    }
    let near: Vec<&Operation> = all.iter().skip(furthest.saturating_sub(3)).take(8).collect();
    Err(format!("operation {furthest} of {} fits nowhere; around it: {near:?}", all.len()))
}

impl State {
    /// Operations that may come next: nothing that must be in the order ended before they began.
    fn candidates(&self, all: &[Operation]) -> Vec<usize> {
        let mut out = Vec::new();
        let mut first_end = u64::MAX;
        for (at, operation) in all.iter().enumerate().skip(self.base) {
            if first_end < operation.from {
                break;
            }
            if self.done.contains(&at) {
                continue;
            }
            if !operation.may_be_lost {
                first_end = first_end.min(operation.to);
            }
            let is_late = operation.to < self.latest;
            let fits = match operation.action {
                Action::Read(number) => number == self.value,
                Action::Write(_) => true,
            };
            if fits && !is_late {
                out.push(at);
            }
        }
        out
    }

    fn with(&self, at: usize, all: &[Operation]) -> Self {
        let mut next = self.clone();
        next.take(at, all);
        next
    }

    fn take(&mut self, at: usize, all: &[Operation]) {
        let Some(operation) = all.get(at) else { return };
        self.done.insert(at);
        self.latest = self.latest.max(operation.from);
        if let Action::Write(number) = operation.action {
            self.value = number;
        }
    }

    /// Takes every read that fits, which never hurts; then moves the base over what is done, or can only be left out.
    fn settle(&mut self, all: &[Operation]) {
        loop {
            let fits = |at: &usize| all.get(*at).is_some_and(|o| matches!(o.action, Action::Read(_)));
            match self.candidates(all).into_iter().find(fits) {
                Some(at) => self.take(at, all),
                None => break,
            }
        }
        while let Some(operation) = all.get(self.base) {
            let is_out = operation.may_be_lost && operation.to < self.latest;
            // The rest may be left out as it is.
            let only_lost =
                all.iter().enumerate().skip(self.base).all(|(i, o)| o.may_be_lost || self.done.contains(&i));
            if only_lost {
                self.base = all.len();
                self.done.clear();
                return;
            }
            if !self.done.remove(&self.base) && !is_out {
                return;
            }
            self.base += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use quorate_membership::{Incarnation, NodeId};

    fn key(node: u32, id: u64) -> Key {
        (Identity::new(NodeId(node), Incarnation(1)), LockId(id))
    }

    fn name() -> LockName {
        LockName::new(b"r").unwrap_or_else(|_| unreachable!())
    }

    fn lock(history: &mut History, key: Key, mode: Mode, read: u64) {
        history.request(key, &name(), mode, true);
        history.granted(key, mode, Some(read));
    }

    #[test]
    fn two_exclusive_locks_at_once_are_seen_and_one_after_the_other_is_not() {
        let mut history = History::default();
        lock(&mut history, key(1, 1), Mode::EX, 0);
        history.convert(key(1, 1), Mode::NL, true, Some(7));
        // The answer may come later than the other's grant.
        lock(&mut history, key(2, 2), Mode::EX, 7);
        history.granted(key(1, 1), Mode::NL, None);
        assert_eq!(history.judge(), Ok(Found { reads: 2, writes: 1 }));
        lock(&mut history, key(3, 3), Mode::PR, 7);
        assert!(history.judge().is_err_and(|e| e.starts_with("history: exclusion: r is usable by")));
    }

    #[test]
    fn a_read_of_what_was_overwritten_is_seen() {
        let mut history = History::default();
        lock(&mut history, key(1, 1), Mode::EX, 0);
        for number in [5, 6] {
            history.convert(key(1, 1), Mode::NL, true, Some(number));
            history.granted(key(1, 1), Mode::NL, None);
            history.convert(key(1, 1), Mode::EX, true, None);
            history.granted(key(1, 1), Mode::EX, Some(number));
        }
        assert!(history.judge().is_ok());
        history.convert(key(1, 1), Mode::NL, true, None);
        history.granted(key(1, 1), Mode::NL, None);
        lock(&mut history, key(2, 2), Mode::PR, 5);
        assert!(history.judge().is_err_and(|e| e.starts_with("history: value: r: ")));
    }

    #[test]
    fn what_a_removed_life_reads_unprotected_may_be_as_old_as_its_removal_and_no_older() {
        let run = |mode: Mode, writes_before: bool| {
            let mut history = History::default();
            lock(&mut history, key(1, 1), Mode::PW, 0);
            lock(&mut history, key(2, 2), Mode::NL, 0);
            let write = |history: &mut History| {
                history.convert(key(1, 1), Mode::NL, true, Some(5));
                history.granted(key(1, 1), Mode::NL, None);
            };
            if writes_before {
                write(&mut history);
            }
            history.removed(key(2, 2).0);
            if !writes_before {
                write(&mut history);
            }
            history.convert(key(2, 2), mode, true, None);
            history.granted(key(2, 2), mode, Some(0));
            history.judge().is_ok()
        };
        assert!(run(Mode::CR, false), "the old master cannot know");
        assert!(!run(Mode::CR, true) && !run(Mode::PR, false));
    }

    #[test]
    fn a_write_without_an_end_is_there_or_not_but_not_both() {
        let both = |first: u64, second: u64| {
            let mut history = History::default();
            lock(&mut history, key(9, 9), Mode::NL, 0);
            lock(&mut history, key(1, 1), Mode::EX, 0);
            history.convert(key(1, 1), Mode::NL, true, Some(5));
            history.died(key(1, 1).0);
            for (id, read) in [(2, first), (3, second)] {
                lock(&mut history, key(2, id), Mode::PR, read);
            }
            history.judge().is_ok()
        };
        assert!(both(0, 0) && both(5, 5) && both(0, 5) && !both(5, 0));
    }

    #[test]
    fn zero_comes_back_only_while_nobody_has_the_name() {
        let run = |has_keeper: bool| {
            let mut history = History::default();
            if has_keeper {
                lock(&mut history, key(9, 9), Mode::NL, 0);
            }
            lock(&mut history, key(1, 1), Mode::EX, 0);
            history.unlock(key(1, 1), Some(4));
            history.unlocked(key(1, 1));
            lock(&mut history, key(2, 2), Mode::PR, 0);
            history.judge().is_ok()
        };
        assert!(run(false) && !run(true));
    }
}
