//! Replies of the transmission phase: simple ones, and structured ones in chunks.

use super::consts::*;
use super::{Errno, PAYLOAD_BYTES_MAX, STRING_BYTES_MAX, Verifier};
use super::{put_u16, put_u32, put_u64, take_u16, take_u32, take_u64};

/// The size of a simple reply without its data.
pub const SIMPLE_HEADER_BYTES: usize = 16;
/// The size of the header of a structured chunk.
pub const CHUNK_HEADER_BYTES: usize = 20;

/// A simple reply: all of it, unless it answers a READ that succeeded, whose data follows.
#[must_use]
pub fn encode_simple(cookie: u64, error: Option<Errno>) -> Vec<u8> {
    let mut out = Vec::with_capacity(SIMPLE_HEADER_BYTES);
    put_u32(&mut out, SIMPLE_REPLY_MAGIC);
    put_u32(&mut out, error.map_or(0, Errno::code));
    put_u64(&mut out, cookie);
    out
}

fn chunk(cookie: u64, flags: u16, kind: u16, length: u32) -> Vec<u8> {
    let mut out = Vec::with_capacity(CHUNK_HEADER_BYTES + 32);
    put_u32(&mut out, STRUCTURED_REPLY_MAGIC);
    put_u16(&mut out, flags);
    put_u16(&mut out, kind);
    put_u64(&mut out, cookie);
    put_u32(&mut out, length);
    out
}

/// A reply without contents that ends a successful one.
#[must_use]
pub fn encode_none(cookie: u64) -> Vec<u8> {
    chunk(cookie, CHUNK_DONE, CHUNK_NONE, 0)
}

/// The header of a chunk of `len` bytes read at `offset`; the bytes follow.
#[must_use]
pub fn encode_data_header(cookie: u64, done: bool, offset: u64, len: u32) -> Vec<u8> {
    assert!(0 < len && len <= PAYLOAD_BYTES_MAX, "a data chunk has 1 byte to 32 MiB");
    let mut out = chunk(cookie, if done { CHUNK_DONE } else { 0 }, CHUNK_OFFSET_DATA, len + 8);
    put_u64(&mut out, offset);
    out
}

/// An error that ends the reply; without `text` it is empty.
#[must_use]
pub fn encode_error(cookie: u64, error: Errno, text: &str) -> Vec<u8> {
    let text = text.as_bytes().get(..text.len().min(256)).unwrap_or_default();
    let mut out = chunk(cookie, CHUNK_DONE, CHUNK_ERROR, 6 + text.len() as u32);
    put_u32(&mut out, error.code());
    put_u16(&mut out, text.len() as u16);
    out.extend_from_slice(text);
    out
}

/// The answer to a BLOCK_STATUS: one extent of `len` bytes with these flags.
#[must_use]
pub fn encode_block_status(cookie: u64, context: u32, len: u32, flags: u32) -> Vec<u8> {
    let mut out = chunk(cookie, CHUNK_DONE, CHUNK_BLOCK_STATUS, 12);
    put_u32(&mut out, context);
    put_u32(&mut out, len);
    put_u32(&mut out, flags);
    out
}

/// Our chunk with the export's verifier, which ends a successful flush or stands before its error.
#[must_use]
pub fn encode_verifier(cookie: u64, done: bool, verifier: Verifier) -> Vec<u8> {
    let mut out = chunk(cookie, if done { CHUNK_DONE } else { 0 }, CHUNK_VERIFIER, 16);
    out.extend_from_slice(&verifier.0);
    out
}

/// What a client finds first in a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplyHeader {
    /// A simple reply, 16 bytes long.
    Simple {
        /// The request it answers.
        cookie: u64,
        /// Whether it failed.
        error: Option<Errno>,
    },
    /// A chunk, 20 bytes long, with `length` bytes behind it.
    Chunk(Chunk),
}

/// The header of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Whether it is the reply's last.
    pub done: bool,
    /// Its type.
    pub kind: u16,
    /// The request it answers.
    pub cookie: u64,
    /// How many bytes follow.
    pub length: u32,
}

/// A reply that breaks the protocol: the connection must be closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ReplyError {
    /// Not the start of a reply.
    #[error("not a reply: magic {0:#010x}")]
    Magic(u32),
    /// A chunk of a type that was not negotiated.
    #[error("a chunk of unknown type {0:#06x}")]
    Kind(u16),
    /// A chunk whose length does not fit its type.
    #[error("a chunk of type {kind:#06x} with {length} bytes")]
    Length {
        /// Its type.
        kind: u16,
        /// Its length.
        length: u32,
    },
    /// An error chunk that says "no error".
    #[error("an error chunk without an error")]
    NoError,
}

impl ReplyHeader {
    /// Reads the first 16 bytes of a reply; a chunk's last four follow and are given to [`Chunk::set_length`].
    ///
    /// # Errors
    /// If the magic number is none of a reply's.
    pub fn decode(bytes: &[u8; SIMPLE_HEADER_BYTES]) -> Result<Self, ReplyError> {
        let mut from = &bytes[..];
        let fields = (|| Some((take_u32(&mut from)?, take_u32(&mut from)?, take_u64(&mut from)?)))();
        let (magic, word, cookie) = fields.expect("16 bytes hold all the fields");
        match magic {
            SIMPLE_REPLY_MAGIC => Ok(Self::Simple { cookie, error: Errno::from_code(word) }),
            STRUCTURED_REPLY_MAGIC => {
                let (flags, kind) = ((word >> 16) as u16, (word & 0xffff) as u16);
                Ok(Self::Chunk(Chunk { done: flags & CHUNK_DONE != 0, kind, cookie, length: 0 }))
            }
            other => Err(ReplyError::Magic(other)),
        }
    }
}

