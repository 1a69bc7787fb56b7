//! The usual case, short: a plain lock on a resource mastered here that nobody waits for, taken and given back.
//!
//! Everything else takes the general way in `local` and `master`; what this does is what that would have done.

use super::local::{LocalLock, LocalName, Place};
use super::named::Named;
use super::{Output, Shard};
use crate::machine::LockKey;
use crate::wire::{Message, Numbered, Operation};
use crate::{Completion, FencingToken, Flags, Grant, LockId, LockName, LockRequest, Mode, UnlockRequest};
use core::time::Duration;
use quorate_membership::Identity;

/// Flags that make no difference where the lock is granted at once.
const PLAIN: Flags = Flags(Flags::NOQUEUE.0 | Flags::NODLCKWT.0 | Flags::NORECOVERYWAIT.0);

/// What the owner of a lock without a value block is told.
fn granted(mode: Mode, token: FencingToken) -> Completion {
    let (value, value_invalid, alt_mode, demoted) = (None, false, false, false);
    Completion::Granted(Grant { mode, token, value, value_invalid, alt_mode, demoted })
}

impl Shard {
    /// Grants a new lock at once. False: the general way decides.
    pub(super) fn request_fast(&mut self, id: LockId, request: &LockRequest, out: &mut Vec<Output>) -> bool {
        if request.flags.0 & !PLAIN.0 != 0 || self.bug.is_some() {
            return false;
        }
        let cx = context!(self);
        let Some(Named { mastered: Some(mastered), local }) = self.names.both_mut(&request.name) else {
            return false;
        };
        if local.as_ref().is_some_and(|n| n.place() != Place::Here) {
            return false;
        }
        let key = LockKey { node: self.config.me, id };
        let at_once = mastered.resource.grant_at_once(&cx, key, (request.owner, request.range), request.mode);
        let Some(token) = at_once else { return false };
        mastered.set_unused(None);
        mastered.uses.reset();
        match local {
            Some(local) => local.locks.insert(id),
            none => *none = Some(LocalName::new(Place::Here, id)),
        }
        self.locks.insert(id.0, LocalLock::granted(request, token));
        self.lock_count += 1;
        self.owners.add(request.owner, id, request.flags);
        let completion = granted(request.mode, token);
        self.stats.local += 1;
        self.stats.ended(&completion, Duration::ZERO);
        out.push(Output::Done { id, completion });
        true
    }

    /// Grants another node's new lock at once; the generation is the right one. False: the general way decides.
    pub(super) fn operate_fast(
        &mut self,
        from: Identity,
        name: &LockName,
        id: LockId,
        numbered: &Numbered,
        out: &mut Vec<Output>,
    ) -> bool {
        let Numbered { op, operation: Operation::New { mode, range, flags, owner, .. } } = *numbered else {
            return false;
        };
        if flags.0 & !PLAIN.0 != 0 || self.bug.is_some() || from == self.config.me {
            return false;
        }
        let cx = context!(self);
        let Some(mastered) = self.names.mastered_mut(name) else { return false };
        let key = LockKey { node: from, id };
        // A repetition of what is here already has no answer of its own.
        if mastered.resource.find(key).is_some() {
            return false;
        }
        let Some(token) = mastered.resource.grant_at_once(&cx, key, (owner, range), mode) else {
            return false;
        };
        mastered.set_unused(None);
        let value_sequence = mastered.resource.value().sequence;
        let completion = granted(mode, token);
        self.send(from, Message::Done { id, op, completion, value_sequence }, out);
        true
    }

    /// Ends a granted lock at once. False: the general way decides.
    pub(super) fn unlock_fast(&mut self, id: LockId, request: &UnlockRequest, out: &mut Vec<Output>) -> bool {
        if request.flags.0 & !Flags::RELEASE.0 != 0 || self.bug.is_some() || self.leaving.is_some() {
            return false;
        }
        let Some(lock) =
            self.locks.find(&id.0).filter(|l| l.operations.is_empty() && l.granted.is_some() && !l.posix)
        else {
            return false;
        };
        let Some(local) = self.names.local(&lock.name) else { return false };
        match local.place() {
            Place::Here => {
                let key = LockKey { node: self.config.me, id };
                let Some(mastered) = self.names.mastered_mut(&lock.name) else { return false };
                if !mastered.resource.end_at_once(key) {
                    return false;
                }
                if mastered.resource.is_unused() && mastered.unused_since().is_none() {
                    mastered.set_unused(Some(self.now));
                    if !core::mem::replace(&mut mastered.is_queued, true) {
                        self.unused.push_back((self.now, lock.name.clone()));
                    }
                }
                self.stats.local += 1;
            }
            Place::At { master, generation } if request.flags.has(Flags::RELEASE) => {
                let name = lock.name.clone();
                self.stats.out += 1;
                self.send(master, Message::Release { name, generation, id }, out);
            }
            _ => return false,
        }
        self.stats.ended(&Completion::Unlocked, Duration::ZERO);
        out.push(Output::Done { id, completion: Completion::Unlocked });
        self.end(id);
        true
    }
}
