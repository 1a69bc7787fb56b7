//! Packets: who may say what, and where each message goes (R1).

use super::bug::bug;
use super::io::{Event, Peer, StopReason};
use super::member::Member;
use super::wire::{ControlMsg, HeartbeatAck, JoinRefusal};

/// What a sender is to this node.
enum Judged {
    /// A process of the cluster.
    Fine,
    /// A life that was removed and does not know it yet: it is told, and believed in nothing.
    Past,
    /// It cannot be what it says it is.
    Refused(JoinRefusal),
}

impl Member {
    pub(super) fn on_packet(&mut self, from: Peer, msg: ControlMsg) {
        if from.node == self.me.node {
            // Another process with this node's certificate.
            if from != self.me && from.incarnation <= self.me.incarnation {
                self.refuse(from, JoinRefusal::DoubleIdentity(from.node));
            }
            return;
        }
        // Decisions prove themselves, and a refusal tells this node that it may be behind: both are taken from anybody
        // with a certificate.
        match msg {
            ControlMsg::Learn(step) => return self.on_learn(from.node, *step),
            ControlMsg::Chain { whole, steps } => return self.on_chain(from.node, whole.map(|d| *d), steps),
            ControlMsg::Refused(refusal) => return self.on_refused(from, refusal),
            ControlMsg::Fetch { from: epoch } => return self.on_fetch(from.node, epoch),
            _ => (),
        }
        match self.judge(from) {
            Judged::Fine => {
                self.heard(from);
                let stale = match (&msg, &self.tip) {
                    (ControlMsg::Heartbeat(beat), Some(tip)) if !beat.speaks.speaks(tip.version) => {
                        Some(JoinRefusal::Version { cluster: tip.version, node: beat.speaks })
                    }
                    _ => None,
                };
                self.on_message(from, msg);
                if let Some(refusal) = stale {
                    self.refuse(from, refusal);
                }
            }
            Judged::Past => {
                if let ControlMsg::Heartbeat(beat) = msg {
                    let (epoch, state) = (self.epoch(), self.disk.state);
                    let leader = self.leader_said();
                    let ack = HeartbeatAck { sent_ns: beat.sent_ns, epoch, state, leader, leases: false };
                    self.send(from.node, ControlMsg::HeartbeatAck(ack));
                    if beat.epoch < epoch {
                        self.on_fetch(from.node, beat.epoch.next());
                    }
                }
            }
            Judged::Refused(refusal) => self.refuse(from, refusal),
        }
    }

    fn judge(&self, from: Peer) -> Judged {
        let Some(tip) = &self.tip else { return Judged::Fine };
        if !tip.roster.contains_key(&from.node) {
            return Judged::Refused(JoinRefusal::NotInRoster(from.node));
        }
        let who = from.identity();
        let double = Judged::Refused(JoinRefusal::DoubleIdentity(from.node));
        let known = tip.lives.get(&from.node).copied().filter(|_| !bug!(self, AdmitsOldLives));
        match known {
            Some(known) if from.incarnation < known => {
                return Judged::Refused(JoinRefusal::RolledBack { known });
            }
            Some(known) if from.incarnation == known => {
                return match tip.nonces.get(&from.node) {
                    Some(nonce) if *nonce == from.nonce => Judged::Fine,
                    Some(_) if self.is_live(who) => double,
                    Some(_) => Judged::Refused(JoinRefusal::RolledBack { known }),
                    None => Judged::Past,
                };
            }
            _ => (),
        }
        // A newcomer: not while an older life answers, nor while another process has the same number.
        if self.elder_answered(who) {
            return double;
        }
        match self.peers.lives.get(&who) {
            Some(life) if life.nonce != from.nonce && self.is_live(who) => double,
            _ => Judged::Fine,
        }
    }

    fn refuse(&mut self, from: Peer, refusal: JoinRefusal) {
        self.event(Event::Refused { node: from.node, refusal });
        self.out.push(super::Output::Send {
            to: from.node,
            life: Some(from.incarnation),
            msg: ControlMsg::Refused(refusal),
        });
    }

    /// Somebody says that this process cannot be what it is. A member is what the record says it is; for the others
    /// only the refusals that a newer record cannot take back end the life.
    fn on_refused(&mut self, from: Peer, refusal: JoinRefusal) {
        if self.is_member() {
            return;
        }
        match refusal {
            JoinRefusal::DoubleIdentity(node) if node == self.me.node => {
                self.stop(StopReason::DoubleIdentity(node));
            }
            JoinRefusal::RolledBack { known } if self.me.incarnation <= known => {
                self.stop(StopReason::RolledBack { known });
            }
            JoinRefusal::NotInRoster(_) | JoinRefusal::Removed(_) | JoinRefusal::Version { .. } => {
                self.fetch_from(from.node);
                self.event(Event::NotAdmitted(refusal));
            }
            JoinRefusal::DoubleIdentity(_) | JoinRefusal::RolledBack { .. } => (),
        }
    }

    /// A message of a process that was judged, or one of this process to itself.
    pub(super) fn on_message(&mut self, from: Peer, msg: ControlMsg) {
        let node = from.node;
        match msg {
            ControlMsg::Heartbeat(beat) => self.on_heartbeat(from, &beat),
            ControlMsg::HeartbeatAck(ack) => self.on_heartbeat_ack(from, &ack),
            ControlMsg::Probe => self.send(node, ControlMsg::ProbeAnswer),
            ControlMsg::ProbeAnswer => self.on_probe_answer(from.identity()),
            ControlMsg::Prepare { epoch, ballot } => self.on_prepare(node, epoch, ballot),
            ControlMsg::Promise { epoch, ballot, state, accepted } => {
                self.on_promise(node, epoch, ballot, state, accepted.map(|(b, v)| (b, *v)));
            }
            ControlMsg::Accept { ballot, delta } => self.on_accept(node, ballot, *delta),
            ControlMsg::Accepted { epoch, accept } => self.on_accepted(node, epoch, accept),
            ControlMsg::Preempted { promised } => self.on_preempted(promised),
            ControlMsg::Learn(step) => self.on_learn(node, *step),
            ControlMsg::Chain { whole, steps } => self.on_chain(node, whole.map(|d| *d), steps),
            ControlMsg::Fetch { from } => self.on_fetch(node, from),
            ControlMsg::Forward { number, at, request } => self.on_forward(from, number, at, request),
            ControlMsg::Answer { number, at, answer } => self.on_answer(number, at, answer),
            ControlMsg::Refused(refusal) => self.on_refused(from, refusal),
        }
    }
}
