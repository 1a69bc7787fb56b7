//! The distributed lock manager on a node: the machines, with membership, sessions, time and callers around them.
//!
//! Calls and messages enter a shard on the thread that brings them, and what follows is called back on that thread: a
//! lock that can be granted here costs neither a task switch nor a message. No protocol decision is taken here.

mod handle;
mod outgoing;
mod search;
mod space;

use crate::deliver::lock;
use crate::local::check_options;
use crate::machine::deadlock::{Search, SearchInput, SearchMessage};
use crate::table::name_hash;
use crate::wire::Frame;
use crate::{JoinError, LockManager, Lockspace, LockspaceDump, LockspaceOptions, LockspaceStats};
use core::time::Duration;
use event_listener::Event;
use handle::Handle;
use outgoing::Outgoing;
use quorate_membership::metrics::{Collect, Exposition};
use quorate_membership::{
    AttachRequest, BoxFuture, Epoch, Identity, Instant, Lease, Membership, Proof, Refusal, Request,
    RequestError, ResourceId, ResourceKind, Runtime, ServiceId, SessionHandler, Sessions, View, ViewListener,
};
use space::Space;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};

/// How long to wait before a proposal is made again.
const RETRY: Duration = Duration::from_millis(100);
/// How often a join is proposed before it is given up.
const JOIN_TRIES: u32 = 100;
/// How long the task for deadlines sleeps at least, so that many small deadlines cost one wake-up.
const TICK_MIN: Duration = Duration::from_millis(2);
/// How long it sleeps at most: deadlines that nobody announces (unused resources, old waits) come so late.
const TICK_MAX: Duration = Duration::from_millis(100);
/// How often a frozen node looks whether it may answer again.
const FROZEN_POLL: Duration = Duration::from_millis(5);

/// The lock manager of a node.
pub struct Dlm {
    /// Itself, for what outlives a call.
    this: Weak<Self>,
    me: Identity,
    membership: Arc<dyn Membership>,
    /// Membership's.
    lease: Lease,
    runtime: Arc<dyn Runtime>,
    outgoing: Arc<Outgoing>,
    spaces: Mutex<Spaces>,
    is_thawing: AtomicBool,
    /// Told when a view came, a shard got further, or all is over.
    changed: Event,
    /// Told when a deadline may have come nearer.
    timer: Event,
    search: Mutex<Search>,
    /// A shard has suspected a deadlock.
    suspects: AtomicBool,
}

#[derive(Default)]
struct Spaces {
    view: Option<Arc<View>>,
    by_hash: BTreeMap<u64, Arc<Space>>,
    stopped: Option<String>,
}

impl core::fmt::Debug for Dlm {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Dlm").field("me", &self.me).finish_non_exhaustive()
    }
}

impl Dlm {
    /// Starts the lock manager: registers with sessions, subscribes to views, and starts its background task. Call it
    /// before the node joins.
    #[must_use]
    pub fn new(
        membership: Arc<dyn Membership>,
        sessions: Arc<dyn Sessions>,
        runtime: Arc<dyn Runtime>,
    ) -> Arc<Self> {
        let dlm = Arc::new_cyclic(|this| Self {
            this: this.clone(),
            me: membership.me(),
            outgoing: Arc::new(Outgoing::new(sessions.clone(), runtime.clone())),
            lease: membership.lease(),
            membership: membership.clone(),
            runtime: runtime.clone(),
            spaces: Mutex::default(),
            is_thawing: AtomicBool::new(false),
            changed: Event::new(),
            timer: Event::new(),
            search: Mutex::new(Search::new(membership.me(), None)),
            suspects: AtomicBool::new(false),
        });
        sessions.register(ServiceId::DLM, dlm.clone());
        membership.subscribe(dlm.clone());
        let weak = Arc::downgrade(&dlm);
        runtime.clone().spawn(Box::pin(tick(weak, runtime)));
        dlm
    }

    /// All lockspaces of this node, with the resources it masters and its locks elsewhere.
    #[must_use]
    pub fn dump(&self) -> Vec<LockspaceDump> {
        let now = self.now();
        self.all().iter().map(|s| s.dump(now)).collect()
    }

    /// What each lockspace did on this node since it was joined.
    #[must_use]
    pub fn stats(&self) -> BTreeMap<String, LockspaceStats> {
        self.all().iter().map(|s| (s.options.name.clone(), s.stats())).collect()
    }

    fn all(&self) -> Vec<Arc<Space>> {
        lock(&self.spaces).by_hash.values().cloned().collect()
    }

