//! The coordinator on a real node: feeds the machine and carries out what it asks for. No decision is taken here.

#![expect(clippy::disallowed_methods, reason = "the wall clock stamps the history for people")]

mod program;

pub use program::ProgramAgent;

use crate::machine::{Coordinator, Input, Output};
use crate::{
    ConfigError, ConfirmError, FenceAgent, Fencer, FencingConfig, HistoryRecord, How, IncidentStatus,
    StorageFence, StorageFenceError,
};
use quorate_membership::{BoxFuture, Instant, Membership, NodeId, Runtime, View, ViewListener};
use std::collections::{BTreeMap, VecDeque};
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::sync::{Notify, oneshot};

/// Told of everything that goes into the history, for logs and files. Calls come one at a time and must not block for long.
pub trait HistorySink: Send + Sync {
    /// A record was added.
    fn record(&self, record: &HistoryRecord);
}

/// A sink for those who need none: the history is in memory and in the log all the same.
#[derive(Clone, Copy, Debug)]
pub struct NoSink;

impl HistorySink for NoSink {
    fn record(&self, _: &HistoryRecord) {}
}

/// The fencing of one node. Stops with the node's life; see [`FencingDriver::shutdown`].
pub struct FencingDriver {
    membership: Arc<dyn Membership>,
    runtime: Arc<dyn Runtime>,
    storage: Arc<dyn StorageFence>,
    agent: Arc<dyn FenceAgent>,
    sink: Arc<dyn HistorySink>,
    queue: Mutex<VecDeque<Input>>,
    wake: Notify,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    coordinator: Coordinator,
    history: VecDeque<HistoryRecord>,
    questions: BTreeMap<u64, oneshot::Sender<Result<(), ConfirmError>>>,
    asked: u64,
    quorate: bool,
    is_stopped: bool,
}

impl std::fmt::Debug for FencingDriver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FencingDriver").field("state", &self.state).finish_non_exhaustive()
    }
}

impl FencingDriver {
    /// Starts the coordinator of this node with [`ProgramAgent`] for its devices. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// The configuration is wrong; nothing was started.
    pub fn start(
        membership: Arc<dyn Membership>,
        runtime: Arc<dyn Runtime>,
        storage: Arc<dyn StorageFence>,
        config: FencingConfig,
        sink: Arc<dyn HistorySink>,
    ) -> Result<Arc<Self>, ConfigError> {
        Self::start_with(membership, runtime, storage, Arc::new(ProgramAgent::new()), config, sink)
    }

    /// As [`FencingDriver::start`], with another way to reach devices.
    ///
    /// # Errors
    /// The configuration is wrong; nothing was started.
    pub fn start_with(
        membership: Arc<dyn Membership>,
        runtime: Arc<dyn Runtime>,
        storage: Arc<dyn StorageFence>,
        agent: Arc<dyn FenceAgent>,
        config: FencingConfig,
        sink: Arc<dyn HistorySink>,
    ) -> Result<Arc<Self>, ConfigError> {
        let state = State {
            coordinator: Coordinator::new(membership.me(), config)?,
            history: VecDeque::new(),
            questions: BTreeMap::new(),
            asked: 0,
            quorate: false,
            is_stopped: false,
        };
        let driver = Arc::new(Self {
            membership,
            runtime,
            storage,
            agent,
            sink,
            queue: Mutex::new(VecDeque::new()),
            wake: Notify::new(),
            state: Mutex::new(state),
        });
        driver.membership.subscribe(Arc::new(Listener(Arc::downgrade(&driver))));
        let task = Arc::clone(&driver);
        driver.runtime.spawn(Box::pin(async move { task.run().await }));
        Ok(driver)
    }

    /// Takes a new configuration.
    ///
    /// # Errors
    /// It is wrong; the old one stays in force.
    pub fn configure(&self, config: FencingConfig) -> Result<(), ConfigError> {
        config.check()?;
        self.push(Input::Config(config));
        Ok(())
    }

    /// Whether this node is the one that fences now.
    #[must_use]
    pub fn is_coordinating(&self) -> bool {
        self.lock().coordinator.is_coordinating()
    }

