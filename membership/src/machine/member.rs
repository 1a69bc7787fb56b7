//! The machine itself: one life of one node. What it does is in the files beside this one, by concept.

use super::config::{Config, ConfigError};
use super::durable::{Durable, Record};
use super::io::{Error, Event, Input, Output, Peer, StopReason, Token};
use super::lease::Acks;
use super::peers::Peers;
use super::proposer::Proposer;
use super::requests::Requests;
use super::rings::Watch;
use super::stages::Stages;
use super::wire::ControlMsg;
use super::writes::Writes;
use crate::delta::Delta;
use crate::proof::Ballot;
use crate::{Decision, Epoch, Identity, Incarnation, Instant, NodeId, Rng, Role, View};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

/// One life of one node in the cluster: acceptor, detector, sometimes leader.
///
/// **Contract.** `now` never decreases and is CLOCK_BOOTTIME; outputs are carried out in order; every
/// [`Output::Persist`] is answered by [`Input::Persisted`] or [`Input::StorageFailed`]. Losing, doubling or delaying
/// messages is allowed. The driver has checked that a packet's node is what the certificate says.
#[derive(Clone, Debug)]
pub struct Member {
    pub(super) config: Config,
    pub(super) me: Peer,
    /// Nodes to talk to before a record with a roster is known.
    pub(super) contacts: BTreeSet<NodeId>,
    pub(super) rng: Rng,
    pub(super) now: Instant,
    pub(super) started: Instant,
    /// The state as it will be when every write so far is durable.
    pub(super) disk: Durable,
    pub(super) writes: Writes,
    /// The newest record installed here. Invariant: the end of `disk.chain`.
    pub(super) tip: Option<Arc<View>>,
    /// The epoch that brought the present voter set, and when it was installed here.
    pub(super) voters_since: (Epoch, Instant),
    /// Nodes of the newest record's roster that are meant to vote.
    pub(super) meant: BTreeSet<NodeId>,
    pub(super) peers: Peers,
    pub(super) acks: Acks,
    /// When the leases of removed lives are over.
    pub(super) over: BTreeMap<Identity, Instant>,
    pub(super) proposer: Proposer,
    /// The request of a person to force the quorum, while its record is being made durable.
    pub(super) forcing: Option<super::RequestId>,
    pub(super) requests: Requests,
    pub(super) stages: Stages,
    pub(super) waits: bool,
    /// Whether `wait_for_all` holds at this node; false after a person took it back.
    pub(super) waits_for_all: bool,
    /// Voters that are not here, and since when, at the node that leads.
    pub(super) absent_voters: BTreeMap<NodeId, Instant>,
    pub(super) wants_in: bool,
    pub(super) heartbeat_at: Instant,
    /// Whether something has to be told before the next heartbeat is due, and when that may be at the earliest.
    pub(super) beat_soon: bool,
    pub(super) early_beat_at: Instant,
    pub(super) fetch_at: Instant,
    pub(super) quorate: bool,
    pub(super) lease_until: Instant,
    pub(super) stopped: Option<StopReason>,
    /// A proposal for a record that does not follow the chain yet.
    pub(super) early: Option<(NodeId, Ballot, Box<Delta>)>,
    pub(super) loopback: VecDeque<ControlMsg>,
    pub(super) out: Vec<Output>,
    #[cfg(any(test, feature = "sim"))]
    pub(super) bug: Option<super::Bug>,
}

impl Member {
    /// Starts the life that [`Durable::next_life`] began; that must be durable already. `nonce` is random per process,
    /// `seed` drives back-off, `contacts` are nodes to ask while no roster is known.
    ///
    /// # Errors
    /// A relation of the configuration does not hold.
    ///
    /// # Panics
    /// If no life was begun: that would be a packet before the counter is durable (R1).
    pub fn new(
        config: Config,
        durable: Durable,
        nonce: u64,
        contacts: BTreeSet<NodeId>,
        seed: u64,
        now: Instant,
    ) -> Result<Self, ConfigError> {
        config.check()?;
        assert!(Incarnation(0) < durable.life, "a life begins with Durable::next_life");
        let me = Peer { node: durable.node, incarnation: durable.life, nonce };
        let tip = durable.chain.tip().cloned();
        let mut peers = Peers::default();
        if let Some(tip) = &tip {
            peers.watch = Watch::new(tip, me.node);
        }
        let mut member = Self {
            me,
            contacts,
            rng: Rng::new(seed),
            now,
            started: now,
            writes: Writes::new(durable.tip()),
            voters_since: (durable.chain.voters_since(), now),
            meant: BTreeSet::new(),
            peers,
            acks: Acks::default(),
            over: BTreeMap::new(),
            proposer: Proposer::default(),
            forcing: None,
            requests: Requests::default(),
            stages: Stages::default(),
            waits: false,
            waits_for_all: true,
            absent_voters: BTreeMap::new(),
            wants_in: true,
            heartbeat_at: now,
            beat_soon: false,
            early_beat_at: now,
            fetch_at: now,
            quorate: false,
            lease_until: Instant(0),
            stopped: None,
            early: None,
            loopback: VecDeque::new(),
            out: Vec::new(),
            #[cfg(any(test, feature = "sim"))]
            bug: None,
            config,
            disk: durable,
            tip,
        };
        member.note_old_debts();
        member.note_meant();
        member.readmit_started();
        Ok(member)
    }

