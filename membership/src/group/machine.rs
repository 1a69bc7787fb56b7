//! The group machine of one node: its processes, its copies of the groups, and the order it gives to those it sequences.

#[cfg(any(test, feature = "sim"))]
use super::bug::Bug;
use super::copy::Copy;
use super::event::{Event, Position, ProcessId, Reason};
use super::flush::Flush;
use super::wire::{Body, Entry, GroupMessage, GroupView, Item};
use crate::{Epoch, Identity, NodeId, View};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

/// The longest name of a group, in bytes.
pub const GROUP_NAME_BYTES_MAX: usize = 64;
/// The longest message, in bytes.
pub const PAYLOAD_BYTES_MAX: usize = 64 << 10;
/// How many messages of one process may be on their way to itself.
pub const WINDOW_MESSAGES: usize = 256;
/// How many bytes of them.
pub const WINDOW_BYTES: usize = 1 << 20;
/// Groups in which one node may have processes.
const GROUPS_MAX: usize = 256;

/// Why nothing was sent, or joined.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GroupError {
    /// This node is no member of the cluster.
    #[error("this node is no member of the cluster")]
    NotMember,
    /// The process has not seen itself join yet, or has left.
    #[error("the process is no member of the group")]
    NotJoined,
    /// Too many of its messages are on their way. More can be sent once it got some of them itself.
    #[error("too many messages of this process are on their way")]
    Full,
    /// Above [`PAYLOAD_BYTES_MAX`].
    #[error("a message of {0} bytes is above the limit of {PAYLOAD_BYTES_MAX}")]
    TooLarge(usize),
    /// Empty or above [`GROUP_NAME_BYTES_MAX`].
    #[error("a group's name has 1 to {GROUP_NAME_BYTES_MAX} bytes")]
    Name,
    /// This node is in too many groups.
    #[error("this node is in {GROUPS_MAX} groups already")]
    TooManyGroups,
}

/// What the driver must do, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Send over the session. Never to ourselves.
    Send {
        /// To whom.
        to: Identity,
        /// What.
        message: GroupMessage,
    },
    /// Tell a process of this node.
    Event {
        /// Which.
        process: u64,
        /// What.
        event: Event,
    },
}

#[derive(Debug)]
struct Pending {
    number: u64,
    payload: Vec<u8>,
    /// Given to the sequencer of the present view.
    submitted: bool,
}

#[derive(Debug)]
struct Local {
    group: String,
    /// It ended, or wants to leave; its leave has no place yet.
    leaving: Option<Reason>,
    joined: bool,
    /// The view in which its join was given to the sequencer last. If an earlier one had a place for it, in a history that
    /// this node had no part in, join and leave there are over: they are not this one's.
    since: Epoch,
    next_number: u64,
    pending: VecDeque<Pending>,
    pending_bytes: usize,
}

/// All groups as one life of one node sees them.
#[derive(Debug)]
pub struct GroupMachine {
    pub(super) me: Identity,
    /// The members of the cluster.
    pub(super) nodes: BTreeMap<NodeId, Identity>,
    /// Which members these are.
    pub(super) view: GroupView,
    /// The newest record here.
    pub(super) record: Epoch,
    /// The epoch of the places given in this view; the flush tells it.
    pub(super) epoch: Epoch,
    pub(super) flush: Option<Flush>,
    pub(super) copies: BTreeMap<String, Copy>,
    /// As a sequencer: the highest order in this view of a group that has no members any more.
    pub(super) floor: u64,
    /// Entries that did not follow on what was here. Other than zero is a fault of the protocol.
    pub(super) gaps: u64,
    locals: BTreeMap<u64, Local>,
    next_process: u64,
    /// Messages of this view that came before it began here.
    early: VecDeque<(Identity, GroupMessage)>,
    loopback: VecDeque<GroupMessage>,
    #[cfg(any(test, feature = "sim"))]
    pub(super) bug: Option<Bug>,
}

