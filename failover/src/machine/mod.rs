//! The failover manager of one node: decides what it runs, and in what order that is started and stopped (R20).
//!
//! ```text
//!  attach (decided record) ─▶ owner lock ─▶ probe, stop leftovers ─▶ start in order ─▶ running, monitored
//!     ▲                                                                                     │ failure, or not wanted
//!     └── detach ◀── unlock ◀──────────────────────────────── stop in reverse order ◀───────┘
//! ```

mod bug;
mod service;

pub use bug::Bug;

use crate::config::{ConfigError, check};
use crate::place::{ClusterState, Idle, Plan, Target, place};
use crate::shared::{Announcement, Facts, Versioned};
use crate::{Action, Outcome, ServiceConfig, ServiceStatus, StateName};
use core::time::Duration;
use quorate_membership::{
    Identity, Instant, NodeId, Proof, Request, RequestError, ResourceId, ResourceKind, View,
};
use service::Local;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// How long the announcements of other members are waited for before anything is placed without them.
pub const SYNC_TIME: Duration = Duration::from_secs(5);
/// How long after a refusal the same thing is asked for again.
pub const RETRY_TIME: Duration = Duration::from_millis(500);

/// Names one thing the driver was asked to do, so that its result finds back. Never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Attempt(pub u64);

/// A person's order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Run it, if wanted on this node, and forget where it failed.
    Enable(Option<NodeId>),
    /// Stop it and leave it stopped. A service whose stop failed is stopped once more.
    Disable,
    /// Run it on another node, on this one if given.
    Relocate(Option<NodeId>),
}

/// Why an order was not taken. Nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CommandError {
    /// There is no such service.
    #[error("there is no service `{0}`")]
    NoService(String),
    /// That node is no member, leaves, or may not run it.
    #[error("node {0} cannot run it")]
    NotThere(NodeId),
    /// No other node can take it.
    #[error("no other node can run it")]
    NoOther,
    /// A disabled service is not relocated.
    #[error("it is disabled")]
    Disabled,
    /// Without quorum nothing is decided.
    #[error("this node is not quorate")]
    NotQuorate,
    /// The manager is stopped, or stops.
    #[error("the failover manager is stopping")]
    Stopping,
}

/// What happens to the manager. All from the driver of the same node.
#[derive(Clone, Debug)]
pub enum Input {
    /// A view is installed. In order, without gaps.
    View(Arc<View>),
    /// The node gained or lost quorum. Without it nothing is started.
    Quorum(bool),
    /// Another member's announcement. Hostile bytes do no harm.
    Message {
        /// Its sender.
        from: Identity,
        /// The bytes.
        bytes: Vec<u8>,
    },
    /// Answers [`Output::Propose`].
    Proposed {
        /// Which attempt.
        attempt: Attempt,
        /// Whether it was decided.
        result: Result<(), RequestError>,
    },
    /// Answers [`Output::Lock`]: the owner lock is held, or will not be.
    Locked {
        /// Of which service.
        service: String,
        /// Whether it is held.
        held: bool,
    },
    /// Answers [`Output::Unlock`].
    Unlocked {
        /// Of which service.
        service: String,
    },
    /// Answers [`Output::Run`].
    Done {
        /// Which attempt.
        attempt: Attempt,
        /// How it ended.
        outcome: Outcome,
    },
    /// New services. What is gone is stopped; what changed is stopped and started.
    Config(Vec<ServiceConfig>),
    /// Stop everything in order and take nothing any more; [`Output::Left`] says when.
    Leave,
    /// Time passed.
    Tick,
}

/// What the driver must do, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Ask the cluster; answer with [`Input::Proposed`].
    Propose {
        /// Answer with this.
        attempt: Attempt,
        /// What.
        request: Request,
    },
    /// Take the owner lock (EX) of a service, wait for it, and write this identity into its value block.
    Lock {
        /// Which service.
        service: String,
    },
    /// Give the owner lock up.
    Unlock {
        /// Which service.
        service: String,
    },
    /// Run an agent; answer with [`Input::Done`].
    Run {
        /// Answer with this.
        attempt: Attempt,
        /// Which service.
        service: String,
        /// Which of its resources, by its place in the start order.
        resource: usize,
        /// The resource as it was when it was started.
        config: Arc<ServiceConfig>,
        /// What to do.
        action: Action,
    },
    /// Send to a member, on the session of failover.
    Send {
        /// To whom.
        to: Identity,
        /// What.
        bytes: Vec<u8>,
    },
    /// Tell the world.
    Event(Event),
    /// Everything is stopped and detached, after [`Input::Leave`].
    Left,
}