    /// Makes the machine make a mistake. For proving the simulator's checkers.
    #[cfg(any(test, feature = "sim"))]
    pub fn plant(&mut self, bug: Option<super::Bug>) {
        self.bug = bug;
    }

    /// Takes equal records from a pool, so that a thousand simulated nodes keep one copy of each.
    #[cfg(any(test, feature = "sim"))]
    pub(crate) fn share(&mut self, pool: &mut BTreeMap<Epoch, Arc<View>>) {
        self.disk.chain.share(pool);
        self.tip = self.disk.chain.tip().cloned();
    }

    /// This life.
    #[must_use]
    pub fn me(&self) -> Identity {
        self.me.identity()
    }

    /// This life with its process nonce.
    #[must_use]
    pub fn peer(&self) -> Peer {
        self.me
    }

    /// The versions of the messages that this program speaks.
    #[must_use]
    pub fn speaks(&self) -> super::Versions {
        self.config.speaks
    }

    /// The newest record installed here; `None` in a state directory that never learnt one.
    #[must_use]
    pub fn view(&self) -> Option<&Arc<View>> {
        self.tip.as_ref()
    }

    /// Decisions above `epoch` that are kept here, oldest first (R9). They begin later if older ones were dropped.
    #[must_use]
    pub fn decisions_since(&self, epoch: Epoch) -> Vec<Decision> {
        self.disk.chain.since(epoch)
    }

    /// When the lease of a removed life is over on this node's clock (R8); `None` while it is a member or unknown.
    #[must_use]
    pub fn lease_over_at(&self, who: Identity) -> Option<Instant> {
        self.over.get(&who).copied()
    }

    /// When this life's own lease ends; zero without one.
    #[must_use]
    pub fn lease_until(&self) -> Instant {
        self.lease_until
    }

    /// Whether this life is a member and its lease holds at `now`.
    #[must_use]
    pub fn is_quorate(&self, now: Instant) -> bool {
        self.is_member() && now < self.lease_until
    }

    /// Whether this life is a member of the newest record.
    #[must_use]
    pub fn is_member(&self) -> bool {
        self.tip.as_ref().is_some_and(|v| self.is_in(v))
    }

    /// Why this life is over, if it is.
    #[must_use]
    pub fn stopped(&self) -> Option<&StopReason> {
        self.stopped.as_ref()
    }

    /// The node that leads, as far as this one can tell.
    #[must_use]
    pub fn leader(&self) -> Option<NodeId> {
        self.leader_now()
    }

    /// What is or will be on disk once every write so far is durable.
    #[must_use]
    pub fn durable(&self) -> &Durable {
        &self.disk
    }

    /// Nodes whose newest life is heard at present, this one included.
    #[must_use]
    pub fn hears(&self) -> BTreeSet<NodeId> {
        self.heard_nodes()
    }

    /// Takes one input in and appends what the driver must do.
    ///
    /// # Errors
    /// See [`Error`]; the machine is unchanged then.
    ///
    /// # Panics
    /// If time goes backwards, or one of the machine's own invariants is broken.
    pub fn handle(&mut self, now: Instant, input: Input, out: &mut Vec<Output>) -> Result<(), Error> {
        if self.stopped.is_some() {
            return Err(Error::Stopped);
        }
        if let Input::Persisted(token) = input
            && !self.writes.was_asked(token)
        {
            return Err(Error::UnknownToken(token));
        }
        assert!(self.now <= now, "time went backwards");
        self.wake(now);
        match input {
            Input::Packet { from, msg } => self.on_packet(from, msg),
            Input::Persisted(token) => self.on_persisted(token),
            Input::StorageFailed => self.stop(StopReason::Storage),
            Input::Request { id, request } => self.on_request(id, request),
            Input::LinkLost { node } => self.on_link_lost(node),
            Input::Waiting(waits) => self.waits = waits,
            Input::CancelWaitForAll => self.waits_for_all = false,
            Input::Force { id, off, word } => self.on_force(id, &off, word),
            Input::Tick => (),
        }
        self.turn();
        // Nothing follows the end: what was still worked out must not reach a disk or the network.
        if let Some(end) = self.out.iter().position(|o| matches!(o, Output::Stop { .. })) {
            self.out.truncate(end + 1);
        }
        self.check();
        out.append(&mut self.out);
        Ok(())
    }

