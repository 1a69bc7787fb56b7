//! The group machine of one node: its processes, its copies of the groups, and the order it gives to those it sequences.

use super::flush::Flush;
use super::wire::{Body, Entry, GroupMessage, Item, Members};
use crate::{Epoch, Identity, NodeId, View};
use serde::{Deserialize, Serialize};
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
/// What a sequencer keeps of a group that not every node has confirmed; then it orders nothing more for now.
const TAIL_MAX: usize = 1_024;
/// A node confirms after so many entries.
const CONFIRM_EVERY: u64 = 32;
/// Groups in which one node may have processes.
const GROUPS_MAX: usize = 256;

/// A process of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ProcessId {
    /// The life of the node it runs on.
    pub node: Identity,
    /// Which of that life's processes; never used twice.
    pub number: u64,
}

impl core::fmt::Display for ProcessId {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{}/{}", self.node, self.number)
    }
}

/// A place in the order of a group. Equal at all its members, and growing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Position {
    /// The record that last changed the members of the cluster.
    pub epoch: Epoch,
    /// Zero is the change itself.
    pub order: u64,
}

/// Why a process is no member any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reason {
    /// It left.
    Left,
    /// It ended without leaving, on a node that lives.
    Crashed,
    /// Its node was removed from the cluster.
    NodeGone,
}

/// What a process is told, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The members from here on. The first one is that of the own join.
    Configuration {
        /// Where in the order.
        at: Position,
        /// Everybody, in one order everywhere.
        members: Vec<ProcessId>,
        /// Who came.
        joined: Vec<ProcessId>,
        /// Who went, and why.
        left: Vec<(ProcessId, Reason)>,
    },
    /// A message of a member; also the own ones.
    Message {
        /// Where in the order.
        at: Position,
        /// The sender.
        from: ProcessId,
        /// As [`GroupMachine::multicast`] returned it to the sender.
        number: u64,
        /// The message.
        payload: Vec<u8>,
    },
    /// The view ended before these own messages had their place: nobody gets them.
    Dropped {
        /// The first.
        first: u64,
        /// The last.
        last: u64,
    },
    /// This process has left; nothing follows.
    Left,
}

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

/// Deliberate mistakes that the simulation must find.
#[cfg(any(test, feature = "sim"))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bug {
    /// A sender delivers its own message before it has its place.
    DeliversAtOnce,
    /// What the others had in the old view is not handed out.
    SkipsMissing,
    /// What is still in order for the old view is taken in while the flush runs.
    TakesOldViews,
    /// What was dropped is sent again in the next view.
    SendsDropped,
    /// What is dropped is not told to its sender.
    DropsSilently,
    /// The own messages are not delivered.
    ForgetsItself,
    /// Processes of removed nodes stay.
    KeepsTheDead,
    /// A message comes from another process than its sender.
    MixesSenders,
    /// A message gets two places.
    OrdersTwice,
    /// The order of joins and leaves is each node's own.
    TellsLeavesEarly,
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
    next_number: u64,
    pending: VecDeque<Pending>,
    pending_bytes: usize,
}

/// A node's copy of a group.
#[derive(Clone, Debug)]
pub(super) struct Copy {
    pub(super) members: Members,
    pub(super) at: Position,
    /// The last entries up to `at`, at least those that some node of the group may not have.
    pub(super) tail: VecDeque<Entry>,
    /// At a member: the last order that was confirmed to the sequencer.
    confirmed: u64,
    /// At the sequencer: how many of this view's places, from zero on, each node has confirmed.
    received: BTreeMap<Identity, u64>,
    /// At the sequencer: what waits until more is confirmed.
    waiting: VecDeque<(ProcessId, Item)>,
}

impl Copy {
    pub(super) fn new(members: Members, at: Position) -> Self {
        Self {
            members,
            at,
            tail: VecDeque::new(),
            confirmed: 0,
            received: BTreeMap::new(),
            waiting: VecDeque::new(),
        }
    }

    /// What belongs to the view that ends.
    pub(super) fn forget_view(&mut self) {
        self.confirmed = 0;
        self.received.clear();
        self.waiting.clear();
    }

    fn hosts(&self) -> BTreeSet<Identity> {
        self.members.keys().map(|p| p.node).collect()
    }

