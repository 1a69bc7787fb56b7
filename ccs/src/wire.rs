//! Messages between replicas: postcard, behind a version byte.

use crate::entry::{Entry, RequestKey};
use crate::machine::UpdateError;
use quorate_membership::{Epoch, StateId, VoterSet};
use serde::{Deserialize, Serialize};

/// The version of these messages.
const VERSION: u8 = 1;

/// The longest message, in bytes, which is what sessions take. A history of documents of the largest size does not fit;
/// see [`Message::State`].
pub(crate) const MESSAGE_BYTES_MAX: usize = 1 << 20;

// An answer to a reading has the newest end of the history and one more document.
const _: () = assert!(MESSAGE_BYTES_MAX / 3 * 2 + crate::DOCUMENT_BYTES_MAX + (64 << 10) < MESSAGE_BYTES_MAX);

/// What replicas say to each other. Sessions deliver each exactly once and in order (R2).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Message {
    /// The coordinator of `term` asks what this replica has; from now on nothing older is accepted.
    Read { term: Epoch },
    /// The answer. `history` is as much of the newest end as fits into a message.
    State {
        term: Epoch,
        state: StateId,
        accepted: Option<Entry>,
        history: Vec<Entry>,
        voter_sets: Vec<(Epoch, VoterSet)>,
    },
    /// The coordinator asks to accept an entry. Until the first commit of its term it adds the committed versions it
    /// knows: a replica that holds the entry must hold what came before, or the next coordinator would not know those.
    Append { term: Epoch, entry: Entry, history: Vec<Entry> },
    /// It is durable here.
    Accepted { term: Epoch, state: StateId, version: u64 },
    /// The coordinator tells what is committed: the entry of `version` accepted in `term`, under one voter set.
    Commit { term: Epoch, version: u64 },
    /// The coordinator brings a replica up to date with committed versions.
    CatchUp { term: Epoch, history: Vec<Entry>, voter_sets: Vec<(Epoch, VoterSet)> },
    /// A member asks the coordinator for an update.
    Update { request: RequestKey, expected: Option<u64>, author: String, written_at: u64, text: String },
    /// The outcome.
    Updated { request: RequestKey, result: Result<u64, UpdateError> },
}

/// Why a message was not understood. Nothing was done.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum WireError {
    /// Too long.
    #[error("a message of {0} bytes is above the limit of {MESSAGE_BYTES_MAX}")]
    TooLong(usize),
    /// Another version.
    #[error("message version {0}, {VERSION} is wanted")]
    Version(u8),
    /// Not a message.
    #[error("malformed message")]
    Malformed,
}

pub(crate) fn encode(message: &Message) -> Vec<u8> {
    postcard::to_extend(message, vec![VERSION]).expect("messages have no types that postcard cannot write")
}

pub(crate) fn decode(bytes: &[u8]) -> Result<Message, WireError> {
    if MESSAGE_BYTES_MAX < bytes.len() {
        return Err(WireError::TooLong(bytes.len()));
    }
    match bytes.split_first() {
        Some((&VERSION, body)) => match postcard::take_from_bytes(body) {
            Ok((message, [])) => Ok(message),
            _ => Err(WireError::Malformed),
        },
        Some((version, _)) => Err(WireError::Version(*version)),
        None => Err(WireError::Malformed),
    }
}

/// The newest end of a history whose documents have at most two thirds of a message's bytes together.
pub(crate) fn newest_end(history: &[Entry]) -> Vec<Entry> {
    let mut left = MESSAGE_BYTES_MAX / 3 * 2;
    let fits = history.iter().rev().take_while(|e| {
        let size = e.text.len() + e.author.len() + 64;
        let fits = size <= left;
        left = left.saturating_sub(size);
        fits
    });
    let mut end: Vec<Entry> = fits.cloned().collect();
    end.reverse();
    end
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_message_is_read_back() {
        let message = Message::Commit { term: Epoch(7), version: 3 };
        assert_eq!(decode(&encode(&message)), Ok(message));
        assert_eq!(decode(&[9, 0]), Err(WireError::Version(9)));
    }

    #[cfg(feature = "sim")]
    #[test]
    fn hostile_messages_of_every_kind_are_an_error_or_a_message() {
        use quorate_membership::sim::{hostile, samples};
        use quorate_membership::{Identity, Incarnation, NodeId};
        let read = |bytes: &[u8]| match decode(bytes) {
            Ok(message) => {
                assert_eq!(decode(&encode(&message)), Ok(message));
                true
            }
            Err(_) => false,
        };
        let mut samples = samples(&[VERSION], 0..8, read);
        let request = RequestKey { by: Identity::new(NodeId(1), Incarnation(300)), number: 2 };
        let entry = |version| Entry {
            stamp: Epoch(9),
            version,
            request,
            author: "a person".into(),
            written_at: 1_700_000_000,
            text: "name = \"test\"\n".repeat(20),
        };
        let history: Vec<Entry> = (1..5).map(entry).collect();
        let voter_sets = vec![(Epoch(3), VoterSet::default())];
        samples.push(encode(&Message::State {
            term: Epoch(9),
            state: StateId::from_bytes([3; 16]),
            accepted: Some(entry(5)),
            history: history.clone(),
            voter_sets: voter_sets.clone(),
        }));
        samples.push(encode(&Message::CatchUp { term: Epoch(9), history, voter_sets }));
        let verdicts = hostile(&samples, 300, read);
        assert!(500 < verdicts.taken && 500 < verdicts.refused, "{verdicts:?}");
    }

    proptest! {
        #[test]
        fn hostile_bytes_are_an_error_or_a_message_and_never_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let _any = decode(&bytes);
            let _any = decode(&[&[VERSION][..], &bytes].concat());
        }
    }
}
