//! The face of membership to the other crates: traits that the driver implements and the simulator too.

use crate::group::{Event as GroupEvent, GroupError, ProcessId};
use crate::{Decision, Epoch, Identity, Lease, NodeId, Request, RequestError, View};
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

/// A future that can be sent and stored.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// What a node knows of its cluster, and how it asks for changes.
pub trait Membership: Send + Sync {
    /// This life of this node.
    fn me(&self) -> Identity;
    /// The newest view this node has installed.
    fn view(&self) -> Arc<View>;
    /// Whether this node is a member and holds a valid lease from a majority right now.
    fn is_quorate(&self) -> bool;
    /// The lease under which everything on this node acts (R8).
    fn lease(&self) -> Lease;
    /// Adds a listener. It is told the current view at once, and from then on every view in order, without gaps.
    fn subscribe(&self, listener: Arc<dyn ViewListener>);
    /// Decisions above `epoch` that this node still has, oldest first: the chain a storage server wants (R9).
    fn decisions_since(&self, epoch: Epoch) -> Vec<Decision>;
    /// When the lease of a removed life is over on this node's clock (R8); `None` while it is a member or unknown here.
    fn lease_over_at(&self, who: Identity) -> Option<crate::Instant>;
    /// Asks the cluster to decide something. Resolves with the view that holds the decision, once installed here.
    ///
    /// Dropping the future gives up waiting; the request may still be decided.
    fn propose(&self, request: Request) -> BoxFuture<'_, Result<Arc<View>, RequestError>>;
}

/// Told of views and quorum. Calls come one at a time, from one thread, and must not block.
pub trait ViewListener: Send + Sync {
    /// `view` is installed. Messages sent in its epoch are delivered only after this returns, on every service.
    fn on_view(&self, view: &Arc<View>);
    /// The node gained or lost quorum (froze, in R8's words). Views do not change by this alone.
    fn on_quorum(&self, quorate: bool) {
        let _ = quorate;
    }
    /// This life is over: it was removed, or must stop. Nothing more will be delivered.
    fn on_stop(&self, reason: &str) {
        let _ = reason;
    }
}

/// A user of the sessions: each has its own numbered channel between every two members.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceId(pub u8);

impl ServiceId {
    /// The lock manager.
    pub const DLM: Self = Self(1);
    /// The cluster configuration.
    pub const CCS: Self = Self(2);
    /// The fencing coordinator.
    pub const FENCING: Self = Self(3);
    /// The failover manager.
    pub const FAILOVER: Self = Self(4);
    /// The node program's own messages.
    pub const NODE: Self = Self(5);
    /// The process groups ([`crate::group`]).
    pub const GROUPS: Self = Self(6);
}

/// Reliable messages between lives of nodes (R2): exactly once, in order per peer and service, across reconnects and
/// views that contain both ends.
pub trait Sessions: Send + Sync {
    /// Queues a message; it is numbered with the epoch installed here. Never blocks.
    ///
    /// # Errors
    /// See [`SendError`]; the message was not queued.
    fn send(&self, to: Identity, service: ServiceId, payload: Vec<u8>) -> Result<(), SendError>;
    /// Sets who receives this service's messages. Called once per service before the node joins.
    fn register(&self, service: ServiceId, handler: Arc<dyn SessionHandler>);
    /// Stops, or resumes, the delivery of a service's messages on this node: for a service that cannot keep up. What
    /// comes meanwhile is held within its senders' credit, so they get [`SendError::Full`] and memory stays bounded;
    /// what the same peer sends to other services of the class is held behind it. A few messages that were on their way
    /// to the handler may still come. The default does nothing: an implementation without flow control.
    fn pause(&self, service: ServiceId, paused: bool) {
        let _ = (service, paused);
    }
}

/// Receives the messages of one service.
pub trait SessionHandler: Send + Sync {
    /// A message of `from`, sent in `epoch`; this node has installed `epoch` or a later one. Must not block.
    fn deliver(&self, from: Identity, epoch: Epoch, payload: &[u8]);
    /// A peer for which somebody here got [`SendError::Full`] takes messages again, or is a member no more. Called on the
    /// thread of the deliveries for every service of the class; sending from here is allowed. Must not block.
    fn on_ready(&self, to: Identity) {
        let _ = to;
    }
}

/// Process groups: totally ordered messages among processes of many nodes, with view synchrony ([`crate::group`]).
///
/// ```
/// use quorate_membership::group::Event;
/// use quorate_membership::{GroupHandler, Groups};
/// use std::sync::Arc;
///
/// struct Board;
///
/// impl GroupHandler for Board {
///     fn on_event(&self, event: &Event) {
///         match event {
///             Event::Configuration { members, .. } => println!("{} processes", members.len()),
///             Event::Message { from, payload, .. } => println!("{from}: {payload:?}"),
///             Event::Dropped { first, last } => println!("send {first} to {last} again"),
///             Event::Left => println!("gone"),
///         }
///     }
/// }
///
/// fn announce(groups: &dyn Groups) -> Result<(), Box<dyn std::error::Error>> {
///     let board = groups.join("board", Arc::new(Board))?;
///     // Once the first configuration is there:
///     board.multicast(b"hello".to_vec())?;
///     board.leave();
///     Ok(())
/// }
/// ```
pub trait Groups: Send + Sync {
    /// Joins a group as a new process; the first event is the configuration with it.
    ///
    /// # Errors
    /// See [`GroupError`]; nobody joined.
    fn join(&self, group: &str, handler: Arc<dyn GroupHandler>) -> Result<Box<dyn GroupMember>, GroupError>;
}

/// A process in a group. Dropping it without [`leave`](Self::leave) is a crash, which the others see as such.
pub trait GroupMember: Send + Sync {
    /// Its name.
    fn id(&self) -> ProcessId;
    /// Sends to all members, this one included. The number comes back with the message, or with the news that the view
    /// ended before it had its place and nobody gets it. Never blocks.
    ///
    /// # Errors
    /// See [`GroupError`]; nothing was sent.
    fn multicast(&self, payload: Vec<u8>) -> Result<u64, GroupError>;
    /// Leaves; the last event is [`GroupEvent::Left`].
    fn leave(&self);
}

/// Receives the events of one process, in order, one at a time.
pub trait GroupHandler: Send + Sync {
    /// What happened. Called from the thread of the deliveries, or from one that sends; it may send, and must not block.
    fn on_event(&self, event: &GroupEvent);
}

/// Why a message was not queued.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SendError {
    /// That life is no member of the installed view; it will never get the message.
    #[error("{0} is not a member")]
    NotMember(Identity),
    /// The peer takes no more for now: its credit is used up. [`SessionHandler::on_ready`] says when it does.
    #[error("the queue to node {0} is full")]
    Full(NodeId),
    /// The message is above the size limit of `limit` bytes.
    #[error("a message of {size} bytes is above the limit of {limit}")]
    TooLarge {
        /// Its size.
        size: usize,
        /// The limit.
        limit: usize,
    },
    /// This node is stopping.
    #[error("this node is stopping")]
    Stopped,
}

/// What asynchronous code of the workspace needs of its surroundings, so that it runs on any executor and in virtual time.
pub trait Runtime: Send + Sync {
    /// The time now.
    fn now(&self) -> crate::Instant;
    /// Resolves at `at`, or at once if that is over.
    fn sleep_until(&self, at: crate::Instant) -> BoxFuture<'static, ()>;
    /// Runs a future to its end in the background. It ends early only when the runtime does.
    fn spawn(&self, task: BoxFuture<'static, ()>);
}