/// What happened to a service on this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// It is up.
    Started {
        /// Which.
        service: String,
    },
    /// It is down.
    Stopped {
        /// Which.
        service: String,
    },
    /// A resource failed.
    Failed {
        /// Which service.
        service: String,
        /// Which resource.
        resource: String,
        /// What it was doing.
        action: Action,
        /// How that ended.
        outcome: Outcome,
    },
    /// Something of it was still running before its start, and is stopped.
    Leftover {
        /// Which service.
        service: String,
        /// Which resource.
        resource: String,
    },
}

/// The manager.
#[derive(Debug)]
pub struct Manager {
    me: Identity,
    configs: BTreeMap<String, Arc<ServiceConfig>>,
    view: Option<Arc<View>>,
    is_quorate: bool,
    is_over: bool,
    /// Asked to leave.
    leaving: bool,
    has_left: bool,
    facts: BTreeMap<String, Facts>,
    /// Members that have announced themselves, and whether they leave.
    heard: BTreeMap<Identity, bool>,
    /// When placing begins without the announcements that are missing.
    sync_until: Option<Instant>,
    /// Invariant: a service is here exactly while this node may be attached to it or have asked to be.
    local: BTreeMap<String, Local>,
    /// Debts whose end was asked for, until the answer.
    closing: BTreeMap<Attempt, (Identity, ResourceId)>,
    /// No debt is closed again before this, after a refusal.
    close_after: Instant,
    attempts: u64,
    count: u64,
    #[cfg(any(test, feature = "sim"))]
    bug: Option<Bug>,
}

/// The attachment of a service.
pub(crate) fn resource_id(service: &str) -> ResourceId {
    ResourceId::new(ResourceKind::Service, service)
}

impl Manager {
    /// A manager that runs nothing yet.
    ///
    /// # Errors
    /// The configuration makes no sense.
    pub fn new(me: Identity, services: Vec<ServiceConfig>) -> Result<Self, ConfigError> {
        check(&services)?;
        Ok(Self {
            me,
            configs: services.into_iter().map(|s| (s.name.clone(), Arc::new(s))).collect(),
            view: None,
            is_quorate: false,
            is_over: false,
            leaving: false,
            has_left: false,
            facts: BTreeMap::new(),
            heard: BTreeMap::new(),
            sync_until: None,
            local: BTreeMap::new(),
            closing: BTreeMap::new(),
            close_after: Instant(0),
            attempts: 0,
            count: 0,
            #[cfg(any(test, feature = "sim"))]
            bug: None,
        })
    }

    /// Makes a deliberate mistake from now on.
    #[cfg(any(test, feature = "sim"))]
    pub fn set_bug(&mut self, bug: Bug) {
        self.bug = Some(bug);
    }

    #[cfg(any(test, feature = "sim"))]
    pub(crate) fn bug_is(&self, bug: Bug) -> bool {
        self.bug == Some(bug)
    }

    #[cfg(not(any(test, feature = "sim")))]
    #[expect(clippy::unused_self, reason = "with simulation it is used")]
    pub(crate) fn bug_is(&self, _: Bug) -> bool {
        false
    }

    /// Takes one input; what must be done is in `out`, in order.
    pub fn handle(&mut self, now: Instant, input: Input, out: &mut Vec<Output>) {
        if self.is_over {
            return;
        }
        match input {
            Input::View(view) => self.on_view(now, view, out),
            Input::Quorum(quorate) => self.is_quorate = quorate,
            Input::Message { from, bytes } => self.on_message(from, &bytes, out),
            Input::Proposed { attempt, result } => self.on_proposed(now, attempt, result, out),
            Input::Locked { service, held } => self.on_locked(now, &service, held, out),
            Input::Unlocked { service } => self.on_unlocked(&service, out),
            Input::Done { attempt, outcome } => self.on_done(now, attempt, &outcome, out),
            Input::Config(services) => self.on_config(services),
            Input::Leave => {
                self.leaving = true;
                self.announce(out);
            }
            Input::Tick => {}
        }
        if !self.is_over {
            self.pursue(now, out);
        }
    }

