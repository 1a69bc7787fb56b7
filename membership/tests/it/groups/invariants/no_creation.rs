//! What is delivered was sent by that process, to that group, in that view, and comes once.

use quorate_membership::Epoch;
use quorate_membership::group::{Position, ProcessId};
use std::collections::{BTreeMap, BTreeSet};

/// The group, the content, and the view the sender was in; none between two views.
type Sent = (String, Vec<u8>, Option<Epoch>);

#[derive(Default)]
pub(crate) struct NoCreation {
    sent: BTreeMap<(ProcessId, u64), Sent>,
    got: BTreeSet<(ProcessId, ProcessId, u64)>,
}

impl NoCreation {
    pub(crate) fn on_sent(
        &mut self,
        group: &str,
        from: ProcessId,
        number: u64,
        payload: &[u8],
        epoch: Option<Epoch>,
    ) {
        self.sent.insert((from, number), (group.to_owned(), payload.to_vec(), epoch));
    }

    pub(crate) fn on_message(
        &mut self,
        (group, process): (&str, ProcessId),
        at: Position,
        (from, number): (ProcessId, u64),
        payload: &[u8],
    ) {
        let sent = self.sent.get(&(from, number));
        let (to, content, epoch) = sent.unwrap_or_else(|| panic!("no creation: {from} never sent {number}"));
        assert!(to == group && content == payload, "no creation: {number} of {from} is another message");
        let in_view = epoch.is_none_or(|e| e == at.epoch);
        assert!(in_view, "no creation: {number} of {from} was sent in {epoch:?}, it comes in {at:?}");
        assert!(
            self.got.insert((process, from, number)),
            "no creation: {process} gets {number} of {from} twice"
        );
    }
}
