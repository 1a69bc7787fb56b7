//! Requests: those of local users on their way to the leader, and those of all members at the leader.
//!
//! A request is sent for one record: the one after the sender's newest. A copy that arrives later than that record is
//! worthless, so a request is applied once or not at all, and one that was refused is never applied by a late copy:
//! at one record the same request is always judged alike. The origin sends it anew for every record until it is done.

use super::change::votes;
use super::config::REQUESTS_MAX;
use super::io::{Output, Peer, RequestId, StopReason};
use super::member::Member;
use super::wire::{Answer, ControlMsg};
use crate::{Cause, Epoch, Identity, Instant, NodeId, Refusal, Request, RequestError, View};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

/// A local request.
#[derive(Clone, Debug)]
struct Waiting {
    id: RequestId,
    number: u64,
    request: Request,
    deadline: Instant,
    /// The record it was last sent for, and when to send it again.
    sent: Option<(Epoch, Instant)>,
    /// Why the leader could not do it yet.
    not_now: Option<Refusal>,
}

/// A member's request at the leader.
#[derive(Clone, Debug)]
pub(super) struct Forwarded {
    pub(super) by: Peer,
    pub(super) number: u64,
    pub(super) at: Epoch,
    pub(super) request: Request,
}

/// Requests, in and out. One of this node is under way at a time, so they are decided in order.
#[derive(Clone, Debug, Default)]
pub(super) struct Requests {
    queue: VecDeque<Waiting>,
    last: u64,
    pub(super) inbox: BTreeMap<Identity, Forwarded>,
}

impl Requests {
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        let ends = self.queue.iter().map(|w| w.deadline);
        ends.chain(self.queue.front().and_then(|w| w.sent).map(|(_, at)| at)).min()
    }

    /// Keeps the newest copy of the newest request of a member.
    pub(super) fn take_in(&mut self, by: Peer, number: u64, at: Epoch, request: Request) {
        let newer = self.inbox.get(&by.identity()).is_none_or(|f| (f.number, f.at) < (number, at));
        if newer {
            self.inbox.insert(by.identity(), Forwarded { by, number, at, request });
        }
    }

    /// Takes out the request of the first node after `after` that is for the record after `tip`.
    pub(super) fn take_next(
        &mut self,
        after: Option<NodeId>,
        tip: Epoch,
        late: bool,
    ) -> Option<(Peer, Forwarded)> {
        let fit = |f: &&Forwarded| f.at == tip || (late && f.at < tip);
        let next = self.inbox.values().filter(fit).min_by_key(|f| (Some(f.by.node) <= after, f.by.node))?.by;
        self.inbox.remove(&next.identity()).map(|f| (next, f))
    }
}

impl Member {
    pub(super) fn on_request(&mut self, id: RequestId, request: Request) {
        let refusal = if !self.is_member() {
            Some(RequestError::NotMember(self.me.identity()))
        } else if !self.is_quorate(self.now) {
            Some(self.not_quorate())
        } else if REQUESTS_MAX <= self.requests.queue.len() {
            Some(RequestError::Full(REQUESTS_MAX))
        } else {
            None
        };
        if let Some(error) = refusal {
            self.out.push(Output::RequestDone { id, result: Err(error) });
            return;
        }
        self.requests.last += 1;
        self.requests.queue.push_back(Waiting {
            id,
            number: self.requests.last,
            request,
            deadline: self.now + self.config.request_deadline,
            sent: None,
            not_now: None,
        });
    }

    fn not_quorate(&self) -> RequestError {
        let Some(tip) = &self.tip else { return RequestError::NotMember(self.me.identity()) };
        let (have, all) = votes(&tip.voters, self.live_acceptors().into_keys());
        RequestError::NotQuorate { have, all }
    }

    /// Ends what is over its deadline and sends the first one, or sends it again.
    pub(super) fn push_requests(&mut self) {
        if self.stopped.is_some() {
            return;
        }
        let now = self.now;
        let (over, rest): (VecDeque<_>, VecDeque<_>) =
            self.requests.queue.drain(..).partition(|w| w.deadline <= now);
        self.requests.queue = rest;
        for waiting in over {
            let error = match (waiting.sent, waiting.not_now) {
                // It never left this node, so nothing can come of it.
                (None, _) => self.not_quorate(),
                (Some(_), Some(refusal)) => RequestError::Unknown(refusal.to_string()),
                (Some(_), None) => RequestError::Unknown("no answer within the deadline".into()),
            };
            self.out.push(Output::RequestDone { id: waiting.id, result: Err(error) });
        }
        let (at, member) = (self.epoch(), self.is_member());
        let Some(leader) = self.leader_now().filter(|_| member) else { return };
        let again = now + self.config.retry_interval * 2;
        let Some(first) = self.requests.queue.front_mut() else { return };
        if first.sent.is_none_or(|(sent, again)| sent != at || again <= now) {
            first.sent = Some((at, again));
            let (number, request) = (first.number, first.request.clone());
            self.send(leader, ControlMsg::Forward { number, at, request });
        }
    }

    pub(super) fn on_answer(&mut self, number: u64, at: Epoch, answer: Answer) {
        // A judgement of an older record says nothing about copies that were sent for this one.
        let newest = self.epoch();
        let current = self.requests.queue.front_mut().filter(|w| w.number == number);
        let Some(first) = current.filter(|w| at == newest && w.sent.is_some_and(|(e, _)| e == at)) else {
            return;
        };
        let result = match (answer, &self.tip) {
            (Answer::NotNow(refusal), _) => {
                first.not_now = Some(refusal);
                return;
            }
            (Answer::Refused(refusal), _) => Err(RequestError::Refused(refusal)),
            (Answer::Unchanged, Some(view)) => Ok(Arc::clone(view)),
            (Answer::Unchanged, None) => return,
        };
        self.finish_first(result);
    }

    fn finish_first(&mut self, result: Result<Arc<View>, RequestError>) {
        if let Some(done) = self.requests.queue.pop_front() {
            self.out.push(Output::RequestDone { id: done.id, result });
        }
    }

    /// A new record: perhaps it holds the request under way; if not, copies of it for that record are worthless now.
    pub(super) fn requests_installed(&mut self) {
        let Some(view) = self.tip.clone() else { return };
        if let Cause::Request { by, number } = view.cause
            && by == self.me.identity()
            && self.requests.queue.front().is_some_and(|w| w.number == number)
        {
            self.finish_first(Ok(Arc::clone(&view)));
        }
        self.requests.inbox.retain(|who, f| view.contains(*who) && view.epoch <= f.at);
    }

    pub(super) fn abandon_requests(&mut self, reason: &StopReason) {
        for waiting in core::mem::take(&mut self.requests.queue) {
            let error = match waiting.sent {
                None => RequestError::NotMember(self.me.identity()),
                Some(_) => RequestError::Unknown(reason.to_string()),
            };
            self.out.push(Output::RequestDone { id: waiting.id, result: Err(error) });
        }
    }
}