    /// Stops: nothing new is started, running agents are killed with the tasks that wait for them only if the runtime
    /// ends. Questions that are open are answered with `Stopped`.
    pub fn shutdown(&self) {
        let mut state = self.lock();
        state.is_stopped = true;
        state.questions.clear();
        drop(state);
        self.wake.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, input: Input) {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).push_back(input);
        self.wake.notify_one();
    }

    async fn run(self: Arc<Self>) {
        loop {
            let deadline = {
                let state = self.lock();
                if state.is_stopped {
                    return;
                }
                state.coordinator.next_deadline()
            };
            let next = self.queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
            match (next, deadline) {
                (Some(input), _) => self.handle(input),
                (None, Some(at)) if at <= self.runtime.now() => self.handle(Input::Tick),
                (None, Some(at)) => {
                    tokio::select! {
                        () = self.wake.notified() => {}
                        () = self.runtime.sleep_until(at) => {}
                    }
                }
                (None, None) => self.wake.notified().await,
            }
        }
    }

    fn handle(self: &Arc<Self>, input: Input) {
        let now = self.runtime.now();
        let mut out = Vec::new();
        {
            let mut state = self.lock();
            // Asked at the last moment: a node that slept through its lease must not act on what it knew before.
            let quorate = self.membership.is_quorate();
            if quorate != state.quorate {
                state.quorate = quorate;
                Self::turn(&mut state, now, Input::Quorum(quorate), &mut out);
            }
            Self::turn(&mut state, now, input, &mut out);
        }
        for output in out {
            self.carry_out(output);
        }
    }

    fn turn(state: &mut State, now: Instant, input: Input, out: &mut Vec<Output>) {
        if let Err(error) = state.coordinator.handle(now, input, out) {
            tracing::error!(target: "quorate_fencing", %error, "the configuration is refused");
        }
    }

    fn carry_out(self: &Arc<Self>, output: Output) {
        match output {
            Output::AskLease(who) => {
                let over_at = self.membership.lease_over_at(who);
                self.push(Input::Lease { who, over_at });
            }
            Output::Record(record) => self.record(record),
            Output::Confirmed { question, result } => {
                if let Some(asker) = self.lock().questions.remove(&question) {
                    // Nobody waits for the answer any more if this fails, and nothing is lost by that.
                    let _ = asker.send(result);
                }
            }
            Output::Install { attempt, server, entry, since, timeout } => {
                let chain = self.membership.decisions_since(since);
                let driver = Arc::clone(self);
                self.answer(async move {
                    let at = driver.runtime.now() + timeout;
                    let address = entry.address.clone();
                    let result = tokio::select! {
                        result = driver.storage.install(server, &entry, chain) => result,
                        () = driver.runtime.sleep_until(at) => {
                            let detail = format!("no answer within {timeout:?}");
                            Err(StorageFenceError::Unreachable { address, detail })
                        }
                    };
                    Input::Installed { attempt, result }
                });
            }
            Output::Step { attempt, victim, node, device, step } => {
                tracing::warn!(target: "quorate_fencing", %victim, device = step.device, action = ?step.action, "fencing");
                let driver = Arc::clone(self);
                self.answer(async move {
                    let result = driver.agent.run(&device, &step, &node).await;
                    Input::Stepped { attempt, result }
                });
            }
            Output::Propose { attempt, request } => {
                let driver = Arc::clone(self);
                self.answer(async move {
                    let result = driver.membership.propose(request).await.map(|_| ());
                    Input::Proposed { attempt, result }
                });
            }
        }
    }

    /// Runs `work` in the background and feeds its answer.
    fn answer(self: &Arc<Self>, work: impl Future<Output = Input> + Send + 'static) {
        let driver = Arc::clone(self);
        self.runtime.spawn(Box::pin(async move {
            let input = work.await;
            driver.push(input);
        }));
    }

    fn record(&self, mut record: HistoryRecord) {
        let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        record.unix_ms = u64::try_from(unix.as_millis()).unwrap_or(u64::MAX);
        let (victim, how, result) = (record.victim, &record.how, &record.result);
        // A person's word may be wrong, and a failure needs a person.
        if matches!(how, How::Person { .. }) || result.is_err() {
            tracing::warn!(target: "quorate_fencing", %victim, %how, ?result, "history");
        } else {
            tracing::info!(target: "quorate_fencing", %victim, %how, ?result, "history");
        }
        self.sink.record(&record);
        let mut state = self.lock();
        if state.history.len() == crate::HISTORY_RECORDS_MAX {
            state.history.pop_front();
        }
        state.history.push_back(record);
    }
}

impl Fencer for FencingDriver {
    fn history(&self) -> Vec<HistoryRecord> {
        self.lock().history.iter().cloned().collect()
    }

    fn status(&self) -> Vec<IncidentStatus> {
        let now = self.runtime.now();
        self.lock().coordinator.status(now)
    }

    fn confirm<'a>(&'a self, node: NodeId, by: &'a str) -> BoxFuture<'a, Result<(), ConfirmError>> {
        Box::pin(async move {
            let (sender, answer) = oneshot::channel();
            let question = {
                let mut state = self.lock();
                if state.is_stopped {
                    return Err(ConfirmError::Stopped);
                }
                state.asked += 1;
                let question = state.asked;
                state.questions.insert(question, sender);
                question
            };
            self.push(Input::Confirm { question, node, by: by.to_owned() });
            answer.await.unwrap_or(Err(ConfirmError::Stopped))
        })
    }
}

/// Hands views on. Weak, so that a forgotten driver is not kept alive by the membership it listens to.
struct Listener(std::sync::Weak<FencingDriver>);

impl ViewListener for Listener {
    fn on_view(&self, view: &Arc<View>) {
        if let Some(driver) = self.0.upgrade() {
            driver.push(Input::View(Arc::clone(view)));
        }
    }

    fn on_quorum(&self, _: bool) {
        // The turn that this starts asks for the quorum itself.
        if let Some(driver) = self.0.upgrade() {
            driver.push(Input::Tick);
        }
    }

    fn on_stop(&self, _: &str) {
        if let Some(driver) = self.0.upgrade() {
            driver.shutdown();
        }
    }
}
