//! The FUSE kernel protocol as bytes: requests parsed, replies encoded; nothing here reads, writes or waits.

mod abi;
mod reply;
mod request;

pub(crate) use abi::READ_BUFFER_BYTES;
pub use abi::{DATA_BYTES_MAX, NAME_BYTES_MAX, Opcode, ROOT_NODE};
pub use reply::{
    Attr, DirentType, Entry, Listing, Negotiated, Notice, Opened, Payload, ReaddirPlus, Reply, Statfs,
    VersionError, negotiate,
};
pub(crate) use reply::{encode, encode_notice};
pub use request::{
    Forgets, Handle, Header, InitOp, LockOp, LockOwner, LockType, Malformed, Op, OpError, SetAttr, SetTime,
    Unique,
};
