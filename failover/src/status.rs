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
