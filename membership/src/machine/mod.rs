//! The membership machine: decides views by Paxos, detects failures, keeps the lease, and knows no clock or socket.
//!
//! ```text
//!  Input + now ─▶ Member::handle ─▶ Output { Send | Persist | Installed | RequestDone | Lease | Quorum | Stop }
//!                     └─ next_deadline()
//! ```
//!
//! One [`Durable`] is read from disk, [`Durable::next_life`] is made durable, and `Member::new(config, durable, nonce,
//! contacts, seed, now)` starts the life. The driver then feeds [`Input`]s and carries out [`Output`]s in order.
//! Getters: `me`, `view`, `decisions_since`, `lease_over_at`, `lease_until`, `is_quorate`, `is_member`, `stopped`.

#[allow(dead_code, reason = "its user, the machine, follows")]
mod change;
mod config;
mod decide;
mod durable;
mod io;
mod wire;

pub use config::{ATTACHMENTS_MAX, Config, ConfigError, REQUESTS_MAX, ROSTER_MAX, SERVERS_MAX, VOTERS_MAX};
pub use decide::decide;
pub use durable::{Accepted, CHAIN_KEPT_MAX, CHAIN_KEPT_MIN, Durable, Record, STATE_VERSION, StateError};
pub use io::{Error, Event, Input, Output, Peer, RequestId, StopReason, Token};
pub use wire::{
    Answer, CHAIN_BYTES_MAX, CONTROL_BYTES_MAX, CONTROL_VERSION, ControlMsg, Heartbeat, HeartbeatAck,
    JoinRefusal, WireError,
};
