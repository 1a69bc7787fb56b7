//! Numbers of the protocol, errors on the wire, and how integers are put and taken.

use crate::IoError;
use serde::{Deserialize, Serialize};

/// The numbers, by their names in the protocol document.
#[allow(missing_docs, reason = "the names are the protocol's own")]
pub mod consts {
    pub const NBDMAGIC: u64 = 0x4e42_444d_4147_4943;
    pub const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
    pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
    pub const REQUEST_MAGIC: u32 = 0x2560_9513;
    pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
    pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

    pub const FLAG_FIXED_NEWSTYLE: u16 = 1;
    pub const FLAG_NO_ZEROES: u16 = 2;

    pub const OPT_EXPORT_NAME: u32 = 1;
    pub const OPT_ABORT: u32 = 2;
    pub const OPT_LIST: u32 = 3;
    pub const OPT_STARTTLS: u32 = 5;
    pub const OPT_INFO: u32 = 6;
    pub const OPT_GO: u32 = 7;
    pub const OPT_STRUCTURED_REPLY: u32 = 8;
    pub const OPT_LIST_META_CONTEXT: u32 = 9;
    pub const OPT_SET_META_CONTEXT: u32 = 10;
    /// Ours ("QRH1"): a member announces its life and generation; answered by a reply of the same number and an ACK.
    pub const OPT_QUORATE_HELLO: u32 = 0x5152_4831;
    /// Ours ("QRC1"): a request to the fence service; answered like the hello.
    pub const OPT_QUORATE_CONTROL: u32 = 0x5152_4331;

    pub const REP_ACK: u32 = 1;
    pub const REP_SERVER: u32 = 2;
    pub const REP_INFO: u32 = 3;
    pub const REP_META_CONTEXT: u32 = 4;
    pub const REP_ERR_UNSUP: u32 = 0x8000_0001;
    pub const REP_ERR_POLICY: u32 = 0x8000_0002;
    pub const REP_ERR_INVALID: u32 = 0x8000_0003;
    pub const REP_ERR_TLS_REQD: u32 = 0x8000_0005;
    pub const REP_ERR_UNKNOWN: u32 = 0x8000_0006;
    pub const REP_ERR_SHUTDOWN: u32 = 0x8000_0007;
    pub const REP_ERR_TOO_BIG: u32 = 0x8000_0009;

    pub const INFO_EXPORT: u16 = 0;
    pub const INFO_NAME: u16 = 1;
    pub const INFO_DESCRIPTION: u16 = 2;
    pub const INFO_BLOCK_SIZE: u16 = 3;

    pub const TX_HAS_FLAGS: u16 = 0x1;
    pub const TX_READ_ONLY: u16 = 0x2;
    pub const TX_SEND_FLUSH: u16 = 0x4;
    pub const TX_SEND_FUA: u16 = 0x8;
    pub const TX_SEND_TRIM: u16 = 0x20;
    pub const TX_SEND_WRITE_ZEROES: u16 = 0x40;
    pub const TX_SEND_DF: u16 = 0x80;
    pub const TX_CAN_MULTI_CONN: u16 = 0x100;

    pub const CMD_READ: u16 = 0;
    pub const CMD_WRITE: u16 = 1;
    pub const CMD_DISC: u16 = 2;
    pub const CMD_FLUSH: u16 = 3;
    pub const CMD_TRIM: u16 = 4;
    pub const CMD_WRITE_ZEROES: u16 = 6;
    pub const CMD_BLOCK_STATUS: u16 = 7;

    pub const CMD_FLAG_FUA: u16 = 1;
    pub const CMD_FLAG_NO_HOLE: u16 = 2;
    pub const CMD_FLAG_DF: u16 = 4;
    pub const CMD_FLAG_REQ_ONE: u16 = 8;

    pub const CHUNK_DONE: u16 = 1;
    pub const CHUNK_NONE: u16 = 0;
    pub const CHUNK_OFFSET_DATA: u16 = 1;
    pub const CHUNK_OFFSET_HOLE: u16 = 2;
    pub const CHUNK_BLOCK_STATUS: u16 = 5;
    /// Ours ("QV"): the export's boot verifier, 16 bytes, in answers to FLUSH on connections that said our hello.
    pub const CHUNK_VERIFIER: u16 = 0x5156;
    pub const CHUNK_ERROR: u16 = 0x8001;
    pub const CHUNK_ERROR_OFFSET: u16 = 0x8002;
}

