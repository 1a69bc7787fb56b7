//! The replica: primary-backup on views (R17), without a clock, a socket or a disk.
//!
//! ```text
//!  Input ─▶ Replica::handle ─▶ Output { Send | Persist | Committed | UpdateDone | Foreign }
//! ```
//!
//! The coordinator is the lowest-id voter that is a member. Its *term* is the epoch of the record that made it
//! coordinator or changed the voter set; entries are stamped with it. A new term begins with reading what a majority of
//! every voter set that may have committed something has, taking the entry of the highest (stamp, version), and committing
//! it under the new stamp. Only then updates are taken.

mod coordinator;
mod follower;

use crate::entry::{Entry, RequestKey, Stored};
use crate::wire::{Message, decode, encode};
use coordinator::Coordinator;
use quorate_membership::{Epoch, Identity, StateId, View, VoterSet};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;

/// How many updates may wait at the coordinator, and how many of this node may be under way.
pub const UPDATES_MAX: usize = 64;

/// Names a write. Tokens grow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Token(pub u64);

/// What happened.
#[derive(Clone, Debug)]
pub enum Input {
    /// The membership installed a view.
    View(Arc<View>),
    /// A session delivered a message of the configuration service.
    Message {
        /// From whom.
        from: Identity,
        /// The bytes; hostile ones are counted and dropped.
        bytes: Vec<u8>,
    },
    /// Every write up to this one is durable; in answer to [`Output::Persist`].
    Persisted(Token),
    /// A local user wants a change; answered by [`Output::UpdateDone`] with the same number.
    Update {
        /// Names the answer; used once in this life.
        number: u64,
        /// The version it is based on; whatever is newest if `None`.
        expected: Option<u64>,
        /// Who wrote it.
        author: String,
        /// Seconds since 1970, for people.
        written_at: u64,
        /// The document.
        text: String,
    },
    /// The local user waits no longer.
    GiveUp {
        /// Which update.
        number: u64,
    },
}

/// What the driver must do, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Send over the session to that life.
    Send {
        /// To whom.
        to: Identity,
        /// The message.
        bytes: Vec<u8>,
    },
    /// Replace what is on disk by this, durably; then [`Input::Persisted`].
    Persist {
        /// Names it.
        token: Token,
        /// The whole state.
        stored: Box<Stored>,
    },
    /// A version is committed. Versions may be skipped; they rise.
    Committed(Entry),
    /// The outcome of a local update.
    UpdateDone {
        /// Which.
        number: u64,
        /// Its version, or why not.
        result: Result<u64, UpdateError>,
    },
    /// This node's history is not this cluster's: it must not go on with it. The node stops.
    Foreign(ForeignHistory),
}

/// Why an update was not made. The configuration is unchanged.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[non_exhaustive]
pub enum UpdateError {
    /// Somebody was faster.
    #[error(
        "version {expected} is not the newest any more, {newest} is: look at the difference and apply again"
    )]
    Conflict {
        /// What the update was based on.
        expected: u64,
        /// The newest version.
        newest: u64,
    },
    /// The document is wrong.
    #[error("{0}")]
    Document(crate::DocumentError),
    /// Too many updates wait.
    #[error("{UPDATES_MAX} updates wait already")]
    Busy,
    /// This node is no member, or no voter is.
    #[error("no coordinator: this node sees no voter that is a member")]
    NoCoordinator,
}

/// Two histories that cannot both be this cluster's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ForeignHistory {
    /// The same version says different things.
    #[error(
        "version {version} of the configuration on this node is not the cluster's: its directory is of another cluster \
         or was restored from elsewhere; move it away and start again"
    )]
    Differs {
        /// Which version.
        version: u64,
    },
    /// This node has committed versions that the cluster does not have.
    #[error(
        "this node has version {here} of the configuration, the cluster's newest is {cluster}: the cluster was restored \
         from an older state; apply this node's configuration there, or move its directory away"
    )]
    Newer {
        /// Here.
        here: u64,
        /// In the cluster.
        cluster: u64,
    },
}

/// What is waited for before a write counts.
#[derive(Clone, Debug)]
enum AfterWrite {
    /// Tell the coordinator.
    Accepted { to: Identity, term: Epoch, version: u64 },
    /// Our own acceptance as coordinator.
    Own { term: Epoch, version: u64 },
}

/// An update of this node that is under way.
#[derive(Clone, Debug)]
struct LocalUpdate {
    expected: Option<u64>,
    author: String,
    written_at: u64,
    text: String,
}

