//! One version of the configuration, and what a replica keeps on disk.

use quorate_membership::{ClusterId, Epoch, Identity, VoterSet};
use serde::{Deserialize, Serialize};

/// How many committed versions are kept for history, diff and rollback.
pub const HISTORY_MAX: usize = 64;

/// A version of the document.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The coordinator's term in which it was last accepted (R17).
    pub stamp: Epoch,
    /// Its number; the first is 1.
    pub version: u64,
    /// Who asked for it: makes a repeated request harmless.
    pub request: RequestKey,
    /// Who wrote it, for the history.
    pub author: String,
    /// When, in seconds since 1970 on the asking node's clock; for people alone.
    pub written_at: u64,
    /// The document.
    pub text: String,
}

/// Names an update for ever: a life of a node and that life's count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct RequestKey {
    /// Who asked.
    pub by: Identity,
    /// Its how-manieth update.
    pub number: u64,
}

/// What a replica makes durable, as a whole.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stored {
    /// The cluster it belongs to.
    pub cluster: ClusterId,
    /// The newest term seen: nothing of an older one is accepted any more.
    pub term: Epoch,
    /// Accepted in its stamp's term, perhaps not committed. Newer than the newest of `history`, if any.
    pub accepted: Option<Entry>,
    /// Committed versions, oldest first, at most [`HISTORY_MAX`].
    pub history: Vec<Entry>,
    /// Voter sets under which something may have been committed that no later set has taken over yet, the current one
    /// last, each with the epoch at which this replica first saw it. A coordinator reads from a majority of each (R17).
    pub voter_sets: Vec<(Epoch, VoterSet)>,
}

impl Stored {
    /// The state of a replica that has never heard of a configuration.
    #[must_use]
    pub fn empty(cluster: ClusterId) -> Self {
        Self { cluster, term: Epoch(0), accepted: None, history: Vec::new(), voter_sets: Vec::new() }
    }

    /// The newest committed version; 0 if there is none.
    #[must_use]
    pub fn committed(&self) -> u64 {
        self.history.last().map_or(0, |e| e.version)
    }

    /// The newest entry, committed or not.
    #[must_use]
    pub fn newest(&self) -> Option<&Entry> {
        self.accepted.as_ref().or(self.history.last())
    }

    /// The term of the newest commit known here. Voter sets of earlier epochs hold nothing that its voters do not.
    pub(crate) fn settled(history: &[Entry]) -> Epoch {
        history.last().map_or(Epoch(0), |e| e.stamp)
    }

    /// Takes in committed versions that are not known here; whether the newest of them is newer than ours.
    pub(crate) fn merge(&mut self, other: &[Entry]) -> bool {
        let before = self.committed();
        for entry in other {
            if let Err(at) = self.history.binary_search_by_key(&entry.version, |e| e.version) {
                self.history.insert(at, entry.clone());
            }
        }
        let surplus = self.history.len().saturating_sub(HISTORY_MAX);
        self.history.drain(..surplus);
        before < self.committed()
    }

    /// Whether the two say the same of every committed version both have.
    pub(crate) fn contradiction(&self, other: &[Entry]) -> Option<u64> {
        self.history
            .iter()
            .find(|mine| {
                other
                    .iter()
                    .any(|o| o.version == mine.version && (o.text != mine.text || o.request != mine.request))
            })
            .map(|e| e.version)
    }
}
