//! The NBD protocol as pure code: bytes in, values out, and the server's half of the negotiation as a machine.
//!
//! Source: the NBD protocol document (public domain), fixed newstyle with structured replies. Integers are big-endian.
//!
//! | magic | value | where |
//! |---|---|---|
//! | NBDMAGIC, IHAVEOPT | `0x4e42444d41474943`, `0x49484156454f5054` | the server's greeting |
//! | option reply | `0x0003e889045565a9` | 8 bytes before each answer to an option |
//! | request | `0x25609513` | 4 bytes: flags u16, type u16, cookie u64, offset u64, length u32 follow |
//! | simple reply | `0x67446698` | 4 bytes: error u32, cookie u64 follow |
//! | structured reply | `0x668e33ef` | 4 bytes: flags u16, type u16, cookie u64, length u32 follow |

mod negotiate;
mod reply;
mod request;
mod wire;

pub use negotiate::{
    CloseReason, ExportDescription, Exports, Found, Negotiation, Step, TlsMode, Transmission,
};
pub use reply::{
    CHUNK_HEADER_BYTES, Chunk, ChunkBody, ReplyError, ReplyHeader, SIMPLE_HEADER_BYTES, encode_block_status,
    encode_data_header, encode_error, encode_none, encode_simple, encode_verifier,
};
pub use request::{BadMagic, Command, REQUEST_BYTES, Request, check};
pub use wire::{
    Errno, OPTION_BYTES_MAX, PAYLOAD_BYTES_MAX, PRIVATE_BYTES_MAX, STRING_BYTES_MAX, Verifier, consts,
};

#[cfg(any(test, feature = "client"))]
pub(crate) use wire::put_option;
pub(crate) use wire::{put_u16, put_u32, put_u64, take_u16, take_u32, take_u64};
