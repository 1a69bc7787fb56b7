//! The coordinator's side: reading at the start of a term, then one update after another.

#[cfg(any(test, feature = "sim"))]
use super::Bug;
use super::{AfterWrite, ForeignHistory, LocalUpdate, Output, Replica, UPDATES_MAX, UpdateError};
use crate::entry::{Entry, RequestKey, Stored};
use crate::wire::{Message, newest_end};
use quorate_membership::{Epoch, Identity, NodeId, StateId, VoterSet};
use std::collections::{BTreeMap, VecDeque};

/// What a replica said when it was read.
#[derive(Clone, Debug)]
pub(super) struct Answer {
    pub(super) state: StateId,
    pub(super) accepted: Option<Entry>,
    pub(super) history: Vec<Entry>,
    pub(super) voter_sets: Vec<(Epoch, VoterSet)>,
}

impl Answer {
    fn newest(&self) -> Option<&Entry> {
        self.accepted.as_ref().into_iter().chain(self.history.last()).max_by_key(|e| (e.stamp, e.version))
    }
}

/// An update that waits its turn.
#[derive(Clone, Debug)]
pub(super) struct Waiting {
    request: RequestKey,
    update: LocalUpdate,
}

/// What a coordinator is doing.
#[derive(Debug)]
pub(super) enum Coordinator {
    /// Not the coordinator.
    Idle,
    /// Collecting what others have.
    Reading { answers: BTreeMap<NodeId, Answer>, waiting: VecDeque<Waiting> },
    /// Waiting for a majority to accept.
    Appending { entry: Entry, accepted: BTreeMap<NodeId, StateId>, waiting: VecDeque<Waiting> },
    /// Nothing to do.
    Serving {},
}

impl Replica {
    /// Starts a term as coordinator: asks everybody what they have.
    pub(super) fn begin_term(&mut self, out: &mut Vec<Output>) {
        let term = self.stored.term;
        let own = Answer {
            state: self.state,
            accepted: self.stored.accepted.clone(),
            history: self.stored.history.clone(),
            voter_sets: self.stored.voter_sets.clone(),
        };
        self.coordinator =
            Coordinator::Reading { answers: BTreeMap::from([(self.me.node, own)]), waiting: VecDeque::new() };
        self.tell_everybody(&Message::Read { term }, out);
        self.continue_term(out);
    }

    fn tell_everybody(&self, message: &Message, out: &mut Vec<Output>) {
        let members: Vec<Identity> =
            self.view.iter().flat_map(|v| v.identities().collect::<Vec<_>>()).collect();
        for member in members {
            self.send(member, message, out);
        }
    }

    pub(super) fn on_state(&mut self, from: Identity, term: Epoch, answer: Answer, out: &mut Vec<Output>) {
        if term != self.stored.term {
            return;
        }
        if let Coordinator::Reading { answers, .. } = &mut self.coordinator {
            answers.insert(from.node, answer);
            self.continue_term(out);
        }
    }

