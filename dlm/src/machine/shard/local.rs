//! This node's own locks: what they have, what they wait for, and where their master is.

use super::{Output, Shard};
use crate::bug::Bug;
use crate::machine::posix::POSIX_BY_RANGE;
use crate::machine::rare::{Rare, Usual};
use crate::machine::value::{Transfer, transfer};
use crate::machine::{self, LockKey};
use crate::wire::{Generation, Message, Numbered, Operation};
use crate::{
    Completion, ConvertRequest, FencingToken, Flags, LockError, LockId, LockName, LockRequest, Mode, Range,
    UnlockRequest, ValueBlock,
};
use quorate_membership::{Epoch, Identity, Instant};
use std::collections::BTreeSet;
use thin_vec::{ThinVec, thin_vec};

/// Where a name's master is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// The directory is being asked; it should not name this mastership again.
    Looking { stale: Option<Generation> },
    /// Here.
    Here,
    /// There.
    At { master: Identity, generation: Generation },
    /// Its master is giving it to another node: nothing is told to either until that is done (R15).
    Frozen,
    /// Its master is gone; our locks are registered with the owner of its bucket, who will say.
    Recovering,
}

/// Lock numbers, lowest first. Most names have one lock, and that number needs no memory of its own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) enum LockIds {
    #[default]
    None,
    One(LockId),
    /// Two or more, or fewer if there were two once.
    Many(ThinVec<LockId>),
}

impl LockIds {
    pub(super) fn insert(&mut self, id: LockId) {
        match self {
            Self::None => *self = Self::One(id),
            Self::One(one) if *one == id => {}
            Self::One(one) => *self = Self::Many(thin_vec![(*one).min(id), (*one).max(id)]),
            Self::Many(ids) => {
                if let Err(at) = ids.binary_search(&id) {
                    ids.insert(at, id);
                }
            }
        }
    }

    pub(super) fn remove(&mut self, id: &LockId) {
        match self {
            Self::One(one) if one == id => *self = Self::None,
            Self::None | Self::One(_) => {}
            Self::Many(ids) => {
                if let Ok(at) = ids.binary_search(id) {
                    ids.remove(at);
                }
                if ids.is_empty() {
                    *self = Self::None;
                }
            }
        }
    }

    fn as_slice(&self) -> &[LockId] {
        match self {
            Self::None => &[],
            Self::One(one) => core::slice::from_ref(one),
            Self::Many(ids) => ids,
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.as_slice().is_empty()
    }

    pub(super) fn iter(&self) -> core::slice::Iter<'_, LockId> {
        self.as_slice().iter()
    }
}

impl<'a> IntoIterator for &'a LockIds {
    type Item = &'a LockId;
    type IntoIter = core::slice::Iter<'a, LockId>;
    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

/// A name on which this node has or wants locks, or had some shortly before.
#[derive(Clone, Debug)]
pub(super) struct LocalName {
    /// `None`: this node is its master.
    elsewhere: Option<Box<Elsewhere>>,
    pub(super) locks: LockIds,
}

const _: () = assert!(size_of::<Option<LocalName>>() == 24, "a name that is mastered here is short");

/// A name with a master elsewhere, or none that is known.
#[derive(Clone, Debug)]
pub(super) struct Elsewhere {
    place: Place,
    /// Since when this node has no locks on it; where its master is stays known for a while.
    pub(super) idle_since: Instant,
    /// It is among those that are forgotten when their time is over.
    pub(super) is_queued: bool,
}

impl LocalName {
    pub(super) fn new(place: Place, id: LockId) -> Self {
        let mut local = Self { elsewhere: None, locks: LockIds::One(id) };
        local.set_place(place);
        local
    }

    /// Without locks.
    pub(super) fn at(place: Place) -> Self {
        let mut local = Self { elsewhere: None, locks: LockIds::None };
        local.set_place(place);
        local
    }

    /// Without locks, while the directory is asked for another than this mastership.
    pub(super) fn looking(stale: Generation) -> Self {
        Self::at(Place::Looking { stale: Some(stale) })
    }

    /// Where its master is.
    pub(super) fn place(&self) -> Place {
        self.elsewhere.as_ref().map_or(Place::Here, |e| e.place)
    }