    /// When a [`Input::Tick`] is due.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Instant> {
        if self.is_over {
            return None;
        }
        // Without quorum nothing but giving up goes on; when it returns, everything is looked at again.
        let frozen = !self.is_quorate;
        let local = self.local.values().filter_map(|l| l.next_deadline(frozen));
        let closing = (Instant(0) < self.close_after).then_some(self.close_after);
        local.chain(closing.into_iter().chain(self.sync_until).filter(|_| !frozen)).min()
    }

    /// A person's order, taken at this node for the whole cluster.
    ///
    /// # Errors
    /// See [`CommandError`].
    pub fn command(
        &mut self,
        now: Instant,
        service: &str,
        command: Command,
        out: &mut Vec<Output>,
    ) -> Result<(), CommandError> {
        if self.is_over || self.leaving {
            return Err(CommandError::Stopping);
        }
        if !self.is_quorate {
            return Err(CommandError::NotQuorate);
        }
        let config =
            self.configs.get(service).cloned().ok_or_else(|| CommandError::NoService(service.to_owned()))?;
        let target = match command {
            Command::Disable => Target::Disabled,
            Command::Enable(node) => Target::Enabled(self.usable(&config, node)?),
            Command::Relocate(node) => {
                if self.target(&config) == Target::Disabled {
                    return Err(CommandError::Disabled);
                }
                let node = match self.usable(&config, node)? {
                    Some(node) => node,
                    None => self.other(&config).ok_or(CommandError::NoOther)?,
                };
                Target::Enabled(Some(node))
            }
        };
        let (count, by) = (self.next_count(), self.me);
        let facts = self.facts.entry(config.name.clone()).or_default();
        facts.target = Some(Versioned { count, by, value: target });
        if target != Target::Disabled {
            for failed in facts.failed.values_mut() {
                *failed = Versioned { count, by, value: None };
            }
        }
        if target == Target::Disabled {
            self.retry_stop(service);
        }
        self.announce(out);
        self.pursue(now, out);
        Ok(())
    }

    fn usable(&self, config: &ServiceConfig, node: Option<NodeId>) -> Result<Option<NodeId>, CommandError> {
        let Some(node) = node else { return Ok(None) };
        let mut state = self.cluster_state(config, &BTreeMap::new());
        state.nodes.retain(|n, _| *n == node);
        (state.target, state.owner, state.unfenced) = (Target::Enabled(None), None, false);
        state.failed.clear();
        if place(config, &state) == Plan::Start(node) {
            Ok(Some(node))
        } else {
            Err(CommandError::NotThere(node))
        }
    }

    /// The best node other than the owner.
    fn other(&self, config: &ServiceConfig) -> Option<NodeId> {
        let mut state = self.cluster_state(config, &self.loads());
        let owner = state.owner.or_else(|| self.local.contains_key(&config.name).then_some(self.me.node));
        if let Some(owner) = owner {
            state.nodes.remove(&owner);
        }
        (state.target, state.owner, state.unfenced) = (Target::Enabled(None), None, false);
        match place(config, &state) {
            Plan::Start(node) => Some(node),
            _ => None,
        }
    }

    /// All services, as this node knows them.
    #[must_use]
    pub fn status(&self) -> Vec<ServiceStatus> {
        let loads = self.loads();
        self.configs
            .values()
            .map(|config| {
                let state = self.cluster_state(config, &loads);
                let plan = place(config, &state);
                let facts = self.facts.get(&config.name);
                let owner = self.owner(&config.name);
                let report = facts
                    .and_then(|f| f.report.as_ref())
                    .filter(|r| Some(r.by) == owner)
                    .map(|r| r.value.clone());
                let name = match (owner, &report, plan) {
                    (Some(_), Some(report), _) => report.state,
                    (Some(_), None, _) | (None, _, Plan::Start(_)) => StateName::Starting,
                    (None, _, Plan::WaitForFence) => StateName::WaitingForFence,
                    (None, _, Plan::Nothing(idle)) => StateName::Stopped(idle),
                    (None, ..) => StateName::Stopped(Idle::NoNode),
                };
                let named = |f: &Facts| {
                    let known = f.failed.iter().filter(|(life, _)| self.is_member(**life));
                    known.filter_map(|(life, v)| Some((life.node, v.value.clone()?))).collect()
                };
                ServiceStatus {
                    service: config.name.clone(),
                    target: state.target,
                    owner,
                    state: name,
                    detail: report.as_ref().and_then(|r| r.detail.clone()),
                    restarts: report.map_or(0, |r| r.restarts),
                    failed: facts.map(named).unwrap_or_default(),
                }
            })
            .collect()
    }

    /// Whether everything is stopped and detached after [`Input::Leave`].
    #[must_use]
    pub fn has_left(&self) -> bool {
        self.has_left
    }

    fn on_view(&mut self, now: Instant, view: Arc<View>, out: &mut Vec<Output>) {
        if !view.contains(self.me) {
            // Removed: this life is over. Its supervisor ends what it runs.
            self.is_over = true;
            return;
        }
        let newcomers: Vec<Identity> = view
            .identities()
            .filter(|who| *who != self.me && self.view.as_ref().is_none_or(|old| !old.contains(*who)))
            .collect();
        self.heard.retain(|who, _| view.contains(*who));
        if self.view.is_none() {
            self.sync_until = Some(now + SYNC_TIME);
        }
        self.view = Some(view);
        if !newcomers.is_empty() {
            let bytes = Announcement::new(self.leaving, self.facts.clone()).encode();
            out.extend(newcomers.into_iter().map(|to| Output::Send { to, bytes: bytes.clone() }));
        }
    }

    fn on_message(&mut self, from: Identity, bytes: &[u8], out: &mut Vec<Output>) {
        let Ok(said) = Announcement::decode(bytes) else { return };
        self.count = self.count.max(said.newest());
        if self.heard.insert(from, said.leaving).is_none() {
            // Its manager has just started and was not there for what was said when it became a member.
            let bytes = Announcement::new(self.leaving, self.facts.clone()).encode();
            out.push(Output::Send { to: from, bytes });
        }
        for (service, theirs) in &said.facts {
            let facts = self.facts.entry(service.clone()).or_default();
            let before = facts.target.clone();
            facts.merge(theirs);
            let after = facts.target.as_ref().filter(|t| Some(*t) != before.as_ref());
            // An order that was given at another node.
            if after.is_some_and(|t| t.value == Target::Disabled) {
                self.retry_stop(service);
            }
        }
    }

    fn on_config(&mut self, services: Vec<ServiceConfig>) {
        if check(&services).is_ok() {
            self.configs = services.into_iter().map(|s| (s.name.clone(), Arc::new(s))).collect();
        }
    }

    /// Tells everybody what this node knows.
    fn announce(&self, out: &mut Vec<Output>) {
        let Some(view) = &self.view else { return };
        let bytes = Announcement::new(self.leaving, self.facts.clone()).encode();
        let others = view.identities().filter(|who| *who != self.me);
        out.extend(others.map(|to| Output::Send { to, bytes: bytes.clone() }));
    }

    fn next_attempt(&mut self) -> Attempt {
        self.attempts += 1;
        Attempt(self.attempts)
    }

    fn next_count(&mut self) -> u64 {
        self.count += 1;
        self.count
    }

    fn propose(&mut self, request: Request, out: &mut Vec<Output>) -> Attempt {
        let attempt = self.next_attempt();
        out.push(Output::Propose { attempt, request });
        attempt
    }

    fn is_member(&self, who: Identity) -> bool {
        self.view.as_ref().is_some_and(|v| v.contains(who))
    }

    /// Who is attached to a service.
    fn owner(&self, service: &str) -> Option<Identity> {
        self.view.as_ref()?.attached(&resource_id(service)).next().map(|a| a.owner)
    }

    fn target(&self, config: &ServiceConfig) -> Target {
        let said = self.facts.get(&config.name).and_then(|f| f.target.as_ref()).map(|v| v.value);
        said.unwrap_or(if config.autostart { Target::Enabled(None) } else { Target::Disabled })
    }

    /// How many services each member has.
    fn loads(&self) -> BTreeMap<NodeId, usize> {
        let mut loads = BTreeMap::new();
        let Some(view) = &self.view else { return loads };
        for a in view.attachments.iter().filter(|a| a.resource.kind == ResourceKind::Service) {
            *loads.entry(a.owner.node).or_default() += 1;
        }
        loads
    }

    fn cluster_state(&self, config: &ServiceConfig, loads: &BTreeMap<NodeId, usize>) -> ClusterState {
        let mut state = ClusterState {
            nodes: BTreeMap::new(),
            target: self.target(config),
            owner: self.owner(&config.name).map(|o| o.node),
            unfenced: false,
            failed: BTreeSet::new(),
        };
        let Some(view) = &self.view else { return state };
        for who in view.identities() {
            // A member that has said nothing has no manager, or none yet: a service would wait there for it.
            let leaves = if who == self.me { self.leaving } else { self.heard.get(&who) != Some(&false) };
            if !leaves {
                state.nodes.insert(who.node, loads.get(&who.node).copied().unwrap_or(0));
            }
        }
        state.unfenced = view.owing(&resource_id(&config.name)).any(|(_, item)| !item.fenced)
            && !self.bug_is(Bug::StartsUnfenced);
        if let Some(facts) = self.facts.get(&config.name) {
            let failed = facts.failed.iter().filter(|(who, v)| v.value.is_some() && view.contains(**who));
            state.failed = failed.map(|(who, _)| who.node).collect();
        }
        state
    }

    /// Whether every other member has said what it knows, or had its time.
    fn is_synced(&mut self, now: Instant) -> bool {
        let Some(view) = &self.view else { return false };
        if self.sync_until.is_some_and(|until| until <= now) {
            self.sync_until = None;
        }
        if self.sync_until.is_none() {
            return true;
        }
        let complete = view.identities().all(|who| who == self.me || self.heard.contains_key(&who));
        if complete {
            self.sync_until = None;
        }
        complete
    }

    /// Compares what should be with what is, for every service, and takes the next steps.
    fn pursue(&mut self, now: Instant, out: &mut Vec<Output>) {
        let mut decided = None;
        if self.is_quorate && self.is_synced(now) {
            let mut loads = self.loads();
            let mut plans = BTreeMap::new();
            for config in self.configs.values() {
                let plan = place(config, &self.cluster_state(config, &loads));
                if let Plan::Start(node) = plan {
                    *loads.entry(node).or_default() += 1;
                }
                plans.insert(config.name.clone(), plan);
            }
            let mine = self.me.node;
            for (service, plan) in &plans {
                let here = matches!(plan, Plan::Start(n) | Plan::Stay(n) if *n == mine);
                match self.local.get_mut(service) {
                    Some(local) => local.is_wanted = here,
                    None if here && !self.leaving => {
                        let config = Arc::clone(&self.configs[service]);
                        self.local.insert(service.clone(), Local::new(config));
                    }
                    None => {}
                }
            }
            for (service, local) in &mut self.local {
                // Gone from the configuration, or changed: what runs is stopped as it was started.
                if self.configs.get(service).is_none_or(|c| *c != local.config) {
                    local.is_wanted = false;
                }
            }
            decided = Some(plans);
        }
        for service in self.local.keys().cloned().collect::<Vec<_>>() {
            self.step(now, &service, out);
        }
        // After the steps: what came up by one of them is recovered now.
        if let Some(plans) = decided {
            self.close_debts(now, &plans, out);
        }
        if self.leaving && self.local.is_empty() && !self.has_left {
            self.has_left = true;
            out.push(Output::Left);
        }
    }

    /// Ends fenced debts: of services that run here, and, on the lowest member, of those that will not run.
    fn close_debts(&mut self, now: Instant, plans: &BTreeMap<String, Plan>, out: &mut Vec<Output>) {
        let Some(view) = self.view.clone() else { return };
        if now < self.close_after {
            return;
        }
        self.close_after = Instant(0);
        let lowest = view.members.keys().next() == Some(&self.me.node);
        for (debtor, debt) in &view.debts {
            for (resource, item) in &debt.items {
                let name = &resource.name;
                let runs = self.local.get(name).is_some_and(Local::is_running);
                let idle = self.owner(name).is_none()
                    && plans.get(name).is_none_or(|p| matches!(p, Plan::Nothing(_)));
                let mine = resource.kind == ResourceKind::Service && item.fenced && (runs || lowest && idle);
                if mine && !self.closing.values().any(|(d, r)| d == debtor && r == resource) {
                    let request = Request::Prove {
                        debtor: *debtor,
                        resources: BTreeSet::from([resource.clone()]),
                        proof: Proof::Recovered,
                    };
                    let attempt = self.propose(request, out);
                    self.closing.insert(attempt, (*debtor, resource.clone()));
                }
            }
        }
    }
}
