//! The faces of fencing: an agent that reaches one kind of device, and the fencer that decides when.

use crate::{Action, FenceDevice, HistoryRecord, IncidentStatus, Step};
use quorate_membership::{BoxFuture, NodeId, RequestError};

/// Reaches fence devices.
pub trait FenceAgent: Send + Sync {
    /// Carries out one step against `node` (its name in the cluster) and resolves when it is done *and verified*: after
    /// `Off`, the device itself said that the node is off.
    ///
    /// Dropping the future gives up the step; whether it was carried out is then unknown.
    ///
    /// # Errors
    /// See [`AgentError`]; the node may be off or on.
    fn run<'a>(
        &'a self,
        device: &'a FenceDevice,
        step: &'a Step,
        node: &'a str,
    ) -> BoxFuture<'a, Result<(), AgentError>>;
}

/// Why a step proves nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AgentError {
    /// The program could not be started.
    #[error("cannot start {agent}: {detail}")]
    Start {
        /// The program.
        agent: String,
        /// What the system said.
        detail: String,
    },
    /// It did not end in time and was killed with its whole process group.
    #[error("{agent} {action:?} did not end within {seconds} s and was killed")]
    Timeout {
        /// The program.
        agent: String,
        /// What it was asked for.
        action: Action,
        /// The limit.
        seconds: u64,
    },
    /// It ended with failure.
    #[error("{agent} {action:?} failed: {detail}")]
    Failed {
        /// The program.
        agent: String,
        /// What it was asked for.
        action: Action,
        /// Exit code or signal.
        detail: String,
    },
    /// It claims success, but its `status` does not say "off".
    #[error("{agent} says that the node is off, its status says otherwise ({detail})")]
    NotOff {
        /// The program.
        agent: String,
        /// What the status was.
        detail: String,
    },
}

/// What other parts of a node ask of fencing.
pub trait Fencer: Send + Sync {
    /// What happened, oldest first. Bounded: the oldest records go first.
    fn history(&self) -> Vec<HistoryRecord>;
    /// What is being fenced, and what it waits for.
    fn status(&self) -> Vec<IncidentStatus>;
    /// A person says that `node` is off, or was since it failed. Counts for every removed life of the node,
    /// at every level. Recorded with the person's name.
    ///
    /// Dropping the future does not take the word back.
    fn confirm<'a>(&'a self, node: NodeId, by: &'a str) -> BoxFuture<'a, Result<(), ConfirmError>>;
}

/// Why a person's word was not recorded. Nothing was changed, unless the variant says otherwise.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfirmError {
    /// This node has no quorum, so its word counts for nothing.
    #[error("this node is not quorate: confirm on a quorate member")]
    NotQuorate,
    /// No life of the node waits for a fence.
    #[error("node {0} does not wait for a fence")]
    NothingOpen(NodeId),
    /// The cluster did not decide it. With `RequestError::Unknown` it may have.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// The node is stopping.
    #[error("this node is stopping")]
    Stopped,
}
