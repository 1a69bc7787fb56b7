//! A value block that was delivered as valid never goes back while the resource exists, in the order of the grants.

use super::Watched;
use super::exclusion::Usable;
use quorate_dlm::{FencingToken, LockName};
use std::collections::BTreeMap;

/// The numbers that were delivered as valid, by the tokens of the grants that delivered them.
#[derive(Default)]
pub(crate) struct ValueNeverGoesBack(BTreeMap<LockName, BTreeMap<FencingToken, u64>>);

impl ValueNeverGoesBack {
    /// A valid block with this number, which grows with every write. Deliveries to different nodes overtake each other,
    /// their tokens do not.
    pub(crate) fn read(&mut self, name: &LockName, token: FencingToken, number: u64) {
        let reads = self.0.entry(name.clone()).or_default();
        let before = reads.range(..token).next_back();
        let after = reads.range(token..).next();
        let fine = before.is_none_or(|(_, n)| *n <= number) && after.is_none_or(|(_, n)| number <= *n);
        assert!(fine, "value: {name}: {number} with {token:?}, between {before:?} and {after:?}");
        reads.insert(token, number);
    }

    /// A name that nobody has any more begins anew.
    pub(super) fn check(&mut self, watched: &Watched<'_>, usable: &Usable) {
        let at_master = |name: &LockName| {
            // One that has left keeps what was frozen, for nobody.
            let here = |who| watched.world.is_attached(who);
            let nodes = watched.world.nodes.iter().filter(|(who, n)| n.is_isolated || here(**who));
            nodes
                .flat_map(|(_, n)| n.machine.dump().resources)
                .any(|r| r.name == *name && !(r.granted.is_empty() && r.converting.is_empty()))
        };
        self.0.retain(|name, _| usable.contains_key(name) || at_master(name));
    }
}
