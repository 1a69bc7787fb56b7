//! Processes that go through the same two configurations get the same messages between them.

use quorate_membership::group::{Position, ProcessId};
use std::collections::BTreeMap;

type Messages = Vec<(ProcessId, u64)>;

#[derive(Default)]
pub(crate) struct VirtualSynchrony {
    now: BTreeMap<ProcessId, (Position, Messages)>,
    between: BTreeMap<(String, Position, Position), Messages>,
}

impl VirtualSynchrony {
    pub(crate) fn on_configuration(&mut self, group: &str, process: ProcessId, at: Position) {
        let Some((from, messages)) = self.now.insert(process, (at, Vec::new())) else { return };
        let known = self.between.entry((group.to_owned(), from, at)).or_insert_with(|| messages.clone());
        assert_eq!(*known, messages, "virtual synchrony: {process} between {from:?} and {at:?} of {group}");
    }

    pub(crate) fn on_message(&mut self, process: ProcessId, message: (ProcessId, u64)) {
        let (_, messages) = self.now.get_mut(&process).expect("a configuration comes first");
        messages.push(message);
    }
}
