//! Services: the failover manager of this node, its agents, and what commands ask of it.

use super::world::World;
use crate::events::Events;
use quorate_ccs::Document;
use quorate_dlm::{LockManager, LockspaceOptions};
use quorate_failover::driver::{AgentCall, AgentRunner, EventSink, Failover, OcfRunner};
use quorate_failover::{
    Agent, CommandError, Domain, Event, Outcome, Recovery, ResourceConfig, ServiceConfig, ServiceStatus,
    StateName, Timeouts,
};
use quorate_membership::{BoxFuture, Instant, NodeId, Safety, View};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::time::Duration;

/// The lockspace of the owner locks.
const LOCKSPACE: &str = "services";

/// How long a command waits for what it asked for.
const COMMAND_DEADLINE: Duration = Duration::from_secs(30);

/// How long services get to stop when the node leaves.
const STOP_DEADLINE: Duration = Duration::from_secs(30);

/// The failover manager of this life.
pub(crate) struct Services {
    failover: Arc<Failover>,
}

impl Services {
    /// Stops everything in order, for a clean leave; whether all stopped.
    pub(crate) async fn stop_all(&self, world: &World) -> bool {
        let stopped = self.failover.shutdown(world.runtime.now() + STOP_DEADLINE).await;
        stopped && world.dlm.leave(LOCKSPACE).await.is_ok()
    }
}

/// Writes what happens to services into the node's events.
struct Sink {
    events: Events,
    node: u32,
}

impl EventSink for Sink {
    fn event(&self, _at: Instant, event: &Event) {
        let (name, state, detail) = match event {
            Event::Started { service } => (service, "started", String::new()),
            Event::Stopped { service } => (service, "stopped", String::new()),
            Event::Failed { service, resource, action, outcome } => {
                (service, "failed", format!("{resource}: {action:?}: {outcome:?}"))
            }
            Event::Leftover { service, .. } => (service, "leftover", String::new()),
        };
        let details = json!({ "name": name, "state": state, "node": self.node, "detail": detail });
        self.events.emit("service", details);
    }
}

/// Runs agents after putting this node's paths into their parameters.
struct Runner {
    inner: OcfRunner,
    world: Weak<World>,
}

impl AgentRunner for Runner {
    fn run(&self, mut call: AgentCall) -> BoxFuture<'_, Outcome> {
        Box::pin(async move {
            if let Some(world) = self.world.upgrade() {
                for value in call.resource.params.values_mut() {
                    *value = world.place(value).await;
                }
            }
            self.inner.run(call).await
        })
    }
}

impl World {
    /// Replaces `${file:FILESYSTEM:PATH}` by where that file is on this node: a path below the mount point, or
    /// `SOCKET:FILESYSTEM:PATH` where the filesystem is reached through the file API alone.
    async fn place(&self, text: &str) -> String {
        let Some((filesystem, path)) =
            text.strip_prefix("${file:").and_then(|t| t.strip_suffix('}')).and_then(|t| t.split_once(':'))
        else {
            return text.to_owned();
        };
        let fuse = self.mounted(filesystem).await.is_some_and(|m| m.has_mount_point());
        if fuse {
            let below = path.trim_start_matches('/');
            self.dir.join("mnt").join(filesystem).join(below).display().to_string()
        } else {
            format!("{}:{filesystem}:{path}", self.dir.join("admin.sock").display())
        }
    }

    /// Starts the manager with the first configuration, and tells it of later ones.
    pub(crate) async fn configure_services(self: &Arc<Self>, document: &Document) {
        let configs = services_of(document, &self.node_view());
        if let Some(services) = self.services.get() {
            if let Err(error) = services.failover.configure(configs) {
                tracing::error!(target: "quorate", "services keep their former configuration: {error}");
            }
            return;
        }
        let options = LockspaceOptions { safety: Safety::Lease, ..LockspaceOptions::plain(LOCKSPACE) };
        let lockspace = match self.dlm.join(&options).await {
            Ok(lockspace) => lockspace,
            Err(error) => {
                tracing::error!(target: "quorate", "no services on this node: {error}");
                return;
            }
        };
        let mut inner = OcfRunner::new(self.settings.name.clone());
        if let Some(mark) = std::env::var_os(quorate_fencing::supervisor::MARK) {
            inner = inner.mark(quorate_fencing::supervisor::MARK, mark);
        }
        let runner = Runner { inner, world: Arc::downgrade(self) };
        let sink = Sink { events: self.events.clone(), node: self.settings.id };
        let started = Failover::start(
            Arc::clone(&self.node) as _,
            Arc::clone(&self.node) as _,
            lockspace,
            Arc::clone(&self.runtime),
            configs,
            Arc::new(runner),
            Arc::new(sink),
        );
        match started {
            Ok(failover) => drop(self.services.set(Services { failover })),
            Err(error) => tracing::error!(target: "quorate", "no services on this node: {error}"),
        }
    }

