//! The messages between lock managers.
//!
//! A frame is one byte of version, then in postcard its header and one or more messages. Everything in it is checked before it is used: sizes here, meaning in
//! the machine. Bytes that do not decode give an error and change nothing.

use crate::machine::MovedResource;
use crate::{Completion, FencingToken, Flags, LockId, LockName, Mode, Range, ValueBlock};
use quorate_membership::{Epoch, Identity};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// The version of the protocol, the first byte of each frame.
pub(crate) const VERSION: u8 = 1;
/// The largest frame, in bytes.
pub(crate) const FRAME_BYTES_MAX: usize = 256 * 1024;
/// A frame that has reached this size is not filled further, in bytes.
pub(crate) const FRAME_BYTES_FULL: usize = 32 * 1024;
/// The most names or locks in one message; a list that is longer is sent in pieces.
pub(crate) const ITEMS_MAX: usize = 128;
/// The largest value block, in bytes.
pub(crate) const VALUE_BYTES_MAX: usize = 256;
/// The most operations that are under way on one lock: one, a cancel of it, and an unlock.
pub(crate) const OPERATIONS_MAX: usize = 4;

/// A mastership of a resource: the higher one is the later one (R15).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct Generation {
    /// The bucket map under which the directory gave it.
    pub(crate) map: Epoch,
    /// Counts within the bucket's life under that map, in steps of [`Self::STEP`]; below that, how often it has moved.
    pub(crate) number: u64,
}

impl Generation {
    /// From one mastership that the directory gave to the next.
    pub(crate) const STEP: u64 = 1 << 16;

    /// That of the next master, if it moves. `None`: it has moved too often and stays.
    pub(crate) fn moved(self) -> Option<Self> {
        let number = self.number.checked_add(1)?;
        (!number.is_multiple_of(Self::STEP)).then_some(Self { number, ..self })
    }
}

/// What is asked of a lock.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Operation {
    /// A new lock.
    New { mode: Mode, range: Range, flags: Flags, owner: u64, priority: i8 },
    /// Another mode, and another range if there is one.
    Convert { mode: Mode, range: Option<Range>, flags: Flags, value: Option<ValueBlock>, priority: i8 },
    /// The end.
    Unlock { flags: Flags, value: Option<ValueBlock> },
    /// Withdraw what the lock waits for.
    Cancel,
}

impl Operation {
    /// The end of a lock that nobody waits for.
    pub(crate) const RELEASE: Self = Self::Unlock { flags: Flags::RELEASE, value: None };
}

/// An operation with its number at the holder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Numbered {
    pub(crate) op: u32,
    pub(crate) operation: Operation,
}

/// A lock as its holder tells it to a new master.
///
/// An operation without an answer is told beside the mode it started from, never as done (R13).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Relock {
    pub(crate) name: LockName,
    pub(crate) id: LockId,
    pub(crate) owner: u64,
    /// A piece of a POSIX owner, or a request for one.
    pub(crate) posix: bool,
    pub(crate) range: Range,
    pub(crate) granted: Option<Mode>,
    pub(crate) token: FencingToken,
    /// Granted in passing through a hold: proves nothing about what the dead node has.
    pub(crate) recovery: bool,
    /// The holder's copy of the value block, if it uses it, and how often that was written.
    pub(crate) value: Option<ValueBlock>,
    pub(crate) value_sequence: u64,
    pub(crate) value_invalid: bool,
    /// The copy was the newest when the mode in force was granted, and nobody could write since.
    pub(crate) value_fresh: bool,
    /// The copy was sent by a master that left cleanly, with this lock in force: it is the resource's.
    pub(crate) value_clean: bool,
    pub(crate) operations: Vec<Numbered>,
}

/// What the previous owner of a bucket knows of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct BucketState {
    pub(crate) bucket: u16,
    /// It knew the bucket whole, or from somebody who did: who failed before may have nothing of it but what is said here.
    pub(crate) is_whole: bool,
    pub(crate) floor: u64,
    pub(crate) holds: BTreeSet<Identity>,
    pub(crate) names: Vec<(LockName, BTreeSet<Identity>)>,
}

