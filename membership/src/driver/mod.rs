//! The network, the disk and the clock around the machines: certificates, transports, the running node.
//!
//! A node has three threads. `quorate-control` turns the membership machine and sends the heartbeats; `quorate-sessions`
//! carries the sessions and calls every listener and service; `quorate-state` makes promises durable. Nothing on the
//! first ever waits for the other two (R8).

mod busy;
mod config;
mod control;
mod groups;
mod link;
mod node;
mod paths;
pub mod pki;
mod progress;
mod runtime;
mod sessions;
mod state;
mod storage;
pub mod transport;

pub use busy::BUSY_POLL_MAX;
pub use config::{
    AgreedTimes, CreateError, NodeConfig, StartError, create_cluster, create_cluster_with, random,
};
pub use groups::NodeGroups;
pub use link::HelloRefusal;
pub use node::{Node, NodeEnd, ShutdownError};
pub use paths::LinkStatus;
pub use progress::{LoopBeat, Progress};
pub use runtime::{TokioRuntime, boottime};
pub use state::{StateDir, StateDirError, StateLock, renounce};
