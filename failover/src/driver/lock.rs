//! Owner locks: EX on the service's name, the owner in the value block, so that whoever asks the lock manager knows.
//!
//! ```text
//! value block: node u32 | incarnation u64, big endian; the rest zero
//! ```

use super::Failover;
use crate::machine::Input;
use quorate_dlm::{
    Completion, ConvertRequest, Flags, LockCallbacks, LockId, LockName, LockRequest, Lockspace, Mode,
    UnlockRequest,
};
use quorate_membership::Identity;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// The owner locks of one node.
pub(super) struct OwnerLocks {
    lockspace: Arc<dyn Lockspace>,
    me: Identity,
    failover: Weak<Failover>,
    held: Mutex<BTreeMap<String, LockId>>,
}

/// The name of a service's lock.
fn lock_name(service: &str) -> Option<LockName> {
    LockName::new(format!("service/{service}").as_bytes()).ok()
}

impl OwnerLocks {
    pub(super) fn new(lockspace: Arc<dyn Lockspace>, me: Identity, failover: Weak<Failover>) -> Arc<Self> {
        Arc::new(Self { lockspace, me, failover, held: Mutex::default() })
    }

    fn feed(&self, input: Input) {
        if let Some(failover) = self.failover.upgrade() {
            failover.feed(input);
        }
    }

    pub(super) fn take(self: &Arc<Self>, service: &str) {
        let callbacks = Arc::new(Callbacks { locks: Arc::clone(self), service: service.to_owned() });
        let asked = match lock_name(service) {
            Some(name) => {
                let request = LockRequest::new(name, Mode::EX).flags(Flags::VALBLK);
                self.lockspace.request(request, callbacks).is_ok()
            }
            None => false,
        };
        if !asked {
            self.feed(Input::Locked { service: service.to_owned(), held: false });
        }
    }

    pub(super) fn give_up(&self, service: &str) {
        let id = self.held.lock().unwrap_or_else(PoisonError::into_inner).remove(service);
        let asked = id.is_some_and(|id| self.lockspace.unlock(id, UnlockRequest::default()).is_ok());
        if !asked {
            // There is none, or the lockspace is gone, and the lock with it.
            self.feed(Input::Unlocked { service: service.to_owned() });
        }
    }

    fn value(&self) -> Vec<u8> {
        let mut value = vec![0; self.lockspace.value_bytes()];
        let node = self.me.node.0.to_be_bytes();
        let owner = node.into_iter().chain(self.me.incarnation.0.to_be_bytes());
        for (slot, byte) in value.iter_mut().zip(owner) {
            *slot = byte;
        }
        value
    }

    fn granted(&self, service: &str, id: LockId) {
        let first = {
            let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
            held.insert(service.to_owned(), id).is_none()
        };
        // From EX to EX: writes the value block and changes nothing else.
        let write = ConvertRequest::new(Mode::EX).flags(Flags::VALBLK).value(self.value());
        if first && self.lockspace.convert(id, write).is_ok() {
            return;
        }
        self.feed(Input::Locked { service: service.to_owned(), held: true });
    }
}

struct Callbacks {
    locks: Arc<OwnerLocks>,
    service: String,
}

impl LockCallbacks for Callbacks {
    fn completion(&self, id: LockId, completion: Completion) {
        let service = self.service.clone();
        match completion {
            Completion::Granted(_) => self.locks.granted(&service, id),
            Completion::Unlocked => self.locks.feed(Input::Unlocked { service }),
            // The lock is gone with the lockspace, or was never granted.
            _ => {
                self.locks.held.lock().unwrap_or_else(PoisonError::into_inner).remove(&service);
                self.locks.feed(Input::Locked { service, held: false });
            }
        }
    }

    fn blocking(&self, _: LockId, _: Mode) {}
}
