//! A distributed lock manager with the semantics of VMS and of Linux's DLM: six modes, conversion, value blocks, blocking
//! calls, ranges; recovery by name, so that a failure touches only what the failed node may have had.
//!
//! It does not detect failures and does not fence: it follows the views of `quorate-membership`, and gives a dead node's
//! locks to others when a view says that the node is fenced and, where a filesystem asks for it, its journal replayed.
//!
//! ```text
//!   caller ──▶ Lockspace ──▶ shard (16 per lockspace, each a state machine behind a mutex)
//!                              ├─ directory: who masters the names of my buckets
//!   views, messages ─────────▶ ├─ master:    queues of the resources that I master
//!                              └─ local:     my locks, here or at their masters
//!   caller ──▶ LockCache ──▶ Lockspace      locks stay with the node until another wants them
//! ```
//!
//! * [`Dlm`] is the lock manager of a cluster's node, [`local::LocalManager`] that of one node alone; both are
//!   [`LockManager`]s and open [`Lockspace`]s. [`cache::LockCache`] is for those who take the same locks again and again.
//! * A lock whose master is this node is granted on the caller's thread, without a message or a task switch.
//! * Every grant has a [`FencingToken`]; of two grants that exclude each other the later has the higher one.
//!
//! **Guarantees.** No two incompatible grants are usable under valid leases at one instant. What a failed node had, or
//! may have had, is granted to nobody before it is fenced at the lockspace's safety level and, for modes that are holds,
//! its journal is replayed. A value block delivered as valid never goes back ([`Grant::value`] has what NL and CR can
//! expect). Names mastered by a living node wait for nothing while another node is recovered. **Assumed**: views without gaps,
//! sessions in order and exactly once between lives, clocks whose rates are bounded (for the lease).
//!
//! **Deadlocks**: conversion deadlocks are refused at once, cycles over any resources, lockspaces and nodes within a second;
//! of a cycle the wait of the lowest priority, among equals the youngest. For that an owner gives nothing up while it waits.
//!
//! **Not there yet**: name ranges delegated to a node. A
//! resource outside the cluster checks tokens with a [`TokenGuard`].
//!
//! ```
//! use quorate_dlm::local::LocalManager;
//! use quorate_dlm::*;
//! use std::sync::Arc;
//!
//! struct Print;
//! impl LockCallbacks for Print {
//!     fn completion(&self, id: LockId, completion: Completion) {
//!         println!("{id:?}: {completion:?}");
//!     }
//!     fn blocking(&self, id: LockId, mode: Mode) {
//!         println!("{id:?} blocks somebody who wants {mode}");
//!     }
//! }
//!
//! # async fn run() -> Result<(), Box<dyn std::error::Error>> {
//! let manager = LocalManager::new();
//! let space = manager.join(&LockspaceOptions::plain("example")).await?;
//! let id = space.request(LockRequest::new(LockName::new(b"printer")?, Mode::EX), Arc::new(Print))?;
//! space.unlock(id, UnlockRequest::default())?;
//! manager.leave("example").await?;
//! # Ok(())
//! # }
//! # use std::future::Future;
//! # let mut run = Box::pin(run());
//! # assert!(run.as_mut().poll(&mut std::task::Context::from_waker(std::task::Waker::noop())).is_ready());
//! ```

mod api;
mod bug;
pub mod cache;
mod deliver;
pub mod driver;
mod dump;
pub mod explain;
mod guard;
pub mod local;
mod machine;
mod mode;
mod name;
mod names;
pub mod posix;
mod queue;
mod request;
#[cfg(feature = "service")]
pub mod service;
#[cfg(any(test, feature = "sim"))]
pub mod sim;
mod slots;
mod stats;
mod table;
mod take;
mod wire;

#[cfg(all(test, feature = "sim"))]
#[global_allocator]
static ALLOCATOR: quorate_membership::sim::CountingAllocator = quorate_membership::sim::CountingAllocator;

pub use api::{
    Completion, FencingToken, Grant, Holder, JoinError, LockCallbacks, LockError, LockId, LockManager,
    Lockspace, LockspaceOptions, MoveOptions, Range, ValueBlock,
};
pub use driver::Dlm;
pub use dump::{ElsewhereDump, LockDump, LockspaceDump, ProcessInfo, ResourceDump};
pub use guard::{TokenGuard, TokenRefused, TokenStore};
pub use mode::Mode;
pub use name::{LockName, NAME_BYTES_MAX, NameTooLong};
pub use queue::{Batch, LockQueue, Told, What};
pub use request::{ConvertRequest, Flags, LockRequest, UnlockRequest};
pub use stats::{LockspaceStats, WAIT_BUCKETS, WaitHistogram};
pub use take::{Take, TakeError, Taken, Taking};
