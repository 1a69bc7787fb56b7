//! What a storage server makes durable before it answers: who it is, and the newest record it has installed (R9).
//!
//! | offset | size | contents |
//! |---|---|---|
//! | 0 | 8 | `QRFENCE1` |
//! | 8 | 4 | length of the record, little-endian |
//! | 12 | 4 | CRC-32C of the record, little-endian |
//! | 16 | | the record (postcard) |

use quorate_membership::{ClusterId, Epoch, Identity, Incarnation, NodeId, ServerId, Trust, View, VoterSet};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

const MAGIC: &[u8; 8] = b"QRFENCE1";
const HEADER_BYTES: usize = 16;
/// A record names members, voters, a few CAs and revoked keys: a few dozen bytes each.
const RECORD_BYTES_MAX: usize = 1 << 20;

/// The record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FenceRecord {
    /// Who the server is until it loses this record or is retired.
    pub server: ServerId,
    /// The cluster it serves; nothing before the first installation.
    pub enrolment: Option<Enrolment>,
}

/// The installed view, as far as a storage server needs it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Enrolment {
    /// The cluster.
    pub cluster: ClusterId,
    /// The view's number.
    pub epoch: Epoch,
    /// The lives that may use cluster exports.
    pub admitted: BTreeMap<NodeId, Incarnation>,
    /// Who decides the next record.
    pub voters: VoterSet,
    /// Whose certificates are believed, and which keys are not.
    pub trust: Trust,
}

/// A file that is no record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RecordError {
    /// It is too short, too long or does not begin as a record does.
    #[error("not a fence record")]
    Format,
    /// Its checksum is wrong.
    #[error("the fence record is damaged: checksum {found:#010x}, expected {expected:#010x}")]
    Checksum {
        /// Of the bytes.
        found: u32,
        /// As written.
        expected: u32,
    },
}

impl FenceRecord {
    /// A server that belongs to no cluster yet.
    #[must_use]
    pub fn fresh(server: ServerId) -> Self {
        Self { server, enrolment: None }
    }

    /// Whether this life may use cluster exports.
    #[must_use]
    pub fn admits(&self, who: Identity) -> bool {
        self.enrolment.as_ref().is_some_and(|e| e.admitted.get(&who.node) == Some(&who.incarnation))
    }

    /// The installed epoch, if there is one.
    #[must_use]
    pub fn epoch(&self) -> Option<Epoch> {
        self.enrolment.as_ref().map(|e| e.epoch)
    }

    /// Its bytes on disk.
    ///
    /// # Panics
    /// If the cluster is a hundred times larger than any we allow.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let body = postcard::to_allocvec(self).expect("plain data is encodable");
        assert!(body.len() <= RECORD_BYTES_MAX, "a record is far below its limit");
        let mut out = MAGIC.to_vec();
        out.extend_from_slice(&(body.len() as u32).to_le_bytes());
        out.extend_from_slice(&crc32c::crc32c(&body).to_le_bytes());
        out.extend_from_slice(&body);
        out
    }

    /// Reads it.
    ///
    /// # Errors
    /// See [`RecordError`]: the record is then lost, and the server another one (R9).
    pub fn decode(bytes: &[u8]) -> Result<Self, RecordError> {
        let (header, body) = bytes.split_at_checked(HEADER_BYTES).ok_or(RecordError::Format)?;
        let word = |at: usize| header.get(at..at + 4).and_then(|b| b.try_into().ok()).map(u32::from_le_bytes);
        let (length, expected) = word(8).zip(word(12)).ok_or(RecordError::Format)?;
        if !header.starts_with(MAGIC) || body.len() != length as usize || RECORD_BYTES_MAX < body.len() {
            return Err(RecordError::Format);
        }
        let found = crc32c::crc32c(body);
        if found != expected {
            return Err(RecordError::Checksum { found, expected });
        }
        match postcard::take_from_bytes(body) {
            Ok((record, [])) => Ok(record),
            _ => Err(RecordError::Format),
        }
    }
}

impl From<&View> for Enrolment {
    fn from(view: &View) -> Self {
        Self {
            cluster: view.cluster,
            epoch: view.epoch,
            admitted: view.members.clone(),
            voters: view.voters.clone(),
            trust: view.trust.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(feature = "sim")]
    #[test]
    fn damaged_records_with_a_right_checksum_are_refused_or_read() {
        use quorate_membership::{StateId, Voter};
        let voter = Voter { state: StateId::from_bytes([5; 16]), votes: 1 };
        let enrolment = Enrolment {
            cluster: ClusterId::from_bytes([1; 16]),
            epoch: Epoch(700),
            admitted: (1..6).map(|n| (NodeId(n), Incarnation(300))).collect(),
            voters: VoterSet { voters: (1..4).map(|n| (NodeId(n), voter)).collect(), ..VoterSet::default() },
            trust: Trust { cas: [vec![7; 90]].into(), revoked: [[8; 32]].into(), ..Trust::default() },
        };
        let server = ServerId::from_bytes([2; 16]);
        let records = [FenceRecord::fresh(server), FenceRecord { server, enrolment: Some(enrolment) }];
        let bodies = records.map(|record| record.encode().split_off(HEADER_BYTES));
        let verdicts = quorate_membership::sim::hostile(&bodies, 1_000, |body| {
            let length = (body.len() as u32).to_le_bytes();
            let bytes = [&MAGIC[..], &length, &crc32c::crc32c(body).to_le_bytes(), body].concat();
            match FenceRecord::decode(&bytes) {
                Ok(record) => {
                    assert_eq!(FenceRecord::decode(&record.encode()), Ok(record));
                    true
                }
                Err(error) => {
                    assert_eq!(error, RecordError::Format);
                    false
                }
            }
        });
        assert!(100 < verdicts.taken && 300 < verdicts.refused, "{verdicts:?}");
    }

    #[test]
    fn a_record_is_read_back_and_every_flipped_byte_is_noticed() {
        let enrolment = Enrolment {
            cluster: ClusterId::from_bytes([1; 16]),
            epoch: Epoch(7),
            admitted: [(NodeId(1), Incarnation(3))].into(),
            voters: VoterSet::default(),
            trust: Trust::default(),
        };
        let record = FenceRecord { server: ServerId::from_bytes([2; 16]), enrolment: Some(enrolment) };
        let bytes = record.encode();
        assert_eq!(FenceRecord::decode(&bytes).as_ref(), Ok(&record));
        for at in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 0x10;
            assert!(FenceRecord::decode(&bad).is_err(), "byte {at}");
            assert!(FenceRecord::decode(&bytes[..at]).is_err(), "{at} bytes");
        }
    }

    proptest::proptest! {
        #[test]
        fn hostile_records_with_a_right_checksum_never_panic(body in proptest::collection::vec(0_u8.., 0..200)) {
            let mut bytes = MAGIC.to_vec();
            bytes.extend_from_slice(&(body.len() as u32).to_le_bytes());
            bytes.extend_from_slice(&crc32c::crc32c(&body).to_le_bytes());
            bytes.extend_from_slice(&body);
            if let Ok(record) = FenceRecord::decode(&bytes) {
                assert_eq!(FenceRecord::decode(&record.encode()), Ok(record));
            }
            for cut in 0..bytes.len() {
                assert!(FenceRecord::decode(&bytes[..cut]).is_err(), "cut to {cut} bytes");
            }
        }
    }
}
