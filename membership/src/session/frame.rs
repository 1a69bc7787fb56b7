//! The frames on a link: `length u32 LE | header (postcard) | payload`, where the length counts header and payload.

use crate::{Epoch, Identity, ServiceId};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// The version of this layout; both ends name theirs in the hello.
pub const SESSION_VERSION: u16 = 2;
/// The longest message a service may send, in bytes.
pub const MESSAGE_BYTES_MAX: usize = 1 << 20;
/// The longest frame between two ends, in bytes, without its length field: the longest message and room for a header.
const INNER_BYTES_MAX: usize = MESSAGE_BYTES_MAX + 64;
/// The longest frame on a connection: the longest one between two ends in the envelope of a relay.
pub const FRAME_BYTES_MAX: usize = INNER_BYTES_MAX + 64;

const LENGTH_BYTES: usize = 4;

/// What a frame is. `Data` has a message as its payload, `Relay` and `Relayed` have a frame; the others have none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Header {
    /// The first frame in each direction on a link.
    Resume {
        /// One above every generation the sender had seen of this session when the link came up.
        generation: u64,
        /// The last message taken in, so that the peer resends what follows it.
        received: u64,
        /// The last message given to its service; credit is counted from here.
        delivered: u64,
        /// How many bytes of undelivered messages the sender of this frame takes.
        credit_bytes: u64,
    },
    /// A message.
    Data {
        /// Its number in this direction of the session; the first is 1.
        sequence: u64,
        /// The epoch the sender had installed.
        epoch: Epoch,
        /// For whom.
        service: u8,
    },
    /// How far the receiver is.
    Ack {
        /// As in `Resume`.
        received: u64,
        /// As in `Resume`.
        delivered: u64,
    },
    /// "Pass this frame on to `to`", said to a common peer (R3).
    Relay {
        /// For whom it is.
        to: Identity,
        /// Names the relayed link among those of the two ends.
        tag: u64,
    },
    /// "`from` asked me to pass this frame on to you." That it is true rests on trusting the relay, which is a member.
    Relayed {
        /// The certified peer of the relay from whom it came.
        from: Identity,
        /// As in `Relay`.
        tag: u64,
    },
    /// The answer to a `Relay` that cannot be passed on: there is no direct path to `to` here either.
    NoRelay {
        /// As in `Relay`.
        to: Identity,
        /// As in `Relay`.
        tag: u64,
    },
    /// The end of a relayed link, or the answer to a frame of one that is not known.
    Bye,
}

/// Why bytes are no frame. The link is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// The length field is above the limit.
    #[error("a frame of {size} bytes is above the limit of {FRAME_BYTES_MAX}")]
    TooLong {
        /// What it says.
        size: usize,
    },
    /// The header does not decode, or a frame without payload has one.
    #[error("a frame that does not decode")]
    Malformed,
}

/// Takes the first whole frame out of received bytes: its content, and how many bytes it used with its length field.
/// `None` says that more bytes are needed.
///
/// # Errors
/// [`FrameError::TooLong`], from the length field alone, so that nothing is buffered for it.
pub fn take_frame(bytes: &[u8]) -> Result<Option<(&[u8], usize)>, FrameError> {
    let Some((length, rest)) = bytes.split_first_chunk::<LENGTH_BYTES>() else {
        return Ok(None);
    };
    let size = u32::from_le_bytes(*length) as usize;
    if FRAME_BYTES_MAX < size {
        return Err(FrameError::TooLong { size });
    }
    Ok(rest.get(..size).map(|frame| (frame, LENGTH_BYTES + size)))
}

pub(super) fn encode(header: Header, payload: &[u8]) -> Arc<[u8]> {
    let mut bytes = Vec::with_capacity(LENGTH_BYTES + 40 + payload.len());
    bytes.extend_from_slice(&[0; LENGTH_BYTES]);
    let mut bytes = postcard::to_extend(&header, bytes).expect("plain data into memory always encodes");
    bytes.extend_from_slice(payload);
    let size = u32::try_from(bytes.len() - LENGTH_BYTES).expect("the payload was checked against its limit");
    if let Some(length) = bytes.first_chunk_mut::<LENGTH_BYTES>() {
        *length = size.to_le_bytes();
    }
    bytes.into()
}