    /// Ends the reading if a majority of every voter set has answered.
    fn continue_term(&mut self, out: &mut Vec<Output>) {
        let Some((_, voters)) = self.key.clone() else { return };
        let Coordinator::Reading { answers, waiting } = &mut self.coordinator else { return };
        // Who contradicts what is committed here: either a minority, which finds out by what is appended, or the cluster,
        // and then it is this node whose directory is not the cluster's. Never is one taken for the other's continuation.
        let contradicting: Vec<(NodeId, u64)> = answers
            .iter()
            .filter_map(|(n, a)| self.stored.contradiction(&a.history).map(|version| (*n, version)))
            .collect();
        if let Some((_, version)) = contradicting.first() {
            let others: BTreeMap<NodeId, StateId> =
                contradicting.iter().map(|(n, _)| (*n, answers[n].state)).collect();
            if voters.has_majority(others.iter()) {
                out.push(Output::Foreign(ForeignHistory::Differs { version: *version }));
                self.coordinator = Coordinator::Idle;
                return;
            }
        }
        let answers: BTreeMap<NodeId, &Answer> = answers
            .iter()
            .filter(|(n, _)| contradicting.iter().all(|(other, _)| other != *n))
            .map(|(n, a)| (*n, a))
            .collect();
        // What was committed under sets before the newest known commit is in that commit's majority: a node that comes
        // back after years must not make the others wait for voters that are long gone.
        let settled = answers.values().map(|a| Stored::settled(&a.history)).max().unwrap_or(Epoch(0));
        let all = answers.values().flat_map(|a| &a.voter_sets);
        let mut sets: Vec<&VoterSet> = all.filter(|(seen, _)| settled <= *seen).map(|(_, set)| set).collect();
        #[cfg(any(test, feature = "sim"))]
        if self.bug == Some(Bug::ForgetsFormerVoters) {
            sets.clear();
        }
        sets.push(&voters);
        let complete = sets.iter().all(|s| s.has_majority(answers.iter().map(|(n, a)| (n, &a.state))));
        #[cfg(any(test, feature = "sim"))]
        let complete = complete || self.bug == Some(Bug::ServeWithoutReading);
        if !complete {
            return;
        }
        let newest =
            answers.values().filter_map(|a| a.newest()).max_by_key(|e| (e.stamp, e.version)).cloned();
        let histories: Vec<Vec<Entry>> = answers.values().map(|a| a.history.clone()).collect();
        let waiting = std::mem::take(waiting);
        // All of them: one replica may have missed what another knows.
        let mut is_newer = false;
        for history in &histories {
            is_newer |= self.stored.merge(history);
        }
        if is_newer && let Some(last) = self.stored.history.last() {
            out.push(Output::Committed(last.clone()));
        }
        // What is committed may only be known from its commit, what is accepted only from its stamp: the higher wins.
        let newest = newest
            .into_iter()
            .chain(self.stored.history.last().cloned())
            .max_by_key(|e| (e.version, e.stamp));
        match newest {
            Some(entry) => self.append(Entry { stamp: self.stored.term, ..entry }, waiting, out),
            None => {
                self.stored.voter_sets = vec![(self.stored.term, voters)];
                self.coordinator = Coordinator::Serving {};
                self.serve(waiting, out);
            }
        }
    }

    /// Asks everybody to accept an entry.
    fn append(&mut self, entry: Entry, waiting: VecDeque<Waiting>, out: &mut Vec<Output>) {
        let (term, version) = (self.stored.term, entry.version);
        self.stored.accepted = Some(entry.clone());
        let history = self.unsettled_history();
        self.tell_everybody(&Message::Append { term, entry: entry.clone(), history }, out);
        self.coordinator = Coordinator::Appending { entry, accepted: BTreeMap::new(), waiting };
        self.persist(Some(AfterWrite::Own { term, version }), out);
    }

    /// What goes with an entry before the term's first commit, after which everybody is caught up.
    fn unsettled_history(&self) -> Vec<Entry> {
        let is_settled = self.stored.history.iter().any(|e| e.stamp == self.stored.term);
        if is_settled { Vec::new() } else { newest_end(&self.stored.history) }
    }

    pub(super) fn on_accepted(
        &mut self,
        from: Identity,
        term: Epoch,
        state: StateId,
        version: u64,
        out: &mut Vec<Output>,
    ) {
        let Some((_, voters)) = self.key.clone() else { return };
        let Coordinator::Appending { entry, accepted, waiting } = &mut self.coordinator else { return };
        if term != self.stored.term || version != entry.version || entry.stamp != term {
            return;
        }
        accepted.insert(from.node, state);
        let enough = voters.has_majority(accepted.iter());
        #[cfg(any(test, feature = "sim"))]
        let enough =
            enough || (self.bug == Some(Bug::HalfCommits) && voters.voters.len() <= 2 * accepted.len());
        if !enough {
            return;
        }
        let (entry, waiting) = (entry.clone(), std::mem::take(waiting));
        let (version, request) = (entry.version, entry.request);
        self.stored.accepted = None;
        self.coordinator = Coordinator::Serving {};
        self.commit_here(entry, out);
        self.tell_everybody(&Message::Commit { term, version }, out);
        if !self.caught_up(term) {
            let members: Vec<Identity> =
                self.view.iter().flat_map(|v| v.identities().collect::<Vec<_>>()).collect();
            for member in members {
                self.catch_up(member, out);
            }
        }
        self.answer(request, Ok(version), out);
        self.serve(waiting, out);
    }

