//! The thread that makes the machine's promises durable. Heartbeats never wait for it.

use super::boottime;
use super::state::StateDir;
use crate::machine::{Record, Token};
use crate::{Incarnation, StateId};
use std::sync::mpsc::{Receiver, Sender};
use std::time::Duration;
use tokio::sync::mpsc::UnboundedSender;

/// How long a write that nothing waits for may wait for another one.
const LAZY_DELAY: Duration = Duration::from_millis(200);
/// How many records go into one fsync.
const BATCH_MAX: usize = 256;

/// What the control loop asks for.
pub(super) enum Order {
    Append { token: Token, record: Record, lazy: bool },
    Renounce { state: StateId, known: Incarnation },
}

/// What it gets.
pub(super) enum Done {
    Persisted(Token),
    Failed,
}

struct EndsWith<'a>(&'a UnboundedSender<Done>);

impl Drop for EndsWith<'_> {
    fn drop(&mut self) {
        drop(self.0.send(Done::Failed));
    }
}

/// Carries out orders until their sender is dropped, or the disk fails. The directory's lock ends with it.
pub(super) fn run(mut dir: StateDir, orders: &Receiver<Order>, done: &UnboundedSender<Done>) {
    // However this thread ends, the machine hears of it; a control loop that ended before does not care.
    let _ends = EndsWith(done);
    while let Ok(first) = orders.recv() {
        let mut records = Vec::new();
        let mut newest = None;
        let mut next = Some(first);
        let mut urgent = false;
        let until = boottime() + LAZY_DELAY;
        while let Some(order) = next.take() {
            match order {
                Order::Append { token, record, lazy } => {
                    records.push(record);
                    newest = Some(token);
                    urgent |= !lazy;
                }
                Order::Renounce { state, known } => {
                    if let Err(error) = dir.renounce(state, known) {
                        tracing::error!(target: "quorate_membership", %error, "the old state cannot be renounced");
                    }
                    urgent = true;
                }
            }
            if records.len() < BATCH_MAX {
                next = if urgent {
                    orders.try_recv().ok()
                } else {
                    orders.recv_timeout(until.since(boottime())).ok()
                };
            }
        }
        let Some(token) = newest else { continue };
        if let Err(error) = dir.append(records) {
            tracing::error!(target: "quorate_membership", %error, "the state cannot be made durable: the node stops");
            return;
        }
        drop(done.send(Done::Persisted(token)));
    }
}

/// The way to the thread.
pub(super) type Orders = Sender<Order>;