    /// When to tick next.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Instant> {
        if self.stopped.is_some() {
            return None;
        }
        let mut at = self.heartbeat_at;
        let mut sooner = |other: Option<Instant>| {
            if let Some(other) = other
                && self.now < other
            {
                at = at.min(other);
            }
        };
        sooner(self.quorate.then_some(self.lease_until));
        sooner(self.next_scan());
        sooner(self.next_judgement());
        sooner(self.next_hopeless());
        sooner(self.beat_soon.then_some(self.early_beat_at));
        sooner(self.proposer.retry_at());
        sooner(self.requests.next_deadline());
        Some(at)
    }

    /// Everything that follows from time and from what the input changed.
    fn turn(&mut self) {
        self.drain_loopback();
        self.take_early();
        self.scan();
        self.judge_cut();
        self.heartbeat();
        self.catch_up();
        loop {
            let epoch = self.epoch();
            self.push_requests();
            self.drain_loopback();
            self.lead();
            self.drain_loopback();
            // A record that was decided meanwhile may let the next request go at once.
            if self.epoch() == epoch || self.stopped.is_some() {
                break;
            }
        }
        self.renew_lease();
    }

    fn drain_loopback(&mut self) {
        while let Some(msg) = self.loopback.pop_front() {
            if self.stopped.is_some() {
                self.loopback.clear();
                return;
            }
            self.on_message(self.me, msg);
        }
    }

    /// Begins a call: after a pause everybody looks silent, although it was this node that did not listen.
    fn wake(&mut self, now: Instant) {
        let gap = now.since(self.now);
        if self.config.heartbeat_interval * 2 < gap {
            self.now = now;
            let slot = self.slot();
            self.peers.shift(gap, slot);
        }
        self.now = now;
        if self.quorate && self.lease_until <= now {
            self.quorate = false;
            self.out.push(Output::Quorum(false));
        }
    }

    pub(super) fn stop(&mut self, reason: StopReason) {
        if self.stopped.is_some() {
            return;
        }
        self.stopped = Some(reason.clone());
        self.lease_until = Instant(0);
        self.out.push(Output::Lease { until: Instant(0) });
        if core::mem::replace(&mut self.quorate, false) {
            self.out.push(Output::Quorum(false));
        }
        self.abandon_requests(&reason);
        self.out.push(Output::Stop { reason });
    }

    /// Whether `view` names exactly this process as the witness it is (R5).
    pub(super) fn is_recorded_witness(&self, view: &View) -> bool {
        let is_witness = view.roster.get(&self.me.node).is_some_and(|e| e.role == Role::Witness);
        is_witness
            && view.lives.get(&self.me.node) == Some(&self.me.incarnation)
            && view.nonces.get(&self.me.node) == Some(&self.me.nonce)
    }

    /// Whether `view` holds exactly this process.
    pub(super) fn is_in(&self, view: &View) -> bool {
        view.contains(self.me.identity()) && view.nonces.get(&self.me.node) == Some(&self.me.nonce)
    }

    /// Notes which nodes are meant to vote.
    pub(super) fn note_meant(&mut self) {
        let roster = self.tip.iter().flat_map(|v| &v.roster);
        self.meant = roster.filter(|(_, e)| e.role != Role::Observer).map(|(n, _)| *n).collect();
    }

    pub(super) fn epoch(&self) -> Epoch {
        self.tip.as_ref().map_or(Epoch(0), |v| v.epoch)
    }

    pub(super) fn event(&mut self, event: Event) {
        self.out.push(Output::Event(event));
    }

    pub(super) fn send(&mut self, to: NodeId, msg: ControlMsg) {
        if to == self.me.node {
            self.loopback.push_back(msg);
        } else {
            self.out.push(Output::Send { to, life: None, msg });
        }
    }

    /// Everybody a message may go to, this node left out.
    pub(super) fn others(&self) -> BTreeSet<NodeId> {
        let roster = self.tip.iter().flat_map(|v| v.roster.keys());
        roster.chain(&self.contacts).copied().filter(|n| *n != self.me.node).collect()
    }

    pub(super) fn write(&mut self, record: Record, lazy: bool) -> Token {
        self.disk.apply(record.clone());
        let token = self.writes.token();
        self.out.push(Output::Persist { token, record, lazy });
        token
    }

    fn check(&self) {
        if let Some(tip) = &self.tip {
            assert_eq!(self.disk.tip(), tip.epoch, "the newest record is the end of the chain");
        }
        if let Some(accepted) = &self.disk.accepted {
            assert_eq!(accepted.view.epoch, self.epoch().next(), "only the next record can be accepted");
            assert!(accepted.accept.ballot <= self.disk.promised, "accepted above the promise");
        }
        assert!(!self.quorate || self.is_member(), "quorate and no member");
        assert!(self.loopback.is_empty(), "own messages are handled within the call");
    }
}
