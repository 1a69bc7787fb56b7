//! One place of a group's order holds the same message for everybody, and nobody gets places out of order.

use quorate_membership::group::{Position, ProcessId};
use std::collections::BTreeMap;

#[derive(Default)]
pub(crate) struct TotalOrder {
    places: BTreeMap<(String, Position), (ProcessId, u64)>,
    last: BTreeMap<ProcessId, Position>,
}

impl TotalOrder {
    /// Any event with a place.
    pub(crate) fn on_place(&mut self, process: ProcessId, at: Position) {
        let last = self.last.insert(process, at);
        assert!(last.is_none_or(|l| l < at), "total order: {process} gets {at:?} after {last:?}");
    }

    pub(crate) fn on_message(&mut self, group: &str, at: Position, message: (ProcessId, u64)) {
        let known = self.places.entry((group.to_owned(), at)).or_insert(message);
        assert_eq!(*known, message, "total order: {group} has two messages at {at:?}");
    }
}