impl GroupMachine {
    /// The groups of `me`.
    #[must_use]
    pub fn new(me: Identity) -> Self {
        Self {
            me,
            nodes: BTreeMap::new(),
            view: GroupView::default(),
            record: Epoch(0),
            epoch: Epoch(0),
            flush: None,
            copies: BTreeMap::new(),
            floor: 0,
            gaps: 0,
            locals: BTreeMap::new(),
            next_process: 0,
            early: VecDeque::new(),
            loopback: VecDeque::new(),
            #[cfg(any(test, feature = "sim"))]
            bug: None,
        }
    }

    /// Plants a mistake.
    #[cfg(any(test, feature = "sim"))]
    pub fn plant(&mut self, bug: Bug) {
        self.bug = Some(bug);
    }

    #[cfg(any(test, feature = "sim"))]
    pub(super) fn has(&self, bug: Bug) -> bool {
        self.bug == Some(bug)
    }

    /// The view that has begun here; `None` while a change of the cluster's members is under way. What is sent then is
    /// sent in the view that begins next.
    #[must_use]
    pub fn view(&self) -> Option<Epoch> {
        (self.flush.is_none() && !self.nodes.is_empty()).then_some(self.epoch)
    }

    /// How often an entry came that did not follow on what was here: none is lost between two nodes, so zero.
    #[must_use]
    pub fn gaps(&self) -> u64 {
        self.gaps
    }

    /// Starts a process and its join. Its first event is the configuration with itself in it.
    ///
    /// # Errors
    /// [`GroupError::Name`], [`GroupError::NotMember`], [`GroupError::TooManyGroups`].
    pub fn join(&mut self, group: &str, out: &mut Vec<Output>) -> Result<u64, GroupError> {
        if group.is_empty() || GROUP_NAME_BYTES_MAX < group.len() {
            return Err(GroupError::Name);
        }
        if !self.nodes.contains_key(&self.me.node) {
            return Err(GroupError::NotMember);
        }
        let groups: BTreeSet<&str> = self.locals.values().map(|l| l.group.as_str()).collect();
        if GROUPS_MAX <= groups.len() && !groups.contains(group) {
            return Err(GroupError::TooManyGroups);
        }
        self.next_process += 1;
        let number = self.next_process;
        let local = Local {
            group: group.to_owned(),
            leaving: None,
            joined: false,
            since: self.epoch,
            next_number: 1,
            pending: VecDeque::new(),
            pending_bytes: 0,
        };
        self.locals.insert(number, local);
        if self.flush.is_none() {
            self.submit(number, Item::Join, out);
        }
        self.drain(out);
        Ok(number)
    }

    /// Ends a process: it leaves, or has crashed. Its last event, for one that left, is [`Event::Left`].
    pub fn leave(&mut self, process: u64, reason: Reason, out: &mut Vec<Output>) {
        let Some(local) = self.locals.get_mut(&process).filter(|l| l.leaving.is_none()) else { return };
        local.leaving = Some(reason);
        #[cfg(any(test, feature = "sim"))]
        if self.bug == Some(Bug::TellsLeavesEarly) {
            let group = local.group.clone();
            if let Some(copy) = self.copies.get_mut(&group) {
                let at = Position { order: copy.at.order + 1, ..copy.at };
                let left = vec![(ProcessId { node: self.me, number: process }, reason)];
                self.configure(&group, at, vec![], left, out);
            }
        }
        if self.flush.is_none() {
            self.submit(process, Item::Leave(reason), out);
        }
        self.drain(out);
    }