/// The longest payload of a read or write, in bytes (protocol document, "Block size constraints": the default).
pub const PAYLOAD_BYTES_MAX: u32 = 32 << 20;

/// The longest string: export names, descriptions, error texts.
pub const STRING_BYTES_MAX: usize = 4096;

/// The longest data of an option; a longer one ends the connection. Names are far shorter.
pub const OPTION_BYTES_MAX: usize = 64 << 10;

/// The longest data of our own options, which carry chains of decided records; allowed inside TLS only.
pub const PRIVATE_BYTES_MAX: usize = 2 << 20;

/// What an export was when it made its promises: another value says that acknowledged, unflushed writes may be gone (R12).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Verifier(pub [u8; 16]);

/// An error as it stands in a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
#[allow(missing_docs, reason = "the names are POSIX's own")]
pub enum Errno {
    #[error("not permitted")]
    Perm,
    #[error("I/O error")]
    Io,
    #[error("out of memory")]
    NoMem,
    #[error("invalid argument")]
    Inval,
    #[error("no space left")]
    NoSpc,
    #[error("too long")]
    Overflow,
    #[error("not supported")]
    NotSup,
    #[error("the server is shutting down")]
    Shutdown,
}

impl Errno {
    /// Its number on the wire.
    #[must_use]
    pub fn code(self) -> u32 {
        match self {
            Self::Perm => 1,
            Self::Io => 5,
            Self::NoMem => 12,
            Self::Inval => 22,
            Self::NoSpc => 28,
            Self::Overflow => 75,
            Self::NotSup => 95,
            Self::Shutdown => 108,
        }
    }

    /// The error of that number; unknown ones are `Inval`, as the protocol wants. `None` for 0.
    #[must_use]
    pub fn from_code(code: u32) -> Option<Self> {
        match code {
            0 => None,
            1 => Some(Self::Perm),
            5 => Some(Self::Io),
            12 => Some(Self::NoMem),
            28 => Some(Self::NoSpc),
            75 => Some(Self::Overflow),
            95 => Some(Self::NotSup),
            108 => Some(Self::Shutdown),
            _ => Some(Self::Inval),
        }
    }
}

impl From<&IoError> for Errno {
    fn from(e: &IoError) -> Self {
        match e {
            IoError::OutOfRange { .. } | IoError::Misaligned { .. } => Self::Inval,
            IoError::ReadOnly => Self::Perm,
            IoError::NoSpace => Self::NoSpc,
            // A device below that is gone for now is a server that is going away: the client reconnects and waits.
            IoError::Stopped | IoError::Fenced { .. } => Self::Shutdown,
            IoError::Failed { .. } => Self::Io,
        }
    }
}

pub(crate) fn put_u16(out: &mut Vec<u8>, v: u16) {
    out.extend_from_slice(&v.to_be_bytes());
}
pub(crate) fn put_u32(out: &mut Vec<u8>, v: u32) {
    out.extend_from_slice(&v.to_be_bytes());
}
pub(crate) fn put_u64(out: &mut Vec<u8>, v: u64) {
    out.extend_from_slice(&v.to_be_bytes());
}

macro_rules! take {
    ($name:ident, $int:ty) => {
        /// Takes an integer from the front, or nothing if there are too few bytes.
        pub(crate) fn $name(from: &mut &[u8]) -> Option<$int> {
            let (head, rest) = from.split_first_chunk()?;
            *from = rest;
            Some(<$int>::from_be_bytes(*head))
        }
    };
}
take!(take_u16, u16);
take!(take_u32, u32);
take!(take_u64, u64);

/// An option as a client sends it.
///
/// # Panics
/// If the data is longer than any option may be.
#[cfg(any(test, feature = "client"))]
pub(crate) fn put_option(out: &mut Vec<u8>, option: u32, data: &[u8]) {
    put_u64(out, consts::IHAVEOPT);
    put_u32(out, option);
    put_u32(out, u32::try_from(data.len()).expect("our options are shorter than 4 GiB"));
    out.extend_from_slice(data);
}
