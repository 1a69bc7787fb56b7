//! The usual case, short: a plain lock on a resource mastered here that nobody waits for, taken and given back.
//!
//! Everything else takes the general way in `local` and `master`; what this does is what that would have done.

use super::local::{LocalLock, LocalName, Place};
use super::named::Named;
use super::{Output, Shard};
use crate::machine::LockKey;
use crate::{Completion, Flags, Grant, LockId, LockRequest, UnlockRequest};
use core::time::Duration;

/// Flags that make no difference where the lock is granted at once.
const PLAIN: Flags = Flags(Flags::NOQUEUE.0 | Flags::NODLCKWT.0 | Flags::NORECOVERYWAIT.0);

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
        match local {
            Some(local) => local.locks.insert(id),
            none => *none = Some(LocalName::new(Place::Here, id)),
        }
        self.locks.insert(id.0, LocalLock::granted(request, token));
        self.lock_count += 1;
        self.owners.add(request.owner, id, request.flags);
        let completion = Completion::Granted(Grant {
            mode: request.mode,
            token,
            value: None,
            value_invalid: false,
            alt_mode: false,
            demoted: false,
        });
        self.stats.local += 1;
        self.stats.ended(&completion, Duration::ZERO);
        out.push(Output::Done { id, completion });
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
                self.send(master, crate::wire::Message::Release { name, generation, id }, out);
            }
            _ => return false,
        }
        self.stats.ended(&Completion::Unlocked, Duration::ZERO);
        out.push(Output::Done { id, completion: Completion::Unlocked });
        self.end(id);
        true
    }
}
