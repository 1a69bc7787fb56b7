//! The coordinator: decides whom to fence, when and how, and what is proven (R9). No clock, no program, no network.

mod incident;
mod power;
mod proof;
mod server;

use crate::{
    AgentError, ConfigError, ConfirmError, FenceDevice, FencingConfig, HISTORY_RECORDS_MAX, HistoryRecord,
    How, IncidentStatus, Step, StorageFenceError, Wait,
};
use core::time::Duration;
use incident::{Confirmation, Incident};
use power::Running;
use quorate_membership::{
    Epoch, Identity, Instant, NodeId, Request, RequestError, ServerEntry, ServerId, View,
};
use server::Server;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

/// Names one thing the driver was asked to do, so that its result finds back. Never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Attempt(pub u64);

/// What happens to the coordinator. All from the driver of the same node.
#[derive(Clone, Debug)]
pub enum Input {
    /// A view is installed. Views come in order; gaps do no harm.
    View(Arc<View>),
    /// The node holds a valid lease from a majority, or does not any more.
    Quorum(bool),
    /// Answers [`Output::AskLease`]: when the lease of a removed life is over on this node's clock, if known.
    Lease {
        /// Whose.
        who: Identity,
        /// When.
        over_at: Option<Instant>,
    },
    /// Answers [`Output::Install`].
    Installed {
        /// Which attempt.
        attempt: Attempt,
        /// The epoch the server serves by.
        result: Result<Epoch, StorageFenceError>,
    },
    /// Answers [`Output::Step`].
    Stepped {
        /// Which attempt.
        attempt: Attempt,
        /// Whether it was done and verified.
        result: Result<(), AgentError>,
    },
    /// Answers [`Output::Propose`].
    Proposed {
        /// Which attempt.
        attempt: Attempt,
        /// Whether it was decided.
        result: Result<(), RequestError>,
    },
    /// A person says that a node is off.
    Confirm {
        /// Names the question in [`Output::Confirmed`].
        question: u64,
        /// Which node.
        node: NodeId,
        /// Who says so.
        by: String,
    },
    /// The configuration changed.
    Config(FencingConfig),
    /// Time passed. Early and late ones do no harm.
    Tick,
}

/// What the driver must do, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Look up when the lease of this life is over; answer with [`Input::Lease`].
    AskLease(Identity),
    /// Install the newest view at a storage server within the timeout: the chain of decisions above `since`. Answer with
    /// [`Input::Installed`].
    Install {
        /// Answer with this.
        attempt: Attempt,
        /// Where.
        server: ServerId,
        /// How it is reached.
        entry: ServerEntry,
        /// What it is known to have.
        since: Epoch,
        /// How long it may take; after that the answer is `Unreachable`.
        timeout: Duration,
    },
    /// Carry out a step of a method; answer with [`Input::Stepped`].
    Step {
        /// Answer with this.
        attempt: Attempt,
        /// Who is fenced.
        victim: Identity,
        /// The node's name in the roster.
        node: String,
        /// The device.
        device: FenceDevice,
        /// What to do.
        step: Step,
    },
    /// Ask the cluster; answer with [`Input::Proposed`].
    Propose {
        /// Answer with this.
        attempt: Attempt,
        /// What.
        request: Request,
    },
    /// Tell the world. The record is in [`Coordinator::history`] too.
    Record(HistoryRecord),
    /// Answers [`Input::Confirm`].
    Confirmed {
        /// The question.
        question: u64,
        /// Whether the cluster decided it.
        result: Result<(), ConfirmError>,
    },
}

/// The coordinator of one node. It acts only while its node is quorate and the member with the lowest id.
#[derive(Debug)]
pub struct Coordinator {
    me: Identity,
    config: FencingConfig,
    view: Option<Arc<View>>,
    quorate: bool,
    /// Invariant: exactly the debts of `view` that have an item which is not fenced.
    incidents: BTreeMap<Identity, Incident>,
    /// Invariant: exactly the enrolled servers of `view`.
    servers: BTreeMap<ServerId, Server>,
    /// Nodes that were verified to be off and are being turned on again.
    restarts: BTreeMap<NodeId, (Identity, Running)>,
    /// The newest epoch that changed whom storage servers admit.
    admission: Epoch,
    confirmations: BTreeMap<u64, Confirmation>,
    history: VecDeque<HistoryRecord>,
    records: u64,
    attempts: u64,
    wake: Option<Instant>,
    #[cfg(any(test, feature = "sim"))]
    bug: Option<crate::Bug>,
}

