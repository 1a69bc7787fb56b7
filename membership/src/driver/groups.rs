//! Process groups on a running node: the group machine between the sessions and the processes.

use crate::face::{GroupHandler, GroupMember, Groups};
use crate::group::{Event, GroupError, GroupMachine, GroupMessage, Output, ProcessId, Reason};
use crate::{
    Epoch, Identity, Membership, SendError, ServiceId, SessionHandler, Sessions, View, ViewListener,
};
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

struct Inner {
    machine: GroupMachine,
    /// What a full peer did not take. Bounded by what a sequencer keeps and by the windows of the senders.
    kept: BTreeMap<Identity, VecDeque<Vec<u8>>>,
    handlers: BTreeMap<u64, Arc<dyn GroupHandler>>,
    /// Events in the machine's order. One thread at a time hands them out.
    events: VecDeque<(u64, Event)>,
    telling: bool,
}

struct Shared {
    me: Identity,
    sessions: Arc<dyn Sessions>,
    inner: Mutex<Inner>,
}

/// The groups of one node. Cloning shares them.
#[derive(Clone)]
pub struct NodeGroups(Arc<Shared>);

impl core::fmt::Debug for NodeGroups {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("NodeGroups").field("me", &self.0.me).finish_non_exhaustive()
    }
}

impl NodeGroups {
    /// Registers with the sessions and subscribes to the views. Called before the node joins, once.
    #[must_use]
    pub fn start(membership: &dyn Membership, sessions: Arc<dyn Sessions>) -> Self {
        let me = membership.me();
        let inner = Inner {
            machine: GroupMachine::new(me),
            kept: BTreeMap::new(),
            handlers: BTreeMap::new(),
            events: VecDeque::new(),
            telling: false,
        };
        let shared = Arc::new(Shared { me, sessions: sessions.clone(), inner: Mutex::new(inner) });
        let listener = Arc::new(Listener(Arc::downgrade(&shared)));
        sessions.register(ServiceId::GROUPS, listener.clone());
        membership.subscribe(listener);
        Self(shared)
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Feeds the machine, sends what it says under the lock, so that the order stays, and tells the processes after it.
    fn feed<T>(&self, feed: impl FnOnce(&mut Inner, &mut Vec<Output>) -> T) -> T {
        let mut inner = self.lock();
        let mut out = Vec::new();
        let result = feed(&mut inner, &mut out);
        for output in out {
            match output {
                Output::Send { to, message } => {
                    inner.kept.entry(to).or_default().push_back(message.encode());
                    self.flush(&mut inner, to);
                }
                Output::Event { process, event } => inner.events.push_back((process, event)),
            }
        }
        self.tell(inner);
        result
    }

    fn flush(&self, inner: &mut Inner, to: Identity) {
        let Some(kept) = inner.kept.get_mut(&to) else { return };
        while let Some(first) = kept.front() {
            match self.sessions.send(to, ServiceId::GROUPS, first.clone()) {
                Err(SendError::Full(_)) => return,
                // A peer that is gone learns nothing more; the next view says what follows from that.
                Ok(()) | Err(SendError::NotMember(_) | SendError::Stopped) => {}
                Err(error) => {
                    tracing::error!(target: "quorate_membership", %to, %error, "a group message was not sent");
                }
            }
            kept.pop_front();
        }
        inner.kept.remove(&to);
    }

    /// A handler may send; what comes of it is told after what was there before.
    fn tell<'a>(&'a self, mut inner: MutexGuard<'a, Inner>) {
        if inner.telling {
            return;
        }
        inner.telling = true;
        while let Some((process, event)) = inner.events.pop_front() {
            let handler = inner.handlers.get(&process).cloned();
            if event == Event::Left {
                inner.handlers.remove(&process);
            }
            drop(inner);
            if let Some(handler) = handler {
                handler.on_event(&event);
            }
            inner = self.lock();
        }
        inner.telling = false;
    }
}

struct Listener(Weak<Shared>);

impl SessionHandler for Listener {
    fn deliver(&self, from: Identity, _: Epoch, payload: &[u8]) {
        let Some(shared) = self.0.upgrade() else { return };
        match GroupMessage::decode(payload) {
            Some(message) => shared.feed(|inner, out| inner.machine.on_message(from, message, out)),
            None => tracing::warn!(target: "quorate_membership", %from, "a group message does not decode"),
        }
    }

    fn on_ready(&self, to: Identity) {
        if let Some(shared) = self.0.upgrade() {
            let mut inner = shared.lock();
            shared.flush(&mut inner, to);
        }
    }
}

impl ViewListener for Listener {
    fn on_view(&self, view: &Arc<View>) {
        if let Some(shared) = self.0.upgrade() {
            shared.feed(|inner, out| {
                inner.kept.retain(|to, _| view.contains(*to));
                inner.machine.on_view(view, out);
            });
        }
    }
}

struct Process {
    shared: Arc<Shared>,
    number: u64,
}

impl GroupMember for Process {
    fn id(&self) -> ProcessId {
        ProcessId { node: self.shared.me, number: self.number }
    }

    fn multicast(&self, payload: Vec<u8>) -> Result<u64, GroupError> {
        self.shared.feed(|inner, out| inner.machine.multicast(self.number, payload, out))
    }

    fn leave(&self) {
        self.shared.feed(|inner, out| inner.machine.leave(self.number, Reason::Left, out));
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.shared.feed(|inner, out| inner.machine.leave(self.number, Reason::Crashed, out));
    }
}

impl Groups for NodeGroups {
    fn join(&self, group: &str, handler: Arc<dyn GroupHandler>) -> Result<Box<dyn GroupMember>, GroupError> {
        let number = self.0.feed(|inner, out| {
            let number = inner.machine.join(group, out)?;
            inner.handlers.insert(number, handler);
            Ok(number)
        })?;
        Ok(Box::new(Process { shared: self.0.clone(), number }))
    }
}
