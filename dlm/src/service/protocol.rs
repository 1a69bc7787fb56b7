//! What goes over the socket: length-prefixed postcard frames in both directions.
//!
//! | offset | size | meaning |
//! |---|---|---|
//! | 0 | 4 | length of what follows, in bytes, little-endian, at most [`FRAME_BYTES_MAX`] |
//! | 4 | | the postcard encoding of [`ToServer`] or [`ToClient`] |
//!
//! The client begins with `Hello`, the server answers `Welcome` or `Refused`. The client numbers lockspaces and locks
//! itself, so that it never waits for a number. There is no answer to `Unlock` and `Cancel` of a lock that the server
//! does not know any more: the answer that says so is on its way.

use crate::wire::VALUE_BYTES_MAX;
use crate::{Completion, Flags, LockName, Mode, Range, ValueBlock};
use core::time::Duration;
use quorate_membership::{Identity, NodeId};
use serde::{Deserialize, Serialize};
use std::io;

/// The version of this protocol. Both ends must have the same.
pub const VERSION: u16 = 1;
/// The longest frame, in bytes, its length not counted.
pub const FRAME_BYTES_MAX: usize = 4096;
/// How many locks one connection may have or want.
pub const LOCKS_MAX: usize = 65_536;
/// How many bytes may wait for a client that does not read; then it is cut off.
pub const OUT_BYTES_MAX: usize = 4 << 20;
/// How many lockspaces one connection may open.
pub(crate) const SPACES_MAX: usize = 64;

/// What `Hello` begins with, so that a stranger is told apart from an old client.
pub(crate) const MAGIC: u32 = 0x51_4c_4b_31;

/// From the program.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum ToServer {
    /// First.
    Hello { magic: u32, version: u16 },
    /// Opens a lockspace; `value_bytes`: the size of its value blocks, if the program cares.
    Open { space: u32, name: String, value_bytes: Option<u16> },
    /// It is not needed any more; no lock on it is left.
    Close { space: u32 },
    /// A new lock.
    Request {
        space: u32,
        lock: u64,
        name: LockName,
        mode: Mode,
        range: Range,
        flags: Flags,
        owner: u64,
        timeout: Option<Duration>,
        priority: i8,
    },
    /// Another mode.
    Convert {
        lock: u64,
        mode: Mode,
        range: Option<Range>,
        flags: Flags,
        value: Option<ValueBlock>,
        timeout: Option<Duration>,
        priority: i8,
    },
    /// The end of a lock.
    Unlock { lock: u64, flags: Flags, value: Option<ValueBlock> },
    /// Withdraws what a lock waits for.
    Cancel { lock: u64 },
    /// One of the program's owners has ended.
    CloseOwner { space: u32, owner: u64 },
    /// Ends orphans.
    Purge { space: u32, node: NodeId, pid: u32 },
}

/// To the program.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum ToClient {
    /// The server listens; this is the node.
    Welcome { version: u16, node: Identity },
    /// The server does not listen to this client, or not any more. The connection ends.
    Refused { reason: String },
    /// The lockspace is open.
    Opened { space: u32, value_bytes: u16 },
    /// It is not.
    NotOpened { space: u32, reason: String },
    /// An operation ended.
    Done { lock: u64, completion: Completion },
    /// The lock blocks somebody who needs `mode`.
    Blocking { lock: u64, mode: Mode },
}

/// Adds a frame with `message` to `buffer`.
pub(crate) fn push_frame(buffer: &mut Vec<u8>, message: &impl Serialize) {
    let start = buffer.len();
    buffer.extend([0; 4]);
    // Serialising plain data into memory cannot fail, and all of it is within limits.
    if let Ok(mut out) = postcard::to_extend(message, core::mem::take(buffer)) {
        let len = u32::try_from(out.len() - start - 4).unwrap_or(u32::MAX);
        if let Some(header) = out.get_mut(start..start + 4) {
            header.copy_from_slice(&len.to_le_bytes());
        }
        *buffer = out;
    }
}

/// Takes the first whole frame off `bytes`: the message and how many bytes it took; `None` if it is not all there.
///
/// # Errors
/// A length out of bounds, or bytes that are no message.
pub(crate) fn take_frame<T: for<'a> Deserialize<'a>>(bytes: &[u8]) -> io::Result<Option<(T, usize)>> {
    let bad = |text: &str| io::Error::new(io::ErrorKind::InvalidData, text.to_owned());
    let Some((header, rest)) = bytes.split_first_chunk::<4>() else { return Ok(None) };
    let len = u32::from_le_bytes(*header) as usize;
    if FRAME_BYTES_MAX < len {
        return Err(bad("a frame above the limit"));
    }
    let Some(body) = rest.get(..len) else { return Ok(None) };
    match postcard::take_from_bytes(body) {
        Ok((message, [])) => Ok(Some((message, 4 + len))),
        Ok(_) => Err(bad("a frame with something behind its message")),
        Err(_) => Err(bad("a frame that does not decode")),
    }
}

/// Whether a value block may be looked at.
pub(crate) fn is_value_within_limit(value: Option<&ValueBlock>) -> bool {
    value.is_none_or(|v| v.len() <= VALUE_BYTES_MAX)
}

/// Cuts a text for people so that it fits a frame.
pub(crate) fn short(text: &str) -> String {
    text.chars().take(800).collect()
}

/// Frames for tests that speak to the service without a client.
#[cfg(feature = "sim")]
#[derive(Clone, Copy, Debug)]
pub struct TestFrames;

