//! The document: everything the cluster is configured with, typed. People write it as TOML.
//!
//! Each struct is one table of the document. A field's documentation gives unit, default and range, and
//! `docs/config.md` is generated from the same texts (see [`crate::fields`]).

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use toml::Spanned;

/// The longest document, in bytes.
pub const DOCUMENT_BYTES_MAX: usize = 256 << 10;

/// The whole document.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Document {
    /// The cluster's name.
    pub name: Spanned<String>,
    /// Times that all nodes have alike.
    #[serde(default)]
    pub timing: Timing,
    /// Nodes.
    #[serde(default, rename = "node")]
    pub nodes: Vec<Node>,
    /// Fence devices beside the storage servers, which need no entry.
    #[serde(default, rename = "fence_device")]
    pub fence_devices: Vec<FenceDevice>,
    /// Block devices that storage servers export.
    #[serde(default, rename = "export")]
    pub exports: Vec<Export>,
    /// Volume groups.
    #[serde(default, rename = "volume_group")]
    pub volume_groups: Vec<VolumeGroup>,
    /// Filesystems.
    #[serde(default, rename = "filesystem")]
    pub filesystems: Vec<Filesystem>,
    /// Failover domains.
    #[serde(default, rename = "failover_domain")]
    pub failover_domains: Vec<FailoverDomain>,
    /// Services.
    #[serde(default, rename = "service")]
    pub services: Vec<Service>,
}

/// `[timing]`: what detection, leases and fencing are patient for. It holds from the next start of the nodes on, and
/// nodes with different values do not connect: change it, then stop and start the whole cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Timing {
    /// Between two heartbeats, in milliseconds.
    pub heartbeat_ms: Spanned<u32>,
    /// Silence after which a member is removed, in milliseconds.
    pub detection_ms: Spanned<u32>,
    /// By how much a lease is shorter than detection, in milliseconds.
    pub drift_margin_ms: Spanned<u32>,
    /// How long after the end of its lease a node's processes live at most, in milliseconds.
    pub kill_ms: Spanned<u32>,
    /// How long a request to the membership is tried, in milliseconds.
    pub request_deadline_ms: Spanned<u32>,
    /// How long a recovery stage waits for a participant that reports nothing, in milliseconds.
    pub stage_deadline_ms: Spanned<u32>,
    /// How long storage servers may fail to confirm before a node's fence levels run, in milliseconds.
    pub storage_patience_ms: Spanned<u32>,
    /// The longest pause between two tries to fence, in milliseconds.
    pub fence_retry_max_ms: Spanned<u32>,
}

impl Default for Timing {
    /// For one switched network.
    fn default() -> Self {
        let ms = |value| Spanned::new(0..0, value);
        Self {
            heartbeat_ms: ms(100),
            detection_ms: ms(800),
            drift_margin_ms: ms(100),
            kill_ms: ms(500),
            request_deadline_ms: ms(10_000),
            stage_deadline_ms: ms(30_000),
            storage_patience_ms: ms(5_000),
            fence_retry_max_ms: ms(5_000),
        }
    }
}

impl Timing {
    /// How long acknowledgements keep a node acting (R8): `detection_ms - drift_margin_ms`.
    #[must_use]
    pub fn lease_ms(&self) -> u32 {
        self.detection_ms.get_ref().saturating_sub(*self.drift_margin_ms.get_ref())
    }
}

/// `[[node]]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Node {
    /// Its id, as in its certificate.
    pub id: Spanned<u32>,
    /// Its name, as in its certificate.
    pub name: Spanned<String>,
    /// Where it listens, `IP:PORT`.
    pub address: Spanned<String>,
    /// Its votes. A mirror: the view record decides who votes.
    #[serde(default = "one")]
    pub votes: u32,
    /// How to fence it, best first: `[[node.fence]]`.
    #[serde(default, rename = "fence")]
    pub fence_levels: Vec<FenceLevel>,
}

/// `[[node.fence]]`: one level; all its steps must succeed.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FenceLevel {
    /// For the history.
    pub name: String,
    /// What is done, in order.
    pub steps: Vec<FenceStep>,
}

/// One step of a level.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FenceStep {
    /// The fence device.
    pub device: Spanned<String>,
    /// `off`, `on` or `reboot`.
    #[serde(default = "off")]
    pub action: Spanned<String>,
    /// Parameters for this node, such as `port`.
    #[serde(default)]
    pub parameters: BTreeMap<String, String>,
}