    /// The next entry.
    pub(super) fn push(&mut self, entry: Entry) {
        match &entry.item {
            Item::Join => drop(self.members.insert(entry.from, 0)),
            Item::Leave(_) => drop(self.members.remove(&entry.from)),
            Item::Message { number, .. } => drop(self.members.insert(entry.from, *number)),
            Item::View(gone) => self.members.retain(|p, _| !gone.contains(p)),
        }
        self.at = entry.at;
        self.tail.push_back(entry);
    }
}

/// All groups as one life of one node sees them.
#[derive(Debug)]
pub struct GroupMachine {
    pub(super) me: Identity,
    /// The members of the cluster, and the record that last changed them.
    pub(super) nodes: BTreeMap<NodeId, Identity>,
    pub(super) epoch: Epoch,
    pub(super) flush: Option<Flush>,
    pub(super) copies: BTreeMap<String, Copy>,
    locals: BTreeMap<u64, Local>,
    next_process: u64,
    /// Messages of this view that came before it began here.
    early: VecDeque<(Identity, GroupMessage)>,
    loopback: VecDeque<GroupMessage>,
    #[cfg(any(test, feature = "sim"))]
    bug: Option<Bug>,
}

impl GroupMachine {
    /// The groups of `me`.
    #[must_use]
    pub fn new(me: Identity) -> Self {
        Self {
            me,
            nodes: BTreeMap::new(),
            epoch: Epoch(0),
            flush: None,
            copies: BTreeMap::new(),
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
        let nodes: BTreeMap<NodeId, Identity> =
            view.members.iter().map(|(n, i)| (*n, Identity::new(*n, *i))).collect();
        if nodes == self.nodes {
            return;
        }
        self.nodes = nodes;
        if self.nodes.get(&self.me.node) != Some(&self.me) {
            // This life is over, or has not begun.
            self.nodes.clear();
            return;
        }
        self.epoch = view.epoch;
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
        let message = GroupMessage { epoch: self.epoch, group: group.to_owned(), body };
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
        let old = message.epoch != self.epoch;
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
            self.early.push_back((from, GroupMessage { epoch: self.epoch, group, body }));
            return;
        }
        match body {
            Body::Submit { from: process, item } if process.node == from => {
                if self.sequencer(&group) == Some(self.me) {
                    self.order(&group, process, item, out);
                }
            }
            Body::Ordered { entry, stable } => {
                self.append(&group, entry, out);
                self.confirm(&group, stable, out);
            }
            Body::Welcome { members, at } => {
                self.copies.insert(group, Copy::new(members, at));
            }
            Body::Kept(entry) => {
                if let Some(copy) = self.copies.get_mut(&group).filter(|c| c.at < entry.at) {
                    copy.push(entry);
                }
            }
            Body::Received { order } => self.on_received(&group, from, order, out),
            _ => {}
        }
    }

    /// As the sequencer: gives an item its place, behind what waits.
    fn order(&mut self, group: &str, from: ProcessId, item: Item, out: &mut Vec<Output>) {
        let at = Position { epoch: self.epoch, order: 0 };
        let copy = self.copies.entry(group.to_owned()).or_insert_with(|| Copy::new(Members::new(), at));
        copy.waiting.push_back((from, item));
        self.order_waiting(group, out);
    }

    /// As the sequencer: orders what waits, as long as not too much is unconfirmed.
    fn order_waiting(&mut self, group: &str, out: &mut Vec<Output>) {
        loop {
            self.forget(group, self.stable(group));
            let Some(copy) = self.copies.get_mut(group).filter(|c| c.tail.len() < TAIL_MAX) else { return };
            let Some((process, item)) = copy.waiting.pop_front() else { return };
            self.place(group, process, item, out);
        }
    }

