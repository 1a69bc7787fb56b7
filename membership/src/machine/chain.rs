//! Learning: decisions arrive singly or as a chain, are checked, stored and installed in order (R4).

use super::bug::bug;
use super::change;
use super::durable::Record;
use super::io::{Event, Output, StopReason};
use super::member::Member;
use super::wire::{CHAIN_BYTES_MAX, ControlMsg};
use super::writes::Then;
use crate::delta::Step;
use crate::proof::{ChainError, Decision, verify_chain};
use crate::{Cause, Epoch, Identity, NodeId, View};
use std::sync::Arc;

impl Member {
    /// Asks whoever is known to have a newer record.
    pub(super) fn catch_up(&mut self) {
        if self.stopped.is_some() || self.now < self.fetch_at {
            return;
        }
        if let Some(node) = self.newest_ahead() {
            self.fetch_from(node);
        }
    }

    /// Whoever is heard and has the newest of the records that are missing here.
    fn newest_ahead(&self) -> Option<NodeId> {
        let ahead = self.peers.ahead.iter().filter_map(|id| self.live_life(id.node));
        ahead.filter(|(_, l)| self.epoch() < l.epoch).max_by_key(|(_, l)| l.epoch).map(|(id, _)| id.node)
    }

    pub(super) fn is_behind(&self) -> bool {
        self.newest_ahead().is_some()
    }

    pub(super) fn fetch_from(&mut self, node: NodeId) {
        if node == self.me.node || self.now < self.fetch_at {
            return;
        }
        self.fetch_at = self.now + self.config.retry_interval;
        let from = self.epoch().next();
        self.send(node, ControlMsg::Fetch { from });
    }

    /// Sends what is kept from `from` on, as much as one message takes.
    pub(super) fn on_fetch(&mut self, to: NodeId, from: Epoch) {
        if to == self.me.node {
            return;
        }
        let chain = &self.disk.chain;
        if chain.epoch() < from {
            return;
        }
        let size = |step: &Step| {
            let size = postcard::serialize_with_flavor(step, postcard::ser_flavors::Size::default());
            size.unwrap_or(CHAIN_BYTES_MAX)
        };
        // Who has the record before gets differences only; others a beginning.
        let (whole, first) = if chain.oldest() < from {
            (None, from)
        } else {
            (chain.beginning().map(Box::new), chain.oldest().next())
        };
        let mut bytes = 0_usize;
        let fits = |step: &&Step| {
            let first = bytes == 0;
            bytes += size(step);
            first || bytes <= CHAIN_BYTES_MAX
        };
        let steps: Vec<Step> = chain.steps_from(first).take_while(fits).cloned().collect();
        self.send(to, ControlMsg::Chain { whole, steps });
    }

    /// One decision, most likely the next one.
    pub(super) fn on_learn(&mut self, from: NodeId, step: Step) {
        let next = self.epoch().next();
        if next < step.epoch() && step.delta.cluster() == self.disk.cluster {
            self.fetch_from(from);
        } else if let Some(decision) = self.tip.as_ref().and_then(|tip| step.apply(tip)) {
            self.take_decision(from, decision, false);
            self.judge_newcomer();
        }
    }

    /// All decisions that the sender has from what was asked for on, or as many as one message takes.
    pub(super) fn on_chain(&mut self, from: NodeId, whole: Option<Decision>, steps: Vec<Step>) {
        // The beginning may be older than the newest record here; then it is followed until the two meet.
        let mut old = None;
        if let Some(decision) = whole {
            if self.epoch() < decision.view.epoch {
                self.take_decision(from, decision, true);
            } else {
                old = Some(decision.view);
            }
        }
        let skipped = if bug!(self, InstallsWithGaps) { steps.len().saturating_sub(1) } else { 0 };
        let mut gap = self.tip.as_ref().map(|t| View::clone(t)).filter(|_| 0 < skipped);
        for (n, step) in steps.into_iter().enumerate() {
            if self.stopped.is_some() {
                return;
            }
            if let Some(view) = &mut gap {
                if step.delta.apply_to(view) && skipped <= n {
                    self.install(Decision { view: view.clone(), accepts: step.accepts }, false);
                }
            } else if let Some(decision) = self.tip.as_ref().and_then(|tip| step.apply(tip)) {
                self.take_decision(from, decision, true);
            } else if let Some(view) = &mut old {
                step.delta.apply_to(view);
            }
        }
        self.judge_newcomer();
        // There may be more where that came from.
        self.fetch_at = self.now;
        self.catch_up();
    }

