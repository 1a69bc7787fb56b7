//! Deadlines of recovery stages (R7): a participant that neither finishes nor says what it waits for is removed.

use super::member::Member;
use crate::{Epoch, Identity, Instant, ResourceId, ResourceKind, View};
use std::collections::{BTreeMap, BTreeSet};

/// Since when the leader waits: for whom, with which item, and for which attachments of its lockspace.
#[derive(Clone, Debug, Default)]
pub(super) struct Stages {
    since: BTreeMap<(Identity, ResourceId, Identity, Epoch), Instant>,
}

impl Stages {
    /// What no longer holds in the newest record is not waited for; a stage that restarts gets its time anew.
    pub(super) fn installed(&mut self, view: &View) {
        let waits: BTreeSet<_> = participants(view).collect();
        self.since.retain(|key, _| waits.contains(key));
    }
}

/// Whom each open stage waits for: every attached member that has not rebuilt; for a journal, the lowest of those that
/// have the filesystem mounted read-write.
fn participants(view: &View) -> impl Iterator<Item = (Identity, ResourceId, Identity, Epoch)> + '_ {
    let items = view.debts.iter().flat_map(|(who, d)| d.items.iter().map(move |(r, i)| (*who, r, i)));
    items.flat_map(|(debtor, resource, item)| {
        let epoch = view.lockspaces.get(&resource.name).copied().unwrap_or(Epoch(0));
        let who: Vec<Identity> = match resource.kind {
            ResourceKind::Lockspace if !item.rebuilt => view
                .attached(resource)
                .map(|a| a.owner)
                .filter(|owner| !item.rebuilt_by.contains_key(owner))
                .collect(),
            ResourceKind::Filesystem if item.fenced && item.rebuilt => {
                view.attached(resource).filter(|a| a.journal.is_some()).map(|a| a.owner).take(1).collect()
            }
            _ => Vec::new(),
        };
        who.into_iter().map(move |p| (debtor, resource.clone(), p, epoch))
    })
}

impl Member {
    /// Members over their deadline. One that waits for storage, a fence or quorum, and says so, gets its time anew.
    pub(super) fn late_participants(&mut self, tip: &View) -> BTreeSet<Identity> {
        let now = self.now;
        let waits: Vec<_> = participants(tip).collect();
        let mut late = BTreeSet::new();
        for key in waits {
            let who = key.2;
            let excused = if who == self.me.identity() {
                self.waits
            } else {
                let life = self.peers.lives.get(&who);
                life.and_then(|l| l.beat.as_ref()).is_none_or(|b| b.waits)
            };
            let since = self.stages.since.entry(key).or_insert(now);
            if excused {
                *since = now;
            }
            if *since + self.config.stage_deadline <= now {
                late.insert(who);
            }
        }
        late
    }
}
