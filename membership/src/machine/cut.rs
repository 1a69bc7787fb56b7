//! Multi-process cut detection: reports are counted per member against two watermarks, and all failures of one
//! incident become one cut (Rapid, USENIX ATC 2018, section 4.2). What differs from the paper is in `docs/deviations.md`.
//!
//! A member is *failed* when the deciding node itself finds it silent and at least H of its observing edges report it,
//! counted over observers that can be heard and are not failed themselves: an observer that went with the incident
//! has no say, which is the paper's implicit alert. It is *unstable* from L reports on, or while its silence is about
//! to be long enough. A cut waits until nobody is unstable, but no longer than [`HOLD_INTERVALS`] heartbeat intervals:
//! what stays between the watermarks is a broken mesh, and R3's matter.

use super::bug::bug;
use super::io::Event;
use super::member::Member;
use super::rings::{high_watermark, low_watermark};
use crate::evidence::{BrokenPair, Count, Evidence, Observation, Report, Why};
use crate::{Identity, Instant, NodeId, View};
use core::time::Duration;
use std::collections::{BTreeMap, BTreeSet};

/// So many heartbeat intervals a cut waits for unstable members: the last heartbeats of nodes that fail at one instant
/// are up to one interval apart, and their reports up to another.
const HOLD_INTERVALS: u32 = 2;

/// What this node makes of the reports.
#[derive(Clone, Debug, Default)]
pub(super) struct Cut {
    dirty: bool,
    /// Members that the next record will remove.
    failed: BTreeSet<Identity>,
    /// Members whose fate is open, and since when.
    unstable: BTreeMap<Identity, Instant>,
    counts: BTreeMap<Identity, Count>,
    /// Since when somebody is failed.
    since: Option<Instant>,
    /// When to judge again although nothing changed.
    again_at: Option<Instant>,
    /// Pairs of members without a path.
    pub(super) no_path: BTreeMap<(NodeId, NodeId), Broken>,
}

/// A pair without a path.
#[derive(Clone, Copy, Debug)]
pub(super) struct Broken {
    /// Since when.
    since: Instant,
    /// Whether something comes through, but too little.
    lossy: bool,
}

impl Cut {
    /// Something that the judgement depends on changed.
    pub(super) fn touch(&mut self) {
        self.dirty = true;
    }

    /// After a pause of this node everything is judged afresh.
    pub(super) fn forget(&mut self) {
        *self = Self { dirty: true, ..Self::default() };
    }
}

impl Member {
    /// Counts the reports, if anything changed.
    pub(super) fn judge_cut(&mut self) {
        if self.stopped.is_some() || !self.hears_everybody() {
            return;
        }
        let due = self.peers.cut.again_at.is_some_and(|at| at <= self.now);
        if !due && !core::mem::take(&mut self.peers.cut.dirty) {
            return;
        }
        self.peers.cut.dirty = false;
        let Some(tip) = self.tip.clone() else { return };
        self.judge_reports(&tip);
        self.note_paths(&tip);
    }

    fn judge_reports(&mut self, tip: &View) {
        let mut counts = BTreeMap::new();
        let mut failed = BTreeSet::new();
        // Whoever fails takes its reports and its silence about others with it, so this is repeated until it stands.
        loop {
            let before = failed.len();
            for (who, report) in self.peers.silent.clone() {
                if failed.contains(&who) {
                    continue;
                }
                let count = self.count(tip, who, &failed);
                let enough = count.observers == 0 || count.high <= count.reports;
                let alone = bug!(self, LeaderAlone) || report.why == Why::ProbeUnanswered;
                let fails = enough || alone;
                counts.insert(who, Count { failed: fails, ..count });
                if fails {
                    failed.insert(who);
                }
            }
            if failed.len() == before {
                break;
            }
        }
        let now = self.now;
        let mut unstable = BTreeMap::new();
        if !failed.is_empty() {
            let open = self.unstable(tip, &failed, &mut counts);
            let cut = &self.peers.cut;
            // A member with a broken path has been unstable for as long as that is known.
            let broken = |w: &Identity| {
                cut.no_path
                    .iter()
                    .filter(|((a, b), _)| *a == w.node || *b == w.node)
                    .map(|(_, p)| p.since)
                    .min()
            };
            let since = |w: &Identity| cut.unstable.get(w).copied().or_else(|| broken(w)).unwrap_or(now);
            unstable = open.into_iter().map(|w| (w, since(&w))).collect();
        }
        let hold = self.hold();
        let cut = &mut self.peers.cut;
        cut.since = if failed.is_empty() { None } else { cut.since.or(Some(now)) };
        cut.again_at = cut.since.map(|s| s + hold).filter(|at| now < *at);
        // What was unstable for long is not part of this incident.
        cut.unstable = unstable;
        cut.failed = failed;
        cut.counts = counts;
    }

