//! Everybody sees the same configurations at the same places, with living processes only, and itself among them.

use quorate_membership::group::{Event, Position, ProcessId};
use std::collections::BTreeMap;

#[derive(Default)]
pub(crate) struct MembershipOrder {
    places: BTreeMap<(String, Position), Event>,
}

impl MembershipOrder {
    pub(crate) fn on_configuration(&mut self, group: &str, process: ProcessId, at: Position, event: &Event) {
        let Event::Configuration { members, joined, left, .. } = event else { return };
        assert!(members.contains(&process), "membership order: {process} is not in its own configuration");
        assert!(joined.iter().all(|p| members.contains(p)), "membership order: who joined is no member");
        assert!(left.iter().all(|(p, _)| !members.contains(p)), "membership order: who left is a member");
        let known = self.places.entry((group.to_owned(), at)).or_insert_with(|| event.clone());
        assert_eq!(known, event, "membership order: {group} has two configurations at {at:?}");
    }

    /// In the end a group's members are those that run.
    pub(crate) fn at_end(group: &str, seen: &[ProcessId], run: &[ProcessId]) {
        assert_eq!(seen, run, "membership order: {group} has other members than run");
    }
}
