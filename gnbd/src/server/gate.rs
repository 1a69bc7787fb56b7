//! What stands between a connection and the device: it can be shut at any moment, and tells when nothing is left inside.

use crate::fence::ConnectionId;
use crate::fence::wire::LifeCounts;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::{mpsc, watch};

/// Counters of one life of a node, shared by its connections.
#[derive(Debug, Default)]
pub(crate) struct LifeCounter {
    pub(crate) connections: AtomicU64,
    pub(crate) writes_applied: AtomicU64,
    pub(crate) writes_after_fence: AtomicU64,
    pub(crate) hellos_refused: AtomicU64,
    pub(crate) requests_refused: AtomicU64,
}

impl LifeCounter {
    pub(crate) fn add(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn counts(&self) -> LifeCounts {
        LifeCounts {
            connections: self.connections.load(Ordering::Relaxed),
            writes_applied: self.writes_applied.load(Ordering::Relaxed),
            writes_after_fence: self.writes_after_fence.load(Ordering::Relaxed),
            hellos_refused: self.hellos_refused.load(Ordering::Relaxed),
            requests_refused: self.requests_refused.load(Ordering::Relaxed),
        }
    }
}

/// The gate of one connection. One of a connection without hello is never shut by the fence.
#[derive(Debug)]
pub(crate) struct ConnectionGate {
    id: ConnectionId,
    state: Mutex<State>,
    shut: watch::Sender<bool>,
    /// The fence was confirmed: whatever ends from now on ends too late. Set apart from the rest, as a check on it.
    fenced: AtomicBool,
    drained: mpsc::UnboundedSender<ConnectionId>,
    pub(crate) life: Arc<LifeCounter>,
}

#[derive(Debug)]
struct State {
    shut: bool,
    /// Operations inside, and one for the connection itself until it is over.
    inside: usize,
    told: bool,
}

impl ConnectionGate {
    pub(crate) fn new(
        id: ConnectionId,
        life: Arc<LifeCounter>,
        drained: mpsc::UnboundedSender<ConnectionId>,
    ) -> Arc<Self> {
        let state = Mutex::new(State { shut: false, inside: 0, told: false });
        let shut = watch::Sender::new(false);
        Arc::new(Self { id, state, shut, fenced: AtomicBool::new(false), drained, life })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets one operation in, or nothing if the gate is shut.
    pub(crate) fn enter(self: &Arc<Self>) -> Option<Inside> {
        let mut state = self.lock();
        if state.shut {
            return None;
        }
        state.inside += 1;
        Some(Inside(Arc::clone(self)))
    }

    /// Lets nothing in any more. The fence hears of it when nothing is inside.
    pub(crate) fn shut(&self) {
        let mut state = self.lock();
        state.shut = true;
        self.shut.send_replace(true);
        self.tell(&mut state);
    }

    pub(crate) fn confirm_fence(&self) {
        self.fenced.store(true, Ordering::SeqCst);
    }

    /// Resolves once the gate is shut.
    pub(crate) async fn is_shut(&self) {
        // Cannot fail: the sender is in `self`.
        let _ = self.shut.subscribe().wait_for(|shut| *shut).await;
    }

    fn tell(&self, state: &mut State) {
        if state.shut && state.inside == 0 && !state.told {
            state.told = true;
            // The fence may be gone: then the server is ending.
            let _ = self.drained.send(self.id);
        }
    }
}

/// One operation inside a gate. It must be held until the device has done it.
#[derive(Debug)]
pub(crate) struct Inside(Arc<ConnectionGate>);

impl Inside {
    /// The device has carried out a write of some kind.
    pub(crate) fn count_write(&self) {
        LifeCounter::add(&self.0.life.writes_applied);
        if self.0.fenced.load(Ordering::SeqCst) {
            tracing::error!(target: "quorate_gnbd", "a write ended after its fence was confirmed");
            LifeCounter::add(&self.0.life.writes_after_fence);
        }
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.inside -= 1;
        self.0.tell(&mut state);
    }
}