/// Deliberate bugs, to prove that the simulation's checkers see them.
#[cfg(any(test, feature = "sim"))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bug {
    /// Acceptance is told before the write is durable.
    AcceptBeforeDurable,
    /// A new coordinator serves without reading from a majority.
    ServeWithoutReading,
    /// Half of the votes commit.
    HalfCommits,
    /// A repeated request is applied again.
    ApplyTwice,
    /// A new coordinator reads from the present voters alone.
    ForgetsFormerVoters,
}

/// One node's replica of the configuration.
#[derive(Debug)]
pub struct Replica {
    me: Identity,
    state: StateId,
    stored: Stored,
    view: Option<Arc<View>>,
    /// The coordinator and the voters of the newest view.
    key: Option<(Identity, VoterSet)>,
    coordinator: Coordinator,
    token: Token,
    after_write: BTreeMap<Token, Vec<AfterWrite>>,
    local: BTreeMap<u64, LocalUpdate>,
    malformed: u64,
    #[cfg(any(test, feature = "sim"))]
    bug: Option<Bug>,
}

impl Replica {
    /// The replica of a life with what its disk holds. `state` is the acceptor's state directory: answers count for a
    /// voter only with the directory the voter set names.
    #[must_use]
    pub fn new(me: Identity, state: StateId, stored: Stored) -> Self {
        Self {
            me,
            state,
            stored,
            view: None,
            key: None,
            coordinator: Coordinator::Idle,
            token: Token(0),
            after_write: BTreeMap::new(),
            local: BTreeMap::new(),
            malformed: 0,
            #[cfg(any(test, feature = "sim"))]
            bug: None,
        }
    }

    /// With a deliberate bug.
    #[cfg(any(test, feature = "sim"))]
    #[must_use]
    pub fn with_bug(mut self, bug: Option<Bug>) -> Self {
        self.bug = bug;
        self
    }

    #[cfg(any(test, feature = "sim"))]
    fn has_bug(&self, bug: Bug) -> bool {
        self.bug == Some(bug)
    }

    /// The newest committed version. Readable without quorum; it may be old then.
    #[must_use]
    pub fn committed(&self) -> Option<&Entry> {
        self.stored.history.last()
    }

    /// Committed versions, oldest first.
    #[must_use]
    pub fn history(&self) -> &[Entry] {
        &self.stored.history
    }

    /// Whether this node is the coordinator and takes updates.
    #[must_use]
    pub fn serves(&self) -> bool {
        matches!(self.coordinator, Coordinator::Serving { .. })
    }

    /// How many messages were not understood.
    #[must_use]
    pub fn malformed(&self) -> u64 {
        self.malformed
    }

    /// Advances the replica. Appends to `out` what the driver must do, in order.
    pub fn handle(&mut self, input: Input, out: &mut Vec<Output>) {
        match input {
            Input::View(view) => self.on_view(view, out),
            Input::Message { from, bytes } => match decode(&bytes) {
                Ok(message) => self.on_message(from, message, out),
                Err(_) => self.malformed += 1,
            },
            Input::Persisted(token) => self.on_persisted(token, out),
            Input::Update { number, expected, author, written_at, text } => {
                let update = LocalUpdate { expected, author, written_at, text };
                self.on_local_update(number, update, out);
            }
            Input::GiveUp { number } => {
                self.local.remove(&number);
            }
        }
        self.check();
    }

    fn on_message(&mut self, from: Identity, message: Message, out: &mut Vec<Output>) {
        match message {
            Message::Read { term } => self.on_read(from, term, out),
            Message::State { term, state, accepted, history, voter_sets } => {
                self.on_state(from, term, coordinator::Answer { state, accepted, history, voter_sets }, out);
            }
            Message::Append { term, entry, history } => self.on_append(from, term, entry, history, out),
            Message::Accepted { term, state, version } => self.on_accepted(from, term, state, version, out),
            Message::Commit { term, version } => self.on_commit(from, term, version, out),
            Message::CatchUp { term, history, voter_sets } => {
                self.on_catch_up(from, term, history, voter_sets, out)
            }
            Message::Update { request, expected, author, written_at, text } => {
                let update = LocalUpdate { expected, author, written_at, text };
                self.on_update(request, update, out);
            }
            Message::Updated { request, result } => self.on_updated(request, result, out),
        }
    }

    /// The lowest-id voter of a view that is a member.
    fn coordinator_of(view: &View) -> Option<Identity> {
        view.voters.voters.keys().find_map(|n| view.identity(*n))
    }

