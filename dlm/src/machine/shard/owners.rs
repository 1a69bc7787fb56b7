//! Whose locks are whose within this node: the end of an owner, and locks that outlive theirs (orphans).
//!
//! An orphan is known to its node alone, as in libdlm: it is adopted there, and ends with the node. For its master it is
//! a lock like any other.

use super::{Output, Shard};
use crate::machine::LockKey;
use crate::wire::{Message, Operation};
use crate::{Completion, Flags, Grant, LockError, LockId, LockName, LockRequest, Mode};
use quorate_membership::{Identity, NodeId};
use std::collections::{BTreeMap, BTreeSet};

/// Owners and their locks in one shard.
#[derive(Clone, Debug, Default)]
pub(super) struct Owners {
    /// By owner; 0 is nobody.
    locks: BTreeMap<u64, BTreeSet<LockId>>,
    /// Locks that outlive their owner.
    persistent: BTreeSet<LockId>,
    /// Locks whose owner has ended.
    orphans: BTreeMap<LockName, BTreeSet<LockId>>,
}

impl Owners {
    pub(super) fn add(&mut self, owner: u64, id: LockId, flags: Flags) {
        if owner != 0 {
            self.locks.entry(owner).or_default().insert(id);
            self.note(owner, id, flags);
        }
    }

    /// A conversion can make a lock persistent.
    pub(super) fn note(&mut self, owner: u64, id: LockId, flags: Flags) {
        if owner != 0 && flags.has(Flags::PERSISTENT) {
            self.persistent.insert(id);
        }
    }

    pub(super) fn remove(&mut self, owner: u64, id: LockId, name: &LockName) {
        if owner == 0 {
            return;
        }
        if let Some(locks) = self.locks.get_mut(&owner) {
            locks.remove(&id);
            if locks.is_empty() {
                self.locks.remove(&owner);
            }
        }
        self.persistent.remove(&id);
        if let Some(orphans) = self.orphans.get_mut(name) {
            orphans.remove(&id);
            if orphans.is_empty() {
                self.orphans.remove(name);
            }
        }
    }
}

/// The process of an owner.
fn process_of(owner: u64) -> u64 {
    owner & u64::from(u32::MAX)
}

impl Shard {
    /// An owner has ended.
    pub(crate) fn close_owner(
        &mut self,
        now: quorate_membership::Instant,
        owner: u64,
        out: &mut Vec<Output>,
    ) {
        self.now = now;
        if owner == 0 {
            return;
        }
        for id in self.owners.locks.remove(&owner).unwrap_or_default() {
            let Some(lock) = self.locks.find(&id.0) else { continue };
            if lock.is_ending() {
                continue;
            }
            if self.owners.persistent.contains(&id) && lock.granted.is_some() {
                self.owners.orphans.entry(lock.name.clone()).or_default().insert(id);
                out.push(Output::Orphaned { id });
                // Also what it was converting to is withdrawn.
                let _ = self.cancel(now, id, out);
            } else {
                self.end_forcibly(id, out);
            }
        }
        self.drain(out);
    }

    /// Every lock of this node, orphans too, ends as if its owner had.
    #[cfg(any(test, feature = "sim"))]
    pub(crate) fn end_all(&mut self, now: quorate_membership::Instant, out: &mut Vec<Output>) {
        self.now = now;
        let all: Vec<LockId> = self.names.all_local().flat_map(|(_, n)| n.locks.iter().copied()).collect();
        for id in all {
            if self.locks.find(&id.0).is_some_and(|l| !l.is_ending()) {
                self.end_forcibly(id, out);
            }
        }
        self.drain(out);
    }

    /// Ends a lock whose owner cannot: what it might have been writing is not valid.
    fn end_forcibly(&mut self, id: LockId, out: &mut Vec<Output>) {
        let Some(lock) = self.locks.find(&id.0) else { return };
        let was_writing = lock.copy.value.is_some() && lock.granted.is_some_and(|g| Mode::PW <= g);
        if lock.granted.is_none() && lock.operations.iter().all(super::local::Underway::is_untold) {
            self.end(id);
            out.push(Output::Done { id, completion: Completion::Unlocked });
            return;
        }
        let flags = if was_writing { Flags::IVVALBLK } else { Flags::NONE };
        self.start(id, Operation::Unlock { flags, value: None }, out);
    }

    /// Takes over an orphan of this node.
    ///
    /// # Errors
    /// There is none, or none in that mode; nothing changed.
    pub(super) fn adopt(
        &mut self,
        request: &LockRequest,
        out: &mut Vec<Output>,
    ) -> Result<LockId, LockError> {
        let orphans = self.owners.orphans.get(&request.name).ok_or(LockError::NotFound)?;
        let fits = |id: &&LockId| {
            let lock = self.locks.find(&id.0);
            lock.is_some_and(|l| l.granted == Some(request.mode) && l.operations.is_empty())
        };
        let id = *orphans.iter().find(fits).ok_or(LockError::OtherMode)?;
        let lock = self.locks.find_mut(&id.0).ok_or(LockError::NotFound)?;
        self.owners.remove(lock.owner, id, &request.name);
        lock.owner = request.owner;
        let grant = Grant {
            mode: request.mode,
            token: lock.token,
            value: None,
            value_invalid: false,
            alt_mode: false,
            demoted: false,
        };
        self.owners.add(request.owner, id, request.flags);
        let (name, owner) = (request.name.clone(), request.owner);
        match self.names.local(&name).map(super::local::LocalName::place) {
            Some(super::local::Place::Here) => self.on_owner(self.config.me, &name, id, owner),
            Some(super::local::Place::At { master, .. }) => {
                self.send(master, Message::Owner { name, id, owner }, out);
            }
            Some(super::local::Place::Frozen) => self.note_owner(&name, id),
            // The next master is told with the lock.
            _ => {}
        }
        out.push(Output::Done { id, completion: Completion::Granted(grant) });
        Ok(id)
    }

    /// A lock at its master belongs to somebody else now.
    pub(super) fn on_owner(&mut self, from: Identity, name: &LockName, id: LockId, owner: u64) {
        let key = LockKey { node: from, id };
        if let Some(mastered) = self.names.mastered_mut(name) {
            mastered.resource.set_owner(key, owner);
        } else if let Some(resource) = self.leaving_mut(name) {
            resource.set_owner(key, owner);
        }
    }

    /// Ends a node's orphans: of one process, or all with 0.
    pub(crate) fn purge(
        &mut self,
        now: quorate_membership::Instant,
        (node, pid): (NodeId, u32),
        out: &mut Vec<Output>,
    ) {
        self.now = now;
        if let Some(to) = self.view.members.iter().copied().find(|m| m.node == node) {
            self.send(to, Message::Purge { pid }, out);
            self.drain(out);
        }
    }

    pub(super) fn purge_mine(&mut self, pid: u32, out: &mut Vec<Output>) {
        let all: Vec<LockId> = self.owners.orphans.values().flatten().copied().collect();
        for id in all {
            let Some(lock) = self.locks.find(&id.0) else { continue };
            if (pid == 0 || process_of(lock.owner) == u64::from(pid)) && !lock.is_ending() {
                self.end_forcibly(id, out);
            }
        }
    }
}
