//! Whose certificates are believed, and which keys are not: the part of the view record that keys are renewed by.

use crate::NodeId;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// How many CAs may be trusted at once. A rotation needs two.
pub const CAS_MAX: usize = 4;
/// The longest certificate of a CA, in bytes of DER.
pub const CA_BYTES_MAX: usize = 4_096;
/// How many keys may be revoked. Keys of nodes are better replaced in the roster.
pub const REVOKED_MAX: usize = 1_024;

/// Decided with everything else in the record, so that all members believe the same.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trust {
    /// Certificates of the trusted CAs, DER. Empty: each node believes the CA of its own directory, as at the start.
    pub cas: BTreeSet<Vec<u8>>,
    /// Keys (SHA-256 of SubjectPublicKeyInfo) that are refused although their certificates are valid.
    pub revoked: BTreeSet<[u8; 32]>,
    /// Second keys of nodes whose certificate is being renewed. They are as good as the roster's until they replace it.
    pub renewals: BTreeMap<NodeId, [u8; 32]>,
}

impl Trust {
    /// What is wrong with it in itself, if anything.
    pub(crate) fn fault(&self) -> Option<&'static str> {
        [
            (CAS_MAX < self.cas.len(), "more trusted CAs than the limit"),
            (self.cas.iter().any(|c| CA_BYTES_MAX < c.len()), "a CA's certificate above the limit"),
            (REVOKED_MAX < self.revoked.len(), "more revoked keys than the limit"),
            (
                crate::machine::ROSTER_MAX < self.renewals.len(),
                "more renewals than the roster may have nodes",
            ),
        ]
        .into_iter()
        .find(|(wrong, _)| *wrong)
        .map(|(_, what)| what)
    }
}
