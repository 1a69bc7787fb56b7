//! I/O and power fencing: makes sure that a removed life of a node can do no harm, and proves it to the cluster.
//!
//! It does not decide who is dead (the views of `quorate_membership` do) and recovers nothing (locks, journals and services
//! wait for its proof).
//!
//! ```text
//!  view, lease end, quorum ──▶ machine::Coordinator ──▶ Install (storage servers) │ Step (fence agents) │ Propose (proof)
//!                                 └─ next_deadline()        └──────── their results come back as inputs ────────┘
//! ```
//!
//! Start at [`machine::Coordinator`], or with feature `driver` at `driver::FencingDriver` and `supervisor::Supervisor`.
//!
//! **Guarantees**: only the quorate member with the lowest id fences; what it has seen off it does not turn off again;
//! nothing is proven at storage or lease level before the victim's lease is over (R8, R9). **Limit**: a member with a lower
//! id that comes while a method runs does not know of it, and may turn the victim off once more. **Assumes**: the clock
//! rates of nodes are bounded as R8 says; an agent that reports success, and whose status says "off", tells the truth.
//!
//! ```
//! use quorate_fencing::machine::{Coordinator, Input};
//! use quorate_fencing::{FencingConfig, FencingTiming};
//! use quorate_membership::{Identity, Incarnation, Instant, NodeId};
//!
//! let me = Identity::new(NodeId(1), Incarnation(1));
//! let mut coordinator = Coordinator::new(me, FencingConfig::new(FencingTiming::lan()))?;
//! let mut out = Vec::new();
//! coordinator.handle(Instant(0), Input::Quorum(true), &mut out)?;
//! assert!(out.is_empty(), "nobody has failed");
//! # Ok::<(), quorate_fencing::ConfigError>(())
//! ```

mod agent;
#[cfg(any(test, feature = "sim"))]
mod bug;
mod config;
#[cfg(feature = "driver")]
pub mod driver;
mod history;
pub mod machine;
mod storage;
#[cfg(feature = "driver")]
pub mod supervisor;

pub use agent::{AgentError, ConfirmError, FenceAgent, Fencer};
#[cfg(any(test, feature = "sim"))]
pub use bug::Bug;
pub use config::{
    Action, ConfigError, DEVICES_MAX, FenceDevice, FencingConfig, FencingTiming, METHODS_MAX, Method,
    OPTION_BYTES_MAX, STEPS_MAX, Step,
};
pub use history::{HISTORY_RECORDS_MAX, HistoryRecord, How, IncidentStatus, Wait};
pub use storage::{StorageFence, StorageFenceError};