    pub(super) fn set_place(&mut self, place: Place) {
        match &mut self.elsewhere {
            elsewhere if place == Place::Here => *elsewhere = None,
            Some(elsewhere) => elsewhere.place = place,
            none => {
                let idle_since = Instant::default();
                *none = Some(Box::new(Elsewhere { place, idle_since, is_queued: false }));
            }
        }
    }

    /// What there is to remember while its master is elsewhere.
    pub(super) fn elsewhere(&mut self) -> Option<&mut Elsewhere> {
        self.elsewhere.as_deref_mut()
    }
}

/// An operation without an answer.
#[derive(Clone, Debug)]
pub(super) struct Underway {
    pub(super) numbered: Numbered,
    /// Given to the master that `place` names.
    pub(super) is_sent: bool,
    /// The first map for which it was registered.
    pub(super) since: Option<Epoch>,
    /// When it was asked for.
    pub(super) at: Instant,
}

/// What a holder knows of the value block.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct ValueCopy {
    pub(super) value: Option<ValueBlock>,
    /// How often it was written until then.
    pub(super) sequence: u64,
    pub(super) invalid: bool,
    /// See [`crate::wire::Relock`].
    pub(super) fresh: bool,
    pub(super) clean: bool,
}

impl Usual for ValueCopy {
    const USUAL: &'static Self =
        &Self { value: None, sequence: 0, invalid: false, fresh: false, clean: false };
}

/// One lock of this node.
#[derive(Clone, Debug)]
pub(super) struct LocalLock {
    pub(super) name: LockName,
    pub(super) owner: u64,
    /// A piece of a POSIX owner, or a request for one.
    pub(super) posix: bool,
    pub(super) range: Range,
    pub(super) granted: Option<Mode>,
    pub(super) token: FencingToken,
    pub(super) recovery: bool,
    /// Of the value block, if it uses that.
    pub(super) copy: Rare<ValueCopy>,
    pub(super) operations: ThinVec<Underway>,
    next_op: u32,
}

impl Shard {
    /// A new lock with a number that was never used before; an adopted orphan has another number.
    ///
    /// # Errors
    /// See [`LockError`]; nothing changed.
    pub(crate) fn request(
        &mut self,
        now: Instant,
        id: LockId,
        request: LockRequest,
        out: &mut Vec<Output>,
    ) -> Result<LockId, LockError> {
        self.now = now;
        machine::check_request(&request)?;
        if !self.is_member() || self.leaving.is_some() || self.moves.leaves_after {
            return Err(LockError::Stopped);
        }
        if request.flags.has(Flags::ORPHAN) {
            return self.adopt(&request, out);
        }
        if self.request_fast(id, &request, out) {
            return Ok(id);
        }
        let LockRequest { name, mode, range, flags, owner, timeout, priority } = request;
        let lock = LocalLock {
            name: name.clone(),
            owner,
            posix: flags.has(Flags::POSIX),
            range,
            granted: None,
            token: FencingToken::default(),
            recovery: false,
            copy: Rare::default(),
            operations: ThinVec::new(),
            next_op: 0,
        };
        self.locks.insert(id.0, lock);
        self.lock_count += 1;
        self.owners.add(owner, id, flags);
        if let Some(local) = self.names.local_mut(&name) {
            local.locks.insert(id);
        } else {
            let is_here = self.names.is_mastered(&name);
            let place = if is_here { Place::Here } else { Place::Looking { stale: None } };
            self.names.put_local(name.clone(), LocalName::new(place, id));
            if !is_here {
                self.look_up(&name, None, out);
            }
        }
        self.start(id, Operation::New { mode, range, flags, owner, priority }, out);
        self.limit(id, timeout);
        self.drain(out);
        Ok(id)
    }

    /// Another mode.
    ///
    /// # Errors
    /// See [`LockError`]; nothing changed.
    pub(crate) fn convert(
        &mut self,
        now: Instant,
        id: LockId,
        request: ConvertRequest,
        out: &mut Vec<Output>,
    ) -> Result<(), LockError> {
        self.now = now;
        let lock = self.locks.find(&id.0).ok_or(LockError::NotFound)?;
        if lock.posix {
            return Err(LockError::Invalid(POSIX_BY_RANGE));
        }
        let granted = lock.granted.filter(|_| lock.operations.is_empty()).ok_or(LockError::Busy)?;
        machine::check_convert(granted, lock.range, &request, self.config.value_bytes)?;
        let ConvertRequest { mode, range, flags, value, timeout, priority } = request;
        self.owners.note(lock.owner, id, flags);
        self.start(id, Operation::Convert { mode, range, flags, value, priority }, out);
        self.limit(id, timeout);
        self.drain(out);
        Ok(())
    }

