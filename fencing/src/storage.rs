//! The face of a storage server as a fence (R9): the newest view is installed at it, and it serves nobody else afterwards.

use quorate_membership::{BoxFuture, ChainError, Decision, Epoch, ServerEntry, ServerId};

/// Installs views at storage servers. `quorate_gnbd` has the implementation that talks to real ones.
pub trait StorageFence: Send + Sync {
    /// Hands `chain` (oldest record first, the newest view last) to the server `server`, reachable as `entry` says, and
    /// resolves with the epoch that the server has made durable and serves by.
    ///
    /// The answer comes only after every connection which that epoch does not admit is closed and drained. An answer at or
    /// above the epoch of the chain's last record confirms it. Installing the same chain again is confirmed again. Dropping
    /// the future gives up the answer; the server may install the view all the same.
    ///
    /// # Errors
    /// See [`StorageFenceError`]. Whatever the error, the server may have installed the view: only `Ok` proves anything.
    fn install(
        &self,
        server: ServerId,
        entry: &ServerEntry,
        chain: Vec<Decision>,
    ) -> BoxFuture<'_, Result<Epoch, StorageFenceError>>;
}

/// Why a storage server did not confirm a view.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StorageFenceError {
    /// No connection, or it broke before the answer. Worth a retry.
    #[error("storage server {address} cannot be reached: {detail}")]
    Unreachable {
        /// Where it should be.
        address: String,
        /// What the connection said.
        detail: String,
    },
    /// Another server answers there: it lost its record and has a new identity, or the address is wrong.
    #[error("storage server {found} answers where {expected} was enrolled")]
    OtherServer {
        /// Who answers.
        found: ServerId,
        /// Who was enrolled.
        expected: ServerId,
    },
    /// The chain does not prove the view to this server.
    #[error("the storage server refuses the chain: {0}")]
    Chain(#[from] ChainError),
    /// The server holds a record newer than the chain's end. Ask again with a newer chain.
    #[error("the storage server has epoch {installed} already")]
    Newer {
        /// What it has.
        installed: Epoch,
    },
    /// I/O of a refused connection does not end, so nothing can be confirmed. The next fence level must decide.
    #[error("the storage server cannot drain {connections} connections")]
    Undrained {
        /// How many.
        connections: u32,
    },
    /// The server could not make the record durable, or another trouble of its own.
    #[error("the storage server failed: {0}")]
    Failed(String),
}