    /// Takes a decision in. `whole` says that the sender has none between this node's newest and this one.
    fn take_decision(&mut self, from: NodeId, decision: Decision, whole: bool) {
        let epoch = decision.view.epoch;
        if self.stopped.is_some()
            || epoch <= self.epoch()
            || decision.view.cluster != self.disk.cluster
            || change::fault(&decision.view).is_some()
        {
            return;
        }
        if !self.config.speaks.speaks(decision.view.version) {
            let (cluster, program) = (decision.view.version, self.config.speaks);
            self.stop(StopReason::Version { cluster, epoch, program });
            return;
        }
        if epoch != self.epoch().next() {
            if !whole {
                self.fetch_from(from);
            } else if self.is_member() {
                // Asked from the next one on, the sender answered with later ones: it dropped what is missing.
                // (An answer to an older question begins earlier, never later.)
                let have = self.epoch();
                self.stop(StopReason::TooFarBehind { have, oldest: epoch });
            } else {
                // A process that is no member yet takes the oldest record that is kept as its beginning.
                self.install(decision, true);
            }
            return;
        }
        if let Some(tip) = &self.tip {
            let chain = core::slice::from_ref(&decision);
            match verify_chain(self.disk.cluster, tip.epoch, &tip.voters, chain) {
                Err(ChainError::Forced { .. }) if self.believes_forced(&decision) => (),
                Err(ChainError::Forced { epoch }) => {
                    self.event(Event::ForcedElsewhere { from, epoch });
                    return;
                }
                Err(_) if !self.proof_is_beyond_us() => return,
                _ => (),
            }
        }
        self.install(decision, false);
    }

    /// Deliberate mistakes decide without a majority or with gaps; their records must spread to be caught.
    fn proof_is_beyond_us(&self) -> bool {
        bug!(self, MajorityOfTheLiving)
            || bug!(self, InstallsWithGaps)
            || bug!(self, TieBreaksBothSides)
            || bug!(self, LowersWithoutQuorum)
            || bug!(self, ForcesInSilence)
    }

    /// Makes `decision` the newest record.
    pub(super) fn install(&mut self, decision: Decision, jumped: bool) {
        let before = self.tip.clone();
        let view = Arc::new(decision.view.clone());
        assert_eq!(change::fault(&view), None, "a record that must not be installed");
        let was_in = self.is_member();
        let record = match before.as_ref().filter(|b| !jumped && b.epoch.next() == view.epoch) {
            Some(before) => Record::Step(Box::new(Step::between(before, &decision))),
            None => Record::Decided(Box::new(decision.clone())),
        };
        let token = self.write(record, true);
        let view = self.disk.chain.tip().cloned().unwrap_or(view);
        self.after(token, Then::Stored(view.epoch));
        self.tip = Some(Arc::clone(&view));
        if jumped || before.as_ref().is_none_or(|b| b.voters != view.voters) {
            self.voters_changed(view.epoch);
        }
        let removed: Vec<Identity> =
            before.iter().flat_map(|b| b.identities()).filter(|w| !view.contains(*w)).collect();
        self.note_removed(removed.into_iter(), &decision);
        self.note_old_debts();
        self.peers_installed();
        self.note_meant();
        self.out.push(Output::Installed { view: Arc::clone(&view), jumped });
        self.proposer.installed(view.epoch);
        self.requests_installed();
        self.stages.installed(&view);
        if was_in && !self.is_in(&view) {
            let left = matches!(view.cause, Cause::Request { by, .. } if by == self.me.identity());
            let epoch = view.epoch;
            self.stop(if left { StopReason::Left { epoch } } else { StopReason::Removed { epoch } });
        }
    }

    /// Whether a process that never was a member may go on under the newest record: not if the cluster has seen its
    /// life, or a newer one, in another process. That is known for certain only at the end of what was learnt at once.
    pub(super) fn judge_newcomer(&mut self) {
        let Some(tip) = self.tip.clone().filter(|v| !self.is_in(v)) else { return };
        if let Some(known) = tip.lives.get(&self.me.node).copied()
            && self.me.incarnation <= known
            && !self.is_recorded_witness(&tip)
            && !bug!(self, AdmitsOldLives)
        {
            self.stop(StopReason::RolledBack { known });
        }
    }
}