    fn node_view(&self) -> Arc<View> {
        quorate_membership::Membership::view(&*self.node)
    }
}

/// The document's services in the failover manager's words.
fn services_of(document: &Document, view: &View) -> Vec<ServiceConfig> {
    document
        .services
        .iter()
        .map(|service| {
            let domain = service.domain.as_ref().and_then(|name| {
                document.failover_domains.iter().find(|d| d.name.get_ref() == name.get_ref())
            });
            let safety = match service.safety.get_ref().as_str() {
                "storage" => Safety::Storage,
                "power" => Safety::Power,
                _ => Safety::Lease,
            };
            ServiceConfig {
                name: service.name.get_ref().clone(),
                resources: tree_of(&service.resources, None),
                domain: domain.map(|d| Domain {
                    nodes: (1..).zip(&d.nodes).map(|(p, n)| (NodeId(*n.get_ref()), p)).collect(),
                    ordered: d.ordered,
                    restricted: d.restricted,
                    nofailback: d.nofailback,
                }),
                recovery: match service.recovery.get_ref().as_str() {
                    "relocate" => Recovery::Relocate,
                    "disable" => Recovery::Disable,
                    _ => Recovery::Restart,
                },
                max_restarts: service.max_restarts,
                restart_expire_time: Duration::from_secs(u64::from(service.restart_expire_s)),
                autostart: service.autostart,
                safety,
                servers: if safety == Safety::Storage {
                    view.servers.keys().copied().collect()
                } else {
                    BTreeSet::new()
                },
            }
        })
        .collect()
}

/// The resources below one of them, or the roots. The document's check has every parent before its children.
fn tree_of(all: &[quorate_ccs::schema::Resource], parent: Option<&str>) -> Vec<ResourceConfig> {
    let below = all.iter().filter(|r| r.parent.as_ref().map(|p| p.get_ref().as_str()) == parent);
    below
        .map(|r| ResourceConfig { children: tree_of(all, Some(r.name.get_ref())), ..resource_of(r) })
        .collect()
}

fn resource_of(resource: &quorate_ccs::schema::Resource) -> ResourceConfig {
    let agent = resource.agent.get_ref();
    let seconds = |s: u32| Duration::from_secs(u64::from(s));
    ResourceConfig {
        name: resource.name.get_ref().clone(),
        agent: match agent.split_once(':') {
            Some((provider, kind)) if !agent.contains('/') => {
                Agent::Ocf { provider: provider.into(), kind: kind.into() }
            }
            _ => Agent::Program(PathBuf::from(agent)),
        },
        params: resource.parameters.clone().into_iter().collect::<BTreeMap<_, _>>(),
        timeouts: Timeouts {
            start: seconds(resource.start_timeout_s),
            stop: seconds(resource.stop_timeout_s),
            monitor: seconds(resource.monitor_timeout_s),
        },
        monitor_interval: Duration::from_millis(u64::from(resource.monitor_interval_ms)),
        children: Vec::new(),
    }
}

fn manager(world: &World) -> Result<&Arc<Failover>, String> {
    world
        .services
        .get()
        .map(|s| &s.failover)
        .ok_or_else(|| "the failover manager waits for a configuration".into())
}

/// Waits until the service is as wanted, or says how it is.
async fn wait(
    world: &World,
    name: &str,
    what: &str,
    wanted: impl Fn(&ServiceStatus) -> bool + Send,
) -> Result<String, String> {
    let failover = manager(world)?;
    let deadline = world.runtime.now() + COMMAND_DEADLINE;
    match failover.wait_for(name, deadline, wanted).await {
        Some(status) => Ok(format!(
            "service {name} {what}{}",
            status.owner.map_or(String::new(), |o| format!(" on node {}", o.node))
        )),
        None => {
            let status = failover.status().into_iter().find(|s| s.service == name);
            let shown = status.map_or("unknown".into(), |s| said(&s));
            Err(format!("service {name} is not {what} within {} s: {shown}", COMMAND_DEADLINE.as_secs()))
        }
    }
}