pub(super) fn decode(frame: &[u8]) -> Result<(Header, &[u8]), FrameError> {
    let (header, payload) = postcard::take_from_bytes(frame).map_err(|_| FrameError::Malformed)?;
    let fits = match header {
        Header::Data { .. } => payload.len() <= MESSAGE_BYTES_MAX,
        Header::Relay { .. } | Header::Relayed { .. } => payload.len() <= INNER_BYTES_MAX,
        Header::Resume { .. } | Header::Ack { .. } | Header::NoRelay { .. } | Header::Bye => {
            payload.is_empty()
        }
    };
    if fits { Ok((header, payload)) } else { Err(FrameError::Malformed) }
}

/// A frame's content: what `decode` takes.
pub(super) fn content(bytes: &[u8]) -> &[u8] {
    bytes.get(LENGTH_BYTES..).unwrap_or_default()
}

pub(super) fn data(sequence: u64, epoch: Epoch, service: ServiceId, payload: &[u8]) -> Arc<[u8]> {
    encode(Header::Data { sequence, epoch, service: service.0 }, payload)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_is_read_back_and_a_part_of_one_waits_for_the_rest() {
        let bytes = data(7, Epoch(3), ServiceId::DLM, b"hello");
        for cut in 0..bytes.len() {
            assert_eq!(take_frame(&bytes[..cut]), Ok(None), "{cut}");
        }
        let (frame, used) = take_frame(&bytes).unwrap().unwrap();
        assert_eq!(used, bytes.len());
        let header = Header::Data { sequence: 7, epoch: Epoch(3), service: 1 };
        assert_eq!(decode(frame), Ok((header, b"hello".as_slice())));
    }

    #[test]
    fn the_layout_does_not_change_unnoticed() {
        assert_eq!(&*data(7, Epoch(3), ServiceId::DLM, b"hi"), &[6, 0, 0, 0, 1, 7, 3, 1, b'h', b'i']);
        let ack = encode(Header::Ack { received: 200, delivered: 5 }, b"");
        assert_eq!(&*ack, &[4, 0, 0, 0, 2, 200, 1, 5]);
        let to = Identity::new(crate::NodeId(9), crate::Incarnation(2));
        let relay = encode(Header::Relay { to, tag: 5 }, content(&ack));
        assert_eq!(&*relay, &[8, 0, 0, 0, 3, 9, 2, 5, 2, 200, 1, 5]);
    }

    #[test]
    fn a_length_above_the_limit_is_refused_before_anything_is_buffered() {
        let bytes = (FRAME_BYTES_MAX as u32 + 1).to_le_bytes();
        assert_eq!(take_frame(&bytes), Err(FrameError::TooLong { size: FRAME_BYTES_MAX + 1 }));
    }

    #[test]
    fn hostile_bytes_are_an_error_or_a_frame_within_the_limits() {
        let who = Identity::new(crate::NodeId(9), crate::Incarnation(2));
        let headers = [
            Header::Resume { generation: 1, received: 300, delivered: 299, credit_bytes: 1 << 20 },
            Header::Data { sequence: 7, epoch: Epoch(3), service: 1 },
            Header::Ack { received: 200, delivered: 5 },
            Header::Relay { to: who, tag: 5 },
            Header::Relayed { from: who, tag: 5 },
            Header::NoRelay { to: who, tag: 5 },
            Header::Bye,
        ];
        let with_payload =
            |h: &Header| matches!(h, Header::Data { .. } | Header::Relay { .. } | Header::Relayed { .. });
        let frames: Vec<Vec<u8>> = headers
            .iter()
            .map(|h| encode(*h, if with_payload(h) { b"payload" } else { b"" }).to_vec())
            .collect();
        let contents: Vec<Vec<u8>> = frames.iter().map(|f| content(f).to_vec()).collect();
        let verdicts = crate::sim::hostile(&contents, 2_000, |bytes| match decode(bytes) {
            Ok((header, payload)) => {
                assert!(payload.is_empty() || with_payload(&header));
                assert_eq!(decode(content(&encode(header, payload))), Ok((header, payload)));
                true
            }
            Err(error) => {
                assert_eq!(error, FrameError::Malformed);
                false
            }
        });
        assert!(1_000 < verdicts.taken && 1_000 < verdicts.refused, "{verdicts:?}");
        // With their lengths: what is taken lies within the bytes, and nothing is waited for that is above the limit.
        crate::sim::hostile(&frames, 2_000, |bytes| match take_frame(bytes) {
            Ok(Some((frame, used))) => {
                assert!(used <= bytes.len() && frame.len() + LENGTH_BYTES == used);
                true
            }
            Ok(None) => {
                assert!(bytes.len() < LENGTH_BYTES + FRAME_BYTES_MAX);
                false
            }
            Err(error) => matches!(error, FrameError::Malformed),
        });
    }
}