    fn on_view(&mut self, view: Arc<View>, out: &mut Vec<Output>) {
        let first = self.view.is_none();
        let key = Self::coordinator_of(&view).map(|c| (c, view.voters.clone()));
        let new_term = key != self.key;
        if new_term {
            self.note_voters(view.epoch, &view.voters);
        }
        self.key.clone_from(&key);
        let previous = self.view.replace(Arc::clone(&view));
        let me_coordinates = key.as_ref().is_some_and(|(c, _)| *c == self.me);
        if new_term {
            // A joiner does not know when the present term began and takes it from the coordinator's messages.
            if !first || me_coordinates {
                self.stored.term = self.stored.term.max(view.epoch);
            }
            self.coordinator = Coordinator::Idle;
            if me_coordinates {
                self.begin_term(out);
            }
            self.resend_local(out);
        } else {
            let joined = view.identities().filter(|i| previous.as_ref().is_none_or(|p| !p.contains(*i)));
            for member in joined.collect::<Vec<_>>() {
                self.welcome(member, out);
            }
        }
    }

    /// Remembers a voter set under which something may be committed from now on.
    fn note_voters(&mut self, epoch: Epoch, voters: &VoterSet) {
        let sets = &mut self.stored.voter_sets;
        sets.retain(|(_, s)| s != voters);
        sets.push((epoch, voters.clone()));
    }

    fn on_local_update(&mut self, number: u64, update: LocalUpdate, out: &mut Vec<Output>) {
        if UPDATES_MAX <= self.local.len() {
            out.push(Output::UpdateDone { number, result: Err(UpdateError::Busy) });
            return;
        }
        // Told at once and with the place, wherever the coordinator is.
        if let Err(error) = crate::parse(&update.text) {
            out.push(Output::UpdateDone { number, result: Err(UpdateError::Document(error)) });
            return;
        }
        if self.key.is_none() {
            out.push(Output::UpdateDone { number, result: Err(UpdateError::NoCoordinator) });
            return;
        }
        self.local.insert(number, update);
        self.send_local(number, out);
    }

    /// Asks the new coordinator again for what is not answered; the request key makes it apply once.
    fn resend_local(&mut self, out: &mut Vec<Output>) {
        let numbers: Vec<u64> = self.local.keys().copied().collect();
        for number in numbers {
            self.send_local(number, out);
        }
    }

    fn send_local(&mut self, number: u64, out: &mut Vec<Output>) {
        let (Some((coordinator, _)), Some(update)) = (self.key.clone(), self.local.get(&number).cloned())
        else {
            return;
        };
        let request = RequestKey { by: self.me, number };
        if coordinator == self.me {
            self.on_update(request, update, out);
            return;
        }
        let LocalUpdate { expected, author, written_at, text } = update;
        self.send(coordinator, &Message::Update { request, expected, author, written_at, text }, out);
    }

    fn on_updated(&mut self, request: RequestKey, result: Result<u64, UpdateError>, out: &mut Vec<Output>) {
        if request.by == self.me && self.local.remove(&request.number).is_some() {
            out.push(Output::UpdateDone { number: request.number, result });
        }
    }

    fn send(&self, to: Identity, message: &Message, out: &mut Vec<Output>) {
        let is_member = self.view.as_ref().is_some_and(|v| v.contains(to));
        if is_member && to != self.me {
            out.push(Output::Send { to, bytes: encode(message) });
        }
    }

    fn persist(&mut self, after: Option<AfterWrite>, out: &mut Vec<Output>) {
        self.token.0 += 1;
        #[cfg(any(test, feature = "sim"))]
        if self.has_bug(Bug::AcceptBeforeDurable)
            && let Some(after) = after.clone()
        {
            self.after_write(after, out);
            out.push(Output::Persist { token: self.token, stored: Box::new(self.stored.clone()) });
            return;
        }
        if let Some(after) = after {
            self.after_write.entry(self.token).or_default().push(after);
        }
        out.push(Output::Persist { token: self.token, stored: Box::new(self.stored.clone()) });
    }

    fn on_persisted(&mut self, token: Token, out: &mut Vec<Output>) {
        let later = self.after_write.split_off(&Token(token.0 + 1));
        let done = std::mem::replace(&mut self.after_write, later);
        for after in done.into_values().flatten() {
            self.after_write(after, out);
        }
    }

    fn after_write(&mut self, after: AfterWrite, out: &mut Vec<Output>) {
        match after {
            AfterWrite::Accepted { to, term, version } if term == self.stored.term => {
                self.send(to, &Message::Accepted { term, state: self.state, version }, out);
            }
            AfterWrite::Own { term, version } => self.on_accepted(self.me, term, self.state, version, out),
            AfterWrite::Accepted { .. } => (),
        }
    }

    fn check(&self) {
        let rising = self.stored.history.windows(2).all(|w| w[0].version < w[1].version);
        assert!(rising, "committed versions rise");
        if let Some(accepted) = &self.stored.accepted {
            assert!(accepted.stamp <= self.stored.term, "nothing is accepted from a term that was not seen");
        }
    }
}