/// See [`TestFrames`].
#[cfg(feature = "sim")]
impl TestFrames {
    /// Says hello and opens lockspace `s` as number 1.
    #[must_use]
    pub fn hello_and_open(self) -> Vec<u8> {
        let mut out = Vec::new();
        push_frame(&mut out, &ToServer::Hello { magic: MAGIC, version: VERSION });
        push_frame(&mut out, &ToServer::Open { space: 1, name: "s".into(), value_bytes: None });
        out
    }

    /// Locks and unlocks name `r` there, with lock number `lock`.
    #[must_use]
    pub fn lock_and_unlock(self, lock: u64) -> Vec<u8> {
        let mut out = Vec::new();
        let (mode, flags, range) = (Mode::EX, Flags::NONE, Range::ALL);
        let Ok(name) = LockName::new(b"r") else { return out };
        push_frame(
            &mut out,
            &ToServer::Request {
                space: 1,
                lock,
                name,
                mode,
                range,
                flags,
                owner: 0,
                timeout: None,
                priority: 0,
            },
        );
        push_frame(&mut out, &ToServer::Unlock { lock, flags, value: None });
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn samples() -> Vec<ToServer> {
        let name = LockName::new(&[7; 64]).unwrap();
        let (mode, flags) = (Mode::EX, Flags::VALBLK);
        vec![
            ToServer::Hello { magic: MAGIC, version: VERSION },
            ToServer::Open { space: 1, name: "s".repeat(64), value_bytes: Some(256) },
            ToServer::Request {
                space: 1,
                lock: u64::MAX,
                name,
                mode,
                range: Range::ALL,
                flags,
                owner: 1,
                timeout: Some(Duration::from_secs(1)),
                priority: -1,
            },
            ToServer::Convert {
                lock: 1,
                mode,
                range: Some(Range::ALL),
                flags,
                value: Some(vec![1; 256]),
                timeout: None,
                priority: 0,
            },
            ToServer::Unlock { lock: 1, flags, value: None },
            ToServer::Cancel { lock: 1 },
            ToServer::Close { space: 1 },
            ToServer::CloseOwner { space: 1, owner: 2 },
            ToServer::Purge { space: 1, node: NodeId(1), pid: 0 },
        ]
    }

    #[test]
    fn frames_come_back_one_after_the_other() {
        let mut bytes = Vec::new();
        samples().iter().for_each(|m| push_frame(&mut bytes, m));
        let mut at = 0;
        for sample in samples() {
            // A frame of which a byte is missing is none yet.
            let (message, len) = take_frame::<ToServer>(&bytes[at..]).unwrap().unwrap();
            assert!(take_frame::<ToServer>(&bytes[at..at + len - 1]).unwrap().is_none());
            assert_eq!(message, sample);
            at += len;
        }
        assert_eq!(at, bytes.len());
    }

    #[test]
    fn a_hostile_length_is_refused_before_it_is_waited_for() {
        let error = take_frame::<ToServer>(&[0xff, 0xff, 0, 0]).unwrap_err();
        assert_eq!(error.to_string(), "a frame above the limit");
        let long = ToClient::Refused { reason: short(&"\u{10ffff}".repeat(5_000)) };
        let mut bytes = Vec::new();
        push_frame(&mut bytes, &long);
        assert_eq!(take_frame::<ToClient>(&bytes).unwrap().unwrap().0, long);
    }

    #[cfg(feature = "sim")]
    #[test]
    fn damaged_messages_of_every_kind_in_both_directions_are_an_error_or_a_message() {
        use quorate_membership::sim::{hostile, samples};
        fn read<T: for<'a> Deserialize<'a> + Serialize + PartialEq + core::fmt::Debug>(body: &[u8]) -> bool {
            let frame = [&u32::try_from(body.len()).unwrap().to_le_bytes()[..], body].concat();
            match take_frame::<T>(&frame) {
                Ok(Some((message, used))) => {
                    assert_eq!(used, frame.len());
                    let mut again = Vec::new();
                    push_frame(&mut again, &message);
                    assert_eq!(take_frame::<T>(&again).unwrap().unwrap().0, message);
                    true
                }
                Ok(None) => panic!("the frame is whole"),
                Err(_) => false,
            }
        }
        let mut to_server = samples(&[], 0..9, read::<ToServer>);
        for sample in super::tests::samples() {
            let mut frame = Vec::new();
            push_frame(&mut frame, &sample);
            to_server.push(frame.split_off(4));
        }
        let verdicts = hostile(&to_server, 300, read::<ToServer>);
        assert!(500 < verdicts.taken && 500 < verdicts.refused, "{verdicts:?}");
        let verdicts = hostile(&samples(&[], 0..6, read::<ToClient>), 300, read::<ToClient>);
        assert!(500 < verdicts.taken && 500 < verdicts.refused, "{verdicts:?}");
    }

    proptest! {
        #[test]
        fn hostile_bytes_give_an_error_or_a_message(
            which in 0usize..9,
            at in 0usize..400,
            byte: u8,
            noise in proptest::collection::vec(any::<u8>(), 0..100),
        ) {
            let mut bytes = Vec::new();
            push_frame(&mut bytes, &samples()[which]);
            if let Some(b) = bytes.get_mut(at) {
                *b = byte;
            }
            let _ = take_frame::<ToServer>(&bytes);
            let mut hostile = vec![noise.len() as u8, 0, 0, 0];
            hostile.extend(noise);
            let _ = take_frame::<ToServer>(&hostile);
            let _ = take_frame::<ToClient>(&hostile);
        }
    }
}
