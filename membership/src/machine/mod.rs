//! The membership machine: decides views by Paxos, detects failures, keeps the lease, and knows no clock or socket.
//!
//! ```text
//!  Input + now ─▶ Member::handle ─▶ Output { Send | Persist | Installed | RequestDone | Lease | Quorum | Stop }
//!                     └─ next_deadline()
//! ```
//!
//! One [`Durable`] is read from disk, [`Durable::next_life`] is made durable, and [`Member::new`] starts the life. The driver then feeds [`Input`]s and carries out [`Output`]s in order.

mod acceptor;
mod bug;
mod chain;
pub(crate) mod change;
mod config;
mod cut;
mod decide;
mod durable;
#[cfg(feature = "model")]
pub(crate) mod fingerprint;
mod force;
mod io;
mod kept;
mod lease;
mod member;
mod mesh;
mod packet;
mod peers;
mod plan;
mod proposer;
mod readmit;
mod requests;
mod rings;
mod stages;
mod version;
mod voters;
mod wire;
mod writes;

#[cfg(any(test, feature = "sim"))]
pub use bug::Bug;
#[cfg(any(test, feature = "sim"))]
pub use change::{join, remove};
pub use config::{ATTACHMENTS_MAX, Config, ConfigError, REQUESTS_MAX, ROSTER_MAX, SERVERS_MAX, VOTERS_MAX};
pub use decide::decide;
pub use durable::{Accepted, CHAIN_KEPT_MAX, CHAIN_KEPT_MIN, Durable, Record, STATE_VERSION, StateError};
pub use force::WORD_BYTES_MAX;
pub use io::{Error, Event, Input, Output, Peer, RequestId, StopReason, Token};
pub use kept::Chain;
pub use member::Member;
pub use rings::{MESH_MAX, RINGS, high_watermark, low_watermark};
pub use version::Versions;
pub use voters::after_window;
pub use wire::{
    Answer, CHAIN_BYTES_MAX, CONTROL_BYTES_MAX, ControlMsg, Heartbeat, HeartbeatAck, JoinRefusal, WireError,
};
