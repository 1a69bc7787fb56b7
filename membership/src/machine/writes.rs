//! Writes under way, and the answers withheld until they are durable.

use super::bug::bug;
use super::io::Token;
use super::member::Member;
use super::wire::ControlMsg;
use crate::proof::{Accept, Ballot, Decision};
use crate::{Epoch, NodeId};
use std::collections::BTreeMap;

/// What a durable write sets free.
#[derive(Clone, Debug)]
pub(super) enum Then {
    /// The promise of `ballot` may be told.
    Promise { to: NodeId, epoch: Epoch, ballot: Ballot },
    /// The yes may be told.
    Accepted { to: NodeId, epoch: Epoch, accept: Accept },
    /// The decision is stored.
    Stored(Epoch),
    /// The record that a person forced may be told.
    Forced(Box<Decision>),
}

/// Tokens given out, and what waits for them.
#[derive(Clone, Debug)]
pub(super) struct Writes {
    last: u64,
    waiting: BTreeMap<Token, Vec<Then>>,
    /// The newest epoch whose decision is durable here.
    pub(super) stored: Epoch,
    /// The highest token known to be durable.
    durable: u64,
    /// The last write of a promise or an accept.
    pub(super) vote: Option<Token>,
}

impl Writes {
    pub(super) fn new(stored: Epoch) -> Self {
        Self { last: 0, waiting: BTreeMap::new(), stored, durable: 0, vote: None }
    }

    pub(super) fn token(&mut self) -> Token {
        self.last += 1;
        Token(self.last)
    }

    pub(super) fn was_asked(&self, token: Token) -> bool {
        token.0 <= self.last
    }

    pub(super) fn is_durable(&self, token: Token) -> bool {
        token.0 <= self.durable
    }
}

impl Member {
    /// Does `then` once `token` is durable.
    pub(super) fn after(&mut self, token: Token, then: Then) {
        let at_once = bug!(self, AnswersBeforeDurable) && !matches!(then, Then::Stored(_));
        if at_once || self.writes.is_durable(token) {
            self.set_free(then);
        } else {
            self.writes.waiting.entry(token).or_default().push(then);
        }
    }

    /// Does `then` once the last promise or accept is durable; at once if it is.
    pub(super) fn after_vote(&mut self, then: Then) {
        match self.writes.vote {
            Some(token) => self.after(token, then),
            None => self.set_free(then),
        }
    }

    pub(super) fn on_persisted(&mut self, token: Token) {
        self.writes.durable = self.writes.durable.max(token.0);
        let later = self.writes.waiting.split_off(&Token(token.0 + 1));
        let due = core::mem::replace(&mut self.writes.waiting, later);
        for then in due.into_values().flatten() {
            self.set_free(then);
        }
    }

    fn set_free(&mut self, then: Then) {
        match then {
            Then::Promise { to, epoch, ballot } => self.tell_promise(to, epoch, ballot),
            Then::Accepted { to, epoch, accept } => {
                self.send(to, ControlMsg::Accepted { epoch, accept });
            }
            Then::Forced(decision) => self.tell_forced(*decision),
            Then::Stored(epoch) => self.writes.stored = self.writes.stored.max(epoch),
        }
    }
}