    /// Sends to all members of the process's group, itself included, and returns the message's number: it comes back
    /// with [`Event::Message`] or [`Event::Dropped`].
    ///
    /// # Errors
    /// See [`GroupError`]; nothing was sent.
    pub fn multicast(
        &mut self,
        process: u64,
        payload: Vec<u8>,
        out: &mut Vec<Output>,
    ) -> Result<u64, GroupError> {
        if PAYLOAD_BYTES_MAX < payload.len() {
            return Err(GroupError::TooLarge(payload.len()));
        }
        let flushing = self.flush.is_some();
        let local = self.locals.get_mut(&process).filter(|l| l.joined && l.leaving.is_none());
        let local = local.ok_or(GroupError::NotJoined)?;
        if WINDOW_MESSAGES <= local.pending.len() || WINDOW_BYTES < local.pending_bytes + payload.len() {
            return Err(GroupError::Full);
        }
        let number = local.next_number;
        local.next_number += 1;
        local.pending_bytes += payload.len();
        local.pending.push_back(Pending { number, payload: payload.clone(), submitted: !flushing });
        if !flushing {
            self.submit(process, Item::Message { number, payload }, out);
        }
        self.drain(out);
        Ok(number)
    }

    /// A message of another member came over its session.
    pub fn on_message(&mut self, from: Identity, message: GroupMessage, out: &mut Vec<Output>) {
        self.take(from, message, out);
        self.drain(out);
    }

    /// A record was installed. Only one that changes the members matters here.
    pub fn on_view(&mut self, view: &Arc<View>, out: &mut Vec<Output>) {
        self.record = view.epoch;
        let group_view = GroupView::of(view);
        if group_view == self.view {
            return;
        }
        self.view = group_view;
        self.nodes = view.identities().map(|i| (i.node, i)).collect();
        if self.nodes.get(&self.me.node) != Some(&self.me) {
            // This life is over, or has not begun.
            self.nodes.clear();
            return;
        }
        self.early.clear();
        self.begin_flush(out);
        self.drain(out);
    }

    /// The node that orders a group in the present view.
    pub(super) fn sequencer(&self, group: &str) -> Option<Identity> {
        // Highest random weight: a node's groups spread over the others when it goes, the rest stay.
        let weight = |node: &NodeId| {
            let mut hash = 0xcbf2_9ce4_8422_2325_u64 ^ u64::from(node.0).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            for byte in group.bytes() {
                hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
            }
            (hash ^ hash >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9)
        };
        self.nodes.iter().max_by_key(|(n, _)| (weight(n), **n)).map(|(_, i)| *i)
    }

    pub(super) fn send(&mut self, to: Identity, group: &str, body: Body, out: &mut Vec<Output>) {
        let message = GroupMessage { view: self.view, group: group.to_owned(), body };
        if to == self.me {
            self.loopback.push_back(message);
        } else {
            out.push(Output::Send { to, message });
        }
    }

    fn drain(&mut self, out: &mut Vec<Output>) {
        while let Some(message) = self.loopback.pop_front() {
            self.take(self.me, message, out);
        }
    }

    fn submit(&mut self, process: u64, item: Item, out: &mut Vec<Output>) {
        let Some(group) = self.locals.get(&process).map(|l| l.group.clone()) else { return };
        let Some(sequencer) = self.sequencer(&group) else { return };
        let from = ProcessId { node: self.me, number: process };
        #[cfg(any(test, feature = "sim"))]
        if let (true, Item::Message { number, payload }) = (self.has(Bug::DeliversAtOnce), &item) {
            let at = Position { epoch: self.epoch, order: u64::MAX / 2 + number };
            let event = Event::Message { at, from, number: *number, payload: payload.clone() };
            out.push(Output::Event { process, event });
        }
        self.send(sequencer, &group, Body::Submit { from, item }, out);
    }