impl Coordinator {
    /// The coordinator of this life of a node.
    ///
    /// # Errors
    /// The configuration is wrong.
    pub fn new(me: Identity, config: FencingConfig) -> Result<Self, ConfigError> {
        config.check()?;
        Ok(Self {
            me,
            config,
            view: None,
            quorate: false,
            incidents: BTreeMap::new(),
            servers: BTreeMap::new(),
            restarts: BTreeMap::new(),
            admission: Epoch(0),
            confirmations: BTreeMap::new(),
            history: VecDeque::new(),
            records: 0,
            attempts: 0,
            wake: None,
            #[cfg(any(test, feature = "sim"))]
            bug: None,
        })
    }

    /// Takes one input and appends what is to be done.
    ///
    /// # Errors
    /// A wrong configuration; the old one stays in force.
    pub fn handle(&mut self, now: Instant, input: Input, out: &mut Vec<Output>) -> Result<(), ConfigError> {
        match input {
            Input::View(view) => self.on_view(now, view, out),
            Input::Quorum(quorate) => self.quorate = quorate,
            Input::Lease { who, over_at } => {
                if let Some(incident) = self.incidents.get_mut(&who) {
                    incident.on_lease(now, over_at, self.config.timing.retry_min);
                }
            }
            Input::Installed { attempt, result } => self.on_installed(now, attempt, result, out),
            Input::Stepped { attempt, result } => self.on_stepped(now, attempt, result, out),
            Input::Proposed { attempt, result } => self.on_proposed(now, attempt, result, out),
            Input::Confirm { question, node, by } => self.on_confirm(now, question, node, by, out),
            Input::Config(config) => {
                config.check()?;
                self.config = config;
            }
            Input::Tick => {}
        }
        self.advance(now, out);
        self.check();
        Ok(())
    }

