//! The search for deadlocks over all resources, lockspaces and nodes (R16).
//!
//! ```text
//!  a master: a wait is old, something changed ──Suspect──▶ the searching node (the lowest member)
//!  it asks every member what waits there: walk 1 ── a cycle? ── walk 2 ── the same waits and locks, unchanged?
//!  then the cycle was real when walk 1 ended: its victim is refused (Deadlock), the others go on
//! ```
//! A wait is known by an operation number and a lock in the way by the number of its grant; neither comes again. So what
//! is seen in both walks held all the time in between, and all of it at one moment: no deadlock is made up. A deadlock
//! ends only when somebody is refused, cancelled or timed out, so walking twice misses none.
//!
//! Old dlm_controld built the whole graph on every node from a dump; VMS and Chandy, Misra and Haas (1983) chase edges
//! from node to node. One node that asks needs two messages to each member however many edges there are, and serialises
//! the choice of victims, so that two searches never refuse two waits for one cycle.

pub(crate) mod graph;
pub(crate) mod wire;

use crate::bug::Bug;
use core::time::Duration;
use graph::{Graph, Wait, WaitKey};
use quorate_membership::{Epoch, Identity, Instant, ResourceKind, View};
use std::collections::{BTreeMap, BTreeSet};
pub(crate) use wire::SearchMessage;

/// How old a wait is when its master suspects a deadlock.
///
/// With one pause between searches and four messages it bounds the time to find one: well below a second.
pub(crate) const SUSPECT_AFTER: Duration = Duration::from_millis(250);
/// The pause between the beginnings of two searches.
const SEARCH_PERIOD: Duration = Duration::from_millis(125);
/// How long one walk waits for a member's answer. What is not seen is not there: a deadlock is found the next time.
const WALK_MAX: Duration = Duration::from_millis(300);
/// A victim that is still there after this long is told again.
const REFUSE_AGAIN: Duration = Duration::from_millis(500);

/// What comes from outside.
#[derive(Debug)]
pub(crate) enum SearchInput {
    /// From membership: who there is.
    View { epoch: Epoch, members: BTreeSet<Identity> },
    /// From a shard of this node: somebody has waited long.
    Suspect,
    /// From a session.
    Message { from: Identity, message: SearchMessage },
    /// The answer to [`SearchOutput::Collect`] for this node itself.
    Collected { round: u64, waits: Vec<Wait> },
    /// The deadline is over; harmless at other times.
    Tick,
}

/// What the driver must do, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum SearchOutput {
    /// Send it on the session to `to`.
    Send { to: Identity, message: SearchMessage },
    /// Ask all shards of this node what waits, and send it to `to` in pieces, or feed it if `to` is this node.
    Collect { to: Identity, round: u64 },
    /// Withdraw this operation of this node as the victim of a deadlock.
    Refuse { key: WaitKey },
    /// A deadlock in which every wait has NODLCKWT: everybody waits on. To be shown.
    Undecided { cycle: Vec<WaitKey> },
}

impl SearchInput {
    /// What `view` says: whoever is in a lockspace takes part.
    pub(crate) fn of(view: &View) -> Self {
        let attached = view.attachments.iter().filter(|a| a.resource.kind == ResourceKind::Lockspace);
        Self::View { epoch: view.epoch, members: attached.map(|a| a.owner).collect() }
    }
}

#[derive(Debug)]
struct Walk {
    round: u64,
    missing: BTreeSet<Identity>,
    seen: Graph,
    until: Instant,
    /// What the first walk saw; `None`: this is the first.
    first: Option<Graph>,
}

/// The search on one node.
#[derive(Debug)]
pub(crate) struct Search {
    me: Identity,
    bug: Option<Bug>,
    members: BTreeSet<Identity>,
    round: u64,
    walk: Option<Walk>,
    /// A search is wanted.
    is_due: bool,
    not_before: Instant,
    /// Victims that were told, and when.
    refused: BTreeMap<WaitKey, Instant>,
    /// Deadlocks that were told of and that nobody may end.
    undecided: BTreeSet<Vec<WaitKey>>,
    /// Only for a deliberate mistake.
    earlier: Graph,
}

impl Search {
    pub(crate) fn new(me: Identity, bug: Option<Bug>) -> Self {
        Self {
            me,
            bug,
            members: BTreeSet::new(),
            round: 0,
            walk: None,
            is_due: false,
            not_before: Instant::default(),
            refused: BTreeMap::new(),
            undecided: BTreeSet::new(),
            earlier: Graph::default(),
        }
    }

