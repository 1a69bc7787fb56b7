//! The paths to the other nodes: one for each address of theirs. Which carry something, and what they carried.
//!
//! Heartbeats go over all of them. A path is *silent* when nothing came over it for a few heartbeat intervals; then the
//! sessions leave it for another one, which they have as a spare connection, long before anybody is suspected.

use crate::{Instant, NodeId};
use core::time::Duration;
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A path is silent after so many heartbeat intervals: what one lost packet does not do, and half of the detection time.
const SILENT_INTERVALS: u32 = 4;

/// One path to one node, as this node sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkStatus {
    /// The other node.
    pub peer: NodeId,
    /// Which of the addresses of the end that dialled was dialled; zero is the first.
    pub path: u8,
    /// Something came over it lately.
    pub up: bool,
    /// The sessions use it at present.
    pub carries_sessions: bool,
    /// How long nothing came over it; `None` if nothing ever did.
    pub silence: Option<Duration>,
    /// How often it became silent or was cut.
    pub downs: u64,
    /// Control messages that came over it.
    pub received: u64,
    /// Control messages given to it.
    pub sent: u64,
    /// The round trip as QUIC measures it; none over TCP.
    pub rtt: Option<Duration>,
    /// Packets that QUIC found lost on the present connection.
    pub lost_packets: Option<u64>,
}

#[derive(Debug, Default)]
struct Entry {
    connections: usize,
    last_heard: Option<Instant>,
    was_up: bool,
    downs: u64,
    received: u64,
    sent: u64,
    session_links: usize,
    measured: Option<(Duration, u64)>,
}

/// All paths of a node.
#[derive(Debug)]
pub(super) struct LinkTable {
    silent_after: Duration,
    entries: Mutex<BTreeMap<(NodeId, u8), Entry>>,
}

impl LinkTable {
    pub(super) fn new(heartbeat_interval: Duration) -> Self {
        Self { silent_after: heartbeat_interval * SILENT_INTERVALS, entries: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<(NodeId, u8), Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_up(&self, entry: &Entry, now: Instant) -> bool {
        0 < entry.connections && entry.last_heard.is_some_and(|at| now < at + self.silent_after)
    }

    /// A control connection is there: it counts as a word.
    pub(super) fn connected(&self, node: NodeId, path: u8, now: Instant) {
        let mut entries = self.lock();
        let entry = entries.entry((node, path)).or_default();
        entry.connections += 1;
        entry.last_heard = Some(now);
        entry.was_up = true;
    }

    pub(super) fn disconnected(&self, node: NodeId, path: u8) {
        if let Some(entry) = self.lock().get_mut(&(node, path)) {
            entry.connections = entry.connections.saturating_sub(1);
        }
    }

    pub(super) fn heard(&self, node: NodeId, path: u8, now: Instant) {
        let mut entries = self.lock();
        let entry = entries.entry((node, path)).or_default();
        entry.received += 1;
        entry.last_heard = Some(now);
        entry.was_up = true;
    }

    pub(super) fn sent(&self, node: NodeId, path: u8, measured: Option<(Duration, u64)>) {
        let mut entries = self.lock();
        let entry = entries.entry((node, path)).or_default();
        entry.sent += 1;
        entry.measured = measured;
    }

    /// The sessions began to use a connection of this path, or ceased to.
    pub(super) fn sessions(&self, node: NodeId, path: u8, uses: bool) {
        let mut entries = self.lock();
        let entry = entries.entry((node, path)).or_default();
        entry.session_links =
            if uses { entry.session_links + 1 } else { entry.session_links.saturating_sub(1) };
    }

    /// The first path that is not silent.
    pub(super) fn best(&self, node: NodeId, now: Instant) -> Option<u8> {
        let entries = self.lock();
        let mut up = entries.range((node, 0)..=(node, u8::MAX)).filter(|(_, e)| self.is_up(e, now));
        up.next().map(|((_, path), _)| *path)
    }

    /// Whether something came over it lately.
    pub(super) fn speaks(&self, node: NodeId, path: u8, now: Instant) -> bool {
        self.lock().get(&(node, path)).is_some_and(|e| self.is_up(e, now))
    }

    /// Paths that became silent since the last call, of nodes that are heard over another one.
    pub(super) fn newly_silent(&self, now: Instant) -> Vec<(NodeId, u8)> {
        let mut entries = self.lock();
        let up: Vec<(NodeId, u8)> =
            entries.iter().filter(|(_, e)| self.is_up(e, now)).map(|(k, _)| *k).collect();
        let mut silent = Vec::new();
        for (key, entry) in entries.iter_mut().filter(|(_, e)| e.was_up) {
            if up.contains(key) {
                continue;
            }
            let other = up.iter().any(|(node, _)| *node == key.0);
            // With all paths silent it may be we who paused: nothing is told before one of them speaks again.
            if other {
                entry.was_up = false;
                entry.downs += 1;
                silent.push(*key);
            }
        }
        silent
    }

    pub(super) fn all(&self, now: Instant) -> Vec<LinkStatus> {
        let entries = self.lock();
        let all = entries.iter().map(|((peer, path), e)| LinkStatus {
            peer: *peer,
            path: *path,
            up: self.is_up(e, now),
            carries_sessions: 0 < e.session_links,
            silence: e.last_heard.map(|at| now.since(at)),
            downs: e.downs,
            received: e.received,
            sent: e.sent,
            rtt: e.measured.map(|m| m.0),
            lost_packets: e.measured.map(|m| m.1),
        });
        all.collect()
    }
}
