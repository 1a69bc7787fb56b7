//! The messages of the deadlock search, between lock managers and above lockspaces.
//!
//! A frame is one byte that no other frame of ours begins with, then postcard.

use super::graph::{BLOCKERS_MAX, Wait, WaitKey};
use serde::{Deserialize, Serialize};

/// The first byte of a frame of the search: the version, and a bit that tells it from a lockspace's.
pub(crate) const SEARCH_VERSION: u8 = 0x81;
/// The largest frame, in bytes.
const FRAME_BYTES_MAX: usize = 256 * 1024;
/// The most blockers, over all waits, in one message; a longer list is sent in pieces.
const PIECE_MAX: usize = 2_048;
/// The most waits that a node tells in one walk. A deadlock among those beyond it is found once there are fewer.
pub(crate) const WAITS_MAX: usize = 16_384;

const _: () = assert!(PIECE_MAX * 64 < FRAME_BYTES_MAX && BLOCKERS_MAX < PIECE_MAX, "a piece fits a frame");

/// A message of the search.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum SearchMessage {
    /// To the node that searches: somebody has waited long here, and something has changed.
    Suspect,
    /// From it: what waits at your resources?
    Ask { round: u64 },
    /// This. `last`: nothing more for this round.
    Waits { round: u64, waits: Vec<Wait>, last: bool },
    /// From it: the operation is the victim of a deadlock.
    Refuse { key: WaitKey },
}

impl SearchMessage {
    /// The answer to a round, in pieces.
    pub(crate) fn pieces(round: u64, waits: Vec<Wait>) -> Vec<Self> {
        let mut out = Vec::new();
        let (mut piece, mut size) = (Vec::new(), 0);
        for wait in waits.into_iter().take(WAITS_MAX) {
            size += 2 + wait.blockers.len();
            piece.push(wait);
            if PIECE_MAX - BLOCKERS_MAX < size {
                out.push(Self::Waits { round, waits: core::mem::take(&mut piece), last: false });
                size = 0;
            }
        }
        out.push(Self::Waits { round, waits: piece, last: true });
        out
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        // Serialising plain data into memory cannot fail.
        postcard::to_extend(self, vec![SEARCH_VERSION]).unwrap_or_default()
    }

    /// Whether the bytes are meant for the search.
    pub(crate) fn is_one(bytes: &[u8]) -> bool {
        bytes.first() == Some(&SEARCH_VERSION)
    }

    /// `None` for bytes that are not a message within the limits.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let (version, rest) = bytes.split_first()?;
        if *version != SEARCH_VERSION || FRAME_BYTES_MAX < bytes.len() {
            return None;
        }
        let (message, rest): (Self, _) = postcard::take_from_bytes(rest).ok()?;
        let fits = match &message {
            Self::Waits { waits, .. } => {
                waits.iter().all(|w| w.blockers.len() <= BLOCKERS_MAX)
                    && waits.iter().map(|w| 2 + w.blockers.len()).sum::<usize>() <= PIECE_MAX
            }
            _ => true,
        };
        (rest.is_empty() && fits).then_some(message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    proptest::proptest! {
        #[test]
        fn hostile_bytes_are_no_message_or_one_within_the_limits(
            tag in 0_u8..5,
            body in proptest::collection::vec(proptest::num::u8::ANY, 0..200),
        ) {
            for bytes in [&body[..], &[&[SEARCH_VERSION, tag][..], &body].concat()] {
                if let Some(message) = SearchMessage::decode(bytes) {
                    assert!(message.encode().len() <= FRAME_BYTES_MAX);
                    assert_eq!(SearchMessage::decode(&message.encode()), Some(message));
                }
            }
        }
    }

    #[cfg(feature = "sim")]
    #[test]
    fn damaged_messages_of_every_kind_are_none_or_within_the_limits() {
        use quorate_membership::sim::{hostile, samples};
        let read = |bytes: &[u8]| match SearchMessage::decode(bytes) {
            Some(message) => {
                assert!(message.encode().len() <= FRAME_BYTES_MAX);
                assert_eq!(SearchMessage::decode(&message.encode()), Some(message));
                true
            }
            None => false,
        };
        let verdicts = hostile(&samples(&[SEARCH_VERSION], 0..4, read), 500, read);
        assert!(500 < verdicts.taken && 500 < verdicts.refused, "{verdicts:?}");
    }

    #[test]
    fn a_claim_of_many_waits_and_bytes_after_the_end_are_no_message() {
        // Round 1, then as many waits as a number can say.
        assert_eq!(SearchMessage::decode(&[SEARCH_VERSION, 2, 1, 0xff, 0xff, 0xff, 0xff, 0x0f]), None);
        let mut bytes = SearchMessage::Waits { round: 1, waits: Vec::new(), last: true }.encode();
        assert!(SearchMessage::decode(&bytes).is_some());
        bytes.push(0);
        assert_eq!(SearchMessage::decode(&bytes), None);
    }
}
