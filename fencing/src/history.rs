//! What is remembered of every fence: who, when, how, and how it ended.

use core::time::Duration;
use quorate_membership::{Epoch, Identity, Instant, ResourceId, ServerId};

/// The most records kept; the oldest go first.
pub const HISTORY_RECORDS_MAX: usize = 1000;

/// One thing that happened to a removed life.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HistoryRecord {
    /// Counts the records of this node's life from 1, also those that are gone.
    pub number: u64,
    /// When, on this node's clock.
    pub at: Instant,
    /// Milliseconds since 1970 by the wall clock, for people; set by the driver, 0 in the machine.
    pub unix_ms: u64,
    /// Who was fenced.
    pub victim: Identity,
    /// Which member did it; of a decided record, who asked for it, and nobody where the record does not say.
    pub by: Option<Identity>,
    /// How.
    pub how: How,
    /// The result: `Err` holds the reason in words.
    pub result: Result<(), String>,
    /// Since this node learned that the victim was removed.
    pub after: Duration,
}

/// By which means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum How {
    /// A storage server was told a view without the victim.
    Storage {
        /// Which.
        server: ServerId,
        /// The epoch it confirmed, or was asked for.
        epoch: Epoch,
    },
    /// The victim's lease ended (for services: and its kill time).
    Lease,
    /// A step of a method.
    Device {
        /// The method.
        method: String,
        /// The device.
        device: String,
        /// Off, on or reboot.
        action: crate::Action,
    },
    /// A later life of the victim is a member, so its methods are not run.
    Spared,
    /// A person said so.
    Person {
        /// Who.
        by: String,
    },
    /// The cluster decided that these are fenced; the end of the matter, recorded on every node.
    Decided {
        /// In which record.
        epoch: Epoch,
        /// What.
        resources: Vec<ResourceId>,
    },
}

/// A life that waits for its fence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IncidentStatus {
    /// Who.
    pub victim: Identity,
    /// The first epoch without it.
    pub removed: Epoch,
    /// What is not fenced yet.
    pub open: Vec<ResourceId>,
    /// Who coordinates: the member with the lowest id.
    pub coordinator: Option<Identity>,
    /// What is waited for, as this node knows. Empty on nodes that do not coordinate.
    pub waits: Vec<Wait>,
}

/// What a fence waits for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wait {
    /// This node has no quorum.
    Quorum,
    /// The end of the lease; not known yet if `None`.
    Lease(Option<Instant>),
    /// A storage server's confirmation, with the last failure.
    Server {
        /// Which.
        server: ServerId,
        /// What it said last.
        failure: Option<String>,
    },
    /// A fence device.
    Device {
        /// The method.
        method: String,
        /// The device.
        device: String,
    },
    /// The pause before methods are tried again.
    Retry(Instant),
    /// The node has no method, or a later life of it is a member: only a person can confirm.
    Person,
    /// The cluster's decision.
    Decision,
}

impl core::fmt::Display for How {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Storage { server, epoch } => write!(f, "storage server {server} has view {epoch}"),
            Self::Lease => f.write_str("the end of its lease"),
            Self::Device { method, device, action } => {
                write!(f, "{action} by device {device} of method {method}")
            }
            Self::Spared => f.write_str("a later life of it is a member: no method is run"),
            Self::Person { by } => write!(f, "the word of {by}"),
            Self::Decided { epoch, resources } => {
                write!(f, "record {epoch}: fenced from {}", list(resources))
            }
        }
    }
}

impl core::fmt::Display for Wait {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Quorum => f.write_str("a quorum"),
            Self::Lease(_) => f.write_str("the end of its lease"),
            Self::Server { server, failure: None } => write!(f, "storage server {server}"),
            Self::Server { server, failure: Some(text) } => write!(f, "storage server {server}: {text}"),
            Self::Device { method, device } => write!(f, "device {device} of method {method}"),
            Self::Retry(_) => f.write_str("the pause before its methods are tried again"),
            Self::Person => f.write_str("a person: `quorate fence confirm`"),
            Self::Decision => f.write_str("the cluster's decision"),
        }
    }
}

fn list<T: ToString>(items: &[T]) -> String {
    items.iter().map(T::to_string).collect::<Vec<_>>().join(", ")
}

impl core::fmt::Display for IncidentStatus {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let coordinator = self.coordinator.map_or_else(|| "nobody".to_owned(), |c| c.to_string());
        write!(
            f,
            "{} is not fenced from {} yet, since record {}",
            self.victim,
            list(&self.open),
            self.removed
        )?;
        write!(f, "; {coordinator} coordinates")?;
        if self.waits.is_empty() { Ok(()) } else { write!(f, "; it waits for {}", list(&self.waits)) }
    }
}
