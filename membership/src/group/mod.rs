//! Process groups: totally ordered messages among processes of many nodes, with view synchrony.
//!
//! ```text
//!  join, multicast, leave, messages, views ─▶ GroupMachine ─▶ Send | Event
//! ```
//! A group is a name; its members are processes, several of which may live on one node. All members see the same joins,
//! leaves, crashes and messages in the same order, each with its [`Position`]. The order comes from one node per group,
//! the *sequencer*, which follows from the name and the view. When the members of the *cluster* change, a flush brings
//! every surviving process to the same point before anything of the new view is delivered (virtual synchrony): the node
//! with the lowest id collects what everybody has, the longest history of a group is everybody's, and what is missing is
//! handed out. A message is delivered in the view in which it was sent, or not at all; its sender is told which (R2).
//!
//! Delivery is *agreed*, not *safe*: a process may see a message that dies with its node, or, where it leaves right after
//! it, with the sequencer. Who must act only on what a majority has uses a record (`Membership::propose`) or the
//! configuration.

#[cfg(any(test, feature = "sim"))]
mod bug;
mod copy;
mod event;
mod flush;
mod machine;
mod order;
mod wire;

#[cfg(any(test, feature = "sim"))]
pub use bug::Bug;
pub use event::{Event, Position, ProcessId, Reason};
pub use machine::{
    GROUP_NAME_BYTES_MAX, GroupError, GroupMachine, Output, PAYLOAD_BYTES_MAX, WINDOW_BYTES, WINDOW_MESSAGES,
};
pub use wire::GroupMessage;
