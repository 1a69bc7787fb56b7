//! Requests of the transmission phase: their 28 bytes, and the rules each must keep.

use super::consts::*;
use super::{Errno, PAYLOAD_BYTES_MAX, take_u16, take_u32, take_u64};
use crate::Geometry;

/// The size of a request without its payload.
pub const REQUEST_BYTES: usize = 28;

/// Bytes that are no request: the stream is out of step and must be closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a request: magic {0:#010x}")]
pub struct BadMagic(pub u32);

/// A request as it stands on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Command flags.
    pub flags: u16,
    /// The command.
    pub kind: u16,
    /// Chosen by the client, repeated in the answer.
    pub cookie: u64,
    /// Where.
    pub offset: u64,
    /// How much; for WRITE also the length of the payload that follows.
    pub length: u32,
}

impl Request {
    /// Its bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; REQUEST_BYTES] {
        let mut out = [0; REQUEST_BYTES];
        out[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        out[4..6].copy_from_slice(&self.flags.to_be_bytes());
        out[6..8].copy_from_slice(&self.kind.to_be_bytes());
        out[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        out[16..24].copy_from_slice(&self.offset.to_be_bytes());
        out[24..].copy_from_slice(&self.length.to_be_bytes());
        out
    }

    /// Reads it.
    ///
    /// # Errors
    /// If it does not begin with the magic number.
    pub fn decode(bytes: &[u8; REQUEST_BYTES]) -> Result<Self, BadMagic> {
        let mut from = &bytes[..];
        let fields = (|| {
            let magic = take_u32(&mut from)?;
            let flags = take_u16(&mut from)?;
            let kind = take_u16(&mut from)?;
            let cookie = take_u64(&mut from)?;
            let offset = take_u64(&mut from)?;
            let length = take_u32(&mut from)?;
            Some((magic, Self { flags, kind, cookie, offset, length }))
        })();
        let (magic, request) = fields.expect("28 bytes hold all the fields");
        if magic == REQUEST_MAGIC { Ok(request) } else { Err(BadMagic(magic)) }
    }

    /// How many bytes of payload follow it.
    #[must_use]
    pub fn payload_bytes(&self) -> u32 {
        if self.kind == CMD_WRITE { self.length } else { 0 }
    }
}

/// A request that keeps the rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Read.
    Read {
        /// Answer in one piece.
        df: bool,
    },
    /// Write the payload.
    Write {
        /// Answer when it is durable.
        fua: bool,
    },
    /// Make everything answered so far durable.
    Flush,
    /// Forget the range.
    Trim {
        /// Answer when that is durable.
        fua: bool,
    },
    /// Make the range read as zeros.
    WriteZeroes {
        /// Answer when it is durable.
        fua: bool,
        /// Keep it allocated.
        no_hole: bool,
    },
    /// Tell which ranges are allocated.
    BlockStatus,
    /// The end: nothing is answered.
    Disconnect,
}

