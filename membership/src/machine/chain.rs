//! Learning: decisions arrive singly or as a chain, are checked, stored and installed in order (R4).

use super::bug::bug;
use super::change;
use super::durable::{Durable, Record};
use super::io::{Event, Output, StopReason};
use super::member::Member;
use super::wire::{CHAIN_BYTES_MAX, ControlMsg};
use super::writes::Then;
use crate::proof::{ChainError, Decision, verify_chain};
use crate::{Cause, Epoch, Identity, NodeId};
use std::sync::Arc;

/// The epoch that brought the present voter set, as far as the kept chain tells; its first one otherwise.
pub(super) fn voters_epoch(durable: &Durable) -> Epoch {
    let Some(last) = durable.chain.back() else { return Epoch(0) };
    let same = durable.chain.iter().rev().take_while(|d| d.view.voters == last.view.voters);
    same.last().map_or(Epoch(0), |d| d.view.epoch)
}

impl Member {
    /// Asks whoever is known to have a newer record.
    pub(super) fn catch_up(&mut self) {
        if self.stopped.is_some() || self.now < self.fetch_at {
            return;
        }
        let mine = self.epoch();
        let ahead = self.live_lives().filter(|(_, l)| mine < l.epoch).max_by_key(|(_, l)| l.epoch);
        if let Some(node) = ahead.map(|(id, _)| id.node) {
            self.fetch_from(node);
        }
    }

    pub(super) fn is_behind(&self) -> bool {
        let mine = self.epoch();
        self.live_lives().any(|(_, l)| mine < l.epoch)
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
        let mut chain = Vec::new();
        let mut bytes = 0_usize;
        for decision in self.disk.chain.iter().filter(|d| from <= d.view.epoch) {
            let size = postcard::serialize_with_flavor(decision, postcard::ser_flavors::Size::default());
            bytes += size.unwrap_or(CHAIN_BYTES_MAX);
            if !chain.is_empty() && CHAIN_BYTES_MAX < bytes {
                break;
            }
            chain.push(decision.clone());
        }
        if !chain.is_empty() {
            self.send(to, ControlMsg::Chain(chain));
        }
    }

    /// Takes decisions in. `whole` says that they are all the sender has from what was asked for on.
    pub(super) fn on_decisions(&mut self, from: NodeId, decisions: Vec<Decision>, whole: bool) {
        let more = self.take_decisions(from, decisions, whole);
        self.judge_newcomer();
        if more && whole {
            // There may be more where that came from.
            self.fetch_at = self.now;
            self.catch_up();
        }
    }

    fn take_decisions(&mut self, from: NodeId, decisions: Vec<Decision>, whole: bool) -> bool {
        let mut more = false;
        for decision in decisions {
            if self.stopped.is_some() {
                return more;
            }
            let epoch = decision.view.epoch;
            if epoch <= self.epoch() {
                continue;
            }
            if decision.view.cluster != self.disk.cluster || change::fault(&decision.view).is_some() {
                return more;
            }
            if !self.config.speaks.speaks(decision.view.version) {
                let (cluster, program) = (decision.view.version, self.config.speaks);
                self.stop(StopReason::Version { cluster, epoch, program });
                return more;
            }
            if epoch != self.epoch().next() && !bug!(self, InstallsWithGaps) {
                if !whole {
                    self.fetch_from(from);
                    return more;
                }
                if self.is_member() {
                    // Asked from the next one on, the sender answered with later ones: it dropped what is missing.
                    // (An answer to an older question begins earlier, never later.)
                    if !more {
                        let have = self.epoch();
                        self.stop(StopReason::TooFarBehind { have, oldest: epoch });
                    }
                    return more;
                }
                // A process that is no member yet takes the oldest record that is kept as its beginning.
                self.install(decision, true);
                more = true;
                continue;
            }
            if let Some(tip) = &self.tip {
                let chain = core::slice::from_ref(&decision);
                match verify_chain(self.disk.cluster, tip.epoch, &tip.voters, chain) {
                    Err(ChainError::Forced { .. }) if self.believes_forced(&decision) => (),
                    Err(ChainError::Forced { epoch }) => {
                        self.event(Event::ForcedElsewhere { from, epoch });
                        return more;
                    }
                    Err(_) if !self.proof_is_beyond_us() => return more,
                    _ => (),
                }
            }
            self.install(decision, false);
            more = true;
        }
        more
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
        let token = self.write(Record::Decided(Box::new(decision.clone())), true);
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