    /// The end of a lock.
    ///
    /// # Errors
    /// See [`LockError`]; nothing changed.
    pub(crate) fn unlock(
        &mut self,
        now: Instant,
        id: LockId,
        request: UnlockRequest,
        out: &mut Vec<Output>,
    ) -> Result<(), LockError> {
        self.now = now;
        if self.unlock_fast(id, &request, out) {
            return Ok(());
        }
        let lock = self.locks.find(&id.0).ok_or(LockError::NotFound)?;
        machine::check_unlock(lock.granted, &request, self.config.value_bytes)?;
        if lock.is_ending() {
            return Err(LockError::Busy);
        }
        if lock.granted.is_none() && lock.operations.iter().all(Underway::is_untold) {
            self.end(id);
            out.push(Output::Done { id, completion: Completion::Unlocked });
            return Ok(());
        }
        let UnlockRequest { flags, value } = request;
        self.start(id, Operation::Unlock { flags, value }, out);
        self.drain(out);
        Ok(())
    }

    /// Withdraws what a lock waits for.
    ///
    /// # Errors
    /// See [`LockError`]; nothing changed.
    pub(crate) fn cancel(
        &mut self,
        now: Instant,
        id: LockId,
        out: &mut Vec<Output>,
    ) -> Result<(), LockError> {
        self.now = now;
        let lock = self.locks.find_mut(&id.0).ok_or(LockError::NotFound)?;
        let [only] = lock.operations.as_slice() else { return Ok(()) };
        if matches!(only.numbered.operation, Operation::Unlock { .. }) {
            return Ok(());
        }
        if only.is_untold() {
            let op = only.numbered.op;
            self.apply_done(id, op, Completion::Cancelled, 0, out);
            return Ok(());
        }
        self.start(id, Operation::Cancel, out);
        self.drain(out);
        Ok(())
    }

    /// Numbers an operation and gives it to the master, if that is known.
    pub(super) fn start(&mut self, id: LockId, operation: Operation, out: &mut Vec<Output>) {
        let Some(lock) = self.locks.find_mut(&id.0) else { return };
        lock.next_op += 1;
        let numbered = Numbered { op: lock.next_op, operation };
        // Nearly always the only one.
        lock.operations.reserve_exact(1);
        lock.operations.push(Underway { numbered, is_sent: false, since: None, at: self.now });
        self.pass_on(id, out);
    }

    /// Gives the master those operations of a lock that it has not got.
    pub(super) fn pass_on(&mut self, id: LockId, out: &mut Vec<Output>) {
        if self.has_bug(Bug::StopEverything) && !self.is_ready {
            return;
        }
        let Some(name) = self.locks.find(&id.0).map(|l| l.name.clone()) else { return };
        let Some(place) = self.names.local(&name).map(LocalName::place) else { return };
        let is_here = match place {
            Place::Here => true,
            Place::At { .. } => false,
            Place::Looking { .. } | Place::Frozen | Place::Recovering => return,
        };
        let mut due = Vec::new();
        if let Some(lock) = self.locks.find_mut(&id.0) {
            for underway in lock.operations.iter_mut().filter(|u| u.is_untold()) {
                underway.is_sent = true;
                due.push(underway.numbered.clone());
            }
        }
        for numbered in due {
            if is_here {
                self.stats.local += 1;
                self.operate(&name, LockKey { node: self.config.me, id }, numbered, out);
            } else if let Place::At { master, generation } = place {
                self.stats.out += 1;
                self.send(master, Message::Operate { name: name.clone(), generation, id, numbered }, out);
            }
        }
    }

    /// The same for all locks on a name.
    pub(super) fn pass_on_all(&mut self, name: &LockName, out: &mut Vec<Output>) {
        let locks: Vec<LockId> = self.names.local(name).into_iter().flat_map(|n| &n.locks).copied().collect();
        for id in locks {
            self.pass_on(id, out);
        }
    }

    pub(super) fn is_looking(&self, name: &LockName) -> bool {
        self.names.local(name).is_some_and(|n| matches!(n.place(), Place::Looking { .. }))
    }

