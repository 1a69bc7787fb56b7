//! What a service is: its resources, where it may run, and what happens when it fails.

use core::time::Duration;
use quorate_membership::{NodeId, Safety, ServerId};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// The longest name of a service, in bytes: with its prefix it is the name of a lock.
pub const NAME_BYTES_MAX: usize = 48;
/// The most resources of a service.
pub const RESOURCES_MAX: usize = 64;

/// A service: resources that run together on one node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceConfig {
    /// Its name, unique in the cluster, 1 to [`NAME_BYTES_MAX`] bytes.
    pub name: String,
    /// Started in this order, each followed by its children; stopped in exactly the reverse order.
    pub resources: Vec<ResourceConfig>,
    /// Where it may run; anywhere if `None`.
    pub domain: Option<Domain>,
    /// What to do when a running resource fails.
    pub recovery: Recovery,
    /// With [`Recovery::Restart`]: how many restarts within `restart_expire_time` until it relocates instead. 0: no limit.
    pub max_restarts: u32,
    /// How long a restart is remembered. Zero: no limit to restarts.
    pub restart_expire_time: Duration,
    /// Whether it is to run from the first day, without being enabled by hand.
    pub autostart: bool,
    /// What must be proven of a failed owner before it is started elsewhere (R20). A service with effects outside fenced
    /// storage must not rely on [`Safety::Storage`].
    pub safety: Safety,
    /// The storage servers it uses; with [`Safety::Storage`] the fence is installed at each.
    pub servers: BTreeSet<ServerId>,
}

/// One resource: an agent with its parameters.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResourceConfig {
    /// Its name, unique in the service.
    pub name: String,
    /// The program that starts, stops and monitors it.
    pub agent: Agent,
    /// Its parameters, passed as `OCF_RESKEY_NAME`.
    pub params: BTreeMap<String, String>,
    /// How long each action may take before its process group is killed and it counts as failed.
    pub timeouts: Timeouts,
    /// How long after one monitor ended well the next begins.
    pub monitor_interval: Duration,
    /// What needs it: started after it, stopped before it.
    pub children: Vec<ResourceConfig>,
}

/// An OCF resource agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Agent {
    /// `ocf:PROVIDER:TYPE`, found below `OCF_ROOT/resource.d`.
    Ocf {
        /// The provider (`heartbeat`).
        provider: String,
        /// The type (`IPaddr2`).
        kind: String,
    },
    /// A program of this path that speaks the same interface.
    Program(std::path::PathBuf),
}

impl std::fmt::Display for Agent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Ocf { provider, kind } => write!(f, "ocf:{provider}:{kind}"),
            Self::Program(path) => path.display().fmt(f),
        }
    }
}

/// How long actions may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timeouts {
    /// Start.
    pub start: Duration,
    /// Stop.
    pub stop: Duration,
    /// Monitor.
    pub monitor: Duration,
}

impl Timeouts {
    /// What most agents ask for in their metadata: 20 s.
    #[must_use]
    pub fn ordinary() -> Self {
        let time = Duration::from_secs(20);
        Self { start: time, stop: time, monitor: time }
    }
}

/// Nodes that are to run a service.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Domain {
    /// The nodes with their priorities: the lowest number is preferred, where the domain is ordered.
    pub nodes: BTreeMap<NodeId, u32>,
    /// Priorities count.
    pub ordered: bool,
    /// No other node may run it.
    pub restricted: bool,
    /// It stays where it runs when a better node comes.
    pub nofailback: bool,
}

/// What to do when a running resource fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Recovery {
    /// Start it again on the same node, elsewhere if that fails.
    Restart,
    /// Start it on another node, on the same one if there is no other.
    Relocate,
    /// Leave it stopped until a person enables it.
    Disable,
}

/// Why a configuration is not taken. Nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// A name is empty or too long.
    #[error("`{name}`: a name has 1 to {NAME_BYTES_MAX} bytes")]
    Name {
        /// The name.
        name: String,
    },
    /// Two of the same name.
    #[error("`{name}` is there twice")]
    Twice {
        /// The name.
        name: String,
    },
    /// Too many resources.
    #[error("service `{service}` has more than {RESOURCES_MAX} resources")]
    TooMany {
        /// The service.
        service: String,
    },
    /// A service that can run nowhere.
    #[error("service `{service}` has a restricted domain without nodes")]
    Nowhere {
        /// The service.
        service: String,
    },
    /// An agent name that would leave the directory of agents, or a parameter name that is none.
    #[error("resource `{resource}`: `{text}` is not a valid name")]
    Agent {
        /// The resource.
        resource: String,
        /// What is wrong.
        text: String,
    },
}