    fn place(&mut self, group: &str, from: ProcessId, item: Item, out: &mut Vec<Output>) {
        let (me, epoch) = (self.me, self.epoch);
        let Some(copy) = self.copies.get_mut(group) else { return };
        let known = copy.members.get(&from).copied();
        let fits = match (&item, known) {
            (Item::Join, None) | (Item::Leave(_), Some(_)) => true,
            // What was dropped at the end of a view leaves a gap.
            (Item::Message { number, .. }, Some(last)) => last < *number,
            _ => false,
        };
        if !fits {
            return;
        }
        let mut hosts = copy.hosts();
        let before = copy.at;
        // A new node has nothing until what it is sent arrives.
        let mut stable_max = u64::MAX;
        if item == Item::Join && hosts.insert(from.node) {
            // With what others may miss: whoever was a member longer may die before they have it.
            let ((members, at), tail) = (super::flush::before_tail(copy), copy.tail.clone());
            let has = if at.epoch == epoch { at.order + 1 } else { 0 };
            copy.received.insert(from.node, has);
            stable_max = has;
            if from.node != me {
                self.send(from.node, group, Body::Welcome { members, at }, out);
                for entry in tail {
                    self.send(from.node, group, Body::Kept(entry), out);
                }
            }
        }
        hosts.remove(&me);
        #[cfg(any(test, feature = "sim"))]
        let from = match (&item, self.bug) {
            (Item::Message { .. }, Some(Bug::MixesSenders)) => {
                let members = self.copies.get(group).map(|c| c.members.clone()).unwrap_or_default();
                members.keys().next().copied().unwrap_or(from)
            }
            _ => from,
        };
        #[cfg(any(test, feature = "sim"))]
        let times = if self.has(Bug::OrdersTwice) && matches!(item, Item::Message { .. }) { 2 } else { 1 };
        #[cfg(not(any(test, feature = "sim")))]
        let times = 1;
        for place in 1..=times {
            let at = Position { epoch, order: before.order + place };
            let entry = Entry { at, from, item: item.clone() };
            let stable = self.stable(group).min(stable_max);
            for host in &hosts {
                self.send(*host, group, Body::Ordered { entry: entry.clone(), stable }, out);
            }
            self.append(group, entry, out);
            self.confirm(group, stable, out);
        }
    }

    /// As the sequencer: how many of this view's places every node of the group has.
    fn stable(&self, group: &str) -> u64 {
        let Some(copy) = self.copies.get(group) else { return 0 };
        let hosts = copy.hosts();
        let others = hosts.iter().filter(|h| **h != self.me);
        others.map(|h| copy.received.get(h).copied().unwrap_or(0)).min().unwrap_or(copy.at.order + 1)
    }

    fn on_received(&mut self, group: &str, from: Identity, order: u64, out: &mut Vec<Output>) {
        let Some(copy) = self.copies.get_mut(group) else { return };
        let known = copy.received.entry(from).or_default();
        *known = (*known).max(order.saturating_add(1));
        self.order_waiting(group, out);
    }

    fn forget(&mut self, group: &str, stable: u64) {
        let Some(order) = stable.checked_sub(1) else { return };
        let last = Position { epoch: self.epoch, order };
        if let Some(copy) = self.copies.get_mut(group) {
            while copy.tail.front().is_some_and(|e| e.at <= last) {
                copy.tail.pop_front();
            }
        }
    }

    /// Confirms from time to time, and forgets what everybody has.
    fn confirm(&mut self, group: &str, stable: u64, out: &mut Vec<Output>) {
        self.forget(group, stable);
        let sequencer = self.sequencer(group);
        let Some(copy) = self.copies.get_mut(group) else { return };
        if sequencer == Some(self.me) || copy.at.order < copy.confirmed + CONFIRM_EVERY {
            return;
        }
        copy.confirmed = copy.at.order;
        let order = copy.at.order;
        if let Some(to) = sequencer {
            self.send(to, group, Body::Received { order }, out);
        }
    }

    /// Takes the next entry of a group's order into the copy, and tells the processes.
    pub(super) fn append(&mut self, group: &str, entry: Entry, out: &mut Vec<Output>) {
        let Some(copy) = self.copies.get_mut(group) else { return };
        if entry.at <= copy.at {
            return;
        }
        let Entry { at, from, item } = entry.clone();
        copy.push(entry);
        match item {
            Item::Join => {
                if let Some(local) = self.local(from) {
                    local.joined = true;
                }
                self.configure(group, at, vec![from], vec![], out);
            }
            Item::Leave(reason) => {
                self.configure(group, at, vec![], vec![(from, reason)], out);
                if self.local(from).is_some() {
                    self.locals.remove(&from.number);
                    out.push(Output::Event { process: from.number, event: Event::Left });
                }
            }
            Item::Message { number, payload } => {
                self.tell(group, at, from, number, &payload, out);
            }
            Item::View(gone) => {
                if !gone.is_empty() {
                    let left = gone.into_iter().map(|p| (p, Reason::NodeGone)).collect();
                    self.configure(group, at, vec![], left, out);
                }
            }
        }
        let hosts = self.copies.get(group).is_some_and(|c| c.hosts().contains(&self.me));
        if !hosts && self.flush.is_none() && self.sequencer(group) != Some(self.me) {
            self.copies.remove(group);
        }
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