    fn is_valid(&self) -> bool {
        self.lease.is_valid(self.runtime.now())
    }

    /// Makes the calls that wait, if the node may answer (R8); otherwise as soon as it may again.
    fn deliver(self: &Arc<Self>, space: &Space, index: usize) {
        if self.is_valid() {
            space.deliver(index);
        } else if !self.is_thawing.swap(true, Ordering::AcqRel) {
            let dlm = self.clone();
            self.runtime.spawn(Box::pin(async move {
                while !dlm.is_valid() && lock(&dlm.spaces).stopped.is_none() {
                    dlm.runtime.sleep_until(dlm.runtime.now() + FROZEN_POLL).await;
                }
                dlm.is_thawing.store(false, Ordering::Release);
                for space in dlm.all() {
                    space.deliver_all();
                }
            }));
        }
    }

    /// All shards have done their part of `map`: tell the cluster, once for each debt that asks for it.
    fn prove_rebuilt(self: &Arc<Self>, name: &str, map: Epoch) {
        let (dlm, name) = (self.clone(), name.to_owned());
        self.runtime.spawn(Box::pin(async move {
            let resource = ResourceId::new(ResourceKind::Lockspace, name);
            let owed: Vec<Identity> = dlm
                .membership
                .view()
                .debts
                .iter()
                .filter(|(_, d)| d.removed <= map && d.items.get(&resource).is_some_and(|i| !i.rebuilt))
                .map(|(who, _)| *who)
                .collect();
            for debtor in owed {
                let request = Request::Prove {
                    debtor,
                    resources: [resource.clone()].into(),
                    proof: Proof::Rebuilt { epoch: map },
                };
                let is_open = |view: &View| {
                    let item = view.debts.get(&debtor).and_then(|d| d.items.get(&resource));
                    item.is_some_and(|i| !i.rebuilt)
                };
                if let Err(error) = dlm.propose_while(request, is_open).await {
                    tracing::warn!(target: "quorate_dlm", %debtor, %error, "cannot prove the rebuild");
                }
            }
        }));
    }

    /// Proposes again and again while the cluster cannot decide and `wanted` holds of the view.
    async fn propose_while(
        &self,
        request: Request,
        wanted: impl Fn(&View) -> bool + Send,
    ) -> Result<(), RequestError> {
        loop {
            match self.membership.propose(request.clone()).await {
                Ok(_) => return Ok(()),
                Err(RequestError::NotQuorate { .. } | RequestError::Unknown(_)) => {}
                Err(RequestError::Refused(Refusal::NoDebt(_))) => return Ok(()),
                Err(error) => return Err(error),
            }
            if lock(&self.spaces).stopped.is_some() || !wanted(&self.membership.view()) {
                return Ok(());
            }
            self.runtime.sleep_until(self.runtime.now() + RETRY).await;
        }
    }

    async fn wait_until<T>(&self, mut ready: impl FnMut() -> Option<T>) -> T {
        loop {
            let changed = self.changed.listen();
            if let Some(value) = ready() {
                return value;
            }
            changed.await;
        }
    }

    fn refused(&self, name: &str, source: RequestError) -> JoinError {
        JoinError::Refused { name: name.to_owned(), source }
    }

    async fn join_space(
        self: &Arc<Self>,
        options: &LockspaceOptions,
    ) -> Result<Arc<dyn Lockspace>, JoinError> {
        check_options(options)?;
        let resource = ResourceId::new(ResourceKind::Lockspace, options.name.clone());
        if let Some(space) = lock(&self.spaces).by_hash.get(&name_hash(options.name.as_bytes())) {
            return space.join_again(options, self);
        }
        // A former life of this node first has to be over (R6).
        let is_open = || {
            let spaces = lock(&self.spaces);
            let mut owing = spaces.view.as_ref().map(|v| v.owing(&resource)).into_iter().flatten();
            owing.any(|(who, item)| who.node == self.me.node && !(item.fenced && item.rebuilt))
        };
        self.wait_until(|| (!is_open() || self.is_stopped()).then_some(())).await;
        let view = self.membership.view();
        if let Some(other) = view.attached(&resource).find(|a| a.owner != self.me)
            && (other.safety, &other.servers) != (options.safety, &options.servers)
        {
            return Err(JoinError::Mismatch {
                name: options.name.clone(),
                theirs: format!("{:?} {:?}", other.safety, other.servers),
                ours: format!("{:?} {:?}", options.safety, options.servers),
            });
        }
        if view.attached(&resource).any(|a| a.owner == self.me) {
            // Left over from a join whose outcome was unknown: what was registered with it then is lost.
            let request = Request::Detach(resource.clone());
            let detached = self.propose_while(request, |_| true).await;
            detached.map_err(|source| self.refused(&options.name, source))?;
        }
        let space = self.open_space(options)?;
        let joined = self.attach(&space, options, &resource).await;
        if joined.is_err() {
            self.close_space(&space);
        }
        joined.map(|()| Arc::new(Handle::new(space, self)) as Arc<dyn Lockspace>)
    }

