//! The messages between group machines. They travel in sessions: exactly once and in order between two lives.
//!
//! Layout: one byte of version, then postcard. Every message names the view it belongs to; what belongs to another one is
//! dropped.

use super::event::{Position, ProcessId, Reason};
use crate::{Epoch, View};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// The version that a message starts with.
const VERSION: u8 = 1;

/// Which members the cluster has, told from all it had before and will have.
///
/// A node may skip records, so their epochs do not say it. Lives only begin and rise, and between two such changes members
/// only go: so the sum of the lives and the number of those that are gone never come back as a pair.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct GroupView {
    lives: u64,
    gone: u32,
}

impl GroupView {
    pub(super) fn of(view: &View) -> Self {
        let sum = view.lives.values().fold(0_u64, |sum, life| sum.wrapping_add(life.0));
        // One more for each node, so that a first life of zero counts.
        let lives = sum.wrapping_add(view.lives.len() as u64);
        let gone = view.lives.len().saturating_sub(view.members.len());
        Self { lives, gone: u32::try_from(gone).unwrap_or(u32::MAX) }
    }
}

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
    /// The members of the cluster changed; these processes went, most with their nodes.
    View(Vec<(ProcessId, Reason)>),
}

/// An item with its place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Entry {
    pub(super) at: Position,
    /// Whose item it is; meaningless for `View`.
    pub(super) from: ProcessId,
    pub(super) item: Item,
}

impl Entry {
    /// About what it takes.
    pub(super) fn bytes(&self) -> usize {
        let payload = if let Item::Message { payload, .. } = &self.item { payload.len() } else { 0 };
        payload + 64
    }
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
    /// That was all. The processes that run on this node: others of it that a copy knows have ended.
    HaveDone { processes: BTreeSet<u64> },
    /// From the coordinator: start from this copy.
    Base { members: Members, at: Position },
    /// Append this.
    Missing(Entry),
    /// The new view begins. Copies for which nothing came in this flush are dropped. Places have this epoch.
    Begin { epoch: Epoch },
}

/// A message of one group machine to another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupMessage {
    pub(super) view: GroupView,
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
    use crate::{Identity, Incarnation, NodeId};

    const FROM: ProcessId =
        ProcessId { node: Identity { node: NodeId(1), incarnation: Incarnation(2) }, number: 3 };
    const VIEW: GroupView = GroupView { lives: 5, gone: 6 };

    #[test]
    fn a_message_is_read_back() {
        let body = Body::Submit { from: FROM, item: Item::Message { number: 4, payload: b"hi".to_vec() } };
        let message = GroupMessage { view: VIEW, group: "g".into(), body };
        let bytes = message.encode();
        assert_eq!(bytes, [1, 5, 6, 1, b'g', 0, 1, 2, 3, 2, 4, 2, b'h', b'i']);
        assert_eq!(GroupMessage::decode(&bytes), Some(message));
    }

    /// One of each kind, with each kind of item.
    fn samples() -> Vec<Vec<u8>> {
        let at = Position { epoch: Epoch(300), order: 70_000 };
        let members = Members::from([(FROM, 4), (ProcessId { number: 9, ..FROM }, 0)]);
        let items = [
            Item::Join,
            Item::Leave(Reason::Crashed),
            Item::Message { number: 4, payload: vec![7; 100] },
            Item::View(vec![(FROM, Reason::NodeGone), (FROM, Reason::Left)]),
        ];
        let mut bodies = vec![
            Body::Welcome { members: members.clone(), at },
            Body::Received { order: 1 << 40 },
            Body::Have { members: members.clone(), at },
            Body::HaveDone { processes: (1..20).collect() },
            Body::Base { members, at },
            Body::Begin { epoch: Epoch(8) },
        ];
        for item in items {
            let entry = Entry { at, from: FROM, item: item.clone() };
            bodies.extend([
                Body::Submit { from: FROM, item },
                Body::Ordered { entry: entry.clone(), stable: 3 },
                Body::Kept(entry.clone()),
                Body::HaveEntry(entry.clone()),
                Body::Missing(entry),
            ]);
        }
        let of = |body| GroupMessage { view: VIEW, group: "group".into(), body }.encode();
        bodies.into_iter().map(of).collect()
    }

    #[test]
    fn hostile_bytes_are_none_or_a_message() {
        let samples = samples();
        let kinds: BTreeSet<u8> = samples.iter().map(|bytes| bytes[9]).collect();
        assert_eq!(kinds, (0..11).collect(), "every kind is there");
        let verdicts = crate::sim::hostile(&samples, 500, |bytes| match GroupMessage::decode(bytes) {
            Some(message) => {
                assert_eq!(GroupMessage::decode(&message.encode()), Some(message));
                true
            }
            None => false,
        });
        assert!(500 < verdicts.taken && 500 < verdicts.refused, "{verdicts:?}");
    }
}
