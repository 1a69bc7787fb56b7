//! A sender gets each of its messages itself or is told that nobody does, in order, never both, while it is a member.

use quorate_membership::group::ProcessId;
use std::collections::{BTreeMap, VecDeque};

#[derive(Default)]
pub(crate) struct SelfDelivery {
    open: BTreeMap<ProcessId, VecDeque<u64>>,
    pub(crate) dropped: u64,
}

impl SelfDelivery {
    pub(crate) fn on_sent(&mut self, process: ProcessId, number: u64) {
        self.open.entry(process).or_default().push_back(number);
    }

    pub(crate) fn on_own(&mut self, process: ProcessId, number: u64) {
        let first = self.open.entry(process).or_default().pop_front();
        assert_eq!(first, Some(number), "self-delivery: {process} gets an own message out of turn");
    }

    pub(crate) fn on_dropped(&mut self, process: ProcessId, first: u64, last: u64) {
        for number in first..=last {
            self.dropped += 1;
            let open = self.open.entry(process).or_default().pop_front();
            assert_eq!(open, Some(number), "self-delivery: {process} is told of another message");
        }
    }

    /// After everything calmed down.
    pub(crate) fn at_end(&self, process: ProcessId) {
        let open = self.open.get(&process).map_or(0, VecDeque::len);
        assert_eq!(open, 0, "self-delivery: {process} never heard of {open} of its messages");
    }
}
