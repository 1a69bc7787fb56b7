//! The face of the configuration to the other crates.

use crate::{Entry, ForeignHistory, UpdateError};
use quorate_membership::BoxFuture;

/// A versioned document that the whole cluster shares.
pub trait ConfigStore: Send + Sync {
    /// The newest committed version this node knows; `None` if there is none. Works without quorum.
    fn get(&self) -> Option<Entry>;
    /// Committed versions this node knows, oldest first.
    fn history(&self) -> Vec<Entry>;
    /// Replaces the document. `expected`: only if that is still the newest version (0: only the first). Resolves with
    /// the new version once it is committed. Dropping the future gives up waiting; it may still be committed.
    fn update(
        &self,
        expected: Option<u64>,
        author: String,
        text: String,
    ) -> BoxFuture<'_, Result<u64, StoreError>>;
    /// Makes the contents of an earlier version the newest.
    fn rollback(&self, to: u64, author: String) -> BoxFuture<'_, Result<u64, StoreError>>;
    /// Resolves with the newest version once it is above `version`.
    fn changed(&self, version: u64) -> BoxFuture<'_, Entry>;
}

/// Why the store did not do what it was asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The update was refused.
    #[error(transparent)]
    Update(#[from] UpdateError),
    /// That version is not in the history.
    #[error("version {0} is not in the history")]
    NoVersion(u64),
    /// Nothing was heard in time: no quorum, or no coordinator. It may still be committed.
    #[error("no answer within {seconds} s, probably for want of quorum; the update may still be made")]
    Unknown {
        /// How long it was waited for.
        seconds: u64,
    },
    /// This node's history is not this cluster's.
    #[error(transparent)]
    Foreign(#[from] ForeignHistory),
    /// The node is stopping, or its disk failed.
    #[error("the configuration store is stopped: {0}")]
    Stopped(String),
}
