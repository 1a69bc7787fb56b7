//! The manager on a real node: feeds the machine and carries out what it asks for. No decision is taken here.

mod agent;
mod lock;

pub use agent::{AgentCall, AgentRunner, OcfRunner};

use crate::config::{ConfigError, check};
use crate::machine::{Input, Manager, Output};
use crate::{Command, CommandError, Event, ServiceConfig, ServiceStatus};
use lock::OwnerLocks;
use quorate_dlm::Lockspace;
use quorate_membership::{
    Epoch, Identity, Instant, Membership, NodeId, Runtime, SendError, ServiceId, SessionHandler, Sessions,
    View, ViewListener,
};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;
use tokio::sync::Notify;

/// How long a full session is left alone before an announcement is sent again.
const RESEND_TIME: Duration = Duration::from_millis(200);

/// Told of what happens to services, for logs and timelines. Calls come one at a time and must not block.
pub trait EventSink: Send + Sync {
    /// Something happened on this node.
    fn event(&self, at: Instant, event: &Event);
}

/// A sink for those who need none: everything is in the log all the same.
#[derive(Clone, Copy, Debug)]
pub struct NoSink;

impl EventSink for NoSink {
    fn event(&self, _: Instant, _: &Event) {}
}

/// The failover of one node. Ends with the node's life, or with [`Failover::shutdown`].
pub struct Failover {
    membership: Arc<dyn Membership>,
    sessions: Arc<dyn Sessions>,
    runtime: Arc<dyn Runtime>,
    agents: Arc<dyn AgentRunner>,
    sink: Arc<dyn EventSink>,
    locks: Arc<OwnerLocks>,
    state: Mutex<State>,
    wake: Notify,
    changed: Notify,
}

struct State {
    manager: Manager,
    /// What is to be carried out, in order.
    outbox: VecDeque<Output>,
    is_stopped: bool,
}

impl std::fmt::Debug for Failover {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Failover").field("manager", &self.lock().manager).finish_non_exhaustive()
    }
}

impl Failover {
    /// Starts the manager of this node. `lockspace` holds the owner locks: joined by every member, value blocks of at
    /// least 12 bytes, of lease safety: what a service asks for beyond that is kept by its attachment (R20), and every
    /// member of a stricter lockspace would owe it, whatever it runs. Called before the node joins, since it registers
    /// with the sessions.
    ///
    /// # Errors
    /// The configuration makes no sense; nothing was started.
    pub fn start(
        membership: Arc<dyn Membership>,
        sessions: Arc<dyn Sessions>,
        lockspace: Arc<dyn Lockspace>,
        runtime: Arc<dyn Runtime>,
        services: Vec<ServiceConfig>,
        agents: Arc<dyn AgentRunner>,
        sink: Arc<dyn EventSink>,
    ) -> Result<Arc<Self>, ConfigError> {
        let manager = Manager::new(membership.me(), services)?;
        let me = membership.me();
        let failover = Arc::new_cyclic(|weak: &Weak<Self>| Self {
            membership,
            sessions,
            runtime,
            agents,
            sink,
            locks: OwnerLocks::new(lockspace, me, weak.clone()),
            state: Mutex::new(State { manager, outbox: VecDeque::new(), is_stopped: false }),
            wake: Notify::new(),
            changed: Notify::new(),
        });
        let listener = Arc::new(Listener(Arc::downgrade(&failover)));
        failover.sessions.register(ServiceId::FAILOVER, listener.clone());
        failover.membership.subscribe(listener);
        failover.feed(Input::Quorum(failover.membership.is_quorate()));
        let task = Arc::clone(&failover);
        failover.runtime.spawn(Box::pin(async move { task.run().await }));
        Ok(failover)
    }

    /// All services, as this node knows them.
    #[must_use]
    pub fn status(&self) -> Vec<ServiceStatus> {
        self.lock().manager.status()
    }

    /// Resolves after the next change of anything that [`Failover::status`] shows, as far as this node learns of it. A
    /// hint: take the status again.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Waits until `wanted` holds for the status of a service; `None` at the deadline, or if there is no such service.
    pub async fn wait_for(
        &self,
        service: &str,
        deadline: Instant,
        wanted: impl Fn(&ServiceStatus) -> bool + Send,
    ) -> Option<ServiceStatus> {
        loop {
            // Listening begins before looking: a change in between is not missed.
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            let status = self.status().into_iter().find(|s| s.service == service)?;
            if wanted(&status) {
                return Some(status);
            }
            if deadline <= self.runtime.now() {
                return None;
            }
            tokio::select! {
                () = changed => {}
                () = self.runtime.sleep_until(deadline) => {}
            }
        }
    }

    /// Runs a service, if wanted on `node`, and forgets where it failed. Taken, not carried out, when this returns.
    ///
    /// # Errors
    /// See [`CommandError`].
    pub fn enable(&self, service: &str, node: Option<NodeId>) -> Result<(), CommandError> {
        self.command(service, Command::Enable(node))
    }

    /// Stops a service and leaves it stopped. Taken, not carried out, when this returns.
    ///
    /// # Errors
    /// See [`CommandError`].
    pub fn disable(&self, service: &str) -> Result<(), CommandError> {
        self.command(service, Command::Disable)
    }