    pub(super) fn is_from_master(&self, from: Identity, id: LockId) -> bool {
        let Some(name) = self.locks.find(&id.0).map(|l| &l.name) else { return false };
        match self.names.local(name).map(LocalName::place) {
            Some(Place::At { master, .. }) => master == from,
            Some(Place::Frozen) => self.moves.giver_of(name) == Some(from),
            _ => false,
        }
    }

    pub(super) fn on_lookup_reply(
        &mut self,
        map: Epoch,
        name: LockName,
        (master, generation): (Identity, Generation),
        floor: u64,
        assumed: BTreeSet<Identity>,
        out: &mut Vec<Output>,
    ) {
        // Under an older map: the directory may have moved since, and was asked again.
        if map != self.map || !self.is_looking(&name) {
            return;
        }
        // It may have been rebuilt here while we asked, or moved here.
        let is_here = master == self.config.me || self.names.is_mastered(&name);
        if is_here && !self.names.is_mastered(&name) {
            self.become_master(&name, generation, floor, &assumed);
        }
        let Some(local) = self.names.local_mut(&name) else { return };
        local.set_place(if is_here { Place::Here } else { Place::At { master, generation } });
        let is_empty = local.locks.is_empty();
        self.release_again(&name, out);
        if is_empty {
            self.names.take_local(&name);
        } else {
            self.pass_on_all(&name, out);
        }
        self.unpark(&name, out);
        self.note_use(&name);
    }

    pub(super) fn on_moved(
        &mut self,
        from: Identity,
        name: &LockName,
        generation: Generation,
        out: &mut Vec<Output>,
    ) {
        let Some(local) = self.names.local_mut(name) else { return };
        if local.place() != (Place::At { master: from, generation }) {
            return;
        }
        if local.locks.is_empty() && !self.released.contains_key(name) {
            self.names.take_local(name);
            return;
        }
        local.set_place(Place::Looking { stale: Some(generation) });
        for id in &local.locks {
            if let Some(lock) = self.locks.find_mut(&id.0) {
                for underway in &mut lock.operations {
                    underway.is_sent = false;
                }
            }
        }
        self.look_up(name, Some(generation), out);
    }

    /// An answer of the master.
    pub(super) fn apply_done(
        &mut self,
        id: LockId,
        op: u32,
        completion: Completion,
        value_sequence: u64,
        out: &mut Vec<Output>,
    ) {
        let Some(lock) = self.locks.find_mut(&id.0) else { return };
        let Some(at) = lock.operations.iter().position(|u| u.numbered.op == op) else { return };
        let underway = lock.operations.remove(at);
        self.stats.ended(&completion, self.now.since(underway.at));
        let completion = self.withdrawals.ended(id, op, completion);
        let mut posix = None;
        if let Completion::Granted(grant) = &completion {
            if !lock.posix {
                lock.grant(&underway.numbered.operation, grant, value_sequence);
            } else if !underway.numbered.operation.is_test() {
                posix = Some((grant.mode, grant.token));
            }
        }
        // A cancel has no answer of its own: it ends with what it was for.
        while lock.operations.first().is_some_and(|u| u.numbered.operation == Operation::Cancel) {
            lock.operations.remove(0);
        }
        if lock.operations.is_empty() {
            // A lock that waits for nothing keeps no memory for it.
            lock.operations = ThinVec::new();
        }
        if let Some(cut) = posix {
            self.apply_posix(id, cut);
        }
        let Some(lock) = self.locks.find(&id.0) else { return };
        let is_over = completion == Completion::Unlocked || lock.granted.is_none();
        // What an unlock has overtaken is not told: the lock may be somebody else's by now.
        let is_overtaken = completion != Completion::Unlocked && lock.is_ending();
        if !is_overtaken {
            out.push(Output::Done { id, completion });
        } else if is_over {
            // The unlock that follows finds nothing any more.
            out.push(Output::Done { id, completion: Completion::Unlocked });
        }
        if is_over {
            self.end(id);
        }
    }