    /// When the next [`Input::Tick`] is due; `None` if only other inputs can change anything.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Instant> {
        self.wake
    }

    /// Whether this node is the one that fences.
    #[must_use]
    pub fn is_coordinating(&self) -> bool {
        let Some(view) = &self.view else { return false };
        let lowest = view.members.first_key_value().map(|(n, _)| *n) == Some(self.me.node);
        let lowest = lowest || self.bug_is(BugKind::EveryMember);
        let quorate = self.quorate || self.bug_is(BugKind::NoQuorum);
        view.contains(self.me) && lowest && quorate
    }

    /// What happened, oldest first; at most [`HISTORY_RECORDS_MAX`] records.
    pub fn history(&self) -> impl Iterator<Item = &HistoryRecord> {
        self.history.iter()
    }

    /// What is being fenced and what it waits for.
    #[must_use]
    pub fn status(&self, now: Instant) -> Vec<IncidentStatus> {
        let Some(view) = &self.view else { return Vec::new() };
        let coordinator = view.members.first_key_value().map(|(n, i)| Identity::new(*n, *i));
        self.incidents
            .iter()
            .map(|(victim, incident)| IncidentStatus {
                victim: *victim,
                removed: incident.removed,
                open: incident.open.iter().cloned().collect(),
                coordinator,
                waits: self.waits(now, *victim, incident),
            })
            .collect()
    }

    fn waits(&self, now: Instant, victim: Identity, incident: &Incident) -> Vec<Wait> {
        if !self.quorate {
            return vec![Wait::Quorum];
        }
        if !self.is_coordinating() {
            return Vec::new();
        }
        let mut waits = Vec::new();
        if incident.lease.is_none_or(|at| now < at) {
            waits.push(Wait::Lease(incident.lease));
        }
        for id in self.servers_of(victim) {
            if let Some(server) = self.servers.get(&id).filter(|s| s.confirmed < incident.removed) {
                waits.push(Wait::Server { server: id, failure: server.failure.clone() });
            }
        }
        waits.extend(self.power_wait(now, victim, incident));
        if incident.proposal.is_some() {
            waits.push(Wait::Decision);
        }
        waits
    }

    /// Starts whatever can be started now, and notes when to look again.
    fn advance(&mut self, now: Instant, out: &mut Vec<Output>) {
        self.wake = None;
        let victims: Vec<Identity> = self.incidents.keys().copied().collect();
        if !self.is_coordinating() {
            // A lower member may have come while a method ran. Who saw the victim off still says so: the other has not
            // seen it, and would turn it off once more.
            if self.quorate && self.view.as_ref().is_some_and(|v| v.contains(self.me)) {
                for who in victims {
                    if self.incidents.get(&who).is_some_and(|i| i.power.off.is_some()) {
                        self.advance_proof(now, who, out);
                    }
                }
            }
            return;
        }
        for who in &victims {
            self.ask_lease(now, *who, out);
        }
        self.advance_servers(now, out);
        for who in victims {
            self.advance_power(now, who, out);
            self.advance_proof(now, who, out);
        }
    }

    fn ask_lease(&mut self, now: Instant, who: Identity, out: &mut Vec<Output>) {
        let Some(incident) = self.incidents.get_mut(&who) else { return };
        if incident.lease.is_some() || incident.lease_asked {
            return;
        }
        let at = incident.ask_lease_at;
        if now < at {
            self.wake_at(at);
            return;
        }
        incident.lease_asked = true;
        out.push(Output::AskLease(who));
    }

    fn attempt(&mut self) -> Attempt {
        self.attempts += 1;
        Attempt(self.attempts)
    }

    fn wake_at(&mut self, at: Instant) {
        self.wake = Some(self.wake.map_or(at, |w| w.min(at)));
    }

    /// The pause after this many failures in a row.
    fn pause(&self, failures: u32) -> Duration {
        if self.bug_is(BugKind::GivesUp) {
            return Duration::from_secs(1_000_000_000);
        }
        let doublings = failures.saturating_sub(1).min(20);
        (self.config.timing.retry_min * 2_u32.pow(doublings)).min(self.config.timing.retry_max)
    }

    /// Something that this node did.
    fn record(
        &mut self,
        now: Instant,
        victim: Identity,
        how: How,
        result: Result<(), String>,
        out: &mut Vec<Output>,
    ) {
        self.record_of(now, victim, Some(self.me), how, result, out);
    }

    fn record_of(
        &mut self,
        now: Instant,
        victim: Identity,
        by: Option<Identity>,
        how: How,
        result: Result<(), String>,
        out: &mut Vec<Output>,
    ) {
        self.records += 1;
        let since = self.incidents.get(&victim).map_or(now, |i| i.since);
        let after = now.since(since);
        let record =
            HistoryRecord { number: self.records, at: now, unix_ms: 0, victim, by, how, result, after };
        if self.history.len() == HISTORY_RECORDS_MAX {
            self.history.pop_front();
        }
        self.history.push_back(record.clone());
        out.push(Output::Record(record));
    }

    fn check(&self) {
        assert!(self.history.len() <= HISTORY_RECORDS_MAX, "the history is bounded");
        let Some(view) = &self.view else {
            assert!(self.incidents.is_empty() && self.servers.is_empty(), "nothing without a view");
            return;
        };
        assert!(self.servers.keys().eq(view.servers.keys()), "exactly the enrolled servers are known");
        for (who, incident) in &self.incidents {
            assert!(view.debts.contains_key(who), "an incident is a debt");
            assert!(!incident.open.is_empty(), "an incident has something open");
        }
    }

    #[cfg(any(test, feature = "sim"))]
    /// Makes the coordinator wrong on purpose, to prove a checker.
    pub fn plant(&mut self, bug: crate::Bug) {
        self.bug = Some(bug);
    }

    #[cfg(any(test, feature = "sim"))]
    fn bug_is(&self, kind: BugKind) -> bool {
        self.bug == Some(kind)
    }

    #[cfg(not(any(test, feature = "sim")))]
    #[expect(clippy::unused_self, reason = "the other half of a pair")]
    fn bug_is(&self, _: BugKind) -> bool {
        false
    }
}

#[cfg(any(test, feature = "sim"))]
use crate::Bug as BugKind;

/// What stands for a bug where none can be planted.
#[cfg(not(any(test, feature = "sim")))]
#[derive(Clone, Copy)]
enum BugKind {
    NoQuorum,
    EveryMember,
    ForgetsPowerOff,
    IgnoresLease,
    IgnoresKillTime,
    OneServerIsEnough,
    FirstStepIsEnough,
    IgnoresFailure,
    GivesUp,
}

#[cfg(test)]
mod tests;