    /// A lockspace that follows the views but has no part in them yet.
    fn open_space(self: &Arc<Self>, options: &LockspaceOptions) -> Result<Arc<Space>, JoinError> {
        let mut spaces = lock(&self.spaces);
        if spaces.stopped.is_some() {
            return Err(self.refused(&options.name, RequestError::NotMember(self.me)));
        }
        let space = Arc::new(Space::new(self.me, options));
        if let Some(view) = &spaces.view {
            space.view(self, view, self.runtime.now());
        }
        if spaces.by_hash.contains_key(&space.hash) {
            return Err(JoinError::Invalid("another lockspace with this name, or its hash, is being joined"));
        }
        spaces.by_hash.insert(space.hash, space.clone());
        Ok(space)
    }

    fn close_space(&self, space: &Arc<Space>) {
        let mut spaces = lock(&self.spaces);
        if spaces.by_hash.get(&space.hash).is_some_and(|s| Arc::ptr_eq(s, space)) {
            spaces.by_hash.remove(&space.hash);
        }
    }

    async fn attach(
        self: &Arc<Self>,
        space: &Arc<Space>,
        options: &LockspaceOptions,
        resource: &ResourceId,
    ) -> Result<(), JoinError> {
        let request = Request::Attach(AttachRequest {
            resource: resource.clone(),
            safety: options.safety,
            servers: options.servers.clone(),
            journals: None,
            lockspace: None,
            exclusive: false,
        });
        let mut tries = 0;
        loop {
            match self.membership.propose(request.clone()).await {
                Ok(_) => break,
                Err(RequestError::NotQuorate { .. } | RequestError::Unknown(_)) if tries < JOIN_TRIES => {
                    tries += 1;
                    self.runtime.sleep_until(self.runtime.now() + RETRY).await;
                }
                Err(source) => return Err(self.refused(&options.name, source)),
            }
        }
        let result = self
            .wait_until(|| match (space.mismatch(), self.is_stopped()) {
                (Some(theirs), _) => Some(Err(JoinError::Mismatch {
                    name: options.name.clone(),
                    theirs,
                    ours: format!("value blocks of {} bytes, holds {:?}", options.value_bytes, options.holds),
                })),
                (None, true) => Some(Err(self.refused(&options.name, RequestError::NotMember(self.me)))),
                (None, false) => space.is_ready().then_some(Ok(())),
            })
            .await;
        if matches!(result, Err(JoinError::Mismatch { .. })) {
            let detached = self.propose_while(Request::Detach(resource.clone()), |_| true).await;
            detached.map_err(|source| self.refused(&options.name, source))?;
        }
        result
    }

    async fn leave_space(self: &Arc<Self>, name: &str) -> Result<(), JoinError> {
        let space = lock(&self.spaces).by_hash.get(&name_hash(name.as_bytes())).cloned();
        let space = space.ok_or_else(|| JoinError::NotJoined(name.to_owned()))?;
        space.close(self).map_err(|locks| JoinError::Busy { name: name.to_owned(), locks })?;
        self.wait_until(|| (space.is_quiet() || self.is_stopped()).then_some(())).await;
        let resource = ResourceId::new(ResourceKind::Lockspace, name);
        let result = self.propose_while(Request::Detach(resource), |_| true).await;
        self.close_space(&space);
        result.map_err(|source| self.refused(name, source))
    }

    fn is_stopped(&self) -> bool {
        lock(&self.spaces).stopped.is_some()
    }
}

