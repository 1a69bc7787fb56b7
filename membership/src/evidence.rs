//! Why a record was proposed: who found whom silent, when by its own clock, and how it was counted.
//!
//! It is part of the record, so every member keeps the same evidence, on disk, for as long as it keeps the record.

use crate::{Identity, NodeId};
use serde::{Deserialize, Serialize};

/// How many observations one record holds; how many more there were is counted.
pub const OBSERVATIONS_MAX: usize = 256;
/// How many counts and how many broken pairs one record holds.
pub const COUNTS_MAX: usize = 128;
/// How long the note is at most, in bytes.
pub const NOTE_BYTES_MAX: usize = 512;

/// Why an observer finds a member silent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Why {
    /// Nothing arrived for the detection time.
    Silence,
    /// The transport lost the connection and nothing arrived for the grace after it.
    LinkLost,
    /// A newer life of the node appeared and the old one left a probe unanswered (R1).
    ProbeUnanswered,
    /// Too few of the expected heartbeats arrived.
    Loss {
        /// So many of the last [`LOSS_WINDOW`] expected ones arrived.
        received: u8,
    },
}

/// How many expected heartbeats the loss is measured over.
pub const LOSS_WINDOW: u32 = 32;

impl core::fmt::Display for Why {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Silence => write!(f, "silence for the detection time"),
            Self::LinkLost => write!(f, "connection lost, then silence"),
            Self::ProbeUnanswered => write!(f, "a newer life appeared and a probe stayed unanswered"),
            Self::Loss { received } => write!(f, "{received} of the last {LOSS_WINDOW} heartbeats arrived"),
        }
    }
}

/// What one observer says about one member at present.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Why.
    pub why: Why,
    /// When it came to say so, in nanoseconds on the observer's own clock.
    pub at_ns: u64,
    /// For how long it had heard nothing then, in nanoseconds.
    pub silent_ns: u64,
}

/// A report with its two ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Observation {
    /// Who says so.
    pub observer: Identity,
    /// About whom.
    pub subject: Identity,
    /// What.
    pub report: Report,
}

/// How the reports about one member were counted (Rapid, USENIX ATC 2018, section 4.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Count {
    /// About whom.
    pub subject: Identity,
    /// Observing edges whose observer could be heard and is not failing itself.
    pub observers: u16,
    /// So many of these reported the member.
    pub reports: u16,
    /// The low watermark: from here on the member is unstable and the cut waits for it, for a bounded time.
    pub low: u16,
    /// The high watermark: from here on it is failed.
    pub high: u16,
    /// Whether it was removed; if not, it was unstable when the cut was made.
    pub failed: bool,
}

/// A pair of members without a direct path (R3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BrokenPair {
    /// One end.
    pub a: NodeId,
    /// The other.
    pub b: NodeId,
    /// For how long, in nanoseconds on the proposer's clock.
    pub for_ns: u64,
}

/// Why a record was proposed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Evidence {
    /// Who proposed it; nobody for the first record.
    pub by: Option<Identity>,
    /// When, in nanoseconds on the proposer's clock.
    pub at_ns: u64,
    /// Who reported what about whom.
    pub observations: Vec<Observation>,
    /// Observations that were left out because there were more than [`OBSERVATIONS_MAX`].
    pub left_out: u32,
    /// How they were counted.
    pub counts: Vec<Count>,
    /// For how long the cut waited for unstable members, in nanoseconds.
    pub held_ns: u64,
    /// Pairs without a path, for a record that mends the mesh.
    pub pairs: Vec<BrokenPair>,
    /// What was asked for, or what else led to it, for people.
    pub note: String,
}

impl Evidence {
    /// Cuts every list to its limit. A proposer calls it last.
    pub(crate) fn trim(&mut self) {
        let over = self.observations.len().saturating_sub(OBSERVATIONS_MAX);
        self.observations.truncate(OBSERVATIONS_MAX);
        self.left_out = self.left_out.saturating_add(u32::try_from(over).unwrap_or(u32::MAX));
        self.counts.truncate(COUNTS_MAX);
        self.pairs.truncate(COUNTS_MAX);
        if NOTE_BYTES_MAX < self.note.len() {
            let cut = (0..=NOTE_BYTES_MAX).rev().find(|i| self.note.is_char_boundary(*i)).unwrap_or(0);
            self.note.truncate(cut);
        }
    }

    /// Whether a list is above its limit, as no honest proposer's is.
    pub(crate) fn is_too_long(&self) -> bool {
        OBSERVATIONS_MAX < self.observations.len()
            || COUNTS_MAX < self.counts.len()
            || COUNTS_MAX < self.pairs.len()
            || NOTE_BYTES_MAX < self.note.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Incarnation;

    #[test]
    fn what_is_above_a_limit_is_cut_and_counted() {
        let who = Identity::new(NodeId(1), Incarnation(1));
        let report = Report { why: Why::Silence, at_ns: 1, silent_ns: 2 };
        let one = Observation { observer: who, subject: who, report };
        let mut evidence = Evidence {
            observations: vec![one; OBSERVATIONS_MAX + 3],
            note: "ä".repeat(NOTE_BYTES_MAX),
            ..Evidence::default()
        };
        assert!(evidence.is_too_long());
        evidence.trim();
        assert_eq!((evidence.observations.len(), evidence.left_out), (OBSERVATIONS_MAX, 3));
        assert!(!evidence.is_too_long());
    }
}