    /// Moves a service to another node, to this one if given. Taken, not carried out, when this returns.
    ///
    /// # Errors
    /// See [`CommandError`].
    pub fn relocate(&self, service: &str, node: Option<NodeId>) -> Result<(), CommandError> {
        self.command(service, Command::Relocate(node))
    }

    /// Takes a new configuration: what is gone is stopped, what changed is stopped and started.
    ///
    /// # Errors
    /// It makes no sense; the old one stays in force.
    pub fn configure(&self, services: Vec<ServiceConfig>) -> Result<(), ConfigError> {
        check(&services)?;
        self.feed(Input::Config(services));
        Ok(())
    }

    /// Stops everything in order, so that it runs elsewhere, and detaches. False if the deadline came first: then this
    /// life cannot leave cleanly. The manager goes on trying either way.
    pub async fn shutdown(&self, deadline: Instant) -> bool {
        self.feed(Input::Leave);
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if self.lock().manager.has_left() {
                return true;
            }
            if deadline <= self.runtime.now() {
                return false;
            }
            tokio::select! {
                () = changed => {}
                () = self.runtime.sleep_until(deadline) => {}
            }
        }
    }

    fn command(&self, service: &str, command: Command) -> Result<(), CommandError> {
        let mut out = Vec::new();
        let mut state = self.lock();
        // Under the lock, so that inputs and the time go the same way.
        let result = state.manager.command(self.runtime.now(), service, command, &mut out);
        state.outbox.extend(out);
        drop(state);
        self.wake.notify_one();
        self.changed.notify_waiters();
        result
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn feed(&self, input: Input) {
        let mut out = Vec::new();
        let mut state = self.lock();
        state.manager.handle(self.runtime.now(), input, &mut out);
        state.outbox.extend(out);
        drop(state);
        self.wake.notify_one();
        self.changed.notify_waiters();
    }

    async fn run(self: Arc<Self>) {
        loop {
            let (outputs, deadline, stopped) = {
                let mut state = self.lock();
                let outputs: Vec<Output> = state.outbox.drain(..).collect();
                (outputs, state.manager.next_deadline(), state.is_stopped)
            };
            if stopped {
                return;
            }
            let idle = outputs.is_empty();
            for output in outputs {
                self.carry_out(output);
            }
            if !idle {
                continue;
            }
            match deadline {
                Some(at) => tokio::select! {
                    () = self.wake.notified() => {}
                    () = self.runtime.sleep_until(at) => self.feed(Input::Tick),
                },
                None => self.wake.notified().await,
            }
        }
    }

    fn carry_out(self: &Arc<Self>, output: Output) {
        let it = Arc::clone(self);
        match output {
            Output::Propose { attempt, request } => self.runtime.spawn(Box::pin(async move {
                let result = it.membership.propose(request).await.map(drop);
                it.feed(Input::Proposed { attempt, result });
            })),
            Output::Lock { service } => self.locks.take(&service),
            Output::Unlock { service } => self.locks.give_up(&service),
            Output::Run { attempt, service, resource, config, action } => {
                self.runtime.spawn(Box::pin(async move {
                    let order = config.start_order();
                    let Some(resource) = order.get(resource).copied().cloned() else { return };
                    let call = AgentCall { service, resource, action };
                    let outcome = it.agents.run(call).await;
                    it.feed(Input::Done { attempt, outcome });
                }));
            }
            Output::Send { to, bytes } => self.send(to, bytes),
            Output::Event(event) => {
                tracing::info!(target: "quorate_failover", ?event);
                self.sink.event(self.runtime.now(), &event);
            }
            Output::Left => {}
        }
    }

    fn send(self: &Arc<Self>, to: Identity, bytes: Vec<u8>) {
        match self.sessions.send(to, ServiceId::FAILOVER, bytes.clone()) {
            Ok(()) | Err(SendError::NotMember(_) | SendError::Stopped) => {}
            Err(SendError::Full(_)) => {
                // What is in it has versions: sent late it does no harm.
                let it = Arc::clone(self);
                self.runtime.spawn(Box::pin(async move {
                    it.runtime.sleep_until(it.runtime.now() + RESEND_TIME).await;
                    it.send(to, bytes);
                }));
            }
            Err(error) => tracing::error!(target: "quorate_failover", %error, "an announcement was not sent"),
        }
    }
}

/// Passes what membership tells on to the manager.
struct Listener(Weak<Failover>);

impl ViewListener for Listener {
    fn on_view(&self, view: &Arc<View>) {
        if let Some(failover) = self.0.upgrade() {
            failover.feed(Input::View(Arc::clone(view)));
        }
    }

    fn on_quorum(&self, quorate: bool) {
        if let Some(failover) = self.0.upgrade() {
            failover.feed(Input::Quorum(quorate));
        }
    }

    fn on_stop(&self, _: &str) {
        // Agents and services of this life are the supervisor's to end (R8).
        if let Some(failover) = self.0.upgrade() {
            failover.lock().is_stopped = true;
            failover.wake.notify_one();
        }
    }
}

impl SessionHandler for Listener {
    fn deliver(&self, from: Identity, _: Epoch, payload: &[u8]) {
        if let Some(failover) = self.0.upgrade() {
            failover.feed(Input::Message { from, bytes: payload.to_vec() });
        }
    }
}
