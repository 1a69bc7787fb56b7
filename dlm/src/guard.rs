//! A check for resources outside the cluster: who comes with an older token than somebody before is refused.
//!
//! A lock manager alone can't keep a stopped process from acting on a lock it lost: it may wake up between looking at its
//! lock and using it. Whoever guards the resource itself can, if each use brings the token of its grant.
//!
//! ```
//! use quorate_dlm::{FencingToken, TokenGuard, TokenStore};
//!
//! /// Remembers nothing over a restart; a real one writes and flushes before it returns.
//! #[derive(Default)]
//! struct InMemory(FencingToken);
//! impl TokenStore for InMemory {
//!     type Error = std::convert::Infallible;
//!     fn load(&mut self) -> Result<FencingToken, Self::Error> {
//!         Ok(self.0)
//!     }
//!     fn save(&mut self, token: FencingToken) -> Result<(), Self::Error> {
//!         self.0 = token;
//!         Ok(())
//!     }
//! }
//!
//! let mut printer = TokenGuard::open(InMemory::default()).unwrap();
//! let (old, new) = (FencingToken { epoch: 4, sequence: 17 }, FencingToken { epoch: 5, sequence: 18 });
//! assert!(printer.admit(old).is_ok() && printer.admit(old).is_ok());
//! assert!(printer.admit(new).is_ok());
//! // The holder of `old` was stopped, fenced, and wakes up now.
//! assert!(printer.admit(old).is_err());
//! ```

use crate::FencingToken;

/// Where a guard keeps the highest token it has seen.
pub trait TokenStore {
    /// Why it could not.
    type Error: std::error::Error;
    /// What was saved last; the default token if nothing ever was.
    ///
    /// # Errors
    /// The store cannot be read.
    fn load(&mut self) -> Result<FencingToken, Self::Error>;
    /// Keeps `token`, durably when it returns.
    ///
    /// # Errors
    /// The store cannot be written; what it holds is the old token or the new one.
    fn save(&mut self, token: FencingToken) -> Result<(), Self::Error>;
}

/// Why a use is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenRefused<E: std::error::Error> {
    /// Somebody with a later grant was here. The user lost its lock: it must not go on.
    #[error("the token {given:?} is older than {seen:?}")]
    Stale {
        /// What it came with.
        given: FencingToken,
        /// The highest so far.
        seen: FencingToken,
    },
    /// The token could not be kept, so nobody may act under it yet. Try again.
    #[error("the token cannot be kept: {0}")]
    Store(#[source] E),
}

/// Admits uses of one resource in the order of their grants. One guard belongs to one lock name of one lockspace whose
/// locks are taken in modes that exclude each other.
#[derive(Debug)]
pub struct TokenGuard<S> {
    store: S,
    seen: FencingToken,
}

impl<S: TokenStore> TokenGuard<S> {
    /// A guard that goes on where its store was left.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn open(mut store: S) -> Result<Self, S::Error> {
        let seen = store.load()?;
        Ok(Self { store, seen })
    }

    /// The highest token so far.
    pub fn seen(&self) -> FencingToken {
        self.seen
    }

    /// Whether a use with this token may go on. A higher one than all before is kept first.
    ///
    /// # Errors
    /// [`TokenRefused::Stale`], nothing changed; or [`TokenRefused::Store`], and the token may or may not be kept.
    pub fn admit(&mut self, token: FencingToken) -> Result<(), TokenRefused<S::Error>> {
        if token < self.seen {
            return Err(TokenRefused::Stale { given: token, seen: self.seen });
        }
        if self.seen < token {
            self.store.save(token).map_err(TokenRefused::Store)?;
            self.seen = token;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Default)]
    struct Store {
        kept: FencingToken,
        is_broken: bool,
    }

    impl TokenStore for &mut Store {
        type Error = std::fmt::Error;
        fn load(&mut self) -> Result<FencingToken, Self::Error> {
            Ok(self.kept)
        }
        fn save(&mut self, token: FencingToken) -> Result<(), Self::Error> {
            if self.is_broken {
                return Err(std::fmt::Error);
            }
            self.kept = token;
            Ok(())
        }
    }

    fn token(epoch: u64, sequence: u64) -> FencingToken {
        FencingToken { epoch, sequence }
    }

    #[test]
    fn an_older_token_is_refused_also_by_the_next_guard() {
        let mut store = Store::default();
        let mut guard = TokenGuard::open(&mut store).unwrap();
        guard.admit(token(2, 7)).unwrap();
        // The epoch goes first: a later view's grants are later, whatever their number.
        guard.admit(token(3, 1)).unwrap();
        let mut guard = TokenGuard::open(&mut store).unwrap();
        let stale = TokenRefused::Stale { given: token(2, 8), seen: token(3, 1) };
        assert_eq!(guard.admit(token(2, 8)), Err(stale));
        guard.admit(token(3, 1)).unwrap();
    }

    #[test]
    fn a_token_that_cannot_be_kept_is_not_admitted() {
        let mut store = Store { kept: token(1, 1), is_broken: true };
        let mut guard = TokenGuard::open(&mut store).unwrap();
        assert_eq!(guard.admit(token(2, 2)), Err(TokenRefused::Store(std::fmt::Error)));
        assert_eq!(guard.seen(), token(1, 1));
    }
}