/// A state with what is known beside it.
fn said(status: &ServiceStatus) -> String {
    let detail = status.detail.as_ref().map_or_else(String::new, |d| format!(", {d}"));
    let failed: Vec<String> = status.failed.iter().map(|(node, why)| format!("{node} ({why})")).collect();
    let failed =
        if failed.is_empty() { failed.join("") } else { format!(", failed on {}", failed.join(", ")) };
    format!("{}{detail}{failed}", status.state)
}

fn runs_on(status: &ServiceStatus, node: Option<u32>) -> bool {
    status.state == StateName::Running
        && node.is_none_or(|n| status.owner.is_some_and(|o| o.node == NodeId(n)))
}

pub(crate) fn shown(world: &World) -> Result<(String, Value), String> {
    let statuses = manager(world)?.status();
    let lines: Vec<String> = statuses
        .iter()
        .map(|s| {
            let owner = s.owner.map_or("-".into(), |o| o.to_string());
            format!("{:<20} {owner:<8} {} {}", s.service, s.state, s.detail.clone().unwrap_or_default())
        })
        .collect();
    let json = serde_json::to_value(&statuses).map_err(|e| e.to_string())?;
    Ok((lines.join("\n"), json))
}

pub(crate) async fn enable(world: &World, name: &str) -> Result<String, String> {
    manager(world)?.enable(name, None).map_err(|e| e.to_string())?;
    wait(world, name, "runs", |s| runs_on(s, None)).await
}

pub(crate) async fn disable(world: &World, name: &str) -> Result<String, String> {
    manager(world)?.disable(name).map_err(|e| e.to_string())?;
    wait(world, name, "is stopped", |s| matches!(s.state, StateName::Stopped(_)) && s.owner.is_none()).await
}

pub(crate) async fn relocate(world: &World, name: &str, node: Option<u32>) -> Result<String, String> {
    let failover = manager(world)?;
    match failover.relocate(name, node.map(NodeId)) {
        // Moving a stopped service to a node is starting it there.
        Err(CommandError::Disabled) => failover.enable(name, node.map(NodeId)),
        other => other,
    }
    .map_err(|e| e.to_string())?;
    wait(world, name, "runs", |s| runs_on(s, node)).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use quorate_membership::ClusterId;

    fn services(resources: &str) -> Vec<ServiceConfig> {
        let text = format!("name = \"c\"\n[[service]]\nname = \"s\"\n{resources}");
        services_of(&quorate_ccs::parse(&text).unwrap(), &View::empty(ClusterId::from_bytes([1; 16])))
    }

    #[test]
    fn parents_of_the_document_become_a_tree_in_its_order() {
        let resource = |name: &str, parent: &str| {
            let parent = if parent.is_empty() { String::new() } else { format!("parent = \"{parent}\"\n") };
            format!("[[service.resource]]\nname = \"{name}\"\nagent = \"heartbeat:Dummy\"\n{parent}")
        };
        let written =
            [("fs", ""), ("ip", ""), ("db", "fs"), ("app", "db"), ("log", "fs")].map(|(n, p)| resource(n, p));
        let services = services(&written.concat());
        let order: Vec<&str> = services[0].start_order().into_iter().map(|r| r.name.as_str()).collect();
        assert_eq!(order, ["fs", "db", "app", "log", "ip"]);
    }

    #[test]
    fn whatever_the_configuration_accepts_the_failover_manager_accepts() {
        let name = "n".repeat(48);
        let chain: Vec<String> = (0..64)
            .map(|n| {
                let parent = if n == 0 { String::new() } else { format!("parent = \"r{}\"\n", n - 1) };
                format!("[[service.resource]]\nname = \"r{n}\"\nagent = \"a.b-c_d:x\"\n{parent}")
            })
            .collect();
        let parameters = "[service.resource.parameters]\n\"a.b-c_d\" = \"any\\nthing\"\n";
        let long = format!("[[service.resource]]\nname = \"{name}\"\nagent = \"/x y\"\n{parameters}");
        for resources in [chain.concat(), long] {
            assert_eq!(quorate_failover::check(&services(&resources)), Ok(()));
        }
    }
}