    /// Whether more than one entry of this term is committed: everybody was caught up with the first.
    fn caught_up(&self, term: Epoch) -> bool {
        1 < self.stored.history.iter().filter(|e| e.stamp == term).count()
    }

    /// Tells a member that joined in the middle of a term what the others were told.
    pub(super) fn welcome(&mut self, member: Identity, out: &mut Vec<Output>) {
        let term = self.stored.term;
        match &self.coordinator {
            Coordinator::Idle => (),
            Coordinator::Reading { .. } => self.send(member, &Message::Read { term }, out),
            Coordinator::Serving {} => self.catch_up(member, out),
            Coordinator::Appending { entry, .. } => {
                let history = self.unsettled_history();
                let append = Message::Append { term, entry: entry.clone(), history };
                // Before the term's first commit it is not known here what is committed; with it everybody is caught up.
                if self.stored.history.iter().any(|e| e.stamp == term) {
                    self.catch_up(member, out);
                }
                self.send(member, &append, out);
            }
        }
    }

    /// Sends a member what is committed.
    fn catch_up(&mut self, member: Identity, out: &mut Vec<Output>) {
        let message = Message::CatchUp {
            term: self.stored.term,
            history: newest_end(&self.stored.history),
            voter_sets: self.stored.voter_sets.clone(),
        };
        self.send(member, &message, out);
    }

    pub(super) fn on_update(&mut self, request: RequestKey, update: LocalUpdate, out: &mut Vec<Output>) {
        let waiting = match &mut self.coordinator {
            // The asker will ask whoever is coordinator after the view it has yet to install.
            Coordinator::Idle => return,
            Coordinator::Reading { waiting, .. } | Coordinator::Appending { waiting, .. } => waiting,
            Coordinator::Serving {} => {
                self.serve(VecDeque::from([Waiting { request, update }]), out);
                return;
            }
        };
        if waiting.iter().any(|w| w.request == request) {
            return;
        }
        if UPDATES_MAX <= waiting.len() {
            self.answer(request, Err(UpdateError::Busy), out);
            return;
        }
        waiting.push_back(Waiting { request, update });
    }

    fn answer(&mut self, request: RequestKey, result: Result<u64, UpdateError>, out: &mut Vec<Output>) {
        if request.by == self.me {
            self.on_updated(request, result, out);
        } else {
            self.send(request.by, &Message::Updated { request, result }, out);
        }
    }

    /// Takes updates until one has to be accepted by others, or none is left.
    fn serve(&mut self, mut waiting: VecDeque<Waiting>, out: &mut Vec<Output>) {
        while let Some(Waiting { request, update }) = waiting.pop_front() {
            if let Some(version) = self.applied(request) {
                self.answer(request, Ok(version), out);
                continue;
            }
            let newest = self.stored.committed();
            if let Some(expected) = update.expected
                && expected != newest
            {
                self.answer(request, Err(UpdateError::Conflict { expected, newest }), out);
                continue;
            }
            if let Err(error) = crate::parse(&update.text) {
                self.answer(request, Err(UpdateError::Document(error)), out);
                continue;
            }
            let entry = Entry {
                stamp: self.stored.term,
                version: newest + 1,
                request,
                author: update.author,
                written_at: update.written_at,
                text: update.text,
            };
            self.append(entry, waiting, out);
            return;
        }
    }

    fn applied(&self, request: RequestKey) -> Option<u64> {
        #[cfg(any(test, feature = "sim"))]
        if self.has_bug(Bug::ApplyTwice) {
            return None;
        }
        self.stored.history.iter().find(|e| e.request == request).map(|e| e.version)
    }
}