/// `[[fence_device]]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FenceDevice {
    /// Its name.
    pub name: Spanned<String>,
    /// The program (FenceAgentAPI), a path or a name in the search path.
    pub agent: String,
    /// Parameters of every call.
    #[serde(default)]
    pub parameters: BTreeMap<String, String>,
    /// How long a call may take, in seconds.
    #[serde(default = "sixty")]
    pub timeout_s: u32,
}

/// `[[export]]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Export {
    /// Its name, here and at the server.
    pub name: Spanned<String>,
    /// The storage server's name, as in its certificate.
    pub server: String,
    /// Where the server listens, `IP:PORT`.
    pub address: Spanned<String>,
}

/// `[[volume_group]]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeGroup {
    /// Its name.
    pub name: Spanned<String>,
    /// The exports its physical volumes are on.
    pub devices: Vec<Spanned<String>>,
}

/// `[[filesystem]]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Filesystem {
    /// Its name: the part of the lock table after the colon.
    pub name: Spanned<String>,
    /// The logical volume, `GROUP/NAME`.
    pub volume: Spanned<String>,
    /// How many nodes can mount it; a number for mkfs.
    #[serde(default = "three")]
    pub journals: Spanned<u32>,
    /// The size of a journal in MiB, for mkfs.
    #[serde(default = "eight")]
    pub journal_mib: Spanned<u32>,
    /// Whether a node mounts it again when it has joined, once it was mounted by hand.
    #[serde(default = "yes")]
    pub remount: bool,
}

/// `[[failover_domain]]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FailoverDomain {
    /// Its name.
    pub name: Spanned<String>,
    /// Whether the order of nodes is one of preference.
    #[serde(default)]
    pub ordered: bool,
    /// Whether its services run on its nodes alone.
    #[serde(default)]
    pub restricted: bool,
    /// Whether a service stays where it is when a better node comes back.
    #[serde(default)]
    pub nofailback: bool,
    /// Ids of its nodes, best first.
    pub nodes: Vec<Spanned<u32>>,
}

/// `[[service]]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Service {
    /// Its name.
    pub name: Spanned<String>,
    /// What makes it safe to start elsewhere: `storage`, `lease` or `power`.
    #[serde(default = "lease")]
    pub safety: Spanned<String>,
    /// Whether it is started without being told.
    #[serde(default = "yes")]
    pub autostart: bool,
    /// Where it may run; anywhere if left out.
    #[serde(default)]
    pub domain: Option<Spanned<String>>,
    /// When a resource fails: `restart`, `relocate` or `disable`.
    #[serde(default = "restart")]
    pub recovery: Spanned<String>,
    /// How often it is restarted in place within `restart_expire_s` before it is moved; 0 is without limit.
    #[serde(default)]
    pub max_restarts: u32,
    /// Restarts longer ago than this many seconds do not count.
    #[serde(default)]
    pub restart_expire_s: u32,
    /// Its resources, a tree: each starts after its parent and after those before it that have the same parent, and stops
    /// before them.
    #[serde(default, rename = "resource")]
    pub resources: Vec<Resource>,
}

/// `[[service.resource]]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Resource {
    /// Its name, unique within the service.
    pub name: Spanned<String>,
    /// The resource it needs: one that stands before it in the same service.
    #[serde(default)]
    pub parent: Option<Spanned<String>>,
    /// The OCF agent: a path, or `PROVIDER:TYPE`.
    pub agent: Spanned<String>,
    /// Its parameters (`OCF_RESKEY_…`).
    #[serde(default)]
    pub parameters: BTreeMap<String, String>,
    /// How long starting may take, in seconds.
    #[serde(default = "twenty")]
    pub start_timeout_s: u32,
    /// How long stopping may take, in seconds.
    #[serde(default = "twenty")]
    pub stop_timeout_s: u32,
    /// How long a monitor may take, in seconds.
    #[serde(default = "ten")]
    pub monitor_timeout_s: u32,
    /// How often it is monitored, in milliseconds.
    #[serde(default = "thousand")]
    pub monitor_interval_ms: u32,
}

fn one() -> u32 {
    1
}
fn three() -> Spanned<u32> {
    Spanned::new(0..0, 3)
}
fn eight() -> Spanned<u32> {
    Spanned::new(0..0, 8)
}
fn ten() -> u32 {
    10
}
fn twenty() -> u32 {
    20
}
fn sixty() -> u32 {
    60
}
fn thousand() -> u32 {
    1000
}
fn yes() -> bool {
    true
}
fn off() -> Spanned<String> {
    Spanned::new(0..0, "off".into())
}
fn lease() -> Spanned<String> {
    Spanned::new(0..0, "lease".into())
}
fn restart() -> Spanned<String> {
    Spanned::new(0..0, "restart".into())
}
