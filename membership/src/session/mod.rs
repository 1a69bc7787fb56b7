//! Sessions (R2): reliable, ordered messages between two lives of nodes, over connections that come and go.
//!
//! ```text
//!  send, frames, links, views + now ─▶ SessionMachine ─▶ Transmit | Deliver | Close
//!                                          └─ next_deadline()
//! ```
//! A session is a pair of incarnations; sequence numbers are volatile and end with either of them. Any number of
//! connections ("links") may exist between the two at a time; one is active. Both ends rank links alike, by the
//! generation that the two exchanged on it, so both settle on the same one without a further message. Two members
//! without a direct path exchange frames through a common peer (`relay`).
//!
//! Credit bounds what a peer that does not read costs: undelivered messages are kept by their sender up to it, and then
//! `send` says `Full` until [`Output::Ready`].

mod frame;
mod links;
mod machine;
mod peer;
mod relay;

pub use frame::{FRAME_BYTES_MAX, FrameError, MESSAGE_BYTES_MAX, SESSION_VERSION, take_frame};
#[cfg(any(test, feature = "sim"))]
pub use machine::Bug;
pub use machine::{Input, Limits, LinkId, Output, SessionMachine};
