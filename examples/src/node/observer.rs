//! Turns views into events: what changed, and what the node's program has to start because of it.

use crate::events::Events;
use quorate_fencing::HistoryRecord;
use quorate_fencing::driver::HistorySink;
use quorate_membership::{Identity, ResourceId, View, ViewListener};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::watch;

/// Listens to the membership: writes events, and publishes the newest view for everything that waits for one.
#[derive(Debug)]
pub(crate) struct Observer {
    events: Events,
    last: Mutex<Option<Arc<View>>>,
    views: watch::Sender<Option<Arc<View>>>,
    stopped: watch::Sender<Option<String>>,
}

impl Observer {
    pub(crate) fn new(events: Events) -> Arc<Self> {
        Arc::new(Self {
            events,
            last: Mutex::new(None),
            views: watch::Sender::new(None),
            stopped: watch::Sender::new(None),
        })
    }

    /// Changes with every view.
    pub(crate) fn views(&self) -> watch::Receiver<Option<Arc<View>>> {
        self.views.subscribe()
    }

    /// Gets the reason when this life is over.
    pub(crate) fn stopped(&self) -> watch::Receiver<Option<String>> {
        self.stopped.subscribe()
    }
}

/// How far each item of each debt is: fenced, rebuilt.
fn stages(view: &View) -> BTreeMap<(Identity, &ResourceId), (bool, bool)> {
    view.debts
        .iter()
        .flat_map(|(who, debt)| {
            debt.items.iter().map(|(resource, i)| ((*who, resource), (i.fenced, i.rebuilt)))
        })
        .collect()
}

impl ViewListener for Observer {
    fn on_view(&self, view: &Arc<View>) {
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner).replace(Arc::clone(view));
        self.events.emit(
            "view",
            json!({
                "epoch": view.epoch.0,
                "members": view.members.keys().map(|n| n.0).collect::<Vec<_>>(),
                "debts": view.debts.keys().map(ToString::to_string).collect::<Vec<_>>(),
            }),
        );
        if let Some(last) = &last {
            let now = stages(view);
            for ((who, resource), (fenced, rebuilt)) in stages(last) {
                let reached = match now.get(&(who, resource)) {
                    Some((true, _)) if !fenced => Some("fenced"),
                    Some((_, true)) if !rebuilt => Some("rebuilt"),
                    Some(_) => None,
                    None => Some("closed"),
                };
                if let Some(stage) = reached {
                    let details = json!({
                        "debtor": who.to_string(), "resource": resource.to_string(), "stage": stage,
                    });
                    self.events.emit("stage", details);
                }
            }
        }
        self.views.send_replace(Some(Arc::clone(view)));
    }

    fn on_quorum(&self, quorate: bool) {
        self.events.emit("quorum", json!({ "quorate": quorate }));
    }

    fn on_stop(&self, reason: &str) {
        self.events.emit("stopped", json!({ "reason": reason }));
        self.stopped.send_replace(Some(reason.to_owned()));
    }
}

/// Writes what is done against removed lives into the node's events: they outlive the node's own history.
#[derive(Debug)]
pub(crate) struct FenceSink(pub(crate) Events);

impl HistorySink for FenceSink {
    fn record(&self, record: &HistoryRecord) {
        self.0.emit("fencing", fence_row(record));
    }
}

/// One record of the history of fences for programs.
pub(crate) fn fence_row(r: &HistoryRecord) -> Value {
    json!({
        "unix_ms": r.unix_ms, "victim": r.victim.to_string(), "by": r.by.map(|b| b.to_string()),
        "how": r.how.to_string(), "failure": r.result.as_ref().err(),
        "after_ms": u64::try_from(r.after.as_millis()).unwrap_or(u64::MAX),
    })
}