    fn take(&mut self, from: Identity, message: GroupMessage, out: &mut Vec<Output>) {
        let old = message.view != self.view;
        #[cfg(any(test, feature = "sim"))]
        let old = old && !(self.has(Bug::TakesOldViews) && matches!(message.body, Body::Ordered { .. }));
        if old || self.nodes.get(&from.node) != Some(&from) {
            return;
        }
        let GroupMessage { group, body, .. } = message;
        let Some(body) = self.take_flush(from, &group, body, out) else { return };
        #[cfg(any(test, feature = "sim"))]
        let waits = self.flush.is_some() && !self.has(Bug::TakesOldViews);
        #[cfg(not(any(test, feature = "sim")))]
        let waits = self.flush.is_some();
        if waits {
            self.early.push_back((from, GroupMessage { view: self.view, group, body }));
            return;
        }
        match body {
            Body::Submit { from: process, item }
                if process.node == from && self.sequencer(&group) == Some(self.me) =>
            {
                self.order(&group, process, item, out);
            }
            Body::Ordered { entry, stable } => {
                self.append(&group, entry, out);
                self.confirm(&group, stable, out);
            }
            Body::Welcome { members, at } => {
                // Without a process in the group nothing is kept of it, so this replaces nothing.
                self.copies.insert(group, Copy::new(members, at));
            }
            Body::Kept(entry) => self.keep(&group, entry),
            Body::Received { order } => self.on_received(&group, from, order, out),
            _ => {}
        }
    }

    /// Takes the next entry of a group's order into the copy, and tells the processes.
    pub(super) fn append(&mut self, group: &str, entry: Entry, out: &mut Vec<Output>) {
        let Some(copy) = self.copies.get_mut(group) else { return };
        if entry.at <= copy.at {
            return;
        }
        if !copy.is_next(entry.at) {
            self.gaps += 1;
            return;
        }
        let Entry { at, from, item } = entry.clone();
        copy.push(entry);
        match item {
            Item::Join => {
                if let Some(local) = self.local(from).filter(|l| l.since <= at.epoch) {
                    local.joined = true;
                }
                self.configure(group, at, vec![from], vec![], out);
            }
            Item::Leave(reason) => {
                self.configure(group, at, vec![], vec![(from, reason)], out);
                if self.local(from).is_some_and(|l| l.since <= at.epoch) {
                    self.locals.remove(&from.number);
                    out.push(Output::Event { process: from.number, event: Event::Left });
                }
            }
            Item::Message { number, payload } => {
                #[cfg(any(test, feature = "sim"))]
                if self.has(Bug::SkipsMissing) && self.flush.is_some() {
                    return;
                }
                self.tell(group, at, from, number, &payload, out);
            }
            Item::View(gone) => {
                if !gone.is_empty() {
                    self.configure(group, at, vec![], gone, out);
                }
            }
        }
        if self.flush.is_none() {
            self.drop_strange(group);
        }
    }

    /// Takes an entry from before the own processes' time into the copy.
    fn keep(&mut self, group: &str, entry: Entry) {
        match self.copies.get_mut(group) {
            Some(copy) if copy.is_next(entry.at) => copy.push(entry),
            _ => self.gaps += 1,
        }
    }

    /// What came behind the copy here is not kept any more, so the leaves of all that were members have had their place:
    /// they get nothing of what follows.
    pub(super) fn end_members(&mut self, group: &str, out: &mut Vec<Output>) {
        for process in self.members_here(group) {
            self.locals.remove(&process);
            out.push(Output::Event { process, event: Event::Left });
        }
    }

    /// A node without processes in a group keeps nothing of it, unless it orders it.
    pub(super) fn drop_strange(&mut self, group: &str) {
        let hosts = self.copies.get(group).is_some_and(|c| c.hosts().contains(&self.me));
        if !hosts && self.sequencer(group) != Some(self.me) {
            self.copies.remove(group);
        }
    }

    /// The processes here that have not ended.
    pub(super) fn processes(&self) -> BTreeSet<u64> {
        self.locals.keys().copied().collect()
    }

    fn local(&mut self, process: ProcessId) -> Option<&mut Local> {
        if process.node != self.me {
            return None;
        }
        self.locals.get_mut(&process.number)
    }

