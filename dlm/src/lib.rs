//! A distributed lock manager with VMS semantics.

mod api;
mod bug;
pub mod cache;
mod deliver;
pub mod driver;
mod dump;
pub mod local;
mod machine;
mod mode;
#[cfg(any(test, feature = "sim"))]
pub mod sim;
mod table;
mod wire;

pub use api::{
    Completion, ConvertRequest, FencingToken, Flags, Grant, JoinError, LockCallbacks, LockError, LockId,
    LockManager, LockName, LockRequest, Lockspace, LockspaceOptions, NAME_BYTES_MAX, NameTooLong, Range,
    UnlockRequest, ValueBlock,
};
pub use driver::Dlm;
pub use dump::{ElsewhereDump, LockDump, LockspaceDump, ResourceDump};
pub use mode::Mode;