/// A message from a shard of one node to the same shard of another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Message {
    /// Who masters the name? Asks the directory; an unmastered one becomes the asker's.
    Lookup { name: LockName, stale: Option<Generation> },
    /// This one does. If it is you: grants continue after `floor`, and these failed lives may have it.
    LookupReply {
        name: LockName,
        master: Identity,
        generation: Generation,
        floor: u64,
        assumed: BTreeSet<Identity>,
    },
    /// I do not master the name any more; the number of its last grant.
    Remove { name: LockName, generation: Generation, sequence: u64 },
    /// An operation on a lock, for the master.
    Operate { name: LockName, generation: Generation, id: LockId, numbered: Numbered },
    /// The end of a lock, for the master; the holder has forgotten the lock and wants no answer.
    Release { name: LockName, generation: Generation, id: LockId },
    /// I was not the master of that generation when you released the lock: tell its master.
    NotReleased { name: LockName, generation: Generation, id: LockId },
    /// I am not the master of that generation: look again (R15).
    Moved { name: LockName, generation: Generation },
    /// An operation ended.
    Done { id: LockId, op: u32, completion: Completion, value_sequence: u64 },
    /// The lock blocks somebody.
    Blocking { id: LockId, mode: Mode },
    /// My part of a bucket map: names that I master in buckets that came to you, locks whose master is gone, and what
    /// I know of buckets that were mine. `last`: nothing more comes for this map.
    Register {
        mastered: Vec<(LockName, Generation, u64)>,
        locks: Vec<Relock>,
        buckets: Vec<BucketState>,
        last: bool,
    },
    /// I master this name now, from what was registered for the map.
    Remastered { name: LockName, generation: Generation, map: Epoch },
    /// I freeze a resource that you have locks on, or that is to be yours: it moves to `to`. Answer (R15).
    Moving { name: LockName, generation: Generation, to: Identity, attempt: u64 },
    /// I have told you all I want of it under that mastership; and if it is to be mine, whether I take it.
    Known { name: LockName, attempt: u64, agrees: bool },
    /// It does not move: I am its master still.
    Thawed { name: LockName, generation: Generation },
    /// The resource, whole: yours from now on. These locks were released meanwhile.
    Move {
        name: LockName,
        generation: Generation,
        resource: Box<MovedResource>,
        released: Vec<(Identity, LockId)>,
    },
    /// I master it from now on: tell me what the master before has not answered.
    Taken { name: LockName, generation: Generation },
    /// I, the master before, know.
    TakenAck { name: LockName, generation: Generation },
    /// For the directory: it is mine since it moved; the number of its last grant.
    Claim { name: LockName, generation: Generation, sequence: u64 },
    /// The directory has it.
    Claimed { name: LockName, generation: Generation },
    /// For the master before: everybody knows, forget that you were.
    MoveOver { name: LockName, generation: Generation },
    /// For the directory: I had given it to a node that failed, and do not know how far it came.
    HeirLost { name: LockName, generation: Generation, sequence: u64 },
    /// Your registered locks were not taken, the name has a master: look again.
    Elsewhere { name: LockName },
    /// I am leaving and have frozen what I master: value blocks of your locks as they are for good. `last`: answer.
    Leaving { values: Vec<(LockId, Option<ValueBlock>, u64, bool)>, last: bool },
    /// Everything you sent before `Leaving` has arrived.
    LeavingAck,
    /// My lock belongs to another owner of this node now.
    Owner { name: LockName, id: LockId, owner: u64 },
    /// End your orphans of this process (0: of all).
    Purge { pid: u32 },
}

/// Where the messages of a frame come from and belong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Header {
    /// The lockspace: the hash of its name.
    pub(crate) space: u64,
    pub(crate) shard: u8,
    /// The sender's bucket map.
    pub(crate) map: Epoch,
    /// Size of value blocks and weakest hold: all members must agree.
    pub(crate) options: (u16, Option<Mode>),
}

/// Messages with their address, one or more, in the order they were sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Frame {
    pub(crate) header: Header,
    pub(crate) messages: Vec<Message>,
}

/// A frame that is being filled.
#[derive(Debug)]
pub(crate) struct FrameWriter {
    header: Header,
    bytes: Vec<u8>,
}

impl FrameWriter {
    pub(crate) fn new(header: Header) -> Self {
        let mut writer = Self { header, bytes: vec![VERSION] };
        writer.append(&header);
        writer
    }

    /// Whether a message of this address fits in too.
    pub(crate) fn takes(&self, header: &Header) -> bool {
        self.header == *header && self.bytes.len() < FRAME_BYTES_FULL
    }

