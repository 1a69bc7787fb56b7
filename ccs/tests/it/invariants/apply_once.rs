//! Invariant (R17): an update makes one version, however often it was asked for.

use quorate_ccs::{Entry, RequestKey};
use std::collections::BTreeMap;

/// The version of every request.
#[derive(Debug, Default)]
pub(crate) struct ApplyOnce {
    seen: BTreeMap<RequestKey, u64>,
}

impl ApplyOnce {
    /// A replica says that `entry` is committed.
    pub(crate) fn committed(&mut self, entry: &Entry) {
        let version = self.seen.entry(entry.request).or_insert(entry.version);
        assert_eq!(*version, entry.version, "apply once: {:?} made two versions", entry.request);
    }
}
