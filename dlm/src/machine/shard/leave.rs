//! Leaving in order: what this node masters is frozen, its value blocks are given to the holders, and everything that
//! was sent has arrived before the detach is proposed. Then the rest is rebuilt as after a failure, without holds (R13).

use super::local::ValueCopy;
use super::{Output, Shard};
use crate::wire::{ITEMS_MAX, Message};
use crate::{LockId, ValueBlock};
use quorate_membership::Identity;
use std::collections::BTreeMap;

type Values = Vec<(LockId, Option<ValueBlock>, u64, bool)>;

impl Shard {
    pub(super) fn on_leave(&mut self, out: &mut Vec<Output>) {
        if self.leaving.is_some() || self.must_stay() {
            return;
        }
        self.thaw_all(out);
        let me = self.config.me;
        let mut values: BTreeMap<Identity, Values> = BTreeMap::new();
        for (_, mastered) in self.names.all_mastered() {
            let value = mastered.resource.value();
            for lock in mastered.resource.locks().filter(|l| l.uses_value && !l.dead) {
                let entry = (lock.key.id, value.bytes.clone(), value.sequence, value.invalid);
                values.entry(lock.key.node).or_default().push(entry);
            }
        }
        let others = self.view.members.iter().copied().filter(|m| *m != me).collect();
        for member in &others {
            let list: Values = values.remove(member).unwrap_or_default();
            let mut pieces: Vec<Values> = list.chunks(ITEMS_MAX).map(<[_]>::to_vec).collect();
            if pieces.is_empty() {
                pieces.push(Vec::new());
            }
            let count = pieces.len();
            for (i, values) in pieces.into_iter().enumerate() {
                self.send(*member, Message::Leaving { values, last: i + 1 == count }, out);
            }
        }
        self.leaving = Some(others);
        self.on_leaver_gone(out);
    }

    pub(super) fn on_leaving(&mut self, from: Identity, values: Values, last: bool, out: &mut Vec<Output>) {
        for (id, value, sequence, invalid) in values {
            let is_theirs = self.is_from_master(from, id);
            let Some(lock) = self.locks.find_mut(&id.0).filter(|_| is_theirs) else { continue };
            let value = Some(value.unwrap_or_else(|| vec![0; self.config.value_bytes]));
            lock.copy = ValueCopy { value, sequence, invalid, clean: true, fresh: lock.copy.fresh }.into();
        }
        if last {
            self.send(from, Message::LeavingAck, out);
        }
    }

    pub(super) fn on_leaving_ack(&mut self, from: Identity, out: &mut Vec<Output>) {
        if let Some(leaving) = &mut self.leaving
            && leaving.remove(&from)
            && leaving.is_empty()
        {
            out.push(Output::Quiet);
        }
    }

    /// Nobody waits for those who are gone.
    pub(super) fn on_leaver_gone(&mut self, out: &mut Vec<Output>) {
        let members = &self.view.members;
        if let Some(leaving) = &mut self.leaving {
            leaving.retain(|m| members.contains(m));
            if leaving.is_empty() {
                out.push(Output::Quiet);
            }
        }
    }

    /// Whether nothing of ours is anywhere: no lock, and no name that waits.
    #[cfg(any(test, feature = "sim"))]
    pub(crate) fn is_idle(&self) -> bool {
        self.lock_count == 0
            && self
                .names
                .all_local()
                .all(|(_, n)| n.locks.is_empty() && n.place() != super::local::Place::Recovering)
            && self.parked.values().all(Vec::is_empty)
            && self.moves.is_idle()
    }
}
