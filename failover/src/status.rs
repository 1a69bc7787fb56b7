//! What is told about services.

use crate::place::{Idle, Target};
use quorate_membership::{Identity, NodeId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What a service does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum StateName {
    /// Nothing.
    Stopped(Idle),
    /// A former owner must be fenced first (R20).
    WaitingForFence,
    /// It is being placed or started.
    Starting,
    /// It runs.
    Running,
    /// It is being stopped.
    Stopping,
    /// It could not be stopped: it may run, so it is started nowhere until it is disabled and stops.
    StopFailed,
}

impl core::fmt::Display for StateName {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            Self::Stopped(Idle::Disabled) => "disabled",
            Self::Stopped(Idle::NoNode) => "stopped: no node that may run it is there",
            Self::Stopped(Idle::FailedEverywhere) => "stopped: it failed on every node that may run it",
            Self::WaitingForFence => "waiting for the fence of a former owner",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Stopping => "stopping",
            Self::StopFailed => "could not be stopped: disable it once it is stopped",
        })
    }
}

/// A service, as one node knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ServiceStatus {
    /// Its name.
    pub service: String,
    /// What is wanted.
    pub target: Target,
    /// Who is attached to it.
    pub owner: Option<Identity>,
    /// What it does.
    pub state: StateName,
    /// Its owner's last failure.
    pub detail: Option<String>,
    /// How often its owner restarted it.
    pub restarts: u32,
    /// Members on which it is not tried again until it is enabled, and why.
    pub failed: BTreeMap<NodeId, String>,
}