fn is_word(text: &str) -> bool {
    !text.is_empty()
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-.".contains(&b))
        && !text.starts_with('.')
}

/// Checks services as a whole.
///
/// # Errors
/// The first thing that is wrong.
pub fn check(services: &[ServiceConfig]) -> Result<(), ConfigError> {
    let named = |name: &str| match name.len() {
        1..=NAME_BYTES_MAX => Ok(()),
        _ => Err(ConfigError::Name { name: name.chars().take(NAME_BYTES_MAX).collect() }),
    };
    let mut names = BTreeSet::new();
    for service in services {
        named(&service.name)?;
        if !names.insert(&service.name) {
            return Err(ConfigError::Twice { name: service.name.clone() });
        }
        if service.domain.as_ref().is_some_and(|d| d.restricted && d.nodes.is_empty()) {
            return Err(ConfigError::Nowhere { service: service.name.clone() });
        }
        let resources = service.start_order();
        if RESOURCES_MAX < resources.len() {
            return Err(ConfigError::TooMany { service: service.name.clone() });
        }
        let mut own = BTreeSet::new();
        for resource in resources {
            named(&resource.name)?;
            if !own.insert(&resource.name) {
                return Err(ConfigError::Twice { name: resource.name.clone() });
            }
            resource.check()?;
        }
    }
    Ok(())
}

impl ResourceConfig {
    fn check(&self) -> Result<(), ConfigError> {
        let words = match &self.agent {
            Agent::Ocf { provider, kind } => vec![provider, kind],
            Agent::Program(_) => Vec::new(),
        };
        match words.into_iter().chain(self.params.keys()).find(|w| !is_word(w)) {
            Some(text) => Err(ConfigError::Agent { resource: self.name.clone(), text: text.clone() }),
            None => Ok(()),
        }
    }
}

impl ServiceConfig {
    /// All resources in the order they start: parents before children, siblings as written.
    #[must_use]
    pub fn start_order(&self) -> Vec<&ResourceConfig> {
        let mut order = Vec::new();
        let mut todo: Vec<&ResourceConfig> = self.resources.iter().rev().collect();
        while let Some(resource) = todo.pop() {
            order.push(resource);
            todo.extend(resource.children.iter().rev());
        }
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(crate) fn resource(name: &str, children: Vec<ResourceConfig>) -> ResourceConfig {
        ResourceConfig {
            name: name.into(),
            agent: Agent::Ocf { provider: "heartbeat".into(), kind: "Dummy".into() },
            params: BTreeMap::new(),
            timeouts: Timeouts::ordinary(),
            monitor_interval: Duration::from_secs(10),
            children,
        }
    }

    fn service(resources: Vec<ResourceConfig>) -> ServiceConfig {
        ServiceConfig {
            name: "web".into(),
            resources,
            domain: None,
            recovery: Recovery::Restart,
            max_restarts: 0,
            restart_expire_time: Duration::ZERO,
            autostart: true,
            safety: Safety::Lease,
            servers: BTreeSet::new(),
        }
    }

    #[test]
    fn parents_start_before_children_and_siblings_as_written() {
        let web = service(vec![
            resource("fs", vec![resource("db", vec![resource("app", vec![])]), resource("log", vec![])]),
            resource("ip", vec![]),
        ]);
        let names: Vec<_> = web.start_order().into_iter().map(|r| r.name.as_str()).collect();
        assert_eq!(names, ["fs", "db", "app", "log", "ip"]);
    }

    #[test]
    fn what_makes_no_sense_is_refused_by_name() {
        assert!(check(&[service(vec![resource("a", vec![resource("a", vec![])])])]).is_err());
        assert!(check(&[service(vec![]), service(vec![])]).is_err());
        let mut up = resource("a", vec![]);
        up.agent = Agent::Ocf { provider: "..".into(), kind: "x".into() };
        assert!(matches!(check(&[service(vec![up])]), Err(ConfigError::Agent { .. })));
        let mut param = resource("a", vec![]);
        param.params.insert("x=y".into(), String::new());
        assert!(matches!(check(&[service(vec![param])]), Err(ConfigError::Agent { .. })));
        assert_eq!(check(&[service(vec![resource("a", vec![])])]), Ok(()));
    }
}
