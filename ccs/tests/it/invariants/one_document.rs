//! Invariant (R17): a version, once committed anywhere, says the same everywhere.

use quorate_ccs::Entry;
use std::collections::BTreeMap;

/// Every version seen committed, with its text.
#[derive(Debug, Default)]
pub(crate) struct OneDocument {
    seen: BTreeMap<u64, String>,
}

impl OneDocument {
    /// A replica says that `entry` is committed.
    pub(crate) fn committed(&mut self, entry: &Entry) {
        let seen = self.seen.entry(entry.version).or_insert_with(|| entry.text.clone());
        assert_eq!(*seen, entry.text, "one document: version {} has two texts", entry.version);
    }
}
