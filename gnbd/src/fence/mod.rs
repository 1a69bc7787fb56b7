//! The storage server as the fence (R9 to R12): which lives it admits, proven by a chain of decided records.
//!
//! [`FenceServer`] is the machine, [`FenceRecord`] what it makes durable, [`wire`] what members say to it inside NBD's
//! negotiation, and [`SyncGate`] the rule of the boot verifier.

mod gate;
mod machine;
mod record;
pub mod wire;

pub use gate::{SyncGate, SyncTicket};
#[cfg(any(test, feature = "sim"))]
pub use machine::Bug;
pub use machine::{
    CALLS_MAX, CallId, ConnectionId, DRAIN_DEADLINE, FenceServer, Input, Output, PersistToken, WAITING_MAX,
};
pub use record::{Enrolment, FenceRecord, RecordError};
