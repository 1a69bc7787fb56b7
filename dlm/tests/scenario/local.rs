//! The local lock manager, several handles to one table, with a clock that only scenarios move.

use crate::format::Told;
use crate::player::{Fault, NotHere, Setup, World};
use futures_util::future::FutureExt;
use futures_util::task::noop_waker_ref;
use quorate_dlm::local::LocalManager;
use quorate_dlm::{
    Completion, ConvertRequest, LockCallbacks, LockError, LockId, LockManager, LockName, LockRequest,
    Lockspace, LockspaceOptions, Mode, ResourceDump, UnlockRequest,
};
use quorate_membership::{BoxFuture, Instant, NodeId, Runtime};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

/// Time by hand.
#[derive(Default)]
struct Clock {
    now: Arc<AtomicU64>,
    tasks: Mutex<Vec<BoxFuture<'static, ()>>>,
}

impl Clock {
    fn advance(&self, time: Duration) {
        self.now.fetch_add(u64::try_from(time.as_nanos()).unwrap(), Ordering::SeqCst);
        let mut tasks = std::mem::take(&mut *self.tasks.lock().unwrap());
        tasks.retain_mut(|t| t.poll_unpin(&mut Context::from_waker(noop_waker_ref())).is_pending());
        self.tasks.lock().unwrap().extend(tasks);
    }
}

impl Runtime for Clock {
    fn now(&self) -> Instant {
        // Every look is later than the one before, as on a real machine.
        Instant(self.now.fetch_add(1, Ordering::SeqCst))
    }
    fn sleep_until(&self, at: Instant) -> BoxFuture<'static, ()> {
        let now = self.now.clone();
        Box::pin(std::future::poll_fn(move |_| {
            if at.0 <= now.load(Ordering::SeqCst) { Poll::Ready(()) } else { Poll::Pending }
        }))
    }
    fn spawn(&self, mut task: BoxFuture<'static, ()>) {
        if task.poll_unpin(&mut Context::from_waker(noop_waker_ref())).is_pending() {
            self.tasks.lock().unwrap().push(task);
        }
    }
}

#[derive(Default)]
struct Recorder(Mutex<Vec<(LockId, Told)>>);

impl LockCallbacks for Recorder {
    fn completion(&self, id: LockId, completion: Completion) {
        self.0.lock().unwrap().push((id, Told::Done(completion)));
    }
    fn blocking(&self, id: LockId, mode: Mode) {
        self.0.lock().unwrap().push((id, Told::Blocking(mode)));
    }
}

pub(crate) struct Local {
    managers: Vec<LocalManager>,
    nodes: Vec<(Arc<dyn Lockspace>, Arc<Recorder>)>,
    clock: Arc<Clock>,
}

impl Local {
    pub(crate) fn new(setup: Setup) -> Self {
        let clock = Arc::new(Clock::default());
        let managers: Vec<LocalManager> =
            LocalManager::shared(setup.nodes).into_iter().map(|m| m.with_runtime(clock.clone())).collect();
        let options = LockspaceOptions { holds: setup.holds, ..LockspaceOptions::plain("test") };
        let join = |m: &LocalManager| m.join(&options).now_or_never().unwrap().unwrap();
        let nodes = managers.iter().map(|m| (join(m), Arc::new(Recorder::default()))).collect();
        Self { managers, nodes, clock }
    }

    fn node(&self, node: u32) -> &(Arc<dyn Lockspace>, Arc<Recorder>) {
        &self.nodes[node as usize - 1]
    }
}

impl World for Local {
    const HAS_MASTERS: bool = false;
    fn request(&mut self, node: u32, request: LockRequest) -> Result<LockId, LockError> {
        let (space, recorder) = self.node(node);
        space.request(request, recorder.clone())
    }
    fn convert(&mut self, node: u32, id: LockId, request: ConvertRequest) -> Result<(), LockError> {
        self.node(node).0.convert(id, request)
    }
    fn unlock(&mut self, node: u32, id: LockId, request: UnlockRequest) -> Result<(), LockError> {
        self.node(node).0.unlock(id, request)
    }
    fn cancel(&mut self, node: u32, id: LockId) -> Result<(), LockError> {
        self.node(node).0.cancel(id)
    }
    fn exit(&mut self, node: u32, owner: u64) {
        self.node(node).0.close_owner(owner);
        // Nobody is left to be told.
        self.node(node).1.0.lock().unwrap().retain(|(_, t)| *t != Told::Done(Completion::Unlocked));
    }
    fn purge(&mut self, node: u32, of: u32, pid: u32) {
        self.node(node).0.purge(NodeId(of), pid);
        self.node(of).1.0.lock().unwrap().retain(|(_, t)| *t != Told::Done(Completion::Unlocked));
    }
    fn has(&self, node: u32) -> bool {
        1 <= node && node as usize <= self.nodes.len()
    }
    fn settle(&mut self) {}
    fn advance(&mut self, time: Duration) {
        self.clock.advance(time);
    }
    fn told(&mut self) -> Vec<(u32, LockId, Told)> {
        let all = self.nodes.iter().enumerate();
        all.flat_map(|(n, (_, r))| {
            let told = std::mem::take(&mut *r.0.lock().unwrap());
            told.into_iter().map(move |(id, t)| (n as u32 + 1, id, t))
        })
        .collect()
    }
    fn undecided(&mut self) -> Vec<Vec<(u32, LockId)>> {
        self.managers[0]
            .take_undecided()
            .into_iter()
            .map(|cycle| cycle.into_iter().map(|(node, id)| (node.node.0, id)).collect())
            .collect()
    }
    fn show(&self, name: &LockName) -> Option<ResourceDump> {
        let dump = self.managers[0].dump();
        dump.into_iter().flat_map(|d| d.resources).find(|r| r.name == *name)
    }
    fn fault(&mut self, _: Fault) -> Result<(), NotHere> {
        Err(NotHere)
    }
}