    fn hold(&self) -> Duration {
        self.config.heartbeat_interval * HOLD_INTERVALS
    }

    /// Counts the reports about one member over its observing edges.
    fn count(&mut self, tip: &View, subject: Identity, failed: &BTreeSet<Identity>) -> Count {
        let edges = self.peers.watch.edges(subject.node);
        let (mut observers, mut reports) = (0_usize, 0_usize);
        for observer in edges.iter().filter_map(|n| tip.identity(*n)).filter(|o| !failed.contains(o)) {
            let says = if observer == self.me.identity() {
                Some(self.peers.silent.contains_key(&subject))
            } else {
                let life = self.peers.lives.get(&observer).filter(|_| self.is_live(observer));
                life.and_then(|l| l.beat.as_ref()).map(|b| b.reports.contains_key(&subject))
            };
            observers += usize::from(says.is_some());
            reports += usize::from(says == Some(true));
        }
        let limit = |n: usize| u16::try_from(n).unwrap_or(u16::MAX);
        Count {
            subject,
            observers: limit(observers),
            reports: limit(reports),
            low: limit(low_watermark(observers)),
            high: limit(high_watermark(observers)),
            failed: false,
        }
    }

    /// Members that may be part of the same incident: reported by L or more, or about to be found silent here.
    fn unstable(
        &mut self,
        tip: &View,
        failed: &BTreeSet<Identity>,
        counts: &mut BTreeMap<Identity, Count>,
    ) -> BTreeSet<Identity> {
        let soon = self.now + self.config.heartbeat_interval * 3 / 2;
        let mut open: BTreeSet<Identity> = BTreeSet::new();
        let mut reported: BTreeSet<Identity> = self.peers.silent.keys().copied().collect();
        for reporter in self.peers.reporters.iter().filter(|r| !failed.contains(r)) {
            let beat = self.peers.lives.get(reporter).and_then(|l| l.beat.as_ref());
            reported.extend(beat.into_iter().flat_map(|b| b.reports.keys().copied()));
        }
        for who in reported.into_iter().filter(|w| !failed.contains(w) && tip.contains(*w)) {
            let count = self.count(tip, who, failed);
            if count.low <= count.reports {
                open.insert(who);
                counts.insert(who, count);
            }
        }
        let me = self.me.identity();
        open.extend(
            tip.identities()
                .filter(|w| *w != me && !failed.contains(w) && !self.peers.silent.contains_key(w))
                .filter(|w| self.suspect_at(*w) <= soon),
        );
        open
    }

    /// The members to remove now: none while somebody is unstable who was not so for long.
    pub(super) fn failed(&mut self) -> BTreeSet<Identity> {
        self.judge_cut();
        let (now, hold) = (self.now, self.hold());
        let cut = &self.peers.cut;
        let Some(since) = cut.since else { return BTreeSet::new() };
        let open = cut.unstable.values().any(|at| now < *at + hold);
        if open && now < since + hold && !bug!(self, CutsAtOnce) {
            return BTreeSet::new();
        }
        cut.failed.clone()
    }

    /// Whether the reports suffice to take this member for failed.
    pub(super) fn is_failed(&self, who: Identity) -> bool {
        self.peers.cut.failed.contains(&who)
    }

    pub(super) fn next_judgement(&self) -> Option<Instant> {
        self.peers.cut.again_at
    }

    /// Pairs of members of which one reports the other, though neither failed: they have no direct path (R3).
    fn note_paths(&mut self, tip: &View) {
        let me = self.me.identity();
        let mut broken: BTreeMap<(NodeId, NodeId), bool> = BTreeMap::new();
        let own = self.peers.silent.iter().map(|(who, r)| (me, *who, r.why));
        let others = self.peers.reporters.iter().filter(|r| self.is_live(**r)).flat_map(|r| {
            let beat = self.peers.lives.get(r).and_then(|l| l.beat.as_ref());
            beat.into_iter()
                .flat_map(move |b| b.reports.iter().map(move |(who, report)| (*r, *who, report.why)))
        });
        for (a, b, why) in own.chain(others) {
            let inside = |w: Identity| tip.contains(w) && !self.is_failed(w);
            if a.node != b.node && inside(a) && inside(b) {
                let lossy = matches!(why, Why::Loss { .. });
                let pair = (a.node.min(b.node), a.node.max(b.node));
                broken.entry(pair).and_modify(|l| *l &= lossy).or_insert(lossy);
            }
        }
        let now = self.now;
        self.peers.cut.no_path.retain(|pair, _| broken.contains_key(pair));
        for (pair, lossy) in broken {
            match self.peers.cut.no_path.get_mut(&pair) {
                Some(known) => {
                    // A path that carries something again gets its time anew: the losses of the break still count.
                    if lossy && !known.lossy {
                        known.since = now;
                    }
                    known.lossy = lossy;
                }
                None => {
                    self.peers.cut.no_path.insert(pair, Broken { since: now, lossy });
                    self.event(Event::NoPath(pair.0, pair.1));
                }
            }
        }
    }

