//! Messages on their way out: in order per peer, also when a peer's queue is full for a while.

use crate::deliver::lock;
use core::time::Duration;
use quorate_membership::{Identity, Runtime, SendError, ServiceId, Sessions};
use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

/// How long to wait before a full peer is tried again.
const RETRY: Duration = Duration::from_millis(1);

pub(super) struct Outgoing {
    sessions: Arc<dyn Sessions>,
    runtime: Arc<dyn Runtime>,
    /// Whether [`Self::kept`] has anything; read without the lock.
    has_kept: AtomicBool,
    kept: Mutex<BTreeMap<Identity, VecDeque<Vec<u8>>>>,
}

impl Outgoing {
    pub(super) fn new(sessions: Arc<dyn Sessions>, runtime: Arc<dyn Runtime>) -> Self {
        Self { sessions, runtime, has_kept: AtomicBool::new(false), kept: Mutex::default() }
    }

    /// Sends, or keeps for later behind what is kept already. Callers of one shard come one at a time.
    pub(super) fn send(self: &Arc<Self>, to: Identity, bytes: Vec<u8>) {
        if !self.has_kept.load(Ordering::Acquire) {
            match self.sessions.send(to, ServiceId::DLM, bytes.clone()) {
                Err(SendError::Full(_)) => {}
                Err(SendError::TooLarge { size, limit }) => {
                    // Messages are cut in pieces far below any limit of the sessions.
                    tracing::error!(target: "quorate_dlm", node = %to, size, limit, "a message is too large");
                    return;
                }
                // A peer that is gone learns nothing more; the next view says what follows from that.
                Ok(()) | Err(_) => return,
            }
        }
        let mut kept = lock(&self.kept);
        kept.entry(to).or_default().push_back(bytes);
        if !self.has_kept.swap(true, Ordering::AcqRel) {
            let this = self.clone();
            self.runtime.spawn(Box::pin(this.retry()));
        }
    }

    async fn retry(self: Arc<Self>) {
        loop {
            self.runtime.sleep_until(self.runtime.now() + RETRY).await;
            let mut kept = lock(&self.kept);
            kept.retain(|to, queue| {
                while let Some(first) = queue.front() {
                    match self.sessions.send(*to, ServiceId::DLM, first.clone()) {
                        Err(SendError::Full(_)) => return true,
                        _ => {
                            queue.pop_front();
                        }
                    }
                }
                false
            });
            if kept.is_empty() {
                // Under the guard, so that nothing is put behind our back.
                self.has_kept.store(false, Ordering::Release);
                return;
            }
        }
    }
}