/// Feeds the shards their deadlines, as long as the lock manager lives.
async fn tick(dlm: Weak<Dlm>, runtime: Arc<dyn Runtime>) {
    loop {
        let (sooner, at) = {
            let Some(dlm) = dlm.upgrade() else { return };
            // Listening before looking: a deadline that is made meanwhile is not missed.
            let sooner = dlm.timer.listen();
            let searches = lock(&dlm.search).next_deadline();
            let at = dlm.all().iter().filter_map(|s| s.next_deadline()).chain(searches).min();
            (sooner, at)
        };
        let (soonest, latest) = (runtime.now() + TICK_MIN, runtime.now() + TICK_MAX);
        let sleep = runtime.sleep_until(at.map_or(latest, |at| at.min(latest)).max(soonest));
        futures_util::future::select(sooner, sleep).await;
        let Some(dlm) = dlm.upgrade() else { return };
        if dlm.is_stopped() {
            return;
        }
        let now = runtime.now();
        for space in dlm.all() {
            space.tick(&dlm, now);
        }
        let suspects = dlm.suspects.swap(false, Ordering::AcqRel);
        dlm.search(if suspects { SearchInput::Suspect } else { SearchInput::Tick });
    }
}

impl Collect for Dlm {
    fn collect(&self, out: &mut Exposition) {
        let stats = self.stats();
        crate::stats::expose(stats.iter().map(|(name, stats)| (name.as_str(), *stats)), out);
        for space in self.all() {
            let labels = [("lockspace", space.options.name.as_str())];
            let locks = space.lock_count() as f64;
            out.gauge("quorate_dlm_locks", "Locks that this node has or wants.", &labels, locks);
            let ready = f64::from(u8::from(space.is_ready()));
            out.gauge("quorate_dlm_rebuilt", "1 unless the lockspace is being rebuilt here.", &labels, ready);
        }
    }
}

impl ViewListener for Dlm {
    fn on_view(&self, view: &Arc<View>) {
        let Some(dlm) = self.this.upgrade() else { return };
        let now = self.runtime.now();
        let spaces: Vec<Arc<Space>> = {
            let mut spaces = lock(&self.spaces);
            spaces.view = Some(view.clone());
            for space in spaces.by_hash.values() {
                space.view(&dlm, view, now);
            }
            spaces.by_hash.values().cloned().collect()
        };
        for space in spaces {
            space.deliver_changed(&dlm);
        }
        dlm.search(SearchInput::of(view));
        self.changed.notify(usize::MAX);
    }

    fn on_quorum(&self, quorate: bool) {
        if quorate && let Some(dlm) = self.this.upgrade() {
            for space in self.all() {
                space.deliver_changed(&dlm);
            }
        }
    }

    fn on_stop(&self, reason: &str) {
        let spaces = {
            let mut spaces = lock(&self.spaces);
            spaces.stopped.get_or_insert_with(|| reason.to_owned());
            core::mem::take(&mut spaces.by_hash)
        };
        for space in spaces.into_values() {
            space.stop();
        }
        self.changed.notify(usize::MAX);
    }
}

impl SessionHandler for Dlm {
    fn deliver(&self, from: Identity, _epoch: Epoch, payload: &[u8]) {
        if SearchMessage::is_one(payload) {
            match (SearchMessage::decode(payload), self.this.upgrade()) {
                (Some(message), Some(dlm)) => dlm.search(SearchInput::Message { from, message }),
                (None, _) => {
                    tracing::warn!(target: "quorate_dlm", node = %from, "a search frame was dropped")
                }
                _ => {}
            }
            return;
        }
        let frame = match Frame::decode(payload) {
            Ok(frame) => frame,
            Err(error) => {
                tracing::warn!(target: "quorate_dlm", node = %from, %error, "a frame was dropped");
                return;
            }
        };
        let Some(dlm) = self.this.upgrade() else { return };
        let space = lock(&self.spaces).by_hash.get(&frame.header.space).cloned();
        // Not joined any more: whoever needs an answer learns from the view.
        if let Some(space) = space {
            space.receive(&dlm, from, frame, self.now());
        }
    }
}

impl Dlm {
    fn now(&self) -> Instant {
        self.runtime.now()
    }
}

impl LockManager for Dlm {
    fn join<'a>(
        &'a self,
        options: &'a LockspaceOptions,
    ) -> BoxFuture<'a, Result<Arc<dyn Lockspace>, JoinError>> {
        Box::pin(async move {
            let gone = || self.refused(&options.name, RequestError::NotMember(self.me));
            self.this.upgrade().ok_or_else(gone)?.join_space(options).await
        })
    }

    fn leave<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<(), JoinError>> {
        Box::pin(async move {
            let gone = || JoinError::NotJoined(name.to_owned());
            self.this.upgrade().ok_or_else(gone)?.leave_space(name).await
        })
    }
}
