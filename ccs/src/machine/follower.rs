//! A replica's answers to the coordinator.

use super::{AfterWrite, ForeignHistory, Output, Replica};
use crate::entry::{Entry, HISTORY_MAX};
use crate::wire::{Message, newest_end};
use quorate_membership::{Epoch, Identity, VoterSet};

impl Replica {
    /// Whether a message of this term counts. A higher term than ours is seen for the first time.
    fn takes(&mut self, term: Epoch) -> bool {
        if term < self.stored.term {
            return false;
        }
        self.stored.term = term;
        true
    }

    pub(super) fn on_read(&mut self, from: Identity, term: Epoch, out: &mut Vec<Output>) {
        if !self.takes(term) {
            return;
        }
        let message = Message::State {
            term,
            state: self.state,
            accepted: self.stored.accepted.clone(),
            history: newest_end(&self.stored.history),
            voter_sets: self.stored.voter_sets.clone(),
        };
        self.send(from, &message, out);
    }

    pub(super) fn on_append(
        &mut self,
        from: Identity,
        term: Epoch,
        entry: Entry,
        history: Vec<Entry>,
        out: &mut Vec<Output>,
    ) {
        if !self.takes(term) || entry.version < self.stored.committed() || entry.stamp != term {
            return;
        }
        if let Some(version) = self.stored.contradiction(&history) {
            out.push(Output::Foreign(ForeignHistory::Differs { version }));
            return;
        }
        if self.stored.merge(&history)
            && let Some(newest) = self.stored.history.last()
        {
            out.push(Output::Committed(newest.clone()));
        }
        let version = entry.version;
        self.stored.accepted = Some(entry);
        self.persist(Some(AfterWrite::Accepted { to: from, term, version }), out);
    }

    pub(super) fn on_commit(&mut self, _from: Identity, term: Epoch, version: u64, out: &mut Vec<Output>) {
        if !self.takes(term) {
            return;
        }
        let known = self.stored.accepted.as_ref().is_some_and(|e| e.version == version && e.stamp == term);
        if known && let Some(entry) = self.stored.accepted.take() {
            self.commit_here(entry, out);
        }
    }

    /// Puts a committed entry into the history; tells readers if it is new.
    pub(super) fn commit_here(&mut self, entry: Entry, out: &mut Vec<Output>) {
        let is_new = self.stored.committed() < entry.version;
        let history = &mut self.stored.history;
        history.retain(|e| e.version != entry.version);
        history.push(entry.clone());
        let surplus = history.len().saturating_sub(HISTORY_MAX);
        history.drain(..surplus);
        if let Some((_, voters)) = &self.key {
            // Whatever was committed under former voters is, through this entry, held by a majority of these.
            self.stored.voter_sets = vec![(entry.stamp, voters.clone())];
        }
        self.persist(None, out);
        if is_new {
            out.push(Output::Committed(entry));
        }
    }

    pub(super) fn on_catch_up(
        &mut self,
        _from: Identity,
        term: Epoch,
        history: Vec<Entry>,
        voter_sets: Vec<(Epoch, VoterSet)>,
        out: &mut Vec<Output>,
    ) {
        if !self.takes(term) {
            return;
        }
        if let Some(version) = self.stored.contradiction(&history) {
            out.push(Output::Foreign(ForeignHistory::Differs { version }));
            return;
        }
        let (here, cluster) = (self.stored.committed(), history.last().map_or(0, |e| e.version));
        if cluster < here {
            out.push(Output::Foreign(ForeignHistory::Newer { here, cluster }));
            return;
        }
        if !history.windows(2).all(|w| w[0].version < w[1].version) {
            self.malformed += 1;
            return;
        }
        self.stored.history = history;
        self.stored.voter_sets = voter_sets;
        if self.stored.accepted.as_ref().is_some_and(|e| e.version <= cluster) {
            self.stored.accepted = None;
        }
        self.persist(None, out);
        if here < cluster
            && let Some(newest) = self.stored.history.last()
        {
            out.push(Output::Committed(newest.clone()));
        }
    }
}