    /// Pairs of members without a direct path, and since when on this node's clock (R3). A voter, or a node of a small
    /// cluster, knows of all pairs, another node of its own. While a pair is listed, its sessions have to be relayed.
    #[must_use]
    pub fn broken_paths(&self) -> Vec<(NodeId, NodeId, Instant)> {
        if self.hears_everybody() {
            return self.peers.cut.no_path.iter().map(|((a, b), p)| (*a, *b, p.since)).collect();
        }
        let me = self.me.node;
        let pair = |who: &Identity| (me.min(who.node), me.max(who.node));
        let own = self.peers.silent.iter().map(|(who, r)| (pair(who), Instant(r.at_ns)));
        own.map(|((a, b), at)| (a, b, at)).collect()
    }

    /// Whom this node watches and finds silent at present.
    #[must_use]
    pub fn reports(&self) -> BTreeMap<Identity, Report> {
        self.peers.silent.clone()
    }

    /// Pairs that have been without a path for long enough, once no other pair is about to be (R3).
    pub(super) fn hopeless_pairs(&self) -> BTreeSet<(NodeId, NodeId)> {
        let (now, grace, hold) = (self.now, self.config.mesh_grace, self.hold());
        let ages = || self.peers.cut.no_path.values().map(|p| p.since);
        let Some(oldest) = ages().min() else { return BTreeSet::new() };
        let soon = ages().any(|at| now < at + grace && at + grace <= now + hold);
        if now < oldest + grace || (soon && now < oldest + grace + hold) {
            return BTreeSet::new();
        }
        self.peers.cut.no_path.iter().filter(|(_, p)| p.since + grace <= now).map(|(pair, _)| *pair).collect()
    }

    /// When the oldest broken pair is hopeless.
    pub(super) fn next_hopeless(&self) -> Option<Instant> {
        self.peers.cut.no_path.values().map(|p| p.since).min().map(|at| at + self.config.mesh_grace)
    }

    /// Evidence that this node proposes something now.
    pub(super) fn evidence(&self) -> Evidence {
        Evidence { by: Some(self.me.identity()), at_ns: self.now.0, ..Evidence::default() }
    }

    /// What was reported about `subjects`, and how it was counted.
    pub(super) fn evidence_of_cut(&mut self, tip: &View, subjects: &BTreeSet<Identity>) -> Evidence {
        let mut evidence = self.evidence();
        for subject in subjects {
            let own = self.peers.silent.get(subject).map(|r| (self.me.identity(), *r));
            let edges: BTreeSet<NodeId> = self.peers.watch.edges(subject.node).iter().copied().collect();
            let others = edges.iter().filter_map(|n| tip.identity(*n)).filter_map(|o| {
                let beat = self.peers.lives.get(&o).and_then(|l| l.beat.as_ref());
                beat.and_then(|b| b.reports.get(subject)).map(|r| (o, *r))
            });
            let all: BTreeMap<Identity, Report> = own.into_iter().chain(others).collect();
            let seen = all.into_iter();
            evidence.observations.extend(seen.map(|(observer, report)| Observation {
                observer,
                subject: *subject,
                report,
            }));
        }
        evidence.counts = self.peers.cut.counts.values().copied().collect();
        let held = self.peers.cut.since.map_or(Duration::ZERO, |s| self.now.since(s));
        evidence.held_ns = u64::try_from(held.as_nanos()).unwrap_or(u64::MAX);
        evidence.trim();
        evidence
    }

    /// The pairs that a removal for R3 mends.
    pub(super) fn evidence_of_pairs(&mut self, tip: &View, broken: &BTreeSet<(NodeId, NodeId)>) -> Evidence {
        let ends: BTreeSet<Identity> =
            broken.iter().flat_map(|(a, b)| [*a, *b]).filter_map(|n| tip.identity(n)).collect();
        let mut evidence = self.evidence_of_cut(tip, &ends);
        let now = self.now;
        evidence.pairs = broken
            .iter()
            .map(|(a, b)| {
                let since = self.peers.cut.no_path.get(&(*a, *b)).map_or(now, |p| p.since);
                let for_ns = u64::try_from(now.since(since).as_nanos()).unwrap_or(u64::MAX);
                BrokenPair { a: *a, b: *b, for_ns }
            })
            .collect();
        evidence.trim();
        evidence
    }
}
