//! The lock manager's messages on sessions (R2): in order, once, held back until their epoch, none of a removed life.

use super::world::{Event, World, space_id};
use quorate_dlm::sim::Effect;
use quorate_membership::{Epoch, Identity, Instant, Proof, Request};
use std::collections::VecDeque;
use std::time::Duration;

/// What is on its way from one life to another.
#[derive(Debug, Default)]
pub(crate) struct Pipe {
    messages: VecDeque<(Epoch, Vec<u8>)>,
    last: Instant,
}

impl World {
    /// Does what the lock manager of this life wants.
    pub(crate) fn carry_out(&mut self, who: Identity, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Send { to, bytes } => self.send(who, to, bytes),
                Effect::Done { id, completion } => {
                    self.locks_changed = true;
                    if let Some(app) = self.app(who) {
                        app.told.push_back((id, completion));
                        if app.told.len() == 1 {
                            self.after(Duration::ZERO, Event::Hear(who));
                        }
                    }
                }
                Effect::Blocking { id, .. } => self.on_blocking(who, id),
                Effect::Rebuilt { epoch } => self.prove_rebuilt(who, epoch),
                Effect::Quiet => unreachable!("nobody leaves the lockspace"),
                Effect::Undecided { .. } => unreachable!("nobody sets NODLCKWT"),
            }
        }
        self.plan_lock_tick(who);
    }

    fn plan_lock_tick(&mut self, who: Identity) {
        let Some(app) = self.app(who) else { return };
        if let Some(at) = app.locks.next_deadline()
            && app.lock_tick.is_none_or(|t| at < t)
        {
            app.lock_tick = Some(at);
            let at = self.global(who.node, at);
            self.events.at(at, Event::LockTick(who));
        }
    }

    pub(crate) fn tick_locks(&mut self, who: Identity) {
        let now = self.cluster.local_now(who.node);
        let Some(app) = self.app(who) else { return };
        app.lock_tick = None;
        let effects = app.locks.tick(now);
        self.carry_out(who, effects);
    }

    fn prove_rebuilt(&mut self, who: Identity, epoch: Epoch) {
        let Some(app) = self.app(who) else { return };
        let view = app.view.clone();
        for (debtor, debt) in &view.debts {
            if debt.removed <= epoch && debt.items.get(&space_id()).is_some_and(|i| !i.rebuilt) {
                let proof = Proof::Rebuilt { epoch };
                let request = Request::Prove { debtor: *debtor, resources: [space_id()].into(), proof };
                self.after(Duration::ZERO, Event::Propose(who, request));
            }
        }
    }

    fn send(&mut self, from: Identity, to: Identity, bytes: Vec<u8>) {
        let Some(epoch) = self.app(from).map(|a| a.view.epoch) else { return };
        let slow = self.faulty && self.rng.chance_ppm(10_000);
        let wait = Duration::from_micros(50 + self.rng.below(if slow { 100_000 } else { 500 }));
        let at = self.now() + wait;
        let pipe = self.pipes.entry((from, to)).or_default();
        pipe.last = pipe.last.max(at);
        pipe.messages.push_back((epoch, bytes));
        self.events.at(pipe.last, Event::Deliver { from, to });
    }

    /// The first message of the pipe arrives, or waits for a path, for the view or for the process.
    pub(crate) fn deliver(&mut self, from: Identity, to: Identity) {
        let Some((epoch, _)) = self.pipes.get(&(from, to)).and_then(|p| p.messages.front()) else { return };
        let epoch = *epoch;
        let is_cut = self.cluster.network.is_cut(from.node, to.node)
            || self.cluster.network.is_cut(to.node, from.node);
        let lives = self.cluster.member(to.node).is_some_and(|m| m.me() == to);
        let installed = self.app(to).map(|a| a.view.clone());
        let waits = match &installed {
            Some(view) => is_cut || view.epoch < epoch,
            None => lives,
        };
        if waits {
            return self.after_ms(3, Event::Deliver { from, to });
        }
        let Some(view) = installed else {
            self.pipes.remove(&(from, to));
            return;
        };
        let message = self.pipes.get_mut(&(from, to)).and_then(|p| p.messages.pop_front());
        let Some((_, bytes)) = message.filter(|_| view.contains(from)) else { return };
        let now = self.cluster.local_now(to.node);
        let Some(app) = self.app(to) else { return };
        let effects = app.locks.deliver(now, from, &bytes);
        self.locks_changed = true;
        self.carry_out(to, effects);
    }
}
