//! Application failover: services as trees of resources, placed by pure decisions, run by OCF agents, on one node each.
//!
//! It does not detect failures and does not fence: the view says who is a member, and which debts are fenced.
//!
//! ```text
//!  views, quorum ─▶ ┌─────────┐ ─▶ attach, detach, close debts       (decided records)
//!  announcements ─▶ │ Manager │ ─▶ owner lock                        (lock manager)
//!  orders ────────▶ └─────────┘ ─▶ start, stop, monitor              (agents)
//! ```
//! Start at [`machine::Manager`]; `driver::Failover` is the same on a real node. What makes it safe: a service is
//! attached exclusively by a decided record before anything of it runs, so no second node can be; the record refuses it
//! while a failed owner is not fenced at the level that the service declares (R20); the owner lock says the same
//! once more, and to programs that know only the lock manager.
//!
//! ```
//! use quorate_failover::{ClusterState, Plan, Target, place};
//! # use quorate_failover::{Recovery, ServiceConfig};
//! # use quorate_membership::{NodeId, Safety};
//! # use std::collections::{BTreeMap, BTreeSet};
//! # let web = ServiceConfig { name: "web".into(), resources: vec![], domain: None, recovery: Recovery::Restart,
//! #     max_restarts: 0, restart_expire_time: core::time::Duration::ZERO, autostart: true, safety: Safety::Lease,
//! #     servers: BTreeSet::new() };
//! let state = ClusterState {
//!     nodes: BTreeMap::from([(NodeId(1), 2), (NodeId(2), 0)]),
//!     target: Target::Enabled(None),
//!     owner: None,
//!     unfenced: false,
//!     failed: BTreeSet::new(),
//! };
//! assert_eq!(place(&web, &state), Plan::Start(NodeId(2)));
//! ```

mod config;
#[cfg(feature = "driver")]
pub mod driver;
pub mod machine;
pub mod ocf;
mod place;
mod shared;
mod status;

#[cfg(all(test, feature = "sim"))]
#[global_allocator]
static ALLOCATOR: quorate_membership::sim::CountingAllocator = quorate_membership::sim::CountingAllocator;

pub use config::{
    Agent, ConfigError, Domain, NAME_BYTES_MAX, RESOURCES_MAX, Recovery, ResourceConfig, ServiceConfig,
    Timeouts, check,
};
pub use machine::{Command, CommandError, Event};
pub use ocf::{Action, Exit, Found, Outcome};
pub use place::{ClusterState, Idle, Plan, Reaction, Target, place, react};
pub use shared::{ANNOUNCEMENT_BYTES_MAX, MalformedAnnouncement};
pub use status::{ServiceStatus, StateName};
