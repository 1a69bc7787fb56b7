//! Deadlocks on one node: looked for from the lock that waits, on the caller's thread or, with a clock, a while later.

use super::Spaces;
use super::space::Handle;
use crate::deliver::lock;
use crate::machine::deadlock::SUSPECT_AFTER;
use crate::machine::deadlock::graph::{Graph, WaitKey};
use crate::{Completion, LockId};
use core::time::Duration;
use quorate_membership::Identity;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

/// Deadlocks that nobody may end.
#[derive(Debug, Default)]
struct Undecided {
    /// As they were last seen.
    last: Vec<Vec<WaitKey>>,
    /// New ones that nobody has asked for yet.
    news: Vec<Vec<WaitKey>>,
}

/// The longest pause between two looks at a lock that waits on.
const PAUSE_MAX: Duration = Duration::from_secs(60);
/// The most undecided deadlocks that are kept for those who ask.
const NEWS_MAX: usize = 64;

/// The search of one lock table: one at a time, so that no cycle loses two of its waits.
#[derive(Debug, Default)]
pub(super) struct Search {
    one: Mutex<()>,
    undecided: Mutex<Undecided>,
}

impl Handle {
    /// A lock may have begun to wait. Without a clock deadlocks are looked for at once, otherwise when it has waited for a
    /// while, as between nodes; and again and again while it waits, ever more rarely.
    pub(super) fn look_for_deadlocks(&self, id: LockId) {
        if !self.space.may_close_a_cycle(id) {
            return;
        }
        let Some(runtime) = self.space.clock.runtime() else { return self.end_deadlocks(id) };
        let handle = self.clone();
        runtime.clone().spawn(Box::pin(async move {
            let mut pause = SUSPECT_AFTER;
            while handle.space.may_close_a_cycle(id) {
                runtime.sleep_until(runtime.now() + pause).await;
                handle.end_deadlocks(id);
                pause = (pause * 2).min(PAUSE_MAX);
            }
        }));
    }

    /// Refuses a victim in each cycle there is, if this lock waits still.
    fn end_deadlocks(&self, id: LockId) {
        if !self.space.may_close_a_cycle(id) {
            return;
        }
        let mut changed = Vec::new();
        {
            let _one = lock(&self.manager.search.one);
            // Other threads go on meanwhile: only what is there twice was there all the time.
            let (first, second) = (graph(&self.manager.spaces), graph(&self.manager.spaces));
            let (victims, undecided) = first.unchanged_in(&second).resolve();
            let mut known = lock(&self.manager.search.undecided);
            for cycle in undecided.iter().filter(|c| !known.last.contains(c)).cloned().collect::<Vec<_>>() {
                tracing::warn!(target: "quorate_dlm", ?cycle, "a deadlock that nobody lets itself be refused for");
                if known.news.len() < NEWS_MAX {
                    known.news.push(cycle);
                }
            }
            known.last = undecided;
            drop(known);
            let spaces: BTreeMap<u64, _> =
                lock(&self.manager.spaces).values().map(|s| (s.hash(), s.clone())).collect();
            for WaitKey { node, space, id, op } in victims {
                if let Some(space) = spaces.get(&space) {
                    space.withdraw(node, id, op, Completion::Deadlock);
                    changed.push((space.clone(), id));
                }
            }
        }
        for (space, id) in changed {
            space.deliver(id);
        }
    }
}

fn graph(spaces: &Spaces) -> Graph {
    let spaces: Vec<Arc<_>> = lock(spaces).values().cloned().collect();
    let (mut graph, mut waits) = (Graph::default(), Vec::new());
    for space in spaces {
        space.collect_waits(&mut waits);
    }
    waits.into_iter().for_each(|w| graph.add(w));
    graph
}

impl super::LocalManager {
    /// Deadlocks that were found since the last call and that nobody may end: every wait of them has NODLCKWT. The
    /// waiting locks of each, with the handle that has them.
    #[must_use]
    pub fn take_undecided(&self) -> Vec<Vec<(Identity, LockId)>> {
        let all = core::mem::take(&mut lock(&self.search.undecided).news);
        all.into_iter().map(|cycle| cycle.into_iter().map(|k| (k.node, k.id)).collect()).collect()
    }
}
