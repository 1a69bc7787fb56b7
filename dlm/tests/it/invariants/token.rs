//! Of two grants of one resource that exclude each other, the later one has the higher token.

use quorate_dlm::{FencingToken, LockId, LockName, Mode};
use quorate_membership::Identity;
use std::collections::BTreeMap;

type Key = (Identity, LockId);

/// The last exclusive grant of each name.
#[derive(Default)]
pub(crate) struct TokensRise(BTreeMap<LockName, (FencingToken, Key)>);

impl TokensRise {
    pub(crate) fn granted(&mut self, name: &LockName, key: Key, mode: Mode, token: FencingToken) {
        if mode == Mode::NL {
            return;
        }
        if let Some((last, by)) = self.0.get(name) {
            // A lock that is taken down by a new master keeps its token.
            let fine = *last < token || (*last == token && *by == key);
            assert!(fine, "token: {name}: {token:?} for {key:?} after {last:?} for {by:?}");
        }
        if mode == Mode::EX {
            self.0.insert(name.clone(), (token, key));
        }
    }
}