    fn members_here(&self, group: &str) -> Vec<u64> {
        let here = self.locals.iter().filter(|(_, l)| l.group == group && l.joined);
        here.map(|(n, _)| *n).collect()
    }

    fn configure(
        &mut self,
        group: &str,
        at: Position,
        joined: Vec<ProcessId>,
        left: Vec<(ProcessId, Reason)>,
        out: &mut Vec<Output>,
    ) {
        let members: Vec<ProcessId> =
            self.copies.get(group).map(|c| c.members.keys().copied().collect()).unwrap_or_default();
        for process in self.members_here(group) {
            if members.contains(&ProcessId { node: self.me, number: process }) {
                let (members, joined, left) = (members.clone(), joined.clone(), left.clone());
                out.push(Output::Event {
                    process,
                    event: Event::Configuration { at, members, joined, left },
                });
            }
        }
    }

    fn tell(
        &mut self,
        group: &str,
        at: Position,
        from: ProcessId,
        number: u64,
        payload: &[u8],
        out: &mut Vec<Output>,
    ) {
        if let Some(local) = self.local(from) {
            while local.pending.front().is_some_and(|p| p.number <= number) {
                local.pending_bytes -= local.pending.pop_front().map_or(0, |p| p.payload.len());
            }
        }
        for process in self.members_here(group) {
            #[cfg(any(test, feature = "sim"))]
            if self.has(Bug::ForgetsItself) && from == (ProcessId { node: self.me, number: process }) {
                continue;
            }
            let event = Event::Message { at, from, number, payload: payload.to_vec() };
            out.push(Output::Event { process, event });
        }
    }

    /// The view has begun here: what was under way in the old one is over, what waits is sent.
    pub(super) fn resume(&mut self, out: &mut Vec<Output>) {
        #[cfg(any(test, feature = "sim"))]
        let (silent, again) = (self.has(Bug::DropsSilently), self.has(Bug::SendsDropped));
        #[cfg(not(any(test, feature = "sim")))]
        let (silent, again) = (false, false);
        for process in self.locals.keys().copied().collect::<Vec<_>>() {
            let Some(local) = self.locals.get_mut(&process) else { continue };
            let mut items = Vec::new();
            let dropped: Vec<u64> = local.pending.iter().filter(|p| p.submitted).map(|p| p.number).collect();
            if let (Some(first), Some(last)) = (dropped.first(), dropped.last()) {
                if !silent {
                    let event = Event::Dropped { first: *first, last: *last };
                    out.push(Output::Event { process, event });
                }
                if !again {
                    local.pending.retain(|p| !p.submitted);
                }
                local.pending_bytes = local.pending.iter().map(|p| p.payload.len()).sum();
            }
            if !local.joined {
                local.since = self.epoch;
                items.push(Item::Join);
            }
            let group = local.group.clone();
            for pending in &mut local.pending {
                pending.submitted = true;
                items.push(Item::Message { number: pending.number, payload: pending.payload.clone() });
            }
            items.extend(local.leaving.map(Item::Leave));
            let (joined, leaves) = (local.joined, local.leaving.is_some());
            let from = ProcessId { node: self.me, number: process };
            let is_member = self.copies.get(&group).is_some_and(|c| c.members.contains_key(&from));
            if joined && leaves && !is_member {
                // Its leave had its place in the old view.
                self.locals.remove(&process);
                out.push(Output::Event { process, event: Event::Left });
                continue;
            }
            for item in items {
                self.submit(process, item, out);
            }
        }
        for group in self.copies.keys().cloned().collect::<Vec<_>>() {
            if let Some(to) = self.sequencer(&group).filter(|s| *s != self.me) {
                let order = self.copies.get(&group).map_or(0, |c| c.at.order);
                self.send(to, &group, Body::Received { order }, out);
            }
        }
        for (from, message) in core::mem::take(&mut self.early) {
            self.take(from, message, out);
        }
    }
}