    pub(crate) fn push(&mut self, message: &Message) {
        self.append(message);
    }

    fn append<T: Serialize>(&mut self, item: &T) {
        // Serialising plain data into memory cannot fail.
        self.bytes = postcard::to_extend(item, core::mem::take(&mut self.bytes)).unwrap_or_default();
    }

    pub(crate) fn finish(self) -> Vec<u8> {
        self.bytes
    }
}

/// Why a frame was not understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum WireError {
    #[error("a frame of {0} bytes is above the limit")]
    TooLarge(usize),
    #[error("a frame of protocol version {0:?}, this node speaks {VERSION}")]
    Version(Option<u8>),
    #[error("a frame that does not decode")]
    Malformed,
    #[error("a frame with {0} beyond its limit")]
    Limit(&'static str),
}

impl Frame {
    #[cfg(any(test, feature = "sim"))]
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut writer = FrameWriter::new(self.header);
        self.messages.iter().for_each(|m| writer.push(m));
        writer.finish()
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        if FRAME_BYTES_MAX < bytes.len() {
            return Err(WireError::TooLarge(bytes.len()));
        }
        let (version, rest) = bytes.split_first().ok_or(WireError::Version(None))?;
        if *version != VERSION {
            return Err(WireError::Version(Some(*version)));
        }
        let malformed = |_| WireError::Malformed;
        let (header, mut rest): (Header, _) = postcard::take_from_bytes(rest).map_err(malformed)?;
        let mut messages = Vec::new();
        while !rest.is_empty() {
            let (message, left): (Message, _) = postcard::take_from_bytes(rest).map_err(malformed)?;
            message.check()?;
            messages.push(message);
            rest = left;
        }
        if messages.is_empty() {
            return Err(WireError::Malformed);
        }
        Ok(Self { header, messages })
    }
}

pub(crate) fn check_value(value: Option<&ValueBlock>) -> Result<(), WireError> {
    match value {
        Some(v) if VALUE_BYTES_MAX < v.len() => Err(WireError::Limit("a value block")),
        _ => Ok(()),
    }
}

impl Operation {
    /// Asks only who stands against a lock.
    pub(crate) fn is_test(&self) -> bool {
        matches!(self, Self::New { flags, .. } if flags.has(Flags::TEST))
    }

    fn check(&self) -> Result<(), WireError> {
        match self {
            Self::New { range, .. } | Self::Convert { range: Some(range), .. } if range.end < range.start => {
                Err(WireError::Limit("a range"))
            }
            Self::Convert { value, .. } | Self::Unlock { value, .. } => check_value(value.as_ref()),
            _ => Ok(()),
        }
    }
}

const _: () =
    assert!(FRAME_BYTES_FULL * 2 < FRAME_BYTES_MAX, "room for one more message of the largest size");