    pub(super) fn end(&mut self, id: LockId) {
        let Some(lock) = self.locks.remove(&id.0) else { return };
        self.lock_count -= 1;
        self.owners.remove(lock.owner, id, &lock.name);
        let Some(local) = self.names.local_mut(&lock.name) else { return };
        local.locks.remove(&id);
        if !local.locks.is_empty() {
            return;
        }
        match local.place() {
            // While we ask, others may know already that the answer is "you".
            Place::Looking { .. } => {}
            Place::Recovering => {
                self.names.take_local(&lock.name);
                self.forget_frozen(&lock.name);
            }
            // Forgotten with the mastery, or when it has moved.
            Place::Here | Place::Frozen => {}
            Place::At { .. } => {
                let Some(elsewhere) = local.elsewhere() else { return };
                elsewhere.idle_since = self.now;
                if !core::mem::replace(&mut elsewhere.is_queued, true) {
                    self.idle.push_back((self.now, lock.name));
                }
            }
        }
    }

    /// The mode a lock may be used in right now: what it is giving up does not count.
    #[cfg(any(test, feature = "sim"))]
    pub(crate) fn usable(&self) -> Vec<(LockId, LockName, Mode, Range)> {
        let ids: Vec<LockId> = self.names.all_local().flat_map(|(_, n)| n.locks.iter().copied()).collect();
        let mut out = Vec::new();
        for id in ids {
            let Some(lock) = self.locks.find(&id.0) else { continue };
            let Some(mut mode) = lock.granted else { continue };
            if lock.posix {
                out.extend(self.usable_piece(id, lock));
                continue;
            }
            let (mut is_ending, mut range) = (false, lock.range);
            for underway in &lock.operations {
                match &underway.numbered.operation {
                    Operation::Unlock { .. } => is_ending = true,
                    Operation::Convert { mode: to, range: to_range, .. } => {
                        // What is in the old and in the new one is in force all the time.
                        if mode.is_covering(*to) {
                            mode = *to;
                        } else if !to.is_covering(mode) {
                            // Not said which of the two it is until the answer: NL is below both.
                            mode = Mode::NL;
                        }
                        match range.intersection(to_range.unwrap_or(range)) {
                            Some(both) => range = both,
                            None => mode = Mode::NL,
                        }
                    }
                    _ => {}
                }
            }
            if !is_ending {
                out.push((id, lock.name.clone(), mode, range));
            }
        }
        out
    }
}

impl Underway {
    /// No master has got it in any way.
    pub(super) fn is_untold(&self) -> bool {
        !self.is_sent && self.since.is_none()
    }
}

impl LocalLock {
    /// One that was granted at once, without a value block.
    pub(super) fn granted(request: &LockRequest, token: FencingToken) -> Self {
        Self {
            name: request.name.clone(),
            owner: request.owner,
            range: request.range,
            granted: Some(request.mode),
            token,
            recovery: false,
            copy: Rare::default(),
            posix: false,
            operations: ThinVec::new(),
            next_op: 1,
        }
    }

    /// Whether its unlock is under way.
    pub(super) fn is_ending(&self) -> bool {
        self.operations.iter().any(|u| matches!(u.numbered.operation, Operation::Unlock { .. }))
    }

    fn grant(&mut self, operation: &Operation, grant: &crate::Grant, value_sequence: u64) {
        let (flags, written) = match operation {
            Operation::New { flags, .. } => (*flags, None),
            Operation::Convert { flags, value, .. } => (*flags, value.as_ref()),
            _ => (Flags::NONE, None),
        };
        let uses_value = flags.has(Flags::VALBLK);
        let kept =
            self.copy.fresh && self.granted.is_some_and(|g| Mode::CW <= g) && !flags.has(Flags::IVVALBLK);
        match transfer(self.granted, grant.mode) {
            Transfer::Write if uses_value && !flags.has(Flags::IVVALBLK) => {
                self.copy = Rare::from(ValueCopy {
                    value: written.cloned(),
                    sequence: value_sequence,
                    invalid: false,
                    fresh: true,
                    clean: false,
                });
            }
            Transfer::Read if uses_value => {
                self.copy = Rare::from(ValueCopy {
                    value: grant.value.clone(),
                    sequence: value_sequence,
                    invalid: grant.value_invalid,
                    fresh: true,
                    clean: false,
                });
            }
            _ if self.copy.fresh != kept || self.copy.clean => {
                (self.copy.fresh, self.copy.clean) = (kept, false);
            }
            _ => {}
        }
        if let Operation::Convert { range: Some(range), .. } = operation {
            self.range = *range;
        }
        self.granted = Some(grant.mode);
        self.token = grant.token;
        self.recovery = flags.has(Flags::RECOVERY);
    }
}