/// What stands behind a chunk's header, data of a read excepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChunkBody {
    /// Nothing.
    None,
    /// Data for this offset; the other bytes of the chunk are the data.
    Data {
        /// Where it belongs.
        offset: u64,
    },
    /// Zeros.
    Hole {
        /// Where.
        offset: u64,
        /// How many.
        len: u32,
    },
    /// The export's verifier.
    Verifier(Verifier),
    /// The request failed.
    Error(Errno),
}

impl Chunk {
    /// Puts in the length, checked against the type, and says how many bytes of the body are to be decoded; the rest is
    /// a read's data.
    ///
    /// # Errors
    /// See [`ReplyError`].
    pub fn set_length(&mut self, bytes: [u8; 4]) -> Result<usize, ReplyError> {
        self.length = u32::from_be_bytes(bytes);
        let length = self.length;
        let bad = ReplyError::Length { kind: self.kind, length };
        match self.kind {
            CHUNK_NONE if length == 0 && self.done => Ok(0),
            CHUNK_OFFSET_DATA if 8 < length && length <= PAYLOAD_BYTES_MAX + 8 => Ok(8),
            CHUNK_OFFSET_HOLE if length == 12 => Ok(12),
            CHUNK_VERIFIER if length == 16 => Ok(16),
            k if k & 0x8000 != 0 && 6 <= length && length as usize <= STRING_BYTES_MAX + 14 => {
                Ok(length as usize)
            }
            CHUNK_NONE | CHUNK_OFFSET_DATA | CHUNK_OFFSET_HOLE | CHUNK_VERIFIER => Err(bad),
            k if k & 0x8000 != 0 => Err(bad),
            k => Err(ReplyError::Kind(k)),
        }
    }

    /// Reads the body of as many bytes as [`Chunk::set_length`] said.
    ///
    /// # Errors
    /// See [`ReplyError`].
    pub fn body(&self, mut bytes: &[u8]) -> Result<ChunkBody, ReplyError> {
        let bad = ReplyError::Length { kind: self.kind, length: self.length };
        match self.kind {
            CHUNK_NONE => Ok(ChunkBody::None),
            CHUNK_OFFSET_DATA => Ok(ChunkBody::Data { offset: take_u64(&mut bytes).ok_or(bad)? }),
            CHUNK_OFFSET_HOLE => {
                let offset = take_u64(&mut bytes).ok_or(bad)?;
                Ok(ChunkBody::Hole { offset, len: take_u32(&mut bytes).ok_or(bad)? })
            }
            CHUNK_VERIFIER => Ok(ChunkBody::Verifier(Verifier(bytes.try_into().map_err(|_| bad)?))),
            _ => {
                let error = take_u32(&mut bytes).ok_or(bad)?;
                let text = take_u16(&mut bytes).ok_or(bad)?;
                if bytes.len() < usize::from(text) {
                    return Err(bad);
                }
                Errno::from_code(error).map(ChunkBody::Error).ok_or(ReplyError::NoError)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bytes: &[u8]) -> Result<(Chunk, ChunkBody), ReplyError> {
        let head: &[u8; 16] = bytes.first_chunk().unwrap();
        let ReplyHeader::Chunk(mut c) = ReplyHeader::decode(head)? else { panic!("a chunk is wanted") };
        let n = c.set_length(bytes[16..20].try_into().unwrap())?;
        let body = c.body(&bytes[20..20 + n])?;
        Ok((c, body))
    }

    #[test]
    fn every_chunk_is_read_back() {
        let v = Verifier([9; 16]);
        let (c, b) = read(&encode_verifier(5, true, v)).unwrap();
        assert_eq!((c.cookie, c.done, b), (5, true, ChunkBody::Verifier(v)));
        let (_, b) = read(&encode_error(5, Errno::NoSpc, "full")).unwrap();
        assert_eq!(b, ChunkBody::Error(Errno::NoSpc));
        let (c, b) = read(&encode_data_header(5, false, 4096, 512)).unwrap();
        assert_eq!((c.done, c.length, b), (false, 520, ChunkBody::Data { offset: 4096 }));
        assert_eq!(read(&encode_none(5)).unwrap().1, ChunkBody::None);
        let simple = encode_simple(3, Some(Errno::Io));
        let head = ReplyHeader::decode(simple[..].try_into().unwrap());
        assert_eq!(head, Ok(ReplyHeader::Simple { cookie: 3, error: Some(Errno::Io) }));
    }

    #[test]
    fn lengths_that_do_not_fit_the_type_are_refused() {
        let mut bytes = encode_verifier(5, true, Verifier([9; 16]));
        bytes[19] = 17;
        assert!(matches!(read(&bytes), Err(ReplyError::Length { .. })));
        let mut bytes = encode_data_header(5, true, 0, 512);
        bytes[16] = 0xff;
        assert!(matches!(read(&bytes), Err(ReplyError::Length { .. })));
        let mut bytes = encode_error(5, Errno::Io, "");
        bytes[23] = 0;
        assert_eq!(read(&bytes), Err(ReplyError::NoError));
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_the_decoder_panic(bytes in proptest::collection::vec(0_u8.., 36..64)) {
            for magic in [REQUEST_MAGIC, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC] {
                let mut bytes = bytes.clone();
                bytes[..4].copy_from_slice(&magic.to_be_bytes());
                let head: &[u8; 16] = bytes.first_chunk().unwrap();
                if let Ok(ReplyHeader::Chunk(mut c)) = ReplyHeader::decode(head)
                    && let Ok(n) = c.set_length(bytes[16..20].try_into().unwrap())
                {
                    let _ = c.body(&bytes[20..bytes.len().min(20 + n)]);
                }
            }
        }
    }
}
