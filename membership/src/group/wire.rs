//! The messages between group machines. They travel in sessions: exactly once and in order between two lives.
//!
//! Layout: one byte of version, then postcard. `epoch` is always that of the record which last changed the members; what
//! belongs to another one is dropped.

use super::machine::{Position, ProcessId, Reason};
use crate::Epoch;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The version that a message starts with.
const VERSION: u8 = 1;

/// Something in the order of a group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Item {
    Join,
    Leave(Reason),
    Message {
        /// The sender's own count.
        number: u64,
        payload: Vec<u8>,
    },
    /// The members of the cluster changed; these processes went with their nodes.
    View(Vec<ProcessId>),
}

/// An item with its place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Entry {
    pub(super) at: Position,
    /// Whose item it is; meaningless for `View`.
    pub(super) from: ProcessId,
    pub(super) item: Item,
}

/// Who is in a group, and the number of the last message of each.
pub(super) type Members = BTreeMap<ProcessId, u64>;

/// What is said about one group, or about all of them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Body {
    /// To the sequencer: order this.
    Submit { from: ProcessId, item: Item },
    /// From the sequencer: the next in order. Every node has the first `stable` places of this view, the view's own
    /// change counted.
    Ordered { entry: Entry, stable: u64 },
    /// From the sequencer, to a node that had no process in the group: the state before the entries that are kept.
    Welcome { members: Members, at: Position },
    /// From the sequencer, after `Welcome`: one of these, from before the node's own first process joins.
    Kept(Entry),
    /// To the sequencer: everything up to here has arrived.
    Received { order: u64 },
    /// To the flush's coordinator: this node's copy of the group ends at `at` with these members.
    Have { members: Members, at: Position },
    /// Entries that this copy keeps, oldest first, after its `Have`.
    HaveEntry(Entry),
    /// That was all.
    HaveDone,
    /// From the coordinator: start from this copy.
    Base { members: Members, at: Position },
    /// Append this.
    Missing(Entry),
    /// The new view begins. Copies for which nothing came in this flush are dropped.
    Begin,
}

/// A message of one group machine to another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupMessage {
    pub(super) epoch: Epoch,
    /// Empty where all groups are meant.
    pub(super) group: String,
    pub(super) body: Body,
}

impl GroupMessage {
    /// The bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        postcard::to_extend(self, vec![VERSION]).expect("plain data into memory always encodes")
    }

    /// From bytes; `None` if they are none.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let (version, rest) = bytes.split_first()?;
        match postcard::take_from_bytes(rest) {
            Ok((message, [])) if *version == VERSION => Some(message),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Identity, Incarnation, NodeId, Rng};

    #[test]
    fn a_message_is_read_back_and_random_bytes_never_panic() {
        let from = ProcessId { node: Identity::new(NodeId(1), Incarnation(2)), number: 3 };
        let body = Body::Submit { from, item: Item::Message { number: 4, payload: b"hi".to_vec() } };
        let message = GroupMessage { epoch: Epoch(5), group: "g".into(), body };
        let bytes = message.encode();
        assert_eq!(bytes, [1, 5, 1, b'g', 0, 1, 2, 3, 2, 4, 2, b'h', b'i']);
        assert_eq!(GroupMessage::decode(&bytes), Some(message));
        let mut rng = Rng::new(1);
        for _ in 0..20_000 {
            let bytes: Vec<u8> =
                (0..rng.below(40)).map(|i| if i == 0 { 1 } else { rng.next_u64() as u8 }).collect();
            let _ = GroupMessage::decode(&bytes);
        }
    }
}