impl Message {
    fn check(&self) -> Result<(), WireError> {
        match self {
            Self::Operate { numbered, .. } => numbered.operation.check(),
            Self::Done { completion: Completion::Granted(grant), .. } => check_value(grant.value.as_ref()),
            Self::Register { mastered, locks, buckets, .. } => {
                let names: usize = buckets.iter().map(|b| b.names.len()).sum();
                if [mastered.len(), locks.len(), buckets.len(), names].iter().any(|n| ITEMS_MAX < *n) {
                    return Err(WireError::Limit("a list"));
                }
                for lock in locks {
                    check_value(lock.value.as_ref())?;
                    if OPERATIONS_MAX < lock.operations.len() || lock.range.end < lock.range.start {
                        return Err(WireError::Limit("a lock"));
                    }
                    for numbered in &lock.operations {
                        numbered.operation.check()?;
                    }
                }
                Ok(())
            }
            Self::Move { resource, released, .. } => {
                if ITEMS_MAX < released.len() {
                    return Err(WireError::Limit("a list"));
                }
                resource.check()
            }
            Self::Leaving { values, .. } => {
                if ITEMS_MAX < values.len() {
                    return Err(WireError::Limit("a list"));
                }
                values.iter().try_for_each(|(_, value, ..)| check_value(value.as_ref()))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use quorate_membership::{Incarnation, NodeId};

    fn frame(message: Message) -> Frame {
        let header = Header { space: 7, shard: 3, map: Epoch(9), options: (32, Some(Mode::EX)) };
        Frame { header, messages: vec![message] }
    }

    fn sample() -> Vec<Frame> {
        let name = LockName::new(b"a name").unwrap();
        let who = Identity::new(NodeId(3), Incarnation(4));
        let generation = Generation { map: Epoch(4), number: 17 };
        let numbered = Numbered {
            op: 3,
            operation: Operation::Convert {
                mode: Mode::NL,
                range: Some(Range { start: 1, end: 2 }),
                flags: Flags::VALBLK,
                value: Some(vec![1; 32]),
                priority: 1,
            },
        };
        let lock = Relock {
            name: name.clone(),
            id: LockId(9),
            owner: 1,
            posix: false,
            range: Range::ALL,
            granted: Some(Mode::EX),
            token: FencingToken { epoch: 4, sequence: 8 },
            recovery: false,
            value: Some(vec![2; 32]),
            value_sequence: 2,
            value_invalid: false,
            value_fresh: true,
            value_clean: false,
            operations: vec![numbered.clone()],
        };
        let bucket = BucketState {
            bucket: 3,
            is_whole: true,
            floor: 9,
            holds: [who].into(),
            names: vec![(name.clone(), [who].into())],
        };
        vec![
            frame(Message::Lookup { name: name.clone(), stale: Some(generation) }),
            frame(Message::Operate { name: name.clone(), generation, id: LockId(1), numbered }),
            frame(Message::Register {
                mastered: vec![(name, generation, 5)],
                locks: vec![lock],
                buckets: vec![bucket],
                last: true,
            }),
            frame(Message::Leaving { values: vec![(LockId(2), Some(vec![0; 32]), 1, false)], last: true }),
        ]
    }

    #[test]
    fn frames_come_back_as_they_were_sent() {
        for frame in sample() {
            assert_eq!(Frame::decode(&frame.encode()), Ok(frame));
        }
        let all = Frame {
            header: frame(Message::LeavingAck).header,
            messages: sample().into_iter().flat_map(|f| f.messages).collect(),
        };
        assert_eq!(Frame::decode(&all.encode()), Ok(all));
    }

    #[test]
    fn another_version_and_trailing_bytes_are_refused() {
        let mut bytes = sample()[0].encode();
        bytes.push(0);
        assert_eq!(Frame::decode(&bytes), Err(WireError::Malformed));
        bytes[0] = 2;
        assert_eq!(Frame::decode(&bytes), Err(WireError::Version(Some(2))));
        assert_eq!(Frame::decode(&[]), Err(WireError::Version(None)));
        assert_eq!(
            Frame::decode(&vec![1; FRAME_BYTES_MAX + 1]),
            Err(WireError::TooLarge(FRAME_BYTES_MAX + 1))
        );
    }

    #[cfg(feature = "sim")]
    #[test]
    fn hostile_frames_with_every_message_are_an_error_or_within_the_limits() {
        use quorate_membership::sim::{hostile, samples};
        let read = |bytes: &[u8]| match Frame::decode(bytes) {
            Ok(frame) => {
                assert!(frame.messages.iter().all(|m| m.check().is_ok()));
                assert_eq!(Frame::decode(&frame.encode()), Ok(frame));
                true
            }
            Err(_) => false,
        };
        let mut header = frame(Message::LeavingAck).encode();
        let last = header.pop();
        assert_eq!(last, Some(23), "the byte of the kind");
        let mut samples = samples(&header, 0..26, read);
        samples.extend(sample().iter().map(Frame::encode));
        let verdicts = hostile(&samples, 200, read);
        assert!(1_000 < verdicts.taken && 1_000 < verdicts.refused, "{verdicts:?}");
    }

    proptest! {
        #[test]
        fn hostile_bytes_give_an_error_or_a_frame_within_limits(
            which in 0usize..4,
            at in 0usize..400,
            byte: u8,
            noise in proptest::collection::vec(any::<u8>(), 0..300),
        ) {
            let mut bytes = sample()[which].encode();
            if let Some(b) = bytes.get_mut(at) {
                *b = byte;
            }
            if let Ok(frame) = Frame::decode(&bytes) {
                prop_assert!(frame.messages.iter().all(|m| m.check().is_ok()));
            }
            let mut hostile = vec![VERSION];
            hostile.extend(noise);
            let _ = Frame::decode(&hostile);
        }
    }
}