/// Checks a request against the export and what was negotiated; the error is what the answer must say.
///
/// A WRITE's payload is to be consumed in every case.
///
/// # Errors
/// As section "Request types" of the protocol document wants them.
pub fn check(
    request: &Request,
    geometry: &Geometry,
    structured: bool,
    block_status: bool,
) -> Result<Command, Errno> {
    let allowed = CMD_FLAG_FUA
        | match request.kind {
            CMD_READ if structured => CMD_FLAG_DF,
            CMD_WRITE_ZEROES => CMD_FLAG_NO_HOLE,
            CMD_BLOCK_STATUS => CMD_FLAG_REQ_ONE,
            _ => 0,
        };
    if request.kind == CMD_DISC {
        return Ok(Command::Disconnect);
    }
    if request.flags & !allowed != 0 {
        return Err(Errno::Inval);
    }
    let fua = request.flags & CMD_FLAG_FUA != 0;
    let changes = matches!(request.kind, CMD_WRITE | CMD_TRIM | CMD_WRITE_ZEROES);
    if changes && geometry.read_only {
        return Err(Errno::Perm);
    }
    let inside =
        request.offset.checked_add(u64::from(request.length)).is_some_and(|end| end <= geometry.size_bytes);
    let block = u64::from(geometry.block_bytes);
    let whole = request.offset.is_multiple_of(block) && u64::from(request.length).is_multiple_of(block);
    let past_end =
        if matches!(request.kind, CMD_WRITE | CMD_WRITE_ZEROES) { Errno::NoSpc } else { Errno::Inval };
    let in_range = || match (inside, whole) {
        (false, _) => Err(past_end),
        (true, false) => Err(Errno::Inval),
        (true, true) => Ok(()),
    };
    let payload = || if request.length <= PAYLOAD_BYTES_MAX { Ok(()) } else { Err(Errno::Inval) };
    match request.kind {
        CMD_READ => {
            payload()?;
            in_range()?;
            Ok(Command::Read { df: request.flags & CMD_FLAG_DF != 0 })
        }
        CMD_WRITE => {
            payload()?;
            in_range()?;
            Ok(Command::Write { fua })
        }
        // Offset and length are reserved and zero; clients that fill them are not punished.
        CMD_FLUSH => Ok(Command::Flush),
        CMD_TRIM => {
            in_range()?;
            Ok(Command::Trim { fua })
        }
        CMD_WRITE_ZEROES => {
            in_range()?;
            Ok(Command::WriteZeroes { fua, no_hole: request.flags & CMD_FLAG_NO_HOLE != 0 })
        }
        CMD_BLOCK_STATUS if block_status && request.length != 0 => {
            if !inside {
                return Err(Errno::Inval);
            }
            Ok(Command::BlockStatus)
        }
        _ => Err(Errno::Inval),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry(read_only: bool) -> Geometry {
        Geometry {
            size_bytes: 1 << 20,
            block_bytes: 512,
            preferred_bytes: 4096,
            transfer_bytes_max: PAYLOAD_BYTES_MAX,
            read_only,
            can_discard: true,
        }
    }

    fn request(kind: u16, flags: u16, offset: u64, length: u32) -> Request {
        Request { flags, kind, cookie: 7, offset, length }
    }

    #[test]
    fn a_request_is_28_bytes_and_read_back() {
        let r = request(CMD_WRITE, 1, 0x0102_0304_0506_0708, 512);
        let bytes = r.encode();
        assert_eq!(bytes[..8], [0x25, 0x60, 0x95, 0x13, 0, 1, 0, 1]);
        assert_eq!(Request::decode(&bytes), Ok(r));
        let mut bad = bytes;
        bad[0] = 0;
        assert_eq!(Request::decode(&bad), Err(BadMagic(0x0060_9513)));
    }

    #[test]
    fn each_broken_rule_has_its_error() {
        let g = geometry(false);
        let end = 1 << 20;
        for (r, want) in [
            (request(CMD_READ, 0, end, 512), Errno::Inval),
            (request(CMD_READ, 0, u64::MAX, 512), Errno::Inval),
            (request(CMD_READ, 0, 1, 512), Errno::Inval),
            (request(CMD_WRITE, 0, end, 512), Errno::NoSpc),
            (request(CMD_WRITE_ZEROES, 0, end, 512), Errno::NoSpc),
            (request(CMD_TRIM, 0, end, 512), Errno::Inval),
            (request(CMD_WRITE, 0x8000, 0, 512), Errno::Inval),
            (request(CMD_WRITE, CMD_FLAG_DF, 0, 512), Errno::Inval),
            (request(CMD_READ, CMD_FLAG_DF, 0, 512), Errno::Inval),
            (request(CMD_BLOCK_STATUS, 0, 0, 512), Errno::Inval),
            (request(5, 0, 0, 512), Errno::Inval),
            (request(99, 0, 0, 512), Errno::Inval),
            (request(CMD_READ, 0, 0, PAYLOAD_BYTES_MAX + 512), Errno::Inval),
        ] {
            assert_eq!(check(&r, &g, false, false), Err(want), "{r:?}");
        }
        for kind in [CMD_WRITE, CMD_TRIM, CMD_WRITE_ZEROES] {
            let r = request(kind, 0, 0, 512);
            assert_eq!(check(&r, &geometry(true), true, false), Err(Errno::Perm));
            assert!(check(&r, &g, true, false).is_ok());
        }
        assert_eq!(
            check(&request(CMD_READ, CMD_FLAG_DF, 0, 512), &g, true, false),
            Ok(Command::Read { df: true })
        );
        assert_eq!(check(&request(CMD_READ, 0, 0, 0), &g, true, false), Ok(Command::Read { df: false }));
    }

    proptest::proptest! {
        #[test]
        fn hostile_requests_stay_inside_the_export_or_are_refused(
            flags in 0_u16..32, kind in 0_u16..10, cookie in 0_u64.., offset in 0_u64.., length in 0_u32..,
            near in 0_u64..4_000, short in 0_u32..140, read_only in proptest::bool::ANY,
        ) {
            let g = geometry(read_only);
            let (near, short) = (near * 512, short * 512);
            for (offset, length) in [(offset, length), (near, short), (near, length), (offset, short)] {
                let mut bytes = request(kind, flags, offset, length).encode();
                bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
                let read = Request::decode(&bytes).unwrap();
                assert_eq!((read.kind, read.flags, read.offset, read.length), (kind, flags, offset, length));
                // Nothing to say about a disconnect or a flush, which have no range.
                if check(&read, &g, true, true).is_ok() && matches!(kind, CMD_READ | CMD_WRITE | CMD_TRIM | CMD_WRITE_ZEROES) {
                    assert!(offset.checked_add(u64::from(length)).is_some_and(|end| end <= g.size_bytes), "{read:?}");
                    assert!(!g.read_only || kind == CMD_READ, "{read:?}");
                }
            }
        }
    }
}
