//! Who may come back: a node that was removed for its bad paths returns only with good ones, and one that is removed
//! again and again waits longer each time, so that nothing flaps (R3).

use super::bug::bug;
use super::member::Member;
use crate::evidence::Why;
use crate::{Cause, Epoch, Evidence, Identity, Instant, NodeId, View};
use core::time::Duration;
use std::collections::{BTreeMap, BTreeSet};

/// Removals longer ago than this many detection times are forgotten.
const FORGET_DETECTIONS: u32 = 75;
/// So many removals within that time cost nothing: a node that crashes and restarts comes back at once.
const FREE_REMOVALS: u32 = 2;
/// The wait doubles with each further removal, from one detection time on, so many times.
const DOUBLINGS_MAX: u32 = 4;

/// So many of the newest records are looked through after a start.
const RECORDS_AT_START: u64 = 64;

/// What a node was removed for lately. Every process counts it from the records it installs, so that any leader knows.
#[derive(Clone, Copy, Debug)]
struct Removal {
    count: u32,
    last: Instant,
    /// For paths that do not carry: it must show that they do, for as long as it took to remove it.
    paths: bool,
}

/// Recent removals, and how outsiders are heard.
#[derive(Clone, Debug, Default)]
pub(super) struct Readmit {
    removed: BTreeMap<NodeId, Removal>,
    /// Since when an outsider and all members hear each other without a break.
    whole_since: BTreeMap<Identity, Instant>,
}

impl Member {
    /// Counts removals of a new record.
    pub(super) fn readmit_installed(&mut self, tip: &View) {
        self.count_removals(&tip.cause, &tip.evidence, 1);
    }

    /// After a start: what the last kept records removed for bad paths may have been removed just now.
    pub(super) fn readmit_started(&mut self) {
        let from = Epoch(self.epoch().0.saturating_sub(RECORDS_AT_START));
        let removals: Vec<(Cause, Evidence)> = self
            .disk
            .chain
            .steps_from(from)
            .map(|s| (s.delta.cause().clone(), s.delta.evidence().clone()))
            .collect();
        for (cause, evidence) in removals {
            self.count_removals(&cause, &evidence, 0);
        }
    }

    fn count_removals(&mut self, cause: &Cause, evidence: &Evidence, times: u32) {
        let (now, forget) = (self.now, self.config.detection * FORGET_DETECTIONS);
        let (lives, mesh) = match cause {
            Cause::Failed(lives) => (lives, false),
            Cause::NoMesh(lives) => (lives, true),
            _ => return,
        };
        self.peers.readmit.removed.retain(|_, r| now < r.last + forget);
        let lossy: BTreeSet<Identity> = evidence
            .observations
            .iter()
            .filter(|o| matches!(o.report.why, Why::Loss { .. }))
            .map(|o| o.subject)
            .collect();
        for who in lives {
            let removal = self.peers.readmit.removed.entry(who.node).or_insert(Removal {
                count: 0,
                last: now,
                paths: false,
            });
            removal.count += times;
            removal.last = now;
            removal.paths = mesh || lossy.contains(who);
        }
    }

    /// Notes which outsiders have a full mesh at present.
    pub(super) fn note_whole(&mut self, whole: &[Identity]) {
        let now = self.now;
        self.peers.readmit.whole_since.retain(|who, _| whole.contains(who));
        for who in whole {
            self.peers.readmit.whole_since.entry(*who).or_insert(now);
        }
    }

    /// Whether a node that was removed lately has waited, and shown, enough.
    pub(super) fn may_return(&self, who: Identity) -> bool {
        let Some(removal) = self.peers.readmit.removed.get(&who.node) else { return true };
        if bug!(self, ReadmitsAtOnce)
            || self.config.detection * FORGET_DETECTIONS <= self.now.since(removal.last)
        {
            return true;
        }
        let waited = removal.last + self.backoff(removal.count) <= self.now;
        // What it showed counts from its removal: a new life may have been heard while the old one was a member still.
        let since = self.peers.readmit.whole_since.get(&who).map(|s| (*s).max(removal.last));
        let grace = self.config.mesh_grace;
        let is_heard_well = who == self.me.identity() || self.is_heard_well(who);
        let shown = !removal.paths || (is_heard_well && since.is_some_and(|s| s + grace <= self.now));
        waited && shown
    }

    fn backoff(&self, removals: u32) -> Duration {
        match removals.checked_sub(FREE_REMOVALS + 1) {
            None => Duration::ZERO,
            Some(further) => self.config.detection * 2_u32.pow(further.min(DOUBLINGS_MAX)),
        }
    }
}
