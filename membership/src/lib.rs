//! Cluster membership: who is in the cluster, agreed by Paxos, numbered by epochs, and what removed nodes left behind.

mod delta;
#[cfg(feature = "driver")]
pub mod driver;
mod evidence;
mod explain;
mod face;
pub mod group;
mod ids;
mod lease;
pub mod machine;
pub mod metrics;
mod proof;
mod quorum;
mod request;
mod rng;
pub mod session;
#[cfg(any(test, feature = "sim"))]
pub mod sim;
mod time;
mod trust;
mod view;

#[cfg(test)]
#[global_allocator]
static ALLOCATOR: sim::CountingAllocator = sim::CountingAllocator;

pub use delta::{Delta, Step};
pub use evidence::{
    BrokenPair, COUNTS_MAX, Count, Evidence, LOSS_WINDOW, NOTE_BYTES_MAX, OBSERVATIONS_MAX, Observation,
    Report, Why,
};
pub use explain::Explanation;
pub use face::{
    BoxFuture, GroupHandler, GroupMember, Groups, Membership, Runtime, SendError, ServiceId, SessionHandler,
    Sessions, ViewListener,
};
pub use ids::{ClusterId, Epoch, Identity, Incarnation, NodeId, ServerId, StateId, UuidError};
pub use lease::Lease;
pub use proof::{Accept, Ballot, ChainError, Decision, verify_chain, verify_chain_with};
pub use quorum::{
    EXPECTED_VOTES_MAX, NODE_VOTES_MAX, QuorumOptions, Tally, TieBreaker, WINDOW_MS_MAX, WINDOW_MS_MIN,
};
pub use request::{AttachRequest, Proof, Refusal, Request, RequestError};
pub use rng::Rng;
pub use time::Instant;
pub use trust::{CA_BYTES_MAX, CAS_MAX, REVOKED_MAX, Trust};
pub use view::{
    Attachment, Cause, Debt, DebtItem, RESOURCE_NAME_BYTES_MAX, ResourceId, ResourceKind, Role, RosterEntry,
    Safety, ServerEntry, Stage, View, Voter, VoterSet,
};