    /// The only way in. All effects are in `out` when it returns.
    pub(crate) fn handle(&mut self, now: Instant, input: SearchInput, out: &mut Vec<SearchOutput>) {
        match input {
            SearchInput::View { epoch, members } => {
                // Rounds of different views, and of different searching nodes, are never taken for each other.
                self.round = self.round.max(epoch.0 << 20);
                self.is_due |= self.walk.take().is_some();
                self.members = members;
            }
            SearchInput::Suspect => match self.searcher() {
                Some(searcher) if searcher == self.me => self.is_due = true,
                Some(to) => out.push(SearchOutput::Send { to, message: SearchMessage::Suspect }),
                None => {}
            },
            SearchInput::Message { from, message } => self.on_message(now, from, message, out),
            SearchInput::Collected { round, waits } => self.on_waits(now, self.me, round, waits, true, out),
            SearchInput::Tick => {}
        }
        self.advance(now, out);
    }

    /// When [`SearchInput::Tick`] is due.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        match &self.walk {
            Some(walk) => Some(walk.until),
            None => self.is_due.then_some(self.not_before),
        }
    }

    fn searcher(&self) -> Option<Identity> {
        self.members.first().copied()
    }

    fn on_message(
        &mut self,
        now: Instant,
        from: Identity,
        message: SearchMessage,
        out: &mut Vec<SearchOutput>,
    ) {
        if !self.members.contains(&from) {
            return;
        }
        match message {
            // A sender that does not know yet that another searches now suspects again with its next view.
            SearchMessage::Suspect => self.is_due |= self.searcher() == Some(self.me),
            SearchMessage::Ask { round } => out.push(SearchOutput::Collect { to: from, round }),
            SearchMessage::Waits { round, waits, last } => self.on_waits(now, from, round, waits, last, out),
            SearchMessage::Refuse { key } if key.node == self.me => out.push(SearchOutput::Refuse { key }),
            SearchMessage::Refuse { .. } => {}
        }
    }

    fn on_waits(
        &mut self,
        now: Instant,
        from: Identity,
        round: u64,
        waits: Vec<Wait>,
        last: bool,
        out: &mut Vec<SearchOutput>,
    ) {
        let Some(walk) = self.walk.as_mut().filter(|w| w.round == round && w.missing.contains(&from)) else {
            return;
        };
        waits.into_iter().for_each(|w| walk.seen.add(w));
        if last {
            walk.missing.remove(&from);
        }
        if walk.missing.is_empty() {
            self.end_walk(now, out);
        }
    }

    fn advance(&mut self, now: Instant, out: &mut Vec<SearchOutput>) {
        if self.walk.as_ref().is_some_and(|w| w.until <= now) {
            // Somebody did not answer in time: with what there is, and once more later.
            self.is_due = true;
            self.end_walk(now, out);
        }
        if self.searcher() != Some(self.me) {
            (self.is_due, self.walk) = (false, None);
        } else if self.is_due && self.walk.is_none() && self.not_before <= now {
            self.is_due = false;
            self.not_before = now + SEARCH_PERIOD;
            self.begin_walk(now, None, out);
        }
    }

    fn begin_walk(&mut self, now: Instant, first: Option<Graph>, out: &mut Vec<SearchOutput>) {
        self.round += 1;
        let round = self.round;
        let missing = self.members.clone();
        for to in &missing {
            out.push(if *to == self.me {
                SearchOutput::Collect { to: self.me, round }
            } else {
                SearchOutput::Send { to: *to, message: SearchMessage::Ask { round } }
            });
        }
        self.walk = Some(Walk { round, missing, seen: Graph::default(), until: now + WALK_MAX, first });
    }

    fn end_walk(&mut self, now: Instant, out: &mut Vec<SearchOutput>) {
        let Some(mut walk) = self.walk.take() else { return };
        // Who was refused and does not wait any more has heard; who does may not have.
        self.refused.retain(|key, at| walk.seen.has(key) && now.since(*at) < REFUSE_AGAIN);
        for key in self.refused.keys() {
            walk.seen.forget(*key);
        }
        let walks_once = cfg!(any(test, feature = "sim")) && self.bug == Some(Bug::WalkOnce);
        if walks_once {
            walk.seen.add_all(&self.earlier);
            self.earlier = walk.seen.clone();
        }
        let is_second = walk.first.is_some() || walks_once;
        let sure = match &walk.first {
            Some(first) => first.unchanged_in(&walk.seen),
            None => walk.seen,
        };
        if sure.cycle().is_none() {
            return;
        }
        if !is_second {
            return self.begin_walk(now, Some(sure), out);
        }
        let (victims, undecided) = sure.resolve();
        for key in victims {
            self.refused.insert(key, now);
            out.push(if key.node == self.me {
                SearchOutput::Refuse { key }
            } else {
                SearchOutput::Send { to: key.node, message: SearchMessage::Refuse { key } }
            });
        }
        let news = undecided.iter().filter(|c| !self.undecided.contains(*c)).cloned();
        out.extend(news.map(|cycle| SearchOutput::Undecided { cycle }));
        self.undecided = undecided.into_iter().collect();
    }
}
