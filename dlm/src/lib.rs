//! A distributed lock manager with VMS semantics.

mod api;
pub mod cache;
mod deliver;
mod dump;
pub mod local;
mod machine;
mod mode;
mod table;

pub use api::{
    Completion, ConvertRequest, FencingToken, Flags, Grant, JoinError, LockCallbacks, LockError, LockId,
    LockManager, LockName, LockRequest, Lockspace, LockspaceOptions, NAME_BYTES_MAX, NameTooLong, Range,
    UnlockRequest, ValueBlock,
};
pub use dump::{ElsewhereDump, LockDump, LockspaceDump, ResourceDump};
pub use mode::Mode;
